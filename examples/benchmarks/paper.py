"""The steering protocol of the GLASS Flows paper on any image pipeline of diffusers: a table and a figure.

    python examples/benchmarks/paper.py --model black-forest-labs/FLUX.1-dev --reward imagereward \\
        --prompts evaluation_metadata.jsonl --calls 50 --particles 8 --call height=768 width=1360 --dry-run

**Public weights were not run here.** What ran is this script with toy pipelines and with the scenes, on a CPU
(`tests/test_paper.py`); judge and rewards ran with random weights and with the scenes' CLIP.

`accelerate launch --num_processes 8 examples/benchmarks/paper.py …` gives each GPU its share of the prompts. Rows are
written as they come, a JSON line for each prompt, method and seed, into `--out`; a rerun skips what is there, and
`--report-only` prints it. `--prompts` is GenEval's `evaluation_metadata.jsonl`, whose images are judged by geneval.py,
or a text with a prompt a line.

All methods spend `--calls` network calls on a particle and start from the same noise. FK is Feynman-Kac steering:

    ode         one image of the pipeline's own scheduler
    best        the best of the particles of the pipeline's own scheduler
    ddpm        FK with DDPM ancestral transitions, one per call, scored as often as `glass`
    ddpm-every  the same, scored at every call
    published   FK with GLASS as published: Euler, uniform inner times (CondOT), correlation .4
    glass       FK with the default solver and correlation
    late        the same, scored in the second half of a run, with a stronger reward scale
    twisted     the same, particles also moved along the gradient of the reward; left out if it has none

Euler-Maruyama is left out: transitions of this library keep the marginals, whatever the correlation, and those of
Euler-Maruyama do so only in the limit of small steps. `ddpm` follows the same equation, exactly but for ẑ, which it
takes from the start of each step.

Reference: arXiv:2509.25170, section 5 and tables 1 and 3; arXiv:2501.06848 for Feynman-Kac steering.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zlib
from collections.abc import Iterable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parents[1]))

import geneval
from paper_methods import Drawn, Method, draw, estimate, hours, methods
from paper_report import Row, figure, mend, read, table, table_of_tags

from glassflows import MicroBatches, rewards

REWARDS: dict[str, Any] = {
    "clip": rewards.CLIPScore,
    "pickscore": rewards.PickScore,
    "hpsv2": rewards.HPSv2,
    "imagereward": rewards.ImageReward,
    "aesthetic": rewards.AestheticScore,
    "vlm": rewards.VLMReward,
}
DIFFERENTIABLE = {"scenes", *REWARDS} - {"vlm"}
SETTINGS = (  # what rows depend on
    *("model", "dtype", "call", "reward", "checkpoint", "calls", "particles", "transitions", "reward_scale"),
    *("late_scale", "twist", "judge", "detector", "clip", "threshold", "counting_threshold"),
)


# ---- what is given ---------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return GenEval's metadata of each prompt; of a text with a prompt a line only the prompt."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return [json.loads(line) if path.suffix == ".jsonl" else {"prompt": line} for line in lines if line]


def load_pipe(args: argparse.Namespace, device: torch.device) -> Any:
    if args.model == "scenes":
        pipe = import_module("scenes").load_pipeline()
    else:
        named = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
        pipe = DiffusionPipeline.from_pretrained(args.model, **{named: getattr(torch, args.dtype)})
    pipe.set_progress_bar_config(disable=True)
    if args.decode_batch_size == 1 and hasattr(getattr(pipe, "vae", None), "enable_slicing"):
        pipe.vae.enable_slicing()  # for the methods that are not steered
    if args.checkpointing:
        pipe.vae.enable_gradient_checkpointing()
    if args.offload == "none":
        return pipe.to(device)
    getattr(pipe, f"enable_{args.offload}_cpu_offload")(device=device)
    return pipe


def load_reward(name: str, checkpoint: str | None, device: torch.device) -> Any:
    """Return a reward of the library, the scenes' own, or one of the user's, "module:name"."""
    if name == "scenes":
        return import_module("scenes").load_reward()
    if name in REWARDS:
        return REWARDS[name](checkpoint, device=device)
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def load_judge(args: argparse.Namespace, device: torch.device) -> Any:
    """Return a function of images and the metadata of their prompt; None for no judge."""
    if args.judge == "scenes":
        verdicts = import_module("scenes.verifier").verdicts
        return lambda images, given: verdicts(images.numpy(), [given["prompt"]] * len(images)).tolist()
    if args.judge == "none":
        return None
    prompts = read_prompts(args.prompts)  # also those beyond a limit: their classes compete, too
    entries = [entry for one in prompts for part in ("include", "exclude") for entry in one.get(part, [])]
    classes = sorted({entry["class"] for entry in entries})
    thresholds = {"threshold": args.threshold, "counting_threshold": args.counting_threshold}
    return geneval.Judge(classes, args.detector, args.clip, device=device, **thresholds)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="scenes", help="name or folder of a pipeline, or scenes")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of the pipeline's weights")
    add("--device", default="auto", help="auto takes the process' accelerator, if there is one")
    add("--offload", default="none", choices=("none", "model", "sequential"), help="weights that wait on the CPU")
    add("--checkpointing", action="store_true", help="gradients through the decoder take less memory and more time")
    add("--call", nargs="*", default=[], metavar="KEY=VALUE", help="arguments of the pipeline: height=768 width=1360")
    add("--reward", default="scenes", help=f"{', '.join(REWARDS)}, scenes, or your own, module:name of sys.path")
    add("--checkpoint", help="name, folder or file of the reward's model, if not its default")
    add("--prompts", type=Path, help="GenEval's evaluation_metadata.jsonl, or a text with a prompt a line")
    add("--limit", type=int, help="so many of the prompts, evenly spaced")
    add("--calls", type=int, default=50, help="network calls of each particle")
    add("--particles", type=int, default=8)
    add("--transitions", type=int, default=5, help="of GLASS; it should divide the calls")
    add("--seeds", type=int, default=1)
    add("--methods", nargs="*", metavar="NAME", help="all unless named")
    add("--reward-scale", type=float, help="λ_r; the reward's own unless given")
    add("--late-scale", type=float, help="λ_r of `late` and `twisted`; 3 times the other unless given")
    add("--twist", type=float, default=0.5)
    add("--batch-size", type=int, help="particles that networks and rewards see at a time; all unless given")
    add("--decode-batch-size", type=int, default=1, help="latents decoded at a time")
    add("--judge", choices=("geneval", "scenes", "none"), help="geneval if the prompts have objects, else none")
    add("--detector", default=geneval.DETECTOR, help="an OWLv2 or a Grounding DINO")
    add("--clip", default=geneval.CLIP, help="what names colours")
    add("--threshold", type=float, default=0.2, help="score from which on a detection counts")
    add("--counting-threshold", type=float, default=0.3, help="the same where objects are counted")
    add("--out", type=Path, default=Path("out/paper"), help="folder of rows, images and figure")
    add("--save-images", action="store_true", help="the best image of each row")
    add("--dry-run", action="store_true", help="print what it costs, and run nothing")
    add("--report-only", action="store_true", help="print the table of the rows in --out")
    args = parser.parse_args(argv)
    if not (args.prompts or args.report_only):
        parser.error("--prompts is missing")
    if args.reward == "vlm" and not args.checkpoint:
        parser.error("--reward vlm needs a --checkpoint: the name of its model")
    pairs = [pair.partition("=") for pair in args.call]
    args.call = {key: _value(text) for key, _, text in pairs}
    if args.model == "scenes":
        args.call = import_module("scenes").CALL | args.call
    return args


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# ---- main ------------------------------------------------------------------------------------------------------------


def as_row(drawn: Drawn, verdicts: list[bool] | None) -> dict[str, Any]:
    """Return what is kept of a run: what the table needs, and each image's reward and verdict, the best first."""
    ledger = drawn.ledger
    return {
        "reward": float(drawn.rewards[0]),
        "mean": float(drawn.rewards.mean()),
        "rewards": drawn.rewards.tolist(),
        "right": None if verdicts is None else verdicts[0],
        "all right": None if verdicts is None else float(np.mean(verdicts)),
        "verdicts": verdicts,
        "lineages": drawn.lineages,
        "diversity": drawn.diversity,
        "network_calls": ledger.network_calls,
        "reward_calls": ledger.reward_calls,
        "decodes": ledger.decodes + len(drawn.images),
        "gradients": ledger.gradients,
        "seconds": dict(ledger.seconds),
    }


