"""--local DIR: the same job over a folder, stored in one SQLite file in it."""

import contextlib
import io
import os
import re
import sqlite3
import time
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO, Cli, wait_until
from PIL import Image

FILE = "product_embeddings.sqlite3"
VERSION = "clip-vit-base-patch32"
IMAGES = {  # path in the folder -> photograph
    "flower.jpg": "flower.jpg",
    "acme/china.jpg": "china.jpg",
    "acme/deep/er/rocket.JPG": "rocket.jpg",
    'Ünïcødé 日本/O\'Neill & "Co" 100% #1?.png': "coins.png",
    "Ünïcødé 日本/new\nline.png": "brick.png",
    "two words/.not/hidden.png": None,
    ".hidden/photo.jpg": None,
    ".hidden.jpg": None,
    "notes.txt": None,
    "acme/movie.mp4": None,
    "jpg": None,
}
BROKEN = {"acme/broken.jpg": b"\xff\xd8\xff\xe0 no more", "empty.png": b""}


FIELDS = ("id", "client", "blob", "version", "created", "updated")


def fill(folder, photos, images=IMAGES, broken=BROKEN):
    for path, name in images.items():
        write(folder / path, photos[name or "flower.jpg"])
    for path, data in broken.items():
        write(folder / path, data)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def query(folder, sql, *values):
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        return db.execute(sql, values).fetchall()


def stored(folder):
    """path -> (id, client, vector, model_version, created_at, updated_at)"""
    rows = query(
        folder,
        "select image_url, id, client_name, embedding, model_version, created_at, "
        "product_embeddings.updated_at from assets join product_embeddings on asset_id = id",
    )
    return {
        row[0]: SimpleNamespace(
            **dict(zip(FIELDS, row[1:], strict=True)), vector=np.frombuffer(row[3], "<f4")
        )
        for row in rows
    }


@pytest.fixture(scope="module")
def album(photos, tiny, tmp_path_factory):
    """A folder of every kind of file, after two runs on it."""
    folder = tmp_path_factory.mktemp("album")
    fill(folder, photos)
    cli = Cli({"CLIP_MODEL": str(tiny)}, tmp_path_factory.mktemp("cwd"))
    first = cli("--local", folder)
    rows = stored(folder)
    return SimpleNamespace(
        folder=folder,
        first=first,
        rows=rows,
        second=cli("--local", folder),
        failures=query(folder, "select * from product_embedding_failures order by 1"),
    )


@pytest.fixture
def small(photos, tmp_path):
    """A folder with three images."""
    folder = tmp_path / "small"
    fill(folder, photos, {n: n for n in ("flower.jpg", "china.jpg", "rocket.jpg")}, {})
    return folder


# One folder, looked at from all sides


def test_every_image_file_below_the_folder_is_an_asset_and_nothing_else(album):
    wanted = {path for path, photo in IMAGES.items() if photo}
    assert album.rows.keys() == wanted
    assets = {path for (path,) in query(album.folder, "select image_url from assets")}
    assert assets == wanted | BROKEN.keys()


def test_broken_images_are_counted_and_the_exit_code_is_1(album):
    assert album.first.code == 1
    wanted = {"embedded": 5, "failed": 2, "attempted": 7, "left": 0}
    assert album.first.counts == album.first.counts | wanted
    assert "acme/broken.jpg" in album.first.out
    assert "empty.png" in album.first.out


def test_a_rerun_remembers_what_is_done_and_what_is_broken(album):
    assert album.second.counts["attempted"] == 0
    assert album.second.counts["skipped"] == 2
    assert stored(album.folder).keys() == album.rows.keys()
    after = stored(album.folder)
    assert {p: r.updated for p, r in after.items()} == {p: r.updated for p, r in album.rows.items()}


