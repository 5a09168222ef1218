"""Plans a checkpoint: which tensor of which source becomes which tensor of FILA, in which file; all faults at once.

Nothing is written and, but for the search for NaN and infinity, nothing but headers is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from fila.checkpoints.keys import FUSION, HEAD, NEWLINE, PROJECTOR, KeyMap
from fila.checkpoints.sources import Source, open_file
from fila.checkpoints.weights import STORED_DTYPES, differences, not_finite
from fila.modeling import FilaForConditionalGeneration

# Tensors that may have no source.
FRESH = KeyMap("", "", {}, (FUSION, PROJECTOR, NEWLINE))
SEED = 0  # of what is initialised
ROWS_AT_ONCE = 4096  # of the vocabulary, while its mean is taken


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint: part `part` of `parts` of a source's tensor `name`, then new rows if it has more."""

    target: str
    shape: tuple[int, ...]
    dtype: str
    name: str = ""
    part: int = 0
    parts: int = 1

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * STORED_DTYPES[self.dtype].itemsize

    def read(self, tensors: Mapping[str, Any]) -> Iterator[Tensor]:
        """The numbers, row after row, in one tensor or two. New rows are the mean of the others.

        A new token is thus as likely as the average one, and never the likeliest.
        """
        tensor = tensors[self.name][...]
        tensor = tensor.chunk(self.parts)[self.part] if self.parts > 1 else tensor
        yield tensor
        if self.shape and (new := self.shape[0] - tensor.shape[0]):
            total = sum(rows.double().sum(0) for rows in tensor.split(ROWS_AT_ONCE))
            yield (total / tensor.shape[0]).to(tensor.dtype).expand(new, -1)


@dataclass(frozen=True)
class Shard:
    """A file of the checkpoint: its tensors in order, and the file of a source that holds them, if any does."""

    pieces: tuple[Piece, ...]
    source: Source | None = None
    path: Path | None = None

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


def match(
    model: FilaForConditionalGeneration, sources: Sequence[Source], vocabulary: int
) -> tuple[dict[str, Piece], list[str], list[str]]:
    """Finds a source for every tensor of the model, and a tensor of the model for every one of each source.

    Args:
        model: on the meta device.
        vocabulary: rows of the language model's embedding and head before the image token is added.

    Returns:
        The pieces by FILA's names; the names that are initialised; and the faults: tensors that are missing,
        unexpected, or of another shape or dtype.
    """
    own = model.state_dict()
    found = _match(model, own, sources, vocabulary)
    if found[2]:
        # Some language models are stored under other names, by which transformers finds them again.
        stored = revert_weight_conversion(model, dict(own))
        found = min(found, _match(model, stored, sources, vocabulary), key=lambda one: len(one[2]))
    return found


def _match(
    model: FilaForConditionalGeneration, own: Mapping[str, Tensor], sources: Sequence[Source], vocabulary: int
) -> tuple[dict[str, Piece], list[str], list[str]]:
    grown = vocabulary_names(model)
    wanted: dict[str, dict[str, Tensor]] = {source.role: {} for source in sources}
    names: dict[str, dict[str, str]] = {source.role: {} for source in sources}
    pieces: dict[str, Piece] = {}
    fresh = []
    for target, tensor in own.items():
        home = next(((source, key) for source in sources if (key := source.key_map.source(target))), None)
        if home is None:
            fresh.append(target)
            continue
        source, (name, part, parts) = home
        rows = [vocabulary] if target in grown else [size * parts for size in tensor.shape[:1]]
        wanted[source.role][name] = torch.empty([*rows, *tensor.shape[1:]], device="meta")
        names[source.role][target] = name
        if name in source.headers:
            pieces[target] = Piece(target, tuple(tensor.shape), source.headers[name].dtype, name, part, parts)
    faults = [f"tensor {name}: expected a source for it, got none" for name in fresh if not FRESH.leaves(name)]
    for source in sources:
        own_names, expected = names[source.role], wanted[source.role]
        tied = {own_names[a]: own_names[b] for a, b in model.all_tied_weights_keys.items() if {a, b} <= set(own_names)}
        stored = {name: header.shape for name, header in source.headers.items() if not source.key_map.leaves(name)}
        found = [*differences(expected, stored, tied), *_dtype_faults(source, expected)]
        faults += [f"{source.files.name}: {fault}" for fault in found]
    return pieces, fresh, faults


def vocabulary_names(model: FilaForConditionalGeneration) -> set[str]:
    """The tensors with a row for each token."""
    embedding = model.get_input_embeddings().weight
    return {HEAD, *(name for name, parameter in model.named_parameters() if parameter is embedding)}


def _dtype_faults(source: Source, wanted: Mapping[str, Tensor]) -> list[str]:
    """Tensors of other dtypes than most of their source: whoever loads them in one dtype would lose digits unseen."""
    dtypes = {name: source.headers[name].dtype for name in wanted if name in source.headers}
    usual = max(STORED_DTYPES, key=list(dtypes.values()).count)
    return [
        f"tensor {name}: expected dtype {usual}, as most of its source, got {dtype}"
        for name, dtype in sorted(dtypes.items())
        if dtype != usual
    ]


def value_faults(source: Source, progress: Callable[[int], Any]) -> list[str]:
    """The tensors of a source that are used and hold NaN or infinity."""
    faults = []
    for path in source.files.weights:
        with open_file(source.files, path) as tensors:
            used = ((name, tensor[...]) for name, tensor in tensors.items()
                    if source.key_map.targets(name) and tensor.get_dtype() in STORED_DTYPES)  # fmt: skip
            faults += [f"{source.files.name}: {fault}" for fault in not_finite(used)]
        progress(path.stat().st_size)
    return faults


def lay_out(
    pieces: Mapping[str, Piece], fresh: Mapping[str, Tensor], sources: Sequence[Source], shard_bytes: int
) -> list[Shard]:
    """The files of the checkpoint. Each takes its tensors from one file of one source, in that file's order."""
    shards = []
    for source in sources:
        for path in source.files.weights:
            names = [name for name, header in source.headers.items() if header.file == path.name]
            held = [pieces[target] for name in names for target in source.key_map.targets(name)]
            shards += [Shard(tuple(part), source, path) for part in _packed(held, shard_bytes)]
    names_of = {dtype: name for name, dtype in STORED_DTYPES.items()}
    new = [Piece(name, tuple(tensor.shape), names_of[tensor.dtype]) for name, tensor in fresh.items()]
    return shards + [Shard(tuple(part)) for part in _packed(new, shard_bytes)]


def _packed(pieces: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces in order, in groups of at most so many bytes or of one."""
    held: list[Piece] = []
    for piece in pieces:
        if held and sum(one.num_bytes for one in held) + piece.num_bytes > most:
            yield held
            held = []
        held.append(piece)
    if held:
        yield held


@torch.no_grad()
def initialise(model: FilaForConditionalGeneration, names: Sequence[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of that name as a new model has them, the same in every run."""
    owners = {name.rpartition(".")[0] for name in names}
    modules = [model.get_submodule(owner) for owner in sorted(owners, key=lambda owner: (-owner.count("."), owner))]
    tower = model.model.vision_tower
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for module in modules:
            module.to_empty(device="cpu", recurse=False)
        for module in modules:
            inner: Any = tower if any(module is one for one in tower.modules()) else model
            inner._init_weights(module)
    return {name: model.get_parameter(name).detach().to(dtype) for name in names}
