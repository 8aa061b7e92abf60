"""Sources -> manifest: what is found, what is left out, how it is numbered; and names <-> paths."""

import codecs
import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from batch.errors import SourceError
from batch.listing import MANIFEST_SCHEMA, Input, Listing, block_size, blocks_of, digest, shard_count
from batch.location import FileTooLargeError, decode_path, encode_path, is_remote, normalize, read_bytes

Bytes = st.binary(min_size=1, max_size=40).map(lambda name: b"/" + name.replace(b"\0", b"x"))


@given(Bytes)
def test_a_name_gives_back_its_bytes(path: bytes) -> None:
    assert decode_path(encode_path(path)) == path
    encode_path(path).encode("utf-8")


@given(Bytes, Bytes)
def test_two_paths_never_share_a_name(one: bytes, other: bytes) -> None:
    assert (encode_path(one) == encode_path(other)) == (one == other)


def test_a_name_is_the_path_itself_unless_it_is_not_utf_8() -> None:
    assert encode_path("/tmp/café %41.jpg".encode()) == "/tmp/café %41.jpg"
    assert encode_path(b"/tmp/caf\xe9 %41.jpg") == "file:///tmp/caf%E9%20%2541.jpg"
    assert normalize("file:///tmp/caf%C3%A9.jpg") == "/tmp/café.jpg"


def test_a_path_has_one_slash_at_its_beginning_and_is_not_empty() -> None:
    assert normalize("//tmp/a") == normalize("///tmp/a") == "/tmp/a"
    with pytest.raises(ValueError, match="empty name"):
        normalize("")


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert normalize("a/../b.jpg") == str(tmp_path / "b.jpg")
    assert normalize("s3://bucket/a/") == "s3://bucket/a"
    assert is_remote("gs://bucket/a")
    assert not is_remote("/tmp/s3://bucket")


def test_the_parent_of_a_link_is_that_of_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "folder")
    assert normalize(f"{tmp_path}/link/../a/b..jpg") == str(tmp_path / "elsewhere" / "a" / "b..jpg")
    assert normalize(f"{tmp_path}/link/a.jpg") == str(tmp_path / "link" / "a.jpg")
    assert normalize("/../a") == "/a"
    assert normalize("/a\0/../b") == "/b"


def listed(source: str) -> list[Input]:
    return list(Listing([source]).inputs())


def names(*sources: object, **options: object) -> list[str]:
    listing = Listing([normalize(str(source)) for source in sources], **options)  # type: ignore[arg-type]
    listing.check()
    return [each.path for each in listing.inputs()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/two.jpg", "b/.hidden/three.jpg", "one.jpg", "out/faces.parquet"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(b"data")
    return tmp_path / "src"


def test_a_directory_is_walked_without_the_output_inside_it(folder: Path) -> None:
    found = names(folder, skip=str(folder / "out"))
    assert sorted(found) == [str(folder / name) for name in ("b/.hidden/three.jpg", "b/two.jpg", "one.jpg")]


def test_a_glob_does_not_match_the_output_by_another_name(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder / "out")
    assert not any("/out/" in name for name in names(folder / "**" / "*", skip=str(folder.parent / "link")))


@pytest.mark.parametrize("source", ["out", "out/faces.parquet", "../link", "../list.parquet"])
def test_a_source_in_the_output_is_refused(folder: Path, source: str) -> None:
    (folder.parent / "link").symlink_to(folder / "out")
    (folder.parent / "list.parquet").symlink_to(folder / "out" / "faces.parquet")
    with pytest.raises(SourceError, match="lies in the output, where it may be deleted"):
        names(folder / source, skip=str(folder / "out"))


def test_links_to_directories_are_counted_or_entered_once(folder: Path) -> None:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "elsewhere").symlink_to(folder.parent / "other")
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "four.jpg").write_bytes(b"data")
    listing = Listing([str(folder)])
    assert len(list(listing.inputs())) == 4
    assert listing.excluded == {"link to a directory": 3}
    followed = names(folder, follow_links=True)
    assert len(followed) == len(set(followed)) == 5
    assert str(folder / "b/two.jpg") in followed
    assert str(folder / "elsewhere/four.jpg") in followed


