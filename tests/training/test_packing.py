"""Packing: rows are full, records of a row do not see each other, and no padded tile exists.

transformers keeps packed records apart only without an attention mask and with `use_cache=False`: what `tensors` and
`prepare` make is compared with each record alone, so that undoing either fails here.
"""

import itertools

import pytest
import torch
from torch.testing import assert_close

from fila.training.build import prepare
from fila.training.data.conversation import IGNORE, Encoder
from fila.training.data.loader import Rows, make_loader
from fila.training.data.order import Order
from fila.training.data.packing import CHUNK, Corpus, Lane, choose, tensors
from fila.training.data.sources import open_source
from fila.training.errors import RecordError, TrainingError
from tests.training.corpora import write_llava
from tests.training.tiny import tiny_model

LENGTH = 300


def make_corpus(path, processor, length=LENGTH, stop=False, seed=0):
    source = open_source(path)
    return Corpus([source], Order([len(source)], [None], None, seed), Encoder(processor), length, stop)


@pytest.fixture(scope="module")
def corpus(llava, processor):
    return make_corpus(llava, processor)


@pytest.fixture(scope="module")
def model():
    model = tiny_model().eval()
    prepare(model)
    return model


def summed_loss(model, batch):
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum")


@pytest.fixture(scope="module")
def records(corpus, processor):
    """Three pictures of two canvases out of order, and a text alone, in one row."""
    found = [corpus.encode(place) for place in range(24)]
    text = next(record for record in found if not record.sizes)
    views = {r.sizes[0]: processor.image_processor.geometry.layout(*r.sizes[0]).num_views for r in found if r.sizes}
    large = next(record for record in found if record.sizes and views[record.sizes[0]] == max(views.values()))
    small = [record for record in found if record.sizes and views[record.sizes[0]] == min(views.values())]
    return [small[0], text, large, small[1]]


def alone(model, records, processor):
    return [summed_loss(model, tensors([r], processor.image_processor, 0, packed=True)) for r in records]


@torch.no_grad()
def test_a_packed_row_has_the_losses_of_its_records_alone(model, records, processor):
    row = tensors(records, processor.image_processor, 0, packed=True)
    assert row["input_ids"].shape == (1, sum(map(len, records)))
    assert "attention_mask" not in row
    expected = sum(alone(model, records, processor))
    assert_close(summed_loss(model, row), expected, rtol=1e-5, atol=1e-5)
    padded = tensors(records, processor.image_processor, 0, packed=False)
    assert_close(summed_loss(model, padded), expected, rtol=1e-5, atol=1e-5)
    # The model's own loss shifts over the seams: the first token of a record is not learned.
    count = (row["labels"] != IGNORE).sum()
    assert_close(model(**row).loss * count, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("undone", ["mask", "cache"])
def test_either_half_of_the_trap_would_be_seen(model, records, processor, undone):
    row = tensors(records, processor.image_processor, 0, packed=True)
    if undone == "mask":
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    model.config.text_config.use_cache = undone == "cache"
    try:
        difference = abs(float(summed_loss(model, row) - sum(alone(model, records, processor))))
    finally:
        prepare(model)
    assert difference > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_keep_records_apart(model, records, processor, attention):
    model.set_attn_implementation(attention)
    try:
        row = tensors(records, processor.image_processor, 0, packed=True)
        assert_close(summed_loss(model, row), sum(alone(model, records, processor)), rtol=1e-5, atol=1e-5)
    finally:
        model.set_attn_implementation("sdpa")


def test_gradients_of_a_packed_row_are_those_of_a_padded_batch(model, records, processor):
    found = []
    for packed in (True, False):
        model.zero_grad()
        summed_loss(model, tensors(records, processor.image_processor, 0, packed)).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    largest = max(float(grad.abs().max()) for grad in found[1].values())
    for name, grad in found[0].items():
        scale = max(float(found[1][name].abs().max()), largest / 1e3)  # of a key's bias all of it is rounding
        assert_close(grad / scale, found[1][name] / scale, rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def test_no_tile_is_padding(model, records, processor):
    row = tensors(records, processor.image_processor, 0, packed=True)
    geometry = processor.image_processor.geometry
    layouts = [geometry.layout(*size) for record in records for size in record.sizes]
    assert len({layout.num_views for layout in layouts}) > 1
    assert len(row["pixel_values"]) == sum(layout.num_views for layout in layouts)
    encoded = []
    with model.model.vision_tower.vit.embeddings.register_forward_hook(lambda m, a, out: encoded.append(len(out))):
        summed_loss(model, row)
    assert sum(encoded) == len(row["pixel_values"])
    with pytest.raises(ValueError, match="views of all pictures"):
        model(**{**row, "pixel_values": row["pixel_values"][1:]})
    with pytest.raises(ValueError, match="expected high_res_pixel_values of"):
        model(**{**row, "high_res_pixel_values": row["high_res_pixel_values"][1:]})


def test_choose_fills_a_row_as_no_other_choice_does():
    lengths = [30, 41, 7, 22, 9, 13, 50, 3]
    for room in range(30, 120):
        chosen = choose(lengths, room)
        total = sum(lengths[i] for i in chosen)
        best = max(
            sum(lengths[i] for i in some)
            for n in range(len(lengths))
            for some in itertools.combinations(range(len(lengths)), n)
            if 0 in some and sum(lengths[i] for i in some) <= room
        )
        assert chosen[0] == 0
        assert chosen == sorted(set(chosen))
        assert total == best


def test_lanes_share_the_order_and_go_on_from_their_state(corpus):
    seen = []
    for number in range(3):
        lane = Lane(corpus, number, 3)
        rows = [[r.record.name for r in lane.plan().records] for _ in range(4)]
        again = Lane(corpus, number, 3)
        for _ in range(2):
            again.plan()
        resumed = Lane(corpus, number, 3, cursor=again.state())
        assert [[r.record.name for r in resumed.plan().records] for _ in range(2)] == rows[2:]
        seen.append(rows)
    assert seen[0] != seen[1] != seen[2]
    places = [Lane(corpus, number, 3)._place(n) for number in range(3) for n in range(2 * CHUNK)]
    assert sorted(places) == list(range(6 * CHUNK))


def stream(corpus, processor, workers, lanes=(0, 1), count=6):
    rows = Rows(corpus, processor.image_processor, 0, lanes, 4)
    return list(itertools.islice(make_loader(rows, workers), count))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_another_number_of_workers_gives_the_same_micro_batches(corpus, processor, workers):
    for one, other in zip(stream(corpus, processor, 0), stream(corpus, processor, workers), strict=True):
        assert (one.lane, one.cursor, one.names) == (other.lane, other.cursor, other.names)
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
        assert torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])


