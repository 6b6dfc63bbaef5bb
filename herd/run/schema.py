"""The one typed configuration tree. Fields are the documentation; `herd.run.config` loads it.

    config = herd.run.config.load("configs/nano.yaml", ["optim.lr=2e-3"])

Unknown keys are refused, nothing is changed after validation, no torch is imported here.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from herd.run.comparisons import CrossTokenizer, Feature
from herd.run.section import Fraction, Name, Section
from herd.run.weighting import MaturityAlpha, Weighting


class Run(Section):
    name: Name
    """Folder under `folder`, and the MLflow run name."""
    folder: Path = Path("runs")
    """Where run folders live."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seeds the weights, the row order and every random choice."""
    steps: int = Field(gt=0)
    """Optimiser steps of the students (a teacher's head start comes before)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and activations; optimiser state is fp32 either way."""
    checkpoint_every: int = Field(100, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, gt=0)
    """Complete checkpoints kept; older ones are deleted."""
    evaluate_every: int = Field(100, ge=0)
    """Steps between held-out losses during training; 0 for none."""
    ends: Literal["reported", "trained"] = "reported"
    """trained: once the models are written, without exports, evaluation and report.html; --resume auto adds them."""


class DataSource(Section):
    source: str = "stdlib"
    """`stdlib` (text of the running Python's library), a local file or folder, or a hub dataset id."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    text_field: str = "text"
    """Field that holds the text in jsonl, parquet and hub rows."""
    streaming: bool = False
    """Read a dataset as it comes, without storing it."""


class NamedSource(DataSource):
    source: str
    """As `data.source`."""
    weight: float = Field(1.0, gt=0.0)
    """Share of the rows, relative to the other sources'."""


class Data(DataSource):
    sources: dict[Name, NamedSource] = {}
    """Several sources by name in place of `source`: each is packed alone, rows of all are mixed by weight."""
    sequence_length: int = Field(256, ge=8)
    """Tokens a packed row feeds the model."""
    heldout_fraction: float = Field(0.05, gt=0.0, lt=0.5)
    """Share of documents kept for evaluation."""
    calibration_fraction: float = Field(0.02, gt=0.0, lt=0.5)
    """Share of documents kept for calibration."""
    heldout_rows: int = Field(64, gt=0)
    """Held-out rows evaluated, at most."""

    def alone(self, name: str) -> "Data":
        """One named source as the only one."""
        common = self.model_dump(exclude={"sources", *DataSource.model_fields})
        return Data(**common, **self.sources[name].model_dump(exclude={"weight"}))

    @property
    def origin(self) -> str:
        """The source, or all named ones, for people."""
        return ", ".join(source.source for source in self.sources.values()) or self.source


class Tokenizer(Section):
    path: str | None = None
    """Folder or hub id; without one a byte-level BPE is trained on the training split and cached."""
    vocab_size: int = Field(4096, ge=512)
    """Size of the tokenizer trained when `path` is not given, special tokens included."""


class Batch(Section):
    rows: int = Field(8, gt=0)
    """Rows per optimiser step, over all ranks."""
    micro_rows: int | None = Field(None, gt=0)
    """Rows per forward and rank; by default rows / ranks. rows = micro_rows x accumulation x ranks."""


class Optim(Section):
    lr: float = Field(2e-3, gt=0.0)
    """Peak learning rate of AdamW; a model's own `lr` wins."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled; matrices only (no norms, no embeddings)."""
    clip: float = Field(1.0, ge=0.0)
    """Global gradient norm is clipped to this; 0 for never."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Warmup-stable-decay, cosine after warmup, or constant after warmup."""
    warmup: Fraction = 0.05
    """Share of the steps spent warming up."""
    decay: Fraction = 0.3
    """Share of the steps the last phase of `wsd` takes."""
    final_lr: Fraction = 0.1
    """Share of the peak that is left at the end."""


class Transfer(Section):
    """Where this model's settings were found: on a smaller form of it, from which they are carried over."""

    overrides: dict[str, Any] = {}
    """Fields in which the small model differs from this one: hidden_size, num_hidden_layers, ..."""
    batch_tokens: int | None = Field(None, gt=0)
    """Tokens of its step; by default as many as here."""
    tokens: int | None = Field(None, gt=0)
    """Tokens of its whole run; by default as many as here."""
    depth_exponent: float = Field(1.0, ge=0.5, le=1.0)
    """Residual branches count depth^-this: 1 in CompleteP, 0.5 in depth-muP."""
    horizon_exponent: float = Field(0.3, ge=0.0, le=1.0)
    """The rate falls as tokens^-this: 0.3 in Marin's fit, 0.5 in Complete(d)P."""
    averages: Literal["tokens", "steps", "run"] = "tokens"
    """What Adam's averages reach over: as many tokens (Marin), steps, or the same share of the run (Complete(d)P)."""


