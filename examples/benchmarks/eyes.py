"""What cheap eyes see: rewards of predictions by a tiny decoder or at a smaller size, against the pipeline's own.

    OMP_NUM_THREADS=1 python examples/benchmarks/eyes.py --prompts 64

The tiny decoder, an AutoencoderTiny, learns here to decode as the scenes' own autoencoder does, in a minute or two.
Rounding, such as that of more threads, makes it another one, which agrees more or less (docs/rewards.md).
Particles are drawn unmoved, the same for all eyes, and scored at every boundary: r is the correlation of these rewards
within a prompt with those of the pipeline's own eyes, and with the final rewards. Then each steers. Last, seconds of
decoders of public size, with random weights. Three quarters of an hour on one core.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from glassflows import FeynmanKacSteerer
from scenes import CALL, load_pipeline, load_reward, quiet
from scenes.draw import draw
from scenes.grammar import hard_prompts, parse, training_prompts
from scenes.verifier import verdicts

STEPS, TRANSITIONS = 10, 5
EYES = ("own", "tiny", "half the size", "tiny, half the size", "tiny, random weights")


def tiny_decoder() -> AutoencoderTiny:
    """Return a decoder of the scenes' latents with random weights, a fifth of the size of their own."""
    torch.manual_seed(0)
    blocks: dict[str, Any] = {f"{part}_block_out_channels": (24,) * 3 for part in ("encoder", "decoder")}
    blocks |= {f"num_{part}_blocks": (1, 1, 1) for part in ("encoder", "decoder")}
    return AutoencoderTiny(latent_channels=4, **blocks).eval()


def taught(vae: Any, steps: int, batch: int = 32) -> AutoencoderTiny:
    """Return a tiny decoder that has learnt to decode raw latents of scenes as their own autoencoder does."""
    student: Any = tiny_decoder()
    rng = np.random.default_rng(0)
    scenes = [parse(prompt) for prompt in training_prompts(2048, seed=7)]
    images = torch.from_numpy(np.stack([draw(scene, rng) for scene in scenes])).float() * 2 - 1
    with torch.no_grad():
        z = torch.cat([vae.encode(some).latent_dist.mode() for some in images.split(256)])
        targets = torch.cat([vae.decode(some).sample for some in z.split(256)])
    latents = (z - vae.config.shift_factor) * vae.config.scaling_factor
    loss = latents.new_tensor(float("nan"))
    optimizer = torch.optim.Adam(student.decoder.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(latents), (batch,))
        loss = (student.decode(latents[rows]).sample - targets[rows]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"tiny decoder: mean difference {float(loss.detach()):.4f} of 2 after {steps} steps", flush=True)
    return student.requires_grad_(False)


