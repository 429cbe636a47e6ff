"""What a large catalog costs: `python tests/tools/scale.py` (a million assets; needs 8 GB of disk).

Fills the real stack with assets that are all embedded. Then, for the whole catalog and for clients
of 50 and of a fifth of the assets: takes ten embeddings away and times the functions that the
script calls, and the script itself with the tiny model: its requests, the slowest of them, the time
to the first new vector, and peak memory. Sets storing 50 rows beside a bare upsert of as many. With
--index it builds the HNSW index over that many rows and times the searches and the stores.
"""

import argparse
import json
import re
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
from conftest import TINY_VERSION, model_settings
from models import tiny_model
from stack import REPO, ImageHost, Stack, photographs

import generate_embeddings as script

PENDING = 10
BATCH = 50  # rows of one call of store_embeddings
INDEX = "product_embeddings_embedding_hnsw"


def some_vectors(count, seed):
    """float32 (count, 512) of unit length, about a thousand centres, as products come in kinds."""
    centres = np.random.default_rng(0).normal(size=(1000, script.DIMENSIONS))
    random = np.random.default_rng(seed)
    vectors = centres[random.integers(1000, size=count)]
    vectors += random.normal(size=vectors.shape)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def fill(stack, host, count):
    """A catalog of `count` assets, each with an embedding, without the index."""
    stack.sql(f"drop index {INDEX}")
    image = host.url_of("/flower.jpg")
    stack.sql(f"""
        insert into assets (id, image_url, client_name)
        select gen_random_uuid(), '{image}?' || n,
            case when n <= 50 then 'fifty' when n <= {count // 5} then 'fifth' else 'rest' end
        from generate_series(1, {count}) n
    """)
    with psycopg.connect(stack.db_uri) as connection, connection.cursor() as cursor:
        cursor.execute("create temp table made (number serial, embedding vector(512))")
        with cursor.copy("copy made (embedding) from stdin (format binary)") as copy:
            copy.set_types(["bytea"])
            for start in range(0, count, 10_000):
                for vector in some_vectors(min(10_000, count - start), seed=start + 1):
                    head = np.array([script.DIMENSIONS, 0], ">i2").tobytes()
                    copy.write_row([head + vector.astype(">f4").tobytes()])
        cursor.execute(
            """insert into product_embeddings
                (asset_id, embedding, model_version, embedded_image_hash)
            select id, embedding, %s, embedding_image_hash(image_url) from made
            join (select id, image_url, row_number() over () as number from assets) a
                using (number)""",
            [TINY_VERSION],
        )
    stack.sql("vacuum analyze assets")
    stack.sql("vacuum analyze product_embeddings")


