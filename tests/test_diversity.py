"""How different the particles of a prompt still are: lineages against a walk, distances against a double loop."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

import tiny
from glassflows import BestOfN, Steerer, SteeringResult
from glassflows.steering import Decision, Outcome
from glassflows.steering.diversity import mean_distance, num_lineages

PROMPTS = ["a cat", "a dog"]


class AllFrom:
    """A strategy by which every particle goes on from one slot of its group, at one boundary or at all."""

    def __init__(self, slot=None, index=None):
        self.slot = slot
        self.index = index

    def due(self, at):
        return True

    def init(self, groups, particles):
        return None

    def step(self, state, rewards, at, generators):
        kept = Decision.keep(rewards)
        if self.slot is None or self.index not in (None, at.index):
            return state, kept
        ancestors = torch.full_like(kept.ancestors, self.slot)
        return state, kept._replace(ancestors=ancestors, resampled=torch.ones_like(kept.resampled))

    def finish(self, state, rewards, total):
        return Outcome.without_law(rewards)


def steered(toy, strategy, prompts=None, particles=4, transitions=3, reward=tiny.brightness, decode=None, **kwargs):
    steerer = Steerer(toy.pipe, reward, strategy, particles, num_transitions=transitions, decode=decode)
    return steerer(**toy.arguments(prompts, **kwargs))


# ---- lineages --------------------------------------------------------------------------------------------------------


def walked(ancestors):
    """Return how many slots of the first scoring are reached from the end, one particle at a time."""
    _, groups, particles = ancestors.shape
    counts = []
    for group in range(groups):
        roots = set()
        for slot in range(particles):
            for parents in reversed(ancestors[:, group].tolist()):
                slot = parents[slot]
            roots.add(slot)
        counts.append(len(roots))
    return counts


HAND_MADE = [  # (S, P, K) and the lineages of each prompt
    ([[[0, 1, 2, 3], [0, 1, 2, 3]]], [4, 4]),
    ([[[0, 0, 2, 2], [1, 1, 1, 1]]], [2, 1]),
    ([[[0, 0, 2, 3], [3, 2, 1, 0]], [[0, 1, 1, 0], [0, 1, 2, 2]]], [1, 3]),
    ([[[0, 1, 2, 3], [0, 0, 1, 1]], [[2, 2, 3, 3], [3, 3, 3, 3]], [[0, 2, 0, 2], [0, 1, 2, 3]]], [2, 1]),
]


@pytest.mark.parametrize(("ancestors", "expected"), HAND_MADE)
def test_lineages_of_known_genealogies(ancestors, expected):
    found = num_lineages(torch.tensor(ancestors))
    assert found.dtype == torch.int64
    assert found.tolist() == walked(torch.tensor(ancestors)) == expected


@pytest.mark.parametrize("scorings", [1, 2, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_lineages_are_those_of_a_walk(scorings, groups):
    """Which neither the survivors of one scoring alone nor a walk the other way round are."""
    generator, wrong = tiny.seeded(scorings), {"first": 0, "last": 0, "reversed": 0}
    for _ in range(50):
        ancestors = torch.randint(0, 7, (scorings, groups, 7), generator=generator)
        expected = walked(ancestors)
        assert num_lineages(ancestors).tolist() == expected
        wrong["first"] += [len(row.unique()) for row in ancestors[0]] != expected
        wrong["last"] += [len(row.unique()) for row in ancestors[-1]] != expected
        wrong["reversed"] += num_lineages(ancestors.flip(0)).tolist() != expected
    assert all(number > 10 for number in wrong.values()) == (scorings > 1)


def test_lineages_of_a_result(flux):
    """They are the first slots of the lineages of its final particles."""
    out = flux.steer(PROMPTS, num_particles=6, reward_scale=1, ess_threshold=1)
    roots = [{out.lineage(prompt, slot)[0] for slot in range(6)} for prompt in range(2)]
    assert out.lineages.tolist() == [len(one) for one in roots]
    assert out.lineages.max() < 6


@pytest.mark.parametrize("strategy", [BestOfN(), AllFrom()])
def test_nobody_moves(flux, strategy):
    """Whether nobody was scored, or everybody and all went on."""
    out = steered(flux, strategy, PROMPTS)
    assert len(out.ancestors) == (0 if isinstance(strategy, BestOfN) else 2)
    assert out.lineages.tolist() == [4, 4]
    assert out.lineages.shape == out.diversity.shape == (2,)


# ---- diversity -------------------------------------------------------------------------------------------------------


def looped(samples, particles):
    """Return the mean distance of two samples of a group, pair by pair."""
    groups = np.asarray(samples, np.float64).reshape(-1, particles, *samples.shape[1:])
    means = []
    for group in groups:
        distances = [
            math.sqrt(np.mean((group[i] - group[j]) ** 2)) for i in range(particles) for j in range(i + 1, particles)
        ]
        means.append(sum(distances) / len(distances))
    return means


SHAPES = {
    "images": (3, 6, 10), "videos": (5, 3, 6, 10), "packed latents": (24, 16), "sound": (2, 101), "numbers": (),
    "large": (3, 97, 131),  # more than is taken at a time
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("particles", [2, 5])
def test_diversity_is_that_of_a_double_loop(shape, particles):
    generator = tiny.seeded(1)
    samples = torch.rand(3 * particles, *shape, generator=generator)
    samples *= torch.rand(len(samples), generator=generator).view(-1, *(1,) * len(shape))  # distances differ
    expected = looped(samples, particles)
    found = mean_distance(samples, particles)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    if particles > 2:  # what is wrong is told apart
        groups = samples.double().reshape(3, particles, -1)
        with_itself = torch.cdist(groups, groups).mean((1, 2)) / groups.shape[-1] ** 0.5
        root_of_mean = (2 * groups.var(1).mean(1)).sqrt()
        for other in (with_itself, root_of_mean):
            assert not np.allclose(other, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.float64])
def test_samples_of_every_precision(dtype):
    samples = (100 * torch.rand(4, 3, 6, 10, generator=tiny.seeded(2))).to(dtype)
    np.testing.assert_allclose(mean_distance(samples, 4), looped(samples.double(), 4), rtol=1e-12)


def test_layout_does_not_matter():
    """Pipelines put channels last, which rewards see as a view."""
    samples = torch.rand(4, 6, 10, 3, generator=tiny.seeded(3))
    before = samples.clone()
    assert torch.equal(mean_distance(samples.movedim(-1, 1), 4), mean_distance(samples.movedim(-1, 1).contiguous(), 4))
    assert torch.equal(samples, before)


def test_copies_are_no_distance_apart():
    """Exactly, however bright they are, which the rounding of inner products would not leave them."""
    image = 1000 + torch.rand(1, 3, 61, 87, generator=tiny.seeded(4))
    copies = image.repeat(5, 1, 1, 1)
    assert mean_distance(copies, 5).tolist() == [0.0]
    flat = copies.double().flatten(1)
    squares = flat.square().sum(1)
    by_products = squares[:, None] + squares - 2 * flat @ flat.T
    assert by_products.abs().max() > 0
    copies[0, 0, 0, 0] += 1e-3
    step = float(copies[0, 0, 0, 0]) - float(image[0, 0, 0, 0])
    expected = 4 / 10 * abs(step) / math.sqrt(3 * 61 * 87)
    assert float(mean_distance(copies, 5)) == pytest.approx(expected, rel=1e-12)


def test_one_particle_is_no_distance_from_itself(flux):
    assert mean_distance(torch.rand(3, 3, 6, 10), 1).tolist() == [0.0, 0.0, 0.0]
    out = flux.steer(PROMPTS, num_particles=1)
    assert out.diversity.tolist() == [0.0, 0.0]
    assert out.lineages.tolist() == [1, 1]


def test_black_and_white_are_one_apart():
    assert mean_distance(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 6, 10), 2).tolist() == [1.0]


# ---- of steered calls ------------------------------------------------------------------------------------------------


def noting(seen, score=tiny.brightness):
    """Return a reward that notes what it sees, and spoils it."""

    def reward(samples, prompts):
        seen.append(samples.clone())
        scores = score(samples, prompts)
        samples.zero_()
        return scores

    return reward


FORMS = {  # what the reward sees of the final samples
    "images": {}, "images of latents": {"output_type": "latent"}, "latents": {"decode": "latents"},
    "a user's own": {"decode": lambda z: z.flatten(1)[:, :7].double() ** 2, "output_type": "latent"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("select", ["all", "best", "sample"])
def test_diversity_is_that_of_all_that_the_reward_saw(flux, form, select):
    """Whatever is returned, and whatever the reward does to it."""
    seen = []
    reward = noting(seen, lambda samples, prompts: samples.flatten(1).double().mean(1))
    out = steered(flux, BestOfN(), PROMPTS, reward=reward, select=select, **FORMS[form])
    assert len(out.images) == (2 if select == "best" else 8)
    (final,) = seen
    np.testing.assert_allclose(out.diversity, looped(final, 4), rtol=1e-12)
    assert (out.diversity > 0).all()
    assert out.diversity[0] != out.diversity[1]


def test_batches_of_rewards_do_not_matter(flux):
    whole = flux.steer(PROMPTS, reward_scale=1)
    assert torch.equal(flux.steer(PROMPTS, reward_scale=1, reward_batch_size=3).diversity, whole.diversity)


def test_particles_that_collapse(flux):
    """The later they descend from one, the more alike they are; copies after which nothing is random are the same."""
    several = steered(flux, BestOfN(), PROMPTS, transitions=6)
    early, late, last = (steered(flux, AllFrom(1, index), PROMPTS, transitions=6) for index in (1, 4, 5))
    assert several.lineages.tolist() == [4, 4]
    for out in (early, late, last):
        assert out.lineages.tolist() == [1, 1]
    assert (several.diversity > early.diversity).all()
    assert (early.diversity > late.diversity).all()
    assert (late.diversity > 0).all()
    assert last.diversity.tolist() == [0.0, 0.0]


def test_a_steep_target_leaves_one_lineage(flux):
    steep = flux.steer(num_particles=8, reward_scale=1e4, ess_threshold=1, num_transitions=6)
    flat = steered(flux, BestOfN(), particles=8, transitions=6)
    assert steep.lineages.tolist() == [1]
    assert flat.lineages.tolist() == [8]
    assert steep.diversity < flat.diversity


# ---- where it is told ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result():
    return tiny.Toy(tiny.flux).steer(PROMPTS, num_particles=6, reward_scale=1, ess_threshold=1, output_type="pil")


def of(result, ancestors, diversity):
    """Return a result of two prompts with another genealogy and diversity."""
    return dataclasses.replace(
        result, ancestors=torch.tensor(ancestors), diversity=torch.tensor(diversity, dtype=torch.float64)
    )


CHAIN = [[[0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5]], [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]]  # 3 and 1 lineages


def test_in_a_line(result):
    """Of several prompts means are told."""
    for said in (repr(out := of(result, CHAIN, [0.123, 0.2])), out._repr_html_()):
        assert "; 2 lineages, diversity 0.16; " in said
    assert f"{float(result.lineages.double().mean()):.3g} lineage" in repr(result)
    both = [[CHAIN[0][1]] * 2]
    assert "; 1 lineage, diversity 0; " in repr(of(result, both, [0.0, 0.0]))
    mixed = [[CHAIN[0][1], [0, 0, 0, 0, 1, 1]]]
    assert "; 1.5 lineages, diversity 0.0013; " in repr(of(result, mixed, [0.0012, 0.0014]))
    assert "; 2 lineages; " in repr(of(result, CHAIN, [math.nan, math.nan]))


@pytest.mark.parametrize(("prompt", "title"), [(0, "3 lineages, diversity 0.12"), (1, "1 lineage, diversity 0.2")])
def test_in_figures(result, prompt, title):
    tree, *others = of(result, CHAIN, [0.123, 0.2]).plot(prompt).axes
    assert tree.get_title(loc="left") == title
    assert not any(axes.get_title(loc=side) for axes in others for side in ("left", "center", "right"))


@pytest.mark.parametrize("particles", [1, 2, 4, 8, 16])
def test_the_title_is_in_nobodys_way(flux, particles):
    """It lies within the figure, and above everything else that is written or drawn there."""
    figure = flux.steer(num_particles=particles, reward_scale=1, ess_threshold=1, previews=True).plot()
    figure.canvas.draw()
    tree = figure.axes[0]
    title = next(text for text in tree.get_children() if getattr(text, "get_text", str)() == tree.get_title(loc="left"))
    extent, whole = title.get_window_extent(), figure.bbox
    assert re.fullmatch(r"\d+ lineages?, diversity [\d.]+", title.get_text())
    assert whole.x0 <= extent.x0 < extent.x1 <= whole.x1
    assert whole.y0 <= extent.y0 < extent.y1 <= whole.y1
    below = [*tree.texts, *tree.collections, *tree.artists, *tree.lines, *tree.get_yticklabels()]
    assert len(below) > particles
    for axes in figure.axes:
        assert axes.get_window_extent().y1 <= extent.y0 + 0.5
    for artist in below:
        assert artist.get_window_extent().y1 <= extent.y0 + 0.5


def test_in_the_record(result, tmp_path):
    folder = result.save(tmp_path)
    record = json.loads((folder / "steering.json").read_text())
    assert record["lineages"] == result.lineages.tolist()
    assert record["diversity"] == result.diversity.tolist()
    loaded = SteeringResult.load(folder)
    assert loaded == result
    assert torch.equal(loaded.diversity, result.diversity)
    assert torch.equal(loaded.lineages, result.lineages)
    assert loaded != dataclasses.replace(result, diversity=result.diversity + 1e-12)


def test_a_record_of_before(result, tmp_path):
    """It knows no diversity, and lineages follow from the ancestors; saved again it says that it knows none."""
    folder = result.save(tmp_path)
    record = json.loads((folder / "steering.json").read_text())
    del record["lineages"], record["diversity"]
    (folder / "steering.json").write_text(json.dumps(record))
    loaded = SteeringResult.load(folder)
    assert loaded.diversity.shape == (2,)
    assert loaded.diversity.dtype == torch.float64
    assert loaded.diversity.isnan().all()
    assert torch.equal(loaded.lineages, result.lineages)
    assert "diversity" not in repr(loaded)
    assert loaded.plot(1).axes[0].get_title(loc="left") == f"{int(result.lineages[1])} lineage" + (
        "s" if result.lineages[1] > 1 else ""
    )
    assert SteeringResult.load(loaded.save(tmp_path / "again")) == loaded
    assert json.loads((tmp_path / "again" / "steering.json").read_text())["diversity"] == ["NaN", "NaN"]
