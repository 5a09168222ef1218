"""Answers questions about pictures, and records for each answer how it came about.

`answer_batch` is the one decoding path of the project: `fila ask`, the published score and the demo all go through it.
It keeps no state on the model or the processor, so that threads may share both.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

import fila_kernels
from fila.checkpoints.check import CheckpointError
from fila.checkpoints.load import load
from fila.geometry import Layout
from fila.images import ImageSource, Picture, read_picture
from fila.modeling import FilaForConditionalGeneration
from fila.processing import FilaProcessor

__all__ = [
    "Answer",
    "CheckpointError",
    "answer",
    "answer_batch",
    "check_question",
    "fusion_backend",
    "load",
]

MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """The model's answer to a question about one picture, and how it came about.

    Attributes:
        picture: the picture's name in messages.
        question, text: the question and the answer, special tokens left out.
        image_size: height and width, image pixels, after EXIF rotation.
        canvas: height and width, canvas pixels. tiles: rows and columns; (0, 0) where the model does not crop.
        tiles_reach_llm: False for pictures so long that LLaVA-NeXT's unpadding leaves no tile token.
        visual_tokens: number of embeddings that the language model received for the picture, newlines included.
        seconds: of "preprocess", "encode" (the hybrid encoder and projector) and "generate"; of the whole batch.
        backend: "choice" and "why" of the CVFM's backend, and per fusion depth the forward plan and why.
        warnings: what a user should know before relying on the answer.
    """

    picture: str
    question: str
    text: str
    image_size: tuple[int, int]
    canvas: tuple[int, int]
    tiles: tuple[int, int]
    tiles_reach_llm: bool
    visual_tokens: int
    seconds: dict[str, float]
    backend: dict[str, Any]
    warnings: tuple[str, ...]


def answer(
    model: FilaForConditionalGeneration,
    processor: FilaProcessor,
    image: ImageSource,
    question: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    name: str | None = None,
) -> Answer:
    """The greedy answer to a question about one picture; see `answer_batch`.

    Args:
        image: anything that `fila.images.read_picture` reads. name: the picture's name in messages.

    Example:
        >>> model, processor = load()                                                      # doctest: +SKIP
        >>> answer(model, processor, "examples/receipt.png", "What is the total?").text    # doctest: +SKIP
    """
    return answer_batch(model, processor, [image], [question], max_new_tokens=max_new_tokens, names=[name])[0]


@torch.inference_mode()
def answer_batch(
    model: FilaForConditionalGeneration,
    processor: FilaProcessor,
    images: Sequence[ImageSource],
    questions: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    names: Sequence[str | None] | None = None,
) -> list[Answer]:
    """Greedy answers to one question per picture, as one batch.

    Args:
        images, questions: equally many. names: the pictures' names in messages.
        max_new_tokens: longest answer, tokens; a longer one is cut off, and a warning says so.

    Raises:
        ImageError: a picture cannot be used.
        ValueError: a question is empty, holds a special token, or is too long for the model; a number of new tokens is
            out of range; the model computes NaN or infinity.
    """
    if len(images) != len(questions):
        raise ValueError(f"expected one question a picture, got {len(questions)} for {len(images)}")
    if not images:
        return []
    for question in questions:
        check_question(processor, question)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    clock = _Clock(model.device)

    pictures = [
        _read(image, processor, name) for image, name in zip(images, names or [None] * len(images), strict=True)
    ]
    prompts = [_prompt(processor, question) for question in questions]
    inputs = processor(images=pictures, text=prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = inputs.to(model.device)
    _check_length(model, inputs["input_ids"].shape[1], max_new_tokens)
    clock.lap("preprocess")
    embeds = _embed(model, inputs)
    clock.lap("encode")
    settings = _greedy(model, processor, max_new_tokens)
    said = _generate(model, settings, embeds, inputs["attention_mask"])
    clock.lap("generate")

    geometry = processor.image_processor.geometry
    answers = []
    for picture, question, tokens in zip(pictures, questions, said, strict=True):
        layout = picture.layout(geometry)
        found = [*picture.notes, *_layout_notes(layout), *_question_notes(processor, question)]
        if not set(settings.eos_token_id or ()) & set(tokens):
            found.append(f"the answer was cut off after {max_new_tokens} tokens")
        answers.append(
            Answer(
                picture=picture.name,
                question=question,
                text=processor.decode(tokens, skip_special_tokens=True).strip(),
                image_size=(layout.height, layout.width),
                canvas=layout.canvas,
                tiles=(layout.rows, layout.columns),
                tiles_reach_llm=layout.tiles_reach_llm,
                visual_tokens=layout.num_tokens,
                seconds=dict(clock.seconds),
                backend=fusion_backend(model, layout),
                warnings=tuple(found),
            )
        )
    return answers


def check_question(processor: FilaProcessor, question: str) -> None:
    """Refuses a text that cannot be asked.

    Raises:
        ValueError: empty, not text, or with a special token spelled out, which the tokenizer would take for one.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question: expected some text, got {question!r}")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"question: expected text in UTF-8, got {question!r}") from error
    for token in processor.tokenizer.all_special_tokens:
        if token in question:
            raise ValueError(
                f"question: expected plain text, got the special token {token!r} in it; leave it out "
                "(the picture needs no placeholder)"
            )


