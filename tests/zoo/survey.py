"""What GLASSScheduler and FeynmanKacSteerer do in every pipeline class of the zoo: the rows of docs/pipelines.md.

`python -m zoo.survey`, in the folder of the tests, writes the document anew.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

import glassflows
import zoo
from glassflows import FeynmanKacSteerer, GLASSFlowMatchScheduler, GLASSScheduler
from glassflows.host.decode import PipelineCall, decoder
from glassflows.host.patch import current
from glassflows.host.run import settled_sizes
from glassflows.scheduler import supported
from zoo import Case, text

NUM_STEPS = 5  # divides 1000: elsewhere DDIM's previous timestep is not its next one
DOCUMENT = Path(__file__).parents[2] / "docs" / "pipelines.md"
PACKAGE = str(Path(glassflows.__file__).parent)
Make = Callable[..., GLASSScheduler]
DROP = "DROP"  # as a value: an argument the pipeline does not take


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    pipeline: str
    task: str
    native: str
    swap: str
    ode: str = ""
    decoded: str = ""
    steered: str = ""


@cache
def cases() -> dict[str, Case]:
    """Return the cases of all families by label, those left out whose class the installed diffusers lacks."""
    modules = [importlib.import_module(f"zoo.{info.name}") for info in pkgutil.iter_modules(zoo.__path__)]
    found = [case for module in modules for case in getattr(module, "CASES", [])]
    return {case.label: case for case in found if hasattr(diffusers, case.name)}


def survey(case: Case) -> Row:
    """Run a case with its native scheduler, with ours in its place, and steered; anything unforeseen is raised."""
    pipe = case.build()
    native = pipe.scheduler
    expected = run(case, pipe)
    row = Row(case.label, case.task, type(native).__name__.removesuffix("Scheduler"), swap="")
    try:
        ours, make, remark = swap(case, pipe)
    except Exception as error:
        return replace(row, swap=f"no: {refusal(error)}", steered="no")
    finally:
        pipe.scheduler = native
    if ours.network_calls != expected.network_calls:
        repeated = {"PNDM": 1, "HeunDiscrete": NUM_STEPS - 1}[row.native]
        assert ours.network_calls == expected.network_calls - repeated
        remark = f", without the calls {row.native} repeats"
    assert np.isfinite(ours.output).all()
    assert ours.output.shape == expected.output.shape
    return replace(
        row,
        swap=f"yes{remark}",
        ode=compare_ode(case, pipe, make),
        decoded=compare_decoded(case, pipe, make, ours),
        steered=steer(case, pipe, make, ours),
    )


def swap(case: Case, pipe: Any) -> tuple[Run, Make, str]:
    """Run a case with ours in place of its native scheduler, told more where it asks for more; the same twice."""
    native = pipe.scheduler
    ways: list[tuple[Make, str]] = [
        (GLASSScheduler.from_scheduler, ""),
        (GLASSFlowMatchScheduler.from_scheduler, ", as `GLASSFlowMatchScheduler`"),
        (partial(GLASSScheduler.from_scheduler, noise_scale=pipe.config.get("noise_scale")), ", told `noise_scale`"),
    ]
    for make, remark in ways:
        try:
            pipe.scheduler = make(native, num_transitions=2)
            ours, again = run(case, pipe), run(case, pipe)
        except Exception as error:
            if not any(name in refusal(error) for name in ("GLASSFlowMatchScheduler", "pass noise_scale")):
                raise
            continue
        assert np.array_equal(ours.output, again.output)
        return ours, make, remark
    raise AssertionError(f"{case.label} asks for more, and then again")


def refusal(error: Exception) -> str:
    """Return the reason of an error of our own; raise any other."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or not traceback.tb_frame.f_code.co_filename.startswith(PACKAGE):
        raise error
    return str(error)


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One call of a pipeline: its output as an array, its network calls, its last latents and sizes."""

    output: np.ndarray
    network_calls: int
    latents: Tensor | None = None
    sizes: dict[str, int] = field(default_factory=dict)


def arguments(case: Case, call: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Return the keyword arguments of a call, that of the case or another one."""
    call = case.call() if call is None else call
    generator = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": NUM_STEPS, "generator": generator, "output_type": "np", **options, **call}
    return {name: value for name, value in given.items() if not (isinstance(value, str) and value == DROP)}


