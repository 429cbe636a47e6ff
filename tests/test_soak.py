"""The soak in short: a minute of faults in an order that a seed decides, then the audit."""

import pytest
import soak
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
