"""The sparse experts equal transformers' own: values, every gradient, decoding, and what hangs on the modules."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextMoe

from herd.llama4.experts import GroupedSwiglu, SparseMoe, place_rows, use_sparse_experts
from herd.llama4.model import build
from herd.llama4.specs import SPECS
from herd.run.errors import ConfigError

FP32_TOLERANCE = 1e-5
BF16_TOLERANCE = 2e-2  # two roundings of a sum taken in another order; bf16 keeps 8 bits


def make_pair(*, experts=16, top_k=1, dtype=torch.float32, seed=0):
    """Return transformers' layer with non-zero random weights, and a sparse copy of it."""
    config = SPECS["scout-nano"].config(
        num_local_experts=experts, num_experts_per_tok=top_k, hidden_size=64, intermediate_size=96
    )
    generator = torch.Generator().manual_seed(seed)
    dense = Llama4TextMoe(config)
    for parameter in dense.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    return dense, use_sparse_experts(nn.ModuleList([copy.deepcopy(dense)]))[0]


def run(moe, x, weight_out, weight_logits):
    """Return outputs and every gradient of a scalar that depends on both outputs of the layer."""
    moe.zero_grad()
    x = x.clone().requires_grad_()
    out, logits = moe(x)
    ((out * weight_out).sum() + (logits * weight_logits).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in moe.named_parameters()}
    return {"out": out.detach(), "logits": logits.detach(), "input": x.grad, **gradients}


def relative_error(got, expected):
    scale = expected.float().abs().max().clamp_min(1e-30)
    return ((got.float() - expected.float()).abs().max() / scale).item()


@pytest.mark.parametrize("experts", [1, 16, 128])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32_TOLERANCE), (torch.bfloat16, BF16_TOLERANCE)])
def test_values_and_all_gradients_equal_transformers(experts, top_k, dtype, tolerance):
    if top_k > experts:
        top_k = experts
    dense, sparse = make_pair(experts=experts, top_k=top_k, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    x, weight_out = (torch.randn(150, 64, generator=generator).to(dtype) for _ in range(2))
    weight_logits = torch.randn(150, experts, generator=generator).to(dtype)
    expected, got = run(dense, x, weight_out, weight_logits), run(sparse, x, weight_out, weight_logits)
    assert got.keys() == expected.keys() and "router.weight" in got
    for name in expected:
        assert got[name].dtype == expected[name].dtype and got[name].shape == expected[name].shape, name
        assert expected[name].abs().max() > 0, name
        assert relative_error(got[name], expected[name]) <= tolerance, name


def test_the_router_learns_through_its_scores_alone():
    dense, sparse = make_pair()
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for moe in (dense, sparse):
        moe(x)[0].square().sum().backward()
        gradients.append(moe.router.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    assert relative_error(gradients[1], gradients[0]) <= FP32_TOLERANCE


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    frozen=st.sets(st.integers(0, 2), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_grouped_swiglu_equals_a_float64_loop_whatever_is_empty_or_frozen(counts, seed, frozen):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(counts), 8), (len(counts), 8, 12), (len(counts), 6, 8))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index not in frozen)
    learning = [tensor for tensor in tensors if tensor.requires_grad]
    rows, gate_up, down = tensors
    reference = [
        (nn.functional.silu(part @ weight[:, :6]) * (part @ weight[:, 6:])) @ out
        for part, weight, out in zip(rows.split(counts), gate_up, down, strict=True)
    ]
    grad = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    got = GroupedSwiglu.apply(rows, gate_up, down, counts)
    torch.testing.assert_close(got, torch.cat(reference))
    expected_gradients = torch.autograd.grad(torch.cat(reference), learning, grad)
    torch.testing.assert_close(torch.autograd.grad(got, learning, grad), expected_gradients)


