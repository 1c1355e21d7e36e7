"""Where the rows of a network's batch are in its arguments and outputs, as its forward declares.

A table by the name of the argument, and by class of network where a name means different things.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch


class Layout:
    """Where the rows are in a value."""


@dataclass(frozen=True)
class Along(Layout):
    """The rows are along an axis of each tensor, in whatever lists and dictionaries these are.

    A list takes the place of the axes before the last one of them.

    Args:
        axis: The axis.
        several: Whether a row has several entries, one after the other, such as its frames.
    """

    axis: int = 0
    several: bool = False


@dataclass(frozen=True)
class OneEach(Layout):
    """A list has an entry for each row; a tensor has its rows first.

    Args:
        or_for_all: Whether a list of another length is for all rows, which are alike then.
    """

    or_for_all: bool = False


@dataclass(frozen=True)
class Named(Layout):
    """A dictionary whose entries are declared by their names, as arguments are."""


@dataclass(frozen=True)
class Shared(Layout):
    """All rows share it."""


@dataclass(frozen=True)
class Refused(Layout):
    """It cannot be given to some rows at a time.

    Args:
        reason: Why.
    """

    reason: str


ROWS = Along()
FRAMES = Along(several=True)
_STATE = Refused("it holds what one call of the network leaves to the next")

_LAYOUTS: dict[Layout, str] = {
    ROWS: """
        added_time_ids additional_t_cond aspect_ratio attention_mask audio_attention_mask
        audio_coords audio_encoder_attention_mask audio_encoder_hidden_states audio_hidden_states
        audio_sigma audio_timestep block_controlnet_hidden_states boxes c class_labels clip
        clip_img clip_text clip_text_pooled condition_mask conditioning_mask context_latents
        control_hidden_states control_latents control_type controlnet_block_samples
        controlnet_cond controlnet_mode controlnet_single_block_samples controls_latents
        crop_coords crp down_block_additional_residuals down_intrablock_additional_residuals
        effnet encoder_attention_mask encoder_attention_mask_1 encoder_attention_mask_2
        encoder_hidden_states encoder_hidden_states_1 encoder_hidden_states_2
        encoder_hidden_states_image encoder_hidden_states_mask encoder_hidden_states_t5
        encoder_mask face_pixel_values fps gligen global_hidden_states guidance hidden_states
        hidden_states_masks hint id_cond id_vit_hidden image_cond_hidden_states image_embeddings
        image_embeds image_latents image_meta_size img_mask indicator inpaint_latents input_ids
        ip_adapter_image_embeds ip_hidden_states latent_cond latents latents_clean
        latents_history_2x latents_history_4x latents_history_long latents_history_mid
        latents_history_short local_add_cond micro_conds mid_block_additional_residual ofs
        original_size padding_mask perturbation_mask pixels pooled_embeds pooled_projections
        pooled_text_emb pose_hidden_states position_ids prior_token_drop prior_token_id
        proj_embedding r r_timestep resolution sample sca segment_ids sigma style t target_size
        target_timestep text_bth text_embedding_mask text_embedding_mask_t5 text_embeds
        text_encoder_layers text_lens time_ids timestep timestep_cond timestep_r timestep_ratio
        timesteps video_coords video_keyframes_mask video_self_attention_mask
        visual_token_type_ids
    """,
    OneEach(): "cap_feats control_context image_noise_mask img_sizes siglip_feats x",
    OneEach(or_for_all=True): "img_shapes",
    Named(): "added_cond_kwargs attention_kwargs cross_attention_kwargs joint_attention_kwargs",
    Shared(): """
        apply_control audio_num_frames base_sequence_length conditioning_scale
        control_hidden_states_scale control_type_idx controlnet_blocks_repeat
        enable_diffusion_forcing enable_temporal_attentions f_patch_size frame_rate from_multi
        guess_mode height image_cond_ids image_rotary_emb img_ids indices_hidden_states
        indices_latents indices_latents_clean indices_latents_history_2x
        indices_latents_history_4x indices_latents_history_long indices_latents_history_mid
        indices_latents_history_short ip_adapter_masks isolate_modalities motion_encode_batch_size
        num_frames num_ref_tokens patch_size ref_fixed_timestep return_dict
        rope_interpolation_scale rotary_embedding scale scale_factor skip_layers sparse_params
        spatio_temporal_guidance_blocks text_rope_pos txt_ids txt_seq_lens use_cross_timestep
        visual_rope_pos width
    """,
    _STATE: "kv_cache kv_cache_flag kv_cache_mode kv_caches past_key_values",
    Refused("it tells rows by their number"): "input_image_sizes input_img_latents",
}
_BY_NAME = {name: layout for layout, names in _LAYOUTS.items() for name in names.split()}

_RESIDUALS_OF_FRAMES: dict[str, Layout] = {
    "down_block_additional_residuals": FRAMES,
    "mid_block_additional_residual": FRAMES,
}
_BY_CLASS: dict[str, dict[str, Layout]] = {  # where they differ from the above
    "HiDreamImageTransformer2DModel": {
        "encoder_hidden_states_llama3": Along(1),  # layers come first
        "img_ids": ROWS,
    },
    "Krea2Transformer2DModel": {"position_ids": Shared()},
    "SparseControlNetModel": {"encoder_hidden_states": FRAMES},
    "UNet3DConditionModel": _RESIDUALS_OF_FRAMES,
    "UNetMotionModel": {"encoder_hidden_states": FRAMES, **_RESIDUALS_OF_FRAMES},
}
_OUTPUTS: dict[str, Layout] = {  # elsewhere rows come first
    "SparseControlNetModel": FRAMES,
    "ZImageTransformer2DModel": OneEach(),
}

_OF_DECODERS: dict[str, Layout] = {
    **dict.fromkeys(("z", "h", "x", "latents", "temb", "image", "mask"), ROWS),
    "generator": OneEach(),
    "shape": Shared(),
}


@dataclass(frozen=True)
class Declared:
    """What a network or a decoder declares.

    Args:
        field: What it is a batch of: that field of `MicroBatches`, or the option "widths".
        name: Of its class.
        positions: Names of the positional arguments.
        arguments: Layouts of arguments that have others than their names say.
        output: Layout of what it returns.
    """

    field: str
    name: str
    positions: tuple[str, ...]
    arguments: Mapping[str, Layout]
    output: Layout

    def layout(self, argument: str) -> Layout | None:
        """Return the layout of an argument; None if it is not known."""
        if (own := self.arguments.get(argument)) is not None:
            return own
        return _STATE if str(argument).endswith("cache") else _BY_NAME.get(argument)

    def named(self, args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
        """Return positional arguments by name."""
        for index, value in enumerate(args):
            known = index < len(self.positions)
            yield self.positions[index] if known else f"positional argument {index}", value


def declared_by_network(network: torch.nn.Module) -> Declared:
    """Return what a network's forward declares, whatever it was wrapped in."""
    network = _unwrapped(network)
    classes = [cls.__name__ for cls in type(network).__mro__]
    return Declared(
        "network",
        type(network).__name__,
        tuple(_positions(type(network))),
        next((_BY_CLASS[name] for name in classes if name in _BY_CLASS), {}),
        next((_OUTPUTS[name] for name in classes if name in _OUTPUTS), ROWS),
    )


