"""What tables of measurements have in common: where they were taken, and how a cell says its spread."""

import datetime
import os
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path


def describe_machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return (
        f"{today}, {os.cpu_count()} cores of {model[1] if model else platform.processor()}, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (least-greatest)."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"
