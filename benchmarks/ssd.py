"""The scan on an NVIDIA GPU: ours, XLA's, mamba_ssm's Triton kernels and jax-linear-attention, in one run.

Every result is checked against float32 XLA first, then device time is taken from the profiler's trace
(PyTorch: CUDA events). One row per shape and pass: the median, the ratio to ours, GB/s over the bytes that
any implementation must move, and the share of the roofline (3.0 TB/s, 798 TFLOP/s: an H100's).

    python benchmarks/ssd.py                # all shapes; writes benchmarks/results/ssd.md and ssd.json
    python benchmarks/ssd.py --check        # only whether a GPU is here
    python benchmarks/ssd.py --dry-run      # small shapes, wall-clock time, any machine: tries the script
"""

import argparse
import dataclasses
import functools
import gzip
import importlib.metadata
import importlib.util
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mamba2_jax import ops
from mamba2_jax.ops import dispatch

RESULTS = pathlib.Path(__file__).parent / "results"
BYTES_PER_S, FLOPS_PER_S = 3.0e12, 798e12
TOLERANCE = 5e-2  # bfloat16 operands; the gradients of A and D are long sums that cancel


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    b: int
    l: int
    h: int
    g: int
    p: int = 64
    n: int = 128

    def __str__(self) -> str:
        return f"{self.name}: b{self.b} l{self.l} h{self.h} p{self.p} n{self.n} g{self.g}"

    def floor(self, backward: bool) -> tuple[int, int]:
        """Return bytes and floating-point operations of a pass, with chunks of 64 tokens."""
        t, h, p, n, g, chunk = self.b * self.l, self.h, self.p, self.n, self.g, 64
        size = t * (4 * h * p + 2 * h + 4 * g * n) + 4 * self.b * h * p * n
        flops = t * (2 * chunk * n * g + h * (2 * chunk * p + 4 * p * n))
        if backward:
            size += t * (6 * h * p + 4 * h + 8 * g * n)
            flops += t * (6 * chunk * n * g + h * (4 * chunk * p + 10 * p * n))
        return size, flops


SHAPES = [
    Shape("A, Codestral's layer", 1, 4096, 128, 8),
    Shape("B, a 2.7b layer", 8, 2048, 80, 1),
    Shape("C, a 2.7b layer, long", 1, 131072, 80, 1),
    *(Shape("130m training", b, l, 24, 1) for b, l in ((8, 2048), (1, 8192), (1, 65536))),
    *(Shape("2.7b training", b, l, 80, 1) for b, l in ((1, 8192), (1, 65536))),
]
SMALL = [Shape("small", 1, 96, 2, 1, 16, 16), Shape("small, groups", 2, 70, 4, 2, 16, 32)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only tell whether there is a GPU")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on whatever device there is")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default=None, help="folder of ssd.md and ssd.json")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu" and not arguments.dry_run:
        found = jax.devices()[0].device_kind
        print(f"benchmarks/ssd.py needs an NVIDIA GPU; jax finds {found}. --dry-run tries it without.")
        return 1
    if arguments.check:
        print(f"GPU: {jax.devices()[0].device_kind}")
        return 0
    measure = wall_seconds if arguments.dry_run else device_seconds
    rows = []
    for shape in SMALL if arguments.dry_run else SHAPES:
        for backward in (False, True):
            rows += bench(shape, backward, measure, 3 if arguments.dry_run else arguments.rounds)
    text = markdown(rows, arguments.dry_run)
    print(text)
    folder = arguments.output or (None if arguments.dry_run else RESULTS)
    if folder is not None:
        (folder / "ssd.md").write_text(text + "\n")
        (folder / "ssd.json").write_text(json.dumps({"where": where(), "rows": rows}, indent=1) + "\n")
    return int(any(row["error"] is not None and row["error"] > TOLERANCE for row in rows))


def bench(shape: Shape, backward: bool, measure: Callable, rounds: int) -> list[dict]:
    """Check and time every implementation that is here; the first is ours."""
    inputs = draw(shape)
    ours = dispatch.automatic(dispatch.describe("bfloat16", *dataclasses.astuple(shape)[1:4], *_rest(shape)))
    contenders: dict[str, Callable] = {f"ours ({ours})": functools.partial(run_jax, implementation=ours)}
    if ours != "xla":
        contenders["XLA"] = functools.partial(run_jax, implementation="xla")
    if importlib.util.find_spec("jla"):
        contenders["jax-linear-attention"] = run_jla
    exact = functools.partial(run_jax, implementation="xla", dtype=jnp.float32)
    want = timed(exact, backward)(*inputs)
    size, flops = shape.floor(backward)
    roofline = max(size / BYTES_PER_S, flops / FLOPS_PER_S)
    rows = []
    for name, run in contenders.items():
        row = {"shape": str(shape), "pass": "forward + backward" if backward else "forward", "who": name}
        try:
            compiled = timed(run, backward)
            error = relative(compiled(*inputs), want)
            seconds = measure(compiled, inputs, rounds)
        except (RuntimeError, ValueError, NotImplementedError, MemoryError) as failure:
            # one that does not fit or does not run is a row of the table too
            reason = str(failure).splitlines()[0][:120] if str(failure) else type(failure).__name__
            rows.append({**row, "seconds": None, "error": None, "note": reason})
            continue
        rows.append({**row, "seconds": seconds, "error": error})
    if importlib.util.find_spec("mamba_ssm") and jax.default_backend() == "gpu":
        rows.append({**rows[0], "who": "mamba_ssm", **run_mamba_ssm(shape, inputs, want, backward, rounds)})
    for row in rows:
        if row["seconds"] is not None:
            row |= {"gb_per_s": size / row["seconds"] / 1e9, "roofline": roofline / row["seconds"]}
            if rows[0]["seconds"] is not None:
                row["ratio"] = row["seconds"] / rows[0]["seconds"]
    return rows


