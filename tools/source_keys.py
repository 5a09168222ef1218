"""Writes the names, shapes and dtypes of full-size models' tensors, out of upstream's classes, into tests/model/keys/.

    python tools/source_keys.py               # with transformers: CLIP-L/14-336, LLaMA3-8B, LLaVA-NeXT-LLaMA3-8B
    python tools/source_keys.py open_clip     # with open_clip and timm: ConvNeXt-L, and CLIP-L/14-336 in its layout

The models are built on the meta device, so that nothing is allocated or downloaded. Each file is gzipped JSON: who
wrote it, the settings files of such a folder, and for each tensor its dtype and shape.
"""

import gzip
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "model" / "keys"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
VIT = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14, projection_dim=768,
)  # fmt: skip
LLAMA3 = dict(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=128000, eos_token_id=128009,
)  # fmt: skip


def write(name: str, package: str, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    found = {
        "written_by": f"{package} {importlib.metadata.version(package)}",
        "settings": settings,
        "tensors": {key: [DTYPES[tensor.dtype], list(tensor.shape)] for key, tensor in tensors.items()},
    }
    text = json.dumps(found, indent=0, sort_keys=True).encode()
    (FOLDER / f"{name}.json.gz").write_bytes(gzip.compress(text, mtime=0))
    print(f"{name}: {len(tensors)} tensors")


def write_transformers() -> None:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )
    from transformers.core_model_loading import revert_weight_conversion

    text = {name: value for name, value in LLAMA3.items() if name != "model_type"}
    for name, kind, config, dtype in (
        ("clip-vit-large-patch14-336", CLIPModel, CLIPConfig(vision_config=VIT, projection_dim=768), torch.float32),
        ("llama3-8b", LlamaForCausalLM, LlamaConfig(**text), torch.bfloat16),
        (
            "llava-next-llama3-8b",
            LlavaNextForConditionalGeneration,
            # Its vocabulary has grown by the image token, to a multiple of 64.
            LlavaNextConfig(
                vision_config={"model_type": "clip_vision_model", **VIT},
                text_config=LLAMA3 | dict(vocab_size=128320),
                image_token_index=128256,
            ),
            torch.float16,
        ),
    ):
        with torch.device("meta"):
            model = kind(config).to(dtype)
        tensors = revert_weight_conversion(model, dict(model.state_dict()))
        write(name, "transformers", tensors, {"config.json": json.loads(config.to_json_string())})


def write_open_clip() -> None:
    if torch.version.cuda is None:  # torchvision of the registry looks for operators that its CUDA library would bring
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip

    for name, model_name in (("open-clip-convnext-large", "convnext_large_d_320"),
                             ("open-clip-vit-l-14-336", "ViT-L-14-336-quickgelu")):  # fmt: skip
        config = open_clip.get_model_config(model_name)
        with torch.device("meta"):
            model = open_clip.CLIP(**config)
        write(name, "open_clip_torch", model.state_dict(), {"open_clip_config.json": {"model_cfg": config}})


if __name__ == "__main__":
    write_open_clip() if sys.argv[1:] == ["open_clip"] else write_transformers()
