"""Lets faults rain on generate_embeddings.py for a while, then audits the database.

    python tests/tools/soak.py [--assets N] [--seconds S] [--seed K]

The real stack, two real image hosts, the tiny model. Workers run again and again, alone, in pairs
and as shards, while a shuffled deck of faults is played: the seed decides on the order, the clock
on the moments. One host is moody: it rests, and is given up (after PATIENT seconds here). Then the
sky clears, and one last run does what is left. The audit compares the database with this script's
own record of the images that each asset had. Exit code 1: it found something.
"""

import argparse
import contextlib
import io
import json
import random
import signal
import sys
import time
import uuid
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the script

import numpy as np
from conftest import TUNED, folder_vectors, stack_cli
from models import tiny_model
from PIL import Image
from samples import saved
from stack import ImageHost, Stack, photographs

PAGE_ROWS = 50  # the server's cap: page borders everywhere
PATIENCE = 600  # seconds for a run to end: for a machine that others use, too
CLOSE = 1e-4  # vectors of one image agree to 1e-6; those of two are 10 times as far apart at least
SHARDS = [("--shard", "1/3"), ("--shard", "2/3"), ("--shard", "3/3")]
CREWS = [[()], [()], [("--batch-size", 4, "--workers", 3)], [(), ()], SHARDS]
PATIENT = "PATIENT_SECONDS=3"  # with a host; the script has a minute
SHARED = 0.2  # of the assets have the image of another one
KINDS = {"good": 80, "flaky": 8, "gone": 5, "broken": 5}
REASONS = {  # of the images that never come
    "gone": ["fetch", "HTTP 404"],
    "broken": ["decode", "broken or truncated image file"],
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
ACTS = ["interrupt", "delete", "change", *["kill"] * 5]
DECK = [*STORMS, "gateway", "PostgREST", "image host", *ACTS]


class Soak:
    """One soak, on an empty catalog; `findings` is what the audit found."""

    def __init__(self, stack, host, moody, cli, assets=300, seed=0):
        self.stack, self.host, self.moody, self.cli = stack, host, moody, cli
        self.script = cli.folder / "tuned.py"
        self.script.write_text(TUNED)
        self.rng, self.dice = random.Random(seed), random.Random(seed)  # dice: other threads'
        self.truth = defaultdict(list)  # asset id -> URLs of its images, the last one its own now
        self.findings, self.storm, self.clear = [], None, False
        self.happened, self.ended = Counter(), Counter()
        self.running = {}  # key -> worker; each has its own, which tells their requests apart
        self.stored = defaultdict(set)  # key -> ids whose vectors the database has said to store
        self.urls = []  # of all images
        photos = [Image.open(io.BytesIO(data)).convert("RGB") for data in photographs().values()]
        images = [saved(photo.resize((160, 120)), "JPEG", quality=90) for photo in photos]
        self.expected = self._vectors_of(images)
        apart = np.linalg.norm(self.expected[:, None] - self.expected, axis=2)
        assert apart[~np.eye(len(images), dtype=bool)].min() > 10 * CLOSE
        for n, data in enumerate(images):
            host.files |= {f"/good/{n}": data, f"/broken/{n}": data[: len(data) // 2]}
            moody.files[f"/flaky/{n}"] = lambda handler, data=data: self._moody(handler, data)
        postgrest = SimpleNamespace(stop=stack.stop_postgrest, start=stack.start_postgrest)
        self.parts = {"gateway": stack.gateway, "PostgREST": postgrest, "image host": host}
        stack.set_max_rows(PAGE_ROWS)
        stack.gateway.fault = self._weather
        self._insert(assets)

    def _vectors_of(self, images):
        """What the script makes of image files when nothing disturbs it."""
        folder = self.cli.folder / "expected"
        folder.mkdir()
        for n, data in enumerate(images):
            (folder / f"{n}.jpg").write_bytes(data)
        self.cli("--local", folder)
        rows = folder_vectors(folder)
        return np.array([rows[f"{n}.jpg"].vector for n in range(len(images))])

    def _moody(self, handler, data):
        """Answers slowly, or not at all well until the sky clears."""
        if self.clear or self.dice.random() < 0.4:
            time.sleep(self.dice.uniform(0, 1))
            return handler.reply(200, [], data)
        rest = [("Retry-After", "1")] if self.dice.random() < 0.5 else []
        return handler.reply(429 if rest else 503, rest, b"slow down")

    def _weather(self, request):
        """The gateway's fault hook: hits every other call in a storm, and notes what the others
        have stored."""
        hit = self.storm if self.dice.random() < 0.5 else None
        if hit and not callable(hit):
            return hit
        answer = self.stack.gateway._route(request)
        if hit:
            return hit(answer)
        if request.path.endswith("/store_embeddings") and answer[0] == 200:
            vectors = {row["asset_id"] for row in json.loads(request.body)["vectors"]}
            taken = vectors.intersection(json.loads(answer[2])["taken"])
            self.stored[request.headers["apikey"]] |= taken
        return answer

    def _send(self, flags):
        key = f"sb_secret_soak_{len(self.stored)}"
        self.stored[key], self.stack.roles[key] = set(), "service_role"
        settings = {"SUPABASE_SERVICE_ROLE_KEY": key, "FETCH_SECONDS": 15, "DB_RETRY_SECONDS": 60}
        self.running[key] = self.cli.start(PATIENT, "--", *flags, script=self.script, **settings)
        self.running[key].flags, self.running[key].stopping = flags, False

    def _tend(self):
        """Judges the runs that have ended; when none is left, sends the next crew."""
        for key, worker in list(self.running.items()):
            if worker.poll() is not None:
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
                    time.sleep(self.rng.uniform(0.2, 1))
                    self.storm = None
                else:
                    self.parts[card].stop()
                    time.sleep(self.rng.uniform(0.1, 1.5))
                    self.parts[card].start()
                time.sleep(self.rng.uniform(0.05, 0.3))
            self._look_at_vectors()

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
            for asset_id in gone:
                del self.truth[asset_id]

    def _insert(self, count=60):
        ids = [str(uuid.UUID(int=self.rng.getrandbits(128))) for _ in range(count)]
        self.stack.add_assets((i, self._new_image_of(i), "client") for i in ids)

    def _change(self, count):
        for asset_id in self.rng.sample(sorted(self.truth), count):
            values = [self._new_image_of(asset_id), asset_id]
            self.stack.sql("update assets set image_url = %s where id = %s", values)

    def _new_image_of(self, asset_id):
        (kind,) = self.rng.choices(list(KINDS), KINDS.values())
        host = self.moody if kind == "flaky" else self.host
        url = host.url_of(f"/{kind}/{self.rng.randrange(len(self.expected))}?{len(self.urls)}")
        if self.rng.random() < SHARED and self.urls:
            url = self.rng.choice(self.urls)
        self.urls.append(url)
        self.truth[asset_id].append(url)
        return url

    def audit(self):
        """Lets the workers end, sends a last one, and returns the list of findings."""
        self.clear = True
        for key in list(self.running):
            self._judge(key)
        self._insert(100)
        self._change(100)
        asked_before = self.host.asked() + self.moody.asked()
        self._send(("--retry-failed",))  # those, too, that failed too often to be tried so soon
        last = self._judge(*self.running)
        if last is None or last.code not in (0, 1) or last.counts["left"] != 0:
            self.findings.append(f"the last run, under a clear sky: {last}")
        asked = self.host.asked() + self.moody.asked() - asked_before
        self.findings += [f"asked for {n} times: {path}" for path, n in asked.items() if n > 1]
        hashes = self._look_at_vectors()
        failures = self._rows("embedding_failures", "stage, reason")
        for ids in (self._rows("assets", "image_url", "id"), hashes, failures):
            self.findings += [f"{i} is not in the catalog" for i in ids.keys() - self.truth.keys()]
        for asset_id, urls in self.truth.items():
            if fault := self._fault(urls[-1], hashes.get(asset_id), failures.get(asset_id)):
                self.findings.append(f"{asset_id} {urls[-1]}: {fault}")
        return self.findings

    def _rows(self, table, columns, key="asset_id"):
        return {str(i): row for i, *row in self.stack.sql(f"select {key}, {columns} from {table}")}

    def _look_at_vectors(self):
        """Whether each vector is of an image that its asset had; the URL of that, by asset."""
        query = "select embedding_image_hash(url), url from unnest(%s::text[]) url"
        url_of = dict(self.stack.sql(query, [self.urls]))
        columns = "embedded_image_hash, embedding::real[]"
        found = {}
        for asset_id, (image_hash, vector) in self._rows("product_embeddings", columns).items():
            url = found[asset_id] = url_of.get(image_hash)
            if url not in self.truth[asset_id]:
                self.findings.append(f"{asset_id} never had {url}, which its vector is of")
                continue
            expected = self.expected[int(urlsplit(url).path.rpartition("/")[2])]
            if np.linalg.norm(expected - np.array(vector)) > CLOSE:
                self.findings.append(f"{asset_id} {url}: the vector of another image")
        return found

    def _fault(self, url, embedded, failure):
        """What is wrong with what the database holds of an asset with this image, or None."""
        kind = url.split("/")[3]
        if kind in REASONS:  # perhaps beside the vector of an earlier image, which stays
            return None if failure == REASONS[kind] and embedded != url else f"failure {failure}"
        if failure:
            return f"a failure, {failure}"
        return None if embedded == url else f"the vector of {embedded}"

    def __str__(self):
        kinds = Counter(urls[-1].split("/")[3] for urls in self.truth.values())
        stored = sum(map(len, self.stored.values()))
        lines = [f"faults: {dict(self.happened)}", f"runs: {dict(self.ended)}"]
        lines += [f"assets at the end: {dict(kinds)}, {stored} vectors were stored"]
        return "\n".join([*lines, *self.findings, f"audit: {len(self.findings)} findings"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--assets", type=int, default=1000, help="at the start (1000)")
    add("--seconds", type=float, default=3600, help="of rain (3600)")
    add("--seed", type=int, default=0, help="decides on the order of faults (0)")
    args = parser.parse_args()
    with Stack() as stack, ImageHost() as host, ImageHost() as moody, TemporaryDirectory() as name:
        with contextlib.closing(stack_cli(stack, tiny_model(), Path(name))) as cli:
            soak = Soak(stack, host, moody, cli, args.assets, args.seed)
            soak.rain(args.seconds)
            soak.audit()
        print(soak)
    return 1 if soak.findings else 0


if __name__ == "__main__":
    sys.exit(main())
