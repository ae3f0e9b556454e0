"""Finds wrong matrix descriptors in Hopper machine code, a bug of ptxas.

A matrix descriptor is 64 bits of two uniform registers: the lower half is mostly an address, while
the upper one holds strides and swizzling, which are known when a kernel is compiled. ptxas 12.8, which comes
with Triton 3.6, sometimes adds these to a stale register where it should add them to zero; products then read
arbitrary memory, or the program crashes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s)?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
REGISTER = re.compile(r"U?R\d+")
PREDICATE = re.compile(r"!?U?P(\d|T)")
STACK = re.compile(r"\[R1(?:\+0x([0-9a-f]+))?\]")
WORD = 2**32
# Value of a register: a known part, xor-ed with unknown values that are identified by their origin.
Value = tuple[int, frozenset]
State = dict[str, Value]


@dataclass(frozen=True)
class Instruction:
    """Line of disassembly."""

    address: str
    conditional: bool
    name: str
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]


def strange_descriptors(code: str) -> list[str]:
    """Products of matrices in `nvdisasm -c` output whose descriptors' upper halves are not constants."""
    blocks, followers = _blocks(code)
    found = []
    for block, state in zip(blocks, _states(blocks, followers), strict=True):
        if state is None:
            continue
        state = dict(state)
        for instruction in block:
            if instruction.kind == "HGMMA":
                unknown = [half for half in _upper_halves(instruction) if not _known(state, half)]
                found += [f"{instruction.address}: {instruction.name}, {half}" for half in unknown]
            _step(instruction, state)
    return found


def _blocks(code: str) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks, and the possible successors of each."""
    blocks: list[list[Instruction]] = [[]]
    labels = {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif match := INSTRUCTION.search(line):
            operands = tuple(part.strip() for part in match[4].replace(".reuse", "").split(","))
            blocks[-1].append(Instruction(match[1], bool(match[2]), match[3], operands))
            if blocks[-1][-1].kind in ("BRA", "EXIT"):
                blocks.append([])
    followers = []
    for number, block in enumerate(blocks):
        last = block[-1] if block else None
        follows = []
        if last and last.kind == "BRA":
            follows.append(labels[re.search(r"\.L_x_\d+", " ".join(last.operands))[0]])
        if (
            not last
            or last.kind not in ("BRA", "EXIT")
            or last.conditional
            or len(last.operands) > 1
        ):
            follows.append(number + 1)
        followers.append([follower for follower in follows if follower < len(blocks)])
    return blocks, followers


def _states(blocks: list[list[Instruction]], followers: list[list[int]]) -> list[State | None]:
    """Known register values at the start of each block; None for unreachable blocks."""
    states: list[State | None] = [None] * len(blocks)
    states[0] = {}
    waiting = [0]
    while waiting:
        number = waiting.pop()
        after = dict(states[number])
        for instruction in blocks[number]:
            _step(instruction, after)
        for follower in followers[number]:
            before = states[follower]
            agreed = after if before is None else _agreed(before, after)
            if agreed != before:
                states[follower] = dict(agreed)
                waiting.append(follower)
    return states


def _agreed(one: State, other: State) -> State:
    return {name: value for name, value in one.items() if other.get(name) == value}


def _upper_halves(product: Instruction) -> list[str]:
    """Registers with the upper halves of the second and, if it lies in shared memory, of the first matrix."""
    place = next(n for n, part in enumerate(product.operands) if part.startswith("gdesc"))
    register = int(re.search(r"UR(\d+)", product.operands[place])[1])
    first_too = place == 1
    return [f"UR{register + 1}"] * first_too + [f"UR{register + 3}"]


def _known(state: State, name: str) -> bool:
    return name in state and not state[name][1]


def _next(name: str) -> str:
    letters, number = re.fullmatch(r"(U?R)(\d+)", name).groups()
    return f"{letters}{int(number) + 1}"


def _value(operand: str, state: State) -> Value | None:
    negated, operand = operand.startswith("-"), operand.removeprefix("-")
    if operand in ("RZ", "URZ"):
        value: Value | None = (0, frozenset())
    elif re.fullmatch(r"0x[0-9a-f]+", operand):
        value = (int(operand, 16), frozenset())
    else:
        value = state.get(operand)
    if negated and value:
        return None if value[1] else (-value[0] % WORD, value[1])
    return value


def _sum(values: list[Value | None]) -> Value | None:
    """Sum without the carry of the lower half: addresses do not overflow it."""
    unknown = [value for value in values if value is None or value[1]]
    if not unknown:
        return sum(value[0] for value in values) % WORD, frozenset()
    others = [value for value in values if value is not None and not value[1]]
    if len(unknown) == 1 and not any(value[0] for value in others):
        return unknown[0]
    return None


def _upper_part(operand: str, state: State) -> Value | None:
    """Upper half of a 64-bit operand, a pair of registers or a number."""
    if operand == "URZ" or re.fullmatch(r"-?0x[0-9a-f]+", operand):
        return WORD - 1 if operand.startswith("-") else 0, frozenset()
    name = operand.removeprefix("-")
    if not REGISTER.fullmatch(name):
        return None
    if operand == name:
        return state.get(_next(name))
    if not (_known(state, name) and _known(state, _next(name))):
        return None
    whole = -(state[_next(name)][0] * WORD + state[name][0])
    return whole // WORD % WORD, frozenset()


def _step(instruction: Instruction, state: State) -> None:
    """Updates the known register values by an instruction."""
    kind, name, operands = instruction.kind, instruction.name, instruction.operands
    target = operands[0]
    written: dict[str, Value | None] = {}
    if kind == "STL" and STACK.fullmatch(target):
        written = {target: state.get(operands[1])}
        if ".64" in name:
            written[_above(target)] = state.get(_next(operands[1]))
    elif not REGISTER.fullmatch(target) or kind in ("HGMMA", "STL"):
        return
    elif kind in ("UMOV", "MOV", "R2UR"):
        written = {target: _value(operands[1], state)}
    elif name in ("IMAD.MOV.U32", "IMAD.MOV", "IMAD.U32", "IMAD.X") and "RZ" in operands[1:3]:
        written = {target: _value(operands[3], state)}
    elif name == "UIADD3.64":
        parts = [_upper_part(operand, state) for operand in operands[1:4]]
        written = {target: None, _next(target): _sum(parts)}
    elif kind in ("UIADD3", "IADD3"):
        added = [part for part in operands[1:] if not PREDICATE.fullmatch(part)]
        written = {target: _sum([_value(part, state) for part in added])}
    elif kind in ("ULOP3", "LOP3") and "0x3c" in operands:
        one, other = (_value(part, state) for part in operands[1:3])
        both = one and other and (one[0] ^ other[0], one[1] ^ other[1])
        written = {target: both}
    elif kind == "CS2R" and operands[1] == "SRZ":
        written = dict.fromkeys((target, _next(target)), (0, frozenset()))
    elif kind == "LDL" and STACK.fullmatch(operands[1]):
        written = {target: state.get(operands[1])}
        if ".64" in name:
            written[_next(target)] = state.get(_above(operands[1]))
    else:
        written = {target: None}
        wide = 4 if ".128" in name else 2 if re.search("CS2R|WIDE|[.]64", name) else 1
        for _ in range(wide - 1):
            target = _next(target)
            written[target] = None
    for register, value in written.items():
        if instruction.conditional and state.get(register) != value:
            value = None
        state[register] = value or (0, frozenset({(instruction.address, register)}))


def _above(place: str) -> str:
    return f"[R1+0x{int(STACK.fullmatch(place)[1] or '0', 16) + 4:x}]"
