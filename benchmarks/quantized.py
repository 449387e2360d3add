"""Weights in 8 and 4 bits against floats, on this machine's CPU: quality, sizes and speed, in one run.

Bits per byte of the model inside the package on held-out files of Python's library; logits of a random model
of mamba2-130m's shape against its float32 ones; then its prefill and decoding, the settings taking turns.

    python benchmarks/quantized.py            # some four minutes
    python benchmarks/quantized.py --output benchmarks/results/quantized.md
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
import numpy as np
from embedded_model import bits_of, read_library
from flax import nnx

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, generate, load_tokenizer

PRESET = "mamba2-130m"
SETTINGS = {  # how a model is loaded
    "float32": {"dtype": "float32", "param_dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16", "param_dtype": "bfloat16"},
    "int8": {"dtype": "float32", "param_dtype": "float32", "quantize": "int8"},
    "int4": {"dtype": "float32", "param_dtype": "float32", "quantize": "int4"},
}
PREFILLED, DECODED = 512, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the tables to this Markdown file")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers, for a quick look")
    parser.add_argument("--bytes", type=int, default=60_000, help="of held-out text")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    lines = [f"{os.cpu_count()} cores of {processor()}; jax {importlib.metadata.version('jax')}.", ""]

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    print(lines[0])
    for line in quality(arguments.bytes):
        tell(line)
    tell("")
    for line in speed(arguments.layers, arguments.rounds):
        tell(line)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("# Weights in 8 and 4 bits\n\n" + "\n".join(lines) + "\n")


def processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def quality(count: int):
    """Bits per byte of the embedded model at each setting."""
    _, held_out = read_library()
    text = "\n".join(held_out[name] for name in sorted(held_out) if not name.startswith("encodings/"))[:count]
    yield f"The embedded model on {len(text.encode()):,} bytes of held-out files of Python's library:"
    yield ""
    yield "| weights | bits per byte | more than float32 | bytes of weights |"
    yield "|---|---|---|---|"
    tokenizer, base = load_tokenizer(), None
    calibration = calibration_ids(tokenizer)
    for name, options in {**SETTINGS, "int4, calibrated": SETTINGS["float32"]}.items():
        model = Mamba2ForCausalLM.from_pretrained(**options)
        if name == "int4, calibrated":
            model.quantize("int4", calibration=calibration)
        bits = bits_of(model, tokenizer, text) / len(text.encode())
        base = bits if base is None else base
        yield f"| {name} | {bits:.4f} | {bits - base:+.4f} | {size_of(model):,} |"


def calibration_ids(tokenizer, rows: int = 4, length: int = 512) -> np.ndarray:
    """The beginnings of some of the files that the embedded model was trained on."""
    train, _ = read_library()
    ids = [tokenizer.encode(train[name], add_special_tokens=False)[:length] for name in sorted(train)[::40]]
    return np.array([one for one in ids if len(one) == length][:rows])


def speed(layers: int | None, rounds: int):
    """Sizes, errors of logits and times of a random model of the preset's shape at each setting."""
    config = Mamba2Config.preset(PRESET).replace(rescale_prenorm_residual=False)
    config = config.replace(num_hidden_layers=layers) if layers else config
    with tempfile.TemporaryDirectory() as folder:
        Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
        models = {name: Mamba2ForCausalLM.from_pretrained(folder, **one) for name, one in SETTINGS.items()}
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50000, (1, PREFILLED))
    logits = {name: np.asarray(model(ids).logits, np.float64) for name, model in models.items()}
    errors = {name: relative(one, logits["float32"]) for name, one in logits.items()}
    assert errors["bfloat16"] < 0.1
    assert errors["int8"] < 0.1
    read = jax.jit(lambda model, ids: model(ids, logits_to_keep=1).logits)

    def prefill(model):
        read(model, ids).block_until_ready()

    def decode(model, count):
        generate(model, ids[:, :16], max_new_tokens=count, eos_token_id=()).tokens.block_until_ready()

    # The prompt's cost falls out of the difference; both counts are made by one compiled program.
    one = take_turns(models, lambda model: decode(model, 1), rounds)
    many = take_turns(models, lambda model: decode(model, DECODED + 1), rounds)
    read_in = take_turns(models, prefill, rounds)
    yield f"Shape of {PRESET}, random weights, batch 1; medians of {rounds}, the settings taking turns:"
    yield ""
    yield f"| weights | bytes of weights | relative error of logits | decoding | prefill of {PREFILLED} |"
    yield "|---|---|---|---|---|"
    for name, model in models.items():
        rate, prefills = DECODED / (many[name] - one[name]), PREFILLED / read_in[name]
        yield (
            f"| {name} | {size_of(model):,} | {errors[name]:.1e} | {rate:.1f} tokens/s |"
            f" {prefills:.0f} tokens/s |"
        )


def size_of(model) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def take_turns(models, run, rounds: int) -> dict[str, float]:
    """The median time of each model, in seconds, after a first call that compiles."""
    times = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            run(model)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(one) for name, one in times.items()}


if __name__ == "__main__":
    main()
