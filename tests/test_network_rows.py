"""Which arguments of a network have rows is declared by its forward: some particles at a time change nothing."""

import importlib
import inspect
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", minversion="0.42")  # older ones build other pipelines

import tiny
from glassflows import FeynmanKacSteerer
from glassflows.host.microbatch import (
    NETWORKS,
    UndeclaredRows,
    decoding_in_micro_batches,
    modules,
    networks_in_micro_batches,
)
from glassflows.host.network_rows import declared_by_network
from glassflows.host.refusals import UnsteerablePipeline
from zoo.survey import arguments, cases, documented, sampled

NUMBER = 6


def network(name, forward):
    """Return a network of a class of that name."""
    return type(name, (nn.Module,), {"forward": forward})()


def in_parts(net, size=2, number=NUMBER):
    return networks_in_micro_batches(net, net.forward, number, size)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=tiny.seeded(seed))


def same(out, expected):
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_layers_come_before_rows():
    """HiDream's text of every layer: (layers, rows, tokens, channels), as a tensor and as a list."""

    def forward(self, hidden_states, encoder_hidden_states_llama3):
        text = sum((k + 1) * layer for k, layer in enumerate(encoder_hidden_states_llama3))
        return hidden_states * text.mean(1)

    net = network("HiDreamImageTransformer2DModel", forward)
    for layers in (3, NUMBER, 2 * NUMBER):
        x, text = rows(2 * NUMBER, 4), rows(layers, 2 * NUMBER, 2 * NUMBER, 4, seed=1)
        for given in (text, list(text)):
            same(in_parts(net)(x, encoder_hidden_states_llama3=given), forward(net, x, text))


@pytest.mark.parametrize("length", [NUMBER, 2 * NUMBER, 5])
@pytest.mark.parametrize("name", ["img_ids", "image_rotary_emb", "text_rope_pos", "control_hidden_states_scale"])
def test_tables_are_whole_whatever_their_length(name, length):
    seen = []

    def forward(self, hidden_states, **tables):
        seen.append(tables[name])
        return hidden_states * sum(table.sum() for table in tables[name])

    net = network("SomeTransformer", forward)
    x, table = rows(2 * NUMBER, 4), rows(length, 8, seed=1)
    for given in (table, (table, table)):
        same(in_parts(net)(x, **{name: given}), forward(net, x, **{name: given}))
    assert all(len(one[0] if isinstance(one, tuple) else one) == length for one in seen)


def test_a_name_may_mean_different_things():
    """Positions are shared in Krea 2 and per row elsewhere, at the same lengths."""

    def forward(self, hidden_states, position_ids):
        shared = position_ids.ndim == 2
        return hidden_states * (position_ids.sum() if shared else position_ids.sum((1, 2))[:, None])

    x = rows(NUMBER, 4)
    shared, own = rows(NUMBER, 3), rows(NUMBER, 5, 3)
    same(in_parts(network("Krea2Transformer2DModel", forward))(x, shared), forward(None, x, shared))
    same(in_parts(network("Ideogram4Transformer2DModel", forward))(x, own), forward(None, x, own))


def test_rows_have_frames_in_motion_networks():
    """Text (rows · frames, …) and residuals (rows · frames, …) of latents (rows, C, frames, …)."""

    def forward(self, sample, timestep, encoder_hidden_states, down_block_additional_residuals=None):
        frames = sample.shape[2]
        text = encoder_hidden_states.unflatten(0, (-1, frames)).mean((2, 3))
        residual = down_block_additional_residuals[0].unflatten(0, (-1, frames)).mean(2)
        return sample * text[:, None] + residual[:, None]

    net = network("UNetMotionModel", forward)
    for frames in (3, NUMBER):
        x = rows(2 * NUMBER, 4, frames)
        text, residual = rows(2 * NUMBER * frames, 5, 4, seed=1), rows(2 * NUMBER * frames, 7, seed=2)
        arguments = (x, torch.tensor(3), text, [residual])
        same(in_parts(net, 4)(*arguments), forward(net, *arguments))


