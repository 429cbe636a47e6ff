"""The model: where it comes from, what is said where it can't be had, what it gives."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import signal
import sys
import time
from collections import deque

import numpy as np
import pytest
from conftest import CLOSED, SCRIPT, SMALL, TINY_VERSION, folder_vectors, wait_until
from PIL import Image
from stack import ImageHost

import generate_embeddings as script

HUB = "HF_ENDPOINT"  # where the hub is; conftest.py sets it to a port that is closed


@pytest.fixture
def pinned(tmp_path_factory, tiny):
    """A hub's cache with the tiny model, as if it were the pinned one: its snapshot's folder."""
    import models

    return models.hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def copied(tmp_path, pinned):
    """A copy of the script with an empty cache, for which the pinned model is the tiny one."""
    text = SCRIPT.read_text()
    for name, file in script.MODEL_FILES.items():
        data = (pinned / name).read_bytes()
        for now, then in (
            (f"{file.size:_}", f"{len(data):_}"),
            (file.sha256, hashlib.sha256(data).hexdigest()),
        ):
            assert text.count(now) == 1, now
            text = text.replace(now, then)
    for now, then in (
        ("HUB_WAIT = 2.0", "HUB_WAIT = 0.1"),
        ("HUB_SECONDS = 10.0", "HUB_SECONDS = 2.0"),
    ):
        assert text.count(now) == 1, now
        text = text.replace(now, then)
    made = tmp_path / "copy" / "generate_embeddings.py"
    made.parent.mkdir()
    made.write_text(text)
    return made


@pytest.fixture
def pretended(monkeypatch):
    """Makes these files, name -> bytes, the pinned model of this process."""

    def pretend(files):
        sizes = {
            name: script.PinnedFile(len(data), hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        }
        monkeypatch.setattr(script, "MODEL_FILES", sizes)

    return pretend


class Hub(ImageHost):
    """A hub as the real one is: a file's address redirects to where its bytes are, which serves
    any range of them. What is to go wrong, in turn, stands in `faults`:

      429, 503, 404     this status, at the first address
      ("cut", n)        the connection breaks after n bytes
      "flip"            one bit is another one
      "from the start"  whatever range is asked for
    """

    def __init__(self, files, every=None, seconds=0.0):
        super().__init__()
        self.data = files
        self.faults = deque()
        self.every = every  # the fault of every request for which `faults` has none
        self.seconds = seconds  # between two parts of an answer
        self.asked = []  # (name, first byte, bytes sent)

    def answer(self, handler):
        base = f"/openai/clip-vit-base-patch32/resolve/{script.MODEL_REVISION}/"
        if handler.path.startswith(base):
            name = handler.path.removeprefix(base)
            fault = self.faults[0] if self.faults else self.every
            if isinstance(fault, int):
                if self.faults:
                    self.faults.popleft()
                handler.reply(fault, [("Retry-After", "0")], b"<html>not now</html>")
            else:
                handler.reply(302, [("Location", f"/blob/{name}"), ("ETag", f'"{name}"')], b"")
        else:
            self.serve(handler, handler.path.removeprefix("/blob/"))

    def serve(self, handler, name):
        fault = self.faults.popleft() if self.faults else self.every
        data = self.data[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"])[1])
        if fault == "from the start":
            start = 0
        rest = data[start:]
        if fault == "flip":
            rest = bytes([rest[0] ^ 1]) + rest[1:]
        if isinstance(fault, tuple):
            rest = rest[: fault[1]]
            handler.close_connection = True
        self.asked.append((name, start, len(rest)))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        handler.end_headers()
        for at in range(0, len(rest), 50_000):
            handler.wfile.write(rest[at : at + 50_000])
            time.sleep(self.seconds)


@pytest.fixture
def hub(pretended, monkeypatch, tmp_path):
    """A running Hub with three files of noise, which are the pinned model, and an empty cache."""
    noise = np.random.default_rng(0)
    sizes = {"config.json": 3_000, "tokenizer.json": 20_000, "pytorch_model.bin": 1_000_000}
    files = {name: noise.bytes(size) for name, size in sizes.items()}
    pretended(files)
    monkeypatch.setattr(script, "MODEL_CACHE", tmp_path / "cache")
    monkeypatch.setattr(script, "HUB_WAIT", 0.01)
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with Hub(files) as hub:
        monkeypatch.setenv(HUB, hub.url)
        yield hub


def damage(path):
    """Flips one bit of a file."""
    time.sleep(0.05)  # clocks of file systems are coarse
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def downloaded(hub):
    """Downloads; what there is then must be the hub's files and no more than marks beside them."""
    folder = script.download()
    assert {name: (folder / name).read_bytes() for name in hub.data} == hub.data
    others = {path.name for path in folder.iterdir()} - set(hub.data)
    assert others <= {f"{name}.checked" for name in hub.data} | {"download.lock"}
    return folder


