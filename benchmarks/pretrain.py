"""Train a small model from random weights on text that is on every machine, in about the given time.

    python benchmarks/pretrain.py --output runs/pretrain --minutes 60     # again to go on
    python benchmarks/pretrain.py --output runs/pretrain --results benchmarks/results    # of a run that ended

The texts are the sources of Python's standard library, and the reference of the language that `help()`
shows (`pydoc_data.topics`); one text in twenty is held out, and a sixth of these is scored. The options are
those of `benchmarks/pretrain.yaml`: a new tokenizer, and rows that go on in the next batch and become longer:
a quarter of the length for the first fifth of the steps, half of it for the next.

The number of steps follows from the speed of a few, and is kept in the output folder.
"""

import hashlib
import importlib
import json
import math
import os
import pathlib
import shutil
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from embedded_model import HELD_OUT, read_library
from matplotlib.figure import Figure

from mamba2_jax import Mamba2ForCausalLM, generate, load_tokenizer
from mamba2_jax.cli import main
from mamba2_jax.training.metrics import METRICS_FILE, read_metrics

CONFIG = pathlib.Path(__file__).with_suffix(".yaml")
ROWS, LENGTH = 4, 512
SHARES = ((4, 0.2), (2, 0.2))  # of the length, and of the steps
PROBE = 8  # steps that measure the speed; the first compiles
PROMPTS = ("def fibonacci(n):\n", "class Queue:\n", 'The "with" statement')


@dataclass(frozen=True)
class Options:
    output: pathlib.Path
    minutes: float = 60.0
    """Time to train for, without compiling and evaluating."""
    results: pathlib.Path | None = None
    """Write the table and the curve of a finished run to this folder, instead of training."""


def read_texts() -> tuple[list[str], list[str]]:
    """The texts to train on, and those held out."""
    train, held_out = read_library()
    topics = importlib.import_module("pydoc_data.topics").topics
    for texts in (train, held_out):
        texts.pop("pydoc_data/topics.py", None)
    for name, text in topics.items():
        number = int.from_bytes(hashlib.sha256(f"topics {name}".encode()).digest()[-8:], "big")
        (held_out if number % HELD_OUT == 0 else train)[f"topics {name}"] = text
    return list(train.values()), list(held_out.values())[::6]


def write_texts(folder: pathlib.Path) -> list[str]:
    """Write both parts as JSON lines, once; return the options that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "train.jsonl", folder / "held_out.jsonl"]
    if not all(file.exists() for file in files):
        for file, texts in zip(files, read_texts(), strict=True):
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return ["--data", str(files[0]), "--eval-data", str(files[1])]


def run(output: pathlib.Path, steps: int, *options: str) -> None:
    command = ["pretrain", "--config", str(CONFIG), "--output", str(output), "--steps", str(steps), *options]
    if main(command):
        raise SystemExit(1)


def count_steps(options: Options, data: list[str]) -> int:
    """The steps that take the time, by the speed of a few; kept for the next start."""
    file = options.output / "steps.json"
    if not file.exists():
        probe = options.output / "probe"
        shutil.rmtree(probe, ignore_errors=True)
        run(probe, PROBE, "--data", data[-1], "--no-progress")  # the held-out texts: few to tokenise
        rate = losses_of(probe)[-1]["tokens_per_second"]
        shutil.rmtree(probe)
        part = 1 - sum(share * (1 - 1 / shorter) for shorter, share in SHARES)  # mean length of a row
        file.write_text(json.dumps(max(20, round(options.minutes * 60 * rate / (ROWS * LENGTH * part)))))
    return json.loads(file.read_text())


def train(options: Options) -> None:
    data = write_texts(options.output / "texts")
    steps = count_steps(options, data)
    lengths = [f"{LENGTH // shorter}:{max(1, round(share * steps))}" for shorter, share in SHARES]
    warmup = min(100, steps // 10)
    more = ("--curriculum", *lengths, "--optim.warmup", str(warmup), "--resume")
    run(options.output / "run", steps, *data, *more)
    print(draw(options.output, options.output))


def losses_of(folder: pathlib.Path) -> list[dict]:
    return [line for line in read_metrics(folder / METRICS_FILE) if "loss" in line]


def draw(output: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Draw the loss over the tokens read, and the loss of the held-out texts."""
    losses = losses_of(output / "run")
    seen = np.cumsum([0, *(line["tokens"] for line in losses)]) / 1e6  # after each step, from 0
    values = [line["loss"] for line in losses]
    window = max(1, min(50, len(values) // 10))
    means = np.convolve(values, np.ones(window) / window, "valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(seen[1:], values, color="C0", alpha=0.2, linewidth=0.7)
    axis.plot(seen[window:], means, color="C0", label=f"training, mean of {window} steps")
    held_out = [line for line in read_metrics(output / "run" / METRICS_FILE) if "eval_loss" in line]
    points = [(seen[line["step"]], line["eval_loss"]) for line in held_out]
    axis.plot(*zip(*points, strict=True), "C1o", label="held out")
    step = 0
    for _, share in SHARES:
        step += max(1, round(share * len(losses)))
        axis.axvline(seen[step], color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="million tokens", ylabel="nats per token", ylim=(0.9 * min(means), None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(folder / "pretrain.png", dpi=120)
    return folder / "pretrain.png"


def report(options: Options) -> None:
    """Write the table, the curve and a few sampled texts."""
    folder = options.results or options.output
    run_folder = options.output / "run"
    folder_of_model = run_folder / "model"
    model, tokenizer = Mamba2ForCausalLM.from_pretrained(folder_of_model), load_tokenizer(folder_of_model)
    losses = losses_of(run_folder)
    last = [line for line in read_metrics(run_folder / METRICS_FILE) if "eval_loss" in line][-1]
    tokens, rate = (sum(line["tokens"] for line in losses), losses[-1]["tokens_per_second"])
    lines = [
        "# From random weights in an hour of a CPU",
        "",
        f"`python benchmarks/pretrain.py`, jax {jax.__version__} on {os.cpu_count()} cores of a CPU.",
        "",
        "| parameters | steps | tokens | tokens/s at the end | held out, nats per token | bits per byte |",
        "|---|---|---|---|---|---|",
        f"| {model.config.num_parameters():,} | {len(losses):,} | {tokens:,} | {rate:,.0f} "
        f"| {last['eval_loss']:.3f} | {last['eval_bits_per_byte']:.3f} |",
        "",
        "![Loss over the tokens read](pretrain.png)",
        "",
        "Dotted: rows become longer. Sampled at temperature 0.7, top-p 0.9:",
        "",
    ]
    for prompt in PROMPTS:
        ids = jnp.array([[tokenizer.eos_token_id, *tokenizer.encode(prompt)]])
        new = generate(model, ids, max_new_tokens=80, temperature=0.7, top_p=0.9, key=jax.random.key(0))
        text = prompt + tokenizer.decode(new.tokens[0, : int(new.lengths[0])], skip_special_tokens=True)
        lines += ["```", text.rstrip(), "```", ""]
    (folder / "pretrain.md").write_text("\n".join(lines))
    draw(options.output, folder)
    print(f"{folder / 'pretrain.md'}: {math.exp(last['eval_loss']):.1f} perplexity")


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    (train if chosen.results is None else report)(chosen)
