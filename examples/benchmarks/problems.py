"""What the benchmarks sample: mixtures with closed forms and the scenes model, behind one interface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from glassflows.flow.sample import Denoiser  # noqa: E402
from glassflows.rewards.images import normalised  # noqa: E402
from oracles import GaussianMixture, reference  # noqa: E402
from scenes import CALL, decoded, load_pipeline, load_reward  # noqa: E402
from scenes.draw import draw  # noqa: E402
from scenes.grammar import parse, training_prompts  # noqa: E402


@dataclass(frozen=True)
class Mixture:
    """A mixture law on the straight path; guidance pulls towards half of its components."""

    name: str
    law: GaussianMixture

    def denoiser(self, number: int, guidance: float = 0.0) -> Denoiser:
        if not guidance:
            return self.law
        half = len(self.law.weights) // 2
        part = GaussianMixture(
            self.law.means[:half], self.law.weights[:half] / self.law.weights[:half].sum(), self.law.std
        )
        return lambda x, t: self.law(x, t) + guidance * (part(x, t) - self.law(x, t))

    def noise(self, number: int, generator: torch.Generator) -> Tensor:
        return torch.randn(number, self.law.means.shape[1], generator=generator, dtype=torch.float64)

    def times(self, num_steps: int) -> list[float]:
        return np.linspace(0, 1, num_steps + 1).tolist()

    def truth(self, number: int, generator: torch.Generator, repeats: int = 1) -> Tensor:
        return self.law.sample(number * repeats, generator)

    def features(self, z: Tensor) -> Tensor:
        return z

    def views(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return what distances are measured in, by title."""
        return {self.name: self.features}


def ring() -> Mixture:
    """Eight narrow components around the origin."""
    angles = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    means = 1.2 * torch.stack([angles.cos(), angles.sin()], 1)
    return Mixture("2-D mixture", GaussianMixture(means, torch.full((8,), 0.125, dtype=torch.float64), 0.12))


def cloud() -> Mixture:
    """Ten components of random means and weights in 16 dimensions."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(10, 16, generator=generator, dtype=torch.float64)
    weights = torch.randn(10, generator=generator, dtype=torch.float64).softmax(0)
    return Mixture("16-D mixture", GaussianMixture(means, weights, 0.3))


def published() -> Mixture:
    """The three-dimensional mixture of the published reference transitions."""
    return Mixture("3-D mixture", reference()[0])


class Scenes:
    """The scenes model as a denoiser of packed latents (N, 16, 16), one training prompt per row."""

    name = "scenes"

    def __init__(self, seed: int = 0) -> None:
        self.pipe = load_pipeline()
        self.seed = seed

    def denoiser(self, number: int, guidance: float = 0.0) -> Denoiser:
        """Return a denoiser of `number` rows, each of its own prompt; repeated rows repeat the prompts."""
        prompts = self.prompts(number)
        with torch.no_grad():
            texts = [self._embed(prompts)] + ([self._embed([""] * number)] if guidance else [])

        @torch.no_grad()
        def denoise(x: Tensor, t: float) -> Tensor:
            repeats = len(x) // number
            conditional, *unconditional = (self._velocity(x, t, text, repeats) for text in texts)
            for plain in unconditional:
                conditional = plain + guidance * (conditional - plain)
            return x - (1 - t) * conditional

        return denoise

    def prompts(self, number: int) -> list[str]:
        """Return the first prompts of the stream of training prompts, the same at every call."""
        return training_prompts(number, self.seed)

    def _embed(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        return self.pipe.encode_prompt(prompts, None, max_sequence_length=CALL["max_sequence_length"])

    def _velocity(self, x: Tensor, t: float, text: tuple[Tensor, Tensor, Tensor], repeats: int) -> Tensor:
        tokens, pooled, token_ids = text
        return self.pipe.transformer(
            hidden_states=x,
            timestep=torch.full((len(x),), 1 - t),
            encoder_hidden_states=tokens.repeat_interleave(repeats, 0),
            pooled_projections=pooled.repeat_interleave(repeats, 0),
            txt_ids=token_ids,
            img_ids=self.pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
            return_dict=False,
        )[0]

    def noise(self, number: int, generator: torch.Generator) -> Tensor:
        return torch.randn(number, 16, 16, generator=generator)

    def times(self, num_steps: int) -> list[float]:
        """Return the grid of the pipeline's own scheduler."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler: Any = self.pipe.scheduler
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(16, *(scheduler.config[key] for key in keys))
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
        return (1 - scheduler.sigmas.double()).tolist()

    @torch.no_grad()
    def truth(self, number: int, generator: torch.Generator, repeats: int = 1) -> Tensor:
        """Return latents of pictures drawn afresh, `repeats` of each of the prompts that `denoiser(number)` has."""
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        prompts = self.prompts(number) * repeats
        pictures = np.stack([draw(parse(prompt), rng) for prompt in prompts])
        vae = self.pipe.vae
        latents = vae.encode(2 * torch.from_numpy(pictures) - 1).latent_dist.sample(generator)
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        return self.pipe._pack_latents(latents, *latents.shape)

    @cached_property
    def reward(self) -> Any:
        return load_reward()

    @torch.no_grad()
    def features(self, z: Tensor) -> Tensor:
        """Return the unit image features of the scenes CLIP."""
        reward = self.reward.load()
        clip, pixels = (
            reward.networks["clip"],
            normalised(decoded(self.pipe, z).to(reward.device), reward.mean, reward.std),
        )
        return normalize(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)).to(z.device)

    def views(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"scenes, CLIP features": self.features, "scenes, latents": lambda z: z}


PROBLEMS: dict[str, Callable[[int], Mixture | Scenes]] = {  # from a seed, which is that of the prompts
    "2-D mixture": lambda seed: ring(),
    "16-D mixture": lambda seed: cloud(),
    "scenes": Scenes,
}
