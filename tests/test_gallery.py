"""--gallery: a page that a shop's owner acts on, and its table.

The page: what looks the same (the largest first, what is superfluous is counted), what can't be
used (why, and what to do), what looks alike; each picture leads to its original, each name to the
product, or there is the id. It loads and runs nothing, has at most 3 MB, and says what was cut, and
where time was short. The table has all of it, in cells that no spreadsheet takes for formulas.
Names, addresses and reasons are from outside, and break neither.
"""

import argparse
import base64
import csv
import io
import os
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import answers
import numpy as np
import pytest
from conftest import TINY_VERSION, Cli, model_settings, open_folder, pending, renew, stack_cli
from database import unit
from PIL import Image
from samples import exif, saved
from stack import ImageHost

import generate_embeddings as script

ODD = '"><script>alert(1)</script> & \u202e\u05d0\u05d1\u05d2 ' + "x" * 180
LONG = "https://cdn.example/" + "&" * 5000
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass
class Card:
    """One article of a page: a group, a reason, a sample, a question."""

    section: str
    title: str = ""
    names: list = field(default_factory=list)  # of its pictures, in order
    links: list = field(default_factory=list)
    marks: list = field(default_factory=list)
    words: list = field(default_factory=list)
    pictures: int = 0
    boxes: int = 0  # where a picture could not be had

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


