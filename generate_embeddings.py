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
# ///
"""Give every product image in a Supabase database (or a folder) a CLIP embedding.

    find pending assets -> load (fetch, decode) -> embed -> store -> report

    asset     one product image to embed: an id and where its image is
    pending   without an embedding of this model version; the store says which assets are
    levels    a uint8 array (224, 224, 3), what CLIP sees of an image
    pixels    the same as float32 (3, 224, 224), normalised: what its image tower takes
    vector    a float32 array (512,) of unit length, what that gives

Exit codes: 0 all done, 1 some assets failed, 2 could not run, 130 interrupted (143 by SIGTERM).
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # a stop while the imports go on: no traceback
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) != signal.SIG_IGN:  # as a background job's is
            signal.signal(_number, lambda number, _: os._exit(128 + number))
if sys.version_info < (3, 11):
    print("error: Python 3.11 or later is needed, not " + sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import argparse
import base64
import contextlib
import functools
import html
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import multiprocessing
import queue
import random
import re
import shutil
import socket
import sqlite3
import textwrap
import threading
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import DataHandler, Request
from zlib import crc32

HERE = Path(__file__).resolve().parent
INSTALL = "pip install -r requirements.txt"
if sys.prefix == sys.base_prefix:  # no virtual environment is active
    INSTALL = ". .venv/bin/activate && " + INSTALL
    INSTALL = INSTALL if (HERE / ".venv").is_dir() else "python3 -m venv .venv && " + INSTALL

try:
    import dotenv
    import numpy as np
    import requests
    import urllib3
    from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError
    from requests.adapters import HTTPAdapter
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm
except ImportError as error:
    print(f"error: {error}: run {INSTALL}", file=sys.stderr)
    sys.exit(2)

log = logging.getLogger("generate_embeddings")

# ------------------------------------------------------------------ the contract

VERSION = "2.0"
MODEL_ID = "openai/clip-vit-base-patch32"
MODEL_REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"  # pinned: vectors must not drift
MODEL_VERSION = "clip-vit-base-patch32"  # what rows carry; another value counts as lacking
MODEL_CACHE = HERE / ".cache" / "transformers"
VIT_B_32: dict[str, Any] = {"num_hidden_layers": 12, "hidden_size": 768, "patch_size": 32}
VIT_B_32 |= {"num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "quick_gelu"}
CONTRACT = 1  # the version of schema.sql's functions
DIMENSIONS = 512
SIDE = 224  # pixels; CLIP sees a square
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, by channel
STD = (0.26862954, 0.26130258, 0.27577711)

MAX_BYTES = 50 * 2**20  # of one image file
HEAVY_BYTES = 4 * 2**20  # of files above this at most HEAVY_FILES are downloaded at once
HEAVY_FILES = 4
MIN_SIDE = 16  # pixels; below it: tracking pixels and spacers
MAX_ASPECT = 100  # above it: rules and borders, of which CLIP would see a sliver
KEEP_SCALE = 3  # large images are first reduced to at least this many times SIDE
DECODE_SECONDS = 5  # of a core for one image; the largest honest ones take 2
DECODE_MB = 400  # of memory for one image, on each core: 45 megapixels in four channels, twice
DECODE_PATIENCE = 60.0  # seconds, on however busy a machine, until a decoder counts as hung

# A core embeds 10 (float32) to 40 images/s, more in batches; a host 300 ms away gives a worker 3
WORKERS_PER_CORE = 8
MOST_WORKERS = 64  # more at once few image hosts like
SLOW_SECONDS = 4.0  # a download that takes longer makes room for another
MOST_SLOW = 64  # downloads that do
FETCH_ATTEMPTS = 4
MAX_REDIRECTS = 5
READ_SECONDS = 10.0  # between two packets; the deadline for the whole is FETCH_SECONDS
HOST_FAILURES = 20  # in a row, none an image's own: the host's other images are left
HOSTS_DOWN = 3  # one after the other, with no image between: the network is gone

PAGE_ROWS = 250
WRITE_ROWS = 50  # results to a call; with an index at a million rows far below the 8 s timeout
WRITE_SECONDS = 2.0  # a result waits no longer than this, but for the batch before its own
ANSWER_SECONDS = 58.0  # of the database, for one question: Supabase's API ends calls after 60
CHECK_SECONDS = 5.0  # patience with the database before the run, when the URL may be wrong
POLL_SECONDS = 0.2  # how soon Ctrl-C is noticed
ECHO_SECONDS = 0.5  # signals that are this close count as one: timeout(1) sends each of its twice
LOG_EVERY = 10  # images, where there is no terminal

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".avif"}
IMAGE_SUFFIXES |= {".tif", ".tiff", ".bmp", ".heic", ".heif"}
# Other Pillow plugins stay shut: some start programs (EPS), none is a product photo.
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP"]

# ------------------------------------------------------------------ types


class RunError(Exception):
    """The run can't start or go on; the message is one line that says what to do."""


class Rejected(Exception):  # noqa: N818 - no error of the program
    """One image can't be used. `permanent`: trying again later would give the same.
    `retry_after`: seconds until another attempt in this run may help; None: none will."""

    def __init__(
        self, reason: str, permanent: bool = True, retry_after: float | None = None
    ) -> None:
        super().__init__(reason)
        self.permanent, self.retry_after = permanent, retry_after


def setting(default: Any, pattern: str, advice: str, *names: str) -> Any:
    """A field of Settings that the environment or .env gives by the first of these names: what
    the pattern's group holds. What does not match it is refused with the advice."""
    metadata = {"pattern": pattern, "advice": advice, "names": names}
    return field(default=default, repr=False, metadata=metadata)


URL_ADVICE = (
    "is not like https://abcdefghijkl.supabase.co: copy the project's URL from the dashboard "
    "(Connect), not the dashboard's own address, nor the key"
)
KEY_ADVICE = "copy a secret key (sb_secret_...) from the dashboard, Settings > API Keys"
NO_KEY = f"is no secret key, nor a legacy service_role key: {KEY_ADVICE}"
A_URL = r"(https?://(?!YOUR-PROJECT)[\w-]+(?:\.[\w-]+)*(?::\d{1,5})?)(?:/rest/v1)?/?"
A_KEY = r"(sb_secret_[\w-]+|[\w-]+\.[\w-]+\.[\w-]+)"
A_TEXT, NO_TEXT = r"([^\x00-\x1f\x7f-\x9f\ud800-\udfff]+)", "has a control character in it"
A_NUMBER, NO_NUMBER = r"(\d+(?:\.\d+)?)", "is not a number of seconds"


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on: the command line's flags, then the settings."""

    local: Path | None = None
    limit: int | None = None
    client: str | None = None
    shard: tuple[int, int] = (1, 1)
    workers: int = 8
    batch_size: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    gallery: Path | None = None
    dry_run: bool = False
    retry_failed: bool = False
    verbose: bool = False
    url: str = setting("", A_URL, URL_ADVICE, "SUPABASE_URL", "NEXT_PUBLIC_SUPABASE_URL")
    key: str = setting("", A_KEY, NO_KEY, "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY")
    model_version: str = setting(MODEL_VERSION, A_TEXT, NO_TEXT, "MODEL_VERSION")
    clip_model: str = setting("", A_TEXT, NO_TEXT, "CLIP_MODEL")
    fetch_seconds: float = setting(30.0, A_NUMBER, NO_NUMBER, "FETCH_SECONDS")
    db_retry_seconds: float = setting(180.0, A_NUMBER, NO_NUMBER, "DB_RETRY_SECONDS")
    private_hosts: bool = setting(False, "([01])", "is not 0 or 1", "ALLOW_PRIVATE_IMAGE_HOSTS")
    key_source: str = "SUPABASE_SECRET_KEY"  # the setting that it is of, and where that was read


Id = str | int  # uuid and text come as str


@dataclass(frozen=True)
class Asset:
    """One image to embed: the store's id of it, and a URL or a path."""

    id: Id
    image: str
    mark: int = 0  # the store's, of this very image: a hash of the URL, or the file's time
    size: int = 0  # bytes of the text `image`, which comes cut short where it is too large

    @functools.cached_property
    def host(self) -> str:
        """The image host; empty for files and for data: URLs."""
        with contextlib.suppress(ValueError):
            return urlsplit(self.image[:2000]).netloc.rpartition("@")[2]
        return ""

    def __str__(self) -> str:
        return self.image if self.id == self.image else f"{self.id}  {shorten(self.image)}"


@dataclass(frozen=True)
class Loaded:
    """An asset with its pixels, float32 (3, 224, 224)."""

    asset: Asset
    pixels: np.ndarray


@dataclass(frozen=True)
class Embedded:
    """An asset with its vector, float32 (512,) of unit length."""

    asset: Asset
    vector: np.ndarray


@dataclass(frozen=True)
class Failed:
    """An asset that got no vector. Stages: fetch, decode, embed, store."""

    asset: Asset
    stage: str
    reason: str
    permanent: bool = False

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


Result = Embedded | Failed


@dataclass(frozen=True)
class Status:
    """How many assets there are of the run's client and shard."""

    assets: int
    done: int
    failed: int  # for good
    waiting: int = 0  # failed several times: not yet tried again

    def __str__(self) -> str:
        counts = {"done": self.done, "failed for good": self.failed}
        counts["failed before, tried later"] = self.waiting
        told = "".join(f"{n:,} {what}, " for what, n in counts.items() if n)
        return f"{self.assets:,} asset{'s' * (self.assets != 1)}: {told}"


