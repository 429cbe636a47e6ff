"""Settings: from the environment and .env, and what is said of wrong ones."""

import ast
import re
import shutil
import uuid

import jwt
import pytest
from conftest import REPO, SCRIPT

SETTINGS = [
    *("SUPABASE_URL", "NEXT_PUBLIC_SUPABASE_URL"),
    *("SUPABASE_SERVICE_ROLE_KEY", "SUPABASE_SECRET_KEY", "CLIP_MODEL"),
    *("ASSETS_TABLE", "ASSET_ID_COLUMN", "ASSET_IMAGE_COLUMN", "ASSET_CLIENT_COLUMN"),
    *("EMBEDDINGS_TABLE", "FAILURES_TABLE"),
]
GOOD = {"SUPABASE_URL": "https://abc.supabase.co", "SUPABASE_SERVICE_ROLE_KEY": "sb_secret_abc"}
NEXT_TO_NOTHING = "http://127.0.0.1:9"  # asked for five seconds, and nothing answers


@pytest.fixture
def found(cli, stack):
    """Whether the settings in a .env, and only those, lead to the stack's one asset."""
    stack.add_assets([(uuid.uuid4(), "https://images.invalid/1.jpg", "x")])

    def found(content, **environment):
        data = content if isinstance(content, bytes) else content.encode()
        (cli.folder / ".env").write_bytes(data)
        run = cli("--dry-run", env=environment)
        assert run.code == 0, run.err
        return run.out.startswith("Would embed 1 ")

    return found


# Where settings come from


@pytest.mark.parametrize(
    "content",
    [
        "SUPABASE_URL={url}\nSUPABASE_SERVICE_ROLE_KEY={key}\n",
        'SUPABASE_URL="{url}"\nSUPABASE_SERVICE_ROLE_KEY="{key}"',
        "SUPABASE_URL = '{url}'\nSUPABASE_SERVICE_ROLE_KEY = ' {key} '\n",
        "# mine\n\nexport SUPABASE_URL={url}  # the project\nSUPABASE_SERVICE_ROLE_KEY={key}\n",
        "\ufeffSUPABASE_URL={url}\r\nSUPABASE_SERVICE_ROLE_KEY={key}\r\n",
        "SUPABASE_URL={url}/\nSUPABASE_SERVICE_ROLE_KEY={key}\n",
        "SUPABASE_URL={url}/rest/v1\nSUPABASE_SERVICE_ROLE_KEY={key}\n",
        "SUPABASE_URL={url}/rest/v1/\nSUPABASE_SERVICE_ROLE_KEY={key}\n",
        "NEXT_PUBLIC_SUPABASE_URL={url}\nSUPABASE_SECRET_KEY={secret}\n",
        "SUPABASE_URL=\nNEXT_PUBLIC_SUPABASE_URL={url}\nSUPABASE_SERVICE_ROLE_KEY={secret}\n",
    ],
    ids=[
        *("plain", "double quotes", "single quotes, spaces", "export, comments", "BOM, CRLF"),
        *("trailing slash", "rest/v1", "rest/v1/", "other names", "an empty value is none"),
    ],
)
def test_a_dotenv_file_in_the_current_folder_is_read(found, stack, content):
    values = {"url": stack.url, "key": stack.service_key, "secret": stack.secret_key}
    assert found(content.format(**values))


def test_the_environment_wins_over_the_file(found, stack):
    wrong = f"SUPABASE_URL={NEXT_TO_NOTHING}\nSUPABASE_SERVICE_ROLE_KEY={stack.service_key}\n"
    assert found(wrong, SUPABASE_URL=stack.url)


def test_a_dotenv_file_beside_the_script_is_read_where_the_current_folder_has_none(
    cli, stack, tmp_path
):
    stack.add_assets([(uuid.uuid4(), "https://images.invalid/1.jpg", "x")])
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    script = shutil.copy(SCRIPT, there)
    beside = f"SUPABASE_URL={stack.url}\nSUPABASE_SERVICE_ROLE_KEY={stack.service_key}\n"
    (there / ".env").write_text(beside)
    run = cli("--dry-run", env={}, cwd=here, script=script)
    assert run.out.startswith("Would embed 1 "), run.err

    (here / ".env").write_text(f"SUPABASE_URL={stack.url}\n")  # now the one beside is not read
    run = cli("--dry-run", env={}, cwd=here, script=script)
    assert run.code == 2
    assert "SUPABASE_SERVICE_ROLE_KEY" in run.error
    assert f"read from {here / '.env'}" in run.error


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_dotenv_file_in_another_encoding_is_named(cli, encoding):
    (cli.folder / ".env").write_bytes("SUPABASE_URL=https://x.supabase.co # é\n".encode(encoding))
    run = cli("--dry-run", env={})
    assert run.code == 2
    assert ".env" in run.error
    assert "UTF-8" in run.error


# Wrong settings


