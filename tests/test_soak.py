"""The soak in short: a minute of faults in an order that a seed decides, then the audit."""

import pytest
import soak
from conftest import wait_until
from stack import ImageHost


@pytest.fixture
def bare_host():
    with ImageHost() as host:
        yield host


def test_twenty_faults_and_five_kills_lose_nothing(stack, bare_host, cli):
    short = soak.Soak(stack, bare_host, cli, assets=200, seed=5)
    short.rain()
    short.audit()
    assert short.happened.total() >= 20
    assert short.happened["kill"] >= 5
    assert not short.findings, str(short)


@pytest.fixture
def changed_in_flight(stack, host, cli):
    """The catalog after a run during which two images changed while the old ones came in."""
    host.files |= {"/old.html": b"<html>Sold out"}
    host.latency = 0.5
    stack.reset("bigint")
    old = ("/coffee.png", "/old.html")
    stack.add_assets((n, host.url_of(path), "client") for n, path in enumerate(old))
    run = cli.start()
    wait_until(lambda: len(host.requests) == len(old))
    stack.sql("update assets set image_url = %s", [host.url_of("/rocket.jpg")])
    assert run.finish().code in (0, 1)
    return stack


def test_an_image_that_changes_while_it_is_embedded_is_embedded_anew(changed_in_flight, cli):
    assert cli().code == 0
    vectors = changed_in_flight.sql("select embedding::text from product_embeddings")
    assert len(vectors) == 2
    assert len(set(vectors)) == 1  # both are the new image's


def test_an_image_that_was_bad_and_changes_meanwhile_is_not_skipped(changed_in_flight, cli):
    assert cli().counts["skipped"] == 0
    assert changed_in_flight.sql("select count(*) from product_embedding_failures") == [(0,)]
    assert changed_in_flight.sql("select count(*) from product_embeddings") == [(2,)]
