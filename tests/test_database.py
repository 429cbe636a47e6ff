"""What schema.sql's functions promise, asked through PostgREST as the script and an app do."""

import io
import json
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import psycopg
import pytest
from conftest import REPO, renew
from database import (
    EMBEDDING,
    ONES,
    TABLES,
    VERSION,
    Api,
    batch,
    failures,
    fill,
    rows,
    statements,
    text,
    unit,
    user,
)
from PIL import Image

# What there is, and what is pending


def test_the_status_of_an_empty_catalog(stack, api):
    status = api.status()
    assert abs(time.time() - api_time(status)) < 60
    del status["time"]
    assert status == {
        "contract": 2,
        "client_exists": True,
        "other_clients": None,
        "assets": 0,
        "done": 0,
        "waiting": 0,
        "failed_for_good": 0,
    }
    assert api.pending() == {"assets": [], "last": None}


def api_time(status):
    return datetime.fromisoformat(status["time"]).timestamp()


@pytest.fixture(scope="module")
def mixture(_stack):
    """300 assets of two clients in every state: id -> (client, state)."""
    renew(_stack)
    ids = [str(uuid.UUID(int=n)) for n in range(300)]
    kinds = ("new", "done", "for now", "for good", "older vector", "older failure")
    _stack.add_assets((i, f"https://images.invalid/{i}", f"c{n % 2}") for n, i in enumerate(ids))
    states = dict(zip(ids, np.random.default_rng(0).choice(kinds, 300), strict=True))
    for asset, state in states.items():
        version = "older" if "older" in state else VERSION
        if state in ("done", "older vector"):
            _stack.sql(EMBEDDING, [asset, ONES, version])
        elif state != "new":
            _stack.sql(
                "insert into product_embedding_failures "
                "(asset_id, model_version, stage, reason, permanent) values (%s, %s, '', '', %s)",
                [asset, version, state != "for now"],
            )
    return SimpleNamespace(
        api=Api(_stack, _stack.service_key),
        ids=ids,
        states=states,
        clients={i: f"c{n % 2}" for n, i in enumerate(ids)},
    )


