"""results -> records: one list of fields gives the JSON keys and the Arrow columns, and every input has a row."""

import json

import pyarrow as pa
import pytest

from agegender import FacePrediction, ImageResult
from agegender.records import FIELDS, arrow_schema, arrow_table, from_json, to_json, to_rows

FACE_NAMES = {"face", "x1", "y1", "x2", "y2", "score", "age", "age_low", "age_high", "gender", "gender_probability"}
NAMES = {"path", "status", "error", "width", "height", "faces"} | FACE_NAMES

FACES = (
    FacePrediction(0, (1.5, 2.5, 31.5, 42.5), 0.95, 34.25, 28.0, 41.0, "female", 0.98),
    FacePrediction(1, (50.0, 2.0, 60.0, 12.0), None, 7.0, 3.0, 12.0, "male", 0.6),
)
TWO = ImageResult("two.jpg", "ok", None, 640, 480, FACES)
NONE = ImageResult("blank.png", "no_face", None, 320, 240)
BROKEN = ImageResult("broken.jpg", "unreadable", "damaged JPEG image: truncated")


def test_the_names_are_those_that_were_agreed():
    assert sorted(field.name for field in FIELDS) == sorted(NAMES)
    assert all((field.of_image is None) != (field.of_face is None) for field in FIELDS)
    assert {field.name for field in FIELDS if field.of_face} == FACE_NAMES


@pytest.mark.parametrize("result", [TWO, NONE, BROKEN])
def test_json_and_arrow_have_the_same_fields(result):
    order = [field.name for field in FIELDS]
    assert arrow_schema().names == order
    record = to_json(result)
    for row in to_rows(result):
        assert set(row) == set(order)
    assert set(record) - {"predictions"} == set(order) - FACE_NAMES
    assert all(set(face) == FACE_NAMES for face in record["predictions"])


def test_one_row_per_face():
    rows = to_rows(TWO)
    assert [row["face"] for row in rows] == [0, 1]
    assert {(row["path"], row["status"], row["width"], row["height"], row["faces"]) for row in rows} == {
        ("two.jpg", "ok", 640, 480, 2)
    }
    assert [rows[0][name] for name in ("x1", "y1", "x2", "y2")] == [1.5, 2.5, 31.5, 42.5]
    assert [rows[0][name] for name in ("age", "age_low", "age_high")] == [34.25, 28.0, 41.0]
    assert (rows[0]["gender"], rows[0]["gender_probability"], rows[0]["score"]) == ("female", 0.98, 0.95)
    assert rows[1]["score"] is None


@pytest.mark.parametrize("result", [NONE, BROKEN])
def test_one_row_for_an_input_without_faces(result):
    (row,) = to_rows(result)
    assert (row["path"], row["status"], row["error"], row["faces"]) == (result.path, result.status, result.error, 0)
    assert all(row[name] is None for name in FACE_NAMES)


def test_json_is_json_and_comes_back():
    for result in (TWO, NONE, BROKEN):
        text = json.dumps(to_json(result), allow_nan=False)
        assert from_json(json.loads(text)) == result


def test_a_real_result_is_json(predictor, group_jpeg):
    """No value of numpy's own types is left in it."""
    for result in predictor.predict([group_jpeg, b"text"]):
        assert from_json(json.loads(json.dumps(to_json(result), allow_nan=False))) == result


def test_the_schema_types_and_describes_every_column():
    schema = arrow_schema()
    assert schema.field("path").type == schema.field("error").type == schema.field("gender").type == pa.string()
    for name in ("width", "height", "face", "faces"):
        assert schema.field(name).type == pa.int32()
    for name in FACE_NAMES - {"face", "gender"}:
        assert schema.field(name).type == pa.float32()
    for field in schema:
        assert field.metadata[b"doc"]


def test_a_table_keeps_the_schema_whatever_is_in_it():
    for results in ([], [NONE], [BROKEN], [TWO, NONE, BROKEN]):
        table = arrow_table(results)
        assert table.schema.equals(arrow_schema(), check_metadata=True)
        assert table.num_rows == sum(len(to_rows(result)) for result in results)
    table = arrow_table([TWO, NONE, BROKEN])
    assert table["path"].to_pylist() == ["two.jpg", "two.jpg", "blank.png", "broken.jpg"]
    assert table["face"].to_pylist() == [0, 1, None, None]
    assert table["age"].to_pylist() == [34.25, 7.0, None, None]


def test_names_of_files_that_are_no_text_have_rows():
    """On Linux a name is any bytes; Python carries those that are no UTF-8 as lone surrogates."""
    result = ImageResult("caf\udce9.jpg", "no_face")
    assert arrow_table([result])["path"].to_pylist() == ["caf\\udce9.jpg"]
    assert json.loads(json.dumps(to_json(result), ensure_ascii=False).encode())["path"] == "caf\\udce9.jpg"
