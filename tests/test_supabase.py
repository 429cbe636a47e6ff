"""The whole job on the real stack: every pending asset gets its vector, once."""

import io
import json
import subprocess
import sys
import threading
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO, renew, stack_cli
from PIL import Image
from stack import ImageHost

VERSION = "clip-vit-base-patch32"
PROJECT = "https://abc.supabase.co"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
EARLIER = (
    "insert into product_embeddings select id, array_fill(0.1, array[512])::vector, %s, %s, %s "
    "from assets where image_url like %s"
)
# Runs the script given first and tells, last on stderr, how much memory it had at most.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def stored(stack, table="product_embeddings"):
    """asset_id -> vector (512,), model_version, created_at, updated_at."""
    rows = stack.sql(f"select asset_id, embedding::text, {COLUMNS} from {table}")
    return {
        row[0]: SimpleNamespace(
            vector=np.array(json.loads(row[1]), np.float32),
            version=row[2],
            created=row[3],
            updated=row[4],
        )
        for row in rows
    }


COLUMNS = "model_version, created_at, updated_at"


def add(stack, host, paths, client=lambda n: "x"):
    """Adds an asset per path; returns id -> path."""
    made = {uuid.uuid4(): path for path in paths}
    rows = enumerate(made.items())
    stack.add_assets((i, p and host.url_of(p), client(n)) for n, (i, p) in rows)
    return made


def paths_of(host):
    """How often each path was asked for."""
    return Counter(path for path, _ in host.requests)


class Upserts:
    """A fault for the gateway that does no harm: notes the ids in each upsert of vectors."""

    def __init__(self):
        self.seen = []

    def __call__(self, request):
        if request.method == "POST" and "/product_embeddings?" in request.path:
            ids = [row["asset_id"] for row in json.loads(request.body)]
            self.seen.append((request, ids))

    def stored(self):
        """How often each id was sent with success."""
        answered = (ids for request, ids in self.seen if request.status in (200, 201, 204))
        return Counter(i for ids in answered for i in ids)


# The main job: real photographs, the full architecture


@pytest.fixture(scope="module")
def whole(_stack, full, photos, tmp_path_factory):
    """A run over all photographs with the full model, and another one after it."""
    renew(_stack)
    folder = tmp_path_factory.mktemp("cwd")
    measured = folder / "measured.py"
    measured.write_text(MEASURED)
    cli = stack_cli(_stack, full, folder)
    files = {f"/{name}": data for name, data in photos.items()}
    with ImageHost(files) as host:
        ids = add(_stack, host, files)
        before = datetime.now(UTC)
        first = cli(REPO / "generate_embeddings.py", script=measured)
        after = datetime.now(UTC)
        rows, downloads, headers = stored(_stack), paths_of(host), [h for _, h in host.requests]
        _stack.gateway.requests.clear()
        second = cli("-v")
        yield SimpleNamespace(
            **{"ids": ids, "first": first, "second": second, "rows": rows, "headers": headers},
            **{"before": before, "after": after, "downloads": downloads},
            downloads_after=paths_of(host),
            requests=[(r.method, r.path, r.status) for r in _stack.gateway.requests],
            rows_after=stored(_stack),
            peak=int(first.err.splitlines()[-1]) * 1024,
            key=_stack.service_key,
        )


def test_every_photograph_gets_a_vector(whole):
    assert whole.first.code == 0, whole.first.err
    assert whole.first.counts["embedded"] == whole.first.counts["attempted"] == len(whole.ids)
    assert whole.first.counts["left"] == 0
    assert whole.rows.keys() == whole.ids.keys()


REDUCED_FROM = 2 * 3 * 224  # pixels of the shorter side; README, "Which images"


def test_vectors_are_those_of_transformers(whole, full, photos):
    import models

    images = {n: Image.open(io.BytesIO(data)).convert("RGB") for n, data in photos.items()}
    wanted = dict(zip(images, models.reference(full, images.values()), strict=True))
    apart = np.linalg.norm(np.subtract(*map(wanted.get, ("coffee.png", "china.jpg"))))
    for asset_id, path in whole.ids.items():
        vector, of_transformers = whole.rows[asset_id].vector, wanted[path[1:]]
        if min(images[path[1:]].size) < REDUCED_FROM:
            assert np.abs(vector - of_transformers).max() < 1e-5, path
        else:  # as README says: against the distance between different images
            assert np.linalg.norm(vector - of_transformers) < 0.03 * apart, path
    vectors = np.array(list(wanted.values()))
    assert np.median(vectors @ vectors.T) < 0.99, "so alike that agreement means nothing"


