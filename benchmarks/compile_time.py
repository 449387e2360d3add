"""Time to trace, lower and compile, cold: prefill and decode loop of a model, and blocks in a loop or a scan.

    python benchmarks/compile_time.py            # some minutes; writes benchmarks/results/compile_time.md

Seconds of processor time, which other programs on the machine change little; on idle cores XLA takes less of
the clock, as it generates code on all of them. Widths are small: they change run time, not compile time.
"""

import argparse
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax import Mamba2Block, Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.generation.loop import decode, prefill
from mamba2_jax.generation.sampling import Sampler

WIDTH, TOKENS = 256, 16
RESULTS = pathlib.Path(__file__).parent / "results" / "compile_time.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 64])
    parser.add_argument("--gradient", action="store_true", help="compile the blocks' gradients too")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    lines = [
        *("# Compile time on a CPU, with a cold cache", ""),
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start; "
        f"Python {platform.python_version()}, JAX {jax.__version__}; bfloat16, width {WIDTH}.",
        *("`python benchmarks/compile_time.py`; seconds of processor time.", ""),
        *("| what | layers | trace | lower | XLA | in all |", "|---|---|---|---|---|---|"),
    ]
    for layers in arguments.layers:
        lines += list(of_a_model(layers))
        lines += list(of_blocks(layers, gradient=arguments.gradient))
    arguments.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def of_a_model(layers: int) -> Iterator[str]:
    """Measure what `stream` compiles before its first token."""
    config = Mamba2Config.preset("mamba2-130m").replace(
        num_hidden_layers=layers, hidden_size=WIDTH, num_heads=8, d_ssm=2 * WIDTH
    )
    kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = nnx.eval_shape(lambda: Mamba2ForCausalLM(config, **kinds, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
    sampler = Sampler()
    sizes = {"size": TOKENS, "piece": TOKENS, "capacity": 0, "pad": 0}

    def read(model, ids, mask):
        return prefill(model, ids, mask, None, sampler, **sizes)

    def write(model, state, budget):
        return decode(model, state, sampler, None, budget, eos=(0,), pad=0)

    state = jax.eval_shape(read, model, ids, ids)
    jax.clear_caches()
    yield row("prefill", layers, read, model, ids, ids)
    yield row("decode loop", layers, write, model, state, jax.ShapeDtypeStruct((), jnp.int32))


def of_blocks(layers: int, gradient: bool) -> Iterator[str]:
    """Measure `Mamba2Block`s in a Python loop, and stacked in an `nnx.scan`."""
    sizes = {"state_size": 64, "head_dim": 64}

    @nnx.split_rngs(splits=layers)
    @nnx.vmap
    def create(rngs):
        return Mamba2Block(WIDTH, **sizes, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def scanned(block, hidden):
        return block(hidden)

    def looped(blocks, hidden):
        for block in blocks:
            hidden = block(hidden)
        return hidden

    def several():
        return nnx.List([Mamba2Block(WIDTH, **sizes, rngs=nnx.Rngs(0)) for _ in range(layers)])

    hidden = jax.ShapeDtypeStruct((1, 512, WIDTH), jnp.float32)
    for name, run, make in (
        ("in a loop", looped, several),
        ("in a scan", scanned, lambda: create(nnx.Rngs(0))),
    ):
        graph, state = nnx.split(nnx.eval_shape(make))

        def forward(state, hidden, run=run, graph=graph):
            return run(nnx.merge(graph, state), hidden)

        yield row(f"blocks {name}", layers, forward, state, hidden)
        if gradient:
            backward = jax.grad(lambda state, hidden, forward=forward: forward(state, hidden).sum())
            yield row(f"blocks {name}, gradient", layers, backward, state, hidden)


def row(what: str, layers: int, function: Callable, *arguments) -> str:
    """Format one row of the table."""
    times = [time.process_time()]
    traced = jax.jit(function).trace(*arguments)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    lowered.compile()
    times.append(time.process_time())
    seconds = [after - before for before, after in zip(times, times[1:], strict=False)]
    return f"| {what} | {layers} | {' | '.join(f'{one:.2f}' for one in (*seconds, times[-1] - times[0]))} |"


if __name__ == "__main__":
    main()
