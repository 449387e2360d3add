"""Configuration of the attention layers in hybrid checkpoints: fields, defaults and checks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mamba2_jax.config import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Options of the attention layers in hybrid checkpoints: the arguments of the original's `MHA`.

    `Mamba2Config` replaces None in `num_heads_kv` and `head_dim` by integers. `d_conv` is the number of taps
    of the convolution over q, k and v (0: none). Rotary embeddings rotate the first `rotary_emb_dim` channels
    of each head. `mlp_dim` adds a gated MLP in parallel to the heads (0: none). `separate`: q, k and v have
    tensors of their own (`q_proj`, `k_proj`, `v_proj`, `o_proj`), as in transformers' models; such layers
    have neither convolution nor MLP.
    """

    num_heads: int
    num_heads_kv: int | None = None
    head_dim: int | None = None
    mlp_dim: int = 0
    causal: bool = True
    d_conv: int = 0
    qkv_proj_bias: bool = True
    out_proj_bias: bool = True
    rotary_emb_dim: int = 0
    rotary_emb_base: float = 10000.0
    rotary_emb_interleaved: bool = False
    softmax_scale: float | None = None
    separate: bool = False

    def original_fields(self) -> dict[str, Any]:
        """Return the arguments of the original's `MHA`."""
        fields = dataclasses.asdict(self)
        del fields["separate"]
        return fields

    @property
    def query_width(self) -> int:
        """Return the channels of all query heads: `num_heads * head_dim`."""
        return self.num_heads * (self.head_dim or 0)

    @property
    def key_width(self) -> int:
        """Return the channels of all key heads, and of all value heads: `num_heads_kv * head_dim`."""
        return (self.num_heads_kv or 0) * (self.head_dim or 0)

    @property
    def mlp_width(self) -> int:
        """Return the channels of the MLP's value, and of its gate: half of `mlp_dim` rounded up to 256."""
        return -(-self.mlp_dim // 256) * 128


def attention_config(value: Any, hidden_size: int) -> AttentionConfig | None:
    """Convert a mapping to a checked `AttentionConfig`, with default head counts and sizes filled in."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        known = {field.name for field in dataclasses.fields(AttentionConfig)}
        unknown = sorted(set(value) - known)
        if unknown or "num_heads" not in value:
            raise ValueError(
                f"Mamba2Config: attn_cfg has the keys {sorted(value)}; it wants num_heads and may have "
                f"{sorted(known - {'num_heads'})}"
            )
        value = AttentionConfig(**value)
    if not isinstance(value, AttentionConfig):
        raise ValueError(f"Mamba2Config: attn_cfg={value!r}, wants a mapping or an AttentionConfig")
    if value.num_heads_kv is None:
        value = dataclasses.replace(value, num_heads_kv=value.num_heads)
    heads = value.num_heads
    if value.head_dim is None and isinstance(heads, int) and heads > 0 and hidden_size % heads == 0:
        value = dataclasses.replace(value, head_dim=hidden_size // heads)
    problems = checks.attention_problems(dataclasses.asdict(value))
    if problems:
        raise ValueError("Mamba2Config: attn_cfg: " + "; ".join(problems))
    return value
