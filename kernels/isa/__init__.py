"""What a compiled kernel's instructions say of its speed: figures read from its assembly, each with a bound.

`amdgcn.py` and `sass.py` read a vendor's assembly into a `program.py: Program`; `costs.py` holds cycles per instruction.
`figures.py` counts, and `bounds.py` compares with `bounds.json`, which `tighten.py` writes. `usage.py` puts it together.
"""

from __future__ import annotations

from .bounds import excesses
from .figures import Figures
from .usage import Usage, usage

__all__ = ["Figures", "Usage", "excesses", "usage"]
