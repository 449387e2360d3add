"""A full-size checkpoint on a small machine: written, inspected, converted, loaded, decoding.

Random weights of Codestral's shape (7.29 billion parameters, bfloat16, 14.6 GB in three shards), with every
step in a process of its own. For each it prints seconds, GB/s, CPU seconds, and the peaks of anonymous and of
mapped memory above what the process had before the step, from /proc. Reading starts from a cold cache, as it
does for `cat` beside it, and for a bare read of the same bytes into memory that is new to the process. These
three take turns, and before each another process touches all free memory and ends: a virtual machine gives
memory that it does not use back to its host, and to have it back takes longer than to read the files.

    python benchmarks/checkpoint_size.py --folder /scratch              # 45 GB of disk, 20 GB of memory
    python benchmarks/checkpoint_size.py --folder /scratch --layers 4   # a quick look
    python benchmarks/checkpoint_size.py --folder /scratch --preset mamba2-130m --output results.md
    python benchmarks/checkpoint_size.py --folder /scratch --preset nemotron-nano-9b-v2 \
        --steps write inspect convert_to_float16                        # 36 GB of disk
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import threading
import time

import family_shapes
import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from mamba2_jax import Mamba2Config
from mamba2_jax.weights import Outgoing, checkpoint_table, open_checkpoint
from mamba2_jax.weights.checkpoint_folder import write_checkpoint
from mamba2_jax.weights.table import written_name

STEPS = ("write", "inspect", "cat", "read", "load", "convert", "to_state_spaces", "generate")
MORE_STEPS = ("convert_to_float16",)
COMPARED = ("cat", "read", "load")
BLOCK = 1 << 20  # numbers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=pathlib.Path, required=True, help="scratch space; emptied at the end"
    )
    parser.add_argument("--preset", default="codestral-7b")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--steps", nargs="*", choices=(*STEPS, *MORE_STEPS), default=STEPS)
    parser.add_argument("--rounds", type=int, default=3, help="of cat, read and load")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this Markdown file")
    # of the child:
    parser.add_argument("--step", choices=(*STEPS, *MORE_STEPS, "touch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "touch":
        touch_free_memory()
        return
    if arguments.step:
        run_step(arguments)
        return
    config = model_config(arguments)
    largest = max(np.prod(stored.shape) for stored in checkpoint_table(config)) * 2
    lines = [
        f"Random weights of {arguments.preset}, {config.num_hidden_layers} layers: "
        f"{config.num_parameters():,} parameters, {2 * config.num_parameters() / 1e9:.2f} GB in bfloat16; "
        f"the largest tensor has {largest / 1e6:.0f} MB.",
        machine(),
        "",
        "| step | seconds | GB/s | anonymous peak | mapped peak | CPU seconds | |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    try:
        for line in measured(arguments):
            lines.append(line)
            print(line, flush=True)
    finally:
        if not arguments.keep:
            for name in ("original", "converted", "state-spaces"):
                shutil.rmtree(arguments.folder / name, ignore_errors=True)
    if arguments.output:
        arguments.output.write_text(
            "# A full-size checkpoint on a small machine\n\n" + "\n".join(lines) + "\n"
        )


def proc_fields(file: str, *names: str) -> tuple[int, ...]:
    """Numbers of bytes from a file of /proc."""
    fields = dict(line.split(":") for line in pathlib.Path(file).read_text().splitlines())
    return tuple(1024 * int(fields[name].split()[0]) for name in names)


def machine() -> str:
    (total,) = proc_fields("/proc/meminfo", "MemTotal")
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} cores of {platform.machine()}, {total / 2**30:.1f} GiB of memory; "
        f"load average {load:.1f} when it began."
    )


def measured(arguments):
    """A line of the table for each step, those of `COMPARED` when all of them have ended."""
    compared = [step for step in COMPARED if step in arguments.steps]
    results = {step: [] for step in compared}
    for step in arguments.steps:
        if step not in compared:
            yield line_of(step, [in_a_process(step, arguments)])
        elif step == compared[0]:
            for _ in range(arguments.rounds):
                for turn in compared:
                    forget(arguments.folder / "original")
                    in_a_process("touch", arguments)
                    results[turn].append(in_a_process(turn, arguments))
            for turn in compared:
                yield line_of(turn, results[turn])


def in_a_process(step: str, arguments) -> dict:
    command = [sys.executable, __file__, "--folder", str(arguments.folder), "--preset", arguments.preset]
    command += ["--layers", str(arguments.layers)] if arguments.layers else []
    done = subprocess.run([*command, "--step", step], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{step} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def line_of(step: str, results: list[dict]) -> str:
    result = sorted(results, key=lambda result: result["seconds"])[len(results) // 2]
    speed = f"{result['bytes'] / result['seconds'] / 1e9:.2f}" if result["bytes"] else ""
    peaks = f"{result['anonymous'] / 1e6:,.0f} MB | {result['mapped'] / 1e6:,.0f} MB"
    note = result["note"]
    if len(results) > 1:
        note += f"; the median of {len(results)}: " + ", ".join(
            f"{result['seconds']:.1f}" for result in results
        )
    name, seconds, cpu = step.replace("_", " "), result["seconds"], result["cpu"]
    return f"| {name} | {seconds:.1f} | {speed} | {peaks} | {cpu:.1f} | {note} |"


def touch_free_memory() -> None:
    """Write to each page of what memory there is, but for 2 GB, and give it back to this machine."""
    (available,) = proc_fields("/proc/meminfo", "MemAvailable")
    memory = np.empty(max(0, available - (2 << 30)), np.uint8)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(memory), 64 << 20):
            pool.submit(memory[start : start + (64 << 20) : 4096].fill, 1)


def run_step(arguments) -> None:
    config = model_config(arguments)
    step = globals()[f"step_{arguments.step}"]
    prepare = {"load": start_jax, "generate": start_jax, "to_state_spaces": start_torch}.get(arguments.step)
    if prepare:
        prepare()
    watch = Watch()
    with watch:
        nbytes, note = step(arguments.folder, config, watch)
    print(json.dumps(watch.result() | {"bytes": nbytes, "note": note}))


def model_config(arguments) -> Mamba2Config:
    if arguments.preset in family_shapes.SHAPES:
        return family_shapes.config_of(arguments.preset, arguments.layers)
    config = Mamba2Config.preset(arguments.preset)
    return config.replace(num_hidden_layers=arguments.layers) if arguments.layers else config


def start_jax() -> None:
    import jax.numpy as jnp

    jnp.zeros(1).block_until_ready()


def start_torch() -> None:
    import torch

    torch.zeros(1)


class Watch:
    """Peaks of this process's memory, by /proc, and its time."""

    def __enter__(self):
        self.base = self.now()
        self.peak = list(self.base)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        self.start, self.cpu = time.perf_counter(), time.process_time()
        self.seconds = None
        return self

    def __exit__(self, *_):
        self.stop()
        self.done.set()
        self.thread.join()

    def stop(self):
        """End of what is timed; what follows is only looked at."""
        if self.seconds is None:
            self.seconds = time.perf_counter() - self.start
            self.cpu = time.process_time() - self.cpu

    def _look(self):
        while not self.done.wait(0.005):
            self.peak = [max(pair) for pair in zip(self.peak, self.now(), strict=True)]

    @staticmethod
    def now() -> tuple[int, int]:
        return proc_fields("/proc/self/status", "RssAnon", "RssFile")

    def result(self) -> dict:
        anonymous, mapped = (peak - base for peak, base in zip(self.peak, self.base, strict=True))
        return {"seconds": self.seconds, "cpu": self.cpu, "anonymous": anonymous, "mapped": mapped}


