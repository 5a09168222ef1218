"""`torch.export` of the tower as transformers' users do it, its pictures' sizes given as a list of constants.

`fila.aot` exports the encoder for C++ another way; tests/model/test_encoder_aot.py tests it.
"""

import pytest
import torch
from torch.testing import assert_close

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
