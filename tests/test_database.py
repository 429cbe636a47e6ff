"""What schema.sql's functions promise, asked through PostgREST as the script and an app do.

- Status and pages count and walk exactly what is pending, by client and shard, whatever the cap
  on the rows of an answer.
- A result is taken for the image it is of, and for no other. A failure rests longer each time.
- The search finds what brute force finds, by the index, for each client.
"""

import io
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
from PIL import Image

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


@pytest.fixture(scope="module")
def mixture(_stack):
    """300 assets of two clients in every state: id -> (client, state)."""
    renew(_stack)
    ids = [str(uuid.UUID(int=n)) for n in range(300)]
    kinds = ("new", "done", "due", "waiting", "other image", "older vector", "older failure")
    _stack.add_assets((i, f"https://images.invalid/{i}", f"c{n % 2}") for n, i in enumerate(ids))
    states = dict(zip(ids, np.random.default_rng(0).choice(kinds, 300), strict=True))
    for asset, state in states.items():
        version = "older" if "older" in state else VERSION
        if state in ("done", "older vector", "other image"):
            _stack.sql(EMBEDDING, [ONES, version, asset])
        if state in ("due", "waiting", "older failure", "other image"):
            rest = HOUR if state == "waiting" else -HOUR
            _stack.sql(FAIL, [version, rest, asset])
        if state == "other image":
            _stack.sql("update assets set image_url = image_url || '?2' where id = %s", [asset])
    return SimpleNamespace(
        api=Api(_stack, _stack.service_key),
        ids=ids,
        states=states,
        clients={i: f"c{n % 2}" for n, i in enumerate(ids)},
    )


NEW = ("new", "other image", "older vector", "older failure")
WALKS = [
    ({}, NEW),
    ({"failed_before": "now"}, ("due",)),
    ({"failed_before": "now", "waiting_too": True}, ("due", "waiting")),
    ({"failed_before": "-infinity", "waiting_too": True}, ()),
]


@pytest.mark.parametrize("client", [None, "c1"])
@pytest.mark.parametrize(("walk", "states"), WALKS)
def test_a_walk_comes_by_what_is_pending_in_the_order_of_ids(mixture, client, walk, states):
    for wanted in (7, 250):
        got = [a["id"] for a in mixture.api.walk(client=client, wanted=wanted, **walk)]
        assert got == [
            i
            for i in mixture.ids
            if mixture.states[i] in states and client in (None, mixture.clients[i])
        ]


@pytest.mark.parametrize("client", [None, "c1", "nobody"])
def test_the_status_counts_exactly(mixture, client):
    states = [mixture.states[i] for i in mixture.ids if client in (None, mixture.clients[i])]
    status = mixture.api.status(client=client)
    assert (status["assets"], status["done"]) == (len(states), states.count("done"))
    waiting = states.count("waiting")
    assert (status["failed"], status["waiting"]) == (states.count("due") + waiting, waiting)
    if client == "nobody":
        assert sorted(status["clients"]) == ["c0", "c1"]
        assert status["next_attempt"] is None
    else:
        assert status["clients"] is None
        assert datetime.fromisoformat(status["next_attempt"]) > datetime.now(UTC)


def test_shards_partition_the_catalog(mixture):
    parts = [mixture.api.status(shard=shard, shards=4) for shard in range(1, 5)]
    whole = mixture.api.status()
    for count in ("assets", "done", "failed", "waiting"):
        assert sum(part[count] for part in parts) == whole[count]
    assert min(part["assets"] for part in parts) > 40
    for walk, states in WALKS[:2]:
        got = [
            a["id"]
            for shard in range(1, 5)
            for a in mixture.api.walk(shard=shard, shards=4, wanted=7, **walk)
        ]
        assert sorted(got) == [i for i in mixture.ids if mixture.states[i] in states]


def test_a_client_without_assets_in_a_shard_is_known(stack, api):
    fill(stack, 1)
    shards = [api.status(client="x", shard=shard, shards=4) for shard in range(1, 5)]
    assert [status["clients"] for status in shards] == [None] * 4


