"""The training loop: steps, held-out losses, checkpoints, metrics, and a clean stop at any step.

    steps = Loop(assembly, config, run_folder, tracker).run(resume_from=None, resume_command="...")

Every decision that ends or saves is taken at a step boundary by all ranks together, so they never part ways.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.assembly import Assembly
from distill.engine import Member
from distill.tally import HISTOGRAM_NAMES
from distill.weighting import entropy_bins
from herd.data.batches import Batch
from herd.run import checkpoints, files, randomness, ranks
from herd.run.errors import Diverged, Interrupted
from herd.run.progress import Progress
from herd.run.schema import Config
from herd.run.tracking import Tracker
from teachers.frozen import FrozenTeacher
from teachers.routed import RoutedTeacher

STATE_FILE = "loop.json"
SPREAD = {"alpha_by_entropy": entropy_bins.NAMES, "alpha_histogram": HISTOGRAM_NAMES}


@dataclass
class Position:
    """Where a run stands: everything the loop needs besides engines and weightings."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0


class Loop:
    """One run from its position to its last step."""

    def __init__(self, parts: Assembly, config: Config, run_folder: Path, tracker: Tracker) -> None:
        self.parts, self.config, self.run_folder, self.tracker = parts, config, run_folder, tracker
        self.herd, self.position = parts.herd, Position()
        names = (["teacher"] if isinstance(self.herd.teacher, Member | FrozenTeacher) else []) + list(config.students)
        roles = {name: "teacher" if name == "teacher" else "student" for name in names}
        self._children = {name: tracker.nested(name, role=role) for name, role in roles.items()}
        self._metrics_file = run_folder / "metrics.jsonl"

    def run(self, *, resume_from: Path | None, resume_command: str) -> int:
        """Train to the end; returns the steps that took.

        Raises Interrupted after saving when asked to stop, NumericalError on a loss not finite.
        """
        if resume_from is not None:
            self.load(resume_from)
        first = self.position.step
        if ranks.is_main():
            keep_steps(self._metrics_file, up_to=self.position.step)
        ranks.barrier()
        total = self.herd.total_steps
        with ranks.StopFlag() as stop, Progress(total=total, start=self.position.step) as progress:
            while self.position.step < total:
                started = time.perf_counter()
                metrics = self._take_step()
                self.position.elapsed_s += time.perf_counter() - started
                self._report(metrics, progress)
                if self.position.step == total or self.position.step % self.config.run.checkpoint_every == 0:
                    self.save()
                if stop.requested_anywhere() and self.position.step < total:
                    self._stop(resume_command)
        return total - first

    def _take_step(self) -> dict[str, float | list]:
        position, batch = self.position, self.config.batch
        started = time.perf_counter()
        batches = self.parts.rows.take(
            position.step,
            rows=batch.rows,
            micro_rows=self.parts.micro_rows,
            rank=ranks.rank(),
            world=ranks.world_size(),
        )
        fetched = time.perf_counter() - started
        try:
            metrics = self.herd.take_step(batches, position.step) | {"time/data_s": fetched}
        except Diverged as error:
            raise Diverged(f"{error}; {self._way_back()}") from error
        position.step += 1
        position.tokens += batch.rows * self.config.data.sequence_length
        metrics["tokens_per_s"] = batch.rows * self.config.data.sequence_length / (time.perf_counter() - started)
        every = self.config.run.evaluate_every
        if every and (position.step % every == 0 or position.step == self.herd.total_steps):
            heldout = self.evaluate()
            metrics |= heldout
            own_steps = position.step - self.herd.head_start
            if own_steps > 0:
                for name, pupil in self.herd.pupils.items():
                    pupil.weighting.see_heldout(own_steps, heldout[f"heldout/{name}"])
        return metrics

    def _way_back(self) -> str:
        good = checkpoints.latest(self.run_folder)
        start = "there is no checkpoint yet: start anew" if good is None else f"start from {good} (--resume)"
        return f"{start} under a new run.name with a lower optim.lr or more optim.warmup"

    def evaluate(self) -> dict[str, float]:
        """Held-out loss in nats per token of every model, each rank scoring its share of the rows.

        `heldout/scout/web` is that of the rows of one source alone, where sources have names.
        """
        models = dict(self.herd.members)
        standing = isinstance(self.herd.teacher, FrozenTeacher | RoutedTeacher)
        if standing and self.position.step <= self.config.run.evaluate_every:
            models = {"teacher": self.herd.teacher, **models}
        losses: dict[str, float] = {}
        for name, model in models.items():
            sums_S2 = self._heldout_sums(model)
            if not isinstance(model, RoutedTeacher):  # each of its teachers is for its own rows
                losses[f"heldout/{name}"] = (sums_S2[:, 0].sum() / sums_S2[:, 1].sum()).item()
            for source, (ce_sum, count) in zip(self.config.data.sources, sums_S2.tolist(), strict=False):
                if count:
                    losses[f"heldout/{name}/{source}"] = ce_sum / count
        return losses

    def _heldout_sums(self, model: Member | FrozenTeacher | RoutedTeacher) -> torch.Tensor:
        """Loss and tokens of every source [S, 2], of the whole without names [1, 2]; over all ranks."""
        sums_S2 = torch.zeros(max(1, len(self.config.data.sources)), 2, dtype=torch.float64)
        # All ranks make the same number of forwards: under ZeRO-3 and expert parallelism each one is a collective.
        batches = self.parts.heldout
        rounds = -(-len(batches) // ranks.world_size())
        with torch.no_grad():
            for index in range(rounds):
                place = index * ranks.world_size() + ranks.rank()
                batch = batches[min(place, len(batches) - 1)]
                scored_S2 = self._score(model, batch)
                if place < len(batches):
                    sums_S2 += scored_S2
        return ranks.all_reduce_sum(sums_S2)

    def _score(self, model: Member | FrozenTeacher | RoutedTeacher, batch: Batch) -> torch.Tensor:
        """Loss and tokens of every source [S, 2]."""
        scored_S2 = torch.zeros(max(1, len(self.config.data.sources)), 2, dtype=torch.float64)
        if not isinstance(model, Member):
            for number in range(len(scored_S2)):
                teacher = model.frozen(number) if isinstance(model, RoutedTeacher) else model
                own = batch if batch.sources_B is None else batch.of_source(number)
                if teacher is not None and len(own.keys_B):
                    scored_S2[number] = torch.tensor(teacher.score(own.input_ids_BT, own.labels_BT.flatten()))
            return scored_S2
        labels_T = batch.labels_BT.flatten()
        model.engine.eval()
        loss_of = self.herd.loss_of(model, labels_T, targets=None)
        _, stats_ST, _, _ = model.engine(batch.input_ids_BT, loss_of=loss_of)
        model.engine.train()
        model.tap.take()
        source_T = torch.zeros_like(labels_T)
        if batch.sources_B is not None:
            source_T = batch.sources_B.repeat_interleave(batch.labels_BT.shape[1])
        for number in range(len(scored_S2)):
            own_T = (source_T == number) & (labels_T != -100)
            scored_S2[number] = torch.stack((stats_ST[0, own_T].double().sum(), own_T.sum()))
        return scored_S2

    def _report(self, metrics: dict[str, float | list], progress: Progress) -> None:
        position = self.position
        record = {"step": position.step, "tokens": position.tokens, "elapsed_s": round(position.elapsed_s, 3)} | metrics
        progress.update(position.step, position.tokens, headline(metrics, self.config.students))
        if ranks.is_main():
            with self._metrics_file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        for name, child in self._children.items():
            child.metrics(of_model(metrics, name), step=position.step, once=True)
        common = {key: metrics[key] for key in metrics if key.startswith(("time/", "tokens_per_s"))}
        self.tracker.metrics(common | {"tokens": position.tokens}, step=position.step, once=True)

    def _stop(self, resume_command: str) -> None:
        if checkpoints.latest_step(self.run_folder) != self.position.step:
            self.save()
        raise Interrupted(f"stopped at step {self.position.step}, saved; go on with: {resume_command}")

    def save(self) -> None:
        """Write a complete checkpoint; whatever happens, the previous one stays whole until this one is."""
        self.herd.flush()  # a resumed run takes no step again whose targets the checkpoint counts on
        facts = {"expert_parallel": self.config.parallel.expert_parallel, "zero": self.config.parallel.zero}
        with checkpoints.writing(self.run_folder, self.position.step, facts=facts) as folder:
            for member in self.herd.members.values():
                member.save(folder)
            torch.save(randomness.rng_state(), folder / f"rng.{ranks.rank()}.pt")
            if ranks.is_main():
                state = {
                    "position": vars(self.position),
                    "weightings": {name: pupil.weighting.state_dict() for name, pupil in self.herd.pupils.items()},
                    "rows": self.parts.rows.state_dict(),
                }
                files.write_atomic(folder / STATE_FILE, json.dumps(state))
        checkpoints.prune(self.run_folder, keep=self.config.run.keep_checkpoints)

    def load(self, folder: Path) -> None:
        """Restore engines, weightings, random states and the position from a complete checkpoint."""
        for member in self.herd.members.values():
            member.load(folder)
        randomness.restore_rng(torch.load(folder / f"rng.{ranks.rank()}.pt", weights_only=True))
        state = json.loads((folder / STATE_FILE).read_text())
        self.position = Position(**state["position"])
        self.parts.rows.load_state_dict(state["rows"])
        for name, pupil in self.herd.pupils.items():
            pupil.weighting.load_state_dict(state["weightings"][name])


def keep_steps(path: Path, *, up_to: int) -> None:
    """Drop the lines of steps beyond `up_to`: they were taken after the checkpoint and will be taken again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= up_to]
        files.write_atomic(path, "".join(kept))


def headline(metrics: dict[str, float | list], students: dict) -> dict[str, float]:
    """The few numbers the progress line shows."""
    shown = {"teacher": metrics.get("teacher/ce")}
    for name in students:
        shown[name] = metrics.get(f"student/{name}/ce")
        shown[f"{name} alpha"] = metrics.get(f"student/{name}/alpha")
        shown[f"{name} reverse KL"] = metrics.get(f"student/{name}/on_policy/reverse_kl")
    return {key: value for key, value in shown.items() if value is not None}


def of_model(metrics: dict[str, float | list], name: str) -> dict[str, float]:
    """One model's metrics under the names its MLflow run shows: train/..., experts/..., heldout/nats.

    MLflow keeps scalars: of alpha's spread one a bin, `train/alpha_by_entropy/0.5-1`; other lists stay behind.
    """
    prefix = "teacher/" if name == "teacher" else f"student/{name}/"
    renamed = {f"train/{key.removeprefix(prefix)}": v for key, v in metrics.items() if key.startswith(prefix)}
    experts = f"experts/{name}/"
    renamed |= {f"experts/{key.removeprefix(experts)}": v for key, v in metrics.items() if key.startswith(experts)}
    if f"heldout/{name}" in metrics:
        renamed["heldout/nats"] = metrics[f"heldout/{name}"]
    by_source = f"heldout/{name}/"
    renamed |= {
        f"heldout/nats/{key.removeprefix(by_source)}": v for key, v in metrics.items() if key.startswith(by_source)
    }
    for key, names in SPREAD.items():
        values = renamed.pop(f"train/{key}", [])
        renamed |= {f"train/{key}/{bin_name}": value for bin_name, value in zip(names, values, strict=False)}
    return {key: value for key, value in renamed.items() if isinstance(value, float)}
