"""One well-formed message of each kind."""

from __future__ import annotations

from blockroll.trainer_bridge.wire import messages

EXAMPLES: list[messages.Message] = [
    messages.Hello("trainer", False, 1 << 26, "", 0), messages.Welcome("abc", 3), messages.Reset(),
    messages.Refused("b", "storage", "disk"), messages.Ping(), messages.Pong(2, ""),
    messages.Submit("b", 0, True, (b"x", b"yy")), messages.Submitted("b", 0, (0, 4), ((1, "why"),)),
    messages.Credit(10), messages.Delivery(7, "r", 2, (b"zzz",)), messages.Failure(8, "r", "too long"),
    messages.Ack(5, (("r", 0), ("r", -1))),
    messages.Cancel(6, "why", ("r", "s")), messages.Cancelled(6),
    messages.Acked(5), messages.StatusRequest(1), messages.Status(1, (("a", 1), ("b", 0.5), ("c", "x"))),
    messages.PushBegin("p", "finish", (b"m",)), messages.PushChunk("p", 1, 2, (b"d",)), messages.PushCommit("p"),
    messages.PushAbort("p"), messages.PushNeeds("p", (b"\1\0",)), messages.PushState("p", 3, True, 4),
    messages.PushLabel("p", 4), messages.Shutdown(), messages.Stopping(),
    messages.Pause(1, "keep", True), messages.Resume(2), messages.Abort(3, ("r", "s")), messages.ResetPrefixCache(4),
    messages.Done(4, "no"), messages.TensorsRequest(5, 128), messages.Tensors(5, 1, (("a.weight", "bfloat16", (3, 5)),)),
    messages.EnginesRequest(1, 128), messages.Scale(2, 3), messages.Scaled(2, "no room"), messages.Drain(),
    messages.Engines(1, 2, ((0, 17, "10.0.0.1", "cuda:0", "busy", 3, 12.5, "", (("queue", 2.0),)),
                            (1, None, "", "", "waiting", 0, 0.0, "no GPU", ()))),
]
