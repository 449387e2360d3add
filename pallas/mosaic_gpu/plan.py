"""How the Mosaic GPU forward cuts a problem into blocks, pieces and stages: plain numbers.

A head's channels never mix, so the work is cut into strips of 64 channels of one head. A block walks two
strips of one group, which share B and C. Where a group has an odd number of strips, the second warpgroup of
its last block repeats the first one's walk and stores nothing.
"""

import dataclasses

import jax.numpy as jnp
from mamba2_jax.pallas.problem import Problem

CHUNK = 64  # tokens a step
STRIP = 64  # channels, one warpgroup
STRIPS_PER_BLOCK = 2
MULTIPROCESSORS = 132  # of an H100 SXM and an H200
SMEM_LIMIT = 232448  # bytes a block can have
MOST_STAGES = 4
MOST_PIECES = 5  # a sixth would save 3 per cent
# A chunk before a block's own piece only updates the state, at this part of the cost of a full step.
# Estimated, not measured: 0.31 by clocks of shared memory, 0.5 by bytes through L2.
SKIP_COST = 0.4

HEAD_DIMS, STATE_DIMS, DTYPES = (64, 128), (64, 128, 256), ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One launch of the forward kernel, or of the backward one that walks a row from its end."""

    batch: int
    chunks: int
    heads: int
    groups: int
    head_dim: int
    state_dim: int
    stages: int
    piece_ends: tuple[int, ...]  # in chunks; the last is `chunks`

    @property
    def strips_per_head(self) -> int:
        """Strips in a head: 1 or 2."""
        return self.head_dim // STRIP

    @property
    def strips(self) -> int:
        """Strips in a row of the batch."""
        return self.heads * self.strips_per_head

    @property
    def strips_per_group(self) -> int:
        """Strips that share B and C."""
        return self.strips // self.groups

    @property
    def blocks_per_group(self) -> int:
        """Blocks for the strips of a group, the last one perhaps with one strip only."""
        return -(-self.strips_per_group // STRIPS_PER_BLOCK)

    @property
    def heads_per_block(self) -> int:
        """Heads whose strips a block walks."""
        return STRIPS_PER_BLOCK // self.strips_per_head

    @property
    def compute_registers(self) -> int:
        """Registers of a thread that computes; with the other two, 3 * 168, what a block starts with."""
        return 240 if self.state_dim == 256 else 232

    @property
    def copy_registers(self) -> int:
        """Registers of a thread that copies."""
        return 3 * 168 - STRIPS_PER_BLOCK * self.compute_registers

    @property
    def state_blocks(self) -> list[tuple[int, int]]:
        """Start and width of the column blocks in which a warpgroup holds and multiplies the state."""
        width = state_width(self.state_dim)
        return [(start, width) for start in range(0, self.state_dim, width)]


@dataclasses.dataclass(frozen=True)
class ChunkPlan:
    """One launch of the backward kernel that takes each chunk for itself."""

    chunks: int
    strips_per_group: int
    strips_per_head: int
    state_dim: int
    splits: int  # parts that the strips of a group are cut into, each a block's

    @property
    def strips_per_split(self) -> int:
        """Strips that a block sums over, the last one of a group perhaps fewer."""
        return -(-self.strips_per_group // self.splits)

    @property
    def half(self) -> int:
        """Columns of the state that each of a block's two computing warpgroups takes."""
        return min(STRIP, self.state_dim // 2)

    @property
    def halves(self) -> int:
        """How often `half` goes into the state's columns."""
        return self.state_dim // self.half

    @property
    def parts(self) -> int:
        """Blocks that share the columns of a wide state."""
        return self.state_dim // (2 * self.half)

    @property
    def stages(self) -> int:
        """Strips in shared memory."""
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
    """Plan a launch.

    Args:
        itemsize: bytes of the compute dtype.
        documents: whether there are segment ids.
        save_states: whether the state before every chunk is written.
        pieces: how often to cut the sequence; None for the rule of `choose_pieces`.
    """
    chunks = -(-length // CHUNK)
    strips_per_group = heads // groups * (head_dim // STRIP)
    blocks = batch * groups * -(-strips_per_group // STRIPS_PER_BLOCK)
    ends = cut(chunks, choose_pieces(blocks, chunks) if pieces is None else pieces)
    stages = max(1, min(MOST_STAGES, fitting_stages(state_dim, itemsize, documents, save_states), ends[0]))
    return Plan(batch, chunks, heads, groups, head_dim, state_dim, stages, ends)


def state_width(state_dim: int) -> int:
    """Return the columns of a state that a warpgroup multiplies, and stages in shared memory, at a time."""
    return 64 if state_dim > 128 else state_dim


def choose_pieces(blocks: int, chunks: int) -> int:
    """Return into how many pieces to cut the sequence, so that few heads keep a whole GPU busy.

    A block fills an SM, and a walk takes its chunks one after the other. So a later piece walks the chunks
    before it too, updating the state only: work done twice, and worth it while an SM stands idle. The rule:
    as many pieces as leave every block an SM of its own, at most 5, of at least two chunks on average.
    """
    return max(1, min(MULTIPROCESSORS // blocks, MOST_PIECES, chunks // 2))


def cut(chunks: int, pieces: int) -> tuple[int, ...]:
    """Return where each piece ends, in chunks, all pieces at the same cost: later ones are shorter."""
    costs = [0.0]  # where each piece would end, in units of the first
    for _ in range(pieces):
        costs.append(costs[-1] + 1 - SKIP_COST * costs[-1])
    ends = [0]
    for left, cost in zip(reversed(range(pieces)), costs[1:], strict=True):
        wanted = round(chunks * cost / costs[-1])
        ends.append(min(max(wanted, ends[-1] + 1), chunks - left))  # a chunk for each piece, at least
    return tuple(ends[1:])


def smem_bytes(state_dim: int, stages: int, itemsize: int, documents: bool, save_states: bool = False) -> int:
    """Return the shared memory of a block: what each stage holds, and what there is once."""
    strip = CHUNK * STRIP * itemsize
    decays = STRIPS_PER_BLOCK * CHUNK * 4
    stage = STRIPS_PER_BLOCK * strip + 2 * CHUNK * state_dim * itemsize + 3 * decays
    stage += 2 * CHUNK * 4 if documents else 0
    once = STRIPS_PER_BLOCK * (strip + CHUNK * CHUNK * itemsize) + 2 * decays
    once += STRIPS_PER_BLOCK * STRIP * state_width(state_dim) * itemsize if save_states else 0
    return stages * stage + once + 2 * 8 * stages  # and the barriers


def fitting_stages(state_dim: int, itemsize: int, documents: bool, save_states: bool = False) -> int:
    """Return how many stages shared memory has room for."""
    none, one = (smem_bytes(state_dim, stages, itemsize, documents, save_states) for stages in (0, 1))
    return (SMEM_LIMIT - 1024 - none) // (one - none)


def unsupported(problem: Problem) -> str | None:
    """Return why the kernel cannot run a problem, or None if it can.

    Args:
        problem: has `compute_capability` ((9, 0) for an H100), `dtype`, `head_dim` and `state_dim`. Any
            batch, length, number of heads and groups will do, and any kind of D.
    """
    if tuple(problem.compute_capability or ())[:1] != (9,):
        found = ".".join(map(str, problem.compute_capability or ("an unknown one",)))
        return f"it needs Hopper (compute capability 9.0), and this device has {found}"
    dtype = jnp.dtype(problem.dtype).name
    if dtype not in DTYPES:
        return f"it computes in bfloat16 or float16, and x is {dtype}: cast x, B and C"
    if problem.head_dim not in HEAD_DIMS:
        return f"it takes a head_dim of 64 or 128, not {problem.head_dim}"
    if problem.state_dim not in STATE_DIMS:
        return f"it takes a state_dim of 64, 128 or 256, not {problem.state_dim}"
    return None
