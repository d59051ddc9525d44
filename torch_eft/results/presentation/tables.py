"""Results as tables of pandas, which is imported when the first one is made."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame


def data_frame(columns: Mapping[str, Any], index: Mapping[str, Sequence[Any]]) -> "DataFrame":
    """Return a table.

    Args:
        columns: ``{name: values}``, one value a row each.
        index: ``{name: values}`` of the index; several make a hierarchy.

    Returns:
        The table.

    Raises:
        ImportError: If pandas is missing.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas") from error
    names = list(index)
    if len(names) == 1:
        rows = pandas.Index(list(index[names[0]]), name=names[0])
    else:
        rows = pandas.MultiIndex.from_arrays([list(index[name]) for name in names], names=names)
    return pandas.DataFrame(dict(columns), index=rows)
