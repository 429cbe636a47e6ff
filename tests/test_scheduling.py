"""What a run starts, waits for, leaves and counts: runs in this process, over a store in memory.

Promises: attempted == embedded + failed; one download for one picture; a host that strains is
tried again, rests, or is given up, and no other host waits for it; what is under way is bounded;
what ends a run, and with which exit code.
"""

import contextlib
import re
import threading
import time
from types import SimpleNamespace

import pytest
from answers import cut, hang_up, in_turn, length, raw, status
from conftest import TINY_VERSION, wait_until
from stack import ImageHost

import generate_embeddings as script
from generate_embeddings import Asset, Embedded, Failed, RunError, Source, Status

PERSON = 20  # seconds that no event here takes, also on a busy machine


class MemoryStore:
    """A third store, written by what the protocol says and nothing else."""

    place, patience = "memory", 60.0

    def __init__(self, images, left=()):
        self.assets = [Asset(number, image) for number, image in enumerate(images)]
        self.left = set(left)  # ids whose results it does not take
        self.batches = []

    def status(self):
        return Status(assets=len(self.assets), done=0, failed=0)

    def pages(self):
        for start in range(0, len(self.assets), script.PAGE_ROWS):
            yield self.assets[start : start + script.PAGE_ROWS]

    def locate(self, asset):
        return Source(asset.image, {})

    def save(self, results):
        self.batches.append(results)
        return {result.asset.id for result in results} - self.left

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
        given |= {"workers": 16, "fetch_seconds": 5.0} | settings
        made = script.Settings(**given)
        report = script.Report(store.status(), made)
        error = None
        try:
            script.Run(store, made, report, script.Stop()).loop()
        except Exception as end:
            error = end
        assert report.attempted == report.embedded + report.failed
        assert len(store.saved) == sum(map(len, store.batches)), "twice"
        return report, error

    return ride


@pytest.fixture
def quick(monkeypatch):
    """Patience that is short enough for a test; rests stay as they are."""
    monkeypatch.setattr(script, "PATIENT_SECONDS", 2.0)


@pytest.fixture
def good(photos):
    """A host that has an image at every path."""
    with ImageHost(otherwise=photos["flower.jpg"]) as host:
        yield host


@pytest.fixture
def answering(photos):
    """Makes hosts that answer as they are told; `ok` is an image."""
    with contextlib.ExitStack() as started:

        def answering(otherwise=None, **options):
            return started.enter_context(ImageHost(otherwise=otherwise, **options))

        answering.ok = status(200, body=photos["flower.jpg"])
        yield answering


# What is counted


def test_a_store_that_is_written_from_the_protocol_alone_will_do(ride, good):
    images = [*good.urls(30), "https://[::1", "data:,no", good.url_of("/last")]
    store = MemoryStore(images)
    report, error = ride(store)
    assert error is None
    assert (report.embedded, report.failed, report.left, report.exit_code) == (31, 2, 0, 1)
    assert store.embedded() == {*range(30), 32}


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


def test_what_the_store_does_not_take_is_no_attempt_and_is_left(ride, good):
    report, error = ride(MemoryStore([*good.urls(7), "data:,no"], left={1, 3, 7}))
    assert error is None
    assert (report.embedded, report.failed, report.left, report.exit_code) == (5, 0, 3, 0)
    assert "       3  changed or gone meanwhile" in report.lines()


def test_the_report_says_what_was_left_of_which_host_and_why():
    report = script.Report(Status(9, 0, 0), script.Settings())
    report.leave("cdn.example", "HTTP 503", 2)
    report.leave("cdn.example", "HTTP 429, asked to wait until 14:03", 3)
    assert "       5  of cdn.example: HTTP 429, asked to wait until 14:03" in report.lines()
    assert report.exit_code == 1


