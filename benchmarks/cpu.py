"""Ours against transformers on PyTorch, on this machine's CPU, in one run.

A random model of mamba2-130m's shape, written by transformers, loaded by both. Results are compared
first; then prefill, decoding and the first call are timed, the two taking turns.

    python benchmarks/cpu.py            # about six minutes
    python benchmarks/cpu.py --output benchmarks/results/cpu.md
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from mamba2_jax import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, generate

PRESET = "mamba2-130m"
DECODED = 64
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this Markdown file")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, for a quick look")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    lines = [
        f"{describe_machine()}",
        "",
        f"Shape of {PRESET}, random weights, batch 1; medians of {arguments.rounds}.",
        "",
    ]
    lines += ["| what | dtype | ours | transformers | ratio |", "|---|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, arguments.layers)
        for dtype in ("float32", "bfloat16"):
            for row in compare(folder, dtype, arguments.rounds):
                lines.append(row)
                print(row, flush=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("# CPU: ours against transformers\n\n" + "\n".join(lines) + "\n")


def describe_machine() -> str:
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "transformers", "torch")
    )
    return f"{os.cpu_count()} cores of {model}; {versions}; PyTorch with {torch.get_num_threads()} threads."


def write_checkpoint(folder: str, layers: int | None) -> None:
    # transformers 5.23 divides out_proj by sqrt(layers) once more at loading when this option is set.
    config = Mamba2Config.preset(PRESET).replace(rescale_prenorm_residual=False)
    if layers:
        config = config.replace(num_hidden_layers=layers)
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**{k: v for k, v in config.to_dict().items() if k != "time_step_limit"})
    )
    theirs.save_pretrained(folder)


def compare(folder: str, dtype: str, rounds: int):
    theirs = transformers.Mamba2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ours = Mamba2ForCausalLM.from_pretrained(folder, dtype=dtype, param_dtype=dtype)
    rng = np.random.default_rng(0)
    check(ours, theirs, rng, dtype)

    read = jax.jit(lambda model, ids: model(ids, logits_to_keep=1).logits)
    for length in (512, 2048):
        ids = rng.integers(0, 50000, (1, length))
        first, mine, peer = take_turns(
            lambda ids=ids: read(ours, ids).block_until_ready(),
            lambda ids=ids: theirs(torch.tensor(ids), use_cache=True, logits_to_keep=1),
            rounds,
        )
        yield row(f"prefill {length} tokens", dtype, mine, peer)
        if length == 2048:
            yield f"| first call, prefill {length} (compiles) | {dtype} | {first:.1f} s | | |"

    prompt = rng.integers(0, 50000, (1, 16))
    one = {"do_sample": False, "use_cache": True}

    def decode_ours(count):
        return generate(ours, prompt, max_new_tokens=count, eos_token_id=()).tokens.block_until_ready()

    def decode_theirs(count):
        ids = torch.tensor(prompt)
        return theirs.generate(ids, max_new_tokens=count, min_new_tokens=count, **one)

    # The prompt's cost falls out of the difference; ours makes both counts with one compiled program.
    times = {}
    for count in (1, DECODED + 1):
        first, *times[count] = take_turns(
            lambda count=count: decode_ours(count), lambda count=count: decode_theirs(count), rounds
        )
        if count == 1:
            yield f"| first call, generate (compiles) | {dtype} | {first:.1f} s | | |"
    mine, peer = ((times[DECODED + 1][i] - times[1][i]) / DECODED for i in (0, 1))
    yield row("decode, per token", dtype, mine, peer)


@torch.no_grad()
def check(ours, theirs, rng, dtype: str) -> None:
    """Refuse to time something that computes something else."""
    ids = rng.integers(0, 50000, (1, 300))
    want = theirs(torch.tensor(ids)).logits.float().numpy()
    got = np.asarray(ours(ids).logits)
    error = np.abs(got - want).max() / np.abs(want).max()
    limit = 2e-5 if dtype == "float32" else 0.1  # two roundings to bfloat16 apart in each of 24 layers
    if not error < limit:
        raise SystemExit(f"results differ in {dtype}: {error:.2e} of the largest logit")
    assert Mamba2Cache.zeros(ours.config, 1).ssm[0].dtype == jnp.float32


@torch.no_grad()
def take_turns(ours, theirs, rounds: int) -> tuple[float, float, float]:
    """Time the first call of ours, then the medians of both, taking turns; in seconds."""
    first = timed(ours)
    timed(theirs)
    pairs = [(timed(ours), timed(theirs)) for _ in range(rounds)]
    return first, *(statistics.median(column) for column in zip(*pairs, strict=True))


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def row(what: str, dtype: str, mine: float, peer: float) -> str:
    return f"| {what} | {dtype} | {mine * 1e3:.1f} ms | {peer * 1e3:.1f} ms | {peer / mine:.2f}x |"


if __name__ == "__main__":
    main()
