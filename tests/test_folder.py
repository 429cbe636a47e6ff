"""--local DIR: the same job over a folder, stored in one SQLite file in it."""

import contextlib
import io
import os
import re
import sqlite3
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY_VERSION, Cli, model_settings, wait_until
from PIL import Image

from generate_embeddings import Embedded, Failed, FolderStore, Settings, Stop

FILE = "product_embeddings.sqlite3"
COLUMNS = "asset_id modified model_version embedding stage reason permanent created_at updated_at"
COLUMNS = COLUMNS.split()
IMAGES = {  # path in the folder -> photograph
    "flower.jpg": "flower.jpg",
    "acme/china.jpg": "china.jpg",
    "acme/deep/er/rocket.JPG": "rocket.jpg",
    'Ünïcødé 日本/O\'Neill & "Co" 100% #1?.png': "coins.png",
    "Ünïcødé 日本/new\nline.png": "brick.png",
}
NO_IMAGES = ["two words/.not/hidden.png", ".hidden/photo.jpg", ".hidden.jpg", "notes.txt", "jpg"]
BROKEN = {"acme/broken.jpg": b"\xff\xd8\xff\xe0 no more", "empty.png": b""}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def query(folder, sql):
    with contextlib.closing(sqlite3.connect(folder / FILE, isolation_level=None)) as db:
        return db.execute(sql).fetchall()


def rows(folder):
    """path -> its row in the file, column by column."""
    made = query(folder, f"select {', '.join(COLUMNS)} from images")
    return {row[0]: SimpleNamespace(**dict(zip(COLUMNS, row, strict=True))) for row in made}


def stored(folder):
    """The same, of those with an embedding, which is there as `vector`, too."""
    made = {path: row for path, row in rows(folder).items() if row.embedding}
    for row in made.values():
        row.vector = np.frombuffer(row.embedding, "<f4")
    return made


@pytest.fixture(scope="module")
def album(photos, tiny, tmp_path_factory):
    """A folder of every kind of file, after two runs on it."""
    folder = tmp_path_factory.mktemp("album")
    files = {path: photos[name] for path, name in IMAGES.items()} | BROKEN
    for path, data in (files | dict.fromkeys(NO_IMAGES, photos["flower.jpg"])).items():
        write(folder / path, data)
    cli = Cli(model_settings(tiny), tmp_path_factory.mktemp("cwd"))
    first = cli("--local", folder)
    made = stored(folder)
    return SimpleNamespace(folder=folder, first=first, rows=made, second=cli("--local", folder))


@pytest.fixture
def small(photos, tmp_path):
    """A folder with three images."""
    folder = tmp_path / "small"
    for name in ("flower.jpg", "china.jpg", "rocket.jpg"):
        write(folder / name, photos[name])
    return folder


@pytest.fixture
def many(tmp_path):
    """Makes a folder of small images at these paths."""

    def many(paths):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), "red").save(file, "PNG")
        for path in paths:
            write(tmp_path / path, file.getvalue())
        return tmp_path

    return many


# One folder, looked at from all sides


def test_every_image_file_below_the_folder_is_an_asset_and_nothing_else(album):
    assert album.rows.keys() == IMAGES.keys()
    assert rows(album.folder).keys() == IMAGES.keys() | BROKEN.keys()


def test_what_is_no_image_by_its_ending_is_counted_in_one_line(cli, small):
    for name in ("a.svg", "b.SVG", "notes", ".hidden.txt"):
        write(small / name, b"x")
    (line,) = (
        line for line in cli("--local", small, "--dry-run").err.splitlines() if "svg" in line
    )
    assert "left out, as no images by their ending: 2 .svg, 1 " in line


def test_broken_images_are_counted_and_the_exit_code_is_1(album):
    assert album.first.code == 1
    wanted = {"embedded": 5, "failed": 2, "attempted": 7, "left": 0}
    assert album.first.counts == album.first.counts | wanted
    assert "acme/broken.jpg" in album.first.out
    assert "empty.png" in album.first.out


