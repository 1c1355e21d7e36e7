"""Sounds and music: AudioLDM 2, Stable Audio, Stable Audio 3, ACE-Step, LongCat-Audio."""

from __future__ import annotations

import string
from typing import Any

import diffusers
import torch
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3Model,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from zoo import Case, autoencoder_kl, noise, pipeline
from zoo.ltx import t5


def awake(network: Any) -> Any:
    """Return a network without weights that start at zero, which keep its input from its output."""
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.2)
    return network


def audioldm2() -> Any:
    torch.manual_seed(0)
    unet = diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=([None, 8, 16], [None, 8, 16]),
    )  # fmt: skip
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=8, upsample_rates=[2], upsample_kernel_sizes=[4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], normalize_before=False,
        initializer_range=0.2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return pipeline(
        "AudioLDM2Pipeline", vae=autoencoder_kl(in_channels=1, out_channels=1), unet=unet, scheduler=scheduler,
        vocoder=SpeechT5HifiGan(vocoder), **audioldm2_encoders(),
    )  # fmt: skip


def audioldm2_encoders() -> dict[str, Any]:
    """Return CLAP and T5 as wide as the embeddings of the call, and the language model that goes on from both."""
    from diffusers.pipelines.audioldm2 import AudioLDM2ProjectionModel

    letters = {letter: i for i, letter in enumerate(["<pad>", "</s>", "<unk>", "<s>", "Ġ", *string.ascii_lowercase])}
    size = {"vocab_size": len(letters), "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    audio = {
        "spec_size": 16, "num_mel_bins": 8, "patch_size": 2, "patch_stride": [2, 2], "patch_embeds_hidden_size": 4,
        "depths": [1, 1], "num_attention_heads": [2, 2], "window_size": 4, "hidden_size": 8, "num_classes": 2,
    }  # fmt: skip
    text = size | {"num_attention_heads": 2, "pad_token_id": 0, "max_position_embeddings": 24}
    t5 = T5Config(vocab_size=len(letters), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    gpt = GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=8, n_positions=64, bos_token_id=0, eos_token_id=0)
    gpt.max_new_tokens = 3
    pieces = [(piece.replace("Ġ", "▁"), -2.0) for piece in letters]
    return {
        "text_encoder": ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16)),
        "text_encoder_2": T5EncoderModel(t5),
        "projection_model": AudioLDM2ProjectionModel(16, 16, 8),
        "language_model": GPT2LMHeadModel(gpt),
        "tokenizer": RobertaTokenizer(vocab=letters, merges=[], model_max_length=20),
        "tokenizer_2": T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=20),
        "feature_extractor": ClapFeatureExtractor(),
    }


def audioldm2_call() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 5, 16), "negative_prompt_embeds": noise(1, 5, 16, seed=1),
        "generated_prompt_embeds": noise(1, 3, 8), "negative_generated_prompt_embeds": noise(1, 3, 8, seed=1),
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
        "negative_attention_mask": torch.ones(1, 5, dtype=torch.long), "audio_length_in_s": 0.002,
    }  # fmt: skip


def oobleck(channels: int) -> Any:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[2, 2], decoder_channels=4, decoder_input_channels=channels,
        channel_multiples=[1, 2], sampling_rate=16,
    )  # fmt: skip


def stable_audio() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=2, cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=16,
        cross_attention_input_dim=8,
    )  # fmt: skip
    # checkpoints have the same solver with noise, CosineDPMSolverMultistepScheduler, which needs torchsde
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    return pipeline(
        "StableAudioPipeline", vae=oobleck(4), text_encoder=None, tokenizer=None, transformer=transformer,
        projection_model=diffusers.StableAudioProjectionModel(16, 8, min_value=0, max_value=32), scheduler=scheduler,
    )  # fmt: skip


def stable_audio_3(name: str, **scheduler: Any) -> Any:
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    torch.manual_seed(0)
    transformer = diffusers.StableAudio3DiTModel(
        io_channels=8, embed_dim=16, depth=1, num_heads=2, cond_token_dim=16, global_cond_dim=16, local_add_cond_dim=9,
        timestep_features_dim=8, ff_mult=2, num_memory_tokens=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderSAME(
        patch_size=2, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(2,), encoder_transformer_depths=(1,),
        latent_dim=8, dim_heads=4, ff_mult=2, sampling_rate=16,
    )  # fmt: skip
    return pipeline(
        name, vae=awake(vae), text_encoder=None, tokenizer=None, transformer=awake(transformer),
        duration_embedder=StableAudio3DurationEmbedder(output_dim=16, fourier_dim=8),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, **scheduler),
    )  # fmt: skip


