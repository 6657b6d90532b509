import os
import sys

import pytest

# tests share the cores; and sums come out the same in this process and in those that tests start
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402

import data  # noqa: E402
import omni_grpo as og  # noqa: E402
from tools import demo, plots, sounds  # noqa: E402

SLOW = (
    "test_run test_trouble test_reward test_recipes test_plain test_generate test_relisten test_model test_ranks "
    "test_fits test_formats test_eval test_served"
).split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


draw_curves = plots.draw_curves


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """Runs draw their curves, which takes a third of a second, where a test asks for `drawn`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_curves", lambda out: None)
        yield


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(plots, "draw_curves", draw_curves)


@pytest.fixture
def command(capsys):
    """command(main, *words) -> (its exit code, all that it said on both streams)"""

    def command(main, *words):
        code = main(list(map(str, words)))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out + captured.err

    return command


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with `base`, `demo.jsonl` and `sounds/`: the demo's, smaller, the base taught just enough to name sounds at
    random, so that rewards have spread and gradients are not zero."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    questions = sounds.write_sounds(folder, 24, 4, seed=1, name="demo")
    lessons = sounds.write_lessons(sounds.write_sounds(folder, 12, 4, seed=3, name="lessons"), 200)
    demo.make_tiny_omni(os.path.join(folder, "init"), lessons)
    taught, _ = og.train(
        og.Config(
            model=os.path.join(folder, "init"),
            cold_start_data=lessons,
            cold_start_steps=40,
            steps=0,
            lora_rank=0,
            lr=2e-3,
            prompts_per_step=8,
            reduce="token",
            gradient_checkpointing=False,
            save_every=1000,
            out=os.path.join(folder, "teach"),
        )
    )
    os.rename(os.path.join(taught, "model"), os.path.join(folder, "base"))
    return type(
        "Tiny",
        (),
        dict(folder=folder, base=os.path.join(folder, "base"), questions=questions, lessons=lessons),
    )


@pytest.fixture(scope="session")
def config(tiny):
    """Config for the tiny base; keyword arguments change it."""

    def make(**changes):
        return og.Config(
            **dict(
                model=tiny.base,
                data=tiny.questions,
                lora_rank=4,
                prompts_per_step=2,
                num_generations=3,
                max_new_tokens=6,
                lr=1e-3,
                steps=2,
                eval_size=0,
            )
            | changes
        )

    return make


def wake(policy):
    """Its adapter is a no-op no longer."""
    with torch.no_grad():
        for name, p in policy.trainable().items():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return policy


@pytest.fixture
def policy(config):
    """The tiny base with an adapter that is not a no-op: LoRA's B is drawn at random."""
    torch.manual_seed(0)
    return wake(og.load_run_policy(config()))


@pytest.fixture
def prompts(policy, config, tiny):
    """Three prompts with their examples; the clips differ in sound and length."""
    examples = data.Examples(tiny.questions)[:3]
    clips = [og.load_clips_of(policy, config(), e)[0] for e in examples]
    return examples, og.encode_prompts(policy, config(), examples, clips)
