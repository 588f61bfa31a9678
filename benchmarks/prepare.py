"""Does `farspan prepare` keep up with its tokenizer, and does its memory stay the same however large the corpus is?

    python benchmarks/prepare.py --megabytes 50 200 --output prepare.jsonl

Lines of JSON from the standard library's sources, in documents of 200 bytes to a megabyte, are encoded with a
SentencePiece tokenizer of 8,000 pieces: by the tokenizer alone, in one process, and by `farspan prepare`. Rates are
megabytes of text a second of CPU time (of all processes together, so that other work on the machine does not count;
start, hashing, indexes and report included) and of the clock; `of_tokenizer` is the share of the tokenizer's own rate a
core. Memory is the largest sum over all processes at any time. Runs on a CPU. Prints a table and appends one JSON
object a line to --output.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from farspan.data.text import read_document, standard_library
from farspan.data.tokenizer import Tokenizer, train_tokenizer

PIECES = 8000
SAMPLE = 8_000_000  # bytes that the tokenizer alone encodes
RUN = """
import sys
from pathlib import Path
from farspan.data.prepare import prepare
if __name__ == "__main__":
    prepare([sys.argv[1]], Path(sys.argv[2]), tokenizer=Path(sys.argv[3]), vocabulary_size=1, heldout_fraction=0.01,
            seed=0, processes=int(sys.argv[4]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where the corpora go for a while (the system's temporary folder)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = list(measure(Path(folder), options.megabytes, options.processes))
    print(f"{'MB':>6} {'processes':>9} {'MB/s of CPU':>11} {'of tokenizer':>12} {'MB/s':>7} {'peak MiB':>9}")
    for result in results:
        print(
            f"{result['megabytes']:>6} {result['processes'] or 'alone':>9} {result['cpu_rate']:>11.2f} "
            f"{result['of_tokenizer']:>12.2f} {result['rate']:>7.2f} {result['peak_mib'] or '-':>9}"
        )
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(result) + "\n" for result in results)


def measure(folder: Path, sizes: list[int], processes: list[int]) -> Iterator[dict[str, float | None]]:
    texts = [read_document(document.path) for document in standard_library()]
    model = folder / "tokenizer.model"
    train_tokenizer(texts, model, PIECES, threads=1, seed=0)
    alone = _tokenizer_alone(Tokenizer(model), texts)
    yield {**alone, "megabytes": SAMPLE // 1_000_000, "processes": None, "of_tokenizer": 1.0, "peak_mib": None}
    for megabytes in sizes:
        corpus = folder / "corpus.jsonl"
        text_bytes = _write(corpus, texts, megabytes * 1_000_000)
        for count in processes:
            found = _prepare(corpus, folder / f"{megabytes}-{count}", model, count)
            rate = text_bytes / 1e6 / found["cpu_seconds"]
            yield {
                "megabytes": megabytes,
                "processes": count,
                "cpu_rate": rate,
                "rate": text_bytes / 1e6 / found["seconds"],
                "of_tokenizer": rate / alone["cpu_rate"],
                "peak_mib": round(found["peak"] / 2**20),
            }
        corpus.unlink()


def _tokenizer_alone(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    documents = list(_documents(texts, SAMPLE))
    size = sum(len(document.encode()) for document in documents)
    tokenizer.encode(documents[0])
    cpu, clock = time.process_time(), time.perf_counter()
    for document in documents:
        tokenizer.encode(document)
    return {
        "cpu_rate": size / 1e6 / (time.process_time() - cpu),
        "rate": size / 1e6 / (time.perf_counter() - clock),
    }


def _documents(texts: list[str], size: int) -> Iterator[str]:
    """Slices of the texts, whose lengths are spread evenly over the logarithm."""
    draws = random.Random(0)
    whole = "\n".join(texts)
    while size > 0:
        length = int(200 * 5000 ** draws.random())
        start = draws.randrange(len(whole) - length)
        yield whole[start : start + length]
        size -= length


def _write(path: Path, texts: list[str], size: int) -> int:
    """A corpus of about `size` bytes; returns the bytes of its texts."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for document in _documents(texts, size):
            file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            written += len(document.encode())
    return written


def _prepare(corpus: Path, directory: Path, model: Path, processes: int) -> dict[str, float]:
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", RUN, str(corpus), str(directory), str(model), str(processes)]
    child, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0
    while child.poll() is None:
        peak = max(peak, _memory(child.pid))
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"farspan prepare ended with {child.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": cpu, "peak": peak}


def _memory(pid: int) -> int:
    """Resident bytes of a process and its children."""
    total = 0
    try:
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    except psutil.Error:  # it has just ended
        pass
    return total


if __name__ == "__main__":
    main()