class Model(Section):
    source: str
    """A spec (`scout-nano`), a model folder, or a hub id."""
    overrides: dict[str, Any] = {}
    """Fields of the model's configuration to change, for a model built from a spec."""
    lr: float | None = Field(None, gt=0.0)
    """Peak learning rate of this model, in place of `optim.lr`."""
    transfer: Transfer | None = None
    """Rate, decay, epsilon and initial spread per tensor, from those of a smaller model (fresh models of a spec)."""


class TargetCache(Section):
    path: Path
    """Folder of the cache. `codistill` and `frozen` write through to it, `cached` reads it."""
    codec: str = "head_and_tail=14"
    """What is kept of a token in a cache this run makes: `head_and_tail=N`, `rs_kd=N` or `top_k=N` classes."""
    missing: Literal["refuse", "hard", "forward"] = "refuse"
    """Rows without a target (`cached`): `refuse` names the command that makes them, `hard` learns their labels alone,
    `forward` has teacher.source make them and keeps them."""


class Route(Section):
    source: str
    """The teacher: a spec, a model folder, or a hub id."""
    overrides: dict[str, Any] = {}
    """As a student's."""
    cache: TargetCache | None = None
    """Its soft targets on disk, written (`frozen`) or read (`cached`)."""


class Teacher(Section):
    mode: Literal["codistill", "frozen", "cached", "none"] = "codistill"
    """`codistill`: trains beside the students, its training forward is their target. `frozen`: only read.
    `cached`: read from a cache of targets. `none`: the control, students learn from hard targets alone."""
    source: str = "behemoth-nano"
    """A spec, a model folder, or a hub id; a folder starts co-distillation from that checkpoint."""
    overrides: dict[str, Any] = {}
    """As a student's."""
    lr: float | None = Field(None, gt=0.0)
    """As a student's."""
    transfer: Transfer | None = None
    """As a student's."""
    head_start: int = Field(0, ge=0)
    """Steps the teacher trains alone before the students start (`codistill` only)."""
    cache: TargetCache | None = None
    """Soft targets on disk, written or read."""
    routes: dict[Name, Route] = {}
    """A teacher for each source of `data.sources`, in place of `source`; rows of other sources have none."""

    def alone(self, name: str) -> "Teacher":
        """One route as the only teacher."""
        route = self.routes[name]
        return Teacher(mode=self.mode, source=route.source, overrides=route.overrides, cache=route.cache)


class Calibrate(Section):
    source: str | None = None
    """A text, jsonl or parquet file, a folder of them or a hub dataset; by default the calibration part of `data`."""
    rows: int = Field(128, gt=0)
    """Rows of data.sequence_length tokens, at most."""
    most_rows: int = Field(512, gt=0)
    """Up to so many are drawn until every expert of every layer has met `expert_tokens`."""
    expert_tokens: int = Field(256, ge=0)
    """Tokens an expert should meet."""


class Quantize(Section):
    scheme: (
        Literal[
            "int4",
            "int4-asym",
            "int8",
            "int8-weights",
            "fp8",
            "fp8-static",
            "fp8-block",
            "mxfp4",
            "nvfp4",
            "nf4",
            "nf4-double",
        ]
        | None
    ) = None
    """Number format (docs/quantisation.md). int4: weight-only, symmetric groups. fp8: per-channel weights, dynamic
    per-token activations."""
    group_size: Literal[32, 64, 128, "channel"] = 64
    """Weights that share a scale (int4, int4-asym, int8-weights)."""
    container: Literal["compressed-tensors", "bitsandbytes", "fine-grained-fp8", "gguf"] | None = None
    """What the tensors go into; by default the scheme's usual one."""
    allocation: Path | None = None
    """In place of a scheme, a JSON file with one for each group of layers; `python -m sweeps bits` writes it."""
    method: Literal["rtn", "hqq", "gptq", "gptq-gated", "awq", "signround"] = "rtn"
    """How codes are chosen: rtn rounds to nearest with searched scales; the others need a scheme of integers."""
    calibration: Calibrate = Calibrate()
    """What calibrated methods read."""

    @property
    def name(self) -> str:
        """What exports are told apart by; what is unusual is named: `int4`, `int4-gguf-gptq`, `mixed-search`."""
        format = self.scheme if self.allocation is None else f"mixed-{self.allocation.stem}"
        return "-".join(filter(None, (format, self.container, self.method if self.method != "rtn" else None)))