class Page(HTMLParser):
    """A gallery taken apart; it was checked for what holds for each of them."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.source = source
        self.tags, self.cards, self.words, self.inside = [], [], [], []
        self.section = ""
        self.feed(source)
        self.check()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in ("meta", "img"):
            self.inside.append(tag)
        if tag == "section":
            self.section = attrs["id"]
        if tag == "article":
            self.cards.append(Card(self.section))
        if "article" not in self.inside:
            return
        card = self.cards[-1]
        if tag == "a":
            card.links.append(attrs["href"])
        card.pictures += tag == "img"
        card.boxes += attrs.get("class") == "none"

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if {"style", "title"} & set(self.inside):
            return
        self.words.append(data)
        if "article" not in self.inside:
            return
        card = self.cards[-1]
        card.words.append(data)
        if "mark" in self.inside:
            card.marks.append(data)
        elif "h3" in self.inside:
            card.title += data.strip()
        elif "b" in self.inside:
            card.names.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def head(self):
        return self.text[: self.text.index("Copies, resized pictures")]

    def of(self, section):
        return [card for card in self.cards if card.section == section]

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def check(self):
        for picture in self.named("img"):
            kind, _, data = picture["src"].partition(";base64,")
            assert kind == "data:image/webp"
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 160)
            assert picture["alt"]
        names = {tag for tag, _ in self.tags}
        assert names.isdisjoint({"script", "link", "iframe", "object", "form", "video", "base"})
        assert not any(name.startswith("on") for _, attrs in self.tags for name in attrs)
        assert [attrs["content"] for _, attrs in self.tags if "http-equiv" in attrs] == [POLICY]
        assert "url(" not in self.source
        for link in self.named("a"):
            assert urlsplit(link["href"]).scheme in ("http", "https", "")
            if not link["href"].startswith("#"):
                assert (link["target"], link["rel"]) == ("_blank", "noreferrer")
        assert len(self.named("h1")) == 1
        ids = {attrs["id"] for attrs in self.named("section")}
        assert ids - {"asked"} == {"same", "failed", "alike"}
        assert [link["href"] for link in self.named("a")][:3] == ["#same", "#failed", "#alike"]
        assert len(self.source.encode()) < 3_000_000
        for card in self.cards:
            assert not re.search(r"--[a-z]|vector|embedded|schema\.sql|\.env|1\.000", card.text)


def written(path):
    """The page at a path, and its table's rows."""
    with path.with_suffix(".csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for text in row.values():
            assert not re.search(r"""(^|[;\t\r\n])[\s"]*[=+@-]""", text), text
            assert len(text) <= 2010
    return Page(path.read_text()), rows


def shown(run, path):
    """The same of a run, which says last on stderr where the page is."""
    assert run.err.splitlines()[-1].endswith(f"look at {Path(path).as_uri()}"), run.err
    return written(path)


def vectors_for(count, seed=1):
    """Vectors of pictures that have little in common: cosines of 0.5 or so."""
    random = unit(np.random.default_rng(seed).standard_normal((count, 512)))
    return unit(random + np.eye(1, 512)).astype("<f4")


def near(vector, cosine, seed=2):
    """A vector that has this cosine to another."""
    other = np.random.default_rng(seed).standard_normal(512)
    other = unit(other - (other @ vector) * vector)
    return unit(cosine * vector + np.sqrt(1 - cosine**2) * other).astype("<f4")


def keep(folder, vectors, failures):
    """Puts vectors, and the reasons of failures, by path into a folder's file."""
    store = open_folder(folder)
    store.save(
        [
            script.Embedded(asset, vectors[asset.id])
            if asset.id in vectors
            else script.Failed(asset, "decode", failures[asset.id])
            for asset in pending(store)
        ]
    )
    return store


# A folder


@pytest.fixture(scope="module")
def album(photos, tiny, tmp_path_factory):
    """A folder: 22 photographs, a file three times, one in three other formats, two that look
    alike, odd names, 29 files that are no images; its page and its table."""
    folder = tmp_path_factory.mktemp("secret place") / "Mugs & More"
    (folder / "new <b>").mkdir(parents=True)
    names = list(photos)
    vectors = dict(zip(names, vectors_for(len(names)), strict=True))
    for name, data in photos.items():
        (folder / name).write_bytes(data)

    def add(path, data, vector):
        (folder / path).write_bytes(data)
        vectors[path] = vector

    add("new <b>/=cmd|'copy'.png", photos["coffee.png"], vectors["coffee.png"])
    add("new <b>/a:b #1 50%;=1+1.png", photos["coffee.png"], vectors["coffee.png"])
    rocket = Image.open(io.BytesIO(photos["rocket.jpg"]))
    for number, kind in enumerate(("PNG", "WEBP", "AVIF")):
        small = rocket.resize((100 + number, 50))
        add(f"rocket.{kind.lower()}", saved(small, kind), near(vectors["rocket.jpg"], 0.9999))
    add("chelsea-2.png", photos["cell.png"], near(vectors["chelsea.png"], 0.993))
    failures = {f"broken {n}.jpg": script.EMPTY for n in range(25)}
    failures |= {"page.jpg": script.WEB_PAGE, "svg.jpg": script.SVG, "odd.jpg": "a riddle (42)"}
    for path in failures:
        (folder / path).write_bytes(b"" if "broken" in path else path.encode())
    os.mkfifo(folder / "pipe.jpg")
    keep(folder, vectors, failures | {"pipe.jpg": script.UNREADABLE})
    return folder, Cli(model_settings(tiny), tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="module")
def album_page(album):
    folder, _ = album
    path = folder / "gallery.html"
    store = open_folder(folder, gallery=path)
    script.write_gallery(store, store._settings, store.status())
    return written(path)


def test_the_head_says_what_is_superfluous(album_page):
    page, _ = album_page
    assert page.head.startswith("Mugs & More 28 of 57 pictures can be found by similar-product")
    assert "3 groups look the same; superfluous: 2 identical files in 1 group" in page.head
    assert "29 pictures can't be used" in page.head
    assert "16 samples of what looks alike" in page.head
    assert "secret place" not in page.source
    assert "Time was short" not in page.text
    assert "1 file could not be looked at" in page.text
    assert re.search(r"little in common have 0\.[45]\d here", page.text)


def test_groups_have_the_picture_to_keep_first(album_page):
    page, _ = album_page
    first, second, third = page.of("same")
    assert first.title == "Group 1: 3 times the same file"
    assert first.names == ["coffee.png", "=cmd|'copy'.png", "a:b #1 50%;=1+1.png"]
    assert first.marks == ["same file"] * 3
    assert second.title == "Group 2: 4 look the same"
    assert second.names == ["rocket.jpg", "rocket.avif", "rocket.webp", "rocket.png"]
    assert second.marks == ["largest"]
    assert second.text.count("similarity 0.999") == 4
    assert "640 x 427, 75 KB" in second.text
    assert third.names == ["chelsea-2.png", "chelsea.png"]  # whose file has fewer pixels
    assert third.text.count("similarity 0.993") == 2
    assert "new <b>/a:b #1 50%;=1+1.png" in first.text  # the id, to be copied


def test_samples_are_of_different_groups(album_page):
    page, _ = album_page
    cards = page.of("alike")
    groups = [set(card.names) for card in page.of("same")]
    assert [card.pictures for card in cards] == [7] * 16
    assert len({card.title for card in cards}) == 16
    for card in cards:
        assert len(set(card.names)) == 7
        assert all(len(group & set(card.names)) < 2 for group in groups)


def test_failures_are_told_once_with_what_to_do(album_page):
    page, _ = album_page
    empty, *others = page.of("failed")
    assert page.text.count("Similar-product search can't find these until they are mended.") == 1
    assert empty.text.startswith("An empty file 25 The file is damaged or was cut off")
    assert empty.names == [f"broken {n}.jpg" for n in (0, 1, 10, 11, 12, 13, 14, 15)]
    assert empty.text.endswith("And 17 more: see gallery.csv .")
    words = {card.title: card.text for card in others}
    assert "The address is wrong" in words["A web page, not an image"]
    assert "Ask your developer." in words["A riddle"]  # of an older program


def test_pictures_lead_to_the_files_beside_the_page(album, album_page):
    page, _ = album_page
    links = {link for card in page.cards for link in card.links}
    assert "new%20%3Cb%3E/a%3Ab%20%231%2050%25%3B%3D1%2B1.png" in links
    assert all((album[0] / unquote(link)).exists() for link in links)


def test_each_row_of_a_folders_table_is_complete(album, album_page):
    folder, _ = album
    _, rows = album_page
    assert [row["group"] for row in rows] == [*"111222233", *[""] * 29]
    ids = [row["id"].replace("'=", "=") for row in rows]
    for row, path in zip(rows, ids, strict=True):
        if path == "pipe.jpg":  # which can't be looked at
            assert (row["copy"], row["bytes"], row["width"]) == ("", "", "")
            continue
        assert row["bytes"] == str((folder / path).stat().st_size)
        same = path.startswith("broken") or row["group"] == "1"
        assert row["copy"] == ("same file" if same else "no")
        if row["group"]:
            with Image.open(folder / path) as image:
                assert (row["width"], row["height"]) == tuple(map(str, image.size))
        assert row["advice"] == script.advice_on(row["reason"])
    assert [row["keep"] for row in rows[:4]] == ["coffee.png"] * 3 + [""]
    assert {row["reason"] for row in rows[9:]} >= {"an empty file", "a riddle (42)"}


def test_a_page_may_be_of_a_subfolder_and_elsewhere(album, tmp_path):
    folder, cli = album
    path = tmp_path / "x" / "sub.html"
    path.parent.mkdir()
    run = cli("--local", folder, "--client", "new <b>", "--gallery", path)
    page, rows = shown(run, path)
    assert page.head.startswith("new <b> 2 of 2 pictures")
    assert "· Mugs & More" in page.head
    assert len(rows) == 2
    links = [link for card in page.cards for link in card.links]
    assert links
    assert all((path.parent / unquote(link)).is_file() for link in links)


def page_in(folder, store):
    settings = script.Settings(local=folder, gallery=folder / "x.html")
    script.write_gallery(store, settings, script.Status(2, 2, 0))
    return written(folder / "x.html")[0]


def test_an_image_that_broke_since_is_a_box_with_the_reason(photos, tmp_path):
    names = ("a.jpg", "b.jpg")
    for name in names:
        (tmp_path / name).write_bytes(photos["rocket.jpg"])
    store = keep(tmp_path, dict.fromkeys(names, vectors_for(1)[0]), {})
    (tmp_path / "b.jpg").write_bytes(b"")
    (group,) = page_in(tmp_path, store).of("same")
    assert (group.pictures, group.boxes, group.names) == (1, 1, ["a.jpg", "b.jpg"])
    assert group.title == "Group 1: 2 look the same"
    assert script.EMPTY in group.text
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jpg").touch()
    page = page_in(tmp_path / "x", keep(tmp_path / "x", {}, {"a.jpg": "HTTP 503"}))
    assert [card.section for card in page.cards] == ["failed"]


def test_where_time_was_short_the_page_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "LOOK_SECONDS", 0)
    monkeypatch.setattr(script, "BLOCK", 4)
    vectors = {f"{n}.jpg": vector for n, vector in enumerate(vectors_for(9))}
    vectors["8.jpg"] = vectors["0.jpg"]
    for path in vectors:
        (tmp_path / path).write_bytes(b"x")
    page = page_in(tmp_path, keep(tmp_path, vectors, {}))
    assert "Time was short: of 9 pictures 5 were compared with all others, 9 searched" in page.text
    assert "2 files could not be looked at, or not in time." in page.text
    assert page.of("same")[0].marks == []


