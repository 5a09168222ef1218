"""Geometry against transformers' LLaVA-NeXT: canvas and token count are equal for any picture size."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import LlavaNextModel, LlavaNextProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from fila.configuration import preset
from fila.geometry import LLAVA_NEXT_CANVASES, Geometry, Rect, fit, select_canvas

NANO_CANVASES = ((128, 256), (256, 128), (256, 256), (384, 128), (128, 384))
PAPER = Geometry()
NANO = Geometry(tile=128, patch=16, canvases=NANO_CANVASES, fixed_size=256)
# An odd number of patches a side, so that halves of the padding are not whole; and canvases of one tile and of many.
ODD = Geometry(tile=70, patch=14, canvases=((70, 70), (70, 350), (210, 140), (280, 280)), fixed_size=96)
GEOMETRIES = {"paper": PAPER, "shipped": preset("fila-nano").vision_config.geometry(), "coarse": NANO, "odd": ODD}

SIDES = (1, 2, 3, 13, 335, 336, 337, 671, 672, 673, 1007, 1008, 1009, 9_999, 10_000)
CORNERS = [(height, width) for height in SIDES for width in SIDES]


def drawn_sizes(number: int, seed: int = 0) -> list[tuple[int, int]]:
    """Heights and widths from 1 to 10,000, half of them even over that range, half over its logarithm."""
    draw = random.Random(seed)
    even = [(draw.randint(1, 10_000), draw.randint(1, 10_000)) for _ in range(number // 2)]
    return even + [(round(10 ** draw.uniform(0, 4)), round(10 ** draw.uniform(0, 4))) for _ in range(number // 2)]


def llava_next_tokens(geometry: Geometry, height: int, width: int) -> int:
    """The count of transformers' processor, without the class token."""
    processor = object.__new__(LlavaNextProcessor)
    processor.patch_size = geometry.patch
    processor.num_additional_image_tokens = 1
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=list(geometry.canvases))
    return processor._get_number_of_features(height, width, geometry.tile, geometry.tile) - 1


def llava_next_rows(geometry: Geometry, height: int, width: int) -> int:
    """The rows that transformers' model packs, from features without memory."""
    vision_config = SimpleNamespace(image_size=geometry.tile, patch_size=geometry.patch)
    config = SimpleNamespace(vision_config=vision_config, image_grid_pinpoints=[list(c) for c in geometry.canvases])
    canvas = select_best_resolution([height, width], list(geometry.canvases))
    views = 1 + (canvas[0] // geometry.tile) * (canvas[1] // geometry.tile)
    features = torch.empty(views, geometry.grid**2, 8, device="meta")
    packed, _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config),
        [features],
        [[height, width]],
        vision_feature_select_strategy="default",
        image_newline=torch.empty(8, device="meta"),
    )
    return packed[0].shape[0]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_token_count_equals_llava_nexts_processor(name: str) -> None:
    geometry = GEOMETRIES[name]
    sizes = CORNERS + drawn_sizes(3_000)
    wrong = [s for s in sizes if geometry.layout(*s).num_tokens != llava_next_tokens(geometry, *s)]
    assert not wrong, f"{len(wrong)} of {len(sizes)} sizes differ, the first is {wrong[0]}"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_token_count_equals_the_rows_that_llava_next_packs(name: str) -> None:
    geometry = GEOMETRIES[name]
    for size in CORNERS[::3] + drawn_sizes(80, seed=1):
        assert geometry.layout(*size).num_tokens == llava_next_rows(geometry, *size), size


def test_direct_counts_one_view_and_one_newline() -> None:
    layout = Geometry(rule="direct").layout(123, 4567)
    assert (layout.num_views, layout.num_tokens, layout.tiles) == (1, 577, ())
    # the same packing in transformers: one view, and a newline behind it
    packed, _ = LlavaNextModel.pack_image_features(
        None, [torch.empty(1, 576, 8, device="meta")], [[123, 4567]], "default", torch.empty(8, device="meta")
    )
    assert packed[0].shape[0] == layout.num_tokens


