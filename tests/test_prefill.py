"""Prompts: read in pieces, as embeddings, and with end ids in the padding of the vocabulary."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import SIZES, random_ids, random_jax_model, relative

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, generate, load_tokenizer, stream
from mamba2_jax.generation import decoding, prefill, request
from mamba2_jax.generation.options import Options
from mamba2_jax.generation.sampling import make_sampler
from mamba2_jax.generation.search import check_search
from mamba2_jax.hub import EMBEDDED_MODEL

HYBRID = Mamba2Config(**SIZES).replace(
    attn_layer_idx=(1,), attn_cfg={"num_heads": 4, "head_dim": 8, "d_conv": 4}
)


@pytest.fixture(scope="module")
def model():
    return random_jax_model(HYBRID)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(prefill, "PIECE", 16)
    monkeypatch.setattr(request, "PIECE", 16)


@pytest.mark.parametrize(("side", "goes_on"), [("left", True), ("right", False)])
def test_pieces_give_what_the_whole_prompt_gives(model, short_pieces, side, goes_on):
    lengths = (69, 3, 40)
    ids, mask = random_ids(3, 69), np.zeros((3, 69), int)
    for row, length in enumerate(lengths):
        mask[row, slice(69 - length, 69) if side == "left" else slice(length)] = 1
    cache = model(random_ids(3, 5, seed=1)).cache if goes_on else None
    options = {"max_new_tokens": 6, "eos_token_id": (), "return_logprobs": True, "repetition_penalty": 1.2}
    new = generate(model, ids, mask, cache=cache, **options)
    whole = model(ids, mask, cache=cache)
    last = (np.full(3, 69) if side == "left" else np.array(lengths)) - 1
    np.testing.assert_allclose(
        new.logprobs[:, 0],
        jax.nn.log_softmax(whole.logits[np.arange(3), last])[np.arange(3), new.tokens[:, 0]],
        atol=1e-5,
    )
    for row in range(3):
        text = np.concatenate([ids[row][mask[row] == 1], new.tokens[row]])[None]
        want = model(text, cache=None if cache is None else cache[row]).cache
        for name in ("ssm", "conv", "position"):
            pairs = zip(
                jax.tree.leaves(getattr(new.cache[row], name)),
                jax.tree.leaves(getattr(want, name)),
                strict=True,
            )
            assert all(relative(mine, other) < 1e-5 for mine, other in pairs)
        kept, all_kept = new.cache.attention[1].keys[row], want.attention[1].keys[0]
        used = int(new.cache.position[row])
        assert relative(kept[:used], all_kept[:used]) < 1e-5


def test_pieces_and_buffers_are_few_and_waste_little():
    assert [prefill.padded_length(n) for n in (2048, 2049, 4096, 4097, 65536)] == [
        2048,
        2304,
        4096,
        5632,
        65536,
    ]
    for length in range(2049, 40000, 613):
        piece = prefill.piece_size(length)
        count = -(-length // piece)  # pieces that are read
        assert piece <= 2048
        assert (count * piece - length) * 8 <= length
    sizes = {(prefill.piece_size(n), prefill.padded_length(n)) for n in range(2049, 65537)}
    assert len(sizes) < 8 * 2 * 5  # programs for 2k to 64k


def test_memory_does_not_grow_with_the_prompt():
    model = random_jax_model(Mamba2Config(**SIZES))
    search = check_search("test", model, Options(max_new_tokens=16))

    def temporaries(length: int) -> int:
        padded = prefill.padded_length(length)
        ids = jax.ShapeDtypeStruct((1, padded), jnp.int32)
        program = decoding._generate.lower(
            model,
            None,
            (ids, ids, None, None),
            None,
            make_sampler("test"),
            (),
            None,
            jax.ShapeDtypeStruct((), jnp.int32),
            search=search,
            size=16,
            piece=prefill.piece_size(length),
            capacity=0,
            eos=(2,),
            pad=0,
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(65536)
    assert long < 1.1 * short


def test_embeddings_continue_as_their_ids_do(model):
    ids = random_ids(2, 9)
    mask = np.array([[0] * 2 + [1] * 7, [1] * 9])
    embeds = model.backbone.embeddings(jnp.asarray(ids), dtype=model.dtype)
    want = generate(model, ids, mask, max_new_tokens=5)
    got = generate(model, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=5)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    with pytest.raises(ValueError, match="exactly one of them"):
        generate(model, ids, inputs_embeds=embeds, max_new_tokens=5)
    with pytest.raises(ValueError, match="exactly one of them"):
        generate(model, max_new_tokens=5)


class TestEnds:
    def test_an_end_in_the_padding_ends_a_text(self):
        config = Mamba2Config(**SIZES).replace(unpadded_vocab_size=90, eos_token_id=(2, 93))
        model = random_jax_model(config)
        ids = random_ids(4, 9, vocab=90)
        table, best = model.output_weight, int(model(ids).logits[0, -1, :90].argmax())
        model.lm_head.weight[...] = table.at[93].set(3 * table[best])
        logits = np.array(model(ids).logits[:, -1])
        logits[:, [90, 91, 92, 94, 95]] = -np.inf
        new = generate(model, ids, max_new_tokens=8)
        np.testing.assert_array_equal(new.tokens[:, 0], logits.argmax(1))
        assert (new.tokens[:, 0] == 93).any()
        assert (new.lengths[new.tokens[:, 0] == 93] == 1).all()

    def test_an_end_outside_is_refused(self):
        model = random_jax_model(Mamba2Config(**SIZES))
        for options, message in (
            ({"eos_token_id": 96}, "eos_token_id=96 lies outside the vocabulary 0..95"),
            ({"eos_token_id": (2, 90), "vocab_size": 90}, "eos_token_id=90 lies outside the ids 0..89"),
        ):
            with pytest.raises(ValueError, match=message):
                generate(model, [[5]], max_new_tokens=1, **options)
        with pytest.raises(ValueError, match="stream: eos_token_id=4096 lies outside"):
            stream(
                Mamba2ForCausalLM.from_pretrained(),
                load_tokenizer(),
                "x",
                max_new_tokens=1,
                eos_token_id=4096,
            )

    def test_those_of_the_generation_config_count(self, tmp_path):
        folder = shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")
        free = generate(Mamba2ForCausalLM.from_pretrained(folder), [[5, 6, 7]], max_new_tokens=8)
        end = int(free.tokens[0, 2])
        file = folder / "generation_config.json"
        file.write_text(json.dumps({"eos_token_id": [end, 0]}))
        model = Mamba2ForCausalLM.from_pretrained(folder)
        assert model.end_ids == (end, 0)
        assert generate(model, [[5, 6, 7]], max_new_tokens=8).lengths.tolist() == [
            free.tokens[0].tolist().index(end) + 1
        ]
        for content in ("[]", "{", '{"eos_token_id": [1, "2"]}', '{"eos_token_id": true}'):
            file.write_text(content)
            with pytest.raises(ValueError, match="generation_config.json"):
                Mamba2ForCausalLM.from_pretrained(folder)
