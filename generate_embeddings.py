"""Give every product image in a Supabase database (or a folder) a CLIP embedding.

    pending assets -> fetch + decode + preprocess (threads) -> embed -> upsert -> report

Glossary
    asset     one product image to embed: an id and where its image is
    page      a short list of pending assets, read by keyset (id > last)
    pixels    a float32 array (3, 224, 224), what CLIP's image tower takes
    vector    a float32 array (512,) of unit length, what it gives
    failure   an asset that got no vector, with the stage and the reason

Commands
    python generate_embeddings.py --limit 10              the first ten
    python generate_embeddings.py --client "BigClient"    one client's
    python generate_embeddings.py                         all; run again to resume
    python generate_embeddings.py --local photos          a folder, no account

Exit codes
    0 all done   1 some assets failed   2 could not run   130 interrupted (143 by SIGTERM)
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while the imports go on: no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
if sys.version_info < (3, 11):
    print("error: Python 3.11 or later is needed, not " + sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import argparse
import base64
import contextlib
import functools
import hashlib
import http.client
import io
import ipaddress
import itertools
import json
import logging
import queue
import random
import re
import socket
import sqlite3
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import DataHandler, Request

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
    print(f"error: {error}: run pip install -r requirements.txt first", file=sys.stderr)
    sys.exit(2)

log = logging.getLogger("generate_embeddings")
HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------ the contract

MODEL_ID = "openai/clip-vit-base-patch32"
MODEL_REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"  # pinned: vectors must not drift
MODEL_VERSION = "clip-vit-base-patch32"  # what rows carry; another value counts as lacking
MODEL_CACHE = HERE / ".cache" / "transformers"
DIMENSIONS = 512
SIDE = 224  # pixels; CLIP sees a square
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, by channel
STD = (0.26862954, 0.26130258, 0.27577711)

MAX_BYTES = 50 * 2**20  # of one image file; also what one download can hold in memory
MAX_PIXELS = 128_000_000  # 512 MB once decoded: more would not fit a 2 GB machine
LARGE_PIXELS = 4_000_000  # above it images are decoded one at a time, so memory stays flat
BAND_ROWS = 1024  # and brought to RGB in bands of about that many rows
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would only warn
MIN_SIDE = 16  # pixels; below it: tracking pixels and spacers
MAX_ASPECT = 100  # above it: rules and borders, of which CLIP would see a sliver
KEEP_SCALE = 3  # large images are first reduced to at least this many times SIDE

# A core embeds 10 (float32) to 40 images/s, more in batches; a host 300 ms away gives a worker 3
WORKERS_PER_CORE = 8
MOST_WORKERS = 64  # more at once few image hosts like
FETCH_ATTEMPTS = 4
MAX_REDIRECTS = 5
READ_SECONDS = 10  # between two packets; the deadline for the whole is FETCH_SECONDS
MAX_OUTAGES = 50  # failures in a row, and none the image's own: the network is gone, say

PAGE_ROWS = 250  # few enough for image columns that hold data: URLs
WINDOW_ROWS = 5_000  # assets that one statement may look through: 0.5 s from a cold disk, not 8
LOG_WINDOWS = 40  # of a large catalog that is nearly done nothing else would be seen
URL_LENGTH = 6000  # of a list of ids in a URL; gateways refuse some 8,000
WRITE_ROWS = 50  # rows to an upsert; with an index at a million rows far below the 8 s timeout
WRITE_SECONDS = 2.0  # a vector waits no longer than this, but for the batch before its own
ANSWER_SECONDS = 30.0  # of the database; Supabase ends statements after 8
CHECK_SECONDS = 5.0  # patience of the checks before the run
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

    code = ""  # the database's, where it gave one


class Stop:
    """Set by the first Ctrl-C or SIGTERM; one after ECHO_SECONDS ends the process at once.

    Without locks, unlike threading.Event: a handler runs amid the code it interrupts.
    """

    code = 0  # the exit code, once set
    _since = 0.0  # when the first signal came

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: object) -> None:
        if self.code:
            if time.monotonic() - self._since > ECHO_SECONDS:
                os._exit(128 + number)
            return
        self._since = time.monotonic()
        self.code = 128 + number
        # not by print: the handler may have interrupted one
        start = b"\n" if os.isatty(2) else b""  # leaves the progress bar's line
        with contextlib.suppress(OSError):  # Ctrl-C may have ended the reader of a pipe, too
            os.write(
                2, start + b"stopping; what is embedded is being stored. Again: ends at once\n"
            )

    def is_set(self) -> bool:
        return self.code != 0

    def wait(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not self.code and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
        return self.is_set()


class Rejected(Exception):  # noqa: N818 - no error of the program
    """One image can't be used. `permanent`: trying again later would give the same."""

    def __init__(
        self, reason: str, permanent: bool = True, retry_after: float | None = None
    ) -> None:
        super().__init__(reason)
        self.permanent = permanent
        self.retry_after = retry_after


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on, from the command line and the environment."""

    local: Path | None = None
    limit: int | None = None
    client: str | None = None
    shard: tuple[int, int] = (1, 1)
    workers: int = 8
    batch_size: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    dry_run: bool = False
    retry_failed: bool = False
    verbose: bool = False
    url: str = ""
    key: str = field(default="", repr=False)
    clip_model: str = ""
    assets_table: str = "assets"
    asset_id_column: str = "id"
    asset_image_column: str = "image_url"
    asset_client_column: str = "client_name"
    embeddings_table: str = "product_embeddings"
    failures_table: str = "product_embedding_failures"
    storage_bucket: str = ""
    allow_private_hosts: bool = False
    fetch_seconds: float = 30.0
    db_retry_seconds: float = 180.0


Id = str | int  # uuid and text come as str


@dataclass(frozen=True)
class Asset:
    """One image to embed: the database's id of it, and a URL or a path."""

    id: Id
    image: str
    again: bool = False  # it failed in an earlier run, for a reason that may have passed


@dataclass(frozen=True)
class Failure:
    """Why an asset got no vector. Stages: fetch, decode, embed, store."""

    asset: Asset
    stage: str
    reason: str
    permanent: bool

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


class Report:
    """The counts of a run. What was embedded or failed was attempted, however the run ends."""

    EXAMPLES = 3  # of each reason
    REASONS = 50  # told apart; some hold an address or a database's words

    def __init__(self, known_failures: int = 0) -> None:
        self.known_failures = known_failures
        self.total: int | None = None  # pending assets within reach, once they are counted
        self.found_all = False  # the store has no further pending asset
        self.complete = False  # no pending asset is left unattempted
        self.embedded = 0  # and stored
        self.deleted = 0  # from the assets table, while they were embedded
        self.lost = 0  # vectors that nobody knows to be stored, as the database was gone
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], list[Asset]] = {}
        self.started = time.monotonic()
        self._lock = threading.Lock()  # the run and its writer both report failures

    @property
    def failed(self) -> int:
        return self.reasons.total()

    @property
    def attempted(self) -> int:
        return self.embedded + self.failed

    @property
    def left(self) -> int | None:
        """Assets that were not attempted; None where nobody knows."""
        if self.complete or self.total is None:
            return 0 if self.complete else None
        left = self.total - self.attempted - self.deleted
        return left if left >= 0 else None

    def goal(self, limit: int | None) -> int | None:
        """Assets to attempt; None where nobody knows."""
        return min((n for n in (self.total, limit) if n is not None), default=None)

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0

    def fail(self, failure: Failure) -> None:
        log.debug("asset %s: %s", failure.asset.id, failure)
        cause = (failure.stage, failure.reason)
        with self._lock:
            if len(self.reasons) >= self.REASONS and cause not in self.reasons:
                cause = (failure.stage, "other reasons")
            self.reasons[cause] += 1
            examples = self.examples.setdefault(cause, [])
            if len(examples) < self.EXAMPLES:
                examples.append(failure.asset)

    def __str__(self) -> str:
        seconds = time.monotonic() - self.started
        left = "unknown" if self.left is None else self.left
        lines = [f"Embedded {self.embedded:>9,}", f"Failed   {self.failed:>9,}"]
        for cause, count in self.reasons.most_common():
            lines.append(f"  {count:>6,}  {': '.join(cause)}")
            lines += [f"          {a.id}  {shorten(a.image)}" for a in self.examples[cause]]
        if self.known_failures:
            known = f"{self.known_failures:>9,}  known failures; --retry-failed tries them"
            lines.append(f"Skipped  {known}")
        if self.lost:
            lines.append(f"Unstored {self.lost:>9,}  perhaps not stored; the next run sees to them")
        if self.deleted:
            lines.append(f"Deleted  {self.deleted:>9,}  from the assets table meanwhile")
        lines += [
            f"Left     {left:>9}",
            f"Elapsed  {seconds:>8.1f}s",
            f"embedded={self.embedded} failed={self.failed} left={left} "
            f"attempted={self.attempted} skipped={self.known_failures} "
            f"deleted={self.deleted} seconds={seconds:.1f}",
        ]
        return "\n".join(lines)


