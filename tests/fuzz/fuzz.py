"""`python fuzz.py TARGET SECONDS FOLDER`: runs one target under atheris, guided by the coverage of the package and of its parser.

Ends with status 0 when the time is over, and otherwise with the traceback of a fault; the input is left in FOLDER. Memory beyond
1 GB above the start, and an input that takes 10 s, are faults too.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import atheris
from targets import TARGETS

name, seconds, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
with atheris.instrument_imports(include=["blockroll", "yaml", "json"]):
    import blockroll  # noqa: F401

    prepare, seeds = TARGETS[name]
    run = prepare()
corpus = folder / "corpus"
corpus.mkdir(parents=True, exist_ok=True)
for number, seed in enumerate(seeds):
    (corpus / f"seed-{number}").write_bytes(seed)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={seconds}", f"-rss_limit_mb={start + 1024}", "-timeout=10",
               "-max_len=4096", f"-artifact_prefix={folder}/"], run)  # fmt: skip
atheris.Fuzz()
