"""The embedded corpus: code and prose of the standard library that runs this program, about 10 MB, no download.

stdlib_source().read()      documents named like `stdlib/json/decoder.py` and `stdlib/topics/assert`
"""

import ast
import os
import platform
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from herd.data.sources import Document, GeneratedSource
from herd.run.errors import DataError

# Test suites are absent from many distributions and repeat themselves; the rest are generated tables, or name this
# very machine (`_sysconfigdata`, `config-3.11-...`), and would make the text differ from one machine to the next.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
SKIPPED_FILES = frozenset({"stringprep.py", "html/entities.py"})
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def stdlib_source() -> GeneratedSource:
    """The library's .py files in the order of their paths, then Python's own help topics (plain English).

    Raises DataError when this Python has no sources on disk (some embedded builds).
    """
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise DataError(
            f"data.source = stdlib: this Python has no library sources in {root}; "
            "use another Python, or set data.source to a file, a folder or a hub dataset"
        )
    version = platform.python_version()
    return GeneratedSource(f"standard library of Python {version}", "stdlib", lambda: iter(_documents(root)))


@cache
def _documents(root: Path) -> tuple[Document, ...]:
    return (*_modules(root), *_topics(root))


def _modules(root: Path) -> Iterator[Document]:
    for name in sorted(_names(root)):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of files declare another encoding
        yield Document(f"stdlib/{name}", text)


def _names(root: Path) -> Iterator[str]:
    """Paths below `root` with forward slashes. Skipped folders are not entered: site-packages can be huge."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)]
        for file in files:
            name = (Path(folder) / file).relative_to(root).as_posix()
            if name.endswith(".py") and name not in SKIPPED_FILES and not name.startswith(SKIPPED_PREFIXES):
                yield name


def _topics(root: Path) -> Iterator[Document]:
    """The language reference that `help()` prints: a literal dict of texts, so it is read and not run."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(statement.value).items()):
                yield Document(f"stdlib/topics/{topic}", text)
