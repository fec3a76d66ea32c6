"""Golden tests of decoding: one drawn image per trap, against what was drawn."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from drawn_images import BLUE, GREEN, GREY, RED, STORED_AS, encode, png, quadrants, textured
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from training.config.workspace import DecodeConfig
from training.images import decoding
from training.tables.table import Reason

CONFIG = DecodeConfig()


def refused(data, config=CONFIG):
    with pytest.raises(decoding.Unusable) as caught:
        decoding.decode(data, config)
    error = caught.value
    assert error.reason in set(Reason)
    assert "\n" not in f"{error.value}{error.detail}"
    return error


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("fmt", "options"),
    [("PNG", {}), ("JPEG", {"quality": 95, "subsampling": 0}), ("WEBP", {"lossless": True}),
     ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)  # fmt: skip
def test_every_orientation_comes_out_upright(fmt, options, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED_AS[orientation](quadrants()))
    decoded = decoding.decode(encode(stored, fmt, exif=exif, **options), CONFIG)
    assert decoded.pixels.shape == (48, 64, 3)
    assert np.abs(decoded.pixels[3::8, 3::8].astype(int) - quadrants()[3::8, 3::8]).max() <= 6
    assert decoded.orientation == orientation
    assert tuple(decoded.stored) == stored.shape[:2]
    assert decoded.format == fmt


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_invalid_orientation_is_none(value):
    exif = Image.Exif()
    exif[274] = value
    decoded = decoding.decode(encode(quadrants(), "PNG", exif=exif), CONFIG)
    assert decoded.orientation == 1
    assert np.array_equal(decoded.pixels, quadrants())


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_come_out_as_they_were(fmt):
    pixels = textured()
    options = {"lossless": True} if fmt == "WEBP" else {}
    decoded = decoding.decode(encode(pixels, fmt, **options), CONFIG)
    assert np.array_equal(decoded.pixels, pixels)
    assert decoded.pixels.flags.c_contiguous
    assert (decoded.format, decoded.mode) == (fmt, "RGB")


@pytest.mark.parametrize("fmt", ["JPEG", "AVIF"])
def test_lossy_formats_come_out_nearly_so(fmt):
    decoded = decoding.decode(encode(textured(), fmt, quality=95), CONFIG)
    assert np.abs(decoded.pixels.astype(int) - textured()).mean() < 4


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(fmt):
    wide = np.linspace(0, 65535, 32 * 48).astype(np.uint16).reshape(32, 48)
    decoded = decoding.decode(encode(Image.fromarray(wide), fmt), CONFIG)
    assert np.array_equal(decoded.pixels[..., 1], np.rint(wide / 257).astype(np.uint8))


def test_16_bit_grey_whose_zero_is_white_is_turned_over():
    wide = np.linspace(0, 65535, 32 * 48).astype(np.uint16).reshape(32, 48)
    shown = 255 - np.rint(wide / 257).astype(np.uint8)
    decoded = decoding.decode(encode(Image.fromarray(wide), "TIFF", tiffinfo={262: 0}), CONFIG)
    assert np.array_equal(decoded.pixels[..., 1], shown)
    packed = decoding.decode(
        encode(Image.fromarray(wide), "TIFF", tiffinfo={262: 0}, compression="tiff_lzw"), CONFIG
    )
    assert np.array_equal(packed.pixels[..., 1], shown)


def test_8_bit_grey_whose_zero_is_white_is_turned_over_once():
    grey = np.linspace(0, 255, 32 * 48).astype(np.uint8).reshape(32, 48)
    data = bytearray(encode(Image.fromarray(grey), "TIFF"))
    entry = data.index(struct.pack("<HHI", 262, 3, 1))
    data[entry + 8] = 0
    assert np.array_equal(decoding.decode(bytes(data), CONFIG).pixels[..., 1], 255 - grey)


def test_16_bit_rgb_keeps_its_high_bytes():
    wide = (textured(32, 48).astype(np.uint16) << 8) | 0x40
    decoded = decoding.decode(
        png(32, 48, 16, 2, [row.astype(">u2").tobytes() for row in wide]), CONFIG
    )
    assert np.abs(decoded.pixels.astype(int) - textured(32, 48)).max() <= 1


def test_cmyk_jpeg_is_not_a_negative():
    ink = Image.new("CMYK", (40, 32), (0, 255, 255, 0))
    decoded = decoding.decode(encode(ink, "JPEG", quality=95), CONFIG)
    assert decoded.mode == "CMYK"
    assert np.abs(decoded.pixels.astype(int) - (255, 0, 0)).max() <= 12


def blended(rgb, alpha):
    """Straight alpha over white, by definition."""
    return np.rint(rgb * (alpha / 255) + 255 * (1 - alpha / 255))


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_blended_on_white(fmt):
    alpha = np.linspace(0, 255, 48 * 64).astype(np.uint8).reshape(48, 64, 1)
    rgba = np.concatenate([quadrants(), alpha], axis=2)
    options = {"lossless": True, "exact": True} if fmt == "WEBP" else {}
    decoded = decoding.decode(encode(rgba, fmt, **options), CONFIG)
    assert np.abs(decoded.pixels - blended(quadrants(), alpha)).max() <= 1
    assert tuple(decoded.pixels[0, 0]) == (255, 255, 255)


def test_grey_with_alpha_is_blended_on_white():
    alpha = np.linspace(0, 255, 32 * 48).astype(np.uint8).reshape(32, 48)
    grey = np.full((32, 48), 90, np.uint8)
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    decoded = decoding.decode(encode(image, "PNG"), CONFIG)
    assert np.abs(decoded.pixels[..., 2] - blended(grey, alpha)).max() <= 1


def test_premultiplied_tiff_is_unpremultiplied():
    alpha = np.full((32, 48, 1), 100, np.uint8)
    rgb = np.full((32, 48, 3), (200, 100, 50), np.uint8)
    premultiplied = np.concatenate([np.rint(rgb * (alpha / 255)).astype(np.uint8), alpha], axis=2)
    straight, associated = (
        struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1)
    )  # ExtraSamples
    data = encode(premultiplied, "TIFF")
    assert straight in data
    decoded = decoding.decode(data.replace(straight, associated), CONFIG)
    assert np.abs(decoded.pixels - blended(rgb, alpha)).max() <= 2


def test_palette_with_transparency_shows_white_where_it_is_clear():
    image = Image.fromarray(quadrants()).quantize(4)
    clear = image.getpixel((0, 0))
    decoded = decoding.decode(encode(image, "PNG", transparency=clear), CONFIG)
    assert decoded.mode == "P"
    assert tuple(decoded.pixels[2, 2]) == (255, 255, 255)
    assert np.abs(decoded.pixels[30, 50].astype(int) - GREY).max() <= 2


def test_palette_with_alpha_per_colour():
    image = Image.fromarray(quadrants()).quantize(4)
    decoded = decoding.decode(encode(image, "PNG", transparency=bytes([128] * 4)), CONFIG)
    assert np.abs(decoded.pixels[2, 2] - blended(np.array(RED), 128)).max() <= 2


def test_a_transparent_colour_of_rgb():
    decoded = decoding.decode(encode(quadrants(), "PNG", transparency=RED), CONFIG)
    assert tuple(decoded.pixels[2, 2]) == (255, 255, 255)
    assert tuple(decoded.pixels[30, 50]) == GREY


@pytest.mark.parametrize(("mode", "drawn"), [("1", 255), ("L", 77)])
def test_grey_and_bilevel_become_rgb(mode, drawn):
    decoded = decoding.decode(encode(Image.new(mode, (48, 32), drawn), "PNG"), CONFIG)
    assert (decoded.pixels == drawn).all()
    assert decoded.pixels.shape == (32, 48, 3)


P3 = np.array([[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def profile(matrix, gamma=2.2, name=b"Wide"):
    """A matrix profile by hand, as phones embed it. ICC.1:2001-04; `matrix`: colorants to D50
    XYZ."""

    def fixed(value):
        return struct.pack(">i", round(float(value) * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    description = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + b"\0" * 78
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = [
        (b"desc", description),
        (b"wtpt", xyz([0.9642, 1.0, 0.8249])),
        (b"cprt", b"text\0\0\0\0none\0\0\0\0"),
    ]
    tags += [
        (sign + b"XYZ", xyz(column))
        for sign, column in zip((b"r", b"g", b"b"), matrix.T, strict=True)
    ]
    tags += [(sign + b"TRC", curve) for sign in (b"r", b"g", b"b")]
    table, body = struct.pack(">I", len(tags)), b""
    for sign, content in tags:
        table += sign + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(
        ">I4sI4s4s4s",
        132 + 12 * len(tags) + len(body),
        b"none",
        0x02400000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
    )
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + xyz([0.9642, 1.0, 0.8249])[8:]
    return head.ljust(128, b"\0") + table + body


def converted(rgb, matrix, gamma=2.2):
    """What the profile says a colour is in sRGB, by formula."""
    linear = np.linalg.inv(SRGB) @ matrix @ (np.array(rgb) / 255) ** gamma
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return encoded * 255


def test_a_wide_gamut_profile_is_converted_to_srgb():
    decoded = decoding.decode(encode(quadrants(), "PNG", icc_profile=profile(P3)), CONFIG)
    for (y, x), drawn in {(2, 2): RED, (2, 50): GREEN, (30, 2): BLUE, (30, 50): GREY}.items():
        assert np.abs(decoded.pixels[y, x] - converted(drawn, P3)).max() <= 3
    assert np.abs(decoded.pixels[2, 2].astype(int) - RED).max() > 10


def test_the_profile_of_a_transparent_image_applies_before_the_blend():
    rgba = np.concatenate([quadrants(), np.full((48, 64, 1), 128, np.uint8)], axis=2)
    decoded = decoding.decode(encode(rgba, "PNG", icc_profile=profile(P3)), CONFIG)
    assert np.abs(decoded.pixels[2, 2] - blended(converted(RED, P3), 128)).max() <= 3


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    "icc",
    [srgb_profile(), b"junk", b"\0" * 200, profile(P3)[:140]],
    ids=["srgb", "junk", "zeros", "cut"],
)
def test_srgb_and_broken_profiles_change_nothing(icc):
    assert np.array_equal(
        decoding.decode(encode(quadrants(), "PNG", icc_profile=icc), CONFIG).pixels, quadrants()
    )


def test_an_rgb_profile_on_a_cmyk_image_is_ignored():
    ink = Image.new("CMYK", (40, 32), (0, 255, 255, 0))
    data = encode(ink, "JPEG", quality=95, icc_profile=profile(P3))
    assert np.abs(decoding.decode(data, CONFIG).pixels.astype(int) - (255, 0, 0)).max() <= 12


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.98])
def test_a_cut_file_is_refused(fmt, share):
    data = encode(textured(), fmt)
    error = refused(data[: int(len(data) * share)])
    assert error.reason in {"truncated", "decode_failed"}
    if fmt != "TIFF":  # Its directory may lie anywhere, and nothing says how long the file was.
        assert error.reason == "truncated"


NOTICED_IN_PART = {
    "JPEG": {"quality": 90}, "WEBP": {"lossless": True}, "GIF": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"},
    "AVIF": {},
}  # fmt: skip
"""Formats without checksums, or whose decoders do not look at them."""


@pytest.mark.parametrize("fmt", ["PNG", *NOTICED_IN_PART])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_file_cut_at_any_of_16_places_is_refused(fmt, seed):
    data = encode(textured(seed=seed), fmt, **NOTICED_IN_PART.get(fmt, {}))
    for length in [*(len(data) * place // 17 for place in range(1, 17)), len(data) - 1]:
        assert refused(data[:length]).reason in {"truncated", "decode_failed"}, length


def flips(data, count=100):
    """Copies of `data` with one bit changed each."""
    generator = np.random.default_rng(7)
    for bit in generator.choice(8 * len(data), count, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        yield bytes(damaged)


@pytest.mark.parametrize("seed", range(3))
def test_every_flipped_bit_of_a_png_is_noticed(seed):
    for damaged in flips(encode(textured(seed=seed), "PNG")):
        refused(damaged)


@pytest.mark.parametrize("fmt", NOTICED_IN_PART)
def test_a_flipped_bit_gives_an_image_or_a_reason_and_never_a_crash(fmt):
    reasons = set()
    for damaged in flips(encode(textured(), fmt, **NOTICED_IN_PART[fmt])):
        try:
            assert decoding.decode(damaged, DecodeConfig(max_pixels=1_000_000)).pixels.ndim == 3
        except decoding.Unusable as error:
            reasons.add(error.reason)
    assert reasons <= set(Reason)


def test_deflated_tiffs_carry_a_checksum_that_is_looked_at():
    data = encode(
        np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8),
        "TIFF",
        compression="tiff_deflate",
    )
    strip = slice(data.index(b"\x78"), len(data) - 400)
    for damaged in flips(data[strip]):
        refused(data[: strip.start] + damaged + data[strip.stop :])


def chunks(data):
    """Name and place of each chunk of a PNG."""
    at = 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, at + 12 + length
        at += 12 + length


def test_a_wrong_checksum_of_any_chunk_is_named():
    exif = Image.Exif()
    exif[274] = 6
    data = encode(textured(), "PNG", exif=exif, dpi=(96, 96))
    names = set()
    for name, _, end in chunks(data):
        names.add(name)
        error = refused(data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:])
        assert error.reason == "decode_failed"
        assert name.decode() in error.detail
    assert names == {b"IHDR", b"pHYs", b"eXIf", b"IDAT", b"IEND"}


@pytest.mark.parametrize("orientation", [None, 6])
def test_pixels_that_only_the_decoder_can_check_are_checked_before_the_metadata(orientation):
    # The first decode fails, a second one passes: reading the EXIF block first once hid the
    # failure.
    extra = b""
    if orientation:
        block = (
            b"MM\0*\0\0\0\x08\0\x01"
            + struct.pack(">HHIHH", 274, 3, 1, orientation, 0)
            + b"\0\0\0\0"
        )
        extra = (
            struct.pack(">I", len(block))
            + b"eXIf"
            + block
            + struct.pack(">I", zlib.crc32(b"eXIf" + block))
        )
    whole = png(96, 128, 8, 2, [row.tobytes() for row in textured()], extra)
    assert decoding.decode(whole, CONFIG).pixels.size == 96 * 128 * 3
    stored = zlib.compress(b"".join(b"\0" + row.tobytes() for row in textured()))
    for pixels in (stored[: len(stored) // 2], stored[:200] + bytes(64) + stored[264:]):
        body = (
            struct.pack(">I", len(pixels))
            + b"IDAT"
            + pixels
            + struct.pack(">I", zlib.crc32(b"IDAT" + pixels))
        )
        error = refused(
            whole[: whole.index(b"IDAT") - 4] + body + struct.pack(">I", 0) + b"IEND\xaeB`\x82"
        )
        assert error.reason in {"truncated", "decode_failed"}
        assert error.detail


def test_bytes_after_the_end_are_no_part_of_the_image():
    for fmt in ("PNG", "GIF", "JPEG"):
        data = encode(Image.fromarray(quadrants()), fmt)
        assert np.array_equal(
            decoding.decode(data + bytes(99), CONFIG).pixels, decoding.decode(data, CONFIG).pixels
        )


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_a_decode_that_warns_is_refused_with_its_words(fmt, monkeypatch):
    data = encode(quadrants(), fmt)
    plugin = PngImagePlugin.PngImageFile if fmt == "PNG" else TiffImagePlugin.TiffImageFile
    original = plugin.load

    def load(self):
        warnings.warn("half of it is missing", stacklevel=1)
        return original(self)

    monkeypatch.setattr(plugin, "load", load)
    error = refused(data)
    assert error.reason == "decode_failed"
    assert "half of it is missing" in error.detail


def test_a_bomb_is_refused_by_its_header():
    bomb = png(30_000, 30_000, 1, 0, [])
    assert len(bomb) < 200
    error = refused(bomb)
    assert error.reason == "too_many_pixels"
    within = refused(png(20_000, 15_000, 1, 0, []))  # Beyond our limit, below where Pillow raises.
    assert (within.reason, within.value, within.limit) == (
        "too_many_pixels",
        "300000000",
        "200000000",
    )


def test_limits_are_the_configs():
    data = encode(quadrants(), "PNG")
    assert refused(data, DecodeConfig(max_pixels=3071)).reason == "too_many_pixels"
    assert decoding.decode(data, DecodeConfig(max_pixels=3072)).pixels.shape == (48, 64, 3)
    small = refused(data, DecodeConfig(min_side_px=49))
    assert (small.reason, small.value, small.limit) == ("too_small", "48", "49")
    memory = refused(data, DecodeConfig(memory_bytes=7 * 3072 - 1))
    assert (memory.reason, memory.value, memory.limit) == (
        "out_of_memory",
        "at least 21504 bytes",
        "21503 bytes",
    )
    large = refused(data, DecodeConfig(max_bytes=50))
    assert (large.reason, large.value, large.limit) == ("too_many_bytes", str(len(data)), "50")


@pytest.mark.parametrize(
    ("data", "reason", "value"),
    [
        (b"", "empty_file", "0"),
        (b"hello", "not_an_image", None),
        (b"<html><body>404</body></html>", "not_an_image", None),
        (
            b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
            "format_not_allowed",
            "SVG",
        ),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "format_not_allowed", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 40, "format_not_allowed", "JXL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "format_not_allowed", "EPS"),
        (b"%PDF-1.7\n", "format_not_allowed", "PDF"),
        (b"\xff\xd8\xff\xe0", "truncated", "JPEG"),
        (b"\x89PNG\r\n\x1a\nIEND", "truncated", "PNG"),
    ],
)
def test_what_is_no_image_is_named(data, reason, value):
    error = refused(data)
    assert error.reason == reason
    assert value is None or error.value == value


def test_formats_that_pillow_knows_and_we_do_not_allow():
    error = refused(encode(Image.fromarray(quadrants()), "ICO"))
    assert (error.reason, error.value) == ("format_not_allowed", "ICO")
    assert refused(encode(Image.fromarray(quadrants()), "PPM")).reason == "not_an_image"


@pytest.mark.parametrize(("fmt", "options"), [("GIF", {}), ("WEBP", {}), ("PNG", {}), ("AVIF", {})])
def test_animations_are_refused(fmt, options):
    frames = [Image.fromarray(textured(seed=s)) for s in range(3)]
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], duration=100, **options)
    assert refused(data).reason == "animated"


def test_one_frame_is_a_image():
    assert decoding.decode(encode(quadrants(), "GIF"), CONFIG).pixels.shape == (48, 64, 3)


def test_of_a_multi_image_jpeg_and_a_tiff_the_first_is_taken():
    for fmt in ("MPO", "TIFF"):
        first, second = Image.fromarray(quadrants()), Image.fromarray(textured(48, 64))
        decoded = decoding.decode(encode(first, fmt, save_all=True, append_images=[second]), CONFIG)
        assert decoded.format == fmt
        assert np.abs(decoded.pixels[2, 2].astype(int) - RED).max() <= 6


@pytest.mark.parametrize("values", [np.int32, np.float32])
def test_deeper_than_16_bits_is_refused_and_not_guessed(values):
    image = Image.fromarray(np.ones((32, 32), values))
    error = refused(encode(image, "TIFF"))
    assert (error.reason, error.value) == ("mode_not_allowed", image.mode)


@pytest.mark.parametrize(
    ("fmt", "options", "dpi"),
    [("PNG", {}, None), ("PNG", {"dpi": (96, 96)}, 96.0), ("JPEG", {"dpi": (300, 300)}, 300.0), ("JPEG", {}, None),
     ("TIFF", {}, None), ("TIFF", {"dpi": (150, 150)}, 150.0)],
)  # fmt: skip
def test_dpi_is_what_the_file_says(fmt, options, dpi):
    found = decoding.decode(encode(quadrants(), fmt, **options), CONFIG).dpi
    assert found == (None if dpi is None else pytest.approx(dpi, abs=0.02))


def test_dpi_is_not_made_up_for_a_jpeg_with_exif_only():
    exif = Image.Exif()
    exif[271] = "Maker"
    data = encode(quadrants(), "JPEG", exif=exif)
    jfif = data.index(b"\xff\xe0")
    length = struct.unpack(">H", data[jfif + 2 : jfif + 4])[0]
    data = data[:jfif] + data[jfif + 2 + length :]
    assert Image.open(io.BytesIO(data)).info.get("dpi") == (72, 72)
    assert decoding.decode(data, CONFIG).dpi is None


@settings(max_examples=150, deadline=None)
@given(
    fmt=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]),
    position=st.floats(0, 0.999),
    value=st.binary(min_size=1, max_size=6),
)
def test_damage_gives_a_image_or_a_reason(fmt, position, value):
    data = bytearray(encode(quadrants(), fmt))
    at = int(position * len(data))
    data[at : at + len(value)] = value
    error = None
    try:
        decoded = decoding.decode(bytes(data), DecodeConfig(max_pixels=1_000_000))
    except decoding.Unusable as caught:
        error = caught
    if error is None:
        assert decoded.pixels.dtype == np.uint8
        assert decoded.pixels.ndim == 3
    else:
        assert error.reason in set(Reason)
        assert (error.detail or "").isprintable()


def test_files_are_read_only_when_they_are_files(tmp_path):
    (tmp_path / "real.jpg").write_bytes(b"content")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "real.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert decoding.read_file(tmp_path / "real.jpg", CONFIG) == b"content"
    for name, reason in [
        ("empty.jpg", "empty_file"), ("link.jpg", "link_not_followed"), ("folder.jpg", "not_a_file"),
        ("pipe.jpg", "not_a_file"), ("none.jpg", "gone"), ("real.jpg/x.jpg", "gone"),
        ("l" * 300 + ".jpg", "unreadable"),
    ]:  # fmt: skip
        with pytest.raises(decoding.Unusable) as caught:
            decoding.read_file(tmp_path / name, CONFIG)
        assert caught.value.reason == reason, name
    with pytest.raises(decoding.Unusable, match=r"too_many_bytes: 7 \(limit 6"):
        decoding.read_file(tmp_path / "real.jpg", DecodeConfig(max_bytes=6))
