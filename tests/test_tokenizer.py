import inspect
import io
import json
import os
import random
import subprocess
import sys
import textwrap

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mamba2_jax.config import Mamba2Config
from mamba2_jax.hub import EMBEDDED_MODEL
from mamba2_jax.tokenizer import SpecialTokenIds, load_tokenizer, special_token_ids, token_bytes

CORPUS = (inspect.getsource(textwrap) + inspect.getsource(random) + "été naïve 汉字 x  y\n").splitlines(
    keepends=True
)
CONFIG = Mamba2Config(
    vocab_size=1000, hidden_size=16, head_dim=8, num_heads=4, n_groups=1, num_hidden_layers=1, chunk_size=8
)


def _texts():
    rng = random.Random(0)
    letters = "abcdef  \n\t(){}=:_09éæ汉字😀\ufb01selfreturn"
    texts = ["", " ", "  two", "a", "\ttab", "trailing  ", "x=1234567", "\n", "e\u0301 é", "\u00a0nbsp"]
    texts += ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(100)]
    return texts + ["".join(CORPUS[i : i + 5]) for i in range(0, len(CORPUS) - 5, 20)]


def _train_sentencepiece(**changes):
    model = io.BytesIO()
    options = {
        "vocab_size": 900,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "control_symbols": ["[INST]", "[/INST]"],
        "character_coverage": 0.9999,
        "minloglevel": 2,
    }
    sentences = (line.rstrip("\n") for line in CORPUS)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, **(options | changes)
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def mistral_model():
    return _train_sentencepiece()


