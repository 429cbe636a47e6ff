"""--gallery: a page that a shop's owner acts on, and its table.

Each picture leads to its original, each name to the product, or there is the id. The page loads and
runs nothing, has at most 3 MB, and says what was cut. No spreadsheet takes a cell for a formula.
"""

import argparse
import base64
import csv
import io
import os
import re
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.parse import unquote, urlsplit

import answers
import numpy as np
import pytest
from conftest import near, open_folder, open_store, pending, renew, stack_cli
from database import unit
from PIL import Image
from samples import saved
from stack import ImageHost

import generate_embeddings as script

ODD = '"><script>alert(1)</script> & {{ 7 }} \u202e\u05d0\u05d1\u05d2 ' + "x" * 180
LONG = "https://cdn.example/" + "&" * 5000
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def found(pattern, source):
    """What stands at a pattern, as people read it."""
    source = source.replace("<wbr>", "")
    texts = (re.sub("<[^>]*>", " ", text) for text in re.findall(pattern, source, re.DOTALL))
    return [" ".join(unescape(text).split()) for text in texts]


class Card:
    """One article of a page: a group, a reason, a sample, a question."""

    def __init__(self, section, source):
        self.section = section
        self.text = " ".join(found("(.*)", source)).strip()
        self.title = found(r"<h3>(.*?)(?:<mark>.*)?</h3>", source)[0]
        self.names = found("<b>(.*?)</b>", source)  # of its pictures, in order
        self.marks = found("<mark>(.*?)</mark>", source)
        self.links = found('href="(.*?)"', source)
        self.pictures = source.count("<img ")
        self.boxes = source.count('class="none"')  # where a picture could not be had


class Page(HTMLParser):
    """A gallery taken apart; it was checked for what holds for each of them."""

    def __init__(self, source):
        super().__init__()
        self.source, self.tags = source, []
        self.feed(source)
        self.check()
        self.cards = [
            Card(section, card)
            for section, cards in re.findall('<section id="(.*?)">(.*?)</section>', source, re.S)
            for card in re.findall("<article.*?</article>", cards, re.S)
        ]
        self.text = " ".join(found("</style>(.*)", source))
        self.head = self.text[: self.text.index("These are copies, resized")]
        for card in self.cards:
            assert not re.search(r"--[a-z]|vector|embedded|schema\.sql|\.env|1\.000", card.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def of(self, section):
        return [card for card in self.cards if card.section == section]

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def check(self):
        assert all(picture["alt"] for picture in self.named("img"))
        for address in {picture["src"] for picture in self.named("img")}:
            kind, _, data = address.partition(";base64,")
            assert kind == "data:image/webp"
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 160)
        names = {tag for tag, _ in self.tags}
        assert names.isdisjoint({"script", "link", "iframe", "object", "form", "video", "base"})
        assert not any(name.startswith("on") for _, attrs in self.tags for name in attrs)
        assert [attrs["content"] for _, attrs in self.tags if "http-equiv" in attrs] == [POLICY]
        assert "url(" not in self.source
        inside, outside = self.named("a")[:3], self.named("a")[3:]
        assert [link["href"] for link in inside] == ["#same", "#failed", "#alike"]
        for link in outside:
            assert urlsplit(link["href"]).scheme in ("http", "https", "")
            assert (link["target"], link["rel"]) == ("_blank", "noreferrer")
        assert len(self.named("h1")) == 1
        ids = {attrs["id"] for attrs in self.named("section")}
        assert ids - {"asked"} == {"same", "failed", "alike"}
        assert len(self.source.encode()) < 3_000_000


def written(path):
    """The page at a path, and its table's rows."""
    table = path.with_suffix(".csv").read_bytes()
    assert table.startswith(b"\xef\xbb\xbf")  # else Excel takes it for another encoding
    rows = list(csv.DictReader(io.StringIO(table.decode("utf-8-sig"), newline="")))
    for row in rows:
        for text in row.values():
            assert not re.search(r"""(^|[;\t\r\n])[\s"]*[=+@-]""", text), text
            assert len(text) <= 2010
    return Page(path.read_text()), rows


