"""How many texts per prompt, and how they are found: sampled, the best of several, beams, or with a draft."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mamba2_jax.generation.drafts import PromptLookup
from mamba2_jax.generation.options import Options
from mamba2_jax.generation.sampling import positive_integer
from mamba2_jax.generation.state import DecodeState
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.ops.checks import check_choice, is_concrete
from mamba2_jax.typing import Array, Float, Int


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
    def decodes_whole(self) -> bool:
        """Return whether no text is known before all are complete."""
        return self.num_beams > 1 or self.candidates > 1

    @property
    def needs_logprobs(self) -> bool:
        """Return whether log-probabilities are to be computed."""
        return self.return_logprobs or self.candidates > self.num_return_sequences


def check_search(name: str, model: Mamba2ForCausalLM, options: Options) -> Search:
    """Check the options of the function `name` against each other.

    Raises:
        ValueError: an invalid option, or two that exclude each other; the message names them.
    """
    best_of, draft = options.best_of, options.draft
    count = positive_integer(name, "num_return_sequences", options.num_return_sequences)
    beams = positive_integer(name, "num_beams", options.num_beams)
    candidates = count if best_of is None else positive_integer(name, "best_of", best_of)
    greedy = is_concrete(options.temperature) and options.temperature == 0
    check_choice(name, "early_stopping", options.early_stopping, (True, False, "never"))
    penalty = options.length_penalty
    if not isinstance(penalty, int | float) or not math.isfinite(penalty):
        raise ValueError(f"{name}: length_penalty={penalty!r} must be a finite number")
    if candidates < count:
        raise ValueError(f"{name}: best_of={candidates} is less than num_return_sequences={count}")
    if beams > 1:
        excluded = {
            "temperature": not greedy,
            "best_of": best_of is not None,
            "draft": draft is not None,
            "return_logprobs": options.return_logprobs,
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
        _check_draft(name, model, draft, options.inputs_embeds is None)
    return Search(
        num_return_sequences=count,
        candidates=candidates,
        num_beams=beams,
        length_penalty=float(penalty),
        early_stopping=options.early_stopping,
        num_draft_tokens=0
        if draft is None
        else positive_integer(name, "num_draft_tokens", options.num_draft_tokens),
        return_logprobs=options.return_logprobs,
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


def best_rows(state: DecodeState, search: Search) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """Return the rows of each prompt's texts of highest mean log-probability, best first, and the means."""
    if state.logprobs is None:
        raise ValueError("best_rows: the state has no log-probabilities; start it with with_logprobs=True")
    means = state.logprobs.sum(axis=1) / state.lengths
    means = means.reshape(-1, search.candidates)
    scores, best = jax.lax.top_k(means, search.num_return_sequences)
    rows = jnp.arange(means.shape[0])[:, None] * search.candidates + best
    return rows.reshape(-1), scores.reshape(-1)
