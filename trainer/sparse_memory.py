"""Bytes that sparse attention takes beside attention's own tensors, from the configuration and a plan alone."""

from __future__ import annotations

import numpy as np

from farspan.kernels.tiles import TILE
from farspan.parallel.pairs import VisiblePairs
from farspan.parallel.plan import Plan
from farspan.trainer.attention_config import SparseSection
from farspan.trainer.config import RunConfig

# Of a tile in a list, and of a key's place among the columns.
_NUMBER = 4
# Of each key and head: scores, ranked ones and one copy more (int64), and whether it was chosen.
_SCORE = 3 * 8 + 1
# Of each probe, tile of keys and head: an exponent and a sum.
_PARTIAL = 2 * 4


def selection_bytes(config: RunConfig, plan: Plan, visible: VisiblePairs, columns: int) -> int:
    """Of the largest piece, backward: room for the list of one side, kinds of tiles, gradients of columns.

    A list has room for all tiles that the mask shows, of every head. `columns` are those of a head at most; their
    gradients are fp32, what programs found and their sum.
    """
    pieces, batch = plan.backward.piece_columns, config.train.micro_batch_rows
    slots = np.array([block.slots[1] - block.slots[0] for block in plan.blocks], np.int64)
    heads = np.array([block.heads[1] - block.heads[0] for block in plan.blocks], np.int64)
    rows, keys, pairs = (np.zeros(len(plan.backward.pieces), np.int64) for _ in range(3))
    np.add.at(rows, pieces.q.pieces, slots[pieces.q.blocks])
    np.add.at(keys, pieces.kv.pieces, slots[pieces.kv.blocks])
    piece, q, kv = pieces.pairs()
    np.add.at(pairs, piece, visible.of(q, kv))
    of_piece = heads[pieces.q.blocks[pieces.q.counts.cumsum() - pieces.q.counts]]
    row_tiles, key_tiles = -(-rows // TILE), -(-keys // TILE)
    # Of each tile of rows one tile of keys is seen in part.
    shown = np.minimum(pairs // (visible.batch * TILE**2) + row_tiles, row_tiles * key_tiles)
    gradients = 2 * 2 * 4 * columns * config.model.head_dim
    each = batch * of_piece * (_NUMBER * (shown + keys) + gradients) + visible.batch * row_tiles * key_tiles
    return int(each.max(initial=0))


def estimation_bytes(config: RunConfig, sparse: SparseSection, slots: int) -> int:
    """Of one layer on a rank that holds so many slots: what the passes over the probes' scores leave, and ranking."""
    heads, _ = config.model.heads_of_rank(config.parallel.tensor)
    probes = sparse.probes * (sparse.segments + sparse.documents)
    of_head = slots * _SCORE + -(-slots // TILE) * probes * _PARTIAL
    return config.train.micro_batch_rows * heads * of_head
