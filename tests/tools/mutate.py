"""Breaks the code on purpose, one small change at a time, and says whether the tests notice.

    python tests/tools/mutate.py [--fit] [WORD ...]    only mutations whose name has a word

mutations.txt holds them: a name, which begins with the section that it is in; the tests that should
fail, as arguments of pytest; the lines with "-", which stand once in the section's file, and those
with "+" that take their place. They run in a copy of the repository: the working tree is never
touched. Exit code 1: something was not noticed, or fits no more, as the code has moved on (--fit
looks for that alone).
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/

import psycopg  # noqa: F401 - what the tests import: see `failed`
import pytest
import supabase  # noqa: F401
import torch  # noqa: F401
import warm
from transformers import CLIPModel, CLIPVisionModelWithProjection  # noqa: F401

REPO = Path(__file__).resolve().parents[2]
PATIENCE = 240  # seconds; tests that hang have noticed, too


class Mutation(NamedTuple):
    name: str
    tests: str
    old: str
    new: str

    @property
    def file(self):
        return "schema.sql" if self.name.startswith("schema:") else "generate_embeddings.py"

    def fits(self):
        return (REPO / self.file).read_text().count(self.old) == 1


def mutations():
    """All of mutations.txt."""
    for block in Path(__file__).with_name("mutations.txt").read_text().split("\n\n"):
        name, tests, *lines = block.strip("\n").split("\n")
        old, new = ([line[2:] for line in lines if line[0] == sign] for sign in "-+")
        yield Mutation(name, tests, "\n".join(old), "\n".join(new))


def copy_of_the_repository(folder):
    """The files that git knows or would add, and the downloads of the tests."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=REPO, text=True).splitlines():
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)
    (REPO / ".cache").mkdir(exist_ok=True)
    (folder / ".cache").symlink_to(REPO / ".cache")


def failed(folder, tests):
    """Whether one of the tests fails or hangs. They run in a fork of this process, which has
    imported already what takes long."""
    said = folder / "said.txt"
    child = os.fork()
    if child == 0:
        with said.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.setsid()  # to be ended with all that it starts
        os.chdir(folder)
        arguments = ["-n", "0", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1):  # no test was found, or the file can't be imported
                raise SystemExit(f"pytest {tests}: exit {code}\n{said.read_text()[-2000:]}")
            return code == 1
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def noticed(mutation, folder):
    file = folder / mutation.file
    whole = file.read_text()
    file.write_text(whole.replace(mutation.old, mutation.new))
    try:
        return failed(folder, mutation.tests)
    finally:
        file.write_text(whole)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="run no tests")
    parser.add_argument("words", nargs="*", help="of the names of mutations (all)")
    flags = parser.parse_args()
    sys.dont_write_bytecode = True  # a change within a second would go unseen
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    words = flags.words or [""]
    chosen = [m for m in mutations() if any(word in m.name for word in words)]
    bad = [m for m in chosen if not m.fits()]
    for mutation in bad:
        print(f"fits no more: {mutation.name}")
    if flags.fit:
        print(f"{len(chosen) - len(bad)} of {len(chosen)} fit")
        return 1 if bad else 0
    for number in (signal.SIGINT, signal.SIGHUP):  # as conftest.py
        signal.signal(number, signal.SIG_DFL)
    warm.start()  # else each test process makes one
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_repository(folder)
        for number, mutation in enumerate(m for m in chosen if m not in bad):
            began = time.monotonic()
            became = "noticed"
            if not noticed(mutation, folder):
                became = "NOT NOTICED"
                bad.append(mutation)
            seconds = time.monotonic() - began
            print(f"{number + 1:3} {became:11} {seconds:4.0f} s  {mutation.name}", flush=True)
    print(f"{len(chosen) - len(bad)} of {len(chosen)} were noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
