"""Images: every kind of file that a shop has is seen as a browser shows it. What is rare, broken or
no image is refused by the name of what it is, and is never a wrong picture. CLIP gets the bits that
transformers gives.

Where a table holds colours or levels that no rule gives, Chromium 156 has drawn them.
"""

import io
import itertools
import random
import struct
import sys
import zlib
from collections import Counter

import models
import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import Image, ImageCms
from samples import chunk, exif, icc_profile_of, noise, png, saved, tiff

import generate_embeddings as script
from generate_embeddings import Decoder, ImageError, decoded, in_srgb, levels_of, square

pillow_heif.register_heif_opener()

PILLOW_WARNS = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged TIFF data
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
PLAIN = ("PNG", "TIFF", "BMP", "GIF")
FINE = {"quality": 100, "subsampling": "4:4:4"}


def cases(table):
    """A test for each entry of a table, name -> arguments."""
    return {"argvalues": list(table.values()), "ids": list(table)}


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
    reason = str(refusal.value)
    assert script.ADVICE[reason.partition(" (")[0]]
    return reason


def segment(marker, data):
    """A segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def with_chunk(image, kind, data, *, wrong=False, at_end=False):
    """A PNG with one more chunk, before its pixels or after, whose checksum may be wrong."""
    made = saved(image, "PNG")
    added = chunk(kind, data)
    if wrong:
        added = added[:-1] + bytes([added[-1] ^ 1])
    at = made.index(b"IEND") - 4 if at_end else 33
    return made[:at] + added + made[at:]


def distance(a, b):
    """The greatest difference between two images' values."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def mean_distance(a, b):
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


# Orientation

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
    "TIFF": ("RGB", "TIFF", {"compression": "tiff_lzw"}, 0),
    "JPEG": ("RGB", "JPEG", {"quality": 95}, 4),
    "CMYK JPEG": ("CMYK", "JPEG", {"quality": 95}, 4),
    "AVIF": ("RGB", "AVIF", FINE, 2),
    "HEIC": ("RGB", "HEIF", {"quality": 95}, 4),
}


@pytest.mark.parametrize(("mode", "kind", "options", "most"), **cases(TURNED))
def test_a_turned_image_is_upright(cat, mode, kind, options, most):
    image = cat.convert(mode)
    upright = seen(saved(image, kind, **options))
    for orientation, turn in STORED.items():
        stored = Image.fromarray(np.ascontiguousarray(turn(np.asarray(image))), mode)
        data = saved(stored, kind, exif=exif(orientation), **options)
        assert mean_distance(seen(data), upright) <= most, orientation


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/">'
    b'<rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
)
EXIF = exif(6).removeprefix(b"Exif\0\0")
NOT_TURNED = {
    "WebP by EXIF": lambda cat: saved(cat, "WEBP", lossless=True, exif=exif(6)),
    "PNG by XMP": lambda cat: with_chunk(cat, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "PNG by EXIF after the pixels": lambda cat: with_chunk(cat, b"eXIf", EXIF, at_end=True),
    "PNG by EXIF with a wrong checksum": lambda cat: with_chunk(cat, b"eXIf", EXIF, wrong=True),
    "PNG by 9": lambda cat: saved(cat, "PNG", exif=exif(9)),
    "JPEG by XMP": lambda cat: saved(cat, "JPEG", quality=95, xmp=XMP),
    "TIFF by XMP": lambda cat: saved(cat, "TIFF", tiffinfo={700: XMP}),
}


@pytest.mark.parametrize("make", **cases(NOT_TURNED))
def test_what_browsers_do_not_turn_stays_as_it_is(cat, make):
    assert mean_distance(seen(make(cat)), np.asarray(cat)) < 4


@PILLOW_WARNS
def test_broken_exif_costs_nothing_but_the_orientation(cat):
    jpeg = saved(cat, "JPEG", quality=95)
    beyond_the_end = b"II*\0\xff\xff\xff\x7f"
    as_text = b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0six\0\0\0\0\0"
    for data in (b"garbage" * 9, beyond_the_end, as_text):
        broken = jpeg[:2] + segment(0xE1, b"Exif\0\0" + data) + jpeg[2:]
        assert np.array_equal(seen(broken), seen(jpeg))
        assert np.array_equal(seen(with_chunk(cat, b"eXIf", data)), np.asarray(cat))


# Transparency


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")]
)
def test_an_alpha_channel_is_laid_on_white(cat, mode, kind):
    shades = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))  # 64 x 32, left to right
    image = cat.resize((64, 32)).convert(mode.removesuffix("A"))
    colours = np.asarray(image.convert("RGB"))
    image.putalpha(Image.fromarray(shades))
    share = shades[..., None] / 255
    expected = colours * share + 255 * (1 - share)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.abs(seen(saved(image, kind, **options)) - expected).max() <= 1


