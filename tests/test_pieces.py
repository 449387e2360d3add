"""Mixer and block as layers of other models: their call, and Flax's transformations around it."""

import inspect
from functools import partial

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from models import jax_model, relative, torch_model

from mamba2_jax import Mamba2Block, Mamba2Config, Mamba2Mixer
from mamba2_jax.layers.piece import DEFAULTS

TOLERANCE = 1e-5  # float32 sums in another order
WIDTH = 16
SIZES = {"state_size": 8, "head_dim": 8, "n_groups": 2}
LENGTH = 12


def make(cls=Mamba2Mixer, seed=0, **changes):
    return cls(WIDTH, **{**SIZES, **changes}, rngs=nnx.Rngs(seed))


@partial(jax.jit, static_argnames="reverse")
def run(piece, hidden, mask=None, segments=None, state=None, reverse=False):
    return piece(hidden, mask, segments, state=state, reverse=reverse)


@pytest.fixture(scope="module")
def hidden():
    return jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH))


@pytest.fixture(scope="module", params=[Mamba2Mixer, Mamba2Block], ids=["mixer", "block"])
def piece(request):
    return make(request.param)


@pytest.fixture(scope="module")
def whole(piece, hidden):
    return run(piece, hidden)


class TestNumbers:
    @pytest.mark.parametrize("kind", ["mixer", "block"])
    def test_those_of_transformers_with_its_weights(self, kind):
        torch = pytest.importorskip("torch")
        theirs, ours = torch_model().backbone.layers[0], jax_model().backbone.layers[0]
        hidden = np.random.default_rng(0).standard_normal((2, 20, 32), np.float32)
        plain = {"mixer": Mamba2Mixer, "block": Mamba2Block}[kind](
            32, state_size=16, num_heads=8, head_dim=8, n_groups=2, chunk_size=16, rngs=nnx.Rngs(0)
        )
        if kind == "mixer":
            theirs, ours = theirs.mixer, ours.mixer
        nnx.update(plain, nnx.state(ours))
        want = theirs(torch.tensor(hidden)).numpy()
        for mine in (ours, plain):
            assert relative(run(mine, jnp.asarray(hidden)), want) < TOLERANCE

    def test_any_number_of_heads(self, hidden):
        mixer = make(num_heads=6, n_groups=3)
        assert mixer.in_proj.weight_zx.shape == (WIDTH, 2, 48)
        assert run(mixer, hidden).shape == hidden.shape

    def test_the_chunk_size_changes_no_number(self, hidden):
        assert relative(run(make(chunk_size=4), hidden), run(make(), hidden)) < TOLERANCE

    def test_half_precision(self, hidden):
        kinds = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        assert run(make(**kinds), hidden).dtype == jnp.bfloat16
        block = make(Mamba2Block, **kinds)
        out = run(block, hidden)
        assert out.dtype == jnp.float32
        assert relative(out, run(make(Mamba2Block), hidden)) < 0.03  # bfloat16 has 8 bits
        narrow = make(Mamba2Block, residual_in_fp32=False, **kinds)
        assert run(narrow, hidden.astype(jnp.bfloat16)).dtype == jnp.bfloat16

    def test_a_block_has_an_mlp_if_asked(self, hidden):
        block = make(Mamba2Block, d_intermediate=128)
        assert block.mlp.fc1.weight.shape == (WIDTH, 2, 128)
        assert run(block, hidden).shape == hidden.shape


