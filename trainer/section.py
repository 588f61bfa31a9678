"""What the sections of the configuration have in common."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from pydantic import BaseModel, ConfigDict, field_validator

from farspan.models.config import refuse_switches


class Section(BaseModel):
    """Frozen values with a docstring each; keys that are not known are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
    _refuse_switches = field_validator("*", mode="before")(refuse_switches)


def did_you_mean(value: str, choices: Sequence[str]) -> str:
    """A hint for a message: `, did you mean ...?` where one of the choices is near."""
    near = get_close_matches(value, choices, 1)
    return f", did you mean {near[0]!r}?" if near else ""
