"""The contract of transformers: outputs, attention, signatures and classes by name, as its own models have them."""

import inspect
import shutil
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from fila import FilaConfig, FilaForConditionalGeneration, FilaModel, preset
from fila.checkpoints.load import load
from tests.model.conftest import open_gates
from tests.model.test_modeling import ask, picture, pictures_of
from tests.model.test_vision import nano_vision, pictures

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


@pytest.fixture(scope="module")
def inputs(nano_processor):
    images = [picture(128, 256, 0), picture(256, 128, 1), picture(128, 256, 2)]  # two canvases, out of order
    return nano_processor(images=images, text=ask(nano_processor, images), padding=True, return_tensors="pt")


def fresh(**fields) -> FilaForConditionalGeneration:
    config = preset("fila-nano")
    for name, value in fields.items():
        setattr(config, name, value)
    model = FilaForConditionalGeneration(config)
    open_gates(model)
    return model


@torch.no_grad()
def test_the_cache_is_returned_only_where_it_is_asked_for(inputs):
    model = fresh().eval()
    assert model(**inputs).past_key_values is not None
    assert model(**inputs, use_cache=False).past_key_values is None
    for config in (model.config, model.config.text_config):
        config.use_cache = False
        assert model(**inputs).past_key_values is None
        assert model.model(**inputs).past_key_values is None
        assert model(**inputs, use_cache=True).past_key_values is not None
        config.use_cache = True


@torch.no_grad()
def test_return_dict_is_honoured_by_every_call(nano, inputs):
    calls = {
        "model": lambda **k: nano(**inputs, **k),
        "base": lambda **k: nano.model(**inputs, **k),
        "features": lambda **k: nano.get_image_features(**pictures_of(inputs), **k),
        "tower": lambda **k: nano.model.vision_tower(**pictures_of(inputs), **k),
    }
    for name, call in calls.items():
        named = call()
        plain = call(return_dict=False)
        assert isinstance(plain, tuple), name
        assert_close(plain[0], named[0])
        nano.config.return_dict = nano.config.vision_config.return_dict = False
        try:
            assert isinstance(call(), tuple), name
            assert not isinstance(call(return_dict=True), tuple), name
        finally:
            nano.config.return_dict = nano.config.vision_config.return_dict = True


@torch.no_grad()
def test_hidden_states_and_attentions_by_argument_and_by_configuration(inputs):
    model = fresh()
    model.set_attn_implementation("eager")
    model.eval()
    asked = model(**inputs, output_hidden_states=True, output_attentions=True)
    model.config.output_hidden_states = True
    model.config.output_attentions = True
    configured = model(**inputs)
    layers, length = model.config.text_config.num_hidden_layers, inputs["input_ids"].shape[1]
    for out in (asked, configured):
        assert [tuple(x.shape[:2]) for x in out.hidden_states] == [(3, length)] * (layers + 1)
        assert [tuple(x.shape[2:]) for x in out.attentions] == [(length, length)] * layers
    assert model(**inputs, output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_image_hidden_states_are_what_took_the_placeholders_places(nano, inputs):
    out = nano(**inputs, output_hidden_states=True)
    image = nano.config.image_token_id
    newer = "image_outputs" in out
    found = torch.cat(list(out.image_outputs.pooler_output)) if newer else out.image_hidden_states
    assert torch.equal(found, out.hidden_states[0][inputs["input_ids"] == image])
    without = nano(input_ids=inputs["input_ids"][:, -5:])
    assert getattr(without, "image_outputs" if newer else "image_hidden_states") is None


@torch.no_grad()
def test_the_tower_s_states_are_in_the_pictures_order():
    """Pictures of one canvas are encoded together; what is recorded on the way comes back picture by picture."""
    model = nano_vision()
    model.set_attn_implementation("eager")
    for fusion in model.fusion:
        fusion.alpha.fill_(0.5)
    sizes = [(64, 128), (128, 64), (64, 128)]
    batch = pictures(model, sizes)
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    views = [model.config.geometry().layout(*size).num_views for size in sizes]
    depth = model.config.num_vit_layers
    assert (len(out.hidden_states), len(out.attentions)) == (depth + 1, depth)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    for i in range(len(sizes)):
        alone = model(
            **{name: value[i : i + 1] for name, value in batch.items()},
            output_hidden_states=True,
            output_attentions=True,
        )
        for field in ("hidden_states", "attentions"):
            for together, single in zip(out[field], alone[field], strict=True):
                assert_close(together.split(views)[i], single, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_single_layers_of_the_tower_by_number():
    model = nano_vision()
    batch = pictures(model, [(64, 128), (128, 64), (64, 128)])
    every = model(**batch, output_hidden_states=True).hidden_states
    some = model(**batch, output_hidden_states=[1, 3]).hidden_states
    assert [i for i, state in enumerate(some) if state is not None] == [1, 3]
    assert torch.equal(some[3], every[4])
    assert model(**batch).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == len(every)


@torch.no_grad()
def test_shifted_labels_are_what_the_loss_is_of(nano, inputs):
    labels = inputs["input_ids"].clone()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    plain = nano(**inputs, labels=labels).loss
    assert_close(nano(**inputs, labels=torch.zeros_like(labels), shift_labels=shifted).loss, plain)
    assert_close(nano(**inputs, shift_labels=shifted).loss, plain)
    halved = nano(**inputs, labels=labels, num_items_in_batch=2 * (labels[:, 1:].numel())).loss
    assert_close(halved, plain / 2)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(FilaModel, LlavaNextModel), (FilaForConditionalGeneration, LlavaNextForConditionalGeneration)],
)
def test_arguments_stand_where_llava_next_has_them(ours, theirs):
    for name in ("forward", "get_image_features"):
        wanted = [p for p in inspect.signature(getattr(theirs, name)).parameters if p != "kwargs"]
        have = [p for p in inspect.signature(getattr(ours, name)).parameters if p != "kwargs"]
        wanted = [p for p in wanted if p != "output_hidden_states"]  # 5.17 names it, later versions have it in kwargs
        wanted = ["past_key_values" if p == "cache" else p for p in wanted]  # newer versions' name
        own = ["high_res_pixel_values"] if name != "forward" else ["high_res_pixel_values", "cache"]
        if name == "forward" and "mm_encoder_outputs" not in wanted:
            own = ["mm_encoder_outputs", *own]
        assert have == wanted + own


