"""Whole models on this machine's GPU: ours against transformers on PyTorch, bfloat16, random weights.

Each takes its turn in a process of its own, on the same checkpoint, which transformers writes. Logits are
compared first; then reading a prompt and decoding, or a training step of all parameters, are timed. What does
not fit the GPU's memory, or fails, is named, and the rest goes on; a wrong result of ours, or none, makes the
exit status 1. transformers runs as `pip install` leaves it: without the kernels of mamba_ssm and
causal-conv1d, unless these are installed too.

    make gpu                                     # tests, then the scan and this, ten minutes a part at most
    python benchmarks/gpu.py reading --presets mamba2-130m --output benchmarks/results
    python benchmarks/gpu.py training --sides ours
    python benchmarks/gpu.py reading --small     # tiny, also without a GPU: does this script work?
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory too
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import checkout
import gpu_sides
import numpy as np

PRESETS = {
    "reading": ["mamba2-130m", "mamba2-2.7b"],
    "training": ["mamba2-130m", "mamba2-1.3b", "mamba2-2.7b"],
}
# Of the largest logit. bfloat16: two roundings in every layer; 8 and 4 bits: those of the weights too.
APART = {"bfloat16": 0.05, "int8": 0.1, "int4": 0.5}
HEAD = "| model | weights | what | ours | first call | tokens/s | MFU | transformers | ratio |"
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 32, "state_size": 16}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(PRESETS))
    parser.add_argument("--presets", nargs="+", help="default: the sizes that the part is about")
    parser.add_argument(
        "--weights", nargs="+", choices=list(APART), default=list(APART), help="of ours, reading"
    )
    parser.add_argument("--output", type=pathlib.Path, help="a folder for the Markdown table and the JSON")
    parser.add_argument("--name", help="of the two files; default: the part")
    parser.add_argument(
        "--sides", nargs="+", choices=["ours", "transformers"], default=["ours", "transformers"]
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, also without a GPU")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.small:
        make_small()
    if arguments.run:
        run_here(arguments.part, **json.loads(arguments.run))
        return
    weights = arguments.weights if arguments.part == "reading" else ["bfloat16"]
    print("\n".join(heading()), flush=True)
    rows, notes = [], []
    for preset in arguments.presets or PRESETS[arguments.part][: 1 if arguments.small else None]:
        for line in measure(preset, arguments, weights, notes):
            rows.append(line)
            print(markdown(line), flush=True)
    print("".join(f"\n- {note}" for note in notes))
    if arguments.output is not None:
        write_results(arguments.output, arguments.name or arguments.part, rows, notes)
    if any("ours" in note for note in notes):
        raise SystemExit(1)


def make_small() -> None:
    from mamba2_jax import Mamba2Config

    tiny = Mamba2Config.preset("mamba2-130m").replace(**SMALL)
    Mamba2Config.preset = lambda name: tiny
    gpu_sides.ROUNDS, gpu_sides.DEVICE = 1, "cpu"
    gpu_sides.PROMPTS, gpu_sides.DECODED, gpu_sides.BATCHES = ((2, 32),), ((2, 3),), ((1, 32),)


def run_here(part: str, side: str, folder: str, option: str) -> None:
    """Do in this process what `in_a_process` asked for, and print the result as the last line."""
    if side == "write":
        gpu_sides.write(pathlib.Path(folder), option)
        return
    print(json.dumps(gpu_sides.SIDES[part][side](pathlib.Path(folder), option)))


def in_a_process(arguments, **what) -> tuple[dict, str]:
    """Run this script for one side; return its result, or an empty one and what it said."""
    command = [sys.executable, __file__, arguments.part, "--run", json.dumps(what)]
    done = subprocess.run(
        command + ["--small"] * arguments.small, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {}, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if what["side"] != "write" else {}, ""


def measure(preset: str, arguments, weights: list[str], notes: list[str]):
    """Write the model, run every side, compare the logits, and yield a row for each time."""
    with tempfile.TemporaryDirectory() as folder:
        _, said = in_a_process(arguments, side="write", folder=folder, option=preset)
        if said:
            notes.append(f"{preset}: transformers did not write it, so that ours is not measured: {said}")
            return
        peer = {}
        if "transformers" in arguments.sides:
            peer, said = in_a_process(arguments, side="transformers", folder=folder, option="bfloat16")
            notes += [f"{preset}: transformers: {said}"] if said else []
        for each in weights if "ours" in arguments.sides else ():
            mine, said = in_a_process(arguments, side="ours", folder=folder, option=each)
            said = said or apart(mine, peer, APART[each])
            if said:
                notes.append(f"{preset}, {each}: ours: {said}")
                continue
            for what, seconds in mine["seconds"].items():
                yield row(preset, each, what, seconds, peer.get("seconds", {}).get(what), mine)


def apart(mine: dict, peer: dict, limit: float) -> str:
    """Refuse to time something that computes something else."""
    if not ("logits" in mine and "logits" in peer):
        return ""
    ours, theirs = np.asarray(mine["logits"]), np.asarray(peer["logits"])
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    return "" if difference < limit else f"results differ by {difference:.1e} of the largest logit"


def row(preset: str, weights: str, what: str, mine, peer, facts: dict) -> dict:
    """Collect what is known of a time; `mine` and `peer` are median and first call, or words."""
    timed = isinstance(mine, (list, tuple))
    rate = gpu_sides.tokens_of(what) / mine[0] if timed else None
    known = rate is not None and facts.get("peak")
    return {
        "model": preset,
        "weights": weights,
        "what": what,
        "ours": mine,
        "transformers": peer,
        "tokens_per_second": rate,
        "mfu": rate * facts["operations"] / facts["peak"] if known else None,
        "ratio": peer[0] / mine[0] if timed and isinstance(peer, (list, tuple)) else None,
    }


def markdown(line: dict) -> str:
    def shown(value):
        return value if isinstance(value, str) else "" if value is None else f"{value[0] * 1e3:.2f} ms"

    def number(name: str, form: str) -> str:
        return "" if line[name] is None else format(line[name], form)

    mine = line["ours"]
    first = f"{mine[1]:.1f} s" if isinstance(mine, (list, tuple)) else ""
    ratio = number("ratio", ".1f") + "x" * (line["ratio"] is not None)
    cells = [line["model"], line["weights"], line["what"], shown(mine), first]
    cells += [number("tokens_per_second", ",.0f"), number("mfu", ".0%"), shown(line["transformers"]), ratio]
    return "| " + " | ".join(cells) + " |"


def heading() -> list[str]:
    facts = machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"{facts['device']}; {versions}; commit {facts['commit']}.",
        "",
        "bfloat16; a training step has float32 weights, AdamW and gradients by every parameter, blocks",
        f"recomputed. Medians of {gpu_sides.ROUNDS}; the first call, which compiles, is named for ours.",
        "transformers has bfloat16 weights in every row; int8 and int4 are ours.",
        "",
        HEAD,
        "|" + "---|" * (HEAD.count("|") - 1),
    ]


def machine() -> dict:
    packages = ("jax", "transformers", "torch")
    git = ["git", "-C", str(checkout.ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    return {
        "device": said_by(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]) or "no GPU",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": said_by(git) or "unknown",
    }


def said_by(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def write_results(folder: pathlib.Path, name: str, rows: list[dict], notes: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine()
    name += "_" + "_".join(facts["device"].lower().split())
    table = ["# Whole models on a GPU", "", *heading(), *map(markdown, rows), ""]
    text = "\n".join([*table, *(f"- {note}" for note in notes)]).rstrip() + "\n"
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(facts | {"rows": rows, "notes": notes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