def run(case: Case, pipe: Any, **options: Any) -> Run:
    """PipelineCall a pipeline, counting what its networks and its scheduler do."""
    torch.manual_seed(0)  # some draw from the global generator
    calls: list[int] = []
    latents: list[Tensor] = []
    sizes: dict[str, int] = {}
    networks = [getattr(pipe, name, None) for name in case.networks]
    hooks = [net.register_forward_pre_hook(lambda *_: calls.append(1)) for net in networks if net is not None]
    try:
        with current(case), settled_sizes(pipe, case, sizes), noting_steps(pipe.scheduler, latents):
            output = pipe(**arguments(case, **options))
    finally:
        for hook in hooks:
            hook.remove()
    first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
    array = np.asarray(first[0] if isinstance(first, list) else first, dtype=np.float32)
    return Run(array, len(calls), latents[-1] if latents else None, sizes)


@contextmanager
def noting_steps(scheduler: Any, seen: list[Tensor]) -> Iterator[None]:
    """Note what a scheduler returns from each step; its copies' steps are not noted."""
    cls, step = type(scheduler), type(scheduler).step

    @wraps(step)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = step(self, *args, **kwargs)
        if self is scheduler:
            seen.append((out[0] if isinstance(out, tuple) else out.prev_sample).clone())
        return out

    own = "step" in vars(cls)
    cls.step = noting
    try:
        yield
    finally:
        if own:
            cls.step = step
        else:
            del cls.step


# ---- comparisons -----------------------------------------------------------------------------------------------------


def compare_ode(case: Case, pipe: Any, make: Make) -> str:
    """Compare one transition of order 1 with the native first-order ODE sampler, where diffusers has one."""
    native = pipe.scheduler
    first_order = euler(native)
    if first_order is None:
        return ""
    runs = []
    for scheduler in (first_order, make(native, num_transitions=1, solver_order=1)):
        pipe.scheduler = scheduler
        runs.append(run(case, pipe))
    pipe.scheduler = native
    by_output = case.name in EDITS_EVERY_STEP or runs[0].latents is None
    theirs, ours = (torch.as_tensor(one.output) if by_output else one.latents for one in runs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))
    return "yes"


def euler(native: Any) -> Any | None:
    """Return the first-order ODE sampler on the grid of a native scheduler."""
    name, config = type(native).__name__, native.config
    if config.get("thresholding") or config.get("stochastic_sampling"):
        return None
    if name == "FlowMatchEulerDiscreteScheduler" or (name in supported.TABLE and "DDIM" in name):
        return None if name in supported.CLIPPED and config.get("clip_sample") else native
    if name == "PNDMScheduler":
        return diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    if name in ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"):
        return type(native).from_config(config, solver_order=1)
    if name == "UniPCMultistepScheduler":
        return type(native).from_config(config, solver_order=1, disable_corrector=list(range(NUM_STEPS)))
    return None


def compare_decoded(case: Case, pipe: Any, make: Make, drawn: Run) -> str:
    """Compare our decoding of the last latents with what the pipeline made of them."""
    try:
        decode = decoder(PipelineCall(pipe, arguments(case), drawn.sizes))
    except ValueError:
        return "pass `decode=`"
    latents, native = drawn.latents, pipe.scheduler
    if case.task == "inpaint":  # what is kept is put back after the last step
        pipe.scheduler = make(native, num_transitions=2)
        with suppress(ValueError):  # Kandinsky 2.1 does not show them
            kept = torch.as_tensor(run(case, pipe, output_type="latent").output)
            latents = kept if latents is None or kept.shape[1:] == latents.shape[1:] else latents
        pipe.scheduler = native
    if latents is None or case.name in EDITS_AFTERWARDS:
        return "yes"
    decoded, pixels = decode(latents), torch.as_tensor(drawn.output)
    pixels = pixels.movedim(-1, -3) if pixels.ndim >= 4 else pixels.view(len(pixels), -1, pixels.shape[-1])
    if decoded.shape[1] < pixels.shape[1]:
        return "of the last chunk"
    rounding = 1 / 255 if case.name.startswith("Cosmos2") else 0.0  # its safety check rounds pixels
    torch.testing.assert_close(decoded[: len(pixels)], pixels, rtol=0, atol=1e-4 + rounding)
    return "yes"


