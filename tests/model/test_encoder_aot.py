"""Exported graphs: the operation passes torch.export, and an exported encoder runs in a program without Python."""

import doctest
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from fila.aot import Encoder, compile_encoder, encoder_inputs
from fila.configuration import FilaVisionConfig
from fila.image_processing import FilaImageProcessor
from fila.vision import FilaVisionModel
from fila_kernels import CVFM, aot, crop_resize, planner
from fila_kernels.backends.native import library
from fila_kernels.testing import assert_close

LOADED, REASON = library.load()
needs_library = pytest.mark.skipif(not LOADED, reason=f"native library {REASON}")
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
needs_compiler = pytest.mark.skipif(
    CMAKE is None or (shutil.which("c++") is None and "CXX" not in os.environ), reason="no CMake or no C++ compiler"
)


class Fused(torch.nn.Module):
    """A CVFM between other operations, and its sampler alone."""

    def __init__(self, plan: str | None = None, gate: str = "product") -> None:
        super().__init__()
        self.fuse = CVFM(16, 8, 24, plan=plan, gate=gate)
        torch.nn.init.constant_(self.fuse.alpha, 0.5)

    def forward(self, tokens, maps, boxes, image_index):
        features = maps.permute(0, 2, 3, 1)
        sampled = crop_resize(features, boxes, image_index, 3)
        return self.fuse(2 * tokens, features, boxes, image_index), sampled.mean((1, 2))


def arguments(tiles: int = 3, images: int = 2, side: int = 12, dtype: torch.dtype = torch.float32):
    low = torch.rand(tiles, 2) * side / 2
    return (
        torch.randn(tiles, 17, 16, dtype=dtype),
        torch.randn(images, 8, side, side + 3, dtype=dtype),  # channels are not innermost
        torch.cat([low, low + 1 + torch.rand(tiles, 2) * side / 3], dim=1),
        torch.randint(images, (tiles,)),
    )


def exported(module: torch.nn.Module, strict: bool = False, dtype: torch.dtype = torch.float32):
    tiles, images = Dim("tiles"), Dim("images")
    with torch.no_grad():
        return torch.export.export(
            module, arguments(dtype=dtype), strict=strict,
            dynamic_shapes=({0: tiles}, {0: images, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: tiles}, {0: tiles}),
        )  # fmt: skip


def targets(program: torch.export.ExportedProgram, namespace: str) -> list[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if name.startswith(f"{namespace}.")]


@pytest.mark.parametrize("strict", [False, True])
def test_the_operation_survives_export_with_any_number_of_tiles(strict):
    module = Fused().eval()
    program = exported(module, strict)
    assert targets(program, "fila_kernels") == ["fila_kernels.crop_resize.default", "fila_kernels.cvfm_forward.default"]
    for case in (arguments(), arguments(7, 3, 20), arguments(1, 1, 5)):
        for got, want in zip(program.module()(*case), module(*case), strict=True):
            assert torch.equal(got, want)


@needs_library
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_decomposed_graphs_call_the_native_library_alone(strict, gate, dtype):
    module = Fused(gate=gate).to(dtype).eval()
    program = exported(module, strict, dtype).run_decompositions(aot.decompositions())
    assert targets(program, "fila_kernels") == []
    assert targets(program, "fila") == ["fila.crop_resize.default", "fila.cvfm.default"]
    for case in (arguments(dtype=dtype), arguments(7, 3, 20, dtype=dtype)):
        for got, want in zip(program.module()(*case), module(*case), strict=True):
            assert torch.equal(got, want)


@needs_library
@pytest.mark.parametrize("plan", ["sample_first", "project_first"])
def test_the_plan_of_the_module_stays(plan):
    program = exported(Fused(plan).eval()).run_decompositions(aot.decompositions())
    (call,) = [node for node in program.graph.nodes if str(node.target) == "fila.cvfm.default"]
    assert call.args[11] == plan


