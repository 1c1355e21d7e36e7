"""What is shown of a result: figures that pyplot does not keep, scores that tell apart, and small HTML."""

import base64
import dataclasses
import io
import re
import subprocess
import sys
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from glassflows import BeamSearch, BestOfN, FeynmanKac, FeynmanKacSteerer, Steerer
from glassflows.host.ledger import Ledger
from glassflows.rewards import Negate, PickScore, Sum
from glassflows.steering.display import Film, labels


@pytest.fixture(scope="module")
def result():
    """Two prompts, previews, resampled."""
    return tiny.Toy(tiny.flux).steer(
        ["a cat", "a dog"], reward_scale=1, ess_threshold=1, previews=True, output_type="pil"
    )


def of_scores(result, scored):
    """Return a result with other scores: of 5 rows and their particles, each from the slot above."""
    rows, particles = len(scored) - 1, len(scored[0])
    scored = torch.as_tensor(scored, dtype=torch.float64)
    slots = torch.arange(particles).expand(rows, 1, particles)
    return dataclasses.replace(
        result, scored=scored[:-1, None], rewards=scored[-1:], ancestors=slots, transitions=tuple(range(1, rows + 1)),
        resampled=torch.zeros(rows, 1, dtype=torch.bool), ess=torch.full((rows, 1), float(particles)), previews=None,
        order=scored[-1:].argsort(descending=True), reward_scale=torch.ones(1), log_evidence=torch.zeros(1),
        log_weights=torch.zeros(1, particles), images=torch.zeros(particles, 3),
    )  # fmt: skip


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_pyplot_keeps_no_figure(result):
    """It knows nothing of them, whatever it knew before."""
    before = plt.get_fignums()
    for _ in range(3):
        result.plot()
    assert plt.get_fignums() == before


@pytest.mark.slow
def test_figures_do_without_pyplot():
    """It is not even read: that would choose a backend, and a window, of the user's."""
    code = "import glassflows.steering.plotting, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_notebooks_show_a_figure(result):
    """Once: as PNG, which is the picture that `savefig` writes."""
    figure, buffer = result.plot(), io.BytesIO()
    figure.savefig(buffer, format="png")
    shown = figure._repr_png_()
    assert shown.startswith(b"\x89PNG")
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(png))) for png in (shown, buffer.getvalue())))
    assert [name for name in dir(figure) if name.startswith("_repr_") and name != "_repr_png_"] == ["_repr_html_"]
    assert figure._repr_html_() is None


def test_without_matplotlib(result, no_matplotlib):
    with pytest.raises(
        ImportError,
        match=re.escape('plot: expected matplotlib, which is not installed: pip install "glassflows[plot]"'),
    ):
        result.plot()


def boxes(figure, artists):
    """Return where artists lie in a figure that is drawn, in pixels."""
    figure.canvas.draw()
    extents = [artist.get_window_extent() for artist in artists]
    for artist, extent in zip(artists, extents, strict=True):
        if artist.get_text().startswith("\n"):  # on the second line
            extent.y1 = (extent.y0 + extent.y1) / 2
    return extents


def overlapping(extents):
    return [
        (i, j)
        for i, one in enumerate(extents)
        for j, other in enumerate(extents[:i])
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 0.5 and min(one.y1, other.y1) - max(one.y0, other.y0) > 0.5
    ]


RANGES = {"plain": (0, 1), "far": (1000, 0.01), "very far": (1e8, 1), "tiny": (0, 1e-7), "huge": (0, 1e12)}


@pytest.mark.slow
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("particles", [4, 12])
def test_scores_are_told_apart(result, name, particles):
    """Each in its own place, with labels that differ where scores differ by a hundredth of their range."""
    offset, spread = RANGES[name]
    scored = offset + spread * np.linspace(-0.5, 0.5, 5 * particles).reshape(5, particles)
    figure = of_scores(result, scored).plot()
    texts = figure.axes[0].texts
    assert len({text.get_text() for text in texts}) == 5 * particles
    by_place = {text.get_position(): float(text.get_text()) for text in texts}
    for (slot, row), value in by_place.items():
        assert abs(value - scored[int(row), slot]) <= spread / 200
    assert overlapping(boxes(figure, texts)) == []
    for axes in figure.axes:
        assert overlapping(boxes(figure, [*axes.get_xticklabels(), axes.xaxis.label])) == []
        assert not axes.xaxis.get_offset_text().get_text()


