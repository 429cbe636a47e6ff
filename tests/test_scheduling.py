"""What a run starts, waits for, leaves and counts: runs in this process, over a store in memory."""

import contextlib
import re
import threading
import time
from types import SimpleNamespace

import pytest
from answers import hang_up, in_turn, length, raw, status
from conftest import TINY_VERSION, wait_until
from stack import ImageHost

import generate_embeddings as script
from generate_embeddings import Asset, Embedded, Failed, Outcome, Place, RunError, Status

PERSON = 20  # seconds that no event here takes, also on a busy machine


class MemoryStore:
    """A third store, written by what the protocol says and nothing else."""

    place, longest = "memory", 60.0

    def __init__(self, images, outcomes=None):
        self.assets = [Asset(number, image) for number, image in enumerate(images)]
        self.outcomes = outcomes or {}  # by id, where it is another than a store's usual one
        self.batches = []

    def status(self):
        return Status(assets=len(self.assets), done=0, failed_for_good=0)

    def pages(self):
        yield self.assets

    def locate(self, asset):
        return Place(asset.image, {})

    def save(self, results):
        self.batches.append(results)
        usual = [Outcome("noted" if isinstance(r, Failed) else "stored") for r in results]
        ids = [result.asset.id for result in results]
        return [self.outcomes.get(i, outcome) for i, outcome in zip(ids, usual, strict=True)]

    @property
    def saved(self):
        """id -> its result."""
        return {result.asset.id: result for batch in self.batches for result in batch}

    def embedded(self):
        return {i for i, result in self.saved.items() if isinstance(result, Embedded)}

    def failed(self):
        return {i for i, result in self.saved.items() if isinstance(result, Failed)}


@pytest.fixture
def ride(tiny, monkeypatch):
    """Makes a run over a store; returns its report, and the error that ended it or None."""
    monkeypatch.setattr(script, "cores", lambda: 2)

    def ride(store, **settings):
        given = {"clip_model": str(tiny), "model_version": TINY_VERSION, "private_hosts": True}
        given |= {"workers": 4, "fetch_seconds": 5.0} | settings
        made = script.Settings(**given)
        report = script.Report(store.status(), made)
        error = None
        try:
            script.Run(store, made, report, script.Stop()).loop()
        except Exception as end:
            error = end
        assert report.attempted == report.embedded + report.failed
        return report, error

    return ride


@pytest.fixture
def good(photos):
    """A host that has an image at every path."""
    with ImageHost(otherwise=photos["flower.jpg"]) as host:
        yield host


@pytest.fixture
def dead():
    """Four hosts that never give an answer of their own: 403 is a wall before a host."""
    with contextlib.ExitStack() as started:
        hosts = [ImageHost(otherwise=status(403)) for _ in range(4)]
        yield [started.enter_context(host) for host in hosts]


def test_a_store_that_is_written_from_the_protocol_alone_will_do(ride, good):
    images = [*good.urls(30), "https://[::1", "data:,no", good.url_of("/last")]
    store = MemoryStore(images)
    report, error = ride(store)
    assert error is None
    assert (report.embedded, report.failed, report.left, report.exit_code) == (31, 2, 0, 1)
    assert store.embedded() == {*range(30), 32}
    assert {store.saved[i].permanent for i in (30, 31)} == {True}


def test_a_batch_to_store_is_bounded_and_nothing_comes_twice(ride, good, monkeypatch):
    monkeypatch.setattr(script, "WRITE_ROWS", 7)
    save = MemoryStore.save

    def slow(self, results):
        time.sleep(0.3)  # while more than a batch is embedded
        return save(self, results)

    monkeypatch.setattr(MemoryStore, "save", slow)
    store = MemoryStore(good.urls(60))
    report, error = ride(store)
    assert error is None
    assert report.embedded == sum(map(len, store.batches)) == 60
    assert max(map(len, store.batches)) == 7


