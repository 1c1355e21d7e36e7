"""Rewards by the names that commands take."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import rewards

REWARDS = {
    name.lower(): name
    for name in (
        "CLIPScore",
        "PickScore",
        "HPSv2",
        "HPSv3",
        "AestheticScore",
        "ImageReward",
        "VQAScore",
        "OCRScore",
    )
}


def reward_of(text: str) -> Any:
    """Return what makes the reward of a name, from (checkpoint, device)."""
    if text.lower() in REWARDS:
        cls = getattr(rewards, REWARDS[text.lower()])
        return lambda model, device: cls(*[model] * (model is not None), device=device)
    module, colon, name = text.partition(":")
    if not colon:
        raise ArgumentTypeError(
            f"expected one of {', '.join(REWARDS)}, or MODULE:NAME, got {text!r}"
        )
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentTypeError(str(error)) from error

    def made(model: str | None, device: str) -> Any:
        if model is not None:
            raise ValueError(f"expected no checkpoint for {text}, a function, got {model}")
        return function

    return made
