"""The hybrid encoder: equality with its source ViT, the gate, groups of canvases, fusions, refused input."""

import json

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import CLIPVisionModel

from fila import FilaVisionConfig, FilaVisionModel, cli, inference, preset
from fila.fusion import FUSIONS, Fusion
from tests.model.tiny_checkpoint import save_checkpoint

CANVASES = [[64, 128], [128, 64], [128, 128], [192, 64], [64, 192]]


def nano_vision(**fields) -> FilaVisionModel:
    """fila-nano's encoder on tiles of 64 pixels, which the sizes below are chosen for."""
    config = preset("fila-nano").vision_config.to_dict()
    config["vit_config"]["image_size"] = 64
    return FilaVisionModel(
        FilaVisionConfig(**{**config, "image_grid_pinpoints": CANVASES, "high_res_size": 128, **fields})
    ).eval()


def pictures(model: FilaVisionModel, sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Random pictures' tensors, padding filled with NaN so that any use of it shows."""
    layouts = [model.config.geometry().layout(*size) for size in sizes]
    tile = model.config.image_size
    views = max(layout.num_views for layout in layouts)
    height, width = (max(layout.raster[axis] for layout in layouts) for axis in (0, 1))
    pixels = torch.full((len(sizes), views, 3, tile, tile), float("nan"))
    raster = torch.full((len(sizes), 3, height, width), float("nan"))
    for i, layout in enumerate(layouts):
        pixels[i, : layout.num_views] = torch.randn(layout.num_views, 3, tile, tile)
        raster[i, :, : layout.raster[0], : layout.raster[1]] = torch.randn(3, *layout.raster)
    return {"pixel_values": pixels, "high_res_pixel_values": raster, "image_sizes": torch.tensor(sizes)}


def clip_tower(model: FilaVisionModel) -> CLIPVisionModel:
    """transformers' CLIP tower with the same weights, all its layers."""
    clip = CLIPVisionModel(model.config.vit_config).eval()
    weights = {k.replace("layers.", "encoder.layers.", 1): v for k, v in model.vit.state_dict().items()}
    missing, unexpected = clip.load_state_dict(weights, strict=False)
    assert not unexpected
    built = range(model.config.num_vit_layers)
    assert not [k for k in missing if not k.startswith("post_layernorm") and int(k.split(".")[2]) in built]
    return clip


@pytest.mark.parametrize("fields", [{"fusion": "none"}, {}, {"fusion_gate": "scale"}, {"vision_feature_layer": -2}])
@torch.no_grad()
def test_closed_gates_and_no_fusion_leave_clip_untouched(fields):
    if "vision_feature_layer" in fields:
        fields = {**fields, "fusion_layers": [1, 2, 3, 4]}
    model = nano_vision(**fields)
    inputs = pictures(model, [(128, 128), (64, 128)])
    got = model(**inputs).last_hidden_state
    tiles = torch.cat([p[: model.config.geometry().layout(*s).num_views] for p, s in zip(
        inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True)])  # fmt: skip
    states = clip_tower(model)(tiles, output_hidden_states=True).hidden_states
    expected = states[model.config.vision_feature_layer]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_open_gates_change_every_fusion_depth():
    model = nano_vision()
    inputs = pictures(model, [(128, 128)])
    closed = model(**inputs).last_hidden_state
    for fusion in model.fusion:
        fusion.alpha.fill_(0.5)
        assert not torch.allclose(model(**inputs).last_hidden_state, closed)
        fusion.alpha.zero_()


@pytest.mark.parametrize("gate", ["product", "scale"])
def test_a_closed_gate_silences_a_non_finite_branch_and_still_learns(gate):
    model = nano_vision(fusion_gate=gate)
    inputs = pictures(model, [(128, 128)])
    expected = model(**inputs).last_hidden_state.detach()
    model(**inputs).last_hidden_state.sum().backward()
    assert all(f.alpha.grad is not None and f.alpha.grad.item() != 0 for f in model.fusion)
    with torch.no_grad():
        model.fusion[3].fc2.bias[0] = float("inf")
    got = model(**inputs).last_hidden_state
    assert torch.equal(got, expected)
    model.zero_grad()
    got.sum().backward()
    assert torch.isfinite(model.fusion[3].alpha.grad).all()
    assert model.fusion[3].alpha.grad.item() != 0


@torch.no_grad()
def test_a_batch_of_all_canvases_equals_each_picture_alone_and_never_reads_padding():
    model = nano_vision()
    for fusion in model.fusion:
        fusion.alpha.fill_(0.5)
    sizes = [(128, 128), (65, 200), (64, 128), (128, 125), (128, 64), (200, 65), (64, 128)]
    inputs = pictures(model, sizes)
    assert {model.config.geometry().layout(*s).canvas for s in sizes} == {tuple(c) for c in CANVASES}
    together = model(**inputs).last_hidden_state
    assert torch.isfinite(together).all()
    parts = together.split([model.config.geometry().layout(*s).num_views for s in sizes])
    for i, part in enumerate(parts):
        alone = model(**{k: v[i : i + 1] for k, v in inputs.items()}).last_hidden_state
        assert_close(part, alone, rtol=1e-4, atol=1e-5)


class EveryStage(Fusion):
    """A fusion of another kind: it reads the maps of all stages, at their boxes, and records what it was given."""

    def __init__(self):
        super().__init__()
        self.shift, self.seen = torch.nn.Parameter(torch.empty(1)), []

    def fuse(self, tokens, maps, boxes, image_index):
        self.seen.append((tokens.shape, [m.shape for m in maps], [b.tolist() for b in boxes], image_index.tolist()))
        return tokens + self.shift * sum(m.mean() for m in maps)

    def init_fresh(self):
        torch.nn.init.constant_(self.shift, 0.5)


@torch.no_grad()
def test_another_fusion_is_one_entry_of_the_registry(monkeypatch):
    monkeypatch.setitem(FUSIONS, "every", lambda config: [EveryStage() for _ in config.fusion_layers])
    model = nano_vision(fusion="every")
    assert [fusion.shift.item() for fusion in model.fusion] == [0.5] * 4
    sizes = [(128, 128), (64, 128), (128, 128)]
    model(**pictures(model, sizes))
    layout = model.config.geometry().layout(128, 128)
    for fusion in model.fusion:
        (square, maps, boxes, index), (wide, *_) = fusion.seen  # two groups of pictures, by canvas
        assert (square, wide) == ((10, 65, 192), (3, 65, 192))
        assert maps == [(2, 256 // s, 256 // s, c) for s, c in zip((2, 4, 8, 16), (32, 64, 128, 256), strict=True)]
        assert boxes == [layout.boxes(s) * 2 for s in (2, 4, 8, 16)]
        assert index == [0] * 5 + [1] * 5


def test_another_fusion_is_loaded_asked_and_explained(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(FUSIONS, "every", lambda config: [EveryStage() for _ in config.fusion_layers])
    folder = save_checkpoint(tmp_path / "checkpoint", fusion="every")
    Image.new("RGB", (120, 90), "white").save(tmp_path / "a.png")
    picture, out = str(tmp_path / "a.png"), tmp_path / "explained.png"
    asked = ["ask", picture, "What?", "--model", str(folder), "--max-new-tokens", "2", "--json"]
    assert cli.main([*asked, "--explain", str(out), "--backend", "eager"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["backend"]["choice"] == "none"
    assert "'every' does not use fila_kernels" in record["backend"]["why"]
    assert [stage["vit_layer"] for stage in record["backend"]["stages"]] == [1, 2, 4, 5]
    gates = record["explained"]["gates"]
    assert [(gate["convnext_stage"], gate["alpha"]) for gate in gates] == [(None, None)] * 4
    assert all(gate["strength"] > 0 for gate in gates)
    assert out.exists()
    found = inference.answer(*inference.load(folder), Image.open(picture), "What?", max_new_tokens=2)
    assert found.backend == record["backend"]


@pytest.mark.parametrize("rule", ["scaled", "fixed", "direct"])
@torch.no_grad()
def test_every_high_resolution_rule_runs(rule):
    model = nano_vision(high_res_rule=rule)
    for fusion in model.fusion:
        fusion.alpha.fill_(0.5)
    sizes = [(150, 100), (64, 192)]
    views = sum(model.config.geometry().layout(*s).num_views for s in sizes)
    assert model(**pictures(model, sizes)).last_hidden_state.shape == (views, 65, 192)


def test_gradient_checkpointing_changes_nothing():
    model = nano_vision().train()
    for fusion in model.fusion:
        fusion.alpha.data.fill_(0.5)
    inputs = pictures(model, [(128, 64)])
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for stage in model.convnext.stages for layer in stage.layers)
        model(**inputs).last_hidden_state.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_misfit_tensors_are_refused_by_name():
    model = nano_vision()
    good = pictures(model, [(128, 128), (64, 128)])
    for change, message in (
        ({"image_sizes": None}, r"expected image_sizes \[n_images, 2\]"),
        ({"image_sizes": torch.tensor([[128, 128]])}, r"one row of image_sizes per picture \(2\), got 1"),
        ({"pixel_values": good["pixel_values"][:, :2]}, "expected at least 5 views for these image sizes, got 2"),
        ({"pixel_values": good["pixel_values"][..., :32]}, r"expected pixel_values .* got \[2, 5, 3, 64, 32\]"),
        ({"high_res_pixel_values": None}, "expected high_res_pixel_values beside pixel_values"),
        ({"high_res_pixel_values": good["high_res_pixel_values"][..., :150]}, ">= 256, >= 256"),
        ({"image_sizes": torch.tensor([[0, 5], [5, 5]])}, "at least 1x1 pixels, got 0x5"),
        ({"image_sizes": torch.tensor([128, 128])}, r"expected image_sizes \[n_images, 2\] .* got \[2\]"),
        ({"image_sizes": torch.zeros(0, 2, dtype=torch.int64)}, "at least one picture"),
        ({"image_sizes": torch.tensor([[128.0, 128], [64, 128]])}, "in whole pixels"),
        (
            {"pixel_values": good["pixel_values"].to(torch.uint8)},
            "pixel_values normalised, in a float dtype, got torch.uint8",
        ),
        ({"high_res_pixel_values": good["high_res_pixel_values"].long()}, "high_res_pixel_values normalised"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**good, **change})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion_layers": [1, 2, 3]}, "must name 4 ascending ViT layers"),
        ({"fusion_layers": [1, 2, 4, 6]}, r"in 0\.\.5"),
        ({"fusion_layers": [2, 1, 4, 5]}, "ascending"),
        ({"image_grid_pinpoints": [[100, 128]]}, "multiple of the tile"),
        ({"high_res_size": 100}, "multiple of the ConvNeXt's stride 16"),
        ({"vision_feature_layer": -7}, "names no layer"),
        ({"vision_feature_layer": 7}, "names no layer"),
        ({"vision_feature_layer": 3, "fusion_layers": None}, "at least one ViT layer for each of 4"),
        ({"fusion_hidden_size": 0}, "fusion_hidden_size of at least 1"),
        ({"fusion_gate": "sum"}, "fusion_gate"),
        ({"fusion": "late"}, "fusion: expected one of deep, none, got 'late'"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        nano_vision(**fields)
