"""The mathematics of spans: merged distributions of student and teacher in, divergence and its gradient out.

A span of several tokens is one event: P(first token | context) times the probability of the tokens that followed it
("observed" merging of GOLD, TRL). What a vocabulary's other first tokens would have been followed by is not known.
Shapes: S spans, V student vocabulary, W teacher vocabulary, M tokens that both have.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from distill.losses.divergences import expectation
from distill.losses.uld import sorted_difference
from teachers.spans import SharedTokens

Kind = Literal["uld", "spans"]

FLOOR = 1e-6
"""Of the mass a student leaves to tokens that are not shared, where the divergence divides by it."""


@dataclass(frozen=True)
class MergedLoss:
    """Of each span."""

    loss_S: torch.Tensor
    kl_S: torch.Tensor
    """KL(teacher || student) over the shared tokens and one class for all else, nats; a lower bound of the whole."""
    pull_SV: torch.Tensor
    """d loss / d log of the student's merged masses."""


def merged_loss(
    log_q_SV: torch.Tensor,
    log_p_SW: torch.Tensor,
    q_later_S: torch.Tensor,
    p_later_S: torch.Tensor,
    several_S: torch.Tensor,
    shared: SharedTokens,
    *,
    kind: Kind,
    matched_weight: float | None = 1.0,
) -> MergedLoss:
    """The loss between merged masses q exp(q_later) and p exp(p_later).

    uld: sum |p_(i) - q_(i)| over all classes, sorted. spans: weight x KL over the shared tokens + (1 - weight) x the
    sorted difference of the others; a `matched_weight` of None is the share of the teacher's tokens that are shared.
    `several_S`: whether the student's side has more than one token. 0 when both say the same.
    """
    log_q_SV, log_p_SW = log_q_SV + q_later_S[:, None], log_p_SW + p_later_S[:, None]
    q_SV, p_SW = log_q_SV.exp(), log_p_SW.exp()
    kl_S, pull_SM = _shared_divergence(log_q_SV, log_p_SW, several_S, shared)
    if kind == "uld":
        distance_S, sign_SV = sorted_difference(q_SV, p_SW)
        return MergedLoss(distance_S, kl_S, sign_SV.mul_(q_SV))
    weight = shared.share if matched_weight is None else matched_weight
    loss_S, pull_SV = weight * kl_S, torch.zeros_like(q_SV)
    pull_SV[:, shared.student_M] = pull_SM * weight
    if weight < 1:  # sorting is most of the work
        student_R, teacher_R = _others(q_SV.shape[1], shared.student_M), _others(p_SW.shape[1], shared.teacher_M)
        q_SR = q_SV[:, student_R]
        distance_S, sign_SR = sorted_difference(q_SR, p_SW[:, teacher_R])
        loss_S = loss_S + (1 - weight) * distance_S
        pull_SV[:, student_R] = sign_SR * q_SR * (1 - weight)
    return MergedLoss(loss_S, kl_S, pull_SV)


def _others(classes: int, shared_M: torch.Tensor) -> torch.Tensor:
    """Ids of a vocabulary that the other one does not have."""
    alone_V = torch.ones(classes, dtype=torch.bool, device=shared_M.device)
    alone_V[shared_M] = False
    return alone_V.nonzero().squeeze(1)


def _shared_divergence(
    log_q_SV: torch.Tensor, log_p_SW: torch.Tensor, several_S: torch.Tensor, shared: SharedTokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL over the shared tokens and the rest, and its derivative by the logs of the student's shared masses.

    A student that has no other tokens and reads one token cannot leave mass to the rest; then it is the part that it
    can change, P KL(p / P || q) with P the teacher's mass of shared tokens (chain rule of the divergence).
    """
    log_q_SM, log_p_SM = log_q_SV[:, shared.student_M], log_p_SW[:, shared.teacher_M]
    q_SM, p_SM = log_q_SM.exp(), log_p_SM.exp()
    head_S = p_SM.sum(1).clamp_max(1.0)
    rest_q_S, rest_p_S = 1 - q_SM.sum(1), 1 - head_S
    has_rest_S = several_S | (log_q_SV.shape[1] > shared.student_M.shape[0])
    floored_S = rest_q_S.clamp_min(FLOOR)
    rest_S = torch.xlogy(rest_p_S, rest_p_S) - rest_p_S * floored_S.log()
    kl_S = expectation(p_SM, log_p_SM - log_q_SM) + torch.where(has_rest_S, rest_S, -torch.xlogy(head_S, head_S))
    ratio_S = torch.where(has_rest_S & (rest_q_S > FLOOR), rest_p_S / floored_S, 0.0)
    return kl_S, q_SM * ratio_S[:, None] - p_SM
