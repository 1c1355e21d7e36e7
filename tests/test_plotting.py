"""Figures of a steered call, by what is drawn in them."""

import dataclasses

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.offsetbox import AnnotationBbox

import tiny
from glassflows.host.outputs import rows_of_output

matplotlib.use("Agg")
PROMPTS = ["a cat", "a dog"]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def result():
    """Two prompts, resampled at both scorings, whose best samples are of different lineages."""
    out = tiny.Toy(tiny.flux).steer(PROMPTS, reward_scale=1, ess_threshold=1, previews=True, output_type="pil")
    assert out.lineage(0) != out.lineage(1)
    assert out.resampled.all()
    return out


def drawn(figure):
    """Return pictures, dots and labels of the particles of a figure by (row, slot)."""
    tree, boxes, dots, labels = figure.axes[0], {}, {}, {}
    for artist in tree.get_children():
        if isinstance(artist, AnnotationBbox):
            slot, row = artist.xy
            boxes[row, slot] = artist
        if isinstance(artist, PathCollection):
            dots |= {(row, slot): artist for slot, row in artist.get_offsets().astype(int).tolist()}
    for text in tree.texts:
        slot, row = text.get_position()
        labels[round(row), slot] = text
    return boxes, dots, labels


def kind(colour):
    """Return whether a colour is red, dark or light."""
    red, green, blue = to_rgb(colour)
    if red > 2 * max(green, blue):
        return "red"
    return "dark" if max(red, green, blue) < 0.5 else "light"


def kinds(result, prompt):
    """Return the colour of each place of a genealogy, from the lineages of all final samples."""
    rows, columns = len(result.ancestors) + 1, result.rewards.shape[1]
    colours = {(row, slot): "light" for row in range(rows) for slot in range(columns)}
    for final in range(columns):
        colours |= dict.fromkeys(enumerate(result.lineage(prompt, final)), "dark")
    return colours | dict.fromkeys(enumerate(result.lineage(prompt)), "red")


@pytest.mark.parametrize("prompt", [0, 1])
def test_the_winners_lineage_is_red(result, prompt):
    """And those that reached the end are dark; a line joins every particle to its parent."""
    figure = result.plot(prompt)
    tree, expected, lines = figure.axes[0], kinds(result, prompt), {}
    for line in tree.lines:
        (parent, slot), (above, below) = line.get_xdata(), line.get_ydata()
        assert below == above + 1
        lines[below, slot] = parent, kind(line.get_color())
    ancestors = result.ancestors[:, prompt].tolist()
    assert lines == {
        (row, slot): (parent, expected[row, slot])
        for row, parents in enumerate(ancestors, 1)
        for slot, parent in enumerate(parents)
    }
    winner = result.lineage(prompt)
    assert {place: parent for place, (parent, colour) in lines.items() if colour == "red"} == {
        (row, winner[row]): winner[row - 1] for row in (1, 2)
    }
    boxes, _, labels = drawn(figure)
    assert {place: kind(box.patch.get_edgecolor()) for place, box in boxes.items()} == expected
    assert {place for place, label in labels.items() if kind(label.get_color()) == "red"} == {*enumerate(winner)}


@pytest.mark.parametrize("prompt", [0, 1])
def test_a_figure_shows_the_pictures_and_scores_of_its_prompt(result, prompt):
    boxes, dots, labels = drawn(result.plot(prompt))
    mine = slice(4 * prompt, 4 * prompt + 4)
    final = np.stack([np.asarray(image) for image in result.images[mine]])[result.order[prompt].argsort()]
    pictures = np.stack([*result.previews[:, mine].movedim(2, -1).numpy(), final])
    scores = torch.cat([result.scored[:, prompt], result.rewards[prompt][None]])
    places = [(row, slot) for row in range(3) for slot in range(4)]
    assert sorted(boxes) == sorted(labels) == places
    assert not dots
    for place in places:
        assert np.array_equal(boxes[place].offsetbox.get_data(), pictures[place])
        assert abs(float(labels[place].get_text()) - scores[place]) < (scores.max() - scores.min()) / 100


@pytest.mark.parametrize("prompt", [0, 1])
def test_curves_and_their_labels(result, prompt):
    tree, sizes, rewards = result.plot(prompt).axes
    scores = torch.cat([result.scored[:, prompt], result.rewards[prompt][None]])
    (ess,), (mean, best) = sizes.lines, rewards.lines
    assert ess.get_xdata().tolist() == result.ess[:, prompt].tolist()
    assert list(ess.get_ydata()) == [0, 1]
    np.testing.assert_allclose(mean.get_xdata(), scores.mean(1))
    np.testing.assert_allclose(best.get_xdata(), scores.amax(1))
    assert [*mean.get_ydata()] == [*best.get_ydata()] == [0, 1, 2]
    assert (kind(mean.get_color()), kind(best.get_color())) == ("dark", "red")
    names = ["transition 2\nresampled", "transition 3\nresampled", "final"]
    assert [label.get_text() for label in tree.get_yticklabels()] == names
    assert [label.get_text() for label in tree.get_xticklabels()] == ["1", "2", "3", "4"]
    titles = ["particle", "effective\nsample size", "reward:\nmean, best"]
    assert [axes.get_xlabel() for axes in (tree, sizes, rewards)] == titles
    assert tree.get_ylim()[0] > 2 > 0 > tree.get_ylim()[1]  # the first scoring at the top