def test_a_report_says_so_where_all_failed_for_one_reason():
    def lines(*reasons, embedded=False):
        report = script.Report(Status(3, 0, 0), script.Settings())
        if embedded:
            report.count(Embedded(Asset(9, "x"), None), taken=True)
        for number, reason in enumerate(reasons):
            report.count(Failed(Asset(number, "x"), "fetch", reason), taken=True)
        return "\n".join(report.lines())

    said = "that were tried failed for the same reason: fetch: host not found"
    assert f"All 3 {said}" in lines(*["host not found"] * 3)
    assert said not in lines(*["host not found"] * 3, embedded=True)
    assert said not in lines("host not found", "host not found", "HTTP 404")
    assert said not in lines("host not found")


def test_a_report_keeps_no_data_urls():
    report = script.Report(Status(1, 0, 0), script.Settings())
    failed = Failed(Asset(1, "data:" + "x" * 10**6), "decode", "too few pixels (1 x 1)")
    report.count(failed, taken=True)
    assert len(str(report.examples)) < 1000


@pytest.mark.parametrize(
    ("image", "host"),
    [
        ("https://shop.example/a.jpg", "shop.example"),
        ("https://user:word@shop.example:8443/a.jpg", "shop.example:8443"),
        ("data:image/png;base64,AAAA", ""),
        ("folder/a.jpg", ""),
        ("https://[::1/a.jpg", ""),
        # Nobody names another host than the one that is asked: that one would be given up.
        ("https://one.example\\@shop.example/a.jpg", "one.example"),
        (f"https://{'u' * 1980}@shop.example.one.example/a.jpg", "shop.example.one.example"),
        ("https://SHOP.example/a.jpg", "shop.example"),
    ],
)
def test_the_host_of_an_image_is_whom_its_url_leads_to(image, host):
    assert Source(image, {}).host == host


# One download for one picture


def test_assets_that_share_a_url_are_loaded_once_and_each_counts(ride, good, monkeypatch):
    monkeypatch.setattr(script, "PAGE_ROWS", 20)  # they come on several pages
    loaded, whole = [], script.Loader.load

    def load(self, data):
        loaded.append(data)
        return whole(self, data)

    monkeypatch.setattr(script.Loader, "load", load)
    good.files["/gone"] = status(404)
    store = MemoryStore([*good.urls(1), good.url_of("/gone"), good.url_of("/x")] * 30)
    report, error = ride(store)
    assert error is None
    assert (report.embedded, report.failed, report.left) == (60, 30, 0)
    assert good.asked() == {"/0": 1, "/gone": 1, "/x": 1}
    assert len(loaded) == 2
    assert {store.saved[i].reason for i in store.failed()} == {"HTTP 404"}
    assert store.failed() == set(range(1, 90, 3))


def test_what_is_kept_for_assets_that_may_share_it_is_bounded(ride, good, monkeypatch):
    for name in ("PAGE_ROWS", "MOST_WAITING", "RESULTS_KEPT"):
        monkeypatch.setattr(script, name, 5)
    report, error = ride(MemoryStore([*good.urls(60), *good.urls(1)]), workers=1)
    assert error is None
    assert (report.embedded, good.asked()["/0"]) == (61, 2)


def test_data_urls_are_not_kept_to_be_shared(ride, monkeypatch):
    kept = []
    monkeypatch.setattr(script.Run, "finish", lambda self, job, result: kept.append(self.jobs))
    ride(MemoryStore(["data:image/png;base64," + "A" * 5000]))
    assert kept == [{}]


# Strain


@pytest.mark.parametrize(
    "strain",
    [
        *(status(code) for code in (408, 420, 425, 429, 430, 500, 502, 503, 504, 520)),
        raw(length(9999), b"x", end=hang_up),
        raw(length(9999), b"x", end=cut),
        raw(end=cut),
    ],
)
def test_an_image_that_met_strain_is_tried_again_and_comes(ride, answering, strain):
    host = answering(in_turn(strain, answering.ok))
    report, error = ride(MemoryStore(host.urls(3)))
    assert error is None
    assert (report.embedded, report.failed, len(host.requests)) == (3, 0, 4)


