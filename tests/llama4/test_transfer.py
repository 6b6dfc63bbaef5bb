"""Rules of transfer against the paper's table, the algebra of folded branches, and what activations do over width."""

import math

import pytest
import torch
from torch.nn import functional

from herd.llama4 import SPECS, build
from herd.llama4.transfer import Horizon, Rule, betas, scale_weights, scales
from herd.run.errors import ConfigError

TOKENS = {"vocab_size": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SIZES = TOKENS | {"num_local_experts": 4, "head_dim": 16, "max_position_embeddings": 128}


def sized(width: int, depth: int = 2) -> dict:
    heads = width // 16
    return SIZES | {
        "hidden_size": width,
        "intermediate_size": width,
        "intermediate_size_mlp": 2 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "num_hidden_layers": depth,
    }


def config(width: int, depth: int = 2, spec: str = "scout-nano"):
    return SPECS[spec].config(**sized(width, depth))


def test_a_model_carried_to_itself_changes_nothing():
    assert set(scales(config(64), config(64)).values()) == {Rule()}


@pytest.mark.parametrize("spec", ["scout-nano", "maverick-nano"])
def test_width_and_depth_follow_the_papers_table(spec):
    rules = scales(config(64, 4, spec), config(256, 8, spec))
    layer = "model.layers.1."
    assert rules["model.embed_tokens.weight"] == Rule(eps=1 / 4)
    assert rules["model.norm.weight"] == Rule()
    assert rules["lm_head.weight"] == Rule(init=1 / 4, lr=1 / 4, weight_decay=4)
    assert rules[layer + "input_layernorm.weight"] == Rule(eps=1 / 2)
    assert rules[layer + "self_attn.q_proj.weight"] == Rule(init=1 / 2, lr=1 / 4, eps=1 / 8, weight_decay=4)
    # Folded: the branch's 1 / m_L sits in the matrix.
    assert rules[layer + "self_attn.o_proj.weight"] == Rule(init=1 / 4, lr=1 / 8, eps=1 / 4, weight_decay=8)
    assert rules[layer + "feed_forward.router.weight"] == Rule(init=1 / 4, lr=1 / 4, weight_decay=4)
    assert rules[layer + "feed_forward.experts.gate_up_proj"] == rules[layer + "self_attn.q_proj.weight"]
    assert rules[layer + "feed_forward.experts.down_proj"] == rules[layer + "self_attn.o_proj.weight"]
    assert rules[layer + "feed_forward.shared_expert.down_proj.weight"] == rules[layer + "self_attn.o_proj.weight"]


def test_batch_and_tokens_scale_rate_epsilon_decay_and_averages():
    horizon = Horizon(batch=4.0, tokens=64.0, exponent=0.5, averages="run")
    rule = scales(config(64), config(64), horizon)["lm_head.weight"]
    assert (rule.lr, rule.eps, rule.weight_decay) == pytest.approx((1 / 4, 4, 1 / 4))
    assert betas((0.9, 0.95), horizon) == pytest.approx((1 - 0.1 / 16, 1 - 0.05 / 16))
    assert betas((0.9, 0.95), Horizon(batch=4.0, tokens=64.0)) == pytest.approx((1 - 0.1 * 4, 1 - 0.05 * 4))
    assert betas((0.9, 0.3), Horizon(batch=100.0)) == pytest.approx((0.5, 0.3))  # two steps at least
    assert Horizon(tokens=100.0, exponent=0.3).lr == pytest.approx(100**-0.3)


def test_a_folded_branch_is_the_branch_at_every_step_of_adamw():
    torch.manual_seed(0)
    factor, rate, eps, decay = 1 / 7, 0.03, 1e-3, 0.2
    plain = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    folded = (factor * plain.detach()).requires_grad_()
    one = torch.optim.AdamW([plain], lr=rate, eps=eps, weight_decay=decay)
    two = torch.optim.AdamW([folded], lr=rate * factor, eps=eps / factor, weight_decay=decay / factor)
    for _ in range(20):
        input_TK, wanted_TN = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
        for optimiser, output_TN in ((one, factor * input_TK @ plain.T), (two, input_TK @ folded.T)):
            optimiser.zero_grad()
            (output_TN - wanted_TN).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(folded, factor * plain, rtol=1e-12, atol=1e-12)


def moved(width: int, depth: int, *, ruled: bool) -> float:
    """Root mean square change of the logits after four steps of AdamW at a large rate."""
    model = build("scout-nano", overrides=sized(width, depth), seed=1)
    rules = scales(config(64, 2), config(width, depth)) if ruled else {}
    if ruled:
        scale_weights(model, rules)
    groups = [
        {"params": [p], "lr": 0.01 * (rule := rules.get(name, Rule())).lr, "eps": 1e-8 * rule.eps}
        for name, p in model.named_parameters()
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    tokens_BT = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=tokens_BT).logits
    for _ in range(4):
        optimiser.zero_grad()
        logits_BTV = model(input_ids=tokens_BT).logits
        functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
        optimiser.step()
    with torch.no_grad():
        return (model(input_ids=tokens_BT).logits - before).square().mean().sqrt().item()


def test_logits_move_alike_over_width_and_depth_under_the_rules_and_faster_with_width_without():
    small = moved(64, 2, ruled=True)
    assert abs(math.log2(moved(256, 2, ruled=True) / small)) < 0.6
    assert abs(math.log2(moved(64, 8, ruled=True) / small)) < 0.6
    assert math.log2(moved(256, 2, ruled=False) / small) > 1.0


def test_tied_embeddings_are_refused_with_the_mend():
    tied = SPECS["scout-nano"].config(**sized(64), tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="tie_word_embeddings: false"):
        scales(tied, tied)


def test_models_of_different_kinds_are_refused():
    with pytest.raises(ConfigError, match="no tensor like"):
        scales(config(64, 2, "scout-nano"), config(64, 2, "maverick-nano"))
