"""Private statistics of all clients' rows, before training or after it: counts, means, histograms, quantiles, scores.

    hansa.simulate(hansa.statistics.survey(hansa.statistics.Count(), epsilon=1, delta=1e-6), hospitals, num_rounds=1)

A survey is a federation like any other, whose model is the vector of sums and whose one round releases it: the same
chain, noise, ledger and network.
"""

from hansa.statistics.sums import Accuracy, Categories, Count, Estimate, Histogram, Mean, Quantiles, Statistic
from hansa.statistics.survey import Questions, RecordBound, answers, lines, survey

__all__ = [
    "survey",
    "answers",
    "lines",
    "Count",
    "Mean",
    "Histogram",
    "Categories",
    "Quantiles",
    "Accuracy",
    "Estimate",
    "Statistic",
    "Questions",
    "RecordBound",
]
