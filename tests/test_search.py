"""--search: what is nearest to words, to a picture's file, to a picture's URL; in lines, and on the
page. It embeds nothing else."""

import io
import sqlite3

import numpy as np
import pytest
from conftest import TINY_VERSION, Cli, model_settings, open_folder, pending, renew, stack_cli
from database import unit
from PIL import Image
from stack import JSON, ImageHost

import generate_embeddings as script

SIX = ["astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png", "flower.jpg", "china.jpg"]


def lines(run):
    """What a search printed, column by column."""
    assert run.code == 0, run.err
    return [line.split("\t") for line in run.out.splitlines()]


def halved(data):
    """A picture at half its size, in another format."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    made = io.BytesIO()
    image.resize((image.width // 2, image.height // 2)).save(made, "WEBP")
    return made.getvalue()


@pytest.fixture(scope="module")
def folder(photos, tiny, tmp_path_factory):
    """A folder of six photographs that are embedded, one with a tab in its name; its Cli."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "sub").mkdir()
    for name in SIX:
        (folder / "sub" / name).write_bytes(photos[name])
    (folder / "a\tb.png").write_bytes(photos["cell.png"])
    cli = Cli(
        {**model_settings(tiny), "ALLOW_PRIVATE_IMAGE_HOSTS": "1"}, tmp_path_factory.mktemp("cwd")
    )
    assert cli("--local", folder).code == 0
    (cli.folder / "photo.webp").write_bytes(halved(photos["coffee.png"]))
    (cli.folder / "red mug").write_bytes(photos["rocket.jpg"])
    (cli.folder / "page.jpg").write_bytes(b"<!doctype html>")
    return folder, cli


def test_a_file_finds_the_pictures_that_look_like_it(folder):
    folder, cli = folder
    rows = lines(cli("--local", folder, "--search", "photo.webp"))
    assert len(rows) == 7
    assert rows[0][1:] == ["coffee.png", str(folder / "sub" / "coffee.png")]
    similarities = [float(row[0]) for row in rows]
    assert 0.9 < similarities[0] <= 1
    assert similarities == sorted(similarities, reverse=True)
    assert "a?b.png" in {row[1] for row in rows}  # a tab would be another column


def test_answers_are_lines_and_the_pages_first_section(folder, photos, tmp_path):
    folder, cli = folder
    (folder / "new.jpg").write_bytes(photos["rocket.jpg"])
    with ImageHost({"/x": photos["rocket.jpg"]}) as host:
        asked = [host.url_of("/x"), "photo.webp", "red mug"]
        flags = [word for question in asked for word in ("--search", question)]
        page = tmp_path / "x.html"
        rows = lines(cli("--local", folder, *flags, "--limit", 2, "--gallery", page))
    assert [row[3] for row in rows] == [asked[0]] * 2 + [asked[1]] * 2 + [asked[2]] * 2
    assert [row[1] for row in rows[::2]] == ["rocket.jpg", "coffee.png", "rocket.jpg"]
    assert [row[0] for row in rows[::4]] == ["1.000", "1.000"]
    answers = page.read_text().partition('<section id="same">')[0]
    assert [answers.count(f"<h3>{question}</h3>") for question in asked] == [1, 1, 1]
    assert answers.count("<img ") == 6
    with sqlite3.connect(folder / "product_embeddings.sqlite3") as database:
        assert database.execute("select count(*) from images").fetchone() == (7,)
    (folder / "new.jpg").unlink()


def test_a_search_may_be_of_a_subfolder(folder):
    folder, cli = folder
    rows = lines(cli("--local", folder, "--client", "sub", "--search", "red mug"))
    assert len(rows) == 6
    assert rows[0][1] == "rocket.jpg"


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("gone.jpg", "--search gone.jpg: there is no such file"),
        ("page.jpg", "page, not an image"),
        ("http://127.0.0.1:9/x.jpg", "--search http://127.0.0.1:9/x.jpg: connection refused"),
    ],
)
def test_a_picture_that_can_not_be_had_is_said(folder, question, says):
    folder, cli = folder
    run = cli("--local", folder, "--search", question)
    assert (run.code, run.out) == (2, "")
    assert says in run.error


def test_where_nothing_is_embedded_yet_that_is_said(cli, photos, tmp_path):
    (tmp_path / "a.png").write_bytes(photos["cell.png"])
    run = cli("--local", tmp_path, "--search", tmp_path / "a.png")
    assert (run.code, run.out) == (2, "")
    assert f"nothing is embedded yet as {TINY_VERSION}" in run.error
    assert "there is no question" in cli("--local", tmp_path, "--search", " ").err


