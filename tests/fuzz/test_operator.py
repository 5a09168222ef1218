"""The fuzz of the operator in small, and proof that it finds what it is made to find."""

import pytest

from fila_kernels.backends import eager, native
from fila_kernels.backends.native import library
from tests.fuzz import operator

pytestmark = pytest.mark.skipif(not library.load()[0], reason=f"native library {library.load()[1]}")


def test_random_calls_are_right_or_refused(capsys):
    assert operator.main(60, 0) == 0
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize("backend", [eager, native])
def test_a_planted_fault_is_found(backend, monkeypatch):
    right = backend.backward

    def wrong(*arguments):
        return [None if gradient is None else gradient * 1.01 for gradient in right(*arguments)]

    monkeypatch.setattr(backend, "backward", wrong)
    with pytest.raises(AssertionError, match="which alone is"):
        operator.main(60, 0)
