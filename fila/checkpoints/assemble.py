"""Assembles a checkpoint of FILA from trained models: a CLIP vision tower, a ConvNeXt and a language model.

Every tensor of every source is either copied bit for bit or left on purpose (`fila.checkpoints.keys`), and every tensor
of FILA comes from a source or is one of those that FILA adds: the fusions, and without LLaVA-NeXT the projector and the
newline. Whatever does not fit is named before anything is written.

Source: FILA (arXiv 2412.08378), section 3.4; sizes and token order from LLaVA-NeXT.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.logging import tqdm

from fila.checkpoints.check import GENERATION, WEIGHTS_INDEX, Checkpoint, CheckpointError, locate, shown
from fila.checkpoints.config import read_generation_config
from fila.checkpoints.keys import CONVNEXT, LLAVA_NEXT, TEXT, VIT
from fila.checkpoints.load import check
from fila.checkpoints.plan import Shard, initialise, lay_out, match, value_faults
from fila.checkpoints.processor import read_tokenizer
from fila.checkpoints.quiet import quiet
from fila.checkpoints.shards import finish, is_finished, seal, unfinished, write_safetensors
from fila.checkpoints.sources import (
    Source,
    clip_vision,
    convnext_config,
    find_folder,
    find_source,
    llava_next_config,
    normalisation,
    open_file,
    text_config,
    text_names,
    vit_config,
)  # fmt: skip
from fila.checkpoints.weights import STORED_DTYPES, build_empty, open_tensors
from fila.configuration import FilaConfig, FilaVisionConfig
from fila.errors import is_out_of_memory, memory_for, one_line
from fila.image_processing import FilaImageProcessor
from fila.processing import IMAGE_TOKEN, FilaProcessor

SHARD_BYTES = 2 * 10**9
ROWS = 64  # of which an enlarged vocabulary is a multiple, as LLaVA-NeXT's are
# LLaVA-NeXT's canvases, in tiles.
CANVASES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@dataclass
class Design:
    """What a checkpoint is to be, beside its weights.

    Attributes:
        vocabulary: rows of the language model's embedding before the image token is added.
    """

    config: FilaConfig
    tokenizer: Any
    image_settings: dict[str, Any]
    generation_config: GenerationConfig
    vocabulary: int


def assemble(
    out: str | Path,
    *,
    convnext: str | Path,
    vit: str | Path | None = None,
    llm: str | Path | None = None,
    llava_next: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes a checkpoint into a new folder, whole or not at all; after a kill the same call goes on.

    Args:
        out: the folder, which must not exist.
        convnext: a folder with a ConvNeXt of open_clip, timm or transformers.
        vit, llm: folders with a CLIP vision tower of transformers or open_clip, and with a causal language model of
            transformers and its tokenizer, to which `<image>` is added.
        llava_next: in place of the two, a folder with a LLaVA-NeXT of transformers; its projector and newline are kept.
        shard_bytes: largest file, unless a single tensor is larger.

    Returns:
        The manifest, which also lies in the folder: for each source its layout, the SHA-256 of its files and the
        tensors that were left; the tensors that are new; the SHA-256 of every file written.

    Raises:
        CheckpointError: a source is of another kind or damaged, tensors do not fit (all of them are named), or the
            folder cannot be written. Sources are never written to.
        ValueError: neither or both of `llava_next` and the pair `vit`, `llm`.
    """
    target = Checkpoint(str(out), Path(out))
    with memory_for("a checkpoint's tensors"):
        if llava_next is not None and vit is None and llm is None:
            sources = [find_source("llava-next", llava_next, LLAVA_NEXT), find_source("convnext", convnext, CONVNEXT)]
            design = _design_of_llava_next(target, *sources)
        elif llava_next is None and vit is not None and llm is not None:
            text = text_config(find_folder("llm", llm))
            sources = [
                find_source("vit", vit, VIT),
                find_source("convnext", convnext, CONVNEXT),
                find_source("llm", llm, [text_names(text)]),
            ]
            design = _design_of_three(target, text, *sources)
        else:
            raise ValueError("expected either a LLaVA-NeXT, or a ViT and a language model, beside the ConvNeXt")
        vision = design.config.vision_config
        unread = vision.num_vit_layers, vision.vit_config.num_hidden_layers
        sources = [replace(source, key_map=source.key_map.without_layers(*unread)) for source in sources]
        return _write(target, design, sources, shard_bytes)


def _design_of_three(target: Checkpoint, text: Any, vit: Source, convnext: Source, llm: Source) -> Design:
    tower = vit_config(vit)
    tile = tower.image_size
    vision = dict(vit_config=tower, image_grid_pinpoints=[[rows * tile, columns * tile] for rows, columns in CANVASES])
    return _design(target, llm.files, text, vit.files, convnext, vision)


def _design_of_llava_next(target: Checkpoint, llava: Source, convnext: Source) -> Design:
    found = llava_next_config(llava.files)
    vision = dict(
        vit_config=clip_vision(llava.files, found.vision_config.to_dict()),
        image_grid_pinpoints=[list(canvas) for canvas in found.image_grid_pinpoints],
        vision_feature_layer=found.vision_feature_layer,
    )
    return _design(
        target, llava.files, found.text_config, llava.files, convnext, vision, found.image_token_index,
        projector_hidden_act=found.projector_hidden_act, multimodal_projector_bias=found.multimodal_projector_bias,
    )  # fmt: skip


