"""How a run ends, and what it leaves behind: kills, Ctrl-C, a database that goes away."""

import itertools
import json
import re
import signal
import threading
import time
import uuid
from collections import Counter
from urllib.parse import unquote

import pytest
from conftest import REPO, wait_until
from stack import ImageHost
from stack import reset as cut

JSON = [("Content-Type", "application/json")]
HTML = [("Content-Type", "text/html")]


def is_upsert(request):
    """Whether a request stores vectors; the check before the run names one asset twice."""
    if request.method != "POST" or "/product_embeddings?" not in request.path:
        return False
    ids = [row["asset_id"] for row in json.loads(request.body)]
    return len(set(ids)) == len(ids)


def stored(stack):
    return {str(i) for (i,) in stack.sql("select asset_id from product_embeddings")}


def add(stack, host, paths):
    """Adds an asset per path, ids in the order of the paths."""
    ids = sorted(str(uuid.uuid4()) for _ in paths)
    stack.add_assets((i, host.url_of(path), "x") for i, path in zip(ids, paths, strict=True))
    return ids


@pytest.fixture
def gate(photos):
    """A host whose images up to `free` come at once, the others once `opened` is set."""

    class Gate(ImageHost):
        free = 20
        opened = threading.Event()

        def answer(self, handler):
            number = int(re.search(r"\d+", handler.path)[0])
            if number >= self.free:
                self.opened.wait(120)
            super().answer(handler)

    with Gate({f"/{n}.jpg": photos["flower.jpg"] for n in range(40)}) as host:
        yield host
        host.opened.set()


@pytest.fixture
def halfway(cli, stack, gate):
    """A run that has stored the first 20 of 40 assets and waits for the images of the rest."""
    add(stack, gate, [f"/{n}.jpg" for n in range(40)])

    def halfway(**settings):
        run = cli.start("--workers", 4, **settings)
        wait_until(lambda: len(stored(stack)) == 20 or run.poll() is not None)
        assert run.poll() is None, run.err
        return run

    return halfway


# Stopped from outside


def test_after_kill_9_the_next_run_does_the_rest_and_nothing_twice(cli, stack, gate, halfway):
    run = halfway()
    run.kill()
    run.wait()
    early = dict(stack.sql("select asset_id, updated_at from product_embeddings"))
    gate.opened.set()
    stack.gateway.fault = seen = Seen()
    again = cli()
    assert again.code == 0, again.err
    assert again.counts["embedded"] == 20
    assert len(stored(stack)) == 40
    assert not {str(i) for i in early} & seen.ids.keys()
    assert set(seen.ids.values()) == {1}
    late = dict(stack.sql("select asset_id, updated_at from product_embeddings"))
    assert {i: late[i] for i in early} == early


class Seen:
    """A fault that does no harm: counts how often each id is in an upsert."""

    def __init__(self):
        self.ids = Counter()

    def __call__(self, request):
        if is_upsert(request):
            self.ids.update(row["asset_id"] for row in json.loads(request.body))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_stop_stores_what_is_embedded_and_waits_for_no_hanging_host(stack, halfway, number, code):
    run = halfway()
    run.send_signal(number)
    end = run.finish(60)
    assert end.code == code, end.err
    assert end.counts["embedded"] == len(stored(stack)) == 20
    assert end.counts["left"] == 20
    assert end.counts["failed"] == 0


class SlowWalk:
    """A fault that does no harm: a database that needs `seconds` for the pages after the first."""

    def __init__(self, seconds):
        self.seconds, self.pages = seconds, 0

    def __call__(self, request):
        path = unquote(request.path)
        if request.method == "GET" and "product_embeddings()" in path and "order=" in path:
            self.pages += 1
            if self.pages > 1:
                time.sleep(self.seconds)


def test_what_is_found_is_stored_while_the_search_for_more_goes_on(cli, stack, gate):
    gate.opened.set()
    add(stack, gate, [f"/{n}.jpg" for n in range(5)])
    stack.gateway.fault = slow = SlowWalk(60)
    run = cli.start()
    wait_until(lambda: len(stored(stack)) == 5, seconds=40)
    assert slow.pages == 2
    run.send_signal(signal.SIGINT)
    end = run.finish(20)
    assert (end.code, end.counts["embedded"]) == (130, 5)
    assert end.counts["left"] in (0, None)


