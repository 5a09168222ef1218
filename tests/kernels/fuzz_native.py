"""Throws mutated arguments at the native operators: `python tests/kernels/fuzz_native.py COUNT SEED`.

Every call must return what the definition says, or raise ValueError (our refusal) or RuntimeError (torch's own, for
arguments of no call at all). Anything else is a failure. A crash ends the process, so the tests run the fuzz in a
process of its own. Values are compared where inputs are small and finite; others have tests of their own. Prints how
many calls ran, how many were refused, and how many were compared.
"""

import math
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fila_kernels import reference, rounding
from fila_kernels.backends.native import library
from fila_kernels.testing import ARGUMENTS, assert_close, error_of

NUMBERS = (0, 1, 2, 3, 5, -1, 7, 2**24, 2**31, 2**62, -(2**63), 2**63 - 1)
VALUES = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e9, -7.0, 0.0, 1e-30)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int32, torch.int64, torch.bool)
FUZZED = tuple(name for name in library.OPERATORS if name != "build_info")
# Sizes of numbers that torch would have to allocate; refusing those is the allocator's business.
LARGEST_RESULT = 2**26
LARGEST_JUDGED = 2**14
TAMEST = 16.0  # the largest value of inputs that are judged
SAMPLED = ("features", "boxes", "image_index")