def _design(
    target: Checkpoint, language: Checkpoint, text: Any, pictures: Checkpoint, convnext: Source,
    vision: dict[str, Any], image_token: int | None = None, **settings: Any,
) -> Design:  # fmt: skip
    """The design around a language model; `image_token` is its own, None where it has none yet."""
    vocabulary = text.vocab_size
    tokenizer = _tokenizer(language, text)
    if image_token is None:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        if len(tokenizer) > vocabulary:
            text.vocab_size = -(-len(tokenizer) // ROWS) * ROWS
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token not in (None, token):
        raise language.error(f"expected a tokenizer with {IMAGE_TOKEN} of id {image_token}, got {token}")
    views, raster = normalisation(pictures), normalisation(convnext.files)
    try:
        with quiet():
            config = FilaConfig(
                vision_config=FilaVisionConfig(convnext_config=convnext_config(convnext), **vision),
                text_config=text,
                image_token_index=token,
                **settings,
            )
            generation = read_generation_config(language) or GenerationConfig.from_model_config(text)
    except CheckpointError:
        raise
    except Exception as error:  # the parts' settings may contradict each other
        if is_out_of_memory(error):
            raise
        raise target.error(f"the sources do not fit each other: {shown(one_line(error))}") from error
    generation.suppress_tokens = [token]
    settings_of_raster = {f"high_res_{name}": value for name, value in raster.items() if value != views.get(name)}
    return Design(config, tokenizer, views | settings_of_raster, generation, vocabulary)


def _tokenizer(files: Checkpoint, text: Any) -> Any:
    """The language model's tokenizer.

    Raises:
        CheckpointError: another model's, or one without a chat template.
    """
    tokenizer = read_tokenizer(files)
    if not tokenizer.chat_template and files.has("chat_template.json"):
        tokenizer.chat_template = files.read_object("chat_template.json").get("chat_template")
    if not isinstance(tokenizer.chat_template, str):
        raise files.error("expected a tokenizer with a chat template, got one without; chat_template.jinja may hold it")
    most = max(tokenizer.get_vocab().values(), default=-1)
    if most >= text.vocab_size:
        raise files.error(f"expected a tokenizer of at most {text.vocab_size} tokens, got one with token {most}")
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(text, name, None)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and token not in tokenizer.added_tokens_decoder:
                raise files.error(
                    f"expected the model's own tokenizer, where {name} {token!r} is a special token, "
                    f"got {shown(repr(tokenizer.convert_ids_to_tokens(token)))}"
                )
    return tokenizer


def _write(target: Checkpoint, design: Design, sources: Sequence[Source], shard_bytes: int) -> dict[str, Any]:
    size = sum(path.stat().st_size for source in sources for path in source.files.weights)
    with tqdm(total=3 * size, unit="B", unit_scale=True, disable=None, desc="check") as bar:
        model = build_empty(target, design.config, sum(len(source.headers) for source in sources))
        pieces, fresh, faults = match(model, sources, design.vocabulary)
        hashes = {}
        for source in sources:
            hashes[source.role] = source.hashes(bar.update)
            faults += value_faults(source, bar.update)
        if faults:
            raise target.error(*faults)
        dtype = STORED_DTYPES[next(piece.dtype for name, piece in pieces.items() if name.startswith(TEXT))]
        new = initialise(model, fresh, dtype)
        design.config.dtype = dtype
        shards = lay_out(pieces, new, sources, shard_bytes)
        bar.set_description("write")
        with unfinished(target.folder, _manifest(design, sources, hashes, fresh)) as (folder, manifest):
            index: dict[str, str] = {}
            for i, shard in enumerate(shards, 1):
                name = f"model-{i:05}-of-{len(shards):05}.safetensors"
                index |= {piece.target: name for piece in shard.pieces}
                if is_finished(folder, manifest, name):
                    bar.update(shard.num_bytes)
                else:
                    finish(folder, manifest, name, partial(_write_shard, shard, new, bar.update))
            _write_settings(folder, design, index, sum(shard.num_bytes for shard in shards))
            checkpoint = locate(folder)
            with open_tensors(checkpoint) as tensors:
                check(checkpoint, tensors)
            seal(folder, manifest)
    return manifest


def _manifest(
    design: Design, sources: Sequence[Source], hashes: dict[str, dict[str, str]], fresh: Sequence[str]
) -> dict[str, Any]:
    """What the checkpoint is made of; a try that was interrupted goes on where all of this is the same."""
    entries = {
        source.role: {
            "folder": source.files.folder.resolve().name,
            "layout": source.key_map.layout,
            "files": hashes[source.role],
            "copied": sum(bool(source.key_map.targets(name)) for name in source.headers),
            "left": sorted(filter(source.key_map.leaves, source.headers)),
        }
        for source in sources
    }
    return {"sources": entries, "vocabulary": design.vocabulary, "new": sorted(fresh)}


def _write_shard(shard: Shard, new: dict[str, Tensor], progress: Any, file: Any) -> None:
    if shard.source is None or shard.path is None:
        write_safetensors(file, shard.pieces, lambda piece: [new[piece.target]], progress)
        return
    with open_file(shard.source.files, shard.path) as tensors:
        write_safetensors(file, shard.pieces, lambda piece: piece.read(tensors), progress)


def _write_settings(folder: Path, design: Design, index: dict[str, str], size: int) -> None:
    """Everything beside the weights. The chat template is the language model's own."""
    geometry = design.config.vision_config.geometry()
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}, indent=2)
    try:
        (folder / WEIGHTS_INDEX).write_text(text + "\n")
        with quiet():
            design.config.architectures = ["FilaForConditionalGeneration"]
            design.config.save_pretrained(folder)
            design.generation_config.to_json_file(folder / GENERATION)
            images = FilaImageProcessor.from_geometry(geometry, **design.image_settings)
            FilaProcessor(images, design.tokenizer).save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers has one class of error for everything, a full disk included
        raise CheckpointError(f"{folder}: its settings cannot be written: {shown(one_line(error))}") from error
