"""Exact match with intervals."""

import json

import pytest

from recipes.nano import score
from recipes.nano.evaluate import SEED, Fingerprint
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.sample import make_sample
from recipes.nano.score import Answered


def test_only_white_space_is_forgiven() -> None:
    assert Answered("12 Mar 2024", " 12  Mar 2024\n", True, "date").correct
    for wrong in ("12 mar 2024", "12 Mar 2024.", "12Mar 2024", ""):
        assert not Answered("12 Mar 2024", wrong, True, "date").correct


def test_wilson_interval() -> None:
    """Against the published example of Newcombe (1998), 81 of 263 and 0 of 20."""
    assert score.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert score.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert score.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="5 of 3"):
        score.wilson(5, 3)


def test_report_counts_cut_and_intact_apart(tmp_path, capsys) -> None:
    rows = [
        Answered("1", "1", True, "number"),
        Answered("2", "3", True, "number"),
        Answered("a", "a", False, "word"),
    ]
    found = score.report(rows)
    assert (found["all"]["count"], found["all"]["correct"]) == (3, 2)
    assert (found["cut"]["exact_match"], found["intact"]["exact_match"]) == (0.5, 1.0)
    assert found["kinds"]["word"]["cut"] == {"count": 0, "correct": 0, "exact_match": None, "low": 0.0, "high": 1.0}
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(vars(row)) for row in rows))
    assert score.main([str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == found
    path.write_text('{"answer": "1"}')
    with pytest.raises(SystemExit):
        score.main([str(path)])
    assert "answers.jsonl:1" in capsys.readouterr().err


def test_the_first_pages_of_the_frozen_test_are_as_they_were() -> None:
    try:
        fonts = FontSet.installed("test", verify=True)
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(str(error))
    fingerprint = Fingerprint()
    for seed in range(SEED, SEED + 10):
        fingerprint.add(make_sample(seed, split="test", fonts=fonts))
    assert fingerprint.pictures.hexdigest() == "0b2c07e63995ca1d067eb459abea76eaa97bc24d25552e28e71d17aa60273197"
    assert fingerprint.labels.hexdigest() == "06d1bd0a229a91de6aef1faeae454bfe1d3543f9d188bf589f42b32b0a22d907"
    with pytest.raises(ValueError, match="frozen test"):
        fingerprint.check()
