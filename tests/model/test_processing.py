"""Questions and pictures together: token counts, batches, mismatches, chat, save and load."""

import base64
import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoProcessor

from fila import FilaImageProcessor, FilaProcessor, Geometry
from fila.images import ImageError
from recipes.nano.tokenizer import build_character_tokenizer

NANO_CANVASES = ((128, 256), (256, 128), (256, 256), (384, 128), (128, 384))
IMAGE_ID = 4


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8))


def nano(rule: str = "scaled") -> FilaProcessor:
    geometry = Geometry(tile=128, patch=16, canvases=NANO_CANVASES, rule=rule, fixed_size=256)
    return FilaProcessor(FilaImageProcessor.from_geometry(geometry), build_character_tokenizer())


@pytest.fixture(scope="module")
def processor() -> FilaProcessor:
    return nano()


@pytest.mark.parametrize("rule", ["scaled", "fixed", "direct"])
def test_a_placeholder_becomes_the_geometrys_tokens(rule: str) -> None:
    processor = nano(rule)
    for size in [*NANO_CANVASES, (50, 60), (1, 900), (900, 1)]:
        expected = processor.image_processor.geometry.layout(*size).num_tokens
        data = processor(images=picture(*size), text="<image>Hi", return_tensors="pt")
        assert data["input_ids"].tolist() == [[IMAGE_ID] * expected + [47, 80]]
        planned = processor._get_num_multimodal_tokens(image_sizes=[size])
        assert (planned.num_image_tokens, planned.num_image_patches) == ([expected], [1])
        assert processor._get_number_of_features(*size, 128, 128) - 1 == expected


def test_one_batch_holds_all_canvases_and_a_question_without_an_image(processor: FilaProcessor) -> None:
    images = [picture(*size) for size in NANO_CANVASES]
    texts = ["<image>What?"] * 5 + ["2+2?"]
    data = processor(images=[[image] for image in images] + [[]], text=texts, padding=True, return_tensors="pt")
    assert data["pixel_values"].shape[0] == data["high_res_pixel_values"].shape[0] == 5
    for i, text in enumerate(texts):
        alone = processor(images=images[i : i + 1], text=text, return_tensors="pt")
        length = alone["input_ids"].shape[1]
        assert torch.equal(data["input_ids"][i, -length:], alone["input_ids"][0])
        assert data["attention_mask"][i].tolist() == [0] * (data["input_ids"].shape[1] - length) + [1] * length
    flat = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert all(torch.equal(flat[name], data[name]) for name in data)


def test_several_images_keep_their_order(processor: FilaProcessor) -> None:
    sizes = [(128, 256), (384, 128)]
    counts = [processor.image_processor.geometry.layout(*size).num_tokens for size in sizes]
    data = processor(images=[picture(*size) for size in sizes], text="a<image>b<image>", return_tensors="pt")
    assert data["input_ids"][0].tolist() == [72] + [IMAGE_ID] * counts[0] + [73] + [IMAGE_ID] * counts[1]
    assert data["image_sizes"].tolist() == [list(size) for size in sizes]


@pytest.mark.parametrize("nothing", [None, [], [[], []]])
def test_questions_without_images(processor: FilaProcessor, nothing: object) -> None:
    data = processor(images=nothing, text=["Hi", "H"], padding=True, return_tensors="pt")
    assert set(data) == {"input_ids", "attention_mask"}


def test_images_without_questions(processor: FilaProcessor) -> None:
    assert "input_ids" not in processor(images=picture(9, 9), return_tensors="pt")


IMAGES = [picture(20, 30), picture(30, 20)]


