"""schema.sql's functions as the script and an app call them, for the tests of the database."""

import json
import re
import uuid

import jwt
import numpy as np
import requests
from stack import REPO

VERSION = "clip-vit-base-patch32"
TABLES = ("product_embeddings", "product_embedding_failures")
ONES = json.dumps([0.5] * 512)
FAILURE = {"stage": "fetch", "reason": "HTTP 404"}
EMBEDDING = """insert into product_embeddings
    (asset_id, embedding, model_version, embedded_image_hash)
    select id, %s, %s, embedding_image_hash(image) from embedding_sources() where id = %s"""


def text(vector):
    return json.dumps([round(float(x), 7) for x in vector])


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def schema():
    return (REPO / "schema.sql").read_text()


def snippet(part):
    """The lines in the file's comments that are to be pasted, by `part` of their text."""
    blocks = re.findall(r"^(?:--   .*\n)+", schema(), re.MULTILINE)
    found = [re.sub(r"^--   ", "", block, flags=re.MULTILINE) for block in blocks]
    (block,) = (block for block in found if part in block)
    return block


def statements(script):
    """One by one, as psql runs them; with the memory of a small machine."""
    bare = re.sub(r"--.*", "", script).replace("'4GB'", "'64MB'")
    return [statement for statement in bare.split(";") if statement.strip()]


class Api:
    """PostgREST through the gateway, with one of the project's keys or a user's token."""

    def __init__(self, stack, key, token=None):
        self.root = f"{stack.url}/rest/v1"
        self.headers = {"apikey": key, "Authorization": f"Bearer {token or key}"}

    def __call__(self, method, path, body=None, **headers):
        return requests.request(
            method, f"{self.root}/{path}", json=body, headers=self.headers | headers, timeout=60
        )

    def call(self, function, **arguments):
        answer = self("POST", f"rpc/{function}", arguments)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def status(self, **arguments):
        return self.call("embedding_status", **{"model_version": VERSION} | arguments)

    def pending(self, **arguments):
        return self.call("pending_assets", **{"model_version": VERSION} | arguments)

    def walk(self, **arguments):
        """All pages."""
        assets, after = [], None
        while True:
            page = self.pending(after=after, **arguments)
            assets += page["assets"]
            after = page["last"]
            if after is None:
                return assets

    def store(self, vectors=(), failures=(), version=VERSION):
        """Stores a vector for each of these assets, a failure for each of those; the ids that were
        taken, in their order."""
        answer = self.call("store_embeddings", **batch(vectors, failures, version))
        assert answer["given"] == len(vectors) + len(failures)
        return sorted(answer["taken"])


def batch(vectors=(), failures=(), version=VERSION):
    return {
        "model_version": version,
        "vectors": [
            {
                "asset_id": a["id"],
                "embedded_image_hash": a["image_hash"],
                "embedding": a.get("embedding", ONES),
            }
            for a in vectors
        ],
        "failures": [
            {"asset_id": a["id"], "image_hash": a["image_hash"]} | FAILURE | a.get("failure", {})
            for a in failures
        ],
    }


def user(stack, **claims):
    """The API as somebody who is signed in."""
    token = jwt.encode(
        {"role": "authenticated", "exp": 4000000000} | claims, stack._jwt_secret, algorithm="HS256"
    )
    return Api(stack, stack.anon_key, token)


def fill(stack, count, client="x"):
    """So many assets in the order of their ids."""
    ids = [str(uuid.UUID(int=n + 1)) for n in range(count)]
    stack.add_assets((i, f"https://images.invalid/{i}.jpg", client) for i in ids)
    return ids


def rows(stack, columns="*", table="product_embeddings"):
    return stack.sql(f"select {columns} from {table} order by asset_id")


def failures(stack, columns="*"):
    return rows(stack, columns, "product_embedding_failures")
