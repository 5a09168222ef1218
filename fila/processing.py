"""Turns questions and pictures into model inputs; an `<image>` becomes one image token per embedding of its picture."""

from collections.abc import Sequence
from typing import Any

from transformers import LlavaNextProcessor
from transformers.processing_utils import MultiModalData, ProcessingKwargs
from transformers.utils.chat_template_utils import render_jinja_template

from fila.chat import checked_message, fit
from fila.image_processing import FilaImageProcessorKwargs, flatten_images
from fila.images import Picture, load_picture

IMAGE_TOKEN = "<image>"
# Arguments of `apply_chat_template` that say what becomes of the prompt.
NOT_SHOWN = (
    "tokenize", "return_dict", "return_tensors", "continue_final_message", "return_assistant_tokens_mask",
    "processor_kwargs", "load_audio_from_video",
)  # fmt: skip


class InChat:
    """A picture that has been read, in a chat message, where newer versions of transformers take dataclasses apart."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture


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
        (torch.Size([1, 461]), torch.Size([1, 3, 3, 96, 96]))
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

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The prompt of a conversation, or with `tokenize=True` the inputs, pictures included.

        As in transformers, with three differences: a part that no FILA can answer to is refused, whatever the template
        would do with it (most leave it out in silence); the conversation is not changed; and a template that takes
        texts alone, as a language model's own, or parts alone, is given what it takes (`fila.chat`).

        Raises:
            ValueError: an empty conversation, a part of another type than text, image or image_url, a text that is no
                string, a picture under more than one key or an unknown one, or a template that leaves out some of them.
        """
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"expected a list of messages, got {conversation!r}")
        batched = isinstance(conversation[0], (list, tuple))
        checked = [[checked_message(m) for m in c] for c in (conversation if batched else [conversation])]
        for part in (part for c in checked for m in c if isinstance(m.get("content"), list) for part in m["content"]):
            if isinstance(part.get("image"), Picture):
                part["image"] = InChat(part["image"])
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        source = templates.get(chat_template or "default", chat_template)
        if isinstance(source, str):
            shown = {name: value for name, value in kwargs.items() if name not in NOT_SHOWN}
            shown |= dict(zip(("tools", "documents", "add_generation_prompt"), args, strict=False))
            shown = {**self.tokenizer.special_tokens_map, **shown}

            def render(conversations: Any, template: str) -> list[str]:
                return render_jinja_template(conversations, chat_template=template, **shown)[0]

            chat_template = fit(source, checked, self.image_token, render)
        return super().apply_chat_template(checked if batched else checked[0], chat_template, *args, **kwargs)

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
            source = source.picture if isinstance(source, InChat) else source
            found = [load_picture(item, input_data_format=order, max_side=max_side) for item in flatten_images(source)]
            return found if len(found) != 1 else found[0]

        images = read(images) if any(True for _ in flatten_images(images)) else None
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Compares the numbers of placeholders and images, per text where there is one list of images per text.

        Newer versions of transformers count, too, but take no picture that has been read for one.
        """
        if text is not None:
            self._check_placeholders(images, text)
        elif images is None:
            raise ValueError("expected at least one input, a text or a picture, got none")

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
