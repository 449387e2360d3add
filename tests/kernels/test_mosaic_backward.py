"""Gradients of the Mosaic GPU scan in the interpreter against the float64 recurrence; nothing races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip(
    "mamba2_jax.pallas.mosaic_gpu.bridge", reason="the kernels need jax >= 0.11.2", exc_type=ImportError
)
import interpreter
import seeding
from mamba2_jax.pallas import chunks
from mamba2_jax.pallas.mosaic_gpu import backward as mosaic_backward
from mamba2_jax.pallas.mosaic_gpu import backward_sums as mosaic_backward_sums
from mamba2_jax.pallas.mosaic_gpu import bridge
from mamba2_jax.pallas.mosaic_gpu import scan as mosaic_gpu
from test_mosaic_forward import TOLERANCE, arguments, check_values, kernel_case

from mamba2_jax.ops.scan.recurrent import ssd_recurrent

DIFFERENTIABLE = ("x", "dt", "A", "B", "C", "D", "initial_state")

# One block for all strips of a group, and for the whole row: so a small case fills every pipeline,
# and goes around. On a GPU, the rules for few blocks would cut these.
WHOLE = {"splits": 1, "pieces": 1}
CASES = [
    # (case, dtype, options); a tail, unless the name says otherwise
    (kernel_case("more strips than stages, odd heads", l=136, h=5, n=64), "float32", WHOLE),
    (
        kernel_case("more chunks than stages, packed", l=328, h=2, n=64, segments="packed"),
        "bfloat16",
        WHOLE,
    ),
    (kernel_case("state_dim 128", l=140, h=3), "bfloat16", WHOLE),
    (
        kernel_case(
            "head_dim 128, groups, any length, left padding", l=75, p=128, g=2, n=64, D="hp", segments="left"
        ),
        "float32",
        WHOLE,
    ),
    (kernel_case("state_dim 256, no D", l=70, h=2, n=256, D=None), "bfloat16", WHOLE),
    (kernel_case("a mixture of decays", l=136, h=1, n=64, mixture="wiped"), "bfloat16", WHOLE),
    (kernel_case("strong decay, cut", l=200, h=2, n=64, decay=60.0), "float32", {"splits": 2, "pieces": 2}),
]
SLOW_CASES = [
    (kernel_case("a wild mixture of decays", l=136, h=1, n=64, mixture="wild"), "bfloat16", WHOLE),
    (kernel_case("left padding, rows", b=2, l=75, h=1, n=64, segments="left"), "float32", {}),
    (kernel_case("nine chunks, packed", l=520, h=3, segments="packed", D="hp"), "float32", WHOLE),
    (kernel_case("eight strips", l=328, h=8), "bfloat16", WHOLE),
    (kernel_case("whole chunks", l=256, h=2), "float32", {}),
    (kernel_case("float16", l=328, D=None), "float16", WHOLE),
    (
        kernel_case("head_dim 128, state_dim 256, packed", l=150, p=128, n=256, segments="packed"),
        "float32",
        WHOLE,
    ),
    (kernel_case("rows, groups, repeating ids", b=2, h=6, g=2, segments="repeating"), "bfloat16", WHOLE),
    (kernel_case("right padding", b=2, segments="right"), "bfloat16", WHOLE),
    (kernel_case("all padding", b=2, l=75, n=64, segments="none"), "float32", {}),
    (kernel_case("packed, strong decay", l=328, segments="packed", decay=60.0), "float32", WHOLE),
    (kernel_case("strong decay, bfloat16", l=328, decay=60.0), "bfloat16", {}),
    (kernel_case("shorter than a chunk", l=11, n=64), "bfloat16", {}),
    (kernel_case("one token", l=1, h=1, n=64), "float32", {}),
    (
        kernel_case("packed, three pieces", l=400, h=2, n=64, segments="packed"),
        "bfloat16",
        {"splits": 2, "pieces": 3},
    ),
]
SMOKE = {"state_dim 128"}
PARAMETERS = [
    pytest.param(*case, id=str(case[0]), marks=[pytest.mark.smoke] * (str(case[0]) in SMOKE))
    for case in CASES
] + [pytest.param(*case, id=str(case[0]), marks=pytest.mark.slow) for case in SLOW_CASES]


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def draw_case(case, dtype):
    """Arguments, those of them that have gradients, and cotangents of y and the final state."""
    inputs = arguments(case, dtype)
    leaves = {name: inputs[name] for name in DIFFERENTIABLE if inputs[name] is not None}
    keys = jax.random.split(jax.random.key(1))
    cotangents = (
        jax.random.normal(keys[0], inputs["x"].shape, inputs["x"].dtype),
        jax.random.normal(keys[1], inputs["initial_state"].shape),
    )
    return inputs, leaves, cotangents


def gradients(ssd, inputs, leaves, cotangents):
    def run(leaves):
        D = leaves.get("D")
        x, dt, A, B, C, state = (leaves[k] for k in ("x", "dt", "A", "B", "C", "initial_state"))
        return ssd(x, dt, A, B, C, D, state, inputs["segment_ids"])

    _, vjp = jax.vjp(run, leaves)
    return vjp(cotangents)[0]


def exact_gradients(inputs, leaves, cotangents):
    with jax.enable_x64(True):
        leaves, cotangents = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a.astype(jnp.float32), np.float64)), (leaves, cotangents)
        )
        return jax.jit(lambda *arrays: gradients(ssd_recurrent, inputs, *arrays))(leaves, cotangents)


def kernel_gradients(inputs, leaves, cotangents):
    def run(interpret):
        ssd = lambda *arrays: mosaic_gpu.ssd(*arrays, interpret=interpret)  # noqa: E731
        return gradients(ssd, inputs, leaves, cotangents)

    return interpreter.run(run)


def backward_arguments(inputs, leaves, cotangents):
    """Arguments of the backward pass alone, with states as the recurrence leaves them after each prefix."""
    del leaves
    ids, states = inputs["segment_ids"], [inputs["initial_state"]]
    for length in range(64, inputs["x"].shape[1], 64):
        prefix = [inputs[k][:, :length] if k in ("x", "dt", "B", "C") else inputs[k] for k in DIFFERENTIABLE]
        prefix = [None if a is None else a.astype(jnp.float32) for a in prefix]
        states.append(ssd_recurrent(*prefix, None if ids is None else ids[:, :length])[1])
    saved = jnp.stack(states, axis=1).astype(inputs["x"].dtype)
    return *(inputs[k] for k in ("x", "dt", "A", "B", "C", "D")), saved, ids, *cotangents


@pytest.mark.parametrize(("case", "dtype", "options"), PARAMETERS)
def test_every_gradient_equals_the_float64_recurrence(case, dtype, options):
    drawn = draw_case(case, dtype)
    inputs, leaves, _ = drawn
    if case.decay > 1:  # far below the smallest float32, in every chunk
        assert (inputs["dt"] * inputs["A"])[:, :64].sum(1).max() < -110
    got = interpreter.run(mosaic_backward.backward, *backward_arguments(*drawn), **options)
    got = got._replace(A=got.A.sum(0), D=got.D.sum(0) if case.D == "hp" else got.D.sum((0, 2)))
    want = exact_gradients(*drawn)
    for name in leaves:
        assert error(getattr(got, name), want[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            kernel_case("joint", l=75, h=1, n=64, segments="packed"), "bfloat16", marks=pytest.mark.smoke
        ),
        pytest.param(
            kernel_case("joint, D per channel", l=330, p=128, D="hp"), "float32", marks=pytest.mark.slow
        ),
        pytest.param(
            kernel_case("joint, no D", b=2, l=75, D=None, segments="right"), "float32", marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_the_scan_is_differentiable(case, dtype):
    drawn = draw_case(case, dtype)
    inputs, leaves, _ = drawn
    got, want = kernel_gradients(*drawn), exact_gradients(*drawn)
    for name, leaf in leaves.items():
        assert got[name].dtype == leaf.dtype, name
        assert error(got[name], want[name]) < TOLERANCE[dtype], name
    if case.segments and case.D is None:  # padding leaves the state alone, and nothing of it leaves
        assert not np.asarray(got["x"], np.float32)[np.asarray(inputs["segment_ids"]) == 0].any()


@pytest.mark.parametrize(
    ("head_dim", "D"), [pytest.param(80, "hp", marks=pytest.mark.smoke), (32, "h")], ids=["80", "32"]
)
def test_a_head_dim_between_is_exact(head_dim, D):
    """What the heads are padded with shows in no value, state or gradient."""
    case = kernel_case(f"head_dim {head_dim}", l=75, h=2, p=head_dim, n=64, D=D, segments="packed")
    drawn = draw_case(case, "bfloat16")
    inputs, leaves, _ = drawn
    check_values(inputs, "bfloat16", *interpreter.run(mosaic_gpu.ssd, **inputs))
    got, want = kernel_gradients(*drawn), exact_gradients(*drawn)
    for name, leaf in leaves.items():
        assert (got[name].dtype, got[name].shape) == (leaf.dtype, leaf.shape), name
        assert error(got[name], want[name]) < TOLERANCE["bfloat16"], name


@pytest.mark.slow
def test_splits_and_pieces_change_nothing_but_rounding():
    args = backward_arguments(*draw_case(kernel_case("cut", l=136, h=3, n=64, segments="packed"), "bfloat16"))
    whole = interpreter.run(mosaic_backward.backward, *args, **WHOLE)
    cut = interpreter.run(mosaic_backward.backward, *args, splits=2, pieces=2)
    for name, a, b in zip(whole._fields, whole, cut, strict=True):
        if name in ("B", "C"):  # float32 sums of two parts, rounded once, against one sum, rounded once
            assert error(b, a) < 5e-3, name
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize(
    ("problem", "splits"),
    [
        ({"batch": 1, "length": 4096, "groups": 8, "strips_per_group": 16, "state_dim": 128}, 1),
        ({"batch": 1, "length": 2048, "groups": 1, "strips_per_group": 24, "state_dim": 128}, 4),
        ({"batch": 1, "length": 2048, "groups": 1, "strips_per_group": 24, "state_dim": 256}, 2),
        ({"batch": 1, "length": 64, "groups": 1, "strips_per_group": 24, "state_dim": 64}, 24),
        ({"batch": 1, "length": 1000, "groups": 1, "strips_per_group": 10, "state_dim": 128}, 5),
        ({"batch": 1, "length": 1, "groups": 1, "strips_per_group": 1, "state_dim": 64}, 1),
    ],
)
def test_strips_are_split_while_multiprocessors_stand_idle(problem, splits):
    assert mosaic_backward.choose_splits(**problem) == splits
    per_split = -(-problem["strips_per_group"] // splits)
    assert (splits - 1) * per_split < problem["strips_per_group"]  # none is empty


SMALL = kernel_case("small", l=70, h=1, n=64)


def small_loss(leaves, segment_ids=None, interpret=None):
    interpret = interpret or bridge.interpreter()
    arrays = (leaves[k] for k in ("x", "dt", "A", "B", "C", "D", "initial_state"))
    y, state = mosaic_gpu.ssd(*arrays, segment_ids, interpret=interpret)
    return jnp.square(y).sum() + jnp.square(state).sum()


@pytest.mark.slow
def test_jit_scan_and_vmap_agree_with_the_plain_gradient():
    _, leaves, _ = draw_case(SMALL, "float32")
    ids = jnp.ones((1, 70), jnp.int32).at[:, 40:].set(2)
    want = jax.grad(small_loss)(leaves, ids)

    in_scan = jax.jit(
        jax.grad(lambda v: jax.lax.scan(lambda s, _: (s + small_loss(v, ids), None), 0.0, None, 2)[0])
    )
    for name, gradient in in_scan(leaves).items():
        assert error(gradient, 2 * np.asarray(want[name], np.float64)) < 1e-6, name

    def rows(shared):
        each = {k: jnp.stack([v, 2 * v]) for k, v in leaves.items() if k not in ("A", "D")}
        return jax.vmap(lambda each: small_loss({**shared, **each}, ids))(each)

    mapped = jax.grad(lambda shared: rows(shared)[0])({"A": leaves["A"], "D": leaves["D"]})
    for name, gradient in mapped.items():
        assert error(gradient, want[name]) < 1e-6, name

    both = jax.vmap(lambda A: jax.grad(small_loss)({**leaves, "A": A}, ids))(jnp.stack([leaves["A"]] * 2))
    for name, gradient in both.items():
        assert error(gradient[1], want[name]) < 1e-6, name


def small_loss_in_a_shard_map(**options):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    loss = lambda leaves: small_loss(leaves)[None]  # noqa: E731
    return jax.shard_map(loss, mesh=mesh, in_specs=(rows,), out_specs=rows, **options)


def test_inside_a_checked_shard_map_it_says_what_to_do():
    _, leaves, _ = draw_case(SMALL, "float32")
    with pytest.raises(NotImplementedError, match="check_vma=False"):
        jax.eval_shape(small_loss_in_a_shard_map(), leaves)


def test_inside_an_unchecked_shard_map_the_gradients_are_the_same():
    _, leaves, _ = draw_case(SMALL, "float32")
    loss = small_loss_in_a_shard_map(check_vma=False)
    got = jax.jit(jax.grad(lambda leaves: loss(leaves)[0]))(leaves)
    for name, gradient in jax.grad(small_loss)(leaves).items():
        assert error(got[name], gradient) < 1e-6, name


SEEDED = kernel_case("seeded", l=200, h=5, n=64)  # five strips, three stages


@pytest.mark.parametrize(
    ("missing", "caller"),
    [
        ("barrier_wait", "strip"),  # a strip is used before it has arrived
        ("commit_smem", "release"),  # a slot is filled again while plain loads read it
        ("wait_smem_to_gmem", "step"),  # dx is overwritten on its way out
    ],
)
def test_a_missing_wait_or_commit_is_found(missing, caller):
    args = backward_arguments(*draw_case(SEEDED, "bfloat16"))
    with seeding.without(missing, caller), pytest.raises(interpreter.Found, match="a race|a barrier"):
        interpreter.run(mosaic_backward.backward, *args, **WHOLE)


def test_a_missing_barrier_between_warpgroups_is_found(monkeypatch):
    """By the race detector, or else by the values."""
    monkeypatch.setattr(mosaic_backward_sums, "meet", lambda smem: None)
    drawn = draw_case(SEEDED, "bfloat16")
    try:
        got = interpreter.run(mosaic_backward.backward, *backward_arguments(*drawn), **WHOLE)
    except interpreter.Found:
        return
    assert error(got.B, exact_gradients(*drawn)["B"]) > TOLERANCE["bfloat16"]


def test_a_document_end_off_by_one_shows_in_the_values(monkeypatch):
    ends = chunks.document_ends
    monkeypatch.setattr(chunks, "document_ends", lambda *args: ends(*args) + 1)
    drawn = draw_case(kernel_case("seeded", l=70, h=1, n=64, segments="packed"), "bfloat16")
    got = interpreter.run(mosaic_backward.backward, *backward_arguments(*drawn))
    want = exact_gradients(*drawn)
    assert error(got.x, want["x"]) > TOLERANCE["bfloat16"]
    assert error(got.B, want["B"]) > TOLERANCE["bfloat16"]
