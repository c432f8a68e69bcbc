"""Documents and packs for training.

Knows files, tasks and tokenizers. Does not know masks, losses or processes: a process says which packs it wants. To read
another kind of file, write its `Shard` in `records.py` and its section in `config.py`.

`records`: files to records, in an order known without reading them all. `sources`: records and tasks to documents.
`documents`: what is learned of one, and its mask blocks. `packing`: documents to packs.
"""

from .documents import Document, cut_blocks, learned_targets
from .packing import PackStream
from .sources import texts

__all__ = ["Document", "PackStream", "cut_blocks", "learned_targets", "texts"]
