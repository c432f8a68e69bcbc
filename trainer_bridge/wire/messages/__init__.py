"""Every message between a trainer's client and a gateway.

Invariants:
- A message is a list of frames: one header (see `codec`), then the raw frames that its class declares in `BLOBS`.
- `decode(encode(m)) == m`. The blobs of requests and trajectories are the lossless records of `records`.
- `decode` raises TransportError and nothing else, whatever the bytes, and takes memory in proportion to them.

A docstring that starts with C describes a message the client sends; G stands for the gateway. A new message is a new
subclass of `Message` in one of these files: its `SCHEMA` and `BLOBS` bound every field with the numbers of `limits`.

`message`: the base class, `encode`, `decode`. `session`: opening and watching a session. `requests`: requests,
deliveries, acknowledgements, cancellations, figures. `weights`: weight pushes. `control`: engines, their number, drain,
pauses, aborted requests.
"""

from .control import (
    PAUSE_MODES,
    Abort,
    Done,
    Drain,
    Engines,
    EnginesRequest,
    Pause,
    PauseMode,
    ResetPrefixCache,
    Resume,
    Scale,
    Scaled,
    Tensors,
    TensorsRequest,
)
from .message import KINDS, Blobs, Message, decode, encode
from .requests import (
    Ack,
    Acked,
    Cancel,
    Cancelled,
    Credit,
    Delivery,
    Failure,
    Status,
    StatusRequest,
    Submit,
    Submitted,
)
from .session import Hello, Ping, Pong, Refused, Reset, Shutdown, Stopping, Welcome
from .weights import PushAbort, PushBegin, PushChunk, PushCommit, PushLabel, PushNeeds, PushState

__all__ = [
    "KINDS", "PAUSE_MODES", "Abort", "Ack", "Acked", "Blobs", "Cancel", "Cancelled", "Credit", "Delivery", "Done", "Drain",
    "Engines", "EnginesRequest", "Failure", "Hello", "Message", "Pause", "PauseMode", "Ping", "Pong", "PushAbort", "PushBegin",
    "PushChunk", "PushCommit", "PushLabel", "PushNeeds", "PushState", "Refused", "Reset", "ResetPrefixCache", "Resume", "Scale",
    "Scaled", "Shutdown", "Status", "StatusRequest", "Stopping", "Submit", "Submitted", "Tensors", "TensorsRequest", "Welcome",
    "decode", "encode",
]
