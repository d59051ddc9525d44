"""Arguments of traced operations: values, shapes, axes of positions."""

from typing import Any

from torch_eft.theory.architecture.reading.graph import Axis, NotReadableError, Parameter, Value

USE_SEEDS = "use seeds (measure.statistics_over_seeds, eft.predict_from_networks)"


def as_value(given: Any, name: str) -> Value:
    """Return what depends on random weights; refuse a parameter, and what is made of the inputs alone."""
    if isinstance(given, Value):
        return given
    what = f"the parameter {given.name!r}" if isinstance(given, Parameter) else "the inputs"
    raise NotReadableError(f"{name} of {what} is not covered: a Linear or a convolution must stand between")


def traced_shape(node: Any) -> tuple[int, ...]:
    """Return the shape of a traced result."""
    return tuple(node.meta["val"].shape)


def filled(args: list[Any], keywords: dict[str, Any], names: dict[str, Any]) -> list[Any]:
    """Return the arguments in the order of ``names``, with their defaults, behind the first two."""
    given = {**names, **keywords, **dict(zip(names, args[2:], strict=False))}
    return [args[0], args[1], *(given[name] for name in names)]


def entry(given: Any, index: int) -> int:
    """Return the entry of an axis, of a list or of one number for all."""
    if isinstance(given, int):
        return given
    return int(given[index] if len(given) > 1 else given[0])


def axes_of(x: Value, sizes: tuple[int, ...], dims: Any) -> list[int]:
    """The axis of positions of some dimensions, one each; an empty dimension is an axis of length 1 that is left."""
    free = [axis for axis, size in enumerate(sizes) if size == 1 and not any(axis in dim for dim in x.dims)]
    found = []
    for d in dims:
        dim = [axis for axis in x.dims[d] if axis not in ("n", "c")]
        if len(x.dims[d]) == 1 and len(dim) == 1:
            found.append(dim[0])
        elif not x.dims[d] and free:
            found.append(free.pop(0))
        else:
            raise NotReadableError("positions were reshaped before a layer that needs them apart; keep (N, C, H, W)")
    return found


def restored(x: Value, places: list[int]) -> tuple[tuple[Axis, ...], ...]:
    """Return the dimensions, the last of them axes of positions."""
    return (*x.dims[: len(x.dims) - len(places)], *((axis,) for axis in places))
