"""The command line, and what a person sees on the terminal.

- Each flag is explained. A wrong flag or value is named in one line, with exit code 2, and where
  something near was meant, that is named too.
- What needs no heavy library does not wait for one.
- --dry-run says what would be done, and changes nothing.
- The log and the report are made for people and for programs: counts add up, nothing from outside
  controls the terminal, no library adds a line.
- Whoever closes stdout or stderr changes neither the work nor the exit code.
- A missing package, a defect and a Ctrl-C are one line at most.
"""

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import FOLDER_FILE, REPO, SCRIPT, SMALL, STAMPED, Cli, model_settings, wait_until

import generate_embeddings as script
from generate_embeddings import Asset, Embedded, Failed, Status


def fill(folder, photos, count):
    for n in range(count):
        (folder / f"{n}.jpg").write_bytes(photos[SMALL[n % 3]])


@pytest.fixture(scope="module")
def piped(photos, tiny, tmp_path_factory):
    """A run on a folder with 25 images without a terminal; and the folder."""
    folder = tmp_path_factory.mktemp("album")
    fill(folder, photos, 25)
    return Cli(model_settings(tiny), tmp_path_factory.mktemp("cwd"))("--local", folder), folder


def test_help_explains_every_flag_and_exit_code():
    text = script.flags_parser().format_help()
    explained = re.findall(r"(?m)^  (?:-\w, )?(--[\w-]+).*\s+\w", text)
    assert set(explained) == set(re.findall(r"--[a-z-]+", text))  # test_settings.py looks for each
    assert re.search(r"(?is)exit codes?\b.*\b0\b.*\b1\b.*\b2\b.*\b130\b.*\b143\b.*\b129\b", text)


@pytest.mark.parametrize(("cores", "workers"), [(1, 8), (2, 16), (99, 64)])
def test_many_cores_ask_no_host_for_hundreds_of_images(monkeypatch, cores, workers):
    monkeypatch.setattr(script, "cores", lambda: cores)
    assert script.read_flags([]) == {"workers": workers}


def test_flags_are_what_they_say():
    words = "--local shop --limit 007 --dtype bfloat16 --device mps --workers 3 --batch-size 8"
    wanted = {"local": Path.cwd() / "shop", "limit": 7, "dtype": "bfloat16", "device": "mps"}
    assert script.read_flags(words.split()) == wanted | {"workers": 3, "batch_size": 8}
    for text, shard in {"1/1": (1, 1), "2/4": (2, 4), "4/4": (4, 4)}.items():
        assert script.read_flags(["--shard", text])["shard"] == shard


def test_version_says_what_a_bug_report_needs(cli):
    run = cli("--version", CLIP_MODEL=None)
    assert run.code == 0
    python = ".".join(map(str, sys.version_info[:3]))
    assert run.out.splitlines() == [
        f"generate_embeddings.py {script.VERSION}, schema.sql {script.CONTRACT}, Python {python}",
        f"{script.MODEL_VERSION}: {script.MODEL_ID} at {script.MODEL_REVISION}",
        f"torch {version('torch')}, bfloat16: {'yes' if script.has_bfloat16() else 'no'}",
    ]


@pytest.mark.parametrize("what", ["help", "nothing to do", "a dry run"])
def test_no_heavy_library_is_imported_for(cli, piped, what):
    flags = {"help": ["--help"], "nothing to do": ["--local", piped[1]]}
    flags["a dry run"] = ["--local", piped[1], "--dry-run", "--retry-failed"]
    command = [sys.executable, "-X", "importtime", SCRIPT, *flags[what]]
    run = subprocess.run(command, env=cli.environment(), capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "supabase", "httpx", "huggingface_hub"})
    assert (what == "nothing to do") == run.stderr.rstrip().endswith(" nothing to do")
    assert (what == "help") == run.stdout.startswith("usage: ")


NUMBERS = ("0", "-1", "ten", "1.5", "\N{ARABIC-INDIC DIGIT THREE}")
WRONG = ("--workers 0", "--batch-size 0", "--device tpu", "--dtype int8")
SHARDS = ("0/4", "5/4", "4", "1/0", "-1/4", "1/2/3", "1/", "", "\N{ARABIC-INDIC DIGIT ONE}/4")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *((["--limit", text], f"{text!r} is not a whole number of 1 or more") for text in NUMBERS),
        *((text.split(), text) for text in ("--lim 3", "--limit")),
        *((text.split(), text.split()[0]) for text in WRONG),
        (["--gallery", "page.txt"], "page.txt"),
        (["--gallery", "no/such/page.html"], "no/such/page.html"),
        (["--local", ".", "--shard", "1/2"], "--client SUBFOLDER"),
        (["--gallery", "page.html", "--shard", "1/2"], "leave --shard out"),
        *(([f"--shard={text}"], "not a part like 1/4, 2/4, 3/4 or 4/4") for text in SHARDS),
    ],
)
def test_a_usage_error_names_the_flag_or_its_value(capsys, arguments, named):
    with pytest.raises(SystemExit) as ended:
        script.read_flags(arguments)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert named in said.err.splitlines()[-1]


