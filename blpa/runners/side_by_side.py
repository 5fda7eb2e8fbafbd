"""A sweep by several processes of this machine, each at a cell that no other is at: jobs=2.

They are the same command, and know of each other by the locks of the runs alone (blpa/checkpoints.py), so that commands
given by hand, for one GPU each say, work through a sweep in the same way.
"""

import os
import signal
import subprocess
import sys
from types import FrameType

from blpa.budget import OUT_OF_TIME


def run(arguments: list[str], jobs: int) -> int:
    """Start the processes and wait for them; a signal is handed on to each, once.

    Args:
        arguments: of blpa-run.
        jobs: how many processes.

    Returns:
        The exit code: that of the last process that failed, or else OUT_OF_TIME where one says that cells are left.
    """
    command = [sys.executable, "-m", "blpa.runners.cli", *arguments, "jobs=1"]
    # In a session of its own none hears the terminal's Ctrl-C, which would reach it a second time by way of this one.
    # Threads of more processes than there are cores would mostly wait for each other.
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    processes = [subprocess.Popen(command, env=environment, start_new_session=True) for _ in range(jobs)]

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        codes = [process.wait() for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed = [code if code > 0 else 128 - code for code in codes if code not in (0, OUT_OF_TIME)]
    return failed[-1] if failed else OUT_OF_TIME if OUT_OF_TIME in codes else 0
