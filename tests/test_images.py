"""Images: every kind of file that a shop has is seen as a browser shows it. What is rare, broken or
no image is refused by the name of what it is, and is never a wrong picture. CLIP gets the bits that
transformers gives.

Where a table holds colours or levels that no rule gives, Chromium 156 has drawn them.
"""

import io
import itertools
import random
import struct
import zlib
from collections import Counter

import numpy as np
import pillow_heif
import pytest
import tifffile
from conftest import alone
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from samples import bmp, chunk, exif, png, saved, tiff
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from generate_embeddings import (
    BROKEN,
    EMPTY,
    HEIC,
    JSON,
    OTHER_FORMAT,
    PDF,
    RARE_FORMAT,
    SVG,
    TOO_MUCH,
    TOO_SLOW,
    TOO_SMALL,
    WEB_PAGE,
    Decoder,
    ImageError,
    advice_on,
    decoded,
    in_srgb,
    levels_of,
    normalise,
    square,
    to_srgb,
)

pillow_heif.register_heif_opener()

PILLOW_WARNS = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged TIFF data
WHITE = (255, 255, 255)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def cases(table):
    """A test for each entry of a table, name -> arguments."""
    names, rows = list(table), list(table.values())
    return {"argvalues": rows, "ids": names}


def opened(data):
    return Image.open(io.BytesIO(data))


def seen(data):
    """What the product makes of a file, before it is cut to a square: uint8 (height, width, 3)."""
    image = in_srgb(decoded(data))
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(data):
    """The reason for which the product refuses a file. The page has an advice for it."""
    with pytest.raises(ImageError) as refusal:
        levels_of(data)
    assert advice_on(str(refusal.value))
    return str(refusal.value)


def without_segment(jpeg, marker):
    """A JPEG without its segments of this marker (0xEE: Adobe's)."""
    kept, at = jpeg[:2], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
        if jpeg[at + 1] != marker:
            kept += jpeg[at:end]
        at = end
    return kept + jpeg[at:]


def with_segment(jpeg, marker, data):
    """A JPEG with one more segment at its beginning."""
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + jpeg[2:]


def with_chunk(image, kind, data, *, wrong=False, at_end=False):
    """A PNG with one more chunk, before its pixels or after, whose checksum may be wrong."""
    made = saved(image, "PNG")
    added = chunk(kind, data)
    if wrong:
        added = added[:-1] + bytes([added[-1] ^ 1])
    at = made.index(b"IEND") - 4 if at_end else 33
    return made[:at] + added + made[at:]


