"""Train networks whose activations are kept for the backward pass in 8, 4 or 2 bits, and print the tables of it.

usage: blpa-run [-m] [--cfg] [group=option ...] [key=value ...]

  blpa-run mode=4bit depth=1001                  train one network (CIFAR-10 unless dataset= says otherwise)
  blpa-run mode=exact,4bit depth=164,254 -m      train every combination, one after the other
  blpa-run experiment=demo -m                    the paper's five modes on digits, in minutes on a CPU
  blpa-run experiment=table1 seed=0 -m           the paper's table of errors, one seed
  blpa-run task=max-batch gpu=gtx1080ti depth=488   the largest batch that fits a card, predicted
  blpa-run task=memory depth=164                 where the bytes of a training step go
  blpa-run task=gradient-error mode=4bit         how far the mode's gradients are from exact's
  blpa-run task=tables                           results/tables from everything that has been run
  blpa-run task=plots                            results/figures from everything that has been run

  -m, --multirun    run every combination of values separated by commas, and those an experiment lists
  -c, --cfg         print the composed configuration and run nothing
  -h, --help        print this

A run goes on from its last checkpoint when it is started again. Exit codes: 0 done, 1 not done (stderr says why),
2 bad configuration, 128 + n ended by signal n.
"""

# Hydra composes, and only composes: the compose API, not `hydra.main`, which would also write multirun.yaml into the
# folder it is called from, start the first cell of a sweep before the last is checked, and answer a mistake in several
# lines. torch is imported by the task, after every cell has been checked.

import difflib
import importlib
import itertools
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blpa import records
from blpa.cells import folder_name, overrides, run_name
from blpa.config import CONF, Config, check, options
from blpa.runners import usage

FLAGS = {"-m": "-m", "--multirun": "-m", "-c": "--cfg", "--cfg": "--cfg", "-h": "--help", "--help": "--help"}

ConfigStore.instance().store(name="schema", node=Config)


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
    except BrokenPipeError:  # whoever read the output has left, as `| head` does; what is left of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, which ends other programs here
    return exit_code


def _answer(arguments: list[str]) -> int:
    try:
        flags, overrides = _split(arguments)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            if "--help" in flags:
                print(usage.text(__doc__ or "", _checked(_compose([]))))
                return 0
            configs = list(_cells(overrides, multirun="-m" in flags))
        _refuse_shared_folders(configs)
    except ValueError as mistake:
        return _refuse(mistake, 2)
    if "--cfg" in flags:
        print("---\n".join(OmegaConf.to_yaml(config) for config in configs), end="")
        return 0
    return _run_all(configs)


def _run_all(configs: list[Config]) -> int:
    """Run one cell after the other, in a sweep only those that are not finished yet.

    A cell that fails says so, leaves a record of it, and the next one runs, unless a signal ended it.
    """
    if len(configs) == 1:
        return _run(configs[0])
    failure = failed = skipped = 0
    began = time.monotonic()
    for number, config in enumerate(configs):
        if _is_finished(config):
            skipped += 1
            continue
        done, elapsed = number - skipped, time.monotonic() - began
        left = f", about {_minutes(elapsed / done * (len(configs) - number))} left" if done else ""
        counts = f"{skipped} finished before, {failed} failed" if skipped or failed else ""
        told = ", ".join(filter(None, [counts, f"{_minutes(elapsed)} done{left}"]))
        print(f"[{number + 1}/{len(configs)}] {folder_name(config) or config.task.name} ({told})", file=sys.stderr)
        exit_code = _run(config, records_failure=True)
        failure, failed = exit_code or failure, failed + (exit_code != 0)
        if exit_code > 128:
            return exit_code
    print(
        f"{len(configs)} cells: {len(configs) - skipped - failed} done, {skipped} finished before (resume=false does "
        f"them again), {failed} failed; {_minutes(time.monotonic() - began)}",
        file=sys.stderr,
    )
    return failure


def _is_finished(config: Config) -> bool:
    folder = folder_name(config)
    if folder is None or not config.resume:
        return False
    return records.is_finished(Path(config.results) / "runs" / folder, overrides(config))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _run(config: Config, *, records_failure: bool = False) -> int:
    """Run one cell; a mistake or misfortune of the user's becomes one line, a bug keeps its traceback."""
    began = time.monotonic()
    try:
        module = config.task.name.replace("-", "_")
        importlib.import_module(f"blpa.runners.{module}").run(config)
    except KeyboardInterrupt:
        return _refuse("interrupted", 130)
    except Exception as error:
        exit_code, reason = _judge(error)
        if exit_code is None and not records_failure:
            raise
        if exit_code is None:
            traceback.print_exc()
        if records_failure and (exit_code or 1) < 128 and folder_name(config):
            importlib.import_module("blpa.runners.setup").record_failure(config, reason, time.monotonic() - began)
        return _refuse(reason, exit_code or 1)
    return 0


def _judge(error: Exception) -> tuple[int | None, str]:
    """The exit code of what is a mistake or misfortune of the user's, None for a bug; and one line that says it."""
    if isinstance(error, OSError):
        return 1, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if hasattr(error, "exit_code"):
        return error.exit_code, str(error)
    if isinstance(error, ValueError) and _is_ours(error):
        return 1, str(error)
    said = next(iter(str(error).strip().splitlines()), "")
    if type(error).__name__ == "OutOfMemoryError":  # torch's own, known by name alone: torch need not be there
        return 1, f"does not fit: {said}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return 1, f"does not compile: {said}"
    return None, f"{type(error).__name__}: {said}"