def other_tensor(chance: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with one thing changed: shape, stride, dtype, values."""
    kind = chance.randrange(12)
    dims = tensor.dim()
    if tensor.is_meta or tensor.numel() > LARGEST_RESULT:
        return tensor  # changed enough; a copy of it would not fit
    if kind == 0:
        return tensor.to(chance.choice(DTYPES))
    if kind == 1 and dims:
        axis = chance.randrange(dims)
        return tensor.narrow(axis, 0, chance.randrange(tensor.shape[axis] + 1))
    if kind == 2 and dims:
        return tensor.repeat_interleave(2, dim=chance.randrange(dims))
    if kind == 3 and dims > 1:
        return tensor.transpose(*chance.sample(range(dims), 2))
    if kind == 4:
        return tensor.unsqueeze(chance.randrange(dims + 1))
    if kind == 5 and dims:
        return tensor.select(chance.randrange(dims), 0) if 0 not in tensor.shape else tensor
    if kind == 6 and dims:
        axis = chance.randrange(dims)
        return (
            tensor.narrow(axis, 0, min(1, tensor.shape[axis])).expand(tensor.shape) if 0 not in tensor.shape else tensor
        )
    if kind == 7 and dims:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if kind == 9:
        return tensor.to("meta")
    if kind == 10 and dims:  # backwards in memory, as far as torch has that: copied, each axis in another order
        return tensor.flip(chance.randrange(dims)).permute(*chance.sample(range(dims), dims))
    if kind == 11 and dims:  # of a size that only a stride of zero can have
        huge = list(tensor.shape)
        huge[chance.randrange(dims)] = chance.choice((2**24 + 1, 2**31, 2**40))
        return tensor.new_zeros(1).expand(huge) if 0 not in huge else tensor
    if tensor.numel() == 0:
        return tensor
    changed = tensor.clone().contiguous()
    flat = changed.view(-1)
    for _ in range(chance.randrange(1, 4)):
        value = chance.choice(VALUES) if tensor.is_floating_point() else chance.choice(NUMBERS)
        try:
            flat[chance.randrange(len(flat))] = value
        except (RuntimeError, OverflowError):
            return tensor  # a number that the dtype cannot hold
    return changed


def overlapping(chance: random.Random, arguments: dict[str, Any]) -> None:
    """Puts one tensor into the memory of another, from some element on."""
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.numel()]
    if len(tensors) < 2:
        return
    into, moved = chance.sample(tensors, 2)
    host, guest = arguments[into], arguments[moved]
    if host.dtype != guest.dtype or any(t.is_meta or t.numel() > LARGEST_RESULT for t in (host, guest)):
        return
    begin = chance.randrange(host.numel())
    memory = torch.zeros(begin + max(host.numel() - begin, guest.numel()), dtype=host.dtype)
    memory[: host.numel()] = host.flatten()
    arguments[into] = memory[: host.numel()].view(host.shape)
    arguments[moved] = memory[begin : begin + guest.numel()].view(guest.shape)


def good_arguments(chance: random.Random, name: str) -> dict[str, Any]:
    dtype = chance.choice(DTYPES[:4])  # of which float16 is refused on a CPU
    tiles, grid, images, prefix = (
        chance.randrange(4),
        chance.randrange(1, 4),
        chance.randrange(1, 4),
        chance.randrange(3),
    )
    height, width, channels = chance.randrange(1, 9), chance.randrange(1, 9), chance.randrange(1, 70)
    token_width, hidden_width = chance.randrange(1, 20), chance.randrange(1, 20)
    low = torch.rand(tiles, 2) * 4 - 1
    sampling = {
        "boxes": torch.cat([low, low + torch.rand(tiles, 2) * 6], dim=1),
        "image_index": torch.randint(images, (tiles,), dtype=chance.choice((torch.int32, torch.int64))),
    }
    features = torch.randn(images, height, width, channels).to(dtype)
    check = {"check_values": chance.random() < 0.7}
    if name == "crop_resize":
        return {"features": features, **sampling, "size": grid, **check}
    if name == "crop_resize_backward":
        grad = torch.randn(tiles, grid, grid, channels).to(dtype)
        return {"grad": grad, **sampling, "images": images, "height": height, "width": width, **check}
    rows = tiles * grid * grid
    if name == "gate_backward":
        matrices = {key: torch.randn(rows, token_width).to(dtype) for key in ("grad", "branch")}
        return {
            **matrices,
            "out": torch.full_like(matrices["grad"], float("nan")),
            "alpha": torch.tensor([0.5], dtype=dtype),
        }
    saved = {}
    if name == "cvfm_forward" and chance.random() < 0.5:
        saved = {
            "hidden": torch.full((rows, hidden_width), float("nan"), dtype=dtype),
            "branch": torch.full((rows, token_width), float("nan"), dtype=dtype),
        }
    return {
        "tokens": torch.randn(tiles, prefix + grid * grid, token_width).to(dtype),
        "features": features,
        **sampling,
        "fc1_weight": torch.randn(hidden_width, token_width + channels).to(dtype),
        "fc1_bias": torch.randn(hidden_width).to(dtype),
        "fc2_weight": torch.randn(token_width, hidden_width).to(dtype),
        "fc2_bias": torch.randn(token_width).to(dtype),
        "alpha": torch.tensor([chance.choice((0.0, 0.5, -1.0))], dtype=dtype),
        "num_prefix_tokens": prefix,
        "gate": chance.choice(("product", "scale")),
        "plan": chance.choice(("sample_first", "project_first")),
        **saved,
        **check,
    }  # fmt: skip


def mutate(chance: random.Random, arguments: dict[str, Any]) -> None:
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        name = chance.choice(list(arguments))
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            arguments[name] = other_tensor(chance, value)
        elif isinstance(value, bool):
            arguments[name] = not value
        elif isinstance(value, int):
            arguments[name] = chance.choice(NUMBERS)
        else:
            arguments[name] = chance.choice(("", "product", "sample_first", "single_pass", "x" * 1000))
    if chance.random() < 0.1:
        overlapping(chance, arguments)


def expected_shape(name: str, arguments: dict[str, Any]) -> tuple[int, ...]:
    if name == "crop_resize":
        size = arguments["size"]
        return arguments["boxes"].shape[0], size, size, arguments["features"].shape[3]
    if name == "crop_resize_backward":
        return *(arguments[key] for key in ("images", "height", "width")), arguments["grad"].shape[3]
    return (1,) if name == "gate_backward" else tuple(arguments["tokens"].shape)


def too_large(name: str, arguments: dict[str, Any]) -> bool:
    """A result that is right to ask for but wrong to allocate in a test."""
    try:
        shape = expected_shape(name, arguments)
    except (IndexError, AttributeError):
        return False
    if name.startswith("cvfm") and arguments["features"].numel() > LARGEST_RESULT:
        return True  # project_first would write as many rows
    product = 1
    for size in shape:
        product *= size
    return LARGEST_RESULT < product < 2**60 and all(0 <= size <= 2**24 for size in shape)


def is_judged(name: str, arguments: dict[str, Any]) -> bool:
    """Whether inputs and result are small, and the inputs such that no rounding is blown up."""
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    sizes = [math.prod(expected_shape(name, arguments)), *(tensor.numel() for tensor in tensors.values())]
    if max(sizes) > LARGEST_JUDGED or any(tensor.is_meta for tensor in tensors.values()):
        return False
    read = [value for key, value in tensors.items() if value.is_floating_point() and key not in written(name)]
    return all(bool((tensor.abs() <= TAMEST).all()) for tensor in read)


def written(name: str) -> tuple[str, ...]:
    return ("out",) if name == "gate_backward" else ("hidden", "branch")


def defined(name: str, a: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the definition gives in `dtype` for the result and what is written."""
    a = in_dtype(a, dtype)
    if name == "crop_resize":
        return {"result": reference.crop_resize(a["features"], a["boxes"], a["image_index"], a["size"])}
    if name == "crop_resize_backward":
        grad = a["grad"]
        leaf = grad.new_zeros(a["images"], a["height"], a["width"], grad.shape[3]).requires_grad_()
        sampled = reference.crop_resize(leaf, a["boxes"], a["image_index"], grad.shape[1])
        return {"result": torch.autograd.grad(sampled, leaf, grad)[0]}
    if name == "gate_backward":
        slope = 1 - torch.tanh(a["alpha"] * a["branch"]) ** 2
        terms = slope.double() * a["grad"].double() * a["branch"].double()
        return {"result": terms.sum()[None], "out": a["alpha"] * slope * a["grad"]}
    patches = a["tokens"][:, a["num_prefix_tokens"] :]
    grid = math.isqrt(patches.shape[1])
    joint = torch.cat([patches, reference.crop_resize(*(a[k] for k in SAMPLED), grid).flatten(1, 2)], dim=-1)
    hidden = F.linear(joint, a["fc1_weight"], a["fc1_bias"])
    branch = F.linear(F.gelu(hidden), a["fc2_weight"], a["fc2_bias"])
    out = torch.cat(
        [a["tokens"][:, : a["num_prefix_tokens"]], patches + reference.gated(branch, a["alpha"], a["gate"])], 1
    )
    return {"result": out, "hidden": hidden.flatten(0, 1), "branch": branch.flatten(0, 1)}


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "boxes"
            else value for key, value in arguments.items()}  # fmt: skip


