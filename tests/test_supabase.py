"""The whole job on the real stack: every pending asset gets its vector, once, and every bad image
costs one line in the report and is remembered for what it is.
"""

import base64
import http.client
import io
import json
import re
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from answers import NO_LENGTH, cut, hang_up, length, raw, redirect, status
from conftest import CLOSED, REPO, TINY_VERSION, open_store, pending, renew, stack_cli, survey
from PIL import Image
from samples import exif, png, saved
from stack import HTML, JSON, ImageHost

import generate_embeddings as script

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0"/></svg>'
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
EARLIER = (
    "insert into product_embeddings select id, array_fill(0.1, array[512])::vector, %s, %s, %s "
    "from assets where image_url like %s"
)
# Runs the script given first and tells, last on stderr, how much memory it had at most.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def add(stack, host, paths, client=lambda n: "x"):
    """Adds an asset per path, or other URL, in the order of ids; returns id -> path."""
    made = {uuid.UUID(int=n + 1): path for n, path in enumerate(paths)}
    rows = enumerate(made.items())
    urls = {p: host.url_of(p) if p and p.startswith("/") else p for p in made.values()}
    stack.add_assets((i, urls[p], client(n)) for n, (i, p) in rows)
    return made


class Sent:
    """A fault for the gateway that does no harm: notes the ids of the vectors that are sent."""

    def __init__(self):
        self.calls = []

    def __call__(self, request):
        if request.function == "store_embeddings":
            vectors = json.loads(request.body)["vectors"]
            self.calls.append((request, [row["asset_id"] for row in vectors]))

    def stored(self):
        """How often each id was sent with success."""
        return Counter(i for request, ids in self.calls if request.status == 200 for i in ids)


# The main job: real photographs, the full architecture


@pytest.fixture(scope="module")
def whole(_stack, full, photos, tmp_path_factory):
    """A run over all photographs with the full model, and another one after it."""
    renew(_stack)
    folder = tmp_path_factory.mktemp("cwd")
    measured = folder / "measured.py"
    measured.write_text(MEASURED)
    cli = stack_cli(_stack, full, folder)
    files = {f"/{name}": data for name, data in photos.items()}
    with ImageHost(files) as host:
        ids = add(_stack, host, files)
        before = datetime.now(UTC)
        first = cli(REPO / "generate_embeddings.py", script=measured)
        after = datetime.now(UTC)
        rows, downloads, headers = _stack.vectors(), host.asked(), [h for _, h in host.requests]
        _stack.gateway.requests.clear()
        second = cli("-v")
        yield SimpleNamespace(
            **{"ids": ids, "first": first, "second": second, "rows": rows, "headers": headers},
            **{"before": before, "after": after, "downloads": downloads},
            downloads_after=host.asked(),
            requests=[r.path for r in _stack.gateway.requests],
            rows_after=_stack.vectors(),
            peak=int(first.err.splitlines()[-1]) * 1024,
            key=_stack.service_key,
        )


def test_every_photograph_gets_a_vector(whole):
    assert whole.first.code == 0, whole.first.err
    assert whole.first.counts["embedded"] == whole.first.counts["attempted"] == len(whole.ids)
    assert whole.first.counts["left"] == 0
    assert whole.rows.keys() == whole.ids.keys()


REDUCED_FROM = 2 * 3 * 224  # pixels of the shorter side; README, "Decisions"


def test_vectors_are_those_of_transformers(whole, of_transformers, photos):
    wanted = of_transformers
    apart = np.linalg.norm(np.subtract(*map(wanted.get, ("coffee.png", "china.jpg"))))
    for asset_id, path in whole.ids.items():
        vector, of_transformers = whole.rows[asset_id].vector, wanted[path[1:]]
        if min(Image.open(io.BytesIO(photos[path[1:]])).size) < REDUCED_FROM:
            assert np.abs(vector - of_transformers).max() < 1e-5, path
        else:  # as README says: against the distance between different images
            assert np.linalg.norm(vector - of_transformers) < 0.03 * apart, path
    vectors = np.array(list(wanted.values()))
    assert np.median(vectors @ vectors.T) < 0.99, "so alike that agreement means nothing"


