"""How large a Lark grammar's terminals are once they are spelled out. llguidance makes one regular expression of each,
whatever it was put together from, and its limits do not count what a long one costs: `B?` 3,000 times and `B` 3,000
times take 40 s for one mask, and fourteen terminals that each double the next half a gigabyte."""

import re

_MAX_DEPTH = 100  # of terminals within terminals
TOO_LARGE = 2**62

_DEFINITION = re.compile(r"^[ \t]*([?!]?[A-Za-z_]\w*)[ \t]*(?:\[[^\]\n]*\]|\.-?\d+)?[ \t]*:", re.MULTILINE)
_PART = re.compile(
    r'(?P<literal>"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/)|(?P<comment>//[^\n]*|\#[^\n]*)'
    r"|(?P<name>[A-Za-z_]\w*)|(?P<open>[(\[])|(?P<close>[)\]])"
    r"|(?P<repeat>~\s*\d+(?:\s*\.\.\s*\d+)?|\{\s*\d*\s*(?:,\s*\d*\s*)?\})"
)


def largest_terminal(source: str) -> tuple[str, int]:
    """(its name, its size): characters of the literals and regular expressions in it, each as often as it is
    repeated by a count."""
    found = list(_DEFINITION.finditer(source))
    ends = [*(match.start() for match in found[1:]), len(source)]
    bodies = {match[1]: source[match.end() : end] for match, end in zip(found, ends, strict=False)}
    sizes: dict[str, int] = {}
    terminals = [name for name in bodies if name.isupper()]
    return max(
        ((name, _size(name, bodies, sizes, 0)) for name in terminals), key=lambda x: x[1], default=("", 0)
    )


def _size(name: str, bodies: dict[str, str], sizes: dict[str, int], depth: int) -> int:
    """One that is not defined here counts 1. A circle is too large, as is a chain that is too long."""
    if depth > _MAX_DEPTH:
        return TOO_LARGE
    if name not in bodies:
        return 1
    if name not in sizes:
        groups: list[list[int]] = [[]]
        for part in _PART.finditer(bodies[name]):
            match part.lastgroup:
                case "literal":
                    groups[-1].append(len(part[0]) - 2)
                case "name":
                    groups[-1].append(_size(part[0], bodies, sizes, depth + 1))
                case "open":
                    groups.append([])
                case "close" if len(groups) > 1:
                    inner = sum(groups.pop())
                    groups[-1].append(inner)
                case "repeat" if groups[-1]:
                    groups[-1][-1] *= max([1, *map(int, re.findall(r"\d+", part[0]))])
        sizes[name] = min(TOO_LARGE, sum(map(sum, groups)))
    return sizes[name]