def _is_ours(error: Exception) -> bool:
    """Whether our own code raised it: then, by the rule of this house, its message is meant for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals["__name__"]).startswith("blpa.")


def _refuse(message: object, exit_code: int) -> int:
    print("blpa-run: error:", " ".join(str(message).split()), file=sys.stderr)
    return exit_code


def _split(arguments: list[str]) -> tuple[set[str], list[str]]:
    """Tell flags from overrides; they may come in any order."""
    given = [argument for argument in arguments if argument.startswith("-")]
    for flag in given:
        if flag not in FLAGS:
            raise ValueError(f"unknown flag {flag}{_hint(flag, FLAGS)}; allowed: {', '.join(FLAGS)}")
    return {FLAGS[flag] for flag in given}, [argument for argument in arguments if argument not in given]


def _cells(overrides: list[str], *, multirun: bool) -> Iterator[Config]:
    """Every cell the overrides ask for, composed and checked.

    With `multirun`, what an experiment lists under hydra.sweeper.params is swept too; the command line goes before it.
    """
    given = _parse(overrides)
    for cell in itertools.product(*(_values(override, multirun) for override in given.values())):
        listed = _compose(cell, return_hydra_config=True).hydra.sweeper.params if multirun else None
        added = _parse([f"{key}={value}" for key, value in (listed or {}).items() if key not in given])
        for rest in itertools.product(*(_values(override, multirun) for override in added.values())):
            yield _checked(_compose((*cell, *rest)))


def _parse(overrides: list[str]) -> dict[str, Override]:
    """Parse overrides and refuse the keys that no run has; the last one of a key stands."""
    groups, plain = _keys()
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    parsed = {}
    for text in overrides:
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException as error:
            raise ValueError(f"cannot read {text!r}: write key=value, with quotes around special characters") from error
        key = override.get_key_element()
        if key not in groups and key not in plain:
            raise ValueError(f"unknown key {key!r}{_hint(key, [*groups, *plain])}; {_allowed(key, groups, plain)}")
        parsed[key] = override
    return parsed


def _keys() -> tuple[list[str], list[str]]:
    """The groups, and the plain values as dotted keys."""
    groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
    schema = OmegaConf.structured(Config)
    plain = [key for key in schema if key not in groups]
    for group in groups:
        if group in schema and OmegaConf.is_dict(schema[group]):
            plain += [f"{group}.{key}" for key in schema[group]]
    return groups, plain


def _values(override: Override, multirun: bool) -> list[str]:
    """The key=value texts an override stands for: one, or in a sweep one for each value."""
    key, text = override.get_key_element(), override.input_line
    if not override.is_sweep_override():
        values = [override.get_value_element_as_str()]
    elif not multirun:
        raise ValueError(f"{text} names several values: add -m to run each of them")
    elif not override.is_discrete_sweep():
        raise ValueError(f"{text} has no list of values: separate them by commas")
    else:
        values = list(override.sweep_string_iterator())
        if not values:
            raise ValueError(f"{text} names no value at all")
    groups, _ = _keys()
    if key in groups:
        for value in values:
            if value not in options(key):
                hint, allowed = _hint(value, options(key)), ", ".join(options(key))
                raise ValueError(f"{key}={value} is not allowed{hint}; choose one of {allowed}")
    return [f"{key}={value}" for value in values]


def _compose(overrides: Iterable[str], *, return_hydra_config: bool = False) -> DictConfig:
    """Compose one cell; what Hydra and OmegaConf have against it becomes one line."""
    try:
        return compose("config", list(overrides), return_hydra_config=return_hydra_config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_reason(error)) from error


def _checked(composed: DictConfig) -> Config:
    try:
        if OmegaConf.is_missing(composed, "run"):
            composed.run = run_name(cast(Config, composed))
        config = cast(Config, OmegaConf.to_object(composed))
    except OmegaConfBaseException as error:
        raise ValueError(_reason(error)) from error
    check(config)
    return config


def _refuse_shared_folders(configs: list[Config]) -> None:
    seen: set[str] = set()
    for config in configs:
        folder = folder_name(config)
        if folder in seen:
            raise ValueError(f"two cells of this sweep would share run={config.run}: name them apart with run=")
        if folder is not None:
            seen.add(folder)


def _reason(error: BaseException) -> str:
    """The first line of what is at the bottom of a chain of exceptions, led by the key it is about."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    if str(key).startswith("dataset.schedule["):
        reason += "; every number in it has a point: [[0.5,0.1],[1.0,0.01]]"
    return f"{key}: {reason}" if key else reason


def _hint(wrong: str, right: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(right), n=1)
    return f", did you mean {close[0]}?" if close else ""


def _allowed(key: str, groups: list[str], plain: list[str]) -> str:
    """What may stand in place of an unknown key: the values of the group it names, or all that stands at the top."""
    group = key.partition(".")[0]
    inside = [name.partition(".")[2] for name in plain if name.startswith(f"{group}.")]
    if inside:
        return f"allowed in {group}: " + ", ".join(inside)
    return "allowed: " + ", ".join([*groups, *(name for name in plain if "." not in name)])


if __name__ == "__main__":
    sys.exit(main())
