#!/usr/bin/env python3
"""The door of a checkout: `python cli.py …` is `edgekd …`, from any working directory, installed or not. Not in the wheel."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import edgekd  # noqa: E402

if str(ROOT) not in edgekd.__path__:
    edgekd.__path__.append(str(ROOT))  # the folder X beside edgekd/ is edgekd.X

from edgekd.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
