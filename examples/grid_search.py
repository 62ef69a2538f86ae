"""A grid search of scikit-learn, unchanged, on workers that share memory: the samples cross once, not once per task."""

from __future__ import annotations

import argparse

import joblib
import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, cross_val_score

import shmengine

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--samples", type=int, default=20_000, help="rows of the training array")
parser.add_argument("--features", type=int, default=100)
parser.add_argument("--workers", type=int, default=2)
options = parser.parse_args()

random = np.random.default_rng(0)
samples = random.standard_normal((options.samples, options.features))
labels = samples[:, :5].sum(axis=1) + random.standard_normal(options.samples) > 0

shmengine.joblib.register()
with joblib.parallel_config("shmengine", n_jobs=options.workers):
    search = GridSearchCV(RidgeClassifier(), {"alpha": np.logspace(-2, 4, 7)}, cv=3).fit(samples, labels)
    crossed = shmengine.joblib.stats().bytes_copied / samples.nbytes
    forest = RandomForestClassifier(10, max_depth=6, random_state=0)
    scores = cross_val_score(forest, samples, labels, cv=3)

print(f"21 fits; copied to workers: {crossed:.0f} times the size of the samples")
print(f"ridge {search.best_score_:.2f}, forest {scores.mean():.2f}")
