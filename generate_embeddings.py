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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import DataHandler, Request
from zlib import crc32

INSTALL = (
    "run pip install -r requirements.txt in an active virtual environment "
    "(python3 -m venv .venv makes it, . .venv/bin/activate activates it)"
)
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
    print(f"error: {error}: {INSTALL}", file=sys.stderr)
    sys.exit(2)

log = logging.getLogger("generate_embeddings")

# ------------------------------------------------------------------ the contract

VERSION = "2.0"
MODEL_ID = "openai/clip-vit-base-patch32"
MODEL_REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"  # pinned: vectors must not drift
MODEL_VERSION = "clip-vit-base-patch32"  # what rows carry; another value counts as lacking
HERE = Path(__file__).resolve().parent
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


URL_ADVICE = "is not like https://abcdefghijkl.supabase.co: copy the project's URL from the "
URL_ADVICE += "dashboard (Connect), not the dashboard's own address, nor the key"
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


class Asset(NamedTuple):
    """One image to embed: the store's id of it, and a URL or a path."""

    id: Id
    image: str
    mark: int = 0  # the store's, of this very image: a hash of the URL, or the file's time
    size: int = 0  # bytes of the text `image`, which comes cut short where it is too large

    @property
    def host(self) -> str:
        """The image host; empty for files and for data: URLs."""
        with contextlib.suppress(ValueError):
            return urlsplit(self.image[:2000]).netloc.rpartition("@")[2]
        return ""

    def __str__(self) -> str:
        return self.image if self.id == self.image else f"{self.id}  {shorten(self.image)}"


class Loaded(NamedTuple):
    """An asset with its pixels, float32 (3, 224, 224)."""

    asset: Asset
    pixels: np.ndarray


class Embedded(NamedTuple):
    """An asset with its vector, float32 (512,) of unit length."""

    asset: Asset
    vector: np.ndarray


class Failed(NamedTuple):
    """An asset that got no vector. Stages: fetch, decode, embed, store."""

    asset: Asset
    stage: str
    reason: str
    permanent: bool = False

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


Result = Embedded | Failed


class Status(NamedTuple):
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
        self.examples: dict[str, list[Asset]] = {}
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
            examples = self.examples.setdefault(failed, [])
            examples += [result.asset] if len(examples) < 3 else []

    def lines(self) -> Iterator[str]:
        """What is printed at the end; the last line is for programs."""
        seconds = time.monotonic() - self.started
        yield f"Embedded {self.embedded:>9,}"
        yield f"Failed   {self.failed:>9,}"
        for failed, count in self.failures.most_common(50):
            yield f"  {count:>6,}  {failed}"
            yield from (f"          {asset}" for asset in self.examples[failed])
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
LACKING = ("PGRST202", "42883", "42P01", "42703")
REFUSED = ("401", "403", "42501", "PGRST301", "PGRST302", "PGRST303")


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
        self._of = {"model_version": settings.model_version, "client": settings.client}
        self._part = {"shard": settings.shard[0], "shards": settings.shard[1]}

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

        status: Status = self._call("embedding_status", read, **self._of, **self._part)
        self._patience = self._settings.db_retry_seconds
        return status

    def pages(self) -> Iterator[list[Asset]]:
        """Pending assets in the order of their ids, a page at a time and each once; those that
        failed in an earlier run come last, so that they never keep the others waiting."""

        def read(answer: Any) -> tuple[list[Asset], Id | None]:
            assets = [
                Asset(row["id"], row["image"] or "", row["image_hash"], row["bytes"])
                for row in answer["assets"]
            ]
            return assets, answer["last"]

        of = self._of | self._part
        of["wanted"] = min(self._settings.limit or PAGE_ROWS, PAGE_ROWS)
        failed = {"failed_before": self._time, "permanent_too": self._settings.retry_failed}
        for which in (of, of | failed):
            last: Id | None = None
            while True:
                page, last = self._call("pending_assets", read, after=last, **which)
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
        rows: dict[str, list[Any]] = {"vectors": [], "failures": []}
        for result in results:
            row = {"asset_id": result.asset.id, "image_hash": result.asset.mark}
            if isinstance(result, Embedded):
                rows["vectors"].append(row | {"embedding": vector_text(result.vector)})
            else:
                rows["failures"].append(row | columns(result))

        def read(answer: Any) -> list[tuple[str, str]]:
            by_id = {row["asset_id"]: (row["outcome"], row.get("reason", "")) for row in answer}
            return [by_id[result.asset.id] for result in results]

        version = self._settings.model_version
        return self._call("store_embeddings", read, model_version=version, **rows)  # type: ignore[no-any-return]

    def gallery(self) -> Any:
        """What the gallery shows: see embedding_gallery in schema.sql."""
        return self._call("embedding_gallery", dict, **self._of)

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
                code = str(error.code or self._here.status)
                message = shorten(str(error.message), 300)
                if not PASSING.fullmatch(code):
                    raise RunError(self._explain(code, message)) from None
                trouble = f"{code}, {message}"
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

    def _explain(self, code: str, message: str) -> str:
        if code in LACKING:
            return f"the database lacks what this script calls ({message}): {RUN_SQL}"
        if code in REFUSED:
            return f"the key in {self._settings.key_source} was refused ({message}): {KEY_ADVICE}"
        if re.fullmatch(r"\d\d\d", code):
            return f"{self._settings.url} does not answer like a Supabase project (HTTP {code})"
        return f"the database says {message!r} ({code}): {RUN_SQL}"


