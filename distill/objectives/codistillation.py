"""One step of the herd: the teacher's training forward is every student's target.

    herd = Herd(config, teacher=..., pupils={"scout": Pupil(member, weighting)})
    metrics = herd.take_step(batches, step)

Per micro-batch there is one teacher forward for any number of students. Weights move only after all of them read it.
Shapes: B rows, T tokens a row (flattened to B*T), S statistics of distill.losses.kernel.STATS.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from distill import weighting
from distill.engine import Member
from distill.features import Lesson
from distill.learner import FusedLoss
from distill.losses import Alpha, Distillation, distillation_from_logits, fused_linear_distillation
from distill.losses.spans import span_distillation
from distill.schedule import learning_rate
from distill.tally import Tally
from herd.data.batches import Batch
from herd.llama4.balance import balance_loss
from herd.run import ranks
from herd.run.errors import Diverged, NumericalError
from herd.run.schema import Config
from teachers.cached import CachedTeacher, WriteThrough
from teachers.frozen import FrozenTeacher
from teachers.recorder import Place, Recorder
from teachers.routed import RoutedTeacher
from teachers.spans import SpanTargets
from teachers.targets import SoftTargets


@dataclass
class Pupil:
    """A student and the weight it mixes its targets with."""

    member: Member
    weighting: weighting.Weighting


@dataclass
class Herd:
    """Everything that learns or teaches in one run."""

    config: Config
    teacher: Member | FrozenTeacher | CachedTeacher | RoutedTeacher | None
    pupils: dict[str, Pupil]
    recorder: Recorder | None = None
    """Of what students' feature losses compare with; None without such losses."""
    writing: WriteThrough | None = None
    """Keeps the targets the teacher makes; None without a cache to write."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds each part of the last step took."""
    _step: int = 0

    @property
    def head_start(self) -> int:
        return self.config.teacher.head_start if isinstance(self.teacher, Member) else 0

    @property
    def total_steps(self) -> int:
        return self.head_start + self.config.run.steps

    @property
    def members(self) -> dict[str, Member]:
        """All models that train, the teacher first."""
        students = {name: pupil.member for name, pupil in self.pupils.items()}
        return {"teacher": self.teacher, **students} if isinstance(self.teacher, Member) else students

    def close(self) -> None:
        """Seal the cache that was written, if one was."""
        for part in self._caches():
            part.close()

    def flush(self) -> None:
        """Make the targets that were kept so far survive a power cut, as a checkpoint does."""
        for part in self._caches():
            part.flush()

    def _caches(self) -> list[WriteThrough | CachedTeacher | RoutedTeacher]:
        parts = (self.writing, self.teacher)
        return [part for part in parts if isinstance(part, WriteThrough | CachedTeacher | RoutedTeacher)]

    def take_step(self, batches: list[Batch], step: int) -> dict[str, float | list]:
        """One optimiser step over these micro-batches (this rank's share); metrics are global. Step 0 is the first."""
        active = self._active(step)
        tallies = {name: Tally(member.top_k, member.feature_names) for name, member in active.items()}
        scale = self._normalizer(batches)
        self.seconds = dict.fromkeys(["data", "teacher", *self.pupils, "update"], 0.0)
        self._step = step
        for index, batch in enumerate(batches):
            if isinstance(self.teacher, CachedTeacher | RoutedTeacher) and index < len(batches) - 1:
                self.teacher.prefetch(batches[index + 1])
            self._run_micro_batch(batch, active, tallies, scale)
            if index < len(batches) - 1:
                for member in active.values():
                    member.engine.step()  # no update yet: DeepSpeed counts micro-batches here
        self._settle(active, tallies, batches, step)
        metrics = self._update(active, tallies, step)
        return metrics | {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}

    def _settle(self, active: dict[str, Member], tallies: dict[str, Tally], batches: list[Batch], step: int) -> None:
        """Sum the tallies over ranks; NumericalError, before any weight moves, when a loss is not finite."""
        Tally.reduce(tallies.values())
        for name, tally in tallies.items():
            if not tally.is_finite():
                raise self._diagnose(name, active[name], tally, batches, step)

    def _active(self, step: int) -> dict[str, Member]:
        members = self.members
        return members if step >= self.head_start else {"teacher": members["teacher"]}

    def _normalizer(self, batches: list[Batch]) -> torch.Tensor:
        """Valid tokens of the whole step on all ranks, divided by what DeepSpeed's averaging will multiply back."""
        valid = torch.stack([(batch.labels_BT != -100).sum() for batch in batches]).sum().double()
        return ranks.all_reduce_sum(valid) / (ranks.world_size() * len(batches))

    def _run_micro_batch(
        self, batch: Batch, active: dict[str, Member], tallies: dict[str, Tally], scale: torch.Tensor
    ) -> None:
        started = time.perf_counter()
        targets, whole_head = None, nullcontext()
        with nullcontext() if self.recorder is None else self.recorder.recording(detached=True) as taught:
            if isinstance(self.teacher, Member):
                outputs = self._learn("teacher", active, batch, tallies, scale, targets=None, alpha=0.0)
                targets, whole_head = partial(self.teacher.learner.targets, outputs), self.teacher.gathered_head()
            elif isinstance(self.teacher, CachedTeacher):
                targets = partial(self.teacher.targets_of, batch)
            elif self.teacher is not None:
                routed = isinstance(self.teacher, RoutedTeacher)
                made = self.teacher.targets_of(batch) if routed else self.teacher.targets(batch.input_ids_BT)
                targets = lambda: made  # noqa: E731
        self.seconds["teacher"] += time.perf_counter() - started
        with whole_head:
            soft = None if targets is None else targets()
            if self.writing is not None and active.keys() & self.pupils.keys():
                self.writing.keep(soft, batch, step=self._step + 1)
            for name, pupil in self.pupils.items():
                if name in active:
                    started = time.perf_counter()
                    alpha = pupil.weighting.alpha
                    self._learn(name, active, batch, tallies, scale, targets=soft, alpha=alpha, taught=taught)
                    self.seconds[name] += time.perf_counter() - started

    def _learn(
        self,
        name: str,
        active: dict[str, Member],
        batch: Batch,
        tallies: dict[str, Tally],
        scale: torch.Tensor,
        *,
        targets: SoftTargets | SpanTargets | None,
        alpha: Alpha,
        taught: dict[Place, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Forward and backward of one model on one micro-batch; returns its detached outputs."""
        member, labels_T = active[name], batch.labels_BT.flatten()
        loss_of = self.loss_of(member, labels_T, targets=targets, alpha=alpha, normalizer=scale)
        lesson = Lesson(taught, batch.labels_BT != -100, scale) if member.feature_names else None
        loss, stats_ST, _, outputs, *sums_N = member.engine(batch.input_ids_BT, loss_of=loss_of, lesson=lesson)
        routing = member.tap.take()
        total = loss
        if routing and self.config.loss.balance > 0:
            balance = balance_loss(routing, member.top_k)
            tallies[name].add_balance(balance)
            total = loss + self.config.loss.balance * balance
        member.engine.backward(total)
        tallies[name].add(stats_ST, labels_T != -100, routing)
        if lesson is not None:
            tallies[name].add_features(*sums_N)
        return outputs

    def loss_of(
        self,
        member: Member,
        labels_T: torch.Tensor,
        *,
        targets: SoftTargets | SpanTargets | None,
        alpha: Alpha = 0.0,
        normalizer: torch.Tensor | None = None,
    ) -> FusedLoss:
        """The loss this model's head computes, as a function of its input."""
        loss = self.config.loss
        settings = {"alpha": alpha, "normalizer": normalizer, "chunk_tokens": loss.chunk_tokens}
        if isinstance(targets, SpanTargets):
            comparison = loss.cross_tokenizer.model_dump()
            return partial(span_distillation, labels_T=labels_T, targets=targets, **comparison, **settings)
        settings |= {
            "temperature": loss.temperature,
            "divergence": loss.divergence,
            "parameter": loss.divergence_parameter,
            "label_smoothing": loss.label_smoothing,
            "z_loss": loss.z_loss,
        }

        def compute(outputs: torch.Tensor, head_VH: torch.Tensor | None) -> Distillation:
            if head_VH is None:
                return distillation_from_logits(outputs, labels_T, targets, **settings)
            return fused_linear_distillation(outputs, head_VH, labels_T, targets, **settings)

        return compute

    def _update(self, active: dict[str, Member], tallies: dict[str, Tally], step: int) -> dict[str, float | list]:
        started = time.perf_counter()
        metrics: dict[str, float | list] = {}
        for name, member in active.items():
            begin = 0 if name == "teacher" else self.head_start
            rate = learning_rate(self.config.optim, step - begin, steps=self.total_steps - begin, peak=member.peak_lr)
            member.set_lr(rate)
            member.engine.step()
            label = name if name == "teacher" else f"student/{name}"
            norm = self._gradient_norm(name, member, step)
            metrics |= {f"{label}/lr": rate, f"{label}/grad_norm": norm}
            metrics |= tallies[name].metrics(label, with_targets=self.teacher is not None and name != "teacher")
            metrics |= tallies[name].expert_metrics(name)
        for name in active.keys() & self.pupils.keys():
            pupil = self.pupils[name]
            if self.teacher is not None:
                stats = tallies[name].step_stats(step - self.head_start)
                pupil.weighting.update(stats) if stats.count else pupil.weighting.pass_over(stats.step)
            metrics |= {f"student/{name}/{key}": value for key, value in pupil.weighting.metrics().items()}
        self.seconds["update"] += time.perf_counter() - started
        return metrics

    def _gradient_norm(self, name: str, member: Member, step: int) -> float:
        """Global norm of the step's gradient; DeepSpeed gives -1, Inf or NaN when it is not finite."""
        norm = float(member.engine.get_global_grad_norm() or 0.0)
        if not 0.0 <= norm < math.inf:
            raise Diverged(
                f"{name}: the loss of step {step + 1} is finite, its gradient is not. Nothing of this step is saved"
            )
        return norm

    def _frozen_teachers(self, batches: list[Batch]) -> list[tuple[str, FrozenTeacher, list[Batch]]]:
        """`field = value`, teacher and its rows, of every frozen teacher that may have made these batches' targets."""
        if isinstance(self.teacher, FrozenTeacher):
            return [(f"teacher.source = {self.config.teacher.source}", self.teacher, batches)]
        if not isinstance(self.teacher, RoutedTeacher):
            return []
        found = []
        for number, route in self.teacher.routes.items():
            own = [part for batch in batches if len((part := batch.of_source(number)).keys_B)]
            scored = isinstance(route.teacher, FrozenTeacher) and [
                route.teacher.score(part.input_ids_BT, part.labels_BT.flatten())[0] for part in own
            ]
            if scored and not all(map(math.isfinite, scored)):
                source = self.config.teacher.routes[route.source].source
                found.append((f"teacher.routes.{route.source}.source = {source}", route.teacher, own))
        return found

    def _diagnose(self, name: str, member: Member, tally: Tally, batches: list[Batch], step: int) -> NumericalError:
        from distill.diagnosis import first_fault

        if not math.isfinite(tally.mean("teacher_ce")):
            for field_value, frozen, own in self._frozen_teachers(batches):
                cause = first_fault(frozen.model, lambda batch, of=frozen: of.targets(batch.input_ids_BT), own)
                return NumericalError(
                    f"{field_value}: its logits are not finite; {cause}. Nothing was trained on them; choose another"
                )
        cause = first_fault(member.learner, lambda batch: member.engine(batch.input_ids_BT), batches)
        member.tap.take()
        return Diverged(f"{name}: the loss of step {step + 1} is not finite; {cause}. Nothing of this step is saved")