def test_an_image_that_always_meets_strain_fails_after_four_tries(ride, answering):
    host = answering(answering.ok)
    host.files["/1"] = status(502)
    store = MemoryStore(host.urls(6))
    report, error = ride(store)
    assert error is None
    assert (report.embedded, report.failed, report.left, report.exit_code) == (5, 1, 0, 1)
    assert store.saved[1][1:] == ("fetch", "HTTP 502")
    assert host.asked()["/1"] == 4


@pytest.mark.parametrize("code", [400, 401, 403, 404, 406, 410, 418])
def test_an_answer_that_is_no_image_says_nothing_of_its_host(ride, answering, code):
    host = answering(answering.ok)
    host.files |= {f"/{n}": status(code) for n in range(120)}
    report, error = ride(MemoryStore(host.urls(123)))
    assert error is None
    assert (report.embedded, report.failed, report.left) == (3, 120, 0)
    assert max(host.asked().values()) == 1


def test_a_host_that_asks_for_a_rest_gets_it_and_other_hosts_go_on(ride, answering, good):
    began = time.monotonic()
    asked = []

    def busy(handler):
        asked.append(time.monotonic())
        if asked[-1] < asked[0] + 3:
            status(429, ("Retry-After", "3"))(handler)
        else:
            answering.ok(handler)

    host = answering(busy)
    others = []
    good.otherwise = lambda handler: (others.append(time.monotonic()), answering.ok(handler))
    report, error = ride(MemoryStore([*host.urls(9), *good.urls(20)]))
    assert error is None
    assert (report.embedded, report.failed) == (29, 0)
    in_rest = [moment for moment in asked if asked[0] + 1 < moment < asked[0] + 2.9]
    assert in_rest == []
    assert len(host.requests) <= 9 + script.FIRST_WINDOW
    assert time.monotonic() - began > 3


def test_an_image_that_is_told_to_wait_while_others_come_fails_in_the_end(ride, answering, quick):
    host = answering(answering.ok)
    host.files["/0"] = status(503, ("Retry-After", "1"))
    store = MemoryStore(host.urls(40))
    report, error = ride(store)
    assert error is None
    assert (report.embedded, report.failed, report.left) == (39, 1, 0)
    assert store.saved[0].reason == "HTTP 503"


def test_a_try_that_ended_in_a_retry_after_does_not_count(ride, answering):
    busy = [status(429, ("Retry-After", "1"))] * 6
    host = answering(in_turn(*busy, answering.ok))
    report, error = ride(MemoryStore(host.urls(1)))
    assert error is None
    assert (report.embedded, len(host.requests)) == (1, 7)


def test_the_log_says_which_host_rests_why_and_until_when(ride, answering, caplog):
    host = answering(in_turn(status(429, ("Retry-After", "2")), answering.ok))
    with caplog.at_level("INFO"):
        ride(MemoryStore(host.urls(1)))
    (line,) = [line for line in caplog.messages if "rests" in line]
    assert re.fullmatch(rf"127.0.0.1:{host.port} rests until \d\d:\d\d:\d\d: HTTP 429", line)


def test_a_host_that_asks_for_too_long_a_rest_is_left_and_nothing_is_noted(ride, answering, good):
    host = answering(status(429, ("Retry-After", "3600")))
    store = MemoryStore([*host.urls(50), *good.urls(3)])
    report, error = ride(store)
    assert error is None
    assert (report.embedded, report.failed, report.left, report.exit_code) == (3, 0, 50, 1)
    assert len(host.requests) <= 4
    assert re.search(r"50  of .*: HTTP 429, asked to wait until \S", "\n".join(report.lines()))


