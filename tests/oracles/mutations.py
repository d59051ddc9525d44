"""Mutants of the theory: every additive term of every recursion, dropped alone.

The modules of the recursions are compiled again with each ``a + b`` and ``a - b`` (and ``x += a``) routed through
``Mutator.combine``, which can leave one operand out. The operands at run time decide between a term of a recursion
(tensors) and arithmetic of indices or labels. A building block (``response``, ...) gives mutants for each place that
calls it: the terms are those of recursions written out in full. Nothing here knows names of moments.
"""

import ast
import copy
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import patch

from torch import Tensor

from torch_eft.theory.initialization import estimators, infinite_width
from torch_eft.theory.initialization.evaluator import Vertices
from torch_eft.theory.initialization.statistics import initial_statistics

FIRST = "v"  # a recursion, or a building block of one: functions of the evaluator ``v``


@dataclass(frozen=True)
class Mutant:
    """One operand (0 left, 1 right) of one sum, left out while the recursion ``inside`` calls it by ``path``."""

    site: str
    operand: int
    inside: str
    path: tuple[tuple[str, int], ...]  # functions and instructions between the recursion and the sum, innermost first
    text: str = field(compare=False)
    lines: tuple[int, ...] = field(compare=False, default=())

    def __str__(self) -> str:
        called = "".join(f" < {name}:{line}" for (name, _), line in zip(self.path, self.lines, strict=True))
        return f"{self.inside:6s} {self.site}{called}   {self.text}"


