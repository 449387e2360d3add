"""What the compiler makes of the decode loop on an H100: launches per layer, CUDA graphs, temporaries.

Compiled ahead of time, nothing runs, no GPU is needed. What a layer costs is the difference between models of
three and of two layers; the loop is that of `generate`, greedy, with an eos.

    python benchmarks/decode_aot.py                        # about five minutes
    python benchmarks/decode_aot.py --presets mamba2-130m  # one model
    python benchmarks/decode_aot.py --output benchmarks/results/decode_aot.md

Needs what `benchmarks/memory.py` needs, without `[train]`.
"""

import argparse
import collections
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.generation.loop import decode
from mamba2_jax.generation.sampling import Sampler
from mamba2_jax.generation.state import start_state
from mamba2_jax.models.cache import Mamba2Cache

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "kernels"))
import aot
import mixer_programs

LAUNCHES = ("fusion", "custom-call", "copy")  # instructions of the loop that become one launch each
THUNK = re.compile(r"^( +)\d+: (kCommandBuffer|kCustomKernel|kCustomCall|kKernel|kCopy|kGemm\w*|kCublas\w*) ")
PRESETS = ("codestral-7b", "mamba2-2.7b", "mamba2-130m")
NEW_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this Markdown file")
    parser.add_argument("--presets", nargs="*", default=PRESETS)
    parser.add_argument("--batches", nargs="*", type=int, default=(1, 64))
    parser.add_argument("--implementations", nargs="*", default=("xla", "mosaic_gpu"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--names", action="store_true", help="also print the launches of a layer by name")
    arguments = parser.parse_args()
    lines = [
        f"Compiled for an H100 with jax {jax.__version__}, {arguments.dtype}; **compiled, not run**.",
        "Per layer and token, the difference between three layers and two: launches (fusions, calls of",
        "kernels and libraries, copies), how many of them the compiler puts into one CUDA graph per token",
        "(command buffers), and the temporaries that it assigns beside weights and state.",
        "",
        "| model | batch | step | kernels | copies | in the graph | temporaries of a layer, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for preset in arguments.presets:
        for batch in arguments.batches:
            for implementation in arguments.implementations:
                line, named = row(preset, batch, implementation, arguments.dtype)
                lines.append(line)
                print(line, flush=True)
                if arguments.names:
                    print("\n".join(f"    {count} x {name}" for name, count in sorted(named.items())))
    for line in kernel_table():
        lines.append(line)
        print(line, flush=True)
    if arguments.output is not None:
        arguments.output.write_text(
            "# The decode loop on an H100, by the compiler\n\n" + "\n".join(lines) + "\n"
        )


def kernel_table() -> Iterator[str]:
    """Yield the lines of what each kernel takes of a multiprocessor, and of HBM in all."""
    yield ""
    yield "## The kernels of `mosaic_gpu`"
    yield ""
    yield "Registers per thread; one warpgroup per block. HBM: operands and results of a layer's kernels,"
    yield "each once, twice if updated in place, against the least: parameters and state read, the state"
    yield "written, hidden states in and the update out."
    yield ""
    yield (
        "| program | kernel | registers | spilled, bytes | shared memory, bytes | blocks per SM | HBM, MB "
        "| of the least |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for program in mixer_programs.PROGRAMS:
        moved = mixer_programs.hbm_bytes(program)
        share = f"{moved / mixer_programs.floor(program):.3f}"
        if program.kernels == mixer_programs.BETWEEN:
            moved, share = 0, "products by XLA"
        for kernel in aot.compile_kernels("mixer_programs:build", **program.kwargs):
            name = kernel.name.removesuffix("_mosaic_gpu_kernel")
            cells = [f"{program}: {program.described}", name, kernel.registers, kernel.spill_bytes]
            cells += [kernel.smem_bytes, kernel.blocks_per_sm, f"{moved / 1e6:.1f}" if moved else "", share]
            yield "| " + " | ".join(map(str, cells)) + " |"


class Loop(NamedTuple):
    """What was read from a compiled loop."""

    launches: collections.Counter  # by kind, operation and shape
    in_graph: int
    temporaries: int  # bytes


def row(preset: str, batch: int, implementation: str, dtype: str) -> tuple[str, collections.Counter]:
    """Return a line of the table, and the launches of a layer by name."""
    two, three = (compiled_loop(preset, layers, batch, implementation, dtype) for layers in (2, 3))
    kinds = collections.Counter()
    for loop, sign in ((three, 1), (two, -1)):
        for name, count in loop.launches.items():
            kinds[name.split()[0]] += sign * count
    kernels, copies = kinds["fusion"] + kinds["custom-call"], kinds["copy"]
    temporaries = (three.temporaries - two.temporaries) / 1e6
    in_graph = f"{three.in_graph - two.in_graph} of {kernels + copies}"
    cells = [preset, batch, implementation, kernels, copies, in_graph, f"{temporaries:.2f}"]
    return "| " + " | ".join(map(str, cells)) + " |", three.launches - two.launches


def compiled_loop(preset: str, layers: int, batch: int, implementation: str, dtype: str) -> Loop:
    """Compile the decode loop of a model that exists as shapes only."""
    config = Mamba2Config.preset(preset).replace(num_hidden_layers=layers)
    topology = topologies.get_topology_desc(platform="cuda", target_config=aot.H100, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec())
    graphs = []

    def build():
        named = None if implementation == "xla" else implementation
        stored = jnp.dtype(dtype)
        model = Mamba2ForCausalLM(
            config, dtype=stored, param_dtype=stored, ssd_implementation=named, rngs=nnx.Rngs(0)
        )
        graph, parameters = nnx.split(model)
        graphs.append(graph)
        cache = Mamba2Cache.zeros(config, batch, stored)
        return parameters, cache, jnp.zeros((batch, config.vocab_size))

    def loop(parameters, cache, logits):
        model = nnx.merge(graphs[0], parameters)
        state = start_state(cache, logits, size=NEW_TOKENS, pad=0)
        state = decode(model, state, Sampler(), None, jnp.int32(NEW_TOKENS), eos=(2,), pad=0)
        return state.tokens, state.cache

    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(build)
    )
    with jax.default_device(topology.devices[0]), tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(loop, donate_argnums=1).lower(*arguments)  # traced for a GPU
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        (thunks,) = pathlib.Path(folder).glob("*thunk_sequence_after_thunk_passes.txt")
        return Loop(
            launches(compiled.as_text()),
            count_in_graph(thunks.read_text()),
            compiled.memory_analysis().temp_size_in_bytes,
        )


def count_in_graph(thunks: str) -> int:
    """Count the launches of the loop's body that are in command buffers, in a dump of XLA's thunks."""
    found, within = 0, None
    for line in thunks.partition("body:")[2].splitlines():
        match = THUNK.match(line)
        if match is None:
            continue
        depth, kind = len(match[1]), match[2]
        if within is not None and depth <= within:
            within = None
        if kind == "kCommandBuffer":
            within = depth
        elif within is not None:
            found += 1
    return found


def launches(text: str) -> collections.Counter:
    """Count the launches in the body of the loop, by kind, operation and shape."""
    body = re.search(r"= .*? while\(.*?body=%?([\w.\-]+)", text)[1]
    computation = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.M | re.S)[0]
    found: collections.Counter = collections.Counter()
    for line in computation.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(LAUNCHES)})\(", line)
        if match is None:
            continue
        target = re.search(r'custom_call_target="([^"]+)"', line)
        if target and "AllocateBuffer" in target[1]:
            continue
        where = re.search(r'op_name="([^"]*)"', line)
        shape = re.sub(r"\{.*?\}", "", match[1])
        found[
            f"{match[2]} {shape} {where[1].split('/')[-1] if where else ''} {target[1] if target else ''}"
        ] += 1
    return found


if __name__ == "__main__":
    main()
