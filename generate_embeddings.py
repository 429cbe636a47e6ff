# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "pillow==13.0.0",
#     "requests==2.34.2",
#     "supabase==2.34.1",
#     "python-dotenv==1.2.4",
#     "tqdm==4.70.1",
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

    find pending assets -> fetch -> decode -> embed -> store -> report

main reads flags and settings; embed_all asks the store for its status. --search then answers, with
--gallery on a page, too, and --dry-run lists, and that is all. Else, if anything is pending, the
steps overlap in Run.loop; the first images are fetched while the model is loaded. The report comes
in any case, also after an error; --gallery then, unless the run was stopped or could not go on.

Words
    asset     one product image to embed: an id and where its image is
    pending   without an embedding of this model version; the store says which assets are, and
              leaves out those that failed for good, or too often to be tried again yet
              (--retry-failed takes them in)
    store     where assets and embeddings are: a Supabase database, or a folder
    levels    a uint8 array (224, 224, 3), what CLIP sees of an image
    pixels    the same as float32 (3, 224, 224), normalised: what its image tower takes
    vector    a float32 array (512,) of unit length, what that gives

Sections
    The story        main, embed_all, Report: a run from its start to its printed report
    Words            what the sections hand to each other, errors, the Store protocol, Settings
    The run          Run (one loop), Task, Hosts, Progress, Stop
    Stores           SupabaseStore, FolderStore
    Fetching         Guard, Fetcher, and what a host's answer means
    Pictures         from a file's bytes to levels
    Decoders         the processes that do this, what they may take, what they can reach
    Model            the two towers, their weights and the download
    The page, the question    --gallery and --search
    Command line     flags, settings, what is said on the terminal

Who runs where
    Main thread      the loop of Run, which alone touches the Run and the Report; Store.locate
    Run.background   a pool of threads, a task each: load the model, find a page, store a batch (one
                     at a time), fetch an image or wait for its decoder (as many as --workers, and
                     up to MOST_SLOW more while some are slow)
    Before the run   Store.status, in a thread of its own, as it may hang
    Run.embedders    a pool with one thread a core (one in all on a GPU), a batch each
    Decoders         processes, one a core: a file is not to be trusted, and may crash its decoder
    For moments      a timer for each file being decoded (answer_to), a thread a core while weights
                     are laid out (read_layers)
    --gallery, --search    after the run, or without one: the main thread, and a pool that fetches

Where the answers to other questions stand
    What must be called before what, and what a third store must offer: Store
    What happens to an image that changes meanwhile: Store
    When a run ends early, with which exit code, and what bounds memory: Run
    What a host's answer does: ANSWERS. How to add a setting: Settings

What an upgrade of a package may break, as no documentation promises it
    urllib3     connection._new_conn, pools.pool_classes_by_scheme (pool_classes, Fetcher)
    http.client _MAXHEADERS (Fetcher)
    requests    brings urllib3, certifi and idna, all of which are used here (Fetching)
    torch       torch.ops.mkldnn._linear_pointwise, _reorder_linear_weight (Linear)
    transformers    brings tokenizers, safetensors and filelock, which are used here (Model)
    supabase    brings httpx and postgrest, whose errors are known here (SupabaseStore)
    tqdm        bar.initial, bar.start_t (Progress)
    pillow      TiffImagePlugin.READ_LIBTIFF, a GIF's dispose_extent (Pictures)

Exit codes: 0 all done, 1 some assets failed, 2 could not run, or not go on, 130 interrupted (143 by
SIGTERM, 129 by a closed terminal).
"""

from __future__ import annotations

import os
import signal
import sys

AS_DECODER = "as-decoder"  # the one argument of a Decoder's process, see RUN_DECODER
IN_DECODER = sys.argv == ["-c", AS_DECODER]
for _number in (signal.SIGINT, signal.SIGTERM):
    # A stop while the imports go on ends at once, without a traceback. A decoder ignores it, as
    # the run ends it. Where it is ignored from the start (a background job), it stays so.
    if IN_DECODER:
        signal.signal(_number, signal.SIG_IGN)
    elif __name__ == "__main__" and signal.getsignal(_number) != signal.SIG_IGN:
        signal.signal(_number, lambda number, _: os._exit(128 + number))
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
import html
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
import string
import struct
import subprocess
import textwrap
import threading
import time
import traceback
import unicodedata
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
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

    if not IN_DECODER:  # which has no use for these, and starts in half the time without them
        import http.client
        from email.utils import parsedate_to_datetime
        from urllib.request import DataHandler, Request, getproxies

        import certifi
        import dotenv
        import idna
        import numpy as np
        import requests
        import urllib3
        from requests.exceptions import ChunkedEncodingError
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm
        from urllib3.exceptions import HTTPError, MaxRetryError
        from urllib3.response import BaseHTTPResponse
        from urllib3.util.connection import create_connection
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}: {INSTALL}", file=sys.stderr)
    sys.exit(2)

# torch and supabase are imported where they are used: they take seconds, which a usage error or a
# run with nothing to do need not wait for. transformers is not imported: see "What an upgrade".

log = logging.getLogger("generate_embeddings")

VERSION = "2.0"
MODEL_ID = "openai/clip-vit-base-patch32"
MODEL_REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"  # pinned: vectors must not drift
MODEL_VERSION = "clip-vit-base-patch32"  # what rows carry; another value counts as lacking
CONTRACT = 2  # the version of schema.sql's functions
DIMENSIONS = 512  # of a vector
SIDE = 224  # pixels; CLIP sees a square
HERE = Path(__file__).resolve().parent

# ============================================================================ The story


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    # Python processes of libraries (tqdm starts one on macOS) import nothing from this folder.
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.stderr is None:  # 2>&-
        # The next file that is opened must not get its number.
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
    status = status_in_time(store)
    if settings.search:
        return answer_questions(store, settings, status)
    report = Report(status, settings)
    log.info("%s", report.beginning())
    if settings.dry_run:
        say_what_would_be_done(store, settings, report)
        return 0

    try:
        if report.pending:
            log.info("vectors go to %s", store.place)
            log.info("loading the model")
            stop.listen()
            Run(store, settings, report, stop).loop()
        elif status.assets:
            log.info("nothing to do")
        else:
            log.info("nothing to do: there are no assets yet")
    finally:
        report.print()

    stop.end_at_once()
    if stop.code:
        log.info("stopped: run the same command again to go on")
    elif settings.gallery:
        done = status.done + report.embedded
        write_gallery(store, settings, status._replace(done=done))
    elif settings.local and report.embedded and sys.stderr.isatty():
        log.info("next: --gallery FILE.html shows what looks alike; README.md: with Supabase")
    return report.exit_code


def open_store(settings: Settings, stop: Stop) -> Store:
    """Where this run's assets and embeddings are."""
    if settings.local:
        return FolderStore(settings)
    check_proxies("socks", "socksio")
    return SupabaseStore(settings, stop)


def status_in_time(store: Store) -> Status:
    """The store's status; raises RunError where it does not come, as a database may drip."""
    try:
        return ThreadPoolExecutor(1).submit(store.status).result(store.patience)
    except TimeoutError:
        raise silence_of(store) from None


def silence_of(store: Store) -> RunError:
    """What to say of a call that took too long."""
    return RunError(f"{SILENCE} for {store.patience:.0f} s: {CHECK_URL}")


def say_what_would_be_done(store: Store, settings: Settings, report: Report) -> None:
    """Prints what --dry-run is asked for, with the first few assets."""
    goal = report.pending
    if settings.limit:
        goal = min(goal, settings.limit)
    print(f"Would embed {counted(goal, 'asset')} as {settings.model_version}")
    first_page = next((page for page in store.pages() if page), [])
    for asset in first_page[: min(5, goal)]:
        print(printable(f"  {asset}"))


class Report:
    """The counts of a run. An asset was attempted once the store took or refused its result.

    Always: attempted == embedded + failed.
    """

    MOST_REASONS = 50  # lines; a catalog may have a reason for each image
    MOST_EXAMPLES = 3  # assets to a reason

    def __init__(self, status: Status, settings: Settings) -> None:
        self.status = status  # as the run found it
        self.waiting = 0  # failed before, and not tried by this run
        if not settings.retry_failed:
            self.waiting = status.waiting
        self.pending = status.assets - status.done - self.waiting  # to be tried now
        self.found = 0  # pending assets that came by
        self.found_all = False
        self.embedded = 0  # and stored
        self.not_taken = 0  # by the store: changed or gone meanwhile
        self.reasons: Counter[str] = Counter()  # of what failed
        self.examples: dict[str, list[Asset]] = {}  # by reason
        self.left_of: dict[str, int] = {}  # assets that were not tried for a host's sake, by why
        self.started = time.monotonic()

    @property
    def failed(self) -> int:
        return self.reasons.total()

    @property
    def attempted(self) -> int:
        return self.embedded + self.failed

    @property
    def left(self) -> int:
        """Assets that were to be tried, and were not, or came to nothing."""
        known = self.found
        if not self.found_all:
            known = max(self.pending, self.found)
        return known - self.attempted

    @property
    def exit_code(self) -> int:
        """Of a run that came to its end."""
        return 1 if self.failed or self.left_of else 0

    def count(self, result: Result, taken: bool) -> None:
        """Takes what became of a result in the store."""
        if not taken:
            self.not_taken += 1
        elif isinstance(result, Embedded):
            self.embedded += 1
        else:
            reason = str(result)
            self.reasons[reason] += 1
            examples = self.examples.setdefault(reason, [])
            if len(examples) < self.MOST_EXAMPLES:
                examples.append(result.asset)

    def beginning(self) -> str:
        """What is said before the run."""
        status = self.status
        parts = []
        if status.done:
            parts.append(f"{status.done:,} done")
        if self.waiting:
            parts.append(f"{self.waiting:,} failed before, tried again {from_when(status)}")
        parts.append(f"{self.pending:,} to do")
        again = status.failed - self.waiting
        if again:
            parts.append(f"of which {again:,} failed before")
        return f"{counted(status.assets, 'asset')}: {', '.join(parts)}"

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
            what_to_do = advice(reason.partition(": ")[2])
            if what_to_do:
                yield f"          {what_to_do}"
            for asset in self.examples[reason]:
                yield f"          {asset}"
        if self.waiting:
            when = f"tried again {from_when(self.status)}; --retry-failed: now"
            yield f"Waiting  {self.waiting:>9,}  failed before, {when}"
        yield f"Left     {self.left:>9,}"
        for why, count in self.left_of.items():
            yield f"  {count:>6,}  {why}"
        if self.not_taken:
            yield f"  {self.not_taken:>6,}  changed or gone meanwhile"
        if len(self.reasons) == 1 and self.failed == self.attempted > 1:
            (reason,) = self.reasons
            yield f"All {self.failed:,} that were tried failed for the same reason: {reason}"
        yield f"Elapsed  {seconds:>8.1f}s"
        yield (
            f"embedded={self.embedded} failed={self.failed} left={self.left} "
            f"attempted={self.attempted} waiting={self.waiting} seconds={seconds:.1f}"
        )


def from_when(status: Status) -> str:
    """As in: from 14:00 on."""
    if status.next_attempt is None:
        return "later"
    when = status.next_attempt.astimezone()
    if when - datetime.now(UTC) < timedelta(hours=20):
        return f"from {when:%H:%M} on"
    return f"from {when.day} {when:%B} on"


# ================================================================================ Words


class RunError(Exception):
    """The run can't start or go on; the message is one line that says what to do."""


class ImageError(Exception):
    """An image can't be used; the message is a reason of the table below."""


class Strain(ImageError):  # noqa: N818 - a host's, and no defect
    """A host did not cope: it is busy, silent, or lost the connection."""

    def __init__(self, reason: str, rest: float = 0.0, first_byte: float | None = None) -> None:
        super().__init__(reason)
        self.rest = rest  # seconds that the host asked for (Retry-After)
        self.first_byte = first_byte  # when it came, where the rest of a body came too slowly


# Reasons: each stands here once, with what its reader can do about it. A reason that is reported
# may have a detail in parentheses behind its name. The page shows the advice to a shop's owner.

ADVICE: dict[str, str] = {}


def reason(name: str, advice: str) -> str:
    """Enters a reason into the table; returns its name."""
    ADVICE[name] = advice
    return name


def advice(reason: str) -> str:
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

NO_IMAGE = reason("no image URL", "Give the product an image.")
NO_URL = reason("no full URL", "Ask your developer to make a full URL of it.")
MANY_URLS = reason("a list or JSON, not one URL", "Ask your developer to take the first of them.")
NOT_A_URL = reason("not a valid URL", _CORRECT)
OTHER_SCHEME = reason("only http, https and data URLs are fetched", _CORRECT)
BAD_STORAGE_PATH = reason("a storage path with '..' or '\\' in it", _CORRECT)
PRIVATE_BUCKET = reason(
    "a private bucket, or none of that name",
    "Ask your developer to make the bucket public, or to name it in STORAGE_BUCKETS.",
)
PRIVATE_ADDRESS = reason(
    "a private address",
    "Ask your developer: ALLOW_PRIVATE_IMAGE_HOSTS=1 allows pictures of your own network.",
)
BROKEN_DATA_URL = reason("a broken data: URL", _AS_FILE)
LONG_DATA_URL = reason("a data: URL that is too long", _AS_FILE)
UNREADABLE = reason("can't be read", "See whether the file is there, and yours to read.")
TOO_LARGE = reason("a file that is too large", _SMALLER)
NO_HOST = reason("host not found", "No host has this name: correct the address.")
NO_NAME_SERVER = reason(
    "no name server answered",
    "This machine's network is away, or the host's domain has trouble. Later runs try again.",
)
CERTIFICATE = reason(
    "the host's certificate is not valid",
    "It has expired, is another host's, or is not complete: tell whoever runs the host.",
)
NO_TLS = reason("TLS failed", _LATER)
NO_ANSWER = reason("no answer in time", _LATER)
TOO_LATE = reason("not complete in time", _LATER)
REFUSED = reason("connection refused", _LATER)
UNREACHABLE = reason("host not reachable", _LATER)
LOST = reason("connection lost", _LATER)
BAD_COMPRESSION = reason("an unknown or broken compression", _LATER)
BAD_HEADERS = reason("an answer with too many headers", _LATER)
PART_OF_IMAGE = reason("a part of the image alone", _LATER)
BAD_REDIRECT = reason("a redirect that leads nowhere", _CORRECT)
HTTP = {
    status: reason(f"HTTP {status}", words)
    for statuses, words in (
        (range(400, 500), "The host does not give us the image: see whether the address is right."),
        (range(500, 600), _LATER),
        ((401, 402, 403, 451), _CLOSED),
        ((404, 410), "Nothing is at this address: correct it, or upload the image again."),
        ((407,), "Ask your developer: the proxy wants a name and a password."),
        ((408, 423, 425), _LATER),
        ((420, 429, 430), _BUSY),
    )
    for status in statuses
}

EMPTY = reason("an empty file", _DAMAGED)
WEB_PAGE = reason(
    "a web page, not an image",
    "The address is wrong, or the host asks for a login, or checks for robots: open it in a "
    "browser, and take the address of the image itself.",
)
SVG = reason("an SVG drawing, which has no pixels", _OTHER_FORMAT)
JSON = reason("JSON, not an image", _OTHER_FORMAT)
PDF = reason("a PDF, not an image", _OTHER_FORMAT)
HEIC = reason("HEIC", "Ask for it as JPEG, or ask your developer to install pillow-heif.")
OTHER_FORMAT = reason("not an image in a known format", _OTHER_FORMAT)
RARE_FORMAT = reason("an image of a rare kind", "Save it as an ordinary JPEG or PNG of 8 bits.")
BROKEN = reason("broken or truncated image file", _DAMAGED)
TOO_SMALL = reason("too few pixels", "Ask for a larger image.")
TOO_MUCH = reason("needs too much memory to decode", _SMALLER)
TOO_SLOW = reason("takes too long to decode", _SMALLER)
DECODER_LOST = reason(
    "its decoder was killed, or hung", "Ask your developer to see whether memory is short."
)
DEFECT = reason("an unexpected error", "Ask your developer: it is a defect of the program.")
NOT_FINITE = reason("the model gave numbers that are not finite", "Ask your developer.")


Id = str | int  # uuid and text come as str


class Asset(NamedTuple):
    """One image to embed: the store's id of it, and a URL or a path."""

    id: Id
    image: str
    image_hash: int = 0  # the store's: of the URL, or of a file's state
    size: int = 0  # bytes of the text `image`, which comes cut where it is too long

    def __str__(self) -> str:
        if self.id == self.image:
            return self.image
        return f"{self.id}  {shorten(self.image)}"


class Source(NamedTuple):
    """Where an image's file is, and the headers to send there."""

    where: str | Path  # a URL, or a file
    headers: Mapping[str, str]

    @property
    def host(self) -> str:
        """The image host; empty for files and data: URLs."""
        if isinstance(self.where, Path):
            return ""
        with contextlib.suppress(ValueError):
            return urlsplit(self.where[:2000]).netloc.rpartition("@")[2]
        return ""


class Loaded(NamedTuple):
    """An asset with its pixels, float32 (3, 224, 224)."""

    asset: Asset
    pixels: np.ndarray


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
    failed: int  # in an earlier run, and not embedded since; of these
    waiting: int = 0  # are not to be tried again yet,
    next_attempt: datetime | None = None  # and the first of them is at this time


# What a store tells the page, and a question


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
    """A picture that was found, with its cosine to what was looked for."""

    picture: Picture
    similarity: float


@dataclass(frozen=True)
class Sample:
    """A picture with those nearest to it."""

    picture: Picture
    nearest: list[Match]


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
    same: bool  # their vectors are equal


@dataclass(frozen=True)
class Catalog:
    """What a store tells the page."""

    pairs: list[Pair]
    embedded: int  # pictures, of which
    sought_among: int  # so many were looked through for copies,
    compared: int  # and so many were compared with all others
    samples: list[Sample]
    typical: float | None  # the median cosine of the samples, which have little in common
    failures: list[FailedPicture]


class Store(Protocol):
    """Where assets and embeddings are, and what a run asks and tells there.

    A third kind of store is a class with what stands here, a line in `open_store`, a flag or a
    setting that chooses it, and a look at each `settings.local` and at `read_settings`, which wants
    Supabase's settings for every store but a folder. It heeds client, shard, model_version,
    retry_failed and dry_run of the Settings by itself.

    Order of calls: `status` first, then `pages`, once; `save`, one call at a time, perhaps while
    `pages` is at work in another thread; `locate` for each image, in the loop, so that it must not
    wait, and for --gallery in several threads; `catalog` and `search` after a run, or without one.
    A page may be empty; each call, and each page, may come in another thread. All may raise
    RunError, which ends the run.

    An image may change between `pages` and `save`. Therefore an asset comes back with the
    `image_hash` that the store gave it. SupabaseStore compares URLs: it does not take a result for
    another URL, and the asset is left for the next run; nobody notices other bytes behind the same
    URL. FolderStore stores the result under the old hash: the next run sees another one, and
    embeds the image once more.
    """

    place: str  # in words, for the log
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

    def catalog(self) -> Catalog:
        """What the page shows; raises RunError."""

    def search(self, vector: np.ndarray, wanted: int) -> list[Match]:
        """The pictures whose vectors are nearest to one (512,), nearest first."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on: the flags of the command line, then the settings that come from the
    environment or .env. (Proxies, certificates, the hub's variables and OMP_NUM_THREADS are read
    where they are used, as the libraries do.)

    To add one: a field with its default here; for a flag a line in `parser`, under the field's
    name and without a default; for a variable an entry in SETTINGS, which says how it must look,
    and its name in EXAMPLES; then `settings.<field>` where it is used (Run, the stores, Fetcher,
    the encoders and Page have the Settings; decoders and the download do not); a line in
    README.md and .env.example.
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
    key_source: str = ""  # the setting that the key is of, and where that was read


class Shard(NamedTuple):
    """One of several parts of a catalog, counted from 1."""

    part: int
    parts: int


def printable(text: str) -> str:
    """Text from outside on its way to the screen: one line, no escape codes."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shorten(text: str, width: int = 60) -> str:
    """The text in at most `width` characters, its middle left out."""
    if len(text) <= width:
        return text
    half = width // 2 - 2
    return f"{text[:half]}...{text[-half:]}"


