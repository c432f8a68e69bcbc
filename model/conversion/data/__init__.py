"""Documents and packs for training.

Knows files, tasks and tokenizers. Does not know losses or processes: a process names the packs that it takes. To read
another kind of file, write its `Shard` in `records.py` and its section in `config.py`.

`records` reads files in an order that is known without reading them all. `sources` turns records and tasks into documents.
`documents` says which tokens are learned and where mask blocks lie. `packing` deals documents into packs.
"""

from .documents import Document, cut_blocks, learned_targets
from .packing import PackStream
from .sources import texts

__all__ = ["Document", "PackStream", "cut_blocks", "learned_targets", "texts"]
