"""Settings: from the environment and .env.

- The environment comes first, then .env in the current folder, then the one beside the script.
- A setting that is lacking or wrong is named, with the place where it was read. No key is shown.
- Nothing of a .env enters the environment, and nothing in its values is filled in.
- README.md and .env.example name each setting and flag; the messages that README names are real.
"""

import ast
import os
import re
from pathlib import Path

import pytest
from conftest import REPO, SCRIPT

import generate_embeddings as script

GOOD = {"SUPABASE_URL": "https://abc.supabase.co", "SUPABASE_SECRET_KEY": "sb_secret_abc"}
NAMES = [name for setting in script.SETTINGS for name in setting.names]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """What the script reads of a .env and an environment, with nothing of the developer's own."""
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def read(content="", flags=None, encoding="utf-8", file=".env", **environment):
        Path(file).write_text(content, encoding, newline="")
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
        "SUPABASE_URL={url}/rest/v1/\nSUPABASE_SECRET_KEY={secret}\n",
        "NEXT_PUBLIC_SUPABASE_URL={url}\nSUPABASE_SERVICE_ROLE_KEY={legacy}\n",
        "SUPABASE_URL=\nNEXT_PUBLIC_SUPABASE_URL={url}\nSUPABASE_SECRET_KEY={secret}\n",
        "SUPABASE_URL={url}\nSUPABASE_SERVICE_ROLE_KEY={legacy}\nSUPABASE_SECRET_KEY={secret}\n",
    ],
)
def test_a_dotenv_file_in_the_current_folder_is_read(read, content):
    url, secret, legacy = "https://abc.supabase.co", "sb_secret_abc", "eyJh.eyJp.c2ln"
    settings = read(content.format(url=url, legacy=legacy, secret=secret))
    assert settings.url == url
    assert settings.key == (secret if "{secret}" in content else legacy)


def test_the_environment_wins_over_the_file(read):
    file = "SUPABASE_URL=https://other.supabase.co\nFETCH_SECONDS=9\n"
    settings = read(file, **GOOD)
    assert (settings.url, settings.fetch_seconds) == (GOOD["SUPABASE_URL"], 9.0)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A .env beside the script, with all that is needed."""
    file = tmp_path / "there" / ".env"
    file.parent.mkdir()
    file.write_text("".join(f"{name}={value}\n" for name, value in GOOD.items()))
    assert SCRIPT.parent == script.HERE
    monkeypatch.setattr(script, "HERE", file.parent)
    return file


def test_the_dotenv_beside_the_script_is_read_where_the_current_folder_has_none(read, beside):
    assert read(file="env.txt").url == GOOD["SUPABASE_URL"]


@pytest.mark.parametrize(
    ("name", "content", "missing"),
    [
        (".env", f"SUPABASE_URL={GOOD['SUPABASE_URL']}\n", "SUPABASE_SECRET_KEY"),
        # Next.js's own file: that project's images are not for another project's database
        (".env.local", "A=b\n", "SUPABASE_URL"),
    ],
)
def test_a_file_in_the_current_folder_hides_the_dotenv_beside_the_script(
    read, beside, tmp_path, name, content, missing
):
    words = f"{missing} is not set: put it into {tmp_path / '.env'}, not .env.local ("
    with pytest.raises(script.RunError, match=re.escape(words)):
        read(content, file=name)


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


def test_nothing_of_a_dotenv_file_enters_the_environment(read, monkeypatch):
    # A file that came with a folder would else send the user's token for the hub elsewhere
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    read("HF_ENDPOINT=https://elsewhere.example\nHF_TOKEN=hf_abc\n", flags={"local": Path()})
    assert dict(os.environ) == before


# Wrong settings


WRONG_URLS = """
    https://YOUR-PROJECT.supabase.co
    abc.supabase.co
    https://
    https://YOUR PROJECT.supabase.co
    https://supabase.com/dashboard/project/abc
    postgresql://postgres:pw@db.abc.supabase.co/postgres
    https://abc.supabase.co:port
""".strip().splitlines()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SUPABASE_URL", None, "is not set: .*--local"),
        ("SUPABASE_URL", "  ", "is not set"),
        ("SUPABASE_SECRET_KEY", None, "is not set"),
        *(("SUPABASE_URL", url.strip(), "is not like https://") for url in WRONG_URLS),
        ("SUPABASE_URL", "https://abc.supabase.co\nhttps://def.supabase.co", "is not like"),
        ("SUPABASE_URL", "sb_secret_hush", "nor the key"),
        ("SUPABASE_SECRET_KEY", "hush-hush", "is no secret key"),
        ("SUPABASE_SECRET_KEY", "a.hush", "is no secret key"),
        ("SUPABASE_SECRET_KEY", "sb_publishable_hush", "is no secret key"),
        ("SUPABASE_SECRET_KEY", "sb_secret_hush\nhush", "is no secret key"),
        ("SUPABASE_SECRET_KEY", "sb_secret_", "is no secret key"),
        ("SUPABASE_SERVICE_ROLE_KEY", "your-service-role-key", "is no secret key"),
        ("FETCH_SECONDS", "soon", "is not a number"),
        ("FETCH_SECONDS", "inf", "is not a number"),
        ("DB_RETRY_SECONDS", "-1", "is not a number"),
        ("MODEL_VERSION", "a\x1bb", "has a control character"),
        ("ALLOW_PRIVATE_IMAGE_HOSTS", "yes", "is not 0 or 1"),
    ],
)
def test_a_wrong_setting_is_named_and_no_key_is_shown(read, name, value, words):
    settings = dict(GOOD)
    if name == "SUPABASE_SERVICE_ROLE_KEY":
        del settings["SUPABASE_SECRET_KEY"]
    settings[name] = value
    with pytest.raises(
        script.RunError, match=rf"^{name} (\(from the environment\) )?.*{words}"
    ) as error:
        read(**settings)
    assert "hush" not in str(error.value)


def test_a_wrong_setting_is_one_line(cli):
    run = cli(env=GOOD, FETCH_SECONDS="soon")
    assert (run.code, run.out) == (2, "")
    assert "FETCH_SECONDS (from the environment) is not a number of seconds" in run.error
    assert run.err.splitlines() == [run.error]


def test_a_wrong_setting_is_named_with_the_place_where_it_was_read(read, tmp_path):
    file = re.escape(str(tmp_path / ".env"))
    with pytest.raises(script.RunError, match=rf"FETCH_SECONDS \(from {file}\)"):
        read("FETCH_SECONDS=so\0on\nDB_RETRY_SECONDS=10\n", **GOOD)
    hidden = rf"DB_RETRY_SECONDS \(from the environment, which hides the one in {file}\)"
    with pytest.raises(script.RunError, match=hidden):
        read("DB_RETRY_SECONDS=10\n", **GOOD, DB_RETRY_SECONDS="long")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_dotenv_file_in_another_encoding_is_named(read, tmp_path, encoding):
    named = rf"{re.escape(str(tmp_path / '.env'))} can't be read.*UTF-8"
    with pytest.raises(script.RunError, match=named):
        read("SUPABASE_URL=https://x.supabase.co # é\n", encoding=encoding)


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
