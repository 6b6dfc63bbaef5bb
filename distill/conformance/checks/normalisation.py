"""What the sum over tokens is divided by: batches, micro-batches and chunks that are cut otherwise give the same.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch

from distill.conformance.problem import Problem, draw
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, equal

# Few and many labels a micro-batch: a mean of means is then far from the mean.
UNEVEN = (0, 1, 2, 4, 5, 6, 9)


def duplicated_batch(target: Target) -> Iterator[Comparison]:
    """Every token twice is the same mean, and twice the sum."""
    target.needs_loss()
    problem = draw(70, tokens=6)
    twice = Problem(
        *(torch.cat((x, x)) for x in (problem.student_TV, problem.teacher_TV, problem.labels_T)),
        rows=2,
        listed=problem.listed,
    )
    for name, options in target.variants():
        once = target.value(problem, **options)
        expected = once * target.scale(problem) / target.scale(twice) * 2
        value = target.value(twice, **options)
        yield equal(f"{name} of a batch twice", expected, value, within=target.close_to(expected))
    if target.takes("reduction"):
        total, mean = (target.value(problem, reduction=how) for how in ("sum", "mean"))
        expected = problem.num_valid * mean
        yield equal("reduction `sum` against tokens x `mean`", expected, total, within=target.close_to(expected))


def accumulation(target: Target) -> Iterator[Comparison]:
    """Micro-batches with few and many labels add up to the whole: by the normalizer, or weighted by their labels."""
    target.needs_loss()
    target.needs_mask()
    problem = draw(71, tokens=16, ignored=UNEVEN)
    total = problem.num_valid
    for name, options in target.variants():
        whole = target.run(problem, **options)
        value, gradients = 0.0, []
        for start in range(0, 16, 4):
            part = problem.take(slice(start, start + 4))
            if target.takes("normalizer"):
                weight, given = 1.0, {"normalizer": total}
            else:
                weight, given = (1.0 if target.declared.reduction == "sum" else part.num_valid / total), {}
            answer = target.run(part, **given, **options)
            value += weight * answer.value
            gradients.append(weight * answer.gradient_TV)
        yield equal(f"{name} of 4 micro-batches", whole.value, value, within=target.close_to(whole.value))
        apart = (torch.cat(gradients) - whole.gradient_TV).abs().max().item()
        yield equal(f"{name}: largest difference of the gradients", 0.0, apart, within=target.within)


def chunk_size(target: Target) -> Iterator[Comparison]:
    """However many tokens are worked on at a time, loss and gradient are the same."""
    target.needs_loss()
    target.needs("chunk_tokens")
    problem = draw(72, tokens=12, ignored=(3,))
    for name, options in target.variants():
        whole = target.run(problem, chunk_tokens=12, **options)
        for size in (1, 5, 64):
            answer = target.run(problem, chunk_tokens=size, **options)
            yield equal(f"{name}, chunks of {size}", whole.value, answer.value, within=target.close_to(whole.value))
            apart = (answer.gradient_TV - whole.gradient_TV).abs().max().item()
            yield equal(f"{name}, chunks of {size}: difference of gradients", 0.0, apart, within=target.within)


CHECKS = (
    Check(
        "duplicated_batch",
        "every token twice gives the same mean (or twice the sum)",
        duplicated_batch,
        (9,),
        "EasyDistill divides by the number of tokens twice; TRL GKD's reduction `mean` is over classes too",
    ),
    Check(
        "accumulation",
        "micro-batches of unequal label counts add up to the whole batch",
        accumulation,
        (12,),
        "TRL #4719: a mean of micro-batch means",
    ),
    Check("chunk_size", "loss and gradient do not depend on the chunk size", chunk_size),
)
