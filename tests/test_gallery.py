"""--gallery: the page that a person acts on and its table, from a folder and from the database."""

import argparse
import base64
import csv
import io
import os
import re
import time
import uuid
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from conftest import TINY_VERSION, Cli, model_settings, renew, stack_cli
from database import unit
from PIL import Image
from stack import ImageHost

import generate_embeddings as script

ODD = '"><script>alert(1)</script> & \u202e\u05d0\u05d1\u05d2 ' + "x" * 180
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
    """A gallery taken apart: its headings, links, pictures, text, and its cards by section."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.source = source
        self.tags, self.cards, self.words, self.inside = [], [], [], []
        self.section = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in ("meta", "img"):
            self.inside.append(tag)
        if tag == "h2":
            self.section = ""
        if tag == "article":
            self.cards.append(Card(self.section))
        if "article" not in self.inside:
            return
        card = self.cards[-1]
        if tag == "a":
            card.links.append(attrs["href"])
        if tag == "figcaption":
            card.names.append(attrs["title"])
        if tag == "img":
            card.pictures += 1
        if attrs.get("class") == "none":
            card.boxes += 1

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        self.words.append(data)
        if "h2" in self.inside:
            self.section += data
        elif "article" in self.inside:
            self.cards[-1].words.append(data)
            if "mark" in self.inside:
                self.cards[-1].marks.append(data)
            elif "h3" in self.inside:
                self.cards[-1].title += data.strip()

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, section):
        return [card for card in self.cards if card.section == section]

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def check(self):
        """What holds for every page: it is whole, shows its pictures and loads nothing."""
        for picture in self.named("img"):
            kind, _, data = picture["src"].partition(";base64,")
            assert kind == "data:image/webp"
            shown = Image.open(io.BytesIO(base64.b64decode(data)))
            assert shown.size in ((224, 224), (160, 160), (112, 112))
            assert picture["alt"]
        names = {tag for tag, _ in self.tags}
        assert names.isdisjoint({"script", "link", "iframe", "object", "form", "video", "base"})
        assert not any(name.startswith("on") for _, attrs in self.tags for name in attrs)
        policies = [attrs["content"] for _, attrs in self.tags if "http-equiv" in attrs]
        assert policies == [POLICY]
        assert "url(" not in self.source
        for link in self.named("a"):
            assert urlsplit(link["href"]).scheme in ("http", "https", "")
            if not link["href"].startswith("#"):
                assert (link["target"], link["rel"]) == ("_blank", "noreferrer")
        assert len(self.named("h1")) == 1
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert [link["href"] for link in self.named("a")][:3] == ["#same", "#failed", "#alike"]
        assert sorted(ids) == ["alike", "failed", "same"]
        assert len(self.source) < 3_000_000
        return self


def written(run, path):
    """The page of a run, which says last on stderr where it is; and its table's rows."""
    assert run.err.splitlines()[-1].endswith(f"look at {Path(path).as_uri()}"), run.err
    page = Page(Path(path).read_text()).check()
    with path.with_suffix(".csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return page, rows


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
    """Puts vectors and failures (reason, permanent) by path into a folder's file."""
    store = script.FolderStore(script.Settings(local=folder, model_version=TINY_VERSION))
    store.status()
    results = []
    for asset in (asset for page in store.pages() for asset in page):
        if asset.id in vectors:
            results.append(script.Embedded(asset, vectors[asset.id]))
        else:
            results.append(script.Failed(asset, "decode", *failures[asset.id]))
    store.save(results)
    return store


# A folder


@pytest.fixture(scope="module")
def album(photos, tiny, tmp_path_factory):
    """A folder: 22 photographs, a file twice, a picture in another format, two that look alike,
    =odd names, 30 files that are none; its page and its table."""
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
    add("new <b>/a:b #1 50%.png", photos["coffee.png"], vectors["coffee.png"])
    saved = io.BytesIO()
    Image.open(io.BytesIO(photos["rocket.jpg"])).save(saved, "PNG")
    add("rocket.png", saved.getvalue(), vectors["rocket.jpg"])
    add("chelsea-2.png", photos["cell.png"], near(vectors["chelsea.png"], 0.993))
    failures = {f"broken {n}.jpg": ("an empty file", True) for n in range(25)}
    failures |= {
        "page.jpg": ("an HTML page, not an image", True),
        "svg.jpg": ("an SVG drawing", True),
    }
    for path in failures:
        (folder / path).write_bytes(b"")
    keep(folder, vectors, failures)
    cli = Cli(model_settings(tiny), tmp_path_factory.mktemp("cwd"))
    path = folder / "gallery.html"
    page, rows = written(cli("--local", folder, "--gallery", path), path)
    return folder, cli, page, rows


def test_the_head_has_the_folders_name_and_links_to_what_is_counted(album):
    _, _, page, _ = album
    assert page.text.startswith("Mugs & More")
    assert f"26 of 53 pictures embedded · {time.localtime().tm_mday} " in page.text
    head = page.text[: page.text.index("Looks the same")]
    assert "3 groups looking the same" in head
    assert "27 pictures that can't be used" in head
    assert "16 samples of look-alikes" in head
    assert "secret place" not in page.source


def test_copies_are_marked_and_come_first(album):
    _, _, page, _ = album
    first, second, third = page.of("Looks the same")
    assert sorted(first.names) == ["=cmd|'copy'.png", "a:b #1 50%.png", "coffee.png"]
    assert (first.title, first.marks) == ("Group 1: 3 copies, in 2 folders", ["same file"] * 3)
    assert sorted(second.names) == ["rocket.jpg", "rocket.png"]
    assert (second.title, second.marks) == ("Group 2: 2 copies", ["same picture"] * 2)
    assert sorted(third.names) == ["chelsea-2.png", "chelsea.png"]
    assert (third.title, third.marks) == ("Group 3: 2 look the same", [])
    assert third.text.count("0.993") == 2
    assert "coffee.png 1.000 Mugs & More " in first.text  # the folder itself is one, too
    assert "1.000 new <b> " in first.text
    assert "427 x 640, " in second.text or "640 x 427, " in second.text


def test_the_page_says_what_counts_as_the_same(album):
    _, _, page, _ = album
    assert "A similarity of 0.99 or more" in page.text
    assert re.search(r"little in common have 0\.[45]\d here", page.text)
    assert "Time was short" not in page.text


def test_each_sample_has_its_six_nearest(album):
    _, _, page, _ = album
    rows = page.of("Looks alike")
    assert len(rows) == 16
    assert {len(row.names) for row in rows} == {7}
    assert {row.pictures for row in rows} == {7}
    coffee = next(row for row in rows if "coffee.png" in row.names[0] or "=cmd" in row.names[0])
    assert coffee.text.count("1.000") == 2


def test_what_can_not_be_used_is_counted_and_named_with_advice(album):
    _, _, page, _ = album
    empty, web, svg = page.of("Can't be used")
    assert empty.text.startswith("An empty file 25 The file is damaged or was cut off")
    assert "Tried again when the file changes." in empty.text
    assert "broken 9.jpg" not in empty.text  # the twenty first: 0, 1, 10, ... in order
    assert empty.text.endswith("and 5 more: see gallery.csv")
    assert "An HTML page, not an image 1 This is a web page" in web.text
    assert "page.jpg page.jpg" in web.text
    assert svg.links == ["svg.jpg"]


def test_pictures_lead_to_the_files_beside_the_page(album):
    folder, _, page, _ = album
    links = {link for card in page.cards for link in card.links}
    assert "new%20%3Cb%3E/a%3Ab%20%231%2050%25.png" in links
    assert all((folder / unquote(link)).is_file() for link in links)


def test_the_table_has_every_group_and_every_failure(album, photos):
    _, _, _, rows = album
    groups = [row for row in rows if row["what"] == "looks the same"]
    failed = [row for row in rows if row["what"] == "can't be used"]
    assert [row["group"] for row in groups] == ["1", "1", "1", "2", "2", "3", "3"]
    assert [row["copy"] for row in groups[:5]] == ["same file"] * 3 + ["same picture"] * 2
    assert len(failed) == 27
    assert {row["reason"] for row in failed} == {
        "an empty file",
        "an HTML page, not an image",
        "an SVG drawing",
    }
    rocket = next(row for row in groups if row["id"] == "rocket.jpg")
    size = str(len(photos["rocket.jpg"]))
    assert (rocket["width"], rocket["height"], rocket["bytes"]) == ("640", "427", size)


def test_no_cell_of_the_table_is_a_formula(album):
    _, _, _, rows = album
    assert "'=cmd|'copy'.png" in {row["name"] for row in rows}
    assert not [text for row in rows for text in row.values() if text[:1] in tuple("=+-@\t\r")]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx"])
def test_a_cell_that_begins_like_a_formula_is_quoted(text):
    assert script.cell(text) == f"'{text}"
    assert script.cell(f"a{text}") == f"a{text}"


def test_a_page_may_be_of_a_subfolder_and_elsewhere(album, tmp_path):
    folder, cli, _, _ = album
    path = tmp_path / "x" / "sub.html"
    path.parent.mkdir()
    page, rows = written(cli("--local", folder, "--client", "new <b>", "--gallery", path), path)
    assert page.text.startswith("new <b> · Mugs & More")
    assert {name for card in page.cards for name in card.names} == {
        "=cmd|'copy'.png",
        "a:b #1 50%.png",
    }
    assert [row["what"] for row in rows] == ["looks the same"] * 2
    for card in page.cards:
        assert all((path.parent / unquote(link)).is_file() for link in card.links)


def test_an_image_that_broke_since_is_a_box_with_the_reason(photos, tmp_path):
    names = ("a.jpg", "b.jpg")
    for name in names:
        (tmp_path / name).write_bytes(photos["rocket.jpg"])
    vector = vectors_for(1)[0]
    store = keep(tmp_path, dict.fromkeys(names, vector), {})
    (tmp_path / "b.jpg").write_bytes(b"")
    settings = script.Settings(
        local=tmp_path, model_version=TINY_VERSION, gallery=tmp_path / "x.html"
    )
    script.write_gallery(store, settings, script.Status(2, 2, 0))
    page = Page((tmp_path / "x.html").read_text()).check()
    (group,) = page.of("Looks the same")
    assert (group.pictures, group.boxes, group.marks) == (1, 1, [])
    assert "an empty file" in group.text


def test_a_folder_of_failures_alone_has_a_page_too(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    store = keep(tmp_path, {}, {"a.jpg": ("HTTP 503 Service Unavailable", False)})
    settings = script.Settings(
        local=tmp_path, model_version=TINY_VERSION, gallery=tmp_path / "x.html"
    )
    script.write_gallery(store, settings, script.Status(1, 0, 1))
    page = Page((tmp_path / "x.html").read_text()).check()
    assert [card.section for card in page.cards] == ["Can't be used"]
    assert "Later runs try again." in page.text
    assert "No two pictures do." in page.text


def test_the_page_stays_below_3_mb_whatever_is_to_be_shown(tmp_path):
    levels = np.random.default_rng(1).integers(0, 256, (224, 224, 3), np.uint8)  # packs badly
    noise = script.View(levels, b"", b"", 1, None)
    pictures = [script.Picture(n, f"https://x/{n}.jpg", ODD, f"{n} {ODD}") for n in range(600)]
    views = dict.fromkeys(range(600), noise)
    matches = [script.Match(picture, 0.995) for picture in pictures]
    groups = [matches[n : n + 6] for n in range(0, 600, 6)]
    samples = [script.Sample(pictures[n], matches[:6]) for n in range(16)]
    failures = [
        script.FailedPicture(picture, f"{picture.id} {ODD}", True) for picture in pictures * 5
    ]
    catalog = script.Catalog([], 9, 9, 9, samples, 0.5, failures)
    settings = script.Settings(url="https://abc.supabase.co", gallery=tmp_path / "x.html")
    answers = [script.Answer(ODD, matches)] * 3
    page = script.Page(settings, views).whole(script.Status(9, 9, 0), catalog, groups, answers)
    page = Page(page).check()
    assert len(page.source) > 1_500_000
    shown = len(page.of("Looks the same"))
    assert 5 < shown < 60
    assert f"And {100 - shown} more groups, without pictures" in page.text
    assert re.search(r"And [\d,]+ more reasons: see x\.csv", page.text)


def page_of(groups, views, tmp_path, **settings):
    """A database's page with these groups alone."""
    catalog = script.Catalog([], 9, 9, 9, [], None, [])
    settings = script.Settings(gallery=tmp_path / "x.html", **settings)
    return Page(script.Page(settings, views).whole(script.Status(9, 9, 0), catalog, groups, []))


def pairs_of(count):
    """Groups of two, of two clients, with ids that the pages show where there is no picture."""
    pictures = [
        script.Picture(f"id-{n}", f"https://x/{n}.jpg", f"client {n % 2}", f"mug {n // 2}")
        for n in range(2 * count)
    ]
    matches = [script.Match(picture, 0.9951) for picture in pictures]
    return [matches[n : n + 2] for n in range(0, 2 * count, 2)]


def test_groups_without_pictures_are_there_as_text_with_ids(tmp_path):
    page = page_of(pairs_of(70), {}, tmp_path)
    assert len(page.of("Looks the same")) == 60
    rest = page.text[page.text.index("And 10 more groups, without pictures") :]
    assert "Group 61: 2 look the same, in 2 clients" in rest
    assert "mug 60 0.995 · client 0 · id-120 mug 60 0.995 · client 1 · id-121" in rest
    assert "id-139" in rest
    assert "https://x/139.jpg" in {link["href"] for link in page.named("a")}
    assert rest.count("see x.csv") == 0


def test_groups_without_room_as_text_are_counted(tmp_path):
    page = page_of(pairs_of(5000), {}, tmp_path)
    assert len(page.source.encode()) < 250_000
    listed = page.text.count("look the same, in 2 clients")
    assert 300 < listed < 5000
    assert f"And {5000 - listed:,} more: see x.csv" in page.text


def view(picture, file):
    return script.View(np.zeros((224, 224, 3), np.uint8), picture, file, 1, None)


def test_copies_of_different_pictures_are_told_apart(tmp_path):
    (one, other), (third, fourth) = pairs_of(2)
    group = [one, other, third, fourth]
    files = [view(b"a", b"1"), view(b"a", b"1"), view(b"b", b"2"), view(b"b", b"3")]
    views = {match.picture.id: view for match, view in zip(group, files, strict=True)}
    (card,) = page_of([group], views, tmp_path).of("Looks the same")
    assert card.title == "Group 1: 4 look the same, in 2 clients"
    assert card.marks == ["same file 1", "same file 1", "same picture 2", "same picture 2"]


def test_what_was_not_looked_at_is_not_called_a_copy(tmp_path):
    group = [match for pair in pairs_of(15) for match in pair]
    views = {match.picture.id: view(b"a", b"1") for match in group[:6]}
    (card,) = page_of([group], views, tmp_path).of("Looks the same")
    assert card.title == "Group 1: 30 look the same, in 2 clients"
    assert card.marks == ["same file"] * 6
    assert "and 24 more mug 3 0.995 · client 0 · id-6 " in card.text
    assert card.text.endswith("id-25 and 4 more: see x.csv")


@pytest.mark.parametrize(
    ("image", "leads_to"),
    [
        ("//x/a.jpg", ["https://x/a.jpg"]),
        ("/storage/v1/object/public/a.jpg", ["https://abc/storage/v1/object/public/a.jpg"]),
        ("/images/a.jpg", []),
        ("javascript:alert(1)", []),
    ],
)
def test_a_picture_leads_to_its_original(tmp_path, image, leads_to):
    group = [script.Match(script.Picture("7", image), 1.0)]
    (card,) = page_of([group], {}, tmp_path, url="https://abc").of("Looks the same")
    assert card.links == leads_to


def test_no_host_keeps_the_page_waiting(tmp_path):
    def hang(handler):
        handler.connection.recv(1)
        handler.close_connection = True

    class Anywhere:
        def locate(self, asset):
            return script.Place(asset.image, {})

    files = {f"/{n}.jpg": hang for n in range(6)}
    settings = script.Settings(private_hosts=True, fetch_seconds=1, workers=1)
    with ImageHost(files) as host:
        pictures = {script.Picture(n, host.url_of(path)) for n, path in enumerate(files)}
        began = time.monotonic()
        views = script.views_of(pictures, Anywhere(), settings)
        assert time.monotonic() - began < 4  # one after the other they take six seconds
    assert len(views) == 6
    assert {view.split(" (")[0] for view in views.values()} == {
        "not in time",
        "not complete within 1 s",
    }


# What look the same, of numbers alone


def clustered(count, seed=3):
    """Vectors, some of which are equal and some nearly."""
    rng = np.random.default_rng(seed)
    vectors = vectors_for(count, seed)
    for row in range(0, count, 7):
        vectors[row] = near(vectors[rng.integers(count)], rng.uniform(0.98, 0.9999), row)
    vectors[::11] = vectors[1]
    return vectors


@pytest.mark.parametrize("block", [16, 1000])
def test_all_pairs_above_the_line_are_found_and_no_other(monkeypatch, block):
    monkeypatch.setattr(script, "BLOCK", block)
    monkeypatch.setattr(script, "LOOK_SECONDS", 600)  # however busy the machine is
    vectors = clustered(300)
    pairs, looked_at = script.rows_alike(vectors)
    assert looked_at == 300
    assert all(vectors[one] @ vectors[other] >= script.SAME - 1e-6 for one, other, _ in pairs)

    def groups(pairs):
        pictures = [script.Picture(n, str(n)) for n in range(300)]
        pairs = [script.Pair(pictures[a], pictures[b], cosine) for a, b, cosine in pairs]
        made = script.groups_of(pairs)
        return {frozenset(match.picture.id for match in group) for group in made}

    cosines = np.triu(vectors @ vectors.T, 1)
    expected = [(int(a), int(b), 1.0) for a, b in np.argwhere(cosines >= script.SAME)]
    assert groups(pairs) == groups(expected)
    assert len(groups(pairs)) > 10


@pytest.mark.parametrize("block", [16, 1000])
def test_no_pair_is_missed_where_one_axis_tells_them_all_apart(monkeypatch, block):
    monkeypatch.setattr(script, "BLOCK", block)
    angles = np.random.default_rng(4).permutation(np.linspace(0, np.pi / 2, 200))
    vectors = np.zeros((200, 512), np.float32)
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    pairs, _ = script.rows_alike(vectors)
    apart = np.abs(angles[:, None] - angles)
    near = np.argwhere(np.triu(apart < np.arccos(script.SAME) - 1e-4, 1))
    found = {frozenset((one, other)) for one, other, _ in pairs}
    assert found >= {frozenset(map(int, pair)) for pair in near}
    assert all(apart[one, other] < np.arccos(script.SAME) + 1e-4 for one, other, _ in pairs)


def test_copies_are_found_even_where_time_is_short(monkeypatch):
    monkeypatch.setattr(script, "LOOK_SECONDS", 0)
    monkeypatch.setattr(script, "BLOCK", 16)
    vectors = clustered(300)
    pairs, looked_at = script.rows_alike(vectors)
    copies = {(one, other) for one, other, cosine in pairs if cosine == 1}
    assert copies >= {(0, row) for row in range(11, 300, 11)}
    assert len(copies) <= looked_at < len(copies) + 2 * 16


@pytest.mark.parametrize("count", [0, 1])
def test_a_folder_of_nothing_has_no_pairs(count):
    assert script.rows_alike(vectors_for(count)) == ([], count)


def test_pairs_that_share_a_picture_are_one_group():
    a, b, c, d, e = (script.Picture(name, name) for name in "abcde")
    pairs = [script.Pair(a, b, 0.991), script.Pair(d, e, 0.999), script.Pair(c, b, 0.995)]
    first, second = script.groups_of(pairs)
    assert {match.picture.id: match.similarity for match in first} == {"d": 0.999, "e": 0.999}
    assert [match.picture.id for match in second] in (["b", "c", "a"], ["c", "b", "a"])
    assert second[-1].similarity == 0.991


# Words


@pytest.mark.parametrize(
    ("image", "title", "name"),
    [
        ("https://cdn.example/a/Tasse%20blau.jpg?v=3#x", "", "Tasse blau.jpg"),
        ("https://cdn.example/a/mug/", "", "mug"),
        ("https://cdn.example/a/%D7%A9.jpg", "", "\u05e9.jpg"),
        ("https://cdn.example/a/mug.jpg", "Blue mug", "Blue mug"),
        ("data:image/png;base64,AAAA/BBBB", "", "17"),
        ("", "", "17"),
        ("https://[broken/x.jpg", "", "x.jpg"),
    ],
)
def test_a_picture_without_a_title_is_called_by_its_url(image, title, name):
    assert script.Picture(17, image, "", title).name == name


REASONS = {
    "HTTP 403 Forbidden": "refuses us",
    "HTTP 404 Not Found": "Nothing is at this address",
    "HTTP 400 Bad Request": "nothing at this address",
    "HTTP 407 Proxy Authentication Required": "The proxy wants a name",
    "HTTP 420": "fewer requests",
    "broken compression": "The host has trouble",
    "a redirect elsewhere: no full URL": "Correct the address",
    "HTTP 503 Service Unavailable": "run again later",
    "not complete within 30 s": "run again later",
    "connection lost": "run again later",
    "host not found": "No host has this name",
    "no name server answered": "This machine's network",
    "the host's certificate is not valid": "REQUESTS_CA_BUNDLE",
    "no image URL": "Give the product an image",
    "not a valid URL": "Correct the address",
    "only http, https and data URLs are fetched": "Correct the address",
    script.BROKEN: "ask for it again",
    script.TOO_LARGE: "Save it smaller",
    script.TOO_MUCH: "Save it smaller",
    script.TOO_SLOW: "Save it smaller",
    f"smaller than {script.MIN_SIDE} pixels a side": "larger image",
    "an SVG drawing, which has no pixels": "JPEG or PNG",
    "a PDF, not an image": "JPEG or PNG",
    "an HTML page, not an image": "web page",
}


@pytest.mark.parametrize("reason", REASONS)
def test_a_reason_has_its_advice(reason):
    assert REASONS[reason] in script.advice(reason)


@pytest.mark.parametrize(
    "reason",
    [
        "new row violates check constraint",
        f"HTTP 403 Forbidden, a check for robots: {script.ROBOT_ADVICE}",
        "HEIC: pip install pillow-heif, then run again",
        'no full URL: see "Your tables" in schema.sql',
    ],
)
def test_there_is_no_advice_where_we_do_not_know_or_it_is_in_the_reason(reason):
    assert script.advice(reason) == ""


# Where it is written to


@pytest.mark.parametrize("name", ["there/is/none.html", "page.txt", ".", "pipe.html", "piped.html"])
def test_a_page_that_can_not_be_written_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.html")
    os.mkfifo(tmp_path / "piped.csv")
    with pytest.raises(argparse.ArgumentTypeError):
        script.page_file(str(tmp_path / name))


def test_somebodys_own_table_is_not_overwritten(tmp_path):
    (tmp_path / "products.csv").write_text("sku,price\n1,2\n")
    with pytest.raises(argparse.ArgumentTypeError, match=r"products\.csv' is yours"):
        script.page_file(str(tmp_path / "products.html"))


def test_a_table_of_an_earlier_page_is(album):
    folder, _, _, _ = album
    assert script.page_file(str(folder / "gallery.html")) == folder / "gallery.html"
    assert (folder / "gallery.csv").exists()


# From the database


def text_of(vector):
    return script.vector_text(vector)


def put(stack, rows, version=TINY_VERSION):
    """Puts (id, url, client, vector) into the catalog, as if they had been embedded."""
    rows = list(rows)
    stack.add_assets(row[:3] for row in rows)
    for asset, *_, vector in rows:
        stack.sql(
            "insert into product_embeddings (asset_id, embedding, model_version) "
            "values (%s, %s, %s)",
            (asset, text_of(vector), version),
        )


@pytest.fixture(scope="module")
def shop(_stack, photos, tiny, tmp_path_factory):
    """A catalog of two clients with ids of text, odd names and titles; its page and its table, and
    those of one client."""
    renew(_stack, id_type="text")
    _stack.sql("alter table assets add column name text")
    _stack.sql(
        "create or replace view embedding_sources with (security_invoker = true) as "
        "select id, image_url as image, client_name as client, name as title from assets"
    )
    names = [name for name in photos if name != "chelsea.png"]
    vectors = vectors_for(len(names))
    cli = stack_cli(_stack, tiny, tmp_path_factory.mktemp("cwd"))
    with ImageHost({f"/a/{name}": photos[name] for name in names}) as host:
        rows = [
            (f"{n:02} {ODD}", host.url_of(f"/a/{name}"), ODD if n % 2 else "other", vector)
            for n, (name, vector) in enumerate(zip(names, vectors, strict=True))
        ]
        inline = "data:image/png;base64," + base64.b64encode(photos["rocket.jpg"]).decode()
        rocket = rows[names.index("rocket.jpg")]
        rows.append(("inline", inline, f"not {rocket[2]}", rocket[3]))
        put(_stack, rows)
        _stack.sql("update assets set name = %s where id = %s", (f"Rocket {ODD}", rocket[0]))
        failed = [
            ("gone", host.url_of("/gone%20now.jpg"), ODD, "HTTP 404 Not Found"),
            ("bad", "javascript:alert(1)", "other", "only http, https and data URLs are fetched"),
            ("none", None, "other", "no image URL"),
        ]
        _stack.add_assets(row[:3] for row in failed)
        for asset, *_, reason in failed:
            note_failure(_stack, asset, reason)
        path = cli.folder / "gallery.html"
        whole = written(cli("--gallery", path), path)
        mine = cli.folder / "mine.html"
        yield rocket, whole, written(cli("--gallery", mine, "--client", ODD), mine)


def note_failure(stack, asset, reason):
    stack.sql(
        "insert into product_embedding_failures (asset_id, model_version, stage, reason, permanent)"
        " values (%s, %s, 'fetch', %s, true)",
        (asset, TINY_VERSION, reason),
    )


def test_a_database_s_page_has_titles_and_clients(shop):
    rocket, (page, rows), _ = shop
    (group,) = page.of("Looks the same")
    assert sorted(group.names) == sorted([script.shorten(f"Rocket {ODD}", 200), "inline"])
    assert (group.title, group.marks) == ("Group 1: 2 copies, in 2 clients", ["same file"] * 2)
    assert group.links == [rocket[1]]  # a data: URL is no address
    names = {row["name"] for row in rows}
    assert names == {f"Rocket {ODD}", "inline", "gone now.jpg", "javascript:alert(1)", "none"}


def test_a_database_s_samples_have_their_nearest(shop):
    _, (page, _), _ = shop
    rows = page.of("Looks alike")
    assert len(rows) == 16
    assert {len(row.names) for row in rows} <= {6, 7}  # the index may miss one


def test_names_of_any_kind_are_escaped(shop):
    _, (page, _), _ = shop
    assert "<script" not in page.source
    assert any("<script>alert(1)</script>" in word for word in page.words)


def test_only_web_addresses_become_links(shop):
    _, (page, _), _ = shop
    failed = {card.title: card for card in page.of("Can't be used")}
    assert "Tried again when the address changes, or with --retry-failed." in page.text
    assert " none · other none" in failed["No image URL"].text
    assert [len(card.links) for card in failed.values()].count(1) == 1
    assert failed["HTTP 404 Not Found"].links[0].endswith("/gone%20now.jpg")
    assert "javascript:alert(1)" in failed["Only http, https and data URLs are fetched"].text


def test_a_clients_page_shows_that_clients_images_alone(shop):
    _, _, (page, rows) = shop
    assert page.text.startswith(ODD.split("\u202e")[0])
    assert {row["id"] for row in rows} == {"gone"}
    assert "0 groups looking the same" in page.text
    assert "1 picture that can't be used" in page.text
    clients = {word for card in page.of("Looks alike") for word in card.words}
    assert "other" not in clients


@pytest.fixture
def similar(stack):
    """A database with 200 vectors, some of which are equal and some nearly; their ids."""
    vectors = clustered(200)
    ids = [str(uuid.UUID(int=n)) for n in range(200)]
    put(
        stack,
        (
            (ids[n], f"https://cdn.example/{n}.jpg", f"client {n % 2}", vector)
            for n, vector in enumerate(vectors)
        ),
    )
    return ids, vectors


def groups_in(answer):
    pairs, *_ = script.read_pairs(answer)
    return {frozenset(m.picture.id for m in group) for group in script.groups_of(pairs)}


def test_a_database_finds_what_looks_the_same(stack, similar):
    ids, vectors = similar
    answer = stack.sql("select embedding_pairs(%s)", [TINY_VERSION])[0][0]
    assert (answer["embedded"], answer["looked_at"]) == (200, 200)
    cosines = np.triu(vectors @ vectors.T, 1)
    pictures = [script.Picture(asset, "") for asset in ids]
    expected = script.groups_of(
        [script.Pair(pictures[a], pictures[b], 1.0) for a, b in np.argwhere(cosines >= script.SAME)]
    )
    assert groups_in(answer) == {frozenset(m.picture.id for m in group) for group in expected}
    assert len(expected) > 5


def test_copies_are_found_where_the_database_has_no_time(stack, similar):
    ids, _ = similar
    answer = stack.sql("select embedding_pairs(%s, seconds => 0)", [TINY_VERSION])[0][0]
    copies = {row["other"] for row in answer["pairs"]}
    assert copies >= {ids[n] for n in range(11, 200, 11)}
    assert answer["looked_at"] == len(copies)
    none = stack.sql("select embedding_pairs('other')")[0][0]
    assert (none["pairs"], none["embedded"]) == ([], 0)


def test_a_client_has_its_own_pairs_alone(stack, similar):
    ids, _ = similar
    answer = stack.sql("select embedding_pairs(%s, 'client 1')", [TINY_VERSION])[0][0]
    assert answer["embedded"] == 100
    assert {p["id"] for p in answer["pictures"]} <= {ids[n] for n in range(1, 200, 2)}
    assert answer["pairs"]


def test_all_failures_come_page_by_page_and_a_view_of_three_columns_does(stack, cli, tmp_path):
    columns = (
        "select attname from pg_attribute where attrelid = 'embedding_sources'::regclass "
        "order by attnum"
    )
    assert stack.sql(columns) == [("id",), ("image",), ("client",)]  # as people have edited it
    stack.sql(
        "insert into assets select md5(n::text)::uuid, 'https://cdn.example/tea%20' || n || '.jpg',"
        " 'x' from generate_series(1, 4500) n"
    )
    stack.sql(
        "insert into product_embedding_failures (asset_id, model_version, stage, reason, permanent)"
        " select id, %s, 'fetch', 'HTTP 404 Not Found', true from assets",
        [TINY_VERSION],
    )
    page, rows = written(cli("--gallery", tmp_path / "x.html"), tmp_path / "x.html")
    assert {row["name"] for row in rows} == {f"tea {n}.jpg" for n in range(1, 4501)}
    assert len(rows) == 4500
    assert "HTTP 404 Not Found 4,500 Nothing is at this address" in page.text


EMPTY = {
    **{"samples": [], "typical": None, "matches": [], "failures": [], "last": None},
    **{"pairs": [], "embedded": 0, "sought_among": 0, "looked_at": 0, "pictures": []},
}
PICTURE = {"id": 1, "image": "", "client": "", "title": ""}
HOSTILE_ANSWERS = {
    "nothing": None,
    "a list": [],
    "a text": "text",
    "no key": {},
    "a number": EMPTY | {"pictures": 5},
    "no name": EMPTY | {"pictures": [{"id": 1}]},
    "an id that is none": EMPTY | {"pictures": [PICTURE | {"id": []}]},
    "no text": EMPTY | {"pictures": [PICTURE | {"image": None}]},
    "a title that is none": EMPTY | {"pictures": [PICTURE | {"title": {}}]},
}
READERS = [script.read_samples, script.read_pairs, script.read_failures, script.read_matches]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("answer", HOSTILE_ANSWERS)
def test_an_answer_that_makes_no_sense_is_none(reader, answer):
    reader(EMPTY)
    with pytest.raises((AttributeError, LookupError, TypeError, ValueError)):
        reader(HOSTILE_ANSWERS[answer])


@pytest.mark.parametrize("function", ["embedding_gallery", "embedding_pairs", "failed_assets"])
def test_a_database_that_talks_nonsense_is_said_to(stack, cli, tmp_path, function):
    def nonsense(request):
        if request.path.endswith(f"/rpc/{function}"):
            return 200, [("Content-Type", "application/json")], b'{"pictures": [[[]]]}'
        return None

    stack.gateway.fault = nonsense
    run = cli("--gallery", tmp_path / "x.html", DB_RETRY_SECONDS=0.5)
    assert run.code == 2
    assert f"an answer that {function} never gives" in run.error
    assert not (tmp_path / "x.html").exists()
