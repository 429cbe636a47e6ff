"""How a run ends, and what it leaves behind: kills, Ctrl-C, a database or hosts that go away.

Promises: what is embedded is stored, once, and the report tells the truth; a stop ends the run at
once but for that; a database is waited for, for a bounded time. (test_soak.py kills runs.)
"""

import re
import signal
import threading
import time

import psutil
import psycopg
import pytest
from answers import hang_up, raw, status
from conftest import open_store, pending, vector, wait_until
from stack import HTML, JSON, ImageHost

import generate_embeddings as script
from generate_embeddings import Embedded


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
def forty(stack, gate):
    """The ids of 40 assets at the gate."""
    return stack.add_images([gate.url_of(f"/{n}.jpg") for n in range(40)])


@pytest.fixture
def halfway(cli, stack, gate, forty):
    """A run that has stored the first 20 of 40 assets and waits for the images of the rest."""

    def halfway(*before, **settings):
        run = cli.start(*before, "--workers", 4, **settings)
        wait_until(lambda: len(stack.embedded()) == 20 or run.poll() is not None)
        wait_until(lambda: all(request.answered for request in stack.gateway.requests))
        assert run.poll() is None, run.err
        return run

    return halfway


# Stopped from outside


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_stop_stores_what_is_embedded_and_waits_for_no_hanging_host(
    stack, halfway, patched, name
):
    """Also where Ctrl-C has ended the reader of the log."""
    nobody_reads = patched("ours, theirs = os.pipe(); os.dup2(theirs, 2); os.close(ours)")
    run = halfway(script=nobody_reads) if name == "SIGINT" else halfway()
    run.send_signal(getattr(signal, name))
    end = run.finish(60)
    assert end.code == 128 + getattr(signal, name), end.err
    assert end.counts == end.counts | {"embedded": 20, "failed": 0, "left": 20}
    assert len(stack.embedded()) == 20
    if name == "SIGHUP":
        assert end.err.splitlines()[-1].endswith("stopped: run the same command again to go on")


def test_the_first_vector_is_stored_at_once_and_while_the_search_for_more_goes_on(
    cli, stack, gate, tuned
):
    gate.free = 1
    stack.add_images([gate.url_of(f"/{n}.jpg") for n in range(5)])
    pages = []

    def slow(request):
        if request.function == "pending_assets":
            pages.append(request)
            return "hang" if len(pages) > 1 else None
        return None

    stack.gateway.fault = slow
    run = cli.start("WRITE_SECONDS=600", "--", script=tuned)
    wait_until(lambda: (len(stack.embedded()) == 1 and len(pages) == 2) or run.poll() is not None)
    run.send_signal(signal.SIGINT)
    end = run.finish(60)
    assert (end.code, end.counts["embedded"], end.counts["left"]) == (130, 1, 4)


def test_a_stop_loses_no_vector_and_two_signals_at_a_time_are_one(cli, stack, gate, forty, tuned):
    """While the database takes a batch of three, seven more are embedded."""
    gate.free = 10
    begun, answered = threading.Event(), threading.Event()

    def slow(request):
        if request.function == "store_embeddings" and not begun.is_set():
            begun.set()
            answered.wait(60)

    stack.gateway.fault = slow
    run = cli.start("WRITE_ROWS=3", "WRITE_SECONDS=600", "--", script=tuned)
    assert begun.wait(60)
    wait_until(lambda: "10/40 done" in run.err)
    for number in (signal.SIGTERM, signal.SIGINT):  # twice the same would be one to the system
        run.send_signal(number)  # as timeout(1) does: to its child, then to the group
    wait_until(lambda: "stopping" in run.err or run.poll() is not None)
    answered.set()
    end = run.finish(60)
    assert end.code in (143, 130)  # by the one that was first
    assert (end.counts["embedded"], end.counts["left"]) == (10, 30), end.err
    assert stack.embedded() == set(forty[:10])


def test_signals_that_were_ignored_from_the_start_and_those_to_decoders_stop_nothing(
    stack, gate, halfway, patched
):
    # as nohup leaves SIGHUP, and a shell its background jobs' SIGINT
    ignored = [f"signal.signal(signal.{name}, signal.SIG_IGN)" for name in ("SIGHUP", "SIGINT")]
    run = halfway(script=patched(before="\n".join(ignored)))
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGINT)
    for process in psutil.Process(run.pid).children(recursive=True):  # as systemd does
        process.send_signal(signal.SIGTERM)
    gate.opened.set()
    end = run.finish(60)
    assert (end.code, end.counts["embedded"]) == (0, 40), end.err
    assert "stopping" not in end.err


