"""Test forward mode and Hessian-vector products for every dtype, remat policy and device.

Three checks: `jvp`, `linearize` and `jacfwd` against inner products with the gradient; Hessian-vector
products by forward over reverse against reverse over reverse; and, in float64, both against finite
differences.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_jax_model
from ssd_cases import Case, draw

from mamba2_jax import Mamba2Config, ops
from mamba2_jax.ops.linear import linear, vocabulary_logits
from mamba2_jax.training import loss_fn, split_model
from mamba2_jax.training.loss import REMAT

# float32: rounding of sums. Half precision: rounding of operands and cotangents, which differ between forward
# and reverse mode (2**-9 for bfloat16, 2**-12 for float16).
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
# Against float32: about ten roundings of operands and cotangents on the way, each by half of the dtype's eps.
ROUNDED = {dtype: 5 * float(jnp.finfo(dtype).eps) for dtype in ("bfloat16", "float16")}
CPU_ROOMS = ("ops.bilinear", "ops.on_cpu.gradients", "ops.on_cpu.products", "training.on_cpu")


@pytest.fixture(params=["cpu", "elsewhere"])
def device(request, monkeypatch):
    """Run the CPU's code paths, or other devices', whose half precision is only lowered for a GPU."""
    if request.param == "elsewhere":
        pretend_elsewhere(monkeypatch)
    return request.param


@pytest.fixture(autouse=True)
def nothing_traced_before():
    """Clear JAX's caches, which would reuse traces of the other device's code paths."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def pretend_elsewhere(monkeypatch):
    for room in CPU_ROOMS:
        monkeypatch.setattr(f"mamba2_jax.{room}.platform", lambda: "gpu")


