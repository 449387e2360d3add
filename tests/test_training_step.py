"""Loss, gradients and the step: against PyTorch, packed and alone, in parts and whole."""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import jax_model, random_ids, relative, torch_model

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.training import OptimConfig, TrainState, loss_fn, make_optimizer, split_model, train_step
from mamba2_jax.training.diagnosis import first_not_finite
from mamba2_jax.training.loss import sliced_cross_entropy
from mamba2_jax.training.on_cpu import rows_in_turn, tokens_in_cache
from mamba2_jax.training.optim import learning_rate
from mamba2_jax.weights.table import assemble, checkpoint_table


@partial(jax.jit, static_argnames=("structure", "remat", "tokens_per_slice"))
def gradients(params, frozen, batch, structure, remat="none", tokens_per_slice=16):
    def nats(params):
        return loss_fn(structure.merge(params, frozen), batch, remat=remat, tokens_per_slice=tokens_per_slice)

    (nats, tokens), grads = jax.value_and_grad(nats, has_aux=True)(params)
    return nats, tokens, grads


def model_parts(**changes):
    return split_model(jax_model(**(changes or {"num_hidden_layers": 1})))


def test_gradients_are_those_of_pytorch_with_padding_and_two_groups():
    torch = pytest.importorskip("torch")
    ids = random_ids(3, 37)
    mask = np.ones_like(ids)
    mask[1, :9] = 0  # at the left, where transformers is exact
    labels = np.where(mask == 1, ids, -100)
    labels[1, 9] = -100  # transformers would predict it from the padding
    labels[0, 20:25] = -100

    theirs = copy.deepcopy(torch_model(num_hidden_layers=2)).requires_grad_(True)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    out = theirs(**{name: torch.tensor(array) for name, array in inputs.items()})
    out.loss.backward()

    structure, params, frozen = model_parts(num_hidden_layers=2)
    assert structure.merge(params, frozen).config.n_groups == 2
    nats, tokens, grads = gradients(params, frozen, inputs, structure)
    assert int(tokens) == 3 * 36 - 9 - 5
    np.testing.assert_allclose(float(nats / tokens), out.loss.item(), rtol=1e-5)
    grads = {name: np.asarray(grad / tokens) for name, grad in grads.items()}
    compared = set()
    for stored in checkpoint_table(jax_model(num_hidden_layers=2).config):
        if stored.leaves:
            want = theirs.get_parameter(stored.name).grad.numpy()
            assert relative(assemble(stored, grads), want) < 1e-4, stored.name
            compared |= {leaf.path for leaf in stored.leaves}
    assert compared == set(params)


def documents_and_row():
    lengths = (13, 1, 20, 6)
    documents = [random_ids(1, length, seed=length)[0] for length in lengths]
    row = np.concatenate([*documents, np.zeros(5, int)])
    segments = np.repeat([1, 2, 3, 4, 0], [*lengths, 5])
    return documents, row[None], segments[None]


def test_packed_documents_are_documents_alone():
    structure, params, frozen = model_parts()
    documents, row, segments = documents_and_row()
    batch = {"input_ids": row, "segment_ids": segments}
    nats, tokens, grads = gradients(params, frozen, batch, structure)
    # alone means each in a row of its own, padded at the right to one shape
    alone = np.zeros((len(documents), 20), int)
    mask = np.zeros_like(alone)
    for i, document in enumerate(documents):
        alone[i, : len(document)], mask[i, : len(document)] = document, 1
    total = gradients(params, frozen, {"input_ids": alone, "attention_mask": mask}, structure)
    assert int(tokens) == int(total[1]) == 12 + 0 + 19 + 5
    np.testing.assert_allclose(nats, total[0], rtol=2e-6)
    for name in grads:
        assert relative(grads[name], total[2][name]) < 2e-5, name  # another order of float32 sums


def temporary_bytes(function, *args, **kwargs) -> int:
    return function.lower(*args, **kwargs).compile().memory_analysis().temp_size_in_bytes


def test_remat_and_slices_change_nothing_but_memory():
    structure, params, frozen = model_parts(num_hidden_layers=3)
    _, row, segments = documents_and_row()
    batch = {"input_ids": np.tile(row, 3), "segment_ids": np.tile(segments, 3)}
    # 135 positions: the last slice has a rest
    plain, other = (
        gradients(params, frozen, batch, structure, remat, width)
        for remat, width in (("none", 1024), ("block", 26))
    )
    np.testing.assert_allclose(plain[0], other[0], rtol=1e-6)
    for name, want in plain[2].items():
        assert relative(other[2][name], want) < 1e-5, name


