"""Where the flexkv program is that belongs to this package."""
from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def find_program() -> str:
    """That of this package (pip install --target) before that of this environment, before any other."""
    for folder in (Path(__file__).resolve().parents[1] / "bin", Path(sys.executable).parent,
                   Path(sysconfig.get_path("scripts"))):
        program = folder / "flexkv"
        if os.access(program, os.X_OK):
            return str(program)
    program = shutil.which("flexkv")
    if program:
        return program
    raise FileNotFoundError(
        "the flexkv program is neither beside this Python nor in PATH, so no daemon can be "
        "started. Install it, or start a daemon elsewhere and set "
        "FLEXKV_SERVER_LAUNCH_MODE=external")
