"""Fetching: every way in which a host, a URL or a file can disappoint ends in a named failure,
in time, and what must stay secret goes nowhere else.
"""

import base64
import contextlib
import gzip
import http.client
import ipaddress
import itertools
import json
import os
import queue
import socket
import socketserver
import ssl
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
import requests
import urllib3
from answers import (
    CHUNKED,
    NO_LENGTH,
    OK,
    cut,
    hang,
    hang_up,
    in_turn,
    length,
    raw,
    redirect,
    status,
)
from conftest import alone
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from stack import ImageHost

import generate_embeddings
from generate_embeddings import (
    HEAVY_BYTES,
    HEAVY_FILES,
    MAX_BYTES,
    Fetcher,
    Guard,
    NotNow,
    Place,
    Rejected,
    RunError,
    Settings,
    network_reason,
    parse_url,
)

IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8  # any bytes do here
HANGS = 20  # seconds that no download here may take, though the host would go on for ever
ONCE = 1
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems' loopback differs")


def fetcher(**changes):
    """A Fetcher for loopback hosts, with a short deadline."""
    return Fetcher(Settings(**{"private_hosts": True, "fetch_seconds": 8.0, **changes}))


def get(one, place, headers=None):
    """What a Fetcher gets."""
    return one.fetch(Place(place, headers or {}))


def attempt(place, headers=None, **changes):
    """(bytes, None) or (None, Rejected or NotNow). A download that hangs fails this test alone."""
    found = [None, AssertionError(f"still waiting after {HANGS} s")]

    def work():
        try:
            found[:] = get(fetcher(**changes), place, headers), None
        except Exception as error:
            found[:] = None, error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(HANGS)
    data, error = found
    if error is not None and not isinstance(error, Rejected | NotNow):
        raise error
    return data, error


def fetched(host, path="/a.png", headers=None, **changes):
    data, error = attempt(host.url_of(path), headers, **changes)
    assert error is None
    return data


def failure_of(place, headers=None, **changes):
    """The refusal of a URL or path."""
    data, error = attempt(place, headers, **changes)
    assert data is None
    return error


def all_at_once(host, answers, **changes):
    """Downloads from a path for each answer, side by side as they take their time:
    name -> (bytes or None, Rejected or NotNow or None, how often it was asked for)."""
    names = {f"/{n}": name for n, name in enumerate(answers)}
    host.files |= {path: answers[name] for path, name in names.items()}
    with ThreadPoolExecutor(len(names)) as pool:
        found = pool.map(lambda path: attempt(host.url_of(path), **changes), names)
        ends = dict(zip(names, found, strict=True))
    asked = Counter(path.split("?")[0] for path, _ in host.requests)
    return {name: (*ends[path], asked[path]) for path, name in names.items()}


def for_good(error):
    return not isinstance(error, NotNow)


def verdict(error):
    return str(error), for_good(error)


@pytest.fixture
def host():
    """A host with one image."""
    with ImageHost({"/a.png": IMAGE}) as host:
        yield host


@pytest.fixture(autouse=True)
def no_network_settings(monkeypatch):
    """Nothing of the developer's own."""
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def good(*headers, body=IMAGE):
    return status(200, *headers, body=body)


class TlsHost(ImageHost):
    """An ImageHost that speaks TLS with a certificate of its own, a file in `folder`."""

    def __init__(self, folder, days=1):
        super().__init__({"/a.png": IMAGE})
        self.certificate, self.days = folder / "certificate.pem", days

    def start(self):
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "host")])
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        made = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=9))
            .not_valid_after(now + timedelta(days=self.days))
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .sign(key, hashes.SHA256())
        )
        form, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(form, pkcs8, serialization.NoEncryption())
        self.certificate.write_bytes(secret + made.public_bytes(form))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        super().start()
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        return self

    @property
    def url(self):
        return super().url.replace("http:", "https:")


@pytest.fixture
def tls(tmp_path):
    """A host with one image that speaks TLS."""
    with TlsHost(tmp_path) as host:
        yield host


# --------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------

SLOW = {
    "a byte of the body now and then": raw(length(10**6), b"x", pause=0.2),
    "a byte now and then, length unknown": raw(NO_LENGTH, b"x", pause=0.2),
    "a byte now and then, in chunks": raw(CHUNKED, b"1\r\nx\r\n", pause=0.2),
    "silence": raw(end=hang),
    "silence in the headers": raw(OK, end=hang),
    "silence in the body": raw(length(10**6), b"x" * 99, end=hang),
    "a redirect with a slow body to a slow body": in_turn(
        raw(b"HTTP/1.1 302 Found\r\nLocation: ?b\r\nConnection: close\r\n\r\n", b"x", pause=0.05),
        raw(NO_LENGTH, b"x", pause=0.05),
    ),
    "a redirect that takes its time": lambda handler: (
        time.sleep(0.4),
        redirect("?again")(handler),
    ),
}


def test_a_slow_host_is_left_at_the_deadline(host):
    started = time.monotonic()
    ends = all_at_once(host, SLOW, fetch_seconds=1.0)
    assert time.monotonic() - started < 10
    assert not any(for_good(error) for _, error, _ in ends.values())


def test_the_deadline_is_for_all_attempts_together(host):
    host.files["/a.png"] = status(500)
    started = time.monotonic()
    assert verdict(failure_of(host.url_of("/a.png"), fetch_seconds=1.0))[1] is False
    assert time.monotonic() - started < 10
    assert len(host.requests) < 4


def test_what_came_before_the_deadline_is_never_taken_for_the_whole(host):
    host.files["/a.png"] = raw(NO_LENGTH + IMAGE, b"", end=hang)
    assert not for_good(failure_of(host.url_of("/a.png"), fetch_seconds=1.0))


def test_the_failure_names_the_deadline(host):
    host.files["/a.png"] = SLOW["a byte now and then, length unknown"]
    error = failure_of(host.url_of("/a.png"), fetch_seconds=1.0)
    assert verdict(error) == ("not complete within 1 s", False)


# What no deadline of a single download covers: the loop gives these up
DRIPS = {
    "headers": raw(OK, b"X-More: to come\r\n", pause=0.05),
    "letters": raw(OK + b"X-More: ", b"a", pause=0.05),
    "promises": raw(b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.05),
    "redirect": raw(b"HTTP/1.1 302 Found\r\nLocation: ?b\r\n", b"X-More: yes\r\n", pause=0.05),
    "body": raw(NO_LENGTH, b"x", pause=0.05),
}


def test_hosts_that_drip_among_good_images_cost_no_more_than_their_own(stack, cli, tls, photos):
    drips = {f"/{name}": answer for name, answer in DRIPS.items()}
    good = {f"/{name}": data for name, data in photos.items()}
    with ImageHost(drips) as plain, ImageHost(good) as host:
        tls.files = drips
        urls = [slow.url_of(path) for slow in (plain, tls) for path in drips]
        urls += [host.url_of(path) for path in good]
        stack.add_images(urls)  # the slow ones come first
        env = {"FETCH_SECONDS": "2", "REQUESTS_CA_BUNDLE": tls.certificate}
        run = cli("--workers", "4", **env)
    assert run.counts["embedded"] == len(good)
    assert run.counts["failed"] == 2 * len(drips)
    assert run.code == 1
    assert "10  fetch: not complete within 2 s" in run.out
    assert run.seconds < 60  # the hosts would go on for ever


