"""The journal between a run and MLflow: nothing appended is lost, whoever appends, reads or dies."""

import subprocess
import sys
import threading

from herd.run.tracking_journal import Journal

WRITER = """
import sys; from pathlib import Path; from herd.run.tracking_journal import Journal
journal = Journal(Path(sys.argv[1]))
for number in range(400): journal.append({"do": "metrics", "from": sys.argv[2], "number": number})
"""


def test_every_event_of_parallel_writers_is_read_once_and_in_order_while_the_file_comes_and_goes(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)]) for i in range(2)]
    journal = Journal(tmp_path)
    thread = threading.Thread(
        target=lambda: [journal.append({"do": "metrics", "from": "here", "number": n}) for n in range(400)]
    )
    thread.start()
    seen, offset, name, removals = [], 0, None, 0
    while True:
        alive = thread.is_alive() or any(writer.poll() is None for writer in writers)
        if (found := journal.name()) is None:
            if not alive:
                break
            continue
        name, offset = found, offset if found == name else 0
        for end, event in journal.events(offset):
            seen += [(event["from"], event["number"])] if event else []
            offset = end
        removals += journal.remove_if_read(offset)
    assert sorted(seen) == sorted((source, n) for source in ("0", "1", "here") for n in range(400))
    for source in ("0", "1", "here"):
        assert [n for who, n in seen if who == source] == list(range(400))
    assert removals > 1


def test_a_line_torn_by_a_killed_writer_costs_only_itself(tmp_path, capsys):
    journal = Journal(tmp_path)
    journal.append({"do": "metrics", "number": 0})
    with journal.path.open("ab") as file:
        file.write(b'{"do": "metrics", "numb')
    assert [e["number"] for _, e in journal.events(0) if e] == [0]
    journal.append({"do": "metrics", "number": 1})
    assert [e["number"] for _, e in journal.events(0) if e] == [0, 1]
    *_, (end, _) = journal.events(0)
    assert end == journal.path.stat().st_size
    assert journal.remove_if_read(end) and not journal.path.exists()
    assert "torn line" in capsys.readouterr().err


def test_an_event_appended_behind_the_reader_keeps_the_file(tmp_path):
    journal = Journal(tmp_path)
    journal.append({"do": "metrics", "number": 0})
    *_, (end, _) = journal.events(0)
    journal.append({"do": "metrics", "number": 1})
    assert not journal.remove_if_read(end)
    assert [event["number"] for _, event in journal.events(end)] == [1]


def test_a_new_file_has_a_new_name_so_that_an_old_offset_is_not_applied_to_it(tmp_path):
    journal = Journal(tmp_path)
    journal.append({"do": "metrics"})
    first = journal.name()
    assert journal.remove_if_read(journal.path.stat().st_size)
    assert journal.name() is None
    journal.append({"do": "metrics"})
    assert journal.name() not in (None, first)


def test_values_json_does_not_know_survive_the_journal(tmp_path):
    journal = Journal(tmp_path)
    journal.append({"do": "metrics", "values": {"nan": float("nan"), "inf": float("inf")}, "path": tmp_path})
    (event,) = [event for _, event in journal.events(0) if event]
    assert event["values"]["nan"] != event["values"]["nan"]
    assert event["values"]["inf"] == float("inf")
    assert event["path"] == str(tmp_path)


def test_a_full_disk_costs_one_warning_and_no_exception(tmp_path, capsys):
    journal = Journal(tmp_path)
    journal.path.symlink_to("/dev/full")
    for _ in range(3):
        journal.append({"do": "metrics"})
    assert capsys.readouterr().err.count("warning:") == 1
