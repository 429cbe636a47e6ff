"""What a run starts, waits for, leaves and counts: runs in this process, over a store in memory,
real hosts, and a decoder and a model that take no time.

Promises: attempted == embedded + failed; one download for one picture; a host that strains is
tried again, rests, or is given up, and no other host waits for it; what is in work is bounded;
what ends a run, and with which exit code.
"""

import contextlib
import itertools
import math
import re
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from answers import cut, in_turn, length, raw, status
from conftest import vector, wait_until
from stack import ImageHost

import generate_embeddings as script
from generate_embeddings import Asset, Embedded, Failed, ImageError, RunError, Source, Status

PERSON = 20  # seconds that no event here takes, also on a busy machine


class MemoryStore:
    """A third store, written by what the protocol says and nothing else."""

    label, patience = "memory", 60.0

    def __init__(self, images, left=()):
        self.assets = [Asset(number, image) for number, image in enumerate(images)]
        self.left = set(left)  # ids whose results it does not take
        self.batches = []
        self.most_in_work = 0  # assets that were handed out and not saved

    def status(self):
        return Status(assets=len(self.assets), done=0, failed=0)

    def pages(self):
        for start in range(0, len(self.assets), script.PAGE_ROWS):
            yield self.assets[start : start + script.PAGE_ROWS]
            in_work = start + script.PAGE_ROWS - sum(map(len, self.batches))
            self.most_in_work = max(self.most_in_work, in_work)

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


class Encoder:
    """A model whose vectors are all the same."""

    def __init__(self, settings):
        pass

    def embed(self, batch):
        return np.stack([vector(1)] * len(batch))


@pytest.fixture
def ride(monkeypatch):
    """Makes a run over a store and returns its report; ride.fails() also the error that ends it."""
    monkeypatch.setattr(script, "cores", lambda: 2)
    monkeypatch.setattr(script, "clock", lambda seconds: f"in {seconds:.0f} s")
    monkeypatch.setattr(script, "ClipEncoder", Encoder)
    monkeypatch.setattr(script.Loader, "load", lambda *_: np.zeros((3, 224, 224), np.float32))
    monkeypatch.setattr(script, "PATIENT_ROUNDS", 2)
    monkeypatch.setattr(script, "PATIENT_SECONDS", 0.5)
    monkeypatch.setattr(script, "POLL_SECONDS", 0.02)

    def fails(store, **settings):
        given = {"private_hosts": True, "workers": 16, "fetch_seconds": 5.0}
        made = script.Settings(**given | settings)
        report = script.Report(store.status(), made)
        error = None
        try:
            script.Run(store, made, report, script.Stop()).loop()
        except Exception as end:
            error = end
        assert report.attempted == report.embedded + report.failed
        assert len(store.saved) == sum(map(len, store.batches)), "twice"
        return report, error

    def ride(store, **settings):
        report, error = fails(store, **settings)
        if error:
            raise error
        return report

    ride.fails = fails
    return ride


def idle(**settings):
    """A run over 12 assets that has not begun; in the place of its tasks are notes of them."""
    store, made = MemoryStore([""] * 12), script.Settings(**settings)
    run = script.Run(store, made, script.Report(store.status(), made), script.Stop())
    run.started = []

    def start(task, *work):
        run.tasks[len(run.tasks)] = task
        run.started.append(work)

    run.start = start
    return run


def counts(report):
    return report.embedded, report.failed, report.left


@pytest.fixture
def answering(photos):
    """Makes hosts that answer as they are told; `ok` is an image."""
    with contextlib.ExitStack() as started:

        def answering(otherwise=None, **options):
            return started.enter_context(ImageHost(otherwise=otherwise, **options))

        answering.ok = status(200, body=photos["flower.jpg"])
        yield answering


@pytest.fixture
def good(answering):
    """A host that has an image at every path."""
    return answering(answering.ok)


@pytest.fixture
def opened():
    """What work waits for, where a test wants it to take a while."""
    event = threading.Event()
    yield event
    event.set()


def meanwhile(condition, seconds, *actions):
    """In a thread of its own: waits for the condition and then some seconds, and acts."""

    def watch():
        wait_until(condition, PERSON)
        time.sleep(seconds)
        for act in actions:
            act()

    threading.Thread(target=watch).start()


