"""Train networks whose activations are kept for the backward pass in 8, 4 or 2 bits, and print the tables of it.

usage: blpa-run [-m] [--cfg] [group=option ...] [key=value ...]

  blpa-run mode=4bit depth=1001                  train one network (CIFAR-10 unless dataset= says otherwise)
  blpa-run mode=exact,4bit depth=164,254 -m      train every combination, one after the other
  blpa-run experiment=demo -m                    the paper's five modes on digits, in minutes on a CPU
  blpa-run experiment=table1 seed=0 -m           the paper's table of errors, one seed
  blpa-run task=max-batch gpu=gtx1080ti depth=488   the largest batch that fits a card
  blpa-run task=runtime mode=4bit depth=56       time of a training step, by the sample, beside exact's
  blpa-run task=kernels mode=4bit                bytes a second of each kernel function, beside a copy's
  blpa-run task=memory depth=164                 where the bytes of a training step go
  blpa-run task=gradient-error mode=4bit         how far the mode's gradients are from exact's
  blpa-run task=thresholds task.checkpoint=FILE  where the ReLU's threshold lies in trained channels
  blpa-run task=progress                         how far each training run is, and what to carry elsewhere
  blpa-run task=tables                           results/tables from everything that has been run
  blpa-run task=plots                            results/figures from everything that has been run
  blpa-run task=report                           all of it on one page, results/report.html

  -m, --multirun    run every combination of values separated by commas, and those an experiment lists, but for those
                    that are finished (resume=false runs them again); hydra/launcher=joblib or submitit_slurm runs
                    them in processes or on a cluster
  -c, --cfg         print the composed configuration and run nothing
  -h, --help        print this

A run goes on from its last checkpoint when it is started again. Exit codes: 0 done, 1 not done (stderr says why),
2 bad configuration, 3 budget_minutes are over (started again, it goes on), 4 the run is locked by another process,
5 the training diverged, 128 + n ended by signal n.
"""

# torch is imported by the task, after every cell has been checked.

import os
import sys

from omegaconf import OmegaConf

from runners import compose, launch, side_by_side
from runners import help as usage
from runners.errors import UserError
from runners.sweep import is_on_cuda, refuse, run_all, run_cell

FLAGS = {"-m": "-m", "--multirun": "-m", "-c": "--cfg", "--cfg": "--cfg", "-h": "--help", "--help": "--help"}


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for.

    Args:
        arguments: the command line after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    try:
        exit_code = _answer(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return refuse("interrupted", 130)
    except BrokenPipeError:  # whoever read the output has left, as `| head` does; what is left of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, which ends other programs here
    return exit_code


def _answer(arguments: list[str]) -> int:
    try:
        flags, overrides = _split(arguments)
        with compose.session():
            if "--help" in flags:
                print(usage.text(__doc__ or "", compose.checked(compose.composed())))
                return 0
            cells = compose.cells(overrides, multirun="-m" in flags)
            # An experiment's own number is for its sweep: one cell of it runs by itself.
            is_given = any(override.startswith("jobs=") for override in overrides)
            jobs = cells[0].config.jobs if "-m" in flags or is_given else 1
            if jobs > 1 and ("-m" not in flags or launch.is_asked_for(cells)):
                raise UserError(f"jobs={jobs} is for a sweep: add -m, and name no launcher")
            if jobs > 1 and not cells[0].config.resume:
                raise UserError(f"jobs={jobs} resume=false: each process would do every cell anew; choose one of them")
            if "--cfg" not in flags and launch.is_asked_for(cells):
                return launch.run_all(cells)
    except UserError as mistake:
        return refuse(mistake, 2)
    configs = [cell.config for cell in cells]
    if "--cfg" in flags:
        print("---\n".join(OmegaConf.to_yaml(config) for config in configs), end="")
        return 0
    if jobs > 1 and not any(map(is_on_cuda, configs)):  # on a GPU one process trains them all
        return side_by_side.run(arguments, jobs)
    return run_all(configs) if "-m" in flags else run_cell(configs[0])


def _split(arguments: list[str]) -> tuple[set[str], list[str]]:
    """Tell flags from overrides; they may come in any order."""
    given = [argument for argument in arguments if argument.startswith("-")]
    for flag in given:
        if flag not in FLAGS:
            raise UserError(f"unknown flag {flag}{compose.hint(flag, FLAGS)}; allowed: {', '.join(FLAGS)}")
    return {FLAGS[flag] for flag in given}, [argument for argument in arguments if argument not in given]


if __name__ == "__main__":
    sys.exit(main())
