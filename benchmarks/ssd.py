"""The scan on this machine's GPU: ours against XLA, mamba_ssm's Triton kernels and jax-linear-attention.

    make gpu                                              # tests first, then this
    python benchmarks/ssd.py --shapes A B --output benchmarks/results
    python benchmarks/ssd.py --small                      # tiny, also without a GPU: does this script work?

Of each shape, results are compared first, then forward, and forward + backward, are timed. Peers take part
where they are installed. A wrong result of ours ends it with exit code 1; a peer that is wrong, or does not
run, is named and not timed.

A time is the median over rounds of: queue calls for about 50 ms, wait for the last, divide by their number.
So it is the time of the device, as long as the device is slower than Python can queue; where a call takes the
host four fifths of that time or more, it is marked `host`: the device itself may be faster.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory too
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
import checkout
import jax
import numpy as np
import roofline
from contestants import Contestant, Entry, contestants, draw, with_jax
from roofline import Shape

from mamba2_jax import ops
from mamba2_jax.ops.scan import dispatch

SMALL = (Shape("small", 1, 200, 4, 2, 16, 16), Shape("small, float32", 2, 75, 2, 1, 8, 16, "float32"))
PASSES = ("forward", "forward + backward")
# Of the norm. 16 bits: operands and weights are rounded to 2**-9, and dA and dD are sums that partly cancel.
TOLERANCE, CANCEL = {"bfloat16": 1e-2, "float32": 2e-3}, {"dt": 3, "A": 3, "D": 3}
TAIL, MEMORY = 64, 2048  # tokens: what is compared at full length, and what they can depend on
VERSIONS = ("jax", "jaxlib", "triton", "jax-triton", "torch", "mamba_ssm", "jax-linear-attention")
OUT_OF_MEMORY = "out of memory"
HEAD = "| shape | pass | who | time | against ours | GB/s | of the roofline |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="a folder for the Markdown table and the JSON")
    parser.add_argument("--shapes", nargs="+", default=[""], help="only shapes whose names begin so")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="tiny shapes, a few calls, also without a GPU")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu" and not arguments.small:
        raise SystemExit(
            f"benchmarks/ssd.py: no NVIDIA GPU here that jax {jax.__version__} can use (it runs on "
            f"{jax.default_backend()}); with --small it runs without one"
        )
    shapes = [
        s
        for s in (SMALL if arguments.small else roofline.SHAPES)
        if s.name.startswith(tuple(arguments.shapes))
    ]
    if not shapes:
        parser.error(f"no shape begins with any of {arguments.shapes}")

    print("\n".join(heading(arguments.rounds)), flush=True)
    rows, notes = [], []
    for shape in shapes:
        for line in measure(shape, arguments.small, arguments.rounds, notes):
            rows.append(line)
            print(markdown(line), flush=True)
    print("".join(f"\n- {note}" for note in notes))
    if arguments.output is not None:
        write(arguments.output, rows, notes, arguments.rounds)


def measure(shape: Shape, small: bool, rounds: int, notes: list[str]):
    """Check all who can run a shape, then yield a row for each pass and contestant."""
    taking_part: list[Contestant] = []
    for contestant in contestants(shape, small):
        if isinstance(contestant, str):
            notes.append(f"{shape.name}: {contestant}")
            continue
        wrong, failed = attempt(check, contestant, shape)
        if wrong or failed:
            notes.append(f"{shape.name}: {contestant.name}: {wrong or failed}")
            if contestant.ours and failed != OUT_OF_MEMORY:
                raise SystemExit(f"benchmarks/ssd.py: {notes[-1]}")
        else:
            taking_part.append(contestant)
    inputs, dy = draw(shape)
    sizes = (shape.b, shape.l, shape.h, shape.p, shape.g, shape.n)
    unasked = dispatch.automatic("ssd", dispatch.describe(shape.dtype, *sizes))
    for what in PASSES:
        timed = {}
        for contestant in taking_part:
            time_of_call, failed = attempt(time_calls, contestant, inputs, dy, what, rounds, small)
            if failed:
                notes.append(f"{shape.name}, {what}: {contestant.name}: {failed}")
            else:
                timed[contestant] = time_of_call
        ours = next((seconds for who, (seconds, _) in timed.items() if who.name == unasked), None)
        for who, (seconds, host) in timed.items():
            yield row(shape, what, who, seconds, host, ours)


def attempt(function, *arguments):
    """Return a result and None; or None and, in words, what was raised: peers can raise anything."""
    try:
        return function(*arguments), None
    except Exception as error:
        said = str(error).strip()
        if "RESOURCE_EXHAUSTED" in said or "out of memory" in said.lower():
            return None, OUT_OF_MEMORY
        return None, f"{type(error).__name__}: {said.splitlines()[0][:200] if said else ''}"


def check(contestant: Contestant, shape: Shape) -> str | None:
    """Compare with XLA in float32: values and gradients of a short row, and the end of a whole row.

    Decays here leave nothing of a token after 2048 more, so that a row's last tokens can be computed alone.
    """
    short = dataclasses.replace(shape, b=min(shape.b, 2), l=min(shape.l, MEMORY))
    inputs, dy = draw(short)
    y, gradients = result(contestant.make(inputs, dy), "step")
    want_y, want = result(exact(inputs, dy), "step")
    errors = {"y": error(y, want_y)} | {f"d{name}": error(gradients[name], want[name]) for name in want}
    if shape != short:
        inputs, dy = draw(shape)
        end = {name: a[:, -MEMORY:] if a.ndim > 2 else a for name, a in inputs.items()}
        got = result(contestant.make(inputs, dy), "forward")[:, -TAIL:]
        errors["y at the end"] = error(got, result(exact(end, dy[:, -MEMORY:]), "forward")[:, -TAIL:])
    limit = TOLERANCE[shape.dtype]
    wrong = [f"{k} {e:.1e}" for k, e in errors.items() if not e < limit * CANCEL.get(k.removeprefix("d"), 1)]
    return f"differs from float32 by {', '.join(wrong)} of the norm" if wrong else None


def exact(inputs: dict, dy: np.ndarray) -> Entry:
    def scan(arrays):
        with jax.default_matmul_precision("highest"):
            return ops.ssd(**arrays, implementation="xla", chunk_size=64)[0]

    return with_jax(
        scan, {name: np.asarray(a, np.float32) for name, a in inputs.items()}, dy.astype(np.float32)
    )


def result(entry: Entry, which: str):
    out = getattr(entry, which)()
    entry.wait(out)
    return entry.numpy(out)


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def time_calls(
    contestant: Contestant, inputs: dict, dy: np.ndarray, what: str, rounds: int, small: bool
) -> tuple[float, bool]:
    """Return the median seconds of a call, and whether the host was what took them."""
    entry = contestant.make(inputs, dy)
    queue = entry.forward if what == "forward" else entry.step

    def seconds(calls: int) -> tuple[float, float]:
        """Per call: until all were queued, and until the last was done."""
        start = time.perf_counter()
        for _ in range(calls):
            out = queue()
        queued = time.perf_counter()
        entry.wait(out)
        return (queued - start) / calls, (time.perf_counter() - start) / calls

    seconds(1)  # compiles
    calls = 2 if small else max(3, min(500, int(0.05 / seconds(3)[1])))
    median = statistics.median(seconds(calls)[1] for _ in range(rounds))
    host = statistics.median(seconds(4)[0] for _ in range(5))  # few, so that no queue fills up
    return median, host > 0.8 * median


def row(shape: Shape, what: str, who: Contestant, seconds: float, host: bool, ours: float | None) -> dict:
    device = jax.devices()[0].device_kind
    floor = roofline.floor(shape, what, device)
    return {
        "name": shape.name,
        **dataclasses.asdict(shape),
        "pass": what,
        "who": who.name,
        "ours": who.ours,
        "microseconds": seconds * 1e6,
        "host_bound": host,
        "ratio_to_ours": None if ours is None else seconds / ours,
        "gigabytes_per_second": roofline.bytes_of(shape, what) / seconds / 1e9,
        "share_of_roofline": None if floor is None else floor / seconds,
        "device": device,
    }


def markdown(line: dict) -> str:
    ratio, share = line["ratio_to_ours"], line["share_of_roofline"]
    shape = Shape(**{field.name: line[field.name] for field in dataclasses.fields(Shape)})
    cells = [
        f"{shape.name}: {shape}",
        line["pass"],
        line["who"],
        f"{line['microseconds']:.0f} us" + " (host)" * line["host_bound"],
        "" if ratio is None else f"{ratio:.2f}x",
        f"{line['gigabytes_per_second']:.0f}",
        "" if share is None else f"{share:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


def heading(rounds: int) -> list[str]:
    facts = machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"{facts['device']}; {versions}; commit {facts['commit']}.",
        "",
        f"Medians of {rounds} rounds of queued calls; `host`: the host, not the device, set the time.",
        "Against ours: the time over that of the implementation that runs unasked. GB/s counts the bytes",
        "that must move (`benchmarks/roofline.py`), not those that did.",
        "",
        HEAD,
        "|" + "---|" * (HEAD.count("|") - 1),
    ]


def machine() -> dict:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = ["git", "-C", str(checkout.ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or "unknown"
    except FileNotFoundError:
        commit = "unknown"
    return {"device": jax.devices()[0].device_kind, "versions": versions, "commit": commit}


def write(folder: pathlib.Path, rows: list[dict], notes: list[str], rounds: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = "ssd_" + "_".join(machine()["device"].lower().split())
    table = ["# The scan", "", *heading(rounds), *map(markdown, rows), "", *(f"- {note}" for note in notes)]
    (folder / f"{name}.md").write_text("\n".join(table).rstrip() + "\n")
    content = machine() | {
        "rounds": rounds,
        "method": __doc__.split("\n\n")[-1].strip(),
        "rows": rows,
        "notes": notes,
    }
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
