"""The tensors of an export that a calibrated method makes, decoder layer by decoder layer, as they are asked for.

tensors = CalibratedTensors(plan, source, method, calibration)      # nothing is run yet
tensors["model.layers.0.mlp.up_proj.weight_packed"]                 # layer 0 is quantised now
tensors.coverage()
"""

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor

from herd.run.errors import ConfigError
from quant.calibration.activations import Activations
from quant.calibration.coverage import batches_needed, count_routes, coverage_report
from quant.calibration.decoder import Decoder
from quant.calibration.ledger import Ledger
from quant.calibration.rows import LEAST_TOKENS, CalibrationRows
from quant.calibration.settings import Calibration
from quant.calibration.walk import Walk
from quant.methods.method import Method
from quant.plans import Plan
from quant.sources import Source

log = logging.getLogger(__name__)

RECIPE = "3"
"""Raise it when the same settings give other codes: unfinished work of an earlier version is then thrown away."""


class CalibratedTensors(Mapping[str, Tensor]):
    def __init__(self, plan: Plan, source: Source, method: Method, calibration: Calibration):
        self._plan = plan
        self._source = source
        self._method = method
        self._calibration = calibration
        self._check_rows()
        self._headers = plan.headers()
        self._last: tuple[int, dict[str, Tensor]] = (-1, {})

    def __getitem__(self, name: str) -> Tensor:
        index = self._walk.layer_of(name)
        if index is None:
            return self._outside(name)
        if self._last[0] != index:
            self._walk.advance(index)
            self._last = (index, self._ledger.tensors(index))
        found = self._last[1].get(name)
        return self._plan.read_kept(self._source, name) if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    @property
    def scratch_bytes(self) -> int:
        """Of the work folder, at most: quantised layers, and the hidden states on both sides of a layer."""
        states = 2 * self._calibration.rows.tokens_NT.numel() * self._plan.config.get_text_config().hidden_size
        return self._plan.bytes_after + states * (4 if self._method.corrects else 2)

    def coverage(self) -> dict[str, Any]:
        """What calibration saw (`coverage_report`); finishes every layer."""
        self._walk.advance(len(self._walk.decoder) - 1)
        return coverage_report(
            [self._ledger.facts(index) for index in range(len(self._walk.decoder))],
            rows=len(self._rows.tokens_NT),
            row_tokens=self._rows.tokens_NT.shape[1],
            source=self._rows.source,
            quota=self._calibration.expert_tokens,
        )

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the bytes of the export. Sums depend on how threads share them, so their number counts."""
        return {
            "recipe": RECIPE,
            "source": self._source.identity(),
            "scheme": [
                (target, f"{scheme.label} {scheme.container}") for target, scheme in self._plan.allocation.parts
            ],
            "ignored": sorted(self._plan.ignored),
            "method": repr(self._method),
            "calibration rows": self._calibration.rows.fingerprint,
            "calibration settings": [self._calibration.first, self._calibration.expert_tokens],
            "memory": self._calibration.memory_bytes,
            "threads": torch.get_num_threads(),
            "versions": [torch.__version__, transformers.__version__],
        }

    def _check_rows(self) -> None:
        """Raise ConfigError when too few rows would be taken (for experts, whole batches are)."""
        first, (drawn, row_tokens) = self._calibration.first, self._calibration.rows.tokens_NT.shape
        if not self._plan.has_experts and min(first, drawn) * row_tokens < LEAST_TOKENS:
            least = -(-LEAST_TOKENS // row_tokens)
            raise ConfigError(
                f"--calibration-rows {first}: {first * row_tokens} tokens in rows of {row_tokens}, at least "
                f"{LEAST_TOKENS} are needed; give --calibration-rows {least} or more"
            )

    @cached_property
    def _ledger(self) -> Ledger:
        work = self._calibration.work
        ledger = Ledger(work, {} if work is None else self.fingerprint())
        if ledger.dropped is not None:
            log.warning("%s: unfinished work with another %s is thrown away", ledger.folder, ledger.dropped)
        elif ledger.finished:
            log.warning("%s: %d finished layers are there; going on from them", ledger.folder, ledger.finished)
        return ledger

    @cached_property
    def _walk(self) -> Walk:
        memory = self._calibration.memory_bytes
        return Walk(self._plan, self._source, self._method, self._rows, self._ledger, memory_bytes=memory)

    @cached_property
    def _rows(self) -> CalibrationRows:
        drawn, first = self._calibration.rows, self._calibration.first
        if not self._plan.has_experts or len(drawn.tokens_NT) <= first:
            return drawn.first(first)
        return drawn.first(self._ledger.remember("rows", self._count_rows))

    def _count_rows(self) -> int:
        batches = self._calibration.rows.batches()
        width = self._plan.config.get_text_config().hidden_size
        activations = Activations(self._ledger.folder, "routes", [(*batch.shape, width) for batch in batches])
        counts_BX = count_routes(Decoder(self._plan, self._source), batches, activations)
        least = -(-self._calibration.first // len(batches[0]))
        needed = batches_needed(counts_BX, first=least, quota=self._calibration.expert_tokens)
        return sum(len(batch) for batch in batches[:needed])

    def _outside(self, name: str) -> Tensor:
        """Tensors outside the decoder layers: copied, or rounded to nearest."""
        if name not in self._plan.parts:
            return self._plan.read_kept(self._source, name)
        layer, suffix = self._plan.parts[name]
        return layer.scheme.compress(self._plan.read_layer(self._source, layer))[suffix]