def distance(a, b):
    """The greatest difference between two images' pixels."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def mean_distance(a, b):
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def shows(data, colour, most=0):
    """Whether a picture has one colour all over, up to `most` levels."""
    found = seen(data)
    return distance(found, np.full_like(found, colour)) <= most


@pytest.fixture(scope="module")
def upright(cat):
    return np.asarray(cat)


# --------------------------------------------------------------------------------------------------
# Orientation
# --------------------------------------------------------------------------------------------------

# How a camera stores an upright picture for each value of the tag: EXIF says where the stored
# picture's first row and first column belong.
STORED = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[:, ::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[::-1].swapaxes(0, 1),
}
TURNED = {  # mode, format, options, and how far the picture may be from its upright twin
    "PNG": ("RGB", "PNG", {}, 0),
    "TIFF": ("RGB", "TIFF", {}, 0),
    "TIFF LZW": ("RGB", "TIFF", {"compression": "tiff_lzw"}, 0),
    "JPEG": ("RGB", "JPEG", {"quality": 95}, 4),
    "progressive JPEG": ("RGB", "JPEG", {"quality": 95, "progressive": True}, 4),
    "gray JPEG": ("L", "JPEG", {"quality": 95}, 4),
    "CMYK JPEG": ("CMYK", "JPEG", {"quality": 95}, 4),
    "AVIF": ("RGB", "AVIF", {"quality": 100, "subsampling": "4:4:4"}, 2),
    "HEIC": ("RGB", "HEIF", {"quality": 95}, 4),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(("mode", "kind", "options", "most"), **cases(TURNED))
def test_a_turned_image_is_upright(cat, mode, kind, options, most, orientation):
    image = cat.convert(mode)
    turned = np.ascontiguousarray(STORED[orientation](np.asarray(image)))
    data = saved(Image.fromarray(turned, mode), kind, exif=exif(orientation), **options)
    assert mean_distance(seen(data), seen(saved(image, kind, **options))) <= most


def test_a_large_turned_jpeg_is_upright_after_it_was_reduced(cat):
    stored = cat.resize((2880, 1920)).transpose(Image.Transpose.ROTATE_90)
    found = decoded(saved(stored, "JPEG", exif=exif(6)))
    assert found.width * 2 == found.height * 3
    small = [np.asarray(image.resize((96, 64))) for image in (found, cat)]
    assert mean_distance(*small) < 4


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/">'
    b'<rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
)
EXIF = exif(6).removeprefix(b"Exif\0\0")
NOT_TURNED = {
    "WebP by EXIF": lambda cat: saved(cat, "WEBP", lossless=True, exif=exif(6)),
    "WebP by XMP": lambda cat: saved(cat, "WEBP", lossless=True, xmp=XMP),
    "PNG by XMP": lambda cat: with_chunk(cat, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "PNG by EXIF after the pixels": lambda cat: with_chunk(cat, b"eXIf", EXIF, at_end=True),
    "PNG by EXIF with a wrong checksum": lambda cat: with_chunk(cat, b"eXIf", EXIF, wrong=True),
    "TIFF by XMP": lambda cat: saved(cat, "TIFF", tiffinfo={700: XMP}),
    **{
        f"PNG by {value}": lambda cat, value=value: saved(cat, "PNG", exif=exif(value))
        for value in (0, 1, 9, 65535)
    },
}


@pytest.mark.parametrize("make", **cases(NOT_TURNED))
def test_what_browsers_do_not_turn_stays_as_it_is(cat, upright, make):
    assert np.array_equal(seen(make(cat)), upright)


@pytest.mark.parametrize(("orientation", "turned"), [(None, False), (1, False), (6, True)])
def test_a_jpeg_is_turned_by_exif_and_never_by_xmp(cat, orientation, turned):
    options = {"exif": exif(orientation)} if orientation else {}
    data = saved(cat, "JPEG", xmp=XMP, **options)
    assert (seen(data).shape == (96, 64, 3)) == turned


ORIENTATION_TAG = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01"  # then type, count, value, no next
BROKEN_EXIF = {
    "empty": b"Exif\0\0",
    "cut in the header": b"Exif\0\0II*\0",
    "no TIFF at all": b"Exif\0\0" + b"garbage" * 9,
    "directory beyond the end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "a directory of 65535 entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0" * 5,
    "orientation as text": ORIENTATION_TAG + b"\x02\0\x02\0\0\0six\0\0\0\0\0",
    "orientation without a value": ORIENTATION_TAG + b"\x03\0" + bytes(12),
    "two orientations": ORIENTATION_TAG + b"\x03\0\x02\0\0\0\x01\0\x01\0" + bytes(4),
}


@PILLOW_WARNS
@pytest.mark.parametrize("data", **cases(BROKEN_EXIF))
def test_broken_exif_costs_nothing_but_the_orientation(cat, upright, data):
    jpeg = saved(cat, "JPEG", quality=95)
    assert np.array_equal(seen(with_segment(jpeg, 0xE1, data)), seen(jpeg))
    assert np.array_equal(seen(with_chunk(cat, b"eXIf", data.removeprefix(b"Exif\0\0"))), upright)


# --------------------------------------------------------------------------------------------------
# Transparency
# --------------------------------------------------------------------------------------------------

SHADES = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))  # 64 x 32, left to right


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGBA", "PNG", {}),
        ("RGBA", "WEBP", {"lossless": True, "exact": True}),
        ("RGBA", "TIFF", {}),
        ("LA", "PNG", {}),
        ("LA", "TIFF", {}),
    ],
)
def test_an_alpha_channel_is_laid_on_white(cat, mode, kind, options):
    image = cat.resize((64, 32)).convert(mode.removesuffix("A"))
    colours = np.asarray(image.convert("RGB"))
    image.putalpha(Image.fromarray(SHADES))
    share = SHADES[..., None] / 255
    expected = colours * share + 255 * (1 - share)
    assert np.abs(seen(saved(image, kind, **options)) - expected).max() <= 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True, "exact": True}),
        ("WEBP", {"quality": 80}),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
        ("HEIF", {"quality": 100}),
    ],
)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 0, 255)])
def test_colour_behind_full_transparency_never_shows(kind, options, colour):
    image = Image.new("RGBA", (64, 64), (*colour, 0))
    image.paste((0, 128, 0, 255), (16, 16, 48, 48))
    found = seen(saved(image, kind, **options))
    assert distance(found[:12], np.full((12, 64, 3), 255)) <= 2
    assert distance(found[20:44, 20:44], np.full((24, 24, 3), (0, 128, 0))) <= 8


def halves(left, right, mode="P"):
    """32 x 32: one value on the left, another on the right."""
    image = Image.new(mode, (32, 32), left)
    image.paste(right, (16, 0, 32, 32))
    return image


def palette(*colours):
    image = halves(0, 1)
    image.putpalette(list(itertools.chain(*colours)))
    return image


def sides(data):
    """The two colours of `halves`."""
    found = seen(data)
    left, right = found[0, 0], found[0, -1]
    assert (found[:, :16] == left).all()
    assert (found[:, 16:] == right).all()
    return tuple(left.tolist()), tuple(right.tolist())


def gray_png(depth, values, transparent):
    """A PNG of 32 x 32, its columns of these gray values, one of them transparent."""
    bits = "".join(f"{values[column * len(values) // 32]:0{depth}b}" for column in range(32))
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return png((32, 32), depth, 0, [row] * 32, chunk(b"tRNS", struct.pack(">H", transparent)))


def deep_png(colour, row, *chunks):
    """A PNG of 32 x 32 and 16 bits a channel."""
    return png((32, 32), 16, colour, [struct.pack(f">{len(row)}H", *row)] * 32, *chunks)


PALE = palette((200, 0, 0), (0, 0, 200))
TRANSPARENT = {  # what is seen on the left and on the right
    "an index of a PNG": (saved(PALE, "PNG", transparency=0), WHITE, (0, 0, 200)),
    "an index of a GIF": (saved(PALE, "GIF", transparency=0), WHITE, (0, 0, 200)),
    "an alpha for each index": (
        saved(palette(RED, BLUE), "PNG", transparency=bytes([128, 0])),
        (255, 127, 127),
        WHITE,
    ),
    "alphas for some": (saved(palette(RED, BLUE), "PNG", transparency=b"\0"), WHITE, BLUE),
    "a gray": (gray_png(8, [10, 77], 10), WHITE, (77, 77, 77)),
    "a gray with more bits than there are": (gray_png(8, [10, 77], 0x10A), WHITE, (77, 77, 77)),
    "a colour": (saved(halves(RED, BLUE, "RGB"), "PNG", transparency=RED), WHITE, BLUE),
    "alpha of 16 bits": (deep_png(4, [99, 0] * 16 + [40000, 65535] * 16), WHITE, (156,) * 3),
    "alpha of 16 bits in colour": (
        deep_png(6, [9, 9, 9, 0] * 16 + [0, 0, 65535, 65535] * 16, chunk(b"tRNS", bytes(6))),
        WHITE,
        BLUE,
    ),
}


@pytest.mark.parametrize(("data", "left", "right"), **cases(TRANSPARENT))
def test_where_an_image_is_transparent_there_is_white(data, left, right):
    assert sides(data) == (left, right)


def gif(frame, *, transparent=False, background=0):
    """A GIF of 32 x 32, red and blue by index, with one blue pixel at `frame`."""
    screen = struct.pack("<HHBBB", 32, 32, 0x80, background, 0) + bytes([*RED, *BLUE])
    control = b"\x21\xf9\x04\x01\0\0\0\0" if transparent else b""  # index 0 is transparent
    # Codes clear, 1, end in 3 bits each
    picture = b"\x2c" + struct.pack("<HHHHB", *frame, 1, 1, 0) + b"\x02\x02\x4c\x01\0"
    return b"GIF89a" + screen + control + picture + b";"


@pytest.mark.parametrize("transparent", [True, False])
@pytest.mark.parametrize("background", [0, 1])
def test_around_a_gif_that_is_smaller_than_its_canvas_there_is_white(transparent, background):
    found = seen(gif((4, 5), transparent=transparent, background=background))
    expected = np.full((32, 32, 3), 255)
    expected[5, 4] = BLUE
    assert np.array_equal(found, expected)


# --------------------------------------------------------------------------------------------------
# Depths and colour spaces
# --------------------------------------------------------------------------------------------------

LEVELS16 = np.linspace(0, 65535, 64).astype(np.uint16)
LEVELS8 = np.tile((LEVELS16 >> 8)[None, :, None], (32, 1, 3))


def planes(order, packed):
    """A TIFF of 16 bits a value with a strip for each colour."""
    file = io.BytesIO()
    values = np.tile(LEVELS16, (3, 32, 1))
    options = {"planarconfig": "separate", "byteorder": order, "photometric": "rgb"}
    tifffile.imwrite(file, values, compression="zlib" if packed else None, **options)
    return file.getvalue()


def row_of(values, times=1):
    return np.repeat(values, times).astype(">u2").tobytes()


SIXTEEN_BITS = {
    "gray PNG": png((64, 32), 16, 0, [row_of(LEVELS16)] * 32),
    "PNG": png((64, 32), 16, 2, [row_of(LEVELS16, 3)] * 32),
    "TIFF": tiff((64, 32), row_of(LEVELS16, 3) * 32, 16, ">", t262=2, t277=3),
    "planes": planes("<", False),
    "planes, big-endian": planes(">", False),
    "planes, packed": planes("<", True),
    "planes, packed, big-endian": planes(">", True),
}


@pytest.mark.parametrize("data", **cases(SIXTEEN_BITS))
def test_sixteen_bits_are_scaled_to_eight(data):
    assert distance(seen(data), LEVELS8) == 0


def test_bilevel_palette_and_gray_images_keep_their_shades(cat):
    gray = cat.convert("L")
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        assert sides(saved(halves(0, 1, "1"), kind)) == ((0, 0, 0), WHITE)
        assert sides(saved(PALE, kind)) == ((200, 0, 0), (0, 0, 200))
    for kind in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(seen(saved(gray, kind)), np.dstack([np.asarray(gray)] * 3))
    for compression in ("group3", "group4"):  # a fax
        data = saved(halves(0, 1, "1"), "TIFF", compression=compression)
        assert sides(data) == ((0, 0, 0), WHITE)
    white_is_zero = tiff((32, 32), b"\xff\xff\0\0" * 32, depth=1, t262=0)
    assert sides(white_is_zero) == ((0, 0, 0), WHITE)


# Inks of 0..255 and how they look without a profile.
INKS = {
    (0, 0, 0, 0): WHITE,
    (255, 255, 0, 0): BLUE,
    (0, 255, 255, 0): RED,
    (255, 0, 255, 0): GREEN,
    (0, 0, 0, 255): (0, 0, 0),
    (0, 0, 0, 100): (155, 155, 155),
}


def adobe(inks):
    """Pillow writes CMYK JPEGs as Adobe does: inverted, and with Adobe's marker."""
    data = saved(Image.new("CMYK", (32, 32), inks), "JPEG", quality=95)
    assert b"Adobe" in data
    return data


