"""What schema.sql's functions promise, asked through PostgREST as the script and an app do.

- Status and pages count and walk exactly what is pending, by client and shard, whatever the cap
  on the rows of an answer.
- A result is taken for the image it is of, and for no other. A failure rests longer each time.
- The search finds what brute force finds, by the index, for each client.
"""

import itertools
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import psycopg
import pytest
from conftest import renew, wait_until
from database import EMBEDDING, ONES, VERSION, Api, batch, failures, fill, rows, text, unit, user

FAIL = """insert into product_embedding_failures
    (asset_id, model_version, image_hash, stage, reason, next_attempt, updated_at)
    select id, %s, embedding_image_hash(image), '', '', now() + %s, now() - interval '1 day'
    from embedding_sources() where id = %s"""
HOUR = timedelta(hours=1)

# What there is, and what is pending


def test_the_status_of_an_empty_catalog(api):
    status = api.status()
    assert abs(time.time() - datetime.fromisoformat(status.pop("time")).timestamp()) < 60
    counts = dict.fromkeys(("assets", "done", "failed", "waiting"), 0)
    assert status == {"contract": 3, "next_attempt": None, "clients": None} | counts
    assert api.pending() == {"assets": [], "last": None}
    assert api.status(client="nobody")["clients"] == []


NEW = ("new", "other image", "older vector", "older failure")


@pytest.fixture(scope="module")
def mixture(_stack):
    """300 assets of two clients in every state. One with a vector and a failure is done: two runs
    may store at the same moment."""
    renew(_stack)
    ids = [str(uuid.UUID(int=n)) for n in range(300)]
    kinds = ("done", "both", "due", "waiting", *NEW)
    _stack.add_assets((i, f"https://images.invalid/{i}", f"c{n % 2}") for n, i in enumerate(ids))
    states = dict(zip(ids, np.random.default_rng(0).choice(kinds, 300), strict=True))
    for asset, state in states.items():
        version = "older" if "older" in state else VERSION
        if state in ("done", "older vector", "other image", "both"):
            _stack.sql(EMBEDDING, [ONES, version, asset])
        if state in ("due", "waiting", "older failure", "other image", "both"):
            rest = HOUR if state == "waiting" else -HOUR
            _stack.sql(FAIL, [version, rest, asset])
        if state == "other image":
            _stack.sql("update assets set image_url = image_url || '?2' where id = %s", [asset])
    clients = {i: f"c{n % 2}" for n, i in enumerate(ids)}
    api = Api(_stack, _stack.service_key)
    return SimpleNamespace(api=api, ids=ids, states=states, clients=clients)


WALKS = [
    ({}, NEW),
    ({"failed_before": "now"}, ("due",)),
    ({"failed_before": "now", "waiting_too": True}, ("due", "waiting")),
    ({"failed_before": "-infinity", "waiting_too": True}, ()),
]


@pytest.mark.parametrize(("walk", "states"), WALKS)
def test_a_walk_comes_by_what_is_pending_in_the_order_of_ids(mixture, walk, states):
    for wanted, client in ((7, None), (250, None), (7, "c1")):
        got = [a["id"] for a in mixture.api.walk(client=client, wanted=wanted, **walk)]
        there = [i for i in mixture.ids if client in (None, mixture.clients[i])]
        assert got == [i for i in there if mixture.states[i] in states]


@pytest.mark.parametrize("client", [None, "c1", "nobody"])
def test_the_status_counts_exactly(mixture, client):
    states = [mixture.states[i] for i in mixture.ids if client in (None, mixture.clients[i])]
    status = mixture.api.status(client=client)
    done = states.count("done") + states.count("both")
    assert (status["assets"], status["done"]) == (len(states), done)
    waiting = states.count("waiting")
    assert (status["failed"], status["waiting"]) == (states.count("due") + waiting, waiting)
    if client == "nobody":
        assert sorted(status["clients"]) == ["c0", "c1"]
        assert status["next_attempt"] is None
    else:
        assert status["clients"] is None
        assert datetime.fromisoformat(status["next_attempt"]) > datetime.now(UTC)


