"""Throws random calls at the public functions: `python -m tests.fuzz.operator [COUNT [SEED]]`.

Backends eager and native, all plans they have, gates, layouts, dtypes, autocast, sets of frozen inputs, `cvfm` and
`crop_resize`.
Every result and gradient is held to the definition in float64; every damaged call has to be refused with a ValueError.
Anything else is a failure. The seed is printed and makes a run repeatable.
"""

import random
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fila_kernels import crop_resize, cvfm, dispatch, reference, rounding
from fila_kernels.testing import DIFFERENTIABLE, Case, assert_close, expect_cvfm, gradients, in_double

BOXES = ("whole", "fractional", "overlapping", "border", "small")
LAYOUTS = ("dense", "permuted", "sliced")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float64)
WRONG: tuple[Any, ...] = (None, 1.0, "text", [1], torch.zeros(()), torch.zeros(1, 2, 3, 4, 5), torch.zeros(3, 1).int())


def draw_case(draw: random.Random) -> Case:
    height, width = draw.randrange(1, 12), draw.randrange(1, 12)
    boxes = draw.choice(BOXES if min(height, width) > 4 else ("border", "whole"))  # overlapping ones need room
    return Case(
        "fuzz", tiles=draw.choice((0, 1, 2, 5)), prefix=draw.randrange(3), grid=draw.randrange(1, 5),
        token_width=draw.randrange(1, 20), hidden_width=draw.randrange(1, 24), feature_width=draw.randrange(1, 20),
        images=draw.choice((1, 1, 2, 3)), height=height, width=width,
        boxes=boxes, layout=draw.choice(LAYOUTS), alpha=draw.choice((0.0, 0.7, -1.3, 0.01)),
    )  # fmt: skip


def other_memory(draw: random.Random, inputs: dict[str, Tensor]) -> None:
    """Maps in NCHW memory or of one image for all, weights with other strides."""
    kind = draw.randrange(4)
    if kind == 1:
        inputs["features"] = inputs["features"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif kind == 2:
        inputs["features"] = inputs["features"][:1].expand(inputs["features"].shape)
    for name in ("fc1_weight", "fc2_weight"):
        if draw.random() < 0.2:
            inputs[name] = inputs[name].t().contiguous().t()


def judge_cvfm(draw: random.Random, case: Case, inputs: dict[str, Tensor], settings: dict[str, Any]) -> None:
    wanted = tuple(draw.sample(DIFFERENTIABLE, draw.randrange(1, len(DIFFERENTIABLE) + 1)))
    gate, prefix = settings["gate"], case.prefix
    grad = torch.randn(inputs["tokens"].shape, dtype=torch.float64).to(inputs["tokens"].dtype)
    if draw.random() < 0.2:
        grad = grad[:, :1].expand(grad.shape)
    shared = {"gate": gate, "num_prefix_tokens": prefix}
    settings = {name: value for name, value in settings.items() if name != "gate"}
    expected = expect_cvfm(inputs, grad, wanted, **shared)
    dtype = inputs["fc1_weight"].dtype
    with torch.autocast("cpu", dtype, enabled=inputs["tokens"].dtype != dtype):
        found, found_grads = gradients(cvfm, inputs, grad, wanted, **shared, **settings)
        with torch.no_grad():
            plain = cvfm(**inputs, **shared, **settings)
    assert torch.equal(plain, found), "with a gradient the result is another"
    expected.check({"out": found} | found_grads)


def judge_crop_resize(case: Case, inputs: dict[str, Tensor], backend: str) -> None:
    sampling = {name: inputs[name] for name in ("features", "boxes", "image_index")}
    grad = torch.randn(case.tiles, case.grid, case.grid, case.feature_width).to(inputs["features"].dtype)

    def run(function: Any, arguments: dict[str, Tensor], grad: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        out, found = gradients(function, arguments, grad, ("features",), size=case.grid, **settings)
        return out, found["features"]

    wide = in_double(sampling)
    exact = run(reference.crop_resize, wide, grad.double())
    eager = run(reference.crop_resize, sampling, grad)
    found = run(crop_resize, sampling, grad, backend=backend)
    roundings = rounding.of_crop_resize(**wide, size=case.grid, dtype=grad.dtype, grad=grad.double())
    for name, got, want, same in zip(("out", "features"), found, exact, eager, strict=True):
        assert_close(name, got, want, same, roundings[name])


def refuse(draw: random.Random, inputs: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """One argument replaced by what nothing can be made of."""
    damaged: dict[str, Any] = inputs | settings
    name = draw.choice(list(damaged))
    wrong = [value for value in WRONG if not (value is None and name in ("plan", "backend"))]
    damaged[name] = draw.choice(wrong)
    try:
        cvfm(**damaged)
    except ValueError as error:
        if name in str(error) or isinstance(damaged[name], Tensor):
            return
        raise AssertionError(f"the refusal does not name {name}") from error
    raise AssertionError(f"{name} = {damaged[name]!r} was not refused")


def call(draw: random.Random) -> str:
    """One call, judged; returns what it was."""
    case, dtype = draw_case(draw), draw.choice(DTYPES)
    backend, plan = draw.choice(("eager", "native")), draw.choice((None, "sample_first", "project_first"))
    inputs = case.inputs(dtype, seed=draw.randrange(1 << 30))
    other_memory(draw, inputs)
    settings = {
        "backend": backend, "plan": plan, "gate": draw.choice(("product", "scale")), "recompute": draw.random() < 0.3,
    }  # fmt: skip
    kind = draw.random()
    if kind < 0.15:
        refuse(draw, inputs, settings | {"num_prefix_tokens": case.prefix})
        return "refused"
    if kind < 0.3:
        judge_crop_resize(case, inputs, backend)
        return f"crop_resize {backend}"
    autocast = dtype == torch.bfloat16 and draw.random() < 0.4
    if autocast:
        inputs["tokens"] = inputs["tokens"].float() + torch.rand_like(inputs["tokens"], dtype=torch.float32) / 256
    judge_cvfm(draw, case, inputs, settings)
    return f"cvfm {backend}{' autocast' if autocast else ''}"


def main(count: int = 10_000, seed: int | None = None) -> int:
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    assert dispatch.available("native")[0], dispatch.available("native")[1]
    print(f"operator: {count} calls, seed {seed}", flush=True)
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    for number in range(count):
        torch.manual_seed(seed + number)
        try:
            found[call(random.Random(seed + number))] += 1
        except Exception as error:
            raise AssertionError(f"call {number}, which alone is: 1 {seed + number}") from error
    print(f"operator: {dict(sorted(found.items()))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
