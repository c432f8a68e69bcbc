"""`ZayaConfig` of transformers; where an earlier transformers has none (before 5.17), a class with the same fields and values.

A trainer may pin an earlier one. What it needs is a policy's configuration: the network is ours either way.
"""

from __future__ import annotations

try:
    from transformers import ZayaConfig as ZayaConfig
except ImportError:
    from .earlier_transformers import ZayaConfig as ZayaConfig
