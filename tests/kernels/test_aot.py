"""The Triton kernels compiled ahead of time for architectures that need not be present: limits and instructions.

`make test` compiles the default configs, `make test-aot` everything that the tuner would try. The interpreted
tests check what a kernel computes; these find a compiler that gave up or emitted other instructions than intended.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from fila_kernels.backends.triton import configs, crop_resize, gemm, host, pointwise, single_pass
from fila_kernels.call import UNMEASURED, Measured
from tools import compiled_kernels
from tools.compiled_kernels import ARCHITECTURES, compile_defaults, compiling, example, faults, product_launches


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_default_configs(arch, capfd):
    kernels = compile_defaults(arch)
    assert len(kernels) <= 16, "three architectures take at most 30 compilations, and this one most of them"
    assert [fault for kernel in kernels for fault in faults(kernel)] == []
    names = {kernel.name for kernel in kernels}
    products = {
        "fc1_fwd",
        "fc1_projected_fwd",
        "fc2_fwd",
        "hidden_grad",
        "input_grad",
        "weight_grad",
        "single_pass_fwd",
    }
    assert products <= names
    if arch == 90:
        others = {
            "crop_resize_fwd", "crop_tables", "crop_resize_bwd", "gate_bwd", "gelu_fwd", "reduce",
            "fc1_fwd (one image)", "fc2_fwd (one image)",
        }  # fmt: skip
        assert others <= names
        assert all(kernel.count("LDG.E.128") for kernel in kernels if kernel.name == "crop_resize_fwd")
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "width"), [(80, 1000), (90, 1004)])
def test_widths_that_pointers_do_not_load_in_sixteen_bytes_do_not_spill(arch, width):
    """1000 is a whole number of sixteen bytes, and still not of the sixteen elements that Triton asks for."""
    found = []
    with compiling(arch, found):
        launches = product_launches(example(width=width))
        for name in ("fc1_projected", "fc2", "hidden_gradient"):
            launches[name]()
    assert [(kernel.name, kernel.spills) for kernel in found if kernel.spills] == []
    assert len(found) == 3
    assert all(kernel.count(compiled_kernels.INTENDED[arch][0]) for kernel in found)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_a_residual_in_float32_beside_bfloat16_products_does_not_spill(arch):
    """Tokens, result and their gradients under autocast: the kernels that read or write them."""
    found = []
    with compiling(arch, found):
        for call in (example(), example(width=512, tiles=5)):
            call = call._replace(tokens=call.tokens.float())
            wide, flat = call.tokens, call.row_operand()
            saved = torch.empty((call.shape.samples, call.shape.token_width), dtype=call.dtype)
            gemm.fc2(call, flat, wide, saved)
            gemm.input_gradient(call, flat, wide, wide, torch.empty((*wide.shape[:2], 768), dtype=call.dtype))
            pointwise.gate_gradient(call, wide, saved, flat, True, True)
        single_pass.single_pass(call, wide, None, None)
    assert [fault for kernel in found for fault in faults(kernel)] == []
    assert {"fc2_fwd", "input_grad", "gate_bwd", "single_pass_fwd"} == {kernel.name for kernel in found}


@pytest.mark.parametrize(("channels", "size"), [(200, ".128"), (196, ".64"), (198, ""), (197, ".U16")])
def test_accesses_are_as_wide_as_the_channels_allow(channels, size):
    """Sixteen bytes, eight, four and two, of a map and of the gradient that comes back."""
    call, found = example(channels=channels, tiles=5), []
    samples = torch.empty((5, 24, 24, channels), dtype=torch.bfloat16)
    with compiling(90, found):
        tables = crop_resize.crop_tables(call.boxes, call.image_index, 24, (1, 48, 48), True)
        crop_resize.crop_resize_fwd(call.features, tables, call.image_index, 24, samples.flatten(1, 2))
        crop_resize.crop_resize_bwd(samples, tables, 24, torch.empty_like(call.features))
    for kernel in found[1:]:
        wide = {name for name in (".128", ".64", ".U16", "") if kernel.instructions[f"STG.E{name}"]}
        assert wide == {size}, kernel.instructions
        assert kernel.instructions[f"LDG.E{size}"], kernel.instructions


@pytest.mark.parametrize("planted", [False, True])
def test_float32_is_ieee_and_tf32_is_found(planted, monkeypatch):
    if planted:
        monkeypatch.setattr(host, "precision", lambda dtype: "tf32")
    call = example(torch.float32, 64, 32, tiles=1)
    found = []
    with compiling(80, found):
        gemm.fc2(call, torch.empty(1, 577, 64), torch.empty_like(call.tokens), None)
    assert ("tf32" in found[0].ptx) == planted
    assert bool(faults(found[0])) == planted


def test_tf32_only_where_pytorch_allows_it():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for allowed, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            settings.fp32_precision = allowed
            assert host.precision(torch.float32) == expected
            assert host.precision(torch.bfloat16) == "ieee"
    finally:
        settings.fp32_precision = before


@triton.jit
def _trapped_kernel(p_out, STORES: tl.constexpr):
    if STORES:
        tl.store(p_out, 1.0)
    tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@pytest.mark.parametrize("stores", [False, True])
def test_a_kernel_that_only_traps_is_found(stores):
    found = []
    with compiling(90, found):
        host.run(_trapped_kernel, (1,), torch.empty(1), STORES=stores, num_warps=1, num_stages=1)
    reported = " ".join(faults(found[0]))
    assert found[0].count("BPT.TRAP") > 0
    assert ("a trap in place of the body" in reported and "nothing is stored" in reported) is not stores


def test_each_limit_is_looked_at():
    good = compiled_kernels.Kernel(
        "fc2_fwd", 90, torch.bfloat16, configs.GemmConfig(128, 128, 64, 8, 4, tma=True), 8, 1000, 0, 100
    )
    good.instructions.update({"HGMMA.64x128": 4, "UTMALDG.2D": 4, "STG.E.128": 4})
    assert faults(good) == []
    fewer = replace(good, instructions=good.instructions.copy())
    fewer.instructions["HGMMA.64x128"] = 3
    assert faults(fewer)[0].endswith("3 HGMMA, a step takes 4")
    assert "shared memory" in faults(replace(good, shared=300_000))[0]
    assert "tensor memory" in faults(replace(good, tensor_memory=1024))[0]
    for missing, word in (
        ("HGMMA.64x128", "no HGMMA"),
        ("UTMALDG.2D", "no UTMALDG"),
        ("STG.E.128", "nothing is stored"),
    ):
        fewer = good.instructions.copy()
        del fewer[missing]
        assert word in faults(replace(good, instructions=fewer))[0]
    assert "spill" in faults(replace(good, instructions=good.instructions + type(good.instructions)({"STL": 2})))[0]


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_default_and_candidate_is_supported(arch, dtype):
    device = configs.ARCHITECTURES[arch]
    for kernel in configs.KERNELS:
        for sizes in ((2885, 1024, 1216), (92_320, 1024, 2560), (25, 7, 13), (64, 512, 512), (2885, 1004, 1772)):
            for aligned in (True, False):
                problem = configs.Problem(kernel, *sizes, dtype, aligned)
                if kernel == "single_pass" and max(sizes[1:]) > configs.TRITON_SINGLE_PASS_WIDTH:
                    continue
                found = configs.candidates(problem, device)
                assert all(configs.supports(config, problem, device) for config in found)
                assert found[0] == configs.default(problem, device)
                assert len(set(found)) == len(found)
                assert all(configs.config_from(kernel, configs.plain(config)) == config for config in found)
                if not aligned or arch not in (90, 100):
                    assert not any(getattr(config, "tma", False) for config in found)


@pytest.mark.parametrize("images", [1, 2, 4, 8])
def test_one_image_fills_a_hopper_in_one_wave(images):
    """192 rows: 16 x 8 tiles of 128 columns for 132 multiprocessors, where 128 rows leave a second wave half empty."""
    device = configs.ARCHITECTURES[90]
    problem = configs.Problem("fc2", images * 2885, 1024, 1024, torch.bfloat16)
    config = configs.default(problem, device)
    assert (config.rows == 192) == (images in (1, 2))

    def seconds(config):  # whole waves of what a tile takes
        return -(-config.tiles(problem) // device.num_sms) * config.rows * config.block_n

    assert seconds(config) <= min(seconds(replace(config, block_n=n, tail_m=0)) for n in (128, 256))
    for other in (80, 89, 100, 120):
        default = configs.default(replace(problem, m=2885), configs.ARCHITECTURES[other])
        assert not default.tail_m


def test_what_cannot_run_is_refused():
    hopper, ampere = configs.ARCHITECTURES[90], configs.ARCHITECTURES[80]
    problem = configs.Problem("fc2", 2885, 1024, 1024, torch.bfloat16)
    good = configs.GemmConfig(128, 128, 64, 8, 4, tma=True)
    assert configs.supports(good, problem, hopper)
    assert not configs.supports(good, problem, ampere)
    assert not configs.supports(good, replace(problem, aligned=False), hopper)
    assert not configs.supports(replace(good, num_stages=8), problem, hopper)
    assert not configs.supports(replace(good, block_m=96), problem, hopper)
    assert not configs.supports(replace(good, block_m=256, block_n=256), problem, hopper)
    assert not configs.supports(replace(good, split_k=2), problem, hopper)
    assert not configs.supports(configs.GatherConfig(16, 64), problem, hopper)
    gather = replace(problem, kernel="crop_resize_backward", k=0)
    assert configs.supports(configs.GatherConfig(16, 64, 8), gather, hopper)
    assert not configs.supports(configs.GatherConfig(64, 512, 4), gather, hopper)
    assert not configs.supports(good, gather, hopper)
    tailed = replace(good, tail_m=64)
    assert configs.supports(tailed, problem, hopper)
    for changed in (replace(tailed, tail_m=48), replace(tailed, tail_m=128), replace(tailed, tma=False)):
        assert not configs.supports(changed, problem, hopper)
    assert not configs.supports(tailed, replace(problem, kernel="input_gradient"), hopper)
    blackwell, specialized = configs.ARCHITECTURES[100], replace(good, warp_specialize=True)
    assert configs.supports(specialized, problem, blackwell)
    assert not configs.supports(specialized, problem, hopper)
    assert not configs.supports(tailed, problem, blackwell)
    assert not configs.supports(replace(specialized, num_warps=4), problem, blackwell)
    wide = replace(problem, kernel="single_pass")
    assert not configs.supports(configs.GemmConfig(64, 64, 32, 8, 2), wide, hopper)
    narrow = replace(wide, n=512, k=512)
    assert configs.supports(configs.GemmConfig(64, 64, 32, 8, 2), narrow, hopper)


def test_a_measured_config_is_taken_where_it_can_run():
    cpu = torch.device("cpu")
    problem = configs.Problem("fc2", 2885, 1024, 1024, torch.bfloat16)
    good = configs.GemmConfig(128, 128, 64, 8, 4, tma=True)

    def chosen(config, sizes=(2885, 1024, 1024)):
        return host.choose(problem, cpu, Measured([("fc2", sizes, configs.plain(config))]))

    assert chosen(good) == chosen(good, (4000, 1024, 1024)) == good
    default = host.choose(problem, cpu, UNMEASURED)
    assert chosen(replace(good, block_m=96)) == chosen(good, (9000, 1024, 1024)) == default != good


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_the_tuner_tries_few(kernel):
    for arch, device in configs.ARCHITECTURES.items():
        problem = configs.Problem(kernel, 2885, 512, 512, torch.bfloat16)
        found = configs.candidates(problem, device)
        tiles = {replace(config, split_k=1) if isinstance(config, configs.GemmConfig) else config for config in found}
        assert len(tiles) <= 12, (arch, kernel)
