"""The cache as a store: what is written is what is read, by key, after kills, and never a damaged or foreign byte.

Run: pytest tests/teachers/test_cache.py
"""

import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.run.errors import ConfigError, DataError, EnvironmentFault, NumericalError
from teachers import cache
from teachers.cache.verification import verify
from teachers.targets import DenseTargets, SparseTargets
from tests.teachers.samples import IDENTITY, LENGTH, VOCABULARY, Rows, make_cache

ROOT = Path(__file__).resolve().parents[2]


def read(folder: Path, rows: Rows, at: list[int] | None = None, **settings) -> SparseTargets:
    at = list(range(len(rows.keys_B))) if at is None else at
    return cache.open(folder, expecting=IDENTITY).targets(rows.keys_B[at], rows.input_ids_BT[at], **settings)


def by_row(targets: SparseTargets) -> list[list[dict[int, float]]]:
    """Masses by id, of every token of every row: no order of classes, no width."""
    tokens = [
        {id: mass for id, mass in zip(ids, masses, strict=True) if id >= 0}
        for ids, masses in zip(targets.ids_TK.tolist(), targets.probs_TK.tolist(), strict=True)
    ]
    return [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]


def shards_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".part"))


@settings(max_examples=15)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=12))
def test_rows_come_back_by_key_in_any_order_and_number(tmp_path_factory, at):
    rows = Rows(9)
    folder = make_cache(tmp_path_factory.mktemp("cache"), rows)
    every, asked = read(folder, rows), read(folder, rows, at)
    assert by_row(asked) == [by_row(every)[row] for row in at]
    assert torch.equal(asked.ce_T.view(-1, LENGTH), every.ce_T.view(-1, LENGTH)[at])
    assert torch.equal(asked.entropy_T.view(-1, LENGTH), every.entropy_T.view(-1, LENGTH)[at])


def test_how_rows_are_spread_over_writers_shards_and_calls_does_not_matter(tmp_path):
    rows = Rows(24)
    whole = make_cache(tmp_path / "whole", rows)
    spread = cache.create(tmp_path / "spread", IDENTITY, "head_and_tail=4")
    writers = [spread.writer(f"rank{rank}", shard_bytes=300) for rank in range(3)]
    for row in reversed(range(24)):
        rows.write(writers[row % 3], slice(row, row + 1))
    for writer in writers:
        writer.close()
    assert len(shards_of(tmp_path / "spread")) > 6
    assert by_row(read(tmp_path / "spread", rows)) == by_row(read(whole, rows))
    assert verify(tmp_path / "spread").faults == []


def test_of_two_records_of_a_row_the_one_of_the_later_step_is_read(tmp_path):
    early, late = Rows(4), Rows(4)
    late.logits_TV = -early.logits_TV
    opened = cache.create(tmp_path, IDENTITY, "top_k=5")
    with opened.writer("b") as writer:
        late.write(writer, slice(0, 2), step=20)
    with opened.writer("a") as writer:
        early.write(writer, step=10)
    reader = cache.open(tmp_path, expecting=IDENTITY)
    assert len(reader) == 4 and sorted(reader.steps_N.tolist()) == [10, 10, 20, 20]
    early_alone = make_cache(tmp_path / "early", early, codec="top_k=5")
    late_alone = make_cache(tmp_path / "late", late, codec="top_k=5")
    expected = by_row(read(late_alone, late))[:2] + by_row(read(early_alone, early))[2:]
    assert by_row(reader.targets(early.keys_B, early.input_ids_BT)) == expected
    young = cache.open(tmp_path, expecting=IDENTITY, oldest_step=15)
    assert young.missing(early.keys_B).tolist() == [False, False, True, True]


