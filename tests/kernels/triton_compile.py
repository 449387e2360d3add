"""Compile a Triton kernel for a GPU that is not here, and read what it takes off the binary.

Run as a script, a process per GPU: LLVM and ptxas abort rather than raise.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

F32 = {"dt_ptr", "A_ptr", "D_ptr", "state_ptr", "gradient_ptr", "final_ptr", "first_ptr"}
F32 |= {"ddt_ptr", "dA_ptr", "dD_ptr"}
NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SHAPE = {"H": 80, "G": 1}
# dtype, head_dim, state_dim, documents; the first is the one that most models have
CONFIGURATIONS = [
    ("bfloat16", 64, 128, True),
    ("bfloat16", 64, 128, False),
    ("bfloat16", 64, 256, True),
    ("float16", 128, 64, False),
    ("float32", 64, 128, False),
    ("bfloat16", 128, 128, True),
    ("bfloat16", 128, 256, True),
]


def launches(dtype: str, head_dim: int, state_dim: int, documents: bool):
    """Return the kernels of a forward and a backward pass, with their constants."""
    from mamba2_jax.pallas.triton_gpu import kernels as triton_kernels
    from mamba2_jax.pallas.triton_gpu import scan as triton_gpu

    tiles = triton_gpu.tiling(dtype, head_dim, state_dim)
    constants = {
        **SHAPE,
        "P": head_dim,
        "N": state_dim,
        "Q": tiles.chunk,
        "BP": tiles.channels,
        "SEGMENTS": documents,
        "PRECISION": "tf32x3" if dtype == "float32" else "ieee",
    }
    walk = {**constants, "PIECES": 1}
    forward, backward = triton_kernels.forward_walk, triton_kernels.backward_walk
    yield "forward", forward, {**walk, "WRITE_Y": True, "WRITE_ENTERING": False}, tiles
    yield "states", forward, {**walk, "WRITE_Y": False, "WRITE_ENTERING": True}, tiles
    yield "backward", backward, {**walk, "WRITE_DX": True}, tiles
    yield "chunks", triton_kernels.backward_chunks, {**constants, "BN": tiles.states}, tiles


def compile_kernel(kernel, dtype: str, constants: dict, tiles, capability: int) -> dict:
    """Return registers, bytes of stack (spills) and of shared memory, and the number of atomics."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name):
        if name in constants:
            return "constexpr"
        if not name.endswith("_ptr"):
            return "i32"
        if name == "doc_ptr":
            return "*i32"
        return "*fp32" if name in F32 else "*" + NAMES[dtype]

    signature = {name: kind(name) for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    atomics = len(re.findall(r"\b(?:atom|red)\.", compiled.asm["ptx"]))
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared, "atomics": atomics}


def main() -> None:
    """Print a line of JSON per kernel for the capability and configuration in the arguments."""
    capability, index = int(sys.argv[1]), int(sys.argv[2])
    configuration = CONFIGURATIONS[index]
    for name, kernel, constants, tiles in launches(*configuration):
        found = compile_kernel(kernel, configuration[0], constants, tiles, capability)
        print(json.dumps({"kernel": name, **found}), flush=True)


if __name__ == "__main__":
    main()
