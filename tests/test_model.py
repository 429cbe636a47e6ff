"""The model is downloaded once, and is byte for byte the pinned one, or refused. An error on the
way is one line without a secret. A model whose vectors are not CLIP's is refused. The vectors are
those of transformers.
"""

import hashlib
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import certifi
import models
import numpy as np
import pytest
from conftest import CLOSED, SMALL, TINY_VERSION, folder_vectors, wait_until
from PIL import Image
from stack import ImageHost

import generate_embeddings as script

WEIGHTS = "pytorch_model.bin"


class Hub(ImageHost):
    """A hub like the real one: a file's address describes the file, and leads to another host,
    which has its bytes. What goes wrong, in turn, stands in `faults`:

      429, 503, ...     this status and a web page, at the first address
      "silent"          no answer, at the first address
      ("cut", n)        the connection breaks after n bytes
      "flip"            one bit is another one
    """

    def __init__(self, files):
        super().__init__()
        self.data = files
        self.faults = deque()
        self.every = None  # the fault of every request for which `faults` has none
        self.gate = threading.Event()  # while it is not set, files come byte for byte
        self.gate.set()
        self.asked = []  # the name of each file whose bytes were sent
        self.logins = []  # (Host, Authorization) of each request

    def answer(self, handler):
        self.logins.append((handler.headers["Host"], handler.headers["Authorization"]))
        base, _, name = handler.path.rpartition("/")
        fault = self.faults[0] if self.faults else self.every
        if base == "/blob":
            self.serve(handler, name)
        elif fault == "silent":
            handler.rfile.read(1)
            handler.close_connection = True
        elif isinstance(fault, int):
            if self.faults:
                self.faults.popleft()
            handler.reply(fault, [("Retry-After", "0")], b"<html>not now</html>")
        else:
            assert base == f"/{script.MODEL_ID}/resolve/{script.MODEL_REVISION}"
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
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        rest = data[start:]
        if fault == "flip":
            rest = bytes([rest[0] ^ 1]) + rest[1:]
        if isinstance(fault, tuple):
            rest = rest[: fault[1]]
            handler.close_connection = True
        self.asked.append(name)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        sent = 0
        while not self.gate.wait(0.2):
            handler.wfile.write(rest[sent : sent + 1])
            sent += 1
        handler.wfile.write(rest[sent:])


@pytest.fixture
def pinned(tmp_path):
    """The folder of a hub's cache with the tiny model, as if it were the pinned one."""
    return models.hub_cache(tmp_path / "hub")


def pinned_files(files):
    """MODEL_FILES for these files, name -> bytes."""
    return {
        name: script.PinnedFile(len(data), hashlib.sha256(data).hexdigest())
        for name, data in files.items()
    }


def read(folder):
    return {name: (folder / name).read_bytes() for name in script.MODEL_FILES}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running Hub with three files of noise, which are the pinned model, and empty caches.
    huggingface_hub does not sleep before it tries again."""
    noise = np.random.default_rng(0)
    sizes = {"config.json": 3_000, "tokenizer.json": 20_000, WEIGHTS: 1_000_000}
    files = {name: noise.bytes(size) for name, size in sizes.items()}
    monkeypatch.setattr(script, "MODEL_FILES", pinned_files(files))
    monkeypatch.setattr(script, "MODEL_CACHE", tmp_path / "cache")
    unreadable = "x" * 300  # the system knows no such name
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / unreadable))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    awake = SimpleNamespace(sleep=lambda _: None)
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", awake)
    monkeypatch.setenv("SSL_CERT_FILE", "")  # what the script sets is taken back
    for name in ("HF_TOKEN", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with Hub(files) as hub:
        lead_to(hub.url, monkeypatch)
        yield hub


def lead_to(url, monkeypatch):
    """Makes a URL the HF_ENDPOINT that huggingface_hub has read."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def damage(path):
    """Flips one bit of a file."""
    time.sleep(0.05)  # clocks of file systems are coarse
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def downloaded(hub):
    """Downloads. Then the folder must hold the hub's files, and no more than marks beside them."""
    folder = script.pinned_model()
    assert read(folder) == hub.data
    others = {path.name for path in folder.iterdir()} - set(hub.data)
    assert others <= {f"{name}.checked" for name in hub.data}
    return folder


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
    [(3 * [("cut", 300_000)], 4), ([429, 503], 1), ([("cut", 300_000), "flip", None], 3)],
    ids=str,
)
def test_what_may_go_wrong_once_does_not_end_a_download(hub, caplog, faults, times):
    hub.faults += [None, None, *faults]  # config.json and tokenizer.json come as they are
    folder = downloaded(hub)
    assert hub.asked.count(WEIGHTS) == times
    assert ("is damaged" in caplog.text) == ("flip" in faults)
    asked = len(hub.logins)
    assert script.pinned_model() == folder
    assert len(hub.logins) == asked


