"""The processes that decode: what they answer, what they can reach, what an image may cost; and
what becomes of an image, and of the run, when one dies, hangs, lies or can't be started.
"""

import contextlib
import itertools
import logging
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pillow_heif
import psutil
import pytest
from conftest import SCRIPT, alone, folder_rows, wait_until
from PIL import Image
from samples import bmp, chunk, png, saved, tiff

import generate_embeddings as script
from generate_embeddings import (
    BROKEN,
    DECODE_MB,
    DECODE_SECONDS,
    DECODER_LOST,
    DEFECT,
    EMPTY,
    JSON,
    LEVELS_BYTES,
    MOST_REASON,
    TOO_MUCH,
    TOO_SLOW,
    Decoder,
    ImageError,
    RunError,
)

pillow_heif.register_heif_opener()

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can")
RED = saved(Image.new("RGB", (40, 40), "red"), "PNG")


@pytest.fixture(scope="module")
def decoder():
    """A decoder whose process is there."""
    decoder = Decoder()
    assert is_well(decoder)
    yield decoder
    end(decoder)


def is_well(decoder):
    return (decoder.decode(RED)[112, 112] == (255, 0, 0)).all()


def end(decoder):
    decoder._process.kill()
    decoder._process.wait()


def process_of(decoder):
    return psutil.Process(decoder._process.pid)


def refused(decoder, data=RED):
    """The reason for which there are no levels."""
    with pytest.raises(ImageError) as refusal:
        decoder.decode(data)
    return str(refusal.value)


# --------------------------------------------------------------------------------------------------
# What it answers
# --------------------------------------------------------------------------------------------------


def test_what_is_decoded_in_a_process_that_can_open_nothing_is_the_same(decoder, cat):
    kinds = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "TIFF", "BMP")
    tried = 0
    for kind, mode in itertools.product(kinds, ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")):
        for options in ({}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}):
            with contextlib.suppress(OSError, KeyError, ValueError, RuntimeError):
                data = saved(cat.convert(mode), kind, **options)
                assert decoder.decode(data).tobytes() == script.levels_of(data), (kind, mode)
                tried += 1
    assert tried > 90


def test_an_avif_is_decoded_in_one_thread(decoder):
    data = saved(Image.effect_noise((2000, 1500), 90).convert("RGB"), "AVIF", speed=10)
    process = process_of(decoder)
    threads = set()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(decoder.decode, data)
        while not answer.done():
            threads.add(process.num_threads())
    assert threads == {1}


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (ImageError(JSON), JSON),
        (ImageError("\x1b[2J\0" + "x" * 500), "?[2J?xxx"),
        (AttributeError("no such method"), f"{DEFECT} (AttributeError: no such method)"),
    ],
    ids=["a reason", "not fit to print", "a defect"],
)
def test_what_is_raised_over_there_is_raised_here(monkeypatch, caplog, raised, reason):
    def levels_of(data):
        raise raised

    monkeypatch.setattr(script, "levels_of", levels_of)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ImageError) as refusal:
        script.levels_in(script.answer_for(b"data"))
    assert str(refusal.value).startswith(reason)
    assert len(str(refusal.value)) <= MOST_REASON + len(f"{DEFECT} ()")
    assert ("in levels_of" in caplog.text) == (DEFECT in reason)  # a traceback, with -v


class Planted:
    """Unpickled it would print."""

    def __reduce__(self):
        return print, ("UNPICKLED",)


def framed(data):
    return len(data).to_bytes(8, "big") + data


LIES = {  # what a decoder that an image has taken over may send in the place of an answer
    "no text": framed(b""),
    "one byte less than levels": framed(bytes(LEVELS_BYTES - 1)),
    "one byte more than levels": framed(bytes(LEVELS_BYTES + 1)),
    "more than there is memory": b"\xff" * 8,
    "a reason of no kind": framed(b"?no"),
    "a reason that is no text": framed(b"R\xff\xfe"),
    "a pickle": framed(pickle.dumps(Planted())),
}
BROKEN_OFF = {
    "nothing": b"",
    "half a length": bytes(4),
    "half of the levels": framed(bytes(LEVELS_BYTES))[:1000],
    "half of a reason": framed(b"R" + EMPTY.encode())[:-3],
}


@pytest.mark.parametrize("name", [*LIES, *BROKEN_OFF])
def test_a_decoder_that_lies_or_breaks_off_is_done_without(tmp_path, capfd, name):
    (tmp_path / "sent").write_bytes((LIES | BROKEN_OFF)[name])
    then = "exec sleep 60" if name in LIES else "head -c 8 >/dev/null"
    command = ["sh", "-c", f"cat {tmp_path}/sent; {then}"]
    decoder = Decoder()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    decoder._process = process
    assert refused(decoder) == DECODER_LOST
    assert process.returncode == (-signal.SIGKILL if name in LIES else 0)
    assert "UNPICKLED" not in "".join(capfd.readouterr())
    assert is_well(decoder)
    end(decoder)