# Much, and hostile


class Anything:
    """A store of what a test says."""

    def __init__(self, pairs=(), samples=(), failures=()):
        self.told = script.Catalog(list(pairs), 9, 9, 9, list(samples), 0.5, list(failures))

    def catalog(self):
        return self.told

    def locate(self, asset):
        return script.Source(asset.image, {})


def page_of(store, tmp_path, questions=(), **settings):
    given = {"url": "https://abc.supabase.co", "gallery": tmp_path / "x.html"} | settings
    script.write_gallery(store, script.Settings(**given), script.Status(9, 9, 0), questions)
    return written(tmp_path / "x.html")


def test_the_page_stays_below_3_mb_whatever_is_to_be_shown(tmp_path, monkeypatch):
    levels = np.random.default_rng(1).integers(0, 256, (224, 224, 3), np.uint8)  # packs badly
    thumbnail = script.thumbnail(levels)
    noise = f'<img src="{thumbnail}" alt="{script.escaped(ODD, 60)}">', script.File(1)
    monkeypatch.setattr(script, "views_of", lambda some, *_: {one.id: noise for one in some})
    links = [LONG[:150] + ODD, LONG, f"//{LONG}", script.STORAGE + LONG]
    pictures = [
        script.Picture(n, links[n % 4], ODD, f"{n} {ODD}", links[n % 3]) for n in range(1000)
    ]
    pairs = [script.Pair(pictures[n - n % 10], pictures[n], 0.995, False) for n in range(1000)]
    matches = [script.Match(picture, 0.7) for picture in pictures[::10]]
    samples = [script.Sample(pictures[n], matches) for n in range(0, 160, 10)]
    failures = [script.FailedPicture(one, f"{one.id % 40} {ODD}") for one in pictures * 5]
    store = Anything(pairs, samples, failures)
    page, rows = page_of(store, tmp_path, [(ODD, matches)] * 9)
    assert len(page.source) > 1_500_000
    counts = {name: len(page.of(name)) for name in ("asked", "same", "failed", "alike")}
    assert counts == {"asked": 4, "same": 60, "failed": 15, "alike": 16}
    assert [card.pictures for card in page.of("same")] == [6] * 60
    assert page.text.count("And 4 more: see x.csv") == 60
    assert "And 40 more: see x.csv" in page.text
    assert "And 25 more: see x.csv" in page.text
    assert len(rows) == 6000
    assert max(len(link["href"]) for link in page.named("a")) <= 800


