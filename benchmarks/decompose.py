"""What does dataset decomposition save? The same model on the same number of tokens, by three ways of making rows.

    python benchmarks/decompose.py --output decompose

`decompose`: rows of 256 tokens up to the longest, each of one document, in a curriculum. `concat, masked`: rows of the
longest length of documents one after the other, which see themselves alone. `concat`: the same without masks. All start
from the same weights, with the same optimizer. Before anything is timed, each length is computed once, so that kernels
are compiled.

Prints a table and writes decompose.json, and pictures where matplotlib is installed: time of a step by length, with the
line through its medians; held-out loss by the seconds of training; and held-out loss by length after it. Held-out text
is read alike after all three, each document by itself. Overrides of benchmarks/decompose.yaml come last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from step_child import start_process_group

from farspan.launch.quiet import quiet_libraries

quiet_libraries()  # before Megatron is imported

from farspan.data.batch import Batch  # noqa: E402
from farspan.data.corpus import Corpus  # noqa: E402
from farspan.data.decompose import BucketRows  # noqa: E402
from farspan.data.prepare import prepare  # noqa: E402
from farspan.data.rows import blank_row  # noqa: E402
from farspan.parallel.mesh import Mesh  # noqa: E402
from farspan.trainer.config import RunConfig  # noqa: E402
from farspan.trainer.config_file import load_config  # noqa: E402
from farspan.trainer.decomposed import decompose_corpus  # noqa: E402
from farspan.trainer.engine import Engine  # noqa: E402
from farspan.trainer.feed import Feed  # noqa: E402
from farspan.trainer.preflight import Preflight, check  # noqa: E402
from farspan.trainer.stop import StopRequest  # noqa: E402
from farspan.trainer.train import build_model  # noqa: E402
from farspan.trainer.trainer import StepRecord, Trainer  # noqa: E402

_HERE = Path(__file__).parent
_DECOMPOSE = ["data.method=decompose", "curriculum.odds=grow_p2"]
ARMS = {
    "decompose": _DECOMPOSE,
    "concat, masked": ["attention.across_documents=false"],
    "concat": ["attention.across_documents=true"],
}
EVALUATIONS = 6
ROWS_OF_A_LENGTH = 32  # that its held-out loss is of, at most


@dataclass
class Reading:
    """Of one way of making rows: its steps, and the held-out loss after some of them."""

    lengths: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    heldout: list[tuple[float, float]] = field(default_factory=list)  # (seconds of training, loss)
    by_length: dict[int, float] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config", type=Path, default=_HERE / "decompose.yaml")
    parser.add_argument("--shortest", type=int, default=256, help="tokens of the shortest rows")
    parser.add_argument("--cycles", type=int, default=4, help="of the curriculum")
    parser.add_argument("--output", type=Path, default=Path("decompose"), help="folder of the results")
    options = parser.parse_intermixed_args()

    _DECOMPOSE.extend([f"data.decompose.shortest={options.shortest}", f"curriculum.cycles={options.cycles}"])
    prepare_text(load_config(options.config, options.overrides))
    configs = {name: load_config(options.config, [*options.overrides, *keys]) for name, keys in ARMS.items()}
    preflights = {name: check(config, 1) for name, config in configs.items()}
    mesh = Mesh.create(preflights["decompose"].degrees, start_process_group())
    heldout = HeldOut(configs["decompose"], preflights["decompose"], mesh)
    readings = {}
    for name, config in configs.items():
        readings[name] = train(config, preflights[name], mesh, heldout)
        took = sum(readings[name].seconds)
        print(f"{name}: {took:.1f} s, held-out loss {readings[name].heldout[-1][1]:.4f}", flush=True)
    report(readings, configs["decompose"], options.output)
    mesh.destroy()
    dist.destroy_process_group()


def prepare_text(config: RunConfig) -> None:
    """The configuration's sources, and those of PyTorch: tens of megabytes of documents of all lengths."""
    data = config.data
    prepare(
        [*(source.listed() for source in data.sources), str(Path(torch.__file__).parent)],
        data.directory,
        tokenizer=data.tokenizer,
        vocabulary_size=data.vocabulary_size,
        heldout_fraction=data.heldout_fraction,
        seed=config.run.seed,
        processes=data.processes,
        report=lambda line: print(line, flush=True),
    )


class HeldOut:
    """Held-out text as the rows of all lengths see it: whole rows of documents, and rows of one document by length."""

    def __init__(self, config: RunConfig, preflight: Preflight, mesh: Mesh) -> None:
        self.feed = Feed(config, preflight.model, preflight.rows, mesh)
        corpus = Corpus(preflight.prepared, "heldout")
        places = decompose_corpus(config, corpus).places
        self.rows = {length: BucketRows(corpus, found, length) for length, found in places.items()}

    def loss(self, engine: Engine) -> float:
        return self._mean(engine, self.feed.heldout_batches())

    def loss_by_length(self, engine: Engine) -> dict[int, float]:
        found = {}
        for length, rows in self.rows.items():
            arrangement = self.feed.sharings[length].arrangement
            batches = [arrangement.batch([rows[i]], 0) for i in range(min(ROWS_OF_A_LENGTH, len(rows)))]
            if batches:
                found[length] = self._mean(engine, batches)
        return found

    def compile(self, engine: Engine, feed: Feed) -> None:
        """One pass in both directions of each length that `feed` has, which leaves gradients as they were: zero."""
        for length, sharing in feed.sharings.items():
            batch = sharing.arrangement.batch([blank_row(length)] * sharing.micro_batch_rows, 0)
            engine.backward(0 * engine.forward(feed.decoder_input(batch))[0], last=False)
        self.loss(engine)

    def _mean(self, engine: Engine, batches: Sequence[Batch]) -> float:
        engine.training(False)
        with torch.no_grad():
            total = sum(float(engine.forward(self.feed.decoder_input(batch))[0]) for batch in batches)
        engine.training(True)
        return total / sum(batch.valid for batch in batches)


