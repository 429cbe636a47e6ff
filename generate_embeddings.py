# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "huggingface-hub==2.4.0",
#     "pillow==13.0.0",
#     "requests==2.34.2",
#     "urllib3==2.8.0",
#     "supabase==2.34.1",
#     "python-dotenv==1.2.4",
#     "tqdm==4.70.1",
#     "jinja2==3.1.6",
# ]
#
# # On Linux uv takes torch's build without CUDA, gigabytes smaller.
# # With a GPU, the first time: uv run --no-sources --reinstall-package torch generate_embeddings.py
# [tool.uv.sources]
# torch = { index = "pytorch-cpu", marker = "sys_platform == 'linux'" }
#
# [[tool.uv.index]]
# name = "pytorch-cpu"
# url = "https://download.pytorch.org/whl/cpu"
# explicit = true
# ///
"""Give every product image in a Supabase database (or a folder) a CLIP embedding.

    pending assets (the store finds them) -> fetch -> decode -> embed -> store -> report

`main` reads flags and settings. `embed_all` asks the store for its status. With --search it
answers the questions and ends. With --dry-run it lists assets and ends. Otherwise, if anything is
pending, the steps overlap in `Run.loop`: the first images are fetched while the model is loaded.
The report is printed in any case, also after an error. The gallery (--gallery) comes last, unless
the run was stopped or could not continue.

Words
    asset     one product image to embed: an id, and where its image is
    pending   without an embedding of this image and model version, and due: an asset that failed
              is tried again in the next run, then less and less often (in a folder: each run)
    store     where assets and embeddings are: a Supabase database, or a folder
    host      a server of images
    strain    a sign that a host can't cope, such as a 503
    levels    a uint8 array (224, 224, 3), what CLIP sees of an image
    pixels    the same as float32 (3, 224, 224), normalised: what CLIP's image tower takes
    vector    a float32 array (512,) of unit length, made from what the tower gives

Sections
    The story        main, embed_all, Report: a run from its start to its printed report
    Words            what the sections hand to each other, the reasons of failures, Store, Settings
    The run          Run (one loop), Task, Job, Pace, Host, Progress, Stop
    Stores           SupabaseStore, FolderStore
    Fetching         Fetcher, Deadline, and Guard: where a connection may go
    Pictures         from a file's bytes to levels
    Decoders         the processes that do this, their limits and their sandbox
    Model            the two towers, their weights and the download
    The gallery, the question    --gallery and --search
    Command line     flags, settings, output on the terminal

Who runs where
    Main thread      the loop of Run, which alone touches Run, Job, Host, Pace and Report;
                     Store.locate
    Run.background   a pool of threads, a task each: load the model, find a page, store a batch (one
                     at a time), fetch an image or wait for its decoder. A download that hangs keeps
                     its thread: therefore the process ends by os._exit.
    Run.embedders    a pool with one thread a core (one in all on a GPU), a batch each
    Decoders         processes, one a core: no file is trusted, and any may crash its decoder
    in_time          a thread for each call to the store that may hang: status, a page, a batch
    Short-lived      a timer for each file being decoded (reply_of), a thread a core while weights
                     are laid out (read_layers)
    tqdm             a thread of its own
    --gallery, --search    after the run, or without one. They use the main thread and their own
                     decoders. The gallery also has a pool that fetches.

Where other questions are answered
    How many downloads run at once, what a 503 does, when a host is given up: Pace
    What a host's response means: STRAINED
    When a run ends early, with which exit code, and what bounds memory: Run
    In which order a store is called, and how a third store is added: Store
    What happens to an image that changes meanwhile: Store
    How a flag or a setting is added: Settings

What an upgrade of a package may break: undocumented details, and packages that come along
    urllib3     connection._new_conn, response_class, pool_classes_by_scheme (guarded_adapter)
    http.client _MAXHEADERS, response.fp (guarded_adapter); socket.SocketIO._sock (Timed)
    requests    adapter.cert_verify, proxy_manager, utils.get_environ_proxies (Fetcher); brings
                certifi, which we use
    huggingface_hub    the cache's layout, `*.incomplete`, file_download._ETAG_RETRY_TIMEOUT
                (Model); brings filelock, which we use
    torch       torch.ops.mkldnn._linear_pointwise, _reorder_linear_weight (Linear), names in
                torch.cpu.get_capabilities (has_bfloat16)
    transformers    brings numpy, tokenizers and safetensors, which we use; is not imported itself
    supabase    brings httpx and postgrest, whose exceptions we handle (SupabaseStore)
    pillow      TiffImagePlugin.READ_LIBTIFF, PngImagePlugin.MAX_TEXT_CHUNK, a GIF's dispose_extent
                (Pictures), Image.preinit, AvifImagePlugin.DEFAULT_MAX_THREADS (Decoders)
    PostgreSQL, PostgREST    codes of errors (SupabaseStore)

Exit codes: 0 all done, 1 some images failed or their host did not cope, 2 the run could not start
or could not continue, 130 after Ctrl-C, 143 after SIGTERM, 129 after the terminal closed.
"""

from __future__ import annotations

import os
import signal
import sys

AS_DECODER = "as-decoder"  # the one argument of a Decoder's process, see RUN_DECODER
IN_DECODER = sys.argv == ["-c", AS_DECODER]


def end_at_once(number: int, _: object) -> None:
    """Handles a stop while there is nothing to store: no traceback, no waiting."""
    os._exit(128 + number)


def handle_stops(handler: Any) -> None:
    """Sets the handler of Ctrl-C, SIGTERM and SIGHUP. A signal that is ignored from the start (in a
    background job, by nohup) stays ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


if IN_DECODER:
    handle_stops(signal.SIG_IGN)  # the run ends its decoders
elif __name__ == "__main__":
    handle_stops(end_at_once)  # also during the imports
if sys.version_info < (3, 11):
    print("error: Python 3.11 or later is needed, not " + sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import argparse
import base64
import contextlib
import csv
import ctypes
import difflib
import hashlib
import heapq
import io
import ipaddress
import itertools
import json
import logging
import math
import queue
import random
import re
import shutil
import socket
import sqlite3
import ssl
import struct
import subprocess
import threading
import time
import traceback
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit

INSTALL = (
    "run pip install -r requirements.txt in an active virtual environment "
    "(python3 -m venv .venv makes it, . .venv/bin/activate activates it)"
)
try:
    from PIL import (
        AvifImagePlugin,
        ExifTags,
        Image,
        ImageCms,
        PngImagePlugin,
        TiffImagePlugin,
        UnidentifiedImageError,
    )

    if not IN_DECODER:  # a decoder does not need these, and starts twice as fast without them
        import http.client
        from urllib.request import getproxies

        import certifi
        import dotenv
        import numpy as np
        import requests
        import urllib3
        from requests.cookies import RequestsCookieJar
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm
        from urllib3.exceptions import HTTPError
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}: {INSTALL}", file=sys.stderr)
    sys.exit(2)

# torch and supabase are imported where they are used. Their import takes seconds, and a usage error
# or a run with nothing to do should not wait for it.

log = logging.getLogger("generate_embeddings")

VERSION = "2.0"
MODEL_ID = "openai/clip-vit-base-patch32"
MODEL_REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"  # pinned: vectors must not drift
MODEL_VERSION = "clip-vit-base-patch32"  # of rows; one with another value counts as not embedded
CONTRACT = 3  # the version of schema.sql's functions
DIMENSIONS = 512  # of a vector
SIDE = 224  # pixels; CLIP sees a square
HERE = Path(__file__).resolve().parent

# ============================================================================ The story


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    # Python processes that libraries start (tqdm on macOS) must import nothing from this folder.
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.stderr is None:  # 2>&-
        # Else the next file that is opened gets number 2, and our messages.
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    stop = Stop()
    try:
        flags = read_flags(argv)
        set_up_output("verbose" in flags)
        if "version" in flags:
            say_version()
            return 0
        code = embed_all(read_settings(flags), stop)
        return stop.code or code
    except RunError as error:
        trouble = str(error)
    except ImportError as error:
        trouble = f"{error}: {INSTALL}"
    except Exception as error:
        # A defect. Exit code 1 would say that some images failed.
        log.debug("", exc_info=True)
        trouble = f"unexpected {type(error).__name__}: {error}; -v says more"
    say_error(trouble)
    return stop.code or 2


def embed_all(settings: Settings, stop: Stop) -> int:
    """A run, from its start to its printed report. Returns the exit code."""
    store = open_store(settings, stop)
    status = in_time(store, store.status)
    if settings.search:
        return answer_questions(store, settings, status)
    report = Report(status, settings)
    log.info("%s", report.beginning())
    if settings.dry_run:
        say_what_would_be_done(store, settings, report)
        return 0

    with stop:
        try:
            if report.pending:
                log.info("vectors go to %s", store.label)
                log.info("loading the model")
                Run(store, settings, report, stop).loop()
            elif status.assets:
                log.info("nothing to do")
            else:
                log.info("nothing to do: there are no assets yet")
        finally:
            report.print()

    if stop.code:
        log.info("stopped: run the same command again to go on")
    elif settings.gallery:
        done = status.done + report.embedded
        assets = max(status.assets, done)  # some came during the run
        Gallery(store, settings, status._replace(assets=assets, done=done), {}).write()
    elif settings.local and report.embedded and sys.stderr.isatty():
        log.info("next: --gallery FILE.html shows what looks alike. Supabase: see README.md")
    return report.exit_code


def open_store(settings: Settings, stop: Stop) -> Store:
    """Where this run's assets and embeddings are."""
    if settings.local:
        return FolderStore(settings)
    check_proxies()
    return SupabaseStore(settings, stop)


