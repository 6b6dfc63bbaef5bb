"""Checks of a folder's files: those the gate passed when they were written, and a tokenizer that can be used.

check_files(folder)             # against gate.json; None where there is none
check_tokenizer(folder, 32000)
"""

import json
from pathlib import Path

from herd.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from herd.run.errors import DataError, first_line
from herd.run.files import sha256
from quant.reports import Check, few
from quant.target import REPORT

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "config.json")
# What turns text into ids. Settings and chat templates beside them may be edited.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
UNSEALED = f"no {REPORT}, so that nothing tells whether the files are those that were checked; copy it too"


def digest_files(folder: Path) -> dict[str, str]:
    """sha256 of the files with weights, of their index, of config.json and of the tokenizer's vocabulary."""
    paths = {path for each in (*WEIGHTS, *VOCABULARIES) for path in folder.glob(each)}
    return {path.name: sha256(path) for path in sorted(paths)}


def check_files(folder: Path) -> Check | None:
    """Whether the files are those the gate passed when they were written; None for a folder without its report."""
    path = folder / REPORT
    if not path.is_file():
        return None
    try:
        wanted = dict(json.loads(path.read_text())["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}; copy it again") from error
    found = digest_files(folder)
    gone = sorted(wanted.keys() - found.keys())
    changed = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    # A vocabulary that the report does not name is of an export made before reports named them.
    added = sorted(found.keys() - wanted.keys() - set(VOCABULARIES))
    faults = [f"{few(gone)} is missing; copy it again"] if gone else []
    faults += [f"{few(changed)} differs from {REPORT}; copy it again"] if changed else []
    faults += [f"{few(added)} is not in {REPORT}; remove it if it was added, else export again"] if added else []
    return Check("files", not faults, "; ".join(faults) if faults else f"{len(wanted)} as in {REPORT}")


def check_tokenizer(folder: Path, vocab_size: int) -> Check:
    """A tokenizer in the folder can be loaded, and what it makes of a text are tokens that the model knows."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return Check("tokenizer", True, "none in the folder")
    try:
        ids = load_tokenizer(folder)("def main(): pass").input_ids
    except DataError as error:
        return Check("tokenizer", False, str(error))
    if not ids:
        return Check("tokenizer", False, "it makes no token of a text; copy tokenizer.json again")
    if max(ids) >= vocab_size:
        return Check("tokenizer", False, f"it gives token {max(ids)} to a model of {vocab_size}: another model's")
    return Check("tokenizer", True, "loads, and gives tokens that the model knows")