def test_a_page_ends_where_there_is_no_more(stack, api):
    ids = fill(stack, 6)
    for wanted, pages in ((3, [3, 3, 0]), (4, [4, 2]), (6, [6, 0]), (7, [6])):
        got, after = [], None
        for _ in pages:
            page = api.pending(wanted=wanted, after=after)
            got.append(len(page["assets"]))
            after = page["last"]
        assert (got, after) == (pages, None)
    assert [a["id"] for a in api.pending(after=ids[3])["assets"]] == ids[4:]


def test_a_page_is_not_cut_by_the_servers_row_cap(stack, api):
    fill(stack, 1500)
    assets = api.pending(wanted=1500)["assets"]
    assert len(assets) == 1500
    assert len(api.store(assets)) == 1500


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


def test_a_page_is_bounded_by_its_bytes(stack, api):
    ids = fill(stack, 12)
    stack.sql("update assets set image_url = 'data:' || repeat('x', 999995)")
    first = api.pending()
    assert [a["id"] for a in first["assets"]] == ids[:8]
    assert first["last"] == ids[7]
    second = api.pending(after=first["last"])
    assert [a["id"] for a in second["assets"]] == ids[8:]
    assert second["last"] is None


def test_an_image_larger_than_a_page_comes_cut(stack, api):
    ids = fill(stack, 3)
    large = "update assets set image_url = 'data:' || repeat('x', 9000000) where id = %s"
    stack.sql(large, [ids[1]])
    assets = api.walk()
    assert [a["id"] for a in assets] == ids
    assert (assets[1]["bytes"], len(assets[1]["image"])) == (9000005, 100)
    assert api.store([], assets[1:2]) == [ids[1]]
    assert len(api("GET", "embedding_failures").json()[0]["image"]) == 2000


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


def test_a_vector_replaces_an_older_one_and_keeps_its_date(stack, api):
    (asset,) = fill(stack, 1)
    assets = api.pending()["assets"]
    api.store(assets, version="older")
    ((created, updated),) = rows(stack, "created_at, updated_at")
    assert api.store(assets) == [asset]
    ((version, created_now, updated_now),) = rows(stack, "model_version, created_at, updated_at")
    assert (version, created_now) == (VERSION, created)
    assert updated_now > updated


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


def test_what_failed_in_this_run_does_not_come_again_in_it(stack, api):
    fill(stack, 1)
    began = api.status()["time"]
    api.store([], api.pending()["assets"])
    assert api.walk(failed_before=began, waiting_too=True) == []
    assert len(api.walk(failed_before=api.status()["time"])) == 1


def test_a_success_clears_the_failure_and_a_failure_keeps_the_vector(stack, api):
    (asset,) = fill(stack, 1)
    assets = api.pending()["assets"]
    api.store([], assets)
    api.store(assets)
    assert failures(stack) == []
    assert api.store([], assets) == []  # of another run, which was slower
    assert failures(stack) == []
    assert api.store([], assets, version="newer") == [asset]
    assert (len(rows(stack)), len(failures(stack))) == (1, 1)


def test_a_failure_beside_a_vector_does_not_count(stack, api):
    """As when two runs store at the same moment."""
    (asset,) = fill(stack, 1)
    stack.sql(EMBEDDING, [ONES, VERSION, asset])
    stack.sql(FAIL, [VERSION, -HOUR, asset])
    status = api.status()
    assert (status["done"], status["failed"]) == (1, 0)
    assert api.walk(failed_before="now") == []
    assert api("GET", "embedding_failures").json() == []


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
    assert [m["asset_id"] for m in api.call("match_products", query_embedding=ONES)] == [one]
    assert api.store(first[:1], first[1:]) == []
    assert api.store([], pending) == [one, two]
    assert failures(stack, "attempts") == [(1,), (1,)]
    stack.sql("update assets set image_url = replace(image_url, '?new', '')")
    status = api.status()
    assert (status["done"], status["failed"]) == (1, 0)
    assert [a["id"] for a in api.pending()["assets"]] == [two]