def test_missing_rows_are_counted_and_the_command_that_makes_them_is_named(tmp_path):
    rows = Rows(6)
    opened = cache.create(tmp_path, IDENTITY, "head_and_tail=4", facts={"model": "a teacher"})
    with opened.writer() as writer:
        rows.write(writer, slice(0, 4))
    reader = cache.open(tmp_path, expecting=IDENTITY)
    assert reader.missing(rows.keys_B).tolist() == [False] * 4 + [True] * 2
    command = rf"python -m teachers cache --model 'a teacher' --out {tmp_path} --part train --complete"
    with pytest.raises(DataError, match=rf"2 of the 6 rows asked for have no target .* make them with: {command}"):
        reader.targets(rows.keys_B, rows.input_ids_BT)
    targets = reader.targets(rows.keys_B, rows.input_ids_BT, allow_missing=True)
    assert targets.present_T.view(6, LENGTH).all(1).tolist() == [True] * 4 + [False] * 2
    assert not targets.present_T.view(6, LENGTH)[4:].any()
    assert (targets.ids_TK[4 * LENGTH :] == -1).all() and (targets.probs_TK[4 * LENGTH :] == 0).all()
    with cache.create(tmp_path, IDENTITY, "head_and_tail=4").writer() as writer:
        rows.write(writer, slice(4, 6))
    assert by_row(read(tmp_path, rows)) == by_row(read(make_cache(tmp_path / "whole", rows), rows))


def test_rows_with_other_tokens_under_their_key_are_refused(tmp_path):
    rows = Rows(3)
    reader = cache.open(make_cache(tmp_path, rows), expecting=IDENTITY)
    with pytest.raises(DataError, match=f"row {int(rows.keys_B[0])} was made from other tokens"):
        reader.targets(rows.keys_B, rows.input_ids_BT.roll(1, dims=0))
    with pytest.raises(DataError, match=f"its rows have {LENGTH} tokens, these {LENGTH - 1}"):
        reader.targets(rows.keys_B, rows.input_ids_BT[:, 1:])


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("tokenizer", "tokenizer-b"),
        ("vocabulary", 51),
        ("sequence_length", 13),
        ("temperature", 2.0),
        ("data", "data-b"),
        ("teacher", "b"),
    ],
)
def test_a_cache_of_something_else_is_refused_naming_field_and_values(tmp_path, field, other):
    assert {field.name for field in fields(cache.Identity)} == set(IDENTITY.__dict__)
    make_cache(tmp_path, Rows(1))
    expected = rf"{field} is {getattr(IDENTITY, field)} in the cache, {other} in this run"
    with pytest.raises(DataError, match=expected):
        cache.open(tmp_path, expecting=replace(IDENTITY, **{field: other}))
    with pytest.raises(DataError, match=expected):
        cache.create(tmp_path, replace(IDENTITY, **{field: other}), "head_and_tail=4")
    cache.open(tmp_path, expecting=replace(IDENTITY, **{field: None}))


def test_a_cache_has_one_codec_and_one_seed_and_may_get_more_data(tmp_path):
    make_cache(tmp_path, Rows(1))
    with pytest.raises(DataError, match="codec is head_and_tail=4 in the cache, rs_kd=4 in this run"):
        cache.create(tmp_path, IDENTITY, "rs_kd=4")
    with pytest.raises(DataError, match="seed is 0 in the cache, 1 in this run"):
        cache.create(tmp_path, IDENTITY, "head_and_tail=4", seed=1)
    with pytest.raises(ConfigError, match="top_k=51 is more than the vocabulary of 50"):
        cache.create(tmp_path / "other", IDENTITY, "top_k=51")
    more = replace(IDENTITY, data="data-b")
    cache.create(tmp_path, more, "head_and_tail=4", more_data=True)
    for identity in (IDENTITY, more):
        assert len(cache.open(tmp_path, expecting=identity)) == 1


def test_a_shard_of_another_cache_is_refused(tmp_path):
    make_cache(tmp_path / "a", Rows(2))
    with cache.create(tmp_path / "b", replace(IDENTITY, teacher="b"), "head_and_tail=4").writer("other") as writer:
        Rows(2).write(writer)
    (tmp_path / "b" / "other.00000.bin").rename(tmp_path / "a" / "other.00000.bin")
    with pytest.raises(DataError, match=r"other.00000.bin: a shard of another cache"):
        cache.open(tmp_path / "a", expecting=IDENTITY)


def unsealed(folder: Path, rows: Rows) -> Path:
    """A shard as a killed writer leaves it."""
    writer = cache.create(folder, IDENTITY, "head_and_tail=4").writer()
    rows.write(writer)
    writer.__exit__(KeyboardInterrupt, None, None)
    return folder / "rank0.00000.part"