def test_after_a_deadline_the_next_download_from_that_host_is_well(host):
    host.files["/slow.png"] = raw(length(10**6), b"x", pause=0.2)
    one = fetcher(fetch_seconds=1.0)
    for _ in range(2):
        with pytest.raises(NotNow):
            get(one, host.url_of("/slow.png"))
        assert get(one, host.url_of("/a.png")) == IMAGE


# --------------------------------------------------------------------------------------------------
# Size
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head", [NO_LENGTH, length(10**12), CHUNKED], ids=["no length", "a length", "chunks"]
)
def test_an_endless_body_is_left_at_the_byte_cap(host, head):
    piece = b"x" * 2**16
    host.files["/a.png"] = raw(head, b"10000\r\n" + piece + b"\r\n" if head is CHUNKED else piece)
    error = failure_of(host.url_of("/a.png"), fetch_seconds=15.0)
    assert verdict(error) == (f"larger than {MAX_BYTES // 2**20} MB", True)
    assert len(host.requests) == ONCE


@pytest.mark.parametrize("head", [NO_LENGTH, length(1000)], ids=["no length", "a length"])
def test_a_body_of_exactly_the_cap_is_taken_and_one_byte_more_is_not(host, head, monkeypatch):
    host.files["/a.png"] = raw(head, b"x" * 1000, end=hang_up)
    monkeypatch.setattr(generate_embeddings, "MAX_BYTES", 1000)
    assert fetched(host) == b"x" * 1000
    monkeypatch.setattr(generate_embeddings, "MAX_BYTES", 999)
    assert "larger than" in str(failure_of(host.url_of("/a.png")))


@pytest.mark.parametrize("size", [HEAVY_BYTES, 5 * HEAVY_BYTES], ids=["not heavy", "heavy"])
def test_few_heavy_files_are_downloaded_at_once(host, size):
    half, go_on, many = bytes(size), threading.Event(), HEAVY_FILES + 2
    halfway = queue.SimpleQueue()

    def answer(handler):
        handler.wfile.write(length(2 * size) + half)  # which waits while nobody reads
        halfway.put(True)
        go_on.wait(HANGS)
        handler.wfile.write(half)

    host.files["/a.png"] = answer
    one = fetcher(fetch_seconds=HANGS)
    with ThreadPoolExecutor(many) as pool:
        tasks = [pool.submit(get, one, host.url_of("/a.png")) for _ in range(many)]
        for _ in range(HEAVY_FILES if size > HEAVY_BYTES else many):
            halfway.get(timeout=HANGS)
        time.sleep(0.5)  # for those that should not be there
        assert halfway.empty()
        go_on.set()
        assert [len(task.result()) for task in tasks] == [2 * size] * many


def test_a_compressed_body_is_unpacked(host):
    host.files["/a.png"] = good(("Content-Encoding", "gzip"), body=gzip.compress(IMAGE))
    assert fetched(host) == IMAGE


def test_a_gzip_bomb_is_refused_in_little_memory(host):
    bomb = gzip.compress(bytes(2**28))  # 256 MB in 260 KB
    host.files["/a.png"] = good(("Content-Encoding", "gzip"), body=bomb)
    program = """
import generate_embeddings as product
settings = product.Settings(private_hosts=True)
before = peak()
try:
    product.Fetcher(settings).fetch(product.Place(sys.argv[1], {}))
except product.Rejected as error:
    print(json.dumps([str(error), peak() - before]))
"""
    reason, megabytes = alone(program, host.url_of("/a.png"))
    assert "larger than" in reason
    assert megabytes < 3 * MAX_BYTES / 2**20


DAMAGED_GZIP = gzip.compress(IMAGE)[:-8] + b"checksum"


@pytest.mark.parametrize("body", [b"no gzip at all", DAMAGED_GZIP])
def test_broken_compression_is_a_failure_for_now(host, body):
    host.files["/a.png"] = good(("Content-Encoding", "gzip"), body=body)
    assert not for_good(failure_of(host.url_of("/a.png"), fetch_seconds=1.0))


# --------------------------------------------------------------------------------------------------
# Broken answers
# --------------------------------------------------------------------------------------------------

BROKEN_ANSWERS = {
    "a length that is too long": raw(length(5000), IMAGE, end=hang_up),
    "a reset in the body": raw(length(5000), IMAGE, end=cut),
    "a reset at once": raw(end=cut),
    "a reset in the headers": raw(OK, end=cut),
    "chunks without an end": raw(CHUNKED, b"5\r\nhello\r\n", end=hang_up),
    "two lengths": raw(OK, b"Content-Length: 5\r\nContent-Length: 7\r\n\r\nhello", end=hang_up),
    "a chunk of negative size": raw(CHUNKED, b"-5\r\nhello\r\n0\r\n\r\n", end=hang_up),
    "broken chunks": raw(CHUNKED, b"zz\r\nhello\r\n", end=hang_up),
    "no HTTP at all": raw(b"220 smtp.example ready\r\n\r\n", end=hang_up),
    "nothing": raw(end=hang_up),
}


def test_a_broken_answer_is_asked_for_again(host):
    answers = {name: in_turn(answer, good()) for name, answer in BROKEN_ANSWERS.items()}
    assert all_at_once(host, answers) == dict.fromkeys(BROKEN_ANSWERS, (IMAGE, None, 2))


def test_an_answer_that_stays_broken_is_a_failure_for_now(host):
    ends = all_at_once(host, BROKEN_ANSWERS)
    found = {name: verdict(error) for name, (_, error, _) in ends.items()}
    assert found == dict.fromkeys(BROKEN_ANSWERS, ("connection lost", False))


def test_headers_without_an_end_are_named(host):
    host.files["/a.png"] = raw(OK + b"X: y\r\n" * 500 + b"\r\n", end=hang_up)
    reason = "an answer with headers without end"
    assert verdict(failure_of(host.url_of("/a.png"))) == (reason, False)


def test_what_follows_a_length_that_is_too_short_is_no_part_of_anything(host):
    host.files["/short.png"] = lambda handler: handler.wfile.write(length(100) + IMAGE)
    one = fetcher()
    for _ in range(3):
        assert get(one, host.url_of("/short.png")) == IMAGE[:100]
        assert get(one, host.url_of("/a.png")) == IMAGE


def test_a_wrong_content_type_does_not_matter(host):
    host.files["/a.png"] = good(("Content-Type", "text/html; charset=utf-8"))
    assert fetched(host) == IMAGE


def test_a_page_with_status_200_is_handed_on_as_it_is(host):
    page = b"<!DOCTYPE html><p>Not found"
    host.files["/a.png"] = good(("Content-Type", "image/png"), body=page)
    assert fetched(host) == page


# --------------------------------------------------------------------------------------------------
# Status codes and retries
# --------------------------------------------------------------------------------------------------

PAGE = b"<!DOCTYPE html><p>Sorry</p>"
FINAL_STATUSES = [400, 404, 410, 414, 451]
FOR_NOW = [201, 204, 205, 206, 226, 300, 304, 401, 402, 403, 407, 409, 411, 412, 413, 415, 416]
FOR_NOW += [417, 422, 424, 426, 428, 431, 499, 600]
PASSING_STATUSES = [202, 408, 420, 421, 423, 425, 429, 430]
PASSING_STATUSES += [500, 501, 502, 503, 504, 520, 521, 530, 599]


