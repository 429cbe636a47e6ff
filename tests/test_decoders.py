"""The processes that decode: what they reply, what they can reach, what an image may cost; and
what becomes of an image, and of the run, when one dies, hangs, lies or can't be started.
"""

import contextlib
import io
import logging
import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pillow_heif
import psutil
import pytest
from conftest import SCRIPT, alone, folder_rows, wait_until
from PIL import Image
from samples import chunk, exif, png, saved, tiff

import generate_embeddings as script
from generate_embeddings import Decoder, ImageError, RunError

pillow_heif.register_heif_opener()

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
RED = saved(Image.new("RGB", (40, 40), "red"), "PNG")
LEVELS = script.LEVELS_BYTES


def is_well(decoder):
    return (decoder.decode(RED)[112, 112] == (255, 0, 0)).all()


@contextlib.contextmanager
def started():
    """A decoder whose process is there."""
    decoder = Decoder()
    assert is_well(decoder)
    yield decoder
    decoder._process.kill()
    decoder._process.wait()


@pytest.fixture(scope="module")
def decoder():
    with started() as decoder:
        yield decoder


@pytest.fixture
def hasty(monkeypatch):
    """A decoder that has one second for an image."""
    serve = "sys.exit(decoder"
    assert serve in script.RUN_DECODER
    shorter = script.RUN_DECODER.replace(serve, f"decoder.DECODE_SECONDS = 1\n{serve}")
    monkeypatch.setattr(script, "RUN_DECODER", shorter)
    with started() as decoder:
        yield decoder


def process_of(decoder):
    return psutil.Process(decoder._process.pid)


def seconds_of(process):
    return sum(process.cpu_times()[:2])


def refused(decoder, data=RED):
    with pytest.raises(ImageError) as refusal:
        decoder.decode(data)
    return str(refusal.value)


# What it replies


def test_what_is_decoded_in_a_process_that_can_open_nothing_is_the_same(decoder, cat):
    for kind in ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "BMP", "TIFF"):
        for compression in ("tiff_lzw", "jpeg") if kind == "TIFF" else ("",):
            data = saved(cat, kind, compression=compression)
            assert decoder.decode(data).tobytes() == script.levels_of(data), kind
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    # Long before its time: one that is left would kill the decoder later.
    wait_until(lambda: not any(timer.is_alive() for timer in timers), script.DECODE_PATIENCE / 2)


def test_width_and_height_come_from_the_header(decoder):
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "HEIF"):
        turned = {"exif": exif(6), "icc_profile": bytes(10**6)} if kind == "JPEG" else {}
        data = saved(Image.new("RGB", (301, 202), "red"), kind, **turned)
        assert decoder.size(data) == (301, 202), kind
        with pytest.raises(ImageError):
            decoder.size(data[:9])
    with pytest.raises(ImageError, match=script.BROKEN):
        decoder.size(tiff((2**16, 2**16), b""))
    comment = chunk(b"tEXt", b"by\0me")[:-1] + b"x"  # of a wrong checksum
    assert decoder.size(png((301, 202), 8, 2, b"", comment)) == (301, 202)
    assert is_well(decoder)


def test_an_avif_is_decoded_in_one_thread(decoder):
    data = saved(Image.effect_noise((1000, 1000), 90).convert("RGB"), "AVIF", speed=10)
    process = process_of(decoder)
    threads = set()
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(decoder.decode, data)
        while not reply.done():
            threads.add(process.num_threads())
    assert threads == {1}


