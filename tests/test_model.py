"""The model. The promises:

It is downloaded once, and is byte for byte the pinned one, or refused. An error on the way is one
line without a secret. A model whose vectors are not CLIP's is refused. The vectors are those of
transformers.
"""

import hashlib
import io
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CLOSED, SCRIPT, SMALL, TINY_VERSION, folder_vectors, wait_until
from PIL import Image
from stack import ImageHost

import generate_embeddings as script

WEIGHTS = "pytorch_model.bin"


class Hub(ImageHost):
    """A hub like the real one: a file's address describes the file, and leads to another host,
    which has its bytes. What goes wrong, in turn, stands in `faults`:

      429, 503, ...     this status, at the first address
      ("cut", n)        the connection breaks after n bytes
      "flip"            one bit is another one
      "a page"          a web page, at the first address
    """

    def __init__(self, files):
        super().__init__()
        self.data = files
        self.faults = deque()
        self.every = None  # the fault of every request for which `faults` has none
        self.gate = threading.Event()  # while it is not set, files come byte for byte
        self.gate.set()
        self.asked = []  # (name, first byte) of each answer with bytes
        self.logins = []  # (Host, Authorization) of each request

    def answer(self, handler):
        self.logins.append((handler.headers["Host"], handler.headers["Authorization"]))
        base = f"/openai/clip-vit-base-patch32/resolve/{script.MODEL_REVISION}/"
        if not handler.path.startswith(base):
            self.serve(handler, handler.path.removeprefix("/blob/"))
            return
        fault = self.faults[0] if self.faults else self.every
        if isinstance(fault, int) or fault == "a page":
            if self.faults:
                self.faults.popleft()
            status = fault if isinstance(fault, int) else 200
            handler.reply(status, [("Retry-After", "0")], b"<html>not now</html>")
            return
        name = handler.path.removeprefix(base)
        described = [
            ("Location", f"http://localhost:{self.port}/blob/{name}"),
            ("X-Repo-Commit", script.MODEL_REVISION),
            ("X-Linked-Etag", f'"{hashlib.sha256(self.data[name]).hexdigest()}"'),
            ("X-Linked-Size", str(len(self.data[name]))),
            ("X-Xet-Hash", "0" * 64),  # Xet must not be used
            ("X-Xet-Refresh-Route", "/xet"),
        ]
        handler.reply(302, described)

    def serve(self, handler, name):
        fault = self.faults.popleft() if self.faults else self.every
        data = self.data[name]
        start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "bytes=0-"))[1])
        rest = data[start:]
        if fault == "flip":
            rest = bytes([rest[0] ^ 1]) + rest[1:]
        if isinstance(fault, tuple):
            rest = rest[: fault[1]]
            handler.close_connection = True
        self.asked.append((name, start))
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        sent = 0
        while not self.gate.wait(0.2):
            handler.wfile.write(rest[sent : sent + 1])
            sent += 1
        handler.wfile.write(rest[sent:])


@pytest.fixture
def pinned(tmp_path_factory, tiny):
    """A hub's cache with the tiny model, as if it were the pinned one: its snapshot's folder."""
    import models

    return models.hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def pinned_files(pinned):
    """The files of that model, name -> bytes."""
    return {name: (pinned / name).read_bytes() for name in script.MODEL_FILES}


@pytest.fixture
def copied(tmp_path, pinned_files):
    """A copy of the script with an empty cache, for which the pinned model is the tiny one."""
    text = SCRIPT.read_text()
    for name, file in script.MODEL_FILES.items():
        data = pinned_files[name]
        text = text.replace(f"{file.size:_}", f"{len(data):_}")
        text = text.replace(file.sha256, hashlib.sha256(data).hexdigest())
    made = tmp_path / "copy" / "generate_embeddings.py"
    made.parent.mkdir()
    made.write_text(text)
    return made


