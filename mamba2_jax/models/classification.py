"""Mamba-2 with a classification head: one row of scores per text, read at its last valid token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.labels import PROBLEM_TYPES, ProblemType, default_names, labels_dict, read_labels
from mamba2_jax.config.table import SCORE, score_tensor
from mamba2_jax.files import read_json
from mamba2_jax.layers.parts import Projection
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.inputs import as_array, batch_and_length, check_inputs
from mamba2_jax.models.mamba2 import Mamba2Model
from mamba2_jax.models.origin import checkpoint_folder
from mamba2_jax.models.pooling import last_valid
from mamba2_jax.models.pretrained import PretrainedModel
from mamba2_jax.ops.checks import check_choice, check_dtype, check_integer, check_shape, is_concrete
from mamba2_jax.ops.cross_entropy import IGNORED_LABEL, summed_cross_entropy
from mamba2_jax.typing import Array, DTypeLike, Float
from mamba2_jax.weights import LoadReport, open_checkpoint


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mamba2ClassifierOutput:
    """Output of `Mamba2ForSequenceClassification`."""

    logits: Float[Array, "b labels"]
    """Scores of the labels, float32."""
    cache: Mamba2Cache
    """State after each row's last token that is not padding."""
    hidden_states: tuple[Float[Array, "b l d"], ...] | None = None
    """With `output_hidden_states`: the output of each block, then of the final norm."""
    loss: Float[Array, ""] | None = None
    """With `labels`: the mean loss of the problem type."""


