"""Train the scenes pipeline and its CLIP from scratch: `cd examples && python -m scenes.train`.

Four stages, each seeded, each written as soon as it is done: the autoencoder, CLIP (whose text tower becomes the
pipeline's first text encoder), the FLUX transformer together with its T5 encoder, and last the reward, which is that
CLIP fine-tuned to read relations. About 90 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from . import CALL, CLIP, HERE, PIPELINE
from .draw import SIZE, draw, fits, paint, place
from .grammar import HELD_OUT, TRAIN, Scene, hard_negatives, held_out_prompts, other_relations, training_scene
from .verifier import verdicts

SEED = 0
CONTRASTIVE = HERE / "runs" / "clip"  # CLIP before it becomes the reward
TRAINING_PROMPTS = [scene.prompt for group in TRAIN for scene in group]
LENGTH = CALL["max_sequence_length"]


def log(message: str) -> None:
    print(message, flush=True)
    with open(HERE / "training.log", "a") as file:
        file.write(message + "\n")


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )


def draw_set(number: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """Return images (N, 3, 32, 32), uint8, and their prompts, from the training split."""
    scenes = [training_scene(rng) for _ in range(number)]
    images = np.stack([(draw(scene, rng) * 255).round().astype(np.uint8) for scene in scenes])
    return torch.from_numpy(images), [scene.prompt for scene in scenes]


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 to the [-1, 1] of the autoencoder."""
    return images.float() / 127.5 - 1


# ---- autoencoder -----------------------------------------------------------------------------------------------------


def train_vae(steps: int, batch: int = 48) -> AutoencoderKL:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    log(f"vae: {sum(p.numel() for p in vae.parameters()):,} parameters, {steps} steps of {batch}")
    images, _ = draw_set(12_000, rng)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule, start = cosine(optimizer, steps), time.time()
    for step in range(steps):
        x = pixels(images[torch.randint(len(images), (batch,))])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        loss = error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            size = error.abs().mean() + error.square().mean()
            log(f"vae {step + 1:5d}  L1 + L2 {size:.4f}  {time.time() - start:.0f} s")
    vae.eval().requires_grad_(False)

    images, prompts = draw_set(1000, rng)
    latents = torch.cat([vae.encode(pixels(part)).latent_dist.mode() for part in images.split(100)])
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(100)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    real = verdicts((images / 255).numpy(), prompts).mean()
    again = verdicts((decoded / 2 + 0.5).clamp(0, 1).numpy(), prompts).mean()
    log(f"vae: verifier on 1000 real scenes {real:.1%}, on their reconstructions {again:.1%}")
    vae.save_pretrained(PIPELINE / "vae")
    return vae


# ---- CLIP ------------------------------------------------------------------------------------------------------------


def clip_pixels(images: torch.Tensor) -> torch.Tensor:
    """[0, 1] to CLIP's normalisation."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images - mean) / std


def fit_clip(
    clip: CLIPModel, tokenizer, vae: AutoencoderKL, name: str, steps: int, lr: float, batch_of, matches
) -> None:
    """Train contrastively. `batch_of()` draws scenes; `matches` says which prompts are true of which images."""
    optimizer = torch.optim.AdamW(clip.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule, start = cosine(optimizer, steps), time.time()
    for step in range(steps):
        images, scenes, places = batch_of()
        target = matches(scenes, places)
        target = target / target.sum(1, keepdim=True)
        with torch.no_grad():  # a quarter of the images are seen as the pipeline would decode them
            some = torch.randperm(len(images))[: len(images) // 4]
            latents = vae.encode(images[some] * 2 - 1).latent_dist.sample()
            images[some] = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        logits = clip_logits(clip, tokenizer, images, scenes)
        backwards = target.T / target.T.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, backwards)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % 250 == 0:
            scale, seconds = clip.logit_scale.exp(), time.time() - start
            log(f"{name} {step + 1:5d}  loss {loss:.3f}  logit scale {scale:.1f}  {seconds:.0f} s")


def clip_logits(clip: CLIPModel, tokenizer, images: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    tokens = tokenizer([scene.prompt for scene in scenes], padding="max_length", max_length=16, return_tensors="pt")
    return clip(pixel_values=clip_pixels(images), **tokens).logits_per_image


def draw_all(scenes: list[Scene], rng: np.random.Generator):
    """Return images (N, 3, 32, 32) in [0, 1], their scenes, and where the objects lie."""
    places = [place(scene, rng) for scene in scenes]
    images = np.stack([paint(scene, *where) for scene, where in zip(scenes, places, strict=True)])
    return torch.from_numpy(images), scenes, [centres for centres, _ in places]


def train_clip(vae: AutoencoderKL, steps: int, groups: int = 32) -> None:
    """Train CLIP from scratch on scenes and their near misses; its text tower goes into the pipeline."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED + 1)
    tokenizer = CLIPTokenizer(model_max_length=16).train_new_from_iterator(TRAINING_PROMPTS, vocab_size=400)
    tower = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 96, "intermediate_size": 288}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = tower | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_dim": 64}
    vision = tower | {"image_size": SIZE, "patch_size": 4, "projection_dim": 64}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    log(f"clip: {sum(p.numel() for p in clip.parameters()):,} parameters, {steps} steps of {groups} × 4")

    def batch_of():
        scenes = []
        for _ in range(groups):
            scene = training_scene(rng)
            scenes += [scene, *hard_negatives(scene, rng, 3)]
        return draw_all(scenes, rng)

    def same(scenes, places):
        return torch.tensor([[float(a == b) for a in scenes] for b in scenes])

    fit_clip(clip, tokenizer, vae, "clip", steps, 2e-3, batch_of, same)
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size), tokenizer)
    processor.save_pretrained(CONTRASTIVE)
    clip.half().save_pretrained(CONTRASTIVE)


