"""results -> records: JSON objects and Arrow rows, both from one list of fields."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from agegender.result import FacePrediction, ImageResult

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FIELDS", "Field", "arrow_schema", "arrow_table", "from_json", "to_json", "to_rows"]


@dataclass(frozen=True)
class Field:
    """One field of a record.

    Attributes:
        name: JSON key and Parquet column.
        type: name of its Arrow type.
        doc: what it holds.
        of_image: reads it from the image, for a field that all faces of an image share.
        of_face: reads it from a face, for the others.
    """

    name: str
    type: str
    doc: str
    of_image: Callable[[ImageResult], Any] | None = None
    of_face: Callable[[FacePrediction], Any] | None = None


FIELDS: Final = (
    Field("path", "string", "the input's path or name", of_image=lambda image: _text(image.path)),
    Field("status", "string", "ok, no_face, not_image, unreadable, too_large or failed", of_image=lambda i: i.status),
    Field("error", "string", "what was wrong, or null", of_image=lambda image: image.error),
    Field("width", "int32", "width of the upright image, pixels", of_image=lambda image: image.width),
    Field("height", "int32", "height of the upright image, pixels", of_image=lambda image: image.height),
    Field("faces", "int32", "number of faces in the image", of_image=lambda image: len(image.faces)),
    Field("face", "int32", "which of them, from 0, the largest first", of_face=lambda face: face.index),
    Field("x1", "float32", "left edge of the face's box, pixels", of_face=lambda face: face.box[0]),
    Field("y1", "float32", "top edge", of_face=lambda face: face.box[1]),
    Field("x2", "float32", "right edge", of_face=lambda face: face.box[2]),
    Field("y2", "float32", "bottom edge", of_face=lambda face: face.box[3]),
    Field("score", "float32", "the detector's confidence, null for a whole image", of_face=lambda face: face.score),
    Field("age", "float32", "perceived age, years", of_face=lambda face: face.age),
    Field("age_low", "float32", "lower end of its interval, years", of_face=lambda face: face.age_low),
    Field("age_high", "float32", "upper end of its interval, years", of_face=lambda face: face.age_high),
    Field("gender", "string", "perceived gender: male or female", of_face=lambda face: face.gender),
    Field(
        "gender_probability", "float32", "calibrated probability of that gender", of_face=lambda f: f.gender_probability
    ),
)


def to_rows(result: ImageResult) -> list[dict[str, Any]]:
    """One row per face, or one row without face fields for an input that has none."""
    shared = {field.name: field.of_image(result) for field in FIELDS if field.of_image}
    faces: Iterable[FacePrediction | None] = result.faces or (None,)
    return [{**shared, **_face_fields(face)} for face in faces]


def to_json(result: ImageResult) -> dict[str, Any]:
    """One object per image: its own fields, and under `predictions` one object per face."""
    shared = {field.name: field.of_image(result) for field in FIELDS if field.of_image}
    return {**shared, "predictions": [_face_fields(face) for face in result.faces]}


def from_json(record: Mapping[str, Any]) -> ImageResult:
    """The result that `to_json` made the object from.

    Raises:
        KeyError, TypeError: it is no such object.
    """
    faces = tuple(
        FacePrediction(
            index=face["face"],
            box=(face["x1"], face["y1"], face["x2"], face["y2"]),
            **{name: face[name] for name in ("score", "age", "age_low", "age_high", "gender", "gender_probability")},
        )
        for face in record["predictions"]
    )
    shared = {name: record[name] for name in ("path", "status", "error", "width", "height")}
    return ImageResult(**shared, faces=faces)


def arrow_schema() -> "pa.Schema":
    """The Parquet schema, with each field's description in its metadata."""
    import pyarrow as pa

    return pa.schema([pa.field(f.name, pa.type_for_alias(f.type), metadata={"doc": f.doc}) for f in FIELDS])


def arrow_table(results: Iterable[ImageResult]) -> "pa.Table":
    """The rows of many results."""
    import pyarrow as pa

    return pa.Table.from_pylist([row for result in results for row in to_rows(result)], schema=arrow_schema())


def _text(path: str) -> str:
    r"""A path whose bytes are no UTF-8, in a form that JSON and Arrow take: `\udce9` for the byte 0xe9."""
    return path.encode("utf-8", "backslashreplace").decode()


def _face_fields(face: FacePrediction | None) -> dict[str, Any]:
    return {field.name: None if face is None else field.of_face(face) for field in FIELDS if field.of_face}