def in_time(store: Store, call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call to the store returns. The call has a thread of its own: a connection may stay
    open without ever answering. Raises RunError when the store's patience is over."""
    try:
        return ThreadPoolExecutor(1).submit(call, *arguments).result(store.patience)
    except TimeoutError:
        raise RunError(f"{SILENCE} for {store.patience:.0f} s: {CHECK_URL}") from None


def say_what_would_be_done(store: Store, settings: Settings, report: Report) -> None:
    """Prints how many assets would be embedded, and the first few of them."""
    goal = report.pending
    if settings.limit:
        goal = min(goal, settings.limit)
    print(f"Would embed {counted(goal, report.noun)} as {settings.model_version}")
    first_page = next((page for page in store.pages() if page), [])
    for asset in first_page[: min(5, goal)]:
        print(printable(f"  {asset}"))


class Report:
    """The counts of a run. An asset counts as attempted when the store has taken its result.

    Always: attempted == embedded + failed.
    """

    MOST_REASONS = 50  # lines; a catalog may have a reason for each image
    MOST_EXAMPLES = 3  # assets to a reason

    def __init__(self, status: Status, settings: Settings) -> None:
        self.status = status  # as the run found it
        self.noun = "image" if settings.local else "asset"  # an asset is a row of a database
        self.waiting = 0  # failed before, and not tried by this run
        if not settings.retry_failed:
            self.waiting = status.waiting
        self.pending = status.assets - status.done - self.waiting  # to be tried now
        self.found = 0  # pending assets that the store handed out
        self.found_all = False
        self.embedded = 0  # and stored
        self.not_taken = 0  # by the store: changed or gone meanwhile
        self.reasons: Counter[str] = Counter()  # of what failed
        self.examples: dict[str, list[str]] = {}  # by reason; assets may hold data: URLs
        self.left_of: Counter[str] = Counter()  # not tried; by the host given up, and why it was
        self.started = time.monotonic()
        self.when_due = ""  # such as "tried again from 12:00:05 on"
        if self.waiting and status.next_attempt:
            seconds = (status.next_attempt - datetime.now(UTC)).total_seconds()
            self.when_due = f"tried again from {clock(seconds)} on"

    @property
    def failed(self) -> int:
        return self.reasons.total()

    @property
    def attempted(self) -> int:
        return self.embedded + self.failed

    @property
    def left(self) -> int:
        """Pending assets without a result: not reached, of a host given up, or changed."""
        known = self.found
        if not self.found_all:
            known = max(self.pending, self.found)
        return known - self.attempted

    @property
    def exit_code(self) -> int:
        """The exit code of a run that came to its end."""
        return 1 if self.failed or self.left_of else 0

    def count(self, result: Result, taken: bool) -> None:
        """Counts a result. `taken`: whether the store took it."""
        if not taken:
            self.not_taken += 1
        elif isinstance(result, Embedded):
            self.embedded += 1
        else:
            reason = str(result)
            self.reasons[reason] += 1
            examples = self.examples.setdefault(reason, [])
            if len(examples) < self.MOST_EXAMPLES:
                examples.append(str(result.asset))

    def beginning(self) -> str:
        """What is said before the run."""
        status = self.status
        parts = []
        if status.done:
            parts.append(f"{status.done:,} done")
        if self.waiting:
            parts.append(f"{self.waiting:,} failed before, {self.when_due}")
        parts.append(f"{self.pending:,} to do")
        again = status.failed - self.waiting
        if again:
            parts.append(f"of which {again:,} failed before")
        return f"{counted(status.assets, self.noun)}: {', '.join(parts)}"

    def print(self) -> None:
        """Prints the report to stdout."""
        with contextlib.suppress(OSError):  # as in: ... | head -1
            for line in self.lines():
                print(printable(line), flush=True)

    def lines(self) -> Iterator[str]:
        """What is printed at the end; the last line is for programs."""
        seconds = time.monotonic() - self.started
        yield f"Embedded {self.embedded:>9,}"
        yield f"Failed   {self.failed:>9,}"
        for reason, count in self.reasons.most_common(self.MOST_REASONS):
            yield f"  {count:>6,}  {reason}"
            advice = advice_on(reason.partition(": ")[2])
            if advice:
                yield f"          {advice}"
            for example in self.examples[reason]:
                yield f"          {example}"
        if self.waiting:
            when = f"{self.when_due}; --retry-failed: now"
            yield f"Waiting  {self.waiting:>9,}  failed before, {when}"
        yield f"Left     {self.left:>9,}"
        for host, count in self.left_of.most_common(self.MOST_REASONS):
            yield f"  {count:>6,}  of {host}"
        if self.not_taken:
            yield f"  {self.not_taken:>6,}  changed or gone meanwhile"
        yield f"Elapsed  {seconds:>8.1f}s"
        yield (
            f"embedded={self.embedded} failed={self.failed} left={self.left} "
            f"attempted={self.attempted} waiting={self.waiting} seconds={seconds:.1f}"
        )


def clock(seconds: float) -> str:
    """The time that many seconds from now, as people read it."""
    when = datetime.now() + timedelta(seconds=seconds)
    if seconds < 20 * 3600:
        return f"{when:%H:%M:%S}"
    return f"{when.day} {when:%B}"


# ================================================================================ Words


class RunError(Exception):
    """The run can't start or continue; the message is one line that says what to do."""


class ImageError(Exception):
    """An image can't be used; the message is a reason of the table below."""


class Strain(ImageError):  # noqa: N818 - the host's fault, no error of ours
    """A host did not cope: it is busy, silent, or lost the connection."""

    def __init__(self, reason: str, rest: float = 0.0, first_byte: float | None = None) -> None:
        super().__init__(reason)
        self.rest = rest  # seconds that the host asked for (Retry-After)
        self.first_byte = first_byte  # when the body began, if it then came too slowly


# Each reason is here once, with what its reader can do about it. A reported reason may have a
# detail in parentheses after its name. The gallery shows the advice to the owner of a shop.

ADVICE: dict[str, str] = {}


def enter_reason(name: str, advice: str) -> str:
    """Enters a reason into the table; returns its name."""
    ADVICE[name] = advice
    return name


def advice_on(reason: str) -> str:
    """What to do about a reported reason; empty where we don't know."""
    return ADVICE.get(reason.partition(" (")[0], "")


_CORRECT = "Correct the address."
_LATER = "The host has trouble. Later runs try again."
_BUSY = "The host wants fewer requests. Later runs try again."
_CLOSED = "The host refuses us: make the image public, or ask the host to let us in."
_OTHER_FORMAT = "Ask for the image as JPEG or PNG."
_DAMAGED = "The file is damaged or was cut off: ask for it again."
_SMALLER = "Save it smaller: 2,000 pixels a side are plenty."
_AS_FILE = "Upload the picture as a file, and give its address."

NO_IMAGE = enter_reason("no image URL", "Give the product an image.")
NO_URL = enter_reason("no full URL", "Ask your developer to turn it into a full URL.")
MANY_URLS = enter_reason("a list or JSON, not one URL", "Ask your developer to use just the first.")
NOT_A_URL = enter_reason("not a valid URL", _CORRECT)
OTHER_SCHEME = enter_reason("only http, https and data URLs are fetched", _CORRECT)
BAD_STORAGE_PATH = enter_reason("a storage path with '..' or '\\' in it", _CORRECT)
PRIVATE_BUCKET = enter_reason(
    "a private bucket, or none of that name",
    "Ask your developer to make the bucket public, or to name it in STORAGE_BUCKETS.",
)
PRIVATE_ADDRESS = enter_reason(
    "a private address",
    "Ask your developer: ALLOW_PRIVATE_IMAGE_HOSTS=1 allows pictures in your own network.",
)
BROKEN_DATA_URL = enter_reason("a data: URL that is broken, or not in base64", _AS_FILE)
LONG_DATA_URL = enter_reason("a data: URL that is too long", _AS_FILE)
UNREADABLE = enter_reason("can't be read", "Check that the file exists, and that you may read it.")
TOO_LARGE = enter_reason("a file that is too large", _SMALLER)
NO_HOST = enter_reason("host not found", "No host has this name: correct the address.")
NO_NAME_SERVER = enter_reason(
    "no name server answered",
    "This machine's network is down, or the host's domain has trouble. Later runs try again.",
)
CERTIFICATE = enter_reason(
    "the host's certificate is not valid",
    "It has expired, belongs to another host, or is incomplete: tell whoever runs the host.",
)
NO_TLS = enter_reason("TLS failed", _LATER)
NO_ANSWER = enter_reason("no answer in time", _LATER)
TOO_LATE = enter_reason("not complete in time", _LATER)
REFUSED = enter_reason("connection refused", _LATER)
UNREACHABLE = enter_reason("host not reachable", _LATER)
CONNECTION_LOST = enter_reason("connection lost", _LATER)
BAD_COMPRESSION = enter_reason("a broken compression", _LATER)
BAD_REDIRECT = enter_reason("a redirect that leads nowhere", _CORRECT)
for _statuses, _words in (
    (range(100, 500), "The host does not give us the image: check that the address is right."),
    (range(500, 600), _LATER),
    ((401, 402, 403, 451), _CLOSED),
    ((404, 410), "Nothing is at this address: correct it, or upload the image again."),
    ((407,), "Ask your developer: the proxy asks for a name and a password."),
    ((408, 425), _LATER),
    ((202, 423), "The image is not ready yet, or the host keeps robots out. Later runs try again."),
    ((420, 429, 430), _BUSY),
):
    for _status in _statuses:
        enter_reason(f"HTTP {_status}", _words)

EMPTY = enter_reason("an empty file", _DAMAGED)
WEB_PAGE = enter_reason(
    "a web page, not an image",
    "The address is wrong, or the host asks for a login or keeps robots out: open it in a "
    "browser, and copy the address of the image itself.",
)
SVG = enter_reason("an SVG drawing, which has no pixels", _OTHER_FORMAT)
JSON = enter_reason("JSON, not an image", _OTHER_FORMAT)
PDF = enter_reason("a PDF, not an image", _OTHER_FORMAT)
HEIC = enter_reason("HEIC", "Ask for it as JPEG, or ask your developer to install pillow-heif.")
OTHER_FORMAT = enter_reason("not an image in a known format", _OTHER_FORMAT)
RARE_FORMAT = enter_reason("an image of a rare kind", "Save it as an ordinary 8-bit JPEG or PNG.")
BROKEN = enter_reason("broken or truncated image file", _DAMAGED)
TOO_SMALL = enter_reason("too few pixels", "Ask for a larger image.")
TOO_MUCH = enter_reason("needs too much memory to decode", _SMALLER)
TOO_SLOW = enter_reason("takes too long to decode", _SMALLER)
DECODER_LOST = enter_reason(
    "its decoder was killed, or hung", "Ask your developer to check this machine's memory."
)
DEFECT = enter_reason("an unexpected error", "Ask your developer: this is a bug in the program.")
NOT_FINITE = enter_reason("the model gave numbers that are not finite", "Ask your developer.")


Id = str | int  # uuid and text come as str


class Asset(NamedTuple):
    """One image to embed: the id that it has in the store, and a URL or a path."""

    id: Id
    image: str
    image_hash: int = 0  # made by the store, from the URL or from the file's state
    size: int = 0  # bytes of the whole text: the database cuts `image` where it is too long
    title: str = ""  # as its owner knows it

    def __str__(self) -> str:
        if self.id == self.image:
            return self.image
        parts = (str(self.id), shorten(self.title), shorten(self.image))
        return "  ".join(part for part in parts if part)


class Source(NamedTuple):
    """Where an image's file is, and the headers to send there."""

    where: str | Path  # a URL, or a file
    headers: Mapping[str, str]

    @property
    def host(self) -> str:
        """The image host; empty for files, data: URLs and what is no URL."""
        if isinstance(self.where, Path) or not re.match("(?i)https?://", self.where):
            return ""
        if len(self.where) > LONGEST_URL:  # parsing it would block the loop for seconds
            return ""
        # As requests reads it. Else http://one\@other/ would count for a host that is not asked.
        with contextlib.suppress(ValueError):
            return urllib3.util.parse_url(self.where).netloc or ""
        return ""


class Download(NamedTuple):
    """The bytes of an image's file, and how long they took."""

    data: bytes
    seconds: float  # from the start of the attempt
    body_seconds: float  # of these, from the first byte on


class Embedded(NamedTuple):
    """An asset with its vector, float32 (512,) of unit length."""

    asset: Asset
    vector: np.ndarray


class Failed(NamedTuple):
    """An asset that got no vector. Stages: fetch, decode, embed."""

    asset: Asset
    stage: str
    reason: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


Result = Embedded | Failed


class Status(NamedTuple):
    """How many assets there are of the run's client and shard."""

    assets: int
    done: int
    failed: int  # in an earlier run, and not embedded since
    waiting: int = 0  # of `failed`: those that are not due yet
    next_attempt: datetime | None = None  # when the first of `waiting` is due


# What a store tells the gallery, and a question


@dataclass(frozen=True)
class Picture:
    """An asset as people know it."""

    id: Id
    image: str  # a URL, or a path below the folder
    client: str = ""
    title: str = ""
    link: str = ""  # the product's page

    @property
    def name(self) -> str:
        """Its title, or else the last part of its URL's path."""
        if self.title:
            return self.title
        if self.image[:5].lower() == "data:":
            return str(self.id)
        path = re.split("[?#]", self.image)[0].rstrip("/")
        return unquote(path.rpartition("/")[2]) or str(self.id)


@dataclass(frozen=True)
class Match:
    """A picture that was found, with its cosine to the question."""

    picture: Picture
    similarity: float


@dataclass(frozen=True)
class FailedPicture:
    """A picture that could not be used, and why."""

    picture: Picture
    reason: str


@dataclass(frozen=True)
class Pair:
    """Two pictures that look the same."""

    one: Picture
    other: Picture
    similarity: float
    same: bool = False  # their vectors are equal; a folder compares files


@dataclass(frozen=True)
class Catalog:
    """What a store tells the gallery."""

    pairs: list[Pair]
    sought_among: int  # pictures that were searched for exact copies
    compared: int  # pictures that were compared with all others
    samples: list[list[Match]]  # each: a picture, then those nearest to it
    failures: list[FailedPicture]


class Store(Protocol):
    """Where assets and embeddings are, and what a run asks and tells there.

    To add a third kind of store
        - write a class with the methods below, which itself applies client, shard, model_version,
          retry_failed and dry_run of the Settings;
        - add a line to `open_store`, and a flag or a setting that chooses the store;
        - look at each `settings.local`, and at `read_settings`: without --local it asks for
          Supabase's settings.

    Order of calls
        - `status` comes first, then `pages`, once. A page may be empty.
        - `save` is called once at a time, perhaps while `pages` is at work in another thread.
        - `locate` is called for each image in the loop, so it must not wait. --gallery calls it in
          several threads.
        - `catalog` and `search` are called after a run, or without one.
    Each call, and each page, may come in another thread. All may raise RunError, which ends the
    run.

    An image may change between `pages` and `save`. Therefore an asset comes back with the
    `image_hash` that the store gave it. SupabaseStore compares URLs. If the URL has changed, it
    does not take the result, and the asset is left for the next run. If only the bytes behind the
    URL have changed, nobody notices. FolderStore stores the result under the old hash. The next
    run finds another hash, and embeds the image again.
    """

    label: str  # in words, for the log
    patience: float  # seconds: a call that takes longer counts as hung

    def status(self) -> Status:
        """What there is; asked before anything heavy is loaded."""

    def pages(self) -> Iterator[list[Asset]]:
        """Pending assets in a fixed order, a page at a time and each once. Those that failed in
        an earlier run come last, so that they never keep the others waiting."""

    def locate(self, asset: Asset) -> Source:
        """Where an image is; raises ImageError."""

    def save(self, results: list[Result]) -> set[Id]:
        """Stores vectors and notes failures, all or nothing. Returns the ids of the results that
        were taken: the other assets changed or vanished meanwhile."""

    def catalog(self, embedded: int) -> Catalog:
        """What the gallery shows; raises RunError. `embedded`: how many pictures have a vector,
        for a store that asks in parts."""

    def search(self, vector: np.ndarray, wanted: int) -> list[Match]:
        """The pictures whose vectors are nearest to one (512,), nearest first."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on: the flags of the command line, then the settings that come from the
    environment or .env. (Proxies, certificates, huggingface_hub's variables and OMP_NUM_THREADS are
    read where they are used, as the libraries do.)

    To add a flag: a field with its default here, a line in `flags_parser` under the field's name
    and without a default, and a line in README.md. To add a setting: a field, an entry in SETTINGS,
    which says how its text must look, and a line in README.md and in .env.example. Then use
    `settings.<field>`: Run, the stores, Fetcher, the encoders and Gallery have the Settings;
    decoders and the download of the model do not.
    """

    local: Path | None = None
    limit: int | None = None
    client: str | None = None
    shard: Shard | None = None
    workers: int = 8
    batch_size: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    gallery: Path | None = None
    search: tuple[str, ...] = ()
    dry_run: bool = False
    retry_failed: bool = False
    verbose: bool = False

    url: str = field(default="", repr=False)
    key: str = field(default="", repr=False)
    model_version: str = MODEL_VERSION
    clip_model: str = ""
    fetch_seconds: float = 30.0
    db_retry_seconds: float = 180.0
    private_hosts: bool = False
    storage_buckets: str = ""
    key_source: str = ""  # the name of the key's setting, and where it was read


class Shard(NamedTuple):
    """One of several parts of a catalog, counted from 1."""

    part: int
    parts: int


def printable(text: str) -> str:
    """Text from outside, safe to print: one line, no escape codes. Spaces of all kinds stay: macOS
    uses rare ones in the names of screenshots."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else "?" for c in text)


def shorten(text: str, width: int = 60) -> str:
    """The text in at most `width` characters, without its middle."""
    if len(text) <= width:
        return text
    half = width // 2 - 2
    return f"{text[:half]}...{text[-half:]}"


def near_name(name: str, names: Iterable[str]) -> str:
    """Which of the names was probably meant; empty where none is near."""
    plain = {other.casefold(): other for other in names}
    near = difflib.get_close_matches(name.strip().casefold(), plain, n=1)
    return plain[near[0]] if near else ""


def counted(count: int, noun: str) -> str:
    """A number of things, in words."""
    plural = "" if count == 1 else "s"
    return f"{count:,} {noun}{plural}"


# ============================================================================== The run

# A core embeds 10 (float32) to 40 images/s, more in batches. A connection to a host that is 300 ms
# away brings 3 images/s.
WORKERS_PER_CORE = 8
MOST_WORKERS = 64  # downloads from one host; few hosts like more
MOST_LOADS = 64  # downloads from all hosts together, and files that are decoded
FIRST_WINDOW = 4  # downloads from a host that we know nothing of
FIRST_WINDOW_OF_LINE = 16  # downloads from all hosts, until we know the bandwidth
QUICK_SECONDS = 2.0  # an image that comes sooner widens the window
SLOW_SECONDS = 8.0  # one that comes later narrows it
TRIES = 4  # at one image, in a run
PATIENT_ROUNDS = 3  # of strain in a row, before a host is given up
PATIENT_SECONDS = 60.0  # without an image, before that
ASKING_ROUNDS = 6  # in a row, in which a host may ask for rests; then they count as its silence
LONGEST_REST = 900.0  # seconds of rest that a host may ask for, since its last image
SILENT_SECONDS = 2.0  # a download without a byte for so long counts as using no bandwidth

PAGE_ROWS = 250  # assets to a page
MOST_IN_WORK = 20_000  # assets that are found and not yet stored; most wait for their hosts
LONG_URL = 1600  # characters; each 1,600 of them count as one more asset
WRITE_ROWS = 50  # results to a call: at a million rows far below the timeout of 8 s
WRITE_SECONDS = 2.0  # then a batch is stored even if it is not full
JOBS_KEPT = 10_000  # 40 MB: of images that further assets may share
LONGEST_DECODE = 600.0  # seconds, the wait for a free decoder included
POLL_SECONDS = 0.2  # how soon Ctrl-C is noticed
ECHO_SECONDS = 0.5  # signals that are this close count as one: timeout(1) sends each of its twice
BACKGROUND_THREADS = 9999  # no bound: a download that hangs keeps its thread


@dataclass(eq=False)
class Task:
    """Work under way in a pool, and what the loop does with its outcome.

    `take` gets what the work returned, `fail` the exception that it raised, both in the loop's
    thread. A task is given up after its deadline: `fail` gets `late`, or else Deadline.missed().
    A later outcome of the work is dropped.
    """

    step: str  # model, find, fetch, decode, embed or store
    take: Callable[[Any], None]
    fail: Callable[[Exception], None]
    deadline: Deadline | None = None
    late: Exception | None = None
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Job:
    """An image to load, once for all assets that share it."""

    source: Source
    assets: list[Asset]
    since: float = 0.0  # when the last try began
    strains: list[Strain] = field(default_factory=list)  # those that count as a try
    told_at: float = math.inf  # how many images its host had sent when it told this one to wait
    pixels: np.ndarray | None = None  # while they wait for the model
    result: Result | None = None  # of the first asset, as soon as there is one


class Pace:
    """How many downloads may run at once (the window), and when the next one may start.

    As in TCP, the window grows while images come quickly: by one an image up to the threshold, and
    by one a round above it. Strain halves the window, and sets the threshold to that. Downloads
    that were under way at the last halving don't halve it again: together they are one round.
    Three strains in a row, or one in a window below three, leave one download at a time, with rests
    of 1, 2, 4, 8 and 16 s, longer with each round. A host that asks for a rest (Retry-After) gets
    that instead. A host is given up after PATIENT_ROUNDS of strain and PATIENT_SECONDS without an
    image, or when it asks for more than LONGEST_REST. Rests that it asked for don't count as
    seconds without an image, unless it asks again and again. tests/test_pace.py simulates hosts.

    Times are those of time.monotonic(). What a 503 with Retry-After: 5 does: the window is halved,
    no download of the host starts for 5 s, and Run puts the image at the end of its queue.
    """

    def __init__(self, window: int, most: int) -> None:
        self.window = float(min(window, most))
        self.most = most
        self.threshold = float(most)
        self.rest_until = 0.0
        self.given_up = False
        self._halved = 0.0  # when the window last was
        self._fastest = math.inf  # seconds of an image
        self._strains = 0  # since the last image
        self._rounds = 0  # of strain, since the last image
        self._row_began = 0.0  # when the first of these strains came
        self._asked_for = 0.0  # seconds of rest that the host asked for, since the last image

    def arrived(self, now: float, seconds: float) -> None:
        """An image came, after so many seconds."""
        self._strains = 0
        self._rounds = 0
        self._asked_for = 0.0
        self._fastest = min(self._fastest, seconds)
        if seconds < max(QUICK_SECONDS, 1.5 * self._fastest):
            step = 1.0 if self.window < self.threshold else 1 / self.window
            self.window = min(self.most, self.window + step)
        elif seconds > SLOW_SECONDS:
            self.slow_down(now, now - seconds)

    def strained(self, now: float, since: float, rest: float) -> None:
        """A download that began at `since` met strain; `rest`: seconds that the host asks for."""
        if not self._strains:
            self._row_began = now
        self._strains += 1
        narrow = self.window < 3
        if self.slow_down(now, since):
            self._rounds += 1
        if rest:
            self._asked_for += max(0.0, now + rest - max(self.rest_until, now))
        elif narrow or self._strains >= 3:
            self.window = 1.0
            rest = min(16, 2 ** (self._rounds - 1))
        if rest:
            self.rest_until = max(self.rest_until, now + rest)
        patience = PATIENT_SECONDS
        if self._rounds < ASKING_ROUNDS:
            patience += self._asked_for
        tired = self._rounds >= PATIENT_ROUNDS and now - self._row_began > patience
        if tired or self._asked_for > LONGEST_REST:
            self.given_up = True

    def slow_down(self, now: float, since: float) -> bool:
        """Halves the window, unless it was halved since the download at fault began. Returns
        whether it did."""
        if since < self._halved:
            return False
        self.window = max(1.0, self.window / 2)
        self.threshold = self.window
        self._halved = now
        return True


class Host:
    """An image host, or "" for files and data: URLs: its pace, and a queue of its images."""

    def __init__(self, name: str, most: int) -> None:
        self.name = name
        self.pace = Pace(FIRST_WINDOW, most)
        self.queue: deque[Job] = deque()
        self.label = name or "this machine"
        self.loads = 0  # downloads under way, and files that are decoded
        self.images = 0  # that it sent
        self.reason = ""  # why it was given up

    def may_start(self, now: float) -> bool:
        """Whether one more of its images may be fetched."""
        return self.loads < int(self.pace.window) and now >= self.pace.rest_until


class Run:
    """Find, fetch, decode, embed and store: the steps are tasks in the background, and one loop
    takes their results and starts the next tasks.

    Each host has a queue and a Pace: a host that is slow, or rests, delays only its own images. The
    internet connection ("line") has a Pace as well. An image that met strain goes to the end of its
    host's queue, and fails after TRIES tries. A try that ended in a Retry-After counts only if the
    host has sent other images since it last told this image to wait. Images that share a URL are
    loaded once.
    On CPUs each core embeds a batch of its own in one thread: threads that share an image wait for
    each other at every layer.

    A run ends early when
        somebody stops it (Stop): exit code 130, 143 or 129, whatever else went wrong;
        a step raises RunError: exit code 2;
        the model, find, embed or store raises any other exception: exit code 2. In fetch and
            decode any other exception makes that image fail.
    What is embedded by then is stored, if the store still takes it, and reported.
    A run that came to its end has exit code 2 if all hosts were given up and none ever sent an
    image, 1 if images failed, or were left because their host was given up, else 0.

    What bounds memory, in MB, with C cores, B images to a batch, and L loads at once. L is
    --workers (8 C) if all images are of one host, and MOST_LOADS if there are many hosts.
        750             Python with its packages (400), and the model in float32 (350)
        50 L            files that are fetched or decoded, MAX_BYTES each
        DECODE_MB C     decoders, each a process of its own (only Linux has this limit)
        0.6 (L + 8 C + 2 C B)   pixels that wait for the model
        120             results, assets that wait for their hosts, results that are kept
    With 2 cores, one host and B = 1, L is 16. At worst: 750 + 800 + 2000 + 22 + 120 = 3.7 GB.
    With photographs of 1 MB a file takes 1 MB, not 50, and a decoder 80 MB, not DECODE_MB:
    750 + 16 + 160 + 22 + 120 = 1.1 GB.
    Not bounded: a folder's list of files, the hosts' names, and the Report's reasons.
    """

    def __init__(self, store: Store, settings: Settings, report: Report, stop: Stop) -> None:
        self.store = store
        self.settings = settings
        self.report = report
        self.stop = stop
        self.lanes = cores() if settings.device == "cpu" else 1  # batches embedded at once
        self.limit = settings.limit or sys.maxsize
        self.loader = Loader(settings)
        self.pages = store.pages()
        self.encoder: ClipEncoder | None = None  # until the model is loaded
        self.line = Pace(FIRST_WINDOW_OF_LINE, MOST_LOADS)
        self.hosts: dict[str, Host] = {}
        self.turns: deque[Host] = deque()  # hosts with a queue; the first is next
        self.in_work = 0  # assets that were found, and are neither stored nor left; see `weight`
        self.jobs: dict[str, Job] = {}  # by URL, oldest first: those that further assets may share
        self.ready: list[Job] = []  # to be embedded
        self.results: list[Result] = []  # to be stored
        self.store_by = 0.0  # a batch is stored by then, full or not; 0: at once
        self.trouble: Exception | None = None  # what ends the run
        self.storing = True  # until the store gives up
        self.progress = Progress(min(report.pending, self.limit))
        self.tasks: dict[Future[Any], Task] = {}
        self.finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self.embedders = ThreadPoolExecutor(self.lanes)
        self.background = ThreadPoolExecutor(BACKGROUND_THREADS)

    def loop(self) -> None:
        """Returns when there is no more to do; raises what ended the run before that."""
        self.start(Task("model", self.take_model, self.end), ClipEncoder, self.settings)
        with logging_redirect_tqdm(), self.progress.bar:
            while True:
                if not self.ending:
                    self.attempt(self.start_what_is_next)
                self.start_store()
                if not self.under_way(*self.awaited) and (self.ending or not self.turns):
                    break
                self.attempt(self.take_what_finished)
                self.attempt(self.give_up_what_hangs)
        self.check_network()
        if self.trouble:
            raise self.trouble

    @property
    def ending(self) -> bool:
        """Whether the run stores what is embedded and then ends. It finds and fetches no more."""
        return bool(self.trouble or self.stop.code)

    @property
    def awaited(self) -> tuple[str, ...]:
        """The steps that the run waits for before it ends."""
        if self.ending:
            return ("embed", "store")
        return ("model", "find", "fetch", "decode", "embed", "store")

    # Tasks, in general

    def attempt(self, step: Callable[[], None]) -> None:
        """A defect in a step ends the run, and what is embedded is still stored."""
        try:
            step()
        except Exception as defect:
            self.end(defect)

    def start_what_is_next(self) -> None:
        self.start_fetches()
        self.start_find()
        self.start_embeds()

    def start(self, task: Task, work: Callable[..., Any], *arguments: Any) -> None:
        pool = self.embedders if task.step == "embed" else self.background
        future = pool.submit(work, *arguments)
        self.tasks[future] = task
        future.add_done_callback(self.finished.put)

    def under_way(self, *steps: str) -> list[Task]:
        return [task for task in self.tasks.values() if task.step in steps]

    def take_what_finished(self) -> None:
        """Waits a moment for a task to finish, and takes its outcome."""
        try:
            future = self.finished.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return
        task = self.tasks.pop(future, None)
        if task is None:
            return  # it was given up before
        error = future.exception()
        if isinstance(error, Exception):
            task.fail(error)
        else:
            task.take(future.result())

    def give_up_what_hangs(self) -> None:
        """Gives up tasks that no time-out of a socket can end: a dead disk, a name server."""
        for future, task in list(self.tasks.items()):
            if task.deadline and task.deadline.overdue:
                del self.tasks[future]
                task.fail(task.late or task.deadline.missed())

    def end(self, error: Exception) -> None:
        """Ends the run; the first error is the one that it ends with."""
        self.trouble = self.trouble or error

    # The model, and what is pending

    def take_model(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder
        self.progress.bar.unpause()  # the rate is that of embedding

    def start_find(self) -> None:
        """Finds more assets while few are in work. While there is room for fetches, the known hosts
        are resting or slow. Then many may be in work, so that other hosts turn up."""
        if self.report.found_all or self.report.found >= self.limit or self.under_way("find"):
            return
        most = MOST_IN_WORK if self.room_for_fetches() > 0 else PAGE_ROWS
        if self.in_work < most:
            task = Task("find", self.take_page, self.end)
            self.start(task, in_time, self.store, next, self.pages, None)

    def take_page(self, page: list[Asset] | None) -> None:
        if page is None:
            self.report.found_all = True
            return
        wanted = page[: self.limit - self.report.found]
        self.report.found += len(wanted)
        for asset in wanted:
            self.in_work += weight(asset)
            self.take_asset(asset)

    def take_asset(self, asset: Asset) -> None:
        """Puts an asset's image into its host's queue, unless another asset has the same one."""
        try:
            source = self.store.locate(asset)
        except Exception as error:
            self.take_failure(Job(Source("", {}), [asset]), "fetch", error)
            return
        url = str(source.where)
        job = self.jobs.get(url)
        if job and job.result:
            self.take_result(job.result._replace(asset=asset))
        elif job:
            job.assets.append(asset)
        else:
            job = Job(source, [asset])
            if source.host and weight(asset) == 1:
                self.jobs[url] = job
            if len(self.jobs) > JOBS_KEPT:
                del self.jobs[next(iter(self.jobs))]
            self.put_into_queue(job)

    # Fetch, then decode

    def put_into_queue(self, job: Job) -> None:
        name = job.source.host
        host = self.hosts.setdefault(name, Host(name, self.settings.workers))
        if host.pace.given_up:
            self.leave(job, host)
            return
        if not host.queue:
            self.turns.append(host)
        host.queue.append(job)

    def room_for_fetches(self) -> int:
        """How many more images may be fetched now, whichever host they are of."""
        size = self.settings.batch_size
        decoded = len(self.ready) + size * len(self.under_way("embed"))
        if decoded >= self.settings.workers + 2 * size * self.lanes:
            return 0
        fetches = self.under_way("fetch")
        using_line = [task for task in fetches if not is_silent(task)]
        loads = self.under_way("fetch", "decode")
        return min(int(self.line.window) - len(using_line), MOST_LOADS - len(loads))

    def start_fetches(self) -> None:
        """Starts what the line and the hosts allow; the hosts take turns."""
        now = time.monotonic()
        for _ in range(self.room_for_fetches()):
            host = next((host for host in self.turns if host.may_start(now)), None)
            if host is None:
                return
            self.turns.remove(host)
            job = host.queue.popleft()
            if host.queue:
                self.turns.append(host)
            self.start_fetch(job, host)

    def start_fetch(self, job: Job, host: Host) -> None:
        host.loads += 1
        job.since = time.monotonic()
        deadline = Deadline(self.settings.fetch_seconds)
        take = partial(self.take_download, job, host)
        fail = partial(self.take_failed_load, job, host, "fetch")
        task = Task("fetch", take, fail, deadline)
        self.start(task, self.loader.fetch, job.source, deadline)

    def take_download(self, job: Job, host: Host, download: Download) -> None:
        host.images += 1
        now = time.monotonic()
        host.pace.arrived(now, download.seconds)
        self.line.arrived(now, download.body_seconds)
        take = partial(self.take_pixels, job, host)
        fail = partial(self.take_failed_load, job, host, "decode")
        # A decoder that a file took control of may keep its pipe open for ever.
        late = ImageError(DECODER_LOST)
        task = Task("decode", take, fail, Deadline(LONGEST_DECODE), late)
        self.start(task, self.loader.load, download.data)

    def take_pixels(self, job: Job, host: Host, pixels: np.ndarray) -> None:
        host.loads -= 1
        job.pixels = pixels
        self.ready.append(job)

    def take_failed_load(self, job: Job, host: Host, stage: str, error: Exception) -> None:
        host.loads -= 1
        if isinstance(error, Strain):
            self.take_strain(job, host, error)
        else:
            self.take_failure(job, stage, error)

    def take_strain(self, job: Job, host: Host, strain: Strain) -> None:
        """The image is tried again later, and its host gets fewer downloads, or rests."""
        pace = host.pace
        now = time.monotonic()
        rested_until = pace.rest_until
        given_up = pace.given_up
        pace.strained(now, job.since, strain.rest)
        if strain.first_byte is not None:
            self.line.slow_down(now, strain.first_byte)
        # If the host has sent others since it told this image to wait, it means this image.
        if not strain.rest or host.images > job.told_at:
            job.strains.append(strain)
        if strain.rest:
            job.told_at = host.images
        if pace.given_up and not given_up:
            self.give_up(host, strain)
        elif pace.rest_until > rested_until + 1:
            log.info("%s rests until %s: %s", host.label, clock(pace.rest_until - now), strain)
        if len(job.strains) == TRIES:
            self.take_failure(job, "fetch", strain)
        else:
            self.put_into_queue(job)

    def give_up(self, host: Host, strain: Strain) -> None:
        """Its images that met strain now fail, if that counted as a try. The others are left."""
        host.reason = str(strain)
        if strain.rest:
            host.reason = f"{strain}, asked to wait until {clock(strain.rest)}"
        log.warning("%s is given up for this run: %s", host.label, host.reason)
        if host.queue:
            self.turns.remove(host)
        while host.queue:
            self.leave(host.queue.popleft(), host)

    def leave(self, job: Job, host: Host) -> None:
        """Ends the work on an image of a host that was given up. An image that was not tried, or
        only told to wait, is left for the next run, and nothing is noted."""
        if job.strains:
            self.take_failure(job, "fetch", job.strains[-1])
            return
        self.jobs.pop(str(job.source.where), None)
        self.in_work -= sum(map(weight, job.assets))
        self.report.left_of[f"{host.label}: {host.reason}"] += len(job.assets)

    def check_network(self) -> None:
        """If all hosts were given up, and none ever sent an image, the network is down."""
        hosts = [host for host in self.hosts.values() if host.name]
        gone = hosts and all(host.pace.given_up and not host.images for host in hosts)
        if gone and not self.stop.code:
            last = hosts[-1]
            self.end(
                RunError(
                    f"no image came from any host (the last was {last.name}: {last.reason}): "
                    "check this machine's network and the host, then run again"
                )
            )

    def take_failure(self, job: Job, stage: str, error: Exception) -> None:
        """Makes an error the failure of an image; RunError ends the run instead. An unforeseen
        error is noted as well; -v shows its traceback."""
        if isinstance(error, RunError):
            self.end(error)
            return
        first = job.assets[0]
        reason = printable(str(error))  # PostgreSQL takes no text with a NUL
        if not isinstance(error, ImageError):
            log.debug("%s", first, exc_info=error)
            reason = f"{DEFECT} ({type(error).__name__})"
        self.finish(job, Failed(first, stage, reason))

    # Embed

    def start_embeds(self) -> None:
        """Gives each lane two batches, one at work and one waiting. A batch that is not full starts
        only while no other is under way, or at the end, when the lanes share the last images."""
        size = self.settings.batch_size
        if not self.turns and not self.under_way("find", "fetch", "decode"):
            share = math.ceil(len(self.ready) / self.lanes)
            size = max(1, min(size, share))
        while self.encoder and self.ready:
            batches = len(self.under_way("embed"))
            if batches == 2 * self.lanes:
                return
            if batches and len(self.ready) < size:
                return
            batch = self.ready[:size]
            self.ready = self.ready[size:]
            take = partial(self.take_vectors, batch)
            task = Task("embed", take, self.end)
            self.start(task, self.encoder.embed, [job.pixels for job in batch])

    def take_vectors(self, batch: list[Job], vectors: np.ndarray) -> None:
        for job, vector in zip(batch, vectors, strict=True):
            job.pixels = None
            if np.isfinite(vector).all():
                self.finish(job, Embedded(job.assets[0], vector))
            else:
                self.take_failure(job, "embed", ImageError(NOT_FINITE))

    def finish(self, job: Job, result: Result) -> None:
        """Notes a result for each asset that shares the image. Later assets find it in `jobs`."""
        job.result = result
        for asset in job.assets:
            self.take_result(result._replace(asset=asset))

    def take_result(self, result: Result) -> None:
        self.results.append(result)
        failed = isinstance(result, Failed)
        if failed:
            log.debug("%s: %s", result.asset, result)
        self.progress.step(failed)

    # Store

    def start_store(self) -> None:
        """Stores one batch at a time: a full one, one that has waited long enough, or the last."""
        if not self.results or not self.storing or self.under_way("store"):
            return
        full = len(self.results) >= WRITE_ROWS
        due = time.monotonic() > self.store_by
        last = not self.under_way(*self.awaited)
        if not (full or due or last):
            return
        batch = self.results[:WRITE_ROWS]
        self.results = self.results[WRITE_ROWS:]
        self.store_by = time.monotonic() + WRITE_SECONDS
        task = Task("store", partial(self.take_stored, batch), self.end_storing)
        self.start(task, in_time, self.store, self.store.save, batch)

    def take_stored(self, batch: list[Result], taken: set[Id]) -> None:
        for result in batch:
            self.in_work -= weight(result.asset)
            self.report.count(result, result.asset.id in taken)

    def end_storing(self, error: Exception) -> None:
        """What was not stored is counted as left."""
        self.storing = False
        self.end(error)


def is_silent(fetch: Task) -> bool:
    """Whether a download waits for its host, and so leaves the line to others."""
    brought_nothing = fetch.deadline is not None and fetch.deadline.first_byte is None
    return brought_nothing and time.monotonic() - fetch.since > SILENT_SECONDS


def weight(asset: Asset) -> int:
    """How many assets this one counts as: a data: URL holds a whole image."""
    return 1 + len(asset.image) // LONG_URL


class Progress:
    """Shows how far the run is: a bar on a terminal; elsewhere log lines, from an unseen bar."""

    FIRST_LINE = 10  # images, after which a log has its first line
    LINE_SECONDS = 10.0  # from one to the next

    def __init__(self, goal: int) -> None:
        self._goal = goal
        self._failed = 0
        self._seen = sys.stderr.isatty()
        look: dict[str, Any] = {"ncols": shutil.get_terminal_size().columns - 1}
        if not self._seen:
            look = {
                "file": io.StringIO(),
                "mininterval": self.LINE_SECONDS,
                "miniters": 1,
                "bar_format": "{rate_noinv_fmt}, {remaining} left",
            }
        self.bar: Any = tqdm(total=goal, unit=" images", leave=False, smoothing=0, **look)

    def step(self, failed: bool) -> None:
        """One more image is done, stored or not."""
        self._failed += failed
        self.bar.set_postfix(failed=self._failed, refresh=False)
        drawn = self.bar.update()
        if not self._seen and (drawn or self.bar.n == self.FIRST_LINE):
            counts = f"{self.bar.n:,}/{self._goal:,} done, {self._failed:,} failed"
            log.info("%s, %s", counts, str(self.bar).strip())


class Stop:
    """`with stop` around what must not end at once: the first Ctrl-C, SIGTERM or SIGHUP sets
    `code`, and a second one, after ECHO_SECONDS, ends the process."""

    code = 0  # the exit code, once set; no threading.Event: handlers must not wait for locks
    _since = 0.0

    def __enter__(self) -> None:
        handle_stops(self._handle)

    def __exit__(self, *_: object) -> None:
        handle_stops(end_at_once)

    def _handle(self, number: int, _: object) -> None:
        now = time.monotonic()
        if not self.code:
            self.code = 128 + number
            self._since = now
            # Not by print: the handler may have interrupted one. Ctrl-C may also have ended the
            # program that reads our stderr.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping: storing what is embedded; Ctrl-C again ends at once\n")
        elif now - self._since > ECHO_SECONDS:
            os._exit(self.code)


# =============================================================================== Stores

ANSWER_SECONDS = 58.0  # for one answer of the database: Supabase's API gives up after 60
CONNECT_SECONDS = 10.0  # to the database
CHECK_SECONDS = 5.0  # patience with the database until it has answered once, and after Ctrl-C
SAMPLES = 16  # products in the gallery, each with the nearest to it
COMPARED_AT_ONCE = 200  # products; each brings up to 5 rows, and the API returns at most 1,000
FAILURES_AT_ONCE = 1000  # rows

SILENCE = "no answer from the database"
CHECK_URL = "check SUPABASE_URL and the project's status, then run again"
RUN_SQL = "run this version's schema.sql in Supabase's SQL editor, then this script again"
UPGRADE = (
    'in the new schema.sql, first run the lines under "How to remove it", but not the last one; '
    f"then {RUN_SQL}"
)
NEW_KEY = "copy a secret key (sb_secret_...) from the dashboard, Settings > API Keys"

# Codes of PostgREST and PostgreSQL, and HTTP statuses of a gateway. These errors may be temporary.
PASSING = re.compile(r"5\d\d|408|425|429|PGRST00\d|(08|40|53|57)...|55P03|XX000|23503")
# These may be permanent, so they are tried three times: a statement took too long; a product was
# deleted at the same time.
TRIED_THRICE = ("57014", "23503")
# What to do about the other codes. {said} stands for the database's own words.
TROUBLES = {
    **dict.fromkeys(
        ("PGRST202", "PGRST204", "PGRST205", "42883", "42P01", "42703"),
        f"the database lacks what this script calls ({{said}}): {RUN_SQL}",
    ),
    **dict.fromkeys(
        ("401", "403", "PGRST301", "PGRST302", "PGRST303"),
        f"the key in {{key}} was refused ({{said}}): {NEW_KEY}",
    ),
    "42501": f"the key in {{key}} may not do this ({{said}}): {NEW_KEY}. If it is one, "
    'grant select on that table, as "Your tables" in schema.sql says',
    "PGRST106": "the schema public is not exposed ({said}): add it in the dashboard's settings "
    "of the Data API, Exposed schemas",
    "57014": "the database took too long ({said}): does product_embeddings have its "
    "HNSW index? schema.sql says how to make it",
    "23503": "products are missing in the table that a foreign key refers to ({said}): see "
    '"Another table" in schema.sql',
    "25006": "the database is read-only ({said}): SUPABASE_URL is a read replica's, or the "
    "project's disk is full",
}
OTHER_TROUBLE = "the database says {said!r} ({code})"
NO_API = "{url} answers with HTTP {code}, {said}: check SUPABASE_URL"

STORAGE = "/storage/v1/"  # an image that begins so is the project's own
# Such as /storage/v1/object/public/photos/mug.jpg
STORED = re.compile(r"(/storage/v1/(?:object|render/image)/)(public|authenticated)/(.*)", re.DOTALL)

Read = TypeVar("Read")  # the database's data, as it was read


class SupabaseStore:
    """Assets and embeddings in Supabase, in what schema.sql creates.

    Safe to use from several threads. Raises RunError for what stops a run: a wrong key or schema,
    rows that the database refuses, a database that is down for longer than DB_RETRY_SECONDS.
    """

    def __init__(self, settings: Settings, stop: Stop) -> None:
        import httpx
        import supabase

        self._settings = settings
        self._stop = stop
        self._run_began = ""  # by the database's clock; empty until it has answered once
        self.label = f"product_embeddings at {settings.url}"
        # With a short DB_RETRY_SECONDS the wait for one answer is short, too.
        wanted_seconds = max(CHECK_SECONDS, settings.db_retry_seconds)
        answer_seconds = min(ANSWER_SECONDS, wanted_seconds)
        # For all attempts at a call, and the pauses between them
        self.patience = settings.db_retry_seconds + answer_seconds + CONNECT_SECONDS
        http = httpx.Client(
            timeout=httpx.Timeout(answer_seconds, connect=CONNECT_SECONDS),
            verify=tls_context(),
            # An exception then holds the whole response. Redirects raise as well: following one
            # would carry the key to another origin.
            event_hooks={"response": [httpx.Response.read, httpx.Response.raise_for_status]},
        )
        options = supabase.ClientOptions(httpx_client=http)
        self._database = supabase.create_client(settings.url, settings.key, options)
        buckets = {name.strip() for name in settings.storage_buckets.split(",")}
        self._readable_buckets = buckets - {""}
        self._scope = {"model_version": settings.model_version, "client": settings.client}
        part, parts = settings.shard or (1, 1)
        self._part = {"shard": part, "shards": parts}

    def status(self) -> Status:
        """As Store says. Checks that schema.sql is of this version, and that the client is
        there."""
        return self._call("embedding_status", self._read_status, **self._scope, **self._part)

    def _read_status(self, data: Any) -> Status:
        if data["contract"] != CONTRACT:
            raise RunError(f"the database has another version of schema.sql: {UPGRADE}")
        if data["clients"] is not None:
            client = str(self._settings.client)
            near = near_name(client, map(str, data["clients"]))
            hint = f"did you mean {near!r}?" if near else "check the spelling"
            raise RunError(f"no asset is of client {client!r}: {hint}")
        self._run_began = data["time"]
        when = data["next_attempt"]
        next_attempt = datetime.fromisoformat(when) if when else None
        return Status(data["assets"], data["done"], data["failed"], data["waiting"], next_attempt)

    def pages(self) -> Iterator[list[Asset]]:
        """As Store says, in the order of the ids. Each page begins after the last id of the one
        before."""
        wanted = min(self._settings.limit or PAGE_ROWS, PAGE_ROWS)
        new = self._scope | self._part | {"wanted": wanted}
        failed = {"failed_before": self._run_began, "waiting_too": self._settings.retry_failed}
        for which in (new, new | failed):
            last: Id | None = None
            while True:
                page, last = self._call("pending_assets", self._read_page, after=last, **which)
                yield page
                if last is None:
                    break

    def _read_page(self, data: Any) -> tuple[list[Asset], Id | None]:
        page = [
            Asset(
                row["id"], row["image"] or "", row["image_hash"], row["bytes"], row["title"] or ""
            )
            for row in data["assets"]
        ]
        return page, data["last"]

    def locate(self, asset: Asset) -> Source:
        """As Store says. The key goes to the project's own Storage only, and there to the
        buckets of STORAGE_BUCKETS. Else whoever can enter an image's URL could read any file."""
        image = asset.image.strip()
        if not image:
            raise ImageError(NO_IMAGE)
        if len(asset.image) < asset.size // 4:  # a character has at most 4 bytes: it was cut
            raise ImageError(f"{LONG_DATA_URL} ({asset.size // 2**20} MB)")
        url = self._settings.url
        image = full_url(image, url)
        stored = STORED.fullmatch(image.removeprefix(url))
        if not stored:
            return Source(image, {})

        service, access, path = stored.groups()
        refuse_long(path)
        bucket = unquote(path.partition("/")[0])
        if bucket in self._readable_buckets:
            # Some clients turn \ into / and drop tabs and newlines. None of these may hide a "..".
            if ".." in unquote(path).split("/") or re.search(r"[\\\t\r\n]", path):
                raise ImageError(BAD_STORAGE_PATH)
            key = self._settings.key
            headers = {"apikey": key, "Authorization": f"Bearer {key}"}
            return Source(f"{url}{service}authenticated/{path}", headers)
        if access == "authenticated":
            raise ImageError(f"{PRIVATE_BUCKET} ({shorten(bucket)})")
        return Source(image, {})

    def save(self, results: list[Result]) -> set[Id]:
        """As Store says."""
        vectors = []
        failures = []
        for result in results:
            asset = result.asset
            if isinstance(result, Embedded):
                row = {"asset_id": asset.id, "embedded_image_hash": asset.image_hash}
                vectors.append(row | {"embedding": vector_text(result.vector)})
            else:
                row = {"asset_id": asset.id, "image_hash": asset.image_hash}
                failures.append(row | {"stage": result.stage, "reason": result.reason})
        return self._call(
            "store_embeddings",
            lambda data: set(data["taken"]),
            model_version=self._settings.model_version,
            vectors=vectors,
            failures=failures,
        )

    def search(self, vector: np.ndarray, wanted: int) -> list[Match]:
        """As Store says; the database gives 1,000 at most."""
        given = {"query_embedding": vector_text(vector), "match_count": wanted}
        return self._call("match_products", read_matches, **given, **self._scope)

    def catalog(self, embedded: int) -> Catalog:
        """As Store says. Asks in pieces, each of which fits into the time of one call."""
        pairs, sought_among = self._call(
            "embedding_copies", read_copies, min_similarity=SAME, **self._scope
        )
        near, compared = self._near_pairs(embedded)
        pairs += near
        samples = self._samples(alike_but_first(pairs))
        return Catalog(pairs, sought_among, compared, samples, list(self._failures()))

    def _near_pairs(self, embedded: int) -> tuple[list[Pair], int]:
        """Pairs that look the same, among as many products as LOOK_SECONDS allow; and the number of
        these products."""
        deadline = time.monotonic() + LOOK_SECONDS
        question = {"min_similarity": SAME, "client": self._settings.client}
        parts = math.ceil(embedded / COMPARED_AT_ONCE)
        pairs: list[Pair] = []
        for part in range(1, parts + 1):
            of_part = {"shard": part, "shards": parts}
            began = time.monotonic()
            pairs += self._call("duplicate_products", read_pairs, **question, **of_part)
            now = time.monotonic()
            if now + (now - began) > deadline:  # the next one may take as long
                return pairs, embedded * part // parts
        return pairs, embedded

    def _samples(self, skipped: set[Id]) -> list[list[Match]]:
        """Some products, of as many clients as possible, each with those nearest to it. Random
        vectors find them. `skipped` are left out."""
        random_vectors = np.random.default_rng(0).standard_normal((SAMPLES, DIMENSIONS))
        clients: Counter[str] = Counter()
        samples: dict[Id, list[Match]] = {}
        question = {"client": self._settings.client, "max_similarity": SAME}
        question["match_count"] = 4 * NEAREST  # some of them look the same as others
        for vector in random_vectors:
            found = [
                match for match in self.search(vector, SAMPLES) if match.picture.id not in skipped
            ]
            fresh = [match for match in found if match.picture.id not in samples]
            if fresh:
                one = min(fresh, key=lambda match: clients[match.picture.client])
                clients[one.picture.client] += 1
                id_ = one.picture.id
                near = self._call("similar_products", read_matches, asset_id=id_, **question)
                nearest = [match for match in near if match.picture.id not in skipped]
                samples[id_] = [one, *nearest[:NEAREST]]
        return list(samples.values())

    def _failures(self) -> Iterator[FailedPicture]:
        """What failed and has no vector, in the order of the ids."""

        def read(rows: Any) -> list[FailedPicture]:
            return [FailedPicture(read_picture(row), str(row["reason"])) for row in rows]

        last: Id | None = None
        while True:
            query = self._database.table("embedding_failures").select("*")
            query = query.eq("model_version", self._settings.model_version)
            if self._settings.client is not None:
                query = query.eq("client", self._settings.client)
            if last is not None:
                query = query.gt("asset_id", last)
            query = query.order("asset_id").limit(FAILURES_AT_ONCE)
            page = self._ask("embedding_failures", query, read)
            if not page:  # a shorter one may be cut by the API
                return
            yield from page
            last = page[-1].picture.id

    def _call(self, function: str, read: Callable[[Any], Read], **arguments: Any) -> Read:
        """What a function of schema.sql returns: see _ask."""
        return self._ask(function, self._database.rpc(function, arguments), read)

    def _ask(self, name: str, query: Any, read: Callable[[Any], Read]) -> Read:
        """The data of a query, read by `read`. Asks again, with backoff, while the trouble may be
        temporary. Data that `read` can't make sense of count as trouble. Raises RunError."""
        import httpx
        from postgrest import APIError

        started = time.monotonic()
        refused = 0
        for attempt in itertools.count():
            try:
                return read(query.execute().data)
            except httpx.HTTPStatusError as error:
                code, said = code_and_words(error.response)
                said = shorten(said.replace(self._settings.key, "(the key)"), 300)
                refused += code in TRIED_THRICE
                if refused == 3 or not PASSING.fullmatch(code):
                    raise RunError(self._explain(code, said)) from None
                trouble = f"{code}, {said}"
            except httpx.RequestError as error:
                trouble = f"{type(error).__name__}: {error}"
            except (APIError, LookupError, TypeError, ValueError):
                trouble = f"unexpected data from {name}"
            patience = self._settings.db_retry_seconds
            if self._stop.code or not self._run_began:
                patience = min(patience, CHECK_SECONDS)
            waited = time.monotonic() - started
            if waited >= patience:
                raise RunError(f"{SILENCE} for {waited:.0f} s ({trouble}): {CHECK_URL}")
            log.info("database: %s; trying again", trouble)
            time.sleep(2 ** min(attempt, 3) * random.uniform(0.25, 0.5))
        raise AssertionError  # count() has no end

    def _explain(self, code: str, said: str) -> str:
        """An error of the database in its own words, with what to do if we know that."""
        sentence = TROUBLES.get(code, NO_API if len(code) == 3 else OTHER_TROUBLE)
        url = self._settings.url
        return sentence.format(said=said, code=code, url=url, key=self._settings.key_source)


def code_and_words(response: Any) -> tuple[str, str]:
    """The code of an error: PostgreSQL's or PostgREST's, or else the HTTP status. And its words."""
    status = str(response.status_code)
    try:
        error = response.json()
        return str(error.get("code") or status), str(error["message"])
    except (AttributeError, LookupError, ValueError):  # a gateway's page
        return status, response.reason_phrase


def read_picture(row: dict[str, Any], id_: str = "asset_id", prefix: str = "") -> Picture:
    """The product that a row of the database is about."""
    texts = (row[prefix + name] for name in ("image", "client", "title", "link"))
    return Picture(row[id_], *(str(text or "") for text in texts))


def read_matches(rows: Any) -> list[Match]:
    """What a search found, nearest first."""
    return [Match(read_picture(row), float(row["similarity"])) for row in rows]


def read_copies(answer: Any) -> tuple[list[Pair], int]:
    """Exact copies, and the number of pictures that were searched for them."""
    return read_pairs(answer["pairs"]), int(answer["sought_among"])


def read_pairs(rows: Any) -> list[Pair]:
    """Pairs that look the same."""
    pairs = []
    for row in rows:
        other = read_picture(row, "duplicate_id", "duplicate_")
        pairs.append(Pair(read_picture(row), other, float(row["similarity"]), bool(row["same"])))
    return pairs


def full_url(url: str, project: str) -> str:
    """A URL with its scheme and host; one of Storage may lack both, as it is the project's own."""
    if url.startswith("//"):
        return f"https:{url}"
    if url.startswith(STORAGE):
        return project + url
    return url


def vector_text(vector: np.ndarray) -> str:
    """A vector as pgvector reads it, in the fewest digits that give the same float32 back."""
    return "[" + ",".join(map(str, vector.astype(np.float32))) + "]"


MOST_COMPARED = 100_000  # vectors of a folder: 200 MB
MOST_PAIRS = 1_000_000  # a thousand pictures that look the same make half of that
BLOCK = 1024  # vectors that are compared with as many others at a time
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")  # ends a journal that names another file
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".avif"}
IMAGE_SUFFIXES |= {".tif", ".tiff", ".bmp", ".heic", ".heif"}
# Copies, thumbnails and deleted files, as NAS systems, archives and desktops keep them
SYSTEM_FOLDERS = {"@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "@tmp"}
SYSTEM_FOLDERS |= {"$recycle.bin", "system volume information", "lost+found"}
UNSEEN = 0  # the image_hash of a file whose state can't be read
# "modified" is the file's image_hash when its row was made.
FOLDER_TABLE = """
create table if not exists images (asset_id text primary key, modified integer not null,
    model_version text not null, embedding blob, stage text, reason text,
    created_at text not null, updated_at text not null)
"""
# A failure never takes the place of a vector of the same image and version
FOLDER_SAVE = """
insert into images (asset_id, modified, model_version, embedding, stage, reason, created_at,
    updated_at)
values (?, ?, ?, ?, ?, ?, ?, ?)
on conflict do update set modified = excluded.modified, model_version = excluded.model_version,
    embedding = excluded.embedding, stage = excluded.stage, reason = excluded.reason,
    updated_at = excluded.updated_at
where excluded.embedding is not null or embedding is null or modified <> excluded.modified
    or model_version <> excluded.model_version
"""
# SQLite trusts the column `sql` of sqlite_master. So we look at that, and not at `type`.
FOLDER_TRAPS = "select 1 from sqlite_master where sql not like 'create table%'"


class FolderStore:
    """The images below a folder, with their embeddings in one SQLite file there.

    Ids are the paths below it, clients its subfolders, vectors little-endian float32 blobs.
    Raises RunError if the folder or that file can't be used.
    """

    FILE = "product_embeddings.sqlite3"
    patience = threading.TIMEOUT_MAX  # a disk has no deadline

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.local or Path()
        self.label = str(self._folder / self.FILE)
        self._below = ""
        if settings.client is not None:
            self._below = composed(settings.client.strip("/")) + "/"
        self._mine: set[str] = set()  # paths that `status` found; rows of other paths are ignored
        self._new: list[Asset] = []
        self._failed: list[Asset] = []

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The file's database; what is changed is one transaction."""
        file = self.label
        if self._settings.dry_run and not Path(file).exists():
            file = ":memory:"
        try:
            self._refuse_traps()
            with contextlib.closing(sqlite3.connect(file, 60)) as database, database:
                if database.execute(FOLDER_TRAPS).fetchone():
                    raise RunError(f"{self.label} has triggers or views, so not ours: move it")
                database.execute(FOLDER_TABLE)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"{self.label}: {error}. It must be a database of this version of the script, in "
                "a folder that can be written to, with room on the disk"
            ) from None

    def _refuse_traps(self) -> None:
        """Raises RunError if somebody prepared the file, or one beside it, to make SQLite write to
        files elsewhere, or delete them."""
        for ending in ("", "-journal", "-wal", "-shm"):
            path = Path(self.label + ending)
            if not os.path.lexists(path):
                continue
            if is_link(path) or not path.is_file():
                raise RunError(f"{path} is a link, or not a file: move it")
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - len(JOURNAL_MAGIC)))
                if file.read() == JOURNAL_MAGIC:
                    raise RunError(f"{path} is a journal of several databases, not ours: move it")

    def status(self) -> Status:
        """As Store says. Compares the folder's images with what the file knows of them: deletes
        the rows of files that are gone, and keeps for `pages` what is pending."""
        files = dict(self._files())
        mine = [path for path in sorted(files) if composed(path).startswith(self._below)]
        self._mine = set(mine)
        if not mine:
            place = self._folder / self._below
            raise RunError(f"no image below {place}: check its name, and the endings of its files")
        with self._database() as database:
            query = "select asset_id, modified, model_version, reason is not null from images"
            known = {path: row for path, *row in database.execute(query)}
            if not self._settings.dry_run and not self._settings.search:
                gone = [(path,) for path in known.keys() - files.keys()]
                database.executemany("delete from images where asset_id = ?", gone)
        done = 0
        for path in mine:
            asset = Asset(path, path, image_hash=files[path])
            modified, version, failed = known.get(path, (UNSEEN, "", False))
            is_of_version = version == self._settings.model_version
            if not is_of_version or asset.image_hash not in (modified, UNSEEN):
                self._new.append(asset)
            elif failed:
                self._failed.append(asset)
            else:
                done += 1
        return Status(len(mine), done, len(self._failed))

    def _files(self) -> Iterator[tuple[str, int]]:
        """Path and image_hash of each image file. The hash changes when another file takes its
        place. The time alone would not do: some exports give all files the same one. Says what is
        left out, except hidden files, hidden folders and folders of systems."""
        left_out: Counter[str] = Counter()
        for folder, subfolders, names in os.walk(self._folder, onerror=refuse_unreadable):
            here = Path(folder)
            for name in list(subfolders):
                if name.startswith(".") or name.lower() in SYSTEM_FOLDERS:
                    subfolders.remove(name)
                elif is_link(here / name):
                    left_out["linked folder"] += 1  # os.walk does not follow it
            for name in names:
                ending = Path(name).suffix.lower()
                if name.startswith((".", self.FILE)):
                    continue
                if ending not in IMAGE_SUFFIXES:
                    left_out[ending or "without an ending"] += 1
                    continue
                path = (here / name).relative_to(self._folder).as_posix()
                try:
                    path.encode()
                    stat = (here / name).stat()
                    yield path, stat.st_mtime_ns + stat.st_size
                except UnicodeEncodeError:
                    left_out[f"{path!a} (no UTF-8)"] += 1
                except OSError:  # such as a link to a disk that is not mounted: its row stays
                    yield path, UNSEEN
        if left_out:
            kinds = (f"{count:,} {kind}" for kind, count in left_out.most_common(8))
            log.info("left out: %s", ", ".join(kinds))

    def pages(self) -> Iterator[list[Asset]]:
        """As Store says, in the order of the paths."""
        for assets in (self._new, self._failed):
            for start in range(0, len(assets), PAGE_ROWS):
                yield assets[start : start + PAGE_ROWS]

    def locate(self, asset: Asset) -> Source:
        """As Store says; a file needs no headers."""
        return Source(self._folder / asset.image, {})

    def save(self, results: list[Result]) -> set[Id]:
        """As Store says; takes all."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        with self._database() as database:
            for result in results:
                asset = result.asset
                row = (asset.id, asset.image_hash, self._settings.model_version)
                made: tuple[Any, ...]
                if isinstance(result, Embedded):
                    made = (result.vector.astype("<f4").tobytes(), None, None)
                else:
                    made = (None, result.stage, result.reason)
                database.execute(FOLDER_SAVE, (*row, *made, now, now))
        return {result.asset.id for result in results}

    def search(self, vector: np.ndarray, wanted: int) -> list[Match]:
        """As Store says; compares all, in blocks."""
        found = (
            pair
            for pictures, vectors in self._vectors()
            for pair in zip((vectors @ vector).tolist(), pictures, strict=True)
        )
        best = heapq.nlargest(wanted, found, key=lambda pair: pair[0])
        return [Match(picture, cosine) for cosine, picture in best]

    def catalog(self, embedded: int) -> Catalog:
        """As Store says, of the first MOST_COMPARED vectors."""
        pictures: list[Picture] = []
        blocks = [np.empty((0, DIMENSIONS), np.float32)]
        for more, block in self._vectors():
            if len(pictures) + len(more) > MOST_COMPARED:
                break
            pictures += more
            blocks.append(block)
        vectors = np.concatenate(blocks)
        blocks.clear()  # 200 MB
        alike, compared = rows_alike(vectors)
        pairs = [Pair(pictures[one], pictures[other], cosine) for one, other, cosine in alike]
        skipped = alike_but_first(pairs)
        rows = [row for row, picture in enumerate(pictures) if picture.id not in skipped]
        apart = np.array(rows, int)
        spread = apart[np.linspace(0, len(apart) - 1, min(SAMPLES, len(apart))).astype(int)]
        samples = []
        for row, cosines in zip(spread, vectors[spread] @ vectors.T, strict=True):
            cosines[row] = np.inf  # it comes first
            nearest = apart[np.argsort(-cosines[apart])][: NEAREST + 1]
            samples.append([Match(pictures[near], float(cosines[near])) for near in nearest])
        return Catalog(pairs, len(vectors), compared, samples, self._failures())

    def _vectors(self) -> Iterator[tuple[list[Picture], np.ndarray]]:
        """The pictures that `status` found with their vectors (n, 512), in blocks of thousands."""
        query = """select asset_id, embedding from images
            where model_version = ? and typeof(embedding) = 'blob' and length(embedding) = ?
            order by asset_id"""
        with self._database() as database:
            found = database.execute(query, [self._settings.model_version, 4 * DIMENSIONS])
            while block := found.fetchmany(5000):
                mine = [(path, blob) for path, blob in block if path in self._mine]
                vectors = np.frombuffer(b"".join(blob for _, blob in mine), "<f4")
                yield [picture_of(path) for path, _ in mine], vectors.reshape(-1, DIMENSIONS)

    def _failures(self) -> list[FailedPicture]:
        query = """select asset_id, reason from images
            where model_version = ? and reason is not null order by asset_id"""
        with self._database() as database:
            return [
                FailedPicture(picture_of(path), str(reason))
                for path, reason in database.execute(query, [self._settings.model_version])
                if path in self._mine
            ]


def rows_alike(vectors: np.ndarray) -> tuple[list[tuple[int, int, float]], int]:
    """The pairs of rows of unit vectors (n, 512) whose cosine is SAME or more, the earlier row
    first; and how many rows were compared with all others in LOOK_SECONDS.

    Equal rows come first, each paired with the first of its kind, which then stands for all.
    """
    deadline = time.monotonic() + LOOK_SECONDS
    pairs = []
    first: dict[bytes, int] = {}
    for row, vector in enumerate(vectors):
        known = first.setdefault(hashlib.sha256(vector).digest(), row)
        if known != row:
            pairs.append((known, row, 1.0))
    copies = len(pairs)
    rows = list(first.values())
    for start in range(0, len(rows), BLOCK):
        began = time.monotonic()
        ours = rows[start : start + BLOCK]
        for other in range(start, len(rows), BLOCK):
            if len(pairs) > MOST_PAIRS:
                return pairs, copies + start
            theirs = rows[other : other + BLOCK]
            cosines = vectors[ours] @ vectors[theirs].T
            for i, j in np.argwhere(cosines >= SAME):
                if ours[i] < theirs[j]:
                    pairs.append((ours[i], theirs[j], min(float(cosines[i, j]), 1.0)))
        now = time.monotonic()
        if now + (now - began) > deadline:  # the next block may take as long
            return pairs, copies + start + len(ours)
    return pairs, len(vectors)


def joined(pairs: Iterable[Pair]) -> list[list[Picture]]:
    """Lists of pictures that pairs connect: a picture in four copies becomes one list."""
    list_of: dict[Id, list[Picture]] = {}
    for pair in pairs:
        ours = list_of.setdefault(pair.one.id, [pair.one])
        theirs = list_of.setdefault(pair.other.id, [pair.other])
        if ours is not theirs:
            shorter, longer = sorted((ours, theirs), key=len)
            longer += shorter
            list_of |= dict.fromkeys((picture.id for picture in shorter), longer)
    return list({id(pictures): pictures for pictures in list_of.values()}.values())


def alike_but_first(pairs: Iterable[Pair]) -> set[Id]:
    """All but one of each group of pictures that look the same. They would bore as samples."""
    return {picture.id for group in joined(pairs) for picture in group[1:]}


def picture_of(path: str) -> Picture:
    """A folder's picture: its subfolder stands in for the client."""
    folder, _, name = path.rpartition("/")
    return Picture(path, path, folder, name)