@pytest.mark.parametrize("name", GEOMETRIES)
def test_canvas_and_content_equal_transformers(name: str) -> None:
    canvases = GEOMETRIES[name].canvases
    for height, width in CORNERS + drawn_sizes(1_000, seed=2):
        canvas = select_canvas(height, width, canvases)
        assert canvas == select_best_resolution((height, width), list(canvases)), (height, width)
        picture = torch.empty(3, height, width, device="meta")
        content = fit(height, width, canvas)
        expected = get_patch_output_size(picture, canvas, input_data_format=ChannelDimension.FIRST)
        assert (content.height, content.width) == expected, (height, width)
        # the smaller half of the padding comes first
        assert content.y0 == (canvas[0] - expected[0]) // 2, (height, width)
        assert content.x0 == (canvas[1] - expected[1]) // 2, (height, width)


@pytest.mark.parametrize("rule", ["scaled", "fixed", "direct"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_rectangle_lies_where_it_may(name: str, rule: str) -> None:
    base = GEOMETRIES[name]
    geometry = Geometry(base.tile, base.patch, base.stride, base.canvases, rule, base.fixed_size)
    for size in CORNERS + drawn_sizes(300, seed=3):
        layout = geometry.layout(*size)
        height, width = layout.raster
        assert height % geometry.stride == width % geometry.stride == 0
        for rect, frame in ((layout.content, layout.canvas), (layout.raster_content, layout.raster)):
            assert 0 <= rect.y0 < rect.y1 <= frame[0], (size, rect)
            assert 0 <= rect.x0 < rect.x1 <= frame[1], (size, rect)
            assert all(edge == int(edge) for edge in (rect.y0, rect.x0, rect.y1, rect.x1))
        exact = layout.content.scaled(*layout.scale)
        if min(exact.height, exact.width) >= 1:  # a thinner picture is kept one raster pixel thick
            drift = [
                abs(a - b) for a, b in zip(vars(exact).values(), vars(layout.raster_content).values(), strict=True)
            ]
            assert max(drift) <= 0.5 + 1e-9, size
        for stride in (4, 8, 16, 32):
            boxes = layout.boxes(stride)
            assert len(boxes) == layout.num_views
            for y0, x0, y1, x1 in boxes:
                assert 0 <= y0 < y1 <= height / stride
                assert 0 <= x0 < x1 <= width / stride


def test_boxes_of_the_scaled_rule_are_whole_cells_at_every_stage() -> None:
    layout = PAPER.layout(700, 600)
    assert layout.raster == (1536, 1536)
    for stride, side in ((4, 192), (8, 96), (16, 48), (32, 24)):
        whole, *tiles = layout.boxes(stride)
        assert tiles == [[y, x, y + side, x + side] for y in (0, side) for x in (0, side)]
        scale = 32 / 14 / stride
        assert whole == pytest.approx([0, 48 * scale, 672 * scale, 624 * scale], rel=1e-12)


def test_boxes_of_the_fixed_rule_scale_each_axis_alone() -> None:
    layout = Geometry(rule="fixed").layout(300, 1000)
    assert (layout.canvas, layout.raster) == ((336, 1008), (768, 768))
    assert layout.boxes(32)[1:] == [[0, x, 24, x + 8] for x in (0, 8, 16)]


@pytest.mark.parametrize("size, reaches", [((10_000, 1), False), ((1, 10_000), False), ((300, 5_000), True)])
def test_very_long_pictures_lose_their_tiles(size: tuple[int, int], reaches: bool) -> None:
    assert PAPER.layout(*size).tiles_reach_llm is reaches


def test_rounding_sends_halves_up() -> None:
    assert Rect(0.5, 1.5, 2.5, 3.49).rounded() == Rect(1, 2, 3, 3)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"tile": 335}, "tile must be a positive multiple of patch"),
        ({"patch": 0}, "tile must be a positive multiple of patch"),
        ({"rule": "best"}, "high_res_rule must be one of"),
        ({"fixed_size": 770}, "fixed_size must be a positive multiple"),
        ({"canvases": ()}, "at least one canvas"),
        ({"canvases": ((336, 500),)}, "multiple of the tile"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(**fields)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_empty_pictures_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1x1"):
        PAPER.layout(*size)


def test_default_canvases_are_llava_nexts() -> None:
    assert PAPER.canvases == LLAVA_NEXT_CANVASES
    assert math.prod(PAPER.canvases[2]) == 672 * 672