def test_rows_are_found_in_whatever_they_are_nested():
    def forward(self, sample, added_cond_kwargs, cross_attention_kwargs, down_block_additional_residuals):
        scale = added_cond_kwargs["text_embeds"] + added_cond_kwargs["image_embeds"][0].mean(1)
        scale = scale + cross_attention_kwargs["gligen"]["boxes"].mean(1) * cross_attention_kwargs["scale"]
        return (
            sample * scale + sum(down_block_additional_residuals) * cross_attention_kwargs["ip_adapter_masks"][0].sum()
        )

    net = network("UNet2DConditionModel", forward)
    n = 3 * NUMBER  # under perturbed attention
    arguments = {
        "sample": rows(n, 4),
        "added_cond_kwargs": {"text_embeds": rows(n, 4, seed=1), "image_embeds": [rows(n, 2, 4, seed=2)]},
        "cross_attention_kwargs": {
            "scale": 0.5, "gligen": {"boxes": rows(n, 30, 4, seed=3)}, "ip_adapter_masks": [rows(1, n, 2, seed=4)],
        },
        "down_block_additional_residuals": (rows(n, 4, seed=5), rows(n, 4, seed=6)),
    }  # fmt: skip
    same(in_parts(net, 4)(**arguments), forward(net, **arguments))


def test_lists_have_an_entry_for_each_row():
    """Z-Image's images and texts, and residuals of its ControlNet by number of the block."""

    def forward(self, x, t, cap_feats, controlnet_block_samples):
        residual = sum((block + 1) * one for block, one in controlnet_block_samples.items())
        return [one * t[i] * cap_feats[i].sum() + residual[i] for i, one in enumerate(x)], {}

    net = network("ZImageTransformer2DModel", forward)
    x, texts = list(rows(2 * NUMBER, 4)), [rows(3 + i, 2, seed=i) for i in range(2 * NUMBER)]
    given = (x, rows(2 * NUMBER, seed=1), texts, {0: rows(2 * NUMBER, 4, seed=2), 2: rows(2 * NUMBER, 4, seed=3)})
    out, rest = in_parts(net, 4)(*given)
    same(torch.stack(out), torch.stack(forward(net, *given)[0]))
    assert rest == {}


@pytest.mark.parametrize("timestep", [torch.tensor(7.0), torch.tensor([7.0]), 7.0, rows(2 * NUMBER).abs()])
def test_one_for_all_rows_stays_one(timestep):
    def forward(self, hidden_states, timestep, pooled_projections):
        t = timestep[:, None] if isinstance(timestep, Tensor) and timestep.ndim else timestep
        return hidden_states * t * pooled_projections

    net = network("SomeTransformer", forward)
    x = rows(2 * NUMBER, 4)
    for pooled in (rows(1, 4), rows(2 * NUMBER, 4)):
        same(in_parts(net)(x, timestep, pooled), forward(net, x, timestep, pooled))


def test_the_guidance_rows_of_a_particle_go_with_it():
    seen = []

    def forward(self, hidden_states, encoder_attention_mask):
        seen.append(hidden_states[:, 0].tolist())
        return hidden_states * encoder_attention_mask.sum(1, keepdim=True)

    net = network("SomeTransformer", forward)
    x, mask = torch.arange(2.0 * NUMBER)[:, None], rows(2 * NUMBER, NUMBER)
    same(in_parts(net, 4)(x, mask), forward(net, x, mask))
    assert seen[:2] == [[0, 1, 2, 3, 6, 7, 8, 9], [4, 5, 10, 11]]


def test_shapes_of_images_are_per_row_or_for_all():
    """Qwen-Image: a list of shapes for each row, or one; Nucleus-Image: a single shape, of three numbers."""

    def forward(self, hidden_states, img_shapes):
        sizes = [sum(shape) for shape in (img_shapes if isinstance(img_shapes, list) else [img_shapes])]
        return hidden_states * torch.tensor(sizes)[:, None]

    net = network("SomeTransformer", forward)
    x = rows(3, 4)
    for shapes in ([(1, 2, 3), (1, 4, 5), (1, 2, 9)], [(1, 2, 3)], (1, 2, 3)):
        same(in_parts(net, 2, 3)(x, shapes), forward(net, x, shapes))


# ---- what is not known -----------------------------------------------------------------------------------------------


