"""`glassflows serve`: offer a reward to other machines over HTTP.

`glassflows.rewards.RemoteReward(url)` is the other end. It needs `pip install glassflows[serve]`.
There is no encryption, and no check of who asks unless GLASSFLOWS_TOKEN is set in the environment:
requests then need the header "Authorization: Bearer" with it. It listens on this machine alone
unless told otherwise.
"""

from __future__ import annotations

import hmac
import os
import threading
from argparse import ArgumentParser, Namespace
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ..rewards.compose import scores_of
from ..rewards.model import usual_device
from ..rewards.remote import unpacked
from ..steering.scorer import check_reward, compares, load_reward
from .rewards import REWARDS, reward_of

_FIELDS = ("images", "prompts")
MOST_PIXELS = 2**28
"""Of all pictures of a request, 3 GB as floats."""


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "reward",
        type=reward_of,
        metavar="REWARD",
        help=f"one of {', '.join(REWARDS)}; or MODULE:NAME, a function of images and prompts",
    )
    add("--model", help="its checkpoint, if not the usual one")
    add("--device", default=usual_device().type, help="(%(default)s)")
    add("--host", default="127.0.0.1", help="0.0.0.0 for all the world to ask (%(default)s)")
    add("--port", type=int, default=8000, help="(%(default)s)")


def run(args: Namespace) -> None:
    """Read the reward's model, and answer until it is stopped."""
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError(f"{error}: pip install glassflows[serve]") from error
    reward = args.reward(args.model, args.device)
    check_reward(reward)
    if compares(reward):
        raise ValueError(
            f"REWARD: expected one that scores an image by itself, got {_name(reward)}, which "
            "compares images: rank where the images are"
        )
    load_reward(reward)
    print(f"{_name(reward)} at http://{args.host}:{args.port}", flush=True)
    token = os.environ.get("GLASSFLOWS_TOKEN") or None
    uvicorn.run(app(reward, token), host=args.host, port=args.port, log_level="warning")


def app(reward: Any, token: str | None = None) -> Any:
    """Return an ASGI application that offers a reward.

    Args:
        reward: A reward, a function of images and prompts; it scores one request at a time.
        token: What requests have to bear; None for nothing.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    alone = threading.Lock()

    def refused(request: Request) -> Any:
        given = request.headers.get("authorization", "").encode()
        if token is None or hmac.compare_digest(given, f"Bearer {token}".encode()):
            return None
        return JSONResponse({"error": "expected Authorization: Bearer with the token"}, 401)

    def scored(body: Any) -> Any:
        try:
            with alone, torch.no_grad():
                images, prompts = asked(body)
                scores = numbers(reward(images, prompts), len(images))
        except (ValueError, TypeError) as error:  # it would be no better the next time
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 422)
        except Exception as error:  # whatever a reward may raise
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
        return JSONResponse({"scores": scores})

    async def about(request: Request) -> Any:
        own = getattr(reward, "reward_scale", None)
        scale = 1.0 if own is None else float(own)
        return refused(request) or JSONResponse({"reward": _name(reward), "reward_scale": scale})

    async def score(request: Request) -> Any:
        if (refusal := refused(request)) is not None:
            return refusal
        try:
            body = await request.json()
        except (ValueError, RecursionError) as error:
            return JSONResponse({"error": f"expected JSON: {error}"}, 422)
        return await run_in_threadpool(scored, body)

    return Starlette(routes=[Route("/", about), Route("/score", score, methods=["POST"])])


def asked(body: Any) -> tuple[Tensor, list[Any]]:
    """Return images (N, 3, H, W) or videos (N, F, 3, H, W), in [0, 1], and prompts of a request.

    Raises:
        ValueError: if it has none, or they differ in size.
    """
    if not isinstance(body, dict) or not all(isinstance(body.get(name), list) for name in _FIELDS):
        raise ValueError('expected {"images": [picture, …], "prompts": [text, …]}')
    films, prompts = unpacked(body["images"], MOST_PIXELS), body["prompts"]
    if not films or len(films) != len(prompts):
        raise ValueError(
            f"expected one prompt for each image, got {len(films)} images and {len(prompts)} "
            "prompts"
        )
    if not all(films):
        raise ValueError("images: expected videos of at least one frame, got one of none")
    sizes = {(len(film), frame.size) for film in films for frame in film}
    if len(sizes) > 1:
        raise ValueError(f"images: expected all of one size, got {sorted(map(str, sizes))}")
    frames = [frame for film in films for frame in film]
    images = torch.from_numpy(VaeImageProcessor.pil_to_numpy(frames)).movedim(-1, 1)
    if isinstance(body["images"][0], list):
        images = images.unflatten(0, (len(films), -1))
    return images, prompts


def numbers(returned: Any, number: int) -> list[float]:
    """Return what a reward returned as Python's numbers.

    Raises:
        ValueError: unless it is one finite score for each image.
    """
    scores = scores_of(returned, "reward").detach().cpu().double()
    if scores.shape != (number,):
        raise ValueError(
            f"reward returned shape {tuple(scores.shape)}; expected one score per image, shape "
            f"({number},)"
        )
    if not scores.isfinite().all():
        raise ValueError(f"reward returned {scores.tolist()}; expected finite scores")
    return scores.tolist()


def _name(reward: Any) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