@pytest.mark.parametrize(
    "images, text, message",
    [
        (IMAGES[:1], "What?", "got 0 placeholders in 1 texts and 1 images"),
        (IMAGES[:1], "<image><image>", "got 2 placeholders in 1 texts and 1 images"),
        (IMAGES, "<image>What?", "got 1 placeholders in 1 texts and 2 images"),
        (None, "<image>What?", "got 1 placeholders in 1 texts and 0 images"),
        ([[]], "<image>What?", "got 1 placeholders in 1 texts and 0 images"),
        (IMAGES[:1], ["<image>", "<image>"], "got 2 placeholders in 2 texts and 1 images"),
        ([IMAGES[:1], IMAGES[1:]], ["<image><image>", "a"], "text 0: .*got 2 placeholders and 1 images"),
        ([IMAGES[:1], IMAGES[1:]], ["<image><image>"], "one list of images for each text, got 2 lists and 1 texts"),
        ([IMAGES, picture(9, 9)], ["<image>a", "<image><image>b"], "got both kinds mixed"),
        ([picture(9, 9), IMAGES], ["<image>a", "<image><image>b"], "got both kinds mixed"),
        (None, [], r"expected at least one text, got \[\]"),
        (IMAGES[:1], [], "expected at least one text"),
        (None, 5, "expected text to be a string or a list of strings, got int"),
        (None, ["a", None], "expected text to be a string or a list of strings"),
        (None, None, "at least one input"),
    ],
)
def test_mismatches_are_refused(processor: FilaProcessor, images: object, text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_truncation_never_cuts_an_image_in_silence(processor: FilaProcessor) -> None:
    with pytest.raises(ValueError, match="Mismatch"):
        processor(images=IMAGES[:1], text="<image>Hi", truncation=True, max_length=20)


def test_pictures_come_as_paths_bytes_and_arrays(processor: FilaProcessor, tmp_path: Path) -> None:
    image = picture(20, 30)
    file = io.BytesIO()
    image.save(file, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(file.getvalue())
    expected = processor(images=image, text="<image>", return_tensors="pt")
    array = np.asarray(image)
    for source, options in (
        (path, {}),
        (str(path), {}),
        ([file.getvalue()], {}),
        (array, {}),
        (torch.tensor(array).permute(2, 0, 1), {}),
        (array, {"input_data_format": "channels_last"}),
        (array[None], {"images_kwargs": {"input_data_format": "channels_last"}}),
        (torch.tensor(array).permute(2, 0, 1), {"input_data_format": "channels_first"}),
    ):
        data = processor(images=source, text="<image>", return_tensors="pt", **options)
        assert all(torch.equal(data[name], expected[name]) for name in expected)
    with pytest.raises(ImageError, match="input_data_format"):
        processor(images=array[:3], text="<image>")
    with pytest.raises(ImageError, match="expected a picture"):
        processor(images=b"nonsense", text="<image>")


def test_calls_cannot_change_the_geometry(processor: FilaProcessor) -> None:
    with pytest.raises(ValueError, match="high_res_rule cannot be changed for one call"):
        processor(images=IMAGES[0], text="<image>", high_res_rule="direct")


def test_chat_reads_the_pictures_in_it(processor: FilaProcessor) -> None:
    image = picture(20, 30)
    content = [{"type": "text", "text": "What?"}, {"type": "image", "image": image}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<bos><user><image>What?<assistant>"
    expected = processor(images=image, text=text, return_tensors="pt")
    data = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert all(torch.equal(data[name], expected[name]) for name in expected)


def test_chat_holds_several_pictures_system_messages_and_turns(processor: FilaProcessor) -> None:
    first, second, third = picture(20, 30), picture(30, 20), picture(128, 384)
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": first},
                {"type": "text", "text": "Same?"},
                {"type": "image", "image": second},
            ],
        },
        {"role": "assistant", "content": "No"},
        {"role": "user", "content": [{"type": "image", "image": third}, {"type": "text", "text": "And?"}]},
    ]
    before = copy.copy(messages), [list(m["content"]) for m in messages]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    data = processor.apply_chat_template(messages, **options)
    text = "<bos><user><image><image>Be brief. Same?<assistant>No<eos><user><image>And?<assistant>"
    expected = processor(images=[first, second, third], text=text, return_tensors="pt")
    assert all(torch.equal(data[name], expected[name]) for name in expected)
    assert (messages, [list(m["content"]) for m in messages]) == before
    both = processor.apply_chat_template([messages, messages], padding=True, **options)
    assert torch.equal(both["input_ids"], data["input_ids"].repeat(2, 1))