def test_unknown_arguments_that_may_have_rows_are_refused():
    def forward(self, hidden_states, secret=None, attention_kwargs=None):
        return hidden_states

    net = network("TheirTransformer", forward)
    x = rows(2 * NUMBER, 4)
    for size in ((NUMBER, 3), (2 * NUMBER, 3), (4 * NUMBER, 3), (3, NUMBER), (3, 2 * NUMBER), (NUMBER,)):
        for given in (
            {"secret": rows(*size)},
            {"secret": [rows(*size)]},
            {"attention_kwargs": {"secret": rows(*size)}},
        ):
            with pytest.raises(UndeclaredRows) as caught:
                in_parts(net)(x, **given)
            for said in ("particle_batch_size (network of MicroBatches)", "TheirTransformer", "secret", "leave"):
                assert said in str(caught.value)
    for given in (rows(1, 5, 3), torch.tensor(3.0), 0.5, None, "secret", [0, 1], rows(5, 7)):
        same(in_parts(net)(x, secret=given), x)
    with pytest.raises(UndeclaredRows, match="got positional argument 0 of"):
        in_parts(network("Traced", lambda self, *args: args[0]))(x)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "cap_feats"])
def test_wrong_numbers_of_rows_are_refused(name):
    net = network("TheirTransformer", lambda self, hidden_states, **kwargs: hidden_states)
    text = rows(NUMBER, 3) if name == "encoder_hidden_states" else list(rows(NUMBER, 3))
    with pytest.raises(UndeclaredRows, match=rf"expected {name} to have its 12 rows, or one for all, got 6: leave"):
        in_parts(net)(rows(2 * NUMBER, 4), **{name: text})


def test_outputs_without_rows_are_refused():
    class Memory:
        pass

    x = rows(NUMBER, 4)
    for output, got in ((lambda x: x[:1], "1 rows for 2"), (lambda x: x.repeat(3, 1), "6 rows for 2")):
        net = network("TheirTransformer", lambda self, hidden_states, output=output: (output(hidden_states),))
        with pytest.raises(UndeclaredRows, match=f"TheirTransformer .* got {got}: leave"):
            in_parts(net)(x)
    net = network("TheirTransformer", lambda self, hidden_states: (hidden_states, Memory()))
    with pytest.raises(UndeclaredRows, match="got a Memory, which may hold"):
        in_parts(net)(x)


def test_outputs_of_every_form_are_put_together():
    """Residuals of a ControlNet in a list beside one, two outputs, frames per row, a mean over the rows."""

    def forward(self, sample):
        return [sample * 2, sample * 3], sample * 4, None, {"loss": sample.mean()}

    x = rows(2 * NUMBER, 4)
    for size in (4, 2):
        (two, three), four, none, loss = in_parts(network("ControlNetModel", forward), size)(x)
        same(torch.stack([two / 2, three / 3, four / 4]), torch.stack([x, x, x]))
        assert none is None
        same(loss["loss"], x.mean())
    frames = network("SparseControlNetModel", lambda self, sample: [sample.flatten(0, 1)])
    x = rows(2 * NUMBER, NUMBER, 4)
    same(in_parts(frames, 4)(x)[0], x.flatten(0, 1))


@pytest.mark.parametrize("name", ["kv_cache", "kv_cache_mode", "kv_caches", "their_cache", "input_img_latents"])
def test_state_is_refused(name):
    net = network("TheirTransformer", lambda self, hidden_states, **kwargs: hidden_states)
    x = rows(NUMBER, 4)
    for unused in (None, [], {}):
        same(in_parts(net)(x, **{name: unused}), x)
    with pytest.raises(UndeclaredRows, match=rf"TheirTransformer .* expected no {name}, as it .*: leave"):
        in_parts(net)(x, **{name: object()})