def test_a_directory_keeps_its_own_name_beside_links_to_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes first in the directory, or --append would take its files for new ones."""
    (folder / "a").symlink_to(folder / "b")
    real = os.scandir

    def scandir(path: bytes) -> Any:
        return contextlib.nullcontext(sorted(real(path), key=lambda entry: entry.name))

    monkeypatch.setattr(os, "scandir", scandir)
    assert str(folder / "b/two.jpg") in names(folder, follow_links=True)
    assert not any("/a/" in name for name in names(folder, follow_links=True))


def test_a_directory_that_cannot_be_listed_is_an_input_with_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: bytes) -> object:
        if path.endswith(b"/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    failed = [each for each in Listing([str(folder)]).inputs() if each.error]
    assert failed == [Input(str(folder / "b"), "the directory cannot be listed: Permission denied")]


def test_nesting_deeper_than_a_path_may_be_long(tmp_path: Path) -> None:
    step, depth = "d" * 200, 30
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(step, dir_fd=here)
        below = os.open(step, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    (tmp_path / "beside.jpg").write_bytes(b"data")
    found = listed(str(tmp_path))
    assert Input(str(tmp_path / "beside.jpg")) in found
    (too_deep,) = [each for each in found if each.error]
    assert "File name too long" in str(too_deep.error)


def test_overlapping_sources_give_each_input_once(folder: Path) -> None:
    listing = Listing([str(folder), str(folder / "b"), str(folder / "one.jpg")])
    found = [each.path for each in listing.inputs()]
    assert len(found) == len(set(found)) == 4
    assert listing.excluded == {"named twice": 3}


def test_a_listing_can_be_asked_again(folder: Path) -> None:
    listing = Listing([str(folder), str(folder / "b")])
    once, left_out = list(listing.inputs()), dict(listing.excluded)
    assert list(listing.inputs()) == once
    assert listing.excluded == left_out
    known = {digest(each.path) for each in once[1:]}
    assert list(listing.inputs(known)) == once[:1]
    assert known == {digest(each.path) for each in once}


def test_what_is_known_is_counted_apart_from_what_is_named_twice(folder: Path) -> None:
    listing = Listing([str(folder), str(folder / "b"), str(folder / "one.jpg")])
    found = list(listing.inputs({digest(str(folder / "one.jpg"))}))
    assert len(found) == 3
    assert listing.excluded == {"already in the output": 1, "named twice": 3}


def test_a_glob_matches_files_and_directories(folder: Path) -> None:
    assert names(folder / "*.jpg") == [str(folder / "one.jpg")]
    assert sorted(names(folder / "[bo]*")) == sorted(
        str(folder / name) for name in ("b/two.jpg", "b/.hidden/three.jpg", "one.jpg", "out/faces.parquet")
    )


def test_a_glob_reads_no_lists_enters_no_output_and_goes_round_in_no_circle(folder: Path) -> None:
    (folder / "notes.txt").write_text("a sentence, not a path")
    (folder / "loop").symlink_to(folder)
    (folder / "again").symlink_to(folder)
    for pattern in ("**", "*", "**/*"):
        listing = Listing([str(folder / pattern)], skip=str(folder / "out"))
        found = [each.path for each in listing.inputs()]
        assert sorted(found) == [
            str(folder / name) for name in ("b/.hidden/three.jpg", "b/two.jpg", "notes.txt", "one.jpg")
        ]
        assert listing.excluded["link to a directory"] >= 2


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A file in more directories than Python calls go deep, as pytest's own clean-up would."""
    top = folder = tmp_path / "deep"
    if os.pathconf(tmp_path, "PC_PATH_MAX") < 4096:
        pytest.skip("this system's paths are shorter")
    for _ in range(1200):
        folder.mkdir()
        folder /= "d"
    file = folder.parent / "z.jpg"
    file.write_bytes(b"")
    yield file
    file.unlink()
    while folder != top:
        folder = folder.parent
        folder.rmdir()


@pytest.mark.parametrize("pattern", ["deep/**/*.jpg", "**/deep/**/z.jpg", "d*/**"])
def test_a_glob_reaches_as_deep_as_directories_go(deep: Path, tmp_path: Path, pattern: str) -> None:
    assert names(tmp_path / pattern) == [str(deep)]