class Watch:
    """A callback of the trainer that fills a `Reading`; what it does itself is not timed."""

    def __init__(self, reading: Reading, heldout: HeldOut, every: int) -> None:
        self.reading, self.heldout, self.every = reading, heldout, every
        self.begin = self.now()

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.reading.lengths.append(record.sequence_length)
        self.reading.seconds.append(self.now() - self.begin)
        self.reading.losses.append(record.loss)
        if record.step % self.every == 0 or trainer.last_step:
            loss = self.heldout.loss(trainer.engine)
            self.reading.heldout.append((sum(self.reading.seconds), loss))
        self.begin = self.now()


def train(config: RunConfig, preflight: Preflight, mesh: Mesh, heldout: HeldOut) -> Reading:
    feed = Feed(config, preflight.model, preflight.rows, mesh)
    engine = Engine(config, mesh, build_model(config, preflight.model, mesh))
    heldout.compile(engine, feed)
    reading = Reading()
    reading.heldout.append((0.0, heldout.loss(engine)))
    feed.look_ahead(0)  # the first step would be the only one that reads its own rows
    watch = Watch(reading, heldout, max(1, config.train.steps // EVALUATIONS))
    with StopRequest() as stop:
        Trainer(config, mesh, engine, feed, [watch]).train(stop)
    reading.by_length = heldout.loss_by_length(engine)
    engine.close()
    feed.close()
    return reading


def step_times(reading: Reading) -> dict[int, float]:
    """Median seconds of a step by length."""
    times: dict[int, list[float]] = defaultdict(list)
    for length, seconds in zip(reading.lengths, reading.seconds, strict=True):
        times[length].append(seconds)
    return {length: median(times[length]) for length in sorted(times)}


def fit(times: dict[int, float]) -> tuple[float, float, float]:
    """a, b and R^2 of seconds = a + b x length."""
    lengths, seconds = np.array(list(times)), np.array(list(times.values()))
    b, a = np.polyfit(lengths, seconds, 1)
    left = seconds - a - b * lengths
    return float(a), float(b), float(1 - (left**2).sum() / ((seconds - seconds.mean()) ** 2).sum())


def report(readings: dict[str, Reading], config: RunConfig, output: Path) -> None:
    tokens = config.train.steps * config.train.tokens_per_step
    times = step_times(readings["decompose"])
    a, b, r2 = fit(times)
    shortest = min(sum(reading.seconds) for reading in readings.values())
    arms: dict[str, Any] = {}
    for name, reading in readings.items():
        took = sum(reading.seconds)
        seconds, losses = zip(*reading.heldout)
        arms[name] = {
            "tokens_per_second": tokens / took,
            "seconds": took,
            "heldout_loss": losses[-1],
            "heldout_loss_at_equal_time": float(np.interp(shortest, seconds, losses)),
            "heldout": reading.heldout,
            "loss_by_length": reading.by_length,
            "step_lengths": reading.lengths,
            "step_seconds": reading.seconds,
            "step_losses": reading.losses,
        }
    result = {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "tokens": tokens,
        "tokens_per_step": config.train.tokens_per_step,
        "equal_time_seconds": shortest,
        "step_seconds_by_length": times,
        "fit": {"a": a, "b": b, "r2": r2},
        "arms": arms,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "decompose.json").write_text(json.dumps(result, indent=1))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no pictures: matplotlib is not installed; later, python {_HERE / 'decompose_plot.py'} {output}")
    else:
        from decompose_plot import plot

        plot(output)
    print_table(result)


def print_table(result: dict[str, Any]) -> None:
    times = result["step_seconds_by_length"]
    print(f"\n{result['machine']}: {result['tokens']:,} tokens, {result['tokens_per_step']:,} a step")
    print("  ".join(f"{length:,}: {seconds:.3f} s" for length, seconds in times.items()))
    found = result["fit"]
    print(f"a step takes {found['a']:.4f} s + {found['b']:.3e} s x length, R^2 {found['r2']:.4f}")
    lengths = sorted({length for arm in result["arms"].values() for length in arm["loss_by_length"]})
    print(f"\n{'held-out loss by length':<24}" + "".join(f"{length:>9,}" for length in lengths))
    for name, arm in result["arms"].items():
        print(f"{name:<24}" + "".join(f"{arm['loss_by_length'].get(n, float('nan')):>9.4f}" for n in lengths))
    at = f"after {result['equal_time_seconds']:.1f} s"
    print(f"\n{'':<24}{'seconds':>10}{'tokens/s':>12}{'times':>8}{'held-out loss':>15}{at:>15}")
    slowest = min(arm["tokens_per_second"] for arm in result["arms"].values())
    for name, arm in result["arms"].items():
        print(
            f"{name:<24}{arm['seconds']:>10.1f}{arm['tokens_per_second']:>12,.0f}"
            f"{arm['tokens_per_second'] / slowest:>8.2f}{arm['heldout_loss']:>15.4f}"
            f"{arm['heldout_loss_at_equal_time']:>15.4f}"
        )


if __name__ == "__main__":
    main()
