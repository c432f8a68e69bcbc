"""The page: HTML, CSS, script and payload in one file.

Invariants:
- The page asks the network for nothing. Its Content-Security-Policy allows the one script and the one style sheet in it, by their
  hashes; so text of a run cannot run, whatever it holds.
- The payload holds no `<`, so no text of a run can end its element.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

_FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("data", "counts", "view", "list", "tokens", "charts", "keys", "live", "main")
"""Parts of the script, in the order in which they are joined: a part uses those before it."""


def page(content: Mapping[str, Any]) -> bytes:
    """The page of a payload, UTF-8."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    parts = [(_FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    script = '"use strict";\n{\n' + "\n".join(parts) + "}\n"
    frames = " frame-src 'self' file:;" if content["live"] else ""
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)};{frames} base-uri 'none'"
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template((_FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(str(content["title"])), policy=policy, style=style, script=script, payload=data
    ).encode(errors="replace")  # fmt: skip  # the title is a file's name, which may be no text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