def test_the_view_shows_the_failures_that_hold(mixture):
    shown = [row["asset_id"] for row in mixture.api("GET", "embedding_failures").json()]
    holding = ("due", "waiting", "older failure")
    assert sorted(shown) == [i for i in mixture.ids if mixture.states[i] in holding]


def test_shards_partition_the_catalog(mixture):
    parts = [mixture.api.status(shard=shard, shards=4) for shard in range(1, 5)]
    whole = mixture.api.status()
    for count in ("assets", "done", "failed", "waiting"):
        assert sum(part[count] for part in parts) == whole[count]
    assert min(part["assets"] for part in parts) > 40
    none = mixture.api.status(client="c1", shard=9, shards=10**6)
    assert (none["assets"], none["clients"]) == (0, None)  # the client is known nevertheless
    for walk, states in WALKS[:2]:
        got = [
            a["id"]
            for shard in range(1, 5)
            for a in mixture.api.walk(shard=shard, shards=4, wanted=7, **walk)
        ]
        assert sorted(got) == [i for i in mixture.ids if mixture.states[i] in states]


def test_a_page_says_what_an_image_is(stack, api):
    missing, there = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
    stack.add_assets([(missing, None, None), (there, "Größe.jpg", None)])
    query = "select hashtextextended(u, 0) from unnest(%s::text[]) u"
    hashes = [found for (found,) in stack.sql(query, [["", "Größe.jpg"]])]
    assert api.pending()["assets"] == [
        {"id": missing, "image": None, "image_hash": hashes[0], "bytes": 0, "title": None},
        {"id": there, "image": "Größe.jpg", "image_hash": hashes[1], "bytes": 11, "title": None},
    ]
    assert api.store([], api.pending()["assets"]) == [missing, there]


def test_a_page_is_bounded_by_its_bytes_and_a_larger_image_comes_cut(stack, api):
    ids = fill(stack, 6)
    stack.sql("update assets set image_url = 'data:' || repeat('x', 2999995)")
    large = "update assets set image_url = 'data:' || repeat('x', 9000000) where id = %s"
    stack.sql(large, [ids[3]])
    first = api.pending()
    assert ([a["id"] for a in first["assets"]], first["last"]) == (ids[:2], ids[1])
    assets = api.walk()
    assert [a["id"] for a in assets] == ids
    assert (assets[3]["bytes"], len(assets[3]["image"])) == (9000005, 100)
    assert api.store([], assets[3:4]) == [ids[3]]
    stack.sql("update assets set client_name = repeat('x', 9000000) where id = %s", [ids[3]])
    (shown,) = api("GET", "embedding_failures").json()
    assert (len(shown["image"]), len(shown["client"])) == (2000, 2000)


# Storing


def test_what_is_stored_is_there_and_what_failed_is_noted(stack, api):
    ids = fill(stack, 3)
    one, two, three = api.pending()["assets"]
    assert api.store([one, two], [three]) == ids
    assert rows(stack, "asset_id::text, embedding::text, model_version") == [
        (i, ONES.replace(" ", ""), VERSION) for i in ids[:2]
    ]
    assert rows(stack, "embedded_image_hash") == [(a["image_hash"],) for a in (one, two)]
    columns = "asset_id::text, model_version, image_hash, stage, reason, attempts"
    noted = (ids[2], VERSION, three["image_hash"], "fetch", "HTTP 404", 1)
    assert failures(stack, columns) == [noted]
    (shown,) = api("GET", "embedding_failures").json()
    assert (shown["client"], shown["image"]) == ("x", three["image"])
    assert api.store() == []


RESTS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 720, 720]  # hours after each failure


def test_a_failure_rests_longer_each_time(stack, api):
    fill(stack, 1)
    assets = api.pending()["assets"]
    for attempt, hours in enumerate(RESTS, 1):
        api.store([], assets)
        rest = "attempts, extract(epoch from next_attempt - updated_at)::int / 3600"
        assert failures(stack, rest) == [(attempt, hours)]
        now = api.status()
        assert (now["failed"], now["waiting"]) == (1, 1 if hours else 0)
    stack.sql("update product_embedding_failures set attempts = 2000000000")
    api.store([], assets)
    api.store([], assets, version="newer")
    assert failures(stack, rest) == [(1, 0)]


