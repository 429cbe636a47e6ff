"""The whole job on the real stack, and SupabaseStore.

- Every pending asset gets its vector, once, in few requests, whatever its id, its client's name and
  the cap of rows. The vectors are those of transformers.
- A bad image costs one line in the report, and is tried again later and later.
- An answer of the database means what its code says. A refusal ends the run with its words.
- The key goes to the project alone, and there to the buckets that are named.
- The page gets copies, near pairs, samples and failures.
"""

import base64
import http.client
import io
import json
import re
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from answers import status
from conftest import REPO, TINY_VERSION, open_store, pending, renew, stack_cli, survey, vector
from PIL import Image
from samples import saved
from stack import HTML, JSON, ImageHost

import generate_embeddings as script
from generate_embeddings import Asset, Embedded, Failed

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
EARLIER = """insert into product_embeddings
    (asset_id, embedding, model_version, created_at, updated_at, embedded_image_hash)
    select id, array_fill(0.1, array[512])::vector, %s, %s, %s, embedding_image_hash(image)
    from embedding_sources() where image like %s"""
# Runs the script given first and tells, last on stderr, how much memory it had at most.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def add(stack, host, paths, client=lambda n: "x"):
    """Adds an asset per path, or other URL, in the order of ids; returns id -> path."""
    made = {uuid.UUID(int=n + 1): path for n, path in enumerate(paths)}
    rows = enumerate(made.items())
    urls = {p: host.url_of(p) if p and p.startswith("/") else p for p in made.values()}
    stack.add_assets((i, urls[p], client(n)) for n, (i, p) in rows)
    return made


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
        rows, downloads, headers = _stack.vectors(), host.asked(), [h for _, h in host.requests]
        _stack.gateway.requests.clear()
        second = cli("-v")
        yield SimpleNamespace(
            **{"ids": ids, "first": first, "second": second, "rows": rows, "headers": headers},
            **{"before": before, "after": after, "downloads": downloads},
            downloads_after=host.asked(),
            requests=[r.path for r in _stack.gateway.requests],
            rows_after=_stack.vectors(),
            peak=int(first.err.splitlines()[-1]) * 1024,
            key=_stack.service_key,
        )


def test_every_photograph_gets_a_row_with_a_vector_of_unit_length(whole):
    run = whole.first
    assert (run.code, run.counts["embedded"], run.counts["left"]) == (0, len(whole.ids), 0)
    assert whole.rows.keys() == whole.ids.keys()
    vectors = np.array([row.vector for row in whole.rows.values()])
    assert np.isfinite(vectors).all()
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() < 1e-6
    second = timedelta(seconds=1)  # the database's clock and ours are the same
    for row in whole.rows.values():
        assert row.version == "clip-vit-base-patch32"
        assert whole.before - second < row.created <= row.updated <= whole.after + second


REDUCED_FROM = 2 * 3 * 224  # pixels of the shorter side: see decode


def test_vectors_are_those_of_transformers(whole, of_transformers, photos):
    wanted = of_transformers
    apart = np.linalg.norm(np.subtract(*map(wanted.get, ("coffee.png", "china.jpg"))))
    for asset_id, path in whole.ids.items():
        vector, of_transformers = whole.rows[asset_id].vector, wanted[path[1:]]
        if min(Image.open(io.BytesIO(photos[path[1:]])).size) < REDUCED_FROM:
            assert np.abs(vector - of_transformers).max() < 1e-5, path
        else:  # as README says: against the distance between different images
            assert np.linalg.norm(vector - of_transformers) < 0.03 * apart, path
    vectors = np.array(list(wanted.values()))
    assert np.median(vectors @ vectors.T) < 0.99, "so alike that agreement means nothing"


def test_each_image_is_downloaded_once_and_without_the_key(whole):
    assert whole.downloads == Counter(whole.ids.values())
    assert not any(whole.key in value for sent in whole.headers for value in sent.values())


def test_a_rerun_does_nothing_and_downloads_nothing(whole):
    assert whole.second.code == 0
    assert whole.second.counts["attempted"] == whole.second.counts["left"] == 0
    assert whole.downloads_after == whole.downloads
    assert str(whole.rows_after) == str(whole.rows)
    assert f"{len(whole.ids)} assets: {len(whole.ids)} done, 0 to do" in whole.second.err
    assert len(whole.requests) <= 4
    assert not any(path.endswith("/store_embeddings") for path in whole.requests)