def test_what_the_store_sets_aside_is_no_attempt(ride, good):
    names = ["stored", "deleted", "superseded", "changed", "busy", "stored", "refused"]
    outcomes = {number: Outcome(name, "not on a Sunday") for number, name in enumerate(names)}
    report, error = ride(MemoryStore(good.urls(7), outcomes))
    assert error is None
    assert (report.embedded, report.failed, report.gone, report.left) == (2, 1, 2, 2)
    assert report.reasons == {"store: not on a Sunday": 1}
    assert report.set_aside.keys() == set(script.SET_ASIDE.values())
    assert report.exit_code == 1


def test_a_report_says_so_where_all_failed_for_one_reason():
    def lines(*reasons):
        report = script.Report(Status(3, 0, 0), script.Settings())
        for number, reason in enumerate(reasons):
            report.count(Failed(Asset(number, "x"), "fetch", reason, False), Outcome("noted"))
        return "\n".join(report.lines())

    said = "that were tried failed for the same reason: fetch: host not found"
    assert f"All 3 {said}" in lines(*["host not found"] * 3)
    assert said not in lines("host not found", "host not found", "HTTP 404")
    assert said not in lines("host not found")


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("https://shop.example/a.jpg", "shop.example"),
        ("https://user:word@shop.example:8443/a.jpg", "shop.example:8443"),
        ("data:image/png;base64,AAAA", ""),
        ("folder/a.jpg", ""),
        ("https://[::1/a.jpg", ""),
    ],
)
def test_the_host_of_an_image_is_whom_its_url_leads_to(image, host):
    assert Place(image, {}).host == host


# Hosts


FAIL, SILENT, ANSWER = "fail", "silent", "answer"


def hosts_after(*events):
    """The judgement on hosts after (host, what it did, how often)."""
    hosts = script.Hosts()
    for host, what, times in events:
        for _ in range(times):
            if what == ANSWER:
                hosts.answered(host)
            else:
                hosts.failed(host, silent=what == SILENT)
    return hosts


@pytest.mark.parametrize(
    ("events", "down"),
    [
        ([("a", FAIL, 19)], []),
        ([("a", FAIL, 20)], ["a"]),
        ([("a", FAIL, 19), ("a", ANSWER, 1), ("a", FAIL, 19)], []),
        ([("a", FAIL, 19), ("b", ANSWER, 1), ("a", FAIL, 1)], ["a"]),
        ([("a", FAIL, 10), ("b", FAIL, 20), ("a", FAIL, 9)], ["b"]),
        ([("", FAIL, 50)], []),  # files and data: URLs
        ([("a", SILENT, 20)], ["a"]),
        ([("a", ANSWER, 1), ("a", SILENT, 99)], []),  # a moment ago it was there
        ([("a", ANSWER, 1), ("a", SILENT, 99), ("a", FAIL, 1)], ["a"]),
        ([("b", ANSWER, 1), ("a", SILENT, 20)], ["a"]),
    ],
)
def test_a_host_is_down_after_20_failures_in_a_row(events, down):
    hosts = hosts_after(*events)
    assert [name for name in ("", "a", "b") if hosts.is_down(name)] == down


@pytest.mark.parametrize(
    ("events", "ends", "gone"),
    [
        ([("a", FAIL, 19), ("b", FAIL, 19)], False, False),
        ([("a", FAIL, 20)], False, True),  # nothing came at all
        ([("a", FAIL, 20), ("b", ANSWER, 1)], False, False),
        ([("b", ANSWER, 1), ("a", FAIL, 20)], False, False),
        ([("", ANSWER, 9), ("a", FAIL, 20)], False, True),  # a data: URL proves no network
        ([("b", ANSWER, 1)] + [(name, FAIL, 20) for name in "cde"], True, True),
        ([(name, FAIL, 20) for name in "cd"] + [("b", ANSWER, 1), ("e", FAIL, 20)], False, False),
        ([("b", ANSWER, 1), ("c", FAIL, 60)], False, False),
    ],
)
def test_the_network_is_gone_with_three_hosts_in_a_row_or_where_nothing_ever_came(
    events, ends, gone
):
    hosts = hosts_after(*events)
    assert (hosts.several_in_a_row, hosts.network_is_gone) == (ends, gone)