def train_reward(vae: AutoencoderKL, steps: int, groups: int = 32) -> None:
    """Fine-tune CLIP into the reward: half of its near misses are other relations, and the labels are what is true.

    Fresh from `train_clip` it reads relations at chance, as CLIPs do; the pipeline keeps the text tower it was trained
    with.
    """
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED + 3)
    clip = CLIPModel.from_pretrained(CONTRASTIVE, dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(CONTRASTIVE)
    tokenizer = processor.tokenizer
    log(f"reward: {steps} steps of {groups} × 4")

    def batch_of():
        scenes = []
        for _ in range(groups):
            scene = training_scene(rng)
            others = other_relations(scene, rng, 2) if len(set(scene.objects)) == 2 else []
            scenes += [scene, *others, *hard_negatives(scene, rng, 3 - len(others))]
        return draw_all(scenes, rng)

    def true(scenes, places):
        return torch.tensor([[holds(a, place, b) for b in scenes] for a, place in zip(scenes, places, strict=True)])

    def holds(drawn, place, asked):  # known from how the scene was placed; the verifier has no part in it
        if Counter(drawn.objects) != Counter(asked.objects):
            return 0.0
        centres = [place[drawn.objects.index(kind)] for kind in asked.objects]
        return float(asked.relation is None or fits(asked.relation, *centres))

    fit_clip(clip, tokenizer, vae, "reward", steps, 1e-3, batch_of, true)
    clip.eval()
    scenes = [scene for group in HELD_OUT for scene in group if scene.relation]
    right = {"another relation": 0, "another object": 0}
    with torch.no_grad():
        for scene in scenes:
            for name, near in (("another relation", other_relations), ("another object", hard_negatives)):
                other = near(scene, rng, 1)[0]
                while near is hard_negatives and Counter(other.objects) == Counter(scene.objects):
                    other = near(scene, rng, 1)[0]
                images, pair, _ = draw_all([scene, other], rng)
                logits = clip_logits(clip, tokenizer, images, pair)
                right[name] += int(logits[0, 0] > logits[1, 0])
    shares = ", ".join(f"{name} {number / len(scenes):.1%}" for name, number in right.items())
    log(f"reward: prefers a held-out scene to one with {shares}")
    processor.save_pretrained(CLIP)
    clip.half().save_pretrained(CLIP)


# ---- transformer and T5 ----------------------------------------------------------------------------------------------


def build_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    words = sorted({word for prompt in TRAINING_PROMPTS for word in prompt.split()})
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in words] + [(c, -10.0) for c in ["▁", *letters]]
    tokenizer_2 = T5Tokenizer(vocab=list(dict(pieces).items()), extra_ids=0, model_max_length=LENGTH)
    clip = CLIPModel.from_pretrained(CONTRASTIVE, dtype=torch.float32)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder.eval().requires_grad_(False),
        tokenizer=CLIPTokenizer.from_pretrained(CONTRASTIVE),
        text_encoder_2=T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2), d_model=96, d_kv=24, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0
            )
        ),
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * vae.config.latent_channels,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=96,
            pooled_projection_dim=96,
            axes_dims_rope=(4, 14, 14),
        ),
    )


