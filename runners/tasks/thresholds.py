"""Where the ReLU's threshold lies in every channel of a trained network, in standard deviations.

    y = gamma x_hat + beta > 0   exactly where   sign(gamma) x_hat > -shift,     shift = beta / |gamma|

A code over [-clip, clip] with bins d wide has no bin of its own above the threshold where shift < -(clip - d), and none
below it where shift > clip - d: such channels need the guards at the two ends of the range (README, "Departures", 1).
Beyond clip, a grid that followed the threshold would leave the data (2). Written are results/thresholds/<run>.csv, a
histogram, and results/figures/<run>.png, which task=plots draws again from the file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from blpa.codec import Code
from blpa.kernels.reference import REFERENCE
from runners import provenance, records
from runners.cells import checkpoint_name
from runners.config import Config
from runners.errors import UserError
from runners.files import write_csv
from runners.records import Record
from runners.reporting import figures
from runners.reporting.pages import aligned
from runners.training import network
from runners.training.network import META

LIMIT, BIN = 6.0, 0.125
"""Ends of the histogram, which also count what lies beyond them, and width of its bins."""
PARTS = ("first third of the units", "second", "last")


@dataclass
class Settings:
    """Of this task."""

    name: str
    checkpoint: str | None
    """File of the weights to look at, of any mode."""


COUNTS = True
"""It needs no GPU where there is one."""


def check(config: Config) -> None:
    """Refuse to look at weights that nobody names."""
    if not config.task.checkpoint:
        raise UserError("task=thresholds looks at trained weights: name a file of them, task.checkpoint=")


def folder(config: Config) -> str:
    """The run's name and the weights."""
    return f"{config.run}-thresholds{checkpoint_name(config)}"


def run(config: Config) -> list[Record]:
    """Count the channels, print the shares, draw the histogram and record the shares.

    Args:
        config: one run, checked; task.checkpoint names the weights, the mode the code.

    Returns:
        The shares of all channels, in percent; n is how many there are.

    Raises:
        UserError: the weights are not of this network, or the mode has no code.
    """
    if config.mode.bits is None:
        raise UserError(f"mode={config.mode.name}: keeps no codes; name one that does, mode=4bit")
    results, run_dir = Path(config.results), network.run_folder(config)
    code = Code(config.mode.bits, config.mode.clip)
    gammas, betas = zip(*_units(config), strict=True)
    thirds = [slice(len(gammas) * k // 3, len(gammas) * (k + 1) // 3) for k in range(3)]
    parts = {part: (torch.cat(gammas[of]), torch.cat(betas[of])) for part, of in zip(PARTS, thirds, strict=True)}
    everything = shares(torch.cat(gammas), torch.cat(betas), code)
    columns = {"all": everything, **{part: shares(*vectors, code) for part, vectors in parts.items()}}
    rows = [[name, *(f"{column[name]:.2f}" for column in columns.values())] for name in everything]
    print(aligned([[f"% of the channels, {code.bits} bits, clip {code.clip:g}", *columns], *rows]))
    shift = _shift(torch.cat(gammas), torch.cat(betas))
    print(f"beta / |gamma| of {len(shift)} channels: {shift.min():.2f} to {shift.max():.2f}")
    bins = [row for part, vectors in parts.items() for row in histogram(part, *vectors)]
    write_csv(results / "thresholds" / f"{run_dir.name}.csv", bins)
    print(figures.draw_thresholds(results, run_dir.name))
    source = provenance.source(config, META, "none")
    measured = [
        provenance.record(
            config, source, metric=name.replace(" ", "_"), unit="%", value=share, low=share, high=share, n=len(shift),
            iterations=0, settings=settings_of(config),
        )
        for name, share in everything.items()
    ]  # fmt: skip
    records.write(measured, run_dir)
    return measured


def settings_of(config: Config) -> dict[str, str]:
    """Return what decides the result and has no column: the file of weights."""
    return {"checkpoint": Path(str(config.task.checkpoint)).stem}


def shares(gamma: Tensor, beta: Tensor, code: Code) -> dict[str, float]:
    """Percent of the channels whose threshold a code of theirs, placed without guards, would lose.

    Args:
        gamma: scale of every channel [C].
        beta: shift [C].
        code: the code.
    """
    shift = _shift(gamma, beta)
    last_edge = code.clip - code.bin_width
    found = {
        "threshold above the bins": shift < -last_edge,
        "threshold below the bins": shift > last_edge,
        "threshold beyond clip": shift.abs() > code.clip,
        "gamma not positive": gamma <= 0,
    }
    return {name: 100 * channels.double().mean().item() for name, channels in found.items()}


def histogram(part: str, gamma: Tensor, beta: Tensor) -> list[dict[str, float | str]]:
    """Rows of part, low, high and the percentage of its channels whose shift is in between."""
    shift = _shift(gamma, beta).clamp(-LIMIT, LIMIT - BIN / 2)
    counts = torch.histc(shift, bins=round(2 * LIMIT / BIN), min=-LIMIT, max=LIMIT)
    lows = [-LIMIT + BIN * k for k in range(len(counts))]
    percent = (100 * counts / len(shift)).tolist()
    return [
        {"part": part, "low": low, "high": low + BIN, "percent": round(share, 4)}
        for low, share in zip(lows, percent, strict=True)
    ]


def _shift(gamma: Tensor, beta: Tensor) -> Tensor:
    """As the code has it: infinite where gamma alone is 0, 0 where both are."""
    return (beta / gamma.abs()).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _units(config: Config) -> list[tuple[Tensor, Tensor]]:
    """Vectors gamma and beta of every unit, from the first to the last."""
    model = network.build(network.exact(config), REFERENCE)
    network.load_weights(model, Path(str(config.task.checkpoint)))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [(norm.weight.detach(), norm.bias.detach()) for norm in norms]