def test_a_host_that_stays_silent_is_down_in_the_end(monkeypatch):
    hosts = hosts_after(("a", ANSWER, 1), ("a", SILENT, 20))
    assert not hosts.is_down("a")
    monkeypatch.setattr(script, "SILENT_SECONDS", 0.0)
    assert hosts.failed("a", silent=True)
    assert hosts.is_down("a")


def test_a_network_that_is_away_for_a_moment_ends_no_run(ride, photos, monkeypatch):
    monkeypatch.setattr(script, "FETCH_ATTEMPTS", 2)
    with ImageHost(otherwise=photos["flower.jpg"]) as host:

        def go_away():
            wait_until(lambda: len(host.requests) >= 10)
            host.stop()
            wait_until(lambda: len(store.failed()) > script.HOST_FAILURES)
            host.start()

        store = MemoryStore(host.urls(400))
        away = threading.Thread(target=go_away)
        away.start()
        report, error = ride(store)
        away.join()
    assert error is None
    assert (report.left, report.set_aside, report.exit_code) == (0, {}, 1)
    assert report.failed > script.HOST_FAILURES
    assert report.embedded == 400 - report.failed > 200


def test_a_host_that_breaks_off_is_not_silent(ride, photos, monkeypatch):
    monkeypatch.setattr(script, "FETCH_ATTEMPTS", 1)
    breaks_off = raw(length(999), b"x", end=hang_up)
    with ImageHost(otherwise=in_turn(status(200, body=photos["flower.jpg"]), breaks_off)) as host:
        report, error = ride(MemoryStore(host.urls(60)), workers=1)
    assert error is None
    assert (report.embedded, report.failed, report.left) == (1, 20, 39)


def test_what_no_host_was_asked_for_is_no_answer_of_the_network(ride, dead):
    """Though such URLs have a host's name in them."""
    addresses = [f"{url},{url}" for url in dead[0].urls(5)] + ["http://no host/a.jpg"]
    report, error = ride(MemoryStore(addresses + dead[0].urls(25) + addresses), workers=1)
    assert "check this machine's network" in str(error)
    assert report.reasons[f"fetch: {script.MANY_URLS}"] >= 5


@pytest.mark.parametrize("order", ["the dead host first", "the dead host last"])
def test_one_dead_host_is_the_failure_of_its_images_in_any_order(ride, good, dead, order):
    parts = [dead[0].urls(50), good.urls(20)]
    if order == "the dead host last":
        parts.reverse()
    store = MemoryStore(parts[0] + parts[1])
    report, error = ride(store, workers=1)
    assert error is None
    assert (report.exit_code, report.embedded, report.failed, report.left) == (1, 20, 20, 30)
    assert [*report.set_aside.values()] == [30]
    assert len(dead[0].requests) == 20
    assert not any(failed.permanent for failed in store.saved.values() if len(failed) == 4)


def test_a_run_to_which_nothing_came_ends_with_the_network_as_its_reason(ride, dead):
    report, error = ride(MemoryStore(dead[0].urls(50)))
    assert isinstance(error, RunError)
    assert f"127.0.0.1:{dead[0].port} failed 20 times in a row" in str(error)
    assert 20 <= report.failed <= 24  # as many as were under way
    assert report.left == 50 - report.failed


def test_three_hosts_down_in_a_row_end_the_run(ride, good, dead):
    images = good.urls(3) + [url for host in dead for url in host.urls(30)]
    report, error = ride(MemoryStore(images), workers=1)
    assert isinstance(error, RunError)
    assert "check this machine's network" in str(error)
    assert (report.embedded, report.failed, report.left) == (3, 60, 60)
    assert dead[3].requests == []


def test_an_image_between_two_dead_hosts_shows_that_the_network_is_there(ride, good, dead):
    parts = [dead[0].urls(25), dead[1].urls(25), good.urls(1), dead[2].urls(25), good.urls(1)]
    report, error = ride(MemoryStore([url for part in parts for url in part]), workers=1)
    assert error is None
    assert (report.exit_code, report.embedded, report.failed, report.left) == (1, 2, 60, 15)