@pytest.mark.parametrize("pattern", ["caf?.jpg", "caf[éè].jpg", "[!x]*.jpg", "*"])
def test_a_glob_matches_letters_whatever_their_bytes(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "café.jpg").write_bytes(b"")
    assert names(tmp_path / pattern) == [str(tmp_path / "café.jpg")]


def test_a_glob_tells_of_directories_that_the_disk_does_not_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def broken(path: bytes) -> Any:
        if path.endswith(b"/b"):
            raise OSError(errno.EIO, "Input/output error")
        return scan(path)

    monkeypatch.setattr("os.scandir", broken)
    found = listed(str(folder / "**" / "*.jpg"))
    assert Input(str(folder / "b"), "the directory cannot be listed: Input/output error") in found
    assert Input(str(folder / "one.jpg")) in found


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        ("scandir", "b/*.jpg"),
        ("scandir", "*/*.jpg"),
        ("scandir", "b/**"),
        ("scandir", "**/two.jpg"),
        ("lstat", "*/two.jpg"),
        ("lstat", "**/two.jpg"),
    ],
)
def test_a_glob_tells_of_directories_that_may_not_be_listed_as_a_walk_does(
    folder: Path, call: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor searched, which is another right."""
    real = getattr(os, call)

    def closed(path: bytes) -> Any:
        inside = path.rstrip(b"/") if call == "scandir" else os.path.dirname(path)
        if inside == os.fsencode(folder / "b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, call, closed)
    listing = Listing([str(folder / pattern)])
    told = [each for each in listing.inputs() if each.error]
    assert told == [Input(str(folder / "b"), "the directory cannot be listed: Permission denied")]
    assert not listing.excluded


@pytest.mark.parametrize("pattern", ["**.jpg", "a**/x.jpg"])
def test_a_wildcard_for_directories_within_a_name_is_refused(folder: Path, pattern: str) -> None:
    with pytest.raises(SourceError, match="is no pattern"):
        Listing([str(folder / pattern)]).check()


def test_a_glob_passes_directories_that_go_while_it_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def vanished(path: bytes) -> Any:
        if path.endswith(b"/b"):
            raise FileNotFoundError(errno.ENOENT, "gone", path)
        return scan(path)

    monkeypatch.setattr("os.scandir", vanished)
    assert names(folder / "**" / "*.jpg") == [str(folder / "one.jpg")]


def test_everything_below_a_link_that_is_named(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder / "b")
    below = [str(folder.parent / "link" / name) for name in (".hidden/three.jpg", "two.jpg")]
    assert sorted(names(folder.parent / "link" / "**")) == below
    assert sorted(names(folder.parent / "link" / "**" / "*.jpg")) == below


def test_a_glob_passes_links_that_lead_in_circles(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    assert sorted(names(folder / "*" / "*.jpg")) == [str(folder / "b" / "two.jpg")]


def test_a_glob_keeps_what_it_read_of_a_directory_that_breaks_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    @contextlib.contextmanager
    def breaking(path: bytes) -> Iterator[Iterator[Any]]:
        def entries() -> Iterator[Any]:
            with scan(path) as there:
                yield from there
            if path == os.fsencode(folder):
                raise OSError(errno.EIO, "Input/output error")

        yield entries()

    monkeypatch.setattr("os.scandir", breaking)
    found = names(folder / "*.jpg")
    assert found == [str(folder / "one.jpg"), str(folder)]


def test_a_wildcard_for_directories_is_none_for_files(folder: Path) -> None:
    assert names(folder / "one*" / "**") == []
    assert names(folder / "one*" / "**" / "*") == []


def test_two_wildcards_for_directories_name_nothing_twice(folder: Path) -> None:
    listing = Listing([str(folder / "**" / "b" / "**" / "*.jpg")])
    assert sorted(each.path for each in listing.inputs()) == [
        str(folder / name) for name in ("b/.hidden/three.jpg", "b/two.jpg")
    ]
    assert not listing.excluded


def test_a_file_uri_is_of_this_machine() -> None:
    assert normalize("file://localhost/a%20b") == normalize("file:///a%20b") == "/a b"
    with pytest.raises(ValueError, match="another machine"):
        normalize("file://elsewhere/a")


def test_lists_of_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    expected = [str(folder / "one.jpg"), "/gone\n.jpg", "file:///caf%E9.jpg", "s3://bucket/a b%.jpg"]
    text = folder / "list.txt"
    text.write_bytes(b"one.jpg\r\n\nfile:///gone%0A.jpg\n/caf\xe9.jpg\none.jpg\ns3://bucket/a b%.jpg")
    assert names(text) == expected
    text.write_bytes(codecs.BOM_UTF8 + text.read_bytes())
    assert names(text) == expected
    table = folder / "list.parquet"
    pq.write_table(pa.table({"path": [*expected, expected[0]]}), table)
    assert names(table) == expected


def test_sources_and_lists_whose_names_are_not_utf_8(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    (odd / "one.jpg").write_bytes(b"data")
    (odd / "list.txt").write_bytes(b"s3://bucket/caf\xe9.jpg\n/tmp/two.jpg")
    assert names(odd / "one.jpg") == [encode_path(os.fsencode(odd / "one.jpg"))]
    assert len(names(odd)) == 2
    assert listed(normalize(str(odd / "list.txt"))) == [
        Input("s3://bucket/caf\\xe9.jpg", "the URI is not UTF-8"),
        Input("/tmp/two.jpg"),
    ]


def test_sources_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="missing does not exist"):
        names(tmp_path / "missing")
    with pytest.raises(SourceError, match="cannot be reached"):
        names("nonsense://bucket/a")
    wrong = tmp_path / "list.parquet"
    pq.write_table(pa.table({"file": ["a"]}), wrong)
    with pytest.raises(SourceError, match="must have one column `path`; it has file"):
        names(wrong)
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["path", "path"]), wrong)
    with pytest.raises(SourceError, match="must have one column `path`; it has path, path"):
        names(wrong)
    pq.write_table(pa.table({"path": [1, 2]}), wrong)
    with pytest.raises(SourceError, match="holds int64; it must hold text"):
        names(wrong)
    wrong.write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="cannot be read"):
        names(wrong)


def test_a_source_that_may_not_be_looked_at_is_not_said_to_be_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(SourceError, match=r"cannot be reached: .*Permission denied"):
        Listing([str(folder)]).check()


def test_a_glob_is_no_pattern_of_the_directory_that_it_is_given_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("trip[12]/mine.jpg", "trip1/other.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"data")
    monkeypatch.chdir(tmp_path / "trip[12]")
    for pattern in ("*.jpg", "../trip[[]12]/*.jpg"):
        assert listed(normalize(pattern, may_match=True)) == [Input(str(tmp_path / "trip[12]" / "mine.jpg"))]
    assert normalize("new*") == str(tmp_path / "trip[12]" / "new*")
    assert not listed(normalize("other.jpg", may_match=True))
    (tmp_path / "trip[12]" / "in").mkdir()
    monkeypatch.chdir("in")
    assert listed(normalize("../*.jpg", may_match=True)) == [Input(str(tmp_path / "trip[12]" / "mine.jpg"))]


def test_a_glob_in_a_directory_whose_name_is_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    (odd / "one.jpg").write_bytes(b"data")
    monkeypatch.chdir(odd)
    assert listed(normalize("*.jpg", may_match=True)) == [Input(encode_path(os.fsencode(odd / "one.jpg")))]


def test_names_are_the_same_bytes_in_every_locale(repository: Path) -> None:
    code = (
        "from batch.location import decode_path, encode_path, normalize; import os; "
        "paths = [b'/caf\\xc3\\xa9', b'/caf\\xe9', b'/plain']; "
        "assert [decode_path(encode_path(path)) for path in paths] == paths; "
        "assert [decode_path(normalize(os.fsdecode(path))) for path in paths] == paths"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=repository, env={**os.environ, **locale}, check=True)


def test_lists_with_holes_and_of_other_encodings(folder: Path) -> None:
    table = folder / "list.parquet"
    text = pa.array([b"/caf\xe9.jpg", None, b"", b"/b.jpg"], pa.binary())
    for column in (text, pa.Array.from_buffers(pa.string(), 4, text.buffers())):
        pq.write_table(pa.table({"path": column}), table)
        listing = Listing([str(table)])
        assert [each.path for each in listing.inputs()] == ["file:///caf%E9.jpg", "/b.jpg"]
        assert listing.excluded == {"no path in a list": 2}
    pq.write_table(pa.table({"path": pa.array(["/a.jpg", None, "/a.jpg"]).dictionary_encode()}), table)
    assert names(table) == ["/a.jpg"]
    (folder / "list.txt").write_text("one.jpg\n", encoding="utf-16")
    with pytest.raises(SourceError, match="is UTF-16; save it as UTF-8"):
        names(folder / "list.txt")
    (folder / "list.txt").write_text("s3://\n/a.jpg")
    assert listed(str(folder / "list.txt")) == [
        Input("s3://", "s3:// names no bucket"),
        Input("/a.jpg"),
    ]
    (folder / "list.txt").write_bytes(b"s3:///caf\xc3\xa9\nfile:///caf\xe9.jpg")
    (table,) = blocks_of(Listing([str(folder / "list.txt")]).inputs())
    assert table["paths"].to_pylist() == [["file:///caf%E9.jpg", "s3:///caf\u00e9"]]


def test_a_directory_is_entered_once_from_all_sources(folder: Path) -> None:
    for name in ("L1", "L2"):
        (folder.parent / name).mkdir()
        (folder.parent / name / "x").symlink_to(folder / "b")
    sources = folder.parent / "L1", folder.parent / "L2", folder
    assert len(names(*sources, follow_links=True)) == 4


def test_a_key_hides_none_that_begin_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        def get_file_info(self, asked: Any) -> Any:
            if isinstance(asked, str):
                return fs.FileInfo(asked, fs.FileType.File)
            if asked.base_dir == "b/secret.jpg":
                raise PermissionError("may not list")
            return [fs.FileInfo("b/photos/1.jpg", fs.FileType.File)] if asked.base_dir == "b/photos" else []

    monkeypatch.setattr("batch.listing.filesystem_of", lambda name: (Store(), name.removeprefix("s3://")))
    assert names("s3://b/photos") == ["s3://b/photos", "s3://b/photos/1.jpg"]
    assert names("s3://b/one.jpg") == ["s3://b/one.jpg"]
    assert names("s3://b/secret.jpg") == ["s3://b/secret.jpg"]


@pytest.mark.parametrize("root", ["b", "b/in"])
def test_two_slashes_in_a_key_lead_round_in_no_circle(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow gives the directory itself among its entries then, that of a bucket with a slash at its end."""

    class Store:
        def get_file_info(self, asked: Any) -> Any:
            if isinstance(asked, str):
                return fs.FileInfo(asked, fs.FileType.Directory)
            itself = root if "/" in root else f"{root}/"
            return [fs.FileInfo(itself, fs.FileType.Directory), fs.FileInfo(f"{root}/1.jpg", fs.FileType.File)]

    monkeypatch.setattr("batch.listing.filesystem_of", lambda _: (Store(), root))
    slashes, file = Listing([f"s3://{root}"]).inputs()
    assert (slashes.path.rstrip("/"), file.path) == (f"s3://{root}", f"s3://{root}/1.jpg")
    assert slashes.error


@pytest.mark.parametrize("name", ["photos/*.jpg", "photos/?.jpg", "photos/[ab].jpg"])
def test_a_glob_of_a_bucket_is_refused_unless_it_is_a_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        kind = fs.FileType.NotFound

        def get_file_info(self, asked: Any) -> Any:
            return fs.FileInfo(asked, self.kind) if isinstance(asked, str) else []

    store = Store()
    monkeypatch.setattr("batch.listing.filesystem_of", lambda name: (store, name.removeprefix("s3://")))
    with pytest.raises(SourceError, match="does not exist, and globs are for local files; give the prefix, or a list"):
        names(f"s3://b/{name}")
    store.kind = fs.FileType.File
    assert names(f"s3://b/{name}") == [f"s3://b/{name}"]


@given(st.integers(0, 3000), st.integers(0, 10**9))
def test_blocks_number_every_input_in_order(count: int, first_id: int) -> None:
    tables = list(blocks_of((Input(f"/{number:06}") for number in reversed(range(count))), first_id=first_id))
    rows = pa.concat_tables(tables).to_pylist() if tables else []
    assert [row["block"] for row in rows] == list(range(len(rows)))
    assert [path for row in rows for path in row["paths"]] == [f"/{number:06}" for number in range(count)]
    expected_id = first_id
    for row in rows:
        assert row["first_id"] == expected_id
        assert 0 < len(row["paths"]) <= block_size(expected_id - first_id)
        expected_id += len(row["paths"])


def test_a_crash_repeats_1024_inputs_at_most() -> None:
    assert [block_size(number) for number in (0, 10_000, 10**9)] == [8, 400, 1024]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8])
