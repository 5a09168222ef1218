"""The character tokenizer: fixed ids, exact round trips, and the chat template's turns."""

import string
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.nano.tokenizer import CHARACTERS, SPECIAL_TOKENS, build_character_tokenizer

TOKENIZER = build_character_tokenizer()
PRINTABLE = "".join(CHARACTERS)


def test_ids_are_fixed() -> None:
    assert SPECIAL_TOKENS == ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>")
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(7))
    assert TOKENIZER(PRINTABLE).input_ids == list(range(7, 102))
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 102
    assert set(PRINTABLE) == set(string.printable) - set("\t\n\r\v\f")


def test_special_tokens_have_their_names() -> None:
    names = ("pad", "bos", "eos", "unk", "image", "user", "assistant")
    assert [getattr(TOKENIZER, f"{name}_token") for name in names] == list(SPECIAL_TOKENS)
    assert [getattr(TOKENIZER, f"{name}_token_id") for name in names] == list(range(7))


@settings(max_examples=50)
@given(st.text(PRINTABLE))
def test_printable_text_survives(text: str) -> None:
    if any(token in text for token in SPECIAL_TOKENS):
        return
    ids = TOKENIZER(text).input_ids
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["", " ", "  a   b  ", "it 's , a . test !", "<imag>", "<", "##x", "\\n"])
def test_awkward_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@pytest.mark.parametrize(
    "text, ids", [("é", [3]), ("a\nb", [72, 3, 73]), ("\t", [3]), ("日本", [3, 3]), ("a\r\nb", [72, 3, 3, 73])]
)
def test_other_characters_are_unknown(text: str, ids: list[int]) -> None:
    assert TOKENIZER(text).input_ids == ids


def test_a_special_token_spelled_out_is_that_token() -> None:
    assert TOKENIZER("a<image>b").input_ids == [72, 4, 73]
    assert TOKENIZER.decode([1, 72, 2, 0], skip_special_tokens=True) == "a"


def test_padding_is_on_the_left_and_masked() -> None:
    batch = TOKENIZER(["abc", "a"], padding=True)
    assert batch.input_ids == [[72, 73, 74], [0, 0, 72]]
    assert batch.attention_mask == [[1, 1, 1], [0, 0, 1]]


USER = {"role": "user", "content": [{"type": "text", "text": "What? "}, {"type": "image"}, {"type": "image"}]}


@pytest.mark.parametrize(
    "messages, prompt, expected",
    [
        ([{"role": "user", "content": "Hi"}], True, "<bos><user>Hi<assistant>"),
        ([{"role": "user", "content": "Hi"}], False, "<bos><user>Hi"),
        ([USER], True, "<bos><user><image><image>What? <assistant>"),
        (
            [USER, {"role": "assistant", "content": " 42 "}, {"role": "user", "content": "And?"}],
            True,
            "<bos><user><image><image>What? <assistant> 42 <eos><user>And?<assistant>",
        ),
        (
            [USER, {"role": "assistant", "content": [{"type": "text", "text": "42"}]}],
            False,
            "<bos><user><image><image>What? <assistant>42<eos>",
        ),
    ],
)
def test_chat_template(messages: list, prompt: bool, expected: str) -> None:
    assert TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == expected


def test_the_answer_and_its_end_are_what_is_learned() -> None:
    messages = [USER, {"role": "assistant", "content": "42"}]
    data = TOKENIZER.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, mask in zip(data["input_ids"], data["assistant_masks"], strict=True) if mask]
    assert TOKENIZER.decode(learned) == "42<eos>"


SYSTEM = {"role": "system", "content": "Be brief."}
BRIEF = {"role": "system", "content": [{"type": "text", "text": "In"}, {"type": "text", "text": " English."}]}
ASSISTANT = {"role": "assistant", "content": "42"}


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([SYSTEM, {"role": "user", "content": "Hi"}], "<bos><user>Be brief. Hi"),
        ([SYSTEM, BRIEF, USER, ASSISTANT, USER], "<bos><user><image><image>Be brief. In English. What? "
            "<assistant>42<eos><user><image><image>What? "),
    ],
)  # fmt: skip
def test_a_system_message_opens_the_first_question(messages: list, expected: str) -> None:
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == expected


PICTURE = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    "messages, got",
    [
        ([{"role": "tool", "content": "Hi"}], "expected the role user or assistant, or system before these, got tool"),
        ([USER, SYSTEM], "system before these, got system"),
        ([SYSTEM], "a user message behind the system message"),
        ([{"role": "system", "content": [PICTURE]}, USER], "got type image in the role system"),
        ([USER, {"role": "assistant", "content": [PICTURE]}], "got type image in the role assistant"),
        ([USER, {"role": "assistant", "content": None}], "a text or a list of parts in the role assistant"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}], "a text or a list of parts in the role assistant"),
        ([{"role": "user", "content": {"type": "text", "text": "Hi"}}], "a text or a list of parts in the role user"),
        ([{"role": "user", "content": ["Hi"]}], "got type  in the role user"),
        *[
            ([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}], "expected parts of type text")
            for part in (
                {"type": "input_image", "image_url": "a.png"},
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "video", "video": "a.mp4"},
                {"type": "audio"},
                {"type": "document", "source": "a.pdf"},
                {"type": "input_text", "text": "Hi"},
                {"type": "text"},
                {"type": "text", "text": None},
                {"text": "Hi"},
                {},
            )
        ],
    ],
)
def test_what_would_be_left_out_is_refused(messages: list, got: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=got):
        TOKENIZER.apply_chat_template(messages, tokenize=False)


def test_tools_and_documents_are_refused() -> None:
    for more in ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {"documents": [{"text": "a"}]}):
        with pytest.raises(jinja2.TemplateError, match="neither tools nor documents"):
            TOKENIZER.apply_chat_template([USER], tokenize=False, **more)


def test_the_shipped_template_is_this_one(root: Path) -> None:
    shipped = root / "fila" / "pretrained" / "fila-nano" / "chat_template.jinja"
    assert shipped.read_text() == TOKENIZER.chat_template


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == TOKENIZER.get_vocab()
        assert (loaded.padding_side, loaded.image_token, loaded.image_token_id) == ("left", "<image>", 4)
        assert loaded.chat_template == TOKENIZER.chat_template
        text = "  " + PRINTABLE + " . , 's  "
        assert loaded.decode(loaded(text).input_ids) == text