def token(role):
    return jwt.encode({"role": role} if role else {}, "some secret of at least 32 characters here")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"SUPABASE_URL": None}, "SUPABASE_URL .*not set.*--local"),
        ({"SUPABASE_URL": "  "}, "SUPABASE_URL .*not set"),
        ({"SUPABASE_URL": "https://YOUR-PROJECT.supabase.co"}, "SUPABASE_URL .*YOUR-PROJECT: put"),
        ({"SUPABASE_URL": "abc.supabase.co"}, "SUPABASE_URL.*https://"),
        ({"SUPABASE_URL": "https://"}, "SUPABASE_URL"),
        ({"SUPABASE_URL": "https://YOUR PROJECT.supabase.co"}, "SUPABASE_URL"),
        ({"SUPABASE_URL": "https://supabase.com/dashboard/project/abc"}, "SUPABASE_URL"),
        ({"SUPABASE_URL": "postgresql://postgres:pw@db.abc.supabase.co/postgres"}, "SUPABASE_URL"),
        ({"SUPABASE_SERVICE_ROLE_KEY": None}, "SUPABASE_SERVICE_ROLE_KEY .*not set"),
        ({"SUPABASE_SERVICE_ROLE_KEY": "hush-hush"}, "SUPABASE_SERVICE_ROLE_KEY"),
        ({"SUPABASE_SERVICE_ROLE_KEY": "your-service-role-key"}, "SUPABASE_SERVICE_ROLE_KEY"),
        ({"SUPABASE_SERVICE_ROLE_KEY": "a.b.c"}, "SUPABASE_SERVICE_ROLE_KEY"),
        ({"SUPABASE_SERVICE_ROLE_KEY": token(None)}, "SUPABASE_SERVICE_ROLE_KEY"),
        ({"SUPABASE_SERVICE_ROLE_KEY": token("anon")}, r"SUPABASE_SERVICE_ROLE_KEY.*\banon\b"),
        ({"SUPABASE_SERVICE_ROLE_KEY": token("authenticated")}, "SUPABASE_SERVICE_ROLE_KEY"),
        ({"SUPABASE_SERVICE_ROLE_KEY": "sb_publishable_abc"}, "SUPABASE_SERVICE_ROLE_KEY.*public"),
        ({"ASSETS_TABLE": "my assets"}, "ASSETS_TABLE"),
        ({"ASSETS_TABLE": "public.assets"}, "ASSETS_TABLE"),
        ({"ASSET_ID_COLUMN": "id::text"}, "ASSET_ID_COLUMN"),
        ({"ASSET_ID_COLUMN": "1d"}, "ASSET_ID_COLUMN"),
        ({"ASSET_IMAGE_COLUMN": "a,b"}, "ASSET_IMAGE_COLUMN"),
        ({"ASSET_IMAGE_COLUMN": "data->url"}, "ASSET_IMAGE_COLUMN"),
        ({"ASSET_CLIENT_COLUMN": "a.b.c"}, "ASSET_CLIENT_COLUMN"),
        ({"ASSET_CLIENT_COLUMN": ".name"}, "ASSET_CLIENT_COLUMN"),
        ({"EMBEDDINGS_TABLE": 'x"; drop table assets; --'}, "EMBEDDINGS_TABLE"),
        ({"FETCH_SECONDS": "soon"}, "FETCH_SECONDS"),
        ({"DB_RETRY_SECONDS": "-1"}, "DB_RETRY_SECONDS"),
        ({"CLIP_MODEL": "/no/such/folder"}, "CLIP_MODEL.*not a folder"),
        ({"CLIP_MODEL": "~/no/such/folder"}, "CLIP_MODEL.*not a folder"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(cli, settings, words):
    run = cli(env=GOOD, **settings)
    assert run.code == 2
    assert re.search(words, run.error)
    assert run.err.splitlines() == [run.error]
    assert run.out == ""


def test_a_key_with_a_line_break_is_refused_and_not_shown(cli):
    key = token("service_role")
    run = cli(env=GOOD, SUPABASE_SERVICE_ROLE_KEY=f"{key[:-20]}\n{key[-20:]}")
    assert run.code == 2
    assert "does not look like a key" in run.error
    assert key[:-20] not in run.err
    assert key[-20:] not in run.err


def test_url_and_key_swapped_do_not_print_the_key(cli, stack):
    run = cli(SUPABASE_URL=stack.service_key, SUPABASE_SERVICE_ROLE_KEY=stack.url)
    assert run.code == 2
    assert "SUPABASE_URL" in run.error


def test_settings_of_the_database_are_not_looked_at_for_a_folder(cli, tmp_path, photos):
    (tmp_path / "a.png").write_bytes(photos["coffee.png"])
    run = cli("--local", tmp_path, "--dry-run", SUPABASE_URL="nonsense")
    assert run.code == 0


def test_the_settings_do_not_show_the_key(monkeypatch):
    monkeypatch.syspath_prepend(REPO)
    import generate_embeddings

    assert "hidden" not in repr(generate_embeddings.Settings(key="hidden"))


# What is written about them


# Those of the promise, and whatever else the script asks the environment for
NAMES = {*SETTINGS, *re.findall(r'"((?!HF_|OMP_)[A-Z]+(?:_[A-Z]+)+)"', SCRIPT.read_text())}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_setting_is_in_readme_and_example(name):
    for file in ("README.md", ".env.example"):
        assert re.search(rf"\b{name}\b", (REPO / file).read_text()), file


# Of PostgREST and PostgreSQL, passed on as they are
FOREIGN = ["relation", "does not exist", "column", "Could not find the table"]
FOREIGN += ["Could not find a relationship between", "permission denied for table"]
FOREIGN += ["more than one relationship was found", "has client_name ="]


def test_every_message_in_the_readmes_troubleshooting_is_one_of_the_script():
    table = (REPO / "README.md").read_text().split("## Troubleshooting")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    assert len(rows) > 20
    texts = FOREIGN.copy()
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


def test_every_flag_is_in_the_readme(cli):
    readme = (REPO / "README.md").read_text()
    flags = set(re.findall(r"--[a-z-]+", cli("--help").out))
    assert [flag for flag in sorted(flags - {"--help"}) if flag not in readme] == []


def test_the_example_as_it_is_is_refused_by_name(cli):
    shutil.copy(REPO / ".env.example", cli.folder / ".env")
    run = cli("--dry-run", env={})
    assert run.code == 2
    assert re.search("SUPABASE_URL|SUPABASE_SERVICE_ROLE_KEY", run.error)
