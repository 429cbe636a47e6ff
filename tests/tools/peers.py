"""Embeds a folder of photographs with what others made, for benchmark.py.

    peers.py export MODEL ONNX              the image tower of a model's folder, into folder ONNX
    peers.py fastembed ONNX PHOTOS          one process, batches of 16: its defaults
    peers.py fastembed-parallel ONNX PHOTOS one process a core
    peers.py rclip ONNX PHOTOS              batches of 8, its default, into its SQLite file

Runs in the environment of requirements-peers.txt. Both take the very weights of the script. rclip
comes with a model for 256 pixels a side, which is 1.3 times the work; it is told 224 here.
"""

import json
import os
import sys
import tempfile
from pathlib import Path


def export(model, folder):
    import torch
    from transformers import CLIPVisionModelWithProjection

    class Tower(torch.nn.Module):
        """Gives the embeddings alone, without the hidden states."""

        def __init__(self):
            super().__init__()
            self.model = CLIPVisionModelWithProjection.from_pretrained(
                model, attn_implementation="eager"
            )

        def forward(self, pixels):
            return self.model(pixel_values=pixels).image_embeds

    torch.onnx.export(
        Tower().eval(),
        (torch.zeros(2, 3, 224, 224),),
        Path(folder, "model.onnx"),
        input_names=["input"],  # rclip's name for it
        output_names=["output"],
        dynamic_axes={"input": {0: "images"}, "output": {0: "images"}},
        dynamo=False,
    )
    config = json.loads(Path(model, "preprocessor_config.json").read_text())
    config["size"] = {"shortest_edge": 224}  # fastembed knows the newer notation alone
    config["crop_size"] = {"height": 224, "width": 224}
    Path(folder, "preprocessor_config.json").write_text(json.dumps(config))


def fastembed(folder, photos, parallel=None):
    import numpy as np
    from fastembed import ImageEmbedding

    name = "Qdrant/clip-ViT-B-32-vision"
    model = ImageEmbedding(name, specific_model_path=folder, local_files_only=True)
    paths = sorted(str(path) for path in Path(photos).glob("*.jpg"))
    vectors = list(model.embed(paths, parallel=parallel))
    with tempfile.TemporaryFile() as file:
        np.save(file, np.stack(vectors))
    return vectors


def rclip(folder, photos):
    import numpy as np
    from rclip import db, model, model_download
    from rclip.main import RClip
    from rclip.utils import preprocess

    preprocess.IMAGE_SIZE = 224
    path = str(Path(folder, "model.onnx"))
    model_download.load_visual_query_session = lambda: model_download._load_onnx_session(path)
    with tempfile.TemporaryDirectory() as scratch:
        database = db.DB(Path(scratch, "db.sqlite3"))
        RClip(model.Model(), database, indexing_batch_size=8, exclude_dirs=None).ensure_index(
            photos
        )
        rows = sorted(map(tuple, database.get_image_vectors_by_dir_path(photos)))
        database.close()
    return [np.frombuffer(vector, np.float32) for _, vector in rows]


def main():
    what, folder, photos = sys.argv[1:]
    if what == "export":
        export(folder, photos)
        return
    if what == "fastembed":
        vectors = fastembed(folder, photos)
    elif what == "fastembed-parallel":
        vectors = fastembed(folder, photos, parallel=len(os.sched_getaffinity(0)))
    else:
        vectors = rclip(folder, photos)
    print(f"embedded={len(vectors)}")


if __name__ == "__main__":
    main()