@pytest.mark.parametrize(
    ("setting", "fault", "why"),
    [
        ({}, "flip", "hub's config.json is not"),
        ({}, 503, "(HTTP 503)"),
        ({}, 200, "(FileMetadataError)"),
        ({}, ("cut", 10), "(RemoteProtocolError)"),
        ({}, "silent", "(ReadTimeout)"),
        ({"HF_ENDPOINT": CLOSED}, None, "(ConnectError)"),
        ({"HF_TOKEN": "hf_s3cret é"}, None, "(UnicodeEncodeError)"),
        ({"HF_HUB_OFFLINE": "1"}, None, "(OfflineModeIsEnabled)"),
        ({"REQUESTS_CA_BUNDLE": "/no/file"}, None, "/no/file is no file of certificates"),
        ({"HTTPS_PROXY": "socks4://127.0.0.1:9"}, None, "write socks5h"),
    ],
    ids=str,
)
def test_what_ends_a_download_is_one_line_without_secrets(
    hub, monkeypatch, caplog, capfd, setting, fault, why
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "HF_HUB_OFFLINE" in setting)
    hub.every = fault
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_s3cret"} | setting
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    lead_to(settings["HF_ENDPOINT"].replace("://", "://somebody:s3cret@"), monkeypatch)
    with pytest.raises(script.RunError) as error:
        script.pinned_model()
    said = str(error.value)
    assert why in said
    assert "\n" not in said
    assert "s3cret" not in said + caplog.text + "".join(capfd.readouterr())
    assert list(script.MODEL_CACHE.rglob("*.incomplete")) == []


@pytest.mark.parametrize("token", [None, "hf_abc", "hf_abc\n"])
def test_the_token_goes_to_the_hub_alone(hub, monkeypatch, tmp_path, token):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\nmachine localhost login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    downloaded(hub)
    wanted = token and "Bearer hf_abc"
    assert set(hub.logins) == {
        (f"127.0.0.1:{hub.port}", wanted),
        (f"localhost:{hub.port}", None),  # where the files are
    }


