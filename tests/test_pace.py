"""The pace, in a simulation: hosts with habits that people report, and a line, in steps of 20 ms.

Promises: what a host can give comes, in at most so many times the best possible time; what it
can't give costs a bounded number of requests; a host that recovers is used again; a slow line is no
fault. test_hosts.py has real hosts with the same habits. Nothing here looks at a clock.
"""

import math
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

import generate_embeddings as script

STEP = 0.02  # seconds


@dataclass
class Habit:
    """What a host does, and its line. Times are in seconds, sizes in bytes."""

    images: int
    size: float = 150e3
    line: float = 12.5e6  # bytes a second
    latency: float = 0.1
    service: float = 0.0  # for an image,
    workers: int = 10**9  # so many at a time; the others wait
    window: tuple[int, float] | None = None  # images per seconds, then 429 with Retry-After
    rate: tuple[float, float] | None = None  # images a second and how many at once, then 503
    connections: int = 10**9  # then 503
    missing: float = 0.0  # share of the images, which answer 502
    away: tuple[float, float] = (0.0, 0.0)  # from when to when nobody answers


class Host:
    """A simulated host: whom it refuses."""

    def __init__(self, habit):
        self.habit = habit
        chance = random.Random(1)
        self.gone = {n for n in range(habit.images) if chance.random() < habit.missing}
        self.tokens = habit.rate[1] if habit.rate else 0.0
        self.window_began = self.now = 0.0
        self.in_window = 0

    def refusal(self, image, now, busy):
        """None, or the seconds of Retry-After (0: none is given)."""
        habit = self.habit
        if habit.away[0] < now < habit.away[1] or image in self.gone or busy >= habit.connections:
            return 0.0
        if habit.window:
            most, seconds = habit.window
            if now - self.window_began > seconds:
                self.window_began, self.in_window = now, 0
            self.in_window += 1
            if self.in_window > most:
                return seconds - (now - self.window_began) + 0.1
        if habit.rate:
            per_second, most = habit.rate
            self.tokens = min(most, self.tokens + per_second * (now - self.now))
            self.now = now
            if self.tokens < 1:
                return 0.0
            self.tokens -= 1
        return None


def simulate(habit, workers=16):
    """How a run over one host ends: seconds, arrived, failed, left, requests."""
    host, pace = Host(habit), script.Pace(script.FIRST_WINDOW, workers)
    end = SimpleNamespace(arrived=0, failed=0, left=0, requests=0)
    queue = [(image, 0) for image in range(habit.images)]
    flying = []
    now = 0.0
    while (queue or flying) and now < 3000 and not pace.given_up:
        while queue and len(flying) < int(pace.window) and now >= pace.rest_until:
            image, tried = queue.pop(0)
            end.requests += 1
            new = {"phase": "way", "wait": habit.latency, "bytes": habit.size, "refused": 0.0}
            flying.append(SimpleNamespace(image=image, tried=tried, since=now, **new))
        share = habit.line * STEP / max(1, sum(f.phase == "body" for f in flying))
        served = 0
        for f in list(flying):
            f.wait -= STEP
            if f.phase == "way" and f.wait <= 0:
                busy = sum(other.phase in ("serve", "body") for other in flying)
                refused = host.refusal(f.image, now, busy)
                f.phase, f.wait = "serve" if refused is None else "refused", habit.service
                f.refused = refused or 0.0
            elif f.phase == "serve" and served < habit.workers:
                served += 1
                if f.wait <= 0:
                    f.phase = "body"
            elif f.phase == "serve":
                f.wait += STEP  # it waits for a worker
            elif f.phase == "body":
                f.bytes -= share
            if f.phase == "body" and f.bytes <= 0:
                flying.remove(f)
                end.arrived += 1
                pace.arrived(now, now - f.since)
            elif f.phase == "refused" or now - f.since > 30 + (habit.size - f.bytes) / 50e3:
                flying.remove(f)
                pace.strained(now, f.since, f.refused)
                queue.append((f.image, f.tried + (not f.refused)))
        end.failed += sum(tried == script.TRIES for _, tried in queue)
        queue = [(image, tried) for image, tried in queue if tried < script.TRIES]
        now += STEP
    end.failed += sum(tried > 0 for _, tried in queue) + len(flying)
    end.left = sum(tried == 0 for _, tried in queue)
    end.seconds = now
    return end


