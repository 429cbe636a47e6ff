"""What ends a run before the model is loaded: each in one line that says what to do.

- An address where no Supabase answers, a key that will not do, a schema.sql that was not run, that
  lost something, or that is another version's.
- A client without assets is not "all done"; an empty catalog is no failure.
"""

import re
import uuid

import jwt
import pytest
from conftest import CLOSED, REPO, SCRIPT, open_store
from stack import HTML, JSON

import generate_embeddings as script


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
    monkeypatch.setattr(script, "CHECK_SECONDS", 0.2)

    def complaint(**settings):
        for name, value in cli.environment(**settings).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(script.RunError) as error:
            script.open_store(script.read_settings({}), script.Stop()).status()
        return str(error.value)

    return complaint


@pytest.mark.parametrize(
    ("flags", "url", "words"),
    [
        ([], CLOSED, "no answer from the database for .*: check SUPABASE_URL"),
        ([], "nowhere.invalid", "SUPABASE_URL .* is not like"),
        (["--local", "no/such/folder"], None, "no/such/folder"),
        (["--local", str(SCRIPT)], None, str(SCRIPT)),
        (["--local", "{small}", "--search", "mug"], None, "nothing is embedded yet as tiny: run"),
    ],
)
def test_what_ends_a_run_before_it_begins_is_one_line(cli, tuned, small, flags, url, words):
    # This model would fail in its own way
    settings = {"SUPABASE_URL": url, "SUPABASE_SECRET_KEY": "sb_secret_abc", "CLIP_MODEL": small}
    flags = [flag.format(small=small) for flag in flags]
    run = cli("CHECK_SECONDS=0.2", "--", *flags, script=tuned, **settings)
    assert (run.code, run.out) == (2, ""), run.err
    assert re.search(words, run.error)
    assert run.err.splitlines()[-1] == run.error
    assert "CLIP_MODEL" not in run.err


NO_ROUTE = b'{"message":"no Route matched with those values"}'
BAD_UPSTREAM = b'{"message":"An invalid response was received from the upstream server"}'
ELSEWHERE = [("Location", "https://elsewhere.invalid/")]
RESPONSES = {
    "a redirect": ((301, ELSEWHERE, b""), "answers with HTTP 301, "),
    "a captive portal": ((200, HTML, b"<html>Sign in</html>"), "check SUPABASE_URL"),
    "a page": ((404, HTML, b"<html>Not found</html>"), "answers with HTTP 404, Not Found"),
    "no API": ((404, JSON, NO_ROUTE), "answers with HTTP 404, no Route matched"),
    "no database": ((502, JSON, BAD_UPSTREAM), "check SUPABASE_URL"),
}


@pytest.mark.parametrize("what", RESPONSES)
def test_an_address_that_answers_otherwise(complaint, trio, what):
    response, said = RESPONSES[what]
    trio.gateway.fault = lambda request: response
    assert said in complaint()


KEYS = {
    "sb_secret_of-another-project": "SUPABASE_SECRET_KEY",
    jwt.encode({"role": "service_role"}, "x" * 32): "SUPABASE_SERVICE_ROLE_KEY",
    "anon_key": "SUPABASE_SECRET_KEY",
    "publishable_key": "SUPABASE_SERVICE_ROLE_KEY",
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_will_not_do(complaint, trio, key):
    setting = KEYS[key]
    others = dict.fromkeys(KEYS.values())
    message = complaint(**others | {setting: getattr(trio, key, key)})
    assert f"{setting} (from the environment)" in message
    assert "copy a secret key (sb_secret_...) from the dashboard" in message


def test_a_schema_sql_that_lacks_something_is_to_be_run(complaint, trio):
    for lost in ("function embedding_sources", "table product_embedding_failures"):
        trio.sql(f"drop {lost} cascade")
        message = complaint()
        assert lost.split()[1] in message
        assert "run this version's schema.sql" in message
        trio.apply_schema()
        trio.reload_schema()
    trio.reset(schema=False)
    message = complaint()
    assert "embedding_status" in message
    assert "run this version's schema.sql" in message


@pytest.mark.parametrize("version", ["2", "4"])
def test_functions_of_another_version(complaint, trio, version):
    schema = (REPO / "schema.sql").read_text()
    assert "'contract', 3," in schema
    trio.apply_schema(script=schema.replace("'contract', 3,", f"'contract', {version},"))
    message = complaint()
    assert "another version of schema.sql" in message
    assert '"How to remove it", but not the last one; then run this version' in message


@pytest.mark.parametrize(
    ("client", "advice"),
    [("", "check the spelling"), ("client-Fals", r"did you mean 'client-False'\?")],
)
def test_a_client_without_assets_is_not_all_done(trio, client, advice):
    with pytest.raises(script.RunError, match=f"no asset is of client '{client}': {advice}"):
        open_store(trio, client=client).status()


def test_an_empty_catalog_is_not_all_done(cli, stack, tmp_path):
    run = cli(CLIP_MODEL=tmp_path)
    assert run.code == 0, run.err
    assert "there are no assets yet" in run.err
    assert run.counts == run.counts | {"attempted": 0, "left": 0}