def test_a_rerun_remembers_what_is_done_and_what_is_broken(album):
    assert album.second.code == 0
    assert album.second.counts == album.second.counts | {"attempted": 0, "skipped": 2}
    assert "7 assets: 5 done, 2 failed for good, 0 to do" in album.second.err
    after = {path: row.updated_at for path, row in stored(album.folder).items()}
    assert after == {path: row.updated_at for path, row in album.rows.items()}


def test_vectors_are_those_of_transformers_as_little_endian_float32(album, tiny, photos):
    import models

    images = [Image.open(io.BytesIO(photos[IMAGES[path]])).convert("RGB") for path in album.rows]
    for row, wanted in zip(album.rows.values(), models.reference(tiny, images), strict=True):
        assert len(row.embedding) == 2048
        assert np.abs(row.vector - wanted).max() < 1e-5
        assert row.model_version == TINY_VERSION


def test_there_is_one_table_and_its_times_read_like_postgres(album):
    assert query(album.folder, "select name from sqlite_master where type = 'table'") == [
        ("images",)
    ]
    assert [row[1] for row in query(album.folder, "pragma table_info(images)")] == COLUMNS
    for row in album.rows.values():
        for moment in (row.created_at, row.updated_at):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", moment)


# Changes in the folder


def test_changed_new_moved_and_deleted_files(cli, small, photos):
    write(small / "moved.jpg", photos["rocket.jpg"])
    write(small / "broken.jpg", b"")
    assert cli("--local", small).code == 1
    before = stored(small)
    write(small / "china.jpg", photos["coffee.png"])
    os.utime(small / "china.jpg", (1, 1))  # an older copy is a change as well
    (small / "rocket.jpg").unlink()
    (small / "to").mkdir()
    (small / "moved.jpg").rename(small / "to" / "moved.jpg")
    write(small / "broken.jpg", photos["moon.png"])
    os.utime(small / "broken.jpg", (1, 1))
    run = cli("--local", small)
    assert run.code == 0, run.out
    assert run.counts == run.counts | {"attempted": 3, "left": 0, "skipped": 0}
    after = stored(small)
    assert after.keys() == {"flower.jpg", "china.jpg", "to/moved.jpg", "broken.jpg"}
    assert after.keys() == rows(small).keys()
    assert after["flower.jpg"].updated_at == before["flower.jpg"].updated_at
    assert np.abs(after["china.jpg"].vector - before["china.jpg"].vector).max() > 1e-4
    assert np.array_equal(after["to/moved.jpg"].vector, before["moved.jpg"].vector)
    assert (after["broken.jpg"].stage, after["broken.jpg"].reason) == (None, None)


def test_another_model_version_is_redone_and_created_at_stays(cli, small):
    assert cli("--local", small, "--limit", 2).counts["left"] == 1
    before = stored(small)
    assert cli("--local", small, MODEL_VERSION="another").counts["embedded"] == 3
    after = stored(small)
    assert [row.model_version for row in after.values()] == ["another"] * 3
    for path, row in before.items():
        assert after[path].created_at == row.created_at
        assert after[path].updated_at > row.updated_at


def test_failures_for_now_are_tried_in_the_next_run_those_for_good_when_asked(cli, small):
    # Reading a pipe or a device would not end
    os.mkfifo(small / "pipe.jpg")
    (small / "zero.jpg").symlink_to("/dev/zero")
    write(small / "broken.jpg", b"\xff\xd8\xff\xe0 no more")
    first = cli("--local", small)
    assert first.counts == first.counts | {"embedded": 3, "failed": 3, "left": 0}
    again = cli("--local", small)
    assert again.counts == again.counts | {"failed": 2, "left": 0, "skipped": 1}
    assert re.search(r"(?m)^Skipped +1  known failure; --retry-failed", again.out)
    assert cli("--local", small, "--retry-failed").counts["failed"] == 3
    made = rows(small)
    for name, stage, reason, permanent in (
        ("pipe.jpg", "fetch", "can't be read", 0),
        ("zero.jpg", "fetch", "can't be read", 0),
        ("broken.jpg", "decode", "broken", 1),
    ):
        row = made[name]
        assert (row.stage, row.permanent) == (stage, permanent)
        assert reason in row.reason
        assert row.embedding is None