def test_colour_behind_full_transparency_never_shows():
    image = Image.new("RGBA", (64, 64), (255, 0, 255, 0))
    image.paste((0, 128, 0, 255), (16, 16, 48, 48))
    for kind in ("PNG", "TIFF", "WEBP", "AVIF", "HEIF"):
        found = seen(saved(image, kind, quality=80))
        assert distance(found[:12], WHITE) <= 2
        assert distance(found[20:44, 20:44], (0, 128, 0)) <= 8


def halves(left, right, mode="P"):
    """32 x 32: one value on the left, another on the right."""
    image = Image.new(mode, (32, 32), left)
    image.paste(right, (16, 0, 32, 32))
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


PALE = halves(0, 1)
PALE.putpalette([200, 0, 0, 0, 0, 200])
DARK_RED, DARK_BLUE = (200, 0, 0), (0, 0, 200)
SIDES = {  # what is seen on the left and on the right
    "a transparent index of a PNG": (saved(PALE, "PNG", transparency=0), WHITE, DARK_BLUE),
    "an alpha for each index": (saved(PALE, "PNG", transparency=b"\x80\0"), (227, 127, 127), WHITE),
    "a transparent gray": (gray_png(8, [10, 77], 10), WHITE, (77, 77, 77)),
    "a transparent colour": (saved(halves(RED, BLUE, "RGB"), "PNG", transparency=RED), WHITE, BLUE),
    "alpha of 16 bits": (deep_png(4, [99, 0] * 16 + [40000, 65535] * 16), WHITE, (156,) * 3),
    **{f"palette {kind}": (saved(PALE, kind), DARK_RED, DARK_BLUE) for kind in PLAIN},
    **{f"bilevel {kind}": (saved(halves(0, 1, "1"), kind), BLACK, WHITE) for kind in PLAIN},
    "a fax": (saved(halves(0, 1, "1"), "TIFF", compression="group4"), BLACK, WHITE),
    "white is zero": (tiff((32, 32), b"\xff\xff\0\0" * 32, depth=1, t262=0), BLACK, WHITE),
}


@pytest.mark.parametrize(("data", "left", "right"), **cases(SIDES))
def test_palettes_bits_and_transparent_colours_are_seen_as_browsers_show_them(data, left, right):
    assert sides(data) == (left, right)


def gif(frame, *, transparent, background):
    """A GIF of 32 x 32, red and blue by index, with one blue pixel at `frame`."""
    screen = struct.pack("<HHBBB", 32, 32, 0x80, background, 0) + bytes([*RED, *BLUE])
    control = b"\x21\xf9\x04\x01\0\0\0\0" if transparent else b""  # index 0 is transparent
    # Codes clear, 1, end in 3 bits each
    picture = b"\x2c" + struct.pack("<HHHHB", *frame, 1, 1, 0) + b"\x02\x02\x4c\x01\0"
    return b"GIF89a" + screen + control + picture + b";"


def test_around_a_gif_that_is_smaller_than_its_canvas_there_is_white():
    expected = np.full((32, 32, 3), 255)
    expected[5, 4] = BLUE
    for transparent, background in itertools.product((True, False), (0, 1)):
        data = gif((4, 5), transparent=transparent, background=background)
        assert np.array_equal(seen(data), expected)


# Depths and colour spaces

