"""Tells hooks that only look at a forward, which measurements leave out, from those that take part in it."""

import dis
import functools
import types
from typing import Any

from torch import nn

KINDS = ("_forward_hooks", "_forward_pre_hooks")
_RETURN_NOTHING = frozenset({"append", "extend", "add", "update", "insert", "appendleft", "print"})
"""Functions by whose call a lambda that keeps something ends."""
_SHARED = ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_NAME")


def taking_part(module: nn.Module, kind: str) -> dict[int, Any]:
    """The hooks of one kind without those that only look."""
    hooks = vars(module)[kind]
    return type(hooks)((key, hook) for key, hook in hooks.items() if not only_looks(hook))


def only_looks(hook: Any) -> bool:
    """Whether a hook can only keep or report what it sees: it returns nothing, and sets nothing that a forward reads.

    Read off its code: every ``return`` is that of nothing, or of what keeps something (``kept.append(output)``); no
    operation in place on its arguments, no attribute of the module set.

    Args:
        hook: As registered.

    Returns:
        Whether it does.
    """
    skipped = 0  # arguments before the module
    while True:
        if isinstance(hook, functools.partial):
            skipped, hook = skipped + len(hook.args), hook.func
        elif isinstance(hook, types.MethodType):
            if isinstance(hook.__self__, nn.Module):
                return False
            skipped, hook = skipped + 1, hook.__func__
        elif isinstance(hook, types.FunctionType):
            return not hook.__module__.startswith("torch.") and _code_only_looks(hook.__code__, skipped)
        elif isinstance(call := vars(type(hook)).get("__call__"), types.FunctionType):
            hook = types.MethodType(call, hook)
        else:
            return False


@functools.lru_cache(maxsize=1024)
def _code_only_looks(code: types.CodeType, skipped: int) -> bool:
    if any((name.endswith("_") and not name.endswith("__")) or name in ("setattr", "exec") for name in code.co_names):
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL", "NOP", "RESUME")]
    module = code.co_varnames[skipped] if skipped < code.co_argcount else None
    sees_module = module is None or any(
        step.opname.startswith("LOAD_FAST") and module in str(step.argval) for step in steps
    )
    for index, step in enumerate(steps):
        before = steps[index - 1] if index else step
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return False
        if step.opname == "RETURN_VALUE" and not _nothing(steps[:index]):
            return False
        if step.opname in ("STORE_ATTR", "DELETE_ATTR") and sees_module:
            return False
        if step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            container = steps[index - 2].opname if index > 1 else ""
            if container not in _SHARED and (container != "LOAD_ATTR" or sees_module):
                return False
        changed = step.opname.startswith("STORE_FAST") and (
            before.opname.startswith("INPLACE_") or (before.opname == "BINARY_OP" and before.argrepr.endswith("="))
        )
        if changed:
            return False
    return True


def _nothing(steps: list[dis.Instruction]) -> bool:
    """Whether the value on top of the stack is None, or that of one call, ``a.b.append(...)``, that returns nothing."""
    last = steps[-1]
    if last.opname == "LOAD_CONST":
        return last.argval is None
    if not last.opname.startswith("CALL") or any("JUMP" in step.opname or step.opname == "POP_TOP" for step in steps):
        return False
    loads = [step for step in steps if step.opname not in ("COPY_FREE_VARS", "PUSH_NULL")]
    called = loads[0].argval
    for step in loads[1:]:
        if step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            break
        called = step.argval
    return called in _RETURN_NOTHING
