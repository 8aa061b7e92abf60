"""data -> image: encoded bytes become upright RGB pixels, bounded in number before any is decoded."""

import io
import logging
import math
import re
import warnings
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import (  # noqa: F401 - importing a plugin registers its format
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from agegender.errors import AgeGenderError, ImageDecodeError, ImageTooLargeError, NotAnImageError

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "FORMATS",
    "EncodedImage",
    "Pixels",
    "as_torch_takes_it",
    "check_bytes",
    "check_rgb",
    "decode_image",
    "quiet_pillow",
    "read_header",
]

Pixels = npt.NDArray[np.uint8]

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
DEFAULT_MAX_PIXELS: Final = 100_000_000

# EXIF orientation -> quarter turns counter-clockwise, then a mirror image (CIPA DC-008, tag 0x0112).
_UPRIGHT: Final = {
    1: (0, False),
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}

# Each scan costs libjpeg a pass over all pixels but may take only 10 bytes of file (progressive, or baseline with
# components in separate scans). Encoders write about ten.
_MAX_SCANS: Final = 64
# Markers that carry a length (and EOI). The search jumps over each segment as libjpeg does, so bytes inside one are not
# counted as scans; a jump after any other marker could hide real ones.
_JPEG_MARKER: Final = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"

# Pillow raises MemoryError for rows of 2**31 bits. At 64 bits a pixel that is 2**25 pixels; we stop at half.
_MAX_WIDTH: Final = (1 << 24) - 1

# The most that a record's int32 holds; no real image has more.
_MAX_SIDE: Final = 2**31 - 1

# Chunks of a PNG, from their length on.
_PNG_ANY_TEXT: Final = re.compile(rb".{4}(iCCP|[itz][TE]Xt)", re.DOTALL)
_PNG_TEXT: Final = re.compile(_PNG_ANY_TEXT.pattern + rb"(?!XML:com\.adobe\.xmp|Raw profile type exif)", re.DOTALL)

# A TIFF's tile may have as many, even where the image is allowed fewer.
_TILE_PIXELS: Final = 1 << 24

# What is most often taken for one of `FORMATS`, by how it begins; files of the family of HEIC and AVIF by their brands,
# of which the first may be one that both share (ISO/IEC 23008-12).
_OTHER_KINDS: Final = (
    (re.compile(rb".{4}ftyp(avi[fs]|m[is][fs]1.{4,32}avi[fs])", re.DOTALL), "an AVIF image"),
    (re.compile(rb".{4}ftyp(hei[cx]|m[is][fs]1)", re.DOTALL), "a HEIC image"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<(svg|\?xml)"), "an SVG or XML file"),
)

_SIXTEEN_BIT_MODES: Final = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class EncodedImage:
    """An image whose header has been read and accepted, and whose pixels have not been decoded.

    Attributes:
        width: width of the upright image at full resolution, in pixels.
        height: height of the upright image at full resolution, in pixels.
        format: one of `FORMATS`.
    """

    width: int
    height: int
    format: str
    _data: bytes = field(repr=False)
    _orientation: int = field(repr=False)

    def decode(self, *, min_side_px: int | None = None) -> Pixels:
        """Decodes the pixels.

        Args:
            min_side_px: lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size (by DCT scaling), as long as its
                longer side keeps at least this many pixels. None decodes at full resolution.

        Returns:
            (H, W, 3) uint8 RGB, upright, contiguous and the caller's own.

        Raises:
            ImageDecodeError: the pixels are damaged, truncated or of an unsupported kind.
        """
        try:
            source, _ = _open(self._data)
            if self.format == "JPEG" and _count_scans(self._data) > _MAX_SCANS:
                raise ImageDecodeError(f"JPEG image of more than {_MAX_SCANS} scans")
            if source.width > _MAX_WIDTH:
                raise ImageDecodeError(f"{self.format} image of {source.width:,} pixels a row, over {_MAX_WIDTH:,}")
            if min_side_px is not None and self.format == "JPEG":
                _allow_dct_scaling(source, min_side_px)
            source.load()
            return _upright(np.asarray(_to_rgb(source)), self._orientation)
        except (AgeGenderError, MemoryError):  # the latter is no fault of the image
            raise
        except Exception as error:  # Pillow's decoders raise a dozen kinds of error on damaged data
            if (smaller := _without_texts(self._data, error)) is not None:
                return replace(self, _data=smaller).decode(min_side_px=min_side_px)
            raise ImageDecodeError(f"damaged {self.format} image: {_reason(error)}") from error


def check_bytes(data: object) -> None:
    """Makes sure that an image is given as the bytes of its file.

    Raises:
        TypeError: it is given as something else, such as its path.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"an image is given as the bytes of its file, not as {type(data).__name__}")


def check_rgb(pixels: object) -> None:
    """Makes sure that an image is what `decode_image` gives: (H, W, 3) uint8 and not empty. Looks at no pixel.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(pixels, np.ndarray):
        raise ValueError(f"an image must be an array of (H, W, 3) uint8, not {type(pixels).__name__}")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"an image must be (H, W, 3) uint8 and not empty, not {pixels.shape} {pixels.dtype}")


