"""What the compiler makes of the decode loop on an H100: kernels and copies per layer, and temporaries.

Compiled ahead of time, nothing runs, no GPU is needed. What a layer costs is the difference between models of
three and of two layers; the loop is that of `generate`, greedy, with an eos.

    python benchmarks/decode_aot.py                        # about five minutes
    python benchmarks/decode_aot.py --output benchmarks/results/decode_aot.md

Needs what `benchmarks/memory.py` needs, without `[train]`.
"""

import argparse
import collections
import os
import pathlib
import re
import sys

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
from aot import H100

LAUNCHES = ("fusion", "custom-call", "copy")  # instructions of the loop that become one launch each
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
        "kernels and libraries, copies), and the temporaries that the compiler assigns beside weights and",
        "state.",
        "",
        "| model | batch | step | kernels | copies | temporaries of a layer, MB | in command buffers |",
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
    if arguments.output is not None:
        arguments.output.write_text(
            "# The decode loop on an H100, by the compiler\n\n" + "\n".join(lines) + "\n"
        )


def row(preset: str, batch: int, implementation: str, dtype: str) -> tuple[str, collections.Counter]:
    """One line of the table, and the launches of a layer by name."""
    two, three = (compiled_loop(preset, layers, batch, implementation, dtype) for layers in (2, 3))
    named = launches(three.as_text()) - launches(two.as_text())
    kinds = collections.Counter()
    for name, count in (launches(three.as_text()) - collections.Counter()).items():
        kinds[name.split()[0]] += count
    for name, count in launches(two.as_text()).items():
        kinds[name.split()[0]] -= count
    temporaries = three.memory_analysis().temp_size_in_bytes - two.memory_analysis().temp_size_in_bytes
    inside = "yes" if "command_buffer" in three.as_text() else "none seen in the text"
    kernels = kinds["fusion"] + kinds["custom-call"]
    cells = [preset, batch, implementation, kernels, kinds["copy"], f"{temporaries / 1e6:.2f}", inside]
    return "| " + " | ".join(map(str, cells)) + " |", named


def compiled_loop(preset: str, layers: int, batch: int, implementation: str, dtype: str):
    """The decode loop of a model that exists as shapes only."""
    config = Mamba2Config.preset(preset).replace(num_hidden_layers=layers)
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
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
    with jax.default_device(topology.devices[0]):  # what is traced is for a GPU
        return jax.jit(loop, donate_argnums=1).lower(*arguments).compile()


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
