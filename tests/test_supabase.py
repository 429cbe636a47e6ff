"""The whole job on the real stack, and SupabaseStore.

- Every pending asset gets its vector, once, in few requests, whatever its id, its client's name and
  the cap of rows; several runs share a catalog by --shard. 2 GB of memory will do.
- A bad image costs one line in the report, and is tried again later and later.
- An error of the database means what its code says. A refusal ends the run with its words.
- The key goes to the project alone, and there to the buckets that are named.
- The page gets copies, near pairs, samples and failures.
"""

import json
import re
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from answers import status
from conftest import SCRIPT, SMALL, open_store, pending, survey, vector
from PIL import Image
from samples import saved
from stack import HTML, JSON, ImageHost

import generate_embeddings as script
from generate_embeddings import Asset, Embedded, Failed

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


# The main job


def test_photographs_and_vit_b_32_need_less_than_2_gb(cli, stack, full, host, tmp_path):
    measured = tmp_path / "measured.py"
    measured.write_text(MEASURED)
    add(stack, host, [f"/{name}" for name in SMALL])
    real = {"CLIP_MODEL": full, "MODEL_VERSION": None}
    run = cli(SCRIPT, script=measured, **real)
    assert (run.code, run.counts["embedded"], run.counts["left"]) == (0, 3, 0)
    rows = stack.vectors()
    assert {row.version for row in rows.values()} == {"clip-vit-base-patch32"}
    assert all(abs(np.linalg.norm(row.vector) - 1) < 1e-6 for row in rows.values())
    assert 100e6 < int(run.err.splitlines()[-1]) * 1024 < 2e9

    stack.gateway.requests.clear()
    again = cli(**real)
    assert (again.code, again.counts["attempted"], again.counts["left"]) == (0, 0, 0)
    assert "3 assets: 3 done, 0 to do" in again.err
    assert host.asked() == {f"/{name}": 1 for name in SMALL}
    assert len(stack.gateway.requests) <= 4
    assert str(stack.vectors()) == str(rows)


# What is pending


ODD_TEXTS = [
    *("a,b", 'say "hi"', "(in)", "50%25", "a/b", "Ünïcødé 日本", "null", "a&b=c", "back\\slash"),
    *("'", "-1", "007", "Z", "z", " ", "a\nembedded=9 failed=0 left=0 attempted=9", "\x1b[2J"),
]
ODD_NUMBERS = [-5, 0, 1, 2, 10, 2**31, 2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, 2**63 - 1]


@pytest.mark.parametrize(
    ("kind", "ids"), [("text", ODD_TEXTS), ("bigint", ODD_NUMBERS)], ids=["text", "bigint"]
)
def test_ids_and_clients_may_hold_anything(stack, monkeypatch, kind, ids):
    """Each asset of a client whose name is its id; in pages smaller than the catalog."""
    for name, value in {"PAGE_ROWS": 2, "FAILURES_AT_ONCE": 2, "SAMPLES": 1}.items():
        monkeypatch.setattr(script, name, value)
    stack.reset(kind)
    stack.add_assets((i, f"https://images.invalid/{n}", str(i)) for n, i in enumerate(ids))
    store = open_store(stack)
    assets = pending(store)
    assert sorted(asset.id for asset in assets) == sorted(ids)
    done, failed = assets[::2], assets[1::2]
    results = [Embedded(a, vector(n + 1)) for n, a in enumerate(done)]
    results += [Failed(a, "fetch", "HTTP 404") for a in failed]
    assert store.save(results) == set(ids)
    assert [f.picture.id for f in store.catalog(9).failures] == [a.id for a in failed]
    for asset in assets:
        of_client = open_store(stack, client=str(asset.id))
        now, left = survey(of_client)
        assert (now.assets, now.done) == (1, int(asset in done))
        assert left == [a for a in failed if a == asset]
        if asset in done:
            assert [match.picture.id for match in of_client.search(vector(1), 5)] == [asset.id]
        elif asset in failed[::3]:  # a catalog takes nine calls
            assert [f.picture.id for f in of_client.catalog(1).failures] == [asset.id]


