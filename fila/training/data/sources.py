"""Opens corpora: LLaVA JSON, parquet with messages, and WebDataset tars, each record by its number.

Every source is read by position: a run that goes on, or another number of workers, needs no second pass. Opening a JSON
file or a tar passes over it once, for the positions; nothing is kept in memory but these.

The formats are read here and not through `datasets` or `webdataset`: both stream, with buffers that shuffle, and cannot
say which record is the millionth of a seed without reading those before it.
"""

import mmap
import os
import re
import tarfile
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from fila.training.data.records import PictureFile, Record, make_record, parse_json
from fila.training.errors import RecordError, TrainingError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
# A string, or a bracket outside of strings.
JSON_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)
FINGERPRINTED = 1 << 20  # bytes at either end of a file that its fingerprint holds


class Source(Protocol):
    """A corpus whose records are found by number.

    `groups`: numbers of records that lie together and are read together; None where any record is found alone.
    """

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def groups(self) -> Sequence[int] | None: ...

    def __len__(self) -> int: ...

    def record(self, index: int) -> Record:
        """The record of that number, pictures unread; `RecordError` where it cannot be used."""
        ...


class JsonSource:
    """Records in a JSON array or one per line, as LLaVA publishes its data; pictures are files beside it.

    Args:
        images: the folder that names of pictures start from; the file's own by default.
    """

    groups = None

    def __init__(self, path: Path, images: Path | None = None):
        self.files, self.images = [path], images or path.parent
        self.spans = array("q")
        if not path.stat().st_size:
            raise TrainingError(f"{path}: expected records, got an empty file")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            first = re.search(rb"\S", data)
            if first is None or first[0] not in b"[{":
                raise TrainingError(f"{path}: expected a JSON array, or one JSON object per line")
            self._find_in_array(data) if first[0] == b"[" else self._find_lines(data)

    def _find_in_array(self, data: mmap.mmap) -> None:
        depth = start = 0
        for token in JSON_TOKEN.finditer(data):
            kind = token[0][:1]
            if kind in b"{[":
                depth += 1
                if depth == 2:
                    start = token.start()
            elif kind in b"}]":
                depth -= 1
                if depth == 1:
                    self.spans.extend((start, token.end()))
        if depth:
            raise TrainingError(f"{self.files[0]}: expected a closed JSON array, got a file that is cut")

    def _find_lines(self, data: mmap.mmap) -> None:
        at = 0
        while at < len(data):
            found = data.find(b"\n", at)
            end = len(data) if found < 0 else found
            if data[at:end].strip():
                self.spans.extend((at, end))
            at = end + 1

    def __len__(self) -> int:
        return len(self.spans) // 2

    def record(self, index: int) -> Record:
        start, end = self.spans[2 * index : 2 * index + 2]
        with self.files[0].open("rb") as file:
            file.seek(start)
            text = file.read(end - start)
        name = f"{self.files[0].name} record {index}"
        fields = parse_json(name, text)
        named = fields.get("image", fields.get("images"))
        named = [named] if isinstance(named, str) else named or []
        if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
            raise RecordError(f"{name}: expected names of pictures, got {named!r:.80}")
        return make_record(name, fields, [PictureFile(one, self.images / one) for one in named])


class TarSource:
    """Samples in tars as WebDataset has them: members of one key are `KEY.json` and its pictures, by name."""

    groups = None

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.keys: list[str] = []
        self.starts, self.spans = array("q"), array("q")  # of a sample its first span; tar, offset and size of each
        for number, path in enumerate(self.files):
            try:
                # Not "r:*": a compressed tar has no positions.
                with tarfile.open(path, "r:") as tar:
                    self._index(number, tar)
            except (tarfile.TarError, EOFError) as error:
                raise TrainingError(f"{path}: expected an uncompressed tar, got: {error}") from error
        self.starts.append(len(self.spans))

    def _index(self, number: int, tar: tarfile.TarFile) -> None:
        key, members = None, dict[str, tarfile.TarInfo]()
        for member in tar:
            if not member.isreg():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if (folder, stem) != key:
                self._add(number, members)
                key, members = (folder, stem), {}
            members[f".{suffix.lower()}"] = member
        self._add(number, members)

    def _add(self, number: int, members: Mapping[str, tarfile.TarInfo]) -> None:
        if ".json" not in members:
            if members:
                name = next(iter(members.values())).name
                raise TrainingError(f"{self.files[number]}: expected a .json beside {name}, got none")
            return
        pictures = [members[name] for name in sorted(members) if name.endswith(PICTURE_SUFFIXES)]
        self.keys.append(members[".json"].name.removesuffix(".json"))
        self.starts.append(len(self.spans))
        for member in (members[".json"], *pictures):
            self.spans.extend((number, member.offset_data, member.size))

    def __len__(self) -> int:
        return len(self.keys)

    def _read(self, at: int) -> bytes:
        number, offset, size = self.spans[at : at + 3]
        with self.files[number].open("rb") as file:
            file.seek(offset)
            found = file.read(size)
        if len(found) < size:
            raise RecordError(f"{self.files[number].name}: expected {size} bytes at {offset}, got {len(found)}")
        return found

    def record(self, index: int) -> Record:
        first, end = self.starts[index : index + 2]
        name = f"{self.files[self.spans[first]].name}:{self.keys[index]}"
        pictures = [
            PictureFile(f"{name} picture {i}", partial(self._read, at)) for i, at in enumerate(range(first + 3, end, 3))
        ]
        return make_record(name, parse_json(name, self._read(first)), pictures)