def in_shard(asset: Asset, shard: tuple[int, int]) -> bool:
    """Whether an asset is in part I of N: by a hash of its id, so the same at any time."""
    part, parts = shard
    digest = hashlib.blake2b(str(asset.id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % parts == part - 1


def shorten(text: str, width: int = 60) -> str:
    """The text on one printable line of at most `width` characters, its middle left out."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    half = width // 2 - 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"


# ------------------------------------------------------------------ stores


NO_API = "does not answer like a Supabase project: check SUPABASE_URL and any proxy"


class SupabaseStore:
    """Assets and embeddings in Supabase, through PostgREST.

    Errors: RunError for what stops a run (key, table, column, database away for longer than
    `db_retry_seconds`). Safe to use from several threads.
    """

    def __init__(self, settings: Settings, stop: Stop) -> None:
        import httpx
        import supabase

        self._settings = settings
        self.place = f"{settings.embeddings_table} at {settings.url}"
        self._stop = stop
        self._started = ""
        self._patience = CHECK_SECONDS
        self._remembers = False  # until the table of failures is found
        self._here = threading.local()
        http = httpx.Client(
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=READ_SECONDS),
            follow_redirects=False,  # a redirect would carry the key to another origin
            event_hooks={"response": [self._note_status]},
        )
        options = supabase.ClientOptions(httpx_client=http, postgrest_client_retry=False)
        self._table: Callable[[str], Any] = supabase.create_client(
            settings.url, settings.key, options
        ).table

    def _note_status(self, response: Any) -> None:
        self._here.status = response.status_code  # an APIError with a JSON body lacks it
        self._started = self._started or _time_there(response.headers.get("date", ""))
        if response.is_success and "html" in response.headers.get("content-type", ""):
            raise RunError(f"{self._settings.url} {NO_API}")

    def check(self) -> None:
        """Finds what would stop the run, before the model is loaded. Writes nothing."""
        s = self._settings
        columns = f"id:{s.asset_id_column},{s.asset_image_column}"
        advice = "set ASSETS_TABLE, ASSET_ID_COLUMN and ASSET_IMAGE_COLUMN to your own names"
        query = self._table(s.assets_table).select(columns).order(s.asset_id_column).limit(1)
        first = self._send(query, advice).data
        advice = (
            "run schema.sql in Supabase's SQL editor (it shows each column's type, too), "
            "or set EMBEDDINGS_TABLE"
        )
        columns = "asset_id,embedding,model_version,created_at,updated_at"
        self._send(self._table(s.embeddings_table).select(columns).limit(1), advice)
        self._check_client()
        if first:
            self._check_joins(first[0]["id"])
            self._check_upsert(first[0]["id"])
        self._patience = s.db_retry_seconds

    def _check_joins(self, some_id: Id) -> None:
        s = self._settings
        advice = (
            f"add the foreign key: alter table {s.embeddings_table} add foreign key (asset_id) "
            f"references {s.assets_table} ({s.asset_id_column}) on delete cascade"
        )
        self._send(self._pending().lte(s.asset_id_column, some_id).limit(1), advice)
        try:
            columns = "asset_id,model_version,stage,reason,permanent,attempts,updated_at"
            advice = "run schema.sql, which makes that table; drop an old one first"
            self._send(self._table(s.failures_table).select(columns).limit(1), advice)
            self._remembers = True
            self._send(self._pending().lte(s.asset_id_column, some_id).limit(1), advice)
        except RunError as error:
            if error.code not in ("42P01", "42703", "PGRST200", "PGRST204", "PGRST205"):
                raise
            self._remembers = False
            log.info("broken images are tried in every run: %s", error)

    def _check_upsert(self, some_id: Id) -> None:
        """A statement that must fail, as it names one key twice, shows whether it could work:
        the constraint, the vector's size and the right to write are looked at before that."""
        from postgrest import APIError

        s = self._settings
        row = self._row(some_id) | {"embedding": vector_text(np.zeros(DIMENSIONS))}
        try:
            query = self._table(s.embeddings_table).upsert(
                [row, row], on_conflict="asset_id", returning="minimal"
            )
            self._send(query, "run schema.sql in Supabase's SQL editor", rows=True)
        except APIError as error:
            if error.code == "22000":
                raise RunError(
                    f'{s.embeddings_table}.embedding has the wrong size ({error.message}): run "'
                    f"alter table {s.embeddings_table} drop column embedding, "
                    f'add column embedding vector({DIMENSIONS})", then schema.sql again'
                ) from None
            if error.code != "21000":
                raise RunError(
                    f"the database refuses rows for {s.embeddings_table}: {error.message}"
                ) from None

    def _check_client(self) -> None:
        s = self._settings
        if s.client is None:
            return
        if not self._send(self._assets().limit(1), "set ASSET_CLIENT_COLUMN to your own").data:
            named = f'{s.asset_client_column} = "{s.client}"'
            raise RunError(f"no asset has {named}: check the spelling of --client")

    def _assets(self, columns: str = "", count: Any = None) -> Any:
        """A query for assets, of the client where one is set."""
        s = self._settings
        query = self._table(s.assets_table).select(self._columns() + columns, count=count)
        return query if s.client is None else query.eq(s.asset_client_column, s.client)

    def _columns(self) -> str:
        """What is asked of an asset; with a client in another table, that it has one there."""
        s = self._settings
        table = s.asset_client_column.rpartition(".")[0]
        columns = f"id:{s.asset_id_column},image:{s.asset_image_column}"
        return f"{columns},{table}!inner()" if s.client is not None and table else columns

    def _pending(self, count: Any = None) -> Any:
        """A query for the assets with neither embedding nor failure: an anti-join on the server."""
        s = self._settings
        others = [s.embeddings_table] + [s.failures_table] * self._remembers
        query = self._assets("".join(f",{other}()" for other in others), count)
        for other in others:
            query = query.eq(f"{other}.model_version", MODEL_VERSION).is_(other, "null")
        return query

    def _failed(self, permanent: bool | None, count: Any = None) -> Any:
        """A query for the failures of earlier runs, with their assets; of both kinds if None."""
        s = self._settings
        query = self._table(s.failures_table).select(
            f"asset_id,asset:{s.assets_table}!inner({self._columns()})", count=count
        )
        query = query.eq("model_version", MODEL_VERSION).lt("updated_at", self._started)
        if permanent is not None:
            query = query.is_("permanent", str(permanent).lower())
        return query if s.client is None else query.eq(f"asset.{s.asset_client_column}", s.client)

    def count(self, first: Asset | None = None) -> int | None:
        """Pending assets; None where the database takes too long to count them. `first`, where
        it is known, is the first of them, and spares the way there."""
        column = self._settings.asset_id_column
        total = 0 if first is None or first.again else 1
        windows = iter(()) if first and first.again else self._windows(first.id if first else None)
        try:
            for cursor, end in windows:
                query = _between(self._pending("exact"), column, cursor, end).limit(1)
                total += self._send(query, divisible=True).count
        except TimeoutError:
            return None
        permanent = None if self._settings.retry_failed else False
        return total + (self._count_failed(permanent) if self._remembers else 0)

    def count_known_failures(self) -> int:
        """Assets that are left out because of an earlier permanent failure."""
        left_out = self._remembers and not self._settings.retry_failed
        return self._count_failed(True) if left_out else 0

    def _count_failed(self, permanent: bool | None) -> int:
        return int(self._send(self._failed(permanent, "exact").limit(1)).count or 0)

    def pending(self) -> Iterator[Asset]:
        """Yields pending assets in the order of their ids, read as they are needed; those that
        failed in an earlier run come last, so that they never keep the others waiting.

        By keyset and never by offset, as rows leave the pending set meanwhile. Only an empty
        page ends a walk: a server may cap pages below what was asked.
        """
        column = self._settings.asset_id_column
        for number, (cursor, end) in enumerate(self._windows(), 1):
            for row in self._walk(self._pending, column, "id", cursor, end):
                yield Asset(row["id"], image_of(row))
            if number % LOG_WINDOWS == 0:
                log.info("%d assets looked through", number * WINDOW_ROWS)
        permanent = None if self._settings.retry_failed else False
        if self._remembers:
            query = functools.partial(self._failed, permanent)
            for row in self._walk(query, "asset_id", "asset_id", None, None):
                yield Asset(row["asset_id"], image_of(row["asset"]), again=True)

    def _walk(
        self, make: Callable[[], Any], column: str, key: str, cursor: Id | None, end: Id | None
    ) -> Iterator[dict[str, Any]]:
        while True:
            query = _between(make().order(column), column, cursor, end).limit(PAGE_ROWS)
            page = self._send(query).data
            if not page:
                return
            yield from page
            cursor = page[-1][key]

    def _windows(self, cursor: Id | None = None) -> Iterator[tuple[Id | None, Id | None]]:
        """Stretches of WINDOW_ROWS assets as (after this id, up to this id); None: no bound.

        One statement over a long stretch of finished assets would run into the timeout.
        """
        column = self._settings.asset_id_column
        while True:
            query = self._table(self._settings.assets_table).select(f"id:{column}").order(column)
            query = _between(query, column, cursor, None)
            last = self._send(query.range(WINDOW_ROWS - 1, WINDOW_ROWS - 1)).data
            end = last[0]["id"] if last else None
            yield cursor, end
            if end is None:
                return
            cursor = end

    def locate(self, image: str) -> tuple[str, dict[str, str]]:
        """Where an image is and the headers to send there; the key only to the own storage."""
        s = self._settings
        if image.startswith("//"):
            image = "https:" + image
        objects = f"{s.url}/storage/v1/object/"
        if image.startswith(objects):
            path = image.removeprefix(objects)
            if path.startswith("sign/"):  # carries a token of its own
                return image, {}
            path = path.removeprefix("public/").removeprefix("authenticated/")
        elif re.match("(?i)(https?|data):", image) or (
            not s.storage_bucket and ":" in image.split("/", 1)[0]
        ):
            return image, {}
        elif not image:
            raise Rejected("no image URL")
        elif not s.storage_bucket:
            reason = "not a URL: if it is a path in Supabase Storage, set STORAGE_BUCKET"
            raise Rejected(reason, permanent=False)
        else:
            path = f"{quote(s.storage_bucket)}/{quote(image.lstrip('/'))}"
        if ".." in unquote(path).split("/"):
            raise Rejected("a storage path with '..' in it")
        return f"{objects}authenticated/{path}", {
            "apikey": s.key,
            "Authorization": f"Bearer {s.key}",
        }

    def save(self, rows: list[tuple[Asset, np.ndarray]]) -> list[tuple[Asset, str | None]]:
        """Upserts vectors (512,). Returns the assets that the database refused, each with the
        reason, None for an asset that was deleted meanwhile."""
        assets = {asset.id: asset for asset, _ in rows}
        table = self._settings.embeddings_table
        made = [self._row(a.id) | {"embedding": vector_text(v)} for a, v in rows]
        refused = {
            row["asset_id"]: None if error.code == "23503" else str(error.message)
            for row, error in self._upsert(table, made)
        }
        refused |= dict.fromkeys(self._drop_outdated(table, assets), "its image URL has changed")
        return [(assets[asset_id], reason) for asset_id, reason in refused.items()]

    def save_failures(self, failures: list[Failure]) -> None:
        """Remembers failures, so that later runs skip the permanent ones."""
        if not self._remembers:
            return
        s = self._settings
        columns = ("stage", "reason", "permanent")
        rows = [
            self._row(f.asset.id) | {name: getattr(f, name) for name in columns} for f in failures
        ]
        for row, error in self._upsert(s.failures_table, rows):
            log.debug("failure of asset %s not remembered: %s", row["asset_id"], error.message)
        self._drop_outdated(s.failures_table, {f.asset.id: f.asset for f in failures})

    def _drop_outdated(self, table: str, assets: dict[Id, Asset]) -> list[Id]:
        """Deletes the rows of assets whose image URL changed between page and upsert, so that
        the next run sees to the new image. (Later changes are the trigger's.) Returns ids."""
        s = self._settings
        columns = f"id:{s.asset_id_column},image:{s.asset_image_column}"
        ids = list(assets)
        some = max(1, URL_LENGTH // (3 * max((len(str(i)) for i in ids), default=1) + 3))
        outdated: list[Id] = []
        for start in range(0, len(ids), some):
            query = self._table(s.assets_table).select(columns)
            for row in self._send(query.in_(s.asset_id_column, ids[start : start + some])).data:
                if image_of(row) != assets[row["id"]].image:
                    outdated.append(row["id"])
                    self._send(self._table(table).delete().eq("asset_id", row["id"]))
        return outdated

    @staticmethod
    def _row(asset_id: Id) -> dict[str, Any]:
        # "now" is PostgreSQL's own word for the time at the server
        return {"asset_id": asset_id, "model_version": MODEL_VERSION, "updated_at": "now"}

    def _upsert(self, table: str, rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Any]]:
        """Upserts rows; halves a batch that is refused or too slow, so that one bad row fails
        alone. Returns the refused rows with their APIError. created_at is not sent: kept."""
        from postgrest import APIError

        try:
            query = self._table(table).upsert(rows, on_conflict="asset_id", returning="minimal")
            self._send(query, "run schema.sql again", rows=True, divisible=len(rows) > 1)
            return []
        except TimeoutError:
            log.info("database: %d rows took too long, trying half of them", len(rows))
        except APIError as error:
            if len(rows) == 1:
                return [(rows[0], error)]
        middle = len(rows) // 2
        return self._upsert(table, rows[:middle]) + self._upsert(table, rows[middle:])

    def _send(
        self, query: Any, advice: str = "", rows: bool = False, divisible: bool = False
    ) -> Any:
        """Sends one request; tries again, with backoff, for as long as trouble may pass.

        Raises RunError; for a request that brings `rows` APIError where those are at fault, and
        TimeoutError at once for a `divisible` one that took too long.
        """
        import httpx
        from postgrest import APIError

        started = time.monotonic()
        for attempt in itertools.count():
            try:
                return query.execute()
            except APIError as error:
                status = self._here.status
                if divisible and error.code == "57014":
                    raise TimeoutError from None
                if rows and error.code and re.match("21|22|23|P0", error.code):
                    raise
                if status not in (408, 425, 429) and status < 500:
                    refusal = RunError(self._explain(error, status, advice))
                    refusal.code = error.code or ""
                    raise refusal from None
                trouble = f"HTTP {status}, {shorten(str(error.message))}"
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            self._wait(attempt, started, trouble)
        raise AssertionError  # count() has no end

    def _wait(self, attempt: int, started: float, trouble: str) -> None:
        """Sleeps before the next attempt, or raises RunError when patience is at its end."""
        patience = min(self._patience, 10) if self._stop.is_set() else self._patience
        left = started + patience - time.monotonic()
        if left <= 0:
            check = "SUPABASE_URL and " if self._patience == CHECK_SECONDS else ""
            raise RunError(
                f"no answer from the database at {self._settings.url} for {patience:.0f} s "
                f"({trouble}): check {check}the project's status, then run again; "
                "what is stored stays stored"
            )
        log.info("database: %s; trying again", trouble)
        delay = min(2 ** min(attempt, 5) * random.uniform(0.25, 0.5), left)
        if self._stop.wait(delay):
            time.sleep(min(delay, 1))

    def _explain(self, error: Any, status: int, advice: str) -> str:
        s = self._settings
        if error.code == "42501":
            return (
                f'{error.message}: set SUPABASE_SERVICE_ROLE_KEY to the service_role key, or run "'
                f"grant all on {s.assets_table}, {s.embeddings_table}, {s.failures_table} "
                'to service_role"'
            )
        if status in (401, 403):
            return (
                f"the key was refused ({error.message}): copy the service_role (or secret) key "
                "from the project's API settings to SUPABASE_SERVICE_ROLE_KEY"
            )
        if error.code == "42P10":
            return (
                f"asset_id of {s.embeddings_table} is not unique: run "
                f'"alter table {s.embeddings_table} add primary key (asset_id)"'
            )
        if error.code == "PGRST201":
            advice = "drop all foreign keys between these tables but one"
        if error.code == str(status):
            return f"{s.url} {NO_API} (HTTP {status})"
        return f"{error.message} ({error.code}): {advice or 'see Troubleshooting in README.md'}"


def _time_there(date: str) -> str:
    """The server's time, from its Date header where our clock is off by more than that tells."""
    now = datetime.now(UTC)
    with contextlib.suppress(ValueError, TypeError):
        there = parsedate_to_datetime(date)
        if abs(there - now) > timedelta(seconds=2):
            now = there
    return now.isoformat()


def image_of(row: dict[str, Any]) -> str:
    """The image column of a row, as one string; empty where there is none."""
    return str(row["image"] or "").strip()


def _between(query: Any, column: str, after: Id | None, up_to: Id | None) -> Any:
    if after is not None:
        query = query.gt(column, after)
    return query if up_to is None else query.lte(column, up_to)


def vector_text(vector: np.ndarray) -> str:
    """A vector as pgvector reads it, in the fewest digits that give the same float32 back."""
    return "[" + ",".join(map(str, vector.astype(np.float32))) + "]"


FOLDER_SCHEMA = """
create table if not exists assets (
    id text primary key, image_url text not null, client_name text not null,
    modified integer not null);
create index if not exists assets_client on assets (client_name, id);
create table if not exists product_embeddings (
    asset_id text primary key references assets (id) on delete cascade,
    embedding blob not null, model_version text not null,
    created_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    updated_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')));
create table if not exists product_embedding_failures (
    asset_id text primary key references assets (id) on delete cascade,
    model_version text not null, stage text not null, reason text not null,
    permanent integer not null, attempts integer not null default 1,
    created_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    updated_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')));
create trigger if not exists image_changed after update on assets
    when old.modified is not new.modified begin
        delete from product_embeddings where asset_id = new.id;
        delete from product_embedding_failures where asset_id = new.id;
    end;
create temp table if not exists found (id text primary key, image_url, client_name, modified);
"""


def _raise(error: OSError) -> None:
    raise RunError(f"{error.filename} can't be read ({error.strerror}): nothing was changed")


class FolderStore:
    """The images below a folder, with their embeddings in one SQLite file in that folder.

    Tables and columns are those of schema.sql, vectors little-endian float32 blobs.
    Errors: RunError where the file can't be read or written.
    """

    FILE = "product_embeddings.sqlite3"
    LOCK_SECONDS = 60.0  # for another process on the same folder

    def __init__(self, settings: Settings, stop: Stop) -> None:
        if settings.local is None:
            raise RunError("no folder was given")
        self._settings = settings
        self._folder = settings.local
        self.place = self._folder / self.FILE
        self._started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
        self._lock = threading.Lock()
        self._db: sqlite3.Connection  # opened by check()

    def _open(self, path: Path) -> sqlite3.Connection:
        connect = functools.partial(
            sqlite3.connect,
            timeout=self.LOCK_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        if not self._settings.dry_run:
            return connect(path)
        memory = connect(":memory:")
        if path.exists():
            with contextlib.closing(connect(path)) as file:
                file.backup(memory)
        return memory

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RunError(
                f"{self.place}: {error}. It must be a database of this tool in a folder that can "
                "be written to, with room on the disk"
            ) from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors(), self._lock:
            self._db.execute("begin immediate")
            try:
                yield self._db
                self._db.execute("commit")
            except BaseException:
                self._db.execute("rollback")
                raise

    def check(self) -> None:
        """Brings the assets table up to date with the folder's files."""
        files = self._files()
        first = list(itertools.islice(files, 1))
        if not first and not self.place.exists():
            raise RunError(f"no image below {self._folder}")
        with self._errors():
            self._db = self._open(self.place)
            self._db.execute("pragma foreign_keys = on")
            self._db.executescript(FOLDER_SCHEMA)
            self._db.executemany(
                "insert or replace into found values (?,?,?,?)", itertools.chain(first, files)
            )
        with self._transaction() as db:
            db.execute("delete from assets where id not in (select id from found)")
            db.execute(
                "insert into assets select * from found where true on conflict (id) do update "
                "set modified = excluded.modified where modified <> excluded.modified"
            )
        client = self._settings.client
        if client and not self._ask("select 1 from assets where client_name = :client limit 1"):
            raise RunError(
                f"no image below {self._folder / client}: with --local, "
                "--client names a subfolder of DIR"
            )

    def _files(self) -> Iterator[tuple[str, str, str, int]]:
        """Rows of `assets`, one per image file; hidden files and folders are left out."""
        for folder, folders, names in os.walk(self._folder, onerror=_raise):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if path.suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
                    continue
                relative = path.relative_to(self._folder)
                image = relative.as_posix()
                try:
                    image.encode()
                    modified = path.stat().st_mtime_ns
                except (OSError, UnicodeEncodeError) as error:
                    log.warning("left out: %s: %s", ascii(image), error)
                    continue
                client = relative.parts[0] if len(relative.parts) > 1 else ""
                yield (str(uuid.uuid5(uuid.NAMESPACE_URL, image)), image, client, modified)

    # The same questions as SupabaseStore's. Of failures: 0 none, 1 one that may have passed,
    # 2 a permanent one
    REACHED = """
        from (select assets.*, coalesce(1 + permanent, 0) as failure,
                  failed.updated_at as failed_at
              from assets left join product_embedding_failures as failed
                  on failed.asset_id = id and failed.model_version = :version
              where :client is null or client_name = :client)
        where not exists (select 1 from product_embeddings
            where asset_id = id and model_version = :version)
    """

    def _ask(self, query: str, **values: Any) -> list[tuple[Any, ...]]:
        values |= {"version": MODEL_VERSION, "client": self._settings.client}
        with self._errors(), self._lock:
            return self._db.execute(query, values).fetchall()

    def count(self, _: Asset | None = None) -> int | None:
        """Pending assets."""
        last = 2 if self._settings.retry_failed else 1
        return int(self._ask(f"select count(*) {self.REACHED} and failure <= {last}")[0][0])

    def count_known_failures(self) -> int:
        """Assets that are left out because of an earlier permanent failure."""
        if self._settings.retry_failed:
            return 0
        return int(self._ask(f"select count(*) {self.REACHED} and failure = 2")[0][0])

    def pending(self) -> Iterator[Asset]:
        """Yields pending assets in the order of their ids, read by keyset; those that failed in
        an earlier run come last."""
        query = f"""select id, image_url, failure {self.REACHED} and id > :cursor
            and failure between :first and :last and coalesce(failed_at < :started, true)
            order by id limit {PAGE_ROWS}"""
        for first, last in ((0, 0), (1, 2 if self._settings.retry_failed else 1)):
            span = {"first": first, "last": last, "started": self._started}
            cursor = ""
            while page := self._ask(query, cursor=cursor, **span):
                yield from (Asset(row[0], row[1], row[2] > 0) for row in page)
                cursor = page[-1][0]

    def locate(self, image: str) -> tuple[Path, dict[str, str]]:
        """The path of an image; a file needs no headers."""
        return self._folder / image, {}

    def save(self, rows: list[tuple[Asset, np.ndarray]]) -> list[tuple[Asset, str | None]]:
        """Upserts vectors (512,). Returns the refused assets: those deleted meanwhile."""
        query = """
            insert into product_embeddings (asset_id, embedding, model_version)
            select id, ?, ? from assets where id = ?
            on conflict (asset_id) do update set embedding = excluded.embedding,
                model_version = excluded.model_version, updated_at = excluded.updated_at
        """
        with self._transaction() as db:
            return [
                (asset, None)
                for asset, vector in rows
                if not db.execute(
                    query, (vector.astype("<f4").tobytes(), MODEL_VERSION, asset.id)
                ).rowcount
            ]

    def save_failures(self, failures: list[Failure]) -> None:
        """Remembers failures, so that later runs skip the permanent ones."""
        query = """
            insert into product_embedding_failures
                (asset_id, model_version, stage, reason, permanent)
            select id, ?, ?, ?, ? from assets where id = ? and not exists
                (select 1 from product_embeddings where asset_id = id and model_version = ?)
            on conflict (asset_id) do update set model_version = excluded.model_version,
                stage = excluded.stage, reason = excluded.reason,
                permanent = excluded.permanent, attempts = attempts + 1,
                updated_at = excluded.updated_at
        """
        rows = [
            (MODEL_VERSION, f.stage, f.reason, f.permanent, f.asset.id, MODEL_VERSION)
            for f in failures
        ]
        with self._transaction() as db:
            db.executemany(query, rows)


Store = SupabaseStore | FolderStore

# ------------------------------------------------------------------ images


# What older Pythons' is_global takes for public: metadata, site-local, NAT64, IPv4 in IPv6
_NOT_PUBLIC = [
    ipaddress.ip_network(text) for text in ("192.0.0.0/24", "fec0::/10", "64:ff9b:1::/48", "::/96")
]
PRIVATE = "private address {} (ALLOW_PRIVATE_IMAGE_HOSTS=1 with --retry-failed allows it)"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also inside its IPv6 wrappings."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        else:
            ip = ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in _NOT_PUBLIC)


class _Attempt:
    """One attempt at a download: whom its connection may reach, and how a timer cuts it.

    A socket's own timeout starts anew with every byte, and requests gives no hold on the socket
    while headers come in: so the connection leaves a twin of it here, for cut() to shut down.
    """

    here = threading.local()  # .attempt: the one under way in this thread

    def __init__(self, trusted: tuple[str, int | None] | None) -> None:
        self.trusted = trusted  # host and port that may be private; None: any may
        self.late = False
        self._twin: socket.socket | None = None

    def opened(self, sock: socket.socket, host: str, port: int | None, proxied: bool) -> None:
        self.using(sock)
        peer = sock.getpeername()[0]
        if self.trusted and not proxied and (host, port) != self.trusted and not is_public(peer):
            raise Rejected(PRIVATE.format(peer))

    def using(self, sock: socket.socket) -> None:
        self.close()
        self._twin = socket.socket(fileno=socket.dup(sock.fileno()))
        if self.late:  # a redirect after the cut
            self.cut()

    def cut(self) -> None:
        self.late = True
        if self._twin:
            with contextlib.suppress(OSError):  # closed already: nothing to cut
                self._twin.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._twin:
            self._twin.close()


class _Watched:
    """Mixin of urllib3's connections that reports to the attempt under way. The peer's address
    is looked at once connected, when neither a redirect nor DNS can change it any more."""

    def _new_conn(self: Any) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        try:
            _Attempt.here.attempt.opened(sock, self.host, self.port, bool(self.proxy))
        except BaseException:
            sock.close()
            raise
        return sock

    def request(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            _Attempt.here.attempt.using(self.sock)
        super().request(*args, **kwargs)  # type: ignore[misc]


def _watched(pool: Any) -> Any:
    connection = type("Connection", (_Watched, pool.ConnectionCls), {})
    return type("Pool", (pool,), {"ConnectionCls": connection})


class _WatchedAdapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {
            "http": _watched(urllib3.HTTPConnectionPool),
            "https": _watched(urllib3.HTTPSConnectionPool),
        }


class _Session(requests.Session):
    def resolve_redirects(self, *_: Any, **__: Any) -> Iterator[Any]:
        """None: requests would read the whole body of a redirect before it says where to."""
        yield from ()


TOO_LARGE = f"larger than {MAX_BYTES // 2**20} MB"


class Fetcher:
    """Gets the bytes of images from URLs and files, with one pool of connections.

    Errors: Rejected, with the reason; permanent where the host gave a final answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._seconds = settings.fetch_seconds
        origin = urlsplit(settings.url)
        port = origin.port or (443 if origin.scheme == "https" else 80)
        self._trusted = None if settings.allow_private_hosts else (origin.hostname or "", port)
        self._session = _Session()
        self._session.auth = lambda request: request  # else ~/.netrc is sent to image hosts
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._session.headers["User-Agent"] = f"generate-embeddings (python-requests; {MODEL_ID})"
        adapter = _WatchedAdapter(pool_connections=64, pool_maxsize=settings.workers)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def fetch(self, place: str | Path, headers: dict[str, str]) -> bytes:
        """The bytes of an image, at most MAX_BYTES, within the deadline, retries included."""
        if isinstance(place, Path):
            return self._read(place)
        if place[:5].lower() == "data:":
            return self._inline(place)
        deadline = time.monotonic() + self._seconds
        for attempt in itertools.count(1):
            try:
                return self._attempt(place, headers, deadline)
            except Rejected as error:
                delay = 0.5 * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                delay = max(delay, error.retry_after or 0)
                if (
                    error.permanent
                    or attempt == FETCH_ATTEMPTS
                    or time.monotonic() + delay > deadline
                ):
                    raise
            time.sleep(delay)
        raise AssertionError  # count() has no end

    @staticmethod
    def _read(path: Path) -> bytes:
        try:
            if not path.is_file():  # a named pipe, say, would never end
                raise OSError(0, "no such file")
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise Rejected(f"can't be read ({error.strerror})", permanent=False) from None
        if len(data) > MAX_BYTES:
            raise Rejected(TOO_LARGE)
        return data

    @staticmethod
    def _inline(url: str) -> bytes:
        if len(url) > MAX_BYTES:
            raise Rejected(TOO_LARGE)
        try:
            return DataHandler().data_open(Request(url)).read()
        except (ValueError, OSError):
            raise Rejected("broken data: URL") from None

    def _attempt(self, url: str, headers: dict[str, str], deadline: float) -> bytes:
        try:
            with self._until(deadline):
                return self._follow(url, headers)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise Rejected(*_network_reason(error)) from None
        except ValueError:
            raise Rejected("not a valid URL") from None

    @contextlib.contextmanager
    def _until(self, deadline: float) -> Iterator[None]:
        """Cuts this thread's download at the deadline. What came until then, an answer that
        looks complete included, does not count."""
        attempt = _Attempt.here.attempt = _Attempt(self._trusted)
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), attempt.cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        except Exception:
            if not attempt.late:
                raise
        finally:
            timer.cancel()
            attempt.close()
        if attempt.late:
            raise Rejected(f"not complete within {self._seconds:g} s", permanent=False)

    def _follow(self, url: str, headers: dict[str, str]) -> bytes:
        # By hand: the headers go to the first URL alone
        for _ in range(MAX_REDIRECTS + 1):
            self._refuse_behind_proxy(url)
            timeout = min(READ_SECONDS, self._seconds)
            with self._session.get(
                url, headers=headers, stream=True, allow_redirects=False, timeout=timeout
            ) as response:
                target = self._session.get_redirect_target(response)
                if target is None:
                    return self._body(response)
            url, headers = urljoin(url, target), {}
        raise Rejected(f"more than {MAX_REDIRECTS} redirects")

    def _refuse_behind_proxy(self, url: str) -> None:
        # A proxy resolves names for us: only an address in the URL itself can be judged
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if self._trusted in (None, (host, port)) or not requests.utils.get_environ_proxies(url):
            return
        private = host == "localhost" or host.endswith(".localhost")
        with contextlib.suppress(OSError):
            host = socket.inet_ntoa(socket.inet_aton(host))  # knows 127.1 and 0x7f000001, too
        with contextlib.suppress(ValueError):
            private = private or not is_public(host)
        if private:
            raise Rejected(PRIVATE.format(host))

    @staticmethod
    def _body(response: requests.Response) -> bytes:
        code = response.status_code
        if code != 200:
            raise Rejected(
                f"HTTP {code} {http.client.responses.get(code, '')}".strip(),
                permanent=code < 500 and code not in (408, 425, 429),
                retry_after=_retry_after(response.headers.get("Retry-After")),
            )
        data = bytearray()
        for chunk in response.iter_content(2**16):
            data += chunk
            if len(data) > MAX_BYTES:
                raise Rejected(TOO_LARGE)
        return bytes(data)


def _retry_after(header: str | None) -> float | None:
    with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return urllib3.Retry().parse_retry_after(header) if header else None
    return None


def _network_reason(error: Exception) -> tuple[str, bool]:
    """A reason that groups well, and whether it is permanent."""
    if isinstance(error, requests.exceptions.InvalidSchema):
        return "only http, https and data URLs are fetched", True
    if isinstance(error, (ValueError, urllib3.exceptions.LocationValueError)):
        return "not a valid URL", True
    if isinstance(error, requests.exceptions.ContentDecodingError):
        return "broken compression", False
    text = str(error)
    for sign, reason in (
        ("NameResolutionError", "host not found"),
        ("CERTIFICATE", "the host's certificate is not valid"),
        ("SSL", "TLS failed"),
        ("timed out", "the host did not answer in time"),
        ("refused", "connection refused"),
        ("NewConnectionError", "host not reachable"),
    ):
        if sign in text:
            return reason, False
    return "connection lost", False


_one_large_image = threading.Lock()


def decode(data: bytes) -> Image.Image:
    """An image file's bytes as an upright RGB image on white, reduced where it is far larger
    than CLIP needs. Raises Rejected for what is no image, broken, or out of bounds."""
    try:
        image = _open(data)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Rejected(f"more than {MAX_PIXELS // 10**6} megapixels")
        if min(width, height) < MIN_SIDE:
            raise Rejected(f"smaller than {MIN_SIDE} pixels a side")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise Rejected(f"a strip, more than {MAX_ASPECT} times as long as wide")
        with _one_large_image if width * height > LARGE_PIXELS else contextlib.nullcontext():
            # JPEG's decoder can shrink by 2, 4 or 8 as it goes; the others take no draft
            shrink = max(1.0, min(width, height) / (KEEP_SCALE * SIDE))
            image.draft(None, (int(width / shrink), int(height / shrink)))
            image.load()
            _scale_key(image, data)
            return _upright(image, _reduced_rgb(image))
    except Rejected:
        raise
    except MemoryError:
        raise Rejected("not enough memory to decode it", permanent=False) from None
    except Exception as error:  # Pillow's decoders raise nearly every type there is
        log.debug("decoding: %s: %s", type(error).__name__, error)
        raise Rejected("broken or truncated image file") from None


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        pass
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        try:
            import pillow_heif
        except ImportError:
            reason = "HEIC: pip install pillow-heif, then run again"
            raise Rejected(reason, permanent=False) from None
        pillow_heif.register_heif_opener()
        return Image.open(io.BytesIO(data), formats=["HEIF"])
    raise Rejected(_what_else(data))


_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"RIFF", b"BM")


def _what_else(data: bytes) -> str:
    """What the bytes are that Pillow takes for no image."""
    head = data[: 2**16].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    # the first of these elements, whatever prolog, comments and DOCTYPE come before
    element = re.search(rb"<(svg|!doctype html|html|head|body)\b", head)
    if not data:
        return "an empty file"
    if head.startswith(b"<") and element:
        svg = element[1] == b"svg"
        return "an SVG drawing, which has no pixels" if svg else "an HTML page, not an image"
    for start, name in ((b"{", "JSON"), (b"[", "JSON"), (b"%pdf", "a PDF")):
        if head.startswith(start):
            return f"{name}, not an image"
    if data.startswith(_MAGIC) or data[4:12] in (b"ftypavif", b"ftypavis"):
        return "broken or truncated image file"
    return "not an image in a known format"


def _scale_key(image: Image.Image, data: bytes) -> None:
    """Brings the transparent colour of a PNG to 8 bits, as Pillow does the pixels alone."""
    key, depth = image.info.get("transparency"), data[24]
    if image.format != "PNG" or key is None:
        return
    if image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(level >> 8 for level in key)
    elif image.mode in ("1", "L") and depth < 8:
        image.info["transparency"] = key * 255 // (2**depth - 1)


def _reduced_rgb(image: Image.Image) -> Image.Image:
    """A loaded image in RGB, reduced by a whole number where KEEP_SCALE leaves room for it."""
    width, height = image.size
    factor = max(1, min(width, height) // (KEEP_SCALE * SIDE))
    if width * height <= LARGE_PIXELS:
        image = _rgb(image, image.format)
        return image.reduce(factor) if factor > 1 else image
    result = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = max(1, BAND_ROWS // factor) * factor
    for top in range(0, height, rows):
        band = _rgb(image.crop((0, top, width, min(top + rows, height))), image.format)
        result.paste(band.reduce(factor), (0, top // factor))
    return result


def _rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """A loaded image, or a band of one, in RGB, with white behind what is transparent."""
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if isinstance(hidden := image.info.get("transparency"), int):
            levels = np.where(levels == hidden, 65535, levels)
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F", "LAB"):
        raise Rejected(f"pixels of a kind that is not supported (mode {image.mode})")
    if image.mode == "CMYK":
        return _from_cmyk(image, file_format)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_cmyk(image: Image.Image, file_format: str | None) -> Image.Image:
    if file_format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for one of Adobe's, which hold inverted values
        image = ImageChops.invert(image)
    if profile := image.info.get("icc_profile"):
        with contextlib.suppress(ImageCms.PyCMSError, OSError):  # broken profile: do without
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted
    return image.convert("RGB")


def _upright(source: Image.Image, image: Image.Image) -> Image.Image:
    """The image turned as the EXIF data of its source say."""
    try:
        image.getexif()[0x0112] = source.getexif().get(0x0112, 1)
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # broken EXIF data can't say how the camera was held
        log.debug("EXIF: %s", error)
    return image


# One value per channel and 8-bit level: the arithmetic of transformers' processor, same bits
_LEVELS = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
_PIXEL_VALUES = np.stack(
    [(_LEVELS - np.float32(m)) / np.float32(s) for m, s in zip(MEAN, STD, strict=True)]
)


def preprocess(image: Image.Image) -> np.ndarray:
    """An RGB image as CLIP's input: shorter side to 224, centre crop, normalised.

    Returns float32 (3, 224, 224), the same bits as transformers' CLIPImageProcessor.
    """
    width, height = image.size
    shorter = min(width, height)
    width, height = int(SIDE * width / shorter), int(SIDE * height / shorter)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    levels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
    return np.stack([_PIXEL_VALUES[c][levels[:, :, c]] for c in range(3)])


Result = tuple[Asset, np.ndarray | Failure]  # pixels, later the vector; or why not


def load_asset(store: Store, fetcher: Fetcher, asset: Asset) -> Result:
    """One asset's pixels (3, 224, 224), or the Failure; raises nothing."""
    stage = "fetch"
    try:
        data = fetcher.fetch(*store.locate(asset.image))
        stage = "decode"
        return asset, preprocess(decode(data))
    except Rejected as error:
        return asset, Failure(asset, stage, str(error), error.permanent)
    except Exception as error:
        log.debug("asset %s", asset.id, exc_info=True)
        return asset, Failure(asset, stage, f"unexpected {type(error).__name__}", False)


# ------------------------------------------------------------------ model


class ImageTower:
    """The forward pass of transformers' CLIPVisionModelWithProjection, over the same weights.

    What makes it fast on CPUs: weights laid out once for oneDNN, one product for q, k and v,
    activation and residual fused into the products, and the last layer only for the one token
    that leaves it. Raises KeyError for weights that are not there.
    """

    def __init__(
        self, read: Callable[[], Mapping[str, Any]], config: Any, device: str, dtype: str
    ) -> None:
        import torch

        self._torch, self._read, self._config = torch, read, config
        self._weights = read()
        self._device, self._dtype = device, getattr(torch, dtype)
        tower = "vision_model."
        embeddings = tower + "embeddings."
        position = self._take(embeddings + "position_embedding.weight")
        self._first = self._ours(self._take(embeddings + "class_embedding") + position[0])
        self._position = self._ours(position[1:])
        self._patches = self._linear(self._take(embeddings + "patch_embedding.weight").flatten(1))
        self._before = self._norm(tower + "pre_layrnorm")  # the checkpoint's own spelling
        self._layers = [self._layer(number) for number in range(config.num_hidden_layers)]
        self._after = self._norm(tower + "post_layernorm")
        self._projection = self._linear(self._take("visual_projection.weight"))
        del self._weights

    def _take(self, name: str) -> Any:
        # a copy: one view left over would keep the whole file mapped
        return self._weights[name].to(self._torch.float32, copy=True)

    def _ours(self, tensor: Any) -> Any:
        return tensor.to(self._device, self._dtype)

    def _norm(self, name: str) -> tuple[Any, ...]:
        weight, bias = (self._ours(self._take(f"{name}.{kind}")) for kind in ("weight", "bias"))
        return weight.shape, weight, bias, self._config.layer_norm_eps

    def _layer(self, number: int) -> tuple[Any, ...]:
        if number % 4 == 0:  # lets go of the part of the file that was read and is mapped
            self._weights = self._read()
        name = f"vision_model.encoder.layers.{number}."
        torch, attention = self._torch, name + "self_attn."
        weight, bias = (
            torch.cat([self._take(f"{attention}{part}_proj.{kind}") for part in "qkv"])
            for kind in ("weight", "bias")
        )

        def linear(part: str, scale: float = 1.0, silu: bool = False) -> Callable[..., Any]:
            weight, bias = (self._take(f"{name}{part}.weight"), self._take(f"{name}{part}.bias"))
            return self._linear(weight * scale, bias * scale if silu else bias, silu)

        return (
            self._norm(name + "layer_norm1"),
            self._linear(weight, bias),
            linear("self_attn.out_proj"),
            self._norm(name + "layer_norm2"),
            # quick_gelu(x) = x * sigmoid(1.702 x) = silu(1.702 x) / 1.702
            linear("mlp.fc1", 1.702, silu=True),
            linear("mlp.fc2", 1 / 1.702),
        )

    def _linear(self, weight: Any, bias: Any = None, silu: bool = False) -> Callable[..., Any]:
        """A linear layer (x, residual=None) -> y, laid out for oneDNN where torch offers it."""
        torch, functional = self._torch, self._torch.nn.functional
        weight = self._ours(weight)
        bias = None if bias is None else self._ours(bias)

        def plain(x: Any, residual: Any = None) -> Any:
            y = functional.linear(x, weight, bias)
            y = functional.silu(y) if silu else y
            return y if residual is None else residual + y

        def packed(x: Any, residual: Any = None) -> Any:
            if residual is not None:
                return pointwise.binary(x, residual, packed_weight, bias, "add")
            return pointwise(x, packed_weight, bias, "swish" if silu else "none", [], "")

        try:
            pointwise = torch.ops.mkldnn._linear_pointwise
            packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight)
            trial = weight.new_ones(2, weight.shape[1])
            if torch.allclose(packed(trial), plain(trial), rtol=0.05, atol=0.05):
                return packed
        except (AttributeError, RuntimeError):
            pass  # private operators: not in every torch, nor for every processor
        return plain

    def __call__(self, pixels: Any) -> Any:
        """pixels (n, 3, 224, 224) -> image embeddings (n, 512), not yet of unit length."""
        torch, functional = self._torch, self._torch.nn.functional
        n, channels, height, width = pixels.shape
        heads = self._config.num_attention_heads
        side = self._config.patch_size
        x = pixels.to(self._device, self._dtype)
        x = x.view(n, channels, height // side, side, width // side, side)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * side * side)
        x = self._patches(x) + self._position
        x = torch.cat([self._first.expand(n, 1, -1), x], 1)
        x = functional.layer_norm(x, *self._before)
        for number, (norm1, qkv, out, norm2, fc1, fc2) in enumerate(self._layers, 1):
            joined = qkv(functional.layer_norm(x, *norm1))
            q, k, v = joined.view(n, x.shape[1], 3, heads, -1).permute(2, 0, 3, 1, 4)
            if number == len(self._layers):
                x, q = x[:, :1].contiguous(), q[:, :, :1]
            attended = functional.scaled_dot_product_attention(q, k, v)
            x = out(attended.transpose(1, 2).reshape(x.shape), x)
            x = fc2(fc1(functional.layer_norm(x, *norm2)), x)
        return self._projection(functional.layer_norm(x[:, 0], *self._after))


class ClipEncoder:
    """CLIP's image encoder; torch and transformers are imported here and nowhere else.

    Of transformers only the configuration: its model classes would take longer to import than
    the weights to load. Errors: RunError where the device or the model is not to be had.
    """

    def __init__(self, settings: Settings) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self._torch = torch
        torch.set_num_threads(1)  # run() keeps one image on each core, see lanes()
        self._check_device(settings.device, settings.dtype)
        folder = Path(settings.clip_model) if settings.clip_model else self.download()
        try:
            config = transformers.CLIPVisionConfig.from_pretrained(folder)
            read = functools.partial(self._read, folder)
            weights = read()
            made = len(weights["visual_projection.weight"]), config.image_size, config.hidden_act
            if made != (DIMENSIONS, SIDE, "quick_gelu"):
                raise ValueError(f"it gives {made[0]} numbers for {made[1]} pixels, by {made[2]}")
            del weights
            self._tower = ImageTower(read, config, settings.device, settings.dtype)
        except Exception as error:  # each file format and library has errors of its own
            raise RunError(
                f"no CLIP model could be loaded from {folder} ({shorten(str(error), 100)}): "
                f"CLIP_MODEL must be a folder with a copy of {MODEL_ID}"
            ) from None

    def _read(self, folder: Path) -> Mapping[str, Any]:
        """The weights by name, mapped: only what is taken is read, so not the text tower."""
        for path in (folder / "model.safetensors", folder / "pytorch_model.bin"):
            if path.is_file():
                if path.suffix == ".bin":
                    return dict(self._torch.load(path, mmap=True, weights_only=True))
                from safetensors.torch import load_file

                return load_file(path)
        raise OSError("it holds neither model.safetensors nor pytorch_model.bin")

    def _check_device(self, device: str, dtype: str) -> None:
        torch = self._torch
        there = {
            "cpu": True,
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
        }
        if not there[device]:
            raise RunError(
                f"--device {device}: this torch ({torch.__version__}) finds none here: leave the "
                "flag out"
            )
        able = any(
            yes is True for name, yes in torch.cpu.get_capabilities().items() if "bf16" in name
        )
        if (device, dtype) == ("cpu", "bfloat16") and not able:
            raise RunError(
                "--dtype bfloat16: this processor has no arithmetic for it and would be slower "
                "than with float32"
            )

    @staticmethod
    def download() -> Path:
        """The folder of the pinned model, downloaded once, then read without the network."""
        import huggingface_hub
        from huggingface_hub import constants

        def fetch(**how: Any) -> Path:
            files = [
                huggingface_hub.hf_hub_download(
                    MODEL_ID, name, revision=MODEL_REVISION, cache_dir=MODEL_CACHE, **how
                )
                for name in ("config.json", "pytorch_model.bin")
            ]
            return Path(files[0]).parent

        with contextlib.suppress(Exception):  # not there, or not all of it
            return fetch(local_files_only=True)
        log.info("downloading %s once, about 600 MB, to %s", MODEL_ID, MODEL_CACHE)
        try:
            # the hub's own client takes half a minute to find that it can't be reached
            requests.head(constants.ENDPOINT, timeout=READ_SECONDS)
            return fetch()
        except Exception as error:
            network = isinstance(error, requests.RequestException)
            reason = _network_reason(error)[0] if network else shorten(str(error), 100)
            raise RunError(
                f"{MODEL_ID} could not be downloaded ({reason}): check network and disk and run "
                "again, or set CLIP_MODEL to a folder with a copy of it"
            ) from None

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """pixels float32 (n, 3, 224, 224) -> vectors float32 (n, 512) of unit length.

        Raises ValueError for a vector that is not finite.
        """
        with self._torch.inference_mode():
            vectors: np.ndarray = self._tower(self._torch.from_numpy(pixels)).float().cpu().numpy()
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        if not np.isfinite(vectors).all():
            raise ValueError("the model gave numbers that are not finite")
        return vectors


# ------------------------------------------------------------------ the run


class Writer:
    """Stores results in batches, in a thread of its own, so that the model never waits for the
    network: while one batch is stored the next one fills. Raises what ended that thread's work;
    leaving the context stores what is left."""

    def __init__(self, store: Store, report: Report) -> None:
        self._store = store
        self._report = report
        self._batch: list[Result] = []
        self._since = 0.0  # when the batch's first result came
        self._pool = ThreadPoolExecutor(1)
        self._storing = self._pool.submit(self._save, [])  # the batch before

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._flush()
            self._wait()
        except Exception:
            if kind is None:  # else what ended the run says more
                raise
        finally:
            self._report.lost += len(successes(self._batch))

    def put(self, result: Result) -> None:
        """Takes one result: a vector (512,), or a Failure."""
        if not self._batch:
            self._since = time.monotonic()
        self._batch.append(result)
        if len(self._batch) == WRITE_ROWS:
            self._flush()

    def poll(self) -> None:
        """To be called now and then: notices what ended the work, and a batch that is old."""
        if self._storing.done():
            self._storing.result()
            if self._batch and time.monotonic() - self._since > WRITE_SECONDS:
                self._flush()

    def _flush(self) -> None:
        self._wait()
        batch, self._batch = self._batch, []
        self._storing = self._pool.submit(self._save, batch)

    def _wait(self) -> None:
        while not self._storing.done():
            wait([self._storing], POLL_SECONDS)  # for ever would keep signals off on Windows
        self._storing.result()

    def _save(self, batch: list[Result]) -> None:
        vectors = successes(batch)
        try:
            refused = self._store.save(vectors) if vectors else []
        except BaseException:
            self._report.lost += len(vectors)
            raise
        self._report.embedded += len(vectors) - len(refused)
        for asset, reason in refused:
            if reason is None:
                log.debug("asset %s was deleted meanwhile", asset.id)
                self._report.deleted += 1
            else:
                self._report.fail(Failure(asset, "store", reason, False))
        if failures := [outcome for _, outcome in batch if isinstance(outcome, Failure)]:
            self._store.save_failures(failures)


def successes(results: list[Result]) -> list[tuple[Asset, np.ndarray]]:
    """The results without the failures: pixels or vectors."""
    return [(asset, array) for asset, array in results if not isinstance(array, Failure)]


def run(
    store: Store,
    assets: Iterator[Asset],
    encode: Callable[[np.ndarray], np.ndarray],
    settings: Settings,
    progress: Progress,
) -> None:
    """Embeds and stores the assets; counts in `progress.report`.

    Raises RunError where the run can't go on; what is embedded by then is stored.
    """
    load = functools.partial(load_asset, store, Fetcher(settings))
    outages = 0
    with Writer(store, progress.report) as writer:
        for results in flow(
            assets, load, functools.partial(embed, encode), settings, progress.stop
        ):
            for result in results:
                progress.show(result)
                writer.put(result)
                outages = outages + 1 if is_outage(result[1]) else 0
            writer.poll()
            if outages >= MAX_OUTAGES:  # after a batch: its failures come first
                raise RunError(
                    f"{outages} images failed in a row, the last: {result[1]}. Check this "
                    "machine's memory, its network, and the image host, then run again"
                )


def cores() -> int:
    """The processor cores that this run may use; OMP_NUM_THREADS, where set, has the last word."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return there or 1


def lanes(device: str) -> int:
    """How many batches to embed at once: on CPUs one on each core, in a single thread.

    Threads that share one image wait for each other at every layer, and long where a core is
    busy with decoding or with another program.
    """
    return cores() if device == "cpu" else 1


def flow(
    assets: Iterator[Asset],
    load: Callable[[Asset], Result],
    embed: Callable[[list[Result]], list[Result]],
    settings: Settings,
    stop: Stop,
) -> Iterator[list[Result]]:
    """Finds assets in one thread, loads them in `workers` threads and embeds them in lanes, a
    bounded number of assets ahead of the caller. Yields what is done first, so that a slow host
    delays its own images alone; or [], every POLL_SECONDS at least. Ends early on `stop`."""
    size, width = settings.batch_size, lanes(settings.device)
    ahead = 2 * settings.workers + 2 * width * size
    threads = {"find": 1, "load": settings.workers, "embed": width}
    pools = {step: ThreadPoolExecutor(count) for step, count in threads.items()}
    done: queue.SimpleQueue[tuple[str, Future[Any]]] = queue.SimpleQueue()
    busy, ready, more = Counter[str](), list[Result](), True

    def start(step: str, work: Callable[..., Any], *arguments: Any) -> None:
        busy[step] += 1
        pools[step].submit(work, *arguments).add_done_callback(lambda f: done.put((step, f)))

    try:
        while (on := not stop.is_set()) or not done.empty():  # what is done is never dropped
            room = ahead - busy["load"] - len(ready) - busy["embed"] * size
            if on and more and room > 0 and not busy["find"]:
                start("find", next, assets, None)
            while on and (len(ready) >= size or (ready and not busy["embed"])):
                batch, ready = ready[:size], ready[size:]
                start("embed", embed, batch)
            if not busy.total():
                return
            results: list[Result] = []
            with contextlib.suppress(queue.Empty):
                step, future = done.get(timeout=POLL_SECONDS)
                busy[step] -= 1
                if step == "embed":
                    results = future.result()
                elif step == "load":
                    ready.append(future.result())
                elif more := (asset := future.result()) is not None:
                    start("load", load, asset)
            yield results
    finally:
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


def embed(encode: Callable[[np.ndarray], np.ndarray], batch: list[Result]) -> list[Result]:
    """The batch with vectors (512,) in the place of pixels; one by one if together fails."""
    results = [result for result in batch if isinstance(result[1], Failure)]
    good = successes(batch)
    if not good:
        return results
    try:
        vectors = encode(np.stack([pixels for _, pixels in good]))
    except (ValueError, RuntimeError) as error:
        if len(good) > 1:
            return results + [result for one in good for result in embed(encode, [one])]
        asset = good[0][0]
        return [*results, (asset, Failure(asset, "embed", shorten(str(error)), False))]
    return results + [(asset, vector) for (asset, _), vector in zip(good, vectors, strict=True)]


def is_outage(outcome: np.ndarray | Failure) -> bool:
    """Whether an asset failed for a reason that may well be this machine's."""
    return (
        isinstance(outcome, Failure)
        and outcome.stage in ("fetch", "embed")
        and not outcome.permanent
        and not outcome.asset.again
    )


class Progress:
    """Shows how a run goes: one bar on a terminal, else a log line every LOG_EVERY images."""

    def __init__(self, report: Report, settings: Settings, stop: Stop) -> None:
        self.report = report
        self.stop = stop
        self._limit = settings.limit
        self._done = 0  # embedded or failed, stored or not yet
        self._paced: tuple[float, int] | None = None  # since the first vector: the model was loaded
        self._bar = tqdm(
            desc="loading the model",
            bar_format="{desc} ...",
            unit="img",
            dynamic_ncols=True,
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, result: Result) -> None:
        """Counts one result, and shows it."""
        asset, outcome = result
        self._done += 1
        if isinstance(outcome, Failure):
            self.report.fail(outcome)
        else:
            log.debug("asset %s: embedded", asset.id)
            self._paced = self._paced or (time.monotonic(), self._done)
        total = self.report.goal(self._limit)
        if not self._bar.disable:
            self._draw(total)
        elif self._done % LOG_EVERY == 0:
            rate = self._rate()
            ahead = (total or 0) - self._done
            left = f", {ahead / rate:.0f} s left" if ahead >= 0 and rate else ""
            log.info(
                "%d/%s done, %d failed, %.1f images/s%s",
                *(self._done, total or "?", self.report.failed, rate, left),
            )

    def _draw(self, total: int | None) -> None:
        bar = self._bar
        bar.total = total
        bar.bar_format = None
        bar.set_description_str(refresh=False)
        bar.set_postfix(failed=self.report.failed, refresh=False)
        bar.update()

    def _rate(self) -> float:
        """Assets a second; 0 where no vector has been made."""
        if self._paced is None:
            return 0.0
        since, before = self._paced
        return (self._done - before) / max(time.monotonic() - since, 0.001)


# ------------------------------------------------------------------ command line


def parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    usage = argparse.ArgumentParser(
        prog="generate_embeddings.py",
        usage="%(prog)s [--limit N] [--client NAME] [--local DIR] [...]   -h: all flags",
        description="Give every product image in a Supabase database, or in a folder, "
        "a CLIP embedding. Run again to resume.",
        epilog="Settings come from the environment and from .env: see README.md. Exit codes: "
        "0 all done, 1 some assets failed, 2 could not run, 130 interrupted, 143 terminated.",
        allow_abbrev=False,
    )
    add = usage.add_argument
    add("--limit", type=at_least_one, metavar="N", help="attempt at most N assets")
    add("--client", metavar="NAME", help="only this client's (with --local: subfolder's) images")
    add("--local", type=folder, metavar="DIR", help="embed a folder's images instead; no account")
    add(
        "--workers",
        type=at_least_one,
        default=min(MOST_WORKERS, WORKERS_PER_CORE * cores()),
        metavar="N",
        help=f"downloads at once ({WORKERS_PER_CORE} a core; not over {MOST_WORKERS})",
    )
    add("--batch-size", type=at_least_one, default=1, metavar="N", help="images to a batch (1)")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="number format (float32)",
    )
    add(
        "--device", choices=["cpu", "cuda", "mps"], default="cpu", help="where the model runs (cpu)"
    )
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="only part I of N parts")
    add("--retry-failed", action="store_true", help="also try images that failed for good before")
    add("--dry-run", action="store_true", help="say what would be done; load and write nothing")
    add("-v", "--verbose", action="store_true", help="say more, such as each failure as it happens")
    return usage


def at_least_one(text: str) -> int:
    """A flag's whole number; raises ArgumentTypeError below 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return min(int(text), sys.maxsize)


def shard(text: str) -> tuple[int, int]:
    """ "I/N" as two numbers; raises ArgumentTypeError for what is no part."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part like 1/4, 2/4, 3/4 or 4/4")
    return int(part), int(parts)


