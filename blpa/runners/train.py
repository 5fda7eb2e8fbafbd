"""Train and test one network: device, kernels, data, model, training, records, in that order, cheap refusals first."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from blpa import data, kernels, records, training
from blpa.config import Config
from blpa.records import GROUP, Record
from blpa.runners import paper, setup


def run(config: Config) -> list[Record]:
    """Train the configured network, or go on with it, and record what it came to.

    Args:
        config: one run, checked.

    Returns:
        Test error (%), training time (s) and speed (samples/s), as written to results/runs/<run>/records.json.

    Raises:
        UserError: the machine or the data cannot do what the configuration asks for.
        Stopped: the training came to a stop before its end (see training.py).
    """
    run_dir = setup.run_folder(config)
    device = setup.device(config.gpu)
    elements = setup.encoded_elements(config, steps=config.dataset.iterations)
    chosen = kernels.choose(config.gpu.kernels, device, elements=elements)
    if device.type == "cpu" and config.gpu.name not in ("auto", "cpu"):
        print(f"gpu={config.gpu.name}: torch finds no CUDA device here; training on the CPU", file=sys.stderr)
    if config.gpu.kernels == "auto" and config.mode.layers == "coded":
        print(f"kernels: {chosen.name}\n", end="", file=sys.stderr)
    gpu = setup.used(config.gpu, device)
    if gpu.precision != config.gpu.precision:
        print(f"precision: {gpu.precision}\n", end="", file=sys.stderr)
    used = replace(config, gpu=replace(gpu, device=device.type, kernels=chosen.name))
    images = data.load(config.dataset, device)
    model = setup.model(config, chosen)
    outcome = training.train(model, images, used, device=device, run_dir=run_dir)
    source = setup.source(config, device, chosen.name) | records.of_parts(outcome.parts)
    measured = _records(config, outcome, source, run_dir)
    records.write(measured, run_dir)
    records.forget_failure(run_dir)
    print(
        f"{config.run}: test error {outcome.test_error_percent:.2f} % after {outcome.iterations} iterations, "
        f"{outcome.seconds:.0f} s, {outcome.samples_per_second:.0f} samples/s"
    )
    return measured


def _records(config: Config, outcome: training.Outcome, source: dict[str, Any], run_dir: Path) -> list[Record]:
    """What was measured; the records already there where the run was finished before and nothing was measured now."""
    if config.resume:
        before = records.known(run_dir)
        if any(record.metric == "train_seconds" and record.value == outcome.seconds for record in before):
            # A wall time in nanoseconds does not come twice: their date and commit stay true.
            return [replace(record, experiment=config.experiment, command=source["command"]) for record in before]

    error, *others = (
        setup.record(
            config, source, metric=metric, unit=unit, value=value, low=value, high=value, n=1,
            iterations=outcome.iterations,
        )
        for metric, unit, value in (
            ("test_error_percent", "%", outcome.test_error_percent),
            ("train_seconds", "s", outcome.seconds),
            ("samples_per_second", "samples/s", outcome.samples_per_second),
        )
    )  # fmt: skip
    paper_mean, _ = paper.error_percent(tuple(getattr(error, name) for name in GROUP), error.mode)
    return [replace(error, paper_value=paper_mean), *others]
