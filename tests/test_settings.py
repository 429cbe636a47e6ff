"""Settings: from the environment and .env, and what is said of wrong ones."""

import ast
import os
import re
import shutil
import uuid
from pathlib import Path

import pytest
from conftest import CLOSED, REPO, SCRIPT

import generate_embeddings as script

GOOD = {"SUPABASE_URL": "https://abc.supabase.co", "SUPABASE_SECRET_KEY": "sb_secret_abc"}


NAMES = [name for setting in script.SETTINGS for name in setting.names]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """What the script reads of a .env and an environment, with nothing of the developer's own."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def read(content="", flags=None, encoding="utf-8", **environment):
        Path(".env").write_text(content, encoding, newline="")
        for name, value in environment.items():
            if value is not None:
                monkeypatch.setenv(name, value)
        return script.read_settings(flags or {})

    return read


# Where settings come from


@pytest.mark.parametrize(
    "content",
    [
        "SUPABASE_URL={url}\nSUPABASE_SECRET_KEY={secret}\n",
        'SUPABASE_URL="{url}"\nSUPABASE_SECRET_KEY="{secret}"',
        "SUPABASE_URL = '{url}'\nSUPABASE_SECRET_KEY = ' {secret} '\n",
        "# mine\n\nexport SUPABASE_URL={url}  # the project\nSUPABASE_SECRET_KEY={secret}\n",
        "\ufeffSUPABASE_URL={url}\r\nSUPABASE_SECRET_KEY={secret}\r\n",
        "SUPABASE_URL={url}/\nSUPABASE_SECRET_KEY={secret}\n",
        "SUPABASE_URL={url}/rest/v1\nSUPABASE_SECRET_KEY={secret}\n",
        "SUPABASE_URL={url}/rest/v1/\nSUPABASE_SECRET_KEY={secret}\n",
        "NEXT_PUBLIC_SUPABASE_URL={url}\nSUPABASE_SERVICE_ROLE_KEY={legacy}\n",
        "SUPABASE_URL=\nNEXT_PUBLIC_SUPABASE_URL={url}\nSUPABASE_SECRET_KEY={secret}\n",
        "SUPABASE_URL={url}\nSUPABASE_SERVICE_ROLE_KEY=a.b.c\nSUPABASE_SECRET_KEY={secret}\n",
    ],
    ids=[
        *("plain", "double quotes", "single quotes, spaces", "export, comments", "BOM, CRLF"),
        *("trailing slash", "rest/v1", "rest/v1/", "other names", "an empty value is none"),
        "the secret key comes first",
    ],
)
def test_a_dotenv_file_in_the_current_folder_is_read(read, content):
    url, secret, legacy = "https://abc.supabase.co", "sb_secret_abc", "eyJh.eyJp.c2ln"
    settings = read(content.format(url=url, legacy=legacy, secret=secret))
    assert settings.url == url
    assert settings.key == (secret if "{secret}" in content else legacy)


def test_the_environment_wins_over_the_file(read):
    file = f"SUPABASE_URL={CLOSED}\nSUPABASE_SECRET_KEY=sb_secret_abc\nFETCH_SECONDS=9\n"
    settings = read(file, SUPABASE_URL="https://abc.supabase.co")
    assert (settings.url, settings.fetch_seconds) == ("https://abc.supabase.co", 9.0)


def test_a_dotenv_file_beside_the_script_is_read_where_the_current_folder_has_none(
    cli, stack, tmp_path
):
    stack.add_assets([(uuid.uuid4(), "https://images.invalid/1.jpg", "x")])
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    copy = shutil.copy(SCRIPT, there)
    beside = f"SUPABASE_URL={stack.url}\nSUPABASE_SECRET_KEY={stack.secret_key}\n"
    (there / ".env").write_text(beside)
    run = cli("--dry-run", env={}, cwd=here, script=copy)
    assert run.out.startswith("Would embed 1 "), run.err


def test_a_dotenv_file_in_the_current_folder_hides_the_one_beside_the_script(
    read, tmp_path, monkeypatch
):
    there = tmp_path / "there"
    there.mkdir()
    (there / ".env").write_text("SUPABASE_SECRET_KEY=sb_secret_abc\n")
    monkeypatch.setattr(script, "HERE", there)
    missing = rf"SUPABASE_SECRET_KEY is not set: put it into {re.escape(str(tmp_path / '.env'))}"
    with pytest.raises(script.RunError, match=missing):
        read("SUPABASE_URL=https://abc.supabase.co\n")


def test_where_url_and_key_came_from_is_said_where_that_is_two_places(read, tmp_path, caplog):
    # A folder's .env must not get the environment's key in silence
    caplog.set_level("INFO")
    read(f"SUPABASE_URL={GOOD['SUPABASE_URL']}\n", SUPABASE_SECRET_KEY="sb_secret_abc")
    said = f"SUPABASE_URL (from {tmp_path / '.env'}), SUPABASE_SECRET_KEY (from the environment)"
    assert caplog.messages == [said]
    read(**GOOD)
    assert caplog.messages == [said]


@pytest.mark.parametrize("value", ["v-${HOME}", "v-$HOME", "v-${NOT_SET:-x}"])
def test_nothing_is_filled_in_where_a_value_has_a_dollar_sign(read, value):
    assert read(f"MODEL_VERSION={value}\n", **GOOD).model_version == value


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_dotenv_file_in_another_encoding_is_named(read, tmp_path, encoding):
    named = rf"{re.escape(str(tmp_path / '.env'))} can't be read.*UTF-8"
    with pytest.raises(script.RunError, match=named):
        read("SUPABASE_URL=https://x.supabase.co # é\n", encoding=encoding)


def test_nothing_of_a_dotenv_file_enters_the_environment(read, monkeypatch):
    # A file that came with a folder would else send the user's token for the hub elsewhere
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    read("HF_ENDPOINT=https://elsewhere.example\nHF_TOKEN=hf_abc\n", flags={"local": Path()})
    assert dict(os.environ) == before


# Wrong settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"SUPABASE_URL": None}, "SUPABASE_URL is not set: .*--local"),
        ({"SUPABASE_URL": "  "}, "SUPABASE_URL is not set"),
        ({"SUPABASE_SECRET_KEY": None}, "SUPABASE_SECRET_KEY is not set"),
        *(
            ({"SUPABASE_URL": url}, r"SUPABASE_URL \(from the environment\) is not like https://")
            for url in (
                "https://YOUR-PROJECT.supabase.co",
                "abc.supabase.co",
                "https://",
                "https://YOUR PROJECT.supabase.co",
                "https://supabase.com/dashboard/project/abc",
                "postgresql://postgres:pw@db.abc.supabase.co/postgres",
                "https://abc.supabase.co:port",
                "https://abc.supabase.co\nhttps://def.supabase.co",
            )
        ),
        *(
            ({"SUPABASE_SECRET_KEY": key}, r"SUPABASE_SECRET_KEY \(.*is no secret key")
            for key in ("hush-hush", "a.b", "sb_publishable_abc", "sb_secret_a b", "sb_secret_")
        ),
        (
            {"SUPABASE_SECRET_KEY": None, "SUPABASE_SERVICE_ROLE_KEY": "your-service-role-key"},
            r"SUPABASE_SERVICE_ROLE_KEY \(from the environment\) is no secret key",
        ),
        *(({"FETCH_SECONDS": wrong}, "FETCH_SECONDS .*number") for wrong in ("soon", "inf", "1e3")),
        ({"DB_RETRY_SECONDS": "-1"}, "DB_RETRY_SECONDS .*number"),
        ({"ALLOW_PRIVATE_IMAGE_HOSTS": "yes"}, "ALLOW_PRIVATE_IMAGE_HOSTS .*0 or 1"),
    ],
)
def test_a_wrong_setting_is_named(read, settings, words):
    with pytest.raises(script.RunError, match=words):
        read(**GOOD | settings)


def test_a_wrong_setting_is_one_line(cli):
    run = cli(env=GOOD, FETCH_SECONDS="soon")
    assert run.code == 2
    assert "FETCH_SECONDS (from the environment) is not a number of seconds" in run.error
    assert run.err.splitlines() == [run.error]
    assert run.out == ""


def test_a_wrong_setting_is_named_with_the_place_where_it_was_read(read, tmp_path):
    file = re.escape(str(tmp_path / ".env"))
    with pytest.raises(script.RunError, match=rf"FETCH_SECONDS \(from {file}\)"):
        read("FETCH_SECONDS=so\0on\nDB_RETRY_SECONDS=10\n", **GOOD)
    hidden = rf"DB_RETRY_SECONDS \(from the environment, which hides the one in {file}\)"
    with pytest.raises(script.RunError, match=hidden):
        read("DB_RETRY_SECONDS=10\n", **GOOD, DB_RETRY_SECONDS="long")


def test_a_dotenv_local_file_is_mentioned_where_settings_are_missing(read, tmp_path):
    with pytest.raises(script.RunError) as error:
        read()
    assert ".env.local" not in str(error.value)
    (tmp_path / ".env.local").write_text("SUPABASE_URL=https://abc.supabase.co\n")  # Next.js's
    with pytest.raises(script.RunError, match=r"\.env\.local, which is not read"):
        read()


@pytest.mark.parametrize(
    ("named", "settings"),
    [
        ("SUPABASE_URL", {"SUPABASE_URL": "sb_secret_hush"}),  # swapped
        ("SUPABASE_SECRET_KEY", {"SUPABASE_SECRET_KEY": "sb_secret_hush\nhush"}),
    ],
)
def test_a_wrong_key_is_not_shown(read, named, settings):
    with pytest.raises(script.RunError, match=named) as error:
        read(**GOOD | settings)
    assert "hush" not in str(error.value)


def test_a_key_is_not_shown_with_the_settings():
    assert "hidden" not in repr(script.Settings(key="hidden"))


def test_settings_of_the_database_are_not_looked_at_for_a_folder(read):
    assert read(flags={"local": Path()}, SUPABASE_URL="nonsense").url == script.Settings().url


# What is written about them


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_in_readme_and_example(name):
    for file in ("README.md", ".env.example"):
        assert re.search(rf"\b{name}\b", (REPO / file).read_text()), file


def test_every_message_in_the_readmes_troubleshooting_is_one_of_the_script():
    table = (REPO / "README.md").read_text().split("## Troubleshooting")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    assert len(rows) >= 4
    texts = []
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
        if isinstance(node, ast.JoinedStr):
            literals = (getattr(part, "value", "") for part in node.values)
            texts.append("".join(x if isinstance(x, str) else "\0" for x in literals))
    for row in rows:
        for message in re.findall("`(.+?)`", row):
            for piece in filter(None, re.split(r"\s*\.\.\.\s*|:$", message)):
                assert any(piece in text for text in texts), message


def test_every_flag_is_in_the_readme():
    readme = (REPO / "README.md").read_text()
    flags = set(re.findall(r"--[a-z-]+", script.parser().format_help()))
    assert [flag for flag in sorted(flags - {"--help"}) if flag not in readme] == []


def test_the_example_as_it_is_is_refused_by_name(read):
    with pytest.raises(script.RunError, match=r"SUPABASE_URL \(from "):
        read((REPO / ".env.example").read_text())
