"""Training checkpoints: written asynchronously and atomically, and verified by checksums when read.

Orbax writes each checkpoint to a temporary folder and renames it once all files are on disk. It does not
detect bytes that change later, so a checksum of every array is stored too and compared on restore.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from mamba2_jax.files import first_line
from mamba2_jax.processes import is_first, meet
from mamba2_jax.training.checksums import check_sums, checked_content, checksums
from mamba2_jax.training.folder import eval_loss_of
from mamba2_jax.training.step import TrainState
from mamba2_jax.typing import Array


class SaveError(OSError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


class OtherRunError(Exception):
    """A checkpoint belongs to a run with other data, another model or other options."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Options for how often checkpoints are written, and which are kept.

    Raises:
        ValueError: an invalid value; the message names it.
    """

    every: int | None = None
    """Steps between checkpoints (None: a fifth of the run, at most 500); one more is written at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """With evaluation data, also keep the checkpoint of the lowest evaluation loss, of those whose step was
    evaluated."""

    def __post_init__(self):
        for name in ("every", "keep"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"CheckpointConfig: {name}={value} must be at least 1")


class Checkpoints:
    """Manager of the checkpoints in a folder.

    Args:
        folder: created if it does not exist.
        config: checkpoint options.
        warn: called with a message about each damaged checkpoint.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        config: CheckpointConfig,
        warn: Callable[[str], None] = lambda message: None,
    ):
        self._folder, self._warn = folder.absolute(), warn
        policies = checkpoint_managers.preservation_policy
        best = _KeepBest()
        preserved: list[Any] = [policies.LatestN(config.keep), *([best] if config.keep_best else [])]
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(preserved), cleanup_tmp_directories=True
            ),
        )
        self._eval_losses = best.losses
        for step in self.steps():
            self._eval_losses[step] = eval_loss_of(self._folder / str(step))

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints in the folder, intact or damaged, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, extra: dict[str, Any], eval_loss: float | None = None) -> None:
        """Start writing a checkpoint of `state` in the background; the arrays are copied before returning.

        Args:
            state: training state; may be donated to the next step right after this call.
            extra: other JSON values needed to resume.
            eval_loss: evaluation loss, by which the best checkpoint is kept.

        Raises:
            SaveError: this or the previous checkpoint could not be written.
        """
        arrays, step = _flatten(state), int(state.step)
        content = {
            "step": step,
            "arrays": {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()},
            "checksums": {name: int(value) for name, value in jax.device_get(checksums(arrays)).items()},
            "extra": extra,
            "eval_loss": eval_loss,
        }
        text = json.dumps(content, sort_keys=True)
        meta = {"content": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        self._eval_losses[step] = eval_loss
        try:
            if not self._manager.save(step, args=args, force=True):
                raise SaveError(f"{self._folder}: a checkpoint of step {step} already exists")
        except SaveError:
            raise
        except Exception as error:  # Orbax and the file system raise many types
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Wait until all checkpoints are on disk.

        Raises:
            SaveError: a checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and the file system raise many types
            raise self._failed(None, error) from error

    def close(self) -> None:
        """Wait for pending writes and stop the writer threads.

        Raises:
            SaveError: as `wait`.
        """
        try:
            self._manager.close()
        except Exception as error:  # Orbax and the file system raise many types
            raise self._failed(None, error) from error

    def _failed(self, step: int | None, error: Exception) -> SaveError:
        self._manager.reload()
        good = self.steps()
        name = "the last checkpoint" if step is None else f"the checkpoint of step {step}, or the one before,"
        last = f"the last good one is of step {good[-1]}" if good else "there is none before it"
        return SaveError(
            f"{self._folder}: {name} could not be written ({first_line(error)}); {last}. "
            "Free disk space, then continue from there with resume"
        )

    def restore(
        self, like: TrainState, check: Callable[[dict[str, Any]], None] = lambda extra: None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Read the newest intact checkpoint; newer, damaged ones are moved to the folder `<name>-damaged`.

        Args:
            like: a state of the same run; the restored arrays get its dtypes, shapes and shardings.
            check: called with `extra` before the arrays are read; raises `OtherRunError` to refuse them.

        Returns:
            The state and `extra`, or None if there is no checkpoint.

        Raises:
            ValueError: the checkpoint is of another model or other options, or all checkpoints are damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                content = self._read_meta(step)
                check(content["extra"])
                _check_same_run(self._folder / str(step), content["arrays"], _flatten(like))
                arrays = self._read_arrays(step, content, like)
            except OtherRunError as error:
                raise ValueError(str(error)) from None
            except Exception as error:  # damaged files can raise anything
                damaged.append(step)
                self._warn(f"checkpoint of step {step}: damaged, not used ({first_line(error)})")
                continue
            for bad in damaged:
                self._put_aside(bad)
            return _unflatten(arrays, like), content["extra"]
        if damaged:
            raise ValueError(
                f"{self._folder}: not one of the checkpoints of steps {damaged[::-1]} is whole; "
                "start again in another output folder"
            )
        return None

    def _read_meta(self, step: int) -> dict[str, Any]:
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return checked_content(meta, step)

    def _read_arrays(self, step: int, content: dict[str, Any], like: TrainState) -> dict[str, Array]:
        target = jax.tree.map(ocp.tree.to_shape_dtype_struct, _flatten(like))
        restored = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(target))
        )
        check_sums(restored["arrays"], content)
        return restored["arrays"]

    def _put_aside(self, step: int) -> None:
        if is_first():
            aside = self._folder.with_name(f"{self._folder.name}-damaged")
            aside.mkdir(exist_ok=True)
            count = sum(1 for _ in aside.glob(f"{step}.*"))
            (self._folder / str(step)).rename(aside / f"{step}.{count}")
        meet(f"mamba2_jax: checkpoint {step} put aside")
        self._manager.reload()


def read_checkpoint(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Read the parameters of one checkpoint, without optimizer moments, whatever devices wrote it.

    Args:
        path: folder of the checkpoint, `checkpoints/<step>`.

    Returns:
        content: what was stored beside the arrays: `step`, `eval_loss` and `extra`.
        params: the trained parameters by path.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    path = path.absolute()
    try:
        content = checked_content(json.loads((path / "meta" / "metadata").read_text()), int(path.name))
        target = {
            name: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=SingleDeviceSharding(jax.devices()[0]))
            for name, (dtype, shape) in content["arrays"].items()
            if name.startswith(_PARAMS)
        }
        args = ocp.checkpoint_utils.construct_restore_args(target)
        arrays = ocp.PyTreeCheckpointer().restore(
            path / "arrays", args=ocp.args.PyTreeRestore(target, args, partial_restore=True)
        )
        check_sums(arrays, content)
    except Exception as error:  # damaged files can raise anything
        raise ValueError(f"{path}: damaged ({first_line(error)}); take another checkpoint") from error
    return content, {name.removeprefix(_PARAMS): array for name, array in arrays.items()}


class _KeepBest:
    """Policy of Orbax: preserve the checkpoint of the lowest evaluation loss; of equal ones, the newest.

    Orbax's own policy wants metrics with every checkpoint, and warns about one that was not evaluated.
    """

    def __init__(self):
        self.losses: dict[int, float | None] = {}
        """Evaluation losses by step; None: not evaluated."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        losses = {info.step: self.losses.get(info.step) for info in checkpoints}
        known = [(loss, -step) for step, loss in losses.items() if loss is not None and not math.isnan(loss)]
        best = -min(known)[1] if known else None
        return [info.step == best for info in checkpoints]


