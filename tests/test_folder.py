"""--local DIR: the same job over a folder, stored in one SQLite file in it.

Each image file below the folder is an asset, and nothing else; what was left out is said. A vector
stays until the file changes or goes. Failures are tried again in each run. Nobody gets out of the
folder by a file that he prepared: SQLite's is no link, has no triggers, and its journal names no
other; rows of files that are not there are not believed. Two runs wait for each other, and a run
that was killed goes on where it was.

Most of it is the store alone, in this process. Runs are for what they alone show.
"""

import contextlib
import os
import re
import sqlite3
import struct
import threading
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import (
    FOLDER_COLUMNS,
    FOLDER_FILE,
    SMALL,
    TINY_VERSION,
    Cli,
    folder_query,
    folder_rows,
    folder_vectors,
    model_settings,
    open_folder,
    pending,
    survey,
    vector,
    wait_until,
)
from PIL import Image
from samples import saved

from generate_embeddings import Embedded, Failed, RunError

IMAGES = {  # path in the folder -> photograph
    "flower.jpg": "flower.jpg",
    "acme/china.jpg": "china.jpg",
    "acme/deep/er/rocket.JPG": "rocket.jpg",
    'Ünïcødé 日本/O\'Neill & "Co" 100% #1?.png': "coins.png",
    "Ünïcødé 日本/new\nline.png": "brick.png",
}
LEFT_OUT = ["two words/.not/hidden.png", ".hidden/photo.jpg", ".hidden.jpg", "notes.txt", "jpg"]
BROKEN_FILES = {"acme/broken.jpg": b"\xff\xd8\xff\xe0 no more", "empty.png": b""}
UNREADABLE = "x" * 300  # a link that leads there is what even root can't look behind


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


@pytest.fixture(scope="module")
def every_kind(photos, tiny, tmp_path_factory):
    """A folder of every kind of file, after two runs on it."""
    folder = tmp_path_factory.mktemp("album")
    files = {path: photos[name] for path, name in IMAGES.items()} | BROKEN_FILES
    for path, data in (files | dict.fromkeys(LEFT_OUT, photos["flower.jpg"])).items():
        write(folder / path, data)
    cli = Cli(model_settings(tiny), tmp_path_factory.mktemp("cwd"))
    first = cli("--local", folder)
    made = folder_vectors(folder)
    return SimpleNamespace(folder=folder, first=first, rows=made, second=cli("--local", folder))


# One folder, looked at from all sides


def test_every_image_file_below_the_folder_is_an_asset_and_nothing_else(every_kind):
    assert every_kind.rows.keys() == IMAGES.keys()
    assert folder_rows(every_kind.folder).keys() == IMAGES.keys() | BROKEN_FILES.keys()
    assert every_kind.first.code == 1
    wanted = {"embedded": 5, "failed": 2, "attempted": 7, "left": 0}
    assert every_kind.first.counts == every_kind.first.counts | wanted
    for path in BROKEN_FILES:
        assert path in every_kind.first.out


def test_a_rerun_tries_what_failed_and_that_alone(every_kind):
    assert every_kind.second.code == 1
    wanted = {"embedded": 0, "failed": 2, "attempted": 2, "waiting": 0}
    assert every_kind.second.counts == every_kind.second.counts | wanted
    assert "7 images: 5 done, 2 to do, of which 2 failed before" in every_kind.second.err
    after = {path: row.updated_at for path, row in folder_vectors(every_kind.folder).items()}
    assert after == {path: row.updated_at for path, row in every_kind.rows.items()}


def test_vectors_are_little_endian_float32_in_one_table(every_kind):
    for row in every_kind.rows.values():
        assert len(row.embedding) == 2048
        assert abs(np.linalg.norm(row.vector) - 1) < 1e-5
        assert row.model_version == TINY_VERSION
        for moment in (row.created_at, row.updated_at):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", moment)
    tables = "select name from sqlite_master where type = 'table'"
    assert folder_query(every_kind.folder, tables) == [("images",)]
    columns = folder_query(every_kind.folder, "pragma table_info(images)")
    assert [column[1] for column in columns] == FOLDER_COLUMNS


