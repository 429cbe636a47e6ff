"""Images: every kind of file that a catalog holds is seen as a browser shows it, or refused by the
name of what it is; and CLIP gets the bits that transformers gives.

Where a table holds colours or levels that no rule gives, Chromium 156 has drawn them.
"""

import io
import itertools
import random
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
from conftest import alone
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from samples import bmp, chunk, exif, png, saved, tiff
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from generate_embeddings import (
    BROKEN,
    NotNow,
    Rejected,
    decode,
    in_srgb,
    is_one_colour,
    levels_of,
    normalise,
    square,
    to_srgb,
)

pillow_heif.register_heif_opener()

PILLOW_WARNS = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged TIFF data
WHITE = (255, 255, 255)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


# --------------------------------------------------------------------------------------------------
# Making and reading files
# --------------------------------------------------------------------------------------------------


def opened(data):
    return Image.open(io.BytesIO(data))


def seen(data):
    """What the product makes of a file, before it is cut to a square: uint8 (height, width, 3)."""
    image = in_srgb(decode(data))
    assert image.mode == "RGB"
    return np.asarray(image)


def levels(data):
    """What CLIP sees of a file: uint8 (224, 224, 3)."""
    return np.frombuffer(levels_of(data), np.uint8).reshape(224, 224, 3)


def refused(data):
    """The reason for which the product refuses a file for good."""
    with pytest.raises(Rejected) as refusal:
        levels_of(data)
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


def over_white(colours, alpha):
    """uint8 (..., 3) colours and (...) alpha, as they look on white."""
    part = alpha[..., None] / 255
    return colours * part + 255 * (1 - part)


