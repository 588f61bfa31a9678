"""What steps take of the parts of a blend, whatever the lengths of their rows."""

from __future__ import annotations

from collections import defaultdict

from farspan.data.blend import Blend, Part, Taken
from farspan.data.curriculum import Curriculum
from farspan.data.growing_window import GrowingSteps
from farspan.data.steps import FixedSteps, Steps


def parts_of(steps: Steps) -> dict[str, list[Part]]:
    """By name, one of each length that a part has rows of; nothing where nothing is blended."""
    found: defaultdict[str, list[Part]] = defaultdict(list)
    for blend, _ in _blends(steps, 0):
        for name, part in blend.parts.items():
            found[name].append(part)
    return dict(found)


def taken_of_parts(steps: Steps, done: int) -> dict[str, Taken]:
    """What the first `done` steps take of each part, in rows of all lengths; nothing where nothing is blended.

    A part's epochs are those of its tokens: of some lengths it may have had more than of others.
    """
    found: defaultdict[str, list[Taken]] = defaultdict(list)
    for blend, samples in _blends(steps, done):
        for name, taken in blend.taken(samples).items():
            found[name].append(taken)
    whole = {}
    for name, parts in parts_of(steps).items():
        rows, tokens = sum(taken.rows for taken in found[name]), sum(taken.tokens for taken in found[name])
        whole[name] = Taken(rows, tokens, tokens / sum(part.tokens for part in parts))
    return whole


def _blends(steps: Steps, done: int) -> list[tuple[Blend, int]]:
    """One for each length of rows, with how many samples the first `done` steps take of it."""
    if isinstance(steps, GrowingSteps):
        return _blends(steps.steps, done)
    if isinstance(steps, Curriculum):
        pairs = list(zip(steps.buckets, steps.samples_of_each(done), strict=True))
    else:
        assert isinstance(steps, FixedSteps)
        pairs = [(steps.stream, done * steps.rows_per_step)]
    return [(stream, samples) for stream, samples in pairs if isinstance(stream, Blend)]