GOOD = {
    # what the host or the line does: the habit, the best possible time, how many times as long it
    # may take, and the share of the images that may wait for the next run
    "a line of 2 MB/s, large originals": (Habit(40, size=3.9e6, line=2e6), 78, 1.1, 0),
    "answers after 100 ms": (Habit(600), 12, 1.1, 0),
    "answers after 3 s": (Habit(300, latency=3.0), 58, 1.3, 0),
    "two workers that need 2 s": (Habit(60, workers=2, service=2.0), 60, 1.1, 0),
    "100 images in 40 s, Retry-After": (Habit(300, window=(100, 40)), 82, 1.1, 0),
    "4 connections, else 503": (Habit(200, connections=4, service=0.15), 13, 1.5, 0),
    "10 a second, else 503": (Habit(900, rate=(10, 20)), 88, 1.1, 0),
    "2 a second, else 503": (Habit(200, rate=(2, 20)), 90, 1.1, 0.03),
    "away for 25 s": (Habit(600, away=(2, 27)), 38, 1.3, 0),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_a_host_can_give_comes_in_good_time(name):
    habit, best, times, share = GOOD[name]
    end = simulate(habit)
    assert end.arrived >= (1 - share) * habit.images, end
    assert end.seconds <= times * best, end
    assert end.left == 0, end


BAD = {
    # the habit, how long it may take, and how many requests it may cost
    "is away for ever": (Habit(300, away=(-1, math.inf)), 70, 12),
    "has lost every tenth image, and says 502": (Habit(600, missing=0.1), 100, 700),
    "asks for an hour": (Habit(300, window=(20, 3600)), 5, 40),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_host_can_not_give_costs_a_bounded_time(name):
    habit, seconds, requests = BAD[name]
    end = simulate(habit)
    assert end.arrived + end.failed + end.left == habit.images
    assert end.seconds < seconds, end
    assert end.requests <= requests, end


# The rule itself


def strained(pace, now, times=1, rest=0.0, since=None):
    for _ in range(times):
        pace.strained(now, now if since is None else since, rest)
    return pace


def test_strain_halves_the_window_once_for_all_that_were_under_way():
    pace = script.Pace(16, 16)
    strained(pace, 10.0, times=2, since=9.0)
    assert pace.window == 8
    strained(pace, 10.5, since=10.2)
    assert pace.window == 1  # the third in a row


def test_the_window_grows_by_one_an_image_and_above_the_threshold_by_one_a_round():
    pace = strained(script.Pace(8, 16), 1.0)
    assert pace.window == 4
    for _ in range(4):
        pace.arrived(2.0, 0.1)
    assert 4.5 < pace.window < 5.1
    fresh = script.Pace(4, 16)
    for _ in range(99):
        fresh.arrived(2.0, 0.1)
    assert fresh.window == 16
    assert [script.Pace(4, most).window for most in (1, 3, 8)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("seconds", "window"),
    [
        *(([0.5, 1.9], 6), ([0.5, 2.1], 5), ([0.5, 7.9], 5), ([0.5, 8.1], 2.5)),
        *(([5.0, 7.4], 6), ([5.0, 7.6], 5), ([9.0, 9.0], 6)),
        *(([0.5, 5.0, 5.0], 5), ([0.5, 9.0, 9.0], 2.5)),
    ],
)
def test_only_an_image_that_is_quick_for_its_host_widens_the_window(seconds, window):
    pace = script.Pace(4, 16)
    for number, one in enumerate(seconds):
        pace.arrived(20.0 + number, one)
    assert pace.window == window


def test_rests_double_up_to_16_seconds_and_begin_with_the_third_strain():
    crowd = strained(script.Pace(16, 16), 100.0, times=16, since=99.0)
    assert crowd.rest_until == 101
    rests, now = [], 101.0
    for _ in range(6):
        strained(crowd, now)
        rests.append(crowd.rest_until - now)
        now = crowd.rest_until
    assert rests == [2, 4, 8, 16, 16, 16]
    crowd.arrived(now, 0.1)
    strained(crowd, now)
    assert crowd.rest_until == now + 1  # in a window below three each strain rests
    assert [strained(script.Pace(most, 16), 100.0).rest_until for most in (2, 3)] == [101, 0]
    assert strained(crowd, now, rest=5).window == 1


@pytest.mark.parametrize(("rest", "given_up"), [(37, False), (890, False), (901, True)])
def test_a_host_rests_as_long_as_it_asks_for_up_to_15_minutes(rest, given_up):
    """However many downloads it tells so."""
    pace = strained(script.Pace(4, 16), 10.0, times=4, rest=rest)
    strained(pace, 10.0, times=4)  # from downloads that it told nothing
    assert (pace.rest_until, pace.given_up) == (10 + rest, given_up)


GIVEN_UP = {
    # the moments of strain, and the rest that is asked for each time: when the host is given up
    "silence, four downloads at a time": ([30, 30, 30, 30, 61, 92], 0, 92),
    "refusals": ([0, 1, 3, 7, 15, 31, 47, 63], 0, 63),
    "a rest, again and again": (range(0, 999, 5), 5, 65),
    "long rests, six times": (range(0, 999, 70), 70, 350),
    "rests that it asked for, five times": (range(0, 350, 70), 70, None),
    "a crowd is told to rest, then one more": ([*[0] * 16, 70], 70, None),
    "two strains, far apart": ([0, 500], 0, None),
}


@pytest.mark.parametrize("name", GIVEN_UP)
def test_a_host_is_given_up_after_three_rounds_and_a_minute_without_an_image(name):
    moments, rest, end = GIVEN_UP[name]
    for before in ([], [0, 0, 0, 1, 2, 3, 4]):  # it recovered from these
        pace = script.Pace(4, 16)
        for moment in before:
            strained(pace, moment, rest=200)
        pace.arrived(505.0, 0.1)
        given_up = []
        for moment in moments:
            strained(pace, 505.0 + moment, rest=rest, since=504.9 + moment)
            given_up += [moment] if pace.given_up else []
        assert given_up[:1] == ([end] if end else [])
