"""Print `mamba2-jax info`: config, number of parameters, memory and files of a checkpoint."""

import math
import pathlib
from collections import Counter

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from mamba2_jax.cli.adapter import base_folder, refuse_other_folders
from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.families import FAMILIES
from mamba2_jax.hub import resolve_folder
from mamba2_jax.lora import base_of, is_adapter
from mamba2_jax.lora.files import ADAPTER_FILES, describe_adapter
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.weight_types import WEIGHT_TYPES, TypeName
from mamba2_jax.weights import TensorInfo, check_sizes, find_form, open_checkpoint
from mamba2_jax.weights.header import DTYPES
from mamba2_jax.weights.table import stored_table


def describe(path: str | None, adapter: str | None = None) -> None:
    """Print the tables of the checkpoint at `path`, a folder or hub id; None: the embedded model.

    Of an adapter, given as either argument, its settings and tensors are shown; of one given as `path`
    nothing else.

    Raises:
        OSError: the folder does not exist, or it has no readable config.
        ValueError: the config or a header of the weights is broken.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    alone = adapter is None and is_adapter(path)
    if adapter is not None or alone:
        folder = resolve_folder(path if alone else adapter, allow_patterns=ADAPTER_FILES)
        console.print(_table(f"adapter: {folder}", _adapter_rows(folder)))
        if alone:
            return
        path = base_folder(path, adapter)
    # download only the small files of a hub id
    folder = resolve_folder(path, allow_patterns=["*.json", "tokenizer*"])
    refuse_other_folders(folder)
    config = Mamba2Config.from_pretrained(folder)
    files = []
    if find_form(folder) is not None:
        with open_checkpoint(folder) as checkpoint:
            check_sizes(checkpoint, config)  # before anything is built from sizes that may be absurd
            files = _file_rows(list(checkpoint.tensors.values()))
    console.print(_table(str(folder), _config_rows(config)))
    console.print(_table("memory", _memory_rows(config)))
    console.print(_table("files", files) if files else "files: no weights here")


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _config_rows(config: Mamba2Config) -> list[tuple[str, str]]:
    vocabulary = f"{config.vocab_size:,}"
    if config.real_vocab_size != config.vocab_size:
        vocabulary += f", of which {config.vocab_size - config.real_vocab_size:,} are padding"
    biases = {"projections": config.use_bias, "convolution": config.use_conv_bias}
    low, high = config.time_step_limit
    return [
        ("family", FAMILIES[config.family].title if config.family in FAMILIES else "Mamba-2"),
        ("parameters", _parameters(config)),
        ("layers", _layers(config)),
        ("width", f"{config.hidden_size} (inner {config.inner_width})"),
        ("heads", f"{config.num_heads} of {config.head_dim} channels"),
        ("state", f"{config.state_size} per channel; B and C in {config.n_groups} groups"),
        ("convolution", f"{config.conv_kernel} taps over {config.conv_dim} channels"),
        ("vocabulary", vocabulary),
        ("head", "tied to the embedding" if config.tie_word_embeddings else "its own matrix"),
        ("biases", ", ".join(name for name, present in biases.items() if present) or "none"),
        ("time step", "not limited" if (low, high) == (0, math.inf) else f"clamped to {low}..{high}"),
        ("chunk size", str(config.chunk_size)),
        ("end of text", ", ".join(map(str, config.eos_token_ids)) or "none"),
        *_variant_rows(config),
        ("weights", f"quantized, {config.quantization}" if config.quantization else "floats"),
    ]


# Letters of `Mamba2Config.layer_pattern`.
_LETTERS = {"M": "Mamba-2", "*": "attention", "H": "Mamba-2 beside attention", "-": "MLP", "E": "experts"}


def _parameters(config: Mamba2Config) -> str:
    count, active = config.num_parameters(), config.num_parameters(active=True)
    return f"{count:,}" if active == count else f"{count:,}, of which a token uses {active:,}"


def _layers(config: Mamba2Config) -> str:
    kinds = Counter(config.layer_pattern)
    text = ", ".join(f"{count} {_LETTERS[letter]}" for letter, count in kinds.most_common())
    text = str(config.num_hidden_layers) if set(kinds) == {"M"} else f"{config.num_hidden_layers}: {text}"
    return text + (f"; each then {' + '.join(config.feed_forward)}" if config.feed_forward else "")


def _variant_rows(config: Mamba2Config) -> list[tuple[str, str]]:
    """List the config options that differ from plain Mamba-2: attention, MLPs, gate and D."""
    rows = []
    attention_layers = [
        index
        for index, layer in enumerate(config.layers)
        if any(slot.kind == "attention" for slot in layer[0])
    ]
    if attention_layers and (attention := config.attn_cfg) is not None:
        heads = f"{attention.num_heads} heads of {attention.head_dim} channels"
        if attention.num_heads_kv != attention.num_heads:
            heads += f", {attention.num_heads_kv} of keys and values"
        rows.append(("attention", f"layers {', '.join(map(str, attention_layers))}: {heads}"))
    if (experts := config.experts_cfg) is not None:
        latent = f" on {experts.latent_size} channels" if experts.latent_size else ""
        text = f"{experts.num_experts}, {experts.top_k} per token, of {experts.width} channels{latent}"
        rows.append(("experts", text))
    if (shared := config.shared_mlp_cfg) is not None:
        rows.append(("expert of all tokens", f"{shared.width} channels"))
    if config.parallel_mlp_width:
        rows.append(("MLP beside the SSM", f"{config.parallel_mlp_width} channels"))
    if config.mlp is not None:
        own = config.layer_pattern.count("-")
        where = f"MLP in {own} layers of its own" if own else "MLP in each block"
        rows.append((where, f"{config.mlp.width} channels"))
    if not config.rmsnorm or config.norm_before_gate:
        rows.append(("gate", "after the norm" if config.rmsnorm else "without a norm"))
    if config.D_has_hdim:
        rows.append(("D", "per channel"))
    return rows


def _memory_rows(config: Mamba2Config) -> list[tuple[str, str]]:
    rows = [
        (f"weights in {dtype}", _size(config.num_parameters() * jnp.dtype(dtype).itemsize))
        for dtype in ("float32", "bfloat16")
    ]
    rows += [(f"weights in {kind}", _size(_bytes(config, kind))) for kind in WEIGHT_TYPES]
    for dtype in ("float32", "bfloat16"):
        sizes = [
            jax.eval_shape(
                lambda dtype=dtype, capacity=capacity: Mamba2Cache.zeros(config, 1, dtype, capacity=capacity)
            ).nbytes
            for capacity in (0, 1)
        ]
        growth = sizes[1] - sizes[0]
        rows.append(
            (f"cache of a row, {dtype}", _size(sizes[0]) + ("" if growth else ", however long the text"))
        )
        if growth:
            rows.append((f"KV cache per token, {dtype}", _size(growth)))
    return rows


def _bytes(config: Mamba2Config, quantization: TypeName) -> int:
    """Return the bytes of the weights in a quantized type, beside bfloat16."""
    try:
        tensors = stored_table(config.replace(quantization=quantization))
    except ValueError:  # groups that do not divide the rows
        return 0
    sizes = {"": 2} | {name: dtype.itemsize for name, dtype in DTYPES.items()}
    return sum(leaf.size * sizes[stored.dtype] for stored in tensors for leaf in stored.leaves)


def _adapter_rows(folder: pathlib.Path) -> list[tuple[str, str]]:
    settings, tensors = describe_adapter(folder)
    trained = ", ".join(settings.modules_to_save) or "none"
    size = sum(info.nbytes for info in tensors)
    return [
        ("base model", base_of(folder) or "not named"),
        ("rank", str(settings.rank)),
        ("scale", f"{settings.alpha_of('')} / {'sqrt of ' if settings.use_rslora else ''}rank"),
        ("targets", ", ".join(settings.targets)),
        ("DoRA", "yes" if settings.use_dora else "no"),
        ("trained in full", trained),
        ("numbers", f"{sum(info.size for info in tensors):,} in {len(tensors)} tensors; {_size(size)}"),
    ]


def _file_rows(tensors: list[TensorInfo]) -> list[tuple[str, str]]:
    rows = []
    for file in sorted({info.file for info in tensors}):
        here = [info for info in tensors if info.file == file]
        numbers = Counter()
        for info in here:
            numbers[info.dtype] += info.size
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in numbers.most_common())
        rows.append((file.name, f"{len(here)} tensors: {dtypes}; {_size(sum(i.nbytes for i in here))}"))
    return rows


def _size(count: int) -> str:
    """Format a number of bytes, exact and with a decimal prefix."""
    for prefix, unit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= unit:
            return f"{count / unit:.1f} {prefix} ({count:,} bytes)"
    return f"{count} bytes"
