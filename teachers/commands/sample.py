"""How large a codec's rows are at some vocabulary, by encoding a made-up teacher: no model, no data.

sample_bytes("head_and_tail=14", vocabulary=202_048, length=8192)        bytes a token

Suffix legend: V vocabulary, T tokens of the sample.
"""

import torch

from teachers.cache.codecs import encode_rows, parse
from teachers.cache.records import HEADER_BYTES
from teachers.cache.shards import ENTRY
from teachers.targets import DenseTargets

SAMPLE_TOKENS = 128
SAMPLE_NATS = 3.0


def sample_bytes(codec: str, vocabulary: int, length: int) -> float:
    """Bytes a token of a made-up teacher: 3 nats, ids spread evenly (the dearest way), all the container adds.

    Masses fall as a power of the rank, p ~ (rank + 2)^-a, with the power that gives SAMPLE_NATS.
    """
    ranks_V = torch.arange(vocabulary, dtype=torch.float64) + 2
    low, high = 0.5, 8.0
    for _ in range(40):
        power = (low + high) / 2
        p_V = (-power * ranks_V.log()).softmax(-1)
        low, high = (power, high) if -(p_V * p_V.log()).sum() > SAMPLE_NATS else (low, power)
    generator = torch.Generator().manual_seed(0)
    logits_V, count = (-high * ranks_V.log()).float(), min(SAMPLE_TOKENS, length)
    logits_TV = torch.stack([logits_V[torch.randperm(vocabulary, generator=generator)] for _ in range(count)])
    # Labels as likely as the teacher says, so that their cross-entropies take the room they will.
    labels_1T = torch.multinomial(logits_TV.softmax(-1), 1, generator=generator).T
    targets, keys_1 = DenseTargets(logits_TV), torch.zeros(1, dtype=torch.long)
    (payload,) = encode_rows(parse(codec), targets, labels_1T, keys_1, vocabulary=vocabulary)
    return len(payload) / count + (HEADER_BYTES + ENTRY.itemsize) / length