def test_pictures_twice_are_an_error(nano, inputs):
    with pytest.raises(ValueError, match="got both"):
        nano(**inputs, mm_encoder_outputs={"image": nano.get_image_features(**pictures_of(inputs))})
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        nano()


def by_part(model: FilaForConditionalGeneration) -> list[str]:
    config = model.config
    parts = (config, config.text_config, config.vision_config, config.vision_config.vit_config)
    return [part._attn_implementation for part in parts]


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_attention_implementation_loads_into_every_part(checkpoint, implementation, auto):
    model = auto.from_pretrained(checkpoint, attn_implementation=implementation)
    assert isinstance(model, FilaForConditionalGeneration)
    assert set(by_part(model)) == {implementation}


@torch.no_grad()
def test_setting_the_attention_reaches_the_towers_every_time(inputs):
    model = fresh().eval()
    seen = inputs["attention_mask"].bool()  # what padding says differs between the implementations
    expected = model(**inputs).logits[seen]
    for implementation in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert set(by_part(model)) == {implementation}
        assert_close(model(**inputs).logits[seen], expected, rtol=1e-4, atol=1e-4)
    assert len(model.get_image_features(**pictures_of(inputs), output_attentions=True).attentions) == 6


def test_setting_the_attention_of_one_part_leaves_the_others():
    model = fresh()
    model.set_attn_implementation({"vision_config": "eager"})
    assert by_part(model) == ["sdpa", "sdpa", "eager", "eager"]
    model.set_attn_implementation({"text_config": "eager"})
    assert by_part(model) == ["sdpa", "eager", "eager", "eager"]
    model.set_attn_implementation({"vision_config": "sdpa"})
    assert by_part(model) == ["sdpa", "eager", "sdpa", "sdpa"]
    with pytest.raises(ValueError, match="vit"):
        model.set_attn_implementation({"vit": "eager"})
    with pytest.raises(ValueError, match="vit"):
        FilaConfig(attn_implementation={"vit": "eager"})


REMOTE = """
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
assert "fila" not in sys.modules
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__ == "fila.modeling", type(model)
assert type(AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__ == "FilaProcessor"
model.save_pretrained(sys.argv[2])
"""


def test_a_saved_folder_names_its_classes_for_those_who_have_not_imported_them(checkpoint, tmp_path, root, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", str(root))
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-c", REMOTE, str(checkpoint), str(again)], check=True, cwd=tmp_path)
    python = {path.name: path.read_text() for path in again.glob("*.py")}
    assert set(python) == {"fila_auto.py"}, "the package's own source was copied"
    assert "from fila import" in python["fila_auto.py"]


def test_our_own_loader_reads_no_code_from_a_folder(checkpoint, tmp_path):
    """A folder's Python is for transformers' `trust_remote_code`; here it may say what it likes."""
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "fila_auto.py").write_text("raise SystemExit('a checkpoint ran code')")
    model, _ = load(folder)
    assert isinstance(model, FilaForConditionalGeneration)