LEVELS16 = np.linspace(0, 65535, 64).astype(np.uint16)
LEVELS8 = np.tile((LEVELS16 >> 8)[None, :, None], (32, 1, 3))


def planes():
    """A TIFF of 16 bits a value with a strip for each colour."""
    file = io.BytesIO()
    options = {"planarconfig": "separate", "byteorder": ">", "photometric": "rgb"}
    tifffile.imwrite(file, np.tile(LEVELS16, (3, 32, 1)), compression="zlib", **options)
    return file.getvalue()


GRAY16, COLOUR16 = (np.repeat(LEVELS16, times).astype(">u2").tobytes() for times in (1, 3))
SIXTEEN_BITS = {
    "gray PNG": png((64, 32), 16, 0, [GRAY16] * 32),
    "PNG": png((64, 32), 16, 2, [COLOUR16] * 32),
    "TIFF": tiff((64, 32), COLOUR16 * 32, 16, ">", t262=2, t277=3),
    "planes": planes(),
}


@pytest.mark.parametrize("data", **cases(SIXTEEN_BITS))
def test_sixteen_bits_are_scaled_to_eight(data):
    assert distance(seen(data), LEVELS8) == 0


INKS = {  # of 0..255, and how they look without a profile
    (0, 0, 0, 0): WHITE,
    (255, 255, 0, 0): BLUE,
    (0, 255, 255, 0): RED,
    (255, 0, 255, 0): GREEN,
    (0, 0, 0, 255): BLACK,
    (0, 0, 0, 100): (155, 155, 155),
}


def adobe(inks, **options):
    """Pillow writes CMYK JPEGs as Adobe does: inverted, and with Adobe's marker."""
    return saved(Image.new("CMYK", (32, 32), inks), "JPEG", quality=95, **options)


def without_marker(jpeg):
    """The same without Adobe's marker: browsers take the values as inverted, too."""
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4]) :]


def printers(inks):
    return saved(Image.new("CMYK", (32, 32), inks), "TIFF", compression="tiff_lzw")


@pytest.mark.parametrize("make", [adobe, lambda inks: without_marker(adobe(inks)), printers])
def test_cmyk_has_the_right_colours(make):
    for inks, colour in INKS.items():
        assert distance(seen(make(inks)), colour) <= 6, inks


def violet_cyan(inks):
    """Inks of which the cyan one prints violet, magenta and yellow nothing, the fourth black:
    their colour as (L, a, b)."""
    if inks[3]:
        return (0, 0, 0)
    return (30, 60, -80) if inks[0] else (100, 0, 0)


def ink_profile():
    """A profile of a printer: a table of the 16 ways to print an ink or not."""
    table = b"".join(
        struct.pack("BBB", round(light * 2.55), a + 128, b + 128)
        for light, a, b in map(violet_cyan, itertools.product((0, 1), repeat=4))
    )
    identity = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    return icc_profile_of(b"prtr", b"CMYK", {b"A2B0": lut})


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(gamma, red, green, blue):
    """A profile of a screen: its primaries' XYZ, and one gamma for all."""
    tags = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(gamma))
    for name, values in ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue)):
        tags[name] = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))
    return icc_profile_of(b"mntr", b"RGB ", tags)


def gray_profile(gamma, **tags):
    more = {name.encode(): data for name, data in tags.items()}
    return icc_profile_of(b"mntr", b"GRAY", {b"kTRC": curve(gamma)} | more)