class Caller:
    """Calls PostgREST over one connection, as the script does, and keeps the times."""

    def __init__(self, stack):
        self.root = f"{stack.url}/rest/v1"
        self.session = requests.Session()
        key = stack.service_key
        self.session.headers.update(
            {"apikey": key, "Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        )
        self.taken = {}  # name -> seconds of each call

    def post(self, name, path, body, **headers):
        text = json.dumps(body)  # outside of what is timed
        began = time.monotonic()
        answer = self.session.post(f"{self.root}/{path}", data=text, headers=headers)
        self.taken.setdefault(name, []).append(time.monotonic() - began)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def call(self, function, **arguments):
        return self.post(function, f"rpc/{function}", arguments)


def take_away(stack, client):
    """Leaves PENDING assets of this client, or of all, without an embedding."""
    stack.sql(
        f"""delete from product_embeddings where asset_id in (
            select id from assets where %s::text is null or client_name = %s
            order by random() limit {PENDING})""",
        [client, client],
    )


def made_vectors(assets, seed):
    """What the script would send for these assets."""
    return [
        {
            "asset_id": a["id"],
            "embedded_image_hash": a["image_hash"],
            "embedding": script.vector_text(vector),
        }
        for a, vector in zip(assets, some_vectors(len(assets), seed), strict=True)
    ]


def time_functions(stack, name, client=None):
    """Prints what the calls of a run cost that has PENDING assets to do."""
    take_away(stack, client)
    caller = Caller(stack)
    for _ in range(3):
        of = {"model_version": TINY_VERSION, "client": client}
        status = caller.call("embedding_status", **of)
        page = caller.call("pending_assets", **of)
        if len(page["assets"]) != PENDING or status["assets"] - status["done"] != PENDING:
            raise SystemExit(f"{name}: {len(page['assets'])} pending, {status}")
        caller.post(
            "failed", "rpc/pending_assets", of | {"failed_before": status["time"], "wanted": 250}
        )
    vectors = made_vectors(page["assets"], seed=99)
    caller.call("store_embeddings", model_version=TINY_VERSION, vectors=vectors)
    row(name, *(f"{max(taken):.2f}" for taken in caller.taken.values()))


def time_run(stack, name, client=None, *flags):
    """Prints what one run costs that has PENDING assets to do."""
    take_away(stack, client)
    stack.gateway.requests.clear()
    of = ["--client", client] if client else []
    command = [sys.executable, REPO / "generate_embeddings.py", *of, *flags]
    began = datetime.now(UTC)
    run = subprocess.run(
        ["/usr/bin/env", "time", "-f", "peak %M", *map(str, command)],
        env=stack.env(**model_settings(tiny_model())),
        capture_output=True,
        text=True,
    )
    took = (datetime.now(UTC) - began).total_seconds()
    if run.returncode or f"embedded={PENDING} " not in run.stdout:
        raise SystemExit(f"{name} failed:\n{run.stdout}{run.stderr}")
    ((first,),) = stack.sql(
        "select min(created_at) from product_embeddings where created_at >= %s", [began]
    )
    requests = stack.gateway.requests
    peak = int(re.search(r"^peak (\d+)", run.stderr, re.MULTILINE)[1]) / 1024
    row(
        name,
        str(len(requests)),
        f"{max(r.seconds for r in requests):.2f}",
        f"{(first - began).total_seconds():.1f}",
        f"{took:.1f}",
        f"{peak:.0f}",
    )


def time_stores(stack, host, when, batches=120):
    """Prints what a batch of new rows costs through the function and by a bare upsert, in turn.

    Both send the vectors as the script does. Longer numbers tell against the function: PostgREST
    has the database read its arguments more often than the rows of an upsert.
    """
    caller = Caller(stack)
    for number in range(2 * batches):
        ids = [str(uuid.uuid4()) for _ in range(BATCH)]
        image = host.url_of("/flower.jpg")
        stack.add_assets((asset_id, image, "new") for asset_id in ids)
        ((image_hash,),) = stack.sql("select hashtextextended(%s, 0)", [image])
        vectors = made_vectors(
            [{"id": i, "image_hash": image_hash} for i in ids], seed=1_000_000 + number
        )
        if number % 2:
            answer = caller.call("store_embeddings", model_version=TINY_VERSION, vectors=vectors)
            if len(answer["taken"]) != len(vectors):
                raise SystemExit("rows were left")
        else:
            for vector in vectors:
                vector["model_version"] = TINY_VERSION
            caller.post(
                "bare",
                "product_embeddings?on_conflict=asset_id",
                vectors,
                Prefer="resolution=merge-duplicates,return=minimal",
            )
    bare, stored = (
        statistics.median(caller.taken[name]) * 1000 for name in ("bare", "store_embeddings")
    )
    row(when, f"{bare:.1f}", f"{stored:.1f}", f"{stored / bare:.2f}")


def time_searches(stack, name, client=None, searches=20):
    """Prints how often ten products of a client are found, and in what time."""
    caller = Caller(stack)
    found = [
        len(
            caller.call(
                "match_products",
                query_embedding=json.dumps(vector.tolist()),
                match_count=10,
                client=client,
            )
        )
        for vector in some_vectors(searches, seed=7)
    ]
    taken = caller.taken["match_products"]
    row(name, f"{min(found)}", f"{statistics.median(taken) * 1000:.0f}", f"{max(taken) * 1000:.0f}")


def main():
    usage = argparse.ArgumentParser(description="Times runs over a large catalog.")
    usage.add_argument("--assets", type=int, default=1_000_000)
    usage.add_argument("--functions", action="store_true", help="leave the script itself out")
    usage.add_argument("--index", action="store_true", help="build the HNSW index, time searches")
    usage.add_argument("--memory", default="4GB", help="maintenance_work_mem for that (4GB)")
    args = usage.parse_args()
    clients = {
        "whole catalog": None,
        "client of 50": "fifty",
        f"client of {args.assets // 5 - 50:,}": "fifth",
    }
    with Stack() as stack, ImageHost({"/flower.jpg": photographs()["flower.jpg"]}) as host:
        began = time.monotonic()
        fill(stack, host, args.assets)
        print(f"{args.assets:,} embedded assets made in {time.monotonic() - began:.0f} s")
        table(
            f"Calls with {PENDING} pending assets of {args.assets:,}: the slowest of three, s",
            ["", "status", "a page", "failed ones", "store"],
        )
        for name, client in clients.items():
            time_functions(stack, name, client)
        if not args.functions:
            table(
                f"A run with {PENDING} pending assets of {args.assets:,}",
                ["", "requests", "slowest, s", "first, s", "all, s", "peak MB"],
            )
            for name, client in clients.items():
                time_run(stack, name, client)
        table(f"Storing {BATCH} rows, median ms", ["", "bare upsert", "function", "ratio"])
        time_stores(stack, host, "no index")
        if args.index:
            began = time.monotonic()
            stack.sql(f"set maintenance_work_mem = '{args.memory}'")
            stack.sql(
                f"create index {INDEX} on product_embeddings "
                "using hnsw (embedding vector_cosine_ops)"
            )
            print(f"(index built in {time.monotonic() - began:.0f} s)")
            time_stores(stack, host, "with the HNSW index")
            for indexed in (False, True):
                if indexed:
                    stack.sql("create index on assets (client_name); analyze assets")
                table(
                    "Ten nearest" + ", with an index on the client column" * indexed,
                    ["", "fewest found", "median, ms", "longest, ms"],
                )
                for name, client in clients.items():
                    time_searches(stack, name, client)
            caller = Caller(stack)
            caller.call("duplicate_products", shard=1, shards=args.assets // 200)
            row("200 assets' duplicates", "", "", f"{caller.taken['duplicate_products'][0]:.1f} s")
            table(
                "A run that ends with the gallery",
                ["", "requests", "slowest, s", "first, s", "all, s", "peak MB"],
            )
            with tempfile.TemporaryDirectory() as folder:
                for name, client in clients.items():
                    time_run(stack, name, client, "--gallery", f"{folder}/gallery.html")


if __name__ == "__main__":
    main()
