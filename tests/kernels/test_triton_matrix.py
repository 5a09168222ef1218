"""Layouts, images, plans and frozen inputs through interpreted Triton kernels: every pair of them."""

import pytest
import torch
from gpu_checks import cell_id, check_cell, matrix, one_image_or_several
from interpreter import guards  # noqa: F401

from fila_kernels.testing import covering_pairs

# float16 takes bfloat16's path, which cannot be interpreted; float32's projection is another product.
FACTORS = matrix({"float16": torch.float16, "autocast": torch.float16, "float32": torch.float32})


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("cell", [*covering_pairs(FACTORS), *one_image_or_several(FACTORS["dtype"][0])], ids=cell_id)
def test_every_pair(cell):
    check_cell(cell, "triton")
