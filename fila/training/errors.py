"""Defines the two errors of training: one record that cannot be used, and a run that must not start or go on."""

KINDS = ("record", "missing picture", "broken picture", "too long")


class RecordError(ValueError):
    """A record of a corpus that cannot be used; the message says what was expected and what came.

    Args:
        kind: one of `KINDS`, by which reports count.
    """

    def __init__(self, message: str, kind: str = "record"):
        super().__init__(message)
        self.kind = kind


class TrainingError(ValueError):
    """A run that must not start or go on; the command prints it as one line."""