def page_of(store, tmp_path, answers=None, status=(9, 9, 0), **settings):
    """The page of a store, and its table's rows."""
    given = {"url": "https://abc.supabase.co", "gallery": tmp_path / "x.html"} | settings
    gallery = script.Gallery(store, script.Settings(**given), script.Status(*status), answers or {})
    gallery.write()
    return written(given["gallery"])


def vectors_for(count, seed=1):
    """Vectors of pictures that have little in common: cosines of 0.5 or so."""
    random = unit(np.random.default_rng(seed).standard_normal((count, 512)))
    return unit(random + np.eye(1, 512)).astype("<f4")


def keep(store, vectors, failures):
    """Puts vectors, and the reasons of failures, by id into a store."""
    assets = {asset.id: asset for asset in pending(store)}
    results = [script.Embedded(assets[id_], vector) for id_, vector in vectors.items()]
    results += [script.Failed(assets[id_], "decode", reason) for id_, reason in failures.items()]
    store.save(results)
    return store


@pytest.fixture(scope="module")
def album(photos, tmp_path_factory):
    """A folder: 22 photographs, a file three times, one in six other formats, two that look
    alike, odd names, 30 files that failed; with its page and its table."""
    folder = tmp_path_factory.mktemp("secret place") / "Mugs & More"
    (folder / "a <b>").mkdir(parents=True)
    files = dict(photos)
    vectors = dict(zip(files, vectors_for(len(files)), strict=True))
    for copy in ("a <b>/=cmd|'copy'.png", "a <b>/a:b #1 50%;=1+1.png"):
        files[copy], vectors[copy] = files["coffee.png"], vectors["coffee.png"]
    rocket = Image.open(io.BytesIO(photos["rocket.jpg"]))
    for number, kind in enumerate(("gif", "png", "webp", "avif", "bmp", "tiff")):
        path = f"rocket.{kind}"
        files[path] = saved(rocket.resize((100 + number, 50)), kind)
        vectors[path] = near(vectors["rocket.jpg"], 0.9999)
    files["copy.gif"], vectors["copy.gif"] = files["rocket.gif"], vectors["rocket.gif"]
    files["chelsea-2.png"] = photos["cell.png"][:9000]  # cut off since
    vectors["chelsea-2.png"] = near(vectors["chelsea.png"], 0.993)
    failures = {f"broken {n}.jpg": script.EMPTY for n in range(25)}
    failures |= {"a page.jpg": script.WEB_PAGE, "svg.jpg": script.SVG, "odd.jpg": "a riddle (42)"}
    for path in failures:
        files[path] = b"" if "broken" in path else path.encode()
    files["c.png"], failures["c.png"] = files["coffee.png"], script.DECODER_LOST
    for path, data in files.items():
        (folder / path).write_bytes(data)
    os.mkfifo(folder / "pipe.jpg")
    store = keep(open_folder(folder), vectors, failures | {"pipe.jpg": script.UNREADABLE})
    page, rows = page_of(store, folder, local=folder, status=store.status())
    return SimpleNamespace(folder=folder, page=page, rows=rows)


def test_the_head_says_what_is_there_twice(album):
    page = album.page
    head = re.sub(r"\d+ [A-Z][a-z]+ \d{4}, \d\d:\d\d", "today", page.head)
    assert head == (
        "Mugs & More 32 of 62 pictures can be found by similar-product search · today 3 groups of "
        "pictures that look the same; 3 identical files in 2 groups 30 pictures can't "
        "be used 16 samples of what looks alike Looks the same "
    )
    assert "secret place" not in page.source
    assert "Time was short" not in page.text
    assert "1 file could not be read" in page.text
    assert "0.99 or more to another one of its group" in page.text
    assert "An empty cell means: unknown, or none" in page.text
    assert ('one is marked "keep"' in page.text, "underlined name" in page.text) == (True, False)


