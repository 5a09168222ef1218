"""The demo on a checkpoint of random weights: it prints a table and a count, and draws a picture per question."""

import importlib.util
import re
from pathlib import Path

from PIL import Image

from tests.model.tiny_checkpoint import save_checkpoint


def test_the_demo_answers_counts_and_explains(root: Path, tmp_path: Path, capsys) -> None:
    spec = importlib.util.spec_from_file_location("demo", root / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)

    out = tmp_path / "out"
    assert demo.main(["--model", str(save_checkpoint(tmp_path / "checkpoint")), "--out", str(out)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    counted = re.fullmatch(r"(\d+) of (\d+) answered right", last)
    assert counted is not None
    assert int(counted[1]) <= int(counted[2]) == len(demo.QUESTIONS) == 10
    pictures = sorted(out.iterdir())
    assert {path.name for path in pictures} == {
        f"{i}-{Path(question.picture).stem}.png" for i, question in enumerate(demo.QUESTIONS, 1)
    }
    for path in pictures:
        with Image.open(path) as drawn:
            drawn.load()
            assert min(drawn.size) > 100

    assert demo.main(["--model", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("demo: error: checkpoint ")
