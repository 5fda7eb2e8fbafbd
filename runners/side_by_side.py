"""A sweep by several processes of this machine, each of which runs the cells that no other has locked: jobs=2 on a CPU.

All run the same command, and only the locks of the runs (runners/locks.py) keep them apart. Commands given by hand, for
example one for each GPU, share a sweep in the same way.
"""

import os
import subprocess
import sys

from runners.errors import OutOfTime
from runners.training import signals


def run(arguments: list[str], jobs: int) -> int:
    """Start the processes and wait for them; a signal is passed on to each, once.

    Args:
        arguments: of blpa-run.
        jobs: how many processes; more than the machine has cores are not started.

    Returns:
        The exit code: that of the last process that failed, else 128 + signal, else OutOfTime's if cells are left.
    """
    command = [sys.executable, "-m", "runners", *arguments, "jobs=1"]
    cores = os.cpu_count() or 1
    if jobs > cores:
        print(f"jobs={jobs}: only {cores} at a time, one for each core", file=sys.stderr)
        jobs = cores
    threads = str(cores // jobs)
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    processes: list[subprocess.Popen[bytes]] = []

    def send(number: int) -> None:
        for process in processes:
            process.send_signal(number)

    with signals.handed_on(send) as received:
        for _ in range(jobs):
            if not received:
                if sys.stderr.isatty():
                    environment["TQDM_POSITION"] = str(len(processes))  # a line of the terminal for the bar of each
                # In a session of its own it does not receive the terminal's Ctrl-C besides the signal passed on.
                processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        codes = [process.wait() for process in processes]
    failed = [code if code > 0 else 128 - code for code in codes if code not in (0, OutOfTime.exit_code)]
    if failed or received:
        return failed[-1] if failed else 128 + received[0]
    return OutOfTime.exit_code if OutOfTime.exit_code in codes else 0