# Outcomes of schema.sql's store_embeddings that make no attempt
ASIDE = {
    "deleted": "deleted meanwhile",
    "superseded": "done by another run meanwhile",
    "changed": "got another image meanwhile: for the next run",
    "busy": "in the app's hands: for the next run",
}


class Report:
    """The counts of a run. An asset was attempted once the store took or refused its result."""

    def __init__(self, pending: int, skipped: int) -> None:
        self.pending = pending  # as counted before the run
        self.skipped = skipped  # failures of earlier runs that are not tried
        self.found = 0  # pending assets that came by
        self.found_all = False
        self.embedded = 0  # and stored
        self.gone = 0  # pending no more, though not by this run
        self.failures: Counter[str] = Counter()  # by what happened
        self.examples: dict[str, list[str]] = {}
        self.aside: Counter[str] = Counter()  # not attempted, by what happened
        self.started = time.monotonic()

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def attempted(self) -> int:
        return self.embedded + self.failed

    @property
    def left(self) -> int:
        """Assets that are still pending."""
        known = self.found if self.found_all else max(self.pending, self.found)
        return known - self.attempted - self.gone

    def count(self, result: Result, outcome: str, reason: str) -> None:
        """Takes what the store says became of a result."""
        if outcome in ASIDE:
            self.aside[ASIDE[outcome]] += 1
            self.gone += outcome in ("deleted", "superseded")
        elif outcome == "stored":
            self.embedded += 1
        else:
            failed = str(result) if isinstance(result, Failed) else f"store: {reason}"
            self.failures[failed] += 1
            if self.failures[failed] <= 3:
                self.examples.setdefault(failed, []).append(f"          {result.asset}")

    def lines(self) -> Iterator[str]:
        """What is printed at the end; the last line is for programs."""
        seconds = time.monotonic() - self.started
        yield f"Embedded {self.embedded:>9,}"
        yield f"Failed   {self.failed:>9,}"
        for failed, count in self.failures.most_common(50):
            yield f"  {count:>6,}  {failed}"
            yield from self.examples[failed]
        if self.skipped:
            known = f"known failure{'s' * (self.skipped != 1)}; --retry-failed tries them"
            yield f"Skipped  {self.skipped:>9,}  {known}"
        yield f"Left     {self.left:>9,}"
        yield from (f"  {count:>6,}  {why}" for why, count in self.aside.most_common(50))
        yield f"Elapsed  {seconds:>8.1f}s"
        counts = f"embedded={self.embedded} failed={self.failed} left={self.left} "
        counts += f"attempted={self.attempted} skipped={self.skipped} gone={self.gone}"
        yield f"{counts} seconds={seconds:.1f}"


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
        if not self.code:
            self.code, self._since = 128 + number, time.monotonic()
            # not by print: the handler may have interrupted one
            with contextlib.suppress(OSError):  # Ctrl-C may have ended a pipe's reader, too
                os.write(2, b"\nstopping: storing what is embedded; Ctrl-C again ends at once\n")
        elif time.monotonic() - self._since > ECHO_SECONDS:
            os._exit(self.code)


def printable(text: str) -> str:
    """Text from outside on its way to the screen: one line, no escape codes."""
    return "".join(c if c.isprintable() else "?" for c in text)


def shorten(text: str, width: int = 60) -> str:
    """The text in at most `width` characters, its middle left out."""
    half = width // 2 - 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"


# ------------------------------------------------------------------ stores

SILENCE = "no answer from the database"
CHECK_URL = "check SUPABASE_URL and the project's status, then run again"
RUN_SQL = "run this version's schema.sql in Supabase's SQL editor, then this script again"
# PostgREST's and PostgreSQL's codes of trouble that may pass; a gateway's are HTTP's
PASSING = re.compile(r"5\d\d|408|425|429|PGRST00\d|(08|40|53|57)...|55P03|XX000")


class SupabaseStore:
    """Assets and embeddings in Supabase, by the functions of schema.sql alone.

    Errors: RunError for what stops a run (key, schema, database away for longer than
    DB_RETRY_SECONDS). Safe to use from several threads.
    """

    def __init__(self, settings: Settings, stop: Stop) -> None:
        import httpx
        import supabase

        self._settings, self._stop, self._patience = settings, stop, CHECK_SECONDS
        self.place = f"product_embeddings at {settings.url}"
        answer = min(ANSWER_SECONDS, max(CHECK_SECONDS, settings.db_retry_seconds))
        self.longest = settings.db_retry_seconds + answer  # seconds for all attempts at a call
        timeout = httpx.Timeout(answer, connect=READ_SECONDS)
        self._here = threading.local()  # an APIError of a gateway's JSON lacks the status
        hooks = {"response": [lambda response: setattr(self._here, "status", response.status_code)]}
        # no redirects: one would carry the key to another origin
        http = httpx.Client(timeout=timeout, follow_redirects=False, event_hooks=hooks)
        options = supabase.ClientOptions(httpx_client=http)
        self._rpc = supabase.create_client(settings.url, settings.key, options).rpc

    def _of(self, **more: Any) -> dict[str, Any]:
        s = self._settings
        of = {"model_version": s.model_version, "client": s.client}
        return of | {"shard": s.shard[0], "shards": s.shard[1]} | more

    def status(self) -> Status:
        """What there is, asked before anything heavy is loaded."""

        def read(answer: Any) -> Status:
            if answer["contract"] != CONTRACT:
                raise RunError(f"the database's functions are of another version: {RUN_SQL}")
            if not answer["client_exists"]:
                client = self._settings.client
                raise RunError(f"no asset is of client {client!r}: check the spelling")
            self._time = answer["time"]
            return Status(*(answer[n] for n in ("assets", "done", "failed_for_good", "waiting")))

        status: Status = self._call("embedding_status", read, **self._of())
        self._patience = self._settings.db_retry_seconds
        return status

    def pages(self) -> Iterator[list[Asset]]:
        """Pending assets in the order of their ids, a page at a time and each once; those that
        failed in an earlier run come last, so that they never keep the others waiting."""
        wanted = min(self._settings.limit or PAGE_ROWS, PAGE_ROWS)
        failed = {"failed_before": self._time, "permanent_too": self._settings.retry_failed}
        for which in ({}, failed):
            last: Id | None = None
            while True:
                of = self._of(after=last, wanted=wanted, **which)
                page, last = self._call("pending_assets", read_page, **of)
                yield page
                if last is None:
                    break

    def locate(self, asset: Asset) -> tuple[str, dict[str, str]]:
        """Where an image is and the headers to send there; the key only to the own storage."""
        s, image = self._settings, asset.image.strip()
        if len(asset.image) < asset.size // 4:  # a character has at most 4 bytes: it was cut
            raise Rejected(f"a data: URL of {asset.size // 2**20} MB, which belongs into a file")
        if not image:
            raise Rejected("no image URL")
        image = f"https:{image}" if image.startswith("//") else image
        objects = f"{s.url}/storage/v1/object/"
        path = image.removeprefix(objects)
        if path == image or path.startswith("sign/"):  # which carries a token of its own
            return image, {}
        path = re.sub("^(public|authenticated)/", "", path)
        if ".." in unquote(path).split("/"):
            raise Rejected("a storage path with '..' in it")
        key = {"apikey": s.key, "Authorization": f"Bearer {s.key}"}
        return f"{objects}authenticated/{path}", key

    def save(self, results: list[Result]) -> list[tuple[str, str]]:
        """Stores vectors and notes failures, in one transaction. Returns for each result its
        outcome (schema.sql lists them) and the reason where it was refused."""
        vectors, failures = [], []
        for result in results:
            row = {"asset_id": result.asset.id, "image_hash": result.asset.mark}
            if isinstance(result, Embedded):
                vectors.append(row | {"embedding": vector_text(result.vector)})
            else:
                failures.append(row | why(result))

        def read(answer: Any) -> list[tuple[str, str]]:
            by_id = {row["asset_id"]: (row["outcome"], row.get("reason", "")) for row in answer}
            return [by_id[result.asset.id] for result in results]

        rows = {"vectors": vectors, "failures": failures}
        version = self._settings.model_version
        return self._call("store_embeddings", read, model_version=version, **rows)  # type: ignore[no-any-return]

    def gallery(self) -> dict[str, Any]:
        """What the gallery shows: see embedding_gallery in schema.sql."""
        version, client = self._settings.model_version, self._settings.client
        of = {"model_version": version, "client": client}
        return self._call("embedding_gallery", dict, **of)  # type: ignore[no-any-return]

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
                error.code = str(error.code or self._here.status)
                if not PASSING.fullmatch(error.code):
                    raise RunError(self._explain(error)) from None
                trouble = f"{error.code}, {shorten(str(error.message))}"
            except httpx.RequestError as error:
                trouble = f"{type(error).__name__}: {error}"
            except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
                trouble = f"an answer that {function} never gives"
            patience = min(self._patience, 10) if self._stop.code else self._patience
            left = started + patience - time.monotonic()
            if left <= 0:
                raise RunError(f"{SILENCE} for {patience:.0f} s ({trouble}): {CHECK_URL}")
            log.info("database: %s; trying again", trouble)
            time.sleep(min(2 ** min(attempt, 4) * random.uniform(0.25, 0.5), left))
        raise AssertionError  # count() has no end

    def _explain(self, error: Any) -> str:
        source, code = self._settings.key_source, error.code
        error.message = shorten(str(error.message), 300)
        if code in ("PGRST202", "42883", "42P01", "42703"):
            return f"the database lacks what this script calls ({error.message}): {RUN_SQL}"
        if code in ("401", "403", "42501", "PGRST301", "PGRST302", "PGRST303"):
            return f"the key in {source} was refused ({error.message}): {KEY_ADVICE}"
        if re.fullmatch(r"\d\d\d", code):
            return f"{self._settings.url} does not answer like a Supabase project (HTTP {code})"
        return f"the database says {error.message!r} ({code}): {RUN_SQL}"


