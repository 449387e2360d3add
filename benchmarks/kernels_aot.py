"""What the kernels take of an H100: registers, spills, shared memory, occupancy, bytes of HBM. Needs no GPU.

Every program of the tests is compiled for sm_90a ahead of time, each in a process of its own.

    python benchmarks/kernels_aot.py            # about a minute
    python benchmarks/kernels_aot.py --output benchmarks/results/kernels_aot.md

Needs Python >= 3.12 with jax >= 0.11.2, `jax-cuda13-plugin`, `jax-cuda13-pjrt`, `nvidia-cuda-nvcc` and
`nvidia-nvvm`; with triton installed, whose wheel has nvdisasm, registers and instructions are those of the
machine code.
"""

import argparse
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "kernels"))
import aot
import backward_programs
import forward_programs
import traffic

HEAD = (
    "| kernel | shape | registers | launched with | spilled, bytes | shared memory, bytes | wgmma | "
    "blocks per SM, bound by | HBM, MB | through L2, MB |"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    if aot.missing() is not None:
        parser.error(aot.missing())

    lines = [
        f"Compiled ahead of time for sm_90a (H100), jax {jax.__version__}. Nothing here ran on a GPU.",
        "",
        "Registers are per thread: the most that any warpgroup uses, of 255, and what the block is launched",
        "with, which the warpgroups then share out among themselves. Spills count both ways, per thread.",
        "HBM counts every byte that a call's kernels and XLA code read or write, each once; L2",
        "counts what all blocks load and store, the same bytes as often as they ask for them.",
        "",
        HEAD,
        "|" + "---|" * (HEAD.count("|") - 1),
    ]
    print("\n".join(lines), flush=True)
    for pass_name, programs in (("forward", forward_programs), ("backward", backward_programs)):
        for program in programs.PROGRAMS:
            hbm = sum(traffic.hbm_bytes(*programs.traced(program)).values())
            l2 = programs.l2_bytes(program)
            kernels = aot.compile_kernels(f"{programs.__name__}:build", **program.kwargs)
            for i, kernel in enumerate(kernels):
                name = f"{pass_name}: {program}" + f", kernel {i + 1} of {len(kernels)}" * (len(kernels) > 1)
                lines.append(row(name, program.described, kernel, hbm, l2))
                print(lines[-1], flush=True)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("# What the kernels take of an H100\n\n" + "\n".join(lines) + "\n")


def row(name: str, shape: str, kernel: aot.Kernel, *bytes_moved: int) -> str:
    cells = [
        name,
        shape,
        kernel.registers,
        kernel.launch_registers,
        kernel.spill_bytes,
        kernel.smem_bytes,
        "" if kernel.wgmma is None else kernel.wgmma,
        f"{kernel.blocks_per_sm}, {kernel.bound}",
        *(f"{count / 1e6:.0f}" for count in bytes_moved),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