# --------------------------------------------------------------------------------------------------
# How it ends
# --------------------------------------------------------------------------------------------------


@LINUX
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGSEGV, BROKEN),
        (signal.SIGABRT, BROKEN),
        (signal.SIGFPE, BROKEN),
        (signal.SIGXCPU, TOO_SLOW),
        (signal.SIGKILL, DECODER_LOST),  # for want of memory
        (signal.SIGBUS, DECODER_LOST),  # a library on a disk that is gone
        (signal.SIGILL, DECODER_LOST),  # a library that is not for this processor
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


@LINUX
def test_a_decoder_that_died_while_it_was_idle_costs_no_image(decoder):
    process = process_of(decoder)
    process.kill()
    decoder._process.wait()
    assert is_well(decoder)


def test_a_decoder_that_hangs_is_killed_in_time(decoder, monkeypatch):
    process = process_of(decoder)
    process.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(script, "DECODE_PATIENCE", 0.5)
        assert refused(decoder) == DECODER_LOST
    assert not process.is_running()
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
import generate_embeddings as script
decoder = script.Decoder()
decoder.decode({RED!r})
print(decoder._process.pid, flush=True)
import os
os._exit(0)
""")
    wait_until(lambda: not psutil.pid_exists(pid))


# --------------------------------------------------------------------------------------------------
# Where none can be started
# --------------------------------------------------------------------------------------------------


CANT_START = {
    "no such program": ("", "No such file or directory"),
    "too little memory": (
        f'ulimit -v 900000; exec {sys.executable} "$@"',  # KB
        "MemoryError",
    ),
    "with words": ("echo Traceback >&2; echo 'ImportError: no libz' >&2; exit 1", "no libz"),
    "without a word": ("exit 7", "exit code 7"),
    "killed": ("kill -9 $$", "exit code -9"),
    "hangs": ("exec sleep 60", "exit code -9"),
}


@pytest.mark.parametrize(("program", "why"), CANT_START.values(), ids=CANT_START)
def test_why_a_decoder_does_not_start_is_said(monkeypatch, tmp_path, program, why):
    python = tmp_path / "python"
    if program:
        python.write_text("#!/bin/sh\n" + program)
        python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(script, "DECODE_PATIENCE", 1.0 if "sleep" in program else 60.0)
    with pytest.raises(RunError, match=rf"{why}.*\)$"):
        Decoder().decode(RED)


def test_where_no_thread_can_be_started_it_is_said(monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(script.threading.Timer, "start", start)
    with pytest.raises(RunError, match="can't start new thread"):
        Decoder().decode(RED)


def test_the_script_may_have_any_name(cli, small, tmp_path):
    renamed = tmp_path / "our embeddings.v2"
    shutil.copy(SCRIPT, renamed)
    assert cli("--local", small, script=renamed).counts["embedded"] == 3


def test_a_run_that_can_start_no_decoder_ends_and_notes_nothing(cli, small, tuned):
    run = cli("RUN_DECODER=exit('no way')", "--", "--local", small, script=tuned)
    assert run.code == 2
    assert "(no way)" in run.error
    assert run.counts == run.counts | {"embedded": 0, "failed": 0, "left": 3}
    assert folder_rows(small) == {}


# --------------------------------------------------------------------------------------------------
# What it can reach
# --------------------------------------------------------------------------------------------------


def test_no_module_of_the_current_folder_runs_whatever_the_temporary_folder_is(
    cli, patched, tmp_path
):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "red.png").write_bytes(RED)
    names = ["types", "queue", "json", "pickle", "struct", "requests", "numpy", "PIL", "torch"]
    for name in [*names, "generate_embeddings", "sitecustomize"]:
        (folder / f"{name}.py").write_text("open('planted', 'a').write(__name__)\n")
    # As tqdm does on macOS, where that starts one more Python, with the whole environment
    script = patched("""
def embed_all(*arguments, before=script.embed_all):
    import multiprocessing
    multiprocessing.get_context("spawn").RLock()
    return before(*arguments)
