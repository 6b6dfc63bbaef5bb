"""Quality, time and memory of this package and its peers on the same model, rows and layers, each in its environment.

    python benchmarks/quantisation.py --setup                     environments in .cache/peers-quant, once (needs PyPI)
    python benchmarks/quantisation.py [--model DIR ..] [--only ours hqq] [--repeats 3]    what is done is not done again

A worker of `peers_quant/` leaves dequantised bf16 weights, `judge` scores all alike. Writes results/quantisation.json
and docs/img/quantisation.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from peers_quant.figure import draw
from peers_quant.judge import Bench, compare, compare_codes

from herd.run.files import write_atomic
from herd.run.lineage import read_lineage
from herd.run.schema import Data
from quant.calibration.rows import calibration_rows

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "peers-quant"
ENVIRONMENTS = ROOT / ".cache" / "peers-quant"
RESULTS = ROOT / "benchmarks" / "results" / "quantisation.json"
FIGURE = ROOT / "docs" / "img" / "quantisation.png"
MODEL = ROOT / "runs" / "quality" / "behemoth-1000" / "students" / "behemoth"
TRAINING = "python -m distill --config configs/experiments/teacher.yaml --set run.folder=runs/quality"
TORCH = "torch==2.13.0"

# What each environment holds besides torch. Those of llm-compressor and AutoRound exclude each other.
PACKAGES = {
    "llm-compressor": ("llmcompressor==0.14.0.1",),
    "bitsandbytes": ("bitsandbytes==0.50.2", "transformers==5.23.0"),
    "torchao": ("torchao==0.18.0", "transformers==5.23.0"),
    "auto-round": ("auto-round==0.16.1",),
    "hqq": ("hqq==0.2.8.post1",),
    "gptqmodel": ("gptqmodel==7.6.0",),
}


@dataclass(frozen=True)
class Row:
    """One line of the table. `peer` names an environment of PACKAGES, or this one; `group` shares one scale."""

    name: str
    peer: str
    script: str
    settings: dict[str, Any] = field(default_factory=dict)
    group: int | None = None

    @property
    def key(self) -> str:
        return self.name.replace(" ", "-").replace("/", "-")


def _ours(method: str, group: int, scheme: str = "int4") -> Row:
    name = f"ours {method} {scheme.removeprefix('int4-')} g{group}" if scheme != "int4" else f"ours {method} g{group}"
    return Row(name, "ours", "ours", {"scheme": scheme, "group_size": group, "method": method}, group)


def _llmc(method: str, group: int) -> Row:
    settings = {"scheme": "int4", "method": method, "weights": {"group_size": group}}
    return Row(f"llm-compressor {method} g{group}", "llm-compressor", "llm_compressor", settings, group)


def _torchao(algorithm: str, group: int) -> Row:
    settings = {"group_size": group, "algorithm": algorithm}
    return Row(f"torchao {algorithm} g{group}", "torchao", "torchao_int4", settings, group)


ROWS = (
    Row("Meta absmax/8 g128", "ours", "absmax8", {"group_size": 128}, 128),
    *(_ours(method, 128) for method in ("rtn", "hqq", "awq", "gptq", "gptq-gated", "signround")),
    _ours("gptq", 128, "int4-asym"),
    *(_ours(method, 64) for method in ("rtn", "gptq", "gptq-gated")),
    *(_llmc(method, 128) for method in ("rtn", "awq", "gptq")),
    *(_llmc(method, 64) for method in ("rtn", "gptq")),
    Row("bitsandbytes nf4", "bitsandbytes", "bitsandbytes_nf4", {"block": 64, "double": False}),
    Row("bitsandbytes nf4 double", "bitsandbytes", "bitsandbytes_nf4", {"block": 64, "double": True}),
    *(_torchao(algorithm, group) for algorithm in ("tinygemm", "hqq") for group in (128, 64)),
    Row("hqq g128", "hqq", "hqq_int4", {"group_size": 128}, 128),
    Row("hqq g64", "hqq", "hqq_int4", {"group_size": 64}, 64),
    Row("auto-round rtn g128", "auto-round", "auto_round_int4", {"group_size": 128, "iters": 0}, 128),
    Row("auto-round g128", "auto-round", "auto_round_int4", {"group_size": 128, "iters": 200}, 128),
    Row("auto-round g64", "auto-round", "auto_round_int4", {"group_size": 64, "iters": 200}, 64),
    Row("gptqmodel gptq g128", "gptqmodel", "gptqmodel_int4", {"group_size": 128}, 128),
    Row("gptqmodel mended gptq g128", "gptqmodel", "gptqmodel_int4", {"group_size": 128, "mend": True}, 128),
    Row("ours fp8", "ours", "ours", {"scheme": "fp8"}),
    Row("llm-compressor fp8", "llm-compressor", "llm_compressor", {"scheme": "fp8", "method": "rtn"}),
)


def set_up(peer: str) -> None:
    """Make one environment, unless it is there; torch goes first and alone, so that no package picks another build."""
    folder = ENVIRONMENTS / peer
    if (folder / "ready").exists():
        return
    print(f"{peer}: {' '.join(PACKAGES[peer])}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", TORCH]
    with (folder / "setup.log").open("w") as log:
        for packages in ((), ("numpy", "safetensors", *PACKAGES[peer])):
            done = subprocess.run([*pip, *packages], stdout=log, stderr=log, check=False)
    if done.returncode == 0:
        (folder / "ready").touch()
    else:
        print(f"{peer}: {last_error((folder / 'setup.log').read_text())}", file=sys.stderr)


def python_of(peer: str) -> Path:
    """The interpreter a peer runs in."""
    return Path(sys.executable) if peer == "ours" else ENVIRONMENTS / peer / "bin" / "python"


def label(model: Path) -> str:
    """A name of its own for every model: those of two runs may be called the same."""
    if model.name == "teacher":
        return f"{model.parent.name}/teacher"
    return f"{model.parents[1].name}/{model.name}" if model.parent.name == "students" else model.name


def prepare(model: Path, work: Path, rows: int) -> None:
    """The calibration rows of a model, from the part of its data that neither training nor evaluation reads."""
    if (work / "calibration.npy").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    drawn = calibration_rows(data_of(model), model, rows=rows)
    np.save(work / "calibration.npy", drawn.tokens_NT.long().numpy())


def data_of(model: Path) -> Data:
    """What the model was trained on; the embedded corpus when its lineage does not say."""
    known = read_lineage(model).get("data_config")
    return Data.model_validate(known) if known else Data()


def make(row: Row, model: Path, work: Path, repeat: int) -> None:
    """Run a worker once, unless it was; a failure leaves its last line and is not tried again."""
    folder = work / row.key
    target, failed = folder / f"made-{repeat}.json", folder / "failed.json"
    if target.exists() or failed.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not python_of(row.peer).exists():
        print(f"{row.name}: no environment; --setup makes it", file=sys.stderr)
        return
    script = Path(__file__).parent / "peers_quant" / f"{row.script}.py"
    command = [str(python_of(row.peer)), str(script), "--settings", json.dumps(row.settings)]
    for name, value in (("model", model), ("calibration", work / "calibration.npy"), ("out", folder)):
        command += [f"--{name}", str(value)]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT) if row.peer == "ours" else ""}
    print(f"{time.strftime('%H:%M:%S')} {row.name}", file=sys.stderr, flush=True)
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=os.environ | offline, stdout=log, stderr=log, check=False)
    if done.returncode == 0:
        (folder / "made.json").replace(target)
    else:
        write_atomic(failed, json.dumps({"error": last_error((folder / "log.txt").read_text(errors="replace"))}))


def last_error(log: str) -> str:
    """The line that names the error: the last one that looks like it, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line and not line.startswith(("File", "During"))]
    return (named or lines or ["no output"])[-1][:300]


