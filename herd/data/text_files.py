"""Local text: a file a document, or one long file cut into passages.

text_source([Path("notes/a.md")], root=Path("notes"))
"""

from collections.abc import Iterator
from pathlib import Path

from herd.data.sources import Document, GeneratedSource
from herd.run.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
PASSAGE_CHARACTERS = 8192


def text_source(paths: list[Path], *, root: Path) -> GeneratedSource:
    """Documents of text files, named by their paths below `root`, in that order.

    A file that is the whole source (`root` itself) is cut into passages: otherwise nothing of it could be held out.
    """
    ordered = sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    listing = "\n".join(f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in ordered)
    return GeneratedSource(root.name, f"text\n{listing}", lambda: _documents(ordered, root))


def _documents(paths: list[Path], root: Path) -> Iterator[Document]:
    for path in paths:
        text = _read(path)
        if path == root:
            for number, passage in enumerate(cut_passages(text)):
                yield Document(f"{path.name}#{number}", passage)
        else:
            yield Document(path.relative_to(root).as_posix(), text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as fault:
        byte = fault.object[fault.start]
        raise DataError(
            f"data.source: {path} is not UTF-8 text (byte 0x{byte:02x} at {fault.start}); "
            f"convert it, for example: iconv -f latin1 -t utf-8 {path.name}"
        ) from fault
    except OSError as fault:
        raise DataError(f"data.source: {path} cannot be read ({fault.strerror}); check its permissions") from fault


def cut_passages(text: str) -> Iterator[str]:
    """Cut at the first blank line (or else line end) after every 8192 characters; the passages join to the text."""
    start = 0
    while start < len(text):
        end = len(text)
        for separator in ("\n\n", "\n"):
            found = text.find(separator, start + PASSAGE_CHARACTERS, start + 2 * PASSAGE_CHARACTERS)
            if found >= 0:
                end = found + len(separator)
                break
        else:
            end = min(end, start + 2 * PASSAGE_CHARACTERS)
        yield text[start:end]
        start = end
