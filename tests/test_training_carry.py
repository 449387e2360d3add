"""Training on a carried state: pieces add up to the whole, gradients stop or pass, a state is trained."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import SIZES, jax_model, random_ids, random_jax_model, relative
from training_runs import arrays_of, run_config, tiny_model, tokenizer, words

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.training import (
    CheckpointConfig,
    DataConfig,
    OptimConfig,
    Trainer,
    TrainState,
    initial_state_of,
    loss_fn,
    split_model,
    train_step,
)
from mamba2_jax.training.carry import begin_or_go_on, initial_cache, new_initial_state
from mamba2_jax.training.lanes import Lanes
from mamba2_jax.training.loss import loss_and_cache
from mamba2_jax.training.metrics import read_metrics

TOLERANCE = 1e-5  # float32 sums in another order
ROWS, LENGTH, PIECES = 2, 96, 3


ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 8, "d_conv": 4, "rotary_emb_dim": 4}


@pytest.fixture(scope="module", params=["mamba2", "hybrid"])
def parts(request):
    if request.param == "mamba2":
        return split_model(jax_model(num_hidden_layers=1))
    config = Mamba2Config(**{**SIZES, "attn_layer_idx": (1,), "attn_cfg": ATTENTION})
    return split_model(random_jax_model(config))


def whole_and_pieces():
    """Rows with documents that begin inside a piece, at its first and at its last token; and in pieces."""
    ids = random_ids(ROWS, LENGTH + 1)
    segments = np.stack([np.repeat([1, 2, 3], [20, 44, 33]), np.repeat([5, 4], [63, 34])])
    labels = np.where(np.arange(LENGTH + 1) % 5 == 3, -100, ids)
    ends = segments[:, 1:] != segments[:, :-1]
    targets = np.where(ends, -100, labels[:, 1:])
    whole = {"input_ids": ids[:, :-1], "segment_ids": segments[:, :-1], "targets": targets}
    cut = {name: np.stack(np.split(array, PIECES, axis=1)) for name, array in whole.items()}
    first = cut["segment_ids"][:, :, 0]
    last = np.concatenate([first[:1] * 0, cut["segment_ids"][:-1, :, -1]])
    return whole, cut | {"continues": first == last}


@partial(jax.jit, static_argnames=("structure", "optimizer", "passes"))
def moved(params, frozen, batch, structure, optimizer, passes=False):
    """The gradient of a step, from what plain descent takes off, and the step's loss."""
    config = structure.merge(params, frozen).config
    cache = Mamba2Cache.zeros(config, ROWS, capacity=LENGTH)
    state = TrainState.start(params, optimizer, jax.random.key(0), cache)
    new, metrics = train_step(
        state, frozen, batch, structure=structure, optimizer=optimizer, pass_gradient=passes
    )
    return jax.tree.map(lambda before, after: (before - after) / RATE, params, new.params), metrics


RATE = 1024.0  # so large that the differences are not those of the weights' rounding
SGD = optax.sgd(RATE)


def test_the_loss_of_pieces_adds_up_to_that_of_the_whole(parts):
    structure, params, frozen = parts
    whole, cut = whole_and_pieces()
    model = structure.merge(params, frozen)
    want, count = loss_fn(model, whole)
    cache = Mamba2Cache.zeros(model.config, ROWS, capacity=LENGTH)
    score = jax.jit(loss_and_cache)
    nats, tokens = 0.0, 0
    for i in range(PIECES):
        piece = {name: array[i] for name, array in cut.items() if name != "continues"}
        more, (scored, after) = score(model, piece, cache)
        cache = begin_or_go_on(after, None, jnp.asarray(cut["continues"][(i + 1) % PIECES]))
        nats, tokens = nats + float(more), tokens + int(scored)
    assert tokens == int(count)
    np.testing.assert_allclose(nats, want, rtol=TOLERANCE)


def test_the_gradient_of_pieces_is_that_of_the_whole_if_it_passes(parts):
    structure, params, frozen = parts
    whole, cut = whole_and_pieces()
    want, metrics = moved(params, frozen, whole, structure, SGD)
    through, of_pieces = moved(params, frozen, cut, structure, SGD, passes=True)
    stopped, of_stopped = moved(params, frozen, cut, structure, SGD)
    for other in (of_pieces, of_stopped):
        np.testing.assert_allclose(other.loss, metrics.loss, rtol=TOLERANCE)
        assert int(other.tokens) == int(metrics.tokens)
    for name in params:
        assert relative(through[name], want[name]) < 2 * TOLERANCE, name
    A_log = "backbone.layers.0.mixer.A_log"
    assert relative(stopped[A_log], want[A_log]) > 1e-3  # it lacks what earlier pieces did to later losses


