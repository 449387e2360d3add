"""Whole models on this machine's GPU: ours against transformers on PyTorch, bfloat16, random weights.

Each takes its turn in a process of its own, on the same checkpoint, which transformers writes. Logits are
compared first; then reading a prompt, decoding, and a training step of all parameters are timed. What does
not fit the GPU's memory is named. transformers runs as `pip install` leaves it: without the kernels of
mamba_ssm and causal-conv1d, unless these are installed too.

    python benchmarks/gpu.py                                        # some minutes, most of them compiling
    python benchmarks/gpu.py --presets mamba2-130m --output benchmarks/results/gpu.md
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory too
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import checkout
import numpy as np

PROMPTS = ((1, 2048), (8, 2048))  # rows and tokens of a prompt
DECODED = ((1, 64), (64, 64))  # rows, and tokens decoded for each
BATCHES = ((1, 2048), (8, 2048))  # of a training step
APART = 0.05  # of the largest logit: two roundings to bfloat16 in every layer
ROUNDS = 5
DEVICE = "cuda"  # of PyTorch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["mamba2-130m", "mamba2-2.7b"])
    parser.add_argument("--train", nargs="*", default=["mamba2-130m"], help="presets that are trained too")
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this Markdown file")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        what, folder, option = json.loads(arguments.run)
        {"write": write, **SIDES}[what](pathlib.Path(folder), option)
        return
    lines = []

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if arguments.output is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text("# Whole models on a GPU\n\n" + "\n".join(lines) + "\n")

    for line in heading():
        tell(line)
    for preset in arguments.presets:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(preset, folder)
            train = preset in arguments.train
            found = {side: run_side(side, folder, train) for side in arguments.sides}
            check(found)
            for what in found[arguments.sides[0]]["seconds"]:
                tell(row(preset, what, *(found.get(side, {}).get("seconds", {}).get(what) for side in SIDES)))


def heading() -> list[str]:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "transformers", "torch")
    )
    name = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    git = ["git", "-C", str(checkout.ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return [
        f"{name}; {versions}; commit {commit}.",
        "",
        "bfloat16; a training step has float32 weights, AdamW and gradients by every parameter, blocks",
        f"recomputed. Medians of {ROUNDS}; the first call, which compiles, is named for ours.",
        "",
        "| model | what | ours | first call | transformers | ratio |",
        "|---|---|---|---|---|---|",
    ]


def write_checkpoint(preset: str, folder: str) -> None:
    run([sys.executable, __file__, "--run", json.dumps(["write", folder, preset])])


def write(folder: pathlib.Path, preset: str) -> None:
    import torch
    import transformers

    from mamba2_jax import Mamba2Config

    # transformers 5.23 divides out_proj by sqrt(layers) once more at loading when this option is set.
    config = Mamba2Config.preset(preset).replace(rescale_prenorm_residual=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        fields = {name: value for name, value in config.to_dict().items() if name != "time_step_limit"}
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**fields))
    model.save_pretrained(folder)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def run_side(side: str, folder: str, train: bool) -> dict:
    said = run([sys.executable, __file__, "--run", json.dumps([side, folder, train])])
    return json.loads(said.splitlines()[-1])


def check(found: dict) -> None:
    """Refuse to time something that computes something else."""
    if len(found) < 2:
        return
    ours, theirs = (np.asarray(found[side]["logits"]) for side in SIDES if side in found)
    apart = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not apart < APART:
        raise SystemExit(f"results differ by {apart:.1e} of the largest logit")


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50000, (rows, length))


def ours(folder: pathlib.Path, train: bool) -> None:
    import jax
    import jax.numpy as jnp

    from mamba2_jax import Mamba2ForCausalLM, generate

    model = Mamba2ForCausalLM.from_pretrained(folder, dtype="bfloat16", param_dtype="bfloat16")
    read = jax.jit(lambda model, ids: model(ids, logits_to_keep=1).logits)
    logits = np.asarray(read(model, tokens(1, 300)), np.float32)[0, -1]
    seconds = {}
    for rows, length in PROMPTS:
        ids = jnp.asarray(tokens(rows, length))
        seconds[f"prompt, {rows} x {length} tokens"] = timed(
            lambda ids=ids: read(model, ids).block_until_ready()
        )
    for rows, count in DECODED:
        prompt = jnp.asarray(tokens(rows, 16))

        def decode(count, prompt=prompt):
            return generate(model, prompt, max_new_tokens=count, eos_token_id=()).tokens.block_until_ready()

        seconds[f"decode, {rows} rows, a token"] = per_token(decode, count)
    del model
    for batch in BATCHES if train else ():
        seconds["training step, {} x {} tokens".format(*batch)] = guarded(train_ours, folder, *batch)
    tell_result(logits, seconds)


def train_ours(folder: pathlib.Path, rows: int, length: int) -> tuple[float, float]:
    import jax

    from mamba2_jax import Mamba2ForCausalLM
    from mamba2_jax.training import OptimConfig, TrainState, make_optimizer, split_model, train_step

    model = Mamba2ForCausalLM.from_pretrained(folder, dtype="bfloat16", param_dtype="float32")
    structure, trained, frozen = split_model(model)
    optimizer = make_optimizer(OptimConfig(schedule="constant"), trained, 100)
    state = TrainState.start(trained, optimizer, jax.random.key(0))
    inputs = {"input_ids": tokens(rows, length)}

    def step():
        nonlocal state
        state, metrics = train_step(
            state, frozen, inputs, structure=structure, optimizer=optimizer, remat="block"
        )
        return float(metrics.loss)

    return timed(step)


def theirs(folder: pathlib.Path, train: bool) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
    seconds = {}
    with torch.no_grad():
        ids = torch.tensor(tokens(1, 300)).to(DEVICE)
        logits = model(ids, logits_to_keep=1).logits.float().cpu().numpy()[0, -1]

        def read(ids):
            model(ids, use_cache=True, logits_to_keep=1)
            wait(torch)

        for rows, length in PROMPTS:
            ids = torch.tensor(tokens(rows, length)).to(DEVICE)
            seconds[f"prompt, {rows} x {length} tokens"] = guarded(timed, partial(read, ids))
        for rows, count in DECODED:
            prompt = torch.tensor(tokens(rows, 16)).to(DEVICE)

            def decode(count, prompt=prompt):
                model.generate(
                    prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, use_cache=True
                )
                wait(torch)

            seconds[f"decode, {rows} rows, a token"] = guarded(per_token, decode, count)
    del model
    for batch in BATCHES if train else ():
        seconds["training step, {} x {} tokens".format(*batch)] = guarded(train_theirs, folder, *batch)
    tell_result(logits, seconds)


def train_theirs(folder: pathlib.Path, rows: int, length: int) -> tuple[float, float]:
    import torch
    import transformers

    model = transformers.Mamba2ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).train()
    # the newer name of the same
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.tensor(tokens(rows, length)).to(DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return timed(step)


def wait(torch) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


SIDES = {"ours": ours, "transformers": theirs}


def timed(call) -> tuple[float, float]:
    """The median of some calls, and the first; in seconds."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), times[0]


