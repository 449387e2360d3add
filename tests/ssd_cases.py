"""Define the cases that every implementation of the scan must pass, and draw their inputs."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    name: str
    b: int = 2
    l: int = 37
    h: int = 4
    p: int = 8
    g: int = 2
    n: int = 16
    D: str | None = "h"
    initial_state: bool = True
    segments: str | None = None
    decay: float = 1.0  # scales dt*A
    mixture: str | None = None  # "wiped" or "wild": fast and slow decays; sets dt and A
    chunk_size: int = 16

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain", D=None, initial_state=False),
    Case("one token", l=1),
    Case("two tokens", l=2),
    Case("whole chunks", l=32),
    Case("one over", l=33, g=1),
    Case("shorter than a chunk", l=11, g=4),
    Case("D per channel", D="hp"),
    Case("one head, wide state", h=1, g=1, n=64, p=16),
    Case("chunk of one", l=5, chunk_size=1),
    Case("strong decay", decay=60.0, l=48, chunk_size=48),
    Case("packed", segments="packed", l=50),
    Case("packed, repeating ids", segments="repeating", l=50),
    Case("left padding", segments="left"),
    Case("right padding", segments="right"),
    Case("all padding", segments="none"),
    Case("packed, strong decay", segments="packed", decay=60.0, l=50, chunk_size=32),
]


STEP_CASES = [
    Case("plain", D=None),
    Case("one group", g=1),
    Case("a group for each head", g=4),
    Case("D per channel", D="hp"),
    Case("odd sizes", b=3, h=6, p=5, g=3, n=7),
    Case("strong decay", decay=60.0),
    Case("a row that does not count", segments="none"),
]


def draw(case: Case, seed: int = 0, dtype=jnp.float32) -> dict:
    """Draw random inputs of a case; dt*A is about `-0.4 * decay` per token."""
    keys = jax.random.split(jax.random.key(seed), 8)
    b, l, h, p, g, n = case.b, case.l, case.h, case.p, case.g, case.n
    inputs = {
        "x": jax.random.normal(keys[0], (b, l, h, p), dtype),
        "dt": jax.nn.softplus(jax.random.normal(keys[1], (b, l, h), jnp.float32) - 2.0),
        "A": -case.decay * jax.random.uniform(keys[2], (h,), jnp.float32, 1.0, 4.0),
        "B": jax.random.normal(keys[3], (b, l, g, n), dtype),
        "C": jax.random.normal(keys[4], (b, l, g, n), dtype),
    }
    if case.mixture:
        inputs |= steps(case, seed)
    if case.D:
        inputs["D"] = jax.random.normal(keys[5], (h,) if case.D == "h" else (h, p), jnp.float32)
    if case.initial_state:
        inputs["initial_state"] = jax.random.normal(keys[6], (b, h, p, n), jnp.float32)
    if case.segments:
        inputs["segment_ids"] = jnp.asarray(segment_ids(case.segments, b, l))
    return inputs


def draw_token(case: Case, seed: int = 0, dtype=jnp.float32) -> dict:
    """Draw one token of a case, as arguments of `ops.ssd_step`, with dt = 0 at padding."""
    inputs = draw(replace(case, l=1), seed, dtype)
    if case.segments:
        inputs["dt"] = jnp.where(inputs["segment_ids"][..., None] != 0, inputs["dt"], 0.0)
    token = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C")}
    token |= {"A": inputs["A"], "state": inputs["initial_state"]}
    return token | ({"D": inputs["D"]} if case.D else {})


# Mixtures of decays: tokens that wipe the state beside slow ones.
MIXTURES = [
    Case("wiped", mixture="wiped", b=1, l=270),
    Case("wild", mixture="wild", b=1, l=270),
    Case("wiped, packed", mixture="wiped", l=270, segments="packed"),
]


def steps(case: Case, seed: int) -> dict:
    """Return dt `(b, l, h)` and A `(h,)` of a mixture."""
    shape = (case.b, case.l, case.h)
    if case.mixture == "wiped":
        dt = np.full(shape, 1e-3)
        dt[:, 7::8] = 20
        A = np.full(case.h, -16)
    else:
        assert case.mixture == "wild"
        dt = 10 ** np.random.default_rng(seed).uniform(-3, 4, shape)
        A = np.full(case.h, -4096)
    return {"dt": jnp.asarray(dt, jnp.float32), "A": jnp.asarray(A, jnp.float32)}


def degenerate(case: Case) -> dict:
    """Draw inputs with A of -inf, -3e38, -1 and -0, dt of 0 and of 10000, and some x of 0."""
    inputs = draw(case)
    heads, tokens = np.arange(case.h), np.arange(case.l)
    inputs["A"] = jnp.asarray(np.array([-np.inf, -3e38, -1.0, -0.0])[heads % 4], jnp.float32)
    dt = np.where(tokens % 3 == 0, 0, np.where(tokens % 5 == 0, 1e4, 0.01))
    inputs["dt"] = jnp.broadcast_to(jnp.asarray(dt, jnp.float32)[None, :, None], inputs["dt"].shape)
    inputs["x"] = inputs["x"].at[:, ::7].set(0)
    return inputs


# Axes, by result, over which `own_error` takes the norm.
OWN = {"y": -1, "x": -1, "B": -1, "C": -1, "state": (-2, -1), "initial_state": (-2, -1)}


def own_error(name: str, got, want) -> float:
    """Return the largest error norm of a token (or state, or head), relative to its own norm."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all(), name
    off, size = (np.linalg.norm(a[..., None] if name not in OWN else a, axis=OWN.get(name, -1))
                 for a in (got - want, want))  # fmt: skip
    return (off / np.maximum(size, 1e-30)).max()


def segment_ids(kind: str, b: int, l: int) -> np.ndarray:
    """Return segment ids `(b, l)` of one kind, with different boundaries in every row."""
    ids = np.zeros((b, l), np.int32)
    for row in range(b):
        cut = l // 3 + 5 * row
        if kind == "packed":  # 1 1 1 2 2 3 0 0, the first cut inside a chunk
            ids[row, :cut], ids[row, cut : cut + 7], ids[row, cut + 7 : l - 4] = 1, 2, 3
        elif kind == "repeating":  # an id repeated after padding starts another document
            ids[row, :cut], ids[row, cut : cut + 6], ids[row, cut + 9 :] = 5, 2, 2
        elif kind == "left":
            ids[row, 3 + 4 * row :] = 1
        elif kind == "right":
            ids[row, : l - 3 - 4 * row] = 1
        elif kind == "none" and row:
            ids[row, :] = 1  # row 0 is all padding
    return ids
