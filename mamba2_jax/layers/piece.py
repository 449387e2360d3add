"""Mixers and blocks on their own, as layers of other models: plain sizes in, `(b, l, d)` to `(b, l, d)`."""

from abc import abstractmethod
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.rows import check_mask, check_segments, join_rows
from mamba2_jax.layers.state import LayerState, Rows
from mamba2_jax.ops.checks import check_dtype, check_shape
from mamba2_jax.typing import Array, Float, Int


class Sizes(TypedDict, total=False):
    """Sizes of a mixer beside its width."""

    state_size: int
    head_dim: int
    num_heads: int | None
    expand: int
    n_groups: int
    conv_kernel: int
    use_bias: bool
    use_conv_bias: bool


DEFAULTS: dict[str, Any] = {
    "state_size": 128,
    "head_dim": 64,
    "num_heads": None,
    "expand": 2,
    "n_groups": 1,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "d_intermediate": 0,
    "residual_in_fp32": True,
    "layer_norm_epsilon": 1e-5,
}
"""Sizes and options of a mixer or block beside its width."""


class Piece(nnx.Module):
    """Base class of the layers that other models can use: the public call around `mix`."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """Return the width of the input and the output."""

    @property
    @abstractmethod
    def out_dtype(self) -> jnp.dtype:
        """Return the dtype of the output."""

    @abstractmethod
    def initial_state(self, batch: int) -> LayerState:
        """Return the state of `batch` rows before any token, a pytree of arrays of fixed size."""

    @abstractmethod
    def mix(self, hidden: Array, state: LayerState, rows: Rows) -> tuple[Array, LayerState]:
        """Run the layer on checked arguments, for callers inside the package."""

    def __call__(
        self,
        hidden: Float[Array, "b l d"],
        attention_mask: Int[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        *,
        state: LayerState | None = None,
        reverse: bool = False,
    ) -> Float[Array, "b l d"] | tuple[Float[Array, "b l d"], LayerState]:
        """Run the layer on a sequence of vectors.

        Args:
            hidden: `(b, l, d)`.
            attention_mask: `(b, l)` of 0/1; padding at the left or the right end of a row. Padding does not
                change the results of a row; those at the padding itself are unspecified.
            segment_ids: `(b, l)`; 0 is padding, any change starts a document independent of all others.
            state: the state to continue from, of `initial_state` or of an earlier call, with any number of
                new tokens; one token takes the decoding path.
            reverse: read from right to left: each token sees itself and those after it. For a bidirectional
                layer add a second one with `reverse=True`.

        Returns:
            `(b, l, d)` in the compute dtype (a block: in that of its stream); with `state` also the state
            after the last token (with `reverse`, the first).

        Raises:
            ValueError: an invalid argument; the message names it.
        """
        name = type(self).__name__
        check_shape(name, "hidden", hidden, "b l d", d=self.hidden_size)
        check_dtype(name, hidden=hidden)
        batch, length, _ = hidden.shape
        marks: Any = (
            None if attention_mask is None else check_mask(name, attention_mask, batch, length),
            None if segment_ids is None else check_segments(name, segment_ids, batch, length),
        )
        rows = jax.tree.map(jnp.asarray, join_rows(*marks))
        before = self._checked_state(state, batch)
        if reverse:
            hidden, rows = _flipped((hidden, rows))
        out, after = self.mix(hidden, before, rows)
        out = (_flipped(out) if reverse else out).astype(self.out_dtype)
        return out if state is None else (out, after)

    def _checked_state(self, state: LayerState | None, batch: int) -> LayerState:
        if state is None:
            return self.initial_state(batch)
        wanted = jax.eval_shape(lambda: self.initial_state(batch))
        if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, wanted):
            raise ValueError(
                f"{type(self).__name__}: state does not fit this layer and a batch of {batch}; begin with "
                f"initial_state({batch})"
            )
        return state


def piece_config(name: str, hidden_size: int | Mamba2Config, **sizes: Any) -> Mamba2Config:
    """Return the config of a layer on its own; that of a model is returned as it is.

    Args:
        name: name of the class, for messages.
        hidden_size: width of the layer, or a config.
        **sizes: fields of `Mamba2Config`, of those in `DEFAULTS`.

    Raises:
        ValueError: invalid sizes, or a config beside sizes.
        TypeError: an unknown size.
    """
    if unknown := sizes.keys() - DEFAULTS.keys():
        raise TypeError(f"{name} got unexpected arguments: {', '.join(sorted(unknown))}")
    sizes = DEFAULTS | sizes
    if isinstance(hidden_size, Mamba2Config):
        given = [key for key, value in sizes.items() if value != DEFAULTS[key]]
        if given:
            raise ValueError(f"{name}: {', '.join(given)} given beside a config, which has all sizes")
        return hidden_size
    inner, head_dim = sizes["expand"] * hidden_size, sizes["head_dim"]
    if sizes["num_heads"] is None:
        if inner % head_dim:
            raise ValueError(
                f"{name}: expand * hidden_size = {inner} is not a multiple of head_dim={head_dim}; "
                "give another head_dim, or num_heads"
            )
        sizes["num_heads"] = inner // head_dim
    try:
        return Mamba2Config(
            hidden_size=hidden_size,
            d_ssm=sizes["num_heads"] * head_dim,
            family="piece",  # no family: it has no files, and any number of heads
            num_hidden_layers=1,
            vocab_size=1,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            **sizes,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("Mamba2Config", name, 1)) from None


def _flipped(tree: Any) -> Any:
    """Reverse the token axis of all arrays `(b, l, ...)`."""
    return jax.tree.map(lambda array: jnp.flip(array, axis=1), tree)
