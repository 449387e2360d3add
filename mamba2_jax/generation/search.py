"""How many texts per prompt, and how they are found: sampled, the best of several, beams, or with a draft."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mamba2_jax.generation.sampling import positive_integer
from mamba2_jax.generation.speculative import PromptLookup
from mamba2_jax.generation.state import DecodeState
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.checks import check_choice, is_concrete
from mamba2_jax.typing import Array, Float


@dataclass(frozen=True)
class Search:
    """Checked options of `generate`, known at tracing; see there."""

    num_return_sequences: int
    candidates: int
    """Texts decoded per prompt; the best `num_return_sequences` of them are returned."""
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_draft_tokens: int
    """0 without a draft."""
    return_logprobs: bool

    @property
    def needs_logprobs(self) -> bool:
        """Return whether log-probabilities are to be computed."""
        return self.return_logprobs or self.candidates > self.num_return_sequences


def check_search(
    name: str,
    model: Mamba2ForCausalLM,
    *,
    temperature: Any,
    num_return_sequences: int,
    best_of: int | None,
    num_beams: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
    draft: Any,
    num_draft_tokens: int,
    has_ids: bool,
    return_logprobs: bool,
) -> Search:
    """Check the options of the function `name` against each other.

    Raises:
        ValueError: an invalid option, or two that exclude each other; the message names them.
    """
    count = positive_integer(name, "num_return_sequences", num_return_sequences)
    beams = positive_integer(name, "num_beams", num_beams)
    candidates = count if best_of is None else positive_integer(name, "best_of", best_of)
    greedy = is_concrete(temperature) and temperature == 0
    check_choice(name, "early_stopping", early_stopping, (True, False, "never"))
    if not isinstance(length_penalty, int | float) or not math.isfinite(length_penalty):
        raise ValueError(f"{name}: length_penalty={length_penalty!r} must be a finite number")
    if candidates < count:
        raise ValueError(f"{name}: best_of={candidates} is less than num_return_sequences={count}")
    if beams > 1:
        excluded = {
            "temperature": not greedy,
            "best_of": best_of is not None,
            "draft": draft is not None,
            "return_logprobs": return_logprobs,
        }
        for option, given in excluded.items():
            if given:
                raise ValueError(f"{name}: num_beams={beams} does not go with {option}; leave one out")
        if count > beams:
            raise ValueError(f"{name}: num_return_sequences={count} is above num_beams={beams}")
        if beams > model.config.vocab_size:
            raise ValueError(f"{name}: num_beams={beams} is above the vocabulary {model.config.vocab_size}")
    elif candidates > 1 and greedy:
        option = "num_return_sequences" if best_of is None else "best_of"
        raise ValueError(
            f"{name}: {option}={candidates} greedy texts of a prompt would be the same; set temperature or "
            "num_beams"
        )
    if draft is not None:
        _check_draft(name, model, draft, has_ids)
    return Search(
        num_return_sequences=count,
        candidates=candidates,
        num_beams=beams,
        length_penalty=float(length_penalty),
        early_stopping=early_stopping,
        num_draft_tokens=0 if draft is None else positive_integer(name, "num_draft_tokens", num_draft_tokens),
        return_logprobs=return_logprobs,
    )


def _check_draft(name: str, model: Mamba2ForCausalLM, draft: Any, has_ids: bool) -> None:
    if not isinstance(draft, Mamba2ForCausalLM | PromptLookup):
        raise ValueError(f"{name}: draft wants a Mamba2ForCausalLM or PromptLookup(), got {draft!r}")
    if not has_ids:
        raise ValueError(f"{name}: a draft reads input_ids; leave it out with inputs_embeds")
    if model.backbone.mesh is not None:
        raise ValueError(f"{name}: draft does not work with a model on a mesh; leave it out")
    if isinstance(draft, Mamba2ForCausalLM) and draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{name}: the draft's vocab_size={draft.config.vocab_size} is not the model's "
            f"{model.config.vocab_size}; draft with a model of the same tokenizer"
        )


def take_best(state: DecodeState, search: Search) -> tuple[DecodeState, Float[Array, " n"]]:
    """Take each prompt's texts of the highest mean log-probability, best first; also return the means."""
    if state.logprobs is None:
        raise ValueError("take_best: the state has no log-probabilities; start it with with_logprobs=True")
    means = state.logprobs.sum(axis=1) / state.lengths
    means = means.reshape(-1, search.candidates)
    scores, best = jax.lax.top_k(means, search.num_return_sequences)
    rows = jnp.arange(means.shape[0])[:, None] * search.candidates + best
    return state.take(rows.reshape(-1)), scores.reshape(-1)
