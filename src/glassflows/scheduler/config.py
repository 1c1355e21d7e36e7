"""Configs: that of a native scheduler, and that of a GLASS scheduler, which holds it.

The config of a `GLASSScheduler` shows the native keys beside its own, because hosts read and
rewrite them there. Under `native` it has the native config as it was, with its class, and under
`glass` its own options: native keys win where the names meet.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from .supported import COSMOS2_KEYS, FLOW, REFUSED, SUPPORTED, Refusal, check_class

GLASS_CLASSES = ("GLASSScheduler", "GLASSFlowMatchScheduler")

_DEFAULTS = "_use_default_values"
"""Under this key a config lists what was left at its default, which another class sets anew."""


class GLASSConfig(FrozenDict):
    """The config of a GLASS scheduler, of which a native's `from_config` takes what is native.

    Diffusers leaves out of a config, without a word, what counts as left at its default. Here our
    own options count so, and a native key does where its value is still the default.
    """

    def get(self, key: str, default: Any = None) -> Any:
        if key != _DEFAULTS:
            return super().get(key, default)
        listed = super().get(_DEFAULTS, ())
        native = {**self, "_class_name": self["native"]["_class_name"], _DEFAULTS: listed}
        return [*self.own, *untouched(native)]

    @property
    def own(self) -> list[str]:
        """The keys that no native has."""
        return [name for name in ("native", "glass", *self["glass"]) if name not in self["native"]]


_OF_A_RUN = (
    "timesteps",
    "_timesteps",
    "sigmas",
    "num_inference_steps",
    "counter",
    "lower_order_nums",
    "_step_index",
    "_begin_index",
)
"""What a native scheduler notes of its grid, and of where a run is."""


def written_for_natives(text: str, config: GLASSConfig) -> str:
    """Return a config in JSON, from which a native's `from_pretrained` leaves out what is ours.

    Diffusers writes no list of defaults; where it reads one, it heeds it.
    """
    listed = {**json.loads(text), _DEFAULTS: config.own}
    return json.dumps(listed, indent=2, sort_keys=True) + "\n"


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


def untouched(config: Mapping[str, Any]) -> set[str]:
    """Return the keys of a native config that were left at their defaults, and still are there.

    The constructors of some pipelines (Stable Diffusion's) mend keys in the config of a scheduler
    and leave the list of its defaults as it was.
    """
    defaults = _signature(config["_class_name"])
    listed = (key for key in config.get(_DEFAULTS, ()) if key in defaults)
    return {key for key in listed if _same(config.get(key), defaults[key].default)}


def check_glass(config: Mapping[str, Any]) -> None:
    """Refuse the config of a GLASS scheduler that does not hold its native's.

    Raises:
        ValueError: if `native`, the class in it, or `glass` is missing.
    """
    parts = ("native", "glass")
    missing = [f"'{part}'" for part in parts if not isinstance(config.get(part), Mapping)]
    if not missing and "_class_name" not in config["native"]:
        missing = ["'_class_name' in 'native'"]
    if missing:
        raise ValueError(
            f"config: expected that of a {config['_class_name']}, with the native config under "
            f"'native' and its own options under 'glass', got none under {' and '.join(missing)}: "
            "save it by save_pretrained, or build the scheduler from pipe.scheduler by "
            "from_scheduler"
        )


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
    """Return a native scheduler built from its own config.

    Raises:
        ValueError: if the config is none, does not say its class, or has betas that are no
            fractions of noise.
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"native: expected the config of a native scheduler, got {type(config).__name__}: use "
            "GLASSScheduler.from_scheduler(pipe.scheduler)"
        )
    name = class_name(config)
    # defaults stay defaults, for the way to other classes
    known = parameters(name) - untouched({**config, "_class_name": name})
    given = {key: value for key, value in config.items() if key in known}
    _check_betas(given.get("trained_betas"))
    scheduler = getattr(diffusers, name)(**given)
    if is_cosmos2(name, config):
        scheduler.register_to_config(**{key: config[key] for key in COSMOS2_KEYS if key in config})
    return scheduler


def without_run(scheduler: Any) -> Any:
    """Return a copy of a native scheduler that has run nothing yet.

    Tables and settings are the object's own, which may have been changed since it was built. Grid
    and counters are a new one's, and what a solver keeps of its network's outputs is left out.
    """
    new = vars(build({**scheduler.config, "_class_name": type(scheduler).__name__}))
    own = {key: value for key, value in vars(scheduler).items() if key not in _OF_A_RUN}
    kept = {key: _copied(value) for key, value in own.items() if not _holds_latents(value)}
    copied = object.__new__(type(scheduler))
    copied.__dict__ = {**new, **kept}
    return copied


def parts(
    config: Any, options: Mapping[str, Any], own_names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the native config and our own options that a config and options amount to.

    Args:
        config: The config of a native scheduler, or of a GLASS scheduler.
        options: What is to be set in it.
        own_names: The names of our own options.

    Raises:
        TypeError: if the config is none, or an option is of neither kind.
        ValueError: if the native class is not supported or cannot be told from the config.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config: expected a scheduler's config, got {type(config).__name__}: pass "
            "pipe.scheduler.config, or use GLASSScheduler.from_pretrained for a path"
        )
    if config.get("_class_name") in GLASS_CLASSES:
        check_glass(config)
        native, own = current(config), dict(config["glass"])
        own |= {key: config[key] for key in own if key in config and key not in native}
    else:
        native, own = {**config, "_class_name": class_name(config)}, {}
    own |= {key: options[key] for key in own_names if key in options}
    of_native = {key: value for key, value in options.items() if key not in own_names}
    known = parameters(native["_class_name"])
    if unknown := [key for key in of_native if key not in known]:
        raise TypeError(
            f"from_config: unknown option {', '.join(unknown)}; GLASSScheduler takes "
            f"{', '.join(own_names)} and the keys of {native['_class_name']}"
        )
    defaults = config.get("_use_default_values", ())
    native["_use_default_values"] = [key for key in defaults if key not in of_native]
    return native | of_native, own


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
    return set(_signature(name))


def _signature(name: str) -> dict[str, inspect.Parameter]:
    native = getattr(diffusers, name, None)
    if native is None:
        return {}
    return dict(list(inspect.signature(native.__init__).parameters.items())[1:])  # without self


def _same(value: Any, default: Any) -> bool:
    """Return whether a value is a default; one of another type (an array for a list) is not."""
    return value is default or (type(value) is type(default) and value == default)


def _holds_latents(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_latents, value))
    return isinstance(value, Tensor) and value.ndim > 1  # tables are lists of numbers


def _copied(value: Any) -> Any:
    """Return a deep copy, without the graph that a tensor was computed by."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _check_betas(betas: Any) -> None:
    """Refuse a table of betas that is empty or holds what is no share of noise.

    Raises:
        ValueError: with the entries at fault.
    """
    if betas is None:
        return
    table = np.asarray(betas, np.float64)
    wrong = np.flatnonzero(~((table > 0) & (table <= 1)))
    if table.ndim != 1 or not table.size or wrong.size:
        at = ", ".join(f"{table.flat[i]:g} at {i}" for i in wrong[:3])
        raise ValueError(
            "trained_betas: expected a list of numbers in (0, 1], one per training timestep, got "
            f"shape {table.shape}{' with ' + at if at else ''}: pass the betas the model was "
            "trained with, or None for beta_start to beta_end"
        )
