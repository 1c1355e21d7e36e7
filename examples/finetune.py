"""Distil Feynman-Kac steering into a LoRA: draw from p(z) exp(λ r(z)), train on the draws, sample without steering.

    python examples/finetune.py                one round
    python examples/finetune.py --rounds 3     online: steer the tuned model, train on its draws, steer again …

Draws are kept in a folder (`Rollouts`): an interrupted run does not draw them again. Training is by maximum likelihood,
the flow-matching loss on what `select="sample"` returns, and on a share of plain draws of the untuned model, the
replay. The table is of held-out prompts, by the CLIP score that steers and by the verifier, which nothing is trained
on: plain samples before and after, and what steering adds on top. The LoRA is saved as diffusers loads it.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from glassflows import BestOfN, FeynmanKac, Rollouts, Steerer
from scenes import CALL, load_pipeline, load_reward, quiet
from scenes.distance import distances
from scenes.grammar import hard_prompts, held_out_prompts, parse, training_prompts
from scenes.methods import Population, Spending, feynman_kac, plain, steered
from scenes.verifier import percent_right, verdicts

STEPS = 20  # network calls of each particle
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp"]


# ---- draws -----------------------------------------------------------------------------------------------------------


def prompts_of_four(number: int, seed: int = 1) -> list[str]:
    """Return prompts of four kinds of objects in two relations, of combinations that the model was trained on."""
    return [prompt for prompt in training_prompts(6 * number, seed) if len(set(parse(prompt).kinds)) == 4][:number]


def gather(
    steer: Steerer,
    prompts: list[str],
    folder: Path,
    each: int,
    seed: int,
    select: Literal["sample", "all"] = "sample",
    batch: int = 16,
) -> Rollouts:
    """Return a folder with draws of each prompt; those that are there already are not drawn again."""
    rollouts = Rollouts(folder)
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        key = f"{seed}/{start}/{len(some)}"
        if key in rollouts:
            continue
        generator = torch.Generator().manual_seed(10_000 * seed + start)
        call: dict[str, Any] = {"num_inference_steps": STEPS, "generator": generator, **CALL}
        rollouts.add(steer(some, select=select, num_images_per_prompt=each, **call), key=key)
    return rollouts


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a run beside its draws; draws of other settings are not gone on with."""
    path = folder / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{folder} holds draws of other settings, {path.name}: name another folder by --out")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


# ---- training --------------------------------------------------------------------------------------------------------


def add_lora(pipe: Any, rank: int) -> None:
    """Give the transformer a LoRA, which alone is trained."""
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))


def loss_of(pipe: Any, z: Tensor, prompts: list[str]) -> Tensor:
    """Return the flow-matching loss E |v(z + σ (ε − z), σ) − (ε − z)|² of packed latents z, shape (N, 16, 16)."""
    tokens, pooled = (torch.cat(parts) for parts in zip(*(_text(pipe, prompt) for prompt in prompts), strict=True))
    sigma = torch.sigmoid(torch.randn(len(z), device=z.device) + 0.7)  # as in the model's own training
    noise = torch.randn_like(z)
    velocity = pipe.transformer(
        hidden_states=torch.lerp(z, noise, sigma.view(-1, 1, 1)),
        timestep=sigma,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        txt_ids=torch.zeros(tokens.shape[1], 3, device=z.device),
        img_ids=pipe._prepare_latent_image_ids(1, 4, 4, z.device, z.dtype),
        return_dict=False,
    )[0]
    return (velocity - (noise - z)).square().mean()


@cache
@torch.no_grad()
def _text(pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """Return the embeddings of a prompt by T5 and by CLIP, neither of which is trained."""
    tokens, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=CALL["max_sequence_length"])
    return tokens, pooled


