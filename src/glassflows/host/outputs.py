"""What a pipeline puts out: rows of it, in the form that `output_type` names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def as_arrays(samples: Any) -> Any:
    """Return PIL images as arrays, as pipelines put out for "np"; other samples as they are."""
    pictures = isinstance(samples, list) and len(samples) > 0 and isinstance(samples[0], Image)
    return VaeImageProcessor.pil_to_numpy(samples) if pictures else samples


def channels_first(arrays: Any) -> Tensor:
    """Return samples as a new float32 tensor, its channels first.

    Args:
        arrays: Images (N, H, W, 3), videos (N, frames, H, W, 3), or sound (N, …).
    """
    tensor = torch.tensor(np.asarray(arrays), dtype=torch.float32)
    if tensor.ndim >= 4:
        return tensor.movedim(-1, -3)
    return tensor[:, None] if tensor.ndim == 2 else tensor  # mono


def channels_last(samples: Tensor, like: Any) -> np.ndarray:
    """Return samples as an array, the inverse of `channels_first`.

    Args:
        samples: Images (N, 3, H, W), videos (N, frames, 3, H, W), or sound (N, channels, samples).
        like: Samples that a pipeline put out; mono sound of theirs has no axis of channels.
    """
    if samples.ndim >= 4:
        return samples.movedim(-3, -1).float().cpu().numpy()
    mono = samples.ndim == 3 and np.ndim(like) == 2
    return (samples[:, 0] if mono else samples).float().cpu().numpy()


def rows_of_output(output: Any, rows: Tensor, output_type: str) -> Any:
    """Return some rows of the samples that a pipeline drew.

    Args:
        output: Latents for "latent", else arrays with the channels last.
        rows: Indices, int64.
        output_type: One of `OUTPUT_TYPES`.
    """
    if output_type == "latent":
        return output[rows.to(output.device)]
    arrays = np.asarray(output)[rows.numpy()]
    if output_type == "pt":
        return channels_first(arrays)
    if output_type == "np" or arrays.ndim < 4:  # sound
        return arrays
    flat = np.ascontiguousarray(arrays.reshape(-1, *arrays.shape[-3:]))
    images = VaeImageProcessor.numpy_to_pil(flat)
    if arrays.ndim == 4:
        return images
    frames = arrays.shape[1]
    return [images[i : i + frames] for i in range(0, len(images), frames)]


def rows_of_others(outputs: Any, number: int, rows: Tensor) -> dict[str, Any]:
    """Return what else a pipeline puts out, sound or verdicts, by its name.

    Args:
        outputs: The pipeline's output.
        number: Number of samples it drew; what has one entry for each of them is cut to `rows`.
        rows: Indices, int64.
    """
    others = list(outputs.items())[1:] if isinstance(outputs, dict) else []
    return {name: _rows_if_per_sample(value, number, rows) for name, value in others}


def _rows_if_per_sample(value: Any, number: int, rows: Tensor) -> Any:
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == number:
        return value[rows.to(value.device)]
    if isinstance(value, np.ndarray) and value.ndim > 0 and len(value) == number:
        return value[rows.numpy()]
    if isinstance(value, list) and len(value) == number:
        return [value[i] for i in rows.tolist()]
    return value
