"""The command line: flags, exit codes, what a person sees."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import uuid

import pytest
from conftest import REPO, SCRIPT, Cli, wait_until

STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
SMALL = ("flower.jpg", "china.jpg", "rocket.jpg")


def tree(folder):
    """All that is in a folder: path -> bytes and time of change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def album(photos, tmp_path_factory):
    """A folder with 25 images."""
    folder = tmp_path_factory.mktemp("album")
    for n in range(25):
        (folder / f"{n}.jpg").write_bytes(photos[SMALL[n % 3]])
    return folder


@pytest.fixture(scope="module")
def piped(album, tiny, tmp_path_factory):
    """A run on the album without a terminal."""
    run = Cli({"CLIP_MODEL": str(tiny)}, tmp_path_factory.mktemp("cwd"))
    return run("--local", album)


# Help


@pytest.fixture(scope="module")
def help_text(tmp_path_factory):
    return Cli({}, tmp_path_factory.mktemp("cwd"))("--help").out


@pytest.mark.parametrize(
    "flag",
    [
        "--limit",
        "--client",
        "--local",
        "--workers",
        "--dry-run",
        "--verbose",
        "-v",
        "--retry-failed",
    ],
)
def test_help_explains_every_flag(help_text, flag):
    assert re.search(rf"(?m)^  .*{flag}\b.*", help_text)


def test_help_names_every_exit_code(help_text):
    assert re.search(r"(?is)exit codes?\b.*\b0\b.*\b1\b.*\b2\b.*\b130\b.*\b143\b", help_text)


def test_help_imports_no_heavy_library(cli):
    run = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, "--help"],
        env=cli.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.split("|")[-1].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers", "supabase", "httpx", "huggingface_hub"})


# Usage errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--limit", "0"], "--limit"),
        (["--limit", "-1"], "--limit"),
        (["--limit", "ten"], "--limit"),
        (["--limit", "1.5"], "--limit"),
        (["--limit"], "--limit"),
        (["--workers", "0"], "--workers"),
        (["--workers", "many"], "--workers"),
        (["--lim", "3"], "--lim"),
        (["--dry"], "--dry"),
        (["--nonsense"], "--nonsense"),
        (["photos"], "photos"),
        (["--local", "no/such/folder"], "no/such/folder"),
        (["--local", str(SCRIPT)], SCRIPT.name),
    ],
)
def test_a_usage_error_is_one_line_and_exit_2(cli, arguments, named):
    run = cli(*arguments)
    errors = [line for line in run.err.splitlines() if "error:" in line]
    assert run.code == 2
    assert run.out == ""
    assert len(errors) == 1
    assert errors[0] == run.err.splitlines()[-1]
    assert named in errors[0]


def test_a_limit_beyond_any_catalog_is_no_limit(cli, album):
    run = cli("--local", album, "--dry-run", "--limit", "99999999999999999999")
    assert run.code == 0
    assert run.out.startswith("Would embed 25 assets")


# Dry run


