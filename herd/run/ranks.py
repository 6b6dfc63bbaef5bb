"""Ranks of one run: who this process is, joining the group, and the collectives the loop needs.

    ranks.initialise(); total = ranks.all_reduce_sum(tensor); ranks.barrier(); ranks.shut_down()
    with ranks.StopFlag() as stop: ... if stop.requested_anywhere(): save and leave

The launcher's environment says who is who. No torch at import: command lines start from here.
"""

import contextlib
import datetime
import io
import os
import signal
import socket
import warnings
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from herd.run import extensions
from herd.run.errors import EnvironmentFault
from herd.run.launcher import is_main, local_rank, local_size, rank, world_size

if TYPE_CHECKING:
    import torch

__all__ = ["StopFlag", "all_reduce_sum", "barrier", "broadcast_text", "free_port", "initialise", "is_main"]
__all__ += ["local_rank", "local_size", "rank", "shut_down", "world_size"]

LOOPBACK = "127.0.0.1"
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SHARED_MEMORY = Path("/dev/shm")
IN_USE = ("EADDRINUSE", "address already in use")


def initialise(*, timeout_s: float = 1800.0) -> None:
    """Join the run's process group, once a process: nccl on CUDA, gloo elsewhere. Without a launcher, a group of one.

    Raises EnvironmentFault when the launcher's port is taken, rank 0 cannot be reached within `timeout_s`, part of
    the launcher's environment is missing, or DeepSpeed's CPU op cannot be compiled.
    """
    _complete_environment()
    extensions.prepare()
    import deepspeed
    import torch

    # DeepSpeed calls names that torch 2.13 is about to rename; no user can mend that.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.\w+. is deprecated")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size()))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(local_rank())
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # every rank would print that the op was built
            if world_size() == 1 and not torch.distributed.is_initialized():
                # In memory: a group of one listens on no port, so none can be taken.
                store = torch.distributed.HashStore()
                torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    except torch.distributed.DistError as error:
        raise _unreachable(error) from error
    if backend == "gloo":
        _unlink_buffer()


def _unlink_buffer() -> None:
    """Take the name of DeepSpeed's shared-memory buffer away once every rank has opened it.

    DeepSpeed never does: each run on CPU would leave 66 MiB a rank in memory until the machine restarts, killed or
    not, and a later run on the same port could open a dead one's buffer. What is open stays open without a name.
    """
    barrier()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank()}"
    SHARED_MEMORY.joinpath(name).unlink(missing_ok=True)


def _complete_environment() -> None:
    """Fill in what a start without a launcher leaves out; refuse half of what a launcher sets."""
    if world_size() == 1:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": LOOPBACK}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
        if "MASTER_PORT" not in os.environ:
            os.environ["MASTER_PORT"] = str(free_port())  # names DeepSpeed's shared memory; nothing listens on it
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        raise EnvironmentFault(
            f"WORLD_SIZE = {world_size()} but {', '.join(missing)} not set: start the ranks with `deepspeed`, "
            "or unset WORLD_SIZE to run one"
        )
    if os.environ["MASTER_ADDR"] in (LOOPBACK, "localhost"):  # one machine: gloo's sockets stay off the network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _unreachable(error: Exception) -> EnvironmentFault:
    address, port, text = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(error)
    if any(sign in text for sign in IN_USE):
        return EnvironmentFault(
            f"port {port} on {address} is in use, probably by another run: "
            f"start this one with `deepspeed --master_port {free_port()} ...`"
        )
    return EnvironmentFault(f"rank {rank()} of {world_size()} cannot join at {address}:{port}: {text.splitlines()[0]}")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return listener.getsockname()[1]


def shut_down() -> None:
    """Wait for all ranks and leave the group: what rank 0 does afterwards, the others need not wait for."""
    import torch.distributed as dist

    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    if _several():
        import torch.distributed as dist

        dist.barrier()


def all_reduce_sum(tensor: "torch.Tensor") -> "torch.Tensor":
    """Sum over ranks, in a new tensor on the device of the given one."""
    if not _several():
        return tensor.clone()
    import torch.distributed as dist

    total = _sendable(tensor)
    dist.all_reduce(total)
    return total.to(tensor.device)


def broadcast_text(text: str) -> str:
    """Rank 0's text, on every rank."""
    if not _several():
        return text
    import torch
    import torch.distributed as dist

    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = _sendable(torch.tensor(len(data)))
    dist.broadcast(length, src=0)
    data = _sendable(data) if is_main() else _sendable(torch.empty(int(length), dtype=torch.uint8))
    dist.broadcast(data, src=0)
    return bytes(data.tolist()).decode()


def _several() -> bool:
    """True when there are other ranks to talk to (after `initialise`, before `shut_down`)."""
    if world_size() == 1:
        return False
    import torch.distributed as dist

    return dist.is_initialized()


def _sendable(tensor: "torch.Tensor") -> "torch.Tensor":
    """A copy where the group's backend can reach it."""
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else tensor.device
    return tensor.detach().to(device, copy=True)


class StopFlag:
    """SIGTERM, Ctrl-C or SIGUSR1 ask for a stop at the end of the step; a second Ctrl-C ends the process at once.

    The old handlers come back when the context ends. Main thread only, as signals are.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopFlag":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested and is_main():
            # Not print(): a handler may run in the middle of another write.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C once more ends it at once, unsaved\n")
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the system ends it, even inside a collective that hangs

    def requested_anywhere(self) -> bool:
        """True on every rank as soon as one was asked; a collective call, made by all ranks at the same step."""
        import torch

        return bool(all_reduce_sum(torch.tensor(int(self.requested))).item())