is_link = os.path.islink  # also False for what can't be looked at


def composed(path: str) -> str:
    """A path in one spelling: macOS stores accents apart from their letters (NFD), people type
    letters with accents (NFC)."""
    return unicodedata.normalize("NFC", path)


def refuse_unreadable(error: OSError) -> None:
    """Raises RunError: images that a folder does not show must not count as deleted."""
    raise RunError(f"{error.filename} can't be read ({error.strerror}): nothing was changed")


# ============================================================================= Fetching

MAX_BYTES = 50 * 2**20  # of one image file
HEADER_BYTES = 2**18  # of a response: all its header and trailer lines together
MOST_HEADERS = 400  # of a response; some shops send 120, Python's limit is 100
PAGE_BYTES = 2**16  # that are read of a response without an image
MAX_REDIRECTS = 5
LONGEST_URL = 2**16  # characters; no host accepts longer ones, and quoting them takes memory
LIVELY_BYTES = 50_000  # arrived bytes that give a download one more second
DEAD_SECONDS = 2.0  # to wait for one address of a host that has more
A_YEAR = 366 * 86_400  # seconds; no host seriously asks for a longer rest
HOSTS_KEPT = 64  # hosts whose connections stay open

# The statuses by which a host says that it did not cope. Every other one is about the image only:
# S3 answers 403 for what is missing, Cloudinary 423 for what it is still making. 202 comes with a
# check for robots, which does not go away when we ask more slowly.
STRAINED = frozenset((408, 420, 425, 429, 430, *range(500, 600)))

