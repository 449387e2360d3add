"""Wrap the Mosaic GPU primitives that the kernels use, for both the API of jax 0.11.2 and that of 0.12.

A kernel is one function, run by every warpgroup (128 threads) of a block. Its matrices are in registers, in
the WGMMA layout of Hopper's tensor cores, or in shared memory, as tiles that both TMA and the tensor cores
accept. Only this module depends on layouts, tilings and versions of jax.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

if jax.__version_info__ < (0, 11, 2):  # the first release with all APIs used here
    raise ImportError(f"the Mosaic GPU kernels need jax >= 0.11.2, and this is jax {jax.__version__}")

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # its names change between releases, and a type checker sees only one

MATRIX = plgpu.Layout.WGMMA
ONE_PER_ROW = MATRIX.reduce(1)  # a vector over the rows of a matrix
ONE_PER_COLUMN = MATRIX.reduce(0)
# A matrix whose rows are contiguous in HBM: 16 lanes load 256 bytes of a row of float32. Rows are a multiple
# of 8, columns of 64.
ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (2, 64), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
ONE_OF_ROWS = ROWS.reduce(1)
ONE_OF_COLUMNS = ROWS.reduce(0)


def kernel(
    body: Callable,
    *,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    scratch: Mapping[str, Any],
    grid: Mapping[str, int],
    warpgroups: int = 1,
    interpret: Any = None,
) -> Callable:
    """Turn `body(*inputs, *outputs, **scratch)`, run by every block of the grid, into a function of arrays.

    Args:
        body: reads its grid indices by `lax.axis_index` of the names in `grid`, and of `"warpgroup"` if there
            are several.
        outputs: shapes and dtypes of the arrays that `body` writes.
        scratch: shared memory and barriers, by keyword of `body`.
        grid: name and size of each axis; the last one varies fastest.
        warpgroups: number of warpgroups per block; each runs `body`.
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


def call_in_place(
    run: Callable, inputs: Iterable[jax.Array], updated: Iterable[jax.Array], outputs: Iterable[Any]
) -> list[jax.Array]:
    """Call a `kernel` of `(*inputs, *updated)`, which writes into the arrays `updated` in place.

    XLA copies an array first only if something else still reads its old value. The references live in a
    `run_state` of their own: around a bare one, `jax.custom_jvp` has no rule.

    Args:
        run: what `kernel` returned.
        inputs: arrays that the kernel only reads.
        updated: arrays that it also writes.
        outputs: as of `kernel`.

    Returns:
        The outputs, then the new values of `updated`.
    """
    inputs, updated = list(inputs), list(updated)
    results = [jnp.zeros(output.shape, output.dtype) for output in outputs]  # replaced, never computed

    def body(refs):
        values = run(*inputs, *refs[len(results) :])
        for ref, value in zip(refs[: len(results)], values, strict=True):
            ref[...] = value

    return list(pl.run_state(body)((*results, *updated)))


def interpreter() -> Any:
    """Return parameters to interpret a kernel on the CPU, with race detection and NaN in unwritten memory.

    jax 0.12 can raise at a race; 0.11.2 only prints it. Here both only report, and the caller must check.
    """
    options = {"detect_races": True, "on_race": "warn"}
    known = inspect.signature(plgpu.InterpretGPUParams).parameters
    return plgpu.InterpretGPUParams(**{name: value for name, value in options.items() if name in known})


