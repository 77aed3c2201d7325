"""What Weights & Biases wrote to `run-ID.wandb`, read back by its own command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def records(path: Path) -> list[dict[str, Any]]:
    """Each record with its `type`, and under that name its content.

    Of a file cut short they are those before the cut; a file of another kind has none.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    printed = subprocess.run(command, capture_output=True, text=True).stdout
    return [json.loads(line) for line in printed.splitlines()]
