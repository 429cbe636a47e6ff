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
import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import uuid
from importlib.metadata import version

import pytest
from conftest import FOLDER_FILE, REPO, SCRIPT, SMALL, STAMPED, Cli, model_settings, wait_until

import generate_embeddings as script


@pytest.fixture(scope="module")
def twenty_five(photos, tmp_path_factory):
    """A folder with 25 images."""
    folder = tmp_path_factory.mktemp("album")
    for n in range(25):
        (folder / f"{n}.jpg").write_bytes(photos[SMALL[n % 3]])
    return folder


@pytest.fixture(scope="module")
def piped(twenty_five, tiny, tmp_path_factory):
    """A run on the twenty_five without a terminal."""
    run = Cli(model_settings(tiny), tmp_path_factory.mktemp("cwd"))
    return run("--local", twenty_five)


# Help


FLAGS = "--limit --client --local --workers --batch-size --dtype --device --shard --retry-failed"
FLAGS += " --search --gallery --dry-run --verbose --version --help"


def test_help_explains_every_flag_and_exit_code():
    text = script.parser().format_help()
    found = re.findall(r"(?m)^  (?:-\w, )?(--[\w-]+).*\s+\w", text)
    assert sorted(found) == sorted(FLAGS.split())
    assert re.search(r"(?is)exit codes?\b.*\b0\b.*\b1\b.*\b2\b.*\b130\b.*\b143\b", text)


def test_many_cores_ask_no_host_for_hundreds_of_images(monkeypatch):
    monkeypatch.setattr(script, "cores", lambda: 99)
    assert script.read_flags([])["workers"] == 64


def test_version_says_what_a_bug_report_needs(cli):
    run = cli("--version", CLIP_MODEL=None)
    assert run.code == 0
    for part in (script.VERSION, script.MODEL_ID, script.MODEL_REVISION, version("torch")):
        assert part in run.out
    assert "bfloat16" in run.out


@pytest.mark.parametrize("what", ["help", "nothing to do", "a dry run"])
def test_no_heavy_library_is_imported_for(cli, twenty_five, piped, what):
    arguments = {"help": ["--help"], "nothing to do": ["--local", twenty_five]}
    arguments["a dry run"] = ["--local", twenty_five, "--dry-run", "--retry-failed"]
    run = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, *arguments[what]],
        env=cli.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "supabase", "httpx", "huggingface_hub"})
    assert (what == "nothing to do") == run.stderr.rstrip().endswith(" nothing to do")
    assert (what == "help") == run.stdout.startswith("usage: ")


# Usage errors


NO_SHARDS = ("0/4", "5/4", "4", "1/0", "-1/4", "1/2/3", "1/", "", "\N{ARABIC-INDIC DIGIT ONE}/4")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *(
            (["--limit", text], f"{text!r} is not a whole number of 1 or more")
            for text in ("0", "-1", "ten", "1.5", "\N{ARABIC-INDIC DIGIT THREE}")
        ),
        (["--limit"], "--limit"),
        (["--workers", "0"], "--workers"),
        (["--batch-size", "0"], "--batch-size"),
        (["--lim", "3"], "--lim 3"),
        (["--device", "tpu"], "--device"),
        (["--dtype", "int8"], "--dtype"),
        (["--gallery", "page.txt"], "page.txt"),
        (["--gallery", "no/such/page.html"], "no/such/page.html"),
        (["--local", ".", "--shard", "1/2"], "--client SUBFOLDER"),
        *(([f"--shard={text}"], "not a part like 1/4, 2/4, 3/4 or 4/4") for text in NO_SHARDS),
    ],
)
def test_a_usage_error_names_the_flag_or_its_value(capsys, arguments, named):
    with pytest.raises(SystemExit) as ended:
        script.read_flags(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert named in said.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("acme", "Acme Mugs"),
        ("ACME MUGS", "Acme Mugs"),
        ("Acme Mgus", "Acme Mugs"),
        ("summer", "acme/summer"),
        ("Globex Ltd", ""),
        ("a", ""),
        ("", ""),
    ],
)
def test_a_near_name_is_one_that_was_meant(name, near):
    assert script.near_name(name, ["Acme Mugs", "Acme Mugs and Cups", "acme/summer"]) == near


@pytest.mark.parametrize(
    "arguments", [["--limit", "0"], ["--local", "no/such/folder"], ["--local", str(SCRIPT)]]
)
def test_a_usage_error_is_one_line_and_exit_2(cli, arguments):
    run = cli(*arguments)
    error = run.err.splitlines()[-1]
    assert (run.code, run.out) == (2, "")
    assert run.err.count("error:") == error.count("error:") == 1
    assert arguments[-1] in error


# Dry run