script.embed_all = embed_all
""")
    long = tmp_path / ("x" * 120)
    run = cli("--local", ".", cwd=folder, script=script, cold=True, TMPDIR=long)
    assert (run.code, run.counts["embedded"]) == (0, 1), run.err
    assert not (folder / "planted").exists()


@LINUX
def test_a_decoder_gets_nothing_of_the_environment_but_what_python_needs(monkeypatch):
    secrets = ("SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY", "AWS_SECRET_ACCESS_KEY")
    for name in (*secrets, "PYTHONWARNINGS", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "ignore")
    decoder = Decoder()
    decoder.decode(RED)
    given = process_of(decoder).environ()
    end(decoder)
    assert given["PYTHONWARNINGS"] == given["LD_LIBRARY_PATH"] == "ignore"
    assert not set(secrets) & set(given)
    assert set(given) <= {*os.environ, *script.DECODER_SETTINGS}


@LINUX
def test_a_decoder_opens_nothing_and_leaves_no_core(decoder):
    process = process_of(decoder)
    assert process.rlimit(psutil.RLIMIT_NOFILE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert "NoNewPrivs:\t1" in Path(f"/proc/{process.pid}/status").read_text()


REACH = """
import ctypes, os, signal, socket
import generate_embeddings as script

libc = ctypes.CDLL(None, use_errno=True)
secret = ctypes.create_string_buffer(b"a secret")
other = os.fork()
if not other:
    signal.pause()

class Part(ctypes.Structure):
    _fields_ = [("where", ctypes.c_void_p), ("length", ctypes.c_size_t)]

def look_into(pid):
    copy = ctypes.create_string_buffer(8)
    here, there = (Part(ctypes.addressof(place), 8) for place in (copy, secret))
    if libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "refused")
    assert copy.raw == b"a secret"

attempts = {
    "read a file": lambda: open("one").close(),
    "write a file": lambda: open("new", "w").close(),
    "list a folder": lambda: os.listdir("."),
    "make a socket": lambda: socket.socket().close(),
    "empty a file": lambda: os.truncate("one", 0),
    "move a file": lambda: os.rename("one", "moved"),
    "delete a file": lambda: os.unlink("two"),
    "make a folder": lambda: os.mkdir("folder"),
    "run a program": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
    "look into another process": lambda: look_into(other),
}

def possible():
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
            done.append(name)
        except OSError:
            pass
    return done

os.chdir(sys.argv[1] + "/free")
free = possible()
os.chdir(sys.argv[1] + "/shut")
has_landlock = libc.syscall(444, None, 0, 1) > 0
script.shut_in()
shut = possible()
os.kill(other, 9)
print(json.dumps([list(attempts), free, shut, has_landlock]))
"""


@LINUX
def test_a_decoder_that_an_image_took_over_is_shut_in(tmp_path):
    for folder in ("free", "shut"):
        (tmp_path / folder).mkdir()
        for file in ("one", "two"):
            (tmp_path / folder / file).touch()
    all_of_them, free, shut, has_landlock = alone(REACH, tmp_path)
    assert free == all_of_them
    assert shut == ([] if has_landlock else all_of_them[4:])


# --------------------------------------------------------------------------------------------------
# What an image may cost
# --------------------------------------------------------------------------------------------------


def cost(decoder, data):
    """What a decoder says of a file; the MB that its process holds at most, and the seconds of a
    core that it takes."""
    process = process_of(decoder)
    before, after, held = sum(process.cpu_times()[:2]), 0.0, 0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(decoder.decode, data)
        while not answer.done():
            with contextlib.suppress(psutil.Error):  # it was ended meanwhile
                held = max(held, process.memory_info().rss)
                after = max(after, sum(process.cpu_times()[:2]))
            time.sleep(0.005)
    return answer.exception(), held / 2**20, after - before


def claiming(jpeg, width, height):
    """A JPEG whose frame header claims another size."""
    at = next(i for i in range(len(jpeg)) if jpeg[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def claims(jpeg):
    """Small files that claim 400 megapixels (WebP: its most, 268), name -> bytes."""
    packed = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    lossless = b"VP8L" + struct.pack("<I", 30) + b"\x2f" + packed + bytes(25)
    lossy = struct.pack("<I", 40)[:4] + b"\x10\x02\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(30)
    return {
        "png": png((20000, 20000), 8, 2, [bytes(60000)] * 20),
        "gif": b"GIF89a"
        + struct.pack("<HHBBB", 20000, 20000, 0x80, 0, 0)
        + bytes(6)
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 20000, 20000, 0)
        + b"\x02\x02\x4c\x01\0;",
        "bmp": bmp((20000, 20000)),
        "tiff": tiff((20000, 20000), bytes(1000)),
        "jpeg": claiming(jpeg, 20000, 20000),
        "lossless webp": b"RIFF" + struct.pack("<I", 42) + b"WEBP" + lossless,
        "lossy webp": b"RIFF" + struct.pack("<I", 52) + b"WEBPVP8 " + lossy,
    }


@pytest.mark.parametrize("name", claims(b"\xff\xc0" + bytes(9)))
def test_an_image_that_claims_far_too_many_pixels_is_not_decoded(decoder, cat, name):
    refusal, megabytes, seconds = cost(decoder, claims(saved(cat, "JPEG"))[name])
    assert isinstance(refusal, ImageError)
    assert str(refusal) == TOO_MUCH
    assert megabytes < 200
    assert seconds < 2


PUZZLES = {
    "comments": b"<!-- a -->" * 60 + b"text",
    "prologs": b"<?a?>" * 60 + b"text",
    "doctypes": b"<!doctype a [] >" * 60 + b"text",
    "spaces": b" " * 65_000 + b"text",
    "open comments": b"<!-- " * 13000,
    "brackets": b"[" * 65536,
}


@pytest.mark.parametrize("data", PUZZLES.values(), ids=PUZZLES)
def test_no_text_is_puzzled_over_for_long(decoder, data):
    assert "not an image" in refused(decoder, data)


def large_tile():
    """A TIFF of 1,000 pixels a side, in one tile of 46,000."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(2018)) + packer.flush()
    tile = {"t322": 46_000, "t323": 46_000, "t324": 8, "t325": len(packed)}
    return tiff((1000, 1000), packed, t259=8, **tile)


