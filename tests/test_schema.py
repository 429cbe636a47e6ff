"""schema.sql: tables, access, triggers and the search functions, asked through PostgREST."""

import io
import json
import re
import uuid
from types import SimpleNamespace

import numpy as np
import psycopg
import pytest
import requests
from conftest import REPO, renew
from PIL import Image

VERSION = "clip-vit-base-patch32"
TABLES = ("product_embeddings", "product_embedding_failures")
EMBEDDING = (
    "insert into product_embeddings (asset_id, embedding, model_version) values (%s, %s, %s)"
)
FAILED = (
    "insert into product_embedding_failures (asset_id, model_version, stage, reason, permanent) "
    "values (%s, %s, 'fetch', 'HTTP 404', true)"
)
FAILURE = {"model_version": VERSION, "stage": "fetch", "reason": "HTTP 404", "permanent": True}


def text(vector):
    return json.dumps([round(float(x), 7) for x in vector])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


class Api:
    """PostgREST through the gateway, with one of the project's keys."""

    def __init__(self, stack, key):
        self.root = f"{stack.url}/rest/v1"
        self.headers = {"apikey": key, "Authorization": f"Bearer {key}"}

    def __call__(self, method, path, body=None, **headers):
        return requests.request(
            method, f"{self.root}/{path}", json=body, headers=self.headers | headers, timeout=30
        )

    def call(self, function, **arguments):
        answer = self("POST", f"rpc/{function}", arguments)
        assert answer.status_code == 200, answer.text
        return answer.json()


# The script


def test_the_script_runs_twice_without_harm(stack):
    asset = uuid.uuid4()
    stack.add_assets([(asset, "https://images.invalid/1.jpg", "x")])
    stack.sql(EMBEDDING, [asset, text(np.ones(512)), VERSION])
    before = stack.sql("select * from product_embeddings")
    objects = "select count(*) from pg_depend"
    count = stack.sql(objects)
    stack.apply_schema()
    assert stack.sql("select * from product_embeddings") == before
    assert stack.sql(objects) == count


def test_the_script_runs_as_a_user_who_is_no_superuser(stack):
    """As on Supabase, where the SQL editor's user owns the tables and extensions are there."""
    stack.reset(schema=False)
    stack.sql("drop role if exists editor")
    stack.sql("create role editor login createrole")
    try:
        stack.sql(
            "grant all on schema public to editor; grant usage on schema extensions to editor"
        )
        stack.sql("alter table assets owner to editor")
        script = (REPO / "schema.sql").read_text()
        if not stack.sql("select 1 from pg_extension where extname = 'vector'"):
            stack.sql("create extension vector with schema extensions")
        with psycopg.connect(stack.db_uri, user="editor", autocommit=True) as editor:
            editor.execute(script.replace("create schema if not exists extensions;", ""))
        assert stack.sql("select count(*) from product_embeddings") == [(0,)]
    finally:
        stack.reset()
        stack.sql("drop owned by editor; drop role editor")


@pytest.mark.parametrize("kind", ["bigint", "text"])
def test_the_script_fits_other_ids_by_one_replacement(stack, kind):
    stack.reset(kind)
    stack.add_assets([(1, "https://images.invalid/1.jpg", "x"), (2, None, None)])
    for n in (1, 2):
        stack.sql(EMBEDDING, [n, text(np.ones(512)), VERSION])
    assert [str(row[0]) for row in stack.sql("select * from similar_products('1')")] == ["2"]


def test_the_columns_are_those_of_the_promise(stack):
    rows = stack.sql(
        "select column_name, udt_name, is_nullable from information_schema.columns "
        "where table_name = 'product_embeddings' order by ordinal_position"
    )
    assert rows == [
        ("asset_id", "uuid", "NO"),
        ("embedding", "vector", "NO"),
        ("model_version", "text", "NO"),
        ("created_at", "timestamptz", "NO"),
        ("updated_at", "timestamptz", "NO"),
    ]
    asset = uuid.uuid4()
    stack.add_assets([(asset, None, None)])
    with pytest.raises(psycopg.errors.DataException, match="512"):
        stack.sql(EMBEDDING, [asset, text(np.ones(384)), VERSION])


