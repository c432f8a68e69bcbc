"""A coverage-guided fuzzer over everything that reads bytes from a socket or from a ledger's row.

Any bytes give a message, a record or a manifest, or raise TransportError; what is read can be written, and reads equal
again. As a script: `python tests/fuzz/test_wire.py SECONDS` (needs atheris, which is no dependency of the project).
"""

from __future__ import annotations

import importlib.util
import os
import resource
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
MEMORY = 1 << 30
"""Most bytes the process may hold."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="pip install atheris")
def test_no_bytes_break_what_reads_them() -> None:
    subprocess.run([sys.executable, __file__, str(SECONDS)], check=True, timeout=SECONDS + 120)


def seeds(folder: Path) -> None:
    """One well-formed input of each kind."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "trainer_bridge"))
    from bridge_parts import make_manifest, make_trajectory, request, weights
    from wire_examples import EXAMPLES

    from blockroll.trainer_bridge.wire import messages, records
    from blockroll.trainer_bridge.wire.sockets import join_frames

    asked = request("a", 2, routed_experts=True, top_k=2, stop=["x"], logit_bias={3: 0.5})
    inputs = [b"\0" + join_frames(messages.encode(m)) for m in EXAMPLES]
    inputs += [b"\1" + records.encode_request(asked), b"\2" + records.encode_trajectory(make_trajectory(asked, 0)),
               b"\3" + make_manifest(1, 0, weights()).encode()]
    for i, data in enumerate(inputs):
        (folder / str(i)).write_bytes(data)


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["blockroll.trainer_bridge.wire"]):
        from blockroll.errors import BlockrollError, TransportError
        from blockroll.trainer_bridge.wire import messages, records
        from blockroll.trainer_bridge.wire.manifest import Manifest
        from blockroll.trainer_bridge.wire.sockets import split_frames

    def read(kind: int, data: bytes) -> None:
        if kind == 0:
            message = messages.decode(split_frames(data))
            assert messages.decode(messages.encode(message)) == message or "nan" in repr(message)
        elif kind == 1:
            asked = records.decode_request(data)
            assert records.decode_request(records.encode_request(asked)) == asked
        elif kind == 2:
            trajectory = records.decode_trajectory(data)
            again = records.encode_trajectory(trajectory)
            assert records.encode_trajectory(records.decode_trajectory(again)) == again
        else:
            manifest = Manifest.decode(data)
            assert Manifest.decode(manifest.encode()) == manifest and manifest.digest

    def one(data: bytes) -> None:
        if not data:
            return
        kind = data[0] % 5
        body = data[1:]
        if kind == 4:
            # A record whose header has the length it says: deeper than a random length gets.
            kind, body = 1 + data[0] % 3, struct.pack("<I", min(len(body), 60)) + body
        try:
            read(kind, body)
        except TransportError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
        except BlockrollError as error:
            raise AssertionError(f"{type(error).__name__} where only TransportError may come") from error
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MEMORY

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        seeds(folder / "corpus")
        atheris.Setup([sys.argv[0], f"-max_total_time={int(float(sys.argv[1]))}", "-max_len=8192", "-timeout=5",
                       "-rss_limit_mb=1024", "-print_final_stats=1", f"-artifact_prefix={folder}/", str(folder / "corpus")], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