def figures(row: Row, folder: Path) -> dict[str, Any]:
    """Medians over the repeats."""
    made = [json.loads(path.read_text()) for path in sorted(folder.glob("made-*.json"))]
    medians = {key: statistics.median(each[key] for each in made) for key in made[0] if key != "version"}
    return medians | {"version": made[0]["version"] if row.peer != "ours" else "", "repeats": len(made)}


def measure(model: Path, rows: list[Row], options: argparse.Namespace) -> dict[str, Any]:
    """All rows of one model."""
    work = WORK / label(model)
    prepare(model, work, options.calibration_rows)
    for repeat in range(options.repeats):  # in rounds: a change in the machine's load meets all rows alike
        for row in rows:
            make(row, model, work, repeat)
    bench = Bench(model, data_of(model), rows=options.rows)
    table: list[dict[str, Any]] = []
    for row in ROWS:
        folder = work / row.key
        entry = {"name": row.name, "peer": row.peer, "settings": row.settings}
        if (folder / "failed.json").exists():
            table.append(entry | json.loads((folder / "failed.json").read_text()))
        elif list(folder.glob("made-*.json")):
            table.append(entry | figures(row, folder) | bench.judge(folder, group=row.group))
    compare(table, bench, work, {row.name: row.key for row in ROWS})
    codes = [work / key / "codes.safetensors" for key in ("ours-fp8", "llm-compressor-fp8")]
    facts = {"fp8": compare_codes(*codes, bench.weights)} if all(path.exists() for path in codes) else {}
    tokens = np.load(work / "calibration.npy").shape
    return {
        "calibration": {"rows": tokens[0], "row_tokens": tokens[1]},
        "evaluation": bench.describe(),
        "reference": bench.reference(),
        **facts,
        "table": table,
    }


