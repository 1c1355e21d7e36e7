"""What a run holds, what it writes into, and that it sees whatever a host does to the latents it was handed."""

import gc

import numpy as np
import pytest
import torch

import tiny
from glassflows import GLASSScheduler, sample
from glassflows.scheduler.hooks import TransitionHook

SHAPE = (3, 7, 11)  # that of no other tensor
CALLS = 9


@pytest.fixture
def frozen():
    """Keep whatever is there already out of the collector's sight, and its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def scheduler_of(**options):
    scheduler = GLASSScheduler(**{"num_transitions": 3, **options})
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / CALLS, CALLS))
    scheduler.set_generator(tiny.seeded(1))
    return scheduler


def steps(scheduler, edit=lambda i, x: x, dtype=torch.float32):
    """Step through a run of a network that bends; yield what each step hands out."""
    x = torch.randn(SHAPE, generator=tiny.seeded()).to(dtype)
    for i, t in enumerate(scheduler.timesteps):
        x = edit(i, x)
        out = scheduler.step(torch.sin(x) - 0.3 * x, t, x)
        x = out.prev_sample
        yield out


def last(*args, **options):
    *_, out = steps(*args, **options)
    return out.prev_sample


def held():
    """Return the number of tensors of the latents' shape that are alive, those that share memory counted once."""
    gc.collect()
    tensors = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.shape == SHAPE)
    return len({one.untyped_storage().data_ptr() for one in tensors})


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("hooked", [False, True], ids=["alone", "hooked"])
def test_a_finished_run_lets_go_of_its_latents(order, hooked, frozen):
    before, scheduler = held(), scheduler_of(solver_order=order)
    scheduler.hook = TransitionHook() if hooked else None
    for i, out in enumerate(steps(scheduler)):
        del out
        if 0 < i < CALLS - 1:
            assert held() > before
    assert held() == before
    assert scheduler.step_index == CALLS
    with pytest.raises(ValueError, match="the run has ended"):
        scheduler.step(torch.ones(SHAPE), scheduler.timesteps[-1], torch.ones(SHAPE))


@pytest.mark.slow
@pytest.mark.parametrize(("order", "most"), [(1, 3), (2, 6)])
def test_a_run_holds_what_its_order_needs(order, most, frozen):
    """x_t, e and a copy of what was handed out; for order 2 ẑ, Δ and the extrapolation, too."""
    before, scheduler = held(), scheduler_of(solver_order=order)
    given = 2  # the latents and the prediction, which the host holds
    assert max(held() - before - given for out in steps(scheduler) if out) <= most


def in_place(x):
    x[1:] += 0.25
    return x


def through_data(x):
    x.data[1:] += 0.25
    return x


def data_replaced(x):
    x.data = torch.cat([x[:1], x[1:] + 0.25])
    return x


def through_numpy(x):
    if x.dtype == torch.bfloat16:
        x.view(torch.int16).numpy()[1:] = (x[1:] + 0.25).view(torch.int16).numpy()
    else:
        x.numpy()[1:] += 0.25
    return x


def of_a_view(x):
    x.view(-1)[SHAPE[1] * SHAPE[2] :].add_(0.25)
    return x.view(SHAPE)


def laid_out_anew(x):
    return torch.cat([x[:1], x[1:] + 0.25]).transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", [in_place, through_data, data_replaced, through_numpy, of_a_view, laid_out_anew])
