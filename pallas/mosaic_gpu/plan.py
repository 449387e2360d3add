"""Plan a Mosaic GPU launch: how the problem is cut into thread blocks, pieces and pipeline stages.

Channels are independent, so the work is cut into strips of 64 channels of one head. A block walks two strips
of one group, which share B and C. In a group with an odd number of strips, the second warpgroup of the last
block duplicates the first one's walk and stores nothing.
"""

import dataclasses

import jax.numpy as jnp
from mamba2_jax.pallas.problem import Problem

CHUNK = 64  # tokens per iteration of a walk
STRIP = 64  # channels per warpgroup
STRIPS_PER_BLOCK = 2
MULTIPROCESSORS = 132  # of an H100 SXM and an H200
SMEM_LIMIT = 232448  # bytes of shared memory per block
MOST_STAGES = 4
MOST_PIECES = 5  # a sixth would save 3 %
# Cost of a chunk before the block's own piece, which only updates the state, relative to a full iteration.
# Estimated, not measured: 0.31 by shared-memory clocks, 0.5 by L2 traffic.
SKIP_COST = 0.4

HEAD_DIMS, STATE_DIMS, DTYPES = (64, 128), (64, 128, 256), ("bfloat16", "float16")
LEAST_HEAD_DIM = 32  # below, padding to 64 would more than double the work


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch of the forward kernel, or of the backward walk."""

    batch: int
    chunks: int
    heads: int
    groups: int
    head_dim: int
    state_dim: int
    stages: int
    piece_ends: tuple[int, ...]  # end of each piece, in chunks; the last is `chunks`

    @property
    def strips_per_head(self) -> int:
        """Strips per head: 1 or 2."""
        return self.head_dim // STRIP

    @property
    def strips(self) -> int:
        """Strips per batch row."""
        return self.heads * self.strips_per_head

    @property
    def strips_per_group(self) -> int:
        """Strips that share B and C."""
        return self.strips // self.groups

    @property
    def blocks_per_group(self) -> int:
        """Blocks per group; the last one has a single strip if the group's number of strips is odd."""
        return -(-self.strips_per_group // STRIPS_PER_BLOCK)

    @property
    def heads_per_block(self) -> int:
        """Heads whose strips a block walks."""
        return STRIPS_PER_BLOCK // self.strips_per_head

    @property
    def compute_registers(self) -> int:
        """Registers per computing thread; the three warpgroups' sum is the 3 * 168 a block starts with."""
        return 240 if self.state_dim == 256 else 232

    @property
    def copy_registers(self) -> int:
        """Registers per copying thread."""
        return 3 * 168 - STRIPS_PER_BLOCK * self.compute_registers

    @property
    def state_blocks(self) -> list[tuple[int, int]]:
        """Start and width of each column block in which a warpgroup holds and multiplies the state."""
        width = state_width(self.state_dim)
        return [(start, width) for start in range(0, self.state_dim, width)]


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """One launch of the backward kernel that processes all chunks independently."""

    chunks: int
    strips_per_group: int
    strips_per_head: int
    state_dim: int
    splits: int  # number of blocks that share the strips of a group

    @property
    def strips_per_split(self) -> int:
        """Strips that a block sums over; the last block of a group may have fewer."""
        return -(-self.strips_per_group // self.splits)

    @property
    def half(self) -> int:
        """State columns per computing warpgroup, two of which share a block."""
        return min(STRIP, self.state_dim // 2)

    @property
    def halves(self) -> int:
        """Number of `half`-wide column blocks of the state."""
        return self.state_dim // self.half

    @property
    def parts(self) -> int:
        """Blocks that share the columns of a wide state."""
        return self.state_dim // (2 * self.half)

    @property
    def stages(self) -> int:
        """Strips prefetched into shared memory."""
        return 3 if self.state_dim <= 128 else 2


def make_plan(
    batch: int,
    length: int,
    heads: int,
    groups: int,
    head_dim: int,
    state_dim: int,
    *,
    itemsize: int = 2,
    documents: bool = False,
    save_states: bool = False,
    pieces: int | None = None,
) -> Plan:
    """Plan a launch of the forward kernel.

    Args:
        itemsize: bytes per element of the compute dtype.
        documents: whether there are segment ids.
        save_states: whether to write the state that enters each chunk.
        pieces: number of pieces per row; None for the choice of `choose_pieces`.
    """
    chunks = -(-length // CHUNK)
    strips_per_group = heads // groups * (head_dim // STRIP)
    blocks = batch * groups * -(-strips_per_group // STRIPS_PER_BLOCK)
    ends = cut(chunks, choose_pieces(blocks, chunks) if pieces is None else pieces)
    stages = max(1, min(MOST_STAGES, fitting_stages(state_dim, itemsize, documents, save_states), ends[0]))
    return Plan(batch, chunks, heads, groups, head_dim, state_dim, stages, ends)


def state_width(state_dim: int) -> int:
    """Return the number of state columns that a warpgroup multiplies and stages at a time."""
    return 64 if state_dim > 128 else state_dim


def choose_pieces(blocks: int, chunks: int) -> int:
    """Return the number of pieces per row, so that few heads still occupy the whole GPU.

    A block fills an SM, and a walk is sequential. So the block of a later piece first walks the preceding
    chunks, updating only the state: duplicated work that pays off while SMs are idle. The rule: as many
    pieces as leave every block an SM of its own, at most 5, of at least two chunks on average.
    """
    return max(1, min(MULTIPROCESSORS // blocks, MOST_PIECES, chunks // 2))


def cut(chunks: int, pieces: int) -> tuple[int, ...]:
    """Return the end of each piece, in chunks, so that all cost the same: later pieces are shorter."""
    costs = [0.0]  # end of each piece, in lengths of the first
    for _ in range(pieces):
        costs.append(costs[-1] + 1 - SKIP_COST * costs[-1])
    ends = [0]
    for left, cost in zip(reversed(range(pieces)), costs[1:], strict=True):
        wanted = round(chunks * cost / costs[-1])
        ends.append(min(max(wanted, ends[-1] + 1), chunks - left))  # at least one chunk each
    return tuple(ends[1:])


def smem_bytes(state_dim: int, stages: int, itemsize: int, documents: bool, save_states: bool = False) -> int:
    """Return the bytes of shared memory of a block: per-stage buffers, single buffers and barriers."""
    strip = CHUNK * STRIP * itemsize
    decays = STRIPS_PER_BLOCK * CHUNK * 4
    stage = STRIPS_PER_BLOCK * strip + 2 * CHUNK * state_dim * itemsize + 3 * decays
    stage += 2 * CHUNK * 4 if documents else 0
    once = STRIPS_PER_BLOCK * (strip + CHUNK * CHUNK * itemsize) + 2 * decays
    once += STRIPS_PER_BLOCK * STRIP * state_width(state_dim) * itemsize if save_states else 0
    return stages * stage + once + 2 * 8 * stages  # and the barriers


def fitting_stages(state_dim: int, itemsize: int, documents: bool, save_states: bool = False) -> int:
    """Return the number of pipeline stages that fit into shared memory."""
    none, one = (smem_bytes(state_dim, stages, itemsize, documents, save_states) for stages in (0, 1))
    return (SMEM_LIMIT - 1024 - none) // (one - none)


def padded_head_dim(head_dim: int) -> int:
    """Return the head_dim that the kernels run `head_dim` with: the next of `HEAD_DIMS`."""
    return next(size for size in HEAD_DIMS if size >= head_dim)


def unsupported(problem: Problem) -> str | None:
    """Return why the kernel cannot run `problem`, or None if it can.

    Args:
        problem: checked for `compute_capability` ((9, 0) for an H100), `dtype`, `head_dim` and `state_dim`.
            Any batch, length, number of heads and groups, and any shape of D is supported.
    """
    if (reason := hopper_only(problem)) is not None:
        return reason
    dtype = jnp.dtype(problem.dtype).name
    if dtype not in DTYPES:
        return f"it computes in bfloat16 or float16, and x is {dtype}: cast x, B and C"
    if not LEAST_HEAD_DIM <= problem.head_dim <= HEAD_DIMS[-1]:
        return f"it takes a head_dim from {LEAST_HEAD_DIM} to {HEAD_DIMS[-1]}, not {problem.head_dim}"
    if problem.state_dim not in STATE_DIMS:
        return f"it takes a state_dim of 64, 128 or 256, not {problem.state_dim}"
    return None


def hopper_only(problem: Problem) -> str | None:
    """Return why the device cannot run kernels for Hopper, or None if it can."""
    if tuple(problem.compute_capability or ())[:1] == (9,):
        return None
    found = ".".join(map(str, problem.compute_capability or ("an unknown one",)))
    return f"it needs Hopper (compute capability 9.0), and this device has {found}"
