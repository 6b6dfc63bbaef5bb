"""The thread that sends: how long the end of a run waits for it."""

import time

from herd.run.tracking_worker import Worker

PATIENCE_S = 0.4


class SlowSender:
    """Sends an event every 0.1 s until `stuck_at`, and then hangs."""

    def __init__(self, events, stuck_at):
        self.events, self.stuck_at, self.progress = events, stuck_at, 0
        self.started, self.uri = frozenset(), "sqlite://"

    def drain(self):
        while self.progress < self.events:
            time.sleep(0.1 if self.progress < self.stuck_at else 60)
            self.progress += 1


def test_a_run_waits_for_a_slow_store_that_takes_events_and_not_for_one_that_hangs():
    slow, hanging = SlowSender(30, stuck_at=30), SlowSender(30, stuck_at=2)
    for sender in (slow, hanging):
        worker = Worker(sender, sample_to="main")
        worker.start()
        worker.stop(PATIENCE_S)
    assert slow.progress == 30 and hanging.progress == 2
