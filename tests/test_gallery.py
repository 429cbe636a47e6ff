"""--gallery: the page that a person looks at, from a folder and from the database."""

import base64
import html
import io
import os
import re
import uuid
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from conftest import Cli, model_settings, renew, stack_cli
from PIL import Image
from stack import ImageHost

import generate_embeddings as script

ODD = '"><script>alert(1)</script> & \u202e\u05d0\u05d1\u05d2 ' + "x" * 180


class Page(HTMLParser):
    """A gallery taken apart: its pictures, links, boxes, headings and text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.source = Path(path).read_text()
        self.tags, self.links, self.pictures, self.boxes = [], [], [], 0
        self.words, self.boxed = [], False
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "img":
            self.pictures.append(attrs)
        self.boxed = tag == "div"

    def handle_data(self, data):
        self.words.append(data)
        self.boxes += self.boxed  # the reason, in the place of a picture
        self.boxed = False

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def check(self):
        """What holds for every page: it is whole, shows its pictures and loads nothing."""
        for picture in self.pictures:
            kind, _, data = picture["src"].partition(";base64,")
            assert kind == "data:image/jpeg"
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == (128, 128)
            assert picture["alt"]
        names = {tag for tag, _ in self.tags}
        assert names.isdisjoint({"script", "link", "iframe", "object", "form", "video"})
        assert not any(name.startswith("on") for _, attrs in self.tags for name in attrs)
        policies = [attrs["content"] for tag, attrs in self.tags if "http-equiv" in attrs]
        assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        assert "url(" not in self.source
        assert all(urlsplit(link).scheme in ("http", "https") for link in self.links)
        assert [tag for tag, _ in self.tags if tag in ("h1", "h2")] == ["h1", "h2", "h2", "h2"]
        assert len(self.source) < 3_000_000
        return self

    def rows(self, kind):
        """The sections of this class, each as its pictures' alternative texts."""
        parts = re.findall(rf'<section class="{kind}">(.*?)</section>', self.source, re.DOTALL)
        return [re.findall(r' alt="(.*?)">', part) for part in parts]


def written(run, path):
    """The page of a run, which says last on stderr where it is."""
    assert run.err.splitlines()[-1].endswith(f"look at {Path(path).as_uri()}"), run.err
    return Page(path).check()


@pytest.fixture(scope="module")
def album(photos, tiny, tmp_path_factory):
    """A folder with photographs, two of them twice, and two files that are none; its page."""
    folder = tmp_path_factory.mktemp("album")
    (folder / "sub").mkdir()
    for name, data in photos.items():
        (folder / name).write_bytes(data)
    for name in ("coffee.png", "rocket.jpg"):
        (folder / "sub" / name).write_bytes(photos[name])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "page.jpg").write_bytes(b"<!doctype html>")
    cli = Cli(model_settings(tiny), tmp_path_factory.mktemp("cwd"))
    path = folder / "gallery.html"
    run = cli("--local", folder, "--gallery", path)
    assert run.code == 1
    return folder, cli, written(run, path)


def test_a_folders_page_shows_each_image_with_its_nearest(album, photos):
    _, _, page = album
    rows = page.rows("near")
    assert len(rows) == len(photos) + 2
    assert {len(row) for row in rows} == {7}
    nearest = {row[0]: row[1] for row in rows}
    assert nearest["coffee.png"] == "sub/coffee.png"
    assert nearest["sub/rocket.jpg"] == "rocket.jpg"
    assert page.boxes == 0


def test_images_that_are_there_twice_come_first_among_the_pairs(album):
    _, _, page = album
    pairs = page.rows("pairs")
    assert len(pairs) == 24
    twice = [["coffee.png", "sub/coffee.png"], ["rocket.jpg", "sub/rocket.jpg"]]
    assert sorted(map(sorted, pairs[:2])) == twice


def test_the_page_counts_and_names_what_failed(album, photos):
    _, _, page = album
    count = len(photos) + 2
    assert f"{count + 2} assets: {count} embedded, 2 failed, 0 left" in page.text
    assert "1 decode: an HTML page, not an image page.jpg" in page.text
    assert "1 decode: broken or truncated image file broken.jpg" in page.text
    assert re.search(r"unrelated products here have 0\.\d\d", page.text)


def test_a_page_may_be_of_a_subfolder_and_with_nothing_left_to_do(album, tmp_path):
    folder, cli, _ = album
    run = cli("--local", folder, "--client", "sub", "--gallery", tmp_path / "sub.html")
    assert run.code == 0
    page = written(run, tmp_path / "sub.html")
    assert page.rows("near") == [
        ["sub/coffee.png", "sub/rocket.jpg"],
        ["sub/rocket.jpg", "sub/coffee.png"],
    ]
    assert page.text.startswith("Embeddings of sub")


def test_an_image_that_broke_since_is_a_box_with_the_reason(cli, photos, tmp_path):
    for name, photo in (("a.jpg", "coffee.png"), ("b.jpg", "rocket.jpg")):
        (tmp_path / name).write_bytes(photos[photo])
    assert cli("--local", tmp_path).code == 0
    changed = (tmp_path / "b.jpg").stat().st_mtime_ns
    (tmp_path / "b.jpg").write_bytes(b"")
    os.utime(tmp_path / "b.jpg", ns=(changed, changed))
    page = written(cli("--local", tmp_path, "--gallery", tmp_path / "x.html"), tmp_path / "x.html")
    assert page.boxes == 3  # in two rows and a pair
    assert "an empty file" in page.text


