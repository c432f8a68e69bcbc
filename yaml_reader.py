"""YAML as configuration files use it: plain data, read within bounds.

Invariants:
- Plain scalars are those of YAML 1.2: `1e-4` is a number, `on` and `2026-01-01` are text. No key stands twice.
- What a document unfolds to, through aliases, merges and included files, is counted before it is built.
- Whatever a file holds, the outcome is plain data or one `ConfigError` that names the file and, where known, the line.
"""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from .errors import ConfigError
from .inputs import read_input

MAX_FILE = 128 << 10
"""Bytes of a file. A configuration takes a few thousand; the parser reads about 50,000 a second."""
MAX_DEPTH = 32
"""Sections within sections. Configurations nest five deep; the parser's time grows with the square of the depth."""
MAX_VALUES = 20_000
"""Values of a whole document, each alias counted as all that it stands for: nine levels of aliases can name a billion."""
MAX_FILES = 100
"""Files that a document includes, each time it includes them."""
MAX_NUMBER = 2**63
"""Whole numbers are below it in size: what counts or indexes anything fits 64 bits."""


def read_yaml(data: bytes, name: str) -> Any:
    """What a YAML document holds, as plain data. `name` is what errors call the file; included files are relative to it.

    Raises:
        ConfigError: it is not YAML, holds more than plain data, or is beyond a limit of this module.
    """
    try:
        text = data.decode()
        return yaml.load(_Named(text, name), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(name, f"is not UTF-8 text ({error.reason})", "save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark  # of the file itself, or of one that it includes
        where = f"{mark.name} line {mark.line + 1}" if mark else name
        raise ConfigError(where, _short(error.problem or "not YAML"), "correct the YAML there") from error
    except yaml.YAMLError as error:
        raise ConfigError(name, f"is not YAML ({_short(error)})", "correct the YAML") from error
    except (ValueError, OverflowError) as error:  # of pyyaml's scanner: an escape or a version beyond its range
        raise ConfigError(name, f"is not YAML ({_short(error)})", "correct the YAML") from error


class _Named:
    """A text as a file with a name, which is all that yaml reads of a file."""

    def __init__(self, text: str, name: str) -> None:
        self._text, self.name = text, name

    def read(self, size: int = -1, /) -> str:
        size = len(self._text) if size < 0 else size
        part, self._text = self._text[:size], self._text[size:]
        return part


class _Loader(yaml.SafeLoader):
    """Scalars of YAML 1.2, no key twice, `!include`, and the limits of this module."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - as the base class declares it
    outer: tuple[str, ...] = ()  # the files that include this one
    depth = 0  # of the section that is being read

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.included, self.composed = [0], [0]  # files and values so far, counted together with those that include this one

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if not self.outer and node is not None:
            self._count(node)
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _error(f"sections are nested deeper than {MAX_DEPTH}", self.peek_event().start_mark)
        self.composed[0] += 1
        if self.composed[0] > MAX_VALUES:
            raise _error(f"more than {MAX_VALUES:,} values", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None or node.tag != "!include":
            return node
        if not isinstance(node, yaml.ScalarNode):
            raise _error("!include takes the name of a file", node.start_mark)
        return self._include(node)

    def _include(self, node: yaml.ScalarNode) -> yaml.Node:
        """What the file that the node names holds; a null where it holds nothing."""
        mark, name = node.start_mark, _text(node)
        path = os.path.normpath(os.path.join(os.path.dirname(self.name), name))
        files = (*self.outer, os.path.normpath(self.name))
        self.included[0] += 1
        if path in files:
            raise _error(f"{path} includes itself", mark)
        if self.included[0] > MAX_FILES:
            raise _error(f"more than {MAX_FILES} files are included", mark)
        try:
            loader = _Loader(_Named(read_input(path, MAX_FILE).decode(), path))
        except OSError as error:
            raise _error(f"{path} cannot be included ({error.strerror})", mark) from error
        except UnicodeDecodeError as error:
            raise _error(f"{path} cannot be included (it is not UTF-8 text)", mark) from error
        except yaml.reader.ReaderError as error:
            raise _error(f"{path} cannot be included ({_short(error)})", mark) from error
        loader.outer, loader.depth, loader.included, loader.composed = files, self.depth, self.included, self.composed
        found = loader.get_single_node()
        return yaml.ScalarNode("tag:yaml.org,2002:null", "", mark, mark) if found is None else found

    def _count(self, root: yaml.Node) -> None:
        """Refuses a document that unfolds to more than MAX_VALUES values, or that contains itself."""
        sizes: dict[int, int] = {}

        def size(node: yaml.Node) -> int:
            known = sizes.get(id(node))
            if known == 0:
                raise _error("an alias stands for a section that holds it", node.start_mark)
            if known is None:
                sizes[id(node)] = 0
                parts = node.value if isinstance(node, yaml.SequenceNode) else \
                    [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else ()
                known = sizes[id(node)] = 1 + sum(map(size, parts))
            if known > MAX_VALUES:
                raise _error(f"more than {MAX_VALUES:,} values, those that aliases stand for counted", node.start_mark)
            return known

        size(root)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:  # of pyyaml's own constructors
            shown = f"`{_short(node.value, 60)}`" if isinstance(node, yaml.ScalarNode) else "this"
            raise _error(f"{shown} is no {node.tag.rpartition(':')[2]}", node.start_mark) from error
        if type(value) is int and abs(value) >= MAX_NUMBER:
            raise _error(f"{_short(node.value, 60)} is no number below 2**63 in size", node.start_mark)
        return value

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        return _text(node) if isinstance(node, yaml.ScalarNode) else super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):
            raise _error("a mapping of keys and values is expected", node.start_mark)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be a word", key.start_mark)
            if key.value in seen:
                raise _error(f"key `{_short(key.value, 60)}` is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _text(node: yaml.ScalarNode) -> str:
    """A scalar's text, which may hold what UTF-8 and the names of files can."""
    for character in node.value:
        if character == "\0" or "\ud800" <= character <= "\udfff":
            raise _error(f"text holds the character \\u{ord(character):04x}", node.start_mark)
    return node.value


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=mark)


def _short(text: object, most: int = 400) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."


for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", "[-+]?(?:0|[1-9][0-9]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