def test_for_good_is_a_short_list(host):
    ends = all_at_once(host, {code: status(code, body=PAGE) for code in FINAL_STATUSES + FOR_NOW})
    reasons = [f"HTTP {code} {http.client.responses.get(code, '')}".strip() for code in ends]
    assert [str(error) for _, error, _ in ends.values()] == reasons
    assert {asked for _, _, asked in ends.values()} == {ONCE}
    assert [code for code, (_, error, _) in ends.items() if for_good(error)] == FINAL_STATUSES


def page(text, pad=0):
    """A page of HTML around this text."""
    return f"<!DOCTYPE html><html><head>{text}</head>{' ' * pad}</html>".encode()


@pytest.mark.parametrize(
    ("meant", "reason", "permanent"),
    [
        ("404", "HTTP 404 Not Found", True),
        ("403", "HTTP 403 Forbidden", False),  # a key that it does not know
        ("423", "HTTP 423 Locked", False),
        ("503", "HTTP 503 Service Unavailable", False),
        (500, "HTTP 500 Internal Server Error", False),
        ("400", "HTTP 400 Bad Request", True),
        ("200", "HTTP 400 Bad Request", True),
        ("InvalidKey", "HTTP 400 Bad Request", True),
        ([404], "HTTP 400 Bad Request", True),
    ],
)
@pytest.mark.usefixtures("one_attempt")
def test_supabases_storage_means_what_its_body_says(host, meant, reason, permanent):
    body = json.dumps({"statusCode": meant, "error": "x", "message": "y"}).encode()
    host.files["/a.png"] = status(400, body=body)
    assert verdict(failure_of(host.url_of("/a.png"))) == (reason, permanent)


# What firewalls answer instead of an image: (status, headers, body)
ROBOT_CHECKS = {
    "SiteGround's page": (202, {"SG-Captcha": "challenge"}, PAGE),
    "SiteGround's redirecting page": (
        *(200, {}, page('<meta http-equiv="refresh" content="0;/.well-known/sgcaptcha/?r=%2Fa">')),
    ),
    "a page with 202": (202, {}, PAGE),
    "AWS WAF's challenge, without a page": (202, {"x-amzn-waf-action": "challenge"}, b""),
    "AWS WAF's captcha": (405, {"x-amzn-waf-action": "captcha"}, b""),
    "a bare 405": (405, {}, b"no"),
    "mod_security's page": (406, {}, page("<title>Not Acceptable!</title>")),
    "a teapot's captcha": (418, {}, page("<title>Captcha</title>")),
    "LinkedIn's": (999, {}, b""),
    "Cloudflare's challenge": (403, {"cf-mitigated": "challenge"}, page("<title>Just a moment...")),
    "Cloudflare's page with 503": (503, {}, page("<title>Just a moment...</title>")),
    "Cloudflare's page with 200": (200, {}, page("<title>Just a moment...</title>")),
    "Shopify's challenge": (429, {"cf-mitigated": "challenge"}, PAGE),
    "Imperva's": (200, {}, page('<script src="/_Incapsula_Resource?SWJIYLWA=71"></script>')),
    "DataDome's JSON": (403, {}, b'{"url":"https://geo.captcha-delivery.com/captcha/?a=b"}'),
    "DataDome's page": (
        *(403, {}, page("Please enable JS<script src='https://ct.captcha-delivery.com/c.js'>")),
    ),
    "Akamai's": (200, {}, page('<script src="/x?bm-verify=AAQAAAA"></script>')),
    "HUMAN's": (200, {}, page("<title>Robot or human?</title>")),
    "Fastly's": (200, {}, page("<title>Client Challenge</title>")),
    "Anubis'": (200, {}, page("<title>Making sure you&#39;re not a bot!</title>")),
    "Imunify360's": (200, {}, page("<title>One moment, please...</title>")),
    "Vercel's": (403, {"x-vercel-mitigated": "challenge"}, PAGE),
    "Amazon's": (200, {}, page("To discuss automated access ... you're not a robot.")),
    "a script that asks again": (200, {}, page("<script>setTimeout('location.reload()')</script>")),
    "a script that sets a cookie": (
        *(200, {}, page("<script>document.cookie='_test='+f(a);location.href='/?i=1'</script>")),
    ),
}


def test_a_check_for_robots_is_named_and_for_now(host):
    answers = {
        name: status(code, *headers.items(), body=body)
        for name, (code, headers, body) in ROBOT_CHECKS.items()
    }
    for name, (data, error, _) in all_at_once(host, answers).items():
        assert data is None, name
        assert not for_good(error), name
        code = ROBOT_CHECKS[name][0]
        assert str(error).startswith(f"HTTP {code}"), name
        assert "a check for robots: ask the host to let generate-embeddings in" in str(error), name
        assert "--workers" in str(error), name


NO_ROBOT_CHECKS = {
    "any other page": page("<title>Page not found</title>"),
    "a shop's page with a captcha in its form": page("<script src=recaptcha.js>", pad=2**17),
    "an image that mentions one": IMAGE + b"captcha",
    "JSON": b'{"error": "no such product"}',
}


def test_any_other_page_is_no_check_for_robots(host):
    answers = {name: good(body=body) for name, body in NO_ROBOT_CHECKS.items()}
    ends = all_at_once(host, answers)
    assert {name: data for name, (data, _, _) in ends.items()} == NO_ROBOT_CHECKS


def test_the_headers_of_a_firewall_do_not_matter_beside_an_image(host):
    host.files["/a.png"] = good(("x-dd-b", "1"), ("cf-mitigated", "challenge"))
    assert fetched(host) == IMAGE


PICTURES = {
    "203": status(203, body=IMAGE),
    "a whole 206": status(
        206, ("Content-Range", f"bytes 0-{len(IMAGE) - 1}/{len(IMAGE)}"), body=IMAGE
    ),
    "120 headers": good(*((f"X-{n}", "y") for n in range(120))),
    "300 headers": good(*((f"X-{n}", "y") for n in range(300))),
    "an encoding that nobody knows": good(("Content-Encoding", "utf-8")),
    "no encoding": good(("Content-Encoding", "identity")),
}


def test_what_holds_an_image_is_taken(host):
    assert all_at_once(host, PICTURES) == dict.fromkeys(PICTURES, (IMAGE, None, ONCE))


@pytest.mark.parametrize("range", ["bytes 0-99/5000", "bytes 9-99/100", "bytes 0-99/*", "", "x"])
def test_a_part_of_an_image_is_none(host, range):
    host.files["/a.png"] = status(206, ("Content-Range", range), body=IMAGE)
    assert verdict(failure_of(host.url_of("/a.png"))) == ("HTTP 206 Partial Content", False)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, br", "dcb"])
def test_an_encoding_that_was_not_asked_for_is_named(host, encoding):
    host.files["/a.png"] = good(("Content-Encoding", encoding))
    name = encoding.split()[-1]
    reason = f"compressed as {name}, which it was not asked for"
    assert verdict(failure_of(host.url_of("/a.png"))) == (reason, False)
    assert len(host.requests) == ONCE


