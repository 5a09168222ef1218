"""Files that are cut, endless or in other clothes, and what other libraries have set on Pillow."""

import base64
import contextlib
import io
import os
import re
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fila.image_files import MAX_SCANS
from fila.images import ImageError, load_image

KINDS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


def noise(height: int = 60, width: int = 80, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def lenient() -> Iterator[None]:
    """What other libraries do, for good, when they are imported."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES = False


# --- files that are cut


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.98])
def test_cut_files_are_refused_whatever_pillow_is_set_to(kind: str, kept: float, lenient: None, tmp_path: Path) -> None:
    data = encoded(noise(), kind)
    cut = data[: int(len(data) * kept)]
    path = tmp_path / "cut"
    path.write_bytes(cut)
    for source in (cut, path):
        with pytest.raises(ImageError):
            load_image(source)
    with contextlib.suppress(OSError), pytest.raises(ImageError):
        load_image(Image.open(path))
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    assert load_image(data).size == (80, 60)


def test_damaged_data_are_refused_whatever_pillow_is_set_to(lenient: None) -> None:
    data = bytearray(encoded(noise()))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="decoding failed"):
        load_image(bytes(data))


def test_settings_are_put_back_when_the_last_thread_is_done(lenient: None) -> None:
    data = encoded(noise(400, 400), "PNG")
    wrong = []

    def read() -> None:
        for _ in range(10):
            try:
                load_image(data[:-2000])
                wrong.append("a cut file was read")
            except ImageError:
                pass

    before = Image.MAX_IMAGE_PIXELS
    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (True, before) == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize("limit", [None, 10])
def test_pillows_limit_on_pixels_is_not_ours(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("PNG", "TIFF", "GIF", "WEBP"):
            assert load_image(encoded(noise(), kind)).size == (80, 60)
    assert limit == Image.MAX_IMAGE_PIXELS


# --- JPEG 2000


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("options", [{}, {"tile_size": (32, 32)}, {"quality_layers": [20, 5], "irreversible": True}])
def test_a_jpeg_2000_is_read_whole_or_not_at_all(boxed: bool, options: dict) -> None:
    data = encoded(noise(), "JPEG2000", no_jp2=not boxed, **options)
    assert load_image(data).size == (80, 60)
    starts = [found.start() for found in re.finditer(b"\xff\x93", data)]  # where the data of each tile begin
    for kept in [*(start + 2 for start in starts[:2]), len(data) // 2, len(data) - 40, len(data) - 4]:
        for end in (b"", b"\xff\xd9"):
            with pytest.raises(ImageError, match=r"expected a (complete )?JPEG 2000 code stream"):
                load_image(data[:kept] + end)


def test_a_jpeg_2000_without_a_tile_is_refused() -> None:
    data = encoded(noise(), "JPEG2000", no_jp2=True, tile_size=(32, 32))
    first = data.index(b"\xff\x90")
    (length,) = struct.unpack(">I", data[first + 6 : first + 10])
    with pytest.raises(ImageError, match="all of its 6 tiles, got 5"):
        load_image(data[:first] + data[first + length :])
    empty = data[first : first + 6] + struct.pack(">I", 14) + data[first + 10 : first + 12] + b"\xff\x93"
    with pytest.raises(ImageError, match="all of its 6 tiles, got 5"):
        load_image(data[:first] + empty + data[first + length :])


@pytest.mark.parametrize("depth", [1, 2, 4, 7])
def test_a_jpeg_2000_of_few_bits_reaches_white(depth: int) -> None:
    # Samples are stored less half their range: those of 8 bits around the middle are those of fewer bits.
    full = (1 << depth) - 1
    values = np.arange(full + 1, dtype=np.uint8)[None].repeat(4, 0)
    data = bytearray(encoded(Image.fromarray(values + 128 - (1 << depth - 1)), "JPEG2000", no_jp2=True))
    data[data.index(b"\xff\x51") + 2 + 38] = depth - 1
    got = np.asarray(load_image(bytes(data)))[0, :, 0].astype(int)
    assert np.abs(got - np.round(values[0] * 255.0 / full)).max() <= 1


# --- JPEG


def with_scans(data: bytes, more: int) -> bytes:
    """A progressive JPEG whose last scan stands there `more` times more."""
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[start:end] * more + data[end:]


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("RGB", (2_000, 2_000)), "JPEG", progressive=True)
    assert load_image(with_scans(data, 20)).size == (2_000, 2_000)
    started = time.perf_counter()
    for source in (with_scans(data, 300), Image.open(io.BytesIO(with_scans(data, 300)))):
        with pytest.raises(ImageError, match=f"in at most {MAX_SCANS} scans, got 310"):
            load_image(source)
    assert time.perf_counter() - started < 1


def test_a_large_jpeg_may_have_fewer_scans() -> None:
    data = with_scans(encoded(Image.new("L", (64, 64)), "JPEG", progressive=True), 44)
    at = data.index(b"\xff\xc2") + 5
    large = data[:at] + struct.pack(">HH", 10_000, 10_000) + data[at + 4 :]
    assert load_image(data).size == (64, 64)
    with pytest.raises(ImageError, match="in at most 20 scans, got 50"):
        load_image(large)


def test_a_jpeg_with_thousands_of_segments_of_exif_is_refused() -> None:
    data = encoded(noise(), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 10) + b"Exif\0\0MM"
    with pytest.raises(ImageError, match="at most 100 segments of EXIF data, got 5000"):
        load_image(data[:2] + segment * 5_000 + data[2:])


def test_pictures_behind_the_first_of_a_phone_are_passed_over() -> None:
    frames = [noise(), Image.new("RGB", (40, 30))]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (data, data.replace(b"MPF\0MM", b"MPF\0XX").replace(b"MPF\0II", b"MPF\0XX")):
            assert load_image(source).size == (80, 60)


# --- bombs in metadata


def test_tags_that_all_point_at_the_same_data_are_read_within_the_size_of_the_file() -> None:
    data = bytearray(encoded(noise(2_000, 1_000, "L"), "TIFF"))
    entries = b"".join(struct.pack("<HHII", 40_000 + i, 1, 1_000_000, 8) for i in range(5_000))
    (start,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[start : start + 2])
    own = bytes(data[start + 2 : start + 2 + 12 * count])
    data[4:8] = struct.pack("<I", len(data))
    data += struct.pack("<H", count + 5_000) + own + entries + b"\0" * 4
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImageError):
            assert load_image(bytes(data)).size == (1_000, 2_000)
    assert time.perf_counter() - started < 5


# --- sources


def test_a_pipe_without_end_is_given_up() -> None:
    started = time.perf_counter()
    read, write = os.pipe()
    stop = threading.Event()

    def feed() -> None:
        try:
            while not stop.is_set():
                os.write(write, b"\0" * 65_536)
        except OSError:
            pass

    thread = threading.Thread(target=feed)
    thread.start()
    with os.fdopen(read, "rb") as pipe, pytest.raises(ImageError, match="got something else"):
        load_image(pipe)
    stop.set()
    thread.join()
    os.close(write)
    with pytest.raises(ImageError, match="something else"):
        load_image("/dev/zero")
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "PPM"])
def test_a_picture_through_a_named_pipe_is_read(kind: str, tmp_path: Path) -> None:
    data = encoded(noise(500, 500), kind)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    thread = threading.Thread(target=lambda: path.write_bytes(data))
    thread.start()
    assert load_image(path).size == (500, 500)
    thread.join()


def test_data_urls_in_every_form() -> None:
    data = encoded(noise())
    plain = base64.b64encode(data).decode()
    escaped = "".join(f"%{byte:02x}" for byte in data)
    urls = [
        f"data:image/png;base64,{plain}",
        f"DATA:image/png;BASE64, {plain} ",
        f"data:;base64,{base64.encodebytes(data).decode()}",
        f"data:image/png;base64,{plain.rstrip('=')}",
        "data:image/png;base64," + "\r\n\t".join(plain[i : i + 50] for i in range(0, len(plain), 50)),
        "data:image/png;base64," + plain.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        f"data:image/png;name=a.png;base64,{plain}",
        f"data:image/png,{escaped}",
    ]
    for url in urls:
        assert np.array_equal(np.asarray(load_image(url)), np.asarray(noise())), url[:60]
    for url in (
        "data:image/png;base64",
        "data:image/png;base64,a",
        "data:image/png;base64,ü",
        "data:,",
        "data:x,hello",
    ):
        with pytest.raises(ImageError, match="data: URL: expected"):
            load_image(url)
