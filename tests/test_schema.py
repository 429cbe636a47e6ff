"""schema.sql: what its functions promise, asked through PostgREST as the script and an app do."""

import io
import json
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jwt
import numpy as np
import psycopg
import pytest
import requests
from conftest import REPO, renew
from PIL import Image

VERSION = "clip-vit-base-patch32"
TABLES = ("product_embeddings", "product_embedding_failures")
ONES = json.dumps([0.5] * 512)
FAILURE = {"stage": "fetch", "reason": "HTTP 404", "permanent": True}
EMBEDDING = (
    "insert into product_embeddings (asset_id, embedding, model_version) values (%s, %s, %s)"
)


def text(vector):
    return json.dumps([round(float(x), 7) for x in vector])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def schema():
    return (REPO / "schema.sql").read_text()


def snippets(part=None):
    """The statements in the file's comments that are to be pasted, by `part` of their text."""
    blocks = re.findall(r"^(?:--   .*\n)+", schema(), re.MULTILINE)
    found = [re.sub(r"^--   ", "", block, flags=re.MULTILINE) for block in blocks]
    return [block for block in found if part is None or part in block]


def statements(script):
    """One by one, as psql runs them; with the memory of a small machine."""
    bare = re.sub(r"--.*", "", script).replace("'4GB'", "'64MB'")
    return [statement for statement in bare.split(";") if statement.strip()]


class Api:
    """PostgREST through the gateway, with one of the project's keys or a user's token."""

    def __init__(self, stack, key, token=None):
        self.root = f"{stack.url}/rest/v1"
        self.headers = {"apikey": key, "Authorization": f"Bearer {token or key}"}

    def __call__(self, method, path, body=None, **headers):
        return requests.request(
            method, f"{self.root}/{path}", json=body, headers=self.headers | headers, timeout=60
        )

    def call(self, function, **arguments):
        answer = self("POST", f"rpc/{function}", arguments)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def status(self, **arguments):
        return self.call("embedding_status", **{"model_version": VERSION} | arguments)

    def pending(self, **arguments):
        return self.call("pending_assets", **{"model_version": VERSION} | arguments)

    def walk(self, **arguments):
        """All pages."""
        assets, after = [], None
        while True:
            page = self.pending(after=after, **arguments)
            assets += page["assets"]
            after = page["last"]
            if after is None:
                return assets

    def store(self, vectors=(), failures=(), version=VERSION):
        """Stores a vector for each of these assets, a failure for each of those: id -> outcome."""
        answers = self.call("store_embeddings", **batch(vectors, failures, version))
        assert len(answers) == len(vectors) + len(failures)
        return {a["asset_id"]: a["outcome"] for a in answers}


def batch(vectors=(), failures=(), version=VERSION):
    def known(asset):
        return {"asset_id": asset["id"], "image_hash": asset["image_hash"]}

    return {
        "model_version": version,
        "vectors": [known(a) | {"embedding": a.get("embedding", ONES)} for a in vectors],
        "failures": [known(a) | FAILURE | a.get("failure", {}) for a in failures],
    }


def user(stack, **claims):
    """The API as somebody who is signed in."""
    token = jwt.encode(
        {"role": "authenticated", "exp": 4000000000} | claims, stack._jwt_secret, algorithm="HS256"
    )
    return Api(stack, stack.anon_key, token)


def fill(stack, count, client="x"):
    """So many assets in the order of their ids."""
    ids = [str(uuid.UUID(int=n + 1)) for n in range(count)]
    stack.add_assets((i, f"https://images.invalid/{i}.jpg", client) for i in ids)
    return ids


def rows(stack, columns="*", table="product_embeddings"):
    return stack.sql(f"select {columns} from {table} order by asset_id")


def failures(stack, columns="*"):
    return rows(stack, columns, "product_embedding_failures")


@pytest.fixture
def api(stack):
    return Api(stack, stack.service_key)


@pytest.fixture
def other(stack):
    """A transaction of somebody else, open until the test commits it."""
    with psycopg.connect(stack.db_uri) as connection:
        yield connection
        connection.rollback()


# The file