def _rest(shape: Shape) -> tuple[int, int, int]:
    return shape.p, shape.g, shape.n


def draw(shape: Shape) -> tuple:
    """Random x, dt, A, B, C, D as a trained layer has them."""
    keys = jax.random.split(jax.random.key(0), 6)
    b, l, h, p, g, n = dataclasses.astuple(shape)[1:4] + _rest(shape)
    x = jax.random.normal(keys[0], (b, l, h, p), jnp.bfloat16)
    dt = jax.nn.softplus(jax.random.normal(keys[1], (b, l, h)) - 3.0)
    A = -jnp.exp(jax.random.uniform(keys[2], (h,), maxval=2.0))
    B, C = (jax.random.normal(key, (b, l, g, n), jnp.bfloat16) / n**0.25 for key in keys[3:5])
    return x, dt, A, B, C, jax.random.normal(keys[5], (h,))


def run_jax(x, dt, A, B, C, D, *, implementation, dtype=None):
    x, B, C = (a if dtype is None else a.astype(dtype) for a in (x, B, C))
    return ops.ssd(x, dt, A, B, C, D=D, implementation=implementation)[0]


def run_jla(x, dt, A, B, C, D):
    from jla.layers.ssm import mamba2_ssd

    return mamba2_ssd(x, dt, A, B, C, d=D)[0]


def timed(run: Callable, backward: bool) -> Callable:
    """Return what is timed: the forward pass, or all gradients of its sum; a tuple of arrays."""
    if not backward:
        return jax.jit(lambda *inputs: (run(*inputs),))
    return jax.jit(jax.grad(lambda *inputs: run(*inputs).astype(jnp.float32).sum(), argnums=range(6)))


def run_mamba_ssm(shape: Shape, inputs, want, backward: bool, rounds: int) -> dict:
    """Time mamba_ssm's Triton kernels with CUDA events, on the same numbers."""
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    tensors = [torch.from_numpy(np.array(a.astype(jnp.float32))).cuda() for a in inputs]
    tensors = [t.bfloat16() if i in (0, 3, 4) else t for i, t in enumerate(tensors)]
    tensors = [t.requires_grad_(backward) for t in tensors]
    x, dt, A, B, C, D = tensors

    def once():
        y = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D)
        return torch.autograd.grad(y.float().sum(), tensors) if backward else (y,)

    error = relative([t.float().cpu().numpy() for t in once()], want)
    samples = []
    for _ in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        once()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return {"seconds": statistics.median(samples[3:]), "error": error}


def relative(got, want) -> float:
    """Return the largest error among the arrays, as a norm over the norm."""
    errors = []
    for ours, exact in zip(got, want, strict=True):
        ours, exact = np.asarray(ours, np.float32), np.asarray(exact, np.float32)
        errors.append(np.linalg.norm(ours - exact) / np.linalg.norm(exact))
    return float(max(errors))


def wall_seconds(run: Callable, inputs: tuple, rounds: int) -> float:
    """Return the median wall-clock time of a call."""
    jax.block_until_ready(run(*inputs))
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


def device_seconds(run: Callable, inputs: tuple, rounds: int) -> float:
    """Return the median time the device was busy in a call, from the profiler's trace."""
    jax.block_until_ready(run(*inputs))
    samples = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, create_perfetto_trace=False):
                jax.block_until_ready(run(*inputs))
            samples.append(busy_seconds(pathlib.Path(folder)))
    return statistics.median(samples)


def busy_seconds(folder: pathlib.Path) -> float:
    """Sum the kernels on the GPU's streams in a trace (microseconds in the file)."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    named = {}
    for event in events:
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name"):
            named[event["pid"], event.get("tid") if event["name"] == "thread_name" else None] = event["args"][
                "name"
            ]
    total = 0.0
    for event in events:
        process = named.get((event.get("pid"), None), "")
        stream = named.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and "GPU" in process and stream.startswith("Stream"):
            total += event["dur"]
    if not total:
        raise RuntimeError("the profiler's trace holds no GPU kernels")
    return total / 1e6


def markdown(rows: list[dict], dry_run: bool) -> str:
    lines = [f"{where()}.", ""]
    if dry_run:
        lines += ["A dry run: wall-clock times of small shapes, which say nothing.", ""]
    lines += [
        "| shape, bfloat16 | pass | who | median | ratio | GB/s | of the roofline | error |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        who = f"| {row['shape']} | {row['pass']} | {row['who']} |"
        if row["seconds"] is None:
            lines.append(f"{who} does not run: {row['note']} | | | | |")
            continue
        ratio = f"{row['ratio']:.2f}x" if "ratio" in row else ""
        lines.append(
            f"{who} {row['seconds'] * 1e6:.0f} us | {ratio} | {row['gb_per_s']:.0f} | {row['roofline']:.0%} |"
            f" {row['error']:.1e} |"
        )
    return "\n".join(lines)


def where() -> str:
    """Return the device and the versions."""
    names = ("jax", "jax-triton", "triton", "torch", "mamba-ssm", "jax-linear-attention")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{jax.devices()[0].device_kind}; {', '.join(found)}"


if __name__ == "__main__":
    sys.exit(main())