def test_what_was_left_out_is_said_in_one_line(small, caplog):
    for name in ("a.svg", "b.SVG", "notes", ".hidden.txt"):
        write(small / name)
    for folder in ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "sub/Lost+Found"):
        write(small / folder / "copy.jpg")
    (small / "link").symlink_to(small / "sub")
    (small / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no text is this name")
    with caplog.at_level("INFO"):
        assert sorted(paths(pending(open_folder(small)))) == sorted(SMALL)
    line = caplog.messages[-1]
    assert line.startswith("left out: ")
    files = "3 files that are no images (.svg, without an ending)"
    for part in (files, "1 folder @eaDir", "1 folder Lost+Found", "1 linked folder"):
        assert part in line
    assert "caf" in caplog.messages[0]


def test_an_ending_may_have_a_query_behind_it_as_wget_leaves_it(small):
    images = {
        "mug.jpg?v=1712",
        "cup.PNG@width=9",
        "at 10.30@2x.png",
        "a.b@mail.com.jpg",
        "x.y?.gif",
    }
    for name in (*images, "note.txt?v=1", "jpg?v=1"):
        write(small / name)
    assert set(paths(pending(open_folder(small)))) - set(SMALL) == images


# Changes in the folder


def test_changed_new_moved_and_deleted_files(small):
    for name in ("moved.jpg", "other.jpg"):
        write(small / name)
    assert settle(small) == ["china.jpg", "flower.jpg", "moved.jpg", "other.jpg", "rocket.jpg"]
    before = folder_rows(small)
    os.utime(small / "china.jpg", (1, 1))  # an older copy is a change as well
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
    assert folder_rows(small).keys() == set(SMALL)


def test_failures_are_tried_again_in_each_run_after_what_is_new(small):
    fail(small, "china.jpg")
    status, found = survey(open_folder(small))
    assert (status.assets, status.done, status.failed, status.waiting) == (3, 0, 1, 0)
    assert paths(found) == ["flower.jpg", "rocket.jpg", "china.jpg"]
    row = folder_rows(small)["china.jpg"]
    assert (row.stage, row.reason, row.embedding) == ("decode", "broken", None)
    settle(small)
    row = folder_rows(small)["china.jpg"]
    assert (row.stage, row.reason) == (None, None)


@pytest.mark.parametrize("change", ["another image", "another version"])
def test_a_vector_gives_way_to_the_failure_of_what_came_after_it(small, change):
    settle(small)
    if change == "another image":
        os.utime(small / "china.jpg", (1, 1))
        fail(small, "china.jpg")
    else:
        fail(small, "china.jpg", model_version="another")
    assert folder_vectors(small).keys() == {"flower.jpg", "rocket.jpg"}
    assert folder_rows(small)["china.jpg"].reason == "broken"


def test_another_runs_failure_leaves_a_vector_alone(small):
    both = [open_folder(small) for _ in range(2)]
    assets = [pending(store)[0] for store in both]
    both[0].save([Embedded(assets[0], vector(1))])
    both[1].save([Failed(assets[1], "decode", "takes too long")])
    assert folder_vectors(small).keys() == {"china.jpg"}


def test_what_would_never_end_is_a_failure_and_so_is_what_the_disk_does_not_show(cli, small):
    os.mkfifo(small / "pipe.jpg")
    (small / "zero.jpg").symlink_to("/dev/zero")
    settle(small)
    write(small / "late.jpg")
    settle(small)
    for path in ("late.jpg", "new.jpg"):
        (small / path).unlink(missing_ok=True)
        (small / path).symlink_to(UNREADABLE)
    for path in ("pipe.jpg", "zero.jpg"):
        folder_query(small, f"delete from images where asset_id = '{path}'")
    before = folder_rows(small)
    run = cli("--local", small)
    assert (run.code, run.counts["failed"]) == (1, 3)
    after = folder_rows(small)
    assert after["late.jpg"].embedding == before["late.jpg"].embedding  # what it was is known
    for path in ("pipe.jpg", "zero.jpg", "new.jpg"):
        row = after[path]
        assert (row.stage, row.embedding) == ("fetch", None)
        assert "can't be read" in row.reason


def test_a_link_whose_disk_is_away_keeps_its_vector(small, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    write(disk / "far.jpg")
    (small / "far.jpg").symlink_to(disk / "far.jpg")
    settle(small)
    away = disk.rename(tmp_path / "away")
    assert open_folder(small).status().assets == len(SMALL)
    away.rename(disk)
    status = open_folder(small).status()
    assert (status.assets, status.done) == (len(SMALL) + 1, len(SMALL) + 1)


def test_rows_of_earlier_versions_hold(small):
    """They have the file's time alone."""
    settle(small)
    for path in SMALL:
        time = (small / path).stat().st_mtime_ns
        folder_query(small, f"update images set modified = {time} where asset_id = '{path}'")
    assert open_folder(small).status().done == len(SMALL)


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
    for client in ("globex/summer sale", "globex/summer", "acme", "other/globex", apart):
        write(tmp_path / client / "a.png")
    wanted = {
        "globex/summer sale": ["globex/summer sale/a.png"],
        "globex/summer": ["globex/summer/a.png"],
        "globex/": ["globex/summer sale/a.png", "globex/summer/a.png"],
        apart: [f"{apart}/a.png"],
        unicodedata.normalize("NFC", apart): [f"{apart}/a.png"],
    }
    for client, below in wanted.items():
        status, found = survey(open_folder(tmp_path, client=client))
        assert sorted(paths(found)) == below
        assert status.assets == len(below)
    hints = {
        "three": "/three: --client is a subfolder",
        "acme/a.png": "/acme/a.png: --client is a subfolder",
        "acm": "/acm: did you mean acme?",
        "": ": --client is a subfolder",
    }
    for client, hint in hints.items():
        with pytest.raises(RunError, match=re.escape(hint)):
            open_folder(tmp_path, client=client).status()


def test_a_folder_without_images_is_an_error_that_changes_nothing(cli, small):
    write(small / "notes" / "notes.txt")
    with pytest.raises(RunError, match=re.escape(str(small / "notes"))):
        open_folder(small / "notes").status()
    assert [path.name for path in (small / "notes").iterdir()] == ["notes.txt"]
    settle(small)
    shown = cli("--local", ".", "--dry-run", cwd=small)
    assert (shown.code, shown.out) == (0, f"Would embed 0 images as {TINY_VERSION}\n")
    for name in SMALL:  # a disk that is not mounted looks like this
        (small / name).unlink()
    with pytest.raises(RunError, match="no image below"):
        open_folder(small).status()
    assert len(folder_rows(small)) == 3


# The SQLite file


def test_two_runs_on_one_folder_wait_for_each_other(tmp_path):
    for n in range(200):
        write(tmp_path / f"{n}.png")
    stores = [open_folder(tmp_path) for _ in range(2)]
    found = [pending(store) for store in stores]
    begin = threading.Barrier(2)

    def work(store, assets):
        begin.wait()
        for asset in assets:
            store.save([Embedded(asset, vector(1))])

    threads = [threading.Thread(target=work, args=pair) for pair in zip(stores, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(folder_vectors(tmp_path)) == 200
    assert folder_query(tmp_path, "pragma integrity_check") == [("ok",)]


def test_a_locked_file_is_waited_for(small):
    store = open_folder(small)
    found = pending(store)
    saved_all = threading.Thread(target=store.save, args=[[Embedded(found[0], vector(1))]])
    with contextlib.closing(sqlite3.connect(small / FOLDER_FILE, isolation_level=None)) as db:
        db.execute("begin exclusive")
        saved_all.start()
        saved_all.join(6)  # over the 5 s of Python's own patience
        assert saved_all.is_alive()
        db.execute("commit")
    saved_all.join(60)
    assert folder_vectors(small).keys() == {"china.jpg"}


@pytest.mark.parametrize("made", ["create table images (name text)", None])
def test_another_file_of_that_name_is_left_alone(small, made):
    if made:
        folder_query(small, made)
    else:
        (small / FOLDER_FILE).write_bytes(b"my diary, dear to me " * 99)
    before = (small / FOLDER_FILE).read_bytes()
    with pytest.raises(RunError, match=f"{FOLDER_FILE}.*this version"):
        open_folder(small).status()
    assert (small / FOLDER_FILE).read_bytes() == before


def test_where_a_file_can_not_be_used_one_line_says_so(cli, small):
    (small / ".env").symlink_to(UNREADABLE)
    assert f"{UNREADABLE} can't be read" in cli("--local", small, cwd=small).error
    (small / FOLDER_FILE).mkdir()
    run = cli("--local", small)
    assert run.code == 2
    assert f"{FOLDER_FILE} is a link, or no file" in run.error
    assert run.err.splitlines() == [run.error]


# A folder that somebody prepared


def journal(folder, name=""):
    """Leaves the journal of a transaction that was killed on its way; it names another one, too."""
    with contextlib.closing(sqlite3.connect(folder / FOLDER_FILE, isolation_level=None)) as db:
        db.execute("pragma cache_size = 1")
        db.execute("begin")
        db.execute("update images set embedding = zeroblob(3000), reason = 'half'")
        written = (folder / f"{FOLDER_FILE}-journal").read_bytes()
        half = (folder / FOLDER_FILE).read_bytes()
        db.execute("rollback")
    if name:
        text = name.encode()
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
    assert len(folder_vectors(small)) == 3
    assert [len(row.embedding) for row in folder_rows(small).values()] == [2048] * 3


@pytest.mark.parametrize("command", [[], ["--dry-run"], ["--search", "red mug"]])
def test_a_journal_that_names_another_file_is_refused(cli, small, tmp_path, command):
    settle(small)
    victim = tmp_path / "victim"
    victim.write_bytes(b"")  # what SQLite deletes: a super-journal that no journal names
    journal(small, str(victim))
    run = cli("--local", small, *command)
    assert (run.code, "of several databases" in run.error) == (2, True)
    assert victim.exists()


@pytest.mark.parametrize("ending", ["", "-journal", "-wal", "-shm"])
def test_a_link_in_the_place_of_sqlites_files_is_refused(small, tmp_path, ending):
    settle(small)
    victim = tmp_path / "victim"
    victim.write_bytes(b"dear to me")
    (small / f"{FOLDER_FILE}{ending}").unlink(missing_ok=True)
    (small / f"{FOLDER_FILE}{ending}").symlink_to(victim)
    with pytest.raises(RunError, match="is a link"):
        open_folder(small).status()
    assert victim.read_bytes() == b"dear to me"


@pytest.mark.parametrize(
    "made",
    [
        "create trigger t before delete on images begin select raise(ignore); end",
        "create view v as select 1",
        "create virtual table v using fts5(x)",
    ],
)
def test_what_would_run_inside_of_sqlite_is_refused(small, made):
    settle(small)
    folder_query(small, "create index mine on images (reason)")  # harmless
    open_folder(small).status()
    folder_query(small, made)
    with pytest.raises(RunError, match="has triggers or views"):
        open_folder(small).status()


def test_rows_of_files_that_the_walk_did_not_find_are_not_believed(small, tmp_path):
    settle(small)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    copy = "insert into images select '{}', modified, model_version, {}, created_at, updated_at "
    copy += "from images where asset_id = 'china.jpg'"
    for path in ("../secret.jpg", str(tmp_path / "secret.jpg"), ".hidden.jpg"):
        folder_query(small, copy.format(path, "embedding, stage, reason"))
        folder_query(small, copy.format(f"{path}.png", "null, 'fetch', 'HTTP 404'"))
    for no_text in ("null", "x'ff'"):
        folder_query(
            small, f"insert into images values ({no_text}, 0, '', null, null, null, '', '')"
        )
    folder_query(small, "update images set embedding = x'00' where asset_id = 'rocket.jpg'")
    store = open_folder(small, dry_run=True)  # which deletes no row
    store.status()
    catalog = store.catalog()
    assert (catalog.embedded, catalog.pairs, catalog.failures) == (2, [], [])
    found = {match.picture.id for match in store.search(vector(1), 9)}
    assert found == {"china.jpg", "flower.jpg"}
    open_folder(small).status()  # which deletes rows


# Several runs


def test_an_interrupted_run_resumes(cli, tmp_path):
    image = saved(Image.linear_gradient("L").resize((32, 32)), "PNG")
    for n in range(200):
        write(tmp_path / f"{n}.png", image)
    run = cli.start("--local", tmp_path, "--workers", 1)
    wait_until(lambda: (tmp_path / FOLDER_FILE).exists() and " done" in run.err)
    run.kill()
    run.wait()
    early = folder_vectors(tmp_path)
    again = cli("--local", tmp_path)
    assert again.code == 0, again.err
    assert again.counts["embedded"] == 200 - len(early)
    late = folder_vectors(tmp_path)
    assert len(late) == 200
    assert {p: late[p].updated_at for p in early} == {p: r.updated_at for p, r in early.items()}
