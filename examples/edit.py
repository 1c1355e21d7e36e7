"""Edit pictures of scenes under a reward, "the red circle becomes blue, the rest stays": docs/editing.md.

    python examples/edit.py     a table and out/editing.png

Each edit gives one object of a drawn scene another colour. All methods start from the noised picture (SDEdit), spend
the same network calls on 8 particles, and return the one of the highest reward: the CLIP score of the new prompt, plus
the picture's `Resemblance`. How strongly the picture is noised (`strength`), and λ_r, every method chooses on 24 edits
of its own; the table is of 48 others. "Right" is the verifier's verdict on the new prompt, "rest" the root-mean-square
difference to the picture outside the object, in percent; neither steers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline
from torch import Tensor

from glassflows import BestOfN, FeynmanKac, GLASSScheduler, Steerer
from glassflows.rewards import Resemblance, Sum
from scenes import CALL, load_pipeline, load_reward, quiet
from scenes.draw import coverage, paint, place
from scenes.grammar import COLOURS, Object, Scene, training_scene
from scenes.verifier import verdicts

PARTICLES, CALLS = 8, 12
STRENGTHS = (0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
SCALES = (0.3, 1.0, 3.0)


# ---- what is to be done ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edits:
    """N edits: one object of a picture takes another colour.

    Args:
        prompts: What the edited pictures are to show.
        before: What the pictures show.
        pictures: Shape (N, 3, 32, 32), in [0, 1].
        objects: 1 where the object is that changes, with a margin of a pixel, shape (N, 1, 32, 32).
    """

    prompts: list[str]
    before: list[str]
    pictures: Tensor
    objects: Tensor

    def __getitem__(self, rows: slice) -> Edits:
        return Edits(self.prompts[rows], self.before[rows], self.pictures[rows], self.objects[rows])

    def each(self, number: int, pipe: Any) -> dict[str, Any]:
        """Return prompts and pictures, `number` of each in a row, as keyword arguments of a pipeline."""
        prompts = [prompt for prompt in self.prompts for _ in range(number)]
        given: dict[str, Any] = {"prompt": prompts, "image": self.pictures.repeat_interleave(number, 0)}
        if isinstance(pipe, FluxInpaintPipeline):
            given["mask_image"] = self.objects.repeat_interleave(number, 0)
        return given


def drawn_edits(number: int, seed: int) -> Edits:
    """Draw edits of scenes of two or three kinds; no two ask for the same."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < number:
        scene = training_scene(rng, (0, 0, 0.4, 0.6, 0))
        which, colour = rng.integers(len(scene.objects)), [*COLOURS][rng.integers(len(COLOURS))]
        things = list(scene.objects)
        things[which] = Object(colour, things[which].shape, things[which].size)
        new = Scene(tuple(things), scene.relations)
        if new.prompt in found or not new.is_possible or len({*new.kinds, *scene.kinds}) != len(things) + 1:
            continue
        centres, radii = place(scene, rng)
        (x, y), radius = centres[which], radii[which] + 1
        there = coverage(things[which].shape, x, y, radius) > 0
        found[new.prompt] = scene.prompt, paint(scene, centres, radii), there
    before, pictures, objects = zip(*found.values(), strict=True)
    masks = torch.from_numpy(np.stack(objects)).float()[:, None]
    return Edits([*found], [*before], torch.from_numpy(np.stack(pictures)), masks)