def test_the_hubs_certificates_are_those_of_all_others(hub, monkeypatch, tmp_path):
    bundle = shutil.copy(certifi.where(), tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", bundle)
    downloaded(hub)
    assert os.environ["SSL_CERT_FILE"] == bundle  # the setting that the hub's library knows


@pytest.mark.parametrize("linked", [True, False])
def test_a_damaged_file_in_the_cache_is_deleted_and_fetched_once_more(hub, caplog, linked):
    weights = downloaded(hub) / WEIGHTS
    if not linked:  # as where the file system has no links
        weights.resolve().replace(weights)
    damage(weights)
    downloaded(hub)
    assert ["is damaged" in line for line in caplog.messages].count(True) == 1


def test_files_that_were_checked_are_not_read_again_until_they_change(hub, monkeypatch):
    folder, read, digest = downloaded(hub), [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *file: read.append(file) or digest(*file))
    assert script.pinned_model() == folder
    assert read == []
    time.sleep(0.05)  # clocks of file systems are coarse
    os.utime(folder / WEIGHTS)
    assert script.pinned_model() == folder
    assert len(read) == 1


def test_a_search_fetches_what_an_older_cache_lacks_alone(hub):
    folder = downloaded(hub)
    (folder / "tokenizer.json").resolve().unlink()
    assert script.pinned_model(script.TO_EMBED) == folder
    assert len(hub.asked) == 3
    downloaded(hub)
    assert hub.asked[3:] == ["tokenizer.json"]


def test_the_users_own_cache_is_used_without_the_network(hub, monkeypatch):
    folder, asked = downloaded(hub), len(hub.logins)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(script.MODEL_CACHE))
    monkeypatch.setattr(script, "MODEL_CACHE", script.MODEL_CACHE / "none")
    assert script.pinned_model() == folder
    assert len(hub.logins) == asked


def test_a_stopped_download_leaves_nothing_and_of_two_runs_one_downloads(
    cli, patched, small, pinned, tiny, photos, tmp_path
):
    files, cache = read(pinned), tmp_path / "cache"
    with_tiny = patched(f"""
from generate_embeddings import PinnedFile
script.MODEL_FILES = {pinned_files(files)}
script.MODEL_CACHE = script.Path({str(cache)!r})
""")
    other = shutil.copytree(small, tmp_path / "other")
    with Hub(files) as hub:

        def start(folder):
            options = {"script": with_tiny, "CLIP_MODEL": None, "HF_ENDPOINT": f"{hub.url}/"}
            return cli.start("--local", folder, **options)

        hub.gate.clear()
        stopped = start(small)
        wait_until(lambda: hub.asked)
        stopped.send_signal(signal.SIGINT)
        assert stopped.finish().code == 130
        assert len(list(cache.rglob("*.incomplete"))) == 1
        hub.asked.clear()
        runs = [start(small)]
        wait_until(lambda: hub.asked)
        runs.append(start(other))
        wait_until(lambda: "downloading" in runs[1].err)
        time.sleep(0.3)  # it must not delete what the first one has so far
        hub.gate.set()
        ends = [run.finish() for run in runs]
    assert [(end.code, end.noise) for end in ends] == [(0, []), (0, [])]
    assert sorted(hub.asked) == sorted(files)
    assert list(cache.rglob("*.incomplete")) == []
    wanted = dict(zip(SMALL, models.reference(tiny, open_photos(photos)), strict=True))
    for folder in (small, other):
        found = {name: row.vector for name, row in folder_vectors(folder).items()}
        assert all(np.abs(found[name] - wanted[name]).max() < 1e-5 for name in SMALL)


# From a folder


def test_a_copy_that_is_not_the_pinned_model_is_refused(pinned, monkeypatch):
    monkeypatch.setattr(script, "MODEL_FILES", pinned_files(read(pinned)))
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
    ("file", "data"),
    [
        ("config.json", b"{"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1"),
        ("model.safetensors", None),
        ("tokenizer.json", None),
    ],
)
def test_a_folder_with_a_damaged_model_is_named(tiny, tmp_path, file, data):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / file).unlink()
    if data:
        (copy / file).write_bytes(data)
    use = script.TextEncoder if file == "tokenizer.json" else script.ClipEncoder
    with pytest.raises(script.RunError) as error:
        use(script.Settings(clip_model=str(copy)))
    assert str(error.value).startswith(f"the model in {copy} can't be used")
    assert "CLIP_MODEL must be a folder with a copy" in str(error.value)


def test_without_a_model_a_run_ends_in_one_line(cli, small):
    run = cli("--local", small, CLIP_MODEL="missing")
    assert (run.code, run.noise) == (2, [run.error])
    assert "CLIP_MODEL" in run.error
    assert run.counts == run.counts | {"attempted": 0, "left": 3}


