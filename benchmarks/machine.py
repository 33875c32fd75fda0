"""What a table of measurements says about where it was taken."""

import datetime
import os
import platform
import re
from pathlib import Path


def describe_machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return (
        f"{today}, {os.cpu_count()} cores of {model[1] if model else platform.processor()}, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )
