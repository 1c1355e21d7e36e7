"""Real diffusers pipelines at toy size, built offline with random weights."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)  # fmt: skip

import checkpoints
from glassflows import FeynmanKacSteerer, GLASSScheduler

TRANSFORMERS_5 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="the scenes' tokenizers are files of transformers 5"
)
DIFFUSERS_42 = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42"), reason="older ones build other pipelines"
)
FLUX_CALL = {"height": 16, "width": 24, "max_sequence_length": 8}
SD_CALL = {"height": 16, "width": 24}

SD_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def clip_text() -> tuple[CLIPTextModel, CLIPTokenizer]:
    with TemporaryDirectory() as folder:
        tokenizer = CLIPTokenizer.from_pretrained(checkpoints.clip_processor(Path(folder)))
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=16,
    )  # fmt: skip
    return CLIPTextModel(config).eval(), tokenizer


def t5_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in string.ascii_lowercase)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=2))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def vae(shift_factor: float | None) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        scaling_factor=0.7, shift_factor=shift_factor,
    ).eval()  # fmt: skip


def flux(cls: type = FluxPipeline, **scheduler):
    torch.manual_seed(0)
    text_encoder, tokenizer = clip_text()
    tokenizer_2 = t5_tokenizer()
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = cls(
        scheduler=FlowMatchEulerDiscreteScheduler(**({"use_dynamic_shifting": True} | scheduler)),
        vae=vae(0.1), text_encoder=text_encoder, tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(), tokenizer_2=tokenizer_2, transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(cls: type = StableDiffusionPipeline, scheduler=None, **config):
    torch.manual_seed(0)
    text_encoder, tokenizer = clip_text()
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    pipe = cls(
        scheduler=scheduler or DDIMScheduler(**(SD_SCHEDULER | config)),
        vae=vae(None), text_encoder=text_encoder, tokenizer=tokenizer, unet=unet.eval(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_img2img():
    return flux(FluxImg2ImgPipeline)


def flux_inpaint():
    return flux(FluxInpaintPipeline)


def sd_inpaint():
    return sd(StableDiffusionInpaintPipeline)


def sd_img2img():
    return sd(StableDiffusionImg2ImgPipeline)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture() -> torch.Tensor:
    return torch.rand(1, 3, 16, 24, generator=seeded(3))


def left_half() -> torch.Tensor:
    """A mask that asks for the left half to be painted."""
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., :12] = 1
    return mask


# ---- a pipeline and its call -----------------------------------------------------------------------------------------


def brightness(images, prompts):
    """How bright an image is; spread enough for a toy model's images to differ."""
    assert images.dtype == torch.float32
    assert images.shape[1:] == (3, 16, 24)
    assert len(images) == len(prompts)
    assert images.min() >= 0
    assert images.max() <= 1
    return 1000 * images.mean((1, 2, 3))


def predictions(monkeypatch):
    """Note (scheduler, rows of ẑ) at every step of every scheduler."""
    seen, step = [], GLASSScheduler.step

    @functools.wraps(step)
    def noting(self, *args, **kwargs):
        out = step(self, *args, **kwargs)
        seen.append((self, (out[1] if isinstance(out, tuple) else out.pred_original_sample).clone()))
        return out

    monkeypatch.setattr(GLASSScheduler, "step", noting)
    return seen


IMAGE = {"image": picture(), "strength": 0.7}
INPAINT = {"image": picture(), "mask_image": left_half(), "strength": 1.0}
PROMPT = {"prompt": "a cat"}
CALLS = {
    flux: PROMPT | FLUX_CALL, flux_img2img: PROMPT | FLUX_CALL | IMAGE, flux_inpaint: PROMPT | FLUX_CALL | INPAINT,
    sd: PROMPT | SD_CALL, sd_img2img: PROMPT | SD_CALL | IMAGE, sd_inpaint: PROMPT | SD_CALL | INPAINT,
}  # fmt: skip
SECOND_TAKES_ALL = {  # options of a steerer by which the first of two particles goes nowhere
    "reward": lambda samples, prompts: torch.tensor([0.0, 1.0]), "num_particles": 2, "num_transitions": 2,
    "reward_scale": 1e4, "ess_threshold": 1.0,
}  # fmt: skip
STEERER = {  # what is a steerer's own; every other keyword argument is one of the call
    "reward", "num_particles", "num_transitions", "decode", "particle_batch_size", "decode_batch_size",
    "reward_batch_size", "previews", "reward_scale", "potential", "resampling", "ess_threshold", "score_every", "start",
    "stop", "calibration", "twist", "look_ahead", "look_ahead_samples", "widths", "distributed",
    "preview_vae", "preview_size",
}  # fmt: skip


class Toy:
    """A real pipeline at toy size, run and steered by calls of which a test names what matters to it.

    Args:
        make: Makes the pipeline, the same weights each time.
        call: Keyword arguments of every call; of a function of this module those in `CALLS`.
    """

    def __init__(self, make: Callable[[], Any], call: dict[str, Any] | None = None) -> None:
        self.make = make
        self.call = CALLS[make] if call is None else call
        self.pipe = make()

    @property
    def network(self) -> torch.nn.Module:
        return getattr(self.pipe, self.name_of_network)

    @property
    def name_of_network(self) -> str:
        return "transformer" if "transformer" in self.pipe.components else "unet"

    def glass(self, num_transitions: int = 3, **options) -> Toy:
        """Put a GLASSScheduler in the place of the pipeline's own; return the toy."""
        native = self.pipe.scheduler
        self.pipe.scheduler = GLASSScheduler.from_scheduler(native, num_transitions=num_transitions, **options)
        return self

    def latents(self, number: int, seed: int = 0) -> torch.Tensor:
        """Return initial latents."""
        shape = (24, 16) if self.name_of_network == "transformer" else (4, 8, 12)
        return torch.randn(number, *shape, generator=seeded(seed))

    def arguments(self, prompt=None, *, seed: int = 0, **kwargs) -> dict[str, Any]:
        """Return the keyword arguments of a call: six steps, a seeded generator, arrays, and what is named."""
        defaults = {"num_inference_steps": 6, "generator": seeded(seed), "output_type": "np"}
        return defaults | self.call | ({} if prompt is None else {"prompt": prompt}) | kwargs

    def run(self, prompt=None, **kwargs):
        """Return the images of a plain call."""
        return self.pipe(**self.arguments(prompt, **kwargs)).images

    def steerer(self, **options) -> FeynmanKacSteerer:
        defaults = {"reward": brightness, "num_particles": 4, "num_transitions": 3, "start": 0.0}
        return FeynmanKacSteerer(self.pipe, **(defaults | options))

    def steer(self, prompt=None, **kwargs):
        """Return the result of a steered call, of a steerer with those of the keyword arguments that are its own."""
        options = {name: kwargs.pop(name) for name in STEERER & kwargs.keys()}
        return self.steerer(**options)(**self.arguments(prompt, **kwargs))
