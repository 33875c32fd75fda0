"""Where a worker's image has no compiler, Triton finds its driver module compiled ahead."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia.driver")
pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")

BUILD = """
import pathlib, sys
from baton_kernels import triton_driver
triton_driver.PREBUILT = pathlib.Path(sys.argv[1])
print(triton_driver.build())
"""
# What Triton does when it launches the first kernel.
LOAD = """
import pathlib, sys
from baton_kernels import triton_driver
triton_driver.PREBUILT = pathlib.Path(sys.argv[1])
from triton.backends.nvidia import driver
print(driver.CudaUtils().launch)
"""
WITHOUT_COMPILER = {"PATH": "/nowhere", "TRITON_CACHE_MANAGER": "baton_kernels.triton_driver:PrebuiltFirst"}


def python(script: str, prebuilt: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, str(prebuilt)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)


def fake_libcuda(for_module: str, folder: Path) -> None:
    """Every function that the module wants, and each does nothing."""
    wanted = re.findall(r" U (cu\w+)", subprocess.check_output(["nm", "-D", for_module], text=True))
    source = folder / "cuda.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in wanted))
    soname = "-Wl,-soname,libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-w", soname, source, "-o", folder / "libcuda.so.1"], check=True)


def test_tritons_driver_is_found_where_there_is_no_compiler(tmp_path: Path) -> None:
    prebuilt = tmp_path / "prebuilt"
    built = python(BUILD, prebuilt, TRITON_INTERPRET="0")
    assert built.returncode == 0, built.stderr
    fake_libcuda(built.stdout.strip(), tmp_path)
    env = WITHOUT_COMPILER | {
        "LD_LIBRARY_PATH": str(tmp_path),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_INTERPRET": "0",
    }
    loaded = python(LOAD, prebuilt, **env)
    assert "launch" in loaded.stdout, loaded.stderr
    without = python(LOAD, tmp_path / "nothing", **env)
    assert "Failed to find C compiler" in without.stderr
