"""Every kind of picture that a user may bring gives the right pixels or a clear error."""

import base64
import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from fila.images import ImageError, ImageWarning, load_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png_header(height: int, width: int) -> bytes:
    """A PNG that announces a size and holds no pixels: whoever decodes it fails."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", b"")


# --- sources


def test_every_source_gives_the_same_picture(tmp_path: Path) -> None:
    image = noise()
    data = encoded(image)
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    array = np.asarray(image)

    class Pipe(io.RawIOBase):
        """Readable once, like standard input."""

        def __init__(self) -> None:
            self.rest = io.BytesIO(data)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:
            part = self.rest.read(len(buffer))
            buffer[: len(part)] = part
            return len(part)

    sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), Pipe(), image]
    sources += ["data:image/png;base64," + base64.b64encode(data).decode()]
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), array), source
    for source in (array, torch.tensor(array), array / 255, torch.tensor(array / 255).to(torch.float32)):
        assert np.array_equal(np.asarray(load_image(source, input_data_format="channels_last")), array)
        first = np.moveaxis(source, -1, 0) if isinstance(source, np.ndarray) else source.permute(2, 0, 1)
        assert np.array_equal(np.asarray(load_image(first, input_data_format="channels_first")), array)


def test_file_objects_stay_open_and_paths_do_not_leak(tmp_path: Path) -> None:
    file = io.BytesIO(encoded(noise()))
    load_image(file)
    assert not file.closed
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(noise()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        load_image(path)


# --- sizes


@pytest.mark.parametrize("size", [(10_001, 10), (10, 10_001), (60_000, 60_000)])
def test_large_pictures_are_refused_from_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=r"at most 10000.*(got 10001x10|got 10x10001|got 60000x60000)"):
        load_image(png_header(*size))


def test_the_largest_size_passes_the_header() -> None:
    # It has no pixels, so that decoding is where it fails, not its size; and nothing is said about a bomb.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="complete picture, decoding failed"):
            load_image(png_header(10_000, 10_000))


def test_large_pil_images_and_arrays_are_refused() -> None:
    with pytest.raises(ImageError, match="got 10x10001"):
        load_image(Image.new("1", (10_001, 10)))
    with pytest.raises(ImageError, match="got 10001x1"):
        load_image(np.zeros((10_001, 1), np.uint8))
    with pytest.raises(ImageError, match="at most 50x50 pixels, got 40x60"):
        load_image(noise(), max_side=50)


def test_text_bombs_in_a_png_are_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    with pytest.raises(ImageError, match="too large"):
        load_image(encoded(noise(), pnginfo=info))


@pytest.mark.parametrize("empty", [np.zeros((0, 5), np.uint8), torch.zeros(3, 5, 0), Image.new("RGB", (0, 5))])
def test_pictures_without_pixels_are_refused(empty: object) -> None:
    with pytest.raises(ImageError, match="at least 1x1"):
        load_image(empty, input_data_format="channels_first")


# --- damaged files


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused(kind: str, kept: float, tmp_path: Path) -> None:
    data = encoded(noise(100, 100), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match=r"cut: expected a (complete )?picture"):
        load_image(path)


def test_a_damaged_png_is_refused() -> None:
    data = bytearray(encoded(noise()))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="decoding failed"):
        load_image(bytes(data))


def test_files_damaged_anywhere_are_read_or_refused() -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "lime")]
    files = [encoded(noise(), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM")]
    files += [encoded(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("GIF", "PNG", "WEBP")]
    draw = random.Random(0)
    refused = 0
    for _ in range(500):
        data = bytearray(draw.choice(files))
        for _ in range(draw.choice((1, 5, 20))):
            data[draw.randrange(min(len(data), draw.choice((40, 200, len(data)))))] = draw.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert load_image(bytes(data)).mode == "RGB"
            except ImageError:
                refused += 1
    assert 100 < refused < 500


@pytest.mark.parametrize(
    "content, got",
    [
        (b"", "an empty file"),
        (b"hello, world\n" * 9, "something else"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "something else"),
    ],
)
def test_files_that_are_no_pictures_are_refused(content: bytes, got: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"notes\.txt: expected a picture \(PNG, JPEG.*got {got}"):
        load_image(path)


def test_paths_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No such file"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="Is a directory"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="null"):
        load_image("a\0b")
    with pytest.raises(ImageError, match=r"^iVBORw{195}\.\.\.: expected a picture file, got: File name too long"):
        load_image("iVBOR" + "w" * 5_000)  # the contents of a file where its path belongs


@pytest.mark.parametrize(
    "source, message",
    [
        ("https://example.org/a.png", "nothing is fetched"),
        ("data:image/png;base64,!!", "expected base64"),
        (42, "got int"),
        (None, "got NoneType"),
    ],
)
def test_other_sources_are_refused(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)


class Failing(io.RawIOBase):
    """A file that gives nothing but an error, or what no binary file gives."""

    def __init__(self, gives: object, seekable: bool) -> None:
        self.gives, self.can_seek = gives, seekable

    def seekable(self) -> bool:
        return self.can_seek

    def read(self, size: int = -1) -> object:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


@pytest.mark.parametrize("seekable", [True, False])
@pytest.mark.parametrize("gives", [OSError("gone"), ValueError("closed"), "text"], ids=str)
def test_files_that_cannot_be_read_are_refused(gives: object, seekable: bool) -> None:
    with pytest.raises(ImageError, match="expected a"):
        load_image(Failing(gives, seekable))
    closed = io.BytesIO(encoded(noise()))
    closed.close()
    with pytest.raises(ImageError, match=r"expected a binary file that can be read, got: .*closed"):
        load_image(closed)


def test_messages_use_the_name_given() -> None:
    with pytest.raises(ImageError, match=r"^page 3: expected a picture"):
        load_image(b"", name="page 3")


# --- orientation and frames


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = noise(20, 30)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera held that way stores it
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, exif=exif)
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(upright))
    # read twice, it is not turned twice
    assert np.array_equal(np.asarray(load_image(load_image(data))), np.asarray(upright))
    assert np.array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), np.asarray(upright))


def test_unreadable_exif_is_said_and_not_applied() -> None:
    with pytest.warns(ImageWarning, match="EXIF data cannot be read"):
        loaded = load_image(encoded(noise(), exif=b"Exif\0\0nonsense"))
    assert loaded.size == (60, 40)


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_of_several_frames_the_first_is_used_and_said(kind: str, options: dict) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(ImageWarning, match="holds several frames, only the first is used"):
        loaded = load_image(data)
    assert loaded.getpixel((3, 3)) == RED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(loaded)


def test_an_image_wound_forward_is_read_from_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    image = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    image.seek(1)
    with pytest.warns(ImageWarning):
        assert load_image(image).getpixel((3, 3)) == RED


# --- depth, colour and transparency


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32_768, 65_535]], np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    loaded = load_image(encoded(Image.fromarray(values), kind))
    assert np.array_equal(np.asarray(loaded), np.repeat(expected[..., None], 3, axis=2))
    assert np.array_equal(np.asarray(load_image(values))[..., 0], expected)
    assert np.array_equal(np.asarray(load_image(Image.fromarray(values.astype(np.int32))))[..., 0], expected)


def test_a_transparent_grey_of_16_bits_is_white() -> None:
    values = np.array([[0, 1_000]], np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), transparency=1_000))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), WHITE]


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_8_bits_in_a_wider_type_are_refused_and_black_is_black(kind: type) -> None:
    values = np.array([[0, 255]], kind)
    for source in (Image.fromarray(values), encoded(Image.fromarray(values.astype(np.uint16)), "TIFF")):
        with pytest.raises(ImageError, match=r"expected 16-bit values in 0..65535, got at most 255: convert to L"):
            load_image(source)
    assert load_image(Image.fromarray(values[:, :1])).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("values", [[[0, 70_000]], [[-1, 5]]])
def test_32_bit_integers_beyond_16_are_refused(values: list) -> None:
    with pytest.raises(ImageError, match="expected uint8, uint16 or floats"):
        load_image(Image.fromarray(np.array(values, np.int32)))


def test_transparency_lies_over_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    half.putpixel((1, 0), (0, 0, 0, 0))
    for image in (half, Image.open(io.BytesIO(encoded(half)))):
        loaded = load_image(image)
        assert loaded.getpixel((0, 0)) == (255, 127, 127)
        assert loaded.getpixel((1, 0)) == WHITE
    assert load_image(np.array(half), input_data_format="channels_last").getpixel((1, 0)) == WHITE
    assert load_image(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == WHITE
    assert load_image(np.zeros((2, 3, 4), np.uint8), input_data_format="channels_first").getpixel((0, 0)) == WHITE


def test_transparent_colours_of_palette_grey_and_rgb_files_are_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    grey = Image.new("L", (2, 1), 7)
    grey.putpixel((1, 0), 9)
    colours = Image.new("RGB", (2, 1), "red")
    colours.putpixel((1, 0), (1, 2, 3))
    for image, key, other in ((palette, 1, RED), (grey, 9, (7, 7, 7)), (colours, (1, 2, 3), RED)):
        loaded = load_image(encoded(image, transparency=key))
        assert loaded.getpixel((0, 0)) == other
        assert loaded.getpixel((1, 0)) == WHITE


def test_palette_and_cmyk_are_converted() -> None:
    palette = Image.new("RGB", (4, 4), "red").quantize(4)
    assert load_image(encoded(palette)).getpixel((0, 0)) == RED
    cmyk = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(np.array(load_image(cmyk).getpixel((8, 8))) - RED).max() <= 3
    assert load_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == WHITE


def test_lab_is_converted() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (200, 100, 50)), srgb, lab, outputMode="LAB")
    assert np.abs(np.array(load_image(image).getpixel((0, 0))) - (200, 100, 50)).max() <= 3


def test_colours_multiplied_with_their_alpha_lie_over_white() -> None:
    for mode, half in (("La", (50, 128)), ("RGBa", (50, 50, 50, 128))):
        assert abs(load_image(Image.new(mode, (1, 1), half)).getpixel((0, 0))[0] - (50 + 127)) <= 1


# --- arrays


@pytest.mark.parametrize("shape", [(5, 7, 1), (5, 7, 2), (5, 7, 3), (5, 7, 4)])
def test_arrays_whose_channels_can_only_be_at_one_end_are_read(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = np.asarray(load_image(array, input_data_format="channels_last"))
    first = np.moveaxis(array, -1, 0)
    for source in (
        array,
        first,
        torch.tensor(array),
        torch.tensor(first),
        array[:, ::-1][:, ::-1],
        np.asfortranarray(array),
    ):
        assert np.array_equal(np.asarray(load_image(source)), expected)


@pytest.mark.parametrize("order", [None, "HWC", "first"])
def test_arrays_that_can_be_read_in_two_ways_need_a_stated_order(order: str | None) -> None:
    for array in (np.zeros((3, 50, 3), np.uint8), torch.zeros(4, 1, 1)):
        with pytest.raises(ImageError, match=f"input_data_format.*'channels_first' or 'channels_last', got {order!r}"):
            load_image(array, input_data_format=order)


def test_arrays_without_channels_at_either_end_are_refused() -> None:
    with pytest.raises(ImageError, match=r"1 to 4 channels in the first or last dimension, got \(5, 3, 7\)"):
        load_image(np.zeros((5, 3, 7), np.uint8))


def test_a_narrow_picture_is_read_the_way_it_is_stated() -> None:
    array = np.zeros((3, 50, 3), np.uint8)
    assert load_image(array, input_data_format="channels_last").size == (50, 3)
    assert load_image(array, input_data_format="channels_first").size == (3, 50)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.full((2, 2), 1.5), "floats in 0..1, got values from 1.5"),
        (np.full((2, 2), -0.1, np.float32), "floats in 0..1"),
        (np.full((2, 2), np.nan), "floats in 0..1"),
        (np.full((2, 2), np.inf), "floats in 0..1"),
        (np.zeros((2, 2), np.int64), "got int64"),
        (np.zeros((2, 2), bool), "got bool"),
        (np.zeros((2, 2), complex), "got complex128"),
        (np.full((2, 2), "a"), "got <U1"),
        (np.full((2, 2), None), "got object"),
        (torch.zeros(2, 2).to_sparse(), "dense tensor of real numbers, got .*sparse_coo"),
        (torch.zeros(2, 2, device="meta"), "dense tensor of real numbers, got .* on meta"),
        (np.zeros((2, 2, 5), np.uint8), "1 to 4 channels"),
        (np.zeros(5, np.uint8), "got 1"),
        (np.zeros((1, 2, 2, 3), np.uint8), "got 4"),
    ],
)
def test_arrays_of_other_kinds_are_refused(array: np.ndarray | torch.Tensor, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array, input_data_format="channels_last")


def test_arrays_in_other_types_are_scaled() -> None:
    assert load_image(torch.full((2, 2), 0.5, dtype=torch.bfloat16)).getpixel((0, 0)) == (128, 128, 128)
    assert (
        load_image(np.full((1, 2, 2), 0.2, np.float16), input_data_format="channels_first").getpixel((0, 0))
        == (51,) * 3
    )
    assert (
        load_image(np.full((2, 2, 3), 65_535, np.uint16), input_data_format="channels_last").getpixel((0, 0)) == WHITE
    )
    assert load_image(np.asfortranarray(noise()), input_data_format="channels_last").size == (60, 40)
