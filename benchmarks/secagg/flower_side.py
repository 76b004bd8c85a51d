"""One round of Flower's own ``SecAggPlusWorkflow`` and its clients' ``secaggplus_mod``, without a network between them.

    python flower_side.py '{"clients": 100, "params": 1000000, "dropped": 10, "shares": 33, "threshold": 23}'

Runs in Flower's environment (``flower.py`` starts it) and prints one line of JSON. The grid is a stand-in that hands
each message to that client's mod and back, in one process: nothing is packed into protocol buffers, encrypted for a
wire or sent. Whoever drops answers the third stage with an error, after its shares have been given out.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import vectors
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.common.secure_aggregation.secaggplus_constants import Key as Said
from flwr.compat.common import recorddict_compat as compat
from flwr.server import ServerConfig, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)


class Grid:
    """Every message to its client's mod at once; ``seconds`` of clients, by stage."""

    def __init__(self, dropped: set[int]) -> None:
        self.dropped = dropped
        self.contexts: dict[int, Context] = {}
        self.seconds: dict[str, float] = {}
        self.updates: dict[int, Any] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._answered(message) for message in messages]

    def _answered(self, message: Message) -> Message:
        number = message.metadata.dst_node_id
        context = self.contexts.setdefault(number, Context(1, number, {}, RecordDict(), {}))
        told = message.content.config_records[RECORD_KEY_CONFIGS]
        stage = str(told[Said.STAGE])
        if number in self.dropped and stage in ("collect_masked_vectors", "unmask"):
            return Message(Error(0, "dropped"), reply_to=message)
        content = RecordDict(dict(message.content.items()))
        content[RECORD_KEY_CONFIGS] = ConfigRecord(
            dict(told)
        )  # the first stage's is one for all, and the mod empties it
        own = Message(content, metadata=message.metadata)
        began = time.perf_counter()
        answer = secaggplus_mod(own, context, self._trained)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
        return answer

    def _trained(self, message: Message, context: Context) -> Message:
        parameters = self.updates[message.metadata.dst_node_id]
        found = FitRes(Status(Code.OK, ""), parameters, 1, {})
        return Message(compat.fitres_to_recorddict(found, False), reply_to=message)


def main() -> None:
    given = json.loads(sys.argv[1])
    clients, params = list(range(2, given["clients"] + 2)), given["params"]  # 1 is the server
    dropped = set(clients[: given["dropped"]])
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    grid = Grid(dropped)
    for client in clients:
        grid.updates[client] = ndarrays_to_parameters([vectors.update(client, params)])
    manager = SimpleClientManager()
    for client in clients:
        manager.register(GridClientProxy(client, grid, 1))  # type: ignore[arg-type]
    context = LegacyContext(
        Context(1, 0, {}, RecordDict(), {}),
        ServerConfig(num_rounds=1),
        FedAvg(fraction_fit=1.0, min_fit_clients=len(clients), min_available_clients=len(clients)),
        manager,
    )
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    start = ndarrays_to_parameters([np.zeros(params, np.float32)])
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(start, False)
    workflow = SecAggPlusWorkflow(given["shares"], given["threshold"], max_weight=1.0, clipping_range=vectors.LIMIT)
    began, at_work = time.perf_counter(), time.process_time()
    workflow(grid, context)  # type: ignore[arg-type]
    seconds, worked = time.perf_counter() - began, time.process_time() - at_work
    record = context.state.array_records[MAIN_PARAMS_RECORD]
    found = parameters_to_ndarrays(compat.arrayrecord_to_parameters(record, True))[0]
    mean = vectors.expected([client for client in clients if client not in dropped], params)
    parts = {**grid.seconds, "server": seconds - sum(grid.seconds.values())}
    said = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    error = float(np.abs(found - mean).max())
    print(
        json.dumps(
            {"round_s": seconds, "core_s": worked, "error": error, "tolerance": 2 * vectors.LIMIT / 2**22, "said": said}
        )
    )


if __name__ == "__main__":
    main()
