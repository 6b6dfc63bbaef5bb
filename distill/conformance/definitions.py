"""Every divergence written from its definition, for autograd in float64: what losses are compared with.

    value_T = by_definition("jsd", log_p_TK, log_q_TK)       # p the teacher, q the student

Independent of distill.losses on purpose. Shapes: T tokens, K classes (or listed classes and the bucket of the rest).
"""

import torch

from distill.conformance.problem import Problem

PARAMETERS = {"jsd": 0.5, "plain_jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1, "adaptive_kl": 0.5}
"""Share of the teacher in the mixture, or mass that counts as its head."""
DETACHED = ("adaptive_kl",)
"""Their gradient is not that of their value, by definition: a weight in it counts as a constant."""


def by_definition(name: str, log_p_TK: torch.Tensor, log_q_TK: torch.Tensor) -> torch.Tensor:
    """The divergence of each token [T], with the parameter of PARAMETERS. Sources: docs/conformance.md."""
    p_TK, q_TK = log_p_TK.exp(), log_q_TK.exp()
    share = PARAMETERS.get(name, 0.0)
    match name:
        case "forward_kl":
            return _kl(log_p_TK, log_q_TK)
        case "reverse_kl":
            return _kl(log_q_TK, log_p_TK)
        case "jsd" | "plain_jsd":
            log_m_TK = (share * p_TK + (1 - share) * q_TK).log()
            both_T = share * _kl(log_p_TK, log_m_TK) + (1 - share) * _kl(log_q_TK, log_m_TK)
            return both_T / (share * (1 - share)) if name == "jsd" else both_T
        case "skew_kl":
            return _kl(log_p_TK, (share * p_TK + (1 - share) * q_TK).log())
        case "skew_reverse_kl":
            return _kl(log_q_TK, (share * q_TK + (1 - share) * p_TK).log())
        case "adaptive_kl":
            return _adaptive(log_p_TK, log_q_TK, share)
        case "tvd":
            return (p_TK - q_TK).abs().sum(1) / 2
    raise ValueError(name)


def _kl(log_a_TK: torch.Tensor, log_b_TK: torch.Tensor) -> torch.Tensor:
    return (log_a_TK.exp() * (log_a_TK - log_b_TK)).sum(1)


def _adaptive(log_p_TK: torch.Tensor, log_q_TK: torch.Tensor, head_mass: float) -> torch.Tensor:
    sorted_TK, order_TK = log_p_TK.exp().sort(dim=1, descending=True)
    head_TK = sorted_TK.cumsum(1) <= head_mass
    head_TK[:, 0] = True
    apart_TK = (log_p_TK.exp() - log_q_TK.exp()).abs().detach().gather(1, order_TK)
    share_T = (apart_TK * head_TK).sum(1) / apart_TK.sum(1)
    return share_T * _kl(log_p_TK, log_q_TK) + (1 - share_T) * _kl(log_q_TK, log_p_TK)


def log_distributions(
    problem: Problem, student_TV: torch.Tensor, *, temperature: float, sparse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and log q: of all classes, or of the listed ones and the bucket of all others."""
    log_q_TV = torch.log_softmax(student_TV / temperature, 1)
    if not sparse:
        return torch.log_softmax(problem.teacher_TV / temperature, 1), log_q_TV
    ids_TK, probs_TK = problem.sparse(temperature)
    listed_TV = torch.zeros_like(log_q_TV, dtype=torch.bool).scatter_(1, ids_TK, True)
    rest_T1 = log_q_TV.masked_fill(listed_TV, -torch.inf).logsumexp(1, keepdim=True)
    log_p_TK = torch.cat((probs_TK, 1 - probs_TK.sum(1, keepdim=True)), 1).log()
    return log_p_TK, torch.cat((log_q_TV.gather(1, ids_TK), rest_T1), 1)