class TestRows:
    @pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
    def test_a_row_sees_neither_padding_nor_another_document(self, piece, hidden, reverse):
        mask = jnp.array([[0] * 6 + [1] * 6, [1] * 6 + [0] * 6])
        segments = jnp.array([[2] * 6 + [1] * 6, [1] * 6 + [0] * 6])
        padded = run(piece, hidden, mask, reverse=reverse)
        packed = run(piece, hidden, None, segments, reverse=reverse)
        for row, start, outs in [
            (0, 6, padded),
            (1, 0, padded),
            (0, 0, packed),
            (0, 6, packed),
            (1, 0, packed),
        ]:
            alone = run(piece, hidden[row : row + 1, start : start + 6], reverse=reverse)
            assert relative(outs[row, start : start + 6], alone[0]) < TOLERANCE

    def test_backwards_is_forwards_on_the_reversed_row(self, piece, hidden, whole):
        backwards = run(piece, hidden[:, ::-1], reverse=True)
        assert relative(backwards[:, ::-1], whole) < TOLERANCE
        changed = run(piece, hidden[:, ::-1].at[:, 4].add(1.0), reverse=True)
        seen = np.abs(changed - backwards).max((0, 2)) > 0
        assert seen.tolist() == [True] * 5 + [False] * 7

    def test_the_state_continues_in_any_pieces(self, piece, hidden, whole):
        state, outs = piece.initial_state(2), []
        for start, end in [(0, 6), (6, 7), (7, 8), (8, LENGTH)]:
            out, state = run(piece, hidden[:, start:end], state=state)
            outs.append(out)
        assert relative(jnp.concatenate(outs, 1), whole) < TOLERANCE

    def test_decoding_in_a_scan(self, piece, hidden, whole):
        @jax.jit
        def decode(piece, hidden):
            def step(state, token):
                out, state = piece(token[:, None], state=state)
                return state, out[:, 0]

            return jax.lax.scan(step, piece.initial_state(2), hidden.swapaxes(0, 1))[1]

        assert relative(decode(piece, hidden).swapaxes(0, 1), whole) < TOLERANCE


class TestFlax:
    def test_an_optimizer_trains_it_in_a_jit(self, piece, hidden):
        piece = nnx.clone(piece)
        optimizer = nnx.Optimizer(piece, optax.adam(1e-2), wrt=nnx.Param)
        wanted = jnp.roll(hidden, 1, axis=1)

        @nnx.jit
        def step(piece, optimizer):
            loss, gradients = nnx.value_and_grad(lambda piece: ((piece(hidden) - wanted) ** 2).mean())(piece)
            optimizer.update(piece, gradients)
            return loss

        losses = [float(step(piece, optimizer)) for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0]

    def test_an_ensemble_in_a_vmap(self, piece, hidden):
        cls = type(piece)

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def create(rngs):
            return cls(WIDTH, **SIZES, rngs=rngs)

        ensemble = create(nnx.Rngs(0))
        outs = nnx.jit(nnx.vmap(lambda piece, x: piece(x), in_axes=(0, None)))(ensemble, hidden)
        graph, state = nnx.split(ensemble)
        for index in range(3):
            one = nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], state))
            assert relative(outs[index], run(one, hidden)) < TOLERANCE
        assert relative(outs[0], outs[1]) > 0.01

    def test_stacked_layers_in_a_scan(self, hidden):
        mask = jnp.ones((2, LENGTH), jnp.int32).at[0, 9:].set(0)

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def create(rngs):
            return Mamba2Block(WIDTH, **SIZES, rngs=rngs)

        @nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
        @nnx.remat
        def forward(block, hidden, mask):
            return block(hidden, mask)

        def loop(blocks, hidden, mask):
            graph, state = nnx.split(blocks)
            for index in range(3):
                layer = nnx.merge(graph, jax.tree.map(lambda leaf, index=index: leaf[index], state))
                hidden = layer(hidden, mask)
            return hidden

        def gradient(run):
            return nnx.jit(nnx.value_and_grad(lambda blocks: run(blocks, hidden, mask)[1].sum()))

        blocks = create(nnx.Rngs(0))
        out, gradients = gradient(forward)(blocks)
        want, wanted_gradients = gradient(loop)(blocks)
        assert relative(out, want) < TOLERANCE
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True)
        for got, wanted in pairs:
            assert relative(got, wanted) < 1e-4  # sums over 24 tokens, in another order

    def test_orbax_restores_it(self, piece, hidden, whole, tmp_path):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "piece", nnx.state(piece))
            checkpointer.wait_until_finished()
            other = make(type(piece), seed=1)
            graph, abstract = nnx.split(nnx.eval_shape(lambda: make(type(piece), seed=1)))
            restored = checkpointer.restore(tmp_path / "piece", abstract)
        assert relative(run(other, hidden), whole) > 0.01
        assert (run(nnx.merge(graph, restored), hidden) == whole).all()

    def test_inside_a_linen_model(self, piece, hidden):
        cls = type(piece)

        class Classifier(linen.Module):
            @linen.compact
            def __call__(self, hidden, mask):
                hidden = linen.Dense(WIDTH)(hidden)
                hidden = nnx.bridge.ToLinen(cls, args=(WIDTH,), kwargs=SIZES)(hidden, mask)
                return linen.Dense(3)(hidden).mean(1)

        model, mask = Classifier(), jnp.ones((2, LENGTH), jnp.int32)
        variables = model.init(jax.random.key(0), hidden, mask)

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            return (model.apply({"params": params}, hidden, mask) ** 2).sum()

        value, gradients = loss(variables["params"])
        assert value > 0
        (name,) = (name for name in gradients if "Mamba2" in name or "ToLinen" in name)
        inner = jax.tree.leaves(gradients[name])
        assert len(inner) == len(jax.tree.leaves(nnx.state(piece)))
        assert all((np.abs(leaf) > 0).any() for leaf in inner)