def options(eyes: str, taught_one: AutoencoderTiny, random_one: AutoencoderTiny) -> dict[str, Any]:
    """Return the options of a steerer with some eyes."""
    vae = {"tiny, random weights": random_one}.get(eyes, taught_one if "tiny" in eyes else None)
    return {"preview_vae": vae, "preview_size": CALL["height"] // 2 if "half" in eyes else None}


def within(one: Tensor, other: Tensor) -> float:
    """Return the correlation of rewards (P, K) within a prompt."""
    one, other = (rewards - rewards.mean(1, keepdim=True) for rewards in (one, other))
    return float((one * other).sum() / (one.square().sum() * other.square().sum()).sqrt())


def agreement(pipe: Any, reward: Any, prompts: list[str], every: dict[str, dict[str, Any]]) -> None:
    """Print how the rewards of the same predictions agree, and what they tell of the final ones."""
    scored = {}
    for name, eyes in every.items():
        steer = FeynmanKacSteerer(pipe, reward, 8, num_transitions=TRANSITIONS, ess_threshold=0.0, start=0.0, **eyes)
        generator = torch.Generator().manual_seed(0)
        scored[name] = steer(prompts, num_inference_steps=STEPS, generator=generator, output_type="np", **CALL)
    own = scored["own"]
    done = [f"{k} of {TRANSITIONS}" for k in own.transitions]
    print(f"\n| eyes | {' | '.join(f'r with own, {one}' for one in done)} | ", end="")
    print(
        f"{' | '.join(f'r with final, {one}' for one in done)} | decode, ms an image |\n|{'---|' * (2 + 2 * len(done))}"
    )
    for name, out in scored.items():
        rows = [within(mine, theirs) for mine, theirs in zip(out.scored, own.scored, strict=True)]
        rows += [within(mine, own.rewards) for mine in out.scored]
        ms = 1000 * out.ledger.seconds["decode"] / out.ledger.decodes
        print(f"| {name} | {' | '.join(f'{row:.3f}' for row in rows)} | {ms:.2f} |", flush=True)


def steering(pipe: Any, reward: Any, prompts: list[str], every: dict[str, dict[str, Any]], seeds: int) -> None:
    """Print what steering by each is worth, 16 particles of 10 calls, plain and twisted."""
    print("\n| eyes | best reward | right, % | twisted: best reward | right, % |\n|---|---|---|---|---|")
    rows: dict[str, list[list[float]]] = {name: [] for name in every}
    for seed in range(seeds):
        for name, eyes in every.items():
            row = []
            for twist in (0.0, 0.5):
                steer = FeynmanKacSteerer(pipe, reward, 16, num_transitions=TRANSITIONS, twist=twist, **eyes)
                generator = torch.Generator().manual_seed(seed)
                call: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np", "select": "best", **CALL}
                out = steer(prompts, generator=generator, **call)
                right = verdicts(out.images.transpose(0, 3, 1, 2), prompts)
                row += [float(out.image_rewards.mean()), 100 * float(right.mean())]
            rows[name].append(row)
    for name, every_seed in rows.items():
        paired = np.array(every_seed) - np.array(rows["own"])
        spread = paired.std(0, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.zeros(4)
        cells = [
            f"{mean:.2f} ({difference:+.2f} ± {error:.2f})" if name != "own" else f"{mean:.2f}"
            for mean, difference, error in zip(np.mean(every_seed, 0), paired.mean(0), spread, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def seconds(side: int) -> None:
    """Print what decoding takes at public size, FLUX.1's autoencoder and TAEF1's architecture, random weights."""
    widths: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    blocks: dict[str, Any] = {f"{way}_block_types": (f"{way.title()}{part}Block2D",) * 4 for way, part in WAYS}
    own: Any = AutoencoderKL(**widths, **blocks, use_quant_conv=False, use_post_quant_conv=False).eval()
    tiny: Any = AutoencoderTiny(latent_channels=16).eval()
    print(f"\n| decoder, one image of {side} px | parameters, M | seconds | with its gradient |\n|---|---|---|---|")
    for name, vae in (("FLUX.1's", own), ("TAEF1's", tiny)):
        z = torch.randn(1, 16, side // 8, side // 8, requires_grad=True)
        taken = []
        for gradient in (False, True):
            start = time.perf_counter()
            with torch.set_grad_enabled(gradient):
                image = vae.requires_grad_(False).decode(z).sample
                if gradient:
                    torch.autograd.grad(image.sum(), z)
            taken.append(time.perf_counter() - start)
        number = sum(one.numel() for one in vae.decoder.parameters()) / 1e6
        print(f"| {name} | {number:.1f} | {taken[0]:.2f} | {taken[1]:.2f} |", flush=True)


WAYS = (("down", "Encoder"), ("up", "Decoder"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teach", type=int, default=2000, help="steps of the tiny decoder (%(default)s)")
    parser.add_argument("--side", type=int, default=512, help="pixels of what is timed; 0 for none (%(default)s)")
    args = parser.parse_args()
    quiet()
    pipe, reward, prompts = load_pipeline(), load_reward(), hard_prompts(args.prompts)
    taught_one, random_one = taught(pipe.vae, args.teach), tiny_decoder()
    every = {name: options(name, taught_one, random_one) for name in EYES}
    agreement(pipe, reward, prompts, every)
    if args.seeds:
        steering(pipe, reward, prompts, every, args.seeds)
    if args.side:
        seconds(args.side)


if __name__ == "__main__":
    main()
