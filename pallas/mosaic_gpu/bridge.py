"""The words the Mosaic GPU kernels are written in, and what moved between jax 0.11.2 and 0.12.

A kernel is one function, run by every warpgroup (128 threads) of a block. Its matrices live in registers,
in the layout that the tensor cores of Hopper read and write (WGMMA), or in shared memory, as tiles that TMA
and the tensor cores both take. Only this module knows layouts, tilings and versions of jax.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

if jax.__version_info__ < (0, 11, 2):  # the first that has what the kernels use
    raise ImportError(f"the Mosaic GPU kernels need jax >= 0.11.2, and this is jax {jax.__version__}")

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # its names move from release to release, and a type checker sees only one

MATRIX = plgpu.Layout.WGMMA
ONE_PER_ROW = MATRIX.reduce(1)  # a vector over the rows of a matrix
ONE_PER_COLUMN = MATRIX.reduce(0)


def kernel(
    body: Callable,
    *,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    warpgroups: int = 1,
    interpret: Any = None,
) -> Callable:
    """Make `body(*inputs, *outputs, **scratch)` a function of arrays, run by every block of the grid.

    Args:
        body: reads its place from `lax.axis_index`: the names of `grid`, and `"warpgroup"` if it has several.
        outputs: shapes and dtypes of the arrays it writes.
        scratch: shared memory and barriers, by the name under which `body` takes them.
        grid: name and size of each axis; the last one varies fastest.
        warpgroups: how many run `body` at once in a block.
        interpret: None on a GPU, or what `interpreter` returned.
    """
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


def interpreter() -> Any:
    """Return what runs a kernel on the CPU: race detection on, memory poisoned with NaN until written.

    jax 0.12 can raise at a race; 0.11.2 prints it and goes on. Here both go on, and whoever asked looks.
    """
    options = {"detect_races": True, "on_race": "warn"}
    known = inspect.signature(plgpu.InterpretGPUParams).parameters
    return plgpu.InterpretGPUParams(**{name: value for name, value in options.items() if name in known})


def tiles(*shape: int, dtype: Any, width: int | None = None) -> Any:
    """Shared memory for matrices `(..., rows, columns)`, in tiles that TMA and the tensor cores agree on.

    A tile is as wide as the swizzle allows, or `width` columns: a slice of columns must begin at a tile, and
    the operands of a product must agree on the width.
    """
    bytes_per_item = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle((width or shape[-1]) * bytes_per_item * 8)
    transforms = (plgpu.TilingTransform((8, swizzle // bytes_per_item)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref: Any) -> Any:
    """View a matrix in shared memory with rows and columns exchanged; nothing moves."""
    return ref.transpose((1, 0))


def load(ref: Any, layout: Any = MATRIX) -> jax.Array:
    """Bring shared memory into registers: a matrix, or a vector `ONE_PER_ROW` or `ONE_PER_COLUMN`."""
    return plgpu.load(ref, layout=layout)


def load_from_hbm(ref: Any, layout: Any = MATRIX) -> jax.Array:
    """Bring an array straight from HBM into registers. Uncoalesced: for what is read once per block."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store_to_hbm(ref: Any, values: jax.Array) -> None:
    """Write registers straight to HBM. Uncoalesced: for what is written once in a long while.

    jax 0.12 refuses a plain store whose threads do not fill whole sectors of 32 bytes; 0.11.2 has no other.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


def zeros(rows: int, columns: int) -> jax.Array:
    """A float32 matrix of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), MATRIX)


def per_row(vector: jax.Array, columns: int) -> jax.Array:
    """Repeat a `ONE_PER_ROW` vector over the columns: `out[i, j] = vector[i]`."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0]), MATRIX)


def per_column(vector: jax.Array, rows: int) -> jax.Array:
    """Repeat a `ONE_PER_COLUMN` vector over the rows: `out[i, j] = vector[j]`."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1]), MATRIX)


def positions(length: int, layout: Any) -> jax.Array:
    """`0, 1, 2, ...` as a vector in registers."""
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout)


def row_and_column(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Two int32 matrices in registers: the row and the column of every element."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (rows, columns), axis, layout=MATRIX) for axis in (0, 1))
    return row, column


def product(
    a: Any, b: Any, start: jax.Array | None = None, *, spill: Any = None, interpreted: bool = False
) -> jax.Array:
    """`start + a @ b` on the tensor cores, float32, complete on return.

    The interpreter has neither a left operand in registers nor an accumulator that starts from a value.
    There, and only there, `a` goes through shared memory and `start` is added afterwards.

    Args:
        a: (m, k) in shared memory, or in registers if the compute dtype has 16 bits.
        b: (k, n) in shared memory.
        start: (m, n) float32 in registers.
        spill: shared memory (m, k) or wider for the interpreter's copy of an `a` in registers.
        interpreted: whether the interpreter runs this kernel.
    """
    in_registers = isinstance(a, jax.Array)
    if in_registers and interpreted:
        a, values = spill.at[:, pl.ds(0, a.shape[1])], a
        a[...] = values
        plgpu.commit_smem()
    if start is not None and not interpreted:
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(start))

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    result = pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
    return result if start is None else start + result


def in_flight(
    sums: Iterable[Any],
    use: Callable,
    *,
    apart: bool = False,
    spill: Any = None,
    interpreted: bool = False,
) -> Any:
    """Start sums of products, and return what `use` makes of them while the tensor cores are at work.

    Args:
        sums: for each, operands `[(a, b), ...]`, as in `product`, and what it starts from, or None.
        use: takes for each sum, in their order, a function that waits for it and returns it.
        apart: whether to wait for each sum before the next one is started, and for all before `use`: where
            registers are too few for what goes on meanwhile.
        spill: as in `product`.
        interpreted: as in `product`.
    """
    if apart or interpreted:
        values = []
        for operands, value in sums:
            for a, b in operands:
                value = product(a, b, value, spill=spill, interpreted=interpreted)
            values.append(value)
        return use(*(functools.partial(lambda value: value, value) for value in values))

    sums = list(sums)

    def run(*accumulators):
        for accumulator, (operands, start) in zip(accumulators, sums, strict=True):
            if start is not None:
                accumulator[...] = start
            for a, b in operands:
                plgpu.wgmma(accumulator, a, b)
        later = [sum(len(operands) for operands, _ in sums[i + 1 :]) for i in range(len(sums))]
        return use(*map(functools.partial, [_wait] * len(sums), accumulators, later))

    shapes = [(operands[0][0].shape[0], operands[0][1].shape[1]) for operands, _ in sums]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def all_of(*sums: Callable) -> tuple[jax.Array, ...]:
    """Wait for all; what `in_flight` does when there is nothing to do meanwhile."""
    return tuple(wait() for wait in sums)


def _wait(accumulator: Any, later: int) -> jax.Array:
    """Return a sum once no more products are under way than the `later` ones, which were started after it."""
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=later)