def vectors(folder):
    return {path: row.vector for path, row in folder_vectors(folder).items()}


def open_photos(photos):
    return [Image.open(io.BytesIO(photos[name])).convert("RGB") for name in SMALL]


def pixels_of(images):
    return np.stack([script.normalise(np.asarray(script.square(image))) for image in images])


def encoder_of(folder, **settings):
    given = {"clip_model": str(folder), "model_version": TINY_VERSION}
    return script.ClipEncoder(script.Settings(**given | settings))


def refusal(folder, **settings):
    """Why the model in a folder is not used."""
    with pytest.raises(script.RunError) as error:
        encoder_of(folder, **settings)
    return str(error.value)


# From the hub

WEIGHTS = "pytorch_model.bin"


def test_the_model_is_downloaded_once_and_a_line_said_at_each_tenth(hub, caplog):
    caplog.set_level("INFO")
    folder = downloaded(hub)
    said = [line for line in caplog.messages if line.startswith("downloaded")]
    assert said == [f"downloaded {tenth}0 % of the model" for tenth in range(1, 11)]
    asked = len(hub.asked)
    assert script.download() == folder
    assert len(hub.asked) == asked == 3


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([("cut", 300_000)], [(0, 300_000), (300_000, 700_000)]),
        (3 * [("cut", 300_000)], [(0, 300_000), (300_000,), (600_000,), (900_000,)]),
        ([("cut", 300_000), "from the start"], [(0, 300_000), (0, 1_000_000)]),
        ([429], [(0, 1_000_000)]),
        ([503, 503], [(0, 1_000_000)]),
        (["flip"], [(0, 1_000_000), (0, 1_000_000)]),
        ([("cut", 300_000), "flip", None], [(0, 300_000), (300_000,), (0, 1_000_000)]),
    ],
    ids=str,
)
def test_what_may_go_wrong_once_does_not_end_a_download(hub, faults, requests):
    hub.faults += [None, None, *faults]  # config.json and tokenizer.json come as they are
    downloaded(hub)
    assert len(requests) == sum(name == WEIGHTS for name, *_ in hub.asked)


def test_a_download_that_is_cut_again_and_again_goes_on_where_it_was_cut(hub):
    hub.every = ("cut", 150_000)
    downloaded(hub)
    starts = [start for name, start, _ in hub.asked if name == WEIGHTS]
    assert starts == sorted(set(starts))
    assert len(starts) < 15  # each cut costs what was under way, a chunk at most


def test_the_next_run_goes_on_where_one_was_cut_for_good(hub):
    hub.faults += [None, None, ("cut", 500_000), *4 * [503]]
    with pytest.raises(script.RunError, match=r"503.+goes on"):
        script.download()
    hub.faults.clear()
    downloaded(hub)
    name, start, _ = hub.asked[-1]
    assert name == WEIGHTS
    assert start > 400_000


def test_a_hub_that_serves_another_file_is_refused_in_one_line(hub):
    hub.every = "flip"
    with pytest.raises(script.RunError, match=r"another config\.json.+CLIP_MODEL") as caught:
        script.download()
    assert "\n" not in str(caught.value)
    assert hub.url in str(caught.value)
    assert [path.name for path in script.MODEL_CACHE.rglob("config*")] == []


def test_a_file_of_another_length_is_not_even_taken(hub):
    hub.data = hub.data | {WEIGHTS: 3 * hub.data[WEIGHTS]}
    with pytest.raises(script.RunError, match=r"another pytorch_model\.bin"):
        script.download()
    assert [path.name for path in script.MODEL_CACHE.rglob("pytorch*")] == []
    assert [name for name, *_ in hub.asked].count(WEIGHTS) == 1


