"""How a micro-batch's rows are seen and laid out over the context ranks, as the configuration says."""

from __future__ import annotations

from collections.abc import Sequence

from farspan.data.batch import Batch, make_batch
from farspan.data.rows import Row, blank_row
from farspan.data.visibility import Star, Visibility, Window
from farspan.kernels import IntervalMask
from farspan.kernels.index import Places
from farspan.kernels.tiles import TILE
from farspan.parallel import orders
from farspan.parallel.orders import Order
from farspan.trainer.config import ConfigError, RunConfig


class Arrangement:
    """Order and masks of micro-batches. Of all orders `two_class` alone depends on the rows: on what is global there.

    `layers` says for each layer what its tokens see; all are over one order.
    """

    def __init__(self, config: RunConfig, context: int) -> None:
        self._config, self._context = config, context
        self.layers = layer_visibilities(config)
        length, parallel = config.train.sequence_length, config.parallel
        self._blank = [row_without_text(config)]
        two_class = parallel.order == "two_class"
        self._fixed = None if two_class else orders.build(parallel.order, length, context, parallel.stripe)

    def order(self, rows: Sequence[Row] = ()) -> Order:
        """That of a micro-batch; of one whose rows are one document each when none are given."""
        if self._fixed is not None:
            return self._fixed
        seen = next(seen for seen in self.layers if seen.star)  # two_class is allowed with Star Attention only
        star, roaming = self._config.attention.star, seen.roaming(rows or self._blank)
        assert star is not None
        # Cut between blocks, no rank needs keys of another's block; but ranks with unequal shares would wait.
        even = (len(roaming) - roaming.sum()) % (self._context * star.block) == 0
        return orders.two_class(roaming, self._context, star.block if even else TILE)

    def masks(self, rows: Sequence[Row] = ()) -> dict[Visibility, IntervalMask]:
        """Likewise, one for each way in which some layers see. DataError where Star Attention cannot tell a document's
        context."""
        return {seen: seen.mask(rows or self._blank) for seen in dict.fromkeys(self.layers)}

    def batch(self, rows: Sequence[Row], rank: int, samples: Sequence[int] = ()) -> Batch:
        """What context rank `rank` holds of these rows."""
        return make_batch(rows, self.order(rows), rank, samples, self.layers)


def row_without_text(config: RunConfig) -> Row:
    """One document without labels; of Star Attention with as much of a global part as `mode: lm` has."""
    length, star = config.train.sequence_length, config.attention.star
    return blank_row(length, None if star is None else length - max(1, round(length * star.global_fraction)))


def layer_visibilities(config: RunConfig) -> tuple[Visibility, ...]:
    """What the tokens of each layer see."""
    attention, layers = config.attention, range(config.model.layers)
    star, window, across = attention.star, attention.window, attention.across_documents
    whole = Visibility(across)
    if star is not None:
        fraction = star.global_fraction if star.mode == "lm" else None
        whole = Visibility(across, Star(star.block, star.anchor_tokens, fraction))
    if window is None:
        return (whole,) * len(layers)
    narrow = Visibility(across, window=Window(window.width, window.sinks))
    return tuple(whole if layer in window.full_layers else narrow for layer in layers)


def check_tiles(config: RunConfig, order: Order) -> None:
    """ConfigError where sparse attention cannot select: an order whose tiles are not consecutive tokens."""
    if config.attention.sparse is None:
        return
    try:
        for positions in order.positions:
            Places.of(positions, positions)
    except ValueError as error:
        raise ConfigError(f"attention.sparse with parallel.order {order.name}: {error}") from error