def test_vectors_are_512_finite_numbers_of_unit_length(whole):
    vectors = np.array([row.vector for row in whole.rows.values()])
    assert vectors.shape == (len(whole.ids), 512)
    assert np.isfinite(vectors).all()
    assert np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1).max() < 1e-6


def test_rows_carry_the_version_and_the_time(whole):
    second = timedelta(seconds=1)  # the database's clock and ours are the same
    for row in whole.rows.values():
        assert row.version == "clip-vit-base-patch32"
        assert whole.before - second < row.created <= whole.after + second
        assert whole.before - second < row.updated <= whole.after + second


def test_each_image_is_downloaded_once_and_without_the_key(whole):
    assert whole.downloads == Counter(whole.ids.values())
    assert not any(whole.key in value for sent in whole.headers for value in sent.values())


def test_a_rerun_does_nothing_and_downloads_nothing(whole):
    assert whole.second.code == 0
    assert whole.second.counts["attempted"] == whole.second.counts["left"] == 0
    assert whole.downloads_after == whole.downloads
    assert str(whole.rows_after) == str(whole.rows)
    assert f"{len(whole.ids)} assets: {len(whole.ids)} done, 0 to do" in whole.second.err
    assert len(whole.requests) <= 4
    assert not any(path.endswith("/store_embeddings") for path in whole.requests)


def test_memory_stays_below_2_gb(whole):
    print(f"peak memory: {whole.peak / 1e6:.0f} MB")
    assert 100e6 < whole.peak < 2e9


# What is pending


def test_only_rows_of_our_model_version_count_as_done(cli, stack, host):
    ids = add(stack, host, ["/flower.jpg", "/china.jpg", "/rocket.jpg"])
    stack.sql(EARLIER, [TINY_VERSION, LONG_AGO, LONG_AGO, "%flower%"])
    stack.sql(EARLIER, ["clip-vit-large-patch14", LONG_AGO, LONG_AGO, "%china%"])
    run = cli()
    assert run.code == 0, run.err
    assert run.counts["embedded"] == 2
    rows = {ids[i]: row for i, row in stack.vectors().items()}
    assert {row.version for row in rows.values()} == {TINY_VERSION}
    assert rows["/flower.jpg"].updated == LONG_AGO
    assert rows["/china.jpg"].created == LONG_AGO
    assert rows["/china.jpg"].updated > LONG_AGO
    assert abs(np.linalg.norm(rows["/china.jpg"].vector) - 1) < 1e-6
    assert "/flower.jpg" not in host.asked()
    again = cli(MODEL_VERSION="shoes-2027")
    assert (again.code, again.counts["embedded"]) == (0, 3)
    assert {row.version for row in stack.vectors().values()} == {"shoes-2027"}


def test_limit_and_client_combine_and_resume(cli, stack, host):
    paths = ["/flower.jpg", "/china.jpg", "/rocket.jpg", "/coins.png", "/brick.png"] * 2
    ids = add(stack, host, paths, client=lambda n: f"client-{n % 2}")
    of_1 = {i for n, i in enumerate(ids) if n % 2}
    first = cli("--limit", 3, "--client", "client-1")
    assert first.counts == first.counts | {"embedded": 3, "left": 2}, first.out
    early = stack.vectors()
    assert early.keys() < of_1
    assert len(early) == 3
    second = cli("--limit", 3)
    assert second.counts == second.counts | {"embedded": 3, "left": 4}, second.out
    assert len(stack.embedded()) == 6
    third = cli("--client", "client-1")
    assert (third.code, third.counts["left"]) == (0, 0)
    late = stack.vectors()
    assert of_1 <= late.keys()
    assert {i: late[i].updated for i in early} == {i: row.updated for i, row in early.items()}
    assert len(host.requests) == len(late)


CLIENTS = [
    *('Big, "Client" (UK)', "O'Neill & 100% +plus#1", "eq.x", "{a,b} back\\slash"),
    *("Ünïcødé 日本", "*", "null", " in.(1,2) "),
]


def test_client_names_may_hold_anything(stack):
    stack.add_assets((uuid.uuid4(), f"https://images.invalid/{n}.jpg", name)
                     for n, name in enumerate(CLIENTS) for _ in range(n + 1))  # fmt: skip
    for n, name in enumerate(CLIENTS):
        status, assets = survey(open_store(stack, client=name))
        assert (status.assets, len(assets)) == (n + 1, n + 1)


