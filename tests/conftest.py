"""Settings every test shares: one thread a process (two cores, several ranks), no hub, no stray MLflow store."""

import logging
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A machine that is busy is not a failure, and examples that failed belong in tests, not in a folder. Everyone draws the
# same examples, so that a commit passes or fails for all; `--hypothesis-profile explore` draws many new ones.
settings.register_profile("house", deadline=None, database=None, derandomize=True)
settings.register_profile("explore", deadline=None, database=None, max_examples=1000)
settings.load_profile("house")


# The longest files, so that none of them is left to one worker at the end; those that start ranks of their own, which
# fill both cores, take turns with those that do not.
FIRST = [
    *("launch/test_endings.py", "sweeps/test_pool.py", "launch/test_whole_path.py", "distill/test_compiled.py"),
    *("launch/test_training.py", "run/test_tracking.py", "launch/test_on_policy.py", "evals/test_main.py"),
    *("launch/test_study.py", "quant/test_main.py", "llama4/test_two_ranks.py", "run/test_ranks.py"),
]


def pytest_collection_modifyitems(items):
    """Put the tests of the longest files first, in the order of the list."""
    tests = Path(__file__).parent
    places = {tests / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(FIRST)))


@pytest.fixture(autouse=True)
def loggers_that_speak():
    """MLflow's migrations switch off every logger that exists in the process; a test must not inherit that."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False