def changed(monkeypatch, where, name, before=lambda *_: None):
    """Makes a method of the script do something more before its own work."""
    whole = getattr(where, name)

    def call(self, *arguments):
        before(self, *arguments)
        return whole(self, *arguments)

    monkeypatch.setattr(where, name, call)


# What is counted


def test_a_store_that_is_written_from_the_protocol_alone_will_do(ride, good):
    images = [*good.urls(30), "https://[::1", "data:,no", good.url_of("/last")]
    store = MemoryStore(images, left={1, 3, 31})
    report = ride(store)
    assert (*counts(report), report.exit_code) == (29, 1, 3, 1)
    assert store.embedded() == {*range(30), 32}
    assert "       3  changed or gone meanwhile" in report.lines()


def test_a_limit_holds_across_pages(ride, good, monkeypatch):
    monkeypatch.setattr(script, "PAGE_ROWS", 10)
    store = MemoryStore(good.urls(40))
    assert ride(store, limit=15).embedded == len(good.requests) == 15


def test_a_download_is_silent_from_its_own_start_on():
    before = time.monotonic()
    assert script.Task("fetch", print, print).since >= before


@pytest.mark.parametrize(
    ("image", "host"),
    [
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
    for name in ("PAGE_ROWS", "MOST_IN_WORK"):  # most come when there is a result
        monkeypatch.setattr(script, name, 20)
    loaded = []
    changed(monkeypatch, script.Loader, "load", lambda _, data: loaded.append(data))
    good.files["/gone"] = status(404)
    store = MemoryStore([*good.urls(1), good.url_of("/gone"), good.url_of("/x")] * 30)
    report = ride(store)
    assert (*counts(report), len(loaded)) == (60, 30, 0, 2)
    assert good.asked() == {"/0": 1, "/gone": 1, "/x": 1}
    assert {store.saved[i].reason for i in store.failed()} == {"HTTP 404"}
    assert store.failed() == set(range(1, 90, 3))


def test_what_is_kept_for_assets_that_may_share_it_is_bounded(ride, good, monkeypatch):
    for name in ("PAGE_ROWS", "MOST_IN_WORK", "JOBS_KEPT"):
        monkeypatch.setattr(script, name, 5)
    kept = []
    changed(monkeypatch, script.Run, "finish", lambda run, *_: kept.append(len(run.jobs)))
    data_urls = ["data:image/png;base64," + "A" * 5000] * 9
    report = ride(MemoryStore([*data_urls, *good.urls(60), *good.urls(1)]), workers=1)
    assert (report.embedded, good.asked()["/0"]) == (70, 2)
    assert (kept[0], max(kept)) == (0, 5)


# Strain


def test_what_meets_strain_is_tried_again_and_fails_after_four_tries(ride, answering, monkeypatch):
    monkeypatch.setattr(script, "PATIENT_SECONDS", 60.0)
    host = answering(answering.ok)
    host.files |= {"/1": status(502), "/2": in_turn(status(502), answering.ok)}
    host.files["/3"] = in_turn(raw(length(9999), b"x", end=cut), answering.ok)
    store = MemoryStore(host.urls(6))
    report = ride(store)
    assert (*counts(report), report.exit_code) == (5, 1, 0, 1)
    assert store.saved[1][1:] == ("fetch", "HTTP 502")
    assert [host.asked()[f"/{n}"] for n in range(6)] == [1, 4, 2, 2, 1, 1]


def test_an_answer_that_is_no_image_says_nothing_of_its_host(ride, answering):
    host = answering(answering.ok)
    host.files |= {f"/{n}": status(404) for n in range(120)}
    report = ride(MemoryStore(host.urls(123)))
    assert counts(report) == (3, 120, 0)
    assert max(host.asked().values()) == 1


def test_a_host_that_rests_lets_others_pass(ride, answering, good, caplog, monkeypatch):
    monkeypatch.setattr(script, "PAGE_ROWS", 10)
    monkeypatch.setattr(script, "PATIENT_SECONDS", 60.0)
    times = []

    def busy(handler):
        times.append(time.monotonic())
        if len(good.requests) < 20:
            status(429, ("Retry-After", "1"))(handler)
        else:
            answering.ok(handler)

    host = answering(busy)
    with caplog.at_level("INFO"):
        report = ride(MemoryStore([*host.urls(60), *good.urls(20)]))
    assert counts(report) == (80, 0, 0)
    assert times[script.FIRST_WINDOW] >= times[0] + 1
    assert f"127.0.0.1:{host.port} rests until in 1 s: HTTP 429" in caplog.messages


def test_a_try_that_ended_in_a_retry_after_does_not_count(ride, answering, monkeypatch):
    monkeypatch.setattr(script, "PATIENT_SECONDS", 60.0)
    busy = [status(429, ("Retry-After", "1"))] * (script.TRIES + 1)
    host = answering(in_turn(*busy, answering.ok))
    report = ride(MemoryStore(host.urls(1)))
    assert (report.embedded, len(host.requests)) == (1, script.TRIES + 2)


def test_an_image_that_is_told_to_wait_while_others_come_has_failed_in_the_end(ride, answering):
    host = answering(answering.ok)
    host.files["/0"] = status(503, ("Retry-After", "1"))
    report = ride(MemoryStore(host.urls(40)))
    assert counts(report) == (39, 1, 0)


def test_a_host_that_asks_for_too_long_a_rest_is_left(ride, answering, good, caplog):
    host = answering(status(429, ("Retry-After", "3600")))
    store = MemoryStore([*host.urls(50), *good.urls(3)])
    report = ride(store)
    assert (*counts(report), report.exit_code) == (3, 0, 50, 1)
    assert len(host.requests) <= 4
    name, reason = host.url.removeprefix("http://"), "HTTP 429, asked to wait until in 3600 s"
    assert report.left_of == {f"{name}: {reason}": 50}
    assert caplog.messages == [f"{name} is given up for this run: {reason}"]


def test_what_was_tried_of_a_host_that_is_given_up_has_failed_the_rest_is_left(
    ride, answering, good, monkeypatch
):
    for name, most in (("PAGE_ROWS", 10), ("MOST_IN_WORK", 30)):  # most are found later
        monkeypatch.setattr(script, name, most)
    host = answering(status(503))
    urls = [url for url in host.urls(50) for _ in range(2)]
    store = MemoryStore([good.url_of("/first"), *urls, *good.urls(20)])
    report = ride(store)
    tried = {1 + n for n, url in enumerate(urls) if url.removeprefix(host.url) in host.asked()}
    assert len(tried) < 2 * 20
    assert store.failed() == tried
    left = 100 - len(tried)
    assert (*counts(report), report.exit_code) == (21, len(tried), left, 1)
    assert report.left_of == {f"127.0.0.1:{host.port}: HTTP 503": left}


def test_a_run_to_which_no_host_sent_an_image_ends_with_the_network_as_its_reason(ride, answering):
    """What no host was asked for shows nothing, though such URLs have a host's name in them."""
    hosts = [answering(status(503)), answering(raw(end=cut))]
    never_asked = [f"{url},{url}" for url in hosts[0].urls(5)] + ["http://no host/a.jpg"]
    images = never_asked + [url for host in hosts for url in host.urls(30)] + never_asked
    report, error = ride.fails(MemoryStore(images), limit=50)
    assert isinstance(error, RunError)
    last = rf"no image came from any host \(the last was {hosts[1].url[7:]}: connection lost\): "
    assert re.match(f"{last}check this machine's network", str(error))
    assert len(never_asked) < report.failed < 50


def test_a_host_that_once_did_its_work_shows_that_the_network_is_there(ride, answering):
    images = answering(in_turn(answering.ok, status(503))).urls(30)
    images += answering(in_turn(status(404), status(503))).urls(30)  # any network may say 404
    report = ride(MemoryStore(images))
    assert report.exit_code == 1


# Room


def images_of(name, count):
    return [script.Job(Source(f"http://{name}/{n}", {}), [Asset(n, "")]) for n in range(count)]


def test_hosts_that_may_start_no_more_let_the_others_start(monkeypatch):
    monkeypatch.setattr(script, "cores", lambda: 2)
    run = idle(workers=8, batch_size=3)
    for job in itertools.chain(*(images_of(name, 9) for name in ("rests", "busy", "a", "b"))):
        run.put_into_queue(job)
    run.hosts["rests"].pace.rest_until = math.inf
    run.hosts["busy"].loads = 2
    for most, started in ((3, ["busy", "a", "b"]), (16, ["busy", *"ababab"])):
        run.line.window = most + 0.9
        run.started.clear()
        run.start_fetches()
        assert [source.host for _, source, _ in run.started] == started
    run.tasks = {-1: script.Task("embed", print, print)}
    run.ready = [None] * 16  # and three are being embedded
    assert run.room_for_fetches() == 16
    run.line.window = 99
    assert run.room_for_fetches() == 64
    run.ready.append(None)
    assert run.room_for_fetches() == 0  # 8 workers, and two batches of three for each of two cores


def test_a_core_gets_two_batches_and_a_gpu_as_well(monkeypatch):
    monkeypatch.setattr(script, "cores", lambda: 2)
    for device, batches in (("cpu", [3, 3, 3, 3]), ("cuda", [3, 3])):
        run = idle(batch_size=3, device=device)
        run.put_into_queue(*images_of("a", 1))  # more will come
        run.encoder, run.ready = Encoder(None), images_of("a", 20)
        run.start_embeds()
        assert [len(pixels) for _, pixels in run.started] == batches
        run.ready = run.ready[:2]
        del run.tasks[0]
        run.start_embeds()
        assert len(run.started) == len(batches)
        run.tasks.clear()
        run.start_embeds()  # rather two than none
        assert len(run.started[-1][1]) == 2


def test_a_batch_is_stored_when_it_is_full_or_has_waited_or_is_the_last():
    def stored(count, waits=math.inf, under_way="fetch"):
        run = idle()
        run.tasks = {-1: script.Task(under_way, print, print)}
        run.results = [Failed(Asset(n, ""), "fetch", "HTTP 404") for n in range(count)]
        now = time.monotonic()
        run.store_by = now + waits
        run.start_store()
        run.start_store()  # one at a time
        assert not run.started or now <= run.store_by - 2 <= time.monotonic()
        return [len(batch) for *_, batch in run.started]

    assert stored(49) == []
    assert stored(50) == stored(120) == [50]
    assert stored(1, waits=-1) == [1]
    assert stored(3, under_way="store") == []
    assert stored(3, under_way="none") == [3]


def silent_until(opened, answer):
    return lambda handler: (opened.wait(PERSON), answer(handler))


def test_silent_hosts_keep_no_other_host_waiting(ride, answering, good, monkeypatch, opened):
    monkeypatch.setattr(script, "SILENT_SECONDS", 0.2)
    silent = [answering(silent_until(opened, answering.ok)) for _ in range(8)]
    urls = [url for host in silent for url in host.urls(4)] + good.urls(40)
    store = MemoryStore(urls)
    done = []
    meanwhile(lambda: len(store.embedded()) == 40, 0, partial(done.append, True), opened.set)
    report = ride(store, fetch_seconds=60.0)
    assert (report.embedded, done) == (len(urls), [True])


@pytest.mark.parametrize("slow", ["host", "decoder"])
def test_what_waits_for_hosts_or_decoders_is_bounded(ride, answering, monkeypatch, opened, slow):
    monkeypatch.setattr(script, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(script, "MOST_LOADS", 6)
    answer = answering.ok
    if slow == "host":
        answer = silent_until(opened, answering.ok)
    else:
        changed(monkeypatch, script.Loader, "load", lambda *_: opened.wait(PERSON))
    hosts = [answering(answer) for _ in range(3)]
    counted = []

    def asked():
        return sum(len(host.requests) for host in hosts)

    # a while for more than there should be
    meanwhile(lambda: asked() >= 6, 0.5, lambda: counted.append(asked()), opened.set)
    urls = [url for host in hosts for url in host.urls(4)]
    report = ride(MemoryStore(urls), fetch_seconds=60.0)
    assert (report.embedded, counted) == (12, [6])


@pytest.mark.parametrize("what", ["host", "body"])
def test_a_line_is_judged_by_bodies_alone(ride, answering, good, monkeypatch, what):
    def slow(handler):
        time.sleep(2)
        answering.ok(handler)

    runs = []
    changed(monkeypatch, script.Run, "start_find", runs.append)
    for name in ("QUICK_SECONDS", "SLOW_SECONDS", "TRIES"):
        monkeypatch.setattr(script, name, 1)
    if what == "host":
        host = answering(in_turn(answering.ok, slow))
    else:
        host = answering(raw(length(9999), b"x", pause=0.2))
    urls = [*good.urls(1), *host.urls(4)]
    ride(MemoryStore(urls), fetch_seconds=9.0 if what == "host" else 1.0)
    assert (runs[0].line.window >= 16) == (what == "host")
    assert runs[0].hosts[Source(host.url, {}).host].pace.window < 4


@pytest.mark.parametrize("what", ["the host rests", "the store is slow", "the URLs are long"])
def test_what_is_in_work_is_bounded(ride, answering, monkeypatch, what):
    monkeypatch.setattr(script, "PAGE_ROWS", 10)
    monkeypatch.setattr(script, "MOST_IN_WORK", 30)
    answers = [answering.ok]
    if what == "the host rests":
        answers = [status(503, ("Retry-After", "1"))] * 4 + answers
    if what == "the store is slow":
        changed(monkeypatch, MemoryStore, "save", lambda *_: time.sleep(0.2))
    if what == "the URLs are long":
        monkeypatch.setattr(script, "LONG_URL", 1)
    store = MemoryStore(answering(in_turn(*answers)).urls(200))
    report = ride(store)
    assert report.embedded == 200
    most = 10 if what == "the URLs are long" else 30 + 10
    assert store.most_in_work <= most


def test_the_last_images_are_shared_among_the_cores(ride, good, monkeypatch):
    sizes, loaded = [], []
    changed(monkeypatch, script.Run, "take_pixels", lambda *_: loaded.append(1))
    changed(monkeypatch, Encoder, "__init__", lambda *_: wait_until(lambda: len(loaded) == 10))
    changed(monkeypatch, Encoder, "embed", lambda _, batch: sizes.append(len(batch)))
    report = ride(MemoryStore(good.urls(10)), batch_size=8)
    assert (report.embedded, sizes) == (10, [5, 5])


# What ends a run, and what does not


@pytest.mark.parametrize("where", [(script.Pace, "arrived"), (script.Run, "start_find")])
def test_a_defect_in_the_loop_ends_the_run_and_what_is_embedded_is_stored(
    ride, good, monkeypatch, where
):
    def breaks(*_):
        if len(good.requests) > 20:
            raise OverflowError("a defect")

    changed(monkeypatch, *where, breaks)
    store = MemoryStore(good.urls(60))
    report, error = ride.fails(store)
    assert isinstance(error, OverflowError)
    assert report.embedded == len(store.embedded()) > 0


def test_files_on_a_disk_that_hangs_are_left_and_no_network_is_blamed(
    ride, tmp_path, monkeypatch, opened
):
    store = MemoryStore([f"{number}.jpg" for number in range(30)])
    store.locate = lambda asset: Source(tmp_path / asset.image, {})
    changed(monkeypatch, script.Loader, "fetch", lambda *_: opened.wait(PERSON))
    report = ride(store, fetch_seconds=0.1)
    assert report.exit_code == 1
    assert "of this machine: not complete in time" in "\n".join(report.lines())


def test_an_odd_image_costs_itself_alone(ride, good, monkeypatch, opened, caplog):
    """One whose vector is not finite, one that nobody foresaw, two that hang, and one with a NUL
    in its reason, which no database takes."""

    class NotFinite(Encoder):
        def embed(self, batch):
            vectors = super().embed(batch)
            vectors[:, 7] += [pixels[0, 0, 0] for pixels in batch]  # one number of 512
            return vectors

    def load(self, data):
        pixels = np.zeros((3, 224, 224), np.float32)
        pixels[0, 0, 0] = np.nan if data == b"not finite" else 0
        if data == b"hangs":
            opened.wait(PERSON)
        return 1 / 0 if data == b"odd" else pixels

    def fetch(self, source, deadline):
        if source.where.endswith("/3"):
            raise ImageError("a\0b")
        if source.where.endswith("/2"):
            before = len(strains)
            wait_until(lambda: len(strains) > before)
            raise EOFError("after the loop has given it up, and while it goes on")

    strains = []
    changed(monkeypatch, script.Run, "take_strain", lambda *_: strains.append(1))
    monkeypatch.setattr(script, "ClipEncoder", NotFinite)
    monkeypatch.setattr(script.Loader, "load", load)
    changed(monkeypatch, script.Loader, "fetch", fetch)
    monkeypatch.setattr(script, "LONGEST_DECODE", 2.0)
    good.files |= {"/0": b"not finite", "/1": b"odd", "/4": b"hangs"}
    store = MemoryStore(good.urls(6))
    with caplog.at_level("DEBUG"):
        report = ride(store, fetch_seconds=0.5)
    assert "ZeroDivisionError: division by zero" in caplog.text  # for -v
    assert {i: store.saved[i][1:] for i in store.failed()} == {
        0: ("embed", script.NOT_FINITE),
        1: ("decode", f"{script.DEFECT} (ZeroDivisionError)"),
        2: ("fetch", "not complete in time (0.5 s)"),
        3: ("fetch", "a?b"),
        4: ("decode", script.DECODER_LOST),
    }
    assert counts(report) == (1, 5, 0)


def test_a_stop_is_heard_where_it_ended_the_reader_of_stderr_too(monkeypatch):
    def write(*_):
        raise BrokenPipeError

    monkeypatch.setattr(script.os, "write", write)
    stop = script.Stop()
    stop._handle(2, None)
    assert stop.code == 130


def test_a_run_ends_with_its_first_error_and_its_progress_with_the_limit():
    run = idle(limit=10)
    assert (run.progress.bar.total, idle().progress.bar.total) == (10, 12)
    began = run.progress.bar.start_t
    run.take_model(Encoder(None))
    assert run.progress.bar.start_t > began  # its rate is that of embedding
    run.take_result(Failed(Asset(1, ""), "fetch", "HTTP 404"))
    assert run.progress.bar.postfix == "failed=1"
    for words in ("first", "second"):
        run.end(RunError(words))
    assert str(run.trouble) == "first"


def test_an_end_waits_for_what_is_being_embedded_and_stores_it(ride, good, monkeypatch):
    embeds, ended = [], threading.Event()

    def embed(_, batch):
        embeds.append(batch)
        ended.wait(PERSON)
        time.sleep(0.3)  # the loop has heard of the end by now

    def load(_, data):
        if data == b"last":
            wait_until(lambda: len(embeds) == 4)
            ended.set()
            raise RunError("the machine has had enough")

    changed(monkeypatch, Encoder, "embed", embed)
    changed(monkeypatch, script.Loader, "load", load)
    monkeypatch.setattr(script, "cores", lambda: 4)
    good.files["/4"] = b"last"
    store = MemoryStore(good.urls(5))
    report, error = ride.fails(store, workers=8)
    assert str(error) == "the machine has had enough"
    assert (report.embedded, report.left) == (4, 1)
    assert store.embedded() == {0, 1, 2, 3}


@pytest.mark.parametrize("call", ["pages", "save"])
@pytest.mark.parametrize("error", [RunError("the disk is full"), KeyError("a defect"), None])
def test_a_store_that_can_not_go_on_ends_the_run(ride, good, monkeypatch, call, error, opened):
    calls = []

    def fail(*_):
        calls.append(call)
        if not error:
            opened.wait(PERSON)  # it hangs
        time.sleep(0.3)  # while more is embedded
        raise error

    def fail_later(*_):
        yield fail()

    monkeypatch.setattr(script, "WRITE_ROWS", 2)
    monkeypatch.setattr(MemoryStore, call, fail_later if call == "pages" else fail)
    monkeypatch.setattr(MemoryStore, "patience", 60.0 if error else 0.5)
    report, end = ride.fails(MemoryStore(good.urls(9)))
    if error:
        assert end is error
    else:
        assert "no answer from the database for" in str(end)
    assert (report.attempted, report.left) == (0, 9)
    assert calls == [call]  # and it is not asked again


# What is said meanwhile


def test_a_log_has_a_line_every_10_seconds(caplog, monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("tqdm.std.time", lambda: now.seconds)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)  # stderr, the log, is none
    progress = script.Progress(3000)
    with caplog.at_level("INFO"):
        for number in range(1000):
            now.seconds += 0.125  # ten seconds are 80 images
            progress.step(failed=number < 7)
    counts = [int(n.replace(",", "")) for n in re.findall(r"(\S+)/3,000 done, 7 ", caplog.text)]
    assert counts == [10, *range(80, 1001, 80)]
    assert caplog.messages[1] == "80/3,000 done, 7 failed, 8.00 images/s, 06:05 left"
