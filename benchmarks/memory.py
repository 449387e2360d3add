"""What training takes of GPUs that are not here: memory per device, and what the devices send each other.

Steps are compiled ahead of time for NVIDIA H100s; nothing is allocated and nothing runs. Memory is what the
compiler assigns: arguments and results (parameters, moments, batch) once, and the temporaries beside them.
What a block sends is the difference between models of three and of two layers.

    python benchmarks/memory.py                                     # twelve minutes
    python benchmarks/memory.py --output benchmarks/results/memory.md

Needs Python >= 3.12 with jax >= 0.11.2, `jax-cuda13-plugin`, `jax-cuda13-pjrt`, `nvidia-cuda-nvcc` and
`nvidia-nvvm`, and the package with `[train]`.
"""

import argparse
import collections
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.lora import LoraConfig, add_lora
from mamba2_jax.mesh import AXES
from mamba2_jax.sharding import parameter_spec, token_sharding
from mamba2_jax.training import OptimConfig, TrainState, make_optimizer, split_model
from mamba2_jax.training.step import sharded_train_step

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "kernels"))
from aot import H100

SENDING = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the tables to this Markdown file")
    parser.add_argument("--implementation", default="mosaic_gpu", help="of the scan: mosaic_gpu or xla")
    parser.add_argument("--parts", nargs="*", choices=["memory", "sent"], default=["memory", "sent"])
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    arguments = parser.parse_args()
    lines = ["# What training takes of H100s, by the compiler", ""]

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if arguments.output is not None:
            arguments.output.write_text("\n".join(lines) + "\n")

    tell(f"Compiled for H100s (80 GB) with jax {jax.__version__}, the scan by `{arguments.implementation}`.")
    tell("Nothing here ran on a GPU.")
    if "memory" in arguments.parts:
        for line in memory_table(arguments.implementation, arguments.layers):
            tell(line)
    if "sent" in arguments.parts:
        for line in sent_table(arguments.implementation):
            tell(line)


def gpus(**sizes: int) -> Mesh:
    """A mesh of H100s that are not here."""
    shape = [sizes.get(axis, 1) for axis in AXES]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100, topology=f"1x{math.prod(shape)}x1"
    )
    return Mesh(np.array(topology.devices).reshape(shape), AXES)


def memory_table(implementation: str, layers: int | None) -> Iterator[str]:
    yield ""
    yield "## Memory of a training step, GB per device"
    yield ""
    yield "bfloat16 compute, AdamW with float32 weights and moments (of the adapters alone with LoRA, whose"
    yield "base is bfloat16), every block recomputed."
    yield ""
    yield "| model | trained | mesh | batch | held | temporaries | at once | compiled in |"
    yield "|---|---|---|---|---|---|---|---|"
    for preset, lora, sizes, batch in (
        ("codestral-7b", False, {"fsdp": 8}, (8, 4096)),
        ("mamba2-2.7b", True, {}, (1, 4096)),
    ):
        config = Mamba2Config.preset(preset)
        if layers:
            config = config.replace(num_hidden_layers=layers)
        began = time.perf_counter()
        stats = compiled_step(config, implementation, gpus(**sizes), lora, batch).memory_analysis()
        held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        temporaries = stats.temp_size_in_bytes
        numbers = [held, temporaries, held + temporaries]
        yield (
            f"| {preset}, {config.num_hidden_layers} layers | {'LoRA, rank 8' if lora else 'all'} | "
            f"{' x '.join(f'{axis} {size}' for axis, size in sizes.items()) or 'one device'} | "
            f"{batch[0]} x {batch[1]} | {' | '.join(f'{n / 1e9:.1f}' for n in numbers)} | "
            f"{time.perf_counter() - began:.0f} s |"
        )


def compiled_step(
    config: Mamba2Config,
    implementation: str,
    mesh: Mesh,
    lora: bool,
    batch: tuple[int, int],
    targets: tuple[str, ...] = ("in_proj", "out_proj"),
):
    """A training step of a model that exists as shapes only."""
    structures, optimizers = [], []

    def start():
        stored = jnp.bfloat16 if lora else jnp.float32
        model = make_model(config, implementation, mesh, stored)
        if lora:
            add_lora(model, LoraConfig(rank=8, targets=targets), rngs=nnx.Rngs(1))
        structure, trained, frozen = split_model(model)
        structures.append(structure)
        optimizers.append(make_optimizer(OptimConfig(), trained, 1000))
        return TrainState.start(trained, optimizers[0], jax.random.key(0)), frozen

    def placed(path, leaf):
        name = str(getattr(path[-1], "key", ""))  # of parameters, and of their moments
        spec = parameter_spec(name, config, mesh) if "." in name else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    state, frozen = jax.tree.map_with_path(placed, jax.eval_shape(start))
    ids = jax.ShapeDtypeStruct(batch, jnp.int32, sharding=token_sharding(mesh, *batch))
    inputs = {"input_ids": ids, "segment_ids": ids, "labels": ids}
    with jax.default_device(mesh.devices.flat[0]):  # what is traced is for a GPU
        lowered = sharded_train_step(state).lower(
            state, frozen, inputs, structure=structures[0], optimizer=optimizers[0], remat="block"
        )
        return lowered.compile()


