"""`farspan calibrate`: how many columns and diagonals the heads of a trained model need on the user's own text."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from farspan.data.prepared import load_prepared
from farspan.kernels.index import Index, VerticalSlashIndex
from farspan.kernels.tiles import TILE
from farspan.models.config import ModelConfig
from farspan.models.decoder import Decoder
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh
from farspan.trainer.arrangement import Arrangement, check_tiles
from farspan.trainer.budgets import Budgets
from farspan.trainer.checkpoint.weights import newest_decoder
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.config_file import load_run_config
from farspan.trainer.feed import Feed
from farspan.trainer.first_rows import RunRows
from farspan.trainer.preflight import check_devices, with_vocabulary
from farspan.trainer.process_group import start_process_group
from farspan.trainer.row_length import for_rows, narrower_contexts
from farspan.trainer.sparse import of_all_heads


@dataclass(frozen=True)
class Request:
    """`rows` of held-out text are read; budgets suffice for the share `quantile` of them."""

    run: Path
    output: Path
    rows: int
    quantile: float
    overrides: tuple[str, ...]


def check(request: Request) -> tuple[RunConfig, Degrees]:
    """ConfigError, in one line, unless the request can be carried out; checkpoints are not opened yet."""
    config = load_run_config(request.run, [*request.overrides, f"eval.rows={request.rows}"])
    if config.attention.sparse is None:
        raise ConfigError(
            "there is nothing to calibrate: give the mass that heads are to cover, such as attention.sparse.mass=0.9"
        )
    if config.attention.sparse.estimator != "vertical_slash":
        raise ConfigError(
            f"attention.sparse.estimator {config.attention.sparse.estimator} has no budgets to calibrate; set it to "
            "vertical_slash"
        )
    if config.attention.sparse.budgets is not None:
        raise ConfigError("attention.sparse.budgets are what calibrate finds; set it to null")
    if not request.output.parent.is_dir():
        raise ConfigError(f"--output {request.output}: there is no folder {request.output.parent}")
    # More ranks than share a row would each read some of the rows alone.
    config = for_rows(config, config.train.sequence_length)
    degrees = Degrees(1, config.parallel.context, config.parallel.tensor)
    check_tiles(config, Arrangement(config, degrees.context).order())
    check_devices(degrees.world, "parallel.context")
    return config, degrees


def run(request: Request) -> None:
    """As the rank that RANK and WORLD_SIZE name; the first one writes the file and prints what was found."""
    config, degrees = check(request)
    data = load_prepared(config.data.directory)
    model = with_vocabulary(config, data)
    leads = int(os.environ.get("RANK", 0)) == 0

    def say(line: str) -> None:
        if leads:
            print(line, file=sys.stderr, flush=True)

    device = start_process_group(config.parallel.timeout_seconds)
    mesh = Mesh.create(degrees, device, narrower=narrower_contexts(config))
    try:
        decoder = newest_decoder(request.run, config, model, mesh, say)
        feed = Feed(config, model, RunRows.of(config, data), mesh)
        budgets = _measure(request, config, model, feed, decoder, mesh, say)
        if leads:
            budgets.write(request.output)
            print(f"{request.output}: for attention.sparse.budgets")
    finally:
        mesh.destroy()
        dist.destroy_process_group()


def _measure(
    request: Request,
    config: RunConfig,
    model: ModelConfig,
    feed: Feed,
    decoder: Decoder,
    mesh: Mesh,
    say: Callable[[str], None],
) -> Budgets:
    sparse, settings = feed.sparse, config.attention.sparse
    assert sparse is not None
    assert settings is not None
    needed: dict[int, list[Tensor]] = defaultdict(list)

    def note(layer: int, index: Index) -> None:
        assert isinstance(index, VerticalSlashIndex)
        always = settings.local_blocks, min(settings.sinks, index.length)
        diagonals, columns = index.diagonals[..., always[0] :].sum(-1), index.column_counts() - always[1]
        needed[layer].append(torch.stack([columns, diagonals])[:, 0])

    sparse.watch = note
    sparse.begin(0, training=False)
    batches = feed.heldout_batches()
    if len(batches) < request.rows:
        say(f"held-out text has {len(batches)} rows, and --rows asked for {request.rows}")
    with torch.no_grad():
        for number, batch in enumerate(batches, start=1):
            decoder(feed.decoder_input(batch))
            say(f"row {number} of {len(batches)} read")
    columns: list[list[int]] = [[] for _ in range(model.layers)]
    diagonals: list[list[int]] = [[] for _ in range(model.layers)]
    for layer, rows in needed.items():
        mine = torch.stack(rows).double().quantile(request.quantile, 0).ceil().long()
        columns[layer], diagonals[layer] = of_all_heads(mine, mesh.tensor).tolist()
        blocks = -(-config.train.sequence_length // TILE)
        say(
            f"layer {layer}: columns {min(columns[layer])} to {max(columns[layer])}, diagonals {min(diagonals[layer])} "
            f"to {max(diagonals[layer])} of {blocks}, besides attention.sparse.sinks and local_blocks"
        )
    for key, most, found in (
        ("columns", settings.most_columns, columns),
        ("diagonals", settings.most_diagonals, diagonals),
    ):
        capped = sum(number >= most for layer in found for number in layer)
        if capped:
            say(
                f"{capped} heads have as many {key} as attention.sparse.most_{key} {most} allows, and may cover less "
                f"than the mass of {settings.mass:g}: raise it, here and in training"
            )
    return Budgets(config.train.sequence_length, settings.mass, len(batches), request.quantile, columns, diagonals)
