"""The backward's configurations that are compiled ahead of time, and what each may cost."""

import dataclasses

import jax
import jax.numpy as jnp
import program
from forward_programs import SHAPES
from jax.sharding import PartitionSpec
from mamba2_jax.pallas.mosaic_gpu import backward as mosaic_backward
from mamba2_jax.pallas.mosaic_gpu import plan as mosaic_plan
from mamba2_jax.pallas.mosaic_gpu import scan as mosaic_gpu

# Bytes that a thread stores and loads in local memory: words stored before a loop and loaded once in each
# step. At state_dim 256 the gradient of the state takes 128 of a thread's 240 registers.
NARROW, WIDE = 112, 160


@dataclasses.dataclass(frozen=True)
class Program(program.Program):
    """A shape and its options. Two kernels: the walk, then the chunks."""

    spill_budget: int = dataclasses.field(default=NARROW, kw_only=True)  # bytes a thread stores and loads

    @property
    def budget(self) -> int:
        """Bytes that a thread may spill with the jax that runs."""
        return self.spill_budget + (NEXT_JAX if jax.__version_info__ >= (0, 12) else 0)


# jax 0.12 hands the compiler the same kernel in another order, for which it misses up to 14 words more.
NEXT_JAX = 64
PROGRAMS = [
    Program("A", **SHAPES["A"], smoke=True),
    Program("A, documents", **SHAPES["A"], documents=True),
    Program("B", **SHAPES["B"]),
    Program("B, documents", **SHAPES["B"], documents=True, slow=True),
    Program("C", **SHAPES["C"], slow=True),
    Program("head_dim 128", p=128, h=64, D="hp", slow=True),
    Program(
        "head_dim 128, state_dim 64, few blocks",
        l=520,
        p=128,
        n=64,
        h=8,
        g=1,
        D="hp",
        slow=True,
    ),
    Program("head_dim 128, state_dim 256", p=128, n=256, h=16, g=1, D="hp", spill_budget=WIDE, slow=True),
    Program("state_dim 64", n=64, D=None, slow=True),
    Program("state_dim 256", n=256, h=32, g=1, spill_budget=WIDE),
    Program("state_dim 256, documents", n=256, h=32, g=1, documents=True, spill_budget=WIDE, slow=True),
    Program("float16, odd heads, any length", l=4001, h=24, g=8, dtype="float16", slow=True),
]


def arguments(abstract, b, l, h, g, p, n, dtype, D, documents):
    """What `mosaic_gpu.ssd` takes."""
    d_shape = {"h": (h,), "hp": (h, p), None: None}[D]
    return (
        abstract((b, l, h, p), dtype),
        abstract((b, l, h), jnp.float32),
        abstract((h,), jnp.float32),
        abstract((b, l, g, n), dtype),
        abstract((b, l, g, n), dtype),
        d_shape and abstract(d_shape, jnp.float32),
        abstract((b, h, p, n), jnp.float32),
        abstract((b, l), jnp.int32) if documents else None,
    )


def build(abstract, **kwargs):
    """The backward pass as a function of arrays, and its arguments."""
    x, dt, A, B, C, D, state, ids = arguments(abstract, **kwargs)
    batch, heads, *matrix = state.shape
    saved = abstract((batch, -(-x.shape[1] // 64), heads, *matrix), kwargs["dtype"])
    return mosaic_backward.backward, (x, dt, A, B, C, D, saved, ids, x, state)


def traced(program):
    """The backward as a function of arrays only, followed by their shapes."""
    function, shapes = build(jax.ShapeDtypeStruct, **program.kwargs)

    def call(*arrays):
        arrays = iter(arrays)
        return function(*(None if shape is None else next(arrays) for shape in shapes))

    return call, *(shape for shape in shapes if shape is not None)


def l2_bytes(program) -> int:
    """Count the bytes that all blocks of both kernels load and store, most of them more than once."""
    b, l, h, g, p, n = (getattr(program, field) for field in "blhgpn")
    chunk, strip = mosaic_plan.CHUNK, mosaic_plan.STRIP
    chunks, strips, states = -(-l // chunk), h * p // strip, 2 * b * h * p * n
    tile, rows = 2 * chunk * strip, 2 * chunk * n  # dy or x of a strip, B or C of a group
    documents = program.documents * 2 * 4 * chunk

    per_group = -(-strips // g // 2)  # blocks of the walk, two strips each
    ends = mosaic_plan.cut(chunks, mosaic_plan.choose_pieces(b * g * per_group, chunks))
    loaded = 2 * rows + 2 * (tile + 3 * 4 * chunk) + documents
    walk = b * g * per_group * (sum(ends) * loaded + chunks * 2 * tile)
    walk += chunks * states + (len(ends) + 1) * 2 * states

    parts, splits = max(1, n // 128), mosaic_backward.choose_splits(b, l, g, strips // g, n)
    for_strip = 2 * tile + 2 * tile * (n // parts) // strip  # x and dy, the states at both ends
    for_strip += 4 * chunk * (2 + 1 + 6)  # decays, and the vectors
    sums = 2 * rows // parts * (1 if splits == 1 else 2)  # dB and dC
    return walk + b * parts * chunks * (strips * for_strip + g * splits * (2 * rows + documents + sums))


def build_step(abstract, **kwargs):
    """A gradient as a training step takes it: rematerialised layers in a scan, the rows of each mapped."""

    def layer(x, dt, A, B, C, D, state, ids):
        def row(*arrays):
            x, dt, B, C, state, ids = jax.tree.map(lambda array: array[None], arrays)
            return jax.tree.map(lambda array: array[0], mosaic_gpu.ssd(x, dt, A, B, C, D, state, ids))

        return jax.vmap(row)(x, dt, B, C, state, ids)

    def loss(x, *rest):
        x, states = jax.lax.scan(lambda x, _: jax.checkpoint(layer)(x, *rest), x, None, length=2)
        return x.astype(jnp.float32).sum() + states.sum()

    return jax.grad(loss, argnums=tuple(range(7))), arguments(abstract, **kwargs)


def build_sharded(abstract, **kwargs):
    """The same of one layer, its batch split over two devices."""
    shapes = arguments(abstract, **kwargs)
    rows, shared = PartitionSpec("device"), PartitionSpec()
    specs = (rows, rows, shared, rows, rows, shared, rows)

    def loss(*arrays):
        ssd = jax.shard_map(
            lambda *arrays: mosaic_gpu.ssd(*arrays, None),
            mesh=shapes[0].sharding.mesh,
            in_specs=specs,
            out_specs=(rows, rows),
            check_vma=False,
        )
        y, states = ssd(*arrays)
        return y.astype(jnp.float32).sum() + states.sum()

    return jax.grad(loss, argnums=tuple(range(7))), shapes[:7]


build_sharded.devices = 2
