"""The chunk's work through torch.compile: as written, for any sizes, with and without a compiler, and on a GPU."""

from functools import cache

import pytest
import torch
from torch import _dynamo, _inductor
from torch._dynamo.utils import counters

from distill.losses import (
    DenseTargets,
    LinearTargets,
    SparseTargets,
    distillation_from_logits,
    fused_linear_distillation,
    kernel,
)
from distill.losses.compiled import compiled, fused
from distill.losses.divergences import NAMES


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    # Every compiler knows AVX2, or no vectors; to try which of five sets it knows takes half of the tests' time.
    with _inductor.config.patch({"cpp.vec_isa_ok": True, "cpp.simdlen": 256}):
        yield
    _dynamo.reset()
    compiled.cache_clear()


def make_problem(tokens, vocabulary=40, width=6, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(tokens)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    hidden, head = draw(tokens, width).requires_grad_(), draw(vocabulary, width).requires_grad_()
    labels = torch.randint(0, vocabulary - 3, (tokens,), generator=generator)
    labels[1] = -100
    return hidden, head, labels.to(device), LinearTargets(draw(tokens, width), draw(vocabulary, width))


def loss_and_gradients(tokens, vocabulary):
    hidden, head, labels, teacher = make_problem(tokens, vocabulary)
    out = fused_linear_distillation(hidden, head, labels, teacher, alpha=0.6, chunk_tokens=8)
    return out.loss, out.stats_ST, *torch.autograd.grad(out.loss, (hidden, head))


def masked_loss_and_gradient():
    hidden, head, labels, teacher = make_problem(9)
    logits, targets = (hidden @ head.T).detach(), teacher.hidden_TG @ teacher.head_VG.T
    logits[:, -3:] = targets[:, -3:] = -torch.inf
    out = distillation_from_logits(logits.requires_grad_(), labels, DenseTargets(targets), alpha=0.6)
    return out.loss, out.stats_ST, *torch.autograd.grad(out.loss, logits)


def test_compiled_equals_eager_and_new_sizes_are_not_compiled_again(monkeypatch):
    sizes = [(16, 40), (21, 40), (40, 56), (13, 64), (30, 24)]
    eager = [loss_and_gradients(*size) for size in sizes], masked_loss_and_gradient()
    monkeypatch.setattr(kernel, "fused", lambda function, on: compiled(function))
    seen = []
    for size, expected in zip(sizes, eager[0], strict=True):
        for mine, theirs in zip(loss_and_gradients(*size), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        seen.append(counters["stats"]["unique_graphs"])
    assert seen == [2] * len(sizes)
    for mine, theirs in zip(masked_loss_and_gradient(), eager[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_every_kind_of_targets_is_one_graph_and_a_setting_is_never_taken_for_another(monkeypatch):
    hidden, head, labels, teacher = make_problem(16)
    logits = teacher.hidden_TG @ teacher.head_VG.T
    (probs, ids), zeros = torch.softmax(logits, 1).topk(6, dim=1), torch.zeros(16)
    bucket = SparseTargets(ids, probs, "bucket", zeros, zeros, present_T=torch.arange(16) % 3 > 0)
    sampled = SparseTargets(ids, probs / probs.sum(1, keepdim=True), "sampled", zeros, zeros)
    cases = [(DenseTargets(logits), {"divergence": "jsd", "parameter": beta}) for beta in (0.3, 0.7)]
    cases += [(bucket, {"divergence": "skew_kl"}), (sampled, {}), (None, {"label_smoothing": 0.1})]

    def answers():
        losses = [fused_linear_distillation(hidden, head, labels, one, chunk_tokens=8, **o).loss for one, o in cases]
        return [(loss, *torch.autograd.grad(loss, (hidden, head))) for loss in losses]

    expected = answers()
    one_graph = cache(lambda function: torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True))
    monkeypatch.setattr(kernel, "fused", lambda function, on: one_graph(function))
    for mine, theirs in zip(answers(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_a_cpu_runs_functions_as_they_are_written():
    assert fused(torch.sin, torch.zeros(1)) is torch.sin


def test_without_a_compiler_the_function_itself_runs_after_one_line(capsys):
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)

    x = torch.arange(4.0)
    with _inductor.config.patch({"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}):
        compiled(twice)(x)
        compiled(twice)(x)
    assert x.tolist() == [0.0, 4.0, 8.0, 12.0]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: twice cannot be compiled and runs slower: ")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["linear", "dense", "bucket", "none"])
def test_a_gpu_gives_the_loss_and_gradients_of_the_cpu(name, dtype, targets):
    answers = []
    for device in ("cpu", "cuda"):
        hidden, head, labels, teacher = make_problem(700, 3000, 64, dtype, device)
        if targets in ("dense", "bucket"):
            teacher = DenseTargets(teacher.hidden_TG @ teacher.head_VG.T)
        if targets == "bucket":
            probs, ids = torch.softmax(teacher.logits_TV.float(), 1).topk(20, dim=1)
            teacher = SparseTargets(ids, probs, "bucket", *(torch.zeros(len(ids), device=device),) * 2)
        teacher = None if targets == "none" else teacher
        out = fused_linear_distillation(hidden, head, labels, teacher, alpha=0.6, divergence=name, z_loss=1e-3)
        answers.append([x.cpu().float() for x in (out.loss, *torch.autograd.grad(out.loss, (hidden, head)))])
    for mine, theirs in zip(*answers, strict=True):
        error = (mine - theirs).norm() / theirs.norm()
        assert error < (1e-4 if dtype == torch.float32 else 2e-2)
