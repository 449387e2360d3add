"""Training from random weights: the command, its tokenizer and model, and rows that become longer."""

import json
import pathlib

import numpy as np
import pytest
from test_training_carry import documents
from training_runs import words

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, load_tokenizer
from mamba2_jax.cli import main
from mamba2_jax.cli.architecture import read_architecture, with_vocabulary
from mamba2_jax.tokenizer import train_tokenizer
from mamba2_jax.training import DataConfig
from mamba2_jax.training.data import iterate_texts
from mamba2_jax.training.lanes import Lanes
from mamba2_jax.training.metrics import read_metrics

SMALL = {"hidden_size": 16, "head_dim": 8, "state_size": 8, "num_hidden_layers": 1, "chunk_size": 16}
TEXTS = [{"text": f"{words(20 + i, i)} Grüße, 你好 \U0001f600"} for i in range(24)]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Write texts and an options file with the architecture in it; return the file."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    options = {
        "data": {"files": str(folder / "texts.json"), "max_length": 8, "eval_share": 0.1},
        "from_config": SMALL,
        "tokenizer_vocab": 280,
        "steps": 12,
        "batch_size": 2,
        "carry_state": True,
        "curriculum": ["4:3"],
        "optim": {"learning_rate": 2e-2, "warmup": 2},
        "checkpoint": {"every": 6},
        "progress": False,
        "tensorboard": False,
    }
    (folder / "small.yaml").write_text(json.dumps(options))  # JSON is YAML
    return folder / "small.yaml"


def test_a_new_model_learns_and_goes_on(options, tmp_path, capsys):
    run = tmp_path / "run"
    common = ["pretrain", "--config", str(options), "--output", str(run)]
    assert main([*common, "--steps", "4"]) == 0
    said = capsys.readouterr().err
    assert "tokenizer: 280 tokens, trained on the data" in said
    assert "a new model of" in said
    assert main([*common, "--resume"]) == 0  # without reading the texts for the tokenizer again
    assert "trained on the data" not in capsys.readouterr().err
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["tokens"] for line in lines[:6]] == [8, 8, 8, 16, 16, 16]
    assert abs(lines[0]["loss"] - np.log(288)) < 0.1  # embeddings are small: as of the uniform distribution
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    model, tokenizer = Mamba2ForCausalLM.from_pretrained(run / "model"), load_tokenizer(run / "model")
    assert model.config.vocab_size == 288
    assert model.config.real_vocab_size == len(tokenizer) == 280
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, 1)
    assert tokenizer.decode(tokenizer.encode(TEXTS[3]["text"])) == TEXTS[3]["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a new model has no tokenizer: name one (--tokenizer)"),
        (["--tokenizer-vocab", "300", "--tokenizer", "x"], "a new model has no tokenizer"),
        (["--tokenizer-vocab", "20"], "vocab_size=20 must be at least 258"),
        (
            ["--tokenizer-vocab", "300", "--from-config", "nofile.yaml"],
            "no such file or folder",
        ),
        (
            ["--tokenizer-vocab", "300", "--from-config", '{"hiden_size": 8}'],
            "no field 'hiden_size'",
        ),
        (["--config", "mamba2-130m"], "from_config=mamba2-130m: a new model has no tokenizer"),
        (["--config=model.json"], "from_config=model.json: a new model has no tokenizer"),
        (["--tokenizer-vocab", "300", "--model", "x"], "is a new model; leave model=x out"),
        (["--tokenizer-vocab", "300", "--lora.rank", "2"], "lora.* adapts a trained model"),
        (["--tokenizer-vocab", "300", "--curriculum", "8:2"], "curriculum needs carry_state"),
        (["--tokenizer-vocab", "300", "--carry-state", "--curriculum", "8"], "'8' must be LENGTH:STEPS"),
        (
            ["--tokenizer-vocab", "300", "--carry-state", "--curriculum", "64:9", "32:9"],
            "each length must be above the one before",
        ),
    ],
)
def test_bad_options_are_told(arguments, message, options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("model.json").write_text(json.dumps(SMALL))
    texts = options.with_name("texts.json")
    base = ["--data", str(texts), "--output", str(tmp_path / "run"), "--steps", "2", "--no-progress"]
    try:
        code = main(["pretrain", *base, *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
    assert main(["finetune", *base, "--tokenizer-vocab", "300"]) == 2
    assert "tokenizer_vocab=300 needs from_config" in capsys.readouterr().err


def test_architectures(tmp_path):
    preset = Mamba2Config.preset("mamba2-370m")
    assert read_architecture("mamba2-370m") == preset
    small = read_architecture(json.dumps(SMALL))
    assert (small.num_heads, small.n_groups, small.rescale_prenorm_residual) == (4, 1, True)
    other = read_architecture('{"preset": "mamba2-370m", "num_hidden_layers": 2}')
    assert other == preset.replace(num_hidden_layers=2)
    file = pathlib.Path(tmp_path, "config.json")
    file.write_text(json.dumps(preset.to_dict()))
    assert read_architecture(str(file)) == read_architecture(str(tmp_path)) == preset
    tokenizer = train_tokenizer(["one two three"], 260)
    fitted = with_vocabulary(preset, tokenizer)
    count = len(tokenizer)
    assert (fitted.vocab_size, fitted.real_vocab_size, fitted.bos_token_id) == (272, count, 0)


def test_texts_for_a_tokenizer_come_from_every_kind_of_record():
    records = [
        {"text": "a", "id": "x"},
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": None}]},
        {"prompt": "c", "completion": "d\ud800"},
        {"text": 3},
    ]
    assert list(iterate_texts(records, DataConfig())) == ["a", "b", "c", "d"]


def test_lanes_of_a_curriculum_read_what_plain_lanes_read():
    lengths = (37, 5, 80, 2, 17, 24)

    def read(**options):
        lanes = Lanes(documents(lengths), rows=2, length=10, **options)
        batches = list(lanes)
        pairs = [
            (int(token), int(target))
            for batch in batches
            for name in [batch["segment_ids"] > 0]
            for token, target in zip(batch["input_ids"][name], batch["targets"][name], strict=True)
        ]
        return [batch["input_ids"].shape[1] for batch in batches], sorted(pairs)

    shapes, pairs = read(curriculum=((3, 2), (5, 4)))
    assert shapes[:7] == [3, 3, 5, 5, 5, 5, 10]
    assert pairs == read()[1]
