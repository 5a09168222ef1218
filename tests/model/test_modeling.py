"""The whole model: saving, loading, generation in mixed batches, and the size of the paper's preset."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from fila import FilaConfig, FilaForConditionalGeneration, FilaModel, FilaVisionModel, preset

QUESTION = "What is the total?"


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def pictures_of(inputs) -> dict:
    """The image tensors of a processor's result."""
    return {name: inputs[name] for name in ("pixel_values", "image_sizes", "high_res_pixel_values")}


def ask(processor, pictures: list[Image.Image | None]) -> list[str]:
    return [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * (p is not None) + [{"type": "text", "text": QUESTION}]}],
            add_generation_prompt=True,
        )
        for p in pictures
    ]


@torch.no_grad()
def test_one_batch_of_all_canvases_and_a_question_without_a_picture(nano, nano_processor):
    sizes = [(500, 500), (128, 256), (256, 128), (100, 350), (400, 120)]
    pictures = [picture(h, w, i) for i, (h, w) in enumerate(sizes)]
    pictures.insert(2, None)
    geometry = nano.config.vision_config.geometry()
    assert len({geometry.layout(h, w).canvas for h, w in sizes}) == 5

    def answers(chosen: list[Image.Image | None]) -> torch.Tensor:
        images = [p for p in chosen if p is not None] or None
        inputs = nano_processor(images=images, text=ask(nano_processor, chosen), padding=True, return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        return nano.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, start:]

    together = answers(pictures)
    for i, one in enumerate(pictures):
        assert torch.equal(together[i], answers([one])[0]), f"picture {i} answers differently in company"
    assert len({tuple(row.tolist()) for row in together}) > 1, "the pictures make no difference: nothing was tested"


@torch.no_grad()
def test_a_picture_is_encoded_once_a_generation(nano, nano_processor):
    """Before the first token; every version of transformers drops or keeps the image tensors in its own way."""
    one = picture(128, 256, 0)
    inputs = nano_processor(images=one, text=ask(nano_processor, [one])[0], return_tensors="pt")
    calls = []
    handle = nano.model.vision_tower.register_forward_hook(lambda module, args, out: calls.append(len(args)))
    try:
        out = nano.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    finally:
        handle.remove()
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    assert len(calls) == 1


@torch.no_grad()
def test_the_image_token_is_never_generated(nano, nano_processor):
    inputs = nano_processor(
        images=picture(128, 256, 0), text=ask(nano_processor, [picture(128, 256, 0)])[0], return_tensors="pt"
    )
    image = nano.config.image_token_id
    bias = torch.zeros(nano.lm_head.out_features)
    bias[image] = 1e4
    handle = nano.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    try:
        out = nano.generate(**inputs, max_new_tokens=4, do_sample=False)
    finally:
        handle.remove()
    assert image not in out[0, inputs["input_ids"].shape[1] :]


def test_saved_and_loaded_through_the_auto_classes(nano, nano_processor, tmp_path):
    nano.save_pretrained(tmp_path)
    nano_processor.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, FilaConfig)
    assert config.to_dict()["vision_config"] == nano.config.to_dict()["vision_config"]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(model, FilaForConditionalGeneration)
    assert model.generation_config.suppress_tokens == [config.image_token_id]
    for (name, a), (_, b) in zip(nano.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, FilaModel)
    assert isinstance(base.vision_tower, FilaVisionModel)
    assert torch.equal(base.vision_tower.fusion[0].alpha, nano.model.vision_tower.fusion[0].alpha)
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = picture(300, 200, 0)
    for a, b in zip(
        processor(images=image, text="<image>a", return_tensors="pt").values(),
        nano_processor(images=image, text="<image>a", return_tensors="pt").values(),
        strict=True,
    ):
        assert torch.equal(a, b)