def test_a_picture_in_chat_may_stand_in_every_usual_form(processor: FilaProcessor, tmp_path: Path) -> None:
    image = picture(20, 30)
    file = io.BytesIO()
    image.save(file, "PNG")
    path = tmp_path / "picture.png"
    path.write_bytes(file.getvalue())
    text = base64.b64encode(file.getvalue()).decode()
    url = f"data:image/png;base64,{text}"
    expected = processor(images=image, text="<bos><user><image>Hi", return_tensors="pt")
    for part in (
        {"type": "image", "image": image},
        {"type": "image", "url": url},
        {"type": "image", "path": str(path)},
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
    ):
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}]
        data = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert all(torch.equal(data[name], expected[name]) for name in expected), part
        assert messages[0]["content"][0] is part


KEEPS_ALL = (
    "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' }}{% endfor %}{% endfor %}"
)


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


FIRST_PART = "{% for m in messages %}{{ m['role'] + ':' + m['content'][0]['text'] }}{% endfor %}"
FIRST_PART_IN_SILENCE = "{% for m in messages %}{{ m.role ~ ':' ~ m.content[0].text }}{% endfor %}"
TEXT = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
TRIMMED_TEXT = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] | trim }}{% endfor %}"
# As Qwen3 and others: a content that is no string counts as none.
TEXT_OR_NOTHING = "{% for m in messages %}{{ m.role }}:{{ m.content if m.content is string else '' }}{% endfor %}"
PARTS_ALONE = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content if p.type == 'image' %}{{ '<image>' + '\n' }}"
    "{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)
WITHOUT_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.role }}:{{ m.content }}{% endfor %}"
PARTS_WITHOUT_SYSTEM = PARTS_ALONE.replace("in messages", "in messages if m.role != 'system'")
CHATS = {
    "texts": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes"}],
    "parts": [
        {"role": "user", "content": [text_part("Hi"), text_part(" there")]},
        {"role": "assistant", "content": [text_part("Yes")]},
    ],
    "picture": [
        {"role": "user", "content": [text_part("Hi"), {"type": "image"}, text_part(" there")]},
        {"role": "assistant", "content": "Yes"},
    ],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "template",
    [
        pytest.param(FIRST_PART, id="first part"),
        pytest.param(FIRST_PART_IN_SILENCE, id="first part in silence"),
        pytest.param(TEXT, id="text"),
        pytest.param(TRIMMED_TEXT, id="trimmed"),
        pytest.param(TEXT_OR_NOTHING, id="text or nothing"),
        pytest.param(PARTS_ALONE, id="parts"),
        pytest.param(WITHOUT_SYSTEM, id="no system"),
        pytest.param(PARTS_WITHOUT_SYSTEM, id="parts, no system"),
    ],
)
def test_no_kind_of_template_loses_a_text_or_a_picture(processor: FilaProcessor, template: str, chat: str) -> None:
    expected = f"user:{'<image>' + chr(10) if chat == 'picture' else ''}Hi thereassistant:Yes"
    assert processor.apply_chat_template(CHATS[chat], chat_template=template) == expected
    both = processor.apply_chat_template([CHATS[chat], CHATS["texts"]], chat_template=template)
    assert both == [expected, "user:Hi thereassistant:Yes"]
    system = [{"role": "system", "content": [text_part("Be brief.")]}, *CHATS[chat]]
    start = "" if "!= 'system'" in template else "system:Be brief."  # what a template never says stays unsaid
    assert processor.apply_chat_template(system, chat_template=template) == start + expected


