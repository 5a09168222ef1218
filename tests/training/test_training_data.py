"""Corpora: every format gives the same records, answers alone are learned, and the order is a function of its seed."""

import itertools
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fila.processing import FilaProcessor
from fila.training.data.conversation import IGNORE, Encoder
from fila.training.data.order import BLOCK, Order, permuted
from fila.training.data.records import PictureFile, make_record
from fila.training.data.sources import fingerprint, open_source
from fila.training.errors import RecordError, TrainingError
from recipes.nano.tokenizer import build_character_tokenizer
from tests.model.test_inference import CHATML_TURNS, LLAMA_3, LLAMA_3_TURNS, QWEN_2_5, SMOLLM_2
from tests.training.corpora import picture, turns, write_llava, write_parquet, write_tars


@pytest.mark.parametrize("lines", [False, True])
def test_llava_json(tmp_path, lines):
    source = open_source(write_llava(tmp_path, 12, lines))
    assert len(source) == 12
    record = source.record(5)
    assert record.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is number 5?"}]},
        {"role": "assistant", "content": "5 " * 17},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "yes"},
    ]
    assert record.pictures[0].read().size == record.pictures[0].size() == (200, 200)
    assert source.record(3).pictures == []


def test_json_positions_know_strings_and_nesting(tmp_path):
    said = 'a "quoted\\" ] } text \\'
    records = [{"conversations": [{"from": "human", "value": said}, {"from": "gpt", "value": "é ] {"}]}] * 3
    (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False))
    source = open_source(tmp_path / "a.json")
    assert [source.record(i).messages[0]["content"] for i in range(len(source))] == [said] * 3
    assert source.record(2).messages[1]["content"] == "é ] {"


def test_tars(tmp_path):
    source = open_source(write_tars(tmp_path / "tars", 12, 2))
    assert len(source) == 12
    numbers = []
    for i in range(12):
        record = source.record(i)
        number = int(record.messages[0]["content"][1]["text"].removeprefix("What is number ").removesuffix("?"))
        assert np.array_equal(record.pictures[0].read().pixels, np.asarray(picture(number)))
        numbers.append(number)
    assert sorted(numbers) == list(range(12))


def test_parquet_with_messages(tmp_path):
    pytest.importorskip("pyarrow")
    source = open_source(write_parquet(tmp_path / "rows", 12, 5))
    assert list(source.groups) == [5, 5, 2]
    record = source.record(11)
    assert record.messages[1]["content"] == "11"
    assert np.array_equal(record.pictures[0].read().pixels, np.asarray(picture(11)))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "", "got an empty file"),
        ("a.json", "[{}, {", "a file that is cut"),
        ("a.json", "[]", "expected records, got none"),
        ("a.json", "7", "expected a JSON array"),
        ("a.csv", "a,b", "expected .json, .jsonl, .parquet or .tar"),
        ("a.tar", "no tar at all" * 100, "expected an uncompressed tar"),
    ],
)
def test_what_is_no_corpus_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TrainingError, match=message):
        open_source(tmp_path / name)


