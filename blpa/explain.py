"""Explain what a network saves for the backward pass, as PyTorch runs it and converted, without running it.

Both are counted on the meta device, where tensors have shapes and lifetimes but no data (census.py, memory.py), so any
network and batch takes seconds on any machine. Not counted: memory that one operation allocates and frees internally.
"""

import copy
import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from blpa.census import Bytes, SavedTensor, Saver, count_step, tensors_in
from blpa.codec import Codec
from blpa.convert import convert, is_converted, policy_of
from blpa.memory import GIB, MIB, largest_batch

RESERVED_BYTES = 512 * MIB
"""Of a card, for the CUDA context and workspaces."""

EXACT, WEIGHT, SMOOTH = "exact", "exact; of the weight approximate", "approximate: f' at the code"
ATTENTION, UNKNOWN = "approximate: 8 bits", "approximate: 8 bits, of unknown error"
GRADIENT = {
    "batch_norm": "exact but for the variance term",
    "instance_norm": "exact but for the variance term",
    "group_norm": "exact but for the variance term",
    "layer_norm": "exact but for the variance term",
    "rms_norm": "exact but for the variance term",
    "silu": SMOOTH,
    "gelu": SMOOTH,
    "hardswish": SMOOTH,
    "scaled_dot_product_attention": ATTENTION,
    "mul": "exact; of the factor approximate",
    "multiply": "exact; of the factor approximate",
    "rmul": "exact; of the factor approximate",
    "linear": WEIGHT,
} | {f"{kind}{dims}d": WEIGHT for kind in ("conv", "conv_transpose") for dims in (1, 2, 3)}
"""Gradient that a coded function passes on, given that of its output; exact unless listed."""


@dataclass(frozen=True)
class Row:
    """A tensor that a network saves for the backward pass.

    Attributes:
        module: name of the module that saves it first.
        function: function that saves it first.
        shape: of the tensor.
        savers: all functions that save it, as "module: function".
        stock_bytes: bytes that PyTorch saves.
        coded_bytes: bytes that the converted network saves in its place; 0 where another row's codes serve.
        gradient: what the coded functions compute, given the gradient of their output; "not coded" if nothing changes.
    """

    module: str
    function: str
    shape: tuple[int, ...]
    savers: tuple[str, ...]
    stock_bytes: int
    coded_bytes: int
    gradient: str


@dataclass(frozen=True)
class Explanation:
    """What a network saves, as PyTorch runs it and converted; print it for a table.

    Attributes:
        title: of the table.
        batch: samples of the inputs.
        rows: the saved tensors, and at last what is alive beside them; they add up to what is saved.
        stock: bytes as PyTorch runs it.
        coded: bytes of the converted network.
        fixed_bytes: weights, buffers and an optimiser's momentum.
        notes: what is largest at the peak, what is not coded, advice.
        step_bytes: maps (coded, batch) to the bytes of the inputs and of a step; None if it ran with data, whose batch
            cannot change.
    """

    title: str
    batch: int
    rows: list[Row]
    stock: Bytes
    coded: Bytes
    fixed_bytes: int
    notes: list[str]
    step_bytes: Callable[[bool, int], int] | None

    def largest_batch(self, gib: float = 11.0, *, coded: bool = True) -> int:
        """Find the largest batch that fits a card, with SGD and momentum; 512 MiB are taken off.

        Args:
            gib: memory of the card in GiB.
            coded: of the converted network, else as PyTorch runs it.

        Returns:
            The batch, 0 if not even one sample fits.

        Raises:
            ValueError: gib is not positive, the network was not counted on the meta device, or its inputs do not take
                another batch.
        """
        if not gib > 0:
            raise ValueError(f"gib = {gib}: must be positive")
        if self.step_bytes is None:
            raise ValueError("the largest batch needs inputs without data: the network ran with its data")
        count = self.step_bytes

        def total(batch: int) -> int:
            if batch > 1:
                return self.fixed_bytes + count(coded, batch)
            return self.fixed_bytes + 2 * count(coded, 2) - count(coded, 3)  # a batch norm may refuse a single sample

        try:
            return largest_batch(total, int(gib * GIB) - RESERVED_BYTES)
        except RuntimeError as error:  # an input that is no batch has its size
            raise ValueError(f"the inputs do not take another batch ({_first_line(error)})") from error

    def to_pandas(self) -> Any:
        """Return the rows as a pandas.DataFrame."""
        return importlib.import_module("pandas").DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        """Return the table: MiB per sample by kind of saved tensor."""

        def mib(nbytes: int) -> str:
            return f"{nbytes / self.batch / MIB:.2f}"

        kinds: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            functions = " + ".join(dict.fromkeys(saver.rpartition(": ")[2] for saver in row.savers))
            kinds.setdefault((functions, row.gradient), []).append(row)
        lines = [(self.title, "MiB per sample: stock", "coded", "gradient passed on")]
        small = [0, 0]
        for (functions, gradient), rows in sorted(
            kinds.items(), key=lambda kind: -sum(row.stock_bytes for row in kind[1])
        ):
            stock, coded = (sum(getattr(row, f"{which}_bytes") for row in rows) for which in ("stock", "coded"))
            if max(stock / max(1, self.stock.saved), coded / max(1, self.coded.saved)) < 0.001:
                small = [small[0] + stock, small[1] + coded]
            else:
                lines.append((f"  {functions}, {len(rows)}", mib(stock), mib(coded), gradient))
        lines.append(("  all else", mib(small[0]), mib(small[1]), ""))
        ratio = self.stock.saved / max(1, self.coded.saved)
        lines.append(
            ("saved after the forward pass", mib(self.stock.saved), mib(self.coded.saved), f"{ratio:.1f} times less")
        )
        ratio = self.stock.peak / max(1, self.coded.peak)
        lines.append(("peak of a step", mib(self.stock.peak), mib(self.coded.peak), f"{ratio:.1f} times less"))
        if self.step_bytes is not None:
            try:
                stock_batch, coded_batch = (str(self.largest_batch(coded=is_coded)) for is_coded in (False, True))
            except ValueError as error:  # the table is worth printing without this line
                lines.append((f"largest batch: {error}", "", "", ""))
            else:
                lines.append(("largest batch in 11 GiB (less 0.5; SGD)", stock_batch, coded_batch, ""))
        widths = [max(len(line[k]) for line in lines) for k in range(3)]
        table = [
            f"{line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]}".rstrip()
            for line in lines
        ]
        return "\n".join([*table, *self.notes])


