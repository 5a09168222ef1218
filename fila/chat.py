"""Checks chat messages, and fits a chat template to them so that it leaves out nothing.

Language models' templates take a message's content as one text (LLaMA 3, Qwen2.5, SmolLM2), vision-language models' as
a list of parts, and some read the first part alone. A template that is given the other kind may fail, or leave text or
pictures out in silence. `fit` therefore renders the conversation once with marks in place of its texts, and looks for
the marks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# The parts of a chat message that a FILA can answer to, and the keys under which a picture may stand.
PARTS = ("text", "image", "image_url")
PICTURE_KEYS = ("image", "url", "path", "base64")
# What a message may say beside its content.
ALSO_SAID = ("tool_calls", "function_call", "audio")

# Goes before a template: gives it messages whose content is WANTED, made of `joined.text`, where CHOSEN. That is the
# message's text with a placeholder and a line break for each picture in front, as LLaVA-NeXT writes them.
CONVERT = (
    "{%- set joined = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if CHOSEN -%}"
    "{%- set joined.text = message['content'] if message['content'] is string else '' -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}"
    "{%- set joined.text = joined.text ~ 'PLACEHOLDER' ~ '\n' -%}"
    "{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{%- set joined.text = joined.text ~ part['text'] -%}"
    "{%- endfor -%}"
    "{%- set joined.messages = joined.messages + [dict(message, content=WANTED)] -%}"
    "{%- else -%}"
    "{%- set joined.messages = joined.messages + [message] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = joined.messages -%}"
)
IS_TEXT = "message['content'] is string"
IS_LIST = "message['content'] is defined and message['content'] is iterable and message['content'] is not string"
ONE_PART = "[{'type': 'text', 'text': joined.text}]"
# What a template may be given instead of the messages as they are: CHOSEN and WANTED above.
CONVERSIONS = (
    (IS_TEXT, ONE_PART),  # lists of parts throughout
    (IS_LIST, "joined.text"),  # texts throughout
    (f"({IS_TEXT}) or ({IS_LIST})", ONE_PART),  # one part of text throughout
)


def fit(template: str, conversations: Sequence[Any], image_token: str, render: Callable[[Any, str], list[str]]) -> str:
    """The template, made to take the messages as they are where it does not.

    Args:
        conversations: lists of messages from `checked_message`.
        render: `render(conversations, template)`, the prompts.

    Raises:
        ValueError: the template leaves out some text or picture that it would take in another conversation, or what a
            message says under one of ALSO_SAID.
    """
    probes = [_probe(conversation, i) for i, conversation in enumerate(conversations)]
    fitting = _fit(template, probes, image_token, render)
    for probe in probes:
        for i, message in enumerate(probe):
            for key in ALSO_SAID:
                if not message.get(key):
                    continue
                without = [*probe[:i], {**message, key: None}, *probe[i + 1 :]]
                if render([probe], fitting) == render([without], fitting):
                    raise ValueError(
                        f"expected messages that the chat template can say, got {key!r}, which it leaves out"
                    )
    return fitting


def _fit(template: str, probes: list[list[Any]], image_token: str, render: Callable[[Any, str], list[str]]) -> str:
    quoted = image_token.replace("\\", "\\\\").replace("'", "\\'")
    conversions = [
        CONVERT.replace("CHOSEN", chosen).replace("WANTED", wanted).replace("PLACEHOLDER", quoted)
        for chosen, wanted in CONVERSIONS
    ]
    lost: dict[str, set[str]] = {}
    for conversion in ["", *conversions]:
        try:
            prompts = render(probes, conversion + template)
        except Exception:  # templates raise nearly anything
            continue
        missing = {
            mark for prompt, probe in zip(prompts, probes, strict=True) for mark in _lost(prompt, probe, image_token)
        }
        if not missing:
            return conversion + template
        lost[conversion] = missing
    if not lost:
        return template  # its own error is the best there is
    # What no conversion brings back, the template leaves out of every conversation, as some do with system messages.
    always = set.intersection(*lost.values())
    for conversion, missing in lost.items():
        if missing == always:
            return conversion + template
    raise ValueError(
        "expected a chat template that takes every text and picture of the messages, got one that leaves some out"
    )


def _probe(conversation: Sequence[Any], number: int) -> list[Any]:
    """The conversation with a mark in place of each text, and pictures without their pixels."""
    probe = []
    for i, message in enumerate(conversation):
        content = message.get("content")
        if isinstance(content, str):
            content = f"mark{number}m{i}e" if content else content
        elif isinstance(content, list):
            content = [
                {"type": "text", "text": f"mark{number}m{i}p{j}e"} if part["type"] == "text" else {"type": "image"}
                for j, part in enumerate(content)
            ]
        probe.append({**message, "content": content} if "content" in message else dict(message))
    return probe


def _lost(prompt: str, probe: Sequence[Any], image_token: str) -> Iterator[str]:
    """The marks and pictures of a conversation that its prompt lacks."""
    # A list that stands there as Python prints it was not read.
    unread = "{'type': 'text'" in prompt or "{'type': 'image'" in prompt
    said = "" if unread else prompt.lower()
    images = 0
    for message in probe:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
        for part in parts:
            if part["type"] == "image":
                images += 1
            elif part["text"] not in said:
                yield part["text"]
    if unread or prompt.count(image_token) != images:
        yield "image"


def checked_message(message: Any) -> dict[str, Any]:
    """A copy of a chat message, its parts in the one form that every template knows.

    Raises:
        ValueError: a part of another type than text, image or image_url, a text that is no string, or a picture under
            more than one key or an unknown one.
    """
    if not isinstance(message, Mapping):
        raise ValueError(f"expected a message with role and content, got {message!r}")
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    return {**message, "content": [_checked_part(part) for part in content]}


def _checked_part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PARTS:
        raise ValueError(f"expected parts of a message of type {', '.join(PARTS)}, got {kind or part!r}")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"expected a part of type text to hold a text, got {part.get('text')!r}")
        return dict(part)
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str):
            raise ValueError(f"expected a part of type image_url to hold a URL, got {part.get('image_url')!r}")
        return {"type": "image", "url": url}
    found = {key: part[key] for key in PICTURE_KEYS if part.get(key) is not None}
    unknown = {key for key in part if key not in ("type", *PICTURE_KEYS)}
    if len(found) > 1 or (unknown and not found):
        raise ValueError(
            f"expected a part of type image to hold one picture, under {', '.join(PICTURE_KEYS)}, "
            f"got {', '.join(map(str, [*found, *sorted(unknown, key=str)]))}"
        )
    if "base64" in found:
        return {"type": "image", "url": f"data:;base64,{found['base64']}"}
    return {"type": "image", **found}