def roundings(name: str, arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """What they may come to, by the names of `defined`."""
    a = in_dtype(arguments, torch.float64)
    if name == "crop_resize":
        sampling = {key: a[key] for key in (*SAMPLED, "size")}
        return {"result": rounding.of_crop_resize(**sampling, dtype=dtype)["out"]}
    if name == "crop_resize_backward":
        maps = a["grad"].new_zeros(a["images"], a["height"], a["width"], a["grad"].shape[3])
        sampling = a["boxes"], a["image_index"], a["grad"].shape[1]
        return {"result": rounding.of_crop_resize(maps, *sampling, dtype, a["grad"])["features"]}
    if name == "gate_backward":
        found = rounding.of_gate_backward(a["grad"], a["branch"], a["alpha"], dtype)
        return {"result": found["alpha"], "out": found["branch"]}
    named = {key: a[key] for key in ARGUMENTS}
    settings = {"gate": a["gate"], "num_prefix_tokens": a["num_prefix_tokens"]}
    found = rounding.of_cvfm(named, dtype, **settings, tokens_dtype=arguments["tokens"].dtype)
    return {"result": found["out"], "hidden": found["hidden"], "branch": found["branch"]}


def judge(name: str, arguments: dict[str, Any], result: torch.Tensor) -> None:
    """The bound of all tests."""
    # That of the products: float32 tokens may come with a rest of bfloat16.
    floats = [
        v.dtype
        for k, v in arguments.items()
        if k != "boxes" and isinstance(v, torch.Tensor) and v.dtype.is_floating_point
    ]
    dtype = max(floats, key=lambda kind: torch.finfo(kind).eps)
    exact, eager = defined(name, arguments, torch.float64), defined(name, arguments, dtype)
    predicted = roundings(name, arguments, dtype)
    found = {"result": result} | {key: arguments[key] for key in written(name) if arguments.get(key) is not None}
    for key, tensor in found.items():
        # Alpha's sum comes in float64 from arguments of any dtype.
        assert_close(key, tensor.to(dtype), exact[key], error_of(eager[key], exact[key]), predicted[key])


def operator(name: str) -> Callable[..., torch.Tensor]:
    return getattr(torch.ops.fila, name)


def fuzz(count: int, seed: int) -> tuple[int, int, int]:
    """Calls that ran, were refused, and were judged by value."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    ran = refused = judged = 0
    for number in range(count):
        name = chance.choice(FUZZED)
        arguments = good_arguments(chance, name)
        mutate(chance, arguments)
        if too_large(name, arguments):
            continue
        try:
            result = operator(name)(**arguments)
        except IndexError:
            # Without data, only shapes are worked out, and in Python.
            assert any(isinstance(value, torch.Tensor) and value.is_meta for value in arguments.values()), number
            refused += 1
            continue
        except (ValueError, RuntimeError) as error:
            refused += 1
            if not str(error).strip():
                raise AssertionError(f"call {number}: {name} refused without a word") from error
            continue
        ran += 1
        assert tuple(result.shape) == expected_shape(name, arguments), f"call {number}: {name} gave {result.shape}"
        assert result.is_contiguous(), f"call {number}: {name} gave strides {result.stride()}"
        if is_judged(name, arguments):
            judged += 1
            try:
                judge(name, arguments, result)
            except AssertionError as error:
                raise AssertionError(f"call {number}: {name} {error}") from error
    return ran, refused, judged


def main() -> int:
    loaded, reason = library.load()
    if not loaded:
        print(f"native library {reason}")
        return 2
    torch.set_num_threads(1)
    ran, refused, judged = fuzz(int(sys.argv[1]), int(sys.argv[2]))
    print(f"{ran} ran, {refused} refused, {judged} judged by value")
    return 0


if __name__ == "__main__":
    sys.exit(main())