def tiles(*shape: int, dtype: Any, width: int | None = None) -> Any:
    """Declare shared memory for matrices `(..., rows, columns)`, in tiles that TMA and tensor cores accept.

    A tile is as wide as the swizzle allows, or `width` columns. A slice of columns must start at a tile
    boundary, and both operands of a product must have the same tile width.
    """
    bytes_per_item = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle((width or shape[-1]) * bytes_per_item * 8)
    transforms = (plgpu.TilingTransform((8, swizzle // bytes_per_item)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref: Any) -> Any:
    """Return a transposed view of a matrix in shared memory, without a copy."""
    return ref.transpose((1, 0))


def load(ref: Any, layout: Any = MATRIX) -> jax.Array:
    """Load a matrix, or a vector `ONE_PER_ROW` or `ONE_PER_COLUMN`, from shared memory into registers."""
    return plgpu.load(ref, layout=layout)


def load_from_hbm(ref: Any, layout: Any = MATRIX) -> jax.Array:
    """Load an array directly from HBM into registers. Uncoalesced: only for arrays read once per block."""
    return plgpu.load(ref, layout=layout, optimized=False)


def load_line(ref: Any) -> jax.Array:
    """Load a contiguous vector, of a multiple of 128 elements, directly from HBM into registers."""
    vector = 1 if ref.shape[0] % 256 else 2
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED(ref.shape, vec_size=vector), optimized=False)


def store_to_hbm(ref: Any, values: jax.Array) -> None:
    """Store registers directly to HBM. Uncoalesced: only for arrays written rarely.

    jax 0.12 rejects a plain store whose threads do not fill whole 32-byte sectors; 0.11.2 has no other.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


def zeros(rows: int, columns: int) -> jax.Array:
    """Return a float32 matrix of zeros in registers."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), MATRIX)


def per_row(vector: jax.Array, columns: int) -> jax.Array:
    """Broadcast a `ONE_PER_ROW` vector over the columns: `out[i, j] = vector[i]`."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0]), MATRIX)


def per_column(vector: jax.Array, rows: int) -> jax.Array:
    """Broadcast a `ONE_PER_COLUMN` vector over the rows: `out[i, j] = vector[j]`."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1]), MATRIX)


def over_columns(vector: jax.Array, columns: int) -> jax.Array:
    """Broadcast a `ONE_OF_ROWS` vector over the columns: `out[i, j] = vector[i]`."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0]), ROWS)


def over_rows(vector: jax.Array, rows: int) -> jax.Array:
    """Broadcast a `ONE_OF_COLUMNS` vector over the rows: `out[i, j] = vector[j]`."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1]), ROWS)


def full_vector(value: float, length: int) -> jax.Array:
    """Return a constant float32 `ONE_OF_ROWS` vector."""
    return plgpu.layout_cast(jnp.full((length,), value, jnp.float32), ONE_OF_ROWS)


def positions(length: int, layout: Any) -> jax.Array:
    """Return `0, 1, 2, ...` as an int32 vector in registers."""
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout)


def row_and_column(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Return two int32 matrices in registers: row index and column index of every element."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (rows, columns), axis, layout=MATRIX) for axis in (0, 1))
    return row, column


def product(
    a: Any, b: Any, start: jax.Array | None = None, *, spill: Any = None, interpreted: bool = False
) -> jax.Array:
    """Compute `start + a @ b` on the tensor cores in float32, and wait for the result.

    The interpreter supports neither a left operand in registers nor an initialized accumulator. Under the
    interpreter only, `a` is copied to shared memory and `start` is added afterwards.

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
    """Issue sums of products asynchronously, and call `use` while the tensor cores compute them.

    Args:
        sums: per sum, its operands `[(a, b), ...]`, as in `product`, and its initial value or None.
        use: called with one function per sum, in order, that waits for the sum and returns it.
        apart: whether to wait for each sum before issuing the next, and for all before `use`: needed where
            registers do not suffice for the overlap.
        spill: as in `product`.
        interpreted: as in `product`.

    Returns:
        The result of `use`.
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
    """Wait for all sums; a `use` of `in_flight` without other work."""
    return tuple(wait() for wait in sums)


def _wait(accumulator: Any, later: int) -> jax.Array:
    """Wait until only the `later` products, issued after this sum, are pending, and return the sum."""
    return plgpu.wgmma_accumulator_load(accumulator, wait_n=later)