def read_page(answer: Any) -> tuple[list[Asset], Id | None]:
    """A page as pending_assets gives it, and the id after which the next one begins."""
    rows = answer["assets"]
    assets = [Asset(r["id"], r["image"] or "", r["image_hash"], r["bytes"]) for r in rows]
    return assets, answer["last"]


def why(failed: Failed) -> dict[str, Any]:
    """A failure's columns."""
    return {name: getattr(failed, name) for name in ("stage", "reason", "permanent")}


def vector_text(vector: np.ndarray) -> str:
    """A vector as pgvector reads it, in the fewest digits that give the same float32 back."""
    return "[" + ",".join(map(str, vector.astype(np.float32))) + "]"


# A row is of the image as it was at that time of modification
FOLDER_TABLE = """
create table if not exists images (asset_id text primary key, modified integer not null,
    model_version text not null, embedding blob, stage text, reason text, permanent integer,
    attempts integer not null, created_at text not null, updated_at text not null)
"""
FOLDER_SAVE = """
insert into images values (:id, :mark, :version, :embedding, :stage, :reason, :permanent, 1,
    :now, :now)
on conflict do update set modified = :mark, model_version = :version, embedding = :embedding,
    stage = :stage, reason = :reason, permanent = :permanent, updated_at = :now,
    attempts = 1 + iif(modified = :mark and model_version = :version, attempts, 0)
where :embedding is not null or embedding is null or modified <> :mark
    or model_version <> :version
"""


