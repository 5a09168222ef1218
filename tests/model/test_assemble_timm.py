"""Towers of open_clip and timm encode in FILA as in their library; skipped where the two are not installed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fila.checkpoints.assemble import assemble
from fila.checkpoints.export import export_tower
from fila.checkpoints.load import load
from tests.model.source_models import randomised, save_convnext, save_llm, save_vit

if not all(map(importlib.util.find_spec, ("timm", "open_clip"))):
    pytest.skip("timm and open_clip are not installed", allow_module_level=True)
import open_clip
import timm

TEXT = dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1)


def save(folder: Path, name: str, model, settings: dict) -> dict[str, torch.Tensor]:
    folder.mkdir()
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(tensors, folder / name, {"format": "pt"})
    (folder / ("open_clip_config.json" if "open_clip" in name else "config.json")).write_text(json.dumps(settings))
    return tensors


@pytest.mark.parametrize("quick", [True, False])
def test_a_vit_of_open_clip(tmp_path, quick):
    vision = dict(image_size=28, layers=6, width=32, patch_size=7, head_width=8, mlp_ratio=2.0)
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=TEXT, quick_gelu=quick)
    model = randomised(open_clip.CLIP(**config))
    tensors = save(tmp_path / "vit", "open_clip_model.safetensors", model, {"model_cfg": config})
    save_convnext(tmp_path / "convnext")
    save_llm(tmp_path / "llm", "smollm2")
    assemble(tmp_path / "out", **{role: tmp_path / role for role in ("vit", "convnext", "llm")})
    got = export_tower(tmp_path / "out", "vit")
    assert "visual.transformer.resblocks.4.attn.in_proj_weight" in got
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in got.items())
    vit = load(tmp_path / "out")[0].model.vision_tower.vit
    views = torch.randn(3, 3, 28, 28)
    states: list[torch.Tensor] = []
    model.visual.transformer.resblocks[4].register_forward_hook(lambda module, given, out: states.append(out))
    with torch.no_grad():
        model.encode_image(views)
        x = vit.pre_layrnorm(vit.embeddings(views))
        for layer in vit.layers:
            x = layer(x, None)
    wanted = states[0] if states[0].shape == x.shape else states[0].transpose(0, 1)
    assert torch.allclose(x, wanted, atol=1e-5), (x - wanted).abs().max()


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_a_convnext_of_timm(tmp_path, library):
    arguments = dict(depths=(1, 1, 2, 1), dims=(4, 8, 12, 16))
    trunk = randomised(timm.models.convnext.ConvNeXt(num_classes=3, **arguments))
    if library == "timm":
        settings = {"architecture": "convnext_tiny", "model_args": arguments, "pretrained_cfg": {"mean": [0.5] * 3}}
        tensors = save(tmp_path / "convnext", "model.safetensors", trunk, settings)
    else:
        whole = torch.nn.Module()
        whole.visual = torch.nn.Module()
        whole.visual.trunk = trunk
        settings = {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_test", "image_size": 64}}}
        tensors = save(tmp_path / "convnext", "open_clip_model.safetensors", whole, settings)
    save_vit(tmp_path / "vit")
    save_llm(tmp_path / "llm", "smollm2")
    assemble(tmp_path / "out", **{role: tmp_path / role for role in ("vit", "convnext", "llm")})
    got = export_tower(tmp_path / "out", "convnext")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in got.items())
    model, processor = load(tmp_path / "out")
    if library == "timm":
        assert processor.image_processor.high_res_image_mean == [0.5] * 3
    raster = torch.randn(1, 3, 128, 64)
    with torch.no_grad():
        (maps,) = model.model.vision_tower.convnext(raster)
        wanted = trunk.forward_intermediates(raster, intermediates_only=True)
    for ours, theirs in zip(maps, wanted, strict=True):
        assert torch.allclose(ours.permute(0, 3, 1, 2), theirs, atol=1e-5), (
            (ours.permute(0, 3, 1, 2) - theirs).abs().max()
        )
