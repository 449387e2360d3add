"""Compute the loss on held-out documents."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """Metrics on held-out text."""

    loss: float
    """Mean cross entropy in nats per token."""
    perplexity: float
    bits_per_byte: float
    """Comparable across tokenizers."""

    def __str__(self) -> str:
        return (
            f"held out {self.loss:.4f} nats per token, perplexity {self.perplexity:.2f}, "
            f"{self.bits_per_byte:.4f} bits per byte"
        )


def evaluate(batches: Iterable[Any], score: Callable[[Any], tuple[Any, Any]], num_bytes: int) -> Evaluation:
    """Sum the loss over batches.

    Args:
        batches: the held-out batches.
        score: function from a batch to its summed nats and its number of scored tokens.
        num_bytes: UTF-8 bytes of the scored text.
    """
    nats, tokens = 0.0, 0
    for batch in batches:
        sums = score(batch)
        nats, tokens = nats + float(sums[0]), tokens + int(sums[1])
    loss = nats / max(tokens, 1)
    bits_per_byte = nats / math.log(2) / max(num_bytes, 1)
    return Evaluation(loss, math.exp(min(loss, 700.0)), bits_per_byte)