def columns(failed: Failed) -> dict[str, Any]:
    """A failure's columns."""
    return {name: getattr(failed, name) for name in ("stage", "reason", "permanent")}


def vector_text(vector: np.ndarray) -> str:
    """A vector as pgvector reads it, in the fewest digits that give the same float32 back."""
    return "[" + ",".join(map(str, vector.astype(np.float32))) + "]"


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".avif"}
IMAGE_SUFFIXES |= {".tif", ".tiff", ".bmp", ".heic", ".heif"}
# A row is of the image as it was at that time of modification
FOLDER_TABLE = """
create table if not exists images (asset_id text primary key, modified integer not null,
    model_version text not null, embedding blob, stage text, reason text, permanent integer,
    created_at text not null, updated_at text not null)
"""
FOLDER_SAVE = """
insert into images values (:id, :mark, :version, :embedding, :stage, :reason, :permanent, :now,
    :now)
on conflict do update set modified = :mark, model_version = :version, embedding = :embedding,
    stage = :stage, reason = :reason, permanent = :permanent, updated_at = :now
where :embedding is not null or embedding is null or modified <> :mark
    or model_version <> :version
"""


class FolderStore:
    """The images below a folder, with their embeddings in one SQLite file there.

    Ids are the paths below it, clients its subfolders, vectors little-endian float32 blobs.
    Errors: RunError where the folder or that file is of no use.
    """

    FILE = "product_embeddings.sqlite3"
    longest = threading.TIMEOUT_MAX  # a disk has no deadline

    def __init__(self, settings: Settings, _: Stop) -> None:
        self._settings, self._folder = settings, settings.local or Path()
        self.place = str(self._folder / self.FILE)
        self._below = "" if settings.client is None else f"{settings.client.strip('/')}/"

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """The file's database; what is changed is one transaction."""
        try:
            nowhere = self._settings.dry_run and not Path(self.place).exists()
            place = ":memory:" if nowhere else self.place
            with contextlib.closing(sqlite3.connect(place, 60)) as database, database:
                database.execute(FOLDER_TABLE)
                yield database
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"{self.place}: {error}. It must be a database of this version of the script, in "
                "a folder that can be written to, with room on the disk"
            ) from None

    def status(self) -> Status:
        """Compares the folder's images with what the file says of them."""
        s, files = self._settings, dict(self._files())
        mine = [path for path in sorted(files) if path.startswith(self._below)]
        if not mine:
            hint = "--client is a subfolder" if self._below else "by the endings of the files there"
            raise RunError(f"no image below {self._folder / self._below}: {hint}")
        with self._database() as database:
            query = "select asset_id, modified, model_version, permanent from images"
            known = {path: row for path, *row in database.execute(query)}
            gone = [] if s.dry_run else [(path,) for path in known.keys() - files.keys()]
            database.executemany("delete from images where asset_id = ?", gone)
        mine = [path for path in mine if crc32(path.encode()) % s.shard[1] == s.shard[0] - 1]
        states: dict[str, list[Asset]] = {"new": [], "done": [], "failed": [], "for good": []}
        for path in mine:
            modified, version, permanent = known.get(path, (0, "", None))
            mark = files[path] or modified
            state = {None: "done", 0: "failed", 1: "for good"}[permanent]
            state = state if (mark, version) == (modified, s.model_version) else "new"
            states[state].append(Asset(path, path, mark))
        self._todo = [states["new"], states["failed"] + states["for good"] * s.retry_failed]
        return Status(len(mine), len(states["done"]), len(states["for good"]))

    def _files(self) -> Iterator[tuple[str, int]]:
        """Path and time (0: can't be read) of each image file, without hidden files and folders."""
        others: Counter[str] = Counter()
        for folder, folders, names in os.walk(self._folder, onerror=unreadable):
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
                except (FileNotFoundError, UnicodeEncodeError) as error:
                    log.warning("left out: %s: %s", ascii(str(path)), error)
                except OSError:  # of a folder that keeps its files from us, say
                    yield image, 0
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
        empty = dict.fromkeys(("embedding", "stage", "reason", "permanent"))
        empty |= {"version": self._settings.model_version, "now": now}
        with self._database() as database:
            for result in results:
                row = empty | {"id": result.asset.id, "mark": result.asset.mark}
                if isinstance(result, Failed):
                    row |= columns(result)
                else:
                    row["embedding"] = result.vector.astype("<f4").tobytes()
                database.execute(FOLDER_SAVE, row)
        return [("noted" if isinstance(r, Failed) else "stored", "") for r in results]

    def gallery(self) -> Any:
        """As SupabaseStore's, of 100,000 vectors at most."""
        query = """select count(*) || ' ' || stage || ': ' || reason, json_group_array(asset_id)
            from images where model_version = ? and instr(asset_id, ?) = 1 group by stage, reason"""
        blobs = bytearray()
        with self._database() as database:
            database.execute("begin")  # another run may store meanwhile
            rows = database.execute(query, [self._settings.model_version, self._below])
            failed = {why: sorted(json.loads(paths)) for why, paths in rows}
            paths = failed.pop(None, [])  # what has a vector has no reason
            paths = paths[:: 1 + len(paths) // 100_001]
            query = "select embedding from images where asset_id = ?"
            for path in paths:
                blobs += database.execute(query, [path]).fetchone()[0]
        vectors, near = np.frombuffer(blobs, "<f4").reshape(-1, DIMENSIONS), []
        sample = np.arange(0, len(paths), 1 + len(paths) ** 2 // 25_000_000)  # 100 MB of cosines
        for own, cosines in zip(sample, vectors[sample] @ vectors.T, strict=True):
            best = np.argpartition(-cosines, range(min(7, len(paths))))[:7]
            others = [(paths[n], paths[n], float(cosines[n])) for n in best if n != own]
            near.append([(paths[own], paths[own]), *others[:6]])
        pairs = {frozenset((a[0], b[0])): [a, b] for a, *others in near for b in others}
        some = vectors[:: 1 + len(paths) // 101]
        unlike = (some @ some.T)[np.triu_indices(len(some), 1)]
        return {
            "near": near[:: max(1, round(len(near) / 30))],
            "pairs": sorted(pairs.values(), key=lambda pair: -pair[1][2])[:24],
            "failed": [[(name,) for name in (why, *failed[why][:20])] for why in failed],
            "typical": float(np.median(unlike)) if len(unlike) else None,
        }


def unreadable(error: OSError) -> None:
    """Ends the run: what a folder does not show must not count as deleted. Raises RunError."""
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
    "to decode": "broken compression",
}


def network_reason(error: Exception) -> str:
    """What went wrong on the way to a host, in words that group well."""
    text = str(error)
    return next((why for sign, why in NETWORK_REASONS.items() if sign in text), "connection lost")


class Fetcher:
    """Gets the bytes of images, over connections that stay open; raises Rejected."""

    def __init__(self, settings: Settings) -> None:
        self._seconds = settings.fetch_seconds
        self._late = f"not complete within {self._seconds:g} s"
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
                left, pause = deadline - time.monotonic(), 2**attempt * random.uniform(0.125, 0.25)
                wanted = error.retry_after
                if wanted is None or wanted > max(left, 0) or attempt == FETCH_ATTEMPTS:
                    raise
                if pause > left:
                    raise Rejected(f"{self._late} ({error})", permanent=False) from None
            time.sleep(max(pause, wanted))
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
        port, options = connection.port, connection.socket_options
        private_too = self._trusted in (None, (connection.host, port))
        found = addresses(connection._dns_host, port, private_too)
        share, connect = connection.timeout / len(found), urllib3.util.connection.create_connection
        for address in found[:-1]:
            with contextlib.suppress(OSError):
                return connect((address, port), share, None, options)
        return connect((found[-1], port), share, None, options)

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Rejected(self._late, permanent=False)
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
    code, seconds = response.status_code, response.headers.get("Retry-After", "")
    reason = f"HTTP {code} {http.client.responses.get(code, '')}".strip()
    if 200 <= code < 500 and code not in (408, 425, 429):
        return Rejected(reason, code not in (401, 402, 403, 407))  # a block may be lifted
    wanted = float(seconds) if re.fullmatch(r"\d+", seconds, re.ASCII) else 0.0
    return Rejected(reason, False, retry_after=wanted)


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
    if zeros_at_end(image, data):
        raise Rejected(BROKEN)
    # JPEG's decoder can shrink by 2, 4 or 8 as it goes; the others take no draft
    shrink = max(1.0, min(width, height) / (KEEP_SCALE * SIDE))
    image.draft(None, (int(width / shrink), int(height / shrink)))
    image.load()
    read: Any = image  # of a grid that lies Pillow takes the tiles' rows for those of another width
    if image.format == "AVIF" and read._decoder.get_info()[0] != image.size:
        raise Rejected(BROKEN)
    result = in_rgb(image)
    with contextlib.suppress(Exception):  # broken EXIF data can't say how the camera was held
        result.getexif()[0x0112] = image.getexif().get(0x0112, 1)
        ImageOps.exif_transpose(result, in_place=True)
    return result


def zeros_at_end(image: Image.Image, data: bytes) -> bool:
    """Whether a copy stopped halfway, its rest zeros: these formats make some picture of them."""
    if image.format in ("JPEG", "MPO"):
        return data.endswith(bytes(4096)) and b"\xff\xd9" not in data.rstrip(b"\0")[-4096:]
    if image.format == "WEBP":
        data = data[: 8 + int.from_bytes(data[4:8], "little")]  # what follows is not its own
    packed = image.format in ("WEBP", "AVIF", "HEIF")  # EXIF may end in zeros, and is at the end
    return packed and data.endswith(bytes(4096)) and not image.info.get("exif")


# Other Pillow plugins stay shut: some start programs (EPS), none is a product photo.
FORMATS = ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP"]
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

    def decode(self, data: bytes) -> np.ndarray:
        """The levels (224, 224, 3) of an image file; raises Rejected."""
        reason = TOO_SLOW
        try:
            if not self._process:
                self._start()
            self._pipe.send_bytes(data)
            if self._pipe.poll(DECODE_PATIENCE):
                answer: np.ndarray | Rejected = self._pipe.recv()
                if isinstance(answer, Rejected):
                    raise answer
                return answer
        except (EOFError, OSError):  # it dies of some files
            if not self._process:
                raise Rejected("no process could be started to decode it", False) from None
            self._process.join(READ_SECONDS)
            reason = DEATHS.get(self._process.exitcode, KILLED)
        self._process.kill()
        self._process = None
        raise Rejected(reason, permanent=reason != KILLED)

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._process = process


def work(pipe: Any) -> None:
    """What a decoder's process does until the run closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run,
    if hasattr(os, "setsid"):
        os.setsid()  # and so is what timeout(1) or a closed terminal sends to its whole group
    warnings.simplefilter("ignore")  # Pillow's, about oddities that do no harm
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where libtiff writes
    with contextlib.suppress(EOFError, OSError):  # the run is over
        while True:
            data = pipe.recv_bytes()
            limit_one_image()
            pipe.send(levels_or_reason(data))


def limit_one_image() -> None:
    """Limits what this process may take from now on, where the system can."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # Windows has none

        def limit(kind: int, most: int) -> None:
            resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))

        limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + DECODE_SECONDS)
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        limit(resource.RLIMIT_DATA, pages * resource.getpagesize() + DECODE_MB * 2**20)


