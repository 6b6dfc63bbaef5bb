"""Writes a quantised model as a complete Hugging Face folder, or not at all: temporary folder, gate, rename.

    report = export(quantized, "exports/scout-int4", tokenizer=tokenizer, lineage={"student": "scout", ...})

Deterministic: the same model gives the same bytes in every file but lineage.json, which holds the time.
"""

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from herd.run.errors import DataError
from herd.run.files import disk_faults, fresh_folder, replace_folder, require_space
from herd.run.lineage import model_card, write_lineage
from quant.architectures import LLAMA4, architecture, bf16_bytes
from quant.checks import LAYERWISE
from quant.file_checks import check_tokenizer
from quant.gate_process import GateProcess
from quant.memory import WHOLE_SHARE, fits
from quant.plans import Plan
from quant.probes import Probe, take_probe
from quant.quantized import QuantizedModel
from quant.readers import GGUF, limit
from quant.reports import Report
from quant.sections import section
from quant.shards import SHARD_BYTES, write_shards
from quant.sources import read_config
from quant.streaming import stream_probe
from quant.target import REPORT, can_go_on, check_target, making, unfinished
from quant.tensor_files import TensorFiles

COVERAGE = "calibration.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json",
)  # fmt: skip
SIDE_FILES_BYTES = 64 * 10**6  # tokenizer, card and reports, generously


def export(
    quantized: QuantizedModel,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    lineage: Mapping[str, Any] | None = None,
    gate: GateProcess | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Write the folder and return the gate's report, which is also its gate.json.

    tokenizer: saved with the model; a model quantised from a folder takes the folder's tokenizer files without it.
    lineage: facts for lineage.json and the model card (student, teacher, data_fingerprint, run_id, licence, ...).
    gate: a process that gates several exports (its imports cost seconds); by default one is started for this export.
    ConfigError when the folder exists or another command is making it, EnvironmentFault when the disk has no room,
    DataError when the gate refuses; in all cases nothing is left at `path`. Layers that a calibrated method has
    finished are left beside it (`quant.target.finished_layers`) unless the gate refuses: the same call goes on from
    them.
    """
    final = Path(path).absolute()
    check_target(final)
    needed = quantized.plan.bytes_after + quantized.scratch_bytes + SIDE_FILES_BYTES
    require_space(final, needed, what=f"the export {final.name}")
    with GateProcess() if gate is None else nullcontext(gate) as process, making(final):
        if final.exists():  # made by another command meanwhile
            shutil.rmtree(unfinished(final))
            check_target(final)
        temporary = fresh_folder(unfinished(final) / "export")
        try:
            with disk_faults(final):
                report = _write(quantized, temporary, process, tokenizer, lineage or {}, shard_bytes, final.name)
                replace_folder(temporary, final)
        except BaseException as error:
            keep = can_go_on(final) and not isinstance(error, DataError)
            shutil.rmtree(temporary if keep else unfinished(final), ignore_errors=True)
            raise
        shutil.rmtree(unfinished(final))
    return report


def _write(
    quantized: QuantizedModel,
    folder: Path,
    gate: GateProcess,
    tokenizer: PreTrainedTokenizerBase | None,
    lineage: Mapping[str, Any],
    shard_bytes: int,
    name: str,
) -> Report:
    plan = quantized.plan
    _write_tokenizer(quantized, folder, tokenizer)
    usable = check_tokenizer(folder, plan.config.get_text_config().vocab_size)
    if not usable.passed:  # said before hours of work
        raise DataError(f"{name}: {usable.detail}")
    _write_configs(quantized, folder)
    if plan.allocation.container == GGUF:
        digests, written = _write_gguf(quantized, folder, name), quantized
    else:
        digests = write_shards(folder, plan.headers(), quantized.tensors, shard_bytes=shard_bytes)
        # From a folder, tensors are made as they are written; the model is then filled with the written ones, whose
        # bytes the gate compares with the digests of those that were made.
        written = quantized if quantized.folder is None else replace(quantized, tensors=TensorFiles(folder))
    report = gate.inspect(folder, probe_of(written, digests))
    if not report.passed:
        raise DataError(f"export gate refused {name}: {report.reason}; nothing was written")
    (folder / REPORT).write_text(json.dumps(report.to_json(), indent=1, sort_keys=True) + "\n")
    origin = quantized.folder.resolve().name if quantized.folder else architecture(plan.config)
    facts = {"role": "export", "name": name, "scheme": plan.allocation.label, "base_model": origin} | dict(lineage)
    facts |= {"method": quantized.method, "checked": report.facts["checked"]}
    if quantized.coverage is not None:
        coverage = quantized.coverage()
        (folder / COVERAGE).write_text(json.dumps(coverage, indent=1) + "\n")
        facts["calibration"] = {"source": coverage["source"], **coverage["summary"]}
    write_lineage(folder, **facts)
    model_card(folder, card_facts(plan, facts))
    return report


def probe_of(quantized: QuantizedModel, digests: dict[str, str]) -> Probe:
    """What the export must compute, from the model at once or, where it is large, from one layer at a time."""
    if fits(bf16_bytes(quantized.plan.config)):
        return take_probe(quantized.model, digests)
    return stream_probe(quantized.plan, quantized.tensors, digests)


def _write_tokenizer(quantized: QuantizedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif quantized.folder is not None:
        for file in TOKENIZER_FILES:
            if (quantized.folder / file).is_file():
                shutil.copyfile(quantized.folder / file, folder / file)


def _write_gguf(quantized: QuantizedModel, folder: Path, name: str) -> dict[str, str]:
    """The one file of a GGUF export, with the tokenizer that lies in the folder; returns the tensors' digests."""
    from quant.gguf.reading import MODEL, entries_of
    from quant.gguf.writing import describe_model, write_gguf

    config = read_config(folder)
    values = describe_model(folder, config, name)
    return write_gguf(folder / MODEL, config, entries_of(config), values, quantized.tensors)


def _write_configs(quantized: QuantizedModel, folder: Path) -> None:
    plan = quantized.plan
    content = _public(plan.config.to_dict()) | {
        "dtype": "bfloat16",
        "quantization_config": section(plan.allocation, list(plan.ignored)),
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    generation = _public(quantized.generation)
    if architecture(plan.config) in LLAMA4:
        # vLLM takes this switch from here, and without it from the context length; transformers from config.json.
        tuning = plan.config.get_text_config().attn_temperature_tuning
        generation["attn_temperature_tuning"] = bool(tuning)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1, sort_keys=True) + "\n")