def explain(model: nn.Module, *inputs: Any, bits: int | Codec | None = 4, **kwargs: Any) -> Explanation:
    """Count what a network saves, and needs at the peak of a training step, as PyTorch runs it and converted.

    Nothing is trained, and neither the model nor its inputs change: both are counted on the meta device. A network
    whose forward pass depends on data runs on a copy of the model and the inputs in the CPU's memory.

    Args:
        model: any network; a converted one is explained with its own settings.
        *inputs: arguments of its forward, on any device; meta tensors will do.
        bits: as in `convert`, for a model that is not converted.
        **kwargs: keyword arguments of its forward.

    Returns:
        The explanation: print it, or read its rows.

    Raises:
        ValueError: as for `convert`, the inputs hold no tensor, or no output requires grad.
    """
    given = inputs, kwargs
    batch = _batch(given)

    def counted(device: str) -> tuple[nn.Module, Any, list[tuple[Bytes, list[SavedTensor]]]]:
        copied, arguments = _converted_copy(model, device, bits), _to(given, device)
        return copied, arguments, [count_step(copied, arguments, is_coded) for is_coded in (False, True)]

    notes: list[str] = []
    try:
        copied, arguments, found = counted("meta")
    except (NotImplementedError, RuntimeError) as error:
        if any(tensor.is_meta for tensor in tensors_in(given)):
            raise
        notes.append(
            f"run on the CPU, temporaries of the codes counted, since on the meta device: {_first_line(error)}"
        )
        copied, arguments, found = counted("cpu")
    (stock, stock_tensors), (coded, coded_tensors) = found

    def step_bytes(is_coded: bool, size: int) -> int:
        resized = _resized(arguments, batch, size)
        input_bytes = sum(tensor.nbytes for tensor in tensors_in(resized))
        return input_bytes + count_step(copied, resized, is_coded)[0].peak

    momentum = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    rows = _rows(stock_tensors, coded_tensors)
    rest = [stock.saved - sum(row.stock_bytes for row in rows), coded.saved - sum(row.coded_bytes for row in rows)]
    rows.append(Row("", "outputs, loss and others", (), ("the model: outputs, loss and others",), rest[0], rest[1], ""))
    return Explanation(
        title=f"{type(model).__name__}, {_settings(copied)}, input {_shapes(arguments)}",
        batch=batch,
        rows=rows,
        stock=stock,
        coded=coded,
        fixed_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + momentum,
        notes=[*notes, *_advice(rows, stock, coded, batch, copied)],
        step_bytes=None if notes else step_bytes,
    )


