"""One evaluation of one model folder: score the rows, weigh the files, measure memory and speed.

    result = evaluate("runs/nano/exports/scout-int4", rows=rows, against="runs/nano/students/scout")

Legend: N rows, G documents, T tokens.
"""

import json
from contextlib import nullcontext
from math import log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evals.footprint import count_parameters, measure_disk
from evals.intervals import Groups, Interval, bootstrap_ratio, group_rows
from evals.loading import Loaded, load
from evals.probe import Probe
from evals.result import Result
from evals.rows import Rows
from evals.scores import Scores, score_rows
from herd.data.tokenizer import describe_difference
from herd.run.errors import ConfigError, DataError
from quant.readers import SCHEMES
from quant.sections import read_section


def evaluate(
    model_folder: str | Path,
    *,
    rows: Rows,
    against: str | Path | Loaded | None = None,
    micro_rows: int = 4,
    decode_tokens: int = 64,
    seed: int = 0,
    device: str = "cpu",
    probe: Probe | None = None,
) -> Result:
    """Evaluate a model folder on rows of its own tokenizer.

    `against`: the reference, a folder or one already loaded (pass that when several models share it). `seed` draws the
    bootstrap. `probe`: a running measuring process to share; by default one is started for this call.
    Raises ConfigError, DataError (not a model, truncated, tokenizers differ) or NumericalError (loss not finite).
    """
    model_folder = Path(model_folder)
    loaded = load(model_folder, device=device)
    reference = load(against, device=device) if isinstance(against, str | Path) else against
    if reference is not None:
        check_tokenizers(loaded, reference)
    check_tokens(loaded, rows)
    with Probe() if probe is None else nullcontext(probe) as measuring:
        scores = score_rows(
            loaded.model, rows, reference=None if reference is None else reference.model, micro_rows=micro_rows
        )
        name, lineage = loaded.name, loaded.lineage
        del loaded  # the probe loads the model again: do not hold it twice
        ids = rows.input_ids_NT[0].tolist()
        cost = measuring.measure(model_folder, ids, decode_tokens=decode_tokens, device=device)
    disk = measure_disk(model_folder)
    parameters = count_parameters(model_folder)
    groups = group_rows(rows.documents_N)
    return Result(
        name=name,
        role=lineage.get("role"),
        student=lineage.get("student"),
        scheme=read_scheme(model_folder),
        path=str(model_folder),
        data=rows.source,
        rows=len(rows),
        tokens=int(scores.tokens_N.sum()),
        documents=groups.count,
        **_losses(scores, rows.bytes_N, groups, seed=seed),
        reference=None if reference is None else reference.name,
        **_divergence(scores, groups, seed=seed),
        parameters=parameters,
        bytes_on_disk=disk.weight_files,
        folder_bytes=disk.folder,
        bits_per_weight=disk.bits_per_weight(parameters),
        quantised_bits_per_weight=disk.quantised_bits_per_weight(parameters),
        peak_memory_bytes=cost.peak_memory_bytes,
        decode_tokens_per_s=cost.decode_tokens_per_s,
    )


def check_tokenizers(model: Loaded, reference: Loaded) -> None:
    """Raise DataError that says what differs unless both read text the same way."""
    difference = describe_difference(model.tokenizer, reference.tokenizer)
    if difference is not None:
        raise DataError(
            f"tokenizers of {model.folder} and {reference.folder} differ: {difference}; "
            "compare models that share a tokenizer"
        )


def check_tokens(loaded: Loaded, rows: Rows) -> None:
    """Raise ConfigError if the rows hold ids the model has no embedding for: they are another tokenizer's."""
    largest = int(rows.input_ids_NT.max())
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    if largest >= vocabulary:
        raise ConfigError(
            f"rows hold token id {largest}, {loaded.folder} knows ids below {vocabulary}; tokenise with its tokenizer"
        )


def read_scheme(folder: str | Path) -> str | None:
    """`int4`, `fp8`, `nf4`, ... of a quantised folder, from its config.json; None for a plain one.

    By the names of `quant.readers.SCHEMES` for exports of this package (with the container, where it is not the usual
    one: `int4-gguf`), `mixed` for several at once, else by what the format's own fields say.
    """
    settings = json.loads((Path(folder) / "config.json").read_text()).get("quantization_config")
    if settings is None:
        return None
    allocation, _, _ = read_section(settings)
    if allocation is not None:
        usual = allocation.container == SCHEMES[allocation.schemes[0].name].containers[0]
        return allocation.name if usual else f"{allocation.name}-{allocation.container}"
    if settings["quant_method"] != "compressed-tensors":
        return settings.get("bnb_4bit_quant_type", settings["quant_method"])
    weights = next(iter(settings["config_groups"].values()))["weights"]
    return f"{'fp' if weights['type'] == 'float' else 'int'}{weights['num_bits']}"


def _losses(scores: Scores, bytes_N: NDArray[np.int64], groups: Groups, *, seed: int) -> dict[str, float | Interval]:
    nats_G = groups.sum(scores.nats_N)
    bits_G = nats_G / log(2)
    return {
        "heldout_nats": float(scores.nats_N.sum() / scores.tokens_N.sum()),
        "heldout_ci95": bootstrap_ratio(nats_G, groups.sum(scores.tokens_N), seed=seed),
        "bits_per_byte": float(bits_G.sum() / bytes_N.sum()),
        "bits_per_byte_ci95": bootstrap_ratio(bits_G, groups.sum(bytes_N), seed=seed),
    }


def _divergence(scores: Scores, groups: Groups, *, seed: int) -> dict[str, float | Interval | None]:
    divergence = scores.divergence
    if divergence is None:
        names = "reference_nats loss_difference loss_difference_ci95 kl_mean kl_mean_ci95 kl_p99"
        return dict.fromkeys((*names.split(), "top1_agreement", "top1_agreement_ci95"))
    tokens = scores.tokens_N.sum()
    tokens_G = groups.sum(scores.tokens_N)
    excess_N = scores.nats_N - divergence.nats_N
    return {
        "reference_nats": float(divergence.nats_N.sum() / tokens),
        "loss_difference": float(excess_N.sum() / tokens),
        "loss_difference_ci95": bootstrap_ratio(groups.sum(excess_N), tokens_G, seed=seed),
        "kl_mean": float(divergence.kl_N.sum() / tokens),
        "kl_mean_ci95": bootstrap_ratio(groups.sum(divergence.kl_N), tokens_G, seed=seed),
        "kl_p99": float(np.quantile(divergence.kl_M, 0.99)),
        "top1_agreement": float(divergence.agreed_N.sum() / tokens),
        "top1_agreement_ci95": bootstrap_ratio(groups.sum(divergence.agreed_N), tokens_G, seed=seed),
    }
