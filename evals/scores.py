"""Scores of a causal language model on rows: nats, and divergence from a reference, token by token.

    scores = score_rows(model, rows, reference=teacher, micro_rows=4)

Logits of one micro-batch of each model exist at a time; what is kept is a few numbers a row and one a token.
Legend: N rows, M scored tokens of all rows, B micro-batch, T tokens, V vocabulary, C tokens of a chunk.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evals.rows import IGNORED, MicroBatch, Rows
from herd.run.errors import ConfigError, NumericalError

# Elements of the float64 working tensors: chunks that fit the cache are 3x faster than whole rows (2048 x 4096, CPU).
_CHUNK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Divergence:
    """Of the reference's next-token distribution from the model's: KL(reference || model) in nats."""

    nats_N: NDArray[np.float64]
    kl_N: NDArray[np.float64]
    agreed_N: NDArray[np.int64]
    kl_M: NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """Per-row sums. `nats_N` is -log p(label) summed over the row's `tokens_N` scored tokens."""

    nats_N: NDArray[np.float64]
    tokens_N: NDArray[np.int64]
    divergence: Divergence | None


@torch.inference_mode()
def score_rows(
    model: torch.nn.Module, rows: Rows, *, reference: torch.nn.Module | None = None, micro_rows: int = 4
) -> Scores:
    """Score every row. `model(input_ids=...)` must return an object with `.logits` [B, T, V].

    Log-softmax and all sums are float64 whatever the logits' type: a good export is 1e-4 nats from its source, and
    float32 log-probabilities are only good to 1e-6. If the two vocabularies are padded differently, the divergence is
    between the distributions restricted to the ids both have; the losses always use all of a model's logits.
    Raises NumericalError at the first row whose loss is not finite, ConfigError if rows are too long for a model.
    """
    for judged in (model,) if reference is None else (model, reference):
        _check_length(judged, rows.input_ids_NT.shape[1])
    parts: list[_Part] = []
    for batch in rows.micro_batches(micro_rows):
        logits_BTV = _logits(model, batch)
        reference_BTV = None if reference is None else _logits(reference, batch)
        for b in range(len(batch.labels_BT)):
            other_TV = None if reference_BTV is None else reference_BTV[b]
            parts.append(_score_row(logits_BTV[b], batch.labels_BT[b], other_TV, row=batch.rows.start + b))
    return Scores(
        nats_N=_row_sums(parts, "nats_M"),
        tokens_N=np.array([len(part.nats_M) for part in parts], dtype=np.int64),
        divergence=None if reference is None else _gather_divergence(parts),
    )


@dataclass(frozen=True)
class _Part:
    """One row: losses of its M' scored tokens, and the divergence's if there is a reference."""

    nats_M: Tensor
    reference_nats_M: Tensor
    kl_M: Tensor
    agreed_M: Tensor


def _logits(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=batch.input_ids_BT.to(device), use_cache=False).logits


def _score_row(logits_TV: Tensor, labels_T: Tensor, reference_TV: Tensor | None, *, row: int) -> _Part:
    scored_M = (labels_T != IGNORED).nonzero().squeeze(1)
    labels_M = labels_T[scored_M]
    size = max(1, _CHUNK_ELEMENTS // logits_TV.shape[1])
    chunks = [
        _score_chunk(
            logits_TV[index_C.to(logits_TV.device)],
            labels_C,
            None if reference_TV is None else reference_TV[index_C.to(reference_TV.device)],
        )
        for index_C, labels_C in zip(scored_M.split(size), labels_M.split(size), strict=True)
    ]
    part = _Part(*(torch.cat(column) for column in zip(*chunks, strict=True)))
    if not all(bool(values_M.isfinite().all()) for values_M in (part.nats_M, part.reference_nats_M, part.kl_M)):
        raise NumericalError(f"held-out row {row}: loss is not finite; the model (or its reference) is broken")
    return part


def _score_chunk(logits_CV: Tensor, labels_C: Tensor, reference_CV: Tensor | None) -> tuple[Tensor, ...]:
    """(nats, reference nats, KL, agreement) per token, on the CPU; the last three empty without a reference."""
    logp_CV = logits_CV.double().log_softmax(-1)
    nats_C = -logp_CV.gather(1, labels_C.to(logp_CV.device)[:, None]).squeeze(1).cpu()
    if reference_CV is None:
        return nats_C, nats_C[:0], nats_C[:0], nats_C[:0]
    logr_CV = reference_CV.double().log_softmax(-1)
    reference_nats_C = -logr_CV.gather(1, labels_C.to(logr_CV.device)[:, None]).squeeze(1).cpu()
    logr_CV = logr_CV.to(logp_CV.device)
    agreed_C = logr_CV.argmax(-1) == logp_CV.argmax(-1)
    if logr_CV.shape[1] != logp_CV.shape[1]:
        common = min(logr_CV.shape[1], logp_CV.shape[1])
        logr_CV, logp_CV = logr_CV[:, :common].log_softmax(-1), logp_CV[:, :common].log_softmax(-1)
    kl_C = (logr_CV.exp() * (logr_CV - logp_CV)).sum(-1)
    return nats_C, reference_nats_C, kl_C.cpu(), agreed_C.double().cpu()


def _gather_divergence(parts: list[_Part]) -> Divergence:
    return Divergence(
        nats_N=_row_sums(parts, "reference_nats_M"),
        kl_N=_row_sums(parts, "kl_M"),
        agreed_N=_row_sums(parts, "agreed_M").astype(np.int64),
        kl_M=torch.cat([part.kl_M for part in parts]).float().numpy(),
    )


def _row_sums(parts: list[_Part], field: str) -> NDArray[np.float64]:
    return np.array([getattr(part, field).sum().item() for part in parts])


def _check_length(model: torch.nn.Module, length: int) -> None:
    allowed = model.config.get_text_config().to_dict().get("max_position_embeddings")  # state-space models have none
    if allowed is not None and length > allowed:
        raise ConfigError(
            f"data.sequence_length = {length}: this model reads at most {allowed} tokens; use shorter rows"
        )