SEVERED = f"""
import os, sys
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(reader)
sys.path.insert(0, {str(REPO)!r})
import generate_embeddings as script
code = script.main()
sys.stdout.flush()
os._exit(code)
"""


def test_ctrl_c_that_ends_the_reader_of_the_log_as_well_stores_what_is_embedded(
    stack, halfway, tmp_path
):
    script = tmp_path / "severed.py"
    script.write_text(SEVERED)
    run = halfway(script=script)
    run.send_signal(signal.SIGINT)
    end = run.finish(60)
    assert end.code == 130
    assert end.counts["embedded"] == len(stored(stack)) == 20


def test_a_stop_loses_no_vector_that_waits_to_be_stored(cli, stack, gate):
    gate.free = 10
    ids = add(stack, gate, [f"/{n}.jpg" for n in range(40)])
    run = cli.start("--workers", 4)
    wait_until(lambda: "10/40 done" in run.err)  # up to two seconds before they are stored
    run.send_signal(signal.SIGINT)
    end = run.finish(60)
    assert end.code == 130
    assert end.counts["embedded"] == 10
    assert stored(stack) == set(ids[:10])


def test_a_stop_loses_no_vector_that_is_made_while_the_database_is_slow(cli, stack, gate, tuned):
    gate.free = 10
    ids = add(stack, gate, [f"/{n}.jpg" for n in range(10)])
    slow = threading.Event()

    def first_is_slow(request):
        if is_upsert(request) and not slow.is_set():
            slow.set()
            time.sleep(5)

    stack.gateway.fault = first_is_slow
    run = cli.start("WRITE_ROWS=3", "--", "--workers", 10, script=tuned)
    assert slow.wait(60)
    time.sleep(3)  # the model is done with the other seven
    run.send_signal(signal.SIGINT)
    end = run.finish(60)
    assert end.code == 130
    assert end.counts["embedded"] == 10
    assert stored(stack) == set(ids)


def test_a_second_stop_ends_the_run_at_once(stack, gate, halfway):
    run = halfway()
    hanging = threading.Event()

    def hang(request):
        hanging.set()
        return "hang"

    stack.gateway.fault = lambda request: hang(request) if is_upsert(request) else None
    gate.free = 40
    gate.opened.set()
    assert hanging.wait(60)
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.poll() is None  # it tries to store what is embedded
    run.send_signal(signal.SIGINT)
    began = time.monotonic()
    run.wait(60)
    assert time.monotonic() - began < 8
    assert run.returncode == 130
    assert "Traceback" not in run.err


def test_two_signals_at_a_time_are_one_stop(cli, stack, gate):
    gate.free = 10
    ids = add(stack, gate, [f"/{n}.jpg" for n in range(10)])
    slow = threading.Event()

    def slow_upsert(request):
        if is_upsert(request):
            slow.set()
            time.sleep(3)

    stack.gateway.fault = slow_upsert
    run = cli.start()
    assert slow.wait(60)
    run.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    run.send_signal(signal.SIGTERM)  # as timeout(1) does: to its child, then to the group
    end = run.finish(60)
    assert end.code == 143, end.err
    assert end.counts["embedded"] == 10
    assert stored(stack) == set(ids)


def test_a_stop_while_the_model_loads(cli, stack, gate, full):
    gate.free = 40
    add(stack, gate, [f"/{n}.jpg" for n in range(40)])
    run = cli.start(CLIP_MODEL=full)
    wait_until(lambda: gate.requests)  # the model loads while the first images do
    run.send_signal(signal.SIGINT)
    end = run.finish(60)
    assert end.code == 130
    assert end.counts["embedded"] == len(stored(stack))
    assert end.counts["left"] in (40 - end.counts["attempted"], None)  # None: not counted yet