def levels_or_reason(data: bytes) -> np.ndarray | Rejected:
    """The levels of an image file, or why it has none."""
    try:
        return crop(decode(data))
    except Rejected as rejected:
        return rejected
    except Image.DecompressionBombError:
        return Rejected(TOO_MUCH)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # there may be too little left to say more, or to go on with
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
NOT_FINITE = "the model gave numbers that are not finite"


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
            (made,) = self.encode(np.zeros((1, 3, SIDE, SIDE), np.float32))
            if (made.size, config["hidden_act"]) != (DIMENSIONS, VIT_B_32["hidden_act"]):
                raise ValueError(f"it gives {made.size} numbers, by {config['hidden_act']}")
            if not np.isfinite(made).all():
                raise ValueError(NOT_FINITE)
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
        """Pixels (n, 3, 224, 224) -> vectors (n, 512)."""
        with self._torch.inference_mode():
            vectors = self._tower(self._torch.from_numpy(pixels)).float().cpu().numpy()
        made: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return made

    def embed(self, batch: list[Loaded]) -> list[Result]:
        """The batch with vectors in the place of pixels."""
        try:
            vectors = self.encode(np.stack([loaded.pixels for loaded in batch]))
        except RuntimeError as error:  # memory of the device that is not there, say
            trouble = f"the model failed on {len(batch)} images at once"
            fix = "try a smaller --batch-size, or another --device"
            raise RunError(f"{trouble} ({shorten(str(error), 100)}): {fix}") from None
        return [
            Embedded(loaded.asset, vector)
            if np.isfinite(vector).all()
            else Failed(loaded.asset, "embed", NOT_FINITE)
            for loaded, vector in zip(batch, vectors, strict=True)
        ]


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

