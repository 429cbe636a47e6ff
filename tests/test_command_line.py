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


NO_SHARDS = [
    *(
        "0/4",
        "5/4",
        "4",
        "a/b",
        "1/0",
        "0/0",
        "-1/4",
        "1/-4",
        "1/2/3",
        "1.5/4",
        "/4",
        "1/",
        "",
        " ",
    ),
    "\N{ARABIC-INDIC DIGIT ONE}/4",  # a digit, but not ours
]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--limit", "0"], "argument --limit: '0' is not a whole number of 1 or more"),
        (["--limit", "-1"], "--limit"),
        (["--limit", "ten"], "--limit"),
        (["--limit", "1.5"], "--limit"),
        (["--limit", "\N{ARABIC-INDIC DIGIT THREE}"], "--limit"),
        (["--limit"], "--limit"),
        (["--workers", "0"], "--workers"),
        (["--batch-size", "0"], "--batch-size"),
        (["--lim", "3"], "--lim"),
        (["--limt", "3"], "did you mean --limit?"),
        (["--nonsense"], "--nonsense"),
        (["--local", ".", "--shard", "1/2"], "--client SUBFOLDER"),
        (["photos"], "photos"),
        (["--device", "tpu"], "--device"),
        (["--dtype", "int8"], "--dtype"),
        (["--gallery", "page.txt"], "page.txt"),
        (["--gallery", "no/such/page.html"], "no/such/page.html"),
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
    ("arguments", "named"),
    [
        (["--limit", "0"], "--limit"),
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
    new = twenty_five / "new.jpg"
    new.write_bytes((twenty_five / "0.jpg").read_bytes())
    try:
        before = {path: (path.read_bytes(), path.stat()) for path in twenty_five.iterdir()}
        beyond = 10**20  # any catalog, and what C takes for a number
        run = cli("--local", twenty_five, "--dry-run", "--limit", beyond, CLIP_MODEL=tmp_path)
        assert run.code == 0, run.err
        assert run.out.splitlines() == ["Would embed 1 asset as tiny", "  new.jpg"]
        after = {path: (path.read_bytes(), path.stat()) for path in twenty_five.iterdir()}
        assert [*before] == [*after]
        for path, (data, stat) in before.items():
            assert after[path][0] == data
            assert after[path][1].st_mtime_ns == stat.st_mtime_ns
    finally:
        new.unlink()


# Output


def test_without_a_terminal_there_is_a_stamped_line_every_10_images(piped):
    lines = [line for line in piped.err.splitlines() if STAMPED.match(line)]
    done = [re.search(r"\b(\d+)/25\b", line) for line in lines]
    assert {10, 20} <= {int(found[1]) for found in done if found}
    assert len(piped.err.splitlines()) == len(lines), piped.err


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
    assert first.err.splitlines()[0].endswith(" 4 assets: 4 to do")
    assert " b.jpg: decode: " in first.err
    assert "c.jpg" not in first.err  # what went well
    second = cli("--local", tmp_path, "--dry-run")
    assert second.err.splitlines()[0].endswith(" 4 assets: 2 done, 1 failed for good, 1 to do")


def test_names_from_outside_reach_the_screen_without_control_characters(cli, photos, tmp_path):
    folder = tmp_path / "\x1b]0;owned\x07\nerror: forged"
    folder.mkdir()
    for name in (
        "\x1b[2Jred",
        "\x9b31m",
        "\nembedded=9 failed=0 left=0 attempted=9",
        "\r",
        "\u202e",
    ):
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


def terminal(cli, arguments, columns, **settings):
    """What a run shows on a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    run = subprocess.Popen(
        cli.command(arguments),
        env=cli.environment(TERM="xterm", **settings),
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
    columns = 80
    for n in range(12):
        (tmp_path / f"{n}.jpg").write_bytes(photos[SMALL[n % 3]])
    shown = terminal(cli, ["--local", tmp_path], columns)
    before_report, report = shown.split("Embedded", 1)
    drawn = [piece for piece in re.split(r"[\r\n]", before_report) if piece.strip()]
    bars = [piece for piece in drawn if "%|" in piece]
    where = f"vectors go to {tmp_path / FOLDER_FILE}"
    assert [piece for piece in drawn if piece not in bars] == [
        "12 assets: 12 to do",
        where,
        "loading the model",
    ]
    bar = re.compile(r" *\d+%\|.*\d+/12 \[\d\d:\d\d<.*images.*\]")
    assert all(map(bar.fullmatch, bars)), bars
    assert all(len(bar) < columns for bar in bars), "the last column wraps on some terminals"
    assert "failed=0" in bars[-1]
    assert before_report.count("\n") <= 3
    counts, then = report.splitlines()[-2:]
    assert counts.startswith("embedded=12 ")
    assert "--gallery" in then


def test_on_a_terminal_an_error_is_broken_between_words_alone(cli):
    whole = cli(SUPABASE_URL="").error
    for columns in (40, 80):
        lines = terminal(cli, [], columns, SUPABASE_URL="").splitlines()
        assert len(lines) > 1
        assert " ".join(lines) == whole
        assert all(len(line) < columns or " " not in line for line in lines)


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


def test_a_closed_stderr_stops_no_run(in_shell, twenty_five):
    (twenty_five / FOLDER_FILE).unlink(missing_ok=True)
    run = in_shell("2>&-")
    assert run.returncode == 0
    assert "embedded=25 failed=0" in run.stdout


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
