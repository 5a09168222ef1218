"""Brings records of all formats into one form: a conversation in transformers' chat form, and its pictures unread.

    LLaVA      {"image": "a.png" or [...], "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
    messages   {"messages": [{"role": "user", "content": "..." or [{"type": "image"}, ...]}, ...], "images": [...]}

A picture's place in a text is kept: `<image>` splits the text into parts, and the line breaks that LLaVA writes around
it are dropped, since chat templates write their own.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fila.image_files import check_size, open_file, trusting_no_settings
from fila.images import EXIF_ORIENTATION, MAX_IMAGE_SIDE, Picture, read_picture
from fila.training.errors import RecordError

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURNED = range(5, 9)  # EXIF orientations that swap height and width


@dataclass(frozen=True)
class PictureFile:
    """A picture that has not been read: a file, a part of a file, or bytes.

    Attributes:
        name: in messages.
        source: a path, the bytes of a picture file, or a function that returns them.
    """

    name: str
    source: Path | bytes | Callable[[], bytes]

    def open(self) -> IO[bytes]:
        if isinstance(self.source, Path):
            try:
                return self.source.open("rb")
            except OSError as error:
                raise RecordError(f"picture {self.name}: {error.strerror or error}", "missing picture") from error
        return io.BytesIO(self.source if isinstance(self.source, bytes) else self.source())

    def bytes(self) -> bytes:
        with self.open() as file:
            return file.read()

    def size(self) -> tuple[int, int]:
        """Height and width as `read` gives them, from the header alone."""
        with self.open() as file, trusting_no_settings(MAX_IMAGE_SIDE):
            try:
                image = open_file(file, self.name, MAX_IMAGE_SIDE)
                turned = _orientation(image) in TURNED
                check_size(image.height, image.width, MAX_IMAGE_SIDE, self.name)
            except ValueError as error:
                raise RecordError(f"picture {error}", "broken picture") from error
            height, width = image.height, image.width
        return (width, height) if turned else (height, width)

    def read(self) -> Picture:
        try:
            with self.open() as file:
                return read_picture(file, name=self.name)
        except RecordError:
            raise
        except ValueError as error:
            raise RecordError(f"picture {error}", "broken picture") from error


def _orientation(image: Any) -> int:
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # as in reading, where a picture with broken EXIF data is not turned
        return 1


@dataclass(frozen=True)
class Record:
    """A conversation and its pictures, in the order of their parts.

    Attributes:
        name: where it comes from, in messages.
        messages: in transformers' chat form; a picture's part is {"type": "image"}.
    """

    name: str
    messages: list[dict[str, Any]]
    pictures: list[PictureFile]


def parse_json(name: str, text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise RecordError(f"{name}: expected JSON, got: {error}") from error
    if not isinstance(fields, dict):
        raise RecordError(f"{name}: expected an object, got {type(fields).__name__}")
    return fields


def make_record(name: str, fields: Mapping[str, Any], pictures: Sequence[PictureFile]) -> Record:
    """The record of these fields, pictures already found.

    Raises:
        RecordError: no conversation, unknown roles or parts, no answer, or another number of pictures than of places.
    """
    turns = fields.get("conversations") if fields.get("conversations") is not None else fields.get("messages")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RecordError(f"{name}: expected a list of turns under conversations or messages")
    messages = [_message(name, turn) for turn in turns]
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordError(f"{name}: expected an answer to learn, got none")
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places != len(pictures):
        raise RecordError(f"{name}: expected a picture for each place, got {places} places and {len(pictures)} files")
    return Record(name, [_plain(message) for message in messages], list(pictures))


def _message(name: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RecordError(f"{name}: expected turns with a role and a text, got {turn!r:.80}")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if role not in ROLES:
        raise RecordError(f"{name}: expected a role out of {', '.join(ROLES)}, got {role!r}")
    parts: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts += _split(part["text"])
        else:
            raise RecordError(f"{name}: expected parts of type text and image, got {part!r:.80}")
    if not parts:
        raise RecordError(f"{name}: expected a text in the role {role}, got an empty one")
    if ROLES[role] != "user" and any(part["type"] == "image" for part in parts):
        raise RecordError(f"{name}: expected pictures in the role user alone, got one in the role {role}")
    return {"role": ROLES[role], "content": parts}


def _split(text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(text.split(PLACEHOLDER)):
        if i:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if PLACEHOLDER in text:
            piece = piece.removesuffix("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Texts alone as one string, which every template takes."""
    parts = message["content"]
    if any(part["type"] == "image" for part in parts):
        return message
    return {"role": message["role"], "content": "".join(part["text"] for part in parts)}
