"""What the laws of runtimes are asked of: one line for everything that can travel through a runtime."""

import support
from hansa.aggregators.krum import Krum
from hansa.aggregators.mean import Mean
from hansa.aggregators.median import Median
from hansa.aggregators.secure_mean import SecureMean
from hansa.aggregators.trimmed_mean import TrimmedMean
from hansa.algorithms.fedopt import FedAdam, FedAvgM
from hansa.algorithms.fedprox import FedProx
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.data.prepare import Standardize
from hansa.learners.linear import LinearLearner
from hansa.transforms.clip import Clip
from hansa.transforms.distributed_noise import SkellamNoise
from hansa.transforms.noise import GaussianNoise
from hansa.transforms.quantize import Quantize
from hansa.transforms.rotate import Rotate
from hansa.transforms.sparsify import TopK

LOCAL = {"client_learning_rate": 0.05, "local_epochs": 2, "batch_size": 4}
CLASSIFIER = LinearLearner(num_features=3, num_classes=2, metrics=("f1", "auc", "accuracy"))
FEDERATIONS = {
    "FedAvg": support.linear(),
    "FedProx": support.linear(algorithm=FedProx(**LOCAL, strength=0.1)),
    "FedAdam": support.linear(algorithm=FedAdam(**LOCAL)),
    "SCAFFOLD": support.linear(algorithm=SCAFFOLD(**LOCAL)),
    "SCAFFOLD, TopK, Quantize": support.linear(
        algorithm=SCAFFOLD(**LOCAL), transforms=(TopK(fraction=0.4), Quantize(bits=8))
    ),
    "prepared": support.linear(prepare=(Standardize(min_rows=1), Standardize(min_rows=1))),
    "noise": support.linear(
        algorithm=FedAvgM(**LOCAL),
        transforms=(Clip(norm=1.0), GaussianNoise(noise_multiplier=0.5, delta=1e-3)),
        aggregator=Mean(weighting="clients"),
    ),
    "Median": support.linear(aggregator=Median(), transforms=(Quantize(bits=8),)),
    "TrimmedMean": support.linear(aggregator=TrimmedMean(fraction=0.2)),
    "Krum": support.linear(aggregator=Krum(num_byzantine=1)),
    "SecureMean": support.linear(
        algorithm=SCAFFOLD(**LOCAL), transforms=(Clip(norm=2.0),), aggregator=SecureMean(bits=20)
    ),
    "SecureMean, weighted": support.linear(
        transforms=(Clip(norm=2.0),), aggregator=SecureMean(bits=20, weighting="examples", max_weight=16)
    ),
    "SecureMean, groups": support.linear(
        transforms=(Clip(norm=2.0),), aggregator=SecureMean(bits=20, num_groups=3, across=Median())
    ),
    "SecureMean, noise in shares": support.linear(
        transforms=(Clip(norm=2.0), Rotate(), SkellamNoise(noise_multiplier=0.5, num_noising=2)),
        aggregator=SecureMean(min_survivors=3),
    ),
    "classes": support.linear(learner=CLASSIFIER),
}