INK = ink_profile()
P3 = rgb_profile(2.2, (0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
PROPHOTO = rgb_profile(
    1.8, (0.7977, 0.2880, 0.0000), (0.1352, 0.7119, 0.0000), (0.0313, 0.0001, 0.8249)
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
STORED_COLOURS = [(200, 50, 50), (50, 200, 50), (50, 50, 200), (20, 90, 90)]
SHOWN_COLOURS = {
    "Display P3": (P3, [(219, 14, 35), (0, 205, 0), (46, 46, 209), (0, 91, 90)]),
    "sRGB": (SRGB, STORED_COLOURS),
    "one of gray": (gray_profile(1.0), STORED_COLOURS),
    "one of ink": (INK, STORED_COLOURS),
    "a cut one": (P3[:200], STORED_COLOURS),
}
WITH_PROFILES = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "AVIF": FINE, "JPEG": FINE}


@pytest.mark.parametrize(("profile", "shown"), **cases(SHOWN_COLOURS))
def test_colours_are_those_that_a_browser_makes_of_the_icc_profile(profile, shown):
    image = Image.new("RGB", (64, 16))
    for n, colour in enumerate(STORED_COLOURS):
        image.paste(colour, (n * 16, 0, n * 16 + 16, 16))
    for kind, options in WITH_PROFILES.items():
        data = saved(image, kind, icc_profile=profile, **options)
        assert distance(seen(data)[8, 8::16], shown) <= 4, kind
    if profile == P3:  # of palettes and of transparent images, too
        one = Image.new("RGB", (32, 32), STORED_COLOURS[0])
        for stored in (one.quantize(2), one.convert("RGBA")):
            assert distance(seen(saved(stored, "PNG", icc_profile=P3)), shown[0]) <= 1


def test_the_icc_profile_of_a_cmyk_image_decides_its_colours():
    inks = halves((255, 0, 0, 0), (0, 255, 0, 0), "CMYK")
    marked = saved(inks, "JPEG", quality=100, icc_profile=INK)
    for data in (marked, without_marker(marked), saved(inks, "TIFF", icc_profile=INK)):
        found = seen(data).astype(int)
        red, green, blue = found[16, 4]
        assert blue > 150 > red > green  # violet
        assert found[16, 28].min() > 245  # magenta prints nothing


GRAY_PROFILES = {
    "of gray": (gray_profile(1.8), (119, 210)),
    "of 2 MB": (gray_profile(1.8, zzzz=bytes(2_000_000)), (119, 210)),
    "of RGB": (PROPHOTO, (119, 210)),
}


@pytest.mark.parametrize(("profile", "shown"), **cases(GRAY_PROFILES))
def test_gray_images_are_converted_by_icc_profiles_of_gray_and_of_rgb(profile, shown):
    gray = halves(100, 200, "L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    for image in (gray, gray.convert("LA"), deep):
        left, right = sides(saved(image, "PNG", icc_profile=profile))
        assert distance((left[0], right[0]), shown) <= 1


# Formats

FORMATS = {  # format, options, and how far the picture may be from what was saved
    "PNG": ("PNG", {}, 0),
    "BMP": ("BMP", {}, 0),
    "TIFF LZW": ("TIFF", {"compression": "tiff_lzw"}, 0),
    "TIFF JPEG": ("TIFF", {"compression": "jpeg", "quality": 90}, 8),
    "lossless WebP": ("WEBP", {"lossless": True}, 0),
    "WebP": ("WEBP", {"quality": 90}, 8),
    "JPEG": ("JPEG", {"quality": 90}, 8),
    "MPO": ("MPO", {"quality": 90}, 8),
    "AVIF": ("AVIF", {"quality": 90}, 8),
    "HEIC": ("HEIF", {"quality": 90}, 8),
    "GIF": ("GIF", {}, 8),
}


@pytest.mark.parametrize(("kind", "options", "most"), **cases(FORMATS))
def test_every_format_gives_its_picture(cat, kind, options, most):
    data = saved(cat, kind, **options)
    assert mean_distance(seen(data), np.asarray(cat)) <= most
    if kind in ("MPO", "PNG", "GIF", "WEBP"):  # what follows the end of a file does no harm
        assert np.array_equal(seen(data + b"made by a scanner" + bytes(9999)), seen(data))


FILMS = [("PNG", {"default_image": True}), ("WEBP", {"lossless": True}), ("AVIF", FINE)]
FILMS += [(kind, {}) for kind in ("PNG", "GIF", "TIFF", "MPO")]


@pytest.mark.parametrize(("kind", "options"), FILMS)
def test_of_several_frames_or_pages_the_first_counts(kind, options):
    frames = [Image.new("RGB", (64, 48), colour) for colour in (RED, GREEN, BLUE)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(opened(data), "n_frames", 1) == 3
    assert distance(seen(data), RED) <= 4


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGBA", "PNG"), ("RGBA", "WEBP"), ("P", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")],
)
def test_large_images_are_seen_as_small_ones_are(mode, kind):
    """Blue on the left, and on the right transparent or white."""
    image = halves((*BLUE, 255), (9, 9, 9, 0), "RGBA")
    if mode != "RGBA":
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image).convert(mode)
    large = image.resize((1400, 1400), Image.Resampling.NEAREST)
    found = seen(saved(large, kind, lossless=True))
    assert 448 <= found.shape[0] < 1400
    assert distance(found[:, :200], BLUE) <= 6
    assert distance(found[:, -200:], WHITE) <= 6