@pytest.mark.parametrize(
    ("image", "leads_to"),
    [
        ("//x/a.jpg", ["https://x/a.jpg"]),
        ("/storage/v1/object/public/a.jpg", ["https://abc/storage/v1/object/public/a.jpg"]),
        ("/images/a.jpg", []),
        ("javascript:alert(1)", []),
        ("//" + "x" * 900, []),
        ("/storage/v1/object/" + "&" * 200, []),  # &amp;
    ],
)
def test_a_picture_leads_to_its_original(tmp_path, image, leads_to):
    failures = [script.FailedPicture(script.Picture("7", image), "HTTP 404")]
    page, _ = page_of(Anything(failures=failures), tmp_path, url="https://abc")
    assert page.of("failed")[0].links == leads_to


def test_no_host_keeps_the_page_waiting(tmp_path):
    with ImageHost(otherwise=answers.hang) as host:
        pictures = [script.Picture(n, url) for n, url in enumerate(host.urls(6))]
        pairs = [script.Pair(pictures[0], other, 0.995, False) for other in pictures]
        settings = {"private_hosts": True, "fetch_seconds": 1, "workers": 1}
        (card,) = page_of(Anything(pairs), tmp_path, **settings)[0].of("same")
    assert (card.pictures, card.boxes) == (0, 6)
    assert card.text.count("not in time") >= 4  # one after the other would take six times as long


@pytest.mark.parametrize(
    ("text", "made"),
    [
        *((f"{c}1", f"'{c}1") for c in "=+-@\uff1d"),
        ("\t=1", "\t'=1"),
        ("a;=1", "a;'=1"),
        ('a;"=1', "a;\"'=1"),
        ("a\n+1", "a\n'+1"),
        ("mug - blue, -1", "mug - blue, -1"),
    ],
)
def test_a_cell_that_begins_like_a_formula_is_quoted(text, made):
    assert script.cell(text) == made


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF")),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": exif(6)}),
    ],
)
def test_width_and_height_are_read_without_codecs(kind, options):
    data = saved(Image.new("RGB", (301, 202), "red"), kind, **options)
    assert script.pixels_of(data) == (301, 202)
    for end in (0, 9, 16, 25, 30):
        script.pixels_of(data[:end])  # raises nothing


