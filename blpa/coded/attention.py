"""Attention, whose queries, keys, values and output are saved in 8 bits whatever the rest.

    S = q k^T / sqrt(d),   P = softmax(S) = exp(S - logsumexp),   out = P v

PyTorch's fused functions save q, k, v, out and the logsumexp, and compute P again in the backward pass. From codes P is
off by a factor of exp(error of S), in the gradient that every layer below gets: the error of 8 bits is small, that of 4
is not. The logsumexp stays exact.
"""

from typing import Any

from torch import Tensor

from blpa.coded.mode import Coding, call_coding_saved_tensors, is_recording


def scaled_dot_product_attention(
    coding: Coding, function: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Coded torch.nn.functional.scaled_dot_product_attention."""
    codec = coding.policy.attention if coding.policy and coding.codec else None
    if codec is None or not is_recording(query, key, value):
        return NotImplemented
    shapes = {query.shape, key.shape, value.shape, (*query.shape[:-1], value.shape[-1])}
    return call_coding_saved_tensors(
        coding, codec, function, (query, key, value, *args), kwargs, lambda tensor: tensor.shape in shapes
    )
