"""The lock, .ci/requirements.lock: what comes with requirements.txt, file by file."""

import re

import pytest
from conftest import REPO

LOCK = (REPO / ".ci" / "requirements.lock").read_text()
ENTRY = r"(?P<name>[a-z0-9-]+)==(?P<version>\S+)(?: ; .+?)?(?: --hash=sha256:[0-9a-f]{64})+"


@pytest.fixture(scope="module")
def locked():
    """Package -> version. Each line that is no comment is one package with its hashes."""
    joined = re.sub(r" \\\n +", " ", LOCK)
    lines = [line for line in joined.splitlines() if line and not line.lstrip().startswith("#")]
    matches = [(line, re.fullmatch(ENTRY, line)) for line in lines]
    assert [line[:60] for line, match in matches if not match] == []
    names = [match["name"] for _, match in matches]
    assert names == sorted(set(names))
    return {match["name"]: match["version"] for _, match in matches}


def test_the_lock_has_the_versions_of_requirements_txt(locked):
    pins = dict(pin.split("==") for pin in (REPO / "requirements.txt").read_text().split())
    del pins["torch"]  # which of its builds it is depends on the machine
    assert {name: locked.get(name) for name in pins} == pins
    assert "torch" not in locked


def test_the_lock_has_what_torch_needs_but_nothing_of_cuda(locked):
    assert {"filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy"} <= set(locked)
    assert [name for name in locked if re.match("nvidia|cuda|triton", name)] == []
