"""One training run of a trial: started through the DeepSpeed launcher under a guard, watched, and stopped as a whole.

run = TrialRun.start(study, name="trial-0007", overrides=["optim.lr=0.003"], seed=0, slot=slot)
run.code() is None          # it goes on
run.stop(); run.last_words()
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from herd.run.folders import make_folder
from herd.run.ranks import free_port
from sweeps import guard
from sweeps.settings import Study

STOP_S = guard.GRACE_S + 15.0


@dataclass(frozen=True)
class Slot:
    """A worker's share of the machine."""

    number: int
    threads: int
    accelerators: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """Variables of a run in this slot."""
        shown = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.accelerators))} if self.accelerators else {}
        return dict(os.environ) | {"OMP_NUM_THREADS": str(self.threads)} | shown


def launcher(ranks: int) -> list[str]:
    """The trainer under DeepSpeed's launcher, on a port of its own."""
    words = ["-m", "deepspeed.launcher.runner", "--quiet", "--master_port", str(free_port())]
    return [sys.executable, *words, "--num_accelerators", str(ranks), "--module", "distill"]


def slots(study: Study, accelerators: int) -> list[Slot]:
    """Equal shares of the cores, and of the accelerators where there are enough for one a rank."""
    workers, ranks = study.launch.workers, study.launch.ranks
    threads = max(1, len(os.sched_getaffinity(0)) // (workers * ranks))
    own = accelerators >= workers * ranks
    return [
        Slot(number, threads, tuple(range(number * ranks, (number + 1) * ranks)) if own else ())
        for number in range(workers)
    ]


@dataclass(frozen=True)
class TrialRun:
    folder: Path
    command: list[str]
    log: Path
    process: subprocess.Popen

    @classmethod
    def start(
        cls, study: Study, *, name: str, overrides: list[str], seed: int, slot: Slot, tags: list[str]
    ) -> "TrialRun":
        """Start or go on with the run of that name in the study's folder."""
        make_folder(study.home, "folder")
        settings = [
            *study.set,
            *overrides,
            f"run.name={name}",
            f"run.folder={study.home}",
            f"run.seed={seed}",
            "run.keep_checkpoints=1",
            "tracking.register_models=false",
            *tags,
        ]
        command = [*(study.launch.program or launcher(study.launch.ranks)), "--config", str(study.base)]
        command += [word for setting in settings for word in ("--set", setting)] + ["--resume", "auto"]
        log = study.home / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, str(Path(guard.__file__)), str(study.home / f".{name}.lock"), *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=slot.environment(),
                start_new_session=True,
            )
        return cls(study.home / name, command, log, process)

    def code(self) -> int | None:
        """Exit code; None while it goes on."""
        return self.process.poll()

    def stop(self) -> None:
        """End every process of the run; it saves a checkpoint first if it can in half a minute."""
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.wait(STOP_S)

    def last_words(self) -> str:
        """What the run said last on its log: its error line, where it had one."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")
