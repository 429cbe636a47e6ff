"""Several workers on one catalog: --shard I/N, and workers that know nothing of each other."""

import io
import re
import uuid
from collections import Counter

import pytest
from conftest import TINY_VERSION, wait_until
from PIL import Image


@pytest.fixture
def thumbnail(photos):
    """A small JPEG file."""
    file = io.BytesIO()
    Image.open(io.BytesIO(photos["astronaut.png"])).resize((96, 96)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def catalog(stack, host, thumbnail):
    """Fills the assets table with these ids; each image has an address of its own."""
    host.files["/thumbnail.jpg"] = thumbnail

    def fill(ids):
        address = host.url_of("/thumbnail.jpg")
        stack.add_assets((i, f"{address}?asset={i}", "client") for i in ids)

    return fill


def uuids(count):
    return [str(uuid.uuid5(uuid.NAMESPACE_URL, str(n))) for n in range(count)]


def embedded(stack):
    return {str(i) for (i,) in stack.sql("select asset_id from product_embeddings")}


def downloads(host):
    """How often each asset's image was asked for: asset id -> times."""
    return Counter(path.split("asset=")[1] for path, _ in host.requests)


BAD = [
    "0/4",
    "5/4",
    "4",
    "a/b",
    "1/0",
    "0/0",
    "-1/4",
    "1/-4",
    "1/2/3",
    "1.5/4",
    "/4",
    "1/",
    "",
    " ",
]


@pytest.mark.parametrize("value", [*BAD, "", " "])
def test_a_shard_that_is_none_is_a_usage_error(cli, value):
    run = cli(f"--shard={value}")
    assert run.code == 2
    assert "--shard" in run.err
    assert "1/4" in run.err  # what a good one looks like


def test_three_shards_at_once_share_a_catalog_exactly(stack, host, cli, catalog):
    ids = uuids(900)
    catalog(ids)
    started = [cli.start("--shard", f"{part}/3") for part in (1, 2, 3)]
    runs = [run.finish(timeout=600) for run in started]
    shares = [run.counts["embedded"] for run in runs]
    assert [run.code for run in runs] == [0, 0, 0]
    assert sum(shares) == 900
    assert all(200 <= share <= 400 for share in shares)
    assert all(
        f"{share} assets: {share} to do" in r.err for share, r in zip(shares, runs, strict=True)
    )
    assert [run.counts["left"] for run in runs] == [0, 0, 0]
    assert set(downloads(host).values()) == {1}  # disjoint
    assert embedded(stack) == downloads(host).keys() == set(ids)  # complete


def shard_of(ids, id_type, stack, cli, catalog):
    """What `--shard 2/3` embeds of a catalog of these ids, as text."""
    stack.reset(id_type)
    catalog(ids)
    assert cli("--shard", "2/3").code == 0
    return embedded(stack)


IDS = {"uuid": uuids(90), "bigint": range(1, 91)}


@pytest.mark.parametrize("id_type", IDS)
def test_an_id_is_in_the_same_shard_when_it_is_text(stack, cli, catalog, id_type):
    typed = shard_of(IDS[id_type], id_type, stack, cli, catalog)
    assert 15 <= len(typed) <= 45
    assert shard_of(map(str, IDS[id_type]), "text", stack, cli, catalog) == typed


def test_a_shard_does_not_depend_on_what_is_pending(stack, cli, catalog):
    whole = shard_of(uuids(90), "uuid", stack, cli, catalog)
    stack.sql("delete from product_embeddings")
    assert cli("--limit", 40).code == 0
    before = embedded(stack)
    left = len(whole - before)
    first, *shown = cli("--shard", "2/3", "--dry-run").out.splitlines()
    assert first == f"Would embed {left} assets as {TINY_VERSION}"
    assert {line.split()[0] for line in shown} == set(sorted(whole - before)[:5])
    limited = cli("--shard", "2/3", "--limit", 5)
    assert limited.counts == limited.counts | {"embedded": 5, "left": left - 5}
    run = cli("--shard", "2/3")
    assert run.counts == run.counts | {"embedded": left - 5, "left": 0}
    assert embedded(stack) - before == whole - before


def test_more_shards_than_assets_leave_some_with_nothing_to_do(stack, cli, catalog):
    catalog(uuids(1))
    runs = [cli("--shard", f"{part}/3") for part in (1, 2, 3)]
    assert [run.code for run in runs] == [0, 0, 0]
    assert sorted(run.counts["embedded"] for run in runs) == [0, 0, 1]


def test_two_unsharded_workers_at_once_lose_nothing(stack, host, cli, catalog):
    ids = uuids(400)
    catalog(ids)
    started = [cli.start(), cli.start()]
    runs = [run.finish(timeout=600) for run in started]
    assert [(run.code, run.counts["failed"]) for run in runs] == [(0, 0), (0, 0)]
    assert embedded(stack) == downloads(host).keys() == set(ids)
    for run in runs:  # what the other worker had in hands just then
        busy = re.search(r"(?m)^ +(\d+)  in the app's hands", run.out)
        assert run.counts["left"] == (int(busy[1]) if busy else 0)


def test_a_scheduled_run_may_begin_before_the_last_one_has_ended(stack, host, cli, catalog):
    ids = uuids(300)
    catalog(ids)
    host.latency = 0.1
    early = cli.start()
    wait_until(lambda: embedded(stack))
    late = cli.start()
    runs = [early.finish(timeout=600), late.finish(timeout=600)]
    assert [run.code for run in runs] == [0, 0]
    assert embedded(stack) == set(ids)
    third = cli()
    assert (third.code, third.counts["attempted"], third.counts["left"]) == (0, 0, 0)


def test_a_failure_is_not_kept_beside_the_vector_of_another_worker(stack, host, cli, thumbnail):
    def fickle(handler):
        first = len(host.requests) == 1
        wait_until(lambda: len(host.requests) == 2 and (first or embedded(stack)))
        handler.reply(200 if first else 404, [], thumbnail)

    host.files["/fickle.jpg"] = fickle
    stack.add_assets([(uuids(1)[0], host.url_of("/fickle.jpg"), "client")])
    runs = [run.finish() for run in [cli.start(FETCH_SECONDS=90), cli.start(FETCH_SECONDS=90)]]
    assert [run.code for run in runs] == [0, 0]
    assert sorted((run.counts["embedded"], run.counts["gone"]) for run in runs) == [(0, 1), (1, 0)]
    assert stack.sql("select count(*) from product_embeddings") == [(1,)]
    assert stack.sql("select count(*) from product_embedding_failures") == [(0,)]