def folder(text: str) -> Path:
    """A flag's folder; raises ArgumentTypeError where there is none."""
    path = Path(text).expanduser()
    if not path.is_dir():
        there = "is not a folder" if path.exists() else "does not exist"
        raise argparse.ArgumentTypeError(f"{text!r} {there}")
    return path.resolve()


def read_settings(args: argparse.Namespace) -> Settings:
    """Flags and environment as Settings. Raises RunError that names the setting at fault."""
    nearest = load_dotenv()
    try:
        return parse_settings(args, os.environ)
    except RunError as error:
        if nearest is None:
            raise
        raise RunError(f"{error} (settings were read from {nearest})") from None


def parse_settings(args: argparse.Namespace, env: Mapping[str, str]) -> Settings:
    """Flags and settings as Settings; raises RunError."""

    def get(*names: str, default: str = "") -> str:
        return next((env[name].strip() for name in names if env.get(name, "").strip()), default)

    names: dict[str, Any] = {
        name: identifier(name.upper(), get(name.upper(), default=getattr(Settings, name)))
        for name in (
            *("assets_table", "asset_id_column", "asset_image_column", "asset_client_column"),
            *("embeddings_table", "failures_table"),
        )
    }
    url = key = ""
    if args.local is None:
        url = project_url(get("SUPABASE_URL", "NEXT_PUBLIC_SUPABASE_URL"))
        key = service_key(get("SUPABASE_SERVICE_ROLE_KEY", "SUPABASE_SECRET_KEY"))
    return Settings(
        **vars(args),
        **names,
        url=url,
        key=key,
        clip_model=model_folder(get("CLIP_MODEL")),
        storage_bucket=get("STORAGE_BUCKET"),
        allow_private_hosts=get("ALLOW_PRIVATE_IMAGE_HOSTS") in ("1", "true", "yes"),
        fetch_seconds=seconds("FETCH_SECONDS", get("FETCH_SECONDS", default="30")),
        db_retry_seconds=seconds("DB_RETRY_SECONDS", get("DB_RETRY_SECONDS", default="180")),
    )