def fusion_backend(model: FilaForConditionalGeneration, layout: Layout) -> dict[str, Any]:
    """The backend and, for each fusion depth, the forward plan by which a picture of this layout is encoded."""
    tower = model.model.vision_tower
    config = tower.config
    if not len(tower.fusion):
        return {"choice": "none", "why": "the model has fusion off", "stages": []}
    tokens = (layout.num_views, 1 + layout.geometry.grid**2, config.hidden_size)
    stages = []
    for i, (fusion, stride) in enumerate(zip(tower.fusion, config.convnext_strides, strict=True)):
        height, width = (side // stride for side in layout.raster)
        found = fila_kernels.explain(
            tokens, (1, height, width, config.convnext_config.hidden_sizes[i]), config.fusion_hidden_size,
            dtype=model.dtype, device=model.device, plan=fusion.plan, backend=fusion.backend,
        )  # fmt: skip
        stages.append({"vit_layer": config.fusion_layers[i], "convnext_stage": i + 1, "forward": found["forward"]})
    return {**found["backend"], "stages": stages}


class _Clock:
    """Seconds by name; an accelerator is waited for before each reading."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = self.now()

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        """Records the time since the last lap."""
        now = self.now()
        self.seconds[name], self.last = now - self.last, now


def _read(image: ImageSource, processor: FilaProcessor, name: str | None) -> Picture:
    name = name or (str(image) if isinstance(image, (str, Path)) else None)
    return read_picture(image, max_side=processor.image_processor.max_image_side, name=name)


def _prompt(processor: FilaProcessor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def _check_length(model: FilaForConditionalGeneration, prompt: int, new: int) -> None:
    most = model.config.text_config.max_position_embeddings
    if prompt + new > most:
        raise ValueError(
            f"question: expected picture, question and {new} new tokens to fit the model's {most} tokens, "
            f"got {prompt + new}; ask a shorter question or allow fewer new tokens"
        )


def _embed(model: FilaForConditionalGeneration, inputs: Any) -> Tensor:
    """[batch, length, width]: the prompts' embeddings, with the pictures' in the places of the image tokens."""
    image = model.get_image_features(
        inputs["pixel_values"],
        inputs["image_sizes"],
        high_res_pixel_values=inputs.get("high_res_pixel_values"),
    )
    ids = inputs["input_ids"]
    return model.model.embed(ids, model.get_input_embeddings()(ids), image)


def _generate(
    model: FilaForConditionalGeneration, settings: GenerationConfig, embeds: Tensor, attention_mask: Tensor
) -> list[list[int]]:
    """The new tokens of every prompt.

    Raises:
        ValueError: the model computes NaN or infinity.
    """
    # `generate` fills fields that `settings` leaves open from the model's own settings. A shallow copy shares the
    # weights and has these settings for its own, so that the shared model is not touched.
    generator = copy.copy(model)
    generator.generation_config = settings
    out = generator.generate(inputs_embeds=embeds, attention_mask=attention_mask, generation_config=settings)
    if not all(torch.isfinite(logits).all() for logits in out.logits):
        raise ValueError(f"expected finite numbers from the model in {model.dtype}, got NaN or infinity")
    return out.sequences.tolist()


def _greedy(model: FilaForConditionalGeneration, processor: FilaProcessor, max_new_tokens: int) -> GenerationConfig:
    """Settings for greedy decoding."""
    return GenerationConfig(
        eos_token_id=sorted(_end_tokens(model, processor)) or None,
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        # A generated image token would ask for an image feature that does not exist.
        suppress_tokens=[model.config.image_token_id],
        return_dict_in_generate=True,
        output_logits=True,
    )


def _end_tokens(model: FilaForConditionalGeneration, processor: FilaProcessor) -> set[int]:
    """The tokens that end an answer: tokenizer, language model and checkpoint may each name others."""
    found: set[int] = set()
    for ends in (
        processor.tokenizer.eos_token_id, model.config.text_config.eos_token_id, model.generation_config.eos_token_id
    ):  # fmt: skip
        found |= set(ends) if isinstance(ends, (list, tuple)) else set() if ends is None else {ends}
    return found


def _layout_notes(layout: Layout) -> Iterator[str]:
    if layout.rows and not layout.tiles_reach_llm:
        yield (
            f"the picture is {layout.width}x{layout.height} pixels, so long that no tile reaches the language model "
            "(as in LLaVA-NeXT): the answer rests on the small view of the whole picture"
        )


def _question_notes(processor: FilaProcessor, question: str) -> Iterator[str]:
    tokenizer = processor.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in tokenizer.encode(question, add_special_tokens=False):
        strange = [c for c in dict.fromkeys(question) if unknown in tokenizer.encode(c, add_special_tokens=False)]
        yield f"the model does not know the characters {''.join(strange)!r} of the question"