def test_vectors_are_512_finite_numbers_of_unit_length(whole):
    vectors = np.array([row.vector for row in whole.rows.values()])
    assert vectors.shape == (len(whole.ids), 512)
    assert np.isfinite(vectors).all()
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() < 1e-6


def test_rows_carry_the_version_and_the_time(whole):
    second = timedelta(seconds=1)  # the database's clock and ours are the same
    for row in whole.rows.values():
        assert row.version == VERSION
        assert whole.before - second < row.created <= whole.after + second
        assert whole.before - second < row.updated <= whole.after + second


def test_each_image_is_downloaded_once_and_without_the_key(whole):
    assert whole.downloads == Counter(whole.ids.values())
    assert not any(whole.key in value for sent in whole.headers for value in sent.values())


def test_a_rerun_does_nothing_and_downloads_nothing(whole):
    assert whole.second.code == 0
    assert whole.second.counts["attempted"] == whole.second.counts["left"] == 0
    assert whole.downloads_after == whole.downloads
    assert str(whole.rows_after) == str(whole.rows)
    writes = [r for r in whole.requests if r[0] != "GET" and r[2] in (200, 201, 204)]
    assert not [r for r in writes if r[0] != "HEAD"]


def test_memory_stays_below_2_gb(whole):
    print(f"peak memory: {whole.peak / 1e6:.0f} MB")
    assert 100e6 < whole.peak < 2e9


# What is pending


def test_only_rows_of_our_model_version_count_as_done(cli, stack, host):
    ids = add(stack, host, ["/flower.jpg", "/china.jpg", "/rocket.jpg"])
    stack.sql(EARLIER, [VERSION, LONG_AGO, LONG_AGO, "%flower%"])
    stack.sql(EARLIER, ["clip-vit-large-patch14", LONG_AGO, LONG_AGO, "%china%"])
    run = cli()
    assert run.code == 0, run.err
    assert run.counts["embedded"] == 2
    rows = {ids[i]: row for i, row in stored(stack).items()}
    assert {row.version for row in rows.values()} == {VERSION}
    assert rows["/flower.jpg"].updated == LONG_AGO
    assert rows["/china.jpg"].created == LONG_AGO
    assert rows["/china.jpg"].updated > LONG_AGO
    assert abs(np.linalg.norm(rows["/china.jpg"].vector) - 1) < 1e-6
    assert "/flower.jpg" not in paths_of(host)


def test_limit_and_client_combine_and_resume(cli, stack, host):
    paths = ["/flower.jpg", "/china.jpg", "/rocket.jpg", "/coins.png", "/brick.png"] * 2
    ids = add(stack, host, paths, client=lambda n: f"client-{n % 2}")
    of_1 = {i for n, i in enumerate(ids) if n % 2}
    first = cli("--limit", 3, "--client", "client-1")
    assert first.counts == first.counts | {"embedded": 3, "left": 2}, first.out
    early = stored(stack)
    assert early.keys() < of_1
    assert len(early) == 3
    second = cli("--limit", 3)
    assert second.counts == second.counts | {"embedded": 3, "left": 4}, second.out
    assert len(stored(stack)) == 6
    third = cli("--client", "client-1")
    assert third.code == 0
    assert third.counts["left"] == 0
    late = stored(stack)
    assert of_1 <= late.keys()
    assert {i: late[i].updated for i in early} == {i: row.updated for i, row in early.items()}
    assert len(host.requests) == len(late)


CLIENTS = [
    *('Big, "Client" (UK)', "O'Neill & 100% +plus#1", "eq.x", "{a,b} back\\slash"),
    *("Ünïcødé 日本", "*", "null", " in.(1,2) "),
]


def test_client_names_may_hold_anything(stack, cli):
    stack.add_assets((uuid.uuid4(), f"https://images.invalid/{n}.jpg", name)
                     for n, name in enumerate(CLIENTS) for _ in range(n + 1))  # fmt: skip
    starts = [cli.start("--client", name, "--dry-run") for name in CLIENTS]
    said = [start.finish().out.split(" assets")[0] for start in starts]
    assert said == [f"Would embed {n + 1}" for n in range(len(CLIENTS))]


def test_a_client_in_a_table_joined_by_foreign_key(cli, stack, host):
    stack.reset(clients=True)
    stack.sql("insert into clients values (1, 'Big, \"Client\" (UK)'), (2, 'other')")
    ids = add(stack, host, ["/flower.jpg", "/china.jpg", "/rocket.jpg", "/coins.png"])
    mine = list(ids)[:2]
    stack.sql("update assets set client_id = 2")
    stack.sql("update assets set client_id = 1 where id = any(%s)", [mine])
    run = cli("--client", 'Big, "Client" (UK)', ASSET_CLIENT_COLUMN="clients.name")
    assert run.code == 0, run.err
    assert stored(stack).keys() == set(mine)
    assert run.counts["left"] == 0
    typo = cli("--client", "Big", ASSET_CLIENT_COLUMN="clients.name")
    assert typo.code == 2
    assert "--client" in typo.error