@pytest.mark.slow
@pytest.mark.parametrize(("particles", "rows"), [(64, 5), (64, 20), (128, 3), (8, 40), (200, 20)])
def test_many_particles_are_readable(result, particles, rows):
    """Dots are apart, and large enough for their shades; names of rows and columns do not touch."""
    scored = np.random.default_rng(0).random((rows, particles))
    figure = of_scores(result, scored).plot()
    figure.canvas.draw()
    tree = figure.axes[0]
    (x0, y0), (x1, y1) = tree.transData.transform([(0, 0), (1, 1)])
    apart = 72 / figure.dpi * min(abs(x1 - x0), abs(y1 - y0))  # points
    (dots,) = tree.collections
    assert len(dots.get_offsets()) == particles * rows
    size = dots.get_sizes()[0] ** 0.5 + dots.get_linewidths()[0]
    assert 0.6 * apart <= size <= apart
    assert figure.get_figwidth() <= 13
    assert figure.get_figheight() <= 11
    assert overlapping(boxes(figure, tree.get_yticklabels())) == []
    assert overlapping(boxes(figure, tree.get_xticklabels())) == []
    assert tree.get_yticklabels()[-1].get_text() == "final"


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_labels():
    """As many digits as tell apart what differs, and no more than three where all are the same."""
    assert labels([1000.01, 1000.02, 1000.03]) == ["1000.01", "1000.02", "1000.03"]
    assert labels([1e8, 1e8 + 1]) == ["100000000", "100000001"]
    assert labels([0.5, 0.25]) == ["0.5", "0.25"]
    assert labels([0.123456, 0.123456]) == ["0.123", "0.123"]
    assert labels([0.0, 0.0]) == ["0", "0"]
    assert labels([7.0]) == ["7"]
    assert labels([-1.0, 1e-9]) == ["-1", "1e-09"]
    assert len(set(labels([0.1, 0.1 + 1e-17, 0.2]))) == 2  # there is no number between the first two


@pytest.mark.parametrize("seed", range(5))
def test_labels_keep_the_order(seed):
    random = np.random.default_rng(seed)
    scores = np.sort(random.normal(10 ** random.uniform(-8, 8), 10 ** random.uniform(-6, 6), 9)).tolist()
    told = [float(label) for label in labels(scores)]
    assert told == sorted(told)
    assert np.abs(np.subtract(told, scores)).max() <= (scores[-1] - scores[0]) / 190


# ---- HTML ------------------------------------------------------------------------------------------------------------


def of_images(result, images):
    number = len(images)
    return dataclasses.replace(of_scores(result, [[float(i) for i in range(number)]] * 2), images=images)


def pictures(html):
    """Return the pictures of HTML."""
    found = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for _, content in found]