def plain(inks):
    """The same values without the marker: browsers take them as inverted, too."""
    return without_segment(adobe(inks), 0xEE)


def ycck(inks):
    """Adobe's other form: the inks' cyan, magenta and yellow as luma and chroma."""
    cmy = Image.new("RGB", (32, 32), inks[:3]).convert("YCbCr")
    key = Image.new("L", (32, 32), 255 - inks[3])
    stored = Image.merge("CMYK", [*cmy.split(), key])
    data = saved(Image.eval(stored, lambda value: 255 - value), "JPEG", quality=95)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    return data[:at] + b"\2" + data[at + 1 :]


def printer_tiff(inks):
    return saved(Image.new("CMYK", (32, 32), inks), "TIFF", compression="tiff_lzw")


@pytest.mark.parametrize("make", [adobe, plain, ycck, printer_tiff])
@pytest.mark.parametrize(("inks", "colour"), INKS.items())
def test_cmyk_has_the_right_colours(make, inks, colour):
    assert shows(make(inks), colour, 6)


def icc_profile(kind, colours, tags):
    """An ICC profile, byte by byte."""
    white = xyz(0.9642, 1, 0.8249)
    description = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"made\0" + bytes(78)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": white} | tags
    directory, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        directory += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    pcs = b"Lab " if kind == b"prtr" else b"XYZ "
    header = struct.pack(">I4sI", start + len(body), b"lcms", 0x02100000) + kind + colours + pcs
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + white[8:]
    return header.ljust(128, b"\0") + directory + body


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(gamma, red, green, blue):
    """A profile of a screen: its primaries' XYZ, and one gamma for all."""
    tags = {b"rXYZ": xyz(*red), b"gXYZ": xyz(*green), b"bXYZ": xyz(*blue)}
    return icc_profile(
        b"mntr", b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))
    )