def test_a_damaged_file_in_the_cache_is_deleted_and_fetched_once_more(hub, caplog):
    folder = downloaded(hub)
    blob = folder / "blob"  # as the hub's own client keeps them, beside a link
    (folder / WEIGHTS).rename(blob)
    (folder / WEIGHTS).symlink_to(blob)
    damage(blob)
    downloaded(hub)
    assert ["damaged" in line for line in caplog.messages].count(True) == 1


def test_files_that_were_checked_are_not_read_again_until_they_change(hub, monkeypatch):
    folder = downloaded(hub)

    def refuse(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", refuse)
        assert script.download() == folder
        time.sleep(0.05)  # clocks of file systems are coarse
        os.utime(folder / WEIGHTS)
        with pytest.raises(AssertionError, match="read again"):
            script.download()
    downloaded(hub)
    assert len(hub.asked) == 3


def test_a_search_fetches_what_an_older_cache_lacks_alone(hub):
    folder = downloaded(hub)
    (folder / "tokenizer.json").unlink()
    assert script.download(script.TO_EMBED) == folder
    assert len(hub.asked) == 3
    downloaded(hub)
    assert [name for name, *_ in hub.asked[3:]] == ["tokenizer.json"]


def test_two_runs_at_once_download_the_model_once(cli, small, copied, pinned, tmp_path):
    other = shutil.copytree(small, tmp_path / "other")
    files = {name: (pinned / name).read_bytes() for name in script.MODEL_FILES}
    with Hub(files, seconds=0.1) as hub:
        runs = [
            cli.start("--local", images, script=copied, CLIP_MODEL=None, **{HUB: hub.url})
            for images in (small, other)
        ]
        first, second = sorted((run.finish() for run in runs), key=lambda run: "waiting" in run.err)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "waiting" in second.err
    assert first.err.count("downloaded") == 10
    assert sorted(name for name, *_ in hub.asked) == sorted(files)
    assert len(vectors(small)) == len(vectors(other)) == 3


def test_after_ctrl_c_a_download_goes_on_where_it_stopped(cli, small, copied, pinned):
    files = {name: (pinned / name).read_bytes() for name in script.MODEL_FILES}
    options = {"script": copied, "CLIP_MODEL": None}
    with Hub(files, seconds=0.2) as hub:
        run = cli.start("--local", small, **options, **{HUB: hub.url})
        wait_until(lambda: "downloaded" in run.err)
        run.send_signal(signal.SIGINT)
        assert run.finish().code == 130
        hub.seconds = 0
        assert cli("--local", small, **options, **{HUB: hub.url}).code == 0
    assert [name for name, *_ in hub.asked] == [*files, WEIGHTS]
    assert hub.asked[-1][1] > 0
    assert len(vectors(small)) == 3


def test_the_pinned_revision_is_read_from_the_cache_without_the_network(
    cli, small, copied, tiny, photos
):
    import models

    models.hub_cache(copied.parent / ".cache" / "transformers")
    run = cli("--local", small, script=copied, CLIP_MODEL=None)
    assert run.code == 0, run.err
    assert run.noise == []
    assert "download" not in run.err
    found = vectors(small)
    for name, wanted in zip(SMALL, models.reference(tiny, open_photos(photos)), strict=True):
        assert np.abs(found[name] - wanted).max() < 1e-5


@pytest.mark.parametrize(("name", "below"), [("HF_HUB_CACHE", "hub"), ("HF_HOME", "")])
def test_a_hub_cache_that_is_there_is_used(pinned, pretended, monkeypatch, tmp_path, name, below):
    pretended({name: (pinned / name).read_bytes() for name in script.MODEL_FILES})
    monkeypatch.setattr(script, "MODEL_CACHE", tmp_path / "cache")
    (tmp_path / "hub").symlink_to(pinned.parents[2])
    for variable in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, str(tmp_path / below))
    assert script.download().resolve() == pinned.resolve()
    assert not (tmp_path / "cache").exists()


def test_another_revision_in_the_cache_is_not_used(hub):
    folder = downloaded(hub)
    folder.rename(folder.with_name("0" * 40))
    assert downloaded(hub) == folder
    assert len(hub.asked) == 6


