"""Speculative decoding against plain decoding, and the memory of long prompts, on this machine.

Texts are compared first; then both are timed in turn, compiling excluded. The embedded model drafts for
itself with its first layer, and by looking up the prompt. The pair of mamba2-130m's shape has random weights,
with heads that make both follow one permutation of the tokens, so that they agree almost always: it shows
what a call costs, not how often real models agree.

    python benchmarks/generation.py            # about two minutes
    python benchmarks/generation.py --output benchmarks/results/generation.md
"""

import argparse
import importlib.metadata
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, generate, load_tokenizer
from mamba2_jax.generation import PromptLookup

PROMPT = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def get_x(self):
        return self.x

    def get_y(self):
        return self.y

    def set_x(self, x):
"""
NEW = 96
NOISE = 0.6  # share of the layers' own output in what decides the next token of the random pair


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the tables to this Markdown file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24, help="of the random pair, fewer for a quick look")
    arguments = parser.parse_args()
    lines = [
        f"{os.cpu_count()} cores, {jax.default_backend()}; jax {importlib.metadata.version('jax')}; one row, "
        f"{NEW} new tokens, float32; best of {arguments.rounds}.",
        "",
        "| model | draft | guesses | text | tokens per call | plain | with draft | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for row in speeds(arguments.rounds, arguments.layers):
        lines.append(row)
        print(row, flush=True)
    more = ["", "| temporaries of `generate`, prompt of | 4,096 | 65,536 | ratio |", "|---|---|---|---|"]
    more += [memory(dtype, arguments.layers) for dtype in ("float32", "bfloat16")]
    print("\n".join(more))
    if arguments.output is not None:
        arguments.output.write_text("# Generation\n\n" + "\n".join(lines + more) + "\n")


def speeds(rounds: int, layers: int):
    model, tokenizer = Mamba2ForCausalLM.from_pretrained(dtype="float32"), load_tokenizer()
    ids = np.array([tokenizer.encode(PROMPT)])
    for draft, name in ((PromptLookup(), "prompt lookup"), (first_layers(model, 1), "its first layer of 4")):
        for temperature in (0.0, 0.8):
            yield compare("embedded", model, name, draft, ids, temperature, rounds)
    config = Mamba2Config.preset("mamba2-130m").replace(num_hidden_layers=layers, tie_word_embeddings=False)
    small = config.replace(num_hidden_layers=2, hidden_size=256, num_heads=8)
    model, draft = permuting(config, 0), permuting(small, 1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 64))
    for temperature in (0.0, 0.8):
        yield compare(
            f"130m's shape, {layers} layers", model, "width 256, 2 layers", draft, ids, temperature, rounds
        )


def first_layers(model: Mamba2ForCausalLM, count: int) -> Mamba2ForCausalLM:
    draft = nnx.clone(model)
    draft.config = draft.backbone.config = model.config.replace(num_hidden_layers=count)
    draft.backbone.layers = nnx.List(list(draft.backbone.layers)[:count])
    return draft


def permuting(config: Mamba2Config, seed: int) -> Mamba2ForCausalLM:
    """Return a random model whose most likely next token is mostly a fixed permutation of the last one."""
    model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(seed))
    order = np.random.default_rng(7).permutation(config.vocab_size)
    table = model.backbone.embeddings.weight[...]
    table = table / jnp.linalg.norm(table, axis=1, keepdims=True) * config.hidden_size**0.5
    model.backbone.embeddings.weight[...] = table
    model.lm_head.weight[...] = table[order] / config.hidden_size**0.5
    for block in model.backbone.layers:
        weight = block.mixer.out_proj.weight
        weight[...] = weight[...] * (NOISE / config.num_hidden_layers**0.5)
    return model


def compare(name, model, draft_name, draft, ids, temperature, rounds, guesses: int = 4) -> str:
    options = {"max_new_tokens": NEW, "eos_token_id": ()}
    if temperature:
        options |= {"temperature": temperature, "key": jax.random.key(0)}
    runs = {
        "plain": lambda: generate(model, ids, **options),
        "draft": lambda: generate(model, ids, draft=draft, num_draft_tokens=guesses, **options),
    }
    found = {key: jax.block_until_ready(run()) for key, run in runs.items()}
    if not temperature and (found["plain"].tokens != found["draft"].tokens).any():
        raise SystemExit(f"{name} with {draft_name}: another text than without a draft")
    seconds = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[key].append(time.perf_counter() - start)
    plain, drafted = (min(seconds[key]) for key in runs)
    per_call = (NEW - 1) / int(found["draft"].passes[0])
    text = f"temperature {temperature}" if temperature else "greedy"
    return (
        f"| {name} | {draft_name} | {guesses} | {text} | {per_call:.2f} | {NEW / plain:.0f} tokens/s | "
        f"{NEW / drafted:.0f} tokens/s | {plain / drafted:.2f}x |"
    )


def memory(dtype: str, layers: int) -> str:
    """Compare the temporaries of compiled programs; nothing is run."""
    config = Mamba2Config.preset("mamba2-130m").replace(num_hidden_layers=layers)
    model = nnx.eval_shape(
        lambda: Mamba2ForCausalLM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    )

    def temporaries(length: int) -> int:
        run = jax.jit(lambda model, ids: generate(model, ids, max_new_tokens=16))
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        return run.lower(model, ids).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(65536)
    sizes = f"{short / 1e6:.0f} MB | {long / 1e6:.0f} MB | {long / short:.2f}"
    return f"| 130m's shape, {layers} layers, {dtype} | {sizes} |"


if __name__ == "__main__":
    main()
