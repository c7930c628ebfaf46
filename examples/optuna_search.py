# SPDX-License-Identifier: Apache-2.0
"""Searches two settings of the trainer with Optuna: a trial is a run of the trainer, judged by the report that it writes."""

import json
import sys
from pathlib import Path

import optuna

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "classification"))

from main import main  # noqa: E402

output = Path(sys.argv[1] if len(sys.argv) > 1 else "output/optuna")
small = "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 MODEL.LIT.EMBED_DIM 16 MODEL.LIT.DEPTHS [1,1,1,1]".split()  # so that it takes seconds


def top1(trial: optuna.Trial) -> float:
    rate = trial.suggest_float("TRAIN.BASE_LR", 4e-3, 6e-2, log=True)
    decay = trial.suggest_float("TRAIN.WEIGHT_DECAY", 0.01, 0.2, log=True)
    opts = [*small, "TRAIN.BASE_LR", str(rate), "TRAIN.WEIGHT_DECAY", str(decay)]
    flags = ["--cfg", str(ROOT / "classification/configs/litv2-digits.yaml"), "--output", str(output), "--workers", "0"]
    if main([*flags, "--tag", f"trial{trial.number}", "--opts", *opts]):
        raise KeyboardInterrupt  # the trainer was stopped
    return json.loads((output / f"litv2_digits/trial{trial.number}/report/summary.json").read_text())["top1"]


output.mkdir(parents=True, exist_ok=True)
study = optuna.create_study(
    storage=f"sqlite:///{output}/study.db", study_name="digits", load_if_exists=True, direction="maximize"
)  # kept: the same command adds trials
study.optimize(top1, n_trials=2)
print(f"best of {len(study.trials)} trials: top-1 {study.best_value:.1f} % with {study.best_params}")
