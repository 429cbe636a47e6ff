"""Image files that are made on the spot, for tests of several files."""

import io
import struct
import zlib

from PIL import Image

ORIENTATION = 0x0112


def saved(image, kind, **options):
    """The bytes of an image file made by Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    """EXIF data that says how an image is turned."""
    made = Image.Exif()
    made[ORIENTATION] = orientation
    return made.tobytes()


def chunk(kind, data):
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, depth, colour, rows, *chunks):
    """A PNG byte by byte; `rows` are the unfiltered rows' bytes, `chunks` come before them."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows), 1)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
