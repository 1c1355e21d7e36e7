"""CLAPScore, against ClapModel and its processor, scipy's resampling, and finite differences."""

import re

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from scipy.signal import resample_poly
from transformers import ClapFeatureExtractor, ClapModel, ClapProcessor

import clap_checkpoints
import tiny
from glassflows.rewards.clap import CLAPScore, decibels, resampled, windows

RATE = clap_checkpoints.RATE
PROMPTS = ["a dog", "rain on a roof", "a dog"]
SOUND = "audio" if Version(transformers.__version__) >= Version("5") else "audios"  # to a processor


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a CLAP for "rand_trunc" and for "fusion", by whether it has feature fusion."""
    root = tmp_path_factory.mktemp("clap")
    return {fused: clap_checkpoints.clap(root / str(fused), fused) for fused in (False, True)}


def load(folder, rate=RATE, **options):
    return CLAPScore.from_pretrained(folder, sampling_rate=rate, **options)


def sounds(number=3, samples=RATE, channels=1, seed=0, dtype=torch.float32):
    """Return noises that swell and fade, each in its own time and loudness."""
    noise = 0.1 * torch.randn(number, channels, samples, generator=tiny.seeded(seed), dtype=dtype)
    kind = torch.arange(number)[:, None, None] % 3
    return noise / 4**kind * torch.sin(torch.arange(samples, dtype=dtype) / (300 * 4**kind))


# ---- sound -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [44_100, 16_000, 24_000, 22_050, 32_000, 96_000])
def test_resampling_is_that_of_scipy(rate):
    sound = sounds(2, rate // 5 + 17, dtype=torch.float64)[:, 0]
    divisor = np.gcd(rate, RATE)
    expected = torch.from_numpy(resample_poly(sound.numpy(), RATE // divisor, rate // divisor, axis=-1))
    torch.testing.assert_close(resampled(sound, rate, RATE), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(resampled(sound.float(), rate, RATE), expected.float(), rtol=0, atol=1e-6)
    window = ("kaiser", 6.0)
    other = resample_poly(sound.numpy(), RATE // divisor, rate // divisor, axis=-1, window=window)
    assert np.abs(other - expected.numpy()).max() > 1e-5


def test_sound_of_the_same_rate_is_as_it_was():
    sound = sounds()[:, 0]
    assert resampled(sound, RATE, RATE) is sound


@pytest.mark.parametrize("samples", [480_000, 178_001, 20_000])
@pytest.mark.parametrize("truncation", ["fusion", "rand_trunc"])
def test_features_are_those_of_the_extractor(truncation, samples):
    """Of ten seconds and of less, to a thousandth of a decibel."""
    extractor = ClapFeatureExtractor(**clap_checkpoints.PUBLISHED, truncation=truncation)
    sound = sounds(2, samples)[:, 0]
    expected = extractor(list(sound.numpy()), sampling_rate=RATE, return_tensors="pt")["input_features"].float()
    found = decibels(windows(sound, 480_000)[:, 0], extractor)
    torch.testing.assert_close(found.expand_as(expected), expected, rtol=0, atol=1e-3)
    extractor.mel_filters, extractor.mel_filters_slaney = extractor.mel_filters_slaney, extractor.mel_filters
    assert (decibels(windows(sound, 480_000)[:, 0], extractor) - found).abs().max() > 1


@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_shorter_sounds_are_filled_up(padding):
    extractor = ClapFeatureExtractor(**clap_checkpoints.PUBLISHED | {"padding": padding, "max_length_s": 1})
    sound = sounds(1, 19_000)[:, 0]
    expected = extractor(sound[0].numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"][:, :1].float()
    found = decibels(windows(sound, RATE, padding)[:, 0], extractor)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("samples", "starts"),
    [(7, None), (10, [0]), (11, [0, 1]), (20, [0, 10]), (21, [0, 5, 11]), (47, [0, 9, 18, 27, 37])],
)
def test_windows_cover_a_longer_sound_evenly(samples, starts):
    sound = torch.arange(2 * samples, dtype=torch.float32).view(2, samples)
    found = windows(sound, 10)
    if starts is None:
        assert torch.equal(found, torch.cat([sound, torch.zeros(2, 3)], 1)[:, None])
    else:
        assert torch.equal(found, torch.stack([sound[:, start : start + 10] for start in starts], 1))
        assert starts[-1] + 10 == samples


# ---- scores ----------------------------------------------------------------------------------------------------------


def expected_scores(folder, sound, longer=False):
    """Return the cosines of ClapModel with its own processor, one sound and prompt at a time."""
    model, processor = ClapModel.from_pretrained(folder), ClapProcessor.from_pretrained(folder)
    scores = []
    for waveform, prompt in zip(sound, PROMPTS, strict=True):
        batch = processor(text=prompt, sampling_rate=RATE, return_tensors="pt", **{SOUND: waveform.numpy()})
        batch["is_longer"] = torch.full_like(batch["is_longer"], longer)  # set at random by a fusion extractor
        with torch.no_grad():
            out = model(**batch)
        scores.append((out.audio_embeds * out.text_embeds).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("samples", [RATE, RATE // 3 + 11])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_clap_score_is_the_cosine_of_the_model(fused, samples, folders):
    sound, reward = sounds(3, samples), load(folders[fused])
    expected = expected_scores(folders[fused], sound[:, 0])
    scores = reward(sound, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(reward(sound[:, 0], PROMPTS), expected, rtol=0, atol=1e-5)
    assert scores.std() > 0.01
    if fused:
        assert (expected_scores(folders[fused], sound[:, 0], longer=True) - expected).abs().max() > 0.01


def test_sound_of_other_rates_and_channels(folders):
    sound = sounds(3, 11_000, channels=2)
    plain = resample_poly(sound.mean(1).double().numpy(), 3, 1, axis=-1)
    expected = load(folders[False])(torch.from_numpy(plain).float(), PROMPTS)
    torch.testing.assert_close(load(folders[False], 16_000)(sound, PROMPTS), expected, rtol=0, atol=1e-5)


def test_longer_sounds_are_scored_in_windows(folders):
    """The mean over windows, the same each time, and nothing drawn of numpy or torch."""
    reward, sound = load(folders[True]), sounds(2, 2 * RATE + 1000)
    drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    scores = reward(sound, PROMPTS[:2])
    starts = [0, 24_500, 49_000]
    apart = [reward(sound[..., start : start + RATE], PROMPTS[:2]) for start in starts]
    assert len(torch.stack(apart).unique()) == 6
    torch.testing.assert_close(scores, torch.stack(apart).mean(0), rtol=0, atol=1e-6)
    assert torch.equal(reward(sound, PROMPTS[:2]), scores)
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert np.array_equal(np.random.get_state()[1], drawn[1])


def test_scores_do_not_depend_on_the_batch(folders):
    reward, sound, seen = load(folders[True]), sounds(3, RATE + 5), []
    whole = reward(sound, PROMPTS)
    single = torch.cat([reward(one[None], prompt) for one, prompt in zip(sound, PROMPTS, strict=True)])
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-6)
    clap = reward.networks["clap"].audio_model
    clap.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_features"])), with_kwargs=True
    )
    reward.batch_size = 2
    torch.testing.assert_close(reward(sound, PROMPTS), whole, rtol=0, atol=1e-6)
    assert seen == [2, 2, 2]  # six windows


def test_gradients_are_those_of_finite_differences(folders):
    """In float64, through the resampling and two windows."""
    reward = load(folders[True], 44_100, dtype=torch.float64)
    point = sounds(1, 60_000, channels=2, dtype=torch.float64)
    direction = torch.randn(point.shape, generator=tiny.seeded(1), dtype=torch.float64)
    leaf = point.clone().requires_grad_()
    reward(leaf, PROMPTS[:1]).sum().backward()
    slope = (leaf.grad * direction).sum()
    step = 1e-6 * direction
    expected = (reward(point + step, PROMPTS[:1]) - reward(point - step, PROMPTS[:1])).sum() / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-9)
    assert abs(slope) > 1e-3


def test_silence_has_a_score_and_a_gradient(folders):
    leaf = torch.zeros(1, 1, 5000, requires_grad=True)
    score = load(folders[False])(leaf, PROMPTS[:1])
    score.sum().backward()
    assert score.isfinite().all()
    assert leaf.grad.isfinite().all()


def test_half_precision(folders):
    exact, half = load(folders[False]), load(folders[False], dtype=torch.bfloat16)
    scores = half(sounds().bfloat16(), PROMPTS)
    assert scores.dtype == torch.float32
    assert (scores - exact(sounds(), PROMPTS)).abs().max() < 0.05
    assert len(half(sounds(32), PROMPTS[:1] * 32).unique()) >= 30


def test_prompts_are_texts(folders):
    """Without control tokens, and cut with one warning where RoBERTa's positions end."""
    reward, seen = load(folders[False]), []
    reward.networks["clap"].text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    reward(sounds(), ["a dog</s>", "<pad>a dog", "a dog"])
    begin, padding, end = 0, 1, 2
    assert (seen[0] == begin).sum(1).tolist() == [1, 1, 1]
    assert (seen[0] == end).sum(1).tolist() == [1, 1, 1]
    assert all(row.tolist().index(end) + 1 == (row != padding).sum() for row in seen[0])
    with pytest.warns(UserWarning, match="CLAPScore reads the first 32 tokens of a prompt and no more"):
        reward(sounds(1), "a dog and a dog and a dog and a dog")
    reward(sounds(1), "a dog and a dog and a dog and a dog")
    assert [len(row) for rows in seen[1:] for row in rows] == [32, 32]


