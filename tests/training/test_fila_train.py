"""`fila train`: a run learns, goes on bit for bit wherever it is killed, and refuses what it must not go on from."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fila.training import files
from fila.training.build import build_model, modules_at_rest
from fila.training.data.packing import Lane
from tests.training.corpora import write_llava
from tests.training.launch import kill_at, launch, log_of, recipe_of

STEPS = 6


@pytest.fixture(scope="module")
def make_recipe(tmp_path_factory, llava, checkpoint):
    def make(name: str, **changes):
        return recipe_of(tmp_path_factory.mktemp("runs") / name, llava, checkpoint, run_steps=STEPS, **changes)

    return make


def curve(recipe):
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in log_of(recipe)]


def weights(recipe, step=STEPS):
    return load_file(Path(recipe.run.folder) / f"checkpoint-{step}" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(make_recipe):
    """A run that nothing disturbs."""
    recipe = make_recipe("whole")
    codes, out = launch(recipe)
    assert codes == [0], out
    return recipe


def same(one, other) -> bool:
    left, right = weights(one), weights(other)
    return curve(one) == curve(other) and all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_learns_and_writes_what_it_was(whole, checkpoint):
    rows = log_of(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["tokens"] > 0 and row["images"] > 0 and row["padding"] < 0.5 for row in rows)
    assert {"alpha0", "alpha1", "lr", "tokens_per_s", "images_per_s"} <= set(rows[0])
    record = json.loads((Path(whole.run.folder) / "recipe.json").read_text())
    assert record["recipe"]["data"]["rows"] == 2
    assert record["started"]["versions"]["torch"]
    assert len(record["data"]) == 1
    assert [path.name for path in files.checkpoints(Path(whole.run.folder))] == ["checkpoint-4", "checkpoint-6"]
    before = load_file(checkpoint / "model.safetensors")
    assert all(not torch.equal(weight, before[name]) for name, weight in weights(whole).items() if weight.ndim > 1)


@pytest.mark.parametrize("step, saving, workers", [(1, False, 0), (5, False, 2), (4, True, 0)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(make_recipe, whole, step, saving, workers):
    recipe = make_recipe(f"killed{step}", data_workers=workers)
    codes, out = launch(recipe, plant=kill_at(step, saving))
    assert codes == [-signal.SIGKILL], out
    again = make_recipe(f"killed{step}")  # a name of its own
    moved = Path(again.run.folder)
    Path(recipe.run.folder).rename(moved)
    codes, out = launch(again)
    assert codes == [0], out
    assert ("going on from" in out) == (step > 2)
    assert same(again, whole)


def test_a_torn_checkpoint_is_seen_and_the_one_before_it_used(make_recipe, whole):
    recipe = make_recipe("torn")
    launch(recipe)
    last = Path(recipe.run.folder) / "checkpoint-6"
    damaged = bytearray((last / "optimizer.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (last / "optimizer.pt").write_bytes(damaged)
    codes, out = launch(recipe)
    assert codes == [0], out
    assert "checkpoint-6: optimizer.pt is damaged; the checkpoint before it is used" in out
    assert "going on from" in out
    assert same(recipe, whole)


def test_sigterm_saves_and_exits(make_recipe, whole):
    def plant():
        from fila.training.trainer import FilaTrainer

        step = FilaTrainer.training_step

        def terminate(self, *args, **kwargs):
            if self.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *args, **kwargs)

        FilaTrainer.training_step = terminate

    recipe = make_recipe("terminated")
    codes, out = launch(recipe, plant=plant)
    assert codes == [143], out
    assert files.step_of(files.checkpoints(Path(recipe.run.folder))[-1]) == 3
    assert launch(recipe)[0] == [0]
    assert same(recipe, whole)


def test_changed_settings_or_data_are_refused_unless_told_otherwise(make_recipe, llava, checkpoint, tmp_path):
    folder = tmp_path / "run"
    corpus = write_llava(tmp_path / "data", 24)
    assert launch(recipe_of(folder, corpus, checkpoint, run_steps=2))[0] == [0]
    changed = recipe_of(folder, corpus, checkpoint, run_steps=3, optimizer_rate=1e-4)
    codes, out = launch(changed)
    assert codes == [2]
    assert "recipe.optimizer.rate was 0.001 and is now 0.0001, recipe.run.steps was 2 and is now 3" in out
    assert launch(changed, accept_changes=True)[0] == [0]
    write_llava(tmp_path / "data", 20)
    codes, out = launch(changed)
    assert (codes, "data was" in out) == ([2], True)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(make_recipe):
    recipe = make_recipe("full", run_save_every=2)

    def plant():
        from fila.training.trainer import FilaTrainer

        save = FilaTrainer._save_checkpoint

        def full(self, *args):
            if self.state.global_step == 4:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            save(self, *args)

        FilaTrainer._save_checkpoint = full

    codes, out = launch(recipe, plant=plant)
    assert codes == [2], out
    assert "step 4: the checkpoint could not be written" in out
    assert "the last one, checkpoint-2, is whole" in out
    assert files.last_whole(Path(recipe.run.folder)) == (Path(recipe.run.folder) / "checkpoint-2", [])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_records(make_recipe):
    def plant():
        from fila.training.trainer import FilaTrainer

        compute = FilaTrainer.compute_loss

        def poisoned(self, *args, **kwargs):
            loss = compute(self, *args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 and not self.losses else loss

        FilaTrainer.compute_loss = poisoned

    recipe = make_recipe("poisoned", run_save_every=1)
    codes, out = launch(recipe, plant=plant)
    assert codes == [2]
    assert "step 3: loss or gradient is not finite" in out
    assert "its records: pages.json record" in out
    whole_one, torn = files.last_whole(Path(recipe.run.folder))
    assert (whole_one.name, torn) == ("checkpoint-2", [])


def test_one_run_per_folder(make_recipe):
    recipe = make_recipe("locked")
    folder = Path(recipe.run.folder)
    folder.mkdir(parents=True)
    with files.locked(folder):
        codes, out = launch(recipe)
    assert (codes, "another run is using this folder" in out) == ([2], True)


def test_frozen_parts_stay_as_they_were_and_in_eval_mode(make_recipe, checkpoint):
    recipe = make_recipe(
        "frozen", model_trains=["projector", "fusion"], model_vision={"high_res_rule": "direct"}, run_save_every=6
    )
    codes, out = launch(recipe)
    assert codes == [0], out
    before, after = load_file(checkpoint / "model.safetensors"), weights(recipe)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all("fusion" in name or "projector" in name or "newline" in name for name in changed)
    for checkpointing in (False, True):
        model, _ = build_model(make_recipe(
            f"modes{checkpointing}", model_trains=["projector", "fusion"], model_gradient_checkpointing=checkpointing
        ))  # fmt: skip
        resting = modules_at_rest(model)
        tower = model.model.vision_tower
        assert tower.vit.layers[0].self_attn in resting
        assert (tower.vit.layers[0] in resting) == (not checkpointing)
        assert not any(module in resting for module in (tower, tower.fusion[0], model.model.multi_modal_projector))


def test_lanes_of_a_step_are_its_rows(whole, processor, llava):
    from tests.training.test_packing import make_corpus

    corpus = make_corpus(llava, processor, 300)
    first = sum(len(record) for lane in range(2) for record in Lane(corpus, lane, 2).plan().records)
    assert log_of(whole)[0]["tokens"] == first