# Access


@pytest.fixture
def two(stack):
    """Two assets: `done` has an embedding, `broken` a failure."""
    done, broken = uuid.uuid4(), uuid.uuid4()
    stack.add_assets((asset, "https://images.invalid/1.jpg", "x") for asset in (done, broken))
    stack.sql(EMBEDDING, [done, text(np.ones(512)), VERSION])
    stack.sql(FAILED, [broken, VERSION])
    return SimpleNamespace(done=done, broken=broken)


CALLS = [
    *(("GET", table, None) for table in TABLES),
    *(("DELETE", f"{table}?model_version=eq.{VERSION}", None) for table in TABLES),
    *(("PATCH", f"{table}?model_version=eq.{VERSION}", {"model_version": "x"}) for table in TABLES),
    ("POST", TABLES[0], {"embedding": text(np.ones(512)), "model_version": VERSION}),
    ("POST", TABLES[1], FAILURE),
    ("POST", "rpc/match_products", {"query_embedding": text(np.ones(512))}),
    ("POST", "rpc/similar_products", {}),
]


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_others_than_the_service_role_see_and_do_nothing(stack, two, role):
    import jwt

    token = jwt.encode({"role": role, "exp": 4000000000}, stack._jwt_secret)
    api = Api(stack, stack.anon_key)
    api.headers["Authorization"] = f"Bearer {token}"
    for method, path, body in CALLS:
        if body is not None and method == "POST" and "match" not in path:
            body = {**body, "asset_id": str(two.broken)}
        answer = api(method, path, body)
        assert answer.status_code in (401, 403), (method, path, answer.text)
        assert answer.json()["code"] == "42501"
        if path.startswith("rpc/"):  # refused at the door, not first by a table behind it
            assert "function" in answer.json()["message"]


def test_row_level_security_holds_even_where_rights_were_granted(stack, two):
    for table in TABLES:
        stack.sql(f"grant all on {table} to anon")
        answer = Api(stack, stack.anon_key)("GET", table)
        assert (answer.status_code, answer.json()) == (200, [])


def test_the_service_role_sees_and_does_everything(stack, two):
    api = Api(stack, stack.service_key)
    for table, asset in zip(TABLES, (two.done, two.broken), strict=True):
        assert [row["asset_id"] for row in api("GET", table).json()] == [str(asset)]
    assert [r["asset_id"] for r in api.call("match_products", query_embedding=text(np.ones(512)))]
    assert api.call("similar_products", asset_id=str(two.done)) == []
    for table, asset in zip(TABLES, (two.done, two.broken), strict=True):
        assert api("DELETE", f"{table}?asset_id=eq.{asset}").status_code == 204
        assert stack.sql(f"select count(*) from {table}") == [(0,)]


def test_an_app_user_without_rights_here_may_still_edit_and_delete_assets(stack, two):
    stack.sql("grant all on assets to authenticated")
    stack.sql("set role authenticated")
    try:
        stack.sql("update assets set image_url = 'https://images.invalid/2.jpg'")
    finally:
        stack.sql("reset role")
    for table in TABLES:
        assert stack.sql(f"select count(*) from {table}") == [(0,)]


# Triggers


def test_a_new_image_url_forgets_the_old_image(stack, two):
    stack.sql("update assets set client_name = 'y', image_url = image_url")
    for table in TABLES:
        assert stack.sql(f"select count(*) from {table}") == [(1,)]
    stack.sql("update assets set image_url = null")
    for table in TABLES:
        assert stack.sql(f"select count(*) from {table}") == [(0,)]


def test_a_success_clears_the_failure(stack, two):
    stack.sql(EMBEDDING, [two.broken, text(np.ones(512)), VERSION])
    assert stack.sql("select count(*) from product_embedding_failures") == [(0,)]


