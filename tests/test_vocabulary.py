"""The number of token ids: of resized models, and of the tokenizers that are saved with a checkpoint."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mamba2_jax import Mamba2ForCausalLM, generate
from mamba2_jax.config import Mamba2Config
from mamba2_jax.hub import EMBEDDED_MODEL
from mamba2_jax.lora import LoraConfig, add_lora
from mamba2_jax.weights.convert import convert

SIZES = {"hidden_size": 16, "head_dim": 8, "num_heads": 4, "n_groups": 1, "state_size": 8}
IDS = jnp.array([[3, 7, 1, 9, 11]])


def make(tied=False, **fields):
    config = Mamba2Config(**SIZES, num_hidden_layers=2, vocab_size=24, tie_word_embeddings=tied, **fields)
    return Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))


def tokenizer_files(folder, ids, added=()):
    folder.mkdir()
    content = {
        "model": {"type": "WordLevel", "unk_token": "t0", "vocab": {f"t{i}": i for i in ids}},
        "added_tokens": [{"id": i, "content": f"<{i}>", "special": True} for i in added],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("tied", "new_rows"), [(False, "mean"), (True, "zeros")])
def test_old_tokens_keep_their_logits_and_new_ones_are_likely_as_the_mean(tied, new_rows, tmp_path):
    model = make(tied, unpadded_vocab_size=20)
    before = model(IDS).logits
    model.resize_vocabulary(27, multiple=8, new_rows=new_rows)
    assert (model.config.vocab_size, model.config.unpadded_vocab_size) == (32, 27)
    after = model(IDS).logits
    np.testing.assert_allclose(after[..., :24], before, rtol=1e-6, atol=1e-7)
    want = before[..., :20].mean(-1, keepdims=True) if new_rows == "mean" else jnp.zeros((1, 5, 1))
    np.testing.assert_allclose(after[..., 24:], jnp.broadcast_to(want, (1, 5, 8)), rtol=1e-5, atol=1e-6)
    assert np.isfinite(model(jnp.array([[26, 2]])).logits).all()
    model.save_pretrained(tmp_path)
    again = Mamba2ForCausalLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert (again(IDS).logits == after).all()
    assert (generate(again, IDS, max_new_tokens=2).tokens < 27).all()


def test_a_smaller_vocabulary_and_what_is_refused():
    model = make()
    with pytest.raises(ValueError, match="eos_token_id=2 is outside"):
        model.resize_vocabulary(2)
    with pytest.raises(ValueError, match="size=0, wants a positive integer"):
        model.resize_vocabulary(0)
    with pytest.raises(ValueError, match="new_rows='random'"):
        model.resize_vocabulary(30, new_rows="random")
    before = model(IDS).logits
    model.resize_vocabulary(12)
    np.testing.assert_allclose(model(IDS).logits, before[..., :12], rtol=1e-6, atol=1e-7)
    add_lora(model, LoraConfig(rank=2, targets=("embeddings",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="have adapters"):
        model.resize_vocabulary(30)


@pytest.mark.parametrize(
    ("ids", "added", "count"),
    [(range(20), (), 20), ([0, 1, 5, 9], (17,), 18), (range(24), (), None), (range(4), (3,), 4)],
)
def test_the_config_follows_the_tokenizer_that_is_saved(ids, added, count, tmp_path):
    tokenizer = tokenizer_files(tmp_path / "tokenizer", ids, added)
    make(unpadded_vocab_size=22).save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    assert Mamba2Config.from_pretrained(tmp_path / "model").unpadded_vocab_size == count
    make().save_pretrained(tmp_path / "bare")
    convert(tmp_path / "bare", tmp_path / "converted", tokenizer=tokenizer)
    file = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert file.get("unpadded_vocab_size") == count


def test_a_tokenizer_beyond_the_model_names_the_way_out(tmp_path):
    tokenizer = tokenizer_files(tmp_path / "tokenizer", range(20), (30,))
    model = make()
    with pytest.raises(ValueError, match=r"ids up to 30, .* 24; .* or call resize_vocabulary\(31\)"):
        model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    model.resize_vocabulary(31)
    model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    assert Mamba2Config.from_pretrained(tmp_path / "model").vocab_size == 31


def test_ids_of_a_vocabulary_without_tokenizer_json(tmp_path):
    shutil.copy(EMBEDDED_MODEL / "config.json", tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 7}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 41}))
    assert Mamba2Config.from_pretrained(tmp_path).unpadded_vocab_size == 42
