"""Fetching: one attempt at an image, and what becomes of it.

- An image comes whole, or not at all; at most 50 MB, in little memory, over connections that stay
  open. A slow line is no fault, a byte a second is: it costs neither time nor a thread.
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

import answers
import httpx
import pytest
import urllib3
from answers import CHUNKED, NO_LENGTH, OK, cut, hang, hang_up, length, raw, redirect, status
from conftest import alone
from stack import ImageHost

import generate_embeddings as script
from generate_embeddings import Deadline, Fetcher, ImageError, RunError, Source, Strain

IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8  # any bytes do here
HANGS = 20  # seconds that no download here may take
PROJECT = "https://project.supabase.co"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


def fetcher(**changes):
    """A Fetcher for hosts on loopback."""
    return Fetcher(script.Settings(**{"private_hosts": True, **changes}))


def get(one, where, headers=None, seconds=8.0):
    """The bytes that a Fetcher gets."""
    return one.fetch(Source(where, headers or {}), Deadline(seconds)).data


def end_of(where, headers=None, seconds=8.0, one=None, **changes):
    """What becomes of an image: its bytes, or the ImageError."""
    one = one or fetcher(**changes)
    try:
        return ThreadPoolExecutor(1).submit(get, one, where, headers, seconds).result(HANGS)
    except ImageError as error:
        return error


def told(end):
    """An end as the tables write it: bytes, or a reason, with "strain: " where the host did not
    cope."""
    if isinstance(end, bytes):
        return end
    assert script.advice_on(str(end)), f"not in the table of reasons: {end}"
    return f"strain: {end}" if isinstance(end, Strain) else str(end)


def all_at_once(host, responses, seconds=8.0):
    """What becomes of each response, side by side as some are slow: name -> end."""
    paths = {name: f"/{number}" for number, name in enumerate(responses)}
    host.files |= {paths[name]: response for name, response in responses.items()}
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


@pytest.fixture
def host():
    with ImageHost({"/a.png": IMAGE}) as host:
        yield host


@pytest.fixture
def tls(tmp_path):
    with answers.TlsHost(tmp_path, {"/a.png": IMAGE}) as host:
        yield host


@pytest.fixture(autouse=True)
def no_network_settings(monkeypatch):
    """Nothing of the developer's own."""
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)


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


# What a response means

PACKED = gzip.compress(IMAGE)
GZIP = OK + b"Content-Encoding: gzip\r\n"
PAGE = b"<!DOCTYPE html><p>Not found</p>"
CODED = CHUNKED.replace(b"200 OK\r\n", b"200 OK\r\nContent-Encoding: gzip\r\n")
PLAIN_LENGTH = GZIP + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(IMAGE)
NO_TARGET = "a redirect that leads nowhere"
MANY_HEADERS = good(*[("X", "y" * 5000)] * 60)

# Ends, each with the responses that come to it
ENDS = {
    IMAGE: {
        "a wrong content type": good(("Content-Type", "text/html; charset=utf-8")),
        "203": status(203, body=IMAGE),
        "206, of a host that always says so": status(206, body=IMAGE),
        "300 headers": good(*((f"X-{n}", "y") for n in range(300))),
        "an encoding that nobody knows": good(("Content-Encoding", "utf-8")),
        "gzip in chunks": raw(CODED, chunk(PACKED), chunk(b""), end=hang_up),
        "gzip with the length of the plain file": raw(PLAIN_LENGTH, PACKED, end=hang_up),
        "deflate": packed(zlib.compress(IMAGE), "deflate"),
    },
    PAGE: {"a page, for the decoder to name": good(body=PAGE)},
    "strain: connection lost": {
        "a length that is too long": raw(length(5000), IMAGE, end=hang_up),
        "a reset in the body": raw(length(5000), IMAGE, end=cut),
        "a reset in the headers": raw(OK, end=cut),
        "nothing": raw(end=hang_up),
        "chunks without an end": raw(CHUNKED, chunk(b"hello"), end=hang_up),
        "a chunk of negative size": raw(CHUNKED, b"-5\r\nhello\r\n", chunk(b""), end=hang_up),
        "gzip that breaks off": raw(GZIP + b"Content-Length: 9999\r\n\r\n", PACKED[:-9], end=cut),
        "500 headers": raw(OK + b"X: y\r\n" * 500 + b"\r\n", end=hang_up),
        "long headers": MANY_HEADERS,
    },
    "a broken compression": {
        "gzip with a wrong checksum": packed(PACKED[:-8] + b"checksum"),
        "gzip without its end": packed(PACKED[:-9]),
    },
    "HTTP 302": {"a redirect without a target": status(302)},
}


