"""The limits of everything that travels, in one place. Sizes are bytes. Reading and writing enforce the same limits."""

from __future__ import annotations

from ...rollout.params import MAX_SAMPLES as MAX_SAMPLES  # of one request

MAX_HEADER = 128 * 1024
"""Header of a message or a record."""
MAX_ITEMS = 4096
"""Items of an array in a header."""
MAX_NDIM = 8
"""Axes of an array or a tensor."""

MAX_NAME = 128
"""Name of a client, a batch, a push, a ledger or a figure."""
MAX_ID = 256
"""Request id."""
MAX_TEXT = 1024
"""Text for people: an error or a notice."""
MAX_FIGURE_TEXT = 256
"""Text that is the value of a figure."""
MAX_REQUEST_SAMPLES = 1 << 14
"""Samples of one request that a gateway takes by default: a request is handed out whole, so this bounds what the engines
hold beyond `max_in_flight`."""
MAX_CLIENT_SAMPLES = 1 << 20
"""Unfinished samples of one client that a gateway takes by default: 100,000 requests of ten samples."""
MAX_TOKENS = 1 << 20
"""Tokens of one prompt, or of one trajectory."""
MAX_PARTS = 1 << 20
"""Greatest part index of a batch."""

MAX_REQUEST = 16 << 20
"""Record of a request."""
MAX_TRAJECTORY = 64 << 20
"""Record of a trajectory."""
MAX_CHUNK = 1 << 20
"""Chunk of a tensor."""
MAX_MANIFEST = 16 << 20
"""Manifest of a weight version."""
MAX_PER_SUBMIT = 32
"""Requests of one Submit."""
MAX_ACKS = 128
"""Samples of one Ack."""
MAX_CANCELS = 128
"""Requests of one Cancel."""
MAX_ABORTS = 128
"""Requests of one Abort."""
MAX_STATS = 512
"""Figures of one Status."""
MAX_ENGINES = 1 << 16
"""Engines of one service."""
MAX_ENGINE_ROWS, MAX_ENGINE_FIGURES, MAX_ENGINE_FIGURE = 32, 48, 32
"""Engines of one Engines message, figures of one engine, and the name of one; all of the longest fill a header."""
MAX_TENSORS = 1 << 20
"""Tensors of one weight version."""
MAX_FORMS, MAX_TENSOR_NAME = 128, 512
"""Tensors of one Tensors message, and the name of one; all of the longest fill a header."""

MAX_FRAMES = 1 + MAX_PER_SUBMIT
"""Frames of one message."""
TO_GATEWAY = max(MAX_REQUEST, MAX_CHUNK, MAX_MANIFEST, MAX_HEADER)
"""Largest frame a gateway reads."""
TO_CLIENT = MAX_TRAJECTORY + 2 * MAX_HEADER
"""Largest message a client reads. Its frames come joined into one."""
