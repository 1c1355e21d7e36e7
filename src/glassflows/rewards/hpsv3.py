"""HPSv3: a Qwen2-VL that is asked how people would like an image, and answers with a number.

The question ends in a token of its own, <|Reward|>, whose last hidden state a head reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .images import CLIP_MEAN, CLIP_STD, normalised, resized
from .model import ModelReward, found, located, state_of, under, with_words
from .qwen import patches, smart_size

_CHECKPOINT = "HPSv3.safetensors"
_BASE = "Qwen/Qwen2-VL-7B-Instruct"
_PIXELS = 256 * 28 * 28  # of an image, which are 256 tokens
_IMAGE, _REWARD = "<|image_pad|>", "<|Reward|>"
# the words of training, with the spaces at the ends of their lines
_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
INSTRUCTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text "
    "Alignment and give a overall score to estimate the human preference. Please provide "
    "a rating from 0 to 10, with 0 being the worst and 10 being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions "
    "should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or "
    "logical errors, such as abnormal body structures or nonsensical environmental "
    "setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should "
    "be clear and easy to interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, "
    "lighting, and other visual elements (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including "
    "the color scheme, composition, atmosphere, depth of field, and the overall creative "
    "appeal. The scene should convey a sense of harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such "
    "as political, violent, or adult material. If such content is present, the image "
    "quality and satisfaction score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following "
    "sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., "
    "person, animal, object) align with the textual description. The subject should "
    "match the description in terms of number, appearance, and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic "
    "style, evaluate how well the image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and "
    "surrounding elements in the image logically fit the scenario described in the "
    "prompt. The environment should support and enhance the subject without "
    "contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt "
    "(e.g., colors, clothing, accessories, expressions, actions) are faithfully "
    "represented in the image. Minor deviations may be acceptable, but critical "
    "attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the "
    "prompt are captured in the image. The generated content should not introduce "
    "elements that conflict with or distort the original description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
)
QUESTION = "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"


class HPSv3(ModelReward):
    """Human preference score v3: μ, the first output of h(Qwen2-VL(image, question about prompt)).

    A head h of three linear layers reads the hidden state of the question's token <|Reward|>, and
    returns mean and spread of how people like the image. Scores are the mean: about −2 to 12, and
    8 to 11 for images of today's models. `reward_scale` is 0.8, a guess: that the scores for one
    prompt scatter by about 3. Images of any size are seen at their own ratio with 200704 pixels,
    448 × 448 or as many, and prompts are not cut.

    The model was trained and published in bfloat16, a file of 16.6 GB, of which 15.5 GB are needed;
    in float32 it takes 31 GB. The head is in float32 in both.

    Args:
        model: Name, folder or file of HPSv3.safetensors; MizzenAI/HPSv3 by default.
        base: Name or folder of Qwen2-VL-7B-Instruct, for its configuration and its tokenizer; None
            for those in the model's folder, else Qwen/Qwen2-VL-7B-Instruct.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Raises:
        ValueError: at a call, if one side of an image is more than 200 times the other.

    Reference:
        Ma et al., arXiv:2508.03789.
    """

    reward_scale = 0.8
    batch_size = 4  # each is a row of some 850 tokens of a large model
    default = "MizzenAI/HPSv3"
    files = f"{_CHECKPOINT}, and of Qwen2-VL-7B-Instruct config.json and tokenizer.json"
    offline = "HPSv3.from_pretrained('/model', base='/qwen2-vl')"

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        base: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, device=device, dtype=dtype)
        has_own = (Path(self.name) / "config.json").is_file()
        self.base = located(base or (self.name if has_own else _BASE))
        self.tokenizer: Any = None

    def _sources(self) -> list[str]:
        return [self.name, self.base]

    def _read(self) -> dict[str, nn.Module]:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoTokenizer
        from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl

        config = AutoConfig.from_pretrained(self.base)
        if config.model_type != "qwen2_vl":
            raise ValueError(
                f"base: expected a Qwen2-VL, got {self.base}, which is a {config.model_type}: "
                f"name {_BASE}"
            )
        self.tokenizer = with_words(AutoTokenizer.from_pretrained(self.base), self.base)
        self.tokenizer.add_tokens([_REWARD], special_tokens=True)
        state = state_of(found(self.name, _CHECKPOINT))
        if "model.embed_tokens.weight" not in state:
            raise ValueError(
                "expected tensors visual.…, model.… and rm_head.…, got "
                f"{sorted(state)[:4]}: name {_CHECKPOINT}"
            )
        number = len(state["model.embed_tokens.weight"])
        if number < len(self.tokenizer):
            raise ValueError(
                f"base: expected a tokenizer of at most {number} tokens with {_REWARD}, got "
                f"{len(self.tokenizer)} from {self.base}: name {_BASE}"
            )
        language: Any = config.get_text_config()
        language.vocab_size = number  # as many as the base has, and <|Reward|>
        # the class of the language model, which had the second name before transformers 4.52
        kind: Any = getattr(qwen2_vl, "Qwen2VLTextModel", qwen2_vl.Qwen2VLModel)
        with init_empty_weights(include_buffers=False):  # frequencies are computed, in float32
            networks = {
                "visual": qwen2_vl.Qwen2VisionTransformerPretrainedModel(config.vision_config),
                "language": kind(language),
                "head": _head(language.hidden_size),
            }
        for name, prefix in (("visual", "visual."), ("language", "model."), ("head", "rm_head.")):
            dtype = self.exact if name == "head" else self.dtype
            networks[name].load_state_dict(
                {key: value.to(dtype) for key, value in under(state, prefix).items()}, assign=True
            )
            for frequencies in networks[name].buffers():
                # rounded as in training and in the published code, where they are bfloat16 as well
                frequencies.copy_(frequencies.bfloat16())
        return networks

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        visual, language, head = map(self._network, ("visual", "language", "head"))
        patch, merge = visual.config.patch_size, visual.config.spatial_merge_size
        height, width = images.shape[-2:]
        height, width = smart_size(height, width, patch * merge, _PIXELS, _PIXELS)
        pixels = normalised(resized(images, height, width), CLIP_MEAN, CLIP_STD)
        seen = visual(
            patches(pixels, patch, merge, visual.config.temporal_patch_size).to(self.dtype),
            grid_thw=torch.tensor(
                [[1, height // patch, width // patch]] * len(images), device=self.device
            ),
        )
        seen = getattr(seen, "pooler_output", seen)  # transformers 4 returns the tensor itself
        ids = self._ids(texts, height * width // (patch * merge) ** 2)
        image, reward = (
            ids == self.tokenizer.convert_tokens_to_ids(token) for token in (_IMAGE, _REWARD)
        )
        embedded = language.get_input_embeddings()(ids).masked_scatter(image[..., None], seen)
        # the positions of a text, not those in an image, as in training. Texts end in padding, at
        # which nothing before it looks
        read = language(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return head(read[reward].to(self.exact))[:, 0]

    def _ids(self, texts: Sequence[str], number: int) -> Tensor:
        """Return the tokens of the question about each text, padded on the right with 0.

        Args:
            texts: N prompts. What looks like a control token, such as <|im_end|>, is text like any
                other.
            number: Of the tokens of an image.

        Returns:
            Shape (N, longest).
        """

        def ids(text: str, **options: bool) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]

        before = ids(f"{_SYSTEM}<|im_start|>user\n<|vision_start|>{_IMAGE * number}<|vision_end|>")
        rows = []
        for text in texts:
            asked = INSTRUCTION.format(text_prompt=text) + QUESTION
            words, reward, after = asked.rpartition(_REWARD)
            after = f"{reward}{after}<|im_end|>\n<|im_start|>assistant\n"
            rows.append(before + ids(words, split_special_tokens=True) + ids(after))
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)


def _head(width: int) -> nn.Sequential:
    """Return the published head of a language model of some width, with its dropout."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
