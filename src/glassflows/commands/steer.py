"""`glassflows steer`: steer a pipeline of diffusers by a reward, and save the images."""

from __future__ import annotations

import ast
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..rewards.model import usual_device
from ..steering import FeynmanKacSteerer
from .rewards import REWARDS, reward_of

_OWN = {  # arguments of a call that the command sets itself, or has no use for
    "prompt",
    "select",
    "record",
    "display",
    "num_images_per_prompt",
    "generator",
    "return_dict",
}


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="a pipeline: name on the Hub, or folder")
    add("--prompt", action="append", default=[], help="may be given several times")
    add("--prompts", type=Path, metavar="FILE", help="or one prompt on each line of a file")
    add(
        "--reward",
        required=True,
        type=reward_of,
        help=f"one of {', '.join(REWARDS)}; or MODULE:NAME, a function of images and prompts",
    )
    add("--reward-model", metavar="MODEL", help="its checkpoint, if not the usual one")
    add("--out", type=Path, required=True, help="a folder in it for each prompt")
    add("--particles", type=int, default=8, help="of each prompt (%(default)s)")
    add("--images", type=int, default=1, help="images that are kept of each prompt (%(default)s)")
    add("--steps", type=int, help="network calls of each particle; the pipeline's own if left out")
    add("--transitions", type=int, help="stochastic transitions of these steps")
    add("--reward-scale", type=_scale, metavar="NUMBER", help='λ_r, or "auto"; the reward\'s own')
    add("--twist", type=float, default=0.0, help="strength of the reward's gradient (%(default)s)")
    add("--look-ahead", type=int, default=0, help="network calls of each look (%(default)s)")
    add("--particle-batch-size", type=int, help="particles that the networks see at a time")
    add(
        "--seed",
        type=int,
        default=0,
        help="of the first prompt; the next has the next (%(default)s)",
    )
    add("--device", default=usual_device().type, help="(%(default)s)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="as in the files if left out")
    add("--offload", action="store_true", help="keep what is not at work off the accelerator")
    add(
        "--call",
        nargs="+",
        type=_argument,
        default=[],
        action="extend",
        metavar="NAME=VALUE",
        help="further arguments of the pipeline, such as height=768 guidance_scale=3.5",
    )


def run(args: Namespace) -> None:
    """Steer one prompt after another; each result is saved in a folder of its own."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError("expected --prompt or --prompts, got neither")
    call = dict(args.call)
    if taken := _OWN & call.keys():
        raise ValueError(f"--call: expected no {', '.join(sorted(taken))}, which options set")
    if args.steps is not None:
        call["num_inference_steps"] = args.steps
    if args.images > args.particles:
        raise ValueError(f"--images: expected at most --particles {args.particles}")
    folders = [args.out / f"{i:04d}" for i in range(len(prompts))]
    for folder in folders:  # before anything is drawn
        if folder.exists() and any(folder.iterdir()) and not (folder / "steering.json").exists():
            raise ValueError(f"--out: expected folders of results, got {folder} with other files")
    options: dict[str, Any] = (
        {} if args.dtype is None else {"torch_dtype": getattr(torch, args.dtype)}
    )
    pipe = DiffusionPipeline.from_pretrained(args.model, **options)
    if args.offload:
        pipe.enable_model_cpu_offload(device=args.device)
    else:
        pipe.to(args.device)
    steer = FeynmanKacSteerer(
        pipe,
        args.reward(args.reward_model, args.device),
        args.particles,
        num_transitions=args.transitions,
        particle_batch_size=args.particle_batch_size,
        twist=args.twist,
        look_ahead=args.look_ahead,
        reward_scale=args.reward_scale,
    )
    for i, (prompt, folder) in enumerate(zip(prompts, folders, strict=True)):
        generator = torch.Generator().manual_seed(args.seed + i)
        out = steer(
            prompt, select="best", num_images_per_prompt=args.images, generator=generator, **call
        )
        out.save(folder)
        best, mean = float(out.image_rewards[0]), float(out.rewards.mean())
        print(f"{folder}: reward {best:.4g}, of {args.particles} on average {mean:.4g}: {prompt}")


def _scale(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _argument(text: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE; what is no Python literal is a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