def _positions(cls: type[torch.nn.Module]) -> Iterator[str]:
    """Return the names of the positional arguments of a forward, as far as it has names."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())
    except (AttributeError, TypeError, ValueError):  # of a script module
        return
    for parameter in parameters[1:]:
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            yield parameter.name


def declared_by_decoder(module: torch.nn.Module) -> Declared:
    """Return what an autoencoder's `decode` declares.

    diffusers' decorator hides the signature; of the positional arguments that can follow the
    latents only one is a tensor, the timestep (LTX).
    """
    name = f"{type(module).__name__}.decode"
    return Declared("decode", name, ("z", "temb"), _OF_DECODERS, ROWS)


def state_kept(pipe: Any, given: Mapping[str, Any]) -> str | None:
    """Return what the networks of a pipeline would leave from call to call, with a remedy; or None.

    Args:
        pipe: The pipeline.
        given: The keyword arguments of its call.
    """
    for name in (cls.__name__ for cls in type(pipe).__mro__):
        if name in _STORE_ATTENTION:
            return f"the attention of all rows for the guidance of {name}"
        if name in _CACHE_REFERENCES and given.get("image") is not None:
            return "keys and values of the reference image"
        caching = name == "QwenImage21Pipeline" and given.get("use_kv_cache", True)
        if caching and pipe.transformer.config.causal_condition:
            return "keys and values of the prompt unless use_kv_cache=False"
    return None


_CACHE_REFERENCES = ("Flux2KleinKVPipeline", "GlmImagePipeline")
_STORE_ATTENTION = (
    "LEditsPPPipelineStableDiffusion",
    "LEditsPPPipelineStableDiffusionXL",
    "StableDiffusionAttendAndExcitePipeline",
    "StableDiffusionSAGPipeline",
)


def _unwrapped(network: Any) -> Any:
    """Return the network inside what PEFT, `torch.compile` or data parallelism wrap it in."""
    while True:
        if hasattr(network, "get_base_model"):
            inside = network.get_base_model()
        elif type(network).__name__ in _WRAPPERS:
            inside = network.module
        else:
            inside = vars(network).get("_modules", {}).get("_orig_mod", network)
        if inside is network:
            return network
        network = inside


_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
