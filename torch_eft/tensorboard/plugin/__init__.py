"""The tab EFT of TensorBoard: measured against theory, quantity by quantity.

TensorBoard finds ``EFTPlugin`` by the entry point ``tensorboard_plugins``. Its pages are the plain ES modules and the
style sheet in ``static``: ``index.js`` starts the tab, ``app.js`` builds it, ``data/source.js`` fetches what
``reader.py`` reads through TensorBoard's data provider.
"""

import mimetypes
from pathlib import Path
from typing import Any

import werkzeug
from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin

from torch_eft.tensorboard.plugin.reader import Reader
from torch_eft.tensorboard.run_info import PLUGIN_NAME

STATIC = Path(__file__).parent / "static"


class EFTPlugin(base_plugin.TBPlugin):
    """Serves the tab and its data.

    Routes, all JSON but the last: ``/runs``; ``/series?run=R[&quantity=Q...]``; ``/events?run=R``; ``/static/FILE``.
    An unknown run or a missing parameter is answered with 404 or 400 and ``{"error": sentence}``.
    """

    plugin_name = PLUGIN_NAME

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        hints = context.sampling_hints or {}
        self._reader = Reader(context.data_provider, samples=hints.get("scalars") or 1000)

    def get_plugin_apps(self) -> dict[str, Any]:
        """The routes."""
        routes = {"/runs": self._runs, "/series": self._series, "/events": self._events}
        for file in sorted(STATIC.rglob("*.*")):
            if file.suffix in (".js", ".css"):
                routes[f"/static/{file.relative_to(STATIC).as_posix()}"] = self._static
        return {path: werkzeug.Request.application(route) for path, route in routes.items()}

    def is_active(self) -> bool:
        """False: TensorBoard itself looks whether there is data of ``plugin_name``."""
        return False

    def frontend_metadata(self) -> Any:
        """The tab's name and its entry module."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="EFT")

    def _runs(self, request: werkzeug.Request) -> werkzeug.Response:
        return self._answer(request, lambda ctx, experiment: self._reader.runs(ctx, experiment))

    def _series(self, request: werkzeug.Request) -> werkzeug.Response:
        quantities = request.args.getlist("quantity")
        return self._answer(
            request, lambda ctx, experiment: self._reader.series(ctx, experiment, _run(request), quantities or None)
        )

    def _events(self, request: werkzeug.Request) -> werkzeug.Response:
        return self._answer(request, lambda ctx, experiment: self._reader.events(ctx, experiment, _run(request)))

    def _answer(self, request: werkzeug.Request, read: Any) -> werkzeug.Response:
        try:
            content = read(plugin_util.context(request.environ), plugin_util.experiment_id(request.environ))
        except (errors.NotFoundError, errors.InvalidArgumentError) as error:
            return http_util.Respond(request, {"error": str(error)}, "application/json", code=error.http_code)
        return http_util.Respond(request, content, "application/json")

    def _static(self, request: werkzeug.Request) -> werkzeug.Response:
        file = STATIC / request.path.rpartition("/static/")[2]  # only files found in get_plugin_apps are routed here
        kind = "text/javascript" if file.suffix == ".js" else mimetypes.types_map[file.suffix]
        return http_util.Respond(request, file.read_text("utf-8"), kind)


def _run(request: werkzeug.Request) -> str:
    run = request.args.get("run")
    if run is None:
        raise errors.InvalidArgumentError("no run given; add ?run=NAME, with a name from /runs")
    return run
