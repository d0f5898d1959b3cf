"""A run that is killed over and over ends as if nothing had happened: SIGKILL at random moments, also while saving."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import train
from train.checkpoint import MODEL, list_checkpoints
from train.metrics import read_metrics

KILLS = 12

# Children of a process that has imported everything already, and has no threads: each is a process of its own.
LIVES = """
import json, os, random, signal, sys, time
from pathlib import Path
from train.launch import launch
from train.config import Config
from train.presets import load_preset

changes, kills, seed = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config, draw = load_preset("countdown-smoke").change(**changes), random.Random(seed)
run = Path(config.run.output)

def live(last):
    child = os.fork()
    if child == 0:
        try:
            resumed = (run / "config.json").exists()
            os._exit(launch(Config.load(run / "config.json") if resumed else config, run if resumed else None))
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(99)
    return child

def last_step():
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    complete = [line for line in lines if line.endswith("}")]
    return json.loads(complete[-1])["step"] if complete else -1

moments = []
while len(moments) < kills:
    saved = max([int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")], default=0)
    # every other life ends in the middle of a save, a little into it; the others a moment after some step
    child, saving, goal = live(False), len(moments) % 2 == 1, saved + draw.randint(0, 3)
    while True:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            print(json.dumps({"ended early": status, "after": moments}))
            sys.exit(1)
        if list((run / "checkpoints").glob("unfinished-*")) if saving else last_step() >= goal:
            time.sleep(draw.uniform(0, 0.02 if saving else 0.2))
            break
        time.sleep(0.0005)
    unfinished = [path.name for path in (run / "checkpoints").glob("unfinished-*")]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    moments.append(unfinished[0] if unfinished else f"after step {last_step()}")
status = os.waitstatus_to_exitcode(os.waitpid(live(True), 0)[1])
print(json.dumps({"moments": moments, "status": status}))
"""


def timeless(run: Path) -> list[dict]:
    """A run's metrics without the clock's."""
    clock = ("time/", "step_time", "rhythm/statistics_", "memory/", "tokens_per_second")
    return [{k: v for k, v in record.items() if not k.startswith(clock)} for record in read_metrics(run)]


def live(kills: int, seed: int, **changes) -> dict:
    script = [sys.executable, "-c", LIVES, json.dumps(changes), str(kills), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(train.__file__).parent.parent)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_continues_bit_for_bit(tmp_path, record_property):
    seed = random.SystemRandom().randrange(10**9)
    changes = {"cache": str(tmp_path / "cache"), "max_steps": 72, "save_steps": 2, "prompts_per_step": 4}
    changes |= {"credit_groups_every": 3, "credit_group_by": "batch", "sample_answers": 0}
    assert live(0, seed, **changes, output=str(tmp_path / "whole"))["status"] == 0
    killed = live(KILLS, seed, **changes, output=str(tmp_path / "run"))
    print(f"seed {seed}: killed at {killed['moments']}")
    assert killed["status"] == 0 and len(killed["moments"]) == KILLS
    assert sum(moment.startswith("unfinished") for moment in killed["moments"]) >= KILLS // 3
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    last = [list_checkpoints(tmp_path / name)[-1] / MODEL / "model.safetensors" for name in ("run", "whole")]
    assert last[0].name and last[0].read_bytes() == last[1].read_bytes()
    assert not list((tmp_path / "run" / "checkpoints").glob("unfinished-*"))
