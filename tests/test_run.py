"""How a run ends, and what it leaves behind: kills, Ctrl-C, a database or hosts that go away.

Promises: what is embedded is stored, once, and the report tells the truth; a stop ends the run at
once but for that; a database is waited for, for a bounded time.
"""

import itertools
import json
import re
import signal
import threading
import time

import psutil
import psycopg
import pytest
from answers import status
from conftest import REPO, open_store, pending, vector, wait_until
from stack import HTML, JSON, ImageHost

from generate_embeddings import Embedded, RunError


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


def test_a_signal_that_ends_the_decoders_costs_the_images_they_have(stack, gate, halfway):
    run = halfway()
    for process in psutil.Process(run.pid).children(recursive=True):  # as systemd does
        process.send_signal(signal.SIGTERM)
    gate.opened.set()
    end = run.finish(60)
    assert end.counts["attempted"] == 40
    assert end.counts["embedded"] > 30
    assert end.counts["failed"] == len(stack.failures())


def test_after_kill_9_the_next_run_does_the_rest_and_nothing_twice(
    cli, stack, gate, forty, halfway
):
    run = halfway()
    run.kill()
    run.wait()
    early = dict(stack.sql("select asset_id, updated_at from product_embeddings"))
    gate.opened.set()
    sent = []

    def watch(request):
        if request.function == "store_embeddings":
            sent.extend(row["asset_id"] for row in json.loads(request.body)["vectors"])

    stack.gateway.fault = watch
    again = cli()
    assert again.code == 0, again.err
    assert again.counts == again.counts | {"embedded": 20, "left": 0}
    assert "40 assets: 20 done, 20 to do" in again.err
    assert sorted(sent) == sorted(map(str, forty[20:]))
    late = dict(stack.sql("select asset_id, updated_at from product_embeddings"))
    assert len(late) == 40
    assert {i: late[i] for i in early} == early


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_stop_stores_what_is_embedded_and_waits_for_no_hanging_host(stack, halfway, name):
    run = halfway()
    run.send_signal(getattr(signal, name))
    end = run.finish(60)
    assert end.code == 128 + getattr(signal, name), end.err
    assert end.counts == end.counts | {"embedded": 20, "failed": 0, "left": 20}
    assert len(stack.embedded()) == 20
    assert end.err.splitlines()[-1].endswith("stopped: run the same command again to go on")


def test_what_is_found_is_stored_while_the_search_for_more_goes_on(cli, stack, gate):
    stack.add_images([gate.url_of(f"/{n}.jpg") for n in range(5)])
    pages = []

    def slow(request):
        if request.function == "pending_assets":
            pages.append(request)
            time.sleep(60 if len(pages) > 1 else 0)

    stack.gateway.fault = slow
    run = cli.start()
    wait_until(lambda: len(stack.embedded()) == 5, seconds=40)
    assert len(pages) == 2
    run.send_signal(signal.SIGINT)
    end = run.finish(20)
    assert (end.code, end.counts["embedded"], end.counts["left"]) == (130, 5, 0)


def test_the_first_vector_is_stored_at_once(cli, stack, gate, forty, tuned):
    gate.free = 1
    run = cli.start("WRITE_SECONDS=600", "--", script=tuned, FETCH_SECONDS=300)
    wait_until(lambda: stack.embedded() == set(forty[:1]) or run.poll() is not None)
    gate.opened.set()
    end = run.finish()
    assert (end.code, end.counts["embedded"]) == (0, 40)


SEVERED = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
if __name__ == "__main__":  # the decoders' processes import this file, too
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
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
    assert (end.code, end.counts["embedded"], len(stack.embedded())) == (130, 20, 20)


def test_a_stop_loses_no_vector_that_waits_to_be_stored(cli, stack, gate, forty):
    gate.free = 10
    run = cli.start("--workers", 4)
    wait_until(lambda: "10/40 done" in run.err)  # up to two seconds before they are stored
    run.send_signal(signal.SIGINT)
    end = run.finish(60)
    assert (end.code, end.counts["embedded"], end.counts["left"]) == (130, 10, 30)
    assert stack.embedded() == set(forty[:10])


