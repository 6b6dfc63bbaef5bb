"""The thread between a run and MLflow: sends what is pending every second, samples the machine every ten.

    worker = Worker(sender, sample_to=run_key); worker.start(); ...; worker.stop(timeout_s=30.0)

A store that does not answer costs one warning; it is tried again after 2, 4, ... 60 s.
"""

import sys
import threading
import time

from herd.run.store import shown
from herd.run.system_metrics import Sampler
from herd.run.tracking_sender import Sender, Unreachable

LINGER_S = 1.0  # events gathered before they are sent
SAMPLE_S = 10.0
LONGEST_WAIT_S = 60.0


class Worker(threading.Thread):
    """Owns a sender. Daemonic: it never holds up the end of the process, what it has not sent is in the journal."""

    def __init__(self, sender: Sender, *, sample_to: str) -> None:
        super().__init__(name="herd-tracking", daemon=True)
        self.sender, self._sample_to = sender, sample_to
        self._state = threading.Condition()
        self._asked = self._tried = self._served = 0
        self._stopping = False
        self._failures = 0
        self._next_send = self._next_sample = 0.0
        self._sampler: Sampler | None = None

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything appended before this call is sent; False when that took longer than `timeout_s`."""
        with self._state:
            self._asked += 1
            mine = self._asked
            self._state.notify_all()
            return self._state.wait_for(lambda: self._served >= mine, timeout_s)

    def stop(self, timeout_s: float) -> None:
        """Send once more and end; returns when that is done, or when nothing has moved for `timeout_s` seconds."""
        with self._state:
            self._stopping = True
            self._state.notify_all()
        seen = None
        while self.is_alive() and self.sender.progress != seen:
            seen = self.sender.progress
            self.join(timeout_s)

    def run(self) -> None:
        """Until stopped: sleep, sample, send."""
        while True:
            with self._state:
                self._state.wait_for(lambda: self._stopping or self._asked > self._tried, self._nap())
                stopping, asked, urgent = self._stopping, self._asked, self._asked > self._tried
                self._tried = asked
            now = time.monotonic()
            if self._sampler and now >= self._next_sample:
                self._sample(now)
            if stopping or urgent or now >= self._next_send:
                self._send(asked)
            if stopping and (self._sampler is None or self._next_sample):  # a short run is to have one sample too
                return

    def _nap(self) -> float:
        due = min(self._next_send, self._next_sample) if self._sampler else self._next_send
        return max(0.0, due - time.monotonic())

    def _sample(self, now: float) -> None:
        step = int(time.time() - self.sender.record.started)
        event = {"do": "metrics", "run": self._sample_to, "step": step, "time": int(time.time() * 1000)}
        self.sender.journal.append(event | {"values": self._sampler.sample()})
        self._next_sample = now + SAMPLE_S

    def _send(self, asked: int) -> None:
        try:
            self.sender.drain()
        except Unreachable as error:
            self._failures += 1
            self._next_send = time.monotonic() + min(2.0**self._failures, LONGEST_WAIT_S)
            if self._failures == 1 and self.sender.folder.is_dir():  # as in Journal.append
                self._say(f"warning: MLflow store {shown(self.sender.uri)}: {error}; the run goes on, events wait in")
        else:
            if self._failures:
                self._say(f"MLflow store {shown(self.sender.uri)} is back; sent what waited in")
            self._failures = 0
            self._next_send = time.monotonic() + LINGER_S
            with self._state:
                self._served = asked
                self._state.notify_all()
        # While the store is away samples wait with the rest, behind the run's start.
        waiting = self._failures > 0 and self.sender.journal.name() is not None
        if not self._sampler and (waiting or self._sample_to in self.sender.started):
            self._sampler = Sampler()

    def _say(self, text: str) -> None:
        print(f"{text} {self.sender.journal.path}", file=sys.stderr, flush=True)