@tiny.DIFFUSERS_42
def test_every_argument_of_diffusers_image_and_video_networks_is_known():
    """But for those that pack sequences into one, or belong to no pipeline that is steered."""
    apart = {
        "AnyFlowFARTransformer3DModel", "Cosmos3OmniTransformer", "JoyImageEditPlusTransformer3DModel",
        "MiniMaxH3Transformer3DModel", "MiniMaxMusic3RVQDepthDecoder", "RFD4ProteinaTransformer",
        "SanaWMLTX2RefinerTransformer3DModel", "SanaWMTransformer3DModel", "T5FilmDecoder",
        "WanAnimate2Transformer3DModel",
    }  # fmt: skip
    found, unknown = set(), {}
    for package in ("transformers", "unets", "controlnets"):
        for cls in vars(importlib.import_module(f"diffusers.models.{package}")).values():
            if inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin) and cls.__name__ not in apart:
                declared = declared_by_network(cls.__new__(cls))
                found.add(cls.__name__)
                names = [name for name in declared.positions if declared.layout(name) is None]
                if names:
                    unknown[cls.__name__] = names
    assert len(found) > 60
    assert unknown == {}


# ---- wrappers --------------------------------------------------------------------------------------------------------


def wrapped(kind, net):
    if kind == "compiled":
        return torch.compile(net, backend="eager", dynamic=False)
    if kind == "parallel":
        return nn.DataParallel(net)
    if kind == "patched":
        forward = net.forward
        net.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    if kind == "adapted":
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(net, peft.LoraConfig(target_modules=["inner"], init_lora_weights=False))
    return net


class HiDreamImageTransformer2DModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, hidden_states, encoder_hidden_states_llama3=None, img_ids=None):
        return self.inner(hidden_states) * encoder_hidden_states_llama3.sum(0) + img_ids.sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "compiled", "parallel", "patched", "adapted"])