@pytest.fixture
def slow_store(stack):
    """Set once the first vectors are on their way to a database that takes five seconds."""
    begun = threading.Event()

    def slow(request):
        if request.function == "store_embeddings" and not begun.is_set():
            begun.set()
            time.sleep(5)

    stack.gateway.fault = slow
    return begun


def test_a_stop_loses_no_vector_that_is_made_while_the_database_is_slow(
    cli, stack, gate, forty, slow_store, tuned
):
    gate.free = 10
    run = cli.start("WRITE_ROWS=3", "--", "--workers", 10, script=tuned)
    assert slow_store.wait(60)
    wait_until(lambda: "10/40 done" in run.err)
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    gate.opened.set()  # else Python, after sys.exit, waits for what hangs
    end = run.finish(60)
    assert (end.code, end.counts["embedded"]) == (130, 10)
    assert stack.embedded() == set(forty[:10])


def test_two_signals_at_a_time_are_one_stop(cli, stack, gate, forty, slow_store):
    gate.free = 10
    run = cli.start()
    assert slow_store.wait(60)
    wait_until(lambda: "10/40 done" in run.err)
    for number in (signal.SIGTERM, signal.SIGINT):  # twice the same would be one to the system
        run.send_signal(number)  # as timeout(1) does: to its child, then to the group
    end = run.finish(60)
    assert end.code in (143, 130)  # by the one that was first
    assert end.counts["embedded"] == 10, end.err
    assert stack.embedded() == set(forty[:10])


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(stack, gate, halfway, patched):
    # as nohup leaves SIGHUP, and a shell its background jobs' SIGINT
    ignored = [f"signal.signal(signal.{name}, signal.SIG_IGN)" for name in ("SIGHUP", "SIGINT")]
    run = halfway(script=patched(before="\n".join(ignored)))
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGINT)
    gate.opened.set()
    end = run.finish(60)
    assert (end.code, end.counts["embedded"]) == (0, 40), end.err
    assert "stopping" not in end.err


def test_a_second_stop_ends_the_run_at_once(stack, gate, halfway):
    run = halfway()
    hanging = threading.Event()

    def hang(request):
        hanging.set()
        return "hang"

    stack.gateway.fault = lambda request: (
        hang(request) if request.function == "store_embeddings" else None
    )
    gate.opened.set()
    assert hanging.wait(60)
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    assert run.poll() is None  # it tries to store what is embedded
    run.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert run.wait(60) == 130
    assert time.monotonic() - began < 30  # the database's answer would be waited for for 58 s
    assert "Traceback" not in run.err


def test_a_stop_while_the_model_loads(cli, stack, gate, forty, full):
    gate.free = 40
    run = cli.start(CLIP_MODEL=full)
    wait_until(lambda: gate.requests)  # the model loads while the first images do
    run.send_signal(signal.SIGINT)
    end = run.finish(60)
    assert (end.code, end.counts["failed"]) == (130, 0)
    assert end.counts["embedded"] == len(stack.embedded()) == 40 - end.counts["left"]


def test_a_stop_while_the_page_is_made_ends_at_once(cli, stack, tmp_path):
    stack.gateway.fault = lambda r: "hang" if r.function == "embedding_copies" else None
    run = cli.start("--gallery", tmp_path / "x.html")
    wait_until(lambda: any(r.function == "embedding_copies" for r in stack.gateway.requests))
    run.send_signal(signal.SIGINT)
    assert run.finish(30).code == 130


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_during_the_first_question(cli, stack, name):
    stack.gateway.fault = lambda request: "hang"
    run = cli.start()
    wait_until(lambda: stack.gateway.requests)
    run.send_signal(getattr(signal, name))
    run.finish(20)
    # by a signal that has no handler yet, Python's exit code is negative
    assert abs(run.returncode) in (128 + getattr(signal, name), getattr(signal, name))


# The database goes away


def test_a_database_that_is_gone_for_good_ends_the_run_with_a_true_report(stack, gate, halfway):
    run = halfway(DB_RETRY_SECONDS=2)
    stack.gateway.stop()
    gate.opened.set()
    end = run.finish()
    assert end.code == 2
    assert "no answer from the database" in end.error
    assert end.counts == end.counts | {"embedded": 20, "failed": 0, "left": 20}
    assert len(stack.embedded()) == 20