ODD_IDS = [
    *("a,b", 'say "hi"', "two words", "(in)", "a.b.c", "100%", "50%25", "a/b", "Ünïcødé 日本"),
    *("null", "eq.x", "a&b=c", "+", "#", "back\\slash", "'", "*", "{}", "-1", "007", "a:b", "Z"),
    *("z", " ", "a\nembedded=9 failed=0 left=0 attempted=9", "\x1b[2J"),
]


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("text", ODD_IDS),
        ("bigint", [-5, 0, 1, 2, 10, 2**31, 2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, 2**63 - 1]),
    ],
    ids=["text", "bigint"],
)
def test_ids_of_any_kind_and_pages_smaller_than_the_catalog(cli, stack, host, tuned, kind, ids):
    stack.reset(kind)
    stack.add_assets((i, f"{host.url_of('/flower.jpg')}?{n}", "x") for n, i in enumerate(ids))
    stack.sql(
        "insert into product_embeddings select id, array_fill(0.1, array[512])::vector, %s "
        "from assets where id in (select id from assets order by id limit 3 offset 2)",
        [TINY_VERSION],
    )
    done = stack.embedded()
    stack.gateway.fault = sent = Sent()
    run = cli("PAGE_ROWS=2", "--", script=tuned)
    assert run.code == 0, run.err + run.out
    assert run.counts == run.counts | {"embedded": len(ids) - 3, "left": 0}
    assert stack.embedded() == set(ids)
    assert sent.stored() == Counter(set(ids) - done)


def test_1000_assets_are_embedded_once_each_in_few_requests_whatever_the_cap(cli, stack):
    stack.set_max_rows(100)
    image = saved(Image.linear_gradient("L").resize((64, 64)), "PNG")
    with ImageHost({f"/{n}.png": image for n in range(1000)}) as host:
        ids = add(stack, host, host.files)
        stack.gateway.fault = sent = Sent()
        few = cli("--limit", 10)
        assert (few.code, few.counts["embedded"], few.counts["left"]) == (0, 10, 990)
        assert len(stack.gateway.requests) <= 8
        run = cli("--workers", 4)
        assert run.code == 0, run.err
        assert run.counts == run.counts | {"embedded": 990, "left": 0}
        assert stack.embedded() == ids.keys()
        assert sent.stored() == Counter(map(str, ids))
        assert host.asked() == Counter(ids.values())


def test_rows_that_are_added_meanwhile_are_done_now_or_by_the_next_run(cli, stack, photos):
    stack.reset("bigint")
    added = threading.Event()

    def slow(handler):
        if not added.is_set():
            added.set()
            rows = [(n, host.url_of(f"/late{n}.jpg"), "x") for n in (5, 35, 205, 305)]
            stack.add_assets(rows)
        handler.reply(200, [("Content-Type", "image/jpeg")], photos["flower.jpg"])

    numbers = range(10, 210, 10)
    files = {f"/{n}.jpg": slow for n in numbers}
    late = {f"/late{n}.jpg": photos["china.jpg"] for n in (5, 35, 205, 305)}
    with ImageHost(files | late) as host:
        stack.add_assets((n, host.url_of(f"/{n}.jpg"), "x") for n in numbers)
        run = cli("--workers", 1)
        assert run.code == 0, run.err
        again = cli()
        assert again.code == 0
        assert run.counts["embedded"] + again.counts["embedded"] == len(numbers) + 4
        assert again.counts["left"] == 0
        assert stack.embedded() == {*numbers, 5, 35, 205, 305}
        assert set(host.asked().values()) == {1}


def test_data_urls_of_several_megabytes(cli, stack, host):
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), np.uint8)
    image = base64.b64encode(saved(Image.fromarray(noise), "PNG", compress_level=1)).decode()
    assert 4e6 < len(image) < 6e6
    ids = add(stack, host, [f"data:image/png;base64,{image}" for _ in range(5)] + ["/flower.jpg"])
    stack.sql("update assets set image_url = repeat(image_url, 2) where id = %s", [list(ids)[2]])
    run = cli()
    assert run.code == 1
    assert run.counts == run.counts | {"embedded": 5, "failed": 1, "left": 0}
    assert stack.failures().keys() == {list(ids)[2]}
    assert "which belongs into a file" in run.out
    assert len(run.out + run.err) < 10_000