def test_running_it_twice_does_no_harm(stack, api):
    fill(stack, 2)
    one, two = api.pending()["assets"]
    api.store([one], [two])
    before, objects = rows(stack) + failures(stack), "select count(*) from pg_depend"
    count = stack.sql(objects)
    stack.apply_schema()
    assert rows(stack) + failures(stack) == before
    assert stack.sql(objects) == count


def test_it_does_all_or_nothing(stack):
    stack.reset(schema=False)
    with pytest.raises(psycopg.Error):
        stack.apply_schema(script=schema().replace("commit;", "select 1/0; commit;"))
    assert stack.sql("select to_regclass('embedding_sources')") == [(None,)]


@pytest.mark.parametrize("old_grants", [False, True])
@pytest.mark.parametrize("vector", ["extensions", "public"])
def test_it_fits_newer_and_older_projects(stack, old_grants, vector):
    stack.reset(old_grants=old_grants, vector=vector)
    api = Api(stack, stack.service_key)
    (asset,) = fill(stack, 1)
    assert api.store(api.pending()["assets"]) == {asset: "stored"}
    assert [m["asset_id"] for m in api.call("match_products", query_embedding=ONES)] == [asset]
    assert api.call("duplicate_products")["pairs"] == []
    for table in ("embedding_sources", *TABLES):
        assert Api(stack, stack.anon_key)("GET", table).json()["code"] == "42501"


def test_it_refuses_a_pgvector_that_is_too_old(stack):
    script = schema().replace("select extversion from pg_extension", "select '0.7.4' from pg_am")
    script = script.replace("where extname = 'vector'", "where amname = 'btree'")
    with pytest.raises(psycopg.Error, match=r"pgvector 0\.7\.4 is too old"):
        stack.apply_schema(script=script)


OLDER_TABLE = """
create table product_embeddings (
  asset_id uuid, embedding extensions.vector(512), model_version text,
  created_at timestamptz, updated_at timestamptz
)
"""


@pytest.fixture
def older(stack):
    """A project with a table of embeddings, and nothing of this file."""
    stack.reset(schema=False)
    stack.sql_as_editor(OLDER_TABLE)
    return stack


def test_a_table_of_embeddings_that_was_there_is_kept_and_completed(older):
    old, new = fill(older, 2)
    for asset in (old, uuid.uuid4()):  # and one of an asset that is no more
        older.sql(EMBEDDING, [asset, ONES, VERSION])
    older.apply_schema()
    older.reload_schema()
    api = Api(older, older.service_key)
    assert api.status()["done"] == 1
    assert api.store(api.pending()["assets"]) == {new: "stored"}
    assert older.sql(
        f"select updated_at is not null from product_embeddings where asset_id = '{new}'"
    ) == [(True,)]
    older.sql("delete from assets")
    assert len(rows(older)) == 1
    older.apply_schema()


@pytest.mark.parametrize(
    ("spoil", "message", "cure"),
    [
        (
            "alter table product_embeddings alter column embedding type extensions.vector(768)",
            r"no vector\(512\)",
            "alter table public.product_embeddings rename to product_embeddings_old;",
        ),
        (
            "alter table product_embeddings alter column embedding type extensions.vector",
            r"no vector\(512\)",
            "alter table public.product_embeddings alter column embedding type vector(512);",
        ),
        (
            "insert into product_embeddings select id, array_fill(1, array[512])::"
            "extensions.vector, 'x', now(), now() from assets, generate_series(1, 2)",
            "several rows for one asset_id",
            "delete from public.product_embeddings a using public.product_embeddings b "
            "where a.asset_id = b.asset_id and (a.updated_at, a.ctid) < (b.updated_at, b.ctid);",
        ),
    ],
)
def test_what_stands_in_the_way_is_said_with_the_sql_that_helps(older, spoil, message, cure):
    fill(older, 3)
    older.sql(spoil)
    with pytest.raises(psycopg.Error, match=message) as error:
        older.apply_schema()
    assert cure in error.value.diag.message_hint
    older.sql_as_editor(cure)
    older.apply_schema()


