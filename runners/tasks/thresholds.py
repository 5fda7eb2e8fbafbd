"""Position of the ReLU's threshold in every channel of a trained network, in standard deviations.

    y = gamma x_hat + beta > 0   exactly where   sign(gamma) x_hat > -shift,     shift = beta / |gamma|

A codec over [-clip, clip] with bins of width d has no bin entirely on the negative side of the threshold where
shift < -(clip - d), and none entirely on the positive side where shift > clip - d. Such channels need the guards at the
two ends of the range (README, "Departures", 1). Beyond clip, a grid that followed the threshold would leave the data
(2). The task writes results/thresholds/<run>.csv, a histogram, and results/figures/<run>.png, which task=plots draws
again from the file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blpa.codec import Codec
from blpa.kernels.reference import REFERENCE
from runners import provenance, records
from runners.cells import check_weights, weights_name
from runners.config import Config
from runners.errors import UserError
from runners.files import write_csv
from runners.records import Record
from runners.reporting import figures
from runners.reporting.pages import aligned
from runners.training import network, weights
from runners.training.averages import BATCH_NORMS
from runners.training.network import META

LIMIT, BIN = 6.0, 0.125
"""Half-width of the histogram, whose outermost bins also count values beyond, and width of its bins."""
PARTS = ("first third of the layers", "second", "last")


@dataclass
class Settings:
    """Settings of this task."""

    name: str
    checkpoint: str | None
    """File of the weights to analyse, of any mode."""


NEEDS_NO_GPU = True


def check(config: Config) -> None:
    """Check that the weights are named."""
    if not config.task.checkpoint:
        raise UserError("task=thresholds analyses trained weights: name a file of them, task.checkpoint=")


def folder(config: Config) -> str:
    """Name the folder by the run and the weights."""
    return f"{config.run}-thresholds-{weights_name(config)}"


def run(config: Config) -> list[Record]:
    """Count the channels, record and print the shares, and draw the histogram.

    Args:
        config: one run, checked; task.checkpoint names the weights, the mode the codec.

    Returns:
        The shares of all channels, in percent; n is the number of channels.

    Raises:
        UserError: the weights are not of this network or were written to meanwhile, or the mode saves no codes.
    """
    if config.mode.bits is None:
        raise UserError(f"mode={config.mode.name}: saves no codes; choose one that does, mode=4bit")
    settings = settings_of(config)
    results, run_dir = Path(config.results), network.run_folder(config)
    codec = Codec(config.mode.bits, config.mode.clip)
    gammas, betas = zip(*_batch_norms(config), strict=True)
    check_weights(config, settings["checkpoint"])
    thirds = [slice(len(gammas) * k // 3, len(gammas) * (k + 1) // 3) for k in range(3)]
    parts = {part: (torch.cat(gammas[of]), torch.cat(betas[of])) for part, of in zip(PARTS, thirds, strict=True)}
    everything = shares(torch.cat(gammas), torch.cat(betas), codec)
    columns = {"all": everything, **{part: shares(*vectors, codec) for part, vectors in parts.items()}}
    shift = _shift(torch.cat(gammas), torch.cat(betas))
    bins = [row for part, vectors in parts.items() for row in histogram(part, *vectors)]
    write_csv(results / "thresholds" / f"{run_dir.name}.csv", bins)
    source = provenance.source(config, META, "none")
    measured = [
        provenance.record(
            config, source, metric=name.replace(" ", "_"), unit="%", value=share, low=share, high=share, n=len(shift),
            iterations=0, settings=settings,
        )
        for name, share in everything.items()
    ]  # fmt: skip
    records.write(measured, run_dir)
    rows = [[name, *(f"{column[name]:.2f}" for column in columns.values())] for name in everything]
    print(aligned([[f"% of the channels, {codec.bits} bits, clip {codec.clip:g}", *columns], *rows]))
    print(f"beta / |gamma| of {len(shift)} channels: {shift.min():.2f} to {shift.max():.2f}")
    print(figures.draw_thresholds(results, run_dir.name))
    return measured


def settings_of(config: Config) -> dict[str, str | None]:
    """Return the setting that decides the result and has no column: the weights."""
    return {"checkpoint": weights_name(config)}


def shares(gamma: Tensor, beta: Tensor, codec: Codec) -> dict[str, float]:
    """Compute the percentage of channels whose threshold a codec without guards would lose.

    Args:
        gamma: scale of every channel [C].
        beta: shift [C].
        codec: of the layer.
    """
    shift = _shift(gamma, beta)
    clip = codec.levels * codec.bin_width / 2
    last_edge = clip - codec.bin_width
    found = {
        "threshold above the bins": shift < -last_edge,
        "threshold below the bins": shift > last_edge,
        "threshold beyond clip": shift.abs() > clip,
        "gamma not positive": gamma <= 0,
    }
    return {name: 100 * channels.double().mean().item() for name, channels in found.items()}


def histogram(part: str, gamma: Tensor, beta: Tensor) -> list[dict[str, float | str]]:
    """Compute the histogram of one part: rows of part, low, high and percentage of channels in between."""
    shift = _shift(gamma, beta).clamp(-LIMIT, LIMIT - BIN / 2)
    counts = torch.histc(shift, bins=round(2 * LIMIT / BIN), min=-LIMIT, max=LIMIT)
    lows = [-LIMIT + BIN * k for k in range(len(counts))]
    percent = (100 * counts / len(shift)).tolist()
    return [
        {"part": part, "low": low, "high": low + BIN, "percent": round(share, 4)}
        for low, share in zip(lows, percent, strict=True)
    ]


def _shift(gamma: Tensor, beta: Tensor) -> Tensor:
    """Compute beta / |gamma| as the codec does: infinite where only gamma is 0, and 0 where both are."""
    return (beta / gamma.abs()).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _batch_norms(config: Config) -> list[tuple[Tensor, Tensor]]:
    """Return gamma and beta of every batch norm, from the first to the last."""
    model = network.build(network.exact(config), REFERENCE)
    weights.load_weights(model, Path(str(config.task.checkpoint)))
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    return [(norm.weight.detach(), norm.bias.detach()) for norm in norms]
