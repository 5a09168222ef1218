"""Several processes train as one does: one loss curve, of pictures, of text alone, and of both mixed."""

import pytest

from tests.training.corpora import write_llava
from tests.training.launch import launch, log_of, recipe_of

CORPORA = {"images": 0, "mixed": 2, "text": 1}
TOLERANCE = 2e-5  # sums of gradients in another order, after four steps of Adam


@pytest.fixture(scope="module", params=CORPORA)
def corpus(request, tmp_path_factory):
    """A picture in every record, in every other, in none."""
    path = write_llava(tmp_path_factory.mktemp(request.param), 16, text_every=0)
    if request.param != "images":
        import json

        records = json.loads(path.read_text())
        for i, record in enumerate(records):
            if request.param == "text" or i % 2:
                record.pop("image")
                record["conversations"][0]["value"] = f"What is number {i}?"
        path.write_text(json.dumps(records))
    return path


def curve_of(tmp_path, corpus, checkpoint, name, world, **changes):
    recipe = recipe_of(tmp_path / name, corpus, checkpoint, data_rows=4, data_length=120, run_save_every=100, **changes)
    codes, out = launch(recipe, world)
    assert codes == [0] * world, out
    return [(row["loss"], row["grad_norm"]) for row in log_of(recipe)]


def differ(one, other):
    return max(
        abs(a - b) / abs(a) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


def test_two_processes_give_one_loss_curve(tmp_path, corpus, checkpoint):
    one = curve_of(tmp_path, corpus, checkpoint, "one", 1)
    for name, changes in {
        "ddp": {"run_parallel": "ddp"},
        "fsdp": {"run_parallel": "fsdp"},
        "kept": {"run_parallel": "fsdp", "run_reshard": False},
    }.items():
        two = curve_of(tmp_path, corpus, checkpoint, name, 2, **changes)
        assert differ(one, two) < TOLERANCE, (name, one, two)
