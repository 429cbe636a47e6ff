"""Image files that are made on the spot, for tests of several files."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image


def saved(image, kind, **options):
    """The bytes of an image file made by Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def exif(orientation):
    """EXIF data that says how an image is turned."""
    made = Image.Exif()
    made[ExifTags.Base.Orientation] = orientation
    return made.tobytes()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, depth, colour, rows, *chunks):
    """A PNG byte by byte; `rows` are the unfiltered rows' bytes, `chunks` come before them."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows), 1)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(size, values, depth=8, order="<", **more):
    """A gray TIFF of one strip, byte by byte; `more` are other tags, as t322=1000."""
    tags = {256: size[0], 257: size[1], 258: depth, 259: 1, 262: 1, 273: 8, 277: 1}
    tags |= {278: size[1], 279: len(values)} | {int(t[1:]): value for t, value in more.items()}
    directory = struct.pack(order + "H", len(tags))
    for tag, value in sorted(tags.items()):
        directory += struct.pack(order + "HHII", tag, 4, 1, value)
    bits = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return bits + struct.pack(order + "I", 8 + len(values)) + values + directory + b"\0\0\0\0"


def icc_profile_of(kind, colours, tags):
    """An ICC profile, byte by byte, of these tags and those that each must have."""
    white = struct.pack(">3i", 63190, 65536, 54061)
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"made\0" + bytes(78)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0"} | tags
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + white
    directory, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        directory += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    pcs = b"Lab " if kind == b"prtr" else b"XYZ "
    header = struct.pack(">I4sI", start + len(body), b"lcms", 0x02100000) + kind + colours + pcs
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + white
    return header.ljust(128, b"\0") + directory + body