class Mamba2ForSequenceClassification(PretrainedModel):
    """`Mamba2Model`, then scores of labels for each row, from its last token that is not padding.

    The parameters and files are those of transformers' `...ForSequenceClassification` classes: `score.weight`
    beside the backbone, labels by name in `config.json`.

    Args:
        config: sizes and options.
        num_labels: number of labels, or of values in a regression.
        label_names: their names; None: `LABEL_0`, ...
        problem_type: "regression" (mean squared error), "single_label_classification" (cross entropy) or
            "multi_label_classification" (binary cross entropy per label). None: by the labels of a call, as
            in transformers: one label is a regression, integers are classes, floats are several labels.
        dtype: compute dtype of matrix products and activations.
        param_dtype: dtype of the initial parameters.
        ssd_implementation: `implementation` of `ops.ssd`.
        rngs: source of the initial values.

    >>> model = Mamba2ForSequenceClassification.from_pretrained(label_names=("test", "library"))
    >>> model(jnp.array([[1, 2, 3]])).logits.shape
    (1, 2)
    """

    _has_head = False

    def __init__(
        self,
        config: Mamba2Config,
        *,
        num_labels: int | None = None,
        label_names: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        ssd_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.label_names = _names(label_names, num_labels)
        check_choice(type(self).__name__, "problem_type", problem_type, (None, *PROBLEM_TYPES))
        self.problem_type: ProblemType | None = problem_type
        self.backbone = Mamba2Model(
            config, dtype=dtype, param_dtype=param_dtype, ssd_implementation=ssd_implementation, rngs=rngs
        )
        options = {"bias": False, "dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.score = Projection(config.hidden_size, (len(self.label_names),), **options)

    @property
    def num_labels(self) -> int:
        """Return the number of labels."""
        return len(self.label_names)

    def __call__(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        cache: Mamba2Cache | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        output_hidden_states: bool = False,
    ) -> Mamba2ClassifierOutput:
        """Compute the scores `(b, labels)`; jitted, compiled once per input shape.

        Args:
            input_ids: `(b, l)` token ids.
            attention_mask: `(b, l)` of 0/1; padding at the left or the right end of a row, which changes no
                number. Without it, the last position of each row is read, whatever id it has.
            cache: the state to continue from, for a text in several pieces.
            inputs_embeds: `(b, l, d)` instead of `input_ids`: rows of the embedding table.
            labels: classes `(b,)`, of which -100 is not in the loss; or floats `(b, labels)`, or `(b,)` for a
                regression of one value.
            output_hidden_states: also return every block's output.

        Raises:
            ValueError: an invalid argument; the message names it.
        """
        name = type(self).__name__
        inputs = check_inputs(name, self.config, input_ids, attention_mask, None, cache, inputs_embeds)
        problem = self.problem_type
        if labels is not None:
            batch, _ = batch_and_length(inputs[0], inputs_embeds)
            labels, problem = self._checked_labels(as_array(labels), batch)
        with self.backbone.on_its_device():
            options = {"problem": problem, "output_hidden_states": output_hidden_states}
            return _run_classifier(self, *inputs, labels, **options)

    def _checked_labels(self, labels, batch: int) -> tuple[Any, ProblemType]:
        """Check the labels of a batch; return them with the axes that the loss wants, and the problem."""
        name, problem = type(self).__name__, self.problem_type
        if problem is None:
            whole = jnp.issubdtype(labels.dtype, jnp.integer)
            if self.num_labels == 1:
                problem = "regression"
            else:
                problem = "single_label_classification" if whole else "multi_label_classification"
        if problem == "single_label_classification":
            check_shape(name, "labels", labels, "b", b=batch)
            check_integer(name, labels=labels)
            if is_concrete(labels):
                values = np.asarray(labels)
                wrong = values[((values < 0) | (values >= self.num_labels)) & (values != IGNORED_LABEL)]
                if wrong.size:
                    raise ValueError(f"{name}: label {wrong[0]} lies outside 0..{self.num_labels - 1}")
            return labels, problem
        if len(labels.shape) == 1 and self.num_labels == 1:
            labels = labels[:, None]
        check_shape(name, "labels", labels, "b labels", b=batch, labels=self.num_labels)
        if problem == "multi_label_classification":
            check_dtype(name, labels=labels)
        return labels, problem

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        num_labels: int | None = None,
        label_names: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        ssd_implementation: str | None = None,
        sharding: "Mesh | Sharding | Callable[[str], Sharding] | None" = None,
        revision: str | None = None,
        allow_non_finite: bool = False,
        report: Callable[[LoadReport], None] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> "Mamba2ForSequenceClassification":
        """Load a classifier, or a language model, whose head is then replaced by a new one.

        Args:
            path: as for `Mamba2ForCausalLM.from_pretrained`, as all arguments that are not described here.
            num_labels: None: those of the files, else 2.
            label_names: names of the labels, instead of those in the files.
            problem_type: as for the class; None: that of the files.
            dtype: compute dtype.
            param_dtype: dtype of the parameters. A new head without it is float32.
            ssd_implementation: passed to `ops.ssd`.
            sharding: device placement.
            revision: branch, tag or commit of a hub id.
            allow_non_finite: accept weights that hold NaN or infinity.
            report: called with the `LoadReport`; its tensors include `score.weight` if the files have one.
            rngs: source of the initial values of a new head; None: `nnx.Rngs(0)`.

        Raises:
            ValueError: as `Mamba2ForCausalLM.from_pretrained`; another number of labels than in the files.
        """
        folder = checkpoint_folder(path, revision)
        config = Mamba2Config.from_pretrained(folder)
        with open_checkpoint(folder) as checkpoint:
            stored = SCORE in checkpoint.tensors
        names, problem = None, None
        if stored:
            file = folder / "config.json"
            names, problem = read_labels(read_json(file) if file.is_file() else {})
        if label_names is None and num_labels in (None, len(names or ())):
            label_names = names
        label_names = _names(label_names, num_labels)
        score = score_tensor(config, len(label_names))
        new = {}
        if not stored:
            options = {"bias": False, "dtype": jnp.float32, "param_dtype": param_dtype or jnp.float32}
            rngs = nnx.Rngs(0) if rngs is None else rngs
            weight = Projection(config.hidden_size, (len(label_names),), rngs=rngs, **options).weight[...]
            new = {SCORE: jax.device_put(weight, _placement(sharding))}
        return cls._load(
            folder,
            config,
            dtype=dtype,
            param_dtype=param_dtype,
            sharding=sharding,
            allow_non_finite=allow_non_finite,
            report=report,
            extra=(score,) if stored else (),
            new=new,
            ssd_implementation=ssd_implementation,
            label_names=label_names,
            problem_type=problem if problem_type is None else problem_type,
        )

    def _extra_tensors(self) -> tuple:
        return (score_tensor(self.config, self.num_labels),)

    def _config_keys(self) -> dict[str, Any]:
        return labels_dict(self.label_names, self.problem_type)


@partial(jax.jit, static_argnames=("problem", "output_hidden_states"))
def _run_classifier(
    model: Mamba2ForSequenceClassification,
    *inputs,
    problem: ProblemType | None,
    output_hidden_states: bool,
) -> Mamba2ClassifierOutput:
    *inputs, labels = inputs
    out = model.backbone.forward(*inputs, output_hidden_states=output_hidden_states)
    logits = model.score(last_valid(out.last_hidden_state, inputs[1])[:, None])[:, 0]  # (b, labels) float32
    loss = None if labels is None else classification_loss(logits, labels, problem)
    return Mamba2ClassifierOutput(logits, out.cache, out.hidden_states, loss)


def classification_loss(
    logits: Float[Array, "b labels"], labels: Array, problem: ProblemType | None
) -> Float[Array, ""]:
    """Compute the mean loss of a problem type, as transformers' `ForSequenceClassificationLoss`.

    Args:
        logits: `(b, labels)`.
        labels: classes `(b,)`, or floats `(b, labels)`.
        problem: the problem type.
    """
    if problem == "single_label_classification":
        count = (labels != IGNORED_LABEL).sum()
        return summed_cross_entropy(logits, labels) / jnp.maximum(count, 1)
    labels = labels.astype(logits.dtype)
    if problem == "regression":
        return jnp.square(logits - labels).mean()
    return (jax.nn.softplus(logits) - logits * labels).mean()  # of a sigmoid per label


def _names(names: Sequence[str] | None, count: int | None) -> tuple[str, ...]:
    name = "Mamba2ForSequenceClassification"
    if names is None:
        count = 2 if count is None else count
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: num_labels={count!r}, wants a positive integer")
        return default_names(count)
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"{name}: label_names={names!r}, wants different texts")
    if count not in (None, len(names)):
        raise ValueError(f"{name}: num_labels={count}, but {len(names)} label_names")
    return tuple(names)


def _placement(sharding: Any) -> Any:
    if isinstance(sharding, Mesh):
        return NamedSharding(sharding, PartitionSpec())
    return sharding(SCORE) if callable(sharding) else sharding
