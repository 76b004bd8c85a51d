"""fedjax: its FedAvg under jit, the models written in JAX with PyTorch's layouts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from job import Job

Parameters = dict[str, Any]


def linear(x: Any, weight: Any, bias: Any) -> Any:
    """A layer as ``torch.nn.Linear`` stores it."""
    return x @ weight.T + bias


def convolution(x: Any, weight: Any, bias: Any) -> Any:
    """A layer as ``torch.nn.Conv2d`` stores it, without padding."""
    out = jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    return out + bias[:, None, None]


def scores(p: Parameters, x: Any) -> Any:
    """What the model gives: its kind is known by the number of tensors."""
    if len(p) == 2:
        return linear(x, p["0"], p["1"])
    if len(p) == 4:
        return linear(jax.nn.relu(linear(x, p["0"], p["1"])), p["2"], p["3"])
    h = jax.nn.relu(convolution(jax.nn.relu(convolution(x, p["0"], p["1"])), p["2"], p["3"]))
    h = h.reshape(len(h), 64, 12, 2, 12, 2).max((3, 5)).reshape(len(h), -1)
    return linear(jax.nn.relu(linear(h, p["4"], p["5"])), p["6"], p["7"])


def loss(p: Parameters, x: Any, y: Any) -> Any:
    """Mean cross-entropy."""
    return -jnp.take_along_axis(jax.nn.log_softmax(scores(p, x)), y[:, None], 1).mean()


def arrays(p: Parameters) -> list[Any]:
    """The parameters in the order of PyTorch's model."""
    return [np.asarray(p[str(i)]) for i in range(len(p))]


def main() -> None:
    jax.tree_map = jax.tree_util.tree_map  # fedjax 0.0.17 calls it by this name, which JAX has removed
    import fedjax
    from fedjax.algorithms import fed_avg

    job = Job()
    setting = job.workload.setting
    algorithm = fed_avg.federated_averaging(
        lambda p, batch, rng: jax.grad(loss)(p, batch["x"], batch["y"]),
        fedjax.optimizers.sgd(setting.learning_rate),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=setting.batch_size, num_epochs=1, skip_shuffle=True),
    )
    clients = []
    for number in range(setting.num_clients):
        x, y = job.workload.client(number)
        clients.append(fedjax.ClientDataset({"x": x, "y": y.astype(np.int32)}))
    state = algorithm.init({str(i): jnp.asarray(value) for i, value in enumerate(job.workload.initial)})
    key = jax.random.PRNGKey(0)
    job.begin()
    for cohort in job.schedule:
        keys = jax.random.split(key, len(cohort))
        state, _ = algorithm.apply(state, [(c, clients[c], k) for c, k in zip(cohort, keys, strict=True)])
        jax.block_until_ready(state.params)
        job.round_done(partial(arrays, state.params))
    job.report()


if __name__ == "__main__":
    main()
