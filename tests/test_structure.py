"""The architecture: pure towers, storeys that stand on them, and arrows that point down."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "glassflows"
STANDS_ON = {  # storey: what it may import
    "flow": {"signatures"},
    "smc": set(),
    "rewards": {"caller", "signatures"},
    "scheduler": {"flow", "signatures"},
    "host": {"scheduler"},
    "steering": {"host", "scheduler", "smc", "flow", "caller", "signatures"},
    "commands": {"steering", "rewards"},
}
ORDER = {  # within a storey each module may import those before it
    "flow": "noise denoise transition solver timetable state sample",
    "smc": "weights resampling potentials filter",
    "rewards": (
        "images resemblance model open_clip clip aesthetic image_reward qwen vlm clip_t5 questions hpsv3 clap ocr "
        "compose frames adapters http remote chat"
    ),
    "scheduler": "hooks supported config coordinates native calls noise_source progress glass flow_match",
    "host": "ledger outputs patch refusals team inpainting batch decode network_rows microbatch run",
    "steering": (
        "optional strategy arguments widths budget calibration feynman_kac best_of_n search scorer proposals "
        "trajectory population record display diversity samples result ending rollouts plotting steerer "
        "feynman_kac_steerer comparison"
    ),
    "commands": "rewards steer serve verify_rewards main",
}
TORCH_ONLY = ("flow", "smc")


def modules():
    return [(storey, name) for storey, names in ORDER.items() for name in names.split()]


def imports(path):
    """Return (dots, dotted name) of every import of a file that runs, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    for_checkers = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.ImportFrom):
            inside = node.module is None or (node.level == 1 and node.module is None)
            yield from (
                ((node.level, f"{node.module}.{alias.name}" if node.module else alias.name) for alias in node.names)
                if inside
                else ((node.level, node.module),)
            )
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


@pytest.mark.parametrize("storey", ORDER)
def test_every_module_has_its_place(storey):
    found = {path.stem for path in (SOURCE / storey).glob("*.py")}
    assert found == {"__init__", *ORDER[storey].split()}


def test_nothing_stands_outside_the_storeys():
    """But for the ground: how to warn a user and to show options, which knows of no storey."""
    outside = {"__init__.py", "py.typed", "__main__.py", "caller.py", "signatures.py", "serve.py"}
    assert {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"} == outside | set(ORDER)
    assert all(level == 0 for name in ("caller", "signatures") for level, _ in imports(SOURCE / f"{name}.py"))


@pytest.mark.parametrize(("storey", "name"), modules())
def test_arrows_point_down(storey, name):
    names = ORDER[storey].split()
    below = set(names[: names.index(name)])
    for level, module in imports(SOURCE / storey / f"{name}.py"):
        root = module.split(".")[0]
        if level == 1:
            # a figure is drawn by a result or a calibration that is asked for it
            drawn = name in ("result", "calibration", "feynman_kac_steerer comparison") and root == "plotting"
            assert root in below or drawn, f"{storey}/{name} imports {module}"
        elif level == 2:
            assert root in STANDS_ON[storey] | {"__version__"}, f"{storey}/{name} imports {module}"
        elif storey in TORCH_ONLY:
            assert root not in ("diffusers", "transformers", "accelerate"), f"{storey}/{name} imports {module}"
        assert level <= 2


def test_rewards_read_models_late():
    """They import transformers only where a model is read."""
    for path in (SOURCE / "rewards").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"))


def test_no_object_reads_the_private_attributes_of_another():
    """But for those of diffusers' and torch's own objects, which only the two lower storeys name."""
    foreign = ("pipe", "call.pipe", "component", "module", "network", "hook", "self.scheduler", "torch")
    of_named_tuples = ("_replace", "_asdict")
    for path in SOURCE.rglob("*.py"):
        for line in path.read_text().splitlines():
            for owner, attribute in re.findall(r"\b((?:\w+\.)*\w+)\.(_[a-z]\w*)", line.split("#")[0]):
                own = owner in ("self", "cls", "new") or (path.name, owner) == ("glass.py", "scheduler")
                allowed = own or owner in foreign or attribute in of_named_tuples
                assert allowed, f"{path.name}: {owner}.{attribute}"
