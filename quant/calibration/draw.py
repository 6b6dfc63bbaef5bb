"""From settings to rows: the calibration part of a model's own data, or a source that serves calibration alone.

calibration = draw(settings, config.data, model_folder, out=Path("exports/scout-int4"))
"""

import logging
from pathlib import Path

from herd.data.corpora import CACHE
from herd.run.schema import Calibrate, Data
from quant.calibration.rows import calibration_rows
from quant.calibration.settings import MEMORY_BYTES, Calibration
from quant.target import finished_layers

log = logging.getLogger(__name__)


def draw(
    settings: Calibrate,
    data: Data,
    model_folder: Path,
    *,
    out: Path,
    memory_bytes: int = MEMORY_BYTES,
    cache: Path = CACHE,
) -> Calibration:
    """The rows of an export at `out`, and where it keeps finished layers. DataError when there is too little text.

    data: what the model was trained on, whose calibration part no one has read; another source is read whole, in rows
    of the same length.
    """
    foreign = settings.source is not None and settings.source != data.source
    if foreign:
        data = Data(source=settings.source, sequence_length=data.sequence_length, text_field=data.text_field)
    most = max(settings.rows, settings.most_rows)
    rows = calibration_rows(data, model_folder, rows=most, whole=foreign, cache=cache)
    if len(rows.tokens_NT) < settings.rows:
        log.warning("calibration: %d rows are there, %d were asked for", len(rows.tokens_NT), settings.rows)
    return Calibration(
        rows,
        first=settings.rows,
        expert_tokens=settings.expert_tokens,
        memory_bytes=memory_bytes,
        work=finished_layers(out.absolute()),
    )