def test_a_hint_before_the_answer_is_a_failure_for_now_and_no_other_images_answer(host):
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"

    def answer(handler):
        handler.wfile.write(hint)
        time.sleep(1)  # longer than the pause before the next attempt
        with contextlib.suppress(OSError):
            handler.wfile.write(length(5) + b"later")

    host.files["/hint.png"] = answer
    one = fetcher()
    with pytest.raises(NotNow) as caught:
        get(one, host.url_of("/hint.png"))
    assert verdict(caught.value) == ("HTTP 103 Early Hints", False)
    assert len(host.requests) > ONCE
    assert get(one, host.url_of("/a.png")) == IMAGE


def test_an_answer_that_may_pass_is_asked_for_again(host):
    answers = {code: in_turn(status(code), good()) for code in PASSING_STATUSES}
    assert all_at_once(host, answers) == dict.fromkeys(PASSING_STATUSES, (IMAGE, None, 2))


@pytest.mark.parametrize("code", [429, 503, 520])
def test_an_answer_that_does_not_pass_is_a_failure_for_now(host, code):
    host.files["/a.png"] = status(code, ("Retry-After", "3600"))
    error = failure_of(host.url_of("/a.png"))
    assert str(error).startswith(f"HTTP {code}")
    assert not for_good(error)


def test_patience_ends_after_four_attempts(host):
    host.files["/a.png"] = status(500)
    failure_of(host.url_of("/a.png"), fetch_seconds=15.0)
    assert len(host.requests) == 4


def test_success_may_come_after_several_kinds_of_trouble(host):
    host.files["/a.png"] = in_turn(status(500), raw(end=cut), good())
    assert fetched(host) == IMAGE


def arrivals(host, answer):
    """Puts `answer` at /a.png; the list of times at which it is asked for."""
    times = []
    host.files["/a.png"] = lambda handler: (times.append(time.monotonic()), answer(handler))
    return times


def test_retry_after_is_respected(host):
    times = arrivals(host, in_turn(status(429, ("Retry-After", "2")), good()))
    assert fetched(host, fetch_seconds=15.0) == IMAGE
    assert times[1] - times[0] > 1.5


@pytest.mark.parametrize("code", [403, 405])
def test_whoever_says_when_to_come_again_is_asked_again(host, code):
    host.files["/a.png"] = in_turn(status(code, ("Retry-After", "0.5")), good())
    assert fetched(host) == IMAGE


LATE = "Mon, 01 Jan 2099 00:00:00 GMT"


def in_seconds(seconds):
    """A moment as HTTP writes it."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def test_retry_after_may_be_a_date(host):
    times = arrivals(host, in_turn(status(503, ("Retry-After", in_seconds(3))), good()))
    assert fetched(host, fetch_seconds=15.0) == IMAGE
    assert times[1] - times[0] > 1.5


@pytest.mark.parametrize("value", ["21", "3600", "99999999999999999999999", LATE])
def test_a_retry_after_beyond_the_deadline_ends_it_at_once(host, value):
    host.files["/a.png"] = status(429, ("Retry-After", value))
    started = time.monotonic()
    error = failure_of(host.url_of("/a.png"), fetch_seconds=20.0)
    assert time.monotonic() - started < 10
    assert str(error).startswith("HTTP 429")
    assert not for_good(error)
    assert len(host.requests) == ONCE


NONSENSE = ["soon", "-5", "", "0", "nan", "²", "Mon, 01 Jan 2001 00:00:00 GMT", "Mon, 99 GMT"]


def test_a_retry_after_that_makes_no_sense_is_not_minded(host):
    answers = {value: in_turn(status(503, ("Retry-After", value)), good()) for value in NONSENSE}
    assert all_at_once(host, answers) == dict.fromkeys(NONSENSE, (IMAGE, None, 2))


# What a host says for an hour to whoever asked for 20 images: (status, headers, body)
BLOCKS = {code: (code, {}, PAGE) for code in (202, 403, 405, 406, 418, 420, 423, 429, 430, 503)}
BLOCKS |= {"200": ROBOT_CHECKS["Cloudflare's page with 200"]}


class BlockingHost(ImageHost):
    """A host that blocks after 20 images, while `blocks` is true."""

    def __init__(self, image, code, headers, body):
        super().__init__()
        self.image, self.block, self.blocks = image, status(code, *headers.items(), body=body), True
        self.left = itertools.count(20, -1)

    def answer(self, handler):
        if self.blocks and next(self.left) <= 0:
            self.block(handler)
        else:
            good(body=self.image)(handler)


def test_what_a_host_blocks_for_an_hour_the_next_night_embeds(stack, cli, photos, tuned):
    image = min(photos.values(), key=len)
    dead = 25  # images that are gone, of a host that has others: no failures of the host
    with contextlib.ExitStack() as started:
        hosts = [started.enter_context(BlockingHost(image, *block)) for block in BLOCKS.values()]
        urls = [host.url_of(f"/{n}.png") for n in range(60) for host in hosts]
        other = started.enter_context(ImageHost({f"/{n}.png": image for n in range(5)}))
        urls = [other.url_of(f"/gone/{n}.png") for n in range(dead)] + urls
        urls += [other.url_of(path) for path in other.files]
        stack.add_images(urls)  # in the order in which they are tried
        # two attempts, so that the test takes seconds; without the end that many hosts would be
        args = ("FETCH_ATTEMPTS=2", "HOSTS_DOWN=99", "--", "--workers", 32)
        first = cli(*args, script=tuned)
        assert first.counts["embedded"] == 20 * len(hosts) + len(other.files)
        noted = stack.sql("select reason, permanent from product_embedding_failures")
        assert {reason for reason, permanent in noted if permanent} == {"HTTP 404 Not Found"}
        passing = {reason.split(" ")[1].rstrip(",") for reason, permanent in noted if not permanent}
        assert passing == {str(code) for code in BLOCKS}

        stack.sql("update product_embedding_failures set updated_at = now() - interval '1 day'")
        for host in hosts:
            host.blocks = False
        second = cli(*args, script=tuned)
    assert second.counts["embedded"] == 40 * len(hosts)
    assert second.counts["left"] == 0
    assert second.counts["skipped"] == dead
    assert second.code == 0


# --------------------------------------------------------------------------------------------------
# Redirects
# --------------------------------------------------------------------------------------------------


def chain(host, count):
    """Puts `count` redirects before the image at /a.png; the first one's path."""
    for n in range(count):
        host.files[f"/{n}"] = redirect(f"/{n + 1}" if n + 1 < count else "/a.png")
    return "/0"


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(host, code):
    host.files["/old.png"] = redirect("/a.png", code)
    assert fetched(host, "/old.png") == IMAGE


def test_five_redirects_are_followed_and_six_are_not(host):
    assert fetched(host, chain(host, 5)) == IMAGE
    error = failure_of(host.url_of(chain(host, 6)))
    assert verdict(error) == ("more than 5 redirects", False)


def test_a_redirect_loop_ends(host):
    host.files["/a.png"] = redirect("/b.png")
    host.files["/b.png"] = redirect("/a.png")
    assert verdict(failure_of(host.url_of("/a.png"))) == ("more than 5 redirects", False)
    assert len(host.requests) == 6


