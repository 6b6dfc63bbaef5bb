"""A fresh process that gates exports: it shares nothing with the one that quantised.

with GateProcess() as gate:                       # starts importing at once, while the caller quantises
    report = gate.inspect(folder, probe)          # any number of folders, each loaded anew
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import torch

from herd.run.errors import EnvironmentFault
from herd.run.files import disk_faults
from quant.probes import Probe
from quant.reports import Report

# Variables by which launchers tell a process that it is one of several ranks.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class GateProcess:
    """`python -m quant.gate --serve` as a context manager; exact logits need its thread count to be the caller's."""

    def __enter__(self) -> "GateProcess":
        root = str(Path(__file__).resolve().parents[1])
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        environment["HF_HUB_OFFLINE"] = "1"
        self._complaints = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "quant.gate", "--serve", "--threads", str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()  # it holds nothing but what it has answered
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # a request it died before reading is still buffered
            self._process.stdin.close()
        self._process.stdout.close()
        self._complaints.close()

    def inspect(self, folder: Path, probe: Probe) -> Report:
        """The report on a folder; EnvironmentFault when the process died, which says nothing about the folder."""
        with tempfile.TemporaryDirectory(prefix="herd-gate-") as scratch:
            path = Path(scratch) / "probe.safetensors"
            with disk_faults(Path(scratch), mend="set TMPDIR to a folder on another disk"):
                probe.save(path)
            request = json.dumps({"folder": str(folder.resolve()), "probe": str(path)})
            try:
                self._process.stdin.write(request + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                raise self._death() from None
            answer = self._process.stdout.readline()
        if not answer:
            raise self._death()
        return Report.from_json(json.loads(answer))

    def _death(self) -> EnvironmentFault:
        code = self._process.wait()
        self._complaints.seek(0)
        last = (self._complaints.read().strip().splitlines() or ["no message"])[-1]
        return EnvironmentFault(f"the export gate's process ended with {code} ({last}); free memory and export again")
