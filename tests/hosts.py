"""Image hosts and lines with habits that people report, as real HTTP servers.

`python tests/hosts.py [NAME ...]` runs the real command against each at full size, and prints how
many images came, in how many times the best possible time. tests/test_hosts.py does the same with
small ones, and looks only at what came.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from stack import REPO, ImageHost, Stack, photographs, reset

PIECE = 2**14  # bytes that a line carries at a time


class Line:
    """A line that all its hosts share: so many bytes a second."""

    def __init__(self, rate):
        self.rate = rate
        self._free = 0.0
        self._lock = threading.Lock()

    def carry(self, file, data):
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            with self._lock:
                self._free = max(self._free, time.monotonic()) + len(piece) / self.rate
                wait = self._free - time.monotonic()
            time.sleep(max(0.0, wait))
            file.write(piece)


@dataclass
class Habit:
    """What a host does to each image that it is asked for, in this order."""

    missing: tuple[int, int] = (0, 0)  # a status, and how many of the first images have it
    window: tuple[int, float] | None = None  # images in so many seconds, then 429 and Retry-After
    rate: tuple[float, float] | None = None  # images a second, and how many at once, then 503
    connections: int = 10**9  # at once, then a reset
    latency: float = 0.02  # seconds
    service: float = 0.0  # seconds of work,
    workers: int = 10**9  # which so many do; who asks waits for one
    away: tuple[float, float] = (0.0, 0.0)  # seconds after the first question, with resets
    silent: bool = False  # it never answers
    size: int = 0  # bytes that an image is filled up to
    line: Line | None = None
    began: float = 0.0
    busy: int = 0
    tokens: float = 0.0
    filled: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    hands: threading.Semaphore | None = None

    def __post_init__(self):
        self.hands = threading.Semaphore(min(self.workers, 10**6))

    def answer(self, photo, handler):
        with self.lock:
            now = time.monotonic()
            self.began = self.began or now
            refusal = self._refusal(handler, now)
            self.busy += refusal is None
        if refusal:
            refusal(handler)
            return
        try:
            time.sleep(self.latency)
            if self.silent:
                handler.connection.recv(1)
                handler.close_connection = True
                return
            with self.hands:
                time.sleep(self.service)
            self._send(handler, photo)
        finally:
            with self.lock:
                self.busy -= 1

    def _refusal(self, handler, now):
        code, first = self.missing
        if int(handler.path.rpartition("/")[2]) < first:
            return lambda handler: handler.reply(code, [], b"no")
        if self.away[0] < now - self.began < self.away[1]:
            return reset_connection
        if self.window:
            most, seconds = self.window
            if now - self.filled > seconds:
                self.filled, self.tokens = now, most
            if self.tokens < 1:
                rest = str(int(self.filled + seconds - now) + 1)
                return lambda handler: handler.reply(429, [("Retry-After", rest)], b"slow down")
            self.tokens -= 1
        if self.rate:
            per_second, burst = self.rate
            self.tokens = min(burst, self.tokens + per_second * (now - (self.filled or now - 1e3)))
            self.filled = now
            if self.tokens < 1:
                return lambda handler: handler.reply(503, [], b"slow down")
            self.tokens -= 1
        if self.busy >= self.connections:
            return reset_connection
        return None

    def _send(self, handler, photo):
        data = photo + bytes(max(0, self.size - len(photo)))  # a JPEG may have more behind its end
        if not self.line:
            handler.reply(200, [("Content-Type", "image/jpeg")], data)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        with contextlib.suppress(OSError):  # whoever asked gave up
            self.line.carry(handler.wfile, data)


def reset_connection(handler):
    handler.close_connection = True
    reset(handler.connection)


@dataclass
class Case:
    """Hosts with the same habit or several, and what must come of them."""

    reports: str  # public ones, by repository and number
    habits: list[Habit]
    images: int  # of each host
    come: int  # in all, at least
    best: float  # seconds
    each_a_host: int = 1  # so many names lead to each of the hosts
    settings: dict = field(default_factory=dict)


def cases(small):
    """Name -> case: of full size, or such that a test takes some seconds."""

    def either(full, few):
        return few if small else full

    line = Line(2e6)
    quick = {"FETCH_SECONDS": 2} if small else {}
    window = either((100, 40), (12, 2))
    return {
        "S3 says 403 for the first 40 % of its images": Case(
            "S3Decorators#2, glowfic#893, openverse-api#847",
            [Habit(missing=(403, either(120, 24)))],
            *either((300, 180, 6), (60, 36, 2)),
        ),
        "a line of 16 Mbit/s, originals of 3.9 MB": Case(
            "img2dataset#261, ripme#584",
            [Habit(line=line, size=either(3_900_000, 1_000_000))],
            *either((40, 40, 78), (6, 6, 3)),
            settings=quick,
        ),
        "images in a window, then 429 with Retry-After": Case(
            "img2dataset#62, gallery-dl#5160, wiki2book#89",
            [Habit(window=window)],
            *either((273, 273, 82), (30, 30, 4)),
        ),
        "two PHP workers make thumbnails": Case(
            "PrestaShop#18599, Maho#587",
            [Habit(workers=2, service=either(2.0, 0.3))],
            *either((60, 60, 60), (16, 16, 3)),
        ),
        "a host is away for a while": Case(
            "a router restarts",
            [Habit(away=either((2, 27), (0.3, 3)))],
            *either((600, 600, 38), (60, 60, 4)),
        ),
        "4 connections at once, else a reset": Case(
            "ripme#584", [Habit(connections=4, service=0.15)], *either((200, 200, 9), (30, 30, 2))
        ),
        "2 images a second, else 503": Case(
            "gallery-dl#5160", [Habit(rate=(2, 20))], *either((200, 190, 90), (26, 25, 3))
        ),
        "50 hosts on a slow line": Case(
            "img2dataset#261",
            [Habit(line=Line(2e6), size=either(1_000_000, 200_000))],
            *either((4, 200, 100), (1, 20, 2)),
            each_a_host=either(50, 20),
            settings=quick,
        ),
        "a good host beside a silent one and one that limits": Case(
            "storage#469",
            [Habit(latency=0.1), Habit(silent=True), Habit(rate=(10, 20))],
            *either((100, 200, 8), (12, 24, 1)),
            settings={"FETCH_SECONDS": 1.5} if small else {},
        ),
    }


@contextlib.contextmanager
def serving(case, photo):
    """Starts a case's hosts; gives the URLs of the assets' images, and the hosts."""
    with contextlib.ExitStack() as started:
        hosts = []
        urls = []
        for habit in case.habits:
            answer = partial(habit.answer, photo)
            host = started.enter_context(ImageHost(otherwise=answer, address=""))
            hosts.append(host)
            for name in range(case.each_a_host):
                address = f"http://127.0.{1 + name // 250}.{1 + name % 250}:{host.port}"
                urls += [f"{address}/{number}" for number in range(case.images)]
        yield urls, hosts


def main():
    """Runs the cases that are named, or all."""
    sys.path.insert(0, str(REPO))
    import models

    photo = photographs()["rocket.jpg"]
    known = cases(small=False)
    with Stack() as stack, tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or known:
            case = known[name]
            stack.reset()
            with serving(case, photo) as (urls, hosts):
                stack.add_images(urls)
                settings = {"CLIP_MODEL": str(models.tiny_model()), "MODEL_VERSION": "tiny"}
                run = subprocess.run(
                    [sys.executable, str(REPO / "generate_embeddings.py")],
                    env=stack.env(**settings, **case.settings) | {"PATH": os.environ["PATH"]},
                    cwd=Path(folder),
                    capture_output=True,
                    text=True,
                )
                asked = sum(len(host.requests) for host in hosts)
            counts = dict(pair.split("=") for pair in run.stdout.splitlines()[-1].split())
            seconds = float(counts["seconds"])
            print(
                f"{name:55} {counts['embedded']:>4} of {len(urls)} (at least {case.come}), "
                f"failed {counts['failed']}, left {counts['left']}, {asked} requests, "
                f"{seconds:.1f} s, {seconds / case.best:.2f} of the best; exit {run.returncode}",
                flush=True,
            )


if __name__ == "__main__":
    main()
