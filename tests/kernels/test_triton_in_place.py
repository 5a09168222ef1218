"""`cvfm_` by Triton kernels, interpreted: the last epilogue writes over the rows of tokens that it read."""

import pytest
import torch
from cases import Case, ids
from interpreter import ALIGNED, GUARD, MATRIX, UNALIGNED, guarded, guards  # noqa: F401
from test_in_place import check

from fila_kernels import CVFM, cvfm, cvfm_


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("case", MATRIX, ids=ids)
def test_values(case):
    check(case, torch.float32, "triton", plan="sample_first")


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("plan", ["project_first", "single_pass"])
@pytest.mark.parametrize(
    "case",
    [c for c in MATRIX if c.name in ("odd", "sliced", "permuted", "closed_gate", "aligned", "unaligned")],
    ids=ids,
)
def test_other_plans(case, plan):
    check(case, torch.float32, "triton", plan=plan, gate="scale")


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("plan", ["sample_first", "single_pass"])
def test_the_same_bits_as_out_of_place(plan):
    for case in (ALIGNED, UNALIGNED):
        inputs = {name: guarded(tensor) for name, tensor in case.inputs(torch.float16).items()}
        settings = {"num_prefix_tokens": case.prefix, "plan": plan, "backend": "triton"}
        expected = cvfm(**inputs, **settings)
        assert torch.equal(cvfm_(**inputs, **settings), expected)


@pytest.mark.parametrize("plan", ["sample_first", "single_pass"])
def test_no_result_is_allocated(guards, plan):  # noqa: F811
    inputs = Case("memory", tiles=2, images=1, hidden_width=10).inputs(torch.float32)
    size = inputs["tokens"].numel()
    for function, expected in ((cvfm, 1), (cvfm_, 0)):
        guards.storages.clear()
        function(**inputs, backend="triton", plan=plan)
        assert sum(len(storage) - 2 * GUARD == size for storage in guards.storages) == expected


def test_opcheck_and_one_graph():
    inputs = Case("ops", tiles=2, images=1).inputs(torch.float32)
    arguments = (*inputs.values(), 1, "product", "", "triton")
    torch.library.opcheck(
        torch.ops.fila_kernels.cvfm_forward_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
    module = CVFM(8, 6, 12, backend="triton").requires_grad_(False)
    module.alpha.fill_(0.5)
    arguments = inputs["tokens"], inputs["features"], inputs["boxes"], inputs["image_index"]
    expected = module(*arguments)
    with torch.no_grad():
        torch.compile(module, fullgraph=True, backend="aot_eager")(*arguments, inplace=True)
    assert torch.equal(inputs["tokens"], expected)