def test_every_table_and_column_may_have_another_name(cli, stack, host):
    stack.reset(schema=False)
    stack.sql("""
        alter table assets rename to items;
        alter table items rename id to sku;
        alter table items rename image_url to photo;
        alter table items rename client_name to brand;
        create table item_vectors (asset_id uuid primary key references items on delete cascade,
            embedding vector(512), model_version text, created_at timestamptz default now(),
            updated_at timestamptz default now());
        grant all on item_vectors to service_role;
    """)
    stack.reload_schema()
    ids = {uuid.uuid4(): path for path in ("/flower.jpg", "/china.jpg", "/rocket.jpg")}
    for n, (i, path) in enumerate(ids.items()):
        stack.sql("insert into items values (%s, %s, %s)", [i, host.url_of(path), f"b{n // 2}"])
    names = {
        "ASSETS_TABLE": "items",
        "ASSET_ID_COLUMN": "sku",
        "ASSET_IMAGE_COLUMN": "photo",
        "ASSET_CLIENT_COLUMN": "brand",
        "EMBEDDINGS_TABLE": "item_vectors",
    }
    run = cli("--client", "b0", **names)
    assert run.code == 0, run.err
    assert stored(stack, "item_vectors").keys() == set(list(ids)[:2])


# Ids


ODD_IDS = [
    *("a,b", 'say "hi"', "two words", "(in)", "a.b.c", "100%", "50%25", "a/b", "Ünïcødé 日本"),
    *(
        "null",
        "eq.x",
        "a&b=c",
        "+",
        "#",
        "back\\slash",
        "'",
        "*",
        "{}",
        "-1",
        "007",
        "a:b",
        "Z",
        "z",
    ),
]


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("text", ODD_IDS),
        ("bigint", [-5, 0, 1, 2, 10, 2**31, 2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, 2**63 - 1]),
    ],
    ids=["text", "bigint"],
)
def test_ids_of_any_kind_and_windows_smaller_than_the_catalog(cli, stack, host, tuned, kind, ids):
    stack.reset(kind)
    stack.add_assets((i, f"{host.url_of('/flower.jpg')}?{n}", "x") for n, i in enumerate(ids))
    stack.sql(
        "insert into product_embeddings select id, array_fill(0.1, array[512])::vector, %s "
        "from assets where id in (select id from assets order by id limit 3 offset 2)",
        [VERSION],
    )
    done = {i for (i,) in stack.sql("select asset_id from product_embeddings")}
    stack.gateway.fault = upserts = Upserts()
    run = cli("PAGE_ROWS=2", "WINDOW_ROWS=4", "--", script=tuned)
    assert run.code == 0, run.err + run.out
    assert run.counts["embedded"] == len(ids) - 3
    assert run.counts["left"] == 0
    assert stored(stack).keys() == set(ids)
    assert upserts.stored() == Counter(set(ids) - done)


# Large catalogs


def test_a_count_that_takes_too_long_leaves_the_total_unknown_and_nothing_else(cli, stack, host):
    add(stack, host, ["/flower.jpg"] * 3)
    late = (500, [("Content-Type", "application/json")], b'{"code":"57014","message":"late"}')

    def fault(request):
        count = "count=exact" in request.headers.get("prefer", "")
        return late if count and "=is.null" in request.path and "limit=1" in request.path else None

    stack.gateway.fault = fault
    some = cli("--limit", 2)
    assert (some.code, some.counts["embedded"], some.counts["left"]) == (0, 2, None)
    rest = cli()
    assert (rest.code, rest.counts["embedded"], rest.counts["left"]) == (0, 1, 0)


@pytest.mark.parametrize(
    ("image", "place"),
    [
        ("//cdn.example.com/a.jpg", "https://cdn.example.com/a.jpg"),
        *[(url, url) for url in ("https://x.example.com/a.jpg", "data:image/png;base64,AAAA")],
        *[(url, url) for url in [f"{PROJECT}/storage/v1/object/sign/shop/a.jpg?token=t"]],
    ],
)
def test_the_key_goes_to_none_of_these(image, place):
    import generate_embeddings as script

    for bucket in ("", "shop"):
        settings = script.Settings(url=PROJECT, key="sb_secret_x", storage_bucket=bucket)
        assert script.SupabaseStore(settings, script.Stop()).locate(image) == (place, {})