def test_groups_have_the_picture_to_keep_first(album):
    first, second, third = album.page.of("same")
    assert first.title == "Group 1: 3 look the same"
    assert first.names == ["coffee.png", "=cmd|'copy'.png", "a:b #1 50%;=1+1.png"]
    assert first.marks == ["keep", "same file", "same file"]
    assert second.title == "Group 2: 8 look the same"
    shown = ("rocket.jpg", "copy.gif", "rocket.gif", "rocket.tiff", "rocket.bmp", "rocket.avif")
    assert second.names == [*shown]  # the largest, copies however small, the largest of the rest
    assert (second.pictures, second.boxes) == (6, 0)
    assert second.marks == ["largest", "keep", "same file"]
    assert second.text.count("similarity 0.999") == 4
    assert "640 x 427, 74.0 kB" in second.text
    assert third.names == ["chelsea-2.png", "chelsea.png"]  # which has fewer pixels, more bytes
    assert third.text.count("similarity 0.993") == 2
    assert (third.pictures, third.boxes, "550 x 660, 9.0 kB" in third.text) == (1, 1, True)
    assert "a <b>/a:b #1 50%;=1+1.png" in first.text  # the id, to be copied


def test_samples_are_of_different_groups(album):
    cards = album.page.of("alike")
    groups = [set(card.names) for card in album.page.of("same")]
    assert [card.pictures for card in cards] == [7] * 16
    assert len({card.title for card in cards}) == 16
    for card in cards:
        assert card.title == card.names[0]
        assert len(set(card.names)) == 7
        assert all(len(group & set(card.names)) < 2 for group in groups)
        similarities = re.findall(r"similarity (0\.\d{3})", card.text)
        assert (len(similarities), similarities) == (6, sorted(similarities, reverse=True))
    shown = {name for card in cards for name in card.names}
    assert all(group & shown for group in groups)
    ends = ("a:b #1 50%;=1+1.png", "text.png")
    assert (cards[0].title, cards[-1].title) == ends  # from the first id to the last


def test_failures_are_told_once_with_what_to_do(album):
    empty, *others = album.page.of("failed")
    assert album.page.text.count("search can't find these until they are fixed.") == 1
    assert (empty.pictures, empty.boxes, empty.marks) == (0, 0, ["same file"] * 6)
    assert "Open it" in empty.text
    assert empty.text.startswith("An empty file 25 pictures. The file is damaged or was cut off")
    assert empty.names == [f"broken {n}.jpg" for n in (0, 1, 10, 11, 12, 13)]
    assert "And 19 more: see x.csv ." in empty.text
    words = {card.title: card.text for card in others}
    assert "The address is wrong" in words["A web page, not an image"]
    assert "Ask your developer." in words["A riddle"]  # of an older program


def test_each_row_of_a_folders_table_is_complete(album):
    rows = album.rows
    assert [row["group"] for row in rows] == [*"1112222222233", *[""] * 30]
    assert [row["what"] for row in rows] == ["looks the same"] * 13 + ["can't be used"] * 30
    for row in rows:
        path = row["id"].replace("'=", "=")
        if path == "pipe.jpg":  # which can't be looked at
            assert (row["copy"], row["bytes"], row["width"]) == ("", "", "")
            continue
        assert row["bytes"] == str((album.folder / path).stat().st_size)
        if row["group"]:
            with Image.open(album.folder / path) as image:
                assert (row["width"], row["height"]) == tuple(map(str, image.size))
        expected = (script.advice_on(row["reason"]), bool(row["group"]))
        assert (row["advice"], bool(row["similarity"])) == expected
        assert (row["copy"] == "no") != bool(row["same_as"])
    copies = {row["id"]: (row["copy"], row["same_as"]) for row in rows if row["same_as"]}
    # A picture that failed is not the one to keep, however short its name is.
    assert copies["coffee.png"] == ("keep", "coffee.png")
    assert copies["c.png"] == ("same file", "coffee.png")
    assert copies["rocket.gif"] == ("same file", "copy.gif")
    assert copies["broken 0.jpg"] == copies["broken 1.jpg"] == ("same file", "broken 0.jpg")
    assert len(copies) == 4 + 2 + 25
    assert {row["reason"] for row in rows[13:]} >= {"an empty file", "a riddle (42)"}


def test_a_page_may_be_of_a_subfolder_and_elsewhere(album, tmp_path):
    store = open_folder(album.folder, client="a <b>")
    given = {"local": album.folder, "client": "a <b>", "status": store.status()}
    page, rows = page_of(store, tmp_path, **given)
    assert page.head.startswith("a <b> 2 of 2 pictures")
    assert "· Mugs & More" in page.head
    assert [row["copy"] for row in rows] == ["keep", "same file"]
    links = [unquote(urlsplit(link).path) for card in page.of("same") for link in card.links]
    assert len(links) == 2
    assert all((tmp_path / link).is_file() for link in links)


