"""A look into a cache without the data or the teacher: `python -m teachers inspect DIR`.

found = inspect(path, rows=64);  print(to_text(found))
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from teachers import cache
from teachers.cache import shards
from teachers.cache.folder import shard_paths


def inspect(folder: Path, *, rows: int) -> dict[str, Any]:
    """What cache.json says, what is on disk, and means over at most `rows` rows spread over the cache.

    Raises DataError for a damaged cache, as training would.
    """
    reader = cache.open(folder, expecting=None)
    manifest, paths = reader.manifest, shard_paths(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    tokens = len(reader) * manifest.identity.sequence_length
    places = np.unique(np.linspace(0, max(len(reader) - 1, 0), min(max(rows, 1), len(reader)), dtype=int))
    kept = [reader.kept(int(at)) for at in places]
    found = {
        "folder": str(folder),
        "codec": manifest.codec,
        "tail": reader.tail,
        "seed": manifest.seed,
        **asdict(manifest.identity),
        "data": manifest.data,
        "rows": len(reader),
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / max(tokens, 1),
        "shards": len(paths),
        "unsealed_shards": sum(path.suffix == shards.OPEN for path in paths),
        "teacher_steps": [int(reader.steps_N.min()), int(reader.steps_N.max())] if len(reader) else [0, 0],
        "facts": manifest.facts,
        "complete": manifest.completing_command(folder),
    }
    if kept:
        decoded = sum(len(row.entropy_T) for row in kept)
        found |= {
            "rows_decoded": len(kept),
            "classes_per_token": sum(len(row.ids_H) + len(row.ids_S) for row in kept) / decoded,
            "own_mass_per_token": sum(len(row.ids_H) for row in kept) / decoded,
            "teacher_entropy": float(np.mean([row.entropy_T.mean() for row in kept])),
            "teacher_ce": float(np.mean([row.ce_T.mean() for row in kept])),
        }
    return found


def to_text(found: dict[str, Any]) -> str:
    """For people, one line a fact."""
    first, last = found["teacher_steps"]
    lines = {
        "cache": found["folder"],
        "codec": f"{found['codec']}, tail {found['tail']}, seed {found['seed']}",
        "teacher": f"{found['facts'].get('model', '')} {found['teacher']}".strip(),
        "teacher steps": f"{first} to {last}" if last else "none: it stands still",
        "tokenizer": found["tokenizer"],
        "vocabulary": f"{found['vocabulary']:,}",
        "temperature": f"{found['temperature']:g}",
        "data": ", ".join(found["data"]),
        "rows": f"{found['rows']:,} of {found['sequence_length']:,} tokens: {found['tokens']:,} tokens",
        "bytes": f"{found['bytes']:,} ({found['bytes_per_token']:.2f} a token, everything in the folder)",
        "shards": f"{found['shards']}, {found['unsealed_shards']} of them not sealed",
    }
    if "rows_decoded" in found:
        lines["classes"] = (
            f"{found['classes_per_token']:.2f} a token, {found['own_mass_per_token']:.2f} with a mass of their own"
        )
        lines["teacher"] += f"; entropy {found['teacher_entropy']:.3f} nats, cross-entropy {found['teacher_ce']:.3f}"
        lines["means over"] = f"{found['rows_decoded']} rows"
    lines["complete with"] = found["complete"]
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
