"""A made-up run folder with everything in it: curves like those of a real nano run, from a seeded generator.

folder = fabricate_run(tmp_path, steps=400)
"""

import json
from pathlib import Path

import numpy as np
import yaml

STEPS = 400
TOKENS = 2048
FLOORS = {"teacher": 4.0, "scout": 4.28, "maverick": 4.36}
MLFLOW = {"uri": "sqlite:///mlruns/mlflow.db", "experiment": "herd", "runs": {"main": "0f3e", "student/scout": "77aa"}}
EXPERTS = {"teacher": (3, 16), "scout": (5, 16), "maverick": (3, 128)}


def fabricate_run(folder: Path, *, steps: int = STEPS, logged_until: int | None = None, seed: int = 0) -> Path:
    """Write config.yaml, metrics.jsonl, evals.json, mlflow.json and run.json of a plausible run into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(steps), sort_keys=False))
    generator = np.random.default_rng(seed)
    lines = [json.dumps(_step(step, steps, generator)) for step in range(1, (logged_until or steps) + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "evals.json").write_text(json.dumps({"entries": entries()}, indent=2))
    (folder / "mlflow.json").write_text(json.dumps(MLFLOW))
    (folder / "run.json").write_text(json.dumps(_facts()))
    return folder


def _config(steps: int) -> dict:
    return {
        "run": {"name": "nano", "seed": 0, "steps": steps, "precision": "bf16"},
        "data": {"source": "stdlib", "sequence_length": 256},
        "batch": {"rows": 8},
        "teacher": {"mode": "codistill", "source": "behemoth-nano"},
        "students": {
            "scout": {"source": "scout-nano", "quantize": ["int4", "fp8"]},
            "maverick": {"source": "maverick-nano", "quantize": ["int4"]},
        },
        "loss": {"weighting": {"kind": "lead", "peak": 0.9}},
    }


def _loss(step: int, floor: float) -> float:
    return floor + 4.2 * np.exp(-step / 18) + 2.1 / (1 + step / 45)


def _step(step: int, steps: int, generator: np.random.Generator) -> dict:
    row = {"step": step, "tokens": step * TOKENS, "elapsed_s": 1.37 * step, "lr": 2e-3}
    row["tokens_per_s"] = 1490 + 60 * generator.standard_normal() - (500 if step % 100 == 0 else 0)
    difficulty = 0.12 * generator.standard_normal()
    losses = {name: _loss(step, floor) + difficulty for name, floor in FLOORS.items()}
    row |= {"teacher/ce": losses["teacher"], "teacher/grad_norm": 1.0, "time/teacher_s": 0.52}
    row |= {"time/scout_s": 0.33, "time/maverick_s": 0.38}
    for name in ("scout", "maverick"):
        lead = losses[name] - losses["teacher"] + 0.03 * generator.standard_normal() - 0.3 * np.exp(-step / 60)
        alpha = 0.9 / (1 + np.exp(-(lead - 0.12) / 0.035))
        histogram = np.histogram(np.clip(generator.normal(alpha, 0.12, 2000), 0, 1), bins=10, range=(0, 1))[0] / 2000
        row |= {
            f"student/{name}/loss": losses[name],
            f"student/{name}/ce": losses[name],
            f"student/{name}/alpha": float(alpha),
            f"student/{name}/alpha_histogram": histogram.tolist(),
            f"student/{name}/gap": float(lead),
        }
    for name, (layers, experts) in EXPERTS.items():
        row |= _experts(name, layers, experts, step / steps, generator)
    if step % 50 == 0 or step == steps:
        row |= {f"heldout/{name}": _loss(step, floor) + 0.06 for name, floor in FLOORS.items()}
    return row


def _experts(name: str, layers: int, experts: int, progress: float, generator: np.random.Generator) -> dict:
    fixed = np.random.default_rng(layers * experts).standard_normal((layers, experts))
    weight = np.exp((1.6 * np.exp(-3 * progress) + 0.35) * fixed + 0.1 * generator.standard_normal((layers, experts)))
    share = weight / weight.sum(axis=1, keepdims=True)
    share[share * experts < 0.12] = 0
    share /= share.sum(axis=1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1).mean() / np.log(experts)
    return {
        f"experts/{name}/load": np.round(share, 5).tolist(),
        f"experts/{name}/entropy": float(entropy),
        f"experts/{name}/max_share": float(share.max()),
        f"experts/{name}/dead": int((share == 0).sum()),
    }


def entries() -> list[dict]:
    """The evaluations of the made-up run: teacher, two students, three exports, one control."""
    made = [
        _entry("teacher", "teacher", None, 15.1e6, 4.331, 30.2e6, None),
        _entry("scout", "student", None, 4.81e6, 4.607, 9.63e6, "teacher"),
        _entry("scout", "export", "int4", 4.81e6, 4.6192, 4.02e6, "scout"),
        _entry("scout", "export", "fp8", 4.81e6, 4.6081, 5.71e6, "scout"),
        _entry("maverick", "student", None, 9.12e6, 4.684, 18.3e6, "teacher"),
        _entry("maverick", "export", "int4", 9.12e6, 4.7013, 6.9e6, "maverick"),
    ]
    return [*made, {"name": "scout", "role": "control", "scheme": None, "path": "runs/alone", "heldout_nats": 4.733}]


def _entry(
    name: str, role: str, scheme: str | None, parameters: float, loss: float, size: float, reference: str | None
) -> dict:
    kl = {None: 0.31, "int4": 0.0123456, "fp8": 0.00087}[scheme]
    return {
        "name": name,
        "role": role,
        "scheme": scheme,
        "path": f"runs/nano/{role}s/{name}{f'-{scheme}' if scheme else ''}",
        "data": "stdlib",
        "rows": 64,
        "tokens": 16384,
        "documents": 41,
        "parameters": int(parameters),
        "heldout_nats": loss,
        "heldout_ci95": [loss - 0.083, loss + 0.079],
        "bits_per_byte": loss * 0.4312,
        "bits_per_byte_ci95": [loss * 0.4312 - 0.031, loss * 0.4312 + 0.03],
        "reference": reference,
        "kl_mean": kl if reference else None,
        "kl_p99": 7.3 * kl if reference else None,
        "top1_agreement": 1 - kl / 2 if reference else None,
        "bytes_on_disk": int(size),
        "bits_per_weight": 8 * size / parameters,
        "peak_memory_bytes": int(2.6 * size),
        "decode_tokens_per_s": 4.4e8 / parameters,
    }


def _facts() -> dict:
    return {
        "commands": [
            "deepspeed --num_accelerators 2 --module distill --config configs/nano.yaml",
            "python -m herd.report runs/nano",
        ],
        "git_commit": "3f1c2ab9d0",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"},
        "world_size": 2,
        "started": "2026-11-23T22:01:07Z",
        "trained": "2026-11-23T22:08:12Z",
        "finished": "2026-11-23T22:10:41Z",
    }
