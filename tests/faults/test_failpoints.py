import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hansa.core.errors import InputError
from hansa.network import failpoints
from hansa.network.failpoints import FAILPOINTS, Reached, actions, fail_point

SOURCE = Path(failpoints.__file__).parents[1]


def called():
    """Every name that the source gives to ``fail_point``, as often as it does."""
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fail_point":
                [argument] = node.args
                yield argument.value


def test_the_source_names_every_fail_point_once_and_no_other():
    assert sorted(called()) == sorted(FAILPOINTS)


def test_a_fail_point_does_nothing_unless_it_is_asked_to():
    assert failpoints._watch is None
    fail_point("a name that nobody looks at")


def test_an_action_is_taken_every_time_or_at_the_time_that_was_named():
    always, third = actions("file.written=raise"), actions("file.written@3=raise")
    for number in (1, 2, 3, 4):
        with pytest.raises(Reached, match=r"file\.written"):
            always("file.written")
        if number == 3:
            with pytest.raises(Reached):
                third("file.written")
        else:
            third("file.written")
        third("coordinator.served")


def test_sleep_waits_in_the_thread_that_comes_by(monkeypatch):
    slept = []
    monkeypatch.setattr(failpoints.time, "sleep", slept.append)
    actions(" file.written=sleep:2.5, coordinator.served=raise ")("file.written")
    assert slept == [2.5]


@pytest.mark.parametrize(
    "text",
    ["file.wrote=kill", "file.written", "file.written=", "file.written=die", "file.written@0=kill", "=kill", "kill"],
)
def test_what_cannot_be_is_refused_with_what_was_expected(text):
    with pytest.raises(InputError, match=r"expected (one of|NAME=kill)"):
        actions(text)


def test_a_name_that_is_not_listed_is_an_error_where_a_watch_comes_by():
    with pytest.raises(InputError, match=r"found 'typo'"):
        actions("file.written=kill")("typo")


def hansa(points, *words):
    """The exit status and the errors of a command, with fail points from its environment."""
    env = {**os.environ, failpoints.VARIABLE: points}
    found = subprocess.run([sys.executable, "-m", "hansa", *words], env=env, capture_output=True, text=True, timeout=60)
    return found.returncode, found.stderr


def test_the_environment_kills_a_real_process_and_the_same_line_goes_on(tmp_path):
    words = ("invite", "berlin", "--state", str(tmp_path))
    (tmp_path / "coordinator.db").touch()
    assert hansa("coordinator.store.created=kill", *words)[0] == -9
    status, said = hansa("", *words)
    assert status == 2
    assert "expected to know the coordinator's address" in said


def test_a_wrong_name_in_the_environment_is_a_sentence(tmp_path):
    (tmp_path / "coordinator.db").touch()
    status, said = hansa("coordinator.typo=kill", "invite", "berlin", "--state", str(tmp_path))
    assert status == 2
    assert said.startswith("hansa: fail point: expected one of")
    assert "Traceback" not in said
