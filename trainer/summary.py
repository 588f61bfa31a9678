"""What a run says of itself before its first step and after its last."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from farspan.kernels.problem import capability
from farspan.trainer.checkpoint.store import CheckpointStore
from farspan.trainer.config import RunConfig
from farspan.trainer.config_file import dump_config
from farspan.trainer.describe_backends import attention_problem, describe_backends
from farspan.trainer.feed import Feed
from farspan.trainer.metrics import MetricsFile
from farspan.trainer.packing import describe_rows
from farspan.trainer.preflight import Preflight


def describe_start(
    config: RunConfig, preflight: Preflight, feed: Feed, step: int, report: Callable[[str], None]
) -> None:
    train, parallel = config.train, config.parallel
    names = dict.fromkeys(chosen.name for sharing in feed.sharings.values() for chosen in sharing.plans.values())
    report(
        f"model {config.model.preset or 'of the configuration'}: {preflight.model.parameters():,} parameters | "
        f"mesh {preflight.degrees} | plan {' and '.join(names)}, order {parallel.order} | ZeRO {parallel.zero_stage}, "
        f"{train.dtype}"
    )
    if (star := config.attention.star) is not None:
        report(f"Star Attention: {star.in_words}")
        if star.warning:
            report(f"warning: {star.warning}")
    if config.attention.window is not None:
        layers = Counter(feed.longest.arrangement.layers)
        kinds = [f"{count} of {layers.total()} see {seen.in_words}" for seen, count in layers.items()]
        report(f"layers: {', '.join(kinds)}")
    for length, sharing in feed.sharings.items():
        for chosen in sharing.plans.values():
            if chosen.reason:
                report(chosen.reason if len(feed.sharings) == 1 else f"rows of {length:,}: {chosen.reason}")
    rows = ", or ".join(
        f"{train.tokens_per_step // length:,} rows of {length:,}"
        + (f" (context {sharing.mesh.degrees.context})" if feed.mesh.narrower else "")
        for length, sharing in feed.sharings.items()
    )
    report(
        f"step: {train.tokens_per_step:,} tokens = {rows} | "
        f"text: {preflight.prepared.tokens['train']:,} tokens in {preflight.prepared.documents['train']:,} documents | "
        f"held out: {feed.heldout_rows} rows"
    )
    for line in describe_rows(config, feed.steps):
        report(line)
    report(f"attention of the first batch: {_backends(config, feed, step)}")


def _backends(config: RunConfig, feed: Feed, step: int) -> str:
    """Who computes the pieces of this rank, in one line."""
    prepared = dict.fromkeys(feed.decoder_input(feed.training_batches(step)[0]).plans)
    tensors = attention_problem(config, capability(feed.mesh.device))
    lines = describe_backends(prepared, tensors, config.attention.backend)
    more = f"; {len(lines) - 4} other kinds, see farspan doctor" if len(lines) > 4 else ""
    return "; ".join(lines[:4]) + more


def describe_changes(previous: Path, config: RunConfig, report: Callable[[str], None]) -> None:
    """Says which keys differ from those that this run was last started with."""
    if not previous.exists():
        return
    changes = list(_changes("", yaml.safe_load(previous.read_text()), yaml.safe_load(dump_config(config))))
    if changes:
        report(f"changed since this run was last started: {', '.join(changes)}")


def _changes(key: str, before: Any, now: Any) -> Iterator[str]:
    """A section that is there in one of the two alone is one change."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before | now):
            yield from _changes(f"{key}.{name}".lstrip("."), before.get(name), now.get(name))
    elif before != now:
        yield f"{key} {_in_short(before)} -> {_in_short(now)}"


def _in_short(value: Any) -> str:
    if not isinstance(value, dict):
        return "none" if value is None else str(value)
    return f"a section of {len(value)} keys"


def summarize(config: RunConfig, stopped_by: str | None, store: CheckpointStore, report: Callable[[str], None]) -> None:
    """Ends with where to look."""
    directory = config.run.dir
    rows = MetricsFile(directory / "metrics.jsonl").read()
    newest = store.list()[-1]
    if stopped_by is not None and newest.step < config.train.steps:
        report(f"stopped as asked after step {newest.step} of {config.train.steps}; run again to go on")
    else:
        report(f"the run is complete: {newest.step} of {config.train.steps} steps")
    first, last = rows[0], rows[-1]
    report(f"  first loss        {first['loss']:.4f}")
    report(f"  last loss         {last['loss']:.4f}")
    evaluations = [row for row in rows if "eval_loss" in row]
    if evaluations:
        report(f"  held-out loss     {evaluations[-1]['eval_loss']:.4f} (step {evaluations[-1]['step']})")
    report(f"  tokens with loss  {last['tokens']:,}")
    report(f"  checkpoint        {newest.path}")
    report(f"  curves            {_command('tensorboard')} --logdir {directory / 'tensorboard'}")


def _command(name: str) -> str:
    """How the user starts a command of this environment, also one that is not activated."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) or not beside.exists():
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)
