# SPDX-License-Identifier: Apache-2.0
"""How good features are without training the model: nearest neighbours and linear classifiers, by scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np

from .errors import MissingPackage, UserError
from .features import Features

__all__ = ["accuracy", "check_labelled", "linear_probe", "nearest", "vote"]

CS = tuple(10.0**power for power in range(-4, 3))  # inverse strengths of the regularisation that cross-validation chooses from
FOLDS = 5
STEPS = 2000  # of the optimizer, at most


def check_labelled(train: Features, val: Features) -> list[str]:
    """Returns notes on the images of ``val`` that cannot be found right, because ``train`` has none of their class.

    Raises:
        UserError: the features are not of the same model, or some images have no class.
    """
    if (train.model, train.features.shape[1]) != (val.model, val.features.shape[1]):
        raise UserError("the two files have features of different models or image sizes; compute both with the same checkpoint")
    for which, content in (("training", train), ("validation", val)):
        if count := int((content.classes == "").sum()):
            raise UserError(f"{count} of the {len(content.classes)} {which} images have no class: they are not in a subfolder")
    lacking = ~np.isin(val.classes, train.classes)
    classes = sorted(set(val.classes[lacking].tolist()))
    return [f"{lacking.sum()} images are of classes without training images, and count as wrong: {', '.join(classes)}"] if classes else []


def vote(train: Features, val: Features, k: int) -> np.ndarray:
    """Returns for each image of ``val`` the class of most of its ``k`` nearest in ``train``, by cosine similarity, (N,).

    Raises:
        UserError: there are fewer images.
    """
    _need_sklearn()
    from sklearn.neighbors import KNeighborsClassifier

    if not 1 <= k <= len(train.images):
        raise UserError(f"--k {k}: expected 1 to {len(train.images)}, the number of training images")
    return KNeighborsClassifier(k, metric="cosine").fit(train.features, train.classes).predict(val.features)


def linear_probe(train: Features, val: Features, C: float | None = None) -> tuple[np.ndarray, float, list[str]]:
    """Fits a multinomial logistic regression to the standardised features of ``train``.

    Args:
        C: inverse strength of the L2 regularisation; None for that of ``CS`` with the best accuracy in ``FOLDS``-fold cross-validation
            within ``train``.

    Returns:
        the classes that it gives to the images of ``val``, (N,); C; notes.

    Raises:
        UserError: C is not positive, or there are too few classes or images.
    """
    _need_sklearn()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, counts = np.unique(train.classes, return_counts=True)
    if len(names) < 2:
        raise UserError(f"the training images are all of the class {names[0]}; a classifier needs two")
    if C is not None and not C > 0:
        raise UserError(f"--C {C}: expected a positive number")
    if C is None and counts.min() < FOLDS:
        few = f"the class {names[counts.argmin()]} has {counts.min()} training images"
        raise UserError(f"{few}, but cross-validation needs {FOLDS} of each; pass --C, such as --C 0.01")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C or 1.0, max_iter=STEPS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        if C is None:
            folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
            search = GridSearchCV(model, {"logisticregression__C": CS}, cv=folds).fit(train.features, train.classes)
            model, C = search.best_estimator_, search.best_params_["logisticregression__C"]
        else:
            model.fit(train.features, train.classes)
    unfinished = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    notes = [f"the optimizer did not converge in {STEPS} steps for some C"] if unfinished else []
    return model.predict(val.features), C, notes


def nearest(content: Features, query: np.ndarray, k: int) -> list[tuple[int, float]]:
    """Returns the indices of the ``k`` images whose features are most similar to the query (D,), and the cosine similarities, descending.

    Raises:
        UserError: there are fewer images.
    """
    _need_sklearn()
    from sklearn.neighbors import NearestNeighbors

    if not 1 <= k <= len(content.images):
        raise UserError(f"--top {k}: expected 1 to {len(content.images)}, the number of images")
    distances, indices = NearestNeighbors(n_neighbors=k, metric="cosine").fit(content.features).kneighbors(query[None])
    return list(zip(indices[0].tolist(), (1 - distances[0]).tolist()))


def accuracy(predicted: np.ndarray, val: Features) -> str:
    """Returns a text with the accuracy, the counts and the 95 % interval by Wilson."""
    from scipy.stats import binomtest

    right, images = int((predicted == val.classes).sum()), len(val.classes)
    low, high = binomtest(right, images).proportion_ci(method="wilson")
    return f"{right / images:.2%} right, {right} of {images} images, 95 % interval {low:.2%} to {high:.2%}"


def _need_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingPackage(f"{error}; features are evaluated with scikit-learn: pip install scikit-learn") from error
