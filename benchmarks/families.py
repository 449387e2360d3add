"""The families on the Mamba-2 mixer beside transformers, on this machine's CPU, in one run.

For each family a tiny model and one of a published or scaled-down size, with random weights written by
transformers and loaded by both. Logits are compared first; then prefill and decoding take turns.

    python benchmarks/families.py --output benchmarks/results/families.md       # four minutes
    python benchmarks/families.py --only granite-4.0-h-350m --rounds 1
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

import cpu
import family_shapes
import jax
import numpy as np
import torch
import transformers

from mamba2_jax import Mamba2ForCausalLM, generate

REAL = ("granite-4.0-h-350m", "falcon-h1-0.5b", "nemotron-3-scaled-down", "bamba-scaled-down")
PREFILL, DECODED = 512, 24


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="also write the tables to this Markdown file")
    parser.add_argument("--only", nargs="*", choices=REAL, default=REAL)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lines = ["# The families beside transformers on a CPU", ""]

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if arguments.output is not None:
            arguments.output.write_text("\n".join(lines) + "\n")

    tell(f"{cpu.describe_machine()} Commit {commit()}. By `benchmarks/families.py`.")
    tell("")
    tell(f"Random weights, batch 1, float32, prefill of {PREFILL} tokens, and `generate`;")
    tell(f"tokens per second from medians of {arguments.rounds} rounds that take turns. PyTorch runs its")
    tell("loops in Python, the kernels of mamba_ssm being for GPUs.")
    tell("")
    tell("| model | parameters | what | ours | transformers | ratio |")
    tell("|---|---|---|---|---|---|")
    for name in arguments.only:
        for label, file in ((f"{name}, tiny", family_shapes.tiny(name)), (name, family_shapes.SHAPES[name])):
            for row in compare(label, file, arguments.rounds):
                tell(row)
    if REAL[0] in arguments.only:
        tell("")
        for line in from_the_command_line(REAL[0]):
            tell(line)


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


def write(file: dict, folder: str, dtype: torch.dtype = torch.float32) -> None:
    """Write a model of transformers with the random weights of its own initialisation."""
    options = {key: value for key, value in file.items() if key != "model_type"}
    if file["model_type"] == "nemotron_h":
        options["time_step_min"] = 1e-30  # transformers' floor of dt in prefill, which others do not have
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(file["model_type"], **options)
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)


def compare(label: str, file: dict, rounds: int):
    with tempfile.TemporaryDirectory() as folder:
        write(file, folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ours = Mamba2ForCausalLM.from_pretrained(folder, dtype="float32")
    check(label, ours, theirs)
    vocabulary, rng = file["vocab_size"], np.random.default_rng(0)
    read = jax.jit(lambda model, ids: model(ids, logits_to_keep=1).logits)
    ids, prompt = rng.integers(3, vocabulary, (1, PREFILL)), rng.integers(3, vocabulary, (1, 16))
    _, *both = cpu.take_turns(
        lambda: read(ours, ids).block_until_ready(),
        lambda: theirs(torch.tensor(ids), use_cache=True, logits_to_keep=1),
        rounds,
    )
    yield row(label, ours, f"prefill of {PREFILL}", PREFILL, both)

    def decode_ours(count):
        return generate(ours, prompt, max_new_tokens=count, eos_token_id=()).tokens.block_until_ready()

    def decode_theirs(count):
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
        return theirs.generate(torch.tensor(prompt), **options)

    _, *both = cpu.take_turns(lambda: decode_ours(DECODED), lambda: decode_theirs(DECODED), rounds)
    yield row(label, ours, f"{DECODED} tokens after 16", DECODED, both)


@torch.no_grad()
def check(label: str, ours: Mamba2ForCausalLM, theirs: transformers.PreTrainedModel) -> None:
    """Refuse to time something that computes something else."""
    ids = np.random.default_rng(1).integers(3, ours.config.vocab_size, (1, 64))
    want, got = theirs(torch.tensor(ids)).logits.numpy(), np.asarray(ours(ids).logits)
    error = np.abs(got - want).max() / np.abs(want).max()
    if not error < 1e-4:  # a near-tie of a router can add to the rounding of float32
        raise SystemExit(f"{label}: results differ by {error:.2e} of the largest logit")


def row(label: str, model: Mamba2ForCausalLM, what: str, tokens: int, seconds: list[float]) -> str:
    mine, peer = (f"{tokens / each:,.1f}/s" for each in seconds)
    count = f"{model.config.num_parameters() / 1e6:,.1f}M"
    return f"| {label} | {count} | {what} | {mine} | {peer} | {seconds[1] / seconds[0]:.2f}x |"


def from_the_command_line(name: str):
    """Load a bfloat16 checkpoint of transformers and generate, in Python and by `mamba2-jax generate`."""
    with tempfile.TemporaryDirectory() as folder:
        write(family_shapes.SHAPES[name], folder, torch.bfloat16)
        began = time.perf_counter()
        model = Mamba2ForCausalLM.from_pretrained(folder)
        loaded = time.perf_counter() - began
        prompt = np.arange(3, 19)[None]
        options = {"max_new_tokens": 33, "eos_token_id": ()}
        generate(model, prompt, **options).tokens.block_until_ready()
        seconds = cpu.timed(lambda: generate(model, prompt, **options).tokens.block_until_ready())
        yield f"{name}, written in bfloat16 by transformers: loaded in {loaded:.1f} s; `generate` makes"
        yield f"33 tokens in {seconds:.2f} s after the first call, {33 / seconds:.1f}/s (random weights)."
        del model
        write_tokenizer(folder)
        command = [sys.executable, "-m", "mamba2_jax.cli", "generate", "--model", folder]
        command += ["abc", "--max-new-tokens", "32"]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        yield f"`mamba2-jax generate` with 32 tokens takes {time.perf_counter() - began:.1f} s in all,"
        yield "with the start of Python, loading and compilation."


def write_tokenizer(folder: str) -> None:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {chr(97 + i): i for i in range(26)} | {f"<{i}>": i for i in range(26, 100352)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<26>").save_pretrained(folder)


if __name__ == "__main__":
    main()
