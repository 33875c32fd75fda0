"""Triton's own driver module, compiled ahead for images that have no compiler when they run.

Triton compiles its kernels by itself, but first the C module that launches them, and that wants a C compiler
and Python's headers. `python -m baton_kernels.triton_driver` does it into this package; where TRITON_CACHE_MANAGER is
`baton_kernels.triton_driver:PrebuiltFirst`, Triton finds it there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from triton import knobs
from triton.backends.nvidia import driver
from triton.runtime.build import compile_module_from_src
from triton.runtime.cache import FileCacheManager

PREBUILT = Path(__file__).with_name("prebuilt")
NAME = "cuda_utils"  # as Triton calls it


class PrebuiltFirst(FileCacheManager):  # type: ignore[misc]  # Triton has no types
    """By name and not by Triton's key: that depends on which programs are on the PATH, such as `file`."""

    def get_file(self, filename: str) -> str | None:
        made = PREBUILT / filename
        found: str | None = str(made) if made.is_file() else super().get_file(filename)
        return found


def build() -> Path:
    """Compiles the module as Triton would, but links an empty libcuda.so.1, since the builder has no GPU's driver."""
    with tempfile.TemporaryDirectory() as scratch:
        _make_stub(Path(scratch, "libcuda.so.1"))
        knobs.cache.dir = scratch
        with suppress(ImportError):  # Triton loads it at once, which takes the real one
            compile_module_from_src(
                src=Path(driver.dirname, "driver.c").read_text(),
                name=NAME,
                library_dirs=[driver.libdevice_dir, scratch],
                include_dirs=driver.include_dirs,
                libraries=driver.libraries,
                # A linker that drops what is not needed would drop the stub, which has none of the symbols.
                ccflags=["-Wl,--no-as-needed", *(f"-l:{library}" for library in driver.libraries)],
            )
        [made] = Path(scratch).glob(f"*/{NAME}*.so")
        PREBUILT.mkdir(exist_ok=True)
        return Path(shutil.copy(made, PREBUILT))


def _make_stub(path: Path) -> None:
    flags = ["-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull]
    subprocess.run([os.environ.get("CC", "gcc"), *flags, "-o", str(path)], check=True)


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
