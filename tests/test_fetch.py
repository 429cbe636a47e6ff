"""Fetching: one attempt at an image, and what becomes of it.

- An image comes whole, or not at all; at most 50 MB, in little memory, over connections that stay
  open. A slow line is no fault, a byte a second is.
- Each other end has a reason of the table. It is the image's own, or a Strain of its host.
- The key, passwords and cookies go where they belong, and nowhere else.
- No connection goes to a private address, unless it is allowed.
- Image hosts may be old, slow to find, or behind a proxy.
"""

import base64
import contextlib
import gzip
import json
import os
import random
import socket
import ssl
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial

import httpx
import pytest
import urllib3
from answers import (
    CHUNKED,
    NO_LENGTH,
    OK,
    Connect,
    Socks5,
    TlsHost,
    Tunnel,
    cut,
    hang,
    hang_up,
    length,
    raw,
    redirect,
    status,
)
from conftest import alone
from stack import ImageHost

import generate_embeddings as script
from generate_embeddings import Deadline, Fetcher, ImageError, RunError, Source, Strain

IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8  # any bytes do here
HANGS = 20  # seconds that no download here may take, though the host would go on for ever
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems' loopback differs")
PROJECT = "https://project.supabase.co"


def fetcher(**changes):
    """A Fetcher for hosts on loopback."""
    return Fetcher(script.Settings(**{"private_hosts": True, **changes}))


def get(one, where, headers=None, seconds=8.0):
    """The bytes that a Fetcher gets."""
    return one.fetch(Source(where, headers or {}), Deadline(seconds)).data


def end_of(where, headers=None, seconds=8.0, one=None, **changes):
    """What becomes of an image: its bytes, or the ImageError. One that hangs fails this test
    alone."""
    one = one or fetcher(**changes)
    found = [AssertionError(f"still waiting after {HANGS} s")]

    def work():
        try:
            found[0] = get(one, where, headers, seconds)
        except Exception as error:
            found[0] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(HANGS)
    if isinstance(found[0], Exception) and not isinstance(found[0], ImageError):
        raise found[0]
    return found[0]


def told(end):
    """An end as the tables below write it: bytes, or a text that begins with "strain: " where the
    host did not cope. Each reason is one of the table, with what to do about it."""
    if isinstance(end, bytes):
        return end
    assert script.advice_on(str(end)), f"not in the table of reasons: {end}"
    return f"strain: {end}" if isinstance(end, Strain) else str(end)


def all_at_once(host, answers, seconds=8.0):
    """Downloads from a path for each answer, side by side as some take their time: name -> end."""
    paths = {name: f"/{number}" for number, name in enumerate(answers)}
    host.files |= {paths[name]: answer for name, answer in answers.items()}
    with ThreadPoolExecutor(len(paths)) as pool:
        urls = map(host.url_of, paths.values())
        ends = pool.map(partial(end_of, seconds=seconds, one=fetcher(workers=64)), urls)
        return dict(zip(paths, ends, strict=True))


def sent(host, path="/a.png"):
    """The headers of the last request for `path`, names in small letters."""
    headers = [headers for asked, headers in host.requests if asked == path][-1]
    return {name.lower(): value for name, value in headers.items()}


def good(*headers, body=IMAGE):
    return status(200, *headers, body=body)


def packed(body, encoding="gzip"):
    return good(("Content-Encoding", encoding), body=body)


def chunk(data):
    """A piece of a body that comes in chunks; an empty one ends it."""
    return b"%x\r\n%s\r\n" % (len(data), data)


LONG_HEADERS = [("X", "y" * 5000)] * 30


@pytest.fixture
def host():
    """A host with one image."""
    with ImageHost({"/a.png": IMAGE}) as host:
        yield host


@pytest.fixture
def tls(tmp_path):
    """A host with one image that speaks TLS, with a certificate of its own."""
    with TlsHost(tmp_path, {"/a.png": IMAGE}) as host:
        yield host