def test_what_is_neither_a_url_nor_a_file_is_words():
    url = "HTTPS://shop.example/mug"
    assert script.question_source(url) == script.Source(url, {})
    for words in ("red mug", "a mug, 3.5 litres", "mug " * 200, "."):
        assert script.question_source(words) is None


def test_all_vectors_of_a_folder_are_compared(tmp_path):
    count = 6_000  # more than a block
    vectors = unit(np.random.default_rng(1).standard_normal((count, 512))).astype("<f4")
    for n in range(count):
        (tmp_path / f"{n:05}.jpg").touch()
    store = open_folder(tmp_path)
    store.save([script.Embedded(*pair) for pair in zip(pending(store), vectors, strict=True)])
    question = vectors[:3].sum(axis=0)
    found = store.search(question / np.linalg.norm(question), 50)
    expected = np.argsort(-(vectors @ question))[:50]
    assert [match.picture.name for match in found] == [f"{n:05}.jpg" for n in expected]


def test_words_are_compared_by_the_text_tower(folder, full, photos):
    """By the architecture of ViT-B/32."""
    _, cli = folder
    cosines = {"coffee.png": 0.3, "rocket.jpg": 0.2, "cell.png": 0.1}
    text = script.TextEncoder(script.Settings(clip_model=str(full))).encode(["red mug, hot"])[0]
    place = cli.folder / "words"
    place.mkdir()
    rng = np.random.default_rng(1)
    vectors = {}
    for name, cosine in cosines.items():
        (place / name).write_bytes(photos[name])
        other = rng.standard_normal(512)
        other = unit(other - (other @ text) * text)
        vectors[name] = cosine * text + np.sqrt(1 - cosine**2) * other
    store = open_folder(place, model_version=script.MODEL_VERSION)
    store.save([script.Embedded(asset, vectors[asset.id]) for asset in pending(store)])
    run = cli("--local", place, "--search", "red mug, hot", env=model_settings(full))
    assert [row[:2] for row in lines(run)] == [[f"{c:.3f}", name] for name, c in cosines.items()]
    assert "0.2 to 0.35" in run.err


# In a database


@pytest.fixture(scope="module")
def ask_database(_stack, photos, tiny, tmp_path_factory):
    """Six photographs of two clients that are embedded; one of them has a title. Its Cli."""
    renew(_stack)
    _stack.sql_as_editor(
        "create or replace function embedding_sources() returns table "
        "(id uuid, image text, client text, title text, link text) language sql stable as $$ "
        "select id, image_url, client_name, "
        "case when image_url ~ 'rocket' then 'Space rocket' end, null from public.assets $$"
    )
    cli = stack_cli(_stack, tiny, tmp_path_factory.mktemp("cwd"))
    (cli.folder / "photo.webp").write_bytes(halved(photos["coffee.png"]))
    (cli.folder / "rocket.jpg").write_bytes(photos["rocket.jpg"])
    with ImageHost({f"/{name}": photos[name] for name in SIX}) as host:
        _stack.add_assets(
            (f"00000000-0000-0000-0000-00000000000{n}", host.url_of(f"/{name}"), f"client {n % 2}")
            for n, name in enumerate(SIX)
        )
        assert cli().code == 0
        cli.gateway = _stack.gateway
        yield cli


def test_a_database_answers_with_names_and_ids(ask_database):
    rows = lines(ask_database("--search", "rocket.jpg", "--search", "photo.webp"))
    assert len(rows) == 12
    rocket = ["1.000", "Space rocket", "00000000-0000-0000-0000-000000000002", "rocket.jpg"]
    assert rows[0] == rocket
    assert rows[6][1:3] == ["coffee.png", "00000000-0000-0000-0000-000000000001"]
    rows = lines(ask_database("--client", "client 0", "--search", "photo.webp", "--limit", 2))
    assert {row[2][-1] for row in rows} < set("024")


@pytest.mark.parametrize("function", ["match_products", "similar_products", "duplicate_products"])
def test_a_search_that_takes_too_long_is_asked_three_times(ask_database, tmp_path, function):
    """As at hundreds of thousands of rows without the index."""
    asked = []

    def fault(request):
        if request.function != function:
            return None
        asked.append(function)
        return 500, JSON, b'{"code":"57014","message":"canceling statement"}'

    ask_database.gateway.fault = fault
    try:
        run = ask_database("--search", "rocket.jpg", "--gallery", tmp_path / "page.html")
    finally:
        ask_database.gateway.fault = None
    assert (run.code, len(asked)) == (2, 3)
    assert "took too long (canceling statement): has product_embeddings its HNSW index" in run.error
