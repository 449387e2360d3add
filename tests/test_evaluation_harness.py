"""Tasks of lm-evaluation-harness: equal to the harness's own HF backend, item by item."""

import functools
import json

import datasets
import evaluation_tasks
import models
import numpy as np
import pytest
from evaluation_tasks import TASKS, tokenizer

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from mamba2_jax.cli import main  # noqa: E402
from mamba2_jax.evaluation import HarnessModel, harness, run_tasks  # noqa: E402

VOCABULARY = {"vocab_size": len(tokenizer())}  # the HF backend also generates ids without a token
TOLERANCE = 1e-4  # float32 sums over up to 80 tokens, of two libraries


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return evaluation_tasks.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def run(model, folder, **options):
    return run_tasks(model, TASKS, include_path=[str(folder)], bootstrap_iters=0, log_samples=True, **options)


@pytest.mark.parametrize("options", [{}, {"add_bos_token": False, "max_length": 40}], ids=str)
def test_answers_are_those_of_the_harness_own_backend(folder, options):
    theirs = HFLM(pretrained=models.torch_model(**VOCABULARY), tokenizer=tokenizer(), batch_size=1, **options)
    ours = HarnessModel(models.jax_model(**VOCABULARY), tokenizer(), batch_size=4, **options)
    want, got = (run(model, folder, num_fewshot=1) for model in (theirs, ours))
    for task in TASKS:
        for left, right in zip(want["samples"][task], got["samples"][task], strict=True):
            assert left["arguments"] == right["arguments"]
            if task == "tiny_until":
                assert left["resps"] == right["resps"]
                continue
            pairs = zip(np.ravel(left["resps"]), np.ravel(right["resps"]), strict=True)
            assert all(abs(float(one) - float(other)) < TOLERANCE for one, other in pairs)
    assert any(sample["resps"][0][0] for sample in got["samples"]["tiny_until"])
    assert got["results"]["tiny_choice"]["acc,none"] == want["results"]["tiny_choice"]["acc,none"]


@pytest.fixture(scope="module")
def checkpoint():
    folder = models.checkpoint(**VOCABULARY)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_command_prints_a_table_and_writes_the_results(folder, checkpoint, capsys, tmp_path):
    tasks = ["--tasks", "tiny_choice,tiny_rolling", "--include-path", str(folder), "--limit", "3"]
    output = tmp_path / "scores" / "results.json"
    assert main(["evaluate", "--model", checkpoint, *tasks, "--output-path", str(output)]) == 0
    results = json.loads(output.read_text())
    assert results["n-samples"]["tiny_choice"]["effective"] == 3
    assert results["config"]["model_num_parameters"] > 0
    table = capsys.readouterr().out
    for task, metric in (
        ("tiny_choice", "acc"),
        ("tiny_choice", "acc_norm"),
        ("tiny_rolling", "bits_per_byte"),
    ):
        (row,) = (line.split() for line in table.splitlines() if line.split()[:3] == [task, "none", metric])
        assert float(row[3]) == pytest.approx(results["results"][task][f"{metric},none"], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tiny_choise"], "unknown task 'tiny_choise'; similar: tiny_choice"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "humaneval"], "give --allow-code-execution"),
        (["--tasks", "tiny_choice", "--mesh", "rows=2"], "--mesh rows=2 wants AXIS=SIZE"),
        (["--tasks", "tiny_choice", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--tasks", "on_the_hub"], "on_the_hub: a data set cannot be loaded"),
    ],
)
def test_mistakes_are_named(arguments, message, folder, checkpoint, capsys, monkeypatch):
    text = (folder / "tiny_choice.yaml").read_text().replace("tiny_choice", "on_the_hub")
    text = "".join(line for line in text.splitlines(keepends=True) if "dataset" not in line)
    (folder / "on_the_hub.yaml").write_text(text + "dataset_path: nobody/nothing\n")
    own = functools.partial(harness.TaskManager, include_defaults=False)  # not the harness's 14,000 tasks
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, **defaults: own(include_path=include_path)
    )
    assert main(["evaluate", "--model", checkpoint, "--include-path", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