def test_images_that_a_host_says_are_gone_are_no_sign_of_trouble(ride, photos):
    def reply(handler):
        there = int(handler.path[1:]) >= 50
        handler.reply(200 if there else 404, [], photos["flower.jpg"])

    with ImageHost(otherwise=reply) as host:
        report, error = ride(MemoryStore(host.urls(53)))
    assert error is None
    assert (report.embedded, report.failed, report.left) == (3, 50, 0)


def test_what_goes_wrong_after_the_download_is_no_fault_of_the_host(
    ride, good, monkeypatch, caplog
):
    def busy(self, asset, data):
        wait_until(lambda: len(good.requests) == 30)
        time.sleep(0.5)  # the last has come, and no answer more ends the row of failures
        raise script.NotNow("its decoder was killed")

    monkeypatch.setattr(script.Loader, "load", busy)
    report, error = ride(MemoryStore(good.urls(30)), workers=30)
    assert error is None
    assert (report.failed, report.left) == (30, 0)
    assert "its other images are left" not in caplog.text


# Room


def test_a_slow_download_makes_room_for_others(ride, photos, monkeypatch):
    monkeypatch.setattr(script, "SLOW_SECONDS", 1.5)
    rest, overtaken = threading.Semaphore(0), []

    def reply(handler):
        if int(handler.path[1:]) < 2:
            overtaken.append(all(rest.acquire(timeout=PERSON) for _ in range(3)))
        else:
            rest.release()
        handler.reply(200, [], photos["flower.jpg"])

    with ImageHost(otherwise=reply) as host:
        report, _ = ride(MemoryStore(host.urls(8)), workers=2, fetch_seconds=60.0)
    assert report.embedded == 8
    assert overtaken == [True, True]


def test_where_the_line_itself_is_slow_nothing_makes_room(ride, photos, monkeypatch):
    monkeypatch.setattr(script, "SLOW_SECONDS", 0.3)
    monkeypatch.setattr(script, "MOST_SLOW", 1)
    crowd = []

    def reply(handler):
        time.sleep(1)
        if handler.path == "/1":  # begun beside the first, which came slowly
            wait_until(lambda: store.saved)
            time.sleep(1)  # for a third
            crowd.extend(path for path, _ in host.requests)
        handler.reply(200, [], photos["flower.jpg"])

    with ImageHost(otherwise=reply) as host:
        store = MemoryStore(host.urls(3))
        report, _ = ride(store, workers=1, fetch_seconds=60.0)
    assert report.embedded == 3
    assert sorted(crowd) == ["/0", "/1"]


@pytest.mark.parametrize("busy", ["loading", "embedding"])
def test_what_waits_for_the_model_is_bounded(ride, good, monkeypatch, busy):
    most = 2 * (3 + 2)  # of 3 workers and 2 cores
    opened = threading.Event()

    class SlowEncoder(script.ClipEncoder):
        def __init__(self, settings):
            super().__init__(settings)
            if busy == "loading":
                opened.wait(PERSON)

        def embed(self, batch):
            opened.wait(PERSON)
            return super().embed(batch)

    monkeypatch.setattr(script, "ClipEncoder", SlowEncoder)
    counted = []

    def watch():
        wait_until(lambda: len(good.requests) >= most)
        time.sleep(1)  # for more than there should be
        counted.append(len(good.requests))
        opened.set()

    threading.Thread(target=watch).start()
    report, error = ride(MemoryStore(good.urls(60)), workers=3, fetch_seconds=60.0)
    assert error is None
    assert report.embedded == 60
    assert counted == [most]


