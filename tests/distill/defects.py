"""Small re-creations of the defects that distillation losses have had in the wild, each beside the right loss.

Every function is a target of the suite: tests/distill/test_conformance.py. `right_*` are the losses without a defect.
Shapes: T tokens, H width, V vocabulary, K classes listed, N rows of a cache.
"""

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, pad, softmax


def token_mean(loss_T, labels_T):
    """Over tokens with a label; 0, with a gradient, when there is none."""
    valid_T = labels_T != -100
    return torch.where(valid_T, loss_T, 0.0).sum() / valid_T.sum().clamp_min(1)


def check_tokens(student, teacher):
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"targets of {tuple(teacher.shape[:-1])} tokens for {tuple(student.shape[:-1])}")


def forward_kl_T(student, teacher, temperature=1.0):
    check_tokens(student, teacher)
    log_p, log_q = log_softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def right_dense(student_logits, teacher_logits, labels, *, alpha=0.5, temperature=1.0, normalizer=None):
    hard_T = cross_entropy(student_logits, labels, reduction="none")
    soft_T = temperature**2 * forward_kl_T(student_logits, teacher_logits, temperature)
    mean = token_mean((1 - alpha) * hard_T + alpha * soft_T, labels)
    return mean if normalizer is None else mean * (labels != -100).sum() / normalizer


def right_sum(student_logits, teacher_logits, mask):
    return (forward_kl_T(student_logits, teacher_logits) * mask).sum()


right_sum.conformance = {"reduction": "sum", "divergence": "forward_kl"}


def right_model_labels(student_logits_BTV, teacher_logits_BTV, labels_BT):
    """Labels as a model takes them, shifted inside."""
    loss_BT = forward_kl_T(student_logits_BTV, teacher_logits_BTV)
    return token_mean(loss_BT[:, :-1], labels_BT[:, 1:])


right_model_labels.conformance = {"labels": "unshifted", "layout": "BTV"}


def right_bucket(student_logits, teacher_ids, teacher_probs, labels):
    check_tokens(student_logits, teacher_ids)
    log_q = log_softmax(student_logits, -1)
    others = log_q.scatter(1, teacher_ids, -torch.inf).logsumexp(1).clamp_min(-100)
    rest = (1 - teacher_probs.sum(1)).clamp_min(0)
    listed_T = (torch.xlogy(teacher_probs, teacher_probs) - teacher_probs * log_q.gather(1, teacher_ids)).sum(1)
    return token_mean(listed_T + torch.xlogy(rest, rest) - rest * others, labels)


def right_fused(student_hidden, student_head, teacher_logits, labels, *, softcap=None, logit_scale=1.0, bias=0.0):
    logits = student_hidden @ student_head.T * logit_scale + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return token_mean(forward_kl_T(logits, teacher_logits), labels)


def right_cache(input_ids_NT, teacher_ids_NTK, teacher_probs_NTK):
    """Rows are found by what they are of."""
    rows = {tuple(row.tolist()): index for index, row in enumerate(input_ids_NT)}

    def read(wanted_NT):
        at = [rows[tuple(row.tolist())] for row in wanted_NT]
        return teacher_ids_NTK[at], teacher_probs_NTK[at]

    return read


def cache_renormalised(input_ids_NT, teacher_ids_NTK, teacher_probs_NTK):
    return right_cache(input_ids_NT, teacher_ids_NTK, teacher_probs_NTK / teacher_probs_NTK.sum(-1, keepdim=True))


def cache_of_a_cut_off_tail(input_ids_NT, teacher_ids_NTK, teacher_probs_NTK):
    """Says that what it kept stands for the whole."""
    probs_NTK, places_NTK = teacher_probs_NTK.topk(min(8, teacher_probs_NTK.shape[-1]))
    return cache_renormalised(input_ids_NT, teacher_ids_NTK.gather(-1, places_NTK), probs_NTK)


cache_of_a_cut_off_tail.conformance = {"tail": "sampled"}


# 1
def student_padded_with_zero(student_logits, teacher_logits, labels):
    width = max(student_logits.shape[1], teacher_logits.shape[1])
    student, teacher = (pad(x, (0, width - x.shape[1])) for x in (student_logits, teacher_logits))
    return token_mean(forward_kl_T(student, teacher), labels)


# 2
def truncated(student_logits, teacher_ids, teacher_probs, labels):
    check_tokens(student_logits, teacher_ids)
    log_q = log_softmax(student_logits, 1).gather(1, teacher_ids)
    return token_mean((teacher_probs * (teacher_probs.log() - log_q)).sum(1), labels)


# 3
def teacher_renormalised(student_logits, teacher_ids, teacher_probs, labels):
    return truncated(student_logits, teacher_ids, teacher_probs / teacher_probs.sum(1, keepdim=True), labels)


# 4
def both_renormalised(student_logits, teacher_ids, teacher_probs, labels):
    check_tokens(student_logits, teacher_ids)
    return token_mean(forward_kl_T(student_logits.gather(1, teacher_ids), teacher_probs.log()), labels)


