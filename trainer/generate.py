"""A trained checkpoint is asked a question about a long text, which the context ranks read together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from farspan.data.errors import DataError
from farspan.data.prepared import Prepared, load_prepared
from farspan.models import prefill
from farspan.models.config import ModelConfig
from farspan.models.prefill import Share
from farspan.models.reader import Reader
from farspan.parallel.degrees import Degrees
from farspan.parallel.mesh import Mesh
from farspan.trainer.attention_config import StarSection
from farspan.trainer.checkpoint.weights import newest_decoder
from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.config_file import load_run_config
from farspan.trainer.preflight import check_devices, with_vocabulary
from farspan.trainer.process_group import start_process_group


@dataclass(frozen=True)
class Request:
    """What `farspan generate` was asked for. The answer has up to `tokens` tokens; `seed` is for temperatures above 0.

    `star_block` takes the place of the run's own `attention.star.block`. With `replicate_anchor` every rank computes
    the anchor by itself instead of receiving it.
    """

    run: Path
    prompt: Path
    question: str
    tokens: int
    temperature: float
    seed: int
    star_block: int | None
    replicate_anchor: bool
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """A request that can be carried out, by a process for each context and tensor rank of the run."""

    request: Request
    config: RunConfig
    model: ModelConfig
    star: StarSection | None
    data: Prepared
    text: str

    @property
    def degrees(self) -> Degrees:
        return Degrees(1, self.config.parallel.context, self.config.parallel.tensor)


def check(request: Request) -> Ready:
    """ConfigError or DataError, in one line, unless the request can be carried out; checkpoints are not opened yet."""
    config = load_run_config(request.run, request.overrides)
    if config.attention.window is not None:
        raise ConfigError(
            "farspan generate keeps a cache of which every layer sees all, and attention.window is set; give "
            "attention.window=null to read without windows"
        )
    star = config.attention.star
    if request.star_block is not None:  # of any size: the text may be longer than the rows of training were
        anchor = min(star.anchor_tokens, request.star_block) if star else None
        star = StarSection(block=request.star_block, anchor=anchor)  # type: ignore[call-arg]
    if request.replicate_anchor and star is None:
        raise ConfigError("--replicate-anchor is for Star Attention; give --star-block, or set attention.star.block")
    data = load_prepared(config.data.directory)
    try:
        text = request.prompt.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--prompt-file {request.prompt} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--prompt-file {request.prompt} is not text in UTF-8") from error
    if not text:
        raise DataError(f"--prompt-file {request.prompt} is empty")
    ready = Ready(request, config, with_vocabulary(config, data), star, data, text)
    check_devices(ready.degrees.world, "parallel.context")
    return ready


def run(request: Request) -> None:
    """Answers as the rank that RANK and WORLD_SIZE name; the first one prints the answer, and on stderr what it did."""
    ready = check(request)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world != ready.degrees.world:
        raise ConfigError(
            f"{world} processes were started, but parallel.context {ready.degrees.context} x parallel.tensor "
            f"{ready.degrees.tensor} are {ready.degrees.world}"
        )

    def say(line: str) -> None:
        if rank == 0:
            print(line, file=sys.stderr, flush=True)

    mesh = Mesh.create(ready.degrees, start_process_group(ready.config.parallel.timeout_seconds))
    try:
        answer = _answer(ready, mesh, say)
        if rank == 0:
            print(answer, flush=True)
    finally:
        mesh.destroy()
        dist.destroy_process_group()


def _answer(ready: Ready, mesh: Mesh, say: Callable[[str], None]) -> str:
    request, tokenizer = ready.request, ready.data.open_tokenizer()
    text, question = tokenizer.encode(ready.text).tolist(), tokenizer.encode(request.question).tolist()
    model = newest_decoder(request.run, ready.config, ready.model, mesh, say)
    share = _share(ready, len(text), mesh, say)
    reader, begin = Reader(model, mesh), time.perf_counter()
    reader.prefill(text, share)
    if question:
        reader.read(question)
    answer = reader.decode(
        request.tokens, request.temperature, torch.Generator().manual_seed(request.seed), tokenizer.eod
    )
    first = next(answer, None)
    say(f"{len(text):,} tokens and {len(question):,} of the question read in {time.perf_counter() - begin:.2f} s")
    return tokenizer.decode([] if first is None else [first, *answer])


def _share(ready: Ready, length: int, mesh: Mesh, say: Callable[[str], None]) -> Share:
    """How the text is read: as in training, a document of less than two blocks is dense."""
    star, heads = ready.star, ready.model.heads_of_rank(mesh.degrees.tensor)
    if star is None or length < 2 * star.block:
        say("the text is read with dense attention" + (", for it has less than two blocks" if star else ""))
        return prefill.dense(length, mesh, heads)
    say(f"the text is read in blocks of {star.block:,} tokens with an anchor of {star.anchor_tokens:,}")
    way = prefill.star_replicated if ready.request.replicate_anchor else prefill.star
    return way(length, star.block, star.anchor_tokens, mesh, heads)
