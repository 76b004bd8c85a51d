"""The newest released model at a client: a small run directory at ``STATE/model``, swapped by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hansa.core.layout import Layout
from hansa.network.blobs import write_file
from hansa.network.failpoints import fail_point
from hansa.network.messages import Released
from hansa.tensors import Packed
from hansa.version import __version__


def keep_model(
    folder: Path, released: Released, layout: Layout, vectors: Mapping[str, Any], app: tuple[str, bytes] | None
) -> Path:
    """Write the model as ``folder/models/RUN-ROUND`` and point ``folder/model`` at it; older ones are removed.

    ``vectors`` are the parameters and the preparations' sums, ``app`` its fingerprint and source. Whoever has opened
    the old directory keeps reading the old files; ``hansa.load_run(STATE/model, app="app.py")`` reads the newest.
    """
    fail_point("client.model.downloaded")
    parameters = vectors["params"][: layout.num_params]
    parameters.flags.writeable = False  # so that what was written is let go
    tensors = {
        **layout.unflatten(parameters, copy=False),
        **{n: v for n, v in vectors.items() if n.startswith("prepare.")},
    }
    info = {
        "hansa": __version__,
        "run": released.run,
        "rounds_done": released.round + 1,
        "fingerprint": app[0] if app else None,
        "final": {},
        "layout": layout.as_json(),
    }
    newest = folder / "models" / f"{released.run}-{released.round}"
    newest.mkdir(parents=True, exist_ok=True)
    write_file(newest / "parameters.safetensors", Packed(tensors, {}))
    write_file(newest / "run.json", json.dumps(info, indent=1).encode())
    if app:
        write_file(newest / "app.py", app[1])
    link = folder / "model.new"
    link.unlink(missing_ok=True)
    fail_point("client.model.written")
    link.symlink_to(Path("models") / newest.name)
    fail_point("client.model.linked")
    os.replace(link, folder / "model")
    fail_point("client.model.swapped")
    for old in newest.parent.iterdir():
        if old != newest:
            shutil.rmtree(old, ignore_errors=True)
    fail_point("client.model.cleaned")
    return newest
