"""cache.json: what a cache is of, how it is coded and how it was made; it carries its own checksum.

manifest = Manifest.read(path);  manifest.identity, manifest.codec
manifest.write(path)
"""

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from herd.run.errors import DataError
from herd.run.files import write_atomic
from herd.run.schema import Data
from teachers.cache.identity import Identity, fixed_digest

FILE = "cache.json"
SCHEMA = 1
"""Of the folder, the shards and the codecs together: raise it when a byte changes its meaning."""


@dataclass(frozen=True)
class Manifest:
    """The facts of one cache."""

    identity: Identity
    codec: str
    """As the command line has it: `head_and_tail=16`."""
    seed: int = 0
    data: list[str] = field(default_factory=list)
    """Fingerprints of all corpora there are rows of; `identity.data` is the first."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For people: command, model, data source, commit, date."""

    @property
    def digest(self) -> bytes:
        """16 bytes that every shard of this cache carries."""
        return fixed_digest(self.identity, f"{self.codec} {self.seed} {SCHEMA}")

    def with_data(self, fingerprint: str) -> "Manifest":
        return self if fingerprint in self.data else replace(self, data=[*self.data, fingerprint])

    def write(self, folder: Path) -> None:
        """Write or replace the file, whole."""
        content = {"schema": SCHEMA, **asdict(self)}
        content["checksum"] = _checksum(content)
        write_atomic(folder / FILE, json.dumps(content, indent=1) + "\n")

    def completing_command(self, folder: Path) -> str:
        """What makes the rows that the cache in `folder` lacks; for data of several named sources one command each.

        All else is read from here and from the teacher's folder.
        """
        options = ["--model", self.facts.get("model", "TEACHER"), "--out", str(folder)]
        options += ["--part", self.facts.get("part", "train"), "--complete"]
        sources = self.facts.get("data_config", {}).get("sources", {})
        every = [[*options, "--data", name] for name in sources] or [options]
        return " && ".join(shlex.join(["python", "-m", "teachers", "cache", *words]) for words in every)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises DataError when there is none, when it is of another schema, or when a byte of it changed."""
        path = folder / FILE
        if not path.is_file():
            raise DataError(f"{folder}: no {FILE} in it; name the folder that python -m teachers cache wrote")
        try:
            content = json.loads(path.read_bytes())
            checksum = content.pop("checksum")
            schema = content.pop("schema")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); {MEND}") from error
        if checksum != _checksum({"schema": schema, **content}):
            raise DataError(f"{path} is damaged (its checksum does not fit its content); {MEND}")
        if schema != SCHEMA:
            raise DataError(f"{path}: schema is {schema}, this version reads {SCHEMA}; make the cache again")
        return cls(identity=Identity(**content.pop("identity")), **content)


def facts(model: str, data: Data, *, part: str) -> dict[str, Any]:
    """Of which teacher, in a folder or on the hub, and of which rows a cache is."""
    return {"model": model, "data_config": data.model_dump(mode="json"), "part": part}


MEND = "restore it from a copy, or make the cache again"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