def test_memory_stays_below_2_gb(whole):
    print(f"peak memory: {whole.peak / 1e6:.0f} MB")
    assert 100e6 < whole.peak < 2e9


# What is pending


def test_only_rows_of_our_model_version_count_as_done(cli, stack, host):
    ids = add(stack, host, ["/flower.jpg", "/china.jpg", "/rocket.jpg"])
    stack.sql(EARLIER, [TINY_VERSION, LONG_AGO, LONG_AGO, "%flower%"])
    stack.sql(EARLIER, ["clip-vit-large-patch14", LONG_AGO, LONG_AGO, "%china%"])
    run = cli()
    assert run.code == 0, run.err
    assert run.counts["embedded"] == 2
    rows = {ids[i]: row for i, row in stack.vectors().items()}
    assert {row.version for row in rows.values()} == {TINY_VERSION}
    assert rows["/flower.jpg"].updated == LONG_AGO
    assert rows["/china.jpg"].created == LONG_AGO
    assert rows["/china.jpg"].updated > LONG_AGO
    assert abs(np.linalg.norm(rows["/china.jpg"].vector) - 1) < 1e-6
    assert "/flower.jpg" not in host.asked()
    again = cli(MODEL_VERSION="shoes-2027")
    assert (again.code, again.counts["embedded"]) == (0, 3)
    assert {row.version for row in stack.vectors().values()} == {"shoes-2027"}


def test_limit_and_client_combine_and_resume(cli, stack, host):
    paths = ["/flower.jpg", "/china.jpg", "/rocket.jpg", "/coins.png", "/brick.png"] * 2
    ids = add(stack, host, paths, client=lambda n: f"client-{n % 2}")
    of_1 = {i for n, i in enumerate(ids) if n % 2}
    first = cli("--limit", 3, "--client", "client-1")
    assert first.counts == first.counts | {"embedded": 3, "left": 2}, first.out
    early = stack.vectors()
    assert early.keys() < of_1
    assert len(early) == 3
    second = cli("--limit", 3)
    assert second.counts == second.counts | {"embedded": 3, "left": 4}, second.out
    assert len(stack.embedded()) == 6
    third = cli("--client", "client-1")
    assert (third.code, third.counts["left"]) == (0, 0)
    late = stack.vectors()
    assert of_1 <= late.keys()
    assert {i: late[i].updated for i in early} == {i: row.updated for i, row in early.items()}
    assert len(host.requests) == len(late)


ODD_TEXTS = [
    *("a,b", 'say "hi"', "two words", "(in)", "a.b.c", "100%", "50%25", "a/b", "Ünïcødé 日本"),
    *("null", "eq.x", "a&b=c", "+", "#", "back\\slash", "'", "*", "{}", "-1", "007", "a:b", "Z"),
    *("z", " ", "a\nembedded=9 failed=0 left=0 attempted=9", "\x1b[2J", ' in.(1,"2") '),
]
ODD_NUMBERS = [-5, 0, 1, 2, 10, 2**31, 2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, 2**63 - 1]


@pytest.mark.parametrize(
    ("kind", "ids"), [("text", ODD_TEXTS), ("bigint", ODD_NUMBERS)], ids=["text", "bigint"]
)
def test_ids_and_clients_may_hold_anything(stack, monkeypatch, kind, ids):
    """Each asset of a client whose name is its id; in pages smaller than the catalog."""
    monkeypatch.setattr(script, "PAGE_ROWS", 2)
    monkeypatch.setattr(script, "FAILURES_AT_ONCE", 2)
    stack.reset(kind)
    stack.add_assets((i, f"https://images.invalid/{n}", str(i)) for n, i in enumerate(ids))
    store = open_store(stack)
    assets = pending(store)
    assert sorted(asset.id for asset in assets) == sorted(ids)
    done, failed = assets[::2], assets[1::2]
    results = [Embedded(a, vector(n + 1)) for n, a in enumerate(done)]
    results += [Failed(a, "fetch", "HTTP 404") for a in failed]
    assert store.save(results) == set(ids)
    assert [f.picture.id for f in store.catalog().failures] == [a.id for a in failed]
    for asset in assets:
        of_client = open_store(stack, client=str(asset.id))
        now, left = survey(of_client)
        assert (now.assets, now.done, left) == (
            1,
            int(asset in done),
            [a for a in failed if a == asset],
        )
        assert len(of_client.search(vector(1), 5)) == now.done
        assert len(of_client.catalog().failures) == now.failed


