"""Recipes: those of the repository are good, and what cannot run is refused before anything is built."""

import pytest

from fila import cli
from fila.training.errors import TrainingError
from fila.training.recipe import passes, read_recipe


@pytest.mark.parametrize("name", ["pretrain", "finetune", "nano/pretrain", "nano/finetune"])
def test_the_repository_s_recipes(root, name):
    recipe = read_recipe(root / f"recipes/{name}.yaml")
    assert recipe.model.vision["high_res_rule"] == ("direct" if "pretrain" in name else "scaled")
    assert (recipe.model.trains == ["projector", "fusion"]) == ("pretrain" in name)


@pytest.fixture
def path(root):
    return root / "recipes/nano/finetune.yaml"


def test_overrides(path):
    recipe = read_recipe(
        path,
        ["optimizer.rate=1e-5", "data.sources=[{path: a.json, weight: 2}]", "model.vision.high_res_size=96",
         "run.peak_tflops=null", "optimizer.rates={vit: 0.1}"],
    )  # fmt: skip
    assert recipe.optimizer.rate == 1e-5
    assert recipe.data.sources[0].weight == 2.0
    assert recipe.model.vision == {"high_res_rule": "scaled", "high_res_size": 96}
    assert recipe.optimizer.rates == {"vit": 0.1}


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.lenght=10", "data: unknown key 'lenght'; the nearest is 'length'"),
        ("modl.fresh=true", "unknown key 'modl'; the nearest is 'model'"),
        ("data.length=ten", "data: length: expected int, got 'ten'"),
        ("data.length=1.5", "expected int, got 1.5"),
        ("data.packing=1", "expected bool, got 1"),
        ("data.broken=ignore", "expected one of skip, stop, got 'ignore'"),
        ("data.sources=[]", "at least one corpus"),
        ("data.sources=[{path: a, weight: 1}, {path: b}]", "a weight for every corpus or for none"),
        ("data.sources=[{file: a}]", "unknown key 'file'; the nearest is"),
        ("data.sources=[{weight: 1}]", "path"),
        ("model.trains=[projectors]", "unknown name 'projectors'; the nearest is 'projector'"),
        ("model.trains=[]", "expected parts that learn"),
        ("model.vision.fusion=none", "model.vision: unknown name 'fusion'"),
        ("optimizer.rates={vti: 1}", "unknown name 'vti'; the nearest is 'vit'"),
        ("optimizer.rate=0", "expected a positive number, got 0.0"),
        ("optimizer.warmup=3", "expected a share of the steps"),
        ("run.steps=0", "run.steps: expected 1 or more, got 0"),
        ("model.attention=xformers", "expected an attention that keeps records apart"),
        ("data.micro_batch=2", "a packed micro-batch is one row"),
        ("nonsense", "expected key=value"),
    ],
)
def test_what_cannot_run_is_refused(path, override, message):
    with pytest.raises(TrainingError) as error:
        read_recipe(path, [override])
    assert message in str(error.value)


def test_processes_must_share_a_step(path):
    recipe = read_recipe(path, ["data.rows=6"])
    assert passes(recipe, 3) == 2
    with pytest.raises(TrainingError, match="a multiple of 4 processes"):
        passes(recipe, 4)


def test_the_command_says_so_in_one_line(path, capsys):
    assert cli.main(["train", str(path), "data.lenght=10"]) == 2
    assert (
        capsys.readouterr().err == "fila: error: finetune.yaml: data: unknown key 'lenght'; the nearest is 'length'\n"
    )
    assert cli.main(["train", "no.yaml"]) == 2
    assert "no.yaml" in capsys.readouterr().err
