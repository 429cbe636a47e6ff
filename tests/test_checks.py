"""What ends a run before the model is loaded: each in one line that says what to do."""

import uuid

import jwt
import pytest
from conftest import REPO

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


# The way to the database


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://nowhere.invalid"])
def test_an_address_where_nothing_answers(refused, url):
    message = refused(SUPABASE_URL=url)
    assert "no answer from the database" in message
    assert "check SUPABASE_URL" in message


def test_an_address_that_is_no_supabase(refused, host):
    assert "does not answer like a Supabase project" in refused(SUPABASE_URL=host.url)


@pytest.mark.parametrize(
    "reply",
    [
        (301, [("Location", "https://elsewhere.invalid/")], b""),
        (200, HTML, b"<html>Sign in to the network</html>"),
        (404, HTML, b"<html>Not found</html>"),
        (404, JSON, b'{"message":"no Route matched with those values"}'),
        (502, JSON, b'{"message":"An invalid response was received from the upstream server"}'),
        (503, HTML, b"<html>Service Unavailable</html>"),
    ],
    ids=["a redirect", "a captive portal", "a page", "another gateway", "no API", "no database"],
)
def test_an_address_that_answers_otherwise(refused, catalog, reply):
    catalog.gateway.fault = lambda request: reply
    message = refused()
    assert f"{catalog.url} does not answer like" in message or "check SUPABASE_URL" in message


@pytest.mark.parametrize("setting", ["SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"])
@pytest.mark.parametrize(
    "key",
    [
        "sb_secret_of-another-project",
        jwt.encode({"role": "service_role"}, "the secret of another project, 32 long"),
        "anon_key",
        "publishable_key",
    ],
    ids=["another project's", "another project's JWT", "anon", "publishable"],
)
def test_a_key_that_will_not_do(refused, catalog, setting, key):
    others = {"SUPABASE_SECRET_KEY": None, "SUPABASE_SERVICE_ROLE_KEY": None}
    message = refused(**others | {setting: getattr(catalog, key, key)})
    assert f"{setting} (from the environment)" in message
    assert "copy a secret key (sb_secret_...) from the dashboard" in message


def test_the_new_secret_key_is_fine_and_comes_first(cli, catalog):
    keys = {"SUPABASE_SECRET_KEY": catalog.secret_key, "SUPABASE_SERVICE_ROLE_KEY": "sb_secret_x"}
    run = cli("--dry-run", **keys)
    assert run.code == 0, run.err
    assert run.out.startswith("Would embed 3 ")


# What is in the database


def test_schema_sql_not_run_yet(cli, refused, catalog):
    catalog.reset(schema=False)
    message = refused()
    assert "embedding_status" in message
    assert "run this version's schema.sql" in message
    catalog.apply_schema()
    catalog.reload_schema()
    assert cli().code == 0


@pytest.mark.parametrize("version", ["0", "2"])
def test_functions_of_another_version(refused, catalog, version):
    script = (REPO / "schema.sql").read_text()
    assert "'contract', 1," in script
    catalog.apply_schema(script=script.replace("'contract', 1,", f"'contract', {version},"))
    message = refused()
    assert "of another version" in message
    assert "run this version's schema.sql" in message


@pytest.mark.parametrize("lost", ["view embedding_sources", "table product_embedding_failures"])
def test_a_view_or_table_that_is_lost(cli, refused, catalog, lost):
    catalog.sql(f"drop {lost} cascade")
    message = refused()
    assert lost.split()[1] in message
    assert "run this version's schema.sql" in message
    catalog.apply_schema()
    catalog.reload_schema()
    assert cli().counts["embedded"] == 3


# Clients


def test_a_client_without_assets_is_not_all_done(refused):
    assert "no asset is of client 'client-7': check the spelling" in refused("--client", "client-7")


def test_an_empty_client_name_is_not_all_clients(refused):
    assert "no asset is of client ''" in refused("--client", "")


def test_an_empty_catalog_is_not_all_done(cli, stack, tmp_path):
    run = cli(CLIP_MODEL=tmp_path)
    assert run.code == 0, run.err
    assert "there are no assets yet" in run.err
    assert run.counts == run.counts | {"attempted": 0, "left": 0}