def inner(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    full = jnp.promote_types(jnp.float32, jax.tree.leaves(a)[0].dtype)
    return sum(jnp.vdot(x.astype(full), y.astype(full)) for x, y in pairs)


def norm(tree):
    return jnp.sqrt(inner(tree, tree))


def random_like(tree, seed=0):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [
            (jnp.sqrt(jnp.mean(leaf**2)) * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
    )


def derivatives(loss):
    """Jit four directional derivatives and two Hessian-vector products, along gradient plus random vector."""

    def everything(at):
        gradient = jax.grad(loss)(at)
        along = jax.tree.map(jnp.add, gradient, random_like(gradient))
        moved = lambda step: loss(jax.tree.map(lambda a, v: a + step.astype(a.dtype) * v, at, along))  # noqa: E731
        slopes = {
            "reverse": inner(gradient, along),
            "jvp": jax.jvp(loss, (at,), (along,))[1],
            "linearize": jax.linearize(loss, at)[1](along),
            "jacfwd": jax.jacfwd(moved)(jnp.zeros(())),
        }
        forward = jax.jvp(jax.grad(loss), (at,), (along,))[1]
        reverse = jax.grad(lambda at: inner(jax.grad(loss)(at), along))(at)
        return slopes, forward, reverse, gradient, along

    # XLA's optimizations take most of the time of these tests and are not what they test.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(everything, compiler_options=options)


def check(loss, at, dtype, device="cpu"):
    if device == "elsewhere" and dtype != "float32":  # XLA on a CPU lacks some of these products
        lowered = derivatives(loss).trace(at).lower(lowering_platforms=("cuda",))
        assert "stablehlo.dot_general" in lowered.as_text() or "stablehlo.cosine" in lowered.as_text()
        return
    tolerance = TOLERANCE[dtype]
    slopes, forward, reverse, gradient, along = derivatives(loss)(at)
    scale = float(norm(gradient) * norm(along))
    assert scale > 0
    for mode, slope in slopes.items():
        assert abs(float(slope - slopes["reverse"])) < tolerance * scale, (mode, slopes)
    difference = jax.tree.map(jnp.subtract, forward, reverse)
    assert float(norm(forward)) > 0
    assert float(norm(difference)) < 3 * tolerance * float(norm(forward))


def scan_loss(inputs, dtype, weights):
    def loss(arrays):
        x, B, C = (arrays[name].astype(dtype) for name in "xBC")
        arrays = {**arrays, "x": x, "B": B, "C": C}
        y, state = ops.ssd(
            **arrays, segment_ids=inputs.get("segment_ids"), chunk_size=8, implementation="xla"
        )
        return (jnp.sin(y) * weights.astype(y.dtype)).astype(state.dtype).sum() + jnp.sin(state).sum()

    return loss


def scan_inputs(**case):
    inputs = draw(Case("derivatives", b=1, l=19, h=2, p=4, g=1, n=4, **case))
    arrays = {name: array for name, array in inputs.items() if name != "segment_ids"}
    return inputs, arrays, np.random.default_rng(0).normal(size=inputs["x"].shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_scan(dtype, device):
    inputs, arrays, weights = scan_inputs(segments="packed")
    check(scan_loss(inputs, dtype, jnp.asarray(weights, jnp.float32)), arrays, dtype, device)


def conv_loss(x_dtype, weights):
    def loss(arrays):
        x, weight, bias, state = arrays
        y, final = ops.causal_conv1d(x.astype(x_dtype), weight, bias, initial_state=state.astype(x_dtype))
        full = jnp.promote_types(x.dtype, jnp.float32)
        return (jnp.sin(y.astype(full)) * weights).sum() + jnp.sin(final.astype(full)).sum()

    return loss


def conv_arrays(dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in ((2, 9, 6), (4, 6), (6,), (2, 3, 6))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_convolution(dtype, device):
    weights = np.random.default_rng(1).normal(size=(2, 9, 6)).astype("float32")
    check(conv_loss(dtype, weights), conv_arrays("float32"), dtype, device)


def product_loss(product, dtype):
    return lambda arrays: jnp.sin(product(arrays[0].astype(dtype), arrays[1], dtype=dtype)).sum()


PRODUCTS = [(linear, (8, 5)), (linear, (8, 2, 3)), (vocabulary_logits, (11, 8))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("product", "shape"), PRODUCTS, ids=["matrix", "pair", "logits"])
def test_products_with_weights(product, shape, dtype, device):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=size) / 3, jnp.float32) for size in ((2, 6, 8), shape)]
    check(product_loss(product, dtype), arrays, dtype, device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", REMAT)
def test_the_loss_of_a_model_on_a_cpu(remat, dtype):
    check_loss(remat, dtype, "cpu")


@pytest.mark.parametrize(("remat", "dtype"), [("block", "float32"), ("dots", "bfloat16")])
def test_the_loss_of_a_model_elsewhere(remat, dtype, monkeypatch):
    pretend_elsewhere(monkeypatch)
    check_loss(remat, dtype, "elsewhere")


def check_loss(remat, dtype, device):
    check(*model_loss(remat, dtype), dtype, device)


def model_loss(remat, dtype):
    """Return the loss of a model as a function of its parameters, and the parameters."""
    config = Mamba2Config(
        hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, n_groups=2, vocab_size=32,
    )  # fmt: skip
    structure, params, frozen = split_model(random_jax_model(config, dtype))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)))
    batch = {"input_ids": ids, "segment_ids": jnp.asarray([[1] * 5 + [2] * 4, [1] * 7 + [0] * 2])}

    def loss(params):
        return loss_fn(structure.merge(params, frozen), batch, remat=remat, tokens_per_slice=8)[0]

    return loss, params


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["scan", "model"])
def test_half_precision_derivatives_are_those_of_float32(name, dtype):
    """Compare every gradient, and a directional derivative by jvp, at arrays that `dtype` holds exactly."""
    if name == "scan":
        inputs, arrays, weights = scan_inputs(segments="packed")
        at = {key: array.astype(dtype).astype("float32") for key, array in arrays.items()}
        loss, exact = (scan_loss(inputs, of, jnp.asarray(weights, jnp.float32)) for of in (dtype, "float32"))
    else:
        loss, at = model_loss("none", dtype)
        exact, _ = model_loss("none", "float32")
    want = jax.jit(jax.grad(exact))(at)
    got, slope = jax.jit(lambda at: (jax.grad(loss)(at), jax.jvp(loss, (at,), (want,))[1]))(at)
    assert abs(slope - inner(want, want)) < ROUNDED[dtype] * inner(want, want)
    for key, gradient in want.items():
        assert got[key].dtype == jnp.float32
        assert norm(got[key] - gradient) < ROUNDED[dtype] * norm(gradient), key


@pytest.mark.parametrize("name", ["scan", "convolution", "product"])
def test_slopes_and_hessians_are_those_of_differences(name):
    with jax.enable_x64(True):
        if name == "scan":
            inputs, arrays, weights = scan_inputs()
            arrays = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), arrays)
            loss = scan_loss(inputs, "float64", jnp.asarray(weights))
        elif name == "convolution":
            arrays, weights = conv_arrays("float64"), np.random.default_rng(1).normal(size=(2, 9, 6))
            loss = conv_loss("float64", weights)
        else:
            rng = np.random.default_rng(0)
            arrays = [jnp.asarray(rng.normal(size=size)) for size in ((2, 6, 8), (8, 2, 3))]
            loss = product_loss(linear, "float64")
        check(loss, arrays, "float64")
        slopes, hessian, _, _, along = derivatives(loss)(arrays)
        step = 1e-6 / float(norm(along))
        here, there = (
            jax.tree.map(lambda a, v, sign=sign: a + sign * step * v, arrays, along) for sign in (-1, 1)
        )
        slope = (loss(there) - loss(here)) / (2 * step)
        np.testing.assert_allclose(slopes["jvp"], slope, rtol=1e-6)
        gradients = jax.grad(loss)(there), jax.grad(loss)(here)
        wanted = jax.tree.map(lambda a, b: (a - b) / (2 * step), *gradients)
        assert float(norm(jax.tree.map(jnp.subtract, hessian, wanted)) / norm(wanted)) < 1e-5