# What looks the same, of numbers alone


def clustered(count, seed=3):
    """Vectors, some of which are equal and some nearly."""
    rng = np.random.default_rng(seed)
    vectors = vectors_for(count, seed)
    for row in range(0, count, 7):
        vectors[row] = near(vectors[rng.integers(count)], rng.uniform(0.98, 0.9999), row)
    vectors[::11] = vectors[1]
    return vectors


def groups_of(pairs):
    """The ids of the pictures that pairs (one, other, cosine) join."""
    pictures = [script.Picture(n, str(n)) for n in range(300)]
    joined = script.joined(script.Pair(pictures[a], pictures[b], c, False) for a, b, c in pairs)
    return {frozenset(picture.id for picture in group) for group in joined}


@pytest.mark.parametrize("block", [16, 1000])
def test_all_pairs_above_the_line_are_found_and_no_other(monkeypatch, block):
    monkeypatch.setattr(script, "BLOCK", block)
    monkeypatch.setattr(script, "LOOK_SECONDS", 600)  # however busy the machine is
    vectors = clustered(300)
    pairs, looked_at = script.rows_alike(vectors)
    assert looked_at == 300
    assert all(one < other for one, other, _ in pairs)
    assert all(vectors[one] @ vectors[other] >= script.SAME - 1e-6 for one, other, _ in pairs)
    cosines = np.triu(vectors @ vectors.T, 1)
    expected = groups_of((a, b, 1.0) for a, b in np.argwhere(cosines >= script.SAME))
    assert groups_of(pairs) == expected
    assert len(expected) > 10
    assert script.rows_alike(vectors[:0]) == ([], 0)
    assert script.rows_alike(vectors[:1]) == ([], 1)


# Words


def test_a_picture_without_a_title_is_called_by_its_url():
    names = {
        "https://cdn.example/a/Tasse%20blau.jpg?v=3#x": "Tasse blau.jpg",
        "https://cdn.example/a/mug/": "mug",
        "data:image/png;base64,AAAA/BBBB": "17",
        "": "17",
        "https://[broken/x.jpg": "x.jpg",
    }
    for image, name in names.items():
        assert script.Picture(17, image).name == name
        assert script.Picture(17, image, title="Blue mug").name == "Blue mug"


def test_advice_is_in_the_words_of_a_shops_owner():
    for reason in script.ADVICE:
        words = script.advice_on(f"{reason} (a detail)")
        assert words.endswith(".")
        assert not re.search(r"--\w|\.sql|\.env|vector|embed", f"{reason} {words}")
        if re.search("[A-Z]+_[A-Z]|install|proxy|memory is", words):
            assert "ask your developer" in words.lower()


# Where it is written to


def test_a_page_that_can_not_be_written_is_refused_at_once(album_page, album, tmp_path):
    os.mkfifo(tmp_path / "pipe.html")
    os.mkfifo(tmp_path / "piped.csv")
    (tmp_path / "mine.csv").write_text("sku,price\n1,2\n")
    # Who prepared the folder may have put a link there, to a file that is run one day.
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere.html")
    (tmp_path / "linked.csv").symlink_to(tmp_path / "elsewhere.csv")
    links = ("link.html", "linked.html")
    bad = ("there/is/none.html", "page.txt", ".", "pipe.html", "piped.html", "mine.html", *links)
    for name in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            script.page_file(str(tmp_path / name))
    page = album[0] / "gallery.html"  # an earlier one
    assert page.with_suffix(".csv").exists()
    assert script.page_file(str(page)) == page


# From the database


