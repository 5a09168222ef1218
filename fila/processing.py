"""Turns questions and pictures into model inputs; an `<image>` becomes one image token per embedding of its picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlavaNextProcessor
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from fila.image_processing import FilaImageProcessorKwargs, flatten_images
from fila.images import load_picture

IMAGE_TOKEN = "<image>"
# The parts of a chat message that a FILA can answer to, and the keys under which a picture may stand.
PARTS = ("text", "image", "image_url")
PICTURE_KEYS = ("image", "url", "path", "base64")
# Goes before templates that know texts only, as language models have them (LLaMA 3, Qwen2.5, SmolLM2): makes one text
# of a message's parts, each picture a placeholder and a line break in front of it, as LLaVA-NeXT writes them.
PARTS_TO_TEXT = (
    "{%- set joined = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or message['content'] is not iterable -%}"
    "{%- set joined.messages = joined.messages + [message] -%}"
    "{%- else -%}"
    "{%- set joined.text = '' -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}"
    "{%- set joined.text = joined.text ~ 'PLACEHOLDER' ~ '\n' -%}"
    "{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{%- set joined.text = joined.text ~ part['text'] -%}"
    "{%- endfor -%}"
    "{%- set joined.messages = joined.messages + [dict(message, content=joined.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = joined.messages -%}"
)


class FilaProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """The keyword arguments of `FilaProcessor`, by what they are for."""

    images_kwargs: FilaImageProcessorKwargs
    _defaults = {"text_kwargs": {"padding": False, "return_mm_token_type_ids": False}}


class FilaProcessor(LlavaNextProcessor):
    """Joins a tokenizer and an image processor, with LLaVA-NeXT's token count.

    Args:
        image_processor: a `FilaImageProcessor`; its geometry gives the number of image tokens.
        tokenizer: any fast tokenizer that has the image token.
        chat_template: by default the tokenizer's.
        image_token: the placeholder, where the tokenizer does not name one.

    `processor(images=..., text=...)` returns `input_ids`, `attention_mask` and what `FilaImageProcessor.preprocess`
    returns. `images` holds anything that `fila.images.read_picture` reads, in the order of the placeholders, as one
    flat list for all texts or as one list for each text. A batch may hold texts without an image.

    The placeholder is recognised wherever it stands, also where a user types it into a question. Then there are more
    placeholders than images, and the call fails; no picture moves to another place.

    Raises:
        ValueError: if placeholders and images differ in number; the message gives both.
        ImageError: if a picture cannot be used.

    Example:
        >>> from PIL import Image
        >>> from fila import FilaProcessor
        >>> processor = FilaProcessor.from_pretrained("fila/pretrained/fila-nano")
        >>> inputs = processor(images=Image.new("RGB", (64, 128)), text="<image>What?", return_tensors="pt")
        >>> inputs["input_ids"].shape, inputs["pixel_values"].shape
        (torch.Size([1, 213]), torch.Size([1, 3, 3, 64, 64]))
    """

    valid_processor_kwargs = FilaProcessorKwargs

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=getattr(image_processor, "patch_size", None),
            # CLIP's class token is encoded and then dropped, as LLaVA-NeXT counts it.
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=chat_template or getattr(tokenizer, "chat_template", None),
            image_token=image_token,
            **kwargs,
        )
        if self.image_token_id in (None, getattr(tokenizer, "unk_token_id", None)):
            raise ValueError(f"expected a tokenizer with the token {self.image_token!r}, got one without it")

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """The prompt of a conversation, or with `tokenize=True` the inputs, pictures included.

        As in transformers, with three differences: a part that no FILA can answer to is refused, whatever the template
        would do with it (most leave it out in silence); the conversation is not changed; and a template that knows
        texts only, as a language model's own, is given texts, with a placeholder for each picture.

        Raises:
            ValueError: an empty conversation, a part of another type than text, image or image_url, a text that is no
                string, or a picture under more than one key or an unknown one.
        """
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"expected a list of messages, got {conversation!r}")
        batched = isinstance(conversation[0], (list, tuple))
        checked = [[_checked_message(m) for m in c] for c in (conversation if batched else [conversation])]
        template = args[0] if args else kwargs.pop("chat_template", None)
        template = self._template_of_parts(template, checked)
        return super().apply_chat_template(checked if batched else checked[0], template, *args[1:], **kwargs)

    def _template_of_parts(self, template: str | None, conversations: Sequence[Any]) -> str | None:
        """The template, made to take parts where it does not and a conversation has some."""
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        source = templates.get(template or "default", template)
        has_parts = any(not isinstance(m.get("content", ""), str) for c in conversations for m in c if m.get("content"))
        if not has_parts or not isinstance(source, str):
            return template
        lists = [m["content"] for c in conversations for m in c if isinstance(m.get("content"), list)]
        # As many as the conversation has: a template may read the first part alone.
        images, texts = ([sum(p["type"] == kind for p in parts) for parts in lists] for kind in ("image", "text"))
        image, text = [{"type": "image"}] * any(images), [{"type": "text", "text": "What?"}] * max([1, *texts])
        try:
            prompt = super().apply_chat_template([{"role": "user", "content": [*image, *text]}], source)
            found = prompt.count(self.image_token), prompt.count("What?")
            # A list that stands there as Python prints it was not read.
            takes_parts = found == (len(image), len(text)) and "'type'" not in prompt
        except Exception:  # templates raise nearly anything
            takes_parts = False
        quoted = self.image_token.replace("\\", "\\\\").replace("'", "\\'")
        return template if takes_parts else PARTS_TO_TEXT.replace("PLACEHOLDER", quoted) + source

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        """Reads every picture and keeps lists nested as they are; a batch without any picture has no images at all."""
        texts = [text] if isinstance(text, str) else text
        if texts is not None and not (isinstance(texts, (list, tuple)) and all(isinstance(t, str) for t in texts)):
            raise ValueError(f"expected text to be a string or a list of strings, got {type(text).__name__}: {text!r}")
        if texts is not None and not texts:
            raise ValueError(f"expected at least one text, got {text!r}")
        order = kwargs.get("input_data_format") or kwargs.get("images_kwargs", {}).get("input_data_format")
        max_side = self.image_processor.max_image_side

        def read(source: Any) -> Any:
            if isinstance(source, (list, tuple)):
                return [read(item) for item in source]
            found = [load_picture(item, input_data_format=order, max_side=max_side) for item in flatten_images(source)]
            return found if len(found) != 1 else found[0]

        images = read(images) if any(True for _ in flatten_images(images)) else None
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Compares the numbers of placeholders and images, per text where there is one list of images per text."""
        if text is not None:
            self._check_placeholders(images, text)
        images = None if images is None else list(flatten_images(images))
        super().validate_inputs(images=images, text=text, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        """The image processor's tensors, and for each picture the image tokens that its placeholder stands for."""
        pictures = list(flatten_images(images))
        geometry = self.image_processor.geometry
        inputs = self.image_processor(pictures, **kwargs)
        return inputs, [self.image_token * picture.layout(geometry).num_tokens for picture in pictures]

    def _check_placeholders(self, images: Any, text: Sequence[str]) -> None:
        wanted = [one.count(self.image_token) for one in text]
        kinds = {isinstance(item, list) for item in images} if isinstance(images, list) else {False}
        if len(kinds) > 1:
            # Flattened, a picture could stand in for another text's.
            raise ValueError("expected one flat list of images or one list for each text, got both kinds mixed")
        nested = kinds == {True}
        if nested and len(images) == len(text):
            for i, (placeholders, group) in enumerate(zip(wanted, images, strict=True)):
                if placeholders != len(group):
                    raise ValueError(
                        f"text {i}: expected one {self.image_token} for each image, "
                        f"got {placeholders} placeholders and {len(group)} images"
                    )
            return
        if nested:
            raise ValueError(
                f"expected one list of images for each text, got {len(images)} lists and {len(text)} texts"
            )
        given = len(list(flatten_images(images)))
        if sum(wanted) != given:
            raise ValueError(
                f"expected one {self.image_token} for each image, got {sum(wanted)} placeholders "
                f"in {len(text)} texts and {given} images"
            )

    def _get_number_of_features(self, orig_height: int, orig_width: int, height: int, width: int) -> int:
        # LLaVA-NeXT counts the class token here and takes it off again; "direct" has no tiles, which it cannot know.
        return self.image_processor.geometry.layout(orig_height, orig_width).num_tokens + 1

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        # Serving engines plan with this. One row of every image tensor belongs to an image, hence one "patch" each.
        if image_sizes is None:
            return MultiModalData()
        layouts = [self.image_processor.geometry.layout(height, width) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[layout.num_tokens for layout in layouts], num_image_patches=[1] * len(layouts)
        )


def _checked_message(message: Any) -> Any:
    """A copy of a chat message, its parts in the one form that every template knows."""
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