NOT_CLIPS = {
    "256": {"projection_dim": 256},
    "size": {"image_size": 336},
    "gelu": {"hidden_act": "gelu"},
    "finite": {"change": lambda model: model.visual_projection.weight.data.fill_(np.nan)},
}


@pytest.mark.parametrize(("word", "config"), NOT_CLIPS.items(), ids=NOT_CLIPS)
def test_a_model_whose_vectors_are_not_clips_is_refused(tmp_path, word, config):
    said = refusal(models.other_model(tmp_path / "model", **config))
    assert "CLIP_MODEL" in said
    assert word in said.partition("can't be used")[2]


def test_another_shape_wants_a_name_of_its_own(tmp_path, photos):
    model = models.other_model(tmp_path / "model", patch_size=16)
    assert "set MODEL_VERSION" in refusal(model, model_version=script.MODEL_VERSION)
    images = open_photos(photos)
    made = encoder_of(model, model_version="patch-16").encode(pixels_of(images))
    assert np.abs(made - models.reference(model, images)).max() < 1e-5


# What it gives


TEXTS = ["red mug", "", "a mug  in the\tDark", "word " * 200, "naïve \u8336 <|endoftext|> 2"]


@pytest.mark.parametrize("model", ["tiny", "full"])
def test_the_vectors_are_those_of_transformers_alone_and_in_a_batch(request, photos, model):
    folder = request.getfixturevalue(model)
    version = script.MODEL_VERSION if model == "full" else TINY_VERSION
    encoder = encoder_of(folder, model_version=version)  # now torch has one thread
    images = open_photos(photos)
    pixels, wanted = pixels_of(images), models.reference(folder, images)
    alone = np.concatenate([encoder.encode(one[None]) for one in pixels])
    words = script.TextEncoder(script.Settings(clip_model=str(folder))).encode(TEXTS)
    wanted_of_words = models.reference_of_words(folder, TEXTS)
    pairs = ((alone, wanted), (encoder.encode(pixels), wanted), (words, wanted_of_words))
    for found, expected in pairs:
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-5


def test_without_the_private_operators_of_torch_the_vectors_are_the_same(tiny, monkeypatch):
    import torch

    pixels = np.random.default_rng(0).normal(size=(3, 3, 224, 224)).astype(np.float32)
    usual = encoder_of(tiny).encode(pixels)

    def absent(*_):
        raise RuntimeError("no such operator for this processor")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", absent)
    assert np.abs(encoder_of(tiny).encode(pixels) - usual).max() < 1e-5


def test_a_setting_has_the_last_word_on_the_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "0")
    usual = script.cores()
    assert usual > 0
    monkeypatch.setenv("OMP_NUM_THREADS", f"{usual + 1}")
    assert script.cores() == usual + 1


def test_bfloat16_is_close_to_float32_or_refused(tiny, photos):
    import torch

    able = (yes for name, yes in torch.cpu.get_capabilities().items() if "bf16" in name)
    if not any(yes is True for yes in able):
        assert "--dtype bfloat16" in refusal(tiny, dtype="bfloat16")
        return
    images = open_photos(photos)
    rounded = encoder_of(tiny, dtype="bfloat16").encode(pixels_of(images))
    worst = np.linalg.norm(rounded - models.reference(tiny, images), axis=1).max()
    assert 1e-4 < worst < 0.05  # float32 comes closer


def test_a_device_or_a_batch_that_can_not_be_used_says_so(tiny):
    assert "--device" in refusal(tiny, device="mps" if sys.platform == "linux" else "cuda")
    batch = [np.zeros((3, 96, 96), np.float32)] * 2  # of a size for which it has no positions
    with pytest.raises(script.RunError, match=r"failed on 2 images at once \(.+--batch-size"):
        encoder_of(tiny).embed(batch)
