"""Charts of the app; counts and bins come in, so that no chart carries more than a few hundred values."""

from typing import Any, Final

import altair as alt
import pandas as pd

from agegender import FacePrediction

__all__ = ["AGE_END_YEARS", "age_data", "age_scale", "bars", "histogram"]

AGE_END_YEARS: Final = 116  # the oldest in the training data, as the network's last bin
_GENDER_COLOURS: Final = {"male": "#4a86f7", "female": "#d6498f"}  # legible on white and on near black
_ACCENT: Final = _GENDER_COLOURS["male"]
_NEUTRAL: Final = "#7a8699"
_HEIGHT_PX: Final = 260
_LEGEND_PX: Final = 66
_SCALE_HEIGHT_PX: Final = 44


def age_data(face: FacePrediction) -> pd.DataFrame:
    """One face's age and its interval, for `age_scale`."""
    return pd.DataFrame(
        [{"start": 0, "end": AGE_END_YEARS, "low": face.age_low, "high": face.age_high, "age": face.age}]
    )


def age_scale() -> dict[str, Any]:
    """Age as a point and its interval as a bar, on a scale from 0 to 116 years: a Vega-Lite specification.

    Not by Altair, which takes longer to check a chart than all else that a card needs.
    """
    bar = {"type": "bar", "size": 6, "cornerRadius": 3}
    track = {
        "mark": {**bar, "color": _NEUTRAL, "opacity": 0.25},
        "encoding": {"x": _years("start"), "x2": {"field": "end"}},
    }
    interval = {
        "mark": {**bar, "color": _ACCENT, "opacity": 0.5},
        "encoding": {"x": _years("low"), "x2": {"field": "high"}},
    }
    tooltip = [{"field": name, "type": "quantitative", "format": ".1f"} for name in ("age", "low", "high")]
    point = {
        "mark": {"type": "circle", "size": 110, "color": _ACCENT, "opacity": 1},
        "encoding": {"x": _years("age"), "tooltip": tooltip},
    }
    return {"height": _SCALE_HEIGHT_PX, "layer": [track, interval, point]}


def _years(field: str) -> dict[str, Any]:
    ticks = [0, 20, 40, 60, 80, 100, AGE_END_YEARS]
    axis = {"values": ticks, "title": None, "grid": False, "ticks": False, "domain": False, "labelPadding": 2}
    scale = {"domain": [0, AGE_END_YEARS], "nice": False}
    return {"field": field, "type": "quantitative", "scale": scale, "axis": axis}


def histogram(bins: pd.DataFrame, *, title: str, split: str | None = None) -> alt.Chart:
    """Bars over bins.

    Args:
        bins: columns `start`, `end` and `count`, and the one that `split` names.
        title: what is counted, with its unit.
        split: stacks the bars by this column of genders.
    """
    colour = (
        alt.Color(
            f"{split}:N",
            title=None,
            scale=alt.Scale(domain=list(_GENDER_COLOURS), range=list(_GENDER_COLOURS.values())),
            legend=alt.Legend(orient="top"),
        )
        if split
        else alt.value(_ACCENT)
    )
    ends = [alt.Tooltip(f"{name}:Q", title=title) for name, title in (("start", "from"), ("end", "to"))]
    tooltip = [*ends, alt.Tooltip("count:Q", format=",")]
    return (
        alt.Chart(bins, height=_HEIGHT_PX + (_LEGEND_PX if split else 0))  # the same room for the bars
        .mark_bar(binSpacing=1)
        .encode(
            alt.X("start:Q", bin="binned", title=title),
            alt.X2("end"),
            alt.Y("count:Q", title="faces", axis=alt.Axis(tickMinStep=1, format="~s")),
            color=colour,
            tooltip=[*tooltip, f"{split}:N"] if split else tooltip,
        )
    )


def bars(counts: pd.DataFrame, *, title: str, horizontal: bool = False) -> alt.Chart:
    """A bar for each name.

    Args:
        counts: columns `name` and `count`, in the order of the bars.
        title: what the names are.
        horizontal: for names that are words.
    """
    order = list(counts["name"])  # said outright, since a chart that gets other data keeps the order of its first
    names = alt.Y if horizontal else alt.X
    numbers = alt.X if horizontal else alt.Y
    return (
        alt.Chart(counts, height=_HEIGHT_PX)
        .mark_bar(color=_ACCENT, size=20)
        .encode(
            names("name:N", sort=order, title=None if horizontal else title, axis=alt.Axis(labelAngle=0)),
            numbers("count:Q", title="images", axis=alt.Axis(tickMinStep=1, format="~s")),
            tooltip=[alt.Tooltip("name:N", title=title), alt.Tooltip("count:Q", format=",")],
        )
    )
