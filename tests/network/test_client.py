import subprocess
import sys

import pytest

SERVER_SIDE = ("fastapi", "uvicorn", "sqlalchemy", "pydantic", "starlette", "torch", "pandas", "sklearn")


@pytest.mark.parametrize(
    "module",
    ["client", "participant", "enrolment", "client_store", "messages", "token", "renewal", "receipts", "audit"],
)
def test_a_client_imports_nothing_of_the_servers(module):
    code = f"import sys, hansa.network.{module}; print([m for m in {SERVER_SIDE} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_in_the_network_can_run_what_it_receives():
    from pathlib import Path

    import hansa.network

    for path in Path(hansa.network.__file__).parent.glob("*.py"):
        text = path.read_text()
        for word in ("pickle", "marshal", "eval(", "exec(", "torch.load", "import_module", "__import__"):
            assert word not in text, f"{path.name} holds {word}"
