"""CLAP: the similarity of a sound and its prompt.

CLAP is to sound what CLIP is to images. It hears ten seconds at a time, as a mel spectrogram in
decibels. All functions are differentiable in the sound.
"""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, cosine_similarity, pad

from .images import Images
from .model import ModelReward, with_words

_CONTEXT = 77  # tokens of a text in CLAP's training and in LAION's own code
_LOUDEST = 1000.0  # beyond any decoder's overshoot, and below sound of 16 bits


class CLAPScore(ModelReward):
    """cos(sound, text) of any `transformers.ClapModel`.

    Scores are −1 to 1. Means over AudioCaps are about 0.42 for AudioLDM 2 and 0.29 for Stable Audio
    Open (Hung et al., arXiv:2412.21037, table 1). `reward_scale` is 100, a guess: the scores for
    one prompt are taken to scatter by 0.025. Prompts are cut at 77 tokens, with one warning.

    It is called with waveforms (N, channels, samples) or (N, samples), floats of about −1 to 1, and
    a prompt for each. Channels are averaged, and the sound is resampled to the model's rate, 48
    kHz. What is shorter than the model's ten seconds is repeated as long as it fits in whole, then
    followed by silence. Of what is longer, windows of ten seconds are scored, as few as leave no
    gap, evenly spaced from the beginning to the end; the score is the mean over the windows.
    Nothing is drawn at random, unlike in transformers' own processor, which crops a longer sound
    anywhere, and gives a model with feature fusion one short sound of a batch for a long one.
    Loudness is left as it is, and counts.

    Args:
        model: Name or folder; laion/clap-htsat-fused by default, which is the nearest in
            transformers to the checkpoint of published CLAP scores (630k-audioset-fusion-best).
        sampling_rate: Samples per second of the sounds to be scored: 16000 of AudioLDM 2, 44100 of
            Stable Audio.
        device: Device of the model; None for the accelerator, if there is one.
        dtype: Floating point type of the model.

    Raises:
        ValueError: if `sampling_rate` is no positive integer; at a call, if waveforms are not as
            above, or there is not one prompt for each.

    Reference:
        Wu et al., arXiv:2211.06687.
    """

    reward_scale = 100.0
    scored = "sound"
    default = "laion/clap-htsat-fused"
    files = (
        "config.json, model.safetensors, "
        "and of its processor preprocessor_config.json and tokenizer.json"
    )
    offline = "CLAPScore.from_pretrained('/model', sampling_rate=16000)"

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        sampling_rate: int,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, device=device, dtype=dtype)
        if not isinstance(sampling_rate, int) or sampling_rate < 1:
            raise ValueError(
                "sampling_rate: expected the samples per second of the sounds, an integer, got "
                f"{sampling_rate!r}: name the rate of the pipeline, as 16000 or 44100"
            )
        self.sampling_rate = sampling_rate
        self.extractor: Any = None
        self.tokenizer: Any = None

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, sampling_rate={self.sampling_rate})"

    def _taken(self, images: Images | Tensor) -> list[Tensor]:
        return [_sounds(images)]

    def _read(self) -> dict[str, nn.Module]:
        from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

        self.extractor = ClapFeatureExtractor.from_pretrained(self.name)
        self.tokenizer = with_words(AutoTokenizer.from_pretrained(self.name), self.name)
        clap: Any = ClapModel.from_pretrained(self.name)
        return {"clap": clap.to(self.dtype)}

    def _scores(self, images: Tensor, texts: list[str]) -> Tensor:
        """Return the scores of sounds (n, channels, samples), shape (n,)."""
        sound = resampled(images.mean(1), self.sampling_rate, self.extractor.sampling_rate)
        pieces = windows(sound, self.extractor.nb_max_samples, self.extractor.padding)
        heard = torch.cat([self._heard(one) for one in pieces.flatten(0, 1).split(self.batch_size)])
        unique = list(dict.fromkeys(texts))
        rows = torch.tensor([unique.index(text) for text in texts], device=self.device)
        read = self._text(unique)[rows]
        heard = heard.unflatten(0, pieces.shape[:2])
        return cosine_similarity(heard, read[:, None], dim=-1).mean(1)

    def _heard(self, pieces: Tensor) -> Tensor:
        """Return the embeddings of pieces of sound (n, samples) of the model's length, `exact`."""
        clap = self._network("clap")
        features = decibels(pieces, self.extractor).to(self.dtype)
        if clap.config.audio_config.enable_fusion:
            features = features.expand(-1, 4, -1, -1)  # of a short sound all four are the same
        longer = torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)
        heard = clap.audio_model(input_features=features, is_longer=longer).pooler_output
        return clap.audio_projection(heard).to(self.exact)

    def _text(self, texts: list[str]) -> Tensor:
        """Return the embeddings of texts, `exact`."""
        clap = self._network("clap")
        config = clap.config.text_config  # RoBERTa counts positions from behind that of padding
        limit = min(_CONTEXT, config.max_position_embeddings - config.pad_token_id - 1)
        read = clap.text_model(**self._tokens(self.tokenizer, texts, limit)).pooler_output
        return clap.text_projection(read).to(self.exact)


