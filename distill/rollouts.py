"""Rows a student writes itself: prompts continued by sampling, many at a time, with transformers' key-value cache.

    batches = write_batches(model, batches, config.objective, vocabulary=4096, seed=(run_seed, step))

The sample depends on the weights, the seed and each row's key alone, and touches no global random state.
Shapes: B rows, P prompt tokens, T tokens a row, N = T + 1 - P tokens written, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from herd.data.batches import Batch
from herd.run.errors import ConfigError
from herd.run.schema import OnPolicy

Choose = Callable[[torch.Tensor, int], torch.Tensor]
"""(logits_BV, number of the token among those written) -> ids_B."""

KEY_BITS = 2**64 - 1


def write_batches(
    model: PreTrainedModel, batches: list[Batch], objective: OnPolicy, *, vocabulary: int, seed: tuple[int, ...]
) -> list[Batch]:
    """These batches with everything after the first `objective.prompt_tokens` of a row written by `model`.

    Labels are the written tokens; where a prompt token would be predicted they are -100. Ids stay below `vocabulary`,
    those that have a meaning. Under expert parallelism every rank must call it with the same shapes.
    """
    prompts_BP = torch.cat([batch.input_ids_BT[:, : objective.prompt_tokens] for batch in batches])
    keys_B = torch.cat([batch.keys_B for batch in batches])
    count = batches[0].input_ids_BT.shape[1] + 1 - objective.prompt_tokens
    at_once = objective.sample_rows or len(keys_B)
    parts = []
    for some_BP, keys in zip(prompts_BP.split(at_once), keys_B.split(at_once), strict=True):
        chances_BN = uniforms(keys, count, seed=seed)

        def choose(logits_BV: torch.Tensor, number: int, chances_BN: torch.Tensor = chances_BN) -> torch.Tensor:
            return draw(logits_BV[:, :vocabulary], chances_BN[:, number], temperature=objective.sample_temperature)

        parts.append(continue_rows(model, some_BP, tokens=count, choose=choose))
    written = torch.cat(parts).split([len(batch.keys_B) for batch in batches])
    return [continued(batch, written_BN) for batch, written_BN in zip(batches, written, strict=True)]


def continued(batch: Batch, written_BN: torch.Tensor) -> Batch:
    """The batch with its last N - 1 input tokens and N labels replaced by what was written; earlier labels ignored."""
    kept = batch.input_ids_BT.shape[1] + 1 - written_BN.shape[1]
    prompts_BP = batch.input_ids_BT[:, :kept]
    return Batch(
        input_ids_BT=torch.cat([prompts_BP, written_BN[:, :-1]], dim=1),
        labels_BT=torch.cat([torch.full_like(prompts_BP[:, 1:], -100), written_BN], dim=1),
        keys_B=batch.keys_B,
        bytes_B=torch.zeros_like(batch.bytes_B),  # of the corpus' text the labels stand for: none
    )


@torch.no_grad()
def continue_rows(model: PreTrainedModel, prompts_BP: torch.Tensor, *, tokens: int, choose: Choose) -> torch.Tensor:
    """ids_BN: `tokens` tokens after each prompt, one forward each, every earlier token read from the cache.

    Raises ConfigError for a model without a key-value cache.
    """
    was_training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    ids, cache = prompts_BP.to(device), None
    written = []
    for number in range(tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.get("past_key_values")
        if cache is None:
            raise ConfigError(f"objective.kind = on_policy: {type(model).__name__} has no key-value cache; use distil")
        ids = choose(output.logits[:, -1], number)[:, None]
        written.append(ids)
    model.train(was_training)
    return torch.cat(written, dim=1).to(prompts_BP.device)


def draw(logits_BV: torch.Tensor, chances_B: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """ids_B ~ softmax(logits / temperature): where the cumulative distribution passes a uniform number in [0, 1).

    One number a token, whatever the vocabulary, so that a row's randomness can be drawn before anything is known.
    """
    cumulative_BV = torch.softmax(logits_BV.double() / temperature, dim=1).cumsum(1)
    marks_B1 = chances_B.to(cumulative_BV.device)[:, None] * cumulative_BV[:, -1:]
    # Logits that are NaN have no such place; any token will do, for the loss will be NaN too and say why.
    return torch.searchsorted(cumulative_BV, marks_B1, right=True).squeeze(1).clamp_max(logits_BV.shape[1] - 1)


def uniforms(keys_B: torch.Tensor, count: int, *, seed: tuple[int, ...]) -> torch.Tensor:
    """[B, count] float64 in [0, 1): a stream for each row, named by seed and key, wherever the row is computed."""
    rows = [np.random.default_rng((*seed, key & KEY_BITS)).random(count) for key in keys_B.tolist()]
    return torch.from_numpy(np.stack(rows))