# A host's admin finds this User-Agent in the log, and can let it in. It avoids words that many
# hosts refuse: python-requests, bot, openai.
# Firewalls refuse requests without Accept. It does not name WebP and AVIF: hosts that make them on
# demand then send the JPEG that they have, which is decoded in a third of the time.
HEADERS = {
    "User-Agent": f"generate-embeddings/{VERSION} (product images for visual search)",
    "Accept": "image/jpeg,image/png,image/*;q=0.9,*/*;q=0.8",
}
PORTS = {"http": 80, "https": 443}


class ThisThread(threading.local):
    """The deadline of the download in a thread: requests passes on seconds, but no Deadline."""

    deadline: Deadline | None = None


this_thread = ThisThread()


class Fetcher:
    """Gets the bytes of images over connections that stay open, for any number of threads."""

    def __init__(self, settings: Settings) -> None:
        self._guard = Guard(settings)
        self._workers = settings.workers
        # By origin. Looking up proxies in the environment takes as long as half a download.
        self._proxies_of = lru_cache(maxsize=1000)(requests.utils.get_environ_proxies)

    @cached_property
    def _adapter(self) -> requests.adapters.HTTPAdapter:
        """Made for the first URL: a folder needs none."""
        return guarded_adapter(self._guard, self._workers)

    def fetch(self, source: Source, deadline: Deadline) -> Download:
        """One attempt at an image, of at most MAX_BYTES.

        Raises Strain if its host did not cope, and ImageError if the image can't be had.
        """
        started = time.monotonic()
        if isinstance(source.where, Path):
            data = read_file(source.where)
        elif source.where[:5].lower() == "data:":
            data = read_data_url(source.where)
        else:
            try:
                data = self._follow(read_url(source.where), source.headers, deadline)
            except (OSError, ValueError, HTTPError, zlib.error) as error:
                trouble = network_error(error)
                if str(trouble) == NO_ANSWER and deadline.first_byte:
                    trouble = deadline.missed()
                raise trouble from None
            finally:
                this_thread.deadline = None
        now = time.monotonic()
        return Download(data, now - started, now - (deadline.first_byte or now))

    def _follow(self, target: str, headers: Mapping[str, str], deadline: Deadline) -> bytes:
        """Follows the redirects of an image. Cookies are kept until the last one.

        This is not left to requests, which reads all of a redirect's body and sends the key on.
        """
        cookies = RequestsCookieJar()
        url = ""
        for hop in range(MAX_REDIRECTS + 1):
            try:
                url = urljoin(url, target)
                if not re.match("https?:", url, re.IGNORECASE):
                    raise ValueError(url)
                # Not by a session, which would read passwords from .netrc.
                sent = HEADERS | dict(headers)
                request = requests.Request("GET", url, sent, cookies=cookies).prepare()
            except ValueError:
                raise ImageError(BAD_REDIRECT if hop else NOT_A_URL) from None
            with contextlib.closing(self._ask(request, deadline)) as response:
                if not response.is_redirect:
                    return image_of(response, deadline)
                cookies.update(response.cookies)
                # Headers come as latin-1, hosts mean UTF-8.
                location = response.headers["Location"].encode("latin-1")
                target = location.decode("utf-8", "replace").strip()
            headers = {}  # they were for the first URL alone
        raise ImageError(f"{BAD_REDIRECT} (more than {MAX_REDIRECTS})")

    def _ask(self, request: requests.PreparedRequest, deadline: Deadline) -> requests.Response:
        url = str(request.url)
        # `url` has a host and a path, "/" at least. So the first slash after "https://" ends the
        # origin. After "http://" the search only skips the first letter of the host.
        origin = url[: url.index("/", len("https://"))]
        proxies = self._proxies_of(origin)
        if proxies:
            self._guard.check_name(url)
        this_thread.deadline = deadline
        return self._adapter.send(request, True, deadline.left(), proxies=proxies)


class Deadline:
    """When a download is given up: some seconds after its start, and one more second for each
    LIVELY_BYTES that arrived. A slow line is no fault, one byte a second is."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self.first_byte: float | None = None  # when the body began to come

    def arrived(self, count: int) -> None:
        """So many more bytes of the body are here."""
        if self.first_byte is None:
            self.first_byte = time.monotonic()
        self._end += count / LIVELY_BYTES

    def left(self) -> float:
        """The seconds that are left, above 0. Raises Strain where there are none."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise self.missed()
        return seconds

    @property
    def overdue(self) -> bool:
        """Whether it ended more than a second ago: then the download hangs where no time-out
        reaches, such as on a dead file system."""
        return time.monotonic() > self._end + 1

    def missed(self) -> Strain:
        """The error of a download that did not keep the deadline."""
        return Strain(f"{TOO_LATE} ({self._seconds:g} s)", first_byte=self.first_byte)


