"""What a large catalog costs: `python tests/scale.py` (a million assets; needs 8 GB of disk).

Fills the real stack with assets that are all embedded. Then, for the whole catalog and for clients
of 50, of a fifth and of all assets: takes ten embeddings away, runs the script with the tiny
model, and prints its requests, the slowest of them, the time to the first new vector, and peak
memory. With --index it builds the HNSW index over that many rows and times upserts below it.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime

import numpy as np
import psycopg
from benchmark import row, table
from models import tiny_model
from stack import REPO, ImageHost, Stack, photographs

sys.path.insert(0, str(REPO))
import generate_embeddings as script

PENDING = 10
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
    stack.sql(f"drop index {INDEX}; alter table assets add everyone text default 'all'")
    image = host.url_of("/flower.jpg")
    stack.sql(f"""
        insert into assets (id, image_url, client_name)
        select gen_random_uuid(), '{image}?' || n,
            case when n <= 50 then 'fifty' when n <= {count // 5} then 'fifth' else 'rest' end
        from generate_series(1, {count}) n
    """)
    stack.sql("alter table product_embeddings disable trigger user")
    with psycopg.connect(stack.db_uri) as connection, connection.cursor() as cursor:
        cursor.execute("create temp table made (number serial, embedding vector(512))")
        with cursor.copy("copy made (embedding) from stdin (format binary)") as copy:
            copy.set_types(["bytea"])
            for start in range(0, count, 10_000):
                for vector in some_vectors(min(10_000, count - start), seed=start + 1):
                    head = np.array([script.DIMENSIONS, 0], ">i2").tobytes()
                    copy.write_row([head + vector.astype(">f4").tobytes()])
        cursor.execute(
            """insert into product_embeddings (asset_id, embedding, model_version)
            select id, embedding, %s from made
            join (select id, row_number() over () as number from assets) a using (number)""",
            [script.MODEL_VERSION],
        )
    stack.sql("alter table product_embeddings enable trigger user")
    stack.sql("vacuum analyze assets")
    stack.sql("vacuum analyze product_embeddings")


def time_run(stack, name, client=None, column="client_name"):
    """Prints what one run costs that has PENDING assets to do."""
    stack.sql(
        f"""delete from product_embeddings where asset_id in (
            select id from assets where %s::text is null or {column} = %s
            order by random() limit {PENDING})""",
        [client, client],
    )
    stack.gateway.requests.clear()
    command = [sys.executable, REPO / "generate_embeddings.py"] + ["--client", client] * bool(
        client
    )
    began = datetime.now(UTC)
    run = subprocess.run(
        ["/usr/bin/env", "time", "-f", "peak %M", *map(str, command)],
        env=stack.env(CLIP_MODEL=str(tiny_model()), ASSET_CLIENT_COLUMN=column),
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


def time_upserts(stack, host, when, batches=20):
    """Prints what the script's own batches of new rows cost, through the gateway."""
    settings = script.Settings(url=stack.url, key=stack.service_key)
    store = script.SupabaseStore(settings, script.Stop())
    taken = []
    for number in range(batches):
        ids = [str(uuid.uuid4()) for _ in range(script.WRITE_ROWS)]
        image = host.url_of("/new.jpg")
        stack.add_assets((asset_id, image, "new") for asset_id in ids)
        vectors = some_vectors(len(ids), seed=-1 - number & 0xFFFF)
        rows = [(script.Asset(i, image), v) for i, v in zip(ids, vectors, strict=True)]
        began = time.monotonic()
        if store.save(rows):
            raise SystemExit("rows were refused")
        taken.append((time.monotonic() - began) * 1000)
    row(when, f"{statistics.median(taken):.0f}", f"{max(taken):.0f}")


def main():
    usage = argparse.ArgumentParser(description="Times runs over a large catalog.")
    usage.add_argument("--assets", type=int, default=1_000_000)
    usage.add_argument("--index", action="store_true", help="build the HNSW index, time upserts")
    usage.add_argument("--memory", default="4GB", help="maintenance_work_mem for that (4GB)")
    args = usage.parse_args()
    with Stack() as stack, ImageHost({"/flower.jpg": photographs()["flower.jpg"]}) as host:
        began = time.monotonic()
        fill(stack, host, args.assets)
        print(f"{args.assets:,} embedded assets made in {time.monotonic() - began:.0f} s")
        table(
            f"A run with {PENDING} pending assets of {args.assets:,}",
            ["", "requests", "slowest, s", "first, s", "all, s", "peak MB"],
        )
        time_run(stack, "whole catalog")
        time_run(stack, "client of 50", "fifty")
        time_run(stack, f"client of {args.assets // 5:,}", "fifth")
        time_run(stack, "client of all", "all", "everyone")
        if args.index:
            table(f"An upsert of {script.WRITE_ROWS} rows", ["", "median, ms", "longest, ms"])
            time_upserts(stack, host, "no index")
            began = time.monotonic()
            stack.sql(f"set maintenance_work_mem = '{args.memory}'")
            stack.sql(
                f"create index {INDEX} on product_embeddings "
                "using hnsw (embedding vector_cosine_ops)"
            )
            print(f"(index built in {time.monotonic() - began:.0f} s)")
            time_upserts(stack, host, "with the HNSW index")


if __name__ == "__main__":
    main()