def test_vectors_are_those_of_transformers_as_little_endian_float32(album, tiny, photos):
    import models

    paths = list(album.rows)
    images = [Image.open(io.BytesIO(photos[IMAGES[path]])).convert("RGB") for path in paths]
    wanted = models.reference(tiny, images)
    for path, vector in zip(paths, wanted, strict=True):
        row = album.rows[path]
        assert len(row.blob) == 2048
        assert np.abs(row.vector - vector).max() < 1e-5
        assert abs(np.linalg.norm(row.vector.astype(np.float64)) - 1) < 1e-6
        assert row.version == VERSION


def test_ids_are_uuids_that_come_from_the_relative_path(album, cli, photos, tmp_path):
    for path, row in album.rows.items():
        assert row.id == str(uuid.uuid5(uuid.NAMESPACE_URL, path))
    write(tmp_path / "acme" / "china.jpg", photos["coffee.png"])
    shown = cli("--local", tmp_path, "--dry-run").out
    assert album.rows["acme/china.jpg"].id in shown


def test_the_client_is_the_top_folder(album):
    clients = {path: row.client for path, row in album.rows.items()}
    assert clients["acme/deep/er/rocket.JPG"] == clients["acme/china.jpg"] == "acme"
    assert clients["flower.jpg"] == ""


def test_tables_and_columns_are_those_of_schema_sql(album):
    script = re.sub(r"--.*", "", (REPO / "schema.sql").read_text())
    tables = re.findall(r"create table if not exists public\.(\w+) \((.*?)\n\);", script, re.S)
    assert {name for name, _ in tables} == {"product_embeddings", "product_embedding_failures"}
    for name, body in tables:
        columns = [line.split()[0] for line in body.strip().splitlines()]
        made = [row[1] for row in query(album.folder, f"pragma table_info({name})")]
        assert made == columns
    assert {"id", "image_url", "client_name"} <= {
        row[1] for row in query(album.folder, "pragma table_info(assets)")
    }


def test_times_are_in_utc_and_read_like_postgres(album):
    for row in album.rows.values():
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", row.created)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", row.updated)


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
    assert after["flower.jpg"].updated == before["flower.jpg"].updated
    assert after["china.jpg"].id == before["china.jpg"].id
    assert np.abs(after["china.jpg"].vector - before["china.jpg"].vector).max() > 1e-4
    assert np.array_equal(after["to/moved.jpg"].vector, before["moved.jpg"].vector)
    assert query(small, "select count(*) from assets") == [(4,)]
    assert query(small, "select count(*) from product_embedding_failures") == [(0,)]


def test_another_model_version_is_redone_and_created_at_stays(cli, small):
    assert cli("--local", small, "--limit", 2).counts["left"] == 1
    with contextlib.closing(sqlite3.connect(small / FILE)) as db:
        db.execute("update product_embeddings set model_version = 'x', created_at = 'then'")
        db.execute("update product_embeddings set updated_at = 'then'")
        db.commit()
    run = cli("--local", small)
    assert run.counts["embedded"] == 3
    rows = stored(small).values()
    assert [row.version for row in rows] == [VERSION] * 3
    assert sum(row.created == "then" for row in rows) == 2
    assert all(row.updated != "then" for row in rows)


def test_client_and_limit_combine(cli, photos, tmp_path):
    images = {f"{c}/{n}.jpg": "flower.jpg" for c in ("one", "two") for n in range(3)}
    fill(tmp_path, photos, images, {})
    run = cli("--local", tmp_path, "--client", "two", "--limit", 2)
    assert run.code == 0
    assert run.counts == run.counts | {"embedded": 2, "left": 1}
    assert {path[:4] for path in stored(tmp_path)} == {"two/"}
    typo = cli("--local", tmp_path, "--client", "three")
    assert typo.code == 2
    assert "three" in typo.error
    assert "--client" in typo.error