def test_what_a_response_comes_to(host):
    expected = {name: end for end, responses in ENDS.items() for name in responses}
    ends = all_at_once(host, {n: r for responses in ENDS.values() for n, r in responses.items()})
    assert {name: told(end) for name, end in ends.items()} == expected
    assert set(host.asked().values()) == {1}  # whether to ask again is the run's to say


OWN = [202, 204, 205, 226, 300, 304, 400, 401, 402, 403, 404, 405, 406, 407, 409, 410, 413, 414]
OWN += [415, 418, 421, 423, 424, 426, 428, 431, 451, 499]
STRAINED = [408, 420, 425, 429, 430, 500, 501, 502, 503, 504, 520, 521, 530, 599]
# What Supabase's Storage names in an answer of status 400
STORAGE = {"404": "HTTP 404", "403": "HTTP 403", "503": "strain: HTTP 503"}
STORAGE |= {"500": "strain: HTTP 500", "200": "HTTP 400", "InvalidKey": "HTTP 400"}
STORAGE |= {"Bucket not found": "a private bucket, or none of that name"}


def refused_by_storage(name):
    code = "404" if " " in name else name
    body = {"statusCode": int(code) if code == "500" else code, "message": name}
    return status(400, body=json.dumps(body).encode())


def test_a_status_is_about_the_image_or_its_host(host):
    expected = {code: f"HTTP {code}" for code in OWN} | STORAGE
    expected |= {code: f"strain: HTTP {code}" for code in STRAINED}
    responses = {code: status(code, body=PAGE) for code in OWN + STRAINED}
    ends = all_at_once(host, responses | {name: refused_by_storage(name) for name in STORAGE})
    assert {code: told(end) for code, end in ends.items()} == expected


