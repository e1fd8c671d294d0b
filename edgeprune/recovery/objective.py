"""What training minimises: KL to the dense parent on its most likely tokens, mixed with the plain loss.

The parent is kept as its `k` largest log-probabilities per position, normalised over the whole vocabulary.
All other tokens count as one. The divergence between the two coarser distributions never exceeds the full KL
and is zero only where both agree on the kept tokens.
"""

from __future__ import annotations

import torch
from torch import nn

_FLOOR = 1e-6  # of the share of all other tokens; its logarithm must stay finite


def top_log_probs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most likely tokens of [..., V] logits: ids int32 and log-probabilities float32, both [..., k]."""
    logits = logits.float()
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return ids.to(torch.int32), values - logits.logsumexp(dim=-1, keepdim=True)


def top_kl(log_probs: torch.Tensor, ids: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """KL(parent || model) per position in nats, [...].

    `log_probs` [..., V] are the model's; `ids` and `parent` [..., k] are from `top_log_probs`.
    """
    own = log_probs.gather(-1, ids.long())
    p = parent.exp()
    rest = (1.0 - p.sum(-1)).clamp_min(_FLOOR)
    # 1 - sum of probabilities, from below: rounding may carry the sum past one
    own_rest = (1.0 - own.exp().sum(-1)).clamp_min(_FLOOR)
    return (p * (parent - own)).sum(-1) + rest * (rest.log() - own_rest.log())


def token_losses(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parent: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    distill: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(objective, plain loss) per predicted token, [n, T-1] each in nats.

    `logits` [n, T, V], `tokens` [n, T], `parent` of shape [n, T, k]; `distill` is the share of the KL.
    """
    log_probs = logits[:, :-1].float().log_softmax(dim=-1)
    plain = nn.functional.nll_loss(
        log_probs.flatten(0, 1), tokens[:, 1:].flatten().long(), reduction="none"
    ).view(tokens.shape[0], -1)
    if parent is None or distill == 0.0:
        return plain, plain
    ids, values = parent
    divergence = top_kl(log_probs, ids[:, :-1], values[:, :-1].float())
    return distill * divergence + (1.0 - distill) * plain, plain