OLD_SCHEMA = """
create table product_embeddings (
  asset_id uuid primary key references assets (id) on delete cascade,
  embedding extensions.vector(512) not null, model_version text not null,
  created_at timestamptz not null default now(), updated_at timestamptz not null default now());
create index product_embeddings_embedding_hnsw
  on product_embeddings using hnsw (embedding extensions.vector_cosine_ops);
create table product_embedding_failures (
  asset_id uuid primary key references assets (id) on delete cascade,
  model_version text not null, stage text not null, reason text not null,
  permanent boolean not null, attempts int not null default 1,
  created_at timestamptz not null default now(), updated_at timestamptz not null default now());
create function forget_asset_embedding() returns trigger language plpgsql
  as 'begin return null; end';
create trigger forget_asset_embedding after update of image_url on assets
  for each row execute function forget_asset_embedding();
create function match_products(
  query_embedding extensions.vector(512), match_count int default 10, client text default null,
  model_version text default null
) returns table (asset_id uuid, image_url text, similarity float8) language sql
  as 'select null::uuid, null, null::float8';
create function similar_products(asset_id uuid, match_count int default 10)
  returns table (asset_id uuid, image_url text, similarity float8) language sql
  as 'select null::uuid, null, null::float8';
""" + "".join(
    f"create function {name}() returns trigger language plpgsql as 'begin return new; end';"
    f"create trigger {name} before insert or update on {table}"
    f"  for each row execute function {name}();"
    for name, table in [
        ("await_image_change", TABLES[0]),
        ("clear_embedding_failure", TABLES[0]),
        ("skip_embedding_failure", TABLES[1]),
        ("count_embedding_attempt", TABLES[1]),
    ]
)


def test_the_triggers_and_functions_of_the_version_before_are_gone(stack):
    stack.reset(schema=False)
    fill(stack, 1)
    stack.sql_as_editor(OLD_SCHEMA)
    stack.sql("insert into product_embeddings select id, %s, %s from assets", [ONES, VERSION])
    stack.apply_schema()
    assert len(rows(stack)) == 1
    triggers = "select tgname, tgrelid::regclass::text from pg_trigger where not tgisinternal"
    assert stack.sql(triggers) == [("forget_embedding", "assets")]
    functions = (
        "select proname from pg_proc where pronamespace = 'public'::regnamespace "
        "and proowner = 'editor'::regrole order by 1"
    )
    assert [name for (name,) in stack.sql(functions)] == [
        "duplicate_products",
        "embedding_back_off",
        "embedding_gallery",
        "embedding_status",
        "forget_embedding",
        "match_products",
        "pending_assets",
        "similar_products",
        "store_embedding_rows",
        "store_embeddings",
    ]


def test_a_large_table_is_not_indexed_while_the_app_waits(older):
    older.sql(
        "insert into product_embeddings select gen_random_uuid(), %s, 'x', now(), now() "
        "from generate_series(1, 10001)",
        [ONES],
    )
    indexes = "select count(*) from pg_indexes where indexdef like '%hnsw%'"
    older.apply_schema()
    assert older.sql(indexes) == [(0,)]
    older.sql("delete from product_embeddings")
    older.apply_schema()
    assert older.sql(indexes) == [(1,)]


def test_the_recipe_for_a_large_first_load_runs_as_it_stands(stack):
    stack.sql_as_editor(*snippets("drop index"))
    (recipe,) = snippets("create index concurrently")
    with psycopg.connect(stack.db_uri, user="editor", autocommit=True) as editor:
        for statement in statements(recipe):
            editor.execute(statement)
    stack.apply_schema()  # finds the index and makes no second one
    assert stack.sql("select count(*) from pg_indexes where indexdef like '%hnsw%'") == [(1,)]
    (index,) = snippets("create index on public.assets")
    stack.sql_as_editor(index)


# Your tables


def put_in(select, script=None):
    """The file with another select in its view."""
    made, count = re.subn(
        r"(with \(security_invoker = true\) as\n).*?;",
        lambda match: match[1] + select,
        script or schema(),
        count=1,
        flags=re.DOTALL,
    )
    assert count == 1
    return made


