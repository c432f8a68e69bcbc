"""Configuration files: YAML read once, at the edge, into frozen objects.

Invariants:
- What is not a field of the configuration is an error, and so is a value of another type: nothing is guessed.
- Every error names the file, the dotted key, the value and what would be right, in one line.

Stands below `model`: the configurations of conversion, cluster and trainer derive from `Config`. Decoding does not
need pydantic, so nothing on the decode path imports this module.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from .errors import ConfigError, InvalidInput
from .inputs import read_input
from .yaml_reader import MAX_FILE, read_yaml


class Config(BaseModel):
    """A frozen section of a configuration file; derived values are properties of the subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=Config)


def load_yaml(path: str | os.PathLike[str], config: type[ConfigT]) -> ConfigT:
    """Reads the file at `path` as a `config`.

    `!include other.yaml`, as a value or merged with `<<: !include other.yaml`, stands for what another file holds; its path is
    relative to the file that names it.

    Raises:
        ConfigError: the file is missing, is no regular file, is not YAML or is beyond a limit of `yaml_reader`; a key is unknown,
            missing or given twice; or a value is of the wrong type or out of range.
    """
    name = os.fspath(path)
    try:
        return parse(read_yaml(read_input(path, MAX_FILE), name), config, name)
    except OSError as error:
        raise ConfigError(name, f"cannot be read ({error.strerror})", "check the path of the YAML file") from error


def whole_text(path: str | os.PathLike[str]) -> str:
    """The YAML at `path` with what it includes in its place; the text as it stands where it includes nothing.

    Raises:
        OSError: it cannot be read. ConfigError: it is not YAML.
    """
    data = read_input(path, MAX_FILE)
    return yaml.safe_dump(read_yaml(data, os.fspath(path)), sort_keys=False) if b"!include" in data else data.decode()


def parse(data: Any, config: type[ConfigT], name: str) -> ConfigT:
    """Builds a `config` from plain data (as YAML or JSON gives it); `name` is what errors call its source.

    Raises:
        ConfigError: as `load_yaml`.
    """
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(name, f"holds a {type(data).__name__}, not keys and values", "write `key: value` lines")
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(name, f"holds something that is not plain data ({error})",
                          "use numbers, text, lists and mappings") from error
    try:
        # pydantic's strict mode over JSON: no "3" for 3 and no true for 1, yet lists become tuples.
        return config.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise _explain(error, config, name) from error


def _explain(error: ValidationError, config: type[BaseModel], name: str) -> ConfigError:
    # A misspelt key is also a missing one: name the misspelling.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    sections, path = _followed(config, first["loc"])
    key = _dotted(path)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    kind, value = first["type"], _shown(first.get("input"))
    if kind == "extra_forbidden":
        known = sorted({field for section in sections for field in section.model_fields})
        close = difflib.get_close_matches(str(first["loc"][-1])[:100], known, n=1)
        remedy = f"did you mean `{close[0]}`?" if close else f"known keys here: {', '.join(known) or 'none'}"
        return ConfigError(key, f"unknown key in {name}", remedy + more)
    if kind == "missing":
        return ConfigError(key, f"missing in {name}", "add it" + more)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidInput):
        field = f"{key}.{cause.field}" if key else cause.field
        return ConfigError(field, f"{cause.problem} in {name}", cause.remedy + more)
    if not key:
        return ConfigError(name, _requirement(first), "correct the file" + more)
    return ConfigError(key, f"{value} in {name} cannot be used", _requirement(first) + more)


def _requirement(problem: ErrorDetails) -> str:
    text = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    text = re.sub(r"^Input should be an object$", "it should be a section of keys and values", text)
    return _one_line(re.sub(r"^Input should", "it should", text))


def _followed(config: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[type[BaseModel]], list[int | str]]:
    """The sections that hold the key `location[-1]`, and the location as the file has it: without the tags that tell which of
    several kinds of section each is."""
    models, path = [config], list[int | str]()
    for part in location[:-1]:
        found = [section for model in models if part in model.model_fields
                 for section in _models_in(model.model_fields[str(part)].annotation)]  # fmt: skip
        tagged = [] if found else [model for model in models if part in _tags(model)]
        # Any other part is an index, a mapping's key or a field without sections: the models stay in reach.
        models = found or tagged or models
        path += [] if tagged else [part]
    return models, [*path, *location[-1:]]


def _tags(model: type[BaseModel]) -> set[object]:
    """The values of fields that may take one value only."""
    kinds = [field.annotation for field in model.model_fields.values()]
    values = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is typing.Literal]
    return {only for only, *others in values if not others}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _dotted(location: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _shown(value: Any) -> str:
    text = _one_line(json.dumps(value, default=repr))
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
