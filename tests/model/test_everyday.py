"""Everyday uses of a transformers model, on a small FILA: sizes, parts on disk, pipelines, adapters, embeddings."""

import copy

import peft
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, pipeline

from fila import FilaForConditionalGeneration
from tests.model.conftest import open_gates
from tests.model.test_modeling import picture, pictures_of
from tests.model.test_sharding import batch_of, small


@pytest.fixture(scope="module")
def model() -> FilaForConditionalGeneration:
    torch.manual_seed(0)
    model = FilaForConditionalGeneration(small()).eval()
    open_gates(model)
    return model


@pytest.fixture(scope="module")
def labelled(nano_processor) -> dict[str, torch.Tensor]:
    return batch_of(nano_processor, [(64, 128), (128, 64)])


@pytest.fixture(scope="module")
def batch(labelled) -> dict[str, torch.Tensor]:
    return {name: value for name, value in labelled.items() if name != "labels"}


@pytest.fixture(scope="module")
def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


@torch.no_grad()
def test_embeddings_in_place_of_tokens(model, batch, logits):
    """With the pictures beside them, or merged into them before; alone they give no tokens to return."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    beside = {**batch, "inputs_embeds": embeds}
    del beside["input_ids"]
    merged = model.model.embed(batch["input_ids"], embeds, model.get_image_features(**pictures_of(batch)))
    alone = {"inputs_embeds": merged, "attention_mask": batch["attention_mask"]}
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False)[:, logits.shape[1] :]
    for given in (beside, alone):
        assert_close(model(**given).logits, logits)
        for more in ({}, {"prefill_chunk_size": 100}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**given, max_new_tokens=5, do_sample=False, **more), expected)


@torch.no_grad()
def test_logits_of_some_positions(model, batch, logits):
    for kept, expected in ((3, logits[:, -3:]), (1, logits[:, -1:]), (torch.tensor([0, 5]), logits[:, [0, 5]])):
        assert_close(model(**batch, logits_to_keep=kept).logits, expected)


@torch.no_grad()
def test_positions_and_masks_of_the_caller_s_own(model, batch, logits):
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    length = logits.shape[1]
    future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, length, length).masked_fill(future, torch.finfo(torch.float32).min)
    for more in ({}, {"position_ids": torch.arange(length)[None]}, {"attention_mask": mask}):
        assert_close(model(**bare, **more).logits, logits)
    names = ("input_ids", "pixel_values", "image_sizes", "attention_mask")
    in_order = model(*(batch[name] for name in names), high_res_pixel_values=batch["high_res_pixel_values"])
    assert_close(in_order.logits, logits)


@torch.no_grad()
def test_a_vocabulary_of_another_size(model, batch, logits):
    other = copy.deepcopy(model)
    other.resize_token_embeddings(128)
    assert other.config.vocab_size == other.config.text_config.vocab_size == other.lm_head.out_features == 128
    assert_close(other(**batch).logits[..., :102], logits)
    assert model.config.vocab_size == 102
    assert "vocab_size" not in model.config.to_dict()


@torch.no_grad()
def test_weights_in_several_files_and_on_any_device(model, batch, logits, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_close(AutoModelForMultimodalLM.from_pretrained(tmp_path, device_map="auto")(**batch).logits, logits)
    parts = ("vision_tower", "multi_modal_projector", "image_newline", "language_model")
    for i, on_disk in enumerate((["vision_tower", "multi_modal_projector"], ["language_model"])):
        places = {f"model.{part}": "disk" if part in on_disk else "cpu" for part in parts} | {"lm_head": "cpu"}
        loaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path, device_map=places, offload_folder=tmp_path / f"disk{i}"
        )
        assert_close(loaded(**batch).logits, logits)


def test_the_pipeline_answers_a_chat_and_a_prompt(model, nano_processor):
    ask = pipeline("image-text-to-text", model=model, processor=nano_processor)
    image = picture(64, 128, 0)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]
    chat = ask(text=[{"role": "user", "content": content}], generate_kwargs={"max_new_tokens": 4, "do_sample": False})
    prompt = nano_processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = nano_processor(images=image, text=prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = nano_processor.decode(out, skip_special_tokens=True)
    assert chat[0]["generated_text"][-1]["content"] == expected
    plain = ask(images=image, text=prompt, generate_kwargs={"max_new_tokens": 4, "do_sample": False})
    assert plain[0]["generated_text"].endswith(expected)


@torch.no_grad()
def test_rows_with_other_numbers_of_pictures_are_repeated_with_them(model, nano_processor):
    images = [[picture(64, 128, 0), picture(128, 64, 1)], [picture(64, 64, 2)], []]
    texts = [f"<bos><user>{'<image>' * len(group)}What?<assistant>" for group in images]
    inputs = nano_processor(images=images, text=texts, padding=True, return_tensors="pt")
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    twice = model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(twice, greedy.repeat_interleave(2, 0))
    assert len(model.generate(**inputs, max_new_tokens=4, num_beams=2, num_return_sequences=2)) == 6


def test_adapters_everywhere_train_merge_save_and_load(model, labelled, batch, tmp_path):
    lora = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    adapted.gradient_checkpointing_enable({"use_reentrant": True})
    adapted.train()(**labelled, use_cache=False).loss.backward()
    assert not [n for n, weight in adapted.named_parameters() if weight.requires_grad and weight.grad is None]
    with torch.no_grad():
        expected = adapted.eval()(**batch).logits
        adapted.merge_and_unload().save_pretrained(tmp_path)
        merged = FilaForConditionalGeneration.from_pretrained(tmp_path)
        assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, model(**batch).logits, atol=1e-3)


@torch.no_grad()
def test_bfloat16_and_autocast(model, batch, logits):
    low = copy.deepcopy(model).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch).logits
    for found in (low(**batch).logits, mixed):
        assert found.dtype == torch.bfloat16
        assert (found - logits).abs().max() < 0.05 * logits.abs().max()
    assert low.generate(**batch, max_new_tokens=2).shape[1] == logits.shape[1] + 2
