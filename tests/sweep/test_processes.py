"""Processes of jobs."""

import signal
import time

from scantling.sweep import processes


def test_a_job_that_is_told_to_stop_while_it_is_started_stops(tmp_path, monkeypatch):
    """Before it has handlers of its own, when it still has the launcher's."""
    become_a_job = processes.become_a_job

    def slowly(*arguments):
        time.sleep(0.2)
        become_a_job(*arguments)

    monkeypatch.setattr(processes, "become_a_job", slowly)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        process = processes.fork_job(lambda: time.sleep(20) or 0, tmp_path / "log.txt", {})
        process.ask_to_stop()
        while (code := process.poll()) is None:
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == -signal.SIGTERM
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
