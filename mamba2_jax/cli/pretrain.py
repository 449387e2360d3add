"""Run `mamba2-jax pretrain`: `finetune --from-config` with defaults for random weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from mamba2_jax.cli.architecture import names_model
from mamba2_jax.cli.finetune import Finetune, run_command, value_of
from mamba2_jax.training import OptimConfig, TrainConfig


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """Options of a training run, with an optimizer for random weights."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=1e-3, schedule="wsd", weight_decay=0.1, beta2=0.95)
    )


@dataclass(frozen=True)
class Pretrain(Finetune):
    """Train a new model on texts, from random weights, and save it for transformers.

    `--from-config` says which model; `--tokenizer-vocab 4096` trains its tokenizer on the data. All else is
    as for `mamba2-jax finetune`: the file of `--config`, JSON or YAML, may set the same options, and in it
    `from_config` may be the fields of a config; `--config` may also name the model alone. SIGTERM and Ctrl-C
    save a checkpoint, from which `--resume` continues to the same weights.
    """

    train: Annotated[PretrainConfig, arg(name="")]
    from_config: Annotated[str, arg(metavar="CONFIG")] = "mamba2-130m"
    """The model: a preset, a config file in JSON or YAML, or a JSON object of fields of `Mamba2Config`."""


def pretrain(arguments: Sequence[str], program: str, tell: Callable[[str], None]) -> int:
    """Parse the options and run the training; as for `cli.finetune.finetune`.

    A `--config` that is a preset, or a file of a model's config instead of options, is `--from-config`.
    """
    config = value_of("--config", arguments)
    if config is not None and names_model(config):
        new = {"--config": "--from-config", f"--config={config}": f"--from-config={config}"}
        arguments = [new.get(argument, argument) for argument in arguments]
    return run_command(Pretrain, arguments, program, tell)