def test_a_success_clears_the_failure_and_a_failure_keeps_the_vector(stack, api):
    (asset,) = fill(stack, 1)
    assets = api.pending()["assets"]
    api.store([], assets)
    api.store(assets, version="older")
    ((created, updated),) = rows(stack, "created_at, updated_at")
    assert failures(stack) == []
    api.store(assets)  # in the place of the older one
    ((version, created_now, updated_now),) = rows(stack, "model_version, created_at, updated_at")
    assert (version, created_now, updated_now > updated) == (VERSION, created, True)
    assert api.store([], assets) == []  # of another run, which was slower
    assert failures(stack) == []
    assert api.store([], assets, version="newer") == [asset]
    assert (len(rows(stack)), len(failures(stack))) == (1, 1)


def test_a_result_is_of_one_image(stack, api):
    """When it changes, the product is pending, and is found by the old one until then. What is
    known of the old one counts again if that comes back."""
    one, two = fill(stack, 2)
    first = api.pending()["assets"]
    api.store(first[:1], first[1:])
    stack.sql("update assets set image_url = image_url || '?new'")
    pending = api.pending()["assets"]
    assert [a["id"] for a in pending] == [one, two]
    status = api.status()
    assert (status["done"], status["failed"]) == (0, 0)
    assert api("GET", "embedding_failures").json() == []
    assert [m["asset_id"] for m in api.call("match_products", query_embedding=ONES)] == [one]
    assert api.store(first[:1], first[1:]) == []
    assert api.store([], pending) == [one, two]
    assert failures(stack, "attempts") == [(1,), (1,)]
    stack.sql("update assets set image_url = replace(image_url, '?new', '')")
    status = api.status()
    assert (status["done"], status["failed"]) == (1, 0)
    assert [a["id"] for a in api.pending()["assets"]] == [two]


def test_an_asset_that_is_deleted_in_this_moment_breaks_the_key(stack, api, other):
    """The script then makes the call again."""
    ids = fill(stack, 2)
    assets = api.pending()["assets"]
    other.execute("delete from assets where id = %s", [ids[0]])
    waiting = "select 1 from pg_stat_activity where wait_event_type = 'Lock'"
    with ThreadPoolExecutor() as pool:
        call = pool.submit(api, "POST", "rpc/store_embeddings", batch(assets))
        wait_until(lambda: stack.sql(waiting))
        other.commit()
        assert call.result().json()["code"] == "23503"
    assert rows(stack) == []
    assert api.store(assets) == ids[1:]


@pytest.mark.parametrize("vector", ["[1, 2]", None, "[NaN" + ", 1" * 511 + "]"])
def test_a_batch_that_the_database_refuses_is_stored_not_at_all(stack, api, vector):
    fill(stack, 3)
    one, two, failed = api.pending()["assets"]
    given = batch([one, two | {"embedding": vector}], [failed])
    assert api("POST", "rpc/store_embeddings", given).status_code == 400
    assert rows(stack) == failures(stack) == []


def test_an_app_user_without_rights_here_may_edit_and_delete_assets(stack, api):
    fill(stack, 2)
    one, two = api.pending()["assets"]
    api.store([one], [two])
    stack.sql("grant all on assets to authenticated")
    me = user(stack)
    both = f"assets?id=in.({one['id']},{two['id']})"
    assert me("PATCH", both, {"image_url": "new"}).status_code == 204
    assert (len(rows(stack)), len(failures(stack))) == (1, 1)
    assert me("DELETE", both).status_code == 204
    assert (rows(stack), failures(stack)) == ([], [])


# Search


@pytest.fixture(scope="module")
def gallery(_stack):
    """22 assets of three clients, with vectors that have cosines of 0.9 or so."""
    renew(_stack)
    random = np.random.default_rng(0).standard_normal((23, 512))
    vectors = [text(vector) for vector in unit(random[1:] + 3 * random[0])]
    ids = [str(uuid.UUID(int=n)) for n in np.random.default_rng(0).permutation(22)]
    clients = [f"client-{n % 3}" for n in range(22)]
    urls = [f"https://images.invalid/{n}" for n in range(22)]
    _stack.add_assets(zip(ids, urls, clients, strict=True))
    for i, vector in zip(ids, vectors, strict=True):
        _stack.sql(EMBEDDING, [vector, VERSION, i])
    vectors = np.array([json.loads(vector) for vector in vectors])
    made = {"ids": ids, "vectors": vectors, "clients": np.array(clients), "urls": urls}
    return SimpleNamespace(api=Api(_stack, _stack.service_key), **made)