class TestMistakes:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda mixer, x: mixer(x[..., :8]), "Mamba2Mixer: hidden has shape .* d=16"),
            (lambda mixer, x: mixer(x[0]), "Mamba2Mixer: hidden has rank 2"),
            (lambda mixer, x: mixer(x.astype(int)), "Mamba2Mixer: hidden is int"),
            (lambda mixer, x: mixer(x, np.ones((2, 3), int)), "attention_mask has shape"),
            (lambda mixer, x: mixer(x, np.eye(2, LENGTH, dtype=int)[::-1] * 2), "other than 0 and 1"),
            (lambda mixer, x: mixer(x, state=mixer.initial_state(3)), "a batch of 2; begin with"),
            (lambda mixer, x: make(n_groups=3), "Mamba2Mixer: num_heads=4 is not a multiple"),
            (lambda mixer, x: make(head_dim=5), "expand . hidden_size = 32 is not a multiple of head_dim=5"),
            (lambda mixer, x: make(state_size=0), "Mamba2Mixer: state_size=0, wants a positive"),
            (lambda mixer, x: Mamba2Mixer(mixer.config, state_size=3, rngs=nnx.Rngs(0)), "beside a config"),
        ],
    )
    def test_are_named(self, hidden, call, message):
        with pytest.raises(ValueError, match=message):
            call(make(), hidden)

    def test_a_block_with_attention_runs_in_a_model_only(self, hidden):
        config = Mamba2Config(
            **{**SIZES, "hidden_size": WIDTH, "num_heads": 4, "num_hidden_layers": 1, "vocab_size": 9},
            attn_layer_idx=(0,),
            attn_cfg={"num_heads": 2, "head_dim": 8},
        )
        block = nnx.eval_shape(lambda: Mamba2Block(config, layer=config.layers[0], rngs=nnx.Rngs(0)))
        with pytest.raises(ValueError, match="a block of attention runs in a model only"):
            block(hidden)

    def test_sizes_have_one_default(self):
        defaults = {}
        for cls in (Mamba2Mixer, Mamba2Block):
            defaults |= {
                name: one.default for name, one in inspect.signature(cls.__init__).parameters.items()
            }
        assert {name: defaults[name] for name in DEFAULTS} == DEFAULTS
        with pytest.raises(TypeError, match="unexpected arguments: width"):
            make(Mamba2Block, width=3)
