"""Names in the folder of a run, and the choice of one of its checkpoints; imports neither JAX nor Orbax."""

import json
import pathlib

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
MODEL = "model"
ADAPTER = "adapter"
INITIAL_STATE = "initial_state.safetensors"
TOKENS = "tokens"  # the tokenised data


def find_run(path: str | pathlib.Path) -> pathlib.Path | None:
    """Return the run's folder, given that, its `checkpoints` or one of these; None for other folders."""
    path = pathlib.Path(path).expanduser()
    for run in (path, *path.parents[:2]):
        checkpoints = run / CHECKPOINTS
        inside = path in (run, checkpoints) or path.parent == checkpoints
        if inside and path.is_dir() and checkpoints.is_dir() and not (run / "config.json").exists():
            return run
    return None


def choose_checkpoint(path: str | pathlib.Path) -> tuple[pathlib.Path, str]:
    """Return the folder of a run's checkpoint, and words for it.

    Args:
        path: one checkpoint, `run/checkpoints/500`; or the run, or its `checkpoints`, for the one with the
            lowest evaluation loss, or the newest if none was evaluated.

    Raises:
        FileNotFoundError: no run, or one without such a checkpoint.
    """
    path = pathlib.Path(path).expanduser()
    run = find_run(path)
    if run is None:
        raise FileNotFoundError(f"{path}: neither a training run nor one of its checkpoints")
    if path.parent == run / CHECKPOINTS:
        return path, f"checkpoint of step {path.name}"
    steps = sorted((int(p.name) for p in (run / CHECKPOINTS).iterdir() if p.name.isdecimal()), reverse=True)
    if not steps:
        raise FileNotFoundError(f"{run / CHECKPOINTS}: holds no checkpoint yet")
    losses = {step: eval_loss_of(run / CHECKPOINTS / str(step)) for step in steps}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    if known:
        best = min(known, key=known.__getitem__)
        words = f"checkpoint of step {best}, the best of {sorted(known)}: held out {known[best]:.4f}"
        return run / CHECKPOINTS / str(best), words
    return run / CHECKPOINTS / str(steps[0]), f"checkpoint of step {steps[0]}, the newest; none was evaluated"


def eval_loss_of(path: pathlib.Path) -> float | None:
    """Return the evaluation loss stored in a checkpoint; None without one, or in a damaged checkpoint."""
    try:
        return json.loads(json.loads((path / "meta" / "metadata").read_text())["content"]).get("eval_loss")
    except (OSError, ValueError, KeyError):  # read_checkpoint says so if it is chosen
        return None
