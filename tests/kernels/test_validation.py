"""Bad input: a ValueError that names the argument, what was expected and what came."""

import pytest
import torch

import fila_kernels
from fila_kernels import crop_resize, cvfm, explain, validation
from fila_kernels.testing import Case

BASE = Case("bad")


def box(*values):
    return torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 3.0, 3.0], list(values)])


BAD = {
    "nan box": ({"boxes": box(0, float("nan"), 3, 3)}, "boxes: expected finite.*nan.*tile 2"),
    "infinite box": ({"boxes": box(0, 0, float("inf"), 3)}, "boxes: expected finite.*inf.*tile 2"),
    "inverted box": ({"boxes": box(3, 0, 1, 4)}, r"boxes: expected y0 < y1 and x0 < x1, got \[3.0, 0.0, 1.0, 4.0\]"),
    "empty box": ({"boxes": box(1, 2, 3, 2)}, "boxes: expected y0 < y1 and x0 < x1"),
    "box dtype": ({"boxes": box(0, 0, 1, 1).double()}, "boxes: expected dtype torch.float32, got torch.float64"),
    "box shape": ({"boxes": torch.zeros(3, 5)}, r"boxes: expected shape \[T, 4\], got \[3, 5\]"),
    "box count": ({"boxes": torch.rand(2, 4)}, "image_index: expected shape"),
    "index too high": ({"image_index": torch.tensor([0, 1, 2])}, "image_index: expected 0 to 1, got 2 for tile 2"),
    "index negative": ({"image_index": torch.tensor([0, -1, 1])}, "image_index: expected 0 to 1, got -1 for tile 1"),
    "index dtype": ({"image_index": torch.zeros(3)}, "image_index: expected dtype int32 or int64, got torch.float32"),
    "index shape": ({"image_index": torch.zeros(3, 1, dtype=torch.int64)}, r"image_index: expected shape \[3\]"),
    "map shape": ({"features": torch.randn(10, 12, 6)}, r"features: expected shape \[B, h, w, C\], got \[10, 12, 6\]"),
    "map dtype": ({"features": torch.zeros(2, 10, 12, 6, dtype=torch.int64)}, "features: expected dtype float32"),
    "map other dtype": ({"features": torch.zeros(2, 10, 12, 6).bfloat16()}, "features: expected dtype torch.float32"),
    "no image": ({"features": torch.zeros(0, 10, 12, 6)}, "features: expected at least one image"),
    "no cell": ({"features": torch.zeros(2, 0, 12, 6)}, "features: expected at least one image and one cell"),
    "map on meta": ({"features": torch.zeros(2, 10, 12, 6, device="meta")}, "features: expected a tensor with data"),
    "tokens on meta": ({"tokens": torch.zeros(3, 17, 8, device="meta")}, "expected device"),
    "weights on meta": ({"fc1_weight": torch.zeros(12, 14, device="meta")}, "fc1_weight: expected device cpu"),
    "token rank": ({"tokens": torch.zeros(3, 17)}, r"tokens: expected shape \[T, P \+ N, D\], got \[3, 17\]"),
    "token count": ({"tokens": torch.zeros(4, 17, 8)}, r"boxes: expected shape \[4, 4\]"),
    "not a square": ({"tokens": torch.zeros(3, 16, 8)}, "a square number of patch tokens, got 15"),
    "no patch": ({"tokens": torch.zeros(3, 1, 8)}, "square number of patch tokens, got 0"),
    "token stride": ({"tokens": torch.zeros(3, 8, 17).transpose(1, 2)}, "tokens: expected a last stride of 1"),
    "fc1 width": (
        {"fc1_weight": torch.zeros(12, 13)},
        r"fc1_weight: expected shape \[H, D \+ C\] = \[12, 14\], got \[12, 13\]",
    ),
    "fc1 rank": ({"fc1_weight": torch.zeros(12)}, r"fc1_weight: expected shape \[H, D \+ C\]"),
    "fc1 bias": ({"fc1_bias": torch.zeros(11)}, r"fc1_bias: expected shape \[H\] = \[12\], got \[11\]"),
    "fc2 shape": (
        {"fc2_weight": torch.zeros(12, 8)},
        r"fc2_weight: expected shape \[D, H\] = \[8, 12\], got \[12, 8\]",
    ),
    "fc2 bias": ({"fc2_bias": torch.zeros(12)}, r"fc2_bias: expected shape \[D\] = \[8\], got \[12\]"),
    "alpha shape": ({"alpha": torch.tensor(0.5)}, r"alpha: expected shape \[1\] = \[1\], got \[\]"),
    "alpha dtype": ({"alpha": torch.tensor([0.5]).double()}, "alpha: expected dtype torch.float32"),
    "not a tensor": ({"boxes": [[0, 0, 1, 1]]}, "boxes: expected a tensor, got list"),
    "gate": ({"gate": "sum"}, "gate: expected one of product, scale, got 'sum'"),
    "plan": ({"plan": "fast"}, "plan: expected one of sample_first, project_first, single_pass or None, got 'fast'"),
    "no weight": ({"fc1_weight": None}, "fc1_weight: expected a tensor, got NoneType"),
    "alpha a number": ({"alpha": 0.5}, "alpha: expected a tensor, got float"),
    "tokens a list": ({"tokens": [1.0]}, "tokens: expected a tensor, got list"),
    "no token width": ({"tokens": torch.zeros(3, 17, 0)}, "tokens: expected a width D of at least 1"),
    "no channel": ({"features": torch.zeros(2, 10, 12, 0)}, "features: expected a width C of at least 1"),
    "no hidden unit": ({"fc1_weight": torch.zeros(0, 14)}, "fc1_weight: expected a hidden width H of at least 1"),
    "token dtype": ({"tokens": torch.zeros(3, 17, 8, dtype=torch.int64)}, "tokens: expected dtype float32"),
    "gate of another type": ({"gate": ["product"]}, r"gate: expected one of product, scale, got \['product'\]"),
    "plan of another type": ({"plan": 1}, "plan: expected one of sample_first, .* or None, got 1"),
    "recompute": ({"recompute": "no"}, "recompute: expected True or False, got 'no'"),
    "float prefix": ({"num_prefix_tokens": 1.0}, "num_prefix_tokens: expected an int of 0 or more, got 1.0"),
    "bool prefix": ({"num_prefix_tokens": True}, "num_prefix_tokens: expected an int of 0 or more, got True"),
    "prefix": ({"num_prefix_tokens": -1}, "num_prefix_tokens: expected an int of 0 or more, got -1"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
def test_cvfm(change, message, backend):
    inputs = BASE.inputs(torch.float32)
    inputs["image_index"] = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=message):
        cvfm(**(inputs | change), backend=backend)


@pytest.mark.parametrize(
    "change, message", [value for value in BAD.values() if set(value[0]) & {"boxes", "image_index"}]
)
def test_crop_resize(change, message):
    inputs = BASE.inputs(torch.float32)
    arguments = {name: inputs[name] for name in ("features", "boxes")} | {"image_index": torch.tensor([0, 1, 1])}
    with pytest.raises(ValueError, match=message):
        crop_resize(**(arguments | change), size=2)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, None])