def silent(handler):
    """The hub behind a firewall that drops packets: it never answers."""
    with contextlib.suppress(OSError):
        handler.connection.recv(1)
    handler.close_connection = True


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (f"{CLOSED}/SSL", "connection refused"),  # whatever words are in the address
        ("https://hub.invalid", "host not found"),
        ("silent", "in time"),
        ("not the hub", "404"),
    ],
)
def test_without_hub_and_cache_one_line_names_clip_model(hub, monkeypatch, what, why):
    monkeypatch.setattr(script, "HUB_SECONDS", 1.0)
    if what == "silent":
        hub.answer = silent
    elif what == "not the hub":
        hub.every = 404
    else:
        monkeypatch.setenv(HUB, what)
    with pytest.raises(script.RunError, match=rf"not be downloaded \(.*{why}.*CLIP_MODEL") as error:
        script.download()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("token", "arrives"), [("hf_abc\n", True), ("hf_a\nbc", False)])
def test_a_token_with_an_end_of_line_is_not_printed(hub, monkeypatch, token, arrives):
    monkeypatch.setenv("HF_TOKEN", token)
    if arrives:
        downloaded(hub)
        return
    with pytest.raises(script.RunError, match=r"^HF_TOKEN holds .* set it anew$") as error:
        script.download()
    assert "hf_a" not in str(error.value)


def test_a_run_without_hub_and_cache_ends_with_that_line(cli, small, copied):
    run = cli("--local", small, script=copied, CLIP_MODEL=None)
    assert run.code == 2
    assert "CLIP_MODEL" in run.error
    assert run.noise == [run.error]
    assert run.counts == run.counts | {"attempted": 0, "left": 3}


# From a folder