@pytest.fixture
def catalog(tmp_path):
    """A folder's store with generated vectors on record and 30 failures; its names, the vectors."""
    vectors = np.random.default_rng(1).standard_normal((400, 512)) + 1
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype("<f4")
    names = [f"{n:03}.jpg" for n in range(430)]
    for name in names:
        (tmp_path / name).touch()
    store = script.FolderStore(script.Settings(local=tmp_path), None)
    store.status()
    assets = [asset for page in store.pages() for asset in page]
    store.save([script.Embedded(*pair) for pair in zip(assets[:400], vectors, strict=True)])
    store.save([script.Failed(asset, "decode", "an empty file") for asset in assets[400:]])
    return store, names, vectors


def test_a_folders_rows_are_the_nearest_of_all(catalog):
    store, names, vectors = catalog
    made, cosines = store.gallery(), vectors @ vectors.T
    every = cosines[np.triu_indices(400, 1)]
    np.fill_diagonal(cosines, -1)
    assert 20 < len(made["near"]) <= 31
    for (own, _), *others in made["near"]:
        at = names.index(own)
        assert [name for name, *_ in others] == [names[n] for n in np.argsort(-cosines[at])[:6]]
        assert np.allclose([x for *_, x in others], np.sort(cosines[at])[:-7:-1])
    assert np.allclose([pair[1][2] for pair in made["pairs"]], np.sort(every)[:-25:-1])
    assert len({frozenset((a[0], b[0])) for a, b in made["pairs"]}) == 24
    assert made["typical"] == pytest.approx(np.median(every), abs=0.01)


def test_failures_are_counted_and_some_are_named(catalog):
    store, names, _ = catalog
    expected = [("30 decode: an empty file",), *((name,) for name in names[400:420])]
    assert store.gallery()["failed"] == [expected]


@pytest.mark.parametrize("name", ["there/is/none.html", "page.txt", "."])
def test_a_page_that_can_not_be_written_is_said_before_the_run(cli, tmp_path, name, photos):
    (tmp_path / "a.jpg").write_bytes(photos["coffee.png"])
    run = cli("--local", tmp_path, "--gallery", tmp_path / name)
    assert run.code == 2
    assert "--gallery" in run.err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_an_empty_folder_of_failures_has_a_page_too(cli, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    run = cli("--local", tmp_path, "--gallery", tmp_path / "x.html")
    assert run.code == 1
    page = written(run, tmp_path / "x.html")
    assert (page.pictures, page.rows("near"), page.rows("pairs")) == ([], [], [])
    assert "None yet." in page.text


# From the database


@pytest.fixture(scope="module")
def shop(_stack, photos, tiny, tmp_path_factory):
    """A catalog of two clients with odd names and ids of text, and its page."""
    renew(_stack, id_type="text")
    cli = stack_cli(_stack, tiny, tmp_path_factory.mktemp("cwd"))
    path = cli.folder / "gallery.html"
    files = {f"/{name}": data for name, data in photos.items()}
    with ImageHost(files) as host:
        urls = [host.url_of(name) for name in files]
        rows = [(f"{n:02} {ODD}", url, ODD if n % 2 else "other") for n, url in enumerate(urls)]
        inline = "data:image/png;base64," + base64.b64encode(photos["rocket.jpg"]).decode()
        rows.append(("inline", inline, "other"))
        rows.append(("gone", host.url_of("/gone.jpg"), ODD))
        rows.append(("bad", "javascript:alert(1)", "other"))
        rows.append(("none", None, "other"))
        _stack.add_assets(rows)
        run = cli("--gallery", path)
        assert run.code == 1, run.err
        page = written(run, path)
        mine = cli("--gallery", cli.folder / "mine.html", "--client", ODD, "--limit", 1)
        yield rows, page, written(mine, cli.folder / "mine.html")


def test_the_page_of_a_database_shows_the_nearest_by_its_own_functions(shop, photos):
    rows, page, _ = shop
    shown = page.rows("near")
    assert len(shown) == min(30, len(rows) - 3)
    assert {len(row) for row in shown} <= {6, 7}  # the index may miss one
    rocket = next(i for i, url, _ in rows if url.endswith("/rocket.jpg"))
    nearest = {html.unescape(row[0]): html.unescape(row[1]) for row in shown}
    assert nearest["inline"] == rocket
    assert sorted(map(html.unescape, page.rows("pairs")[0])) == sorted(["inline", rocket])


def test_names_of_any_kind_are_escaped(shop):
    _, page, _ = shop
    assert "<script" not in page.source
    assert any("<script>alert(1)</script>" in word for word in page.words)


def test_only_web_addresses_become_links(shop, photos):
    _, page, _ = shop
    names = {Path(unquote(urlsplit(link).path)).name for link in page.links}
    assert names == {*photos, "gone.jpg"}
    assert "fetch: HTTP 404 Not Found gone" in page.text
    assert "1 fetch: no image URL none" in page.text
    assert "1 fetch: only http, https and data URLs are fetched bad" in page.text


def test_a_clients_page_shows_that_clients_images_alone(shop):
    rows, _, mine = shop
    of_client = {i for i, _, client in rows if client == ODD}
    shown = {
        html.unescape(name) for kind in ("near", "pairs") for row in mine.rows(kind) for name in row
    }
    assert shown == of_client - {"gone"}


def test_an_image_that_is_gone_since_is_a_box(cli, stack, host, tmp_path):
    stack.add_assets(
        (uuid.uuid5(uuid.NAMESPACE_URL, name), host.url_of(name), "x")
        for name in ("/flower.jpg", "/china.jpg")
    )
    assert cli().code == 0
    del host.files["/china.jpg"]
    run = cli("--gallery", tmp_path / "x.html")
    page = written(run, tmp_path / "x.html")
    assert page.boxes == 3  # in two rows and a pair
    assert "HTTP 404 Not Found" in page.text
