"""Which share of the tokens each part of a blend and each length of rows has, with `data.method: decompose`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from farspan.data.decompose import Decomposition
from farspan.data.errors import DataError
from farspan.data.mixing import MixingError, mix
from farspan.trainer.config import RunConfig

Table = NDArray[np.float64]
"""Of tokens, `[parts, lengths]`, the shortest length first."""


def tokens_of_text(config: RunConfig, parts: Mapping[str, Decomposition]) -> Table:
    """Tokens in the rows of each part and length; none where a part's epochs of them are less than one row.

    DataError where that leaves nothing of a part.
    """
    lengths, blend = np.array(config.row_lengths[::-1]), config.data.blend
    text = np.array([[length * len(found.places[length]) for length in lengths] for found in parts.values()], float)
    if blend is None:
        return text
    for (name, part), tokens in zip(blend.parts.items(), text, strict=True):
        if not tokens.any():
            raise DataError(
                f"data.blend.parts.{name} has no document of more than {lengths[0]} tokens, which is "
                "data.decompose.shortest: lower that, or leave the part out."
            )
        if part.epochs is not None:
            tokens *= part.epochs * tokens >= lengths
        if not tokens.any():
            raise DataError(
                f"data.blend.parts.{name}.epochs {part.epochs:g} is less than one row of every length: raise it, or "
                "leave the part out."
            )
    return text


def shares_of_stages(config: RunConfig, names: list[str], text: Table) -> dict[int, Table]:
    """By the first cycle of each stage of a blend; from cycle 0 on where there are no stages.

    A length has no share in a stage whose parts have fewer rows of it than a step takes. DataError when the longest
    has none in any, a part has none of any length, a stage has no weight, or weights and mixture do not go together.
    """
    weights = _weights(config, names, text)
    if not all(some.any() for some in weights.values()):
        raise DataError(f"data.blend has no weight above 0: give one to some of {', '.join(names)}.")
    longest = config.train.sequence_length
    count, needed = (max(int(text[w > 0, -1].sum()) for w in weights.values()) // longest, _rows(config, longest))
    if count < needed:
        raise DataError(
            f"the text has {count} rows of train.sequence_length {longest}, and a step takes {needed}: lower "
            "train.sequence_length or train.tokens_per_step, or prepare more text in data.sources."
        )
    return {first: _shares(config, names, text, some) for first, some in weights.items()}


def _rows(config: RunConfig, length: int) -> int:
    return config.train.tokens_per_step // length


def _weights(config: RunConfig, names: list[str], text: Table) -> dict[int, NDArray[np.float64]]:
    """Of each part, by the first cycle of each stage."""
    blend = config.data.blend
    if blend is None:
        return {0: np.ones(1)}
    if not blend.stages:
        natural = text.sum(1) * [part.epochs or 1.0 for part in blend.parts.values()]
        given = [part.weight for part in blend.parts.values()]
        return {0: np.array([n if weight is None else weight for n, weight in zip(natural, given, strict=True)])}
    firsts = np.cumsum([0, *(stage.steps or 0 for stage in blend.stages[:-1])]) // config.cycle_steps
    return {
        int(first): np.array([stage.weights.get(name, 0.0) for name in names])
        for first, stage in zip(firsts, blend.stages, strict=True)
    }


def _shares(config: RunConfig, names: list[str], text: Table, weights: NDArray[np.float64]) -> Table:
    lengths, mixture = np.array(config.row_lengths[::-1]), config.curriculum.mixture
    text = text * (weights > 0)[:, None]
    text = text * (text.sum(0) >= _rows(config, 1))
    for name, weight, tokens in zip(names, weights, text.sum(1), strict=True):
        if weight and not tokens:
            raise DataError(
                f"data.blend.parts.{name} has no rows of a length of which there are enough for a step: lower "
                "train.tokens_per_step or data.decompose.shortest, or leave the part out."
            )
    wanted = None
    if mixture != "natural":
        wanted = text.any(0) * (np.ones(len(lengths)) if mixture == "equal" else np.array(mixture))
    if config.data.blend is None:  # nothing to fit: equal shares stay equal to the last bit
        return text if wanted is None else wanted[None]
    try:
        return mix(text, weights, wanted)
    except MixingError as error:
        raise DataError(
            f"data.blend gives {names[error.part]} {weights[error.part] / weights.sum():.1%} of the tokens, of which "
            f"its lengths of rows can have {error.most:.1%} with curriculum.mixture {mixture}: lower its weight, or "
            "set curriculum.mixture to natural."
        ) from error