def test_size(size):
    inputs = BASE.inputs(torch.float32)
    with pytest.raises(ValueError, match=f"size: expected an int of at least 1, got {size!r}"):
        crop_resize(inputs["features"], inputs["boxes"], inputs["image_index"], size)


@pytest.mark.parametrize("backend", ["torch", "cudnn", 3, ["native"]])
def test_a_backend_of_no_such_name(backend):
    with pytest.raises(ValueError, match="backend: "):
        cvfm(**BASE.inputs(torch.float32), backend=backend)


WILD = ("nan box", "infinite box", "inverted box", "empty box", "index too high", "index negative")


@pytest.mark.parametrize("name", WILD)
@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
def test_values_are_checked_in_compiled_graphs(name, backend):
    change, message = BAD[name]
    inputs = BASE.inputs(torch.float32) | {"image_index": torch.tensor([0, 1, 1])}
    torch._dynamo.reset()
    compiled = torch.compile(lambda **arguments: cvfm(**arguments, backend=backend), backend="eager")
    with torch.no_grad():
        compiled(**inputs)
        with pytest.raises(ValueError, match=message):
            compiled(**(inputs | change))


def test_values_on_a_gpu_are_checked_only_where_that_is_switched_on(monkeypatch):
    """Meta tensors stand for those of another device: looking at one raises."""
    boxes, image_index = torch.zeros(2, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    validation.check_values(boxes, image_index, 1)
    monkeypatch.setattr(validation, "_gpu_values", False)
    fila_kernels.check_gpu_values()
    with pytest.raises(RuntimeError, match="meta"):
        validation.check_values(boxes, image_index, 1)


def test_extremes_that_are_right_pass():
    """An extent that float32 cannot hold is not an infinite edge."""
    box = torch.tensor([[-3e38, -3e38, 3e38, 3e38]])
    validation.check_values(box, torch.tensor([0]), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (5, 577)}, r"tokens: expected a shape \[T, P \+ N, D\], got \(5, 577\)"),
        ({"features": (1, 24, 24, 1.5)}, "features: expected a shape"),
        ({"hidden_width": 0}, "hidden_width: expected an int of at least 1, got 0"),
        ({"dtype": torch.int32}, "dtype: expected dtype float32"),
        ({"plan": "fast"}, "plan: expected one of"),
        ({"num_prefix_tokens": 0.5}, "num_prefix_tokens: expected an int"),
    ],
)
def test_explain(change, message):
    with pytest.raises(ValueError, match=message):
        explain(**({"tokens": (5, 577, 64), "features": (1, 24, 24, 32)} | change))
