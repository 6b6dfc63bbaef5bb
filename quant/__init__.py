"""Compression of trained models to Int4 and FP8 in the compressed-tensors format, with an export that is checked.

    quantized = quant.quantize(model, scheme="int4", group_size=64)     (a transformers model or a model folder)
    report = quant.export(quantized, "exports/scout-int4")
    model = quant.load("exports/scout-int4")

Names are resolved on first use, so that `python -m quant --help` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.exports import export
    from quant.quantized import QuantizedModel, quantize
    from quant.runtime.loading import load

__all__ = ["QuantizedModel", "export", "load", "quantize"]

_HOMES = {
    "QuantizedModel": "quant.quantized",
    "quantize": "quant.quantized",
    "export": "quant.exports",
    "load": "quant.runtime.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quant' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
