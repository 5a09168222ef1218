"""Every way of differentiating is right or refused, whatever the mode: torch.func, forward mode, twice, compiled."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from fila_kernels import CVFM, crop_resize, cvfm, reference
from fila_kernels.testing import Case

CASE = Case("derivatives", tiles=2, grid=2, token_width=3, hidden_width=4, feature_width=2, height=3, width=4)
MODES = {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def functions(name):
    """A function of tokens and the same by the definition."""
    inputs = CASE.inputs()
    tokens = inputs.pop("tokens")
    sampling = {key: inputs[key] for key in ("features", "boxes", "image_index")}
    if name == "crop_resize":
        boxes, index = inputs["boxes"], inputs["image_index"]
        return tokens, *(
            lambda t, f=f: f(t[:, 1:].unflatten(1, (2, 2)), boxes, index, 2)
            for f in (crop_resize, reference.crop_resize)
        )
    if name == "module":
        module = CVFM(3, 2, 4, dtype=torch.float64).requires_grad_(False)
        module.alpha.fill_(0.5)
        parameters = {key.replace(".", "_"): value for key, value in module.named_parameters()}
        return (
            tokens,
            lambda t: module(t, *sampling.values()),
            lambda t: reference.cvfm(t, **sampling, **parameters),
        )
    gate = "scale" if name == "scale" else "product"
    settings = {"gate": gate, "recompute": name == "recompute", "backend": "eager" if name == "eager" else None}
    return tokens, lambda t: cvfm(t, **inputs, **settings), lambda t: reference.cvfm(t, **inputs, gate=gate)


def total(function):
    return lambda t: function(t).square().sum()


def dual_tangent(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def twice(function, x):
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum(), leaf)


RIGHT = {
    "grad": lambda f, x: grad(total(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](f(x))[0],
    "jacrev": lambda f, x: jacrev(f)(x),
    "vmap": lambda f, x: vmap(f, in_dims=1, out_dims=2)(torch.stack([x, 2 * x, 3 * x], 1)),
    "vmap of grad": lambda f, x: vmap(grad(total(f)))(torch.stack([x, 2 * x])),
    "grad of vmap": lambda f, x: grad(total(vmap(f)))(torch.stack([x, 2 * x])),
}
REFUSED = {
    "jvp": (lambda f, x: jvp(f, (x,), (torch.ones_like(x),)), "forward-mode differentiation"),
    "jacfwd": (lambda f, x: jacfwd(f)(x), "forward-mode differentiation"),
    "jvp of grad": (lambda f, x: jvp(grad(total(f)), (x,), (torch.ones_like(x),)), "forward-mode differentiation"),
    "grad of grad": (lambda f, x: grad(lambda y: grad(total(f))(y).square().sum())(x), "double backward"),
}
NAMES = ("cvfm", "scale", "recompute", "eager", "module", "crop_resize")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transform", RIGHT)
@pytest.mark.parametrize("name", NAMES)
def test_reverse_mode_and_vmap_are_right(name, transform, mode):
    tokens, function, definition = functions(name)
    with MODES[mode]():
        torch.testing.assert_close(RIGHT[transform](function, tokens), RIGHT[transform](definition, tokens))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_derivative_is_refused(name, transform, mode):
    tokens, function, definition = functions(name)
    apply, message = REFUSED[transform]
    with MODES[mode](), pytest.raises(RuntimeError, match=f"{message}.*not implemented.*'reference'"):
        apply(function, tokens)
    apply(definition, tokens)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["grad", "no_grad"])  # torch itself drops tangents under inference_mode
def test_a_dual_tensor_is_refused(mode, compiled):
    tokens, function, definition = functions("cvfm")
    torch._dynamo.reset()
    function = torch.compile(function, backend="aot_eager") if compiled else function
    with MODES[mode]():
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            dual_tangent(function, tokens)
        assert dual_tangent(definition, tokens).any()


# The debugging backend "eager" runs a traced function's backward pass without a graph of it; the words are torch's.
@pytest.mark.parametrize(
    "backend, message",
    [(None, "double backward"), ("eager", "does not require grad"), ("aot_eager", "double backward")],
)
def test_double_backward_is_refused(backend, message):
    tokens, function, definition = functions("cvfm")
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=message):
        twice(function if backend is None else torch.compile(function, backend=backend), tokens)
    twice(definition, tokens)


def test_the_operators_themselves_refuse():
    """Whoever calls them beneath the public functions loses no derivative in silence."""
    tensors = list(CASE.inputs().values())
    operator = torch.ops.fila_kernels.cvfm_forward
    tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="not implemented"):
        operator(*tensors, 1, "product", "", False, False)[0].sum().backward()
    with torch.no_grad(), pytest.raises(RuntimeError, match="forward-mode"):
        dual_tangent(lambda t: operator(t, *tensors[1:], 1, "product", "", False, False)[0], tensors[0].detach())


def test_torch_func_through_compile():
    tokens, function, definition = functions("cvfm")
    torch._dynamo.reset()
    expected = grad(total(definition))(tokens)
    torch.testing.assert_close(grad(total(torch.compile(function, backend="aot_eager")))(tokens), expected)
    both = torch.stack([tokens, 2 * tokens])
    torch.testing.assert_close(torch.compile(vmap(function), backend="eager")(both), vmap(definition)(both))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["compiled", "of a compiled function"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_torch_func_of_a_graph_is_right_or_refused(transform, inside, fullgraph):
    """Torch may refuse one graph of a transform: its tracing of functions with a `setup_context` ends there."""
    tokens, function, definition = functions("cvfm")
    apply = REFUSED["jvp"][0] if transform == "jvp" else RIGHT[transform]
    torch._dynamo.reset()

    def compiled(f):
        return torch.compile(f, backend="aot_eager", fullgraph=fullgraph)

    def call():
        return apply(compiled(function), tokens) if inside else compiled(lambda x: apply(function, x))(tokens)

    if transform == "jvp":
        with pytest.raises(RuntimeError, match=None if fullgraph else "forward-mode differentiation"):
            call()
        return
    try:
        found = call()
    except torch._dynamo.exc.Unsupported:
        assert fullgraph
    else:
        torch.testing.assert_close(found, apply(definition, tokens))