class Mutator(ast.NodeTransformer):
    """Recursions, K and Theta whose sums can be mutated."""

    def __init__(self) -> None:
        self.active: Mutant | None = None
        self.inside: list[str] = []
        self.uses: dict[str, set[str]] = {}  # recursion -> recursions that it asks for
        self.seen: dict[Mutant, None] = {}
        self.untouched: dict[str, str] = {}  # sums never evaluated
        self._texts: dict[str, tuple[str | None, str | None]] = {}
        self._module = ""
        names = dict.fromkeys(function.__module__ for function in estimators.RECURSIONS.values())
        compiled: dict[str, types.ModuleType] = {}
        for name in names:
            self._compile(name, compiled)
        self.recursions = {
            name: self._wrapped(name, getattr(compiled[function.__module__], function.__name__))
            for name, function in estimators.RECURSIONS.items()
        }
        self._infinite_width = self._function(infinite_width, "infinite_width")

    def limit(self, ensemble, x) -> tuple[list[Tensor], list[Tensor]]:
        """K and Theta of all layers."""

        def quiet():
            return self._infinite_width(ensemble, x)

        return quiet()[:2]

    def evaluator(self, ensemble, x) -> Vertices:
        """The product's evaluator, with mutable recursions."""
        made: list[Vertices] = []
        inside, uses = self.inside, self.uses

        class Recorded(Vertices):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made.append(self)

            def array(self, name, *args):
                if inside:
                    uses.setdefault(inside[-1], set()).add(name)
                return super().array(name, *args)

        with patch.object(estimators, "RECURSIONS", self.recursions), patch.object(estimators, "Vertices", Recorded):
            initial_statistics(ensemble, x, statistics=["V"])
        return made[0]

    # ---- at run time

    def combine(self, site: str, sign: int, left, right):
        mutant = self.active
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            inside = self.inside[-1] if self.inside else "K"
            if mutant is None:
                self.untouched.pop(site, None)
                path, lines = self._path()
                for operand, text in enumerate(self._texts[site]):
                    if text is not None:
                        text = ("+ ", "- ")[operand and sign < 0] + text
                        self.seen.setdefault(Mutant(site, operand, inside, path, text, lines))
            elif (mutant.site, mutant.inside) == (site, inside) and mutant.path == self._path()[0]:
                left, right = (0 * left, right) if mutant.operand == 0 else (left, 0 * right)
        return left + right if sign > 0 else left - right

    @staticmethod
    def _path() -> tuple[tuple[tuple[str, int], ...], tuple[int, ...]]:
        """Calls between the recursion and the sum: instructions identify them, lines are for the reader."""
        path, lines, frame = [], [], sys._getframe(3)
        while frame is not None and frame.f_code.co_name not in ("recursion", "quiet"):
            path.append((frame.f_code.co_name, frame.f_lasti))
            lines.append(frame.f_lineno)
            frame = frame.f_back
        return tuple(path), tuple(lines)

    def _wrapped(self, name: str, function: Callable) -> Callable:
        def recursion(*args):
            self.inside.append(name)
            try:
                return function(*args)
            finally:
                self.inside.pop()

        return recursion

    def other_sums(self) -> list[str]:
        """Sums that no evaluation came to, as far as syntax does not show that they are sums of integers or words."""
        return [f"{site} {text}" for site, text in self.untouched.items() if "*" in text or "(" in text]

    def affected(self, name: str) -> set[str]:
        """The recursions that depend on ``name``, itself among them."""
        dependent, new = {name}, [name]
        while new:
            known = new.pop()
            for other, used in self.uses.items():
                if known in used and other not in dependent:
                    dependent.add(other)
                    new.append(other)
        return dependent

    # ---- syntax

    def _compile(self, name: str, compiled: dict[str, types.ModuleType]) -> types.ModuleType:
        """The module ``name`` with mutable sums, and before it the modules whose building blocks it imports."""
        if name in compiled:
            return compiled[name]
        original = sys.modules[name]
        for value in list(vars(original).values()):
            source = getattr(value, "__module__", None)
            if inspect.isfunction(value) and source != name and _is_block(value):
                self._compile(source, compiled)
        tree = ast.parse(inspect.getsource(original))
        self._module = name.rsplit(".", 1)[1]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.args.args and node.args.args[0].arg == FIRST:
                self._current = node.name
                self.generic_visit(node)
        module = types.ModuleType(name)
        module.__dict__.update(vars(original), __combine__=self.combine)
        kept = {key: sys.modules[key] for key in compiled}
        sys.modules.update(compiled)  # so that its imports find the mutable building blocks
        try:
            exec(compile(ast.fix_missing_locations(tree), original.__file__, "exec"), module.__dict__)
        finally:
            sys.modules.update(kept)
        compiled[name] = module
        return module

    def _function(self, module: types.ModuleType, name: str) -> Callable:
        tree = ast.parse(inspect.getsource(getattr(module, name)))
        self._module, self._current = module.__name__.rsplit(".", 1)[1], name
        self.generic_visit(tree)
        namespace = dict(vars(module), __combine__=self.combine)
        exec(compile(ast.fix_missing_locations(tree), module.__file__, "exec"), namespace)
        return namespace[name]

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if not isinstance(node.op, ast.Add | ast.Sub):
            return self.generic_visit(node)
        # An operand that is itself a sum is not a term; its own operands are.
        texts = [None if _is_sum(part) else ast.unparse(part) for part in (node.left, node.right)]
        return self._call(node, self.generic_visit(copy.copy(node)), node.op, texts)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.op, ast.Add | ast.Sub) or not isinstance(node.target, ast.Name):
            return self.generic_visit(node)
        read = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
        sum_ = ast.copy_location(ast.BinOp(read, node.op, node.value), node)
        return ast.copy_location(ast.Assign([node.target], self.visit(sum_)), node)

    def _call(self, node: ast.BinOp, visited, op, texts) -> ast.AST:
        # A chain of sums begins where its first one does: only the end tells them apart.
        site = f"{self._module}.{self._current}:{node.end_lineno}.{node.end_col_offset}"
        assert site not in self._texts, f"two sums end at {site}"
        self._texts[site] = tuple(texts)
        self.untouched[site] = ast.unparse(node)
        arguments = [
            ast.Constant(site),
            ast.Constant(1 if isinstance(op, ast.Add) else -1),
            visited.left,
            visited.right,
        ]
        return ast.copy_location(ast.Call(ast.Name("__combine__", ast.Load()), arguments, []), node)


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)


def _is_block(function: Callable) -> bool:
    parameters = list(inspect.signature(function).parameters)
    return bool(parameters) and parameters[0] == FIRST
