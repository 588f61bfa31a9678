"""What attention's keys must be to each other and to others; a ValueError is one line that names the key to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farspan.kernels.tiles import TILE
from farspan.parallel.plans import CUT_ANYWHERE, KEYS_TRAVEL

if TYPE_CHECKING:
    from farspan.trainer.config import RunConfig


def check_star(config: RunConfig) -> None:
    star, parallel = config.attention.star, config.parallel
    if parallel.plan == "star" and parallel.order != "two_class":
        raise ValueError(
            f"parallel.plan star sends the rows that parallel.order two_class marks, but parallel.order is "
            f"{parallel.order}; set it to two_class"
        )
    if parallel.order == "two_class" and star is None:
        raise ValueError(
            "parallel.order two_class is for the global parts of Star Attention; set attention.star.block, or "
            "parallel.order to zigzag"
        )
    if parallel.order == "two_class" and parallel.sequence_parallel:
        raise ValueError(
            "parallel.order two_class gives ranks shares that change from batch to batch, which "
            "parallel.sequence_parallel cannot divide; set parallel.sequence_parallel to false"
        )
    if star is None:
        return
    if 2 * star.block > config.train.sequence_length:
        raise ValueError(
            f"attention.star.block {star.block} leaves every document dense, for none has two blocks in rows of "
            f"train.sequence_length {config.train.sequence_length}; lower it to {config.train.sequence_length // 2} "
            "or less"
        )
    if star.mode == "sft" and config.attention.across_documents:
        raise ValueError(
            "attention.star.mode sft goes by document; set attention.across_documents to false, or "
            "attention.star.mode to lm"
        )


def check_window(config: RunConfig) -> None:
    window, layers = config.attention.window, config.model.layers
    if window is None:
        return
    if window.width >= config.train.sequence_length:
        raise ValueError(
            f"attention.window.width {window.width} leaves every layer dense, for it is not less than "
            f"train.sequence_length {config.train.sequence_length}; lower it, or leave out attention.window"
        )
    full = set(window.full_layers)
    if len(full) != len(window.full_layers) or max(full, default=0) >= layers:
        raise ValueError(
            f"attention.window.full_layers {window.full_layers} must be different layers from 0 to {layers - 1} "
            "(model.layers)"
        )
    if len(full) == layers:
        raise ValueError(
            f"attention.window.full_layers names all {layers} layers, so that none has a window; leave some out, "
            "or leave out attention.window"
        )
    if config.attention.star is not None and not full:
        raise ValueError(
            "attention.star is for layers without a window, and attention.window.full_layers names none; name "
            "some, or leave out attention.window"
        )


def check_sparse(config: RunConfig) -> None:
    sparse, parallel, layers = config.attention.sparse, config.parallel, config.model.layers
    if sparse is None:
        if parallel.sparse_wire:
            raise ValueError(
                "parallel.sparse_wire leaves out what attention.sparse does not select, which is not given; set "
                "parallel.sparse_wire to false, or attention.sparse.mass"
            )
        return
    if parallel.sparse_wire and parallel.plan not in (*KEYS_TRAVEL, "auto"):
        raise ValueError(
            f"parallel.sparse_wire leaves out keys and values, and parallel.plan {parallel.plan} does not send "
            f"these alone; set parallel.plan to {', '.join(KEYS_TRAVEL[:-1])} or {KEYS_TRAVEL[-1]}, or "
            "parallel.sparse_wire to false"
        )
    if config.attention.star is not None:
        raise ValueError(
            "attention.sparse selects of what dense layers see, and attention.star cuts these into blocks; leave "
            "out one of them"
        )
    if parallel.plan in CUT_ANYWHERE:
        raise ValueError(
            f"parallel.plan {parallel.plan} cuts keys between any two tokens, and attention.sparse selects tiles "
            f"of {TILE}; set parallel.plan to ring, hierarchical_ring, all_gather, ulysses or usp"
        )
    if len(set(sparse.dense_layers)) != len(sparse.dense_layers) or max(sparse.dense_layers, default=0) >= layers:
        raise ValueError(
            f"attention.sparse.dense_layers {sparse.dense_layers} must be different layers from 0 to {layers - 1} "
            "(model.layers)"
        )
    if not sparse.layers(layers, config.attention.window):
        raise ValueError(
            "attention.sparse.dense_layers and attention.window leave no layer for attention.sparse; name fewer, "
            "or leave out attention.sparse"
        )
    if sparse.estimator == "moba" and sparse.top_k * sparse.chunk >= config.train.sequence_length:
        raise ValueError(
            f"attention.sparse.top_k {sparse.top_k} chunks of attention.sparse.chunk {sparse.chunk} tokens are all "
            f"of train.sequence_length {config.train.sequence_length}; lower one of them"
        )
    if sparse.dense_steps and config.memory.keep_layers == "auto":
        raise ValueError(
            "memory.keep_layers auto measures the first steps, and attention.sparse.dense_steps makes these unlike "
            "the later ones; set memory.keep_layers to a number"
        )
    if not (sparse.train or sparse.evaluate):
        raise ValueError(
            "attention.sparse.train and attention.sparse.evaluate are false, so that nothing is sparse; set one to "
            "true, or leave out attention.sparse"
        )
