"""The custom-scalars page: one chart per quantity, with the theory's band and the measured line."""

from collections.abc import Collection, Sequence

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from torch_eft.results.quantities import QUANTITIES
from torch_eft.results.tags import BAND, BAND_68, BAND_90, MEASURED, ORDERS, tag

_NOT_DRAWN = ("overhead_percent",)


def comparison_layout(logged: Collection[str]) -> Summary:
    """Return a layout summary for the tags that were logged.

    Two categories: quantities with a theory beside them (a margin chart where there are bands, with the highest order
    as its line; a line chart of measured and all orders otherwise), and those that are measured only.

    Args:
        logged: All tags.

    Returns:
        The protocol buffer that an event writer takes.

    Example:
        >>> from torch_eft.tensorboard import comparison_layout, tag
        >>> [value.tag for value in comparison_layout([tag("ntk_drift")]).value]
        ['custom_scalars__config__']
    """
    compared: list[layout_pb2.Chart] = []
    measured: list[layout_pb2.Chart] = []
    for quantity in QUANTITIES:
        if tag(quantity) not in logged or quantity in _NOT_DRAWN:
            continue
        orders = [order for order in ORDERS if tag(quantity, order) in logged]
        bands = [band for band in (BAND, BAND_90, BAND_68) if tag(quantity, band[0]) in logged]
        if orders and bands:
            compared.append(_margin_chart(quantity, orders[-1], bands))
        else:
            (compared if orders else measured).append(_line_chart(quantity, [MEASURED, *orders]))
    categories = [
        layout_pb2.Category(title=title, chart=charts)
        for title, charts in (
            ("torch_eft: measured against theory", compared),
            ("torch_eft: measured", measured),
        )
        if charts
    ]
    layout = layout_pb2.Layout(category=categories).SerializeToString()
    # The plugin's own helper for this needs TensorFlow.
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout], tensor_shape=TensorShapeProto())
    value = Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=SummaryMetadata(plugin_data=plugin))
    return Summary(value=[value])


def _line_chart(quantity: str, series: list[str]) -> layout_pb2.Chart:
    return layout_pb2.Chart(
        title=QUANTITIES[quantity].title,
        multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag(quantity, s)}$" for s in series]),
    )


def _margin_chart(quantity: str, order: str, bands: Sequence[tuple[str, str]]) -> layout_pb2.Chart:
    series = layout_pb2.MarginChartContent.Series
    measured, theory = tag(quantity), tag(quantity, order)
    margins = [series(value=theory, lower=tag(quantity, low), upper=tag(quantity, high)) for low, high in bands]
    return layout_pb2.Chart(
        title=QUANTITIES[quantity].title,
        margin=layout_pb2.MarginChartContent(series=[*margins, series(value=measured, lower=measured, upper=measured)]),
    )
