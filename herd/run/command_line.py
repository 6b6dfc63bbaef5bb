"""What to type to run this command again: the words the user gave, the launcher's own options included.

command_line("distill")       "deepspeed --master_port 29511 --num_accelerators 2 --module distill --config ..."
"""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from herd.run import launcher

LAUNCHERS = {
    "deepspeed": "deepspeed",
    "ds": "deepspeed",
    "deepspeed.launcher.runner": "deepspeed",
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
}
"""Script or module on a launcher's command line -> the command people type."""


def command_line(module: str, argv: Sequence[str] | None = None) -> str:
    """The command that starts this program again, as it was typed.

    A launcher's options stand on the command line of the process that started the ranks. Where that cannot be seen
    (it has gone, or runs on another machine), only the numbers of ranks and machines are given.
    """
    given = sys.argv[1:] if argv is None else argv
    words = [word for word in given if not word.startswith(("--local_rank=", "--local-rank="))]
    if "LOCAL_SIZE" not in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        return shlex.join(["python", "-m", module, *words])
    seen = (typed(line, words) for line in _lines_above())
    return shlex.join([*(next(filter(None, seen), None) or _rebuilt(module)), *words])


def typed(line: Sequence[str], words: Sequence[str]) -> list[str] | None:
    """What was typed before this program's `words` on a launcher's command `line`; None for any other line.

    (["python", "bin/deepspeed", "--quiet", "--module", "distill", "-h"], ["-h"])
    -> ["deepspeed", "--quiet", "--module", "distill"]
    """
    ours = len(line) - len(words)
    if list(line[ours:]) != list(words):
        return None
    names = [LAUNCHERS.get(Path(word).name) for word in line[:ours]]
    place = next((index for index, name in enumerate(names) if name), None)
    return None if place is None else [names[place], *line[place + 1 : ours]]


def _lines_above() -> Iterator[list[str]]:
    """Command lines of the processes this one descends from, the nearest first, as far as they can be read."""
    import psutil

    try:
        for process in psutil.Process().parents():
            yield process.cmdline()
    except psutil.Error:  # gone meanwhile, or another user's
        return


def _rebuilt(module: str) -> list[str]:
    local = launcher.local_size()
    if "LOCAL_SIZE" not in os.environ:  # torch's launcher
        return ["torchrun", "--nproc_per_node", str(local), "-m", module]
    nodes = launcher.world_size() // local
    machines = ["--num_nodes", str(nodes)] if nodes > 1 else []
    return ["deepspeed", *machines, "--num_accelerators", str(local), "--module", module]