@given(experts=st.lists(st.integers(0, 5), max_size=40), step=st.sampled_from([1, 4, 16]))
@settings(max_examples=60, deadline=None)
def test_rows_stand_expert_by_expert_in_their_order_with_padding_last(experts, step):
    place_N, counts = place_rows(torch.tensor(experts, dtype=torch.int64), 6, step=step)
    expected, start = {}, 0
    for expert in range(6):
        rows = [row for row, chosen in enumerate(experts) if chosen == expert]
        assert counts[expert] == -(-len(rows) // step) * step
        expected |= {row: start + rank for rank, row in enumerate(rows)}
        start += counts[expert]
    assert place_N.tolist() == [expected[row] for row in range(len(experts))]


def test_a_gradient_that_is_expanded_or_strided_is_accepted():
    _, sparse = make_pair()
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(3))
    sparse(x)[0].sum().backward()
    by_sum = sparse.experts.down_proj.grad.clone()
    sparse.zero_grad()
    sparse(x)[0].t().contiguous().t().backward(torch.ones(64, 30).t())
    assert relative_error(sparse.experts.down_proj.grad, by_sum) <= FP32_TOLERANCE


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tokens", [1, 7])
def test_without_gradients_and_for_a_single_token_the_values_hold(mode, tokens):
    dense, sparse = make_pair()
    x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(4))
    with mode():
        assert relative_error(sparse(x)[0], dense(x)[0]) <= FP32_TOLERANCE


@pytest.mark.parametrize("name", ["scout-nano", "maverick-nano"])
def test_a_whole_model_keeps_logits_names_recorded_router_logits_and_gradients(name):
    dense = build(name, overrides={"vocab_size": 512}, seed=0)
    sparse = use_sparse_experts(copy.deepcopy(dense))
    tokens = torch.randint(512, (2, 160), generator=torch.Generator().manual_seed(0))
    outputs = [model(tokens, labels=tokens, output_router_logits=True) for model in (dense, sparse)]
    assert relative_error(outputs[1].logits, outputs[0].logits) <= FP32_TOLERANCE
    moe_layers = len(dense.config.moe_layers)
    assert len(outputs[0].router_logits) == len(outputs[1].router_logits) == moe_layers
    for one, two in zip(outputs[0].router_logits, outputs[1].router_logits, strict=True):
        assert relative_error(two, one) <= FP32_TOLERANCE
    for output in outputs:
        output.loss.backward()
    for (one_name, one), (two_name, two) in zip(dense.named_parameters(), sparse.named_parameters(), strict=True):
        assert one_name == two_name
        assert relative_error(two.grad, one.grad) <= 10 * FP32_TOLERANCE, one_name  # four layers of rounding


def test_generation_with_a_cache_chooses_the_same_tokens():
    dense = build("maverick-nano", overrides={"vocab_size": 512, "eos_token_id": None}, seed=0).eval()
    sparse = use_sparse_experts(copy.deepcopy(dense))
    prompt = torch.randint(512, (2, 130), generator=torch.Generator().manual_seed(1))
    texts = [m.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0) for m in (dense, sparse)]
    assert torch.equal(*texts)


def test_hooks_and_parameters_survive_and_twice_is_once():
    model = build("scout-nano", overrides={"vocab_size": 512}, seed=0)
    before, seen = dict(model.named_parameters()), []
    layer = model.model.layers[0].feed_forward
    layer.register_forward_hook(lambda module, args, output: seen.append(module))
    use_sparse_experts(use_sparse_experts(model))
    model(torch.zeros(1, 4, dtype=torch.long))
    assert seen == [layer] and isinstance(layer, SparseMoe) and isinstance(layer.router, Llama4Router)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    model = use_sparse_experts(build("scout-nano", overrides={"vocab_size": 512}, seed=0)).train()
    tokens = torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    for expected, parameter in zip(plain, model.parameters(), strict=True):
        assert torch.equal(expected, parameter.grad)


def test_other_activations_are_refused_and_other_models_left_alone():
    model = build("scout-nano", overrides={"vocab_size": 512, "hidden_act": "gelu"}, seed=0)
    with pytest.raises(ConfigError, match="silu"):
        use_sparse_experts(model)
    plain = nn.Linear(2, 2)
    assert use_sparse_experts(plain) is plain
