"""What comes out of a run: a model of any of its checkpoints, and adapters on the command line."""

import json
import shutil

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import model_folder, run_config, texts_file, tiny_model, tokenizer

from mamba2_jax import Mamba2ForCausalLM
from mamba2_jax.cli import main
from mamba2_jax.training import CheckpointConfig, DataConfig, LoraOptions, OptimConfig, Trainer
from mamba2_jax.training.checkpoint import Checkpoints
from mamba2_jax.training.metrics import read_metrics
from mamba2_jax.training.step import TrainState

IDS = np.random.default_rng(0).integers(0, 28, (2, 16))


def train(output, **changes) -> Trainer:
    data = DataConfig(max_length=48, eval_share=0.1)
    config = run_config(output, steps=6, data=data, eval_every=2, **{"checkpoint": EVERY_TWO, **changes})
    trainer = Trainer(tiny_model(), config, texts_file(), tokenizer=tokenizer())
    trainer.fit()
    return trainer


EVERY_TWO = CheckpointConfig(every=2, keep=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that trains all weights."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, train(output)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run that trains an adapter and, beside it, the head and the decays."""
    output = tmp_path_factory.mktemp("runs") / "adapted"
    saved = ("lm_head", "A_log")
    lora = LoraOptions(rank=2, targets=("in_proj",), modules_to_save=saved, merge=True, use_dora=True)
    return output, train(output, lora=lora)


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def logits(folder) -> np.ndarray:
    return np.asarray(Mamba2ForCausalLM.from_pretrained(folder)(IDS).logits)


def test_a_checkpoint_becomes_a_model(whole, tmp_path, capsys):
    output, _ = whole
    assert main(["convert", str(output / "checkpoints" / "6"), str(tmp_path / "out")]) == 0
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(output / "model"))
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "checkpoint of step 6" in said(capsys)
    assert main(["convert", str(output), str(tmp_path / "out")]) == 2
    assert "not empty" in said(capsys)


def test_the_best_checkpoint_is_kept_and_chosen(whole, tmp_path, capsys):
    """Also after the run went on: a rate that spoils the weights makes all later ones worse."""
    copied = shutil.copytree(whole[0], tmp_path / "run")
    spoiling = OptimConfig(learning_rate=10.0, warmup=3)
    data = DataConfig(max_length=48, eval_share=0.1)
    config = run_config(
        copied, steps=10, data=data, eval_every=2, checkpoint=EVERY_TWO, optim=spoiling,
        resume=True, new_learning_rate=True,
    )  # fmt: skip
    told = []
    Trainer(tiny_model(), config, texts_file(), tokenizer=tokenizer(), report=told.append).fit()
    assert any("step 6, the best of [6, 10]" in line and "convert" in line for line in told)
    losses = {
        line["step"]: line["eval_loss"]
        for line in read_metrics(copied / "metrics.jsonl")
        if "eval_loss" in line
    }
    best = min(losses, key=losses.get)
    assert best == 6
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["10", "6"]
    assert main(["convert", str(copied), str(tmp_path / "best")]) == 0
    assert "checkpoint of step 6, the best of [6, 10]" in said(capsys)
    np.testing.assert_array_equal(logits(tmp_path / "best"), logits(whole[0] / "model"))


def test_a_checkpoint_of_an_adapter_is_merged(adapted, tmp_path, capsys):
    output, trainer = adapted
    assert {name.rpartition(".")[2] for name in trainer._trained} >= {"A_log", "A", "weight"}
    for source in (output, output / "adapter"):
        target = tmp_path / source.name
        assert main(["convert", str(source), str(target)]) == 0
        np.testing.assert_allclose(logits(target), logits(output / "model"), rtol=1e-5, atol=1e-6)
    base = Mamba2ForCausalLM.from_pretrained(model_folder())
    assert np.abs(logits(output / "model") - base(IDS).logits).max() > 1e-3
    capsys.readouterr()
    other = tiny_model()
    other.backbone.norm_f.weight[...] *= 2
    other.save_pretrained(tmp_path / "other")
    assert main(["convert", str(output), str(tmp_path / "x"), "--base", str(tmp_path / "other")]) == 2
    assert "not the weights that the adapter" in said(capsys)


def test_what_bfloat16_rounds_away_is_told_and_float32_keeps_it(adapted, tmp_path, capsys):
    output, _ = adapted
    source = [str(model_folder()), str(tmp_path / "a"), "--adapter", str(output / "adapter")]
    assert main(["convert", *source, "--dtype", "bfloat16"]) == 0
    assert "of what training changed (as a norm); --dtype float32 keeps it" in said(capsys)
    assert main(["convert", *source, "--dtype", "float32", "--overwrite"]) == 0
    assert "rounding" not in said(capsys)


def test_generate_and_info_take_an_adapter(adapted, tmp_path, capsys):
    output, _ = adapted
    texts = []
    for arguments in (
        ["--adapter", str(output / "adapter")],  # its base is the one that it names
        ["--adapter", str(output / "adapter"), "--model", str(model_folder())],
        ["--model", str(output / "model")],
    ):
        assert main(["generate", "one two", "--max-new-tokens", "12", "--dtype", "float32", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert main(["info", str(output / "adapter")]) == 0
    out = capsys.readouterr().out
    for words in (str(model_folder()), "in_proj", "lm_head, A_log", "DoRA yes"):
        assert words in " ".join(out.split())
    assert "vocabulary" not in out
    assert main(["info", "--adapter", str(output / "adapter")]) == 0
    assert "vocabulary" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "run/adapter"], "run/adapter: this is an adapter for"),
        (
            ["generate", "x", "--model", "run"],
            "run: this is a training run, not a model; give --model",
        ),
        (["info", "run/checkpoints/6"], "run/checkpoints/6: this is a training run, not a model"),
        (["generate", "x", "--adapter", "run/model"], "adapter_config.json"),
        (["generate", "x", "--adapter", "nowhere"], "nowhere"),
        (["convert", "run", "out", "--adapter", "run/adapter"], "run is a run, which has its own"),
        (["convert", "run/model", "out", "--base", "run/model"], "--base run/model: run/model is no adapter"),
        (
            ["convert", "run/model", "gs://bucket/out"],
            "gs://bucket/out: only folders and files of this machine",
        ),
        (["convert", "run", "s3://bucket/out"], "s3://bucket/out: only folders and files"),
    ],
)
def test_other_folders_say_what_they_are(arguments, message, adapted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(adapted[0])
    assert main(arguments) == 2
    assert message in said(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_nothing_is_written_to_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    with pytest.raises(ValueError, match="gs://bucket/model: only folders"):
        model.save_pretrained("gs://bucket/model")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="adapter, not a model"):
        Mamba2ForCausalLM.from_pretrained("a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_best_is_kept_and_one_that_was_not_evaluated_is_no_cause_to_warn(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(absl.logging, "warning", lambda *words: told.append(words))
    zero = jnp.int32(0)

    def save(checkpoints, losses):
        for step, loss in losses.items():
            state = TrainState(jnp.int32(step), {"a": jnp.ones(3)}, (), jax.random.key(0), zero, zero)
            checkpoints.save(state, {}, loss)
            checkpoints.wait()
        return checkpoints.steps()

    checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig(keep=1))
    assert save(checkpoints, {1: 0.5, 2: float("nan"), 3: 0.4, 4: 0.9, 5: None}) == [3, 5]
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", CheckpointConfig(keep=1))
    assert save(again, {6: None, 7: 0.6}) == [3, 7]
    assert save(again, {8: 0.4}) == [8]  # of equal ones the newest
    again.close()
    assert not [words for words in told if "metric" in str(words)]
