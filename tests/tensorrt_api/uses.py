"""Which names of TensorRT a source file uses, found by reading it.

What is TensorRT's is known from the names that hold the module (`trt`, `self.trt`), from what
constructors, methods and properties return by their real signatures, from our own annotations
(`TensorRT.Builder`), and from `LOOPS`: what a loop's variable of that name holds everywhere in
`engines/trt`.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from surface import Surface

MODULE = "<module>"
HOLDERS = {"trt", "_trt"}
LOOPS = {
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "raw": "ILayer",
    "tensor": "ITensor",
}
ANNOTATION = re.compile(r"TensorRT\.(\w+)(?: \| None)?")


@dataclass(frozen=True)
class Use:
    """One name: `owner.name`, or the module's `name` where there is no owner."""

    owner: str
    name: str
    line: int
    how: str = "get"  # "get", "set", "call", "define"
    positional: int = 0
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"line {self.line}: {self.owner + '.' if self.owner else ''}{self.name}"


def uses_of(source: str, known: Surface, functions: Mapping[str, str] | None = None) -> list[Use]:
    """Every use, in order; `known` says what TensorRT's calls return, `functions` what ours do."""
    reader = Reader(known, functions)
    reader.module(ast.parse(source))
    return sorted(set(reader.uses), key=lambda use: (use.line, str(use)))


def functions_of(source: str) -> dict[str, str]:
    """Our functions that return an object of TensorRT's, and its class; `.name` for properties."""
    return {
        ("." if is_property(node) else "") + node.name: kind
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and (kind := annotated(node.returns))
    }


def is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)


def annotated(annotation: ast.expr | None) -> str | None:
    """The class X of an annotation `TensorRT.X` or `TensorRT.X | None`."""
    if annotation is None:
        return None
    found = ANNOTATION.fullmatch(ast.unparse(annotation).strip("'\""))
    return found.group(1) if found else None


