"""What else of its teacher a student compares itself with: the entries of `loss.features` and `loss.cross_tokenizer`.

Told apart by `kind`; formulae in docs/features.md and docs/cross-tokenizer.md.
"""

from typing import Annotated, Literal

from pydantic import Field

from herd.run.section import Fraction, Name, Section

Count = Annotated[int, Field(ge=0)]
LayerPairs = Annotated[list[tuple[Count, Count]], Field(min_length=1)]


class HiddenFeature(Section):
    kind: Literal["hidden"]
    measure: Literal["mse", "normalised_mse", "cosine"] = "cosine"
    """Distance between hidden states; a projection is learned where the widths differ."""
    weight: float = Field(0.1, gt=0.0)
    """Factor of this loss in the student's; it is a mean over tokens and layers."""
    layers: LayerPairs | None = None
    """Pairs [student layer, teacher layer], from 0; by default every student layer and the teacher's at its depth."""
    students: list[Name] | None = Field(None, min_length=1)
    """Who learns from it; by default every student."""


class RelationFeature(Section):
    kind: Literal["relations"]
    of: list[Literal["q", "k", "v"]] = Field(["q", "k", "v"], min_length=1)
    """Which relations between the tokens of a row are compared: among queries, keys, values."""
    heads: int = Field(8, gt=0)
    """Relation heads the vectors are cut into; must divide the widths of both models' projections."""
    weight: float = Field(0.1, gt=0.0)
    """As above."""
    layers: LayerPairs | None = None
    """As above."""
    students: list[Name] | None = Field(None, min_length=1)
    """As above."""


class RouterFeature(Section):
    kind: Literal["router"]
    experts: list[Count] | None = Field(None, min_length=1)
    """The student's expert for each of the teacher's; by default they are spread evenly, in order."""
    learned: bool = False
    """Let the map train, from `experts` or the even one."""
    weight: float = Field(0.1, gt=0.0)
    """As above."""
    layers: LayerPairs | None = None
    """As above; only layers with experts count."""
    students: list[Name] | None = Field(None, min_length=1)
    """As above."""


Feature = Annotated[HiddenFeature | RelationFeature | RouterFeature, Field(discriminator="kind")]


class SortedLoss(Section):
    kind: Literal["uld"]
    """Spans' distributions compared by their sorted masses, whatever the tokens mean."""


class SpanLoss(Section):
    kind: Literal["spans"]
    """Divergence on the tokens both vocabularies have, sorted masses on the others."""
    matched_weight: Fraction | None = 1.0
    """Weight of the tokens both have, the others get 1 - it; `null`: the share of the teacher's tokens that are."""


CrossTokenizer = Annotated[SortedLoss | SpanLoss, Field(discriminator="kind")]
