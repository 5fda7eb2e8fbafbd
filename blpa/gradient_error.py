"""How far the gradient of a converted network is from the exact one, parameter by parameter.

error = |g~ - g| / |g|     Euclidean norms; g~ of the converted network, g of PyTorch's own, on the same weights
"""

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from blpa.convert import is_converted, stock


@dataclass(frozen=True)
class ParameterError:
    """Error of the gradient of one parameter.

    Attributes:
        name: of the parameter.
        error: relative; infinite where the exact gradient is 0 and the other is not.
        exact_norm: norm of the exact gradient.
    """

    name: str
    error: float
    exact_norm: float


@dataclass(frozen=True)
class GradientError:
    """Error of the gradient of a converted network; print it for a table of the largest of those that matter.

    Attributes:
        total: relative error of the gradient of all parameters together.
        rows: one for each parameter that has a gradient, in the network's order.
    """

    total: float
    rows: list[ParameterError]

    def to_pandas(self) -> Any:
        """Return the rows as a pandas.DataFrame."""
        return importlib.import_module("pandas").DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        """Return the total and the ten largest errors."""
        # The exact gradient of a bias before a batch norm is rounding noise, and any error of it is large.
        total = sum(row.exact_norm**2 for row in self.rows) ** 0.5
        largest = sorted((row for row in self.rows if row.exact_norm > 1e-4 * total), key=lambda row: -row.error)[:10]
        width = max((len(row.name) for row in largest), default=0)
        lines = [f"  {row.name:<{width}}  {row.error:.4f}" for row in largest]
        zeros = sum(row.exact_norm == 0 for row in self.rows)
        if zeros:
            lines.append(f"  {zeros} of {len(self.rows)} parameters have a gradient of 0 here, which tells nothing")
        return "\n".join([f"relative error of the gradient: {self.total:.4f}; largest by parameter:", *lines])


def gradient_error(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any
) -> GradientError:
    """Compute the gradient of one batch twice, by the converted network and by PyTorch's own, and compare them.

    Gradients, buffers and random number generators are left as they were.

    Args:
        model: converted.
        *inputs: arguments of its forward.
        loss: maps the model's output to a scalar. None weighs all outputs with fixed random numbers and adds them.
        **kwargs: keyword arguments of its forward.

    Returns:
        The errors.

    Raises:
        ValueError: the model is not converted, or has no gradient.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if not is_converted(model):
        raise ValueError(f"{type(model).__name__} is not converted: call blpa.convert on it first")
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameter that requires grad")
    coded = _gradients(model, list(named.values()), inputs, kwargs, loss)
    with stock():
        exact = _gradients(model, list(named.values()), inputs, kwargs, loss)
    rows, squares = [], torch.zeros(2, dtype=torch.float64)
    for name, one, other in zip(named, coded, exact, strict=True):
        if one is not None and other is not None:
            difference, norm = (one.double() - other.double()).norm().cpu(), other.double().norm().cpu()
            squares += torch.stack([difference, norm]).square()
            error = (difference / norm).nan_to_num(nan=0.0 if difference == 0 else torch.nan, posinf=torch.inf)
            rows.append(ParameterError(name, error.item(), norm.item()))
    if not rows:
        raise ValueError(f"the loss does not depend on the parameters of {type(model).__name__}")
    return GradientError((squares[0] / squares[1]).sqrt().item(), rows)


def _gradients(
    model: nn.Module, parameters: list[Tensor], inputs: Any, kwargs: Any, loss: Callable[[Any], Tensor] | None
) -> list[Tensor | None]:
    """Compute the gradients of one batch; restore buffers and random numbers."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    devices = {tensor.device for tensor in parameters if tensor.is_cuda}
    with torch.random.fork_rng(devices), torch.enable_grad():
        output = model(*inputs, **kwargs)
        value = _weighted(output) if loss is None else loss(output)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    return list(gradients)


def _weighted(output: Any) -> Tensor:
    """Add all outputs, weighted by normal random numbers that are the same in every call."""
    generator = torch.Generator().manual_seed(0)
    terms = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=generator)
            terms.append((leaf.float() * weights.to(leaf.device)).sum())
    if not terms:
        raise ValueError("no output of the model requires grad")
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