def framed(data):
    return len(data).to_bytes(8, "big") + data


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (ImageError("\x1b[2J\0" + "x" * 500), "?[2J?xxx"),
        (AttributeError("no such"), f"{script.DEFECT} (AttributeError: no such)"),
    ],
)
def test_what_is_raised_over_there_is_raised_here(monkeypatch, caplog, raised, reason):
    def levels_of(data):
        raise raised

    monkeypatch.setitem(script.TASKS, b"levels", (levels_of, LEVELS))
    caplog.set_level(logging.DEBUG)
    reply = b"".join(map(framed, script.reply_to(b"levels", b"data")))
    pipes = {"stdin": io.BytesIO(), "stdout": io.BytesIO(reply)}
    with pytest.raises(ImageError) as refusal:
        script.reply_of(SimpleNamespace(kill=None, **pipes), b"levels", b"data")
    assert str(refusal.value).startswith(reason)
    assert len(str(refusal.value)) <= script.MOST_REASON
    assert ("in levels_of" in caplog.text) == (script.DEFECT in reason)  # a traceback, with -v


LIES = {  # what a decoder that an image has taken over may send in the place of a reply
    "one byte more than levels": framed(bytes(LEVELS + 1)),
    "one byte less, and no reason": framed(bytes(LEVELS - 1)) + framed(b""),
    "more than there is memory": b"\xff" * 8,
    "a reason that is no text": framed(b"") + framed(b"\xff\xfe"),
}
BROKEN_OFF = {"half a length": bytes(4), "half of the levels": framed(bytes(LEVELS))[:1000]}


@pytest.mark.parametrize("name", [*LIES, *BROKEN_OFF])
def test_a_decoder_that_lies_or_breaks_off_is_done_without(tmp_path, name):
    (tmp_path / "sent").write_bytes((LIES | BROKEN_OFF)[name])
    then = "exec sleep 60" if name in LIES else "head -c 8 >/dev/null"
    command = ["sh", "-c", f"cat {tmp_path}/sent; {then}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    decoder = Decoder()
    decoder._process = process
    assert refused(decoder) == script.DECODER_LOST
    assert process.returncode == (-signal.SIGKILL if name in LIES else 0)
    assert decoder._process is None  # the next image has a new one


# How it ends


@LINUX
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        *((number, script.BROKEN) for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE)),
        (signal.SIGPROF, script.TOO_SLOW),
        (signal.SIGKILL, script.DECODER_LOST),  # for want of memory
        (signal.SIGBUS, script.DECODER_LOST),  # a library on a disk that is gone
    ],
)
def test_a_crash_is_the_images_fault_and_a_machines_trouble_is_not(
    decoder, monkeypatch, number, reason
):
    process, send = process_of(decoder), script.send

    def send_and_strike(pipe, data):
        send(pipe, data)
        process.send_signal(number)
        process.resume()

    process.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(script, "send", send_and_strike)
        assert refused(decoder) == reason
    assert is_well(decoder)


def test_a_decoder_that_hangs_is_killed_in_time_and_one_that_died_costs_no_image(
    decoder, monkeypatch
):
    process = process_of(decoder)
    process.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(script, "DECODE_PATIENCE", 0.2)
        assert refused(decoder) == script.DECODER_LOST
    assert not process.is_running()
    assert is_well(decoder)
    decoder._process.kill()
    decoder._process.wait()
    assert is_well(decoder)


@LINUX
def test_what_stops_the_run_does_not_stop_its_decoders(decoder):
    process = process_of(decoder)
    for number in (signal.SIGINT, signal.SIGTERM):  # as systemd and Slurm send it to all
        process.send_signal(number)
    assert is_well(decoder)
    assert process_of(decoder) == process
    # What a terminal or timeout(1) sends to its group does not arrive
    assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid


def test_a_decoder_ends_with_the_run():
    pid = alone(f"""
import os
import generate_embeddings as script
decoder = script.Decoder()
decoder.decode({RED!r})
print(decoder._process.pid, flush=True)
os._exit(0)
""")
    wait_until(lambda: not psutil.pid_exists(pid))


# Where none can be started


CANT_START = {
    "no such program": ("", "No such file or directory"),
    "too little memory": (f'ulimit -v 900000; exec {sys.executable} "$@"', "MemoryError"),  # KB
    "with words": ("echo Traceback >&2; echo 'ImportError: no libz' >&2; exit 1", "no libz"),
    "hangs": ("exec sleep 20", "exit code -9"),
}