def gray_profile(gamma):
    return icc_profile(b"mntr", b"GRAY", {b"kTRC": curve(gamma)})


def ink_profile(lab):
    """A profile of a printer: `lab` gives the colour of each of the 16 ways to print an ink or not
    as (L, a, b)."""
    table = b"".join(
        struct.pack("BBB", round(light * 2.55), a + 128, b + 128)
        for light, a, b in map(lab, itertools.product((0, 1), repeat=4))
    )
    identity = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    return icc_profile(b"prtr", b"CMYK", {b"A2B0": lut})


def violet_cyan(inks):
    """Inks of which the cyan one prints violet, magenta and yellow nothing, the fourth black."""
    if inks[3]:
        return (0, 0, 0)
    return (30, 60, -80) if inks[0] else (100, 0, 0)


def test_the_icc_profile_of_a_cmyk_image_decides_its_colours():
    profile = ink_profile(violet_cyan)
    ImageCms.ImageCmsProfile(io.BytesIO(profile))  # it is one
    inks = halves((255, 0, 0, 0), (0, 255, 0, 0), "CMYK")
    marked = saved(inks, "JPEG", quality=100, icc_profile=profile)
    for data in (marked, without_segment(marked, 0xEE), saved(inks, "TIFF", icc_profile=profile)):
        found = seen(data).astype(int)
        red, green, blue = found[16, 4]
        assert blue > 150 > red > green  # violet
        assert found[16, 28].min() > 245  # magenta prints nothing


