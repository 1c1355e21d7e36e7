"""Network output ↔ denoised mean ẑ = E[z | x_t], for the four things networks predict.

A network's input is x_t = α_t z + σ_t ε, of a clean sample z and standard normal noise ε. Its
output is an estimate of a velocity u, of ε, of v or of z. Everything here and after is a linear
combination of such tensors.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .noise import NoiseLevel

Prediction = Literal["velocity", "epsilon", "v_prediction", "sample"]


def combination(a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
    """Return a x + b y, a new tensor, in as few passes over memory as that takes.

    Of a tensor of weight 0 only the dtype counts.
    """
    if abs(a) < abs(b):
        a, x, b, y = b, y, a, x
    if b == 0:
        return (a * x).to(torch.result_type(x, y))
    total = torch.add(x, y, alpha=b / a)
    return total if a == 1 else total.mul_(a)


def denoised(output: Tensor, x_t: Tensor, level: NoiseLevel, prediction: Prediction) -> Tensor:
    """Return the denoised mean ẑ that a network output stands for.

        velocity      u = ε − z         ẑ = (x_t − σ_t u) / (α_t + σ_t)
        epsilon       ε                 ẑ = (x_t − σ_t ε) / α_t
        v_prediction  v = α_t ε − σ_t z ẑ = (α_t x_t − σ_t v) / (α_t² + σ_t²)
        sample        z                 ẑ = z

    Args:
        output: What the network predicts at x_t, same shape as x_t.
        x_t: The network's input, x_t = α_t z + σ_t ε.
        level: The noise level (α_t, σ_t) of x_t.
        prediction: What the network predicts.

    Raises:
        ValueError: if `prediction` is none of these.
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction == "velocity":
        z, scale = torch.add(x_t, output, alpha=-sigma), alpha + sigma
    elif prediction == "epsilon":
        z, scale = torch.add(x_t, output, alpha=-sigma), alpha
    elif prediction == "v_prediction":
        z, scale = combination(alpha, x_t, -sigma, output), alpha**2 + sigma**2
    elif prediction == "sample":
        z, scale = output.clone(), 1.0  # never the network's own buffer
    else:
        raise ValueError(f"prediction: expected one of {get_args(Prediction)}, got {prediction!r}")
    return z if scale == 1 else z.div_(scale)


def network_output(z: Tensor, x_t: Tensor, level: NoiseLevel, prediction: Prediction) -> Tensor:
    """Return the network output that stands for the denoised mean z; the inverse of `denoised`."""
    alpha, sigma = level.alpha, level.sigma
    epsilon = torch.add(x_t, z, alpha=-alpha) / sigma
    if prediction == "velocity":
        return epsilon - z
    if prediction == "epsilon":
        return epsilon
    if prediction == "v_prediction":
        return combination(alpha, epsilon, -sigma, z)
    if prediction == "sample":
        return z
    raise ValueError(f"prediction: expected one of {get_args(Prediction)}, got {prediction!r}")
