"""How a calibrated method is fed: the rows to draw from, when to stop drawing, the memory to work in, where to resume.

calibration = Calibration(rows, first=128, expert_tokens=256, work=Path(".scout-int4.incomplete/layers"))
"""

from dataclasses import dataclass
from pathlib import Path

from quant.calibration.rows import CalibrationRows

MEMORY_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Calibration:
    rows: CalibrationRows
    """All that may be drawn, in order."""
    first: int = 128
    """Rows drawn in any case."""
    expert_tokens: int = 256
    """More are drawn until every expert has met this many tokens."""
    memory_bytes: int = MEMORY_BYTES
    """For Hessians and what is worked out of them; a decoder layer and a batch of rows come on top."""
    work: Path | None = None
    """Folder where finished layers are kept, so that a killed command can go on; None: in memory."""