def plural(count: int, noun: str) -> str:
    """The noun as it follows that number."""
    return noun if count == 1 else f"{noun}s"


def counted(count: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{count:,} {plural(count, noun)}"


# ============================================================================== The run

# A core embeds 10 (float32) to 40 images/s, more in batches; a host 300 ms away gives a worker 3
WORKERS_PER_CORE = 8
MOST_WORKERS = 64  # more at once few image hosts like
SLOW_SECONDS = 4.0  # a download that takes longer makes room for another
MOST_SLOW = 64  # downloads that do
HOST_FAILURES = 20  # in a row, none an image's own: the host counts as down,
SILENT_SECONDS = 20.0  # unless it answered within these: Wi-Fi may be away for some
HOSTS_DOWN = 3  # one after the other, with no answer between: the network is gone

PAGE_ROWS = 250  # assets to a page
WRITE_ROWS = 50  # results to a call: at a million rows far below the timeout of 8 s
WRITE_SECONDS = 2.0  # a result waits no longer, but for the batch before its own
RESULTS_WAITING = 20_000  # 50 MB; more than a run embeds while it waits for a database
POLL_SECONDS = 0.2  # how soon Ctrl-C is noticed
ECHO_SECONDS = 0.5  # signals that are this close count as one: timeout(1) sends each of its twice
BACKGROUND_THREADS = 9999  # without end: a download that hangs keeps its thread


@dataclass(eq=False)
class Task:
    """Work under way in a pool, and what the loop does with what comes of it.

    `take` gets what the work returned, `fail` the exception that it raised, both in the loop's
    thread. A task that takes longer than `patience` seconds is given up: `fail` gets `late`, and
    whatever the work returns later is dropped.
    """

    step: str  # model, find, fetch, decode, embed or store
    take: Callable[[Any], None]
    fail: Callable[[Exception], None]
    images: int = 1  # that it is about
    patience: float = math.inf
    late: Exception | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.since


class Run:
    """Find, fetch, decode, embed and store: steps in the background, and one loop in this thread
    that takes what they give and starts what is next.

    What is done first goes on first, so that a slow host delays its own images alone. On CPUs each
    core embeds a batch of its own in one thread: threads that share an image wait for each other
    at every layer.

    A run ends early, and what is embedded by then is stored (if the store still takes it) and
    reported, when
        somebody stops it (Stop): exit code 130, 143 or 129, whatever else went wrong;
        any step raises RunError, or find, embed, store or the model anything else (in fetch and
            decode anything else is that asset's failure): exit code 2;
        HOSTS_DOWN hosts went down one after the other, with no answer between: exit code 2;
        the store refused REFUSALS vectors for one reason, and has taken none: exit code 2.
    At its end the code is 2 if a host went down and none ever answered (Hosts), else 1 if images
    failed, else 0, even where some are left.

    What bounds memory, beside the model's 350 MB (float32)
        found       PAGE_ROWS assets, and a page more
        files       one for each load under way (`room_for_loads`), MAX_BYTES at most; HEAVY_FILES
                    bounds how many large ones are on their way, not how many wait for a decoder
        decoders    one a core, DECODE_MB each (Linux)
        pixels      600 KB an image; no more wait than `room_for_loads` says
        results     2 KB each; no more images are loaded while RESULTS_WAITING wait for the store
    Not bounded: a folder's list of files, and the Report's reasons.
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
        self.hosts = Hosts()
        self.progress = Progress(min(report.pending, self.limit))
        self.found: deque[Asset] = deque()  # to be loaded
        self.ready: list[Loaded] = []  # to be embedded
        self.results: list[Result] = []  # to be stored
        self.store_by = 0.0  # by then a batch is started, full or not; at first: at once
        self.line_is_slow = False  # the last image that came was slow
        self.trouble: Exception | None = None  # what ends the run
        self.storing = True  # until the store gives up
        self.tasks: dict[Future[Any], Task] = {}
        self.finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self.embedders = ThreadPoolExecutor(self.lanes)
        self.background = ThreadPoolExecutor(BACKGROUND_THREADS)

    def loop(self) -> None:
        """Returns when there is no more to do; raises what ended the run before that."""
        self.start(Task("model", self.take_model, self.end), ClipEncoder, self.settings)
        with self.progress:
            while True:
                if not self.ending:
                    self.start_loads()
                    self.start_find()
                    self.start_embeds()
                self.start_store()
                if not self.under_way(*self.awaited):
                    break
                self.take_what_finished()
                self.give_up_what_hangs()
        if not self.trouble and self.hosts.network_is_gone:
            self.trouble = self.hosts.explain()
        if self.trouble:
            raise self.trouble

    @property
    def ending(self) -> bool:
        """Whether nothing new is begun: what is embedded is stored, then the run ends."""
        return bool(self.trouble or self.stop.code or self.hosts.several_in_a_row)

    @property
    def awaited(self) -> tuple[str, ...]:
        """The steps that the run waits for before it ends."""
        if self.ending:
            return ("embed", "store")
        return ("model", "find", "fetch", "decode", "embed", "store")

    # Tasks, in general

    def start(self, task: Task, work: Callable[..., Any], *arguments: Any) -> None:
        pool = self.embedders if task.step == "embed" else self.background
        future = pool.submit(work, *arguments)
        self.tasks[future] = task
        future.add_done_callback(self.finished.put)

    def under_way(self, *steps: str) -> list[Task]:
        return [task for task in self.tasks.values() if task.step in steps]

    def take_what_finished(self) -> None:
        """Waits a moment for a task to finish, and takes what it gave."""
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
        """For what no deadline further down covers: headers that drip, a dead file system."""
        for future, task in list(self.tasks.items()):
            if task.late and task.age > task.patience:
                del self.tasks[future]
                task.fail(task.late)

    def end(self, error: Exception) -> None:
        """Ends the run; the first error is the one that it ends with."""
        self.trouble = self.trouble or error

    # The model, and what is pending

    def take_model(self, encoder: ClipEncoder) -> None:
        self.encoder = encoder
        self.progress.restart_clock()

    def start_find(self) -> None:
        if self.report.found_all or self.report.found >= self.limit:
            return
        if len(self.found) >= PAGE_ROWS or self.under_way("find"):
            return
        task = Task("find", self.take_page, self.end, patience=self.store.patience)
        task.late = silence_of(self.store)
        self.start(task, next, self.pages, None)

    def take_page(self, page: list[Asset] | None) -> None:
        if page is None:
            self.report.found_all = True
            return
        wanted = page[: self.limit - self.report.found]
        self.found += wanted
        self.report.found += len(wanted)

    # Fetch, then decode

    def start_loads(self) -> None:
        room = self.room_for_loads()
        while self.found and room > 0:
            if self.start_fetch(self.found.popleft()):
                room -= 1

    def room_for_loads(self) -> int:
        """How many more images may be fetched now.

        At most --workers images are fetched or decoded at once. Fetches older than SLOW_SECONDS
        do not count (MOST_SLOW at most), unless the last image that came was slow, too: then the
        network is, and more fetches would not help. Fewer start while images wait for the model,
        and none while RESULTS_WAITING or more wait for the store: that bounds memory.
        """
        if len(self.results) >= RESULTS_WAITING:
            return 0
        loads = self.under_way("fetch", "decode")
        waiting = len(self.ready) + sum(task.images for task in self.under_way("embed"))
        most_waiting = 2 * (self.settings.workers + self.lanes * self.settings.batch_size)
        room = min(self.settings.workers, most_waiting - waiting)
        if not self.line_is_slow:
            fetches = self.under_way("fetch")
            slow = [task for task in fetches if task.age > SLOW_SECONDS]
            room += min(len(slow), MOST_SLOW)
        return room - len(loads)

    def start_fetch(self, asset: Asset) -> bool:
        """False where there is nothing to fetch, or the host is down."""
        try:
            place = self.store.locate(asset)
        except Exception as error:
            self.take_failure(asset, "fetch", "", error)  # which no host has said
            return False
        if self.hosts.is_down(place.host):
            why = f"of {place.host}, which failed {HOST_FAILURES} times in a row"
            self.report.left_of[why] = self.report.left_of.get(why, 0) + 1
            return False
        seconds = self.settings.fetch_seconds
        task = Task(
            "fetch",
            partial(self.take_bytes, asset, place.host),
            partial(self.take_failure, asset, "fetch", place.host),
        )
        task.patience = seconds + 1
        task.late = ImageError(not_in_time(seconds))
        self.start(task, self.loader.fetch, place)
        return True

    def take_bytes(self, asset: Asset, host: str, fetched: Download) -> None:
        self.line_is_slow = fetched.seconds > SLOW_SECONDS
        self.hosts.answered(host)
        failed = partial(self.take_failure, asset, "decode", "")
        self.start(Task("decode", self.take_loaded, failed), self.loader.load, asset, fetched.data)

    def take_loaded(self, loaded: Loaded) -> None:
        self.ready.append(loaded)

    def take_failure(self, asset: Asset, stage: str, host: str, error: Exception) -> None:
        """Makes an error the asset's failure, and tells Hosts; RunError ends the run instead. Only
        ImageError is for good: what nobody foresaw is our defect, not the image's."""
        if isinstance(error, RunError):
            self.end(error)
            return
        reason = str(error)
        if not isinstance(error, ImageError):
            log.debug("%s", asset, exc_info=error)
            reason = f"unexpected {type(error).__name__}"
        failed = Failed(asset, stage, reason)
        self.take_result(failed)
        if not isinstance(error, Strain):
            self.hosts.answered(host)
        elif self.hosts.failed(host, silent=True):
            left = "its other images are left for the next run"
            log.warning("%s: %s; %s", host, failed, left)

    # Embed

    def start_embeds(self) -> None:
        """Gives each lane a batch, and one to follow it. A batch that is not full is started only
        while no other is under way, or of the run's last images, which the lanes share."""
        size = self.settings.batch_size
        if not self.found and not self.under_way("find", "fetch", "decode"):
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
            task = Task("embed", self.take_results, self.end, images=len(batch))
            self.start(task, self.encoder.embed, batch)

    def take_results(self, results: list[Result]) -> None:
        for result in results:
            self.take_result(result)

    def take_result(self, result: Result) -> None:
        self.results.append(result)
        failed = isinstance(result, Failed)
        if failed:
            log.debug("%s: %s", result.asset, result)
        self.progress.step(failed)

    # Store

    def start_store(self) -> None:
        """Stores a batch, one at a time: a full one, or what waited long enough, or the last."""
        if not self.results or not self.storing or self.under_way("store"):
            return
        full = len(self.results) >= WRITE_ROWS
        late = time.monotonic() > self.store_by
        last = not self.under_way(*self.awaited)
        if not (full or late or last):
            return
        batch = self.results[:WRITE_ROWS]
        self.results = self.results[WRITE_ROWS:]
        self.store_by = time.monotonic() + WRITE_SECONDS
        task = Task("store", partial(self.take_stored, batch), self.end_storing)
        task.patience = self.store.patience
        task.late = silence_of(self.store)
        self.start(task, self.store.save, batch)

    def take_stored(self, batch: list[Result], taken: set[Id]) -> None:
        for result in batch:
            self.report.count(result, result.asset.id in taken)

    def end_storing(self, error: Exception) -> None:
        """What was not stored is counted as left."""
        self.storing = False
        self.end(error)


class Hosts:
    """Which image hosts are down, and whether the network is.

    A host is down once HOST_FAILURES of its images in a row failed for now: its other images are
    left for the next run. An image's own failure (404, a broken file) is an answer of the host,
    and ends such a row. A host that answered a moment ago, and now not at all, has SILENT_SECONDS
    to come back: this machine's network may be away, and all images on one host.

    The network is gone, which is no image's failure and ends a run with exit code 2, when
    HOSTS_DOWN hosts went down one after the other without an answer of any host between, or when
    a host went down in a run to which no host ever gave an answer.
    """

    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()  # in a row, by host
        self._last_answer: dict[str, float] = {}  # when, by host
        self._down: set[str] = set()
        self._down_in_a_row = 0  # hosts
        self._any_answered = False
        self._last_down = ""

    def answered(self, host: str) -> None:
        """A host sent an image, or said that there is none. Files have no host."""
        if host:
            self._failures[host] = 0
            self._last_answer[host] = time.monotonic()
            self._down.discard(host)
            self._down_in_a_row = 0
            self._any_answered = True

    def failed(self, host: str, silent: bool) -> bool:
        """A host failed to send an image; silent: it said nothing at all. True when it counts as
        down from now on."""
        if not host or host in self._down:
            return False
        self._failures[host] += 1
        if self._failures[host] < HOST_FAILURES:
            return False
        last_answer = self._last_answer.get(host, -math.inf)
        if silent and time.monotonic() - last_answer < SILENT_SECONDS:
            return False
        self._down.add(host)
        self._down_in_a_row += 1
        self._last_down = host
        return True

    def is_down(self, host: str) -> bool:
        return host in self._down

    @property
    def several_in_a_row(self) -> bool:
        return self._down_in_a_row >= HOSTS_DOWN

    @property
    def network_is_gone(self) -> bool:
        if self.several_in_a_row:
            return True
        return bool(self._last_down) and not self._any_answered

    def explain(self) -> RunError:
        """What to say where the network is gone."""
        return RunError(
            f"no image came since {self._last_down} failed {HOST_FAILURES} times in a row: check "
            "this machine's network and that host, then run again"
        )


class Progress:
    """How far the run is: a bar on a terminal, lines in a log elsewhere."""

    EACH = 10  # a line of a log after so many of the first
    EACH_UNTIL = 100  # images
    LINE_SECONDS = 10.0  # and whenever the last line is this old

    def __init__(self, goal: int) -> None:
        self.terminal = sys.stderr.isatty()
        self._failed = 0  # stored or not
        self._line_due = math.inf
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            look: dict[str, Any] = {"ncols": width}
        else:
            # Never drawn, by this delay; str() makes the lines for the log of it.
            line = "{n_fmt}/{total_fmt} done{postfix}, {rate_noinv_fmt}, {remaining} left"
            look = {"file": io.StringIO(), "delay": math.inf, "bar_format": line}
        self._bar = tqdm(total=goal, unit=" images", leave=False, smoothing=0, **look)
        self._log_above_bar = logging_redirect_tqdm()

    def __enter__(self) -> Progress:
        self._log_above_bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
        self._log_above_bar.__exit__(*error)

    def restart_clock(self) -> None:
        """The rate is that without the loading of the model."""
        self._bar.initial = self._bar.n
        self._bar.start_t = time.time()

    def step(self, failed: bool) -> None:
        """One more image is done."""
        if failed:
            self._failed += 1
        self._bar.set_postfix(failed=self._failed, refresh=False)
        self._bar.update()
        if not self.terminal:
            self._log_now_and_then()

    def _log_now_and_then(self) -> None:
        now = time.monotonic()
        done = self._bar.n
        first_ones = done <= self.EACH_UNTIL and done % self.EACH == 0
        if first_ones or now >= self._line_due:
            log.info("%s", self._bar)
            self._line_due = now + self.LINE_SECONDS


class Stop:
    """Set by the first Ctrl-C, SIGTERM or SIGHUP; one after ECHO_SECONDS ends the process."""

    code = 0  # the exit code, once set; no threading.Event: handlers must not wait for locks
    _since = 0.0

    def listen(self) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP, nohup ignores it
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _: object) -> None:
        now = time.monotonic()
        if not self.code:
            self.code = 128 + number
            self._since = now
            # Not by print, as the handler may have interrupted one. Ctrl-C may have ended the
            # reader of a pipe, too.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping: storing what is embedded; Ctrl-C again ends at once\n")
        elif now - self._since > ECHO_SECONDS:
            os._exit(self.code)

    def end_at_once(self) -> None:
        """After the run: there is nothing left to store, so a stop need not wait for anything."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) == self._handle:
                signal.signal(number, lambda number, _: os._exit(128 + number))


# =============================================================================== Stores

ANSWER_SECONDS = 58.0  # of the database, for a question: Supabase's API ends it after 60
CONNECT_SECONDS = 10.0  # to the database
CHECK_SECONDS = 5.0  # patience with the database before the run, when the URL may be wrong
STOP_SECONDS = 10.0  # patience with it after Ctrl-C

SILENCE = "no answer from the database"
CHECK_URL = "check SUPABASE_URL and the project's status, then run again"
RUN_SQL = "run this version's schema.sql in Supabase's SQL editor, then this script again"
NEW_KEY = "copy a secret key (sb_secret_...) from the dashboard, Settings > API Keys"

# Codes of PostgREST, of PostgreSQL, and a gateway's HTTP status, by what they mean
PASSING = re.compile(r"5\d\d|408|425|429|PGRST00\d|(08|40|53|57)...|55P03|XX000")
LACKING = ("PGRST202", "42883", "42P01", "42703")  # a function, table or column is not there
BAD_KEY = ("401", "403", "PGRST301", "PGRST302", "PGRST303")
NO_GRANT = "42501"
NOT_EXPOSED = "PGRST106"
TOO_LONG = "57014"  # over the statement_timeout; passing, but for
SEARCHES = ("embedding_search", "embedding_gallery", "embedding_pairs")  # these: they need an index


class SupabaseStore:
    """Assets and embeddings in Supabase, by the functions of schema.sql alone.

    Safe to use from several threads. Raises RunError for what stops a run: the key, the schema,
    a database that is away for longer than DB_RETRY_SECONDS.
    """

    def __init__(self, settings: Settings, stop: Stop) -> None:
        import httpx
        import supabase

        self._settings = settings
        self._stop = stop
        self._seconds = CHECK_SECONDS  # patience; until it has answered once
        self.place = f"product_embeddings at {settings.url}"
        answer_seconds = min(ANSWER_SECONDS, max(CHECK_SECONDS, settings.db_retry_seconds))
        self.patience = settings.db_retry_seconds + answer_seconds  # all attempts at a call
        # The HTTP status of this thread's last answer, and where that leads: an APIError of a
        # gateway's JSON lacks them.
        self._http = threading.local()
        http = httpx.Client(
            timeout=httpx.Timeout(answer_seconds, connect=CONNECT_SECONDS),
            verify=tls_context(),
            follow_redirects=False,  # one would carry the key to another origin
            event_hooks={"response": [self._keep_what_errors_lack]},
        )
        options = supabase.ClientOptions(httpx_client=http)
        self._rpc = supabase.create_client(settings.url, settings.key, options).rpc
        buckets = {name.strip() for name in settings.storage_buckets.split(",")}
        self._readable_buckets = buckets - {""}
        self._catalog = {"model_version": settings.model_version, "client": settings.client}
        self._part: dict[str, Any] = {}
        if settings.shard:
            self._part = {"shard": settings.shard.part, "shards": settings.shard.parts}

    def _keep_what_errors_lack(self, response: Any) -> None:
        self._http.status = response.status_code
        self._http.leads_to = response.headers.get("location", "")

    def status(self) -> Status:
        """As Store says. Checks that schema.sql is of this version, and that the client is
        there."""
        status: Status = self._call(
            "embedding_status", self._read_status, **self._catalog, **self._part
        )
        self._seconds = self._settings.db_retry_seconds
        return status

    def _read_status(self, answer: Any) -> Status:
        if answer["contract"] != CONTRACT:
            raise RunError(f"the database's functions are of another version: {RUN_SQL}")
        if answer["clients"] is not None:
            client = str(self._settings.client)
            others = [str(name) for name in answer["clients"]]
            near = difflib.get_close_matches(client, others, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "check the spelling"
            raise RunError(f"no asset is of client {client!r}: {hint}")
        self._run_began = answer["time"]  # by the database's clock
        return Status(
            assets=answer["assets"],
            done=answer["done"],
            failed=answer["failed"],
            waiting=answer["waiting"],
            next_attempt=answer["next_attempt"] and datetime.fromisoformat(answer["next_attempt"]),
        )

    def pages(self) -> Iterator[list[Asset]]:
        """As Store says, in the order of the ids."""
        wanted = min(self._settings.limit or PAGE_ROWS, PAGE_ROWS)
        new = self._catalog | self._part | {"wanted": wanted}
        yield from self._walk(new)
        failed = {"failed_before": self._run_began, "waiting_too": self._settings.retry_failed}
        yield from self._walk(new | failed)

    def _walk(self, which: dict[str, Any]) -> Iterator[list[Asset]]:
        """Pages by keyset: each begins after the last id of the one before."""
        last: Id | None = None
        while True:
            page, last = self._call("pending_assets", self._read_page, after=last, **which)
            yield page
            if last is None:
                return

    def _read_page(self, answer: Any) -> tuple[list[Asset], Id | None]:
        page = [
            Asset(row["id"], row["image"] or "", image_hash=row["image_hash"], size=row["bytes"])
            for row in answer["assets"]
        ]
        return page, answer["last"]

    def locate(self, asset: Asset) -> Source:
        """As Store says. The key goes to the project's own Storage only, and there to the
        buckets of STORAGE_BUCKETS: whoever may type an image's URL must not read all others."""
        image = asset.image.strip()
        if len(asset.image) < asset.size // 4:  # a character has at most 4 bytes: it was cut
            megabytes = asset.size // 2**20
            raise ImageError(f"a data: URL of {megabytes} MB, which belongs into a file")
        if not image:
            raise ImageError("no image URL")
        if image.startswith("//"):
            image = f"https:{image}"
        if image.startswith(STORAGE):
            image = self._settings.url + image
        own_storage = self._settings.url + STORAGE
        if not image.startswith(own_storage):
            return Source(image, {})
        return self._locate_in_storage(image, image.removeprefix(own_storage))

    def _locate_in_storage(self, image: str, path: str) -> Source:
        access, _, object_path = path.partition("/")
        if access == "sign":  # it carries a token of its own
            return Source(image, {})
        if access not in ("public", "authenticated"):
            access = ""
            object_path = path
        # What becomes a slash, or vanishes, on its way to the host (parse_url) must not hide one.
        if ".." in unquote(object_path).split("/") or re.search(r"[\\\t\r\n]", path):
            raise ImageError("a storage path with '..' or '\\' in it")
        bucket = unquote(object_path.partition("/")[0])
        if bucket in self._readable_buckets:
            key = self._settings.key
            headers = {"apikey": key, "Authorization": f"Bearer {key}"}
            return Source(f"{self._settings.url}{STORAGE}authenticated/{object_path}", headers)
        if access == "public":
            return Source(image, {})
        raise ImageError(f"in a private bucket: STORAGE_BUCKETS={bucket} lets this script read it")

    def save(self, results: list[Result]) -> set[Id]:
        """As Store says."""
        vectors = []
        failures = []
        for result in results:
            row = {"asset_id": result.asset.id, "image_hash": result.asset.image_hash}
            if isinstance(result, Embedded):
                vectors.append(row | {"embedding": vector_text(result.vector)})
            else:
                failures.append(row | {"stage": result.stage, "reason": result.reason})
        taken: set[Id] = self._call(
            "store_embeddings",
            set,
            model_version=self._settings.model_version,
            vectors=vectors,
            failures=failures,
        )
        return taken

    def catalog(self) -> Catalog:
        """As Store says; asked in pieces, each of which fits into the time of one call."""
        samples, typical = self._call("embedding_gallery", read_samples, **self._catalog)
        same = {"min_similarity": SAME, "seconds": LOOK_SECONDS}
        pairs, embedded, among, looked_at = self._call(
            "embedding_pairs", read_pairs, **same, **self._catalog
        )
        failures: list[FailedPicture] = []
        last: Id | None = None
        while True:
            page, last = self._call("failed_assets", read_failures, after=last, **self._catalog)
            failures += page
            if last is None:
                return Catalog(pairs, embedded, among, looked_at, samples, typical, failures)

    def search(self, vector: np.ndarray, wanted: int) -> list[Match]:
        """As Store says; the database gives 1,000 at most."""
        question = {"query_embedding": vector_text(vector), "wanted": wanted}
        matches: list[Match] = self._call(
            "embedding_search", read_matches, **question, **self._catalog
        )
        return matches

    def _call(self, function: str, read: Callable[[Any], Any], **arguments: Any) -> Any:
        """The answer of a function of schema.sql as `read` takes it; asked again, with backoff,
        while trouble may pass. What `read` can't make sense of is no answer. Raises RunError."""
        import httpx
        from postgrest import APIError

        started = time.monotonic()
        for attempt in itertools.count():
            try:
                return read(self._rpc(function, arguments).execute().data)
            except APIError as error:
                code = str(error.code or self._http.status)
                message = self._without_key(said_in(error))
                in_vain = code == TOO_LONG and function in SEARCHES
                if in_vain or not PASSING.fullmatch(code):
                    raise RunError(self._explain(code, message)) from None
                trouble = f"{code}, {message}"
            except httpx.RequestError as error:
                trouble = f"{type(error).__name__}: {error}"
            except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
                trouble = f"an answer that {function} never gives"
            patience = self._seconds
            if self._stop.code:
                patience = min(patience, STOP_SECONDS)
            left = started + patience - time.monotonic()
            if left <= 0:
                raise RunError(f"{SILENCE} for {patience:.0f} s ({trouble}): {CHECK_URL}")
            log.info("database: %s; trying again", trouble)
            pause = 2 ** min(attempt, 4) * random.uniform(0.25, 0.5)
            time.sleep(min(pause, left))
        raise AssertionError  # count() has no end

    def _without_key(self, message: str) -> str:
        """A database's message, short, and without the key if it echoes that."""
        return shorten(message.replace(self._settings.key, "(the key)"), 300)

    def _explain(self, code: str, message: str) -> str:
        """An error of the database in its own words, with what to do where that is known."""
        if code in LACKING:
            return f"the database lacks what this script calls ({message}): {RUN_SQL}"
        if code in BAD_KEY:
            return f"the key in {self._settings.key_source} was refused ({message}): {NEW_KEY}"
        if code == NO_GRANT and key_role(self._settings.key) != "service_role":
            return f"the key in {self._settings.key_source} may not do this ({message}): {NEW_KEY}"
        if code == NO_GRANT:
            return f"the database lacks a grant ({message}): {RUN_SQL}"
        if code == NOT_EXPOSED:
            where = "the dashboard's settings of the Data API, Exposed schemas"
            return f"the schema public is not exposed ({message}): add it in {where}"
        if code == TOO_LONG:
            return (
                f"a search in the database took too long ({message}): has product_embeddings its "
                "HNSW index? schema.sql says how to make it"
            )
        if re.fullmatch(r"3\d\d", code) and self._http.leads_to:
            where = self._without_key(self._http.leads_to.partition("/rest/v1")[0])
            url = self._settings.url
            return f"{url} answers with HTTP {code} and leads to {where}: check SUPABASE_URL"
        if re.fullmatch(r"\d\d\d", code):
            return f"{self._settings.url} answers with HTTP {code}, {message}"
        return f"the database says {message!r} ({code})"