def any_names(source: str) -> Iterator[str]:
    """Names of parameters and attributes that are annotated `Any`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign) and is_any(node.annotation):
            name = node.arg if isinstance(node, ast.arg) else node.target
            yield name if isinstance(name, str) else ast.unparse(name).rpartition(".")[2]


def is_any(annotation: ast.expr | None) -> bool:
    return isinstance(annotation, ast.Name) and annotation.id == "Any"


class Reader:
    """Walks one module, function by function, and notes what each expression is."""

    def __init__(self, known: Surface, functions: Mapping[str, str] | None = None) -> None:
        self.known = known
        self.functions = dict(functions or {})
        self.uses: list[Use] = []
        self.attributes: dict[str, str] = {}

    def module(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and (kind := annotated(node.annotation)):
                self.attributes[ast.unparse(node.target).rpartition(".")[2]] = kind
        self.functions |= functions_of(ast.unparse(tree))
        self.block(tree.body, {})

    def block(self, body: list[ast.stmt], names: dict[str, str]) -> None:
        for statement in body:
            self.statement(statement, names)

    def statement(self, node: ast.AST, names: dict[str, str]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = dict(names)
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in arguments:
                inner.pop(argument.arg, None)
                if kind := annotated(argument.annotation):
                    inner[argument.arg] = kind
            self.block(node.body, inner)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                kind = self.kind(base, names)
                if kind is not None and kind.startswith("type:"):
                    self.overrides(node, kind.removeprefix("type:"))
            self.block(node.body, names)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            kind = self.kind(node.value, names) if node.value is not None else None
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self.assign(target, kind, names)
        else:
            if isinstance(node, ast.For | ast.comprehension):
                self.loop(node.target, names)
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.kind(child, names)
                else:
                    self.statement(child, names)

    def loop(self, target: ast.expr, names: dict[str, str]) -> None:
        """What comes out of a sequence has no annotation: its name alone says what it is."""
        for part in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(part, ast.Name):
                names.pop(part.id, None)
                if part.id in LOOPS:
                    names[part.id] = LOOPS[part.id]

    def overrides(self, node: ast.ClassDef, base: str) -> None:
        for function in node.body:
            if isinstance(function, ast.FunctionDef):
                self.uses.append(Use(base, function.name, function.lineno, "define"))

    def assign(self, target: ast.expr, kind: str | None, names: dict[str, str]) -> None:
        if isinstance(target, ast.Attribute) and target.attr != "__class__":
            owner = self.kind(target.value, names)
            if owner is not None and ":" not in owner and owner != MODULE:
                self.uses.append(Use(owner, target.attr, target.lineno, "set"))
            elif kind is not None and ast.unparse(target.value) == "self":
                self.attributes[target.attr] = kind
        elif isinstance(target, ast.Name):
            names.pop(target.id, None)
            if kind is not None:
                names[target.id] = kind
        elif isinstance(target, ast.Tuple):
            for part in target.elts:
                self.assign(part, None, names)

    def kind(self, node: ast.expr, names: dict[str, str]) -> str | None:
        """`MODULE`, "type:X", "method:X.m", "enum:X", or the class X an expression is of."""
        told = names.get(ast.unparse(node)) if isinstance(node, ast.Name | ast.Attribute) else None
        if isinstance(node, ast.Name):
            return told or (MODULE if node.id in HOLDERS else None)
        if isinstance(node, ast.Attribute):
            return told or self.attribute(node, names)
        if isinstance(node, ast.Call):
            return self.call(node, names)
        inner = dict(names)
        parts = list(ast.iter_child_nodes(node))
        for child in sorted(parts, key=lambda part: not isinstance(part, ast.comprehension)):
            if isinstance(child, ast.expr):
                found = self.kind(child, inner)
                if isinstance(node, ast.NamedExpr) and isinstance(node.target, ast.Name):
                    self.assign(node.target, found, names)
            elif isinstance(child, ast.comprehension):
                self.statement(child, inner)
        return None

    def attribute(self, node: ast.Attribute, names: dict[str, str]) -> str | None:
        owner = self.kind(node.value, names)
        if owner is None:
            property_ = self.functions.get(f".{node.attr}")
            return MODULE if node.attr in HOLDERS else self.attributes.get(node.attr, property_)
        if owner == MODULE:
            self.uses.append(Use("", node.attr, node.lineno))
            return f"type:{node.attr}"
        if owner.startswith(("method:", "enum:")):
            return None  # a value's own `.name`, which is Python's
        owner = owner.removeprefix("type:")
        if node.attr == "__class__":
            return None
        self.uses.append(Use(owner, node.attr, node.lineno))
        kind = self.known.member(owner, node.attr)
        if kind == "method":
            return f"method:{owner}.{node.attr}"
        if kind in ("value", "enum"):
            return f"enum:{owner}" if kind == "value" else f"type:{owner}.{node.attr}"
        return self.known.returns(owner, node.attr)

    def call(self, node: ast.Call, names: dict[str, str]) -> str | None:
        function = self.kind(node.func, names)
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.kind(argument, names)
        if function is None:
            return self.ours(node, names)
        if function.startswith("type:"):
            owner, name, result = function.removeprefix("type:"), "__init__", None
            if owner not in self.known.classes:
                return None  # a function, or an enumeration's conversion
            result = owner
        elif function.startswith("method:"):
            owner, _, name = function.removeprefix("method:").rpartition(".")
            result = self.known.returns(owner, name)
        else:
            return None
        keywords = tuple(keyword.arg or "" for keyword in node.keywords)
        explicit_self = name == "__init__" and function.startswith("method:")
        count = len(node.args) - explicit_self
        self.uses.append(Use(owner, name, node.lineno, "call", count, keywords))
        return result

    def ours(self, node: ast.Call, names: dict[str, str]) -> str | None:
        """What one of our functions returns; `seen_as(X, layer)` is an X."""
        name = ast.unparse(node.func).rpartition(".")[2]
        if name == "seen_as":
            seen = self.kind(node.args[0], names)
            return seen.removeprefix("type:") if seen else None
        return self.functions.get(name)


def problem(use: Use, release: Surface) -> str | None:
    """Why a release does not have what is used; None where it does."""
    if not use.owner:
        return None if release.top(use.name) else "no such name in the module"
    if use.how == "define":
        if use.name == "__init__" or release.member(use.owner, use.name) == "method":
            return None
        return "overrides what is no method"
    if not release.member(use.owner, use.name):
        return "no such member"
    if use.how == "set" and not release.settable(use.owner, use.name):
        return "cannot be set"
    if use.how == "call":
        overloads = release.overloads(use.owner, use.name)
        if overloads and not any(fits(use, overload) for overload in overloads):
            return f"no overload takes {use.positional} arguments and {use.keywords}"
    return None


def fits(use: Use, overload: tuple[tuple[str, bool], ...]) -> bool:
    """Whether a call has all the parameters without defaults, and none that there is not."""
    rest = overload[use.positional :]
    needed = {name for name, default in rest if not default}
    return (
        use.positional <= len(overload)
        and set(use.keywords) <= {name for name, _ in rest}
        and needed <= set(use.keywords)
    )