def identifier(name: str, value: str) -> str:
    """A table's or column's name; raises RunError, as it goes into queries unquoted."""
    if not re.fullmatch(
        r"[A-Za-z_]\w*" + (r"(\.[A-Za-z_]\w*)?" if "CLIENT" in name else ""), value, re.ASCII
    ):
        raise RunError(f"{name}={value!r} is not a plain name of letters, digits and _")
    return value


def seconds(name: str, value: str) -> float:
    """A setting in seconds; raises RunError for what is no number."""
    if not re.fullmatch(r"\d+(\.\d+)?", value):
        raise RunError(f"{name}={value!r} is not a number of seconds")
    return float(value)


def model_folder(value: str) -> str:
    """The folder in CLIP_MODEL; raises RunError where there is none."""
    path = Path(value).expanduser()
    if value and not path.is_dir():
        raise RunError(f"CLIP_MODEL={value!r} is not a folder: it must hold a copy of {MODEL_ID}")
    return str(path) if value else ""


def project_url(value: str) -> str:
    """The project's origin, without a path; raises RunError that never shows the value."""
    if not value:
        raise RunError(
            "SUPABASE_URL (or NEXT_PUBLIC_SUPABASE_URL) is not set: copy .env.example to .env and "
            "fill it in, or use --local DIR, which needs no account"
        )
    if "YOUR-PROJECT" in value:
        raise RunError("SUPABASE_URL still holds the example's YOUR-PROJECT: put in your own")
    url = value.rstrip("/").removesuffix("/rest/v1")
    if not re.fullmatch(r"https?://[\w-]+(\.[\w-]+)*(:\d{1,4}|:[1-5]\d{4})?", url, re.ASCII):
        # without the value: it may be the key, pasted into the wrong line
        raise RunError(
            "SUPABASE_URL is not like https://YOUR-PROJECT.supabase.co: copy it from the "
            "project's API settings (not the dashboard's address, nor the key)"
        )
    return url


