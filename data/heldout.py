"""Which documents are kept for evaluation."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from farspan.data.errors import DataError
from farspan.data.texts import Text


@dataclass(frozen=True)
class HeldOut:
    """A draw for each document by its name within its source, which does not depend on the others.

    only: where the draw would hold out none, the source (by number) and name of the one that is held out instead.
    """

    fraction: float
    seed: int
    only: tuple[int, str] | None = None

    def __call__(self, source: int, name: str) -> bool:
        if self.only is not None:
            return (source, name) == self.only
        digest = hashlib.sha256(json.dumps([self.seed, name]).encode()).hexdigest()
        return int(digest[:16], 16) / 2**64 < self.fraction


def choose_heldout(texts: Iterable[Text], fraction: float, seed: int) -> HeldOut:
    """A draw that leaves no split empty: where none is drawn, the document is held out whose size is nearest to the
    share that was asked for. Reads `texts` until both splits have one.

    Raises DataError when there are not two documents, or all are held out.
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.heldout_fraction is {fraction}: give a number between 0 and 1, such as 0.05.")
    draw = HeldOut(fraction, seed)
    sizes: dict[tuple[int, str], int] = {}
    held = kept = False
    for text in texts:
        key = (text.source, text.name)
        sizes[key] = sizes.get(key, 0) + text.size
        if draw(*key):
            held = True
        else:
            kept = True
        if held and kept:
            return draw
    if len(sizes) < 2:
        what = f"one document, {next(iter(sizes))[1]}," if sizes else "no document with text in it,"
        raise DataError(
            f"data.sources has {what} and documents are held out as a whole: divide it into several files, or add "
            "documents to data.sources."
        )
    if held:
        raise DataError(
            f"With data.heldout_fraction {fraction} all {len(sizes)} documents are held out: lower "
            "data.heldout_fraction, or add documents to data.sources."
        )
    share = fraction * sum(sizes.values())
    return replace(draw, only=min(sizes, key=lambda key: (abs(sizes[key] - share), key)))