def test_a_near_name_is_one_that_was_meant():
    near = dict.fromkeys(["acme", "ACME MUGS", "Acme Mgus"], "Acme Mugs")
    near |= {"summer": "acme/summer", " x1  ": "X1", "Globex Ltd": "", "a": "", "": ""}
    names = ["Acme Mugs", "Acme Mugs and Cups", "acme/summer", "X1"]
    assert {name: script.near_name(name, names) for name in near} == near


def test_a_dry_run_on_the_database_loads_no_model_and_writes_nothing(cli, stack, tmp_path):
    stack.sql_as_editor(
        "create or replace function embedding_sources() returns table "
        "(id uuid, image text, client text, title text, link text) language sql stable as $$ "
        "select id, image_url, client_name, case when image_url ~ '/0' then 'Mug ' || "
        "repeat('x', 300) end, null from public.assets $$"
    )
    ids = stack.add_images(f"https://images.invalid/{n}.jpg" for n in range(7))
    tables = ("assets", "product_embeddings", "product_embedding_failures")
    rows = [f"select t::text, xmin::text from {table} t order by 1" for table in tables]
    before = [stack.sql(query) for query in rows]
    run = cli("--dry-run", "--limit", "6", CLIP_MODEL=tmp_path)
    assert run.code == 0, run.err
    shown = [f"  {ids[n]}  https://images.invalid/{n}.jpg" for n in range(1, 5)]
    shown.insert(0, f"  {ids[0]}  Mug {'x' * 24}...{'x' * 28}  https://images.invalid/0.jpg")
    assert run.out.splitlines() == ["Would embed 6 assets as tiny", *shown]
    assert [stack.sql(query) for query in rows] == before
    stack.sql(
        "insert into product_embedding_failures (asset_id, model_version, image_hash, stage, "
        "reason) select id, 'tiny', embedding_image_hash(image_url), 'fetch', '' from assets"
    )
    assert cli("--dry-run").out.splitlines() == ["Would embed 7 assets as tiny", *shown]


def test_a_dry_run_on_a_folder_loads_no_model_and_makes_no_page(cli, piped, tmp_path):
    folder = shutil.copytree(piped[1], tmp_path / "copy")
    for new in ("new.jpg", "newer.jpg"):
        shutil.copy(folder / "0.jpg", folder / new)
    beyond = 10**20  # any catalog, and what C takes for a number
    run = cli("--local", folder, "--dry-run", "--limit", beyond, CLIP_MODEL=tmp_path / "none")
    assert run.code == 0, run.err
    assert run.out.splitlines() == ["Would embed 2 images as tiny", "  new.jpg", "  newer.jpg"]
    run = cli("--local", folder, "--dry-run", "--limit", 1, "--gallery", folder / "x.html")
    assert run.out.splitlines() == ["Would embed 1 image as tiny", "  new.jpg"]
    assert not (folder / "x.html").exists()


def test_the_report_line_by_line(monkeypatch):
    now = datetime(2026, 11, 30, 2, 30, 5)  # here, seven hours east of Greenwich
    utc = now - timedelta(hours=7)
    clock = SimpleNamespace(now=lambda zone=None: utc if zone else now)
    monkeypatch.setattr(script, "datetime", clock)
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: 100.0))
    shown = {0: "02:30:05", 71_999: "22:30:04", 72_000: "30 November", 259_200: "3 December"}
    assert {seconds: script.clock(seconds) for seconds in shown} == shown

    status = Status(9000, 2000, 3005, waiting=1000, next_attempt=utc + timedelta(days=3))
    again = script.Report(status, script.Settings(local=Path(), retry_failed=True)).beginning()
    assert again == "9,000 images: 2,000 done, 7,000 to do, of which 3,005 failed before"
    report = script.Report(status, script.Settings())
    when = "failed before, tried again from 3 December on"
    said = f"2,000 done, 1,000 {when}, 6,000 to do, of which 2,005 failed before"
    assert report.beginning() == f"9,000 assets: {said}"

    title = "m" * 60  # is not cut
    assets = [Asset(number, f"{number}.jpg", title=title) for number in range(60)]
    results = [Failed(asset, "fetch", "HTTP 404") for asset in assets[1:5]]
    inline = Asset(5, "data:" + "x" * 10**6)
    results += [Failed(inline, "decode", "too few pixels (1 x 1)"), Embedded(assets[6], None)]
    report.count(results[0], taken=False)
    report.count(results[-1], taken=True)
    assert report.exit_code == 0
    report.left_of.update({"a.example: no answer in time": 1, "b.example: HTTP 429": 1500})
    assert report.exit_code == 1
    for result in results[:-1]:
        report.count(result, taken=True)
    report.started = 38.74
    assert list(report.lines()) == [
        "Embedded         1",
        "Failed           5",
        "       4  fetch: HTTP 404",
        "          Nothing is at this address: correct it, or upload the image again.",
        f"          1  {title}  1.jpg",
        f"          2  {title}  2.jpg",
        f"          3  {title}  3.jpg",
        "       1  decode: too few pixels (1 x 1)",
        "          Ask for a larger image.",
        f"          5  data:{'x' * 23}...{'x' * 28}",
        f"Waiting      1,000  {when}; --retry-failed: now",
        "Left         5,994",
        "   1,500  of b.example: HTTP 429",
        "       1  of a.example: no answer in time",
        "       1  changed or gone meanwhile",
        "Elapsed      61.3s",
        "embedded=1 failed=5 left=5994 attempted=6 waiting=1000 seconds=61.3",
    ]
    for report.found, report.found_all in ((30, True), (7000, False)):
        assert report.left == report.found - 6
    for asset in assets:
        report.count(Failed(asset, "embed", f"no reason {asset}"), taken=True)
        report.left_of[f"{asset}.example"] += 1
    lines = "\n".join(report.lines())
    assert len(re.findall(r"  \d  \w+: ", lines)) == len(re.findall("  of .*example", lines)) == 50