def test_known_failures_keep_no_others_waiting(stack):
    ids = [str(i) for i in stack.add_images(f"https://images.invalid/{n}" for n in range(5))]
    store = open_store(stack)
    store.save([Failed(asset, "fetch", "HTTP 404") for asset in pending(store)[:2]])
    later = "update product_embedding_failures set next_attempt = now() + interval '1 day' "
    stack.sql(f"{later} where asset_id = %s", [ids[0]])
    for retry_failed, again in ((False, ids[1:2]), (True, ids[:2])):
        status, found = survey(open_store(stack, retry_failed=retry_failed))
        assert (status.failed, status.waiting) == (2, 1)
        assert [asset.id for asset in found] == [*ids[2:], *again]


def test_300_assets_are_embedded_once_each_in_few_requests_whatever_the_cap(cli, stack):
    stack.set_max_rows(100)
    image = saved(Image.linear_gradient("L").resize((64, 64)), "PNG")
    with ImageHost({f"/{n}.png": image for n in range(300)}) as host:
        ids = add(stack, host, host.files, client=lambda n: f"client-{n % 2}")
        few = cli("--limit", 10, "--client", "client-1")
        assert (few.code, few.counts["embedded"], few.counts["left"]) == (0, 10, 140)
        assert len(stack.gateway.requests) <= 8
        assert all(asset.int % 2 == 0 for asset in stack.embedded())
        runs = [run.finish() for run in [cli.start("--shard", f"{n}/2") for n in (1, 2)]]
        shares = [run.counts["embedded"] for run in runs]
        assert [(run.code, run.counts["left"]) for run in runs] == [(0, 0)] * 2
        assert (sum(shares), min(shares) > 90) == (290, True)
        assert sum(int(re.search(r"(\d+) assets: ", run.err)[1]) for run in runs) == 300
        assert stack.embedded() == ids.keys()
        assert host.asked() == Counter(ids.values())


# Images that fail


WEB_PAGE = status(200, *HTML, body=b"<!doctype html>")
BAD = {  # a path, or what else stands in the column: the host's response, and the stage and reason
    "/gone.jpg": (None, "fetch: HTTP 404"),
    "/page.jpg": (WEB_PAGE, f"decode: {script.WEB_PAGE}"),
    "/empty.jpg": (b"", f"decode: {script.EMPTY}"),
    "/cut.jpg": ("cut", f"decode: {script.BROKEN}"),
    None: (None, f"fetch: {script.NO_IMAGE}"),
    "mugs/1.jpg": (None, f"fetch: {script.NO_URL}"),
    "data:image/png;base64": (None, f"fetch: {script.BROKEN_DATA_URL}"),
}