def test_a_vector_without_a_hash_is_of_any_image(stack, api):
    """As older programs store them."""
    (asset,) = fill(stack, 1)
    assets = api.pending()["assets"]
    api.store(assets)
    stack.sql("update product_embeddings set embedded_image_hash = null")
    stack.sql("update assets set image_url = 'new'")
    assert (api.pending()["assets"], api.status()["done"]) == ([], 1)
    ((image_hash,),) = stack.sql("select embedding_image_hash('new')")
    changed = [{"id": asset, "image_hash": image_hash}]
    assert api.store([], changed) == []
    assert api.store(changed) == [asset]
    assert rows(stack, "embedded_image_hash") == [(image_hash,)]


def test_what_is_deleted_or_changed_meanwhile_is_left(stack, api):
    ids = fill(stack, 6)
    assets = api.pending()["assets"]
    stack.sql("update assets set image_url = 'new' where id = any(%s)", [[ids[0], ids[3]]])
    stack.sql("delete from assets where id = any(%s)", [[ids[1], ids[4]]])
    assert api.store(assets[:3], assets[3:]) == [ids[2], ids[5]]
    assert [a["id"] for a in api.pending()["assets"]] == [ids[0], ids[3]]


def test_nothing_waits_for_an_app_that_changes_an_image(stack, api, other):
    """What was stored for the image before is then replaced by the next run."""
    (asset,) = fill(stack, 1)
    assets = api.pending()["assets"]
    other.execute("update assets set image_url = 'new'")
    assert api.store(assets) == [asset]
    other.commit()
    (pending,) = api.pending()["assets"]
    assert pending["image"] == "new"
    assert api.store([pending]) == [asset]


def storing(stack, api, pool, assets):
    """A call of store_embeddings that has begun, and waits for a lock."""
    call = pool.submit(api, "POST", "rpc/store_embeddings", batch(assets))
    wait_until(lambda: stack.sql("select 1 from pg_stat_activity where wait_event_type = 'Lock'"))
    return call


def test_an_asset_that_is_deleted_in_this_moment_breaks_the_key(stack, api, other):
    """The script then makes the call again."""
    ids = fill(stack, 2)
    assets = api.pending()["assets"]
    other.execute("delete from assets where id = %s", [ids[0]])
    with ThreadPoolExecutor() as pool:
        call = storing(stack, api, pool, assets)
        other.commit()
        assert call.result().json()["code"] == "23503"
    assert rows(stack) == []
    assert api.store(assets) == ids[1:]


def test_two_runs_on_the_same_assets_wait_for_each_other_and_both_are_taken(stack, api, other):
    ids = fill(stack, 20)
    assets = api.pending()["assets"]
    given = batch(assets)
    other.execute("select store_embeddings(%s, %s::json)", [VERSION, json.dumps(given["vectors"])])
    with ThreadPoolExecutor() as pool:
        call = storing(stack, api, pool, assets[::-1])
        other.commit()
        assert sorted(call.result().json()["taken"]) == ids
    assert len(rows(stack)) == 20


