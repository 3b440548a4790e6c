"""Closed forms for ``y ≈ W x + b`` from :class:`~graphprune.repair.moments.Moments`: least squares, means, variances.

He, Zhang and Sun 2017 (least squares on what remains), Nagel et al. 2019 (means), Jordan et al. 2023 (variances). Rows x may
come from a cut and already repaired model and y from the original: then the fit also corrects what went wrong before it.
"""

from __future__ import annotations

import torch

from .moments import Moments

Tensor = torch.Tensor
Fit = tuple[Tensor, Tensor]


def least_squares(data: Moments, ridge: float = 1e-4, prior: Tensor | None = None, intercept: bool = True) -> Fit:
    """``argmin E‖y − W x − b‖² + λ‖W − prior‖²`` with ``λ = ridge · mean diag``: W (g, o, d) and b (g, o), zero without ``intercept``.

    >>> x = torch.randn(1, 100, 3, dtype=torch.float64)
    >>> from .moments import moments
    >>> weight, bias = least_squares(moments(x, 2 * x + 1), ridge=0.0)
    >>> torch.allclose(weight[0], 2 * torch.eye(3, dtype=torch.float64)), torch.allclose(bias, torch.ones(1, 3, dtype=torch.float64))
    (True, True)
    """
    gram, cross = data.xx, data.yx
    if not intercept:
        gram = gram + data.count * data.x[:, :, None] * data.x[:, None, :]
        cross = cross + data.count * data.y[:, :, None] * data.x[:, None, :]
    scale = ridge * gram.diagonal(dim1=1, dim2=2).mean(1)
    damped = gram + torch.diag_embed(scale[:, None].expand(-1, gram.shape[1]).clamp(min=torch.finfo(gram.dtype).tiny))
    wanted = cross if prior is None else cross + scale[:, None, None] * prior.double()
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        weight = torch.linalg.lstsq(damped, wanted.transpose(1, 2), driver="gelsd").solution.transpose(1, 2)
    else:
        weight = torch.cholesky_solve(wanted.transpose(1, 2), factor).transpose(1, 2)
    return weight, means(data, weight) if intercept else torch.zeros_like(data.y)


def means(data: Moments, weight: Tensor) -> Tensor:
    """The b (g, o) with which ``W x + b`` has the mean of y."""
    return data.y - (weight.double() @ data.x[:, :, None])[..., 0]


def variances(data: Moments, weight: Tensor) -> Fit:
    """Rows of W scaled so that ``W x + b`` has the mean and the variance of y (rows without variance stay)."""
    weight = weight.double()
    now = ((weight @ data.xx) * weight).sum(2)
    scale = torch.where(now > 0, (data.yy / now.clamp(min=torch.finfo(now.dtype).tiny)).sqrt(), torch.ones_like(now))
    weight = weight * scale[..., None]
    return weight, means(data, weight)


def residual(data: Moments, weight: Tensor, bias: Tensor) -> Tensor:
    """``E(y − W x − b)²`` for each output, (g, o)."""
    weight = weight.double()
    offset = means(data, weight) - bias.double()
    spread = data.yy - 2 * (weight * data.yx).sum(2) + ((weight @ data.xx) * weight).sum(2)
    return (spread / data.count).clamp(min=0) + offset.square()