def test_1000_assets_are_embedded_once_each_in_few_requests_whatever_the_cap(cli, stack):
    stack.set_max_rows(100)
    image = saved(Image.linear_gradient("L").resize((64, 64)), "PNG")
    with ImageHost({f"/{n}.png": image for n in range(1000)}) as host:
        ids = add(stack, host, host.files)
        few = cli("--limit", 10)
        assert (few.code, few.counts["embedded"], few.counts["left"]) == (0, 10, 990)
        assert len(stack.gateway.requests) <= 8
        run = cli("--workers", 4)
        assert run.code == 0, run.err
        assert run.counts == run.counts | {"embedded": 990, "left": 0}
        assert stack.embedded() == ids.keys()
        assert host.asked() == Counter(ids.values())


def test_rows_that_are_added_meanwhile_are_done_now_or_by_the_next_run(cli, stack, photos):
    stack.reset("bigint")
    added = threading.Event()
    late = (5, 35, 205, 305)

    def slow(handler):
        if not added.is_set():
            added.set()
            stack.add_assets((n, host.url_of(f"/{n}.jpg"), "x") for n in late)
        handler.reply(200, [("Content-Type", "image/jpeg")], photos["flower.jpg"])

    with ImageHost(otherwise=slow) as host:
        numbers = range(10, 210, 10)
        stack.add_assets((n, host.url_of(f"/{n}.jpg"), "x") for n in numbers)
        run, again = cli("--workers", 1), cli()
        assert (run.code, again.code, again.counts["left"]) == (0, 0, 0)
        assert stack.embedded() == {*numbers, *late}
        assert set(host.asked().values()) == {1}


def test_data_urls_of_several_megabytes(cli, stack, host):
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), np.uint8)
    image = base64.b64encode(saved(Image.fromarray(noise), "PNG", compress_level=1)).decode()
    assert 4e6 < len(image) < 6e6
    ids = add(stack, host, [f"data:image/png;base64,{image}" for _ in range(5)] + ["/flower.jpg"])
    stack.sql("update assets set image_url = repeat(image_url, 2) where id = %s", [list(ids)[2]])
    run = cli()
    assert run.code == 1
    assert run.counts == run.counts | {"embedded": 5, "failed": 1, "left": 0}
    assert stack.failures().keys() == {list(ids)[2]}
    assert f"fetch: {script.LONG_DATA_URL} (9 MB)" in run.out
    assert len(run.out + run.err) < 10_000


# Images that fail


WEB_PAGE = status(200, *HTML, body=b"<!doctype html>")
BAD = {  # a path, or what else stands in the column: the host's answer, and the stage and reason
    "/gone.jpg": (None, "fetch: HTTP 404"),
    "/closed.jpg": (status(403), "fetch: HTTP 403"),
    "/page.jpg": (WEB_PAGE, f"decode: {script.WEB_PAGE}"),
    "/empty.jpg": (b"", f"decode: {script.EMPTY}"),
    "/cut.jpg": ("cut", f"decode: {script.BROKEN}"),
    None: (None, f"fetch: {script.NO_IMAGE}"),
    "mugs/1.jpg": (None, f"fetch: {script.NO_URL}"),
    "data:image/png;base64": (None, f"fetch: {script.BROKEN_DATA_URL}"),
}


