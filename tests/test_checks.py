"""What ends a run before the model is loaded: each in one line that says what to do."""

import uuid

import jwt
import pytest
from conftest import CLOSED, REPO, open_store, pending, vector
from stack import HTML, JSON

import generate_embeddings as script
from generate_embeddings import Embedded


@pytest.fixture
def trio(stack, host):
    """Three assets of two clients."""
    paths = ("/flower.jpg", "/china.jpg", "/rocket.jpg")
    stack.add_assets((uuid.uuid4(), host.url_of(p), f"client-{p < '/f'}") for p in paths)
    return stack


@pytest.fixture
def complaint(cli, trio, monkeypatch):
    """Asks for the status with these settings, which must end the run; returns why."""
    monkeypatch.chdir(cli.folder)
    monkeypatch.setattr(script, "CHECK_SECONDS", 0.5)

    def complaint(**settings):
        before = dump(trio)
        for name, value in cli.environment(**settings).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(script.RunError) as error:
            script.open_store(script.read_settings({}), script.Stop()).status()
        assert dump(trio) == before
        return str(error.value)

    return complaint


def works(stack):
    """Whether what is pending comes, and is stored."""
    store = open_store(stack)
    store.save([Embedded(asset, vector(1)) for asset in pending(store)])
    return len(stack.embedded()) == 3


def dump(stack):
    """Every row of every table."""
    tables = stack.sql("select tablename from pg_tables where schemaname = 'public' order by 1")
    return {t: stack.sql(f'select t::text, xmin::text from "{t}" t order by 1') for (t,) in tables}


# The way to the database


def test_what_ends_a_run_before_it_begins_is_one_line(cli, trio, tuned, tmp_path):
    before = dump(trio)
    # This model would fail in its own way
    run = cli("CHECK_SECONDS=0.5", "--", script=tuned, SUPABASE_URL=CLOSED, CLIP_MODEL=tmp_path)
    assert run.code == 2, run.err
    assert "CLIP_MODEL" not in run.err
    assert run.err.splitlines()[-1] == run.error
    assert run.out == ""
    assert dump(trio) == before


@pytest.mark.parametrize("url", [CLOSED, "http://nowhere.invalid"])
def test_an_address_where_nothing_answers(complaint, url):
    message = complaint(SUPABASE_URL=url)
    assert "no answer from the database" in message
    assert "check SUPABASE_URL" in message


def test_an_address_that_is_no_supabase(complaint, host):
    assert f"{host.url} answers with HTTP 404, Not Found" in complaint(SUPABASE_URL=host.url)


NO_ROUTE = b'{"message":"no Route matched with those values"}'
BAD_UPSTREAM = b'{"message":"An invalid response was received from the upstream server"}'


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (
            (301, [("Location", "https://elsewhere.invalid/")], b""),
            "answers with HTTP 301, Moved Permanently: check SUPABASE_URL",
        ),
        ((200, HTML, b"<html>Sign in to the network</html>"), "check SUPABASE_URL"),
        ((404, HTML, b"<html>Not found</html>"), "answers with HTTP 404, Not Found"),
        ((404, JSON, NO_ROUTE), "answers with HTTP 404, no Route matched"),
        ((502, JSON, BAD_UPSTREAM), "check SUPABASE_URL"),
        ((503, HTML, b"<html>Service Unavailable</html>"), "check SUPABASE_URL"),
    ],
    ids=["a redirect", "a captive portal", "a page", "another gateway", "no API", "no database"],
)
def test_an_address_that_answers_otherwise(complaint, trio, reply, said):
    trio.gateway.fault = lambda request: reply
    assert said in complaint()


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
def test_a_key_that_will_not_do(complaint, trio, setting, key):
    others = {"SUPABASE_SECRET_KEY": None, "SUPABASE_SERVICE_ROLE_KEY": None}
    message = complaint(**others | {setting: getattr(trio, key, key)})
    assert f"{setting} (from the environment)" in message
    assert "copy a secret key (sb_secret_...) from the dashboard" in message


# What is in the database


def test_schema_sql_not_run_yet(complaint, trio):
    trio.reset(schema=False)
    message = complaint()
    assert "embedding_status" in message
    assert "run this version's schema.sql" in message
    trio.apply_schema()
    trio.reload_schema()
    assert open_store(trio).status().assets == 0


@pytest.mark.parametrize("version", ["2", "4"])
def test_functions_of_another_version(complaint, trio, version):
    schema = (REPO / "schema.sql").read_text()
    assert "'contract', 3," in schema
    trio.apply_schema(script=schema.replace("'contract', 3,", f"'contract', {version},"))
    message = complaint()
    assert "another version of schema.sql" in message
    assert '"How to remove it", but not the last one; then run this version' in message


@pytest.mark.parametrize("lost", ["function embedding_sources", "table product_embedding_failures"])
def test_a_function_or_table_that_is_lost(complaint, trio, lost):
    trio.sql(f"drop {lost} cascade")
    message = complaint()
    assert lost.split()[1] in message
    assert "run this version's schema.sql" in message
    trio.apply_schema()
    trio.reload_schema()
    assert works(trio)


# Clients


@pytest.mark.parametrize(
    ("client", "hint"),
    [
        ("nobody", "check the spelling"),
        ("", "check the spelling"),
        ("Client-True", r"did you mean 'client-True'\?"),
        ("client-Fals", r"did you mean 'client-False'\?"),
    ],
)
def test_a_client_without_assets_is_not_all_done(trio, client, hint):
    with pytest.raises(script.RunError, match=f"no asset is of client '{client}': {hint}"):
        open_store(trio, client=client).status()


def test_an_empty_catalog_is_not_all_done(cli, stack, tmp_path):
    run = cli(CLIP_MODEL=tmp_path)
    assert run.code == 0, run.err
    assert "there are no assets yet" in run.err
    assert run.counts == run.counts | {"attempted": 0, "left": 0}
