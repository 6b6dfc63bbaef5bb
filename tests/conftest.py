"""Settings every test shares: one thread a process (two cores, several ranks), no hub, no stray MLflow store."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A machine that is busy is not a failure, and examples that failed belong in tests, not in a folder.
settings.register_profile("house", deadline=None, database=None)
settings.load_profile("house")