@pytest.fixture(scope="module")
def story(_stack, photos, tiny, tmp_path_factory):
    """Four runs over good images and bad ones. Each with its Result, what the host was asked for,
    and the failures as they are stored then."""
    renew(_stack)
    cli = stack_cli(_stack, tiny, tmp_path_factory.mktemp("cwd"))
    good = photos["flower.jpg"]
    files = {f"/{n}.jpg": good for n in range(20)}
    with ImageHost(files) as host:
        answers = {path: answer for path, (answer, _) in BAD.items() if answer is not None}
        host.files |= answers | {"/cut.jpg": good[: len(good) // 2]}
        bad = add(_stack, host, BAD)
        _stack.add_assets((uuid.uuid4(), host.url_of(path), "x") for path in files)

        def seen(*args):
            host.requests.clear()
            result = cli(*args)
            return SimpleNamespace(result=result, asked=set(host.asked()), noted=_stack.failures())

        first, second, third, retried = seen(), seen(), seen(), seen("--retry-failed")
        host.files["/cut.jpg"] = good
        mended = seen("--retry-failed")
        yield SimpleNamespace(
            **{"bad": bad, "first": first, "second": second, "third": third},
            **{"retried": retried, "mended": mended},
            on_host={path for path in BAD if path and path.startswith("/")},
        )


def test_the_good_ones_are_embedded_and_the_bad_ones_named(story):
    run = story.first.result
    assert run.code == 1
    assert run.counts == run.counts | {"embedded": 20, "failed": len(BAD), "left": 0}
    assert story.first.noted.keys() == story.bad.keys()
    for asset, path in story.bad.items():
        stage, reason, attempts = story.first.noted[asset]
        assert (f"{stage}: {reason}".partition(" (")[0], attempts) == (BAD[path][1], 1)
        lines = run.out.splitlines()
        (at,) = [n for n, line in enumerate(lines) if f"{stage}: {reason}" in line]
        assert lines[at + 1].strip() == script.advice_on(reason)
        assert str(asset) in lines[at + 2]


def test_the_next_run_tries_them_again_and_then_they_wait(story):
    run = story.second.result
    assert (run.code, story.second.asked) == (1, story.on_host)
    assert run.counts == run.counts | {"embedded": 0, "failed": len(BAD), "waiting": 0}
    assert {attempts for *_, attempts in story.second.noted.values()} == {2}
    run = story.third.result
    assert (run.code, story.third.asked) == (0, set())
    assert run.counts == run.counts | {"attempted": 0, "waiting": len(BAD), "left": 0}
    assert re.search(
        rf"20 done, {len(BAD)} failed before, tried again from .* on, 0 to do", run.err
    )


def test_retry_failed_tries_them_all_and_what_is_mended_is_embedded(story):
    assert story.retried.asked == story.on_host
    assert story.retried.result.counts["failed"] == len(BAD)
    run = story.mended.result
    assert run.counts == run.counts | {"embedded": 1, "failed": len(BAD) - 1}
    assert len(story.mended.noted) == len(BAD) - 1


def test_known_failures_keep_no_others_waiting(stack, host, cli):
    add(stack, host, ["/gone"] * 5)
    assert cli().counts["failed"] == 5
    good = host.url_of("/flower.jpg")
    stack.add_assets((uuid.UUID(int=2**100 + n), good, "x") for n in range(3))
    run = cli("--limit", "2")
    assert run.counts == run.counts | {"embedded": 2, "failed": 0, "left": 6}
    run = cli()
    assert run.counts == run.counts | {"embedded": 1, "failed": 5, "left": 0}


# What the database's answers mean


PASSING = (
    "08006 40001 40P01 53300 53400 55P03 57014 57P01 XX000 PGRST000 PGRST001 PGRST002 PGRST003"
)
CODES = {
    **dict.fromkeys(PASSING.split(), "passing"),
    **dict.fromkeys(["408", "425", "429", "500", "502", "503", "504", "520"], "passing"),
    **dict.fromkeys(["PGRST202", "42883", "42P01", "42703"], "run this version's schema.sql"),
    "25006": "a read replica's",
    **dict.fromkeys(["401", "403", "PGRST301", "PGRST302", "PGRST303"], "was refused"),
    "42501": "grant select on that table",
    "PGRST106": "the schema public is not exposed",
    **{code: f"answers with HTTP {code}" for code in ("301", "402", "404", "410")},
    "402": "answers with HTTP 402, Payment Required: check SUPABASE_URL",
    **dict.fromkeys(["22P02", "42601", "P0001"], "the database says"),
}


@pytest.fixture(scope="module")
def meant(_stack):
    """What each code led to that came once: "passing", or the error that ended the run."""
    renew(_stack)
    asked = Counter()

    def once(request):
        code = json.loads(request.body)["model_version"]
        asked[code] += 1
        if asked[code] > 1:
            return None
        if len(code) == 3:
            return int(code), HTML, b"<html><body>it is paused</body></html>"
        answer = {"code": code, "message": f"no, {_stack.service_key}"}
        return 400, JSON, json.dumps(answer).encode()

    def meaning(code):
        try:
            open_store(_stack, model_version=code).status()
        except script.RunError as error:
            return str(error)
        return "passing" if asked[code] == 2 else "never met"

    _stack.gateway.fault = once
    with ThreadPoolExecutor(len(CODES)) as pool:
        found = dict(zip(CODES, pool.map(meaning, CODES), strict=True))
    _stack.gateway.fault = None
    return found


@pytest.mark.parametrize(("code", "means"), CODES.items())
def test_a_code_of_the_database_is_taken_for_what_it_is(meant, code, means):
    assert means in meant[code]


def test_a_key_that_a_database_echoes_is_struck_out(meant):
    assert "no, (the key)" in meant["42601"]
    assert not any("eyJ" in said for said in meant.values())  # as every legacy key begins


def refusing(code, times):
    """A fault for the gateway: the first calls of store_embeddings are refused."""
    left = iter(range(times))

    def fault(request):
        if request.function == "store_embeddings" and next(left, None) is not None:
            return 409, JSON, json.dumps({"code": code, "message": "sorry"}).encode()
        return None

    return fault


def test_a_key_that_breaks_in_this_moment_is_tried_again_and_one_that_stays_broken_is_told(
    stack, host
):
    add(stack, host, ["/a.jpg"])
    store = open_store(stack)
    results = [Embedded(asset, vector(1)) for asset in pending(store)]
    stack.gateway.fault = refusing("23503", 2)
    assert store.save(results) == {results[0].asset.id}
    stack.gateway.fault = refusing("23503", 99)
    with pytest.raises(script.RunError, match=r'foreign key .*see "Another table"'):
        store.save(results)
    stack.gateway.fault = refusing("23514", 1)
    with pytest.raises(script.RunError, match=r"the database says 'sorry' \(23514\)"):
        store.save(results)


def test_a_project_may_be_below_a_path(cli, stack, host):
    """As self-hosted ones are behind a reverse proxy; their own storage, too."""

    def below(handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port)
        path = handler.path.removeprefix("/supabase")
        connection.request(handler.command, path, body, dict(handler.headers))
        answer = connection.getresponse()
        unwanted = ("connection", "content-length", "date", "server")
        headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in unwanted]
        handler.reply(answer.status, headers, answer.read())
        connection.close()

    stack.gateway.storage["photos", "a.jpg"] = host.files["/flower.jpg"]
    with ImageHost(otherwise=below) as proxy:
        url = f"{proxy.url}/supabase"
        own = "storage/v1/object/authenticated/photos/a.jpg"
        ids = stack.add_images([host.url_of("/china.jpg"), f"/{own}", f"{url}/{own}"])
        run = cli(SUPABASE_URL=f"{url}/rest/v1/", STORAGE_BUCKETS="photos")
        assert (run.code, stack.embedded()) == (0, set(ids))
        wrong = cli("--dry-run", SUPABASE_URL=f"{proxy.url}/elsewhere")
    assert "HTTP 404" in wrong.error


# Private storage


STORED = ("2026-05-01T10:00:00.jpg", "products/a%20b.jpg", "products/gr%C3%B6%C3%9Fe%20&%201.jpg")


@pytest.fixture
def bucket(stack, photos):
    """The URL of a private bucket with a few images, but for how it may be accessed."""
    for path in ("2026-05-01T10:00:00.jpg", "products/a b.jpg", "products/größe & 1.jpg"):
        stack.gateway.storage["product images", path] = photos["flower.jpg"]
    return f"{stack.url}/storage/v1/object/{{}}product%20images/"


def test_storage_urls_of_a_bucket_that_is_named_are_read_with_the_key(stack, bucket, host, cli):
    ways = ("public/", "authenticated/", "")
    add(stack, host, [bucket.format(way) + path for way in ways for path in STORED])
    run = cli(STORAGE_BUCKETS="thumbnails, product images")
    assert (run.code, run.counts["embedded"]) == (0, 9)


def test_the_key_is_sent_to_supabase_only(stack, bucket, host, cli):
    images = [
        bucket.format("public/") + STORED[0],
        "/flower.jpg",
        "/storage/v1/object/authenticated/product images/products/a b.jpg",
        f"{stack.url}@127.0.0.1:{host.port}/storage/v1/object/public/b/a.jpg",
        f"{stack.url}.127.0.0.1.invalid/storage/v1/object/public/b/a.jpg",
        f"{stack.url}/storage/v1/object/public/b/away",
    ]
    stack.gateway.fault = lambda request: (
        (302, [("Location", host.url_of("/flower.jpg"))], b"") if "away" in request.path else None
    )
    add(stack, host, [image for image in images if not image.startswith("/storage")])
    stack.add_assets([(uuid.UUID(int=99), host.url + images[2], "x")])
    run = cli(STORAGE_BUCKETS="product images,b")
    assert run.counts["embedded"] == 3  # the first two, and the one that is redirected
    assert len(host.requests) >= 3
    for _, headers in host.requests:
        assert "apikey" not in {name.lower() for name in headers}
        assert "Bearer" not in str(headers)
        assert stack.service_key not in str(headers)


PROJECT = "https://abc.supabase.co"
OBJECTS = f"{PROJECT}/storage/v1/object"
MUG = "shop/products/a%20mug.jpg"
RENDERED = f"{PROJECT}/storage/v1/render/image"


@pytest.mark.parametrize(
    ("image", "where", "with_key"),
    [
        ("https://x.example.com/a.jpg", "https://x.example.com/a.jpg", False),
        (" https://x.example.com/ü.jpg\n", "https://x.example.com/ü.jpg", False),
        ("//cdn.example.com/a.jpg", "https://cdn.example.com/a.jpg", False),
        ("data:image/png;base64,AAAA", "data:image/png;base64,AAAA", False),
        (f"{OBJECTS}/sign/shop/a.jpg?token=t", f"{OBJECTS}/sign/shop/a.jpg?token=t", False),
        *(
            (f"{OBJECTS}/{way}{MUG}", f"{OBJECTS}/authenticated/{MUG}", True)
            for way in ("public/", "authenticated/", "")
        ),
        (f"/storage/v1/object/public/{MUG}", f"{OBJECTS}/authenticated/{MUG}", True),
        # In a path the question mark is a part of the name, in a URL it is not
        ("/storage/v1/object/shop/a?.jpg", f"{OBJECTS}/authenticated/shop/a%3F.jpg", True),
        ("/storage/v1/object/public/other/a?.jpg", f"{OBJECTS}/public/other/a%3F.jpg", False),
        ("/storage/v1/object/sign/shop/a.jpg?token=t", f"{OBJECTS}/sign/shop/a.jpg?token=t", False),
        (f"{OBJECTS}/public/shop/a.jpg?v=2", f"{OBJECTS}/authenticated/shop/a.jpg?v=2", True),
        (f"{RENDERED}/public/{MUG}?width=9", f"{RENDERED}/authenticated/{MUG}?width=9", True),
        (f"/storage/v1/render/image/public/{MUG}", f"{RENDERED}/authenticated/{MUG}", True),
        (f"{RENDERED}/public/other/a.jpg", f"{RENDERED}/public/other/a.jpg", False),
        (f"{OBJECTS}/public/other/a.jpg", f"{OBJECTS}/public/other/a.jpg", False),
        (f"{PROJECT}.evil.example/storage/v1/object/{MUG}", None, False),
        (f"{PROJECT}@evil.example/storage/v1/object/{MUG}", None, False),
        (f"{PROJECT}/functions/v1/shop/a.jpg", None, False),
    ],
)
def test_the_key_goes_to_a_named_bucket_of_the_own_storage_alone(image, where, with_key):
    asset = Asset(1, image, size=len(image.encode()))
    place = project_store("shop, my pictures").locate(asset)
    assert place.where == (where or image)
    assert place.headers == ({"apikey": KEY, "Authorization": f"Bearer {KEY}"} if with_key else {})


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (f"{OBJECTS}/other/a.jpg", f"{script.PRIVATE_BUCKET} (other)"),
        (f"{OBJECTS}/authenticated/other/a.jpg", f"{script.PRIVATE_BUCKET} (other)"),
        (f"{RENDERED}/authenticated/other/a.jpg", f"{script.PRIVATE_BUCKET} (other)"),
        (f"{OBJECTS}/public/shop/../other/a.jpg", script.BAD_STORAGE_PATH),
        (f"{RENDERED}/public/shop/../other/a.jpg", script.BAD_STORAGE_PATH),
        (f"{OBJECTS}/shop/%2e%2e/other/a.jpg", script.BAD_STORAGE_PATH),
        (f"{OBJECTS}/shop/..\\other/a.jpg", script.BAD_STORAGE_PATH),
        (f"{OBJECTS}/shop/.\t./other/a.jpg", script.BAD_STORAGE_PATH),
        ("", script.NO_IMAGE),
        (" \n", script.NO_IMAGE),
        ("data:image/png;base64,AA", f"{script.LONG_DATA_URL} (9 MB)"),
    ],
)
def test_an_image_that_is_not_to_be_had_is_said_to_be(image, reason):
    size = 9 * 2**20 if image.startswith("data:") else 0
    with pytest.raises(script.ImageError) as error:
        project_store("shop, my pictures").locate(Asset(1, image, size=size))
    assert str(error.value) == reason


