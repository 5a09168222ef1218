"""Gradients arrive: through checkpoints behind frozen layers, with adapters, and from a batch without a picture."""

import copy

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from fila import FilaForConditionalGeneration, preset
from tests.model.test_contract import fresh
from tests.model.test_modeling import picture
from tests.model.test_vision import nano_vision


def train_batch(processor, with_picture: bool = True) -> dict:
    image = picture(128, 64, 0) if with_picture else None
    text = f"<bos><user>{'<image>' * with_picture}What?<assistant>42<eos>"
    batch = processor(images=image, text=text, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["input_ids"] == 4, -100)}


def without_gradient(model: torch.nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize(
    "pattern", [r".*\.vit\.layers.*(q|v)_proj", r".*convnext.*pwconv[12]", r".*language_model.*(q|v)_proj"]
)
def test_adapters_get_gradients_through_checkpoints(nano_processor, pattern, prepared, reentrant):
    lora = peft.LoraConfig(target_modules=pattern, r=2, init_lora_weights=False)
    model = peft.get_peft_model(fresh(), lora)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if prepared:
        model.enable_input_require_grads()
    model.train()
    model(**train_batch(nano_processor), use_cache=False).loss.backward()
    assert not without_gradient(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_behind_frozen_ones_get_the_same_gradients_through_checkpoints(nano_processor, reentrant):
    grads = []
    torch.manual_seed(0)
    start = fresh()
    for checkpointed in (False, True):
        model = copy.deepcopy(start).train()
        tower = model.model.vision_tower
        for part in (
            tower.vit.embeddings,
            *tower.vit.layers[:3],
            tower.convnext.embeddings,
            *tower.convnext.stages[:2],
        ):
            part.requires_grad_(False)
        model.model.language_model.embed_tokens.requires_grad_(False)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**train_batch(nano_processor), use_cache=False).loss.backward()
        assert not without_gradient(model)
        grads.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("with_picture", [True, False])
def test_a_frozen_language_model_s_front_loses_no_gradient(nano_processor, with_picture):
    model = fresh().train()
    model.requires_grad_(False)
    model.model.language_model.layers[-1].requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(**train_batch(nano_processor, with_picture), use_cache=False).loss.backward()
    assert not without_gradient(model)


def test_input_embeddings_of_the_vision_classes():
    tower = nano_vision()
    assert tower.get_input_embeddings() is tower.vit.get_input_embeddings() is tower.vit.embeddings.patch_embedding
    assert tower.convnext.get_input_embeddings() is tower.convnext.embeddings.patch_embeddings
    for part in (tower, tower.convnext):
        new = copy.deepcopy(part.get_input_embeddings())
        part.set_input_embeddings(new)
        assert part.get_input_embeddings() is new


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("fusion", ["deep", "none"])
def test_a_batch_of_text_alone_is_a_step_of_distributed_training(process_group, nano_processor, fusion):
    config = preset("fila-nano")
    config.vision_config.fusion = fusion
    model = DistributedDataParallel(FilaForConditionalGeneration(config).train())
    model(**train_batch(nano_processor, with_picture=False)).loss.backward()
    assert not without_gradient(model)
    assert not model.module.model.image_newline.grad.any()
    model(**train_batch(nano_processor)).loss.backward()  # which DDP refuses after a step with unused weights
    assert model.module.model.image_newline.grad.any()


def test_text_alone_encodes_no_picture_where_nobody_waits(process_group, nano_processor):
    model = fresh()
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    batch = train_batch(nano_processor, with_picture=False)
    model.eval()(**batch)
    model.train().model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    model.model.image_newline.requires_grad_(False)
    model(**batch)
    assert not calls


@torch.no_grad()
def test_a_shard_s_prompt_of_text_alone_gathers_the_encoder(process_group, nano_processor):
    """Sharded weights are gathered from every process, in evaluation too; steps from a cache have no picture."""
    model = fresh().eval()
    batch = train_batch(nano_processor, with_picture=False)
    expected = model(**batch).logits
    fully_shard(model.model.vision_tower, mesh=init_device_mesh("cpu", (1,)))
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    out = model(**batch)
    assert torch.equal(out.logits, expected)
    assert len(calls) == 1
    model(input_ids=batch["input_ids"][:, :1], past_key_values=out.past_key_values)
    assert len(calls) == 1
    model.generate(input_ids=batch["input_ids"], max_new_tokens=3, do_sample=False)
    assert len(calls) == 2