def nearest(gallery, vector, among, count):
    """The same question by brute force: ids and cosines; `among` is a mask."""
    cosines = np.where(among, gallery.vectors @ vector, -1)
    order = np.argsort(-cosines)[:count]
    return [gallery.ids[n] for n in order], cosines[order]


@pytest.mark.parametrize("of_client", [False, True])
def test_similar_products_are_the_nearest_others(gallery, of_client):
    for at, asset in enumerate(gallery.ids[:9]):
        mine = gallery.clients[at]
        more = {"client": mine} if of_client else {}
        got = gallery.api.call("similar_products", asset_id=asset, match_count=4, **more)
        among = gallery.clients == mine if of_client else np.ones(22, bool)
        among[at] = False
        ids, cosines = nearest(gallery, gallery.vectors[at], among, 4)
        assert [row["asset_id"] for row in got] == ids
        assert np.abs(np.array([row["similarity"] for row in got]) - cosines).max() < 1e-5
    below = got[0]["similarity"] - 1e-6  # copies may be left out
    others = gallery.api.call("similar_products", asset_id=asset, max_similarity=below, **more)
    assert [row["asset_id"] for row in others][:3] == ids[1:]
    assert gallery.api.call("similar_products", asset_id=str(uuid.uuid4())) == []


def test_match_products_finds_all_that_is_known_of_the_nearest(gallery):
    question = {"query_embedding": text(gallery.vectors[3])}
    got = gallery.api.call("match_products", **question)
    assert len(got) == 10
    assert abs(got[0].pop("similarity") - 1) < 1e-5
    known = {"asset_id": gallery.ids[3], "image": gallery.urls[3], "client": gallery.clients[3]}
    assert got[0] == known | {"title": None, "link": None}
    for client in ("client-0", "client-2", "nobody"):
        got = gallery.api.call("match_products", client=client, match_count=4, **question)
        among = gallery.clients == client
        ids, _ = nearest(gallery, gallery.vectors[3], among, min(4, among.sum()))
        assert [row["asset_id"] for row in got] == ids
    got = gallery.api.call("match_products", match_count=2**31 - 1, **question)
    similarities = [row["similarity"] for row in got]
    assert (len(got), similarities) == (len(gallery.ids), sorted(similarities, reverse=True))


@pytest.mark.parametrize("client", [None, "client-1"])
def test_duplicates_come_once_also_in_parts(gallery, client):
    order = [n for n in np.argsort(gallery.ids) if client in (None, gallery.clients[n])]
    cosines = gallery.vectors @ gallery.vectors.T
    both = [pair for pair in itertools.combinations(order, 2) if cosines[pair] >= 0.9]
    expected = {(gallery.ids[a], gallery.ids[b]) for a, b in both}
    assert expected
    question = {"min_similarity": 0.9, "client": client, "neighbours": 30}
    for parts in (1, 3):
        pairs = [
            pair
            for part in range(1, parts + 1)
            for pair in gallery.api.call("duplicate_products", shard=part, shards=parts, **question)
        ]
        assert len(pairs) == len(expected)
        assert {(p["asset_id"], p["duplicate_id"]) for p in pairs} == expected
    for pair in pairs:
        a, b = (gallery.ids.index(pair[k]) for k in ("asset_id", "duplicate_id"))
        assert (pair["image"], pair["duplicate_image"]) == (gallery.urls[a], gallery.urls[b])
        assert abs(pair["similarity"] - cosines[a, b]) < 1e-5