def make_model(config: Mamba2Config, implementation: str, mesh: Mesh, stored) -> Mamba2ForCausalLM:
    model = Mamba2ForCausalLM(
        config,
        dtype=jnp.bfloat16,
        param_dtype=stored,
        ssd_implementation=implementation,
        rngs=nnx.Rngs(0),
    )
    model._set_mesh(mesh)
    return model


def sent_table(implementation: str) -> Iterator[str]:
    yield ""
    yield "## What a block sends"
    yield ""
    yield "Real widths, batch 8, float32 weights, bfloat16 compute; per device the number of each, and MB."
    yield "The gradient is by the block's input alone: those of the weights that devices hold in common are"
    yield "summed once a step."
    yield ""
    yield "| model | mesh | length | forward | forward and backward |"
    yield "|---|---|---|---|---|"
    for preset, sizes, length in (
        ("codestral-7b", {"tensor": 8}, 4096),
        ("mamba2-2.7b", {"tensor": 8}, 4096),
        ("codestral-7b", {"fsdp": 8}, 4096),
        ("codestral-7b", {"tensor": 2, "fsdp": 4}, 4096),
        ("codestral-7b", {"sequence": 8}, 4096),
        ("codestral-7b", {"sequence": 8}, 16384),
    ):
        cells = [sent(Mamba2Config.preset(preset), implementation, gpus(**sizes), length, b) for b in (0, 1)]
        mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        yield f"| {preset} | {mesh} | {length} | {' | '.join(map(shown, cells))} |"


def sent(
    config: Mamba2Config, implementation: str, mesh: Mesh, length: int, backward: int, letter: str = ""
) -> collections.Counter:
    """What a block sends, of the kind of a letter of `layer_pattern`: name and bytes of each array."""

    def of_layers(count: int) -> collections.Counter:
        pattern = {"layer_pattern": letter * count} if letter else {}
        shrunk = config.replace(num_hidden_layers=count, **pattern)
        graphs = []

        def build():
            graph, parameters = nnx.split(make_model(shrunk, implementation, mesh, jnp.float32).backbone)
            graphs.append(graph)
            return parameters

        def placed(path, leaf):
            name = ".".join(str(getattr(key, "key", "")) for key in path if hasattr(key, "key"))
            sharding = NamedSharding(mesh, parameter_spec(f"backbone.{name}", shrunk, mesh))
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        def run(hidden, parameters):
            backbone = nnx.merge(graphs[0], parameters)
            return backbone.forward(None, None, None, None, hidden).last_hidden_state

        def gradient(hidden, parameters):
            return jax.grad(lambda hidden: jnp.square(run(hidden, parameters)).sum().astype(jnp.float32))(
                hidden
            )

        parameters = jax.tree.map_with_path(placed, jax.eval_shape(build))
        shape = (8, length, config.hidden_size)
        hidden = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=token_sharding(mesh, 8, length))
        with jax.default_device(mesh.devices.flat[0]):
            compiled = jax.jit(gradient if backward else run).lower(hidden, parameters).compile()
        return collectives(compiled.as_text())

    return of_layers(3) - of_layers(2)


def collectives(text: str) -> collections.Counter:
    """Every array that a compiled program sends among more than one device, by name and bytes."""
    found: collections.Counter = collections.Counter()
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({SENDING})(-start)?\(", line)
        if match is None or re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\]<=)", line):
            continue
        written = re.sub(r"\{.*?\}", "", match[1])  # without layouts
        _, nested, results = written.partition("), ") if written.startswith("((") else ("", "", written)
        shapes = re.findall(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]", results)
        shapes = [shape for shape in shapes if shape[0] != "u32"]  # counters
        if match[3] and not nested and match[2] in ("all-gather", "collective-permute"):
            shapes = shapes[len(shapes) // 2 :]  # operands, then results
        for dtype, dimensions in shapes:
            width = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
            found[match[2], width * math.prod(map(int, filter(None, dimensions.split(","))))] += 1
    return found


def shown(sent: collections.Counter) -> str:
    parts = [f"{count} {name} of {size / 1e6:.3g}" for (name, size), count in sorted(sent.items())]
    return "; ".join(parts) or "nothing"


if __name__ == "__main__":
    main()