STORAGE = "/storage/v1/object/"  # an image that begins so is the project's own


def said_in(error: Any) -> str:
    """The words of an APIError, and of the page that a gateway sent in the place of JSON."""
    message = str(error.message)
    if not re.fullmatch(r"\d\d\d", str(error.code)):
        return message
    page = re.sub(
        r"<(style|script).*?</\1>|<[^>]*>", " ", str(error.details or ""), flags=re.DOTALL
    )
    return " ".join([message, *page.split()])


def key_role(key: str) -> str:
    """The role of a key: a legacy key is a JWT that says it, a secret key has this one."""
    if key.startswith("sb_secret_"):
        return "service_role"
    try:
        claims = key.split(".")[1]
        padding = "=" * (-len(claims) % 4)
        role = json.loads(base64.urlsafe_b64decode(claims + padding))["role"]
    except (LookupError, TypeError, ValueError):
        return ""
    return str(role)


# What functions of schema.sql answer; LookupError, TypeError and ValueError for what they never do.


def read_pictures(answer: Any) -> dict[Id, Picture]:
    """The pictures that an answer speaks of, by their ids."""
    pictures = {}
    for row in answer["pictures"]:
        texts = [row["image"], row["client"], row["title"]]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
        pictures[row["id"]] = Picture(row["id"], *texts)
    return pictures


def read_matches(answer: Any) -> list[Match]:
    """What a search found, nearest first."""
    return matches_in(answer["matches"], read_pictures(answer))


def matches_in(rows: Any, pictures: dict[Id, Picture]) -> list[Match]:
    """Rows of an id and a similarity."""
    return [Match(pictures[row["id"]], float(row["similarity"])) for row in rows]


def read_samples(answer: Any) -> tuple[list[Sample], float | None]:
    """Samples; and the similarity of unlike pictures, None where too few are embedded."""
    pictures = read_pictures(answer)
    samples = [
        Sample(pictures[row["id"]], matches_in(row["nearest"], pictures))
        for row in answer["samples"]
    ]
    typical = answer["typical"]
    if typical is not None:
        typical = float(typical)
    return samples, typical


def read_pairs(answer: Any) -> tuple[list[Pair], int, int, int]:
    """Pairs; and how many are embedded, were looked through for copies, compared with all."""
    pictures = read_pictures(answer)
    pairs = [
        Pair(
            pictures[row["one"]],
            pictures[row["other"]],
            float(row["similarity"]),
            bool(row["same"]),
        )
        for row in answer["pairs"]
    ]
    return pairs, int(answer["embedded"]), int(answer["sought_among"]), int(answer["looked_at"])


def read_failures(answer: Any) -> tuple[list[FailedPicture], Id | None]:
    """Some failures, and the id after which to go on."""
    pictures = read_pictures(answer)
    failures = [
        FailedPicture(pictures[row["id"]], str(row["reason"])) for row in answer["failures"]
    ]
    return failures, answer["last"]


def vector_text(vector: np.ndarray) -> str:
    """A vector as pgvector reads it, in the fewest digits that give the same float32 back."""
    return "[" + ",".join(map(str, vector.astype(np.float32))) + "]"


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".avif"}
IMAGE_SUFFIXES |= {".tif", ".tiff", ".bmp", ".heic", ".heif"}
# Copies, thumbnails and deleted files, as NAS systems, archives and desktops keep them
SYSTEM_FOLDERS = {"@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "@tmp"}
SYSTEM_FOLDERS |= {"$recycle.bin", "system volume information", "lost+found", "__macosx"}
# "modified" is the file's image_hash when its row was made: see hash_of. Files of earlier versions
# have a column more, "permanent".
FOLDER_TABLE = """
create table if not exists images (asset_id text primary key, modified integer not null,
    model_version text not null, embedding blob, stage text, reason text,
    created_at text not null, updated_at text not null)
"""
# A failure never takes the place of a vector of the same image and version
FOLDER_SAVE = """
insert into images (asset_id, modified, model_version, embedding, stage, reason, created_at,
    updated_at)
values (:id, :image_hash, :version, :embedding, :stage, :reason, :now, :now)
on conflict do update set modified = :image_hash, model_version = :version,
    embedding = :embedding, stage = :stage, reason = :reason, updated_at = :now
where :embedding is not null or embedding is null or modified <> :image_hash
    or model_version <> :version
"""


class KnownImage(NamedTuple):
    """What a folder's file says of an image."""

    modified: int
    model_version: str
    failed: int


class FolderStore:
    """The images below a folder, with their embeddings in one SQLite file there.

    Ids are the paths below it, clients its subfolders, vectors little-endian float32 blobs.
    Raises RunError where the folder or that file is of no use.
    """

    FILE = "product_embeddings.sqlite3"
    patience = threading.TIMEOUT_MAX  # a disk has no deadline

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.local or Path()
        self.place = str(self._folder / self.FILE)
        self._below = ""
        if settings.client is not None:
            self._below = composed(settings.client.strip("/")) + "/"
        self._new: list[Asset] = []
        self._failed: list[Asset] = []

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The file's database; what is changed is one transaction."""
        place = self.place
        if self._settings.dry_run and not Path(place).exists():
            place = ":memory:"
        try:
            with contextlib.closing(sqlite3.connect(place, 60)) as database, database:
                database.execute(FOLDER_TABLE)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"{self.place}: {error}. It must be a database of this version of the script, in "
                "a folder that can be written to, with room on the disk"
            ) from None

    def status(self) -> Status:
        """As Store says. Compares the folder's images with what the file knows of them: deletes
        the rows of files that are gone, and keeps for `pages` what is pending."""
        files = dict(self._files())
        mine = [path for path in sorted(files) if self._is_mine(path)]
        if not mine:
            self._explain_nothing(files)
        with self._database() as database:
            query = "select asset_id, modified, model_version, reason is not null from images"
            known = {path: KnownImage(*row) for path, *row in database.execute(query)}
            if not self._settings.dry_run:
                gone = known.keys() - files.keys()
                # A link to a disk that is not there now is no deleted file.
                deleted = [(path,) for path in gone if not is_link(self._folder / path)]
                database.executemany("delete from images where asset_id = ?", deleted)
        version = self._settings.model_version
        done = 0
        for path in mine:
            row = known.get(path)
            stat = files[path]
            asset = Asset(path, path, image_hash=hash_of(stat) if stat else 0)
            if not row or not is_same_file(row, stat) or row.model_version != version:
                self._new.append(asset)
            elif row.failed:
                self._failed.append(asset)
            else:
                done += 1
        return Status(len(mine), done, len(self._failed))

    def _is_mine(self, path: str) -> bool:
        return composed(path).startswith(self._below)

    def _explain_nothing(self, files: Mapping[str, Any]) -> None:
        if not self._below:
            raise RunError(f"no image below {self._folder}: by the endings of the files there")
        folders = {composed(path).rpartition("/")[0] for path in files}
        near = difflib.get_close_matches(self._below.strip("/"), folders, n=1)
        hint = f"did you mean {near[0]}?" if near else "--client is a subfolder"
        raise RunError(f"no image below {self._folder / self._below}: {hint}")

    def _files(self) -> Iterator[tuple[str, os.stat_result | None]]:
        """Path and state (None: it can't be looked at) of each image file. Logs what is left out,
        but for hidden files and folders."""
        left_out: Counter[str] = Counter()
        for folder, subfolders, names in os.walk(self._folder, onerror=unreadable):
            here = Path(folder)
            for name in list(subfolders):
                if name.startswith("."):
                    subfolders.remove(name)
                elif name.lower() in SYSTEM_FOLDERS:
                    subfolders.remove(name)
                    left_out[f"folder {name}"] += 1
                elif is_link(here / name):
                    left_out["linked folder"] += 1  # os.walk does not follow it
            for name in names:
                if name.startswith((".", self.FILE)):
                    continue
                ending = image_ending(name)
                if ending not in IMAGE_SUFFIXES:
                    left_out[ending or "without an ending"] += 1
                    continue
                try:
                    path = (here / name).relative_to(self._folder).as_posix()
                    path.encode()
                    yield path, (here / name).stat()
                except (FileNotFoundError, UnicodeEncodeError) as error:
                    log.warning("left out: %s: %s", ascii(str(here / name)), error)
                except OSError:  # of a folder that keeps its files from us, say
                    yield path, None
        if left_out:
            kinds = (f"{count:,} {kind}" for kind, count in left_out.most_common(8))
            log.info("left out, as no images of yours: %s", ", ".join(kinds))

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
                row: dict[str, Any] = {"id": result.asset.id, "now": now}
                row |= {"image_hash": result.asset.image_hash}
                row |= {"version": self._settings.model_version}
                row |= {"embedding": None, "stage": None, "reason": None}
                if isinstance(result, Failed):
                    row |= {"stage": result.stage, "reason": result.reason}
                else:
                    row["embedding"] = result.vector.astype("<f4").tobytes()
                database.execute(FOLDER_SAVE, row)
        return {result.asset.id for result in results}

    def search(self, vector: np.ndarray, wanted: int) -> list[Match]:
        """As Store says; compares all, in blocks."""
        best: list[Match] = []
        for pictures, vectors in self._vectors():
            cosines = vectors @ vector
            nearest = np.argsort(-cosines)[:wanted]
            best += [Match(pictures[row], float(cosines[row])) for row in nearest]
            best.sort(key=lambda match: -match.similarity)
            del best[wanted:]
        return best

    def catalog(self) -> Catalog:
        """As Store says, of the first MOST_COMPARED vectors."""
        pictures: list[Picture] = []
        blocks = [np.empty((0, DIMENSIONS), np.float32)]
        embedded = 0
        for more, block in self._vectors():
            embedded += len(more)
            if embedded <= MOST_COMPARED:
                pictures += more
                blocks.append(block)
        vectors = np.concatenate(blocks)
        blocks.clear()  # 200 MB
        rows, looked_at = rows_alike(vectors)
        pairs = [
            Pair(
                pictures[one],
                pictures[other],
                cosine,
                same=bool((vectors[one] == vectors[other]).all()),
            )
            for one, other, cosine in rows
        ]
        spread = np.linspace(0, len(pictures) - 1, min(SAMPLES, len(pictures))).astype(int)
        samples = []
        for own, cosines in zip(spread, vectors[spread] @ vectors.T, strict=True):
            nearest = [row for row in np.argsort(-cosines)[: NEAREST + 1] if row != own][:NEAREST]
            matches = [Match(pictures[row], float(cosines[row])) for row in nearest]
            samples.append(Sample(pictures[own], matches))
        typical = None
        if len(spread) > 1:
            cosines = vectors[spread] @ vectors[spread].T
            typical = float(np.median(cosines[np.triu_indices(len(spread), 1)]))
        among = len(vectors)
        return Catalog(pairs, embedded, among, looked_at, samples, typical, self._failures())

    def _vectors(self) -> Iterator[tuple[list[Picture], np.ndarray]]:
        """All pictures with their vectors (n, 512), in blocks of several thousand."""
        query = "select asset_id, embedding from images where model_version = ? and {} order by 1"
        query = query.format("embedding is not null")
        with self._database() as database:
            found = database.execute(query, [self._settings.model_version])
            while block := found.fetchmany(5000):
                mine = [(path, blob) for path, blob in block if self._is_mine(path)]
                vectors = np.frombuffer(b"".join(blob for _, blob in mine), "<f4")
                yield [picture_of(path) for path, _ in mine], vectors.reshape(-1, DIMENSIONS)

    def _failures(self) -> list[FailedPicture]:
        query = """select asset_id, reason from images
            where model_version = ? and reason is not null order by asset_id"""
        with self._database() as database:
            return [
                FailedPicture(picture_of(path), reason)
                for path, reason in database.execute(query, [self._settings.model_version])
                if self._is_mine(path)
            ]


def picture_of(path: str) -> Picture:
    """A folder's picture: where it lies stands in the place of a client."""
    folder, _, name = path.rpartition("/")
    return Picture(path, path, folder, name)


def hash_of(stat: os.stat_result) -> int:
    """What tells an image file from one that takes its place: its time of modification, in
    nanoseconds, and its size, as some exports and archives give all files one time."""
    return stat.st_mtime_ns + stat.st_size


def is_same_file(row: KnownImage, stat: os.stat_result | None) -> bool:
    """Whether a row is of this very file. Rows of earlier versions hold its time alone; and
    of one that can't be looked at now, what is known stays."""
    return stat is None or row.modified in (hash_of(stat), stat.st_mtime_ns)


def is_link(path: Path) -> bool:
    """Whether a path is a symbolic link; one that can't be looked at is none."""
    with contextlib.suppress(OSError):
        return path.is_symlink()
    return False


def composed(path: str) -> str:
    """A path as one spelling: macOS takes accents apart (NFD), what people type is whole (NFC)."""
    return unicodedata.normalize("NFC", path)


def image_ending(name: str) -> str:
    """The ending of a file's name, also of one as wget leaves it: mug.jpg?v=1712."""
    own = Path(name.lower()).suffix
    if own in IMAGE_SUFFIXES:
        return own
    found = re.search(r"(\.[a-z0-9]+)([?@].*)?$", name.lower())
    return found[1] if found else ""


