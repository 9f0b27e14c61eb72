"""Images as users give them: files, bytes, Pillow's images, arrays and tensors, decoded to upright 8-bit RGB.

One way for all of them, so that a picture gives the same pixels however it is handed over: turned as its EXIF data
says, scaled by its depth, transparency laid on white.
"""

from __future__ import annotations

import base64
import binascii
import logging
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from graphmode.engine.checks import shown
from graphmode.errors import InputError

log = logging.getLogger(__name__)

ACCEPTED = (
    "a path, the bytes of a file, a data URL (data:image/png;base64,...), an image of Pillow, or an array or tensor "
    "[height, width], [height, width, channels] or [channels, height, width]"
)
_ROUNDING = 1e-3
_PROGRAMS = ("EPS",)  # Pillow has Ghostscript run them
_CHANNELS = (1, 2, 3, 4)  # grey, grey with alpha, RGB, RGBA


def read_image(source: Any, name: str, max_pixels: int) -> NDArray[np.uint8]:
    """Decode an image.

    Args:
        source: a path, a file's bytes, a data URL, an image of Pillow, or an array or tensor: ``[height, width]``, or
            with 1 to 4 channels last or first. Where both ends could be channels, an array has them last and a tensor
            first. Values are uint8, bool, uint16, other integers from 0 to 255, or floats from 0 to 1 or from 0 to 255.
        name: of the image, for errors: ``"image 2"``.
        max_pixels: the limit.

    Returns:
        ``[height, width, 3]``.

    Raises:
        InputError: it is no image, damaged, empty or too large, or its values are none of an image.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, name, max_pixels)
    if isinstance(source, (str, Path)) and not str(source).startswith("data:"):
        name = f"{name} ({shown(str(source))})"
    elif isinstance(source, torch.Tensor) or hasattr(source, "__array__"):
        return _decoded(_from_array(source, name, max_pixels), name, max_pixels)
    with _opened(source, name, max_pixels) as image:
        return _decoded(image, name, max_pixels)


def read_video(video: Any, name: str, max_pixels: int) -> NDArray[np.uint8]:
    """Decode the frames of a video.

    Args:
        video: a list of what :func:`read_image` takes, or an array or tensor of frames, at least one.
        name: of the video, for errors: ``"video 1"``.
        max_pixels: the limit of a frame.

    Returns:
        ``[frames, 3, height, width]``.

    Raises:
        InputError: it is no video, or a frame is no image or of another size than the first.
    """
    if hasattr(video, "__array__"):
        if len(video.shape) != 4:
            raise InputError(
                f"{name} has shape {list(video.shape)}; frames are [frames, height, width, channels] or [frames, "
                "channels, height, width]"
            )
    elif not isinstance(video, (list, tuple)):
        raise InputError(f"{name} is {type(video).__name__} {shown(video)}; a video is a list of frames, or an array")
    frames = [read_image(frame, f"frame {at} of {name}", max_pixels) for at, frame in enumerate(video, 1)]
    if not frames:
        raise InputError(f"{name} has no frames; give at least one")
    height, width, _ = frames[0].shape
    for at, frame in enumerate(frames, 1):
        if frame.shape != frames[0].shape:
            raise InputError(
                f"frame {at} of {name} is {frame.shape[1]} x {frame.shape[0]}, the first is {width} x {height}; scale "
                "them to one size"
            )
    return np.stack(frames).transpose(0, 3, 1, 2)


def _opened(source: Any, name: str, max_pixels: int) -> Image.Image:
    """Open a file, without its pixels."""
    file: Path | BytesIO
    if isinstance(source, str) and source.startswith("data:"):
        file = BytesIO(_of_data_url(source, name))
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        raise InputError(f"{name} is an address, and nothing is downloaded; give {ACCEPTED}")
    elif isinstance(source, (str, Path)):
        file = Path(source)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        file = BytesIO(source)
    else:
        raise InputError(f"{name} is {type(source).__name__} {shown(source)}; give {ACCEPTED}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit of pixels is ours
        try:
            Image.init()
            return Image.open(file, formats=[each for each in Image.ID if each not in _PROGRAMS])
        except FileNotFoundError:
            raise InputError(f"{name} is not there; give {ACCEPTED}") from None
        except Image.DecompressionBombError as error:
            raise InputError(
                f"{name} has more pixels than Pillow opens ({error}); it may have {max_pixels}. Scale it down, or "
                "raise max_image_pixels and PIL.Image.MAX_IMAGE_PIXELS"
            ) from error
        except Exception as error:  # Pillow and its decoders raise nearly anything for files that are none of theirs
            raise InputError(f"{name} cannot be read as an image ({_words(error)}); give {ACCEPTED}") from error


def _of_data_url(url: str, name: str) -> bytes:
    head, comma, data = url.partition(",")
    try:
        if comma and head.endswith(";base64"):
            return base64.b64decode("".join(data.split()), validate=True)
        fault = "it is not in base64"
    except (binascii.Error, ValueError) as error:
        fault = str(error)
    raise InputError(f"{name} is {shown(url)}, which cannot be decoded ({fault}); write data:image/png;base64,...")


def _decoded(image: Image.Image, name: str, max_pixels: int) -> NDArray[np.uint8]:
    """Return an image upright, as 8-bit RGB."""
    _check_size(*image.size, name, max_pixels)
    try:
        _load(image)
        image = _upright(image, name)
        if image.mode.startswith("I"):
            values = np.asarray(image)
            # I;16 and its kin have 16 bits. I has 32, of which a file means 16 and a conversion from grey 8.
            eight_bits = image.mode == "I" and values.max() <= 255
            image = Image.fromarray(_of_depth(values, np.uint8 if eight_bits else np.uint16, name))
        elif image.mode == "F":
            image = Image.fromarray(_of_floats(np.asarray(image), name))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.array(image.convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # as above
        raise InputError(
            f"{name} ({image.format or 'an image'}, {image.mode}, {image.width} x {image.height}) cannot be decoded: "
            f"it may be damaged or cut off ({_words(error)}). Save it anew"
        ) from error


def _load(image: Image.Image) -> None:
    """Read the pixels of a file, without mapping it into memory: so Pillow takes rows of a turned TIFF for columns."""
    filename = getattr(image, "filename", None)
    if not filename:
        image.load()
        return
    image.filename = ""  # type: ignore[attr-defined]
    try:
        image.load()
    finally:
        image.filename = filename  # type: ignore[attr-defined]


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # as above: the pixels are there, and are taken as they lie
        log.warning("%s: its EXIF data cannot be read (%s); it is not turned", name, _words(error))
        return image


def _from_array(source: Any, name: str, max_pixels: int) -> Image.Image:
    """Return an array or tensor as an image of Pillow, with 8 bits a channel."""
    channels_first = isinstance(source, torch.Tensor)
    try:
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu()
            source = (source.float() if source.is_floating_point() else source).numpy()
        values = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is {type(source).__name__}, which is no array ({_words(error)})") from error
    if values.ndim == 2:
        values = values[:, :, None]
    ends = (0, -1) if channels_first else (-1, 0)
    channels = next((end for end in ends if values.ndim == 3 and values.shape[end] in _CHANNELS), None)
    if channels is None:
        raise InputError(
            f"{name} has shape {list(values.shape)}; an array is [height, width], [height, width, channels] or "
            "[channels, height, width], with 1 to 4 channels: grey, grey with alpha, RGB, RGBA"
        )
    values = np.moveaxis(values, channels, -1)
    height, width, _ = values.shape
    _check_size(width, height, name, max_pixels)
    if values.dtype == np.bool_:
        eight_bits = values * np.uint8(255)
    elif np.issubdtype(values.dtype, np.floating):
        eight_bits = _of_floats(values, name)
    elif values.dtype.kind == "u" and values.dtype.itemsize == 2:
        eight_bits = _of_depth(values, np.uint16, name)
    elif np.issubdtype(values.dtype, np.integer):
        eight_bits = _of_depth(values, np.uint8, name)
    else:
        raise InputError(f"{name} has dtype {values.dtype}; an array holds integers, floats or bools")
    return Image.fromarray(np.ascontiguousarray(eight_bits[:, :, 0] if eight_bits.shape[2] == 1 else eight_bits))


def _of_depth(values: NDArray[Any], depth: type[np.uint8] | type[np.uint16], name: str) -> NDArray[np.uint8]:
    """Return integers that have all bits of a depth as those of 8 bits."""
    most = np.iinfo(depth).max
    if values.min() < 0 or values.max() > most:
        raise InputError(
            f"{name} holds {values.dtype} from {values.min()} to {values.max()}; they must be from 0 to {most}. Scale "
            "them to 0 to 255, as uint8"
        )
    return (values if depth is np.uint8 else values >> 8).astype(np.uint8)


def _of_floats(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Return floats from 0 to 1, or from 0 to 255, as 8 bits; what rounding has left beyond is cut."""
    if not np.isfinite(values).all():
        raise InputError(f"{name} holds NaN or infinity; pixels are from 0 to 1, or from 0 to 255")
    least, most = float(values.min()), float(values.max())
    scale = 255 if most <= 1 + _ROUNDING else 1
    # From 1 to 2 it could be from 0 to 1 and have overshot when it was resized, or from 0 to 255 and be black.
    if (scale == 1 and (most < 2 or most > 255 + _ROUNDING)) or least < -_ROUNDING:
        raise InputError(
            f"{name} holds {values.dtype} from {least:.6g} to {most:.6g}; pixels are from 0 to 1, or from 0 to 255. "
            "Clip them; if they are normalized, give them as they were before: the model's processor does that"
        )
    return np.clip(np.rint(values.astype(np.float64) * scale), 0, 255).astype(np.uint8)


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} is {width} x {height}, without any pixel; give one of at least 1 x 1")
    if width * height > max_pixels:
        raise InputError(
            f"{name} is {width} x {height}, {width * height} pixels; it may have {max_pixels}. Scale it down, or raise "
            "max_image_pixels"
        )


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