def _check_same_run(path: pathlib.Path, stored: dict[str, Any], wanted: dict[str, Array]) -> None:
    here = {name: [str(a.dtype), list(a.shape)] for name, a in wanted.items()}
    for name in sorted(stored.keys() | here.keys()):
        if stored.get(name) != here.get(name):
            raise OtherRunError(
                f"{path}: {name} is {stored.get(name, 'absent')} there and {here.get(name, 'absent')} here; "
                "a run goes on only with the model and the options it began with"
            )


_PARAMS = "params."  # of a parameter's name in a flattened state
_PARTS = ("step", "params", "opt_state", "skipped", "skipped_in_a_row", "cache")


def _flatten(state: TrainState) -> dict[str, Array]:
    """Flatten a state to a dict by dotted path, with the random key as raw uint32 data."""
    leaves, _ = jax.tree.flatten_with_path(_plain(state))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _unflatten(arrays: dict[str, Array], like: TrainState) -> TrainState:
    plain = jax.tree.unflatten(jax.tree.structure(_plain(like)), [arrays[name] for name in _flatten(like)])
    plain["key"] = jax.random.wrap_key_data(plain["key"], impl=jax.random.key_impl(like.key))
    return TrainState(**plain)


def _plain(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _PARTS} | {"key": jax.random.key_data(state.key)}
