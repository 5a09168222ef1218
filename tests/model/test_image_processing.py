"""The image processor against transformers' LLaVA-NeXT, against itself in batches, and through save and load."""

import ast
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from fila import FilaImageProcessor, Geometry
from fila.images import ImageError, ImageWarning
from fila.resampling import TOLERANCE, TORCH_MODES

NANO_CANVASES = ((128, 256), (256, 128), (256, 256), (384, 128), (128, 384))
NANO = Geometry(tile=128, patch=16, canvases=NANO_CANVASES, fixed_size=256)

# Some thirty sizes: of every canvas, larger and smaller than it, padded and not, very long, a single pixel.
SIZES = [
    *[(1, 1), (1, 2), (3, 1), (2, 300), (300, 2), (1, 2_000), (2_000, 1), (7, 7)],
    *[(128, 256), (256, 128), (256, 256), (384, 128), (128, 384)],
    *[(127, 255), (129, 257), (255, 127), (300, 100), (100, 300), (101, 303), (401, 99)],
    *[(64, 64), (33, 97), (500, 500), (511, 513), (640, 480), (480, 640), (1_000, 30), (30, 1_000), (1_200, 900)],
]


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(height * 10_007 + width).integers(0, 256, (height, width, 3), np.uint8)
    )


def nano(rule: str = "scaled", **fields: object) -> FilaImageProcessor:
    geometry = Geometry(tile=128, patch=16, canvases=NANO_CANVASES, rule=rule, fixed_size=256)
    return FilaImageProcessor.from_geometry(geometry, **fields)


def llava_next(geometry: Geometry) -> LlavaNextImageProcessorPil:
    side = {"height": geometry.tile, "width": geometry.tile}
    return LlavaNextImageProcessorPil(
        size=side, crop_size=side, image_grid_pinpoints=[list(canvas) for canvas in geometry.canvases]
    )


def assert_near(got: np.ndarray, expected: np.ndarray, std: list[float], what: object) -> None:
    """Within the tolerance that `fila.resampling` states: few levels of 255, and few values off at all."""
    levels = np.abs(got - expected) * np.array(std)[:, None, None] * 255
    assert levels.max() <= TOLERANCE + 0.01, (
        f"{what}: {levels.max()} levels at {np.unravel_index(levels.argmax(), levels.shape)}"
    )
    assert (levels > 0.01).mean() <= 0.02, f"{what}: {(levels > 0.01).mean():.2%} of the values are off"


def assert_views_equal(ours: FilaImageProcessor, theirs: LlavaNextImageProcessorPil, size: tuple[int, int]) -> None:
    image = noise(*size)
    expected = theirs(image, return_tensors="pt")
    array = np.asarray(image)
    sources = (image, array, array.transpose(2, 0, 1).copy(), torch.tensor(array), torch.tensor(array).permute(2, 0, 1))
    for order, source in zip((None, "last", "first", "last", "first"), sources, strict=True):
        got = ours(source, return_tensors="pt", input_data_format=order and f"channels_{order}")
        assert torch.equal(got["image_sizes"], expected["image_sizes"])
        assert got["pixel_values"].shape == expected["pixel_values"].shape
        assert_near(got["pixel_values"].numpy(), expected["pixel_values"].numpy(), ours.image_std, size)


@pytest.mark.parametrize("resample", [filter for filter in Image.Resampling if filter.value < 6])
def test_every_filter_of_pillow_may_be_chosen(resample: Image.Resampling) -> None:
    theirs = llava_next(NANO)
    for size in SIZES[::3]:
        image = noise(*size)
        got = nano(resample=resample)(image, return_tensors="pt")["pixel_values"].numpy()
        expected = theirs(image, return_tensors="pt", resample=resample)["pixel_values"].numpy()
        if resample in TORCH_MODES:
            assert_near(got, expected, theirs.image_std, (resample, size))
        else:
            assert np.abs(got - expected).max() <= 1e-6


def test_the_caller_keeps_its_array() -> None:
    array = np.asarray(noise(200, 300)).copy()
    before = array.copy()
    for source in (array, array[:, ::-1], torch.from_numpy(array)):
        nano()(source, input_data_format="channels_last")
    assert np.array_equal(array, before)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nano()(array)


@pytest.mark.parametrize("size", SIZES)
def test_views_equal_llava_nexts(size: tuple[int, int]) -> None:
    assert_views_equal(nano(), llava_next(NANO), size)


@pytest.mark.parametrize("size", [(480, 640), (1_000, 300), (336, 672)])
def test_views_equal_llava_nexts_at_full_size(size: tuple[int, int]) -> None:
    assert_views_equal(FilaImageProcessor(do_high_res=False), llava_next(Geometry()), size)


