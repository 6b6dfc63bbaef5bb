"""One training run of a trial: started through the DeepSpeed launcher under a guard, watched, and stopped as a whole.

run = TrialRun.of(study, name="trial-0007", overrides=["optim.lr=0.003"], seed=0)
run.start(slot, tags); run.code() is None          # it goes on
run.stop(); run.last_words()
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from herd.run import config
from herd.run.errors import ConfigError
from herd.run.files import write_atomic
from herd.run.folders import make_folder
from herd.run.ranks import free_port
from sweeps import guard
from sweeps.settings import Study

LAST_BYTES, LONGEST_LINE = 1 << 16, 500  # of a log
STOP_S = guard.GRACE_S + 15.0
FIXED = ("run.keep_checkpoints=1", "tracking.register_models=false")
LEAN = "run.ends=trained"  # what follows training is made for evals/ objectives alone, unless the study's `set` asks
DONE = "sweep.json"  # in the folder of a run that ended well: its settings


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


@dataclass
class TrialRun:
    folder: Path
    settings: list[str]
    """All that is put on the base."""
    study: Study
    process: subprocess.Popen | None = None

    @classmethod
    def of(cls, study: Study, *, name: str, overrides: list[str], seed: int) -> "TrialRun":
        """The run of that name in the study's folder, not started."""
        own = [f"run.name={name}", f"run.folder={study.home}", f"run.seed={seed}", *FIXED]
        lean = [] if study.reads_evaluations else [LEAN]
        return cls(study.home / name, [*lean, *study.set, *overrides, *own], study)

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def start(self, slot: Slot, tags: list[str]) -> None:
        """Start it or go on with it. tags: settings that only name it."""
        home, launch = self.study.home, self.study.launch
        make_folder(home, "folder")
        begun, made_of = home / f".{self.folder.name}.json", self.made_of()
        if self.folder.exists() and _read(begun) != made_of:
            set_aside(home, [self.folder])  # of another study that was here: nothing to go on with
        write_atomic(begun, json.dumps(made_of) + "\n")
        words = [*(launch.program or launcher(launch.ranks)), "--config", str(self.study.base_copy)]
        words += [word for setting in [*self.settings, *tags] for word in ("--set", setting)] + ["--resume", "auto"]
        lock = home / f".{self.folder.name}.lock"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(guard.__file__)), str(lock), *words],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=slot.environment(),
                start_new_session=True,
            )

    def code(self) -> int | None:
        """Exit code; None while it goes on."""
        return self.process.poll()

    def stop(self) -> None:
        """End every process of the run; it saves a checkpoint first if it can in half a minute."""
        if self.process.stdin and not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.wait(STOP_S)

    def finish(self) -> None:
        """Note that it ended well, so that it is never run again, and drop its checkpoints."""
        make_folder(self.folder, "run.folder")  # a program of the user's own may have made none
        write_atomic(self.folder / DONE, json.dumps(self.made_of()) + "\n")
        clear_checkpoints(self.folder)

    def is_done(self) -> bool:
        """Whether it has ended well before, made of the very same."""
        return _read(self.folder / DONE) == self.made_of()

    def made_of(self) -> dict[str, Any]:
        """What decides what it becomes, as JSON: its settings, the base they are put on, and what runs it."""
        base = config.dump(config.load(self.study.base_copy))
        digest = hashlib.sha256(base.encode()).hexdigest()
        return {"settings": self.settings, "base": digest, "program": self.study.launch.program}

    def last_words(self) -> str:
        """What the run said last on its log: its error line, where it had one."""
        code = self.code()
        if code and (number := signal_of(code)):
            return killed(number)
        with self.log.open("rb") as file:  # a program may have written anything
            file.seek(max(0, self.log.stat().st_size - LAST_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        line = (errors or lines or [f"exit code {code}, and it said nothing"])[-1].removeprefix("error: ")
        return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


def signal_of(code: int) -> int | None:
    """The signal an exit code tells of, as a shell writes it; None for a code of the program's own, such as 255."""
    number = code - 128 if code > 0 else -code
    return number if number in signal.valid_signals() else None


def _read(stamp: Path) -> Any:
    return json.loads(stamp.read_text()) if stamp.exists() else None


def killed(number: int) -> str:
    """What ended a run, from the number of the signal."""
    cause = "; out of memory, if nobody did it" if number == signal.SIGKILL else f" ({signal.strsignal(number)})"
    return f"killed by signal {number}{cause}"


def set_aside(home: Path, runs: Iterable[Path]) -> Path:
    """Move runs that no trial can go on with out of the way of the next of their names; returns their new folder."""
    for number in count(1):
        place = home / f"aside-{number}"
        with suppress(FileExistsError):  # another worker may be at it too
            place.mkdir()
            break
    for run in runs:
        run.rename(place / run.name)
    return place


@contextmanager
def setting_aside(run: TrialRun) -> Iterator[None]:
    """A run whose files are not what they should be is set aside: the mended program begins anew."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error}; the run is kept in {set_aside(run.study.home, [run.folder])}") from None


def clear_checkpoints(folder: Path) -> None:
    """Remove what only a resume would need, a trial's largest part."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
