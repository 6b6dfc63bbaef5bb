"""Text whose true distribution is known, and students tiny enough to be trained in dozens at a time.

    world = World.of("shift", seed=0, steps=300); students = Students(8, width=64, seed=0)
    students.step(loss, rate); world.excess(students.logits(world.heldout_EX))     # exact KL to the truth, nats

Shapes: A students, T tokens of a step, X tokens of context, V vocabulary, H width, E held-out tokens, N rows.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from distill.schedule import learning_rate
from herd.run.schema import Optim

VOCABULARY, CONTEXT, LENGTH = 256, 3, 32
ROWS_A_STEP, HELDOUT_ROWS, PROBE_ROWS = 8, 128, 32
TOKENS_A_STEP = ROWS_A_STEP * LENGTH
SHIFTED, NOISY = 0.2, 0.1
NEARNESS = (1.0, 0.8, 0.6)
"""How much the last token, the one before it and the third last matter to the next."""
TRUTH_WIDTH, SHARPNESS = 96, 4.2
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0


class Truth:
    """A fixed random network over the last three tokens, with Zipf's law as its bias."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (CONTEXT, VOCABULARY, TRUTH_WIDTH)
        self._embeddings = torch.randn(shape, generator=draw) * torch.tensor(NEARNESS)[:, None, None]
        self._head = torch.randn(TRUTH_WIDTH, VOCABULARY, generator=draw) / TRUTH_WIDTH**0.5
        self._bias_V = -(1.0 + torch.randperm(VOCABULARY, generator=draw).float()).log()

    def probabilities(self, context_TX: torch.Tensor) -> torch.Tensor:
        """[T, V]; the last column of the context is the nearest token."""
        state = sum(self._embeddings[back][context_TX[:, CONTEXT - 1 - back]] for back in range(CONTEXT))
        return (SHARPNESS * torch.tanh(state) @ self._head + self._bias_V).softmax(-1)

    def sample(self, count: int, draw: torch.Generator) -> torch.Tensor:
        """Rows [N, X + L] that begin with random tokens."""
        rows = torch.zeros(count, CONTEXT + LENGTH, dtype=torch.long)
        rows[:, :CONTEXT] = torch.randint(VOCABULARY, (count, CONTEXT), generator=draw)
        for place in range(CONTEXT, CONTEXT + LENGTH):
            p_NV = self.probabilities(rows[:, place - CONTEXT : place])
            rows[:, place] = torch.multinomial(p_NV, 1, generator=draw).squeeze(1)
        return rows