@pytest.mark.parametrize("rule", ["scaled", "fixed", "direct"])
def test_the_raster_is_the_picture_resized_once_on_black(rule: str) -> None:
    processor = nano(rule, high_res_image_mean=[0.1, 0.2, 0.3], high_res_image_std=[0.5, 0.25, 1.0])
    for size in SIZES[::2]:
        image, layout = noise(*size), processor.geometry.layout(*size)
        got = processor(image, return_tensors="np")["high_res_pixel_values"]
        content = layout.raster_content
        expected = np.zeros((*layout.raster, 3))
        expected[content.y0 : content.y1, content.x0 : content.x1] = image.resize(
            (content.width, content.height), Image.Resampling.BICUBIC
        )
        expected = (expected / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0]
        assert got.shape == (1, 3, *layout.raster)
        assert_near(got[0], expected.transpose(2, 0, 1), [0.5, 0.25, 1.0], size)


def test_direct_has_one_view_and_no_tiles() -> None:
    data = nano("direct")(noise(100, 300), return_tensors="pt")
    assert data["pixel_values"].shape == (1, 1, 3, 128, 128)
    assert data["high_res_pixel_values"].shape == (1, 3, 256, 256)


def test_without_fusion_there_is_no_raster() -> None:
    data = nano(do_high_res=False)([noise(100, 300), noise(300, 100)], return_tensors="pt")
    assert set(data) == {"pixel_values", "image_sizes"}


def test_a_batch_holds_what_each_image_gives_alone_and_zeros() -> None:
    processor = nano()
    images = [noise(height, width) for height, width in NANO_CANVASES]
    batch = processor(images, return_tensors="pt")
    assert batch["pixel_values"].shape == (5, 5, 3, 128, 128)
    assert batch["high_res_pixel_values"].shape == (5, 3, 768, 768)
    assert batch["image_sizes"].tolist() == [list(size) for size in NANO_CANVASES]
    assert {name: value.dtype for name, value in batch.items()} == {
        "pixel_values": torch.float32,
        "high_res_pixel_values": torch.float32,
        "image_sizes": torch.int64,
    }
    for i, image in enumerate(images):
        alone = processor(image, return_tensors="pt")
        views = alone["pixel_values"].shape[1]
        height, width = alone["high_res_pixel_values"].shape[2:]
        assert torch.equal(batch["pixel_values"][i, :views], alone["pixel_values"][0])
        assert not batch["pixel_values"][i, views:].any()
        raster = batch["high_res_pixel_values"][i]
        assert torch.equal(raster[:, :height, :width], alone["high_res_pixel_values"][0])
        assert not raster[:, height:].any()
        assert not raster[:, :, width:].any()


def test_lists_may_be_nested_and_arrays_may_be_batches() -> None:
    processor = nano()
    images = [noise(128, 256), noise(256, 128)]
    flat = processor(images, return_tensors="pt")
    nested = processor([[images[0]], [], [images[1]]], return_tensors="pt")
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    stack = np.stack([np.asarray(images[0])] * 2)
    assert len(processor(stack, input_data_format="channels_last")["pixel_values"]) == 2
    assert isinstance(processor(images)["pixel_values"], np.ndarray)


def test_exif_rotation_comes_before_sizes() -> None:
    image = noise(100, 300)
    image.getexif()[0x0112] = 6
    assert nano()(image)["image_sizes"].tolist() == [[300, 100]]


@pytest.mark.parametrize("nothing", [None, [], [[], []]])
def test_no_image_is_refused(nothing: object) -> None:
    with pytest.raises(ValueError, match="at least one image, got none"):
        nano()(nothing)


def test_bad_images_are_refused_and_frames_are_said(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="input_data_format"):
        nano()(np.zeros((3, 4, 3), np.uint8))
    with pytest.raises(ImageError, match="at most 100x100"):
        nano(max_image_side=100)(noise(128, 256))
    path = tmp_path / "moving.gif"
    noise(20, 20).save(path, save_all=True, append_images=[noise(20, 21).resize((20, 20))])
    with pytest.warns(ImageWarning, match="moving.gif"):
        nano()(path)