def test_each_variant_of_the_view_runs_as_it_stands(stack):
    variants = [text for text in snippets(" as client") if text.startswith("select")]
    assert len(variants) == 4
    for variant in variants:
        stack.reset(schema=False, clients=True)
        stack.sql_as_editor("alter table assets add published bool, add image_path text")
        script = put_in(variant)
        if "image_path" in variant:
            script = re.sub(r"(update of |old\.|new\.)image_url", r"\1image_path", script)
        stack.apply_schema(script=script)
        stack.reload_schema()
        stack.sql("insert into clients values (1, 'x')")
        ids = fill(stack, 2)
        stack.sql("update assets set client_id = 1, image_path = 'a.jpg'")
        stack.sql("update assets set published = id = %s", [ids[0]])
        api = Api(stack, stack.service_key)
        client = None if "null::text" in variant else "x"
        pending = api.pending(client=client)["assets"]
        assert [a["id"] for a in pending] == (ids[:1] if "published" in variant else ids)
        if "image_path" in variant:
            assert pending[0]["image"] == "https://cdn.example.com/a.jpg"
        assert set(api.store(pending, []).values()) == {"stored"}
        assert api.status(client=client)["done"] == len(pending)
        column = "image_path" if "image_path" in variant else "image_url"
        stack.sql(f"update assets set {column} = 'b.jpg'")
        assert rows(stack) == []


def test_other_names_are_changed_in_one_section(stack):
    stack.reset(schema=False)
    stack.sql_as_editor("create table goods (sku uuid primary key, photo text, brand text)")
    start, end = schema().index("-- Your tables ---"), schema().index("-- Tables ---")
    section = schema()[start:end]
    names = {"public.assets": "public.goods", "image_url": "photo", "client_name": "brand"}
    for old, new in (*names.items(), ("a.id", "a.sku as id"), ("(id)", "(sku)"), ("'id'", "'sku'")):
        assert old in section
        section = section.replace(old, new)
    stack.apply_schema(script=schema()[:start] + section + schema()[end:])
    stack.reload_schema()
    api = Api(stack, stack.service_key)
    asset = str(uuid.uuid4())
    stack.sql("insert into goods values (%s, 'a.jpg', 'x')", [asset])
    assert api.store(api.pending(client="x")["assets"]) == {asset: "stored"}
    assert [m["image"] for m in api.call("match_products", query_embedding=ONES)] == ["a.jpg"]
    stack.sql("update goods set photo = 'b.jpg'")
    assert api.status()["done"] == 0
    assert api.store(api.pending()["assets"]) == {asset: "stored"}
    stack.sql("delete from goods")
    assert rows(stack) == []


@pytest.mark.parametrize(
    "select",
    [
        "select a.id, a.image_url as image from public.assets a;",
        "select a.id, a.image_url as image, 7 as client from public.assets a;",
        "select distinct a.id, a.image_url as image, a.client_name as client from public.assets a;",
        """select a.id, a.image_url as image, c.name as client from public.assets a
           left join public.clients c on c.id = a.client_id;""",
        "select a.image_url as id, a.image_url as image, a.client_name as client from assets a;",
    ],
)
def test_a_view_that_will_not_do_is_refused_with_a_hint(stack, select):
    stack.reset(schema=False, clients=True)
    with pytest.raises(psycopg.Error) as error:
        stack.apply_schema(script=put_in(select))
    assert "embedding_sources must give" in error.value.diag.message_hint


ODD_IDS = [
    "it's",
    'with "quotes"',
    "a,b",
    "(c)",
    "d e",
    "100%",
    "%2C",
    "null",
    "Ünïcødé 猫 🐈",
    "back\\slash",
    "{braces}",
    " ",
    "new\nline",
    "00000000-0000-0000-0000-000000000001",
]


def test_ids_of_text_may_hold_anything(stack):
    stack.reset("text")
    stack.add_assets((i, f"https://images.invalid/{n}", "x") for n, i in enumerate(ODD_IDS))
    api = Api(stack, stack.service_key)
    assets = api.walk(wanted=1)
    assert sorted(a["id"] for a in assets) == sorted(ODD_IDS)
    assert api.store(assets[:7], assets[7:]) == {
        a["id"]: "stored" if n < 7 else "noted" for n, a in enumerate(assets)
    }
    failed = api.walk(wanted=2, failed_before="infinity", permanent_too=True)
    assert api.store(failed) == {a["id"]: "stored" for a in failed}
    assert api.status()["done"] == len(ODD_IDS)
    for one in ODD_IDS:
        others = [m["asset_id"] for m in api.call("similar_products", asset_id=one, match_count=99)]
        assert sorted([one, *others]) == sorted(ODD_IDS)