def steer(case: Case, pipe: Any, make: Make, plain: Run) -> str:
    """Steer a case with the embeddings of its call, and with words and pictures as a user would call it.

    Where steering is refused before the run, the call in words is compared with the native one without it.
    """
    as_given = steered(pipe, arguments(case), plain)
    speaking, call = text.worded(case)
    in_words = steered(speaking, arguments(case, call), plain)
    if in_words.startswith("no:"):
        compare_ode(replace(case, call=lambda: call), speaking, make)
    return as_given if as_given == in_words else f"called in words: {in_words}; with embeddings or tensors: {as_given}"


def steered(pipe: Any, given: dict[str, Any], plain: Run) -> str:
    """Steer two particles, of which one has all the weight, and see both draw on it."""

    def rows_from(images: Tensor, prompts: list[Any]) -> Tensor:
        return torch.tensor([0.0, 1.0])

    try:
        torch.manual_seed(0)
        steerer = FeynmanKacSteerer(pipe, rows_from, 2, reward_scale=1e4, num_transitions=2, ess_threshold=1.0)
        out = steerer(**{**given, "output_type": "np"})
    except Exception as error:
        return f"no: {refusal(error)}"
    images = np.asarray(out.images)
    assert np.isfinite(images).all()
    assert images.shape == (2, *plain.output.shape[1:])
    # where nothing random follows, particles are only weighed
    assert out.ancestors.tolist() == [[[1, 1]] if out.resampled.any() else [[0, 1]]][: len(out.ancestors)]
    assert out.ledger.seconds["network"] > 0
    return "yes"


EDITS_EVERY_STEP = {"LTXConditionPipeline"}  # it puts back the tokens that are not due
EDITS_AFTERWARDS = {  # they put back what they keep after the last step, and have no latents to show
    "Flux2KleinInpaintPipeline", "IFInpaintingPipeline", "IFInpaintingSuperResolutionPipeline",
    "KandinskyV22InpaintPipeline",
}  # fmt: skip


OFTEN = {  # of those that were once laid out or cut wrongly, one of each kind
    "AnimateDiffPipeline", "HiDreamImagePipeline", "HunyuanDiTPipeline", "Kandinsky5T2IPipeline", "Krea2Pipeline",
    "LTXPipeline", "Lumina2Pipeline", "PRXPipeline", "QwenImagePipeline", "SanaPipeline", "StableDiffusionXLPipeline",
    "WanImageToVideoPipeline", "ZImageControlNetPipeline",
}  # fmt: skip


def sampled(labels: list[str], every: int | None = None) -> list[Any]:
    """Return labels to parametrize by: of most, a test is left to `make zoo`.

    Args:
        labels: The labels.
        every: Of these, one in so many is not; None for none but those in `OFTEN`.
    """
    import pytest  # the survey itself runs without

    often = OFTEN | set(labels[::every] if every else ())
    return [label if label in often else pytest.param(label, marks=pytest.mark.zoo) for label in labels]


# ---- the document ----------------------------------------------------------------------------------------------------


def documented() -> dict[str, Row]:
    """Return the rows of the document by label."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    rows = [Row(*(cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|"))) for line in lines]
    return {row.pipeline.strip("`"): replace(row, pipeline=row.pipeline.strip("`")) for row in rows}


def shown(row: Row) -> str:
    """Return the line of a row."""
    assert not any("|" in cell or "\n" in cell for cell in astuple(row))
    return "| " + " | ".join([f"`{row.pipeline}`", *astuple(row)[1:]]) + " |"


def main() -> None:
    """Write the table of the document anew, below its own text."""
    rows = [survey(case) for _, case in sorted(cases().items())]
    text = DOCUMENT.read_text()
    head = text[: text.index("| Pipeline |")]
    work = [row for row in rows if row.swap.startswith("yes")]
    steered = [row for row in rows if row.steered == "yes"]
    classes = {row.pipeline.split(",")[0] for row in rows}
    count = (
        f"Of {len(rows)} calls below, of {len(classes)} classes, {len(work)} run with `GLASSScheduler` and "
        f"{len(steered)} are steered."
    )
    head = re.sub(r"^Of \d+ calls .*$", count, head, flags=re.MULTILINE)
    table = ["| Pipeline | Task | Native scheduler | Swap | ODE | Decoded | Steered |", "|---" * 7 + "|"]
    DOCUMENT.write_text(head + "\n".join([*table, *map(shown, rows)]) + "\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    main()