def _converted_copy(model: nn.Module, device: str, bits: int | Codec | None) -> nn.Module:
    """Copy a model to the meta device, where its weights take no memory, or to the CPU; convert it unless it is."""
    to_device: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = torch.empty_like(tensor, device="meta") if device == "meta" else tensor.detach().to(device, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        to_device[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    copied = copy.deepcopy(model, to_device)
    return copied if is_converted(copied) else convert(copied, bits)


def _rows(stock: list[SavedTensor], coded: list[SavedTensor]) -> list[Row]:
    """Pair the tensors of both runs: codes belong to the tensor that their first saver saves in PyTorch."""
    stock, coded = _with_small_ones(stock), _with_small_ones(coded)
    owner: dict[Saver, int] = {}
    for k, tensor in enumerate(stock):
        for saver in tensor.savers:
            owner.setdefault(saver, k)
    coded_bytes: Counter[int] = Counter()
    by_hook: set[int] = set()
    others: list[SavedTensor] = []
    for tensor in coded:
        place = next((owner[saver] for saver in tensor.savers if saver in owner), None)
        if place is None:
            others.append(tensor)
            continue
        coded_bytes[place] += tensor.nbytes
        if tensor.by_hook:
            by_hook.add(place)
    rows = [_row(tensor, tensor.nbytes, coded_bytes[k], k in by_hook) for k, tensor in enumerate(stock)]
    return rows + [_row(tensor, 0, tensor.nbytes, tensor.by_hook) for tensor in others]


def _with_small_ones(tensors: list[SavedTensor]) -> list[SavedTensor]:
    """Add what a call saves beside its large tensors, such as a deviation per channel, to the largest of them."""
    largest: dict[Saver, SavedTensor] = {}
    for tensor in tensors:
        known = largest.get(tensor.savers[0])
        if known is None or tensor.nbytes > known.nbytes:
            largest[tensor.savers[0]] = tensor
    found = {id(tensor): replace(tensor) for tensor in tensors}
    for tensor in tensors:
        main = largest[tensor.savers[0]]
        if tensor.nbytes < 0.05 * main.nbytes:
            found[id(main)].nbytes += tensor.nbytes
            del found[id(tensor)]
    return list(found.values())


def _row(tensor: SavedTensor, stock_bytes: int, coded_bytes: int, by_hook: bool) -> Row:
    found = [GRADIENT[name] for _, name, _ in tensor.savers if name in GRADIENT]
    gradient = found[0] if found else EXACT
    if coded_bytes >= stock_bytes > 0:
        gradient = "not coded"
    elif by_hook and gradient != ATTENTION:
        gradient = UNKNOWN
    module, function, _ = tensor.savers[0]
    savers = tuple(f"{module or 'the model'}: {function}" for module, function, _ in tensor.savers)
    return Row(module, function, tensor.shape, savers, stock_bytes, coded_bytes, gradient)


def _advice(rows: list[Row], stock: Bytes, coded: Bytes, batch: int, model: nn.Module) -> list[str]:
    """Write what a user may want to change."""
    largest = [(kind, nbytes) for kind, nbytes in coded.at_peak if nbytes > 0.01 * coded.peak]
    lines = ["  at the coded peak: " + "; ".join(f"{nbytes / batch / MIB:.2f} {kind}" for kind, nbytes in largest)]
    weights = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    lines.append(f"  gradients of the weights, at any batch: {weights / MIB:.1f} MiB")
    if any(torch.is_autocast_enabled(device) for device in ("cuda", "cpu")):
        lines.append("  counted without autocast, which the meta device lacks: codes take the same, tensors up to half")
    exact = [row for row in rows if row.gradient == "not coded" and row.stock_bytes > 0.01 * stock.saved]
    for row in sorted(exact, key=lambda row: -row.stock_bytes):
        lines.append(f"  not coded: {row.stock_bytes / batch / MIB:.2f} {list(row.shape)}, {row.savers[0]}")
    codecs = {policy.codec for policy in map(policy_of, model.modules()) if policy is not None}
    smooth = [row for row in rows if row.gradient == SMOOTH]
    if smooth and any(codec is not None and codec.bits < 8 for codec in codecs):
        lines.append(
            f"  SiLU, GELU or Hardswish, {len(smooth)}: 8 bits advised, since the errors of their gradients add up"
        )
    return lines


def _settings(model: nn.Module) -> str:
    codecs = {policy.codec if policy else "PyTorch's own" for policy in map(policy_of, model.modules())}
    names = {f"{codec.bits} bits" if isinstance(codec, Codec) else codec or "exact tensors" for codec in codecs}
    return " and ".join(sorted(names))


def _to(tree: Any, device: str) -> Any:
    def moved(leaf: Any) -> Any:
        return leaf.detach().to(device).requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    return tree_map(moved, tree)


def _shapes(tree: Any) -> str:
    return ", ".join(f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors_in(tree))


def _batch(tree: Any) -> int:
    """Return the number of samples: the first dimension of the first tensor, or tensors in a list."""
    if tree[0] and isinstance(tree[0][0], list | tuple) and tensors_in(tree[0][0]):
        return len(tree[0][0])
    for tensor in tensors_in(tree):
        if tensor.dim():
            return tensor.shape[0]
    raise ValueError(
        "the inputs hold no tensor with a batch: give what the model takes, such as torch.empty(8, 3, 224, 224)"
    )


def _resized(tree: Any, batch: int, size: int) -> Any:
    """Return the same inputs on the meta device with another batch."""

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != batch:
            return leaf
        return torch.empty((size, *leaf.shape[1:]), dtype=leaf.dtype, device="meta")

    return tree_map(resized, tree)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