def test_a_second_stop_ends_the_run_at_once(stack, gate, halfway, tuned):
    run = halfway("ECHO_SECONDS=0.1", "--", script=tuned)
    hanging = threading.Event()

    def hang(request):
        if request.function == "store_embeddings":
            hanging.set()
            return "hang"
        return None

    stack.gateway.fault = hang
    gate.opened.set()
    assert hanging.wait(60)
    run.send_signal(signal.SIGINT)
    wait_until(lambda: "stopping" in run.err)
    time.sleep(0.5)
    assert run.poll() is None  # it tries to store what is embedded
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == 130  # the database's answer would be waited for for 58 s
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    ("name", "busy"), [("SIGTERM", "status"), ("SIGHUP", "model"), ("SIGINT", "gallery")]
)
def test_a_stop_with_nothing_to_store_ends_the_run_at_once(
    cli, stack, host, full, tmp_path, name, busy
):
    def asked(request):
        return request.function == {"status": "embedding_status"}.get(busy, "embedding_copies")

    stack.gateway.fault = lambda request: "hang" if asked(request) else None
    if busy == "model":  # loads while the first images do
        stack.add_images(host.urls(9))
        run = cli.start(CLIP_MODEL=full)
        wait_until(lambda: host.requests)
    else:
        run = cli.start("--gallery", tmp_path / "x.html")
        wait_until(lambda: any(map(asked, stack.gateway.requests)))
    run.send_signal(getattr(signal, name))
    run.finish(30)
    # by a signal that has no handler yet, Python's exit code is negative
    assert abs(run.returncode) in (128 + getattr(signal, name), getattr(signal, name))


# The database goes away


LOST = {
    # what the database does from now on: what the run says
    "it is gone": "no answer from the database for",
    "it takes requests and never answers": "no answer from the database for",
    "the key is rotated": "the key in SUPABASE_SERVICE_ROLE_KEY (from the environment) was refused",
}


@pytest.mark.parametrize("how", LOST)
def test_a_database_that_is_lost_ends_the_run_with_a_true_report(
    stack, gate, halfway, tuned, monkeypatch, how
):
    run = halfway("ANSWER_SECONDS=2", "--", script=tuned, DB_RETRY_SECONDS=3)
    if how == "it is gone":
        stack.gateway.stop()
    elif how == "the key is rotated":
        monkeypatch.delitem(stack.roles, stack.service_key)
    else:
        stack.gateway.fault = lambda request: "hang"
    gate.opened.set()
    end = run.finish(60)
    assert end.code == 2
    assert LOST[how] in end.error
    assert ("trying again" in end.err) == (how != "the key is rotated")
    assert end.counts == end.counts | {"embedded": 20, "failed": 0, "left": 20}
    assert len(stack.embedded()) == 20


def test_a_stop_while_the_database_is_gone_waits_a_little_for_it(stack, gate, halfway, tuned):
    run = halfway("CHECK_SECONDS=2", "--", script=tuned)
    stack.gateway.stop()
    gate.opened.set()
    wait_until(lambda: "trying again" in run.err)
    run.send_signal(signal.SIGINT)
    end = run.finish(60)  # and not after the 180 s of DB_RETRY_SECONDS
    assert end.code == 130
    assert end.counts == end.counts | {"embedded": 20, "left": 20}


def test_a_database_that_comes_back_is_waited_for(stack, gate, halfway, tuned):
    run = halfway("CHECK_SECONDS=1", "--", script=tuned)  # what is waited for before the run
    stack.gateway.stop()
    gate.opened.set()
    wait_until(lambda: run.err.count("trying again") > 2)  # over a second
    stack.gateway.start()
    end = run.finish()
    assert (end.code, end.counts["embedded"], len(stack.embedded())) == (0, 40, 40), end.err


