"""Checks whether a machine can run engines and a service, and says in one line each what to fix.

`finding`: what a check says. `machine`: processor, GPUs, limits, memory, disk, clock. `packages`: torch, Triton and Ray beside
each other. `kernels`: each op against its reference. `service`: what one configuration needs. `examination`: all of it.
"""

from .examination import examine, findings
from .finding import Finding

__all__ = ["Finding", "examine", "findings"]