@pytest.mark.parametrize(
    "target",
    ["a.png", "./x/../a.png", "/a.png?w=1", "//HOST/a.png", "http://HOST/a.png", "/%61.png"],
)
def test_a_redirect_may_be_relative(host, target):
    host.files["/dir/old.png"] = redirect("../" + target if target[0] in "a." else target)
    target = target.replace("HOST", host.url.removeprefix("http://"))
    host.files["/dir/old.png"] = redirect("../" + target if target[0] in "a." else target)
    assert fetched(host, "/dir/old.png") == IMAGE


def test_a_redirect_to_a_path_with_spaces_and_accents_is_followed(host):
    host.files["/é a.png"] = IMAGE
    location = "/é a.png".encode().decode("latin-1")  # raw UTF-8, as careless hosts send it
    host.files["/old.png"] = redirect(location)
    assert fetched(host, "/old.png") == IMAGE


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "gopher://127.0.0.1/", "data:,x"]
)
def test_a_redirect_leads_to_http_and_https_only(host, target):
    host.files["/a.png"] = redirect(target)
    error = failure_of(host.url_of("/a.png"))
    assert "only http" in str(error)
    assert not for_good(error)


@pytest.mark.parametrize("target", ["http://[::1", "http://a b/", "http://h:99999/", "http://"])
def test_a_redirect_to_nowhere_is_a_failure_for_now(host, target):
    host.files["/a.png"] = redirect(target)
    assert verdict(failure_of(host.url_of("/a.png"))) == ("a redirect to no valid URL", False)
    assert len(host.requests) == ONCE


@pytest.mark.parametrize("headers", [[], [("Location", "")]], ids=["none", "an empty one"])
def test_a_redirect_without_a_target_is_a_failure_for_now(host, headers):
    host.files["/a.png"] = status(302, *headers)
    assert verdict(failure_of(host.url_of("/a.png"))) == ("HTTP 302 Found", False)


def wants_cookie(target, name="seen", code=302):
    """Answers with the image, once the cookie that it sets comes back with a request."""

    def answer(handler):
        if f"{name}=a=b" in handler.headers.get("Cookie", ""):
            good()(handler)
        else:
            cookie = ("Set-Cookie", f"{name}=a=b; Path=/; Max-Age=60; HttpOnly")
            status(code, cookie, ("Set-Cookie", "lang=en"), ("Location", target))(handler)

    return answer


@pytest.mark.parametrize("code", [302, 307])
def test_a_redirect_to_itself_with_a_cookie_is_followed_with_it(host, code):
    host.files["/a.png"] = wants_cookie("/a.png", code=code)
    assert fetched(host) == IMAGE
    assert sent(host)["cookie"] == "seen=a=b; lang=en"


def test_a_cookie_lives_within_one_images_chain(host):
    host.files["/a.png"] = wants_cookie("/a.png")
    one = fetcher()
    for _ in range(2):
        assert get(one, host.url_of("/a.png")) == IMAGE
    assert ["Cookie" in headers for _, headers in host.requests] == [False, True, False, True]


def test_a_cookie_goes_to_no_other_host_and_comes_back_to_its_own(host):
    with ImageHost() as other:
        other.files["/hop"] = redirect(host.url_of("/a.png"))
        host.files["/a.png"] = wants_cookie(other.url_of("/hop"))
        assert fetched(host) == IMAGE
    assert "cookie" not in sent(other, "/hop")


def test_the_endless_body_of_a_redirect_is_not_read(host):
    head = b"HTTP/1.1 302 Found\r\nLocation: /a.png\r\nConnection: close\r\n\r\n"
    host.files["/old.png"] = raw(head, b"x" * 2**16)
    started = time.monotonic()
    assert fetched(host, "/old.png", fetch_seconds=15.0) == IMAGE
    assert time.monotonic() - started < 10


# --------------------------------------------------------------------------------------------------
# URLs
# --------------------------------------------------------------------------------------------------


# What a URL's end is and what a browser sends for it (`new URL` of Node 24 says the same)
AS_BROWSERS = {
    "/a b.png": "/a%20b.png",
    "/a%20b.png": "/a%20b.png",
    "/größe/写真😀.png": "/gr%C3%B6%C3%9Fe/%E5%86%99%E7%9C%9F%F0%9F%98%80.png",
    "/a.png#part?x": "/a.png",
    "/a.png?w=1 0&n=ü#f": "/a.png?w=1%200&n=%C3%BC",
    "/a.png?": "/a.png?",
    "?w=1": "/?w=1",
    "": "/",
    "/50%.png": "/50%.png",
    "/50%/a%20b%2": "/50%/a%20b%2",
    "/a+b.png?c+d": "/a+b.png?c+d",
    "/x%2fy%2Fz.png": "/x%2fy%2Fz.png",
    "/%7Ea/~b/%61.png": "/%7Ea/~b/%61.png",
    "/x/%2e%2e%2fy.png": "/x/%2e%2e%2fy.png",
    "//a//b.png": "//a//b.png",
    "/x/../a/./b.png": "/a/b.png",
    "/x/%2E%2e/a.png": "/a.png",
    "/../../a.png": "/a.png",
    "/a/..": "/",
    "/a;v=1,2.png": "/a;v=1,2.png",
    "/a!$&'()*+,;=:@-._~|[].png": "/a!$&'()*+,;=:@-._~|[].png",
    '/"a"<b>{c}^`.png': "/%22a%22%3Cb%3E%7Bc%7D%5E%60.png",
    "/a?'\"<>{}|^`[]\\": "/a?%27%22%3C%3E{}|^`[]\\",
    "/a\t/\nb\r\n.png\r\n": "/a/b.png",
    "\\a\\b.png": "/a/b.png",
    "/s3?X-Amz-Signature=a%2Fb%3D&X=%7E": "/s3?X-Amz-Signature=a%2Fb%3D&X=%7E",
}


def request_lines(host, urls):
    """What is sent for each of these URLs, and for a redirect to each."""
    seen = []

    def answer(handler):
        seen.append(handler.requestline.split(" ")[1])
        good()(handler)

    host.answer = answer
    one = fetcher()
    for url in urls:
        assert get(one, url) == IMAGE
    return seen


def test_urls_are_sent_as_browsers_send_them(host):
    sent = request_lines(host, [host.url + end for end in AS_BROWSERS])
    assert dict(zip(AS_BROWSERS, sent, strict=True)) == AS_BROWSERS


def test_urls_are_sent_so_in_redirects_too(host):
    ends = {end: sent for end, sent in AS_BROWSERS.items() if not set("\t\n") & set(end)}
    with ImageHost() as other:
        for n, end in enumerate(ends):
            other.files[f"/{n}"] = redirect((host.url + end).encode().decode("latin-1"))
        sent = request_lines(host, [other.url_of(f"/{n}") for n in range(len(ends))])
    assert dict(zip(ends, sent, strict=True)) == ends


def test_urls_are_sent_so_through_a_proxy(proxy):
    ends = {end: sent for end, sent in AS_BROWSERS.items() if sent[1:2] != "/"}
    sent = request_lines(proxy, [f"http://shop.example:8080{end}" for end in ends])
    found = [url.removeprefix("http://shop.example:8080") for url in sent]
    assert dict(zip(ends, found, strict=True)) == ends


