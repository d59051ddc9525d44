"""Reads the tab's data through TensorBoard's data provider."""

import math
from typing import Any, NamedTuple

from tensorboard import errors
from tensorboard.data import provider
from tensorboard.plugins.scalar import metadata as scalar_metadata

from torch_eft.results.quantities import HEADLINES, is_drawn
from torch_eft.results.tags import split_tag
from torch_eft.tensorboard.answers import NEEDED, READ, bounds, summary
from torch_eft.tensorboard.run_info import (
    PLUGIN_NAME,
    RUN_INFO_TAG,
    parse_run_info,
    readings,
    unpredicted_sentences,
    verdicts,
)

Series = dict[str, dict[str, list[list[float | None]]]]


class Line(NamedTuple):
    """A tag of ours: what it is of, and its last point's step and time, which tell whether there is anything new."""

    quantity: str
    series: str
    end: tuple[int, float]


Lines = dict[str, dict[str, Line]]

_PLUGINS = (scalar_metadata.PLUGIN_NAME, PLUGIN_NAME)
"""Whose scalars are read: those that the Scalars tab shows too, and those of this tab alone."""


class Reader:
    """Runs, series and events of one TensorBoard.

    Args:
        data: The data provider; None (TensorBoard without generic data) has no runs.
        samples: Most points a series.
    """

    def __init__(self, data: Any, samples: int = 1000) -> None:
        self._data = data
        self._samples = samples
        self._described: dict[str, tuple[Any, dict[str, Any]]] = {}  # runs as they were, by all that may change them

    def runs(self, ctx: Any, experiment: str) -> dict[str, Any]:
        """The runs with our data, oldest first.

        Returns:
            ``{"runs": [{"name", "info", "problem", "unpredicted": {quantity: sentence}, "quantities": {quantity:
            [series]}, "summary": as in ``torch_eft.tensorboard.answers``}], "headlines": [[quantity]], "bounds":
            as there, "others": count}``; info is None, and problem says why, where a run has none that can be read;
            others counts runs without our data.
        """
        if self._data is None:
            return {"runs": [], "headlines": HEADLINES, "bounds": bounds(), "others": 0}
        tags = self._tags(ctx, experiment)
        texts = self._info_texts(ctx, experiment)
        known = self._data.list_runs(ctx, experiment_id=experiment)
        started = {run.run_name: run.start_time for run in known}
        runs = self._describe(
            ctx, experiment, {name: (tags.get(name, {}), texts.get(name)) for name in {*tags, *texts}}
        )
        runs.sort(key=lambda run: (started.get(run["name"]) or math.inf, run["name"]))
        others = len(started.keys() - {run["name"] for run in runs})
        return {"runs": runs, "headlines": HEADLINES, "bounds": bounds(), "others": others}

    def _describe(
        self, ctx: Any, experiment: str, given: dict[str, tuple[dict[str, Line], bytes | None]]
    ) -> list[dict[str, Any]]:
        """The runs as they are now; those that are as before are not read again."""
        keys = {name: f"{experiment}/{name}" for name in given}
        new = [name for name in given if self._described.get(keys[name], (None,))[0] != given[name]]
        needed = {
            name: {tag: line for tag, line in given[name][0].items() if line.quantity in NEEDED and line.series in READ}
            for name in new
        }
        read = self._read(ctx, experiment, needed) if new else {}
        for name in new:
            self._described[keys[name]] = given[name], _run(name, *given[name], read.get(name, {}))
        return [self._described[keys[name]][1] for name in given]

    def series(self, ctx: Any, experiment: str, run: str, quantities: list[str] | None = None) -> dict[str, Any]:
        """Return the numbers of a run, and what they say.

        ``{"run", "quantities": {quantity: {series: [[step, value], ...]}}, "verdicts": {quantity: verdict},
        "readings": {quantity: sentence}}``; values not finite are None; verdicts as in ``Verdict.to_dict``.

        Args:
            ctx: TensorBoard's request context.
            experiment: Its experiment.
            run: The run.
            quantities: Those wanted; None for all.

        Raises:
            errors.NotFoundError: If the run has no such data.
        """
        tags = self._tags(ctx, experiment).get(run) if self._data is not None else None
        if tags is None:
            raise errors.NotFoundError(f"run {run!r} has no scalars of torch_eft")
        unknown = set(quantities or ()) - {line.quantity for line in tags.values()}
        if unknown:
            raise errors.NotFoundError(f"run {run!r} has no quantity {', '.join(sorted(unknown))}")
        wanted = [name for name, line in tags.items() if quantities is None or line.quantity in quantities]
        found = self._read(ctx, experiment, {run: {name: tags[name] for name in wanted}})[run]
        return {"run": run, "quantities": found, "verdicts": verdicts(found), "readings": readings(found)}

    def events(self, ctx: Any, experiment: str, run: str) -> dict[str, Any]:
        """Return ``{"run", "events": [{"step", "quantity", "text"}]}`` of the run info.

        Raises:
            errors.NotFoundError: If the run has no data of ours.
        """
        for found in self.runs(ctx, experiment)["runs"]:
            if found["name"] == run:
                return {"run": run, "events": (found["info"] or {}).get("events") or []}
        raise errors.NotFoundError(f"run {run!r} has no data of torch_eft")

    def _tags(self, ctx: Any, experiment: str) -> Lines:
        """``{run: {tag: line}}`` of the runs that have any."""
        found: Lines = {}
        for plugin in _PLUGINS:
            listed = self._data.list_scalars(ctx, experiment_id=experiment, plugin_name=plugin)
            for run, tags in listed.items():
                ours = {name: split for name in tags if (split := split_tag(name)) is not None and is_drawn(split[0])}
                ends = {name: (tags[name].max_step, tags[name].max_wall_time) for name in ours}
                found.setdefault(run, {}).update({name: Line(*split, ends[name]) for name, split in ours.items()})
        return {run: tags for run, tags in found.items() if tags}

    def _read(self, ctx: Any, experiment: str, wanted: Lines) -> dict[str, Series]:
        """``{run: {quantity: {series: [[step, value], ...]}}}`` of ``{run: {tag: line}}``."""
        found: dict[str, Series] = {run: {} for run in wanted}
        chosen = provider.RunTagFilter(
            runs=list(wanted), tags=list({name for tags in wanted.values() for name in tags})
        )
        for plugin in _PLUGINS:
            read = self._data.read_scalars(
                ctx, experiment_id=experiment, plugin_name=plugin, downsample=self._samples, run_tag_filter=chosen
            )
            for run, lines in read.items():
                for name in lines.keys() & wanted[run].keys():
                    quantity, series, _ = wanted[run][name]
                    # A resumed run repeats steps: the last value written holds.
                    values = {int(point.step): float(point.value) for point in lines[name]}
                    found[run].setdefault(quantity, {})[series] = [
                        [step, value if math.isfinite(value) else None] for step, value in sorted(values.items())
                    ]
        return found

    def _info_texts(self, ctx: Any, experiment: str) -> dict[str, bytes]:
        """The last run info of every run, unparsed."""
        read = self._data.read_tensors(
            ctx,
            experiment_id=experiment,
            plugin_name=PLUGIN_NAME,
            downsample=10,
            run_tag_filter=provider.RunTagFilter(tags=[RUN_INFO_TAG]),
        )
        found = {run: tags[RUN_INFO_TAG][-1].numpy for run, tags in read.items() if tags.get(RUN_INFO_TAG)}
        return {run: value.item() if value.size == 1 else b"" for run, value in found.items()}


def _run(name: str, tags: dict[str, Line], text: bytes | None, read: Series) -> dict[str, Any]:
    info = parse_run_info(text) if text is not None else None
    problem = ""
    if text is None:
        problem = "This run logged scalars but no description of itself: r, validity and events are not known."
    elif info is None:
        problem = "This run's description cannot be read: it is damaged, or of another version of torch_eft."
    quantities: dict[str, list[str]] = {}
    for quantity, series, _ in tags.values():
        quantities.setdefault(quantity, []).append(series)
    return {
        "name": name,
        "info": info,
        "problem": problem,
        "unpredicted": unpredicted_sentences(info),
        "quantities": quantities,
        "summary": summary(info, read),
    }