@pytest.mark.parametrize(("program", "why"), CANT_START.values(), ids=CANT_START)
def test_why_a_decoder_does_not_start_is_said(monkeypatch, tmp_path, program, why):
    python = tmp_path / "python"
    if program:
        python.write_text("#!/bin/sh\n" + program)
        python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(script, "DECODE_PATIENCE", 0.2 if "sleep" in program else 60.0)
    with pytest.raises(RunError, match=rf"{why}.*\)$"):
        Decoder().decode(RED)


def test_where_no_thread_can_be_started_it_is_said(monkeypatch):
    monkeypatch.setattr(script.threading.Timer, "start", Mock(side_effect=RuntimeError("no more")))
    with pytest.raises(RunError, match=r"\(no more\)"):
        Decoder().decode(RED)


def test_a_run_that_can_start_no_decoder_ends_and_notes_nothing(cli, small, tuned):
    run = cli("RUN_DECODER=exit('no way')", "--", "--local", small, script=tuned)
    assert run.code == 2
    assert "(no way)" in run.error
    assert run.counts == run.counts | {"embedded": 0, "failed": 0, "left": 3}
    assert folder_rows(small) == {}


# What it can reach


def test_no_module_of_the_current_folder_runs_whatever_the_scripts_name_is(cli, tmp_path):
    images, app = tmp_path / "images", tmp_path / "app"
    for folder in (images, app):
        folder.mkdir()
    (images / "red.png").write_bytes(RED)
    for name in ("types", "queue", "json", "requests", "numpy", "PIL", "sitecustomize"):
        (images / f"{name}.py").write_text("open('planted', 'a').write(__name__)\n")
    # As tqdm does on macOS, where that starts one more Python, with the whole environment
    spawns = """
def embed_all(*_):
    import multiprocessing
    multiprocessing.get_context("spawn").RLock()
    print(Decoder().decode(Path("red.png").read_bytes())[0, 0])
    return 0

"""
    copy = app / "our embeddings.v2"
    copy.write_text(SCRIPT.read_text().replace("\nif __name__ == ", f"{spawns}\nif __name__ == "))
    long = tmp_path / ("x" * 120)
    run = cli("--local", ".", cwd=images, script=copy, cold=True, TMPDIR=long)
    assert (run.code, run.out) == (0, "[255   0   0]\n"), run.err
    assert not (images / "planted").exists()


@LINUX
def test_a_decoder_gets_nothing_of_the_environment_but_what_python_needs(monkeypatch):
    secrets = ("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY", "AWS_SECRET_ACCESS_KEY")
    for name in (*secrets, "PYTHONWARNINGS", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "ignore")
    with started() as decoder:
        given = process_of(decoder).environ()
    assert given["PYTHONWARNINGS"] == given["LD_LIBRARY_PATH"] == "ignore"
    assert not set(secrets) & set(given)
    assert set(given) <= {*os.environ, *script.DECODER_SETTINGS}


REACH = """
import ctypes, os, socket
import generate_embeddings as script

libc = ctypes.CDLL(None, use_errno=True)
secret = ctypes.create_string_buffer(b"a secret")
ours, theirs = os.pipe()
other = os.fork()
if not other:
    os.close(theirs)
    os.read(ours, 1)  # until this process is over
    os._exit(0)

def look_into(pid):
    copy = ctypes.create_string_buffer(8)
    here, there = ((ctypes.c_size_t * 2)(ctypes.addressof(place), 8) for place in (copy, secret))
    if libc.process_vm_readv(pid, here, 1, there, 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "refused")
    assert copy.raw == b"a secret"

attempts = {
    "read a file": lambda: open("one").close(),
    "write a file": lambda: open("new", "w").close(),
    "make a socket": lambda: socket.socket().close(),
    # What only Landlock forbids
    "empty a file": lambda: os.truncate("one", 0),
    "move a file": lambda: os.rename("one", "moved"),
    "delete a file": lambda: os.unlink("two"),
    "run a program": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
    "look into another process": lambda: look_into(other),
    # Since its sixth version
    "send a signal": lambda: os.kill(other, 0),
}

def is_possible(attempt):
    try:
        attempt()
        return True
    except OSError:
        return False

def possible():
    return [name for name, attempt in attempts.items() if is_possible(attempt)]

os.chdir(sys.argv[1] + "/free")
free = possible()
os.chdir(sys.argv[1] + "/shut")
version = libc.syscall(444, None, 0, 1)
script.shut_in()
print(json.dumps([list(attempts), free, possible(), version]))
"""