def as_torch_takes_it(pixels: Pixels) -> Pixels:
    """The array itself, or a copy: torch warns of memory that it could not write to, and refuses negative strides."""
    return pixels if pixels.flags.writeable and min(pixels.strides) > 0 else pixels.copy()


def read_header(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> EncodedImage:
    """Reads format, size and orientation without decoding a pixel.

    Raises:
        NotAnImageError: the bytes are empty or of none of `FORMATS`.
        ImageDecodeError: the format is known but its header is damaged.
        ImageTooLargeError: the header announces more than `max_pixels` pixels, or more in a row or a column than any
            image has.
        TypeError: the data are no bytes, see `check_bytes`.
    """
    check_bytes(data)
    if not data:
        raise NotAnImageError("the file is empty (0 bytes)")
    if canvas := _webp_canvas(data):  # which Pillow allocates, twice, to read the header
        _check_pixels(*canvas, max_pixels)
    source, format_ = _open(data)
    orientation = _orientation(source)
    turned = _UPRIGHT[orientation][0] % 2 == 1
    width, height = source.size[::-1] if turned else source.size
    _check_pixels(width, height, max_pixels)
    if isinstance(source, TiffImagePlugin.TiffImageFile):
        _check_tile(source, max_pixels)
    return EncodedImage(width, height, format_, data, orientation)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if max(width, height) > _MAX_SIDE:
        raise ImageTooLargeError(f"the header announces {width}x{height} pixels, which no image has")
    if width * height > max_pixels:
        megapixels = math.ceil(width * height / 1e5) / 10  # never rounded down to the limit itself
        raise ImageTooLargeError(
            f"{width}x{height} is {megapixels} megapixels, over the limit of {max_pixels / 1e6:g}",
            width=width,
            height=height,
        )


def _check_tile(source: TiffImagePlugin.TiffImageFile, max_pixels: int) -> None:
    """A tile is decoded whole, however little of it lies in the image."""
    width, height = (source.tag_v2.get(tag) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    if isinstance(width, int) and isinstance(height, int):
        _check_pixels(width, height, max(max_pixels, _TILE_PIXELS))


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height that the header of an extended WebP announces (WebP container specification, VP8X)."""
    head = bytes(data[:30])
    if len(head) < 30 or (head[:4], head[8:16]) != (b"RIFF", b"WEBPVP8X"):
        return None
    return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Decodes JPEG, PNG, WebP, BMP, TIFF or the first frame of a GIF at full resolution.

    All eight EXIF orientations are turned upright; grey, palette, CMYK and 16-bit pixels become 8-bit RGB; transparency
    is laid over white. Embedded colour profiles are ignored.

    Args:
        data: the encoded file.
        max_pixels: an image that announces more is refused before any pixel is decoded.

    Returns:
        (H, W, 3) uint8 RGB, upright, contiguous and the caller's own.

    Raises:
        ImageDecodeError: empty, not an image, of an unknown format, damaged or truncated.
        ImageTooLargeError: more than `max_pixels` pixels.
        TypeError: the data are no bytes, see `check_bytes`.
    """
    return read_header(data, max_pixels=max_pixels).decode()


def quiet_pillow() -> None:
    """Silences, in this process, Pillow's remarks on odd files; what matters of them is in our errors.

    Meant for programs that show those errors to people. The library leaves warnings and logging as they are.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _open(data: bytes) -> tuple[Image.Image, str]:
    """Finds the format by its signature and lets Pillow's plugin of that format read the header.

    `Image.open` is not used: its own pixel limit is a process-wide setting that warns or raises below ours.
    """
    signature = bytes(data[:16])
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and not accept(signature):
            continue
        try:
            source = factory(io.BytesIO(data), "")
        except Image.DecompressionBombError as error:  # a canvas that some plugins would allocate at once
            raise ImageTooLargeError(f"{name} header: {_reason(error).split(',')[0]}") from error
        except MemoryError:  # no fault of the image
            raise
        except Exception as error:  # see EncodedImage.decode
            if (smaller := _without_texts(data, error)) is not None:
                return _open(smaller)
            raise ImageDecodeError(f"damaged {name} header: {_reason(error)}") from error
        if min(source.size) < 1:
            raise ImageDecodeError(f"damaged {name} header: it announces {source.size[0]}x{source.size[1]} pixels")
        return source, name
    raise NotAnImageError(f"not an image of a known format ({', '.join(FORMATS)}); {_kind_of(bytes(data[:64]))}")


def _kind_of(head: bytes) -> str:
    """What a file is instead."""
    for pattern, kind in _OTHER_KINDS:
        if pattern.match(head):
            return f"it is {kind}, which is not read: save it as JPEG"
    return f"it begins with {str(head[:12])[1:]}"  # as Python shows bytes, without its b


def _without_texts(data: bytes, error: Exception) -> bytes | None:
    """A PNG without its profile and texts, of which Pillow unpacks none beyond 1 MB, or None if that is not the error.

    Those that may say which side is up stay, unless there are no others.
    """
    if "MAX_TEXT_" not in str(error):
        return None
    chunks, position = [data[:8]], 8
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        chunks.append(data[position:end])
        position = end
    for dropped in (_PNG_TEXT, _PNG_ANY_TEXT):
        smaller = b"".join(chunk for chunk in chunks if not dropped.match(chunk))
        if len(smaller) < len(data):
            return smaller
    return None


def _orientation(source: Image.Image) -> int:
    """The EXIF orientation that is left to apply."""
    if isinstance(source, TiffImagePlugin.TiffImageFile):
        return 1  # this plugin turns its pixels upright itself, and announces the upright size
    try:
        # The base class's method: that of PNG decodes all pixels in search of an EXIF block behind them.
        value = Image.Image.getexif(source).get(ExifTags.Base.Orientation)
        return value if value in _UPRIGHT else 1
    except MemoryError:  # no fault of the image
        raise
    except Exception:  # a damaged EXIF block, which raises of all kinds, does not make the picture unreadable
        return 1


def _count_scans(data: bytes) -> int:
    """The count of SOS byte pairs, an upper bound, if within the limit; else the exact one, up to `_MAX_SCANS + 1`."""
    if (most := bytes(data).count(_START_OF_SCAN)) <= _MAX_SCANS:
        return most
    scans, position = 0, 2
    while scans <= _MAX_SCANS and (marker := _JPEG_MARKER.search(data, position)) and marker[0] != _END_OF_IMAGE:
        scans += marker[0] == _START_OF_SCAN
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _allow_dct_scaling(source: Image.Image, min_side_px: int) -> None:
    scale = max(source.size) // min_side_px
    if scale >= 2:
        source.draft(None, (max(1, source.size[0] // scale), max(1, source.size[1] // scale)))


def _to_rgb(source: Image.Image) -> Image.Image:
    if source.mode == "RGB" and "transparency" not in source.info:
        return source
    if source.mode in _SIXTEEN_BIT_MODES:
        return Image.fromarray(_high_bits(source)).convert("RGB")
    if source.mode in ("I", "F"):
        raise ImageDecodeError(f"32-bit pixels (mode {source.mode}) have no defined white; convert the image to 8 bits")
    if source.has_transparency_data:
        canvas, layer = Image.new("RGB", source.size, "white"), source.convert("RGBA")
        canvas.paste(layer, mask=layer)
        return canvas
    return source.convert("RGB")


def _high_bits(source: Image.Image) -> Pixels:
    """The upper 8 bits of grey pixels; Pillow leaves those of a TIFF as they are: of 12 bits, or counted from white."""
    bits, from_white = 16, False
    if isinstance(source, TiffImagePlugin.TiffImageFile):
        bits = source.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0]
        from_white = source.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    grey = (np.asarray(source).astype(np.uint16) >> (bits - 8)).astype(np.uint8)
    return 255 - grey if from_white else grey


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    quarter_turns, mirrored = _UPRIGHT[orientation]
    turned = np.rot90(pixels, quarter_turns)
    return np.array(turned[:, ::-1] if mirrored else turned, order="C")  # always a copy: Pillow's array is read-only


def _reason(error: Exception) -> str:
    """The error's text on one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
