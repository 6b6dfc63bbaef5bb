"""On-policy distillation: students continue prompts themselves, the teacher scores every token they wrote.

    herd = OnPolicyHerd(config, teacher, pupils, vocabulary=len(tokenizer))
    metrics = herd.take_step(batches, step)

The loss is the sum over the vocabulary at each state the student reached; the states themselves are held fixed, so
plain backpropagation is the right gradient (docs/on-policy.md). GKD (2306.13649) with lambda = objective.fraction.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from distill.engine import Member
from distill.losses import Distillation
from distill.objectives.codistillation import Herd
from distill.rollouts import write_batches
from distill.tally import Tally
from herd.data.batches import Batch
from teachers.frozen import FrozenTeacher
from teachers.targets import SoftTargets


@dataclass(frozen=True, slots=True)
class Continued(Batch):
    """Rows as they are in the corpus, and as each student continues them."""

    by_student: dict[str, Batch] = field(kw_only=True)


@dataclass
class OnPolicyHerd(Herd):
    """A herd whose students write some of the micro-batches of a step; the rest of it is codistillation.Herd."""

    vocabulary: int = field(kw_only=True)
    """Ids a student may write: those the tokenizer knows."""
    _sampled: dict[str, Tally] = field(default_factory=dict)
    """Students' sums over written tokens of the last step; empty when none were."""
    _sampling_s: dict[str, float] = field(default_factory=dict)

    def take_step(self, batches: list[Batch], step: int) -> dict[str, float | list]:
        """See Herd.take_step. Which micro-batches are written depends on run.seed and the step alone."""
        self._sampled, self._sampling_s = {}, {}
        if step >= self.head_start:
            seed = (self.config.run.seed, step)
            written = choose_written(len(batches), self.config.objective.fraction, seed=seed)
            batches = self._continue(batches, written, seed)
        return super().take_step(batches, step) | {"time/sampling_s": sum(self._sampling_s.values(), 0.0)}

    def _continue(self, batches: list[Batch], written: list[int], seed: tuple[int, ...]) -> list[Batch]:
        """Let every student write these micro-batches, all at one time: no weight moves before the step's end."""
        prompts = [batches[index] for index in written]
        versions = {name: self._write(name, prompts, seed) for name in self.pupils} if written else {}
        marked = list(batches)
        for place, index in enumerate(written):
            b, own = batches[index], {name: batches_of[place] for name, batches_of in versions.items()}
            marked[index] = Continued(b.input_ids_BT, b.labels_BT, b.keys_B, b.bytes_B, b.sources_B, by_student=own)
        return marked

    def _write(self, name: str, prompts: list[Batch], seed: tuple[int, ...]) -> list[Batch]:
        started, member = time.perf_counter(), self.pupils[name].member
        with member.whole() as model:
            own = write_batches(model, prompts, self.config.objective, vocabulary=self.vocabulary, seed=seed)
        member.tap.take()
        self._sampling_s[name] = time.perf_counter() - started
        return own

    def _run_micro_batch(
        self, batch: Batch, active: dict[str, Member], tallies: dict[str, Tally], scale: torch.Tensor
    ) -> None:
        if not isinstance(batch, Continued):
            super()._run_micro_batch(batch, active, tallies, scale)
            return
        if isinstance(self.teacher, Member):  # it learns from the rows as they are, as if there were no students
            started = time.perf_counter()
            self._learn("teacher", active, batch, tallies, scale, targets=None, alpha=0.0)
            self.seconds["teacher"] += time.perf_counter() - started
        for name, own in batch.by_student.items():
            sampled = self._sampled.setdefault(name, tallies[name].beside())
            started = time.perf_counter()
            with self._scores(own) as targets:
                scored = time.perf_counter()
                # alpha = 1: no label is true here. The divisor is the step's, so a written token counts as a read one.
                self._learn(name, active, own, {name: sampled}, scale, targets=targets, alpha=1.0)
            self.seconds["teacher"] += scored - started
            self.seconds[name] += time.perf_counter() - scored

    @contextmanager
    def _scores(self, batch: Batch) -> Iterator[SoftTargets]:
        """The teacher's distributions along these rows. It does not learn from them, whether it trains or not."""
        teacher = self.teacher
        if isinstance(teacher, FrozenTeacher):
            yield teacher.targets(batch.input_ids_BT)
            return
        teacher.engine.eval()
        with torch.no_grad():
            *_, outputs = teacher.engine(batch.input_ids_BT, loss_of=no_loss)
        teacher.engine.train()
        teacher.tap.take()
        with teacher.gathered_head():
            yield teacher.learner.targets(outputs)

    def _settle(self, active: dict[str, Member], tallies: dict[str, Tally], batches: list[Batch], step: int) -> None:
        super()._settle(active, tallies, batches, step)
        if self._sampled:
            super()._settle(active, self._sampled, batches, step)

    def _update(self, active: dict[str, Member], tallies: dict[str, Tally], step: int) -> dict[str, float | list]:
        metrics = super()._update(active, tallies, step)
        for name in [name for name in self.pupils if name in active]:
            metrics |= self._sample_metrics(name, read_tokens=tallies[name].num_tokens)
        return metrics

    def _sample_metrics(self, name: str, *, read_tokens: int) -> dict[str, float]:
        """What a student wrote in this step and how the teacher liked it: global means, in nats.

        `reverse_kl` is the estimate k1 of KL(student || teacher), the mean of log q - log p over the tokens written:
        without bias at a sample temperature of 1, whatever divergence is the loss (that one, in full, is `kd`).
        """
        label = f"student/{name}/on_policy"
        if name not in self._sampled:
            return {f"{label}/sampled_share": 0.0}
        tally = self._sampled[name]
        return {
            f"{label}/sampled_share": tally.num_tokens / (tally.num_tokens + read_tokens),
            f"{label}/kd": tally.mean("kd"),
            f"{label}/reverse_kl": tally.mean("teacher_ce") - tally.mean("ce"),
            f"{label}/teacher_logprob": -tally.mean("teacher_ce"),
            f"{label}/tokens_per_s": tally.num_tokens / self._sampling_s[name],
        }


def no_loss(outputs: torch.Tensor, head_VH: torch.Tensor | None) -> Distillation:
    """A forward's outputs are wanted, but its head must run too: ZeRO-3 has sent for it and waits until it is used."""
    zero = outputs.new_zeros(())
    return Distillation(zero, zero, zero)


def choose_written(count: int, fraction: float, *, seed: tuple[int, ...]) -> list[int]:
    """Which of a step's micro-batches are written: fraction x count of them on average, never off by one or more."""
    generator = np.random.default_rng(seed)
    written = int(fraction * count + generator.random())
    return sorted(generator.permutation(count)[:written].tolist())
