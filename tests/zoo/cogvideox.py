"""CogVideoX: text, first frame, control and video to video; ConsisID keeps a face."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.utils import numpy_to_pil

from zoo import Case, image, noise, pipeline

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 4, "text_embed_dim": 16,
        "num_layers": 1, "sample_height": 4, "sample_width": 6, "sample_frames": 9, "max_text_seq_length": 6,
        "out_channels": 4}  # fmt: skip
FACE = {"cross_attn_interval": 1, "is_train_face": True, "cross_attn_dim_head": 4, "cross_attn_num_heads": 2,
        "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1,
        "LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 1}  # fmt: skip


def vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4, scaling_factor=0.7,
    )  # fmt: skip


def scheduler(name: str, snr_shift_scale: float = 1.0) -> Any:
    return getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        snr_shift_scale=snr_shift_scale,
    )  # fmt: skip


def components(scheduler: Any, model: str = "CogVideoXTransformer3DModel", **transformer: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    network = getattr(diffusers, model)(**({"in_channels": 4} | SIZE | transformer))
    return {"scheduler": scheduler, "vae": vae(), "text_encoder": None, "tokenizer": None, "transformer": network}


def build(name: str, scheduler: Any, **transformer: Any) -> Any:
    return pipeline(name, **components(scheduler, **transformer))


def consisid() -> Any:
    # without OpenCV, which only finding a face needs, `diffusers` has a placeholder by the class's name
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    parts = components(
        scheduler("CogVideoXDPMScheduler"), "ConsisIDTransformer3DModel", in_channels=8,
        use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True, **FACE,
    )  # fmt: skip
    parts["transformer"].eval(), parts["vae"].eval()
    pipe = ConsisIDPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(**more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 6, 16), "negative_prompt_embeds": noise(1, 6, 16, seed=1), "height": 16, "width": 24,
        **more,
    }  # fmt: skip


def frames(count: int = 9) -> list[Any]:
    return [numpy_to_pil(image(16, 24, seed=i)[0].permute(1, 2, 0).numpy())[0] for i in range(count)]


def face() -> dict[str, Any]:
    identity = {"id_vit_hidden": [noise(1, 2, 2)], "id_cond": noise(1, 2, seed=1)}
    return call(image=image(16, 24), num_frames=9, use_dynamic_cfg=True, **identity)


CASES = [
    Case(
        "CogVideoXPipeline",
        lambda: build("CogVideoXPipeline", scheduler("CogVideoXDDIMScheduler", 3.0)),
        lambda: call(num_frames=9),
    ),
    Case(
        "CogVideoXFunControlPipeline",
        lambda: build("CogVideoXFunControlPipeline", scheduler("CogVideoXDDIMScheduler"), in_channels=8),
        lambda: call(control_video=frames()),
        task="control",
    ),
    Case(
        "CogVideoXImageToVideoPipeline",
        # CogVideoX 1.5: patches span two latent frames, the loop's first frames are cut off before decoding
        lambda: build(
            "CogVideoXImageToVideoPipeline",
            scheduler("CogVideoXDDIMScheduler"),
            in_channels=8,
            patch_size_t=2,
            use_rotary_positional_embeddings=True,
            ofs_embed_dim=4,
            patch_bias=False,
        ),
        lambda: call(image=image(16, 24), num_frames=9, use_dynamic_cfg=True),
        task="video",
    ),
    Case(
        "CogVideoXVideoToVideoPipeline",
        lambda: build(
            "CogVideoXVideoToVideoPipeline", scheduler("CogVideoXDPMScheduler"), use_rotary_positional_embeddings=True
        ),
        lambda: call(video=frames(), strength=0.7),
        task="image",
    ),
    Case("ConsisIDPipeline", consisid, face, task="video"),
]
