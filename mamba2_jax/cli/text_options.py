"""Options that `mamba2-jax generate` and `chat` share."""

import dataclasses
from typing import Annotated, Literal, TypeAlias

from tyro.conf import UseAppendAction, arg

from mamba2_jax.cli.errors import CommandError
from mamba2_jax.weight_types import TypeName

Path: TypeAlias = Annotated[str | None, arg(metavar="PATH")]
Number: TypeAlias = Annotated[float | None, arg(metavar="FLOAT")]
Count: TypeAlias = Annotated[int | None, arg(metavar="INT")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of the commands that write text."""

    model: Path = None
    """Folder or hub id of the checkpoint (None: the adapter's base, else the embedded model)."""
    adapter: Path = None
    """Folder or hub id of a LoRA adapter for the model."""
    tokenizer: Path = None
    """Folder or hub id of the tokenizer (None: the checkpoint's own)."""
    max_new_tokens: Count = None
    """Maximum number of new tokens (None: the checkpoint's, else 128)."""
    temperature: Number = None
    """Sampling temperature; 0 is greedy."""
    top_k: Count = None
    """Sample from the k most likely tokens; 0 is no limit."""
    top_p: Number = None
    """Sample from the most likely tokens that together reach this probability."""
    min_p: Number = None
    """Sample from tokens with at least this fraction of the top token's probability."""
    repetition_penalty: Number = None
    """Above 1 penalizes tokens that the text already contains."""
    presence_penalty: Number = None
    """Subtracted from the logits of tokens that the new text already contains."""
    frequency_penalty: Number = None
    """Subtracted from the logit of a token for each time that the new text already contains it."""
    seed: int = 0
    """Random seed; the same seed gives the same text."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """Stop string: ends the text and is not printed; may be repeated."""
    ban: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="WORD")] = ()
    """Word that must not occur in the text; may be repeated."""
    regex: Annotated[str | None, arg(metavar="REGEX")] = None
    """Regular expression that the text must match as a whole; needs outlines-core."""
    json_schema: Annotated[str | None, arg(metavar="FILE")] = None
    """File with a JSON schema, or the schema itself, that the text must fit; needs outlines-core."""
    draft: Path = None
    """Decode speculatively: folder or hub id of a smaller model of the same tokenizer, or prompt-lookup."""
    num_draft_tokens: Count = None
    """Tokens that the draft guesses per call of the model (None: 4)."""
    num_beams: Count = None
    """Beam search with so many beams; the text comes as a whole."""
    length_penalty: Number = None
    """Exponent of the length that divides a beam's log-probability (None: 1)."""
    best_of: Count = None
    """Sample so many texts and take the likeliest; it comes as a whole."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 if the weights are stored in bfloat16, else float32."""
    quantize: TypeName | None = None
    """Quantize the weights while loading them."""
    system: Annotated[str | None, arg(metavar="TEXT")] = None
    """System message of the chat."""
    chat_template: Annotated[str | None, arg(metavar="FILE")] = None
    """File with a Jinja chat template (None: the tokenizer's own)."""

    def check(self) -> None:
        """Raise CommandError for options that need no model to be seen as wrong."""
        if not 0 <= self.seed < 2**32:
            raise CommandError(f"--seed {self.seed} must lie in 0..{2**32 - 1}")
        if "" in self.stop:
            raise CommandError("--stop is empty; give it at least one character")
        if "" in self.ban:
            raise CommandError("--ban is empty; give it at least one character")
        if self.regex is not None and self.json_schema is not None:
            raise CommandError("--regex and --json-schema: a text can follow one of them; leave one out")
        if self.num_draft_tokens is not None and self.draft is None:
            raise CommandError("--num-draft-tokens needs --draft")
        if self.length_penalty is not None and (self.num_beams or 1) == 1:
            raise CommandError("--length-penalty needs --num-beams above 1")