def unreadable(error: OSError) -> None:
    """Ends the run: what a folder does not show must not count as deleted. Raises RunError."""
    raise RunError(f"{error.filename} can't be read ({error.strerror}): nothing was changed")


# ============================================================================= Fetching

MAX_BYTES = 50 * 2**20  # of one image file
HEAVY_BYTES = 4 * 2**20  # files above this are heavy,
HEAVY_FILES = 4  # and no more of them are downloaded at once
PAGE_BYTES = 2**16  # of a page in the place of an image; checks for robots are shorter,
SCRIPT_BYTES = 2**13  # and those that are no more than a script much shorter
FETCH_ATTEMPTS = 4  # at one image, in a run
MAX_REDIRECTS = 5
READ_SECONDS = 10.0  # between two packets; FETCH_SECONDS is for the whole

# A host's admin finds this name in the log, and can let it in. Words that many hosts refuse are
# not in it: python-requests, bot, openai.
AGENT = "generate-embeddings"
# Firewalls refuse requests without Accept. WebP and AVIF are not named in it: hosts that make them
# on demand then send the JPEG that they have, which is decoded in a third of the time.
HEADERS = {
    "User-Agent": f"{AGENT}/{VERSION} (product images for visual search; CLIP ViT-B/32)",
    "Accept": "image/jpeg,image/png,image/*;q=0.9,*/*;q=0.8",
}


class Meaning(Enum):
    """What a host's answer means for the image that was asked for."""

    PICTURE = "here it is"
    ELSEWHERE = "it is where Location says"
    NEVER = "it can't be had, for good"
    LATER = "it can't be had in this run"
    AGAIN = "another attempt in this run may get it, after Retry-After"
    ROBOTS = "it can't be had in this run, as the host takes us for a bad robot"


# What an answer means, by its status; what is not listed means LATER.
# NEVER, which is only about the URL itself, becomes ImageError: a failure for good.
# AGAIN, and LATER or ROBOTS with Retry-After, become Strain: the image's own thread sleeps that
# long and asks again, FETCH_ATTEMPTS in all; other images of the host go on. Where less time than
# that is left of settings.fetch_seconds, it gives up at once.
# What fails so becomes ImageError: later runs try again. All failures but NEVER count in Hosts.
ANSWERS = {
    200: Meaning.PICTURE,
    203: Meaning.PICTURE,  # RFC 9110: a proxy on the way has changed something
    206: Meaning.PICTURE,  # if it is the whole; a part means LATER
    301: Meaning.ELSEWHERE,
    302: Meaning.ELSEWHERE,
    303: Meaning.ELSEWHERE,
    307: Meaning.ELSEWHERE,
    308: Meaning.ELSEWHERE,
    400: Meaning.NEVER,
    404: Meaning.NEVER,
    410: Meaning.NEVER,
    414: Meaning.NEVER,
    451: Meaning.NEVER,  # RFC 7725: for legal reasons
    202: Meaning.AGAIN,  # still being made; with a page: ROBOTS (SiteGround, AWS WAF)
    408: Meaning.AGAIN,
    420: Meaning.AGAIN,  # Cloudinary: too many requests
    421: Meaning.AGAIN,  # RFC 9110: over another connection
    423: Meaning.AGAIN,  # Cloudinary: still being made
    425: Meaning.AGAIN,  # RFC 8470: too early
    429: Meaning.AGAIN,  # RFC 6585: too many requests
    430: Meaning.AGAIN,  # Shopify: too many requests, or suspicious ones
    **dict.fromkeys(range(100, 200), Meaning.AGAIN),  # 103 comes before the answer proper
    **dict.fromkeys(range(500, 600), Meaning.AGAIN),
    # Nothing but a firewall answers these to the question for a file.
    405: Meaning.ROBOTS,  # AWS WAF's and Alibaba's captcha
    406: Meaning.ROBOTS,  # mod_security
    418: Meaning.ROBOTS,
    999: Meaning.ROBOTS,  # LinkedIn
}

# What firewalls put into a check for robots, whatever its status (some send these with pictures
# and with a true 404, too, which therefore stay what they are).
ROBOT_HEADERS = {
    "cf-mitigated",  # Cloudflare
    "sg-captcha",  # SiteGround
    "x-amzn-waf-action",  # AWS WAF, whose page stays away from who does not accept HTML
    "x-dd-b",  # DataDome
    "x-vercel-mitigated",
    "x-sucuri-block",
}
ROBOT_WORDS = re.compile(
    # what such pages say to people,
    rb"captcha|just a moment|one moment, please|checking your browser|attention required"
    rb"|robot or human|(not|are you) a (ro)?bot|(verify|confirm)[^<]{0,20} human"
    rb"|(human|bot|security|browser) (check|verification|challenge)|client challenge"
    rb"|unusual traffic|pardon our interruption|ddos.(guard|protection)"
    # and the scripts of Cloudflare, Imperva, AWS, Akamai, HUMAN, Kasada, Sucuri, Alibaba, F5
    rb"|_cf_chl|incapsula|awswaf|bm-verify|sec-if-cpt|_pxappid|kpsdk|sucuri|acw_sc__|bobcmn",
    re.IGNORECASE,
)
ROBOT_ADVICE = f"ask the host to let {AGENT} in, or slow down with --workers"

# What a library's message holds, and what we say.
NETWORK_REASONS = {
    "CERTIFICATE": "the host's certificate is not valid",
    "SSL": "TLS failed",
    "Temporary failure in name": "no name server answered",  # EAI_AGAIN, as offline
    "gaierror": "host not found",
    "NameResolution": "host not found",
    "timed out": "the host did not answer in time",
    "refused": "connection refused",
    "unreachable": "host not reachable",
    "got more than": "an answer with headers without end",
    "to decode": "broken compression",
}
# Encodings that a host should not send unless asked; urllib3 has some where packages for them are.
UNASKED = {"br", "zstd", "compress", "x-compress", "dcb", "dcz"}

BLANKS = "".join(map(chr, range(33)))  # what browsers strip from a URL's ends
PATH_CHARACTERS = "%!$&'()*+,-./:;=@[]_|~"  # those that browsers leave as they are
QUERY_CHARACTERS = PATH_CHARACTERS.replace("'", "") + "?^`{}\\"
TARGET = ":path"  # a header of our own, as in HTTP/2, that is never sent: see pool_classes


class Fetcher:
    """Gets the bytes of images over connections that stay open, for any number of threads."""

    def __init__(self, settings: Settings) -> None:
        http.client._MAXHEADERS = 400  # type: ignore[attr-defined]  # not 100: some shops send 120
        self._settings = settings
        self._guard = Guard(settings)
        self._heavy = threading.Semaphore(HEAVY_FILES)
        self._pools: dict[str, urllib3.PoolManager] = {}  # by proxy, "" for none
        self._pools_lock = threading.Lock()

    def fetch(self, place: Source) -> bytes:
        """The bytes of an image, at most MAX_BYTES, within FETCH_SECONDS, all attempts together.

        Raises ImageError.
        """
        if isinstance(place.where, Path):
            return read_file(place.where)
        if place.where[:5].lower() == "data:":
            return read_data_url(place.where)
        url = read_url(place.where)
        deadline = Deadline(self._settings.fetch_seconds)
        attempt = 1
        while True:
            try:
                return self._follow(url, place.headers, deadline)
            except Strain as error:
                left = deadline.seconds
                if attempt == FETCH_ATTEMPTS or error.rest > max(left, 0):
                    raise
                pause = max(error.rest, 2**attempt * random.uniform(0.125, 0.25))
                if pause > left:  # it is not the host's pause that does not fit, but ours
                    raise ImageError(f"{deadline.missed} ({error})") from None
            time.sleep(pause)
            attempt += 1

    def _follow(self, url: Url, headers: Mapping[str, str], deadline: Deadline) -> bytes:
        """One attempt, along its redirects. Cookies live that long, and go to no other origin."""
        cookies: dict[str, dict[str, str]] = {}
        for hop in range(MAX_REDIRECTS + 1):
            own = cookies.setdefault(url.origin, {})
            answer = None
            try:
                with contextlib.closing(self._ask(url, headers, own, deadline)) as answer:
                    target = answer.headers.get("Location")
                    if meaning_of(answer) is not Meaning.ELSEWHERE or not target:
                        return self._picture(answer, deadline)
                    own.update(cookies_of(answer))
            except (OSError, ValueError, http.client.HTTPException, HTTPError) as error:
                reason = network_reason(error)
                if answer is None:
                    raise Strain(reason) from None
                raise Strain(reason) from None
            except ImageError as error:
                if hop == 0:
                    raise
                raise ImageError(f"a redirect elsewhere: {error}") from None
            url = next_url(url, target)
            headers = {}  # they were for the first place alone
        raise ImageError(f"more than {MAX_REDIRECTS} redirects")

    def _ask(
        self, url: Url, headers: Mapping[str, str], cookies: dict[str, str], deadline: Deadline
    ) -> BaseHTTPResponse:
        sent = {**HEADERS, **headers, TARGET: url.target}
        if cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        if url.login and "Authorization" not in sent:
            sent |= urllib3.make_headers(basic_auth=url.login, basic_auth_encoding="utf-8")
        left = deadline.left()
        return self._pools_for(url).urlopen(
            "GET",
            f"{url.origin}/",
            headers=sent,
            timeout=urllib3.Timeout(connect=left, read=min(READ_SECONDS, left)),
            retries=False,
            redirect=False,
            preload_content=False,
        )

    def _pools_for(self, url: Url) -> urllib3.PoolManager:
        """The open connections that may serve a URL: the direct ones, or a proxy's."""
        proxies = requests.utils.get_environ_proxies(url.origin)
        proxy = requests.utils.select_proxy(url.origin, proxies) or ""
        if proxy:
            self._guard.check_name(url)
        with self._pools_lock:
            if proxy not in self._pools:
                self._pools[proxy] = self._open_pools(proxy)
            return self._pools[proxy]

    def _open_pools(self, proxy: str) -> urllib3.PoolManager:
        options: dict[str, Any] = {
            "num_pools": 64,  # hosts whose connections are kept
            "maxsize": self._settings.workers,
            "ssl_context": tls_context(),
        }
        connect: Connect | None = None
        if not proxy:
            connect = self._guard.connect
            pools = urllib3.PoolManager(**options)
        elif proxy.startswith("socks"):
            connect = SocksProxy(proxy).connect
            pools = urllib3.PoolManager(**options)
        else:
            if "://" not in proxy:
                proxy = f"http://{proxy}"
            user, password = requests.utils.get_auth_from_url(proxy)
            if user:
                login = urllib3.make_headers(proxy_basic_auth=f"{user}:{password}")
                options["proxy_headers"] = login
            pools = urllib3.ProxyManager(proxy, **options)
        pools.pool_classes_by_scheme = pool_classes(connect)
        return pools

    def _picture(self, answer: BaseHTTPResponse, deadline: Deadline) -> bytes:
        """The bytes of an answer that is the image. Raises what any other answer means."""
        if meaning_of(answer) is not Meaning.PICTURE:
            raise refusal(answer, first_bytes(answer, deadline))
        encodings = set(re.split(r"[\s,]+", answer.headers.get("Content-Encoding", "").lower()))
        for encoding in encodings & UNASKED - set(urllib3.HTTPResponse.CONTENT_DECODERS):
            raise ImageError(f"compressed as {encoding}, which it was not asked for")
        data = self._body(answer, deadline)
        if is_page(data) and is_robots_check(answer, data):
            raise ImageError(f"HTTP {answer.status}, a check for robots: {ROBOT_ADVICE}")
        return data

    def _body(self, answer: BaseHTTPResponse, deadline: Deadline) -> bytes:
        data = bytearray()
        heavy = False
        try:
            while chunk := answer.read1(2**16, decode_content=True):
                data += chunk
                if len(data) > MAX_BYTES:
                    raise ImageError(TOO_LARGE)
                left = deadline.left()
                if len(data) > HEAVY_BYTES and not heavy:
                    heavy = self._heavy.acquire(timeout=left)
        finally:
            if heavy:
                self._heavy.release()
        return bytes(data)