def test_a_dry_run_on_the_database_loads_no_model_and_writes_nothing(cli, stack, tmp_path):
    ids = sorted(uuid.uuid4() for _ in range(7))
    stack.add_assets((i, f"https://images.invalid/{i}.jpg", "x") for i in ids)
    stack.sql(
        "insert into product_embeddings (asset_id, embedding, model_version) select id, "
        "array_fill(0.1, array[512])::vector, 'another' from assets limit 2"
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


def test_a_dry_run_on_a_folder_loads_no_model_and_writes_nothing(cli, album, piped, tmp_path):
    assert piped.code == 0
    (album / "new.jpg").write_bytes((album / "0.jpg").read_bytes())
    try:
        before = tree(album)
        run = cli("--local", album, "--dry-run", CLIP_MODEL=tmp_path)
        assert run.code == 0
        assert run.out.splitlines()[0].startswith("Would embed 1 ")
        assert "new.jpg" in run.out
        assert tree(album) == before
    finally:
        (album / "new.jpg").unlink()


# Output


def test_without_a_terminal_there_is_a_stamped_line_every_10_images(piped):
    lines = [line for line in piped.err.splitlines() if STAMPED.match(line)]
    done = [re.search(r"\b(\d+)/25\b", line) for line in lines]
    assert [int(found[1]) for found in done if found] == [10, 20]
    assert len(piped.err.splitlines()) == len(lines), piped.err


def test_the_report_ends_with_a_line_for_programs(piped):
    last = piped.out.splitlines()[-1]
    assert last.startswith("embedded=25 failed=0 left=0 attempted=25")
    for word in ("Embedded", "Failed", "Left", "Elapsed"):
        assert re.search(rf"(?m)^{word}\b", piped.out)


def terminal(cli, arguments, columns):
    """What a run shows on a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    run = subprocess.Popen(
        cli.command(arguments),
        env=cli.environment(TERM="xterm"),
        cwd=cli.folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:
        pass  # how Linux says that the other end is closed
    finally:
        os.close(ours)
    run.wait(60)
    return seen.decode().replace("\r\n", "\n")


def test_on_a_terminal_there_is_one_progress_bar_and_no_noise(cli, photos, tmp_path):
    for n in range(12):
        (tmp_path / f"{n}.jpg").write_bytes(photos[SMALL[n % 3]])
    shown = terminal(cli, ["--local", tmp_path], columns=100)
    before_report, report = shown.split("Embedded", 1)
    drawn = [piece for piece in re.split(r"[\r\n]", before_report) if piece.strip()]
    where, loading, *bars = drawn
    assert where == f"vectors go to {tmp_path / 'product_embeddings.sqlite3'}"
    assert loading == "loading the model ..."
    assert all("img" in piece for piece in bars), drawn
    assert re.search(r"\d+%\|.*\d+/12 \[\d\d:\d\d<.*img/?s?.*failed=0", drawn[-1])
    assert before_report.count("\n") <= 2
    assert report.splitlines()[-1].startswith("embedded=12 ")


def test_a_defect_is_one_line_and_no_exit_code_of_failed_images(cli, stack, tmp_path):
    (tmp_path / "supabase.py").write_text("{}['gone']")
    run = cli(PYTHONPATH=tmp_path)
    assert run.code == 2
    assert "unexpected KeyError" in run.error


@pytest.fixture
def in_shell(cli, album):
    """Runs the script on the album by a shell, with what follows the command there."""

    def run(redirection, *flags):
        command = " ".join(map(str, cli.command(["--local", album, *flags])))
        return subprocess.run(
            ["sh", "-c", f"{command} {redirection}"],
            env=cli.environment(),
            cwd=cli.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_a_closed_stdout_does_not_change_the_exit_code(in_shell):
    assert in_shell(">&-", "--dry-run").returncode == 0


def test_a_closed_stderr_stops_no_run(in_shell, album):
    (album / "product_embeddings.sqlite3").unlink(missing_ok=True)
    run = in_shell("2>&-")
    assert run.returncode == 0
    assert "embedded=25 failed=0" in run.stdout


def test_a_reader_that_leaves_early_causes_no_traceback(in_shell):
    assert in_shell("| true", "--dry-run").stderr == ""


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
    "package", ["numpy", "requests", "PIL", "dotenv", "tqdm", "supabase", "transformers", "torch"]
)
def test_a_missing_package_is_one_line(cli, album, tmp_path, package):
    blocked = tmp_path / "blocked.py"
    blocked.write_text(
        f"import runpy, sys\nsys.modules[{package!r}] = None\n"
        f"sys.path.insert(0, {str(REPO)!r})\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    (album / "product_embeddings.sqlite3").unlink(missing_ok=True)
    settings = {
        "SUPABASE_URL": "http://127.0.0.1:9",
        "SUPABASE_SERVICE_ROLE_KEY": "sb_secret_abc",
        "CLIP_MODEL": cli.settings["CLIP_MODEL"],
    }
    source = [] if package == "supabase" else ["--local", album, "--limit", 1]
    run = cli(*source, script=blocked, env=settings)
    assert run.code == 2
    assert package in run.error
    assert "pip install -r requirements.txt" in run.error
    assert [line for line in run.err.splitlines() if not STAMPED.match(line)] == [run.error]
