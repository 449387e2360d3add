"""What a model with attention layers promises: padding, packing, chunks and decoding change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SIZES, random_ids, relative

from mamba2_jax import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, generate, load_tokenizer, stream
from mamba2_jax.generation.loop import decode
from mamba2_jax.generation.sampling import make_sampler
from mamba2_jax.generation.state import start_state

TOLERANCE = 1e-5  # float32 sums in another order
LENGTH = 18
ATTENTION = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 8, "d_conv": 4, "rotary_emb_dim": 4}


def make(attention: dict | None = None, **changes) -> Mamba2ForCausalLM:
    fields = {**SIZES, "attn_layer_idx": (1,), "attn_cfg": ATTENTION | (attention or {}), **changes}
    return Mamba2ForCausalLM(Mamba2Config(**fields), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, LENGTH)


@pytest.fixture(scope="module")
def whole(model, ids):
    return model(ids)


def caches_agree(got, want):
    """States, and of the buffers the slots that count."""
    assert got.position.tolist() == want.position.tolist()
    count = int(want.position[0])
    cut = lambda cache: jax.tree.map(lambda buffer: buffer[:, :count], cache.attention)  # noqa: E731
    for mine, other in zip(
        jax.tree.leaves((got.conv, got.ssm, cut(got))),
        jax.tree.leaves((want.conv, want.ssm, cut(want))),
        strict=True,
    ):
        assert relative(mine, other) < TOLERANCE


class TestExactness:
    @pytest.mark.parametrize(
        "model",
        [
            make(),
            make(
                {"num_heads_kv": 1, "rotary_emb_interleaved": True, "d_conv": 0, "mlp_dim": 1},
                n_groups=1,
                d_intermediate=8,
            ),
        ],
        ids=["grouped", "interleaved, no convolution, MLPs"],
    )
    def test_any_chunking_and_single_steps_give_the_same_numbers(self, model, ids):
        whole = model(ids)
        cache, logits = None, []
        for start, end in ((0, 7), (7, 8), (8, 13), (13, 14), (14, 15), (15, 18)):
            out = model(ids[:, start:end], cache=cache)
            cache = out.cache
            logits.append(out.logits)
        assert relative(jnp.concatenate(logits, 1), whole.logits) < TOLERANCE
        for row in range(2):
            caches_agree(cache[row], whole.cache[row])

    @pytest.mark.parametrize("context", [0, 3, 7])
    def test_rolling_buffers_show_a_piece_the_last_tokens_before_it(self, context, ids):
        """Keys of one layer depend on their token alone, so that the piece with these tokens is an oracle."""
        model = make({"d_conv": 0}, attn_layer_idx=(0,), num_hidden_layers=1)
        cache = Mamba2Cache.zeros(model.config, 2, capacity=context)
        read = jax.jit(lambda ids, cache: model.backbone.forward(ids, None, None, cache, None, rolling=True))
        for start, end in ((0, 5), (5, 10), (10, 11), (11, 16)):
            out = read(ids[:, start:end], cache)
            seen = max(0, start - context)
            want = model.backbone(ids[:, seen:end]).last_hidden_state[:, start - seen :]
            assert relative(out.last_hidden_state, want) < TOLERANCE
            cache = out.cache
        assert cache.position.tolist() == [16, 16]

    def test_a_padded_row_equals_the_row_alone_and_goes_on_like_it(self, model, ids):
        mask = np.ones((2, LENGTH), int)
        mask[0, :7] = mask[1, 13:] = 0  # left, right
        padded = model(ids, attention_mask=mask)
        new = random_ids(2, 6, seed=5)
        new_mask = np.ones((2, 6), int)
        new_mask[0, 4:] = new_mask[1, :2] = 0
        after = model(new, attention_mask=new_mask, cache=padded.cache)
        step = model(new[:, :1], cache=after.cache)
        for row in range(2):
            valid, more = mask[row].astype(bool), new_mask[row].astype(bool)
            alone = model(ids[row : row + 1, valid])
            assert relative(padded.logits[row, valid], alone.logits[0]) < TOLERANCE
            caches_agree(padded.cache[row], alone.cache)
            alone = model(new[row : row + 1, more], cache=alone.cache)
            assert relative(after.logits[row, more], alone.logits[0]) < TOLERANCE
            caches_agree(after.cache[row], alone.cache)
            alone = model(new[row : row + 1, :1], cache=alone.cache)
            assert relative(step.logits[row], alone.logits[0]) < TOLERANCE

    def test_a_packed_row_equals_its_documents_alone(self, model, ids, whole):
        segments = np.array([[0, 5, 5, 5, 5, 5, 9, 5, 5, 5, 5, 5, 5, 5, 0, 0, 0, 0], [1] * 11 + [2] * 7])
        documents = [[(1, 6), (6, 7), (7, 14)], [(0, 11), (11, 18)]]
        for cache in (None, whole.cache):
            out = model(ids, segment_ids=segments, cache=cache)
            for row, pieces in enumerate(documents):
                for number, (start, end) in enumerate(pieces):
                    before = cache[row] if cache is not None and number == 0 else None
                    alone = model(ids[row : row + 1, start:end], cache=before)
                    assert relative(out.logits[row, start:end], alone.logits[0]) < TOLERANCE
                caches_agree(out.cache[row], alone.cache)

    def test_an_all_padding_row_changes_nothing(self, model, ids, whole):
        for length in (1, 5):
            mask = np.ones((2, length), int)
            mask[1] = 0
            out = model(ids[:, :length], attention_mask=mask, cache=whole.cache)
            assert np.isfinite(np.asarray(out.logits)).all()
            caches_agree(out.cache[1], whole.cache[1])

    def test_long_inputs_are_attended_to_in_blocks_and_padded_rows_too(self, monkeypatch, model, ids, whole):
        monkeypatch.setattr("mamba2_jax.ops.attention._QUERIES_AT_ONCE", 8)
        fresh = make({"softmax_scale": 8**-0.5})  # another config: compiled anew; the same numbers
        assert relative(fresh(ids).logits, whole.logits) < TOLERANCE
        mask = np.ones((2, LENGTH), int)
        mask[1, :5] = 0
        out = fresh(ids, attention_mask=mask)
        assert relative(out.logits[1, 5:], model(ids[1:, 5:]).logits[0]) < TOLERANCE


class TestCache:
    def test_it_grows_outside_jit_and_says_its_capacity(self, model, ids, whole):
        assert whole.cache.capacity == LENGTH
        assert model(ids[:, :1], cache=whole.cache).cache.capacity == 20
        assert Mamba2Cache.zeros(Mamba2Config(**SIZES), 1).capacity is None
        large = Mamba2Cache.zeros(model.config, 2, capacity=40)
        assert large.nbytes > whole.cache.nbytes
        out = model(ids, cache=large)
        assert out.cache.capacity == 40
        assert relative(out.logits, whole.logits) < TOLERANCE
        assert large.reserve(30) is large
        with pytest.raises(ValueError, match="capacity=-1"):
            Mamba2Cache.zeros(model.config, 2, capacity=-1)

    def test_rows_of_different_capacity_join(self, model, ids, whole):
        short = model(ids[:1, :5]).cache
        joined = Mamba2Cache.concatenate([whole.cache[1], short])
        assert joined.capacity == LENGTH
        step = model(ids[:, :1], cache=joined)
        alone = model(ids[1:, :1], cache=short)
        assert relative(step.logits[1], model(ids[1:, :1], cache=short).logits[0]) < TOLERANCE
        caches_agree(step.cache[1], alone.cache)

    def test_a_full_buffer_inside_jit_is_nan_in_its_row_alone(self, model, ids):
        mask = np.ones((2, LENGTH), int)
        mask[1, 9:] = 0
        cache = model(ids, attention_mask=mask).cache  # row 0 is full
        run = jax.jit(lambda model, ids, cache: model(ids, cache=cache))
        for length in (1, 3):
            out = run(model, jnp.asarray(ids[:, :length]), cache)
            assert np.isnan(out.logits[0, -1]).all()
            assert relative(out.logits[1], model(ids[1:, :length], cache=cache[1]).logits[0]) < TOLERANCE
        room = run(model, jnp.asarray(ids[:, :3]), cache.reserve(LENGTH + 3))
        assert np.isfinite(np.asarray(room.logits)).all()

    def test_another_models_cache_is_refused(self, model, ids):
        other = Mamba2Cache.zeros(Mamba2Config(**SIZES), 2)
        with pytest.raises(ValueError, match="cache does not fit"):
            model(ids, cache=other)


@pytest.fixture(scope="module")
def new(model, ids):
    return generate(model, ids, max_new_tokens=12, eos_token_id=())


class TestGeneration:
    def test_it_is_the_argmax_of_the_whole_text(self, model, ids, new):
        text = np.concatenate([ids, new.tokens], 1)
        np.testing.assert_array_equal(model(text).logits[:, LENGTH - 1 : -1].argmax(-1), new.tokens)
        assert new.cache.position.tolist() == [LENGTH + 12] * 2

    def test_ragged_rows_and_a_row_that_ends(self, model, ids, new):
        padded, mask = np.zeros((2, 24), int), np.zeros((2, 24), int)
        padded[0, 6:], mask[0, 6:] = ids[0], 1
        padded[1, :11], mask[1, :11] = ids[1, :11], 1
        alone = generate(model, ids[1:, :11], max_new_tokens=12, eos_token_id=())
        eos = int(new.tokens[0, 3])
        end = int(np.flatnonzero(new.tokens[0] == eos)[0]) + 1
        ragged = generate(model, padded, mask, max_new_tokens=12, eos_token_id=eos)
        np.testing.assert_array_equal(ragged.tokens[0, :end], new.tokens[0, :end])
        count = int(ragged.lengths[1])
        np.testing.assert_array_equal(ragged.tokens[1, :count], alone.tokens[0, :count])
        assert ragged.cache.position[0] == LENGTH + end

    def test_it_goes_on_from_its_cache_also_inside_a_jit(self, model, ids, new):
        part = generate(model, ids, max_new_tokens=4, eos_token_id=())

        @jax.jit
        def more(model, ids, cache):
            return generate(model, ids, max_new_tokens=7, eos_token_id=(), cache=cache).tokens

        np.testing.assert_array_equal(more(model, new.tokens[:, 4:5], part.cache), new.tokens[:, 5:])
        rest = generate(model, new.tokens[:, 4:5], max_new_tokens=7, eos_token_id=(), cache=part.cache)
        np.testing.assert_array_equal(rest.tokens, new.tokens[:, 5:])

    def test_stream_writes_what_generate_writes(self):
        tokenizer = load_tokenizer()
        model = make(vocab_size=len(tokenizer))
        ids = tokenizer("def main")["input_ids"]
        want = generate(model, [ids], max_new_tokens=9, eos_token_id=()).tokens[0]
        pieces = stream(model, tokenizer, "def main", max_new_tokens=9, eos_token_id=())
        text = "".join(pieces)
        assert pieces.num_tokens == 9
        assert text == tokenizer.decode([*ids, *want])[len(tokenizer.decode(ids)) :]

    @pytest.mark.xla_habits
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_decoding_holds_no_copy_of_weights_and_one_of_the_buffers(self, dtype):
        attention = {"num_heads": 16, "num_heads_kv": 16, "head_dim": 64}
        model = nnx.eval_shape(
            lambda: Mamba2ForCausalLM(
                Mamba2Config.preset("mamba2-370m").replace(
                    num_hidden_layers=2, attn_layer_idx=(1,), attn_cfg=attention
                ),
                dtype=dtype,
                param_dtype=dtype,
                rngs=nnx.Rngs(0),
            )
        )
        state = jax.eval_shape(
            lambda: start_state(
                Mamba2Cache.zeros(model.config, 1, dtype, capacity=2048),
                jnp.zeros((1, model.config.vocab_size)),
                size=64,
                pad=0,
            )
        )
        run = jax.jit(lambda *a: decode(*a, eos=(0,), pad=0), donate_argnums=1)
        budget = jax.ShapeDtypeStruct((), jnp.int32)
        compiled = run.lower(model, state, make_sampler("test"), None, budget).compile()
        # XLA on CPU attends in float32, so it holds the buffers once more, in that type; the weights are
        # ten times as large.
        in_float32 = sum(4 * leaf.size for leaf in jax.tree.leaves(state.cache))
        assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * in_float32