def test_what_waits_for_the_store_is_bounded(ride, good, monkeypatch):
    monkeypatch.setattr(script, "RESULTS_WAITING", 10)
    monkeypatch.setattr(script, "WRITE_ROWS", 5)
    save, counted = MemoryStore.save, []

    def slow(self, results):
        if not counted:
            wait_until(lambda: len(good.requests) >= 11)
            time.sleep(2)  # for more than there should be
            counted.append(len(good.requests))
        return save(self, results)

    monkeypatch.setattr(MemoryStore, "save", slow)
    report, _ = ride(MemoryStore(good.urls(100)))
    assert report.embedded == 100
    assert counted[0] <= 5 + 10 + 2 * (4 + 2)  # being stored, waiting for that, under way


def test_a_batch_is_full_where_there_is_enough(ride, good, monkeypatch):
    sizes, whole = [], script.ClipEncoder.embed

    def embed(self, batch):
        sizes.append(len(batch))
        wait_until(lambda: len(good.requests) >= 24)  # as many as wait for the model at most
        return whole(self, batch)

    monkeypatch.setattr(script.ClipEncoder, "embed", embed)
    report, _ = ride(MemoryStore(good.urls(60)), batch_size=4)
    assert report.embedded == 60
    assert max(sizes) == 4
    assert sizes.count(4) >= 3


def test_the_last_images_are_shared_among_the_cores(ride, good, monkeypatch):
    sizes, load, loaded = [], script.Loader.load, []

    class SlowEncoder(script.ClipEncoder):
        def __init__(self, settings):
            super().__init__(settings)
            wait_until(lambda: len(loaded) == 10)
            time.sleep(1)  # until the loop has all of them

        def embed(self, batch):
            sizes.append(len(batch))
            return super().embed(batch)

    def counted(self, asset, data):
        made = load(self, asset, data)
        loaded.append(made)
        return made

    monkeypatch.setattr(script, "ClipEncoder", SlowEncoder)
    monkeypatch.setattr(script.Loader, "load", counted)
    report, _ = ride(MemoryStore(good.urls(10)), batch_size=8)
    assert (report.embedded, sizes) == (10, [5, 5])


def test_a_limit_bounds_what_is_asked_for(ride, good):
    report, _ = ride(MemoryStore(good.urls(60)), limit=5)
    assert (report.embedded, report.found, len(good.requests)) == (5, 5, 5)


# What ends a run, and what does not


def test_an_unexpected_error_costs_one_image_and_nothing_for_good(ride, good, monkeypatch):
    whole = script.Loader.load

    def odd(self, asset, data):
        return 1 / 0 if asset.id == 3 else whole(self, asset, data)

    monkeypatch.setattr(script.Loader, "load", odd)
    store = MemoryStore(good.urls(6))
    report, error = ride(store)
    assert error is None
    assert (report.embedded, report.failed) == (5, 1)
    failed = store.saved[3]
    assert (failed.stage, failed.reason) == ("decode", "unexpected ZeroDivisionError")
    assert failed.permanent is False


def test_a_download_that_hangs_below_every_deadline_is_given_up(ride, good, monkeypatch):
    whole, opened = script.Loader.fetch, threading.Event()

    def hang(self, place):
        if place.where == store.assets[0].image:
            opened.wait(PERSON)
        return whole(self, place)

    monkeypatch.setattr(script.Loader, "fetch", hang)
    store = MemoryStore(good.urls(4))
    began = time.monotonic()
    report, error = ride(store, fetch_seconds=1.0)
    assert time.monotonic() - began < PERSON
    opened.set()
    assert error is None
    assert (report.embedded, report.failed) == (3, 1)
    assert store.saved[0].reason == "not complete within 1 s"
    assert store.saved[0].permanent is False


def test_a_machines_trouble_ends_the_run_and_is_no_images_failure(ride, good, monkeypatch):
    def fail(self, asset, data):
        raise RunError("no process could be started")

    monkeypatch.setattr(script.Loader, "load", fail)
    store = MemoryStore(good.urls(9))
    report, error = ride(store)
    assert str(error) == "no process could be started"
    assert (report.attempted, report.left, store.saved) == (0, 9, {})


