"""What the models of the Qwen-VL family take: images in patches, and texts with a place for each.

`QwenProcessor` does without torchvision, which the processors of transformers need for videos.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from packaging.version import Version
from PIL.Image import Image
from torch import Tensor
from typing_extensions import Self

_IMAGE = "<|image_pad|>"
_RATIO = 200  # of the sides of an image, at most


def smart_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the height and width that an image is resized to, near its own ratio.

    Both are multiples of `factor`: the nearest, or, where these have too many or too few pixels
    together, those next to the size of the same ratio with just `max_pixels` or `min_pixels`.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        factor: Side of what becomes one token, in pixels.
        min_pixels: Lower bound of height · width.
        max_pixels: Upper bound of height · width.

    Raises:
        ValueError: if one side is more than 200 times the other.

    Reference:
        `smart_resize` of qwen_vl_utils, by which the family was trained.
    """
    if max(height, width) > _RATIO * min(height, width):
        raise ValueError(
            f"images: expected sides of a ratio of at most {_RATIO}, got {height} × {width}: "
            "crop them"
        )

    nearest = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(nearest) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        nearest = [
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        ]
    elif math.prod(nearest) < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        nearest = [math.ceil(side * stretch / factor) * factor for side in (height, width)]
    return nearest[0], nearest[1]


def patches(images: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """Return images cut into patches, in the order in which the family's image encoders take them.

    Patches whose features are merged into one token follow each other. The function is
    differentiable.

    Args:
        images: Shape (N, C, H, W), normalised; H and W are multiples of `patch` · `merge`.
        patch: Side of a patch, in pixels.
        merge: Side of the square of patches that becomes one token, in patches.
        temporal: Frames of a patch, all of which are the image.

    Returns:
        Shape (N · H/patch · W/patch, C · temporal · patch · patch).
    """
    number, channels, height, width = images.shape
    side = patch * merge
    cut = images.reshape(
        number, channels, height // side, merge, patch, width // side, merge, patch
    ).permute(0, 2, 5, 3, 6, 1, 4, 7)  # row and column of token, then of patch, channel, pixels
    frames = cut.unsqueeze(6).expand(*cut.shape[:6], temporal, patch, patch)
    return frames.reshape(-1, channels * temporal * patch * patch)


def processor_of(name: str) -> Any:
    """Return the processor of a model; of a Qwen-VL also where torchvision is missing.

    Args:
        name: Name on the Hub, or local folder.

    Raises:
        OSError: if the files are not found.
        ImportError: if what reads the model's images is not installed.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils import is_torchvision_available

    try:
        return AutoProcessor.from_pretrained(name)
    # torchvision, by which Qwen's processors read videos; a TypeError until transformers 5.2
    except (ImportError, TypeError):
        model_type = str(AutoConfig.from_pretrained(name).model_type)
        if is_torchvision_available() or not model_type.startswith("qwen"):
            raise
        return QwenProcessor.from_pretrained(name)


class QwenProcessor:
    """Tokenizer and image processor of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and their like, for images.

    Args:
        tokenizer: The model's tokenizer.
        image_processor: The model's image processor.
        chat_template: The words of a conversation, in Jinja; None for those of the tokenizer.
    """

    def __init__(
        self, tokenizer: Any, image_processor: Any, chat_template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.chat_template = chat_template or tokenizer.chat_template
        self.image_token: str = getattr(tokenizer, "image_token", None) or _IMAGE

    @classmethod
    def from_pretrained(cls, name: str) -> Self:
        """Return the processor of a model.

        Args:
            name: Name on the Hub, or local folder.

        Raises:
            OSError: if the files are not found.
        """
        import transformers
        from transformers.processing_utils import ProcessorMixin

        own, _ = ProcessorMixin.get_processor_dict(name)  # a tokenizer's template comes second
        # the family shares one image processor; transformers 5.4 gave the one by PIL a name
        by_pil: Any = getattr(transformers, "Qwen2VLImageProcessorPil", None)
        return cls(
            transformers.AutoTokenizer.from_pretrained(name),
            (by_pil or transformers.Qwen2VLImageProcessor).from_pretrained(name),
            own.get("chat_template"),
        )

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """Return a conversation in the words of the model.

        Args:
            messages: Each has a role and a content: a text, or parts {"type": "image"} and
                {"type": "text", "text": text}.
            add_generation_prompt: Whether the words that begin the answer follow.
        """
        return self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )

    def __call__(
        self,
        *,
        text: Sequence[str],
        images: Sequence[Sequence[Image]],
        padding: bool = True,
        return_tensors: str = "pt",
        add_special_tokens: bool = True,
    ) -> dict[str, Tensor]:
        """Return what the model takes of texts and their images.

        Args:
            text: N texts, with one image token for each image.
            images: N lists of PIL images.
            padding: Whether shorter texts are padded, on the tokenizer's `padding_side`.
            return_tensors: "pt".
            add_special_tokens: Whether the tokenizer adds what begins and ends a text.

        Returns:
            `input_ids` and `attention_mask` of shape (N, L), with as many image tokens as the
            images have; `pixel_values`, their patches one below the other; `image_grid_thw` of
            shape (number of images, 3), their frames, rows and columns of patches; and
            `mm_token_type_ids` of shape (N, L), 1 at image tokens and 0 elsewhere, for models
            that take it (transformers 5.3 and newer).

        Raises:
            ValueError: if a text has not one image token for each of its images.
        """
        import transformers

        for one, pictures in zip(text, images, strict=True):
            if one.count(self.image_token) != len(pictures):
                raise ValueError(
                    f"text: expected {self.image_token} once for each image, {len(pictures)}, got "
                    f"{one.count(self.image_token)}: write one for each"
                )
        pixels = self.image_processor(
            images=[picture for pictures in images for picture in pictures],
            return_tensors=return_tensors,
        )
        numbers = iter(pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2)
        tokens = self.tokenizer(
            [
                re.sub(
                    re.escape(self.image_token), lambda found: found[0] * int(next(numbers)), one
                )
                for one in text
            ],
            padding=padding,
            return_tensors=return_tensors,
            return_token_type_ids=False,
            add_special_tokens=add_special_tokens,
        )
        image = tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(self.image_token)
        told_apart = Version(transformers.__version__) >= Version("5.3")
        kinds = {"mm_token_type_ids": image.int()} if told_apart else {}
        return {**tokens, **pixels, **kinds}
