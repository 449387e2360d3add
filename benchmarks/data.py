"""Memory while texts are tokenised into files and read back in batches: it must not grow with the texts.

Writes JSON lines of made-up sentences in two sizes, tokenises each with the embedded model's tokenizer as
`mamba2-jax finetune` does, and reads one shuffled, packed epoch; every size in a process of its own. Resident
memory (RSS) is sampled every 20 ms, file-backed pages included. Ends with an error if the larger size needs
more than the margin beyond the smaller one, or if the tokens read are not those written.

    python benchmarks/data.py                              # three minutes
    python benchmarks/data.py --megabytes 1000 20000 --output benchmarks/results/data.md
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import threading
import time

MARGIN = 48  # MB; allocators do not give everything back
LENGTH, ROWS = 512, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs=2, default=[16, 64], help="of text, the smaller first")
    parser.add_argument("--folder", type=pathlib.Path, help="for texts and tokens (a temporary one)")
    parser.add_argument("--output", type=pathlib.Path, help="also write the table to this Markdown file")
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker)))
        return
    lines = [
        "# Data: memory while tokenising and reading",
        "",
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start; Python "
        f"{platform.python_version()}; commit {commit()}.",
        f"`python benchmarks/data.py --megabytes {' '.join(map(str, arguments.megabytes))}`; RSS in MB.",
        "",
        "| text | what | seconds | MB/s of text | RSS before | after a tenth | at the end | peak | files |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    found = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for megabytes in arguments.megabytes:
            source = pathlib.Path(folder) / f"{megabytes}.jsonl"
            write_texts(source, megabytes)
            done = subprocess.run(
                [sys.executable, __file__, "--worker", str(source)], stdout=subprocess.PIPE, check=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
            for what in ("tokenising", "reading"):
                lines.append(row(megabytes, what, found[-1][what]))
                print(lines[-1], flush=True)
    lines.append(verdict(*found))
    print(lines[-1])
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


def row(megabytes: int, what: str, one: dict) -> str:
    numbers = " | ".join(f"{one[name]:,.0f}" for name in ("before", "tenth", "end", "peak", "files"))
    return (
        f"| {megabytes:,} MB | {what} | {one['seconds']:.1f} | {megabytes / one['seconds']:.1f} | {numbers} |"
    )


def verdict(small: dict, large: dict) -> str:
    words = []
    for what in ("tokenising", "reading"):
        more = (large[what]["peak"] - large[what]["before"]) - (small[what]["peak"] - small[what]["before"])
        if more > MARGIN:
            sys.exit(f"{what}: the larger text needs {more:.0f} MB more; memory grows with the text")
        grown = large[what]["end"] - large[what]["tenth"]
        words.append(f"{what}, {grown:+.0f} MB from a tenth of the larger text to its end, {more:+.0f} MB")
    return "\n" + "; ".join(f"{one} at the peak beyond the smaller text" for one in words) + "."


def commit() -> str:
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def write_texts(file: pathlib.Path, megabytes: int) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(5000)])
    with file.open("w") as out:
        while out.tell() < megabytes * 1_000_000:
            for _ in range(100):
                text = " ".join(rng.choice(words, rng.integers(20, 600)))
                out.write(json.dumps({"text": text}) + "\n")


def measure(source: pathlib.Path) -> dict:
    """Tokenise and read one file in this process."""
    import numpy as np

    from mamba2_jax import load_tokenizer
    from mamba2_jax.training import DataConfig, load_documents, make_pipeline

    tokenizer, config = load_tokenizer(), DataConfig(max_length=LENGTH)
    load_documents([{"text": "once"}], tokenizer, config)  # what the libraries need once
    folder = source.with_suffix("")
    with Sampled() as tokenising:
        documents = load_documents(source, tokenizer, config, folder=folder)
    tokenising.result["files"] = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    pipeline = make_pipeline(documents, config, ROWS, seed=0, epochs=1)
    warm = next(iter(pipeline))
    total = 0
    with Sampled() as reading:
        for batch in pipeline:
            total += np.count_nonzero(batch["segment_ids"])
    assert warm["input_ids"].any()
    if total != documents.report.tokens:
        sys.exit(f"{total} tokens were read, {documents.report.tokens} written")
    reading.result["files"] = tokenising.result["files"]
    return {"tokenising": tokenising.result, "reading": reading.result}


class Sampled:
    """Sample this process's resident memory in a thread; `result` has MB and seconds."""

    def __enter__(self) -> "Sampled":
        self._samples, self._stop, self._start = [resident()], threading.Event(), time.perf_counter()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()
        samples = [*self._samples, resident()]
        self.result = {
            "seconds": time.perf_counter() - self._start,
            "before": samples[0],
            "tenth": samples[len(samples) // 10],
            "end": samples[-1],
            "peak": max(samples),
        }

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self._samples.append(resident())


def resident() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