def per_token(decode, count: int) -> tuple[float, float]:
    """Seconds of a token: the prompt's cost falls out of the difference."""
    one, first = timed(lambda: decode(1))
    return (timed(lambda: decode(count + 1))[0] - one) / count, first


def guarded(measure, *arguments):
    """What `measure` returns; or in words why it could not."""
    try:
        return measure(*arguments)
    except Exception as error:
        said = str(error)
        if "out of memory" in said.lower() or "RESOURCE_EXHAUSTED" in said:
            return "out of memory"
        return f"{type(error).__name__}: {said[:80]}"


def tell_result(logits: np.ndarray, seconds: dict) -> None:
    print(json.dumps({"logits": logits.tolist(), "seconds": seconds}))


def row(preset: str, what: str, mine, peer) -> str:
    def shown(value):
        return value if isinstance(value, str) else "" if value is None else f"{value[0] * 1e3:.2f} ms"

    first = "" if mine is None or isinstance(mine, str) else f"{mine[1]:.1f} s"
    both = not any(value is None or isinstance(value, str) for value in (mine, peer))
    ratio = f"{peer[0] / mine[0]:.1f}x" if both else ""
    return f"| {preset} | {what} | {shown(mine)} | {first} | {shown(peer)} | {ratio} |"


if __name__ == "__main__":
    main()