def test_a_folder_without_a_model_is_named(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        said = refusal(folder)
        assert said.startswith(f"the model in {folder} can't be used")
        assert "CLIP_MODEL must be a folder with a copy" in said


def test_a_damaged_copy_of_the_pinned_weights_is_refused(pinned, pretended):
    pretended({name: (pinned / name).read_bytes() for name in script.MODEL_FILES})
    settings = script.Settings(clip_model=str(pinned))
    assert script.model_folder(settings, script.TO_EMBED) == pinned
    damage(pinned / WEIGHTS)
    with pytest.raises(script.RunError, match=r"CLIP_MODEL.+damaged.+MODEL_VERSION"):
        script.ClipEncoder(settings)
    own = script.Settings(clip_model=str(pinned), model_version="own")
    assert script.model_folder(own, script.TO_EMBED) == pinned


@pytest.fixture
def damaged(tiny, tmp_path):
    """A copy of the tiny model that lacks the end of its weights."""
    copy = shutil.copytree(tiny, tmp_path / "damaged")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return copy


def test_a_model_that_can_not_be_used_ends_the_run_in_one_line(cli, small, damaged):
    run = cli("--local", small, CLIP_MODEL=damaged)
    assert run.code == 2
    assert "CLIP_MODEL" in run.error
    assert run.noise == [run.error]
    assert vectors(small) == {}


def test_damage_to_a_model_is_named(damaged):
    (damaged / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "CLIP_MODEL" in refusal(damaged)
    (damaged / "config.json").write_text("{")
    assert "CLIP_MODEL" in refusal(damaged)


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
def test_a_model_whose_vectors_are_no_clips_is_refused(tmp_path, config, word):
    import models

    said = refusal(models.other_model(tmp_path / "model", **config))
    assert "CLIP_MODEL" in said
    assert word in said.partition("can't be used")[2]


def test_another_shape_wants_a_name_of_its_own(tmp_path, photos):
    import models

    model = models.other_model(tmp_path / "model", patch_size=16)
    assert "set MODEL_VERSION" in refusal(model, model_version=script.MODEL_VERSION)
    images = open_photos(photos)
    made = encoder_of(model, model_version="patch-16").encode(pixels_of(images))
    assert np.abs(made - models.reference(model, images)).max() < 1e-5


# What it gives


def test_vit_b_32_needs_no_name_and_gives_the_vectors_of_transformers(
    full, photos, of_transformers
):
    encoder = script.ClipEncoder(script.Settings(clip_model=str(full)))
    made = encoder.encode(pixels_of(open_photos(photos)))
    assert np.abs(made - [of_transformers[name] for name in SMALL]).max() < 1e-5


def test_encode_gives_unit_vectors_alone_and_in_a_batch(tiny, photos):
    import models

    images = open_photos(photos)
    pixels = pixels_of(images)
    encoder = encoder_of(tiny)
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
    usual = encoder_of(tiny).encode(pixels)

    def absent(*_):
        raise RuntimeError("no such operator for this processor")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", absent)
    assert np.abs(encoder_of(tiny).encode(pixels) - usual).max() < 1e-5


def test_batches_give_the_vectors_of_transformers(cli, small, tiny, photos):
    import models

    assert cli("--local", small, "--batch-size", "2").code == 0
    found = vectors(small)
    for name, wanted in zip(SMALL, models.reference(tiny, open_photos(photos)), strict=True):
        assert np.abs(found[name] - wanted).max() < 1e-5


def test_bfloat16_is_close_to_float32_or_refused(cli, small, tiny, photos):
    import models
    import torch

    exact = dict(zip(SMALL, models.reference(tiny, open_photos(photos)), strict=True))
    run = cli("--local", small, "--dtype", "bfloat16")
    able = (yes for name, yes in torch.cpu.get_capabilities().items() if "bf16" in name)
    if any(yes is True for yes in able):
        rounded = vectors(small)
        worst = max(np.linalg.norm(rounded[name] - exact[name]) for name in SMALL)
        assert 1e-4 < worst < 0.05  # float32 comes closer
    else:
        assert run.code == 2
        assert "--dtype bfloat16" in run.error


def test_a_device_that_is_not_there_is_named(tiny):
    assert "--device" in refusal(tiny, device="mps" if sys.platform == "linux" else "cuda")


def test_a_batch_that_does_not_fit_says_so(tiny):
    encoder = encoder_of(tiny)
    batch = [script.Loaded(script.Asset(n, ""), np.zeros((3, 96, 96), np.float32)) for n in (1, 2)]
    with pytest.raises(script.RunError, match=r"failed on 2 images at once \(.+--batch-size"):
        encoder.embed(batch)  # of a size for which the model has no positions


def test_numbers_that_are_not_finite_cost_their_own_image_alone(tiny):
    pixels = np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32)
    pixels[3] = np.nan
    encoder = encoder_of(tiny)
    batch = [script.Loaded(script.Asset(n, ""), one) for n, one in enumerate(pixels)]
    results = {result.asset.id: result for result in encoder.embed(batch)}
    failed = results.pop(3)
    assert (failed.stage, failed.permanent) == ("embed", False)
    for number, result in results.items():
        assert np.abs(result.vector - encoder.encode(pixels[[number]])[0]).max() < 1e-6


# Words

TEXTS = ["red mug", "", "a mug  in the\tDark", "word " * 200, "naïve \u8336 <|endoftext|> 2"]


@pytest.mark.parametrize("model", ["tiny", "full"])
def test_words_get_the_vectors_of_transformers(request, model):
    import models

    folder = request.getfixturevalue(model)
    encoder = script.TextEncoder(script.Settings(clip_model=str(folder)))
    found = encoder.encode(TEXTS)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), 512)
    assert np.abs(found - models.reference_of_words(folder, TEXTS)).max() < 1e-5


def test_words_need_the_tokenizer_and_the_text_tower(tiny, tmp_path):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(script.RunError, match=r"tokenizer\.json"):
        script.TextEncoder(script.Settings(clip_model=str(copy)))
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(script.RunError, match="CLIP_MODEL"):
        script.TextEncoder(script.Settings(clip_model=str(copy)))


def test_words_and_pictures_share_a_model(tiny):
    """The towers are read from one file, and neither disturbs the other."""
    settings = script.Settings(clip_model=str(tiny), model_version=TINY_VERSION)
    before = script.TextEncoder(settings).encode(["red mug"])
    images = script.ClipEncoder(settings).encode(np.zeros((1, 3, 224, 224), np.float32))
    assert images.shape == before.shape
    assert np.array_equal(script.TextEncoder(settings).encode(["red mug"]), before)