@pytest.mark.parametrize("order", [1, 2])
def test_an_edit_is_seen_however_it_is_made(order, way, dtype, mode):
    def run(edit, at):
        return last(scheduler_of(solver_order=order), lambda i, x: edit(x) if i in at else x, dtype=dtype)

    with mode():
        for at in ([4], [3, 6], [8]):
            expected = run(lambda x: torch.cat([x[:1], x[1:] + 0.25]), at)
            assert torch.equal(run(way, at), expected)
            assert not torch.equal(run(lambda x: x, at), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("order", [1, 2])
def test_latents_handed_back_otherwise_are_not_edited(order, dtype):
    """As a copy, a view, laid out anew or with a rounding that changes nothing."""
    plain = last(scheduler_of(solver_order=order), dtype=dtype)
    for way in (
        torch.clone,
        lambda x: x[:],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.double().to(dtype),
    ):
        assert torch.equal(last(scheduler_of(solver_order=order), lambda i, x, way=way: way(x), dtype=dtype), plain)


@pytest.mark.parametrize("order", [1, 2])
def test_what_is_handed_out_stays_what_it_was(order):
    """To the host, to observers, and to a hook, which may hold it to the end."""
    scheduler, seen = scheduler_of(solver_order=order), []

    def keep(*tensors):
        seen.extend((one, one.clone()) for one in tensors)

    class Hook(TransitionHook):
        def at_boundary(self, at, x_t, z):
            keep(x_t, z)

        def after_call(self, call, x_next):
            keep(x_next)

    for hook in (Hook(), None):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / CALLS, CALLS))
        scheduler.hook, scheduler.on_denoised = hook, lambda call, z: keep(z)
        scheduler.on_boundary = lambda at, x_t, z: keep(x_t, z)
        for out in steps(scheduler):
            keep(out.prev_sample, out.pred_original_sample)
    assert all(torch.equal(one, then) for one, then in seen)
    assert len({id(one) for one, _ in seen}) > 4 * CALLS


@pytest.mark.parametrize("order", [1, 2])
def test_observers_may_write_into_what_they_are_told(order):
    plain = [torch.cat(tuple(out.values())) for out in steps(scheduler_of(solver_order=order))]
    scheduler = scheduler_of(solver_order=order)
    scheduler.on_denoised = lambda call, z: z.fill_(7.0)
    scheduler.on_boundary = lambda at, x_t, z: z.fill_(7.0)
    assert all(
        torch.equal(torch.cat(tuple(out.values())), expected)
        for out, expected in zip(steps(scheduler), plain, strict=True)
    )


@pytest.mark.parametrize("num_transitions", [1, 3, 9])
@pytest.mark.parametrize("order", [1, 2])
def test_sample_writes_into_nothing_that_it_is_given(order, num_transitions):
    x, noises = torch.randn(5, 3, generator=tiny.seeded()), torch.randn(num_transitions - 1, 5, 3)
    given, outputs = (x.clone(), noises.clone()), []

    def denoise(x, t):
        outputs.append((z := torch.sin(x) * t, z.clone()))
        return z

    options = {"num_steps": 9, "num_transitions": num_transitions, "noises": list(noises), "solver_order": order}
    z = sample(denoise, x, **options)
    assert torch.equal(x, given[0])
    assert torch.equal(noises, given[1])
    assert all(torch.equal(one, then) for one, then in outputs)

    buffer = torch.empty_like(x)

    def one_buffer(x, t):  # and its input is its to write into
        torch.mul(x.sin_(), t, out=buffer)
        x.fill_(7.0)
        return buffer

    assert torch.equal(sample(one_buffer, x, **options), z)


@pytest.mark.parametrize("options", [{"num_transitions": 1}, {"num_transitions": 3}, {"num_transitions": 9}], ids=str)
@pytest.mark.parametrize("order", [1, 2])
def test_sample_is_mapped_over_noises_and_networks(order, options):
    """torch.func.vmap refuses writes into tensors that it does not map."""
    number = options["num_transitions"] - 1
    x, noises = torch.randn(4, 3, generator=tiny.seeded()), torch.randn(2, number, 4, 3, generator=tiny.seeded(1))
    weights = torch.tensor([0.4, 0.9])

    def chain(weight, *noises):
        return sample(
            lambda x, t: torch.sin(weight * x) + t, x, num_steps=9, noises=noises, solver_order=order, **options
        )

    over_networks = torch.func.vmap(lambda weight: chain(weight, *noises[0]))(weights)
    torch.testing.assert_close(over_networks, torch.stack([chain(one, *noises[0]) for one in weights]))
    if number:
        over_noises = torch.func.vmap(lambda drawn: chain(weights[0], *drawn))(noises)
        torch.testing.assert_close(over_noises, torch.stack([chain(weights[0], *one) for one in noises]))
