"""Latents → what a pipeline makes of them, as each family does at the end of its own call.

A family is a set of pipelines that decode alike, and a function of a call and its latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .inpainting import crops_to_mask, pasted

Decode = Callable[[Tensor], Tensor]

ONE_AT_A_TIME = ("AutoencoderKLHunyuanVideo15",)
"""Autoencoders that decode one row alone: the attention masks of several do not fit."""

_REMEDY = "pass decode=, a function from latents to images (N, 3, H, W) in [0, 1]"


def check_preview_vae(pipe: Any, vae: Any) -> None:
    """Check that another autoencoder can decode a pipeline's latents.

    Raises:
        ValueError: if it cannot.
    """
    absent = [name for name in ("decode", "config", "dtype", "device") if not hasattr(vae, name)]
    if absent:
        raise ValueError(
            "preview_vae: expected an autoencoder of diffusers, such as AutoencoderTiny, got "
            f"{type(vae).__name__} without {', '.join(absent)}"
        )
    if _family(pipe) not in _BY_ANY_VAE:
        raise ValueError(
            f"preview_vae: do not know how {type(pipe).__name__} decodes by another autoencoder: "
            "leave it out"
        )


@dataclass(frozen=True)
class PipelineCall:
    """A call of a pipeline.

    Args:
        pipe: The pipeline.
        given: Keyword arguments of the call.
        settled: Sizes that the pipeline runs at (`height`, `width`, `num_frames`), filled in while
            it runs.
        preview_vae: An autoencoder that decodes in the place of the pipeline's; None for that.
    """

    pipe: Any
    given: Mapping[str, Any] = field(default_factory=dict)
    settled: Mapping[str, int] = field(default_factory=dict)
    preview_vae: Any = None

    @property
    def vae(self) -> Any:
        """The autoencoder that decodes, if there is one."""
        own = getattr(self.pipe, "vae", None)
        return own if self.preview_vae is None else self.preview_vae

    def asked(self, name: str) -> Any:
        """Return an argument of the call, else its default; None if the pipeline has neither."""
        parameter = inspect.signature(type(self.pipe).__call__).parameters.get(name)
        default = (
            None if parameter is None or parameter.default is parameter.empty else parameter.default
        )
        return default if self.given.get(name) is None else self.given[name]

    def size(self, name: str) -> int:
        """Return the height or width in pixels that the pipeline runs at."""
        asked = self.settled.get(name) or self.asked(name)
        return asked or self.pipe.default_sample_size * self.pipe.vae_scale_factor


Family = Callable[[PipelineCall, Tensor], Tensor]


def decoder(call: PipelineCall) -> Decode:
    """Return the function from latents, as the scheduler sees them, to what the reward sees.

    A reward sees images (N, 3, H, W) or videos (N, frames, 3, H, W) in [0, 1], or waveforms
    (N, channels, samples), float32.

    Args:
        call: A call of a pipeline; its sizes are read when latents are decoded.

    Raises:
        ValueError: if the pipeline belongs to none of the families below.
    """
    family = _family(call.pipe)
    if family is None:
        raise ValueError(
            f"decode: do not know how {type(call.pipe).__name__} turns latents into images: "
            f"{_REMEDY}"
        )

    if call.preview_vae is not None:
        check_preview_vae(call.pipe, call.preview_vae)

    def decode(latents: Tensor) -> Tensor:
        if type(call.vae).__name__ in ONE_AT_A_TIME:
            return torch.cat([family(call, one).float() for one in latents.split(1)])
        images = family(call, latents).float()
        if crops_to_mask(call.given):
            sizes = call.size("width"), call.size("height")
            return pasted(call.pipe, call.given, images, *sizes)
        return images

    return decode


def at_size(decode: Decode, size: int) -> Decode:
    """Return a decoder whose images or videos are averaged down to a longer side, in pixels.

    Raises:
        ValueError: from the decoder, if it decodes to sound.
    """

    def decode_smaller(latents: Tensor) -> Tensor:
        images = decode(latents)
        if images.ndim < 4:
            raise ValueError("preview_size: expected images or videos, got sound: leave it out")
        share = size / max(images.shape[-2:])
        if share >= 1:
            return images
        height, width = (max(1, round(side * share)) for side in images.shape[-2:])
        frames = images.flatten(0, -4)
        return interpolate(frames, (height, width), mode="area").unflatten(0, images.shape[:-3])

    return decode_smaller


def _family(pipe: Any) -> Family | None:
    """Return the family of a pipeline: that of its class, else that of its diffusers package."""
    if type(pipe).__name__ == "WanImageToVideoPipeline" and pipe.config.expand_timesteps:
        return None  # the first frame is not the model's
    for cls in type(pipe).__mro__:
        if cls.__name__ in _UNLIKE_THEIR_PACKAGE:
            return _UNLIKE_THEIR_PACKAGE[cls.__name__]
        package = cls.__module__.removeprefix("diffusers.pipelines.").split(".")[0]
        if package in _PACKAGES:
            return _PACKAGES[package]
    return None


def gives_frames_as_rows(pipe: Any) -> bool:
    """Return whether a pipeline decodes, in `decode_latents`, the frames of all its videos as rows.

    What it calls its autoencoder with are not particles then.
    """
    return _family(pipe) in (_animatediff, _latte, _stable_video)


def mixing_rows(pipe: Any) -> str | None:
    """Return the name of the method by which a pipeline mixes all rows in the end, if it has one.

    Kandinsky 5 shifts the first frame of a video by means over all videos.
    """
    if gives_frames_as_rows(pipe):
        return "decode_latents"
    return "normalize_first_frame" if hasattr(pipe, "normalize_first_frame") else None


# ---- images --------------------------------------------------------------------------------------


def _image(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode one latent per image."""
    return _postprocessed(call, _denormalise_and_decode(call, latents))


