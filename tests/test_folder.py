"""--local DIR: the same job over a folder, stored in one SQLite file in it.

Each image file below the folder is an asset, and nothing else; what is left out is said. A vector
stays until the file changes or goes. Failures are tried again in each run. Two runs wait for each
other. Nobody gets out of a folder by a file that he prepared: SQLite's is no link, has no triggers,
and its journal names no other file; rows of files that are not there are not believed.

Most of it is the store alone, in this process. Runs are for what they alone show.
"""

import contextlib
import os
import re
import sqlite3
import struct
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from conftest import (
    FOLDER_COLUMNS,
    FOLDER_FILE,
    SMALL,
    TINY_VERSION,
    folder_query,
    folder_rows,
    folder_vectors,
    open_folder,
    pending,
    survey,
    vector,
)

from generate_embeddings import Embedded, Failed, RunError

IMAGES = {  # path in the folder -> photograph
    "flower.jpg": "flower.jpg",
    "acme/china.jpg": "china.jpg",
    "acme/deep/er/rocket.JPG": "rocket.jpg",
    'Ünïcødé 日本/O\'Neill & "Co" 100% #1?.png': "coins.png",
    "Ünïcødé 日本/new\nline.png": "brick.png",
}
LEFT_OUT = [".not/hidden.png", ".hidden.jpg", "notes.txt", "b.TXT", "jpg", "@eaDir/copy.jpg"]
LEFT_OUT += ["#recycle/a.jpg", "$RECYCLE.BIN/a.jpg", "acme/lost+found/a.jpg", "@tmp/a.jpg"]
KINDS = "avif bmp gif heic heif jfif jpe jpeg jpg png tif tiff webp"
BROKEN = {"acme/broken.jpg": b"\xff\xd8\xff\xe0 no more", "empty.png": b""}
UNREADABLE = "x" * 300  # a link that leads there is what even root can't look behind
ENDLESS = ("pipe.jpg", "zero.jpg", "away.jpg")


def write(path, data=b"an image, by its name"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def paths(assets):
    return [asset.image for asset in assets]


def settle(folder, **settings):
    """Gives every pending image a vector, as a run would; returns their paths."""
    store = open_folder(folder, **settings)
    found = pending(store)
    store.save([Embedded(asset, vector(1, n)) for n, asset in enumerate(found)])
    return paths(found)


def fail(folder, path, **settings):
    """Notes a failure of a pending image."""
    store = open_folder(folder, **settings)
    (asset,) = (asset for asset in pending(store) if asset.image == path)
    store.save([Failed(asset, "decode", "broken")])


def test_every_image_file_below_the_folder_is_an_asset_and_nothing_else(cli, photos, tmp_path):
    files = {path: photos[name] for path, name in IMAGES.items()} | BROKEN
    for path, data in (files | dict.fromkeys(LEFT_OUT, photos["flower.jpg"])).items():
        write(tmp_path / path, data)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "away.jpg").symlink_to(UNREADABLE)
    (tmp_path / "link").symlink_to(tmp_path / "acme")
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no text is this name")
    run = cli("--local", tmp_path)
    assert run.code == 1
    assert run.counts == run.counts | {"embedded": 5, "failed": 5, "left": 0}
    made = folder_vectors(tmp_path)
    assert made.keys() == IMAGES.keys()
    failed = folder_rows(tmp_path)
    assert failed.keys() == IMAGES.keys() | BROKEN.keys() | set(ENDLESS)
    assert all(path in run.out for path in (*BROKEN, *ENDLESS))
    for path in ENDLESS:  # what would never end, and what the disk does not show
        assert (failed[path].stage, failed[path].embedding) == ("fetch", None)
        assert "can't be read" in failed[path].reason
    said = re.search(r"left out: (.*)", run.err)[1].split(", ")
    name = r"1 'caf\udce9.jpg' (no UTF-8)"
    assert set(said) == {"2 .txt", "1 without an ending", "1 linked folder", name}

    for row in made.values():  # little-endian float32
        assert len(row.embedding) == 2048
        assert abs(np.linalg.norm(row.vector) - 1) < 1e-5
        assert row.model_version == TINY_VERSION
        for moment in (row.created_at, row.updated_at):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", moment)
    tables = "select name from sqlite_master where type = 'table'"
    assert folder_query(tmp_path, tables) == [("images",)]
    columns = folder_query(tmp_path, "pragma table_info(images)")
    assert [column[1] for column in columns] == FOLDER_COLUMNS

    again = cli("--local", tmp_path)
    assert (again.code, again.counts["embedded"], again.counts["failed"]) == (1, 0, 5)
    assert "10 images: 5 done, 5 to do, of which 5 failed before" in again.err
    assert re.search(r"left out: (.*)", again.err)[1].split(", ") == said  # not our own file
    assert str(folder_vectors(tmp_path)) == str(made)