def _sounds(images: Images | Tensor) -> Tensor:
    """Return sounds as a tensor (N, channels, samples).

    Raises:
        ValueError: if they are no float tensor of 2 or 3 dimensions, have no samples or more
            channels than samples, or hold NaN or values far from [−1, 1].
    """
    if not isinstance(images, Tensor) or images.ndim not in (2, 3):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images: expected waveforms (N, channels, samples), got {shape}: CLAPScore scores "
            "sound and no images; one sound is a batch of one, waveform[None]"
        )
    sounds = images if images.ndim == 3 else images[:, None]
    shape = tuple(images.shape)
    if 0 in shape:
        raise ValueError(f"images: expected at least one waveform and sample, got shape {shape}")
    if sounds.shape[1] > sounds.shape[2]:
        raise ValueError(
            f"images: expected waveforms (N, channels, samples), got {shape}: put the channels "
            "second, before the samples: waveforms.movedim(-1, 1)"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"images: expected waveforms of floats, about -1 to 1, got {images.dtype}: divide "
            "integers of 16 bits by 32768"
        )
    low, high = images.detach().aminmax()
    if not (low >= -_LOUDEST and high <= _LOUDEST):  # false of NaN, too
        raise ValueError(
            f"images: expected waveforms of about -1 to 1, got {float(low):.4g} to "
            f"{float(high):.4g}: divide sound of 16 bits by 32768; NaN most often comes from a "
            "decoder in half precision"
        )
    return sounds


def resampled(sound: Tensor, rate: int, new_rate: int) -> Tensor:
    """Return sound at another rate, by a sinc filter of ten zeros on either side.

    The filter has a Kaiser window of β = 5, as in `scipy.signal.resample_poly`: with u new samples
    for every d samples, y_m = Σ_k x_k h(m d − k u).

    Args:
        sound: Shape (N, samples).
        rate: Samples per second.
        new_rate: Samples per second of what is returned.

    Returns:
        Shape (N, ⌈samples · u / d⌉).
    """
    if rate == new_rate:
        return sound
    up, down = new_rate // gcd(rate, new_rate), rate // gcd(rate, new_rate)
    widest = max(up, down)
    reach = 10 * widest  # of the filter, in steps of 1 / (u · rate)
    # u new samples at a time are one stride of a convolution of d samples: row p, column j of its
    # kernel weighs sample j before or behind the first of the stride in new sample p
    first, last = -(reach // up), ((up - 1) * down + reach) // up
    phase = down * torch.arange(up, dtype=torch.float64, device="cpu")[:, None]
    distance = phase - up * torch.arange(first, last + 1, dtype=torch.float64, device="cpu")
    kaiser = torch.special.i0(5 * (1 - (distance / reach).square()).clamp(min=0).sqrt())
    kernel = torch.sinc(distance / widest) * kaiser * (distance.abs() <= reach)
    kernel = kernel * (up / kernel.sum())
    samples, length = sound.shape[-1], -(-sound.shape[-1] * up // down)
    strides = -(-length // up)
    behind = max(0, (strides - 1) * down + last + 1 - samples)
    kernel = kernel.to(sound.dtype).to(sound.device)[:, None]
    new = conv1d(pad(sound, (-first, behind))[:, None], kernel, stride=down)
    return new.mT.flatten(1)[:, :length]


def windows(sound: Tensor, length: int, padding: str = "repeatpad") -> Tensor:
    """Return the pieces of sounds that a model of one length hears.

    Args:
        sound: Shape (N, samples).
        length: Samples of a piece.
        padding: How shorter sounds are filled up: "repeatpad" with whole repeats, then silence;
            "repeat" with repeats, "pad" with silence.

    Returns:
        Shape (N, pieces, length), one piece if the sound is not longer than that.
    """
    samples = sound.shape[-1]
    if samples > length:
        number = -(-samples // length)
        starts = [i * (samples - length) // (number - 1) for i in range(number)]
        return torch.stack([sound[:, start : start + length] for start in starts], 1)
    repeats = {"repeatpad": length // samples, "repeat": -(-length // samples)}.get(padding, 1)
    filled = sound.repeat(1, repeats)[:, :length]
    return pad(filled, (0, length - filled.shape[-1]))[:, None]


def decibels(pieces: Tensor, extractor: Any) -> Tensor:
    """Return 10 log10 of the mel spectrogram of pieces of sound, at least −100.

    Args:
        pieces: Shape (n, samples).
        extractor: A `transformers.ClapFeatureExtractor`, of which size and hop of the window and
            the mel filters are taken.

    Returns:
        Shape (n, 1, 1 + samples // hop, mels).
    """
    size = extractor.fft_window_size
    fused = extractor.truncation == "fusion"
    filters = torch.as_tensor(
        extractor.mel_filters if fused else extractor.mel_filters_slaney, device="cpu"
    )
    spectrum = torch.stft(
        pieces,
        size,
        extractor.hop_length,
        window=torch.hann_window(size, dtype=pieces.dtype, device=pieces.device),
        return_complex=True,
    )
    power = spectrum.real.square() + spectrum.imag.square()
    mels = filters.to(pieces.dtype).to(pieces.device).mT @ power
    return 10 * mels.clamp(min=1e-10).log10().mT[:, None]
