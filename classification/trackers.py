# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases, MLflow and ClearML as further places for the metrics of a run; TRACK in the configuration names them.

Each client is told where its server is, or that there is none, in its own way: by its environment variables or its login.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from checkpoint import random_state, set_random_state
from config import flat, to_dict
from litv2.errors import MissingPackage, UserError
from litv2.files import atomic_write

IDS = "trackers.json"  # in the run's folder: the id of the run in each tracker, with which a resumed run goes on there
PARAMETERS = 100  # that MLflow takes at once
# While a server does not answer, the training waits: by MLflow's own defaults for four minutes, for one that hangs far longer.
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


@dataclass(frozen=True)
class Run:
    project: str
    name: str
    folder: Path
    config: dict


class Tracker(ABC):
    """A run in a tracker; ``id`` is its own name for it. Any method may raise whatever the client raises."""

    id: str

    @abstractmethod
    def __init__(self, run: Run, id: str | None):
        """Starts the run, or goes on with the one that has this ``id``."""

    @abstractmethod
    def write(self, values: dict[str, float], update: int) -> None:
        """``values`` are named "train/loss" and the like; ``update`` counts optimizer steps."""

    @abstractmethod
    def close(self, complete: bool) -> None: ...


class WandB(Tracker):
    def __init__(self, run: Run, id: str | None):
        import wandb

        settings = wandb.Settings(console="off", silent=True)  # the log is ours
        self.run = wandb.init(
            project=run.project, name=run.name, dir=str(run.folder), config=run.config, id=id, resume="allow", allow_val_change=True,
            settings=settings,
        )  # fmt: skip
        # Not wandb's own step, which cannot go back to where a run is resumed.
        self.run.define_metric("*", step_metric="update")
        self.id = self.run.id

    def write(self, values: dict[str, float], update: int) -> None:
        self.run.log({**values, "update": update})

    def close(self, complete: bool) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class MLflow(Tracker):
    def __init__(self, run: Run, id: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for name, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        self.client = MlflowClient()
        if id is not None:
            self.client.update_run(id, status="RUNNING")
            self.id = id
            return
        experiment = self.client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment is not None else self.client.create_experiment(run.project)
        self.id = self.client.create_run(number, run_name=run.name).info.run_id
        parameters = [Param(key, str(value)) for key, value in flat(run.config)]
        for first in range(0, len(parameters), PARAMETERS):
            self.client.log_batch(self.id, params=parameters[first : first + PARAMETERS])

    def write(self, values: dict[str, float], update: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, update) for name, value in values.items()])

    def close(self, complete: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if complete else "KILLED")


class ClearML(Tracker):
    def __init__(self, run: Run, id: str | None):
        from clearml import Task
        from clearml.config import ConfigSDKWrapper, ConfigWrapper

        # Its thread that looks for git waits for what is forked meanwhile, its reporting process or workers, and the end of the run waited
        # five minutes for it. So git is asked at the start, and a thread reports, as on Windows; its process took ten seconds to end.
        ConfigWrapper.set_overrides({"sdk": {"development": {"vcs_repo_detect_async": False, "report_use_subprocess": False}}})
        ConfigSDKWrapper.clear_config_impl()
        ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.task: Any = Task.init(
            run.project, run.name, reuse_last_task_id=False, continue_last_task=id or False, auto_connect_arg_parser=False,
            auto_connect_frameworks=False, auto_connect_streams=False, auto_resource_monitoring=False,
        )  # fmt: skip
        for number, handler in ours.items():  # ClearML's would end the run before it has saved
            signal.signal(number, handler)
        self.task.set_initial_iteration(0)  # a resumed run counts on by itself
        self.task.connect_configuration(run.config, name="config")
        self.id = self.task.id

    def write(self, values: dict[str, float], update: int) -> None:
        for name, value in values.items():
            kind, _, series = name.partition("/")
            self.task.get_logger().report_scalar(kind, series, value, update)

    def close(self, complete: bool) -> None:
        if not complete:
            self.task.mark_stopped()
        self.task.close()


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandB, "mlflow": MLflow, "clearml": ClearML}  # by package


def check_installed(names: Sequence[str]) -> None:
    """Raises MissingPackage for the first tracker that is not."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(f"TRACK.TO contains {name}, which is not installed: pip install {name}")


class Trackers:
    """The trackers of a run; one that fails is reported by ``warn`` and left out.

    Raises:
        UserError: one cannot be started, unless the run is ``resumed``.
    """

    def __init__(self, config: CfgNode, folder: Path, resumed: bool, warn: Callable[[str], object], log: Callable[[str], object]):
        self.warn = warn
        self._running: dict[str, Tracker] = {}
        run = Run(config.TRACK.PROJECT, config.TRACK.NAME or f"{config.MODEL.NAME}/{config.TAG}", folder, to_dict(config))
        before = _read_ids(folder / IDS, warn) if resumed else {}
        for name in config.TRACK.TO:
            try:
                with _own_random_numbers():
                    self._running[name] = TRACKERS[name](run, before.get(name))
            except Exception as error:
                if not resumed:
                    self.close(complete=False)
                    raise UserError(f"TRACK.TO: {name} cannot be started: {_reason(error)}") from error
                warn(f"{name} cannot be started ({_reason(error)}); the run goes on without")
        for name, tracker in self._running.items():
            log(f"{name}: {run.project}, {run.name}, {'resumed' if tracker.id == before.get(name) else 'new'} run {tracker.id}")
        with atomic_write(folder / IDS) as draft:
            draft.write_text(json.dumps({**before, **{name: tracker.id for name, tracker in self._running.items()}}) + "\n")

    def write(self, values: dict[str, float], update: int) -> None:
        self._each("cannot be written to", lambda tracker: tracker.write(values, update))

    def close(self, complete: bool) -> None:
        self._each("cannot be closed", lambda tracker: tracker.close(complete))
        self._running.clear()

    def _each(self, failure: str, act: Callable[[Tracker], object]) -> None:
        for name, tracker in list(self._running.items()):
            try:
                with _own_random_numbers():
                    act(tracker)
            except Exception as error:  # the clients raise what their servers, transports and files raise
                del self._running[name]
                self.warn(f"{name} {failure} ({_reason(error)}); the run goes on without")


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Random numbers belong to the training: the clients draw from Python's generator, and ClearML seeds those of numpy and torch, too."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _read_ids(path: Path, warn: Callable[[str], object]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        warn(f"{path} is damaged ({error}); the trackers start new runs")
        return {}


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