NEW = ("new", "older vector", "older failure")
WALKS = [
    ({}, NEW),
    ({"failed_before": "infinity"}, ("for now",)),
    ({"failed_before": "infinity", "permanent_too": True}, ("for now", "for good")),
    ({"failed_before": "-infinity", "permanent_too": True}, ()),
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
    assert status["client_exists"] == (client != "nobody")
    assert (status["assets"], status["done"], status["failed_for_good"]) == (
        len(states),
        states.count("done"),
        states.count("for good"),
    )


def test_shards_partition_the_catalog(mixture):
    whole, parts = mixture.api.status(), []
    for shard in range(1, 5):
        parts.append(mixture.api.status(shard=shard, shards=4))
        got = [a["id"] for a in mixture.api.walk(shard=shard, shards=4, wanted=7)]
        parts[-1]["pending"] = got
    for count in ("assets", "done", "failed_for_good"):
        assert sum(part[count] for part in parts) == whole[count]
    pending = sorted(i for part in parts for i in part["pending"])
    assert pending == [i for i in mixture.ids if mixture.states[i] in NEW]
    assert min(part["assets"] for part in parts) > 40
    failed = [
        a["id"]
        for shard in range(1, 5)
        for a in mixture.api.walk(shard=shard, shards=4, failed_before="infinity")
    ]
    assert sorted(failed) == [i for i in mixture.ids if mixture.states[i] == "for now"]


WAITS = [(1, 0), (2, 1), (3, 3), (4, 7), (5, 15), (8, 127), (9, 168), (20, 168), (2000, 168)]
SLOW_WAITS = [(1, 1), (2, 3), (3, 7), (7, 127), (8, 168), (9, 168), (2000, 168)]


@pytest.mark.parametrize(
    ("reason", "attempts", "hours"),
    [("HTTP 500", *wait) for wait in WAITS]
    + [("not complete within 30 s", *wait) for wait in SLOW_WAITS],
)
def test_what_failed_waits_before_it_comes_again(stack, api, reason, attempts, hours):
    fill(stack, 2)
    failure = {"failure": {"permanent": False, "reason": reason}}
    api.store([], [a | failure for a in api.pending()["assets"]])
    for minutes, due in ((-1, False), (1, True)):
        stack.sql(
            "update product_embedding_failures set attempts = %s, "
            "updated_at = now() - %s * interval '1 hour' - %s * interval '1 minute'",
            [attempts, hours, minutes],
        )
        status = api.status()
        assert status["waiting"] == (0 if due else 2)
        assert len(api.walk(failed_before=status["time"])) == (2 if due else 0)
        of_all = api.walk(failed_before=status["time"], permanent_too=True)
        assert len(of_all) == (2 if hours or due else 0)  # not those that fail in this very run


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
    assert len(api.pending(wanted=1500)["assets"]) == 1500


def test_a_page_says_what_an_image_is(stack, api):
    missing, there = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
    stack.add_assets([(missing, None, None), (there, "Größe.jpg", None)])
    hashes = [
        h
        for (h,) in stack.sql(
            "select hashtextextended(u, 0) from unnest(%s::text[]) u", [["", "Größe.jpg"]]
        )
    ]
    assert api.pending()["assets"] == [
        {"id": missing, "image": None, "image_hash": hashes[0], "bytes": 0},
        {"id": there, "image": "Größe.jpg", "image_hash": hashes[1], "bytes": 11},
    ]
    assert api.store([], api.pending()["assets"]) == {missing: "noted", there: "noted"}


def test_a_page_is_bounded_by_its_bytes(stack, api):
    ids = fill(stack, 12)
    stack.sql("update assets set image_url = 'data:' || repeat('x', 999995)")
    first = api.pending()
    assert [a["id"] for a in first["assets"]] == ids[:8]
    assert first["last"] == ids[7]
    second = api.pending(after=first["last"])
    assert [a["id"] for a in second["assets"]] == ids[8:]
    assert second["last"] is None


def test_an_image_larger_than_a_page_comes_cut_short(stack, api):
    ids = fill(stack, 3)
    stack.sql(
        f"update assets set image_url = 'data:' || repeat('x', 9000000) where id = '{ids[1]}'"
    )
    assets = api.walk()
    assert [a["id"] for a in assets] == ids
    assert (assets[1]["bytes"], len(assets[1]["image"])) == (9000005, 100)
    assert api.store([], assets[1:2]) == {ids[1]: "noted"}


# Storing


def test_what_is_stored_is_there_and_what_failed_is_noted(stack, api):
    ids = fill(stack, 3)
    one, two, three = api.pending()["assets"]
    assert api.store([one, two], [three]) == dict(
        zip(ids, ["stored", "stored", "noted"], strict=True)
    )
    assert rows(stack, "asset_id::text, embedding::text, model_version") == [
        (i, ONES.replace(" ", ""), VERSION) for i in ids[:2]
    ]
    assert failures(stack, "asset_id::text, model_version, stage, reason, permanent, attempts") == [
        (ids[2], VERSION, "fetch", "HTTP 404", True, 1)
    ]


def test_nothing_to_store_is_nothing(api):
    assert api.call("store_embeddings", model_version=VERSION) == []


def test_a_vector_replaces_an_older_one_and_keeps_its_date(stack, api):
    fill(stack, 1)
    assets = api.pending()["assets"]
    api.store(assets, version="older")
    ((created, updated),) = rows(stack, "created_at, updated_at")
    assert set(api.store(assets).values()) == {"stored"}
    ((version, created_now, updated_now),) = rows(stack, "model_version, created_at, updated_at")
    assert (version, created_now) == (VERSION, created)
    assert updated_now > updated


def test_a_failure_counts_its_attempts_and_keeps_its_date(stack, api):
    fill(stack, 1)
    assets = api.pending()["assets"]
    api.store([], assets)
    ((created,),) = failures(stack, "created_at")
    api.store([], [assets[0] | {"failure": {"reason": "HTTP 500", "permanent": False}}])
    columns = "attempts, reason, permanent, created_at, updated_at > created_at"
    assert failures(stack, columns) == [(2, "HTTP 500", False, created, True)]
    api.store([], assets, version="newer")
    assert failures(stack, columns) == [(1, "HTTP 404", True, created, True)]


def test_a_success_clears_the_failure(stack, api):
    fill(stack, 1)
    assets = api.pending()["assets"]
    api.store([], assets)
    api.store(assets)
    assert failures(stack) == []


def test_a_failure_gives_way_to_a_vector_of_the_same_model(stack, api):
    (asset,) = fill(stack, 1)
    assets = api.pending()["assets"]
    api.store(assets)
    assert api.store([], assets) == {asset: "superseded"}
    assert api.store([], assets, version="newer") == {asset: "noted"}
    assert (len(rows(stack)), len(failures(stack))) == (1, 1)


def test_a_failure_holds_for_the_image_that_failed(stack, api):
    """Where the view gives another one now, the asset is pending, however it came to that."""
    one, two = fill(stack, 2)
    api.store([], api.pending()["assets"])
    assert (api.pending()["assets"], api.status()["failed_for_good"]) == ([], 2)
    view = "select id, {} as image, client_name as client from assets"
    replaced = f"case when id = '{one}' then 'https://cdn.example.com/x' else image_url end"
    stack.sql(f"create or replace view embedding_sources as {view.format(replaced)}")
    (asset,) = api.pending()["assets"]
    assert asset["id"] == one
    assert (api.status()["failed_for_good"], api.status()["done"]) == (1, 0)
    assert [a["id"] for a in api.walk(failed_before="infinity", permanent_too=True)] == [two]
    assert [row["asset_id"] for row in api("GET", "embedding_failures").json()] == [two]
    assert api.store([], [asset]) == {one: "noted"}
    assert failures(stack, "attempts") == [(1,), (1,)]
    assert api.store([], [asset]) == {one: "noted"}
    assert failures(stack, "attempts") == [(2,), (1,)]
    stack.sql(f"create or replace view embedding_sources as {view.format('image_url')}")
    assert [a["id"] for a in api.pending()["assets"]] == [one]


# How an asset can get another image without the trigger's knowing of its vector
UNSEEN = {
    "a view of another column": """
        alter table assets add photo text;
        update assets set photo = image_url || '?new';
        create or replace view embedding_sources with (security_invoker = true) as
          select a.id, a.photo as image, a.client_name as client from assets a""",
    "a disabled trigger": """
        alter table assets disable trigger forget_embedding;
        update assets set image_url = image_url || '?new'""",
    "a bulk load": """
        set session_replication_role = replica;
        update assets set image_url = image_url || '?new'; reset session_replication_role""",
    "a renamed id": """
        alter table assets rename id to sku;
        update assets set image_url = image_url || '?new'""",
    "a delete and an insert without a foreign key": """
        alter table product_embeddings drop constraint product_embeddings_asset_id_fkey;
        create temp table gone as select * from assets;
        delete from assets;
        insert into assets select id, image_url || '?new', client_name from gone;
        drop table gone""",
}


@pytest.mark.parametrize("way", UNSEEN)
def test_a_vector_counts_for_the_image_that_was_embedded(stack, api, way):
    one, two = fill(stack, 2)
    api.store(api.pending()["assets"])
    stack.sql(UNSEEN[way])
    assert len(rows(stack)) == 2
    pending = api.pending()["assets"]
    assert ([a["id"] for a in pending], api.status()["done"]) == ([one, two], 0)
    assert api.store(pending[:1], pending[1:]) == {one: "stored", two: "noted"}
    assert (api.pending()["assets"], api.status()["done"]) == ([], 1)
    assert api.store([], pending) == {one: "superseded", two: "noted"}
    assert failures(stack, "attempts") == [(2,)]


def test_a_view_that_is_mistaken_for_a_night_costs_no_vector(stack, api):
    """Its images can't be had; once it is mended, all counts as before."""
    one, two = fill(stack, 2)
    api.store(api.pending()["assets"])
    view = (
        "create or replace view embedding_sources with (security_invoker = true) as "
        "select a.id, {} as image, a.client_name as client from assets a"
    )
    stack.sql(view.format("'https://typo.example/' || a.image_url"))
    pending = api.pending()["assets"]
    assert api.store([], pending) == {one: "noted", two: "noted"}
    assert (api.status()["failed_for_good"], api.status()["done"]) == (2, 0)
    stack.sql(view.format("a.image_url"))
    assert (api.status()["failed_for_good"], api.status()["done"]) == (0, 2)
    assert (api.pending()["assets"], len(rows(stack))) == ([], 2)


def test_a_vector_counts_for_the_image_that_an_app_did_not_see_embedded(stack, api, other):
    """In repeatable read the trigger does not see, and so not delete, what came after its start."""
    (asset,) = fill(stack, 1)
    other.execute("set transaction isolation level repeatable read")
    other.execute("select from assets")
    api.store(api.pending()["assets"])
    other.execute("update assets set image_url = 'new'")
    other.commit()
    assert (len(rows(stack)), api.status()["done"]) == (1, 0)
    assert [a["id"] for a in api.pending()["assets"]] == [asset]


def test_a_vector_from_before_hashes_were_kept_holds(stack, api):
    one, two = fill(stack, 2)
    assets = api.pending()["assets"]
    api.store(assets)
    stack.sql("update product_embeddings set embedded_image_hash = null")
    stack.sql("alter table assets disable trigger forget_embedding")
    stack.sql("update assets set image_url = image_url || '?new'")
    assert (api.pending()["assets"], api.status()["done"]) == ([], 2)
    marks = stack.sql("select id::text, embedding_image_hash(image_url) from assets order by id")
    changed = [{"id": i, "image_hash": mark} for i, mark in marks]
    assert api.store(changed[:1], changed[1:]) == {one: "stored", two: "superseded"}
    assert rows(stack, "embedded_image_hash") == [(changed[0]["image_hash"],), (None,)]


def test_a_failure_from_before_hashes_were_kept_holds(stack, api):
    fill(stack, 1)
    assets = api.pending()["assets"]
    api.store([], assets)
    stack.sql("update product_embedding_failures set image_hash = null")
    assert api.pending()["assets"] == []
    assert api.status()["failed_for_good"] == 1
    api.store([], assets)
    assert failures(stack, "attempts, image_hash") == [(2, assets[0]["image_hash"])]


def test_an_asset_deleted_or_changed_meanwhile_is_left_out(stack, api):
    ids = fill(stack, 6)
    assets = api.pending()["assets"]
    stack.sql("update assets set image_url = 'new' where id = any(%s)", [[ids[0], ids[3]]])
    stack.sql("delete from assets where id = any(%s)", [[ids[1], ids[4]]])
    outcomes = ["changed", "deleted", "stored", "changed", "deleted", "noted"]
    assert api.store(assets[:3], assets[3:]) == dict(zip(ids, outcomes, strict=True))
    assert [a["id"] for a in api.pending()["assets"]] == [ids[0], ids[3]]


def test_what_changes_between_the_look_and_the_lock_is_left_out(stack, api):
    ids = fill(stack, 6)
    assets = api.pending()["assets"]
    # Each asset is looked at for a while before the first one is locked
    pause = "create function pause() returns boolean language plpgsql as "
    stack.sql(f"{pause} 'begin perform pg_sleep(0.1); return true; end'")
    view = "select id, image_url as image, client_name as client from assets where pause()"
    stack.sql(f"create or replace view embedding_sources as {view}")
    with ThreadPoolExecutor() as pool:
        stored = pool.submit(api.store, assets[:3], assets[3:])
        looking = "select 1 from pg_stat_activity where wait_event = 'PgSleep'"
        while not stack.sql(looking):
            assert not stored.done()
        stack.sql("update assets set image_url = 'new' where id = any(%s)", [[ids[0], ids[3]]])
        stack.sql("delete from assets where id = any(%s)", [[ids[1], ids[4]]])
        outcomes = ["changed", "deleted", "stored", "changed", "deleted", "noted"]
        assert stored.result() == dict(zip(ids, outcomes, strict=True))
    assert [str(i) for (i,) in rows(stack, "asset_id")] == [ids[2]]
    assert [str(i) for (i,) in failures(stack, "asset_id")] == [ids[5]]


def test_an_asset_that_the_app_is_changing_is_busy_and_nobody_waits(stack, api, other):
    ids = fill(stack, 4)
    assets = api.pending()["assets"]
    other.execute("update assets set client_name = 'y' where id = any(%s)", [ids[:2]])
    began = time.monotonic()
    assert api.store([assets[0], assets[2]], [assets[1], assets[3]]) == {
        ids[0]: "busy",
        ids[1]: "busy",
        ids[2]: "stored",
        ids[3]: "noted",
    }
    assert time.monotonic() - began < 1.5
    other.commit()
    assert set(api.store(assets[:2]).values()) == {"stored"}


def test_an_asset_that_is_being_deleted_is_busy_and_then_gone(stack, api, other):
    (asset,) = fill(stack, 1)
    assets = api.pending()["assets"]
    other.execute("delete from assets")
    assert api.store(assets) == {asset: "busy"}
    other.commit()
    assert api.store(assets) == {asset: "deleted"}


def test_of_two_workers_on_one_asset_one_is_busy(stack, api, other):
    (asset,) = fill(stack, 1)
    assets = api.pending()["assets"]
    call = "select store_embeddings(%s, %s::json, %s::json)"

    def work(**given):
        made = batch(**given)
        arguments = [made["model_version"], *map(json.dumps, (made["vectors"], made["failures"]))]
        return other.execute(call, arguments).fetchone()[0][0]["outcome"]

    assert work(vectors=assets) == "stored"
    assert api.store([], assets) == {asset: "busy"}
    other.commit()
    assert api.store([], assets) == {asset: "superseded"}
    assert failures(stack) == []
    stack.sql("delete from product_embeddings")
    assert work(failures=assets) == "noted"
    assert api.store(assets) == {asset: "busy"}
    other.commit()
    assert api.store(assets) == {asset: "stored"}
    assert failures(stack) == []


REFUSING = {
    "a constraint": "alter table {table} add constraint mine check (asset_id <> '{asset}')",
    "a trigger that raises": """
        create function mine() returns trigger language plpgsql as $$ begin
          if new.asset_id = '{asset}' then raise 'not this one: mine'; end if; return new; end $$;
        create trigger mine before insert on {table} for each row execute function mine()""",
    "a trigger that returns nothing": """
        create function mine() returns trigger language plpgsql as $$ begin
          if new.asset_id = '{asset}' then return null; end if; return new; end $$;
        create trigger mine before insert on {table} for each row execute function mine()""",
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("how", REFUSING)
def test_a_row_that_the_database_refuses_costs_itself_alone(stack, api, table, how):
    ids = fill(stack, 5)
    assets = api.pending()["assets"]
    stack.sql(REFUSING[how].format(table=table, asset=ids[1]))
    whole = batch(assets) if table == TABLES[0] else batch([], assets)
    answers = api.call("store_embeddings", **whole)
    done = "stored" if table == TABLES[0] else "noted"
    assert [a["outcome"] for a in answers] == [done, "refused", done, done, done]
    assert [a["asset_id"] for a in answers] == ids
    (reason,) = (a["reason"] for a in answers if "reason" in a)
    assert reason == "a trigger left the row out" if "nothing" in how else "mine" in reason
    assert len(rows(stack, table=table)) == 4


@pytest.mark.parametrize(
    "vector",
    [
        "[1, 2]",
        "[]",
        "none",
        None,
        "[NaN" + ", 1" * 511 + "]",
        "[1e99" + ", 1" * 511 + "]",
        json.dumps([0] * 512),
    ],
)
def test_a_vector_that_is_none_is_refused_alone(stack, api, vector):
    ids = fill(stack, 3)
    assets = api.pending()["assets"]
    assets[1]["embedding"] = vector
    assert api.store(assets) == dict(zip(ids, ["stored", "refused", "stored"], strict=True))


def test_the_same_asset_twice_in_a_batch_is_stored(stack, api):
    fill(stack, 1)
    assets = api.pending()["assets"]
    answers = api.call("store_embeddings", **batch([*assets, *assets], assets))
    assert [a["outcome"] for a in answers] == ["stored", "stored", "superseded"]
    assert (len(rows(stack)), failures(stack)) == (1, [])


@pytest.mark.parametrize(
    "fault",
    [
        "alter table product_embeddings rename to elsewhere",
        """create function mine() returns trigger language plpgsql as $$ begin
             raise 'no space left on device' using errcode = 'disk_full'; end $$;
           create trigger mine before insert on product_embeddings
             for each row when (new.asset_id = '00000000-0000-0000-0000-000000000003')
             execute function mine()""",
    ],
)
def test_any_other_error_ends_the_call_with_nothing_stored(stack, api, fault):
    fill(stack, 3)
    whole = batch(api.pending()["assets"])
    stack.sql(fault)
    answer = api("POST", "rpc/store_embeddings", whole)
    assert answer.status_code >= 400
    assert answer.json()["code"] in ("42P01", "53100")
    table = "elsewhere" if "rename" in fault else TABLES[0]
    assert rows(stack, table=table) == []


def test_a_row_that_somebody_holds_is_busy_alone(stack, api, other):
    ids = fill(stack, 4)
    assets = api.pending()["assets"]
    api.store(assets[:2])
    other.execute("select from product_embeddings where asset_id = %s for update", [ids[0]])
    outcomes = ["busy", "stored", "stored", "stored"]
    assert api.store(assets) == dict(zip(ids, outcomes, strict=True))


def test_a_whole_batch_that_meets_a_locked_table_is_busy_within_seconds(stack, api, other):
    fill(stack, 50)
    assets = api.pending()["assets"]
    other.execute("lock table product_embeddings in share mode")  # as create index does
    began = time.monotonic()
    assert set(api.store(assets).values()) == {"busy"}
    assert time.monotonic() - began < 7


# The trigger


def test_a_new_image_is_forgotten_and_embedded_again(stack, api):
    ids = fill(stack, 3)
    assets = api.pending()["assets"]
    api.store(assets[:2], assets[2:])
    stack.sql("update assets set client_name = 'y', image_url = image_url")
    assert (len(rows(stack)), len(failures(stack))) == (2, 1)
    stack.sql("update assets set image_url = null where id <> %s", [ids[0]])
    assert (len(rows(stack)), len(failures(stack))) == (1, 0)
    assert [a["id"] for a in api.pending()["assets"]] == ids[1:]


def test_a_deleted_asset_takes_its_rows_along(stack, api):
    fill(stack, 2)
    one, two = api.pending()["assets"]
    api.store([one], [two])
    stack.sql("delete from assets")
    assert (rows(stack), failures(stack)) == ([], [])


def test_an_app_user_without_rights_here_may_edit_and_delete_assets(stack, api):
    fill(stack, 2)
    one, two = api.pending()["assets"]
    api.store([one], [two])
    stack.sql("grant all on assets to authenticated")
    me = user(stack)
    answer = me("PATCH", f"assets?id=in.({one['id']},{two['id']})", {"image_url": "new"})
    assert answer.status_code == 204, answer.text
    assert (rows(stack), failures(stack)) == ([], [])


def test_an_index_being_built_neither_blocks_the_app_nor_keeps_an_old_vector(stack, api, other):
    """Of rows from before hashes were kept, which rely on the trigger."""
    ids = fill(stack, 100)
    assets = api.pending()["assets"]
    api.store(assets[:98], assets[98:])
    stack.sql("update product_embeddings set embedded_image_hash = null")
    other.execute("lock table product_embeddings in share mode")
    began = time.monotonic()
    stack.sql("update assets set image_url = image_url || '?new'")
    assert time.monotonic() - began < 1.5
    other.commit()
    status = api.status()
    assert (status["assets"], status["done"], status["failed_for_good"]) == (100, 0, 0)
    assert [a["id"] for a in api.pending()["assets"]] == ids[98:]
    marked = api.walk(failed_before="infinity")
    assert [a["id"] for a in marked] == ids[:98]
    columns = "stage, reason, permanent, attempts, model_version"
    assert failures(stack, columns)[0] == (
        "store",
        "the image changed while its row was locked",
        False,
        1,
        VERSION,
    )
    assert api.store(marked[:1], marked[1:]) == {
        i: "stored" if n == 0 else "noted" for n, i in enumerate(ids[:98])
    }
    assert (len(rows(stack)), len(failures(stack))) == (1, 97)


def test_a_row_that_somebody_holds_does_not_hold_up_the_app(stack, api, other):
    one, two = fill(stack, 2)
    api.store(api.pending()["assets"])
    stack.sql("update product_embeddings set embedded_image_hash = null where asset_id = %s", [one])
    other.execute("select from product_embeddings for update")
    began = time.monotonic()
    stack.sql("update assets set image_url = 'new'")
    assert time.monotonic() - began < 1.5
    other.commit()
    assert failures(stack, "asset_id::text") == [(one,)]
    (pending,), (marked,) = api.walk(), api.walk(failed_before="infinity")
    assert api.store([pending, marked]) == {two: "stored", one: "stored"}
    assert (api.status()["done"], failures(stack)) == (2, [])


def test_no_error_of_ours_breaks_the_apps_update(stack):
    fill(stack, 1)
    stack.sql("drop table product_embeddings")
    stack.sql("update assets set image_url = 'new'")
    assert stack.sql("select image_url from assets") == [("new",)]


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
        _stack.sql(EMBEDDING, [i, text(vector), VERSION])
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


def test_similar_products_are_the_nearest_others(gallery):
    for at, asset in enumerate(gallery.ids):
        got = gallery.api.call("similar_products", asset_id=asset, match_count=5)
        ids, cosines = nearest(gallery, gallery.vectors[at], lambda n, at=at: n != at, 5)
        assert [row["asset_id"] for row in got] == ids
        assert np.abs(np.array([row["similarity"] for row in got]) - cosines).max() < 1e-5


def test_similar_products_may_be_those_of_one_client(gallery):
    for at, asset in enumerate(gallery.ids):
        mine = gallery.clients[at]
        got = gallery.api.call("similar_products", asset_id=asset, match_count=4, client=mine)
        ids, _ = nearest(
            gallery,
            gallery.vectors[at],
            lambda n, at=at, mine=mine: n != at and gallery.clients[n] == mine,
            4,
        )
        assert [row["asset_id"] for row in got] == ids


def test_match_products_finds_a_vector_itself_first(gallery):
    got = gallery.api.call("match_products", query_embedding=text(gallery.vectors[3]))
    assert len(got) == 10
    assert got[0]["asset_id"] == gallery.ids[3]
    assert got[0]["image"] == gallery.urls[3]
    assert abs(got[0]["similarity"] - 1) < 1e-5


def test_match_products_of_one_client(gallery):
    for client in ("client-0", "client-2"):
        got = gallery.api.call(
            "match_products", query_embedding=text(gallery.vectors[1]), match_count=4, client=client
        )
        ids, _ = nearest(
            gallery, gallery.vectors[1], lambda n, c=client: gallery.clients[n] == c, 4
        )
        assert [row["asset_id"] for row in got] == ids
    nobody = {"query_embedding": text(gallery.vectors[1]), "client": "nobody"}
    assert gallery.api.call("match_products", **nobody) == []


def test_more_matches_than_there_are_is_all_of_them(gallery):
    got = gallery.api.call(
        "match_products", query_embedding=text(gallery.vectors[0]), match_count=1000
    )
    assert len(got) == len(gallery.ids)
    similarities = [row["similarity"] for row in got]
    assert similarities == sorted(similarities, reverse=True)


def test_an_asset_without_an_embedding_has_no_similar_ones(gallery):
    assert gallery.api.call("similar_products", asset_id=str(uuid.uuid4())) == []


@pytest.mark.parametrize("client", [None, "client-1"])
def test_duplicates_come_in_pages_and_a_pair_once(gallery, client):
    order = [n for n in np.argsort(gallery.ids) if client in (None, gallery.clients[n])]
    cosines = gallery.vectors @ gallery.vectors.T
    expected = {
        (gallery.ids[a], gallery.ids[b])
        for k, a in enumerate(order)
        for b in order[k + 1 :]
        if cosines[a, b] >= 0.9
    }
    assert expected
    for page in (5, 1000):
        pairs, after = [], None
        while True:
            got = gallery.api.call(
                "duplicate_products",
                min_similarity=0.9,
                client=client,
                after=after,
                page=page,
                neighbours=30,
            )
            pairs += got["pairs"]
            after = got["last"]
            if after is None:
                break
        assert len(pairs) == len(expected)
        assert {(p["asset_id"], p["duplicate_id"]) for p in pairs} == expected
        for pair in pairs:
            a, b = (gallery.ids.index(pair[k]) for k in ("asset_id", "duplicate_id"))
            assert (pair["image"], pair["duplicate_image"]) == (gallery.urls[a], gallery.urls[b])
            assert abs(pair["similarity"] - cosines[a, b]) < 1e-5


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
        yield SimpleNamespace(
            sql=connection.execute,
            plans=plans,
            ids=ids,
            vectors=vectors,
            api=Api(_stack, _stack.service_key),
        )


@pytest.mark.parametrize("function", ["match_products", "similar_products"])
def test_the_search_uses_the_index(crowd, function):
    crowd.plans.clear()
    argument = text(crowd.vectors[0]) if function == "match_products" else crowd.ids[0]
    for _ in range(7):  # after five calls PostgreSQL may settle on one plan for all
        found = crowd.sql(f"select * from {function}(%s, 10)", [argument]).fetchall()
        assert len(found) == 10
    used = [plan for plan in crowd.plans if "order by e.embedding" in plan]
    assert len(used) == 7
    for plan in used:
        assert "product_embeddings_embedding_hnsw" in plan, plan


def test_duplicates_are_found_through_the_index(crowd):
    crowd.plans.clear()
    crowd.sql("select duplicate_products(page => 5)")
    used = [plan for plan in crowd.plans if "order by e.embedding" in plan]
    assert len(used) == 5
    assert all("product_embeddings_embedding_hnsw" in plan for plan in used)


def test_the_index_finds_nearly_what_brute_force_finds(crowd):
    found = 0
    for at in range(0, 2000, 100):
        got = crowd.sql("select asset_id from match_products(%s, 10)", [text(crowd.vectors[at])])
        best = np.argsort(-(crowd.vectors @ crowd.vectors[at]))[:10]
        found += len({str(row[0]) for row in got} & {crowd.ids[n] for n in best})
    assert found >= 0.6 * 200  # random vectors are the worst case for an index like this


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [("100, null", 100), ("300, null", 300), ("10, 'rare'", 10), ("20, 'rare'", 10)],
)
def test_a_long_or_narrow_search_still_finds_all_it_was_asked_for(crowd, arguments, wanted):
    query = f"select asset_id from match_products(%s, {arguments})"
    assert len(crowd.sql(query, [text(crowd.vectors[0])]).fetchall()) == wanted


def test_a_page_of_duplicates_is_capped(crowd):
    """Else one call could keep the database busy for as long as it is let."""
    (got,) = crowd.sql("select duplicate_products(1, page => 2000000000)").fetchone()
    assert got["last"] == crowd.ids[999]
    crowd.plans.clear()
    crowd.sql("select duplicate_products(page => 1, neighbours => 2000000000)")
    (limit,) = (re.search(r"Limit .*", plan)[0] for plan in crowd.plans if "order by e.emb" in plan)
    assert "rows=101 " in limit


@pytest.mark.parametrize("count", [1001, 2**31 - 1])
def test_a_huge_match_count_is_capped(crowd, count):
    for call in ("match_products(%s, %s)", "similar_products(%s, %s)"):
        argument = text(crowd.vectors[0]) if "match" in call else crowd.ids[0]
        (got,) = crowd.sql(f"select count(*) from {call}", [argument, count]).fetchone()
        assert 999 <= got <= 1000


def test_vectors_of_another_model_are_not_compared(crowd):
    query = "select asset_id from similar_products(%s, 10)"
    of_older = {str(row[0]) for row in crowd.sql(query, [crowd.ids[7]])}
    assert of_older == {crowd.ids[8], crowd.ids[9]}


def test_what_stands_in_public_takes_no_function_of_postgresqls_place(stack, api):
    fill(stack, 1)
    before = api.pending()
    stack.sql(
        "create function hashtextextended(text, int) returns bigint language sql return 7; "
        "create function coalesced(text) returns text language sql return 'x'; "
        "create function now() returns timestamptz language sql return '2000-01-01'::timestamptz"
    )
    assert api.pending() == before
    api.store(before["assets"])
    assert rows(stack, "updated_at > '2020-01-01'") == [(True,)]
    assert api.status()["time"] > "2020"
    ours = "pronamespace = 'public'::regnamespace and proowner = 'editor'::regrole"
    fixed = "'search_path=pg_catalog,' = left(array_to_string(proconfig, ','), 23)"
    assert stack.sql(
        f"select proname from pg_proc where {ours} and not coalesce({fixed}, false) order by 1"
    ) == [("embedding_image_hash",), ("embedding_shard",)]


def test_the_gallery_takes_its_samples_from_all_clients(stack, api):
    fill(stack, 100, "large")
    last = "select id from assets order by hashtextextended(id::text, 1) desc limit 3"
    stack.sql(f"update assets set client_name = 'small' where id in ({last})")
    api.store(api.pending()["assets"])
    made = api.call("embedding_gallery", model_version=VERSION)
    samples = [row["id"] for row in made["samples"]]
    small = "select count(*) from assets where client_name = 'small' and id = any (%s::uuid[])"
    assert len(samples) == 16
    assert stack.sql(small, [samples]) == [(3,)]


def test_a_function_may_take_longer_than_the_apis_usual_8_seconds(stack, api):
    """PostgREST takes statement_timeout over from the function, before it calls it."""
    (settings,) = stack.sql(
        "select count(*) from pg_proc where 'statement_timeout=55s' = any (proconfig)"
    )
    assert settings == (8,)
    stack.sql("create function slow() returns text language sql as 'select pg_sleep(9)::text'")
    stack.sql("alter function slow set statement_timeout = '55s'")
    stack.sql("grant execute on function slow to service_role")
    stack.reload_schema()
    api.call("slow")


def test_the_readmes_sql_runs_as_it_stands(stack, api):
    """On a catalog with an embedding of everything but one asset, which failed."""
    fill(stack, 5)
    *done, failed = api.pending()["assets"]
    api.store(done, [failed])
    readme = (REPO / "README.md").read_text()
    blocks = re.findall(r"```sql\n(.*?)```", readme, re.DOTALL)
    assert blocks
    for block in blocks:
        with psycopg.connect(stack.db_uri, autocommit=True) as connection:
            for statement in statements(block):
                connection.execute(statement)
