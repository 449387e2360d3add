"""The optimizer: AdamW or Muon with a schedule, decay only where it makes sense, and clipping, from Optax."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import optax

from mamba2_jax.config.kinds import role_of
from mamba2_jax.ops.checks import check_choice
from mamba2_jax.typing import Array

Schedule = Literal["cosine", "linear", "wsd", "constant"]
_MUON_RMS = 0.2  # of an update, about AdamW's, so that one learning rate does for both: arXiv:2502.16982


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate.

    Raises:
        ValueError: a value that makes no sense, named.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon makes the updates of the blocks' projections orthogonal, and gives the rest to AdamW with
    Nesterov's momentum; for training from random weights, where it needs fewer tokens. Its own momentum is
    0.95."""
    learning_rate: float = 1e-4
    """The highest, after warming up."""
    schedule: Schedule = "cosine"
    """What follows the warm-up; wsd stays at the top and falls linearly in the last part (`decay`)."""
    warmup: int = 0
    """Steps of linear rise."""
    decay: float = 0.2
    """wsd: the share of all steps that falls."""
    final: float = 0.0
    """The last learning rate, as a share of the highest (cosine, linear, wsd)."""
    weight_decay: float = 0.01
    """Of matrices; never of A_log, D, dt_bias, norms and biases."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    """Largest norm of all gradients together; 0 is none."""

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
            if not fits:
                raise ValueError(f"OptimConfig: {name}={getattr(self, name)} is out of range")


def learning_rate(config: OptimConfig, steps: int) -> Callable[[Any], Array]:
    """Build the schedule: update number (from 0) -> learning rate.

    Args:
        config: shape and height.
        steps: updates in the whole run.

    Raises:
        ValueError: the warm-up does not fit into the run.

    >>> rate = learning_rate(OptimConfig(learning_rate=1.0, warmup=2, schedule="linear"), steps=4)
    >>> [float(rate(step)) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if config.warmup >= steps > 0 and config.warmup > 0:
        raise ValueError(
            f"OptimConfig: warmup={config.warmup} leaves nothing of {steps} steps; make it shorter"
        )

    def rate(count: Any) -> Array:
        after = jnp.asarray(count, jnp.float32) - config.warmup
        rise = jnp.minimum(1.0, (after + config.warmup + 1) / max(config.warmup, 1))
        past = jnp.clip(after / max(steps - config.warmup, 1), 0.0, 1.0)  # of what follows the warm-up
        if config.schedule == "cosine":
            height = (1 + jnp.cos(jnp.pi * past)) / 2
        elif config.schedule == "linear":
            height = 1 - past
        elif config.schedule == "wsd":
            left = steps - after - config.warmup  # updates left, this one included
            height = jnp.minimum(1.0, left / max(config.decay * steps, 1.0))
        else:
            return config.learning_rate * rise
        return config.learning_rate * rise * (config.final + (1 - config.final) * height)

    return rate


def decayed(name: str) -> bool:
    """Whether weight decay acts on the parameter at this path.

    >>> decayed("backbone.layers.0.mixer.out_proj.weight"), decayed("backbone.layers.0.norm.weight")
    (True, False)
    """
    role = role_of(name)
    return role is None or role.decays  # an adapter's matrices are in no model's table


def make_optimizer(config: OptimConfig, names: Iterable[str], steps: int) -> optax.GradientTransformation:
    """Chain clipping and AdamW or Muon for parameters in a flat dict from path to array.

    Args:
        config: the options.
        names: the paths of the parameters that are trained.
        steps: updates in the whole run.

    Returns:
        The same object for the same arguments, so that a step is not compiled again.
    """
    return _make_optimizer(config, tuple(names), steps)


def projection(name: str) -> bool:
    """Whether the parameter at this path is a matrix between two widths of a block: input first, output last.

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

        matrix = MuonDimensionNumbers(0, -1)  # an axis between them holds matrices side by side
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
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=chosen,
        )
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
