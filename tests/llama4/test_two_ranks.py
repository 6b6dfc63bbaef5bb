"""What two gloo ranks computed (parallel_worker.py, once for this file) is what one process computes, or plans."""

import pytest
import torch
from safetensors.torch import load_file

from herd.llama4.balance import ExpertLoad, balance_loss
from herd.llama4.plan import state_bytes
from herd.llama4.specs import SPECS
from tests.llama4.parallel_worker import (
    CASES,
    CLIP,
    HELD_CASES,
    LR,
    OVERRIDES,
    PERSISTENCE_THRESHOLD,
    make_batches,
    make_logits,
    make_model,
)

# A few AdamW steps in fp32: other orders of summation in gradients and experts, nothing else.
LOSS_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-5
STATE_TOLERANCE = 0.01  # DeepSpeed pads its flat buffers
NAMES = [f"zero{zero}_ep{ep}" for zero, ep in CASES]


@pytest.fixture(scope="module")
def alone():
    """Losses of transformers' own model with torch's AdamW, one process, all rows at once."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for batch in make_batches():
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_like_one_under_every_zero_stage_and_expert_split(name, two_ranks, alone):
    _, rank0, rank1 = two_ranks
    assert rank0[name]["losses"] == rank1[name]["losses"]
    assert rank0[name]["losses"] == pytest.approx(alone, abs=LOSS_TOLERANCE)
    assert min(alone) < alone[0] - 0.1  # the weights did move


@pytest.mark.parametrize("name", NAMES)
def test_gathered_weights_load_into_transformers_own_model_with_identical_logits(name, two_ranks):
    folder, rank0, rank1 = two_ranks
    state = load_file(folder / f"{name}.safetensors")
    expected = state.pop("expected_logits")
    model = make_model()
    started = model(make_batches()[0].chunk(2)[0]).logits
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        got = model(make_batches()[0].chunk(2)[0]).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=LOGIT_TOLERANCE)
    assert (got - started).abs().max() > 0.1
    assert not rank0[name]["others_got_none"] and rank1[name]["others_got_none"]


@pytest.mark.parametrize("name", NAMES)
def test_router_logits_are_tapped_and_recorded_under_deepspeed(name, two_ranks):
    for rank in two_ranks[1:]:
        assert rank[name]["tapped"] == rank[name]["recorded"] == [[96, 8], [96, 8]]


@pytest.mark.parametrize("case", range(len(HELD_CASES)))
def test_state_bytes_are_what_deepspeed_holds(case, two_ranks):
    measured = two_ranks[1]["held"][case]
    expected = state_bytes(
        SPECS["maverick-nano"].config(**OVERRIDES),
        zero=measured["zero"],
        expert_parallel=max(1, measured["expert_parallel"]),
        world_size=2,
        precision="bf16" if measured["bf16"] else "fp32",
        accumulation=measured["accumulation"],
        persistence_threshold=PERSISTENCE_THRESHOLD,
    )
    # The formula gives the fullest moment: the first micro step, where ZeRO-1 still keeps whole gradients.
    for kind, held in measured["held"][0].items():
        assert getattr(expected, kind) == pytest.approx(held, rel=STATE_TOLERANCE), kind


def test_two_ranks_average_to_the_loss_gradient_and_load_of_one(two_ranks):
    alone = [logits.requires_grad_() for logits in make_logits()]
    loss = balance_loss(alone, 2)
    loss.backward()
    ranks = [rank["balance"] for rank in two_ranks[1:]]
    assert sum(rank["loss"] for rank in ranks) / 2 == pytest.approx(loss.item(), rel=1e-6)
    for layer, logits in enumerate(alone):
        together = torch.cat([torch.tensor(rank["grads"][layer]) for rank in ranks]) / 2
        torch.testing.assert_close(together, logits.grad, rtol=1e-5, atol=1e-9)
    load = ExpertLoad(2)
    load.add(make_logits())
    assert ranks[0]["load"] == ranks[1]["load"] == load.take().load


def test_ranks_start_without_mlflow_and_the_compiler(two_ranks):
    assert two_ranks[1]["heavy"] == two_ranks[2]["heavy"] == []