# Changes in the folder


def test_changed_new_moved_and_deleted_files(small):
    for name in ("moved.jpg", "other.jpg"):
        write(small / name)
    assert settle(small) == ["china.jpg", "flower.jpg", "moved.jpg", "other.jpg", "rocket.jpg"]
    before = folder_rows(small)
    older = (small / "china.jpg").stat().st_mtime_ns - 10**6
    os.utime(small / "china.jpg", ns=(older, older))  # an older copy is a change as well
    (small / "rocket.jpg").unlink()
    (small / "to").mkdir()
    (small / "moved.jpg").rename(small / "to" / "moved.jpg")
    write(small / "new.jpg")
    stat = (small / "other.jpg").stat()
    write(small / "other.jpg", b"exports and archives may give all files one time")
    os.utime(small / "other.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert settle(small) == ["china.jpg", "new.jpg", "other.jpg", "to/moved.jpg"]
    after = folder_rows(small)
    assert after.keys() == {"flower.jpg", "china.jpg", "new.jpg", "other.jpg", "to/moved.jpg"}
    assert after["flower.jpg"].updated_at == before["flower.jpg"].updated_at
    assert after["china.jpg"].updated_at > before["china.jpg"].updated_at
    assert after["china.jpg"].created_at == before["china.jpg"].created_at
    assert settle(small) == []
    assert settle(small, model_version="another") == sorted(after)


def test_a_dry_run_writes_nothing_and_needs_no_right_to(small):
    assert len(pending(open_folder(small, dry_run=True))) == 3
    assert {path.name for path in small.iterdir()} == set(SMALL)
    settle(small)
    (small / "china.jpg").unlink()
    write(small / "new.jpg")
    with contextlib.closing(sqlite3.connect(small / FOLDER_FILE, isolation_level=None)) as db:
        db.execute("begin immediate")  # now nobody else can write
        assert paths(pending(open_folder(small, dry_run=True))) == ["new.jpg"]
    open_folder(small, search=("red mug",)).status()
    assert folder_rows(small).keys() == set(SMALL)


def test_failures_are_tried_again_in_each_run_after_what_is_new(small):
    fail(small, "china.jpg")
    status, found = survey(open_folder(small))
    assert (status.assets, status.done, status.failed, status.waiting) == (3, 0, 1, 0)
    assert paths(found) == ["flower.jpg", "rocket.jpg", "china.jpg"]
    for version, reasons in ((TINY_VERSION, ["broken"]), ("another", [])):
        store = open_folder(small, model_version=version)
        store.status()
        assert [failed.reason for failed in store.catalog(0).failures] == reasons
    settle(small)
    assert store.search(vector(1), 9) == []  # it is of the other version
    row = folder_rows(small)["china.jpg"]
    assert (row.stage, row.reason) == (None, None)


@pytest.mark.parametrize("change", ["another image", "another version", "nothing"])
def test_a_vector_gives_way_to_the_failure_of_what_came_after_it(small, change):
    slower = open_folder(small)  # another run, which began before
    found = pending(slower)
    settle(small)
    if change == "another image":
        os.utime(small / "china.jpg", (1, 1))
        fail(small, "china.jpg")
    elif change == "another version":
        fail(small, "china.jpg", model_version="another")
    else:
        slower.save([Failed(asset, "decode", "takes too long") for asset in found])
    lost = set() if change == "nothing" else {"china.jpg"}
    assert folder_vectors(small).keys() == set(SMALL) - lost
    assert (folder_rows(small)["china.jpg"].reason == "broken") == bool(lost)


def test_a_link_whose_disk_is_away_keeps_its_vector(small, tmp_path):
    disk = tmp_path / "disk"
    write(disk / "far.jpg")
    (small / "far.jpg").symlink_to(disk / "far.jpg")
    settle(small)
    disk.rename(tmp_path / "away")
    assert open_folder(small).status().done == 4
    (small / "far.jpg").unlink()
    (small / "far.jpg").symlink_to(UNREADABLE)
    assert open_folder(small).status().done == 4


def test_a_subfolder_that_can_not_be_read_ends_the_run_before_anything_changes(small):
    settle(small)
    (small / "china.jpg").unlink()
    at = os.open(small, os.O_RDONLY)
    for _ in range(25):  # a path of over 4,096 bytes, which even root can't look into
        os.mkdir("d" * 200, dir_fd=at)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    with pytest.raises(RunError, match=r"can't be read .*: nothing was changed"):
        open_folder(small).status()
    assert folder_rows(small).keys() == set(SMALL)


# Parts of a folder


def test_a_client_is_a_subfolder_at_any_depth(tmp_path):
    apart = unicodedata.normalize("NFD", "Café")
    kinds = [f"kinds/a.{kind}" for kind in KINDS.split()]
    for path in kinds:
        write(tmp_path / path)
    for client in ("globex/summer sale", "globex/summer", "acme", "other/globex", apart):
        write(tmp_path / client / "a.png")
    wanted = {
        "globex/summer": ["globex/summer/a.png"],
        "globex/": ["globex/summer sale/a.png", "globex/summer/a.png"],
        unicodedata.normalize("NFC", apart): [f"{apart}/a.png"],
        "kinds": kinds,
    }
    for client, below in wanted.items():
        status, found = survey(open_folder(tmp_path, client=client))
        assert (sorted(paths(found)), status.assets) == (below, len(below))
    for client in ("three", "acme/a.png", "acm", ""):
        with pytest.raises(RunError, match="check its name, and the endings of"):
            open_folder(tmp_path, client=client).status()
    settled = settle(tmp_path, client="acme") + settle(tmp_path, client="globex")
    assert folder_rows(tmp_path).keys() == set(settled)
    assert open_folder(tmp_path, client="globex/summer").status()[:3] == (1, 1, 0)


def test_a_folder_without_images_is_an_error_that_changes_nothing(small):
    write(small / "notes" / "notes.txt")
    with pytest.raises(RunError, match=re.escape(str(small / "notes"))):
        open_folder(small / "notes").status()
    assert [path.name for path in (small / "notes").iterdir()] == ["notes.txt"]
    settle(small)
    for name in SMALL:  # a disk that is not mounted looks like this
        (small / name).unlink()
    with pytest.raises(RunError, match="no image below"):
        open_folder(small).status()
    assert len(folder_rows(small)) == 3


# The SQLite file


def test_two_runs_on_one_folder_wait_for_each_other(tmp_path):
    for n in range(50):
        write(tmp_path / f"{n}.png")
    stores = [open_folder(tmp_path) for _ in range(2)]
    found = [pending(store) for store in stores]

    def work(store, assets):
        for asset in assets:
            store.save([Embedded(asset, vector(1))])

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, stores, found))
    assert len(folder_vectors(tmp_path)) == 50
    assert stores[0].patience > 10**6  # a disk has no deadline
    assert folder_query(tmp_path, "pragma integrity_check") == [("ok",)]
    with stores[0]._database() as database:  # Python's own patience is 5 s
        assert database.execute("pragma busy_timeout").fetchall() == [(60_000,)]


