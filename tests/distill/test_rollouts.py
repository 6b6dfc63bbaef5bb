"""Rows a student writes: the cache changes nothing, samples follow the distribution, and depend on seed and key alone.

pytest tests/distill/test_rollouts.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from distill.rollouts import continue_rows, draw, uniforms, write_batches
from herd.data.batches import Batch
from herd.llama4.experts import use_sparse_experts
from herd.llama4.model import build
from herd.run.errors import ConfigError
from herd.run.schema import OnPolicy

OBJECTIVE = OnPolicy(kind="on_policy", prompt_tokens=6)
CHUNK = 128  # attention_chunk_size of the nano specs


def tokens(*shape, below=4096, seed=0):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def greedy(logits_BV, number):
    return logits_BV.argmax(-1)


def tiny_llama(layers=2):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=100, num_hidden_layers=layers, initializer_range=0.5, **sizes)
    ).eval()


def rows_of(batch_size=4, length=16, below=100):
    keys_B = torch.tensor([-5, 12, 2**62, 7])[:batch_size]
    ids_BT = tokens(batch_size, length, below=below)
    return Batch(ids_BT, ids_BT.roll(-1, 1), keys_B, torch.full((batch_size,), 30))


def piece(batch, rows):
    return Batch(batch.input_ids_BT[rows], batch.labels_BT[rows], batch.keys_B[rows], batch.bytes_B[rows])


@pytest.mark.parametrize("prompt", [20, CHUNK + 12], ids=["into the second chunk", "prompt longer than a chunk"])
@pytest.mark.parametrize("spec", ["scout-nano", "maverick-nano"])
def test_greedy_continuations_from_the_cache_are_those_of_whole_forwards(spec, prompt):
    model = use_sparse_experts(build(spec, seed=0, overrides={"vocab_size": 512})).eval()
    prompts_BP, cached = tokens(3, prompt, below=512), []

    def choose(logits_BV, number):
        cached.append(logits_BV)
        return greedy(logits_BV, number)

    written_BN = continue_rows(model, prompts_BP, tokens=CHUNK + 30 - 20, choose=choose)
    with torch.no_grad():
        whole_BTV = model(input_ids=torch.cat([prompts_BP, written_BN], 1), use_cache=False).logits
    whole_BNV = whole_BTV[:, prompt - 1 : -1]
    assert torch.equal(written_BN, whole_BNV.argmax(-1))
    torch.testing.assert_close(torch.stack(cached, 1), whole_BNV, rtol=0, atol=1e-5)


def test_written_rows_keep_their_prompts_and_are_scored_only_where_the_student_chose():
    batch = rows_of()
    (own,) = write_batches(tiny_llama(), [batch], OBJECTIVE, vocabulary=100, seed=(0, 0))
    prompt = OBJECTIVE.prompt_tokens
    assert own.input_ids_BT.shape == batch.input_ids_BT.shape == own.labels_BT.shape
    assert torch.equal(own.input_ids_BT[:, :prompt], batch.input_ids_BT[:, :prompt])
    assert (own.labels_BT[:, : prompt - 1] == -100).all()
    assert torch.equal(own.labels_BT[:, prompt - 1 : -1], own.input_ids_BT[:, prompt:])
    assert (own.labels_BT[:, prompt - 1 :] >= 0).all()
    assert not torch.equal(own.input_ids_BT[:, prompt:], batch.input_ids_BT[:, prompt:])
    assert torch.equal(own.keys_B, batch.keys_B) and (own.bytes_B == 0).all()


def test_a_sample_depends_on_seed_and_key_alone_however_the_rows_are_split():
    model, batch = tiny_llama().double(), rows_of()
    (whole,) = write_batches(model, [batch], OBJECTIVE, vocabulary=100, seed=(3, 8))
    halves = [piece(batch, slice(2, 4)), piece(batch, slice(0, 2))]
    late, early = write_batches(model, halves, OBJECTIVE, vocabulary=100, seed=(3, 8))
    assert torch.equal(torch.cat([early.labels_BT, late.labels_BT]), whole.labels_BT)
    few = OBJECTIVE.model_copy(update={"sample_rows": 3})
    (split,) = write_batches(model, [batch], few, vocabulary=100, seed=(3, 8))
    assert torch.equal(split.labels_BT, whole.labels_BT)
    for seed in ((3, 9), (4, 8)):
        (other,) = write_batches(model, [batch], OBJECTIVE, vocabulary=100, seed=seed)
        assert not torch.equal(other.labels_BT, whole.labels_BT)


def test_writing_leaves_random_state_gradients_and_mode_as_they_were():
    model = tiny_llama().train()
    state = torch.get_rng_state()
    (own,) = write_batches(model, [rows_of()], OBJECTIVE, vocabulary=100, seed=(0, 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    model(input_ids=own.input_ids_BT, labels=own.input_ids_BT).loss.backward()  # written ids are no inference tensors


def test_no_id_without_a_token_is_written():
    (own,) = write_batches(tiny_llama(), [rows_of(below=10)], OBJECTIVE, vocabulary=10, seed=(0, 0))
    assert own.labels_BT.max() == 9


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_draws_have_the_frequencies_of_the_tempered_softmax(seed, temperature):
    count, logits_V = 20_000, torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 2
    chances = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    ids = draw(logits_V.expand(count, -1), chances, temperature=temperature)
    expected = torch.softmax(logits_V.double() / temperature, 0)
    seen = torch.bincount(ids, minlength=12) / count
    assert ((seen - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_impossible_tokens_are_never_drawn_even_at_the_ends_of_the_unit_interval():
    logits_BV = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.5, -torch.inf]]).expand(2, -1)
    ids = draw(logits_BV, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), temperature=1.0)
    assert ids.tolist() == [1, 3]


def test_streams_of_rows_are_uniform_and_apart():
    chances_BN = uniforms(torch.tensor([0, 1, -1, 2**40]), 4000, seed=(0, 1))
    assert chances_BN.dtype == torch.float64 and ((chances_BN >= 0) & (chances_BN < 1)).all()
    assert (chances_BN.mean(1) - 0.5).abs().max() < 5 / (12 * 4000) ** 0.5
    correlation = torch.corrcoef(chances_BN) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / 4000**0.5


def test_logits_that_are_not_numbers_give_a_token_so_that_the_loss_can_name_the_fault():
    ids = draw(torch.full((1, 7), torch.nan), torch.tensor([0.3], dtype=torch.float64), temperature=1.0)
    assert 0 <= ids.item() < 7


def test_a_model_without_a_key_value_cache_is_refused():
    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ConfigError, match="MambaForCausalLM has no key-value cache"):
        continue_rows(MambaForCausalLM(config), tokens(1, 4, below=32), tokens=2, choose=greedy)
