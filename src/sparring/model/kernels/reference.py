"""log p(token | prefix) from hidden states: the specification that faster kernels are tested against."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def linear_logprob(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens *several"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, " tokens *several"]:
    """log softmax(softcap(scale * (hidden @ weight.T + bias)))[targets], nats, float32.

    `targets`: one per state, or several per state in a second dimension.
    softcap(z) = softcap * tanh(z / softcap), as in Gemma 2; `scale` multiplies the logits, as in Cohere
    and Granite.
    """
    # float: a bfloat16 log-softmax loses the differences that training depends on
    logits = F.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits.log_softmax(dim=1).gather(1, targets.reshape(len(targets), -1)).view_as(targets)
