"""Who ends a study: of all commands that worked on it, anywhere, one repeats the best trial and writes the report.

with closing(optuna_study) as beat:
    if beat: ...; beat()             # None: another command does it, and lives
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import optuna

from sweeps.ledger import BEAT_S, gone, owner

CLOSER = "closer"
SETTLE_S = 1.0  # of two that come at once the later writer stays


@contextmanager
def closing(study: optuna.Study) -> Iterator[Callable[[], None] | None]:
    """A function to call all the while when the end is this command's, None when it is another's."""
    if not _take(study):
        yield None
        return
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > BEAT_S:
            last = time.monotonic()
            _sign(study)

    try:
        yield beat
    finally:
        study.set_user_attr(CLOSER, None)


def _take(study: optuna.Study) -> bool:
    known = study.user_attrs.get(CLOSER)
    if known and not gone(known["owner"], known["beat"]):
        return False
    _sign(study)
    time.sleep(SETTLE_S)
    return study.user_attrs[CLOSER]["owner"] == owner()


def _sign(study: optuna.Study) -> None:
    study.set_user_attr(CLOSER, {"owner": owner(), "beat": time.time()})
