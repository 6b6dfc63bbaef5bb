"""The method's part of the command line: which method, and what calibrates it. No torch.

add_method_options(parser);  check_method_options(options)
calibration = calibration_of(options)              # None for methods without
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.run.errors import ConfigError, DataError, DiskFull, EnvironmentFault
from herd.run.schema import Calibrate, Data
from quant.methods.names import METHODS, check_method, reads_rows

if TYPE_CHECKING:
    from quant.calibration.settings import Calibration

MEMORY_GB = 4.0
LEAST_ROW_TOKENS = 8  # as in a run's configuration
CALIBRATED = ("calibration", "calibration_rows", "most_rows", "expert_tokens", "row_tokens", "memory")
# What this command line calls the fields of a run's configuration.
_FLAGS = {
    "data.source =": "--calibration",
    "data.sequence_length": "--row-tokens",
    ", or raise data.calibration_fraction": ", or give another --calibration",
}
_DEFAULTS = {name: field.default for name, field in Calibrate.model_fields.items()}


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add `--method` and what goes with it."""
    lines = [f"  {name:14s}{kind.summary}" for name, kind in METHODS.items()]
    group = parser.add_argument_group("method", "\n".join(lines))
    add = group.add_argument
    add("--method", default="rtn", choices=tuple(METHODS), metavar="NAME", help="how codes are chosen (rtn)")
    add(
        "--calibration", metavar="SOURCE",
        help="text, jsonl or parquet, a folder of them, or a hub dataset (the calibration part of the training data)",
    )  # fmt: skip
    add("--calibration-rows", type=int, metavar="N", help=f"rows drawn in any case ({_DEFAULTS['rows']})")
    add("--most-rows", type=int, metavar="N", help=f"rows at most, for --expert-tokens ({_DEFAULTS['most_rows']})")
    tokens = _DEFAULTS["expert_tokens"]
    add("--expert-tokens", type=int, metavar="N", help=f"draw until every expert has met this many tokens ({tokens})")
    add("--row-tokens", type=int, metavar="N", help="tokens of a calibration row (as in training)")
    add("--memory", type=float, metavar="GB", help=f"for Hessians; a decoder layer comes on top ({MEMORY_GB:g})")


def check_method_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for what does not go together; names the option."""
    if options.scheme is not None:
        check_method(options.method, options.scheme)
    given = [name for name in CALIBRATED if getattr(options, name) is not None]
    if given and not reads_rows(options.method, options.scheme):
        flag = "--" + given[0].replace("_", "-")
        calibrated = " or ".join(name for name, kind in METHODS.items() if kind.calibrated)
        raise ConfigError(f"{flag}: method {options.method} reads no calibration rows; use --method {calibrated}")
    for name in given:
        value, least = getattr(options, name), {"expert_tokens": 0, "row_tokens": LEAST_ROW_TOKENS}.get(name, 1)
        if name != "calibration" and not (value >= least if name != "memory" else 0 < value < float("inf")):
            flag = "--" + name.replace("_", "-")
            wanted = {
                "expert_tokens": "zero or more",
                "row_tokens": f"{least} or more",
                "memory": "a number above zero",
            }
            raise ConfigError(f"{flag} {value}: give {wanted.get(name, 'more than zero')}")
    first = _DEFAULTS["rows"] if options.calibration_rows is None else options.calibration_rows
    if options.most_rows is not None and options.most_rows < first:
        raise ConfigError(
            f"--most-rows {options.most_rows}: --calibration-rows {first} are drawn in any case; give {first} or more, "
            "or fewer --calibration-rows"
        )


def read_choices(path: Path) -> dict[str, str]:
    """The mapping of an allocation's JSON file; ConfigError naming the file when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_distinct)
    except FileNotFoundError:
        raise ConfigError(f"allocation {path}: no such file; give a JSON file of groups and schemes") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"allocation {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content or not all(isinstance(label, str) for label in content.values()):
        raise ConfigError(f'allocation {path}: must map groups to schemes, such as {{"*.experts": "int4-g64"}}')
    return content


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of these pairs; ConfigError for a key that stands there twice."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ConfigError(f"allocation: {key!r} stands there twice; keep one of them")
        content[key] = value
    return content


def settings_of(options: argparse.Namespace) -> Calibrate:
    """The options as the configuration has them."""
    given = {
        "source": options.calibration,
        "rows": options.calibration_rows,
        "most_rows": options.most_rows,
        "expert_tokens": options.expert_tokens,
    }
    return Calibrate(**{name: value for name, value in given.items() if value is not None})


def data_of(options: argparse.Namespace) -> Data:
    """What the model was trained on, as its lineage says; ConfigError when neither it nor the options name any text.

    A model without lineage has not read the embedded corpus, so that a part of that will do.
    """
    from herd.run.lineage import read_lineage

    known = read_lineage(options.model).get("data_config")
    if known is None and options.calibration is None:
        wanting = (f"--scheme {options.scheme} " if options.scheme else "") + f"--method {options.method}"
        raise ConfigError(
            f"{wanting}: {options.model} does not say what it was trained on; give --calibration SOURCE, e.g. stdlib"
        )
    data = Data.model_validate(known) if known else Data()
    return data if options.row_tokens is None else data.model_copy(update={"sequence_length": options.row_tokens})


def memory_bytes(options: argparse.Namespace) -> int:
    """What Hessians and solving may take."""
    return int(1e9 * (MEMORY_GB if options.memory is None else options.memory))


def calibration_of(options: argparse.Namespace, out: Path) -> "Calibration | None":
    """The rows, for a method that needs them; ConfigError for a source that is nowhere, DataError for too little text.

    Errors name the flags where those below name the fields of a run's configuration.
    """
    if not reads_rows(options.method, options.scheme):
        return None
    from herd.data.corpora import check_source
    from quant.calibration.draw import draw

    try:
        if options.calibration == "":
            raise ConfigError("--calibration is empty; name a file, a folder, a hub dataset, or stdlib")
        if options.calibration is not None:
            check_source(Data(source=options.calibration))
    except DataError as error:
        raise ConfigError(_with_flags(str(error))) from None
    try:
        return draw(settings_of(options), data_of(options), options.model, out=out, memory_bytes=memory_bytes(options))
    except DiskFull:
        raise
    except (DataError, EnvironmentFault) as error:
        raise type(error)(_with_flags(str(error))) from error


def _with_flags(line: str) -> str:
    for field, flag in _FLAGS.items():
        line = line.replace(field, flag)
    return line
