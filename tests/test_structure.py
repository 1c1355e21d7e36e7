"""The direction of imports: flow and smc are towers of their own, steering.py is the bridge."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "glassflows"
TOWERS = {
    "flow": ["noise", "denoise", "transition", "solver", "timetable", "state", "sample"],
    "smc": ["weights", "resampling", "potentials", "filter"],
}
OUTER = [
    "natives",
    "plan",
    "randomness",
    "scheduler",
    "flow_match",
    "decode",
    "pipelines",
    "chunks",
    "plotting",
    "result",
    "population",
    "steering",
]  # each may import those before it
REWARDS = ["images", "model", "open_clip", "clip", "aesthetic", "image_reward", "vlm", "compose", "adapters"]


def imports(path):
    """Return (dots, module) of every import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or node.names[0].name
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


def test_towers_import_downwards_and_no_host():
    for tower, modules in TOWERS.items():
        assert {path.stem for path in (SOURCE / tower).glob("*.py")} == {"__init__", *modules}
        for i, name in enumerate(modules):
            for level, module in imports(SOURCE / tower / f"{name}.py"):
                assert level == 0 or (level == 1 and module in modules[:i]), f"{tower}/{name} imports {module}"
                assert module.split(".")[0] not in ("diffusers", "transformers", "accelerate")


def test_outer_modules_import_downwards():
    for i, name in enumerate(OUTER):
        for level, module in imports(SOURCE / f"{name}.py"):
            if level:
                root = module.split(".")[0]
                assert root in TOWERS or root in OUTER[:i], f"{name} imports {module}"
                assert not (root == "smc" and name not in ("steering", "population")), (
                    "only the bridge knows the filter"
                )


def test_rewards_stand_by_themselves():
    """They know nothing of steering, and import transformers only where a model is read."""
    assert {path.stem for path in (SOURCE / "rewards").glob("*.py")} == {"__init__", *REWARDS}
    for i, name in enumerate(REWARDS):
        for level, module in imports(SOURCE / "rewards" / f"{name}.py"):
            assert level == 0 or (level == 1 and module in REWARDS[:i]), f"rewards/{name} imports {module}"
        for node in ast.parse((SOURCE / "rewards" / f"{name}.py").read_text()).body:
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"))


def test_no_module_is_long():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path.name
