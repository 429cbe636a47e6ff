"""Settings: from the environment and .env.

- The environment comes first, then .env in the current folder, then the one beside the script.
- A setting that is lacking or wrong is named, with the place where it was read. No key is shown.
- Nothing of a .env enters the environment, and nothing in its values is filled in.
- README.md and .env.example name each setting and flag; the messages that README names are real.
"""

import os
import re
from pathlib import Path

import pytest
from conftest import REPO, SCRIPT

import generate_embeddings as script

GOOD = {"SUPABASE_URL": "https://abc.supabase.co", "SUPABASE_SECRET_KEY": "sb_secret_a-b_C"}
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
            monkeypatch.setenv(name, value)
        return script.read_settings(flags or {})

    return read


@pytest.mark.parametrize(
    "content",
    [
        'SUPABASE_URL="{url}"\nSUPABASE_SECRET_KEY="{secret}"',
        "SUPABASE_URL = '{url}'\nSUPABASE_SECRET_KEY = ' {secret} '\n",
        "# mine\n\nexport SUPABASE_URL={url}  # the project\nSUPABASE_SECRET_KEY={secret}\n",
        "\ufeffSUPABASE_URL={url}\r\nSUPABASE_SECRET_KEY={secret}\r\n",
        "SUPABASE_URL={url}/rest/v1/\nSUPABASE_SECRET_KEY={secret}\nFETCH_SECONDS\n",
        "SUPABASE_URL=\nNEXT_PUBLIC_SUPABASE_URL={url}/\nSUPABASE_SERVICE_ROLE_KEY={legacy}\n",
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
    settings = read(file, FETCH_SECONDS=" ", **GOOD)  # what is empty is not set
    assert (settings.url, settings.fetch_seconds) == (GOOD["SUPABASE_URL"], 9.0)


def test_each_setting_comes_to_its_own_field(read):
    url = "http://db.shop.example:8000/base"
    given = {"SUPABASE_URL": f"{url}/rest/v1", "FETCH_SECONDS": "0.5", "DB_RETRY_SECONDS": "999999"}
    given |= {"MODEL_VERSION": "größe 2", "CLIP_MODEL": "/my models/a", "STORAGE_BUCKETS": "a, b"}
    made = read(**GOOD | given, ALLOW_PRIVATE_IMAGE_HOSTS="1")
    assert (made.url, made.fetch_seconds, made.db_retry_seconds) == (url, 0.5, 999_999)
    assert (made.model_version, made.clip_model) == ("größe 2", "/my models/a")
    assert (made.storage_buckets, made.private_hosts) == ("a, b", True)


# .env.local is Next.js's own file: that project's images are not for another project's database
@pytest.mark.parametrize("name", [".env", ".env.local"])
def test_a_file_in_the_current_folder_hides_the_dotenv_beside_the_script(
    read, tmp_path, monkeypatch, name
):
    assert SCRIPT.parent == script.HERE
    there = tmp_path / "there"
    there.mkdir()
    (there / ".env").write_text("".join(f"{name}={value}\n" for name, value in GOOD.items()))
    monkeypatch.setattr(script, "HERE", there)
    assert read(file="env.txt").url == GOOD["SUPABASE_URL"]
    words = f"SUPABASE_URL is not set: put it into {tmp_path / '.env'}, not .env.local ("
    with pytest.raises(script.RunError, match=re.escape(words)):
        read("A=b\n", file=name)


def test_where_url_and_key_came_from_is_said_where_that_is_two_places(read, tmp_path, caplog):
    # A folder's .env must not get the environment's key in silence
    caplog.set_level("INFO")
    other = {"NEXT_PUBLIC_SUPABASE_URL": "https://other.supabase.co"}  # the second name comes last
    url = GOOD["SUPABASE_URL"]
    made = read(f"SUPABASE_URL={url}\n", SUPABASE_SECRET_KEY="sb_secret_abc", **other)
    assert (made.url, made.key_source) == (url, "SUPABASE_SECRET_KEY (from the environment)")
    said = f"using SUPABASE_URL (from {tmp_path / '.env'})"
    said += " with SUPABASE_SECRET_KEY (from the environment)"
    assert caplog.messages == [said]
    read(**GOOD)
    assert caplog.messages == [said]


def test_nothing_is_filled_in_where_a_value_has_a_dollar_sign(read):
    value = "v-${HOME}-$HOME-${NOT_SET:-x}"
    assert read(f"MODEL_VERSION={value}\n", **GOOD).model_version == value


def test_nothing_of_a_dotenv_file_enters_the_environment_nor_a_folders_run_its_database(read):
    # A file that came with a folder would else send the user's token for the hub elsewhere
    before = dict(os.environ)
    file = "HF_ENDPOINT=https://elsewhere.example\nHF_TOKEN=hf_abc\nSUPABASE_URL=nonsense\n"
    assert read(file, flags={"local": Path()}).url == ""
    assert dict(os.environ) == before


TEXTS = ("MODEL_VERSION", "CLIP_MODEL", "STORAGE_BUCKETS")
WRONG = [  # a setting, what is said of it, and values
    ("SUPABASE_URL", "is not set: .*--local", "", "  "),
    ("SUPABASE_URL", "is not like https://", "abc.supabase.co", "https://", "https://a.co:65536"),
    ("SUPABASE_URL", "is not like", "https://YOUR-PROJECT.supabase.co", "https://a b.supabase.co"),
    ("SUPABASE_URL", "is not like", "https://supabase.com/dashboard/project/abc"),
    ("SUPABASE_URL", "is not like", "postgresql://postgres:pw@db.abc.supabase.co/postgres"),
    ("SUPABASE_URL", "is not like", "https://abc.supabase.co\nhttps://def.supabase.co"),
    ("SUPABASE_URL", "nor the key", "sb_secret_hush", "ftp://a.co", "https://a.co/?key=hush"),
    ("SUPABASE_SECRET_KEY", "is not set", ""),
    ("SUPABASE_SECRET_KEY", "is no secret key", "hush-hush", "a.hush", "sb_secret_hush\nhush"),
    ("SUPABASE_SECRET_KEY", "is no secret key", "sb_publishable_hush", "sb_secret_"),
    ("SUPABASE_SERVICE_ROLE_KEY", "is no secret key", "your-service-role-key"),
    ("FETCH_SECONDS", "is not a number of seconds$", "soon", "inf", "5s", "\u0663"),
    ("DB_RETRY_SECONDS", "is not a number of seconds$", "-1", "1_000", "1234567"),
    *((name, "contains a control character$", "a\x1bb", "a\nb") for name in TEXTS),
    ("ALLOW_PRIVATE_IMAGE_HOSTS", "is not 0 or 1$", "yes", "01", "2"),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_setting_is_named_and_a_key_is_not_shown(read, wrong):
    name, words, *values = wrong
    others = {"SUPABASE_SECRET_KEY": ""} if name == "SUPABASE_SERVICE_ROLE_KEY" else {}
    for value in values:
        with pytest.raises(script.RunError) as error:
            read(**GOOD | others | {name: value})
        assert re.match(rf"{name} (\(from the environment\) )?.*{words}", str(error.value))
        assert "hush" not in f"{error.value} {script.Settings(key='hush')}"


def test_a_wrong_setting_is_named_with_the_place_where_it_was_read(read, tmp_path):
    file = re.escape(str(tmp_path / ".env"))
    with pytest.raises(script.RunError, match=rf"FETCH_SECONDS \(from {file}\)"):
        read("FETCH_SECONDS=so\0on\nDB_RETRY_SECONDS=10\n", **GOOD)
    hidden = rf"DB_RETRY_SECONDS \(from the environment, which hides the one in {file}\)"
    with pytest.raises(script.RunError, match=hidden):
        read("DB_RETRY_SECONDS=10\n", **GOOD, DB_RETRY_SECONDS="long")
    with pytest.raises(script.RunError, match=r"DB_RETRY_SECONDS \(from the environment\)"):
        read("DB_RETRY_SECONDS=long\n")  # which is in the environment, too: it hides nothing


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8"])
def test_a_dotenv_file_that_can_not_be_read_is_named(read, tmp_path, monkeypatch, encoding):
    def refused(*_, **__):
        raise PermissionError

    if encoding == "utf-8":  # somebody else's file, which root may read
        monkeypatch.setattr(script.dotenv, "dotenv_values", refused)
    named = rf"{re.escape(str(tmp_path / '.env'))} can't be read.*UTF-8"
    with pytest.raises(script.RunError, match=named):
        read("SUPABASE_URL=https://x.supabase.co # é\n", encoding=encoding)


def test_every_setting_and_flag_is_in_the_readme_and_every_setting_in_the_example():
    readme, example = (REPO / "README.md").read_text(), (REPO / ".env.example").read_text()
    assert set(re.findall(r"\b[A-Z_]+\b", example)) >= set(NAMES)
    assert set(re.findall(r"\b[A-Z_]+\b", readme)) >= set(NAMES)
    flags = set(re.findall(r"--[a-z-]+", script.flags_parser().format_help())) - {"--help"}
    assert set(re.findall(r"(?m)^\| `(?:-v`, `)?(--[a-z-]+)", readme)) == flags


def test_every_message_in_the_readmes_troubleshooting_is_one_of_the_script():
    table = (REPO / "README.md").read_text().split("## Troubleshooting")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    assert len(rows) >= 4
    code = re.sub(r'"\n\s*f?"', "", SCRIPT.read_text())  # texts of several lines
    for row in rows:
        for message in re.findall("`(.+?)`", row):
            for piece in re.split(r"\s*\.\.\.\s*|:$", message):
                assert piece in code, message


def test_the_example_as_it_is_is_refused_by_name_and_shows_the_defaults(read):
    example = (REPO / ".env.example").read_text()
    with pytest.raises(script.RunError, match=r"SUPABASE_URL \(from "):
        read(example)
    made = read(re.sub(r"(?m)^#(?=\w+=)", "", example), **GOOD)
    assert made == read(**GOOD)
    assert (made.batch_size, made.dtype, made.device) == (1, "float32", "cpu")  # as in README.md