def test_the_first_brand_of_an_avif_or_heic_may_be_a_general_one(cat):
    for kind, brands in {"AVIF": (b"mif1", b"msf1"), "HEIF": (b"mif1", b"heix")}.items():
        data = saved(cat, kind, quality=95)
        for brand in brands:
            found = seen(data[:8] + brand + data[12:])
            assert mean_distance(found, np.asarray(cat)) < 4


def test_a_heic_image_without_pillow_heif_is_refused_as_what_it_is(cat, monkeypatch):
    data = saved(cat, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    assert refused(data) == script.HEIC


# Broken, or whole all the same

ASIDE = {  # chunks without which the picture is the same
    "zTXt": b"Comment\0\0" + zlib.compress(b"x" * 3_000_000),
    "teSt": b"of an editor's own",
}
WRONG = {  # chunks that browsers use only with the right checksum
    "iCCP": b"p\0\0" + zlib.compress(P3),
    "tRNS": struct.pack(">3H", *WHITE),
    "eXIf": EXIF,
}


@pytest.mark.parametrize("kind", [*ASIDE, *WRONG])
def test_a_png_is_not_broken_by_what_makes_no_pixels(cat, kind):
    content = (ASIDE | WRONG)[kind]
    for wrong, at_end in itertools.product({True, kind in WRONG}, (True, False)):
        data = with_chunk(cat, kind.encode(), content, wrong=wrong, at_end=at_end)
        assert np.array_equal(seen(data), np.asarray(cat))


@pytest.mark.parametrize("kind", ["IHDR", "PLTE", "IDAT"])
def test_a_png_is_broken_by_a_wrong_checksum_in_what_makes_its_pixels(cat, kind):
    data = bytearray(saved(cat.quantize(16), "PNG"))
    at = data.index(kind.encode())
    data[at + 4 + int.from_bytes(data[at - 4 : at])] ^= 1
    assert refused(bytes(data)) == script.BROKEN


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "with restarts": {"restart_marker_rows": 1},
    "full colour": {"subsampling": "4:4:4", "quality": 98},
}
FILM = b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + random.Random(1).randbytes(200_000)
GAIN_MAP = saved(Image.new("L", (40, 30)), "JPEG")
WHOLE = {  # ends of files of which all pixels are there
    "1 byte gone": lambda data: data[:-1],
    "2 bytes gone": lambda data: data[:-2],
    "text there": lambda data: data[:-2] + b"made by a camera",
    "a film and a box of zeros after it": lambda data: data + FILM + bytes(9000),
    "a gain map without its end after it": lambda data: data + GAIN_MAP[:-2],
}
NOT_WHOLE = {
    "3 bytes gone": lambda data: data[:-3],
    "half gone, text there": lambda data: data[: len(data) // 2] + b"<b>Time-out</b>",
    "half gone, half a marker there": lambda data: data[: len(data) // 2] + b"\xff",
    # A copy that stopped. Some of these zeros make pixels, too.
    "3 bytes gone, zeros there": lambda data: data[:-3] + bytes(3),
    "900 bytes gone, zeros there": lambda data: data[:-900] + bytes(900),
}


@pytest.mark.parametrize("options", **cases(JPEGS))
def test_a_jpeg_is_whole_where_all_its_pixels_are_there_and_broken_elsewhere(cat, options):
    data = saved(cat, "JPEG", **options)
    for name, change in WHOLE.items():
        assert np.array_equal(seen(change(data)), seen(data)), name
    for name, change in NOT_WHOLE.items():
        assert refused(change(data)) == script.BROKEN, name


def test_the_end_of_a_jpegs_thumbnail_is_not_its_own(cat):
    jpeg = saved(cat, "JPEG")
    thumbnail = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + saved(cat.resize((32, 32)), "JPEG")
    data = jpeg[:2] + segment(0xE1, thumbnail) + jpeg[2:]
    assert np.array_equal(seen(data[:-2]), seen(data))
    assert refused(data[:-200]) == script.BROKEN


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "WebP", "AVIF", "HEIC", "BMP"])
def test_of_a_file_that_was_cut_off_nothing_is_seen(cat, name):
    kind, options, _ = FORMATS[name]
    data = saved(cat.resize((192, 128)), kind, **options)
    for share in (0.2, 0.5, 0.95):
        kept = int(len(data) * share)
        assert refused(data[:kept]) == script.BROKEN
        if kind in ("JPEG", "PNG", "GIF"):  # a copy that stopped halfway
            assert refused(data[:kept] + bytes(len(data) - kept + 4096)) == script.BROKEN
    for length in (1, 2, 4, 8, 12, 16, 24, 32):
        assert refused(data[:length])


