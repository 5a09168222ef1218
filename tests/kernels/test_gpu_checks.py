"""The checks of test_gpu.py on a CPU, where they find the `torch` backend right, and a wrong one wrong."""

import pytest
import torch
from cases import Case
from gpu_checks import aligned_slice, channels_first, check, check_features_grad, check_in_place, unchanged

from fila_kernels import cvfm, cvfm_

CASE = Case("small", prefix=2, token_width=16, hidden_width=24, feature_width=8, boxes="overlapping")
CHECKS = {check: cvfm, check_in_place: cvfm_, check_features_grad: cvfm}


@pytest.mark.parametrize("change", [unchanged, channels_first, aligned_slice])
@pytest.mark.parametrize("checked", CHECKS)
def test_the_torch_backend_is_right(checked, change):
    for plan in ("sample_first", "project_first"):
        checked(CASE, "torch", torch.float32, device="cpu", change=change, plan=plan)
    checked(CASE, "torch", torch.bfloat16, device="cpu", change=change)


@pytest.mark.parametrize("name", ["features", "fc2_bias"])
@pytest.mark.parametrize("checked", CHECKS)
def test_a_wrong_one_is_found(checked, name):
    def wrong(**arguments):
        return CHECKS[checked](**(arguments | {name: arguments[name] * 1.01}))

    with pytest.raises(AssertionError, match="above"):
        checked(CASE, "torch", torch.float32, device="cpu", function=wrong)


def test_what_is_written_beside_the_tokens_is_found():
    def careless(tokens, **arguments):
        cvfm_(tokens, **arguments)
        tokens.as_strided((1,), (1,), 0).zero_()
        return tokens

    with pytest.raises(AssertionError, match="beside the tokens"):
        check_in_place(CASE, "torch", torch.float32, device="cpu", change=aligned_slice, function=careless)
