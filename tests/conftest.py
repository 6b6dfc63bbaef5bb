"""Settings every test shares: one thread a process (two cores, several ranks), no hub, no stray MLflow store."""

import logging
import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A machine that is busy is not a failure, and examples that failed belong in tests, not in a folder.
settings.register_profile("house", deadline=None, database=None)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def loggers_that_speak():
    """MLflow's migrations switch off every logger that exists in the process; a test must not inherit that."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False
