"""The explaining picture: its numbers are measured, and its lines lie where the layout says."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fila import FilaForConditionalGeneration, FilaImageProcessor, preset, visualize
from fila.geometry import Geometry
from fila.visualize import PANEL, SEAM, TILE_COLORS, WIDTH, Gate, draw, watch_gates

GEOMETRY = preset("fila-nano").vision_config.geometry()


def some_gates(layout) -> list[Gate]:
    views, side = layout.num_views, layout.geometry.grid
    values = np.random.default_rng(0).random((4, views, side, side), np.float32)
    return [Gate(i, i + 1, 4 * 2**i, 0.1 * i, 0.02 * i, values[i]) for i in range(4)]


def model(fusion: str = "deep", alpha: float = 0.5) -> FilaForConditionalGeneration:
    torch.manual_seed(0)
    config = preset("fila-nano")
    config.vision_config.fusion = fusion
    made = FilaForConditionalGeneration(config).eval()
    for module in made.model.vision_tower.fusion:
        torch.nn.init.constant_(module.alpha, alpha)
    return made


@torch.no_grad()
def encode(made: FilaForConditionalGeneration, picture: Image.Image) -> None:
    made.get_image_features(**FilaImageProcessor.from_geometry(GEOMETRY)(picture, return_tensors="pt"))


def test_gates_are_measured():
    made = model()
    seen = []
    module = made.model.vision_tower.fusion[2]
    hook = module.register_forward_hook(lambda _, args, out: seen.append((args[0][0], out[0])))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    with watch_gates(made) as gates:
        encode(made, picture)
    hook.remove()
    assert [(g.vit_layer, g.convnext_stage, g.stride, g.alpha) for g in gates] == [
        (1, 1, 2, 0.5), (2, 2, 4, 0.5), (4, 3, 8, 0.5), (5, 4, 16, 0.5),
    ]  # fmt: skip
    before, after = (x[:, 1:].double() for x in seen[0])
    assert gates[2].strength == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-5)
    last = (after - before)[-1, -1].norm() / before[-1, -1].norm()
    assert gates[2].token_strength.shape == (GEOMETRY.layout(90, 120).num_views, GEOMETRY.grid, GEOMETRY.grid)
    assert gates[2].token_strength[-1, -1, -1] == pytest.approx(float(last), rel=1e-5)
    encode(made, picture)
    assert len(gates) == 4, "the watcher stayed behind"


def test_threads_watch_one_model_each_its_own_picture():
    made = model()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (60 + 30 * i, 120, 3), np.uint8)) for i in range(3)]

    def measure(picture: Image.Image) -> list[float]:
        with watch_gates(made) as gates:
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
            encode(made, picture)
        return [gate.strength for gate in gates]

    alone = [measure(picture) for picture in pictures]
    with ThreadPoolExecutor(len(pictures)) as threads:
        assert list(threads.map(measure, pictures * 3)) == alone * 3
    with watch_gates(model()) as gates:
        encode(made, pictures[0])
    assert gates == [], "another model's"


def test_closed_gates_have_no_strength():
    made = model(alpha=0.0)
    with watch_gates(made) as gates:
        encode(made, Image.new("RGB", (60, 60), "white"))
    assert [gate.strength for gate in gates] == [0.0] * 4
    draw(Image.new("RGB", (60, 60)), GEOMETRY.layout(60, 60), "Total?", "", gates)


def test_without_fusion_there_are_no_gates():
    made = model("none")
    with watch_gates(made) as gates:
        encode(made, Image.new("RGB", (60, 60)))
    assert gates == []
    picture = draw(Image.new("RGB", (60, 60)), GEOMETRY.layout(60, 60), "Total?", "12", gates)
    assert picture.width == WIDTH


@pytest.mark.parametrize("rule", ["scaled", "fixed", "direct"])
@pytest.mark.parametrize("size", [(1, 1), (300, 200), (10_000, 3), (3, 10_000)])
def test_any_picture_can_be_explained(size, rule):
    layout = replace(GEOMETRY, rule=rule, fixed_size=512).layout(*size)
    page = draw(Image.new("RGB", size[::-1], "white"), layout, "Total?" * 200, "word " * 400, some_gates(layout))
    assert page.mode == "RGB"
    assert page.width == WIDTH
    assert page.height < 2500


def test_the_papers_geometry_and_a_large_picture():
    layout = Geometry().layout(5000, 3500)
    assert draw(Image.new("RGB", (3500, 5000)), layout, "Total?", "12", some_gates(layout)).width == WIDTH


def test_lines_and_regions_lie_where_the_layout_says():
    layout = GEOMETRY.layout(512, 512)
    assert (layout.rows, layout.columns) == (2, 2)
    page = np.asarray(draw(Image.new("RGB", (512, 512), "white"), layout, "Total?", "12", some_gates(layout)))
    seam = (page == SEAM).all(-1)
    left = visualize.MARGIN
    # The vertical seam: dashes over half of the panel's height, at its middle.
    column = seam[:, left + PANEL // 2 - 4 : left + PANEL // 2 + 4].any(1)
    assert 0.4 * PANEL < column.sum() < 0.65 * PANEL
    top = int(np.flatnonzero(column)[0])
    right = left + PANEL + visualize.GAP
    for i, color in enumerate(TILE_COLORS[:4]):
        y = top + (2 * (i // 2) + 1) * PANEL // 4
        x = right + (2 * (i % 2) + 1) * PANEL // 4
        expected = 255 + (np.array(color) - 255) * 46 / 255
        assert np.abs(page[y, x] - expected).max() <= 2, f"tile {i + 1} is not where its colour is"


def test_layers_may_be_any_number():
    layout = GEOMETRY.layout(100, 100)
    gates = some_gates(layout)
    assert draw(Image.new("RGB", (100, 100)), layout, "?", "!", gates[:1]).height < draw(
        Image.new("RGB", (100, 100)), layout, "?", "!", gates
    ).height  # fmt: skip
