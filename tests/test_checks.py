"""Checks before the model is loaded: each ends the run with one line that says what to do."""

import json
import re
import uuid

import jwt
import pytest

SQL = re.compile(r'\b((?:alter table|grant|create) [^"]*)(?:"|$)')  # what a message says to run
JSON = [("Content-Type", "application/json")]
HTML = [("Content-Type", "text/html")]


@pytest.fixture
def catalog(stack, host):
    """Three assets of two clients."""
    paths = ("/flower.jpg", "/china.jpg", "/rocket.jpg")
    stack.add_assets((uuid.uuid4(), host.url_of(p), f"client-{p < '/f'}") for p in paths)
    return stack


@pytest.fixture
def refused(cli, catalog, tmp_path):
    """Runs the script, which must refuse to, before it looks at the model; returns the line."""

    def refused(*args, **settings):
        before = dump(catalog)
        run = cli(*args, CLIP_MODEL=tmp_path, **settings)  # this one would fail in its own way
        assert run.code == 2, run.err
        assert "CLIP_MODEL" not in run.err
        assert run.err.splitlines()[-1] == run.error
        assert run.out == ""
        assert dump(catalog) == before
        return run.error

    return refused


def dump(stack):
    """Every row of every table."""
    tables = stack.sql("select tablename from pg_tables where schemaname = 'public' order by 1")
    return {t: stack.sql(f'select t::text, xmin::text from "{t}" t order by 1') for (t,) in tables}


def change(stack, *statements):
    for statement in statements:
        stack.sql(statement)
    stack.reload_schema()


def answer(status, code, message):
    return status, JSON, json.dumps({"code": code, "message": message}).encode()


# The way to the database


def test_an_address_where_nothing_answers(refused, cli):
    starts = [
        cli.start(SUPABASE_URL=url) for url in ("http://127.0.0.1:9", "http://nowhere.invalid")
    ]
    for run in (start.finish() for start in starts):
        assert run.code == 2
        assert "SUPABASE_URL" in run.error
        assert "no answer" in run.error


def test_an_address_that_is_no_supabase(refused, host):
    assert "SUPABASE_URL" in refused(SUPABASE_URL=host.url)


@pytest.mark.parametrize(
    "reply",
    [
        (301, [("Location", "https://elsewhere.invalid/")], b""),
        (200, HTML, b"<html>Sign in to the network</html>"),
        (404, HTML, b"<html>Not found</html>"),
    ],
    ids=["a redirect", "a captive portal", "a page"],
)
def test_an_address_that_answers_otherwise(refused, catalog, reply):
    catalog.gateway.fault = lambda request: reply
    assert "SUPABASE_URL" in refused()


def test_a_gateway_whose_database_is_down(refused, catalog):
    catalog.gateway.fault = lambda request: (503, HTML, b"<html>Service Unavailable</html>")
    message = refused()
    assert "503" in message
    assert "the project's status" in message


@pytest.mark.parametrize(
    "key",
    [
        "sb_secret_of-another-project",
        jwt.encode({"role": "service_role"}, "the secret of another project, 32 long"),
    ],
    ids=["secret", "JWT"],
)
def test_a_key_of_another_project(refused, key):
    message = refused(SUPABASE_SERVICE_ROLE_KEY=key)
    assert "SUPABASE_SERVICE_ROLE_KEY" in message
    assert "refused" in message


@pytest.mark.parametrize("kind", ["anon_key", "publishable_key"])
def test_a_public_key(refused, catalog, kind):
    message = refused(SUPABASE_SERVICE_ROLE_KEY=getattr(catalog, kind))
    assert "SUPABASE_SERVICE_ROLE_KEY" in message
    assert "public" in message


def test_the_new_secret_key_is_fine(cli, catalog):
    run = cli("--dry-run", SUPABASE_SERVICE_ROLE_KEY=catalog.secret_key)
    assert run.code == 0, run.err
    assert run.out.startswith("Would embed 3 ")


# Tables and columns


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ASSETS_TABLE": "products"}, ["products", "ASSETS_TABLE"]),
        ({"ASSET_ID_COLUMN": "sku"}, ["sku", "ASSET_ID_COLUMN"]),
        ({"ASSET_IMAGE_COLUMN": "photo"}, ["photo", "ASSET_IMAGE_COLUMN"]),
        ({"EMBEDDINGS_TABLE": "vectors"}, ["vectors", "schema.sql", "EMBEDDINGS_TABLE"]),
    ],
)
def test_a_name_that_is_not_there(refused, settings, words):
    message = refused(**settings)
    assert all(word in message for word in words)