def test_each_reason_has_advice_of_its_own():
    begins = {  # statuses, and other reasons
        "The host does not give us": (204, 302, 400, 499),
        "The host refuses us": (401, 402, 403, 451),
        "Nothing is at this address": (404, 410),
        "Ask your developer": (407, script.PRIVATE_ADDRESS, script.PRIVATE_BUCKET, script.NO_URL),
        "The host has trouble": (408, 425, 500, 599, script.NO_ANSWER, script.CONNECTION_LOST),
        "The image is not ready": (202, 423),
        "The host wants fewer": (420, 429, 430),
        "Correct the address": (script.NOT_A_URL, script.OTHER_SCHEME, script.BAD_REDIRECT),
        "Save it smaller": (script.TOO_LARGE, script.TOO_MUCH, script.TOO_SLOW),
        "The file is damaged": (script.EMPTY, script.BROKEN),
        "Ask for the image as JPEG": (script.SVG, script.JSON, script.PDF, script.OTHER_FORMAT),
    }
    for words, reasons in begins.items():
        for reason in reasons:
            told = reason if isinstance(reason, str) else f"HTTP {reason}"
            assert script.advice_on(f"{told} (a detail: {told})").startswith(words), reason


def test_without_a_terminal_the_log_has_times_and_the_report_a_line_for_programs(piped):
    run = piped[0]
    assert all(map(STAMPED.match, run.err.splitlines())), run.err
    assert re.findall(r"\b(\d+)/25 done", run.err)[0] == "10"
    assert "--gallery" not in run.err  # which is said to people alone
    report = ["Embedded", "Failed", "Left", "Elapsed", "embedded=25"]  # nothing of libraries
    assert [line.split()[0] for line in run.out.splitlines()] == report


def test_a_run_says_what_there_is_and_files_need_no_proxy(cli, patched, small):
    (small / "1é.jpg").write_bytes(b"broken")
    ascii = patched(before="sys.stdout.reconfigure(encoding='ascii')")
    run = cli("--local", small, "-v", script=ascii, ALL_PROXY="socks4://127.0.0.1:9")
    assert run.code == 1
    assert run.err.splitlines()[0].endswith(" 4 images: 4 to do")
    assert " 1é.jpg: decode: " in run.err
    assert "china.jpg" not in run.err  # what went well
    assert "          1\\xe9.jpg\n" in run.out


def test_names_from_outside_reach_the_screen_without_control_characters(cli, photos, tmp_path):
    folder = tmp_path / "\x1b]0;owned\x07\nerror: forged"
    folder.mkdir()
    forged = "\nembedded=9 failed=0 left=0 attempted=9"
    for name in ("\x1b[2Jred", "\x9b31m", forged, "\r", "\u202e", "at 9\u202fAM"):
        (folder / f"{name}.jpg").write_bytes(b"broken")
    for flags in (["--dry-run"], ["-v"]):
        run = cli("--local", folder, *flags)
        shown = run.out + run.err
        assert "[2Jred.jpg" in shown
        assert "at 9\u202fAM.jpg" in shown  # as macOS calls screenshots
        assert all(c.isprintable() for c in shown.replace("\n", "").replace("\u202f", ""))
        assert run.noise == []
    assert run.counts["failed"] == 6
    assert run.out.count("\nembedded=") == 1


