"""What a transfer check trains: a small Llama 4, the sizes it is carried to, and the rates that are tried.

settings = load("configs/sweeps/transfer/smoke.yaml", ["seeds=3"])          # without a file: the defaults below
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from herd.llama4.specs import find_spec
from herd.run.errors import ConfigError
from herd.run.schema import Optim, Tracking
from herd.run.section import Name, Section
from sweeps.settings import fill, read_tree

OF_A_CHECK = "a check has source, grids, seeds, optim, ..."
GRID_STEP = 0.5
"""Of the rates, in octaves: neighbours differ by the factor 2^0.5."""
Along = Literal["width", "depth", "batch", "tokens"]


class Scale(Section):
    width: int = Field(32, gt=0)
    """Hidden size, also of the experts; heads of `head_dim` grow in number."""
    depth: int = Field(2, gt=0)
    """Layers."""
    rows: int = Field(8, gt=0)
    """Rows of a step."""
    steps: int = Field(100, gt=0)


class Grid(Section):
    base: Scale = Scale()
    """Where the settings are found."""
    factors: list[int] = Field(min_length=2)
    """The sizes, as multiples of the base's; the first is 1."""
    standard: bool = True
    """Also without rules (standard parametrisation), the control."""

    @model_validator(mode="after")
    def _growing(self) -> "Grid":
        if self.factors[0] != 1 or self.factors != sorted(set(self.factors)):
            raise ValueError(f"factors = {self.factors} must start at 1 and grow")
        return self

    def sizes(self, along: Along) -> list[Scale]:
        """The models of the grid, smallest first."""
        return [grown(self.base, along, factor) for factor in self.factors]


def grown(base: Scale, along: Along, factor: int) -> Scale:
    """The base made `factor` times as large in one direction."""
    changes = {
        "width": {"width": base.width * factor},
        "depth": {"depth": base.depth * factor},
        "batch": {"rows": base.rows * factor, "steps": base.steps // factor},
        "tokens": {"steps": base.steps * factor},
    }
    return base.model_copy(update=changes[along])


class Coordinates(Section):
    """Mean sizes of activations over a few steps at a large rate."""

    grids: dict[Literal["width", "depth"], Grid] = {
        "width": Grid(factors=[1, 2, 4, 8]),
        "depth": Grid(base=Scale(depth=4), factors=[1, 2, 4]),
    }
    """Whose sizes; their steps are those below."""
    rate: float = Field(2**-6, gt=0.0)
    steps: int = Field(10, gt=0)
    seeds: int = Field(3, gt=0)
    rows: int = Field(8, gt=0)


class TransferCheck(Section):
    name: Name = "transfer"
    folder: Path = Path("runs/sweeps")
    """The check's folder is made here."""
    source: str = "scout-nano"
    """Spec of the models; their kind."""
    overrides: dict[str, Any] = {"head_dim": 16, "num_local_experts": 4, "no_rope_layer_interval": 2}
    """What all of them have in common. NoPE every 2nd layer, so that models of two layers have both kinds."""
    vocab_size: int = Field(512, ge=512)
    sequence_length: int = Field(64, ge=8)
    heldout_rows: int = Field(64, gt=0)
    """Rows a point's loss is measured on after training."""
    optim: Optim = Optim(lr=2**-5.5)
    """The base's settings; the search for the best rate begins at `lr`."""
    balance: float = Field(0.01, ge=0.0)
    """Coefficient of the experts' balance loss."""
    depth_exponent: float = Field(1.0, ge=0.5, le=1.0)
    horizon_exponent: float = Field(0.3, ge=0.0, le=1.0)
    """Under test here, not taken for granted: the grid over tokens fits it."""
    averages: Literal["tokens", "steps", "run"] = "tokens"
    """What Adam's averages reach over in a larger run or batch: as many tokens, steps, or the same share of the run."""
    grids: dict[Along, Grid] = {
        "width": Grid(factors=[1, 2, 4, 8]),
        "depth": Grid(base=Scale(depth=4), factors=[1, 2, 4]),
        "batch": Grid(base=Scale(rows=4, steps=400), factors=[1, 2, 4]),
        "tokens": Grid(factors=[1, 2, 4]),
    }
    """`batch` keeps the tokens: steps shrink as rows grow. `tokens` grows the steps. None: coordinate checks alone."""
    seeds: int = Field(3, gt=0)
    """Of weights and row order together; all points of a seed start alike and read alike."""
    bracket: int = Field(2, ge=1)
    """Rates that are tried on either side of the best one, at least."""
    widest: int = Field(12, ge=1)
    """Grid steps from where the search begins that are never exceeded."""
    coordinates: Coordinates = Coordinates()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _whole_steps(self) -> "TransferCheck":
        grid = self.grids.get("batch")
        if grid and any(grid.base.steps % factor for factor in grid.factors):
            raise ValueError(f"grids.batch.base.steps = {grid.base.steps} must be a multiple of all of {grid.factors}")
        return self

    @property
    def home(self) -> Path:
        """Folder of the check."""
        return self.folder / self.name


def load(path: Path | None, overrides: Sequence[str] = ()) -> TransferCheck:
    """The check a YAML describes (the default one without a file), with `KEY=VALUE` overrides; ConfigError."""
    if path:
        tree = read_tree(path, wanted=OF_A_CHECK, flag="--config")
        if tree.keys() & {"space", "objectives"}:
            raise ConfigError(f"{path}: a study, no transfer check; use python -m sweeps --study {path}")
        if tree.keys() & {"run", "students"}:
            raise ConfigError(f"{path}: the configuration of a run, no transfer check; {OF_A_CHECK}")
    else:  # whole, so that an override of one field leaves those beside it
        tree = TransferCheck().model_dump(mode="json")
    return fill(TransferCheck, tree, overrides, where=str(path or "transfer"))


def shape(check: TransferCheck, size: Scale) -> dict[str, Any]:
    """Overrides that make a model of the spec that wide and deep: heads grow in number, experts in width."""
    head_dim = {**find_spec(check.source).text, **check.overrides}["head_dim"]
    heads = size.width // head_dim
    return check.overrides | {
        "hidden_size": size.width,
        "intermediate_size": size.width,
        "intermediate_size_mlp": 2 * size.width,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "num_hidden_layers": size.depth,
    }


def check_models(check: TransferCheck) -> None:
    """Raise ConfigError for sizes that make no model of the spec, before anything is trained."""
    spec = find_spec(check.source)
    for along, grid in [*check.grids.items(), *check.coordinates.grids.items()]:
        for size in grid.sizes(along):
            overrides = shape(check, size)
            if not overrides["num_attention_heads"] or size.width % overrides["head_dim"]:
                raise ConfigError(
                    f"grids.{along}: width {size.width} is not a multiple of head_dim = {overrides['head_dim']}; "
                    "change base.width, or overrides.head_dim"
                )
            spec.config(vocab_size=check.vocab_size, pad_token_id=None, **overrides)
