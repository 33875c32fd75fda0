"""Compiles `native.cpp`, once.

The C++ compiler that is there makes the library in the user's cache folder, under a name made of its source. For
images that have no compiler when they run, `python -m baton_kernels.native_build` makes it in this package instead.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("native.cpp")
# No -march=native: the file may be compiled on one machine and run on another. No fast-math: NaN has to stay NaN.
_FLAGS = (
    *(
        "-O3",
        "-std=c++17",
        "-march=x86-64-v4",
        "-mavx512bf16",
        "-mavx512vnni",
        "-ffp-contract=off",
        "-fno-exceptions",
    ),
    *("-fopenmp", "-shared", "-fPIC"),
)
_COMPILERS = ("c++", "g++", "clang++")


class Unavailable(Exception):
    """Why there are no native ops here."""


def find_library() -> Path:
    """Raises Unavailable."""
    name = library_name()
    for path in (_SOURCE.with_name(name), cache_folder() / name):
        if path.is_file():
            return path
    return build(cache_folder())


def library_name() -> str:
    return f"native-{hashlib.sha256(_SOURCE.read_bytes() + repr(_FLAGS).encode()).hexdigest()[:16]}.so"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton"


def build(folder: Path) -> Path:
    """Compiles the library into `folder`. Raises Unavailable."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"they are written for x86-64, not for {platform.machine()}")
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX") or _COMPILERS[0], *_COMPILERS))), None
    )
    if compiler is None:
        raise Unavailable("there is no C++ compiler")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made, path = Path(scratch) / "native.so", folder / library_name()
            subprocess.run(
                [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], check=True, capture_output=True, text=True
            )
            made.replace(path)  # at once, whoever else is doing the same
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{compiler} failed: {error.stderr.strip().splitlines()[:1]}") from error
    except OSError as error:
        raise Unavailable(f"it cannot be compiled into {folder}: {error}") from error
    return path


if __name__ == "__main__":
    sys.stdout.write(f"{build(_SOURCE.parent)}\n")
