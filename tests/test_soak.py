"""The soak in short: a minute of faults in an order that a seed decides, then the audit.

Promise: whatever happens to runs, hosts and the database, nothing is lost and nothing comes twice.
"""

import soak
from stack import ImageHost


def test_twenty_faults_and_five_kills_lose_nothing(stack, cli):
    with ImageHost() as host, ImageHost() as moody:
        short = soak.Soak(stack, host, moody, cli, assets=200, seed=5)
        short.rain()
        short.audit()
    assert short.happened.total() >= 20
    assert short.happened["kill"] >= 5
    assert not short.findings, str(short)
