"""A parsed `config.json` of a family, read key by key, so that no key that may change numbers is ignored."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mamba2_jax.config.layers import MAX_LAYERS, MAX_SIZE

# Keys of every model in transformers that change no result.
_HARMLESS = {
    *("_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map"),
    *("attention_dropout", "attn_implementation", "chunk_size_feed_forward", "dtype", "hidden_dropout"),
    *("id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type"),
    *("max_position_embeddings", "num_logits_to_keep", "output_attentions", "output_hidden_states"),
    *("num_labels", "output_router_logits", "pretraining_tp", "problem_type", "return_dict"),
    *("tokenizer_class", "torch_dtype"),
    *("transformers_version", "use_cache", "unpadded_vocab_size", "use_mamba_kernels"),
    # options of `generate`, and of other kinds of models, that transformers 4 writes with their defaults
    *("diversity_penalty", "length_penalty", "max_length", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p"),
}
_LAYER_LETTERS = {
    **{"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*"},
    **{"mlp": "-", "moe": "E"},
}


class ConfigFile:
    """A parsed config file that records which of its keys were read.

    >>> file = ConfigFile({"model_type": "bamba", "hidden_size": 64, "qk_norm": True})
    >>> file.get("hidden_size", 4096)
    64
    >>> file.refuse_unread()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    NotImplementedError: config: 'bamba' with qk_norm=True is not supported; remove what changes...
    """

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self.family = content.get("model_type", "mamba2")
        self._read: set[str] = set()

    def get(self, key: str, default: Any) -> Any:
        """Return the value of a key; if absent, `default`, that of the family's class in transformers."""
        self._read.add(key)
        return self.content.get(key, default)

    def number(self, key: str, default: float) -> float:
        """Return a finite number, of which null is the default."""
        value = self.get(key, default)
        return _finite(key, default if value is None else value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Return `count` finite numbers, all 1 if the key is absent or null."""
        values = self.get(key, None)
        if values is None:
            return (1.0,) * count
        if not isinstance(values, list | tuple) or len(values) != count:
            raise ValueError(f"config: {key}={values!r}, wants {count} numbers")
        return tuple(_finite(key, value) for value in values)

    def integer(self, key: str, default: int, most: int = MAX_SIZE) -> int:
        """Return a positive integer up to `most`, of which null is the default."""
        value = self.get(key, default)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"config: {key}={value!r}, wants a positive integer up to {most}")
        return value

    def layers(self, default: int) -> int:
        """Return the number of layers."""
        return self.integer("num_hidden_layers", default, MAX_LAYERS)

    def want(self, key: str, *values: Any) -> None:
        """Refuse a key that has none of the values; an absent key has the first."""
        value = self.get(key, values[0])
        if value not in values:
            self._refuse({key: value})

    def limits(self, key: str = "time_step_limit") -> Any:
        """Return the limits of dt, as `time_limits` reads them."""
        return time_limits(self.get(key, None))

    def layer_letters(self, *keys: str) -> str | None:
        """Return the layer pattern of the first of several lists of layer types; None if all are absent.

        transformers 4 and 5 name the types differently; `_LAYER_LETTERS` has both spellings.
        """
        lists = [self.get(key, None) for key in keys]
        types = next((one for one in lists if one is not None), None)
        if types is None:
            return None
        if not isinstance(types, list | tuple) or not all(str(one) in _LAYER_LETTERS for one in types):
            raise ValueError(f"config: {keys[0]}={types!r}, wants a list of {', '.join(_LAYER_LETTERS)}")
        return "".join(_LAYER_LETTERS[one] for one in types)

    def rotary(self, head_dim: int, *, fraction: float = 1.0, base: float = 10000.0) -> dict[str, Any]:
        """Return the rotary fields of an `AttentionConfig`, from either spelling of transformers' keys.

        Args:
            head_dim: channels of a head.
            fraction: the part of them that the family's class rotates; another one in the file is refused.
            base: default of `rope_theta`.
        """
        parameters = self.get("rope_parameters", None) or {}
        scaling = self.get("rope_scaling", None) or {}
        for keys in (parameters, scaling):
            kind = keys.get("rope_type", keys.get("type", "default"))
            if kind != "default":
                self._refuse({"rope_type": kind})
        base = parameters.get("rope_theta", self.get("rope_theta", base))
        part = parameters.get("partial_rotary_factor", self.get("partial_rotary_factor", fraction))
        if part != fraction:
            self._refuse({"partial_rotary_factor": part})
        return {"rotary_emb_dim": int(head_dim * fraction), "rotary_emb_base": base}

    def special_tokens(self, pad: int | None, bos: int | None, eos: int | None) -> dict[str, Any]:
        """Return the special token ids, with the defaults of the family's class."""
        defaults = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}
        ids = {key: self.get(key, default) for key, default in defaults.items()}
        return {key: None if isinstance(value, int) and value < 0 else value for key, value in ids.items()}

    def refuse_unread(self, harmless: Iterable[str] = ()) -> None:
        """Refuse the keys that were not read, are not known to change no result, and are not empty.

        Raises:
            NotImplementedError: such a key; the message has all of them with their values.
        """
        rest = self.content.keys() - self._read - _HARMLESS - set(harmless)
        if unknown := {key: self.content[key] for key in sorted(rest) if self.content[key]}:
            self._refuse(unknown)

    def _refuse(self, keys: Mapping[str, Any]) -> None:
        first = [f"{str(key)[:80]}={str(value)[:80]}" for key, value in list(keys.items())[:8]]
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        raise NotImplementedError(
            f"config: {self.family!r} with {', '.join(first)}{more} is not supported; remove what changes"
            " no number from the file"
        )


def time_limits(values: Any) -> Any:
    """Decode the limits of dt; null means none, and so does an upper limit that float32 cannot hold.

    JSON has no infinity: it is `Infinity` or "Infinity", `{"__float__": "Infinity"}` in transformers 5, null
    where JavaScript wrote it, or a large number.

    >>> time_limits([0.0, {"__float__": "Infinity"}]), time_limits([0.001, 1e308])
    ((0.0, inf), (0.001, inf))
    """
    if values is None:
        return 0.0, math.inf
    if not isinstance(values, list | tuple) or len(values) != 2:
        return values  # the checks of `Mamba2Config` report it
    low, high = (one.get("__float__", one) if isinstance(one, Mapping) else one for one in values)
    largest = 3.4028234663852886e38
    if high in (None, "Infinity") or isinstance(high, int | float) and high >= largest:
        high = math.inf
    return low, high


def _finite(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"config: {key}={value!r}, wants a finite number")
    return float(value)
