"""A run's files: kills at any moment, locks, settings, and checkpoints that are damaged, foreign or not finite."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from recipes.nano import checkpoint, run_folder, train
from recipes.nano.run_folder import Log, RunError, check_weights, drop_rows, identity, locked, read, restore, save
from recipes.nano.stages import STAGES, Trainee

SETTINGS = {"steps": 9, "batch": 2, "seed": 0, "lr": 0.1, "fonts": "built-in", "processes": 1, "init": None}


class Small:
    """Two weights, their averages and two optimisers, some steps old."""

    def __init__(self, seed: int = 0, steps: int = 0, width: int = 3):
        torch.manual_seed(seed)
        self.learning = {n: nn.Parameter(torch.randn(2, width)) for n in ("a", "b")}
        self.average = {n: p.detach().clone() for n, p in self.learning.items()}
        self.optimizers = [torch.optim.AdamW([self.learning["a"]]), torch.optim.Muon([self.learning["b"]])]
        for _ in range(steps):
            sum(p.square().sum() for p in self.learning.values()).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def state(self, step: int) -> dict:
        return {
            "learning": {n: p.detach() for n, p in self.learning.items()},
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": step,
            "settings": SETTINGS,
        }

    def restore(self, path: Path, **changed) -> int:
        return restore(path, SETTINGS | changed, self.learning, self.average, self.optimizers)


def test_a_restored_state_is_the_saved_one(tmp_path):
    old, new = Small(steps=2), Small(seed=1)
    path = tmp_path / "text.pt"
    assert new.restore(path) == 0
    save(path, old.state(2))
    assert new.restore(path) == 2
    for _ in range(2):
        for small in (old, new):
            sum(p.square().sum() for p in small.learning.values()).backward()
            for optimizer in small.optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for name, value in old.learning.items():
        assert torch.equal(value, new.learning[name])
        assert torch.equal(old.average[name], new.average[name])


@pytest.mark.parametrize(
    "changed",
    [
        {"steps": 12},
        {"batch": 4},
        {"seed": 5},
        {"lr": 0.2},
        {"fonts": "list"},
        {"processes": 2},
        {"init": "x sha256:0"},
    ],
)
def test_other_settings_are_refused_by_both_values(tmp_path, changed):
    path = tmp_path / "text.pt"
    save(path, Small(steps=1).state(1))
    ((name, value),) = changed.items()
    with pytest.raises(RunError, match=f"{name} was {SETTINGS[name]!r} and is now {value!r}"):
        Small(seed=1).restore(path, **changed)


def test_a_checkpoint_without_settings_is_not_gone_on_from(tmp_path):
    state = Small(steps=1).state(1)
    del state["settings"]
    save(tmp_path / "text.pt", state)
    with pytest.raises(RunError, match="holds no settings"):
        Small().restore(tmp_path / "text.pt")


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "empty":
        data = bytearray()
    elif kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "garbage":
        data = bytearray(b"\x07\x93" * 500)
    elif kind == "flipped":  # a bit of a stored weight: torch.load takes it
        at = data.index(Small(steps=2).learning["a"].detach().numpy().tobytes())
        data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["empty", "truncated", "garbage", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_save_before_it_is_named(tmp_path, kind):
    path = tmp_path / "text.pt"
    save(path, Small(steps=1).state(1))
    save(path, Small(steps=2).state(2))
    damage(path, kind)
    with pytest.raises(RunError, match=r"text.pt: .*damaged.*text.previous.pt"):
        Small().restore(path)
    (tmp_path / "text.previous.pt").replace(path)
    assert Small().restore(path) == 1


def test_what_is_no_plain_file_is_not_read(tmp_path):
    path = tmp_path / "text.pt"
    path.symlink_to("/dev/zero")  # it has no end
    with pytest.raises(RunError, match="expected a plain file"):
        Small().restore(path)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda state: state.pop("optimizers"),
        lambda state: state["learning"].pop("a"),
        lambda state: state["average"].update(c=torch.zeros(1)),
        lambda state: state["learning"].update(a=torch.zeros(2, 4)),
        lambda state: state["learning"].update(a=torch.zeros(2, 3).double()),
        lambda state: state["average"].update(b=torch.full((2, 3), torch.nan)),
        lambda state: state["learning"]["b"].fill_(torch.inf),
        lambda state: state["optimizers"][0]["state"][0]["exp_avg"].fill_(torch.nan),
        lambda state: state["optimizers"][0]["state"][0].update(exp_avg=torch.zeros(3, 2)),
        lambda state: state["optimizers"].reverse(),
        lambda state: state["optimizers"].pop(),
        lambda state: state.update(step=10),
        lambda state: state.update(step="2"),
        lambda state: state.update(learning=[1]),
    ],
)
def test_a_foreign_or_non_finite_checkpoint_changes_nothing(tmp_path, break_it):
    path = tmp_path / "text.pt"
    state = Small(steps=2).state(2)
    break_it(state)
    torch.save(state, path)
    new = Small(seed=1)
    before = [p.detach().clone() for p in new.learning.values()]
    with pytest.raises(RunError, match=r"text\.pt"):
        new.restore(path)
    assert all(map(torch.equal, before, new.learning.values()))
    assert not any(optimizer.state for optimizer in new.optimizers)


def test_a_state_that_is_not_finite_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "text.pt"
    save(path, Small(steps=1).state(1))
    bad = Small(steps=2)
    bad.average["b"][0, 0] = torch.inf
    with pytest.raises(RunError, match=r"step 2: average.b is not finite"):
        save(path, bad.state(2))
    assert read(path)["step"] == 1


def test_a_disk_that_is_full_leaves_the_last_checkpoint(tmp_path):
    """In a process of its own, since the limit is on all files."""
    path = tmp_path / "text.pt"
    save(path, Small(steps=1).state(1))
    code = (
        "import resource, signal, sys; from pathlib import Path; import torch\n"
        "from recipes.nano.run_folder import RunError, save\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: save(Path(sys.argv[1]), {'step': 2, 'a': torch.zeros(100_000)})\n"
        "except RunError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: cannot be written: File too large\n", "")
    assert read(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["text.pt"]


def steps_of(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_a_log_goes_on_behind_the_checkpoints_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Log, "every", 1)
    path = tmp_path / "text.csv"
    losses = {"answer": torch.tensor(1.0)}
    for begin, end in ((0, 4), (0, 5), (2, 6), (2, 3), (3, 5)):  # killed at `end`, its last save at the next `begin`
        log = Log(path, {}, begin)
        for step in range(begin + 1, end + 1):
            log.add(step, 9, losses, torch.tensor(1.0), 0.1, [])
        assert steps_of(path) == [str(i) for i in range(1, end + 1)]


def test_a_torn_row_is_dropped_and_a_foreign_file_is_not_touched(tmp_path):
    path = tmp_path / "text.csv"
    path.write_bytes(b"step,answer\r\n25,1.0\r\n50,1.0\r\n7")
    drop_rows(path, 60)
    assert path.read_bytes() == b"step,answer\r\n25,1.0\r\n50,1.0\r\n"
    path.write_bytes(b"my notes\n")
    with pytest.raises(RunError, match="not a log"):
        drop_rows(path, 60)
    assert path.read_bytes() == b"my notes\n"


def test_a_loss_that_comes_late_gets_a_column(tmp_path, monkeypatch):
    monkeypatch.setattr(Log, "every", 1)
    log = Log(tmp_path / "text.csv", {}, 0)
    for step, losses in enumerate(({"answer": 1.0}, {"up": 2.0, "answer": 3.0}, {"up": 4.0}), 1):
        log.add(step, 9, {n: torch.tensor(v) for n, v in losses.items()}, torch.tensor(1.0), 0.1, [])
    with (tmp_path / "text.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [(row["answer"], row["up"]) for row in rows] == [("1.0", ""), ("3.0", "2.0"), ("", "4.0")]


def test_a_stage_is_held_once_and_keeps_the_stages_before_it(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--steps", "1", "--batch", "1", "--builtin-font"]
    with locked(tmp_path, "align", ["vision", "text"]):
        for stage in ("align", "vision"):
            assert train.main([stage, *arguments]) == 1
            assert (
                capsys.readouterr().err == f"error: {tmp_path}: another run is using stage {stage!r} of this folder\n"
            )
    with locked(tmp_path, "vision"), locked(tmp_path, "text"):  # the halves of stage 0 share nothing
        pass


def test_the_kernel_frees_a_killed_runs_lock_though_its_worker_lives(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from recipes.nano.run_folder import locked\n"
        "with locked(Path(sys.argv[1]), 'text'):\n"
        "    worker = os.fork()\n"
        "    if worker: print(worker, flush=True)\n"
        "    time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    try:
        with pytest.raises(RunError), locked(tmp_path, "text"):
            pass
        run.kill()
        run.wait()
        os.kill(worker, 0)
        with locked(tmp_path, "text"):
            pass
    finally:
        run.kill()
        os.kill(worker, signal.SIGKILL)
        run.stdout.close()


@pytest.fixture(scope="module")
def trainee() -> Trainee:
    torch.manual_seed(0)
    return train.build("fila-nano")[0]


def stage_file(trainee: Trainee, path: Path, stage: str, init: str | None = None) -> dict:
    """A checkpoint as that stage would leave it."""
    average = {n: p.detach().clone() for n, p in trainee.named_parameters() if n.startswith(STAGES[stage].trains)}
    state = {"learning": {}, "average": average, "optimizers": [], "step": 1, "settings": {"init": init}}
    torch.save(state, path)
    return state


def test_a_stage_takes_only_what_the_stages_before_it_leave(trainee, tmp_path):
    with pytest.raises(RunError, match="missing; stage 'tune' needs stage"):
        train.begin(trainee, "tune", tmp_path, None)
    for stage in train.PREDECESSORS["tune"]:
        stage_file(trainee, tmp_path / f"{stage}.pt", stage)
    assert train.begin(trainee, "tune", tmp_path, None)["before"].keys() == set(train.PREDECESSORS["tune"])
    stage_file(trainee, tmp_path / "text.pt", "vision")
    with pytest.raises(RunError, match=r"text.pt: other weights than this model's"):
        train.begin(trainee, "tune", tmp_path, None)


def test_init_is_one_for_a_folder(trainee, tmp_path):
    init = tmp_path / "init"
    init.mkdir()
    weights = {n: torch.full_like(p, 0.5) for n, p in trainee.export.named_parameters()}
    save_file(weights, init / "model.safetensors")
    kept = {n: p.detach().clone() for n, p in trainee.named_parameters()}
    try:
        origins = train.begin(trainee, "align", tmp_path, init)
        assert origins == {"init": identity(init), "before": {}, "grid": False}
        assert all((p == 0.5).all() for p in trainee.export.parameters())
        for stage in train.PREDECESSORS["align"]:
            stage_file(trainee, tmp_path / f"{stage}.pt", stage, identity(init))
        train.begin(trainee, "align", tmp_path, init)
        with pytest.raises(RunError, match=r"began with --init init sha256:\w+, stage 'align' is given None"):
            train.begin(trainee, "align", tmp_path, None)
        save_file(weights | {next(iter(weights)): torch.zeros(7)}, init / "model.safetensors")
        with pytest.raises(RunError, match="instead of"):
            train.begin(trainee, "align", tmp_path, init)
    finally:
        trainee.load_state_dict(kept, strict=False)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys, bad):
    forward, count = Trainee.forward, iter(range(1, 9))

    def broken(self, name, batch):
        losses = forward(self, name, batch)
        part = next(iter(losses))
        if next(count) == 2:
            losses[part] = losses[part] * torch.nan if bad == "loss" else (losses[part] - losses[part].detach()).sqrt()
        return losses

    monkeypatch.setattr(Trainee, "forward", broken)
    options = ["--steps", "3", "--batch", "1", "--workers", "0", "--threads", "1", "--builtin-font"]
    options += ["--save-minutes", "0"]
    assert train.main(["text", "--out", str(tmp_path), *options]) == 1
    assert "error: step 2: loss or gradient is not finite" in capsys.readouterr().err
    assert read(tmp_path / "text.pt")["step"] == 1
    assert train.main(["text", "--out", str(tmp_path), *options, "--batch", "2"]) == 1
    error = capsys.readouterr().err
    assert "batch was 1 and is now 2" in error
    assert "previous" not in error  # a save that is whole is not to be replaced


SHORT = ["--steps", "1", "--batch", "1", "--workers", "0", "--threads", "1", "--tile", "64", "--builtin-font"]


def test_vision_alone_leaves_the_tokens_of_text_out_and_says_so(tmp_path, capsys):
    arguments = ["vision", "--out", str(tmp_path), *SHORT]
    words = "no tokens of stage 'text' to aim at: the loss 'grid' is left out"
    assert train.main(arguments) == 0
    assert words in capsys.readouterr().out
    saved = read(tmp_path / "vision.pt")
    assert (saved["settings"]["grid"], saved["settings"]["before"]) == (False, {})
    assert not any("projector" in name for name in saved["learning"])
    assert any("projector" in name for name in saved["average"])
    assert "grid" not in (tmp_path / "vision.csv").read_text().splitlines()[0].split(",")
    assert train.main(arguments) == 0
    assert train.main(["text", "--out", str(tmp_path), *SHORT]) == 0
    capsys.readouterr()
    assert train.main(arguments) == 1  # it would be neither of the two
    assert "grid was False and is now True" in capsys.readouterr().err
    (tmp_path / "vision.pt").unlink()
    assert train.main(arguments) == 0
    assert words not in capsys.readouterr().out
    assert read(tmp_path / "vision.pt")["settings"]["grid"] is True
    assert "grid" in (tmp_path / "vision.csv").read_text().splitlines()[0].split(",")


def test_weights_without_tokens_of_text_are_no_target(trainee, tmp_path):
    kept = {n: p.detach().clone() for n, p in trainee.named_parameters()}
    weights = {n: torch.full_like(p, 0.5) for n, p in trainee.export.named_parameters()}
    try:
        save_file(weights, tmp_path / "model.safetensors")
        assert train.begin(trainee, "tune", tmp_path, tmp_path)["grid"] is False
        save_file({n: p.contiguous() for n, p in kept.items()}, tmp_path / "all.safetensors")
        assert train.begin(trainee, "tune", tmp_path, tmp_path / "all.safetensors")["grid"] is True
    finally:
        trainee.load_state_dict(kept, strict=False)


def test_frozen_parts_stay_and_are_handed_on(tmp_path, capsys):
    arguments = ["text", "--out", str(tmp_path), *SHORT]
    assert train.main([*arguments, "--freeze", "lm_head", "grid_text"]) == 0  # tied: the embedding has that name too
    saved = read(tmp_path / "text.pt")
    assert saved["settings"]["freeze"] == ("grid_text", "lm_head")
    embedding = "model.language_model.embed_tokens.weight"
    assert embedding not in saved["learning"]
    assert not any(name.startswith("grid_text") for name in saved["learning"])
    assert {embedding, "grid_text.turn"} <= saved["average"].keys()
    capsys.readouterr()
    assert train.main(arguments) == 1
    assert "freeze was ('grid_text', 'lm_head') and is now ()" in capsys.readouterr().err
    assert train.main(["vision", "--out", str(tmp_path), *SHORT]) == 0  # takes what `text` leaves, frozen parts and all
    for names in (["no.such"], [""], ["model", "lm_head", "grid_text"]):
        assert train.main([*arguments, "--freeze", *names]) == 1
        assert capsys.readouterr().err.startswith("error: --freeze: expected")


@pytest.mark.parametrize(
    "option",
    [
        ("--lr", "nan"),
        ("--lr", "0"),
        ("--steps", "0"),
        ("--batch", "-2"),
        ("--save-minutes", "nan"),
        ("--tile", "0"),
        ("--seed", str(2**63)),
    ],
)
def test_numbers_that_no_run_can_have(tmp_path, capsys, option):
    assert train.main(["text", "--out", str(tmp_path), *option]) == 1
    assert capsys.readouterr().err.startswith(f"error: {option[0]}: expected")


@pytest.mark.parametrize("option", [("--tile", "7"), ("--preset", "none")])
def test_models_that_cannot_be_built(tmp_path, capsys, option):
    assert train.main(["vision", "--out", str(tmp_path), *option]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --preset")
    assert error.count("\n") == 1


def test_export_refuses_damaged_foreign_and_non_finite_runs(trainee, tmp_path, capsys):
    arguments = ["--run", str(tmp_path), "--out", str(tmp_path / "model")]
    path = tmp_path / "tune.pt"
    state = stage_file(trainee, path, "tune")
    state["average"][next(iter(state["average"]))].view(-1)[0] = torch.nan
    torch.save(state, path)
    assert checkpoint.main(arguments) == 1
    assert "is not finite" in capsys.readouterr().err
    stage_file(trainee, path, "vision")
    assert checkpoint.main(arguments) == 1
    assert "is missing" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-100])
    assert checkpoint.main(arguments) == 1
    assert "damaged" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_messages_count_the_faults_they_leave_out():
    like = {str(i): torch.zeros(1) for i in range(run_folder.NAMED + 4)}
    with pytest.raises(RunError, match="0 is missing, 1 is missing, 2 is missing, and 4 more"):
        check_weights({}, like, Path("x.pt"))