def test_a_stop_while_the_database_is_gone_waits_ten_seconds_for_it(stack, gate, halfway):
    run = halfway()
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
    wait_until(lambda: "trying again" in run.err)
    time.sleep(2)
    stack.gateway.start()
    end = run.finish()
    assert (end.code, end.counts["embedded"], len(stack.embedded())) == (0, 40, 40), end.err


def test_a_database_that_takes_requests_and_never_answers_ends_the_run_in_time(
    cli, stack, gate, forty, tuned
):
    gate.opened.set()
    silent = []
    stack.gateway.fault = lambda request: (
        silent.append("hang") or "hang" if request.function == "store_embeddings" else None
    )
    end = cli("ANSWER_SECONDS=1", "--", script=tuned, DB_RETRY_SECONDS=6)
    assert end.code == 2
    assert "no answer from the database" in end.error
    assert len(silent) >= 2  # six seconds of one each, as far as the machine gets to it
    assert end.counts == end.counts | {"embedded": 0, "failed": 0, "left": 40}


@pytest.mark.parametrize("function", ["embedding_status", "pending_assets", "store_embeddings"])
def test_a_database_that_drips_its_answer_ends_the_run_in_time(
    cli, stack, gate, forty, monkeypatch, function
):
    gate.opened.set()
    whole = stack.gateway.answer

    def drip(handler):
        if not handler.path.endswith(function):
            whole(handler)
            return
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
        for _ in range(9999):
            handler.wfile.write(b" ")
            time.sleep(0.2)

    monkeypatch.setattr(stack.gateway, "answer", drip)
    end = cli(DB_RETRY_SECONDS=2, timeout=60)
    assert end.code == 2
    assert "no answer from the database" in end.error
    assert end.counts.get("left", 40) == 40


def test_a_model_that_fails_to_load_is_not_the_images_fault(cli, stack, gate, forty, tmp_path):
    gate.opened.set()
    (tmp_path / "torch.py").write_text("raise ValueError('numpy.dtype size changed')")
    end = cli(PYTHONPATH=tmp_path)
    assert end.code == 2
    assert "numpy.dtype size changed" in end.error
    assert end.counts == end.counts | {"attempted": 0, "left": 40}
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
    assert "the key in SUPABASE_SERVICE_ROLE_KEY (from the environment) was refused" in end.error
    assert "trying again" not in end.err
    assert end.counts == end.counts | {"embedded": 20, "failed": 0, "left": 20}