def step_write(folder: pathlib.Path, config: Mamba2Config, watch: Watch):
    """Three shards of random weights, as large as an initialisation makes them."""
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(BLOCK, np.float32)

    def random_blocks(stored):
        scale = 1 / np.sqrt(stored.shape[-1]) if len(stored.shape) > 1 else 0.5
        count = int(np.prod(stored.shape))
        for start in range(0, count, BLOCK):
            offset = int(rng.integers(BLOCK))
            block = np.roll(noise, offset)[: min(BLOCK, count - start)] * scale
            yield block + 1 if stored.name.endswith("norm.weight") else block

    tensors = [
        Outgoing(
            written_name(stored, "transformers", head=True),
            stored.shape,
            dtype,
            lambda stored=stored: random_blocks(stored),
        )
        for stored in checkpoint_table(config)
        if stored.leaves
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    write_checkpoint(folder / "original", config, tensors, max_shard_size=total // 3 + (300 << 20))
    shards = len(list((folder / "original").glob("*.safetensors")))
    return total, f"{shards} files"


def step_inspect(folder: pathlib.Path, config: Mamba2Config, watch: Watch):
    from mamba2_jax.cli import commands as cli

    with contextlib.redirect_stdout(sys.stderr):
        if cli.main(["info", str(folder / "original")]):
            raise SystemExit("info failed")
    return 0, "`mamba2-jax info`"


def step_cat(folder: pathlib.Path, config: Mamba2Config, watch: Watch):
    forget(folder / "original")
    watch.start = time.perf_counter()
    files = sorted((folder / "original").glob("*.safetensors"))
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return size(folder / "original"), "what the disk gives, cold"


def step_read(folder: pathlib.Path, config: Mamba2Config, watch: Watch):
    """What loading could not be faster than: two threads fill new memory and look at nothing."""
    forget(folder / "original")
    watch.start = time.perf_counter()
    buffers = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for path in sorted((folder / "original").glob("*.safetensors")):
            with path.open("rb") as file:
                buffers.append(buffer := np.empty(path.stat().st_size, np.uint8))
                starts = range(0, len(buffer), BLOCK)
                reads = [
                    pool.submit(os.preadv, file.fileno(), [buffer[start : start + BLOCK]], start)
                    for start in starts
                ]
                assert sum(read.result() for read in reads) == len(buffer)
    watch.stop()
    return size(folder / "original"), "into new memory, cold, nothing done with it"


def step_load(folder: pathlib.Path, config: Mamba2Config, watch: Watch):
    from mamba2_jax import Mamba2ForCausalLM

    forget(folder / "original")
    watch.start = time.perf_counter()
    model = Mamba2ForCausalLM.from_pretrained(folder / "original")
    watch.stop()
    weights = sum(array.nbytes for array in model._arrays().values())
    return size(folder / "original"), f"from_pretrained, cold; {weights / 1e6:,.0f} MB of weights"


def step_convert(folder: pathlib.Path, config: Mamba2Config, watch: Watch):
    from mamba2_jax.weights.convert import convert

    forget(folder / "original")
    watch.start = time.perf_counter()
    convert(folder / "original", folder / "converted", max_shard_size="5GB")
    watch.stop()
    same_bytes(folder / "original", folder / "converted")
    shutil.rmtree(folder / "converted")
    return size(folder / "original"), "to shards of 5 GB, cold; the same bytes"


def step_convert_to_float16(folder: pathlib.Path, config: Mamba2Config, watch: Watch):
    from mamba2_jax.cli import commands as cli

    source, target = folder / "original", folder / "converted"
    forget(source)
    watch.start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        if cli.main(["convert", str(source), str(target), "--dtype", "float16"]):
            raise SystemExit("convert failed")
    watch.stop()
    with open_checkpoint(source) as one, open_checkpoint(target) as other:
        for name in one.tensors:
            (_, first), (_, second) = next(one.blocks(name)), next(other.blocks(name))
            if not np.array_equal(first.astype(np.float16), second[: len(first)]):
                raise SystemExit(f"{name} differs")
    shutil.rmtree(target)
    return size(source), "`mamba2-jax convert --dtype float16`, cold"


def step_to_state_spaces(folder: pathlib.Path, config: Mamba2Config, watch: Watch):
    from mamba2_jax.weights.convert import convert

    forget(folder / "original")
    watch.start = time.perf_counter()
    convert(folder / "original", folder / "state-spaces", to="state-spaces")
    watch.stop()
    same_bytes(folder / "original", folder / "state-spaces")
    shutil.rmtree(folder / "state-spaces")
    return size(folder / "original"), "to one .bin, cold; the same bytes"


def step_generate(folder: pathlib.Path, config: Mamba2Config, watch: Watch):
    """Decode at batch 1, and ask the compiler what the loop needs beside its arguments."""
    import jax
    import jax.numpy as jnp

    from mamba2_jax import Mamba2ForCausalLM, generate

    model = Mamba2ForCausalLM.from_pretrained(folder / "original")
    prompt = jnp.arange(1, 9)[None]
    decode = jax.jit(lambda model, ids: generate(model, ids, max_new_tokens=16, eos_token_id=()).tokens)
    compiled = decode.lower(model, prompt).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    compiled(model, prompt).block_until_ready()
    watch.start, watch.seconds = time.perf_counter(), None
    tokens = compiled(model, prompt).block_until_ready()
    watch.stop()
    per_token = watch.seconds / tokens.shape[1]
    note = f"{tokens.shape[1]} tokens, {per_token * 1e3:.0f} ms each; the loop's temporaries: "
    return 0, note + f"{temporaries / 1e6:,.0f} MB"


def same_bytes(first: pathlib.Path, second: pathlib.Path) -> None:
    """Refuse to report a conversion that is not exact."""
    with open_checkpoint(first) as one, open_checkpoint(second) as other:
        for name, info in one.tensors.items():
            there = name if name in other.tensors else name.replace("embeddings.", "embedding.")
            pairs = zip(one.blocks(name), other.blocks(there), strict=True)
            if other.tensors[there].dtype != info.dtype or not all(
                np.array_equal(a.view(np.uint16), b.view(np.uint16)) for (_, a), (_, b) in pairs
            ):
                raise SystemExit(f"{name} differs")


def forget(folder: pathlib.Path) -> None:
    """Drop the files from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def size(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
