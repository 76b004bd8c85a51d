"""The federation as Flower runs it: FedAvg in a ServerApp, which notes when each round begins and saves the result."""

import json
import os
import time
from pathlib import Path

import numpy as np
import task
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


def mark(what: str, run: int, at: float) -> None:
    """Note a moment, in one write."""
    line = json.dumps({"what": what, "run": run, "at": at}) + "\n"
    with Path(os.environ["DEPLOYMENT_MARKS"]).open("a") as file:
        file.write(line)


class Marked(FedAvg):
    """FedAvg that notes the beginning of every round, which is the end of the one before."""

    run = 0

    def configure_train(self, server_round, arrays, config, grid):
        mark("round", self.run, time.time())
        return super().configure_train(server_round, arrays, config, grid)


def ask_often(grid: Grid, every_s: float) -> None:
    """Let ``send_and_receive`` ask for replies more often than every 3 s; otherwise it is Flower's own."""

    def send_and_receive(messages, *, timeout=None):
        waiting, replies = set(grid.push_messages(messages)), []
        end = time.time() + (timeout or 0.0)
        while timeout is None or time.time() < end:
            found = list(grid.pull_messages(waiting))
            replies += found
            waiting -= {message.metadata.reply_to_message_id for message in found}
            if not waiting:
                break
            time.sleep(every_s)
        return replies

    grid.send_and_receive = send_and_receive


@app.main()
def main(grid: Grid, context: Context) -> None:
    if "DEPLOYMENT_POLL_S" in os.environ:
        ask_often(grid, float(os.environ["DEPLOYMENT_POLL_S"]))
    everyone = task.NUM_CLIENTS
    strategy = Marked(fraction_evaluate=0.0, min_train_nodes=everyone, min_available_nodes=everyone)
    strategy.run = context.run_id
    first = ArrayRecord({"values": Array(task.initial())})
    result = strategy.start(grid, first, num_rounds=int(context.run_config["num-rounds"]))
    ended = time.time()
    np.save(os.environ["DEPLOYMENT_RESULT"], result.arrays["values"].numpy())
    mark("end", context.run_id, ended)
