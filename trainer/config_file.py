"""Configurations from YAML files and `section.key=value` overrides, and what is said of mistakes in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from farspan.trainer.config import ConfigError, RunConfig
from farspan.trainer.section import did_you_mean


def load_run_config(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """That of a run's folder, as `load_config`."""
    file = run / "config.yaml"
    if not file.exists():
        raise ConfigError(f"{run} is no run directory: it has no config.yaml")
    return load_config(file, overrides)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `section.key=value` overrides (values are YAML).

    ConfigError, in one line, when the file is missing or broken, a key is unknown (with the nearest known one), or a
    value is not possible.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as 'run:' and 'train:', not {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(path, error)) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same object."""
    tree = config.model_dump(mode="json")
    return yaml.safe_dump(tree, sort_keys=False)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override; write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not valid YAML") from error
    *sections, last = key.split(".")
    branch: Any = tree
    for section in sections:
        if isinstance(branch, dict) and branch.get(section) is None:
            branch[section] = {}
        branch = branch[section] if isinstance(branch, dict) else None
        if not isinstance(branch, dict):
            raise ConfigError(f"{key} cannot be set: {section} is not a section")
    if value is None and text.strip() and _is_key(sections, last):
        branch.pop(last, None)  # null: as if the key were not there, so that its default counts
    else:
        branch[last] = value


def _is_key(sections: Sequence[str], name: str) -> bool:
    try:
        return name in _section_at(sections).model_fields
    except (KeyError, StopIteration):  # a section that is none, or whose keys are free
        return False


def _one_line(path: Path, error: ValidationError) -> str:
    """All problems in one line, each with its key; unknown keys with the nearest known one."""
    problems: list[str] = []
    for detail in error.errors():
        # Neither a dict nor a path: pydantic tells both, and puts its own words for the two behind the key.
        location = detail["loc"][:1] if detail["loc"][:1] == ("deepspeed",) else detail["loc"]
        key = ".".join(str(part) for part in location)
        if any(problem.startswith(f"{key} is ") for problem in problems):
            continue
        if detail["type"] == "extra_forbidden":
            *section, name = detail["loc"]
            known = list(_section_at(section).model_fields)
            problems.append(f"there is no key {key}{did_you_mean(str(name), known)} (keys there: {', '.join(known)})")
        elif detail["type"] == "missing":
            problems.append(f"{key} is required")
        elif detail["type"] == "value_error":
            problems.append(str(detail["ctx"]["error"]))
        elif detail["type"] == "model_type":
            problems.append(f"{key} is {detail['input']!r}: it must be a section, with keys of its own")
        else:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            problems.append(f"{key} is {detail['input']!r}: {message}")
    return f"{path}: {'; '.join(problems)}"


def _section_at(location: Sequence[Any]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    of_dict = False
    for name in location:
        if isinstance(name, int) or of_dict:  # of an entry in a list or a dict of sections
            of_dict = False
            continue
        annotation = section.model_fields[str(name)].annotation
        of_dict = get_origin(annotation) is dict
        section = next(
            t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)
        )
    return section