@pytest.fixture(autouse=True)
def no_network_settings(monkeypatch):
    """Nothing of the developer's own."""
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def names(monkeypatch):
    """Names and their addresses, for this test alone; an exception is raised."""
    names, ask = {}, socket.getaddrinfo

    def look_up(host, port, *args, **options):
        addresses = names.get(host, [host])
        if isinstance(addresses, Exception):
            raise addresses
        return [entry for address in addresses for entry in ask(address, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return names


# What an answer means

PACKED = gzip.compress(IMAGE)
GZIP = OK + b"Content-Encoding: gzip\r\n"
PAGE = b"<!DOCTYPE html><p>Not found</p>"
CODED = CHUNKED.replace(b"200 OK\r\n", b"200 OK\r\nContent-Encoding: gzip\r\n")
LOST = "strain: connection lost"

# Ends, each with the answers that come to it
ENDS = {
    IMAGE: {
        "a wrong content type": good(("Content-Type", "text/html; charset=utf-8")),
        "203": status(203, body=IMAGE),
        "206, of a host that always says so": status(206, body=IMAGE),
        "300 headers": good(*((f"X-{n}", "y") for n in range(300))),
        "an encoding that nobody knows": good(("Content-Encoding", "utf-8")),
        "gzip": packed(PACKED),
        "gzip in chunks": raw(CODED, chunk(PACKED), chunk(b""), end=hang_up),
        "gzip with the length of the plain file": raw(
            GZIP,
            b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(IMAGE),
            PACKED,
            end=hang_up,
        ),
        "deflate": packed(zlib.compress(IMAGE), "deflate"),
    },
    PAGE: {"a page, for the decoder to name": good(body=PAGE)},
    LOST: {
        "a length that is too long": raw(length(5000), IMAGE, end=hang_up),
        "a reset in the body": raw(length(5000), IMAGE, end=cut),
        "a reset at once": raw(end=cut),
        "a reset in the headers": raw(OK, end=cut),
        "nothing": raw(end=hang_up),
        "chunks without an end": raw(CHUNKED, chunk(b"hello"), end=hang_up),
        "a chunk of negative size": raw(CHUNKED, b"-5\r\nhello\r\n", chunk(b""), end=hang_up),
        "two lengths": raw(
            OK + b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nhello", end=hang_up
        ),
        "gzip that breaks off": raw(GZIP + b"Content-Length: 9999\r\n\r\n", PACKED[:-9], end=cut),
    },
    "a broken compression": {
        "gzip that is none": packed(b"no gzip at all"),
        "gzip with a wrong checksum": packed(PACKED[:-8] + b"checksum"),
        "gzip without its end": packed(PACKED[:-9]),
    },
    "an answer with too many headers": {
        "many": raw(OK + b"X: y\r\n" * 500 + b"\r\n", end=hang_up),
        "long ones": good(*LONG_HEADERS),
    },
    "HTTP 302": {"a redirect without a target": status(302)},
}


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end if isinstance(end, str) else end[:9])
def test_what_an_answer_comes_to(host, end):
    ends = all_at_once(host, ENDS[end])
    assert {name: told(end) for name, end in ends.items()} == dict.fromkeys(ENDS[end], end)
    assert set(host.asked().values()) == {1}  # whether to ask again is the run's to say


OWN = [202, 204, 205, 226, 300, 304, 400, 401, 402, 403, 404, 405, 406, 407, 409, 410, 413, 414]
OWN += [415, 418, 421, 423, 424, 426, 428, 431, 451, 499]
STRAINED = [408, 420, 425, 429, 430, 500, 501, 502, 503, 504, 520, 521, 530, 599]


def test_a_status_is_about_the_image_or_its_host(host):
    ends = all_at_once(host, {code: status(code, body=PAGE) for code in OWN + STRAINED})
    expected = {code: f"HTTP {code}" for code in OWN}
    expected |= {code: f"strain: HTTP {code}" for code in STRAINED}
    assert {code: told(end) for code, end in ends.items()} == expected


def storage_error(code, message="x"):
    body = json.dumps({"statusCode": code, "error": message, "message": message}).encode()
    return status(400, body=body)


STORAGE_ERRORS = {"404": "HTTP 404", "403": "HTTP 403", "503": "strain: HTTP 503"}
STORAGE_ERRORS |= {500: "strain: HTTP 500", "200": "HTTP 400", "InvalidKey": "HTTP 400"}


def test_supabases_storage_names_the_true_status(host):
    ends = all_at_once(host, {code: storage_error(code) for code in STORAGE_ERRORS})
    assert {code: told(end) for code, end in ends.items()} == STORAGE_ERRORS


@pytest.mark.parametrize("kind", ["object", "render/image"])
def test_a_bucket_of_the_project_that_is_not_public_is_named(host, kind):
    host.otherwise = storage_error("404", "Bucket not found")
    url = host.url_of(f"/storage/v1/{kind}/public/my%20photos/a/b.png")
    reason = "a private bucket, or none of that name (my photos)"
    assert told(end_of(url, url=host.url)) == reason
    assert told(end_of(url, url=PROJECT)) == "HTTP 404"  # another's: no setting of ours helps


def in_seconds(seconds):
    """A moment as HTTP writes it."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


# Retry-After, and the seconds of rest that it means, at least and at most
RESTS = {
    "21": (21, 21),
    "0.5": (0.5, 0.5),
    "3600": (3600, 3600),
    in_seconds(90_000): (70_000, 90_000),
}
PAST = "Mon, 01 Jan 2001 00:00:00 GMT"
RESTS["Fri, 31 Dec 9999 23:59:59 -1100"] = (366 * 86_400,) * 2
RESTS |= dict.fromkeys([PAST, "soon", "-5", "", "nan", "²", "Mon, 99 GMT"], (0, 0))


def test_retry_after_says_for_how_long_the_host_rests(host):
    ends = all_at_once(host, {text: status(429, ("Retry-After", text)) for text in RESTS})
    for text, (least, most) in RESTS.items():
        assert least <= ends[text].rest <= most, text
        assert script.clock(time.monotonic() + ends[text].rest), text  # as the log says it


@pytest.mark.parametrize("code", [103, 204, 304])
def test_what_follows_an_answer_without_a_body_is_no_other_images_answer(host, code):
    late = threading.Event()

    def answer(handler):
        handler.wfile.write(b"HTTP/1.1 %d x\r\nLink: </a.css>\r\n\r\n" % code)
        late.wait(HANGS)
        with contextlib.suppress(OSError):
            handler.wfile.write(length(5) + b"later")

    host.files["/hint.png"] = answer
    one = fetcher()
    with pytest.raises(ImageError, match=f"HTTP {code}"):
        get(one, host.url_of("/hint.png"))
    threading.Timer(0.3, late.set).start()
    assert get(one, host.url_of("/a.png")) == IMAGE


def test_what_follows_a_length_that_is_too_short_is_no_part_of_anything(host):
    host.files["/short.png"] = lambda handler: handler.wfile.write(length(100) + IMAGE)
    one = fetcher()
    for _ in range(3):
        assert get(one, host.url_of("/short.png")) == IMAGE[:100]
        assert get(one, host.url_of("/a.png")) == IMAGE


def test_connections_are_used_again_also_after_a_page(host):
    host.files["/gone.png"] = status(404, body=PAGE * 500)
    one = fetcher()
    for _ in range(5):
        get(one, host.url_of("/a.png"))
        with pytest.raises(ImageError, match="HTTP 404"):
            get(one, host.url_of("/gone.png"))
    assert host.connections == 1


# Time and size

LATE = "strain: not complete in time (2 s)"
NO_ANSWER = "strain: no answer in time"
SLOW = {
    LATE: {
        "a byte of the body now and then": raw(length(10**6), b"x", pause=0.2),
        "a byte now and then, length unknown": raw(NO_LENGTH, b"x", pause=0.2),
        "a byte now and then, in chunks": raw(CHUNKED, chunk(b"x"), pause=0.2),
        "gzip without content": raw(
            GZIP + b"\r\n", PACKED[:10], bytes(3) + b"\xff\xff", pause=0.01
        ),
        "silence in the body": raw(length(10**6), b"x" * 99, end=hang),
        "all but the end": raw(NO_LENGTH + IMAGE, b"", end=hang),
    },
    NO_ANSWER: {"silence": raw(end=hang), "silence in the headers": raw(OK, end=hang)},
}


@pytest.mark.parametrize("end", SLOW)
def test_a_slow_host_is_left_at_the_deadline(host, end):
    ends = all_at_once(host, SLOW[end], seconds=2.0)
    assert {name: told(end) for name, end in ends.items()} == dict.fromkeys(SLOW[end], end)
    for strain in ends.values():
        assert (strain.first_byte is not None) == (end == LATE)  # then the line may be slow, too
    assert get(fetcher(), host.url_of("/a.png")) == IMAGE


def test_redirects_share_one_deadline(host):
    host.files["/a.png"] = lambda handler: (time.sleep(0.5), redirect("?again")(handler))
    assert told(end_of(host.url_of("/a.png"), seconds=2.0)) in (LATE, NO_ANSWER)


def test_a_slow_line_is_no_fault(host):
    pieces = [b"x" * 50_000] * 12

    def answer(handler):
        handler.wfile.write(length(600_000))
        for piece in pieces:
            handler.wfile.write(piece)
            time.sleep(0.25)

    host.files["/a.png"] = answer
    download = fetcher().fetch(Source(host.url_of("/a.png"), {}), Deadline(2.0))
    assert len(download.data) == 600_000
    assert download.seconds > 2.0
    assert 0 < download.body_seconds <= download.seconds


def test_a_deadline_grows_by_a_second_for_each_50_kb():
    deadline = Deadline(-2)
    assert deadline.overdue
    assert str(deadline.missed()) == "not complete in time (-2 s)"
    with pytest.raises(Strain):
        deadline.left()
    deadline.arrived(5_000_000)
    assert 90 < deadline.left() <= 98
    assert not deadline.overdue


TOO_LARGE = "a file that is too large"
ENDLESS = {
    "no length": raw(NO_LENGTH, bytes(2**16)),
    "a length": raw(length(10**12), bytes(2**16)),
    "chunks": raw(CHUNKED, chunk(bytes(2**16))),
}


def test_an_endless_body_is_left_at_the_byte_cap(host):
    ends = all_at_once(host, ENDLESS)
    assert {name: told(end) for name, end in ends.items()} == dict.fromkeys(ENDLESS, TOO_LARGE)


@pytest.mark.parametrize("answer", [good(), packed(PACKED)], ids=["plain", "gzip"])
def test_a_body_of_exactly_the_cap_is_taken_and_one_byte_more_is_not(host, answer, monkeypatch):
    host.files["/a.png"] = answer
    monkeypatch.setattr(script, "MAX_BYTES", len(IMAGE))
    assert end_of(host.url_of("/a.png")) == IMAGE
    monkeypatch.setattr(script, "MAX_BYTES", len(IMAGE) - 1)
    assert told(end_of(host.url_of("/a.png"))) == TOO_LARGE


# Fetches twice at once; prints the reasons and the megabytes that it took
TWICE = """
from concurrent.futures import ThreadPoolExecutor
import generate_embeddings as script
fetcher = script.Fetcher(script.Settings(private_hosts=True))
def end_of(where):
    try:
        return len(fetcher.fetch(script.Source(where, {}), script.Deadline(60)).data)
    except script.ImageError as error:
        return str(error)
end_of(sys.argv[1])
before = peak()
hostile = sys.argv[2] + sys.argv[3] * 2**23
with ThreadPoolExecutor(2) as pool:
    ends = set(pool.map(end_of, [hostile] * 2))
print(json.dumps([sorted(ends), peak() - before]))
"""


def cookies_without_end(handler):
    """Redirects to itself with 100 KB of new cookies, which are for other paths."""
    names = (f"{random.random()}" for _ in range(390))
    cookies = [("Set-Cookie", f"{name}={'v' * 250}; Path=/x") for name in names]
    status(302, ("Location", "?again"), *cookies)(handler)


LONG_LINE = b"X: " + b"y" * 65_000 + b"\r\n"
HINT = b"HTTP/1.1 100 Continue\r\n" + LONG_LINE + b"\r\n"
NO_END = "a redirect that leads nowhere (more than 5)"
NO_BASE64 = "a data: URL that is broken, or not in base64"
HOSTILE = {
    "a gzip bomb": (packed(gzip.compress(bytes(2**28))), TOO_LARGE),  # 256 MB in 260 KB
    "headers of 26 MB": (raw(OK, LONG_LINE * 399, end=hang_up), "an answer with too many headers"),
    "headers without end behind a body": (
        raw(CHUNKED + chunk(IMAGE) + b"0\r\n", b"X: y\r\n" * 999),
        "an answer with too many headers",
    ),
    "hints of 26 MB": (raw(HINT * 399, end=hang_up), "an answer with too many headers"),
    "cookies along redirects": (cookies_without_end, NO_END),
    "percent signs": ("data:,", NO_BASE64),
    "percent signs as base64": ("data:;base64,", NO_BASE64),
    "a URL of percent signs": ("http://h/", "not a valid URL (longer than 65,536 characters)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_takes_little_memory(host, name):
    answer, reason = HOSTILE[name]
    hostile = (answer, "%")
    if callable(answer):
        host.files["/hostile.png"] = answer
        hostile = (host.url_of("/hostile.png"), "")
    ends, megabytes = alone(TWICE, host.url_of("/a.png"), *hostile)
    assert ends == [reason]
    assert megabytes < 130


# Redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_five_redirects_are_followed_and_six_are_not(host, code):
    for n in range(5):
        host.files[f"/{n}"] = redirect(f"/{n + 1}", code)
    host.files["/5"] = IMAGE
    assert end_of(host.url_of("/0")) == IMAGE
    host.files["/5"] = redirect("/a.png")
    assert told(end_of(host.url_of("/0"))) == NO_END
    assert host.asked()["/a.png"] == 0


TARGETS = ["../a.png", "./x/../../a.png", "/a.png?w=1", "//HOST/a.png", "HTTP://HOST/a.png"]
TARGETS += ["/%61.png", " /a.png ", "/a.png#x"]
TARGETS += ["/é a.png".encode().decode("latin-1")]  # raw UTF-8, as careless hosts send it


@pytest.mark.parametrize("target", TARGETS)
def test_a_redirect_may_be_relative_or_careless(host, target):
    host.files["/é a.png"] = IMAGE
    target = target.replace("HOST", host.url.removeprefix("http://"))
    host.files["/dir/old.png"] = redirect(target)
    assert end_of(host.url_of("/dir/old.png")) == IMAGE


NOWHERE = ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "gopher://127.0.0.1/", "data:,x"]
NOWHERE += ["http://[::1", "http://a b/", "http://h:99999/", "http://.example/a.png"]


@pytest.mark.parametrize("target", NOWHERE)
def test_a_redirect_leads_to_http_and_https_only(host, target):
    host.files["/a.png"] = redirect(target)
    assert told(end_of(host.url_of("/a.png"))) == "a redirect that leads nowhere"
    assert len(host.requests) == 1


def wants_cookie(target, code=302):
    """Answers with the image, once the cookie that it sets comes back with a request."""

    def answer(handler):
        if "seen=a=b" in handler.headers.get("Cookie", ""):
            good()(handler)
        else:
            cookie = ("Set-Cookie", "seen=a=b; Path=/; Max-Age=60; HttpOnly")
            status(code, cookie, ("Set-Cookie", "lang=en"), ("Location", target))(handler)

    return answer


@pytest.mark.parametrize("code", [302, 307])
def test_a_redirect_to_itself_with_a_cookie_is_followed_with_it(host, code):
    host.files["/a.png"] = wants_cookie("/a.png", code)
    one = fetcher()
    for _ in range(2):
        assert get(one, host.url_of("/a.png")) == IMAGE
    cookies = [headers.get("Cookie") for _, headers in host.requests]
    assert cookies == [None, "seen=a=b; lang=en"] * 2  # it lives within one image's chain


def test_a_cookie_goes_to_no_other_host_and_comes_back_to_its_own(host):
    with ImageHost() as other:
        elsewhere = other.url_of("/hop").replace("127.0.0.1", "localhost")
        other.files["/hop"] = redirect(host.url_of("/a.png"))
        host.files["/a.png"] = wants_cookie(elsewhere)
        assert end_of(host.url_of("/a.png")) == IMAGE
        assert "cookie" not in sent(other, "/hop")


@pytest.mark.parametrize("end", [None, hang], ids=["endless", "silent"])
def test_the_body_of_a_redirect_is_not_read(host, end):
    head = b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\n\r\n"
    host.files["/old.png"] = raw(head, b"x" * 2**16, end=end)
    assert end_of(host.url_of("/old.png"), seconds=15.0) == IMAGE


# What is sent, and to whom

KEY = {"apikey": "sb_secret_x", "Authorization": "Bearer sb_secret_x"}


def test_the_agent_is_honest_and_asks_for_no_format_that_is_made_on_demand(host):
    end_of(host.url_of("/a.png"))
    agent = sent(host)["user-agent"].lower()
    assert agent.startswith("generate-embeddings/")
    refused = ("mozilla", "python", "requests", "urllib", "openai", "bot", "crawl", "spider")
    assert not any(name in agent for name in refused)
    assert "*/*" in sent(host)["accept"]
    assert "webp" not in sent(host)["accept"]
    assert "avif" not in sent(host)["accept"]
    assert sent(host)["accept-encoding"] == "identity"


def test_the_key_goes_to_its_place_along_no_redirect_and_with_no_other_image(host):
    host.files["/here"] = redirect("/a.png")
    one = fetcher()
    with ImageHost({"/a.png": IMAGE}) as other:
        host.files["/away"] = redirect(other.url_of("/a.png"))
        for path, target in (("/here", host), ("/away", other)):
            assert get(one, host.url_of(path), KEY) == IMAGE
            assert sent(host, path).items() >= {(n.lower(), value) for n, value in KEY.items()}
            assert sent(target).keys().isdisjoint(("apikey", "authorization"))
    get(one, host.url_of("/a.png"), KEY)
    get(one, host.url_of("/a.png"))
    assert sent(host).keys().isdisjoint(("apikey", "authorization"))


@pytest.mark.parametrize("by", ["HOME", "NETRC"])
def test_passwords_of_netrc_are_not_sent(host, by, monkeypatch, tmp_path):
    file = tmp_path / ".netrc"
    file.write_text("machine 127.0.0.1 login me password secret\ndefault login me password x\n")
    file.chmod(0o600)
    monkeypatch.setenv(by, str(file if by == "NETRC" else tmp_path))
    host.files["/old.png"] = redirect("/a.png")
    assert end_of(host.url_of("/old.png")) == IMAGE
    assert not any("Authorization" in headers for _, headers in host.requests)
    end_of(host.url_of("/a.png"), KEY)
    assert sent(host)["authorization"] == KEY["Authorization"]


def test_the_password_in_a_url_is_sent_to_that_host_and_no_further(host):
    with ImageHost({"/a.png": IMAGE}) as other:
        host.files["/old.png"] = redirect(other.url_of("/a.png"))
        one = fetcher()
        assert get(one, host.url_of("/old.png").replace("//", "//me:p%40ss@")) == IMAGE
        basic = "Basic " + base64.b64encode(b"me:p@ss").decode()
        assert sent(host, "/old.png")["authorization"] == basic
        assert "authorization" not in sent(other)
        assert get(one, host.url_of("/a.png")) == IMAGE
    assert "authorization" not in sent(host)


# URLs

# A URL's end, and what is sent for it
REQUESTED = {
    "/a b.png": "/a%20b.png",
    "/größe/写真😀.png": "/gr%C3%B6%C3%9Fe/%E5%86%99%E7%9C%9F%F0%9F%98%80.png",
    "/a.png?w=1 0&n=ü#f": "/a.png?w=1%200&n=%C3%BC",
    "": "/",
    "/50%.png": "/50%25.png",
    "/x/../a/./b.png": "/a/b.png",
    "/s3?X-Amz-Signature=a%2Fb%3D": "/s3?X-Amz-Signature=a%2Fb%3D",
    "/a.png?w=1,2;x|y&from=https://h/b.png": "/a.png?w=1,2;x%7Cy&from=https://h/b.png",
    " /a.png\r\n".strip(" "): "/a.png",
}


def test_urls_are_prepared_as_requests_does(host):
    host.otherwise = IMAGE
    one = fetcher()
    for end in REQUESTED:
        assert get(one, host.url.upper() + end) == IMAGE
    assert [path for path, _ in host.requests] == list(REQUESTED.values())


NO_URLS = {
    "no full URL": [
        *("a.jpg", "products/a.jpg", "/products/a.jpg", "www.shop.example/a.jpg", "C:\\a.jpg"),
        *("localhost:3000/a.jpg", "//cdn.example/a.jpg", "img, front.jpg", "<img src=a>", '"x"'),
    ],
    "a list or JSON, not one URL": [
        *("a.jpg, b.jpg", "a.jpg|b.jpg", '["https://h/a.jpg"]', ' ["a.jpg", "b.jpg"]'),
        *("https://h/a.jpg, https://h/b.jpg", "https://h/a.jpg,https://h/b.jpg"),
        *("https://h/a.jpg https://h/b.jpg", "https://h/a.jpg\nhttps://h/b.jpg"),
        *("https://h/a.jpg;http://h/b.jpg", '{"url": "https://h/a.jpg"}', "{https://h/a.jpg}"),
    ],
    "only http, https and data URLs are fetched": [
        *("ftp://h/a.png", "file:///etc/hosts", "blob:http://h/1", "javascript:1", "s3://b/a")
    ],
    "not a valid URL": [
        *("http://", "https://", "http:///a.png", "http://[::1", "http://a b/", "http://h:port/"),
        *("http://h:99999/", "http://.example/", f"http://{'a' * 64}.example/", "http://?a"),
        *("http:a.png", "http://\x00/", "http://exa mple.com/a.png", "http://ü\u0080.example/"),
    ],
    NO_BASE64: [
        *("data:", "data:image/png;base64", "data:image/png;base64,A", "data:,x"),
        *("data:image/png,%89PNG", "data:image/png;base64,AAA-", "data:image/png;base64,AÄAA"),
    ],
}


@pytest.mark.parametrize("reason", NO_URLS)
def test_what_is_no_url_is_named(reason):
    found = {text: told(end_of(text)) for text in NO_URLS[reason]}
    assert found == dict.fromkeys(NO_URLS[reason], reason)


DATA = base64.b64encode(IMAGE).decode()
DATA_URLS = {
    "plain": f"data:image/png;base64,{DATA}",
    "in capitals": f"DATA:image/png;charset=x;BASE64,{DATA}",
    "with a blank": f"data:image/png; base64,{DATA}",
    "with a fragment": f"data:image/png;base64,{DATA}#part",
    "in lines": "data:;base64," + base64.encodebytes(IMAGE).decode(),
    "without padding": f"data:image/png;base64,{DATA}".rstrip("="),
}


@pytest.mark.parametrize("kind", DATA_URLS)
def test_a_data_url_holds_its_image(kind):
    assert end_of(DATA_URLS[kind]) == IMAGE


# The way to a host


def test_a_name_that_leads_nowhere_is_a_strain(names):
    names["away.example"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure")
    names["gone.example"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert told(end_of("http://away.example/a.png")) == "strain: no name server answered"
    assert told(end_of("http://gone.example/a.png")) == "strain: host not found"
    with pytest.raises(httpx.ConnectError) as caught:
        httpx.get("http://gone.example/")
    assert script.network_reason(caught.value) == "host not found"  # for the model's download


def test_a_refused_connection_is_a_strain():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # but it does not listen
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.png"
        assert told(end_of(url)) == "strain: connection refused"


class Silent(socket.socket):
    """A port where nobody answers: its queue of connections is full."""

    def __init__(self, address, port=0):
        super().__init__()
        self.bind((address, port))
        self.listen(0)
        self._waiting = []
        for _ in range(3):
            waiting = socket.socket()
            waiting.setblocking(False)
            waiting.connect_ex(self.getsockname())
            self._waiting.append(waiting)

    def close(self):
        for waiting in self._waiting:
            waiting.close()
        super().close()


@pytest.fixture
def tried(monkeypatch):
    """The addresses that were connected to, in their order."""
    tried, connect = [], script.create_connection

    def noted(place, *args, **options):
        tried.append(place[0])
        return connect(place, *args, **options)

    monkeypatch.setattr(script, "create_connection", noted)
    return tried


@LINUX
def test_a_dead_first_address_costs_a_moment_once(host, names, tried):
    host.files["/a.png"] = good(("Connection", "close"))
    names["shop.example"] = ["127.0.0.2", "127.0.0.1"]
    url = f"http://shop.example:{host.port}/a.png"
    one = fetcher()
    with Silent("127.0.0.2", host.port):
        started = time.monotonic()
        assert get(one, url, seconds=30.0) == IMAGE
        assert time.monotonic() - started < 12  # and not half of the 30 s
        for _ in range(3):
            assert get(one, url) == IMAGE
    assert tried == ["127.0.0.2"] + ["127.0.0.1"] * 4

    host.stop()
    with pytest.raises(Strain, match="connection refused"):
        get(one, url)
    host.start()
    assert get(one, url) == IMAGE
    assert tried[5:] == ["127.0.0.1", "127.0.0.2", "127.0.0.1"]  # then all are tried again


# TLS


def test_a_host_without_tls_is_named(host):
    url = host.url_of("/a.png").replace("http:", "https:")
    assert told(end_of(url)) == "TLS failed"


def test_a_certificate_that_is_not_valid_is_named(tls, tmp_path, monkeypatch):
    reason = "the host's certificate is not valid"
    assert told(end_of(tls.url_of("/a.png"))) == reason  # of an unknown issuer
    with TlsHost(tmp_path, {"/a.png": IMAGE}, days=-1) as expired:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(expired.authority))
        assert told(end_of(expired.url_of("/a.png"))) == reason


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_certificates_are_those_of_a_file_that_a_setting_names(tls, monkeypatch, name):
    monkeypatch.setenv(name, str(tls.authority))
    assert end_of(tls.url_of("/a.png")) == IMAGE


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_a_file_without_certificates_ends_the_run(tmp_path, monkeypatch, content):
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(RunError, match=f"{file} is no file of certificates"):
        end_of("https://shop.example/a.png")


@pytest.mark.parametrize(
    "cipher", ["ECDHE-RSA-AES128-SHA", "AES128-GCM-SHA256", "AES128-SHA", "AES256-SHA"]
)
def test_old_image_hosts_are_spoken_to_and_old_databases_are_not(tmp_path, monkeypatch, cipher):
    with TlsHost(tmp_path, {"/a.png": IMAGE}, cipher=cipher) as old:
        monkeypatch.setenv("SSL_CERT_FILE", str(old.authority))
        assert end_of(old.url_of("/a.png")) == IMAGE
        with pytest.raises(httpx.ConnectError, match="HANDSHAKE_FAILURE"):
            httpx.get(old.url, verify=script.tls_context())


def test_image_hosts_may_lack_renegotiation_info_and_key_identifiers(tls, monkeypatch):
    make = ssl.create_default_context

    def strict(**options):  # as Python 3.13 makes it
        context = make(**options)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.authority))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(tls.url, verify=script.tls_context())
    assert end_of(tls.url_of("/a.png")) == IMAGE
    legacy_server_connect = 0x4  # of OpenSSL; no server here can be made to lack it
    assert script.tls_as_browsers().options & legacy_server_connect
    assert not script.tls_context().options & legacy_server_connect


# The guard

PUBLIC_ADDRESSES = """
    8.8.8.8 1.1.1.1 93.184.216.34 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.167.0.1
    11.0.0.1 126.255.255.255 128.0.0.1 169.253.0.1 223.255.255.254 168.63.129.15
    2606:4700:4700::1111 2a00:1450:4001::1 ::ffff:8.8.8.8 2002:808:808::1 64:ff9b::808:808
    2606:4700::1%eth0
"""
PRIVATE_ADDRESSES = """
    127.0.0.1 127.1.2.3 127.255.255.255 0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 172.16.0.1
    172.31.255.255 192.168.0.1 169.254.0.1 169.254.169.254 169.254.170.2 100.64.0.1 100.100.100.200
    100.127.255.255 192.0.0.1 192.0.0.192 192.0.2.1 198.18.0.1 198.19.255.255 198.51.100.1
    203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 168.63.129.16
    :: ::1 fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd00:ec2::254 fd12:3456::1 ff02::1 ff0e::1
    2001:db8::1 100::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:a9fe:a9fe
    ::ffff:0.0.0.0 ::ffff:224.0.0.1 ::ffff:168.63.129.16 2002:7f00:1::1 2002:a00:1::1
    2002:a9fe:a9fe::1 2002:a83f:8110::1 64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b::a9fe:a9fe
    64:ff9b:1::a00:1 ::127.0.0.1 ::10.0.0.1 2001:0:7f00:1::1 ::ffff:0:127.0.0.1
    ::ffff:0:169.254.169.254 ::ffff:0:8.8.8.8
"""


def test_addresses_of_the_internet_are_public_and_all_others_are_not():
    addresses = PUBLIC_ADDRESSES.split() + PRIVATE_ADDRESSES.split()
    public = [address for address in addresses if script.Guard.is_public(address)]
    assert public == PUBLIC_ADDRESSES.split()


def guarded(url, origin=PROJECT):
    """What becomes of an image where private addresses are not allowed, as the tables write it."""
    return told(end_of(url, url=origin, private_hosts=False, seconds=2.0))


class Listener(socket.socket):
    """A port of an address that nobody should connect to."""

    def __init__(self, address="127.0.0.1", port=0):
        super().__init__()
        self.bind((address, port))
        self.listen()
        self.setblocking(False)

    @property
    def port(self):
        return self.getsockname()[1]

    def was_left_alone(self):
        with contextlib.suppress(BlockingIOError):
            self.accept()[0].close()
            return False
        return True


@pytest.fixture
def listener():
    with Listener() as listener:
        yield listener


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "name", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0"]
)
def test_a_private_address_is_never_connected_to(listener, scheme, name):
    end = guarded(f"{scheme}://{name}:{listener.port}/a.png")
    assert end.startswith("a private address (")
    assert listener.was_left_alone()


def test_a_name_that_leads_to_a_private_address_is_never_connected_to(listener, names):
    names["shop.example"] = ["127.0.0.1"]
    url = f"http://shop.example:{listener.port}/a.png"
    assert guarded(url) == "a private address (127.0.0.1)"
    assert listener.was_left_alone()


@LINUX
def test_of_a_names_addresses_only_the_public_ones_are_connected_to(host, names, monkeypatch):
    monkeypatch.setattr(
        script.Guard, "is_public", staticmethod(lambda address: address == "127.0.0.1")
    )
    names["shop.example"] = ["127.0.0.2", "127.0.0.1"]
    with Listener("127.0.0.2", host.port) as private:
        assert guarded(f"http://shop.example:{host.port}/a.png") == IMAGE
        assert private.was_left_alone()


def test_the_projects_own_origin_is_allowed_and_no_other_port_or_name_of_it(host, listener):
    assert guarded(host.url_of("/a.png"), origin=host.url) == IMAGE
    host.requests.clear()
    for url in (f"http://127.0.0.1:{listener.port}/a.png", f"http://localhost:{host.port}/a.png"):
        assert guarded(url, origin=host.url).startswith("a private address (")
    assert listener.was_left_alone()
    assert host.requests == []


def test_a_redirect_to_a_private_address_is_refused(host, listener):
    host.files["/old.png"] = redirect(f"http://127.0.0.1:{listener.port}/a.png")
    end = guarded(host.url_of("/old.png"), origin=host.url)
    assert end == "a private address (127.0.0.1)"
    assert listener.was_left_alone()


def test_without_urllib3s_hook_nothing_is_fetched(host, monkeypatch):
    monkeypatch.delattr(urllib3.connection.HTTPConnection, "_new_conn")
    with pytest.raises(RunError, match="another version of urllib3 is needed: run pip install"):
        end_of(host.url_of("/a.png"))
    assert host.requests == []


# Proxies


@pytest.fixture
def proxy(monkeypatch):
    """A proxy named in the environment. It answers for every host from its own files."""
    with ImageHost({"/a.png": IMAGE}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        yield proxy


def test_behind_a_proxy_public_hosts_are_asked_through_it(proxy):
    urls = ["http://shop.example/a.png", "http://8.8.8.8/a.png"]
    assert [guarded(url) for url in urls] == [IMAGE, IMAGE]
    assert [path for path, _ in proxy.requests] == urls


@pytest.mark.parametrize(
    "name",
    [
        *("127.0.0.1", "127.0.0.1:80", "10.0.0.1", "169.254.169.254", "192.168.1.1:8080", "[::1]"),
        *("[::ffff:127.0.0.1]", "[fd00::1]", "localhost", "LOCALHOST", "localhost.", "a.localhost"),
        *("127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0xa9fea9fe", "user@127.0.0.1"),
        *("127.0.0.1.", "10.0.0.1.:80", "%31%32%37.0.0.1"),
    ],
)
def test_behind_a_proxy_a_private_address_in_the_url_is_refused(proxy, name):
    proxy.files["/old.png"] = redirect(f"http://{name}/a.png")
    assert guarded(f"http://{name}/a.png").startswith("a private address (")
    assert proxy.requests == []
    assert guarded("http://shop.example/old.png").startswith("a private address (")
    assert [path for path, _ in proxy.requests] == ["http://shop.example/old.png"]


def test_behind_a_proxy_the_projects_own_origin_is_allowed(proxy):
    origin = "http://127.0.0.1:54321"
    assert guarded(f"{origin}/a.png", origin=origin) == IMAGE
    assert guarded("http://127.0.0.1:6379/a.png", origin=origin).startswith("a private address (")
    assert end_of("http://10.0.0.1/a.png") == IMAGE  # where all are allowed
    assert [path for path, _ in proxy.requests] == [f"{origin}/a.png", "http://10.0.0.1/a.png"]


def test_what_the_environment_excepts_from_the_proxy_is_guarded_directly(host, proxy, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert guarded(host.url_of("/a.png")) == "a private address (127.0.0.1)"
    assert host.requests == proxy.requests == []


def test_images_come_through_a_socks_proxy(host, monkeypatch):
    host.files["/long.png"] = good(*LONG_HEADERS)
    with Tunnel(Socks5, host.port) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5h://{proxy.place}")
        assert guarded("http://shop.example:8080/a.png") == IMAGE
        assert guarded("http://10.0.0.1/a.png") == "a private address (10.0.0.1)"
        assert proxy.asked == ["shop.example:8080"]
        assert guarded("http://shop.example/long.png") == "an answer with too many headers"


def test_images_come_through_the_tunnel_of_a_proxy(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.authority))
    tls.files["/long.png"] = good(*LONG_HEADERS)
    with Tunnel(Connect, tls.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@{proxy.place}")
        one = fetcher(url=PROJECT)
        for _ in range(2):
            assert get(one, "https://127.0.0.1:4433/a.png") == IMAGE
        with pytest.raises(ImageError, match="too many headers"):
            get(one, "https://127.0.0.1:4433/long.png")
    login = base64.b64encode(b"me:p@ss").decode()
    (place, headers), *others = proxy.asked
    assert place == "127.0.0.1:4433"
    assert login in headers[0]
    assert others == []
    assert "proxy-authorization" not in sent(tls)


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("socks://127.0.0.1:9", "ALL_PROXY: write socks5h:// for socks://"),
        ("socks4a://127.0.0.1:9", "ALL_PROXY: write socks5h:// for socks4a://"),
        ("socks5h://127.0.0.1:9", "ALL_PROXY is a SOCKS proxy: run pip install PySocks socksio"),
    ],
)
def test_a_socks_proxy_that_can_not_be_used_ends_the_run(monkeypatch, proxy, said):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(RunError, match=said):
        script.open_store(script.Settings(url=PROJECT, key="x"), script.Stop())


# Files


def test_a_file_is_read_or_named(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGE)
    assert end_of(tmp_path / "a.png") == IMAGE
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # and is not waited for
    for name in ("folder.jpg", "dangling.jpg", "loop.jpg", "pipe.jpg", "missing.jpg"):
        assert told(end_of(tmp_path / name)).startswith("can't be read ("), name
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(script.MAX_BYTES + 1)
    assert told(end_of(tmp_path / "large.png")) == TOO_LARGE
