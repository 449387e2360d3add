"""Look inside a model: what its mixers compute for a text, the attention this implies, how far it reaches."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mamba2_jax.layers.mamba2 import Mamba2Mixer
from mamba2_jax.models.inputs import batch_and_length, check_inputs, join_rows
from mamba2_jax.ops import ssd
from mamba2_jax.ops.scan.decay import log_decay, log_decays
from mamba2_jax.typing import Array, Bool, Float, Int

if TYPE_CHECKING:
    from mamba2_jax.models.mamba2 import Mamba2ForCausalLM, Mamba2Model


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixerValues:
    """What one Mamba-2 mixer computes for a text: the arguments of `ops.ssd`, and states."""

    hidden: Float[Array, "b l d"]
    """The residual stream before the layer."""
    x: Float[Array, "b l h p"]
    """Values, after the convolution."""
    dt: Float[Array, "b l h"]
    """Step sizes, after softplus and clamp; 0 at padding."""
    A: Float[Array, " h"]
    """Decay per unit of dt, negative."""
    B: Float[Array, "b l g n"]
    """Where in the state each token writes."""
    C: Float[Array, "b l g n"]
    """Where in the state each token reads."""
    D: Float[Array, "h *p"]
    """Weight of `x` itself in the output."""
    valid: Bool[Array, "b l"]
    """Whether a token is not padding."""
    states: Float[Array, "b t h p n"] | None = None
    """State after each of the `t` requested positions."""

    @property
    def decay(self) -> Float[Array, "b l h"]:
        """Return the factor on the state at each token, `exp(dt * A)` in 0..1."""
        return jnp.exp(log_decay(self.dt, self.A))

    @property
    def memory(self) -> Float[Array, "b h"]:
        r"""Return the effective memory length of each head: tokens until what is in its state decays to 1/e.

        $$\frac{l}{\sum_t -dt_t A}$$

        the inverse of the mean log decay over the valid tokens of a row. It bounds how far a head can look
        back, and may exceed the length of the text; what it reads of that, `attention` shows.
        """
        return self.valid.sum(axis=1)[:, None] / -log_decay(self.dt, self.A).sum(axis=1)

    def attention(self, head: int, row: int = 0) -> Float[Array, "l l"]:
        r"""Return the matrix `M (l, l)` of the duality for one head, with $y = M x + D x$.

        $$M_{ts} = (C_t \cdot B_s)\; e^{A (dt_{s+1} + \dots + dt_t)}\; dt_s, \qquad s \le t$$

        Row `t` says how much of each earlier token `s` is in the output at `t`; entries may be negative, and
        rows do not sum to 1. Source: Dao & Gu 2024, arXiv:2405.21060, section 3.
        """
        group = head // (self.dt.shape[2] // self.B.shape[2])
        full = self.dt.dtype
        scores = jnp.einsum(
            "qn,sn->qs", self.C[row, :, group].astype(full), self.B[row, :, group].astype(full)
        )
        dt = self.dt[row, :, head]
        between = log_decays(log_decay(dt, self.A[head])).between  # (q, s)
        return jnp.tril(scores * jnp.exp(between) * dt)


def inspect(
    model: "Mamba2Model | Mamba2ForCausalLM",
    input_ids: Int[Array, "b l"] | None = None,
    attention_mask: Int[Array, "b l"] | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] = (),
    inputs_embeds: Float[Array, "b l d"] | None = None,
) -> dict[int, MixerValues]:
    """Return what the Mamba-2 mixers of some layers compute for a text. Also works inside your own `jit`.

    The model runs as always; the inputs of the chosen mixers are then projected once more.

    Args:
        model: any model of this package.
        input_ids: `(b, l)` token ids.
        attention_mask: `(b, l)` of 0/1; padding at either end.
        layers: numbers of layers, from the end if negative; None: all with a Mamba-2 mixer.
        positions: positions in `0..l-1`, from the end if negative, after which to return the states.
        inputs_embeds: `(b, l, d)` instead of `input_ids`.

    Returns:
        The values by number of layer.

    Raises:
        ValueError: an invalid argument, or a layer without a Mamba-2 mixer.

    >>> from mamba2_jax import Mamba2Model
    >>> values = inspect(Mamba2Model.from_pretrained(), jnp.array([[1, 2, 3, 4]]), layers=[0], positions=[-1])
    >>> values[0].memory.shape, values[0].attention(head=3).shape, values[0].states.shape
    ((1, 8), (4, 4), (1, 1, 8, 64, 64))
    """
    backbone: Any = getattr(model, "backbone", model)
    inputs = check_inputs("inspect", model.config, input_ids, attention_mask, None, None, inputs_embeds)
    _, length = batch_and_length(inputs[0], inputs_embeds)
    mixers = [i for i, block in enumerate(backbone.layers) if _has_mixer(block)]
    chosen = mixers if layers is None else _from_start("layers", layers, len(backbone.layers))
    if without := sorted(set(chosen) - set(mixers)):
        raise ValueError(f"inspect: layer {without[0]} has no Mamba-2 mixer; those with one are {mixers}")
    places = _from_start("positions", positions, length)
    with backbone.on_its_device():
        return _inspect(backbone, *inputs, layers=tuple(chosen), positions=tuple(places))


@partial(jax.jit, static_argnames=("layers", "positions"))
def _inspect(
    backbone: "Mamba2Model", *inputs, layers: tuple[int, ...], positions: tuple[int, ...]
) -> dict[int, MixerValues]:
    input_ids, mask, _, _, inputs_embeds = inputs
    out = backbone.forward(*inputs, output_hidden_states=True)
    rows = join_rows(mask, None)
    streams = (backbone.first_hidden(input_ids, inputs_embeds), *(out.hidden_states or ()))
    batch, length, _ = streams[0].shape
    valid = jnp.ones((batch, length), bool) if rows.mask is None else rows.mask
    values = {}
    for index in layers:
        block: Any = backbone.layers[index]
        normed = block.norm(streams[index]).astype(block.dtype)
        scan = block.mixer.scan_inputs(normed, block.mixer.initial_state(batch), rows)
        states = _states_after(positions, **scan) if positions else None
        values[index] = MixerValues(streams[index], valid=valid, states=states, **scan)
    return values


def _states_after(positions: tuple[int, ...], A, D, **by_token: Array) -> Float[Array, "b t h p n"]:
    """Scan from each position to the next, and stack the states there, in the order asked for."""
    states, state, start = {}, None, 0
    for position in sorted(set(positions)):
        piece = {name: array[:, start : position + 1] for name, array in by_token.items()}
        _, state = ssd(piece["x"], piece["dt"], A, piece["B"], piece["C"], initial_state=state)
        states[position], start = state, position + 1
    return jnp.stack([states[position] for position in positions], axis=1)


def _has_mixer(block) -> bool:
    return isinstance(getattr(block, "mixer", None), Mamba2Mixer)


def _from_start(name: str, numbers: Sequence[int], count: int) -> list[int]:
    wrong = [number for number in numbers if not -count <= number < count]
    if wrong:
        raise ValueError(f"inspect: {name} has {wrong[0]}, outside {-count}..{count - 1}")
    return [int(number) % count for number in numbers]
