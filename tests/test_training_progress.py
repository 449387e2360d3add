"""What a run shows and how it goes on: true rates, time left, MFU, more steps, another learning rate."""

import pathlib
import shutil
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from training_runs import run_config, texts_file, tiny_model, tokenizer

from mamba2_jax import Mamba2Config
from mamba2_jax.training import CheckpointConfig, DataConfig, OptimConfig, Trainer, loop, speed
from mamba2_jax.training.config import spacing
from mamba2_jax.training.metrics import read_metrics
from mamba2_jax.training.speed import Speed, operations_per_token, peak_operations

PAUSE = 0.05  # seconds of each step


def make_trainer(output, model=None, report=lambda line: None, **changes) -> Trainer:
    options = {"steps": 10, "data": DataConfig(max_length=48, eval_share=0.1)}
    config = run_config(output, **{**options, "checkpoint": CheckpointConfig(), **changes})
    return Trainer(model or tiny_model(), config, texts_file(), tokenizer=tokenizer(), report=report)


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """A run whose every step takes at least `PAUSE`, with evaluations and checkpoints; its folder."""
    output = tmp_path_factory.mktemp("runs") / "slow"

    def step(*arguments, **options):
        out = jax.block_until_ready(real(*arguments, **options))
        time.sleep(PAUSE)
        return out

    real = loop.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        make_trainer(output).fit()
    return output


def test_the_rate_is_never_above_that_of_the_steps(slow_run):
    lines = [line for line in read_metrics(slow_run / "metrics.jsonl") if "loss" in line]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    assert len(rates) == len(lines) - 1
    assert max(rates) < 2 * 48 / PAUSE
    assert min(rates) > 10  # nor slowed by compiling


def test_a_short_run_evaluates_and_saves(slow_run):
    held_out = [line["step"] for line in read_metrics(slow_run / "metrics.jsonl") if "eval_loss" in line]
    assert held_out == [0, 2, 4, 6, 8, 10]
    kept = sorted(int(path.name) for path in (slow_run / "checkpoints").iterdir())
    assert kept[-2:] == [8, 10]
    assert [spacing(steps) for steps in (1, 2, 60, 2500, 10**6)] == [1, 1, 12, 500, 500]


def test_the_clock_leaves_out_compiling_evaluating_and_saving(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    clock = Speed()

    def wait(seconds):
        now[0] += seconds

    with clock.aside("evaluate"):
        wait(30)
    wait(60)
    clock.step_done(1000)  # compiled
    assert clock.tokens_per_second() is None
    assert clock.seconds_left(9, {}) is None
    wait(2)
    clock.step_done(1000)
    with clock.aside("save"):
        wait(7)
    wait(2)
    clock.step_done(1000)
    assert clock.tokens_per_second() == 500
    assert clock.seconds_left(10, {"evaluate": 2, "save": 1}) == 20 + 60 + 7
    for _ in range(speed.WINDOW):
        wait(4)
        clock.step_done(1000)
    assert clock.tokens_per_second() == 250


def test_utilization_is_shown_where_the_peak_is_known():
    device = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    assert peak_operations(device, "bfloat16") == 989e12
    assert peak_operations(device, "float32") is None
    assert peak_operations(jax.devices("cpu")[0], "bfloat16") is None
    config = Mamba2Config(
        hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, n_groups=2, vocab_size=30,
        tie_word_embeddings=True,
    )  # fmt: skip
    names = {
        "backbone.embeddings.weight": (30, 16),
        "backbone.layers.0.mixer.in_proj.weight_zx": (16, 2, 32),
        "backbone.layers.0.mixer.conv1d.weight_x": (4, 32),
        "backbone.layers.0.mixer.A_log": (4,),
    }
    arrays = {name: np.zeros(shape, np.float32) for name, shape in names.items()}
    matrices, state = 30 * 16 + 16 * 64 + 4 * 32, 4 * 8 * 8
    assert operations_per_token(config, arrays, {}) == 6 * matrices + 15 * state
    adapter = {"backbone.layers.0.mixer.in_proj.lora.default.A": np.zeros((16, 2), np.float32)}
    assert operations_per_token(config, adapter, arrays) == 6 * 32 + 4 * matrices + 15 * state


@pytest.fixture
def copied(slow_run, tmp_path):
    return pathlib.Path(shutil.copytree(slow_run, tmp_path / "run"))


def test_more_steps_and_another_rate_go_on_and_are_told(copied):
    said = []
    changes = {"steps": 14, "new_learning_rate": True, "optim": OptimConfig(learning_rate=5e-3, warmup=3)}
    trainer = make_trainer(copied, report=said.append, resume=True, **changes)
    assert trainer.fit().step == 14
    assert "steps: 10 until now, 14 from here on" in said
    assert "learning_rate: 0.01 until now, 0.005 from here on" in said
    lines = [line for line in read_metrics(copied / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 15))
    rate = lines[10]["learning_rate"]
    assert any(f"the next learning rate is {rate:.3g}, where it was 0" in line for line in said)
    assert rate > lines[9]["learning_rate"] == lines[13]["learning_rate"] == 0  # as `final` says


def test_a_finished_run_goes_on_for_more_epochs(tmp_path):
    """As a run of as many epochs, up to the rows that a shorter run packs at its end."""
    options = {"steps": None, "optim": OptimConfig(learning_rate=1e-2, schedule="constant")}
    straight, again = (tmp_path / name for name in ("straight", "again"))
    make_trainer(straight, epochs=2, **options).fit()
    one = make_trainer(again, epochs=1, **options)
    one.fit()
    two = make_trainer(again, epochs=2, resume=True, **options)
    assert two.fit().step == two.steps > one.steps
    losses = [
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        for folder in (straight, again)
    ]
    same = one.steps // 2
    assert losses[0][:same] == losses[1][:same]
    assert len(losses[1]) == two.steps


def test_other_weights_are_refused(copied):
    model = tiny_model()
    model.backbone.norm_f.weight[...] *= 2
    with pytest.raises(ValueError, match=r"the weights that the run began with \(base\) are other ones"):
        make_trainer(copied, model, resume=True).fit()
