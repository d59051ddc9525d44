"""The custom-scalars page: one chart a quantity, the theory's band and the measured line in it."""

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from torch_eft.tensorboard.tags import BAND, TITLES, tag


def comparison_layout(with_band: list[str], without_band: list[str]) -> Summary:
    """A layout summary: margin charts for quantities with a band, line charts for the others.

    Args:
        with_band: Quantities logged with ``theory_minus_sigma`` and ``theory_plus_sigma``.
        without_band: Quantities logged as ``measured`` and perhaps ``theory``.

    Returns:
        The protocol buffer that an event writer takes.
    """
    charts = [_margin_chart(quantity) for quantity in with_band]
    charts += [
        layout_pb2.Chart(
            title=TITLES.get(quantity, quantity),
            multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag(quantity, s)}$" for s in ("measured", "theory")]),
        )
        for quantity in without_band
    ]
    category = layout_pb2.Category(title="torch_eft: measured against theory", chart=charts)
    layout = layout_pb2.Layout(category=[category]).SerializeToString()
    # The plugin's own helper for this needs TensorFlow.
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout], tensor_shape=TensorShapeProto())
    value = Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=SummaryMetadata(plugin_data=plugin))
    return Summary(value=[value])


def _margin_chart(quantity: str) -> layout_pb2.Chart:
    series = layout_pb2.MarginChartContent.Series
    measured, theory = tag(quantity, "measured"), tag(quantity, "theory")
    return layout_pb2.Chart(
        title=TITLES.get(quantity, quantity),
        margin=layout_pb2.MarginChartContent(
            series=[
                series(value=theory, lower=tag(quantity, BAND[0]), upper=tag(quantity, BAND[1])),
                series(value=measured, lower=measured, upper=measured),
            ]
        ),
    )