FAULTS = {
    "a reset": "reset",
    "a reset after the work was done": "after",
    "a gateway's HTML page": (502, HTML, b"<html>Bad Gateway</html>"),
    "a gateway's JSON": (502, JSON, b'{"message":"An invalid response was received"}'),
    "a statement timeout": (500, JSON, b'{"code":"57014","message":"canceling statement"}'),
    "too many requests": (429, HTML, b"slow down"),
    "too many connections": (503, JSON, b'{"code":"53300","message":"too many connections"}'),
    "a pool timeout": (504, JSON, b'{"code":"PGRST003","message":"timed out"}'),
    "no content": (204, [], b""),
    "nothing": (200, JSON, b""),
    "null": (200, JSON, b"null"),
    "an empty list": (200, JSON, b"[]"),
    "an empty object": (200, JSON, b"{}"),
    "a number": (200, JSON, b"7"),
    "no UTF-8": (200, JSON, b'{"assets": "\xff"}'),
    "half of the answer": lambda answer: answer[: len(answer) // 2],
    "a part of the answer": lambda answer: json.dumps(short(json.loads(answer))).encode(),
}


def short(answer):
    """An answer of pending_assets without "last", or one of store_embeddings without "taken"."""
    return {name: value for name, value in answer.items() if name in ("given", "assets")}


def struck(stack, request, fault):
    """A fault for the gateway; where it spoils the true answer, the work is done."""
    if callable(fault):
        status, headers, body = stack.gateway._route(request)
        return status, headers, fault(body)
    return fault


@pytest.mark.parametrize("function", ["pending_assets", "store_embeddings"])
def test_no_fault_that_passes_loses_or_doubles_a_vector(cli, stack, gate, forty, tuned, function):
    gate.opened.set()
    faults, turns = iter(FAULTS.values()), itertools.count()

    def every_other(request):
        if request.function == function and next(turns) % 2 == 0:
            return struck(stack, request, next(faults, None))
        return None

    stack.gateway.fault = every_other
    run = cli("PAGE_ROWS=2", "WRITE_ROWS=2", "WRITE_SECONDS=0.1", "--", script=tuned)
    assert run.code == 0, run.err
    assert next(faults, "all met") == "all met"
    assert run.err.count("trying again") == len(FAULTS)
    assert run.counts == run.counts | {"embedded": 40, "failed": 0, "left": 0}
    assert stack.embedded() == set(forty)


@pytest.mark.parametrize("function", ["pending_assets", "store_embeddings"])
@pytest.mark.parametrize("fault", ["null", "an empty list", "half of the answer"])
def test_an_answer_that_stays_odd_is_no_success(stack, forty, function, fault):
    stack.gateway.fault = lambda request: (
        struck(stack, request, FAULTS[fault]) if request.function == function else None
    )
    store = open_store(stack, db_retry_seconds=1.0)
    with pytest.raises(RunError, match="no answer from the database for 1 s"):
        store.save([Embedded(asset, vector(1)) for asset in pending(store)])


# Rows that are not taken


def test_a_batch_that_the_database_refuses_ends_the_run_with_its_words(cli, stack, gate, forty):
    gate.opened.set()
    stack.sql(
        f"alter table product_embeddings add constraint not_this check (asset_id <> '{forty[3]}')"
    )
    run = cli()
    assert run.code == 2
    assert "not_this" in run.error
    assert run.counts["embedded"] == len(stack.embedded()) < 40
    assert run.counts["left"] == 40 - run.counts["attempted"]


def test_assets_that_change_or_go_meanwhile_are_left_and_nobody_waits(cli, stack, host):
    host.files |= {"/old.html": b"<html>Sold out"}
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
    assert end.code == 0, end.out
    assert stack.embedded() == {locked, other}
    assert end.counts == end.counts | {"embedded": 2, "failed": 0, "left": 3}
    assert "       3  changed or gone meanwhile" in end.out.splitlines()
    host.requests.clear()
    again = cli()
    assert (again.code, again.counts["embedded"], again.counts["left"]) == (0, 2, 0)
    assert host.asked() == {"/rocket.jpg": 1}
    alike = (
        "select count(distinct embedding::text) from product_embeddings where asset_id = any(%s)"
    )
    assert stack.sql(alike, [[changed, changed_too]]) == [(1,)]


# Image hosts go away


def test_one_host_that_is_down_hides_no_other(cli, stack, host, tuned):
    with ImageHost(otherwise=status(503)) as down:
        # more than are found ahead: whole pages hold nothing else
        ids = stack.add_images(down.urls(1500) + [host.url_of("/flower.jpg")] * 5)
        run = cli("PATIENT_SECONDS=1", "--", script=tuned)
    assert run.code == 1
    assert stack.embedded() == set(ids[1500:])
    failed = run.counts["failed"]
    assert failed == len(down.asked()) < 20
    assert run.counts == run.counts | {"embedded": 5, "left": 1500 - failed}
    line = rf"(?m)^ +{1500 - failed:,}  of 127\.0\.0\.1:{down.port}: HTTP 503$".replace(",", "")
    assert re.search(line, run.out.replace(",", ""))
    assert len(stack.failures()) == failed


def test_ctrl_c_while_all_hosts_rest_ends_at_once(cli, stack):
    with ImageHost(otherwise=status(429, ("Retry-After", "600"))) as host:
        stack.add_images([*host.urls(9), "data:,no"])
        run = cli.start()
        wait_until(lambda: "rests until" in run.err)
        run.send_signal(signal.SIGINT)
        end = run.finish(30)
    assert end.code == 130
    assert end.counts == end.counts | {"failed": 1, "attempted": 1, "left": 9}


def test_offline_is_the_networks_fault_and_exit_code_2(cli, stack, tuned):
    stack.add_images(f"http://127.0.0.{n}:9/x.jpg" for n in range(1, 9))
    run = cli("PATIENT_SECONDS=0", "PATIENT_STRAINS=3", "--", script=tuned)
    assert run.code == 2
    assert "no image came from any host" in run.error
    assert "connection refused" in run.error
