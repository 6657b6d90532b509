"""The house: which rooms there are, and that doors open one way only."""

import ast
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ORDER = ["reward", "data", "model", "omni_grpo", "eval", "tools"]  # each imports only what stands before it
ROOMS = {"omni_grpo.py", "model.py", "data.py", "reward.py", "eval.py", "tools", "docs", "tests"}
PAPERS = set(
    "README.md requirements.txt LICENSE pyproject.toml Dockerfile .ci .github .gitignore .dockerignore".split()
)
TOOLS = [f"tools/{name}" for name in sorted(os.listdir(os.path.join(ROOT, "tools"))) if name.endswith(".py")]


def imported_at_top(source: str) -> set[str]:
    """The rooms that a file imports when it is imported itself: not those inside its functions."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found & set(ORDER)


def may_import(room: str) -> set[str]:
    if room in ("reward", "data"):
        return set()
    return set(ORDER[: ORDER.index(room) + (room == "tools")])


@pytest.mark.parametrize("path", [f"{room}.py" for room in ORDER[:-1]] + TOOLS)
def test_imports_run_one_way(path):
    room = path.partition("/")[0].removesuffix(".py")
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        assert imported_at_top(f.read()) <= may_import(room)


def test_an_import_turned_round_would_be_seen():
    turned = "import data\nfrom tools.plots import x\ndef f():\n    import eval\n"
    assert imported_at_top(turned) == {"data", "tools"}
    assert not imported_at_top(turned) <= may_import("omni_grpo")
    assert may_import("data") == set() and "tools" in may_import("tools")


def test_these_are_all_the_rooms():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    top = {path.partition("/")[0] for path in done.stdout.splitlines()}
    assert top - PAPERS <= ROOMS and {"omni_grpo.py", "README.md"} <= top


def test_the_rewards_need_no_torch():
    code = "import sys, reward, data; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
