"""Training: ours against transformers on PyTorch, on this machine's CPU; and what a step needs of memory.

The first table trains one small model on one batch with both, each in a process of its own, taking turns:
batches of several sizes, of which 8 x 512 is what `mamba2-jax finetune` takes when nothing is said, in
float32, and with products in bfloat16 and weights in float32 (transformers under `torch.autocast`). Ours
keeps freed memory, as `mamba2-jax finetune` does. The losses of all steps are compared before any time is
shown. The second one asks XLA's compiler, for the CPU, how much memory a compiled step of two published
sizes takes; nothing of that size is allocated.

    python benchmarks/finetune.py                                  # twenty minutes on an idle machine, 8 GB
    python benchmarks/finetune.py --output benchmarks/results/finetune.md
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SIZES = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_heads": 8, "head_dim": 64, "state_size": 64,
    "n_groups": 1, "vocab_size": 4096, "chunk_size": 256, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "rescale_prenorm_residual": False,
}  # fmt: skip
LENGTH = 512  # tokens of a row
RATE = 1e-3
APART = {"float32": 1e-3, "bfloat16": 1e-2}  # relative, how far the losses may differ
SHAPES = {"mamba2-130m": (8, 1024), "mamba2-2.7b": (2, 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the tables to this Markdown file")
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 8, 16, 32], help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each")
    parser.add_argument("--steps", type=int, default=6, help="of each process; the first is not timed")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter for transformers' side, which has torch"
    )
    parser.add_argument("--presets", nargs="*", default=list(SHAPES), help="sizes of the second table")
    parser.add_argument("--side", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=list(APART), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        train = train_ours if arguments.side == "ours" else train_theirs
        print(json.dumps(train(arguments.folder, arguments.steps, arguments.dtype, batch(arguments.rows))))
        return
    lines = ["# Training: ours against transformers, and memory by the compiler", ""]

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text("\n".join(lines) + "\n")

    pythons = {"ours": sys.executable, "transformers": arguments.peer_python}
    for line in compare(pythons, arguments.batches, arguments.rounds, arguments.steps):
        tell(line)
    for line in memory_table(arguments.presets):
        tell(line)


def batch(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, SIZES["vocab_size"], (rows, LENGTH))


def compare(pythons: dict[str, str], batches: list[int], rounds: int, steps: int):
    """Yield the first table, line by line; `pythons` names each side's interpreter."""
    yield f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start."
    yield f"Ours: {versions(pythons['ours'], 'jax')}."
    yield f"Theirs: {versions(pythons['transformers'], 'torch', 'transformers')}."
    yield ""
    layers, width, vocabulary = (SIZES[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    yield f"A model of {layers} layers of width {width}, vocabulary {vocabulary}, chunk_size 256 as published"
    yield f"(ours has its own), AdamW; the same batch for both. Medians of {rounds} x {steps - 1} steps,"
    yield "taking turns; peak memory is the process's resident set, compiler and libraries included."
    yield ""
    yield "| batch | products in | tokens/s: ours | transformers | ratio | memory: ours | theirs | ratio |"
    yield "|---|---|---|---|---|---|---|---|"
    apart, first = dict.fromkeys(APART, 0.0), []
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        for rows in batches:
            for dtype in APART:
                row, difference, seconds = compare_one(pythons, rows, dtype, folder, rounds, steps)
                apart[dtype] = max(apart[dtype], difference)
                first.append(seconds)
                yield row
    yield ""
    yield f"Our first step, which compiles, took {min(first):.1f} to {max(first):.1f} s."
    yield "Losses differ by at most " + " and ".join(f"{apart[d]:.0e} in {d}" for d in apart) + ", relative."
    yield ""


def versions(python: str, *packages: str) -> str:
    names = f"for name in {packages}: print(name, importlib.metadata.version(name))"
    program = f"import importlib.metadata, platform; print('Python', platform.python_version())\n{names}"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return ", ".join(done.stdout.splitlines())


def compare_one(
    pythons: dict[str, str], rows: int, dtype: str, folder: str, rounds: int, steps: int
) -> tuple[str, float, float]:
    """A row of the table, how far the losses are apart, and the seconds of our first step."""
    found = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for side, results in found.items():
            results.append(run_side(pythons[side], side, folder, steps, dtype, rows))
    ours, theirs = found["ours"], found["transformers"]
    pairs = [
        pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a["losses"], b["losses"], strict=True)
    ]
    apart = max(abs(mine / peer - 1) for mine, peer in pairs)
    if not apart < APART[dtype]:
        raise SystemExit(f"the losses differ by {apart:.1e}, ours and theirs: {pairs}")
    seconds = [statistics.median(s for run in side for s in run["seconds"]) for side in (ours, theirs)]
    speeds = [rows * LENGTH / s for s in seconds]
    peaks = [max(run["peak"] for run in side) / 1e9 for side in (ours, theirs)]
    row = (
        f"| {rows} x {LENGTH} | {dtype} "
        f"| {speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[0] / speeds[1]:.2f}x "
        f"| {peaks[0]:.2f} GB | {peaks[1]:.2f} GB | {peaks[0] / peaks[1]:.2f}x |"
    )
    return row, apart, ours[0]["first"]


def write_checkpoint(folder: str) -> None:
    from flax import nnx

    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    Mamba2ForCausalLM(Mamba2Config(**SIZES), rngs=nnx.Rngs(0)).save_pretrained(folder)


def run_side(python: str, side: str, folder: str, steps: int, dtype: str, rows: int) -> dict:
    command = [python, __file__, "--side", side, "--folder", folder, "--steps", str(steps)]
    command += ["--dtype", dtype, "--rows", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def train_ours(folder: str, steps: int, dtype: str, ids: np.ndarray) -> dict:
    import jax

    from mamba2_jax import Mamba2ForCausalLM
    from mamba2_jax.training import (
        OptimConfig,
        TrainState,
        keep_freed_memory,
        make_optimizer,
        split_model,
        train_step,
    )
    from mamba2_jax.training.on_cpu import rows_in_turn, tokens_in_cache

    keep_freed_memory()
    model = Mamba2ForCausalLM.from_pretrained(folder, dtype=dtype)
    structure, trained, frozen = split_model(model)
    config = OptimConfig(learning_rate=RATE, schedule="constant", weight_decay=0.0, clip=0.0)
    optimizer = make_optimizer(config, trained, steps)
    state = TrainState.start(trained, optimizer, jax.random.key(0))
    inputs = rows_in_turn({"input_ids": ids}, tokens_in_cache(SIZES["hidden_size"]))  # as the Trainer does

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, frozen, inputs, structure=structure, optimizer=optimizer)
        return float(metrics.loss)

    return timed(step, steps)


def train_theirs(folder: str, steps: int, dtype: str, ids: np.ndarray) -> dict:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    batch = torch.tensor(ids)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return timed(step, steps)


def timed(step, steps: int) -> dict:
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"first": seconds[0], "seconds": seconds[1:], "losses": losses, "peak": peak}