@LINUX
def test_a_decoder_that_an_image_took_over_is_shut_in(decoder, tmp_path):
    for folder in ("free", "shut"):
        (tmp_path / folder).mkdir()
        for file in ("one", "two"):
            (tmp_path / folder / file).touch()
    all_of_them, free, shut, version = alone(REACH, tmp_path)
    assert free == all_of_them
    forbidden = 3 if version < 1 else 8 if version < 6 else 9
    assert shut == all_of_them[forbidden:]
    process = process_of(decoder)
    assert process.rlimit(psutil.RLIMIT_NOFILE) == process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert "NoNewPrivs:\t1" in Path(f"/proc/{process.pid}/status").read_text()


# What an image may cost


def claims():
    """Small files that claim 400 megapixels, or 108: libwebp would call that one broken."""
    jpeg = saved(Image.new("RGB", (32, 32)), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    packed = struct.pack("<I", 11_999 | 8_999 << 14)
    lossless = b"VP8L" + struct.pack("<I", 30) + b"\x2f" + packed + bytes(25)
    return {
        "png": png((20000, 20000), 8, 2, [bytes(60000)] * 20),
        "jpeg": jpeg[:at] + struct.pack(">HH", 20000, 20000) + jpeg[at + 4 :],
        "webp": b"RIFF" + struct.pack("<I", 42) + b"WEBP" + lossless,
    }


@pytest.mark.parametrize("name", claims())
def test_an_image_that_claims_far_too_many_pixels_is_not_decoded(decoder, name):
    assert refused(decoder, claims()[name]) == script.TOO_MUCH


def test_no_text_is_puzzled_over_for_long(hasty):
    for piece in (b"<!-- a -->", b"<!doctype a [] >", b" ", b"["):
        assert "not an image" in refused(hasty, (piece * 65_536)[:65_530] + b" text")


def large_tile():
    """A TIFF of 1,000 pixels a side, in one tile of 34,000."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(1103)) + packer.flush()
    tile = {"t322": 34_000, "t323": 34_000, "t324": 8, "t325": len(packed)}
    return tiff((1000, 1000), packed, t259=8, **tile)


def many_chunks():
    data = saved(Image.new("RGB", (32, 32)), "PNG")
    return data[:33] + chunk(b"IDAT", b"") * 2_000_000 + data[33:]


HOSTILE = {
    # libtiff calls it broken where it only lacks memory
    large_tile: {script.TOO_MUCH, script.BROKEN},
    many_chunks: {script.TOO_SLOW},
}


@LINUX
@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_file_that_asks_for_too_much_is_given_up_and_the_next_is_well(hasty, make):
    assert refused(hasty, make()) in HOSTILE[make]
    assert is_well(hasty)


@LINUX
def test_the_seconds_of_an_image_count_from_its_start(hasty):
    """A decoder that has worked for longer than one image may take is as good as new."""
    image = saved(Image.effect_noise((1500, 1500), 90), "PNG")  # takes 0.1 s
    process = process_of(hasty)
    while seconds_of(process) < 1.6:
        hasty.decode(image)
    assert process_of(hasty) == process


@LINUX
@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("P", "PNG", {"transparency": 0, "compress_level": 1}),
        ("RGB", "WEBP", {"lossless": True, "method": 0, "quality": 0}),
    ],
)
def test_an_honest_image_of_50_megapixels_is_decoded(decoder, mode, kind, options):
    data = saved(Image.new(mode, (8000, 6250)), kind, **options)
    assert decoder.decode(data).shape == (224, 224, 3)
