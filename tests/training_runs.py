"""Make a tiny model, a character tokenizer, texts and Trainers for the tests of training."""

import functools
import json
import pathlib
import string
import tempfile

import numpy as np
from flax import nnx

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, load_tokenizer
from mamba2_jax.training import CheckpointConfig, DataConfig, OptimConfig, TrainConfig, Trainer

CHARACTERS = string.ascii_lowercase + " .\n"
EOS = len(CHARACTERS)
STEPS = 20


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def model_folder() -> pathlib.Path:
    """Write a checkpoint of one small layer with a tokenizer of one id per character; return the folder."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    folder = pathlib.Path(_folder().name) / "model"
    config = Mamba2Config(
        hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, n_groups=2,
        vocab_size=EOS + 1, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)} | {"<end>": EOS}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    return folder


def tiny_model() -> Mamba2ForCausalLM:
    return Mamba2ForCausalLM.from_pretrained(model_folder(), dtype="float32")


@functools.cache
def tokenizer():
    return load_tokenizer(model_folder())


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(["one", "two", "three", "four", "five"], count)) + "."


@functools.cache
def texts_file() -> pathlib.Path:
    path = pathlib.Path(_folder().name) / "texts.jsonl"
    lines = [json.dumps({"text": words(5 + seed % 7, seed)}) for seed in range(60)]
    path.write_text("\n".join(lines) + "\n")
    return path


def run_config(output: pathlib.Path, **changes) -> TrainConfig:
    options = {
        "steps": STEPS,
        "batch_size": 2,
        "tensorboard": False,
        "progress": False,
        "data": DataConfig(max_length=48),
        "optim": OptimConfig(learning_rate=1e-2, warmup=3),
        "checkpoint": CheckpointConfig(every=5),
    }
    return TrainConfig(output=output, **{**options, **changes})


def make_trainer(output: pathlib.Path, data=None, report=lambda message: None, **changes) -> Trainer:
    data = texts_file() if data is None else data
    return Trainer(tiny_model(), run_config(output, **changes), data, tokenizer=tokenizer(), report=report)


def arrays_of(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in trainer._trained.items()}
