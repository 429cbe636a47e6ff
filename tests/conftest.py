"""Fixtures: the real parts of stack.py, the models of models.py, and the command line itself.

Beside it: answers.py, what image hosts may answer; samples.py, image files made on the spot.
"""

import contextlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import models
import numpy as np
import psycopg
import pytest
import warm
from PIL import Image
from samples import saved
from stack import ImageHost, Stack, photographs

import generate_embeddings as script

# A shell starts background jobs with Ctrl-C ignored, nohup its own with SIGHUP, and every process
# started here inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "generate_embeddings.py"
TIMEOUT = 120  # seconds; for a busy machine: no run here takes a quarter of it
TINY_VERSION = "tiny"  # what rows carry whose vector the tiny model made
CLOSED = "http://127.0.0.1:9"  # nothing listens there

FOLDER_FILE = "product_embeddings.sqlite3"  # what --local writes
SMALL = ("flower.jpg", "china.jpg", "rocket.jpg")  # photographs that are quickly decoded


def patched_script(after="pass", before="pass"):
    """A program that is the script after some statements, before its import and after it."""
    return f"""
import os, signal, sys, time
sys.path.insert(0, {str(REPO)!r})
{before.strip()}
import generate_embeddings as script
{after.strip()}
code = script.main()
sys.stdout.flush()
os._exit(code)  # as the script itself
"""


# With other constants: NAME=value ... -- arguments
TUNED = patched_script("""
end = sys.argv.index("--")
for name, value in (pair.split("=") for pair in sys.argv[1:end]):
    setattr(script, name, type(getattr(script, name))(value))
del sys.argv[1:end + 1]
""")

STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")  # how a line of the log begins
COUNTS = re.compile(r"embedded=\d+ failed=\d+ left=\d+ attempted=\d+( \w+=[\d.]+)*")


class Result(NamedTuple):
    """How a run of the script ended."""

    code: int
    out: str
    err: str

    @property
    def counts(self):
        """The last line of stdout, name -> int; {} without such a line."""
        last = self.out.rstrip("\n").rpartition("\n")[2]
        if not COUNTS.fullmatch(last):
            return {}
        return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", last)}

    @property
    def error(self):
        """The one line on stderr that says why the run ended."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]

    @property
    def noise(self):
        """The lines on stderr that are none of the log's; an error is one of them."""
        return [line for line in self.err.splitlines() if not STAMPED.match(line)]

    def check(self, keys):
        """What must hold for every run, whatever it was for."""
        assert "Traceback (most recent call last)" not in self.err, self.err
        assert not any(key in self.out + self.err for key in keys), "a key in the output"
        if counts := self.counts:
            assert counts["attempted"] == counts["embedded"] + counts["failed"], self.out
        return self


class Started:
    """A run in the background: a Popen, or one like it, that writes to files in a folder.
    `finish()` waits for it and gives its Result."""

    def __init__(self, start, folder, keys):
        self.keys, number = keys, len(list(folder.glob("*.out")))
        self.out_path, self.err_path = folder / f"{number}.out", folder / f"{number}.err"
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            self._process = start(out.fileno(), err.fileno())

    def __getattr__(self, name):
        return getattr(self._process, name)

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
        return Result(self.returncode, out, self.err).check(self.keys)


class Cli:
    """Runs generate_embeddings.py as a process of its own, with nothing of the developer's
    environment: only `settings`, and single ones per call on top (None leaves one out). The
    current folder is an empty one unless `cwd` says otherwise. Its packages are imported already
    (see warm.py); `cold` starts it without.
    """

    def __init__(self, settings, folder, keys=()):
        self.settings, self.folder, self.keys = settings, folder, tuple(keys)
        self.started = []
        (folder / ".env").touch()  # else one beside the script, the developer's own, is read

    def environment(self, **overrides):
        kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT", "LD_LIBRARY_PATH")
        basis = {name: os.environ.get(name) for name in kept}
        basis |= {"HOME": self.folder, "HF_ENDPOINT": CLOSED}  # no test waits for the hub
        made = basis | self.settings | overrides
        return {name: str(value) for name, value in made.items() if value is not None}

    def command(self, args, script=SCRIPT):
        return [sys.executable, str(script), *map(str, args)]

    def __call__(self, *args, timeout=TIMEOUT, **options):
        return self.start(*args, **options).finish(timeout)

    def start(self, *args, cwd=None, script=SCRIPT, cold=False, terminal=None, **overrides):
        """The same, without waiting for its end; its output goes to a terminal, if there is one."""
        environment = self.environment(**overrides)
        keys = {*self.keys, environment.get("SUPABASE_SERVICE_ROLE_KEY")} - {None, ""}
        command, folder = self.command(args, script), cwd or self.folder

        def start(out, err):
            files = [out, err] if terminal is None else [terminal] * 2
            if cold or warm.needs_cold(environment):
                options = {"stdin": subprocess.DEVNULL, "stdout": files[0], "stderr": files[1]}
                return subprocess.Popen(command, cwd=folder, env=environment, **options)
            return warm.Run(command[1:], folder, environment, files)

        run = Started(start, self.folder, keys)
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
    settings = {"SUPABASE_URL": stack.url, "SUPABASE_SERVICE_ROLE_KEY": stack.service_key}
    settings |= {"ALLOW_PRIVATE_IMAGE_HOSTS": "1", **model_settings(model)}
    return Cli(settings, folder, stack.roles)


