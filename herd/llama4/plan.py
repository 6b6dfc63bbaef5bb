"""Plans memory and cost of a Llama 4 before a device is touched, from its shapes alone.

    state = state_bytes(config, zero=3, expert_parallel=16, world_size=512)       # exact: what DeepSpeed will hold
    print(plan(config, setup).table())                                            # with estimates of the rest

Bytes are those of one rank (the fullest). Weights, gradients, master weights and moments are exact arithmetic for
DeepSpeed 0.19 with AdamW and are checked against live engines; activations and working space are estimates.
"""

# In this file P is a number of parameters, N of ranks; "experts" are routed experts' weights.

from dataclasses import asdict, dataclass
from math import ceil
from typing import Literal

from transformers import Llama4TextConfig, PreTrainedConfig

from herd.llama4.counts import Counts, count, forward_flops, kv_bytes, parameter_kind, parameter_shapes, training_flops
from herd.run.config_checks import divisors, use
from herd.run.errors import ConfigError

H100_BF16_FLOPS = 989e12  # dense peak of one device
PERSISTENCE_THRESHOLD = 100_000  # DeepSpeed's stage3_param_persistence_threshold: smaller parameters stay whole
REDUCE_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in elements
_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")  # as transformers' models call them
_FP32 = 4
_BYTES = {"bf16": 2, "fp32": 4}
_SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class StateBytes:
    """Bytes of training state on one rank, between backward and step."""

    weights: int
    gradients: int
    master: int
    """fp32 copies of the weights that the optimiser updates."""
    moments: int
    """AdamW's two running means, fp32."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.master + self.moments


@dataclass(frozen=True)
class Setup:
    """How a model is going to be trained."""

    chunk_tokens: int
    """Tokens whose logits exist at one time."""
    zero: Literal[1, 2, 3] = 1
    expert_parallel: int = 1
    world_size: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    frozen: bool = False
    """The model is only read: no gradients, no optimiser."""
    accumulation: int = 1
    """Micro steps an optimiser step is made of."""
    sequence_length: int = 8192
    micro_rows: int = 1
    """Sequences per rank and forward."""
    beside: tuple[int, ...] = ()
    """Elements of each parameter that trains in the model's engine and is not the model's, such as projections."""
    persistence_threshold: int = PERSISTENCE_THRESHOLD
    reduce_bucket: int = REDUCE_BUCKET


@dataclass(frozen=True)
class Plan:
    """What one model costs one rank, and one token."""

    setup: Setup
    counts: Counts
    state: StateBytes
    buckets: int
    """DeepSpeed's reduction buffer."""
    gathered: int
    """Largest layer, whole, while ZeRO-3 computes it; estimate."""
    activations: int
    """Saved for backward by one micro step; estimate."""
    activations_recomputed: int
    """The same when only layer inputs are kept and one layer at a time is recomputed; estimate."""
    logits: int
    """A chunk of logits, the targets' and the gradient, fp32; estimate."""
    kv_cache: int
    """Of one sequence at full length, when decoding."""
    flops_per_token: float
    """Forward and backward, or forward alone for a frozen model."""

    @property
    def bytes_per_rank(self) -> int:
        """State, buffers and activations (not recomputed) together."""
        return self.state.total + self.buckets + self.gathered + self.activations + self.logits

    def table(self) -> str:
        """Return the plan as aligned lines, largest numbers in readable units."""
        parameters = {kind: _short(n).strip() for kind, n in self.counts.by_kind.items() if n}
        memory = {**asdict(self.state), "buckets": self.buckets, "gathered layer (est.)": self.gathered}
        memory |= {"activations (est.)": self.activations, "logits (est.)": self.logits, "sum": self.bytes_per_rank}
        rows = [("parameters", f"{_short(self.counts.total).strip()}, active {_short(self.counts.active).strip()}")]
        rows += [(f"  {kind.replace('_', ' ')}", value) for kind, value in parameters.items()]
        rows += [("  beside the model", _short(sum(self.setup.beside)).strip())] if self.setup.beside else []
        rows += [("bytes per rank", "")] + [(f"  {kind}", f"{_short(n)}B") for kind, n in memory.items() if n]
        rows += [("  activations if recomputed (est.)", f"{_short(self.activations_recomputed)}B")]
        rows += [("KV cache of a sequence", f"{_short(self.kv_cache)}B")]
        rows += [("FLOPs per token", _short(self.flops_per_token).strip())]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}".rstrip() for label, value in rows)


def plan(config: Llama4TextConfig, setup: Setup) -> Plan:
    """Return the plan of a model trained under `setup`. Raises ConfigError where ranks cannot share the model."""
    width = _BYTES[setup.precision]
    tokens = setup.micro_rows * setup.sequence_length
    cost = forward_flops if setup.frozen else training_flops
    layers = _saved_bytes_per_token(config, setup)
    trained = not setup.frozen
    layer_inputs = config.num_hidden_layers * config.hidden_size
    return Plan(
        setup=setup,
        counts=count(config),
        state=state_bytes(
            config,
            zero=setup.zero,
            expert_parallel=setup.expert_parallel,
            world_size=setup.world_size,
            precision=setup.precision,
            frozen=setup.frozen,
            accumulation=setup.accumulation,
            persistence_threshold=setup.persistence_threshold,
            beside=setup.beside,
        ),
        buckets=setup.reduce_bucket * width * trained,
        gathered=_largest_layer(config, setup.expert_parallel) * width if setup.zero == 3 else 0,
        activations=sum(layers) * tokens * trained,
        activations_recomputed=(layer_inputs * width + max(layers)) * tokens * trained,
        logits=2 * min(setup.chunk_tokens, tokens) * config.vocab_size * width,
        kv_cache=kv_bytes(config, setup.sequence_length, bytes_per_value=width),
        flops_per_token=cost(config, setup.sequence_length) + 6 * sum(setup.beside),
    )


