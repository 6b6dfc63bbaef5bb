"""What a self-contained page is made of: plots as base64 PNG in two widths, and a template filled in.

picture = make_picture("Losses", "Points: held-out text.", wide_figure, narrow_figure, folder / "losses.png")
html = fill_template("sweeps", "study.html.j2", pictures=[picture])
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from herd.run.files import write_atomic


@dataclass(frozen=True)
class Picture:
    """A plot in two widths, as base64 PNG; the page shows the one that fits the screen."""

    heading: str
    caption: str
    wide: str
    narrow: str


def make_picture(heading: str, caption: str, wide: Figure, narrow: Figure, file: Path) -> Picture:
    """Both widths as text for a page; the wide one is also written to `file`, atomically."""
    image = _png(wide)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, image)
    return Picture(heading, caption, _base64(image), _base64(_png(narrow)))


def fill_template(package: str, template: str, **values: Any) -> str:
    """The HTML of a package's template, which may include those of the run's report; a name it lacks is an error."""
    loader = ChoiceLoader([PackageLoader(package, ""), PackageLoader("herd.report", "")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _base64(image: bytes) -> str:
    return base64.b64encode(image).decode("ascii")