@pytest.mark.xla_habits
def test_remat_and_slices_take_less_memory():
    structure, params, frozen = model_parts(num_hidden_layers=3)
    _, row, segments = documents_and_row()
    batch = {"input_ids": np.tile(row, 3), "segment_ids": np.tile(segments, 3)}
    kept = {
        remat: temporary_bytes(gradients, params, frozen, batch, structure, remat, width)
        for remat, width in (("none", 1024), ("block", 26))
    }
    assert kept["block"] < 0.8 * kept["none"], kept  # also on CPU, where XLA would undo jax.checkpoint


@pytest.mark.xla_habits
def test_the_logits_of_a_batch_never_exist():
    batch, length, width, vocab = 2, 2048, 8, 3000
    head = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    hidden = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def bytes_with_slices_of(positions):
        def loss(head, hidden, targets):
            logits = lambda head, x: x @ head.T  # noqa: E731
            return sliced_cross_entropy(logits, head, hidden, targets, positions_per_slice=positions)

        return temporary_bytes(jax.jit(jax.grad(loss, argnums=(0, 1))), head, hidden, targets)

    logits = 4 * batch * length * vocab
    assert bytes_with_slices_of(length) > logits  # the measure sees them when they are there
    assert bytes_with_slices_of(64) < logits / 5


