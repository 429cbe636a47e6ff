"""The real command against hosts and lines with habits that people report, as real HTTP servers.

Promise: what a host can give comes in one run, nothing twice, and no image is asked for over and
over. test_pace.py has such hosts at full size, in a simulation. How long each takes beside the best
possible time: pytest tests/test_hosts.py -n 0 -rP
"""

import contextlib
import threading
import time
from dataclasses import dataclass, field
from functools import partial

import pytest
from answers import cut, hang, raw, status
from stack import ImageHost

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
    workers: int = 64  # of which each needs
    service: float = 0.0  # seconds for an image; who asks waits for one
    away: tuple[float, float] = (0.0, 0.0)  # seconds after the first question, with resets
    silent: bool = False  # it never answers
    size: int = 0  # bytes that an image is filled up to
    line: Line | None = None
    began: float = 0.0
    busy: int = 0
    tokens: float = 0.0
    filled: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self):
        self.hands = threading.Semaphore(self.workers)

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
                hang(handler)
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
            return status(code)
        if self.away[0] < now - self.began < self.away[1]:
            return raw(end=cut)
        if self.window:
            most, seconds = self.window
            if now - self.filled > seconds:
                self.filled, self.tokens = now, most
            if self.tokens < 1:
                rest = str(int(self.filled + seconds - now) + 1)
                return status(429, ("Retry-After", rest))
            self.tokens -= 1
        if self.rate:
            per_second, burst = self.rate
            self.tokens = min(burst, self.tokens + per_second * (now - (self.filled or now - 1e3)))
            self.filled = now
            if self.tokens < 1:
                return status(503)
            self.tokens -= 1
        if self.busy >= self.connections:
            return raw(end=cut)
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


SLOW = Line(2e6)  # 16 Mbit/s
QUICK = {"FETCH_SECONDS": 2}
ONE = Habit(line=Line(2e6), size=1_000_000)
# What the hosts do, and who reports such: the hosts, how many images each has, how many of all come
# at least, the best possible seconds, settings
CASES = {
    "S3 says 403 for the first 40 %: S3Decorators#2, glowfic#893": (
        [Habit(missing=(403, 24))],
        *(60, 36, 1, {}),
    ),
    "large originals on a slow line: img2dataset#261": ([ONE], 6, 6, 3, QUICK),
    "images in a window, then 429 with Retry-After: gallery-dl#5160": (
        [Habit(window=(12, 2))],
        *(30, 30, 4, {}),
    ),
    "two PHP workers make thumbnails: PrestaShop#18599, Maho#587": (
        [Habit(workers=2, service=0.3)],
        *(16, 16, 2.4, {}),
    ),
    "a router restarts": ([Habit(away=(0.3, 3))], 60, 60, 4, {}),
    "4 connections at once, else a reset: ripme#584": (
        [Habit(connections=4, latency=0.15)],
        *(30, 30, 2, {}),
    ),
    "2 images a second, else 503: gallery-dl#5160": ([Habit(rate=(2, 20))], 26, 25, 3, {}),
    "20 hosts on a slow line: img2dataset#261": (
        [Habit(line=SLOW, size=200_000) for _ in range(20)],
        *(1, 20, 2, QUICK),
    ),
    "a good host beside a silent one and one that limits: storage#469": (
        [Habit(latency=0.1), Habit(silent=True), Habit(rate=(10, 20))],
        *(12, 24, 1, QUICK),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_host_can_give_comes_in_one_run(cli, stack, photos, tuned, name):
    habits, count, come, best, settings = CASES[name]
    with contextlib.ExitStack() as started:
        answers = [partial(habit.answer, photos["rocket.jpg"]) for habit in habits]
        hosts = [started.enter_context(ImageHost(otherwise=answer)) for answer in answers]
        urls = [url for host in hosts for url in host.urls(count)]
        stack.add_images(urls)
        run = cli("PATIENT_SECONDS=3", "--", script=tuned, timeout=300, **settings)
        seconds = float(run.out.rpartition("seconds=")[2])
        print(f"{run.counts['embedded']} of {len(urls)}, in {seconds / best:.1f} times the best")
        asked = [times for host in hosts for times in host.asked().values()]
    assert run.counts["embedded"] >= come, run.out + run.err
    assert run.code == (0 if run.counts["embedded"] == len(urls) else 1)
    assert len(stack.embedded()) == run.counts["embedded"]
    assert sum(asked) <= 3 * len(urls), asked
