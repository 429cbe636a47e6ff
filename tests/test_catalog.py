"""A catalog as they are: a third of the images is bad, each in its own way, and every bad one
costs one line in the report and is remembered for what it is.
"""

import io
import json
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial

import numpy as np
import pytest
from conftest import renew, stack_cli
from PIL import Image
from stack import ImageHost
from test_fetch import NO_LENGTH, cut, good, hang_up, in_turn, length, raw, redirect, status
from test_images import NO_IMAGES, exif, inverted, png, saved, without_segment

FETCH_SECONDS = 5  # more than four attempts take, also on a busy machine
GOOD, EACH = 140, 2  # images; and bad ones of each kind


@dataclass(frozen=True)
class Bad:
    """A way to be bad: `answer` is the host's, `image` another value of the column than a path
    of that host."""

    reason: str
    permanent: bool = True
    stage: str = "decode"
    answer: object = None
    image: str | None = "host"


refused = partial(Bad, stage="fetch")
passing = partial(Bad, stage="fetch", permanent=False)


def closed_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def some_ways_to_be_bad():
    picture = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB")
    jpeg, lossless = saved(picture, "JPEG"), saved(picture, "PNG")
    return {
        "empty": Bad("empty file", answer=b""),
        "truncated.jpg": Bad("truncated", answer=jpeg[: len(jpeg) // 2]),
        "truncated.png": Bad("truncated", answer=lossless[: len(lossless) // 2]),
        "pixel": Bad("smaller than 16 pixels", answer=saved(Image.new("P", (1, 1)), "GIF")),
        "strip": Bad("strip", answer=saved(Image.new("L", (20, 2001)), "PNG")),
        "huge": Bad("megapixels", answer=png((20000, 20000), 8, 0, [bytes(20000)])),
        "depth": Bad("not supported", answer=saved(Image.new("F", (32, 32)), "TIFF")),
        "svg": Bad("SVG", answer=NO_IMAGES["svg with a prolog"][0]),
        "html": Bad("HTML", answer=good(("Content-Type", "image/png"), body=b"<!doctype html>")),
        "json": Bad("JSON", answer=b'{"error": 1}'),
        "pdf": Bad("PDF", answer=b"%PDF-1.7"),
        "text": Bad("not an image", answer=b"please log in"),
        "400": refused("HTTP 400", answer=status(400)),
        "401": refused("HTTP 401", answer=status(401)),
        "403": refused("HTTP 403", answer=status(403)),
        "404": refused("HTTP 404"),
        "410": refused("HTTP 410", answer=status(410)),
        "loop": refused("redirects", answer=redirect("?again")),
        "to a file": refused("only http", answer=redirect("file:///etc/passwd")),
        "endless": refused("larger than", answer=raw(NO_LENGTH, b"x" * 2**18)),
        "no URL": refused("no image URL", image=None),
        "scheme": refused("only http", image="ftp://shop.example/a.jpg"),
        "invalid": refused("not a valid URL", image="http://[::1"),
        "data": refused("data: URL", image="data:image/png;base64"),
        "503": passing("HTTP 503", answer=status(503)),
        "429": passing("HTTP 429", answer=status(429, ("Retry-After", "3600"))),
        "reset": passing("connection lost", answer=raw(length(999), b"x", end=cut)),
        "short": passing("connection lost", answer=raw(length(999), b"x", end=hang_up)),
        "slow": passing("not complete within", answer=raw(length(999), b"x", pause=0.2)),
        "closed": passing("connection refused", image=f"http://127.0.0.1:{closed_port()}/a.jpg"),
    }


BAD = some_ways_to_be_bad()


def ids():
    """Ids in rising order."""
    return (str(uuid.UUID(int=n)) for n in range(1, 10**6))


def failures(stack):
    """asset id -> (stage, reason, permanent, attempts)."""
    rows = stack.sql(
        "select asset_id, stage, reason, permanent, attempts from product_embedding_failures"
    )
    return {str(row[0]): row[1:] for row in rows}


def vectors(stack):
    """asset id -> vector."""
    rows = stack.sql("select asset_id, embedding::text from product_embeddings")
    return {str(asset): np.array(json.loads(vector)) for asset, vector in rows}


def paths(host):
    """What the host was asked for since the last call, without queries."""
    asked = {path.split("?")[0] for path, _ in host.requests}
    host.requests.clear()
    return asked


# --------------------------------------------------------------------------------------------------
# 200 assets, 60 of them bad in 30 ways
# --------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """A run's Result, what the host was asked for, and the failures as they are stored then."""

    result: object
    asked: set
    failures: dict


@dataclass
class Story:
    """Three runs over the catalog; `bad` is asset id -> name of the way in which it is bad."""

    bad: dict
    first: Seen
    second: Seen
    retried: Seen
    embedded: int


@pytest.fixture(scope="module")
def story(_stack, photos, tiny, tmp_path_factory):
    renew(_stack)
    small = [name for name, data in photos.items() if len(data) < 200_000]
    run = stack_cli(_stack, tiny, tmp_path_factory.mktemp("cwd"))
    with ImageHost({f"/{name}": photos[name] for name in small}) as host:
        rows, bad, new_id = [], {}, ids()
        names = [name for name in BAD for _ in range(EACH)]
        for n in range(GOOD + len(names)):
            asset = next(new_id)
            if n % 10 < 3:  # three of ten, all over the catalog
                name = bad[asset] = names.pop()
                path = f"/bad/{asset}"
                host.files[path] = BAD[name].answer
                image = host.url_of(path) if BAD[name].image == "host" else BAD[name].image
            else:
                image = host.url_of(f"/{small[n % len(small)]}?{n}")
            rows.append((asset, image, "all"))
        _stack.add_assets(rows)

        def seen(*args):
            result = run(*args, FETCH_SECONDS=FETCH_SECONDS)
            return Seen(result, paths(host), failures(_stack))

        return Story(bad, seen(), seen(), seen("--retry-failed"), len(vectors(_stack)))


def test_the_bad_ones_are_60_in_30_ways(story):
    assert len(story.bad) == 60
    assert len(set(story.bad.values())) == 30


def test_the_good_ones_are_embedded_and_the_bad_ones_counted(story):
    result = story.first.result
    assert result.code == 1
    assert result.counts["embedded"] == GOOD == story.embedded
    assert result.counts["failed"] == 60
    assert result.counts["left"] == 0


def test_no_run_takes_longer_than_its_deadlines_allow(story):
    for run in (story.first, story.second, story.retried):
        assert run.result.seconds < 120  # the slow ones alone: 60 x 5 s, among 8 workers or more


@pytest.mark.parametrize("name", BAD)
def test_each_failure_is_named_and_remembered_for_what_it_is(story, name):
    way = BAD[name]
    found = [story.first.failures[asset] for asset, bad in story.bad.items() if bad == name]
    assert len(found) == EACH
    for stage, reason, permanent, attempts in found:
        assert way.reason in reason
        assert (stage, permanent, attempts) == (way.stage, way.permanent, 1)
        assert f"{stage}: {reason}" in story.first.result.out


def transient(story):
    return {asset for asset, name in story.bad.items() if not BAD[name].permanent}


def on_the_host(assets, story):
    return {f"/bad/{asset}" for asset in assets if BAD[story.bad[asset]].image == "host"}


def test_a_second_run_tries_only_what_may_have_passed(story):
    assert story.second.asked == on_the_host(transient(story), story)
    counts = story.second.result.counts
    assert counts["embedded"] == 0
    assert counts["failed"] == len(transient(story))
    assert counts["skipped"] == 60 - len(transient(story))
    assert story.second.result.code == 1


def test_retry_failed_tries_them_all(story):
    assert story.retried.asked == on_the_host(story.bad, story)
    counts = story.retried.result.counts
    assert (counts["embedded"], counts["failed"], counts["skipped"]) == (0, 60, 0)


def test_attempts_are_counted(story):
    for asset in story.bad:
        tried_twice = asset in transient(story)
        assert story.second.failures[asset][3] == (2 if tried_twice else 1)
        assert story.retried.failures[asset][3] == (3 if tried_twice else 2)


def test_known_failures_do_not_use_up_the_limit(stack, host, cli):
    new_id = ids()
    stack.add_assets((next(new_id), host.url_of(f"/gone/{n}"), None) for n in range(5))
    assert cli().counts["failed"] == 5
    stack.add_assets((next(new_id), host.url_of("/flower.jpg"), None) for _ in range(3))
    assert cli("--limit", "2").counts["embedded"] == 2
    counts = cli("--limit", "2").counts
    assert (counts["embedded"], counts["failed"], counts["skipped"]) == (1, 0, 5)


# --------------------------------------------------------------------------------------------------
# Failures and what becomes of them
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(stack, host, cli, photos):
    """One asset with a broken image at /a.jpg, tried once; its id."""
    asset = next(ids())
    host.files["/a.jpg"] = photos["flower.jpg"][:5000]
    stack.add_assets([(asset, host.url_of("/a.jpg"), None)])
    assert cli().code == 1
    assert failures(stack)[asset][2] is True
    host.requests.clear()
    return asset


def test_an_image_repaired_at_the_same_url_is_embedded_by_retry_failed(
    broken, stack, host, cli, photos
):
    host.files["/a.jpg"] = photos["flower.jpg"]
    run = cli()
    assert (run.code, run.counts["skipped"], host.requests) == (0, 1, [])
    run = cli("--retry-failed")
    assert (run.code, run.counts["embedded"], run.counts["skipped"]) == (0, 1, 0)
    assert failures(stack) == {}
    assert broken in vectors(stack)


def test_a_changed_image_url_clears_the_failure(broken, stack, host, cli):
    stack.sql("update assets set image_url = %s", [host.url_of("/flower.jpg")])
    assert failures(stack) == {}
    assert cli().counts["embedded"] == 1
    assert broken in vectors(stack)


def test_a_failure_of_another_model_version_does_not_count(broken, stack, cli):
    stack.sql("update product_embedding_failures set model_version = 'other'")
    counts = cli().counts
    assert (counts["failed"], counts["skipped"]) == (1, 0)


def test_a_transient_failure_is_gone_after_a_success(stack, host, cli, photos):
    host.files["/a.jpg"] = in_turn(
        status(429, ("Retry-After", "3600")), good(body=photos["flower.jpg"])
    )
    stack.add_assets([(next(ids()), host.url_of("/a.jpg"), None)])
    assert cli().code == 1
    assert len(failures(stack)) == 1
    assert cli().code == 0
    assert failures(stack) == {}


def test_a_database_without_the_failures_table_works_as_before_and_says_what_it_lacks(
    stack, host, cli
):
    stack.reset(schema=False)
    stack.sql(
        "create extension if not exists vector with schema extensions;"
        "create table product_embeddings (asset_id uuid primary key references assets"
        " on delete cascade, embedding extensions.vector(512) not null, model_version text not"
        " null, created_at timestamptz not null default now(), updated_at timestamptz not null"
        " default now())"
    )
    stack.reload_schema()
    new_id = ids()
    stack.add_assets((next(new_id), host.url_of(path), None) for path in ("/flower.jpg", "/gone"))
    for embedded in (1, 0):
        run = cli()
        assert (run.code, run.counts["embedded"], run.counts["failed"]) == (1, embedded, 1)
        lines = [line for line in run.err.splitlines() if "product_embedding_failures" in line]
        assert len(lines) == 1
        assert "schema.sql" in lines[0]
    assert [path for path, _ in host.requests].count("/gone") == 2


def test_when_the_network_is_gone_the_run_stops_instead_of_failing_the_whole_catalog(
    stack, host, cli
):
    closed = f"http://127.0.0.1:{closed_port()}"
    new_id = ids()
    stack.add_assets((next(new_id), host.url_of("/flower.jpg"), None) for _ in range(3))
    stack.add_assets((next(new_id), f"{closed}/{n}.jpg", None) for n in range(200))
    run = cli(FETCH_SECONDS="1.5")
    assert run.code == 2
    assert "50 images failed in a row" in run.error
    assert "connection refused" in run.error
    assert run.counts["embedded"] == len(vectors(stack)) == 3
    assert run.counts["attempted"] == run.counts["embedded"] + run.counts["failed"]
    assert run.counts["failed"] < 100
    assert run.counts["left"] == 203 - run.counts["attempted"]


def test_images_that_failed_before_keep_no_others_waiting(stack, host, cli):
    closed = f"http://127.0.0.1:{closed_port()}"
    new_id = ids()
    stack.add_assets((next(new_id), f"{closed}/{n}.jpg", None) for n in range(60))
    stack.add_assets((next(new_id), host.url_of("/flower.jpg"), None) for _ in range(5))
    assert cli("--workers", 8, FETCH_SECONDS="0.5").code == 2  # before it comes to the good ones
    before = len(vectors(stack))
    limited = cli("--limit", "3", FETCH_SECONDS="0.5")
    assert limited.counts["embedded"] == len(vectors(stack)) - before
    last = cli(FETCH_SECONDS="0.5")
    assert (last.code, len(vectors(stack)), last.counts["left"]) == (1, 5, 0)
    assert last.counts["failed"] == 60


def test_failures_of_this_run_are_not_taken_for_earlier_ones_where_our_clock_is_ahead(
    stack, host, cli, monkeypatch
):
    late = timedelta(minutes=10)
    date = format_datetime(datetime.now(UTC) - late, usegmt=True)
    monkeypatch.setattr("stack._Handler.date_time_string", lambda *_: date)
    stack.sql("""
        create function late() returns trigger language plpgsql as
          $$ begin new.updated_at := now() - interval '10 minutes'; return new; end $$;
        create trigger late before insert or update on product_embedding_failures
          for each row execute function late();
    """)
    new_id, closed = ids(), f"http://127.0.0.1:{closed_port()}"
    good, bad = host.url_of("/flower.jpg"), f"{closed}/1.jpg"
    stack.add_assets((next(new_id), bad if n % 10 else good, None) for n in range(200))
    run = cli("--workers", 4, FETCH_SECONDS=0.5)
    assert run.counts == run.counts | {"embedded": 20, "failed": 180, "left": 0}


def test_of_very_many_reasons_the_report_shows_some_and_counts_all():
    from generate_embeddings import Asset, Failure, Report

    report = Report()
    for n in range(70):
        report.fail(Failure(Asset(n, f"{n}.jpg"), "store", f"reason {n}", False))
    assert report.failed == 70
    assert len(str(report).splitlines()) < 120
    assert "20  store: other reasons" in str(report)


def test_fifty_dead_images_in_a_row_do_not_stop_a_run(stack, host, cli):
    new_id = ids()
    stack.add_assets((next(new_id), host.url_of(f"/gone/{n}"), None) for n in range(70))
    stack.add_assets([(next(new_id), host.url_of("/flower.jpg"), None)])
    run = cli()
    assert (run.code, run.counts["embedded"], run.counts["failed"]) == (1, 1, 70)


def test_a_worker_that_hangs_does_not_keep_the_command_from_ending(stack, host, cli):
    host.files["/slow"] = raw(NO_LENGTH, b"x", pause=0.2)
    new_id = ids()
    stack.add_assets((next(new_id), host.url_of("/slow"), None) for _ in range(3))
    started = time.monotonic()
    assert cli(FETCH_SECONDS="1").counts["failed"] == 3
    assert time.monotonic() - started < 60


# --------------------------------------------------------------------------------------------------
# Private storage
# --------------------------------------------------------------------------------------------------

STORED = ("2026-05-01T10:00:00.jpg", "products/a b.jpg", "products/größe & 1.jpg", "100%.jpg")


@pytest.fixture
def bucket(stack, photos):
    """A private bucket with a few images; its name."""
    for path in STORED:
        stack.gateway.storage["product images", path] = photos["flower.jpg"]
    return "product images"


def test_a_path_is_read_from_the_storage_bucket(stack, bucket, cli):
    new_id = ids()
    stack.add_assets((next(new_id), path, None) for path in (*STORED, "/products/a b.jpg"))
    run = cli(STORAGE_BUCKET=bucket)
    assert (run.code, run.counts["embedded"]) == (0, 5)


def test_storage_urls_of_the_own_project_are_read_with_the_key(stack, bucket, cli):
    new_id = ids()
    stack.add_assets(
        (next(new_id), f"{stack.url}/storage/v1/object/{access}/product%20images/{path}", None)
        for access in ("public", "authenticated")
        for path in ("products/a%20b.jpg", "products/gr%C3%B6%C3%9Fe%20&%201.jpg")
    )
    run = cli()
    assert (run.code, run.counts["embedded"]) == (0, 4)


def test_the_key_is_sent_to_supabase_only(stack, bucket, host, cli):
    new_id = ids()
    images = [
        "products/a b.jpg",
        host.url_of("/flower.jpg"),
        host.url_of("/storage/v1/object/authenticated/product images/products/a b.jpg"),
        f"{stack.url}@127.0.0.1:{host.port}/storage/v1/object/public/b/a.jpg",
        f"{stack.url}.127.0.0.1.invalid/storage/v1/object/public/b/a.jpg",
        f"{stack.url}/storage/v1/object/public/away",
    ]
    stack.gateway.fault = lambda request: (
        (302, [("Location", host.url_of("/flower.jpg"))], b"") if "away" in request.path else None
    )
    stack.add_assets((next(new_id), image, None) for image in images)
    run = cli(STORAGE_BUCKET=bucket)
    assert run.counts["embedded"] == 3  # the first two, and the one that is redirected
    assert len(host.requests) >= 3
    for _, headers in host.requests:
        assert not {name.lower() for name in headers} & {"apikey", "authorization"}
        assert stack.service_key not in str(headers)


def test_a_path_without_a_bucket_is_a_failure_that_names_the_setting(stack, cli):
    asset = next(ids())
    stack.add_assets([(asset, "products/a b.jpg", None)])
    assert cli().code == 1
    stage, reason, permanent, _ = failures(stack)[asset]
    assert (stage, permanent) == ("fetch", False)
    assert "STORAGE_BUCKET" in reason


def test_an_object_that_is_not_in_the_bucket_is_a_failure(stack, bucket, cli):
    asset = next(ids())
    stack.add_assets([(asset, "products/gone.jpg", None)])
    assert cli(STORAGE_BUCKET=bucket).code == 1
    assert failures(stack)[asset][:1] == ("fetch",)


@pytest.mark.parametrize("path", ["../../../rest/v1/assets", "a/../../other/b.jpg", "%2e%2e/b.jpg"])
def test_a_path_can_not_leave_its_bucket(stack, bucket, cli, path):
    asset = next(ids())
    stack.add_assets([(asset, path, None)])
    cli(STORAGE_BUCKET=bucket)
    stored = [r.path for r in stack.gateway.requests if "/storage/" in r.path]
    assert all(
        asked.startswith("/storage/v1/object/authenticated/product%20images/") for asked in stored
    )
    assert not any(".." in asked for asked in stored)
    assert asset in failures(stack)


# --------------------------------------------------------------------------------------------------
# Twins
# --------------------------------------------------------------------------------------------------


def embedded(stack, host, cli, *files):
    """The vectors of these image files, in order."""
    new_id, rows = ids(), []
    for n, data in enumerate(files):
        host.files[f"/twin/{n}"] = data
        rows.append((next(new_id), host.url_of(f"/twin/{n}"), None))
    stack.add_assets(rows)
    assert cli().code == 0
    return [vectors(stack)[asset] for asset, *_ in rows]


def apart(a, b):
    return float(np.linalg.norm(a - b))


def test_a_turned_photograph_has_the_vector_of_its_upright_twin(stack, host, cli, photos):
    cat = Image.open(io.BytesIO(photos["chelsea.png"])).convert("RGB")
    lying = cat.transpose(Image.Transpose.ROTATE_90)
    photograph = saved(lying, "JPEG", quality=90, exif=exif(6))
    upright = Image.open(io.BytesIO(photograph)).transpose(Image.Transpose.ROTATE_270)
    turned, twin, lossless, whole, flat = embedded(
        *(stack, host, cli, photograph, saved(upright, "PNG")),
        *(saved(lying, "PNG", exif=exif(6)), saved(cat, "PNG"), saved(lying, "PNG")),
    )
    assert np.array_equal(turned, twin)
    assert np.array_equal(lossless, whole)
    assert apart(flat, whole) > 0.01


def test_a_transparent_png_has_the_vector_of_its_white_twin(stack, host, cli, photos):
    cat = Image.open(io.BytesIO(photos["chelsea.png"])).convert("RGB")
    mask = Image.new("L", cat.size, 0)
    mask.paste(255, (100, 50, 350, 250))
    white = Image.composite(cat, Image.new("RGB", cat.size, "white"), mask)
    pink = Image.composite(cat, Image.new("RGB", cat.size, (255, 0, 255)), mask)
    pink.putalpha(mask)
    seen, twin, whole = embedded(
        stack, host, cli, saved(pink, "PNG"), saved(white, "PNG"), saved(cat, "PNG")
    )
    assert np.array_equal(seen, twin)
    assert apart(whole, twin) > 0.01


def test_cmyk_photographs_are_close_to_their_rgb_twin(stack, host, cli, photos):
    cat = Image.open(io.BytesIO(photos["chelsea.png"])).convert("RGB")
    inks = cat.convert("CMYK")
    unmarked = without_segment(saved(inverted(inks), "JPEG", quality=95), 0xEE)
    twin, marked, plain, wrong, other = embedded(
        *(stack, host, cli, saved(cat, "JPEG", quality=95), saved(inks, "JPEG", quality=95)),
        *(unmarked, saved(inverted(inks), "JPEG", quality=95), photos["flower.jpg"]),
    )
    for vector in (marked, plain):
        assert apart(vector, twin) < 0.05 * min(apart(wrong, twin), apart(other, twin))
