"""What every part of the configuration tree is made of: `Section`, and the types of fields many of them share.

class Optim(Section): clip: Fraction = 1.0
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A part of the tree: unknown keys fail, values are frozen, docs come from the strings below fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
