"""Which command ends a study: one at a time, and another when that one is gone."""

import time

import optuna

from sweeps.closing import CLOSER, closing
from sweeps.ledger import owner


def test_one_command_ends_a_study_and_another_only_when_it_is_gone(tmp_path):
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'study.db'}")
    for known in (None, {"owner": "elsewhere 1 0.00", "beat": time.time() - 1000}):
        study.set_user_attr(CLOSER, known)
        with closing(study) as beat:
            beat()
            assert study.user_attrs[CLOSER]["owner"] == owner()
            with closing(study) as second:
                assert second is None
            assert study.user_attrs[CLOSER]["owner"] == owner()
        assert study.user_attrs[CLOSER] is None
    study.set_user_attr(CLOSER, {"owner": "elsewhere 1 0.00", "beat": time.time()})
    with closing(study) as beat:
        assert beat is None
