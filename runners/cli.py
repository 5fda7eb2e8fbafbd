"""Train networks whose activations are saved for the backward pass in 8, 4 or 2 bits, and print the paper's tables.

usage: blpa-run [-m] [--cfg job] [--config-dir FOLDER] [group=option ...] [key=value ...]

  blpa-run mode=4bit depth=1001                     train one network (CIFAR-10 unless dataset= says otherwise)
  blpa-run mode=exact,4bit depth=164,254 -m         train every combination
  blpa-run dataset=imagenet depth=152               ImageNet, or other image files (dataset.root=/path)
  blpa-run gpu.processes=8 depth=1001               train one network on eight GPUs; torchrun -m runners does too
  blpa-run experiment=demo -m                       the paper's five modes on digits, in minutes on a CPU
  blpa-run experiment=table1 seed=0 -m              the paper's table of errors, one seed
  blpa-run task=max-batch gpu=gtx1080ti depth=488   the largest batch that fits a card
  blpa-run task=runtime mode=4bit depth=56          time of a training step per sample, beside stock layers
  blpa-run task=kernels mode=4bit                   bandwidth of each kernel relative to a copy
  blpa-run task=memory depth=164                    where the bytes of a training step go
  blpa-run task=gradient-error mode=4bit            how far the mode's gradients are from those of stock layers
  blpa-run task=thresholds task.checkpoint=FILE     where the ReLU's threshold lies in trained channels
  blpa-run task=progress                            how far each training run is
  blpa-run task=tables                              results/tables from everything that has been run
  blpa-run task=plots                               results/figures from everything that has been run
  blpa-run task=report                              all of it on one page, results/report.html

  -m, --multirun        run every combination of values separated by commas, and of those an experiment lists; finished
                        cells are skipped (resume=false runs them again), failed ones are recorded and do not stop the
                        rest. hydra/launcher=joblib or submitit_slurm runs cells in processes or on a cluster
  -c, --cfg job         print the composed configuration, one for each cell, and run nothing; hydra and all print
                        Hydra's own part
  -cd, --config-dir     a folder of options of your own: FOLDER/mode/mine.yaml is mode=mine
  --info [WHAT]         what Hydra knows: all, defaults, defaults-tree, config, plugins, searchpath
  -sc, --shell-completion   eval "$(blpa-run -sc install=bash)" completes groups and keys in this shell
  -h, --help            print this

Text arrives as it is typed: run=1.10 is not run=1.1. In text, a comma separates the values of a sweep unless it is in
quotes, and ${key} is the value of another key. ~ and ~user at the beginning of a path are a home; ./~ is a plain name.

A run goes on from its last checkpoint when it is started again. Exit codes: 0 done, 1 not done (stderr says why),
2 bad configuration, 3 budget_minutes are over (started again, it goes on), 4 the run is locked by another process,
5 the training diverged, 128 + n ended by signal n.
"""

# torch is imported by the task, after the configuration of every cell has been checked.

import argparse
import errno
import os
import signal
import sys

from omegaconf import OmegaConf

from runners import compose, help, printing, processes, sweep
from runners.cells import task_module
from runners.errors import Terminated, UserError, classify, hint
from runners.files import at_home
from runners.run import report_error, run_cell
from runners.texts import hydra_text, quoted
from runners.training import signals

CFG = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the command line after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    with printing.tolerant() as output:
        try:
            with signals.raised():
                return _answer(sys.argv[1:] if arguments is None else arguments, output)
        except KeyboardInterrupt as error:
            end = error if isinstance(error, Terminated) else Terminated(signal.SIGINT)
            return _report(end, end.exit_code)
        except OSError as error:  # a name too long for the file system, or a folder that may not be looked into
            return report_error(classify(error)[1], 1)


def _answer(arguments: list[str], output: printing.Output) -> int:
    try:
        given = _parse(arguments)
        if given.multirun and (launched := processes.launched()):
            raise UserError(
                f"-m is not allowed in WORLD_SIZE={launched[1]} processes: a sweep begins in one process, and each of "
                "its cells in several (gpu.processes, or hydra/launcher=submitit_slurm)"
            )
        if processes.is_silent() and (given.help or given.info or given.cfg):
            return 0  # process 0 prints it
        overrides = [*given.overrides]
        if any(text.lstrip("+~").startswith("config_dir=") for text in overrides):
            raise UserError("config_dir= is not allowed: give the folder by --config-dir")
        if given.config_dir:
            given.config_dir = at_home("--config-dir", given.config_dir)
            overrides.append(f"config_dir={hydra_text(os.path.abspath(given.config_dir))}")
        with compose.session(given.config_dir) as hydra:
            if given.help:
                print(help.text(__doc__ or "", compose.composed(overrides[len(given.overrides) :])))
            elif given.shell_completion:
                with compose.one_line():
                    hydra.shell_completion("config", given.overrides)
            elif given.info:
                with compose.one_line():
                    hydra.show_info(given.info, "config", [*map(quoted, overrides)])
            elif given.cfg and given.cfg != "job":
                with compose.one_line():
                    hydra.show_cfg("config", [*map(quoted, overrides)], given.cfg, package=None)
            elif given.cfg:
                runs = compose.runs(overrides, multirun=given.multirun)
                print("---\n".join(OmegaConf.to_yaml(run) for _, run in runs), end="")
            else:
                cells = compose.cells(overrides, multirun=given.multirun)
                code = sweep.run_all(cells) if given.multirun else run_cell(cells[0].config)
                if code or not hasattr(task_module(cells[0].config.task.name), "ONLY_PRINTS"):
                    return code
    except UserError as mistake:
        return _report(mistake, 2)
    return _printed(output)


def _report(error: object, exit_code: int) -> int:
    """Print an error that all processes have which train together, in one of them; return the exit code."""
    return exit_code if processes.is_silent() else report_error(error, exit_code)


def _printed(output: printing.Output) -> int:
    """Return the exit code of a command that writes no file: what it prints is all that it makes, so it must arrive.

    A command that writes files has done its work when they are written, whoever reads its output.
    """
    output.flush()
    if output.lost is None:
        return 0
    if output.lost.errno == errno.EPIPE:  # the reader has left, as with `| head`
        return 141  # 128 + SIGPIPE, which ends other programs here
    return report_error(f"cannot write to stdout: {output.lost.strerror}", 1)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Separate flags, which are Hydra's, from overrides, in any order."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=CFG)
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("--info", nargs="?", const="all", choices=INFO)
    parser.add_argument("-sc", "--shell-completion", action="store_true")
    flags = list(parser._option_string_actions)
    parser.add_argument("overrides", nargs="*")

    def refuse(message: str) -> None:
        unknown = [text for text in arguments if text.startswith("-") and text.partition("=")[0] not in flags]
        if unknown:
            message = f"unknown flag {unknown[0]}{hint(unknown[0], flags)}; allowed: {', '.join(flags)}"
        raise UserError(message)

    parser.error = refuse  # type: ignore[assignment, method-assign]
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
