"""What a cache is of: everything that must agree before its targets may teach.

Identity(tokenizer=..., vocabulary=4096, sequence_length=256, temperature=1.0, data=..., teacher=...)
check(cache_path, theirs, expected)         raises DataError that names the field and both values
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from herd.run.errors import DataError
from herd.run.files import sha256
from herd.run.lineage import read_lineage

LINEAGE_KEY = "soft_targets_teacher"
"""In a teacher's lineage.json: the identity its targets were cached under while it was training."""
FIXED = ("tokenizer", "vocabulary", "sequence_length", "temperature", "teacher")
"""Fields a cache has one value of for ever; data may be added."""


@dataclass(frozen=True)
class Identity:
    """One cache's, or what a run asks of one. In what a run asks, None is not compared."""

    tokenizer: str | None
    """`herd.data.tokenizer.tokenizer_digest`."""
    vocabulary: int | None
    """Logits of the teacher."""
    sequence_length: int | None
    """Tokens a row."""
    temperature: float | None
    data: str | None
    """Fingerprint of the corpus (`corpus.fingerprint`)."""
    teacher: str | None
    """Digest of the weights of a teacher that stands still; the id of its run for one that trained meanwhile."""


def check(path: Path, identity: Identity, data: list[str], expected: Identity) -> None:
    """Refuse a cache that differs in any field a run asks for. `data`: fingerprints of all corpora it has rows of."""
    for field in fields(Identity):
        wanted = getattr(expected, field.name)
        if wanted is None:
            continue
        is_data = field.name == "data"
        there = data if is_data else getattr(identity, field.name)
        if wanted not in there if is_data else wanted != there:
            shown = ", ".join(there) if is_data else there
            raise DataError(
                f"cache {path}: {field.name} is {shown} in the cache, {wanted} in this run; {MENDS[field.name]}"
            )


MENDS = {
    "tokenizer": "its ids mean other tokens: make a cache with this tokenizer (python -m teachers cache)",
    "vocabulary": "make a cache from a teacher of this vocabulary",
    "sequence_length": "set data.sequence_length to the cache's, or make another cache",
    "temperature": "set loss.temperature to the cache's, or make another cache",
    "data": "name the cache's data, or add this data's rows with python -m teachers cache --complete",
    "teacher": "the cache is stale or another teacher's: name another folder for it, or the teacher it was made from",
}


def fixed_digest(identity: Identity, codec: str) -> bytes:
    """16 bytes that every shard carries, so that one of another cache is noticed."""
    facts = {name: value for name, value in asdict(identity).items() if name in FIXED} | {"codec": codec}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).digest()


def teacher_digest(folder: Path) -> str:
    """SHA-256 over a model folder's configuration and weights. Raises DataError when it holds no safetensors.

    Of several forms of the weights in one folder those count that transformers reads.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder}: no *.safetensors in it; give the folder of a saved model")
    facts = [f"{path.name} {sha256(path)}" for path in [folder / "config.json", *files]]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def names_of_teacher(folder: Path) -> list[str]:
    """What a cache of this teacher may be under: its digest, and the name it was cached under while it trained."""
    trained_as = read_lineage(folder).get(LINEAGE_KEY)
    return [teacher_digest(folder), *([trained_as] if trained_as else [])]
