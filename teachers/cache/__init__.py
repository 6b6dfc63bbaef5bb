"""Teacher targets on disk: made once, read by any number of students.

with cache.create(path, identity, "head_and_tail=16").writer("rank0") as writer:
    writer.append(targets, keys_B, input_ids_BT, labels_BT, step=120)
reader = cache.open(path, expecting=identity)
targets = reader.targets(keys_B, input_ids_BT)          SparseTargets over B * T tokens
"""

from teachers.cache.folder import Cache, create, open
from teachers.cache.identity import Identity
from teachers.cache.manifest import facts
from teachers.cache.reader import Reader
from teachers.cache.writer import Writer

__all__ = ["Cache", "Identity", "Reader", "Writer", "create", "facts", "open"]