HOSTS = {
    "SHOP.example": "shop.example",
    "shop.example.": "shop.example",
    "my_shop.example": "my_shop.example",
    "bücher.example": "xn--bcher-kva.example",
    "straße.example": "xn--strae-oqa.example",
    "i❤.example": "xn--i-7iq.example",
    "💩.example": "xn--ls8h.example",
    "\uff11\uff12\uff17.0.0.1": "127.0.0.1",
    "%73hop.example": "shop.example",
}


def test_hosts_are_named_as_browsers_name_them():
    assert {host: parse_url(f"http://{host}/").host for host in HOSTS} == HOSTS


def test_a_scheme_in_capitals_is_understood(host):
    assert get(fetcher(), host.url.upper() + "/a.png") == IMAGE


@pytest.mark.parametrize(
    "url",
    [
        *("http://", "https://", "http:///a.png", "http://[::1", "http://a b/", "http://h:port/"),
        *("http://h:99999/", "http://.example/", f"http://{'a' * 64}.example/", "http://?a"),
        *("http:a.png", "http://\x00/", "http://a\x7f/", "http://exa mple.com/a.png"),
    ],
)
def test_an_invalid_url_is_a_failure_for_good(url):
    assert verdict(failure_of(url)) == ("not a valid URL", True)


NO_URLS = ["a.jpg", "products/a.jpg", "/products/a.jpg", "www.shop.example/a.jpg", "C:\\a.jpg"]
NO_URLS += ["localhost:3000/a.jpg", "//cdn.example/a.jpg", "img, front.jpg", "<img src=a>", '"x"']
LISTS = [
    "a.jpg, b.jpg",
    "a.jpg|b.jpg",
    "https://h/a.jpg, https://h/b.jpg",
    "https://h/a.jpg,https://h/b.jpg",
    "https://h/a.jpg https://h/b.jpg",
    "https://h/a.jpg\nhttps://h/b.jpg",
    "https://h/a.jpg;http://h/b.jpg",
    '["https://h/a.jpg"]',
    ' ["a.jpg", "b.jpg"]',
    '{"url": "https://h/a.jpg"}',
    "{https://h/a.jpg}",
]


def test_what_is_no_url_is_named_with_the_place_where_that_is_mended():
    reasons = dict.fromkeys(NO_URLS, "no full URL")
    reasons |= dict.fromkeys(LISTS, "a list or JSON, not one URL")
    found = {text: verdict(failure_of(text)) for text in reasons}
    place = ': see "Your tables" in schema.sql'
    assert found == {text: (reason + place, True) for text, reason in reasons.items()}


def test_a_url_within_a_url_is_no_list(host):
    assert fetched(host, "/a.png?w=1,2;x|y&from=https://h/b.png") == IMAGE


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/a.png",
        "file:///etc/hosts",
        "ht!tp://x",
        "blob:http://h/1",
        "javascript:1",
        "s3://b/a",
    ],
)
def test_other_schemes_are_a_failure_for_good(url):
    error = failure_of(url)
    assert "only http" in str(error)
    assert for_good(error)


@pytest.fixture
def one_attempt(monkeypatch):
    monkeypatch.setattr(generate_embeddings, "FETCH_ATTEMPTS", 1)


@pytest.mark.parametrize("url", ["http://nope.invalid/a.png", "http://bücher.invalid/a.png"])
@pytest.mark.usefixtures("one_attempt")
def test_a_host_that_is_not_there_is_a_failure_for_now(url):
    assert verdict(failure_of(url, fetch_seconds=15.0)) == ("host not found", False)


@pytest.fixture
def names(monkeypatch):
    """Names and their addresses, for this test alone."""
    names, ask = {}, socket.getaddrinfo

    def look_up(host, port, *args, **options):
        return [
            entry
            for address in names.get(host, [host])
            for entry in ask(address, port, *args, **options)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return names


@LINUX
def test_a_name_with_many_dead_addresses_costs_no_more_than_the_deadline(names):
    names["dead.example"] = ["127.0.0.1"] * 30
    with contextlib.ExitStack() as held:
        busy = held.enter_context(socket.socket())
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)  # and never accepts: once one waits, nobody gets an answer any more
        for _ in range(3):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(busy.getsockname())
        started = time.monotonic()
        url = f"http://dead.example:{busy.getsockname()[1]}/a.png"
        error = failure_of(url, fetch_seconds=1.0)
        reason = "not complete within 1 s (the host did not answer in time)"
        assert verdict(error) == (reason, False)
        assert time.monotonic() - started < 15


@pytest.mark.usefixtures("one_attempt")
def test_a_refused_connection_is_a_failure_for_now():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # but it does not listen
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.png"
        assert verdict(failure_of(url)) == ("connection refused", False)


@pytest.mark.usefixtures("one_attempt")
def test_a_host_without_tls_is_a_failure_for_now(host):
    url = host.url_of("/a.png").replace("http:", "https:")
    assert verdict(failure_of(url)) == ("TLS failed", False)


@pytest.mark.parametrize("days", [1, -1], ids=["of an unknown issuer", "expired"])
@pytest.mark.usefixtures("one_attempt")
def test_a_certificate_that_is_not_valid_is_a_failure_for_now(tmp_path, days, monkeypatch):
    with TlsHost(tmp_path, days) as host:
        if days < 0:
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(host.certificate))
        error = failure_of(host.url_of("/a.png"))
    assert verdict(error) == ("the host's certificate is not valid", False)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(IMAGE).decode(),
        "DATA:image/png;charset=x;base64," + base64.b64encode(IMAGE).decode(),
        "data:;base64," + base64.encodebytes(IMAGE).decode(),
        "data:image/png;base64," + base64.b64encode(IMAGE).decode().replace("+", "%2B"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in IMAGE),
    ],
    ids=["base64", "capitals", "lines", "quoted base64", "percent"],
)
def test_a_data_url_holds_its_image(url):
    assert get(fetcher(), url) == IMAGE


@pytest.mark.parametrize("url", ["data:image/png;base64", "data:", "data:image/png;base64,A"])
def test_a_broken_data_url_is_a_failure_for_good(url):
    assert verdict(failure_of(url)) == ("broken data: URL", True)


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_certificates_are_those_of_a_file_that_a_setting_names(tls, monkeypatch, name):
    monkeypatch.setenv(name, str(tls.certificate))
    assert fetched(tls) == IMAGE


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_a_file_without_certificates_ends_the_run(tmp_path, monkeypatch, content):
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(RunError, match=f"{file} is no file of certificates"):
        get(fetcher(), "https://shop.example/a.png")


def test_a_name_that_is_not_found_is_said_to_be_so_by_every_library():
    asks = [
        lambda url: requests.get(url, timeout=9),
        lambda url: httpx.get(url, timeout=9),
        lambda url: urllib3.request("GET", url, retries=False),
        lambda url: urllib.request.urlopen(url),
    ]
    reasons = []
    for ask in asks:
        with pytest.raises(Exception) as caught:
            ask("http://nope.invalid/a.png")
        reasons.append(network_reason(caught.value))
    assert reasons == ["host not found"] * len(asks)


# --------------------------------------------------------------------------------------------------
# What is sent
# --------------------------------------------------------------------------------------------------

KEY_HEADERS = {"apikey": "sb_secret_x", "Authorization": "Bearer sb_secret_x"}


def sent(host, path="/a.png"):
    """The headers of the last request for `path`, names in small letters."""
    headers = [headers for asked, headers in host.requests if asked == path][-1]
    return {name.lower(): value for name, value in headers.items()}