def test_the_gradient_of_an_initial_state_reaches_new_documents_alone(parts):
    structure, params, frozen = parts
    model = structure.merge(params, frozen)
    name = "initial_state.0"
    shape = new_initial_state(model.config)[name].shape
    state = 0.1 * jax.random.normal(jax.random.key(1), shape)
    direction = jax.random.normal(jax.random.key(2), shape)
    batch = {"input_ids": random_ids(ROWS, 24)}

    @jax.jit
    def loss(state):
        cache = initial_cache({name: state}, model.config, ROWS, model.dtype)
        return loss_fn(model, batch, cache=cache)[0]

    slope = jnp.vdot(jax.grad(loss)(state), direction)
    step = 1e-2
    difference = (loss(state + step * direction) - loss(state - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=2e-2)  # float32, and a difference of the second order

    trained = {**params, name: state}
    for goes_on, changes in ((True, False), (False, True)):
        cut = {**batch, "continues": np.full(ROWS, goes_on)}
        change, _ = moved(trained, frozen, cut, structure, SGD)
        assert bool(np.any(change[name])) == changes


def documents(lengths) -> list[dict]:
    ids = [100 * (i + 1) + np.arange(length) for i, length in enumerate(lengths)]
    return [{"input_ids": a, "labels": np.where(a % 7 == 0, -100, a)} for a in ids]


@pytest.mark.parametrize("pad", [False, True])
def test_lanes_read_every_document_once_in_pieces_that_join(pad):
    lengths = (37, 5, 80, 2, 17, 24)
    lanes = Lanes(documents(lengths), rows=2, length=10, pad=pad, shuffle=True, seed=3, epochs=1)
    read: dict[int, list] = {}
    before = [-1, -1]
    for batch in lanes:
        for row in range(2):
            ids, targets = batch["input_ids"][row], batch["targets"][row]
            valid = batch["segment_ids"][row] > 0
            assert not ids[~valid].any()
            assert (targets[~valid] == -100).all()
            if batch["continues"][row]:
                assert ids[0] == before[row] + 1
            for token, target in zip(ids[valid], targets[valid], strict=True):
                read.setdefault(token // 100, []).append((token, target))
            before[row] = ids[valid][-1] if valid.any() else -1
            assert not pad or len(set(batch["segment_ids"][row][valid])) <= 1
    for document in documents(lengths):
        pairs = list(zip(document["input_ids"][:-1], document["labels"][1:], strict=True))
        assert read[document["input_ids"][0] // 100] == pairs


def test_lanes_go_on_where_they_were():
    make = partial(
        Lanes, documents((37, 5, 80, 2)), rows=3, length=8, shuffle=True, seed=1, epochs=None, pieces=2
    )
    lanes, again = make(), make()
    for _ in range(7):
        next(lanes)
    again.set_state(lanes.get_state())
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, next(again), next(lanes))
    assert next(lanes)["continues"].shape == (2, 3)


def make_trainer(output, **changes) -> Trainer:
    options = {
        "steps": None,
        "data": DataConfig(max_length=16, eval_share=0.05),
        "optim": OptimConfig(schedule="constant", learning_rate=1e-2),
        "carry_state": True,
        "checkpoint": CheckpointConfig(every=100),
    }
    texts = [{"text": words(10 + 7 * i, i)} for i in range(12)]
    config = run_config(output, **{**options, **changes})
    return Trainer(tiny_model(), config, texts, tokenizer=tokenizer())


def test_a_run_sums_the_loss_of_whole_documents(tmp_path):
    still = OptimConfig(schedule="constant", learning_rate=1e-30)
    trainer = make_trainer(tmp_path / "run", optim=still, accumulate=2, epochs=1)
    result = trainer.fit()
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    nats = sum(line["loss"] * line["tokens"] for line in lines)
    tokens = sum(line["tokens"] for line in lines)
    model, want, count = tiny_model(), [], []
    longest = max(
        len(document["input_ids"]) for document in (*trainer._feed.documents, *trainer._feed.held_out)
    )
    score = jax.jit(loss_fn)
    for texts in (trainer._feed.documents, trainer._feed.held_out):
        ids = np.zeros((len(trainer._feed.documents), longest), int)  # of one shape, with empty rows
        segments = np.zeros_like(ids)
        for i, document in enumerate(texts):
            ids[i, : len(document["input_ids"])] = document["input_ids"]
            segments[i, : len(document["input_ids"])] = 1
        summed = score(model, {"input_ids": ids, "segment_ids": segments})
        want.append(float(summed[0]))
        count.append(int(summed[1]))
    assert tokens == count[0]
    np.testing.assert_allclose(nats, want[0], rtol=TOLERANCE)
    np.testing.assert_allclose(result.evaluation.loss, want[1] / count[1], rtol=TOLERANCE)


def test_a_carried_state_and_a_trained_one_are_in_the_checkpoint(tmp_path):
    options = {"data": DataConfig(max_length=16, rows="pad"), "train_initial_state": True}
    straight = make_trainer(tmp_path / "straight", steps=8, **options)
    straight.fit()
    make_trainer(tmp_path / "run", steps=5, **options).fit()
    trainer = make_trainer(tmp_path / "run", steps=8, resume=True, **options)
    trainer.fit()
    for name, array in arrays_of(straight).items():
        np.testing.assert_array_equal(arrays_of(trainer)[name], array, err_msg=name)
    state = trainer.initial_state(3)
    assert state.ssm[0].shape[0] == 3
    assert np.abs(state.ssm[0]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, initial_state_of(tmp_path / "run", 3), state)
    saved = Mamba2ForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype="float32")
    file = tmp_path / "run" / "initial_state.safetensors"
    jax.tree.map(np.testing.assert_array_equal, Mamba2Cache.load(file, saved), state[:1])
    with pytest.raises(FileNotFoundError, match="neither a training run"):
        initial_state_of(tmp_path / "nowhere")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pass_gradient": True}, "pass_gradient needs carry_state and accumulate above 1"),
        ({"train_initial_state": True}, "train_initial_state needs data.rows='pad'"),
        ({"attention_context": 8, "carry_state": False}, "attention_context=8 needs carry_state"),
        ({"attention_context": 8}, "attention_context=8, but the model has no attention layers"),
        ({"tokens_per_turn": 32}, "tokens_per_turn=32 splits the rows that carry_state keeps together"),
    ],
)
def test_options_that_do_not_go_together(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
