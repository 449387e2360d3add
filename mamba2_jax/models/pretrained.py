"""Base class of the models: `from_pretrained`, `save_pretrained`, `push_to_hub` and `to_mesh`."""

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mamba2_jax.config import Mamba2Config
from mamba2_jax.files import TOKENIZER_FILES, refuse_remote
from mamba2_jax.hub import resolve_folder, upload_folder
from mamba2_jax.lora.attach import adapters_in_use
from mamba2_jax.mesh import check_mesh
from mamba2_jax.models.origin import Origin, checkpoint_folder, read_end_ids
from mamba2_jax.models.quantize import dequantize_model, quantize_model, quantized_weight
from mamba2_jax.models.vocabulary import NewRows, resize_vocabulary, set_config
from mamba2_jax.sharding import array_path, parameter_shardings
from mamba2_jax.typing import Array, DTypeLike
from mamba2_jax.weight_types import TypeName
from mamba2_jax.weights import LoadReport, StoredTensor, load_weights, outgoing_weights
from mamba2_jax.weights.checkpoint_folder import FORMATS, MAX_SHARD_SIZE, Format, write_checkpoint
from mamba2_jax.weights.table import stored_table

_M = TypeVar("_M", bound="PretrainedModel")


class PretrainedModel(nnx.Module):
    """Module with checkpoint loading, saving and device placement."""

    config: Mamba2Config
    origin: Origin | None = None
    generation_end_ids: tuple[int, ...] = ()
    """Ids that end a text by the checkpoint's `generation_config.json`."""
    _checkpoint_prefix = ""
    _has_head = True

    @classmethod
    def from_pretrained(
        cls: type[_M],
        path: str | Path | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        ssd_implementation: str | None = None,
        sharding: "Mesh | jax.sharding.Sharding | Callable[[str], jax.sharding.Sharding] | None" = None,
        revision: str | None = None,
        allow_non_finite: bool = False,
        quantize: TypeName | None = None,
        report: Callable[[LoadReport], None] | None = None,
    ) -> _M:
        """Load a checkpoint in any published form: transformers, state-spaces or mistral.

        Args:
            path: a folder or a hub id. None: the small Python-code model embedded in the package.
            dtype: compute dtype. None: bfloat16 if the embedding is stored in bfloat16, else float32.
            param_dtype: dtype of the parameters. None keeps each tensor as stored.
            ssd_implementation: passed to `ops.ssd`.
            sharding: device placement of the parameters: a mesh (as `to_mesh`, but no device ever holds the
                whole model), one sharding for all, or a function from a parameter's path to its sharding.
            revision: branch, tag or commit of a hub id.
            allow_non_finite: accept weights that hold NaN or infinity.
            quantize: "int8" or "int4": quantize each matrix while it is loaded, as `quantize` does, in the
                memory of the quantized model. None: as in the files.
            report: called with the `LoadReport`, e.g. `print`.

        Raises:
            FileNotFoundError: no such folder, or a hub id that cannot be reached.
            ImportError: the weights are a PyTorch `.bin` file, and PyTorch is not installed.
            ValueError: a checkpoint that does not match its config; the message lists every problem.
        """
        folder = checkpoint_folder(path, revision)
        return cls._load(
            folder,
            Mamba2Config.from_pretrained(folder),
            dtype=dtype,
            param_dtype=param_dtype,
            sharding=sharding,
            allow_non_finite=allow_non_finite,
            report=report,
            quantize=quantize,
            ssd_implementation=ssd_implementation,
        )

    @classmethod
    def _load(
        cls: type[_M],
        folder: Path,
        config: Mamba2Config,
        *,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike | None,
        sharding,
        allow_non_finite: bool,
        report: Callable[[LoadReport], None] | None,
        quantize: TypeName | None = None,
        extra: tuple[StoredTensor, ...] = (),
        new: Mapping[str, Array] = MappingProxyType({}),
        **options: Any,
    ) -> _M:
        """Load a folder; arguments as of `from_pretrained`.

        Args:
            extra: tensors to load beside those of the config.
            new: parameters by path that are not loaded.
            **options: arguments of the class.
        """
        place, mesh = sharding, sharding if isinstance(sharding, Mesh) else None
        if mesh is not None:
            check_mesh(f"{cls.__name__}.from_pretrained", mesh)

            @cache  # not before the config has been checked against the files
            def shardings(mesh: Mesh) -> Mapping[str, jax.sharding.Sharding]:
                held = config.replace(quantization=quantize or config.quantization)
                table = (*stored_table(held, cls._has_head), *extra)
                paths = [leaf.path for stored in table for leaf in stored.leaves]
                return parameter_shardings(paths, held, mesh)

            def by_rule(path: str, mesh: Mesh = mesh) -> jax.sharding.Sharding:
                return shardings(mesh)[path]

            place = by_rule
        arrays, load_report = load_weights(
            folder,
            config,
            param_dtype=param_dtype,
            sharding=place,
            allow_non_finite=allow_non_finite,
            head=cls._has_head,
            quantize=quantize,
            extra=extra,
        )
        if dtype is None:
            norm = arrays["backbone.norm_f.weight"]
            stored = arrays.get("backbone.embeddings.weight", norm).dtype
            dtype = jnp.bfloat16 if stored == jnp.bfloat16 else jnp.float32
        config = config.replace(quantization=quantize or config.quantization)
        model = cls._from_arrays(config, {**arrays, **new}, dtype=dtype, **options)
        if mesh is not None:
            model._set_mesh(mesh)
        model.generation_end_ids = read_end_ids(folder)
        model.origin = Origin(folder.resolve(), tuple(sorted(load_report.stored_dtypes.items())))
        if report is not None:
            report(load_report)
        return model

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text: those of `generation_config.json`, else the config's."""
        return self.generation_end_ids or self.config.eos_token_ids

    def to_mesh(self, mesh: Mesh) -> None:
        """Shard the parameters over a mesh in place, by the rules of `mamba2_jax.sharding`.

        Mixers then compute each device's own rows, tokens and heads; XLA partitions all other operations.
        Inputs may be unsharded. A batch that the mesh's row axes do not divide stays unsharded.

        Args:
            mesh: from `mamba2_jax.sharding.make_mesh`.

        Raises:
            ValueError: a mesh with other axes; the message names them.
        """
        check_mesh(f"{type(self).__name__}.to_mesh", mesh)
        parameters = nnx.state(self, nnx.Param)
        leaves, treedef = jax.tree.flatten_with_path(parameters)
        paths = [self._path(path) for path, _ in leaves]
        shardings = parameter_shardings(paths, self.config, mesh)
        placed = [
            jax.device_put(leaf, shardings[path]) for path, (_, leaf) in zip(paths, leaves, strict=True)
        ]
        nnx.update(self, treedef.unflatten(placed))
        self._set_mesh(mesh)

    def _set_mesh(self, mesh: Mesh) -> None:
        for _, module in nnx.iter_modules(self):
            if hasattr(module, "mesh"):
                setattr(module, "mesh", mesh)  # noqa: B010

    def quantize(self, kind: TypeName, *, calibration: Any = None) -> None:
        """Quantize the weights in place: projections and experts, embedding and head.

        Each number becomes the nearest level of its group: 8 bits with a scale per output channel, or 4 bits
        with a scale for each 64 numbers of it. Embedding and head have 8 bits in both. Norms, convolutions,
        routers, `A_log`, `dt_bias` and `D` stay floats. Compiled functions compile again.

        Quantized weights are constants: adapters (`add_lora`) are trained on them, they are not.

        Args:
            kind: "int8" or "int4".
            calibration: token ids `(b, l)` of a text without padding, such as 16 rows of 512: projections are
                rounded by GPTQ, so that their outputs on it change least. Experts, embedding and head are
                rounded to nearest. None: all are.

        Raises:
            ValueError: weights of another type, adapters that are merged or replace weights, or rows that the
                groups do not divide.

        >>> from mamba2_jax import Mamba2ForCausalLM
        >>> model = Mamba2ForCausalLM.from_pretrained()
        >>> model.quantize("int8")
        >>> model.backbone.layers[0].mixer.out_proj.weight.values.dtype.name
        'int8'
        """
        quantize_model(self, kind, calibration)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> None:
        """Make the weights floats again, in place: each the level of its quantized number times the scale.

        Args:
            dtype: dtype of the weights; the compute dtype stays.
        """
        dequantize_model(self, dtype)

    def resize_vocabulary(self, size: int, *, multiple: int = 1, new_rows: NewRows = "mean") -> None:
        """Change the number of token ids in place: rows of the embedding and of a head of its own.

        Rows that exist are kept, those of the padding too; the config follows, and so do the files that are
        saved. Compiled functions compile again.

        Args:
            size: the number of token ids; the largest id of the tokenizer plus 1.
            multiple: pad the rows to a multiple of it; the padding is never sampled.
            new_rows: new rows are the "mean" of those in use, so that a new token is as likely as others are
                on average, or "zeros".

        Raises:
            ValueError: a special token id would be outside, or the embedding or head has adapters.
        """
        resize_vocabulary(self, size, multiple, new_rows)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        format: Format = "transformers",
        dtype: DTypeLike | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        tokenizer: str | Path | None = None,
        show_progress: bool = False,
    ) -> None:
        """Write a checkpoint folder for transformers or mamba_ssm: weights, configs, tokenizer.

        The write is atomic: the folder appears, or replaces an existing one, once all files are written.
        Files in an existing folder that belong to no checkpoint are kept.

        Args:
            folder: destination; parent folders are created.
            format: "transformers", or "state-spaces" (mamba_ssm's; needs PyTorch).
            dtype: float dtype to store. None: each tensor's dtype in the source checkpoint, else that of its
                parameter. A_log, dt_bias and D are never narrowed.
            max_shard_size: bytes per shard file, or text such as "5GB"; several shards get an index file.
            tokenizer: folder or hub id of the tokenizer to copy. None: that of the source checkpoint, if it
                has one.
            show_progress: draw a progress bar on stderr.

        Raises:
            ImportError: the format "state-spaces" without PyTorch.
            NotImplementedError: the format cannot express a feature of this model; the message names the
                format that can.
            ValueError: adapters in use, parameters that no checkpoint tensor holds, a value too large
                for its dtype, or a folder that cannot be replaced as a whole.

        >>> import tempfile
        >>> from mamba2_jax import Mamba2ForCausalLM
        >>> model = Mamba2ForCausalLM.from_pretrained()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/mine")
        ...     again = Mamba2ForCausalLM.from_pretrained(f"{folder}/mine")
        >>> bool((again.backbone.norm_f.weight[...] == model.backbone.norm_f.weight[...]).all())
        True
        """
        refuse_remote(folder)
        if format not in FORMATS:
            raise ValueError(f"save_pretrained: format={format!r}, want one of {', '.join(FORMATS)}")
        if adapters_in_use(self):
            raise ValueError(
                "save_pretrained: adapters are in use, which a checkpoint cannot hold; merge_lora adds them"
                " to the weights, save_lora saves them alone, use_lora(model, None) switches them off"
            )
        if dtype is not None and self.config.quantization is not None:
            raise ValueError(
                f"save_pretrained: dtype={dtype!r}, but the weights are {self.config.quantization}; "
                "dequantize() the model first, or leave dtype out"
            )
        origin = None if self.origin is None else self.origin.folder
        if tokenizer is not None:
            tokenizer = resolve_folder(tokenizer, allow_patterns=TOKENIZER_FILES)
        tensors = outgoing_weights(
            self._arrays(),
            self.config,
            format=format,
            head=self._has_head,
            dtype=dtype,
            stored_dtypes=None if self.origin is None else dict(self.origin.stored_dtypes),
            extra=self._extra_tensors(),
        )
        write_checkpoint(
            Path(folder),
            self.config,
            tensors,
            format=format,
            max_shard_size=max_shard_size,
            head=self._has_head,
            classifier=self._config_keys(),
            beside=origin,
            tokenizer=tokenizer or origin,
            show_progress=show_progress,
        )

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        revision: str | None = None,
        message: str = "Upload Mamba-2",
        **options: Any,
    ) -> str:
        """Save the model to a temporary folder and upload the folder to the Hugging Face hub.

        Args:
            repository: a hub id, "name" or "org/name"; created if it does not exist.
            private: whether a new repository is private.
            revision: branch; created if it does not exist. None: the default branch.
            message: commit message.
            **options: options of `save_pretrained`.

        Returns:
            URL of the commit.

        Raises:
            ConnectionError: the hub refuses the upload or cannot be reached.
        """
        with tempfile.TemporaryDirectory(prefix="mamba2-jax-") as folder:
            self.save_pretrained(Path(folder) / "model", **options)
            return upload_folder(
                Path(folder) / "model", repository, private=private, revision=revision, message=message
            )

    def _extra_tensors(self) -> tuple[StoredTensor, ...]:
        """Return the tensors of the model beside those of its config."""
        return ()

    def _config_keys(self) -> dict[str, Any] | None:
        """Return a classifier's keys in `config.json`; None: no classifier."""
        return None

    @classmethod
    def _from_arrays(cls: type[_M], config: Mamba2Config, arrays: dict[str, Array], **options) -> _M:
        """Build the module tree without initializing parameters, and set them to `arrays`."""
        # Nothing is sampled, so one key serves all: tracing nnx.Rngs' counters takes 3 s at 64 layers.
        same = SimpleNamespace(params=lambda: jax.random.key(0))
        floats = config.replace(quantization=None)
        model = nnx.eval_shape(lambda: cls(floats, rngs=same, **options))  # pyright: ignore[reportCallIssue]
        set_config(model, config)
        parameters = nnx.state(model, nnx.Param)
        for path, leaf in nnx.to_flat_state(parameters):
            name = cls._checkpoint_prefix + ".".join(map(str, path))
            leaf.set_value(arrays[name] if name in arrays else quantized_weight(name, arrays))
        nnx.update(model, parameters)
        return model

    def _arrays(self) -> dict[str, Array]:
        """Return the parameters, adapters excluded, by their path in the checkpoint table."""
        parameters = nnx.state(self, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
        return {self._path(path): leaf for path, leaf in jax.tree.leaves_with_path(parameters)}

    @classmethod
    def _path(cls, path: tuple) -> str:
        return cls._checkpoint_prefix + array_path(path)
