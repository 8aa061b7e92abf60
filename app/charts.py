"""Charts of the app; counts and bins come in, so that no chart carries more than a few hundred values."""

from typing import Final

import altair as alt
import pandas as pd

from agegender import FacePrediction

__all__ = ["AGE_END_YEARS", "age_scale", "bars", "histogram"]

AGE_END_YEARS: Final = 116  # the oldest in the training data, as the network's last bin
GENDER_COLOURS: Final = {"male": "#4a86f7", "female": "#d6498f"}  # legible on white and on near black
_ACCENT: Final = GENDER_COLOURS["male"]
_NEUTRAL: Final = "#7a8699"
_HEIGHT_PX: Final = 260
_SCALE_HEIGHT_PX: Final = 44


def age_scale(face: FacePrediction) -> alt.LayerChart:
    """One face's age as a point and its interval as a bar, on a scale from 0 to 116 years."""
    values = {"start": 0, "end": AGE_END_YEARS, "low": face.age_low, "high": face.age_high, "age": face.age}
    base = alt.Chart(pd.DataFrame([values]), height=_SCALE_HEIGHT_PX)
    axis = alt.Axis(
        values=[0, 20, 40, 60, 80, 100, AGE_END_YEARS],
        title=None,
        grid=False,
        ticks=False,
        domain=False,
        labelPadding=2,
    )
    scale = alt.Scale(domain=[0, AGE_END_YEARS], nice=False)
    track = base.mark_bar(size=6, cornerRadius=3, color=_NEUTRAL, opacity=0.25).encode(
        alt.X("start", scale=scale, axis=axis), alt.X2("end")
    )
    interval = base.mark_bar(size=6, cornerRadius=3, color=_ACCENT, opacity=0.5).encode(
        alt.X("low", scale=scale, axis=axis), alt.X2("high")
    )
    tooltip = [
        alt.Tooltip("age", title="age", format=".1f"),
        alt.Tooltip("low", title="from", format=".1f"),
        alt.Tooltip("high", title="to", format=".1f"),
    ]
    point = base.mark_circle(size=110, color=_ACCENT, opacity=1).encode(alt.X("age", scale=scale), tooltip=tooltip)
    return track + interval + point


def histogram(bins: pd.DataFrame, *, title: str, split: str | None = None) -> alt.Chart:
    """Bars over bins.

    Args:
        bins: columns `start`, `end` and `count`, and the one that `split` names.
        title: what is counted, with its unit.
        split: stacks the bars by this column of genders.
    """
    colour = (
        alt.Color(
            split,
            title=None,
            scale=alt.Scale(domain=list(GENDER_COLOURS), range=list(GENDER_COLOURS.values())),
            legend=alt.Legend(orient="top"),
        )
        if split
        else alt.value(_ACCENT)
    )
    tooltip = [alt.Tooltip("start", title="from"), alt.Tooltip("end", title="to"), alt.Tooltip("count", format=",")]
    return (
        alt.Chart(bins, height=_HEIGHT_PX)
        .mark_bar(binSpacing=1)
        .encode(
            alt.X("start:Q", bin="binned", title=title),
            alt.X2("end"),
            alt.Y("count:Q", title="faces", axis=alt.Axis(tickMinStep=1, format="~s")),
            color=colour,
            tooltip=[*tooltip, split] if split else tooltip,
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
            tooltip=[alt.Tooltip("name", title=title), alt.Tooltip("count", format=",")],
        )
    )