def stable_audio_3_call(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 4, 16), "encoder_attention_mask": torch.ones(1, 4, dtype=torch.long), "duration": 2.0,
        **more,
    }  # fmt: skip


def waveform() -> torch.Tensor:
    return 0.3 * noise(1, 2, 32, seed=2)


def ace_step() -> Any:
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    torch.manual_seed(0)
    tokenizer = t5()["tokenizer"]
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 8, "sliding_window": 8}  # fmt: skip
    language = {k: v for k, v in size.items() if k != "sliding_window"}
    return pipeline(
        "AceStepPipeline", vae=oobleck(4), tokenizer=tokenizer,
        text_encoder=Qwen3Model(Qwen3Config(**language, num_hidden_layers=1, vocab_size=len(tokenizer))),
        transformer=diffusers.AceStepTransformer1DModel(
            **size, num_hidden_layers=1, in_channels=12, audio_acoustic_hidden_dim=4, layer_types=["full_attention"]
        ),
        condition_encoder=AceStepConditionEncoder(
            **size, text_hidden_dim=16, timbre_hidden_dim=4, num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )  # fmt: skip


def song() -> dict[str, Any]:
    return {
        "prompt": "a slow piano", "lyrics": "la la", "audio_duration": 2.0, "max_text_length": 8, "max_lyric_length": 8,
    }  # fmt: skip


def longcat() -> Any:
    torch.manual_seed(0)
    tokenizer = t5()["tokenizer"]
    text = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = diffusers.LongCatAudioDiTTransformer(
        dit_dim=16, dit_depth=1, dit_heads=2, dit_text_dim=16, latent_dim=8, text_conv=False
    )
    vae = diffusers.LongCatAudioDiTVae(
        channels=8, c_mults=[1, 2], strides=[2], latent_dim=8, encoder_latent_dim=16, downsampling_ratio=2,
        sample_rate=16,
    )  # fmt: skip
    return pipeline(
        "LongCatAudioDiTPipeline", vae=vae, text_encoder=UMT5EncoderModel(text), tokenizer=tokenizer,
        transformer=awake(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
    )  # fmt: skip


CASES = [
    Case("AudioLDM2Pipeline", audioldm2, audioldm2_call, networks=("unet",), task="audio"),
    Case(
        "StableAudioPipeline",
        stable_audio,
        lambda: {"prompt_embeds": noise(1, 4, 16), "negative_prompt_embeds": noise(1, 4, 16, seed=1)},
        task="audio",
    ),
    Case(
        "StableAudio3Pipeline",
        lambda: stable_audio_3("StableAudio3Pipeline"),
        lambda: stable_audio_3_call(guidance_scale=4.0, negative_prompt_embeds=noise(1, 4, 16, seed=1)),
        task="audio",
    ),
    Case(
        "StableAudio3AudioToAudioPipeline",
        # the distilled checkpoints start each step from new noise
        lambda: stable_audio_3("StableAudio3AudioToAudioPipeline", stochastic_sampling=True),
        lambda: stable_audio_3_call(audio=waveform()),
        task="audio",
    ),
    Case(
        "StableAudio3AudioToAudioPipeline",
        lambda: stable_audio_3("StableAudio3AudioToAudioPipeline"),
        lambda: stable_audio_3_call(audio=waveform(), init_noise_level=0.6),
        task="audio",
        variant="from noised sound",
    ),
    Case(
        "StableAudio3InpaintPipeline",
        lambda: stable_audio_3("StableAudio3InpaintPipeline"),
        lambda: stable_audio_3_call(audio=waveform(), mask_start_seconds=0.5, mask_end_seconds=1.5),
        task="audio",
    ),
    Case("AceStepPipeline", ace_step, song, task="audio"),
    Case("LongCatAudioDiTPipeline", longcat, lambda: {"prompt": "rain", "audio_duration_s": 1.0}, task="audio"),
]
