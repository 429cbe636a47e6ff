"""Breaks the code on purpose, one small change at a time, and says whether the tests notice.

    python tests/tools/mutate.py [WORD ...]      only mutations whose name holds one of the words

Each mutation is an exact replacement and the tests that should fail by it. They run in a copy of
the repository: the working tree is never touched. Exit code 1: something was not noticed, or a
replacement fits no more, as the code has moved on.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psycopg  # noqa: F401 - what the tests import: see `failed`
import pytest
import supabase  # noqa: F401
import torch  # noqa: F401
from transformers import CLIPModel, CLIPVisionModelWithProjection  # noqa: F401

REPO = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds; tests that hang have noticed, too


class Mutation(NamedTuple):
    """`old` must be in the file once; `tests` are arguments of pytest."""

    name: str
    old: str
    new: str
    tests: str
    file: str = "generate_embeddings.py"


# Names begin with the section that they are in.
MUTATIONS = [
    # The story
    Mutation(
        "story: a defect ends with the exit code of failed images",
        "return stop.code or 2",
        "return stop.code or 1",
        "tests/test_command_line.py -k a_defect",
    ),
    Mutation(
        "story: known failures count as pending",
        "self.pending = status.assets - status.done - self.known_failures",
        "self.pending = status.assets - status.done",
        "tests/test_folder.py -k a_rerun_remembers",
    ),
    Mutation(
        "story: a deleted asset counts as left",
        "if outcome.name in GONE:",
        'if outcome.name == "superseded":',
        "tests/test_scheduling.py -k sets_aside",
    ),
    Mutation(
        "story: what was not found yet does not count as left",
        "known = max(self.pending, self.found)",
        "known = self.found",
        "tests/test_scheduling.py -k can_not_go_on",
    ),
    Mutation(
        "story: failed images do not show in the exit code",
        "return 1 if self.failed else 0",
        "return 0",
        "tests/test_scheduling.py -k protocol",
    ),
    Mutation(
        "story: a dry run forgets the limit",
        "goal = min(goal, settings.limit)",
        "pass",
        "tests/test_command_line.py -k dry_run_on_the_database",
    ),
    Mutation(
        "story: the first question may take for ever",
        ".result(store.longest)",
        ".result()",
        "tests/test_run.py -k drips_its_answer_ends_the_run_in_time",
    ),
    # Words
    Mutation(
        "words: the host of an image is its password's",
        "urllib3.util.parse_url(self.where).netloc",
        "urlsplit(self.where).netloc",
        "tests/test_scheduling.py -k host_of_an_image",
    ),
    Mutation(
        "words: control characters reach the screen",
        'c if c.isprintable() else "?"',
        "c",
        "tests/test_command_line.py -k names_from_outside",
    ),
    # The run
    Mutation(
        "run: a host is down after 21 failures",
        "HOST_FAILURES = 20",
        "HOST_FAILURES = 21",
        "tests/test_scheduling.py -k down_after_20",
    ),
    Mutation(
        "run: four hosts in a row, not three",
        "HOSTS_DOWN = 3",
        "HOSTS_DOWN = 4",
        "tests/test_scheduling.py -k three_hosts",
    ),
    Mutation(
        "run: refusals never end a run",
        "REFUSALS = 20",
        "REFUSALS = 2000",
        "tests/test_scheduling.py -k refuses_every_row",
    ),
    Mutation(
        "run: refusals end a run that stored something",
        "if len(refused) == 1 and not self.report.embedded:",
        "if len(refused) == 1:",
        "tests/test_scheduling.py -k one_row_that_was_stored",
    ),
    Mutation(
        "run: a 404 counts against the host",
        "        if failed.permanent:\n            self.hosts.answered",
        "        if False:\n            self.hosts.answered",
        "tests/test_scheduling.py -k no_sign_of_trouble",
    ),
    Mutation(
        "run: what no host was asked for is an answer of one",
        "if isinstance(error, BadAddress):",
        "if False:",
        "tests/test_scheduling.py -k no_host_was_asked",
    ),
    Mutation(
        "run: a silent host is given no time",
        "SILENT_SECONDS = 20.0",
        "SILENT_SECONDS = 0.0",
        "tests/test_scheduling.py -k away_for_a_moment",
    ),
    Mutation(
        "run: what fails in a decoder counts against the host",
        'failed = partial(self.take_failure, asset, "decode", "")',
        'failed = partial(self.take_failure, asset, "decode", host)',
        "tests/test_scheduling.py -k after_the_download",
    ),
    Mutation(
        "run: an image is no answer of its host",
        "fetched.seconds > SLOW_SECONDS\n        self.hosts.answered(host)",
        "fetched.seconds > SLOW_SECONDS",
        "tests/test_scheduling.py -k one_dead_host",
    ),
    Mutation(
        "run: a host that is down is asked on",
        "if self.hosts.is_down(place.host):",
        "if False:",
        "tests/test_scheduling.py -k one_dead_host",
    ),
    Mutation(
        "run: nothing came at all, and that is no trouble",
        "return bool(self._last_down) and not self._any_answered",
        "return False",
        "tests/test_scheduling.py -k nothing_came",
    ),
    Mutation(
        "run: slow downloads make no room",
        "slow = [task for task in fetches if task.age > SLOW_SECONDS]",
        "slow = []",
        "tests/test_scheduling.py -k slow_download",
    ),
    Mutation(
        "run: a slow line is crowded",
        "if not self.line_is_slow:",
        "if True:",
        "tests/test_scheduling.py -k line_itself",
    ),
    Mutation(
        "run: what waits for the model has no bound",
        "room = min(self.settings.workers, most_waiting - waiting)",
        "room = self.settings.workers",
        "tests/test_scheduling.py -k is_bounded",
    ),
    Mutation(
        "run: what is being embedded does not count as waiting",
        'waiting = len(self.ready) + sum(task.images for task in self.under_way("embed"))',
        "waiting = len(self.ready)",
        "tests/test_scheduling.py -k is_bounded",
    ),
    Mutation(
        "run: an unexpected error is for good",
        "permanent=isinstance(error, Rejected)",
        "permanent=not isinstance(error, NotNow)",
        "tests/test_scheduling.py -k unexpected_error",
    ),
    Mutation(
        "run: a machine's trouble is an image's failure",
        "if isinstance(error, RunError):\n            self.end(error)",
        "if False:\n            self.end(error)",
        "tests/test_scheduling.py -k machines_trouble",
    ),
    Mutation(
        "run: the limit is no limit",
        "wanted = page[: self.limit - self.report.found]",
        "wanted = page",
        "tests/test_scheduling.py -k limit_bounds",
    ),
    Mutation(
        "run: batches of one",
        "size = self.settings.batch_size\n        if not self.found",
        "size = 1\n        if not self.found",
        "tests/test_scheduling.py -k batch_is_full",
    ),
    Mutation(
        "run: the last images are one core's",
        "size = max(1, min(size, share))",
        "size = max(1, size)",
        "tests/test_scheduling.py -k shared_among",
    ),
    Mutation(
        "run: a download that hangs is waited for",
        "task.patience = seconds + 1",
        "task.patience = seconds + 1000",
        "tests/test_scheduling.py -k hangs_below",
    ),
    Mutation(
        "run: a store that hangs is waited for",
        "task.late = silence_of(self.store)\n        self.start(task, self.store.save, batch)",
        "self.start(task, self.store.save, batch)",
        "tests/test_scheduling.py -k store_that_hangs",
    ),
    Mutation(
        "run: a search that hangs is waited for",
        "task.late = silence_of(self.store)\n        self.start(task, next, self.pages, None)",
        "self.start(task, next, self.pages, None)",
        "tests/test_scheduling.py -k store_that_hangs",
    ),
    Mutation(
        "run: a batch to store has no bound",
        "batch = self.results[:WRITE_ROWS]",
        "batch = self.results[:]",
        "tests/test_scheduling.py -k batch_to_store",
    ),
    Mutation(
        "run: what waits for the store has no bound",
        "if len(self.results) >= RESULTS_WAITING:",
        "if False:",
        "tests/test_scheduling.py -k waits_for_the_store",
    ),
    Mutation(
        "run: the first vector waits for others",
        "self.store_by = 0.0",
        "self.store_by = math.inf",
        "tests/test_run.py -k first_vector",
    ),
    Mutation(
        "run: a stop loses what is being embedded",
        'return ("embed", "store")',
        'return ("store",)',
        "tests/test_scheduling.py -k waits_for_what_is_being_embedded",
    ),
    Mutation(
        "run: a store that gave up is asked again",
        "        self.storing = False\n        self.end(error)",
        "        self.end(error)",
        "tests/test_scheduling.py -k can_not_go_on",
    ),
    Mutation(
        "run: a long run's log has ten lines",
        "if first_ones or now >= self._line_due:",
        "if first_ones:",
        "tests/test_scheduling.py -k log_has_a_line",
    ),
    Mutation(
        "run: a signal that is ignored is listened to",
        "if number and signal.getsignal(number) != signal.SIG_IGN:",
        "if number:",
        "tests/test_run.py -k ignored_from_the_start",
    ),
    Mutation(
        "run: the echo of a signal ends the process",
        "elif now - self._since > ECHO_SECONDS:",
        "else:",
        "tests/test_run.py -k two_signals",
    ),
    Mutation(
        "run: no second stop",
        "elif now - self._since > ECHO_SECONDS:",
        "elif False:",
        "tests/test_run.py -k second_stop",
    ),
    # Stores
    Mutation(
        "stores: patience in a run is that before it",
        "        self._patience = self._settings.db_retry_seconds\n",
        "",
        "tests/test_run.py -k comes_back",
    ),
    Mutation(
        "stores: a stop waits for the database like any other time",
        "STOP_SECONDS = 10.0",
        "STOP_SECONDS = 1000.0",
        "tests/test_run.py -k waits_ten_seconds",
    ),
    Mutation("stores: 55P03 is not passing", "|55P03|", "|", "tests/test_supabase.py -k code_of"),
    Mutation(
        "stores: PGRST303 is not about the key",
        ', "PGRST303")',
        ")",
        "tests/test_supabase.py -k code_of",
    ),
    Mutation(
        "stores: the key goes to every bucket",
        "if bucket in self._readable_buckets:",
        "if True:",
        "tests/test_supabase.py -k named_bucket",
    ),
    Mutation(
        "stores: '..' may be written as %2e%2e",
        'if ".." in unquote(object_path).split("/") or',
        'if ".." in object_path.split("/") or',
        "tests/test_supabase.py -k not_to_be_had",
    ),
    Mutation(
        "stores: a key that is echoed is shown",
        'message.replace(self._settings.key, "(the key)")',
        "message",
        "tests/test_supabase.py -k echoes",
    ),
    Mutation(
        "stores: what failed before is never found",
        "        yield from self._walk(new | failed)\n",
        "",
        "tests/test_supabase.py -k known_failures",
    ),
    Mutation(
        "stores: a redirect takes the key along",
        "follow_redirects=False",
        "follow_redirects=True",
        "tests/test_checks.py -k answers_otherwise",
    ),
    Mutation(
        "stores: functions of any version will do",
        'if answer["contract"] != CONTRACT:',
        "if False:",
        "tests/test_checks.py -k another_version",
    ),
    Mutation(
        "stores: a dry run deletes rows",
        "if not self._settings.dry_run:",
        "if True:",
        "tests/test_folder.py -k dry_run_forgets",
    ),
    Mutation(
        "stores: an image with the time of the one before is the same",
        "return stat.st_mtime_ns + stat.st_size",
        "return stat.st_mtime_ns",
        "tests/test_folder.py -k of_the_same_time",
    ),
    Mutation(
        "stores: a link to a disk that is away loses its vector",
        "if not is_link(self._folder / path)]",
        "]",
        "tests/test_folder.py -k disk_is_away",
    ),
    Mutation(
        "stores: a subfolder that can't be read counts as empty",
        "onerror=unreadable",
        "onerror=None",
        "tests/test_folder.py -k can_not_be_read",
    ),
    Mutation(
        "stores: other/sub counts as below sub",
        "return composed(path).startswith(self._below)",
        "return self._below in composed(path)",
        "tests/test_folder.py -k client_is_a_subfolder",
    ),
    Mutation(
        "stores: a broken image keeps the vector of the one before",
        "embedding is null or modified <> :mark\n    or model_version <> :version",
        "embedding is null or model_version <> :version",
        "tests/test_folder.py -k gives_way",
    ),
    Mutation(
        "stores: a failure of a new version keeps the old one's vector",
        "embedding is null or modified <> :mark\n    or model_version <> :version",
        "embedding is null or modified <> :mark",
        "tests/test_folder.py -k gives_way",
    ),
    Mutation(
        "stores: a locked file is an error after Python's five seconds",
        "sqlite3.connect(place, 60)",
        "sqlite3.connect(place)",
        "tests/test_folder.py -k locked_file",
    ),
    Mutation(
        "stores: thumbnails of a NAS are images",
        "elif name.lower() in SYSTEM_FOLDERS:",
        "elif False:",
        "tests/test_folder.py -k systems_keep",
    ),
    # Fetching
    Mutation(
        "fetching: a gzip body must have the plain file's length",
        "while not (unpacker and unpacker.eof):",
        "while True:",
        "tests/test_fetch.py -k comes_to",
    ),
    Mutation(
        "fetching: gzip without its end is an image",
        "if unpacker and not unpacker.eof:",
        "if False:",
        "tests/test_fetch.py -k comes_to",
    ),
    Mutation(
        "fetching: gzip is unpacked without bound",
        "piece = 2**12",
        "piece = 2**16",
        "tests/test_fetch.py -k hostile",
    ),
    Mutation(
        "fetching: 404 says that a host does not cope",
        "STRAINED = frozenset((408,",
        "STRAINED = frozenset((404, 408,",
        "tests/test_fetch.py -k status_is_about",
    ),
    Mutation(
        "fetching: 429 is about the image alone",
        "429, 430, *range",
        "430, *range",
        "tests/test_fetch.py -k status_is_about",
    ),
    Mutation(
        "fetching: Retry-After is not heard",
        'raise Strain(f"HTTP {status}", retry_after(answer.headers))',
        'raise Strain(f"HTTP {status}")',
        "tests/test_fetch.py -k retry_after",
    ),
    Mutation(
        "fetching: Supabase's Storage means the 400 that it sends",
        "            if named:\n",
        "            if False:\n",
        "tests/test_fetch.py -k supabases_storage",
    ),
    Mutation(
        "fetching: any project's bucket is ours",
        'if b"Bucket not found" in page and url.startswith(self._settings.url):',
        'if b"Bucket not found" in page:',
        "tests/test_fetch.py -k bucket_of_the_project",
    ),
    Mutation(
        "fetching: an answer without a body may become another image's",
        "if answer.status_code >= 400:",
        "if True:",
        "tests/test_fetch.py -k no_other_images",
    ),
    Mutation(
        "fetching: a page costs a new connection",
        "            page = answer.raw.read(PAGE_BYTES)\n",
        "            page = answer.raw.read(10)\n",
        "tests/test_fetch.py -k used_again",
    ),
    Mutation(
        "fetching: a deadline does not grow",
        "self._end += count / LIVELY_BYTES",
        "pass",
        "tests/test_fetch.py -k 'slow_line or grows'",
    ),
    Mutation(
        "fetching: what came in time counts as silence",
        "if reason == NO_ANSWER and deadline.first_byte:",
        "if False:",
        "tests/test_fetch.py -k slow_host",
    ),
    Mutation(
        "fetching: a name server that is away is a name that is not there",
        "if isinstance(root, socket.gaierror) and root.errno == socket.EAI_AGAIN:",
        "if False:",
        "tests/test_fetch.py -k leads_nowhere",
    ),
    Mutation(
        "fetching: a bad certificate is a strain",
        "LASTING = (CERTIFICATE, NO_TLS,",
        "LASTING = (NO_TLS,",
        "tests/test_fetch.py -k certificate_that",
    ),
    Mutation(
        "fetching: headers are not bounded",
        "if self._left < 0:",
        "if False:",
        "tests/test_fetch.py -k 'hostile or socks'",
    ),
    Mutation(
        "fetching: headers behind a proxy are not bounded",
        "                change(super().proxy_manager_for(proxy, ssl_context=tls, **options))",
        "                super().proxy_manager_for(proxy, ssl_context=tls, **options)",
        "tests/test_fetch.py -k proxy",
    ),
    Mutation(
        "fetching: the key goes along a redirect",
        "            headers = {}  # they were for the first URL alone\n",
        "",
        "tests/test_fetch.py -k along_no_redirect",
    ),
    Mutation(
        "fetching: cookies are forgotten",
        "                cookies.update(answer.cookies)\n",
        "",
        "tests/test_fetch.py -k cookie",
    ),
    Mutation(
        "fetching: six redirects",
        "MAX_REDIRECTS = 5",
        "MAX_REDIRECTS = 6",
        "tests/test_fetch.py -k five_redirects",
    ),
    Mutation(
        "fetching: a long URL is quoted",
        "    if len(url) > LONGEST_URL:",
        "    if False:",
        "tests/test_fetch.py -k hostile",
    ),
    Mutation(
        "fetching: data: URLs with a fragment are broken",
        'base64\\s*,([^#]*)"',
        'base64\\s*,(.*)"',
        "tests/test_fetch.py -k data_url",
    ),
    Mutation(
        "fetching: only a name's first address is tried",
        "                if not addresses:\n                    raise\n",
        "                raise\n",
        "tests/test_fetch.py -k dead_first",
    ),
    Mutation(
        "fetching: a dead address is tried for each connection",
        "                self._failing.add(address)\n",
        "",
        "tests/test_fetch.py -k dead_first",
    ),
    Mutation(
        "fetching: a dead address is never tried again",
        "            addresses = allowed\n",
        "            raise TimeoutError\n",
        "tests/test_fetch.py -k dead_first",
    ),
    Mutation(
        "fetching: no guard without a hook",
        'if not hasattr(urllib3.connection.HTTPConnection, "_new_conn"):',
        "if False:",
        "tests/test_fetch.py -k hook",
    ),
    Mutation(
        "fetching: connections don't ask the guard",
        "change(self.poolmanager, _new_conn=lambda connection: guard.connect(connection))",
        "change(self.poolmanager)",
        "tests/test_fetch.py -k private_address",
    ),
    Mutation(
        "fetching: private addresses beside public ones are connected to",
        "        return public\n\n    @classmethod",
        "        return addresses\n\n    @classmethod",
        "tests/test_fetch.py -k only_the_public",
    ),
    Mutation(
        "fetching: any port of the project's host is its origin",
        "if self._all or (host, port) == self._own:",
        "if self._all or host == self._own[0]:",
        "tests/test_fetch.py -k own_origin",
    ),
    Mutation(
        "fetching: a dot at a name's end hides a private address",
        'unquote(host).rstrip(".")',
        "unquote(host)",
        "tests/test_fetch.py -k behind_a_proxy",
    ),
    Mutation(
        "fetching: behind a proxy nothing is private",
        "            self._guard.check_name(url)\n",
        "",
        "tests/test_fetch.py -k behind_a_proxy",
    ),
    Mutation(
        "fetching: multicast addresses are public",
        "return ip.is_global and not ip.is_multicast",
        "return ip.is_global",
        "tests/test_fetch.py -k internet_are_public",
    ),
    Mutation(
        "fetching: ::ffff:0:127.0.0.1 is public",
        "if not inner and ip not in cls.INTERNET:",
        "if False:",
        "tests/test_fetch.py -k internet_are_public",
    ),
    Mutation(
        "fetching: Azure's metadata are public",
        'ipaddress.ip_network("168.63.129.16")',
        'ipaddress.ip_network("168.63.129.1")',
        "tests/test_fetch.py -k internet_are_public",
    ),
    Mutation(
        "fetching: old hosts are not spoken to",
        '    context.set_ciphers("DEFAULT:@SECLEVEL=2")\n',
        "",
        "tests/test_fetch.py -k old_image_hosts",
    ),
    Mutation(
        "fetching: roots must have key identifiers",
        "context.verify_flags &= ~ssl.VERIFY_X509_STRICT",
        "pass",
        "tests/test_fetch.py -k key_identifiers",
    ),
    Mutation(
        "fetching: a pipe among the files is read",
        "if not path.is_file():",
        "if False:",
        "tests/test_fetch.py -k read_or_named",
    ),
    # Pictures
    Mutation(
        "pictures: WebP is turned, as browsers don't",
        'if file.format == "WEBP":',
        "if False:",
        "tests/test_images.py -k browsers_do_not_turn",
    ),
    Mutation(
        "pictures: images are turned by XMP",
        'image.info.pop("xmp", None)',
        "pass",
        "tests/test_images.py -k never_by_xmp",
    ),
    Mutation(
        "pictures: what is transparent is black",
        'page = Image.new("RGB", image.size, "white")',
        'page = Image.new("RGB", image.size, "black")',
        "tests/test_images.py -k laid_on_white",
    ),
    Mutation(
        "pictures: 12 bits are 16",
        "bits = tags.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0]",
        "bits = 16",
        "tests/test_images.py -k 12_bits",
    ),
    Mutation(
        "pictures: a JPEG that lost pixels is whole",
        "if pictures[0] != pictures[1]:",
        "if False:",
        "tests/test_images.py -k lost_pixels",
    ),
    Mutation(
        "pictures: a wrong checksum does not matter",
        "wanted = zlib.crc32(data[at + 4 : end - 4]) == checksum",
        "wanted = True",
        "tests/test_images.py -k wrong_checksum",
    ),
    # Decoders
    Mutation(
        "decoders: they stay in the run's process group",
        "start_new_session=True",
        "start_new_session=False",
        "tests/test_decoders.py -k stops_the_run",
    ),
    Mutation(
        "decoders: the key is in their environment",
        "env=needs | DECODER_SETTINGS",
        "env=os.environ | DECODER_SETTINGS",
        "tests/test_decoders.py -k nothing_of_the_environment",
    ),
    Mutation(
        "decoders: one that hangs is waited for",
        "threading.Timer(DECODE_PATIENCE, process.kill)",
        "threading.Timer(9999, process.kill)",
        "tests/test_decoders.py -k hangs_is_killed",
    ),
    Mutation(
        "decoders: they may send as much as they like",
        "if length > most:",
        "if False:",
        "tests/test_decoders.py -k sends_anything_else",
    ),
    Mutation(
        "decoders: they may open files",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))",
        "tests/test_decoders.py -k opens_nothing",
    ),
    # Model
    Mutation(
        "model: another activation",
        "GELU_SLOPE = 1.702",
        "GELU_SLOPE = 1.6",
        "tests/test_model.py -k those_of_transformers",
    ),
    Mutation(
        "model: vectors are of any length",
        "vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)",
        "pass",
        "tests/test_model.py -k those_of_transformers",
    ),
    Mutation(
        "model: a file's checksum does not matter",
        "if found != pinned.sha256:",
        "if False:",
        "tests/test_model.py -k one_line_without_secrets",
    ),
    Mutation(
        "model: a library's message goes on as it is",
        'return re.sub(r"https?://\\S+", "the hub", text)',
        "return text",
        "tests/test_model.py -k one_line_without_secrets",
    ),
    Mutation(
        "model: what a stopped download left stays",
        'MODEL_CACHE.rglob("*.incomplete")',
        "()",
        "tests/test_model.py -k stopped",
    ),
    Mutation(
        "model: another shape goes under ViT-B/32's name",
        "if config != VIT_B_32 and settings.model_version == MODEL_VERSION:",
        "if False:",
        "tests/test_model.py -k another_shape_wants",
    ),
    Mutation(
        "model: numbers that are not finite become a vector",
        "            if np.isfinite(vector).all():",
        "            if True:",
        "tests/test_model.py -k not_finite",
    ),
    # The page
    Mutation(
        "page: a cell may be a formula",
        'if text.startswith(("=", "+", "-", "@", "\\t", "\\r")):',
        "if False:",
        "tests/test_gallery.py -k formula",
    ),
    Mutation(
        "page: a host that hangs is waited for",
        "wait(futures.values(), settings.fetch_seconds + 1)",
        "wait(futures.values(), settings.fetch_seconds + 999)",
        "tests/test_gallery.py -k keeps_the_page_waiting",
    ),
    Mutation(
        "page: a pipe is written to",
        "if path.exists() and not path.is_file():",
        "if False:",
        "tests/test_gallery.py -k refused_at_once",
    ),
    # schema.sql
    Mutation(
        "schema: the file waits for an app's long transaction",
        "set local lock_timeout = '10s';",
        "set local lock_timeout = '1000s';",
        "tests/test_schema.py -k long_transaction",
        "schema.sql",
    ),
    Mutation(
        "schema: a new image keeps its vector",
        "when (old.image_url is distinct from new.image_url)",
        "when (false)",
        "tests/test_database.py -k new_image_is_forgotten",
        "schema.sql",
    ),
    Mutation(
        "schema: a long search has no cap",
        "limit least(match_count, 1000);",
        "limit match_count;",
        "tests/test_database.py -k capped",
        "schema.sql",
    ),
    # The command line
    Mutation(
        "command line: ${...} in .env is filled in",
        "interpolate=False",
        "interpolate=True",
        "tests/test_settings.py -k dollar_sign",
    ),
    Mutation(
        "command line: .env wins over the environment",
        "re.fullmatch(setting.pattern, given or kept, re.ASCII)",
        "re.fullmatch(setting.pattern, kept or given, re.ASCII)",
        "tests/test_settings.py -k environment_wins",
    ),
    Mutation(
        "command line: --shard with --local goes unsaid",
        'if "shard" in flags and "local" in flags:',
        "if False:",
        "tests/test_command_line.py -k usage_error_names",
    ),
    Mutation(
        "command line: flags may be cut short",
        "allow_abbrev=False",
        "allow_abbrev=True",
        "tests/test_command_line.py -k usage_error_names",
    ),
    Mutation(
        "command line: other alphabets' digits are numbers",
        "if not (text.isascii() and text.isdecimal()) or int(text) < 1:",
        "if not text.isdecimal() or int(text) < 1:",
        "tests/test_command_line.py -k usage_error_names",
    ),
    Mutation(
        "command line: the environment's key goes to a folder's URL in silence",
        'if found["url"].origin != found["key"].origin:',
        "if False:",
        "tests/test_settings.py -k two_places",
    ),
    Mutation(
        "decoders: they are not told from the run",
        'IN_DECODER = sys.argv == ["-c", AS_DECODER]',
        "IN_DECODER = False",
        "tests/test_decoders.py -k does_not_stop_its_decoders",
    ),
    Mutation(
        "schema: a view may give an id several times",
        "group by s.id having count(*) > 1 or s.id is null",
        "group by s.id having s.id is null",
        "tests/test_schema.py",
        "schema.sql",
    ),
    Mutation(
        "schema: a foreign key may lack its cascade",
        "        and c.confdeltype = 'c' as fits",
        "        as fits",
        "tests/test_schema.py",
        "schema.sql",
    ),
    Mutation(
        "schema: views lose what was granted on them",
        "    where c.oid in (to_regclass('public.embedding_failures'),",
        "    where false and c.oid in (to_regclass('public.embedding_failures'),",
        "tests/test_schema.py -k granted",
        "schema.sql",
    ),
    Mutation(
        "schema: the trigger forgets nothing of a photo that goes",
        "  delete from product_embeddings e where e.asset_id in (one, other);\n  return null;",
        "  delete from product_embeddings e where e.asset_id in (other);\n  return null;",
        "tests/test_schema.py",
        "schema.sql",
    ),
]


def copy_of_the_repository(folder):
    """The files that git knows or would add, and the downloads of the tests."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=REPO, text=True).splitlines():
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, folder / name)
    (REPO / ".cache").mkdir(exist_ok=True)
    (folder / ".cache").symlink_to(REPO / ".cache")