def _scheme_alone(value: Any) -> Any:
    return {"scheme": value} if isinstance(value, str) else value


class Student(Model):
    quantize: list[Annotated[Quantize, BeforeValidator(_scheme_alone)]] = []
    """Compressed exports made of this student after training: `int4`, `fp8`, ..., or a mapping."""


class Loss(Section):
    weighting: Weighting = MaturityAlpha(kind="maturity")
    """How soft and hard targets are mixed."""
    temperature: float = Field(1.0, gt=0.0)
    """Of the soft targets; their loss is multiplied by its square."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl", "tvd"] = (
        "forward_kl"
    )
    """Between teacher and student."""
    divergence_parameter: float | None = Field(None, ge=0.0, le=1.0)
    """jsd: weight of the teacher (0.5). skew_kl, skew_reverse_kl: share mixed in, below 1 (0.1). adaptive_kl: teacher
    mass that counts as the head (0.5). The others have none."""
    label_smoothing: Fraction = 0.0
    """Share of the hard target spread over the whole vocabulary."""
    z_loss: float = Field(0.0, ge=0.0)
    """Coefficient of the squared log sum exp of the student's logits."""
    balance: float = Field(0.01, ge=0.0)
    """Coefficient of the experts' load-balancing loss."""
    features: list[Feature] = []
    """What else of the teacher a student learns from: its hidden states, attention relations, routers."""
    cross_tokenizer: CrossTokenizer | None = None
    """For a frozen teacher with a tokenizer of its own: how what it says of the same bytes is compared."""
    chunk_tokens: int | None = Field(None, gt=0)
    """Tokens whose logits exist at one time; by default as many as make 16 MiB of them, at least 64 (512 on a GPU)."""


class Distil(Section):
    kind: Literal["distil"]


class OnPolicy(Section):
    kind: Literal["on_policy"]
    fraction: Fraction = 0.5
    """Share of the micro-batches whose rows every student continues itself; the others are read as they are."""
    prompt_tokens: int = Field(64, gt=0)
    """First tokens of such a row that are kept; the student writes the rest."""
    sample_temperature: float = Field(1.0, gt=0.0)
    """Students sample from their distribution at this temperature."""
    sample_rows: int | None = Field(None, gt=0)
    """Rows a rank writes at one time, by default all of a step's; lower it when their key-value cache does not fit."""


Objective = Annotated[Distil | OnPolicy, Field(discriminator="kind")]


class Parallel(Section):
    zero: Literal[1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    expert_parallel: int = Field(1, gt=0)
    """Ranks the experts of a layer are spread over."""


class Evaluation(Section):
    decode_tokens: int = Field(64, ge=0)
    """Tokens generated to time decoding; 0 for none."""


class Tracking(Section):
    enabled: bool = True
    experiment: str = "herd"
    """MLflow experiment, one a project."""
    uri: str | None = None
    """MLflow server or store; MLFLOW_TRACKING_URI wins, the default is the embedded store in mlruns/."""
    register_models: bool = True
    """Register every model this run makes, with an alias."""
    parent: str | None = None
    """MLflow run this one is shown below: a study's, for one of its trials."""
    tags: dict[str, str] = {}
    """Further tags of the MLflow run."""


class DeepSpeed(Section):
    extra: dict[str, Any] = {}
    """Passed through to DeepSpeed's configuration; keys this tree already decides are refused."""


class Config(Section):
    run: Run
    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    batch: Batch = Batch()
    optim: Optim = Optim()
    teacher: Teacher = Teacher()
    students: dict[Name, Student] = Field(min_length=1)
    objective: Objective = Distil(kind="distil")
    """`distil`: students read the corpus. `on_policy`: they also write, and the teacher scores what they wrote."""
    loss: Loss = Loss()
    parallel: Parallel = Parallel()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    deepspeed: DeepSpeed = DeepSpeed()

    def alone(self, name: str) -> "Config":
        """The run with one route's source and teacher in the single form."""
        return self.model_copy(update={"data": self.data.alone(name), "teacher": self.teacher.alone(name)})
