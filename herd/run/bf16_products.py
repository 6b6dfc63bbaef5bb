"""Matrix products of bf16 tensors on CPUs that have no instruction for them: multiplied in fp32, rounded once.

    install()       # before a model is used; nothing happens where the CPU has them
    python -m herd.run.bf16_products        only compile them (set-up does)

Without AVX-512 torch multiplies bf16 in plain loops, up to 78 times slower. bf16_products.cpp does what a bf16 unit
does (exact products, sums in fp32, one rounding) at the speed of fp32, for whatever code multiplies.
"""

import sys
from functools import cache

import torch

from herd.run import cli, extensions


def are_slow() -> bool:
    """Whether torch multiplies bf16 on this CPU in plain loops."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def install() -> None:
    """Put these products in the place of torch's where those are slow; compiled first if set-up has not.

    Tensors of other types and of other devices go to torch's kernels as before. Raises EnvironmentFault when the
    products cannot be compiled.
    """
    if are_slow():
        replace(True)


def replace(on: bool) -> None:
    """Do it on any CPU, or give torch its own back; for comparisons."""
    torch.ops.load_library(str(extensions.compiled("bf16_products")))
    torch.ops.herd_bf16_products.replace(on)


if __name__ == "__main__":
    sys.exit(cli.main_guard(install))