# Rare, no image at all, or too small


def a_tiff(**tags):
    return tiff((32, 32), bytes(32 * 32 * 12), **tags)


RARE = {
    "transparent gray of 1 bit": (gray_png(1, [0, 1], 1), "1-bit PNG with a transparent colour"),
    "transparent colour of 16 bits": (
        deep_png(2, [1, 2, 3] * 32, chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))),
        "16-bit PNG with a transparent colour",
    ),
    "TIFF of 16 bits": (a_tiff(depth=16), "TIFF with pixels of mode I;16"),
    "TIFF of floats": (a_tiff(depth=32, t339=3), "TIFF with pixels of mode F"),
    "TIFF of Lab": (saved(Image.new("LAB", (32, 32)), "TIFF"), "TIFF with pixels of mode LAB"),
    "TIFF of an unknown compression": (a_tiff(t259=34712), "TIFF, if it is not broken"),
    "half of a TIFF": (a_tiff()[:99], "TIFF, if it is not broken"),
    "JPEG XL": (b"\xff\x0a" + bytes(60), "JPEG XL"),
}


@PILLOW_WARNS
@pytest.mark.parametrize(("data", "detail"), **cases(RARE))
def test_a_rare_kind_is_refused_by_its_name(data, detail):
    assert refused(data).startswith(f"{script.RARE_FORMAT} ({detail}")


DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><path d="M0 0"/></svg>'
PROLOG = b'<?xml version="1.0" encoding="UTF-8"?>\n'
DOCTYPE = b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "x.dtd" [<!ENTITY a "b">]>'
NO_IMAGES = {
    script.EMPTY: [b"", b" \r\n"],
    script.SVG: [
        DRAWING,
        PROLOG + DOCTYPE + DRAWING,
        PROLOG + b"<!-- " + b"x" * 3000 + b" -->" + b'<svg:svg xmlns:svg="x"/>',
    ],
    script.WEB_PAGE: [
        b"\r\n <HTML lang=en><head></head></html>",
        "<!-- saved -->\n<html><body>Not found</body></html>".encode("utf-16"),
        b"<!DOCTYPE html><html>" + DRAWING + b"</html>",
        PROLOG + b"<Error><Code>NoSuchKey</Code></Error>",  # a storage's
    ],
    script.JSON: [b'{"error": "not found"}', b'\xef\xbb\xbf [1, "<svg>"]'],
    script.PDF: [b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj"],
    script.OTHER_FORMAT: [
        b"404 page not found",
        FILM,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%EndComments\n",  # Pillow would start a program for it
    ],
}


@pytest.mark.parametrize("reason", NO_IMAGES)
def test_what_is_no_image_is_refused_as_what_it_is(reason):
    assert {refused(data) for data in NO_IMAGES[reason]} == {reason}


def test_a_tracking_pixel_or_spacer_is_too_small():
    for size in ((1, 1), (15, 400), (400, 15)):
        for kind in ("PNG", "GIF", "JPEG"):
            data = saved(Image.new("RGB", size, RED), kind)
            assert refused(data) == f"{script.TOO_SMALL} ({size[0]} x {size[1]})"
    assert decoded(saved(Image.new("RGB", (16, 16), RED), "PNG")).size == (16, 16)


def test_a_defect_is_never_the_files_fault(monkeypatch):
    def reduce(*_):
        raise AttributeError("reduce")

    monkeypatch.setattr(Image.Image, "reduce", reduce)  # an upgrade of Pillow took it away, say
    with pytest.raises(AttributeError, match="reduce"):
        levels_of(saved(Image.new("RGB", (900, 900)), "PNG"))


# What CLIP gets


def test_preprocessing_gives_the_bits_of_transformers_at_any_size():
    dice, processor = random.Random(5), models.image_processor()
    sizes = [(16, 16), (224, 224), (225, 449), (223, 1999), (17, 1700)]
    sizes += [(dice.randint(16, 700), dice.randint(16, 700)) for _ in range(15)]
    for width, height in sizes:
        for image in (noise(width, height), noise(height, width)):
            expected = processor(image, return_tensors="np")["pixel_values"][0]
            pixels = script.normalise(np.asarray(in_srgb(square(image))))
            assert (pixels.dtype, pixels.shape) == (np.float32, (3, 224, 224))
            assert pixels.tobytes() == expected.tobytes(), image.size


def test_reducing_large_images_first_hardly_changes_what_is_seen(photos):
    """In the vectors: by up to 0.6 % (JPEG), 0.8 % (PNG) of the distance between photographs."""
    mosaic = Image.new("RGB", (1500, 1500))
    for n, data in enumerate(list(photos.values())[:9]):
        mosaic.paste(opened(data).resize((500, 500)), (n % 3 * 500, n // 3 * 500))
    for side, kind in itertools.product((900, 1500), ("JPEG", "BMP")):
        data = saved(mosaic.resize((side, side)), kind)
        found, whole = decoded(data), opened(data)
        assert 448 <= found.width < side
        assert mean_distance(*(np.asarray(square(image)) for image in (found, whole))) < 1.5
    banner = saved(mosaic.resize((2700, 450)), "BMP")
    assert decoded(banner).size == (2700, 450)


# Anything at all


def seeds(cat):
    """Small files of every format, to be damaged."""
    small = cat.resize((40, 32))
    return [
        *(saved(small, kind, **options) for kind, options, _ in FORMATS.values()),
        saved(small.convert("CMYK"), "JPEG", icc_profile=INK, exif=exif(6)),
        saved(small.convert("P"), "PNG", transparency=bytes(range(200)), exif=exif(5)),
        *SIXTEEN_BITS.values(),
    ]


def damaged(data, dice):
    """A copy with a few changes, most of them near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        at = dice.randrange(min(len(data), dice.choice((32, 128, 512, len(data)))))
        flipped = bytes([data[at] ^ 1 << dice.randrange(8)])
        inserted = dice.randbytes(dice.randrange(1, 20))
        changes = [(1, flipped), (0, inserted), (4, b"\xff" * 4), (4, bytes(4)), (9, b"")]
        count, new = dice.choice(changes)
        data[at : at + count] = new
    return bytes(data[: len(data) if dice.random() < 0.9 else at])


def test_a_thousand_damaged_files_end_in_an_image_or_a_named_failure(cat):
    dice, sources = random.Random(3), seeds(cat)
    decoder, reasons = Decoder(), Counter()
    for n in range(1000):
        try:
            assert decoder.decode(damaged(sources[n % len(sources)], dice)).shape == (224, 224, 3)
            reasons["none"] += 1
        except ImageError as error:
            reasons[str(error).partition(" (")[0]] += 1
    assert set(reasons) <= {"none", *script.ADVICE} - {script.DEFECT, script.DECODER_LOST}
    assert 100 < reasons["none"] < 900