def test_without_previews_particles_are_dots(result):
    """The brighter the higher the reward, with edges in the colours of the lineages, and with their scores."""
    boxes, dots, labels = drawn(dataclasses.replace(result, previews=None).plot(1))
    assert not boxes
    assert {place: kind(dot.get_edgecolor()[0]) for place, dot in dots.items()} == kinds(result, 1)
    assert labels.keys() == dots.keys()
    scores = torch.cat([result.scored[:, 1], result.rewards[1][None]])
    by_score = sorted(dots, key=lambda place: scores[place])
    brightness = [dots[place].get_facecolor()[0][:3] @ [0.3, 0.6, 0.1] for place in by_score]
    assert brightness == sorted(brightness)
    assert brightness[0] < 0.3 < 0.7 < brightness[-1]


def test_only_resampled_rows_say_so(result):
    resampled = result.resampled.clone()
    resampled[0, 1] = False
    tree = dataclasses.replace(result, resampled=resampled).plot(1).axes[0]
    names = ["transition 2", "transition 3\nresampled", "final"]
    assert [label.get_text() for label in tree.get_yticklabels()] == names


@pytest.mark.parametrize("select", ["best", "sample"])
def test_what_was_not_returned_has_no_picture(flux, select):
    out = flux.steer(PROMPTS, reward_scale=50, previews=True, select=select)
    boxes, dots, _ = drawn(out.plot(1))
    returned = {(2, slot) for slot in out.order[1].tolist()}
    assert 1 <= len(returned) < 4
    assert boxes.keys() == {(row, slot) for row in (0, 1) for slot in range(4)} | returned
    assert dots.keys() == {(2, slot) for slot in range(4)} - returned


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_videos_are_shown_by_their_middle_frame(flux, output_type):
    film = np.random.default_rng(0).random((4, 5, 8, 12, 3), dtype=np.float32)
    out = flux.steer(PROMPTS, num_particles=2, previews=True)
    previews = (255 * torch.from_numpy(film)).round().byte().movedim(-1, -3)[None].repeat(2, 1, 1, 1, 1, 1)
    videos = rows_of_output(film, torch.arange(4), output_type)
    out = dataclasses.replace(out, previews=previews, images=videos, order=torch.tensor([[0, 1], [1, 0]]))
    boxes, _, _ = drawn(out.plot(1))
    frames = [(255 * film[i, 2]).round() for i in (2, 3, 2, 3, 3, 2)]  # twice on the way, and in the order returned
    places = [(row, slot) for row in range(3) for slot in range(2)]
    for place, frame in zip(places, frames, strict=True):
        assert np.array_equal(boxes[place].offsetbox.get_data(), frame)


SIZES = {  # particles and transitions: labels of the columns
    (1, 2): ["1"],
    (2, 1): ["1", "2"],
    (12, 2): [str(i) for i in range(1, 13)],
    (13, 2): ["1", "3", "5", "7", "9", "11", "13"],
    (2, 14): ["1", "2"],
    (40, 3): ["1", "6", "11", "16", "21", "26", "31", "36"],
}


@pytest.mark.filterwarnings("ignore:.*scored no particles on the way:UserWarning")
@pytest.mark.parametrize(("particles", "transitions"), SIZES)
def test_figures_of_every_size(flux, particles, transitions):
    """Of more than twelve particles or rows each is a dot without a score, and a star marks resampling."""
    out = flux.steer(
        num_particles=particles, num_transitions=transitions, num_inference_steps=transitions,
        reward_scale=1, ess_threshold=1, previews=True,
    )  # fmt: skip
    figure = out.plot()
    figure.canvas.draw()
    tree, (boxes, dots, labels) = figure.axes[0], drawn(figure)
    places = {(row, slot) for row in range(transitions) for slot in range(particles)}
    large = max(particles, transitions) <= 12
    pictured = large and transitions > 1  # else there is no scoring, and no preview
    assert boxes.keys() == (places if pictured else set())
    assert dots.keys() == places - boxes.keys()
    assert labels.keys() == (places if large else set())
    assert len(tree.lines) == particles * (transitions - 1)
    assert [label.get_text() for label in tree.get_xticklabels()] == SIZES[particles, transitions]
    mark = "\nresampled" if large else " *"
    marks = [mark if one else "" for one in out.resampled[:, 0]]
    rows = [f"transition {k}{mark}" for k, mark in zip(range(2, transitions + 1), marks, strict=True)]
    assert [label.get_text() for label in tree.get_yticklabels()] == [*rows, "final"]
    assert figure.get_figwidth() < 13
    assert figure.get_figheight() < 13
