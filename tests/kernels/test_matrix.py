"""Layouts, images, plans and frozen inputs through the CPU's backends: every pair of them."""

import itertools

import pytest
import torch
from gpu_checks import PLANS, cell_id, check_cell, matrix, one_image_or_several

from fila_kernels.testing import covering_pairs

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float32", "float64")}
FACTORS = matrix(DTYPES | {"autocast": torch.bfloat16}, [plan for plan in PLANS if plan != "single_pass"])


@pytest.mark.parametrize("cell", [*covering_pairs(FACTORS), *one_image_or_several(FACTORS["dtype"][0])], ids=cell_id)
def test_every_pair(cell, backend):
    check_cell(cell, backend)


def test_covering_pairs_covers_them_with_few():
    found = covering_pairs(FACTORS)
    for (one, ones), (other, others) in itertools.combinations(FACTORS.items(), 2):
        assert {(cell[one], cell[other]) for cell in found} == set(itertools.product(ones, others))
    assert len(found) <= 2 * 6 * 5  # the two longest factors alone take 30