def selected(words: list[str]) -> list[Row]:
    """Rows whose name contains one of the words."""
    return [row for row in ROWS if any(word in row.name for word in words)]


def show_kl(entry: dict[str, Any], column: str) -> str:
    """A divergence, and its ratio to the baseline's, with their intervals; nothing where a dense model has none."""
    if column not in entry:
        return ""
    low, high = entry[f"{column}_ci95"]
    words = "  same routes " if column == "kl_same_routes" else ""
    words += f"{entry[column]:.5f} [{low:.5f}, {high:.5f}]"
    if f"{column}_ratio" in entry:
        low, high = entry[f"{column}_ratio_ci95"]
        words += f" x{entry[f'{column}_ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return words


def show(entry: dict[str, Any]) -> str:
    """A line of the printed table."""
    if "error" in entry:
        return f"{entry['name']:30s} {entry['error']}"
    return (
        f"{entry['name']:30s} {entry['bits']:6.3f} bits  KL {show_kl(entry, 'kl')}{show_kl(entry, 'kl_same_routes')}"
        f"  p99 {entry['kl_p99']:.4f}  top-1 {entry['top1_agreement']:.4f}  ppl {entry['perplexity']:.3f}"
        f"  {entry['cpu_seconds']:7.1f} s CPU  {entry['peak_rss'] / 2**20:.0f} MiB"
    )


def main() -> int:
    """Set up, or run and judge, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--setup", action="store_true", help="make the environments that are missing, and stop")
    add("--model", type=Path, nargs="+", default=[MODEL], help="trained bf16 folders with a tokenizer")
    add("--only", nargs="+", default=[""], metavar="WORD", help="only rows (with --setup: peers) whose name has a WORD")
    add("--repeats", type=int, default=1, help="runs of each worker, for the time (1)")
    add("--rows", type=int, default=128, help="held-out rows (128)")
    add("--calibration-rows", type=int, default=64, help="calibration rows (64)")
    options = parser.parse_args()
    if options.setup:
        for peer in PACKAGES:
            if any(word in peer for word in options.only):
                set_up(peer)
        return 0
    transformers.utils.logging.disable_progress_bar()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in options.model:
        if not model.is_dir():
            sys.exit(f"--model {model}: no such folder; the default comes from\n  {TRAINING}")
        name = label(model.resolve())
        results[name] = measure(model.resolve(), selected(options.only), options)
        print(f"{name}: KL, its ratio to ours gptq g128 (paired), 95 % over documents")
        print("\n".join(show(entry) for entry in results[name]["table"]))
    write_atomic(RESULTS, json.dumps(results, indent=1) + "\n")
    draw(results, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
