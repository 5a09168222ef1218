"""Every depth, colour, order of bytes and kind of transparency: the right pixels, or a clear refusal, never others.

Files are written bit by bit (`raster_files`) and the right pixels follow from the samples; Pillow is not asked.
"""

import copy
import io
import itertools
import pickle
import struct
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from fila.images import ImageError, load_image
from tests.model.raster_files import png, pnm, tiff

DEPTHS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 32)
ORDERS = ("<", ">")


def levels(depth: int) -> list[int]:
    """Samples of a depth, ends and middle; of more than 8 bits too many of them to pass for fewer."""
    full = (1 << depth) - 1
    return sorted({0, 1, full // 3, full // 2, full - 1, full})


def eight(values: list[int], depth: int) -> list[int]:
    return [round(value * 255 / ((1 << depth) - 1)) for value in values]


def combinations(depth: int, count: int) -> list[tuple[int, ...]]:
    """Pixels of `count` components that take unlike values."""
    some = levels(depth)
    return list(itertools.product(*[some[:2], some[-3:], some[-1:], some][:count]))


def flat(pixels: list[tuple[int, ...]]) -> list[int]:
    return [value for pixel in pixels for value in pixel]


def row_of(data: object) -> np.ndarray:
    return np.asarray(load_image(data)).astype(int)[0]


def assert_row(data: object, expected: list, within: int = 1) -> None:
    expected = np.array(expected)
    expected = expected[:, None] if expected.ndim == 1 else expected
    got = row_of(data)
    assert np.abs(got - expected).max() <= within, f"{got.tolist()} instead of {expected.tolist()}"


def over_white(pixel: tuple[int, ...], depth: int) -> list[int]:
    """Colours and their alpha, last, over white."""
    full, alpha = (1 << depth) - 1, pixel[-1]
    return [round((value * alpha / full + full - alpha) * 255 / full) for value in pixel[:-1]]


# --- PNG: every depth that the format has


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_pngs(depth: int) -> None:
    values = levels(depth)
    assert_row(png([values], depth, 0), eight(values, depth))
    for key in [*values, (1 << depth) + values[1]]:  # of the last, bits above the depth mean nothing
        if key < 1 << 16:
            masked = key & ((1 << depth) - 1)
            expected = [
                255 if value == masked else grey for value, grey in zip(values, eight(values, depth), strict=True)
            ]
            assert_row(png([values], depth, 0, (b"tRNS", struct.pack(">H", key))), expected)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_pngs(depth: int) -> None:
    values = levels(depth)
    colours = [(i * 37 % 256, i * 91 % 256, i * 53 % 256) for i in range(1 << depth)]
    alphas = [i * 77 % 256 for i in range(1 << depth)]
    table = (b"PLTE", bytes(flat(colours)))
    assert_row(png([values], depth, 3, table), [colours[value] for value in values])
    assert_row(
        png([values], depth, 3, table, (b"tRNS", bytes(alphas))),
        [over_white((*colours[value], alphas[value]), 8) for value in values],
    )
    assert_row(
        png([values], depth, 3, table, (b"tRNS", b"\0")),  # the entries behind are opaque
        [(255, 255, 255) if value == 0 else colours[value] for value in values],
    )


@pytest.mark.parametrize("depth", [8, 16])
def test_coloured_pngs(depth: int) -> None:
    pixels = combinations(depth, 3)
    expected = [eight(list(pixel), depth) for pixel in pixels]
    assert_row(png([flat(pixels)], depth, 2), expected)
    for key in (pixels[0], pixels[-1], (1, 1, 1)):
        keyed = [[255] * 3 if pixel == key else colour for pixel, colour in zip(pixels, expected, strict=True)]
        data = png([flat(pixels)], depth, 2, (b"tRNS", struct.pack(">HHH", *key)))
        assert_row(data, keyed)
        assert_row(Image.open(io.BytesIO(data)), keyed)
    for count, colour in ((2, 4), (4, 6)):
        pixels = combinations(depth, count)
        assert_row(png([flat(pixels)], depth, colour), [over_white(pixel, depth) for pixel in pixels])


# --- TIFF: what Pillow knows is right, the rest is refused


def tiffs() -> Iterator[tuple[str, bytes, list]]:
    """Name, file and right pixels, over both orders of bytes, plain and deflated."""
    for order, deflate in itertools.product(ORDERS, (False, True)):
        how = {"order": order, "deflate": deflate}
        for depth in DEPTHS:
            yield from (
                (f"{order} {'deflate' if deflate else 'plain'} {depth} bits: {name}", data, expected)
                for name, data, expected in tiffs_of_depth(depth, how)
            )


def tiffs_of_depth(depth: int, how: dict) -> Iterator[tuple[str, bytes, list]]:
    values, full = levels(depth), (1 << depth) - 1
    for width in range(2, len(values) + 1):  # rows that end within a byte
        some = values[-width:]
        yield f"black is zero, {width} wide", tiff([some], depth, 1, **how), eight(some, depth)
    yield "white is zero", tiff([values], depth, 0, **how), [255 - grey for grey in eight(values, depth)]
    if depth > 16:
        return
    maps = [[i * step % 65536 for i in range(1 << depth)] for step in (3777, 9111, 5333)]
    yield (
        "palette",
        tiff([values], depth, 3, tags=[(320, 3, list(itertools.chain(*maps)))], **how),
        [[round(entries[value] / 257) for entries in maps] for value in values],
    )
    if depth <= 8:
        maps = [[i * step % 256 for i in range(1 << depth)] for step in (37, 91, 53)]
        data = tiff([values], depth, 3, tags=[(320, 3, list(itertools.chain(*maps)))], **how)
        yield "palette of 8 bits", data, [[entries[value] for entries in maps] for value in values]
    pixels = combinations(depth, 3)
    rgb = [eight(list(pixel), depth) for pixel in pixels]
    yield "RGB", tiff([flat(pixels)], depth, 2, samples=3, **how), rgb
    if depth in (8, 16) and not how["deflate"]:
        size = len(pixels) * depth // 8
        tags = [(256, 3, [len(pixels)]), (257, 3, [1]), (258, 3, [depth] * 3), (277, 3, [3]), (284, 3, [2])]
        tags += [(273, 4, [8, 8 + size, 8 + 2 * size]), (279, 4, [size] * 3), (278, 3, [1])]
        planes = [[pixel[i] for pixel in pixels] for i in range(3)]
        yield "RGB in planes", tiff(planes, depth, 2, tags=tags, **how), rgb
    luma, none = full // 3, full // 2 + 1
    whole = tiff([[luma, none, none] * 2], depth, 6, samples=3, tags=[(530, 3, [1, 1])], **how)
    yield "YCbCr, colours for each pixel", whole, eight([luma] * 2, depth)
    halved = [(256, 3, [2]), (257, 3, [2]), (278, 3, [2])]  # without the tag they are for 2 x 2 pixels
    data = tiff([[luma] * 4 + [none] * 2], depth, 6, samples=3, tags=halved, **how)
    yield "YCbCr, colours for each 2 x 2", data, eight([luma] * 2, depth)
    inks = combinations(depth, 4)
    white = [[round((full - ink) * (full - pixel[3]) / full * 255 / full) for ink in pixel[:3]] for pixel in inks]
    yield "CMYK", tiff([flat(inks)], depth, 5, samples=4, **how), white
    for photometric, count in ((1, 2), (2, 4)):
        for extra, meaning in ((0, "unknown"), (1, "multiplied"), (2, "alpha")):
            pixels = [p for p in combinations(depth, count) if extra != 1 or max(p) == p[-1]]
            data = tiff([flat(pixels)], depth, photometric, samples=count, tags=[(338, 3, [extra])], **how)
            right: Callable[[tuple[int, ...]], list[int]] = {
                0: lambda pixel: eight(list(pixel[:-1]), depth),
                1: lambda pixel: eight([value + full - pixel[-1] for value in pixel[:-1]], depth),
                2: lambda pixel: over_white(pixel, depth),
            }[extra]
            yield f"{count} samples, the last {meaning}", data, [right(pixel) for pixel in pixels]


def test_tiffs_are_right_or_refused() -> None:
    read, refused = set(), set()
    for name, data, expected in tiffs():
        try:
            expected = [[value] for value in expected] if isinstance(expected[0], int) else expected
            assert_row(data, np.broadcast_to(expected, (len(expected), 3)).tolist())
            read.add(name)
        except ImageError:
            refused.add(name)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    for kind in ("plain", "deflate"):
        for order in ORDERS:
            for depth in (1, 2, 4, 8):
                for name in ("black is zero, 2 wide", "white is zero", "palette", "palette of 8 bits"):
                    assert f"{order} {kind} {depth} bits: {name}" in read
            for depth in (8, 16):
                for name in ("RGB", "CMYK", "4 samples, the last multiplied", "4 samples, the last alpha"):
                    assert f"{order} {kind} {depth} bits: {name}" in read
            assert f"{order} {kind} 16 bits: black is zero, 3 wide" in read
        assert f"< {kind} 12 bits: black is zero, 3 wide" in read
        assert f"< {kind} 16 bits: white is zero" in read
        assert f"< {kind} 32 bits: black is zero, 4 wide" in read
    assert "< plain 16 bits: RGB in planes" in refused  # Pillow reads bytes for samples


@pytest.mark.parametrize("order", ORDERS)
def test_tiffs_of_floats(order: str) -> None:
    values = np.array([0.0, 0.25, 1.0], np.float32)
    bits = [values.view(np.uint32).tolist()]
    for photometric, expected in ((1, [0, 64, 255]), (0, [255, 191, 0])):
        assert_row(tiff(bits, 32, photometric, order=order, tags=[(339, 3, [3])]), expected, within=0)


@pytest.mark.parametrize("depth", [8, 16, 32])
def test_signed_samples_have_no_white_and_are_refused(depth: int) -> None:
    with pytest.raises(ImageError, match="unsigned or floating-point samples"):
        load_image(tiff([[1, 2, 3]], depth, 1, tags=[(339, 3, [2])]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth, samples, words", [
    (10, 1, "1 samples of 10 bits, photometric interpretation 1"),
    (14, 1, "1 samples of 14 bits"),
    (12, 3, "3 samples of 12 bits, photometric interpretation 2"),
    (32, 3, "3 samples of 32 bits"),
])  # fmt: skip
def test_a_tiff_of_samples_that_are_not_read_is_refused_by_their_depth(order, depth, samples, words) -> None:
    data = tiff([[0, 1, 1] * samples], depth, 2 if samples == 3 else 1, samples=samples, order=order)
    with pytest.raises(ImageError, match=f"expected a TIFF of grey of .*, got one of {words}"):
        load_image(data)


def test_a_tiff_that_does_not_say_what_white_is_is_refused() -> None:
    with pytest.raises(ImageError, match="says whether black or white is zero"):
        load_image(tiff([[0, 255]], 8, None))


def test_a_decoded_tiff_is_still_asked() -> None:
    image = Image.open(io.BytesIO(tiff([[0, 1024, 4095]], 12, 1)))
    image.load()
    assert_row(image, [0, 64, 255])


# --- PGM and PPM: any number may be white


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("full", [1, 2, 3, 15, 100, 254, 255, 256, 1_000, 1_023, 4_095, 65_534, 65_535])
def test_pgms_and_ppms_of_every_maximum(full: int, plain: bool) -> None:
    values = sorted({0, 1, full // 3, full // 2, full - 1, full})
    assert_row(pnm([values], full, plain=plain), [round(value * 255 / full) for value in values])
    pixels = list(itertools.product(values[:2], values[-2:], values[:2]))
    assert_row(pnm([flat(pixels)], full, 3, plain=plain), [[round(value * 255 / full) for value in p] for p in pixels])
    if full not in (255, 65_535):  # a range that somebody chose: darkness is meant
        assert_row(pnm([[0, 1]], full, plain=plain), [0, round(255 / full)])


# --- pictures that are no files any more


def test_copied_and_pickled_pictures_are_read(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "JPEG2000"):
        path = tmp_path / "picture"
        Image.fromarray(pixels).save(path, kind)
        expected = np.asarray(load_image(path))
        for again in (
            lambda image: pickle.loads(pickle.dumps(image)),
            copy.copy,
            copy.deepcopy,
            lambda image: image.copy(),
            lambda image: pickle.loads(pickle.dumps(copy.deepcopy(image))),
        ):
            with Image.open(path) as image:
                assert np.array_equal(np.asarray(load_image(again(image))), expected), kind
                image.load()
                assert np.array_equal(np.asarray(load_image(again(image))), expected), kind


def test_a_colour_of_16_bits_is_not_found_in_8() -> None:
    image = Image.open(io.BytesIO(png([[300, 300, 300]], 16, 2, (b"tRNS", struct.pack(">HHH", 300, 300, 300)))))
    image.load()
    with pytest.raises(ImageError, match="expected the file of this picture"):
        load_image(image)


def test_given_pictures_stay_as_they_are() -> None:
    image = Image.new("RGB", (4, 3), "red")
    image.info["transparency"] = (255, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(image).getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert image.info == {"transparency": (255, 0, 0)}
