"""Two processes that share sharded weights (FSDP2) compute what one does, whatever pictures each of them has.

Weights are gathered from both processes each time a sharded module is called. Were the number of calls to depend on the
pictures, the processes would wait for each other for ever.
"""

import copy
import faulthandler
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing import assert_close

from fila import FilaConfig, FilaForConditionalGeneration, FilaImageProcessor, FilaProcessor, preset
from recipes.nano.tokenizer import build_character_tokenizer
from tests.model.conftest import open_gates
from tests.model.test_modeling import picture

# Pictures of each process's batch, by step: other numbers of canvases, and none at all on either side.
STEPS = [
    ([(128, 64), (64, 128), (60, 120)], [(128, 128)]),
    ([], [(64, 128), (192, 64)]),
    ([(64, 128)], []),
]


def small() -> FilaConfig:
    """Nano's tokens, tiles and canvases in narrow and shallow parts."""
    nano = preset("fila-nano").vision_config
    narrow = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    return FilaConfig(
        vision_config=dict(
            vit_config=dict(**narrow, image_size=nano.image_size, patch_size=8),
            convnext_config=dict(hidden_sizes=[8, 16], depths=[2, 1], patch_size=8),
            vision_feature_layer=-1,
            image_grid_pinpoints=nano.image_grid_pinpoints,
            high_res_size=nano.high_res_size,
        ),
        text_config=dict(**narrow, vocab_size=102, max_position_embeddings=2048),
        image_token_index=4,
    )


def batch_of(processor: FilaProcessor, sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    images = [picture(height, width, i) for i, (height, width) in enumerate(sizes)]
    text = f"<bos><user>{'<image>' * len(images)}What?<assistant>42<eos>"
    batch = processor(images=images or None, text=text, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["input_ids"] == 4, -100)}


def shard(model: FilaForConditionalGeneration, units: str, low: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if low else MixedPrecisionPolicy()
    tower, language = model.model.vision_tower, model.model.language_model
    if units == "tower":
        parts = [tower, *language.layers]
    else:
        parts = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for part in [*parts, language.embed_tokens, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)


def in_process(rank: int, folder: str, units: str, checkpointed: bool, low: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME=os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    torch.set_num_threads(1)
    # A process that waits for ever says where, and fails the test.
    faulthandler.dump_traceback_later(280, exit=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        torch.manual_seed(0)
        config = small()
        single = FilaForConditionalGeneration(config).train()
        open_gates(single)
        model = copy.deepcopy(single)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(model, units, low)
        geometry = config.vision_config.geometry()
        processor = FilaProcessor(FilaImageProcessor.from_geometry(geometry), build_character_tokenizer())
        for step in STEPS:
            batches = [batch_of(processor, sizes) for sizes in step]
            single.zero_grad()
            losses = [single(**batch, use_cache=False).loss for batch in batches]
            (sum(losses) / 2).backward()
            model.zero_grad()
            loss = model(**batches[rank], use_cache=False).loss
            loss.backward()
            assert_close(loss.detach().float(), losses[rank].detach(), rtol=3e-2 if low else 1e-5, atol=0)
            if low:
                continue
            expected = {name: weight.grad for name, weight in single.named_parameters()}
            for name, weight in model.named_parameters():
                error = (weight.grad.full_tensor() - expected[name]).abs().max()
                assert error <= 1e-4 * expected[name].abs().max(), f"{name}: {float(error):.2e}"
        model.eval()
        with torch.no_grad():
            logits = model(**batches[rank]).logits
            assert_close(logits.float(), single.eval()(**batches[rank]).logits, rtol=0, atol=0.3 if low else 1e-4)
        dist.barrier()  # neither leaves while the other still listens to it
    finally:
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize(
    ("units", "checkpointed", "low"),
    [("tower", False, False), ("layers", False, False), ("layers", True, False), ("layers", False, True)],
    ids=["tower", "layers", "checkpointed", "bfloat16"],
)
def test_two_processes_with_other_pictures_compute_what_one_does(units, checkpointed, low, tmp_path):
    torch.multiprocessing.spawn(in_process, (str(tmp_path), units, checkpointed, low), nprocs=2)


@pytest.mark.parametrize("fusion", ["deep", "none"])
def test_the_units_of_sharding_are_classes_of_the_model(fusion):
    """accelerate refuses to shard a model that names another; each unit is called once per batch, as below."""
    config = preset("fila-nano")
    config.vision_config.fusion = fusion
    with torch.device("meta"):
        model = FilaForConditionalGeneration(config)
    assert model._no_split_modules <= {type(module).__name__ for module in model.modules()}
    assert {"CLIPEncoderLayer", "LlamaDecoderLayer"} <= model._no_split_modules


@torch.no_grad()
def test_every_module_of_the_tower_is_called_once_whatever_the_canvases(nano, nano_processor):
    tower = nano.model.vision_tower
    units = [m for m in tower.modules() if type(m).__name__ in (*nano._no_split_modules, "GroupedConvNextStage")]
    calls: list[object] = []
    handles = [unit.register_forward_hook(lambda module, *_: calls.append(module)) for unit in [tower.convnext, *units]]
    try:
        nano(**batch_of(nano_processor, [(128, 64), (64, 128), (60, 120), (192, 64)]))
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(map(id, calls)) == sorted(map(id, [tower.convnext, *units]))