class Deadline:
    """The end of the time that one image has."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.missed = not_in_time(seconds)

    @property
    def seconds(self) -> float:
        """How long it is until then; below 0 where it is over."""
        return self._end - time.monotonic()

    def left(self) -> float:
        """The same, above 0. Raises ImageError where it is over."""
        seconds = self.seconds
        if seconds <= 0:
            raise ImageError(self.missed)
        return seconds


def not_in_time(seconds: float) -> str:
    """Why an image was given up; schema.sql knows these words, see embedding_back_off."""
    return f"not complete within {seconds:g} s"


# What an answer means


def meaning_of(answer: BaseHTTPResponse) -> Meaning:
    """What an answer's status says."""
    if answer.status == 206:
        whole = re.fullmatch(r"bytes 0-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
        if not whole or int(whole[1]) + 1 != int(whole[2]):
            return Meaning.LATER
    return ANSWERS.get(answer.status, Meaning.LATER)


def refusal(answer: BaseHTTPResponse, page: bytes) -> ImageError:
    """What an answer means that is no picture; `page` is how its body begins."""
    status = answer.status
    meaning = meaning_of(answer)
    if status == 400 and (meant := status_in_body(page)):
        status = meant
        meaning = ANSWERS.get(status, Meaning.LATER)
    reason = f"HTTP {status} {http.client.responses.get(status, '')}".strip()
    if meaning is Meaning.NEVER:
        return ImageError(reason)
    checks = meaning is Meaning.ROBOTS or is_robots_check(answer, page)
    if checks or (answer.status == 202 and is_page(page)):
        reason = f"{reason}, a check for robots: {ROBOT_ADVICE}"
    after = retry_after(answer.headers)
    if meaning is Meaning.AGAIN or after > 0:
        return Strain(reason, after)
    return ImageError(reason)


def status_in_body(page: bytes) -> int:
    """The status that an answer's JSON names; 0 if none. Supabase's Storage answers 400 to nearly
    all that it refuses, also for an hour of trouble, and says there what it means."""
    try:
        status = int(json.loads(page)["statusCode"])
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
        return 0
    return status if 400 <= status < 600 else 0


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that Retry-After asks for, as a number or a date; 0 where it makes no sense."""
    text = headers.get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0


def is_page(data: bytes) -> bool:
    """Whether these are markup or JSON."""
    return data[:100].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"<", b"{")


def is_robots_check(answer: BaseHTTPResponse, page: bytes) -> bool:
    """Whether an answer asks for a proof that a person is asking. Long pages are not searched:
    a shop's own may have a captcha in a form."""
    if any(name.lower() in ROBOT_HEADERS for name in answer.headers):
        return True
    if len(page) < SCRIPT_BYTES and re.search(rb"document\.cookie|location\.reload", page):
        return True  # a script that asks again
    return len(page) < PAGE_BYTES and ROBOT_WORDS.search(page) is not None


def first_bytes(answer: BaseHTTPResponse, deadline: Deadline) -> bytes:
    """How a body begins; what there is of it, where it breaks off or comes too slowly."""
    data = b""
    if answer.status < 200:  # the answer proper follows, on a connection that is not used again
        return data
    with contextlib.suppress(OSError, http.client.HTTPException, HTTPError, ImageError):
        while len(data) < PAGE_BYTES and deadline.left():
            chunk = answer.read1(PAGE_BYTES - len(data), decode_content=True)
            if not chunk:
                break
            data += chunk
    return data


def cookies_of(answer: BaseHTTPResponse) -> dict[str, str]:
    """The cookies that an answer sets, without their conditions."""
    cookies = {}
    for line in answer.headers.getlist("Set-Cookie"):
        name, _, value = line.partition(";")[0].partition("=")
        cookies[name.strip()] = value.strip()
    return cookies


def network_reason(error: BaseException) -> str:
    """What went wrong on the way to a host, in words that group well."""
    said = ""
    cause: BaseException | None = error
    while cause:
        # These name the URL, which may hold any word.
        if not isinstance(cause, (requests.RequestException, MaxRetryError)):
            said = f"{said} {cause!r}"
        cause = cause.__cause__ or cause.__context__
    for sign, reason in NETWORK_REASONS.items():
        if sign in said:
            return reason
    return "connection lost"


# URLs


class Url(NamedTuple):
    """A URL as a browser would ask for it: nothing is rewritten that need not be, as signed URLs
    and object stores compare byte for byte."""

    scheme: str  # http or https
    host: str  # in ASCII, small letters, without brackets
    port: int
    target: str  # path and query
    login: str  # user:password, or empty

    @property
    def origin(self) -> str:
        """The URL's beginning, up to the path."""
        host = self.host
        if ":" in host:
            host = f"[{host}]"
        if self.port == PORTS[self.scheme]:
            return f"{self.scheme}://{host}"
        return f"{self.scheme}://{host}:{self.port}"


PORTS = {"http": 80, "https": 443}


def read_url(text: str) -> Url:
    """The URL that a text of the catalog is. Raises ImageError with what the text is instead."""
    text = text.strip(BLANKS)
    if re.match(r"[\[{]|.*[\s,;|]https?://", text, re.IGNORECASE | re.DOTALL):
        raise ImageError(MANY_URLS)
    if not re.match(r"[\w!+.-]{2,}:(?!\d+/)", text):  # host:80 and C:\ are no schemes
        if re.search(r"\.\w{3,4}\s*[,;|\n]", text):
            raise ImageError(MANY_URLS)
        raise ImageError(NO_URL)
    try:
        return parse_url(text)
    except ValueError:
        raise ImageError("not a valid URL") from None


def next_url(url: Url, location: str) -> Url:
    """Where a redirect leads. Raises ImageError where that is nowhere."""
    try:
        # Headers come as latin-1, hosts mean UTF-8
        location = quote(location.strip(BLANKS).encode("latin-1"), safe=string.punctuation)
        if not re.match(r"[\w+.-]+:", location):
            location = urljoin(url.origin + url.target, location)
        return parse_url(location)
    except ValueError:
        raise ImageError("a redirect to no valid URL") from None
    except ImageError as error:
        raise ImageError(f"a redirect elsewhere: {error}") from None


def parse_url(text: str) -> Url:
    """The parts of a URL. Raises ValueError, and ImageError for schemes that are not fetched."""
    text, _, _ = re.sub(r"[\t\r\n]", "", text).partition("#")
    start, question, query = text.partition("?")
    scheme, _, rest = start.replace("\\", "/").partition(":")
    scheme = scheme.lower()
    if scheme not in PORTS:
        raise ImageError("only http, https and data URLs are fetched")
    if not rest.startswith("//"):
        raise ValueError
    authority, slash, path = rest[2:].partition("/")
    parts = urlsplit(f"//{authority}")
    path = quote(without_dots(slash + path), safe=PATH_CHARACTERS)
    query = quote(query, safe=QUERY_CHARACTERS)
    login = ""
    if parts.username is not None:
        login = unquote(f"{parts.username}:{parts.password or ''}")
    host = host_in_ascii(parts.hostname or "")
    port = parts.port or PORTS[scheme]
    return Url(scheme, host, port, f"{path}{question}{query}", login)


def without_dots(path: str) -> str:
    """A path without segments `.` and `..`, which browsers resolve before they ask."""
    kept: list[str] = []
    name = ""
    for segment in path.split("/")[1:]:
        name = segment.lower().replace("%2e", ".")
        if name == "..":
            del kept[-1:]
        elif name != ".":
            kept.append(segment)
    if name in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


def host_in_ascii(host: str) -> str:
    """A host's name or address as it is looked up. Raises ValueError where it can't be one."""
    if ":" in host:
        ipaddress.IPv6Address(host)
        return host
    host = unquote(host)
    try:
        if not host.isascii():
            host = idna.encode(host, uts46=True).decode()
    except idna.IDNAError:
        pass  # browsers take names of emoji, which Python's older rules have
    host = host.encode("idna").decode().rstrip(".").lower()
    if not host or re.search(r'[\x00-\x20"#%/<>?@\[\\\]^`{|}\x7f]', host):
        raise ValueError
    return host


def read_data_url(text: str) -> bytes:
    """The bytes that a data: URL holds. Raises ImageError."""
    try:
        return DataHandler().data_open(Request(text)).read()
    except ValueError:
        raise ImageError("broken data: URL") from None


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises ImageError."""
    try:
        if not path.is_file():  # a named pipe, say, would never end
            raise OSError(0, "no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(TOO_LARGE)
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"can't be read ({error.strerror})") from None


# Connections

# Opens a socket: host, port, seconds, options
Connect = Callable[[str, int, Any, Any], socket.socket]


class Guard:
    """Which addresses a connection may go to: those of the open internet, so that no URL of the
    catalog reaches into this machine's own network. The project's own origin may be anywhere, and
    so may all with ALLOW_PRIVATE_IMAGE_HOSTS=1.

    A name is looked up once, and the connection goes to the address that was looked at: no DNS
    can change it in between. Behind a proxy, which alone knows where names lead, only what is
    literally private is refused.
    """

    NAT64 = "64:ff9b::/96"
    # What older Pythons' is_global takes for public: metadata, site-local, NAT64, IPv4 in IPv6
    NOT_PUBLIC = ("192.0.0.0/24", "fec0::/10", "64:ff9b:1::/48", "::/96")

    def __init__(self, settings: Settings) -> None:
        self._all = settings.private_hosts
        self._own: tuple[str, int] | None = None
        if settings.url:
            own = parse_url(settings.url)
            self._own = (own.host, own.port)

    def connect(self, host: str, port: int, seconds: float, options: Any) -> socket.socket:
        """Connects to the first of a host's addresses that answers. Raises OSError, ImageError."""
        addresses = self._allowed(host, port)
        share = seconds / len(addresses)
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                return create_connection((address, port), share, None, options)
        return create_connection((addresses[-1], port), share, None, options)

    def check_name(self, url: Url) -> None:
        """Raises ImageError where the host is a private address itself, no name of one."""
        host = url.host
        if re.fullmatch(r"(.+\.)?localhost", host):
            host = "127.0.0.1"
        with contextlib.suppress(socket.gaierror):  # a name
            self._allowed(host, url.port, socket.AI_NUMERICHOST)

    def _allowed(self, host: str, port: int, flags: int = 0) -> list[str]:
        """The addresses of a host that may be connected to: one at least, or it raises."""
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
        addresses = [str(entry[4][0]) for entry in entries]
        if self._all or (host, port) == self._own:
            return addresses
        public = [address for address in addresses if self.is_public(address)]
        if not public:
            reason = f"private address {addresses[0]} (ALLOW_PRIVATE_IMAGE_HOSTS=1 allows it)"
            if is_name(host):  # it leads there now, as all do behind a network's login page
                raise ImageError(reason)
            raise ImageError(f"{reason}; --retry-failed tries it again")
        return public

    @classmethod
    def is_public(cls, address: str) -> bool:
        """Whether an IP address is one of the open internet, also inside its IPv6 wrappings."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address):
            if ip in ipaddress.ip_network(cls.NAT64):
                ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
            else:
                ip = ip.ipv4_mapped or ip.sixtofour or ip
        if any(ip in ipaddress.ip_network(network) for network in cls.NOT_PUBLIC):
            return False
        return ip.is_global and not ip.is_multicast


def is_name(host: str) -> bool:
    """Whether a host is neither an address, in whatever spelling, nor this machine."""
    if host == "localhost" or ":" in host:
        return False
    try:
        socket.inet_aton(host)
    except OSError:
        return True
    return False


class SocksProxy:
    """The way through a SOCKS proxy. Raises RunError."""

    def __init__(self, proxy: str) -> None:
        check_proxies("socks")
        socks = import_module("socks")
        parts = urlsplit(proxy)
        self._proxy = {
            "proxy_type": socks.SOCKS5,
            "proxy_addr": parts.hostname,
            "proxy_port": parts.port or 1080,
            "proxy_rdns": parts.scheme == "socks5h",  # who looks up names
            "proxy_username": unquote(parts.username or "") or None,
            "proxy_password": unquote(parts.password or "") or None,
        }
        self._open: Callable[..., socket.socket] = socks.create_connection

    def connect(self, host: str, port: int, seconds: float, options: Any) -> socket.socket:
        """A connection to a host. Raises OSError."""
        return self._open((host, port), seconds, socket_options=options, **self._proxy)


def pool_classes(connect: Connect | None) -> dict[str, type[urllib3.HTTPConnectionPool]]:
    """urllib3's pools, with connections that `connect` opens, and that send URLs as they are
    written: urllib3 writes `%2F` for `%2f`, and `%25` for a percent sign that stands alone."""

    class Connection(urllib3.connection.HTTPConnection):
        def _new_conn(self) -> socket.socket:
            if connect is None:  # to a proxy
                return super()._new_conn()
            return connect(self.host, self.port, self.timeout, self.socket_options)

        def request(
            self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any
        ) -> None:
            headers = dict(headers)
            # The URL that urllib3 gives is the origin, for a proxy, and a slash.
            target = url.removesuffix("/") + headers.pop(TARGET)
            super().request(method, target, body, headers, **options)

    class TlsConnection(Connection, urllib3.connection.HTTPSConnection):
        pass

    class Pool(urllib3.HTTPConnectionPool):
        ConnectionCls = Connection

    class TlsPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = TlsConnection

    return {"http": Pool, "https": TlsPool}


def certificates() -> str:
    """The file with whose certificates are trusted, for images, the database and the hub alike:
    the one that REQUESTS_CA_BUNDLE or SSL_CERT_FILE names, else certifi's."""
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        path = os.environ.get(name)
        if path:
            return path
    return certifi.where()


def tls_context() -> ssl.SSLContext:
    """A context that trusts `certificates`. Raises RunError."""
    path = certificates()
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        names = "REQUESTS_CA_BUNDLE, SSL_CERT_FILE"
        raise RunError(f"{path} is no file of certificates ({names}): {error}") from None


def check_proxies(*needed: str) -> None:
    """Raises RunError where the environment names a SOCKS proxy that can't be used: one of another
    kind, or without the packages that are needed."""
    proxies = getproxies()
    for kind in ("http", "https", "all"):
        name = f"{kind}_proxy".upper()
        scheme, separator, _ = proxies.get(kind, "").lower().partition("://")
        if not separator or not scheme.startswith("socks"):
            continue
        if scheme not in ("socks5", "socks5h"):
            raise RunError(f"{name}: write socks5h:// for {scheme}://, which httpx does not know")
        if not all(map(find_spec, needed)):
            raise RunError(f"{name} is a SOCKS proxy: run pip install PySocks socksio, or unset it")


# ============================================================================= Pictures

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, by channel
STD = (0.26862954, 0.26130258, 0.27577711)
DECODE_SECONDS = 5  # of a core for one image; the largest honest ones take 2
DECODE_MB = 1000  # of memory for one image, on each core; a WebP of 50 megapixels takes 800
MIN_SIDE = 16  # pixels; below it: tracking pixels and spacers
KEEP_SCALE = 2  # large images are first reduced, by a whole number, to so many times SIDE
# Other Pillow plugins stay shut: some start programs (EPS), none is a product photo.
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP"]
# Memory that a decoder takes. Where these three lack it, their libraries call the file broken.
PIXEL_BYTES = {"WEBP": 20, "AVIF": 20, "HEIF": 20}
PIXEL_BYTES |= {"JPEG": 0, "MPO": 0}  # they shrink while they are decoded
# What Pillow raises for broken files, as hundreds of thousands of damaged ones showed. Its other
# errors (AttributeError, TypeError) mean that we call it wrongly.
BROKEN_FILE = (OSError, EOFError, SyntaxError, ValueError, RuntimeError, struct.error, zlib.error)
PngImagePlugin.MAX_TEXT_CHUNK = 2**24  # bytes of an ICC profile; some have over 1 MB
# Pillow itself reads planes of 16 bits as if they were of 8; libtiff does not.
TiffImagePlugin.READ_LIBTIFF = True


def levels_of(data: bytes) -> bytes:
    """What CLIP sees of an image file, as a browser shows it: levels (224, 224, 3), a byte each.

    Raises ImageError and MemoryError. Any other exception is a defect, ours or Pillow's.
    """
    return in_srgb(square(decoded(data))).tobytes()


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
        # Where EXIF is silent Pillow would turn an image by XMP. Browsers don't.
        image.info.pop("xmp", None)
        # JPEG's decoder can shrink by 2, 4 or 8 as it goes. The other decoders ignore this.
        shrink = max(1.0, min(image.size) / (KEEP_SCALE * SIDE))
        image.draft(None, (int(image.width / shrink), int(image.height / shrink)))
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
    at = 8
    while at < len(data):
        kind = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4])
        checksum = int.from_bytes(data[end - 4 : end])
        is_right = zlib.crc32(data[at + 4 : end - 4]) == checksum
        if kind == b"IDAT":
            pixels_seen = True
            # Pillow doesn't look. Zeros in a copy that stopped halfway make pixels, too.
            if not is_right:
                raise ImageError(BROKEN)
        is_extra = kind in (b"tRNS", b"iCCP", b"eXIf") and is_right and not pixels_seen
        if is_extra or kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            kept.append(data[at:end])
        if is_extra and kind == b"tRNS" and depth != 8 and colour_type in (0, 2):
            # Pillow compares this colour with pixels that it has scaled to 8 bits already.
            raise ImageError(f"{RARE_FORMAT} ({depth}-bit PNG with a transparent colour)")
        at = end
    return b"".join(kept)


def jpeg_with_end(data: bytes) -> bytes:
    """A JPEG with an end marker. Raises ImageError where pixels are missing, too.

    Uploads often lack their last bytes, the marker FFD9, and nothing else. Where more is missing,
    decoders fill up with gray and report no error. So the file is decoded twice, the second time
    with noise at its end. Behind the last pixel noise changes nothing.
    """
    start_of_scan, end_marker = b"\xff\xda", b"\xff\xd9"
    if data.find(end_marker, data.rfind(start_of_scan)) >= 0:
        return data
    data = data.removesuffix(b"\xff")  # half a marker
    # A copy that stopped halfway ends in zeros, which a decoder takes for pixels.
    if data.endswith(b"\0\0"):
        raise ImageError(BROKEN)
    noise = b"\xaa\x55" * 32
    restarts = (bytes([0xFF, 0xD0 + n]) for n in range(8))
    noise += b"".join(restart + noise for restart in restarts)
    files = (data + end_marker, data + noise + end_marker)
    pictures = [Image.open(io.BytesIO(file), formats=["JPEG"]).tobytes() for file in files]
    if pictures[0] != pictures[1]:
        raise ImageError(BROKEN)
    return data + end_marker


# How files begin that Pillow can't open, and what they are. The first that fits counts.
_BLANKS = rb"[\s\0\xef\xbb\xbf\xfe\xff]*"  # with a byte order mark, or half of UTF-16
UNREADABLE_FILES = (
    (rb"\s*\Z", EMPTY),
    (rb"\xff\xd8\xff|\x89png|gif8|riff|bm|....ftyp(avi|he[iv]|m[is]f)", BROKEN),
    (rb"ii[*+]\0|mm\0[*+]", f"{RARE_FORMAT} (TIFF, if it is not broken)"),
    (rb"\xff\x0a|\0\0\0\x0cjxl ", f"{RARE_FORMAT} (JPEG XL)"),
    (_BLANKS + rb"(?=<)(?:(?!<\w).)*+<(\w+:)?svg\b", SVG),
    (_BLANKS + rb"<", WEB_PAGE),
    (_BLANKS + rb"[\[{]", JSON),
    (_BLANKS + rb"%pdf", PDF),
)


def opened(data: bytes) -> Image.Image:
    """An image file of which the header was read. Raises ImageError for any other file."""
    formats = FORMATS
    if re.match(rb"....ftyp(hei|hev|m[is]f1(?!.{,40}avif))", data, re.DOTALL):
        try:
            import pillow_heif
        except (ImportError, OSError):  # OSError: it was installed meanwhile (see shut_in)
            raise ImageError(HEIC) from None
        pillow_heif.register_heif_opener()
        formats = ["HEIF"]
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(io.BytesIO(data), formats=formats)
    for beginning, reason in UNREADABLE_FILES:
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
    """A GIF's first picture. Where it is smaller than the canvas there is nothing around it, not
    the colour that Pillow puts there."""
    box = image.dispose_extent
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGBA").crop(box), box)
    return canvas


def on_white(image: Image.Image) -> Image.Image:
    """An image without alpha: where it is transparent, the white page shows."""
    if image.mode not in ("LA", "RGBA"):
        return image
    colours = image.convert(image.mode.removesuffix("A"))
    page = Image.new("RGB", image.size, "white")
    page.paste(in_srgb(colours), mask=image.getchannel("A"))
    return page


# How to turn an image that a camera held otherwise, by EXIF's value
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
    """What CLIP sees of an image: its shorter side at 224 pixels, of the longer one the middle."""
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

    The smaller the better: 224 x 224 pixels take 2 ms, a photograph 25.
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


@lru_cache(maxsize=4)  # it takes 20 ms, and a catalog has few profiles
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """The conversion from a profile's colours."""
    return ImageCms.buildTransform(io.BytesIO(profile), SRGB, mode, "RGB")


@lru_cache
def pixels_by_level() -> np.ndarray:
    """The pixel of each channel and level (3, 256), by the arithmetic of transformers' processor:
    the same bits."""
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    channels = zip(MEAN, STD, strict=True)
    return np.stack([(levels - np.float32(mean)) / np.float32(std) for mean, std in channels])


def normalise(levels: np.ndarray) -> np.ndarray:
    """Levels (224, 224, 3) -> pixels (3, 224, 224), as transformers' CLIPImageProcessor."""
    pixels = pixels_by_level()
    return np.stack([pixels[channel][levels[:, :, channel]] for channel in range(3)])


# ============================================================================= Decoders

DECODE_PATIENCE = 60.0  # seconds, on a busy machine, too; then a decoder counts as hung
LEVELS_BYTES = SIDE * SIDE * 3
MOST_REASON = 200  # characters of a reason that are kept
MOST_CALLS = 20  # of a traceback that are sent

# The first byte of an answer that is no levels; a text follows.
REFUSED_IMAGE = b"R"  # with the reason
UNEXPECTED = b"U"  # with a traceback

OUT_OF_MEMORY = 77  # a decoder's exit code
# What an exit code says of the image. All other deaths are the machine's trouble.
DEATHS = {
    -24: TOO_SLOW,  # SIGXCPU, for which Windows has no name
    -signal.SIGSEGV: BROKEN,
    -signal.SIGABRT: BROKEN,
    -signal.SIGFPE: BROKEN,
}
if sys.platform == "linux":  # elsewhere no limit holds, and it is the machine that has no more
    DEATHS[OUT_OF_MEMORY] = TOO_MUCH
CANT_START = "no process to decode images can be started; is memory short, ulimit -a low?"

# Imported, as Python keeps the bytecode of modules alone: to compile a script takes 0.1 s.
# By its path: nothing else of its folder, or of the current one, can be imported.
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
    # Else glibc gives memory back after each image and asks for it again, which takes 2 ms.
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(64 * 2**20),
}

# Numbers of Linux, the same on every processor.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_ASK_VERSION = 1
PR_SET_NO_NEW_PRIVS = 38


class Loader:
    """The way from a source to pixels, for any number of threads.

    Raises ImageError, and RunError where no decoder can be started.
    """

    def __init__(self, settings: Settings) -> None:
        self._fetcher = Fetcher(settings)
        self._decoders: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for _ in range(cores()):
            self._decoders.put(Decoder())

    def fetch(self, place: Source) -> Download:
        started = time.monotonic()
        data = self._fetcher.fetch(place)
        seconds = time.monotonic() - started
        return Download(data, seconds, seconds)

    def load(self, asset: Asset, data: bytes) -> Loaded:
        levels = self.decode(data)
        return Loaded(asset, normalise(levels))

    def decode(self, data: bytes) -> np.ndarray:
        """The levels (224, 224, 3) of an image file, by the first decoder that is free."""
        decoder = self._decoders.get()
        try:
            return decoder.decode(data)
        finally:
            self._decoders.put(decoder)


class Decoder:
    """A process that decodes an image at a time, within limits: what a file claims is not
    what it holds, and codecs have holes. It is this script again (RUN_DECODER).

    Bytes go in and bytes come out: levels, or a reason. A process that sends anything else
    is killed. So is one that hangs. Where one died, its exit code says whose fault it was.
    """

    def __init__(self) -> None:
        self._process: Any = None

    def decode(self, data: bytes) -> np.ndarray:
        """The levels (224, 224, 3) of an image file. Raises ImageError, and RunError where no
        process can be started."""
        process = self._process or started_decoder()
        self._process = None  # an answer that was not read whole would be the next image's
        try:
            levels = levels_in(answer_to(data, process))
        except ImageError:
            self._process = process
            raise
        except (OSError, EOFError, ValueError):
            process.kill()
            raise ImageError(DEATHS.get(process.wait(), DECODER_LOST)) from None
        self._process = process
        return levels


def started_decoder() -> Any:
    """A decoder's process that has answered once, to an empty file. Raises RunError."""
    needs = {name: text for name, text in os.environ.items() if DECODER_NEEDS.match(name)}
    try:
        process: Any = subprocess.Popen(  # noqa: S603 - runs this very script
            [sys.executable, "-P", "-c", RUN_DECODER, __file__, AS_DECODER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=needs | DECODER_SETTINGS,
            # What timeout(1) or a closed terminal sends to its group is for the run.
            start_new_session=True,
        )
    except OSError as error:
        raise RunError(f"{CANT_START} ({error.strerror})") from None
    try:
        with contextlib.suppress(ImageError):  # the reason EMPTY
            levels_in(answer_to(b"", process))
    except (OSError, EOFError, ValueError):
        process.kill()
        errors = process.stderr.read().decode(errors="replace").splitlines()
        code = process.wait()
        why = errors[-1] if errors else f"exit code {code}"
        raise RunError(f"{CANT_START} ({shorten(why, MOST_REASON)})") from None
    return process


def answer_to(data: bytes, process: Any) -> bytes:
    """What a decoder sends back. A decoder that takes longer than DECODE_PATIENCE is killed.

    Raises OSError, EOFError or ValueError for a decoder that is lost, and RunError.
    """
    patience = threading.Timer(DECODE_PATIENCE, process.kill)
    try:
        patience.start()
    except RuntimeError as error:  # no more threads on this machine
        raise RunError(f"{CANT_START} ({error})") from None
    try:
        send(process.stdin, data)
        return receive(process.stdout, most=LEVELS_BYTES)
    finally:
        patience.cancel()


def levels_in(answer: bytes) -> np.ndarray:
    """The levels (224, 224, 3) of a decoder's answer. Raises the ImageError that it tells, and
    ValueError for what is no answer."""
    if len(answer) == LEVELS_BYTES:
        return np.frombuffer(answer, np.uint8).reshape(SIDE, SIDE, 3)
    kind = answer[:1]
    lines = answer[1:].decode().splitlines() or [""]
    reason = shorten(printable(lines[-1]), MOST_REASON)
    if kind == REFUSED_IMAGE:
        raise ImageError(reason)
    if kind == UNEXPECTED:
        for line in lines:
            log.debug("decoder: %s", line)
        raise ImageError(f"{DEFECT} ({reason})")
    raise ValueError(f"{kind!r} is no kind of answer")


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
    """Answers what comes until the run closes its pipe. Returns the exit code."""
    warnings.simplefilter("ignore")  # Pillow's, about oddities that do no harm
    # Fails where ulimit -v leaves less than an image may take.
    bytes(DECODE_MB * 2**20)
    load_codecs()
    answers = os.fdopen(os.dup(1), "wb")
    for stream in (1, 2):  # where libraries print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    limit_memory()
    shut_in()
    with contextlib.suppress(EOFError, OSError):  # the run is over
        while True:
            data = receive(sys.stdin.buffer, most=sys.maxsize)
            limit_seconds()
            send(answers, answer_for(data))
    return 0


def answer_for(data: bytes) -> bytes:
    """The levels of an image file, or why there are none."""
    try:
        return levels_of(data)
    except ImageError as reason:
        return REFUSED_IMAGE + str(reason).encode()
    except MemoryError:
        # There may be too little left to say more, or to go on with.
        os._exit(OUT_OF_MEMORY)
    except Exception:
        return UNEXPECTED + traceback.format_exc(-MOST_CALLS).encode()


def load_codecs() -> None:
    """Imports what Pillow imports when it meets a format: later nothing can be opened."""
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
    nowhere. What Linux refuses, and other systems lack, is done without."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # Windows has none

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
        if sys.platform == "linux":
            lock_files()
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # no file, no socket opens


def lock_files() -> None:
    """Landlock (Linux 5.13): no file can be changed, moved or run, and no other process
    looked into."""
    linux = ctypes.CDLL(None)
    version = linux.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_ASK_VERSION)
    kinds = min(12 + version, 15)  # of what can be done to files; none is allowed
    rules = ctypes.c_uint64(2**kinds - 1)
    ruleset = linux.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(rules), 8, 0)
    linux.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    linux.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)


