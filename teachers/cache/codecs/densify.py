"""Decoded rows as the tensors a loss takes.

targets = sparse_targets([kept, None, kept], 256, tail="sampled", temperature=1.0)

Suffix legend: T tokens of all rows, K places for classes, N classes of all tokens.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import torch

from teachers.cache.codecs.kept import Kept
from teachers.targets import SparseTargets, Tail


def sparse_targets(rows: Sequence[Kept | None], length: int, *, tail: Tail, temperature: float) -> SparseTargets:
    """SparseTargets over len(rows) * length tokens; no row at a place means no target for its tokens."""
    total = len(rows) * length
    present = np.array([row is not None for row in rows])
    tokens, ids, masses = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    entropy_T, ce_T = np.zeros(total, np.float32), np.zeros(total, np.float32)
    for number, row in enumerate(rows):
        if row is None:
            continue
        start = number * length
        own_H, share_S = row.masses()
        tokens += [row.tokens_H + start, row.tokens_S + start]
        ids += [row.ids_H, row.ids_S]
        masses += [own_H, share_S]
        entropy_T[start : start + length], ce_T[start : start + length] = row.entropy_T, row.ce_T
    ids_TK, probs_TK = _slots(np.concatenate(tokens), np.concatenate(ids), np.concatenate(masses), total)
    return SparseTargets(
        ids_TK=torch.from_numpy(ids_TK),
        probs_TK=torch.from_numpy(probs_TK),
        tail=tail,
        entropy_T=torch.from_numpy(entropy_T),
        ce_T=torch.from_numpy(ce_T),
        temperature=temperature,
        present_T=None if present.all() else torch.from_numpy(np.repeat(present, length)),
    )


def moved(targets: SparseTargets, device: torch.device | str) -> SparseTargets:
    """The same targets on another device."""
    values = {field.name: getattr(targets, field.name) for field in fields(targets)}
    tensors = {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(targets, **tensors)


def _slots(tokens_N: np.ndarray, ids_N: np.ndarray, masses_N: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay out one line a token: ids [T, K] with -1 and masses with 0 in the places left over."""
    order = np.argsort(tokens_N, kind="stable")
    tokens_N, ids_N, masses_N = tokens_N[order], ids_N[order], masses_N[order]
    counts_T = np.bincount(tokens_N, minlength=total)
    places_N = np.arange(len(tokens_N)) - np.repeat(np.cumsum(counts_T) - counts_T, counts_T)
    width = max(1, int(counts_T.max(initial=0)))
    ids_TK, probs_TK = np.full((total, width), -1), np.zeros((total, width), np.float32)
    ids_TK[tokens_N, places_N], probs_TK[tokens_N, places_N] = ids_N, masses_N
    return ids_TK, probs_TK