@pytest.mark.parametrize("path", ["shop/" + "%" * 10**6, "b" * 60_000])
def test_a_long_storage_path_is_refused_in_few_words(path):
    """To unquote 8 MB of percent signs takes 1.4 GB and 20 s, in the loop."""
    with pytest.raises(script.ImageError) as refused:
        project_store("shop").locate(script.Asset(1, f"{OBJECTS}/{path}"))
    assert len(str(refused.value)) < 200


KEY = "sb_secret_x"


def project_store(buckets):
    settings = script.Settings(url=PROJECT, key=KEY, storage_buckets=buckets)
    return script.SupabaseStore(settings, script.Stop())


def test_an_object_that_is_not_there_or_out_of_its_bucket_is_a_failure(stack, bucket, host, cli):
    paths = ["gone.jpg", "../../../rest/v1/assets", "a/../../b/c.jpg", "%2e%2e/b.jpg", "..%2fb.jpg"]
    add(stack, host, [bucket.format("public/") + path for path in paths])
    run = cli(STORAGE_BUCKETS="product images")
    assert run.counts == run.counts | {"embedded": 0, "failed": 5}
    assert {failure[0] for failure in stack.failures().values()} == {"fetch"}
    asked = {r.path for r in stack.gateway.requests if "/rpc/" not in r.path}
    assert asked == {"/storage/v1/object/authenticated/product%20images/gone.jpg"}


