"""The real command against hosts with the habits of hosts.py, small ones.

Promise: what a host can give comes in one run, nothing twice, and no image is asked for over and
over.
"""

import pytest
from hosts import cases, serving

CASES = cases(small=True)


@pytest.mark.parametrize("name", CASES)
def test_what_a_host_can_give_comes_in_one_run(cli, stack, photos, tuned, name):
    case = CASES[name]
    with serving(case, photos["rocket.jpg"]) as (urls, hosts):
        stack.add_images(urls)
        run = cli("PATIENT_SECONDS=3", "--", script=tuned, timeout=300, **case.settings)
        asked = [times for host in hosts for times in host.asked().values()]
    assert run.counts["embedded"] >= case.come, run.out + run.err
    assert run.code == (0 if run.counts["embedded"] == len(urls) else 1)
    assert len(stack.embedded()) == run.counts["embedded"]
    assert sum(asked) <= 3 * len(urls), asked