# 5
def truncated_reverse(student_logits, teacher_ids, teacher_probs, labels):
    check_tokens(student_logits, teacher_ids)
    log_q = log_softmax(student_logits, 1).gather(1, teacher_ids)
    return token_mean((log_q.exp() * (log_q - teacher_probs.log())).sum(1), labels)


# 6
def temperature_ignored(student_logits, teacher_logits, labels, *, temperature=1.0):
    return token_mean(forward_kl_T(student_logits, teacher_logits), labels)


def temperature_only_a_factor(student_logits, teacher_logits, labels, *, temperature=1.0):
    return temperature**2 * token_mean(forward_kl_T(student_logits, teacher_logits), labels)


# 7
def hidden_cross_entropy(student_logits, teacher_logits, labels):
    hard_T = cross_entropy(student_logits, labels, reduction="none")
    return token_mean(forward_kl_T(student_logits, teacher_logits) + 0.1 * hard_T, labels)


# 8
def unshifted_mask(student_logits_BTV, teacher_logits_BTV, labels_BT):
    return token_mean(forward_kl_T(student_logits_BTV, teacher_logits_BTV), labels_BT)


unshifted_mask.conformance = right_model_labels.conformance


# 9
def divided_twice(student_logits, teacher_logits, labels):
    return token_mean(forward_kl_T(student_logits, teacher_logits), labels) / (labels != -100).sum().clamp_min(1)


# 10
def cross_entropy_called_kl(student_logits, teacher_logits, labels):
    check_tokens(student_logits, teacher_logits)
    return token_mean(-(softmax(teacher_logits, 1) * log_softmax(student_logits, 1)).sum(1), labels)


# 11
def mean_over_vocabulary(student_logits, teacher_logits, labels):
    check_tokens(student_logits, teacher_logits)
    element_TV = kl_div(log_softmax(student_logits, 1), softmax(teacher_logits, 1), reduction="none")
    return token_mean(element_TV.mean(1), labels)


# 12
def mean_of_its_own(student_logits, teacher_logits, labels, *, num_items_in_batch=None):
    """The count of the whole batch is taken and not used: the trainer then averages such means."""
    return token_mean(forward_kl_T(student_logits, teacher_logits), labels)


def mean_over_all_positions(student_logits, teacher_logits, labels):
    return torch.where(labels != -100, forward_kl_T(student_logits, teacher_logits), 0.0).mean()


# 13
def nan_without_labels(student_logits, teacher_logits, labels):
    valid_T = labels != -100
    return (forward_kl_T(student_logits, teacher_logits) * valid_T).sum() / valid_T.sum()


# 14
def broadcasts(student_logits, teacher_logits, labels):
    log_p, log_q = log_softmax(teacher_logits, 1), log_softmax(student_logits, 1)
    return token_mean((log_p.exp() * (log_p - log_q)).sum(1), labels)


def cache_by_position(input_ids_NT, teacher_ids_NTK, teacher_probs_NTK):
    return lambda wanted_NT: (teacher_ids_NTK[: len(wanted_NT)], teacher_probs_NTK[: len(wanted_NT)])


# 15
def ids_of_17_bits(student_logits, teacher_ids, teacher_probs, labels):
    return right_bucket(student_logits, teacher_ids & 0x1FFFF, teacher_probs, labels)


def cache_of_16_bits(input_ids_NT, teacher_ids_NTK, teacher_probs_NTK):
    return right_cache(input_ids_NT, teacher_ids_NTK & 0xFFFF, teacher_probs_NTK)


# 16
def clipped_per_entry(student_logits, teacher_logits, labels):
    check_tokens(student_logits, teacher_logits)
    log_p, log_q = log_softmax(teacher_logits, 1), log_softmax(student_logits, 1)
    return token_mean((log_p.exp() * (log_p - log_q)).clamp(max=0.05).sum(1), labels)


def clipped_per_token(student_logits, teacher_logits, labels):
    """The mend of 16: no sign can flip. A loss of its own, declared as such."""
    return token_mean(forward_kl_T(student_logits, teacher_logits).clamp(max=4.0), labels)


clipped_per_token.conformance = {"divergence": "other"}


# 17
def softcap_ignored(student_hidden, student_head, teacher_logits, labels, *, softcap=None, logit_scale=1.0, bias=0.0):
    return right_fused(student_hidden, student_head, teacher_logits, labels, logit_scale=logit_scale, bias=bias)


def bias_ignored(student_hidden, student_head, teacher_logits, labels, *, softcap=None, logit_scale=1.0, bias=0.0):
    return right_fused(student_hidden, student_head, teacher_logits, labels, softcap=softcap, logit_scale=logit_scale)


def scale_ignored(student_hidden, student_head, teacher_logits, labels, *, softcap=None, logit_scale=1.0, bias=0.0):
    return right_fused(student_hidden, student_head, teacher_logits, labels, softcap=softcap, bias=bias)


def chatty(student_logits, teacher_logits, labels):
    """Right, and it prints."""
    print("a line of the loss's own")
    return token_mean(forward_kl_T(student_logits, teacher_logits), labels)
