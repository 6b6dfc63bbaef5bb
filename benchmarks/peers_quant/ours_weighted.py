"""This package's GPTQ, gate and up then refined by what an error does behind the activation (an experiment).

An output channel's error in token t counts by the square of its slope there: up silu'(gate), or silu(gate). Every row
has a Hessian of its own, never formed: coordinate descent keeps the row's errors for all tokens. T tokens, N rows,
K columns, G groups of a row, B columns of a block.
"""

import ours
import torch
from torch import Tensor

from quant.calibration import walk
from quant.calibration.moments import Moments, watching
from quant.calibration.stages import input_key
from quant.formats.grid import Parameters

BLEND = 0.25  # share of the plain Hessian
ROUNDS = 3
BLOCK, CHUNK = 32, 32


class Weighted:
    """The objective of some rows: sum_t w_tn (e_n x_t)^2 / T + e_n P e_n^T + r_n |e_n|^2."""

    def __init__(self, x_TK: Tensor, w_TN: Tensor, plain_KK: Tensor, ridge_N: Tensor):
        self.x, self.w, self.plain, self.ridge = x_TK, w_TN / len(x_TK), plain_KK, ridge_N
        self.grams = {}

    def errors(self, error_NK):
        r_TN = self.x @ error_NK.T
        return (
            (self.w * r_TN.square()).sum(0)
            + ((error_NK @ self.plain) * error_NK).sum(1)
            + self.ridge * error_NK.square().sum(1)
        )

    def refit(self, weight_NK, codes_NK, scale_NG, grid):
        G = scale_NG.shape[1]
        q_NGS = codes_NK.float().unflatten(1, (G, -1))
        S = q_NGS.shape[2]
        part_TNG = torch.stack([self.x[:, g * S : (g + 1) * S] @ q_NGS[:, g].T for g in range(G)], 2)
        aim_TN = self.x @ weight_NK.T
        system = torch.einsum("tng,tnh,tn->ngh", part_TNG, part_TNG, self.w)
        wanted = torch.einsum("tng,tn,tn->ng", part_TNG, aim_TN, self.w)
        wp_NK = weight_NK @ self.plain + self.ridge[:, None] * weight_NK
        wanted += (wp_NK.unflatten(1, (G, -1)) * q_NGS).sum(-1)
        for g in range(G):
            qp = (q_NGS[:, g] @ self.plain[g * S : (g + 1) * S]).unflatten(1, (G, -1))
            qp[:, g] += self.ridge[:, None] * q_NGS[:, g]
            system[:, g] += (qp * q_NGS).sum(-1)
        d = system.diagonal(dim1=1, dim2=2).mean(1)
        system += torch.diag_embed((1e-4 * d + torch.finfo(torch.float32).tiny)[:, None].expand(-1, G))
        missing = wanted - (system @ scale_NG.float()[..., None])[..., 0]
        change = torch.linalg.solve_ex(system, missing[..., None])[0][..., 0]
        found = grid.storable(torch.where(change.isfinite(), scale_NG.float() + change, scale_NG.float()))
        before = self.errors(weight_NK - grid.decode(codes_NK, Parameters(scale_NG)).float())
        after = self.errors(weight_NK - grid.decode(codes_NK, Parameters(found)).float())
        return torch.where((after < before)[:, None], found, scale_NG)

    def descend(self, weight_NK, codes_NK, scale_NG, grid, order_K):
        codes_NK = codes_NK.clone()
        K = weight_NK.shape[1]
        S = K // scale_NG.shape[1]
        error_NK = weight_NK - grid.decode(codes_NK, Parameters(scale_NG)).float()
        r_TN = self.x @ error_NK.T
        ep_NK = error_NK @ self.plain
        for index_B in order_K.split(BLOCK):
            x_TB = self.x[:, index_B]
            key = int(index_B[0])
            if key not in self.grams:
                left = (self.w.T[:, None, :] * x_TB.T[None]).flatten(0, 1)
                gram = (left @ x_TB).view(len(weight_NK), len(index_B), len(index_B))
                gram += self.plain[index_B][:, index_B] + torch.diag_embed(self.ridge[:, None].expand(-1, len(index_B)))
                self.grams[key] = gram
            gram = self.grams[key]
            error_NB = error_NK[:, index_B]
            pull_NB = (self.w * r_TN).T @ x_TB + ep_NK[:, index_B] + self.ridge[:, None] * error_NB
            before_NB = error_NB.clone()
            for at, k in enumerate(index_B.tolist()):
                one = Parameters(scale_NG[:, k // S : k // S + 1])
                curve = gram[:, at, at, None]
                rest = pull_NB[:, at : at + 1] / curve.clamp(min=torch.finfo(torch.float32).tiny)
                w1 = weight_NK[:, k : k + 1]
                code = grid.encode(w1 - (error_NB[:, at : at + 1] - rest), one)
                moved = w1 - grid.decode(code, one).float() - error_NB[:, at : at + 1]
                gains = moved * (2 * pull_NB[:, at : at + 1] + moved * curve) < 0
                moved = torch.where(gains, moved, 0.0)
                codes_NK[:, k : k + 1] = torch.where(gains, code, codes_NK[:, k : k + 1])
                error_NB[:, at : at + 1] += moved
                pull_NB += moved * gram[:, at]
            error_NK[:, index_B] = error_NB
            change_NB = error_NB - before_NB
            r_TN += x_TB @ change_NB.T
            ep_NK += change_NB @ self.plain[index_B]
        return codes_NK


def refine(weight_NK, codes_NK, scale_NG, grid, x_TK, c_TN, hessian_KK):
    w_TN = c_TN.square()
    w_TN = w_TN / w_TN.mean(0).clamp(min=1e-30) * (1 - BLEND)
    plain_KK = BLEND * hessian_KK
    order_K = torch.argsort(hessian_KK.diagonal(), descending=True, stable=True)
    codes, scales = [], []
    for at in range(0, len(weight_NK), CHUNK):
        part = slice(at, at + CHUNK)
        w = w_TN[:, part].contiguous()
        size = (w * x_TK.square().sum(1)[:, None]).mean(0) + plain_KK.diagonal().sum()
        task = Weighted(x_TK, w, plain_KK, 0.05 * size / x_TK.shape[1])
        c, s = codes_NK[part], scale_NG[part]
        for _ in range(ROUNDS):
            s = task.refit(weight_NK[part], c, s, grid)
            c = task.descend(weight_NK[part], c, s, grid, order_K)
        codes.append(c)
        scales.append(s)
    return torch.cat(codes), torch.cat(scales)


class Refined:
    def __init__(self, base, seen):
        self.base, self.seen = base, seen

    def round(self, weight_ENK, grid, hessian_EKK):
        codes, p = self.base.round(weight_ENK, grid, hessian_EKK)
        made = [
            refine(w, c, s, grid, x, g, h)
            for w, c, s, (x, g), h in zip(weight_ENK, codes, p.scale_NG, self.seen, hessian_EKK, strict=True)
        ]
        return torch.stack([c for c, _ in made]), Parameters(torch.stack([s for _, s in made]))


def inputs(block, names):
    walk, index = block._walk, block._index
    got = {}

    def watch(key, value):
        got.setdefault(key, []).append(value.float())

    with watching(block._module, block._prefix, names, watch):
        for hidden in walk._activations.read(index):
            walk.decoder.run(index, block._module, hidden)
    return {k: torch.cat(v) for k, v in got.items()}


plain_round = walk.Block._round


def _round(self: walk.Block, names: list[str], moments: Moments) -> None:
    """Block._round, with the refinement for gate and up."""
    if not any(name.endswith(("gate_proj", "up_proj")) for name in names):
        return plain_round(self, names, moments)
    seen, slopes = inputs(self, names), {}
    for name in names:
        key = input_key(name)
        if name.endswith("gate_proj") and moments.tokens.get(key):
            up = name.replace("gate_proj", "up_proj")
            gate_TN, up_TN = seen[key] @ self._weight(name).T, seen[key] @ self._weight(up).T
            share_TN = torch.sigmoid(gate_TN)
            slopes[name] = up_TN * (share_TN + gate_TN * share_TN * (1 - share_TN))
            slopes[up] = gate_TN * share_TN
    method, settle = self._walk._method, self._settle

    def refined(stack, weight_ENK, chosen, hessian_EKK):
        if chosen is method:
            chosen = Refined(method, [(seen[input_key(name)], slopes[name]) for name in stack])
        settle(stack, weight_ENK, chosen, hessian_EKK)

    self._settle = refined
    plain_round(self, names, moments)
    del self._settle


if __name__ == "__main__":
    walk.Block._round = _round
    ours.main()