def test_what_a_network_declares_is_found_in_wrappers(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = wrapped(kind, HiDreamImageTransformer2DModel())
    x, text, ids = rows(NUMBER, 4), rows(NUMBER, NUMBER, 4, seed=1), rows(NUMBER, 5, 4, seed=2)
    same(networks_in_micro_batches(net, net.forward, NUMBER, 4)(x, text, ids), net(x, text, ids))


# ---- decoders --------------------------------------------------------------------------------------------------------


def test_decoders_get_some_latents_with_their_timesteps():
    class Decoder(nn.Module):
        def decode(self, z, temb=None, generator=None, **kwargs):
            return ((z * temb[:, None] if temb is not None else z) * 2,)

    module = Decoder()
    decode = decoding_in_micro_batches(module, module.decode, NUMBER, 4)
    z, t = rows(NUMBER, 4), rows(NUMBER, seed=1)
    for given in ((z,), (z, t), (z, t[:1])):
        same(decode(*given, generator=[None] * NUMBER, return_dict=False)[0], module.decode(*given)[0])
    same(decode(z=z, temb=t)[0], module.decode(z, t)[0])


# ---- the start of a run ----------------------------------------------------------------------------------------------


def quiet(number):
    return lambda samples, prompts: torch.zeros(number)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("Flux2KleinKVPipeline", "keys and values of the reference image"),
        ("QwenImage21Pipeline", "keys and values of the prompt unless use_kv_cache=False"),
    ],
)
@tiny.DIFFUSERS_42
def test_networks_that_keep_state_are_refused_at_the_start(label, reason):
    case = cases()[label]
    pipe, calls = case.build(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    given = arguments(case)
    prompt = given.pop("prompt", None)
    steerer = FeynmanKacSteerer(pipe, quiet(3), 3, particle_batch_size=2, decode="latents")
    said = rf"^particle_batch_size: .* for {label}, whose network keeps from call to call {reason}, got 2: leave"
    with pytest.raises(ValueError, match=said):
        steerer(prompt, **given)
    assert not calls


@tiny.DIFFUSERS_42
def test_without_its_cache_qwen_image_runs_in_micro_batches():
    results = [steered(cases()["QwenImage21Pipeline"], 5, size, use_kv_cache=False) for size in (None, 2)]
    compare(*results)


def test_unknown_arguments_are_named_in_a_run(flux):
    with pytest.raises(UndeclaredRows, match="FluxTransformer2DModel .* got secret of .4, 3"):
        flux.steer(particle_batch_size=2, joint_attention_kwargs={"secret": rows(4, 3)})


# ---- the zoo ---------------------------------------------------------------------------------------------------------


def for_two(name, value):
    """Return an argument of a call with one prompt as one of a call with two."""
    if isinstance(value, str) and name in ("prompt", "negative_prompt"):
        wordy = value.startswith("{")  # Bria Fibo's are in JSON
        return [value, value.replace('"a"', '"b"') if wordy else value[::-1]]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return [value[0], value[0][::-1]]
    if not ("embed" in name or "mask" in name or name == "class_labels") or name in ("mask_image", "control_mask"):
        return value
    if isinstance(value, Tensor) and "llama3" in name:
        return two(value, 1)
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == 1:
        return two(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Tensor):
        return [value[0], value[0].flip(0)]
    if isinstance(value, list) and all(isinstance(one, Tensor) and len(one) == 1 for one in value):
        return [two(one) for one in value]
    return value


def two(value, axis=0):
    """Return a tensor with another prompt's beside it; masks and classes are the same."""
    mask = not value.is_floating_point() or bool(((value == 0) | (value == 1)).all())
    return torch.cat([value, value if mask else value.flip(-1)], axis)


def steered(case, number, size, prompts=1, decode=None, networks=None, widths=None, **options):
    """Return the latents that the reward saw, and the result of a steered call.

    Args:
        case: Of the zoo.
        number: Particles of each prompt.
        size: Particles that a network sees.
        prompts: 1 or 2.
        decode: Latents decoded at a time.
        networks: Told of every call of a network.
        widths: Particles of each prompt in each half of the run.
    """
    pipe, latents = case.build(), []

    def reward(samples, prompts):
        latents.append(samples.clone())
        values = samples.flatten(1).double()
        weights = torch.linspace(-1, 1, values.shape[1], dtype=torch.float64)
        return 3 * (values * weights).sum(1) / values.std() / values.shape[1] ** 0.5

    given = arguments(case) | {"num_inference_steps": 3, "generator": tiny.seeded()} | options
    if prompts == 2:
        given = {name: for_two(name, value) for name, value in given.items()}
    prompt = given.pop("prompt", None)
    steerer = FeynmanKacSteerer(
        pipe, reward, number, num_transitions=2, ess_threshold=1.0, reward_scale=1.0,
        particle_batch_size=size, decode_batch_size=decode, decode="latents", widths=widths,
    )  # fmt: skip
    for module in modules(pipe, NETWORKS) if networks else ():
        module.register_forward_pre_hook(networks, with_kwargs=True)
    torch.manual_seed(0)  # some draw from the global generator
    result = steerer(prompt, **given)
    return torch.cat([one.flatten() for one in latents]), result


def compare(whole, other, latents=1e-5, pixels=5e-4):
    """Compare latents to a part of their size, and images to what autoencoders of random weights make of that."""
    assert torch.equal(whole[1].ancestors, other[1].ancestors)
    images = [torch.as_tensor(np.asarray(result.images)) for _, result in (whole, other)]
    for expected, value, tolerance in ((whole[0], other[0], latents), (*images, pixels)):
        distance = float((value.double() - expected.double()).abs().max())
        assert distance <= tolerance * max(1.0, float(expected.abs().max()))


def compare_runs(case, number, *parts, prompts=1):
    """Compare calls whose networks see some particles at a time with one whose networks see all.

    Where single precision rounds by more than is allowed (pixels, large weights), double precision decides.

    Args:
        case: Of the zoo.
        number: Particles of each prompt.
        parts: Particles that a network sees, and latents decoded at a time.
        prompts: 1 or 2.
    """
    try:
        whole = steered(case, number, None, prompts)
        for size, decode in parts:
            compare(whole, steered(case, number, size, prompts, decode), *tolerances(case))
    except AssertionError:
        if case.variant == "double":
            raise
        compare_runs(in_double_precision(case), number, *parts, prompts=prompts)


def tolerances(case):
    """Return those of latents and of images."""
    # these cannot be run in double precision, and round pixels: to bytes, to bfloat16
    coarse = case.name.startswith(("Cosmos2", "ZImageOmni"))
    return (5e-5, 1.1 / 255) if coarse else (1e-5, 5e-4)


def in_double_precision(case):
    return replace(
        case, build=lambda: case.build().to(torch.float64), call=lambda: doubled(case.call()), variant="double"
    )


def doubled(call):
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in call.items()
    }


