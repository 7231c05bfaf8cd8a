"""Processes that wait for the first one."""

import pytest

from tests.conftest import TORCHRUN, command

SCRIPT = """
import sys
from accelerate import Accelerator
from shared.config import InputError
from shared.training.processes import join_processes, on_first_process

join_processes()
accelerator = Accelerator(cpu=True)
assert on_first_process(accelerator, lambda: accelerator.process_index + 7) == 7


def fail():
    raise {error}("no such thing")


try:
    on_first_process(accelerator, fail)
except Exception as error:
    print(f"rank {{accelerator.process_index}}: {{type(error).__name__}}: {{error}}", flush=True)
"""


@pytest.mark.parametrize(
    ("error", "others"),
    [
        ("InputError", "InputError: no such thing"),
        ("OSError", "RuntimeError: the first process failed: OSError: no such thing"),
    ],
)
def test_what_goes_wrong_on_the_first_process_ends_the_others(tmp_path, error, others):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(error=error))
    said = command(path, launcher=TORCHRUN).stdout
    assert f"rank 0: {error}: no such thing" in said and f"rank 1: {others}" in said
