"""How a foreign loss is called, read from its signature: which argument is which, by name.

    arguments = read_signature(loss)        # {"student_logits": Parameter(logits_TV), "temperature": ...}

A shape suffix (`_TV`) is dropped; NAMES lists what is understood under which names. No torch.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from herd.run.errors import ConfigError

NAMES: Mapping[str, tuple[str, ...]] = {
    "student_logits": ("logits",),
    "student_hidden": ("hidden", "student_input"),
    "student_head": ("head", "student_weight"),
    "student_bias": ("bias",),
    "teacher_logits": ("target_logits",),
    "teacher_hidden": ("teacher_input",),
    "teacher_head": ("teacher_weight",),
    "teacher_bias": (),
    "teacher_ids": ("ids", "target_ids", "topk_ids", "teacher_topk_ids"),
    "teacher_probs": ("probs", "target_probs", "teacher_topk_probs"),
    "teacher_logprobs": ("teacher_log_probs", "target_values", "teacher_topk_log_probs"),
    "labels": ("targets", "target", "true_labels"),
    "mask": ("loss_mask",),
    "input_ids": (),
    "alpha": (),
    "temperature": ("tau",),
    "divergence": (),
    "ignore_index": (),
    "normalizer": ("normaliser", "num_items_in_batch"),
    "chunk_tokens": ("chunk_size", "chunk_length"),
    "reduction": (),
    "softcap": ("logit_softcap", "final_logit_softcapping"),
    "logit_scale": (),
}
TEACHERS = ("teacher_logits", "teacher_probs", "teacher_logprobs", "teacher_hidden")


def read_signature(call: Callable[..., Any], name: str) -> dict[str, inspect.Parameter]:
    """Our name of each argument -> the loss's own parameter, in its order.

    Raises ConfigError for an argument that is required and not understood, and when the arguments are those of no loss.
    """
    known = {other: ours for ours, others in NAMES.items() for other in (ours, *others)}
    found: dict[str, inspect.Parameter] = {}
    for parameter in _parameters(call, name):
        ours = known.get(re.sub(r"_[A-Z]+$", "", parameter.name))
        if ours is not None and ours not in found:
            found[ours] = parameter
        elif parameter.default is parameter.empty:
            raise ConfigError(
                f"--target {name}: its argument {parameter.name} is not understood; give it a default, or wrap the "
                f"loss in a function that takes some of {', '.join(NAMES)}"
            )
    return _one_teacher(found, name)


def _parameters(call: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    if inspect.isclass(call) or not callable(call):
        what = "a class" if inspect.isclass(call) else "no function"
        raise ConfigError(f"--target {name}: is {what}; name a function, or an object that can be called")
    # A torch module is called through its forward, whose arguments are the ones that count.
    described = getattr(call, "forward", call)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one for one in inspect.signature(described).parameters.values() if one.kind not in variadic]


def _one_teacher(found: dict[str, inspect.Parameter], name: str) -> dict[str, inspect.Parameter]:
    """Leave one form of teacher where several can be given: a required one, else the first of TEACHERS."""
    required = {ours for ours, parameter in found.items() if parameter.default is parameter.empty}
    if "teacher_ids" in found and "teacher_logits" in found and "teacher_ids" not in required:
        del found["teacher_ids"]
    usable = TEACHERS[1:3] if "teacher_ids" in found else TEACHERS
    offered = sorted((ours for ours in usable if ours in found), key=lambda ours: ours not in required)
    student = "student_logits" in found or {"student_hidden", "student_head"} <= found.keys()
    if not offered or not (student or {"input_ids", "teacher_ids"} <= found.keys()):
        raise ConfigError(
            f"--target {name}: takes {', '.join(found) or 'nothing that is understood'}; a loss takes student_logits "
            "(or student_hidden, student_head) and teacher_logits (or teacher_hidden, teacher_head, or teacher_ids, "
            "teacher_probs)"
        )
    spare = {ours for ours in TEACHERS if ours not in offered[:1]}
    return {ours: parameter for ours, parameter in found.items() if ours in required or ours not in spare}
