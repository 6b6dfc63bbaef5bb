"""GPTQ whose gate and up projections are then refined by what their errors do behind the activation.

    method = GatedGptq();  codes_ENK, parameters = method.round(weight_ENK, grid, hessian_EKK)
    codes_ENK, parameters = method.refine(weight_ENK, codes_ENK, parameters, grid, hessian_EKK, samples)

A layer-wise error counts all tokens alike, but behind act(gate) up one of gate counts by up act'(gate), one of up by
act(gate): most tokens hardly matter to a given channel, which gets a Hessian of its own. E, N, K, G as in `method`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from quant.formats.grid import Grid, Parameters
from quant.methods.gptq import Gptq
from quant.methods.method import Sample
from quant.methods.objectives import Gated
from quant.methods.refinement import BLOCK, refine, take

CHUNK_BYTES = 1 << 27  # held for the rows refined at one time: Hessians within blocks of columns, and numbers of tokens
PER_TOKEN = 8


@dataclass(frozen=True)
class GatedGptq(Gptq):
    samples_inputs = True

    def refine(
        self,
        weight_ENK: Tensor,
        codes_ENK: Tensor,
        parameters: Parameters,
        grid: Grid,
        hessian_EKK: Tensor,
        samples: Iterable[Sample],
    ) -> tuple[Tensor, Parameters]:
        """Codes that `round` chose made better; samples: one a layer, made as they are asked for."""
        weight_ENK, codes_ENK, scale_ENG = weight_ENK.float(), codes_ENK.clone(), parameters.scale_NG.clone()
        for e, sample in enumerate(samples):
            input_nK = sample.input_nK.float()
            step = max(1, CHUNK_BYTES // (4 * (BLOCK * input_nK.shape[1] + PER_TOKEN * len(input_nK))))
            for start in range(0, weight_ENK.shape[1], step):
                rows = slice(start, start + step)
                at = (slice(e, e + 1), rows)
                objective = Gated(input_nK, sample.slopes(rows).square(), hessian_EKK[e])
                codes_ENK[at], found = refine(
                    weight_ENK[at], codes_ENK[at], take(parameters, *at), objective, grid, rounds=self.rounds
                )
                scale_ENG[at] = found.scale_NG
        return codes_ENK, Parameters(scale_ENG, parameters.zero_NG)