@pytest.mark.parametrize("column", ["brand", "clients.name"])
def test_a_client_column_that_is_not_there(refused, column):
    message = refused("--client", "client-1", ASSET_CLIENT_COLUMN=column)
    assert "ASSET_CLIENT_COLUMN" in message


@pytest.mark.parametrize("code", ["PGRST205", "42P01"])
def test_a_missing_table_in_the_words_of_any_postgrest(refused, catalog, code):
    missing = answer(404, code, "Could not find the table 'public.product_embeddings'")
    catalog.gateway.fault = lambda r: missing if "/product_embeddings?" in r.path else None
    message = refused()
    assert "schema.sql" in message
    assert "EMBEDDINGS_TABLE" in message


@pytest.mark.parametrize("code", ["PGRST204", "42703"])
def test_a_missing_column_in_the_words_of_any_postgrest(refused, catalog, code):
    missing = answer(400, code, "Could not find the 'photo' column of 'assets'")
    catalog.gateway.fault = lambda r: missing if "/assets?" in r.path else None
    message = refused(ASSET_IMAGE_COLUMN="photo")
    assert "photo" in message
    assert "ASSET_IMAGE_COLUMN" in message


def test_schema_sql_not_run_yet(cli, refused, catalog):
    change(catalog, "drop table product_embeddings", "drop table product_embedding_failures")
    message = refused()
    assert "product_embeddings" in message
    assert "run schema.sql" in message
    catalog.apply_schema()
    catalog.reload_schema()
    assert cli("--limit", 1).counts["embedded"] == 1


@pytest.mark.parametrize("column", ["embedding", "model_version", "created_at", "updated_at"])
def test_a_missing_column_of_the_embeddings(refused, catalog, column):
    change(catalog, f"alter table product_embeddings drop column {column}")
    message = refused()
    assert column in message
    assert "schema.sql" in message


def test_an_embedding_column_of_another_type(refused, catalog):
    change(
        catalog,
        "drop index product_embeddings_embedding_hnsw",
        "alter table product_embeddings alter embedding type real[] using null",
    )
    assert "product_embeddings" in refused()


def test_two_foreign_keys(refused, catalog):
    change(
        catalog, "alter table product_embeddings add column replaced_by uuid references assets (id)"
    )
    message = refused()
    assert "drop all foreign keys" in message


# Where the message gives SQL, that SQL is the cure


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (
            ["alter table product_embeddings drop constraint product_embeddings_asset_id_fkey"],
            ["foreign key", "product_embeddings", "assets"],
        ),
        (
            ["alter table product_embeddings drop constraint product_embeddings_pkey"],
            ["asset_id", "not unique", "primary key"],
        ),
        (
            [
                "drop index product_embeddings_embedding_hnsw",
                "alter table product_embeddings alter embedding type vector(384)",
            ],
            ["wrong size", "384", "512"],
        ),
        (
            ["revoke all on product_embeddings from service_role"],
            ["product_embeddings", "grant", "SUPABASE_SERVICE_ROLE_KEY"],
        ),
        (
            ["revoke insert, update on product_embeddings from service_role"],
            ["product_embeddings", "grant"],
        ),
        (["revoke all on assets from service_role"], ["assets", "grant"]),
    ],
    ids=[
        *("foreign key", "unique constraint", "vector size"),
        *("rights on embeddings", "right to write", "rights on assets"),
    ],
)
def test_the_sql_that_a_message_quotes_mends_the_fault(cli, refused, catalog, setup, words):
    change(catalog, *setup)
    message = refused()
    assert all(word in message for word in words), message
    (cure,) = SQL.findall(message)
    change(catalog, cure)
    if "schema.sql" in message:
        catalog.apply_schema()
        catalog.reload_schema()
    run = cli("--dry-run")  # the same checks
    assert run.code == 0, run.err
    assert run.out.startswith("Would embed 3 ")


# Clients


def test_a_client_without_assets_is_not_all_done(refused):
    message = refused("--client", "client-7")
    assert "client-7" in message
    assert "--client" in message


def test_an_empty_client_name_is_not_all_clients(cli, catalog):
    run = cli("--client", "", "--dry-run")
    assert run.code == 2
    assert "--client" in run.err


def test_an_empty_catalog_is_done_also_without_the_table_of_failures(cli, stack):
    change(stack, "drop table product_embedding_failures")
    assert cli().code == 0


def test_an_empty_catalog_is_done(cli, stack, tmp_path):
    run = cli(CLIP_MODEL=tmp_path)
    assert run.code == 0, run.err
    assert run.counts["attempted"] == run.counts["left"] == 0