@pytest.mark.parametrize(("trained", "products"), [((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_a_slice_is_scored_once_and_nothing_frozen_gets_a_gradient(trained, products):
    """One product with the head forward; one more for the gradient of each of its operands that is wanted."""
    head = jax.random.normal(jax.random.key(0), (50, 8))
    hidden = jax.random.normal(jax.random.key(1), (2, 40, 8))
    targets = jax.random.randint(jax.random.key(2), (2, 40), 0, 50).at[0, :7].set(-100)

    def loss(hidden, head):
        logits = lambda head, x: x @ head.T  # noqa: E731
        return 3 * sliced_cross_entropy(logits, head, hidden, targets, positions_per_slice=16)

    def plain(hidden, head):
        nats = optax.losses.softmax_cross_entropy_with_integer_labels(
            hidden @ head.T, jnp.maximum(targets, 0)
        )
        return 3 * jnp.where(targets == -100, 0, nats).sum()

    take = (lambda f: jax.value_and_grad(f, argnums=trained)) if trained else (lambda f: f)
    assert str(jax.make_jaxpr(take(loss))(hidden, head)).count("dot_general") == products
    got, want = (jax.tree.leaves(jax.jit(take(f))(hidden, head)) for f in (loss, plain))
    for one, other in zip(got, want, strict=True):
        assert relative(one, other) < 1e-6


def test_the_loss_is_that_of_the_weights_as_they_are_now():
    model = Mamba2ForCausalLM(jax_model(num_hidden_layers=1).config, rngs=nnx.Rngs(0))
    batch = {"input_ids": random_ids(2, 9)}
    before, tokens = loss_fn(model, batch)
    table = model.backbone.embeddings if model.lm_head is None else model.lm_head
    table.weight[...] *= 0
    after, _ = loss_fn(model, batch)
    assert abs(float(before) - float(after)) > 1e-3
    np.testing.assert_allclose(after / tokens, np.log(model.config.vocab_size), rtol=1e-6)


def step_function(structure, optimizer, frozen):
    return lambda state, batch: train_step(
        state, frozen, batch, structure=structure, optimizer=optimizer, tokens_per_slice=64
    )


def fresh(params, optimizer):
    return TrainState.start(
        {name: array.copy() for name, array in params.items()}, optimizer, jax.random.key(0)
    )


def test_four_parts_are_one_batch():
    structure, params, frozen = model_parts()
    # clip and AdamW's division both hide a wrong scale of the gradients: plain descent does not
    optimizer = make_sgd()
    ids = random_ids(4, 24)
    labels = ids.copy()
    labels[0, 2:] = labels[1, 20:] = labels[2, ::3] = -100  # parts of very different weight
    whole = {"input_ids": ids, "labels": labels}
    parts = {name: array[:, None] for name, array in whole.items()}
    step = step_function(structure, optimizer, frozen)
    one, metrics = step(fresh(params, optimizer), whole)
    four, metrics4 = step(fresh(params, optimizer), parts)
    assert int(metrics.tokens) == int(metrics4.tokens) == (labels[:, 1:] != -100).sum()
    np.testing.assert_allclose(metrics4.loss, metrics.loss, rtol=1e-6)
    for name, start in params.items():
        moved = np.asarray(one.params[name] - start)
        assert np.abs(moved).max() > 0
        assert np.abs(np.asarray(four.params[name]) - one.params[name]).max() < 1e-6, name


@pytest.mark.parametrize(("hidden_size", "tokens"), [(64, 8192), (256, 2048), (512, 1024), (2560, 1024)])
def test_a_narrow_model_takes_more_tokens_at_a_time(hidden_size, tokens):
    assert tokens_in_cache(hidden_size) == tokens


def rows_of_half(most: int) -> dict:
    """Return six rows of half as many tokens as are taken at a time, some with more labels than others."""
    rows, length = 6, most // 2
    ids = random_ids(rows, length)
    labels = np.where(np.arange(length) % 7 < np.arange(rows)[:, None], ids, -100)
    return {"input_ids": ids, "labels": labels}


def test_rows_take_turns():
    most = 1024
    structure, params, frozen = model_parts()
    rate, batch = 1e3, rows_of_half(most)
    rows, length = batch["input_ids"].shape
    optimizer = optax.sgd(rate)
    in_two_parts = {name: array.reshape(2, 3, length) for name, array in batch.items()}
    in_turn = rows_in_turn(batch, most)
    assert in_turn["labels"].shape == (3, 2, length)
    assert rows_in_turn(in_two_parts, most)["labels"].shape == (6, 1, length)
    longer = {"input_ids": np.zeros((4, 2 * most), int)}
    assert rows_in_turn(longer, most)["input_ids"].shape == (4, 1, 2 * most)
    assert set(rows_in_turn({**batch, "segment_ids": None, "weight": np.ones(rows)}, most)) == set(batch)
    odd = {"input_ids": np.zeros((37, 32), int)}  # only rows of 32 tokens divide it
    assert rows_in_turn(odd, most) is odd
    few = {name: array[:2] for name, array in batch.items()}
    assert rows_in_turn(few, most) is few

    nats, tokens, grads = gradients(params, frozen, batch, structure)
    state, metrics = train_step(
        fresh(params, optimizer), frozen, in_turn, structure=structure, optimizer=optimizer
    )
    np.testing.assert_allclose(metrics.loss, nats / tokens, rtol=1e-6)
    for name, start in params.items():
        assert relative((start - state.params[name]) / rate, grads[name] / tokens) < 1e-4, name


@pytest.mark.xla_habits
def test_the_number_of_rows_that_take_turns_costs_no_memory():
    most = 1024
    structure, params, frozen = model_parts()
    optimizer, batch = optax.sgd(1e3), rows_of_half(most)
    few = {name: array[:2] for name, array in batch.items()}
    of_all, of_few = (
        temporary_bytes(
            train_step, fresh(params, optimizer), frozen, rows, structure=structure, optimizer=optimizer
        )
        for rows in (rows_in_turn(batch, most), few)
    )
    assert of_all < 1.2 * of_few


@pytest.mark.xla_habits
def test_on_a_cpu_a_step_writes_over_parameters_and_moments():
    config = Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=1, num_hidden_layers=1
    )
    structure, params, frozen = split_model(Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(OptimConfig(), params, steps=10)
    state = TrainState.start(params, optimizer, jax.random.key(0))
    batch = {"input_ids": np.ones((1, 8), int)}
    taken = temporary_bytes(train_step, state, frozen, batch, structure=structure, optimizer=optimizer)
    size = sum(array.nbytes for array in params.values())  # next to all of it the tied embedding
    assert taken < 2.2 * size  # its gradient, in two parts


def make_sgd():
    return optax.sgd(0.1)


@pytest.mark.parametrize("on_one_cpu", [True, False])  # elsewhere without a branch
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(on_one_cpu, monkeypatch):
    monkeypatch.setattr("mamba2_jax.training.step.on_one_cpu", lambda model: on_one_cpu)
    structure, params, frozen = model_parts()
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2), params, 10 + on_one_cpu)  # traced for each
    step = step_function(structure, optimizer, frozen)
    batch = {"input_ids": random_ids(2, 16)}
    state, metrics = step(fresh(params, optimizer), batch)
    assert bool(metrics.finite)

    name = "backbone.layers.0.mixer.D"
    broken = {**state.params, name: state.params[name].at[0].set(jnp.nan)}
    before = jax.device_get((broken, state.opt_state))
    state = TrainState(state.step, broken, state.opt_state, state.key, state.skipped, state.skipped_in_a_row)
    for count in (1, 2):
        state, metrics = step(state, batch)
        assert not bool(metrics.finite)
        assert (int(metrics.skipped), int(metrics.skipped_in_a_row), int(state.step)) == (
            count,
            count,
            1 + count,
        )
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))
    assert first_not_finite(state.params, frozen, batch, structure) == f"parameter {name}"

    # what overflows on the way is named too
    name = "backbone.layers.0.mixer.out_proj.weight"
    huge = {**params, name: jnp.full_like(params[name], 3e38)}
    assert first_not_finite(huge, frozen, batch, structure) == "output of backbone.layers.0"

    mended = {name: array.copy() for name, array in params.items()}
    counters = (state.skipped, state.skipped_in_a_row)
    state, metrics = step(TrainState(state.step, mended, state.opt_state, state.key, *counters), batch)
    assert bool(metrics.finite)
    assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (2, 0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_spares_what_is_no_matrix(name):
    _, params, _ = model_parts()
    config = OptimConfig(optimizer=name, learning_rate=1.0, weight_decay=0.5, schedule="constant")
    optimizer = make_optimizer(config, params, 10)
    assert make_optimizer(config, params, 10) is optimizer
    ones = {name: jnp.ones_like(array) for name, array in params.items()}
    updates = jax.jit(
        lambda ones: optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)[0]
    )
    updates = jax.device_get(updates(ones))
    shrunk = {name.split(".", 3)[-1] for name, update in updates.items() if float(update.ravel()[0]) == -0.5}
    kept = {name.split(".", 3)[-1] for name, update in updates.items() if not update.any()}
    assert len(updates) == sum(float(u.ravel()[0]) in (0.0, -0.5) for u in updates.values())
    assert {"mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.norm.weight", "norm.weight", "weight"} <= kept
    assert {"mixer.conv1d.bias_x", "mixer.conv1d.bias_BC"} <= kept
    assert {"mixer.in_proj.weight_zx", "mixer.out_proj.weight", "mixer.conv1d.weight_x"} <= shrunk


