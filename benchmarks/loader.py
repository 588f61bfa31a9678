"""How many tokens a second does one process make batches of? To be compared with what a GPU trains on.

    python benchmarks/loader.py --output loader.jsonl

For each way of making rows, without and with processes that read ahead (`data.workers`): rows are read from the token
files, laid out, and their masks made, as a training step has them before they are copied to the GPU. Nothing computes
beside it. Rates are by the clock, after as many steps as warm up. Overrides of benchmarks/decompose.yaml come last.
Runs on a CPU. Prints a table and appends one JSON object a line to --output.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from decompose import prepare_text
from step_child import start_process_group

from farspan.launch.quiet import quiet_libraries

quiet_libraries()  # before Megatron is imported

from farspan.parallel.mesh import Mesh  # noqa: E402
from farspan.trainer.config_file import load_config  # noqa: E402
from farspan.trainer.feed import Feed  # noqa: E402
from farspan.trainer.preflight import check  # noqa: E402

_WARM_UP = 4  # steps
METHODS = {
    "decompose": ["data.method=decompose", "data.decompose.shortest=256"],
    "concat": [],
    "best_fit": ["data.method=best_fit"],
    "padded": ["data.method=padded"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "decompose.yaml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--output", type=Path)
    options = parser.parse_intermixed_args()

    prepare_text(load_config(options.config, options.overrides))
    start_process_group()
    mesh, results = None, []
    for method, keys in METHODS.items():
        for workers in options.workers:
            config = load_config(options.config, [*options.overrides, *keys, f"data.workers={workers}"])
            preflight = check(config, 1)
            mesh = mesh or Mesh.create(preflight.degrees, torch.device("cpu"))
            feed = Feed(config, preflight.model, preflight.rows, mesh)
            rate = tokens_per_second(feed, options.steps, config.train.tokens_per_step)
            feed.close()
            results.append({"method": method, "workers": workers, "tokens_per_second": rate})
            print(f"{method:<12} {workers} workers {rate:>14,.0f} tokens/s", flush=True)
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(result) + "\n" for result in results)
    assert mesh is not None
    mesh.destroy()
    dist.destroy_process_group()


def tokens_per_second(feed: Feed, steps: int, tokens_per_step: int) -> float:
    for step in range(_WARM_UP):
        feed.training_batches(step)
    begin = time.perf_counter()
    for step in range(_WARM_UP, _WARM_UP + steps):
        feed.training_batches(step)
    return steps * tokens_per_step / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
