"""Matrix products of bf16 tensors on CPUs that have no instruction for them: multiplied in fp32, rounded once.

    install()       # before a model is used; nothing happens where the CPU has them

Without AVX-512 torch multiplies bf16 in a plain loop, 6 to 50 times slower than fp32. This is what a bf16 unit does
(exact products, sums in fp32, one rounding) at the speed of fp32. Shapes: M rows, K summed, N columns, B batches.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import Any

import torch

BLOCK = 1 << 24
"""Elements of a matrix that exist in fp32 at one time: 64 MB, whatever the size of the weights."""
TALL = 4096
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def are_slow() -> bool:
    """Whether torch multiplies bf16 on this CPU in a plain loop."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def install() -> torch.library.Library | None:
    """Put these products in the place of torch's, once a process; None where torch's own are fast."""
    return replace() if are_slow() else None


def replace() -> torch.library.Library:
    """Do it in any case, for as long as the library that is returned lives. Other types and CUDA stay as they are."""
    library = torch.library.Library("aten", "IMPL")
    kernels = {}
    for name in ("mm", "addmm", "bmm", "baddbmm"):
        kernels[name] = kernels[f"{name}.out"] = _matrices(torch.library.get_kernel(f"aten::{name}.out", "CPU"))
        if name.startswith(("add", "badd")):
            kernels[f"{name}_"] = _in_place(kernels[name])
    for name, rounded in ((ATTENTION, 1), (f"{ATTENTION}_backward", 3)):
        kernels[name] = _attention(torch.library.get_kernel(f"aten::{name}", "CPU"), rounded)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*previously registered kernel")  # that is the purpose
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", with_keyset=True)
    return library


def _matrices(own: Any) -> Callable[..., torch.Tensor]:
    """mm, addmm, bmm and baddbmm, with and without `out`; `own` is torch's kernel, which writes into `out`."""

    def multiply(keys: Any, *terms: torch.Tensor, out: torch.Tensor | None = None, **scales: Any) -> torch.Tensor:
        *added, left, right = terms
        shape = (*left.shape[:-1], right.shape[-1])
        if out is None:
            out = left.new_empty(shape)
        if any(term.dtype != torch.bfloat16 for term in (*terms, out)) or out.shape != shape or _is_dots(left, right):
            return own.call_boxed(keys, *terms, out=out, **scales)
        added = [term.expand(shape) for term in added]
        for place in _blocks(left, right):
            *batches, rows, columns = place
            parts = [*(term[place] for term in added), left[(*batches, rows)], right[(*batches, slice(None), columns)]]
            exact = torch.empty(out[place].shape, dtype=torch.float32)
            own.call_boxed(keys, *(part.float() for part in parts), out=exact, **scales)
            out[place] = exact
        return out

    return multiply


def _in_place(multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda keys, added, *factors, **scales: multiply(keys, added, *factors, out=added, **scales)


def _is_dots(left: torch.Tensor, right: torch.Tensor) -> bool:
    """One row times a transposed matrix: dot products, which torch has in bf16, and no weight is copied for them."""
    return left.dim() == 2 and len(left) == 1 and right.stride(0) == 1


def _blocks(left: torch.Tensor, right: torch.Tensor) -> Iterator[tuple[slice, ...]]:
    """Places of the result [(B) M N] whose factors and values are at most about BLOCK elements each."""
    extents, inner = (*left.shape[:-1], right.shape[-1]), max(left.shape[-1], 1)
    tall = max(1, min(extents[-2], TALL, BLOCK // inner))
    wide = max(1, min(extents[-1], BLOCK // tall, BLOCK // inner))
    deep = max(1, BLOCK // (inner * (tall + wide) + tall * wide))
    sizes = (deep, tall, wide)[-len(extents) :]
    starts = (range(0, extent, size) for extent, size in zip(extents, sizes, strict=True))
    return product(*([slice(s, s + size) for s in own] for own, size in zip(starts, sizes, strict=True)))


def _attention(own: Any, rounded: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Attention or its backward; the first `rounded` of its results are in the type of what it is given."""

    def attend(keys: Any, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        if arguments[0].dtype != torch.bfloat16:
            return own.call_boxed(keys, *arguments, **options)
        results = own.call_boxed(keys, *map(_exact, arguments), **{key: _exact(one) for key, one in options.items()})
        return tuple(one.bfloat16() if place < rounded else one for place, one in enumerate(results))

    return attend


def _exact(argument: Any) -> Any:
    is_bf16 = isinstance(argument, torch.Tensor) and argument.dtype == torch.bfloat16
    return argument.float() if is_bf16 else argument
