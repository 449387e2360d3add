"""This checkout against another one on this machine's CPU, in processes that take turns.

Says whether a change made something slower: prefill, decoding and a training step of a model of mamba2-130m's
width, random weights. The other checkout is a worktree of an older commit, for example:

    git worktree add /tmp/before HEAD~20
    python benchmarks/versions.py /tmp/before            # about ten minutes
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16")
LAYERS = 4
PROMPT = (1, 2048)
NEW_TOKENS = 48
BATCH = (2, 512)  # no more than the Trainer takes at a time on a CPU


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=pathlib.Path, help="folder of another checkout")
    parser.add_argument("--rounds", type=int, default=4, help="processes of each checkout")
    parser.add_argument("--repeat", type=int, default=5, help="timings in a process, for their median")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.other, arguments.repeat)))
        return
    if not (arguments.other / "mamba2_jax").is_dir():
        parser.error(f"{arguments.other}: no checkout of this project; give the folder that has mamba2_jax/")
    found: dict[pathlib.Path, list[dict]] = {ROOT: [], arguments.other.resolve(): []}
    for _ in range(arguments.rounds):
        for folder in found:
            command = [sys.executable, __file__, str(folder), "--worker", "--repeat", str(arguments.repeat)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[folder].append(json.loads(done.stdout.splitlines()[-1]))
    mine, others = found.values()
    about, before = mine[0].pop("about"), others[0].pop("about")
    print(f"{about} against {before}; milliseconds, medians of {arguments.rounds} processes\n")
    print("| what | this | other | this / other |\n|---|---|---|---|")
    for what in mine[0]:
        this, other = (statistics.median(one[what] for one in runs) for runs in (mine, others))
        print(f"| {what} | {this:.1f} | {other:.1f} | {this / other:.3f} |")


def measure(folder: pathlib.Path, repeat: int) -> dict:
    """Time one checkout in this process; milliseconds by name."""
    sys.path.insert(0, str(folder))
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import mamba2_jax

    mamba2_jax.__path__.append(str(folder))  # for the kernels, which stand beside it
    assert importlib.util.find_spec("mamba2_jax.pallas").origin == str(folder / "pallas" / "__init__.py")
    from mamba2_jax.training import OptimConfig, TrainState, make_optimizer, split_model, train_step

    jax.config.update("jax_platforms", "cpu")
    commit = subprocess.run(
        ["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    found: dict = {"about": f"{commit}, jax {jax.__version__}"}
    config = mamba2_jax.Mamba2Config.preset("mamba2-130m").replace(num_hidden_layers=LAYERS)

    def clock(what: str, run, count: int = 1) -> None:
        times = []
        for _ in range(repeat + 1):
            began = time.perf_counter()
            jax.block_until_ready(run())
            times.append(1e3 * (time.perf_counter() - began) / count)
        found[what] = statistics.median(times[1:])  # the first compiled

    ids = jax.random.randint(jax.random.key(0), PROMPT, 0, config.vocab_size)
    rows = jax.random.randint(jax.random.key(1), BATCH, 0, config.vocab_size)
    for dtype in DTYPES:
        model = mamba2_jax.Mamba2ForCausalLM(
            config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)
        )
        clock(f"prefill {PROMPT[1]} tokens, {dtype}", lambda model=model: model(ids, logits_to_keep=1).logits)

        def decode(model=model):
            options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": ()}
            return mamba2_jax.generate(model, ids[:, :16], **options).tokens

        clock(f"decode, a token, {dtype}", decode, NEW_TOKENS)
        structure, trained, frozen = split_model(model)
        optimizer = make_optimizer(OptimConfig(), trained, 1000)
        state = [TrainState.start(trained, optimizer, jax.random.key(0))]

        def step(state=state, frozen=frozen, structure=structure, optimizer=optimizer):
            batch = {"input_ids": rows}
            state[0], metrics = train_step(state[0], frozen, batch, structure=structure, optimizer=optimizer)
            return metrics.loss

        clock(f"training step {BATCH[0]} x {BATCH[1]}, {dtype}", step)
    return found


if __name__ == "__main__":
    main()
