"""The commands that `pip install` adds: omni-grpo, omni-grpo-eval, omni-grpo-data, omni-grpo-tool.

Installed, the scripts lie in a folder of their own, and import each other as they do in a clone: like
`python omni_grpo.py`, each command puts their folder first on the path, for its own process alone.
"""

import os
import runpy
import sys

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, FOLDER)
# config.json names the commit of these scripts: not that of a repository which holds the environment
os.environ["GIT_CEILING_DIRECTORIES"] = os.path.dirname(FOLDER)


def train() -> int:
    import omni_grpo

    return omni_grpo.main()


def evaluate() -> None:
    import data
    import eval as evaluation

    data.leave(evaluation.main())


def prepare() -> None:
    import data

    data.leave(data.main())


def tool() -> int | None:
    """omni-grpo-tool NAME ...: what `python -m tools.NAME ...` does in a clone."""
    import tools

    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if not os.path.isfile(os.path.join(FOLDER, "tools", f"{name}.py")):
        print(f"usage: omni-grpo-tool NAME ...\n\n{tools.__doc__}", file=sys.stderr)
        return 2
    del sys.argv[0]
    runpy.run_module(f"tools.{name}", run_name="__main__", alter_sys=True)
