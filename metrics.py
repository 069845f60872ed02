"""Judgement, on tensors: attention against object masks, and translations against their true counterparts."""

from __future__ import annotations

import torch
from torch import Tensor


def intersection_over_union(attention: Tensor, masks: Tensor, threshold: float = 0.5) -> Tensor:
    """How well attention covers the objects: (B,) values in [0, 1], one for each picture.

    attention: (B, 1, H, W) in [0, 1], foreground = above ``threshold``. masks: (B, 1, H, W), object = above 1/2.
    Two empty regions agree: 1.
    """
    found, true = attention > threshold, masks > 0.5
    union = (found | true).sum(dim=(1, 2, 3))
    shared = (found & true).sum(dim=(1, 2, 3))
    return torch.where(union > 0, shared / union.clamp(min=1), 1.0)


def mean_absolute_error(images: Tensor, targets: Tensor) -> Tensor:
    """Mean |images - targets| of each picture, (B,), in the units of the pictures ([-1, 1]: from 0 to 2)."""
    return (images - targets).abs().mean(dim=(1, 2, 3))
