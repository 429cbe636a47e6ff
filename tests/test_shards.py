"""Several workers on one catalog by --shard I/N: they share it exactly, and an asset stays with its
shard. (test_soak.py: workers that know nothing of each other.)
"""

import uuid

import pytest
from conftest import open_store, pending, survey, vector
from PIL import Image
from samples import saved

from generate_embeddings import Embedded, Shard


@pytest.fixture
def numbered(stack, host):
    """Fills the catalog with so many assets; each image has an address of its own."""
    image = Image.linear_gradient("L").resize((64, 64))
    host.files["/small.png"] = saved(image, "PNG")
    return lambda count: stack.add_images(f"{host.url_of('/small.png')}?{n}" for n in range(count))


def share(stack, part, parts=3):
    """The ids of what is pending for this shard; its status counts the same."""
    status, assets = survey(open_store(stack, shard=Shard(part, parts)))
    assert status.assets - status.done == len(assets)
    return {asset.id for asset in assets}


def test_three_shards_at_once_share_a_catalog_exactly(stack, host, cli, numbered):
    ids = numbered(150)
    runs = [run.finish() for run in [cli.start("--shard", f"{part}/3") for part in (1, 2, 3)]]
    shares = [run.counts["embedded"] for run in runs]
    assert [run.code for run in runs] == [0, 0, 0]
    assert sum(shares) == 150
    assert all(25 <= share <= 75 for share in shares)
    for made, run in zip(shares, runs, strict=True):
        assert f"{made} assets: {made} to do" in run.err
        assert run.counts["left"] == 0
    assert set(host.asked().values()) == {1}  # disjoint
    assert stack.embedded() == set(ids)  # complete


IDS = {"uuid": [str(uuid.UUID(int=n)) for n in range(90)], "bigint": [*map(str, range(1, 91))]}


@pytest.mark.parametrize("id_type", IDS)
def test_an_id_is_in_the_same_shard_when_it_is_text(stack, id_type):
    def shares():
        stack.add_assets((i, "https://images.invalid/", "x") for i in IDS[id_type])
        return [set(map(str, share(stack, part))) for part in (1, 2, 3)]

    stack.reset(id_type)
    typed = shares()
    assert all(15 <= len(ids) <= 45 for ids in typed)
    assert set().union(*typed) == set(IDS[id_type])
    stack.reset("text")
    assert shares() == typed


def test_a_shard_does_not_depend_on_what_is_pending(stack, numbered):
    numbered(90)
    whole = share(stack, 2)
    store = open_store(stack)
    some = pending(store)[:40]
    store.save([Embedded(asset, vector(1)) for asset in some])
    assert share(stack, 2) == whole - {asset.id for asset in some}
