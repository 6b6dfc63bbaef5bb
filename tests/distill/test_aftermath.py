"""What follows training: an export is made once for its settings, and again when they or its student change."""

import json

from distill import aftermath, run_record
from herd.run import config as configuration
from herd.run.tracking import open_tracker
from quant.gate_process import GateProcess
from tests.quant.tiny_models import build_llama


def test_an_export_is_made_again_only_when_its_settings_or_its_student_changed(tmp_path, capsys):
    build_llama().save_pretrained(tmp_path / "students" / "scout")
    run_record.begin(tmp_path, "distill")
    run_record.mark(tmp_path, "trained")
    config = configuration.load("configs/smoke.yaml")
    tracker = open_tracker(tmp_path, experiment="t", run_name="t", enabled=False)

    def made(**changes) -> tuple[int, int]:
        """The group size it has now, and when its files were written."""
        settings = config.students["scout"].quantize[0].model_copy(update=changes)
        folder = aftermath.compress(config, tmp_path, "scout", settings, tracker, gate)
        section = json.loads((folder / "config.json").read_text())["quantization_config"]
        return section["config_groups"]["group_0"]["weights"]["group_size"], (folder / "gate.json").stat().st_mtime_ns

    with GateProcess() as gate:
        first = made(group_size=32)
        assert made(group_size=32) == first
        second = made(group_size="channel")
        assert (first[0], second[0]) == (
            32,
            None,
        ) and "scout-int4: its settings or its student changed" in capsys.readouterr().out
        record = run_record.read(tmp_path)
        (tmp_path / run_record.FILE).write_text(json.dumps(record | {"trained": "later"}))
        assert made(group_size="channel")[1] > second[1]
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"scout-int4"}
