"""The export gate: opens a finished folder as a stranger would and refuses it unless everything about it holds.

    python -m quant.gate exports/scout-int4 [--json]

`quant.export` runs it in a fresh process, with a probe of what the in-memory model computes.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.run import cli
from herd.run.errors import DONE, DataError, HerdError
from quant.memory import fits, spare_memory
from quant.readers import GGUF
from quant.reports import Check, Report

if TYPE_CHECKING:
    from quant.probes import Probe


def inspect(folder: Path, probe: "Probe | None" = None, *, whole: bool | None = None) -> Report:
    """Check a folder in this process; without a probe, all but the comparison with the in-memory model.

    whole: load the model at once (else one layer at a time); by default where it is small (`quant.memory.fits`).
    """
    from quant.file_checks import digest_files

    checks: list[Check] = []
    facts: dict[str, Any] = {}
    try:
        for check in _inspect(folder, probe, facts, whole):
            checks.append(check)
    except HerdError as error:
        checks.append(Check("readable", False, str(error)))
    return Report(checks, facts, digest_files(folder))


def _inspect(folder: Path, probe: "Probe | None", facts: dict[str, Any], whole: bool | None) -> Iterator[Check]:
    """Cheapest first; a folder whose layout is wrong is not loaded."""
    from quant import checks
    from quant.architectures import bf16_bytes
    from quant.file_checks import UNSEALED, check_files, check_tokenizer
    from quant.sources import read_config

    if probe is None:
        yield check_files(folder) or Check("files", False, UNSEALED)
    config = read_config(folder)
    configuration, allocation, ignored = checks.check_configuration(config)
    yield configuration
    yield check_tokenizer(folder, config.get_text_config().vocab_size)
    if allocation is None:
        return
    if allocation.container == GGUF:
        from quant.gguf.checks import layout_checks

        layout = list(layout_checks(folder, config, allocation.schemes[0], probe and probe.stored, facts))
    else:
        headers = checks.stored_headers(folder)
        layout = [
            checks.check_tensors(config, allocation, ignored, headers, facts),
            checks.check_merged(config, allocation, ignored, headers),
            checks.check_names(config, headers),
        ]
        if probe is not None:
            layout.append(checks.check_digests("stored bytes", probe.stored, checks.digest_stored(folder)))
    yield from layout
    if all(check.passed for check in layout):
        whole = fits(bf16_bytes(config)) if whole is None else whole
        facts["checked"] = "whole" if whole else checks.LAYERWISE
        yield from checks.run_checks(folder, probe, whole=whole)


def serve(threads: int) -> None:
    """Answer requests, one JSON object a line: {"folder", "probe"} in, a report out. The client is `gate_process`."""
    from quant.probes import Probe

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    _prepare(threads)
    for line in sys.stdin:
        request = json.loads(line)
        report = inspect(Path(request["folder"]), Probe.open(Path(request["probe"])))
        print(json.dumps(report.to_json()), file=answers, flush=True)


def _prepare(threads: int) -> None:
    """Do the slow imports at once (the client still quantises), and silence what is not a finding."""
    spare_memory()
    import torch
    import transformers

    import quant.checks  # noqa: F401

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    """Check one folder (or serve `quant.export`); exit code 0 when it passes, 4 when it does not."""
    parser = cli.parser(
        "quant.gate",
        description="Check an exported model folder: configuration, tensors, names, reload, logits, a sample.",
        examples=("python -m quant.gate exports/scout-int4",),
        config=False,
    )
    parser.add_argument("folder", nargs="?", type=Path, help="exported folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--threads", type=cli.threads, default=1, help="threads of the checks that run the model (default 1)"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(options.threads)
        return DONE
    if options.folder is None:
        parser.error("a folder is needed")
    return cli.main_guard(lambda: _answer(options))


def _answer(options: argparse.Namespace) -> None:
    _prepare(options.threads)
    with contextlib.redirect_stdout(sys.stderr):
        report = inspect(options.folder)
    print(json.dumps(report.to_json(), indent=1) if options.json else report.to_text())
    if not report.passed:
        raise DataError(f"{options.folder} does not pass: {report.reason}")


if __name__ == "__main__":
    sys.exit(main())