def test_what_is_left_is_counted_from_the_first_pending_asset_on(cli, stack, host, tuned):
    stack.reset("bigint")
    stack.add_assets((n, f"{host.url_of('/flower.jpg')}?{n}", "x") for n in range(40))
    stack.sql(
        "insert into product_embeddings select id, array_fill(0.1, array[512])::vector, %s "
        "from assets where id < 10",
        [VERSION],
    )
    run = cli("PAGE_ROWS=2", "WINDOW_ROWS=4", "--", "--limit", 25, script=tuned)
    assert run.counts == run.counts | {"embedded": 25, "left": 5}


@pytest.mark.parametrize("cap", [1000, 100])
def test_1000_assets_are_embedded_once_each_whatever_the_cap(cli, stack, cap):
    if cap != 1000:
        stack.set_max_rows(cap)
    image = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).save(image, "png")
    with ImageHost({f"/{n}.png": image.getvalue() for n in range(1000)}) as host:
        ids = add(stack, host, host.files)
        stack.gateway.fault = upserts = Upserts()
        run = cli("--workers", 4)
        assert run.code == 0, run.err
        assert run.counts["embedded"] == run.counts["attempted"] == 1000
        assert stored(stack).keys() == ids.keys()
        assert upserts.stored() == Counter(map(str, ids))
        assert paths_of(host) == Counter(ids.values())


def test_rows_that_are_added_meanwhile_are_done_now_or_by_the_next_run(cli, stack, photos):
    stack.reset("bigint")
    added = threading.Event()

    def slow(handler):
        if not added.is_set():
            added.set()
            rows = [(n, host.url_of(f"/late{n}.jpg"), "x") for n in (5, 35, 205, 305)]
            stack.add_assets(rows)
        handler.reply(200, [("Content-Type", "image/jpeg")], photos["flower.jpg"])

    numbers = range(10, 210, 10)
    files = {f"/{n}.jpg": slow for n in numbers}
    late = {f"/late{n}.jpg": photos["china.jpg"] for n in (5, 35, 205, 305)}
    with ImageHost(files | late) as host:
        stack.add_assets((n, host.url_of(f"/{n}.jpg"), "x") for n in numbers)
        run = cli("--workers", 1)
        assert run.code == 0, run.err
        again = cli()
        assert again.code == 0
        assert run.counts["embedded"] + again.counts["embedded"] == len(numbers) + 4
        assert again.counts["left"] == 0
        assert stored(stack).keys() == {*numbers, 5, 35, 205, 305}
        assert set(paths_of(host).values()) == {1}


# Images that fail


@pytest.fixture(scope="module")
def some_missing(_stack, tiny, photos, tmp_path_factory):
    """A run over a catalog in which some images are not there, and another one after it."""
    renew(_stack)
    cli = stack_cli(_stack, tiny, tmp_path_factory.mktemp("cwd"))
    with ImageHost({f"/{n}": photos[n] for n in ("flower.jpg", "china.jpg")}) as host:
        paths = ["/flower.jpg", "/gone-1.jpg", None, "/china.jpg", "/gone-2.jpg", ""]
        ids = add(_stack, host, paths)
        first = cli("-v")
        asked = paths_of(host)
        yield SimpleNamespace(
            ids=ids,
            first=first,
            asked=asked,
            rows=stored(_stack),
            second=cli(),
            asked_after=paths_of(host),
        )


def test_a_missing_image_is_counted_and_the_rest_is_done(some_missing):
    run = some_missing.first
    assert run.code == 1
    assert run.counts == run.counts | {"embedded": 2, "failed": 4, "left": 0, "attempted": 6}
    done = {some_missing.ids[i] for i in some_missing.rows}
    assert done == {"/flower.jpg", "/china.jpg"}


def test_the_report_groups_failures_by_reason_with_examples(some_missing):
    lines = some_missing.first.out.splitlines()
    (at,) = [n for n, line in enumerate(lines) if "HTTP 404" in line]
    assert "2" in lines[at]
    assert "/gone-1.jpg" in lines[at + 1] + lines[at + 2]
    assert "/gone-2.jpg" in lines[at + 1] + lines[at + 2]


def test_an_empty_or_missing_image_url_fails_without_a_request(some_missing):
    assert some_missing.asked.keys() == {"/flower.jpg", "/china.jpg", "/gone-1.jpg", "/gone-2.jpg"}
    assert "no image URL" in some_missing.first.out


def test_known_failures_are_not_tried_again(some_missing):
    assert some_missing.second.counts["attempted"] == 0
    assert some_missing.second.counts["skipped"] == 4
    assert some_missing.asked_after == some_missing.asked


def test_the_script_runs_from_any_folder(cli, stack, tmp_path):
    run = subprocess.run(
        [sys.executable, REPO / "generate_embeddings.py", "--dry-run"],
        cwd=tmp_path,
        env=cli.environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
