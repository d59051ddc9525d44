"""The state of an observer in a checkpoint: plain types and tensors, so that it loads with ``weights_only=True``.

Of a checkpoint that another ``VERSION`` of this layout wrote, history, events and theta_0 are read, if they can be, but
not the instruments' own states.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_eft.live.instrument import Event, Instrument, MeasurementWarning
from torch_eft.live.record.recorder import Recorder
from torch_eft.live.run.reference import KeepTheta, Reference

VERSION = 2
"""Of the layout of a checkpoint's state, the instruments' own included; the first one was written without a number."""


def save(
    recorder: Recorder,
    reference: Reference,
    instruments: Sequence[Instrument],
    keep_theta_0: KeepTheta,
    theta_file: Path | None,
    writes: bool,
) -> dict[str, Any]:
    """Save history, theta_0's measurements and where they were taken, and the instruments' own states.

    Args:
        recorder: Gives the history and the events.
        reference: theta_0.
        instruments: The instruments.
        keep_theta_0: Where the parameters of theta_0 are kept.
        theta_file: The file for ``"file"``; None: in the checkpoint.
        writes: Whether this process writes that file.

    Returns:
        The state.
    """
    states: dict[str, Any] = {}
    for instrument in instruments:
        with recorder.guard():
            states[instrument.name] = instrument.state()
    own = reference.state()
    if keep_theta_0 == "none" or (keep_theta_0 == "file" and theta_file is not None):
        holding = [name for name, state in states.items() if isinstance(state, dict) and state.get("theta_0")]
        if theta_file is not None and keep_theta_0 == "file" and writes:
            for name in ("", *holding):
                with recorder.guard():
                    reference.write_theta_0(name, states[name] if name else own, theta_file)
        own = reference.set_aside("", own)
        states |= {name: reference.set_aside(name, states[name]) for name in holding}
    return {
        "version": VERSION,
        "measured": sorted(recorder.measured),
        "history": {step: dict(scalars) for step, scalars in recorder.history.items()},
        "events": [[event.step, event.quantity, event.text] for event in recorder.events],
        **own,
        "parts": states,
    }


def load(state: dict[str, Any], recorder: Recorder, reference: Reference, instruments: Sequence[Instrument]) -> None:
    """Restore what ``save`` returned; anything else raises an exception of any kind."""
    history = {int(step): dict(scalars) for step, scalars in state["history"].items()}
    events = [Event(int(step), quantity, text) for step, quantity, text in state["events"]]
    same = state.get("version") == VERSION
    recorder.load(history, events, {int(step) for step in state["measured"]} if same else set(history))
    reference.load_state(_with_theta_0("", state, recorder, reference))
    if not same:
        warnings.warn(
            f"{recorder.name}: the checkpoint was written by another version of torch_eft; history and theta_0 are "
            "kept, but forecasts and whatever else instruments carry over from earlier steps do not go on",
            MeasurementWarning,
            stacklevel=3,
        )
    for instrument in instruments:
        instrument.forget()
        if not same:
            continue
        own = state["parts"].get(instrument.name, {})
        instrument.load_state(_with_theta_0(instrument.name, own, recorder, reference))


def _with_theta_0(name: str, state: dict[str, Any], recorder: Recorder, reference: Reference) -> dict[str, Any]:
    """A copy of a state with the theta_0 that it points to, if that is available."""
    complete = dict(state)
    with recorder.guard():
        reference.fetch_theta_0(name, complete)
    return complete