@pytest.mark.parametrize(("version", "kept"), [(VERSION, 1), ("another", 2)])
def test_a_failure_beside_a_vector_of_the_same_model_is_not_kept(stack, two, version, kept):
    stack.sql(FAILED, [two.done, version])
    assert stack.sql("select count(*) from product_embedding_failures") == [(kept,)]


def test_a_failure_written_again_counts_one_more_attempt(stack, two):
    first = stack.sql("select created_at from product_embedding_failures")
    api = Api(stack, stack.service_key)
    for _ in range(2):
        row = FAILURE | {"asset_id": str(two.broken), "reason": "HTTP 410", "created_at": "now"}
        answer = api(
            "POST",
            "product_embedding_failures?on_conflict=asset_id",
            [row],
            Prefer="resolution=merge-duplicates",
        )
        assert answer.status_code in (200, 201), answer.text
    rows = stack.sql("select attempts, reason, created_at from product_embedding_failures")
    assert rows == [(3, "HTTP 410", first[0][0])]


def test_a_deleted_asset_takes_its_rows_along(stack, two):
    stack.sql("delete from assets")
    for table in TABLES:
        assert stack.sql(f"select count(*) from {table}") == [(0,)]


# Search


@pytest.fixture(scope="module")
def gallery(_stack, tiny, photos):
    """The photographs, of three clients, with their vectors."""
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


def test_match_products_finds_a_vector_itself_first(gallery):
    got = gallery.api.call("match_products", query_embedding=text(gallery.vectors[3]))
    assert len(got) == 10
    assert got[0]["asset_id"] == gallery.ids[3]
    assert got[0]["image_url"] == gallery.urls[3]
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


@pytest.mark.parametrize("function", ["match_products", "similar_products"])
def test_the_search_uses_the_index(crowd, function):
    crowd.plans.clear()
    argument = text(crowd.vectors[0]) if function == "match_products" else crowd.ids[0]
    for _ in range(7):  # after five calls PostgreSQL may settle on one plan for all
        rows = crowd.sql(f"select * from {function}(%s, 10)", [argument]).fetchall()
        assert len(rows) == 10
    used = [plan for plan in crowd.plans if "order by e.embedding" in plan]
    assert len(used) == 7
    for plan in used:
        assert "product_embeddings_embedding_hnsw" in plan, plan


def test_the_index_finds_nearly_what_brute_force_finds(crowd):
    found = 0
    for at in range(0, 2000, 100):
        rows = crowd.sql("select asset_id from match_products(%s, 10)", [text(crowd.vectors[at])])
        got = {str(row[0]) for row in rows}
        best = np.argsort(-(crowd.vectors @ crowd.vectors[at]))[:10]
        found += len(got & {crowd.ids[n] for n in best})
    assert found >= 0.6 * 200  # random vectors are the worst case for an index like this


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [("100, null", 100), ("300, null", 300), ("10, 'rare'", 10), ("20, 'rare'", 10)],
)
def test_a_long_or_narrow_search_still_finds_all_it_was_asked_for(crowd, arguments, wanted):
    query = f"select asset_id from match_products(%s, {arguments})"
    assert len(crowd.sql(query, [text(crowd.vectors[0])]).fetchall()) == wanted


def test_vectors_of_another_model_are_not_compared(crowd):
    query = "select asset_id from similar_products(%s, 10)"
    of_older = {str(row[0]) for row in crowd.sql(query, [crowd.ids[7]])}
    assert of_older == {crowd.ids[8], crowd.ids[9]}


def test_the_readmes_sql_runs_as_it_stands(stack, host, cli):
    stack.add_assets(
        (str(uuid.uuid4()), host.url_of(path), "BigClient") for path in [*host.files][:5]
    )
    assert cli().code == 0
    readme = (REPO / "README.md").read_text()
    blocks = re.findall(r"```sql\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) > 5
    for block in blocks:
        if "join product_embeddings_check" in block:  # the run that comes before it
            stack.reload_schema()
            assert cli("--limit", 5, EMBEDDINGS_TABLE="product_embeddings_check").code == 0
            ((agreement,),) = stack.sql(block)
            assert agreement == pytest.approx([1, 1, 1])
        else:
            stack.sql(block)