@pytest.fixture(scope="module")
def neox_folder(tmp_path_factory):
    """A GPT-NeoX tokenizer of 600 tokens in the files of the AntonV repositories."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    folder = tmp_path_factory.mktemp("neox")
    backend.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "mamba2"}')
    return folder


def test_embedded_tokenizer():
    tokenizer = load_tokenizer()
    found = token_bytes(tokenizer)
    backend = tokenizers.Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    for text in _texts():
        ids = tokenizer(text)["input_ids"]
        assert ids == backend.encode(text).ids
        assert tokenizer.decode(ids) == text
        assert b"".join(found[index] for index in ids) == text.encode()
    assert tokenizer.eos_token_id not in found
    config = Mamba2Config.from_pretrained()
    assert special_token_ids(tokenizer, config) == SpecialTokenIds(bos=0, eos=(0,), pad=1)


def test_that_tokenizers_do_without_pytorch_is_not_advised():
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
from mamba2_jax import load_tokenizer
load_tokenizer()
import transformers
assert not transformers.utils.is_torch_available()
transformers.logging.get_logger("transformers").warning("another warning")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr.strip()) == ("", "[transformers] another warning")


@pytest.mark.parametrize("with_settings", [True, False])
def test_gpt_neox_tokenizer(neox_folder, with_settings, tmp_path):
    from transformers import AutoTokenizer

    folder = neox_folder
    if not with_settings:
        folder = tmp_path
        (folder / "tokenizer.json").write_bytes((neox_folder / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(folder)
    backend = tokenizers.Tokenizer.from_file(str(neox_folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(neox_folder)
    for text in _texts():
        ids = tokenizer(text)["input_ids"]
        assert ids == backend.encode(text).ids == theirs(text)["input_ids"]
        assert tokenizer.decode(ids) == theirs.decode(ids)
    config = CONFIG.replace(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    assert special_token_ids(tokenizer, config) == SpecialTokenIds(bos=0, eos=(0,), pad=0)


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "tokenizer.model"])
def test_sentencepiece_file_equals_sentencepiece(name, mistral_model, tmp_path):
    (tmp_path / name).write_bytes(mistral_model)
    tokenizer = load_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=mistral_model)
    assert len(tokenizer) == processor.vocab_size()
    _check_against_sentencepiece(tokenizer, processor)


def test_codestral_files_equal_sentencepiece(mistral_model, tmp_path):
    # tokenizer.json as Mistral published it: the legacy pipeline, with settings that name LlamaTokenizer
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model.v3").write_bytes(mistral_model)
    folder = tmp_path / "codestral"
    load_tokenizer(source).save_pretrained(folder)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "legacy": False,
        "added_tokens_decoder": {"3": {"content": "[INST]", "special": True, "normalized": False}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text('{"model_type": "mamba2"}')
    (folder / "tokenizer.model.v3").write_bytes(b"not looked at: tokenizer.json is there")
    processor = sentencepiece.SentencePieceProcessor(model_proto=mistral_model)
    _check_against_sentencepiece(load_tokenizer(folder), processor)


def _check_against_sentencepiece(tokenizer, processor):
    found = token_bytes(tokenizer)
    for text in _texts():
        ids = tokenizer(text)["input_ids"]
        assert ids == [processor.bos_id(), *processor.encode(text)], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == processor.decode(ids) == text
        assert b"".join(found[index] for index in ids[1:]) == (f" {text}" if text else "").encode()
    pieces = ["<s>", "[INST]", "[/INST]"]
    assert tokenizer("[INST][/INST]")["input_ids"] == [processor.piece_to_id(piece) for piece in pieces]
    # Codestral's config file says 0 for all three
    config = CONFIG.replace(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    chosen = special_token_ids(tokenizer, config)
    assert (chosen.bos, chosen.eos, chosen.pad) == (1, (2,), 2)
    assert len(chosen.notes) == 2
    assert "bos_token_id: the config says 0, the tokenizer 1; using 1" in chosen.notes


def test_the_newest_sentencepiece_version_is_taken(mistral_model, tmp_path):
    (tmp_path / "tokenizer.model.v1").write_bytes(b"old")
    (tmp_path / "tokenizer.model.v3").write_bytes(mistral_model)
    assert len(load_tokenizer(tmp_path)) == 900


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
    ],
)
def test_other_sentencepiece_models_are_refused(changes, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(_train_sentencepiece(**changes))
    with pytest.raises(ValueError, match=r"not a byte-pair model.*convert it to tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_vocab_and_merges(neox_folder, tmp_path):
    model = json.loads((neox_folder / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPTNeoXTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')
    tokenizer = load_tokenizer(tmp_path)
    expected = load_tokenizer(neox_folder)
    for text in _texts():
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]


def test_a_folder_without_tokenizer_names_the_one_to_use(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="EleutherAI/gpt-neox-20b") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "nope")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model.v3"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00garbage", b'{"model": 3}'])
def test_broken_files_name_the_folder(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(
        ValueError, match="4096 ids, the model's vocab_size is 1000; they do not belong together"
    ):
        special_token_ids(load_tokenizer(), CONFIG)
    special_token_ids(load_tokenizer(), CONFIG.replace(vocab_size=4096))


def test_special_ids_without_any_of_the_tokenizers_own(neox_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((neox_folder / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    config = CONFIG.replace(bos_token_id=5, eos_token_id=(6, 7), pad_token_id=None)
    assert special_token_ids(tokenizer, config) == SpecialTokenIds(bos=5, eos=(6, 7), pad=6)
    config = CONFIG.replace(bos_token_id=None, eos_token_id=None, pad_token_id=9)
    assert special_token_ids(tokenizer, config) == SpecialTokenIds(bos=None, eos=(), pad=9)
    config = CONFIG.replace(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    assert special_token_ids(tokenizer, config).pad == 0


def test_several_end_ids_stay_when_the_tokenizers_is_among_them(neox_folder):
    tokenizer = load_tokenizer(neox_folder)
    config = CONFIG.replace(bos_token_id=0, eos_token_id=(5, 0), pad_token_id=None)
    assert special_token_ids(tokenizer, config) == SpecialTokenIds(bos=0, eos=(5, 0), pad=5)
    chosen = special_token_ids(tokenizer, config.replace(eos_token_id=(5, 6)))
    assert chosen.eos == (0,)
    assert chosen.notes == ("eos_token_id: the config says (5, 6), the tokenizer 0; using 0",)
