"""The model: where it comes from, what is said where it can't be had, what it gives."""

import contextlib
import io
import re
import shutil
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SCRIPT
from PIL import Image
from stack import ImageHost

import generate_embeddings as script

HUB = "HF_ENDPOINT"  # where the hub is; conftest.py sets it to a port that is closed
STAMPED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
NAMES = ("flower.jpg", "china.jpg", "rocket.jpg")


@pytest.fixture
def folder(photos, tmp_path):
    """A folder with three images."""
    made = tmp_path / "images"
    made.mkdir()
    for name in NAMES:
        (made / name).write_bytes(photos[name])
    return made


@pytest.fixture
def copied(tmp_path):
    """A copy of the script in a folder of its own, and so with an empty cache."""
    made = tmp_path / "copy"
    made.mkdir()
    return Path(shutil.copy(SCRIPT, made))


def vectors(folder):
    with contextlib.closing(sqlite3.connect(folder / "product_embeddings.sqlite3")) as db:
        found = db.execute(
            "select image_url, embedding from product_embeddings join assets on id = asset_id"
        )
        return {name: np.frombuffer(blob, "<f4") for name, blob in found}


def changed_model(tiny, made, change, **config):
    """A copy of the tiny model with other weights or another configuration."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if config:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        shape |= {"num_hidden_layers": 1, "patch_size": 32, "image_size": 224} | config
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape))
    else:
        model = CLIPVisionModelWithProjection.from_pretrained(tiny)
    change(model)
    model.save_pretrained(made)
    return made


# From the hub


def test_the_pinned_revision_is_read_from_the_cache_without_the_network(
    cli, folder, copied, tiny, photos
):
    import models

    models.hub_cache(copied.parent / ".cache" / "transformers")
    run = cli("--local", folder, script=copied, CLIP_MODEL=None)
    assert run.code == 0, run.err
    assert [line for line in run.err.splitlines() if not STAMPED.match(line)] == []
    assert "download" not in run.err
    images = [Image.open(io.BytesIO(photos[name])).convert("RGB") for name in NAMES]
    found = vectors(folder)
    for name, wanted in zip(NAMES, models.reference(tiny, images), strict=True):
        assert np.abs(found[name] - wanted).max() < 1e-5


def test_another_revision_in_the_cache_is_not_used(cli, folder, copied):
    import models

    cache = copied.parent / ".cache" / "transformers"
    models.hub_cache(cache)
    (snapshots,) = cache.glob("*/snapshots")
    (snapshots / models.REVISION).rename(snapshots / ("0" * 40))
    with ImageHost() as no_hub:  # which answers 404
        run = cli("--local", folder, script=copied, CLIP_MODEL=None, **{HUB: no_hub.url})
    assert run.code == 2
    assert "CLIP_MODEL" in run.error


def silent(handler):
    """The hub behind a firewall that drops packets: it never answers."""
    with contextlib.suppress(OSError):
        handler.connection.recv(1)
    handler.close_connection = True


@pytest.mark.parametrize("hub", ["closed port", "no such host", "silent", "not the hub"])
def test_without_hub_and_cache_one_line_names_clip_model(cli, folder, copied, hub):
    endpoints = {"closed port": "http://127.0.0.1:9", "no such host": "https://hub.invalid"}
    with ImageHost() as host:
        if hub == "silent":
            host.answer = silent
        run = cli(
            "--local",
            folder,
            script=copied,
            timeout=45,
            CLIP_MODEL=None,
            **{HUB: endpoints.get(hub, host.url)},
        )
    print(f"{hub}: {run.seconds:.1f} s")
    assert run.code == 2
    assert "CLIP_MODEL" in run.error
    assert [line for line in run.err.splitlines() if not STAMPED.match(line)] == [run.error]
    assert run.seconds < 30
    assert run.counts in ({}, run.counts | {"embedded": 0})


# From a folder


def test_a_missing_model_folder_is_named(cli, folder):
    run = cli("--local", folder, CLIP_MODEL="/no/such/model")
    assert run.code == 2
    assert "CLIP_MODEL" in run.error
    assert "/no/such/model" in run.error


def test_a_folder_without_a_model_is_named(cli, folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    run = cli("--local", folder, CLIP_MODEL=empty)
    assert run.code == 2
    assert "CLIP_MODEL" in run.error
    assert str(empty) in run.error
    assert [line for line in run.err.splitlines() if not STAMPED.match(line)] == [run.error]


@pytest.mark.parametrize("damage", ["cut off", "a pointer of Git LFS", "nonsense in the config"])
def test_a_damaged_model_is_one_line(cli, folder, tiny, tmp_path, damage):
    damaged = shutil.copytree(tiny, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "a pointer of Git LFS":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    else:
        (damaged / "config.json").write_text("{")
    run = cli("--local", folder, CLIP_MODEL=damaged)
    assert run.code == 2
    assert "CLIP_MODEL" in run.error
    assert [line for line in run.err.splitlines() if not STAMPED.match(line)] == [run.error]


@pytest.mark.parametrize(
    ("config", "number"),
    [({"projection_dim": 256}, "256"), ({"projection_dim": 512, "image_size": 336}, "336")],
    ids=["vectors of another size", "images of another size"],
)
def test_another_model_is_refused(cli, folder, tiny, tmp_path, config, number):
    model = changed_model(tiny, tmp_path / "model", lambda model: None, **config)
    run = cli("--local", folder, CLIP_MODEL=model)
    assert run.code == 2
    assert "CLIP_MODEL" in run.error
    assert number in run.error
    assert vectors(folder) == {}


def test_a_model_that_gives_no_numbers_fails_each_asset(cli, folder, tiny, tmp_path):
    def spoil(model):
        model.visual_projection.weight.data.fill_(float("nan"))

    run = cli("--local", folder, CLIP_MODEL=changed_model(tiny, tmp_path / "model", spoil))
    assert run.code == 1
    assert run.counts == run.counts | {"embedded": 0, "failed": 3}
    assert re.search(r"(?m)^ +3 +embed: ", run.out)
    assert vectors(folder) == {}
    again = cli("--local", folder)  # not the images' fault: tried again
    assert again.code == 0
    assert again.counts["embedded"] == 3


def test_nothing_of_the_libraries_is_printed(cli, folder):
    run = cli("--local", folder)
    assert run.code == 0
    assert [line for line in run.err.splitlines() if not STAMPED.match(line)] == []
    assert run.out.startswith("Embedded")


# What it gives


def test_encode_gives_unit_vectors_alone_and_in_a_batch(tiny, photos):
    import models

    import generate_embeddings as script

    images = [Image.open(io.BytesIO(photos[name])).convert("RGB") for name in NAMES]
    pixels = np.stack([script.preprocess(image) for image in images])
    encoder = script.ClipEncoder(script.Settings(clip_model=str(tiny)))
    wanted = models.reference(tiny, images)
    alone = np.concatenate([encoder.encode(one[None]) for one in pixels])
    together = encoder.encode(pixels)
    for got in (alone, together):
        assert got.dtype == np.float32
        assert got.shape == (3, 512)
        assert np.abs(got - wanted).max() < 1e-6
    with pytest.raises(ValueError, match="finite"):
        encoder.encode(np.full_like(pixels[:1], np.nan))


def test_without_the_private_operators_of_torch_the_vectors_are_the_same(tiny, monkeypatch):
    import torch

    pixels = np.random.default_rng(0).normal(size=(3, 3, 224, 224)).astype(np.float32)
    settings = script.Settings(clip_model=str(tiny))
    usual = script.ClipEncoder(settings).encode(pixels)

    def absent(*_):
        raise RuntimeError("no such operator for this processor")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", absent)
    assert np.abs(script.ClipEncoder(settings).encode(pixels) - usual).max() < 1e-5


def test_batches_give_the_vectors_of_single_images(cli, folder):
    assert cli("--local", folder).code == 0
    alone = vectors(folder)
    (folder / "product_embeddings.sqlite3").unlink()
    assert cli("--local", folder, "--batch-size", "2").code == 0
    together = vectors(folder)
    assert together.keys() == alone.keys() == set(NAMES)
    assert max(np.abs(together[name] - alone[name]).max() for name in NAMES) < 1e-6


def test_bfloat16_is_close_to_float32_or_refused(cli, folder):
    import torch

    assert cli("--local", folder).code == 0
    exact = vectors(folder)
    (folder / "product_embeddings.sqlite3").unlink()
    run = cli("--local", folder, "--dtype", "bfloat16")
    able = (yes for name, yes in torch.cpu.get_capabilities().items() if "bf16" in name)
    if any(yes is True for yes in able):
        rounded = vectors(folder)
        worst = max(np.linalg.norm(rounded[name] - exact[name]) for name in NAMES)
        assert 0 < worst < 0.05
    else:
        assert run.code == 2
        assert "--dtype bfloat16" in run.error


def test_a_device_that_is_not_there_is_named(cli, folder):
    run = cli("--local", folder, "--device", "mps" if sys.platform == "linux" else "cuda")
    assert run.code == 2
    assert "--device" in run.error
    assert run.counts["attempted"] == 0


def test_a_batch_that_fails_is_done_one_by_one():
    def encode(pixels):
        if (pixels == 3).any():
            raise RuntimeError("this one is too much")
        return np.zeros((len(pixels), 512), np.float32)

    batch = [
        (script.Asset(number, ""), np.full((3, 224, 224), number, np.float32))
        for number in range(8)
    ]
    results = {asset.id: outcome for asset, outcome in script.embed(encode, batch)}
    failed = [i for i, outcome in results.items() if isinstance(outcome, script.Failure)]
    assert failed == [3]
    assert results[3].stage == "embed"
    assert all(results[i].shape == (512,) for i in range(8) if i != 3)


def test_a_model_that_fails_every_time_does_not_go_through_the_whole_catalog(cli, tiny, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(80):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    broken = changed_model(
        tiny, tmp_path / "nan", lambda model: model.visual_projection.weight.data.fill_(np.nan)
    )
    run = cli("--local", folder, CLIP_MODEL=broken)
    assert run.code == 2
    assert "50 images failed in a row" in run.error
    assert 50 <= run.counts["failed"] < 80