def test_muon_makes_the_updates_of_projections_orthogonal_and_leaves_the_rest_to_adamw():
    _, params, _ = model_parts()
    config = OptimConfig(
        optimizer="muon", learning_rate=1e-2, schedule="constant", weight_decay=0.0, clip=0.0
    )
    grads = {name: jax.random.normal(jax.random.key(0), array.shape) for name, array in params.items()}
    optimizers = {
        "muon": make_optimizer(config, params, 10),
        "adamw": optax.adamw(1e-2, b1=config.beta1, b2=config.beta2, nesterov=True, weight_decay=0.0),
    }
    updates = {
        name: jax.device_get(optimizer.update(grads, optimizer.init(params), params)[0])
        for name, optimizer in optimizers.items()
    }
    projections = {name for name in params if name.split(".")[-2] in ("in_proj", "out_proj")}
    assert len(projections) == 4
    for name in params:
        if name not in projections:
            np.testing.assert_allclose(updates["muon"][name], updates["adamw"][name], rtol=1e-6)
            continue
        update = updates["muon"][name]
        pieces = [update] if update.ndim == 2 else [update[:, i] for i in range(update.shape[1])]
        for piece in pieces:  # all but the smallest singular values come to 0.7 .. 1.2
            values = np.linalg.svd(piece, compute_uv=False)
            assert np.mean(values > values.max() / 2) > 0.9
            assert 0.7 < np.sqrt(np.mean(piece**2)) / (0.2 * 1e-2) < 1.2  # as large as AdamW's usually are


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1] + [1 - i / 7 for i in range(8)]),
        ("wsd", [0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]),
        ("cosine", [0.5, 1] + [(1 + np.cos(np.pi * i / 7)) / 2 for i in range(8)]),
    ],
)
def test_schedules(schedule, wanted):
    options = {"learning_rate": 1.0, "schedule": schedule, "warmup": 2}
    options |= {"decay": 0.5} if schedule == "wsd" else {}
    rate = learning_rate(OptimConfig(**options), 10)
    np.testing.assert_allclose([rate(i) for i in range(10)], wanted, rtol=1e-5, atol=1e-7)
    if schedule != "constant":
        last = learning_rate(OptimConfig(**options, final=0.1), 10)(9)
        np.testing.assert_allclose(last, 0.1, rtol=1e-6)


def test_half_precision_weights_are_trained_in_float32():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8, "state_size": 8}
    config = Mamba2Config(**sizes, n_groups=2, vocab_size=32)
    model = Mamba2ForCausalLM(config, dtype="bfloat16", param_dtype="bfloat16", rngs=nnx.Rngs(0))
    structure, params, frozen = split_model(model)
    assert {array.dtype for array in params.values()} == {jnp.dtype("float32")}
    # a thousandth of a bfloat16's last digit, three times: rounded away unless summed in float32
    optimizer = make_optimizer(
        OptimConfig(learning_rate=1e-6, schedule="constant", weight_decay=0), params, 9
    )
    step, state = step_function(structure, optimizer, frozen), fresh(params, optimizer)
    for _ in range(3):
        state, _ = step(state, {"input_ids": random_ids(2, 16, 32)})
    moved = np.abs(np.asarray(state.params["backbone.norm_f.weight"]) - 1)
    assert 2e-6 < moved.max() < 4e-6
    assert model.backbone.norm_f.weight[...].dtype == jnp.bfloat16
