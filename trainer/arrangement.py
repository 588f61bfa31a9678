"""How a micro-batch's rows are seen and laid out over the context ranks, as the configuration says."""

from __future__ import annotations

from collections.abc import Sequence

from farspan.data.batch import Batch, make_batch
from farspan.data.rows import Row, blank_row
from farspan.data.visibility import Star, Visibility
from farspan.kernels import IntervalMask
from farspan.parallel import orders
from farspan.parallel.orders import Order
from farspan.trainer.config import AttentionSection, RunConfig

_TILE = 128  # tokens; kernels compute whole tiles


class Arrangement:
    """Order and mask of micro-batches. Of all orders `two_class` alone depends on the rows: on what is global there."""

    def __init__(self, config: RunConfig, context: int) -> None:
        self._config, self._context = config, context
        self.visibility = visibility(config.attention)
        length, parallel = config.train.sequence_length, config.parallel
        self._blank = [blank_row(length)]
        two_class = parallel.order == "two_class"
        self._fixed = None if two_class else orders.build(parallel.order, length, context, parallel.stripe)

    def order(self, rows: Sequence[Row] = ()) -> Order:
        """That of a micro-batch; of one whose rows are one document each when none are given."""
        if self._fixed is not None:
            return self._fixed
        star, roaming = self._config.attention.star, self.visibility.roaming(rows or self._blank)
        assert star is not None, "the configuration allows two_class with Star Attention only"
        # Cut between blocks, no rank needs keys of another's block; but ranks with unequal shares would wait.
        even = (len(roaming) - roaming.sum()) % (self._context * star.block) == 0
        return orders.two_class(roaming, self._context, star.block if even else _TILE)

    def mask(self, rows: Sequence[Row] = ()) -> IntervalMask:
        """Likewise. DataError where Star Attention cannot tell a document's context."""
        return self.visibility.mask(rows or self._blank)

    def batch(self, rows: Sequence[Row], rank: int, samples: Sequence[int] = ()) -> Batch:
        """What context rank `rank` holds of these rows."""
        return make_batch(rows, self.order(rows), rank, samples, self.visibility)


def visibility(attention: AttentionSection) -> Visibility:
    star = attention.star
    if star is None:
        return Visibility(attention.across_documents)
    fraction = star.global_fraction if star.mode == "lm" else None
    return Visibility(attention.across_documents, Star(star.block, star.anchor_tokens, fraction))
