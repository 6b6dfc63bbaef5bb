"""Transfer in the trainer: what the optimiser is given, and that identity changes no bit."""

import pytest

from distill.learner import Learner, parameter_groups
from herd.llama4 import build
from herd.llama4.transfer import scales
from tests.llama4.test_transfer import config, sized


def groups_of(model, rules):
    learner = Learner(model)
    return learner, parameter_groups(learner, weight_decay=0.1, eps=1e-8, rules=rules)


def test_every_parameter_is_in_one_group_with_its_own_factors():
    rules = scales(config(64, 2), config(128, 4))
    learner, groups = groups_of(build("scout-nano", overrides=sized(128, 4), seed=0), rules)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(learner.parameters()))
    for name, parameter in learner.model.named_parameters():
        rule, group = rules[name], found[id(parameter)]
        assert (group["lr_factor"], group["eps"]) == pytest.approx((rule.lr, 1e-8 * rule.eps))
        decays = parameter.dim() >= 2 and "embed_tokens" not in name
        assert group["weight_decay"] == pytest.approx(0.1 * rule.weight_decay if decays else 0.0)


def test_without_rules_there_are_the_two_usual_groups():
    _, groups = groups_of(build("scout-nano", overrides=sized(64), seed=0), None)
    assert [(group["weight_decay"], group["lr_factor"], group["eps"]) for group in groups] == [
        (0.1, 1, 1e-8),
        (0, 1, 1e-8),
    ]
