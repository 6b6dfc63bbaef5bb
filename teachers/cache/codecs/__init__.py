"""Codecs: which classes of a distribution are kept, and their bytes.

codec = parse("head_and_tail=16")
payloads = encode_rows(codec, targets, labels_BT, keys_B, vocabulary=4096)      one `bytes` a row
kept = Kept.from_bytes(payload, num_tokens=256, vocabulary=4096)
"""

from teachers.cache.codecs.encoding import Codec, encode_rows
from teachers.cache.codecs.head_and_tail import HeadAndTail
from teachers.cache.codecs.kept import Kept
from teachers.cache.codecs.names import CODECS, parse
from teachers.cache.codecs.random_sampling import RandomSampling
from teachers.cache.codecs.top_k import TopK

__all__ = ["CODECS", "Codec", "HeadAndTail", "Kept", "RandomSampling", "TopK", "encode_rows", "parse"]
