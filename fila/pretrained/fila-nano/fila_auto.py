"""Names the classes of the installed package `fila` for transformers; no code of its own."""

from fila import FilaConfig, FilaForConditionalGeneration, FilaImageProcessor, FilaModel, FilaProcessor

__all__ = ["FilaConfig", "FilaForConditionalGeneration", "FilaImageProcessor", "FilaModel", "FilaProcessor"]
