"""Mamba-2's maths as pure functions of arrays: no Flax, no config object, no I/O."""

from mamba2_jax.ops.attention import attention_step, causal_attention, rotary_embedding, write_slots
from mamba2_jax.ops.conv.causal_conv1d import causal_conv1d, causal_conv1d_step
from mamba2_jax.ops.conv.sharded import causal_conv1d_sharded
from mamba2_jax.ops.experts import experts, experts_sharded
from mamba2_jax.ops.gate import silu_gate
from mamba2_jax.ops.mixer_step import MixerOptions, MixerState, MixerWeights, mixer_step
from mamba2_jax.ops.rms_norm import gated_rms_norm, rms_norm
from mamba2_jax.ops.scan.api import ssd, ssd_step
from mamba2_jax.ops.scan.sharded import ssd_sharded

__all__ = [
    "MixerOptions",
    "MixerState",
    "MixerWeights",
    "attention_step",
    "causal_attention",
    "causal_conv1d",
    "causal_conv1d_sharded",
    "causal_conv1d_step",
    "experts",
    "experts_sharded",
    "gated_rms_norm",
    "mixer_step",
    "rms_norm",
    "rotary_embedding",
    "silu_gate",
    "ssd",
    "ssd_sharded",
    "ssd_step",
    "write_slots",
]