def failed(folder, tests):
    """Whether one of the tests fails or hangs. They run in a fork of this process, which has
    imported already what takes long."""
    said = folder / "said.txt"
    child = os.fork()
    if child == 0:
        with said.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.setsid()  # to be ended with all that it starts
        os.chdir(folder)
        arguments = ["-n", "0", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
        code = pytest.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    began = time.monotonic()
    while time.monotonic() < began + PATIENCE:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, 1):  # no test was found, or the file can't be imported
                raise SystemExit(f"pytest {tests}: exit {code}\n{said.read_text()[-2000:]}")
            return code == 1
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def try_out(mutation, folder):
    """What became of a mutation: "noticed", "NOT NOTICED", "fits no more"."""
    file = folder / mutation.file
    whole = file.read_text()
    if whole.count(mutation.old) != 1:
        return "FITS NO MORE"
    file.write_text(whole.replace(mutation.old, mutation.new))
    try:
        noticed = failed(folder, mutation.tests)
    finally:
        file.write_text(whole)
    return "noticed" if noticed else "NOT NOTICED"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of the names of mutations (all)")
    words = parser.parse_args().words
    sys.dont_write_bytecode = True  # a change within a second would go unseen
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    others = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_repository(folder)
        for number, mutation in enumerate(chosen, 1):
            began = time.monotonic()
            became = try_out(mutation, folder)
            others += became != "noticed"
            seconds = time.monotonic() - began
            print(f"{number:3} {became:12} {seconds:4.0f} s  {mutation.name}", flush=True)
    print(f"{len(chosen) - others} of {len(chosen)} were noticed")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