def in_seconds(seconds):
    """A moment as HTTP writes it."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


# Retry-After, and the seconds of rest that it means, at least and at most
RESTS = {"21": (21, 21), "3600": (3600, 3600), in_seconds(90_000): (70_000, 90_000)}
RESTS |= dict.fromkeys(["999999999999", "Fri, 31 Dec 9999 23:59:59 -1100"], (366 * 86_400,) * 2)
NO_RESTS = ["Mon, 01 Jan 2001 00:00:00 GMT", "soon", "-5", "", "nan", "²", "Mon, 99 GMT"]
RESTS |= dict.fromkeys([*NO_RESTS, "9" * 5000, "1 Jan 0 0:0:0 +9999999"], (0, 0))


def test_retry_after_says_for_how_long_the_host_rests(host):
    ends = all_at_once(host, {text: status(429, ("Retry-After", text)) for text in RESTS})
    for text, (least, most) in RESTS.items():
        assert told(ends[text]) == "strain: HTTP 429", text
        assert least <= ends[text].rest <= most, text
        assert script.clock(ends[text].rest), text  # as the log says it


def test_what_follows_a_response_is_no_other_images_response(host):
    """Neither what comes late, after a status without a body, nor what is over a length."""
    late = threading.Event()

    def without_body(code, handler):
        handler.wfile.write(b"HTTP/1.1 %d x\r\nLink: </a.css>\r\n\r\n" % code)
        late.wait(HANGS)
        with contextlib.suppress(OSError):
            handler.wfile.write(length(5) + b"later")

    for code in (103, 204, 304):
        host.files[f"/{code}"] = partial(without_body, code)
    host.files["/short.png"] = lambda handler: handler.wfile.write(length(100) + IMAGE)
    one = fetcher()
    for code in (103, 204, 304):
        with pytest.raises(ImageError, match=f"HTTP {code}"):
            get(one, host.url_of(f"/{code}"))
    late.set()
    for _ in range(3):
        assert get(one, host.url_of("/a.png")) == IMAGE
        assert get(one, host.url_of("/short.png")) == IMAGE[:100]


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
GZIP_START = PACKED[:10]
IN_CHUNKS = CHUNKED + chunk(IMAGE) + b"0\r\n"  # all but the end
SLOW = {
    (LATE,): {
        "a byte of the body now and then": raw(length(10**6), b"x", pause=0.2),
        "a byte now and then, in chunks": raw(CHUNKED, chunk(b"x"), pause=0.2),
        "gzip without content": raw(GZIP + b"\r\n", GZIP_START, b"\0\0\0\xff\xff", pause=0.01),
        "silence in the body": raw(length(10**6), b"x" * 99, end=hang),
        "a header now and then behind the body": raw(IN_CHUNKS, b"X: y\r\n", pause=0.2),
    },
    (NO_ANSWER,): {"silence in the headers": raw(OK, end=hang)},
    (LATE, NO_ANSWER): {
        "a byte of the headers now and then": raw(OK, b"x", pause=0.2),
        "redirects": lambda handler: (time.sleep(0.5), redirect("?again")(handler)),
    },
    ("HTTP 404",): {
        "a byte of a page now and then": raw(b"HTTP/1.1 404 x\r\n\r\n", b"x", pause=0.2)
    },
}


def test_a_slow_host_is_left_at_the_deadline(host):
    responses = {name: response for kind in SLOW.values() for name, response in kind.items()}
    ends = all_at_once(host, responses, seconds=2.0)
    for expected, kind in SLOW.items():
        for name in kind:
            assert told(ends[name]) in expected, name
            # Where a first byte came, the line may be slow, too.
            assert (getattr(ends[name], "first_byte", None) is not None) == (expected == (LATE,))


def test_a_slow_line_is_no_fault(host):
    """A deadline grows by a second for each 50 KB."""
    host.files["/a.png"] = good(body=bytes(1_000_000))
    deadline = Deadline(8.0)
    download = fetcher().fetch(Source(host.url_of("/a.png"), {}), deadline)
    assert 8.0 < deadline.left() <= 28.0
    assert 0 < download.body_seconds <= download.seconds
    deadline = Deadline(-2.0)
    assert deadline.overdue
    with pytest.raises(Strain, match=r"not complete in time \(-2 s\)"):
        deadline.left()


TOO_LARGE = "a file that is too large"
ENDLESS = {
    "no length": raw(NO_LENGTH, bytes(2**16)),
    "a byte too many": good(body=bytes(2**20 + 1)),
    "a byte too many, packed": packed(gzip.compress(bytes(2**20 + 1))),
}


def test_a_body_of_the_cap_is_taken_and_a_larger_one_is_not(host, monkeypatch):
    monkeypatch.setattr(script, "MAX_BYTES", 2**20)
    whole = bytes(2**20)
    responses = {"plain": good(body=whole), "packed": packed(gzip.compress(whole))}
    ends = all_at_once(host, responses | ENDLESS)
    expected = dict.fromkeys(responses, whole) | dict.fromkeys(ENDLESS, TOO_LARGE)
    assert {name: told(end) for name, end in ends.items()} == expected


# Fetches each three times at once; prints the reasons, and the megabytes that all took so far
THRICE = """
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
ends = []
for url in sys.argv[2:]:
    hostile = url.replace("PERCENT", "%" * 2**23)
    with ThreadPoolExecutor(3) as pool:
        ends.append([*pool.map(end_of, [hostile] * 3), peak() - before])
