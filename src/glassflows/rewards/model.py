"""What rewards of a pre-trained model have in common.

A model is one or several networks and their tokenizer or processor. It is read when it is first
needed, from a folder, a file, or the Hugging Face Hub (the Hub). Images and prompts are checked
before the model sees them. Threads may share a reward: its model is read once, and scores the
images of one thread at a time, because tokenizers keep a state.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice
from os.path import expanduser
from pathlib import Path
from typing import Any, ClassVar

import torch
from packaging.version import Version
from torch import Tensor, nn
from typing_extensions import Self

from ..caller import warn
from .images import Images, as_tensors

_FILES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


class _Lock:
    """A lock that a thread may take again; the copy of a lock is a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()


_READING = _Lock()  # transformers sets torch's default dtype while it reads a model


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
    scored: ClassVar[str] = "image"  # what has a prompt, in messages
    needs_prompts: bool = True
    batch_size: int = 64  # images per call of the networks; each frame of a video is one

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = located(model or self.default)
        self.device = usual_device() if device is None else torch.device(device)
        self.dtype = dtype
        self.networks: nn.ModuleDict | None = None
        self._warned = False
        self._alone = _Lock()

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

    def __repr__(self) -> str:
        options = [repr(str(self.name)), f"device={str(self.device)!r}"]
        if self.dtype != torch.float32:
            options.append(f"dtype={self.dtype}")
        return f"{type(self).__name__}({', '.join(options)})"

    def load(self) -> Self:
        """Read the model, unless it has been read; return the reward itself.

        Raises:
            OSError: if the files are not found, or do not hold such a model.
        """
        with self._alone:
            if self.networks is None:
                with _READING:
                    networks = self._read_or_say_why()
                self.networks = networks.to(self.device).eval().requires_grad_(False)
        return self

    def _read_or_say_why(self) -> nn.ModuleDict:
        sources = list(dict.fromkeys(self._sources()))
        absent = [name for name in sources if not Path(name).exists()]
        try:
            for name in absent:
                if _is_path(name):
                    raise FileNotFoundError(f"there is no file or folder {name}")
            return nn.ModuleDict(self._read())
        except Exception as error:  # whatever a file may hold that is no such model
            download = "".join(
                f"\nThere is no folder {name} here; where there is a network: hf download {name}"
                for name in absent
                if not _is_path(name)
            )
            raise OSError(
                f"{type(self).__name__} could not be read from {', '.join(sources)}: {error}\n"
                f"It needs {self.files}.{download}\n"
                f"Elsewhere name the folders that hold them: {self.offline}"
            ) from error

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move the model, now or when it is read; return the reward itself.

        For another dtype the model is read anew.
        """
        with self._alone:
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
            ValueError: if images are not as above, or there is not one prompt for each image.
            OSError: if the model's files are not found.
        """
        if self.scored == "image" and isinstance(images, Tensor) and images.ndim == 5:
            if images.shape[2] != 3:
                raise ValueError(
                    f"images: expected videos (N, frames, 3, H, W), got {tuple(images.shape)}: "
                    "put red, green and blue third, after the frames"
                )
            frames, texts = images.shape[1], self._checked(prompts, len(images))
            repeated = [one for one in texts for _ in range(frames)]
            return self(images.flatten(0, 1), repeated).unflatten(0, (-1, frames)).mean(1)
        tensors = self._taken(images)
        texts = iter(self._checked(prompts, sum(len(tensor) for tensor in tensors)))
        parts = [part for tensor in tensors for part in tensor.split(self.batch_size)]
        with self._alone:
            self.load()
            scores = torch.cat(
                [
                    self._scores(
                        moved(part, self.device, self.exact), list(islice(texts, len(part)))
                    )
                    for part in parts
                ]
            )
        return moved(scores, parts[0].device, scores.dtype)

    @property
    def exact(self) -> torch.dtype:
        """The dtype for images, embeddings and scores: that of the model, but at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    def check_prompts(self, prompts: Sequence[str | None]) -> None:
        """Check prompts before images are drawn of them.

        A subclass with a call of its own may bring prompts of its own.

        Raises:
            ValueError: if one of them is none, and the reward needs it.
        """
        if type(self).__call__ is ModelReward.__call__:
            self._check_texts(self._checked(prompts, len(prompts)))

    def _check_texts(self, texts: list[str]) -> None:  # noqa: B027 (most check nothing more)
        """Check prompts beyond that they are texts; there are none if the reward needs none."""

    def _taken(self, images: Images | Tensor) -> list[Tensor]:
        """Return what is scored as tensors, a row for each sample, checked."""
        return as_tensors(images)

    def _checked(self, prompts: Sequence[str | None] | str | None, number: int) -> list[str]:
        if not self.needs_prompts:
            return []
        texts = one_each([None] if prompts is None else prompts, number, self.scored)
        named = [text for text in texts if isinstance(text, str)]
        if len(named) < number:
            raise ValueError(
                f"prompts: {type(self).__name__} scores {self.scored}s under their prompts, got "
                "None: give the pipeline the prompt, or wrap the reward: "
                "lambda images, _: reward(images, [prompt] * len(images))"
            )
        return named

    def _tokens(self, tokenizer: Any, texts: Sequence[str], limit: int) -> dict[str, Tensor]:
        """Return the tokens of texts, cut to `limit` tokens each, with one warning.

        What looks like a control token, such as <|endoftext|>, is text like any other.
        """
        longer = tokenizer(
            list(texts), truncation=True, max_length=limit + 1, split_special_tokens=True
        )
        lengths = [len(ids) for ids in longer["input_ids"]]
        if max(lengths) > limit and not self._warned:
            self._warned = True
            longest = texts[lengths.index(max(lengths))]
            warn(
                f"{type(self).__name__} reads the first {limit} tokens of a prompt and no more; "
                f"cut was {longest[:60]!r}…"
            )
        tokens = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=limit,
            split_special_tokens=True,
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


def one_each(prompts: Sequence[Any] | str, number: int, what: str = "image") -> list[Any]:
    """Return prompts as a list; a text alone is one.

    Raises:
        ValueError: if there is not one for each of so many images.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(texts) != number:
        raise ValueError(f"prompts: expected one for each {what}, {number}, got {len(texts)}")
    return texts