def state_bytes(
    config: Llama4TextConfig,
    *,
    zero: Literal[1, 2, 3],
    expert_parallel: int,
    world_size: int,
    precision: Literal["bf16", "fp32"] = "bf16",
    frozen: bool = False,
    accumulation: int = 1,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
    beside: tuple[int, ...] = (),
) -> StateBytes:
    """Return the exact bytes of training state a rank holds between backward and step.

    With `accumulation` > 1, ZeRO-1 keeps whole gradients until the last micro step. Expert parallelism of 1 means no
    AutoEP. Raises ConfigError if the ranks cannot be grouped so.
    """
    if world_size % expert_parallel:
        raise ConfigError(
            f"parallel.expert_parallel = {expert_parallel} does not divide the {world_size} ranks; "
            f"{use(divisors(world_size))}"
        )
    experts_divisible(config, expert_parallel)
    width = _BYTES[precision]
    pieces = _pieces(config, expert_parallel) + [(numel, False) for numel in beside]
    whole = sum(numel for numel, _ in pieces)
    if zero == 3:
        shares = [numel * (expert_parallel if is_expert else 1) for numel, is_expert in pieces]
        partitioned = sum(ceil(share / world_size) for share in shares)
        weights = partitioned + sum(numel for numel, _ in pieces if numel <= persistence_threshold)
    else:
        experts = sum(numel for numel, is_expert in pieces if is_expert)
        partitioned = ceil((whole - experts) / world_size) + ceil(experts * expert_parallel / world_size)
        weights = whole
    if frozen:
        return StateBytes(weights * width, 0, 0, 0)
    gradients = whole if zero == 1 and accumulation > 1 else partitioned
    return StateBytes(weights * width, gradients * width, partitioned * _FP32, 2 * partitioned * _FP32)


def tokens_per_day(
    flops_per_token: float, *, world_size: int, mfu: float, peak_flops: float = H100_BF16_FLOPS
) -> float:
    """Return tokens a day for `world_size` devices of `peak_flops` each, at model FLOPs utilisation `mfu` in 0..1.

    `flops_per_token` is the sum over the models of a step: trained ones whole, a frozen teacher's forward.
    """
    return world_size * peak_flops * mfu * _SECONDS_A_DAY / flops_per_token


def experts_divisible(config: PreTrainedConfig, expert_parallel: int, *, model: str = "the model") -> None:
    """Raise ConfigError unless `expert_parallel` ranks can share the experts of `config` evenly.

    A model without experts has none to share, and passes. `model` is what the line calls it.
    """
    fields = config.get_text_config().to_dict()
    for field in _EXPERT_FIELDS:
        experts = fields.get(field)
        if experts and experts % expert_parallel:
            raise ConfigError(
                f"parallel.expert_parallel = {expert_parallel} does not divide the {experts} experts ({field}) "
                f"of {model}; {use(divisors(experts))}"
            )


def _pieces(config: Llama4TextConfig, expert_parallel: int) -> list[tuple[int, bool]]:
    """Return (numel on one rank before ZeRO, whether it is an expert's) of every parameter tensor.

    AutoEP keeps a rank's share of the experts and stores gate and up apart.
    """
    pieces = []
    for name, shape in parameter_shapes(config).items():
        is_expert = parameter_kind(name) == "routed_experts"
        if not is_expert or expert_parallel == 1:
            pieces.append((shape.numel(), is_expert))
        else:
            halves = 2 if name.endswith("gate_up_proj") else 1
            pieces += [(shape.numel() // expert_parallel // halves, True)] * halves
    return pieces


def _largest_layer(config: Llama4TextConfig, expert_parallel: int) -> int:
    """Return the parameters of the largest decoder layer, or of the embedding, on one rank before ZeRO."""
    sizes: dict[str, int] = {}
    for name, shape in parameter_shapes(config).items():
        layer = name.split(".")[2] if ".layers." in name else name
        share = expert_parallel if parameter_kind(name) == "routed_experts" else 1
        sizes[layer] = sizes.get(layer, 0) + shape.numel() // share
    return max(sizes.values())


def _saved_bytes_per_token(config: Llama4TextConfig, setup: Setup) -> list[int]:
    """Return the bytes autograd saves for one token, per decoder layer and the final norm (sparse experts, SDPA).

    Counted from what the operations of transformers' layers save: both norms keep their input in fp32 and their
    result; masked attention keeps its mask row and repeated keys and values; SwiGLU keeps four inner tensors, the
    grouped experts one of twice the width.
    """
    width = _BYTES[setup.precision]
    hidden, k = config.hidden_size, config.num_experts_per_tok
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    saved = []
    for layer, kind in enumerate(config.layer_types):
        chunked = kind == "chunked_attention"
        values = 2 * hidden + 2 * hidden + queries
        values += 3 * queries + setup.sequence_length if chunked else queries + 2 * keys
        if layer in config.moe_layers:
            values += k * 2 * (hidden + config.intermediate_size) + 4 * config.intermediate_size
        else:
            values += 4 * config.intermediate_size_mlp
        exact = 2 * hidden + (queries + keys if config.use_qk_norm and chunked else 0)
        saved.append(values * width + exact * _FP32)
    return [*saved, hidden * (width + _FP32)]  # the last: the final norm


def _short(number: float) -> str:
    """Return a number with a decimal unit: 108.6G."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g} "
