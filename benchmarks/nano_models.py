"""Real text and small Llama 4 models that learn it as the product's students and teachers do, in one process.

    text = Text(seed); student = Network("scout-nano", STUDENT, seed=seed)
    loss, stats_ST, _ = student.measure(text.batch(step), targets=targets, alpha=0.9); student.update(loss, rate)

Shapes: T tokens of a step, H width, S statistics of distill.losses.kernel.STATS.
"""

import statistics
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch

from distill.learner import Learner, parameter_groups
from distill.losses import fused_linear_distillation
from distill.losses.kernel import STATS
from distill.schedule import learning_rate
from herd.data.batches import Batch
from herd.data.corpora import open_corpus
from herd.data.packing import PackedRows, pack_rows
from herd.data.streams import RowStream, fixed_batches
from herd.data.tokenizer_training import train_tokenizer
from herd.llama4.balance import RouterTap, balance_loss
from herd.llama4.experts import use_sparse_experts
from herd.llama4.source import open_model
from herd.run.schema import Data, Loss, Optim
from teachers.targets import DenseTargets

VOCABULARY, LENGTH, ROWS_A_STEP = 1024, 128, 4
TOKENS_A_STEP = ROWS_A_STEP * LENGTH
HELDOUT_ROWS, PROBE_ROWS = 64, 16
STEPS = 112
# Every second layer without RoPE keeps both kinds of Llama 4's layers in two.
STUDENT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 2,
    "no_rope_layer_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
}
TEACHER = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "intermediate_size_mlp": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}
STUDENT_RATE, TEACHER_RATE, HASTY_RATE = 8e-3, 4e-3, 8e-3
FROZEN_STEPS = {"good": 500, "weak": 150}
HEAD_START = 100
OPTIM, BALANCE = Optim(), Loss().balance


class Text:
    """The standard library's rows in one seed's order, and held-out rows of that seed's own."""

    def __init__(self, seed: int) -> None:
        packed, fixed = _packed()
        self._rows = RowStream(packed, seed=seed)
        own, cut = fixed[seed % len(fixed)], HELDOUT_ROWS // ROWS_A_STEP
        self.heldout, self.probe = own[:cut], own[cut:]

    def batch(self, step: int) -> Batch:
        """The rows of one step; no row is in two."""
        (batch,) = self._rows.take(step, rows=ROWS_A_STEP, micro_rows=ROWS_A_STEP, rank=0, world=1)
        return batch


@cache
def _packed() -> tuple[PackedRows, list[list[Batch]]]:
    """All training rows, and six parts of the held-out ones."""
    data = Data(sequence_length=LENGTH)
    corpus = open_corpus(data)
    tokenizer = train_tokenizer(corpus, vocab_size=VOCABULARY)
    rows = HELDOUT_ROWS + PROBE_ROWS
    batches = fixed_batches(data, tokenizer, "heldout", rows=6 * rows, rows_per_batch=ROWS_A_STEP, corpus=corpus)
    size = rows // ROWS_A_STEP
    return pack_rows(corpus, tokenizer, "train", LENGTH), [batches[at : at + size] for at in range(0, 6 * size, size)]


class Network:
    """A Llama 4 with sparse experts and the product's loss, AdamW, schedule and clipping; fp32."""

    def __init__(self, source: str, overrides: Mapping[str, Any], *, seed: int) -> None:
        vocabulary = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        model = open_model(source, overrides=overrides, vocabulary=vocabulary, dtype=torch.float32, seed=seed)
        self._learner = Learner(use_sparse_experts(model))
        self._tap = RouterTap(self._learner)
        groups = parameter_groups(self._learner, weight_decay=OPTIM.weight_decay, eps=OPTIM.eps)
        self._optimiser = torch.optim.AdamW(groups, betas=OPTIM.betas, fused=True)

    def measure(self, batch: Batch, **loss: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, statistics [S, T] and hidden states [T, H] of one batch; `loss`: targets, alpha, temperature."""
        loss_of = partial(fused_linear_distillation, labels_T=batch.labels_BT.flatten(), **loss)
        value, stats_ST, _, hidden_TH = self._learner(batch.input_ids_BT, loss_of=loss_of)
        return value + BALANCE * balance_loss(self._tap.take(), 1), stats_ST, hidden_TH

    def update(self, loss: torch.Tensor, rate: float) -> None:
        """One step of the optimiser."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._learner.parameters(), OPTIM.clip)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._optimiser.zero_grad()

    def copy_from(self, other: "Network") -> None:
        """Take another network's weights; its optimiser's state is left behind."""
        self._learner.load_state_dict(other._learner.state_dict())

    def answer(self, hidden_TH: torch.Tensor) -> DenseTargets:
        """What these hidden states are to a student."""
        return DenseTargets((hidden_TH @ self._learner.head.weight.T).detach())

    def heldout(self, batches: list[Batch]) -> float:
        """Mean cross-entropy, nats a token."""
        with torch.no_grad():
            return statistics.mean(self.measure(batch)[1][STATS.index("ce")].mean().item() for batch in batches)


class Teacher:
    """A cell's: frozen (`good`, `weak`), or learning beside students: `co`, `ahead` of them, or too fast (`hasty`)."""

    def __init__(self, kind: str, seed: int) -> None:
        self.head_start = HEAD_START if kind == "ahead" else 0
        self._rate = HASTY_RATE if kind == "hasty" else TEACHER_RATE
        self._frozen = kind in FROZEN_STEPS
        self.network = frozen_teachers(seed)[kind] if self._frozen else new_teacher(seed)
        for step in range(self.head_start):
            self._learn(Text(seed).batch(STEPS + step), step)

    def read(self, batch: Batch, step: int) -> DenseTargets:
        """Its answer before it learns from these labels, in the students' step of this number."""
        if not self._frozen:
            return self._learn(batch, self.head_start + step)
        with torch.no_grad():
            return self.network.answer(self.network.measure(batch)[2])

    def _learn(self, batch: Batch, step: int) -> DenseTargets:
        loss, _, hidden_TH = self.network.measure(batch)
        answer = self.network.answer(hidden_TH)
        self.network.update(loss, learning_rate(OPTIM, step, steps=self.head_start + STEPS, peak=self._rate))
        return answer


def new_teacher(seed: int) -> Network:
    """One that has read nothing yet."""
    return Network("behemoth-nano", TEACHER, seed=50 + seed)


@cache
def frozen_teachers(seed: int) -> dict[str, Network]:
    """One that read rows no student meets, to the end of its schedule (`good`) and early on its way (`weak`)."""
    text, network, found = Text(seed), new_teacher(seed), {}
    for step in range(FROZEN_STEPS["good"]):
        if step == FROZEN_STEPS["weak"]:
            found["weak"] = new_teacher(seed)
            found["weak"].copy_from(network)
        loss, _, _ = network.measure(text.batch(STEPS + HEAD_START + step))
        network.update(loss, learning_rate(OPTIM, step, steps=FROZEN_STEPS["good"], peak=TEACHER_RATE))
    return found | {"good": network}
