"""What rewards of a pre-trained model have in common.

A model is one or several networks and their tokenizer or processor. It is read when it is first
needed, from a folder, a file, or the Hugging Face Hub (the Hub). Images and prompts are checked
before the model sees them.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .images import Images, as_tensors


class ModelReward(ABC):
    """A reward computed by a pre-trained model, which is imported and read at its first use.

    Subclasses read the model in `_read`, and score images and prompts with it in `_scores`.

    Args:
        model: Name on the Hub, or local folder or file; None for `default`.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.
    """

    reward_scale: float = 1.0  # a steerer's, if it is given none
    default: ClassVar[str] = ""
    files: ClassVar[str] = "config.json, model.safetensors"  # that the model is read from
    offline: ClassVar[str] = ""  # a call that names the folders of the files
    needs_prompts: bool = True
    batch_size: int = 64  # images per call of the networks; each frame of a video is one

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = str(model or self.default)
        accelerator = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        self.device = torch.device((accelerator or "cpu") if device is None else device)
        self.dtype = dtype
        self.networks: nn.ModuleDict | None = None
        self._warned = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Self:
        """Return the reward, with its model read at once.

        Args:
            name_or_path: Name on the Hub, or local folder or file.
            device: Device of the model; None for the accelerator, if there is one.
            dtype: Floating point type of the model.
            options: Those of the class.

        Raises:
            OSError: if the files are not found, or do not hold such a model.
        """
        return cls(name_or_path, device=device, dtype=dtype, **options).load()

    def load(self) -> Self:
        """Read the model, unless it has been read; return the reward itself."""
        if self.networks is None:
            try:
                networks = nn.ModuleDict(self._read())
            except (
                OSError,
                ValueError,
                ImportError,
                LookupError,
                RuntimeError,
                EOFError,
                UnpicklingError,
            ) as error:
                kind, sources = type(self).__name__, list(dict.fromkeys(self._sources()))
                remote = [name for name in sources if not Path(name).exists()]
                download = "".join(
                    f"\nWhere there is a network: hf download {name}" for name in remote
                )
                raise OSError(
                    f"{kind} could not be read from {', '.join(sources)}: {error}\n"
                    f"It needs {self.files}.{download}\n"
                    f"Elsewhere name the folders that hold them: {self.offline}"
                ) from error
            self.networks = networks.to(self.device).eval().requires_grad_(False)
        return self

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move the model, now or when it is read; return the reward itself.

        For another dtype the model is read anew.
        """
        if dtype not in (None, self.dtype):
            self.networks, self.dtype = None, dtype
        self.device = self.device if device is None else torch.device(device)
        if self.networks is not None:
            self.networks.to(self.device)
        return self

    def __call__(
        self, images: Images | Tensor, prompts: Sequence[str | None] | str | None = None
    ) -> Tensor:
        """Return the scores of images under their prompts.

        Args:
            images: Float tensor (N, 3, H, W) in [0, 1] of any size, or PIL images. The score of a
                video, in a tensor (N, frames, 3, H, W), is the mean over its frames. The scores are
                differentiable in a tensor.
            prompts: One for each image.

        Returns:
            Shape (N,), float32 (float64 for a model in float64), on the device of the images.

        Raises:
            ValueError: if an image is not in [0, 1], or there is not one prompt for each image.
            OSError: if the model's files are not found.
        """
        if isinstance(images, Tensor) and images.ndim == 5:
            frames, texts = images.shape[1], self._checked(prompts, len(images))
            repeated = [one for one in texts for _ in range(frames)]
            return self(images.flatten(0, 1), repeated).unflatten(0, (-1, frames)).mean(1)
        tensors = as_tensors(images)
        texts = iter(self._checked(prompts, sum(len(tensor) for tensor in tensors)))
        self.load()
        parts = [part for tensor in tensors for part in tensor.split(self.batch_size)]
        scores = [
            self._scores(part.to(self.device, self.exact), list(islice(texts, len(part))))
            for part in parts
        ]
        return torch.cat(scores).to(parts[0].device)

    @property
    def exact(self) -> torch.dtype:
        """The dtype for images, embeddings and scores: that of the model, but at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def _checked(self, prompts: Sequence[str | None] | str | None, number: int) -> list[str]:
        if not self.needs_prompts:
            return []
        texts = _listed(prompts)
        if len(texts) != number:
            raise ValueError(f"prompts: expected one for each image, {number}, got {len(texts)}")
        named = [text for text in texts if isinstance(text, str)]
        if len(named) < number:
            raise ValueError(
                f"prompts: {type(self).__name__} scores images under their prompts, got None: "
                "give the pipeline the prompt, or wrap the reward: "
                "lambda images, _: reward(images, [prompt] * len(images))"
            )
        return named

    def _tokens(self, tokenizer: Any, texts: Sequence[str], limit: int) -> dict[str, Tensor]:
        """Return the tokens of texts, cut to `limit` tokens each, with one warning."""
        lengths = [
            len(ids)
            for ids in tokenizer(list(texts), truncation=True, max_length=limit + 1)["input_ids"]
        ]
        if max(lengths) > limit and not self._warned:
            self._warned = True
            longest = texts[lengths.index(max(lengths))]
            warnings.warn(
                f"{type(self).__name__} reads the first {limit} tokens of a prompt and no more; "
                f"cut was {longest[:60]!r}…",
                stacklevel=2,
            )
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _network(self, name: str) -> Any:
        assert self.networks is not None  # `load` has been called
        return self.networks[name]

    def _sources(self) -> list[str]:
        """Return the names, folders and files that the model is read from, perhaps with repeats."""
        return [self.name]

    @abstractmethod
    def _read(self) -> dict[str, nn.Module]:
        """Return the model's networks by name, in its dtype; heads in `exact`."""

    @abstractmethod
    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        """Return the scores of images (n, 3, H, W) on the model's device, shape (n,), `exact`."""


def _listed(prompts: Sequence[str | None] | str | None) -> list[str | None]:
    return [prompts] if prompts is None or isinstance(prompts, str) else list(prompts)


def with_words(tokenizer: Any, name: str) -> Any:
    """Return the tokenizer, if it has a vocabulary.

    Where the files are missing, transformers 5 makes a tokenizer without a vocabulary.

    Raises:
        OSError: if the tokenizer has none.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise OSError(
            f"{name} has no vocabulary (tokenizer.json, or vocab.json and merges.txt, or vocab.txt)"
        )
    return tokenizer


def found(name: str, file: str) -> Path:
    """Return the path of one file of a model.

    Args:
        name: The file, its folder, or the model's name on the Hub.
        file: Name of the file.

    Raises:
        OSError: if the file is not found.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / file).is_file():
            return path / file
        raise OSError(f"{path} has no file {file}")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file))


def state_of(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, safetensors or pickled.

    Of a pickled checkpoint nothing but tensors is read.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def linear_head(state: dict[str, Tensor]) -> nn.Sequential:
    """Return the head of the aesthetic predictor or of ImageReward, a sequence of linear layers.

    Args:
        state: `layers.0.weight`, `layers.0.bias`, … with gaps where dropout was in training.
    """
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("layers.")})
    layers = []
    for number in numbers:
        weight, bias = state[f"layers.{number}.weight"], state[f"layers.{number}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)


def num_layers(state: dict[str, Tensor], prefix: str) -> int:
    """Return the number of layers that are named `prefix` + number."""
    return 1 + max(
        int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)
    )
