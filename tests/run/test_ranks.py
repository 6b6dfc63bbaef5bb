"""Ranks over gloo: groups, collectives, a stop every rank sees at the same step, and taken ports."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from herd.run import launcher, ranks
from herd.run.errors import ENVIRONMENT, EnvironmentFault

STOPS = [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGUSR1, 1)]  # and the rank that gets it
TWO_RANKS = """
import sys, time
import torch, torch.distributed as dist
from herd.run import ranks
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=ranks.rank(), world_size=2)
for _ in range(3):
    with ranks.StopFlag() as stop:
        for step in range(10_000):
            print("step", step, flush=True)
            time.sleep(0.002 * (1 + ranks.rank()))
            if stop.requested_anywhere():
                break
    print("stopped", step, flush=True)
mine = torch.tensor([1.0, 10.0 * ranks.rank()], dtype=torch.float64)
total = ranks.all_reduce_sum(mine)
ranks.barrier()
print(total.tolist(), mine.tolist(), ranks.broadcast_text("héllo" if ranks.is_main() else "other"), ranks.is_main())
print(repr(ranks.broadcast_text("")))
ranks.shut_down()
print(ranks.all_reduce_sum(mine).tolist(), ranks.rank())
"""
WORK_FOR_EVER = """
import time
from herd.run import cli, ranks
def body():
    with ranks.StopFlag() as stop:
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
            print(stop.requested, flush=True)
cli.main_guard(body)
"""
JOIN = """
import sys
from herd.run import cli, ranks
def body():
    ranks.initialise(timeout_s=20)
    import psutil, torch, torch.distributed as dist
    heard = {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    print(heard - {"127.0.0.1"}, dist.get_world_size(), ranks.all_reduce_sum(torch.ones(1)).item(), dist.get_backend())
    ranks.shut_down()
sys.exit(cli.main_guard(body))
"""

BUFFERS = """
import os, pathlib, torch, deepspeed.comm as dist
from herd.run import ranks
ranks.initialise(timeout_s=60)
total = torch.ones(1000)
dist.all_reduce(total)
ranks.barrier()
name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{os.environ['MASTER_PORT']}_"
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
mapped = {line.split("/dev/shm/")[1] for line in maps if name in line}
left = list(pathlib.Path("/dev/shm").glob(name + "*"))
print(total.sum().item(), len(mapped), left, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What two ranks print that are stopped three times, a different way each time, and then talk to each other."""
    meeting = tmp_path_factory.mktemp("two") / "meeting"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(meeting)],
            env=environment(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo"),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lines: list[list[str]] = [[], []]
    for number, asked in STOPS:
        for child in children:
            assert child.stdout.readline() == "step 0\n"
        time.sleep(0.05)
        children[asked].send_signal(number)
        for mine, child in zip(lines, children, strict=True):
            line = child.stdout.readline()
            while line.startswith("step "):
                line = child.stdout.readline()
            mine.append(line.strip())
    for mine, child in zip(lines, children, strict=True):
        mine += child.communicate()[0].splitlines()
    assert [child.returncode for child in children] == [0, 0]
    return lines


def environment(**variables: str) -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if name not in ranks.LAUNCHED}
    return bare | {"OMP_NUM_THREADS": "1"} | variables


@pytest.mark.parametrize("at", range(len(STOPS)))
def test_a_signal_to_one_rank_stops_all_at_the_same_step(two: list[list[str]], at: int) -> None:
    assert two[0][at] == two[1][at]
    assert two[0][at].startswith("stopped ")


def test_a_second_ctrl_c_ends_the_process_at_once_and_one_sigterm_does_not() -> None:
    command = [sys.executable, "-c", WORK_FOR_EVER]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            child.send_signal(number)
            while child.stdout.readline() != "True\n":
                assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == -signal.SIGINT
        assert child.stderr.read().count("stopping after this step, with a checkpoint") == 1


def test_the_old_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in ranks.SIGNALS]
    with ranks.StopFlag() as stop:
        assert not stop.requested_anywhere()
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested_anywhere()
    assert [signal.getsignal(number) for number in ranks.SIGNALS] == before


def test_ranks_leave_no_shared_memory_behind_even_when_killed() -> None:
    variables = {
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ranks.free_port()),
    }
    children = [
        subprocess.Popen(
            [sys.executable, "-c", BUFFERS],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **variables),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [child.communicate()[0].splitlines()[-1] for child in children] == ["2000.0 2 []"] * 2


def test_collectives_give_every_rank_the_same_and_leave_the_input_alone(two: list[list[str]]) -> None:
    assert two[0][len(STOPS) :] == ["[2.0, 10.0] [1.0, 0.0] héllo True", "''", "[1.0, 0.0] 0"]
    assert two[1][len(STOPS) :] == ["[2.0, 10.0] [1.0, 10.0] héllo False", "''", "[1.0, 10.0] 1"]


def test_without_a_launcher_a_group_of_one_forms_that_the_network_cannot_reach() -> None:
    done = subprocess.run([sys.executable, "-c", JOIN], env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "set() 1 1.0 gloo", done.stderr
    assert done.returncode == 0


def test_a_taken_port_is_exit_code_3_and_names_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("0" + ".0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = subprocess.run(
            [sys.executable, "-c", JOIN], env=environment(**launched), capture_output=True, text=True, check=False
        )
    assert done.returncode == ENVIRONMENT, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: port {port} on 127.0.0.1 is in use, probably by another run: ")
    assert "deepspeed --master_port " in last


def test_half_of_a_launchers_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        EnvironmentFault, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set: start the ranks with"
    ):
        ranks.initialise()


def test_a_rank_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(EnvironmentFault, match="RANK = first: must be a whole number"):
        launcher.rank()


def test_a_free_port_can_be_bound() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ranks.free_port()))
