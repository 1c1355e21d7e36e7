"""The end of a run: its samples, weighed by their own rewards, and those that are returned."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..caller import warn
from ..host.decode import Decode
from ..host.outputs import channels_first, rows_of_others, rows_of_output
from ..host.run import Drawn, PipelineRun
from ..scheduler.glass import GLASSScheduler
from .arguments import Wanted
from .diversity import mean_distance
from .population import Population, Seen
from .result import SteeringResult
from .scorer import Scorer, compares
from .strategy import worth


def ended(
    run: PipelineRun,
    drawn: Drawn,
    population: Population,
    wanted: Wanted,
    written: dict[str, Any],
    scheduler: GLASSScheduler,
    decode: Decode | None,
) -> SteeringResult:
    """Weigh the final samples by their own rewards, and return what was wanted of them.

    Args:
        run: The run.
        drawn: What it drew.
        population: The particles.
        wanted: What the call is to return.
        written: The recipe.
        scheduler: The scheduler that ran.
        decode: The user's function from latents to images; None for the pipeline's.
    """
    scorer, strategy = population.scorer, population.strategy
    samples = _final_samples(run, drawn, population, wanted.output_type)
    diversity = mean_distance(samples, population.alive)  # a reward may write into them
    final = scorer.score(samples)
    rewards = final.rewards
    outcome = population.finish(rewards, drawn.interrupted)
    number = wanted.num_images_per_prompt or population.alive
    order = population.order(wanted.select, rewards, outcome, number)
    rows, output, seen = population.rows(order), drawn.samples, population.best_seen
    if compares(scorer.reward):  # ends were compared with other samples than the final ones
        seen = None
    if seen is not None and scorer.sees_otherwise:
        seen = _judged(scorer, seen)
    latents = drawn.latents
    if latents is not None:
        latents = run.with_kept_region(latents).cpu()[rows]
    if wanted.select == "best_seen" and seen is None and not drawn.interrupted:
        warn(
            f'select="best_seen": {strategy!r} scored no particles on the way, so none of their '
            "futures was seen, and the best final sample is returned. Widen the window of scoring, "
            "or take more transitions or another strategy."
        )
    if wanted.select == "best_seen" and seen is not None:
        best = worth(rewards, outcome.reward_scale).amax(1)
        better = worth(seen.rewards[:, None], outcome.reward_scale)[:, 0] > best
        if better.any():
            output = _with_rows(run, drawn, seen.latents[better], rows[better], decode)
            latents[better] = seen.latents[better].to(latents)  # type: ignore[index, arg-type]
        order = torch.where(better[:, None], -1, order)
    past, trajectories = population.history(), None
    if population.recorder is not None:
        trajectories = population.recorder.trajectories(
            order, past["ancestors"], past["transitions"], scheduler.timesteps
        )
    return SteeringResult(
        images=rows_of_output(output, rows, wanted.output_type),
        others=rows_of_others(drawn.outputs, math.prod(population.shape), rows),
        rewards=rewards,
        log_weights=outcome.log_weights,
        log_evidence=outcome.log_evidence,
        strategy=type(strategy).__name__,
        reward_scale=outcome.reward_scale,
        order=order,
        seen=None if seen is None else seen.rewards,
        diversity=diversity,
        interrupted=drawn.interrupted,
        ledger=scorer.ledger,
        recipe=written,
        latents=latents,
        trajectories=trajectories,
        parts=population.parts(final),
        **past,
    )


def _judged(scorer: Scorer, seen: Seen) -> Seen:
    """Return ends of excursions with the rewards of their own images, and not of previews."""
    alone = scorer.of_each_prompt()
    return seen._replace(rewards=alone.score(alone.decoded(seen.latents.clone())).rewards[:, 0])


def _with_rows(
    run: PipelineRun, drawn: Drawn, latents: Tensor, rows: Tensor, decode: Decode | None
) -> Any:
    """Return the samples of a run, some rows of which are replaced by ends of excursions.

    Args:
        latents: Clean latents that take the place of rows, shape (n, *event).
        rows: Shape (n,).
    """
    output = deepcopy(drawn.samples)
    output_type = "latent" if isinstance(output, Tensor) else "np"
    seen = run.as_output(latents, output, output_type, decode)
    if seen is output:
        raise ValueError(
            f'select="best_seen": do not know how {type(run.pipe).__name__} turns latents into '
            "images: pass decode="
        )
    output[rows.numpy()] = seen
    return output


def _final_samples(
    run: PipelineRun, drawn: Drawn, population: Population, output_type: str
) -> Tensor:
    """Return the samples of the particles that live in the end, as the reward sees them."""
    scorer = population.scorer
    if scorer.wants_latents:
        if drawn.latents is None:
            raise ValueError(
                f"{type(run.pipe).__name__} was interrupted before its first step: no latents yet"
            )
        return scorer.decoded(population.of_living(drawn.latents).clone())
    if output_type == "latent":  # which a decoder may write into
        return scorer.decoded(population.of_living(drawn.samples).clone())
    device = "cpu" if drawn.latents is None else drawn.latents.device
    living, samples = population.living(), drawn.samples
    if living is not None:
        samples = rows_of_output(samples, living, "np")
    return channels_first(samples).to(device)
