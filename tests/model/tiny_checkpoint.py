"""Saves a checkpoint of fila-nano's size with random weights, in about a second."""

from pathlib import Path

import torch

from fila import FilaForConditionalGeneration, FilaImageProcessor, FilaProcessor, preset
from recipes.nano.tokenizer import build_character_tokenizer


def save_checkpoint(folder: Path, fusion: str = "deep", alpha: float = 0.5) -> Path:
    """Saves model and processor as `save_pretrained` does, in bfloat16, and returns the folder."""
    torch.manual_seed(0)
    config = preset("fila-nano")
    config.vision_config.fusion = fusion
    model = FilaForConditionalGeneration(config)
    if fusion == "deep":
        for module in model.model.vision_tower.fusion:
            torch.nn.init.constant_(module.alpha, alpha)
    model.to(torch.bfloat16).save_pretrained(folder)
    image_processor = FilaImageProcessor.from_geometry(config.vision_config.geometry(), do_high_res=fusion != "none")
    FilaProcessor(image_processor, build_character_tokenizer()).save_pretrained(folder)
    return folder
