"""The forward kernel's configurations that are compiled ahead of time, and what each may cost."""

import dataclasses

import jax
import jax.numpy as jnp
import program
from mamba2_jax.pallas.mosaic_gpu import forward as mosaic_forward
from mamba2_jax.pallas.mosaic_gpu import plan as mosaic_plan

# Bytes that a thread stores and loads in local memory: constants, stored before the walk and loaded once in a
# chunk of 64 tokens. At state_dim 256 the state alone takes 128 of a thread's 240 registers.
NARROW, WIDE = 64, 128


@dataclasses.dataclass(frozen=True)
class Program(program.Program):
    """A shape and its options."""

    save_states: bool = False
    pieces: int | None = None
    spill_budget: int = dataclasses.field(default=NARROW, kw_only=True)  # bytes a thread stores and loads

    @property
    def options(self) -> list[str]:
        """Further options in words."""
        return ["saved states" * self.save_states, "one piece" * (self.pieces == 1)]


SHAPES = {
    "A": {"b": 1, "l": 4096, "h": 128, "g": 8},  # a layer of Codestral
    "B": {"b": 8, "l": 2048, "h": 80, "g": 1},  # a layer of the 2.7b
    "C": {"b": 1, "l": 131072, "h": 80, "g": 1},
}
PROGRAMS = [
    Program("A", **SHAPES["A"], smoke=True),
    Program("A, one piece", **SHAPES["A"], pieces=1),
    Program("A, training", **SHAPES["A"], documents=True, save_states=True, smoke=True),
    Program("B", **SHAPES["B"]),
    Program("B, training", **SHAPES["B"], documents=True, save_states=True),
    Program("C", **SHAPES["C"]),
    Program("130m, training", b=8, l=2048, h=24, g=1, documents=True, save_states=True, slow=True),
    Program("130m, one long row", l=65536, h=24, g=1, slow=True),
    Program("C, documents", **SHAPES["C"], documents=True, slow=True),
    Program("head_dim 128", p=128, h=64, D="hp", documents=True),
    Program("head_dim 128, state_dim 64", p=128, n=64, h=64, D="hp", save_states=True),
    Program("head_dim 128, state_dim 256", p=128, n=256, h=16, g=1, D="hp", spill_budget=WIDE, slow=True),
    Program("state_dim 64", n=64, D=None),
    Program("state_dim 256", n=256, h=32, g=1, pieces=1, spill_budget=WIDE),
    Program("state_dim 256, training", n=256, h=32, g=1, documents=True, save_states=True, spill_budget=WIDE),
    Program(
        "state_dim 256, training, one piece",
        n=256,
        h=32,
        g=1,
        documents=True,
        save_states=True,
        pieces=1,
        spill_budget=WIDE,
        slow=True,
    ),
    Program("float16, odd heads, any length", l=4001, h=24, g=8, dtype="float16"),
    Program("one head, one token", l=1, h=1, g=1, slow=True),
]


def build(abstract, b, l, h, g, p, n, dtype, D, documents, save_states, pieces):
    """The forward as a function of arrays, and its arguments."""
    float32 = jnp.float32
    d_shape = {"h": (h,), "hp": (h, p), None: None}[D]
    arguments = (
        abstract((b, l, h, p), dtype),
        abstract((b, l, h), float32),
        abstract((h,), float32),
        abstract((b, l, g, n), dtype),
        abstract((b, l, g, n), dtype),
        d_shape and abstract(d_shape, float32),
        abstract((b, h, p, n), float32),
        abstract((b, l), jnp.int32) if documents else None,
    )

    def forward(*arrays):
        return mosaic_forward.forward(*arrays, save_states=save_states, pieces=pieces)

    return forward, arguments


def build_starved(abstract, **kwargs):
    """Build the forward with too few registers to compute in: what the checks of a compile must find."""
    mosaic_plan.Plan.compute_registers = property(lambda _: 168)
    return build(abstract, **kwargs)


def traced(program):
    """The forward as a function of arrays only, followed by their shapes."""
    function, arguments = build(jax.ShapeDtypeStruct, **program.kwargs)

    def call(*arrays):
        arrays = iter(arrays)
        return function(*(None if argument is None else next(arrays) for argument in arguments))

    return call, *(argument for argument in arguments if argument is not None)


def l2_bytes(program) -> int:
    """Count the bytes that all blocks together load and store, most of them more than once."""
    plan = mosaic_plan.make_plan(
        *(program.b, program.l, program.h, program.g, program.p, program.n),
        documents=program.documents,
        save_states=program.save_states,
        pieces=program.pieces,
    )
    chunk = mosaic_plan.CHUNK
    tile, decays = chunk * mosaic_plan.STRIP * 2, plan.heads_per_block * chunk * 4
    passed_by = chunk * program.n * 2 + 2 * tile + 2 * decays + program.documents * 2 * chunk * 4
    own = passed_by + chunk * program.n * 2 + decays + 2 * tile  # and C, the log decays again, and y
    starts = (0, *plan.piece_ends[:-1])
    per_block = sum(
        start * passed_by + (end - start) * own for start, end in zip(starts, plan.piece_ends, strict=True)
    )
    states = program.b * program.h * program.p * program.n * 4 * (len(starts) + 1)
    saved = program.save_states * program.b * -(-program.l // 64) * program.h * program.p * program.n * 2
    return program.b * program.g * plan.blocks_per_group * per_block + states + saved
