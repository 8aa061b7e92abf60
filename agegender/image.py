"""data -> image: encoded bytes become upright RGB pixels, bounded in number before any is decoded."""

import io
import struct
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from agegender.errors import ImageDecodeError, ImageTooLargeError, NotAnImageError

__all__ = ["DEFAULT_MAX_PIXELS", "FORMATS", "EncodedImage", "Pixels", "decode_image", "read_header"]

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
    _source: Image.Image = field(repr=False)
    _orientation: int = field(repr=False)

    def decode(self, *, min_side_px: int | None = None) -> Pixels:
        """Decodes the pixels; may be called once.

        Args:
            min_side_px: lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size (by DCT scaling), as long as its
                longer side keeps at least this many pixels. None decodes at full resolution.

        Returns:
            (H, W, 3) uint8 RGB, upright, contiguous.

        Raises:
            ImageDecodeError: the pixels are damaged, truncated or of an unsupported kind.
        """
        try:
            if min_side_px is not None and self.format == "JPEG":
                _allow_dct_scaling(self._source, min_side_px)
            self._source.load()
            pixels = np.asarray(_to_rgb(self._source))
        except ImageDecodeError:
            raise
        except Exception as error:  # Pillow's decoders raise a dozen kinds of error on damaged data
            raise ImageDecodeError(f"damaged {self.format} image: {_reason(error)}") from error
        return _upright(pixels, self._orientation)


def read_header(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> EncodedImage:
    """Reads format, size and orientation without decoding a pixel.

    Raises:
        NotAnImageError: the bytes are empty or of none of `FORMATS`.
        ImageDecodeError: the format is known but its header is damaged.
        ImageTooLargeError: the header announces more than `max_pixels` pixels.
    """
    if not data:
        raise NotAnImageError("the file is empty (0 bytes)")
    source, format_ = _open(data)
    orientation = _orientation(source)
    turned = _UPRIGHT[orientation][0] % 2 == 1
    width, height = source.size[::-1] if turned else source.size
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{width}x{height} is {width * height / 1e6:.1f} megapixels, over the limit of {max_pixels / 1e6:g}",
            width=width,
            height=height,
        )
    return EncodedImage(width, height, format_, source, orientation)


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Decodes JPEG, PNG, WebP, BMP, TIFF or the first frame of a GIF at full resolution.

    All eight EXIF orientations are turned upright; grey, palette, CMYK and 16-bit pixels become 8-bit RGB; transparency
    is laid over white. Embedded colour profiles are ignored.

    Args:
        data: the encoded file.
        max_pixels: an image that announces more is refused before any pixel is decoded.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        ImageDecodeError: empty, not an image, of an unknown format, damaged or truncated.
        ImageTooLargeError: more than `max_pixels` pixels.
    """
    return read_header(data, max_pixels=max_pixels).decode()


def _open(data: bytes) -> tuple[Image.Image, str]:
    """Finds the format by its signature and lets Pillow's plugin of that format read the header.

    `Image.open` is not used: its own pixel limit is a process-wide setting that warns or raises below ours.
    """
    Image.init()
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is not None and not accept(data[:16]):
            continue
        try:
            source = factory(io.BytesIO(data), "")
        except Exception as error:  # see EncodedImage.decode
            raise ImageDecodeError(f"damaged {name} header: {_reason(error)}") from error
        if min(source.size) < 1:
            raise ImageDecodeError(f"damaged {name} header: it announces {source.size[0]}x{source.size[1]} pixels")
        return source, name
    raise NotAnImageError(f"not an image of a known format ({', '.join(FORMATS)}); it begins with {data[:8]!r}")


def _orientation(source: Image.Image) -> int:
    try:
        value = source.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return 1  # a damaged EXIF block does not make the picture unreadable
    return value if value in _UPRIGHT else 1


def _allow_dct_scaling(source: Image.Image, min_side_px: int) -> None:
    scale = max(source.size) // min_side_px
    if scale >= 2:
        source.draft(None, (source.size[0] // scale, source.size[1] // scale))


def _to_rgb(source: Image.Image) -> Image.Image:
    if source.mode == "RGB" and "transparency" not in source.info:
        return source
    if source.mode in _SIXTEEN_BIT_MODES:
        high_byte = np.asarray(source).astype(np.uint16) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if source.mode in ("I", "F"):
        raise ImageDecodeError(f"32-bit pixels (mode {source.mode}) have no defined white; convert the image to 8 bits")
    if source.has_transparency_data:
        canvas = Image.new("RGBA", source.size, "white")
        return Image.alpha_composite(canvas, source.convert("RGBA")).convert("RGB")
    return source.convert("RGB")


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    quarter_turns, mirrored = _UPRIGHT[orientation]
    turned = np.rot90(pixels, quarter_turns)
    return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)


def _reason(error: Exception) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
