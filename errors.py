"""The one exception tree of blockroll.

Every error a user can cause names the field, the value and what to do about it. Anything that is not in this tree is a
bug of ours and keeps its traceback. This module imports nothing, so that every floor may use it.
"""

from __future__ import annotations


class BlockrollError(Exception):
    """Root of the tree: `blockroll COMMAND` prints one as a single line and exits with status 2."""


class InvalidInput(BlockrollError, ValueError):
    """A value a user gave cannot be used.

    Args:
        field: the field's dotted name, as the user wrote it (``sampling.top_p``, ``prompt_tokens``).
        problem: what is wrong, with the offending value.
        remedy: what to do instead.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        self.field, self.problem, self.remedy = field, problem, remedy
        super().__init__(f"{field}: {problem}; {remedy}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # So that one raised in another process arrives whole.
        return type(self), (self.field, self.problem, self.remedy)


class ConfigError(InvalidInput):
    """A configuration file has an unknown key, a missing key or a value of the wrong type."""


class RequestError(InvalidInput):
    """A rollout request or its sampling parameters cannot be served as written."""


class CheckpointError(InvalidInput):
    """A policy directory is incomplete, corrupt or of another architecture."""


class DataError(InvalidInput):
    """A data file or data set cannot be read as documents."""


class StorageError(BlockrollError, OSError):
    """A file could not be written whole (full disk, missing permission); nothing half-written is left as valid."""


class TransportError(BlockrollError, RuntimeError):
    """The bridge lost its peer, was refused by it, or received a message it does not accept."""


class ClusterError(BlockrollError, RuntimeError):
    """The rollout cluster cannot do what was asked: no live actor, or a weight version that cannot be committed."""
