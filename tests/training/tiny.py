"""A FILA of some ten thousand weights, all its parts in place, in memory and as a checkpoint."""

from pathlib import Path

import torch

from fila import FilaConfig, FilaForConditionalGeneration, FilaImageProcessor, FilaProcessor, FilaVisionConfig
from recipes.nano.tokenizer import build_character_tokenizer
from tests.model.conftest import open_gates


def tiny_config() -> FilaConfig:
    """Tiles of 32 with 16 tokens; two layers or stages of everything but the ViT, which has four."""
    return FilaConfig(
        vision_config=FilaVisionConfig(
            vit_config=dict(
                hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=32,
                patch_size=8, hidden_act="gelu",
            ),
            convnext_config=dict(hidden_sizes=[8, 16], depths=[1, 1], patch_size=4, layer_scale_init_value=0.5),
            vision_feature_layer=-1,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
            high_res_size=64,
        ),
        text_config=dict(
            model_type="llama", vocab_size=102, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=4,
        tie_word_embeddings=True,
    )  # fmt: skip


def tiny_model(alpha: float = 0.5) -> FilaForConditionalGeneration:
    torch.manual_seed(0)
    model = FilaForConditionalGeneration(tiny_config())
    open_gates(model, alpha)
    return model


def tiny_processor() -> FilaProcessor:
    geometry = tiny_config().vision_config.geometry()
    return FilaProcessor(FilaImageProcessor.from_geometry(geometry), build_character_tokenizer())


def save_tiny(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder
