"""`farm`'s entry point sets its process up before libraries read the environment."""

import os
import subprocess
import sys

PROGRAM = """
import atexit, os, sys
from farm.cli.main import main
atexit.register(lambda: print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules))
sys.argv = ["farm", "--help"]
main()
"""


def _last_line(environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def test_threads_give_way_before_torch_has_read_how_long_they_spin() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    assert _last_line(environment) == "1000 False"
    assert _last_line({**environment, "GOMP_SPINCOUNT": "7"}) == "7 False"
