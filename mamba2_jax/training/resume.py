"""Check that a resumed run goes on as it began, and tell what is different."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from mamba2_jax.training.checkpoint import OtherRunError
from mamba2_jax.training.config import TrainConfig
from mamba2_jax.training.optim import OptimConfig, learning_rate
from mamba2_jax.training.options import plain

_MAY_CHANGE = ("steps", "learning_rate")
_HASHES = {
    "data": "the tokenized training data",
    "base": "the weights that the run began with",
}


def identity(config: TrainConfig, *, data: str, base: str, dtype: str, steps: int) -> dict[str, Any]:
    """List the settings that decide a run's numbers, those of `_MAY_CHANGE` among them.

    Args:
        config: the options.
        data: fingerprint of the training documents.
        base: fingerprint of the model's weights before training.
        dtype: compute dtype.
        steps: steps of the whole run.
    """
    optim = {f"optim.{name}": value for name, value in plain(config.optim).items() if name != "learning_rate"}
    adapter = {f"lora.{name}": value for name, value in plain(config.lora).items() if "merge" not in name}
    return {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "max_length": config.data.max_length,
        "rows": config.data.rows,
        "shuffle": config.data.shuffle,
        "eval_share": config.data.eval_share,
        "carry_state": config.carry_state,
        "pass_gradient": config.pass_gradient,
        "attention_context": config.attention_context,
        "curriculum": list(config.curriculum),
        "train_initial_state": config.train_initial_state,
        "balance_loss": config.balance_loss,
        "dtype": dtype,
        **adapter,
        **optim,
        "base": base,
        "data": data,
        "steps": steps,
        "learning_rate": config.optim.learning_rate,
    }


def check_identity(
    there: Mapping[str, Any], here: Mapping[str, Any], config: TrainConfig, output: pathlib.Path
) -> None:
    """Raise OtherRunError, which names the first difference, if a run cannot go on with these settings.

    A setting that an older version did not store is not checked.
    """
    for name, value in here.items():
        if name not in there or there[name] == value or name in _MAY_CHANGE:
            continue
        if name in _HASHES:
            raise OtherRunError(
                f"{output}: {_HASHES[name]} ({name}) are other ones here than in the run there; a run goes "
                "on only with the data and the model it began with"
            )
        raise OtherRunError(
            f"{output}: the run there has {name}={there[name]}, this one {value}; a run goes on only with "
            "the data and the options it began with"
        )
    if there.get("steps", here["steps"]) > here["steps"]:
        raise OtherRunError(
            f"{output}: the run there has {there['steps']} steps, this one {here['steps']}; give as many "
            "steps or epochs as it has, or more"
        )
    rate = there.get("learning_rate", here["learning_rate"])
    if rate != here["learning_rate"] and not config.new_learning_rate:
        raise OtherRunError(
            f"{output}: the run there has optim.learning_rate={rate}, this one {here['learning_rate']}; give "
            "that of the run, or new_learning_rate to go on with the other"
        )


def tell_changes(
    there: Mapping[str, Any], here: Mapping[str, Any], optim: OptimConfig, updates: int
) -> list[str]:
    """Describe what is different from the run so far: steps, peak learning rate, and the next learning rate.

    Args:
        there: `identity` of the run that is resumed.
        here: `identity` of this run.
        optim: options of the optimizer.
        updates: updates made so far.
    """
    before = {name: there.get(name, here[name]) for name in _MAY_CHANGE}
    lines = [f"{name}: {before[name]} until now, {here[name]} from here on" for name in _MAY_CHANGE]
    lines = [line for line, name in zip(lines, _MAY_CHANGE, strict=True) if before[name] != here[name]]
    if lines and updates < here["steps"]:
        rate = learning_rate(optim, here["steps"])(updates)
        old_optim = dataclasses.replace(optim, learning_rate=before["learning_rate"])
        old = learning_rate(old_optim, before["steps"])(min(updates, before["steps"] - 1))
        lines.append(
            f"the {optim.schedule} schedule is now that of {here['steps']} steps: the next learning rate is "
            f"{float(rate):.3g}, where it was {float(old):.3g}"
        )
    return lines
