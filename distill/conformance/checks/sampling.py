"""Sampled targets: over re-draws, the gradient and differences of the loss are those of the whole distribution.

Shapes: T tokens (each an independent draw), V vocabulary, K classes listed.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from distill.conformance.definitions import by_definition
from distill.conformance.problem import Problem, draw
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, at_most

DRAWS, CALLS = 100, 40
SIGMAS = 4.0


def _repeated(problem: Problem, tokens: int) -> Problem:
    return replace(
        problem,
        student_TV=problem.student_TV.expand(tokens, -1).clone(),
        teacher_TV=problem.teacher_TV.expand(tokens, -1).clone(),
        labels_T=problem.labels_T.expand(tokens).clone(),
    )


def unbiased(target: Target) -> Iterator[Comparison]:
    """The mean over re-draws is within 4 sigma of the truth: of q - p, and of how much better one student is."""
    target.needs_loss(sampled=True, sparse=True)
    generator = torch.Generator().manual_seed(0)
    one, other = (draw(seed, tokens=1, spread=1.0) for seed in (40, 41))
    truth_V = (torch.softmax(one.student_TV, 1) - torch.softmax(one.teacher_TV, 1)).squeeze(0)
    log_p, *log_qs = (torch.log_softmax(x, 1) for x in (one.teacher_TV, one.student_TV, other.student_TV))
    kls = [by_definition("forward_kl", log_p, log_q).item() for log_q in log_qs]
    gradients, gains = [], []
    for _ in range(CALLS):
        tokens = _repeated(one, DRAWS)
        uniform_T1 = torch.rand(DRAWS, 1, generator=generator, dtype=torch.float64)
        ids_TK, probs_TK = tokens.sampled(1.0, uniform_T1)
        drawn = replace(tokens, ids_TK=ids_TK, probs_TK=probs_TK)
        answer = target.run(drawn)
        gradients.append(answer.gradient_TV * target.scale(drawn))
        rival = replace(drawn, student_TV=other.student_TV.expand(DRAWS, -1).clone())
        gains.append((answer.value - target.value(rival)) * target.scale(drawn) / DRAWS)
    means = (("gradient", torch.cat(gradients), truth_V), ("gain", torch.tensor(gains), torch.tensor(kls[0] - kls[1])))
    for what, draws, truth in means:
        error = draws.std(0) / len(draws) ** 0.5
        sigmas = (draws.mean(0) - truth).abs() / (error + target.within)
        yield at_most(f"{what}, mean of {len(draws)} draws, sigmas from the truth", SIGMAS, sigmas.max().item())


CHECKS = (
    Check(
        "unbiased",
        "sampled targets give the gradient of the whole distribution on average, within 4 sigma over re-draws",
        unbiased,
        (),
        "Gemma 3's renormalised samples are biased (by choice)",
    ),
)