def service_key(value: str) -> str:
    """The key, once it looks like one that sees all rows; raises RunError."""
    advice = "copy the service_role (or secret) key from the project's API settings"
    if not value:
        raise RunError(f"SUPABASE_SERVICE_ROLE_KEY (or SUPABASE_SECRET_KEY) is not set: {advice}")
    role = "anon" if value.startswith("sb_publishable_") else token_role(value)
    if role in ("anon", "authenticated"):
        raise RunError(
            f"SUPABASE_SERVICE_ROLE_KEY holds a public ({role}) key, to which the database "
            f"shows no rows: {advice}"
        )
    plain = re.fullmatch(r"[\w.-]+", value, re.ASCII)  # else it would be quoted in errors
    if not plain or (role is None and not value.startswith("sb_secret_")):
        raise RunError(f"SUPABASE_SERVICE_ROLE_KEY does not look like a key: {advice}")
    return value


def token_role(key: str) -> str | None:
    """The role that a JWT claims; None for what is no JWT."""
    try:
        claims = key.split(".")[1]
        return str(json.loads(base64.urlsafe_b64decode(claims + "=="))["role"])
    except (IndexError, ValueError, KeyError, TypeError):
        return None


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    if sys.stderr is None:  # 2>&-: and the next file that is opened must not get its number
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    args = parser().parse_args(argv)
    logging.basicConfig(
        format="%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s",
        stream=sys.stderr,
        level=logging.WARNING,
    )
    log.setLevel(logging.DEBUG if args.verbose else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold anything
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # about oddities that do no harm
    stop = Stop()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # as process 1 of a container it would else be ignored until the run listens
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        settings = read_settings(args)
        make = FolderStore if settings.local else SupabaseStore
        store: Store = make(settings, stop)
        store.check()
        code = (preview if settings.dry_run else embed_all)(store, settings, stop)
        return stop.code or code
    except RunError as error:
        complain(str(error))
        return stop.code or 2
    except ImportError as error:
        complain(f"{error}: run pip install -r requirements.txt first")
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except Exception as error:  # a defect; exit code 1 would say that some images failed
        log.debug("", exc_info=True)
        complain(f"unexpected {type(error).__name__}: {error}; -v says more")
        return 2


def complain(trouble: str) -> None:
    """Prints why a run ended, where there still is someone to read it."""
    with contextlib.suppress(OSError):
        print(f"error: {trouble}", file=sys.stderr)


def load_dotenv() -> Path | None:
    """Puts the nearest .env into the environment, where that does not say otherwise."""
    nearest = next((path for path in (Path(".env"), HERE / ".env") if path.is_file()), None)
    try:
        if nearest:
            dotenv.load_dotenv(nearest, encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError):
        raise RunError(f"{nearest} can't be read as text in UTF-8: save it as that") from None
    return nearest and nearest.resolve()


def preview(store: Store, settings: Settings, _: Stop) -> int:
    """Says what a run would do."""
    report = Report()
    count_pending(store, settings, report)
    about = "about " if settings.shard[1] > 1 else ""
    goal = report.goal(settings.limit)
    print(f"Would embed {about}{'an unknown number of' if goal is None else goal} assets")
    if skipped := store.count_known_failures():
        print(f"Would skip {skipped} known failures; --retry-failed tries them")
    for asset in itertools.islice(
        within_reach(store, settings, report), min(5, settings.limit or 5)
    ):
        print(f"  {asset.id}  {shorten(asset.image)}")
    return 0


def embed_all(store: Store, settings: Settings, stop: Stop) -> int:
    """The run, from the first page to the printed report. Returns the exit code."""
    report = Report(store.count_known_failures())
    reachable = within_reach(store, settings, report)
    first = next(reachable, None)
    if first is None:
        known = " or is a known failure" if report.known_failures else ""
        log.info("nothing to do: every asset asked for has an embedding%s", known)
        report.complete = True
        print(report)
        return report.exit_code
    log.info("vectors go to %s", store.place)
    stop.listen()
    background = ThreadPoolExecutor(2)  # both while the first images load
    model = background.submit(ClipEncoder, settings)
    background.submit(count_pending, store, settings, report, first)

    def encode(pixels: np.ndarray) -> np.ndarray:
        try:
            encoder = model.result()
        except (ValueError, RuntimeError) as error:  # would else count as the image's own
            raise RunError(f"the model could not be loaded: {error}") from None
        return encoder.encode(pixels)

    assets = itertools.islice(itertools.chain([first], reachable), settings.limit)
    trouble: Exception | None = None
    try:
        with logging_redirect_tqdm(), Progress(report, settings, stop) as progress:
            run(store, assets, encode, settings, progress)
    except Exception as error:
        trouble = error
    report.complete = report.found_all and not (trouble or stop.is_set())
    print(report)
    if trouble:
        raise trouble
    return report.exit_code


def within_reach(store: Store, settings: Settings, report: Report) -> Iterator[Asset]:
    """The pending assets of this shard; notes in the report when there are no more."""
    yield from (asset for asset in store.pending() if in_shard(asset, settings.shard))
    report.found_all = True


def count_pending(
    store: Store, settings: Settings, report: Report, first: Asset | None = None
) -> None:
    """Counts beside the run, window by window: at a million assets it takes a while."""
    with contextlib.suppress(RunError):  # the run itself will meet the same trouble
        count = store.count(first)
        report.total = None if count is None else round(count / settings.shard[1])


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, AttributeError):  # as in: ... | head, or >&-
        sys.stdout.flush()
    # A download may hang in a thread, and Python would wait for it
    os._exit(code)
