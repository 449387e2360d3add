"""Constraints on a text, as logits processors: banned words, a regular expression, a JSON schema.

Each is a finite automaton over the tokenizer's ids, as a table of states and ids, 4 bytes each.

>>> from mamba2_jax import Mamba2ForCausalLM, load_tokenizer, stream
>>> model, tokenizer = Mamba2ForCausalLM.from_pretrained(), load_tokenizer()
>>> banned = ban_words(model, tokenizer, ["arg", "print"])
>>> text = "".join(stream(model, tokenizer, "def main(", max_new_tokens=8, logits_processors=[banned]))
>>> "arg" in text or "print" in text
False
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mamba2_jax.generation.processors import Processor, follow_automaton, follow_table
from mamba2_jax.generation.streaming import end_ids
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.tokenizer import special_token_ids, token_bytes


def ban_words(model: Mamba2ForCausalLM, tokenizer: Any, words: Sequence[str]) -> Processor:
    """Let none of these words occur in the new text, however it is cut into tokens.

    Args:
        model: the model.
        tokenizer: as `load_tokenizer` returns it.
        words: the words; " a" is only the word after a space, "a" is also part of longer words.

    Raises:
        ValueError: no word, or an empty one.
    """
    if isinstance(words, str) or not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"ban_words: wants a list of words, at least one, none empty, got {words!r}")
    step = _byte_automaton([word.encode() for word in words])
    states = np.arange(len(step))[:, None]
    table = np.repeat(states, model.config.vocab_size, axis=1)  # an id without bytes changes no state
    found = token_bytes(tokenizer)
    ids = np.array(sorted(found, key=lambda index: len(found[index]), reverse=True))
    lengths = np.array([len(found[index]) for index in ids])
    # ids of few bytes are last, so that those with a byte at a position are first
    for position in range(lengths.max(initial=0)):
        here = ids[: np.searchsorted(-lengths, -position)]
        byte = [found[index][position] for index in here]
        table[:, here] = np.where(table[:, here] < 0, -1, step[table[:, here], byte])
    return follow_table(table, 0)


def match_regex(
    model: Mamba2ForCausalLM, tokenizer: Any, pattern: str, *, eos_token_id: Sequence[int] | None = None
) -> Processor:
    """Make the whole new text match a regular expression; it ends only where it does. Needs outlines-core.

    Args:
        model: the model.
        tokenizer: as `load_tokenizer` returns it.
        pattern: in the syntax of Rust's regex-automata: no look-around, no back references.
        eos_token_id: ids that end the text; None: those of `stream`.

    Raises:
        ImportError: outlines-core is not installed.
        ValueError: not such an expression, or nothing can end a text.
    """
    core = _outlines_core()
    ends = eos_token_id or end_ids(model, special_token_ids(tokenizer, model.config))
    if not ends:
        raise ValueError("match_regex: neither tokenizer nor model has an end id; give eos_token_id")
    tokens: dict[bytes, list[int]] = {}
    for index, content in token_bytes(tokenizer).items():
        if content and index not in ends:
            tokens.setdefault(content, []).append(index)
    try:
        index = core.Index(pattern, core.Vocabulary(ends[0], tokens))
    except ValueError as error:
        raise ValueError(f"match_regex: {pattern!r} cannot be followed ({error})") from error
    return follow_automaton(
        index.get_transitions(),
        index.get_initial_state(),
        [*index.get_final_states()],
        vocab_size=model.config.vocab_size,
        eos=ends,
    )


def match_json_schema(
    model: Mamba2ForCausalLM,
    tokenizer: Any,
    schema: str | Mapping[str, Any],
    *,
    eos_token_id: Sequence[int] | None = None,
) -> Processor:
    """Make the new text JSON that fits a schema. Needs outlines-core, whose limits of schemas hold.

    Args:
        model: the model.
        tokenizer: as `load_tokenizer` returns it.
        schema: the JSON schema, as a text or parsed. Strings without `maxLength` may never end.
        eos_token_id: as of `match_regex`.

    Raises:
        ImportError: outlines-core is not installed.
        ValueError: not a schema, or one that cannot be followed.
    """
    core = _outlines_core()
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        pattern = core.json_schema.build_regex_from_schema(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"match_json_schema: the schema cannot be followed ({error})") from error
    return match_regex(model, tokenizer, pattern, eos_token_id=eos_token_id)


def _byte_automaton(words: Sequence[bytes]) -> np.ndarray:
    """Return the next state by state and byte `(states, 256)`; -1 where a word would be complete.

    A state is the longest end of the text that begins a word (Aho & Corasick 1975).
    """
    begins = sorted({word[:size] for word in words for size in range(len(word))}, key=len)
    number = {begin: index for index, begin in enumerate(begins)}
    table = np.empty((len(begins), 256), np.int64)
    for begin, byte in ((begin, byte) for begin in begins for byte in range(256)):
        text = begin + bytes([byte])
        if any(text.endswith(word) for word in words):
            table[number[begin], byte] = -1
            continue
        while text not in number:
            text = text[1:]
        table[number[begin], byte] = number[text]
    return table


def _outlines_core() -> Any:
    try:
        import outlines_core
    except ImportError as error:
        raise ImportError(
            "a regular expression or JSON schema needs outlines-core: pip install outlines-core, or this "
            "package's extra constrain"
        ) from error
    return outlines_core