def test_the_agent_is_honest_and_has_no_name_that_hosts_refuse(host):
    fetched(host)
    agent = sent(host)["user-agent"]
    assert agent.startswith("generate-embeddings/")
    refused_names = ("mozilla", "python", "requests", "urllib", "openai", "bot", "crawl", "spider")
    assert not any(name in agent.lower() for name in refused_names)


def test_all_kinds_of_images_are_accepted_and_those_that_are_made_on_demand_not_preferred(host):
    fetched(host)
    accept = sent(host)["accept"]
    assert "*/*" in accept
    assert "webp" not in accept
    assert "avif" not in accept


def test_connections_are_reused(host):
    one = fetcher()
    for _ in range(10):
        get(one, host.url_of("/a.png"))
    assert host.connections == 1


def test_an_images_cookies_are_not_sent_back(host):
    host.files["/a.png"] = good(("Set-Cookie", "session=1; Path=/"))
    one = fetcher()
    for _ in range(2):
        get(one, host.url_of("/a.png"))
    assert not any("Cookie" in headers for _, headers in host.requests)


@pytest.mark.parametrize("by", ["HOME", "NETRC"])
def test_passwords_of_netrc_are_not_sent(host, by, monkeypatch, tmp_path):
    file = tmp_path / ".netrc"
    file.write_text("machine 127.0.0.1 login me password secret\ndefault login me password x\n")
    file.chmod(0o600)
    monkeypatch.setenv(by, str(file if by == "NETRC" else tmp_path))
    fetched(host)
    host.files["/old.png"] = redirect("/a.png")
    fetched(host, "/old.png")
    assert not any("Authorization" in headers for _, headers in host.requests)


def test_the_password_in_a_url_is_sent_to_that_host_and_no_further(host):
    with ImageHost({"/a.png": IMAGE}) as other:
        host.files["/old.png"] = redirect(other.url_of("/a.png"))
        url = host.url_of("/old.png").replace("//", "//me:p%40ss@")
        assert get(fetcher(), url) == IMAGE
        basic = "Basic " + base64.b64encode(b"me:p@ss").decode()
        assert sent(host, "/old.png")["authorization"] == basic
        assert "authorization" not in sent(other)
    assert fetched(host) == IMAGE
    assert "authorization" not in sent(host)


def test_the_key_is_sent_where_it_is_meant_to_go(host):
    fetched(host, headers=KEY_HEADERS)
    assert sent(host)["apikey"] == KEY_HEADERS["apikey"]
    assert sent(host)["authorization"] == KEY_HEADERS["Authorization"]


def test_the_key_goes_along_no_redirect(host):
    host.files["/here"] = redirect("/a.png")
    with ImageHost({"/a.png": IMAGE}) as other:
        host.files["/away"] = redirect(other.url_of("/a.png"))
        for path, target in (("/here", host), ("/away", other)):
            assert fetched(host, path, KEY_HEADERS) == IMAGE
            assert "apikey" in sent(host, path)
            assert sent(target).keys().isdisjoint(("apikey", "authorization"))
            target.requests.clear()


def test_the_key_is_not_sent_to_the_next_image_on_the_same_connection(host):
    one = fetcher()
    get(one, host.url_of("/a.png"), KEY_HEADERS)
    get(one, host.url_of("/a.png"))
    assert host.connections == 1
    assert sent(host).keys().isdisjoint(("apikey", "authorization"))


# --------------------------------------------------------------------------------------------------
# The guard
# --------------------------------------------------------------------------------------------------

PUBLIC_ADDRESSES = """
    8.8.8.8 1.1.1.1 93.184.216.34 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.167.0.1
    11.0.0.1 126.255.255.255 128.0.0.1 169.253.0.1 223.255.255.254
    2606:4700:4700::1111 2a00:1450:4001::1 ::ffff:8.8.8.8 2002:808:808::1 64:ff9b::808:808
    2606:4700::1%eth0
"""
PRIVATE_ADDRESSES = """
    127.0.0.1 127.1.2.3 127.255.255.255 0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 172.16.0.1
    172.31.255.255 192.168.0.1 169.254.0.1 169.254.169.254 169.254.170.2 100.64.0.1 100.100.100.200
    100.127.255.255 192.0.0.1 192.0.0.192 192.0.2.1 198.18.0.1 198.19.255.255 198.51.100.1
    203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255
    :: ::1 fe80::1 fe80::1%eth0 fec0::1 fc00::1 fd00:ec2::254 fd12:3456::1 ff02::1 ff0e::1
    2001:db8::1 100::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:a9fe:a9fe
    ::ffff:0.0.0.0 ::ffff:224.0.0.1 2002:7f00:1::1 2002:a00:1::1 2002:a9fe:a9fe::1
    64:ff9b::7f00:1 64:ff9b::a00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::a00:1
    ::127.0.0.1 ::10.0.0.1 2001:0:7f00:1::1
"""


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES.split())
def test_addresses_of_the_internet_are_public(address):
    assert Guard.is_public(address)


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES.split())
def test_all_other_addresses_are_not(address):
    assert not Guard.is_public(address)


def guarded(url, origin="https://project.supabase.co"):
    return failure_of(url, url=origin, private_hosts=False, fetch_seconds=2.0)


def is_guarded(error):
    assert "private address" in str(error)
    assert "ALLOW_PRIVATE_IMAGE_HOSTS" in str(error)
    assert for_good(error)
    return True


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


@pytest.mark.parametrize(
    "name", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0"]
)
def test_a_private_address_is_never_connected_to(listener, name):
    assert is_guarded(guarded(f"http://{name}:{listener.port}/a.png"))
    assert listener.was_left_alone()


def test_a_name_that_leads_to_a_private_address_is_never_connected_to(listener, names):
    names["shop.example"] = ["127.0.0.1"]
    error = guarded(f"http://shop.example:{listener.port}/a.png")
    assert "private address 127.0.0.1" in str(error)
    assert not for_good(error)  # it may lead elsewhere tomorrow
    assert listener.was_left_alone()


@LINUX
def test_of_a_names_addresses_only_the_public_ones_are_connected_to(host, names, monkeypatch):
    monkeypatch.setattr(Guard, "is_public", staticmethod(lambda address: address == "127.0.0.1"))
    names["shop.example"] = ["127.0.0.2", "127.0.0.1"]
    with Listener("127.0.0.2", host.port) as private:
        one = fetcher(url="https://project.supabase.co", private_hosts=False)
        assert get(one, f"http://shop.example:{host.port}/a.png") == IMAGE
        assert private.was_left_alone()


@LINUX
@pytest.mark.parametrize("order", [["127.0.0.1", "127.0.0.2"], ["127.0.0.2", "127.0.0.1"]])
def test_all_of_a_names_addresses_are_tried(host, names, order):
    names["shop.example"] = order  # nobody listens at 127.0.0.2
    assert get(fetcher(), f"http://shop.example:{host.port}/a.png") == IMAGE


def test_the_supabase_host_itself_is_allowed(host):
    assert fetched(host, url=host.url, private_hosts=False) == IMAGE


def test_another_port_or_name_of_the_supabase_host_is_not(host, listener):
    for url in (f"http://127.0.0.1:{listener.port}/a.png", f"http://localhost:{host.port}/a.png"):
        assert is_guarded(guarded(url, origin=host.url))
    assert listener.was_left_alone()
    assert host.requests == []