def test_a_template_that_must_lose_something_is_refused(processor: FilaProcessor) -> None:
    """It reads system messages as text and questions by their first part: no one form serves both."""
    template = (
        "{% for m in messages %}{{ m.content if m.role == 'system' and m.content is string }}"
        "{{ m.content[0].text if m.role == 'user' }}{% endfor %}"
    )
    chat = [{"role": "system", "content": [text_part("Be brief.")]}, {"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="leaves some out"):
        processor.apply_chat_template(chat, chat_template=template)


def test_a_tool_s_call_that_a_template_cannot_say_is_refused(processor: FilaProcessor) -> None:
    call = {"role": "assistant", "content": "Yes", "tool_calls": [{"function": {"name": "sum"}}]}
    chat = [{"role": "user", "content": "Hi"}, call]
    with pytest.raises(ValueError, match="got 'tool_calls', which it leaves out"):
        processor.apply_chat_template(chat)
    assert "Yes" in processor.apply_chat_template([chat[0], {**call, "tool_calls": None}])
    template = (
        "{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"
    )
    assert processor.apply_chat_template(chat, chat_template=template) == "HiYessum"


def test_a_template_s_own_error_stays(processor: FilaProcessor) -> None:
    template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(TemplateError, match="Roles must alternate"):
        processor.apply_chat_template(CHATS["texts"], chat_template=template)


def test_messages_without_content_stay_without(processor: FilaProcessor) -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content + '!' if m.content else 'none' }}{% endfor %}"
    chat = [
        {"role": "user", "content": [text_part("Hi")]},
        {"role": "assistant"},
        {"role": "assistant", "content": None},
    ]
    assert processor.apply_chat_template(chat, chat_template=template) == "user:Hi!assistant:noneassistant:none"


@pytest.mark.parametrize(
    "part, message",
    [
        *[
            ({"type": kind}, f"got '?{kind}")
            for kind in ("input_image", "video", "audio", "document", "input_text", "file")
        ],
        ({"text": "Hi"}, "expected parts of a message of type text"),
        ("Hi", "expected parts of a message of type text"),
        ({"type": "text"}, "hold a text, got None"),
        ({"type": "text", "text": ["Hi"]}, "hold a text"),
        ({"type": "image_url"}, "hold a URL, got None"),
        ({"type": "image_url", "image_url": {"href": "a.png"}}, "hold a URL"),
        ({"type": "image", "source": {"type": "base64", "data": ""}}, "one picture, .*got source"),
        ({"type": "image", "image": "a.png", "path": "b.png"}, "one picture, .*got image, path"),
    ],
)
@pytest.mark.parametrize("template", [None, KEEPS_ALL])
def test_parts_that_no_template_may_leave_out(
    processor: FilaProcessor, part: object, message: str, template: str | None
) -> None:
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(chat, chat_template=template, tokenize=tokenize, return_dict=tokenize)


@pytest.mark.parametrize("conversation", [[], None, "Hi", ["Hi"]])
def test_no_conversation_is_refused(processor: FilaProcessor, conversation: object) -> None:
    with pytest.raises(ValueError, match=r"expected a (list of messages|message with role and content)"):
        processor.apply_chat_template(conversation)


def test_a_placeholder_typed_by_a_user_is_refused(processor: FilaProcessor) -> None:
    content = [{"type": "text", "text": "What is <image>?"}, {"type": "image", "image": picture(20, 30)}]
    with pytest.raises(ValueError, match="got 2 placeholders and 1 images"):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)


def test_image_tokens_can_be_told_from_text(processor: FilaProcessor) -> None:
    data = processor(images=IMAGES[0], text="<image>Hi", return_mm_token_type_ids=True, return_tensors="pt")
    assert torch.equal(data["mm_token_type_ids"], (data["input_ids"] == IMAGE_ID).long())


def test_a_tokenizer_without_the_placeholder_is_refused() -> None:
    tokenizer = build_character_tokenizer()
    tokenizer.image_token = "<picture>"
    with pytest.raises(ValueError, match="expected a tokenizer with the token '<picture>'"):
        FilaProcessor(FilaImageProcessor(), tokenizer)


def test_save_and_load(processor: FilaProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    expected = processor(images=IMAGES, text=["<image>What?"] * 2, padding=True, return_tensors="pt")
    for loaded in (FilaProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is FilaProcessor
        assert type(loaded.image_processor) is FilaImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.chat_template == processor.chat_template
        data = loaded(images=IMAGES, text=["<image>What?"] * 2, padding=True, return_tensors="pt")
        assert all(torch.equal(data[name], expected[name]) for name in expected)


def test_names_of_inputs(processor: FilaProcessor) -> None:
    data = processor(images=IMAGES[0], text="<image>", return_tensors="pt")
    assert set(data) == set(processor.model_input_names)
