"""Reads the PTX of one kernel as LLVM and Triton write it. What is not understood raises `PtxError` with its text."""

import functools
import math
import re
from dataclasses import dataclass, field


class PtxError(Exception):
    """The text says what this emulator does not know."""


# -- operands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Register:
    """`bits` is 1 for predicates. `scope` tells registers apart that pieces of inline assembly declare by one name."""

    name: str
    bits: int
    scope: int = 0


@dataclass(frozen=True)
class Negated:
    """!%p"""

    register: Register


@dataclass(frozen=True)
class Literal:
    """What it means depends on the type of its instruction."""

    text: str

    def integer(self) -> int:
        return int(self.text.rstrip("U"), 0)


@dataclass(frozen=True)
class Name:
    """A label, a parameter, an array in shared memory, a special register, or `_`."""

    text: str


@dataclass(frozen=True)
class Vector:
    """{a, b}"""

    parts: "tuple[Operand, ...]"


@dataclass(frozen=True)
class Pair:
    """p|q: two results."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: "Register | Name"
    offset: int = 0


Operand = Register | Negated | Literal | Name | Vector | Pair | Address


@dataclass(frozen=True)
class Instruction:
    """`words` are the opcode, cut at its dots: add.rn.f32. `guard`: only threads where it is true take part."""

    line: int
    text: str
    words: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | Negated | None

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"

    def has(self, *words: str) -> bool:
        return not set(words).isdisjoint(self.words)

    def one_of(self, *words: str) -> str | None:
        return next((word for word in self.words if word in words), None)

    def space(self) -> str | None:
        return self.one_of("global", "shared", "param")


@dataclass
class Kernel:
    """One `.entry`. `shared` holds arrays in shared memory by name, with their bytes; None if the launch says."""

    name: str
    parameters: list[str]
    threads: int
    shared: dict[str, int | None]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # number of the instruction that follows


# -- statements -------------------------------------------------------------------------------------------------------

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_HEAD = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)
_PARAMETER = re.compile(r"\.param\s+\.[bu]64\s+(?:\.ptr\s+)?(?:\.global\s+)?(?:\.align\s+\d+\s+)?([\w$]+)")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]")
_THREADS = re.compile(r"\.(?:req|max)ntid\s+([\d, ]+)")
_STATEMENT = re.compile(
    r"(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+)\s*:|(?P<statement>(?:[^;{}]|\{[^{}]*\})*);"  # {a, b} is a vector
)
_SPACE = re.compile(r"\s*")
_IGNORED = (".loc", ".file", ".pragma")


@functools.lru_cache(64)
def parse(text: str) -> Kernel:
    """The only kernel of a module."""
    text = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)  # keeps the numbers of lines
    heads = list(_HEAD.finditer(text))
    if len(heads) != 1:
        raise PtxError(f"{len(heads)} kernels instead of one")
    name, parameters, more = heads[0].groups()
    threads = _THREADS.search(more)
    if threads is None:
        raise PtxError(f"{name} does not say how many threads it has")
    kernel = Kernel(
        name,
        [_parameter(part) for part in parameters.split(",") if part.strip()],
        math.prod(int(side) for side in threads[1].split(",")),
        {array: int(size) if size else None for array, size in _SHARED.findall(text)},
    )
    _Body(kernel).read(text, heads[0].end())
    return kernel


def _parameter(text: str) -> str:
    match = _PARAMETER.fullmatch(text.strip())
    if match is None:
        raise PtxError(f"parameter: {text.strip()!r}")
    return match[1]


class _Body:
    """What stands between the braces. Inline assembly opens scopes with registers of their own."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.line = kernel, 0
        self.scopes: list[tuple[int, dict[str, tuple[int, int]]]] = []  # number, and bits and count by stem
        self.opened = 0
        self.registers: dict[tuple[int, str], Register] = {}

    def read(self, text: str, position: int) -> None:
        self.line = text.count("\n", 0, position) + 1
        self.scopes.append((0, {}))
        while self.scopes:
            start = _SPACE.match(text, position).end()  # type: ignore[union-attr] # it always matches
            match = _STATEMENT.match(text, start)
            if match is None:
                raise PtxError(f"line {self.line}: {text[start : start + 80]!r}")
            self.line += text.count("\n", position, start)
            if match["open"]:
                self.opened += 1
                self.scopes.append((self.opened, {}))
            elif match["close"]:
                self.scopes.pop()
            elif match["label"]:
                self.kernel.labels[match["label"]] = len(self.kernel.instructions)
            else:
                self._statement(" ".join(match["statement"].split()))
            self.line += text.count("\n", start, match.end())
            position = match.end()

    def _statement(self, text: str) -> None:
        first = text.partition(" ")[0]
        try:
            if first == ".reg":
                self._declare(text)
            elif first and not first.startswith("."):
                self._instruction(text)
            elif first and first not in _IGNORED:
                raise PtxError("directive")
        except (PtxError, ValueError) as error:
            raise PtxError(f"not modelled: line {self.line}: {text} ({error})") from error

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        bits = 1 if kind == ".pred" else int(kind[2:]) if kind[2:].isdigit() else 0
        if bits not in (1, 8, 16, 32, 64):
            raise PtxError("registers of another type")
        for name in names.split(","):
            stem, count = re.fullmatch(r"([\w%$]+)(?:<(\d+)>)?", name.strip()).groups()  # type: ignore[union-attr]
            self.scopes[-1][1][stem] = bits, int(count or 0)

    def _register(self, name: str) -> Register | None:
        for scope, stems in reversed(self.scopes):
            if (scope, name) in self.registers:
                return self.registers[scope, name]
            stem = name.rstrip("0123456789")
            number = name[len(stem) :]
            if name in stems or (stem in stems and number and int(number) < stems[stem][1]):
                bits, _ = stems[name] if name in stems else stems[stem]
                return self.registers.setdefault((scope, name), Register(name, bits, scope))
        return None

    def _instruction(self, text: str) -> None:
        guard: Register | Negated | None = None
        rest = text
        if text.startswith("@"):
            word, rest = text[1:].split(None, 1)
            found = self._operand(word)
            if not isinstance(found, Register | Negated):
                raise PtxError(f"guard {word!r}")
            guard = found
        opcode, _, operands = rest.partition(" ")
        words = tuple(opcode.replace("shared::cta", "shared").split("."))
        parts = tuple(self._operand(part) for part in _split(operands))
        self.kernel.instructions.append(Instruction(self.line, text, words, parts, guard))

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            match = re.fullmatch(r"([\w%$]+)\s*(?:\+\s*(-?\w+))?", text[1:-1].strip())
            base = self._operand(match[1]) if match else None
            if match is None or not isinstance(base, Register | Name):
                raise PtxError(f"address {text!r}")
            return Address(base, int(match[2] or "0", 0))
        if text.startswith("!"):
            register = self._register(text[1:])
            if register is not None:
                return Negated(register)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if register := self._register(text):
            return register
        if re.fullmatch(r"-?(0[xX][\da-fA-F]+|\d+)U?|0[fF][\da-fA-F]{8}|0[dD][\da-fA-F]{16}", text):
            return Literal(text)
        if re.fullmatch(r"%?[A-Za-z_$][\w$.]*", text):
            return Name(text)
        raise PtxError(f"operand {text!r}")


def _split(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:[^,{}\[\]]|\{[^}]*\}|\[[^\]]*\])+", text)]
