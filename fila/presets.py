"""Named configurations: the paper's model, and the small one that is trained here and shipped."""

from collections.abc import Callable

from fila.configuration import FilaConfig, FilaVisionConfig

NANO_CANVASES = [[64, 128], [128, 64], [128, 128], [192, 64], [64, 192]]


def fila_llama3_8b() -> FilaConfig:
    """The paper's model: CLIP-ViT-L/14-336, CLIP ConvNeXt-L, LLaMA3-8B.

    The LLM's numbers are Meta-Llama-3-8B-Instruct's own; the image token is its first reserved special token.
    """
    return FilaConfig(
        vision_config=FilaVisionConfig(),
        text_config=dict(
            model_type="llama",
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            bos_token_id=128000,
            eos_token_id=128009,
        ),
        image_token_index=128002,
    )


def fila_nano() -> FilaConfig:
    """Seven million parameters that read and write single characters.

    Tile 64, patch 8 (64 tokens a view), and a ConvNeXt whose stem has stride 2, so that the raster is twice the canvas:
    a patch then holds one character or two of a picture with few lines of text, and a small model learns to read it.
    """
    return FilaConfig(
        vision_config=FilaVisionConfig(
            vit_config=dict(
                hidden_size=192,
                intermediate_size=768,
                num_hidden_layers=6,
                num_attention_heads=6,
                image_size=64,
                patch_size=8,
                hidden_act="gelu",
            ),
            convnext_config=dict(
                hidden_sizes=[32, 64, 128, 256],
                depths=[2, 2, 4, 2],
                patch_size=2,
                # The library's 0.02 and 1e-6 suit wide and deep towers; at these widths they leave the blocks dead.
                initializer_range=0.06,
                layer_scale_init_value=0.5,
            ),
            vision_feature_layer=-1,
            fusion_layers=[1, 2, 4, 5],
            # The product form bounds what a fusion can add to 1 and saturated within 200 steps; see docs/log.md.
            fusion_gate="scale",
            image_grid_pinpoints=NANO_CANVASES,
            high_res_size=128,
        ),
        text_config=dict(
            model_type="llama",
            vocab_size=102,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.05,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=4,
        tie_word_embeddings=True,  # what is read is what is written
    )


PRESETS: dict[str, Callable[[], FilaConfig]] = {"fila-llama3-8b": fila_llama3_8b, "fila-nano": fila_nano}


def preset(name: str) -> FilaConfig:
    """The configuration of that name.

    >>> preset("fila-nano").vision_config.geometry().grid
    8
    """
    if name not in PRESETS:
        raise ValueError(f"expected a preset out of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()