def limit_seconds() -> None:
    """Limits the seconds of a core that this process may take from now on. Windows can't."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        most = math.ceil(time.process_time()) + DECODE_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


# ================================================================================ Model

# CLIP has two towers: one makes vectors of pixels, the other of words. What belongs together
# gets vectors that lie near each other.
#
# torch takes over a second to import: it is imported where it is used, and so first while the
# first images are on their way.

MODEL_CACHE = HERE / ".cache" / "transformers"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "pytorch_model.bin"  # of both towers
SAFETENSORS = "model.safetensors"  # the same in a newer format, in a folder for CLIP_MODEL
TO_EMBED = (CONFIG, WEIGHTS)
TO_ASK = (CONFIG, WEIGHTS, TOKENIZER)

VIT_B_32: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "patch_size": 32,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
}
VIT_B_32_TEXT: dict[str, Any] = {
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,  # tokens
    "hidden_act": "quick_gelu",
}
LAYERS_AT_ONCE = 4  # read at once: some 120 MB of the file in memory beside the model
GELU_SLOPE = 1.702  # quick_gelu(x) = x * sigmoid(1.702 x)

Tensor = Any  # torch's


class ClipEncoder:
    """CLIP's image encoder. Raises RunError where the model can't be had or used here."""

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(1)  # each core has an image of its own, see Run
        if settings.dtype == "bfloat16" and settings.device == "cpu" and not has_bfloat16():
            raise RunError("--dtype bfloat16: this processor has no arithmetic for it")
        folder = model_folder(settings, TO_EMBED)
        with model_trouble(folder, settings):
            config = read_config(folder, "vision_config", VIT_B_32)
            self.tower = ImageTower(Weights(folder, settings), config)
            self.try_out(config)
        if config != VIT_B_32 and settings.model_version == MODEL_VERSION:
            raise RunError(
                f"the model in {folder} is no ViT-B/32: set MODEL_VERSION to a name for its rows "
                f"other than {MODEL_VERSION}"
            )

    def try_out(self, config: dict[str, Any]) -> None:
        """Embeds a black image. Raises ValueError if what comes is no vector of CLIP's."""
        (vector,) = self.encode(np.zeros((1, 3, SIDE, SIDE), np.float32))
        if vector.size != DIMENSIONS:
            raise ValueError(f"it gives {vector.size} numbers, not {DIMENSIONS}")
        if config["hidden_act"] != VIT_B_32["hidden_act"]:
            raise ValueError(f"its activation is {config['hidden_act']}")
        if not np.isfinite(vector).all():
            raise ValueError(NOT_FINITE)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (n, 3, 224, 224) -> vectors (n, 512) of unit length."""
        import torch

        with torch.inference_mode():
            return of_unit_length(self.tower(torch.from_numpy(pixels)))

    def embed(self, batch: list[Loaded]) -> list[Result]:
        """The batch with vectors in the place of pixels."""
        try:
            vectors = self.encode(np.stack([loaded.pixels for loaded in batch]))
        except RuntimeError as error:  # memory of the device that is not there, say
            raise RunError(
                f"the model failed on {len(batch)} images at once ({shorten(str(error), 100)}): "
                "try a smaller --batch-size, or another --device"
            ) from None
        results: list[Result] = []
        for loaded, vector in zip(batch, vectors, strict=True):
            if np.isfinite(vector).all():
                results.append(Embedded(loaded.asset, vector))
            else:
                results.append(Failed(loaded.asset, "embed", NOT_FINITE))
        return results


class TextEncoder:
    """CLIP's text encoder, for questions in words. Raises RunError as ClipEncoder does.

    transformers has the same, but takes longer to import than a question may take.
    """

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(1)  # for a few words threads wait longer than they work
        folder = model_folder(settings, TO_ASK)
        if not (folder / TOKENIZER).is_file():
            raise RunError(f"{folder} has no {TOKENIZER}, which words need: copy {MODEL_ID}'s")
        with model_trouble(folder, settings):
            from tokenizers import Tokenizer

            config = read_config(folder, "text_config", VIT_B_32_TEXT)
            self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            self.start = self.tokenizer.token_to_id("<|startoftext|>")
            self.end = self.tokenizer.token_to_id("<|endoftext|>")
            self.longest = config["max_position_embeddings"]
            self.tower = TextTower(Weights(folder, settings), config)
            self.encode([""])

    def encode(self, texts: list[str]) -> np.ndarray:
        """Texts -> vectors (n, 512) of unit length. What is over 75 tokens is cut off."""
        import torch

        with torch.inference_mode():
            rows = [self.tower(self.tokens(text)) for text in texts]  # each (1, 512)
            return of_unit_length(torch.cat(rows))

    def tokens(self, text: str) -> list[Any]:
        """The tokens of a text between those for its start and its end."""
        inner = self.tokenizer.encode(text, add_special_tokens=False).ids
        tokens = [self.start, *inner[: self.longest - 2], self.end]
        return tokens[: tokens.index(self.end) + 1]  # a text may hold the word for the end


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
        said = [f"the model in {folder} can't be used ({shorten(str(error), 100)})"]
        if settings.clip_model:
            said.append(f"CLIP_MODEL must be a folder with a copy of {MODEL_ID}")
        if settings.device != "cpu":
            said.append(f"torch must find the --device {settings.device}")
        raise RunError("; ".join(said)) from None


def read_config(folder: Path, tower: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's settings of these names; those that the file leaves out are ViT-B/32's."""
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    config = config.get(tower, config)
    return {name: config.get(name, value) for name, value in wanted.items()}


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

    able = torch.cpu.get_capabilities().items()
    return any(yes is True for name, yes in able if "bf16" in name)


# The towers give what transformers' CLIPVisionModelWithProjection and CLIPTextModelWithProjection
# give for the same weights. What makes them fast on CPUs: weights laid out once for oneDNN, one
# product for q, k and v, activation and sum done within the products, and of the image tower's
# last layer only the one token that leaves it.


class ImageTower:
    """Pixels (n, 3, 224, 224) -> embeddings (n, 512), not yet of unit length."""

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self.weights = weights
        self.side = config["patch_size"]
        embeddings = "vision_model.embeddings."
        position = weights.read(embeddings + "position_embedding.weight")  # (50, 768)
        first = weights.read(embeddings + "class_embedding") + position[0]
        self.first = weights.placed(first)  # (768,)
        self.position = weights.placed(position[1:])  # (49, 768)
        patches = weights.read(embeddings + "patch_embedding.weight")  # (768, 3, 32, 32)
        self.patches = Linear(weights, patches.flatten(1))
        self.norm_before = Norm(weights, "vision_model.pre_layrnorm")  # the file's own spelling
        self.norm_after = Norm(weights, "vision_model.post_layernorm")
        self.projection = Linear(weights, weights.read("visual_projection.weight"))
        self.layers = read_layers(weights, "vision_model.encoder.layers.", config)

    def __call__(self, pixels: Tensor) -> Tensor:
        import torch

        side = self.side
        x = self.weights.placed(pixels).unfold(2, side, side).unfold(3, side, side)
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (n, 49, 3 * 32 * 32)
        x = self.patches(x) + self.position  # (n, 49, 768)
        x = torch.cat([self.first.expand(len(x), 1, -1), x], 1)  # (n, 50, 768)
        x = self.norm_before(x)
        for layer in self.layers[:-1]:
            x = layer(x)
        x = self.layers[-1](x, first_alone=True)  # (n, 1, 768)
        return self.projection(self.norm_after(x[:, 0]))


class TextTower:
    """Tokens -> embedding (1, 512), not yet of unit length: what the last token gives, which has
    seen all that stand before it."""

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self.weights = weights
        embeddings = "text_model.embeddings."
        # (49408, 512), of which only a few rows are ever read
        self.words = weights.mapped[embeddings + "token_embedding.weight"]
        self.position = weights.read(embeddings + "position_embedding.weight")  # (77, 512)
        self.norm_after = Norm(weights, "text_model.final_layer_norm")
        self.projection = Linear(weights, weights.read("text_projection.weight"))
        self.layers = read_layers(weights, "text_model.encoder.layers.", config)

    def __call__(self, tokens: list[int]) -> Tensor:
        x = self.words[tokens] + self.position[: len(tokens)]
        x = self.weights.placed(x[None])  # (1, tokens, 512)
        for layer in self.layers:
            x = layer(x, causal=True)
        return self.projection(self.norm_after(x[:, -1]))


class Layer:
    """One layer of a transformer: attention, then two products with an activation between them;
    what each gives is added to what came in."""

    def __init__(self, weights: Weights, name: str, heads: int) -> None:
        self.heads = heads
        attention = name + "self_attn."
        qkv = [attention + "q_proj", attention + "k_proj", attention + "v_proj"]
        self.norm1 = Norm(weights, name + "layer_norm1")
        self.qkv = Linear(weights, *weights.read_pair(*qkv))
        self.out = Linear(weights, *weights.read_pair(attention + "out_proj"))
        self.norm2 = Norm(weights, name + "layer_norm2")
        # quick_gelu(x) is silu(1.702 x) / 1.702, and silu comes with oneDNN's product
        up, up_bias = weights.read_pair(name + "mlp.fc1")
        down, down_bias = weights.read_pair(name + "mlp.fc2")
        self.up = Linear(weights, up * GELU_SLOPE, up_bias * GELU_SLOPE, silu=True)
        self.down = Linear(weights, down / GELU_SLOPE, down_bias)

    def __call__(self, x: Tensor, first_alone: bool = False, causal: bool = False) -> Tensor:
        """x (n, tokens, width) -> the same shape, or (n, 1, width) of the first token alone.
        Causal: a token sees only those before it, as in texts."""
        from torch.nn.functional import scaled_dot_product_attention

        n, tokens = x.shape[:2]
        qkv = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, tokens, width / heads)
        if first_alone:
            x = x[:, :1].contiguous()
            q = q[:, :, :1]
        seen = scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = self.out(seen.transpose(1, 2).reshape(x.shape), add=x)
        return self.down(self.up(self.norm2(x)), add=x)


class Norm:
    """A layer norm."""

    def __init__(self, weights: Weights, name: str) -> None:
        weight, bias = weights.read_pair(name)
        self.weight = weights.placed(weight)
        self.bias = weights.placed(bias)

    def __call__(self, x: Tensor) -> Tensor:
        from torch.nn.functional import layer_norm

        return layer_norm(x, self.weight.shape, self.weight, self.bias)


class Linear:
    """A linear layer, y = x @ weight.T + bias, then silu(y), or y plus what is to be added.

    Where torch has oneDNN's operators (they are private to torch: `can_pack`), the weight is
    laid out for them once.
    """

    def __init__(
        self, weights: Weights, weight: Tensor, bias: Tensor = None, silu: bool = False
    ) -> None:
        import torch

        self.weight = weights.placed(weight)  # (out, in)
        self.bias = None
        if bias is not None:
            self.bias = weights.placed(bias)  # (out,)
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
            weights.map_anew()
    return layers


class Weights:
    """The weights of a model by name, and where they go: to a device, in a number format."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        import torch

        self.folder = folder
        self.device = settings.device
        self.dtype = getattr(torch, settings.dtype)
        self.can_pack = can_pack(self.device, self.dtype)
        self.map_anew()

    def map_anew(self) -> None:
        """Maps the file, whose parts are read once they are asked for: not the tower that is not
        used. Mapped anew, it gives back the memory of what was read."""
        import torch

        if (self.folder / SAFETENSORS).is_file():
            from safetensors.torch import load_file

            self.mapped = load_file(self.folder / SAFETENSORS)
        else:
            self.mapped = torch.load(self.folder / WEIGHTS, mmap=True, weights_only=True)

    def read(self, *names: str) -> Tensor:
        """The weights of these names, one below the other, as float32."""
        import torch

        # A copy also of a single one: a view would keep the whole file mapped
        return torch.cat([self.mapped[name] for name in names]).float()

    def read_pair(self, *names: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of these layers, as if they were one."""
        weight = self.read(*(f"{name}.weight" for name in names))
        bias = self.read(*(f"{name}.bias" for name in names))
        return weight, bias

    def placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)


# The model's files

HUB = "https://huggingface.co"  # HF_ENDPOINT names a mirror of it
HUB_SECONDS = 10.0  # without a byte, until a connection counts as lost
HUB_ATTEMPTS = 3  # one after the other that bring nothing
HUB_WAIT = 2.0  # seconds between them, where the hub does not say how many
HUB_LONGEST_WAIT = 60.0  # seconds, whatever it says
HUB_CHUNK = 2**16  # bytes; what a cut costs at most


class PinnedFile(NamedTuple):
    """A file of the model at MODEL_REVISION, as others publish it who pinned that, too."""

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
    """The folder of the model: CLIP_MODEL's, or that of the pinned one."""
    if not settings.clip_model:
        return download(needed)
    folder = Path(settings.clip_model).expanduser()
    weights = folder / WEIGHTS
    is_copy = settings.model_version == MODEL_VERSION and not (folder / SAFETENSORS).is_file()
    if is_copy and length(weights) == MODEL_FILES[WEIGHTS].size and not is_whole(weights):
        raise RunError(
            f"CLIP_MODEL: {weights} is a damaged copy of {MODEL_ID}: copy it again (or, if it is "
            "another model, set MODEL_VERSION to a name for its rows)"
        )
    return folder


def download(needed: tuple[str, ...] = TO_ASK) -> Path:
    """The folder of the pinned model with the files that are needed: in our cache, or in the one
    that HF_HUB_CACHE or HF_HOME names. What is in neither is downloaded to ours."""
    caches = [MODEL_CACHE]
    if "HF_HUB_CACHE" in os.environ:
        caches.append(Path(os.environ["HF_HUB_CACHE"]))
    elif "HF_HOME" in os.environ:
        caches.append(Path(os.environ["HF_HOME"], "hub"))
    folder_in_cache = f"models--{MODEL_ID.replace('/', '--')}/snapshots/{MODEL_REVISION}"
    for cache in caches:
        folder = cache / folder_in_cache
        if all(is_whole(folder / name) for name in needed):
            return folder
    folder = MODEL_CACHE / folder_in_cache
    log.info("downloading %s once, about 600 MB, to %s", MODEL_ID, MODEL_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with one_run_at_a_time(folder):
            for name in MODEL_FILES:
                get_file(folder / name)
    except (OSError, ImageError) as error:  # the disk's, requests', and the hub's
        raise RunError(
            f"{MODEL_ID} could not be downloaded ({shorten(str(error), 100)}): check network and "
            "disk and run again, which goes on where this stopped, or set CLIP_MODEL to a folder "
            "with a copy of it"
        ) from None
    return folder


def length(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def is_whole(path: Path) -> bool:
    """Whether a file of the model is there, and byte for byte the pinned one. Weights take up to
    a second, so NAME.checked beside them says that they were looked at since they changed."""
    pinned = MODEL_FILES[path.name]
    if length(path) != pinned.size:
        return False
    checked = path.with_name(path.name + ".checked")
    if checked.is_file() and checked.stat().st_mtime >= path.stat().st_mtime:
        return True
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pinned.sha256:
        return False
    with contextlib.suppress(OSError):  # a cache that may only be read is checked in each run
        checked.touch()
    return True


@contextlib.contextmanager
def one_run_at_a_time(folder: Path) -> Iterator[None]:
    """Of several runs one downloads; the others wait, and find what it brought."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "download.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another run is downloading the model: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def get_file(path: Path) -> None:
    """Puts a file of the model there, unless it is. A damaged one is deleted and fetched anew.
    Raises ImageError where the hub has another file, and what fetch_rest raises."""
    if is_whole(path):
        return
    if path.exists():
        delete_damaged(path)
    fetch_file(path)
    if not is_whole(path):
        delete_damaged(path)
        fetch_file(path)
    if not is_whole(path):
        path.unlink()
        raise ImageError(f"{hub()} serves another {path.name}")


def delete_damaged(path: Path) -> None:
    """Deletes a file of the model that is not the pinned one, and says so."""
    log.warning("%s is damaged (its SHA-256): deleted, and fetched once more", path)
    path.resolve().unlink()
    path.unlink(missing_ok=True)  # the hub's own client had made a link of it


def hub() -> str:
    """Where the model comes from: the hub, or the mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def fetch_file(path: Path) -> None:
    """Downloads a file of the model. What a cut, or an earlier run, left of it stays, and is gone
    on from; attempts count only while they bring nothing."""
    part = path.with_name(path.name + ".part")
    in_vain = 0
    while length(part) < MODEL_FILES[path.name].size:
        before = length(part)
        try:
            fetch_rest(path.name, part)
        except Strain as error:
            in_vain += 1
            if length(part) > before:
                in_vain = 0
            if in_vain == HUB_ATTEMPTS:
                raise
            time.sleep(min(max(error.rest, HUB_WAIT), HUB_LONGEST_WAIT))
    part.replace(path)


def fetch_rest(name: str, part: Path) -> None:
    """Asks the hub for what is missing of a file. Raises Strain where that did not bring all of
    it, ImageError where another attempt would bring no more."""
    size = MODEL_FILES[name].size
    have = length(part)
    headers = {"User-Agent": HEADERS["User-Agent"], "Accept-Encoding": "identity"}
    headers["Range"] = f"bytes={have}-"
    if token := os.environ.get("HF_TOKEN", "").strip():  # a company's mirror asks for one
        headers["Authorization"] = f"Bearer {token}"
    url = f"{hub()}/{MODEL_ID}/resolve/{MODEL_REVISION}/{name}"
    try:
        with requests.get(
            url, headers=headers, stream=True, timeout=HUB_SECONDS, verify=certificates()
        ) as answer:
            if answer.status_code not in (200, 206):
                raise refusal_of_hub(answer)
            if answer.status_code == 200:  # all of it, whatever was asked for
                have = 0
            coming = answer.headers.get("Content-Length", "")
            if coming.isdecimal() and have + int(coming) != size:
                raise ImageError(f"{hub()} serves another {name}")
            with part.open("ab" if have else "wb") as file:
                for chunk in answer.iter_content(HUB_CHUNK):
                    file.write(chunk)
                    tenths_before = 10 * have // size
                    have += len(chunk)
                    tenths = 10 * have // size
                    if name == WEIGHTS and tenths > tenths_before:
                        log.info("downloaded %d %% of the model", 10 * tenths)
    except (requests.ConnectionError, requests.Timeout, ChunkedEncodingError) as error:
        raise Strain(network_reason(error), HUB_WAIT) from None
    except requests.exceptions.InvalidHeader:  # its message quotes the token
        raise RunError("HF_TOKEN holds characters that no token may: set it anew") from None
    if have < size:
        raise Strain("cut off", HUB_WAIT)


def refusal_of_hub(answer: requests.Response) -> ImageError:
    """What an answer of the hub means that is no file."""
    reason = f"HTTP {answer.status_code} {answer.reason}".strip()
    if ANSWERS.get(answer.status_code) is Meaning.AGAIN:
        return Strain(reason, retry_after(answer.headers))
    return ImageError(reason)


# =============================================================== The page, the question

# Cosine from which pictures look the same. Photo libraries draw the line there: immich's duplicate
# detection takes a distance of 0.01. What unrelated pictures have depends on the catalog, and is
# said on the page.
SAME = 0.99
LOOK_SECONDS = 4.0  # in search of those; the whole page may take 15, of a folder 10
MOST_COMPARED = 100_000  # vectors of a folder: 200 MB
MOST_PAIRS = 1_000_000  # a thousand pictures that look the same make half of that
BLOCK = 1024  # vectors that are compared with as many others at a time
AXES = 64
REACH = math.sqrt(2 - 2 * SAME)  # the distance of vectors whose cosine is SAME
ROUNDING = 1e-5  # of float32 sums

MATCHES = 12  # pictures for a question; --limit says another number,
SHOWN_MATCHES = 24  # of which the page shows these
SAMPLES = 16  # pictures that are shown with their nearest
NEAREST = 6
SHOWN_GROUPS = 60
SHOWN_MEMBERS = 6  # of a group
OPEN_GROUPS = 12  # the others are folded, for whoever scrolls on a phone
OPEN_REASONS = 12  # likewise
SHOWN_NAMES = 20  # of those that failed for one reason, or that have no room in their group
OPEN_NAMES = 4  # of the former; they are folded if there are more
GROUP_ROOM = 1_200_000  # bytes: mail programs and phones take a page of 3 MB
TEXT_ROOM = 150_000  # for groups without pictures
SAMPLE_ROOM = 900_000
ANSWER_ROOM = 400_000
FAILURE_ROOM = 300_000
LONGEST_ADDRESS = 2000  # characters of a link; browsers take few more
LARGE = 224  # pixels
MEDIUM = 160
SMALL = 112

NEAR_TO_WORDS = "0.2 to 0.35 is near; pictures are nearer to each other"

SAME_FILE = "same file"
SAME_PICTURE = "same picture"  # to the last bit of what the model sees


@dataclass(frozen=True)
class Answer:
    """A question with the pictures nearest to it."""

    question: str
    matches: list[Match]


@dataclass(frozen=True)
class View:
    """What the fetch of a picture told: what the model sees of it, and what its file is like."""

    levels: np.ndarray
    sight: bytes  # checksum of the levels
    file: bytes  # checksum of the file
    size: int  # bytes of the file
    pixels: tuple[int, int] | None  # width and height, where they are known

    @property
    def measures(self) -> str:
        """As in: 1500 x 1000, 240 KB."""
        size = f"{math.ceil(self.size / 1000):,} KB"
        if not self.pixels:
            return size
        width, height = self.pixels
        return f"{width} x {height}, {size}"

    def thumbnail(self, side: int) -> str:
        """The address of an image that is in the page itself."""
        data = io.BytesIO()
        Image.fromarray(self.levels).resize((side, side)).save(data, "WEBP", quality=75)
        return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


Views = Mapping[Id, View | str]  # of pictures that were to be fetched; text: why there is none
Group = list[Match]  # pictures that look the same, each with its cosine to the nearest of them


def answer_questions(store: Store, settings: Settings, status: Status) -> int:
    """What --search does: prints the pictures nearest to each question, best first. Embeds nothing
    else. Returns the exit code; raises RunError."""
    if not status.done:
        raise RunError(
            f"nothing is embedded yet as {settings.model_version}: run without --search first"
        )
    vectors = question_vectors(settings)
    answers = []
    for question, vector in zip(settings.search, vectors, strict=True):
        answers.append(Answer(question, store.search(vector, settings.limit or MATCHES)))
    with contextlib.suppress(OSError):  # as in: ... | head -1
        for answer in answers:
            for match in answer.matches:
                print(answer_line(answer.question, match, settings))
        sys.stdout.flush()
    if settings.gallery:
        write_gallery(store, settings, status, answers)
    return 0


def answer_line(question: str, match: Match, settings: Settings) -> str:
    """Similarity, name, and path or id; and the question where there are several."""
    where = str(match.picture.id)
    if settings.local:
        where = str(settings.local / match.picture.image)
    columns = [f"{match.similarity:.3f}", match.picture.name, where]
    if len(settings.search) > 1:
        columns.append(question)
    return "\t".join(map(printable, columns))


def question_vectors(settings: Settings) -> list[np.ndarray]:
    """The vector (512,) of each question; loads only the towers that these need."""
    places = {question: picture_place(question) for question in settings.search}
    pixels = {
        question: question_pixels(question, place, settings)
        for question, place in places.items()
        if place
    }
    words = [question for question in places if question not in pixels]
    vectors: dict[str, np.ndarray] = {}
    if pixels:
        made = ClipEncoder(settings).encode(np.stack(list(pixels.values())))
        vectors.update(zip(pixels, made, strict=True))
    if words:
        log.info("for words %s", NEAR_TO_WORDS)
        vectors.update(zip(words, TextEncoder(settings).encode(words), strict=True))
    return [vectors[question] for question in settings.search]


def picture_place(question: str) -> Source | None:
    """Where the picture is that a question names: a URL, or a file that is there. None: it is
    words. Raises RunError for what looks like a file and is none."""
    if re.match("(?i)https?://", question):
        return Source(question, {})
    if os.path.isfile(question):  # noqa: PTH113 - Path's raises for many words
        return Source(Path(question), {})
    if image_ending(question) in IMAGE_SUFFIXES:
        raise RunError(f"--search {question}: there is no such file")
    return None


def question_pixels(question: str, place: Source, settings: Settings) -> np.ndarray:
    """The pixels (3, 224, 224) of a question's picture; raises RunError."""
    try:
        return normalise(Decoder().decode(Fetcher(settings).fetch(place)))
    except ImageError as error:
        raise RunError(f"--search {shorten(question, 200)}: {error}") from None


def write_gallery(
    store: Store, settings: Settings, status: Status, answers: Sequence[Answer] = ()
) -> None:
    """Writes the page, and the table beside it. Raises RunError where that can't be done."""
    log.info("making the page")
    catalog = store.catalog()
    groups = groups_of(catalog.pairs)
    shown = {match.picture for group in groups[:SHOWN_GROUPS] for match in group[:SHOWN_MEMBERS]}
    for answer in answers:
        shown.update(match.picture for match in answer.matches[:SHOWN_MATCHES])
    for sample in catalog.samples:
        shown.add(sample.picture)
        shown.update(match.picture for match in sample.nearest)
    views = views_of(shown, store, settings)
    groups.sort(key=lambda group: not are_copies(group[:SHOWN_MEMBERS], views))  # these first
    page = Page(settings, views)
    written = settings.gallery or Path()
    try:
        written.write_text(page.whole(status, catalog, groups, answers), "utf-8", "replace")
        write_table(table_beside(written), groups, catalog.failures, views)
    except OSError as error:
        raise RunError(f"{error.filename} can't be written: {error.strerror}") from None
    log.info("for a spreadsheet: %s", table_beside(written))
    log.info("look at %s", written.as_uri())


def rows_alike(vectors: np.ndarray) -> tuple[list[tuple[int, int, float]], int]:
    """The pairs of rows of unit vectors (n, 512) whose cosine is SAME or more; and how many rows
    were compared with all others before LOOK_SECONDS were over.

    Equal rows come first, each paired with the first of its kind, which then stands for all. The
    rest is geometry: a rotation keeps distances (whose square is 2 - 2 cosine), and on a few of
    its axes no two points are farther apart than on all. So most pairs are ruled out on the AXES
    that tell most, and by their order along the first of these.
    """
    if not len(vectors):
        return [], 0
    deadline = time.monotonic() + LOOK_SECONDS
    pairs = []
    first: dict[bytes, int] = {}
    for row, vector in enumerate(vectors):
        known = first.setdefault(vector.tobytes(), row)
        if known != row:
            pairs.append((known, row, 1.0))
    copies = len(pairs)
    rows = np.array(list(first.values()), int)
    mean = vectors.mean(axis=0)
    spread = vectors.T @ vectors - len(vectors) * np.outer(mean, mean)
    points = vectors[rows] @ np.linalg.eigh(spread)[1][:, -AXES:]
    order = np.argsort(points[:, -1])
    rows = rows[order]
    points = points[order]
    vectors = vectors[rows]
    halves = (points * points).sum(axis=1, keepdims=True) / 2
    ones = np.ones_like(halves)
    left = np.hstack([points, -halves, ones])  # left @ right.T is -distance^2 / 2 on these axes
    right = np.hstack([points, ones, -halves])
    for start in range(0, len(rows), BLOCK):
        late = time.monotonic() > deadline or len(pairs) > MOST_PAIRS
        if start and late:
            return pairs, copies + start
        ours = slice(start, start + BLOCK)
        for other in range(start, len(rows), BLOCK):
            theirs = slice(other, other + BLOCK)
            if points[other, -1] - points[ours][-1, -1] > REACH:
                break
            if (left[ours] @ right[theirs].T).max() < SAME - 1 - ROUNDING:
                continue
            cosines = vectors[ours] @ vectors[theirs].T
            for i, j in np.argwhere(cosines >= SAME):
                if start + i < other + j:
                    pairs.append((int(rows[start + i]), int(rows[other + j]), float(cosines[i, j])))
    return pairs, len(rows) + copies


def groups_of(pairs: list[Pair]) -> list[Group]:
    """The pairs joined: a picture in four copies is one group. The most alike come first."""
    group_of: dict[Id, dict[Picture, float]] = {}
    for pair in pairs:
        group = group_of.setdefault(pair.one.id, {pair.one: 0.0})
        joined = group_of.setdefault(pair.other.id, {pair.other: 0.0})
        if joined is not group:
            if len(joined) > len(group):
                group, joined = joined, group
            group.update(joined)
            for picture in joined:
                group_of[picture.id] = group
        for picture in (pair.one, pair.other):
            group[picture] = max(group[picture], pair.similarity)
    distinct = {id(group): group for group in group_of.values()}
    groups = []
    for group in distinct.values():
        matches = [Match(picture, similarity) for picture, similarity in group.items()]
        matches.sort(key=lambda match: -match.similarity)
        groups.append(matches)
    groups.sort(key=lambda matches: -matches[-1].similarity)
    return groups


def views_of(pictures: set[Picture], store: Store, settings: Settings) -> Views:
    """What the fetch of each picture gave, or why it gave nothing. All together they get the time
    of one image: no host keeps the page waiting."""
    loader = Loader(settings)
    pool = ThreadPoolExecutor(settings.workers)
    futures = {picture.id: pool.submit(view_of, picture, store, loader) for picture in pictures}
    wait(futures.values(), settings.fetch_seconds + 1)
    views: dict[Id, View | str] = {}
    for asset, future in futures.items():
        if not future.done():
            future.cancel()
            views[asset] = "not in time"
        elif future.exception():
            views[asset] = str(future.exception())
        else:
            views[asset] = future.result()
    return views


def view_of(picture: Picture, store: Store, loader: Loader) -> View:
    """Fetches a picture and looks at it; raises ImageError."""
    data = loader.fetch(store.locate(Asset(picture.id, picture.image))).data
    levels = loader.decode(data)
    sight = hashlib.sha256(levels.tobytes()).digest()
    return View(levels, sight, hashlib.sha256(data).digest(), len(data), pixels_of(data))


def pixels_of(data: bytes) -> tuple[int, int] | None:
    """Width and height, of formats whose headers Python reads by itself: what may crash is for the
    decoders' processes."""
    try:
        return Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "GIF"]).size
    except Exception:  # Pillow raises nearly every type there is
        return None


def copies_in(group: Group, views: Views) -> dict[Id, str]:
    """Which pictures of a group are copies of others in it, as far as they were fetched; with a
    number where they are copies of different pictures."""
    known = {}
    for match in group:
        view = views.get(match.picture.id)
        if isinstance(view, View):
            known[match.picture.id] = view
    files = Counter(view.file for view in known.values())
    sights = Counter(view.sight for view in known.values())
    copied = [sight for sight, count in sights.items() if count > 1]
    copies = {}
    for asset, view in known.items():
        if view.sight not in copied:
            continue
        copies[asset] = SAME_FILE if files[view.file] > 1 else SAME_PICTURE
        if len(copied) > 1:
            copies[asset] += f" {copied.index(view.sight) + 1}"
    return copies


def are_copies(group: Group, views: Views) -> bool:
    """Whether all pictures of a group are known to be copies of one."""
    sights = set()
    for match in group:
        view = views.get(match.picture.id)
        if not isinstance(view, View):
            return False
        sights.add(view.sight)
    return len(sights) == 1


STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --line: #e3e3df; --dim: #66665f;
  --mark: #e4f2e7; --ink: #17311d }
@media (prefers-color-scheme: dark) { :root { --page: #131314; --card: #1e1e20; --line: #353538;
  --dim: #a5a59f; --mark: #1f3a28; --ink: #d5f0dc } }
* { box-sizing: border-box }
body { max-width: 1400px; margin: 0 auto; padding: 1.5rem clamp(.75rem, 3vw, 2.5rem) 4rem;
  background: var(--page); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2 }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.3rem }
h3 { margin: 0 0 .6rem; font-size: .95rem }
a { color: inherit }
p { margin: .25rem 0 1rem; max-width: 62em; color: var(--dim) }
nav { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)) }
nav a { padding: .7rem 1rem; border: 1px solid var(--line); border-radius: .7rem;
  background: var(--card); color: var(--dim); text-decoration: none }
nav a:hover { border-color: currentcolor }
nav b { display: block; color: CanvasText; font-size: 1.5rem; line-height: 1.2 }
.cards { columns: 20rem; column-gap: .9rem }
.cards article { break-inside: avoid }
.cards > h3 { break-after: avoid }
.cards > ul { margin-bottom: 1.2rem }
article { margin-bottom: .9rem; padding: .9rem; border: 1px solid var(--line);
  border-radius: .8rem; background: var(--card) }
article p { margin: 0 }
.twos, .threes, .nearest { display: grid; gap: .75rem;
  grid-template-columns: repeat(2, minmax(0, 1fr)) }
.threes { grid-template-columns: repeat(3, minmax(0, 1fr)) }
.nearest { grid-template-columns: repeat(6, minmax(0, 1fr)) }
figure { margin: 0; min-width: 0 }
figure a { display: block; border-radius: .5rem }
img, .none { display: block; width: 100%; aspect-ratio: 1; border-radius: .5rem;
  box-shadow: 0 0 0 1px var(--line) }
.none { display: grid; place-content: center; padding: .5rem; color: var(--dim);
  font-size: .75rem; text-align: center; overflow: hidden }
figcaption { margin-top: .35rem; font-size: .8rem; line-height: 1.35 }
li:last-child { margin: 0 }
figcaption b { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4;
  overflow: hidden }
figcaption small { display: block; color: var(--dim); font-size: .72rem }
mark { padding: .1rem .45rem; border-radius: 1rem; background: var(--mark); color: var(--ink);
  font-size: .72rem; white-space: nowrap }