def many_segments():
    data = saved(Image.new("RGB", (64, 64)), "JPEG")
    return data[:2] + b"\xff\xe9\0\2" * 5_000_000 + data[2:]


def many_chunks():
    data = saved(Image.new("RGB", (32, 32)), "PNG")
    return data[:33] + chunk(b"IDAT", b"") * 4_000_000 + data[33:]


def large_webp():
    """108 megapixels. libwebp gets memory to open it, not to decode it, and calls it broken."""
    shades = Image.linear_gradient("L").resize((12_000, 9_000), Image.Resampling.NEAREST)
    image = Image.merge("RGB", [shades, shades.transpose(Image.Transpose.ROTATE_180), shades])
    return saved(image, "WEBP", lossless=True, method=0, quality=0)


HOSTILE = {
    large_tile: (TOO_MUCH, BROKEN),  # libtiff calls it broken where it only lacks memory
    large_webp: (TOO_MUCH,),
    many_segments: (TOO_SLOW,),
    many_chunks: (TOO_SLOW,),
}


@LINUX
@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_a_file_that_asks_for_too_much_is_given_up_and_the_next_is_well(decoder, cat, make):
    good = saved(cat, "PNG")
    levels = decoder.decode(good)
    refusal, megabytes, seconds = cost(decoder, make())
    assert str(refusal) in HOSTILE[make]
    assert megabytes < DECODE_MB + 150
    assert seconds < DECODE_SECONDS + 2
    assert np.array_equal(decoder.decode(good), levels)


@LINUX
def test_the_seconds_of_an_image_count_from_its_start(monkeypatch):
    """A decoder that has worked for longer than one image may take is as good as new."""
    started = "sys.exit(decoder"
    assert started in script.RUN_DECODER
    shorter = script.RUN_DECODER.replace(started, f"decoder.DECODE_SECONDS = 1\n{started}")
    monkeypatch.setattr(script, "RUN_DECODER", shorter)
    decoder = Decoder()
    image = saved(Image.effect_noise((1500, 1500), 90), "PNG")  # takes 0.1 s
    assert is_well(decoder)
    process = process_of(decoder)
    while sum(process.cpu_times()[:2]) < 3:
        decoder.decode(image)
    assert process_of(decoder) == process
    end(decoder)


def flat(mode, kind, size=(8000, 6250), **options):
    return lambda: saved(Image.new(mode, size), kind, **options)


HONEST = {
    "RGB PNG": flat("RGB", "PNG"),
    "RGBA PNG": flat("RGBA", "PNG"),
    "gray PNG of 16 bits": flat("I;16", "PNG"),
    "palette PNG with alpha": flat("P", "PNG", transparency=0),
    "lossless WebP": flat("RGB", "WEBP", lossless=True, method=0),
    "WebP": flat("RGB", "WEBP", method=0),
    "AVIF": flat("RGB", "AVIF", speed=10),
    "JPEG of 128 megapixels": flat("RGB", "JPEG", size=(12_800, 10_000)),
}


@LINUX
@pytest.mark.parametrize("make", HONEST.values(), ids=HONEST)
def test_an_honest_image_of_50_megapixels_is_decoded(decoder, make):
    assert decoder.decode(make()).shape == (224, 224, 3)
