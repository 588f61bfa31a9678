"""The choices of XAttention and MoBA by their published definitions, in plain loops over dense fp64 matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 128


def xattention_masses(q: Tensor, k: Tensor, stride: int) -> Tensor:
    """fp64 `[blocks, blocks]` of one head and one document, q and k `[N, D]`: each tile's attention between cells.

    The score of a cell of `stride` x `stride` tokens is the sum of its antidiagonal, over sqrt(D) and over the stride.
    """
    length, dim = q.shape
    cells, blocks = -(-length // stride), -(-length // BLOCK)
    q, k = (torch.cat([x.double(), x.new_zeros(cells * stride - length, dim).double()]) for x in (q, k))
    scores = q @ k.T / math.sqrt(dim) / stride
    between = torch.full((cells, cells), -math.inf, dtype=torch.float64)
    for i in range(cells):
        for j in range(i + 1):
            square = scores[i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            between[i, j] = square.flip(1).diagonal().sum()
    attention = between.softmax(-1)
    of_block, masses = BLOCK // stride, torch.zeros(blocks, blocks, dtype=torch.float64)
    for i in range(blocks):
        for j in range(i + 1):
            rows, keys = (slice(x * of_block, (x + 1) * of_block) for x in (i, j))
            masses[i, j] = attention[rows, keys].sum()
    return masses


def xattention_tiles(masses: Tensor, threshold: float) -> Tensor:
    """Bool `[blocks, blocks]`: the first and the own block, and then the greatest until the threshold is reached."""
    chosen = torch.zeros(masses.shape, dtype=torch.bool)
    for i, row in enumerate(masses):
        chosen[i, 0] = chosen[i, i] = True
        for j in row.argsort(descending=True, stable=True).tolist():
            if float(row[chosen[i]].sum()) >= threshold * float(row.sum()):
                break
            chosen[i, j] = True
    return chosen


def moba_gates(q: Tensor, k: Tensor, chunk: int) -> Tensor:
    """fp64 `[N, chunks]` of one head and one document: q times a chunk's mean key; inf for the own one, -inf later."""
    length = len(q)
    gates = torch.stack([q.double() @ part.double().mean(0) for part in k.split(chunk)], 1)
    for row in range(length):
        gates[row, row // chunk] = math.inf
        gates[row, row // chunk + 1 :] = -math.inf
    return gates


def moba_allowed(gates: Tensor, chunk: int, top_k: int) -> Tensor:
    """Bool `[N, N]`: the keys that each row computes, of the `top_k` chunks with the greatest gates; causal."""
    length, chunks = gates.shape
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for row in range(length):
        for c in gates[row].argsort(descending=True, stable=True)[: min(top_k, chunks)].tolist():
            if gates[row, c] > -math.inf:
                allowed[row, c * chunk : (c + 1) * chunk] = True
    return allowed.tril()
