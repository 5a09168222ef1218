"""Writes small models as upstream's classes save them: the sources that a checkpoint is assembled from."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

VIT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, image_size=28, patch_size=7
)
CONVNEXT = dict(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 2, 1], num_stages=4, patch_size=4)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] +"
    " ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAVA = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}\n{% endfor %}"
)


def _bytes(*special: str) -> dict[str, int]:
    """A vocabulary of special tokens and bytes."""
    return {token: i for i, token in enumerate([*special, *bytes_to_unicode().values()])}


def _llama3_tokenizer() -> PreTrainedTokenizerFast:
    # Meta's files name no class of their own.
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = GPT2Tokenizer(_bytes(*special), [], eos_token=special[1], unk_token=special[1]).backend_tokenizer
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1])
    found.add_special_tokens({"additional_special_tokens": special[2:]})
    found.chat_template = LLAMA3
    return found


def _chatml_tokenizer(kind: type, pad: str) -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    found = kind(_bytes(*special), [], bos_token=special[1], eos_token=special[2], pad_token=pad)
    found.chat_template = CHATML
    return found


def _mistral_tokenizer() -> LlamaTokenizer:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    for character in "▁ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,?![]/":
        vocabulary[character] = len(vocabulary)
    found = LlamaTokenizer(vocabulary, [])
    found.chat_template = MISTRAL
    return found


# For each language model: classes, tokenizer, what differs in the configuration, and the spare rows of its vocabulary.
# Real ones differ in the same ways: heads tied or not, biases, norms on queries and keys, spare rows.
LANGUAGE_MODELS = {
    "llama3": (LlamaConfig, LlamaForCausalLM, _llama3_tokenizer, dict(bos_token_id=0, eos_token_id=1), 0),
    "qwen2.5": (
        Qwen2Config, Qwen2ForCausalLM, lambda: _chatml_tokenizer(Qwen2Tokenizer, "<|endoftext|>"),
        dict(bos_token_id=None, eos_token_id=2, tie_word_embeddings=True), 5,
    ),
    "qwen3": (
        Qwen3Config, Qwen3ForCausalLM, lambda: _chatml_tokenizer(Qwen2Tokenizer, "<|endoftext|>"),
        dict(bos_token_id=None, eos_token_id=2, head_dim=8), 5,
    ),
    "mistral": (MistralConfig, MistralForCausalLM, _mistral_tokenizer, dict(head_dim=8), 0),
    "smollm2": (
        LlamaConfig, LlamaForCausalLM, lambda: _chatml_tokenizer(GPT2Tokenizer, "<|im_end|>"),
        dict(bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True), 0,
    ),
}  # fmt: skip


def randomised(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with no tensor of zeros or ones, so that one in the wrong place shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype).eval()


def save_vit(folder: Path, whole: bool = True, **changes) -> PreTrainedModel:
    """A CLIP of transformers with its image processor: both towers, or the vision tower alone."""
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    config = CLIPConfig(text_config=text, vision_config=VIT | changes, projection_dim=8)
    model = randomised(CLIPModel(config) if whole else CLIPVisionModel(config.vision_config))
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return model


def save_convnext(folder: Path, whole: bool = True, **changes) -> PreTrainedModel:
    config = ConvNextConfig(**(CONVNEXT | changes))
    model = randomised(ConvNextForImageClassification(config) if whole else ConvNextModel(config))
    model.save_pretrained(folder)
    return model


def save_llm(folder: Path, kind: str, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> PreTrainedModel:
    config, model_class, make_tokenizer, settings, spare = LANGUAGE_MODELS[kind]
    tokenizer = make_tokenizer()
    model = randomised(model_class(config(**(TEXT | settings), vocab_size=len(tokenizer) + spare)), dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return model


def save_llava_next(folder: Path, dtype: torch.dtype = torch.float32) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT over a Llama, as transformers 5 writes it."""
    tokenizer = _chatml_tokenizer(GPT2Tokenizer, "<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = LLAVA
    config = LlavaNextConfig(
        vision_config=VIT,
        text_config=dict(model_type="llama", vocab_size=len(tokenizer) + 3, bos_token_id=1, eos_token_id=2, **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        vision_feature_layer=-2,
    )
    model = randomised(LlavaNextForConditionalGeneration(config), dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    return model
