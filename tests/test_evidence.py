"""The benchmark of steering: what best-of-N reaches, and the baselines that diffusers' own schedulers give."""

import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))

import steering
from native import EulerMaruyama, Steered, dpm_solver, native_steered
from transitions import euler_maruyama

import tiny
from scenes import load_pipeline, load_reward
from scenes.grammar import hard_prompts
from scenes.methods import SHOWN, Spending, ancestral, best_first, feynman_kac, plain, steered


def test_best_of_n_is_the_mean_over_all_choices_of_n():
    values = np.array([9.0, 7.0, 4.0, 3.0, 1.0])  # by falling reward
    for n, shares in enumerate(steering.best_of(5), 1):
        assert shares.sum() == pytest.approx(1)
        assert shares @ values == pytest.approx(np.mean([chosen[0] for chosen in combinations(values, n)]))


def test_calls_needed_are_read_off_the_cheapest_curve(monkeypatch):
    monkeypatch.setattr(steering, "POOL", 4)
    curves = [
        (10, np.array([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0], [4.0, 6.0]])),  # means 2, 3, 4, 5
        (6, np.array([[0.0, 2.0], [1.0, 3.0], [2.0, 4.0], [2.5, 4.5]])),  # means 1, 2, 3, 3.5
    ]
    assert steering.needed(np.array([1.0, 3.0]), curves) == 10  # one of 10, or two of 6
    assert steering.needed(np.array([2.0, 4.0]), curves) == 18  # two of 10, or three of 6
    assert steering.needed(np.array([3.5, 5.5]), curves) == 35
    assert steering.needed(np.array([9.0, 9.0]), curves) == np.inf
    assert str(steering.needed_interval(np.array([2.0, 4.0]), curves)) == "18 (18 to 18)"
    assert str(steering.needed_interval(np.array([9.0, 9.0]), curves)) == "∞ (∞ to ∞)"


def test_budgets_are_calls_or_particles_times_calls():
    assert steering.Budget.parse("160") == (160, None)
    assert steering.Budget.parse("8x20") == (160, 20)
    for text in ("160", "8x20"):
        assert str(steering.Budget.parse(text)) == text


def test_a_chain_keeps_the_calls_of_its_transitions():
    row = steering.Row(steering.ROWS["FK, GLASS"].method, calls_each=2)
    tried = row.settings(Spending(24, 12, transitions=5), "steps", (3, 4, 12, 20))  # of 20 there is one particle
    assert [(one.particles, one.steps, one.transitions) for one in tried] == [(8, 3, 1), (6, 4, 2), (2, 12, 5)]
    assert [one.transitions for one in row.settings(tried[1], "transitions", (1, 2, 5))] == [1, 2]


def test_euler_maruyama_is_that_of_the_transitions():
    """The scheduler's steps and the closed loop draw the same path from the same noise."""

    def denoiser(x, t):
        return t * x / (t**2 + (1 - t) ** 2)

    scheduler: Any = EulerMaruyama()
    scheduler.set_timesteps(6)
    sigmas = scheduler.sigmas.double()
    x = y = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noises = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype) for i in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        drawn = iter(noises[: len(scheduler.timesteps)])
        patch.setattr(torch, "randn_like", lambda _: next(drawn))
        for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
            x = scheduler.step((x - denoiser(x, float(1 - sigma))) / float(sigma), timestep, x)[0]
    with pytest.MonkeyPatch.context() as patch:
        drawn = iter(noises)
        patch.setattr(torch, "randn", lambda *_, **__: next(drawn))
        y = euler_maruyama(denoiser, y, (1 - sigmas).tolist(), torch.Generator())
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert len(list(pairwise(sigmas))) == 6


def test_a_steered_scheduler_moves_state_output_and_history():
    scheduler: Any = dpm_solver("dpmsolver++")(EulerMaruyama().config)
    scheduler.set_timesteps(4)
    seen = []

    def score(latents):
        seen.append(latents.clone())
        return torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]], dtype=torch.float64)

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    guided = Steered(scheduler, 2, 3, [2], score, generators)
    x = torch.arange(6.0)[:, None] * torch.ones(6, 2)
    for timestep in scheduler.timesteps[:3]:
        x = guided.step(0.1 * x, timestep, x, return_dict=False)[0]
    assert len(seen) == 1
    assert guided.roots.tolist() == [[1, 1, 1], [0, 0, 0]]
    for rows in (x, *scheduler.model_outputs):
        for group in rows.view(2, 3, 2):
            assert (group == group[0]).all()
    assert not (x[0] == x[3]).any()


def test_best_first_sorts_each_prompt():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    sorted_images, rewards = best_first(images, torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]]))
    assert rewards.tolist() == [[3, 2, 1], [6, 5, 4]]
    assert sorted_images[..., 0, 0, 0].tolist() == [[1, 2, 0], [5, 3, 4]]


@pytest.fixture(scope="module")
def model():
    return load_pipeline(), load_reward()


@pytest.mark.slow
@tiny.TRANSFORMERS_5
@pytest.mark.parametrize(
    "method",
    [plain(), steered(feynman_kac()), ancestral(alike=True), native_steered(dpm_solver("sde-dpmsolver++"))],
    ids=["plain", "steered", "ancestral", "native"],
)
def test_methods_keep_to_their_calls_and_reproduce(model, method):
    prompts, spending = hard_prompts(2), Spending(20, 5, transitions=2)
    native = model[0].scheduler
    first, second = (method(*model, prompts, spending, 3) for _ in range(2))
    assert first.calls <= 20
    assert first.images.shape == (2, 4, 3, 32, 32)
    np.testing.assert_array_equal(first.images, second.images)
    assert (np.diff(first.rewards) <= 0).all()
    assert model[0].scheduler is native


@pytest.mark.slow
@tiny.TRANSFORMERS_5
def test_protocol_runs_and_takes_up_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steering, "CHOSEN", tmp_path / "chosen.json")
    small = {"CHOOSING": 1, "REPORTING": 2, "POOL": 6, "BUDGETS": {"clip": ("32", "2x8", "16")}}
    for name, value in small.items():
        monkeypatch.setattr(steering, name, value)
    names = (steering.ONE, steering.BASELINE, "FK, GLASS", "FK, Euler-Maruyama")
    short = {"steps": (4, 8, 16), "scale": (1.0, 3.0)}
    rows = {
        name: replace(row, choices={key: short[key] for key in row.choices if key in short})
        for name, row in steering.ROWS.items()
        if name in names
    }
    monkeypatch.setattr(steering, "ROWS", rows)

    def run(part, *more):
        options = ["--seeds", "1", "--out", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", ["steering.py", part, *options])
        steering.main()
        return capsys.readouterr().out

    tried = run("choose")
    assert "2 particles × 8 calls, FK, GLASS, steps: 8: " in tried
    drawn = (tmp_path / "clip.jsonl").read_text()
    run("choose")
    assert (tmp_path / "clip.jsonl").read_text() == drawn
    run("report", "--methods", "FK, GLASS")
    table = run("report", "--plot", str(tmp_path / "needed.png"))
    assert (tmp_path / "needed.png").stat().st_size > 5000
    shown = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert shown == 3 * ["|", *(f"| {name}" for name in rows)]
    monkeypatch.delattr(steering.Bench, "measures")  # nothing is drawn anew
    assert run("report") == table
    with pytest.raises(SystemExit):
        run("report", "--budgets", "64")
    assert "FK, GLASS at 64" in capsys.readouterr().err


def test_the_demo_shows_equal_budgets():
    budgets = {spending.calls for name, (_, spending) in SHOWN.items() if name != "one image"}
    assert budgets == {160}
