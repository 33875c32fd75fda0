"""Lines per package and the longest functions: whether the code is still as small as it was meant to be.

    python scripts/code_stats.py [--longest 10]

Lines are those of the files, comments and empty ones included; a function's are those from its `def` to its end.
Generated stubs are left out. Markdown on stdout.
"""

import argparse
import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "common" / "baton" / "v1"
# Where each package lies, and how deep its sub-packages are told apart.
PACKAGES = (
    "common/baton",
    "common/baton/*",
    "kernels/baton_kernels",
    "services/*",
    "services/baton_router/openai",
    "loadtest/baton_loadtest",
    "benchmarks",
    "scripts",
    "tests",
)


@dataclass(frozen=True)
class Function:
    where: str  # file:line name
    num_lines: int


@dataclass(frozen=True)
class Package:
    name: str
    files: tuple[Path, ...]

    @property
    def file_lines(self) -> list[int]:
        return [len(path.read_text(encoding="utf-8").splitlines()) for path in self.files]

    @property
    def functions(self) -> list[Function]:
        return [function for path in self.files for function in functions_of(path)]


def packages() -> list[Package]:
    """Those with files of their own, each file in one only: the deepest."""
    directories = sorted({path for pattern in PACKAGES for path in ROOT.glob(pattern) if path.is_dir()})
    directories = [path for path in directories if path != GENERATED and path.name != "__pycache__"]
    owned: dict[Path, list[Path]] = {directory: [] for directory in directories}
    for top in [path for path in directories if not any(p in path.parents for p in directories)]:
        for file in sorted(top.rglob("*.py")):
            if GENERATED not in file.parents:
                owner = next(parent for parent in file.parents if parent in owned)
                owned[owner].append(file)
    return [Package(str(d.relative_to(ROOT)), tuple(files)) for d, files in owned.items() if files]


def functions_of(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            yield Function(where, (node.end_lineno or node.lineno) - node.lineno + 1)


def percentile(values: list[int], percent: int) -> int:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def table(found: list[Package]) -> str:
    lines = [
        "| package | files | lines | median / longest file | functions | median / p90 / longest function |"
    ]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for package in found:
        files, functions = package.file_lines, [f.num_lines for f in package.functions] or [0]
        lines.append(
            f"| {package.name} | {len(files)} | {sum(files)} | {statistics.median(files):.0f} / {max(files)} "
            f"| {len(functions)} | {statistics.median(functions):.0f} / {percentile(functions, 90)} / "
            f"{max(functions)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--longest", type=int, default=10, help="functions to name; tests are not among them")
    options = parser.parse_args()
    found = packages()
    print(table(found))
    product = [p for p in found if p.name.split("/")[0] in ("common", "kernels", "services", "loadtest")]
    functions = sorted((f for p in product for f in p.functions), key=lambda f: -f.num_lines)
    total = sum(sum(package.file_lines) for package in product)
    print(f"\n{total} lines without tests, benchmarks and scripts. The longest functions there:\n")
    for function in functions[: options.longest]:
        print(f"- {function.num_lines} lines: `{function.where}`")


if __name__ == "__main__":
    main()