class ParquetSource:
    """Rows of parquet files with `messages` (or `conversations`) and `images` (or `image`), as Hugging Face has them.

    Rows are read by row group, the unit of compression; a process keeps the last group it read.
    """

    def __init__(self, files: Sequence[Path]):
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise TrainingError('parquet: expected pyarrow to be installed: pip install "fila[train]"') from error
        self.files = list(files)
        self.groups: list[int] = []
        self.places: list[tuple[int, int]] = []  # file and row group
        self.columns: list[str] = []
        for number, path in enumerate(self.files):
            try:
                metadata = pyarrow.parquet.read_metadata(path)
            except (pyarrow.ArrowException, OSError) as error:
                raise TrainingError(f"{path}: expected a parquet file, got: {error}") from error
            names = metadata.schema.to_arrow_schema().names
            self.columns = [n for n in ("messages", "conversations", "images", "image") if n in names]
            if not {"messages", "conversations"} & set(names):
                raise TrainingError(f"{path}: expected a column messages or conversations, got {', '.join(names)}")
            for group in range(metadata.num_row_groups):
                self.groups.append(metadata.row_group(group).num_rows)
                self.places.append((number, group))
        self.ends = array("q")
        for rows in self.groups:
            self.ends.append((self.ends[-1] if self.ends else 0) + rows)
        self.held: tuple[int, int, list[dict[str, Any]]] = (-1, -1, [])  # process, group, rows

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _rows(self, group: int) -> list[dict[str, Any]]:
        import pyarrow.parquet

        if self.held[:2] != (os.getpid(), group):
            number, inner = self.places[group]
            with pyarrow.parquet.ParquetFile(self.files[number]) as file:
                table = file.read_row_group(inner, columns=self.columns, use_threads=False)
            self.held = os.getpid(), group, table.to_pylist()
        return self.held[2]

    def record(self, index: int) -> Record:
        from bisect import bisect_right

        group = bisect_right(self.ends, index)
        row = index - (self.ends[group - 1] if group else 0)
        fields = self._rows(group)[row]
        number, _ = self.places[group]
        name = f"{self.files[number].name} record {index}"
        images = fields.get("images", fields.get("image"))
        images = images if isinstance(images, list) else [] if images is None else [images]
        return make_record(name, fields, [self._picture(f"{name} picture {i}", one) for i, one in enumerate(images)])

    def _picture(self, name: str, value: Any) -> PictureFile:
        if isinstance(value, bytes):
            return PictureFile(name, value)
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            return PictureFile(name, value["bytes"])
        path = value.get("path") if isinstance(value, Mapping) else value
        if isinstance(path, str):
            return PictureFile(path, self.files[0].parent / path)
        raise RecordError(f"{name}: expected bytes or a path, got {value!r:.60}")


def open_source(path: Path, images: Path | None = None) -> Source:
    """The corpus at a path: a `.json`, `.jsonl`, `.parquet` or `.tar` file, or a folder of `.parquet` or `.tar` files.

    Raises:
        TrainingError: nothing there, another kind of file, or no record.
    """
    if not path.exists():
        raise TrainingError(f"{path}: expected a corpus, got no such file or folder")
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    kinds = {suffix: [file for file in files if file.suffix == suffix] for suffix in (".parquet", ".tar")}
    found = [suffix for suffix, those in kinds.items() if those]
    if path.is_dir() and len(found) != 1:
        raise TrainingError(f"{path}: expected a folder of .parquet or of .tar files, got {found or 'none of them'}")
    source: Source
    if found == [".parquet"]:
        source = ParquetSource(kinds[".parquet"])
    elif found == [".tar"]:
        source = TarSource(kinds[".tar"])
    elif path.suffix in (".json", ".jsonl"):
        source = JsonSource(path, images)
    else:
        raise TrainingError(f"{path}: expected .json, .jsonl, .parquet or .tar, got {path.suffix or 'no suffix'}")
    if not len(source):
        raise TrainingError(f"{path}: expected records, got none")
    return source


def fingerprint(source: Source) -> str:
    """A digest of a corpus: of every file its name, its size, and a MiB at either end, and the number of records.

    Pictures that are files of their own are not looked at.
    """
    digest = sha256(str(len(source)).encode())
    for path in source.files:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(FINGERPRINTED)
            file.seek(max(0, size - FINGERPRINTED))
            digest.update(f"{path.name} {size} ".encode() + head + file.read(FINGERPRINTED))
    return digest.hexdigest()[:16]