REFUSED = {
    "a constraint": (
        "alter table product_embeddings add constraint mine check (model_version = '')",
        "23514",
    ),
    "a trigger": (
        """create function mine() returns trigger language plpgsql as $$ begin
             raise 'no space left on device' using errcode = 'disk_full'; end $$;
           create trigger mine before insert on product_embeddings
             for each row execute function mine()""",
        "53100",
    ),
    "no table": ("alter table product_embeddings rename to elsewhere", "42P01"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_batch_that_the_database_refuses_is_stored_not_at_all(stack, api, how):
    fill(stack, 3)
    *vectors, failed = api.pending()["assets"]
    change, code = REFUSED[how]
    stack.sql(change)
    answer = api("POST", "rpc/store_embeddings", batch(vectors, [failed]))
    assert answer.json()["code"] == code
    assert failures(stack) == []


@pytest.mark.parametrize("vector", ["[1, 2]", None, "[NaN" + ", 1" * 511 + "]"])
def test_a_vector_that_is_none_is_refused(stack, api, vector):
    fill(stack, 1)
    (asset,) = api.pending()["assets"]
    given = batch([asset | {"embedding": vector}])
    assert api("POST", "rpc/store_embeddings", given).status_code == 400
    assert rows(stack) == []


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
def gallery(_stack, tiny, photos):
    """The photographs, of three clients, with their vectors; two of them twice."""
    import models

    renew(_stack)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in photos.values()]
    vectors = models.reference(tiny, images)
    ids = [str(uuid.uuid4()) for _ in images]
    clients = [f"client-{n % 3}" for n in range(len(ids))]
    _stack.add_assets(
        (i, f"https://images.invalid/{n}", c) for i, n, c in zip(ids, photos, clients, strict=True)
    )
    for i, vector in zip(ids, vectors, strict=True):
        _stack.sql(EMBEDDING, [text(vector), VERSION, i])
    return SimpleNamespace(
        api=Api(_stack, _stack.service_key),
        ids=ids,
        vectors=vectors.astype(np.float64),
        clients=np.array(clients),
        urls=[f"https://images.invalid/{name}" for name in photos],
    )


def nearest(gallery, vector, among, count):
    """The same question by brute force: ids and cosines."""
    cosines = gallery.vectors @ vector
    order = [n for n in np.argsort(-cosines) if among(n)][:count]
    return [gallery.ids[n] for n in order], cosines[order]


@pytest.mark.parametrize("of_client", [False, True])
def test_similar_products_are_the_nearest_others(gallery, of_client):
    for at, asset in enumerate(gallery.ids):
        mine = gallery.clients[at]
        more = {"client": mine} if of_client else {}
        got = gallery.api.call("similar_products", asset_id=asset, match_count=4, **more)

        def among(n, at=at, mine=mine):
            return n != at and (not of_client or gallery.clients[n] == mine)

        ids, cosines = nearest(gallery, gallery.vectors[at], among, 4)
        assert [row["asset_id"] for row in got] == ids
        assert np.abs(np.array([row["similarity"] for row in got]) - cosines).max() < 1e-5
    assert gallery.api.call("similar_products", asset_id=str(uuid.uuid4())) == []


def test_similar_products_may_leave_out_copies(gallery):
    at = 3
    first, *_ = gallery.api.call("similar_products", asset_id=gallery.ids[at])
    below = first["similarity"] - 1e-6
    got = gallery.api.call(
        "similar_products", asset_id=gallery.ids[at], max_similarity=below, match_count=5
    )
    assert len(got) == 5
    assert first["asset_id"] not in [row["asset_id"] for row in got]


def test_match_products_finds_a_vector_itself_first_with_all_that_is_known_of_it(gallery):
    got = gallery.api.call("match_products", query_embedding=text(gallery.vectors[3]))
    assert len(got) == 10
    assert abs(got[0].pop("similarity") - 1) < 1e-5
    assert got[0] == {
        "asset_id": gallery.ids[3],
        "image": gallery.urls[3],
        "client": gallery.clients[3],
        "title": None,
        "link": None,
    }


def test_match_products_of_one_client(gallery):
    question = {"query_embedding": text(gallery.vectors[1]), "match_count": 4}
    for client in ("client-0", "client-2"):
        got = gallery.api.call("match_products", client=client, **question)
        ids, _ = nearest(
            gallery, gallery.vectors[1], lambda n, c=client: gallery.clients[n] == c, 4
        )
        assert [row["asset_id"] for row in got] == ids
    assert gallery.api.call("match_products", client="nobody", **question) == []


def test_more_matches_than_there_are_is_all_of_them(gallery):
    question = {"query_embedding": text(gallery.vectors[0]), "match_count": 2**31 - 1}
    got = gallery.api.call("match_products", **question)
    assert len(got) == len(gallery.ids)
    similarities = [row["similarity"] for row in got]
    assert similarities == sorted(similarities, reverse=True)


@pytest.mark.parametrize("client", [None, "client-1"])
def test_duplicates_come_once_also_in_parts(gallery, client):
    order = [n for n in np.argsort(gallery.ids) if client in (None, gallery.clients[n])]
    cosines = gallery.vectors @ gallery.vectors.T
    expected = {
        (gallery.ids[a], gallery.ids[b])
        for k, a in enumerate(order)
        for b in order[k + 1 :]
        if cosines[a, b] >= 0.9
    }
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
    found = [(p["asset_id"], p["duplicate_id"], p["same"]) for p in made["pairs"]]
    assert sorted(found) == [
        (ids[0], ids[2], True),
        (ids[0], ids[5], False),
        (ids[1], ids[4], True),
    ]
    rows_of_duplicates = api.call("duplicate_products", min_similarity=0.99)
    assert {(r["asset_id"], r["duplicate_id"], r["same"]) for r in rows_of_duplicates} > set(found)
    assert made["pairs"][0].keys() == rows_of_duplicates[0].keys()
    assert api.call("embedding_copies", model_version=VERSION, client="y")["pairs"] == []


@pytest.fixture(scope="module")
def crowd(_stack):
    """2,000 assets with random vectors; every 200th is of the client "rare", three of an older
    model. One connection on which plans of statements inside functions are reported."""
    renew(_stack)
    random = np.random.default_rng(0)
    vectors = unit(random.standard_normal((2000, 512)) + 2 * random.standard_normal(512))
    ids = [str(uuid.UUID(int=n)) for n in range(2000)]
    _stack.add_assets(
        (i, f"https://images.invalid/{n}", "rare" if n % 200 == 0 else "common")
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


SEARCHES = {
    "match_products": "select * from match_products('{vector}', 10)",
    "similar_products": "select * from similar_products('{id}', 10)",
    "duplicate_products": "select * from duplicate_products(shard => 7, shards => 1000)",
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_search_uses_the_index(crowd, name):
    crowd.plans.clear()
    for _ in range(7):  # after five calls PostgreSQL may settle on one plan for all
        crowd.sql(SEARCHES[name].format(vector=text(crowd.vectors[0]), id=crowd.ids[0]))
    used = [plan for plan in crowd.plans if "order by e.embedding" in plan]
    assert len(used) >= 7
    for plan in used:
        assert "product_embeddings_embedding_hnsw" in plan, plan


def test_the_index_finds_nearly_what_brute_force_finds(crowd):
    found = 0
    for at in range(0, 2000, 100):
        got = crowd.sql("select asset_id from match_products(%s, 10)", [text(crowd.vectors[at])])
        best = np.argsort(-(crowd.vectors @ crowd.vectors[at]))[:10]
        found += len({str(row[0]) for row in got} & {crowd.ids[n] for n in best})
    assert found >= 0.6 * 200  # random vectors are the worst case for an index like this


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("100", 100),
        ("300", 300),
        ("10, client => 'rare'", 10),
        ("20, client => 'rare'", 10),
        ("10, max_similarity => 0.8", 10),
        ("5, model_version => 'older'", 3),
        ("1001", 1000),
    ],
)
def test_a_long_or_narrow_search_still_finds_all_it_was_asked_for(crowd, arguments, wanted):
    query = f"select asset_id from match_products(%s, {arguments})"
    assert len(crowd.sql(query, [text(crowd.vectors[0])]).fetchall()) == wanted


def test_a_function_may_take_longer_than_the_apis_usual_8_seconds(stack, api):
    """PostgREST takes statement_timeout over from the function, before it calls it."""
    (settings,) = stack.sql(
        "select count(*) from pg_proc where 'statement_timeout=55s' = any (proconfig)"
    )
    assert settings == (5,)
    stack.sql("create function slow() returns text language sql as 'select pg_sleep(9)::text'")
    stack.sql("alter function slow set statement_timeout = '55s'")
    stack.sql("grant execute on function slow to service_role")
    stack.reload_schema()
    api.call("slow")