print(json.dumps(ends))
"""


LONG_LINE = b"X: " + b"y" * 65_000 + b"\r\n"
HINT = b"HTTP/1.1 100 Continue\r\n" + LONG_LINE + b"\r\n"
NO_END = f"{NO_TARGET} (more than 5)"
NO_BASE64 = "a data: URL that is broken, or not in base64"
HOSTILE = {
    "/headers-of-26-MB": (raw(OK, LONG_LINE * 399, end=hang_up), "connection lost"),
    "/headers-without-end-behind-a-body": (raw(IN_CHUNKS, b"X: y\r\n" * 999), "connection lost"),
    "/hints-of-26-MB": (raw(HINT * 399, end=hang_up), "connection lost"),
    "data:,PERCENT": (None, NO_BASE64),
    "data:;base64,PERCENT": (None, NO_BASE64),
    "http://h/PERCENT": (None, "not a valid URL (longer than 65,536 characters)"),
    "/bomb": (None, TOO_LARGE),
}


def test_what_is_hostile_takes_little_memory(host):
    host.files |= {path: response for path, (response, _) in HOSTILE.items()}
    host.files["/bomb"] = packed(gzip.compress(bytes(2**27)))  # 128 MB in 130 KB
    urls = [host.url_of(name) if name[0] == "/" else name for name in HOSTILE]
    ends = alone(THRICE, host.url_of("/a.png"), *urls)
    for (name, (_, reason)), (*reasons, megabytes) in zip(HOSTILE.items(), ends, strict=True):
        assert reasons == [reason] * 3, name
        assert megabytes < 270, name  # the bomb takes 60 for each


# Redirects


def test_five_redirects_are_followed_without_their_bodies_and_six_are_not(host):
    for n, code in enumerate((301, 302, 303, 307, 308)):
        head = b"HTTP/1.1 %d x\r\nLocation: /%d\r\n\r\n" % (code, n + 1)
        host.files[f"/{n}"] = raw(head, bytes(2**16), end=hang if n % 2 else None)
    host.files["/5"] = IMAGE
    assert end_of(host.url_of("/0")) == IMAGE
    host.files["/5"] = redirect("/a.png")
    assert told(end_of(host.url_of("/0"))) == NO_END
    assert host.asked()["/a.png"] == 0


TARGETS = ["../a.png", "./x/../../a.png", "/a.png?w=1", "//HOST/a.png", "HTTP://HOST/a.png"]
TARGETS += ["/%61.png", " /a.png ", "/a.png#x"]
TARGETS += ["/é a.png".encode().decode("latin-1")]  # raw UTF-8, as careless hosts send it
NOWHERE = ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "gopher://127.0.0.1/", "data:,x"]
NOWHERE += ["http://[::1", "http://a b/", "http://h:99999/", "http://.example/a.png"]


def test_a_redirect_may_be_relative_or_careless_but_leads_to_http_and_https_only(host):
    one = fetcher()
    host.files["/é a.png"] = IMAGE
    for target in TARGETS + NOWHERE:
        location = target.replace("HOST", host.url.removeprefix("http://"))
        host.files["/dir/old.png"] = redirect(location)
        expected = NO_TARGET if target in NOWHERE else IMAGE
        assert told(end_of(host.url_of("/dir/old.png"), one=one)) == expected, target


def wants_cookie(target):
    """Answers with the image, once the cookie that it sets comes back with a request."""

    def answer(handler):
        if "seen=a=b" in handler.headers.get("Cookie", ""):
            good()(handler)
        else:
            cookie = ("Set-Cookie", "seen=a=b; Path=/; Max-Age=60; HttpOnly")
            status(307, cookie, ("Set-Cookie", "lang=en"), ("Location", target))(handler)

    return answer


def test_a_cookie_lives_within_one_images_redirects_and_goes_to_no_other_host(host):
    one = fetcher()
    with ImageHost({"/hop": redirect(host.url_of("/a.png"))}) as other:
        elsewhere = other.url_of("/hop").replace("127.0.0.1", "localhost")
        for target in ("/a.png", elsewhere):
            host.files["/a.png"] = wants_cookie(target)
            assert get(one, host.url_of("/a.png")) == IMAGE
        assert "cookie" not in sent(other, "/hop")
    cookies = [headers.get("Cookie") for _, headers in host.requests]
    assert cookies == [None, "seen=a=b; lang=en"] * 2


# What is sent, and to whom

KEY = {"apikey": "sb_secret_x", "Authorization": "Bearer sb_secret_x"}
BASIC = "Basic " + base64.b64encode(b"me:p@ss").decode()


def test_the_agent_is_honest_and_asks_for_no_format_that_is_made_on_demand(host):
    end_of(host.url_of("/a.png"))
    headers = sent(host)
    agent = headers["user-agent"].lower()
    assert agent.startswith("generate-embeddings/")
    assert not any(name in agent for name in ("mozilla", "python", "openai", "bot"))
    assert "*/*" in headers["accept"]
    assert not any(name in headers["accept"] for name in ("webp", "avif"))
    assert headers["accept-encoding"] == "identity"


def test_keys_and_passwords_go_along_no_redirect_and_with_no_other_image(
    host, monkeypatch, tmp_path
):
    netrc = tmp_path / ".netrc"
    netrc.write_text("default login me password x\n")  # which nobody wrote for shops
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    host.files["/here"] = redirect("/a.png")
    one = fetcher()
    with ImageHost({"/a.png": IMAGE}) as other:
        host.files["/away"] = redirect(other.url_of("/a.png"))
        for path, target in (("/here", host), ("/away", other)):
            assert get(one, host.url_of(path), KEY) == IMAGE
            assert sent(host, path).items() >= {(n.lower(), value) for n, value in KEY.items()}
            assert sent(target).keys().isdisjoint(("apikey", "authorization"))
        assert get(one, host.url_of("/away").replace("//", "//me:p%40ss@")) == IMAGE
        assert sent(host, "/away")["authorization"] == BASIC
        assert "authorization" not in sent(other)
    get(one, host.url_of("/a.png"), KEY)
    get(one, host.url_of("/a.png"))
    assert sent(host).keys().isdisjoint(("apikey", "authorization"))


# URLs

# A URL's end, and what is sent for it
REQUESTED = {
    "/a b.png": "/a%20b.png",
    "/größe/写真😀.png": "/gr%C3%B6%C3%9Fe/%E5%86%99%E7%9C%9F%F0%9F%98%80.png",
    "/s3?X-Amz-Signature=a%2Fb%3D&n=ü#f": "/s3?X-Amz-Signature=a%2Fb%3D&n=%C3%BC",
}


def test_urls_are_prepared_as_requests_does(host):
    host.otherwise = IMAGE
    one = fetcher()
    for end in REQUESTED:
        assert get(one, host.url.upper() + end) == IMAGE
    assert [path for path, _ in host.requests] == list(REQUESTED.values())


NO_URLS = {
    "no full URL": [
        *("a.jpg", "/products/a.jpg", "www.shop.example/a.jpg", "C:\\a.jpg"),
        *("localhost:3000/a.jpg", "//cdn.example/a.jpg", "img, front.jpg", "<img src=a>"),
    ],
    "a list or JSON, not one URL": [
        *("a.jpg, b.jpg", "a.jpg|b.jpg", ' ["https://h/a.jpg"]', '{"url": "https://h/a.jpg"}'),
        *("https://h/a.jpg, https://h/b.jpg", "https://h/a.jpg\nhttps://h/b.jpg"),
        *("https://h/a.jpg;http://h/b.jpg", "https://h/a.jpg|https://h/b.jpg"),
    ],
    "only http, https and data URLs are fetched": [
        *("ftp://h/a.png", "file:///etc/hosts", "blob:http://h/1", "javascript:1")
    ],
    "not a valid URL": [
        *("http://", "http:///a.png", "http://[::1", "http://a b/", "http://h:99999/", "http:a"),
        *("http://.example/", f"http://{'a' * 64}.example/", "http://ü\u0080.example/"),
    ],
    NO_BASE64: [
        *("data:", "data:image/png;base64,A", "data:,x"),
        *("data:image/png;base64,AAA-", "data:image/png;base64,AÄAA"),
    ],
}
DATA = base64.b64encode(IMAGE).decode()
DATA_URLS = [
    f"DATA:image/png;charset=x;BASE64,{DATA}",
    f"data:image/png; base64,{DATA}#part",
    "data:;base64," + base64.encodebytes(IMAGE).decode(),
]


def test_what_is_no_url_is_named_and_a_data_url_holds_its_image():
    expected = {text: reason for reason, texts in NO_URLS.items() for text in texts}
    expected |= dict.fromkeys(DATA_URLS, IMAGE)
    one = fetcher()
    assert {text: told(end_of(text, one=one)) for text in expected} == expected


# The way to a host


def test_a_host_that_can_not_be_reached_is_a_strain(names):
    names["away.example"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure")
    names["gone.example"] = socket.gaierror(socket.EAI_NONAME, "Name not known")
    assert told(end_of("http://away.example/a.png")) == "strain: no name server answered"
    assert told(end_of("http://gone.example/a.png")) == "strain: host not found"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # but it does not listen
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.png"
        assert told(end_of(url)) == "strain: connection refused"


def test_a_dead_first_address_costs_a_moment_once(host, names, monkeypatch):
    tried, connect = [], socket.create_connection

    def note(address, seconds):
        tried.append((address[0], seconds))
        if address[0] == "127.0.0.2":
            raise TimeoutError
        return connect(address, seconds)

    monkeypatch.setattr(socket, "create_connection", note)
    host.files["/a.png"] = good(("Connection", "close"))
    names["shop.example"] = ["127.0.0.2", "127.0.0.1"]
    url = f"http://shop.example:{host.port}/a.png"
    one = fetcher()
    for _ in range(4):
        assert get(one, url) == IMAGE
    assert [address for address, _ in tried] == ["127.0.0.2"] + ["127.0.0.1"] * 4
    assert tried[0][1] == script.DEAD_SECONDS
    assert tried[1][1] > script.DEAD_SECONDS  # the last address has all the time that is left

    host.stop()
    assert isinstance(end_of(url, one=one), Strain)
    host.start()
    assert get(one, url) == IMAGE  # then all are tried again


# TLS


def test_a_certificate_that_is_not_valid_is_named(host, tls, tmp_path, monkeypatch):
    assert told(end_of(host.url_of("/a.png").replace("http:", "https:"))) == "TLS failed"
    broken_off = script.network_error(ssl.SSLEOFError())
    assert told(broken_off) == "strain: connection lost"
    reason = "the host's certificate is not valid"
    assert told(end_of(tls.url_of("/a.png"))) == reason  # of an unknown issuer
    with answers.TlsHost(tmp_path, {"/a.png": IMAGE}, days=-1) as expired:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(expired.authority))
        assert told(end_of(expired.url_of("/a.png"))) == reason


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_certificates_are_those_of_a_file_that_a_setting_names(tls, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, str(tls.authority))
    assert end_of(tls.url_of("/a.png")) == IMAGE
    for content in (None, "", "no certificate"):
        file = tmp_path / f"{content}.pem"
        monkeypatch.setenv(name, str(file))
        if content is not None:
            file.write_text(content)
        with pytest.raises(RunError, match=f"{file} is no file of certificates"):
            end_of("https://shop.example/a.png")


@pytest.mark.parametrize("cipher", ["ECDHE-RSA-AES128-SHA", "AES128-GCM-SHA256", "AES128-SHA"])
def test_old_image_hosts_are_spoken_to_and_old_databases_are_not(tmp_path, monkeypatch, cipher):
    with answers.TlsHost(tmp_path, {"/a.png": IMAGE}, cipher=cipher) as old:
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
    legacy = 0x4  # OP_LEGACY_SERVER_CONNECT; no server here can be made to lack the other
    assert script.tls_as_browsers().options & ~script.tls_context().options & legacy


# The guard

PUBLIC_ADDRESSES = """
    8.8.8.8 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 126.255.255.255 128.0.0.1
    223.255.255.254 168.63.129.15 192.0.1.1 2606:4700:4700::1111 2606:4700::1%eth0
    ::ffff:8.8.8.8 2002:808:808::1 64:ff9b::808:808
