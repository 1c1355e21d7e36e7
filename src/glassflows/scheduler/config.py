"""Configs: that of a native scheduler, and that of a GLASS scheduler, which holds it.

The config of a `GLASSScheduler` shows the native keys beside its own, because hosts read and
rewrite them there. Under `native` it has the native config as it was, with its class, and under
`glass` its own options: native keys win where the names meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np

from .supported import COSMOS2_KEYS, FLOW, REFUSED, SUPPORTED, Refusal, check_class


def class_name(config: Mapping[str, Any]) -> str:
    """Return the native class a scheduler config belongs to.

    Raises:
        ValueError: if the class has no GLASS counterpart, or the config does not say and its keys
            fit no class.
    """
    name = config.get("_class_name")
    if name is not None:
        return check_class(name)
    keys = {key for key in config if not key.startswith("_")}
    fitting = [known for known in (*SUPPORTED, *REFUSED) if keys and parameters(known) == keys]
    if not fitting or any(REFUSED.get(known) is Refusal.DISTILLED for known in fitting):
        raise ValueError(
            "config: it has no '_class_name' and its keys are those of "
            f"{' or '.join(fitting) or 'no scheduler'}: use "
            "GLASSScheduler.from_scheduler(pipe.scheduler), which reads the class off the object"
        )
    return check_class(fitting[0])


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the native part of a GLASS config, as hosts may have rewritten it since.

    The constructor of Stable Diffusion mends old configs and that of Cosmos 2 adds to them; both
    know the visible keys only.
    """
    native = dict(config["native"])
    added = COSMOS2_KEYS if is_cosmos2(native["_class_name"], config) else ()
    visible = (key for key in (*native, *added) if key in config and not key.startswith("_"))
    return native | {key: config[key] for key in visible}


def build(config: Mapping[str, Any]) -> Any:
    """Return a native scheduler built from its own config, which must name its class."""
    name = class_name(config)
    # defaults stay defaults, for the way to other classes
    known = parameters(name) - set(config.get("_use_default_values", ()))
    given = {key: value for key, value in config.items() if key in known}
    scheduler = getattr(diffusers, name)(**given)
    if is_cosmos2(name, config):
        scheduler.register_to_config(**{key: config[key] for key in COSMOS2_KEYS if key in config})
    return scheduler


def is_cosmos2(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a flow scheduler runs on x = z + σ ε, which Cosmos 2 notes in its config."""
    return name in FLOW and "sigma_data" in config


def written(scheduler: Any) -> dict[str, Any]:
    """Return the config of a native scheduler as JSON can hold it, its class included."""
    left_out = ("native", "glass")
    keys = [key for key in scheduler.config if not key.startswith("_") and key not in left_out]
    config = {key: plain(scheduler.config[key]) for key in keys}
    return {"_class_name": type(scheduler).__name__, **config}


def plain(value: Any) -> Any:
    """Return a numpy number or array as Python's own, a function by its name."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return repr(value) if callable(value) else value


def parameters(name: str) -> set[str]:
    """Return the config keys of a native class; none where the installed diffusers lacks it."""
    native = getattr(diffusers, name, None)
    return set(inspect.signature(native.__init__).parameters) - {"self"} if native else set()