def test_a_folder_without_images_is_an_error_that_leaves_no_file(cli, tmp_path):
    write(tmp_path / "notes.txt", b"none")
    run = cli("--local", tmp_path)
    assert run.code == 2
    assert str(tmp_path) in run.error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_folder_may_be_relative_and_lose_its_images(cli, tmp_path, photos):
    write(tmp_path / "flower.jpg", photos["flower.jpg"])
    write(tmp_path / "bad.jpg", b"")
    assert cli("--local", ".", cwd=tmp_path).counts["embedded"] == 1
    shown = cli("--local", ".", "--dry-run", cwd=tmp_path).out.splitlines()
    assert shown[0] == "Would embed 0 assets"
    assert shown[1].startswith("Would skip 1 known failures")
    (tmp_path / "flower.jpg").unlink()
    (tmp_path / "bad.jpg").unlink()
    run = cli("--local", ".", cwd=tmp_path)
    assert run.code == 0
    assert run.counts["attempted"] == run.counts["left"] == run.counts["skipped"] == 0
    assert stored(tmp_path) == {}


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
    assert sorted(path.name for path in small.iterdir()) == [
        "china.jpg",
        "flower.jpg",
        "rocket.jpg",
    ]


def test_two_processes_on_one_folder_wait_for_each_other(cli, photos, tmp_path):
    fill(tmp_path, photos, {f"{n}.jpg": "flower.jpg" for n in range(60)}, {})
    runs = [cli.start("--local", tmp_path) for _ in range(2)]
    ends = [run.finish() for run in runs]
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    assert len(stored(tmp_path)) == 60
    assert query(tmp_path, "pragma integrity_check") == [("ok",)]


def test_a_locked_file_is_waited_for(cli, small):
    assert cli("--local", small, "--limit", 1).code == 0
    with contextlib.closing(sqlite3.connect(small / FILE, isolation_level=None)) as db:
        db.execute("begin exclusive")
        run = cli.start("--local", small, "--limit", 1)
        time.sleep(3)
        assert run.poll() is None
        db.execute("commit")
    assert run.finish().counts["embedded"] == 1


def test_a_file_of_that_name_that_is_no_database_is_left_alone(cli, small):
    (small / FILE).write_bytes(b"my diary, dear to me " * 99)
    run = cli("--local", small)
    assert run.code == 2
    assert FILE in run.error
    assert run.err.splitlines() == [run.error]
    assert (small / FILE).read_bytes() == b"my diary, dear to me " * 99


def test_somebody_elses_database_of_that_name_is_left_alone(cli, small):
    with contextlib.closing(sqlite3.connect(small / FILE)) as db:
        db.execute("create table assets (name text)")
        db.execute("insert into assets values ('a house')")
        db.commit()
    run = cli("--local", small)
    assert run.code == 2
    assert FILE in run.error
    assert query(small, "select * from assets") == [("a house",)]


def test_where_the_file_can_not_be_written_the_line_says_so(cli, small):
    (small / FILE).mkdir()
    run = cli("--local", small)
    assert run.code == 2
    assert FILE in run.error
    assert "written" in run.error


def test_an_interrupted_run_resumes(cli, photos, tmp_path):
    fill(tmp_path, photos, {f"{n}.jpg": "china.jpg" for n in range(200)}, {})
    run = cli.start("--local", tmp_path, "--workers", 1)
    wait_until(lambda: (tmp_path / FILE).exists() and " done" in run.err)
    run.kill()
    run.wait()
    early = stored(tmp_path)
    again = cli("--local", tmp_path)
    assert again.code == 0, again.err
    assert again.counts["embedded"] == 200 - len(early)
    late = stored(tmp_path)
    assert len(late) == 200
    assert {p: late[p].updated for p in early} == {p: row.updated for p, row in early.items()}


def test_vectors_can_be_searched_with_numpy_alone(album):
    names, vectors = zip(*((path, row.vector) for path, row in album.rows.items()), strict=True)
    nearest = np.argmax(np.stack(vectors) @ album.rows["flower.jpg"].vector)
    assert names[nearest] == "flower.jpg"