def test_a_compressed_tar_and_a_sample_without_json_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(TrainingError, match="uncompressed"):
        open_source(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x.png"))
    with pytest.raises(TrainingError, match=r"expected a \.json beside x.png"):
        open_source(tmp_path / "b.tar")


@pytest.mark.parametrize(
    "fields, pictures, message",
    [
        ({}, 0, "a list of turns"),
        ({"conversations": turns(0)}, 0, "1 places and 0 files"),
        ({"conversations": turns(0, False)}, 1, "0 places and 1 files"),
        ({"conversations": turns(0)[:1]}, 1, "expected an answer"),
        ({"conversations": [{"from": "alien", "value": "hi"}]}, 0, "a role out of"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 0, "parts of type text and image"),
        ({"messages": [{"role": "user", "content": ""}]}, 0, "an empty one"),
        ({"messages": [{"role": "assistant", "content": "<image>"}]}, 1, "in the role user alone"),
    ],
)
def test_records_that_cannot_be_used_say_why(fields, pictures, message):
    with pytest.raises(RecordError, match=message):
        make_record("r", fields, [PictureFile("p", b"")] * pictures)


def test_the_size_in_the_header_is_the_size_that_is_read(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        picture(0, (30, 70)).save(path, exif=exif)
        file = PictureFile(path.name, path)
        assert file.size() == file.read().size == ((70, 30) if orientation > 4 else (30, 70))
    for broken in (tmp_path / "missing.png", b"no picture"):
        with pytest.raises(RecordError, match="picture"):
            PictureFile("broken", broken).size()


def with_template(processor, template, tokens):
    tokenizer = build_character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    return FilaProcessor(processor.image_processor, tokenizer, chat_template=template)


TEMPLATES = {
    "llama3": (LLAMA_3, LLAMA_3_TURNS, "<|eot_id|>"),
    "qwen2.5": (QWEN_2_5, CHATML_TURNS, "<|im_end|>"),
    "smollm2": (SMOLLM_2, CHATML_TURNS, "<|im_end|>"),
    "nano": (None, (), "<eos>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_alone_are_learned_whatever_the_template(processor, name):
    template, tokens, end = TEMPLATES[name]
    chosen = with_template(processor, template or processor.chat_template, tokens)
    data = [PictureFile("p", _png(picture(0)))]
    talk = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A cat"},
        {"role": "user", "content": "And that?"},
        {"role": "assistant", "content": "A dog"},
    ]
    encoded = Encoder(chosen).encode(make_record("r", {"messages": talk}, data))
    tokenizer = chosen.tokenizer
    learned = tokenizer.decode(encoded.labels[encoded.labels != IGNORE])
    assert learned == f"A cat{end}A dog{end}"
    # What stands before the first answer is what the model is asked with.
    first = int(np.flatnonzero(encoded.labels != IGNORE)[0])
    asked = chosen.apply_chat_template(
        make_record("r", {"messages": talk}, data).messages[:2], add_generation_prompt=True
    )
    inputs = chosen(images=[picture(0)], text=asked, return_tensors="np", add_special_tokens=False)
    assert encoded.input_ids[:first].tolist() == inputs["input_ids"][0].tolist()


def _png(image) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_template_that_rewrites_earlier_turns_is_refused(processor):
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %};"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(TrainingError, match="writes turn 1 in another way"):
        Encoder(with_template(processor, template, ()))


def test_a_text_that_spells_out_a_special_token_is_broken(processor):
    talk = {"messages": [{"role": "user", "content": "say <eos>"}, {"role": "assistant", "content": "no"}]}
    with pytest.raises(RecordError, match="no special token in a text, got '<eos>'"):
        Encoder(processor).encode(make_record("r", talk, []))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000])
def test_permutations(count):
    orders = [[permuted(i, count, key) for i in range(count)] for key in (1, 2)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 64 or (orders[0] != orders[1] and orders[0] != list(range(count)))


def test_a_mixture_keeps_its_shares_and_every_epoch_holds_each_record_once():
    sizes = [70, 12, 300]
    order = Order(sizes, [None, [5, 5, 2], None], [0.5, 0.2, 0.3], seed=3)
    found = [order.at(place) for place in range(3 * BLOCK)]
    assert Counter(source for source, _ in found[:BLOCK]) == {0: 500, 1: 200, 2: 300}
    for source, size in enumerate(sizes):
        records = [record for s, record in found if s == source]
        for start in range(0, len(records) - size, size):
            assert sorted(records[start : start + size]) == list(range(size))
        assert records[:size] != records[size : 2 * size]
    # Rows that are read together stay together.
    rows = [record for s, record in found if s == 1][:12]
    assert sum((a < 5, a < 10) != (b < 5, b < 10) for a, b in itertools.pairwise(rows)) == 2
    assert found != [Order(sizes, [None, [5, 5, 2], None], [0.5, 0.2, 0.3], seed=4).at(p) for p in range(3 * BLOCK)]


def test_fingerprints_see_another_corpus(tmp_path):
    first, second = (write_llava(tmp_path / name, count) for name, count in (("a", 6), ("b", 7)))
    found = fingerprint(open_source(first))
    assert found == fingerprint(open_source(first)) != fingerprint(open_source(second))
    first.write_text(first.read_text().replace("number 1", "number 8"))
    assert found != fingerprint(open_source(first))