@pytest.mark.parametrize(
    ("number", "codes"),
    [(signal.SIGINT, {130}), (signal.SIGTERM, {143})],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_stop_during_the_checks(cli, stack, number, codes):
    stack.gateway.fault = lambda request: "hang"
    run = cli.start()
    wait_until(lambda: stack.gateway.requests)
    run.send_signal(number)
    end = run.finish(20)
    assert end.code in codes
    assert end.seconds < 20


# The database goes away


def test_a_database_that_is_gone_for_good_ends_the_run_with_a_true_report(stack, gate, halfway):
    run = halfway(DB_RETRY_SECONDS=2)
    # rows count as stored once the script has looked at their image URLs again
    wait_until(lambda: any("=in." in r.path and r.status == 200 for r in stack.gateway.requests))
    time.sleep(0.5)
    stack.gateway.stop()
    gate.opened.set()
    end = run.finish()
    assert end.code == 2
    assert "no answer from the database" in end.error
    assert "SUPABASE_URL" not in end.error  # it was right
    assert end.counts["embedded"] == len(stored(stack)) == 20
    assert end.counts["failed"] == 0  # the images are good
    assert re.search(r"(?m)^Unstored +[1-9]", end.out)
    assert end.counts["attempted"] + end.counts["left"] == 40


def test_a_database_that_comes_back_is_waited_for(stack, gate, halfway):
    run = halfway()
    stack.gateway.stop()
    gate.opened.set()
    wait_until(lambda: "trying again" in run.err)
    time.sleep(1)
    stack.gateway.start()
    end = run.finish()
    assert end.code == 0, end.err
    assert end.counts["embedded"] == len(stored(stack)) == 40


def test_a_database_that_takes_requests_and_never_answers_ends_the_run_in_time(
    cli, stack, gate, tuned
):
    gate.opened.set()
    add(stack, gate, [f"/{n}.jpg" for n in range(40)])
    stack.gateway.fault = hang = Hang()
    end = cli("ANSWER_SECONDS=1", "--", script=tuned, DB_RETRY_SECONDS=3)
    assert end.code == 2
    assert "no answer from the database" in end.error
    assert hang.upserts <= 5  # three seconds of one each; halves of batches would come on top
    assert (end.counts["embedded"], end.counts["failed"]) == (0, 0)


class Hang:
    """A fault: no upsert is answered. Counts them."""

    upserts = 0

    def __call__(self, request):
        if is_upsert(request):
            self.upserts += 1
            return "hang"
        return None


def test_a_model_that_fails_to_load_is_not_the_images_fault(cli, stack, host, tmp_path):
    add(stack, host, ["/flower.jpg"] * 60)
    (tmp_path / "transformers.py").write_text("raise ValueError('numpy.dtype size changed')")
    end = cli(PYTHONPATH=tmp_path)
    assert end.code == 2
    assert "numpy.dtype size changed" in end.error
    assert end.counts["failed"] == 0
    assert end.counts["left"] in (60, None)  # None: not counted yet
    assert stack.sql("select count(*) from product_embedding_failures") == [(0,)]


def test_a_key_that_is_rotated_in_mid_run_stops_it_at_once(stack, gate, halfway):
    run = halfway()
    role = stack.roles.pop(stack.service_key)
    try:
        gate.opened.set()
        end = run.finish(60)  # and not after the 180 s of DB_RETRY_SECONDS
    finally:
        stack.roles[stack.service_key] = role
    assert end.code == 2
    assert "the key was refused" in end.error
    assert "trying again" not in end.err
    assert end.counts["attempted"] + end.counts["left"] == 40


FAULTS = {
    "a reset": "reset",
    "a reset after the work was done": "after",
    "a gateway's HTML page": (502, HTML, b"<html>Bad Gateway</html>"),
    "a statement timeout": (500, JSON, b'{"code":"57014","message":"canceling statement"}'),
    "too many requests": (429, HTML, b"slow down"),
    "too many connections": (503, JSON, b'{"code":"53300","message":"too many connections"}'),
    "a pool timeout": (504, JSON, b'{"code":"PGRST003","message":"timed out"}'),
}


def test_no_fault_that_passes_loses_or_doubles_a_vector(cli, stack, host, tuned):
    ids = add(stack, host, ["/flower.jpg"] * 60)
    faults = iter(FAULTS.values())
    turns = itertools.count()

    def every_other(request):
        if is_upsert(request) and next(turns) % 2 == 0:
            return next(faults, None)
        return None

    stack.gateway.fault = every_other
    run = cli("WRITE_ROWS=3", "WRITE_SECONDS=0.2", "--", script=tuned)
    assert run.code == 0, run.err
    assert next(faults, None) is None, "not every fault was met"
    assert run.counts["embedded"] == 60
    assert stored(stack) == set(ids)


def test_a_page_of_pending_assets_that_fails_is_asked_for_again(cli, stack, host):
    ids = add(stack, host, ["/flower.jpg"] * 3)
    faults = iter(["reset", (503, HTML, b"<html>Unavailable</html>"), "after"])

    def fault(request):
        paged = request.method == "GET" and "limit=250" in request.path
        return next(faults, None) if paged else None

    stack.gateway.fault = fault
    run = cli()
    assert run.code == 0, run.err
    assert next(faults, None) is None, "no page was asked for"
    assert stored(stack) == set(ids)


# One row among many


def test_a_row_that_the_database_refuses_fails_alone(cli, stack, host):
    ids = add(stack, host, ["/flower.jpg"] * 12)
    stack.sql(f"""
        alter table product_embeddings add constraint not_this check (asset_id <> '{ids[3]}');
        create function refuse() returns trigger language plpgsql as
          $$ begin raise exception 'not on a Sunday'; end $$;
        create trigger refuse before insert on product_embeddings
          for each row when (new.asset_id = '{ids[7]}') execute function refuse();
    """)
    run = cli()
    assert run.code == 1
    assert run.counts == run.counts | {"embedded": 10, "failed": 2, "left": 0}
    assert stored(stack) == set(ids) - {ids[3], ids[7]}
    assert re.search(r"store: .*not_this", run.out)
    assert re.search(r"store: .*not on a Sunday", run.out)
    assert ids[3] in run.out
    assert ids[7] in run.out


def test_an_asset_that_is_deleted_meanwhile_is_no_failure(cli, stack, host, photos):
    paths = [f"/{n}.jpg" for n in range(6)]
    host.files.update(dict.fromkeys(paths, photos["flower.jpg"]))
    ids = add(stack, host, paths)

    def delete_first(handler):
        stack.sql("delete from assets where id = %s", [ids[2]])
        handler.reply(200, [("Content-Type", "image/jpeg")], photos["flower.jpg"])

    host.files["/2.jpg"] = delete_first
    run = cli()
    assert run.code == 0, run.out
    assert run.counts == run.counts | {"embedded": 5, "failed": 0, "left": 0}
    assert re.search(r"(?m)^Deleted +1\b", run.out)
    assert stored(stack) == set(ids) - {ids[2]}


# The network goes away


def test_when_every_download_fails_the_run_stops_and_says_so(cli, stack):
    def slam(handler):
        cut(handler.connection)
        handler.close_connection = True

    paths = [f"/{n}.jpg" for n in range(120)]
    with ImageHost(dict.fromkeys(paths, slam)) as host:
        add(stack, host, paths)
        run = cli("--workers", 60)
    assert run.code == 2
    assert "network" in run.error
    assert 50 <= run.counts["failed"] < 120
    assert run.counts["left"] == 120 - run.counts["attempted"]


def test_failures_that_share_a_batch_with_good_images_are_no_outage(cli, stack, host):
    def busy(handler):  # until the good ones are there, and wait for the model to load
        wait_until(lambda: sum(path == "/flower.jpg" for path, _ in host.requests) == 20)
        time.sleep(0.2)
        handler.reply(503, [("Retry-After", "60")], b"busy")

    host.files["/busy.jpg"] = busy
    ids = add(stack, host, ["/busy.jpg"] * 60 + ["/flower.jpg"] * 20)
    run = cli("--workers", 80, "--batch-size", 80, FETCH_SECONDS=20)
    assert run.code == 1
    assert run.counts == run.counts | {"embedded": 20, "failed": 60, "left": 0}
    assert stored(stack) == set(ids[60:])