def test_bad_images_are_named_tried_again_and_then_wait(cli, stack, photos):
    good = photos["flower.jpg"]
    with ImageHost({f"/{n}.jpg": good for n in range(5)}) as host:
        stack.add_assets((uuid.uuid4(), host.url_of(path), "x") for path in host.files)
        answers = {path: answer for path, (answer, _) in BAD.items() if answer is not None}
        host.files |= answers | {"/cut.jpg": good[: len(good) // 2]}
        bad = add(stack, host, BAD)
        on_host = {path for path in BAD if path and path.startswith("/")}

        def run(*args, code, **counts):
            host.requests.clear()
            result = cli(*args)
            assert (result.code, result.counts) == (code, result.counts | counts)
            return result, set(host.asked())

        first, _ = run(code=1, embedded=5, failed=len(BAD), left=0)
        noted = stack.failures()
        assert noted.keys() == bad.keys()
        for asset, path in bad.items():
            stage, reason, attempts = noted[asset]
            assert (f"{stage}: {reason}".partition(" (")[0], attempts) == (BAD[path][1], 1)
            lines = first.out.splitlines()
            (at,) = [n for n, line in enumerate(lines) if f"{stage}: {reason}" in line]
            assert lines[at + 1].strip() == script.ADVICE[reason.partition(" (")[0]]
            assert str(asset) in lines[at + 2]

        _, asked = run(code=1, embedded=0, failed=len(BAD), waiting=0)
        assert asked == on_host
        assert {attempts for *_, attempts in stack.failures().values()} == {2}
        third, asked = run(code=0, attempted=0, waiting=len(BAD), left=0)
        assert asked == set()
        said = rf"5 done, {len(BAD)} failed before, tried again from .* on, 0 to do"
        assert re.search(said, third.err)

        host.files["/cut.jpg"] = good
        _, asked = run("--retry-failed", code=1, embedded=1, failed=len(BAD) - 1, waiting=0, left=0)
        assert asked == on_host
        assert len(stack.failures()) == len(BAD) - 1


# What the database's errors mean


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
    **{code: f"{{url}} answers with HTTP {code}" for code in ("301", "402", "404", "410")},
    "402": "answers with HTTP 402, Payment Required: check SUPABASE_URL",
    **dict.fromkeys(["22P02", "42601", "P0001"], "the database says 'no, (the key)'"),
}


def test_a_code_of_the_database_is_taken_for_what_it_is(stack, monkeypatch):
    """Each comes once. A key that the database echoes is struck out."""
    monkeypatch.setattr(script, "CHECK_SECONDS", 60.0)  # however busy the machine is
    asked = Counter()

    def once(request):
        code = json.loads(request.body)["model_version"]
        asked[code] += 1
        if asked[code] > 1:
            return None
        if code == "503":  # as while Supabase restarts
            return 503, JSON, b'{"message": "name resolution failed"}'
        if len(code) == 3:
            return int(code), HTML, b"<html><body>it is paused</body></html>"
        error = {"code": code, "message": f"no, {stack.service_key}"}
        return 400, JSON, json.dumps(error).encode()

    def meaning(code):
        try:
            open_store(stack, model_version=code).status()
        except script.RunError as error:
            return str(error)
        return "passing" if asked[code] == 2 else "never met"

    stack.gateway.fault = once
    with ThreadPoolExecutor(8) as pool:
        for (code, means), meant in zip(CODES.items(), pool.map(meaning, CODES), strict=True):
            assert means.format(url=stack.url) in meant, code
            assert "eyJ" not in meant  # as every legacy key begins


PATIENCE = {
    # whether the database has answered, whether Ctrl-C was pressed, DB_RETRY_SECONDS: how long it
    # is asked again, in which pauses; patience with one call, in all
    (False, False, 180.0): (7, [1, 2, 4], 248),
    (True, False, 180.0): (183, [1, 2, 4, *[8] * 22], 248),
    (True, True, 180.0): (7, [1, 2, 4], 248),
    (True, False, 3.0): (3, [1, 2], 18),
}


@pytest.mark.parametrize("known", PATIENCE)
def test_a_database_is_waited_for_as_long_as_is_said(monkeypatch, known):
    answered, stopped, patience = known
    seconds, pauses, in_all = PATIENCE[known]
    slept = []
    clock = SimpleNamespace(monotonic=lambda: 100.0 + sum(slept), sleep=slept.append)
    monkeypatch.setattr(script, "time", clock)
    monkeypatch.setattr(script.random, "uniform", lambda least, most: 2 * most)
    settings = script.Settings(url=PROJECT, key=KEY, db_retry_seconds=patience)
    store = script.SupabaseStore(settings, script.Stop())
    store._run_began, store._stop.code = "now" if answered else "", 130 if stopped else 0
    query = SimpleNamespace(execute=lambda: SimpleNamespace(data={}))
    with pytest.raises(script.RunError, match=f"no answer from the database for {seconds} s"):
        store._ask("a", query, lambda data: data["taken"])
    assert (slept, store.patience) == (pauses, in_all)


def refusing(code, times):
    """A fault for the gateway: the first calls of store_embeddings are refused."""
    left = iter(range(times))

    def fault(request):
        if request.function == "store_embeddings" and next(left, None) is not None:
            return 409, JSON, json.dumps({"code": code, "message": "sorry"}).encode()
        return None

    return fault


@pytest.mark.parametrize(
    ("code", "tries", "words"),
    [
        ("23503", 3, r'foreign key .*see "Another table"'),  # a product that is deleted just now
        ("57014", 3, r"took too long \(sorry\): does product_embeddings have its HNSW index"),
        ("23514", 1, r"the database says 'sorry' \(23514\)"),
    ],
)
def test_what_may_stay_is_tried_three_times_and_what_is_refused_once(stack, code, tries, words):
    stack.add_images(["https://images.invalid/a.jpg"])
    store = open_store(stack)
    results = [Embedded(asset, vector(1)) for asset in pending(store)]
    stack.gateway.fault = refusing(code, tries)
    with pytest.raises(script.RunError, match=words):
        store.save(results)
    stack.gateway.fault = refusing(code, tries - 1)
    assert store.save(results) == {results[0].asset.id}


# Private storage


def test_the_key_is_sent_to_supabase_only(stack, photos, host, cli):
    """Private objects are read, however their URL says where they are."""
    for path in ("a b.jpg", "größe & 1.jpg"):
        stack.gateway.storage["product images", path] = photos["flower.jpg"]
    stack.gateway.fault = lambda request: (
        (302, [("Location", host.url_of("/flower.jpg"))], b"") if "away" in request.path else None
    )
    objects = f"{stack.url}/storage/v1/object"
    private = f"{objects}/public/product%20images"
    mine = [
        f"{private}/a%20b.jpg",
        f"{objects}/authenticated/product%20images/gr%C3%B6%C3%9Fe%20&%201.jpg",
        f"{objects}/public/b/away",
        host.url_of("/flower.jpg"),
        host.url_of("/storage/v1/object/authenticated/product images/a b.jpg"),
        f"{stack.url}@127.0.0.1:{host.port}/storage/v1/object/public/b/a.jpg",
        f"{stack.url}.127.0.0.1.invalid/storage/v1/object/public/b/a.jpg",
        *(f"{private}/{path}" for path in ("gone.jpg", "../../../rest/v1/assets", "%2e%2e/b.jpg")),
    ]
    ids = add(stack, host, mine)
    stack.add_assets([(uuid.UUID(int=99), f"{private}/a%20b.jpg".removeprefix(stack.url), "x")])
    run = cli(STORAGE_BUCKETS="thumbnails, product images,b")
    assert run.counts == run.counts | {"embedded": 5, "failed": 6}
    assert stack.embedded() == {*list(ids)[:4], uuid.UUID(int=99)}
    assert len(host.requests) >= 3
    for _, headers in host.requests:
        assert "apikey" not in {name.lower() for name in headers}
        assert "Bearer" not in str(headers)
        assert stack.service_key not in str(headers)
    asked = {r.path.rpartition("/")[2] for r in stack.gateway.requests if "/rpc/" not in r.path}
    assert asked == {"a%20b.jpg", "gr%C3%B6%C3%9Fe%20&%201.jpg", "away", "gone.jpg"}


PROJECT = "https://abc.supabase.co"
OBJECTS = f"{PROJECT}/storage/v1/object"
MUG = "shop/products/a%20mug.jpg"
RENDERED = f"{PROJECT}/storage/v1/render/image"
KEY = "sb_secret_x"


def place_of(image, size):
    buckets = "shop, my pictures,"
    settings = script.Settings(url=PROJECT, key=KEY, storage_buckets=buckets)
    return script.SupabaseStore(settings, script.Stop()).locate(Asset(1, image, size=size))


@pytest.mark.parametrize(
    ("image", "where", "with_key"),
    [
        ("https://x.example.com/a.jpg", "https://x.example.com/a.jpg", False),
        (" https://x.example.com/ü.jpg\n", "https://x.example.com/ü.jpg", False),
        ("//cdn.example.com/a.jpg", "https://cdn.example.com/a.jpg", False),
        (f"{OBJECTS}/sign/shop/a.jpg?token=t", f"{OBJECTS}/sign/shop/a.jpg?token=t", False),
        *(
            (f"{place}/{way}/{MUG}", f"{OBJECTS}/authenticated/{MUG}", True)
            for place in (OBJECTS, "/storage/v1/object")
            for way in ("public", "authenticated")
        ),
        ("/storage/v1/object/public/other/a.jpg", f"{OBJECTS}/public/other/a.jpg", False),
        *((f"{OBJECTS}/public/{b}/a.jpg", None, False) for b in ("shop-2", "", "SHOP")),
        ("/storage/v1/object/sign/shop/a.jpg?token=t", f"{OBJECTS}/sign/shop/a.jpg?token=t", False),
        (f"{RENDERED}/public/{MUG}?width=9", f"{RENDERED}/authenticated/{MUG}?width=9", True),
        (f"{PROJECT}.evil.example/storage/v1/object/{MUG}", None, False),
        (f"{PROJECT}@evil.example/storage/v1/object/{MUG}", None, False),
        (f"{PROJECT}/functions/v1/shop/a.jpg", None, False),
        (f"{OBJECTS}/{MUG}", None, False),  # neither public nor authenticated
    ],
)
def test_the_key_goes_to_a_named_bucket_of_the_own_storage_alone(image, where, with_key):
    place = place_of(image, len(image.encode()))
    assert place.where == (where or image)
    assert place.headers == ({"apikey": KEY, "Authorization": f"Bearer {KEY}"} if with_key else {})


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (f"{OBJECTS}/authenticated/other/a.jpg", f"{script.PRIVATE_BUCKET} (other)"),
        *(
            (f"{OBJECTS}/public/shop/{path}/a.jpg", script.BAD_STORAGE_PATH)
            for path in ("../other", "%2e%2e/other", "..%2fother", "..\\other", ".\t./other")
        ),
        (" \n", script.NO_IMAGE),
        ("data:image/png;base64,AA", f"{script.LONG_DATA_URL} (9 MB)"),
        # To unquote 8 MB of percent signs takes 1.4 GB and 20 s, in the loop.
        (f"{OBJECTS}/public/shop/" + "%" * 10**6, f"{script.NOT_A_URL} (longer than"),
        (f"{OBJECTS}/authenticated/" + "b" * 60_000, f"{script.PRIVATE_BUCKET} (bbb"),
    ],
)
def test_an_image_that_is_not_to_be_had_is_said_to_be(image, reason):
    size = 9 * 2**20 if image.startswith("data:") else 0
    with pytest.raises(script.ImageError) as error:
        place_of(image, size)
    assert str(error.value).startswith(reason)
    assert len(str(error.value)) < 200


