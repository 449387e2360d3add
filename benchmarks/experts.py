"""A mixture of experts on a CPU: ours, all experts for every token, and transformers, in one run.

One layer's experts with the activations of Nemotron 3 (relu squared) and of Granite 4.0 H (gated), float32.
Results are compared first. FLOPs are those of the products: what the chosen experts need, and what the
compiler counts for all of them.

    python benchmarks/experts.py --output benchmarks/results/experts.md
"""

import argparse
import pathlib
from functools import partial

import cpu
import families
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from mamba2_jax.ops.experts import experts

# experts, per token, width, inner width
SHAPES = {"relu2": (64, 6, 512, 384), "silu_gated": (64, 8, 512, 384)}
TOKENS = (1, 64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this Markdown file")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    lines = [
        "# A mixture of experts on a CPU",
        "",
        f"{cpu.describe_machine()} Commit {families.commit()}. By `benchmarks/experts.py`.",
        f"float32, forward, medians of {arguments.rounds} rounds.",
        "",
        "| experts | tokens | ours | all experts | transformers | MFLOP chosen | MFLOP all |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for activation in SHAPES:
        for tokens in TOKENS:
            lines.append(line(activation, tokens, arguments.rounds))
            print(lines[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n")


def line(activation: str, tokens: int, rounds: int) -> str:
    count, top_k, width, inner = SHAPES[activation]
    pair = 2 if activation == "silu_gated" else 1
    rng = np.random.default_rng(0)
    up = rng.normal(size=(count, pair * inner, width)).astype(np.float32) / width**0.5
    down = rng.normal(size=(count, width, inner)).astype(np.float32) / inner**0.5
    x = rng.normal(size=(tokens, width)).astype(np.float32)
    ids = np.stack([rng.permutation(count)[:top_k] for _ in range(tokens)]).astype(np.int32)
    gates = rng.uniform(size=(tokens, top_k)).astype(np.float32)
    ours_up = up.reshape(count, 2, inner, width) if pair == 2 else up
    arrays = [jnp.asarray(array) for array in (x, ours_up, down, ids, gates)]

    run = jax.jit(partial(experts, activation=activation, dtype=jnp.float32))
    every = jax.jit(partial(all_experts, activation)).lower(*arrays).compile()
    theirs = peer(activation, up, down)
    given = [torch.tensor(array) for array in (x, ids.astype(np.int64), gates)]
    want = np.asarray(every(*arrays))
    with torch.no_grad():
        for name, got in {"ours": run(*arrays), "transformers": theirs(*given).numpy()}.items():
            error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
            if not error < 1e-5:
                raise SystemExit(f"{activation}, {tokens} tokens: {name} differs by {error:.2e}")
    mine, dense = cpu.take_turns(
        lambda: run(*arrays).block_until_ready(), lambda: every(*arrays).block_until_ready(), rounds
    )[1:]
    other = cpu.take_turns(lambda: None, lambda: theirs(*given), rounds)[2]
    cost = every.cost_analysis()["flops"]
    need = 2 * tokens * top_k * width * inner * (pair + 1)
    return (
        f"| {count}, top {top_k}, {width} x {inner}, {activation} | {tokens} | "
        f"{mine * 1e3:.2f} ms | {dense * 1e3:.2f} ms | {other * 1e3:.2f} ms | "
        f"{need / 1e6:,.1f} | {cost / 1e6:,.1f} |"
    )


def all_experts(activation: str, x, up, down, expert_ids, gates):
    """All experts for every token, weighted by gates that are 0 for those not chosen."""
    weights = (jax.nn.one_hot(expert_ids, len(down)) * gates[..., None]).sum(-2)
    if activation == "relu2":
        inner = jax.nn.relu(jnp.einsum("td,emd->tem", x, up)) ** 2
    else:
        inner = jnp.einsum("td,ecmd->tecm", x, up)
        inner = jax.nn.silu(inner[:, :, 0]) * inner[:, :, 1]
    return jnp.einsum("tem,edm,te->td", inner, down, weights)


def peer(activation: str, up: np.ndarray, down: np.ndarray):
    """The experts of transformers with the same weights."""
    count, width, inner = down.shape
    if activation == "relu2":
        config = transformers.NemotronHConfig(
            hidden_size=width, n_routed_experts=count, moe_intermediate_size=inner, layers_block_type=["moe"]
        )
        module = NemotronHExperts(config)
        module.up_proj.data = torch.tensor(up)
    else:
        config = transformers.GraniteMoeHybridConfig(
            hidden_size=width, num_local_experts=count, intermediate_size=inner
        )
        module = GraniteMoeHybridExperts(config)
        module.gate_up_proj.data = torch.tensor(up)
    module.down_proj.data = torch.tensor(down)
    return module.eval()


if __name__ == "__main__":
    main()
