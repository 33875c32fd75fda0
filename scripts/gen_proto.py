"""Makes the Python modules of `common/baton/v1` from `proto/baton/v1/*.proto`.

python scripts/gen_proto.py           write them
python scripts/gen_proto.py --check   compare only; exit status 1 when they differ
"""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOT = ROOT / "proto"
PACKAGE = Path("baton/v1")
TARGET = ROOT / "common" / PACKAGE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    made = generate()
    stale = differences(made)
    if check:
        for name in stale:
            print(f"{TARGET.relative_to(ROOT) / name} is not what the protos say: run scripts/gen_proto.py")
        return 1 if stale else 0
    for name in stale:
        write(TARGET / name, made.get(name))
    print(f"{len(made)} modules in {TARGET.relative_to(ROOT)}, {len(stale)} changed")
    return 0


def generate() -> dict[str, bytes]:
    """File name -> content: messages, their types, and gRPC stubs for clients that are not Baton."""
    protos = sorted(path.relative_to(SOURCE_ROOT) for path in (SOURCE_ROOT / PACKAGE).glob("*.proto"))
    with tempfile.TemporaryDirectory() as out:
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        status = protoc.main(["protoc", f"-I{SOURCE_ROOT}", *outputs, *map(str, protos)])
        if status != 0:
            sys.exit("protoc failed")
        return {path.name: path.read_bytes() for path in sorted((Path(out) / PACKAGE).iterdir())}


def differences(made: dict[str, bytes]) -> list[str]:
    """Names of files to write, and of generated ones that have no proto any more."""
    present = {path.name: path.read_bytes() for path in TARGET.glob("*_pb2*.py*")}
    return sorted(name for name in made.keys() | present.keys() if made.get(name) != present.get(name))


def write(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
