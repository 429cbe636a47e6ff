"""What an image host may answer: callables for the `files` of stack.ImageHost."""

import contextlib
import time

from stack import reset

OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
NO_LENGTH = OK + b"Connection: close\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


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


def hang_up(_):
    """An end for `raw`: the connection is closed as usual."""


def hang(handler):
    """An end for `raw`: nothing more comes until the client gives up."""
    handler.connection.recv(1)


def cut(handler):
    """An end for `raw`: the connection is reset."""
    handler.wfile.flush()
    time.sleep(0.05)  # so that the first part arrives
    reset(handler.connection)
