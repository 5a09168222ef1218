"""Adds CVFM to a training loop of transformers' own LLaVA-NeXT; compares it with the same loop, gates shut.

    python examples/llava_next_with_cvfm.py [SEED ...]

Stripes of one raster pixel say the answer. The tiles' half resolution shows grey, so that only the ConvNeXt sees it.
"""

import sys

import torch
from torch import nn
from transformers import CLIPVisionConfig, ConvNextConfig, ConvNextModel, LlamaConfig, LlavaNextConfig
from transformers import LlavaNextForConditionalGeneration as LlavaNext

from fila_kernels import CVFM

TILE, CANVAS, WIDTH, STAGES, IMAGE = 32, 64, 32, (16, 32), 4  # a canvas of 2 x 2 tiles, twice as fine for the ConvNeXt


class DeepFusion(nn.Module):
    """The whole addition: a ConvNeXt over the picture, and a CVFM behind one ViT layer for each of its stages."""

    def __init__(self, layers):
        super().__init__()
        self.convnext = ConvNextModel(ConvNextConfig(hidden_sizes=STAGES, depths=(1, 1), num_stages=2, patch_size=4))
        self.fusions = nn.ModuleList(CVFM(WIDTH, channels) for channels in STAGES)
        for stage, layer in enumerate(layers[: len(STAGES)]):
            layer.register_forward_hook(lambda module, given, tokens, stage=stage: self.fuse(stage, tokens))

    def see(self, rasters):
        self.maps = self.convnext(rasters, output_hidden_states=True).hidden_states[1:]

    def fuse(self, stage, tokens):
        features = self.maps[stage].permute(0, 2, 3, 1)  # channels last
        side = features.shape[1]
        half = [[y, x, y + side / 2, x + side / 2] for y in (0, side / 2) for x in (0, side / 2)]
        boxes = torch.tensor([[0.0, 0, side, side], *half] * len(features))  # global view, then the tiles
        index = torch.arange(len(features), dtype=torch.int32).repeat_interleave(5)
        return self.fusions[stage](tokens, features, boxes, index)


def batch(size):
    """Pictures of upright or lying stripes, as LLaVA-NeXT's processor would cut them, and the fine raster."""
    upright = torch.randint(2, (size,))
    stripes = torch.arange(2 * CANVAS).remainder(2).float().expand(2 * CANVAS, -1) * 2 - 1
    rasters = torch.stack([stripes if u else stripes.T for u in upright])[:, None].expand(-1, 3, -1, -1)
    canvas = nn.functional.avg_pool2d(rasters, 2)
    tiles = canvas.unfold(2, TILE, TILE).unfold(3, TILE, TILE).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    views = torch.cat([nn.functional.interpolate(canvas, (TILE, TILE))[:, None], tiles], 1)
    count = 16 + 8 * 9  # tokens of the global view, and of the tiles with a newline a row
    ids = torch.cat([torch.full((size, count), IMAGE), torch.full((size, 1), 7), 5 + upright[:, None]], 1)
    labels = ids.clone()
    labels[:, :-1] = -100
    sizes = torch.full((size, 2), CANVAS)
    return rasters, {"pixel_values": views, "image_sizes": sizes, "input_ids": ids, "labels": labels}


def train(seed, shut, steps=80):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=TILE,
        patch_size=8,
    )
    text = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    sizes = dict(image_token_index=IMAGE, image_grid_pinpoints=[[CANVAS, CANVAS]])
    model = LlavaNext(LlavaNextConfig(vision_config=vision, text_config=text, **sizes))
    layers = next(m.layers for name, m in model.named_modules() if "vision_tower" in name and hasattr(m, "layers"))
    fusion = DeepFusion(layers)
    gates = [cvfm.alpha.requires_grad_(not shut) for cvfm in fusion.fusions]
    others = [p for p in (*model.parameters(), *fusion.parameters()) if all(p is not gate for gate in gates)]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": gates, "lr": 1e-2}], lr=2e-3)
    losses = []
    for _ in range(steps):
        rasters, inputs = batch(8)
        fusion.see(rasters)
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10, [round(gate.item(), 3) for gate in gates]


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:] or (0, 1, 2)):
        (loss, gates), (shut, _) = train(seed, False), train(seed, True)
        print(f"seed {seed}: loss {loss:.3f} with gates {gates}, {shut:.3f} with gates shut")