def _public(content: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a loader noted for itself, the path it read from for one."""
    return {key: value for key, value in content.items() if not key.startswith("_")}


def card_facts(plan: Plan, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card says about an export: the facts given, sizes, and why some layers are not quantised."""
    reasons: dict[str, list[str]] = {}
    for layer, reason in plan.ignored.items():
        reasons.setdefault(reason, []).append(layer)
    kept = "\n".join(f"- `{family(layers)}`: {reason}." for reason, layers in reasons.items())
    chosen = _CHOSEN.get(facts.get("method", "rtn"), _NEAREST)
    limits = "\n\n".join(dict.fromkeys(_LIMITS[scheme.name] for scheme in plan.allocation.schemes))
    limits = limits.replace(_NEAREST, chosen)
    checked = LAYERS_CHECKED if facts.get("checked") == LAYERWISE else ""
    limits = f"Left in bf16, with norms and embeddings:\n\n{kept}\n\n{limits}{unreadable(plan)}{checked}"
    sizes = {
        "bits per quantised weight": round(plan.bits_per_quantised_weight, 4),
        "bits per weight, everything counted": round(plan.bits_per_weight, 4),
        "tensor bytes before": plan.bytes_before,
        "tensor bytes after": plan.bytes_after,
        "quantised share of weights": round(plan.quantised_weights / plan.all_weights, 4),
    }
    known = {"architecture": architecture(plan.config), "parameters": plan.all_weights, "limits": limits}
    return known | dict(facts) | {"metrics": sizes | dict(facts.get("metrics") or {})}


LAYERS_CHECKED = (
    "\n\nThe export was read back layer by layer, through transformers' loader, and compared bit for bit: the model is "
    f"too large to be loaded whole for that (more than {WHOLE_SHARE:.2%} of the memory of the machine it was made on)."
)
_NEAREST = "Weights are rounded to nearest with a searched scale per group; no calibration data was used. "
_CHOSEN = {
    "hqq": "Scales (and zeros) were fitted by half-quadratic quantisation; no calibration data was used. ",
    "gptq": "Weights were rounded by GPTQ on calibration rows (calibration.json tells what every expert saw). ",
    "gptq-gated": "Weights were rounded by GPTQ on calibration rows (calibration.json tells what every expert saw), "
    "gate and up projections then refined by what their errors do behind the activation. ",
    "awq": "Channels were scaled by AWQ on calibration rows (calibration.json), the scales folded into norms, "
    "routers and up projections. ",
    "signround": "Rounding was learned on calibration rows (calibration.json tells what every expert saw). ",
}
_NEGATIVE = "Scales may be negative, which the format allows: a value is code times scale."
_TOKENS = (
    "Activations are rounded per token at run time. transformers with compressed-tensors 0.20 rounds a matrix of "
    "tokens, as in MoE layers, with one scale for all of them; `quant.load` gives every token its own, as servers do."
)
_LIMITS = {
    "int4": _NEAREST + _NEGATIVE,
    "int4-asym": _NEAREST + "transformers 5.23 with compressed-tensors 0.20 opens it with "
    "`quantization_config=CompressedTensorsConfig(dequantize=True)` only, as `quant.load` does.",
    "int8": _TOKENS,
    "int8-weights": _NEAREST,
    "fp8": _TOKENS,
    "fp8-static": "Activations are rounded with one calibrated scale a layer: inputs beyond what calibration saw clip.",
    "fp8-block": "Activations are rounded at run time, with one scale for each token and 128 channels.",
    "mxfp4": _NEAREST,
    "nvfp4": _NEAREST + "Layers that servers merge share their global scale, a power of two.",
    "nf4": "Every block of 64 weights is divided by its largest and rounded to the nearest of 16 normal quantiles.",
    "nf4-double": "As nf4, with the blocks' scales quantised to 8 bits.",
}


def unreadable(plan: Plan) -> str:
    """A sentence for every well-known reader that cannot take this export."""
    reasons = [
        (reader, limit(scheme.name, scheme.container, reader, moe=plan.has_experts))
        for reader in ("transformers", "vllm")
        for scheme in plan.allocation.schemes
    ]
    return "".join(f"\n\nNot for {reader}: {reason}." for reader, reason in dict.fromkeys(reasons) if reason)


def family(layers: list[str]) -> str:
    """`*.self_attn.q_proj` for the q_proj of every layer, `*.experts.*.up_proj` for every expert's."""
    if len(layers) == 1:
        return layers[0]
    patterns = {re.sub(r"\.\d+\.", ".*.", re.sub(r"^.*\.layers\.\d+\.", "*.", layer)) for layer in layers}
    return ", ".join(sorted(patterns))
