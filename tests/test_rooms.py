"""Which package may import which (docs/development.md): no import points back up."""

import ast

import pytest
import tiny

PACKAGE = tiny.ROOT / "focusdpo_jax"
SHARED = {"errors", "files", "file_kinds", "progress", "array_types", "compiling", "interrupts"}
# From the bottom to the top.
MAY_IMPORT = {
    "focus": set(),
    "diffusion": set(),
    "objectives": {"focus", "toybox"},  # Toybox: encoders.py, when one of its objectives is used.
    "config": {"objectives"},
    "models": {"diffusion"},
    "sharding": {"models"},
    "profiling": set(),
    "toybox": {"models", "diffusion"},
    "data": {"toybox", "config"},
    "checkpoints": {"models", "diffusion", "objectives"},
    "visualization": set(),
    "vision": {"data", "checkpoints", "sharding"},
    "inference": {"data", "diffusion", "models", "sharding"},
    "disruption": {"data", "diffusion", "models", "sharding", "vision", "inference"},
}
MAY_IMPORT["evaluation"] = set(MAY_IMPORT) - {"disruption", "focus"}
MAY_IMPORT["training"] = set(MAY_IMPORT) - {"disruption"}
MAY_IMPORT["planning"] = set(MAY_IMPORT) - {"disruption", "evaluation"}


def imported(path):
    """Names of the package's modules and packages that a file imports, those for annotations left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("focusdpo_jax"):
            parts = node.module.split(".")
            yield from parts[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("focusdpo_jax.")
            )


@pytest.mark.parametrize("room", sorted(p.name for p in PACKAGE.iterdir() if p.is_dir()))
def test_no_import_points_up(room):
    if not list((PACKAGE / room).glob("*.py")):
        pytest.skip("no code")
    allowed = SHARED | MAY_IMPORT[room] | {room}
    for path in (PACKAGE / room).rglob("*.py"):
        assert set(imported(path)) <= allowed, path


def test_focus_and_diffusion_need_little():
    for room in ("focus", "diffusion"):
        for path in (PACKAGE / room).glob("*.py"):
            assert set(imported(path)) <= {room, "errors", "array_types"}, path


def test_only_commands_know_config_dicts():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        if (PACKAGE / room).is_dir() and room != "config":
            assert "ml_collections" not in path.read_text(), path