.sample { display: grid; gap: 1.1rem; grid-template-columns: minmax(9rem, 1fr) 4.5fr }
details { margin-bottom: .75rem }
summary { padding: .3rem 0; color: var(--dim); cursor: pointer }
ul { margin: .5rem 0 0; padding: 0; list-style: none; font-size: .85rem }
li { margin-bottom: .45rem; break-inside: avoid }
li small { display: block; color: var(--dim) }
@media (max-width: 999px) {
  .sample { grid-template-columns: 1fr 2fr }
  .sample .nearest { grid-template-columns: repeat(3, minmax(0, 1fr)) }
}
@media (max-width: 699px) {
  nav a { padding: .5rem .6rem; font-size: .8rem; line-height: 1.25 }
  .sample { grid-template-columns: 1fr }
  .sample > figure { display: grid; gap: .75rem; grid-template-columns: 7rem 1fr }
  .nearest { grid-template-columns: repeat(3, minmax(0, 1fr)) }
}
"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
<header><h1>{title}</h1><p>{about}</p></header>
<nav aria-label="Sections">{links}</nav>
<main>{sections}</main>
</html>
"""


class Page:
    """The page that --gallery writes, part by part. It loads nothing and runs nothing, so it can
    be sent around. Text from outside goes through html.escape."""

    def __init__(self, settings: Settings, views: Views) -> None:
        self._settings = settings
        self._views = views
        self._file = settings.gallery or Path()
        self._clients = "folders" if settings.local else "clients"
        table = table_beside(self._file).name
        self._table = (
            f'<a href="{quote(table)}" target="_blank" rel="noreferrer">{html.escape(table)}</a>'
        )

    def whole(
        self, status: Status, catalog: Catalog, groups: list[Group], answers: Sequence[Answer]
    ) -> str:
        """The page's HTML."""
        links = [
            ("same", len(groups), "group", "looking the same"),
            ("failed", len(catalog.failures), "picture", "that can't be used"),
            ("alike", len(catalog.samples), "sample", "of look-alikes"),
        ]
        sections = [
            self._same(catalog, groups),
            self._failed(catalog.failures),
            self._alike(catalog.samples),
        ]
        if answers:
            sections.insert(0, self._asked(answers))
        now = datetime.now()
        about = (
            f"{status.done:,} of {status.assets:,} pictures embedded · "
            f"{now.day} {now:%B %Y, %H:%M} · {self._settings.model_version}"
        )
        anchors = [
            f'<a href="#{to}"><b>{count:,}</b>{plural(count, noun)} {rest}</a>'
            for to, count, noun, rest in links
        ]
        return PAGE.format(
            title=html.escape(title_of(self._settings)),
            style=STYLE,
            about=html.escape(about),
            links="".join(anchors),
            sections="".join(sections),
        )

    def _asked(self, answers: Sequence[Answer]) -> str:
        articles = as_many_as_fit(map(self._answer, answers), ANSWER_ROOM)
        return f"<h2>Asked</h2><p>Nearest first. For words {NEAR_TO_WORDS}.</p>{''.join(articles)}"

    def _answer(self, answer: Answer) -> str:
        question = html.escape(shorten(answer.question, 100))
        figures = [self._found(match, MEDIUM) for match in answer.matches[:SHOWN_MATCHES]]
        return (
            f'<article><h3>{question}</h3><div class="nearest">{"".join(figures)}</div></article>'
        )

    def _same(self, catalog: Catalog, groups: list[Group]) -> str:
        numbered = list(enumerate(groups, 1))
        cards = as_many_as_fit(itertools.starmap(self._card, numbered[:SHOWN_GROUPS]), GROUP_ROOM)
        parts = [
            '<h2 id="same">Looks the same</h2><p>Copies, resized pictures, or variants of one '
            "product: look before you delete. A picture leads to its original. All groups are in "
            f"{self._table}, for a spreadsheet.</p><details><summary>What counts as the same?"
            f"</summary><p>{self._what_counts(catalog)}</p></details>",
            self._cards(cards, OPEN_GROUPS, "group"),
            self._without_pictures(numbered[len(cards) :]),
        ]
        if not groups:
            parts.append("<p>No two pictures do.</p>")
        if catalog.compared < catalog.embedded:
            parts.append(
                f"<p>Time was short: of {catalog.embedded:,} pictures {catalog.compared:,} were "
                f"compared with all others, {catalog.sought_among:,} looked through for copies.</p>"
            )
        return "".join(parts)

    def _cards(self, cards: list[str], shown: int, noun: str) -> str:
        """Cards side by side, all but the first folded."""
        text = f'<div class="cards">{"".join(cards[:shown])}</div>'
        folded = cards[shown:]
        if not folded:
            return text
        return (
            f"{text}<details><summary>{counted(len(folded), f'more {noun}')}</summary>"
            f'<div class="cards">{"".join(folded)}</div></details>'
        )

    def _without_pictures(self, numbered: list[tuple[int, Group]]) -> str:
        """Groups as text: those whose pictures have no room."""
        if not numbered:
            return ""
        lines = as_many_as_fit(itertools.starmap(self._group_in_words, numbered), TEXT_ROOM)
        more = ""
        if len(lines) < len(numbered):
            more = f"<p>And {len(numbered) - len(lines):,} more: see {self._table}.</p>"
        summary = f"And {counted(len(numbered), 'more group')}, without pictures"
        return (
            f"<details><summary>{summary}</summary>"
            f'<div class="cards">{"".join(lines)}</div>{more}</details>'
        )

    def _group_in_words(self, number: int, group: Group) -> str:
        return f"<h3>{self._title(number, group)}</h3>{self._names(group)}"

    def _what_counts(self, catalog: Catalog) -> str:
        text = (
            f"A similarity of {SAME} or more: photo libraries such as immich draw the line there, "
            "too. 1.000 may also be a picture that was saved again or resized. What counts is the "
            f"square in its middle, as shown here: “{SAME_PICTURE}” marks those that are equal in "
            f"it, “{SAME_FILE}” files that are equal as a whole."
        )
        if catalog.typical is None:
            return text
        return f"{text} Pictures that have little in common have {catalog.typical:.2f} here."

    def _card(self, number: int, group: Group) -> str:
        """A group with its pictures; copies are marked."""
        copies = copies_in(group, self._views)
        figures = [
            self._found(match, MEDIUM, copies.get(match.picture.id, ""))
            for match in group[:SHOWN_MEMBERS]
        ]
        more = ""
        if len(group) > SHOWN_MEMBERS:
            more = (
                f"<details><summary>and {len(group) - SHOWN_MEMBERS:,} more</summary>"
                f"{self._names(group[SHOWN_MEMBERS:])}</details>"
            )
        columns = "twos" if len(group) in (2, 4) else "threes"
        return (
            f"<article><h3>{self._title(number, group)}</h3>"
            f'<div class="{columns}">{"".join(figures)}</div>{more}</article>'
        )

    def _title(self, number: int, group: Group) -> str:
        """As in: Group 7: 3 copies, in 2 clients. The number is also the table's."""
        are = "copies" if are_copies(group, self._views) else "look the same"
        title = f"Group {number:,}: {len(group):,} {are}"
        clients = {match.picture.client for match in group}
        if len(clients) > 1:
            title = f"{title}, in {len(clients):,} {self._clients}"
        return title

    def _names(self, group: Group) -> str:
        """Pictures of a group as text, with their ids."""
        lines = []
        for match in group[:SHOWN_NAMES]:
            name = self._link(match.picture, html.escape(shorten(match.picture.name)))
            rest = [f"{match.similarity:.3f}", shorten(str(match.picture.id), 160)]
            if not self._settings.local:  # there the id has the folder in it
                rest.insert(1, shorten(match.picture.client))
            small = html.escape(" · ".join(filter(None, rest)))
            lines.append(f"<li><b>{name}</b><small>{small}</small></li>")
        if len(group) > SHOWN_NAMES:
            lines.append(f"<li>and {len(group) - SHOWN_NAMES:,} more: see {self._table}</li>")
        return f"<ul>{''.join(lines)}</ul>"

    def _failed(self, failures: list[FailedPicture]) -> str:
        parts = [
            '<h2 id="failed">Can\'t be used</h2><p>These have no vector: no search finds them. All '
            f"are in {self._table}.</p>"
        ]
        by_reason: dict[str, list[FailedPicture]] = {}
        for failure in failures:
            by_reason.setdefault(failure.reason, []).append(failure)
        largest_first = sorted(by_reason, key=lambda reason: -len(by_reason[reason]))
        cards = [self._reason(reason, by_reason[reason]) for reason in largest_first]
        cards = as_many_as_fit(cards, FAILURE_ROOM)
        parts.append(self._cards(cards, OPEN_REASONS, "reason"))
        if len(cards) < len(by_reason):
            more = counted(len(by_reason) - len(cards), "more reason")
            parts.append(f"<p>And {more}: see {self._table}.</p>")
        if not failures:
            parts.append("<p>None: what was tried could be used.</p>")
        return "".join(parts)

    def _reason(self, reason: str, failures: list[FailedPicture]) -> str:
        """What failed for one reason, with what to do about it."""
        again = "Tried again when the address changes, or with --retry-failed."
        if self._settings.local:
            again = "Tried again when the file changes."
        lines = [self._failure(failure.picture) for failure in failures[:SHOWN_NAMES]]
        if len(failures) > SHOWN_NAMES:
            lines.append(f"<li>and {len(failures) - SHOWN_NAMES:,} more: see {self._table}</li>")
        names = f"<ul>{''.join(lines)}</ul>"
        if len(failures) > OPEN_NAMES:
            names = f"<details><summary>Which they are</summary>{names}</details>"
        title = html.escape(shorten(reason[:1].upper() + reason[1:], 200))
        return (
            f"<article><h3>{title} <mark>{len(failures):,}</mark></h3>"
            f"<p>{advice(reason)} {again}</p>{names}</article>"
        )

    def _failure(self, picture: Picture) -> str:
        name = html.escape(shorten(picture.name))
        value = html.escape(shorten(picture.image or str(picture.id), 160))
        client = ""
        if picture.client and not self._settings.local:  # there the value has the folder in it
            client = f" · {html.escape(shorten(picture.client))}"
        return f"<li><b>{self._link(picture, name)}</b>{client}<small>{value}</small></li>"

    def _alike(self, samples: list[Sample]) -> str:
        rows = as_many_as_fit(map(self._sample, samples), SAMPLE_ROOM)
        return (
            '<h2 id="alike">Looks alike</h2><p>Some pictures from all over, each with the nearest '
            f"to it: what a shop would show as similar.</p>{''.join(rows)}"
        )

    def _sample(self, sample: Sample) -> str:
        nearest = [self._found(match, SMALL) for match in sample.nearest]
        return (
            f'<article class="sample">{self._figure(sample.picture, LARGE)}'
            f'<div class="nearest">{"".join(nearest)}</div></article>'
        )

    def _found(self, match: Match, side: int, mark: str = "") -> str:
        return self._figure(match.picture, side, f"{match.similarity:.3f}", mark)

    def _figure(self, picture: Picture, side: int, note: str = "", mark: str = "") -> str:
        """A picture, or why there is none; its name comes first."""
        view = self._views.get(picture.id, "")
        name = html.escape(shorten(picture.name, 200))
        short = html.escape(shorten(picture.name, 36))
        client = picture.client
        if self._settings.local:
            client = client or self._settings.local.name
        notes = [note, shorten(client)]
        if isinstance(view, View):
            shown = f'<img src="{view.thumbnail(side)}" alt="{name}">'
            if side != SMALL:
                notes.append(view.measures)
        else:
            shown = f'<span class="none">{html.escape(view)}</span>'
        lines = [f"<small><bdi>{html.escape(line)}</bdi></small>" for line in notes if line]
        if mark:
            lines.append(f"<mark>{mark}</mark>")
        return (
            f'<figure>{self._link(picture, shown)}<figcaption title="{name}"><b><bdi>{short}'
            f"</bdi></b>{''.join(lines)}</figcaption></figure>"
        )

    def _link(self, picture: Picture, shown: str) -> str:
        """HTML that leads to the picture's original, where there is an address that can."""
        address = picture.image
        if self._settings.local:
            path = self._settings.local / picture.image
            try:
                address = quote(Path(os.path.relpath(path, self._file.parent)).as_posix())
            except ValueError:  # on another drive
                address = path.as_uri()
        elif address.startswith("//"):
            address = f"https:{address}"
        elif address.startswith(STORAGE):
            address = f"{self._settings.url}{address}"
        elif not re.match("(?i)https?://", address) or len(address) > LONGEST_ADDRESS:
            return shown
        return f'<a href="{html.escape(address)}" target="_blank" rel="noreferrer">{shown}</a>'


def as_many_as_fit(parts: Iterable[str], room: int) -> list[str]:
    """The first parts, `room` bytes in all at most."""
    taken = []
    for part in parts:
        room -= len(part.encode("utf-8", "replace"))
        if room < 0:
            break
        taken.append(part)
    return taken


def title_of(settings: Settings) -> str:
    """The shop's name: its folder's, or its project's host; with the client, if it is of one."""
    shop = urlsplit(settings.url).netloc
    if settings.local:
        shop = settings.local.name or "Pictures"
    if settings.client:
        return f"{settings.client} · {shop}"
    return shop


TABLE_COLUMNS = [
    "what",
    "group",
    "name",
    "client",
    "similarity",
    "copy",
    "width",
    "height",
    "bytes",
]
TABLE_COLUMNS += ["id", "image", "reason", "advice"]


def table_beside(page: Path) -> Path:
    """Where the table of a page is."""
    return page.with_suffix(".csv")


def write_table(
    path: Path, groups: list[Group], failures: list[FailedPicture], views: Views
) -> None:
    """Writes every group and every failure, for a spreadsheet. (utf-8-sig: without its first bytes
    Excel takes it for another encoding.)"""
    with path.open("w", encoding="utf-8-sig", errors="replace", newline="") as file:
        table = csv.DictWriter(file, TABLE_COLUMNS, restval="")
        table.writeheader()
        for number, group in enumerate(groups, 1):
            copies = copies_in(group, views)
            for match in group:
                row = picture_columns(match.picture, views)
                row |= {"what": "looks the same", "group": number}
                row["similarity"] = f"{match.similarity:.6f}"
                row["copy"] = copies.get(match.picture.id, "")
                table.writerow(row)
        for failure in failures:
            row = picture_columns(failure.picture, views)
            row |= {"what": "can't be used", "reason": cell(failure.reason)}
            row["advice"] = advice(failure.reason)
            table.writerow(row)


def picture_columns(picture: Picture, views: Views) -> dict[str, Any]:
    """A picture's part of a row."""
    row: dict[str, Any] = {name: cell(getattr(picture, name)) for name in ("name", "client")}
    row |= {"id": cell(str(picture.id)), "image": cell(picture.image)}
    view = views.get(picture.id)
    if isinstance(view, View):
        row["bytes"] = view.size
        if view.pixels:
            row["width"], row["height"] = view.pixels
    return row


def cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula, nor for too long (32,767 characters)."""
    text = shorten(text, LONGEST_ADDRESS)
    if text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{text}"
    return text


def page_file(text: str) -> Path:
    """A flag's path of a page; raises ArgumentTypeError where that, or the table beside it, can't
    be written, or where the table would take the place of somebody's own."""
    page = full_path(text)
    if page.suffix != ".html":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .html")
    table = table_beside(page)
    for path in (page, table):
        if path.exists() and not path.is_file():  # a pipe would wait for somebody who reads it
            raise argparse.ArgumentTypeError(f"'{path}' is no file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"'{path}' can't be written")
    if table.exists():
        with table.open(encoding="utf-8-sig", errors="replace") as lines:
            if lines.readline(500).strip() != ",".join(TABLE_COLUMNS):
                raise argparse.ArgumentTypeError(f"'{table}' is yours: take another name")
    return page


def question(text: str) -> str:
    """A flag's question; raises ArgumentTypeError for an empty one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("there is no question")
    return text


# ========================================================================= Command line

EXAMPLES = """\
examples:
  %(prog)s --local photos --gallery gallery.html
  %(prog)s --client "BigClient" --limit 10
  %(prog)s --local photos --search "red mug" --search mug.jpg

settings, from the environment or .env (README.md explains them):
  SUPABASE_URL, SUPABASE_SECRET_KEY, STORAGE_BUCKETS, CLIP_MODEL, MODEL_VERSION,
  FETCH_SECONDS, DB_RETRY_SECONDS, ALLOW_PRIVATE_IMAGE_HOSTS

exit codes:
  0 all done, 1 some images failed, 2 could not run, or not go on,
  130 interrupted (143 by SIGTERM, 129 by a closed terminal)
"""


class Parser(argparse.ArgumentParser):
    """argparse's, which also says which flag is near a mistyped one."""

    def error(self, message: str) -> Any:
        mistyped = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if mistyped:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(mistyped[1], flags, n=1)
            if near:
                message = f"{message}: did you mean {near[0]}?"
        super().error(message)


def parser() -> argparse.ArgumentParser:
    """The command line's flags; those not given, but --workers, have the defaults of Settings."""
    usage = Parser(
        usage="%(prog)s [--limit N] [--client NAME] [--local DIR] [...]   -h: all flags",
        description="Give every product image in a Supabase database, or in a folder, "
        "a CLIP embedding. Run again to resume.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    most = min(MOST_WORKERS, WORKERS_PER_CORE * cores())
    workers = f"downloads at once ({WORKERS_PER_CORE} a core; not over {MOST_WORKERS})"

    search = f"embed nothing, print the {MATCHES} nearest to this (or --limit N); may be repeated"

    what = usage.add_argument_group("what to embed").add_argument
    what("--limit", type=positive_number, metavar="N", help="attempt at most N assets")
    what("--client", metavar="NAME", help="only this client's (with --local: subfolder's) images")
    what("--local", type=full_path, metavar="DIR", help="embed a folder's images; needs no account")
    what("--shard", type=shard, metavar="I/N", help="only part I of N parts of a database")
    what("--retry-failed", action="store_true", help="try all that failed before, also for good")

    speed = usage.add_argument_group("how fast").add_argument
    speed("--workers", type=positive_number, default=most, metavar="N", help=workers)
    speed("--batch-size", type=positive_number, metavar="N", help="images to a core's batch (1)")
    speed("--dtype", choices=["float32", "bfloat16"], help="number format (float32)")
    speed("--device", choices=["cpu", "cuda", "mps"], help="where the model runs (cpu)")

    show = usage.add_argument_group("what to show").add_argument
    show("--search", action="append", type=question, metavar="TEXT|FILE|URL", help=search)
    show(
        "--gallery",
        type=page_file,
        metavar="FILE",
        help="at the end, write a page to look at (.html), and a table beside it (.csv)",
    )
    show("--dry-run", action="store_true", help="say what would be done; load and write nothing")
    show("-v", "--verbose", action="store_true", help="say each failure as it happens, and more")
    show("--version", action="store_true", help="say what a bug report needs, and exit")
    return usage


def read_flags(argv: list[str] | None) -> dict[str, Any]:
    """The flags that were given; exits with 2 where they are of no use."""
    usage = parser()
    flags = vars(usage.parse_args(argv))
    if "search" in flags and "dry_run" in flags:
        usage.error("--search changes nothing, so there is no --dry-run of it")
    if "shard" in flags and "local" in flags:
        usage.error("--shard is for a database; for a part of a folder there is --client SUBFOLDER")
    return flags


def positive_number(text: str) -> int:
    """A flag's number; raises ArgumentTypeError below 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def shard(text: str) -> Shard:
    """ "I/N" as a part; raises ArgumentTypeError for what is none."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part like 1/4, 2/4, 3/4 or 4/4")
    return Shard(int(found[1]), int(found[2]))


def full_path(text: str) -> Path:
    """A flag's path, whatever the current folder is later."""
    return Path(text).resolve()


class Setting(NamedTuple):
    """A field of Settings that comes from the environment or .env."""

    field: str
    names: tuple[str, ...]  # the first that has a value counts
    pattern: str  # its group is the value
    advice: str  # what is said of a value that does not look so
    read: Callable[[str], Any] = str


A_URL = r"(https?://(?!YOUR-PROJECT|supabase\.com/)[\w-]+(?:\.[\w-]+)*(?::\d{1,5})?(?:/[\w.-]+)*?)"
A_KEY = r"(sb_secret_[\w-]+|[\w-]+\.[\w-]+\.[\w-]+)"
A_TEXT = r"([^\x00-\x1f\x7f-\x9f\ud800-\udfff]+)"
A_NUMBER = r"(\d+(?:\.\d+)?)"
NOT_A_TEXT = "has a control character in it"
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
    try:
        file = nearest_env_file()
        # Nothing in a key is filled in: a ${...} there is part of it.
        in_file = dotenv.dotenv_values(file, encoding="utf-8-sig", interpolate=False)
    except (UnicodeDecodeError, OSError):
        raise RunError(
            f"{file} can't be read: it must be text in UTF-8, and yours to read"
        ) from None
    needs_database = "local" not in flags
    found: dict[str, FoundSetting] = {}
    for setting in SETTINGS:
        of_database = setting.field in ("url", "key")
        if of_database and not needs_database:
            continue
        value = find_setting(setting, file, in_file)
        if value:
            found[setting.field] = value
        elif of_database:
            raise RunError(how_to_set(setting.names[0], file))
    values = flags | {name: setting.value for name, setting in found.items()}
    if needs_database:
        values["key_source"] = str(found["key"])
        if found["url"].origin != found["key"].origin:
            # A folder's .env must not get the environment's key in silence.
            log.info("%s, %s", found["url"], found["key"])
    return Settings(**values)


class FoundSetting(NamedTuple):
    """A setting's value, its name, and in words where that was read."""

    value: Any
    name: str
    origin: str

    def __str__(self) -> str:
        return f"{self.name} (from {self.origin})"


def nearest_env_file() -> Path:
    """The .env of the current folder, else the one beside this script."""
    file = full_path(".env")
    if file.is_file() or file.with_name(".env.local").is_file():
        return file
    return HERE / ".env"


def find_setting(
    setting: Setting, file: Path, in_file: Mapping[str, str | None]
) -> FoundSetting | None:
    """A setting's value, from the environment, else from .env; raises RunError where it does not
    look like one."""
    for name in setting.names:
        given = os.environ.get(name, "").strip()
        kept = (in_file.get(name) or "").strip()
        if not given and not kept:
            continue
        origin = str(file)
        if given:
            origin = "the environment"
            if kept not in ("", given):
                origin = f"the environment, which hides the one in {file}"
        looks_right = re.fullmatch(setting.pattern, given or kept, re.ASCII)
        if not looks_right:
            raise RunError(f"{FoundSetting(None, name, origin)} {setting.advice}")
        return FoundSetting(setting.read(looks_right[1]), name, origin)
    return None


def how_to_set(name: str, file: Path) -> str:
    """What to say where a setting is lacking."""
    where = str(file)
    if file.with_name(".env.local").is_file():
        where = f"{file}, not .env.local, which is not read"
    return (
        f"{name} is not set: put it into {where} (.env.example shows how), "
        "or use --local DIR, which needs no account"
    )


def say_version() -> None:
    """Prints the versions, and the arithmetic that would be used."""
    import torch

    python = sys.version.split()[0]
    print(f"generate_embeddings.py {VERSION}, schema.sql {CONTRACT}, Python {python}")
    print(f"{MODEL_VERSION}: {MODEL_ID} at {MODEL_REVISION}")
    kind = torch.backends.cpu.get_cpu_capability()
    bfloat16 = "yes" if has_bfloat16() else "no"
    print(f"torch {torch.__version__}, {kind}, bfloat16: {bfloat16}")


def say_error(trouble: str) -> None:
    """Says on stderr why the run ended, on a terminal in lines of its width."""
    line = printable(f"error: {trouble}")
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    with contextlib.suppress(OSError):  # there may be nobody to read it
        print(line, file=sys.stderr)


class Log(logging.StreamHandler[Any]):
    """Logs to stderr while somebody reads it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        # What is left in a broken pipe's buffer would fail each start of a process.
        if isinstance(sys.exception(), OSError):
            sys.stderr = self.stream = Path(os.devnull).open("w")  # noqa: SIM115


class Lines(logging.Formatter):
    """Log lines without the control characters that ids, URLs and messages may hold."""

    def format(self, record: logging.LogRecord) -> str:
        record.msg = printable(record.getMessage())
        record.args = ()
        lines = super().format(record).split("\n")  # a traceback has several
        return "\n".join(printable(line) for line in lines)


def set_up_output(verbose: bool) -> None:
    """Logs to stderr, with the time where nobody watches."""
    handler = Log()
    look = "%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s"
    handler.setFormatter(Lines(look))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings have tracebacks in them
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not each encoding has all that names may hold.
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, AttributeError):  # as in: ... | head, or >&-
        sys.stdout.flush()
    # A download may hang in a thread, and Python would wait for it.
    os._exit(code)
