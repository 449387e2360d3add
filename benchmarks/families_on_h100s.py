"""What training the largest models of the families takes of 8 H100s: memory, and what is sent.

Compiled ahead of time by `benchmarks/memory.py`, which says what it needs; nothing runs.

    python benchmarks/families_on_h100s.py --output benchmarks/results/families_on_h100s.md
    python benchmarks/families_on_h100s.py --parts memory --depths 6 12
"""

import argparse
import pathlib
import time
import warnings
from collections.abc import Iterator

import family_shapes
import jax
import memory

MESHES = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4})
BATCH = (8, 4096)
NEMOTRON, GRANITE = "nemotron-3-nano-30b-a3b", "granite-4.0-h-small"
# PEFT's names: the mixers' projections; experts take no adapters.
TARGETS = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the tables to this Markdown file")
    parser.add_argument("--implementation", default="mosaic_gpu", help="of the scan: mosaic_gpu or xla")
    parser.add_argument("--parts", nargs="*", choices=["memory", "sent"], default=["sent", "memory"])
    parser.add_argument("--models", nargs="*", choices=[NEMOTRON, GRANITE], default=[NEMOTRON, GRANITE])
    parser.add_argument("--meshes", nargs="*", type=int, default=[1], help="by number, for the memory")
    parser.add_argument("--depths", nargs="*", type=int, default=[0], help="layers of each model; 0: all")
    arguments = parser.parse_args()
    lines = ["# What the largest models of the families take of 8 H100s: compiled, not run", ""]

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if arguments.output is not None:
            arguments.output.write_text("\n".join(lines) + "\n")

    tell(f"Compiled for H100s (80 GB) with jax {jax.__version__}, the scan by `{arguments.implementation}`.")
    tell("Nothing here ran on a GPU. By `benchmarks/families_on_h100s.py`.")
    if "sent" in arguments.parts:
        for line in sent_table(arguments):
            tell(line)
    if "memory" in arguments.parts:
        for line in memory_table(arguments):
            tell(line)


def memory_table(arguments) -> Iterator[str]:
    yield ""
    yield "## Memory of a training step, GB per device"
    yield ""
    yield "bfloat16 compute, AdamW with float32 weights and moments (of the adapters alone with LoRA, whose"
    yield "base is bfloat16), every block recomputed."
    yield ""
    yield "| model | trained | mesh | batch | held | temporaries | at once | compiled in |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in arguments.models:
        for depth in arguments.depths:
            config = family_shapes.config_of(name, depth or None)
            for number in arguments.meshes:
                yield memory_line(name, config, MESHES[number], arguments.implementation)


def memory_line(name: str, config, sizes: dict[str, int], implementation: str) -> str:
    began = time.perf_counter()
    lora = name == GRANITE
    step = memory.compiled_step(config, implementation, memory.gpus(**sizes), lora, BATCH, TARGETS)
    stats = step.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    numbers = [held, stats.temp_size_in_bytes, held + stats.temp_size_in_bytes]
    return (
        f"| {name}, {config.num_hidden_layers} layers | {'LoRA, rank 8' if lora else 'all'} | {named(sizes)} "
        f"| {BATCH[0]} x {BATCH[1]} | {' | '.join(f'{n / 1e9:.1f}' for n in numbers)} | "
        f"{time.perf_counter() - began:.0f} s |"
    )


def sent_table(arguments) -> Iterator[str]:
    yield ""
    yield "## What a layer of each kind sends"
    yield ""
    yield "M: Mamba-2, *: attention, E: experts with a shared one; Granite's M and * have both in a second"
    yield "branch. Real widths, batch 8 x 4096, float32 weights, bfloat16 compute; per device the number of"
    yield "each, and MB. The gradient is by the layer's input alone."
    yield ""
    yield "| model | layer | mesh | forward | forward and backward |"
    yield "|---|---|---|---|---|"
    for name in arguments.models:
        config = family_shapes.config_of(name)
        for letter in sorted(set(config.layer_pattern), key="ME*".index):
            sizes = MESHES[arguments.meshes[0]]
            mesh = memory.gpus(**sizes)
            cells = [
                memory.sent(config, arguments.implementation, mesh, BATCH[1], backward, letter)
                for backward in (0, 1)
            ]
            shown = " | ".join(map(memory.shown, cells))
            yield f"| {name} | {letter} | {named(sizes)} | {shown} |"


def named(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