# A folder that somebody prepared


def journal(folder, name=None):
    """Leaves the journal of a transaction that was killed on its way; it names another one, too."""
    with contextlib.closing(sqlite3.connect(folder / FOLDER_FILE, isolation_level=None)) as db:
        db.execute("pragma cache_size = 1")
        db.execute("begin")
        db.execute("update images set embedding = zeroblob(3000), reason = 'half'")
        written = (folder / f"{FOLDER_FILE}-journal").read_bytes()
        half = (folder / FOLDER_FILE).read_bytes()
        db.execute("rollback")
    if name:
        text = os.fsencode(name)
        checksum = sum(int.from_bytes([byte], signed=True) for byte in text) % 2**32
        written += struct.pack(">I", 2**30 // 4096 + 1) + text
        written += struct.pack(">II", len(text), checksum) + bytes.fromhex("d9d505f920a163d7")
    (folder / FOLDER_FILE).write_bytes(half)
    (folder / f"{FOLDER_FILE}-journal").write_bytes(written)
    assert b"half" in half


def test_a_run_that_was_killed_while_it_wrote_is_rolled_back(small):
    settle(small)
    journal(small)
    assert open_folder(small).status().done == 3
    assert [len(row.embedding) for row in folder_rows(small).values()] == [2048] * 3


def link(folder, victim, ending):
    (folder / f"{FOLDER_FILE}{ending}").unlink(missing_ok=True)
    (folder / f"{FOLDER_FILE}{ending}").symlink_to(victim)


OTHER = f"{FOLDER_FILE}.*this version"
NO_FILE = "is a link, or not a file"
RUNS = "has triggers or views"
TRAPS = {
    "a diary": (lambda folder, _: (folder / FOLDER_FILE).write_bytes(b"dear " * 99), OTHER),
    "a table of others": (("drop table images", "create table images (x)"), OTHER),
    "a journal that names another file": (journal, "of several databases"),
    "a link": (partial(link, ending=""), NO_FILE),
    "a journal's link to nothing yet": (lambda folder, _: link(folder, "x", "-journal"), NO_FILE),
    "a linked journal": (partial(link, ending="-journal"), NO_FILE),
    "a linked WAL": (partial(link, ending="-wal"), NO_FILE),
    "a linked SHM": (partial(link, ending="-shm"), NO_FILE),
    "a folder": (lambda folder, _: (folder / f"{FOLDER_FILE}-journal").mkdir(), NO_FILE),
    "a trigger": (("create trigger t delete on images begin select raise(ignore); end",), RUNS),
    "a view": (("create view v as select 1",), RUNS),
    "a virtual table": (("create virtual table v using fts5(x)",), RUNS),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_in_the_place_of_sqlites_files_is_refused(small, tmp_path, trap, dry_run):
    settle(small)
    victim = tmp_path / "victim"
    victim.write_bytes(b"")  # to SQLite a database, or a journal to be deleted
    lay, said = TRAPS[trap]
    if callable(lay):
        lay(small, victim)
    else:
        for statement in lay:
            folder_query(small, statement)
    before = (small / FOLDER_FILE).read_bytes()
    with pytest.raises(RunError, match=said):
        open_folder(small, dry_run=dry_run).status()
    assert (victim.read_bytes(), (small / FOLDER_FILE).read_bytes()) == (b"", before)


def test_rows_of_files_that_the_walk_did_not_find_are_not_believed(small, tmp_path):
    settle(small)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    copy = "insert into images select '{}', modified, model_version, {}, created_at, updated_at "
    copy += "from images where asset_id = 'china.jpg'"
    for path in ("../secret.jpg", str(tmp_path / "secret.jpg"), ".hidden.jpg"):
        folder_query(small, copy.format(path, "embedding, stage, reason"))
        folder_query(small, copy.format(f"{path}.png", "null, 'fetch', 'HTTP 404'"))
    for no_text in ("null", "x'ff'"):
        values = f"{no_text}, 0, '', null, null, null, '', ''"
        folder_query(small, f"insert into images values ({values})")
    folder_query(small, "update images set embedding = x'00' where asset_id = 'rocket.jpg'")
    store = open_folder(small, dry_run=True)  # which deletes no row
    store.status()
    catalog = store.catalog(2)
    assert (catalog.compared, catalog.pairs, catalog.failures) == (2, [], [])
    found = {match.picture.id for match in store.search(vector(1), 9)}
    assert found == {"china.jpg", "flower.jpg"}
    open_folder(small).status()  # which deletes rows
