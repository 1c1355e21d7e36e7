"""examples/benchmarks/gpu.py: its models as published, its tables at toy size, what it says without a GPU."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

NEEDS_A_GPU = "# torch.{}.is_available\n".format("cuda")  # by which the script finds such tests; not this file
BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    """The script as a module; what lies beside it has names of its own only while it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu
    yield gpu
    for name in ("gpu", "public_models"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("name", "transformer", "vae"),
    [
        ("flux", 11.90, 83.8),
        ("sd35-large", 8.06, 83.8),
        ("sd35-medium", 2.24, 83.8),
        ("wan", 1.42, 126.9),
        ("wan-14b", 14.29, 126.9),
    ],
)
def test_models_are_as_large_as_published(gpu, name, transformer, vae):
    """In 10⁹ and 10⁶ parameters; a FLUX without its embedding of guidance has 11.89."""
    model = gpu.MODELS[name]
    assert round(gpu.parameters(gpu.made(model.transformer, "meta")) / 1e9, 2) == transformer
    assert round(gpu.parameters(gpu.made(model.vae, "meta")) / 1e6, 1) == vae


def test_networks_are_bfloat16_but_for_what_diffusers_keeps(gpu):
    wan = gpu.made(gpu.toy(gpu.MODELS["wan"]).transformer, "meta")
    dtypes = {name: weight.dtype for name, weight in wan.named_parameters()}
    assert dtypes["patch_embedding.weight"] == torch.bfloat16
    assert dtypes["scale_shift_table"] == torch.float32
    assert torch.get_default_dtype() == torch.float32


# ---- the run ---------------------------------------------------------------------------------------------------------

STEP = ["FlowMatchEuler", "UniPC", *(f"ours, order {n}, transitions: {k}" for n in (1, 2) for k in (1, 5))]
ROWS = [
    *STEP, "the same, noise drawn on the device",
    "native", "GLASS, transitions: 1", "GLASS, transitions: 5",
    "plain, then scored", *(f"{reward}, twist {twist}" for twist in ("0", "0.5") for reward in ("brightness", "CLIP")),
    "all, all, twist 0", "all, 1, twist 0", "1, 1, twist 0", "1, 1, twist 0.5", "1, all, twist 0.5",
]  # fmt: skip


def tables(text):
    """Return the rows of all tables of a markdown text, as lists of cells, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| |")]
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]


@pytest.mark.slow
def test_every_row_is_measured_at_toy_size(gpu, capsys, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(f"{NEEDS_A_GPU}def test_on_a_gpu(): pass\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    small = ["--device", "cpu", "--toy", "--calls", "4", "--runs", "1", "--models"]
    assert gpu.main([*small, "flux", "sd35-medium", "wan"]) == 0
    out, err = capsys.readouterr()
    assert f"**CPU**, torch {torch.__version__}, diffusers " in out
    assert "Tests that need a GPU: 1 passed in " in out
    rows = tables(out)
    checkpointed = "1, 1, twist 0.5, checkpointing"
    assert [row[0] for row in rows] == [*ROWS, checkpointed, *ROWS, checkpointed, *ROWS]
    for name, *cells in rows:
        assert len(cells) == (5 if name in ROWS[:7] else 4 if name in ROWS[7:10] else 8 if name in ROWS[10:15] else 2)
        on_gpus = {5: 2, 4: 1, 8: 1, 2: 1}[len(cells)]  # waits and memory
        assert cells.count("–") == on_gpus + 4 * (name == "plain, then scored"), name
        assert all(float(cell) >= 0 for cell in cells if cell != "–")
        gradient = float(cells[5]) if len(cells) == 8 and name != "plain, then scored" else 0
        assert (gradient > 0) == (name in ("brightness, twist 0.5", "CLIP, twist 0.5")), name
    assert "Traceback" not in err


def test_without_a_gpu_one_line(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == "No GPU: nothing measured.\n"


def test_without_time_nothing_is_measured(gpu, capsys):
    assert gpu.main(["--device", "cpu", "--toy", "--minutes", "0"]) == 0
    out = capsys.readouterr().out
    assert not tables(out)
    assert "Tests that need a GPU: no time\n" in out
    assert [line for line in out.splitlines() if line.startswith("## ")] == [
        f"## {model.name}: no time" for model in gpu.MODELS.values()
    ]


# ---- its parts -------------------------------------------------------------------------------------------------------


def test_a_row_that_fails_leaves_the_others(gpu, capsys):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def wrong():
        raise KeyError("x")

    report = gpu.Report(minutes=1)
    rows = [("a", 0, out_of_memory), ("b", 0, wrong), ("c", 51, lambda: ["1", "2"]), ("d", 0, lambda: ["3", "4"])]
    report.table("What", "one | two", lambda: rows)
    out, err = capsys.readouterr()
    assert tables(out) == [
        ["a", "out of memory", ""],
        ["b", "failed: KeyError", ""],
        ["c", "no time", ""],
        ["d", "3", "4"],
    ]
    assert report.failures == 1  # too large is none
    assert "KeyError" in err
    report.table("Else", "one | two", wrong)
    assert capsys.readouterr().out == "\nElse: failed: KeyError\n"


def test_waits_are_those_that_torch_warns_of_within_a_step(gpu, monkeypatch):
    modes = []

    class Scheduler:
        timesteps = range(3)

        def set_timesteps(self, calls, device):
            pass

        def step(self, output, t, x, return_dict):
            assert modes[-1] == "warn"
            for text in ("called a synchronizing CUDA operation",) * (2 - t) + ("something else",):
                warnings.warn(text, stacklevel=1)
            return (x,)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    taken = gpu.stepped(Scheduler(), [torch.zeros(1)] * 3, 3, "cpu", count=True)
    assert [waits for _, _, waits in taken] == [2, 1, 0]
    assert modes == ["warn", "default"] * 3


def test_failing_tests_are_reported(gpu, capsys, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        f"{NEEDS_A_GPU}def test_on_a_gpu(): assert 0\ndef test_else(): pass\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    report = gpu.Report(minutes=1)
    assert gpu.gpu_tests(report).startswith("1 failed, 1 deselected in ")
    assert report.failures == 1
    assert "test_on_a_gpu" in capsys.readouterr().err
    assert gpu.gpu_tests(gpu.Report(minutes=1e-3)) == "stopped after 0 s"