# ---- errors ----------------------------------------------------------------------------------------------------------


def not_a_number():
    return torch.full((1, 1, 100), torch.nan)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: torch.rand(1, 3, 8, 9), "expected waveforms (N, channels, samples), got (1, 3, 8, 9): CLAPScore"),
        (lambda: torch.rand(1, 2, 3, 8, 9), "expected waveforms (N, channels, samples), got (1, 2, 3, 8, 9)"),
        (lambda: torch.rand(100), "got (100,): CLAPScore scores sound and no images; one sound is a batch of one"),
        (lambda: [np.zeros(100)], "expected waveforms (N, channels, samples), got list"),
        (lambda: torch.rand(1, 100, 2), "got (1, 100, 2): put the channels second, before the samples: waveforms.m"),
        (lambda: torch.rand(1, 1, 0), "expected at least one waveform and sample, got shape (1, 1, 0)"),
        (lambda: torch.rand(0, 1, 100), "expected at least one waveform and sample, got shape (0, 1, 100)"),
        (lambda: torch.zeros(1, 1, 100, dtype=torch.int16), "got torch.int16: divide integers of 16 bits by 32768"),
        (lambda: 32_000 * torch.ones(1, 1, 100), "expected waveforms of about -1 to 1, got 3.2e+04 to 3.2e+04: divide"),
        (not_a_number, "expected waveforms of about -1 to 1, got nan to nan"),
    ],
    ids=["images", "videos", "one", "arrays", "channels last", "no samples", "none", "integers", "16 bits", "nan"],
)  # fmt: skip
def test_what_is_no_sound(given, message, tmp_path):
    """Said before a model is read."""
    with pytest.raises(ValueError, match=re.escape(message)):
        CLAPScore(tmp_path, sampling_rate=RATE)(given(), ["a dog"])


@pytest.mark.parametrize("prompts", [None, ["a dog"], [None, None]], ids=["none", "one", "of none"])
def test_prompts_that_are_missing(prompts, tmp_path):
    with pytest.raises(ValueError, match="prompts: "):
        CLAPScore(tmp_path, sampling_rate=RATE)(sounds(2), prompts)


@pytest.mark.parametrize("rate", [0, -16_000, 16e3, None])
def test_rates_that_are_none(rate):
    with pytest.raises(ValueError, match="sampling_rate: expected the samples per second of the sounds"):
        CLAPScore(sampling_rate=rate)


def test_files_that_are_missing(tmp_path):
    reward = CLAPScore(tmp_path, sampling_rate=16_000, device="cpu")
    assert repr(reward) == f"CLAPScore({str(tmp_path)!r}, device='cpu', sampling_rate=16000)"
    with pytest.raises(OSError, match=r"from_pretrained\('/model', sampling_rate=16000\)"):
        reward(sounds(1), "a dog")
