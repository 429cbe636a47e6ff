"""Lets faults rain on generate_embeddings.py for a while, then audits the database.

    python tests/tools/soak.py [--assets N] [--seconds S] [--seed K]

The real stack, a real image host, the tiny model. Workers run again and again, alone, in pairs and
as shards, while a shuffled deck of faults is played: the seed decides on the order, the clock on
the moments. Then the sky clears, one last run does what is left, and the audit compares the
database with this script's own record of each asset's image. Exit code 1: it found something.
"""

import argparse
import contextlib
import io
import json
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the script

import models
import numpy as np
from conftest import SCRIPT, stack_cli
from PIL import Image
from stack import ImageHost, Stack, photographs

PAGE_ROWS = 50  # the server's cap: page borders everywhere
PATIENCE = 600  # seconds for a run to end: for a machine that others use, too
CLOSE = 1e-4  # vectors of one image agree to 1e-6; those of two are 10 times as far apart at least
SHARDS = [("--shard", "1/3"), ("--shard", "2/3"), ("--shard", "3/3")]
CREWS = [[()], [()], [("--batch-size", 4, "--workers", 3)], [(), ()], SHARDS]
KINDS = {"good": 80, "flaky": 6, "slow": 3, "gone": 4, "broken": 3, "html": 2}
REASONS = {  # of the images that are bad for good
    "gone": ["fetch", "HTTP 404 Not Found", True],
    "broken": ["decode", "broken or truncated image file", True],
    "html": ["decode", "an HTML page, not an image", True],
}
STORMS = {
    **{f"HTML {code}": (code, [], b"<html>Bad gateway</html>") for code in (502, 503, 520)},
    "429": (429, [("Retry-After", "1")], b"slow down"),
    "500 57014": (500, [], b'{"code":"57014","message":"statement timeout"}'),
    "reset": "reset",
    "null": (200, [], b"null"),
    # The database does its work, the answer does not come, or half of it
    "reset after commit": lambda answer: "reset",
    "half an answer": lambda answer: (*answer[:2], answer[2][: len(answer[2]) // 2]),
}
ACTS = ["interrupt", "delete", "change", *["kill"] * 7]
DECK = [*STORMS, "gateway", "PostgREST", "image host", *ACTS]


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


class Soak:
    """One soak, on an empty catalog; `findings` is what the audit found."""

    def __init__(self, stack, host, cli, assets=300, seed=0, script=SCRIPT):
        self.stack, self.host, self.cli, self.script = stack, host, cli, script
        self.rng, self.dice = random.Random(seed), random.Random(seed)  # dice: other threads'
        self.truth = {}  # asset id -> path of its image at the host: the record to audit by
        self.findings, self.struck, self.storm, self.clear = [], 0, None, False
        self.happened, self.ended, self.errors = Counter(), Counter(), Counter()
        self.running = {}  # key -> worker; each has its own, which tells their requests apart
        self.stored = defaultdict(set)  # key -> ids whose vectors the database has said to store
        self.calls = Counter()  # of the functions
        photos = [Image.open(io.BytesIO(data)).convert("RGB") for data in photographs().values()]
        images = [jpeg(p.resize((160, 120)).rotate(turn)) for p in photos for turn in (0, 180)]
        decoded = [Image.open(io.BytesIO(data)) for data in images]
        self.expected = models.reference(models.tiny_model(), decoded)
        apart = np.linalg.norm(self.expected[:, None] - self.expected, axis=2)
        assert apart[~np.eye(len(images), dtype=bool)].min() > 10 * CLOSE
        for n, data in enumerate(images):
            host.files |= {f"/good/{n}": data, f"/broken/{n}": data[: len(data) // 2]}
            host.files |= {f"/html/{n}": b"<!doctype html><title>Sold out</title>"}
            for kind in ("flaky", "slow"):
                host.files[f"/{kind}/{n}"] = lambda handler, d=data: self._moody(handler, d)
        postgrest = SimpleNamespace(stop=stack.stop_postgrest, start=stack.start_postgrest)
        self.parts = {"gateway": stack.gateway, "PostgREST": postgrest, "image host": host}
        stack.set_max_rows(PAGE_ROWS)
        stack.gateway.fault = self._weather
        self._insert(assets)

    def _moody(self, handler, data):
        """Answers for images that are slow, and for those that mostly fail until the sky clears."""
        slow = handler.path.startswith("/slow")
        time.sleep(slow * self.dice.uniform(0.2, 1.5))
        handler.reply(200 if slow or self.clear or self.dice.random() < 0.3 else 503, [], data)

    def _weather(self, request):
        """The gateway's fault hook: hits every other call in a storm, and notes what the others
        have stored."""
        hit = self.storm if self.dice.random() < 0.5 else None
        self.calls[request.path.rpartition("/")[2]] += 1
        self.struck += hit is not None
        if hit and not callable(hit):
            return hit
        answer = self.stack.gateway._route(request)
        if hit:
            return hit(answer)
        if request.path.endswith("/store_embeddings") and answer[0] == 200:
            rows = json.loads(answer[2])
            self.stored[request.headers["apikey"]] |= {
                row["asset_id"] for row in rows if row["outcome"] == "stored"
            }
        return answer

    def _send(self, flags):
        key = f"sb_secret_soak_{len(self.stored)}"
        self.stored[key], self.stack.roles[key] = set(), "service_role"
        settings = {"SUPABASE_SERVICE_ROLE_KEY": key, "FETCH_SECONDS": 15, "DB_RETRY_SECONDS": 60}
        self.running[key] = self.cli.start(*flags, script=self.script, **settings)
        self.running[key].flags, self.running[key].stopping = flags, False

    def _tend(self):
        """Judges the runs that have ended; when none is left, sends the next crew."""
        for key in [key for key, worker in self.running.items() if worker.poll() is not None]:
            self._judge(key)
        if not self.running:
            self._insert()  # so that there is something to do
            for flags in self.rng.choice(CREWS):
                self._send(flags)

    def _one_at_work(self):
        """The key of a running worker that has stored something and has more to do."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self._tend()
            for key, worker in self.running.items():
                if self.stored[key] and worker.poll() is None and not worker.stopping:
                    self._insert()
                    return key
            time.sleep(0.02)
        raise TimeoutError("no worker stored anything")

    def _judge(self, key):
        """Waits for a run's end; notes what is wrong with what it says of itself."""
        worker = self.running.pop(key)
        try:
            result = worker.finish(PATIENCE)  # checks that attempted == embedded + failed
        except AssertionError as error:
            self.findings.append(f"run {worker.flags}: {error}")
            return None
        self.ended[f"exit {result.code}"] += 1
        self.errors.update(s[:120] for s in result.err.splitlines() if s.startswith("error: "))
        if result.code not in (0, 1, 2, 130, -9) or not (result.counts or result.code in (2, -9)):
            self.findings.append(f"run {worker.flags}: exit {result.code}, said {result.out!r}")
        if result.counts.get("embedded", 0) > len(self.stored[key]):
            self.findings.append(f"run {worker.flags} stored less than it says: {result.counts}")
        return result

    def rain(self, seconds=0):
        """Plays whole rounds of the deck, one at least, and on until the seconds are over."""
        end = time.monotonic() + seconds
        while not self.happened or time.monotonic() < end:
            for card in self.rng.sample(DECK, len(DECK)):
                self.happened[card] += 1
                self._tend()
                if card in ACTS:
                    self._act(card, self._one_at_work())
                elif card in STORMS:
                    self.storm = STORMS[card]
                    time.sleep(self.rng.uniform(0.5, 2.5))
                    self.storm = None
                else:
                    self.parts[card].stop()
                    time.sleep(self.rng.uniform(0.1, 2.5))
                    self.parts[card].start()
                time.sleep(self.rng.uniform(0.1, 1))

    def _act(self, card, key):
        """Does something while the worker `key` is storing."""
        worker = self.running[key]
        if card == "kill":
            worker.kill()
            worker.wait()
            self._judge(key)
            self._send(worker.flags)
        elif card == "interrupt":
            worker.send_signal(signal.SIGINT)
            worker.stopping = True  # a second Ctrl-C would end it without a report
        elif card == "change":
            self._change(60)
        else:
            gone = self.rng.sample(sorted(self.truth), 30)
            self.stack.sql("delete from assets where id = any(%s::uuid[])", [gone])
            self.truth = {i: path for i, path in self.truth.items() if i not in gone}

    def _insert(self, count=60):
        ids = [str(uuid.UUID(int=self.rng.getrandbits(128))) for _ in range(count)]
        self.truth |= {asset_id: self._image() for asset_id in ids}
        self.stack.add_assets((i, self.host.url_of(self.truth[i]), "client") for i in ids)

    def _change(self, count):
        for asset_id in self.rng.sample(sorted(self.truth), count):
            path = self.truth[asset_id] = self._image()
            values = [self.host.url_of(path), asset_id]
            self.stack.sql("update assets set image_url = %s where id = %s", values)

    def _image(self):
        (kind,) = self.rng.choices(list(KINDS), KINDS.values())
        return f"/{kind}/{self.rng.randrange(len(self.expected))}"

    def audit(self):
        """Lets the workers end, sends a last one, and returns the list of findings."""
        self.clear = True
        for key in list(self.running):
            self._judge(key)
        self._insert(100)
        self._change(100)
        self._send(("--retry-failed",))  # those, too, that failed too often to be tried so soon
        last = self._judge(*self.running)
        if last is None or last.code not in (0, 1) or last.counts["left"] != 0:
            self.findings.append(f"the last run, under a clear sky: {last}")
        vectors = self._rows("product_embeddings", "embedding::real[]")
        failures = self._rows("product_embedding_failures", "stage, reason, permanent")
        for ids in (self._rows("assets", "image_url", "id"), vectors, failures):
            self.findings += [f"{i} is not in the catalog" for i in ids.keys() - self.truth.keys()]
        for asset_id, path in self.truth.items():
            if fault := self._fault(path, vectors.get(asset_id), failures.get(asset_id)):
                self.findings.append(f"{asset_id} {path}: {fault}")
        return self.findings

    def _rows(self, table, columns, key="asset_id"):
        return {str(i): row for i, *row in self.stack.sql(f"select {key}, {columns} from {table}")}

    def _fault(self, path, vector, failure):
        """What is wrong with what the database holds of an asset with this image, or None."""
        _, kind, number = path.split("/")
        if vector and failure:
            return f"a vector, and the failure {failure}"
        if kind in REASONS:
            return None if failure == REASONS[kind] else f"{failure or (vector and 'a vector')}"
        if not vector:
            return f"no vector; failure {failure}"
        away = np.linalg.norm(self.expected - np.array(vector[0]), axis=1)
        return None if away[int(number)] < CLOSE else f"the vector of /{away.argmin()}"

    def __str__(self):
        def listed(counts):
            return f"{counts.total()} ({', '.join(f'{n} {c}' for n, c in sorted(counts.items()))})"

        kinds = Counter(path.split("/")[1] for path in self.truth.values())
        stored = sum(map(len, self.stored.values()))
        lines = [f"faults: {listed(self.happened)}", f"runs: {listed(self.ended)}"]
        lines += [f"assets at the end: {listed(kinds)}, downloads: {len(self.host.requests)}"]
        lines += [f"calls: {listed(self.calls)}, {self.struck} struck; {stored} vectors stored"]
        lines += [f"stopped: {count} x {error}" for error, count in self.errors.items()]
        return "\n".join([*lines, *self.findings, f"audit: {len(self.findings)} findings"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--assets", type=int, default=1000, help="at the start (1000)")
    add("--seconds", type=float, default=3600, help="of rain (3600)")
    add("--seed", type=int, default=0, help="decides on the order of faults (0)")
    add("--script", type=Path, default=SCRIPT, help="another copy of the script")
    args = parser.parse_args()
    with Stack() as stack, ImageHost() as host, tempfile.TemporaryDirectory() as folder:
        made = stack_cli(stack, models.tiny_model(), Path(folder))
        with contextlib.closing(made) as cli:
            soak = Soak(stack, host, cli, args.assets, args.seed, args.script.resolve())
            soak.rain(args.seconds)
            soak.audit()
        print(soak)
    return 1 if soak.findings else 0


if __name__ == "__main__":
    sys.exit(main())