UNREADABLE = "x" * 300  # a link that leads there is what even root can't look behind


def test_a_file_of_which_the_disk_says_nothing_is_a_failure_and_keeps_its_vector(cli, small):
    cli("--local", small, "--limit", 1)
    before = stored(small)
    assert before.keys() == {"china.jpg"}
    for path in ("china.jpg", "flower.jpg"):
        (small / path).unlink()
        (small / path).symlink_to(UNREADABLE)
    for _ in range(2):
        run = cli("--local", small)
        assert run.code == 1
        assert run.counts["failed"] == 1
        after = rows(small)
        assert after["china.jpg"].embedding == before["china.jpg"].embedding
        assert "can't be read" in after["flower.jpg"].reason


def test_a_database_or_settings_that_cannot_be_looked_at_are_named(cli, small):
    (small / ".env").symlink_to(UNREADABLE)
    assert f"{UNREADABLE} can't be read" in cli("--local", small, cwd=small).error
    (small / FILE).symlink_to(UNREADABLE)
    assert f"error: {small / FILE}: " in cli("--local", small).error


def test_a_dry_run_needs_no_right_to_write(cli, small):
    cli("--local", small, "--limit", 1)
    with contextlib.closing(sqlite3.connect(small / FILE, isolation_level=None)) as db:
        db.execute("begin immediate")  # now nobody else can write
        assert "Would embed 2 assets" in cli("--local", small, "--dry-run").out


# Parts of a folder


def test_a_client_is_a_subfolder_at_any_depth_and_combines_with_limit(cli, many):
    folder = many(
        [f"{c}/{n}.png" for c in ("globex/summer sale", "globex/summer", "acme") for n in range(3)]
    )
    run = cli("--local", folder, "--client", "globex/summer sale", "--limit", 2)
    assert run.code == 0
    assert run.counts == run.counts | {"embedded": 2, "left": 1}
    assert stored(folder).keys() == {f"globex/summer sale/{n}.png" for n in (0, 1)}
    assert cli("--local", folder, "--client", "globex/").counts["embedded"] == 4
    assert not any(path.startswith("acme") for path in stored(folder))


@pytest.mark.parametrize("client", ["three", "one/0.png", "on", ""])
def test_a_client_without_images_is_named(cli, many, client):
    run = cli("--local", many(["one/0.png"]), "--client", client)
    assert run.code == 2
    assert "--client" in run.error
    assert client in run.error


def test_shards_are_disjoint_and_together_all(cli, many):
    paths = {f"{n % 7}/{n}.png" for n in range(60)}
    folder = many(paths)
    seen = set()
    for part in (1, 2, 3):
        run = cli("--local", folder, "--shard", f"{part}/3")
        assert run.counts == run.counts | {"failed": 0, "left": 0}
        made = stored(folder).keys() - seen
        assert len(made) == run.counts["embedded"] > 0
        assert f"{len(made)} assets: {len(made)} to do" in run.err
        seen |= made
    assert seen == paths
    assert cli("--local", folder).counts["attempted"] == 0


# Odd folders


def test_a_folder_without_images_is_an_error_that_leaves_no_file(cli, tmp_path):
    write(tmp_path / "notes.txt", b"none")
    run = cli("--local", tmp_path)
    assert run.code == 2
    assert str(tmp_path) in run.error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_folder_may_be_relative(cli, many):
    folder = many(["good.png"])
    assert cli("--local", ".", cwd=folder).counts["embedded"] == 1
    shown = cli("--local", ".", "--dry-run", cwd=folder)
    assert (shown.code, shown.out) == (0, f"Would embed 0 assets as {TINY_VERSION}\n")