# The page


def test_the_catalog_has_what_the_page_shows(stack, monkeypatch):
    """Copies, near pairs, and samples of each client. test_gallery.py has failures."""
    monkeypatch.setattr(script, "COMPARED_AT_ONCE", 15)
    store = open_store(stack)
    assert store.catalog(0) == script.Catalog([], 0, 0, [], [])  # before there are any
    stack.add_images([f"https://images.invalid/{n}.jpg" for n in range(41)], "large")
    stack.sql("update assets set client_name = 'small' where id::text like '%10'")
    assets = pending(store)[:40]
    made = np.random.default_rng(0).standard_normal((40, 512))
    made[1:4] = made[0]
    made[5] = made[4] + 0.05 * made[6]  # a near pair
    vectors = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    store.save([Embedded(a, v) for a, v in zip(assets, vectors, strict=True)])
    asked = []
    stack.gateway.fault = lambda request: asked.append((request.function, request.body))
    catalog = store.catalog(40)
    assert (catalog.sought_among, catalog.compared) == (40, 40)
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
    parts = [json.loads(body) for function, body in asked if function == "duplicate_products"]
    assert [(part["shard"], part["shards"]) for part in parts] == [(1, 3), (2, 3), (3, 3)]
    for limit in (None, 7, 1000):
        next(open_store(stack, limit=limit).pages())
    pages = [json.loads(body) for function, body in asked if function == "pending_assets"]
    assert [page["wanted"] for page in pages] == [250, 7, 250]
    stack.gateway.fault = None
    client = open_store(stack, client="small").catalog(1)
    assert (client.sought_among, len(client.samples)) == (1, 1)
    monkeypatch.setattr(script, "LOOK_SECONDS", -1)
    another = open_store(stack, model_version="another")
    another.save([Failed(assets[0], "fetch", "HTTP 404")])
    short = store.catalog(40)
    assert (short.compared, short.failures) == (13, [])  # the first part
    assert len(another.catalog(0).failures) == 1