def test_shards_are_as_many_as_is_said(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch.listing._SHARD_INPUTS", 2)
    shards = list(blocks_of(Input(f"/{number}") for number in range(count)))
    assert len(shards) == shard_count(count)


def test_ten_thousand_files_in_one_directory(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"data")
    for number in range(1, 10_000):
        os.link(tmp_path / "0", tmp_path / str(number))
    (table,) = blocks_of(Listing([str(tmp_path)]).inputs())
    assert table.schema.equals(MANIFEST_SCHEMA)
    assert sum(map(len, table["paths"].to_pylist())) == 10_000
    assert table.num_rows < 200


def test_reading_refuses_what_is_no_file(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "directory"), ("/dev/zero", "character device")):
        with pytest.raises(OSError, match=reason):
            read_bytes(str(path), max_bytes=100)


def test_nobody_waits_for_what_a_named_pipe_may_bring(tmp_path: Path, repository: Path) -> None:
    """In a process of its own, which ends when it waits after all."""
    os.mkfifo(tmp_path / "pipe")
    code = f"from batch.location import read_bytes; read_bytes({str(tmp_path / 'pipe')!r}, max_bytes=100)"
    call = [sys.executable, "-c", code]
    read = subprocess.run(call, cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert "it is a named pipe, not a file" in read.stderr


def test_nobody_waits_for_a_named_pipe_that_takes_the_place_of_a_file(tmp_path: Path, repository: Path) -> None:
    """Between the look at it and its opening."""
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import os, sys; from batch.location import read_bytes; file = os.stat(sys.executable); "
        f"os.stat = lambda _: file; read_bytes({str(tmp_path / 'pipe')!r}, max_bytes=100)"
    )
    call = [sys.executable, "-c", code]
    read = subprocess.run(call, cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert "it is a named pipe, not a file" in read.stderr


def test_what_others_write_into_a_named_pipe_is_not_lost(tmp_path: Path) -> None:
    """Who waits for a reader goes on as soon as anybody opens the pipe, and would write into nothing."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["/bin/sh", "-c", 'echo kept > "$1"', "sh", str(pipe)]) as writer:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            with pytest.raises(OSError, match="named pipe"):
                read_bytes(str(pipe), max_bytes=100)
        waits = writer.poll() is None
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # which lets it end in any case
        with open(reader) as file:
            writer.wait(60)
            assert waits
            assert file.read() == "kept\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system does not list open files")
def test_what_is_no_file_is_not_kept_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError, match="directory"):
            read_bytes(str(tmp_path), max_bytes=100)
    assert len(os.listdir("/proc/self/fd")) == before


def test_reading_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(str(tmp_path / "a"), max_bytes=5) == b"12345"
    with pytest.raises(FileTooLargeError, match="over the limit"):
        read_bytes(str(tmp_path / "a"), max_bytes=4)
    if os.path.exists("/proc/self/status"):  # says that it holds 0 bytes
        with pytest.raises(FileTooLargeError):
            read_bytes("/proc/self/status", max_bytes=10)


def test_a_list_without_line_ends_is_not_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"/a/b.jpg\n" + b"x" * (3 << 20))
    with pytest.raises(SourceError, match="has a line of more than 1,048,576 bytes"):
        names(path)


def test_an_unreachable_store_is_not_tried_for_a_quarter_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Google's library does by default, without a word; moto has no such store."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:1")
    monkeypatch.setattr("batch.location._RETRY_S", 2)
    started = time.monotonic()
    with pytest.raises(OSError, match="Retry policy exhausted"):
        read_bytes("gs://bucket/photo.jpg", max_bytes=1)
    assert time.monotonic() - started < 60
