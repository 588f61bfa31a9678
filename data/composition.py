"""How well a way of making rows keeps documents whole: padding, cuts, company, and how much tokens see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farspan.data.decompose import Decomposition
from farspan.data.errors import DataError
from farspan.data.layout import Layout


@dataclass(frozen=True)
class Composition:
    """Measures of a layout.

    rows, tokens: rows, and tokens of text in them.
    padding: share of the rows' tokens that hold no text.
    truncation: share of the documents that no row holds as a whole.
    discarded: share of the text's tokens that no row holds.
    concatenation: share of the pieces that have a row in common with another one.
    average_length: tokens of a piece.
    average_context: tokens before a token that it can see, on average over all tokens.
    """

    rows: int
    tokens: int
    padding: float
    truncation: float
    discarded: float
    concatenation: float
    average_length: float
    average_context: float

    @property
    def in_words(self) -> str:
        return (
            f"{self.rows:,} rows, {self.padding:.2%} padding; {self.truncation:.2%} of the documents are cut or left "
            f"out, with {self.discarded:.2%} of the tokens"
        )


def measure(layout: Layout, lengths: NDArray[np.int64], across_documents: bool = False) -> Composition:
    """`lengths`: int64 [documents], tokens of each; with `across_documents` tokens see all before them in their row."""
    sizes, counts = layout.pieces.sizes, np.diff(layout.offsets)
    whole = np.count_nonzero(sizes == lengths[layout.pieces.documents])
    tokens = int(sizes.sum())
    seen = np.add.reduceat(sizes, layout.offsets[:-1]) if across_documents else sizes
    return Composition(
        rows=len(layout),
        tokens=tokens,
        padding=1 - tokens / (len(layout) * layout.length),
        truncation=1 - whole / np.count_nonzero(lengths),
        discarded=1 - tokens / int(lengths.sum()),
        concatenation=int(counts[counts > 1].sum()) / len(sizes),
        average_length=tokens / len(sizes),
        average_context=context_in(seen),
    )


def measure_decomposition(found: Decomposition, lengths: NDArray[np.int64]) -> Composition:
    """Rows are pieces of one document each. Tokens that are only a row's last label are not its own, nor discarded."""
    sizes = np.repeat(list(found.places), [len(places) for places in found.places.values()])
    documents = np.concatenate([places.documents for places in found.places.values()])
    if not len(sizes):
        raise DataError("no document is as long as data.decompose.shortest: lower it.")
    # A row's last label may be the document's last token.
    whole = np.count_nonzero(sizes + 1 >= lengths[documents])
    return Composition(
        rows=len(sizes),
        tokens=int(sizes.sum()),
        padding=0.0,
        truncation=1 - whole / np.count_nonzero(lengths),
        discarded=found.discarded_tokens / int(lengths.sum()),
        concatenation=0.0,
        average_length=float(sizes.mean()),
        average_context=context_in(sizes),
    )


def windowed_context(layout: Layout, width: int) -> float:
    """`average_context` of rows without padding whose documents end also wherever `width` tokens of a row are full."""
    total = len(layout) * layout.length
    firsts = np.arange(0, layout.length, width)[None] + np.arange(0, total, layout.length)[:, None]
    bounds = np.unique(np.concatenate(([0], np.cumsum(layout.pieces.sizes), firsts.ravel())))
    return context_in(np.diff(bounds))


def context_in(sizes: NDArray[np.int64]) -> float:
    """Tokens before a token in its stretch of text, on average over all tokens of stretches of these sizes."""
    return float((sizes * (sizes - 1.0)).sum()) / 2 / float(sizes.sum())


def table(compositions: dict[str, Composition]) -> list[str]:
    """A line for each, by its name, below a heading."""
    width = max(map(len, compositions))
    lines = [
        f"{'':{width}} {'rows':>11} {'text tokens':>15} {'padding':>8} {'cut':>8} {'lost':>8} {'joined':>8} "
        f"{'mean length':>12} {'mean context':>13}"
    ]
    for name, found in compositions.items():
        shares = (found.padding, found.truncation, found.discarded, found.concatenation)
        lines.append(
            f"{name:{width}} {found.rows:>11,} {found.tokens:>15,} "
            + " ".join(f"{share:>8.2%}" for share in shares)
            + f" {found.average_length:>12,.0f} {found.average_context:>13,.0f}"
        )
    return lines