# ---- methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a method may choose: how strongly the picture is noised, and λ_r."""

    strength: float = 0.4
    scale: float = 1.0

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline, of whose steps a share `strength` is made."""
        return {"strength": self.strength, "num_inference_steps": round(CALLS / self.strength), **CALL}


Method = Callable[[Any, Edits, Setting, int], Tensor]
"""Returns one picture for each edit (N, 3, 32, 32), from (pipeline, edits, setting, seed)."""


def reward_of(edits: Edits) -> Sum:
    return Sum(load_reward(), Resemblance(dict(zip(edits.prompts, edits.pictures[:, None], strict=True))))


def native(pipe: Any, edits: Edits, setting: Setting, seed: int) -> Tensor:
    """The pipeline as it is (SDEdit by the ODE), the best of 8."""
    given, generator = edits.each(PARTICLES, pipe), torch.Generator().manual_seed(seed)
    images = pipe(**given, generator=generator, output_type="pt", **setting.call).images
    best = reward_of(edits)(images, given["prompt"]).view(-1, PARTICLES).argmax(1)
    return images.view(-1, PARTICLES, *images.shape[1:])[torch.arange(len(best)), best]


def steered(strategy: Callable[[float], Any], first: str = "posterior", transitions: int = 3, **options: Any) -> Method:
    """Particles with GLASS transitions, of which the first draws from p(x_t′ | x_t), too, or is the ODE."""

    def edit(pipe: Any, edits: Edits, setting: Setting, seed: int) -> Tensor:
        before = pipe.scheduler
        pipe.scheduler = GLASSScheduler.from_scheduler(before, first_transition=first, num_transitions=transitions)
        try:
            steer = Steerer(pipe, reward_of(edits), strategy(setting.scale), PARTICLES, **options)
            generator, given = torch.Generator().manual_seed(seed), edits.each(1, pipe)
            call = {"select": "best", "generator": generator, "output_type": "pt", **setting.call}
            return steer(**given, **call).images
        finally:
            pipe.scheduler = before

    return edit


def best_of(scale: float) -> BestOfN:
    return BestOfN()


def feynman_kac(scale: float) -> FeynmanKac:
    return FeynmanKac(reward_scale=scale)


METHODS: dict[str, tuple[type, Method, bool]] = {  # of which pipeline, and whether it has a λ_r
    "img2img, best of 8": (FluxImg2ImgPipeline, native, False),
    "img2img, DDPM ancestral, best of 8": (FluxImg2ImgPipeline, steered(best_of, "ode", CALLS), False),
    "img2img, FK, ODE first": (FluxImg2ImgPipeline, steered(feynman_kac, "ode"), True),
    "posterior, best of 8": (FluxImg2ImgPipeline, steered(best_of), False),
    "posterior, FK": (FluxImg2ImgPipeline, steered(feynman_kac), True),
    "posterior, FK, twisted": (FluxImg2ImgPipeline, steered(feynman_kac, twist=1.0), True),
    "inpaint, best of 8": (FluxInpaintPipeline, native, False),
    "inpaint, posterior, FK, twisted": (FluxInpaintPipeline, steered(feynman_kac, twist=1.0), True),
}


# ---- the table -------------------------------------------------------------------------------------------------------


def chosen(pipe: Any, method: Method, edits: Edits, has_scale: bool) -> Setting:
    """Return the setting of the highest mean reward: strength first, then λ_r."""
    reward, setting = reward_of(edits), Setting()

    def mean(one: Setting) -> float:
        return float(reward(method(pipe, edits, one, 0), edits.prompts).mean())

    setting = max((replace(setting, strength=one) for one in STRENGTHS), key=mean)
    return max((replace(setting, scale=one) for one in SCALES), key=mean) if has_scale else setting


def measures(edits: Edits, images: Tensor) -> dict[str, Tensor]:
    """Return reward, verdict in percent and distance of the rest for each edit, shape (N,)."""
    right = torch.from_numpy(verdicts(images.numpy(), edits.prompts)).double()
    return {
        "reward": reward_of(edits)(images, edits.prompts).double(),
        "right": 100 * right,
        "rest": -torch.stack(
            [
                Resemblance(picture[None], 1 - thing[None])(image[None])[0]
                for picture, thing, image in zip(edits.pictures, edits.objects, images, strict=True)
            ]
        ).double(),
    }


def sheet(edits: Edits, shown: dict[str, Tensor], path: Path) -> None:
    """Write one picture: a row for each edit, the picture before and what the methods made of it."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    columns = {"before": edits.pictures, **shown}
    figure, axes = plt.subplots(
        len(edits.prompts), len(columns), figsize=(1.9 * len(columns) + 2, 2.1 * len(edits.prompts))
    )
    for j, (name, images) in enumerate(columns.items()):
        right = verdicts(images.numpy(), edits.before if name == "before" else edits.prompts)
        axes[0, j].set_title(name.replace(", ", "\n"), fontsize=9)
        for i, axis in enumerate(axes[:, j]):
            colour = "#1a7f37" if right[i] else "#c62828"
            axis.imshow(images[i].movedim(0, -1), interpolation="bicubic")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2)
    for i, (old, new) in enumerate(zip(edits.before, edits.prompts, strict=True)):
        axes[i, 0].set_ylabel(
            f"{old}\n→ {new}".replace(" and ", "\nand "), rotation=0, ha="right", va="center", fontsize=8
        )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=48)
    parser.add_argument("--choosing", type=int, default=24, help="edits on which methods choose")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/editing.png"))
    args = parser.parse_args()

    quiet()
    components = load_pipeline().components
    everything = drawn_edits(args.edits + args.choosing, seed=0)
    edits, first = everything[: args.edits], everything[args.edits :]
    print("| | strength | λ | reward | right, % | rest, % |\n|---|---|---|---|---|---|")
    shown, base = {}, None
    for name, (cls, method, has_scale) in METHODS.items():
        pipe = cls(**components)
        pipe.set_progress_bar_config(disable=True)
        setting = chosen(pipe, method, first, has_scale)
        runs = [method(pipe, edits, setting, 1 + seed) for seed in range(args.seeds)]
        found = [measures(edits, images) for images in runs]
        means = {key: torch.stack([one[key] for one in found]).mean(0) for key in found[0]}
        base = base or means
        cells = [f"{setting.strength}", f"{setting.scale}" if has_scale else ""]
        for key, value in means.items():
            gain = value - base[key]
            cells.append(f"{value.mean():.2f} ({gain.mean():+.2f} ± {gain.std() / math.sqrt(len(gain)):.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        shown[name] = runs[0][:5]
    sheet(edits[:5], shown, args.out)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
