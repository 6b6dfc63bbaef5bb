"""kill -9 while a cache is written, and flipped bytes afterwards: no row lost, none wrong, every flip reported.

    python benchmarks/cache_kills.py [--kills 20] [--flips 400]

Two writers at a time write rows of a made-up teacher into small shards and report each; both are killed at a random
moment and started again, as often as asked. After every kill all reported rows must be there, and every row that is
there must be, to the byte, what was given to the writer. Then bits are flipped, one at a time, anywhere in the shards.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from herd.run.files import write_atomic
from teachers import cache
from teachers.cache.codecs import encode_rows, parse
from teachers.cache.folder import open_shards, shard_paths
from teachers.cache.manifest import Manifest
from teachers.cache.verification import verify
from teachers.targets import DenseTargets

RESULTS = Path(__file__).parent / "results" / "cache_kills.json"
WRITERS, LENGTH, VOCABULARY, ROWS, SHARD_BYTES = 2, 128, 2048, 100_000, 1 << 20
IDENTITY = cache.Identity("kills", VOCABULARY, LENGTH, 1.0, "kills", "kills")
CODEC, DIFFERENT = "head_and_tail=14", 64


class Rows:
    """Row n of the made-up data: always the same tokens, key and targets, encoded beforehand."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits_TV = 3 * torch.randn(DIFFERENT * LENGTH, VOCABULARY, generator=generator)
        self.tokens_BT = torch.randint(0, VOCABULARY, (DIFFERENT, LENGTH), generator=generator)
        keys_B = torch.arange(DIFFERENT)
        self.payloads = encode_rows(
            parse(CODEC), DenseTargets(logits_TV), self.tokens_BT, keys_B, vocabulary=VOCABULARY
        )

    def write(self, writer: cache.Writer, row: int) -> None:
        same = row % DIFFERENT
        writer.store(torch.tensor([row]), self.tokens_BT[same, None], [self.payloads[same]], step=0)

    def wrong(self, folder: Path) -> list[int]:
        """Rows of a cache whose bytes are not those that were given; raises DataError for damage."""
        reader = cache.open(folder, expecting=IDENTITY)
        payloads = ((int(key), bytes(reader.payload(at))) for at, key in enumerate(reader.keys_N))
        return [key for key, payload in payloads if payload != self.payloads[key % DIFFERENT]]


def write(folder: Path, rows: Rows, number: int, reports: Connection) -> None:
    """What a writing process does: the rows of its share that are missing, each reported once it is appended."""
    opened = cache.create(folder, IDENTITY, CODEC)
    share = torch.arange(number, ROWS, WRITERS)
    missing = share[cache.open(folder, expecting=IDENTITY).missing(share)]
    with opened.writer(f"rank{number}", shard_bytes=SHARD_BYTES) as writer:
        for row in missing.tolist():
            rows.write(writer, row)
            reports.send(row)


def start(folder: Path, rows: Rows) -> list[tuple[multiprocessing.Process, Connection]]:
    """All writers, as processes of their own."""
    fork = multiprocessing.get_context("fork")
    started = []
    for number in range(WRITERS):
        receiving, sending = fork.Pipe(duplex=False)
        process = fork.Process(target=write, args=(folder, rows, number, sending))
        process.start()
        sending.close()
        started.append((process, receiving))
    return started


def reported(receiving: Connection) -> list[int]:
    """What a writer said before its end."""
    rows = []
    try:
        while True:
            rows.append(receiving.recv())
    except EOFError:
        return rows


def kill_midway(folder: Path, rows: Rows, draw: random.Random) -> tuple[set[int], dict[str, int]]:
    """Start, wait for the first row, kill all at a random moment; returns what was reported and what was found."""
    started = start(folder, rows)
    started[0][1].poll(60)
    time.sleep(draw.uniform(0.0, 0.1))
    for process, _ in started:
        os.kill(process.pid, signal.SIGKILL)
    said = {row for _, receiving in started for row in reported(receiving)}
    for process, _ in started:
        process.join()
        assert process.exitcode == -signal.SIGKILL, "a writer ended before it was killed: give it more rows"
    torn = sum(shard.torn for shard in open_shards(folder, Manifest.read(folder)))
    return said, {"reported": len(said), "shards": len(shard_paths(folder)), "torn_bytes": torn}


def flip(folder: Path, draw: random.Random, count: int) -> int:
    """Change one bit of one byte of a shard, `count` times; returns how many of them were reported."""
    noticed = 0
    for _ in range(count):
        path = draw.choice(shard_paths(folder))
        content = bytearray(path.read_bytes())
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        noticed += bool(verify(folder).faults)
        content[place] ^= 1 << bit
        path.write_bytes(content)
    return noticed


def main() -> int:
    """Kill, check, finish, flip bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, rows = random.Random(0), Rows()
    said, kills, lost, wrong = set(), [], 0, 0
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as small:
        for number in range(arguments.kills):
            newly, found = kill_midway(Path(folder), rows, draw)
            said |= newly
            there = set(cache.open(Path(folder), expecting=IDENTITY).keys_N.tolist())
            lost, wrong = lost + len(said - there), wrong + len(rows.wrong(Path(folder)))
            kills.append(found | {"rows": len(there)})
            print(f"kill {number + 1}: {kills[-1]}", flush=True)
        with cache.create(Path(small), IDENTITY, CODEC).writer(shard_bytes=100_000) as writer:
            for row in range(2 * DIFFERENT):
                rows.write(writer, row)
        noticed = flip(Path(small), draw, arguments.flips)
    torn = sum(bool(kill["torn_bytes"]) for kill in kills)
    print(
        f"{len(kills)} kills of {WRITERS} writers, {torn} with a torn record; {len(said):,} rows reported, {lost} lost,"
    )
    print(f"{wrong} wrong; {noticed} of {arguments.flips} flipped bits reported")
    result = {"writers": WRITERS, "kills": kills, "rows_reported": len(said), "lost": lost, "wrong": wrong}
    write_atomic(RESULTS, json.dumps(result | {"flips": arguments.flips, "noticed": noticed}, indent=1) + "\n")
    return 0 if not lost and not wrong and noticed == arguments.flips else 1


if __name__ == "__main__":
    sys.exit(main())
