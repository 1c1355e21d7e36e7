import math
from typing import get_args

import pytest
import torch

from glassflows.flow.denoise import Prediction, denoised, network_output
from glassflows.flow.noise import NoiseLevel

LEVELS = [NoiseLevel(0.3, 0.3, 0.7), NoiseLevel(0.4, math.sqrt(0.2), math.sqrt(0.8))]


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("level", LEVELS)
def test_round_trip(prediction, level):
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(2, 5, 3, 6, 10, generator=generator, dtype=torch.float64)
    output = network_output(z, x, level, prediction)
    torch.testing.assert_close(denoised(output, x, level, prediction), z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_definitions(level):
    """What networks are trained to predict, from z and ε themselves."""
    generator = torch.Generator().manual_seed(1)
    z, epsilon = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    x = level.alpha * z + level.sigma * epsilon
    targets = {
        "velocity": epsilon - z,
        "epsilon": epsilon,
        "v_prediction": level.alpha * epsilon - level.sigma * z,
        "sample": z,
    }
    for prediction, target in targets.items():
        torch.testing.assert_close(denoised(target, x, level, prediction), z, rtol=0, atol=1e-12)


EXPECTED = r"^prediction: expected one of \('velocity', 'epsilon', 'v_prediction', 'sample'\), got 'score'$"


def test_unknown_prediction():
    with pytest.raises(ValueError, match=EXPECTED):
        denoised(torch.zeros(1), torch.zeros(1), LEVELS[0], "score")
    with pytest.raises(ValueError, match=EXPECTED):
        network_output(torch.zeros(1), torch.zeros(1), LEVELS[0], "score")