def test_a_dry_run_on_the_database_loads_no_model_and_writes_nothing(cli, stack, tmp_path):
    ids = sorted(uuid.uuid4() for _ in range(7))
    stack.add_assets((i, f"https://images.invalid/{i}.jpg", "x") for i in ids)
    stack.sql(
        "insert into product_embeddings (asset_id, embedding, model_version) select id, "
        "array_fill(0.1, array[512])::extensions.vector, 'another' from assets limit 2"
    )
    tables = ("assets", "product_embeddings", "product_embedding_failures")
    dump = "select t::text, xmin::text from {} t order by 1"
    before = [stack.sql(dump.format(table)) for table in tables]
    run = cli("--dry-run", "--limit", "6", CLIP_MODEL=tmp_path)
    after = [stack.sql(dump.format(table)) for table in tables]
    assert run.code == 0, run.err
    assert run.out.splitlines()[0].startswith("Would embed 6 ")
    shown = re.findall(r"[0-9a-f-]{36}(?=  )", run.out)
    assert shown == [str(i) for i in ids[: len(shown)]]
    assert 3 <= len(shown) <= 6
    assert before == after


def test_a_dry_run_on_a_folder_loads_no_model_and_writes_nothing(cli, twenty_five, piped, tmp_path):
    def files():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}

    folder = shutil.copytree(twenty_five, tmp_path / "copy")
    (folder / "new.jpg").write_bytes((folder / "0.jpg").read_bytes())
    before = files()
    beyond = 10**20  # any catalog, and what C takes for a number
    run = cli("--local", folder, "--dry-run", "--limit", beyond, CLIP_MODEL=tmp_path / "none")
    assert run.code == 0, run.err
    assert run.out.splitlines() == ["Would embed 1 image as tiny", "  new.jpg"]
    assert files() == before


# Output


def test_without_a_terminal_there_are_stamped_lines_the_first_after_10_images(piped):
    assert all(map(STAMPED.match, piped.err.splitlines())), piped.err
    assert re.findall(r"\b(\d+)/25 done", piped.err)[0] == "10"


def test_the_report_ends_with_a_line_for_programs(piped):
    assert piped.noise == []
    assert piped.out.startswith("Embedded")  # nothing of the libraries either
    last = piped.out.splitlines()[-1]
    assert last.startswith("embedded=25 failed=0 left=0 attempted=25")
    assert "--gallery" not in piped.err  # which is said to people alone
    for word in ("Embedded", "Failed", "Left", "Elapsed"):
        assert re.search(rf"(?m)^{word}\b", piped.out)


def test_a_run_says_what_there_is_before_it_starts(cli, photos, tmp_path):
    for name in ("a", "c", "d"):
        (tmp_path / f"{name}.jpg").write_bytes(photos["flower.jpg"])
    (tmp_path / "b.jpg").write_bytes(b"broken")
    first = cli("--local", tmp_path, "--limit", 3, "-v")
    assert first.err.splitlines()[0].endswith(" 4 images: 4 to do")
    assert " b.jpg: decode: " in first.err
    assert "c.jpg" not in first.err  # what went well
    second = cli("--local", tmp_path, "--dry-run")
    counts = " 4 images: 2 done, 2 to do, of which 1 failed before"
    assert second.err.splitlines()[0].endswith(counts)


def test_products_are_shown_by_their_titles(cli, stack):
    stack.reset("bigint")
    stack.sql_as_editor("""
        create or replace function public.embedding_sources()
        returns table (id bigint, image text, client text, title text, link text)
        language sql stable as $$
            select id, image_url, client_name, 'Mug ' || repeat('x', 300), null::text from assets
        $$""")
    stack.reload_schema()
    stack.add_assets([(7, "nowhere.jpg", "acme")])
    shown = f"7  Mug {'x' * 24}...{'x' * 28}  nowhere.jpg"
    for flags in (["--dry-run"], ["--limit", "1"]):
        assert f"  {shown}\n" in cli(*flags).out


def test_names_from_outside_reach_the_screen_without_control_characters(cli, photos, tmp_path):
    folder = tmp_path / "\x1b]0;owned\x07\nerror: forged"
    folder.mkdir()
    forged = "\nembedded=9 failed=0 left=0 attempted=9"
    for name in ("\x1b[2Jred", "\x9b31m", forged, "\r", "\u202e"):
        (folder / f"{name}.jpg").write_bytes(b"broken")
    for flags in (["--dry-run"], ["-v"]):
        run = cli("--local", folder, *flags)
        shown = run.out + run.err
        assert "[2Jred.jpg" in shown
        assert all(c.isprintable() for c in shown.replace("\n", ""))
        assert run.noise == []
    assert run.counts["failed"] == 5
    assert run.out.count("\nembedded=") == 1
    for path in folder.iterdir():
        path.unlink()
    run = cli("--local", folder)
    assert run.code == 2
    assert run.err.splitlines() == [run.error]
    assert run.error.isprintable()