def train(accelerator: Accelerator, pipe: Any, data: list[tuple[Rollouts, int]], steps: int, rate: float) -> float:
    """Train the LoRA for some steps; return the mean loss.

    Args:
        accelerator: Places the parts.
        pipe: The pipeline.
        data: What is trained on, and how many of each are in a batch.
        steps: Number of steps.
        rate: Learning rate at the first step, which falls to 0 by a cosine.
    """
    parameters = [one for one in pipe.transformer.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loaders = [
        DataLoader(rollouts, size, sampler=RandomSampler(rollouts, True, steps * size), collate_fn=rollouts.collate)
        for rollouts, size in data
        if size
    ]
    pipe.transformer, optimizer, *loaders = accelerator.prepare(pipe.transformer, optimizer, *loaders)
    pipe.transformer.train()
    total = 0.0
    for parts in zip(*loaders, strict=True):
        prompts = [prompt for part in parts for prompt in part["prompt"]]
        loss = loss_of(pipe, torch.cat([part["latents"] for part in parts]), prompts)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item() / steps
    pipe.transformer = accelerator.unwrap_model(pipe.transformer).eval()
    return total


# ---- the table -------------------------------------------------------------------------------------------------------


def report(name: str, pipe: Any, reward: Any, prompts: list[str], seed: int) -> None:
    """Print what the pipeline draws, plain and steered: means over prompts ± standard errors."""
    easy = held_out_prompts(len(prompts))
    alone = plain()(pipe, reward, prompts, Spending(4 * STEPS, STEPS), seed)
    steered_too = steered(feynman_kac())(pipe, reward, prompts, Spending(8 * STEPS, STEPS), seed)
    simple = plain()(pipe, reward, easy, Spending(STEPS, STEPS), seed)
    away = torch.from_numpy(distances(pipe.vae, alone.images, prompts))
    cells = [
        _mean(torch.from_numpy(alone.rewards).mean(1)),
        _mean(_right(alone, prompts).mean(1)),
        _mean(away),
        f"{alone.diversity.mean():.3f}",
        _mean(torch.from_numpy(steered_too.rewards[:, 0])),
        _mean(_right(steered_too, prompts)[:, 0]),
        _mean(_right(simple, easy)[:, 0]),
    ]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def _right(population: Population, prompts: list[str]) -> Tensor:
    return torch.from_numpy(percent_right(verdicts, population.images, prompts))


def _mean(values: Tensor) -> str:
    """Return the mean of a value for each prompt ± its standard error."""
    error = float(values.std()) / len(values) ** 0.5
    digits = 1 if values.abs().max() > 10 else 2
    return f"{float(values.mean()):.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=256, help="prompts that are steered in each round")
    parser.add_argument("--draws", type=int, default=4, help="draws that are kept of each prompt's 8 particles")
    parser.add_argument("--scale", type=float, default=1.0, help="λ_r, in units of the reward's own")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--replay", type=float, default=0.25, help="share of plain draws of the untuned model")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=int, default=96, help="held-out prompts of the table")
    parser.add_argument("--out", type=Path, default=Path("out/finetune"))
    args = parser.parse_args()

    quiet()
    torch.manual_seed(args.seed)
    accelerator, start = Accelerator(), time.perf_counter()
    pipe, reward = load_pipeline().to(accelerator.device), load_reward()
    trained, unseen = prompts_of_four(args.prompts * args.rounds), hard_prompts(args.report)
    print("| | plain: reward | right, % | distance | diversity | steered: reward | right, % | easy prompts: right, % |")
    print("|---" * 8 + "|")
    report("untuned", pipe, reward, unseen, args.seed)

    few, folder = round(args.replay * args.batch), args.out / f"seed-{args.seed}"
    check_settings(
        folder, {name: value for name, value in vars(args).items() if name not in ("out", "report", "rounds")}
    )
    before = Steerer(pipe, reward, BestOfN(), args.draws, num_transitions=1)  # moves no particle
    known = training_prompts(args.prompts if few else 0, seed=2)
    replay = gather(before, known, folder / "replay", args.draws, 0, select="all")
    strategy = FeynmanKac(reward_scale=args.scale * reward.reward_scale)
    for number in range(args.rounds):
        prompts = trained[number * args.prompts : (number + 1) * args.prompts]
        steer = Steerer(pipe, reward, strategy, 8)
        drawn = gather(steer, prompts, folder / f"round-{number}", args.draws, 1 + args.seed + 1000 * number)
        if not number:
            add_lora(pipe, args.rank)
        loss = train(accelerator, pipe, [(drawn, args.batch - few), (replay, few)], args.steps, args.rate)
        report(f"round {number + 1}", pipe, reward, unseen, args.seed)
        seconds = time.perf_counter() - start
        print(f"(loss {loss:.4f}; {len(drawn)} draws; {seconds:.0f} s so far)", flush=True)
    layers: Any = get_peft_model_state_dict(pipe.transformer)
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    print(f"wrote {folder}: pipe.load_lora_weights(…)")


if __name__ == "__main__":
    main()
