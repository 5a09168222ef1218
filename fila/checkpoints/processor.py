"""Reads a checkpoint's processor: image settings, tokenizer and chat template, which have to fit the model.

The three are made here from files that were checked, by classes of `fila` and transformers; names of other classes,
Python files or other places are refused.
"""

from typing import Any

from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from fila.checkpoints.check import CHAT_TEMPLATE, OPTIONAL_FILES, Checkpoint, CheckpointError, shown
from fila.checkpoints.config import IGNORED, LEADING_ELSEWHERE
from fila.checkpoints.quiet import quiet
from fila.checkpoints.template import check_template, limited_time
from fila.configuration import FilaConfig
from fila.errors import is_out_of_memory, one_line, panics_as_errors
from fila.image_processing import FilaImageProcessor
from fila.processing import IMAGE_TOKEN, FilaProcessor

WHOLE_NUMBERS = ("tile_size", "patch_size", "high_res_stride", "high_res_size", "max_image_side", "resample")


def read_processor(checkpoint: Checkpoint, config: FilaConfig) -> FilaProcessor:
    """The processor of a checkpoint.

    Raises:
        CheckpointError: it cannot be made, or does not fit the configuration.
    """
    settings = _processor_settings(checkpoint)
    tokenizer = read_tokenizer(checkpoint)
    template = checkpoint.read_text(CHAT_TEMPLATE) if checkpoint.has(CHAT_TEMPLATE) else None
    template = template or settings.get("chat_template")
    for text in (template, tokenizer.chat_template):
        check_template(checkpoint, text)
    try:
        with quiet():
            images = FilaImageProcessor(**settings["image_processor"])
            processor = FilaProcessor(
                images,
                tokenizer,
                chat_template=template,
                image_token=settings.get("image_token", IMAGE_TOKEN),
            )
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
            with limited_time(checkpoint):
                prompt = processor.apply_chat_template([message], add_generation_prompt=True)
            placeholders = prompt.count(processor.image_token)
    except CheckpointError:
        raise
    except Exception as error:  # settings and templates have many ways of being wrong
        if is_out_of_memory(error):
            raise
        raise checkpoint.error(f"its processor cannot be made: {shown(one_line(error))}") from error
    if placeholders != 1 or "What?" not in prompt:
        raise checkpoint.error(
            f"expected a chat template that gives the question and one {shown(processor.image_token)}, "
            f"got {shown(one_line(repr(prompt)))}"
        )
    wanted, got = config.vision_config.geometry(), images.geometry
    if wanted != got:
        raise checkpoint.error(f"expected a processor for the model's {wanted}, got one for {got}")
    if config.vision_config.fusion != "none" and not images.do_high_res:
        raise checkpoint.error("expected do_high_res for a model that fuses a high-resolution raster, got false")
    if processor.image_token_id != config.image_token_id:
        raise checkpoint.error(
            f"expected a tokenizer with an image token of id {config.image_token_id}, got {processor.image_token_id}"
        )
    embeddings, tokens = config.text_config.vocab_size, len(tokenizer)
    if tokens > embeddings or any(not 0 <= token < embeddings for token in tokenizer.get_vocab().values()):
        raise checkpoint.error(f"expected a tokenizer of at most {embeddings} tokens, got {tokens}")
    return processor


