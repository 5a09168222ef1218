"""Turns a conversation into token ids and labels: only answers are learned, whatever the chat template.

Published templates do not mark what an answer is. So a conversation is rendered up to each answer, with the prompt that
asks for it, and up to its end: what lies between is the answer, its end token included. Each stretch is tokenized by
itself, as prompts are when the model is asked.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fila.training.data.records import Record
from fila.training.errors import RecordError, TrainingError

IGNORE = -100  # the label of a token that is not learned


@dataclass(frozen=True)
class Encoded:
    """A record as the model reads it, pictures unread.

    Attributes:
        input_ids, labels: int32 [length]; a label is the token's own id where it is learned, else `IGNORE`.
        sizes: height and width of each picture, image pixels.
    """

    record: Record
    input_ids: np.ndarray
    labels: np.ndarray
    sizes: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Encodes conversations with a processor's tokenizer, chat template and geometry.

    Raises:
        TrainingError: the template changes earlier turns when later ones follow, or writes an answer behind another
            prompt than the one that asks for it: what it was asked after would not be what it learns.
    """

    def __init__(self, processor: Any):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_token, self.image_token_id = processor.image_token, processor.image_token_id
        self.geometry = processor.image_processor.geometry
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        self.special = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        self.ends = tuple(special)
        self.stretches([{"role": r, "content": "What?"} for r in ("user", "assistant", "user", "assistant")])

    def stretches(self, messages: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
        """The rendered conversation in stretches, and whether each is learned."""
        whole = self._render(messages, False)
        found: list[tuple[str, bool]] = []
        at = 0
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:turn], True)
            said = self._render(messages[: turn + 1], False)
            if not (said.startswith(prompt) and whole.startswith(said) and len(said) > len(prompt) >= at):
                raise TrainingError(
                    "chat template: expected one that adds each turn to those before it, got one that writes turn "
                    f"{turn} in another way once it is answered or followed"
                )
            end = len(said.rstrip()) if said.rstrip().endswith(self.ends) else len(said)
            found += [(whole[at : len(prompt)], False), (whole[len(prompt) : end], True)]
            at = end
        return [*found, (whole[at:], False)]

    def _render(self, messages: Sequence[dict[str, Any]], prompt: bool) -> str:
        return self.processor.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False)

    def encode(self, record: Record) -> Encoded:
        """The record's tokens, each picture as many as the model has embeddings for it.

        Raises:
            RecordError: a picture that cannot be opened, a text that spells out a special token, or a conversation that
                the template refuses.
        """
        for message in record.messages:
            content = message["content"]
            for text in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
                if found := self.special.search(text):
                    raise RecordError(f"{record.name}: expected no special token in a text, got {found[0]!r}")
        try:
            sizes = [picture.size() for picture in record.pictures]
            stretches = self.stretches(record.messages)
        except RecordError as error:
            raise RecordError(f"{record.name}: {error}", error.kind) from error
        except TrainingError:
            raise
        except Exception as error:  # templates raise nearly anything
            raise RecordError(f"{record.name}: the chat template refuses it: {error}") from error
        counts = iter(self.geometry.layout(*size).num_tokens for size in sizes)
        ids: list[int] = []
        labels: list[int] = []
        for text, learned in stretches:
            for i, piece in enumerate(text.split(self.image_token)):
                picture = [self.image_token_id] * next(counts, 0) if i else []
                words = self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
                ids += picture + words
                labels += [IGNORE] * len(picture) + (words if learned else [IGNORE] * len(words))
        if ids.count(self.image_token_id) != sum(self.geometry.layout(*size).num_tokens for size in sizes):
            raise RecordError(f"{record.name}: the chat template leaves out a picture")
        labels[0] = IGNORE  # in a row, the token before it belongs to another record
        return Encoded(record, np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), sizes)
