"""`cvfm_`: the fused tokens written over the tokens, on the `torch` backend; Triton's is in test_triton_in_place.py."""

import pytest
import torch
from cases import CASES, Case, assert_close, ids, options

from fila_kernels import CVFM, cvfm, cvfm_, reference

OPS = torch.ops.fila_kernels


def check(case: Case, dtype: torch.dtype, backend: str, **settings) -> None:
    """What is not tokens' own memory keeps what it held, here the NaN around a sliced or permuted layout."""
    inputs = case.inputs(dtype)
    exact_inputs = {n: t.double() if t.is_floating_point() and n != "boxes" else t for n, t in inputs.items()}
    common = {**options(case), "gate": settings.pop("gate", "product")}
    exact = reference.cvfm(**exact_inputs, **common)
    eager = reference.cvfm(**inputs, **common)
    tokens = inputs["tokens"]
    before, whole = tokens.clone(), tokens._base if tokens._base is not None else tokens
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside.as_strided(tokens.shape, tokens.stride(), tokens.storage_offset()).fill_(False)
    around, version = whole[outside].clone(), tokens._version
    with torch.no_grad():
        found = cvfm_(**inputs, backend=backend, **common, **settings)
    assert found is tokens
    assert tokens._version > version, "autograd would not see that saved tokens have changed"
    assert_close("out", tokens, exact, eager)
    assert torch.equal(tokens[:, : case.prefix], before[:, : case.prefix])
    assert torch.equal(whole[outside].nan_to_num(), around.nan_to_num())


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize(("plan", "gate"), [("sample_first", "product"), ("project_first", "scale"), (None, "product")])
def test_values(case, plan, gate):
    check(case, torch.float64, "torch", plan=plan, gate=gate)
    check(case, torch.float32, "torch", plan=plan, gate=gate)


def test_bfloat16_and_the_definition():
    for name in ("plain", "sliced", "closed_gate"):
        case = next(case for case in CASES if case.name == name)
        check(case, torch.bfloat16, "torch")
        check(case, torch.float32, "reference")


@pytest.mark.parametrize("tiles", [0, 3])
def test_opcheck(tiles):
    arguments = tuple(Case("opcheck", tiles=tiles).inputs(torch.float32).values())
    torch.library.opcheck(OPS.cvfm_forward_.default, (*arguments, 1, "product", ""))


@pytest.mark.parametrize("name", ["tokens", "features", "fc2_weight", "alpha"])
def test_gradients_are_refused_where_they_are_recorded(name):
    inputs = Case("grad").inputs(torch.float32)
    before = inputs["tokens"].clone()
    inputs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"cvfm_: {name} requires a gradient.*torch\.no_grad\(\), or call cvfm"):
        cvfm_(**inputs)
    assert torch.equal(inputs["tokens"], before)
    with torch.no_grad():
        assert not torch.equal(cvfm_(**inputs), before)


def test_memory_that_overlaps_is_refused():
    inputs = Case("overlap", tiles=2, images=1, height=4, width=4, feature_width=8).inputs(torch.float32)
    one = inputs["tokens"][:1]
    for tokens in (one.expand(2, -1, -1), torch.zeros(17 * 8 + 8).as_strided((2, 17, 8), (8, 8, 1))):
        with pytest.raises(ValueError, match="tokens: expected elements that share no memory, got strides"):
            cvfm_(**(inputs | {"tokens": tokens}))
    memory = torch.randn(2 * 17 * 8 + 128)
    tokens = memory[: 2 * 17 * 8].view(2, 17, 8)
    with pytest.raises(ValueError, match="features: expected no memory in common with tokens"):
        cvfm_(**(inputs | {"tokens": tokens, "features": memory[-129:-1].view(1, 4, 4, 8)}))
    beside = inputs | {"tokens": tokens, "features": memory[-128:].view(1, 4, 4, 8)}
    expected = cvfm(**beside)
    torch.testing.assert_close(cvfm_(**beside), expected)


def test_autocast_casts_nothing_as_for_any_in_place_operation():
    inputs = Case("autocast").inputs(torch.float32)
    expected = cvfm(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cvfm_(**inputs).dtype == torch.float32
    torch.testing.assert_close(inputs["tokens"], expected)


@pytest.mark.slow
def test_compiles_into_one_graph_with_dynamic_shapes():
    @torch.compile(fullgraph=True, dynamic=True)
    def twice(tokens, *rest):
        cvfm_(tokens, *rest)
        return cvfm_(tokens, *rest) + 1

    for tiles in (3, 2):
        inputs = tuple(Case("compile", tiles=tiles).inputs(torch.float32).values())
        expected = cvfm(cvfm(*inputs), *inputs[1:])
        with torch.no_grad():
            found = twice(*inputs)
        torch.testing.assert_close(found, expected + 1)
        torch.testing.assert_close(inputs[0], expected)


@pytest.mark.parametrize("replaced", [False, True])
def test_module(replaced):
    module = CVFM(8, 6, 12).requires_grad_(False)
    module.alpha.fill_(0.5)
    if replaced:
        module.fc1.register_forward_hook(lambda *_: None)
    inputs = Case("module").inputs(torch.float32)
    arguments = inputs["tokens"], inputs["features"], inputs["boxes"], inputs["image_index"]
    expected = module(*arguments)
    assert module(*arguments, inplace=True) is inputs["tokens"]
    torch.testing.assert_close(inputs["tokens"], expected)


def test_no_second_tensor_of_tokens_is_made():
    """The largest allocation of a call is a chunk's."""
    case = Case("memory", tiles=64, grid=16, token_width=256, hidden_width=256, feature_width=4)
    inputs = case.inputs(torch.float32)
    sizes = {}
    for function in (cvfm, cvfm_):
        with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
            function(**inputs)
        sizes[function] = max(event.nbytes() for event in profile.profiler.kineto_results.events())
    whole = inputs["tokens"].numel() * 4
    assert sizes[cvfm] >= whole
    assert sizes[cvfm_] < whole / 2
