"""Attention, whose queries, keys, values and output are saved in 8 bits whatever the rest.

    S = q k^T / sqrt(d),   P = softmax(S) = exp(S - logsumexp),   out = P v

PyTorch's fused functions save q, k, v, out and the logsumexp, and compute P again in the backward pass. From codes P is
off by a factor of exp(error of S), in the gradient that every layer below gets: the error of 8 bits is small, that of 4
is not. The logsumexp stays exact.
"""

from typing import Any, cast

from torch import Tensor

from blpa.coded.mode import Coding, coding_saved_tensors, is_recording
from blpa.coded.tensors import Coded, tag


def scaled_dot_product_attention(
    coding: Coding, function: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Coded torch.nn.functional.scaled_dot_product_attention."""
    codec = coding.policy.attention if coding.policy and coding.codec else None
    if codec is None or not is_recording(query, key, value):
        return NotImplemented
    shapes = {query.shape, key.shape, value.shape, (*query.shape[:-1], value.shape[-1])}
    made: list[tuple[int, Coded]] = []
    with coding_saved_tensors(coding, codec, lambda tensor: tensor.shape in shapes, made):
        out = cast(Tensor, function(query, key, value, *args, **kwargs))
    for storage, saved in made:  # the layer after it reads the codes of the output
        if storage == out.untyped_storage()._cdata and saved.layout.shape == out.shape:
            return tag(out, saved, -1)
    return out
