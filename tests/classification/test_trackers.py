# SPDX-License-Identifier: Apache-2.0
"""Trackers of metrics: what they get, what happens when one fails, and that a resumed run goes on in the same one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import distributed
import trackers
from checkpoint import random_state
from config import load_config
from helpers import FAST, ROOT
from litv2.errors import MissingPackage, UserError, run_program
from main import main
from metrics import Metrics, read_metrics
from trackers import IDS, ClearML, Run, Tracker, Trackers, check_installed

DIGITS = ROOT / "classification/configs/litv2-digits.yaml"


class Fake(Tracker):
    """Fails when it is told to."""

    fails: tuple[str, ...] = ()
    made: list[Fake] = []

    def __init__(self, run, id):
        self.act("start")
        self.run, self.id, self.got = run, id or "7", []
        Fake.made.append(self)

    def act(self, what):
        random.random()
        np.random.seed(1)
        torch.manual_seed(1)
        if what in self.fails:
            raise RuntimeError(f"no {what}\nand more")

    def write(self, values, update):
        self.act("write")
        self.got.append((update, values))

    def close(self, complete):
        self.act("close")
        self.got.append(complete)


@pytest.fixture
def fake(monkeypatch):
    """Stands in for wandb."""
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Fake)
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "fails", ())
    return Fake


def settings(*opts):
    return load_config(DIGITS, ["TRACK.TO", "[wandb]", *opts])


def test_what_a_tracker_gets(fake, tmp_path):
    state = random_state()
    metrics = Metrics(tmp_path)
    metrics.start_trackers(settings("TAG", "mine"), resumed=False, log=print)
    metrics.write("train", 3, loss=0.5, memory_mb=None)
    metrics.write("val", 4, epoch=1)
    metrics.close(complete=False)
    (tracker,) = fake.made
    assert tracker.got == [(3, {"train/loss": 0.5}), (4, {"val/epoch": 1}), False]
    assert (tracker.run.project, tracker.run.name, tracker.run.folder) == ("litv2", "litv2_digits/mine", tmp_path)
    assert tracker.run.config["TRAIN"]["EPOCHS"] == 15
    after = random_state()
    assert str(after) == str(state) and torch.equal(after["torch"], state["torch"]), "the training's random numbers are its own"
    other = Metrics(tmp_path, active=False)  # of another rank
    other.start_trackers(settings(), resumed=True, log=print)
    assert len(fake.made) == 1


def test_a_resumed_run_is_the_same_one(fake, tmp_path):
    (tmp_path / IDS).write_text('{"wandb": "12", "mlflow": "34"}')
    Trackers(settings(), tmp_path, resumed=True, warn=print, log=print)
    assert fake.made[0].id == "12" and json.loads((tmp_path / IDS).read_text()) == {"wandb": "12", "mlflow": "34"}
    Trackers(settings(), tmp_path, resumed=False, warn=print, log=print)
    assert fake.made[1].id == "7" and json.loads((tmp_path / IDS).read_text()) == {"wandb": "7"}
    (tmp_path / IDS).write_text("{")
    warnings = []
    Trackers(settings(), tmp_path, resumed=True, warn=warnings.append, log=print)
    assert fake.made[2].id == "7" and f"{IDS} is damaged" in warnings[0]


def test_every_process_hears_of_one_that_cannot_be_started(fake, tmp_path, monkeypatch):
    """Only rank 0 tries; the others would wait for it for ever."""
    monkeypatch.setattr(distributed, "gather", lambda value: ["wandb cannot be started", value])
    with pytest.raises(UserError, match="^wandb cannot be started$"):
        Metrics(tmp_path, active=False).start_trackers(settings(), resumed=False, log=print)


@pytest.mark.parametrize("what, message", [("write", "cannot be written to"), ("close", "cannot be closed")])
def test_one_that_fails_is_left_out(what, message, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(fake, "fails", (what,))
    warnings = []
    running = Trackers(settings(), tmp_path, resumed=False, warn=warnings.append, log=print)
    running.write({"train/loss": 1.0}, 1)
    running.write({"train/loss": 1.0}, 2)
    running.close(complete=True)
    assert warnings == [f"wandb {message} (no {what}); the run goes on without"]


def test_one_that_does_not_start(fake, tmp_path, monkeypatch):
    """Ends a new run, but not one that is resumed."""
    monkeypatch.setattr(fake, "fails", ("start",))
    with pytest.raises(UserError, match="TRACK.TO: wandb cannot be started: no start$"):
        Trackers(settings(), tmp_path, resumed=False, warn=print, log=print)
    (tmp_path / IDS).write_text('{"wandb": "12"}')
    warnings = []
    Trackers(settings(), tmp_path, resumed=True, warn=warnings.append, log=print)
    assert len(warnings) == 1 and json.loads((tmp_path / IDS).read_text()) == {"wandb": "12"}


def test_unknown_or_missing(monkeypatch):
    with pytest.raises(UserError, match="TRACK.TO may contain wandb, mlflow and clearml, got 'tensorbord'"):
        settings("TRACK.TO", "[tensorbord]")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="TRACK.TO contains mlflow, which is not installed: pip install mlflow"):
        check_installed(["mlflow"])


@pytest.mark.extra
def test_a_run_in_mlflow_and_wandb(tmp_path, monkeypatch):
    """Stopped and resumed: one run with the metrics of metrics.jsonl in MLflow's database, two parts of one in wandb's offline files."""
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    write = Metrics.write

    def stopping(metrics, kind, update, **values):
        write(metrics, kind, update, **values)
        if update == 3 and not os.path.exists(tmp_path / "stopped"):
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "write", stopping)
    flags = ["--cfg", str(DIGITS), "--output", str(tmp_path), "--workers", "0", "--batch-size", "256"]
    opts = [*FAST, "TRAIN.EPOCHS", "1", "TRACK.TO", "[wandb,mlflow]", "TRACK.PROJECT", "numbers"]
    assert [run_program(lambda: main([*flags, "--opts", *opts])) for _ in range(2)] == [143, 0]

    folder = tmp_path / "litv2_digits/default"
    ids, rows = json.loads((folder / IDS).read_text()), read_metrics(folder)
    losses = [(row["update"], row["loss"]) for row in rows if row["kind"] == "train"]
    parts = [path.read_bytes() for path in folder.glob(f"wandb/offline-run-*-{ids['wandb']}/run-*.wandb")]
    assert len(parts) == 2 and all(sum(json.dumps(loss).encode() in part for part in parts) == 1 for _, loss in losses)
    client = mlflow.MlflowClient()
    run = client.get_run(ids["mlflow"])
    assert client.get_experiment(run.info.experiment_id).name == "numbers" and run.info.run_name == "litv2_digits/default"
    assert run.info.status == "FINISHED" and len(client.search_runs([run.info.experiment_id])) == 1
    assert run.data.params.items() >= {"TRAIN.EPOCHS": "1", "TRACK.TO": "['wandb', 'mlflow']", "MODEL.LIT.EMBED_DIM": "16"}.items()
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")] == losses
    assert run.data.metrics["val/top1"] == rows[-1]["top1"]


@pytest.mark.extra
def test_clearml_offline(tmp_path, monkeypatch):
    """Programs are started in our thread alone, and nothing is forked: a pipe that another thread has open would stay open there."""
    threads = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            threads.append(threading.current_thread())
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked"))
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path))
    task = pytest.importorskip("clearml").Task
    task.set_offline(True)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # it sets its own
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    tracker = ClearML(Run("project", "name", tmp_path, {"TRAIN": {"EPOCHS": 3}}), None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    tracker.write({"train/loss": 0.25}, 5)
    session = tracker.task.get_offline_mode_folder()
    tracker.close(complete=True)
    assert set(threads) == {threading.current_thread()}
    (event,) = [event for line in (session / "metrics.jsonl").read_text().splitlines() for event in json.loads(line)]
    assert (event["metric"], event["variant"], event["value"], event["iter"]) == ("train", "loss", 0.25, 5)
