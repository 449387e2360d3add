"""One of several processes that load a checkpoint onto a mesh: what it read, and what memory that took."""

import gc
import json
import pathlib
import re
import sys
import threading
import time

import numpy as np

import mamba2_jax.weights.reader as reader
from mamba2_jax.processes import start_processes

folder = pathlib.Path(sys.argv[1]) / "large"
start_processes(sys.argv[3], int(sys.argv[5]), int(sys.argv[7]))

import jax  # noqa: E402
from flax import nnx  # noqa: E402

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM  # noqa: E402
from mamba2_jax.mesh import make_mesh  # noqa: E402

config = Mamba2Config(
    hidden_size=1024, num_hidden_layers=4, num_heads=32, head_dim=64, state_size=64, n_groups=2,
    vocab_size=8192, pad_token_id=0,
)  # fmt: skip
Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(folder)  # the first process writes
mesh = make_mesh(fsdp=4, tensor=2)
counted, lock = [0], threading.Lock()
read_exactly = reader.read_exactly


def counting(file, path, offset, out, what):
    with lock:
        counted[0] += out.nbytes if isinstance(out, np.ndarray) else 0
    read_exactly(file, path, offset, out, what)


def anonymous() -> int:
    """Bytes of memory that is no file's."""
    return int(re.search(r"RssAnon:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10


def watch() -> None:
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)


Mamba2ForCausalLM.from_pretrained(sharding=mesh)  # what the first time takes: threads, caches
gc.collect()
reader.read_exactly, done = counting, threading.Event()
base = anonymous()
peak = [base]
watcher = threading.Thread(target=watch)
watcher.start()
model = Mamba2ForCausalLM.from_pretrained(folder, sharding=mesh)
done.set()
watcher.join()
read = counted[0]

arrays = model._arrays()
whole = Mamba2ForCausalLM.from_pretrained(folder)._arrays()
shards = [(path, shard) for path, array in arrays.items() for shard in array.addressable_shards]
print(
    json.dumps(
        {
            "read": read,
            "bytes": sum(array.nbytes for array in arrays.values()),
            "local": sum(shard.data.nbytes for _, shard in shards),
            "largest_shard": max(shard.data.nbytes for _, shard in shards),
            "peak": peak[0] - base,
            "same": all(
                np.array_equal(shard.data, np.asarray(whole[path])[shard.index]) for path, shard in shards
            ),
        }
    ),
    flush=True,
)
jax.distributed.shutdown()