def memory_table(presets: list[str]):
    from mamba2_jax import Mamba2Config
    from mamba2_jax.training.on_cpu import tokens_in_cache

    most = max(tokens_in_cache(Mamba2Config.preset(preset).hidden_size) for preset in SHAPES)
    yield "Memory of one compiled step by XLA's analysis for the CPU: bfloat16 compute; full training keeps"
    yield "weights and moments in float32, LoRA (rank 8 on in_proj and out_proj) the base in bfloat16."
    yield f"On a CPU the Trainer takes at most {most} tokens of the batch at a time, or one row."
    yield ""
    yield "| model | batch | trained | remat | arguments | temporaries | peak |"
    yield "|---|---|---|---|---|---|---|"
    for preset in presets:
        for lora in (False, True):
            for remat in ("none", "block"):
                sizes = [f"{size / 1e9:.2f} GB" for size in step_memory(preset, lora, remat)]
                shape = " x ".join(map(str, SHAPES[preset]))
                trained = "LoRA" if lora else "all"
                yield f"| {preset} | {shape} | {trained} | {remat} | {' | '.join(sizes)} |"


def step_memory(preset: str, lora: bool, remat: str) -> tuple[int, int, int]:
    """Bytes of arguments and of temporaries, and the most at once, of a step of that model."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
    from mamba2_jax.lora import LoraConfig, add_lora
    from mamba2_jax.training import OptimConfig, TrainState, make_optimizer, split_model, train_step
    from mamba2_jax.training.on_cpu import rows_in_turn, tokens_in_cache

    structures, optimizers = [], []

    def start():
        stored = jnp.bfloat16 if lora else jnp.float32
        model = Mamba2ForCausalLM(
            Mamba2Config.preset(preset), dtype=jnp.bfloat16, param_dtype=stored, rngs=nnx.Rngs(0)
        )
        if lora:
            add_lora(model, LoraConfig(rank=8), rngs=nnx.Rngs(1))
        structure, trained, frozen = split_model(model)
        structures.append(structure)
        optimizers.append(make_optimizer(OptimConfig(), trained, 1000))
        return TrainState.start(trained, optimizers[0], jax.random.key(0)), frozen

    state, frozen = jax.eval_shape(start)
    ids = jax.ShapeDtypeStruct(SHAPES[preset], jnp.int32)
    inputs = {"input_ids": ids, "segment_ids": ids, "labels": ids}
    most = tokens_in_cache(Mamba2Config.preset(preset).hidden_size)
    inputs = jax.eval_shape(lambda inputs: rows_in_turn(inputs, most), inputs)  # as the Trainer does
    lowered = train_step.lower(
        state, frozen, inputs, structure=structures[0], optimizer=optimizers[0], remat=remat
    )
    # Buffers are assigned before machine code is made, so that may be done cheaply.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    stats = lowered.compile(compiler_options=quick).memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes, stats.temp_size_in_bytes, held + stats.temp_size_in_bytes


if __name__ == "__main__":
    main()
