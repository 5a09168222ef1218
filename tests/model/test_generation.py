"""The generation contract: assisted, chunked, static and compiled decoding answer as plain greedy decoding does."""

import copy

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StaticCache

from tests.model.test_modeling import ask, picture, pictures_of

SIZES = [(128, 256), (500, 400), (400, 120)]  # three canvases, three lengths


@pytest.fixture(scope="module")
def inputs(nano_processor):
    images = [picture(height, width, i) for i, (height, width) in enumerate(SIZES)]
    return nano_processor(images=images, text=ask(nano_processor, images), padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def single(nano_processor):
    image = picture(500, 400, 0)
    return nano_processor(images=image, text=ask(nano_processor, [image]), return_tensors="pt")


def generate(model, inputs, **kwargs) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kwargs)


@pytest.fixture(scope="module")
def plain(nano, inputs):
    return generate(nano, inputs)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("chunk", [7, 64, 4096])
def test_chunks_of_the_prompt_change_nothing(nano, inputs, plain, chunk, cache):
    assert torch.equal(generate(nano, inputs, prefill_chunk_size=chunk, cache_implementation=cache), plain)


def test_chunks_go_on_from_a_cache(nano, nano_processor, single):
    """A second question about the same picture: its features are in the cache and are not merged again."""
    first = nano.generate(**single, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, nano_processor.tokenizer("What?", return_tensors="pt").input_ids], 1)
    expected = nano.generate(
        **pictures_of(single),
        input_ids=longer,
        attention_mask=torch.ones_like(longer),
        max_new_tokens=4,
        do_sample=False,
    )
    for chunk in (None, 3):
        got = nano.generate(
            input_ids=longer,
            attention_mask=torch.ones_like(longer),
            past_key_values=copy.deepcopy(first.past_key_values),
            prefill_chunk_size=chunk,
            max_new_tokens=4,
            do_sample=False,
        )
        assert torch.equal(got, expected)


def test_an_assistant_changes_nothing(nano, single):
    assert torch.equal(generate(nano, single, assistant_model=copy.deepcopy(nano)), generate(nano, single))


def test_looking_up_the_prompt_changes_nothing(nano, single):
    assert torch.equal(generate(nano, single, prompt_lookup_num_tokens=3), generate(nano, single))


def test_a_static_cache_changes_nothing(nano, inputs, plain):
    assert torch.equal(generate(nano, inputs, cache_implementation="static"), plain)


@torch.no_grad()
def test_prefill_and_decoding_compile_whole_with_a_static_cache(nano, single):
    """One graph each, though a prompt holds image tokens and a later step does not look at pictures at all."""
    model = copy.deepcopy(nano)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    ids, mask = single["input_ids"], single["attention_mask"]
    encoded = {"image": nano.get_image_features(**pictures_of(single))}
    length = ids.shape[1]
    for forward in (nano, model):
        cache = StaticCache(config=model.config.text_config, max_cache_len=length + 1)
        prompt = forward(input_ids=ids, attention_mask=mask, mm_encoder_outputs=encoded, past_key_values=cache)
        token = prompt.logits[:, -1:].argmax(-1)
        step = forward(
            input_ids=token, attention_mask=torch.ones(1, length + 1, dtype=mask.dtype), past_key_values=cache
        )
        if forward is nano:
            expected = prompt.logits, step.logits
    torch.testing.assert_close(prompt.logits, expected[0])
    torch.testing.assert_close(step.logits, expected[1])


class Wants(LogitsProcessor):
    """Leaves one token and nothing else worth having."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores - 1e3
        scores[:, self.token] = 1e4
        return scores


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"suppress_tokens": [7]},
        {"suppress_tokens": None},
        {"generation_config": GenerationConfig(max_new_tokens=3, suppress_tokens=[7])},
        {"num_beams": 2},
        {"do_sample": True, "top_k": 1},
        {"prefill_chunk_size": 50},
    ],
    ids=lambda asked: " ".join(asked) or "nothing",
)
def test_the_image_token_is_never_generated_whatever_is_asked(nano, single, asked):
    image = nano.config.image_token_id
    asked = {"max_new_tokens": 3, **asked}
    if "generation_config" in asked:
        del asked["max_new_tokens"]
    out = nano.generate(**single, logits_processor=[Wants(image)], **asked)
    assert image not in out[0, single["input_ids"].shape[1] :]


def test_a_user_s_own_suppressed_tokens_stay_suppressed(nano, single):
    chosen = generate(nano, single)[0, single["input_ids"].shape[1]].item()
    again = generate(nano, single, suppress_tokens=[chosen])
    assert chosen not in again[0, single["input_ids"].shape[1] :]
