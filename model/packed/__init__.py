"""Decoding and scoring of a small float32 policy on a CPU: `weights` folded from the policy's, the `plan` of a layout, and the
network over both (`forward`)."""

from .forward import PackedForward

__all__ = ["PackedForward"]
