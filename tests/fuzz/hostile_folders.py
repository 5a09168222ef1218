"""Lists what an attacker would write into a checkpoint folder: each entry is one folder, made the same way every time.

Settings that lead elsewhere, values of wrong types and absurd sizes, JSON that readers disagree on, chat templates that
never end or reach for Python, and weights that could be meant in two ways.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fila.checkpoints.check import CHAT_TEMPLATE, GENERATION, SHIPPED, WEIGHTS, WEIGHTS_INDEX

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
EVIL = "evil.Evil"
PREPENDED = [{"type": "Prepend", "prepend": "x" * 10**6}] * 50
PADDED = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
# File, path of the value within it, value.
SETTINGS: tuple[tuple[str, str, Any], ...] = (
    ("config.json", "transformers_weights", "other.safetensors"),
    ("config.json", "text_config.transformers_weights", "/etc/passwd"),
    ("config.json", "auto_map", {"AutoConfig": EVIL, "AutoModel": EVIL}),
    ("config.json", "auto_map", {"AutoModelForImageTextToText": f"owner/name--{EVIL}"}),
    ("config.json", "text_config.auto_map", {"AutoModelForCausalLM": EVIL}),
    ("config.json", "_name_or_path", "hf:owner/name"),
    ("config.json", "base_model_name_or_path", "hf:owner/name"),
    ("config.json", "attn_implementation", "kernels-community/flash-attn"),
    ("config.json", "_attn_implementation", {"text_config": "kernels-community/flash-attn3:flash_attn_func"}),
    ("config.json", "vision_config._attn_implementation_internal", "kernels-community/flash-attn"),
    ("config.json", "use_kernels", True),
    ("config.json", "text_config.experts_implementation", "owner/name"),
    ("config.json", "text_config.model_type", "evil"),
    ("config.json", "text_config.model_type", "../../evil"),
    ("config.json", "text_config.model_type", ["llama"]),
    ("config.json", "text_config", None),
    ("config.json", "vision_config", []),
    ("config.json", "text_config.vocab_size", 10**9),
    ("config.json", "text_config.num_hidden_layers", 10**5),
    ("config.json", "text_config.num_hidden_layers", 3.0),
    ("config.json", "text_config.num_hidden_layers", True),
    ("config.json", "text_config.num_attention_heads", -1),
    ("config.json", "text_config.num_attention_heads", 0),
    ("config.json", "text_config.num_key_value_heads", 10**9),
    ("config.json", "text_config.head_dim", 2**40),
    ("config.json", "text_config.hidden_size", 10**9),
    ("config.json", "text_config.intermediate_size", 2**62),
    ("config.json", "text_config.intermediate_size", -192),
    ("config.json", "text_config.max_position_embeddings", 2**62),
    ("config.json", "text_config.max_position_embeddings", 10**9),
    ("config.json", "text_config.rope_parameters", {"rope_type": "dynamic", "rope_theta": 0, "factor": 10**30}),
    ("config.json", "text_config.rope_parameters", {"rope_type": "longrope", "rope_theta": "10000"}),
    ("config.json", "text_config.rms_norm_eps", "1e-5"),
    ("config.json", "text_config.rms_norm_eps", -1),
    ("config.json", "text_config.hidden_act", "__import__('os')"),
    ("config.json", "text_config.pad_token_id", 10**9),
    ("config.json", "text_config.eos_token_id", [1, "2", None]),
    ("config.json", "text_config.layer_types", ["full_attention"] * 10**5),
    ("config.json", "vision_config.vit_config.num_hidden_layers", 10**5),
    ("config.json", "vision_config.vit_config.num_attention_heads", -1),
    ("config.json", "vision_config.vit_config.num_attention_heads", 8.0),
    ("config.json", "vision_config.vit_config.image_size", 10**9),
    ("config.json", "vision_config.vit_config.patch_size", 0),
    ("config.json", "vision_config.convnext_config.depths", [10**5] * 4),
    ("config.json", "vision_config.convnext_config.depths", [1.0] * 4),
    ("config.json", "vision_config.convnext_config.hidden_sizes", [2**31] * 4),
    ("config.json", "vision_config.convnext_config.drop_path_rate", "nan"),
    ("config.json", "vision_config.image_grid_pinpoints", [[10**9, 10**9]]),
    ("config.json", "vision_config.image_grid_pinpoints", [[64, 64]] * 10**4),
    ("config.json", "vision_config.high_res_size", 10**9),
    ("config.json", "vision_config.fusion", "evil"),
    ("config.json", "vision_config.fusion_layers", [0, 0, 0, 0]),
    ("config.json", "image_token_id", -1),
    ("config.json", "image_token_id", 10**9),
    ("config.json", "tie_word_embeddings", "false"),
    ("config.json", "dtype", "float8_e4m3fn"),
    ("config.json", "dtype", "__class__"),
    ("config.json", "architectures", [EVIL]),
    ("config.json", "id2label", {str(i): "x" for i in range(10**5)}),
    ("config.json", "num_labels", 10**9),
    ("config.json", "quantization_config", {"quant_method": "bitsandbytes"}),
    ("config.json", "__class__", "x"),
    ("config.json", "to_dict", "x"),
    ("config.json", "text_config.validate", "x"),
    (GENERATION, "eos_token_id", "2"),
    (GENERATION, "eos_token_id", {"a": 1}),
    (GENERATION, "max_new_tokens", "many"),
    (GENERATION, "custom_generate", "hf:owner/name"),
    (GENERATION, "temperature", []),
    (GENERATION, "cache_implementation", EVIL),
    (GENERATION, "compile_config", {"backend": "evil"}),
    (GENERATION, "watermarking_config", {"a": 1}),
    (GENERATION, "_from_model_config", "yes"),
    (GENERATION, "forced_decoder_ids", [[10**9, 10**9]]),
    ("processor_config.json", "processor_class", "EvilProcessor"),
    ("processor_config.json", "image_processor.image_processor_type", "EvilImageProcessor"),
    ("processor_config.json", "image_processor.auto_map", {"AutoImageProcessor": EVIL}),
    ("processor_config.json", "auto_map", {"AutoProcessor": EVIL}),
    ("processor_config.json", "image_processor.tile_size", 64.0),
    ("processor_config.json", "image_processor.tile_size", 10**9),
    ("processor_config.json", "image_processor.image_mean", [0.5]),
    ("processor_config.json", "image_processor.image_mean", [True, "a", None]),
    ("processor_config.json", "image_processor.image_std", [0, 0, 0]),
    ("processor_config.json", "image_processor.image_std", 1e-320),
    ("processor_config.json", "image_processor.max_image_side", 10**30),
    ("processor_config.json", "image_processor.resample", 99),
    ("processor_config.json", "image_processor.do_high_res", "yes"),
    ("processor_config.json", "image_processor.preprocess", "x"),
    ("processor_config.json", "image_token", ""),
    ("processor_config.json", "image_token", "a"),
    ("processor_config.json", "chat_template", "{{ 1 }}"),
    ("processor_config.json", "chat_template", {"default": "x"}),
    ("tokenizer_config.json", "auto_map", {"AutoTokenizer": [EVIL, None]}),
    ("tokenizer_config.json", "auto_map", [EVIL, EVIL]),
    ("tokenizer_config.json", "tokenizer_class", EVIL),
    ("tokenizer_config.json", "tokenizer_class", "BertTokenizer"),
    ("tokenizer_config.json", "tokenizer_class", "MistralCommonBackend"),
    ("tokenizer_config.json", "tokenizer_file", "/etc/passwd"),
    ("tokenizer_config.json", "vocab_file", "../config.json"),
    ("tokenizer_config.json", "fast_tokenizer_files", ["tokenizer.1.0.json"]),
    ("tokenizer_config.json", "chat_template", {"default": "x"}),
    ("tokenizer_config.json", "added_tokens_decoder", {"999999999": {"content": "x"}}),
    ("tokenizer_config.json", "added_tokens_decoder", {"a": 1}),
    ("tokenizer_config.json", "extra_special_tokens", {"__class__": "x"}),
    ("tokenizer_config.json", "extra_special_tokens", 7),
    ("tokenizer_config.json", "model_max_length", "1e30"),
    ("tokenizer_config.json", "model_max_length", -1),
    ("tokenizer_config.json", "padding_side", "middle"),
    ("tokenizer_config.json", "eos_token", {"__type": "AddedToken", "content": "x" * 10**6}),
    ("tokenizer_config.json", "eos_token", 2),
    ("tokenizer_config.json", "name_or_path", "hf:owner/name"),
    ("tokenizer.json", "auto_map", {"AutoTokenizer": [EVIL, EVIL]}),
    ("tokenizer.json", "model.type", "Evil"),
    ("tokenizer.json", "model.vocab", {}),
    ("tokenizer.json", "model.vocab", {"a": 2**31, "b": 2**32 - 1}),
    ("tokenizer.json", "model.vocab", {"a": -1}),
    ("tokenizer.json", "added_tokens", [{"id": 0, "content": ""}]),
    ("tokenizer.json", "normalizer", {"type": "Replace", "pattern": {"Regex": "((a+)+)+$"}, "content": ""}),
    ("tokenizer.json", "normalizer", {"type": "Replace", "pattern": {"Regex": "(" * 1000}, "content": ""}),
    ("tokenizer.json", "normalizer", {"type": "Sequence", "normalizers": PREPENDED}),
    ("tokenizer.json", "normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("tokenizer.json", "padding", PADDED | {"pad_type_id": 0, "pad_token": "x"}),
    ("tokenizer.json", "truncation", {"max_length": 0, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
)  # fmt: skip
PROMPT = "{% for m in messages %}{{ m.role }}<image>What?{% endfor %}"
TEMPLATES = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}" + PROMPT,
    "endless set": "{% set n = namespace(i=0) %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% set n.i = n.i + 1 %}{% endfor %}{% endfor %}" + PROMPT,
    "endless filter": "{{ range(99999) | map('string') | list | length }}" * 500 + PROMPT,
    "recursion": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}" + PROMPT,
    "power": "{% set x = 10 ** 10 ** 9 %}" + PROMPT,
    "product": "{% set x = 'x' * 10000000000 %}" + PROMPT,
    "doubling": "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}" + PROMPT,
    "padding": "{{ '%99999999999d' % 1 }}" + PROMPT,
    "format": "{{ '{:>99999999999}'.format(1) }}" + PROMPT,
    "centre": "{{ 'x' | center(99999999999) }}" + PROMPT,
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}" + PROMPT,
    "globals": "{{ cycler.__init__.__globals__.os.system('touch ran') }}" + PROMPT,
    "attr": "{{ ''|attr('__class__') }}" + PROMPT,
    "format attribute": "{{ '{0.__class__}'.format('') }}" + PROMPT,
    "include": "{% include '/etc/passwd' %}" + PROMPT,
    "import": "{% import 'evil' as e %}" + PROMPT,
    "extends": "{% extends 'config.json' %}",
    "raise": "{{ raise_exception('\x1b[2J\nplanted') }}",
    "strftime": "{{ strftime_now('%Y' * 100000) }}" + PROMPT,
    "syntax": "{% for %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}" + PROMPT,
    "deep blocks": "{% if true %}" * 500 + PROMPT + "{% endif %}" * 500,
    "nothing": "",
    "no text": "<image>",
    "changes the messages": "{{ messages.clear() }}" + PROMPT,
    "long": "{# " + "x" * 2**22 + " #}" + PROMPT,
}
# What stands in the place of a whole JSON file; {} is where its own fields go.
JSONS = {
    "nested lists": '{{"x": ' + "[" * 10**5 + "]" * 10**5 + ", {}}}",
    "nested objects": '{{"x": ' + '{{"x": ' * 500 + "1" + "}}" * 500 + ", {}}}",
    "NaN": '{{"initializer_range": NaN, {}}}',
    "infinity": '{{"initializer_range": -Infinity, {}}}',
    "1e999": '{{"initializer_range": 1e999, {}}}',
    "many digits": '{{"initializer_range": ' + "9" * 10**5 + ", {}}}",
    "doubled key": '{{{}, "model_type": "llava", "tokenizer_class": "Evil", "image_processor": {{}}}}',
    "doubled key first": '{{"model_type": "llava", "tokenizer_class": "Evil", "image_processor": {{}}, {}}}',
    "mark": "\ufeff{{{}}}",
    "comment": "// no JSON\n{{{}}}",
    "lone surrogate": '{{"\\ud800": "\\ud800", {}}}',
    "null byte": '{{"a\\u0000b": 1, {}}}',
    "list": "[{{{}}}]",
}


def weights_twice(folder: Path) -> None:
    """A whole file and two shards with other numbers."""
    shards(folder, keep=True)


def shards(folder: Path, change: Callable[[dict[str, str]], None] | None = None, keep: bool = False) -> None:
    """Splits the weights in two; `change` writes the index's lies."""
    tensors = load_file(folder / WEIGHTS)
    homes = {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}
    for home in SHARDS:
        save_file({n: tensors[n] for n in homes if homes[n] == home}, folder / home, metadata={"format": "pt"})
    if change:
        change(homes)
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {"total_size": -1}, "weight_map": homes}))
    if not keep:
        (folder / WEIGHTS).unlink()