def test_ids_may_be_numbers(stack):
    stack.reset("bigint")
    most = 2**63 - 1
    stack.add_assets([(1, "a", "x"), (10, "b", "x"), (9, "c", "x"), (most, "d", "x")])
    api = Api(stack, stack.service_key)
    assets = api.walk(wanted=1)
    assert [a["id"] for a in assets] == [1, 9, 10, most]
    assert set(api.store(assets).values()) == {"stored"}
    pages = [api.call("duplicate_products", page=3)]
    pages.append(api.call("duplicate_products", page=3, after=pages[0]["last"]))
    assert [page["last"] for page in pages] == [10, None]
    pairs = [(p["asset_id"], p["duplicate_id"]) for page in pages for p in page["pairs"]]
    assert sorted(pairs) == [(1, 9), (1, 10), (1, most), (9, 10), (9, most), (10, most)]


# Who may do what


CALLS = [
    *(("GET", table, None) for table in ("embedding_sources", *TABLES)),
    *(("DELETE", f"{table}?model_version=eq.{VERSION}", None) for table in TABLES),
    *(("PATCH", f"{table}?model_version=eq.{VERSION}", {"model_version": "x"}) for table in TABLES),
    *(("POST", table, {"model_version": "x"}) for table in TABLES),
    ("POST", "rpc/embedding_status", {"model_version": VERSION}),
    ("POST", "rpc/pending_assets", {"model_version": VERSION}),
    ("POST", "rpc/store_embeddings", {"model_version": VERSION}),
    ("POST", "rpc/store_embedding_rows", {"model_version": "x", "vectors": [], "failures": []}),
    ("POST", "rpc/embedding_back_off", {"attempts": 1, "reason": "x"}),
    ("POST", "rpc/match_products", {"query_embedding": ONES}),
    ("POST", "rpc/similar_products", {"asset_id": str(uuid.UUID(int=1))}),
    ("POST", "rpc/duplicate_products", {}),
    ("POST", "rpc/embedding_gallery", {"model_version": VERSION}),
]


@pytest.mark.parametrize("old_grants", [False, True])
def test_others_than_the_service_role_see_and_do_nothing(stack, old_grants):
    stack.reset(old_grants=old_grants)
    for api in (Api(stack, stack.anon_key), user(stack)):
        for method, path, body in CALLS:
            answer = api(method, path, body)
            assert answer.status_code in (401, 403), (method, path, answer.text)
            assert answer.json()["code"] == "42501"
            if path.startswith("rpc/"):  # refused at the door, not first by a table behind it
                assert "function" in answer.json()["message"]


def test_row_level_security_holds_even_where_rights_were_granted(stack, api):
    fill(stack, 2)
    one, two = api.pending()["assets"]
    api.store([one], [two])
    for table in TABLES:
        stack.sql(f"grant all on {table} to anon")
        answer = Api(stack, stack.anon_key)("GET", table)
        assert (answer.status_code, answer.json()) == (200, [])


def test_the_script_needs_no_right_on_the_assets(stack, api):
    stack.sql("revoke all on assets from service_role")
    assert api("GET", "assets").status_code == 403
    (asset,) = fill(stack, 1)
    assert api.store(api.pending()["assets"]) == {asset: "stored"}
    assert api.status()["done"] == 1


@pytest.mark.parametrize("function", ["store_embedding_rows", "embedding_back_off"])
def test_the_parts_of_other_functions_are_not_for_callers(stack, api, function):
    (call,) = (call for call in CALLS if function in call[1])
    answer = api(*call)
    assert (answer.status_code, answer.json()["code"]) == (403, "42501")


def test_the_service_role_reads_and_deletes_rows(stack, api):
    fill(stack, 2)
    one, two = api.pending()["assets"]
    api.store([one], [two])
    for table, asset in zip(TABLES, (one, two), strict=True):
        assert [row["asset_id"] for row in api("GET", table).json()] == [asset["id"]]
        assert api("DELETE", f"{table}?asset_id=eq.{asset['id']}").status_code == 204


