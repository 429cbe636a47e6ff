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
from conftest import SCRIPT, TINY_VERSION
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
        found = db.execute("select asset_id, embedding from images where embedding is not null")
        return {name: np.frombuffer(blob, "<f4") for name, blob in found}


def open_photos(photos):
    return [Image.open(io.BytesIO(photos[name])).convert("RGB") for name in NAMES]


def pixels_of(images):
    return np.stack([script.normalise(np.asarray(script.square(image))) for image in images])


def tiny_encoder(tiny):
    return script.ClipEncoder(script.Settings(clip_model=str(tiny), model_version=TINY_VERSION))


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
    found = vectors(folder)
    for name, wanted in zip(NAMES, models.reference(tiny, open_photos(photos)), strict=True):
        assert np.abs(found[name] - wanted).max() < 1e-5


@pytest.mark.parametrize(("name", "below"), [("HF_HUB_CACHE", ""), ("HF_HOME", "hub")])
def test_a_hub_cache_that_is_there_is_used(cli, folder, copied, tmp_path, name, below):
    import models

    models.hub_cache(tmp_path / "shared" / below)
    run = cli("--local", folder, script=copied, CLIP_MODEL=None, **{name: tmp_path / "shared"})
    assert run.code == 0, run.err
    assert "download" not in run.err
    assert not (copied.parent / ".cache").exists()


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


def spoil(model):
    model.visual_projection.weight.data.fill_(np.nan)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"projection_dim": 256}, "256"),
        ({"image_size": 336}, "size"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"change": spoil}, "finite"),
    ],
    ids=["vectors of another size", "images of another size", "another activation", "no numbers"],
)
def test_a_model_whose_vectors_are_no_clips_is_refused(cli, folder, tmp_path, config, word):
    import models

    run = cli("--local", folder, CLIP_MODEL=models.other_model(tmp_path / "model", **config))
    assert run.code == 2
    assert "CLIP_MODEL" in run.error
    assert word in run.error.partition("can't be used")[2]
    assert vectors(folder) == {}


@pytest.mark.parametrize("version", [None, script.MODEL_VERSION])
def test_another_shape_is_refused_under_the_name_of_vit_b_32(cli, folder, tmp_path, version):
    import models

    model = models.other_model(tmp_path / "model", patch_size=16)
    run = cli("--local", folder, CLIP_MODEL=model, MODEL_VERSION=version)
    assert run.code == 2
    assert "MODEL_VERSION" in run.error
    assert vectors(folder) == {}


def test_another_shape_is_accepted_under_a_name_of_its_own(cli, folder, tmp_path, photos):
    import models

    model = models.other_model(tmp_path / "model", patch_size=16)
    run = cli("--local", folder, CLIP_MODEL=model, MODEL_VERSION="patch-16")
    assert run.code == 0, run.err
    found = vectors(folder)
    for name, wanted in zip(NAMES, models.reference(model, open_photos(photos)), strict=True):
        assert np.abs(found[name] - wanted).max() < 1e-5


def test_nothing_of_the_libraries_is_printed(cli, folder):
    run = cli("--local", folder)
    assert run.code == 0
    assert [line for line in run.err.splitlines() if not STAMPED.match(line)] == []
    assert run.out.startswith("Embedded")


# What it gives


def test_vit_b_32_needs_no_name_and_gives_the_vectors_of_transformers(full, photos):
    import models

    images = open_photos(photos)
    encoder = script.ClipEncoder(script.Settings(clip_model=str(full)))
    assert np.abs(encoder.encode(pixels_of(images)) - models.reference(full, images)).max() < 1e-5


def test_encode_gives_unit_vectors_alone_and_in_a_batch(tiny, photos):
    import models

    images = open_photos(photos)
    pixels = pixels_of(images)
    encoder = tiny_encoder(tiny)
    wanted = models.reference(tiny, images)
    alone = np.concatenate([encoder.encode(one[None]) for one in pixels])
    together = encoder.encode(pixels)
    for got in (alone, together):
        assert got.dtype == np.float32
        assert got.shape == (3, 512)
        assert np.abs(got - wanted).max() < 1e-6


def test_without_the_private_operators_of_torch_the_vectors_are_the_same(tiny, monkeypatch):
    import torch

    pixels = np.random.default_rng(0).normal(size=(3, 3, 224, 224)).astype(np.float32)
    usual = tiny_encoder(tiny).encode(pixels)

    def absent(*_):
        raise RuntimeError("no such operator for this processor")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", absent)
    assert np.abs(tiny_encoder(tiny).encode(pixels) - usual).max() < 1e-5


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


def test_a_batch_that_does_not_fit_says_so(tiny):
    encoder = tiny_encoder(tiny)
    batch = [script.Loaded(script.Asset(n, ""), np.zeros((3, 96, 96), np.float32)) for n in (1, 2)]
    with pytest.raises(script.RunError, match=r"failed on 2 images at once \(.+--batch-size"):
        encoder.embed(batch)  # of a size for which the model has no positions


def test_numbers_that_are_not_finite_cost_their_own_image_alone(tiny):
    pixels = np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32)
    pixels[3] = np.nan
    encoder = tiny_encoder(tiny)
    batch = [script.Loaded(script.Asset(n, ""), one) for n, one in enumerate(pixels)]
    results = {result.asset.id: result for result in encoder.embed(batch)}
    failed = results.pop(3)
    assert (failed.stage, failed.permanent) == ("embed", False)
    for number, result in results.items():
        assert np.abs(result.vector - encoder.encode(pixels[[number]])[0]).max() < 1e-6
