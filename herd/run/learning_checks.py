"""Rules between fields that say what students learn from: loss, weight, teacher, its cache, the objective.

for line in faults(config): ...
"""

from collections.abc import Iterator

from herd.run.schema import Config, OnPolicy

WITH_PARAMETER = ("jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl")
LEAST_PROBES = 8


def faults(config: Config) -> Iterator[str]:
    """One line for each rule this configuration breaks."""
    yield from _loss_faults(config)
    yield from _weighting_faults(config)
    yield from _teaching_faults(config)
    yield from _cache_faults(config)
    if isinstance(config.objective, OnPolicy):
        yield from _on_policy_faults(config, config.objective)


def _loss_faults(config: Config) -> Iterator[str]:
    name, parameter = config.loss.divergence, config.loss.divergence_parameter
    if parameter is not None and name not in WITH_PARAMETER:
        yield (
            f"loss.divergence_parameter = {parameter:g}: {name} has none; leave it out, or set loss.divergence to one "
            f"of {', '.join(WITH_PARAMETER)}"
        )
    if parameter == 1 and name.startswith("skew"):
        yield f"loss.divergence_parameter = 1: {name} is zero everywhere at 1; use less"


def _on_policy_faults(config: Config, objective: OnPolicy) -> Iterator[str]:
    length = config.data.sequence_length
    if objective.prompt_tokens >= length:
        yield (
            f"objective.prompt_tokens = {objective.prompt_tokens}: leaves nothing to write in rows of "
            f"data.sequence_length = {length}; lower it or lengthen the rows"
        )
    if config.teacher.mode not in ("codistill", "frozen"):
        yield (
            f"objective.kind = on_policy: with teacher.mode = {config.teacher.mode} nothing can score what a student "
            "writes; set teacher.mode to codistill or frozen"
        )
    for field in ("features", "cross_tokenizer"):
        if getattr(config.loss, field):
            yield f"objective.kind = on_policy: loss.{field} compares read rows only; remove it, or the objective"
    if config.parallel.zero == 3 and config.parallel.expert_parallel > 1:
        yield (
            f"objective.kind = on_policy: parallel.zero = 3 with parallel.expert_parallel = "
            f"{config.parallel.expert_parallel} keeps a student nowhere whole to write with; set one of them lower"
        )


def _cache_faults(config: Config) -> Iterator[str]:
    mode, cached = config.teacher.mode, config.teacher.cache
    if mode == "cached" and cached is None and not config.teacher.routes:
        yield "teacher.mode = cached: needs teacher.cache.path, the folder of a cache (python -m teachers cache --help)"
    if cached is None:
        return
    if mode == "none":
        yield "teacher.cache: there are no targets to write (teacher.mode = none); remove it or set mode to cached"
    if mode != "cached" and cached.missing != "refuse":
        yield f"teacher.cache.missing = {cached.missing}: only teacher.mode = cached reads; leave it out"
    if config.loss.cross_tokenizer is not None:
        yield "teacher.cache: spans of two tokenizers are not cached; remove it or loss.cross_tokenizer"


def _teaching_faults(config: Config) -> Iterator[str]:
    """What a student cannot learn from this kind of teacher."""
    loss, mode = config.loss, config.teacher.mode
    if loss.features and mode not in ("codistill", "frozen"):
        yield f"loss.features: needs a teacher that runs; set teacher.mode to codistill or frozen (it is {mode})"
    for place, feature in enumerate(loss.features):
        for name in sorted(set(feature.students or ()) - set(config.students)):
            yield f"loss.features.{place}.students: no student is called {name}; there are {', '.join(config.students)}"
    if loss.cross_tokenizer is None:
        return
    if mode != "frozen":
        yield f"loss.cross_tokenizer: only a frozen teacher can have its own tokenizer; teacher.mode is {mode}"
    if loss.features:
        yield "loss.features: tokens of two tokenizers cannot be compared one by one; remove it or loss.cross_tokenizer"
    if loss.temperature != 1.0:
        yield f"loss.temperature = {loss.temperature:g}: must be 1 with loss.cross_tokenizer, whose spans are products"
    for field, plain in (("divergence", "forward_kl"), ("label_smoothing", 0.0), ("z_loss", 0.0)):
        if getattr(loss, field) != plain:
            yield f"loss.{field} = {getattr(loss, field)}: must be {plain} with loss.cross_tokenizer; leave it out"
    kind = loss.weighting.kind
    if kind in ("gradients", "calibration", "gate"):
        yield (
            f"loss.weighting.kind = {kind}: compares a token with means over tokens, or reads the gradients of its "
            "logits, and a span with loss.cross_tokenizer may have several tokens; choose another kind"
        )
    if kind == "gap" and loss.weighting.over == "entropy":
        yield (
            "loss.weighting.over = entropy: the tokens of a span have no entropy each with loss.cross_tokenizer; "
            "set it to step or token"
        )


def _weighting_faults(config: Config) -> Iterator[str]:
    loss, run = config.loss, config.run
    kind = loss.weighting.kind
    if kind in ("calibration", "repair") and loss.temperature != 1:
        yield (
            f"loss.temperature = {loss.temperature:g}: loss.weighting.kind = {kind} compares the teacher's masses with "
            "the labels, which a temperature changes; set it to 1, or choose another kind"
        )
    if kind == "calibration" and loss.weighting.reference == "student" and loss.divergence != "forward_kl":
        yield (
            f"loss.divergence = {loss.divergence}: loss.weighting.reference = student reads q - p off the gradient of "
            "forward_kl; set that divergence, or loss.weighting.reference to teacher"
        )
    if kind == "slope" and not 0 < run.evaluate_every <= run.steps / LEAST_PROBES:
        yield (
            f"run.evaluate_every = {run.evaluate_every}: loss.weighting.kind = slope learns from held-out losses only; "
            f"it must be more than 0 and at most run.steps / {LEAST_PROBES} = {run.steps // LEAST_PROBES}"
        )