def noise(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


@pytest.mark.parametrize("number", [1, 8, 64])
def test_html_is_small(result, number):
    """Less than a megabyte, even of noise."""
    html = of_images(result, [noise(1024, i) for i in range(number)])._repr_html_()
    assert len(html) < 1e6
    shown = pictures(html)
    assert len(shown) == number
    assert all(90 <= max(one.size) <= 256 for one in shown)


def test_html_of_videos_is_small(result):
    films = [[noise(512, 40 * i + j) for j in range(40)] for i in range(4)]
    html = of_images(result, films)._repr_html_()
    assert len(html) < 2e6
    assert [one.n_frames for one in pictures(html)] == [10] * 4


def test_thumbnails_are_the_images(result):
    """In their own shape, and in colours that are near."""
    image = Image.new("RGB", (640, 320), (200, 100, 50))
    image.paste((20, 60, 180), (320, 0, 640, 320))
    (shown,) = pictures(of_images(result, [image])._repr_html_())
    assert shown.size == (256, 128)
    pixels = np.asarray(shown).astype(int)
    assert np.abs(pixels[64, 40] - (200, 100, 50)).max() < 6
    assert np.abs(pixels[64, 220] - (20, 60, 180)).max() < 6


def test_small_images_are_not_enlarged(result):
    assert {one.size for one in pictures(result._repr_html_())} == {(24, 16)}


def test_where_webp_cannot_be_written(monkeypatch):
    """A video is shown by its middle frame."""
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    frames = Film(Image.new("RGB", (20, 10), (i, 0, 0)) for i in (0, 200, 100))
    kind, content = frames.thumbnail(256)
    assert kind == "jpeg"
    assert np.abs(np.asarray(Image.open(io.BytesIO(content)))[..., 0].astype(int) - 200).max() < 6


def test_html_tells_of_the_call(result):
    html = result._repr_html_()
    assert "48 network calls, 16 decodes, 24 reward calls" in html
    assert f"ESS {result.ess[0].mean():.1f} → {result.ess[1].mean():.1f} of 4" in html
    captions = re.findall("<figcaption>(.*?)</figcaption>", html)
    assert [float(one) for one in captions] == pytest.approx(result.image_rewards.tolist(), rel=1e-2)
    assert len(set(captions)) == len(set(result.image_rewards.tolist()))


# ---- in a line -------------------------------------------------------------------------------------------------------


def test_ledgers_in_a_line():
    seconds = defaultdict(float, network=2.0, decode=0.5, total=3.25)
    ledger = Ledger(48, 16, 24, seconds)
    assert str(ledger) == "48 network calls, 16 decodes, 24 reward calls; 3.25 s (network 2, decode 0.5)"
    assert repr(ledger) == f"Ledger({ledger})"
    assert str(Ledger(1, 2, 3)) == "1 network calls, 2 decodes, 3 reward calls"


def test_results_in_a_line(result):
    said = repr(result)
    assert said.startswith("SteeringResult(FeynmanKac: 2 prompts × 4 particles, best reward ")
    assert len(said) < 300
    assert "tensor" not in said
    best = re.search(r"best reward ([\d.]+), ([\d.]+);", said)
    assert [float(one) for one in best.groups()] == pytest.approx(result.rewards.amax(1).tolist(), rel=1e-2)
    assert "interrupted" in repr(dataclasses.replace(result, interrupted=True))


def test_the_best_of_a_negative_scale_in_a_line(flux):
    out = flux.steer(reward_scale=-1.0)
    assert float(re.search(r"best reward ([\d.]+)", repr(out))[1]) == pytest.approx(float(out.rewards.min()), rel=1e-2)


def test_strategies_in_a_line():
    """With the options that are not as usual."""
    assert repr(FeynmanKac()) == "FeynmanKac()"
    assert repr(FeynmanKac(reward_scale="auto", start=0.5)) == "FeynmanKac(reward_scale='auto', start=0.5)"
    assert repr(FeynmanKac(potential=tiny.brightness)) == "FeynmanKac(potential=brightness)"
    assert repr(BestOfN(2.0)) == "BestOfN(reward_scale=2.0)"
    assert repr(BeamSearch(4)) == "BeamSearch(width=4)"


def test_steerers_in_a_line(flux):
    steerer = FeynmanKacSteerer(flux.pipe, tiny.brightness, 4, ess_threshold=0.9, reward_scale=2.0)
    assert repr(steerer) == (
        "FeynmanKacSteerer(FluxPipeline, brightness, FeynmanKac(reward_scale=2.0, ess_threshold=0.9), 4)"
    )

    class Mine:
        def __call__(self, images, prompts):
            return [0.0] * len(images)

    assert repr(Steerer(flux.pipe, Mine(), BeamSearch())) == "Steerer(FluxPipeline, Mine, BeamSearch(), 8)"


def test_rewards_in_a_line():
    """With the model, where it is, and in which precision; of rewards made of rewards, with their names."""
    score = PickScore("a/model", device="cpu")
    assert repr(score) == "PickScore('a/model', device='cpu')"
    assert repr(score.to(dtype=torch.bfloat16)) == "PickScore('a/model', device='cpu', dtype=torch.bfloat16)"
    assert repr(Negate(score)) == "Negate(PickScore)"
    assert repr(Sum(score, tiny.brightness, weights=[1, 0.5])) == "Sum(PickScore, brightness, weights=[1.0, 0.5])"
