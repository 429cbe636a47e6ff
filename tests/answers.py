"""What an image host may answer: callables for the `files` of stack.ImageHost. Below them hosts
that speak TLS, and a proxy."""

import contextlib
import functools
import http.client
import ipaddress
import socket
import socketserver
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from stack import ImageHost, reset

OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
NO_LENGTH = OK + b"Connection: close\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
PEM = Encoding.PEM


@functools.cache
def private_key():
    return rsa.generate_private_key(65537, 2048)


def length(n):
    """The head of an answer that says how many bytes come."""
    return OK + b"Content-Length: %d\r\n\r\n" % n


def status(code, *headers, body=b"no"):
    """A whole answer with this status; `headers` are pairs."""
    return lambda handler: handler.reply(code, list(headers), body)


def redirect(target, code=302):
    return status(code, ("Location", target))


def in_turn(*answers):
    """A different answer to each request; the last one to all that follow."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


def raw(*pieces, pause=0.0, end=None):
    """Writes these bytes to the connection, the last ones for ever if `end` is None."""

    def answer(handler):
        handler.close_connection = True
        with contextlib.suppress(OSError):  # the client had enough
            for piece in pieces:
                handler.wfile.write(piece)
            while end is None:
                time.sleep(pause)
                handler.wfile.write(pieces[-1])
            end(handler)

    return answer


# Ends for `raw`


def hang_up(_):
    """The connection is closed as usual."""


def hang(handler):
    """Nothing more comes until the client gives up."""
    handler.connection.recv(1)


def cut(handler):
    """The connection is reset."""
    handler.wfile.flush()
    time.sleep(0.05)  # so that the first part arrives
    reset(handler.connection)


class TlsHost(ImageHost):
    """An ImageHost that speaks TLS. `authority` is the file of who signed its certificate: one
    without key identifiers, as many old ones. With a `cipher` it knows only that one, of TLS 1.2.
    """

    def __init__(self, folder, files, days=1, cipher=None):
        super().__init__(files)
        self.folder, self.days, self.cipher = folder, days, cipher
        self.authority = folder / "authority.pem"

    def start(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate())
        if self.cipher:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(self.cipher)
        super().start()
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        return self

    def _certificate(self):
        """A file with a new certificate and its key."""
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        made = self._signed("host", x509.SubjectAlternativeName([address]))
        self.authority.write_bytes(self._signed("authority", x509.BasicConstraints(True, None)))
        secret = private_key().private_bytes(PEM, PrivateFormat.PKCS8, NoEncryption())
        file = self.folder / "certificate.pem"
        file.write_bytes(secret + made)
        return file

    def _signed(self, subject, extension):
        names = [
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
            for name in ("authority", subject)
        ]
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder(*names, private_key().public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=9))
            .not_valid_after(now + timedelta(days=self.days))
            .add_extension(extension, critical=subject == "authority")
            .sign(private_key(), hashes.SHA256())
            .public_bytes(PEM)
        )

    @property
    def url(self):
        return super().url.replace("http:", "https:")


class Tunnel(socketserver.ThreadingTCPServer):
    """A proxy for TLS, or of SOCKS5, that leads to `port` of this machine, whatever it is asked
    for. `asked` has the targets, and what came as Proxy-Authorization."""

    daemon_threads = True

    def __init__(self, port, socks=False):
        super().__init__(("127.0.0.1", 0), _Socks5 if socks else _Tunnelled)
        self.port, self.asked = port, []
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.greeting = b"HTTP/1.1 200 OK\r\n\r\n"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Tunnelled(socketserver.StreamRequestHandler):
    rbufsize = 0  # what follows the greeting is not for us

    def greet(self):
        target = self.rfile.readline().decode().split(" ")[1]
        headers = http.client.parse_headers(self.rfile)
        self.server.asked.append((target, headers["Proxy-Authorization"]))
        self.wfile.write(self.server.greeting)

    def handle(self):
        self.greet()
        with socket.create_connection(("127.0.0.1", self.server.port)) as host:
            threading.Thread(target=_pump, args=(self.connection, host), daemon=True).start()
            _pump(host, self.connection)


class _Socks5(_Tunnelled):
    def greet(self):
        self.rfile.read(self.rfile.read(2)[1])  # the methods that it knows
        self.wfile.write(b"\5\0")
        assert self.rfile.read(4) == b"\5\1\0\3"  # connect to a name
        name = self.rfile.read(self.rfile.read(1)[0]).decode()
        self.server.asked.append((name, int.from_bytes(self.rfile.read(2), "big")))
        self.wfile.write(b"\5\0\0\1" + bytes(6))


def _pump(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
