"""Statistics of the samples of all processes, for batch norms that synchronise.

    forward     all-gather of each process's rows M_p, means and biased variances
                mean = sum M_p mean_p / M,   var = sum M_p (var_p + (mean_p - mean)^2) / M,   M = sum M_p
    backward    all-reduce of the sums sum dY and sum dY x_hat~, and of M_p; their means are the sums / M

A process may have another number of samples than the others: all are weighted by rows (samples times pixels). Every
process computes the same from what it receives, so all get the same bits.
"""

from typing import Any

import torch
from torch import Tensor, distributed


def sharing(process_group: Any) -> Any:
    """Return the processes that share statistics: a group, or all if it is None; None where there is but one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def gathered(own: Tensor, group: Any) -> Tensor:
    """Gather a vector [K] of each process: [processes, K], on all of them."""
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # PyTorch 2.11
    found = own.new_empty(distributed.get_world_size(group) * own.numel())
    gather(found, own, group)
    return found.view(-1, own.numel())


def combined(rows: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Combine rows [P, 1], means and biased variances [P, C] of parts to those of all [C] (parallel axis theorem).

    Source: Chan, Golub and LeVeque 1983.
    """
    weight = rows / rows.sum()
    mean_of_all = (weight * mean).sum(0)
    return mean_of_all, (weight * (var + (mean - mean_of_all).square())).sum(0)


def statistics_of_all(mean: Tensor, var: Tensor, rows: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance [C] of the samples of all processes, and their number of rows [].

    Args:
        mean: this process's [C].
        var: its biased variance [C].
        rows: its number of rows, at least 1.
        group: from sharing.
    """
    all_parts = gathered(torch.cat((mean.new_full((1,), rows), mean, var)), group)
    all_rows, means, variances = all_parts.split([1, len(mean), len(mean)], 1)
    return *combined(all_rows, means, variances), all_rows.sum()


def means_of_all(sums: Tensor, rows: int, group: Any) -> Tensor:
    """Return the means over the rows of all processes; `sums`, of any shape, is over the `rows` of this one."""
    total = torch.cat((sums.flatten(), sums.new_full((1,), rows)))
    distributed.all_reduce(total, group=group)
    return (total[:-1] / total[-1]).view_as(sums)
