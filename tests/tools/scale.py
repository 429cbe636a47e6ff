"""What a million products cost: `python tests/tools/scale.py [--index]`; 8 GB of disk.

Fills the real stack with assets that are all embedded. Then, for the whole catalog and for clients
of 50 and of a fifth of the assets: takes ten embeddings away and times the functions that the
script calls, and the script itself with the tiny model, with and without its gallery. Sets storing
50 rows beside a bare upsert of as many. With --index it builds the HNSW index over that many rows
and times the searches.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the script

import numpy as np
import psycopg
import requests
from benchmark import row, table
from conftest import SCRIPT, TINY_VERSION, model_settings
from models import tiny_model
from stack import ImageHost, Stack, photographs

PENDING = 10
BATCH = 50  # rows of one call of store_embeddings
INDEX = "product_embeddings_embedding_hnsw"
OF = {"model_version": TINY_VERSION}


def some_vectors(count, seed):
    """float32 (count, 512) of unit length, about a thousand centres, as products come in kinds."""
    centres = np.random.default_rng(0).normal(size=(1000, 512))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(1000, size=count)] + random.normal(size=(count, 512))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Catalog:
    """A stack with `count` assets, each with an embedding, without the index."""

    def __init__(self, stack, image, count):
        self.stack, self.image = stack, image
        self.session = requests.Session()
        key = stack.service_key
        self.session.headers.update({"apikey": key, "Authorization": f"Bearer {key}"})
        self.stack.sql(f"drop index {INDEX}")
        self.stack.sql(f"""
            insert into assets (id, image_url, client_name)
            select gen_random_uuid(), '{self.image}?' || n,
                case when n <= 50 then 'fifty' when n <= {count // 5} then 'fifth' else 'rest' end
            from generate_series(1, {count}) n
        """)
        with psycopg.connect(self.stack.db_uri) as connection, connection.cursor() as cursor:
            cursor.execute("create temp table made (number serial, embedding vector(512))")
            with cursor.copy("copy made (embedding) from stdin (format binary)") as copy:
                copy.set_types(["bytea"])
                head = np.array([512, 0], ">i2").tobytes()
                for start in range(0, count, 10_000):
                    for vector in some_vectors(min(10_000, count - start), seed=start + 1):
                        copy.write_row([head + vector.astype(">f4").tobytes()])
            cursor.execute(
                """insert into product_embeddings
                    (asset_id, embedding, model_version, embedded_image_hash)
                select id, embedding, %s, embedding_image_hash(image_url) from made
                join (select id, image_url, row_number() over () as number from assets) a
                    using (number)""",
                [TINY_VERSION],
            )
        for name in ("assets", "product_embeddings"):
            self.stack.sql(f"vacuum analyze {name}")

    def post(self, path, body, **headers):
        """What PostgREST answers over one connection, and its seconds."""
        data = json.dumps(body)  # outside of what is timed
        headers["Content-Type"] = "application/json"
        began = time.monotonic()
        response = self.session.post(f"{self.stack.url}/rest/v1/{path}", data, headers=headers)
        seconds = time.monotonic() - began
        response.raise_for_status()
        return response.json() if response.content else None, seconds

    def call(self, function, **arguments):
        return self.post(f"rpc/{function}", arguments)

    def take_away(self, client):
        """Leaves PENDING assets of this client, or of all, without an embedding."""
        self.stack.sql(
            f"""delete from product_embeddings where asset_id in (
                select id from assets where %s::text is null or client_name = %s
                order by random() limit {PENDING})""",
            [client, client],
        )

    def time_functions(self, client):
        """The slowest of three: status, a page, the page of failures, storing what is pending."""
        self.take_away(client)
        taken = []
        for _ in range(3):
            status, one = self.call("embedding_status", **OF, client=client)
            page, two = self.call("pending_assets", **OF, client=client)
            past = {"failed_before": status["time"], "wanted": 250}
            _, three = self.call("pending_assets", **OF, client=client, **past)
            if len(page["assets"]) != PENDING:
                raise SystemExit(f"{len(page['assets'])} are pending, {status}")
            taken.append([one, two, three])
        vectors = made_vectors(page["assets"], seed=99)
        _, stored = self.call("store_embeddings", **OF, vectors=vectors)
        return [f"{seconds:.2f}" for seconds in [*np.max(taken, axis=0), stored]]

    def time_run(self, client, *flags):
        """A run: its requests, the slowest, seconds to the first vector and in all, peak memory."""
        self.take_away(client)
        self.stack.gateway.requests.clear()
        of = ["--client", client] if client else []
        env = self.stack.env(**model_settings(tiny_model()))
        began = datetime.now(UTC)
        with tempfile.TemporaryFile("w+") as said:
            command = [sys.executable, SCRIPT, *of, *flags]
            process = subprocess.Popen(command, env=env, stdout=said, stderr=said)
            _, status, usage = os.wait4(process.pid, 0)
            said.seek(0)
            text = said.read()
        took = (datetime.now(UTC) - began).total_seconds()
        if status or f"embedded={PENDING} " not in text:
            raise SystemExit(f"{command} failed:\n{text}")
        newest = "select min(created_at) from product_embeddings where created_at >= %s"
        ((first,),) = self.stack.sql(newest, [began])
        asked = [request.seconds for request in self.stack.gateway.requests]
        seconds = [max(asked), (first - began).total_seconds(), took]
        return [len(asked), *(f"{s:.1f}" for s in seconds), f"{usage.ru_maxrss / 1024:.0f}"]

    def time_stores(self, _, batches=120):
        """Median ms of a batch of new rows by a bare upsert and by the function, and the ratio."""
        taken = {"bare": [], "function": []}
        for number in range(batches):
            for kind, times in taken.items():
                ids = [str(uuid.uuid4()) for _ in range(BATCH)]
                self.stack.add_assets((asset_id, self.image, "new") for asset_id in ids)
                ((image_hash,),) = self.stack.sql("select embedding_image_hash(%s)", [self.image])
                assets = [{"id": asset_id, "image_hash": image_hash} for asset_id in ids]
                vectors = made_vectors(assets, seed=1_000_000 + number)
                if kind == "bare":
                    path = "product_embeddings?on_conflict=asset_id"
                    prefer = "resolution=merge-duplicates,return=minimal"
                    _, seconds = self.post(path, [v | OF for v in vectors], Prefer=prefer)
                else:
                    _, seconds = self.call("store_embeddings", **OF, vectors=vectors)
                times.append(seconds)
        bare, stored = (statistics.median(times) * 1000 for times in taken.values())
        return [f"{bare:.1f}", f"{stored:.1f}", f"{stored / bare:.2f}"]

    def time_searches(self, client, searches=20):
        """How many of ten are found at least, and in what time, median and longest in ms."""
        found, taken = [], []
        for vector in some_vectors(searches, seed=7):
            query = {"query_embedding": json.dumps(vector.tolist()), "match_count": 10}
            matches, seconds = self.call("match_products", **query, client=client)
            found.append(len(matches))
            taken.append(seconds * 1000)
        return [min(found), f"{statistics.median(taken):.0f}", f"{max(taken):.0f}"]


def made_vectors(assets, seed):
    """What the script would send for these assets."""
    return [
        {
            "asset_id": asset["id"],
            "embedded_image_hash": asset["image_hash"],
            "embedding": "[" + ",".join(f"{x:.7g}" for x in vector.tolist()) + "]",
        }
        for asset, vector in zip(assets, some_vectors(len(assets), seed), strict=True)
    ]


def main():
    usage = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = usage.add_argument
    add("--assets", type=int, default=1_000_000)
    add("--index", action="store_true", help="build the HNSW index, time searches")
    add("--memory", default="4GB", help="maintenance_work_mem for that (4GB)")
    args = usage.parse_args()
    clients = {"whole catalog": None, "client of 50": "fifty", "client of a fifth": "fifth"}
    files = {"/flower.jpg": photographs()["flower.jpg"]}
    with ImageHost(files) as host, Stack() as stack, tempfile.TemporaryDirectory() as folder:
        catalog = Catalog(stack, host.url_of("/flower.jpg"), args.assets)

        def show(title, columns, time_one, *arguments, clients=clients):
            table(title, *columns)
            for name, client in clients.items():
                row(name, *time_one(client, *arguments))

        pending = f"{PENDING} pending assets of {args.assets:,}"
        columns = ["status", "a page", "failed ones", "store"]
        show(f"Calls with {pending}, the slowest of three, s", columns, catalog.time_functions)
        columns = ["requests", "slowest, s", "first, s", "all, s", "peak MB"]
        show(f"A run with {pending}", columns, catalog.time_run)
        gallery = ["--gallery", f"{folder}/gallery.html"]
        show("The same with the gallery", columns, catalog.time_run, *gallery)
        columns, new_rows = ["bare upsert", "function", "ratio"], {f"{BATCH} rows": None}
        show("Storing, median ms", columns, catalog.time_stores, clients=new_rows)
        if args.index:
            stack.sql(f"set maintenance_work_mem = '{args.memory}'")
            stack.sql(
                f"create index {INDEX} on product_embeddings using hnsw "
                "(embedding vector_cosine_ops)"
            )
            show("Storing with the index", columns, catalog.time_stores, clients=new_rows)
            columns = ["fewest found", "median, ms", "longest, ms"]
            show("The ten nearest", columns, catalog.time_searches)


if __name__ == "__main__":
    main()