def test_on_a_terminal_there_is_one_progress_bar_and_no_noise(cli, photos, tmp_path):
    columns = 80
    for n in range(12):
        (tmp_path / f"{n}.jpg").write_bytes(photos[SMALL[n % 3]])
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    command = cli.command(["--local", tmp_path])
    with subprocess.Popen(
        command, env=cli.environment(TERM="xterm"), stdin=theirs, stdout=theirs, stderr=theirs
    ):
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(ours, 4096):
                seen += piece
    os.close(ours)
    before, report = seen.decode().replace("\r\n", "\n").split("Embedded", 1)
    drawn = [piece for piece in re.split(r"[\r\n]", before) if piece.strip()]
    bars = [piece for piece in drawn if "%|" in piece]
    where = f"vectors go to {tmp_path / FOLDER_FILE}"
    lines = ["12 images: 12 to do", where, "loading the model"]
    assert [piece for piece in drawn if piece not in bars] == lines
    bar = re.compile(r" *\d+%\|.*\d+/12 \[\d\d:\d\d<.*images.*\]")
    assert all(map(bar.fullmatch, bars)), bars
    assert all(len(bar) < columns for bar in bars), "the last column wraps on some terminals"
    counts, then = report.splitlines()[-2:]
    assert counts.startswith("embedded=12 ")
    assert "--gallery" in then


def test_a_defect_is_one_line_and_no_exit_code_of_failed_images(cli, stack, tmp_path):
    (tmp_path / "supabase.py").write_text("{}['gone']")
    run = cli(PYTHONPATH=tmp_path)
    assert run.code == 2
    assert "unexpected KeyError" in run.error


@pytest.fixture
def in_shell(cli, twenty_five):
    """Runs the script on the twenty_five by a shell, with what follows the command there."""

    def run(redirection, *flags):
        command = " ".join(map(str, cli.command(["--local", twenty_five, *flags])))
        return subprocess.run(
            ["sh", "-c", f"{command} {redirection}"],
            env=cli.environment(),
            cwd=cli.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize("stdout", [">&-", "> /dev/full"])
def test_a_stdout_that_takes_nothing_does_not_change_the_exit_code(in_shell, stdout):
    assert in_shell(stdout, "--limit", "1").returncode == 0
    assert in_shell(stdout, "--dry-run").returncode == 0


@pytest.mark.parametrize(
    "stderr", ["2>&- > report", "2> /dev/full > report", "2>&1 > report | true"]
)
def test_a_stderr_that_takes_nothing_stops_no_run(cli, in_shell, twenty_five, stderr):
    (twenty_five / FOLDER_FILE).unlink(missing_ok=True)
    run = in_shell(stderr)
    assert (run.returncode, run.stderr) == (0, "")
    assert "embedded=25 failed=0" in (cli.folder / "report").read_text()


@pytest.mark.parametrize("flag", ["--dry-run", "--retry-failed"])
def test_a_reader_that_leaves_early_causes_no_error(in_shell, piped, flag):
    lines = in_shell("| true", flag).stderr.splitlines()
    assert all(STAMPED.match(line) for line in lines), lines


def test_ctrl_c_while_python_imports_shows_no_traceback(cli, tmp_path):
    marker = tmp_path / "importing"
    (tmp_path / "dotenv.py").write_text(
        f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(60)\n"
    )
    run = cli.start("--help", PYTHONPATH=tmp_path)
    wait_until(marker.exists)
    run.send_signal(signal.SIGINT)
    end = run.finish(20)
    assert end.code == 130
    assert end.err == ""


# Missing packages


@pytest.mark.parametrize(
    "package", ["numpy", "requests", "PIL", "dotenv", "tqdm", "supabase", "safetensors", "torch"]
)
def test_a_missing_package_is_one_line(cli, photos, tmp_path, package):
    blocked = tmp_path / "blocked.py"
    blocked.write_text(
        f"import runpy, sys\nsys.modules[{package!r}] = None\n"
        f"sys.path.insert(0, {str(REPO)!r})\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    (tmp_path / "a.jpg").write_bytes(photos["flower.jpg"])
    settings = {"SUPABASE_URL": "http://127.0.0.1:9", "SUPABASE_SECRET_KEY": "sb_secret_abc"}
    source = [] if package == "supabase" else ["--local", tmp_path]
    run = cli(*source, script=blocked, **settings)
    assert run.code == 2
    assert package in run.error
    assert "pip install -r requirements.txt" in run.error
    assert run.noise == [run.error]
    if package == "torch":
        assert "pip install" in cli("--version", script=blocked).error