class FolderStore:
    """The images below a folder, with their embeddings in one SQLite file there.

    Ids are the paths below it, clients its subfolders, vectors little-endian float32 blobs.
    Errors: RunError where the folder or that file is of no use.
    """

    FILE = "product_embeddings.sqlite3"
    longest = math.inf  # a disk has no deadline

    def __init__(self, settings: Settings, _: Stop) -> None:
        self._settings, self._folder = settings, settings.local or Path()
        self.place = str(self._folder / self.FILE)
        self._below = "" if settings.client is None else f"{settings.client.strip('/')}/"

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"{self.place}: {error}. It must be a database of this version of the script, in "
                "a folder that can be written to, with room on the disk"
            ) from None

    def status(self) -> Status:
        """Compares the folder's images with what the file says of them."""
        s, files = self._settings, dict(self._files())
        there = Path(self.place).exists()
        if not files and not there:
            raise RunError(f"no image below {self._folder}, by the endings of the files there")
        with self._errors():
            place = ":memory:" if s.dry_run and not there else self.place
            self._db = sqlite3.connect(place, 60, isolation_level=None, check_same_thread=False)
            kept = {name for (name,) in self._db.execute("select name from sqlite_master")}
            if kept and "images" not in kept:
                raise sqlite3.DatabaseError("it holds other tables")
            self._db.execute(FOLDER_TABLE)
            columns = "asset_id, modified, model_version, embedding is null, permanent"
            known = {path: row for path, *row in self._db.execute(f"select {columns} from images")}
            gone = json.dumps([] if s.dry_run else list(known.keys() - files.keys()))
            query = "delete from images where asset_id in (select value from json_each(?))"
            self._db.execute(query, [gone])
        mine = [path for path in sorted(files) if path.startswith(self._below)]
        if self._below and not mine:
            raise RunError(f"no image below {self._folder / self._below}: --client is a subfolder")
        mine = [path for path in mine if crc32(path.encode()) % s.shard[1] == s.shard[0] - 1]
        states: dict[str, list[Asset]] = {"new": [], "done": [], "failed": [], "for good": []}
        for path in mine:
            modified, model, failed, permanent = known.get(path, (0, "", 0, 0))
            state = ("for good" if permanent else "failed") if failed else "done"
            state = state if (modified, model) == (files[path], s.model_version) else "new"
            states[state].append(Asset(path, path, files[path]))
        self._todo = [states["new"], states["failed"] + states["for good"] * s.retry_failed]
        return Status(len(mine), len(states["done"]), len(states["for good"]))

    def _files(self) -> Iterator[tuple[str, int]]:
        """Path and time of each image file; hidden files and folders are left out."""
        others: Counter[str] = Counter()
        for folder, folders, names in os.walk(self._folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(folder, name) for name in names):
                kind = path.suffix.lower()
                if path.name.startswith((".", self.FILE)):
                    continue
                if kind not in IMAGE_SUFFIXES:
                    others[kind or "without one"] += 1
                    continue
                try:
                    image = path.relative_to(self._folder).as_posix()
                    image.encode()
                    yield image, path.stat().st_mtime_ns
                except (OSError, UnicodeEncodeError) as error:
                    log.warning("left out: %s: %s", ascii(str(path)), error)
        if others:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in others.most_common(5))
            log.info("left out, as no images by their ending: %s", kinds)

    def pages(self) -> Iterator[list[Asset]]:
        """Pending assets in the order of their paths, a page at a time and each once; those that
        failed in an earlier run come last."""
        for assets in self._todo:
            yield from (assets[n : n + PAGE_ROWS] for n in range(0, len(assets), PAGE_ROWS))

    def locate(self, asset: Asset) -> tuple[Path, dict[str, str]]:
        """The path of an image; a file needs no headers."""
        return self._folder / asset.image, {}

    def save(self, results: list[Result]) -> list[tuple[str, str]]:
        """As SupabaseStore's."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        with self._errors(), self._db:
            self._db.execute("begin immediate")
            for result in results:
                row: dict[str, Any] = {"id": result.asset.id, "mark": result.asset.mark, "now": now}
                row |= dict.fromkeys(("embedding", "stage", "reason", "permanent"))
                row["version"] = self._settings.model_version
                if isinstance(result, Failed):
                    row |= why(result)
                else:
                    row["embedding"] = result.vector.astype("<f4").tobytes()
                self._db.execute(FOLDER_SAVE, row)
        return [("noted" if isinstance(r, Failed) else "stored", "") for r in results]

    def gallery(self) -> dict[str, Any]:
        """As SupabaseStore's; the nearest of up to 1,000 images, looked for among all."""
        query = "select asset_id, stage || ': ' || reason from images where model_version = ?"
        with self._errors():
            rows = self._db.execute(f"{query} order by 1", [self._settings.model_version])
            states = {name: why for name, why in rows if name.startswith(self._below)}
        names = [name for name, why in states.items() if why is None]
        some = names[:: 1 + len(names) // 1000]
        mine = self._vectors(some)
        near: list[list[tuple[str, str, float]]] = [[] for _ in some]
        for others in (names[n : n + 10_000] for n in range(0, len(names), 10_000)):
            scores, most = mine @ self._vectors(others).T, min(7, len(others))
            for row, best in enumerate(np.argpartition(scores, -most)[:, -most:]):
                told = [(others[n], others[n], float(scores[row, n])) for n in best]
                told = [one for one in told if one[0] != some[row]] + near[row]
                near[row] = sorted(told, key=lambda one: -one[2])[:6]
        pairs = {
            (min(a, b), max(a, b)): x for a, row in zip(some, near, strict=True) for b, _, x in row
        }
        shown = range(0, len(some), 1 + len(some) // 30)
        unlike = (mine[shown] @ mine[shown].T)[np.triu_indices(len(shown), 1)]
        failed: dict[str, list[str]] = defaultdict(list)
        for name, why in states.items():
            if why:
                failed[why].append(name)
        return {
            "look_alikes": [[some[n], some[n], near[n]] for n in shown],
            "pairs": [
                (a, a, b, b, pairs[a, b]) for a, b in sorted(pairs, key=pairs.__getitem__)[:-25:-1]
            ],
            "failed": [(why, len(of), [(p, p) for p in of[:20]]) for why, of in failed.items()],
            "typical": float(np.median(unlike)) if len(unlike) else None,
        }

    def _vectors(self, names: list[str]) -> np.ndarray:
        query = "select embedding from json_each(?) join images on asset_id = value order by key"
        with self._errors():
            rows = self._db.execute(query, [json.dumps(names)])
            return np.frombuffer(b"".join(blob for (blob,) in rows), "<f4").reshape(-1, DIMENSIONS)


def _raise(error: OSError) -> None:
    raise RunError(f"{error.filename} can't be read ({error.strerror}): nothing was changed")


Store = SupabaseStore | FolderStore

# ------------------------------------------------------------------ images

BROKEN = "broken or truncated image file"
TOO_MUCH = f"needs over {DECODE_MB} MB to decode"
KILLED = "its decoder was killed, for want of memory perhaps"
TOO_SLOW = f"takes over {DECODE_SECONDS} s to decode"
TOO_LARGE = f"larger than {MAX_BYTES // 2**20} MB"
AGENT = {"User-Agent": f"generate-embeddings/{VERSION} (python-requests; {MODEL_ID})"}
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What older Pythons' is_global takes for public: metadata, site-local, NAT64, IPv4 in IPv6
NOT_PUBLIC = ("192.0.0.0/24", "fec0::/10", "64:ff9b:1::/48", "::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also inside its IPv6 wrappings."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None
        ip = inside or ip.ipv4_mapped or ip.sixtofour or ip
    return (
        ip.is_global
        and not ip.is_multicast
        and not any(ip in ipaddress.ip_network(net) for net in NOT_PUBLIC)
    )


def addresses(host: str, port: int, private_too: bool, flags: int = 0) -> list[str]:
    """A host's addresses that may be connected to; raises Rejected where there are none."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    found = [str(entry[4][0]) for entry in entries]
    allowed = [address for address in found if private_too or is_public(address)]
    if not allowed:
        allow = "ALLOW_PRIVATE_IMAGE_HOSTS=1 with --retry-failed allows it"
        raise Rejected(f"private address {found[0]} ({allow})")
    return allowed


def host_and_port(url: str) -> tuple[str, int]:
    """Whom a URL leads to; raises ValueError."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


NETWORK_REASONS = {  # by what the library's message holds
    "CERTIFICATE": "the host's certificate is not valid",
    "SSL": "TLS failed",
    "gaierror": "host not found",
    "timed out": "the host did not answer in time",
    "refused": "connection refused",
    "unreachable": "host not reachable",
    "decode": "broken compression",
}


def network_reason(error: Exception) -> str:
    """What went wrong on the way to a host, in words that group well."""
    text = str(error)
    return next((why for sign, why in NETWORK_REASONS.items() if sign in text), "connection lost")


class Fetcher:
    """Gets the bytes of images, over connections that stay open; raises Rejected."""

    def __init__(self, settings: Settings) -> None:
        self._seconds = settings.fetch_seconds
        self._trusted = None if settings.private_hosts else host_and_port(settings.url)
        self._verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        self._heavy = threading.Semaphore(HEAVY_FILES)
        # no Session: that would send cookies and what is in ~/.netrc
        self._adapter = HTTPAdapter(pool_connections=64, pool_maxsize=settings.workers)
        pools: dict[str, Any] = {}
        for pool in (urllib3.HTTPConnectionPool, urllib3.HTTPSConnectionPool):
            connect = {"_new_conn": lambda connection: self._connect(connection)}
            guarded = {"ConnectionCls": type("Guarded", (pool.ConnectionCls,), connect)}
            pools[pool.scheme or ""] = type("Pool", (pool,), guarded)
        self._adapter.poolmanager.pool_classes_by_scheme = pools  # connections to a proxy: as usual

    def fetch(self, place: str | Path, headers: dict[str, str]) -> bytes:
        """The bytes of an image, at most MAX_BYTES, within the deadline, retries included."""
        if isinstance(place, Path):
            return read_file(place)
        if place[:5].lower() == "data:":
            try:
                return DataHandler().data_open(Request(place)).read()
            except ValueError:
                raise Rejected("broken data: URL") from None
        deadline, attempt = time.monotonic() + self._seconds, 1
        while True:
            try:
                return self._follow(place, headers, deadline)
            except Rejected as error:
                delay = max(2**attempt * random.uniform(0.125, 0.25), error.retry_after or 0)
                late = time.monotonic() + delay > deadline
                if error.retry_after is None or late or attempt == FETCH_ATTEMPTS:
                    raise
            time.sleep(delay)
            attempt += 1

    def _follow(self, url: str, headers: dict[str, str], deadline: float) -> bytes:
        request = prepare("", url, headers)
        for _ in range(MAX_REDIRECTS + 1):
            try:
                with self._send(request, deadline) as response:
                    target = requests.Session().get_redirect_target(response)
                    if target is None:
                        return self._body(response, deadline)
            except UnicodeDecodeError:
                raise Rejected("not a valid URL") from None  # a redirect's
            except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
                raise Rejected(network_reason(error), False, retry_after=0) from None
            request = prepare(request.url or "", target, {})  # the headers were for the first alone
        raise Rejected(f"more than {MAX_REDIRECTS} redirects")

    def _send(self, request: requests.PreparedRequest, deadline: float) -> requests.Response:
        url = request.url or ""
        host, port = host_and_port(url)
        proxies = requests.utils.get_environ_proxies(url)
        if proxies and self._trusted not in (None, (host, port)):
            # where names lead the proxy alone knows: refused is what is literally private
            host = "127.0.0.1" if re.fullmatch(r"(.+\.)?localhost\.?", host) else host.rstrip(".")
            with contextlib.suppress(OSError):  # a name
                addresses(host, port, False, socket.AI_NUMERICHOST)
        left = self._left(deadline)
        timeout = (left, min(READ_SECONDS, left))
        return self._adapter.send(request, True, timeout, self._verify, proxies=proxies)

    def _connect(self, connection: Any) -> socket.socket:
        # to the addresses that were looked at: no DNS can change them in between
        end, port = time.monotonic() + connection.timeout, connection.port
        private_too = self._trusted in (None, (connection.host, port))
        found = addresses(connection._dns_host, port, private_too)
        for number, address in enumerate(found):
            share = (end - time.monotonic()) / (len(found) - number)
            try:
                return urllib3.util.connection.create_connection(
                    (address, port), max(0.01, share), None, connection.socket_options
                )
            except OSError as error:
                trouble = error
        raise trouble

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Rejected(f"not complete within {self._seconds:g} s", False)
        return left

    def _body(self, response: requests.Response, deadline: float) -> bytes:
        if response.status_code != 200:
            raise refusal(response)
        data = bytearray()
        with contextlib.ExitStack() as held:
            while chunk := response.raw.read1(2**16, decode_content=True):
                if len(data) <= HEAVY_BYTES < len(data) + len(chunk):
                    held.enter_context(self._heavy)
                data += chunk
                if len(data) > MAX_BYTES:
                    raise Rejected(TOO_LARGE)
                self._left(deadline)
        return bytes(data)


def prepare(base: str, url: str, headers: dict[str, str]) -> requests.PreparedRequest:
    """A request for a URL, relative to another; raises Rejected."""
    try:
        url = urljoin(base, url)
        if urlsplit(url).scheme not in ("http", "https"):
            raise Rejected("only http, https and data URLs are fetched")
        request = requests.Request("GET", url, headers=AGENT | headers).prepare()
        host_and_port(request.url or "")[0].encode("idna")  # fails as looking it up would
        return request
    except ValueError:
        raise Rejected("not a valid URL") from None


def refusal(response: requests.Response) -> Rejected:
    """What an answer other than 200 means."""
    code, wait = response.status_code, 0.0
    reason = f"HTTP {code} {http.client.responses.get(code, '')}".strip()
    if 200 <= code < 500 and code not in (408, 425, 429):
        return Rejected(reason, code not in (401, 402, 403, 407))  # a block may be lifted
    with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        wait = urllib3.Retry().get_retry_after(response.raw) or 0
    return Rejected(reason, False, retry_after=wait)


def read_file(path: Path) -> bytes:
    """A file's bytes; raises Rejected."""
    try:
        if not path.is_file():  # a named pipe, say, would never end
            raise OSError(0, "no regular file")
        if path.stat().st_size > MAX_BYTES:
            raise Rejected(TOO_LARGE)
        return path.read_bytes()
    except OSError as error:
        raise Rejected(f"can't be read ({error.strerror})", permanent=False) from None


def decode(data: bytes) -> Image.Image:
    """An image file as an upright RGB image on white, reduced where CLIP needs far less. Raises
    Rejected, and whatever Pillow's decoders raise for a broken file."""
    image = opened(data)
    width, height = image.size
    if width * height * 4 > DECODE_MB * 2**20 and image.format not in ("JPEG", "MPO"):
        raise Rejected(TOO_MUCH)  # JPEG shrinks while it decodes
    if min(width, height) < MIN_SIDE:
        raise Rejected(f"smaller than {MIN_SIDE} pixels a side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Rejected(f"a strip, more than {MAX_ASPECT} times as long as wide")
    # JPEG's decoder can shrink by 2, 4 or 8 as it goes; the others take no draft
    shrink = max(1.0, min(width, height) / (KEEP_SCALE * SIDE))
    image.draft(None, (int(width / shrink), int(height / shrink)))
    image.load()
    result = in_rgb(image)
    with contextlib.suppress(Exception):  # broken EXIF data can't say how the camera was held
        result.getexif()[0x0112] = image.getexif().get(0x0112, 1)
        ImageOps.exif_transpose(result, in_place=True)
    return result


# How files begin that Pillow takes for no image, in small letters
NO_IMAGES = {
    rb"$": "an empty file",
    rb"<((?!<(!doctype html|html|head|body)\b).)*?<?svg\b": "an SVG drawing, which has no pixels",
    rb"<.*?(html|head|body)\b": "an HTML page, not an image",
    rb"[\[{]": "JSON, not an image",
    rb"%pdf": "a PDF, not an image",
    rb"\xff\xd8\xff|\x89png|gif8|ii\*\0|mm\0\*|riff|bm|....ftypavi": BROKEN,
    rb"": "not an image in a known format",
}


def opened(data: bytes) -> Image.Image:
    """An image file, of which the header was read; raises Rejected for what is none."""
    if re.match(rb"....ftyp(hei|hev|mif|msf)", data, re.DOTALL):
        try:
            import pillow_heif
        except ImportError:
            raise Rejected("HEIC: pip install pillow-heif, then run again", False) from None
        pillow_heif.register_heif_opener()
        return Image.open(io.BytesIO(data), formats=["AVIF", "HEIF"])
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        head = data[: 2**16].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        names = (name for start, name in NO_IMAGES.items() if re.match(start, head, re.DOTALL))
        raise Rejected(next(names)) from None


def in_rgb(image: Image.Image) -> Image.Image:
    """A loaded image in RGB, white behind it, reduced by what whole number KEEP_SCALE allows."""
    if image.mode in ("I", "F", "LAB"):
        raise Rejected(f"pixels of a kind that is not supported (mode {image.mode})")
    # Pillow takes every CMYK JPEG for one of Adobe's, which hold inverted values
    inverted = image.format in ("JPEG", "MPO") and "adobe" not in image.info
    profile = io.BytesIO(image.info.get("icc_profile") or b"")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data and image.mode != "RGBA":
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "RGBA", "CMYK"):  # of these a copy would be too much
        image = image.convert("RGB")
    image = image.reduce(max(1, min(image.size) // (KEEP_SCALE * SIDE)))
    if image.mode == "CMYK":
        image = ImageChops.invert(image) if inverted else image
        with contextlib.suppress(ImageCms.PyCMSError):  # no profile, or a broken one
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.buildTransform(profile, srgb, "CMYK", "RGB").apply(image)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop(image: Image.Image) -> np.ndarray:
    """What CLIP sees of an RGB image, its shorter side at 224: levels (224, 224, 3)."""
    shorter = min(image.size)
    width, height = (int(SIDE * side / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


# One value per channel and level: the arithmetic of transformers' processor, same bits
_LEVELS = (np.arange(256) * (1 / 255)).astype(np.float32)
_PIXELS = [(_LEVELS - np.float32(m)) / np.float32(s) for m, s in zip(MEAN, STD, strict=True)]


def normalise(levels: np.ndarray) -> np.ndarray:
    """Levels (224, 224, 3) -> pixels (3, 224, 224), as transformers' CLIPImageProcessor."""
    return np.stack([_PIXELS[channel][levels[:, :, channel]] for channel in range(3)])


OUT_OF_MEMORY = 77  # a decoder's exit code
# By exit code: of SIGXCPU, and of the signals of a crash
DEATHS = {OUT_OF_MEMORY: TOO_MUCH, -24: TOO_SLOW} | dict.fromkeys((-4, -6, -7, -8, -11), BROKEN)
MALLOC_THRESHOLDS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


class Decoder:
    """A process that decodes an image at a time, within limits: what a file claims is not what
    it holds. Linux holds it to both limits, macOS to the seconds."""

    def __init__(self) -> None:
        kind = "spawn" if os.name == "nt" else "forkserver"
        self._context: Any = multiprocessing.get_context(kind)
        self._context.set_forkserver_preload(["numpy", "requests", "PIL.ImageCms"])  # once for all
        # glibc would else give memory back after each image and fetch it anew: 2 ms
        os.environ |= dict.fromkeys(MALLOC_THRESHOLDS, str(64 * 2**20))
        self._process: Any = None
        self._images = 0  # that this process has decoded

    def decode(self, data: bytes) -> np.ndarray:
        """The levels (224, 224, 3) of an image file; raises Rejected."""
        hung = False
        with contextlib.suppress(EOFError, OSError):  # it dies of some files
            if not self._process:
                self._start()
            self._pipe.send_bytes(data)
            hung = not self._pipe.poll(DECODE_PATIENCE)
            if not hung:
                answer: np.ndarray | Rejected = self._pipe.recv()
                self._images += 1
                if isinstance(answer, Rejected):
                    raise answer
                return answer
        if not self._process:
            raise Rejected("no process could be started to decode it", permanent=False)
        self._process.kill()
        self._process.join()
        reason = TOO_SLOW if hung else DEATHS.get(self._process.exitcode, KILLED)
        self._process = None
        if reason == TOO_MUCH and self._images:  # of what earlier images left behind, perhaps
            return self.decode(data)
        raise Rejected(reason, permanent=reason != KILLED)

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._process, self._images = process, 0


def work(pipe: Any) -> None:
    """What a decoder's process does until the run closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run,
    if hasattr(os, "setsid"):
        os.setsid()  # and so is what timeout(1) or a closed terminal sends to its whole group
    warnings.simplefilter("ignore")  # Pillow's, about oddities that do no harm
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libtiff writes
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        limit("RLIMIT_DATA", pages * os.sysconf("SC_PAGE_SIZE") + DECODE_MB * 2**20)
    try:
        while True:
            data = pipe.recv_bytes()
            limit("RLIMIT_CPU", math.ceil(time.process_time()) + DECODE_SECONDS)
            pipe.send(levels_or_reason(data))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # there may be too little left to say more
    except (EOFError, OSError):
        pass  # the run is over


def limit(name: str, most: int) -> None:
    """Limits a resource of this process, where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # Windows has none

        number = getattr(resource, name)
        resource.setrlimit(number, (most, resource.getrlimit(number)[1]))


def levels_or_reason(data: bytes) -> np.ndarray | Rejected:
    """The levels of an image file, or why it has none. Raises MemoryError alone."""
    try:
        return crop(decode(data))
    except Rejected as rejected:
        return rejected
    except Image.DecompressionBombError:
        return Rejected(TOO_MUCH)
    except MemoryError:
        raise
    except Exception:  # Pillow's decoders raise nearly every type there is
        return Rejected(BROKEN)


class Loader:
    """The way from an asset to its levels, for any number of threads; raises Rejected."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._fetcher = store, Fetcher(settings)
        self._decoders: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for _ in range(cores()):
            self._decoders.put(Decoder())

    def fetch(self, asset: Asset) -> bytes:
        return self._fetcher.fetch(*self._store.locate(asset))

    def decode(self, data: bytes) -> np.ndarray:
        decoder = self._decoders.get()
        try:
            return decoder.decode(data)
        finally:
            self._decoders.put(decoder)


# ------------------------------------------------------------------ model

WEIGHTS = "pytorch_model.bin"


def cores() -> int:
    """The processor cores that this run may use; OMP_NUM_THREADS has the last word."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted if wanted.isdecimal() else 0) or there or 1


def read_weights(folder: Path) -> Any:
    """The weights by name; mapped, so that only what is taken is read, not the text tower."""
    import safetensors.torch
    import torch

    if (folder / "model.safetensors").is_file():
        return safetensors.torch.load_file(folder / "model.safetensors")
    return torch.load(folder / WEIGHTS, mmap=True, weights_only=True)


class ImageTower:
    """The forward pass of transformers' CLIPVisionModelWithProjection, over the same weights.

    What makes it fast on CPUs: weights laid out once for oneDNN, one product for q, k and v,
    activation and residual fused into the products, and the last layer only for the one token
    that leaves it.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], settings: Settings) -> None:
        import torch

        self._torch, self._functional = torch, torch.nn.functional
        self._weights = read_weights(folder)
        self._device, self._dtype = settings.device, getattr(torch, settings.dtype)
        self._heads, self._side = config["num_attention_heads"], config["patch_size"]
        self._packs = self._can_pack()
        embeddings = "vision_model.embeddings."
        position = self._take(embeddings + "position_embedding.weight")
        self._first = self._ours(self._take(embeddings + "class_embedding") + position[0])
        self._position = self._ours(position[1:])
        patches = self._take(embeddings + "patch_embedding.weight")
        self._patches = self._linear(patches.flatten(1))
        self._before = self._norm("vision_model.pre_layrnorm")  # the checkpoint's own spelling
        self._after = self._norm("vision_model.post_layernorm")
        self._projection = self._linear(self._take("visual_projection.weight"))
        self._layers: list[Any] = []
        layers = range(config["num_hidden_layers"])
        with ThreadPoolExecutor(cores()) as pool:
            for start in layers[::4]:
                self._layers += pool.map(self._layer, layers[start : start + 4])
                self._weights = read_weights(folder)  # lets go of what was read, and is mapped
        del self._weights

    def _take(self, *names: str) -> Any:
        # joined, and so a copy: one view left over would keep the whole file mapped
        return self._torch.cat([self._weights[name] for name in names]).float()

    def _pair(self, *names: str) -> list[Any]:
        return [self._take(*(f"{n}.{kind}" for n in names)) for kind in ("weight", "bias")]

    def _ours(self, tensor: Any) -> Any:
        return tensor.to(self._device, self._dtype)

    def _norm(self, name: str) -> tuple[Any, ...]:
        weight, bias = map(self._ours, self._pair(name))
        return weight.shape, weight, bias

    def _layer(self, number: int) -> tuple[Any, ...]:
        name = f"vision_model.encoder.layers.{number}."
        # quick_gelu(x) = x * sigmoid(1.702 x) = silu(1.702 x) / 1.702
        up, up_bias = (tensor * 1.702 for tensor in self._pair(name + "mlp.fc1"))
        down, down_bias = self._pair(name + "mlp.fc2")
        return (
            self._norm(name + "layer_norm1"),
            self._linear(*self._pair(*(f"{name}self_attn.{part}_proj" for part in "qkv"))),
            self._linear(*self._pair(name + "self_attn.out_proj")),
            self._norm(name + "layer_norm2"),
            self._linear(up, up_bias, silu=True),
            self._linear(down / 1.702, down_bias),
        )

    def _can_pack(self) -> bool:
        """Whether this torch has the operators for oneDNN's layout, which are private to it."""
        try:
            one, mkldnn = self._ours(self._torch.eye(32)), self._torch.ops.mkldnn
            packed = mkldnn._reorder_linear_weight(one)
            return mkldnn._linear_pointwise(one, packed, None, "none", [], "") is not None
        except (AttributeError, RuntimeError):
            return False

    def _linear(self, weight: Any, bias: Any = None, silu: bool = False) -> Callable[..., Any]:
        """A linear layer (x, residual=None) -> y, laid out for oneDNN where torch offers it."""
        functional, mkldnn = self._functional, self._torch.ops.mkldnn
        weight, bias = self._ours(weight), None if bias is None else self._ours(bias)
        if self._packs:
            weight, pointwise = mkldnn._reorder_linear_weight(weight), mkldnn._linear_pointwise

        def linear(x: Any, residual: Any = None) -> Any:
            if self._packs and residual is not None:
                return pointwise.binary(x, residual, weight, bias, "add")
            if self._packs:
                return pointwise(x, weight, bias, "swish" if silu else "none", [], "")
            y = functional.linear(x, weight, bias)
            y = functional.silu(y) if silu else y
            return y if residual is None else residual + y

        return linear

    def __call__(self, pixels: Any) -> Any:
        """pixels (n, 3, 224, 224) -> image embeddings (n, 512), not yet of unit length."""
        n, side, functional = len(pixels), self._side, self._functional
        x = self._ours(pixels).unfold(2, side, side).unfold(3, side, side)
        x = self._patches(x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)) + self._position
        x = self._torch.cat([self._first.expand(n, 1, -1), x], 1)
        x = functional.layer_norm(x, *self._before)
        for number, (norm1, qkv, out, norm2, fc1, fc2) in enumerate(self._layers, 1):
            joined = qkv(functional.layer_norm(x, *norm1))
            q, k, v = joined.view(n, x.shape[1], 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            if number == len(self._layers):
                x, q = x[:, :1].contiguous(), q[:, :, :1]
            attended = functional.scaled_dot_product_attention(q, k, v)
            x = out(attended.transpose(1, 2).reshape(x.shape), x)
            x = fc2(fc1(functional.layer_norm(x, *norm2)), x)
        return self._projection(functional.layer_norm(x[:, 0], *self._after))


class ClipEncoder:
    """CLIP's image encoder. Raises RunError where the model can't be had, or be used here."""

    def __init__(self, settings: Settings) -> None:
        import torch

        self._torch = torch
        torch.set_num_threads(1)  # each core has an image of its own, see Run
        if (settings.device, settings.dtype) == ("cpu", "bfloat16") and not has_bfloat16():
            raise RunError("--dtype bfloat16: this processor has no arithmetic for it")
        folder = Path(settings.clip_model).expanduser() if settings.clip_model else download()
        try:
            config = json.loads((folder / "config.json").read_text())
            config = config.get("vision_config", config)
            config = {name: config.get(name, value) for name, value in VIT_B_32.items()}
            self._tower = ImageTower(folder, config, settings)
            made = self.encode(np.zeros((1, 3, SIDE, SIDE), np.float32)).shape[1]
            if (made, config["hidden_act"]) != (DIMENSIONS, VIT_B_32["hidden_act"]):
                raise ValueError(f"it gives {made} numbers, by {config['hidden_act']}")
        except ImportError:
            raise
        except Exception as error:  # each file format, library and device has errors of its own
            raise RunError(
                f"the model in {folder} can't be used ({shorten(str(error), 100)}): CLIP_MODEL "
                f"must be a folder with a copy of {MODEL_ID}, --device one that torch finds"
            ) from None
        if config != VIT_B_32 and settings.model_version == MODEL_VERSION:
            name = f"a name for its rows other than {MODEL_VERSION}"
            raise RunError(f"the model in {folder} is no ViT-B/32: set MODEL_VERSION to {name}")

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (n, 3, 224, 224) -> vectors (n, 512); ValueError for one that is not finite."""
        with self._torch.inference_mode():
            vectors: np.ndarray = self._tower(self._torch.from_numpy(pixels)).float().cpu().numpy()
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(vectors).all():
            raise ValueError("the model gave numbers that are not finite")
        return vectors

    def embed(self, batch: list[Loaded]) -> list[Result]:
        """The batch with vectors in the place of pixels; one by one if together fails."""
        try:
            vectors = self.encode(np.stack([loaded.pixels for loaded in batch]))
        except (ValueError, RuntimeError) as error:
            if len(batch) > 1:
                return [result for loaded in batch for result in self.embed([loaded])]
            return [Failed(batch[0].asset, "embed", shorten(str(error)), False)]
        return [Embedded(one.asset, vector) for one, vector in zip(batch, vectors, strict=True)]


def has_bfloat16() -> bool:
    """Whether the processor has arithmetic for bfloat16."""
    import torch

    able = torch.cpu.get_capabilities().items()
    return any(yes is True for name, yes in able if "bf16" in name)


def download() -> Path:
    """The folder of the pinned model, downloaded unless it is in our cache, or in the one that
    HF_HUB_CACHE or HF_HOME names."""
    shared = Path(os.environ.get("HF_HOME", MODEL_CACHE), "hub")
    for cache in (MODEL_CACHE, Path(os.environ.get("HF_HUB_CACHE", shared))):
        folder = cache / f"models--{MODEL_ID.replace('/', '--')}" / "snapshots" / MODEL_REVISION
        if (folder / "config.json").is_file() and (folder / WEIGHTS).is_file():
            return folder
    log.info("downloading %s once, about 600 MB, to %s", MODEL_ID, MODEL_CACHE)
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_VERBOSITY": "error"}
    try:
        from huggingface_hub import constants, hf_hub_download

        # the hub's own client takes half a minute to find that it can't be reached
        requests.head(constants.ENDPOINT, timeout=READ_SECONDS)
        for file in ("config.json", WEIGHTS):
            path = hf_hub_download(MODEL_ID, file, revision=MODEL_REVISION, cache_dir=MODEL_CACHE)
        return Path(path).parent
    except Exception as error:
        network = isinstance(error, requests.RequestException)
        reason = network_reason(error) if network else shorten(str(error), 100)
        raise RunError(
            f"{MODEL_ID} could not be downloaded ({reason}): check network and disk and run "
            "again, or set CLIP_MODEL to a folder with a copy of it"
        ) from None


# ------------------------------------------------------------------ the run


@dataclass
class Task:
    """A step's work on a subject, under way in the background."""

    step: str  # model, find, fetch and then decode, embed, store
    subject: Any = None
    since: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        return time.monotonic() - self.since


class Run:
    """Find, load, embed and store: steps in the background, and one loop in this thread that
    takes what they give and starts what is next. The loop alone owns the report.

    What is in memory is bounded by the settings; what is done first goes on first, so that a slow
    host delays its own images alone. On CPUs each core embeds a batch of its own in one thread:
    threads that share an image wait for each other at every layer.
    """

    def __init__(self, store: Store, settings: Settings, report: Report, stop: Stop) -> None:
        self.store, self.settings, self.report, self.stop = store, settings, report, stop
        self.lanes = cores() if settings.device == "cpu" else 1
        self.limit = settings.limit or sys.maxsize
        self.loader, self.pages = Loader(store, settings), store.pages()
        self.encoder: ClipEncoder | None = None
        self.trouble: Exception | None = None  # what ends the run
        self.found: deque[Asset] = deque()
        self.ready: list[Loaded] = []
        self.results: list[Result] = []  # to be stored,
        self.store_by = 0.0  # before this moment; the first of all at once
        self.failures: Counter[str] = Counter()  # in a row, by host
        self.hosts_down = 0  # one after the other
        self.skipped = 0  # assets of hosts that are down
        self.slow_line = False  # what makes room for others would only crowd it
        self.storing = True  # until the store gives up
        self.tasks: dict[Future[Any], Task] = {}
        self.done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self.embedders, self.others = ThreadPoolExecutor(self.lanes), ThreadPoolExecutor(9999)
        self.bar = progress_bar(min(report.pending, self.limit))
        self.failed = 0  # as the bar shows it, stored or not

    def loop(self) -> None:
        """Returns when there is no more to do; raises what ended the run before that."""
        self.start(Task("model"), ClipEncoder, self.settings)
        with self.bar, logging_redirect_tqdm():
            while self.start_what_can():
                with contextlib.suppress(queue.Empty):
                    future = self.done.get(timeout=POLL_SECONDS)
                    if task := self.tasks.pop(future, None):  # else it was given up
                        self.take(task, future.exception() or future.result())
                self.give_up_what_hangs()
        if self.trouble:
            raise self.trouble
        if self.hosts_down and self.skipped:
            host = max(self.failures, key=self.failures.__getitem__)
            raise RunError(
                f"no image came since {host} failed {HOST_FAILURES} times in a row: check this "
                "machine's network and that host, then run again"
            )

    def start(self, task: Task, work: Callable[..., Any], *arguments: Any) -> None:
        pool = self.embedders if task.step == "embed" else self.others
        future = pool.submit(work, *arguments)
        self.tasks[future] = task
        future.add_done_callback(self.done.put)

    def under_way(self, *steps: str) -> list[Task]:
        return [task for task in self.tasks.values() if task.step in steps]

    def start_what_can(self) -> bool:
        """False if nothing is left to wait for."""
        ending = bool(self.trouble or self.stop.code or self.hosts_down >= HOSTS_DOWN)
        if not ending:
            self.start_loads()  # first: it may leave all that was found
            more = not self.report.found_all and self.report.found < self.limit
            if more and len(self.found) < PAGE_ROWS and not self.under_way("find"):
                self.start(Task("find"), next, self.pages, None)
            self.start_embeds()
        awaited = ("embed",) if ending else ("model", "find", "fetch", "decode", "embed")
        last = not self.under_way(*awaited)
        due = last or len(self.results) >= WRITE_ROWS or time.monotonic() > self.store_by
        if self.storing and self.results and due and not self.under_way("store"):
            batch, self.results = self.results[:WRITE_ROWS], self.results[WRITE_ROWS:]
            self.store_by = time.monotonic() + WRITE_SECONDS
            self.start(Task("store", batch), self.store.save, batch)
        return bool(self.under_way("store", *awaited))

    def start_loads(self) -> None:
        loads, size = self.under_way("fetch", "decode"), self.settings.batch_size
        slow = 0 if self.slow_line else sum(task.age > SLOW_SECONDS for task in loads)
        waiting = len(self.ready) + sum(len(task.subject) for task in self.under_way("embed"))
        workers = self.settings.workers
        room = min(workers, 2 * (workers + self.lanes * size) - waiting) - len(loads)
        room += min(slow, MOST_SLOW)
        while self.found and room > 0:
            asset = self.found.popleft()
            if self.failures[asset.host] >= HOST_FAILURES:
                why = f"of {asset.host}, which failed {HOST_FAILURES} times in a row"
                self.report.aside[why] += 1
                self.skipped += 1
                continue
            room -= 1
            task = Task("fetch", asset)
            self.start(task, self.load, task)

    def load(self, task: Task) -> Loaded:
        data = self.loader.fetch(task.subject)
        task.step = "decode"
        return Loaded(task.subject, normalise(self.loader.decode(data)))

    def start_embeds(self) -> None:
        size = self.settings.batch_size
        while self.encoder and self.ready:
            lanes = len(self.under_way("embed"))
            if lanes == 2 * self.lanes or (lanes and len(self.ready) < size):
                return
            batch, self.ready = self.ready[:size], self.ready[size:]
            self.start(Task("embed", batch), self.encoder.embed, batch)

    def take(self, task: Task, given: Any) -> None:
        """Takes what a step gave, or the error that it ended with."""
        if task.step in ("fetch", "decode"):
            self.take_load(task, given)
        elif isinstance(given, Exception):
            self.trouble = self.trouble or given
            if task.step == "store":
                self.storing = False  # what was not stored is counted as left
        elif task.step == "model":
            self.encoder = given
            # the rate is that without the loading
            self.bar.initial, self.bar.start_t = self.bar.n, time.time()
        elif task.step == "find":
            page = (given or [])[: self.limit - self.report.found]
            self.found += page
            self.report.found += len(page)
            self.report.found_all = given is None
        elif task.step == "embed":
            self.take_results(given)
        else:
            for result, outcome in zip(task.subject, given, strict=True):
                self.report.count(result, *outcome)

    def take_load(self, task: Task, given: Loaded | Exception) -> None:
        host, passing = task.subject.host, False
        if isinstance(given, Loaded):
            self.slow_line = task.age > SLOW_SECONDS
            self.ready.append(given)
        else:
            reason = str(given)
            if not isinstance(given, Rejected):
                log.debug("%s", task.subject, exc_info=given)
                reason = f"unexpected {type(given).__name__}"
            failed = Failed(task.subject, task.step, reason, getattr(given, "permanent", False))
            self.take_results([failed])
            passing = task.step == "fetch" and not failed.permanent
        if not (host and passing):
            self.failures[host] = self.hosts_down = 0
            return
        self.failures[host] += 1
        if self.failures[host] == HOST_FAILURES:
            self.hosts_down += 1
            log.warning("%s: %s; its other images are left for the next run", host, failed)

    def take_results(self, results: list[Result]) -> None:
        self.results += results
        for result in results:
            if isinstance(result, Failed):
                log.debug("%s: %s", result.asset, result)
                self.failed += 1
            self.bar.set_postfix(failed=self.failed, refresh=False)
            self.bar.update()
            if self.bar.delay and self.bar.n % LOG_EVERY == 0:
                log.info("%s", self.bar)

    def give_up_what_hangs(self) -> None:
        """For what no deadline further down covers: headers that drip, a dead file system."""
        seconds = self.settings.fetch_seconds
        for future, task in list(self.tasks.items()):
            if task.step == "fetch" and task.age > seconds + 1:
                error: Exception = Rejected(f"not complete within {seconds:g} s", permanent=False)
            elif task.step in ("find", "store") and task.age > self.store.longest:
                error = RunError(f"{SILENCE} for {task.age:.0f} s: {CHECK_URL}")
            else:
                continue
            del self.tasks[future]
            self.take(task, error)


def progress_bar(goal: int) -> tqdm[Any]:
    """A bar on a terminal, else one that is never drawn: str() makes lines for the log of it."""
    drawn: dict[str, Any] = {"ncols": shutil.get_terminal_size().columns - 1}
    if not sys.stderr.isatty():
        line = "{n_fmt}/{total_fmt} done{postfix}, {rate_noinv_fmt}, {remaining} left"
        drawn = {"file": io.StringIO(), "delay": math.inf, "bar_format": line}
    return tqdm(total=goal, unit=" images", leave=False, smoothing=0, **drawn)


# ------------------------------------------------------------------ the gallery

THUMBNAIL = 128  # pixels a side; some 5 KB each, 260 at most
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Embeddings of {place}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }}
body {{ max-width: 1300px; margin: auto; padding: 1rem; overflow-wrap: anywhere }}
section {{ display: flex; flex-wrap: wrap; gap: .7rem; padding: .7rem 0 }}
.near {{ border-top: 1px solid #8884 }}
.near > :first-child {{ padding-right: .7rem; border-right: 3px solid #8886 }}
.pair {{ display: inline-flex; margin-right: 2rem }}
figure {{ margin: 0; width: 128px }}
img, .none {{ display: block; width: 128px; height: 128px; border-radius: 6px; background: #8883 }}
.none, figcaption {{ font-size: 12px; max-height: 128px; overflow: hidden }}
</style></head><body><main>
<h1>Embeddings of {place}</h1>
<p>{counts}</p>
<p>The numbers are cosines: 1.00 is the same picture. No fixed cut fits every catalog: compare with
two products that have nothing in common, which here have {typical}.</p>
<h2>Look-alikes: an image, and the six nearest to it</h2>{near}
<h2>Nearly the same: candidates for duplicates</h2>{pairs}
<h2>Failed</h2>{failed}
</main></body></html>
"""


def write_gallery(store: Store, settings: Settings, counts: str) -> None:
    """Writes the page that a person looks at; it loads nothing from outside."""
    made, none = store.gallery(), "<p>None yet.</p>"
    near = [[row[:2], *row[2]] for row in made["look_alikes"]]
    pairs = [[row[:2], row[2:]] for row in made["pairs"]]
    assets = {Asset(*picture[:2]) for row in near + pairs for picture in row}
    pictures = thumbnails(assets, Loader(store, settings), settings)

    def figure(asset_id: Id, image: str, *cosine: float) -> str:
        caption = "".join(f"<b>{x:.2f}</b> " for x in cosine) + link(asset_id, image)
        picture = pictures[Asset(asset_id, image)]
        return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"

    def sections(kind: str, rows: list[Any]) -> str:
        figures = ("".join(figure(*picture) for picture in row) for row in rows)
        return "".join(f'<section class="{kind}">{row}</section>' for row in figures) or none

    failed = ""
    for reason, count, examples in made["failed"]:
        items = "".join(f"<li>{link(*example)}</li>" for example in examples)
        failed += f"<h3>{count:,} {html.escape(reason)}</h3><ul>{items}</ul>"
    page = PAGE.format(
        place=html.escape(settings.client or str(settings.local or settings.url)),
        counts=counts,
        typical="none yet" if made["typical"] is None else f"{made['typical']:.2f}",
        near=sections("near", near),
        pairs=sections("pair", pairs),
        failed=failed or none,
    )
    path = settings.gallery or Path()
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from None
    log.info("look at %s", path.as_uri())


def thumbnails(assets: set[Asset], loader: Loader, settings: Settings) -> dict[Asset, str]:
    """What stands for each asset in the page: its picture, or a box with why there is none."""

    def thumbnail(asset: Asset) -> str:
        picture = Image.fromarray(loader.decode(loader.fetch(asset))).resize((THUMBNAIL, THUMBNAIL))
        picture.save(file := io.BytesIO(), "JPEG", quality=80)
        data = base64.b64encode(file.getvalue()).decode()
        return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(str(asset.id))}">'

    pool = ThreadPoolExecutor(settings.workers)
    futures = {asset: pool.submit(thumbnail, asset) for asset in assets}
    wait(futures.values(), settings.fetch_seconds + 1)
    pictures = {}
    for asset, future in futures.items():
        trouble = future.exception() if future.done() else "not there in time"
        box = f'<div class="none">{html.escape(str(trouble))}</div>'
        pictures[asset] = box if trouble else future.result()
    return pictures


def link(asset_id: Id, image: str) -> str:
    """An asset's id, with a link to its image where that is a web address."""
    name = f"<bdi>{html.escape(shorten(str(asset_id), 120))}</bdi>"
    if not re.match("(?i)https?://", image or ""):
        return name
    return f'<a href="{html.escape(image)}" rel="noreferrer">{name}</a>'


# ------------------------------------------------------------------ command line


def parser() -> argparse.ArgumentParser:
    """The command line's flags; those not given, but --workers, have the defaults of Settings."""
    usage = argparse.ArgumentParser(
        usage="%(prog)s [--limit N] [--client NAME] [--local DIR] [...]   -h: all flags",
        description="Give every product image in a Supabase database, or in a folder, "
        "a CLIP embedding. Run again to resume.",
        epilog="Settings come from the environment and from .env: see README.md. Exit codes: "
        "0 all done, 1 some assets failed, 2 could not run, 130 interrupted, 143 terminated.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = usage.add_argument
    add("--limit", type=positive_number, metavar="N", help="attempt at most N assets")
    add("--client", metavar="NAME", help="only this client's (with --local: subfolder's) images")
    add("--local", type=full_path, metavar="DIR", help="embed a folder's images; needs no account")
    most = min(MOST_WORKERS, WORKERS_PER_CORE * cores())
    workers = f"downloads at once ({WORKERS_PER_CORE} a core; not over {MOST_WORKERS})"
    add("--workers", type=positive_number, default=most, metavar="N", help=workers)
    add("--batch-size", type=positive_number, metavar="N", help="images to a batch (1)")
    add("--dtype", choices=["float32", "bfloat16"], help="number format (float32)")
    add("--device", choices=["cpu", "cuda", "mps"], help="where the model runs (cpu)")
    add("--shard", type=shard, metavar="I/N", help="only part I of N parts")
    add("--retry-failed", action="store_true", help="also try images that failed for good before")
    add("--gallery", type=page, metavar="FILE", help="write a page to look at (.html), at the end")
    add("--dry-run", action="store_true", help="say what would be done; load and write nothing")
    add("-v", "--verbose", action="store_true", help="say more, such as each failure as it happens")
    add("--version", action="store_true", help="say what a bug report needs, and exit")
    return usage


def positive_number(text: str) -> int:
    """A flag's number; raises ArgumentTypeError below 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """ "I/N" as two numbers; raises ArgumentTypeError for what is no part."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part like 1/4, 2/4, 3/4 or 4/4")
    return int(found[1]), int(found[2])


def full_path(text: str) -> Path:
    """A flag's path, whatever the current folder is later."""
    return Path(text).resolve()


def page(text: str) -> Path:
    """The gallery's file; raises ArgumentTypeError where it can't be written."""
    path = full_path(text)
    writable = os.access(path if path.exists() else path.parent, os.W_OK)
    if path.suffix != ".html" or path.is_dir() or not writable:
        raise argparse.ArgumentTypeError(f"{text!r} can't be written, or does not end in .html")
    return path


def say_version() -> None:
    """The versions, and the arithmetic that would be used."""
    import torch

    python = sys.version.split()[0]
    print(f"generate_embeddings.py {VERSION}, schema.sql {CONTRACT}, Python {python}")
    print(f"{MODEL_VERSION}: {MODEL_ID} at {MODEL_REVISION}")
    kind = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {kind}, bfloat16: {'yes' if has_bfloat16() else 'no'}")


def read_settings(flags: dict[str, Any]) -> Settings:
    """Flags, environment and the nearest .env as Settings; raises RunError that names the setting
    at fault. Nothing of .env enters the environment, which libraries read as well."""
    file = full_path(".env")
    here = file.is_file() or file.with_name(".env.local").is_file()
    file = file if here else HERE / ".env"
    try:
        in_file = dotenv.dotenv_values(file, encoding="utf-8-sig", interpolate=False)
    except (UnicodeDecodeError, OSError):
        raise RunError(f"{file} can't be read: save it as text in UTF-8") from None
    values = dict(flags)
    for spec in fields(Settings):
        names, needed = spec.metadata.get("names", ()), spec.name in ("url", "key")
        if needed and "local" in flags:
            continue
        for name in names:
            given, kept = os.environ.get(name, "").strip(), (in_file.get(name) or "").strip()
            if given or kept:
                hides = f", which hides the one in {file}" if kept not in ("", given) else ""
                source = f"{name} (from {f'the environment{hides}' if given else file})"
                values[spec.name] = setting_value(spec, source, given or kept)
                if spec.name == "key":
                    values["key_source"] = source
                break
        else:
            if needed:
                other = file.with_name(".env.local").is_file()
                local = ", not .env.local, which is not read" if other else ""
                raise RunError(
                    f"{names[0]} is not set: put it into {file}{local} (.env.example shows how), "
                    "or use --local DIR, which needs no account"
                )
    return Settings(**values)


def setting_value(spec: Any, source: str, text: str) -> Any:
    """A setting's value, once it looks like one; raises RunError."""
    found = re.fullmatch(spec.metadata["pattern"], text, re.ASCII)
    if not found:
        raise RunError(f"{source} {spec.metadata['advice']}")
    kind = type(spec.default)
    return found[1] == "1" if kind is bool else kind(found[1])


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    if sys.stderr is None:  # 2>&-: and the next file that is opened must not get its number
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    stop = Stop()
    try:
        flags = vars(parser().parse_args(argv))
        set_up_output("verbose" in flags)
        if flags.pop("version", False):
            say_version()
            return 0
        code = embed_all(read_settings(flags), stop)
        return stop.code or code
    except RunError as error:
        trouble = str(error)
    except ImportError as error:
        trouble = f"{error}: run {INSTALL}"
    except Exception as error:  # a defect; exit code 1 would say that some images failed
        log.debug("", exc_info=True)
        trouble = f"unexpected {type(error).__name__}: {error}; -v says more"
    line = printable(f"error: {trouble}")
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        line = textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
    with contextlib.suppress(OSError):  # there may be nobody to read it
        print(line, file=sys.stderr)
    return stop.code or 2


class Log(logging.StreamHandler[Any]):
    """Logs to stderr while somebody reads it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        # What is left in a broken pipe's buffer would fail each start of a process
        if isinstance(sys.exception(), OSError):
            sys.stderr = self.stream = Path(os.devnull).open("w")  # noqa: SIM115


class Lines(logging.Formatter):
    """Log lines without the control characters that ids, URLs and messages may hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def formatException(self, exc_info: Any) -> str:  # noqa: N802
        return "\n".join(map(printable, super().formatException(exc_info).split("\n")))


def set_up_output(verbose: bool) -> None:
    """Logs to stderr, with the time where nobody watches."""
    handler = Log()
    handler.setFormatter(Lines("%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings have tracebacks in them
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not each encoding has all that names may hold
        sys.stdout.reconfigure(errors="backslashreplace")


def first_answer(store: Store) -> Status:
    """The store's status; not even a database that drips its answer is waited for for long."""
    seconds = None if store.longest == math.inf else store.longest
    try:
        return ThreadPoolExecutor(1).submit(store.status).result(seconds)
    except TimeoutError:
        raise RunError(f"{SILENCE} for {seconds:.0f} s: {CHECK_URL}") from None


def embed_all(settings: Settings, stop: Stop) -> int:
    """The run, from the first question to the printed report. Returns the exit code."""
    store: Store = (FolderStore if settings.local else SupabaseStore)(settings, stop)
    status = first_answer(store)
    skipped = 0 if settings.retry_failed else status.failed + status.waiting
    report = Report(status.assets - status.done - skipped, skipped)
    log.info("%s%s to do", status, f"{report.pending:,}")
    if settings.dry_run:
        goal = min(report.pending, settings.limit or report.pending)
        print(f"Would embed {goal} asset{'s' * (goal != 1)} as {settings.model_version}")
        for asset in next(store.pages(), [])[: min(5, goal)]:
            print(printable(f"  {asset}"))
        return 0
    try:
        if report.pending:
            log.info("vectors go to %s", store.place)
            log.info("loading the model")
            stop.listen()
            Run(store, settings, report, stop).loop()
        else:
            log.info("nothing to do%s", "" if status.assets else ": there are no assets yet")
    finally:
        with contextlib.suppress(OSError):  # as in: ... | head -1
            print("\n".join(map(printable, report.lines())), flush=True)
    if settings.gallery and not stop.code:
        done, failed = status.done + report.embedded, report.failed + report.skipped
        counts = f"{status.assets:,} assets: {done:,} embedded, {failed:,} failed"
        write_gallery(store, settings, f"{counts}, {report.left:,} left")
    elif settings.local and report.embedded and sys.stderr.isatty():
        log.info("next: --gallery FILE.html shows what looks alike; README.md: with Supabase")
    return 1 if report.failed else 0


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, AttributeError):  # as in: ... | head, or >&-
        sys.stdout.flush()
    # A download may hang in a thread, and Python would wait for it
    os._exit(code)