def _processor_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of `processor_config.json`, each of its kind; an unknown name would hide a slip, or a method."""
    file = "processor_config.json"
    found = {name: value for name, value in checkpoint.read_object(file).items() if name not in IGNORED}
    images = found.get("image_processor")
    if not isinstance(images, dict):
        raise checkpoint.error(f"{file}: expected an object image_processor, got {shown(repr(images))}")
    images = {name: value for name, value in images.items() if name not in IGNORED}
    default = FilaImageProcessor().to_dict()
    faults = [
        f"{file}: expected {name} {expected!r}, got {shown(repr(got))}"
        for name, expected, got in (
            ("processor_class", "FilaProcessor", found.pop("processor_class", "FilaProcessor")),
            ("processor_class", "FilaProcessor", images.pop("processor_class", "FilaProcessor")),
            ("image_processor_type", "FilaImageProcessor", images.pop("image_processor_type", "FilaImageProcessor")),
        )
        if got != expected
    ]
    faults += [
        f"{file}: expected a setting that FILA's processor has, got {shown(name)}"
        for name in [
            *(set(found) - {"image_processor", "image_token", "chat_template"}),
            *(set(images) - set(default)),
        ]
    ]
    faults += [
        f"{file}: expected {name} to be a whole number of at least {0 if name == 'resample' else 1}, "
        f"got {shown(repr(images[name]))}"
        for name in WHOLE_NUMBERS
        if name in images and (type(images[name]) is not int or images[name] < (name != "resample"))
    ]
    canvases = images.get("image_grid_pinpoints", [])
    if not isinstance(canvases, list) or not all(
        isinstance(canvas, list) and len(canvas) == 2 and all(type(side) is int for side in canvas)
        for canvas in canvases
    ):
        faults.append(f"{file}: expected image_grid_pinpoints as pairs of whole numbers, got {shown(repr(canvases))}")
    faults += [
        f"{file}: expected {name} to be {kind.__name__}, got {shown(repr(values[name]))}"
        for values, name, kind in (
            (images, "do_high_res", bool),
            (images, "high_res_rule", str),
            (found, "image_token", str),
            (found, "chat_template", str),
        )
        if name in values and type(values[name]) is not kind
    ]
    if faults:
        raise checkpoint.error(*faults)
    return found | {"image_processor": images}


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint, or of a language model; one of transformers' fast ones.

    Raises:
        CheckpointError: it cannot be made, or needs code or other files.
    """
    kind = _tokenizer_class(checkpoint, _tokenizer_settings(checkpoint).get("tokenizer_class"))
    try:
        with quiet(), panics_as_errors():
            return kind.from_pretrained(str(checkpoint.folder), local_files_only=True)
    except Exception as error:  # tokenizer files have many ways of being wrong
        if is_out_of_memory(error):
            raise
        raise checkpoint.error(f"its tokenizer cannot be made: {shown(one_line(error))}") from error


def _tokenizer_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of `tokenizer_config.json`; it and its companions name no other file and no Python."""
    found: dict[str, Any] = {}
    for file in ("tokenizer_config.json", *(file for file in OPTIONAL_FILES[2:] if checkpoint.has(file))):
        values = checkpoint.read_object(file)
        found = found or values
        faults = [
            f"{file}: expected {shown(name)} left out, since a checkpoint is read from its own files only, "
            f"got {shown(repr(value))}"
            for name, value in values.items()
            if value is not None and (name in LEADING_ELSEWHERE or name.endswith(("_file", "_files")))
        ]
        code = values.get("auto_map")
        if code is not None and (not isinstance(code, dict) or "AutoTokenizer" in code):
            faults.append(
                f"{file}: expected a tokenizer that needs no code of the checkpoint, got auto_map {code!r:.100}"
            )
        template = values.get("chat_template")
        if template is not None and not isinstance(template, str):
            faults.append(f"{file}: expected one chat_template, got {shown(repr(template))}")
        if faults:
            raise checkpoint.error(*faults)
    return found


def _tokenizer_class(checkpoint: Checkpoint, name: Any) -> Any:
    """transformers' class of that name, with or without its old ending."""
    if not isinstance(name, str):
        raise checkpoint.error(
            f"tokenizer_config.json: expected the name of a tokenizer_class, got {shown(repr(name))}"
        )
    for candidate in (name.removesuffix("Fast"), name, f"{name}Fast"):
        found = tokenizer_class_from_name(candidate)
        if found is not None and found.__module__.startswith("transformers."):
            return found
    raise checkpoint.error(
        f"tokenizer_config.json: expected a tokenizer_class that transformers has, got {shown(repr(name))}"
    )