class Lengths:
    """Notes the lengths of what networks get, and how many rows they get for each particle."""

    def __init__(self, number):
        self.number, self.found, self.copies = number, set(), set()

    def __call__(self, module, args, kwargs):
        declared = declared_by_network(module)
        given = {**dict(declared.named(args)), **kwargs}
        unknown = [name for name in given if declared.layout(name) is None]
        assert not unknown, f"{type(module).__name__}: {unknown}"
        self.note(list(given.values()))
        batch = next(value for value in given.values() if isinstance(value, list) or getattr(value, "ndim", 0) > 1)
        self.copies.add(len(batch) // self.number)

    def note(self, value):
        if isinstance(value, Tensor):
            self.found.update(value.shape[:3])
        elif isinstance(value, dict | list | tuple):
            self.found.add(len(value))
            for one in value.values() if isinstance(value, dict) else value:
                self.note(one)

    def coincidences(self):
        """Return numbers of particles of which, or of whose rows, there are as many as of something else."""
        at = {
            length // copies for length in self.found for copies in self.copies | {1} if copies and not length % copies
        }
        return sorted(number for number in at if 2 <= number < self.number)[:4]


def steerable():
    """Return the labels of the cases that are steered, or need `decode` only."""
    needs_decode = "no: decode: do not know"
    rows = documented()
    return sorted(label for label in cases() if label in rows and rows[label].steered.startswith(("yes", needs_decode)))


REFUSED = ("Flux2KleinKVPipeline", "OmniGenPipeline, from an image", "QwenImage21Pipeline")
ONE_PROMPT = ("LongCatImageEditPipeline", "OmniGenPipeline", "QwenImageEditPlusPipeline")
ZOO = [label for label in steerable() if label not in REFUSED]


@pytest.mark.zoo
@tiny.DIFFUSERS_42
@pytest.mark.slow
@pytest.mark.parametrize("label", sampled(ZOO))
@pytest.mark.filterwarnings("ignore")
def test_some_particles_at_a_time_change_nothing_in_the_zoo(label):
    """Numbers that divide and do not, decoding in parts; then at coincidences of lengths."""
    case = cases()[label]
    compare_runs(case, 14, (7, None), (4, 3))
    lengths = Lengths(13)
    steered(case, 13, None, networks=lengths)
    for number in lengths.coincidences():
        compare_runs(case, number, ((number + 1) // 2, 1))


@tiny.DIFFUSERS_42
@pytest.mark.slow
@pytest.mark.parametrize("label", sampled([label for label in ZOO if label not in ONE_PROMPT]))
@pytest.mark.filterwarnings("ignore")
def test_some_particles_at_a_time_change_nothing_with_two_prompts(label):
    compare_runs(cases()[label], 7, (4, 3), prompts=2)


@tiny.DIFFUSERS_42
@pytest.mark.slow
@pytest.mark.parametrize("label", ONE_PROMPT)
def test_those_that_take_one_prompt_refuse_two(label):
    assert label in ZOO
    with pytest.raises(UnsteerablePipeline, match="it takes one prompt at a time, got 2"):
        steered(cases()[label], 7, None, prompts=2)


@tiny.DIFFUSERS_42
def test_omnigen_tells_reference_images_by_the_number_of_their_row():
    with pytest.raises(UndeclaredRows, match="expected no input_im.*, as it tells rows by their number"):
        steered(cases()["OmniGenPipeline, from an image"], 4, 2)


@tiny.DIFFUSERS_42
@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("StableDiffusionControlNetPipeline", "image"),
        ("StableDiffusionXLControlNetPipeline", "image"),
        ("FluxControlNetPipeline", "control_image"),
        ("StableDiffusion3ControlNetPipeline", "control_image"),
        ("HunyuanDiTControlNetPipeline", "control_image"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_several_control_networks_change_nothing(label, name):
    """Their conditions are lists of tensors with rows."""
    case = cases()[label]

    def build():
        pipe = case.build()
        parts = dict(pipe.components)
        made = type(pipe)(**parts | {"controlnet": [parts["controlnet"]] * 2})
        made.set_progress_bar_config(disable=True)
        return made

    def call():
        given = case.call()
        return given | {name: [given[name]] * 2, "controlnet_conditioning_scale": [0.5, 0.7]}

    both = replace(case, build=build, call=call)
    for number in (5, 2):
        compare_runs(both, number, ((number + 1) // 2, None))
