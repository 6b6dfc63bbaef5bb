"""Targets that belong to other tokens must be refused, and every class must be found again.

Shapes: N rows, T tokens (of a row, where N is given), V vocabulary, K classes listed, L of those written.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from distill.conformance.problem import Problem, draw
from distill.conformance.target import Target
from distill.conformance.verdict import Check, Comparison, answers, equal

LARGE_IDS = (0, 65535, 65536, 131071, 131072, 202047)
"""Around 16 and 17 bits, and the last class of Llama 4."""
COMPANION = 12345
"""Listed beside each with less mass: a loss that renormalises is blind to a class alone."""
VOCABULARY = 202048
REFUSED = "an error"


def misaligned_targets(target: Target) -> Iterator[Comparison]:
    """Targets of more, fewer or one token are refused; a cache gives rows by their content, or refuses."""
    if target.is_cache:
        yield from _misaligned_cache(target)
        return
    problem = draw(100)
    for tokens in (1, 11, 13):
        other = draw(101, tokens=tokens)
        outcome = _outcome(lambda other=other: target.value(_with_teacher(problem, other)))
        yield answers(f"targets of {tokens} tokens for 12", REFUSED, outcome)


def _with_teacher(problem: Problem, other: Problem) -> Problem:
    if problem.listed is None:
        return replace(problem, teacher_TV=other.teacher_TV)
    ids_TK, probs_TK = other.sparse(1.0)
    return replace(problem, teacher_TV=other.teacher_TV, ids_TK=ids_TK, probs_TK=probs_TK)


def _outcome(call: Callable[[], Any]) -> str:
    try:
        return f"{call()}"
    except Exception:
        return REFUSED


def _rows(ids_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids [N, T], and what was kept for them: three of these classes a token [N, T, K], masses."""
    generator = torch.Generator().manual_seed(102)
    input_ids_NT = torch.randint(0, VOCABULARY, (4, 6), generator=generator)
    ids_NTK = torch.stack([ids_K.roll(token)[:3] for token in range(24)]).view(4, 6, 3)
    probs_NTK = torch.softmax(torch.randn(4, 6, 3, generator=generator), -1) * 0.75
    return input_ids_NT, ids_NTK, probs_NTK


def _misaligned_cache(target: Target) -> Iterator[Comparison]:
    input_ids_NT, ids_NTK, probs_NTK = _rows(torch.arange(24))
    read = target.function(input_ids_NT, ids_NTK, probs_NTK)
    order = torch.tensor([2, 0, 3, 1])

    def belongs(rows_NT: torch.Tensor, expected_NTK: torch.Tensor) -> str:
        found = _outcome(lambda: _strangers(read(rows_NT)[0], expected_NTK, target) == 0)
        return {"True": "their own", "False": "those of others"}.get(found, found)

    yield answers("rows in the order written", "their own", belongs(input_ids_NT, ids_NTK))
    shuffled = belongs(input_ids_NT[order], ids_NTK[order])
    yield answers("rows in another order", "their own", "their own" if shuffled == REFUSED else shuffled)
    repacked = input_ids_NT.flatten().roll(-1).view(4, 6)
    outcome = _outcome(lambda: "targets of other rows" if read(repacked) else "nothing")
    yield answers("rows packed one token further", REFUSED, outcome)


def _strangers(found_NTK: torch.Tensor, written_NTK: torch.Tensor, target: Target) -> int:
    """Classes read that were not written for their token (-1 is no class); and, but for samples, those not read."""
    same_NTKL = found_NTK.long()[..., :, None] == written_NTK[..., None, :]
    strange = ((found_NTK >= 0) & ~same_NTKL.any(-1)).sum() + (~same_NTKL.any((-1, -2))).sum()
    lost = 0 if target.declared.tail == "sampled" else (~same_NTKL.any(-2)).sum()
    return int(strange + lost)


def large_ids(target: Target) -> Iterator[Comparison]:
    """Classes past 16 and 17 bits reach the loss, or come back from the cache, as themselves."""
    if target.is_cache:
        input_ids_NT, ids_NTK, probs_NTK = _rows(torch.tensor(LARGE_IDS))
        found_NTK = target.function(input_ids_NT, ids_NTK, probs_NTK)(input_ids_NT)[0]
        wrong = _strangers(found_NTK, ids_NTK, target)
        yield equal("classes that did not come back as themselves", 0.0, float(wrong), within=0.0)
        return
    target.needs_loss(sparse=True)
    tokens = len(LARGE_IDS)
    ids_TK = torch.tensor([(large, COMPANION) for large in LARGE_IDS])
    probs_TK = torch.tensor([[0.8, 0.2]], dtype=torch.float64).expand(tokens, 2)
    flat_TV = torch.zeros(tokens, VOCABULARY, dtype=torch.float64)
    problem = Problem(flat_TV, flat_TV, torch.zeros(tokens, dtype=torch.long), ids_TK=ids_TK, probs_TK=probs_TK)
    # A flat student's loss falls fastest where the teacher has its mass.
    pulled_T = target.run(problem).gradient_TV.argmin(1)
    for expected, got in zip(LARGE_IDS, pulled_T.tolist(), strict=True):
        yield equal(f"class pulled up by a target on class {expected}", expected, got, within=0.0)


CHECKS = (
    Check(
        "misaligned_targets",
        "targets that are not these tokens' are refused, not broadcast or taken by position",
        misaligned_targets,
        (14,),
        "EasyDistill #21 and others: cached rows in another order",
    ),
    Check(
        "large_ids",
        "classes 65535, 65536, 131071, 131072 and 202047 stay themselves",
        large_ids,
        (15,),
        "Megatron-LM's offline cache: 17 bits an id",
    ),
)
