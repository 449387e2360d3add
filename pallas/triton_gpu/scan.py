r"""SSD scan on Ampere, Ada and Hopper in Triton: launches, pieces, and the custom gradient.

Residuals are the inputs alone. The backward pass repeats the forward walk and stores the state that enters
each chunk, runs the backward walk and stores the gradient of the state that leaves each chunk, and then
computes all chunks in parallel. These states live only during one layer's backward pass.

A walk is one program per head and 64 channels that loops over the chunks in order. If that is too few
programs to fill the GPU (few rows, few heads), rows are cut into pieces: all pieces are walked in parallel
from a zero state, a short recurrence in XLA joins their final states, and a second walk starts from these.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Struct
from mamba2_jax.pallas.batching import fold_vmap, refuse_checked_shard_map  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.problem import Problem  # pyright: ignore[reportMissingImports]
from mamba2_jax.pallas.triton_gpu import call as triton_call  # pyright: ignore[reportMissingImports]

DTYPES = ("bfloat16", "float16", "float32")
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))
MAX_HEAD_DIM, MAX_STATE_DIM = 128, 256
# Programs that fill a GPU: two per SM on an A100, L40 or H100 (108 to 144 SMs).
FULL = 256
SHARED = (2, 5)  # positions of A and D in the arguments, shared by all rows
MIN_PIECE_CHUNKS = 8  # a piece is walked twice; shorter ones would cost more than they gain


class Tiling(NamedTuple):
    """Tile sizes, chosen by compiling: at most 16 bytes of register spills for 16-bit x and N <= 128."""

    chunk: int  # tokens per chunk
    channels: int  # channels of a head per program of a walk
    states: int  # state channels per program of `backward_chunks`
    num_warps: int
    num_stages: int


def tiling(dtype: Any, head_dim: int, state_dim: int) -> Tiling:
    """Choose the tile sizes for a dtype and padded sizes."""
    wide = state_dim > 128 or jnp.dtype(dtype).itemsize > 2
    channels = min(head_dim, 32 if wide else 64)
    return Tiling(32, channels, min(state_dim, 32), 8, 1 if wide else 2)


def unsupported(problem: Problem) -> str | None:
    """Return why these kernels cannot run `problem`, or None if they can."""
    if problem.compute_capability not in CAPABILITIES:
        have = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        major, minor = problem.compute_capability or (0, 0)
        return f"it is built for compute capability {have}, this GPU has {major}.{minor}"
    if jnp.dtype(problem.dtype).name not in DTYPES:
        return f"x is {jnp.dtype(problem.dtype).name}, it takes {', '.join(DTYPES)}"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim={problem.head_dim}, it takes up to {MAX_HEAD_DIM}"
    if problem.state_dim > MAX_STATE_DIM:
        return f"state_dim={problem.state_dim}, it takes up to {MAX_STATE_DIM}"
    return triton_call.missing()


def ssd(x, dt, A, B, C, D, initial_state, segment_ids):
    """Run the SSD scan, with the arguments and results documented in `mamba2_jax.pallas`.

    Raises:
        NotImplementedError: called inside a `jax.shard_map` with `check_vma=True`.
    """
    refuse_checked_shard_map("triton", x, dt, A, B, C, D, initial_state, segment_ids)
    num_heads, head_dim = x.shape[2:]
    state_dim = B.shape[3]
    p, n = (max(16, 1 << (size - 1).bit_length()) for size in (head_dim, state_dim))  # tiles: powers of two
    D = jnp.zeros((num_heads, 1), jnp.float32) if D is None else D.reshape(num_heads, -1)
    D = jnp.broadcast_to(D, (num_heads, head_dim))
    x, D = _pad_last(x, p), _pad_last(D, p)
    B, C = _pad_last(B, n), _pad_last(C, n)
    initial_state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, p - head_dim), (0, n - state_dim)))
    y, state = _scan(x, dt, A, B, C, D, initial_state, segment_ids)
    return y[..., :head_dim], state[..., :head_dim, :state_dim]


def num_pieces(batch: int, programs_per_row: int, num_chunks: int) -> int:
    """Return the pieces per row: enough to fill the GPU, each of at least `MIN_PIECE_CHUNKS` chunks."""
    wanted = -(-FULL // (batch * programs_per_row))
    return max(1, min(wanted, num_chunks // MIN_PIECE_CHUNKS))


def _pad_last(array: jax.Array, size: int) -> jax.Array:
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])])


@jax.custom_vjp
def _scan(x, dt, A, B, C, D, initial_state, documents):
    return fold_vmap(_forward, SHARED)(x, dt, A, B, C, D, initial_state, documents)


def _scan_fwd(*inputs):
    return _scan(*inputs), inputs


def _scan_bwd(inputs, cotangents):
    dx, ddt, dA, dB, dC, dD, dinitial = fold_vmap(_backward, SHARED)(*inputs, *cotangents)
    return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), dinitial, None


_scan.defvjp(_scan_fwd, _scan_bwd)


class Scan(NamedTuple):
    """Inputs of one call, with tile sizes and pieces."""

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array
    documents: jax.Array | None
    tiles: Tiling
    num_pieces: int
    piece_chunks: int

    @property
    def num_chunks(self) -> int:
        """Number of chunks per row; the last one may be shorter."""
        return -(-self.x.shape[1] // self.tiles.chunk)

    @property
    def states_shape(self) -> tuple[int, ...]:
        """Shape `(b, h, p, n)` of one state per row and head."""
        return (self.x.shape[0], *self.x.shape[2:], self.B.shape[3])


def _plan(x, dt, A, B, C, D, documents) -> Scan:
    """Choose tile sizes and pieces; all pieces but the last have equally many chunks, and none is empty."""
    batch, length, num_heads, head_dim = x.shape
    tiles = tiling(x.dtype, head_dim, B.shape[3])
    num_chunks = -(-length // tiles.chunk)
    pieces = num_pieces(batch, num_heads * (head_dim // tiles.channels), num_chunks)
    piece_chunks = -(-num_chunks // pieces)
    return Scan(x, dt, A, B, C, D, documents, tiles, -(-num_chunks // piece_chunks), piece_chunks)


def _forward(x, dt, A, B, C, D, initial_state, documents):
    scan = _plan(x, dt, A, B, C, D, documents)
    starts, final = _piece_starts(scan, initial_state)
    y, ends, _ = _walk_forward(scan, starts, write_y=True)
    return y, ends[:, -1] if final is None else final


def _backward(x, dt, A, B, C, D, initial_state, documents, dy, dstate):
    scan = _plan(x, dt, A, B, C, D, documents)
    starts, _ = _piece_starts(scan, initial_state)
    *_, entering = _walk_forward(scan, starts, write_entering=True)
    ends, first = _piece_ends(scan, dy, dstate)
    dx, firsts, leaving = _walk_backward(scan, dy, ends, write_dx=True)
    dB, dC, ddt, dA, dD = _gradients_of_chunks(scan, dy, entering, leaving)
    first = firsts[:, 0] if first is None else first
    return dx, ddt.sum(0), dA.sum((0, 2)), dB, dC, dD.sum(1), first


def _piece_starts(scan: Scan, initial_state: jax.Array):
    """Return the state that enters each piece `(b, pieces, h, p, n)`, and the final state (None: unknown)."""
    if scan.num_pieces == 1:
        return initial_state[:, None], None
    zeros = jnp.zeros((initial_state.shape[0], scan.num_pieces, *initial_state.shape[1:]), jnp.float32)
    _, added, _ = _walk_forward(scan, zeros)
    return _join(initial_state, _piece_decays(scan), added, reverse=False)


def _piece_ends(scan: Scan, dy: jax.Array, dstate: jax.Array):
    """Return the gradient of the state that leaves each piece, and of the initial state (None: unknown)."""
    if scan.num_pieces == 1:
        return dstate[:, None], None
    zeros = jnp.zeros((dstate.shape[0], scan.num_pieces, *dstate.shape[1:]), jnp.float32)
    _, added, _ = _walk_backward(scan, dy, zeros)
    return _join(dstate, _piece_decays(scan), added, reverse=True)


def _piece_decays(scan: Scan) -> jax.Array:
    """Return the decay over each whole piece `(b, pieces, h)`; 0 if a document starts in the piece."""
    size = scan.piece_chunks * scan.tiles.chunk
    padding = scan.num_pieces * size - scan.dt.shape[1]
    dt = jnp.pad(scan.dt, ((0, 0), (0, padding), (0, 0)))
    dt = dt.reshape(dt.shape[0], scan.num_pieces, size, -1)
    decays = jnp.exp(dt.sum(2) * scan.A)
    if scan.documents is None:
        return decays
    documents = jnp.pad(scan.documents, ((0, 0), (0, padding)), mode="edge")
    last = documents.reshape(documents.shape[0], scan.num_pieces, size)[..., -1]
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return jnp.where((last == before)[..., None], decays, 0.0)


def _join(state: jax.Array, decays: jax.Array, added: jax.Array, *, reverse: bool):
    """Scan `state <- decay * state + added` over pieces; return the state before each piece, and the last."""

    def piece(state, inputs):
        decay, added = inputs
        return decay[..., None, None] * state + added, state

    over_pieces = (jnp.moveaxis(decays, 1, 0), jnp.moveaxis(added, 1, 0))
    last, before = jax.lax.scan(piece, state, over_pieces, reverse=reverse)
    return jnp.moveaxis(before, 0, 1), last


def _walk_forward(scan: Scan, starts: jax.Array, *, write_y: bool = False, write_entering: bool = False):
    """Launch `forward_walk`; return y, each piece's final state, and each chunk's entering state."""
    from mamba2_jax.pallas.triton_gpu import kernels as triton_kernels  # pyright: ignore[reportMissingImports]

    inputs = (scan.x, scan.dt, scan.A, scan.B, scan.C, scan.D, starts)
    outputs = _walk_outputs(scan, write_y, write_entering, starts)
    flags = {"WRITE_Y": write_y, "WRITE_ENTERING": write_entering}
    return _launch_walk(scan, triton_kernels.forward_walk, inputs, outputs, flags)


def _walk_backward(scan: Scan, dy: jax.Array, ends: jax.Array, *, write_dx: bool = False):
    """Launch `backward_walk`; return dx, and state gradients at each piece's start and each chunk's end."""
    from mamba2_jax.pallas.triton_gpu import kernels as triton_kernels  # pyright: ignore[reportMissingImports]

    inputs = (dy, scan.dt, scan.A, scan.B, scan.C, scan.D, ends)
    outputs = _walk_outputs(scan, write_dx, write_dx, ends)
    return _launch_walk(scan, triton_kernels.backward_walk, inputs, outputs, {"WRITE_DX": write_dx})


def _walk_outputs(scan: Scan, tokens: bool, chunks: bool, states: jax.Array) -> list[Struct]:
    """Return the output shapes of a walk; outputs that are not written have one element."""
    batch, *state = scan.states_shape
    per_chunk = (batch, scan.num_chunks, *state)
    return [
        Struct(scan.x.shape if tokens else (1,), scan.x.dtype),
        Struct(states.shape, jnp.float32),
        Struct(per_chunk if chunks else (1,), scan.x.dtype),
    ]


def _launch_walk(scan: Scan, kernel, inputs, outputs, flags):
    batch, num_heads, head_dim, _ = scan.states_shape
    documents = scan.dt if scan.documents is None else scan.documents  # a dummy, not read without SEGMENTS
    grid = (batch, num_heads * (head_dim // scan.tiles.channels), scan.num_pieces)
    scalars = (scan.x.shape[1], scan.piece_chunks)
    return triton_call.launch(
        kernel, (*inputs, documents, *scalars), outputs, grid, num_warps=scan.tiles.num_warps,
        num_stages=scan.tiles.num_stages, PIECES=scan.num_pieces, **_constants(scan), **flags,
    )  # fmt: skip


def _gradients_of_chunks(scan: Scan, dy: jax.Array, entering: jax.Array, leaving: jax.Array):
    """Launch `backward_chunks`; return dB, dC, and partial ddt, dA, dD for the caller to sum."""
    from mamba2_jax.pallas.triton_gpu import kernels as triton_kernels  # pyright: ignore[reportMissingImports]

    batch, length, num_heads, head_dim = scan.x.shape
    num_groups, state_dim = scan.B.shape[2:]
    num_blocks = state_dim // scan.tiles.states
    documents = scan.dt if scan.documents is None else scan.documents
    inputs = (scan.x, scan.dt, scan.A, scan.B, scan.C, dy, entering, leaving, documents, length)
    outputs = [
        Struct(scan.B.shape, scan.B.dtype),
        Struct(scan.C.shape, scan.C.dtype),
        Struct((num_blocks, batch, length, num_heads), jnp.float32),
        Struct((num_blocks, batch, scan.num_chunks, num_heads), jnp.float32),
        Struct((batch, scan.num_chunks, num_heads, head_dim), jnp.float32),
    ]
    return triton_call.launch(
        triton_kernels.backward_chunks, inputs, outputs, (batch, scan.num_chunks, num_groups * num_blocks),
        num_warps=scan.tiles.num_warps, num_stages=scan.tiles.num_stages, BN=scan.tiles.states,
        **_constants(scan),
    )  # fmt: skip


def _constants(scan: Scan) -> dict[str, Any]:
    _, num_heads, head_dim, state_dim = scan.states_shape
    return {
        "H": num_heads,
        "G": scan.B.shape[2],
        "P": head_dim,
        "N": state_dim,
        "Q": scan.tiles.chunk,
        "BP": scan.tiles.channels,
        "SEGMENTS": scan.documents is not None,
        # three TF32 products per float32 product: float32 accuracy on tensor cores
        "PRECISION": "tf32x3" if scan.x.dtype == jnp.float32 else "ieee",
    }
