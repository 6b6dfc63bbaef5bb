"""What a plan comes to, in numbers and for people: layers, bytes, memory, time. No torch until it is called.

result = summary(plan) | foretell(options, plan, calibration)
print(describe(plan), describe_work(result))
"""

import argparse
from typing import TYPE_CHECKING, Any

from herd.run.files import size
from quant.options import memory_bytes, settings_of

if TYPE_CHECKING:
    from quant.calibration.settings import Calibration
    from quant.plans import Plan


def summary(plan: "Plan") -> dict[str, Any]:
    """The plan in numbers and names."""
    return {
        "scheme": plan.allocation.label,
        "quantised": [layer.name for layer in plan.layers],
        "kept": plan.ignored,
        "quantised_weights": plan.quantised_weights,
        "weights": plan.all_weights,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_quantised_weight": plan.bits_per_quantised_weight,
        "bits_per_weight": plan.bits_per_weight,
    }


def describe(plan: "Plan") -> str:
    """The plan for people: one line per kind of layer."""
    from quant.exports import family
    from quant.sections import format_name

    schemes = plan.allocation.schemes
    quantised: dict[tuple[tuple[int, int], str], list[str]] = {}
    for layer in plan.layers:
        quantised.setdefault((layer.shape, layer.scheme.label), []).append(layer.name)
    kept: dict[str, list[str]] = {}
    for name, reason in plan.ignored.items():
        kept.setdefault(reason, []).append(name)
    lines = [", ".join(f"{scheme.label} ({format_name(scheme)})" for scheme in schemes), "", "quantised"]
    lines += [
        f"  {len(names):5d} x {shape[0]} x {shape[1]}  {f'{label}  ' if len(schemes) > 1 else ''}{family(names)}"
        for (shape, label), names in quantised.items()
    ]
    lines += ["kept in bf16 (with norms and embeddings)"]
    lines += [f"  {len(names):5d}  {family(names)}: {reason}" for reason, names in kept.items()]
    share = plan.quantised_weights / plan.all_weights
    lines += [
        "",
        f"weights   {plan.all_weights:,}, {share:.1%} quantised",
        f"bytes     {plan.bytes_before:,} -> {plan.bytes_after:,} ({plan.bytes_after / plan.bytes_before:.3f})",
        f"bits      {plan.bits_per_quantised_weight:.3f} per quantised weight, {plan.bits_per_weight:.3f} over all",
    ]
    return "\n".join(lines)


def foretell(options: argparse.Namespace, plan: "Plan", calibration: "Calibration | None") -> dict[str, Any]:
    """Method, memory and time."""
    from quant.calibration.estimate import foresee
    from quant.methods.choice import make_method

    rows = row_tokens = counting = 0
    if calibration is not None:
        drawn, row_tokens = calibration.rows.tokens_NT.shape
        rows = min(drawn, settings_of(options).rows)
        counting = drawn if plan.has_experts and drawn > rows else 0
    estimate = foresee(
        plan,
        make_method(options.method),
        rows=rows,
        row_tokens=row_tokens,
        counting=counting,
        memory_bytes=memory_bytes(options),
    )
    return {
        "method": options.method,
        "calibration_rows": rows,
        "row_tokens": row_tokens,
        "estimated_peak_bytes": estimate.peak_bytes,
        "estimated_gate_bytes": estimate.gate_bytes,
        "checked": "whole" if estimate.whole else "layer by layer",
        "estimated_seconds": round(estimate.seconds, 1),
    }


def describe_work(result: dict[str, Any]) -> str:
    """What the method will take, for people."""
    rows = result["calibration_rows"]
    read = f", {rows} rows of {result['row_tokens']} tokens or more" if rows else ""
    return "\n".join([
        f"method    {result['method']}{read}",
        f"memory    about {size(result['estimated_peak_bytes'])} at most, and {size(result['estimated_gate_bytes'])} "
        f"in the gate's process, which checks {result['checked']}",
        f"time      about {result['estimated_seconds']:,.0f} s on this machine, without reading and checking",
    ])  # fmt: skip