@pytest.mark.parametrize("sealed", [True, False])
def test_a_flipped_byte_anywhere_is_reported_and_never_read(tmp_path, sealed):
    rows = Rows(3)
    path = make_cache(tmp_path, rows) / "rank0.00000.bin" if sealed else unsealed(tmp_path, rows)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            # Every row is read; what only the digest covers is found by verify.
            read(tmp_path, rows)
            faults = verify(tmp_path).faults
            raise DataError(faults[0]) if faults else AssertionError(f"byte {place} was changed and nobody saw it")
    path.write_bytes(content)
    read(tmp_path, rows)


def test_a_changed_cache_json_is_reported(tmp_path):
    make_cache(tmp_path, Rows(1))
    path = tmp_path / "cache.json"
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        if damaged.split() != content.split():
            with pytest.raises(DataError, match=r"cache\.json is damaged|cache\.json: schema"):
                cache.open(tmp_path, expecting=IDENTITY)
    path.unlink()
    with pytest.raises(DataError, match=r"no cache\.json in it"):
        cache.open(tmp_path, expecting=IDENTITY)


def test_a_file_cut_at_any_byte_keeps_its_whole_records_and_the_next_writer_goes_on(tmp_path):
    rows = Rows(4)
    path = unsealed(tmp_path, rows)
    content, expected = path.read_bytes(), by_row(read(tmp_path, rows))
    counts = set()
    for size in (*range(0, len(content), 5), len(content)):
        path.write_bytes(content[:size])
        reader = cache.open(tmp_path, expecting=IDENTITY)
        missing = reader.missing(rows.keys_B)
        counts.add(len(reader))
        kept = [row for row in range(4) if not missing[row]]
        assert by_row(read(tmp_path, rows, kept)) == [expected[row] for row in kept]
    assert counts == {0, 1, 2, 3, 4}
    path.write_bytes(content[:-7])
    with cache.create(tmp_path, IDENTITY, "head_and_tail=4").writer() as writer:
        rows.write(writer, slice(3, 4))
    assert [path.name for path in shards_of(tmp_path)] == ["rank0.00000.bin"]
    assert by_row(read(tmp_path, rows)) == expected and verify(tmp_path).faults == []
    sealed = shards_of(tmp_path)[0]
    sealed.write_bytes(sealed.read_bytes()[:-1])
    with pytest.raises(DataError, match="was cut short, or its end is damaged"):
        cache.open(tmp_path, expecting=IDENTITY)


def test_zeros_after_a_power_cut_are_cut_off_and_anything_else_is_damage(tmp_path):
    rows = Rows(2)
    path = unsealed(tmp_path, rows)
    content = path.read_bytes()
    path.write_bytes(content + bytes(4096))
    assert len(cache.open(tmp_path, expecting=IDENTITY)) == 2
    path.write_bytes(content + bytes(range(100, 200)))
    with pytest.raises(DataError, match=rf"damaged at byte {len(content):,}: a record fails its checksum; delete that"):
        cache.open(tmp_path, expecting=IDENTITY)
    with pytest.raises(DataError, match="damaged at byte"):
        cache.create(tmp_path, IDENTITY, "head_and_tail=4").writer()


def test_two_writers_of_one_name_are_refused_and_of_two_names_are_not(tmp_path):
    opened = cache.create(tmp_path, IDENTITY, "head_and_tail=4")
    with opened.writer("rank0"), opened.writer("rank1"):
        with pytest.raises(EnvironmentFault, match=r"another process is writing as 'rank0' \(it holds rank0\.lock\)"):
            opened.writer("rank0")
        with pytest.raises(ConfigError, match=r"writer 'a\.b': must be letters"):
            opened.writer("a.b")
    assert shards_of(tmp_path) == []  # nothing was written
    opened.writer("rank0").close()