# What a response means


def image_of(response: requests.Response, deadline: Deadline) -> bytes:
    """The bytes of the image that a response holds. Raises what any other response means."""
    status = response.status_code
    if status in (200, 203, 206):  # decoding shows if this is only a part of a file
        return body_of(response, deadline)
    first_bytes = b""
    # By HTTP some statuses below 400 have no body. If bytes come anyway, they must not become
    # another image's: these connections are not used again.
    if status >= 400:
        # The connection can be used again if this reads the body to its end.
        with contextlib.suppress(OSError, HTTPError, Strain):
            first_bytes = response.raw.read(PAGE_BYTES)
    # Supabase's Storage answers 400 to nearly everything, and gives the true status in the body.
    named = re.search(rb'"statusCode": ?"?([45]\d\d)\b', first_bytes)
    if status == 400 and named:
        status = int(named[1])
        if b"Bucket not found" in first_bytes:
            raise ImageError(PRIVATE_BUCKET)
    if status in STRAINED:
        raise Strain(f"HTTP {status}", rest_of(response.raw))
    raise ImageError(f"HTTP {status}")


def body_of(response: requests.Response, deadline: Deadline) -> bytes:
    """The bytes of an image, unpacked if its host packed them without being asked."""
    unpacker = None
    piece = 2**16
    if response.headers.get("Content-Encoding", "").lower() in ("gzip", "deflate"):
        unpacker = zlib.decompressobj(wbits=47)  # with a header of gzip or of zlib
        piece = 2**12  # unpacks to 4 MB at most
    data = bytearray()
    # Packed data may end before Content-Length bytes: some hosts give the length of the plain file.
    while not (unpacker and unpacker.eof):
        chunk = response.raw.read1(piece)
        if not chunk:
            break
        if unpacker:
            chunk = unpacker.decompress(chunk)
        data += chunk
        if len(data) > MAX_BYTES:
            raise ImageError(TOO_LARGE)
        deadline.arrived(len(chunk))
    if unpacker and not unpacker.eof:
        raise ImageError(BAD_COMPRESSION)
    return bytes(data)


def rest_of(response: urllib3.BaseHTTPResponse) -> float:
    """The seconds of rest that a host asks for (Retry-After); 0 where that makes no sense."""
    try:
        return urllib3.Retry(retry_after_max=A_YEAR).get_retry_after(response) or 0.0
    except (ValueError, OverflowError, HTTPError):
        return 0.0


# The exception at the root of an error, special kinds first, and what it means. Strain says that
# the host did not cope. ImageError does not.
NETWORK_ERRORS: tuple[tuple[type[Exception], type[ImageError], str], ...] = (
    (ssl.SSLCertVerificationError, ImageError, CERTIFICATE),
    (ssl.SSLEOFError, Strain, CONNECTION_LOST),
    (ssl.SSLError, ImageError, NO_TLS),
    (socket.gaierror, Strain, NO_HOST),
    (TimeoutError, Strain, NO_ANSWER),
    (ConnectionRefusedError, Strain, REFUSED),
    (ConnectionError, Strain, CONNECTION_LOST),
    (OSError, Strain, UNREACHABLE),
    (UnicodeError, ImageError, NOT_A_URL),  # a part of the host's name is too long
    (zlib.error, ImageError, BAD_COMPRESSION),
    (Exception, Strain, CONNECTION_LOST),
)


def network_error(error: BaseException) -> ImageError:
    """What became of an image whose download broke off."""
    while error.__context__:
        error = error.__context__
    if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
        return Strain(NO_NAME_SERVER)
    return next(kind(reason) for root, kind, reason in NETWORK_ERRORS if isinstance(error, root))


# What is not fetched, and what does not come from a host


def refuse_long(url: str) -> None:
    """Raises ImageError for a URL that is too long."""
    if len(url) > LONGEST_URL:
        raise ImageError(f"{NOT_A_URL} (longer than {LONGEST_URL:,} characters)")


def read_url(text: str) -> str:
    """The URL that a text of the catalog is. Raises ImageError with what the text is instead."""
    text = text.strip()
    refuse_long(text)
    # Such as ["https://a.example/1.jpg"], or https://a.example/1.jpg, https://a.example/2.jpg
    if re.match(r"[\[{]|.*[\s,;|]https?://", text, re.IGNORECASE | re.DOTALL):
        raise ImageError(MANY_URLS)
    # A scheme, such as ftp: in ftp://a.example/1.jpg. C:\1.jpg and a.example:80/1.jpg have none.
    if not re.match(r"[\w!+.-]{2,}:(?!\d+/)", text):
        # Such as 1.jpg, 2.jpg
        if re.search(r"\.\w{3,4}\s*[,;|\n]", text):
            raise ImageError(MANY_URLS)
        raise ImageError(NO_URL)
    if not re.match("https?:", text, re.IGNORECASE):
        raise ImageError(OTHER_SCHEME)
    return text


def read_data_url(text: str) -> bytes:
    """The bytes that a data: URL holds in base64. Raises ImageError."""
    # Such as data:image/png;base64,iVBORw0KGgo=
    found = re.match(r"data:[^,]*;\s*base64\s*,([^#]*)", text, re.IGNORECASE)
    try:
        if not found:
            raise ValueError(text)
        return base64.b64decode("".join(found[1].split()), validate=True)
    except ValueError:
        raise ImageError(BROKEN_DATA_URL) from None


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises ImageError."""
    try:
        if not path.is_file():  # a named pipe would never end
            raise OSError(0, "no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(TOO_LARGE)
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{UNREADABLE} ({error.strerror})") from None


# Connections


class Guard:
    """Which addresses a connection may go to: those of the open internet, so that no URL of the
    catalog reaches into this machine's own network. The project's own origin may be anywhere, and
    with ALLOW_PRIVATE_IMAGE_HOSTS=1 any host may.

    A name is looked up once, and the connection goes to the address that was checked: no DNS can
    change it in between. Behind a proxy we can't look names up. There only an address that is
    itself private is refused.
    """

    INTERNET = ipaddress.ip_network("2000::/3")  # all of it, in IPv6
    NAT64 = ipaddress.ip_network("64:ff9b::/96")
    # Services of clouds, which is_global calls public: a range (in older Pythons), and Azure's.
    CLOUDS = (ipaddress.ip_network("192.0.0.0/24"), ipaddress.ip_network("168.63.129.16"))

    def __init__(self, settings: Settings) -> None:
        self._all = settings.private_hosts
        self._own = host_and_port(settings.url)
        self._failing: set[str] = set()  # addresses that failed when last tried

    def connect(self, connection: urllib3.connection.HTTPConnection) -> socket.socket:
        """A socket to the first of a host's addresses that answers. Those that failed when last
        tried are tried last. Raises OSError, ImageError."""
        addresses = self._allowed(connection.host, connection.port)
        addresses.sort(key=self._failing.__contains__)
        while True:
            address = addresses.pop(0)
            seconds = float(connection.timeout or 0)  # what the deadline left
            if addresses:
                seconds = min(DEAD_SECONDS, seconds)
            try:
                opened = socket.create_connection((address, connection.port), seconds)
            except OSError:
                self._failing.add(address)
                if not addresses:
                    raise
            else:
                self._failing.discard(address)
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return opened

    def check_name(self, url: str) -> None:
        """Raises ImageError if the host is written as a private address. Looks no name up."""
        host, port = host_and_port(url)
        host = unquote(host).rstrip(".")
        if re.fullmatch(r"(.+\.)?localhost", host) and (host, port) != self._own:
            host = "127.0.0.1"
        with contextlib.suppress(socket.gaierror):  # a name
            self._allowed(host, port, socket.AI_NUMERICHOST)

    def _allowed(self, host: str, port: int, flags: int = 0) -> list[str]:
        """The addresses of a host that a connection may go to; raises ImageError without any."""
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
        if self._all or (host, port) == self._own:
            return addresses
        public = [address for address in addresses if self.is_public(address)]
        if not public:
            raise ImageError(f"{PRIVATE_ADDRESS} ({addresses[0]})")
        return public

    @classmethod
    def is_public(cls, address: str) -> bool:
        """Whether an IP address is one of the open internet, also inside its IPv6 wrappings."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            inner = ip.ipv4_mapped or ip.sixtofour
            if ip in cls.NAT64:
                inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
            if not inner and ip not in cls.INTERNET:
                return False
            ip = inner or ip
        if any(ip in network for network in cls.CLOUDS):
            return False
        return ip.is_global and not ip.is_multicast


def host_and_port(url: str) -> tuple[str, int]:
    """Host and port of a URL; the host is empty if there is none."""
    parts = urlsplit(url)
    port = parts.port or PORTS.get(parts.scheme, 0)
    return parts.hostname or "", port


class Timed(socket.SocketIO):
    """A socket whose bytes all come before the deadline, or it raises. A time-out of the socket
    alone would begin again with each byte."""

    _sock: socket.socket

    def readinto(self, buffer: Any) -> int | None:
        if this_thread.deadline:  # None: another library of this process is reading
            seconds = this_thread.deadline.left()
            if abs(seconds - (self._sock.gettimeout() or 0)) > 1:  # setting it is a system call
                self._sock.settimeout(seconds)
        return super().readinto(buffer)


class Bounded(io.BufferedReader):
    """A response's bytes. http.client reads headers, trailers and a proxy's headers line by line.
    All these lines together fit into HEADER_BYTES."""

    _left = HEADER_BYTES

    def readline(self, limit: int | None = -1) -> bytes:
        line = super().readline(limit)
        self._left -= len(line)
        if self._left < 0:
            raise ConnectionError("too many headers")
        return line


def guarded_adapter(guard: Guard, workers: int) -> requests.adapters.HTTPAdapter:
    """requests' connections, for all threads together. Those without a proxy ask the guard.

    The classes are made in a function, because decoders don't import requests.
    """
    # No documentation promises this hook. Without it nobody would ask the guard.
    if not hasattr(urllib3.connection.HTTPConnection, "_new_conn"):
        raise RunError(f"another version of urllib3 is needed: {INSTALL}")
    tls = tls_as_browsers()

    class Response(http.client.HTTPResponse):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            raw = self.fp.detach()
            raw.__class__ = Timed
            self.fp = Bounded(raw)

    # This holds for the whole process, so also for connections to a proxy.
    http.client._MAXHEADERS = MOST_HEADERS  # type: ignore[attr-defined]
    urllib3.connection.HTTPConnection.response_class = Response

    def connect(connection: urllib3.connection.HTTPConnection) -> socket.socket:
        return guard.connect(connection)

    class Http(urllib3.HTTPConnectionPool):
        class ConnectionCls(urllib3.connection.HTTPConnection):
            _new_conn = connect

    class Https(urllib3.HTTPSConnectionPool):
        class ConnectionCls(urllib3.connection.HTTPSConnection):
            _new_conn = connect

    class Adapter(requests.adapters.HTTPAdapter):
        def init_poolmanager(self, *counts: Any, **options: Any) -> None:
            super().init_poolmanager(*counts, ssl_context=tls, **options)
            self.poolmanager.pool_classes_by_scheme = {"http": Http, "https": Https}

        def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
            return super().proxy_manager_for(proxy, ssl_context=tls, **options)

        def cert_verify(self, *_: Any) -> None:
            """Does nothing: requests would read certificates each time. `tls` has ours."""

    return Adapter(HOSTS_KEPT, workers)


def certificates() -> str:
    """The file of trusted certificates, for images, the database and the hub."""
    names = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    return next(filter(None, map(os.environ.get, names)), certifi.where())


def tls_context() -> ssl.SSLContext:
    """A context that trusts `certificates`. Raises RunError."""
    path = certificates()
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        names = "REQUESTS_CA_BUNDLE, SSL_CERT_FILE"
        raise RunError(f"{path} is no file of certificates ({names}): {error}") from None


def tls_as_browsers() -> ssl.SSLContext:
    """The same for image hosts, some of which are old. Like browsers, it accepts ciphers without
    forward secrecy, servers without renegotiation_info, and roots without key identifiers."""
    context = tls_context()
    context.set_ciphers("DEFAULT:@SECLEVEL=2")
    context.options |= 0x4  # OP_LEGACY_SERVER_CONNECT, which has no name before Python 3.12
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def check_proxies() -> None:
    """Raises RunError if the environment names a SOCKS proxy that can't be used."""
    proxies = getproxies()
    packages = find_spec("socks") and find_spec("socksio")  # requests' and httpx's
    for name in ("http", "https", "all"):
        scheme, colon, _ = proxies.get(name, "").lower().partition(":")
        usable = packages and scheme in ("socks5", "socks5h")
        if colon and scheme.startswith("socks") and not usable:
            raise RunError(
                f"{name.upper()}_PROXY is a SOCKS proxy: write socks5h:// before its host, and "
                "run pip install PySocks socksio; or unset it"
            )


# ============================================================================= Pictures

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, by channel
STD = (0.26862954, 0.26130258, 0.27577711)
DECODE_SECONDS = 5  # of a core for one image; the largest honest ones take 2
DECODE_MB = 1000  # for one image, in each decoder; a WebP of 50 megapixels takes 800
MIN_SIDE = 16  # pixels; below it: tracking pixels and spacers
KEEP_SCALE = 2  # large images are first reduced, by a whole number, to this many times SIDE
# Other Pillow plugins stay shut: some start programs (EPS), and no product photo needs them.
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP"]
# The memory that decoding takes, if not 4 bytes a pixel. Without enough memory the libraries of
# the first three report a broken file. JPEG and MPO are made smaller while they are decoded.
PIXEL_BYTES = {"WEBP": 20, "AVIF": 20, "HEIF": 20, "JPEG": 0, "MPO": 0}
# What Pillow raises for broken files, as hundreds of thousands of damaged files showed. Its other
# errors (AttributeError, TypeError) mean that we call it wrongly.
BROKEN_FILE = (OSError, EOFError, SyntaxError, ValueError, RuntimeError, struct.error, zlib.error)
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes of an ICC profile; some have over 1 MB
# Pillow itself reads planes of 16 bits as if they had 8; libtiff does not.
TiffImagePlugin.READ_LIBTIFF = True


def levels_of(data: bytes) -> bytes:
    """What CLIP sees of an image file, as a browser shows it: levels (224, 224, 3), a byte each.

    Raises ImageError and MemoryError. Any other exception is a defect, ours or Pillow's.
    """
    return in_srgb(square(decoded(data))).tobytes()


def size_of(data: bytes) -> bytes:
    """Width and height of an image file, as its header says, in SIZE. Raises ImageError."""
    try:
        if data.startswith(b"\x89PNG"):  # Pillow refuses some for their comments
            return SIZE.pack(*SIZE.unpack_from(data, 16))
        return SIZE.pack(*opened(data).size)
    except (Image.DecompressionBombError, *BROKEN_FILE):
        raise ImageError(BROKEN) from None


def decoded(data: bytes) -> Image.Image:
    """The picture in an image file, upright and on white.

    Its mode is L, RGB or CMYK, its colours are still those of the file's ICC profile. A large
    picture comes reduced. Raises what levels_of raises.
    """
    image = loaded(data)
    picture = in_eight_bits(image)
    factor = min(picture.size) // (KEEP_SCALE * SIDE)
    if factor > 1:
        picture = picture.reduce(factor)
    return upright(on_white(picture), image)


def loaded(data: bytes) -> Image.Image:
    """An image file with its pixels, as Pillow reads them. Raises ImageError, MemoryError."""
    try:
        image = opened(mended(data))
        refuse_sizes(image)
        # Without a turn in EXIF, Pillow would turn an image by its XMP. Browsers don't.
        image.info.pop("xmp", None)
        # JPEG's decoder can shrink by 2, 4 or 8 as it goes. The other decoders ignore this.
        image.draft(None, (KEEP_SCALE * SIDE, KEEP_SCALE * SIDE))
        image.load()
        return image
    except Image.DecompressionBombError:
        raise ImageError(TOO_MUCH) from None
    except BROKEN_FILE as error:
        raise ImageError(BROKEN) from error


def mended(data: bytes) -> bytes:
    """The file without what browsers ignore and Pillow refuses. Raises ImageError."""
    if data.startswith(b"\x89PNG"):
        return png_of_pixels(data)
    if data.startswith(b"\xff\xd8\xff"):
        return jpeg_with_end(data)
    return data


def png_of_pixels(data: bytes) -> bytes:
    """A PNG with only the chunks that make its picture. Raises ImageError.

    Pillow refuses a whole file for a wrong checksum in a comment, or a comment over 1 MB.
    Browsers ignore both. They use three chunks beside the pixels, if these come before the pixels
    and have the right checksum. Of an animation the still picture is left.
    """
    depth, colour_type = data[24:26].ljust(2)
    kept = [data[:8]]
    pixels_seen = False
    for kind, chunk, is_right in chunks_of(data):
        if kind == b"IDAT":
            pixels_seen = True
            # Pillow doesn't check. A copy that stopped halfway may end in zeros, which it shows.
            if not is_right:
                raise ImageError(BROKEN)
        is_extra = kind in (b"tRNS", b"iCCP", b"eXIf") and is_right and not pixels_seen
        if is_extra or kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(chunk)
        if is_extra and kind == b"tRNS" and depth != 8 and colour_type in (0, 2):
            # Pillow compares this colour with pixels that it has scaled to 8 bits already.
            raise ImageError(f"{RARE_FORMAT} ({depth}-bit PNG with a transparent colour)")
    return b"".join(kept)


def chunks_of(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """The chunks of a PNG: the kind, the whole chunk, and whether its checksum is right."""
    at = 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        content = data[at + 4 : end - 4]  # begins with the kind
        checksum = zlib.crc32(content).to_bytes(4)
        yield content[:4], data[at:end], data[end - 4 : end] == checksum
        at = end


def jpeg_with_end(data: bytes) -> bytes:
    """A JPEG with an end marker. Raises ImageError if pixels are missing as well.

    Uploads often lack their last bytes, the marker FFD9, and nothing else. If more is missing,
    decoders fill up with gray and report no error. So the file is decoded twice, the second time
    with noise at its end. If all pixels are there, the noise changes nothing.
    """
    start_of_scan, end_marker = b"\xff\xda", b"\xff\xd9"
    if data.find(end_marker, data.rfind(start_of_scan)) >= 0:
        return data
    data = data.removesuffix(b"\xff")  # half a marker
    # A copy that stopped halfway ends in zeros, which a decoder takes for pixels.
    if data.endswith(b"\0\0"):
        raise ImageError(BROKEN)
    noise = b"\xaa\x55" * 32
    for restart_marker in range(0xD0, 0xD8):
        noise += bytes([0xFF, restart_marker]) + b"\xaa\x55" * 32
    files = (data + end_marker, data + noise + end_marker)
    pictures = [Image.open(io.BytesIO(file), formats=["JPEG"]).tobytes() for file in files]
    if pictures[0] != pictures[1]:
        raise ImageError(BROKEN)
    return data + end_marker


# How files begin that Pillow can't open, and what they are. The first that fits counts.
_BLANKS = rb"[\s\0\xef\xbb\xbf\xfe\xff]*"  # also a byte order mark, and the zeros of UTF-16
BEGINNINGS = (
    (rb"\s*\Z", EMPTY),  # "\n"
    # "GIF89a", "....ftypavif"
    (rb"\xff\xd8\xff|\x89png|gif8|riff|bm|....ftyp(avi|he[iv]|m[is]f)", BROKEN),
    (rb"ii[*+]\0|mm\0[*+]", f"{RARE_FORMAT} (TIFF, if it is not broken)"),  # "II*\0"
    (rb"\xff\x0a|\0\0\0\x0cjxl ", f"{RARE_FORMAT} (JPEG XL)"),  # "\0\0\0\x0cJXL "
    # "<?xml ...><!-- ... --><svg ": the first tag that begins with a letter
    (_BLANKS + rb"(?=<)(?:(?!<\w).)*+<(\w+:)?svg\b", SVG),
    (_BLANKS + rb"<", WEB_PAGE),  # "<!doctype html>"
    (_BLANKS + rb"[\[{]", JSON),  # '{"error":'
    (_BLANKS + rb"%pdf", PDF),  # "%PDF-1.7"
)


def opened(data: bytes) -> Image.Image:
    """An image file whose header has been read. Raises ImageError for any other file."""
    formats = FORMATS
    # "....ftypheic", or "....ftypmif1" without "avif" soon after
    if re.match(rb"....ftyp(hei|hev|m[is]f1(?!.{,40}avif))", data, re.DOTALL):
        try:
            import pillow_heif
        except (ImportError, OSError):  # OSError: it was installed meanwhile (see shut_in)
            raise ImageError(HEIC) from None
        pillow_heif.register_heif_opener()
        formats = ["HEIF"]
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(io.BytesIO(data), formats=formats)
    for beginning, reason in BEGINNINGS:
        if re.match(beginning, data[: 2**16], re.DOTALL | re.IGNORECASE):
            raise ImageError(reason)
    raise ImageError(OTHER_FORMAT)


def refuse_sizes(image: Image.Image) -> None:
    """Raises ImageError for an image that is too large or too small."""
    width, height = image.size
    if width * height * PIXEL_BYTES.get(image.format or "", 4) > DECODE_MB * 2**20:
        raise ImageError(TOO_MUCH)
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{TOO_SMALL} ({width} x {height})")


def in_eight_bits(image: Image.Image) -> Image.Image:
    """A loaded image in mode L, LA, RGB, RGBA or CMYK. Raises ImageError."""
    if image.mode == "I;16" and image.format == "PNG":
        # Pillow itself would cut off at 255.
        return image.convert("I").point([value >> 8 for value in range(2**16)], "L")
    if image.mode.startswith(("I", "F", "LAB")):
        # Among them is gray TIFF of 12 and 16 bits, where zero may be white.
        raise ImageError(f"{RARE_FORMAT} ({image.format} with pixels of mode {image.mode})")
    if image.format == "GIF":
        return gif_on_its_canvas(image)
    if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        return image.convert("RGBA")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image.convert("RGB")
    return image


def gif_on_its_canvas(image: Any) -> Image.Image:
    """A GIF's first picture. If it is smaller than the canvas, the rest is transparent. Pillow
    would fill it with a colour."""
    box = image.dispose_extent
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGBA").crop(box), box)
    return canvas


def on_white(image: Image.Image) -> Image.Image:
    """An image without alpha: white paper shows where it is transparent."""
    if image.mode not in ("LA", "RGBA"):
        return image
    colours = image.convert(image.mode.removesuffix("A"))
    paper = Image.new("RGB", image.size, "white")
    paper.paste(in_srgb(colours), mask=image.getchannel("A"))
    return paper


# How to turn an image that was taken with a turned camera, by EXIF's value
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image, file: Image.Image) -> Image.Image:
    """An image turned as the EXIF data of its file say. Chromium and Firefox don't turn WebP."""
    if file.format == "WEBP":
        return image
    turn = None
    with contextlib.suppress(*BROKEN_FILE):  # then nobody knows how the camera was held
        turn = TURNS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is None:
        return image
    return image.transpose(turn)


