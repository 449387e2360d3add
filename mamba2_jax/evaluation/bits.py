"""Perplexity of texts of any length: a state is carried from piece to piece."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mamba2_jax.evaluation.plan import Progress
from mamba2_jax.evaluation.scores import loglikelihoods
from mamba2_jax.generation.prefill import PIECE
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.tokenizer import special_token_ids


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts; results of several texts add up."""

    nats: float
    """Sum of the negative natural-log probabilities of the scored tokens."""
    num_tokens: int
    """Number of scored tokens."""
    num_bytes: int
    """UTF-8 bytes of the scored text."""

    @property
    def perplexity(self) -> float:
        """Return the exponential of the mean nats per token."""
        return math.exp(min(self.nats / max(self.num_tokens, 1), 700.0))

    @property
    def bits_per_token(self) -> float:
        """Return bits per token; depends on the tokenizer."""
        return self.nats / math.log(2) / max(self.num_tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """Return bits per byte; comparable across tokenizers."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)

    def __add__(self, other: "Perplexity") -> "Perplexity":
        return Perplexity(
            self.nats + other.nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes
        )


def prefix_token(tokenizer: Any, config: Any) -> int | None:
    """Return the token before the first of a text: bos, else eos, of the tokenizer, else of the config."""
    special = special_token_ids(tokenizer, config)
    own = (tokenizer.bos_token_id, tokenizer.eos_token_id, special.bos, *special.eos)
    return next((token for token in own if token is not None), None)


def perplexity(
    model: Mamba2ForCausalLM,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    rows: int = 16,
    piece: int = PIECE,
    progress: Progress = lambda done, total: None,
) -> Perplexity:
    """Compute the perplexity of a text, or of several that know nothing of each other.

    Every token is predicted from all tokens before it, however long the text is; no window slides. The first
    token is predicted from the bos token, else the eos token; without either it is not scored.

    Args:
        model: the model, on one device or a mesh.
        tokenizer: as `load_tokenizer` returns it.
        text: one text or several.
        rows: texts per pass.
        piece: most tokens of a text per pass; the device's memory grows with it, the result does not change.
        progress: called after each pass with the number of scored tokens, and of all.

    Raises:
        ValueError: no text has a token to score.
    """
    texts = [text] if isinstance(text, str) else text
    prefix = prefix_token(tokenizer, model.config)
    requests, num_bytes = [], 0
    for one in texts:
        tokens = tokenizer(one, add_special_tokens=False)["input_ids"]
        context = tokens[:1] if prefix is None else [prefix]
        tokens = tokens[1:] if prefix is None else tokens
        if tokens:
            requests.append((context, tokens))
            num_bytes += len(one.encode()) - (
                len(tokenizer.decode(context).encode()) if prefix is None else 0
            )
    if not requests:
        raise ValueError("perplexity: the text is empty; give it at least one token to predict")
    scores = loglikelihoods(model, requests, rows=rows, piece=piece, progress=progress)
    return Perplexity(
        -math.fsum(score.logprob for score in scores), sum(len(tokens) for _, tokens in requests), num_bytes
    )