def distance(a, b):
    """The greatest difference between two images' pixels."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def mean_distance(a, b):
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


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
RESTORED = STORED | {6: STORED[8], 8: STORED[6]}  # the others are their own inverses

LOSSLESS = {"PNG": {}, "TIFF": {}, "TIFF LZW": {"compression": "tiff_lzw"}}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_turned_lossless_image_equals_its_upright_twin(upright, kind, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = saved(stored, kind.split()[0], exif=exif(orientation), **LOSSLESS[kind])
    assert np.array_equal(seen(data), upright)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_turned_jpeg_equals_the_same_pixels_turned_back(upright, orientation, options):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = saved(stored, "JPEG", quality=95, exif=exif(orientation), **options)
    plain = np.asarray(opened(data).convert("RGB"))  # Pillow applies no orientation to a JPEG
    assert np.array_equal(seen(data), RESTORED[orientation](plain))
    assert mean_distance(seen(data), upright) < 4


@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_avif_equals_its_upright_twin(upright, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {"quality": 100, "subsampling": "4:4:4"}
    data = saved(stored, "AVIF", exif=exif(orientation), **options)
    assert mean_distance(seen(data), upright) < 2


@pytest.mark.parametrize("orientation", STORED)
def test_a_turned_heic_equals_its_upright_twin(upright, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = saved(stored, "HEIF", quality=95, exif=exif(orientation))
    assert mean_distance(seen(data), upright) < 4


@pytest.mark.parametrize("orientation", STORED)
def test_a_large_turned_jpeg_is_upright_after_it_was_reduced(cat, orientation):
    large = np.asarray(cat.resize((2880, 1920)))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](large)))
    found = decode(saved(stored, "JPEG", exif=exif(orientation)))
    assert found.width * 2 == found.height * 3
    small = [np.asarray(image.resize((96, 64))) for image in (found, cat)]
    assert mean_distance(*small) < 4


def test_gray_and_cmyk_photographs_are_turned_as_well(cat):
    for mode in ("L", "CMYK"):
        data = saved(cat.convert(mode), "JPEG", exif=exif(6))
        straight = saved(cat.convert(mode), "JPEG")
        assert np.array_equal(seen(data), RESTORED[6](seen(straight)))


@pytest.mark.parametrize("orientation", [0, 1, 9, 65535])
def test_an_orientation_that_means_nothing_leaves_the_image_as_it_is(cat, upright, orientation):
    assert np.array_equal(seen(saved(cat, "PNG", exif=exif(orientation))), upright)


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
}


@pytest.mark.parametrize("make", NOT_TURNED.values(), ids=NOT_TURNED)
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
@pytest.mark.parametrize("data", BROKEN_EXIF.values(), ids=BROKEN_EXIF)
def test_broken_exif_costs_nothing_but_the_orientation(cat, upright, data):
    jpeg = saved(cat, "JPEG", quality=95)
    assert np.array_equal(seen(with_segment(jpeg, 0xE1, data)), seen(jpeg))
    rows = [row.tobytes() for row in upright]
    made = png(cat.size, 8, 2, rows, chunk(b"eXIf", data.removeprefix(b"Exif\0\0")))
    assert np.array_equal(seen(made), upright)


# --------------------------------------------------------------------------------------------------
# Transparency
# --------------------------------------------------------------------------------------------------

SHADES = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))  # 64 x 32, left to right


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})]
)
def test_an_alpha_channel_is_laid_on_white(cat, kind, options):
    colours = np.asarray(cat.resize((64, 32)))
    image = Image.fromarray(np.dstack([colours, SHADES]))
    found = seen(saved(image, kind, **options))
    assert np.abs(found - over_white(colours, SHADES)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_with_alpha_is_laid_on_white(cat, kind):
    gray = np.asarray(cat.resize((64, 32)).convert("L"))
    found = seen(saved(Image.fromarray(np.dstack([gray, SHADES]), "LA"), kind))
    assert np.abs(found - over_white(np.dstack([gray] * 3), SHADES)).max() <= 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True, "exact": True}),
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


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_one_transparent_index_shows_white_there(kind):
    data = saved(palette((200, 0, 0), (0, 0, 200)), kind, transparency=0)
    assert sides(data) == (WHITE, (0, 0, 200))


def test_a_palette_with_an_alpha_for_each_entry_is_laid_on_white():
    data = saved(palette(RED, BLUE), "PNG", transparency=bytes([128, 0]))
    assert sides(data) == ((255, 127, 127), WHITE)


def test_a_palette_with_fewer_alphas_than_entries_is_opaque_in_the_rest():
    data = saved(palette(RED, BLUE), "PNG", transparency=bytes([0]))
    assert sides(data) == (WHITE, BLUE)


def gray_png(depth, values, transparent):
    """A PNG of 32 x 32, its columns of these gray values, one of them transparent."""
    bits = "".join(f"{values[column * len(values) // 32]:0{depth}b}" for column in range(32))
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return png((32, 32), depth, 0, [row] * 32, chunk(b"tRNS", struct.pack(">H", transparent)))


def rgb_png(left, right, transparent):
    """The same in two colours of 16 bits a channel."""
    row = struct.pack(">48H", *left * 16) + struct.pack(">48H", *right * 16)
    return png((32, 32), 16, 2, [row] * 32, chunk(b"tRNS", struct.pack(">3H", *transparent)))


DEEP = (0x1234, 0x5678, 0x9ABC)
NEARLY = (0x1234, 0x5678, 0x9ABD)
TRANSPARENT_COLOURS = {  # what is seen on the left and on the right
    "gray of 1 bit": (gray_png(1, [0, 1], 0), 255, 255),
    "gray of 1 bit, white": (gray_png(1, [0, 1], 1), 0, 255),
    "gray of 2 bits": (gray_png(2, [1, 2], 2), 0x55, 255),
    "gray of 4 bits": (gray_png(4, [7, 3], 7), 255, 0x33),
    "gray of 4 bits, more bits than it has": (gray_png(4, [7, 3], 0x17), 255, 0x33),
    "gray of 8 bits": (gray_png(8, [10, 77], 10), 255, 77),
    "gray of 16 bits": (gray_png(16, [0x1234, 0x8000], 0x1234), 255, 0x80),
    "gray of 16 bits, nearly the same": (gray_png(16, [0x1235, 0x1234], 0x1234), 0x12, 255),
    "RGB of 8 bits": (saved(halves(RED, BLUE, "RGB"), "PNG", transparency=RED), 255, BLUE),
    "RGB of 16 bits": (rgb_png(DEEP, (0x8000, 0, 0), DEEP), 255, (0x80, 0, 0)),
    "RGB of 16 bits, nearly the same": (rgb_png(NEARLY, DEEP, DEEP), (0x12, 0x56, 0x9A), 255),
}


@pytest.mark.parametrize(
    ("data", "left", "right"), TRANSPARENT_COLOURS.values(), ids=TRANSPARENT_COLOURS
)
def test_the_transparent_colour_of_a_png_is_compared_at_the_files_own_depth(data, left, right):
    found = seen(data)
    assert (found[:, :16] == left).all()
    assert (found[:, 16:] == right).all()


def test_transparency_is_white_in_formats_that_lose_quality(cat):
    image = cat.resize((64, 64)).convert("RGBA")
    image.putalpha(halves(0, 255, "L").resize((64, 64)))
    for kind in ("WEBP", "AVIF", "HEIF"):
        found = seen(saved(image, kind, quality=80))
        assert distance(found[:, :24], np.full((64, 24, 3), 255)) <= 2
        assert mean_distance(found[:, 40:], np.asarray(cat.resize((64, 64)))[:, 40:]) < 8


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
LEVELS8 = np.tile((LEVELS16 / 257)[None, :, None], (32, 1, 3))


def planes(values, order, packed, **tags):
    """A TIFF of 16 bits a value and one strip for each plane: uint16 (planes, height, width)."""
    strips = [plane.astype(order + "u2").tobytes() for plane in values]
    if packed:
        strips = [zlib.compress(strip) for strip in strips]
    height, width = values[0].shape
    count = len(strips)
    body = b"".join(strips)
    starts = [8 + len(b"".join(strips[:n])) for n in range(count)]
    more = {256: [width], 257: [height], 258: [16] * count, 259: [8 if packed else 1], 277: [count]}
    more |= {273: starts, 278: [height], 279: list(map(len, strips)), 284: [2]}
    more |= {int(tag[1:]): [value] for tag, value in tags.items()}
    end = 8 + len(body)
    directory, far = struct.pack(order + "H", len(more)), b""
    for tag, numbers in sorted(more.items()):
        packed_numbers = struct.pack(f"{order}{count if len(numbers) > 1 else 1}I", *numbers)
        if len(numbers) > 1:
            at = end + 2 + 12 * len(more) + 4 + len(far)
            far += packed_numbers
            packed_numbers = struct.pack(order + "I", at)
        directory += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed_numbers
    bits = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return bits + struct.pack(order + "I", end) + body + directory + bytes(4) + far


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True])
def test_a_tiff_of_16_bits_is_scaled_whatever_its_order_planes_and_meaning_of_zero(order, packed):
    gray = np.tile(LEVELS16, (32, 1))
    colours = np.stack([gray, gray[:, ::-1], gray // 2])
    for values, tags, shown in (
        (gray[None], {"t262": 1}, [gray] * 3),
        (65535 - gray[None], {"t262": 0}, [gray] * 3),
        (colours, {"t262": 2}, colours),
    ):
        found = seen(planes(values, order, packed, **tags))
        assert distance(found, np.stack(shown, axis=-1) >> 8) == 0


def test_a_gray_tiff_of_12_bits_is_scaled():
    row = int("".join(f"{value >> 4:012b}" for value in LEVELS16), 2).to_bytes(96, "big")
    assert distance(seen(tiff((64, 32), row * 32, depth=12)), LEVELS8) <= 1


def test_a_png_of_16_bits_is_scaled():
    gray = [LEVELS16.astype(">u2").tobytes()] * 32
    colour = [np.repeat(LEVELS16, 3).astype(">u2").tobytes()] * 32
    for data in (png((64, 32), 16, 0, gray), png((64, 32), 16, 2, colour)):
        assert distance(seen(data), LEVELS8) <= 1


@pytest.mark.parametrize("colour", [4, 6], ids=["gray", "colour"])
def test_alpha_of_16_bits_is_laid_on_white(colour):
    shown = [40000] * (colour // 2 - 1 or 1) if colour == 4 else [40000] * 3
    alphas = [0] * 16 + [65535] * 16
    row = b"".join(struct.pack(f">{len(shown) + 1}H", *shown, alpha) for alpha in alphas)
    left, right = sides(png((32, 32), 16, colour, [row] * 32))
    assert left == WHITE
    assert all(abs(value - 40000 / 257) <= 1 for value in right)


def test_bilevel_palette_and_gray_images_keep_their_shades(cat):
    bilevel, gray = halves(0, 1, "1"), cat.convert("L")
    for kind in ("PNG", "TIFF", "BMP", "GIF"):
        assert sides(saved(bilevel, kind)) == ((0, 0, 0), WHITE)
        assert sides(saved(palette((200, 0, 0), (0, 0, 200)), kind)) == ((200, 0, 0), (0, 0, 200))
    for kind in ("PNG", "TIFF", "BMP"):
        assert np.array_equal(seen(saved(gray, kind)), np.dstack([np.asarray(gray)] * 3))
    assert mean_distance(seen(saved(gray, "JPEG")), np.dstack([np.asarray(gray)] * 3)) < 4


def test_a_fax_has_black_writing_on_white_paper():
    for compression in ("group3", "group4"):
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


def inverted(image):
    return Image.eval(image, lambda value: 255 - value)


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
    data = saved(inverted(stored), "JPEG", quality=95)
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    return data[:at] + b"\2" + data[at + 1 :]


def printer_tiff(inks):
    return saved(Image.new("CMYK", (32, 32), inks), "TIFF", compression="tiff_lzw")


@pytest.mark.parametrize("make", [adobe, plain, ycck, printer_tiff])
@pytest.mark.parametrize(("inks", "colour"), INKS.items())
def test_cmyk_has_the_right_colours(make, inks, colour):
    found = seen(make(inks))
    assert distance(found, np.full((32, 32, 3), colour)) <= 6


def test_a_cmyk_photograph_is_close_to_its_rgb_twin(cat, upright):
    marked = saved(cat.convert("CMYK"), "JPEG", quality=95)
    progressive = saved(cat.convert("CMYK"), "JPEG", quality=95, progressive=True)
    for data in (marked, progressive, without_segment(marked, 0xEE)):
        assert mean_distance(seen(data), upright) < 4


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


INKS_OF_A_PRINTER = {
    "marked": lambda inks, profile: saved(inks, "JPEG", quality=100, icc_profile=profile),
    "plain": lambda inks, profile: without_segment(
        saved(inks, "JPEG", quality=100, icc_profile=profile), 0xEE
    ),
    "tiff": lambda inks, profile: saved(inks, "TIFF", icc_profile=profile),
}


@pytest.mark.parametrize("make", INKS_OF_A_PRINTER.values(), ids=INKS_OF_A_PRINTER)
def test_the_icc_profile_of_a_cmyk_image_decides_its_colours(make):
    profile = ink_profile(violet_cyan)
    ImageCms.ImageCmsProfile(io.BytesIO(profile))  # it is one
    found = seen(make(halves((255, 0, 0, 0), (0, 255, 0, 0), "CMYK"), profile)).astype(int)
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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", {"compression": "packbits"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_very_pixels(cat, upright, kind, options):
    assert np.array_equal(seen(saved(cat, kind, **options)), upright)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"subsampling": "4:4:4", "restart_marker_rows": 1}),
        ("MPO", {}),
        ("WEBP", {}),
        ("AVIF", {}),
        ("HEIF", {}),
        ("TIFF", {"compression": "jpeg"}),
        ("GIF", {}),
    ],
)
def test_other_formats_come_close(cat, upright, kind, options):
    if kind != "GIF":
        options = options | {"quality": 90}
    assert mean_distance(seen(saved(cat, kind, **options)), upright) < 8


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("TIFF", {}),
        ("MPO", {"quality": 95}),
        ("AVIF", {"quality": 100}),
    ],
)
def test_of_several_frames_or_pages_the_first_counts(kind, options):
    frames = [Image.new("RGB", (64, 48), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(opened(data), "n_frames", 1) == 3
    assert distance(seen(data), np.full((48, 64, 3), RED)) <= 4


def test_an_animated_png_with_a_picture_of_its_own_shows_that():
    frames = [Image.new("RGB", (64, 48), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    assert (seen(data) == RED).all()


def large(kind):
    """A file of 16 megapixels, blue, and white in its lower half."""
    size = (20_000, 800)
    image = Image.new("RGBA", size, (*BLUE, 255))
    image.paste((9, 9, 9, 0), (0, 400, *size))
    flat = Image.new("RGB", size, "white")
    flat.paste(image, mask=image)
    inks = flat.convert("CMYK")
    index = Image.new("P", size, 0)
    index.putpalette([*BLUE, 9, 9, 9])
    index.paste(1, (0, 400, *size))
    return {
        "RGB": lambda: saved(flat, "PNG"),
        "RGBA": lambda: saved(image, "PNG"),
        "WebP": lambda: saved(image.resize((16_000, 640)), "WEBP", lossless=True, method=0),
        "palette": lambda: saved(index, "PNG", transparency=1),
        "transparent colour": lambda: saved(
            Image.composite(flat, Image.new("RGB", size, (9, 9, 9)), image.getchannel("A")),
            "PNG",
            transparency=(9, 9, 9),
        ),
        "CMYK": lambda: saved(inks, "JPEG"),
        "CMYK without a marker": lambda: without_segment(saved(inks, "JPEG"), 0xEE),
        "CMYK TIFF": lambda: saved(inks, "TIFF", compression="tiff_lzw"),
        "turned": lambda: saved(flat.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6)),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    [
        *("RGB", "RGBA", "WebP", "palette", "transparent colour", "CMYK", "CMYK without a marker"),
        *("CMYK TIFF", "turned"),
    ],
)
def test_large_images_are_seen_as_small_ones_are(kind):
    found = seen(large(kind))
    height = found.shape[0]
    for part, colour in ((found[: height // 2 - 8], BLUE), (found[height // 2 + 8 :], WHITE)):
        assert np.abs(part.astype(int) - colour).max() <= 6


def test_a_bitmap_stored_from_the_top_down_is_not_upside_down():
    row = bytes(BLUE[::-1]) * 32
    other = bytes(RED[::-1]) * 32
    from_top = bmp((32, -32), pixels=row * 16 + other * 16)
    from_bottom = bmp((32, 32), pixels=other * 16 + row * 16)
    for data in (from_top, from_bottom):
        assert tuple(seen(data)[0, 0]) == BLUE
        assert tuple(seen(data)[-1, 0]) == RED


def test_every_photograph_decodes_to_pillows_own_rgb(photos):
    for data in photos.values():
        expected = opened(data).convert("RGB")
        if min(expected.size) < 896:
            assert np.array_equal(seen(data), np.asarray(expected))


BRANDS = {
    "AVIF": (b"mif1", b"msf1", b"miaf", b"MA1B", b"avif"),
    "HEIF": (b"mif1", b"msf1", b"miaf", b"heix", b"heic"),
}


@pytest.mark.parametrize(
    ("kind", "major"), [(kind, major) for kind, majors in BRANDS.items() for major in majors]
)
def test_one_of_the_brands_says_what_a_file_is_not_the_first_alone(cat, upright, kind, major):
    data = saved(cat, kind, quality=95)
    own = {"AVIF": b"avif", "HEIF": b"heic"}[kind]
    assert own in data[16:32]
    assert mean_distance(seen(data[:8] + major + data[12:]), upright) < 4


def test_without_pillow_heif_a_heic_image_is_a_failure_that_says_what_to_install(cat, tmp_path):
    (tmp_path / "a.heic").write_bytes(saved(cat, "HEIF"))
    program = """
