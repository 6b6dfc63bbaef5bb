"""What is timed is greedy decoding: the same tokens as transformers' own generate."""

import torch

from evals.decoding import decode, time_decoding
from tests.evals.tiny import tiny_model, tiny_rows


def test_decoding_is_greedy_generation() -> None:
    model, prompt_1T = tiny_model(0), tiny_rows(1).input_ids_NT[:1]
    generated, seconds = decode(model, prompt_1T, tokens=12)
    expected = model.generate(prompt_1T, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, expected[0, prompt_1T.shape[1] :])
    assert seconds > 0


def test_speed_counts_tokens_a_second() -> None:
    assert time_decoding(tiny_model(0), tiny_rows(1).input_ids_NT[:1], tokens=4, runs=3) > 0
