"""`torch.export` of the tower and of the whole model as transformers' users do it, sizes given as lists of constants.

`fila.aot` exports the encoder for C++ another way; tests/model/test_encoder_aot.py tests it.
"""

import pytest
import torch
from torch.testing import assert_close

from fila import FilaForConditionalGeneration
from tests.model.conftest import open_gates
from tests.model.test_sharding import batch_of, small
from tests.model.test_vision import nano_vision, pictures


@pytest.mark.parametrize("sizes", [[(128, 128)], [(64, 128), (128, 64), (60, 120)]])
@pytest.mark.parametrize("fusion", ["deep", "none"])
@torch.no_grad()
def test_the_tower_exports_with_sizes_in_a_list(fusion, sizes):
    model = nano_vision(fusion=fusion)
    for module in model.fusion:
        module.alpha.fill_(0.5)
    inputs = {**pictures(model, sizes), "image_sizes": [list(size) for size in sizes]}
    if fusion == "none":
        inputs.pop("high_res_pixel_values")
    program = torch.export.export(model, (), inputs, strict=False).module()
    fresh = {name: torch.randn_like(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    assert_close(program(**fresh)["last_hidden_state"], model(**fresh).last_hidden_state)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = FilaForConditionalGeneration(small()).eval()
    open_gates(model)
    return model


def program(model, inputs: dict, **shapes):
    """The exported model; `shapes` names the free dimensions of some inputs."""
    free = {name: shapes.get(name) for name in inputs}
    if "image_sizes" in inputs:
        free["image_sizes"] = [[None, None]] * len(inputs["image_sizes"])
    return torch.export.export(model, (), inputs, strict=False, dynamic_shapes=free).module()


@torch.no_grad()
def test_the_whole_model_exports_with_a_text_of_free_length(model, nano_processor):
    batch = {**batch_of(nano_processor, [(64, 128), (128, 64)]), "use_cache": False}
    batch["image_sizes"] = batch["image_sizes"].tolist()
    length = torch.export.Dim("length", min=2, max=1000)
    exported = program(model, batch, input_ids={1: length}, attention_mask={1: length}, labels={1: length})
    longer = {
        name: torch.cat([batch[name], batch[name][:, -3:]], 1) for name in ("input_ids", "attention_mask", "labels")
    }
    for given in (batch, {**batch, **longer, "pixel_values": torch.randn_like(batch["pixel_values"])}):
        found, expected = exported(**given), model(**given)
        assert_close(found["logits"], expected.logits)
        assert_close(found["loss"], expected.loss)


@torch.no_grad()
def test_the_whole_model_exports_for_any_number_of_texts(model):
    def texts(number: int, length: int) -> dict:
        ids = torch.randint(5, 90, (number, length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    both = {0: torch.export.Dim("number", min=1, max=64), 1: torch.export.Dim("length", min=2, max=1000)}
    exported = program(model, texts(2, 9), input_ids=both, attention_mask=both)
    other = texts(5, 21)
    assert_close(exported(**other)["logits"], model(**other).logits)


@torch.no_grad()
def test_sizes_that_export_cannot_know_are_refused_by_name():
    tower = nano_vision()
    with pytest.raises(ValueError, match="image_sizes as a list of numbers"):
        torch.export.export(tower, (), pictures(tower, [(64, 128)]), strict=False)