def pretend(monkeypatch, files):
    """Makes these files, name -> bytes, the pinned model of this process."""
    pinned = {
        name: script.PinnedFile(len(data), hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    }
    monkeypatch.setattr(script, "MODEL_FILES", pinned)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub with three files of noise, which are the pinned model, and an empty cache.
    huggingface_hub does not sleep before it tries again."""
    noise = np.random.default_rng(0)
    sizes = {"config.json": 3_000, "tokenizer.json": 20_000, WEIGHTS: 1_000_000}
    files = {name: noise.bytes(size) for name, size in sizes.items()}
    pretend(monkeypatch, files)
    monkeypatch.setattr(script, "MODEL_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    awake = SimpleNamespace(sleep=lambda _: None)
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", awake)
    settings = ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
    for name in settings:
        monkeypatch.delenv(name, raising=False)
    with Hub(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def damage(path):
    """Flips one bit of a file."""
    time.sleep(0.05)  # clocks of file systems are coarse
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def downloaded(hub):
    """Downloads. Then the folder must hold the hub's files, and no more than marks beside them."""
    folder = script.pinned_model()
    assert {name: (folder / name).read_bytes() for name in hub.data} == hub.data
    others = {path.name for path in folder.iterdir()} - set(hub.data)
    assert others <= {f"{name}.checked" for name in hub.data}
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


# From the hub


@pytest.mark.parametrize(
    ("faults", "times"),
    [
        ([], 1),
        ([("cut", 300_000)], 2),
        (3 * [("cut", 300_000)], 4),
        ([429], 1),
        ([503, 503], 1),
        (["flip"], 2),
        ([("cut", 300_000), "flip", None], 3),
    ],
    ids=str,
)
def test_what_may_go_wrong_once_does_not_end_a_download(hub, caplog, faults, times):
    hub.faults += [None, None, *faults]  # config.json and tokenizer.json come as they are
    folder = downloaded(hub)
    assert [name for name, _ in hub.asked].count(WEIGHTS) == times
    assert ("is damaged" in caplog.text) == ("flip" in faults)
    asked = len(hub.logins)
    assert script.pinned_model() == folder
    assert len(hub.logins) == asked


def silent(handler):
    """The hub behind a firewall that drops packets: it never answers."""
    handler.rfile.read(1)
    handler.close_connection = True


@pytest.mark.parametrize(
    ("setting", "fault", "why"),
    [
        ({}, "flip", r"the hub serves another config\.json"),
        ({}, 404, "HTTP 404 Not Found"),
        ({}, 401, "HTTP 401 Unauthorized.*HF_TOKEN"),
        ({}, 503, "HTTP 503"),
        ({}, "a page", "the hub is missing the 'X-Repo-Commit' header"),
        ({}, ("cut", 10), "RemoteProtocolError"),
        ({}, "silent", "timed out"),
        ({"HF_ENDPOINT": f"{CLOSED}/SSL"}, None, "Connection refused"),
        ({"HF_ENDPOINT": "https://hub.invalid"}, None, "(not known|resolution)"),
        ({"HF_ENDPOINT": "http://127.0.0.1:no"}, None, "InvalidURL"),
        ({"HF_ENDPOINT": "no-url"}, None, "UnsupportedProtocol"),
        ({"HF_TOKEN": "hf_s3cret é"}, None, "UnicodeEncodeError"),
    ],
    ids=str,
)
def test_what_ends_a_download_is_one_line_without_secrets(
    hub, monkeypatch, caplog, setting, fault, why
):
    monkeypatch.setattr(script, "HUB_SECONDS", 0.2)
    hub.every = fault
    if fault == "silent":
        hub.answer = silent
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_s3cret"} | setting
    for name, value in settings.items():
        monkeypatch.setenv(name, value.replace("://", "://somebody:s3cret@"))
    with pytest.raises(script.RunError, match=rf"not be downloaded \(.*{why}.*CLIP_MODEL") as error:
        script.pinned_model()
    assert "\n" not in str(error.value)
    assert "s3cret" not in str(error.value) + caplog.text
    assert [path for path in script.MODEL_CACHE.rglob("*") if path.suffix == ".incomplete"] == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE forbids"),
        ("REQUESTS_CA_BUNDLE", "/no/file", "no file of certificates"),
        ("SSL_CERT_FILE", "/no/file", "no file of certificates"),
        ("HTTPS_PROXY", "socks4://127.0.0.1:9", "write socks5h"),
    ],
)
def test_no_download_where_the_environment_forbids_it(hub, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", name == "HF_HUB_OFFLINE")
    with pytest.raises(script.RunError, match=words):
        script.pinned_model()
    assert hub.logins == []


@pytest.mark.parametrize("token", [None, "hf_abc", "hf_abc\n"])
def test_the_token_goes_to_the_hub_alone(hub, monkeypatch, tmp_path, token):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\nmachine localhost login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    downloaded(hub)
    wanted = token and "Bearer hf_abc"
    assert set(hub.logins) == {
        (f"127.0.0.1:{hub.port}", wanted),
        (f"localhost:{hub.port}", None),  # where the files are
    }


@pytest.mark.parametrize("linked", [True, False])
def test_a_damaged_file_in_the_cache_is_deleted_and_fetched_once_more(hub, caplog, linked):
    weights = downloaded(hub) / WEIGHTS
    if not linked:  # as where the file system has no links
        weights.resolve().replace(weights)
    damage(weights)
    downloaded(hub)
    assert ["is damaged" in line for line in caplog.messages].count(True) == 1


def test_files_that_were_checked_are_not_read_again_until_they_change(hub, monkeypatch):
    folder = downloaded(hub)

    def refuse(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", refuse)
        assert script.pinned_model() == folder
        time.sleep(0.05)  # clocks of file systems are coarse
        os.utime(folder / WEIGHTS)
        with pytest.raises(AssertionError, match="read again"):
            script.pinned_model()
    downloaded(hub)
    assert len(hub.asked) == 3


def test_a_search_fetches_what_an_older_cache_lacks_alone(hub):
    folder = downloaded(hub)
    (folder / "tokenizer.json").resolve().unlink()
    assert script.pinned_model(script.TO_EMBED) == folder
    assert len(hub.asked) == 3
    downloaded(hub)
    assert [name for name, _ in hub.asked[3:]] == ["tokenizer.json"]


def test_two_runs_at_once_download_the_model_once(cli, small, copied, pinned_files, tmp_path):
    other = shutil.copytree(small, tmp_path / "other")
    with Hub(pinned_files) as hub:
        hub.gate.clear()
        runs = [
            cli.start("--local", images, script=copied, CLIP_MODEL=None, HF_ENDPOINT=hub.url)
            for images in (small, other)
        ]
        wait_until(lambda: any("waiting" in run.err for run in runs))
        hub.gate.set()
        first, second = (run.finish() for run in runs)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.noise == second.noise == []
    assert sorted(name for name, _ in hub.asked) == sorted(pinned_files)
    assert len(vectors(small)) == len(vectors(other)) == 3


def test_what_a_stopped_download_left_is_deleted_by_the_next(cli, small, copied, pinned_files):
    cache = copied.parent / ".cache" / "transformers"
    options = {"script": copied, "CLIP_MODEL": None}
    with Hub(pinned_files) as hub:
        hub.gate.clear()
        run = cli.start("--local", small, **options, HF_ENDPOINT=hub.url)
        wait_until(lambda: hub.asked)
        run.send_signal(signal.SIGINT)
        assert run.finish().code == 130
        assert len(list(cache.rglob("*.incomplete"))) == 1
        hub.gate.set()
        assert cli("--local", small, **options, HF_ENDPOINT=hub.url).code == 0
    assert list(cache.rglob("*.incomplete")) == []
    assert len(vectors(small)) == 3


@pytest.mark.parametrize(
    ("cache", "settings"),
    [
        ("copy/.cache/transformers", {}),  # the script's own
        ("home/hub", {"HF_HUB_CACHE": "home/hub"}),
        ("home/hub", {"HF_HOME": "home"}),
    ],
    ids=str,
)
def test_a_cache_is_used_without_the_network(
    cli, small, copied, tiny, photos, tmp_path, cache, settings
):
    import models

    models.hub_cache(tmp_path / cache)
    paths = {name: tmp_path / value for name, value in settings.items()}
    run = cli("--local", small, "--batch-size", "2", script=copied, CLIP_MODEL=None, **paths)
    assert run.code == 0, run.err
    assert run.noise == []
    assert "download" not in run.err
    found = vectors(small)
    for name, wanted in zip(SMALL, models.reference(tiny, open_photos(photos)), strict=True):
        assert np.abs(found[name] - wanted).max() < 1e-5


# From a folder


def test_a_damaged_copy_of_the_pinned_weights_is_refused(pinned, pinned_files, monkeypatch):
    pretend(monkeypatch, pinned_files)
    settings = script.Settings(clip_model=str(pinned))
    assert script.model_folder(settings, script.TO_EMBED) == pinned
    damage(pinned / WEIGHTS)
    with pytest.raises(script.RunError, match=r"CLIP_MODEL.+damaged.+MODEL_VERSION"):
        script.ClipEncoder(settings)
    own = script.Settings(clip_model=str(pinned), model_version="own")
    assert script.model_folder(own, script.TO_EMBED) == pinned


def refusal(folder, **settings):
    """Why the model in a folder is not used."""
    with pytest.raises(script.RunError) as error:
        encoder_of(folder, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", lambda data: b""),
        ("config.json", lambda data: b"{"),
        ("model.safetensors", lambda data: data[:-1000]),
        ("model.safetensors", lambda data: b"version https://git-lfs.github.com/spec/v1"),
        ("model.safetensors", None),
    ],
)
def test_a_folder_with_a_damaged_model_is_named(tiny, tmp_path, file, change):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    if change:
        (copy / file).write_bytes(change((copy / file).read_bytes()))
    else:
        (copy / file).unlink()
    said = refusal(copy)
    assert said.startswith(f"the model in {copy} can't be used")
    assert "CLIP_MODEL must be a folder with a copy" in said


@pytest.mark.parametrize("settings", [{"CLIP_MODEL": "missing"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_without_a_model_a_run_ends_in_one_line(cli, small, copied, settings):
    run = cli("--local", small, script=copied, **{"CLIP_MODEL": None} | settings)
    assert run.code == 2
    assert "CLIP_MODEL" in run.error
    assert run.noise == [run.error]
    assert run.counts == run.counts | {"attempted": 0, "left": 3}


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
def test_a_model_whose_vectors_are_not_clips_is_refused(tmp_path, config, word):
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


@pytest.mark.parametrize("model", ["tiny", "full"])
def test_the_vectors_are_those_of_transformers_alone_and_in_a_batch(request, photos, model):
    import models

    folder = request.getfixturevalue(model)
    if model == "full":
        of_transformers = request.getfixturevalue("of_transformers")
        wanted = np.stack([of_transformers[name] for name in SMALL])
    else:
        wanted = models.reference(folder, open_photos(photos))
    version = script.MODEL_VERSION if model == "full" else TINY_VERSION
    encoder = encoder_of(folder, model_version=version)
    pixels = pixels_of(open_photos(photos))
    alone = np.concatenate([encoder.encode(one[None]) for one in pixels])
    for got in (alone, encoder.encode(pixels)):
        assert got.dtype == np.float32
        assert got.shape == (3, 512)
        assert np.abs(got - wanted).max() < 1e-5


def test_without_the_private_operators_of_torch_the_vectors_are_the_same(tiny, monkeypatch):
    import torch

    pixels = np.random.default_rng(0).normal(size=(3, 3, 224, 224)).astype(np.float32)
    usual = encoder_of(tiny).encode(pixels)

    def absent(*_):
        raise RuntimeError("no such operator for this processor")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", absent)
    assert np.abs(encoder_of(tiny).encode(pixels) - usual).max() < 1e-5


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
    batch = [np.zeros((3, 96, 96), np.float32)] * 2
    with pytest.raises(script.RunError, match=r"failed on 2 images at once \(.+--batch-size"):
        encoder.embed(batch)  # of a size for which the model has no positions


def test_numbers_that_are_not_finite_cost_their_own_image_alone(tiny):
    pixels = np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32)
    pixels[3] = np.nan
    encoder = encoder_of(tiny)
    vectors = encoder.embed([*pixels])
    assert not np.isfinite(vectors[3]).any()
    for number in {*range(8)} - {3}:
        assert np.abs(vectors[number] - encoder.encode(pixels[[number]])[0]).max() < 1e-6


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
