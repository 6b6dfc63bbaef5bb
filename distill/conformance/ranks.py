"""A loss on two ranks: each takes some of the tokens, their gradients are summed, and one process must give the same.

    with TwoRanks(targets) as ranks: ...; verdict = judge(ranks.check(), target)

Two processes of `python -m distill.conformance.ranks` meet over gloo. Shapes: T tokens, H width, V vocabulary.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch

from distill.conformance.problem import Problem, draw
from distill.conformance.target import Target, load
from distill.conformance.verdict import Check, Comparison, NotApplicable, equal

NAME = "rank_count"
WORLD = 2
CUTS = (0, 5, 13)
"""Tokens of each rank; the first has one label, the second most."""
IGNORED = (0, 1, 2, 4, 8)
TIMEOUT_S = 240.0
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _batch() -> Problem:
    return draw(120, tokens=CUTS[-1], ignored=IGNORED)


def part(target: Target, tokens: slice, num_tokens: int) -> tuple[float, torch.Tensor]:
    """Loss of these tokens, of a batch with `num_tokens` labels, and its gradient in a head [V, H] that ranks share."""
    generator = torch.Generator().manual_seed(121)
    hidden_TH = torch.randn(CUTS[-1], 4, generator=generator, dtype=torch.float64)[tokens]
    head_VH = torch.randn(11, 4, generator=generator, dtype=torch.float64).requires_grad_()
    layout, problem = target.layout, _batch().take(tokens)
    if target.fused:
        shared_VH = head_VH.to(layout.device, layout.dtype)
        student = {"student_hidden": layout.lay(hidden_TH, 1).requires_grad_(), "student_head": shared_VH}
    else:
        student = {"student_logits": layout.lay(hidden_TH @ head_VH.T, 1)}
    options = {"normalizer": num_tokens} if target.takes("normalizer") else {}
    loss = target.loss(student, problem, layout, options)
    return loss.item(), torch.autograd.grad(loss, head_VH)[0].cpu()


def adds_up(target: Target) -> None:
    """Raise NotApplicable for a loss that ranks cannot share."""
    target.needs_loss()
    target.needs_mask()
    if not (target.takes("normalizer") or target.declared.reduction == "sum"):
        raise NotApplicable("takes no normalizer: whoever calls it must weight ranks by their labels")
    if not target.importable:
        raise NotApplicable("has no module:name by which other processes find it")


class TwoRanks:
    """Both processes, started at once and asked at the end."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = [target for target in targets if _applies(target)]
        self._folder = tempfile.TemporaryDirectory(prefix="conformance-")
        self._children: list[subprocess.Popen[str]] = []
        self._printed: str | None = None

    def __enter__(self) -> "TwoRanks":
        if self._targets:
            self._children = [self._start(rank) for rank in range(WORLD)]
        return self

    def _start(self, rank: int) -> "subprocess.Popen[str]":
        named = [(one.name, one.declared.to_facts(), one.device) for one in self._targets]
        bare = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        environment = bare | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": bare.get("GLOO_SOCKET_IFNAME", "lo")}
        words = json.dumps({"rank": rank, "meeting": f"{self._folder.name}/meeting", "targets": named})
        return subprocess.Popen(
            [sys.executable, "-m", "distill.conformance.ranks", words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors(rank).open("w"),  # a pipe nobody reads yet could fill up, and stop a rank
            text=True,
        )

    def _errors(self, rank: int) -> Path:
        return Path(self._folder.name) / f"errors{rank}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.kill()
            child.communicate()
        self._folder.cleanup()

    def check(self) -> Check:
        """The check that asks them."""
        asks = "two ranks that share a batch unevenly get the loss and gradient of one process"
        return Check(NAME, asks, self._compare, (12,), "means of ranks' means, as of micro-batches (TRL #4719)")

    def _compare(self, target: Target) -> Iterator[Comparison]:
        adds_up(target)
        found = self._outcome()[target.name]
        value, gradient_VH = part(target, slice(0, CUTS[-1]), _batch().num_valid)
        yield equal("loss of two ranks", value, found[0], within=target.close_to(value))
        apart = (torch.tensor(found[1], dtype=torch.float64) - gradient_VH).abs().max().item()
        yield equal("gradient of two ranks, largest difference", 0.0, apart, within=target.within)

    def _outcome(self) -> dict[str, tuple[float, list[list[float]]]]:
        """What rank 0 printed last."""
        if self._printed is None:
            self._printed = ""  # asked once, whatever comes of it
            printed = [child.communicate(timeout=TIMEOUT_S)[0] for child in self._children]
            self._printed = printed[0]
        for rank, child in enumerate(self._children):
            if child.returncode != 0:
                words = self._errors(rank).read_text().strip().splitlines()[-1:] or ["no word"]
                raise RuntimeError(f"rank {rank} ended with {child.returncode}: {words[0]}")
        return json.loads(self._printed.splitlines()[-1])


def _applies(target: Target) -> bool:
    try:
        adds_up(target)
    except NotApplicable:
        return False
    return True


def work(words: str) -> None:
    """One rank: its tokens of every target, summed over ranks; rank 0 prints what came out."""
    import torch.distributed as dist

    job = json.loads(words)
    rank = job["rank"]
    dist.init_process_group("gloo", init_method=Path(job["meeting"]).as_uri(), rank=rank, world_size=WORLD)
    tokens = slice(CUTS[rank], CUTS[rank + 1])
    labels = torch.tensor(_batch().take(tokens).num_valid)
    dist.all_reduce(labels)
    out = {}
    with contextlib.redirect_stdout(sys.stderr):
        for name, facts, device in job["targets"]:
            value, gradient_VH = part(load(name, facts, device=device), tokens, int(labels))
            total = torch.tensor(value, dtype=torch.float64)
            dist.all_reduce(total)
            dist.all_reduce(gradient_VH)
            out[name] = (total.item(), gradient_VH.tolist())
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(out), flush=True)


if __name__ == "__main__":
    work(sys.argv[1])
