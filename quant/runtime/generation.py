"""Tokens one by one from any causal model, with the seconds of prompt and tokens told apart.

stream = Stream(model, max_new_tokens=64, temperature=0.8, seed=1)
for token in stream.run(prompt_1T): ...
stream.prefill_seconds, stream.decode_seconds
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from herd.run.errors import NumericalError


class Stream:
    """Samples at a temperature, or takes the likeliest token at temperature 0; ends with an end token or the count."""

    def __init__(self, model: PreTrainedModel, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0):
        self.model, self.max_new_tokens, self.temperature = model, max_new_tokens, temperature
        self._generator = torch.Generator().manual_seed(seed)
        self.tokens: list[int] = []
        """What has been generated, an end token included."""
        self.prefill_seconds = 0.0
        """The prompt's forward, which yields the first token."""
        self.decode_seconds = 0.0
        """All tokens but the first; time the caller spends between them does not count."""

    @property
    def ends(self) -> set[int]:
        """The model's end tokens."""
        ends = self.model.generation_config.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def run(self, prompt_1T: Tensor) -> Iterator[int]:
        """Yield token after token; NumericalError where the model computes NaN or Inf."""
        ends, input_1T, cache = self.ends, prompt_1T, None
        while len(self.tokens) < self.max_new_tokens:
            start = time.perf_counter()
            with torch.inference_mode():
                output = self.model(input_ids=input_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, token = output.past_key_values, self._choose(output.logits[0, -1])
                input_1T = torch.tensor([[token]], device=prompt_1T.device)
            seconds = time.perf_counter() - start
            if self.tokens:
                self.decode_seconds += seconds
            else:
                self.prefill_seconds = seconds
            self.tokens.append(token)
            yield token
            if token in ends:
                return

    def _choose(self, logits_V: Tensor) -> int:
        largest, token = logits_V.max(0)
        if not largest.isfinite():  # NaN, too, is the maximum
            raise NumericalError(
                f"token {len(self.tokens) + 1}: the model's logits are NaN or Inf; "
                "`python -m quant.gate` tells whether its folder is whole"
            )
        if self.temperature == 0:
            return int(token)
        probabilities_V = torch.softmax(logits_V.float().cpu() / self.temperature, 0)
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))
