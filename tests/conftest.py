"""Fixtures: the real parts of stack.py, the models of models.py, and the command line itself."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from stack import ImageHost, Stack, photographs

# A shell starts background jobs with Ctrl-C ignored, nohup its own with SIGHUP, and every process
# started here inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "generate_embeddings.py"
TIMEOUT = 120  # seconds; for a busy machine: no run here takes a quarter of it
TINY_VERSION = "tiny"  # what rows carry whose vector the tiny model made
CLOSED = "http://127.0.0.1:9"  # nothing listens there

# Runs the script with other constants: NAME=value ... -- arguments
TUNED = f"""
import os, sys
sys.path.insert(0, {str(REPO)!r})
import generate_embeddings as script
if __name__ == "__main__":  # the decoders' processes import this file, too
    end = sys.argv.index("--")
    for name, value in (pair.split("=") for pair in sys.argv[1:end]):
        assert hasattr(script, name), name
        setattr(script, name, type(getattr(script, name))(value))
    code = script.main(sys.argv[end + 1:])
    sys.stdout.flush()
    os._exit(code)  # as the script itself
"""

COUNTS = re.compile(r"embedded=\d+ failed=\d+ left=\d+ attempted=\d+( \w+=[\d.]+)*")


@dataclass(frozen=True)
class Result:
    """How a run of the script ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def counts(self):
        """The last line of stdout, name -> int; {} without such a line."""
        last = self.out.splitlines()[-1:] or [""]
        if not COUNTS.fullmatch(last[0]):
            return {}
        pairs = (pair.split("=") for pair in last[0].split())
        return {n: int(float(v)) for n, v in pairs}

    @property
    def error(self):
        """The one line on stderr that says why the run ended."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]

    def check(self, keys):
        """What must hold for every run, whatever it was for."""
        assert "Traceback (most recent call last)" not in self.err, self.err
        assert not any(key in self.out + self.err for key in keys), "a key in the output"
        if self.counts:
            attempted = self.counts["embedded"] + self.counts["failed"]
            assert self.counts["attempted"] == attempted, self.out
        return self


class Started(subprocess.Popen):
    """A run in the background. `finish()` waits for it and gives its Result."""

    def __init__(self, command, folder, keys, **options):
        self.folder, self.keys, self.began = folder, keys, time.monotonic()
        number = len(list(folder.glob("*.out")))
        self.out_path, self.err_path = folder / f"{number}.out", folder / f"{number}.err"
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            super().__init__(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **options)

    @property
    def err(self):
        """What it has written to stderr so far."""
        return self.err_path.read_text(errors="replace")

    def finish(self, timeout=TIMEOUT):
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            self.wait()
            raise AssertionError(f"still running after {timeout} s:\n{self.err}") from None
        out = self.out_path.read_text(errors="replace")
        seconds = time.monotonic() - self.began
        return Result(self.returncode, out, self.err, seconds).check(self.keys)


class Cli:
    """Runs generate_embeddings.py as a process of its own, with nothing of the developer's
    environment: only `settings`, and per call `env` instead of those, and single settings on
    top (None leaves one out). The current folder is an empty one unless `cwd` says otherwise.
    """

    def __init__(self, settings, folder, keys=()):
        self.settings, self.folder, self.keys = settings, folder, tuple(keys)
        self.started = []
        (folder / ".env").touch()  # else one beside the script, the developer's own, is read

    def environment(self, env=None, **overrides):
        kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT", "LD_LIBRARY_PATH")
        basis = {name: os.environ[name] for name in kept if name in os.environ}
        basis |= {"HOME": str(self.folder), "HF_ENDPOINT": CLOSED}  # no test waits for the hub
        made = basis | (self.settings if env is None else env) | overrides
        return {name: str(value) for name, value in made.items() if value is not None}

    def command(self, args, script=SCRIPT):
        return [sys.executable, str(script), *map(str, args)]

    def __call__(self, *args, env=None, cwd=None, timeout=TIMEOUT, script=SCRIPT, **overrides):
        return self.start(*args, env=env, cwd=cwd, script=script, **overrides).finish(timeout)

    def start(self, *args, env=None, cwd=None, script=SCRIPT, **overrides):
        """The same, without waiting for its end; its Popen has `finish()`, which does."""
        environment = self.environment(env, **overrides)
        keys = {*self.keys, environment.get("SUPABASE_SERVICE_ROLE_KEY")} - {None, ""}
        command = self.command(args, script)
        run = Started(command, self.folder, keys, cwd=cwd or self.folder, env=environment)
        self.started.append(run)
        return run

    def close(self):
        for run in self.started:
            if run.poll() is None:
                run.kill()
                run.wait()


def model_settings(folder):
    """The settings for a model of models.py: its folder, and a name for what is no ViT-B/32."""
    version = {"MODEL_VERSION": TINY_VERSION} if folder.name == "tiny" else {}
    return {"CLIP_MODEL": str(folder)} | version


def stack_cli(stack, model, folder):
    """A Cli with the settings of the stack, for fixtures of a wider scope than `cli`."""
    settings = {
        "SUPABASE_URL": stack.url,
        "SUPABASE_SERVICE_ROLE_KEY": stack.service_key,
        "ALLOW_PRIVATE_IMAGE_HOSTS": "1",
        **model_settings(model),
    }
    return Cli(settings, folder, stack.roles)


def renew(stack, **options):
    """The stack as if just started: everything runs, nothing is in it but schema.sql."""
    gateway = stack.gateway
    gateway.fault = None
    gateway.stop()  # also cuts what still hangs
    gateway.start()
    if stack._postgrest.poll() is not None or stack._max_rows != 1000:
        stack.set_max_rows(1000)
    stack.reset(**options)
    gateway.requests.clear()
    gateway.storage.clear()
    gateway.public_buckets.clear()


def wait_until(condition, seconds=60):
    """Returns once condition() is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def _stack():
    with Stack() as stack:
        yield stack


@pytest.fixture
def stack(_stack):
    """The running Stack with an empty catalog of uuid ids and schema.sql."""
    renew(_stack)
    return _stack


@pytest.fixture(scope="session")
def photos():
    """The photographs, name -> bytes."""
    return photographs()


@pytest.fixture
def host(photos):
    """An ImageHost with the photographs."""
    with ImageHost({f"/{name}": data for name, data in photos.items()}) as host:
        yield host


@pytest.fixture(scope="session")
def tiny():
    """A folder with a small model of CLIP's kind: 512 numbers from 224 pixels in no time."""
    import models  # and torch with it: three seconds

    return models.tiny_model()


@pytest.fixture(scope="session")
def full():
    """A folder with a model of the architecture of ViT-B/32; its weights are random."""
    import models

    return models.full_model()


@pytest.fixture
def tuned(tmp_path):
    """The script with other constants, for `script=`: NAME=value ... -- arguments"""
    path = tmp_path / "tuned.py"
    path.write_text(TUNED)
    return path


@pytest.fixture
def cli(request, tiny, tmp_path_factory):
    """Runs the command line with the tiny model, and the stack's settings where a test uses it."""
    folder = tmp_path_factory.mktemp("cwd")
    if "stack" in request.fixturenames:
        made = stack_cli(request.getfixturevalue("stack"), tiny, folder)
    else:
        made = Cli({**model_settings(tiny), "ALLOW_PRIVATE_IMAGE_HOSTS": "1"}, folder)
    yield made
    made.close()
