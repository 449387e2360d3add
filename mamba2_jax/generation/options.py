"""The options of `generate` and `stream`, once."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mamba2_jax.generation.drafts import Draft, DraftState
from mamba2_jax.generation.processors import Processor
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.typing import Array


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options as given, not checked yet; `generate` says what each means."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    vocab_size: int | None = None
    key: Array | None = None
    cache: Mamba2Cache | None = None
    return_logprobs: bool = False
    inputs_embeds: Array | None = None
    logits_processors: Sequence[Processor] = ()
    num_return_sequences: int = 1
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    draft: Draft | None = None
    num_draft_tokens: int = 4
    draft_cache: DraftState | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """Return the options of `make_sampler`."""
        return {name: getattr(self, name) for name in SAMPLING}


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def make_options(name: str, given: Mapping[str, Any]) -> Options:
    """Make the options of the function `name` from keyword arguments.

    Raises:
        TypeError: an unknown option; the message lists all.
    """
    known = [field.name for field in dataclasses.fields(Options)]
    for option in given:
        if option not in known:
            raise TypeError(f"{name}: there is no option {option!r}; the options are {', '.join(known)}")
    return Options(**given)