def contexts(rows_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token's context [T, X] and the token itself [T]."""
    return rows_N.unfold(1, CONTEXT, 1)[:, :LENGTH].reshape(-1, CONTEXT), rows_N[:, CONTEXT:].reshape(-1)


@dataclass(frozen=True)
class World:
    """What students of one seed read, and what they are measured on."""

    context_TX: torch.Tensor
    """All steps' tokens, in order."""
    labels_T: torch.Tensor
    heldout_EX: torch.Tensor
    heldout_labels_E: torch.Tensor
    truth_EV: torch.Tensor
    probe: tuple[torch.Tensor, torch.Tensor]
    """Other held-out contexts and labels, for the design that steers by them."""

    @classmethod
    def of(cls, data: str, *, seed: int, steps: int) -> "World":
        """`clean`; `shift`: a fifth of all rows, held-out ones too, from elsewhere; `noise`: a tenth of the labels."""
        draw = torch.Generator().manual_seed(1000 + seed)
        home, elsewhere = Truth(2 * seed + 1), Truth(2 * seed + 2)
        rows, heldout = home.sample(steps * ROWS_A_STEP, draw), home.sample(HELDOUT_ROWS + PROBE_ROWS, draw)
        away_N = torch.zeros(len(heldout), dtype=torch.bool)
        if data == "shift":
            rows, _ = _shifted(rows, elsewhere, draw)
            heldout, away_N = _shifted(heldout, elsewhere, draw)
        context_TX, labels_T = contexts(rows)
        if data == "noise":
            wrong_T = torch.rand(len(labels_T), generator=draw) < NOISY
            labels_T = labels_T.where(~wrong_T, torch.randint(VOCABULARY, labels_T.shape, generator=draw))
        heldout_EX, heldout_E = contexts(heldout[:HELDOUT_ROWS])
        away_E1 = away_N[:HELDOUT_ROWS].repeat_interleave(LENGTH)[:, None]
        truth_EV = elsewhere.probabilities(heldout_EX).where(away_E1, home.probabilities(heldout_EX))
        probe = contexts(heldout[HELDOUT_ROWS:])
        return cls(context_TX, labels_T, heldout_EX, heldout_E, truth_EV, probe)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts and labels of one step."""
        tokens = slice(step * TOKENS_A_STEP, (step + 1) * TOKENS_A_STEP)
        return self.context_TX[tokens], self.labels_T[tokens]

    @cached_property
    def entropy(self) -> float:
        """Of the truth, nats: the cross-entropy that nobody can go below."""
        return torch.special.entr(self.truth_EV).sum(-1).mean().item()

    def excess(self, logits_AEV: torch.Tensor) -> list[float]:
        """KL(truth || student), the mean over held-out contexts."""
        return (-(self.truth_EV * logits_AEV.log_softmax(-1)).sum(-1).mean(-1) - self.entropy).tolist()

    def heldout_ce(self, logits_AEV: torch.Tensor) -> list[float]:
        """Mean cross-entropy on the held-out text itself, nats."""
        return ce_of(logits_AEV, self.heldout_labels_E)


def ce_of(logits_AEV: torch.Tensor, labels_E: torch.Tensor) -> list[float]:
    """Each student's mean cross-entropy on these labels, nats."""
    label_AE1 = logits_AEV.gather(-1, labels_E[:, None].expand(len(logits_AEV), -1, 1))
    return (logits_AEV.logsumexp(-1, keepdim=True) - label_AE1).mean((1, 2)).tolist()


def _shifted(rows_N: torch.Tensor, elsewhere: Truth, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    away_N = torch.rand(len(rows_N), generator=draw) < SHIFTED
    return elsewhere.sample(len(rows_N), draw).where(away_N[:, None], rows_N), away_N


class Students:
    """A networks with the same start: embeddings of three tokens, one block, a head; AdamW, each clipped by itself."""

    def __init__(self, count: int, *, width: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        shapes = [(CONTEXT * VOCABULARY, width), (width, 2 * width), (2 * width, width), (VOCABULARY, width)]
        spreads = [0.5, width**-0.5, 0.5 * (2 * width) ** -0.5, 0.02]
        start = [torch.randn(shape, generator=draw) * spread for shape, spread in zip(shapes, spreads, strict=True)]
        self.weights = [weight.expand(count, *weight.shape).clone().requires_grad_() for weight in start]
        embeddings, *matrices = self.weights
        groups = [{"params": [embeddings], "weight_decay": 0.0}, {"params": matrices, "weight_decay": WEIGHT_DECAY}]
        self._optimiser = torch.optim.AdamW(groups, betas=BETAS, fused=True)

    def logits(self, context_TX: torch.Tensor) -> torch.Tensor:
        """[A, T, V]."""
        embeddings, up, down, head = self.weights
        places_XT = context_TX.T + VOCABULARY * torch.arange(CONTEXT)[:, None]
        looked_up = embeddings.index_select(1, places_XT.flatten())
        state = looked_up.unflatten(1, places_XT.shape).sum(1)
        state = state + functional.gelu(_normed(state) @ up) @ down
        return _normed(state) @ head.mT

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """One update of every student from the sum of their losses."""
        loss.backward()
        gradients = [weight.grad for weight in self.weights]
        norm_A = sum(gradient.flatten(1).square().sum(1) for gradient in gradients).sqrt()
        clip_A = (CLIP / norm_A).clamp(max=1.0)
        for gradient in gradients:
            gradient *= clip_A.view(-1, *[1] * (gradient.dim() - 1))
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._optimiser.zero_grad()


def _normed(state: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(state, state.shape[-1:])


def trained_alone(truth: Truth, *, width: int, seed: int, steps: int, rate: float) -> Students:
    """One network that read `steps` batches of this truth; a teacher."""
    rows = truth.sample(steps * ROWS_A_STEP, torch.Generator().manual_seed(77 + seed))
    context_TX, labels_T = contexts(rows)
    network, optim = Students(1, width=width, seed=50 + seed), Optim()
    for step in range(steps):
        tokens = slice(step * TOKENS_A_STEP, (step + 1) * TOKENS_A_STEP)
        loss = functional.cross_entropy(network.logits(context_TX[tokens])[0], labels_T[tokens])
        network.step(loss, learning_rate(optim, step, steps=steps, peak=rate))
    return network
