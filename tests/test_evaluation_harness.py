"""Tasks of lm-evaluation-harness: equal to the harness's own HF backend, item by item."""

import datasets
import evaluation_tasks
import models
import numpy as np
import pytest
from evaluation_tasks import TASKS, tokenizer

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from mamba2_jax.evaluation import HarnessModel, run_tasks  # noqa: E402

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


@pytest.mark.parametrize("options", [{}, {"add_bos_token": False}, {"max_length": 40}], ids=str)
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