@needs_library
def test_the_planner_chooses_from_the_example_where_no_plan_is_named():
    """One cell for 16 samples: projecting is cheaper. 1,600 cells for 16 samples: sampling is."""
    for side, plan in ((1, "project_first"), (40, "sample_first")):
        case = (torch.randn(2, 17, 64), torch.randn(2, 64, side, side), torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))
        module = torch.nn.ModuleList([CVFM(64, 64)]).eval()
        module.forward = lambda *a, m=module: m[0](a[0], a[1].permute(0, 2, 3, 1), *a[2:])
        with torch.no_grad():
            program = torch.export.export(module, (*case, torch.tensor([0, 1])), strict=False)
        program = program.run_decompositions(aot.decompositions())
        (call,) = [node for node in program.graph.nodes if str(node.target) == "fila.cvfm.default"]
        assert call.args[11] == plan


@needs_library
@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda: torch.export.export(Fused(), arguments(), strict=False), "exported under torch.no_grad"),
        (lambda: exported(Fused().half(), dtype=torch.float16), "float32, bfloat16 and float64, not torch.float16"),
    ],
)
def test_what_cannot_leave_python_says_why(program, message):
    graph = program()
    with pytest.raises(RuntimeError, match=message):
        graph.run_decompositions(aot.decompositions())


@needs_library
def test_a_graph_exported_under_autocast_is_planned_in_its_dtype_and_keeps_the_residual(monkeypatch):
    """float16 products would not be the library's; the tokens' float32 says nothing of that."""
    asked, choose = [], planner.choose
    monkeypatch.setattr(
        aot.planner, "choose", lambda shape, dtype, *rest: asked.append(dtype) or choose(shape, dtype, *rest)
    )
    module, case = Fused().eval(), arguments()
    with torch.autocast("cpu", torch.bfloat16):
        want = module(*case)
        program = exported(module)
    asked.clear()
    program = program.run_decompositions(aot.decompositions())
    assert asked == [torch.bfloat16]
    assert targets(program, "fila") == ["fila.crop_resize.default", "fila.cvfm.default"]
    got = program.module()(*case)
    assert (got[0].dtype, want[0].dtype) == (torch.float32, torch.float32)
    assert torch.equal(got[0], want[0])
    with torch.autocast("cpu", torch.float16):
        program = exported(module)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 and float64, not torch\.float16"):
        program.run_decompositions(aot.decompositions())


@needs_library
def test_the_example_runs():
    result = doctest.testmod(aot)
    assert (result.attempted > 0, result.failed) == (True, 0)


def test_without_the_library_there_is_nothing_to_call(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: (False, "not built: no C++ compiler was found"))
    with pytest.raises(RuntimeError, match="the native library, which is not built: no C"):
        aot.decompositions()


@pytest.fixture(scope="module")
def tower() -> FilaVisionModel:
    """Four ViT layers, each of which meets a stage of a ConvNeXt of one block a stage; gates open."""
    torch.manual_seed(0)
    config = FilaVisionConfig(
        vit_config=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
                        image_size=32, patch_size=8, hidden_act="gelu"),
        convnext_config=dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], patch_size=2, initializer_range=0.06,
                             layer_scale_init_value=0.5),
        vision_feature_layer=-1, fusion_layers=[0, 1, 2, 3], high_res_size=64,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )  # fmt: skip
    model = FilaVisionModel(config).eval()
    for fusion in model.fusion:
        torch.nn.init.constant_(fusion.alpha, 0.5)
    return model


def pictures(tower: FilaVisionModel, *sizes: tuple[int, int]):
    processor = FilaImageProcessor.from_geometry(tower.config.geometry())
    pixels = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    return processor(pixels, return_tensors="pt", input_data_format="channels_first")


def test_the_encoder_for_export_is_the_encoder(tower):
    pixels = pictures(tower, (50, 60), (64, 64))
    with torch.no_grad():
        want = tower(**pixels).last_hidden_state
        assert torch.equal(Encoder(tower)(*encoder_inputs(tower, pixels)), want)