@pytest.fixture(scope="module")
def shop(_stack, photos, tiny, tmp_path_factory):
    """A catalog of two clients with ids of text, odd names, titles and links, 4,500 dead links;
    its page and its table, and those of one client."""
    renew(_stack, id_type="text")
    _stack.sql("alter table assets add column name text, add column page text")
    _stack.sql_as_editor(
        "create or replace function embedding_sources() returns table "
        "(id text, image text, client text, title text, link text) language sql stable as "
        "'select id, image_url, client_name, name, page from public.assets'"
    )
    _stack.reload_schema()
    names = list(photos)
    vectors = vectors_for(len(names))
    cli = stack_cli(_stack, tiny, tmp_path_factory.mktemp("cwd"))
    with ImageHost({f"/a/{name}": photos[name] for name in names}) as host:
        rows = [
            (f"{n:02} {ODD}", host.url_of(f"/a/{name}"), ODD if n % 2 else "other", vector)
            for n, (name, vector) in enumerate(zip(names, vectors, strict=True))
        ]
        inline = "data:image/png;base64," + base64.b64encode(photos["rocket.jpg"]).decode()
        rocket = rows[names.index("rocket.jpg")]
        coffee = rows[names.index("coffee.png")]
        rows.append(("inline", inline, "third", rocket[3]))
        rows.append(("small", f"{host.url}/a/coins.png", coffee[2], near(coffee[3], 0.995)))
        failed = [
            ("gone", host.url_of("/gone%20now.jpg"), ODD, "HTTP 404"),
            ("bad", "javascript:alert(1)", "other", script.OTHER_SCHEME),
            ("none", None, "other", script.NO_IMAGE),
        ]
        failed += [(f"{n}", host.url_of(f"/{n}"), "many", "HTTP 404") for n in range(4500)]
        _stack.add_assets(row[:3] for row in [*rows, *failed])
        version = f"'{TINY_VERSION}', embedding_image_hash(image_url)"
        for asset, _, _, vector in rows:
            _stack.sql(
                "insert into product_embeddings (asset_id, model_version, embedded_image_hash, "
                f"embedding) select id, {version}, %s from assets where id = %s",
                (script.vector_text(vector), asset),
            )
        reasons = {asset: reason for asset, *_, reason in failed}
        for reason in set(reasons.values()):
            _stack.sql(
                "insert into product_embedding_failures (asset_id, model_version, image_hash, "
                f"stage, reason, next_attempt) select id, {version}, 'fetch', %s, "
                "now() + interval '1 h' from assets where id = any(%s)",
                (reason, [asset for asset in reasons if reasons[asset] == reason]),
            )
        _stack.sql("update assets set name = %s where id = %s", (f"Rocket {ODD}", rocket[0]))
        link = f"https://shop.example/{ODD}"
        _stack.sql("update assets set page = %s where id in ('inline', 'gone')", (link,))
        path = cli.folder / "gallery.html"
        whole = shown(cli("--gallery", path), path)
        mine = cli.folder / "mine.html"
        yield link, whole, shown(cli("--gallery", mine, "--client", ODD), mine), host


def test_a_databases_page_leads_to_products(shop):
    link, (page, rows), _, host = shop
    assert page.head.startswith("Products 24 of 4,527 pictures can be found")
    assert "superfluous: 1 repeated picture in 1 group" in page.head
    same, near = page.of("same")
    assert same.title == "Group 1: 2 times the same picture"
    assert sorted(same.names) == sorted(["inline", script.shorten(f"Rocket {ODD}", 60)])
    assert same.marks == ["same picture"] * 2
    assert sorted(same.links) == [f"{host.url}/a/rocket.jpg", link]  # data: is no address
    assert near.names == ["coffee.png", "coins.png"]
    assert near.marks == ["largest"]
    assert " small " in f"{near.text} "  # its id, to be copied
    table = {row["id"]: row for row in rows}
    assert (table["inline"]["copy"], table["small"]["copy"]) == ("same picture", "")
    assert (table["small"]["width"], table["gone"]["link"]) == ("384", link)


def test_a_databases_failures_are_all_in_the_table(shop):
    _, (page, rows), _, _ = shop
    failed = {card.title: card for card in page.of("failed")}
    assert len(rows) == 4 + 4503
    assert failed["HTTP 404"].marks == ["4,501"]
    assert "Nothing is at this address" in failed["HTTP 404"].text
    assert failed["No image URL"].links == []
    odd = failed["Only http, https and data URLs are fetched"]
    assert "javascript:alert(1)" in odd.text
    assert odd.links == []


def test_a_databases_samples_have_no_copies(shop):
    _, (page, _), _, _ = shop
    cards = page.of("alike")
    assert len(cards) == 16
    pairs = [{"coffee.png", "coins.png"}, {"inline", script.shorten(f"Rocket {ODD}", 60)}]
    for card in cards:
        assert 5 <= len(card.names) <= 7  # the index may miss one
        assert not any(pair <= set(card.names) for pair in pairs)


def test_a_clients_page_shows_that_clients_images_alone(shop):
    _, _, (page, rows), _ = shop
    assert page.head.startswith(ODD.split("\u202e")[0])
    assert {row["id"] for row in rows} == {"gone"}
    assert "0 groups look the same" in page.head
    assert "1 pictures can't be used" in page.head
    assert "other" not in {word for card in page.cards for word in card.words}
