"""Configuration of the MLPs in or after the layers of hybrid models, and the multipliers of some families."""

import dataclasses
from typing import NamedTuple

from mamba2_jax.config.layers import MAX_SIZE


class MLPLayout(NamedTuple):
    """The projections of an MLP, under the names of published files.

    Args:
        inputs: names of the projections from the stream: one that holds a pair, gate and value, or one.
        output: name of the projection to the stream.
        pair: order of the pair in a single input projection; () without one.
        gated: `silu(gate) * value`; False: `relu(value) ** 2`.
    """

    inputs: tuple[str, ...]
    output: str
    pair: tuple[str, ...] = ()
    gated: bool = True


MLP_LAYOUTS: dict[str, MLPLayout] = {
    "fc1_fc2": MLPLayout(("fc1",), "fc2", ("value", "gate")),  # mamba_ssm
    "input_output_linear": MLPLayout(("input_linear",), "output_linear", ("gate", "value")),  # Granite
    "gate_up_down": MLPLayout(("gate_proj", "up_proj"), "down_proj"),  # Bamba, Falcon-H1
    "up_down": MLPLayout(("up_proj",), "down_proj", gated=False),  # Nemotron-H
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Options of an MLP.

    Args:
        width: channels between its projections.
        layout: projections and activation, a key of `MLP_LAYOUTS`.
    """

    width: int
    layout: str = "gate_up_down"

    def __post_init__(self) -> None:
        if type(self.width) is not int or not 1 <= self.width <= MAX_SIZE:
            raise ValueError(f"MLPConfig: width={self.width!r}, wants a positive integer")
        if self.layout not in MLP_LAYOUTS:
            raise ValueError(f"MLPConfig: layout={self.layout!r}, wants one of {', '.join(MLP_LAYOUTS)}")

    @property
    def names(self) -> MLPLayout:
        """Return the names of the projections, and the activation."""
        return MLP_LAYOUTS[self.layout]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Constant factors on activations, 1 unless a family's files say otherwise.

    Args:
        embedding: on the embeddings.
        residual: on the update of every branch.
        logits: on the logits.
        ssm: on z, x, B, C and dt (before `dt_bias`).
        ssm_out: on the output of a Mamba-2 mixer.
        attention_out: on the output of an attention mixer.
        mlp_gate: on an MLP's gate, before silu.
        mlp_out: on the output of an MLP.
    """

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    ssm: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    ssm_out: float = 1.0
    attention_out: float = 1.0
    mlp_gate: float = 1.0
    mlp_out: float = 1.0