# Images that fail: 200 assets, 60 of them bad in 30 ways


FETCH_SECONDS = 8  # four attempts take 3.5 at most; the rest is for a busy machine
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


never = partial(Bad, stage="fetch")
not_now = partial(Bad, stage="fetch", permanent=False)


def some_ways_to_be_bad():
    picture = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB")
    jpeg, lossless = saved(picture, "JPEG"), saved(picture, "PNG")
    return {
        "empty": Bad("empty file", answer=b""),
        "truncated.jpg": Bad("truncated", answer=jpeg[: len(jpeg) // 2]),
        "truncated.png": Bad("truncated", answer=lossless[: len(lossless) // 2]),
        "pixel": Bad("smaller than 16 pixels", answer=saved(Image.new("P", (1, 1)), "GIF")),
        "strip": Bad("strip", answer=saved(Image.new("L", (20, 2001)), "PNG")),
        "huge": Bad("needs over", answer=png((20000, 20000), 8, 0, [bytes(20000)])),
        "depth": Bad("not supported", answer=saved(Image.new("F", (32, 32)), "TIFF")),
        "svg": Bad("SVG", answer=SVG),
        "html": Bad("HTML", answer=status(200, body=b"<!doctype html>")),
        "json": Bad("JSON", answer=b'{"error": 1}'),
        "pdf": Bad("PDF", answer=b"%PDF-1.7"),
        "text": Bad("not an image", answer=b"please log in"),
        "400": never("HTTP 400", answer=status(400)),
        "404": never("HTTP 404"),
        "410": never("HTTP 410", answer=status(410)),
        "loop": not_now("redirects", answer=redirect("?again")),
        "to a file": not_now("only http", answer=redirect("file:///etc/passwd")),
        "endless": never("larger than", answer=raw(NO_LENGTH, b"x" * 2**18)),
        "no URL": never("no image URL", image=None),
        "scheme": never("only http", image="ftp://shop.example/a.jpg"),
        "invalid": never("not a valid URL", image="http://[::1"),
        "data": never("data: URL", image="data:image/png;base64"),
        "401": not_now("HTTP 401", answer=status(401)),
        "403": not_now("HTTP 403", answer=status(403)),
        "503": not_now("HTTP 503", answer=status(503)),
        "429": not_now("HTTP 429", answer=status(429, ("Retry-After", "3600"))),
        "reset": not_now("connection lost", answer=raw(length(999), b"x", end=cut)),
        "short": not_now("connection lost", answer=raw(length(999), b"x", end=hang_up)),
        "slow": not_now("not complete within", answer=raw(length(999), b"x", pause=0.2)),
        "closed": not_now("connection refused", image=f"{CLOSED}/a.jpg"),
    }


BAD = some_ways_to_be_bad()
FOR_GOOD = EACH * sum(way.permanent for way in BAD.values())


@pytest.fixture(scope="module")
def story(_stack, photos, tiny, tmp_path_factory):
    """Four runs over the catalog; `bad` is asset id -> name of the way in which it is bad. Each
    run with its Result, what the host was asked for, and the failures as they are stored then."""
    renew(_stack)
    small = [name for name, data in photos.items() if len(data) < 200_000]
    cli = stack_cli(_stack, tiny, tmp_path_factory.mktemp("cwd"))
    with ImageHost({f"/{name}": photos[name] for name in small}) as host:
        paths, bad = [], {}
        names = [name for name in BAD for _ in range(EACH)]
        for n in range(GOOD + len(names)):
            if n % 10 < 3:  # three of ten, all over the catalog
                name = bad[uuid.UUID(int=n + 1)] = names.pop()
                host.files[f"/bad/{n + 1}"] = BAD[name].answer
                paths.append(f"/bad/{n + 1}" if BAD[name].image == "host" else BAD[name].image)
            else:
                paths.append(f"/{small[n % len(small)]}?{n}")
        add(_stack, host, paths)

        def seen(*args):
            host.requests.clear()
            result = cli(*args, FETCH_SECONDS=FETCH_SECONDS)
            asked = {path.split("?")[0] for path in host.asked()}
            return SimpleNamespace(result=result, asked=asked, failures=_stack.failures())

        first, second, third, retried = seen(), seen(), seen(), seen("--retry-failed")
        yield SimpleNamespace(
            bad=bad,
            **{"first": first, "second": second, "third": third, "retried": retried},
            # What used up its whole time is not tried at once again, but an hour later
            again={a for a, name in bad.items() if not BAD[name].permanent and name != "slow"},
            embedded=len(_stack.embedded()),
        )


def on_the_host(assets, story):
    return {f"/bad/{asset.int}" for asset in assets if BAD[story.bad[asset]].image == "host"}


def test_the_good_ones_are_embedded_and_the_bad_ones_counted(story):
    assert (len(story.bad), len(set(story.bad.values()))) == (60, 30)
    result = story.first.result
    assert result.code == 1
    assert result.counts == result.counts | {"embedded": GOOD, "failed": 60, "left": 0}
    assert story.embedded == GOOD
    assert result.seconds < 120


@pytest.mark.parametrize("name", BAD)
def test_each_failure_is_named_and_remembered_for_what_it_is(story, name):
    way = BAD[name]
    found = [story.first.failures[asset] for asset, bad in story.bad.items() if bad == name]
    assert len(found) == EACH
    for stage, reason, permanent, attempts in found:
        assert way.reason in reason
        assert (stage, permanent, attempts) == (way.stage, way.permanent, 1)
        assert f"{stage}: {reason}" in story.first.result.out


def test_the_report_groups_failures_by_reason_with_examples(story):
    lines = story.first.result.out.splitlines()
    (at,) = [n for n, line in enumerate(lines) if "HTTP 404" in line]
    assert lines[at].split()[0] == "2"
    examples = {asset for asset, name in story.bad.items() if name == "404"}
    assert lines[at + 1].strip() == script.advice("fetch: HTTP 404 Not Found")
    assert {uuid.UUID(line.split()[0]) for line in lines[at + 2 : at + 4]} == examples


def test_a_second_run_tries_only_what_may_have_passed(story):
    assert story.second.result.code == 1
    assert story.second.asked == on_the_host(story.again, story)
    counts, tried = story.second.result.counts, len(story.again)
    assert counts == counts | {"embedded": 0, "failed": tried, "skipped": 60 - tried, "left": 0}
    said = f"{FOR_GOOD} failed for good, {EACH} failed before, tried later, {tried} to do"
    assert said in story.second.result.err


def test_what_failed_twice_is_left_alone_for_a_while(story):
    assert (story.third.result.code, story.third.asked) == (0, set())
    counts = story.third.result.counts
    assert counts == counts | {"attempted": 0, "skipped": 60, "left": 0}
    later = 60 - FOR_GOOD
    said = f"{FOR_GOOD} failed for good, {later} failed before, tried later, 0 to do"
    assert said in story.third.result.err


def test_retry_failed_tries_them_all(story):
    assert story.retried.asked == on_the_host(story.bad, story)
    counts = story.retried.result.counts
    assert counts == counts | {"embedded": 0, "failed": 60, "skipped": 0}
    attempts = {asset: failure[3] for asset, failure in story.retried.failures.items()}
    assert attempts == {asset: 2 + (asset in story.again) for asset in story.bad}


def test_known_failures_keep_no_others_waiting(stack, host, cli):
    add(stack, host, ["/gone"] * 5 + [f"{CLOSED}/"] * 5)
    # Time enough for four attempts: else these would rest as those that took too long
    assert cli(FETCH_SECONDS=30).counts["failed"] == 10
    good = host.url_of("/flower.jpg")
    stack.add_assets((uuid.UUID(int=2**100 + n), good, "x") for n in range(3))
    run = cli("--limit", "2")
    assert run.counts == run.counts | {"embedded": 2, "failed": 0, "skipped": 5, "left": 6}
    run = cli(FETCH_SECONDS=30)
    assert run.counts == run.counts | {"embedded": 1, "failed": 5, "skipped": 5, "left": 0}


@pytest.fixture
def broken(stack, host):
    """The id of one asset, whose image at /a.jpg failed for good."""
    (asset,) = add(stack, host, ["/a.jpg"])
    store = open_store(stack)
    store.save([script.Failed(*pending(store), "decode", script.BROKEN, True)])
    assert stack.failures()[asset][2] is True
    return asset


def test_an_image_repaired_at_the_same_url_is_embedded_by_retry_failed(
    broken, stack, host, cli, photos
):
    host.files["/a.jpg"] = photos["flower.jpg"]
    run = cli()
    assert (run.code, run.counts["skipped"], host.requests) == (0, 1, [])
    run = cli("--retry-failed")
    assert (run.code, run.counts["embedded"], run.counts["skipped"]) == (0, 1, 0)
    assert stack.failures() == {}
    assert broken in stack.embedded()


def test_a_failure_is_that_of_an_image_and_a_model_version(broken, stack, host):
    assert pending(open_store(stack)) == []
    assert [asset.id for asset in pending(open_store(stack, model_version="other"))] == [
        str(broken)
    ]
    stack.sql("update assets set image_url = %s", [host.url_of("/flower.jpg")])
    assert stack.failures() == {}
    assert [asset.id for asset in pending(open_store(stack))] == [str(broken)]


# What the database's answers mean


PASSING = (
    "08006 40001 40P01 53300 53400 55P03 57014 57P01 XX000 PGRST000 PGRST001 PGRST002 PGRST003"
)
CODES = {
    **dict.fromkeys(PASSING.split(), "passing"),
    **dict.fromkeys(["408", "425", "429", "500", "502", "503", "504", "520"], "passing"),
    **dict.fromkeys(["PGRST202", "42883", "42P01", "42703"], "run this version's schema.sql"),
    **dict.fromkeys(["401", "403", "PGRST301", "PGRST302", "PGRST303"], "was refused"),
    "42501": "the database lacks a grant",
    "PGRST106": "the schema public is not exposed",
    **{code: f"answers with HTTP {code}" for code in ("301", "402", "404", "410")},
    "402": "answers with HTTP 402, Payment Required it's paused",
    **dict.fromkeys(["22P02", "42601", "P0001"], "the database says"),
}


@pytest.fixture(scope="module")
def meant(_stack):
    """What each code led to that came once: "passing", or the error that ended the run."""
    renew(_stack)
    asked = Counter()

    def once(request):
        code = json.loads(request.body)["model_version"]
        asked[code] += 1
        if asked[code] > 1:
            return None
        if len(code) == 3:
            return int(code), HTML, b"<html><body>\r\n<p>it's <b>paused</b></p></body></html>"
        answer = {"code": code, "message": f"no, {_stack.service_key}"}
        return 400, JSON, json.dumps(answer).encode()

    def meaning(code):
        try:
            open_store(_stack, model_version=code).status()
        except script.RunError as error:
            return str(error)
        return "passing" if asked[code] == 2 else "never met"

    _stack.gateway.fault = once
    with ThreadPoolExecutor(len(CODES)) as pool:
        found = dict(zip(CODES, pool.map(meaning, CODES), strict=True))
    _stack.gateway.fault = None
    return found


@pytest.mark.parametrize(("code", "means"), CODES.items())
def test_a_code_of_the_database_is_taken_for_what_it_is(meant, code, means):
    assert means in meant[code]


def test_a_key_that_a_database_echoes_is_struck_out(meant):
    assert "no, (the key)" in meant["42601"]
    assert not any("eyJ" in said for said in meant.values())  # as every legacy key begins


def test_a_project_may_be_below_a_path(cli, stack, host):
    """As self-hosted ones are behind a reverse proxy; their own storage, too."""

    def below(handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port)
        path = handler.path.removeprefix("/supabase")
        connection.request(handler.command, path, body, dict(handler.headers))
        answer = connection.getresponse()
        unwanted = ("connection", "content-length", "date", "server")
        headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in unwanted]
        handler.reply(answer.status, headers, answer.read())
        connection.close()

    stack.gateway.storage["photos", "a.jpg"] = host.files["/flower.jpg"]
    with ImageHost(otherwise=below) as proxy:
        url = f"{proxy.url}/supabase"
        own = "storage/v1/object/authenticated/photos/a.jpg"
        ids = stack.add_images([host.url_of("/china.jpg"), f"/{own}", f"{url}/{own}"])
        run = cli(SUPABASE_URL=f"{url}/rest/v1/", STORAGE_BUCKETS="photos")
        assert (run.code, stack.embedded()) == (0, set(ids))
        wrong = cli("--dry-run", SUPABASE_URL=f"{proxy.url}/elsewhere")
    assert "HTTP 404" in wrong.error


# Private storage


STORED = ("2026-05-01T10:00:00.jpg", "products/a%20b.jpg", "products/gr%C3%B6%C3%9Fe%20&%201.jpg")


@pytest.fixture
def bucket(stack, photos):
    """The URL of a private bucket with a few images, but for how it may be accessed."""
    for path in ("2026-05-01T10:00:00.jpg", "products/a b.jpg", "products/größe & 1.jpg"):
        stack.gateway.storage["product images", path] = photos["flower.jpg"]
    return f"{stack.url}/storage/v1/object/{{}}product%20images/"


def test_storage_urls_of_a_bucket_that_is_named_are_read_with_the_key(stack, bucket, host, cli):
    ways = ("public/", "authenticated/", "")
    add(stack, host, [bucket.format(way) + path for way in ways for path in STORED])
    run = cli(STORAGE_BUCKETS="thumbnails, product images")
    assert (run.code, run.counts["embedded"]) == (0, 9)


def test_the_key_is_sent_to_supabase_only(stack, bucket, host, cli):
    images = [
        bucket.format("public/") + STORED[0],
        "/flower.jpg",
        "/storage/v1/object/authenticated/product images/products/a b.jpg",
        f"{stack.url}@127.0.0.1:{host.port}/storage/v1/object/public/b/a.jpg",
        f"{stack.url}.127.0.0.1.invalid/storage/v1/object/public/b/a.jpg",
        f"{stack.url}/storage/v1/object/public/b/away",
    ]
    stack.gateway.fault = lambda request: (
        (302, [("Location", host.url_of("/flower.jpg"))], b"") if "away" in request.path else None
    )
    add(stack, host, [image for image in images if not image.startswith("/storage")])
    stack.add_assets([(uuid.UUID(int=99), host.url + images[2], "x")])
    run = cli(STORAGE_BUCKETS="product images,b")
    assert run.counts["embedded"] == 3  # the first two, and the one that is redirected
    assert len(host.requests) >= 3
    for _, headers in host.requests:
        assert "apikey" not in {name.lower() for name in headers}
        assert "Bearer" not in str(headers)
        assert stack.service_key not in str(headers)


PROJECT = "https://abc.supabase.co"
OBJECTS = f"{PROJECT}/storage/v1/object"
MUG = "shop/products/a%20mug.jpg"
PRIVATE_BUCKET = "in a private bucket: STORAGE_BUCKETS={} lets this script read it"


@pytest.mark.parametrize(
    ("image", "where", "with_key"),
    [
        ("https://x.example.com/a.jpg", "https://x.example.com/a.jpg", False),
        (" https://x.example.com/a.jpg\n", "https://x.example.com/a.jpg", False),
        ("//cdn.example.com/a.jpg", "https://cdn.example.com/a.jpg", False),
        ("data:image/png;base64,AAAA", "data:image/png;base64,AAAA", False),
        (f"{OBJECTS}/sign/shop/a.jpg?token=t", f"{OBJECTS}/sign/shop/a.jpg?token=t", False),
        *(
            (f"{OBJECTS}/{way}{MUG}", f"{OBJECTS}/authenticated/{MUG}", True)
            for way in ("public/", "authenticated/", "")
        ),
        (f"/storage/v1/object/public/{MUG}", f"{OBJECTS}/authenticated/{MUG}", True),
        (f"{OBJECTS}/public/other/a.jpg", f"{OBJECTS}/public/other/a.jpg", False),
        (f"{PROJECT}.evil.example/storage/v1/object/{MUG}", None, False),
        (f"{PROJECT}@evil.example/storage/v1/object/{MUG}", None, False),
        (f"{PROJECT}/functions/v1/shop/a.jpg", None, False),
    ],
)
def test_the_key_goes_to_a_named_bucket_of_the_own_storage_alone(image, where, with_key):
    place = project_store("shop, my pictures").locate(script.Asset(1, image))
    assert place.where == (where or image)
    assert place.headers == ({"apikey": KEY, "Authorization": f"Bearer {KEY}"} if with_key else {})


@pytest.mark.parametrize(
    ("image", "size", "reason", "permanent"),
    [
        (f"{OBJECTS}/other/a.jpg", 0, PRIVATE_BUCKET.format("other"), False),
        (f"{OBJECTS}/authenticated/other/a.jpg", 0, PRIVATE_BUCKET.format("other"), False),
        (f"{OBJECTS}/public/shop/../other/a.jpg", 0, "a storage path with '..'", True),
        (f"{OBJECTS}/shop/%2e%2e/other/a.jpg", 0, "a storage path with '..'", True),
        (f"{OBJECTS}/shop/..\\other/a.jpg", 0, "a storage path with '..'", True),
        (f"{OBJECTS}/shop/.\t./other/a.jpg", 0, "a storage path with '..'", True),
        ("", 0, "no image URL", True),
        (" \n", 0, "no image URL", True),
        ("data:image/png;base64,AA", 9 * 2**20, "a data: URL of 9 MB", True),
    ],
)
def test_an_image_that_is_not_to_be_had_is_said_to_be(image, size, reason, permanent):
    with pytest.raises(script.Rejected if permanent else script.NotNow, match=re.escape(reason)):
        project_store("shop, my pictures").locate(script.Asset(1, image, size=size))


@pytest.mark.parametrize("path", ["shop/" + "%" * 10**6, "b" * 60_000])
def test_a_long_storage_path_is_refused_in_few_words(path):
    """To unquote 8 MB of percent signs takes 1.4 GB and 20 s, in the loop."""
    with pytest.raises(script.ImageError) as refused:
        project_store("shop").locate(script.Asset(1, f"{OBJECTS}/{path}"))
    assert len(str(refused.value)) < 200


KEY = "sb_secret_x"


def project_store(buckets):
    settings = script.Settings(url=PROJECT, key=KEY, storage_buckets=buckets)
    return script.SupabaseStore(settings, script.Stop())


def test_an_object_that_is_not_there_or_out_of_its_bucket_is_a_failure(stack, bucket, host, cli):
    paths = ["gone.jpg", "../../../rest/v1/assets", "a/../../b/c.jpg", "%2e%2e/b.jpg", "..%2fb.jpg"]
    add(stack, host, [bucket.format("public/") + path for path in paths])
    run = cli(STORAGE_BUCKETS="product images")
    assert run.counts == run.counts | {"embedded": 0, "failed": 5}
    assert {failure[0] for failure in stack.failures().values()} == {"fetch"}
    asked = {r.path for r in stack.gateway.requests if "/rpc/" not in r.path}
    assert asked == {"/storage/v1/object/authenticated/product%20images/gone.jpg"}


# Twins


def test_turned_and_transparent_images_have_the_vectors_of_their_plain_twins(
    stack, host, cli, photos
):
    cat = Image.open(io.BytesIO(photos["chelsea.png"])).convert("RGB")
    lying = cat.transpose(Image.Transpose.ROTATE_90)
    mask = Image.new("L", cat.size, 0)
    mask.paste(255, (100, 50, 350, 250))
    white = Image.composite(cat, Image.new("RGB", cat.size, "white"), mask)
    pink = Image.composite(cat, Image.new("RGB", cat.size, (255, 0, 255)), mask)
    pink.putalpha(mask)
    images = [cat, lying, white, pink]
    host.files |= {f"/{n}": saved(image, "PNG") for n, image in enumerate(images)}
    host.files["/4"] = saved(lying, "PNG", exif=exif(6))
    add(stack, host, [f"/{n}" for n in range(5)])
    assert cli().code == 0
    plain, flat, blank, seen, turned = (row.vector for _, row in sorted(stack.vectors().items()))
    assert np.array_equal(turned, plain)
    assert np.array_equal(seen, blank)
    assert min(np.linalg.norm(flat - plain), np.linalg.norm(blank - plain)) > 0.01
