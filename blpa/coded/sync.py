"""SyncBatchNorm that saves codes: a batch norm whose statistics and gradient means are those of all processes' samples.

    forward     all-gather of rows, mean, variance, low, high and 1 / deviation      [P, 1 + 5 C]
    backward    all-reduce of rows, sum dY and sum dY x_hat~                         [1 + 2 C]

PyTorch's own calls an autograd function directly, which no mode sees: so this is a forward of the module, and `convert`
puts it in the place of PyTorch's. On a GPU the output comes from the very operations that PyTorch's calls. On a CPU,
which PyTorch's refuses, it comes from the formula.

The grid of the codes follows the statistics and the range of all samples, not of the process's own: so P processes save
the codes that one process with all samples would save, and get its gradients.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blpa import processes
from blpa.coded.mode import Coding, current_mode, is_recording
from blpa.coded.norms import Means, Statistics, coded_norm
from blpa.coded.tensors import Layout, is_worth_a_code
from blpa.kernels import RunningStats, compute_dtype


class CodedSyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm whose forward saves codes while a mode codes functions."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by the statistics of all processes."""
        group = processes.sharing(self.process_group) if self.training else None
        if group is None or input.is_meta:  # or counted, not computed
            return super(nn.SyncBatchNorm, self).forward(input)  # it calls F.batch_norm, which has a coded version
        coding = current_mode()
        if coding is None or not coding.is_coding or not is_recording(input, self.weight, self.bias):
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        return _sync_batch_norm(coding, self, input, group)


def _momentum(module: nn.SyncBatchNorm) -> float:
    """Count the batch, if running statistics are tracked, and return its weight in them."""
    if not module.track_running_stats:
        return 0.0
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    return 1.0 / int(module.num_batches_tracked) if module.momentum is None else module.momentum


class _Gathered(NamedTuple):
    """Statistics of each process that has samples [P, C], and their number [P, 1]."""

    rows: Tensor
    mean: Tensor
    var: Tensor
    low: Tensor
    high: Tensor
    rstd: Tensor
    """1 / deviation, rounded as PyTorch's operation for this device does; on a CPU not used."""

    @staticmethod
    def of(x: Tensor, layout: Layout, eps: float, group: Any) -> "_Gathered":
        """Compute the statistics of this process and gather those of all."""
        channels = x.shape[1]
        dtype = compute_dtype(x.dtype)
        own = x.new_zeros(5 * channels + 1, dtype=dtype)
        if x.numel():
            mean, var, low, high = layout.stats(x)
            rstd = (var + eps).rsqrt()
            if not x.is_cpu:
                mean, rstd = torch.batch_norm_stats(_dense(x), eps)
            own = torch.cat((own.new_full((1,), x.numel() // channels), mean, var, low, high, rstd))
        found = processes.gathered(own, group)
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):  # the selection waits for the device
            found = found[found[:, 0] >= 1]
        return _Gathered(*found.split([1, *[channels] * 5], 1))

    def stats(self) -> Tensor:
        """Return mean, biased variance, low and high [4, C] of all."""
        mean, var = processes.combined(self.rows, self.mean, self.var)
        return torch.stack((mean, var, self.low.amin(0), self.high.amax(0)))


def _sync_batch_norm(coding: Coding, module: nn.SyncBatchNorm, input: Tensor, group: Any) -> Tensor:
    momentum, eps = _momentum(module), module.eps
    running = (module.running_mean, module.running_var) if module.track_running_stats else (None, None)
    layout = Layout.of(input, 1, coding.codec if is_worth_a_code(input, 1) else None)
    with torch.no_grad():
        gathered = _Gathered.of(input, layout, eps, group)
        total, stats = gathered.rows.sum(), gathered.stats()
        mean, rstd = stats[0], (stats[1] + eps).rsqrt()

    def call(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        if x.is_cpu:
            if running[0] is not None and running[1] is not None:
                RunningStats(running[0], running[1], momentum).update(stats[0], stats[1], total)
            return _normalised(x, mean, rstd, gamma, beta)
        count = gathered.rows.view(-1)
        count = count if running[0] is None else count.to(running[0].dtype)
        all_mean, all_rstd = torch.batch_norm_gather_stats_with_counts(
            _dense(x), gathered.mean, gathered.rstd, *running, momentum, eps, count
        )
        return torch.batch_norm_elemt(_dense(x), gamma, beta, all_mean, all_rstd, eps) if x.numel() else x.clone()

    def normalise(x: Tensor, layout: Layout) -> Statistics:
        return Statistics(mean.unsqueeze(0), rstd.unsqueeze(0), stats, are_of_x=True)

    rows = input.numel() // input.shape[1]
    means = Means(of_all=lambda sums: processes.means_of_all(sums, rows, group))
    return coded_norm(coding, layout, input, module.weight, module.bias, call, normalise, means)


def _dense(x: Tensor) -> Tensor:
    """Return x in a layout that PyTorch's operations take, as its SyncBatchNorm does."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    is_channels_last = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    return x if is_channels_last else x.contiguous()


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """Compute y in the compute dtype."""
    shape = (-1, *(1,) * (x.dim() - 2))
    y = (x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape)
    y = y if gamma is None else y * gamma.view(shape)
    y = y if beta is None else y + beta.view(shape)
    return y.to(x.dtype)
