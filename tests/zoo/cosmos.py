"""Cosmos 1 (EDM), 2 (noise level up to 80 in a flow-matching scheduler), 2.5 and 3 (flow matching)."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from numpy import ndarray
from transformers import Qwen2Tokenizer

from . import Case, pipeline
from .wan import FRAMES, HEIGHT, TEXT, WIDTH, autoencoder, embeds, picture, unipc, video


class SafetyChecker:
    """Stands for the guardrail, which the pipelines insist on and which is a large download."""

    def to(self, device: Any) -> SafetyChecker:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: ndarray) -> ndarray:
        return frames


class Control(diffusers.ModelMixin):
    """Stands for the control network of diffusers, which needs torchvision."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.patches = torch.nn.Conv3d(channels, width, kernel_size=(1, 2, 2), stride=(1, 2, 2))

    def forward(self, controls_latents: torch.Tensor, conditioning_scale: float, **_: Any) -> tuple[list[torch.Tensor]]:
        return ([conditioning_scale * self.patches(controls_latents).flatten(2).mT],)


def transformer(in_channels: int = 4, **config: Any) -> Any:
    sizes = {
        "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "mlp_ratio": 2,
        "text_embed_dim": TEXT, "adaln_lora_dim": 4, "max_size": (8, 32, 32), "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": False,  # which would need torchvision
    }  # fmt: skip
    return diffusers.CosmosTransformer3DModel(in_channels=in_channels, **(sizes | config))


def build(name: str, **components: Any) -> Any:
    texts = {"tokenizer": None, "text_encoder": None}
    return pipeline(name, safety_checker=SafetyChecker(), **texts, **components)


def edm(name: str, in_channels: int) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, scaling_factor=1.0,
        spatial_compression_ratio=4, temporal_compression_ratio=4,
        latents_mean=[0.1] * 4 * 2, latents_std=[0.8] * 4 * 2,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    return build(name, transformer=transformer(in_channels), vae=vae, scheduler=scheduler)


def text_to_world() -> Any:
    return edm("CosmosTextToWorldPipeline", 4)


def video_to_world() -> Any:
    return edm("CosmosVideoToWorldPipeline", 4 + 1)


def second(name: str, in_channels: int) -> Any:
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return build(name, transformer=transformer(in_channels), vae=autoencoder(), scheduler=scheduler)


def text_to_image_2() -> Any:
    return second("Cosmos2TextToImagePipeline", 4)


def video_to_world_2() -> Any:
    return second("Cosmos2VideoToWorldPipeline", 4 + 1)


def karras_flow() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, sigma_min=0.01, sigma_max=200
    )


def predict() -> Any:
    torch.manual_seed(0)
    return build(
        "Cosmos2_5_PredictBasePipeline", transformer=transformer(4 + 1), vae=autoencoder(), scheduler=karras_flow()
    )


def transfer() -> Any:
    torch.manual_seed(0)
    network = transformer(4 + 1, controlnet_block_every_n=1)
    controlnet = Control(4, network.config.num_attention_heads * network.config.attention_head_dim)
    components = {"transformer": network, "controlnet": controlnet, "vae": autoencoder(), "scheduler": karras_flow()}
    return build("Cosmos2_5_TransferPipeline", **components)


def tokenizer() -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
    letters = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    vocab = {token: i for i, token in enumerate([*letters, *special])}
    made = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<|im_end|>", extra_special_tokens=special[1:])
    made.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    return made


def omni(sound_tokenizer: Any = None, **config: Any) -> Any:
    torch.manual_seed(0)
    words = tokenizer()
    network = diffusers.Cosmos3OmniTransformer(
        head_dim=12, hidden_size=24, intermediate_size=24, latent_channel=4, latent_patch_size=2,
        patch_latent_dim=4 * 2 * 2, num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=1,
        rope_axes_dim=[2, 2, 2], vocab_size=len(words), **config,
    )  # fmt: skip
    components = {"transformer": network, "text_tokenizer": words, "vae": autoencoder(), "scheduler": unipc(10.0)}
    safety = {"safety_checker": None, "enable_safety_checker": False}
    return pipeline("Cosmos3OmniPipeline", **components, sound_tokenizer=sound_tokenizer, **safety)


def omni_sound() -> Any:
    torch.manual_seed(2)
    audio = diffusers.Cosmos3AVAEAudioTokenizer(
        encoder_enabled=False, sampling_rate=480, vocoder_input_dim=4, dec_dim=8, dec_c_mults=(1, 2),
        dec_strides=(2, 4), hop_size=8,
    )  # fmt: skip
    return omni(audio, sound_gen=True, sound_dim=4)


def call(**more: Any) -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, **embeds(), **more}


def image_call() -> dict[str, Any]:
    return {"height": HEIGHT, "width": WIDTH, **embeds()}


def first_frame_call() -> dict[str, Any]:
    return call(image=picture())


def continue_call() -> dict[str, Any]:
    return call(video=video(), num_frames=9)


def control_call() -> dict[str, Any]:
    # two chunks, so that the loop runs twice
    return call(controls=video(9), num_frames=9, num_frames_per_chunk=FRAMES, num_ar_conditional_frames=1)


def omni_call() -> dict[str, Any]:
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    return {"prompt": "a dog", "negative_prompt": "no cat", "use_system_prompt": False, **size}


def omni_sound_call() -> dict[str, Any]:
    return omni_call() | {"enable_sound": True}


CASES = [
    Case("CosmosTextToWorldPipeline", text_to_world, call),
    Case("CosmosVideoToWorldPipeline", video_to_world, first_frame_call, task="video"),
    Case("Cosmos2TextToImagePipeline", text_to_image_2, image_call),
    Case("Cosmos2VideoToWorldPipeline", video_to_world_2, first_frame_call, task="video"),
    Case("Cosmos2_5_PredictBasePipeline", predict, call),
    Case("Cosmos2_5_PredictBasePipeline", predict, continue_call, task="video", variant="from a video"),
    Case("Cosmos2_5_TransferPipeline", transfer, control_call, task="control"),
    Case("Cosmos3OmniPipeline", omni, omni_call),
    Case("Cosmos3OmniPipeline", omni_sound, omni_sound_call, variant="with sound"),
]