def test_copies_are_paired_with_the_first_of_their_kind(stack, api):
    ids = fill(stack, 6)
    assets = api.pending()["assets"]
    random = np.random.default_rng(0).standard_normal((3, 512))
    kinds = [0, 1, 0, 2, 1, 0]
    vectors = unit(random[kinds])
    vectors[5] = unit(vectors[5] * 1.01 + 1e-6 * np.sign(vectors[5]))  # saved again
    api.store([a | {"embedding": text(v)} for a, v in zip(assets, vectors, strict=True)])
    made = api.call("embedding_copies", model_version=VERSION)
    assert made["sought_among"] == 6
    found = {(p["asset_id"], p["duplicate_id"], p["same"]) for p in made["pairs"]}
    assert found == {(ids[0], ids[2], True), (ids[0], ids[5], False), (ids[1], ids[4], True)}
    assert len(made["pairs"]) == 3
    near = api.call("duplicate_products", min_similarity=0.99)
    assert {(r["asset_id"], r["duplicate_id"], r["same"]) for r in near} > found
    assert made["pairs"][0].keys() == near[0].keys()
    assert api.call("embedding_copies", model_version=VERSION, client="y")["pairs"] == []
    stack.sql("update assets set client_name = repeat('x', 9000)")
    (pair, *_) = api.call("embedding_copies", model_version=VERSION)["pairs"]
    assert (len(pair["client"]), len(pair["duplicate_client"])) == (200, 200)


@pytest.fixture(scope="module")
def crowd(_stack):
    """1,200 assets with random vectors; every 120th is of the client "rare", three of an older
    model. One connection on which plans of statements inside functions are reported."""
    renew(_stack)
    random = np.random.default_rng(0)
    vectors = unit(random.standard_normal((1200, 512)) + 2 * random.standard_normal(512))
    ids = [str(uuid.UUID(int=n)) for n in range(1200)]
    _stack.add_assets(
        (i, f"https://images.invalid/{n}", "rare" if n % 120 == 0 else "common")
        for n, i in enumerate(ids)
    )
    (index,) = _stack.sql("select pg_get_indexdef('product_embeddings_embedding_hnsw'::regclass)")
    _stack.sql("drop index product_embeddings_embedding_hnsw")  # built faster when all is there
    with psycopg.connect(_stack.db_uri, autocommit=True) as connection:
        copying = "copy product_embeddings (asset_id, embedding, model_version) from stdin"
        with connection.cursor() as cursor, cursor.copy(copying) as copy:
            for n, (i, vector) in enumerate(zip(ids, vectors, strict=True)):
                copy.write_row((i, text(vector), "older" if n in (7, 8, 9) else VERSION))
        connection.execute(*index)
        connection.execute("analyze assets, product_embeddings")
        connection.execute("load 'auto_explain'")
        connection.execute("set auto_explain.log_min_duration = 0")
        connection.execute("set auto_explain.log_nested_statements = on")
        connection.execute("set client_min_messages = log")
        plans = []
        connection.add_notice_handler(lambda notice: plans.append(notice.message_primary))
        yield SimpleNamespace(sql=connection.execute, plans=plans, ids=ids, vectors=vectors)


def test_each_search_uses_the_index(crowd):
    near = (f"match_products('{text(crowd.vectors[0])}')", f"similar_products('{crowd.ids[0]}')")
    for search in (*near, "duplicate_products(shard => 7, shards => 100)"):
        crowd.plans.clear()
        for _ in range(7):  # after five calls PostgreSQL may settle on one plan for all
            crowd.sql(f"select * from {search}")
        used = [plan for plan in crowd.plans if "order by e.embedding" in plan]
        assert len(used) >= 7
        assert all("product_embeddings_embedding_hnsw" in plan for plan in used)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("300", 300),
        ("10, client => 'rare'", 10),
        ("10, max_similarity => 0.8", 10),
        ("5, model_version => 'older'", 3),
        ("1001", 1000),
    ],
)
def test_a_long_or_narrow_search_still_finds_all_it_was_asked_for(crowd, arguments, wanted):
    query = f"select asset_id from match_products(%s, {arguments})"
    assert len(crowd.sql(query, [text(crowd.vectors[0])]).fetchall()) == wanted


def test_functions_may_take_longer_than_the_apis_usual_8_seconds(stack):
    """PostgREST takes statement_timeout over from a function, before it calls it."""
    slow = "select proname from pg_proc where 'statement_timeout=55s' = any (proconfig) order by 1"
    names = "duplicate_products embedding_copies embedding_status pending_assets store_embeddings"
    assert [name for (name,) in stack.sql(slow)] == names.split()