# The page


def test_the_catalog_has_what_the_page_shows(stack, monkeypatch):
    """Copies, near pairs, samples of each client, and failures beyond one answer."""
    monkeypatch.setattr(script, "COMPARED_AT_ONCE", 10)
    monkeypatch.setattr(script, "FAILURES_AT_ONCE", 2)
    stack.add_images([f"https://images.invalid/{n}.jpg" for n in range(45)], "large")
    stack.sql("update assets set client_name = 'small' where id::text like '%10'")
    store = open_store(stack)
    assets = pending(store)
    made = np.random.default_rng(0).standard_normal((40, 512))
    made[1:4] = made[0]
    made[5] = made[4] + 0.05 * made[6]  # a near pair
    vectors = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    results = [Embedded(a, v) for a, v in zip(assets, vectors, strict=False)]
    store.save([*results, *(Failed(a, "fetch", "HTTP 404") for a in assets[40:])])
    catalog = store.catalog()
    counts = (catalog.embedded, catalog.sought_among, catalog.compared)
    assert counts == (40, 40, 40)
    known = {frozenset((p.one.id, p.other.id)): p for p in catalog.pairs}
    copies = {a.id for a in assets[:4]}
    near = frozenset(a.id for a in assets[4:6])
    assert set().union(*known) == copies | near
    assert not known.pop(near).same
    assert all(pair.same for pair in known.values())
    assert len(catalog.samples) == script.SAMPLES
    assert "small" in {one.picture.client for one, *_ in catalog.samples}
    for one, *nearest in catalog.samples:
        assert one.picture.id not in {match.picture.id for match in nearest}
        assert all(match.similarity < script.SAME for match in nearest)
    failed = [(failure.picture.id, failure.reason) for failure in catalog.failures]
    assert failed == [(a.id, "HTTP 404") for a in assets[40:]]
    assert store.search(vectors[7], 1)[0].picture.id == assets[7].id
    client = open_store(stack, client="small").catalog()
    assert (client.embedded, len(client.samples)) == (1, 1)


def test_an_empty_catalog_has_a_page_too(stack):
    catalog = open_store(stack).catalog()
    assert (catalog.pairs, catalog.samples, catalog.failures) == ([], [], [])