STYLE = """
html { color-scheme: light dark; font: 15px system-ui; overflow-wrap: anywhere }
body { max-width: 80em; margin: 1em auto; padding: 0 1em }
section { display: flex; flex-wrap: wrap; gap: 1em; padding: 1em 0; border-top: 1px solid #888 }
.pairs { display: inline-flex; vertical-align: top; margin-right: 2em }
figure { margin: 0; width: 128px; font-size: 12px }
figure:first-child { padding-right: 1em; border-right: 3px solid #888 }
div { height: 128px; background: #8883; overflow: hidden }
"""


def write_gallery(store: Store, settings: Settings, counts: str) -> None:
    """Writes the page; it loads nothing from outside."""
    made, loader = store.gallery(), Loader(store, settings)
    pool = ThreadPoolExecutor(settings.workers)
    shown = {Asset(*one[:2]) for row in made["near"] + made["pairs"] for one in row}
    tasks = {asset.id: pool.submit(thumbnail, asset, loader) for asset in shown}
    wait(tasks.values(), settings.fetch_seconds + 1)

    def figure(name: Id, image: str = "", *cosine: float) -> str:
        picture, text = "", html.escape(shorten(str(name), 120))
        if task := tasks.get(name):
            trouble = task.exception() if task.done() else "not in time"
            picture = f"<div>{html.escape(str(trouble)) if trouble else task.result()}</div>"
        if re.match("(?i)https?://", image):
            text = f'<a href="{html.escape(image)}">{text}</a>'
        text = "".join(f"<b>{x:.2f}</b> " for x in cosine) + text
        return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"

    def rows(kind: str) -> str:
        rows = ("".join(figure(*one) for one in row) for row in made[kind])
        return "".join(f'<section class="{kind}">{row}</section>' for row in rows) or "None yet."

    title = "Embeddings of " + html.escape(settings.client or str(settings.local or settings.url))
    typical = f"{made['typical']:.2f}" if made["typical"] else "none yet"
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{STYLE}</style><h1>{title}</h1><p>{counts}</p>
<p>The numbers are cosines: 1.00 is the same picture, and unrelated products here have {typical}.
No cut fits every catalog.</p>
<h2>Look-alikes, nearest first</h2>{rows("near")}
<h2>Nearly the same: duplicates?</h2>{rows("pairs")}
<h2>Failed</h2>{rows("failed")}
"""
    path = settings.gallery or Path()
    try:
        path.write_text(page, "utf-8", "replace")
    except OSError as error:
        raise RunError(f"{path} can't be written: {error.strerror}") from None
    log.info("look at %s", path.as_uri())


def thumbnail(asset: Asset, loader: Loader) -> str:
    """What CLIP sees of an asset."""
    picture = Image.fromarray(loader.decode(loader.fetch(asset))).resize((128, 128))
    picture.save(file := io.BytesIO(), "JPEG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(str(asset.id))}">'


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
    try:
        here = file.is_file() or file.with_name(".env.local").is_file()
        file = file if here else HERE / ".env"
        in_file = dotenv.dotenv_values(file, encoding="utf-8-sig", interpolate=False)
    except (UnicodeDecodeError, OSError):
        raise RunError(
            f"{file} can't be read: it must be text in UTF-8, and yours to read"
        ) from None
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
        trouble = f"{error}: {INSTALL}"
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

    def format(self, record: logging.LogRecord) -> str:
        record.msg, record.args = printable(record.getMessage()), ()
        return "\n".join(map(printable, super().format(record).split("\n")))  # a traceback's


def set_up_output(verbose: bool) -> None:
    """Logs to stderr, with the time where nobody watches."""
    handler = Log()
    handler.setFormatter(Lines("%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings have tracebacks in them
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not each encoding has all that names may hold
        sys.stdout.reconfigure(errors="backslashreplace")


def embed_all(settings: Settings, stop: Stop) -> int:
    """The run, from the first question to the printed report. Returns the exit code."""
    store: Store = (FolderStore if settings.local else SupabaseStore)(settings, stop)
    try:  # a database may drip its answer
        status = ThreadPoolExecutor(1).submit(store.status).result(store.longest)
    except TimeoutError:
        raise RunError(f"{SILENCE} for {store.longest:.0f} s: {CHECK_URL}") from None
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
