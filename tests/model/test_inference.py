"""An answer carries its plan, backend and times, and depends on nothing but picture, question and model."""

import copy as copying
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fila import FilaProcessor
from fila.checkpoints.check import GENERATION
from fila.geometry import Geometry
from fila.images import ImageError, read_picture
from fila.inference import answer, answer_batch, check_question, load
from tests.model.tiny_checkpoint import save_checkpoint


def picture(height: int = 200, width: int = 300) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def test_answers_do_not_depend_on_how_a_checkpoint_would_generate(copy, loaded):
    own = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "num_beams": 3}
    (copy / GENERATION).write_text(json.dumps({**own, "eos_token_id": None, "suppress_tokens": list(range(5, 60))}))
    model, processor = load(copy)
    expected, found = (answer(*pair, picture(), "What?", max_new_tokens=6) for pair in (loaded, (model, processor)))
    assert found.text == expected.text
    assert model.generation_config.repetition_penalty == 9.0


def test_an_answer_says_how_it_came_about(loaded):
    model, processor = loaded
    found = answer(model, processor, picture(200, 300), "What is the total?", max_new_tokens=2, name="a picture")
    geometry: Geometry = processor.image_processor.geometry
    layout = geometry.layout(200, 300)
    assert (found.picture, found.question, found.image_size) == ("a picture", "What is the total?", (200, 300))
    assert (found.canvas, found.tiles) == (layout.canvas, (layout.rows, layout.columns))
    assert (found.visual_tokens, found.tiles_reach_llm) == (layout.num_tokens, True)
    assert set(found.seconds) == {"preprocess", "encode", "generate"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.backend["choice"] in ("native", "eager")
    assert [stage["vit_layer"] for stage in found.backend["stages"]] == [1, 2, 4, 5]
    assert all(stage["forward"]["why"] for stage in found.backend["stages"])
    again = answer(model, processor, picture(200, 300), "What is the total?", max_new_tokens=2)
    assert again.text == found.text


def test_several_pictures_in_one_batch(loaded):
    model, processor = loaded
    found = answer_batch(
        model, processor, [picture(60, 60), picture(50, 400)], ["Date?", "Total?"], max_new_tokens=2, names=["a", None]
    )
    assert [one.question for one in found] == ["Date?", "Total?"]
    assert [one.picture for one in found] == ["a", "PIL image of mode RGB"]
    assert [one.tiles for one in found] == [(1, 2), (1, 3)]
    assert answer_batch(model, processor, [], []) == []
    with pytest.raises(ValueError, match="one question per picture"):
        answer_batch(model, processor, [picture()], [])


def test_answers_are_what_generate_says(loaded):
    """The decoding here and transformers' own, which users call, give the same tokens."""
    model, processor = loaded
    pictures, questions = [picture(60, 60), picture(50, 400)], ["Date?", "What is the total?"]
    found = answer_batch(model, processor, pictures, questions, max_new_tokens=6)
    for image, one in zip(pictures, found, strict=True):
        inputs = processor(images=image, text=f"<bos><user><image>{one.question}<assistant>", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(out, skip_special_tokens=True).strip() == one.text


def test_threads_share_one_model(loaded):
    """Nothing is left on the model, neither while it answers nor after; every thread gets the answer it gets alone."""
    model, processor = loaded
    asked = [(picture(60 + 40 * i, 90), f"Total {i}?", 2 + i) for i in range(4)]

    def ask(one):
        image, question, longest = one
        return answer(model, processor, image, question, max_new_tokens=longest).text

    alone, own = [ask(one) for one in asked], model.generation_config
    settings = own.to_dict()
    with ThreadPoolExecutor(len(asked)) as threads:
        assert list(threads.map(ask, asked * 3)) == alone * 3
    assert model.generation_config is own
    assert own.to_dict() == settings
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def seen_by_the_model(model, ask) -> torch.Tensor:
    """The ids of the prompt in the call."""
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    try:
        ask()
    finally:
        hook.remove()
    return seen[0]


def with_tokenizer(processor, change, template: str | None = None, **names) -> FilaProcessor:
    """The processor with another tokenizer: nano's, after `change` has been at the one of the tokenizers library."""
    backend = Tokenizer.from_str(processor.tokenizer.backend_tokenizer.to_str())
    change(backend)
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>") | names
    special = {"extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in names.items() if token}, **special
    )
    return FilaProcessor(
        processor.image_processor, tokenizer, chat_template=template or processor.tokenizer.chat_template
    )


def add_turns(*tokens: str):
    """Special tokens that no name stands for, in the places of characters that no test asks about."""

    def change(backend: Tokenizer) -> None:
        found = json.loads(backend.to_str())
        for place, token in zip("~}|{`^", tokens, strict=False):
            number = found["model"]["vocab"].pop(place)
            found["model"]["vocab"][token] = number
            found["added_tokens"].append(
                dict(
                    id=number,
                    content=token,
                    single_word=False,
                    lstrip=False,
                    rstrip=False,
                    normalized=False,
                    special=True,
                )
            )
        found["added_tokens"].sort(key=lambda entry: entry["id"])
        backend.__setstate__(json.dumps(found).encode())

    return change


def chat(question: str, image: Image.Image) -> list:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


# As published in the tokenizer_config.json of Meta-Llama-3-8B-Instruct and SmolLM2-135M-Instruct; of Qwen2.5 and Qwen3
# what they say of messages without tools.
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\n' + messages[0]['content']"
    " + '<|im_end|>\n' }}\n{%- else %}\n    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud."
    " You are a helpful assistant.<|im_end|>\n' }}\n{%- endif %}\n{%- for message in messages %}\n"
    '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or'
    ' (message.role == "assistant" and not message.tool_calls) %}\n'
    "        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"
)
SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_3 = """
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
{%- if message.role == 'user' and message.content is string and not message.content.startswith('<tool_response>') %}
{%- set ns.last = (messages|length - 1) - loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' + content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
LLAMA_3_TURNS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_TURNS = ("<|im_start|>", "<|im_end|>")
QWENS_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLMS_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.mark.parametrize(
    "template, turns, prompt",
    [
        (
            LLAMA_3,
            LLAMA_3_TURNS,
            "<bos><|start_header_id|>user<|end_header_id|>\n\n<image>\nTotal?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            QWEN_2_5,
            CHATML_TURNS,
            f"<|im_start|>system\n{QWENS_SYSTEM}<|im_end|>\n<|im_start|>user\n<image>\nTotal?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            SMOLLM_2,
            CHATML_TURNS,
            f"<|im_start|>system\n{SMOLLMS_SYSTEM}<|im_end|>\n<|im_start|>user\n<image>\nTotal?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (QWEN_3, CHATML_TURNS, "<|im_start|>user\n<image>\nTotal?<|im_end|>\n<|im_start|>assistant\n"),
    ],
    ids=["llama3", "qwen2.5", "smollm2", "qwen3"],
)
def test_chat_templates_of_language_models(loaded, template, turns, prompt):
    """They know texts only; a placeholder and a line break then stand in front of the question."""
    model, nanos = loaded
    processor = with_tokenizer(nanos, add_turns(*turns), template)
    asked = chat("Total?", picture())
    assert processor.apply_chat_template(asked, add_generation_prompt=True) == prompt
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = seen_by_the_model(model, lambda: answer(model, processor, picture(), "Total?", max_new_tokens=1))
    assert torch.equal(ids, inputs["input_ids"])
    layout = processor.image_processor.geometry.layout(200, 300)
    assert int((ids == processor.image_token_id).sum()) == layout.num_tokens
    for token in turns:
        with pytest.raises(ValueError, match=re.escape(f"special token {token!r}")):
            answer(model, processor, picture(), f"Total?{token}", max_new_tokens=1)


def add_bos(backend: Tokenizer) -> None:
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])


@pytest.mark.parametrize(
    "template", [None, "<user>{% for part in messages[0].content %}{{ part.text or '<image>' }}{% endfor %}"]
)
def test_a_tokenizer_that_adds_its_own_bos(loaded, template):
    model, nanos = loaded
    processor = with_tokenizer(nanos, add_bos, template)
    ids = seen_by_the_model(model, lambda: answer(model, processor, picture(), "Total?", max_new_tokens=1))
    right = processor.apply_chat_template(
        chat("Total?", picture()), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    assert torch.equal(ids, right)
    assert int((ids == 1).sum()) == 1


@pytest.mark.parametrize(
    "names",
    [dict(padding_side="right"), dict(pad_token=None), dict(pad_token=None, eos_token=None)],
    ids=["right", "no pad", "no pad, no end"],
)
def test_batches_of_tokenizers_that_pad_otherwise(loaded, names):
    model, nanos = loaded

    def pad(backend: Tokenizer) -> None:
        if "padding_side" in names:
            backend.enable_padding(direction="right", pad_token="<pad>", length=900)

    processor = with_tokenizer(nanos, pad, **names)
    pictures, questions = [picture(60, 60), picture(50, 400)], ["Date?", "What is the total of it?"]
    found = answer_batch(model, processor, pictures, questions, max_new_tokens=6)
    alone = [
        answer(model, nanos, image, question, max_new_tokens=6)
        for image, question in zip(pictures, questions, strict=True)
    ]
    assert [one.text for one in found] == [one.text for one in alone]


def test_an_answer_ends_at_any_of_several_tokens(loaded):
    """What follows the end, and the end itself, is no text, also where the tokenizer does not call it special."""
    model, processor = loaded
    text = answer(model, processor, picture(), "Total?", max_new_tokens=8).text
    end = text.lstrip()[3]
    cut = text[: text.index(end)].strip()
    own = copying.copy(model)
    own.generation_config = GenerationConfig(eos_token_id=[2, processor.tokenizer.convert_tokens_to_ids(end)])
    found = answer(own, processor, picture(), "Total?", max_new_tokens=8)
    assert found.text == cut
    assert not any("cut off" in warning for warning in found.warnings)


def test_a_special_token_that_a_normalizer_makes(loaded):
    """Letters that become a special token's on the way are refused; an unknown character is not."""

    def change(backend: Tokenizer) -> None:
        backend.normalizer = normalizers.Replace("[[", "<")
        found = json.loads(backend.to_str())
        for token in found["added_tokens"]:
            token["normalized"] = True
        backend.__setstate__(json.dumps(found).encode())

    processor = with_tokenizer(loaded[1], change)
    with pytest.raises(ValueError, match="special token '<eos>'"):
        check_question(processor, "What?[[eos>")
    check_question(processor, "What is €?")
    with pytest.raises(ValueError, match="special token '<unk>'"):
        check_question(processor, "What is <unk>?")


def test_a_picture_that_was_read_is_not_read_again(loaded, tmp_path):
    path = tmp_path / "two.gif"
    picture(20, 20).save(path, save_all=True, append_images=[Image.new("RGB", (20, 20))])
    read = read_picture(path, name="mine")
    path.unlink()
    found = answer(*loaded, read, "Total?", max_new_tokens=1)
    assert (found.picture, found.image_size) == ("mine", (20, 20))
    assert found.warnings[0] == "mine: holds several frames, only the first is used"


def test_a_very_long_picture_is_answered_with_a_warning(loaded):
    found = answer(*loaded, picture(4, 4000), "Total?", max_new_tokens=2)
    assert not found.tiles_reach_llm
    assert "4000x4 pixels, so long that no tile reaches the language model" in found.warnings[0]


def test_warnings_about_picture_question_and_answer(loaded, tmp_path):
    path = tmp_path / "two.gif"
    picture(20, 20).save(path, save_all=True, append_images=[Image.new("RGB", (20, 20))])
    found = answer(*loaded, path, "Price in €?", max_new_tokens=1)
    frames, characters, length = found.warnings
    assert "only the first is used" in frames
    assert "'€'" in characters
    assert "cut off after 1 tokens" in length


@pytest.mark.parametrize(
    "question, message",
    [
        ("", "expected some text"),
        (" \n", "expected some text"),
        (None, "expected some text"),
        ("What is <image>?", "special token '<image>'"),
        ("<eos>", "special token '<eos>'"),
        ("\udcff?", "UTF-8"),
        ("a" * 3000, r"fit the model's \d+ tokens"),
    ],
)
def test_questions_that_are_none(loaded, question, message):
    with pytest.raises(ValueError, match=message):
        answer(*loaded, picture(), question)


def test_numbers_of_new_tokens_out_of_range(loaded):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        answer(*loaded, picture(), "Total?", max_new_tokens=0)
    with pytest.raises(ValueError, match=r"fit the model's \d+ tokens"):
        answer(*loaded, picture(), "Total?", max_new_tokens=3000)


def test_pictures_that_are_none(loaded):
    with pytest.raises(ImageError, match="my file: expected a picture"):
        answer(*loaded, b"not a picture", "Total?", name="my file")


def test_numbers_that_are_none(checkpoint):
    model, processor = load(checkpoint)
    model.model.image_newline.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="expected finite numbers"):
        answer(model, processor, picture(), "Total?", max_new_tokens=1)


def test_without_fusion_there_is_no_backend(tmp_path):
    found = answer(*load(save_checkpoint(tmp_path, fusion="none")), picture(), "Total?", max_new_tokens=1)
    assert found.backend == {"choice": "none", "why": "the model has fusion off", "stages": []}
