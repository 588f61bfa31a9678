"""One process of `step.py`: trains with Farspan or with its peer, one length after the other, and writes what it took.

python benchmarks/step_child.py farspan --config benchmarks/step.yaml --lengths 8192 --steps 3 --output step.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from step_measure import PEAK_FLOPS, Trainee, measure, model_flops

from farspan.launch.quiet import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainee", choices=("farspan", "huggingface"))
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--lengths", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()

    quiet_libraries()
    from farspan.trainer.config import ConfigError
    from farspan.trainer.config_file import load_config
    from farspan.trainer.preflight import check

    lengths = [int(length) for length in options.lengths.split(",")]
    configs = {length: options.overrides + row_of(length) for length in lengths}
    try:
        config = load_config(options.config, options.overrides)
        preflight = [check(load_config(options.config, overrides), 1) for overrides in configs.values()][-1]
    except ConfigError as error:
        sys.exit(f"{options.trainee}: {error}")
    if not config.attention.across_documents:
        sys.exit("this benchmark counts causal attention over whole rows; set attention.across_documents to true")
    if config.memory.keep_layers == "auto":
        sys.exit("memory.keep_layers auto needs some steps to find its number, which would be timed; give a number")
    device = start_process_group()
    trainee: Trainee
    if options.trainee == "farspan":
        from step_farspan import Farspan

        trainee = Farspan(options.config, options.overrides, preflight, device)
    else:
        from step_huggingface import HuggingFace

        trainee = HuggingFace(config, preflight, device)
    for length in lengths:
        row = {"trainee": options.trainee, "length": length, "parameters": trainee.parameters, "status": "ok"}
        row |= {"overrides": options.overrides, "torch": torch.__version__}
        row |= {"machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
        try:
            found = measure(trainee, length, options.steps, device)
        except torch.OutOfMemoryError:
            row["status"] = "out of memory"
        else:
            row |= {
                "seconds": found.seconds,
                "tokens_per_second": length / found.seconds,
                # Of sparse attention's work there is no such figure: what it leaves out is no work done.
                "mfu": None
                if config.attention.sparse
                else model_flops(preflight.model, length) / found.seconds / PEAK_FLOPS,
                "peak_gib": found.peak_bytes / 2**30,
                "loss": found.loss,
                **{f"{part}_seconds": seconds for part, seconds in found.parts.items()},
                "other_seconds": found.seconds - sum(found.parts.values()),
                **trainee.further,
            }
        with options.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        took = f"{row['seconds']:.3f} s, {row['peak_gib']:.1f} GiB" if row["status"] == "ok" else row["status"]
        print(f"{options.trainee}, {length:,} tokens: {took}", flush=True)
        if row["status"] != "ok":
            break  # what an optimizer step that broke off leaves behind is no state to go on from
    dist.destroy_process_group()


def row_of(length: int) -> list[str]:
    return [f"train.sequence_length={length}", f"train.tokens_per_step={length}"]


def start_process_group() -> torch.device:
    """One process that talks to nobody; DeepSpeed and Megatron ask for a group all the same."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1, device_id=device if cuda else None
    )
    return device


if __name__ == "__main__":
    main()
