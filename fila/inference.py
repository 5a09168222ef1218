"""Answers questions about pictures, and records for each answer how it came about.

`answer_batch` is the one decoding path of the project: `fila ask`, the published score and the demo all go through it.
It keeps no state on the model or the processor, so that threads may share both.
"""

import copy
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import BatchFeature, GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fila.checkpoints.check import CheckpointError
from fila.checkpoints.load import load
from fila.confidence import calibrated, log_probabilities
from fila.errors import one_line
from fila.geometry import Layout
from fila.images import ImageSource, Picture, read_picture
from fila.legibility import smallness
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
# A tokenizer that was saved with padding switches it off at its first call; it must not do so while it is in use.
_tokenizing = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """The model's answer to a question about one picture, and how it came about.

    Attributes:
        picture: the picture's name in messages.
        question, text: the question and the answer, special tokens left out.
        confidence: the probability that the answer is right, by the checkpoint's calibration; None where it has none.
        token_probability: geometric mean of the probabilities of the answer's tokens, the one that ends it included.
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
    confidence: float | None
    token_probability: float
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
        raise ValueError(f"expected one question per picture, got {len(questions)} for {len(images)}")
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
    inputs = _inputs(processor, pictures, questions).to(model.device)
    _check_length(model, inputs["input_ids"].shape[1], max_new_tokens)
    clock.lap("preprocess")
    image = model.get_image_features(
        inputs["pixel_values"],
        inputs["image_sizes"],
        high_res_pixel_values=inputs.get("high_res_pixel_values"),
        return_dict=True,
    )
    clock.lap("encode")
    ends = _end_tokens(model, processor)
    said, sure = _generate(model, _greedy(processor, ends, max_new_tokens), inputs, image)
    clock.lap("generate")

    geometry, config = processor.image_processor.geometry, model.config
    answers = []
    for picture, question, tokens, logs in zip(pictures, questions, said, sure, strict=True):
        layout = picture.layout(geometry)
        found = [*picture.notes, *_layout_notes(layout), *_question_notes(processor, question)]
        if small := smallness(picture, layout, config.smallest_capital):
            found.append(small)
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        if end is None:
            found.append(f"the answer was cut off after {max_new_tokens} tokens")
        mean = fmean(logs[: None if end is None else end + 1])
        answers.append(
            Answer(
                picture=picture.name,
                question=question,
                text=processor.decode(tokens[:end], skip_special_tokens=True).strip(),
                confidence=calibrated(mean, config.answer_calibration) if config.answer_calibration else None,
                token_probability=math.exp(mean),
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
    special = _special_tokens(processor)
    spelled = next((token for token in special if token in question), None)
    if spelled is None:
        # Also where the tokenizer or the template first changes letters, spaces or line breaks.
        unknown = processor.tokenizer.unk_token_id
        of_template = _special_ids(processor, "?")
        added = [token for token in _special_ids(processor, question) if token != unknown]
        for token in of_template:
            if token in added:
                added.remove(token)
        spelled = next((name for name, token in special.items() if token in added), None)
    if spelled is not None:
        raise ValueError(
            f"question: expected plain text, got the special token {spelled!r} in it; leave it out "
            "(the picture needs no placeholder)"
        )


def fusion_backend(model: FilaForConditionalGeneration, layout: Layout) -> dict[str, Any]:
    """The backend and, for each fusion depth, the forward plan by which a picture of this layout is encoded."""
    tower = model.model.vision_tower
    config = tower.config
    if not len(tower.fusion):
        return {"choice": "none", "why": "the model has fusion off", "stages": []}
    tokens = (layout.num_views, config.num_prefix_tokens + layout.geometry.grid**2, config.hidden_size)
    maps = [
        (1, layout.raster[0] // stride, layout.raster[1] // stride, channels)
        for stride, channels in zip(config.convnext_strides, config.convnext_config.hidden_sizes, strict=True)
    ]
    backend = {"choice": "none", "why": f"the fusion {config.fusion!r} does not use fila_kernels"}
    stages = []
    for vit_layer, fusion in zip(config.fusion_layers, tower.fusion, strict=True):
        found = fusion.describe(tokens, maps, model.dtype, model.device)
        backend = found.get("backend", backend)
        stages.append(
            {"vit_layer": vit_layer, "convnext_stage": fusion.convnext_stage, "forward": found.get("forward")}
        )
    return {**backend, "stages": stages}


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


def _chat(question: str, picture: Picture | None = None) -> list[dict[str, Any]]:
    image = {"type": "image"} if picture is None else {"type": "image", "image": picture}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def _inputs(processor: FilaProcessor, pictures: Sequence[Picture], questions: Sequence[str]) -> BatchFeature:
    """The processor's tensors of the chats, padded on the left, where generation needs it.

    Padding is done here: a tokenizer may pad on the right, lack a token to pad with, and keeps how it pads as state.
    """
    chats = [_chat(question, picture) for question, picture in zip(questions, pictures, strict=True)]
    with _tokenizing:
        inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
    rows = inputs.pop("input_ids")
    longest = max(map(len, rows))
    pad = _pad_token(processor)
    data = {
        name: torch.as_tensor(inputs[name]) for name in processor.image_processor.model_input_names if name in inputs
    }
    data["input_ids"] = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    data["attention_mask"] = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return BatchFeature(data)


def _pad_token(processor: FilaProcessor) -> int:
    """The token in places that nothing looks at."""
    tokenizer = processor.tokenizer
    found = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None)
    return next(found, 0)


def _special_tokens(processor: FilaProcessor) -> dict[str, int]:
    """Every special token with its id: the named ones, and those that the tokenizer merely marks as special."""
    tokenizer = processor.tokenizer
    marked = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return marked | named


def _special_ids(processor: FilaProcessor, question: str) -> list[int]:
    """The special tokens of the question's prompt, without those that the tokenizer adds around a text."""
    try:
        prompt = processor.apply_chat_template(_chat(question), add_generation_prompt=True)
    except Exception as error:  # templates raise nearly anything
        raise ValueError(f"question: expected one that the chat template takes, got: {one_line(error)}") from error
    special = set(_special_tokens(processor).values())
    return [token for token in _encode(processor, prompt) if token in special]