def test_on_a_terminal_there_is_one_progress_bar_and_no_noise(cli, photos, tmp_path):
    fill(tmp_path, photos, 12)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (25, 80))
    run = cli.start("--local", tmp_path, TERM="xterm", terminal=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)
    shown = seen.decode().replace("\r\n", "\n")
    assert run.wait() == 0, shown
    before, report = shown.split("Embedded", 1)
    drawn = [piece for piece in re.split(r"[\r\n]", before) if piece.strip()]
    bars = [piece for piece in drawn if "%|" in piece]
    where = f"vectors go to {tmp_path / FOLDER_FILE}"
    lines = ["12 images: 12 to do", where, "loading the model"]
    assert [piece for piece in drawn if piece not in bars] == lines, shown
    bar = re.compile(r" *\d+%\|.*\d+/12 \[\d\d:\d\d<.*images.*\]")
    assert all(map(bar.fullmatch, bars)), bars
    assert max(map(len, bars)) < 80, "the last column wraps on some terminals"
    counts, then = report.splitlines()[-2:]
    assert counts.startswith("embedded=12 ")
    assert "--gallery" in then


@pytest.mark.parametrize("flag", ["--limit=1", "--dry-run"])
@pytest.mark.parametrize("end", [">&-", "> /dev/full"])
def test_a_stdout_that_takes_nothing_changes_no_exit_code(cli, piped, end, flag):
    command = " ".join(map(str, cli.command(["--local", piped[1], flag])))
    options = {"env": cli.environment(), "cwd": cli.folder, "capture_output": True, "text": True}
    run = subprocess.run(["sh", "-c", f"{command} {end}"], **options, timeout=60)
    assert run.returncode == 0
    assert all(map(STAMPED.match, run.stderr.splitlines())), run.stderr


@pytest.mark.parametrize(
    "trouble",
    [
        "os.close(2); sys.stderr = None",  # what Python makes of 2>&-
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
        "ours, theirs = os.pipe(); os.close(ours); os.dup2(theirs, 2)",
    ],
)
def test_a_stderr_that_takes_nothing_stops_no_run(cli, patched, photos, tmp_path, trouble):
    fill(tmp_path, photos, 12)
    run = cli("--local", tmp_path, script=patched(before=trouble))
    assert (run.code, run.err) == (0, "")
    assert "embedded=12 failed=0" in run.out
    assert cli("--local", tmp_path / "none", script=patched(before=trouble)) == (2, "", "")


def test_a_defect_is_one_line_and_not_the_images_fault(cli, stack, host, tmp_path):
    stack.add_images([host.url_of("/flower.jpg")])
    (tmp_path / "torch.py").write_text("raise ValueError('\\x1b[2J\\nerror: forged')")
    said = "error: unexpected ValueError: ?[2J?error: forged; -v says more"
    run = cli(PYTHONPATH=tmp_path)
    assert (run.code, run.noise) == (2, [said])
    assert run.counts == run.counts | {"attempted": 0, "left": 1}
    assert stack.failures() == {}
    run = cli.start("-v", PYTHONPATH=tmp_path)
    assert run.wait() == 2
    lines = run.err.splitlines()
    assert lines[-1] == said
    assert "Traceback (most recent call last):" in lines
    assert all(map(str.isprintable, lines))


def test_ctrl_c_while_python_imports_shows_no_traceback(cli, tmp_path):
    (tmp_path / "dotenv.py").write_text("import time\nopen('importing', 'w')\ntime.sleep(60)\n")
    run = cli.start("--help", PYTHONPATH=tmp_path)
    wait_until((cli.folder / "importing").exists)
    run.send_signal(signal.SIGINT)
    end = run.finish(20)
    assert (end.code, end.err) == (130, "")


def test_an_older_python_is_refused(cli, patched):
    run = cli("--help", script=patched(before="sys.version_info = (3, 10, 99)"))
    assert (run.code, run.out, run.noise) == (2, "", [run.error])
    assert "Python 3.11 or later is needed" in run.error


@pytest.mark.parametrize("package", ["numpy", "tqdm", "supabase", "safetensors", "torch"])
def test_a_missing_package_is_one_line(cli, photos, tmp_path, package):
    blocked = tmp_path / "blocked.py"
    blocked.write_text(
        f"import runpy, sys\nsys.modules[{package!r}] = None\n"
        f"sys.path.insert(0, {str(REPO)!r})\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    fill(tmp_path, photos, 1)
    settings = {"SUPABASE_URL": "http://127.0.0.1:9", "SUPABASE_SECRET_KEY": "sb_secret_abc"}
    source = [] if package == "supabase" else ["--local", tmp_path]
    run = cli(*source, script=blocked, **settings)
    assert run.code == 2
    assert package in run.error
    assert "pip install -r requirements.txt" in run.error
    assert run.noise == [run.error]
    if package == "torch":
        assert "pip install" in cli("--version", script=blocked).error