def test_signed_in_users_find_what_they_may_see_once_the_search_is_open(stack, api):
    mine, theirs = fill(stack, 2)
    stack.sql(f"update assets set client_name = 'theirs' where id = '{theirs}'")
    api.store(api.pending()["assets"])
    stack.sql_as_editor("""
        alter table assets enable row level security;
        grant select on assets to authenticated;
        create policy "of one's client" on assets for select to authenticated using (
          client_name = current_setting('request.jwt.claims')::json ->> 'client');
    """)
    (opening,) = snippets("create policy")
    for _ in range(2):
        stack.sql_as_editor(opening)
    for client, seen in (("x", [mine]), ("theirs", [theirs]), ("none", [])):
        me = user(stack, client=client)
        assert [m["asset_id"] for m in me.call("match_products", query_embedding=ONES)] == seen
        assert [r["asset_id"] for r in me("GET", TABLES[0]).json()] == seen
        assert me.call("similar_products", asset_id=mine) == []
        assert me.call("duplicate_products")["pairs"] == []
        assert me("GET", TABLES[1]).status_code == 403
        assert me("POST", "rpc/pending_assets", {"model_version": "x"}).status_code == 403
    anon = Api(stack, stack.anon_key)
    assert anon("POST", "rpc/match_products", {"query_embedding": ONES}).status_code == 401
    assert anon("GET", TABLES[0]).status_code == 401
    assert len(api.call("match_products", query_embedding=ONES)) == 2


# What there is, and what is pending


def test_the_status_of_an_empty_catalog(stack, api):
    status = api.status()
    assert abs(time.time() - api_time(status)) < 60
    del status["time"]
    assert status == {
        "contract": 1,
        "dimensions": 512,
        "client_exists": True,
        "assets": 0,
        "done": 0,
        "failed_for_now": 0,
        "waiting": 0,
        "failed_for_good": 0,
    }
    assert api.pending() == {"assets": [], "last": None}


def api_time(status):
    from datetime import datetime

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
    assert (status["assets"], status["done"], status["failed_for_now"]) == (
        len(states),
        states.count("done"),
        states.count("for now"),
    )
    assert status["failed_for_good"] == states.count("for good")


def test_shards_partition_the_catalog(mixture):
    whole, parts = mixture.api.status(), []
    for shard in range(1, 5):
        parts.append(mixture.api.status(shard=shard, shards=4))
        got = [a["id"] for a in mixture.api.walk(shard=shard, shards=4, wanted=7)]
        parts[-1]["pending"] = got
    for count in ("assets", "done", "failed_for_now", "failed_for_good"):
        assert sum(part[count] for part in parts) == whole[count]
    pending = sorted(i for part in parts for i in part["pending"])
    assert pending == [i for i in mixture.ids if mixture.states[i] in NEW]
    assert min(part["assets"] for part in parts) > 40
    failed = mixture.api.walk(shard=2, shards=4, failed_before="infinity")
    assert len(failed) == parts[1]["failed_for_now"]


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
    assert status["failed_for_now"] == 2


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
    ["[1, 2]", "[]", "none", None, "[NaN" + ", 1" * 511 + "]", "[1e99" + ", 1" * 511 + "]"],
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
    ids = fill(stack, 100)
    assets = api.pending()["assets"]
    api.store(assets[:98], assets[98:])
    other.execute("lock table product_embeddings in share mode")
    began = time.monotonic()
    stack.sql("update assets set image_url = image_url || '?new'")
    assert time.monotonic() - began < 1.5
    other.commit()
    status = api.status()
    assert (status["done"], status["failed_for_now"], status["failed_for_good"]) == (0, 98, 0)
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
    (asset,) = fill(stack, 1)
    api.store(api.pending()["assets"])
    other.execute("select from product_embeddings for update")
    began = time.monotonic()
    stack.sql("update assets set image_url = 'new'")
    assert time.monotonic() - began < 1.5
    other.commit()
    marked = api.pending(failed_before="infinity")["assets"]
    assert api.store(marked) == {asset: "stored"}
    assert api.status()["done"] == 1


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
