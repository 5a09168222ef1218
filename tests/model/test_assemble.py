"""Checkpoints assembled from other models: every layout, bit for bit, answers as the sources; and back again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fila.checkpoints.assemble import assemble
from fila.checkpoints.export import export_tower
from fila.checkpoints.load import load
from fila.cli import main
from fila.vision import group_views
from tests.model.source_models import LANGUAGE_MODELS, save_convnext, save_llava_next, save_llm, save_vit

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether every tensor of the first is the second's, bit for bit."""
    return bool(got) and all(
        tensor.dtype == wanted[n].dtype and torch.equal(tensor, wanted[n]) for n, tensor in got.items()
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder with a model of each kind."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    save_vit(folder / "vit")
    save_convnext(folder / "convnext")
    for kind in LANGUAGE_MODELS:
        save_llm(folder / kind, kind)
    save_llava_next(folder / "llava-next")
    return folder


@pytest.fixture(scope="module")
def towers(sources) -> dict[str, Path]:
    return {"vit": sources / "vit", "convnext": sources / "convnext"}


@pytest.fixture(scope="module")
def assembled(sources, towers, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("assembled") / "fila"
    assemble(out, **towers, llm=sources / "smollm2")
    return out


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_language_model_answers_text_as_before(kind, sources, towers, tmp_path):
    manifest = assemble(tmp_path / "fila", **towers, llm=sources / kind)
    assert manifest["sources"]["llm"]["left"] == []
    model, processor = load(tmp_path / "fila")
    source = AutoModelForCausalLM.from_pretrained(sources / kind)
    tokenizer = AutoTokenizer.from_pretrained(sources / kind)
    chat = [{"role": "user", "content": "What is 1?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == text  # the language model's own template
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert torch.equal(
        processor(text=text, return_tensors="pt", add_special_tokens=False)["input_ids"], prompt["input_ids"]
    )
    rows = source.config.vocab_size
    with torch.no_grad():
        got, wanted = model(**prompt).logits, source(**prompt).logits
    assert torch.allclose(got[..., :rows], wanted, atol=1e-5)
    # New tokens are the mean of the others, so that none of them is ever the likeliest.
    assert got.argmax(-1).max() < rows
    assert model.config.image_token_id == len(tokenizer) == processor.image_token_id
    assert processor.apply_chat_template(QUESTION, add_generation_prompt=True).count("<image>") == 1


def test_towers_encode_as_in_the_library_they_came_from(assembled, sources):
    from transformers import CLIPVisionModel, ConvNextModel

    model, _ = load(assembled)
    tower = model.model.vision_tower
    views, raster = torch.randn(3, 3, 28, 28), torch.randn(1, 3, 128, 256)
    with torch.no_grad():
        clip = CLIPVisionModel.from_pretrained(sources / "vit")(views, output_hidden_states=True).hidden_states
        convnext = ConvNextModel.from_pretrained(sources / "convnext")(raster, output_hidden_states=True).hidden_states
        (maps,) = tower.convnext(raster)
        for fusion in tower.fusion:
            assert float(fusion.alpha) == 0  # training starts from the untouched ViT
        geometry = model.config.vision_config.geometry()
        layout = geometry.layout(28, 56)
        groups = group_views([layout], model.config.vision_config.convnext_strides, views.device)
        encoded = tower.encode(views[: layout.num_views], [raster[..., : layout.raster[0], : layout.raster[1]]], groups)
    assert torch.allclose(encoded, clip[-2][: layout.num_views], atol=1e-5)
    for got, wanted in zip(maps, convnext[1:], strict=True):
        assert torch.allclose(got.permute(0, 3, 1, 2), wanted, atol=1e-5)


def test_towers_come_out_again_bit_for_bit(assembled, sources):
    manifest = json.loads((assembled / "assembly.json").read_text())
    for role, folder in (("vit", "vit"), ("convnext", "convnext"), ("llm", "smollm2")):
        source, got = stored(sources / folder), export_tower(assembled, role)
        assert same(got, source)
        assert sorted(got) == sorted(set(source) - set(manifest["sources"][role]["left"]))
    with pytest.raises(ValueError, match="llava-next of a known layout"):
        export_tower(assembled, "llava-next")


def test_what_is_left_and_new_is_what_is_meant(assembled):
    manifest = json.loads((assembled / "assembly.json").read_text())
    left = manifest["sources"]["vit"]["left"]
    # Layer -2 is read: the last one has no use.
    assert {name.split(".")[3] for name in left if name.startswith("vision_model.encoder.layers")} == {"5"}
    assert {name.split(".")[0] for name in left} == {
        "text_model", "vision_model", "text_projection", "visual_projection", "logit_scale",
    }  # fmt: skip
    assert {name.split(".")[1] if "fusion" not in name else "fusion" for name in manifest["new"]} == {
        "fusion", "image_newline", "multi_modal_projector",
    }  # fmt: skip


@pytest.mark.parametrize("hub", [False, True], ids=["transformers 5", "hub"])
def test_a_llava_next_keeps_its_projector_and_answers_as_before(hub, sources, tmp_path):
    source = sources / "llava-next"
    if hub:  # the names that transformers 4 wrote
        source = tmp_path / "hub"
        source.mkdir()
        for file in (sources / "llava-next").iterdir():
            if file.suffix != ".safetensors":
                (source / file.name).write_bytes(file.read_bytes())
        tensors = stored(sources / "llava-next")
        renamed = {
            name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()
        }
        save_file(renamed, source / "model.safetensors", {"format": "pt"})
    manifest = assemble(tmp_path / "fila", llava_next=source, convnext=sources / "convnext")
    assert {name.split(".")[2] for name in manifest["new"]} == {"fusion"}
    assert same(export_tower(tmp_path / "fila", "llava-next"), stored(source))
    model, processor = load(tmp_path / "fila")

    from PIL import Image
    from transformers import LlavaNextForConditionalGeneration

    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(images=Image.effect_noise((70, 50), 80), text=prompt, return_tensors="pt")
    llava = LlavaNextForConditionalGeneration.from_pretrained(sources / "llava-next")
    with torch.no_grad():
        got = model(**inputs).logits
        inputs.pop("high_res_pixel_values")
        wanted = llava(**inputs).logits
    assert torch.allclose(got, wanted, atol=1e-5)  # gates are closed


def test_shards_pickles_and_dtypes(sources, towers, tmp_path):
    llm = tmp_path / "llm"
    save_llm(llm, "llama3", torch.bfloat16, shard="20KB")
    assert len(list(llm.glob("*.safetensors"))) > 3
    vit = tmp_path / "vit"
    vit.mkdir()
    (vit / "config.json").write_bytes((sources / "vit" / "config.json").read_bytes())
    torch.save(stored(sources / "vit"), vit / "pytorch_model.bin")
    out = tmp_path / "fila"
    assemble(out, vit=vit, convnext=sources / "convnext", llm=llm, shard_bytes=20_000)
    assert same(export_tower(out, "llm"), stored(llm))
    assert same(export_tower(out, "vit"), stored(sources / "vit"))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 20_000 or len(sizes) == 1


def test_transformers_finds_the_classes_by_the_stub(assembled):
    # In this process the classes are known already; `trust_remote_code` would read the stub elsewhere.
    assert json.loads((assembled / "config.json").read_text())["auto_map"]["AutoConfig"] == "fila_auto.FilaConfig"
    assert "from fila import" in (assembled / "fila_auto.py").read_text()
    assert AutoConfig.from_pretrained(assembled).model_type == "fila"


def test_the_command_line_assembles_and_says_what_it_did(sources, towers, tmp_path, capsys):
    arguments = [
        "assemble",
        "--vit",
        str(towers["vit"]),
        "--convnext",
        str(towers["convnext"]),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "fila: error: expected either a LLaVA-NeXT, or a ViT and a language model, beside the ConvNeXt\n"
    )
    assert main([*arguments, "--llm", str(sources / "qwen3")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "llm: qwen3, 25 tensors copied, 0 left (causal language model of transformers, model)" in captured.out
    assert main([*arguments, "--llm", str(sources / "qwen3")]) == 2
    assert "expected a name that is free" in capsys.readouterr().err
