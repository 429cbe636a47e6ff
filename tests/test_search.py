"""--search: what is nearest to words, to a picture's file, to a picture's URL; in lines, and on the
page. It embeds nothing else."""

import argparse
import io
import sqlite3

import numpy as np
import pytest
from conftest import Cli, model_settings, near, open_folder, pending
from database import unit
from PIL import Image
from samples import saved
from stack import ImageHost

import generate_embeddings as script

SIX = ["astronaut.png", "coffee.png", "rocket.jpg", "chelsea.png", "flower.jpg", "china.jpg"]


def lines(run):
    """What a search printed, column by column."""
    assert run.code == 0, run.err
    return [line.split("\t") for line in run.out.splitlines()]


def halved(data):
    """A picture at half its size, in another format."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return saved(image.resize((image.width // 2, image.height // 2)), "WEBP")


@pytest.fixture(scope="module")
def folder(photos, tiny, tmp_path_factory):
    """A folder of eight photographs that are embedded, one with a tab in its name; its Cli."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "sub").mkdir()
    for name in SIX:
        (folder / "sub" / name).write_bytes(photos[name])
    (folder / "sub" / "a\tb.png").write_bytes(photos["cell.png"])
    (folder / "elsewhere.png").write_bytes(photos["coffee.png"])
    settings = {**model_settings(tiny), "ALLOW_PRIVATE_IMAGE_HOSTS": "1"}
    cli = Cli(settings, tmp_path_factory.mktemp("cwd"))
    assert cli("--local", folder).code == 0
    (cli.folder / "photo.webp").write_bytes(halved(photos["coffee.png"]))
    (cli.folder / "red mug").write_bytes(photos["rocket.jpg"])
    return folder, cli


def test_a_file_finds_the_pictures_of_a_subfolder_that_look_like_it(folder):
    folder, cli = folder
    rows = lines(cli("--local", folder, "--client", "sub", "--search", "photo.webp"))
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
    assert rows[0][:2] == rows[4][:2] == ["1.000", "rocket.jpg"]
    assert {rows[2][1], rows[3][1]} == {"coffee.png", "elsewhere.png"}
    answers = page.read_text().partition('<section id="same">')[0]
    assert [answers.count(f"<h3>{question}</h3>") for question in asked] == [1, 1, 1]
    assert answers.count("<img ") == 6
    with sqlite3.connect(folder / "product_embeddings.sqlite3") as database:
        assert database.execute("select count(*) from images").fetchone() == (8,)
    (folder / "new.jpg").unlink()


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("gone.jpg", "--search gone.jpg: there is no such file"),
        ("GONE.JPG", "--search GONE.JPG: there is no such file"),
        ("page.jpg", "--search page.jpg: a web page, not an image"),
        ("http://127.0.0.1:9/x.jpg", "--search http://127.0.0.1:9/x.jpg: connection refused"),
    ],
)
def test_a_picture_that_can_not_be_had_is_said(monkeypatch, tmp_path, question, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.jpg").write_bytes(b"<!doctype html>")
    with pytest.raises(script.RunError, match=says):
        script.question_vectors(script.Settings(search=(question,), private_hosts=True))


def test_what_is_neither_a_url_nor_a_file_is_words():
    url = "HTTPS://shop.example/mug"
    source = script.question_source(url)
    assert (source, source.host) == (script.Source(url, {}), "shop.example")
    for words in ("red mug", "a mug, 3.5 litres", "mug " * 200, "."):
        assert script.question_source(words) is None
    with pytest.raises(argparse.ArgumentTypeError, match="there is no question"):
        script.to_question(" ")


def test_all_vectors_of_a_folder_are_compared_and_12_are_shown(tmp_path, monkeypatch, capsys):
    count = 5_100  # more than a block
    vectors = unit(np.random.default_rng(1).standard_normal((count, 512))).astype("<f4")
    for n in range(count):
        (tmp_path / f"{n:05}.jpg").touch()
    store = open_folder(tmp_path)
    store.save([script.Embedded(*pair) for pair in zip(pending(store), vectors, strict=True)])
    question = unit(vectors[:3].sum(axis=0))
    found = store.search(question, 50)
    expected = np.argsort(-(vectors @ question))[:50]
    assert [match.picture.name for match in found] == [f"{n:05}.jpg" for n in expected]
    monkeypatch.setattr(script, "question_vectors", lambda _: {"mug": question})
    script.answer_questions(store, script.Settings(search=("mug",)), script.Status(1, 1, 0))
    assert len(capsys.readouterr().out.splitlines()) == 12


def test_words_are_compared_by_the_text_tower(full, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    settings = script.Settings(local=tmp_path, clip_model=str(full), search=("red mug, hot",))
    text = script.TextEncoder(settings).encode(settings.search)[0]
    cosines = {"coffee.png": 0.3, "rocket.jpg": 0.2, "cell.png": 0.1}
    vectors = {name: near(text, cosine) for name, cosine in cosines.items()}
    for name in cosines:
        (tmp_path / name).touch()
    store = script.FolderStore(settings)
    store.save([script.Embedded(asset, vectors[asset.id]) for asset in pending(store)])
    assert script.answer_questions(store, settings, script.Status(3, 3, 0)) == 0
    rows = [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()]
    assert rows == [[f"{cosine:.3f}", name] for name, cosine in cosines.items()]
    assert "0.2 to 0.35" in caplog.text


def test_a_database_answers_with_names_and_ids(cli, stack, host, photos):
    stack.sql_as_editor(
        "create or replace function embedding_sources() returns table "
        "(id uuid, image text, client text, title text, link text) language sql stable as $$ "
        "select id, image_url, client_name, "
        "case when image_url ~ 'rocket' then 'Space rocket' end, null from public.assets $$"
    )
    ids = [f"00000000-0000-0000-0000-00000000000{n}" for n in range(6)]
    stack.add_assets((ids[n], host.url_of(f"/{SIX[n]}#v2"), f"client {n % 2}") for n in range(6))
    assert cli().code == 0
    (cli.folder / "photo.webp").write_bytes(halved(photos["coffee.png"]))
    (cli.folder / "rocket.jpg").write_bytes(photos["rocket.jpg"])
    rows = lines(cli("--search", "rocket.jpg", "--search", "photo.webp"))
    assert len(rows) == 12
    assert rows[0] == ["1.000", "Space rocket", ids[2], "rocket.jpg"]
    assert rows[6][1:3] == ["coffee.png", ids[1]]
    rows = lines(cli("--client", "client 0", "--search", "photo.webp", "--limit", 2, "--dry-run"))
    assert {row[2][-1] for row in rows} < set("024")
    assert script.Picture(7, "DATA:image/png;base64,AA/B").name == "7"