def square(image: Image.Image) -> Image.Image:
    """What CLIP sees of an image: the square in its middle, at 224 x 224 pixels."""
    shorter = min(image.size)
    width = int(SIDE * image.width / shorter)
    height = int(SIDE * image.height / shorter)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = (width - SIDE) // 2
    top = (height - SIDE) // 2
    return image.crop((left, top, left + SIDE, top + SIDE))


SRGB = ImageCms.createProfile("sRGB")
PROFILED = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}  # a profile's colours -> Pillow's mode


def in_srgb(image: Image.Image) -> Image.Image:
    """An image of mode L, RGB or CMYK in sRGB, by its ICC profile if it has one that fits.

    Meant for small images: 224 x 224 pixels take 2 ms, a photograph 25.
    """
    profile = image.info.get("icc_profile") or b""
    mode = PROFILED.get(profile[16:20])
    if mode == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    if mode == image.mode and b"sRGB IEC61966-2" not in profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile
            return to_srgb(profile, mode).apply(image)
    if image.mode == "RGB":
        return image
    return image.convert("RGB")


@lru_cache(maxsize=4)  # making one takes 20 ms, and a catalog has few profiles
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """The conversion from a profile's colours."""
    return ImageCms.buildTransform(io.BytesIO(profile), SRGB, mode, "RGB")


@lru_cache
def pixels_by_level() -> np.ndarray:
    """The pixel of each channel and level (3, 256), computed as transformers' processor does,
    bit by bit the same."""
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    channels = zip(MEAN, STD, strict=True)
    return np.stack([(levels - np.float32(mean)) / np.float32(std) for mean, std in channels])


def normalise(levels: np.ndarray) -> np.ndarray:
    """Levels (224, 224, 3) -> pixels (3, 224, 224), as transformers' CLIPImageProcessor."""
    pixels = pixels_by_level()
    return np.stack([pixels[channel][levels[:, :, channel]] for channel in range(3)])


# ============================================================================= Decoders

DECODE_PATIENCE = 60.0  # seconds; after that a decoder counts as hung, even on a busy machine
LEVELS_BYTES = SIDE * SIDE * 3
SIZE = struct.Struct(">II")  # width and height
# What a decoder can make of an image file, and how many bytes that has
TASKS = {b"levels": (levels_of, LEVELS_BYTES), b"size": (size_of, SIZE.size)}
MOST_REASON = 200  # characters of a reason that are kept
MOST_CALLS = 20  # of a traceback that are sent

OUT_OF_MEMORY = 77  # a decoder's exit code
# What an exit code says of the image. All other deaths are the machine's trouble.
DEATHS = {
    OUT_OF_MEMORY: TOO_MUCH,
    -27: TOO_SLOW,  # SIGPROF, for which Windows has no name
    -signal.SIGSEGV: BROKEN,
    -signal.SIGABRT: BROKEN,
    -signal.SIGFPE: BROKEN,
}
CANT_START = "can't start a process to decode images: check free memory and ulimit -a"

# The script is imported, because Python keeps bytecode of modules only: compiling takes 0.1 s. It
# is imported by its path: nothing else in its folder, or in the current one, can be imported.
RUN_DECODER = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.SourceFileLoader("decoder", sys.argv.pop(1))
decoder = importlib.util.module_from_spec(importlib.util.spec_from_loader("decoder", loader))
sys.modules["decoder"] = decoder
loader.exec_module(decoder)
sys.exit(decoder.serve_as_decoder())
"""
# What Python may need to start. The rest of the environment may hold secrets.
DECODER_NEEDS = re.compile("PYTHON|LD_|DYLD_|(PATH|HOME|APPDATA|SYSTEMROOT)$")
DECODER_SETTINGS = {
    # Else glibc returns memory after each image and asks for it again, which takes 2 ms.
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(64 * 2**20),
}

# Numbers of Linux, the same on every processor.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_ASK_VERSION = 1
LANDLOCK_SCOPE_SIGNAL = 2
PR_SET_NO_NEW_PRIVS = 38


class Loader:
    """The way from a source to pixels, for any number of threads.

    Raises ImageError, and RunError if no decoder can be started.
    """

    def __init__(self, settings: Settings) -> None:
        self._fetcher = Fetcher(settings)
        self._decoders: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for _ in range(cores()):
            self._decoders.put(Decoder())

    def fetch(self, source: Source, deadline: Deadline) -> Download:
        return self._fetcher.fetch(source, deadline)

    def load(self, data: bytes) -> np.ndarray:
        """The pixels (3, 224, 224) of an image file."""
        return normalise(self.decode(data))

    def decode(self, data: bytes) -> np.ndarray:
        """The levels (224, 224, 3) of an image file."""
        with self._free_decoder() as decoder:
            return decoder.decode(data)

    def size(self, data: bytes) -> tuple[int, int]:
        """Width and height of an image file."""
        with self._free_decoder() as decoder:
            return decoder.size(data)

    @contextlib.contextmanager
    def _free_decoder(self) -> Iterator[Decoder]:
        decoder = self._decoders.get()
        try:
            yield decoder
        finally:
            self._decoders.put(decoder)


class Decoder:
    """A process that decodes one image at a time, within limits: a file may claim more than it
    holds, and codecs have holes. The process runs this script again (RUN_DECODER).

    Bytes go in, bytes come out: a result or a reason. A process that replies anything else, or
    hangs, is killed. If a process dies, its exit code says whether the image was at fault.

    Raises ImageError, and RunError if no process can be started.
    """

    def __init__(self) -> None:
        self._process: Any = None

    def decode(self, data: bytes) -> np.ndarray:
        """The levels (224, 224, 3) of an image file."""
        return np.frombuffer(self._ask(b"levels", data), np.uint8).reshape(SIDE, SIDE, 3)

    def size(self, data: bytes) -> tuple[int, int]:
        """Width and height of an image file."""
        width, height = SIZE.unpack(self._ask(b"size", data))
        return width, height

    def _ask(self, task: bytes, data: bytes) -> bytes:
        process = self._process
        if not process or process.poll() is not None:  # it may have died while it was idle
            process = started_decoder()
        self._process = None  # the rest of a reply would be taken for the next image's
        try:
            result = reply_of(process, task, data)
        except ImageError:
            self._process = process
            raise
        except (OSError, EOFError, ValueError):
            process.kill()
            raise ImageError(DEATHS.get(process.wait(), DECODER_LOST)) from None
        self._process = process
        return result


def started_decoder() -> Any:
    """A decoder's process that has replied once, to an empty file. Raises RunError."""
    needs = {name: text for name, text in os.environ.items() if DECODER_NEEDS.match(name)}
    try:
        process: Any = subprocess.Popen(  # noqa: S603 - runs this very script
            [sys.executable, "-P", "-c", RUN_DECODER, __file__, AS_DECODER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=needs | DECODER_SETTINGS,
            # Signals of timeout(1) or a closed terminal must reach the run, not its decoders.
            start_new_session=True,
        )
    except OSError as error:
        raise RunError(f"{CANT_START} ({error.strerror})") from None
    try:
        with contextlib.suppress(ImageError):  # the reason EMPTY
            reply_of(process, b"levels", b"")
    except (OSError, EOFError, ValueError):
        process.kill()
        errors = process.stderr.read().decode(errors="replace").splitlines()
        why = errors[-1] if errors else f"exit code {process.wait()}"
        raise RunError(f"{CANT_START} ({shorten(why, MOST_REASON)})") from None
    return process


def reply_of(process: Any, task: bytes, data: bytes) -> bytes:
    """What a decoder makes of a file, by one of the TASKS. A decoder that takes longer than
    DECODE_PATIENCE is killed.

    Raises ImageError with the reason that it gives; OSError, EOFError or ValueError for a decoder
    that is lost; RunError.
    """
    patience = threading.Timer(DECODE_PATIENCE, process.kill)
    try:
        patience.start()
    except RuntimeError as error:  # no more threads on this machine
        raise RunError(f"{CANT_START} ({error})") from None
    try:
        send(process.stdin, task)
        send(process.stdin, data)
        result = receive(process.stdout, most=LEVELS_BYTES)
        words = receive(process.stdout, most=LEVELS_BYTES)
    finally:
        patience.cancel()
    _, result_bytes = TASKS[task]
    if len(result) == result_bytes:
        return result
    *calls, reason = words.decode().splitlines()
    for line in calls:
        log.debug("decoder: %s", line)
    raise ImageError(shorten(printable(reason), MOST_REASON))


def send(pipe: IO[bytes], data: bytes) -> None:
    """Sends how many bytes there are, then the bytes. Raises OSError if nobody reads."""
    pipe.write(len(data).to_bytes(8, "big"))
    pipe.write(data)
    pipe.flush()


def receive(pipe: IO[bytes], most: int) -> bytes:
    """What `send` sent. Raises EOFError if it ends early, ValueError if it is too much."""
    head = pipe.read(8)
    length = int.from_bytes(head, "big")
    if length > most:
        raise ValueError(f"{length} bytes are too many")
    data = pipe.read(length)
    if len(head) < 8 or len(data) < length:
        raise EOFError
    return data


# What follows runs in a decoder's process.


def serve_as_decoder() -> int:
    """Replies to what comes until the run closes its pipe. Returns the exit code."""
    warnings.simplefilter("ignore")  # Pillow's, about oddities that do no harm
    # Fails if ulimit -v leaves less than an image may take.
    bytes(DECODE_MB * 2**20)
    load_codecs()
    with contextlib.suppress(OSError):  # if memory is short, Linux ends a decoder, not the run
        Path("/proc/self/oom_score_adj").write_text("1000")
    replies = os.fdopen(os.dup(1), "wb")
    for stream in (1, 2):  # where libraries print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    limit_memory()
    shut_in()
    with contextlib.suppress(EOFError, OSError):  # the run is over
        while True:
            task = receive(sys.stdin.buffer, most=sys.maxsize)
            data = receive(sys.stdin.buffer, most=sys.maxsize)
            if hasattr(signal, "setitimer"):  # Windows has no limit
                signal.setitimer(signal.ITIMER_PROF, DECODE_SECONDS)
            for part in reply_to(task, data):
                send(replies, part)
    return 0


def reply_to(task: bytes, data: bytes) -> tuple[bytes, bytes]:
    """What one of the TASKS makes of an image file, and no words; or nothing, and words whose last
    line is the reason. The lines before it are a defect's traceback."""
    make, _ = TASKS[task]
    try:
        return make(data), b""
    except ImageError as reason:
        return b"", str(reason).encode()
    except MemoryError:
        # There may be too little left to say more, or to continue.
        os._exit(OUT_OF_MEMORY)
    except Exception:
        text = traceback.format_exc(-MOST_CALLS).strip()
        return b"", f"{text}\n{DEFECT} ({text.splitlines()[-1]})".encode()


def load_codecs() -> None:
    """Imports what Pillow would import when it meets a format: later no file can be opened."""
    Image.preinit()  # BMP, GIF, JPEG, PNG; AVIF and TIFF are imported above
    for name in ("Mpo", "WebP"):
        import_module(f"PIL.{name}ImagePlugin")
    # Each core has a decoder, and the stacks of 64 threads alone would take over DECODE_MB.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with contextlib.suppress(ImportError):
        import_module("pillow_heif")


def limit_memory() -> None:
    """Limits the memory that this process may take from now on. Only Linux can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])
        most = pages * resource.getpagesize() + DECODE_MB * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def shut_in() -> None:
    """Takes from this process what decoding doesn't need, so that a hole in a codec leads
    nowhere. If the system offers less, we do without."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
        if sys.platform == "linux":
            lock_files()
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # no file, no socket opens


def lock_files() -> None:
    """Landlock (Linux 5.13): no file can be changed, moved or run. No other process can be traced
    or, from Linux 6.12, sent a signal."""
    linux = ctypes.CDLL(None)
    version = linux.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_ASK_VERSION)
    kinds = min(12 + version, 15)  # of what can be done to files; none is allowed
    scope = LANDLOCK_SCOPE_SIGNAL if version >= 6 else 0
    rules = (ctypes.c_uint64 * 3)(2**kinds - 1, 0, scope)
    ruleset = linux.syscall(LANDLOCK_CREATE_RULESET, rules, ctypes.sizeof(rules), 0)
    linux.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    linux.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)


# ================================================================================ Model

# CLIP has two towers. One makes vectors from pixels, the other from words. A picture and words that
# describe it get vectors that are near each other.
#
# The import of torch takes over a second. So each function that uses torch imports it: then a run
# does so while its first images are on their way.

MODEL_CACHE = HERE / ".cache" / "transformers"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "pytorch_model.bin"  # of both towers
SAFETENSORS = "model.safetensors"  # the same in a newer format, in a folder for CLIP_MODEL
TO_EMBED = (CONFIG, WEIGHTS)
TO_ASK = (CONFIG, WEIGHTS, TOKENIZER)

VIT_B_32: dict[str, Any] = {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
}
VIT_B_32_TEXT: dict[str, Any] = {
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,  # tokens
}
LAYERS_AT_ONCE = 4  # read at once: some 120 MB of the file in memory beside the model
GELU_SLOPE = 1.702  # quick_gelu(x) = x * sigmoid(1.702 x)

Tensor = Any  # torch's


class ClipEncoder:
    """CLIP's image encoder. Raises RunError if the model can't be had, or can't be used here."""

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(1)  # each core has its own image, see Run
        if settings.dtype == "bfloat16" and settings.device == "cpu" and not has_bfloat16():
            raise RunError("--dtype bfloat16: this processor has no arithmetic for it")
        folder = model_folder(settings, TO_EMBED)
        with model_trouble(folder, settings):
            config = read_config(folder, "vision_config", VIT_B_32)
            if config["hidden_act"] != VIT_B_32["hidden_act"]:
                raise ValueError(f"its activation is {config['hidden_act']}")
            self.tower = ImageTower(Weights(folder, settings), config)
            self.try_out()
        if config != VIT_B_32 and settings.model_version == MODEL_VERSION:
            raise RunError(
                f"the model in {folder} is not of the shape ViT-B/32: set MODEL_VERSION to a name "
                f"for its rows other than {MODEL_VERSION}"
            )

    def try_out(self) -> None:
        """Embeds a black image. Raises ValueError if CLIP gives no such vector."""
        (vector,) = self.encode(np.zeros((1, 3, SIDE, SIDE), np.float32))
        if vector.size != DIMENSIONS:
            raise ValueError(f"it gives {vector.size} numbers, not {DIMENSIONS}")
        if not np.isfinite(vector).all():
            raise ValueError(NOT_FINITE)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (n, 3, 224, 224) -> vectors (n, 512) of unit length."""
        import torch

        with torch.inference_mode():
            return of_unit_length(self.tower(torch.from_numpy(pixels)))

    def embed(self, batch: list[np.ndarray]) -> np.ndarray:
        """Pixels, each (3, 224, 224) -> vectors (n, 512). Raises RunError if the batch is too
        large."""
        try:
            return self.encode(np.stack(batch))
        except RuntimeError as error:  # such as: the device has too little memory
            raise RunError(
                f"the model failed on {len(batch)} images at once ({shorten(str(error), 100)}): "
                "try a smaller --batch-size, or another --device"
            ) from None


class TextEncoder:
    """CLIP's text encoder, for questions in words. Raises RunError as ClipEncoder does.

    transformers has the same encoder, but its import takes longer than a question may take.
    """

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(1)  # with a few words, more threads wait longer than they work
        folder = model_folder(settings, TO_ASK)
        with model_trouble(folder, settings):
            from tokenizers import Tokenizer

            config = read_config(folder, "text_config", VIT_B_32_TEXT)
            self.tokenizer = Tokenizer.from_str((folder / TOKENIZER).read_text("utf-8"))
            self.start = self.tokenizer.token_to_id("<|startoftext|>")
            self.end = self.tokenizer.token_to_id("<|endoftext|>")
            self.most_tokens = config["max_position_embeddings"]
            self.tower = TextTower(Weights(folder, settings), config)
            self.encode([""])

    def encode(self, texts: list[str]) -> np.ndarray:
        """Texts -> vectors (n, 512) of unit length. Texts are cut off after 75 tokens."""
        import torch

        with torch.inference_mode():
            embeddings = [self.tower(self.tokens(text)) for text in texts]  # each (1, 512)
            return of_unit_length(torch.cat(embeddings))

    def tokens(self, text: str) -> list[Any]:
        """The tokens of a text, with the start token before them and the end token after them."""
        inner = self.tokenizer.encode(text, add_special_tokens=False).ids
        tokens = [self.start, *inner[: self.most_tokens - 2], self.end]
        return tokens[: tokens.index(self.end) + 1]  # a text may contain <|endoftext|> itself


def of_unit_length(embeddings: Tensor) -> np.ndarray:
    """A tower's output (n, 512) as vectors, float32."""
    vectors: np.ndarray = embeddings.float().cpu().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