def renew(stack, **options):
    """The stack as if just started: everything runs, nothing is in it but schema.sql."""
    gateway = stack.gateway
    gateway.fault = None
    if not gateway.running:
        gateway.start()
    gateway.cut()  # what still hangs
    if stack._postgrest.poll() is not None or stack._max_rows != 1000:
        stack.set_max_rows(1000)
    if options:
        stack.reset(**options)
    else:
        stack.empty()
    gateway.requests.clear()
    gateway.storage.clear()


def open_store(stack, **settings):
    """The script's store of this stack, in this process."""
    given = {"url": stack.url, "key": stack.service_key, "model_version": TINY_VERSION}
    return script.SupabaseStore(script.Settings(**given | settings), script.Stop())


def open_folder(folder, **settings):
    """The script's store of a folder, in this process."""
    given = {"local": folder, "model_version": TINY_VERSION} | settings
    return script.FolderStore(script.Settings(**given))


def survey(store):
    """What a store says there is, and the pending assets of all its pages; once, as in a run."""
    return store.status(), [asset for page in store.pages() for asset in page]


def pending(store):
    return survey(store)[1]


def vector(*numbers):
    """A vector of unit length that begins like these numbers."""
    made = np.zeros(512, np.float32)
    made[: len(numbers)] = numbers
    return made / np.linalg.norm(made)


def near(vector, cosine, seed=2):
    """A vector of unit length that has this cosine to another."""
    other = np.random.default_rng(seed).standard_normal(512)
    other -= (other @ vector) * vector
    made = cosine * vector + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)
    return made.astype("<f4")


FOLDER_COLUMNS = "asset_id modified model_version embedding stage reason created_at updated_at"
FOLDER_COLUMNS = FOLDER_COLUMNS.split()


def folder_query(folder, sql):
    """What the file of a folder answers."""
    with contextlib.closing(sqlite3.connect(folder / FOLDER_FILE, isolation_level=None)) as db:
        return db.execute(sql).fetchall()


def folder_rows(folder):
    """path -> its row in the file of a folder, column by column; its embedding as `vector`, too."""
    made = {}
    for values in folder_query(folder, f"select {', '.join(FOLDER_COLUMNS)} from images"):
        row = made[values[0]] = SimpleNamespace(**dict(zip(FOLDER_COLUMNS, values, strict=True)))
        row.vector = np.frombuffer(row.embedding or b"", "<f4")
    return made


def folder_vectors(folder):
    """The same, of those with an embedding."""
    return {path: row for path, row in folder_rows(folder).items() if row.embedding}


def alone(program, *arguments, timeout=120):
    """Runs a program in a process of its own; what it prints is JSON. It has peak(): the most
    memory it ever held, in MB."""
    before = f"""
import io, json, resource, sys, time
sys.path.insert(0, {str(REPO)!r})

def peak():
    try:  # ru_maxrss begins with the parent's own on Linux
        with open("/proc/self/status") as status:
            return int(status.read().split("VmHWM:")[1].split()[0]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes
"""
    command = [sys.executable, "-W", "ignore", "-c", before + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def wait_until(condition, seconds=60):
    """Returns once condition() is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def pytest_configure():
    warm.start()  # before the workers, which use the same


@cache
def is_whole(file):
    """Whether one worker gets a file's tests together: they share what takes long to make."""
    return 'scope="module"' in (REPO / file).read_text()


def pytest_collection_modifyitems(items):
    """What is long comes first, so that none is left over at the end."""
    items.sort(key=lambda item: (item.path.stem != "test_soak", not is_whole(item.path)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class FilesOrTests(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if is_whole(file) else nodeid.partition("[")[0]

    return FilesOrTests(config, log)


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
    made = photographs()
    for name in ("rocket.jpg", "page.png"):  # they have ICC profiles, which transformers ignores
        image = Image.open(io.BytesIO(made[name]))
        made[name] = saved(image, image.format, quality=95, icc_profile=None)
    return made


@pytest.fixture(scope="session")
def cat(photos):
    """A real photograph, 96 x 64, which no turn or flip leaves as it is."""
    return Image.open(io.BytesIO(photos["chelsea.png"])).convert("RGB").resize((96, 64))


@pytest.fixture
def host(photos):
    """An ImageHost with the photographs."""
    with ImageHost({f"/{name}": data for name, data in photos.items()}) as host:
        yield host


@pytest.fixture
def small(photos, tmp_path):
    """A folder with three images."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in SMALL:
        (folder / name).write_bytes(photos[name])
    return folder


@pytest.fixture(scope="session")
def tiny():
    """A folder with a small model of CLIP's kind: 512 numbers from 224 pixels in no time."""
    return models.tiny_model()


@pytest.fixture(scope="session")
def full():
    """A folder with a model of the architecture of ViT-B/32; its weights are random."""
    return models.full_model()


@pytest.fixture
def patched(tmp_path):
    """Makes a script, for `script=`, that does some statements after its import, or before it."""

    def patched(*after, **before):
        path = tmp_path / "patched.py"
        path.write_text(patched_script(*after, **before))
        return path

    return patched


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


@pytest.fixture
def api(stack):
    """schema.sql's functions, called as the script calls them."""
    import database

    return database.Api(stack, stack.service_key)


@pytest.fixture
def other(stack):
    """A transaction of somebody else, open until the test commits it."""
    with psycopg.connect(stack.db_uri) as connection:
        yield connection
        connection.rollback()