def accuracy(pipe: FluxPipeline, prompts: list[str], num_inference_steps: int = 20) -> float:
    """Verifier accuracy of plain ODE samples, one for each prompt."""
    generator = torch.Generator().manual_seed(SEED)
    images = pipe(
        prompts, num_inference_steps=num_inference_steps, generator=generator, output_type="np", **CALL
    ).images
    return float(verdicts(images.transpose(0, 3, 1, 2), prompts).mean())


def train_flow(vae: AutoencoderKL, steps: int, batch: int = 64, number: int = 60_000) -> None:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED + 2)
    pipe = build_pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    transformer, t5 = pipe.transformer, pipe.text_encoder_2
    sizes = [sum(p.numel() for p in m.parameters()) for m in (transformer, t5, pipe.text_encoder)]
    log("flow: {:,} + {:,} parameters trained, {:,} frozen (CLIP text), ".format(*sizes) + f"{steps} steps of {batch}")

    images, prompts = draw_set(number, rng)
    with torch.no_grad():
        parts = [vae.encode(pixels(part)).latent_dist for part in images.split(500)]
    means, stds = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "std"))
    vocabulary = ["", *sorted(set(prompts))]
    index = {prompt: i for i, prompt in enumerate(vocabulary)}
    rows = torch.tensor([index[prompt] for prompt in prompts])
    tokens = pipe.tokenizer_2(vocabulary, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = pipe._get_clip_prompt_embeds(vocabulary)
    side = SIZE // pipe.vae_scale_factor // 2
    image_ids = pipe._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    text_ids = torch.zeros(LENGTH, 3)

    parameters = [*transformer.parameters(), *t5.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule, start, losses = cosine(optimizer, steps, warmup=300), time.time(), []
    average = EMAModel(parameters, decay=0.999)
    trial = held_out_prompts(64, seed=1)  # another draw than the benchmark's
    for step in range(steps):
        chosen = torch.randint(number, (batch,))
        latents = means[chosen] + stds[chosen] * torch.randn_like(means[chosen])
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        z = pipe._pack_latents(latents, batch, *latents.shape[1:])
        row = torch.where(torch.rand(batch) < 0.1, 0, rows[chosen])  # 10 % unconditional, for guidance
        sigma = torch.sigmoid(torch.randn(batch))
        noise = torch.randn_like(z)
        x = torch.lerp(z, noise, sigma.view(-1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = transformer(
                hidden_states=x,
                timestep=sigma,
                encoder_hidden_states=t5(tokens[row])[0],
                pooled_projections=pooled[row],
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - z)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        losses.append(loss.item())
        if (step + 1) % 500 == 0 or step + 1 == steps:
            average.store(parameters)
            average.copy_to(parameters)
            right = f"  right {accuracy(pipe, trial):.1%}" if (step + 1) % 1000 == 0 or step + 1 == steps else ""
            save(pipe)
            average.restore(parameters)
            log(f"flow {step + 1:6d}  loss {np.mean(losses[-500:]):.4f}{right}  {time.time() - start:.0f} s")


def save(pipe: FluxPipeline) -> None:
    """Write the pipeline; transformer and autoencoder in half precision, which diffusers loads as float32."""
    pipe.save_pretrained(PIPELINE)
    for name in ("vae", "transformer"):
        half = type(getattr(pipe, name)).from_pretrained(PIPELINE / name, torch_dtype=torch.float16)
        half.register_to_config(_name_or_path=name)  # not the path of the machine it was trained on
        half.save_pretrained(PIPELINE / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stages = ["vae", "clip", "flow", "reward"]
    parser.add_argument("--stages", nargs="+", default=stages, choices=stages)
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--clip-steps", type=int, default=1200)
    parser.add_argument("--flow-steps", type=int, default=14_000)
    parser.add_argument("--reward-steps", type=int, default=1000)
    args = parser.parse_args()
    if "vae" in args.stages:
        (HERE / "training.log").write_text(
            f"seed {SEED}, torch {torch.__version__}, {torch.get_num_threads()} threads\n"
        )
        train_vae(args.vae_steps)
    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae", torch_dtype=torch.float32).requires_grad_(False).eval()
    if "clip" in args.stages:
        train_clip(vae, args.clip_steps)
    if "flow" in args.stages:
        train_flow(vae, args.flow_steps)
    if "reward" in args.stages:
        train_reward(vae, args.reward_steps)


if __name__ == "__main__":
    main()
