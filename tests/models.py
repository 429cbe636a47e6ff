"""The CLIP models of the tests. They are made here, as the hub may be out of reach.

Both have random weights from a fixed seed. `full_model` has the architecture of ViT-B/32.
`tiny_model` has the same inputs and outputs, and loads in milliseconds. Both are kept in
.cache/test-models/ in the format of transformers, as a folder for CLIP_MODEL. Their tokenizer is
that of CLIP, but knows only the letters a to z and two words.

transformers takes 8 seconds of a core to import, so only what needs it imports it.
"""

import shutil
import tempfile
from functools import cache
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "test-models" / "with-words"
REPOSITORY = "openai/clip-vit-base-patch32"
REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"

TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY_TEXT = {**TINY_TOWER, "vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = [("r", "e"), ("re", "d</w>"), ("m", "u"), ("mu", "g</w>")]


@cache
def transformers():
    import transformers

    transformers.logging.set_verbosity_error()  # it would report the other tower's weights
    transformers.logging.disable_progress_bar()
    return transformers


def full_model():
    """Path of a CLIPModel with both towers of ViT-B/32: 151 M parameters, 605 MB."""
    return _saved("full")  # the defaults are openai/clip-vit-base-patch32


def tiny_model():
    """Path of a small relative: same 224 px images and 512 numbers out, two layers 32 wide."""
    return _saved("tiny", text_config=TINY_TEXT, vision_config=TINY_TOWER)


def other_model(folder, projection_dim=512, change=lambda model: None, **tower):
    """Makes `folder` a model like the tiny one but for these settings of its image tower, or for
    what `change` does to it."""
    vision = TINY_TOWER | tower
    model = _made(text_config=TINY_TEXT, vision_config=vision, projection_dim=projection_dim)
    change(model)
    _save(model, folder)
    return folder


def hub_cache(folder):
    """Makes `folder` a cache of huggingface_hub with the tiny model at the pinned revision.

    Returns the folder of its files. As on the hub, the weights are in one pytorch_model.bin, which
    holds position ids as well.
    """
    import torch
    from safetensors.torch import load_file

    snapshot = folder / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    source = tiny_model()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, snapshot)
    weights = load_file(source / "model.safetensors")
    for tower in ("text_model", "vision_model"):
        positions = len(weights[f"{tower}.embeddings.position_embedding.weight"])
        weights[f"{tower}.embeddings.position_ids"] = torch.arange(positions)[None]
    torch.save(weights, snapshot / "pytorch_model.bin")
    return snapshot


def image_processor():
    """What transformers makes pixels with."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil()


def reference(model_folder, images):
    """What transformers itself makes of PIL RGB images: float32 (n, 512), unit length."""
    processor = image_processor()
    inputs = [processor(image, return_tensors="pt") for image in images]
    return _vectors("CLIPVisionModelWithProjection", "image_embeds", model_folder, inputs)


def reference_of_words(model_folder, texts):
    """The same of texts."""
    tokenizer = transformers().CLIPTokenizer.from_pretrained(model_folder)
    options = {"return_tensors": "pt", "truncation": True, "max_length": 77}
    inputs = [tokenizer(text, **options) for text in texts]
    return _vectors("CLIPTextModelWithProjection", "text_embeds", model_folder, inputs)


def _vectors(tower, output, folder, inputs):
    import torch

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = getattr(transformers(), tower).from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        vectors = [model(**one)[output][0] for one in inputs]
        return torch.nn.functional.normalize(torch.stack(vectors)).numpy()


def _saved(name, **config):
    """Path of the model `name`; made the first time, in one step for onlookers."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            made = Path(scratch) / name
            _save(_made(**config), made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():  # else a test beside this one was faster
                    raise
    return folder


def _made(**config):
    import torch

    torch.manual_seed(0)
    return transformers().CLIPModel(transformers().CLIPConfig(**config))


def _save(model, folder):
    model.save_pretrained(folder)
    text = model.config.text_config
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>", "mu", "mug</w>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary["<|startoftext|>"] = text.bos_token_id
    vocabulary["<|endoftext|>"] = text.eos_token_id
    transformers().CLIPTokenizer(vocab=vocabulary, merges=MERGES).save_pretrained(folder)
    image_processor().save_pretrained(folder)
