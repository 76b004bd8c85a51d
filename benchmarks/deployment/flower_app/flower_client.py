"""The federation as Flower runs it: what a SuperNode's ClientApp does when it is asked to train."""

import task
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    client = int(context.node_config["client"])
    values = task.train(message.content["arrays"]["values"].numpy(), client)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"values": Array(values)}),
            "metrics": MetricRecord({"num-examples": task.num_examples(client)}),
        }
    )
    return Message(content=content, reply_to=message)