@contextlib.contextmanager
def model_trouble(folder: Path, settings: Settings) -> Iterator[None]:
    """Turns what goes wrong with a model into a RunError."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # each file format, library and device has errors of its own
        trouble = f"the model in {folder} can't be used ({shorten(str(error), 100)})"
        if settings.clip_model:
            trouble += f"; CLIP_MODEL must be a folder with a copy of {MODEL_ID}"
        if settings.device != "cpu":
            trouble += f"; or torch has no --device {settings.device}"
        raise RunError(trouble) from None


def read_config(folder: Path, tower: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a tower. One that the file leaves out has the default value."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    config = config.get(tower, config)
    return {name: config.get(name, value) for name, value in defaults.items()}


def cores() -> int:
    """The processor cores that this run may use; OMP_NUM_THREADS has the last word."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_bfloat16() -> bool:
    """Whether the processor has arithmetic for bfloat16."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(value is True for name, value in capabilities.items() if "bf16" in name)


# For the same weights the towers give what CLIPVisionModelWithProjection and
# CLIPTextModelWithProjection of transformers give. They are faster on CPUs, for four reasons: the
# weights are laid out for oneDNN once; q, k and v are one product; activations and sums are done
# within the products; the image tower's last layer computes only the token that is used.


class ImageTower:
    """Pixels (n, 3, 224, 224) -> embeddings (n, 512), not yet of unit length."""

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self.weights = weights
        self.side = config["patch_size"]
        embeddings = "vision_model.embeddings."
        self.first = weights.put(weights.read(embeddings + "class_embedding"))  # (768,)
        position = weights.read(embeddings + "position_embedding.weight")
        self.position = weights.put(position)  # (50, 768)
        patches = weights.read(embeddings + "patch_embedding.weight")  # (768, 3, 32, 32)
        self.patches = Linear(weights, patches.flatten(1))
        # The file has this typo.
        self.norm_before = read_norm(weights, "vision_model.pre_layrnorm")
        self.norm_after = read_norm(weights, "vision_model.post_layernorm")
        self.projection = Linear(weights, weights.read("visual_projection.weight"))
        self.layers = read_layers(weights, "vision_model.encoder.layers.", config)

    def __call__(self, pixels: Tensor) -> Tensor:
        import torch

        side = self.side
        x = self.weights.put(pixels).unfold(2, side, side).unfold(3, side, side)
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (n, 49, 3 * 32 * 32)
        first = self.first.expand(len(x), 1, -1)
        x = torch.cat([first, self.patches(x)], 1)  # (n, 50, 768)
        x = self.norm_before(x + self.position)
        for layer in self.layers[:-1]:
            x = layer(x)
        x = self.layers[-1](x, first_alone=True)  # (n, 1, 768)
        return self.projection(self.norm_after(x[:, 0]))


class TextTower:
    """Tokens -> embedding (1, 512) of the last token, not yet of unit length. The last token has
    seen all tokens before it."""

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self.weights = weights
        embeddings = "text_model.embeddings."
        # (49408, 512), of which only a few rows are ever read
        self.words = weights.file[embeddings + "token_embedding.weight"]
        self.position = weights.read(embeddings + "position_embedding.weight")  # (77, 512)
        self.norm_after = read_norm(weights, "text_model.final_layer_norm")
        self.projection = Linear(weights, weights.read("text_projection.weight"))
        self.layers = read_layers(weights, "text_model.encoder.layers.", config)

    def __call__(self, tokens: list[int]) -> Tensor:
        x = self.words[tokens] + self.position[: len(tokens)]
        x = self.weights.put(x[None])  # (1, tokens, 512)
        for layer in self.layers:
            x = layer(x, causal=True)
        return self.projection(self.norm_after(x[:, -1]))


class Layer:
    """One layer of a transformer: attention, then two products with an activation between them.
    The output of each is added to its input."""

    def __init__(self, weights: Weights, name: str, heads: int) -> None:
        self.heads = heads
        qkv = [f"{name}self_attn.{letter}_proj" for letter in "qkv"]
        self.norm1 = read_norm(weights, name + "layer_norm1")
        self.qkv = Linear(weights, *weights.read_pair(*qkv))
        self.out = Linear(weights, *weights.read_pair(name + "self_attn.out_proj"))
        self.norm2 = read_norm(weights, name + "layer_norm2")
        # quick_gelu(x) is silu(1.702 x) / 1.702, and silu comes with oneDNN's product
        up, up_bias = weights.read_pair(name + "mlp.fc1")
        down, down_bias = weights.read_pair(name + "mlp.fc2")
        self.up = Linear(weights, up * GELU_SLOPE, up_bias * GELU_SLOPE, silu=True)
        self.down = Linear(weights, down / GELU_SLOPE, down_bias)

    def __call__(self, x: Tensor, first_alone: bool = False, causal: bool = False) -> Tensor:
        """x (n, tokens, width) -> the same shape, or (n, 1, width) of the first token alone.
        Causal: a token sees only those before it, as in texts."""
        from torch.nn.functional import scaled_dot_product_attention

        n, tokens, _width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, tokens, width / heads)
        if first_alone:
            x = x[:, :1].contiguous()
            q = q[:, :, :1]
        attended = scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = self.out(attended.transpose(1, 2).reshape(x.shape), add=x)
        return self.down(self.up(self.norm2(x)), add=x)


def read_norm(weights: Weights, name: str) -> Callable[[Tensor], Tensor]:
    """A layer norm."""
    from torch.nn.functional import layer_norm

    weight, bias = weights.read_pair(name)
    return partial(
        layer_norm,
        normalized_shape=weight.shape,
        weight=weights.put(weight),
        bias=weights.put(bias),
    )


class Linear:
    """A linear layer: x @ weight.T + bias. If torch has oneDNN's operators (`can_pack`), the
    silu of that, or its sum with `add`, costs no extra time."""

    def __init__(
        self, weights: Weights, weight: Tensor, bias: Tensor = None, silu: bool = False
    ) -> None:
        import torch

        self.weight = weights.put(weight)  # (out, in)
        self.bias = None
        if bias is not None:
            self.bias = weights.put(bias)  # (out,)
        self.silu = silu
        self.packed = weights.can_pack
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Tensor, add: Tensor = None) -> Tensor:
        from torch import ops
        from torch.nn import functional

        if self.packed and add is not None:
            product = ops.mkldnn._linear_pointwise.binary
            return product(x, add, self.weight, self.bias, "add")
        if self.packed:
            after = "swish" if self.silu else "none"  # silu's name in oneDNN
            return ops.mkldnn._linear_pointwise(x, self.weight, self.bias, after, [], "")
        y = functional.linear(x, self.weight, self.bias)
        if self.silu:
            y = functional.silu(y)
        if add is not None:
            y = add + y
        return y


def can_pack(device: str, dtype: Any) -> bool:
    """Whether this torch has the operators for oneDNN's layout, for this processor."""
    import torch

    try:
        one = torch.eye(32, device=device, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(one)
        torch.ops.mkldnn._linear_pointwise(one, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


def read_layers(weights: Weights, name: str, config: Mapping[str, Any]) -> list[Layer]:
    """A tower's layers, laid out on all cores."""
    heads = config["num_attention_heads"]
    numbers = range(config["num_hidden_layers"])
    layers: list[Layer] = []
    with ThreadPoolExecutor(cores()) as pool:
        for start in numbers[::LAYERS_AT_ONCE]:
            some = numbers[start : start + LAYERS_AT_ONCE]
            layers += pool.map(lambda number: Layer(weights, f"{name}{number}.", heads), some)
            weights.map_file()
    return layers


class Weights:
    """The weights of a model by name, and where they go: to a device, in a number format."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        import torch

        self.folder = folder
        self.device = settings.device
        self.dtype = getattr(torch, settings.dtype)
        self.can_pack = can_pack(self.device, self.dtype)
        self.map_file()

    def map_file(self) -> None:
        """Maps the file into memory. Only the parts that are used are read: one tower of the two.
        Mapping it again frees the memory of the parts that were read."""
        import torch

        if (self.folder / SAFETENSORS).is_file():
            from safetensors.torch import load_file

            self.file = load_file(self.folder / SAFETENSORS)
        else:
            self.file = torch.load(self.folder / WEIGHTS, mmap=True, weights_only=True)

    def read(self, *names: str) -> Tensor:
        """The weights of these names, one below the other, as float32."""
        import torch

        # A copy even of a single one: a view would keep the whole file mapped
        return torch.cat([self.file[name] for name in names]).float()

    def read_pair(self, *names: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of these layers, as if they were one layer."""
        weight = self.read(*(f"{name}.weight" for name in names))
        bias = self.read(*(f"{name}.bias" for name in names))
        return weight, bias

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, in the number format."""
        return tensor.to(self.device, self.dtype)


# The model's files


class PinnedFile(NamedTuple):
    """A file of the model at MODEL_REVISION."""

    size: int  # bytes
    sha256: str


MODEL_FILES = {
    CONFIG: PinnedFile(4_186, "b575ef3c36f2a057fa19e221650105052d61cc9c1a972ec15019c6261ec98770"),
    TOKENIZER: PinnedFile(
        2_224_041, "b556ac8c99757ffb677208af34bc8c6721572114111a6e0aaf5fa69ff0b8d842"
    ),
    WEIGHTS: PinnedFile(
        605_247_071, "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"
    ),
}


def model_folder(settings: Settings, needed: tuple[str, ...]) -> Path:
    """The folder of the model: the one that CLIP_MODEL names, or that of the pinned model."""
    if not settings.clip_model:
        return pinned_model(needed)
    folder = Path(settings.clip_model).expanduser()
    weights = folder / WEIGHTS
    is_copy = settings.model_version == MODEL_VERSION and not (folder / SAFETENSORS).is_file()
    if is_copy and weights.is_file() and not is_whole(weights):
        raise RunError(
            f"CLIP_MODEL: {weights} is not {MODEL_ID}'s, or damaged: copy it again (or, if it is "
            "another model, set MODEL_VERSION to a name for its rows)"
        )
    return folder


def pinned_model(needed: tuple[str, ...] = TO_ASK) -> Path:
    """The folder of the pinned model. It has at least the files that are needed.

    It is looked for in our cache, then in the user's own of huggingface_hub (HF_HOME). A model
    that is in neither is downloaded to ours.
    """
    from huggingface_hub import constants

    folder_in_cache = f"models--{MODEL_ID.replace('/', '--')}/snapshots/{MODEL_REVISION}"
    for cache in (MODEL_CACHE, Path(constants.HF_HUB_CACHE)):
        folder = cache / folder_in_cache
        with contextlib.suppress(OSError):  # we may lack permission for the user's cache
            if all(is_whole(folder / name) for name in needed):
                return folder
    folder = MODEL_CACHE / folder_in_cache
    try:
        download_model(folder)
    except (ImportError, RunError):
        raise
    except Exception as error:  # the disk's, the hub's, or its HTTP library's
        raise RunError(
            f"{MODEL_ID} could not be downloaded ({hub_trouble(error)}): check network, disk, and "
            "HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE if set; or set CLIP_MODEL to a folder with "
            "a copy of it"
        ) from None
    return folder


def is_whole(path: Path) -> bool:
    """Whether a file of the model is there, and byte for byte the pinned one.

    Its SHA-256 takes up to a second, so it is computed once: NAME.checked beside the file says
    that the file has not changed since.
    """
    pinned = MODEL_FILES[path.name]
    if not path.is_file() or path.stat().st_size != pinned.size:
        return False
    checked = path.with_name(path.name + ".checked")
    if checked.is_file() and checked.stat().st_mtime >= path.stat().st_mtime:
        return True
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pinned.sha256:
        return False
    with contextlib.suppress(OSError):  # a read-only cache is checked in each run
        checked.touch()
    return True


def download_model(folder: Path) -> None:
    """Downloads the model's files that are not yet in this folder of our cache."""
    from filelock import FileLock

    check_proxies()
    set_up_hub()
    log.info("downloading %s once, about 600 MB, to %s", MODEL_ID, MODEL_CACHE)
    MODEL_CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(MODEL_CACHE / "download.lock"):  # one of several runs downloads, the others wait
        for partial_file in MODEL_CACHE.rglob("*.incomplete"):  # of runs that were stopped
            partial_file.unlink()
        for name in MODEL_FILES:
            download_file(folder / name)


def set_up_hub() -> None:
    """Gives huggingface_hub our certificates and our patience. Raises RunError."""
    from huggingface_hub import constants, file_download

    tls_context()  # refuses a file without certificates
    os.environ["SSL_CERT_FILE"] = certificates()
    # Xet, a second way to the hub's files, reads no setting of certificates.
    constants.HF_HUB_DISABLE_XET = True
    # Telemetry would ask the hub for one more page.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    # It asks a silent hub seven times, and would wait 60 s each time.
    file_download._ETAG_RETRY_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT
    # Its warnings show URLs, and HF_ENDPOINT may hold a password.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def download_file(path: Path) -> None:
    """Downloads a file of the model unless it is there. A damaged one is fetched once more."""
    from huggingface_hub import hf_hub_download

    for _attempt in range(2):
        if is_whole_or_deleted(path):
            return
        hf_hub_download(MODEL_ID, path.name, revision=MODEL_REVISION, cache_dir=MODEL_CACHE)
    if not is_whole_or_deleted(path):
        raise RunError(
            f"the hub's {path.name} is not that of {MODEL_ID}: check HF_ENDPOINT, or set "
            "CLIP_MODEL to a folder with a copy of it"
        )


def is_whole_or_deleted(path: Path) -> bool:
    """Whether a file of the model is the pinned one. Any other file is deleted."""
    if is_whole(path):
        return True
    if path.exists():
        log.warning("%s is damaged (its SHA-256): deleted", path)
        path.resolve().unlink()
    path.unlink(missing_ok=True)  # in the hub's cache it is a link
    return False


def hub_trouble(error: BaseException) -> str:
    """Why the download failed, in a few words. Not the error's own: they may quote the token, or
    a password in HF_ENDPOINT."""
    error = error.__cause__ or error  # of huggingface_hub's "not in the cache"
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    return getattr(error, "strerror", None) or type(error).__name__


# ============================================================ The gallery, the question

SAME = 0.99  # from this cosine on, pictures look the same; immich draws the line there, too
LOOK_SECONDS = 3.0  # to search for what looks the same, and again to read a folder's files
MATCHES = 12  # pictures for a question; --limit says another number
# With these a page stays below 3 MB: with four questions, and addresses of ordinary length.
SHOWN_MATCHES = 24
SHOWN_CARDS = 60
SHOWN_MEMBERS = 6
NEAREST = 6  # to each of the SAMPLES
THUMBNAIL = 160  # pixels a side
THUMBNAIL_BYTES = 2700
LONGEST_LINK = 800  # characters
LONGEST_CELL = 2000  # characters; spreadsheets take 32,767
# Where a cell begins a formula, such as =1+1. Some spreadsheets split lines at semicolons.
FORMULA = re.compile(r"""(?:^|[;\t\r\n])[\s"]*(?=[=+\-@\uff1d\uff0b\uff0d\uff20])""")
NEAR_TO_WORDS = "a similarity of 0.2 to 0.35 is high; between pictures it is higher"


def answer_questions(store: Store, settings: Settings, status: Status) -> int:
    """What --search does: prints the pictures nearest to each question. Returns the exit code;
    raises RunError."""
    if not status.done:
        version = settings.model_version
        raise RunError(f"nothing is embedded yet as {version}: run without --search first")
    vectors = question_vectors(settings)
    wanted = settings.limit or MATCHES
    answers = {question: store.search(vectors[question], wanted) for question in settings.search}
    with contextlib.suppress(OSError):  # as in: ... | head -1
        for question, matches in answers.items():
            for match in matches:
                print(answer_line(question, match, settings), flush=True)
    if settings.gallery:
        Gallery(store, settings, status, answers).write()
    return 0


def answer_line(question: str, match: Match, settings: Settings) -> str:
    """Similarity, name, and path or id; and the question where there are several."""
    picture = match.picture
    where = settings.local / picture.image if settings.local else picture.id
    columns = [f"{match.similarity:.3f}", picture.name, str(where)]
    if len(settings.search) > 1:
        columns.append(question)
    return "\t".join(map(printable, columns))


def question_vectors(settings: Settings) -> dict[str, np.ndarray]:
    """The vector (512,) of each question; loads only the towers that these need. Raises RunError
    for a picture that can't be had."""
    loader = Loader(settings)
    pixels = {}
    words = []
    for question in settings.search:
        source = question_source(question)
        if not source:
            words.append(question)
            continue
        try:
            data = loader.fetch(source, Deadline(settings.fetch_seconds)).data
            pixels[question] = loader.load(data)
        except ImageError as error:
            raise RunError(f"--search {shorten(question, 200)}: {error}") from None
    vectors: dict[str, np.ndarray] = {}
    if pixels:
        made = ClipEncoder(settings).encode(np.stack([*pixels.values()]))
        vectors |= zip(pixels, made, strict=True)
    if words:
        log.info("for words %s", NEAR_TO_WORDS)
        vectors |= zip(words, TextEncoder(settings).encode(words), strict=True)
    return vectors


def question_source(question: str) -> Source | None:
    """Where the picture of a question is: at a URL, or in a file that exists. None: the question
    is in words. Raises RunError for what looks like a file's name and is none."""
    if re.match("(?i)https?://", question):
        return Source(question, {})
    if os.path.isfile(question):  # noqa: PTH113 - Path's raises for many words
        return Source(Path(question), {})
    if Path(question).suffix.lower() in IMAGE_SUFFIXES:
        raise RunError(f"--search {question}: there is no such file")
    return None


# A template of Jinja, which escapes whatever is filled in. It sees this module's globals and the
# attributes of a Gallery.
GALLERY = """\
{% set local = settings.local is not none %}
{% set origin = settings.local.name if local else urlsplit(settings.url).netloc %}
{% set title = settings.client or (origin if local else "Products") %}

{% macro link(address) %}
{% if address %}<a href="{{ address }}" target="_blank" rel="noreferrer">{{ caller() }}</a>
{%- else %}{{ caller() }}{% endif %}
{% endmacro %}
{% set beside = quote(os.fsencode(table.name)) %}
{% set the_table %}{% call link(beside) %}{{ table.name }}{% endcall %}{% endset %}
{% macro more(count) %}
{% if count > 0 %}<p>And {{ "{:,}".format(count) }} more: see {{ the_table|trim }}.</p>{% endif %}
{% endmacro %}

{% macro figure(row, picture) %}
{% set look = looks.get(picture.id, row) %}
<figure>{% call link(gallery.address(picture.image)) %}
{% if look.thumbnail %}<img src="{{ look.thumbnail }}" alt="{{ shorten(picture.name) }}">
{%- elif row.reason %}{{ "Open it" if local else shorten(picture.image, 100) }}
{%- else %}<span class="none">{{ shorten(look.trouble, 100) }}</span>{% endif %}
{% endcall %}
{% set product = picture.link and gallery.address(picture.link) %}
{% set shown = shorten(picture.name, 40)|replace("_", "_<wbr>"|safe) %}
<b>{% call link(product) %}<bdi>{{ shown }}</bdi>{% endcall %}</b>
{% if not product %}<small><bdi class="id">{{ shorten(picture.id|string, 200) }}</bdi></small>
{% endif %}
{% if not local %}<small><bdi>{{ shorten(picture.client) }}</bdi></small>{% endif %}
{% if row.largest %}<mark>largest</mark>{% endif %}
{% if row.same_as is not none %}<mark>{{ row.copy }}</mark>
{% elif row.similarity %}<small>similarity {{ "%.3f"|format([row.similarity, 0.999]|min) }}</small>
{% endif %}
<small>{{ look.width ~ " x " ~ look.height ~ ", " if look.width }}
{{ look.bytes|filesizeformat if look.bytes }}</small></figure>
{% endmacro %}

{% macro section(id, heading, cards, most) %}
<section id="{{ id }}"><h2>{{ heading }}</h2>{{ caller() }}<div class="cards">
{% for card in cards[:SHOWN_CARDS] %}
<article style="--n:{{ [card.rows[:most]|length, 2]|max }}"><h3>{{ shorten(card.title, 200) }}</h3>
{% if card.advice %}<p>{{ counted(card.rows|length, "picture") }}. {{ card.advice }}</p>{% endif %}
<div class="grid">{% for row in card.rows[:most] %}{{ figure(row, row.picture) }}{% endfor %}</div>
{{ more(card.rows|length - most) }}</article>
{% endfor %}
</div>{{ more(cards|length - SHOWN_CARDS) }}</section>
{% endmacro %}
<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ shorten(title, 200) }}</title>
<style>
:root { color-scheme: light dark }
* { box-sizing: border-box; margin: 0 }
body { max-width: 1400px; margin: auto; padding: 1.5rem 3vw; overflow-wrap: anywhere;
  background: light-dark(#f6f6f4, #131314); font: 15px/1.45 system-ui, sans-serif }
h2 { margin-top: 2.5rem }
a { color: inherit }
p { margin: .25rem 0 .75rem; max-width: 62em }
p, small { color: light-dark(#66665f, #a5a59f) }
b, small { display: block }
nav, .cards { display: flex; flex-wrap: wrap; gap: .9rem }
nav a, article { padding: .9rem; border-radius: .8rem; background: light-dark(#fff, #1e1e20) }
nav a { flex: 1 1 11rem; text-decoration: none }
nav b { font-size: 1.4rem; text-decoration: underline }
article { flex: var(--n) 1 calc(var(--n) * 8.75rem + 1.3rem); max-width: calc(var(--n) * 13rem) }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(6.8rem, 1fr)) }
figure { margin: .4rem 0; min-width: 0; font-size: .8rem }
img, .none { display: grid; width: 100%; aspect-ratio: 1; border-radius: .5rem; overflow: hidden;
  border: 1px solid #8884; place-content: center; text-align: center; margin-bottom: .3rem }
.id { user-select: all; -webkit-user-select: all }
mark { margin-right: 3px; padding: 0 .4rem; border-radius: 1rem; background: #d8eddd; color: #000 }
</style>
<header><h1>{{ shorten(title, 200) }}</h1>
<p>{{ "{:,} of {:,}".format(status.done, status.assets) }} pictures can be found by
similar-product search · {{ datetime.now().strftime("%d %B %Y, %H:%M") }}
{{ " · " ~ shorten(origin, 200) if origin != title }}</p></header><nav aria-label="Sections">
<a href="#same"><b>{{ counted(groups|length, "group") }}</b> of pictures that look the same;
{{ counted(groups|sum("repeats"), "identical file" if local else "repeated picture") }} in
{{ counted(groups|selectattr("repeats")|list|length, "group") }}</a>
<a href="#failed"><b>{{ counted(catalog.failures|length, "picture") }}</b> can't be used</a>
<a href="#alike"><b>{{ counted(samples|length, "sample") }}</b> of what looks alike</a>
</nav><main>
{% if asked %}
{% call section("asked", "Asked", asked, SHOWN_MATCHES) %}
<p>The nearest come first. Ask your developer for more. For words {{ NEAR_TO_WORDS }}.</p>
{% endcall %}
{% endif %}
{% call section("same", "Looks the same", groups, SHOWN_MEMBERS) %}
<p>These are copies, resized pictures, or variants of one product. Each has a similarity of
{{ SAME }} or more to another one of its group. Only the square in the middle of a picture is
compared. A picture opens its original. Click a path or an id below a name to select it for copying.
{% if local %}
Of identical files one is marked "keep": before you delete another, see that no product uses it.
{% else %}
An underlined name opens the product's page. Where products share a picture, give each its own. One
that many share may be a placeholder.
{% endif %}
{{ the_table }} lists all of these pictures. Identical ones have the same id under same_as. An empty
cell means: unknown, or none.</p>
{% if local and unknown %}
<p>{{ counted(unknown, "file") }} could not be read, or not in time: more may be identical.</p>
{% endif %}
{% if catalog.compared < status.done %}
<p>Time was short: of {{ counted(status.done, "picture") }}, {{ "{:,}".format(catalog.compared) }}
were compared with all others, {{ "{:,}".format(catalog.sought_among) }} searched for copies.</p>
{% endif %}
{% endcall %}
{% call section("failed", "Can't be used", failed, SHOWN_MEMBERS) %}
<p>Similar-product search can't find these until they are fixed. Later runs try them again by
themselves. {{ the_table }} lists all of them.</p>
{% endcall %}
{% call section("alike", "Looks alike", samples, SHOWN_MATCHES) %}
<p>Some pictures, each with those nearest to it. What looks the same is left out. If they don't fit,
ask your developer.</p>
{% endcall %}
</main></html>
"""
TABLE_HEAD = "what,group,name,client,similarity,copy,same_as,width,height,bytes,id,image,link"
TABLE_HEAD += ",reason,advice\r\n"


@dataclass(eq=False)
class Row:
    """A picture of a card. Those that look the same, or failed, are the rows of the table, too."""

    picture: Picture
    similarity: float = 0.0  # to the question, to the sample, or to the nearest of its group
    reason: str = ""  # why it failed
    kind: str = ""  # what identical pictures share, a file's hash or an id; empty: unknown
    same_as: Id | None = None  # of identical pictures: the one to keep
    copy: str = ""  # in words: no, keep, same file, same picture; empty: unknown
    largest: bool = False  # of its group
    width: int | None = None
    height: int | None = None
    bytes: int | None = None
    pixels: int = 0
    thumbnail: str = ""  # a data: URL
    trouble: str = "not in time"  # shown if there is no thumbnail


@dataclass
class Card:
    """Pictures under a title."""

    title: str
    rows: list[Row]
    advice: str = ""
    repeats: int = 0  # copies other than those to keep


class Gallery:
    """What --gallery shows. The page loads nothing and runs nothing, so it can be sent around."""

    def __init__(
        self, store: Store, settings: Settings, status: Status, answers: Mapping[str, list[Match]]
    ) -> None:
        log.info("making the page")
        self._store = store
        self._loader = Loader(settings)
        self._path = settings.gallery or Path()
        self.settings = settings
        self.status = status
        self.table = self._path.with_suffix(".csv")
        self.catalog = store.catalog(status.done)
        self.asked = [card_of(asked, found[:SHOWN_MATCHES]) for asked, found in answers.items()]
        self.samples = [card_of(found[0].picture.name, found) for found in self.catalog.samples]
        for card in self.samples:
            card.rows[0].similarity = 0.0  # it is the sample itself
        self.groups = self._groups()
        self.failed = self._failed()
        self._table = [row for card in self.groups + self.failed for row in card.rows]
        if settings.local:
            self._look(self._table, LOOK_SECONDS, show=False)
        self._arrange()  # the order decides what is shown
        shown = [row for card in self.groups[:SHOWN_CARDS] for row in card.rows[:SHOWN_MEMBERS]]
        shown += [row for card in self.samples + self.asked for row in card.rows]
        # Some are on several cards, and in the table besides: those rows get what is seen.
        rows = {row.picture.id: row for row in reversed(self._table + shown)}
        self.looks = {row.picture.id: rows[row.picture.id] for row in shown}
        # No host keeps the gallery waiting: all pictures together get the time of one.
        self._look([*self.looks.values()], settings.fetch_seconds + 1, show=True)
        self._arrange()

    def _groups(self) -> list[Card]:
        """Pictures that look the same, the shortest name first: it is rarely that of a copy."""
        kinds: dict[Id, str] = {}
        for copies in joined(pair for pair in self.catalog.pairs if pair.same):
            kinds |= {one.id: str(copies[0].id) for one in copies}
        nearest: dict[Id, float] = {}
        for pair in sorted(self.catalog.pairs, key=lambda pair: pair.similarity):
            nearest[pair.one.id] = nearest[pair.other.id] = round(pair.similarity, 6)
        cards = []
        for pictures in joined(self.catalog.pairs):
            pictures.sort(key=lambda one: (len(one.name), str(one.id)))
            rows = [Row(one, nearest[one.id], kind=kinds.get(one.id, "")) for one in pictures]
            cards.append(Card("", rows))
        return cards

    def _failed(self) -> list[Card]:
        """A card for each reason, the most frequent one first."""
        cards: dict[str, Card] = {}
        for one in self.catalog.failures:
            title = one.reason.partition(" (")[0]
            title = title[:1].upper() + title[1:]
            empty = Card(title, [], advice_on(one.reason) or "Ask your developer.")
            cards.setdefault(title, empty).rows.append(Row(one.picture, reason=one.reason))
        return sorted(cards.values(), key=lambda card: -len(card.rows))

    def _look(self, rows: list[Row], seconds: float, show: bool) -> None:
        """Reads pictures for at most so many seconds. `show`: makes thumbnails, too."""
        deadline = time.monotonic() + seconds
        pool = ThreadPoolExecutor(self.settings.workers)
        while rows and time.monotonic() < deadline:
            some, rows = rows[:1000], rows[1000:]  # a future takes memory
            looks = {pool.submit(self._look_at, row.picture, show): row for row in some}
            for look in wait(looks, deadline - time.monotonic()).done:
                vars(looks[look]).update(look.result())  # raises RunError
        pool.shutdown(wait=False, cancel_futures=True)

    def _look_at(self, picture: Picture, show: bool) -> dict[str, Any]:
        """Fields of a Row. What comes too late changes nothing: the page is being made."""
        seen: dict[str, Any] = {}
        try:
            source = self._store.locate(Asset(picture.id, picture.image))
            data = self._loader.fetch(source, Deadline(self.settings.fetch_seconds)).data
            seen["bytes"] = len(data)
            if self.settings.local:
                seen["kind"] = hashlib.sha256(data).hexdigest()
            width, height = self._loader.size(data)
            seen |= {"width": width, "height": height, "pixels": width * height}
            if show:
                seen["thumbnail"] = thumbnail_of(self._loader.decode(data))
        except ImageError as error:
            seen["trouble"] = str(error)
        return seen

    def _arrange(self) -> None:
        """Says which pictures are identical, and sorts the groups and their pictures."""
        kinds: dict[str, list[Row]] = defaultdict(list)
        for row in self._table:
            row.same_as, row.copy, row.largest = None, "", False  # a file may have changed since
            kinds[row.kind].append(row)
        self.unknown = len(kinds.pop("", []))
        for first, *others in kinds.values():
            first.copy = "no"
            if others:
                for row in (first, *others):
                    row.same_as = first.picture.id
                    row.copy = "same file" if self.settings.local else "same picture"
                # Else whoever deletes all rows of "same file" loses the picture.
                if self.settings.local and not first.reason:
                    first.copy = "keep"
        for card in self.groups:
            rows = card.rows
            rows.sort(key=lambda row: (row.same_as is None, str(row.same_as)))
            rows.sort(key=lambda row: (-row.pixels, -(row.bytes or 0)))
            rows[0].largest = 0 < rows[-1].pixels < rows[0].pixels
            # After the largest come copies: only SHOWN_MEMBERS are shown.
            rows[1:] = sorted(rows[1:], key=lambda row: row.same_as is None)
            card.repeats = sum(row.same_as not in (None, row.picture.id) for row in rows)
        # Groups with copies come first: something can be done about them. Then the most alike.
        self.groups.sort(key=lambda card: -min(row.similarity for row in card.rows))
        self.groups.sort(key=lambda card: all(row.same_as is None for row in card.rows))
        for number, card in enumerate(self.groups, 1):
            card.title = f"Group {number}: {len(card.rows):,} look the same"

    def address(self, text: str) -> str:
        """Where a browser finds a URL, or a file of the folder; empty where there is none."""
        if not self.settings.local:
            url = full_url(text, self.settings.url)
            return url if re.match("(?i)https?://", url) and len(url) <= LONGEST_LINK else ""
        path = self.settings.local / text
        try:
            return quote(Path(os.path.relpath(path, self._path.parent)).as_posix())
        except ValueError:  # on another drive
            return path.as_uri()

    def write(self) -> None:
        """Writes the page, and the table beside it. Raises RunError if that can't be done."""
        from jinja2 import StrictUndefined, Template

        template = Template(GALLERY, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
        page = template.render(globals() | vars(self), gallery=self)
        try:
            self._path.write_text(page, "utf-8", "replace")
            # Without the first bytes of this encoding Excel assumes another one.
            with self.table.open("w", encoding="utf-8-sig", errors="replace", newline="") as file:
                file.write(TABLE_HEAD)
                csv.writer(file).writerows(self._cells())
        except OSError as error:
            path = error.filename or self._path  # a full disk names no file
            raise RunError(f"{path} can't be written: {error.strerror}") from None
        log.info("for a spreadsheet: %s", self.table)
        log.info("look at %s", self._path.as_uri())

    def _cells(self) -> Iterator[list[Any]]:
        for number, card in enumerate(self.groups + self.failed, 1):
            for row in card.rows:
                one = row.picture
                what, group = ("can't be used", None) if row.reason else ("looks the same", number)
                cells = [what, group, one.name, one.client, row.similarity or None, row.copy]
                cells += [row.same_as, row.width, row.height, row.bytes, one.id, one.image]
                cells += [one.link, row.reason, advice_on(row.reason)]
                yield [cell(value) for value in cells]


def card_of(title: str, found: list[Match]) -> Card:
    """A card of pictures that were found."""
    return Card(title, [Row(match.picture, match.similarity) for match in found])


def thumbnail_of(levels: np.ndarray) -> str:
    """A small picture as a data: URL."""
    small = Image.fromarray(levels).resize((THUMBNAIL, THUMBNAIL))
    for quality in (60, 30, 10, 1):
        file = io.BytesIO()
        small.save(file, "WEBP", quality=quality)
        if file.tell() <= THUMBNAIL_BYTES:
            break
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula or finds too long."""
    if not isinstance(value, str):
        return value
    return FORMULA.sub(r"\g<0>'", shorten(value, LONGEST_CELL))


# ========================================================================= Command line

EXAMPLES = """\
examples:
  %(prog)s --local photos --gallery gallery.html
  %(prog)s --client "BigClient" --limit 10
  %(prog)s --local photos --search "red mug" --search mug.jpg

settings come from the environment or .env: see .env.example

exit codes:
  0    all done, or nothing to do
  1    some images failed, or their host did not cope
  2    the run could not start, or could not continue
  130  after Ctrl-C (143 after SIGTERM, 129 after the terminal closed)
"""


def flags_parser() -> argparse.ArgumentParser:
    """Reads the flags. A flag that is not given has the default of Settings. Only --workers has a
    default of its own."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--limit N] [--client NAME] [--local DIR] [...]   -h: all flags",
        description="Give every product image in a Supabase database, or in a folder, "
        "a CLIP embedding. Run again to resume.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    most = min(MOST_WORKERS, WORKERS_PER_CORE * cores())
    workers = f"most downloads from a host ({WORKERS_PER_CORE} a core, {MOST_WORKERS} at most)"
    search = f"only print the {MATCHES} (or --limit N) pictures nearest to this; may be repeated"
    gallery = "at the end, write a page to look at (.html), and a table beside it (.csv)"

    what = parser.add_argument_group("what to embed").add_argument
    what("--limit", type=positive_number, metavar="N", help="try at most N images")
    what("--client", metavar="NAME", help="only this client's (with --local: subfolder's) images")
    what("--local", type=full_path, metavar="DIR", help="embed a folder's images; needs no account")
    what("--shard", type=to_shard, metavar="I/N", help="only part I of N parts of a database")
    what("--retry-failed", action="store_true", help="also try failures that are not due yet")

    speed = parser.add_argument_group("how fast").add_argument
    speed("--workers", type=positive_number, default=most, metavar="N", help=workers)
    speed("--batch-size", type=positive_number, metavar="N", help="images to a core's batch (1)")
    speed("--dtype", choices=["float32", "bfloat16"], help="number format (float32)")
    speed("--device", choices=["cpu", "cuda", "mps"], help="where the model runs (cpu)")

    show = parser.add_argument_group("what to show").add_argument
    show("--search", action="append", type=to_question, metavar="TEXT|FILE|URL", help=search)
    show("--gallery", type=to_gallery, metavar="FILE", help=gallery)
    show("--dry-run", action="store_true", help="say what would be done; load and write nothing")
    show("-v", "--verbose", action="store_true", help="report each failure as it happens, and more")
    show("--version", action="store_true", help="say what a bug report needs, and exit")
    return parser


def read_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given. Exits with code 2 if they are wrong."""
    parser = flags_parser()
    flags = vars(parser.parse_args(argv))
    if "shard" in flags and "gallery" in flags:
        parser.error("--gallery shows a whole catalog: leave --shard out")
    if "shard" in flags and "local" in flags:
        parser.error("--shard is for a database; for a part of a folder use --client SUBFOLDER")
    return flags


def positive_number(text: str) -> int:
    """A flag's number; raises ArgumentTypeError below 1."""
    if not re.fullmatch("0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def to_shard(text: str) -> Shard:
    """Reads "I/N"; raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part like 1/4, 2/4, 3/4 or 4/4")
    return Shard(int(found[1]), int(found[2]))


def full_path(text: str) -> Path:
    """A flag's path, whatever the current folder is later."""
    return Path(text).resolve()


def to_question(text: str) -> str:
    """A question in words, a path or a URL; raises ArgumentTypeError for an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("there is no question")
    return text


def to_gallery(text: str) -> Path:
    """The path of a page. Raises ArgumentTypeError if the page, or the table beside it, can't be
    written, or if the table would overwrite a file that is not ours."""
    gallery = full_path(str(Path(text).parent)) / Path(text).name
    if gallery.suffix != ".html":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .html")
    table = gallery.with_suffix(".csv")
    for path in (gallery, table):
        # A link that somebody else made may lead anywhere. A pipe would wait for a reader.
        strange = is_link(path) or (path.exists() and not path.is_file())
        if strange or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"'{path}' can't be written, or is a link")
    if table.exists():
        with table.open(encoding="utf-8-sig", errors="replace") as lines:
            if not lines.readline(500).startswith("what,group,name,"):
                raise argparse.ArgumentTypeError(
                    f"'{table}' was not made by this script: take another name"
                )
    return gallery


class Setting(NamedTuple):
    """A field of Settings that comes from the environment or .env."""

    field: str
    names: tuple[str, ...]  # the first that has a value counts
    pattern: str  # its group is the value
    advice: str  # the message for a value that does not fit the pattern
    read: Callable[[str], Any] = str


A_PORT = r"(?:\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"  # up to 65535
A_HOST = r"(?!YOUR-PROJECT|supabase\.com/)[\w-]+(?:\.[\w-]+)*"
# https://abcdefghijkl.supabase.co, http://localhost:54321
A_URL = rf"(https?://{A_HOST}(?::{A_PORT})?(?:/[\w.-]+)*?)"
A_KEY = r"(sb_secret_[\w-]+|[\w-]+\.[\w-]+\.[\w-]+)"  # sb_secret_AbC1, eyJh.eyJp.c2ln
A_TEXT = r"([^\x00-\x1f\x7f-\x9f\ud800-\udfff]+)"  # clip-vit-base-patch32
A_NUMBER = r"(\d{1,6}(?:\.\d+)?)"  # 30, 2.5
NOT_A_TEXT = "contains a control character"
NOT_A_NUMBER = "is not a number of seconds"

SETTINGS = (
    Setting(
        "url",
        ("SUPABASE_URL", "NEXT_PUBLIC_SUPABASE_URL"),
        A_URL + "(?:/rest/v1)?/?",
        "is not like https://abcdefghijkl.supabase.co: copy the project's URL from the "
        "dashboard (Connect), not the dashboard's own address, nor the key",
    ),
    Setting(
        "key",
        ("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"),
        A_KEY,
        f"is no secret key, nor a legacy service_role key: {NEW_KEY}",
    ),
    Setting("model_version", ("MODEL_VERSION",), A_TEXT, NOT_A_TEXT),
    Setting("clip_model", ("CLIP_MODEL",), A_TEXT, NOT_A_TEXT),
    Setting("fetch_seconds", ("FETCH_SECONDS",), A_NUMBER, NOT_A_NUMBER, float),
    Setting("db_retry_seconds", ("DB_RETRY_SECONDS",), A_NUMBER, NOT_A_NUMBER, float),
    Setting(
        "private_hosts",
        ("ALLOW_PRIVATE_IMAGE_HOSTS",),
        "([01])",
        "is not 0 or 1",
        lambda text: text == "1",
    ),
    Setting("storage_buckets", ("STORAGE_BUCKETS",), A_TEXT, NOT_A_TEXT),
)


def read_settings(flags: dict[str, Any]) -> Settings:
    """Flags, environment and the nearest .env as Settings; raises RunError that names the setting
    at fault. Nothing of .env enters the environment, which libraries read as well."""
    file = full_path(".env")
    # An app's .env.local is not read. But if the current folder has one, the .env beside the script
    # is not read either: that one is for another project's database.
    if not file.is_file() and not file.with_name(".env.local").is_file():
        file = HERE / ".env"
    try:
        # No ${...} is filled in: in a key it is part of the key.
        in_file = dotenv.dotenv_values(file, encoding="utf-8-sig", interpolate=False)
    except (UnicodeDecodeError, OSError):
        raise RunError(
            f"{file} can't be read: it must be text in UTF-8, and you must be allowed to read it"
        ) from None
    needs_database = "local" not in flags
    values = dict(flags)
    found: dict[str, FoundSetting] = {}
    for setting in SETTINGS:
        of_database = setting.field in ("url", "key")
        if of_database and not needs_database:
            continue
        source = find_setting(setting, file, in_file)
        found[setting.field] = source
        looks_right = re.fullmatch(setting.pattern, source.text, re.ASCII)
        if looks_right:
            values[setting.field] = setting.read(looks_right[1])
        elif source.text:
            raise RunError(f"{source} {setting.advice}")
        elif of_database:
            raise RunError(
                f"{source.name} is not set: put it into {file}, not .env.local (.env.example shows "
                "how), or use --local DIR, which needs no account"
            )
    if needs_database:
        values["key_source"] = str(found["key"])
        if found["url"].origin != found["key"].origin:
            # The environment's key must not go to the URL of a folder's .env in silence.
            log.info("using %s with %s", found["url"], found["key"])
    return Settings(**values)


class FoundSetting(NamedTuple):
    """A setting's name, its text, and where that was read, in words."""

    name: str
    text: str
    origin: str

    def __str__(self) -> str:
        return f"{self.name} (from {self.origin})"


def find_setting(setting: Setting, file: Path, in_file: Mapping[str, str | None]) -> FoundSetting:
    """A setting from the environment, else from .env. Its text is empty if neither has it."""
    for name in setting.names:
        given = os.environ.get(name, "").strip()
        kept = (in_file.get(name) or "").strip()
        if given and kept not in ("", given):
            hidden = f"the environment, which hides the one in {file}"
            return FoundSetting(name, given, hidden)
        if given:
            return FoundSetting(name, given, "the environment")
        if kept:
            return FoundSetting(name, kept, str(file))
    return FoundSetting(setting.names[0], "", "")


def say_version() -> None:
    """Prints the versions, and whether the processor has bfloat16."""
    import torch

    python = sys.version.split()[0]
    print(f"generate_embeddings.py {VERSION}, schema.sql {CONTRACT}, Python {python}")
    print(f"{MODEL_VERSION}: {MODEL_ID} at {MODEL_REVISION}")
    print(f"torch {torch.__version__}, bfloat16: {'yes' if has_bfloat16() else 'no'}")


def say_error(trouble: str) -> None:
    """Says on stderr why the run ended."""
    with contextlib.suppress(OSError):  # nobody may be there to read it
        print(printable(f"error: {trouble}"), file=sys.stderr)


class Lines(logging.Formatter):
    """Log lines without the control characters that ids, URLs and messages may hold."""

    def format(self, record: logging.LogRecord) -> str:
        record.msg = printable(record.getMessage())
        record.args = ()
        lines = super().format(record).split("\n")  # a traceback has several
        return "\n".join(printable(line) for line in lines)


def set_up_output(verbose: bool) -> None:
    """Logs to stderr, with the time unless stderr is a terminal."""
    handler = logging.StreamHandler()
    look = "%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s"
    handler.setFormatter(Lines(look))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings have tracebacks in them
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The terminal's encoding may lack characters of a name.
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, AttributeError):  # as in: ... | head, or >&-
        sys.stdout.flush()
    # A download may hang in its thread, and Python would wait for that.
    os._exit(code)
