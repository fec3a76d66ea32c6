"""The demo world's share of trouble: junk images, damaged files and odd encodings, as real
folders have them."""

import io
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from demo.drawing import draw
from demo.scenes import Scene, clean, sample_scene
from training.buckets.geometry import Size
from training.seeds import Purpose, generator, numpy_generator

JUNK_KINDS = ("blank", "noise", "grid", "strip")
INVERSE_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation → what must be done to upright pixels so that a viewer's correction shows them
upright."""


def draw_junk(seed: int, *key: int | str) -> Image.Image:
    """An image no one wants: nearly blank, pure noise, a grid of thumbnails or a film strip; about
    150–260 px."""
    rng = generator(seed, Purpose.DEMO, "junk", *key)
    noise = numpy_generator(seed, Purpose.DEMO, "junk pixels", *key)
    kind = rng.choice(JUNK_KINDS)
    size = Size(rng.randint(150, 260), rng.randint(150, 260))
    if kind == "noise":
        coarse = rng.choice((1, 2, 4))
        field = noise.integers(0, 256, (size.height // coarse, size.width // coarse, 3)).astype(
            "uint8"
        )
        return Image.fromarray(field).resize((size.width, size.height), Image.Resampling.NEAREST)
    if kind == "blank":
        shade = (
            noise.integers(0, 256, 3) if rng.random() < 0.5 else noise.integers(0, 256, 1).repeat(3)
        )
        field = shade + noise.normal(0, 2.0, (*size, 3))
        return Image.fromarray(field.clip(0, 255).astype("uint8"))
    rows, columns = (
        (1, rng.randint(4, 6)) if kind == "strip" else (rng.randint(3, 6), rng.randint(3, 6))
    )
    size = Size(150, 330) if kind == "strip" else size
    return _thumbnails(seed, size, rows, columns, rng, *key)


def _thumbnails(
    seed: int, size: Size, rows: int, columns: int, rng: random.Random, *key: int | str
) -> Image.Image:
    sheet = Image.new("RGB", (size.width, size.height), rng.choice(["white", "black", "#808080"]))
    gap = 3
    cell = Size((size.height - gap) // rows - gap, (size.width - gap) // columns - gap)
    for row in range(rows):
        for column in range(columns):
            scene = clean(sample_scene(seed, "thumbnail", *key, row, column))
            small = draw(replace(scene, size=Size(96, 96))).image.resize((cell.width, cell.height))
            sheet.paste(small, (gap + column * (cell.width + gap), gap + row * (cell.height + gap)))
    return sheet


def encode(image: Image.Image, extension: str, **options: object) -> bytes:
    """The image as a file's bytes: `jpg`, `png`, `webp` or `gif`, in good quality unless
    `options` say otherwise."""
    name = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}[extension]
    defaults: dict[str, object] = {"jpg": {"quality": 93}, "webp": {"quality": 90}}.get(
        extension, {}
    )  # type: ignore[assignment]
    packed = io.BytesIO()
    image.save(packed, name, **{**defaults, **options})
    return packed.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    """A JPEG whose pixels lie on their side and whose EXIF tag says how to put them upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image.transpose(INVERSE_TURN[orientation]), "jpg", exif=exif)


def damaged(seed: int) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of files that are no image any more."""
    whole = draw(clean(sample_scene(seed, "damaged"))).image
    photo, lossless = encode(whole, "jpg"), encode(whole, "png")
    yield "cut_short.jpg", photo[: len(photo) // 2]
    yield "cut_short.png", lossless[: len(lossless) // 3]
    yield "empty.jpg", b""
    yield "error_page.jpg", b"<!doctype html><title>404</title><p>Not found</p>\n"
    yield "random.webp", numpy_generator(seed, Purpose.DEMO, "random file").bytes(2048)


def odd_modes(seed: int) -> Iterator[tuple[str, Scene, bytes]]:
    """Names, scenes and bytes of encodings that decoders trip over; every one shows its scene when
    read well."""
    names = ("grey16.png", "cmyk.jpg", "transparent.png", "palette.png", "animated.gif")
    for number, name in enumerate(names):
        scene = clean(sample_scene(seed, "odd mode", number))
        if name == "grey16.png":
            shapes = tuple(replace(shape, colour="white") for shape in scene.shapes[:1])
            scene = replace(scene, shapes=shapes, background="black", pattern="plain")
        image = draw(scene).image
        if name == "grey16.png":
            data = encode(Image.fromarray(_sixteen_bits(image)), "png")
        elif name == "cmyk.jpg":
            data = encode(image.convert("CMYK"), "jpg")
        elif name == "transparent.png":
            image.putalpha(
                Image.linear_gradient("L").resize(image.size).point(lambda value: 120 + value // 2)
            )
            data = encode(image, "png")
        elif name == "palette.png":
            data = encode(image.quantize(64), "png")
        else:
            frames = [
                image.rotate(turn, fillcolor=image.getpixel((0, 0))).quantize(64)
                for turn in (0, 8, 16)
            ]
            data = encode(
                frames[0], "gif", save_all=True, append_images=frames[1:], duration=120, loop=0
            )
        yield name, scene, data


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), np.uint16) * 257
