"""Communication of a compiled program, read from its HLO text.

XLA's cost analysis counts the body of a loop once; here each collective counts once per execution.
"""

import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}|\b(?:true|false)_computation=%?([\w.\-]+)")
_WHILE = re.compile(r" while\(.*?\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count[^0-9]{1,12}(\d+)")
_LIMIT = re.compile(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_OP = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class _Use(NamedTuple):
    computation: str
    times: int


def collective_bytes(hlo: str, most: int = 1) -> dict[str, float]:
    """Bytes that one device sends in one run of the program, by kind of collective.

    With n devices and a result of R bytes, a device sends (n - 1) / n of R in an all-gather or all-to-all, (n - 1) R
    in a reduce-scatter (R is one shard) and 2 (n - 1) / n of R in an all-reduce. All branches of a conditional count.

    Args:
        hlo: text of the optimised module.
        most: assumed trip count of loops whose condition depends on data.
    """
    bodies, entry = _computations(hlo)
    uses = {name: list(_uses(lines, bodies, most)) for name, lines in bodies.items()}
    # The text repeats a fused asynchronous collective with the same channel and name. The channel alone does not
    # identify it: all collectives of a shard_map share one.
    sent: dict[object, tuple[str, float]] = {}
    waiting = [_Use(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        waiting += [_Use(inner, times * more) for inner, more in uses[name]]
        for number, line in enumerate(bodies[name]):
            if (found := _OP.search(line)) is None:
                continue
            channel, operation = re.search(r"channel_id=(\d+)", line), re.search(r'op_name="([^"]*)"', line)
            key = (channel[1], *found.groups()[:2], operation and operation[1]) if channel else (name, number)
            kind, nbytes = found[2], times * _sent(found[2], bool(found[3]), found[1], line)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # a fusion of the TPU compiler
                kind, nbytes = "reduce-scatter", nbytes / 2
            sent[key] = kind, max(sent.get(key, (kind, 0.0))[1], nbytes)
    total = dict.fromkeys(KINDS, 0.0)
    for kind, nbytes in sent.values():
        total[kind] += nbytes
    return total


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    return bodies, entry


def _uses(lines: list[str], bodies: dict[str, list[str]], most: int) -> list[_Use]:
    """The computations that a computation calls, with trip counts."""
    found = []
    for line in lines:
        if loop := _WHILE.search(line):
            found.append(_Use(loop[2], _trips(line, bodies.get(loop[1], []), most)))
        elif "-done(" not in line and "-update(" not in line:
            found += [_Use(name, 1) for name in _CALLS.findall(line)]
        for several, one in _BRANCHES.findall(line):
            found += [_Use(name.strip().lstrip("%"), 1) for name in (several or one).split(",")]
    return [use for use in found if use.computation in bodies]


def _trips(line: str, condition: list[str], most: int) -> int:
    """Trip count of a loop: as annotated by XLA, from the constant in a scan's condition, or `most`."""
    if known := _TRIPS.search(line):
        return int(known[1])
    constants = dict(found.groups() for text in condition if (found := _LIMIT.search(text)))
    root = next((text for text in condition if text.lstrip().startswith("ROOT")), "")
    limits = [int(value) for name, value in constants.items() if re.search(rf"%{re.escape(name)}\b", root)]
    return limits[0] if limits and "direction=LT" in root else most


def _sent(kind: str, started: bool, shape: str, line: str) -> float:
    """Bytes that a device sends in one collective, from the shape of its result."""
    arrays = [
        BYTES.get(dtype, 4) * _product(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in _ARRAY.findall(shape)
    ]
    if started and kind in ("all-gather", "collective-permute") and len(arrays) > 1:
        # the result of a start is (operands, results, ...)
        arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
    result, parts = sum(arrays), _parts(line)
    share = (parts - 1) / parts
    if kind == "all-gather" or kind == "all-to-all":
        return result * share
    if kind == "reduce-scatter":
        return result * (parts - 1)
    return 2 * result * share if kind == "all-reduce" else float(result)


def _parts(line: str) -> int:
    """Number of participating devices, for each of XLA's notations of replica groups."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return _product(int(size or axes[name]) for name, size in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    return 2


def _product(sizes: object) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
