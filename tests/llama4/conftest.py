"""Runs parallel_worker.py once on two gloo ranks; the tests of parallel behaviour read what it wrote."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = """
from herd.run import lean_deepspeed
lean_deepspeed.load()  # as runs start
from tests.llama4.parallel_worker import main
main()
"""
TIMEOUT_S = 420  # most of it is spent on importing, and once on compiling DeepSpeed's CPU communication


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Return (folder with the gathered weights, results of rank 0, results of rank 1)."""
    folder = tmp_path_factory.mktemp("two_ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    shared |= {"PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": extensions}
    logs = [(folder / f"rank{rank}.log").open("w") for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait(TIMEOUT_S) for process in ranks]
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            log.close()
    for rank, code in enumerate(codes):
        assert code == 0, (folder / f"rank{rank}.log").read_text()[-3000:]
    return folder, *(json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2))