def test_a_database_that_drips_its_answer_ends_the_run_in_time(cli, stack, tuned, monkeypatch):
    """test_scheduling.py has stores that hang later."""

    def drip(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
        for _ in range(9999):
            handler.wfile.write(b" ")
            time.sleep(0.2)

    monkeypatch.setattr(stack.gateway, "answer", drip)
    end = cli("ANSWER_SECONDS=1", "--", script=tuned, DB_RETRY_SECONDS=1, timeout=60)
    assert end.code == 2
    assert "no answer from the database for 12 s: check SUPABASE_URL" in end.error  # 1 + 1 + 10


FAULTS = {  # those with a code are in test_supabase.py
    "a reset": "reset",
    "a reset after the work was done": "after",
    "a gateway's HTML page": (502, HTML, b"<html>Bad Gateway</html>"),
    "no content": (204, [], b""),
    "nothing": (200, JSON, b""),
    "null": (200, JSON, b"null"),
    "an empty list": (200, JSON, b"[]"),
    "an empty object": (200, JSON, b"{}"),
    "a number": (200, JSON, b"7"),
    "no UTF-8": (200, JSON, b'{"assets": "\xff"}'),
    "half of the answer": lambda answer: answer[: len(answer) // 2],
    'no "last", and no "taken"': lambda answer: answer.replace(b'"la', b'"').replace(b'"ta', b'"'),
}


def test_no_fault_that_passes_loses_or_doubles_a_vector(stack, forty, monkeypatch, caplog):
    monkeypatch.setattr(script.random, "uniform", lambda *_: 0.01)  # it asks again at once
    monkeypatch.setattr(script, "PAGE_ROWS", 2)
    store = open_store(stack)
    faults = {name: iter(FAULTS.values()) for name in ("pending_assets", "store_embeddings")}
    turns = dict.fromkeys(faults, 0)

    def every_other(request):
        name = request.function
        if name not in faults:
            return None
        turns[name] += 1
        fault = next(faults[name], None) if turns[name] % 2 else None
        if callable(fault):  # it spoils the true answer: the work is done
            status, headers, body = stack.gateway._route(request)
            return status, headers, fault(body)
        return fault

    stack.gateway.fault = every_other
    with caplog.at_level("INFO"):
        assets = pending(store)
        for two in zip(assets[::2], assets[1::2], strict=True):
            taken = store.save([Embedded(asset, vector(1)) for asset in two])
            assert taken == {asset.id for asset in two}
    assert [next(left, "all met") for left in faults.values()] == ["all met"] * 2
    assert caplog.text.count("trying again") == 2 * len(FAULTS)
    assert len(assets) == len(forty)
    assert stack.embedded() == set(forty)


# Rows that are not taken


def test_assets_that_change_or_go_meanwhile_are_left_and_nobody_waits(cli, stack, host):
    # urllib3 would complain of the broken header
    host.files["/old.html"] = raw(
        b"HTTP/1.1 200 OK\r\nno header\r\n\r\n<html>Sold out", end=hang_up
    )
    host.latency = 0.5
    paths = ["/coffee.png", "/old.html", "/cell.png", "/coins.png", "/brick.png"]
    changed, changed_too, deleted, locked, other = stack.add_images(map(host.url_of, paths))
    with psycopg.connect(stack.db_uri) as app:
        app.execute("update assets set client_name = 'y' where id = %s", [locked])
        run = cli.start()
        wait_until(lambda: len(host.requests) == 4)
        rocket = host.url_of("/rocket.jpg")
        change = "update assets set image_url = %s where id = any(%s)"
        stack.sql(change, [rocket, [changed, changed_too]])
        stack.sql("delete from assets where id = %s", [deleted])
        end = run.finish()
    assert (end.code, end.noise) == (0, []), end.out
    assert stack.embedded() == {locked, other}
    assert end.counts == end.counts | {"embedded": 2, "failed": 0, "left": 3}
    assert "       3  changed or gone meanwhile" in end.out.splitlines()
    host.requests.clear()
    again = cli()
    assert (again.code, again.counts["embedded"], again.counts["left"]) == (0, 2, 0)
    assert host.asked() == {"/rocket.jpg": 1}


# Image hosts go away


def test_ctrl_c_while_all_hosts_rest_ends_at_once_and_makes_no_page(cli, stack, tmp_path):
    with ImageHost(otherwise=status(429, ("Retry-After", "600"))) as host:
        stack.add_images([*host.urls(9), "data:,no"])
        run = cli.start("--gallery", tmp_path / "x.html")
        wait_until(lambda: "rests until" in run.err)
        run.send_signal(signal.SIGINT)
        end = run.finish(30)
    assert end.code == 130
    assert end.counts == end.counts | {"failed": 1, "attempted": 1, "left": 9}
    assert "fetch: " not in end.err  # single failures are for -v
    assert list(tmp_path.iterdir()) == []