def _encode(processor: FilaProcessor, text: str) -> list[int]:
    with _tokenizing:
        return processor.tokenizer(text, add_special_tokens=False, padding=False)["input_ids"]


def _check_length(model: FilaForConditionalGeneration, prompt: int, new: int) -> None:
    most = model.config.text_config.max_position_embeddings
    if prompt + new > most:
        raise ValueError(
            f"question: expected picture, question and {new} new tokens to fit the model's {most} tokens, "
            f"got {prompt + new}; ask a shorter question or allow fewer new tokens"
        )


def _generate(
    model: FilaForConditionalGeneration,
    settings: GenerationConfig,
    inputs: BatchFeature,
    image: BaseModelOutputWithPooling,
) -> tuple[list[list[int]], list[list[float]]]:
    """The new tokens of every prompt, whose pictures are encoded already, and the log-probability of each.

    Raises:
        ValueError: the model computes NaN or infinity.
    """
    # `generate` fills fields that `settings` leaves open from the model's own settings. A shallow copy shares the
    # weights and has these settings for its own, so that the shared model is not touched.
    generator = copy.copy(model)
    generator.generation_config = settings
    ids = inputs["input_ids"]
    out = generator.generate(
        ids,
        generation_config=settings,
        attention_mask=inputs["attention_mask"],
        mm_encoder_outputs={"image": image},
    )
    if not all(torch.isfinite(logits).all() for logits in out.logits):
        raise ValueError(f"expected finite numbers from the model in {model.dtype}, got NaN or infinity")
    new = out.sequences[:, ids.shape[1] :]
    return new.tolist(), log_probabilities(out.logits, new).tolist()


def _greedy(processor: FilaProcessor, ends: set[int], max_new_tokens: int) -> GenerationConfig:
    """Settings for greedy decoding."""
    return GenerationConfig(
        eos_token_id=sorted(ends) or None,
        pad_token_id=_pad_token(processor),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
    )


def _end_tokens(model: FilaForConditionalGeneration, processor: FilaProcessor) -> set[int]:
    """The tokens that end an answer: tokenizer, language model and checkpoint may each name others, one or several."""
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
    unknown = processor.tokenizer.unk_token_id
    if unknown is not None and unknown in _encode(processor, question):
        strange = [c for c in dict.fromkeys(question) if unknown in _encode(processor, c)]
        yield f"the model does not know the characters {''.join(strange)!r} of the question"