def test_processes_divide_the_lanes(corpus, processor):
    one = [batch.names for batch in stream(corpus, processor, 0, (0, 1, 2, 3), 8)]
    two = [stream(corpus, processor, 0, lanes, 4) for lanes in ((0, 2), (1, 3))]
    assert one == [batch.names for pair in zip(*two, strict=True) for batch in pair]


def test_broken_records_are_skipped_and_named_or_stop_the_run(tmp_path, processor):
    path = write_llava(tmp_path, 12)
    (tmp_path / "pictures/0.png").unlink()
    whole = (tmp_path / "pictures/1.png").read_bytes()
    (tmp_path / "pictures/1.png").write_bytes(whole[: len(whole) // 2])
    found = stream(make_corpus(path, processor), processor, 0, (0,), 12)
    broken = {message.split(":")[0] for batch in found for message in batch.broken}
    assert len(broken) == 2
    assert not any(name.endswith("record 0") for batch in found for name in batch.names)
    assert not any(name.endswith("record 1") for batch in found for name in batch.names)
    with pytest.raises(TrainingError, match=r"broken record: .*would leave it out"):
        stream(make_corpus(path, processor, stop=True), processor, 0, (0,), 12)


def test_a_row_whose_only_record_is_broken_is_empty_and_the_corpus_of_broken_ones_ends(tmp_path, processor):
    path = write_llava(tmp_path, 3, text_every=0)
    for picture in (tmp_path / "pictures").iterdir():
        picture.write_bytes(picture.read_bytes()[:-200])
    corpus = make_corpus(path, processor)
    assert [batch.names for batch in stream(corpus, processor, 0, (0,), 2)] == [[], []]
    for picture in (tmp_path / "pictures").iterdir():
        picture.unlink()
    with pytest.raises(TrainingError, match="1000 broken ones in a row"):
        Lane(corpus, 0, 1).plan()
    with pytest.raises(RecordError, match="at most 3 tokens"):
        make_corpus(write_llava(tmp_path, 3), processor, length=3).encode(0)


def test_rows_of_the_recipes_leave_less_than_three_percent_of_a_simulated_mixture(capsys):
    from bench import packing

    packing.main(["--records", "3000"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "packed into 8192" in line)
    _, how, _, padded, tiles, _ = (part.strip() for part in line.split("|"))
    assert "too long" not in how
    assert float(padded.removesuffix("%")) < 3
    assert tiles == "0"