def test_what_was_tried_of_a_host_that_is_given_up_has_failed_the_rest_is_left(
    ride, answering, good, quick, monkeypatch
):
    for name in ("PAGE_ROWS", "MOST_WAITING"):  # most are found later
        monkeypatch.setattr(script, name, 10)
    host = answering(status(503))
    urls = host.urls(50) * 2
    store = MemoryStore([*good.urls(20), *urls])
    report, error = ride(store)
    assert error is None
    tried = [20 + n for n, url in enumerate(urls) if url.removeprefix(host.url) in host.asked()]
    assert len(tried) < 2 * 20
    assert store.failed() == set(tried)
    left = 100 - len(tried)
    assert (report.embedded, report.failed, report.left) == (20, len(tried), left)
    assert [*report.left_of.values()] == [left]
    assert report.exit_code == 1


def test_a_run_to_which_no_host_sent_an_image_ends_with_the_network_as_its_reason(
    ride, answering, quick
):
    hosts = [answering(status(503)), answering(raw(end=cut))]
    report, error = ride(MemoryStore([url for host in hosts for url in host.urls(30)]))
    assert isinstance(error, RunError)
    assert "no image came from any host" in str(error)
    assert "check this machine's network" in str(error)
    assert 0 < report.failed < 60


@pytest.mark.parametrize("first", ["an image", "a 404"])
def test_a_host_that_once_did_its_work_shows_that_the_network_is_there(
    ride, answering, quick, first
):
    begins = {"an image": answering.ok, "a 404": status(404)}[first]
    host = answering(in_turn(begins, status(503)))
    images = host.urls(30)
    if first == "a 404":  # which a network may answer, too
        images += answering(answering.ok).urls(1)
    report, error = ride(MemoryStore(images))
    assert error is None
    assert report.exit_code == 1


def test_a_host_that_recovers_is_used_again(ride, photos):
    with ImageHost(otherwise=photos["flower.jpg"]) as host:

        def go_away():
            wait_until(lambda: len(host.requests) >= 10)
            host.stop()
            time.sleep(2)
            host.start()

        away = threading.Thread(target=go_away)
        away.start()
        report, error = ride(MemoryStore(host.urls(200)))
        away.join()
    assert error is None
    assert (report.embedded, report.failed, report.left) == (200, 0, 0)


def test_what_no_host_was_asked_for_is_no_sign_of_the_network(ride, answering, quick):
    """Though such URLs have a host's name in them."""
    host = answering(status(503))
    addresses = [f"{url},{url}" for url in host.urls(5)] + ["http://no host/a.jpg"]
    report, error = ride(MemoryStore(addresses + host.urls(25) + addresses))
    assert "check this machine's network" in str(error)
    assert report.reasons[f"fetch: {script.MANY_URLS}"] >= 5


def test_what_goes_wrong_after_the_download_is_no_fault_of_the_host(ride, good, monkeypatch):
    def busy(self, data):
        raise script.ImageError(script.DECODER_LOST)

    monkeypatch.setattr(script.Loader, "load", busy)
    report, error = ride(MemoryStore(good.urls(30)))
    assert error is None
    assert (report.failed, report.left, len(good.requests)) == (30, 0, 30)


# Room


def test_silent_hosts_keep_no_other_host_waiting(ride, answering, good, monkeypatch):
    monkeypatch.setattr(script, "SILENT_SECONDS", 0.3)
    opened = threading.Event()
    silent = [answering(silent_until(opened, answering.ok)) for _ in range(8)]
    urls = [url for host in silent for url in host.urls(4)] + good.urls(40)
    store = MemoryStore(urls)
    done = []

    def watch():
        wait_until(lambda: len(store.embedded()) == 40, PERSON)
        done.append(True)
        opened.set()

    threading.Thread(target=watch).start()
    report, error = ride(store, fetch_seconds=60.0)
    assert error is None
    assert done == [True]
    assert report.embedded == len(urls)


def silent_until(opened, answer):
    return lambda handler: (opened.wait(PERSON), answer(handler))