def both_shards_hold_it(folder: Path) -> None:
    shards(folder)
    first, second = (load_file(folder / shard) for shard in SHARDS)
    save_file(second | {"model.image_newline": first.get("model.image_newline", torch.zeros(192))}, folder / SHARDS[1])
    save_file(first | {"model.image_newline": torch.zeros(192, dtype=torch.bfloat16)}, folder / SHARDS[0])


def linked_shard(folder: Path) -> None:
    shards(folder)
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / SHARDS[0], outside)
    (folder / SHARDS[0]).symlink_to(outside)


def lies(path: str) -> Callable[[Path], None]:
    """An index that leads to a path for one tensor."""
    return lambda folder: shards(folder, lambda homes: homes.update({min(homes): path}))


def beside(name: str, content: bytes = b"{}") -> Callable[[Path], None]:
    """A further file."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return make


def header(length: int, text: bytes) -> Callable[[Path], None]:
    """Weights whose header is that text and claims that length."""

    def make(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + text)

    return make


ENTRY = b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,%s]}}'
HUGE = ENTRY % (b"4611686018427387904,4", b"64")
OVERFLOWING = ENTRY % (b"18446744073709551615", b"4")
EMPTY = b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(150_000))
LAYOUTS: dict[str, Callable[[Path], None]] = {
    "two layouts": weights_twice,
    "a tensor in two shards": both_shards_hold_it,
    "a shard that is a link": linked_shard,
    "index: up": lies(f"../{WEIGHTS}"),
    "index: absolute": lies(str(SHIPPED / WEIGHTS)),
    "index: folder": lies("sub/model.safetensors"),
    "index: backslash": lies("..\\model.safetensors"),
    "index: null": lies("a\0.safetensors"),
    "index: pickle": lies("pytorch_model.bin"),
    "index: itself": lies(WEIGHTS_INDEX),
    "pickle": beside("pytorch_model.bin", b"cos\nsystem\n(S'touch ran'\ntR."),
    "adapter": beside("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "hf:owner/name"}'),
    "adapter weights": beside("adapter_model.safetensors"),
    "templates": beside("chat_template.json", b'{"chat_template": "x"}'),
    "further templates": beside("additional_chat_templates/evil.jinja", b"{{ 1 }}"),
    "tokenizer.py": beside("tokenizer.py", b"raise SystemExit(7)"),
    "preprocessor": beside("preprocessor_config.json", b'{"image_processor_type": "Evil", "auto_map": {"x": "y"}}'),
    "video": beside("video_preprocessor_config.json", b"["),
    "special tokens": beside("special_tokens_map.json", b'{"eos_token": {"content": 7}}'),
    "added tokens": beside("added_tokens.json", b'{"x": "y"}'),
    "sentencepiece": beside("tokenizer.model", b"\x0a\x07" * 100),
    "header: 2**62": header(2**62, b"{}"),
    "header: nested": header(200_000, b"[" * 200_000),
    "header: huge shape": header(len(HUGE), HUGE),
    "header: overflow": header(len(OVERFLOWING), OVERFLOWING),
    "header: many": header(10**7, (b"{" + EMPTY + b"}").ljust(10**7)),
}  # fmt: skip


def _set(folder: Path, file: str, path: str, value: Any) -> None:
    whole = json.loads((folder / file).read_text())
    *owners, name = path.split(".")
    owner = whole
    for part in owners:
        owner = owner[part]
    owner[name] = value
    (folder / file).write_text(json.dumps(whole))


def _template(folder: Path, text: str) -> None:
    (folder / CHAT_TEMPLATE).write_text(text)


def _json(folder: Path, file: str, form: str) -> None:
    own = (folder / file).read_text().strip()[1:-1]
    (folder / file).write_text(form.format(own))


def folders() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every entry: its name, and what is done to a copy of the shipped checkpoint."""
    for file, path, value in SETTINGS:
        yield f"{file}: {path} {str(value)[:60]}", lambda f, a=(file, path, value): _set(f, *a)
    for name, text in TEMPLATES.items():
        yield f"template: {name}", lambda f, text=text: _template(f, text)
    for name, form in JSONS.items():
        for file in ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", GENERATION):
            yield f"{file}: {name}", lambda f, a=(file, form): _json(f, *a)
    yield from LAYOUTS.items()