def test_an_end_waits_for_what_is_being_embedded_and_stores_it(ride, good, monkeypatch):
    whole, ended = script.ClipEncoder.embed, threading.Event()

    def embed(self, batch):
        ended.wait(PERSON)
        time.sleep(0.5)  # the loop has heard of the end by now
        return whole(self, batch)

    def load(self, asset, data):
        if asset.id < 4:
            return whole_load(self, asset, data)
        wait_until(lambda: len(run_embeds) == 4)
        ended.set()
        raise RunError("the machine has had enough")

    def counted(self, batch):
        run_embeds.append(batch)
        return embed(self, batch)

    run_embeds, whole_load = [], script.Loader.load
    monkeypatch.setattr(script.ClipEncoder, "embed", counted)
    monkeypatch.setattr(script.Loader, "load", load)
    monkeypatch.setattr(script, "cores", lambda: 4)
    store = MemoryStore(good.urls(5))
    report, error = ride(store, workers=8)
    assert str(error) == "the machine has had enough"
    assert (report.embedded, report.left) == (4, 1)
    assert store.embedded() == {0, 1, 2, 3}


@pytest.mark.parametrize("call", ["pages", "save"])
@pytest.mark.parametrize("error", [RunError("the disk is full"), KeyError("a defect")])
def test_a_store_that_can_not_go_on_ends_the_run(ride, good, monkeypatch, call, error):
    calls = []

    def fail(*_):
        calls.append(call)
        time.sleep(0.5)  # while more is embedded
        raise error

    def fail_later(*_):
        yield fail()

    monkeypatch.setattr(script, "WRITE_ROWS", 2)
    monkeypatch.setattr(MemoryStore, call, fail_later if call == "pages" else fail)
    report, end = ride(MemoryStore(good.urls(9)))
    assert end is error
    assert (report.attempted, report.left) == (0, 9)
    assert calls == [call]  # and it is not asked again


@pytest.mark.parametrize("call", ["pages", "save"])
def test_a_store_that_hangs_ends_the_run(ride, good, monkeypatch, call):
    opened = threading.Event()

    def hang(*_):
        opened.wait(PERSON)
        return []

    def hang_later(*_):
        yield hang()

    monkeypatch.setattr(MemoryStore, call, hang_later if call == "pages" else hang)
    monkeypatch.setattr(MemoryStore, "longest", 1.0)
    report, error = ride(MemoryStore(good.urls(9)))
    opened.set()
    assert isinstance(error, RunError)
    assert "no answer from the database for" in str(error)
    assert report.attempted == 0


def refusing(count, but=()):
    """Outcomes: refused, each for the same reason."""
    return {n: Outcome("refused", "no room") for n in range(count) if n not in but}


def test_a_database_that_refuses_every_row_for_one_reason_ends_the_run(ride, good, monkeypatch):
    monkeypatch.setattr(script, "WRITE_ROWS", 5)
    report, error = ride(MemoryStore(good.urls(200), refusing(200)))
    assert isinstance(error, RunError)
    assert "no room" in str(error)
    assert 20 <= report.failed < 100
    assert report.left == 200 - report.failed


def test_one_row_that_was_stored_shows_that_the_others_are_at_fault(ride, good, monkeypatch):
    monkeypatch.setattr(script, "WRITE_ROWS", 5)
    report, error = ride(MemoryStore(good.urls(60), refusing(60, but=range(5))), workers=1)
    assert error is None
    assert (report.embedded, report.failed, report.left) == (5, 55, 0)


# What is said meanwhile


def test_a_log_has_a_line_every_10_images_at_first_and_every_10_seconds_then(caplog, monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    clock = SimpleNamespace(monotonic=lambda: now.seconds, time=time.time)
    monkeypatch.setattr(script, "time", clock)
    progress = script.Progress(3000)
    with caplog.at_level("INFO"), progress:
        for number in range(1000):
            now.seconds += 0.125  # ten seconds are 80 images
            progress.step(failed=number < 7)
    counts = [int(n) for n in re.findall(r"(\d+)/3000 done, failed=7, ", caplog.text)]
    assert counts == [*range(10, 101, 10), *range(180, 1001, 80)]
