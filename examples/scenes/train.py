"""Train the scenes pipeline and its CLIP from scratch: `cd examples && python -m scenes.train`.

Stages are seeded, can be interrupted, and write what they make: `vae`, the autoencoder; `clip`, whose text tower
becomes the pipeline's first text encoder; `text`, in which T5 learns to read; `flow`, the transformer together with T5;
`reward`, which is that CLIP fine-tuned to read relations. `flow-four` and `reward-four` go on with prompts of four
kinds. About four hours on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

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
from .draw import SIZE, draw, holds, paint, place
from .grammar import (
    COLOURS,
    MIX,
    RELATIONS,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    hard_prompts,
    held_out_prompts,
    near_miss,
    parse,
    training_prompts,
    training_scene,
)
from .verifier import verdicts

SEED = 0
PARSER = HERE / "runs" / "t5"  # T5 before it conditions images
CONTRASTIVE = HERE / "runs" / "clip"  # CLIP before it becomes the reward
LENGTH = CALL["max_sequence_length"]
CLIP_LENGTH = LENGTH + 2
PAIRS, THREE = (0.05, 0.10, 0.85, 0.0, 0.0), (0.10, 0.20, 0.25, 0.45, 0.0)  # what is learnt before `MIX`
FOUR = (0.04, 0.08, 0.13, 0.25, 0.50)  # what the reward learns last
PAIRS_FIRST = 1 / 3  # of a stage


def log(message: str) -> None:
    print(message, flush=True)
    with open(HERE / "training.log", "a") as file:
        file.write(message + "\n")


class Run:
    """A stage that can be interrupted: what it has reached is kept beside the weights, and taken up again.

    Args:
        name: The stage's.
        parts: What has a state, by name: modules, optimizers, schedules.
        rng: The generator of its data.
    """

    def __init__(self, name: str, parts: dict[str, Any], rng: np.random.Generator) -> None:
        self.path, self.parts, self.rng = HERE / "runs" / f"{name}.pt", parts, rng
        self.step, self.losses, self.seconds, self.since = 0, [], 0.0, time.time()
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            for key, part in parts.items():
                part.load_state_dict(saved[key])
            torch.set_rng_state(saved["torch"])
            rng.bit_generator.state = json.loads(saved["numpy"])
            self.step, self.seconds = saved["step"], saved["seconds"]

    def done(self, loss: float, every: int) -> bool:
        """Count a step; return whether it was a multiple of `every`, at which all is kept."""
        self.step += 1
        self.losses = [*self.losses[1 - every :], loss]
        if self.step % every:
            return False
        self.path.parent.mkdir(exist_ok=True)
        states = {key: part.state_dict() for key, part in self.parts.items()}
        rngs = {"torch": torch.get_rng_state(), "numpy": json.dumps(self.rng.bit_generator.state)}
        torch.save(states | rngs | {"step": self.step, "seconds": self.elapsed}, self.path)
        return True

    @property
    def elapsed(self) -> float:
        return self.seconds + time.time() - self.since

    @property
    def mean_loss(self) -> float:
        return float(np.mean(self.losses))

    @property
    def time(self) -> str:
        return f"{self.elapsed:.0f} s"


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )


def draw_set(number: int, rng: np.random.Generator, mix: tuple[float, ...] = MIX) -> tuple[torch.Tensor, list[str]]:
    """Return images (N, 3, 32, 32), uint8, and their prompts, from the training split."""
    scenes = [training_scene(rng, mix) for _ in range(number)]
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


def clip_logits(clip: CLIPModel, tokenizer, images: torch.Tensor, scenes: list[Scene]) -> torch.Tensor:
    """Return the logits (images, scenes)."""
    prompts = [scene.prompt for scene in scenes]
    tokens = tokenizer(prompts, padding="max_length", max_length=CLIP_LENGTH, return_tensors="pt")
    return clip(pixel_values=clip_pixels(images), **tokens).logits_per_image


def build_clip(dimensions: int) -> tuple[CLIPModel, CLIPProcessor]:
    tokenizer = CLIPTokenizer(model_max_length=CLIP_LENGTH)
    tokenizer = tokenizer.train_new_from_iterator(training_prompts(5000, SEED), vocab_size=400)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    tower = {"num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": dimensions}
    text = {"hidden_size": 96, "intermediate_size": 288, "max_position_embeddings": CLIP_LENGTH}
    vision = {"hidden_size": 128, "intermediate_size": 384, "image_size": SIZE, "patch_size": 4}
    text |= tower | ids | {"vocab_size": len(tokenizer)}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | tower, projection_dim=dimensions))
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    return clip, CLIPProcessor(images, tokenizer)


def scenes_and_near_misses(groups: int, mix: tuple[float, ...], rng: np.random.Generator) -> list[Scene]:
    """Return training scenes, each followed by three of its near misses."""
    scenes = []
    for _ in range(groups):
        scene = training_scene(rng, mix)
        scenes += [scene, *(training_near_miss(scene, rng) for _ in range(3))]
    return scenes


def training_near_miss(scene: Scene, rng: np.random.Generator) -> Scene:
    while (near := near_miss(scene, rng)).is_held_out:
        pass
    return near


def truths(asked: list[Scene], drawn: list[Scene], places: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """Return which captions (columns) are true of the images (rows), known from how these were placed."""
    kinds = [[tuple(sorted(scene.kinds)) for scene in scenes] for scenes in (drawn, asked)]
    return torch.tensor(
        [
            [float(mine == other and holds(one, scene, *where)) for one, other in zip(asked, kinds[1], strict=True)]
            for scene, where, mine in zip(drawn, places, kinds[0], strict=True)
        ]
    )


def train_clip(vae: AutoencoderKL, name: str, steps: int, folder: Path, groups: int = 24, captions: int = 1) -> None:
    """Train CLIP contrastively on scenes and near misses; labels are what is true. Stages go on where the last ended.

    The text tower of the `clip` stage becomes the pipeline's, and the last stage's CLIP the reward. The first third of
    `reward` shows mostly pairs: on the whole language from the start it read relations at chance after 1000 steps.

    Args:
        groups: Scenes of a batch, each with three near misses.
        captions: Further near misses of each, without images.
    """
    torch.manual_seed(SEED)
    rng = np.random.default_rng([SEED, *name.encode()])
    clip, processor = build_clip(64 if name == "clip" else 128)
    if name == "reward":  # it has projections of its own
        before = CLIPModel.from_pretrained(CONTRASTIVE, dtype=torch.float32).state_dict()
        clip.load_state_dict({key: value for key, value in before.items() if "projection" not in key}, strict=False)
    elif name == "reward-four":
        clip.load_state_dict(CLIPModel.from_pretrained(CLIP, dtype=torch.float32).state_dict())
    tokenizer = processor.tokenizer
    rate = {"clip": 1.5e-3, "reward": 1e-3, "reward-four": 8e-4}[name]
    optimizer = torch.optim.AdamW(clip.parameters(), lr=rate, weight_decay=0.05, fused=True)
    schedule = cosine(optimizer, steps)
    run = Run(name, {"model": clip, "optimizer": optimizer, "schedule": schedule}, rng)
    if not run.step:
        log(f"{name}: {sum(p.numel() for p in clip.parameters()):,} parameters, {steps} steps of {groups} × 4 images")
    while run.step < steps:
        first = name == "reward" and run.step < PAIRS_FIRST * steps
        scenes = scenes_and_near_misses(groups, PAIRS if first else FOUR if name == "reward-four" else THREE, rng)
        places = [place(scene, rng) for scene in scenes]
        images = torch.from_numpy(np.stack([paint(s, *where) for s, where in zip(scenes, places, strict=True)]))
        asked = scenes + [training_near_miss(scene, rng) for scene in scenes for _ in range(captions)]
        target = truths(asked, scenes, places)
        with torch.no_grad():  # a quarter of the images are seen as the pipeline would decode them
            some = torch.randperm(len(images))[: len(images) // 4]
            latents = vae.encode(images[some] * 2 - 1).latent_dist.sample()
            images[some] = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        logits = clip_logits(clip, tokenizer, images, asked)
        forwards, backwards = (share / share.sum(1, keepdim=True).clamp(min=1) for share in (target, target.T))
        loss = (F.cross_entropy(logits, forwards) + F.cross_entropy(logits.T, backwards)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        if run.done(loss.item(), every=250):
            if run.step % 1000 == 0:
                ranks(clip, tokenizer, f"{name} {run.step:5d}")
            log(f"{name} {run.step:5d}  loss {run.mean_loss:.3f}  logit scale {clip.logit_scale.exp():.1f}  {run.time}")
    clip.eval()
    ranks(clip, tokenizer, name)
    processor.save_pretrained(folder)
    clip.half().save_pretrained(folder)


@torch.no_grad()
def ranks(clip: CLIPModel, tokenizer, name: str) -> None:
    """Log how often a hard prompt that was held out scores a scene of its own above a near miss that is wrong."""
    rng = np.random.default_rng(SEED)
    above = {}
    for prompts, number in ((held_out_prompts, 200), (hard_prompts, 1000)):
        wins = []
        for prompt in prompts(number, seed=2):
            scene = parse(prompt)
            while holds(scene, near := near_miss(scene, rng), *(where := place(near, rng))):
                pass
            images = np.stack([draw(scene, rng), paint(near, *where)])
            logits = clip_logits(clip, tokenizer, torch.from_numpy(images), [scene])
            wins.append(bool(logits[0, 0] > logits[1, 0]))
        above[prompts.__name__] = np.mean(wins)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in above.items())
    log(f"{name}: scores a right scene above a near miss: {shares}")


# ---- T5 --------------------------------------------------------------------------------------------------------------


def build_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -1.0) for word in sorted(WORDS)] + [(c, -10.0) for c in ["▁", *letters]]
    tokenizer = T5Tokenizer(vocab=list(dict(pieces).items()), extra_ids=0, model_max_length=LENGTH)
    config = {"d_model": 96, "d_kv": 24, "d_ff": 256, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **config)), tokenizer


PARSED = {"colour": COLOURS, "size": SIZES, "place": range(4), "number": range(4), "one": RELATIONS, "two": RELATIONS}


def parsed(scene: Scene) -> dict[int, list[int]]:
    """Return, by the place of each shape's word, what a reader knows of the object there; 0 for what is not said.

    Its colour, size, place in the sentence and number, and the relations, at most two, that it is in.
    """
    nouns = [i for i, word in enumerate(scene.prompt.split()) if word.removesuffix("s") in SHAPES]
    labels = {}
    for noun, (index, thing) in zip(nouns, enumerate(scene.objects), strict=False):
        size = SIZES.index(thing.size) + 1 if thing.size else 0
        near = [RELATIONS.index(relation) + 1 for one, relation, other in scene.related if index in (one, other)]
        number = len(scene.objects) - 1 if scene.is_count else 0
        labels[noun] = [list(COLOURS).index(thing.colour) + 1, size, index + 1, number + 1, *near, 0, 0][:6]
    return labels


def train_text(steps: int, batch: int = 256) -> None:
    """Teach T5 to read before it conditions images, as public ones have: what is said of an object, at its word."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng([SEED, *b"text"])
    t5, tokenizer = build_t5()
    heads = torch.nn.ModuleList([torch.nn.Linear(96, len(values) + 1) for values in PARSED.values()])
    both = torch.nn.ModuleList([t5, heads])
    optimizer = torch.optim.AdamW(both.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = cosine(optimizer, steps)
    run = Run("text", {"model": both, "optimizer": optimizer, "schedule": schedule}, rng)
    log(f"text: {sum(p.numel() for p in t5.parameters()):,} parameters, {steps} steps of {batch}")
    while run.step < steps:
        scenes = [training_scene(rng, THREE) for _ in range(batch)]
        prompts = [scene.prompt for scene in scenes]
        tokens = tokenizer(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        labels = [(row, *item) for row, scene in enumerate(scenes) for item in parsed(scene).items()]
        rows, places, wanted = (torch.tensor(part) for part in zip(*labels, strict=True))
        hidden = t5(tokens)[0][rows, places]
        logits = [head(hidden) for head in heads]
        loss = torch.stack([F.cross_entropy(one, target) for one, target in zip(logits, wanted.T, strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if run.done(loss.item(), every=250):
            right = torch.stack([one.argmax(1) == target for one, target in zip(logits, wanted.T, strict=True)]).all(0)
            log(f"text {run.step:5d}  loss {run.mean_loss:.4f}  objects read {right.float().mean():.1%}  {run.time}")
    t5.save_pretrained(PARSER)


# ---- transformer ------------------------------------------------------------------------------------------------


def build_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    _, tokenizer_2 = build_t5()
    clip = CLIPModel.from_pretrained(CONTRASTIVE, dtype=torch.float32)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder.eval().requires_grad_(False),
        tokenizer=CLIPTokenizer.from_pretrained(CONTRASTIVE),
        text_encoder_2=T5EncoderModel.from_pretrained(PARSER),
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


@torch.no_grad()
def latent_set(
    vae: AutoencoderKL, name: str, number: int, mix: tuple[float, ...]
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return means and standard deviations of the latents of training scenes and their prompts, kept between runs."""
    path = HERE / "runs" / f"latents-{name}.pt"
    if not path.exists():
        images, prompts = draw_set(number, np.random.default_rng([SEED, *name.encode()]), mix)
        parts = [vae.encode(pixels(part)).latent_dist for part in images.split(500)]
        means, stds = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "std"))
        path.parent.mkdir(exist_ok=True)
        torch.save((means, stds, prompts), path)
    return torch.load(path, weights_only=True)


def train_flow(vae: AutoencoderKL, name: str, steps: int, batch: int = 64, number: int = 80_000) -> None:
    """Train the transformer and T5, from scratch in stage `flow`.

    Its first third shows pairs in relations, mostly at high noise, where it is decided what lies where; half of the
    rows have no pooled text. Without this, and with a T5 that had not read before, the transformer went by the pooled
    text alone, and relations came out at random however long it was trained.
    """
    torch.manual_seed(SEED)
    pipe = build_pipeline(vae)
    if name == "flow-four":
        for part in ("transformer", "text_encoder_2"):
            before = type(getattr(pipe, part)).from_pretrained(PIPELINE / part)
            getattr(pipe, part).load_state_dict(before.state_dict())
    pipe.set_progress_bar_config(disable=True)
    transformer, t5 = pipe.transformer, pipe.text_encoder_2
    parameters = [*transformer.parameters(), *t5.parameters()]
    rate = {"flow": 1e-3, "flow-four": 3e-4}[name]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule, average = (
        cosine(optimizer, steps, warmup=200 if name == "flow" else 50),
        EMAModel(parameters, decay=0.999),
    )
    parts = {"transformer": transformer, "t5": t5, "optimizer": optimizer, "schedule": schedule, "average": average}
    run = Run(name, parts, np.random.default_rng(SEED))
    if not run.step:
        sizes = [sum(p.numel() for p in m.parameters()) for m in (transformer, t5, pipe.text_encoder)]
        log(name + ": {:,} + {:,} parameters trained, {:,} frozen (CLIP text), ".format(*sizes) + f"{steps} × {batch}")

    means, stds, prompts = latent_set(vae, name, number, THREE if name == "flow" else MIX)
    vocabulary = ["", *sorted(set(prompts))]
    index = {prompt: i for i, prompt in enumerate(vocabulary)}
    rows = torch.tensor([index[prompt] for prompt in prompts])
    pairs = torch.tensor([i for i, prompt in enumerate(prompts) if len(parse(prompt).relations) == 1])
    tokens = pipe.tokenizer_2(vocabulary, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = pipe._get_clip_prompt_embeds(vocabulary)
    side = SIZE // pipe.vae_scale_factor // 2
    image_ids = pipe._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    text_ids = torch.zeros(LENGTH, 3)
    trials = {"one or two kinds": held_out_prompts(64, seed=1), "hard": hard_prompts(128, seed=1)}
    while run.step < steps:
        first = name == "flow" and run.step < PAIRS_FIRST * steps
        chosen = pairs[torch.randint(len(pairs), (batch,))] if first else torch.randint(number, (batch,))
        latents = means[chosen] + stds[chosen] * torch.randn_like(means[chosen])
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        z = pipe._pack_latents(latents, batch, *latents.shape[1:])
        row = torch.where(torch.rand(batch) < 0.1, 0, rows[chosen])  # 10 % unconditional, for guidance
        sigma = torch.sigmoid(torch.randn(batch) + (2.0 if first else 0.7))  # where it is decided what lies where
        noise = torch.randn_like(z)
        x = torch.lerp(z, noise, sigma.view(-1, 1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = transformer(
                hidden_states=x,
                timestep=sigma,
                encoder_hidden_states=t5(tokens[row])[0],
                pooled_projections=pooled[torch.where(torch.rand(batch) < 0.5, 0, row)],
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
        if run.done(loss.item(), every=500 if name == "flow" else 100):
            average.store(parameters)
            average.copy_to(parameters)
            right = "".join(f"  {kind} {accuracy(pipe, trial):.1%}" for kind, trial in trials.items())
            save(pipe)
            average.restore(parameters)
            log(f"{name} {run.step:6d}  loss {run.mean_loss:.4f}{right}  {run.time}")


def save(pipe: FluxPipeline) -> None:
    """Write the pipeline; transformer and autoencoder in half precision, which diffusers loads as float32."""
    pipe.save_pretrained(PIPELINE)
    for name in ("vae", "transformer"):
        half = type(getattr(pipe, name)).from_pretrained(PIPELINE / name, torch_dtype=torch.float16)
        half.register_to_config(_name_or_path=name)  # not the path of the machine it was trained on
        half.save_pretrained(PIPELINE / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stages = {
        "vae": 1500, "clip": 1200, "text": 1000, "flow": 8000, "reward": 4500, "flow-four": 300, "reward-four": 1800
    }  # fmt: skip
    parser.add_argument("--stages", nargs="+", default=list(stages), choices=stages)
    parser.add_argument("--steps", type=int, help="of each stage named, instead of its own")
    args = parser.parse_args()
    log(f"{', '.join(args.stages)}: seed {SEED}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    steps = {stage: args.steps or stages[stage] for stage in args.stages}
    if "vae" in steps:
        train_vae(steps["vae"])
    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae", torch_dtype=torch.float32).requires_grad_(False).eval()
    if "clip" in steps:
        train_clip(vae, "clip", steps["clip"], CONTRASTIVE)
    if "text" in steps:
        train_text(steps["text"])
    for name in ("flow", "flow-four"):
        if name in steps:
            train_flow(vae, name, steps[name])
    for name in ("reward", "reward-four"):
        if name in steps:
            train_clip(vae, name, steps[name], CLIP)


if __name__ == "__main__":
    main()
