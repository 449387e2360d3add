"""The models of this package as models of lm-evaluation-harness, and runs of its tasks."""

import difflib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from mamba2_jax.evaluation.bits import prefix_token
from mamba2_jax.evaluation.plan import Progress
from mamba2_jax.evaluation.scores import loglikelihoods
from mamba2_jax.evaluation.texts import generate_texts
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """A model for `lm_eval.simple_evaluate`; its numbers are those of the harness's own HF backend.

    The choices of a question fork the state of its context, which is read once; so is a long prefix of many
    contexts, such as few-shot examples. On several processes, each calls the same functions.

    Args:
        model: the model, on one device or a mesh, with adapters or without.
        tokenizer: as `load_tokenizer` returns it.
        batch_size: rows per pass.
        max_length: longest text, whose first tokens are cut off, and the window of rolling log-likelihoods.
            None: no limit, as a state has none; the HF backend's limit is the config's, else 2048.
        add_bos_token: whether texts begin with the tokenizer's special tokens; None: as the tokenizer does.
        prefix_token_id: context of texts without one; None: bos, else eos.
        seed: random seed of sampling.
    """

    def __init__(
        self,
        model: Mamba2ForCausalLM,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
    ):
        super().__init__()
        prefix = prefix_token(tokenizer, model.config) if prefix_token_id is None else prefix_token_id
        if prefix is None:
            raise ValueError("HarnessModel: the model has no bos or eos token; give prefix_token_id")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_length, self.add_bos_token = batch_size, max_length, add_bos_token
        self._prefix, self._seed = prefix, seed

    @property
    def eot_token_id(self) -> int:
        """Return the id that ends a text."""
        eos = self.tokenizer.eos_token_id
        return self._prefix if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """Return the context of texts without one."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Return a name for the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, by the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text; special tokens as `add_special_tokens`, else `add_bos_token`, says."""
        if add_special_tokens is None:
            begun = has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = False if begun else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        total = sum(len(continuation) for _, continuation in pairs)
        with tqdm(total=total, desc="loglikelihood", unit=" tokens", disable=disable_tqdm) as bar:
            scores = loglikelihoods(self.model, pairs, rows=self.batch_size, progress=_shown_on(bar))
        answers = [(score.logprob, score.greedy) for score in scores]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cut off the first tokens of a context beyond `max_length`."""
        if self.max_length is None:
            return context, continuation
        if len(continuation) > self.max_length:
            raise ValueError(
                f"HarnessModel: a continuation of {len(continuation)} tokens is above max_length="
                f"{self.max_length}"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, token by token; of windows only with `max_length`."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = [([self.prefix_token_id], tokens)] if tokens else []
            if self.max_length is not None:
                options = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length}
                cut = utils.get_rolling_token_windows(tokens, context_len=1, **options)
                cut = [utils.make_disjoint_window(window) for window in cut]
            windows += [(None, *window) for window in cut]
            owners += [index] * len(cut)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for index, (logprob, _) in zip(owners, scores, strict=True):
            sums[index] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string of the task or the end id."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for indices in groups.values():
                contexts = [requests[index].args[0] for index in indices]
                new = self._generate(contexts, requests[indices[0]].args[1], _shown_on(bar))
                for index, text in zip(indices, new, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generate(self, contexts: list[str], options: dict[str, Any], progress: Progress) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options, default_max_gen_toks=256))
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stop = handle_stop_sequences(settings.pop("until"), eos=eos)
        new_tokens, sampled = settings.pop("max_gen_toks"), settings.pop("do_sample", False)
        unknown = [name for name in settings if name not in _SAMPLING]
        if unknown:
            raise ValueError(f"HarnessModel: unknown generation option {', '.join(unknown)} of a task")
        settings.setdefault("temperature", 1.0)
        if not sampled:
            settings = {k: v for k, v in settings.items() if k == "repetition_penalty"}
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        if self.max_length is not None:
            if new_tokens >= self.max_length:
                raise ValueError(
                    f"HarnessModel: {new_tokens} new tokens do not fit max_length={self.max_length}"
                )
            prompts = [prompt[-(self.max_length - new_tokens) :] for prompt in prompts]
        return generate_texts(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=new_tokens,
            stop=[string for string in stop if string],
            rows=self.batch_size,
            seed=self._seed,
            progress=progress,
            **settings,
        )

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes about the model into its results."""
        leaves = jax.tree.leaves(nnx.state(self.model, nnx.Param))
        return {
            "model_num_parameters": sum(leaf.size for leaf in leaves),
            "model_dtype": self.model.dtype.name,
            "model_source": None if self.model.origin is None else str(self.model.origin.folder),
        }


def _shown_on(bar: Any) -> Progress:
    """Return a function that shows progress on a bar of tqdm, from where the bar is now."""
    start = bar.n
    return lambda done, total: bar.update(start + done - bar.n)


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Run tasks of the harness by name, pattern (`mmlu_*`) or YAML file.

    Args:
        model: the model.
        tasks: names of tasks, groups or tags, or files of tasks.
        include_path: folders with further tasks.
        **options: of `lm_eval.simple_evaluate`, such as `num_fewshot` and `limit`.

    Returns:
        The results, as `simple_evaluate` returns them.

    Raises:
        ValueError: an unknown task; the message names similar ones.
        OSError: a data set that cannot be loaded.
    """
    folders: list[Any] = list(include_path)
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(manager.match_tasks([task]) or pathlib.Path(task).is_file() for task in tasks):
        manager = TaskManager(include_path=folders)  # reads the thousands of files of the harness
    chosen: list[str] = []
    for task in tasks:
        found = manager.match_tasks([task]) or ([task] if pathlib.Path(task).is_file() else [])
        if not found:
            similar = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"; similar: {', '.join(similar)}" if similar else ""
            raise ValueError(
                f"unknown task {task!r}{hint}; an own task is a YAML file, or in a folder of include_path"
            )
        chosen += found
    evaluate: Any = simple_evaluate  # whose decorator hides the signature
    try:
        results = evaluate(model, tasks=chosen, task_manager=manager, **options)
    except OSError as error:
        raise OSError(
            f"{', '.join(tasks)}: a data set cannot be loaded ({error}); without network, use tasks with "
            "local files (--include-path), or data sets that are in the cache"
        ) from error
    return dict(results or {})