def test_pictures_of_several_canvases_are_refused(tower):
    with pytest.raises(ValueError, match=r"pictures of one canvas, got \[\(32, 64\), \(64, 32\)\]"):
        encoder_inputs(tower, pictures(tower, (32, 64), (64, 32)))


@needs_library
@needs_compiler
@pytest.mark.slow
def test_an_exported_encoder_runs_in_a_program_without_python(root, tower, tmp_path):
    package, build = tmp_path / "encoder.pt2", tmp_path / "build"
    compile_encoder(tower, package)
    torch_dir = Path(torch.__file__).parent
    for command in (
        [CMAKE, "-S", root / "examples/cpp", "-B", build, f"-DFILA_TORCH_DIR={torch_dir}", "-DCMAKE_BUILD_TYPE=Debug"],
        [CMAKE, "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def encode(library: Path, inputs: Path, output: Path) -> subprocess.CompletedProcess[str]:
        command = [build / "encode", package, library, inputs, output]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    precise = Encoder(FilaVisionModel(tower.config).eval())
    precise.model.load_state_dict(tower.state_dict())
    precise.double()
    inputs, output = tmp_path / "inputs.pt", tmp_path / "tokens.pt"
    for sizes in ([(64, 64), (60, 50)], [(30, 70)], [(32, 64)] * 5):
        case = encoder_inputs(tower, pictures(tower, *sizes))
        torch.save(list(case), inputs)
        done = encode(library.LIBRARY, inputs, output)
        assert done.returncode == 0, done.stderr
        got = torch.load(output, weights_only=True)
        assert str(list(got.shape)) in done.stdout
        with torch.no_grad():
            eager = Encoder(tower)(*case)
            exact = precise(case[0].double(), case[1].double(), *case[2:])
        assert_close("tokens", got, exact, eager)

    views, rasters, boxes, index = case
    want = got
    for other in (
        [views, rasters.to(memory_format=torch.channels_last), boxes, index.long()],
        [views.transpose(2, 3).contiguous().transpose(2, 3), *case[1:]],
        [*case[:2], torch.cat([boxes, boxes], 1)[:, :4], torch.stack([index, index], 1)[:, 0]],
    ):
        torch.save(other, inputs)
        done = encode(library.LIBRARY, inputs, output)
        assert done.returncode == 0, done.stderr
        assert torch.equal(torch.load(output, weights_only=True), want)

    refused = {
        "boxes: expected dtype Float, got Double": [*case[:2], boxes.double(), index],
        "views: expected dtype Float, got Double": [views.double(), *case[1:]],
        "rasters: expected dtype Float, got BFloat16": [views, rasters.bfloat16(), boxes, index],
        "boxes: expected shape [T, 4]": [*case[:2], boxes[:-1], index],
        "image_index: expected shape [T]": [*case[:3], index[:-1]],
        "image_index: expected dtype Int": [*case[:3], index.float()],
        "image_index: expected 0 to 4": [*case[:3], index + 1],
        "boxes: expected finite": [*case[:2], boxes.flip(1), index],
        "views: expected shape [T, 3, tile, tile] = [-1, 3, 32, 32]": [views[..., :-1], *case[1:]],
        "rasters: expected shape [B, 3, h, w]": [views, rasters[0], boxes, index],
        "rasters: expected sides that are multiples of": [views, rasters[..., :-1], boxes, index],
        "inputs: expected views, rasters, boxes and image_index, got 3 tensors": list(case[:3]),
    }
    for message, bad in refused.items():
        torch.save(bad, inputs)
        done = encode(library.LIBRARY, inputs, output)
        assert (done.returncode, done.stdout) == (1, ""), message
        assert f"error: {message}" in done.stderr

    for file, what, message in (
        (tmp_path / "libnone.so", inputs, "error: cannot load the operators"),
        (library.LIBRARY, tmp_path / "none.pt", "error: cannot read"),
    ):
        done = encode(file, what, output)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