def test_a_folder_that_lost_all_its_images_keeps_its_rows(cli, many):
    # A disk that is not mounted looks like this
    folder = many(["a.png", "b/c.png"])
    assert cli("--local", folder).counts["embedded"] == 2
    for path in ("a.png", "b/c.png"):
        (folder / path).unlink()
    run = cli("--local", folder)
    assert run.code == 2
    assert "no image below" in run.error
    assert len(rows(folder)) == 2


def test_a_file_name_that_is_no_text_is_left_out_with_a_warning(cli, small):
    (small / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    run = cli("--local", small, "--dry-run")
    assert run.code == 0
    assert run.out.startswith("Would embed 3 ")
    assert "caf" in run.err


# The SQLite file


def test_a_dry_run_creates_no_file(cli, small, tmp_path):
    run = cli("--local", small, "--dry-run", CLIP_MODEL=tmp_path)
    assert run.code == 0
    assert run.out.startswith("Would embed 3 ")
    assert {path.name for path in small.iterdir()} == {"china.jpg", "flower.jpg", "rocket.jpg"}


def test_two_processes_on_one_folder_wait_for_each_other(cli, many):
    folder = many(f"{n}.png" for n in range(60))
    runs = [cli.start("--local", folder) for _ in range(2)]
    ends = [run.finish() for run in runs]
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    assert len(stored(folder)) == 60
    assert query(folder, "pragma integrity_check") == [("ok",)]


def test_another_runs_failure_leaves_a_vector_alone(small):
    both = [FolderStore(Settings(local=small), Stop()) for _ in range(2)]
    assets = [store.status() and next(store.pages())[0] for store in both]
    both[0].save([Embedded(assets[0], np.ones(512, np.float32))])
    both[1].save([Failed(assets[1], "decode", "takes too long", True)])
    assert stored(small).keys() == {"china.jpg"}


def test_a_locked_file_is_waited_for(cli, small):
    assert cli("--local", small, "--limit", 1).code == 0
    with contextlib.closing(sqlite3.connect(small / FILE, isolation_level=None)) as db:
        db.execute("begin exclusive")
        run = cli.start("--local", small, "--limit", 1)
        time.sleep(3)
        assert run.poll() is None
        db.execute("commit")
    assert run.finish().counts["embedded"] == 1


@pytest.mark.parametrize("made", ["create table images (name text)", None])
def test_another_file_of_that_name_is_left_alone(cli, small, made):
    if made:
        query(small, made)
    else:
        (small / FILE).write_bytes(b"my diary, dear to me " * 99)
    before = (small / FILE).read_bytes()
    run = cli("--local", small)
    assert run.code == 2
    assert FILE in run.error
    assert "this version" in run.error
    assert run.err.splitlines() == [run.error]
    assert (small / FILE).read_bytes() == before


def test_where_the_file_can_not_be_written_the_line_says_so(cli, small):
    (small / FILE).mkdir()
    run = cli("--local", small)
    assert run.code == 2
    assert FILE in run.error
    assert "written" in run.error


def test_an_interrupted_run_resumes(cli, many):
    folder = many(f"{n}.png" for n in range(200))
    run = cli.start("--local", folder, "--workers", 1)
    wait_until(lambda: (folder / FILE).exists() and " done" in run.err)
    run.kill()
    run.wait()
    early = stored(folder)
    again = cli("--local", folder)
    assert again.code == 0, again.err
    assert again.counts["embedded"] == 200 - len(early)
    late = stored(folder)
    assert len(late) == 200
    assert {p: late[p].updated_at for p in early} == {p: r.updated_at for p, r in early.items()}