def test_short_time_and_images_that_broke_since_are_said(monkeypatch, photos, tmp_path):
    monkeypatch.setattr(script, "LOOK_SECONDS", 0)
    monkeypatch.setattr(script, "BLOCK", 4)
    vectors = {f"{n}.jpg": vector for n, vector in enumerate(vectors_for(9))}
    vectors["8.jpg"] = vectors["0.jpg"]
    for path in (*vectors, "old.jpg", "older.jpg"):
        (tmp_path / path).touch()
    (tmp_path / "1.jpg").write_bytes(b"x")
    (tmp_path / "8.jpg").write_bytes(photos["rocket.jpg"])
    for copy in ("9.jpg", "10.jpg"):
        os.mkfifo(tmp_path / copy)  # which can't be looked at
        vectors[copy] = vectors["1.jpg"]
    store = keep(open_folder(tmp_path), vectors, {})
    old = open_folder(tmp_path, model_version="old")  # its rows are none of the page's
    keep(old, {"old.jpg": vectors["0.jpg"]}, {"older.jpg": script.EMPTY})
    page, rows = page_of(store, tmp_path, local=tmp_path, status=store.status())
    assert (len(rows), page.of("failed")) == (5, [])
    assert "of 11 pictures, 7 were compared with all others, 11 searched" in page.text
    assert "2 files could not be read, or not in time: more may be identical" in page.text
    assert {row["copy"] for row in rows if row["id"] in ("9.jpg", "10.jpg")} == {""}
    unread, group = page.of("same")
    assert unread.title == "Group 1: 3 look the same"
    assert (group.title, group.names) == ("Group 2: 2 look the same", ["8.jpg", "0.jpg"])
    assert (group.pictures, group.boxes, group.marks) == (1, 1, [])
    assert script.EMPTY in group.text
    monkeypatch.setattr(script, "MOST_COMPARED", 10)
    assert store.catalog(11).sought_among == 0  # of a block of 11