sys.modules["pillow_heif"] = None
import generate_embeddings as product
try:
    product.decode(open(sys.argv[1], "rb").read())
except product.NotNow as error:
    print(json.dumps(str(error)))
"""
    assert alone(program, tmp_path / "a.heic") == "HEIC: pip install pillow-heif, then run again"


@pytest.mark.parametrize("start", [b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"])
def test_a_jpeg_xl_image_is_for_later(start):
    with pytest.raises(NotNow, match="JPEG XL"):
        levels_of(start + bytes(60))


# --------------------------------------------------------------------------------------------------
# Broken, or whole all the same
# --------------------------------------------------------------------------------------------------


ASIDE = {  # chunks without which the picture is the same
    "tEXt": b"Comment\0made by hand",
    "zTXt": b"Comment\0\0" + zlib.compress(b"x" * 3_000_000),
    "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000),
    "pHYs": struct.pack(">IIB", 2835, 2835, 1),
    "tIME": struct.pack(">HBBBBB", 2026, 1, 2, 3, 4, 5),
    "sBIT": b"\5\5\5",
    "bKGD": bytes(6),
    "acTL": struct.pack(">II", 2, 0),
    "teSt": b"of an editor's own",
}


@pytest.mark.parametrize("at_end", [False, True], ids=["before the pixels", "after"])
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("kind", ASIDE)
def test_a_png_is_not_broken_by_what_makes_no_pixels(cat, upright, kind, wrong, at_end):
    data = with_chunk(cat, kind.encode(), ASIDE[kind], wrong=wrong, at_end=at_end)
    assert np.array_equal(seen(data), upright)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"iCCP", b"p\0\0" + zlib.compress(P3)),
        (b"tRNS", struct.pack(">3H", *WHITE)),
        (b"eXIf", EXIF),
    ],
)
def test_what_has_a_wrong_checksum_does_not_count(cat, upright, kind, data):
    assert np.array_equal(seen(with_chunk(cat, kind, data, wrong=True)), upright)


def test_an_icc_profile_may_be_large():
    profile = icc_profile(b"mntr", b"GRAY", {b"kTRC": curve(1.8), b"zzzz": bytes(2_000_000)})
    gray = Image.new("L", (32, 32), 100)
    found = seen(with_chunk(gray, b"iCCP", b"p\0\0" + zlib.compress(profile)))
    assert distance(found, np.full((32, 32, 3), 119)) <= 1


@pytest.mark.parametrize("kind", ["IHDR", "PLTE"])
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
WHOLE = {  # ends of files of which all pixels are there
    "1 byte gone": lambda data: data[:-1],
    "2 bytes gone": lambda data: data[:-2],
    "a newline there": lambda data: data[:-2] + b"\n",
    "half a marker and a newline": lambda data: data[:-1] + b"\r\n",
    "zeros there": lambda data: data[:-2] + bytes(9000),
    "text there": lambda data: data[:-2] + b"made by a camera",
    "text and zeros after it": lambda data: data + b"made by a scanner" + bytes(9999),
    "a film and a box of zeros after it": lambda data: data + FILM + bytes(9000),
    "a gain map after it": lambda data: data + saved(Image.new("L", (40, 30)), "JPEG"),
    "a gain map without its end after it": lambda data: (
        data + saved(Image.new("L", (40, 30)), "JPEG")[:-2]
    ),
}
FILM = b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + random.Random(1).randbytes(200_000)
NOT_WHOLE = {
    "4 bytes gone": lambda data: data[:-4],
    "10 bytes gone": lambda data: data[:-10],
    "10 bytes gone, a newline there": lambda data: data[:-10] + b"\n",
    "100 bytes gone, zeros there": lambda data: data[:-100] + bytes(9000),
    "a third gone": lambda data: data[: len(data) * 2 // 3],
    "half gone, zeros there": lambda data: data[: len(data) // 2] + bytes(len(data) // 2 + 4096),
}


def test_of_the_samples_of_jpegs_the_last_bytes_matter(cat):
    """Else the tests below would show nothing."""
    for options in JPEGS.values():
        assert saved(cat, "JPEG", **options).endswith(b"\xff\xd9")


@pytest.mark.parametrize("change", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_is_whole_if_all_its_pixels_are_there(cat, options, change):
    data = saved(cat, "JPEG", **options)
    assert np.array_equal(seen(change(data)), seen(data))


@pytest.mark.parametrize("change", NOT_WHOLE.values(), ids=NOT_WHOLE)
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_that_lost_pixels_is_broken(cat, options, change):
    assert refused(change(saved(cat, "JPEG", **options))) == BROKEN


def test_the_end_of_a_jpegs_thumbnail_is_not_its_own(cat):
    thumbnail = saved(cat.resize((32, 32)), "JPEG")
    data = with_segment(
        saved(cat, "JPEG"), 0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail
    )
    assert np.array_equal(seen(data[:-2]), seen(data))
    assert refused(data[:-200] + bytes(9000)) == BROKEN


def test_a_white_end_in_zeros_is_no_padding():
    """Where white is one bit, optimised tables write it as 0. The last byte is one if 8 fit."""
    whites = [Image.new("RGB", (320, 640), "white") for _ in range(40)]
    for n, image in enumerate(whites):
        image.paste("black", (10, 10, 30 + 5 * n, 40 + 3 * n))
    files = [saved(image, "JPEG", optimize=True) for image in whites]
    in_zeros = [data for data in files if data.endswith(bytes(20) + b"\xff\xd9")]
    assert in_zeros
    for data in in_zeros:
        assert np.array_equal(seen(data[:-2]), seen(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "HEIF"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8, 0.95])
def test_a_truncated_file_is_called_truncated(cat, kind, part):
    data = saved(cat.resize((192, 128)), kind)
    assert refused(data[: int(len(data) * part)]) == BROKEN


@PILLOW_WARNS
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_other_encodings_of_a_truncated_file_are_found_too(cat, kind):
    options = {
        "JPEG": {"progressive": True},
        "WEBP": {"lossless": True},
        "TIFF": {"compression": "tiff_lzw"},
    }[kind]
    data = saved(cat, kind, **options)
    assert refused(data[: len(data) // 2]) == BROKEN


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 100}),
        ("JPEG", {"optimize": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_a_copy_that_stopped_halfway_is_broken_though_zeros_fill_it_up(kind, options):
    data = saved(noise(300, 300), kind, **options)
    for part in (0.3, 0.5, 0.8):
        kept = int(len(data) * part)
        assert refused(data[:kept] + bytes(len(data) - kept + 4096)) == BROKEN


@pytest.mark.parametrize("kind", ["MPO", "PNG", "GIF", "WEBP"])
@pytest.mark.parametrize("end", [bytes(9999), b"made by a scanner" + bytes(9999)])
def test_zeros_after_the_end_of_a_file_do_no_harm(cat, kind, end):
    data = saved(cat, kind)
    assert np.array_equal(seen(data + end), seen(data))


@PILLOW_WARNS
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "HEIF"])
def test_of_a_few_bytes_nothing_is_seen(cat, kind):
    data = saved(cat, kind)
    for length in (1, 2, 4, 8, 12, 16, 24, 32):
        assert refused(data[:length])


def test_a_good_beginning_with_a_damaged_rest_is_broken(cat):
    data = bytearray(saved(cat, "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert refused(bytes(data)) == BROKEN


TIFF_KINDS = {
    "floats in colour": {"depth": 32, "t262": 2, "t277": 3, "t339": 3},
    "floats": {"depth": 32, "t339": 3},
    "gray of 32 bits": {"depth": 32},
    "an unknown compression": {"t259": 34712},
    "a camera's sensor": {"depth": 16, "t262": 32803},
}


@pytest.mark.parametrize("tags", TIFF_KINDS.values(), ids=TIFF_KINDS)
def test_a_whole_tiff_that_pillow_can_not_read_is_not_called_broken(tags):
    assert "not supported" in refused(tiff((32, 32), bytes(32 * 32 * 12), **tags))


@PILLOW_WARNS
def test_a_tiff_without_its_directory_is_broken():
    data = tiff((32, 32), bytes(32 * 32 * 12), depth=32, t339=3)
    assert refused(data[:-100]) == BROKEN


# --------------------------------------------------------------------------------------------------
# What is no image, or none to embed
# --------------------------------------------------------------------------------------------------

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><path d="M0 0"/></svg>'
NO_IMAGES = {
    "empty": (b"", "empty"),
    "svg": (SVG, "SVG"),
    "svg with a prolog": (b'<?xml version="1.0" encoding="UTF-8"?>\n' + SVG, "SVG"),
    "svg with a doctype": (
        b'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x.dtd">' + SVG,
        "SVG",
    ),
    "svg with a BOM": (b"\xef\xbb\xbf" + SVG, "SVG"),
    "svg with a namespace prefix": (b'<?xml version="1.0"?><svg:svg xmlns:svg="x"/>', "SVG"),
    "svg after a long comment": (
        b"<?xml version='1.0'?><!-- " + b"x" * 3000 + b" -->" + SVG,
        "SVG",
    ),
    "html": (b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
    "html in small letters": (b"<!doctype html>\n<p>Not found", "HTML"),
    "html without a doctype": (b"\r\n <html lang=en><head></head></html>", "HTML"),
    "html with a BOM": (b"\xef\xbb\xbf<!DOCTYPE html><title>x</title>", "HTML"),
    "html after a comment": (b"<!-- saved page -->\n<html><body></body></html>", "HTML"),
    "html in which an svg is": (b"<!DOCTYPE html><html><body>" + SVG + b"</body></html>", "HTML"),
    "xhtml": (b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"/>', "HTML"),
    "json object": (b'{"error": "not found"}', "JSON"),
    "json list": (b' [1, "<svg>"]', "JSON"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "PDF"),
    "text": (b"404 page not found", "not an image"),
    "xml error of a storage": (
        b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>',
        "not an image",
    ),
    "zip": (b"PK\3\4" + bytes(60), "not an image"),
    "zeros": (bytes(2000), "not an image"),
    "ICO": (saved(Image.new("RGB", (32, 32)), "ICO"), "not an image in a known format"),
    "EPS, which Pillow would start a program for": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n",
        "not an image",
    ),
}


@pytest.mark.parametrize(("data", "name"), NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_is_no_image_is_refused_by_its_name(data, name):
    assert name in refused(data)


@pytest.mark.parametrize("size", [(1, 1), (15, 15), (15, 400), (400, 15), (2, 2)])
def test_a_tracking_pixel_or_spacer_is_too_small(size):
    for kind in ("PNG", "GIF", "JPEG"):
        assert "smaller than 16 pixels" in refused(saved(Image.new("RGB", size, RED), kind))


def test_sixteen_pixels_a_side_are_enough():
    assert decode(saved(Image.new("RGB", (16, 16), RED), "PNG")).size == (16, 16)


def test_a_strip_is_refused_above_one_hundred_to_one():
    assert decode(saved(Image.new("RGB", (1600, 16)), "PNG")).size == (1600, 16)
    for size in ((1601, 16), (16, 1601), (20, 5000)):
        assert "strip" in refused(saved(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_of_one_colour_is_told_from_a_picture(cat, kind):
    for colour in ("white", "black", (180, 20, 60)):
        assert is_one_colour(levels(saved(Image.new("RGB", (300, 200), colour), kind)))
    speck = Image.new("RGB", (300, 200), "white")
    speck.paste("black", (140, 90, 160, 110))
    for picture in (cat, speck):
        assert not is_one_colour(levels(saved(picture, kind)))


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
        assert same_bits(
            preprocess(decode(data)), pixels_of_transformers(opened(data).convert("RGB"))
        )


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
    reduced = [decode(data) for data in jpegs + pngs]
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
    return [
        saved(small, "JPEG", exif=exif(6)),
        saved(small, "JPEG", progressive=True),
        saved(small.convert("CMYK"), "JPEG", icc_profile=ink_profile(violet_cyan)),
        saved(small, "MPO", save_all=True, append_images=frames),
        saved(small, "PNG", exif=exif(5)),
        saved(small.convert("P"), "PNG", transparency=bytes(range(200))),
        saved(Image.fromarray(np.tile(LEVELS16, (32, 1))), "PNG"),
        saved(frames[0], "PNG", save_all=True, append_images=frames),
        saved(small, "GIF", save_all=True, append_images=frames, transparency=3),
        saved(small.convert("RGBA"), "WEBP"),
        saved(frames[0], "WEBP", save_all=True, append_images=frames, lossless=True),
        saved(small, "AVIF"),
        saved(small, "HEIF"),
        saved(small, "TIFF", compression="tiff_lzw"),
        saved(small.convert("L"), "TIFF", compression="jpeg"),
        saved(halves(0, 1, "1"), "TIFF", compression="group4"),
        tiff((32, 32), bytes(2048), depth=16, order=">"),
        saved(small, "BMP"),
        saved(small.convert("P"), "BMP"),
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


def test_thousands_of_damaged_files_end_in_an_image_or_a_named_failure(cat, tmp_path):
    dice, sources = random.Random(3), seeds(cat)
    files = [damaged(sources[n % len(sources)], dice) for n in range(3000)]
    (tmp_path / "files").write_bytes(
        b"".join(struct.pack("<I", len(data)) + data for data in files)
    )
    program = """
import struct
import generate_embeddings as product
blob, at, images, reasons, slowest = open(sys.argv[1], "rb").read(), 0, 0, {}, 0.0
while at < len(blob):
    length, = struct.unpack_from("<I", blob, at)
    data, at, started = blob[at + 4 : at + 4 + length], at + 4 + length, time.monotonic()
    try:
        assert len(product.levels_of(data)) == 224 * 224 * 3
        images += 1
    except (product.Rejected, product.NotNow) as reason:
        reasons[str(reason)] = reasons.get(str(reason), 0) + 1
    slowest = max(slowest, time.monotonic() - started)
print(json.dumps([images, reasons, slowest, peak()]))
"""
    images, reasons, slowest, megabytes = alone(program, tmp_path / "files")
    assert images + sum(reasons.values()) == len(files)
    assert images > 300
    assert sum(reasons.values()) > 300
    assert slowest < 10
    assert megabytes < 1500
