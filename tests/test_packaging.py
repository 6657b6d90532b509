"""What `pip install .`, the workflow, the image and the notebook say of the code is so."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

from texts import README, ROOT, read

PROJECT = tomllib.loads(read("pyproject.toml"))
PACKAGE, VERSION = "omni_grpo_scripts", re.compile(r"\d+\.\d+")
NOTEBOOK = os.path.join(ROOT, "docs", "demo.ipynb")


def pins(text: str) -> set[str]:
    return {line.partition("#")[0].strip() for line in text.splitlines()} - {""}


def test_pyproject_asks_for_what_requirements_txt_asks_for():
    trainer, tests = read("requirements.txt").split("# Tests\n")
    project = PROJECT["project"]
    assert set(project["dependencies"]) == pins(trainer) and len(pins(trainer)) > 9
    assert set(project["optional-dependencies"]["tests"]) == pins(tests)


def test_everybody_names_the_same_pythons():
    lowest, below = VERSION.findall(PROJECT["project"]["requires-python"])
    highest = "3." + str(int(below.partition(".")[2]) - 1)
    assert f"Python {lowest} to {highest}" in README
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + lowest.replace(".", "")
    assert VERSION.search(re.search(r"^FROM (.*)$", read("Dockerfile"), re.MULTILINE)[1])[0] == lowest
    (steps,) = [job["steps"] for job in workflow()["jobs"].values()]
    assert [step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")] == [
        lowest
    ]


def workflow() -> dict:
    return yaml.safe_load(read(".github/workflows/ci.yml"))


def test_the_workflow_runs_what_everybody_can_run():
    ci = workflow()
    assert set(ci[True]) == {"push", "pull_request"}  # YAML reads the word `on` as true
    assert ci["permissions"] == {"contents": "read"}
    (job,) = ci["jobs"].values()
    assert job["timeout-minutes"] <= 60
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(os.path.join(ROOT, ".ci", "run"), os.X_OK)


def test_the_image_is_made_of_files_that_are_there():
    let_in = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (.*) \S+$", read("Dockerfile"), re.MULTILINE)
    copied = {name for names in copied for name in names.split()}
    assert {"tools" if name == "tools/*.py" else name for name in let_in} == copied
    assert all(os.path.exists(os.path.join(ROOT, name)) for name in copied - {"*.py"})
    last = read("Dockerfile").splitlines()[-1]
    assert last.startswith("CMD ") and json.loads(last[4:])[0] in PROJECT["project"]["scripts"]


def test_every_command_is_a_function():
    for name, place in PROJECT["project"]["scripts"].items():
        module, _, function = place.partition(":")
        assert module == f"{PACKAGE}.tools.installed" and f"\ndef {function}()" in read(
            "tools/installed.py"
        ), name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what `pip install .` puts into site-packages, inside somebody's git repository."""
    pytest.importorskip(
        "setuptools", minversion=re.search(r">=(\d+)", PROJECT["build-system"]["requires"][0])[1]
    )
    folder = tmp_path_factory.mktemp("theirs")
    source = folder / "source"  # a build leaves files behind
    shutil.copytree(
        os.path.join(ROOT, "tools"), source / "tools", ignore=shutil.ignore_patterns("__pycache__")
    )
    papers = ["pyproject.toml", "README.md", "LICENSE"]
    for name in papers + [name for name in os.listdir(ROOT) if name.endswith(".py")]:
        shutil.copy(os.path.join(ROOT, name), source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "site", source], check=True)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-C", folder]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    return folder / "site"


@pytest.fixture
def start(site, tmp_path):
    """start(*words) in a folder whose files have the names of ours -> (exit code, all that it said)"""
    for name in ("data.py", "eval.py", "model.py", "tools.py"):
        (tmp_path / name).write_text("raise SystemExit('theirs')\n")

    def start(*words):
        words = [sys.executable, site / "bin" / words[0], *words[1:]]
        env = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{tmp_path}"}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return start


def test_installed_it_takes_nobodys_place(site):
    names = {name for name in os.listdir(site) if not name.endswith(".dist-info")}
    assert names == {PACKAGE, "bin"}
    scripts = {name for name in os.listdir(ROOT) if name.endswith(".py")}
    assert scripts | {"tools"} == set(os.listdir(site / PACKAGE)) - {"__pycache__"}
    assert set(os.listdir(site / "bin")) == set(PROJECT["project"]["scripts"])


def test_installed_commands_start_anywhere(start):
    for name, flag in [
        ("omni-grpo", "--num_generations"),
        ("omni-grpo-eval", "--compare"),
        ("omni-grpo-data", "check"),
    ]:
        code, said = start(name, "--help")
        assert code == 0 and said.startswith(f"usage: {name}") and flag in said
    code, said = start("omni-grpo-data", "check", "missing.jsonl")
    assert code == 2 and "missing.jsonl" in said and "Traceback" not in said
    code, said = start("omni-grpo-tool", "plots", "missing")
    assert code == 2 and "expected the directory of a run" in said
    for words in ([], ["nothing"]):
        code, said = start("omni-grpo-tool", *words)
        assert code == 2 and "usage: omni-grpo-tool NAME" in said and "plots " in said


def test_installed_it_names_no_foreign_commit(site):
    code = f"import {PACKAGE}.tools.installed, omni_grpo; print(repr(omni_grpo.machine()['commit']))"
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=site, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "''"


def test_the_notebook_is_stored_empty():
    with open(NOTEBOOK, encoding="utf-8") as f:
        text = f.read()
    assert len(text) < 10_000
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tiny, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install .[notebook]")
    pytest.importorskip("ipykernel", reason="pip install .[notebook]")
    import nbformat

    # a base is there already: the demo's own takes minutes
    there = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny.folder, there)
    shutil.copy(there / "demo.jsonl", there / "held_out.jsonl")
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.setenv("STEPS", "20")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    out = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in out)
    shown = {kind for output in out for kind in output.get("data", {})}
    assert "image/png" in shown and "<audio" in str(out)
    assert "anything else" in said.partition("before\n")[2].partition("after\n")[2]
    assert "step 10: [" in said and "step 20: [" in said and "x " in said
    assert len((tmp_path / "runs" / "notebook" / "log.jsonl").read_text().splitlines()) >= 20
