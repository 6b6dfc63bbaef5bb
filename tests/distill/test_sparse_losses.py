"""Losses on sparse targets: against the whole distribution, against the definition, and what must be refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import DenseTargets, SparseTargets, distillation_from_logits, fused_linear_distillation
from distill.losses.divergences import NAMES, divergence
from herd.run.errors import ConfigError

V = 17


def make_problem(seed, tokens=9, width=5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(0, V, (tokens,), generator=generator)
    labels[3] = -100
    return draw(tokens, width).requires_grad_(), draw(V, width).requires_grad_(), labels, 2 * draw(tokens, V)


def top_k(teacher_TV, k, *, temperature=1.0, unused=0):
    p = torch.softmax(teacher_TV / temperature, 1)
    probs, ids = p.topk(k, dim=1)
    ids, probs = (torch.nn.functional.pad(x, (0, unused), value=fill) for x, fill in ((ids, -1), (probs, 0.0)))
    entropy = -(p * p.log()).sum(1)
    return SparseTargets(ids, probs, "bucket", entropy, torch.ones(len(ids)).double(), temperature)


def sampled(teacher_TV, draws, generator, temperature=1.0):
    """Plain random sampling: `draws` classes from p, each 1 / draws."""
    p = torch.softmax(teacher_TV / temperature, 1)
    ids = torch.multinomial(p, draws, replacement=True, generator=generator)
    counts = torch.zeros_like(p).scatter_add_(1, ids, torch.ones_like(ids, dtype=p.dtype))
    probs, ids = counts.topk(min(draws, V), dim=1)
    entropy = -(p * p.log()).sum(1)
    return SparseTargets(torch.where(probs > 0, ids, -1), probs / draws, "sampled", entropy, entropy, temperature)


def coarse(z_TV, targets):
    """Log-probabilities of the listed classes and of the rest, for autograd."""
    log_q = torch.log_softmax(z_TV / targets.temperature, 1)
    listed = torch.zeros_like(log_q, dtype=torch.bool).scatter_(1, targets.ids_TK, True)
    rest = log_q.masked_fill(listed, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat((log_q.gather(1, targets.ids_TK), rest), 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), k=st.integers(1, V - 1), unused=st.integers(0, 2))
def test_bucket_equals_the_divergence_of_coarse_distributions_under_autograd(name, temperature, seed, k, unused):
    hidden, head, labels, teacher = make_problem(seed)
    targets = top_k(teacher, k, temperature=temperature)
    valid = (labels != -100).double()
    # By finite differences of the value: independent of every gradient formula.
    log_p = torch.cat((targets.probs_TK, 1 - targets.probs_TK.sum(1, keepdim=True)), 1).log()
    padded = top_k(teacher, k, temperature=temperature, unused=unused)
    loss = lambda h, w: fused_linear_distillation(  # noqa: E731
        h, w, labels, padded, alpha=1.0, temperature=temperature, divergence=name, chunk_tokens=4
    )
    value = divergence(name)(coarse(hidden.detach() @ head.detach().T, targets), log_p)[0]
    out = loss(hidden, head)
    expected = temperature**2 * (value * valid).sum() / valid.sum()
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-9, atol=1e-11)
    if name == "adaptive_kl":
        return  # its weights are constants to the gradient, so the value's slope is another
    direction = torch.randn_like(hidden)
    step = 1e-6
    slope = (loss(hidden + step * direction, head).loss - loss(hidden - step * direction, head).loss) / (2 * step)
    gradient = torch.autograd.grad(out.loss, hidden)[0]
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-5, atol=1e-7)


@given(seed=st.integers(0, 10_000), k=st.integers(1, V))
@settings(max_examples=30, deadline=None)
def test_a_bucket_never_sees_more_than_the_whole_and_all_of_it_when_everything_is_listed(seed, k):
    hidden, head, labels, teacher = make_problem(seed)
    whole = fused_linear_distillation(hidden, head, labels, DenseTargets(teacher), alpha=1.0)
    part = fused_linear_distillation(hidden, head, labels, top_k(teacher, k), alpha=1.0)
    assert -1e-12 <= part.loss <= whole.loss + 1e-12  # data-processing inequality
    if k >= V - 1:
        torch.testing.assert_close(part.loss, whole.loss)
        for mine, theirs in zip(*(torch.autograd.grad(x.loss, (hidden, head)) for x in (part, whole)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampled_targets_have_the_expected_value_and_gradient_of_the_whole(temperature):
    hidden, head, labels, teacher = make_problem(4)
    settings_ = {"alpha": 0.8, "temperature": temperature}
    whole = fused_linear_distillation(hidden, head, labels, DenseTargets(teacher), **settings_)
    expected = torch.autograd.grad(whole.loss, head)[0]
    generator, values, gradients = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        out = fused_linear_distillation(hidden, head, labels, sampled(teacher, 12, generator, temperature), **settings_)
        values.append(out.loss.detach())
        gradients.append(torch.autograd.grad(out.loss, head)[0])
    for draws, truth in ((torch.stack(values), whole.loss.detach()), (torch.stack(gradients), expected)):
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - truth).abs() <= 5 * error + 1e-12).all()


def test_a_token_without_target_has_the_plain_cross_entropy():
    hidden, head, labels, teacher = make_problem(5)
    targets = top_k(teacher, 4)
    present = torch.arange(len(labels)) % 2 == 0
    ids = torch.where(present[:, None], targets.ids_TK, -1)
    probs = torch.where(present[:, None], targets.probs_TK, 0.0)
    some = SparseTargets(ids, probs, "bucket", targets.entropy_T, targets.ce_T, 1.0, present)
    out = fused_linear_distillation(hidden, head, labels, some, alpha=0.7)
    mixed = fused_linear_distillation(hidden, head, labels, targets, alpha=torch.where(present, 0.7, 0.0))
    torch.testing.assert_close(out.loss, mixed.loss)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, hidden)[0] for x in (out, mixed)))


@pytest.mark.parametrize("case", ["dense", "tempered", "reverse", "bucket", "bucket tempered", "sampled", "sampled t"])
def test_gradient_products_are_those_of_the_gradients(case):
    hidden, head, labels, teacher = make_problem(6)
    logits, seen = (hidden @ head.T).detach(), []
    temperature = 1.6 if case in ("tempered", "bucket tempered", "sampled t") else 1.0
    name = "reverse_kl" if case == "reverse" else "forward_kl"
    if case.startswith("bucket"):
        targets = top_k(teacher, 5, temperature=temperature)
    elif case.startswith("sampled"):
        targets = sampled(teacher, 8, torch.Generator().manual_seed(1), temperature)
    else:
        targets = DenseTargets(teacher)

    def gradient(alpha):
        leaf = logits.clone().requires_grad_()
        out = distillation_from_logits(
            leaf, labels, targets, alpha=alpha, temperature=temperature, divergence=name, normalizer=1.0
        )
        return torch.autograd.grad(out.loss, leaf)[0]

    def watch(tokens):
        seen.append(tokens.products())
        return torch.full_like(tokens.student_ce, 0.5)

    gradient(watch)
    soft, hard, valid = gradient(1.0), gradient(0.0), labels != -100
    for name, theirs in (("soft", soft * soft), ("hard", hard * hard), ("cross", soft * hard)):
        mine, theirs = torch.cat([getattr(products, name) for products in seen]), theirs.sum(1)
        torch.testing.assert_close(mine[valid], theirs[valid], rtol=1e-9, atol=1e-11)


def test_label_smoothing_and_z_loss_equal_torch():
    hidden, head, labels, teacher = make_problem(7)
    logits = hidden @ head.T
    out = fused_linear_distillation(
        hidden, head, labels, DenseTargets(teacher), alpha=0.4, label_smoothing=0.1, z_loss=1e-2, temperature=2.0
    )
    valid = labels != -100
    hard = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    p, log_q = torch.softmax(teacher / 2, 1), torch.log_softmax(logits / 2, 1)
    soft = 4 * torch.nn.functional.kl_div(log_q[valid], p[valid], reduction="batchmean")
    expected = 0.6 * hard + 0.4 * soft + 1e-2 * logits.logsumexp(1)[valid].square().mean()
    torch.testing.assert_close(out.loss, expected)
    for mine, theirs in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (out.loss, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_targets_a_loss_cannot_read_are_refused():
    hidden, head, labels, teacher = make_problem(8)
    with pytest.raises(ConfigError, match=r"made at 2\.0"):
        fused_linear_distillation(hidden, head, labels, top_k(teacher, 3, temperature=2.0))
    draws = sampled(teacher, 4, torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="use forward_kl"):
        fused_linear_distillation(hidden, head, labels, draws, divergence="reverse_kl")