def usual_device() -> torch.device:
    """Return the accelerator, if there is one, else the CPU."""
    available = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if available else None
    return accelerator or torch.device("cpu")


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """Return the option by which `from_pretrained` of transformers reads a model in a dtype."""
    import transformers

    named = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
    return {named: dtype}


def located(name: str | Path) -> str:
    """Return a name, folder or file as a string, with ~ expanded."""
    return expanduser(str(name))


def _is_path(name: str) -> bool:
    """Return whether a name is that of a file or folder, and of nothing on the Hub."""
    on_the_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII)
    return on_the_hub is None or name.endswith(_FILES)


def device_for(dtype: torch.dtype, device: torch.device) -> torch.device:
    """Return the device, or the CPU if the device has no such dtype, as MPS has no float64."""
    absent = dtype == torch.float64 and device.type == "mps"
    return torch.device("cpu") if absent else device


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype on a device, or on the CPU if the device has no such dtype.

    On its way it is float64 only where there is float64.
    """
    if dtype == torch.float64:
        return tensor.to(device_for(dtype, device)).to(dtype)
    return tensor.to(dtype).to(device)


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

    Raises:
        ValueError: if the checkpoint is no dict of tensors, or one of them is larger than what is
            stored of it.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    held = torch.load(path, map_location="cpu", weights_only=True)
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict):
        raise ValueError(
            f"{path}: expected a dict of tensors by their names, got {type(held).__name__}: "
            "name the checkpoint of the model"
        )
    state = {
        name: value
        for name, value in held.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not state:
        raise ValueError(
            f"{path}: expected a dict of tensors by their names, got none of {len(held)} entries: "
            "name the checkpoint of the model"
        )
    for name, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: expected tensors that are stored whole, got {name} of shape "
                f"{tuple(value.shape)}, which repeats what is stored: name another checkpoint"
            )
    return state


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def linear_head(state: dict[str, Tensor]) -> nn.Sequential:
    """Return the head of the aesthetic predictor or of ImageReward, a sequence of linear layers.

    Args:
        state: `layers.0.weight`, `layers.0.bias`, … with gaps where dropout was in training.

    Raises:
        ValueError: if there are no such layers.
    """
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("layers.")})
    if not numbers:
        raise ValueError(
            f"expected tensors layers.0.weight, layers.0.bias, …, got {sorted(state)[:4]}: "
            "name the checkpoint of such a head"
        )
    layers = []
    for number in numbers:
        weight, bias = state[f"layers.{number}.weight"], state[f"layers.{number}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="cpu", dtype=weight.dtype)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers)


def num_layers(state: dict[str, Tensor], prefix: str) -> int:
    """Return the number of layers that are named `prefix` + number.

    Raises:
        ValueError: if the layers are not numbered 0, 1, 2, …, each number once.
    """
    found = {name.split(".")[0] for name in under(state, prefix)}
    strays = found - {str(number) for number in range(len(found))}
    if strays or not found:
        raise ValueError(
            f"{prefix}…: expected layers numbered 0, 1, 2, … without gaps, got {len(found)}, among "
            f"them {', '.join(sorted(strays)[:4]) or 'none'}: name the checkpoint of the model"
        )
    return len(found)