"""
PRIVATE_ADDRESSES = """
    127.0.0.1 127.255.255.255 0.0.0.0 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1
    169.254.169.254 100.64.0.1 100.127.255.255 192.0.0.192 192.0.2.1 198.18.0.1
    224.0.0.1 239.255.255.250 255.255.255.255 168.63.129.16
    :: ::1 fe80::1%eth0 fec0::1 fd00:ec2::254 ff02::1 ff0e::1 2001:db8::1 100::1
    ::ffff:127.0.0.1 ::ffff:a9fe:a9fe ::ffff:224.0.0.1 ::ffff:168.63.129.16 2002:7f00:1::1
    2002:a83f:8110::1 64:ff9b::7f00:1 64:ff9b:1::a00:1 ::10.0.0.1 2001:0:7f00:1::1
    ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8
"""


def test_addresses_of_the_internet_are_public_and_all_others_are_not():
    addresses = PUBLIC_ADDRESSES.split() + PRIVATE_ADDRESSES.split()
    public = [address for address in addresses if script.Guard.is_public(address)]
    assert public == PUBLIC_ADDRESSES.split()


def guarded(url, origin=PROJECT):
    """What becomes of an image where private addresses are not allowed, as the tables write it."""
    return told(end_of(url, seconds=2.0, url=origin, private_hosts=False))


PRIVATE = "a private address (127.0.0.1)"
LOCAL = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0.0.0.0"]


def test_a_private_address_is_never_connected_to(host, names):
    names["shop.example"] = ["127.0.0.1"]
    urls = [f"http://{name}:{host.port}/a.png" for name in [*LOCAL, "shop.example"]]
    urls += [url.replace("http:", "https:") for url in urls]
    ends = {url: guarded(url) for url in urls}
    assert all(end.startswith("a private address (") for end in ends.values())
    assert ends[f"http://shop.example:{host.port}/a.png"] == PRIVATE
    assert host.connections == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' loopback differs")
def test_of_a_names_addresses_only_the_public_ones_are_connected_to(host, names, monkeypatch):
    public = staticmethod(lambda address: address == "127.0.0.1")
    monkeypatch.setattr(script.Guard, "is_public", public)
    names["shop.example"] = ["127.0.0.2", "127.0.0.1"]
    with ImageHost(address="127.0.0.2", port=host.port) as private:
        assert guarded(f"http://shop.example:{host.port}/a.png") == IMAGE
        assert private.connections == 0


def test_the_projects_own_origin_is_allowed_and_no_other_port_or_name_of_it(host):
    with ImageHost() as other:
        host.files["/old.png"] = redirect(other.url_of("/a.png"))
        assert guarded(host.url_of("/a.png"), host.url) == IMAGE
        assert guarded(host.url_of("/old.png"), host.url) == PRIVATE
        assert guarded(other.url_of("/a.png"), host.url) == PRIVATE
        assert guarded(f"http://localhost:{host.port}/a.png", host.url) == PRIVATE
        assert (host.connections, other.connections) == (2, 0)


def test_without_urllib3s_hook_nothing_is_fetched(host, monkeypatch):
    monkeypatch.delattr(urllib3.connection.HTTPConnection, "_new_conn")
    with pytest.raises(RunError, match="another version of urllib3 is needed: run pip install"):
        end_of(host.url_of("/a.png"))
    assert host.requests == []


# Proxies


@pytest.fixture
def proxy(monkeypatch):
    """A proxy named in the environment, which answers for every host."""
    with ImageHost({"/a.png": IMAGE}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        yield proxy


PRIVATE_NAMES = [
    *("127.0.0.1", "192.168.1.1:8080", "[::1]", "LOCALHOST", "localhost.", "a.localhost"),
    *("2130706433", "0xa9fea9fe", "user@127.0.0.1", "10.0.0.1.:80", "%31%32%37.0.0.1"),
]


def test_behind_a_proxy_public_hosts_are_asked_through_it_and_private_ones_are_refused(proxy):
    proxy.files["/old.png"] = redirect("http://127.1/a.png")
    public = ["http://shop.example/a.png", "http://8.8.8.8/a.png"]
    private = [f"http://{name}/a.png" for name in PRIVATE_NAMES] + ["http://shop.example/old.png"]
    ends = {url: guarded(url) for url in public + private}
    assert [url for url in ends if ends[url] == IMAGE] == public
    assert [url for url in ends if str(ends[url]).startswith("a private address (")] == private
    assert list(proxy.asked()) == [*public, "http://shop.example/old.png"]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_behind_a_proxy_the_projects_own_origin_is_allowed(host, proxy, monkeypatch, name):
    origin = f"http://{name}:54321"
    assert guarded(f"{origin}/a.png", origin) == IMAGE
    assert guarded(f"http://{name}:6379/a.png", origin) == PRIVATE
    assert end_of("http://10.0.0.1/a.png") == IMAGE  # where all are allowed
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # is guarded directly
    assert guarded(host.url_of("/a.png")) == PRIVATE
    assert [path for path, _ in proxy.requests] == [f"{origin}/a.png", "http://10.0.0.1/a.png"]


def test_images_come_through_the_tunnel_of_a_proxy(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.authority))
    url = "https://127.0.0.1:4433/a.png"
    with answers.Tunnel(tls.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@{proxy.address}")
        one = fetcher(url=PROJECT)
        for _ in range(2):
            assert get(one, url) == IMAGE
        assert guarded("https://10.0.0.1/a.png") == "a private address (10.0.0.1)"
        ((target, login),) = proxy.asked
        proxy.greeting = b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 99_999
        assert told(end_of(url)) == "strain: connection lost"
    assert target == "127.0.0.1:4433"
    assert login == BASIC
    assert "proxy-authorization" not in sent(tls)


def test_images_come_through_a_socks_proxy(host, monkeypatch):
    with answers.Tunnel(host.port, socks=True) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5h://{proxy.address}")
        assert guarded("http://shop.example:8080/a.png") == IMAGE
        assert proxy.asked == [("shop.example", 8080)]


@pytest.mark.parametrize("scheme", ["socks", "socks4a", "socks5h"])
def test_a_socks_proxy_that_can_not_be_used_ends_the_run(monkeypatch, scheme):
    if scheme == "socks5h":
        monkeypatch.setattr(script, "find_spec", lambda name: name != "socksio")
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:9")
    with pytest.raises(RunError, match="ALL_PROXY is a SOCKS proxy: write socks5h://"):
        script.open_store(script.Settings(url=PROJECT, key="x"), script.Stop())


# Files


def test_a_file_is_read_or_named(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGE)
    assert end_of(tmp_path / "a.png") == IMAGE
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # and is not waited for
    for name in ("folder.jpg", "loop.jpg", "pipe.jpg", "missing.jpg"):
        assert told(end_of(tmp_path / name)).startswith("can't be read ("), name
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(script.MAX_BYTES + 1)
    assert told(end_of(tmp_path / "large.png")) == TOO_LARGE