def chosen_methods(args: argparse.Namespace, scale: float = 1.0) -> dict[str, Method]:
    """Return the methods to run: those named, else all that the reward is known to allow."""
    known = methods(vars(args), scale)
    names = args.methods or [name for name in known if name != "twisted" or args.reward in DIFFERENTIABLE]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--methods: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return {name: known[name] for name in names}


def keep_settings(args: argparse.Namespace) -> None:
    """Write what rows depend on into their folder; refuse a folder of rows of other settings."""
    path = args.out / "settings.json"
    settings = json.loads(json.dumps({name: getattr(args, name) for name in SETTINGS}))
    settings["crc32 of the prompts"] = zlib.crc32(args.prompts.read_bytes())
    kept = json.loads(path.read_text()) if path.exists() else settings
    if other := [name for name, value in settings.items() if kept[name] != value]:
        raise SystemExit(f"{args.out} has rows of another {', '.join(other)}: take another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def missing(indices: Iterable[int], seeds: int, names: Iterable[str], rows: list[Row]) -> list[tuple[int, str, int]]:
    """Return prompt, method and seed of each run that has no row, all methods of a prompt together."""
    there = {(row["index"], row["method"], row["seed"]) for row in rows}
    runs = ((index, name, seed) for seed in range(seeds) for index in indices for name in names)
    return [one for one in runs if one not in there]


def run(args: argparse.Namespace, state: PartialState, prompts: dict[int, dict[str, Any]]) -> None:
    """Draw what is missing of this process' share of the prompts, and write a row of each run."""
    device = torch.device(str(state.device) if args.device == "auto" else args.device)
    pipe, reward = load_pipe(args, device), load_reward(args.reward, args.checkpoint, device)
    judge = load_judge(args, device)
    chosen = chosen_methods(args, getattr(reward, "reward_scale", 1.0))
    batches = MicroBatches(args.batch_size, args.decode_batch_size, args.batch_size)
    path = args.out / f"rows-{state.process_index}.jsonl"
    mend(path)
    rows = read(args.out)
    todo = missing(list(prompts)[state.process_index :: state.num_processes], args.seeds, chosen, rows)
    with path.open("a") as file:
        for number, (index, name, seed) in enumerate(todo, 1):
            given = prompts[index]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {given['prompt']}".encode()))
            call = args.call | {"num_inference_steps": args.calls, "generator": generator}
            drawn = draw(chosen[name], pipe, reward, given["prompt"], batches, call)
            row = {"index": index, "prompt": given["prompt"], "tag": given.get("tag"), "method": name, "seed": seed}
            row |= as_row(drawn, judge(drawn.images, given) if judge else None)
            if args.save_images:
                save_image(drawn, args.out / "images" / f"{index}-{name}-{seed}.png")
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
            left = hours([name for _, name, _ in todo[number:]], chosen, args.calls, rows)
            taken = f"{row['seconds']['total']:.1f} s, about {left:.2g} hours left"
            print(f"process {state.process_index}: {number} of {len(todo)}, {name}, {taken}", file=sys.stderr)


def save_image(drawn: Drawn, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    VaeImageProcessor.numpy_to_pil(drawn.images[:1].float().movedim(1, -1).numpy())[0].save(path)


def report(folder: Path) -> None:
    """Print the tables of the rows in a folder, and draw their figure."""
    settings, rows = json.loads((folder / "settings.json").read_text()), read(folder)
    ran = {row["method"] for row in rows}
    titles = {name: method.title for name, method in methods(settings).items() if name in ran}
    print(f"{settings['model']}, {settings['reward']}: {settings['calls']} network calls a particle\n")
    print(table(rows, titles), table_of_tags(rows, titles), sep="\n\n")
    figure(rows, titles, folder / "paper.png")


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    if args.report_only:
        report(args.out)
        return
    on_cpu = args.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))  # the quickest process waits for the slowest
    prompts = dict(enumerate(read_prompts(args.prompts)))
    if args.limit:
        places = np.linspace(0, len(prompts), min(args.limit, len(prompts)), endpoint=False)
        prompts = {i: prompts[i] for i in places.astype(int).tolist()}
    if args.judge is None:
        has_objects = any("include" in one for one in prompts.values())
        args.judge = "scenes" if args.model == "scenes" else "geneval" if has_objects else "none"
    if state.is_main_process:
        chosen, rows = chosen_methods(args), read(args.out)
        print(estimate(chosen, args.calls, len(prompts) * args.seeds), flush=True)
        todo = [name for _, name, _ in missing(prompts, args.seeds, chosen, rows)]
        if rows:
            left = hours(todo, chosen, args.calls, rows)
            print(f"{len(todo)} runs are left: about {left:.2g} hours of one process", flush=True)
    if args.dry_run:
        return
    if state.is_main_process:
        keep_settings(args)
    state.wait_for_everyone()
    run(args, state, prompts)
    state.wait_for_everyone()
    if state.is_main_process:
        report(args.out)


if __name__ == "__main__":
    main()