@pytest.mark.parametrize(
    "values",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": -1.0},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 1.0, 2.0]},
    ],
)
def test_settings_of_the_values_are_applied_when_set_and_per_call(values: dict) -> None:
    picture, plain = noise(70, 90), nano()
    raw = plain(picture, do_rescale=False, do_normalize=False)
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0
    per_channel = (slice(None), None, None)
    for name, mean, std in (
        ("pixel_values", "image_mean", "image_std"),
        ("high_res_pixel_values", "high_res_image_mean", "high_res_image_std"),
    ):
        assert raw[name].min() >= 0
        assert raw[name].max() > 200
        own = {mean: getattr(plain, mean), std: getattr(plain, std), **values}
        expected = np.asarray(raw[name]) * factor
        if values.get("do_normalize", True):
            expected = (expected - np.array(own[mean])[per_channel]) / np.array(own[std])[per_channel]
        np.testing.assert_allclose(plain(picture, **values)[name], expected, rtol=1e-4, atol=1e-4)
    made = FilaImageProcessor(**{name: getattr(plain, name) for name in plain._settings()} | values)
    again = FilaImageProcessor.from_dict(made.to_dict())
    for processor in (made, again):
        for name in ("pixel_values", "high_res_pixel_values"):
            assert np.array_equal(processor(picture)[name], plain(picture, **values)[name])
    assert np.array_equal(plain(picture)["pixel_values"], nano()(picture)["pixel_values"]), "a call left its settings"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"tile_sise": 64}, "'tile_sise'; the nearest is 'tile_size'"),
        ({"do_resize": False}, "expected do_resize True"),
        ({"size": {"height": 5, "width": 5}}, "got 'size'"),
        ({"rescale_factor": 0}, "rescale_factor to be a number other than 0"),
    ],
)
def test_settings_that_would_not_be_applied_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FilaImageProcessor(**given)


def test_calls_cannot_change_the_geometry() -> None:
    processor = nano()
    processor(noise(9, 9), do_pad=True, do_resize=True, high_res_rule="scaled", resample=None)
    for given in (tuple(processor.image_mean), np.array(processor.image_mean)):
        processor(noise(9, 9), image_mean=given)
    processor(noise(9, 9), image_grid_pinpoints=tuple(map(tuple, processor.image_grid_pinpoints)))
    for name in ("preprocess", "nonsense"):
        with pytest.raises(ValueError, match=f"expected a setting of FilaImageProcessor, got {name}=5"):
            processor(noise(9, 9), **{name: 5})
    for name, value in (("high_res_rule", "direct"), ("tile_size", 336), ("do_resize", False), ("size", 5)):
        with pytest.raises(ValueError, match=f"{name} cannot be changed for one call"):
            processor(noise(9, 9), **{name: value})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tile_size": 100}, "multiple of patch"),
        ({"high_res_rule": "big"}, "high_res_rule must be one of"),
        ({"image_mean": 0.5}, "image_mean to be three numbers, got 0.5"),
        ({"max_image_side": "x"}, "max_image_side to be a whole number of at least 1, got 'x'"),
        ({"max_image_side": 0}, "max_image_side to be a whole number"),
        ({"resample": 9}, "resample to be one of PIL's filters, 0 to 5, got 9"),
        ({"resample": "x"}, "resample to be one of PIL's filters"),
        ({"image_mean": [0.5, 0.5, float("inf")]}, "image_mean to be three numbers"),
        ({"image_mean": [0.5, 0.5, float("-inf")]}, "image_mean to be three numbers"),
        ({"image_mean": "0.5"}, "image_mean to be three numbers, got '0.5'"),
        ({"image_std": [0.5, "a", 0.5]}, "image_std to be three numbers above 0"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std to be three numbers above 0"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FilaImageProcessor(**fields)


def test_save_and_load(tmp_path: Path) -> None:
    processor = nano("fixed", do_high_res=False, high_res_image_std=[0.3, 0.3, 0.3], max_image_side=5_000)
    processor.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == "FilaImageProcessor"
    )
    for loaded in (FilaImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is FilaImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.geometry == processor.geometry
    assert FilaImageProcessor.from_pretrained(tmp_path, high_res_rule="direct").geometry.rule == "direct"


def test_a_processor_changed_between_stages_of_training_follows() -> None:
    processor = nano()
    processor.high_res_rule = "direct"
    assert processor(noise(100, 300))["pixel_values"].shape[1] == 1


def test_nothing_imports_torchvision(root: Path) -> None:
    # Its registry build is linked with CUDA, and fails at import beside a CPU build of torch.
    for path in sorted((root / "fila").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torchvision" for name in names), path


def test_the_largest_picture_is_read() -> None:
    image = Image.new("RGB", (10_000, 10_000), "white")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # one view and no raster: what grows with the picture is reading it
        data = nano("direct", do_high_res=False)(image, return_tensors="np")
    assert data["image_sizes"].tolist() == [[10_000, 10_000]]
    assert data["pixel_values"].shape == (1, 1, 3, 128, 128)