def test_a_redirect_to_a_private_address_is_refused(host, listener):
    host.files["/old.png"] = redirect(f"http://127.0.0.1:{listener.port}/a.png")
    error = guarded(host.url_of("/old.png"), origin=host.url)
    assert str(error).startswith("a redirect elsewhere: private address 127.0.0.1")
    assert not for_good(error)  # so do the login pages of networks
    assert listener.was_left_alone()


def test_the_guard_can_be_turned_off(host):
    assert fetched(host, private_hosts=True) == IMAGE
    assert get(fetcher(), f"http://localhost:{host.port}/a.png") == IMAGE


class Tunnel(socketserver.ThreadingTCPServer):
    """A proxy that leads to `port` of this machine, whatever it is asked for: `asked`."""

    daemon_threads = True

    def __init__(self, handler, port):
        super().__init__(("127.0.0.1", 0), handler)
        self.port, self.asked = port, []
        self.place = f"127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Tunnelled(socketserver.StreamRequestHandler):
    """A connection through a Tunnel; `greet` says where it is to lead."""

    rbufsize = 0  # what follows the greeting is not for us

    def handle(self):
        self.server.asked.append(self.greet())
        with socket.create_connection(("127.0.0.1", self.server.port)) as host:
            threading.Thread(target=pump, args=(self.connection, host), daemon=True).start()
            pump(host, self.connection)


def pump(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class Socks5(Tunnelled):
    def greet(self):
        self.rfile.read(self.rfile.read(2)[1])  # the methods that it knows
        self.wfile.write(b"\5\0")
        assert self.rfile.read(4) == b"\5\1\0\3"  # connect to a name
        name = self.rfile.read(self.rfile.read(1)[0]).decode()
        port = int.from_bytes(self.rfile.read(2), "big")
        self.wfile.write(b"\5\0\0\1" + bytes(6))
        return f"{name}:{port}"


class Connect(Tunnelled):
    def greet(self):
        lines = []
        while line := self.rfile.readline().strip():
            lines.append(line.decode())
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        return lines[0].split(" ")[1], [line for line in lines if "Basic" in line]


def test_images_come_through_a_socks_proxy(host, monkeypatch):
    with Tunnel(Socks5, host.port) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"socks5h://{proxy.place}")
        one = fetcher(url="https://project.supabase.co", private_hosts=False)
        assert get(one, "http://shop.example:8080/a.png") == IMAGE
        assert is_guarded(guarded("http://10.0.0.1/a.png"))
    assert proxy.asked == ["shop.example:8080"]


def test_images_come_through_the_tunnel_of_a_proxy(tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))
    with Tunnel(Connect, tls.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss@{proxy.place}")
        one = fetcher(url="https://project.supabase.co")
        tls.files["/a/b.png"] = IMAGE
        for path in ("/a%2fb.png", "/a.png"):
            assert get(one, f"https://127.0.0.1:4433{path}") == IMAGE
            assert tls.requests[-1][0] == path
    login = base64.b64encode(b"me:p@ss").decode()
    assert [place for place, _ in proxy.asked] == ["127.0.0.1:4433"]
    assert [login in headers[0] for _, headers in proxy.asked] == [True]


def test_a_name_server_that_does_not_answer_is_no_name_that_is_not_there():
    error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert network_reason(error) == "no name server answered"


@pytest.mark.parametrize("scheme", ["socks", "socks4", "socks4a"])
def test_a_socks_proxy_of_another_kind_ends_the_run(cli, stack, scheme):
    stack.add_images(["http://shop.example/a.png"])
    run = cli(ALL_PROXY=f"{scheme}://127.0.0.1:9")
    assert run.code == 2
    assert f"ALL_PROXY: write socks5h:// for {scheme}://" in run.error


def test_a_socks_proxy_without_what_speaks_it_ends_the_run(cli, stack):
    stack.add_images(["http://shop.example/a.png"])
    run = cli(ALL_PROXY="socks5h://127.0.0.1:9")
    assert run.code == 2
    assert "ALL_PROXY is a SOCKS proxy: run pip install PySocks socksio" in run.error


@pytest.fixture
def proxy(monkeypatch):
    """A proxy named in the environment. It answers for every host from its own files."""
    with ImageHost({"/a.png": IMAGE}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        yield proxy


def test_behind_a_proxy_public_hosts_are_asked_through_it(proxy):
    one = fetcher(url="https://project.supabase.co", private_hosts=False)
    for url in ("http://shop.example/a.png", "http://8.8.8.8/a.png"):
        assert get(one, url) == IMAGE
    assert [path for path, _ in proxy.requests] == [
        "http://shop.example/a.png",
        "http://8.8.8.8/a.png",
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("127.0.0.1", "127.0.0.1:80", "10.0.0.1", "169.254.169.254", "192.168.1.1:8080", "[::1]"),
        *("[::ffff:127.0.0.1]", "[fd00::1]", "localhost", "LOCALHOST", "localhost.", "a.localhost"),
        *("127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0xa9fea9fe", "user@127.0.0.1"),
        *("127.0.0.1.", "10.0.0.1.:80", "\uff11\uff12\uff17.0.0.1", "%31%32%37.0.0.1"),
    ],
)
def test_behind_a_proxy_a_private_address_in_the_url_is_refused(proxy, name):
    assert is_guarded(guarded(f"http://{name}/a.png"))
    assert proxy.requests == []


def test_behind_a_proxy_a_redirect_to_a_private_address_is_refused(proxy):
    proxy.files["/old.png"] = redirect("http://169.254.169.254/a.png")
    error = guarded("http://shop.example/old.png")
    assert str(error).startswith("a redirect elsewhere: private address 169.254.169.254")
    assert [path for path, _ in proxy.requests] == ["http://shop.example/old.png"]


def test_behind_a_proxy_only_the_supabase_hosts_own_port_is_allowed(proxy):
    origin = "http://127.0.0.1:54321"
    one = fetcher(url=origin, private_hosts=False)
    assert get(one, origin + "/a.png") == IMAGE
    proxy.requests.clear()
    assert is_guarded(guarded("http://127.0.0.1:6379/a.png", origin=origin))
    assert proxy.requests == []


def test_the_guard_can_be_turned_off_behind_a_proxy(proxy):
    assert get(fetcher(), "http://10.0.0.1/a.png") == IMAGE


def test_what_the_environment_excepts_from_the_proxy_is_guarded_directly(host, proxy, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert is_guarded(guarded(host.url_of("/a.png")))
    assert host.requests == proxy.requests == []


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def test_a_file_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGE)
    assert get(fetcher(), tmp_path / "a.png") == IMAGE


def test_a_file_above_the_byte_cap_is_refused_unread(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert verdict(failure_of(tmp_path / "a.png")) == (f"larger than {MAX_BYTES // 2**20} MB", True)


def test_a_file_that_can_not_be_read_is_a_failure_for_now(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name in ("folder.jpg", "dangling.jpg", "loop.jpg", "missing.jpg"):
        error = failure_of(tmp_path / name)
        assert "can't be read" in str(error)
        assert not for_good(error)


def test_a_pipe_among_the_files_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert not for_good(failure_of(tmp_path / "a.jpg"))