def _image_standardised(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode images from latents scaled by mean and standard deviation alone."""
    return _postprocessed(call, _denormalise_and_decode(call, latents, scaling_factor=1.0))


def _image_unshifted(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode images without a shift, as SD3's inpainting does although it encodes with a shift."""
    return _postprocessed(call, _denormalise_and_decode(call, latents, shift_factor=0.0))


def _packed(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode images from tokens, which the pipeline itself unpacks.

    Video autoencoders hold an image as one frame.
    """
    pipe = call.pipe
    known = {name: call.size(name) for name in ("height", "width")}
    known["vae_scale_factor"] = pipe.vae_scale_factor
    known["patch_size"] = pipe.transformer.config.get("patch_size", 1)
    unpack = getattr(pipe, "_unpack_latents_no_patch", pipe._unpack_latents)  # Bria Fibo
    names = list(inspect.signature(unpack).parameters)[1:]
    latents = unpack(latents, *(known[name] for name in names))
    if latents.ndim == 4 and "Wan" in type(call.vae).__name__:
        latents = latents.unsqueeze(2)
    images = _denormalise_and_decode(call, latents)
    return _postprocessed(call, images[:, :, 0] if images.ndim == 5 else images)


def _denormalise_patches_and_decode(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode images from patches of 2 × 2 latents, in tokens or in place.

    The patches were normalised by the batch statistics of the autoencoder.
    """
    pipe = call.pipe
    if latents.ndim == 3:
        patch = 2 * pipe.vae_scale_factor
        latents = latents.transpose(1, 2).unflatten(
            2, (call.size("height") // patch, call.size("width") // patch)
        )
    elif latents.shape[1] == pipe.vae.config.latent_channels:  # Bria Fibo 2
        latents = pipe._patchify_latents(latents)
    stats, epsilon = pipe.vae.bn, pipe.vae.config.batch_norm_eps
    mean, variance = (
        value.view(1, -1, 1, 1).to(latents) for value in (stats.running_mean, stats.running_var)
    )
    latents = pipe._unpatchify_latents(latents * (variance + epsilon).sqrt() + mean)
    return _postprocessed(call, pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0])


def _quantised(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode images by Kandinsky's MoVQ."""
    return _unit(
        call.pipe.movq.decode(latents.to(call.pipe.movq.dtype), force_not_quantize=True)["sample"]
    )


def _pixels(call: PipelineCall, latents: Tensor) -> Tensor:
    """Return the images of a model of pixels, which has no latents."""
    return _postprocessed(call, latents)


def _kandinsky5(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode images or videos from latents (N, frames, h, w, C)."""
    latents = latents.permute(0, 4, 1, 2, 3)
    if getattr(call.pipe, "video_processor", None) is not None:
        return _video(call, latents)
    return _image(call, latents[:, :, 0])


# ---- videos --------------------------------------------------------------------------------------


def _video(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode videos from latents (N, C, frames, h, w)."""
    return _frames(call, _denormalise_and_decode(call, latents))


def _first_frame(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode the images of a video model, its first frames."""
    return _video(call, latents)[:, 0]


def _animatediff(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode videos from latents (N, C, frames, h, w), by a method of the pipeline."""
    return _frames(call, call.pipe.decode_latents(latents.to(call.pipe.vae.dtype)))


def _latte(call: PipelineCall, latents: Tensor) -> Tensor:
    return _frames(
        call, call.pipe.decode_latents(latents.to(call.pipe.vae.dtype), latents.shape[2])
    )


def _stable_video(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode videos from latents (N, frames, C, h, w), in chunks as the call asks."""
    frames = latents.shape[1]
    chunk = call.asked("decode_chunk_size") or frames
    return _frames(call, call.pipe.decode_latents(latents.to(call.pipe.vae.dtype), frames, chunk))


def _allegro(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode videos in whole tiles of the autoencoder, cut to the size of the call."""
    videos = call.pipe.decode_latents(latents.to(call.pipe.vae.dtype))
    return _frames(
        call, videos[:, :, : call.asked("num_frames"), : call.size("height"), : call.size("width")]
    )


def _cogvideox(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode videos from latents (N, frames, C, h, w), without the padding in front.

    The pipeline pads to whole patches where the call asks for a number of frames.
    """
    asked = call.asked("num_frames")
    padding = (
        0
        if asked is None
        else latents.shape[1] - ((asked - 1) // call.pipe.vae_scale_factor_temporal + 1)
    )
    return _frames(call, call.pipe.decode_latents(latents[:, padding:].to(call.pipe.vae.dtype)))


def _vace(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode videos without the reference images, which Wan VACE puts in front."""
    frames = (call.asked("num_frames") - 1) // call.pipe.vae_scale_factor_temporal + 1
    return _video(call, latents[:, :, -frames:])


def _ltx(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode videos from tokens, without the tokens of conditions.

    Tokens of conditions come first in LTX-Condition and last in LTX-2.
    """
    pipe, vae = call.pipe, call.pipe.vae
    frames = (call.asked("num_frames") - 1) // pipe.vae_temporal_compression_ratio + 1
    height, width = (
        call.size(name) // pipe.vae_spatial_compression_ratio for name in ("height", "width")
    )
    patch, patch_t = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    number = (frames // patch_t) * (height // patch) * (width // patch)
    latents = latents[:, :number] if "LTX2" in type(pipe).__name__ else latents[:, -number:]
    latents = pipe._unpack_latents(latents, frames, height, width, patch, patch_t)
    latents = pipe._denormalize_latents(
        latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )
    timestep = None
    if vae.config.timestep_conditioning:  # without the noise that a `decode_noise_scale` adds
        timestep = torch.full((len(latents),), float(call.asked("decode_timestep"))).to(
            latents.device, vae.dtype
        )
    return _frames(call, vae.decode(latents.to(vae.dtype), timestep, return_dict=False)[0])


def _frames(call: PipelineCall, videos: Tensor) -> Tensor:
    """Map (N, 3, frames, H, W) in [-1, 1] to (N, frames, 3, H, W) in [0, 1]."""
    return call.pipe.video_processor.postprocess_video(videos, output_type="pt")


# ---- sound ---------------------------------------------------------------------------------------


def _audioldm2(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode latents to mel spectrograms, and these to waveforms."""
    waveforms = call.pipe.mel_spectrogram_to_waveform(_denormalise_and_decode(call, latents))
    seconds = call.given.get("audio_length_in_s")
    length = None if seconds is None else int(seconds * call.pipe.vocoder.config.sampling_rate)
    return waveforms[:, None, :length]


def _waveform(call: PipelineCall, latents: Tensor) -> Tensor:
    """Decode waveforms from latents (N, C, length) or (N, length, C), cut as the call says."""
    if "LongCat" in type(call.pipe).__name__:
        latents = latents.transpose(1, 2)
    waveforms = call.pipe.vae.decode(latents.to(call.pipe.vae.dtype)).sample
    rate = getattr(call.pipe.vae.config, "sampling_rate", 0)
    start, end = (call.given.get(name) for name in ("audio_start_in_s", "audio_end_in_s"))
    return waveforms[:, :, int((start or 0) * rate) : None if end is None else int(end * rate)]


# ---- shared steps --------------------------------------------------------------------------------


def _denormalise_and_decode(call: PipelineCall, latents: Tensor, **override: Any) -> Tensor:
    """Undo the scaling to unit variance and run the autoencoder.

    Args:
        override: Config values to use in place of the autoencoder's.
    """
    vae = call.vae
    if call.preview_vae is not None:
        latents = latents.to(_device_of(vae))
        _check_channels(call, latents)
    with upcast_where_it_overflows(vae):
        latents = _denormalised(latents.to(vae.dtype), {**vae.config, **override})
        if latents.ndim == 5 and type(vae).__name__ in _OF_IMAGES:
            frames = vae.decode(latents.transpose(1, 2).flatten(0, 1), return_dict=False)[0]
            return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)
        return vae.decode(latents, return_dict=False)[0]


_OF_IMAGES = ("AutoencoderTiny", "AutoencoderKL")  # which may see videos frame by frame


def _device_of(vae: Any) -> torch.device:
    """Return where an autoencoder computes, which accelerate's hooks know if it is offloaded."""
    hooks = (getattr(one, "_hf_hook", None) for one in getattr(vae, "modules", list)())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    known = next((device for device in devices if device is not None), None)
    return torch.device(vae.device if known is None else known)


def _check_channels(call: PipelineCall, latents: Tensor) -> None:
    """Check that another autoencoder is one of the pipeline's latents."""
    config = call.vae.config
    channels = config.get("latent_channels") or config.get("z_dim")
    if channels not in (None, latents.shape[1]):
        raise ValueError(
            f"preview_vae: expected a decoder of latents of {latents.shape[1]} channels, as "
            f"{type(call.pipe).__name__} has them, got one of {channels}: take the one that was "
            "made for its latents"
        )


@contextmanager
def upcast_where_it_overflows(vae: Any) -> Iterator[None]:
    """Hold an autoencoder that overflows in half precision (SDXL) in float32, within a block."""
    dtype = getattr(vae, "dtype", None)
    if dtype != torch.float16 or not vae.config.get("force_upcast", False):
        yield
        return
    try:
        vae.to(torch.float32)
        yield
    finally:
        vae.to(dtype)


def _denormalised(latents: Tensor, config: Mapping[str, Any]) -> Tensor:
    mean, std = (config.get(f"latents_{name}") for name in ("mean", "std"))
    if mean is not None and std is not None:
        view = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (torch.tensor(value).flatten().view(view).to(latents) for value in (mean, std))
        return latents * std / config.get("scaling_factor", 1.0) + mean
    return latents / config.get("scaling_factor", 1.0) + (config.get("shift_factor") or 0.0)


def _postprocessed(call: PipelineCall, images: Tensor) -> Tensor:
    """Map images from [-1, 1] to [0, 1].

    Where the pipeline ran at a size of its own, the images are cut to the size asked for.
    """
    processor = getattr(call.pipe, "image_processor", None)
    height, width = (call.given.get(name) for name in ("height", "width"))
    if call.asked("use_resolution_binning") and height and width:
        images = processor.resize_and_crop_tensor(images, width, height)  # type: ignore[union-attr]
    return _unit(images) if processor is None else processor.postprocess(images, output_type="pt")


def _unit(images: Tensor) -> Tensor:
    return (images / 2 + 0.5).clamp(0, 1)


_FAMILIES: dict[Family, str] = {  # packages of diffusers.pipelines
    _image: "stable_diffusion stable_diffusion_xl stable_diffusion_3 controlnet controlnet_xs "
    "controlnet_sd3 controlnet_hunyuandit pag t2i_adapter kolors aura_flow pixart_alpha sana "
    "lumina lumina2 hunyuandit hidream_image dit omnigen cogview3 cogview4 z_image prx "
    "hunyuan_image dreamlite latent_consistency_models",
    _image_standardised: "glm_image",
    _packed: "flux chroma ovis_image longcat_image bria bria_fibo krea2 qwenimage nucleusmoe_image",
    _denormalise_patches_and_decode: "flux2 ernie_image bria_fibo2",
    _quantised: "kandinsky kandinsky2_2 kandinsky3",
    _pixels: "ddpm ddim deepfloyd_if",
    _kandinsky5: "kandinsky5",
    _video: "wan skyreels_v2 chronoedit lucy hunyuan_video hunyuan_video1_5 mochi motif_video "
    "sana_video easyanimate cosmos helios",
    _animatediff: "animatediff",
    _latte: "latte",
    _stable_video: "stable_video_diffusion",
    _allegro: "allegro",
    _cogvideox: "cogvideo consisid",
    _ltx: "ltx ltx2",
    _audioldm2: "audioldm2",
    _waveform: "stable_audio stable_audio_3 longcat_audio_dit",
}
_PACKAGES = {
    package: family for family, packages in _FAMILIES.items() for package in packages.split()
}
_BY_ANY_VAE = (
    _image,
    _image_standardised,
    _image_unshifted,
    _packed,
    _kandinsky5,
    _video,
    _first_frame,
    _vace,
)
# None where `step` sees more than the sample
_UNLIKE_THEIR_PACKAGE: dict[str, Family | None] = {
    "AnimateDiffPAGPipeline": _animatediff,
    "Cosmos2TextToImagePipeline": _first_frame,
    "Cosmos3OmniPipeline": None,
    "HunyuanImageRefinerPipeline": None,
    "HunyuanVideoImageToVideoPipeline": None,
    "Kandinsky5I2VPipeline": None,
    "KandinskyPriorPipeline": None,
    "KandinskyV22PriorEmb2EmbPipeline": None,
    "KandinskyV22PriorPipeline": None,
    "LTX2HDRPipeline": None,
    "LTX2ImageToVideoPipeline": None,
    "LTXConditionPipeline": None,
    "LTXImageToVideoPipeline": None,
    "PRXPixelPipeline": _pixels,
    "QwenImageLayeredPipeline": None,
    "SanaImageToVideoPipeline": None,
    "StableDiffusion3InpaintPipeline": _image_unshifted,
    "WanAnimatePipeline": None,
    "WanVACEPipeline": _vace,
}
