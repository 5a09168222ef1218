"""Says how sure a model is of an answer, and how often answers of which it is that sure are right.

The mean log-probability of an answer's tokens, the one that ends it included, is what the model thinks of it. A
*calibration* turns that into a probability of being right: `sigmoid(slope * mean + offset)`, Platt's two numbers,
fitted on answers to pages that were held out.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def log_probabilities(logits: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Log-probability of each token that was chosen: logits [B, V] of every step, tokens [B, steps]; [B, steps]."""
    chosen = [
        step.float().log_softmax(-1).gather(1, token[:, None])[:, 0]
        for step, token in zip(logits, tokens.unbind(1), strict=True)
    ]
    return torch.stack(chosen, 1)


def calibrated(mean: float, calibration: Sequence[float]) -> float:
    """The probability that an answer of that mean log-probability is right.

    >>> calibrated(0.0, (10.0, 0.0))
    0.5
    """
    slope, offset = calibration
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, slope * mean + offset))))
