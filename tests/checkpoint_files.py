"""Checkpoints for the tests: whole ones written by transformers, and broken ones written byte by byte."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from mamba2_jax.config import Mamba2Config

TINY = {
    "hidden_size": 32,
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 2,
    "num_hidden_layers": 2,
    "vocab_size": 48,
    "chunk_size": 16,
}


def random_model(dtype: torch.dtype = torch.float32, bare: bool = False, **fields) -> torch.nn.Module:
    """A transformers model in which every parameter, biases and D included, is random."""
    torch.manual_seed(len(str(fields)))
    config = transformers.Mamba2Config(**TINY | fields)
    model = transformers.Mamba2Model(config) if bare else transformers.Mamba2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.to(dtype)


def write_checkpoint(folder: Path, max_shard_size: str = "1GB", **fields) -> tuple[dict, Mamba2Config]:
    """Write a random model with transformers' save_pretrained; return its state dict and our config."""
    model = random_model(**fields)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    config = Mamba2Config.from_dict(json.loads((folder / "config.json").read_text()))
    return model.state_dict(), config


def expected_leaves(state: dict[str, torch.Tensor], config: Mamba2Config) -> dict[str, torch.Tensor]:
    """Cut a state dict into the model's parameters, written down independently of `names.py`."""
    gn, e, d = config.n_groups * config.state_size, config.intermediate_size, config.hidden_size
    leaves = {}
    for name, tensor in state.items():
        base = name if name.startswith(("backbone.", "lm_head.")) else f"backbone.{name}"
        if base.endswith("in_proj.weight"):
            z, x, B, C, dt = tensor.split([e, e, gn, gn, config.num_heads])
            leaves[f"{base}_zx"] = torch.stack([z.T, x.T], dim=1)
            leaves[f"{base}_BC"] = torch.stack([B.T, C.T], dim=1)
            leaves[f"{base}_dt"] = dt.T
        elif base.endswith("in_proj.bias"):
            z, x, B, C, dt = tensor.split([e, e, gn, gn, config.num_heads])
            leaves |= {f"{base}_zx": torch.stack([z, x]), f"{base}_BC": torch.stack([B, C]), f"{base}_dt": dt}
        elif base.endswith("conv1d.weight"):
            x, B, C = tensor.squeeze(1).split([e, gn, gn])
            leaves |= {f"{base}_x": x.T, f"{base}_BC": torch.stack([B.T, C.T], dim=1)}
        elif base.endswith("conv1d.bias"):
            x, B, C = tensor.split([e, gn, gn])
            leaves |= {f"{base}_x": x, f"{base}_BC": torch.stack([B, C])}
        elif base.endswith("out_proj.weight"):
            assert tensor.shape == (d, e)
            leaves[base] = tensor.T
        else:
            leaves[base] = tensor
    if config.tie_word_embeddings:
        leaves.pop("lm_head.weight", None)
    return leaves


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite `model.safetensors` after a change to its tensors."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )


def pack(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file from a header (bytes stay as they are) and data; `length` overrides the prefix."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def unpack(file: bytes) -> tuple[dict, bytes]:
    """Header and data of a well-formed safetensors file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]