P3 = rgb_profile(2.2, (0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE = rgb_profile(
    2.2, (0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)
)
PROPHOTO = rgb_profile(
    1.8, (0.7977, 0.2880, 0.0000), (0.1352, 0.7119, 0.0000), (0.0313, 0.0001, 0.8249)
)
LINEAR = rgb_profile(
    1.0, (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7139)
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
STORED_COLOURS = [(200, 50, 50), (50, 200, 50), (50, 50, 200), (20, 90, 90)]
SHOWN_COLOURS = {
    "Display P3": (P3, [(219, 14, 35), (0, 205, 0), (46, 46, 209), (0, 91, 90)]),
    "Adobe RGB": (ADOBE, [(232, 46, 46), (0, 201, 12), (46, 46, 205), (0, 90, 90)]),
    "ProPhoto": (PROPHOTO, [(255, 0, 62), (0, 229, 0), (0, 64, 223), (0, 119, 110)]),
    "linear": (LINEAR, [(229, 122, 122), (122, 229, 122), (122, 122, 229), (79, 160, 160)]),
    "sRGB": (SRGB, STORED_COLOURS),
    "one of gray": (gray_profile(1.0), STORED_COLOURS),
    "one of ink": (ink_profile(violet_cyan), STORED_COLOURS),
    "a cut one": (P3[:200], STORED_COLOURS),
    "none": (b"", STORED_COLOURS),
}
FORMATS_WITH_PROFILES = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "JPEG": {"quality": 100, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("kind", FORMATS_WITH_PROFILES)
@pytest.mark.parametrize(("profile", "shown"), SHOWN_COLOURS.values(), ids=SHOWN_COLOURS)
def test_colours_are_those_that_a_browser_makes_of_the_icc_profile(kind, profile, shown):
    image = Image.new("RGB", (64, 16))
    for n, colour in enumerate(STORED_COLOURS):
        image.paste(colour, (n * 16, 0, n * 16 + 16, 16))
    data = saved(image, kind, icc_profile=profile, **FORMATS_WITH_PROFILES[kind])
    assert distance(seen(data)[8, 8::16], np.array(shown)) <= 4


def test_palettes_and_transparent_images_have_a_profile_as_well():
    image = Image.new("RGB", (32, 32), STORED_COLOURS[0])
    for stored in (image.quantize(2), image.convert("RGBA")):
        found = seen(saved(stored, "PNG", icc_profile=P3))
        assert distance(found, np.full((32, 32, 3), (219, 14, 35))) <= 1


@pytest.mark.parametrize(
    ("profile", "shown"),
    [(gray_profile(1.8), (119, 210)), (PROPHOTO, (119, 210)), (P3, (100, 200)), (SRGB, (100, 200))],
    ids=["of gray", "of RGB", "of P3", "of sRGB"],
)
@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_gray_images_are_converted_by_profiles_of_gray_and_of_rgb(profile, shown, mode):
    image = halves(100, 200, "L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    left, right = sides(saved(image, "PNG", icc_profile=profile))
    assert np.abs(np.array([left[0], right[0]]) - shown).max() <= 1


@pytest.mark.parametrize("profile", [b"", b"garbage", ink_profile(violet_cyan)[:300], SRGB])
def test_a_profile_that_is_broken_or_does_not_fit_is_done_without(profile):
    inks = Image.new("CMYK", (32, 32), (255, 255, 0, 0))
    found = seen(saved(inks, "JPEG", quality=95, icc_profile=profile))
    assert distance(found, np.full((32, 32, 3), BLUE)) <= 6


# --------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------

FORMATS = {  # format, options, and how far the picture may be from what was saved
    "PNG": ("PNG", {}, 0),
    "BMP": ("BMP", {}, 0),
    "TIFF": ("TIFF", {}, 0),
    "TIFF LZW": ("TIFF", {"compression": "tiff_lzw"}, 0),
    "TIFF deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}, 0),
    "TIFF packbits": ("TIFF", {"compression": "packbits"}, 0),
    "TIFF JPEG": ("TIFF", {"compression": "jpeg", "quality": 90}, 8),
    "lossless WebP": ("WEBP", {"lossless": True}, 0),
    "WebP": ("WEBP", {"quality": 90}, 8),
    "JPEG": ("JPEG", {"quality": 90}, 8),
    "gray JPEG": ("JPEG", {"quality": 90}, 8),
    "progressive JPEG": ("JPEG", {"quality": 90, "progressive": True}, 8),
    "JPEG with restarts": ("JPEG", {"subsampling": "4:4:4", "restart_marker_rows": 1}, 8),
    "MPO": ("MPO", {"quality": 90}, 8),
    "AVIF": ("AVIF", {"quality": 90}, 8),
    "HEIC": ("HEIF", {"quality": 90}, 8),
    "GIF": ("GIF", {}, 8),
}


@pytest.mark.parametrize(("kind", "options", "most"), **cases(FORMATS))
def test_every_format_gives_its_picture(cat, upright, kind, options, most):
    assert mean_distance(seen(saved(cat, kind, **options)), upright) <= most


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("PNG", {"default_image": True}),
        ("TIFF", {}),
        ("MPO", {"quality": 95}),
        ("AVIF", {"quality": 100}),
    ],
)
def test_of_several_frames_or_pages_the_first_counts(kind, options):
    frames = [Image.new("RGB", (64, 48), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(opened(data), "n_frames", 1) == 3
    assert shows(data, RED, 4)


def large(mode):
    """4 megapixels, blue on the left, and on the right transparent or white."""
    image = halves((*BLUE, 255), (9, 9, 9, 0), "RGBA")
    if mode != "RGBA":
        page = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(page, image).convert(mode)
    return image.resize((2048, 2048), Image.Resampling.NEAREST)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("RGBA", "WEBP", {"lossless": True, "method": 0}),
        ("P", "PNG", {}),
        ("CMYK", "JPEG", {}),
        ("CMYK", "TIFF", {}),
    ],
)
def test_large_images_are_seen_as_small_ones_are(mode, kind, options):
    found = seen(saved(large(mode), kind, **options))
    assert found.shape[0] < 2048
    for side, colour in ((found[:, :240], BLUE), (found[:, -240:], WHITE)):
        assert np.abs(side.astype(int) - colour).max() <= 6


def test_a_bitmap_stored_from_the_top_down_is_not_upside_down():
    blue, red = bytes(BLUE[::-1]) * 512, bytes(RED[::-1]) * 512
    for data in (bmp((32, -32), pixels=blue + red), bmp((32, 32), pixels=red + blue)):
        assert tuple(seen(data)[0, 0]) == BLUE
        assert tuple(seen(data)[-1, 0]) == RED


@pytest.mark.parametrize(
    ("kind", "brand"),
    [("AVIF", b"mif1"), ("AVIF", b"msf1"), ("HEIF", b"mif1"), ("HEIF", b"msf1"), ("HEIF", b"heix")],
)
def test_the_first_brand_of_an_avif_or_heic_may_be_a_general_one(cat, upright, kind, brand):
    data = saved(cat, kind, quality=95)
    assert mean_distance(seen(data[:8] + brand + data[12:]), upright) < 4


def test_a_heic_image_without_pillow_heif_is_refused_as_what_it_is(cat, tmp_path):
    (tmp_path / "a.heic").write_bytes(saved(cat, "HEIF"))
    program = """
sys.modules["pillow_heif"] = None
import generate_embeddings as product
try:
    product.levels_of(open(sys.argv[1], "rb").read())
except product.ImageError as error:
    print(json.dumps(str(error)))
"""
    assert alone(program, tmp_path / "a.heic") == HEIC


# --------------------------------------------------------------------------------------------------
# Broken, or whole all the same
# --------------------------------------------------------------------------------------------------


ASIDE = {  # chunks without which the picture is the same
    "tEXt": b"Comment\0made by hand",
    "zTXt": b"Comment\0\0" + zlib.compress(b"x" * 3_000_000),
    "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000),
    "pHYs": struct.pack(">IIB", 2835, 2835, 1),
    "tIME": struct.pack(">HBBBBB", 2026, 1, 2, 3, 4, 5),
    "acTL": struct.pack(">II", 2, 0),
    "teSt": b"of an editor's own",
}
WRONG = {  # chunks that browsers use only with the right checksum
    "iCCP": b"p\0\0" + zlib.compress(P3),
    "tRNS": struct.pack(">3H", *WHITE),
    "eXIf": EXIF,
}


@pytest.mark.parametrize("at_end", [False, True], ids=["before the pixels", "after"])
@pytest.mark.parametrize("kind", [*ASIDE, *WRONG])
def test_a_png_is_not_broken_by_what_makes_no_pixels(cat, upright, kind, at_end):
    content = (ASIDE | WRONG)[kind]
    for wrong in {True, kind in WRONG}:
        data = with_chunk(cat, kind.encode(), content, wrong=wrong, at_end=at_end)
        assert np.array_equal(seen(data), upright)


def test_an_icc_profile_may_be_large():
    profile = icc_profile(b"mntr", b"GRAY", {b"kTRC": curve(1.8), b"zzzz": bytes(2_000_000)})
    gray = Image.new("L", (32, 32), 100)
    assert shows(with_chunk(gray, b"iCCP", b"p\0\0" + zlib.compress(profile)), 119, 1)


@pytest.mark.parametrize("kind", ["IHDR", "PLTE", "IDAT"])
def test_a_png_is_broken_by_a_wrong_checksum_in_what_makes_its_pixels(cat, kind):
    data = bytearray(saved(cat.quantize(16), "PNG"))
    at = data.index(kind.encode())
    data[at + 4 + int.from_bytes(data[at - 4 : at])] ^= 1
    assert refused(bytes(data)) == BROKEN


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "with restarts": {"restart_marker_rows": 1},
    "full colour": {"subsampling": "4:4:4", "quality": 98},
}
FILM = b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + random.Random(1).randbytes(200_000)
WHOLE = {  # ends of files of which all pixels are there
    "1 byte gone": lambda data: data[:-1],
    "2 bytes gone": lambda data: data[:-2],
    "text there": lambda data: data[:-2] + b"made by a camera",
    "text and zeros after it": lambda data: data + b"made by a scanner" + bytes(9999),
    "a film and a box of zeros after it": lambda data: data + FILM + bytes(9000),
    "a gain map after it": lambda data: data + saved(Image.new("L", (40, 30)), "JPEG"),
    "a gain map without its end after it": lambda data: (
        data + saved(Image.new("L", (40, 30)), "JPEG")[:-2]
    ),
}
NOT_WHOLE = {
    **{f"{n} bytes gone": lambda data, n=n: data[:-n] for n in (3, 4, 10, 1000)},
    "half gone": lambda data: data[: len(data) // 2],
    "half gone, text there": lambda data: data[: len(data) // 2] + b"<b>Time-out</b>",
    "half gone, half a marker there": lambda data: data[: len(data) // 2] + b"\xff",
    # A copy that stopped. Some of these zeros make pixels, too.
    **{
        f"{n} bytes gone, {zeros} zeros there": lambda data, n=n, zeros=zeros: (
            data[:-n] + bytes(zeros)
        )
        for n, zeros in ((3, 3), (10, 8), (10, 9000), (100, 100), (900, 900), (900, 9000))
    },
}


@pytest.mark.parametrize("change", **cases(WHOLE))
@pytest.mark.parametrize("options", **cases(JPEGS))
def test_a_jpeg_is_whole_if_all_its_pixels_are_there(cat, options, change):
    data = saved(cat, "JPEG", **options)
    assert data.endswith(b"\xff\xd9")
    assert np.array_equal(seen(change(data)), seen(data))


@pytest.mark.parametrize("change", **cases(NOT_WHOLE))
@pytest.mark.parametrize("options", **cases(JPEGS))
def test_a_jpeg_that_lost_pixels_is_broken(cat, options, change):
    assert refused(change(saved(cat, "JPEG", **options))) == BROKEN


def test_the_end_of_a_jpegs_thumbnail_is_not_its_own(cat):
    thumbnail = saved(cat.resize((32, 32)), "JPEG")
    data = with_segment(
        saved(cat, "JPEG"), 0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail
    )
    assert np.array_equal(seen(data[:-2]), seen(data))
    assert refused(data[:-200]) == BROKEN


def test_zeros_never_stand_for_pixels():
    """Where white is one bit, optimised tables write it as 0."""
    image = Image.new("RGB", (320, 640), "white")
    image.paste(noise(300, 200), (10, 10))
    data = saved(image, "JPEG", optimize=True)
    for left in range(2000, len(data), 3000):
        assert refused(data[:left] + bytes(len(data) - left)) == BROKEN


CUT = {  # format, options, and what a file says that was cut off
    "JPEG": ("JPEG", {}, BROKEN),
    "progressive JPEG": ("JPEG", {"progressive": True}, BROKEN),
    "PNG": ("PNG", {}, BROKEN),
    "GIF": ("GIF", {}, BROKEN),
    "WebP": ("WEBP", {}, BROKEN),
    "lossless WebP": ("WEBP", {"lossless": True}, BROKEN),
    "AVIF": ("AVIF", {}, BROKEN),
    "HEIC": ("HEIF", {}, BROKEN),
    "BMP": ("BMP", {}, BROKEN),
    "TIFF": ("TIFF", {}, BROKEN),
    "TIFF LZW": ("TIFF", {"compression": "tiff_lzw"}, f"{RARE_FORMAT} (TIFF, if it is not broken)"),
}


@PILLOW_WARNS
@pytest.mark.parametrize(("kind", "options", "reason"), **cases(CUT))
def test_of_a_file_that_was_cut_off_nothing_is_seen(cat, kind, options, reason):
    data = saved(cat.resize((192, 128)), kind, **options)
    for share in (0.2, 0.5, 0.8, 0.95):
        kept = int(len(data) * share)
        assert refused(data[:kept]) == reason
        if kind in ("JPEG", "PNG", "GIF"):  # a copy that stopped halfway
            assert refused(data[:kept] + bytes(len(data) - kept + 4096)) == reason
    for length in (1, 2, 4, 8, 12, 16, 24, 32):
        assert refused(data[:length])


@pytest.mark.parametrize("kind", ["MPO", "PNG", "GIF", "WEBP"])
def test_what_follows_the_end_of_a_file_does_no_harm(cat, kind):
    data = saved(cat, kind)
    for end in (bytes(9999), b"made by a scanner" + bytes(9999)):
        assert np.array_equal(seen(data + end), seen(data))


# --------------------------------------------------------------------------------------------------
# Rare, no image at all, or too small
# --------------------------------------------------------------------------------------------------


def a_tiff(**tags):
    return tiff((32, 32), bytes(32 * 32 * 12), **tags)


COLOUR = [0x1234, 0x5678, 0x9ABC]
RARE = {
    **{
        f"transparent gray of {depth} bits": (
            gray_png(depth, [0, 1], 1),
            f"({depth}-bit PNG with a transparent colour)",
        )
        for depth in (1, 2, 4, 16)
    },
    "transparent colour of 16 bits": (
        deep_png(2, COLOUR * 32, chunk(b"tRNS", struct.pack(">3H", *COLOUR))),
        "(16-bit PNG with a transparent colour)",
    ),
    "TIFF of 16 bits": (a_tiff(depth=16), "(TIFF with pixels of mode I;16)"),
    "TIFF of 16 bits, white is zero": (a_tiff(depth=16, t262=0), "(TIFF with pixels"),
    "big-endian TIFF of 16 bits": (a_tiff(depth=16, order=">"), "(TIFF with pixels"),
    "TIFF of 12 bits": (a_tiff(depth=12), "(TIFF with pixels"),
    "TIFF of 32 bits": (a_tiff(depth=32), "(TIFF with pixels of mode I)"),
    "TIFF of floats": (a_tiff(depth=32, t339=3), "(TIFF with pixels of mode F)"),
    "TIFF of Lab colours": (
        saved(Image.new("LAB", (32, 32)), "TIFF"),
        "(TIFF with pixels of mode LAB)",
    ),
    "big-endian TIFF of 16 bits, white is zero": (a_tiff(depth=16, order=">", t262=0), "(TIFF, if"),
    "TIFF of floats in colour": (a_tiff(depth=32, t262=2, t277=3, t339=3), "(TIFF, if"),
    "TIFF of an unknown compression": (a_tiff(t259=34712), "(TIFF, if it is not broken)"),
    "TIFF of a camera's sensor": (a_tiff(depth=16, t262=32803), "(TIFF, if it is not broken)"),
    "JPEG XL": (b"\xff\x0a" + bytes(60), "(JPEG XL)"),
    "JPEG XL in boxes": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "(JPEG XL)"),
}


@PILLOW_WARNS
@pytest.mark.parametrize(("data", "detail"), **cases(RARE))
def test_a_rare_kind_is_refused_by_its_name(data, detail):
    assert refused(data).startswith(f"{RARE_FORMAT} {detail}")


DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><path d="M0 0"/></svg>'
PROLOG = b'<?xml version="1.0" encoding="UTF-8"?>\n'
DOCTYPE = b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x.dtd" [<!ENTITY a "b">]>'
PAGE = "<!-- saved -->\n<html><body>Not found</body></html>"
NO_IMAGES = {
    "nothing": (b"", EMPTY),
    "blanks": (b" \r\n", EMPTY),
    "svg": (DRAWING, SVG),
    "svg with a prolog": (PROLOG + DRAWING, SVG),
    "svg with a doctype": (PROLOG + DOCTYPE + DRAWING, SVG),
    "svg with a BOM": (b"\xef\xbb\xbf" + DRAWING, SVG),
    "svg with a namespace": (PROLOG + b'<svg:svg xmlns:svg="x"/>', SVG),
    "svg after a comment": (PROLOG + b"<!-- " + b"x" * 3000 + b" -->" + DRAWING, SVG),
    "html": (b"<!DOCTYPE html><html><body>Not found</body></html>", WEB_PAGE),
    "html without a doctype": (b"\r\n <HTML lang=en><head></head></html>", WEB_PAGE),
    "html with a BOM": (b"\xef\xbb\xbf<!doctype html><title>x</title>", WEB_PAGE),
    "html after a comment": (PAGE.encode(), WEB_PAGE),
    "html in UTF-16": (PAGE.encode("utf-16"), WEB_PAGE),
    "html in UTF-16, big-endian": (b"\xfe\xff" + PAGE.encode("utf-16-be"), WEB_PAGE),
    "html in which an svg is": (b"<!DOCTYPE html><html>" + DRAWING + b"</html>", WEB_PAGE),
    "a part of a page": (b"<p>We draw every svg</p>" + DRAWING, WEB_PAGE),
    "a script": (b"<script>location = '/login'</script>", WEB_PAGE),
    "xhtml": (PROLOG + b'<html xmlns="http://www.w3.org/1999/xhtml"/>', WEB_PAGE),
    "an error of a storage": (PROLOG + b"<Error><Code>NoSuchKey</Code></Error>", WEB_PAGE),
    "json": (b'{"error": "not found"}', JSON),
    "a list": (b'\xef\xbb\xbf [1, "<svg>"]', JSON),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", PDF),
    "text": (b"404 page not found", OTHER_FORMAT),
    "zip": (b"PK\3\4" + bytes(60), OTHER_FORMAT),
    "a film": (FILM, OTHER_FORMAT),
    "zeros": (bytes(2000), OTHER_FORMAT),
    "ICO": (saved(Image.new("RGB", (32, 32)), "ICO"), OTHER_FORMAT),
    "EPS, which Pillow would start a program for": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n",
        OTHER_FORMAT,
    ),
}


@pytest.mark.parametrize(("data", "reason"), **cases(NO_IMAGES))
def test_what_is_no_image_is_refused_as_what_it_is(data, reason):
    assert refused(data) == reason


def test_a_tracking_pixel_or_spacer_is_too_small():
    for size in ((1, 1), (15, 15), (15, 400), (400, 15)):
        for kind in ("PNG", "GIF", "JPEG"):
            data = saved(Image.new("RGB", size, RED), kind)
            assert refused(data) == f"{TOO_SMALL} ({size[0]} x {size[1]})"
    assert decoded(saved(Image.new("RGB", (16, 16), RED), "PNG")).size == (16, 16)


# What an upgrade of Pillow may take away, or a change of ours may miss
DEFECTS = [
    (Image.Image, "reduce", AttributeError),
    (Image.Image, "draft", AttributeError),
    (Image.Image, "resize", TypeError),
    (Image.Image, "getexif", AttributeError),
    (ImageCms, "buildTransform", AttributeError),
    (Image, "open", TypeError),
]


@pytest.mark.parametrize(("owner", "name", "error"), DEFECTS)
def test_a_defect_is_never_the_files_fault(cat, monkeypatch, owner, name, error):
    data = saved(cat.resize((1400, 950)), "PNG", icc_profile=P3)
    to_srgb.cache_clear()

    def failing(*arguments, **options):
        raise error(name)

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(error, match=name):
        levels_of(data)


# --------------------------------------------------------------------------------------------------
# What CLIP gets
# --------------------------------------------------------------------------------------------------

PROCESSOR = CLIPImageProcessorPil()


def pixels_of_transformers(image):
    return PROCESSOR(image, return_tensors="np")["pixel_values"][0]


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def preprocess(image):
    return normalise(np.asarray(in_srgb(square(image))))


def same_bits(a, b):
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


SIZES = [
    *[(n, n) for n in (16, 17, 100, 223, 224, 225, 447, 448, 449, 1343, 2000)],
    *[(224, 225), (225, 224), (224, 448), (223, 2000), (2000, 223), (640, 480), (481, 641)],
    *[(1333, 1000), (1001, 1999), (1999, 1001), (333, 500), (30, 47)],
    *[(225, 451), (300, 1000), (451, 225), (1000, 300)],  # Pillow may do the rows first
    *[(16, 1600), (1600, 16), (17, 1700), (20, 2000), (1999, 20)],
]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_preprocessing_gives_the_bits_of_transformers(width, height):
    image = noise(width, height)
    assert same_bits(preprocess(image), pixels_of_transformers(image))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(16, 700), st.integers(16, 700), st.integers(0, 9))
@example(16, 700, 0)
def test_preprocessing_gives_the_bits_of_transformers_at_any_size(width, height, seed):
    image = noise(width, height, seed)
    assert same_bits(preprocess(image), pixels_of_transformers(image))


def test_a_photograph_gives_the_bits_of_transformers_from_the_same_file(photos):
    small = {name: data for name, data in photos.items() if min(opened(data).size) < 896}
    assert len(small) > 15
    for data in small.values():
        expected = pixels_of_transformers(opened(data).convert("RGB"))
        assert same_bits(preprocess(decoded(data)), expected)


def mosaic(pictures, side):
    """A square of nine photographs: real detail at a size that none of them has."""
    third = side // 3
    image = Image.new("RGB", (third * 3, third * 3))
    for n, picture in enumerate(pictures):
        image.paste(picture.resize((third, third)), (n % 3 * third, n // 3 * third))
    return image


@pytest.fixture
def one_thread():
    """Torch's threads wait for each other in a loop: on a busy machine one alone is far faster."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_reducing_large_images_first_hardly_moves_their_vectors(photos, full):
    """Relative to the distance between photographs; measured: up to 0.6 % (JPEG), 0.8 % (PNG)."""
    from models import reference as vectors_of

    pictures = [opened(data).convert("RGB") for data in photos.values()]
    large = [
        mosaic(random.Random(n).sample(pictures, 9), side)
        for n, side in enumerate((900, 1350, 1500, 2100))
    ]
    jpegs = [saved(image, "JPEG", quality=95) for image in large]
    whole = [opened(data).convert("RGB") for data in jpegs]
    pngs = [saved(image, "PNG", compress_level=0) for image in whole]
    reduced = [decoded(data) for data in jpegs + pngs]
    for image, original in zip(reduced, whole * 2, strict=True):
        assert 2 * 224 <= image.width < original.width

    vectors = vectors_of(full, [*pictures, *whole, *reduced])
    different, exact, jpeg, png = np.split(vectors, np.cumsum([len(pictures), 4, 4]))
    between = np.linalg.norm(different[:, None] - different[None], axis=2)
    between = np.median(between[np.triu_indices(len(pictures), 1)])
    for found, usual, most in ((jpeg, 0.005, 0.01), (png, 0.007, 0.012)):
        moved = np.linalg.norm(found - exact, axis=1) / between
        assert np.median(moved) < usual
        assert moved.max() < most


# --------------------------------------------------------------------------------------------------
# Anything at all
# --------------------------------------------------------------------------------------------------


def seeds(cat):
    """Small files of every format, to be damaged."""
    small = cat.resize((40, 32))
    frames = [Image.new("RGB", (40, 32), colour) for colour in (RED, GREEN)]
    film = {"save_all": True, "append_images": frames}
    return [
        *(saved(small, kind, **options) for kind, options, _ in FORMATS.values()),
        *(saved(small, kind, **film) for kind in ("MPO", "PNG", "GIF", "WEBP")),
        saved(small, "JPEG", exif=exif(6)),
        saved(small.convert("CMYK"), "JPEG", icc_profile=ink_profile(violet_cyan)),
        saved(small.convert("P"), "PNG", transparency=bytes(range(200)), exif=exif(5)),
        saved(small.convert("P"), "BMP"),
        saved(halves(0, 1, "1"), "TIFF", compression="group4"),
        SIXTEEN_BITS["gray PNG"],
        SIXTEEN_BITS["planes"],
    ]


def damaged(data, dice):
    """A copy with a few random changes, most of them near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        length = max(1, len(data))
        at = dice.randrange(min(length, dice.choice((32, 128, 512, length))))
        change = dice.choice(("flip", "flip", "set", "cut", "remove", "insert", "repeat"))
        if change == "flip" and data:
            data[at] ^= 1 << dice.randrange(8)
        elif change == "set":
            data[at : at + 4] = dice.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
        elif change == "cut" and dice.random() < 0.3:
            del data[at:]
        elif change == "remove":
            del data[at : at + dice.randrange(1, 20)]
        elif change == "insert":
            data[at:at] = dice.randbytes(dice.randrange(1, 20))
        elif change == "repeat":
            data[at:at] = data[at : at + 64]
    return bytes(data)


def test_thousands_of_damaged_files_end_in_an_image_or_a_named_failure(cat):
    dice, sources = random.Random(3), seeds(cat)
    decoder, reasons = Decoder(), Counter()
    for n in range(3000):
        try:
            assert decoder.decode(damaged(sources[n % len(sources)], dice)).shape == (224, 224, 3)
            reasons["none"] += 1
        except ImageError as error:
            reasons[str(error).partition(" (")[0]] += 1
    known = {BROKEN, EMPTY, OTHER_FORMAT, RARE_FORMAT, TOO_MUCH, TOO_SLOW, TOO_SMALL}
    assert set(reasons) <= {"none", *known}
    assert 300 < reasons["none"] < 2700
