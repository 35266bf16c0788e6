"""What the package can say to a user when something is wrong, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LEVELS = ("warning", "error", "exception")
NOT_FOR_USERS = {
    "algorithm": "contracts between functions",
    "drafting": "contracts between functions",
    "kernels": "contracts between functions",
    "simulation": "of a command, which says what to write instead",
    "benchmark": "of a command, which says what to write instead",
}
"""Rooms whose errors are not on the page."""
INTERNAL = ("WireError", "FrameError", "LayoutError", "TargetGone", "Stranger", "Ended", "IndexError")
"""Kinds of errors that are caught by us: what was wrong with bytes that crossed, how the other side ended."""
CONTRACTS = ("placement/layout.py", "placement/sharded.py", "policy.py", "tuning/candidates.py")
"""Files whose ValueErrors are contracts between functions: the configuration has been checked before."""
LEAST_LITERAL = 12
"""Characters of a message that do not depend on values; with fewer a pattern would fit almost anything."""

_PERCENT = re.compile(r"%[-+.0-9]*[a-z]")
_FIELD = re.compile(r"\{\w+\}")
_FRAME = re.compile(r"(?:[a-z-]+: )*\0")
"""A text that was made elsewhere, and is found there; the command, or its option, may stand before it."""


@dataclass(frozen=True)
class Message:
    """`pieces` are the words between the values, in order; `shown` is for people."""

    where: str
    shown: str
    pieces: tuple[str, ...]

    def fits(self, text: str) -> bool:
        """Whether this is what is said, with some values. (A regular expression may try all ways to divide a text.)"""
        first, *others = self.pieces
        if not others:
            return text == first
        *middle, last = others
        if not text.startswith(first):
            return False
        at = len(first)
        for piece in middle:
            found = text.find(piece, at)
            if found < 0:
                return False
            at = found + len(piece)
        return text.endswith(last) and len(text) - len(last) >= at


def messages_of(package: Path) -> Iterator[Message]:
    """Of every raise, of every warning and error in the log, and of all that is printed as an error."""
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        if where.parts[0].removesuffix(".py") not in NOT_FOR_USERS:
            yield from messages_in(path.read_text(encoding="utf-8"), where.as_posix())


def messages_in(source: str, where: str) -> Iterator[Message]:
    """Of one file."""
    tree = ast.parse(source)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            texts = _raised(node.exc, where, functions)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS:
            logs = _is_log(node.func.value)
            texts = [_PERCENT.sub("\0", text) for text in _texts(node.args[0], {})] if logs else []
        elif isinstance(node, ast.Call) and _prints_an_error(node):
            texts = _texts(node.args[0], {})
        else:
            continue
        for text in texts:
            if not _FRAME.fullmatch(text):
                yield _message(f"{where}:{node.lineno}", text)


def texts_of(package: Path) -> Iterator[Message]:
    """Of every longer text in the source, whatever it is for: what is said in passing has its words from somewhere."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr):
                for text in _texts(node, {}):
                    text = _FIELD.sub("\0", _PERCENT.sub("\0", text))
                    if len(text.replace("\0", "")) >= 2 * LEAST_LITERAL:
                        yield _message(f"{path.name}:{node.lineno}", text)


def _is_log(receiver: ast.expr) -> bool:
    """Something with the name of a log, or a call that makes one."""
    named = receiver.func if isinstance(receiver, ast.Call) else receiver
    return ast.unparse(named).lower().endswith(("logger", "_log", "log"))


def _prints_an_error(call: ast.Call) -> bool:
    to = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "file"]
    return ast.unparse(call.func) == "print" and bool(call.args) and to == ["sys.stderr"]


def _message(where: str, text: str) -> Message:
    text = " ".join(text.split())
    return Message(where, text.replace("\0", "{}"), tuple(text.split("\0")))


def _raised(call: ast.Call, where: str, functions: dict[str, ast.FunctionDef]) -> list[str]:
    kind = ast.unparse(call.func).rpartition(".")[2]
    if kind in INTERNAL or not call.args or (kind == "ValueError" and where in CONTRACTS):
        return []
    return _texts(call.args[0], functions)


def _texts(node: ast.expr, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """What an expression may say; NUL stands for a value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in _texts(node.left, functions) for right in _texts(node.right, functions)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        returns = [each for each in ast.walk(functions[node.func.id]) if isinstance(each, ast.Return) and each.value]
        return [text for each in returns if each.value for text in _texts(each.value, {})]
    return ["\0"]
