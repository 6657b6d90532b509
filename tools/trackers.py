"""Send what a run logs to trackers: python omni_grpo.py --report_to trackio,tensorboard ...

    python -m tools.trackers runs/NAME --report_to wandb      a run that is over, or was left behind

It is a process of its own that reads log.jsonl and rollouts.jsonl as they grow: whatever a tracker does, or
waits for, or dies of, the run is the run without it. tensorboard writes to runs/NAME/tensorboard; the others
call project and run omni-grpo and NAME, and their own variables (WANDB_MODE=offline, TRACKIO_DIR) work.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import data
from data import UserError

PROJECT = "omni-grpo"
COLUMNS = "question choices completion reward audio".split()  # of the table of rollouts
FINISH_S = 60  # a run waits so long at its end for what has not been sent


class Tensorboard:
    def __init__(self, out: str, config: dict):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(f"{out}/tensorboard", ignore_errors=True)  # it is written whole, each time
        self.writer = SummaryWriter(f"{out}/tensorboard")
        self.writer.add_text("config", markdown([["flag", "value"], *map(list, config.items())]), 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def log_rollouts(self, step: int, rows: list[list]) -> None:
        self.writer.add_text("rollouts", markdown([COLUMNS, *rows]), step)
        if rows[0][-1]:
            wave, _ = data.load_audio(rows[0][-1])
            self.writer.add_audio("rollouts/first", wave[None], step, data.RATE_HZ)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    def __init__(self, out: str, config: dict):
        import trackio

        self.module = trackio
        self.run = trackio.init(
            PROJECT,
            name=name_of(out),
            config=config,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, values: dict) -> None:
        self.run.log(values, step=step)

    def log_rollouts(self, step: int, rows: list[list]) -> None:
        heard = [[*row[:-1], row[-1] and self.module.Audio(row[-1])] for row in rows]
        self.log(step, {"rollouts": self.table(heard)})

    def table(self, rows: list[list]):
        import pandas

        return self.module.Table(dataframe=pandas.DataFrame(rows, columns=COLUMNS))

    def close(self) -> None:
        self.run.finish()


class Wandb(Trackio):
    def __init__(self, out: str, config: dict):
        import wandb

        self.module, name = wandb, name_of(out)
        self.run = wandb.init(project=PROJECT, name=name, id=name, dir=out, config=config, resume="allow")

    def table(self, rows: list[list]):
        return self.module.Table(columns=COLUMNS, data=rows)


class Swanlab(Trackio):
    def __init__(self, out: str, config: dict):
        import swanlab

        self.module, name = swanlab, name_of(out)
        self.run = swanlab.init(project=PROJECT, experiment_name=name, logdir=f"{out}/swanlab", config=config)

    def log_rollouts(self, step: int, rows: list[list]) -> None:
        self.log(step, {"rollouts": self.module.Text(markdown([COLUMNS, *rows]))})


TRACKERS = dict(tensorboard=Tensorboard, trackio=Trackio, wandb=Wandb, swanlab=Swanlab)


def name_of(out: str) -> str:
    return os.path.basename(os.path.abspath(out))


def markdown(rows: list[list]) -> str:
    rows = [[str(x).replace("|", "\\|").replace("\n", " ") for x in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


# ------------------------------------------------------------------------------------------------------------
# In the run


def names_of(report_to: str) -> list[str]:
    """Raises UserError for a tracker that is not known or not installed."""
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--report_to {name}: must be of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: is not installed; pip install {name}")
    return names


@contextlib.contextmanager
def following(report_to: str, out: str):
    """While the run goes on, another process follows its files; it knows of the end by its closed stdin."""
    if not report_to:
        yield
        return
    command = [sys.executable, "-m", "tools.trackers", out, "--report_to", report_to, "--until_closed"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    follower = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=2, env=environment, start_new_session=True
    )
    try:
        yield
    finally:
        follower.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            follower.wait(FINISH_S)
        if follower.poll() != 0:
            follower.kill()
            rest = f"python -m tools.trackers {out} --report_to {report_to} sends the rest"
            print(f"warning: not all has come to the trackers; {rest}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# In the other process


def follow(out: str, names: list[str], is_over) -> None:
    """Send every new line until is_over(), and then the rest. A tracker that fails is left out."""
    with open(f"{out}/config.json", encoding="utf-8") as f:
        config = json.load(f)["config"]
    sent_path, sent = f"{out}/trackers.json", {}
    if os.path.exists(sent_path):
        with open(sent_path, encoding="utf-8") as f:
            sent = json.load(f)
    sent["tensorboard"] = -1
    trackers, places, last = {}, {"rollouts.jsonl": 0, "log.jsonl": 0}, False
    for name in names:
        with warned(name, trackers):
            trackers[name] = TRACKERS[name](out, config)
    while not last and trackers:
        last = is_over()  # asked first: what was written until now is read below
        lines = {file: new_lines(f"{out}/{file}", places, file) for file in places}
        for name in list(trackers):
            with warned(name, trackers):
                sent[name] = send(trackers[name], sent.get(name, -1), *lines.values())
        data.write_text(sent_path, json.dumps(sent))
        if not last:
            time.sleep(1)
    for name in list(trackers):
        with warned(name, trackers):
            trackers[name].close()


def send(tracker, after: int, rollouts: list[dict], log: list[dict]) -> int:
    """What is of later steps than `after`.       -> the last step"""
    by_step = {}
    for line in rollouts:
        if line["step"] > after:
            clip = line["audio"][0] if isinstance(line["audio"], list) else line["audio"]
            row = [line["question"], line["choices"], line["completion"], line["reward"], clip]
            by_step.setdefault(line["step"], []).append(row)
    for step, rows in by_step.items():
        tracker.log_rollouts(step, rows)
    for record in log:
        if record["step"] > after:
            values = {key: value for key, value in record.items() if key != "step" and value is not None}
            tracker.log(record["step"], values)
    return max([after, *(record["step"] for record in log)])


def new_lines(path: str, places: dict[str, int], file: str) -> list[dict]:
    """The whole lines behind the place in the file, which moves on."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        f.seek(places[file])
        whole = f.read().rpartition(b"\n")[0]
    places[file] += len(whole) + bool(whole)
    return [json.loads(line) for line in whole.splitlines()]


@contextlib.contextmanager
def warned(name: str, trackers: dict):
    """Whatever goes wrong inside costs this tracker, and says so."""
    try:
        yield
    except Exception as e:  # every tracker raises its own
        trackers.pop(name, None)
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        print(f"warning: {name} is left out from here on: {reason}; log.jsonl has it all", file=sys.stderr)


def main(argv=None) -> int:
    parser = data.Parser(prog="python -m tools.trackers", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="runs/NAME")
    parser.add_argument("--report_to", required=True, help=", ".join(TRACKERS))
    parser.add_argument("--until_closed", action="store_true", help="until stdin is closed; a run says this")

    def command():
        given = parser.parse_args(argv)
        names, closed = names_of(given.report_to), threading.Event()
        if not os.path.exists(f"{given.run}/log.jsonl"):
            raise UserError(f"{given.run}: no log.jsonl there; expected the directory of a run")
        if not hasattr(given, "until_closed"):
            closed.set()
        else:  # a signal that ends the run lets this process send the rest
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
            threading.Thread(target=lambda: (sys.stdin.read(), closed.set()), daemon=True).start()
        follow(given.run, names, closed.is_set)

    return data.exit_code(command)


if __name__ == "__main__":
    data.leave(main())