def test_downloads_of_silent_hosts_are_bounded_too(ride, answering, monkeypatch):
    monkeypatch.setattr(script, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(script, "MOST_LOADS", 6)
    opened = threading.Event()
    hosts = [answering(silent_until(opened, answering.ok)) for _ in range(3)]
    counted = []

    def asked():
        return sum(len(host.requests) for host in hosts)

    def watch():
        wait_until(lambda: asked() >= 6)
        time.sleep(1)  # for more than there should be
        counted.append(asked())
        opened.set()

    threading.Thread(target=watch).start()
    report, _ = ride(
        MemoryStore([url for host in hosts for url in host.urls(4)]), fetch_seconds=60.0
    )
    assert (report.embedded, counted) == (12, [6])


@pytest.mark.parametrize("what", ["host", "body"])
def test_a_line_is_judged_by_bodies_alone(ride, answering, good, monkeypatch, what):
    runs, whole = [], script.Run.start_find
    monkeypatch.setattr(script.Run, "start_find", lambda run: (runs.append(run), whole(run)))
    monkeypatch.setattr(script, "SLOW_SECONDS", 2.0)
    monkeypatch.setattr(script, "TRIES", 1)
    if what == "host":
        host = answering(answering.ok, latency=3.0)
    else:
        host = answering(raw(length(9999), b"x", pause=0.2))
    urls = [*good.urls(1), *host.urls(4)]
    ride(MemoryStore(urls), fetch_seconds=9.0 if what == "host" else 1.0)
    assert (runs[0].line.window >= 16) == (what == "host")


def test_images_of_a_host_that_rests_let_those_behind_them_pass(ride, answering, good, monkeypatch):
    monkeypatch.setattr(script, "PAGE_ROWS", 10)
    host = answering(in_turn(*[status(503, ("Retry-After", "2"))] * 4, answering.ok))
    order = []
    host.otherwise, strained = (
        lambda handler: (order.append("slow"), strained(handler)),
        host.otherwise,
    )
    good.otherwise = lambda handler: (order.append("good"), answering.ok(handler))
    report, error = ride(MemoryStore([*host.urls(60), *good.urls(20)]))
    assert error is None
    assert report.embedded == 80
    assert order[:24].count("good") == 20


def test_what_waits_for_hosts_is_bounded(ride, answering, good, monkeypatch):
    monkeypatch.setattr(script, "PAGE_ROWS", 10)
    monkeypatch.setattr(script, "MOST_WAITING", 30)
    pages = []
    whole = MemoryStore.pages

    def counted(self):
        for page in whole(self):
            pages.append(page)
            yield page

    monkeypatch.setattr(MemoryStore, "pages", counted)
    host = answering(in_turn(*[status(503, ("Retry-After", "3"))] * 4, answering.ok))
    seen = []

    def watch():
        wait_until(lambda: len(host.requests) >= 4)
        time.sleep(1.5)  # for more than there should be
        seen.append(len(pages))

    threading.Thread(target=watch).start()
    report, error = ride(MemoryStore(host.urls(200)))
    assert error is None
    assert report.embedded == 200
    assert seen[0] <= 5


def test_what_waits_is_bounded_by_the_length_of_its_urls_too(ride, good, monkeypatch, photos):
    monkeypatch.setattr(script, "MOST_CHARACTERS", 1)
    monkeypatch.setattr(script, "PAGE_ROWS", 5)
    waiting, whole = [], script.Run.start_find

    def start_find(self):
        waiting.append(sum(len(host.queue) for host in self.hosts.values()))
        whole(self)

    monkeypatch.setattr(script.Run, "start_find", start_find)
    report, error = ride(MemoryStore(good.urls(40)))
    assert error is None
    assert report.embedded == 40
    assert max(waiting) <= 5


@pytest.mark.parametrize("busy", ["loading", "embedding", "decoding"])
def test_what_waits_for_the_model_or_a_decoder_is_bounded(ride, good, monkeypatch, busy):
    most = 3 + 2 * 2 + 2  # 3 workers, twice 2 cores, and 2 that were under way
    opened = threading.Event()

    class SlowEncoder(script.ClipEncoder):
        def __init__(self, settings):
            super().__init__(settings)
            if busy == "loading":
                opened.wait(PERSON)

        def embed(self, batch):
            opened.wait(PERSON)
            return super().embed(batch)

    def decode(self, data):
        if busy == "decoding":
            opened.wait(PERSON)
        return whole(self, data)

    whole = script.Loader.decode
    monkeypatch.setattr(script.Loader, "decode", decode)
    monkeypatch.setattr(script, "ClipEncoder", SlowEncoder)
    counted = []

    def watch():
        wait_until(lambda: len(good.requests) >= 2 * 2)
        time.sleep(1)  # for more than there should be
        counted.append(len(good.requests))
        opened.set()

    threading.Thread(target=watch).start()
    size = 8 if busy == "decoding" else 1  # of which more would fit
    report, error = ride(MemoryStore(good.urls(60)), workers=3, batch_size=size, fetch_seconds=60.0)
    assert error is None
    assert report.embedded == 60
    assert 4 <= counted[0] <= most


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
    report, _ = ride(MemoryStore(good.urls(100)), workers=4)
    assert report.embedded == 100
    # being stored, waiting for that, waiting for the model, under way
    assert counted[0] <= 5 + 10 + (4 + 2 * 2) + 2 * 4


@pytest.fixture
def loaded(monkeypatch):
    """The images that were loaded so far."""
    images, load = [], script.Loader.load

    def counted(self, data):
        images.append(load(self, data))
        return images[-1]

    monkeypatch.setattr(script.Loader, "load", counted)
    return images


def test_a_batch_is_full_where_there_is_enough(ride, good, monkeypatch, loaded):
    sizes, whole = [], script.ClipEncoder.embed

    def embed(self, batch):
        sizes.append(len(batch))
        wait_until(lambda: len(loaded) >= 20)
        return whole(self, batch)

    monkeypatch.setattr(script.ClipEncoder, "embed", embed)
    report, _ = ride(MemoryStore(good.urls(60)), batch_size=4)
    assert report.embedded == 60
    assert max(sizes) == 4
    assert sizes.count(4) >= 2


def test_the_last_images_are_shared_among_the_cores(ride, good, monkeypatch, loaded):
    sizes = []

    class SlowEncoder(script.ClipEncoder):
        def __init__(self, settings):
            super().__init__(settings)
            wait_until(lambda: len(loaded) == 10)
            time.sleep(1)  # until the loop has all of them

        def embed(self, batch):
            sizes.append(len(batch))
            return super().embed(batch)

    monkeypatch.setattr(script, "ClipEncoder", SlowEncoder)
    report, _ = ride(MemoryStore(good.urls(10)), batch_size=8)
    assert (report.embedded, sizes) == (10, [5, 5])


def test_a_limit_bounds_what_is_asked_for(ride, good):
    report, _ = ride(MemoryStore(good.urls(60)), limit=5)
    assert (report.embedded, report.found, len(good.requests)) == (5, 5, 5)


# What ends a run, and what does not


def test_a_defect_in_the_loop_ends_the_run_and_what_is_embedded_is_stored(ride, good, monkeypatch):
    whole = script.Pace.arrived

    def arrived(self, now, seconds):
        if len(good.requests) > 20:
            raise OverflowError("a defect")
        whole(self, now, seconds)

    monkeypatch.setattr(script.Pace, "arrived", arrived)
    store = MemoryStore(good.urls(60))
    report, error = ride(store)
    assert isinstance(error, OverflowError)
    assert report.embedded == len(store.embedded()) > 0


@pytest.mark.parametrize("asked", ["999999999999", "9" * 400, "-5", "nan", "Fri, 31 Dec 9999"])
def test_an_odd_retry_after_harms_no_other_host(ride, answering, good, asked):
    host = answering(in_turn(status(503, ("Retry-After", asked)), answering.ok))
    report, error = ride(MemoryStore([*host.urls(2), *good.urls(20)]))
    assert error is None
    assert report.embedded >= 20


def test_files_on_a_disk_that_hangs_are_left_and_no_network_is_blamed(ride, tmp_path, quick):
    paths = [str(tmp_path / f"{number}.jpg") for number in range(30)]
    store = MemoryStore(paths)
    store.locate = lambda asset: Source(tmp_path / asset.image, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.Loader, "fetch", never)
        report, error = ride(store, fetch_seconds=0.2)
    assert error is None
    assert report.exit_code == 1
    assert "of this machine: not complete in time" in "\n".join(report.lines())


def never(self, source, deadline):
    time.sleep(PERSON)


def test_numbers_that_are_not_finite_are_the_failure_of_their_image(ride, good, monkeypatch):
    whole = script.ClipEncoder.embed

    def embed(self, batch):
        vectors = whole(self, batch)
        vectors[0] += float("nan") if len(made) == 2 else 0
        made.append(vectors)
        return vectors

    made = []
    monkeypatch.setattr(script.ClipEncoder, "embed", embed)
    store = MemoryStore(good.urls(6))
    report, error = ride(store)
    assert error is None
    (failed,) = store.failed()
    assert store.saved[failed][1:] == ("embed", script.NOT_FINITE)
    assert report.embedded == 5


def test_an_unexpected_error_costs_one_image_and_nothing_for_good(ride, good, monkeypatch):
    whole = script.Loader.load

    def odd(self, data):
        return 1 / 0 if data == b"odd" else whole(self, data)

    good.files["/3"] = b"odd"

    monkeypatch.setattr(script.Loader, "load", odd)
    store = MemoryStore(good.urls(6))
    report, error = ride(store)
    assert error is None
    assert (report.embedded, report.failed) == (5, 1)
    failed = store.saved[3]
    assert (failed.stage, failed.reason) == ("decode", f"{script.DEFECT} (ZeroDivisionError)")


def test_a_download_that_hangs_below_every_deadline_is_given_up(ride, good, monkeypatch):
    whole, opened = script.Loader.fetch, threading.Event()

    def hang(self, source, deadline):
        if source.where == store.assets[0].image:
            opened.wait(PERSON)
        return whole(self, source, deadline)

    monkeypatch.setattr(script.Loader, "fetch", hang)
    store = MemoryStore(good.urls(4))
    began = time.monotonic()
    report, error = ride(store, fetch_seconds=1.0)
    assert time.monotonic() - began < PERSON
    opened.set()
    assert error is None
    assert (report.embedded, report.failed) == (3, 1)
    assert store.saved[0].reason == "not complete in time (1 s)"


def test_a_machines_trouble_ends_the_run_and_is_no_images_failure(ride, good, monkeypatch):
    def fail(self, data):
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

    def load(self, data):
        if data != b"last":
            return whole_load(self, data)
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
    good.files["/4"] = b"last"
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
    monkeypatch.setattr(MemoryStore, "patience", 1.0)
    report, error = ride(MemoryStore(good.urls(9)))
    opened.set()
    assert isinstance(error, RunError)
    assert "no answer from the database for" in str(error)
    assert report.attempted == 0


# What is said meanwhile


def test_a_log_has_a_line_every_10_seconds(caplog, monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    clock = SimpleNamespace(monotonic=lambda: now.seconds, time=time.time)
    monkeypatch.setattr(script, "time", clock)
    progress = script.Progress(3000)
    with caplog.at_level("INFO"), progress:
        for number in range(1000):
            now.seconds += 0.125  # ten seconds are 80 images
            progress.step(failed=number < 7)
    counts = [int(n.replace(",", "")) for n in re.findall(r"(\S+)/3,000 done, 7 ", caplog.text)]
    assert counts == [10, *range(90, 1001, 80)]
    assert caplog.messages[1] == "90/3,000 done, 7 failed, 8.0 images/s, 0:06:04 left"
