"""Bytes that sparse attention takes beside attention's own tensors, from the configuration and a plan alone."""

from __future__ import annotations

import numpy as np

from farspan.kernels.bits import WORD
from farspan.kernels.tiles import TILE
from farspan.parallel.pairs import VisiblePairs
from farspan.parallel.plan import Plan
from farspan.trainer.attention_config import SparseSection
from farspan.trainer.config import RunConfig

# Of a tile in a list, and of a key's place among the columns.
_NUMBER = 4
# Of each key and head: ranked scores and two copies (int64), and whether it was chosen.
_SCORE = 3 * 8 + 1
# Of each probe, tile of keys and head: an exponent and a sum.
_PARTIAL = 2 * 4
# Of a pair of tiles and a head in XAttention's table: a word of the index, and whether it is selected.
_LOOKED_UP = 4 + 1
# Blocks of rows whose scores XAttention has at once; of each score fp32, and what is made of it.
_ROW_BLOCKS, _CELL = 32, 3 * 4
# Copies of all keys that XAttention has at most, and of its index that MoBA has.
_COPIES_OF_KEYS, _COPIES_OF_INDEX = 4, 3


def selection_bytes(config: RunConfig, plan: Plan, visible: VisiblePairs, columns: int) -> int:
    """Of the largest piece, backward: room for the list of one side, kinds of tiles, gradients of columns, and what is
    taken from the index.

    A list has room for all tiles that the mask shows, of every head. `columns` are those of a head at most; their
    gradients are fp32, what programs found and their sum.
    """
    pieces, batch, sparse = plan.backward.piece_columns, config.train.micro_batch_rows, config.attention.sparse
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
    taken = np.zeros_like(rows)
    if sparse is not None and sparse.estimator == "xattention":
        taken = _LOOKED_UP * row_tiles * key_tiles
    if sparse is not None and sparse.estimator == "moba":
        taken = _chunk_words(sparse, config.train.sequence_length) * _NUMBER * rows
    of_heads = _NUMBER * (shown + keys) + gradients + taken
    each = batch * of_piece * of_heads + visible.batch * row_tiles * key_tiles
    return int(each.max(initial=0))


def index_bytes(config: RunConfig, sparse: SparseSection) -> int:
    """Of one layer's index of the whole row, which a rank has until the layer's next one, for backward and reports."""
    length = config.train.sequence_length
    heads, _ = config.model.heads_of_rank(config.parallel.tensor)
    blocks = -(-length // TILE)
    of_head = {
        "vertical_slash": blocks + _NUMBER * (min(sparse.most_columns, length) + sparse.sinks),
        "xattention": _NUMBER * blocks * -(-blocks // WORD),
        "moba": _NUMBER * blocks * TILE * _chunk_words(sparse, length),
    }
    return config.train.micro_batch_rows * heads * of_head[sparse.estimator]


def estimation_bytes(config: RunConfig, sparse: SparseSection, slots: int) -> int:
    """Of one layer on a rank that holds so many slots, beside its queries and keys."""
    heads, kv_heads = config.model.heads_of_rank(config.parallel.tensor)
    train, length = config.train, config.train.sequence_length
    of_key = train.micro_batch_rows * kv_heads * config.model.head_dim * (2 if train.dtype == "bf16" else 4)
    if sparse.estimator == "xattention":
        cells = TILE // sparse.stride * heads // kv_heads * -(-length // sparse.stride)
        return _COPIES_OF_KEYS * of_key * length + _ROW_BLOCKS * cells * _CELL
    if sparse.estimator == "moba":
        return of_key * slots + _COPIES_OF_INDEX * index_bytes(config, sparse)
    documents = 0 if config.attention.across_documents else sparse.documents
    probes = sparse.probes * (sparse.segments + documents)
    # What the passes over the probes' scores leave, and ranking.
    of_head = slots * _SCORE + -(-slots // TILE) * probes * _PARTIAL
    return train.micro_batch_rows * heads * of_head


def _chunk_words(sparse: SparseSection, length: int) -> int:
    """int32 that hold the chunks of a row of MoBA's index."""
    chunks = -(-length // sparse.chunk)
    return -(-chunks // WORD)
