"""Masses rounded to whole units without bias and without changing their sum: systematic rounding.

units_CK = round_to_units(masses_CK, total=64, uniforms_C=u)        each mass goes up or down, rows sum to 64

Suffix legend: C tokens, K masses of each.
"""

import torch


def round_to_units(masses_CK: torch.Tensor, *, total: int, uniforms_C: torch.Tensor) -> torch.Tensor:
    """int64 units; E units_k = total * mass_k / sum of masses, each of them floor or ceil of that.

    One uniform number a token: units are differences of floor(running sum + u) (systematic sampling, Madow 1949).
    """
    running_CK = masses_CK.double().cumsum(-1)
    running_CK = running_CK * (total / running_CK[:, -1:])
    whole_CK = torch.floor(running_CK + uniforms_C[:, None]).long()
    whole_CK[:, -1] = total
    return whole_CK.diff(dim=-1, prepend=torch.zeros_like(whole_CK[:, :1]))