@torch.no_grad()
def test_features_have_llava_next_order_and_count(nano, nano_processor):
    """Global view first, then unpadded rows with a newline each; an image per tensor."""
    images = [picture(500, 400, 0), picture(128, 256, 1)]
    inputs = nano_processor(images=images, text=["<image>"] * 2, padding=True, return_tensors="pt")
    out = nano.get_image_features(**pictures_of(inputs))
    model, geometry = nano.model, nano.config.vision_config.geometry()
    layouts, n = [geometry.layout(p.height, p.width) for p in images], geometry.grid
    assert [len(f) for f in out.pooler_output] == [layout.num_tokens for layout in layouts]
    views = model.multi_modal_projector(out.last_hidden_state[:, 1:]).split([layout.num_views for layout in layouts])
    torch.testing.assert_close(out.pooler_output[1][: n * n], views[1][0])
    rows = out.pooler_output[1][n * n :].view(n, 2 * n + 1, -1)
    torch.testing.assert_close(rows[:, 2 * n], model.image_newline.expand(n, -1))
    torch.testing.assert_close(rows[:, n : 2 * n], views[1][2].view(n, n, -1))


def test_training_reaches_every_parameter(nano_processor):
    model = FilaForConditionalGeneration(preset("fila-nano"))
    for fusion in model.model.vision_tower.fusion:
        fusion.alpha.data.fill_(0.1)
    text = "<bos><user><image>" + QUESTION + "<assistant>42.10<eos>"
    inputs = nano_processor(images=picture(256, 256, 0), text=text, return_tensors="pt")
    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 4, -100)).loss
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_the_paper_preset_on_the_meta_device():
    with torch.device("meta"):
        model = FilaForConditionalGeneration(preset("fila-llama3-8b"))
    tower = model.model.vision_tower
    assert len(tower.vit.layers) == 23
    assert tower.config.fusion_layers == [5, 11, 17, 22]
    count = {
        "vit": sum(p.numel() for p in tower.vit.parameters()),
        "convnext": sum(p.numel() for p in tower.convnext.parameters()),
        "fusion": sum(p.numel() for p in tower.fusion.parameters()),
        "llm": sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel(),
    }
    assert count["llm"] == 8_030_261_248  # Meta-Llama-3-8B's own count
    assert count["fusion"] == sum(1024 * (1024 + c) + 1024 + 1024 * 1024 + 1024 + 1 for c in (192, 384, 768, 1536))
    assert 290e6 < count["vit"] < 292e6
    assert 196e6 < count["convnext"] < 197e6


def test_wrong_placeholder_count_is_an_error(nano, nano_processor):
    inputs = nano_processor(images=picture(128, 256, 0), text="<image>a", return_tensors="pt")
    with pytest.raises(ValueError, match="do not match"):
        nano(**{**inputs, "input_ids": inputs["input_ids"][:, 1:], "attention_mask": inputs["attention_mask"][:, 1:]})


def test_a_layer_other_than_the_configured_one_is_refused_in_any_call(nano, nano_processor):
    inputs = nano_processor(images=picture(128, 256, 0), text="<image>a", return_tensors="pt")
    for call in (
        lambda: nano.get_image_features(**pictures_of(inputs), vision_feature_layer=1),
        lambda: nano(**inputs, vision_feature_layer=1),
        lambda: nano.get_image_features(*pictures_of(inputs).values()),  # the raster in upstream's third place
    ):
        with pytest.raises(ValueError, match="vision_feature_layer cannot be changed for one call"):
            call()


def test_fields_owned_by_the_vision_config_are_not_given_twice():
    with pytest.raises(ValueError, match="image_grid_pinpoints belongs to vision_config"):
        FilaConfig(image_grid_pinpoints=[[336, 336]])
    with pytest.raises(ValueError, match="vision_feature_layer belongs to vision_config"):
        FilaConfig(vision_feature_layer=-1)
    with pytest.raises(ValueError, match="fila-nano"):
        preset("fila-micro")