def test_what_a_teacher_gets_wrong_does_not_reach_the_disk(tmp_path):
    rows = Rows(3)
    rows.logits_TV[LENGTH + 2, 0] = torch.nan
    with cache.create(tmp_path, IDENTITY, "head_and_tail=4").writer() as writer:
        with pytest.raises(NumericalError, match=rf"row 1 \(key {int(rows.keys_B[1])}\).*token 2 "):
            rows.write(writer)
        rows.write(writer, slice(0, 1))
    assert cache.open(tmp_path, expecting=IDENTITY).keys_N.tolist() == [int(rows.keys_B[0])]


def test_prefetched_targets_are_the_same(tmp_path):
    rows = Rows(8)
    folder = make_cache(tmp_path, rows)
    reader = cache.open(folder, expecting=IDENTITY)
    steps = [slice(0, 4), slice(4, 8), slice(2, 6)]
    for step in steps:
        reader.prefetch(rows.keys_B[step], rows.input_ids_BT[step])
    for step in steps:
        got = reader.targets(rows.keys_B[step], rows.input_ids_BT[step])
        assert by_row(got) == by_row(read(folder, rows))[step]
    reader.prefetch(rows.keys_B, rows.input_ids_BT.flip(0))
    with pytest.raises(DataError, match="was made from other tokens"):
        reader.targets(rows.keys_B, rows.input_ids_BT.flip(0))
    reader.close()


WRITES = """
import resource, sys
from pathlib import Path
from teachers import cache
from herd.run.errors import EnvironmentFault
from tests.teachers.samples import IDENTITY, Rows
rows, limit = Rows(200), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
writer = cache.create(Path(sys.argv[1]), IDENTITY, "head_and_tail=4").writer()
for row in range(200):
    try:
        rows.write(writer, slice(row, row + 1))
    except EnvironmentFault as fault:
        sys.exit(str(fault))
    print(row, flush=True)
"""


def start(folder: Path, *, limit: int = 0) -> subprocess.Popen:
    """A process that writes 200 rows one by one and says which it has written."""
    command = [sys.executable, "-c", WRITES, str(folder), str(limit)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_full_disk_is_one_line_and_leaves_whole_rows(tmp_path):
    process = start(tmp_path, limit=5000)
    out, line = process.communicate()
    written, rows = len(out.splitlines()), Rows(200)
    assert process.returncode == 1 and line.decode().startswith(f"cannot write {tmp_path}")
    assert "the file-size limit is reached" in line.decode()
    reader = cache.open(tmp_path, expecting=IDENTITY)
    assert (~reader.missing(rows.keys_B)).sum() == len(reader) == written > 5
    assert by_row(read(tmp_path, rows, list(range(written)))) == by_row(
        read(make_cache(tmp_path / "whole", rows), rows, list(range(written)))
    )


def test_rows_reported_before_a_kill_are_there_and_the_rest_can_be_added(tmp_path):
    rows = Rows(200)
    process = start(tmp_path)
    reported = [int(process.stdout.readline()) for _ in range(60)]
    process.send_signal(signal.SIGKILL)
    reported += [int(line) for line in process.communicate()[0].splitlines()]
    reader = cache.open(tmp_path, expecting=IDENTITY)
    missing = reader.missing(rows.keys_B)
    assert process.returncode == -signal.SIGKILL and 60 <= len(reported) < 200
    assert not missing[reported].any() and len(reader) <= len(reported) + 1
    with cache.create(tmp_path, IDENTITY, "head_and_tail=4").writer() as writer:
        rows.write(writer, slice(int((~missing).sum()), None))
    assert by_row(read(tmp_path, rows)) == by_row(read(make_cache(tmp_path / "whole", rows), rows))
    assert verify(tmp_path).faults == []


def test_the_vocabulary_of_the_teacher_is_that_of_the_cache(tmp_path):
    rows = Rows(2)
    rows.logits_TV = rows.logits_TV[:, :-1]
    targets = DenseTargets(rows.logits_TV)
    with (
        cache.create(tmp_path, IDENTITY, "head_and_tail=4").writer() as writer,
        pytest.raises(DataError, match=f"logits of {VOCABULARY - 1} classes, the cache is of {VOCABULARY}"),
    ):
        writer.append(targets, rows.keys_B, rows.input_ids_BT, rows.labels_BT, step=0)