def test_files_are_the_same_where_all_their_bytes_are(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.bmp").write_bytes(bytes(2**20) + name.encode())
    vectors = dict.fromkeys(("a.bmp", "b.bmp"), vectors_for(1)[0])
    _, rows = page_of(keep(open_folder(tmp_path), vectors, {}), tmp_path, local=tmp_path)
    assert [row["copy"] for row in rows] == ["no", "no"]


def store_of(pairs=(), samples=(), failures=()):
    """A store of what a test says."""
    catalog = script.Catalog(pairs, 9, 9, samples, failures)
    return SimpleNamespace(
        catalog=lambda embedded: catalog, locate=lambda asset: script.Source(asset.image, {})
    )


def test_the_page_stays_below_3_mb_whatever_is_to_be_shown(tmp_path, monkeypatch):
    levels = np.random.default_rng(1).integers(0, 256, (224, 224, 3), np.uint8)  # packs badly
    noise = {"width": 1500, "height": 1000, "bytes": 10**6, "pixels": 1_500_000}
    noise["thumbnail"] = script.thumbnail_of(levels)
    monkeypatch.setattr(script.Gallery, "_look_at", lambda *_: noise)
    links = [LONG[:150] + ODD, LONG, f"//{LONG}", script.STORAGE + LONG]
    pictures = [
        script.Picture(n, links[n % 4], ODD, f"{n} {ODD}", links[n % 3]) for n in range(1000)
    ]
    pairs = [script.Pair(pictures[n - n % 10], pictures[n], 0.995) for n in range(1000)]
    matches = [script.Match(picture, 0.7) for picture in pictures[::10]]
    failures = [script.FailedPicture(one, f"{one.id % 40} {ODD}") for one in pictures * 5]
    store = store_of(pairs, [matches[:7]] * 16, failures)
    asked = {f"{n} {ODD}\udcff": matches for n in range(4)}
    page, rows = page_of(store, tmp_path, asked, status=(1200, 1000, 0))
    assert "1,000 of 1,200 pictures can be found" in page.head
    assert len(page.source) > 1_500_000
    counts = {name: len(page.of(name)) for name in ("asked", "same", "failed", "alike")}
    assert counts == {"asked": 4, "same": 60, "failed": 40, "alike": 16}
    assert not any("more" in card.text for card in page.of("asked"))
    assert [card.text.count("similarity 0.700") for card in page.of("asked")] == [24] * 4
    assert [card.pictures for card in page.of("same")] == [6] * 60
    assert page.text.count("And 4 more: see x.csv") == 60
    assert "And 40 more: see x.csv" in page.text
    assert "And 119 more: see x.csv" in page.text
    assert len(rows) == 6000
    assert max(len(link["href"]) for link in page.named("a")) <= 800


def test_the_largest_of_a_group_is_kept_and_is_marked_if_all_are_known(tmp_path):
    """The smallest here has the shortest name, and is the widest. The fifth and the sixth differ
    in bytes alone."""
    sizes = [(700 - 50 * n, 20 * n) for n in (1, 2, 3, 4, 5, 5, 5)]
    images = {
        f"/{'x' * n}.png": saved(Image.new("RGB", size, "red"), "PNG", compress_level=9 * (n != 6))
        for n, size in enumerate(sizes, 1)
    }
    with ImageHost(images) as host:
        pictures = [script.Picture(path, host.url_of(path)) for path in images]
        pairs = [script.Pair(pictures[0], other, 1.0, True) for other in pictures[1:6]]
        page, rows = page_of(store_of(pairs), tmp_path, private_hosts=True)
        (card,) = page.of("same")
        assert (card.title, card.marks[0]) == ("Group 1: 6 look the same", "largest")
        assert {row["same_as"] for row in rows} == {"/x.png"}
        assert (rows[0]["id"], card.names[0]) == ("/xxxxxx.png", "xxxxxx.png")
        equal = [script.Pair(pictures[4], pictures[5], 0.995)]
        (card,) = page_of(store_of(equal), tmp_path, private_hosts=True)[0].of("same")
        assert (card.names, "largest" in card.text) == (["xxxxxx.png", "xxxxx.png"], False)
        # Of seven only six are shown, and looked at; the seventh is none of the same.
        pairs.append(script.Pair(pictures[0], pictures[6], 0.995))
        (card,) = page_of(store_of(pairs), tmp_path, private_hosts=True)[0].of("same")
        assert card.title == "Group 1: 7 look the same"
        assert "largest" not in card.marks
        # Of ten six are looked at, and two of them turn out to be the largest: no other is shown.
        few, many = (
            [script.Picture(f"{path}{n}", host.url_of(path)) for n in range(count)]
            for path, count in (("/x.png", 4), ("/xxxxxx.png", 6))
        )
        pairs = [script.Pair(group[0], one, 1.0, True) for group in (few, many) for one in group]
        pairs.append(script.Pair(few[0], many[0], 0.995))
        (card,) = page_of(store_of(pairs), tmp_path, private_hosts=True)[0].of("same")
        assert (card.pictures, card.names[0]) == (6, "xxxxxx.png")


def test_what_pairs_connect_is_a_group_with_its_copies_side_by_side(tmp_path):
    """Groups with copies come first, then those that are most alike. No address leads anywhere
    here, so sizes are not known."""
    cosines = {"a b": 0.999, "c d": 0.998, "d b": 0.992, "d e": 0.991, "near nearer": 0.997}
    cosines |= {"x yy": 0.992, "x copied": 0.992, "copied copy": 1.0, "x longest": 1.0}
    cosines |= {"s two": 0.995, "two three": 1.0}
    pairs = [
        script.Pair(*(script.Picture(name, name) for name in names.split()), cosine, cosine == 1)
        for names, cosine in cosines.items()
    ]
    page, rows = page_of(store_of(pairs), tmp_path)
    groups = ["two three s", "copy copied x longest yy", "near nearer", "a b c d e"]
    assert [" ".join(card.names) for card in page.of("same")] == groups
    same_as = ["two", "two", "", "copy", "copy", "x", "x", *[""] * 8]
    assert [row["same_as"] for row in rows] == same_as
    assert [float(row["similarity"]) for row in rows[10:]] == [0.999, 0.999, 0.998, 0.998, 0.991]


def test_a_folder_of_broken_files_has_a_page(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "LOOK_SECONDS", 600)  # however busy the machine is
    reasons = {f"{n}.jpg": script.EMPTY for n in range(1001)}  # one more than are read at once
    for path in reasons:
        (tmp_path / path).touch()
    store = keep(open_folder(tmp_path), {}, reasons)
    page, rows = page_of(store, tmp_path, local=tmp_path)
    assert (len(rows), page.of("alike")) == (1001, [])
    assert "could not be read" not in page.text
    monkeypatch.setattr(script, "started_decoder", Mock(side_effect=script.RunError("none left")))
    with pytest.raises(script.RunError, match="none left"):
        page_of(store, tmp_path, local=tmp_path)


def test_a_search_whose_reader_left_makes_its_page(album, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "question_vectors", lambda _: {"red mug": np.eye(512)[0]})
    monkeypatch.setattr(script, "print", Mock(side_effect=BrokenPipeError), raising=False)
    settings = script.Settings(local=album.folder, search=("red mug",), gallery=tmp_path / "x.html")
    store = open_folder(album.folder)
    assert script.answer_questions(store, settings, store.status()) == 0
    (card,) = written(settings.gallery)[0].of("asked")
    assert (card.title, card.pictures) == ("red mug", 12)


def test_a_picture_leads_to_its_original(tmp_path):
    leads_to = {
        "//x/a.jpg": "https://x/a.jpg",
        "HTTPS://x/b.jpg": "HTTPS://x/b.jpg",
        "/storage/v1/object/public/a.jpg": "https://abc/storage/v1/object/public/a.jpg",
        "/images/a.jpg": None,
        "javascript:alert('http://x')": None,
        "//" + "x" * 900: None,
    }
    failures = [script.FailedPicture(script.Picture(1, image), "HTTP 404") for image in leads_to]
    page, _ = page_of(store_of(failures=failures), tmp_path, url="https://abc")
    assert page.of("failed")[0].links == [*filter(None, leads_to.values())]


def test_no_host_keeps_the_page_waiting(tmp_path):
    with ImageHost(otherwise=answers.hang) as host:
        pictures = [script.Picture(n, url) for n, url in enumerate(host.urls(6))]
        pairs = [script.Pair(pictures[0], other, 0.995) for other in pictures]
        settings = {"private_hosts": True, "fetch_seconds": 0.5, "workers": 1}
        (card,) = page_of(store_of(pairs), tmp_path, **settings)[0].of("same")
    assert (card.pictures, card.boxes) == (0, 6)
    assert card.text.count("not in time") >= 2  # one after the other would take six times as long


def test_a_cell_that_begins_like_a_formula_is_quoted():
    cells = {f"{sign}1": f"'{sign}1" for sign in "=+-@\uff1d"}
    cells |= {"\t=1": "\t'=1", "a;=1": "a;'=1", 'a;"=1': "a;\"'=1", "a\n+1": "a\n'+1"}
    cells |= {text: text for text in ("mug - blue, -1", "x" * 2000, -1)}
    assert {text: script.cell(text) for text in cells} == cells
    assert script.cell("=" + "x" * 9999).startswith("'=x")


def test_a_thumbnail_is_as_good_as_its_bytes_allow(photos):
    levels = np.asarray(Image.open(io.BytesIO(photos["rocket.jpg"])))
    assert 1600 < len(script.thumbnail_of(levels)) < 3700


def test_all_pairs_above_the_line_are_found_and_no_other(monkeypatch):
    monkeypatch.setattr(script, "BLOCK", 16)
    monkeypatch.setattr(script, "LOOK_SECONDS", 600)  # however busy the machine is
    rng = np.random.default_rng(3)
    vectors = vectors_for(300, 3)
    for row in range(0, 300, 7):
        vectors[row] = near(vectors[rng.integers(300)], rng.uniform(0.98, 0.9999), row)
    vectors[::11] = vectors[1]

    def groups_of(pairs):
        pictures = [script.Picture(n, str(n)) for n in range(300)]
        joined = script.joined(script.Pair(pictures[a], pictures[b], 1) for a, b, *_ in pairs)
        return {frozenset(picture.id for picture in group) for group in joined}

    pairs, looked_at = script.rows_alike(vectors)
    assert looked_at == 300
    assert all(vectors[one] @ vectors[other] >= script.SAME - 1e-6 for one, other, _ in pairs)
    expected = groups_of(np.argwhere(np.triu(vectors @ vectors.T, 1) >= script.SAME).tolist())
    assert groups_of(pairs) == expected
    assert len(expected) > 10
    assert script.rows_alike(vectors[:0]) == ([], 0)
    monkeypatch.setattr(script, "MOST_PAIRS", 50)
    alike = vectors[1] + np.arange(300, dtype=np.float32)[:, None] * 1e-6
    pairs, looked_at = script.rows_alike(alike)
    assert (len(pairs) < 50 + 16 * 16, looked_at) == (True, 0)


def test_a_picture_without_a_title_is_called_by_its_url():
    names = {
        "https://cdn.example/a/Tasse%20blau.jpg?v=3#x": "Tasse blau.jpg",
        "https://cdn.example/a/mug/": "mug",
        "data:image/png;base64,AAAA/BBBB": "17",
        "": "17",
        "https://[broken/x.jpg": "x.jpg",
    }
    assert {image: script.Picture(17, image).name for image in names} == names
    assert script.Picture(17, "mug.jpg", title="Blue mug").name == "Blue mug"


def test_advice_is_in_the_words_of_a_shops_owner():
    for reason in script.ADVICE:
        words = script.advice_on(f"{reason} (a detail)")
        assert words.endswith(".")
        assert not re.search(r"--\w|\.sql|\.env|vector|embed", f"{reason} {words}")
        if re.search("[A-Z]+_[A-Z]|install|proxy|memory is", words):
            assert "ask your developer" in words.lower()


def test_a_page_that_can_not_be_written_is_refused_at_once(album, tmp_path):
    os.mkfifo(tmp_path / "pipe.html")
    os.mkfifo(tmp_path / "piped.csv")
    (tmp_path / "mine.csv").write_text("sku,price\n1,2\n")
    # Who prepared the folder may have put a link there, to a file that is run one day.
    (tmp_path / "link.html").symlink_to(tmp_path / "elsewhere.html")
    (tmp_path / "linked.csv").symlink_to(tmp_path / "elsewhere.csv")
    links = ("link.html", "linked.html")
    for name in (".", "pipe.html", "piped.html", "mine.html", "no/x.html", *links):
        with pytest.raises(argparse.ArgumentTypeError):
            script.to_gallery(str(tmp_path / name))
    earlier = album.folder / "x.html"
    assert earlier.with_suffix(".csv").exists()
    assert script.to_gallery(str(earlier)) == earlier


def test_a_page_that_becomes_impossible_to_write_is_said(monkeypatch, tmp_path):
    for gone in (OSError(28, "No space left"), OSError(28, "No space left", str(tmp_path))):
        monkeypatch.setattr(script.Path, "write_text", Mock(side_effect=gone))
        with pytest.raises(script.RunError, match=f"^{tmp_path}.* can't be written: No space left"):
            page_of(store_of(), tmp_path)


@pytest.fixture(scope="module")
def shop(_stack, photos, tiny, tmp_path_factory):
    """A catalog with ids of text, odd names, titles and links, and more dead links than an answer
    of the database holds; with its page and its table."""
    renew(_stack, id_type="text")
    _stack.set_max_rows(100)
    _stack.sql("alter table assets add column name text, add column page text")
    _stack.sql_as_editor(
        "create or replace function embedding_sources() returns table "
        "(id text, image text, client text, title text, link text) language sql stable as "
        "'select id, image_url, client_name, name, page from public.assets'"
    )
    _stack.reload_schema()
    store = open_store(_stack)
    with ImageHost({f"/{name}": data for name, data in photos.items()}) as host:
        urls = {f"{name} {ODD}": host.url_of(f"/{name}") for name in photos}
        vectors = dict(zip(urls, vectors_for(len(urls)), strict=True))
        inline = base64.b64encode(photos["rocket.jpg"]).decode()
        urls |= {"inline": f"data:image/png;base64,{inline}", "small": f"{host.url}/coins.png"}
        vectors["inline"] = vectors[f"rocket.jpg {ODD}"]
        vectors["small"] = near(vectors[f"coffee.png {ODD}"], 0.995)
        dead = {f"{n}": host.url_of(f"/{n}.jpg") for n in range(250)}
        dead |= {"gone": host.url_of("/gone%20now.jpg"), "bad": "javascript:alert(1)", "none": None}
        reasons = {"bad": script.OTHER_SCHEME, "none": script.NO_IMAGE}
        _stack.add_assets((id_, url, ODD) for id_, url in (urls | dead).items())
        few = "split_part(id, ' ', 1) in ('small', 'coins.png', 'cell.png', '0', '1')"
        _stack.sql(f"update assets set client_name = 'few' where {few}")
        keep(store, vectors, dict.fromkeys(dead, "HTTP 404") | reasons)
        _stack.sql("update assets set name = %s where id ^@ 'rocket'", (f"Rocket {ODD}",))
        link = f"https://shop.example/{ODD}"
        _stack.sql("update assets set page = %s where id in ('inline', 'gone')", (link,))
        cli = stack_cli(_stack, tiny, tmp_path_factory.mktemp("cwd"))
        run = cli("--gallery", "gallery.html")
        path = cli.folder / "gallery.html"
        table, page = run.err.splitlines()[-2:]
        assert table.endswith(f"for a spreadsheet: {path.with_suffix('.csv')}")
        assert page.endswith(f"look at {path.as_uri()}")
        page, rows = written(path)
        yield SimpleNamespace(page=page, rows=rows, link=link, url=host.url, stack=_stack)


def test_a_databases_page_leads_to_products(shop, photos):
    assert shop.page.head.startswith("Products 24 of 277 pictures can be found")
    assert f"· {urlsplit(shop.stack.url).netloc}" in shop.page.head
    assert "could not be read, or not in time" not in shop.page.text  # which only files are
    assert re.search("underlined name opens.*may be a placeholder", shop.page.text)
    assert "look the same; 1 repeated picture in 1 group" in shop.page.head
    same, near = shop.page.of("same")
    assert same.title == "Group 1: 2 look the same"
    copies = {"inline", script.shorten(f"Rocket {ODD}", 40)}
    assert set(same.names) == copies
    assert same.marks == ["same picture"] * 2
    # A data: URL is no address.
    assert sorted(same.links) == [f"{shop.url}/rocket.jpg", shop.link]
    assert near.names == ["coffee.png", "coins.png"]
    assert near.marks == ["largest"]
    assert " small few " in near.text  # its id, to be copied, and its client
    table = {row["id"]: row for row in shop.rows}
    assert table["inline"]["copy"] == "same picture"
    small = ["looks the same", "2", "coins.png", "few", "0.995", "", "", "384", "303"]
    small += [str(len(photos["coins.png"])), "small", f"{shop.url}/coins.png", "", "", ""]
    assert [*table["small"].values()] == small
    assert table["gone"]["link"] == shop.link
    assert len(shop.page.of("alike")) == 16
    for card in shop.page.of("alike"):
        assert 5 <= len(card.names) <= 7  # the index may miss one
        assert not any(pair <= set(card.names) for pair in (copies, set(near.names)))


def test_a_databases_failures_are_all_in_the_table(shop):
    failed = {card.title: card for card in shop.page.of("failed")}
    assert len(shop.rows) == 4 + 253
    assert "251 pictures. Nothing is at this address" in failed["HTTP 404"].text
    assert failed["No image URL"].links == []
    assert "javascript:alert(1)" in failed["Only http, https and data URLs are fetched"].text


def test_a_client_has_a_page_of_its_own_pictures(shop):
    catalog = open_store(shop.stack, client="few").catalog(3)
    assert [failure.picture.id for failure in catalog.failures] == ["0", "1"]
    counts = (catalog.sought_among, catalog.compared, len(catalog.samples))
    assert (counts, catalog.pairs) == ((3, 3, 3), [])
    found = {match.picture.client for sample in catalog.samples for match in sample}
    assert found == {"few"}
