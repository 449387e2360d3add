"""Build the Optax optimizer: AdamW or Muon, a learning-rate schedule, masked weight decay, and clipping."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import optax

from mamba2_jax.config.table import role_of
from mamba2_jax.ops.checks import check_choice
from mamba2_jax.training.carry import INITIAL_STATE
from mamba2_jax.typing import Array

Schedule = Literal["cosine", "linear", "wsd", "constant"]
_MUON_RMS = 0.2  # RMS of an update, about AdamW's, so both share a learning rate: arXiv:2502.16982


@dataclass(frozen=True)
class OptimConfig:
    """Options of the optimizer and its learning-rate schedule.

    Raises:
        ValueError: a value is out of range or not a known choice; the message names the option.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalizes the updates of the blocks' projections, with momentum 0.95, and updates all other
    parameters by AdamW with Nesterov momentum; use it to train from random weights, where it needs fewer
    tokens."""
    learning_rate: float = 1e-4
    """Peak learning rate, reached at the end of the warm-up."""
    schedule: Schedule = "cosine"
    """Shape after the warm-up; wsd (warmup-stable-decay) holds the peak, then decays linearly (`decay`)."""
    warmup: int = 0
    """Steps of linear warm-up."""
    decay: float = 0.2
    """wsd: fraction of all steps spent in the final linear decay."""
    final: float = 0.0
    """Learning rate of the last step as a fraction of the peak (cosine, linear, wsd)."""
    weight_decay: float = 0.01
    """Weight decay of matrices; A_log, D, dt_bias, norms and biases are never decayed."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    """Maximum global norm of the gradients; 0 disables clipping."""

    def __post_init__(self):
        check_choice("OptimConfig", "optimizer", self.optimizer, ("adamw", "muon"))
        check_choice("OptimConfig", "schedule", self.schedule, ("cosine", "linear", "wsd", "constant"))
        limits = {
            "learning_rate": self.learning_rate > 0,
            "warmup": self.warmup >= 0,
            "decay": 0 < self.decay <= 1,
            "final": 0 <= self.final <= 1,
            "weight_decay": self.weight_decay >= 0,
            "beta1": 0 <= self.beta1 < 1,
            "beta2": 0 <= self.beta2 < 1,
            "eps": self.eps > 0,
            "clip": self.clip >= 0,
        }
        for name, fits in limits.items():
            if not fits or not math.isfinite(getattr(self, name)):
                raise ValueError(f"OptimConfig: {name}={getattr(self, name)} is out of range")
        if self.schedule == "constant" and self.final:
            raise ValueError(f"OptimConfig: final={self.final} needs a schedule that falls, not 'constant'")
        if self.schedule != "wsd" and self.decay != type(self).decay:
            raise ValueError(f"OptimConfig: decay={self.decay} needs schedule='wsd', not {self.schedule!r}")


def learning_rate(config: OptimConfig, steps: int) -> Callable[[Any], Array]:
    """Build the schedule, a function from update number (from 0) to learning rate.

    Args:
        config: peak, warm-up and shape of the schedule.
        steps: updates in the whole run.

    Raises:
        ValueError: the warm-up is not shorter than the run.

    >>> rate = learning_rate(OptimConfig(learning_rate=1.0, warmup=2, schedule="linear"), steps=4)
    >>> [float(rate(step)) for step in range(4)]
    [0.5, 1.0, 1.0, 0.0]
    """
    if config.warmup >= steps > 0 and config.warmup > 0:
        raise ValueError(
            f"OptimConfig: warmup={config.warmup} leaves nothing of {steps} steps; make it shorter"
        )

    def rate(count: Any) -> Array:
        after = jnp.asarray(count, jnp.float32) - config.warmup
        rise = jnp.minimum(1.0, (after + config.warmup + 1) / max(config.warmup, 1))
        past = jnp.clip(after / max(steps - config.warmup - 1, 1), 0.0, 1.0)  # 1 at the last update
        if config.schedule == "cosine":
            height = (1 + jnp.cos(jnp.pi * past)) / 2
        elif config.schedule == "linear":
            height = 1 - past
        elif config.schedule == "wsd":
            left = steps - 1 - after - config.warmup  # updates left after this one
            height = jnp.clip(left / max(config.decay * steps, 1.0), 0.0, 1.0)
        else:
            return config.learning_rate * rise
        return config.learning_rate * rise * (config.final + (1 - config.final) * height)

    return rate


def decayed(name: str) -> bool:
    """Tell whether weight decay applies to the parameter at path `name`.

    >>> decayed("backbone.layers.0.mixer.out_proj.weight"), decayed("backbone.layers.0.norm.weight")
    (True, False)
    """
    role = role_of(name)
    if role is None:
        return not name.startswith(INITIAL_STATE)  # adapter matrices have no role
    return role.decays


def make_optimizer(config: OptimConfig, names: Iterable[str], steps: int) -> optax.GradientTransformation:
    """Chain clipping with AdamW or Muon, for parameters in a flat dict from path to array.

    Args:
        config: optimizer and schedule.
        names: paths of the trained parameters.
        steps: updates in the whole run.

    Returns:
        The transformation. Cached: equal arguments return the same object, so that a step is not recompiled.
    """
    return _make_optimizer(config, tuple(names), steps)


def projection(name: str) -> bool:
    """Tell whether the parameter at path `name` is a block's projection matrix, input axis first.

    >>> projection("backbone.layers.0.mixer.in_proj.weight_zx"), projection("backbone.embeddings.weight")
    (True, False)
    """
    role = role_of(name)
    return role is not None and role.is_matrix


@functools.lru_cache(maxsize=16)
def _make_optimizer(config: OptimConfig, names: tuple[str, ...], steps: int) -> optax.GradientTransformation:
    rate, is_decayed = learning_rate(config, steps), {name: decayed(name) for name in names}
    if config.optimizer == "muon":
        from optax.contrib import MuonDimensionNumbers, muon

        matrix = MuonDimensionNumbers(0, -1)  # an axis between them batches matrices
        dimensions = {name: matrix if projection(name) else None for name in names}

        def chosen(tree: Any) -> Any:
            return {name: dimensions[name] for name in tree}

        update = muon(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=is_decayed,
            consistent_rms=_MUON_RMS,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.eps,
            adam_weight_decay=0.0,  # which has no mask
            muon_weight_dimension_numbers=chosen,
        )
        others = {name: wanted and dimensions[name] is None for name, wanted in is_decayed.items()}
        shrink = optax.add_decayed_weights(lambda count: -config.weight_decay * rate(count), others)
        update = optax.chain(update, shrink)
    else:
        update = optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_decayed,
        )
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, update)
