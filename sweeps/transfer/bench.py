"""Small models trained in this process, as the trainer would: its parameter groups, rates and clipping; fp32.

bench = Bench.open(settings)
loss = bench.train(Point(Arm(small, large, ruled=True), rung=-12, seed=0), stop)      # held-out nats, None: diverged
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import Llama4ForCausalLM, Llama4TextConfig

from distill.learner import Learner, parameter_groups
from distill.schedule import learning_rate
from herd.data.batches import Batch
from herd.data.corpora import open_corpus
from herd.data.packing import pack_rows
from herd.data.streams import RowStream, fixed_batches
from herd.data.tokenizer_training import open_tokenizer
from herd.llama4 import RouterTap, balance_loss, build, find_spec, use_sparse_experts
from herd.llama4.transfer import Horizon, Rule, betas, scale_weights, scales
from herd.run.errors import Interrupted
from herd.run.schema import Data, Tokenizer
from sweeps.stopping import Stop
from sweeps.transfer.settings import GRID_STEP, Scale, TransferCheck, shape


@dataclass(frozen=True)
class Arm:
    """A size that settings of the base are carried to, by the rules or as they are."""

    base: Scale
    size: Scale
    ruled: bool


@dataclass(frozen=True)
class Point:
    """One training: the base's rate is 2^(rung x GRID_STEP)."""

    arm: Arm
    rung: int
    seed: int

    @property
    def rate(self) -> float:
        """The base's peak learning rate."""
        return 2 ** (self.rung * GRID_STEP)


@dataclass(frozen=True)
class Bench:
    settings: TransferCheck
    vocabulary: dict[str, int]
    """Of the tokenizer: its size and special ids."""
    rows: dict[int, RowStream]
    """Training rows by seed."""
    heldout: list[Batch]
    fingerprint: str
    """Of the training rows."""

    @classmethod
    def open(cls, settings: TransferCheck) -> "Bench":
        """Tokenizer and rows of the embedded corpus; made once and cached."""
        data = Data(sequence_length=settings.sequence_length, heldout_rows=settings.heldout_rows)
        corpus = open_corpus(data)
        tokenizer = open_tokenizer(Tokenizer(vocab_size=settings.vocab_size), corpus)
        packed = pack_rows(corpus, tokenizer, "train", settings.sequence_length)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        seeds = range(max(settings.seeds, settings.coordinates.seeds))
        return cls(
            settings=settings,
            vocabulary={"vocab_size": len(tokenizer)} | {name: getattr(tokenizer, name) for name in ids},
            rows={seed: RowStream(packed, seed=seed) for seed in seeds},
            heldout=fixed_batches(data, tokenizer, "heldout", rows=settings.heldout_rows, rows_per_batch=16),
            fingerprint=packed.fingerprint,
        )

    def train(self, point: Point, stop: Stop) -> float | None:
        """Held-out nats a token after the point's training; None when it diverged. Raises Interrupted when asked."""
        model, optimizer = self.start(point.arm, seed=point.seed)
        for _ in self.steps(model, optimizer, point, stop):
            pass
        loss = self.heldout_loss(model)
        return loss if math.isfinite(loss) else None

    def start(self, arm: Arm, *, seed: int) -> tuple[Llama4ForCausalLM, torch.optim.AdamW]:
        """A fresh model of the arm's size and its optimiser, whose groups take `lr_factor` of the base's rate."""
        optim, rules = self.settings.optim, self.rules(arm)
        overrides = {**self.vocabulary, **shape(self.settings, arm.size)}
        model = use_sparse_experts(build(self.settings.source, overrides=overrides, seed=seed))
        if rules is not None:
            scale_weights(model, rules)
        groups = parameter_groups(Learner(model), weight_decay=optim.weight_decay, eps=optim.eps, rules=rules)
        averages = betas(optim.betas, self.horizon(arm)) if arm.ruled else optim.betas
        return model, torch.optim.AdamW(groups, lr=optim.lr, betas=averages, fused=True)

    def rules(self, arm: Arm) -> dict[str, Rule] | None:
        """Factors of every parameter; None under standard parametrisation."""
        if not arm.ruled:
            return None
        small, large = (self.config(size) for size in (arm.base, arm.size))
        return scales(small, large, self.horizon(arm), depth_exponent=self.settings.depth_exponent)

    def horizon(self, arm: Arm) -> Horizon:
        """How much more the arm's size reads than its base."""
        base, size = arm.base, arm.size
        tokens = size.rows * size.steps / (base.rows * base.steps)
        rule = {"exponent": self.settings.horizon_exponent, "averages": self.settings.averages}
        return Horizon(batch=size.rows / base.rows, tokens=tokens, **rule)

    def config(self, size: Scale) -> Llama4TextConfig:
        """The model's configuration."""
        return find_spec(self.settings.source).config(**{**self.vocabulary, **shape(self.settings, size)})

    def steps(
        self, model: Llama4ForCausalLM, optimizer: torch.optim.Optimizer, point: Point, stop: Stop
    ) -> Iterator[float]:
        """Train, giving the training loss of every step after it was made."""
        optim, size = self.settings.optim, point.arm.size
        tap = RouterTap(model)
        for step in range(size.steps):
            if stop.asked:
                raise Interrupted("")
            rate = learning_rate(optim, step, steps=size.steps, peak=point.rate)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_factor"]
            (batch,) = self.rows[point.seed].take(step, rows=size.rows, micro_rows=size.rows, rank=0, world=1)
            loss = cross_entropy(model, batch)
            (loss + self.settings.balance * balance_loss(tap.take(), model.config.num_experts_per_tok)).backward()
            if optim.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield loss.item()
        tap.close()

    @torch.no_grad()
    def heldout_loss(self, model: Llama4ForCausalLM) -> float:
        """Nats a token over the fixed held-out rows."""
        total = sum(cross_entropy(model, batch).item() * batch.labels_BT.numel() for batch in self.heldout)
        return total / sum(batch.labels_BT.numel() for batch in self.heldout)

    def identity(self, point: Point) -> dict[str, Any]:
        """All that decides a point's loss, as JSON: what its file is found by."""
        found = self.common_identity()
        arm = point.arm
        if arm.ruled:
            found["base"] = arm.base.model_dump()
            if arm.base.depth != arm.size.depth:
                found["depth_exponent"] = self.settings.depth_exponent
            horizon = self.horizon(arm)
            if horizon.tokens != 1:
                found["horizon_exponent"] = horizon.exponent
            if (horizon.tokens, horizon.batch) != (1, 1):
                found["averages"] = horizon.averages
        return found | {"size": arm.size.model_dump(), "rung": point.rung, "seed": point.seed}

    def coordinate_identity(self) -> dict[str, Any]:
        """The same of the coordinate checks."""
        about = {"coordinates", "depth_exponent"}
        return self.common_identity() | self.settings.model_dump(mode="json", include=about)

    def common_identity(self) -> dict[str, Any]:
        """What all points of a check have in common."""
        about = {"source", "overrides", "vocab_size", "sequence_length", "heldout_rows", "balance"}
        found = self.settings.model_dump(mode="json", include=about)
        return found | {"optim": self.settings.optim.model_dump(mode="json", exclude={"lr"}), "rows": self.fingerprint}


def cross_entropy(model: Llama4ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean nats a token (scalar)."""
    logits_BTV = model(input_ids=batch.input_ids_BT, use_cache=False).logits
    return functional.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten())
