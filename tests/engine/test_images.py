"""What users give as an image becomes the same 8-bit RGB, whatever form it has; what is none is refused by name."""

import base64
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graphmode.graph import InputError

Image = pytest.importorskip("PIL.Image")

from graphmode.engine.images import read_image, read_video  # noqa: E402

LIMIT = 10_000
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
GREY_AS_RGB = np.repeat(GREY[:, :, None], 3, 2)


def read(source: Any) -> np.ndarray:
    image = read_image(source, "image 1", LIMIT)
    assert image.dtype == np.uint8
    return image


def saved(image: Any, file_format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[:, :, None] / 255
    return colours * share + 255 * (1 - share)


FORMS: dict[str, Callable[[bytes, Path], Any]] = {
    "path": lambda data, path: path,
    "name": lambda data, path: str(path),
    "bytes": lambda data, path: data,
    "view": lambda data, path: memoryview(bytearray(data)),
    "opened": lambda data, path: Image.open(path),
    "opened bytes": lambda data, path: Image.open(BytesIO(data)),
    "data URL": lambda data, path: "data:image/any;base64," + base64.b64encode(data).decode(),
}
FILES: dict[str, bytes] = {
    "RGB": saved(Image.fromarray(RGB)),
    "turned": saved(
        Image.fromarray(RGB), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    ),
    "16 bits": saved(Image.fromarray(GREY.astype(np.uint16) << 8)),
    "16 bits turned": saved(Image.fromarray(GREY.astype(np.uint16) << 8), "TIFF", tiffinfo={274: 6}),
    "palette": saved(Image.fromarray(RGB).quantize(16), transparency=3),
    "CMYK": saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_a_file_gives_the_same_pixels_however_it_is_handed_over(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "picture"
    path.write_bytes(data)
    images = [read(form(data, path)) for form in FORMS.values()]
    assert all(np.array_equal(image, images[0]) for image in images)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation: int, file_format: str) -> None:
    """The picture as it should be seen is stored turned, with the tag that says how."""
    stored: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda seen: seen,
        2: lambda seen: seen[:, ::-1],
        3: lambda seen: seen[::-1, ::-1],
        4: lambda seen: seen[::-1],
        5: lambda seen: seen.swapaxes(0, 1),
        6: lambda seen: np.rot90(seen, 1),
        7: lambda seen: seen[::-1, ::-1].swapaxes(0, 1),
        8: lambda seen: np.rot90(seen, -1),
    }
    quarters = np.zeros((16, 32, 3), dtype=np.uint8)
    quarters[:8, :16], quarters[:8, 16:], quarters[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if file_format in ("JPEG", "WEBP") else {}
    turned = np.ascontiguousarray(stored[orientation](quarters))
    data = saved(Image.fromarray(turned), file_format, exif=exif.tobytes(), **options)
    seen = read(data)
    assert seen.shape == quarters.shape
    middles = (slice(4, None, 8), slice(8, None, 16))  # of the quarters, where JPEG is exact enough
    assert np.abs(seen[middles].astype(int) - quarters[middles]).max() < 16
    assert np.array_equal(read(Image.open(BytesIO(data))), seen), "an opened image is turned as its file is"


def test_exif_data_that_cannot_be_read_costs_the_turn_and_not_the_image() -> None:
    data = saved(Image.fromarray(RGB), exif=b"Exif\0\0nothing that anyone could read")
    assert np.array_equal(read(data), RGB)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_are_scaled_by_their_depth(order: str) -> None:
    deep = (GREY.astype(np.uint16) << 8 | 0x7F).astype(order)
    native = deep.astype(np.uint16)
    for source in (
        deep,
        deep[:, :, None],
        np.repeat(deep[None], 3, 0),
        torch.from_numpy(native),
        Image.fromarray(native),
        Image.fromarray(native.astype(np.int32)),
        saved(Image.fromarray(native)),
        saved(Image.fromarray(native.astype(np.int32)), "TIFF"),
        saved(Image.fromarray(native), "TIFF"),
        Image.frombytes("I;16B", (9, 6), deep.astype(">u2").tobytes()),
    ):
        assert np.array_equal(read(source), GREY_AS_RGB)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, torch.bfloat16])
def test_floats_from_0_to_1_are_scaled_once(dtype: Any) -> None:
    """And those from 0 to 255 are not scaled at all."""
    is_torch = isinstance(dtype, torch.dtype)
    for most in (1, 255):
        values = GREY / 255 * most
        source = torch.from_numpy(values).to(dtype) if is_torch else values.astype(dtype)
        coarse = 1 if dtype in (np.float16, torch.bfloat16) else 0
        assert np.abs(read(source).astype(int) - GREY_AS_RGB).max() <= coarse
        rounded = source * (1 + 1e-6) - 1e-6
        assert np.abs(read(rounded).astype(int) - GREY_AS_RGB).max() <= coarse, "what rounding leaves beyond is cut"
    if dtype is np.float32:
        assert np.array_equal(read(Image.fromarray((GREY / 255).astype(dtype))), GREY_AS_RGB), "Pillow's mode F"


def test_integers_of_pillow_are_taken_for_8_bits_where_none_is_larger() -> None:
    assert np.array_equal(read(Image.fromarray(GREY).convert("I")), GREY_AS_RGB)


def test_an_array_may_have_its_channels_on_either_side() -> None:
    for array, expected in (
        (RGB, RGB),
        (GREY[:, :, None], GREY_AS_RGB),
        (np.dstack([RGB, np.full_like(GREY, 255)]), RGB),
    ):
        for source in (array, array.transpose(2, 0, 1), torch.from_numpy(array), torch.from_numpy(array).movedim(2, 0)):
            assert np.array_equal(read(source), expected)
    assert np.array_equal(read(GREY), GREY_AS_RGB)
    assert np.array_equal(read(GREY.astype(np.int64)), GREY_AS_RGB)
    assert np.array_equal(read(GREY > 127), np.where(GREY_AS_RGB > 127, 255, 0))


def test_where_both_sides_could_be_channels_arrays_have_them_last_and_tensors_first() -> None:
    both = RNG.integers(0, 256, (3, 9, 3), dtype=np.uint8)
    assert np.array_equal(read(both), both)
    assert np.array_equal(read(torch.from_numpy(both)), both.transpose(1, 2, 0))


@pytest.mark.parametrize("colours", [RGB, GREY_AS_RGB], ids=["RGBA", "LA"])
def test_transparency_is_laid_on_white(colours: np.ndarray) -> None:
    channels = RGB if colours is RGB else GREY[:, :, None]
    array = np.dstack([channels, ALPHA])
    expected = on_white(colours, ALPHA)
    for source in (array, array / 255, torch.from_numpy(array), Image.fromarray(array), saved(Image.fromarray(array))):
        assert np.abs(read(source) - expected).max() <= 1


def test_a_transparent_colour_of_a_palette_or_a_picture_is_white() -> None:
    palette = Image.fromarray(RGB).quantize(16)
    indices, colours = np.asarray(palette), np.asarray(palette.convert("RGB"))
    expected = np.where(indices[:, :, None] == 3, 255, colours)
    assert np.array_equal(read(saved(palette, transparency=3)), expected)
    assert np.array_equal(read(saved(palette)), colours)
    hole = tuple(int(value) for value in RGB[2, 5])
    expected = np.where((hole == RGB).all(-1, keepdims=True), 255, RGB)
    assert np.array_equal(read(saved(Image.fromarray(RGB), transparency=hole)), expected)


def test_other_colour_spaces_are_converted() -> None:
    image = Image.fromarray(RGB)
    assert np.array_equal(read(image.convert("CMYK")), RGB)
    assert np.array_equal(read(image.convert("1")), np.asarray(image.convert("1").convert("RGB")))
    assert np.abs(read(image.convert("YCbCr")).astype(int) - RGB).max() <= 3


def test_the_users_image_is_left_as_it_was() -> None:
    image = Image.fromarray(np.dstack([RGB, ALPHA]))
    before = image.tobytes()
    result = read(image)
    result[:] = 0
    assert (image.mode, image.tobytes()) == ("RGBA", before)
    array = RGB.copy()
    read(array)[:] = 0
    assert np.array_equal(array, RGB)


def png_of(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has next to no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def damaged(data: bytes, name: bytes) -> bytes:
    at = data.index(name) + 8
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


LARGER = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
BAD: dict[str, tuple[Any, str]] = {
    "a damaged chunk": (damaged(saved(LARGER), b"IDAT"), r"image 1 \(PNG, RGB, 64 x 64\) cannot be decoded.*damaged"),
    "a damaged header": (damaged(saved(LARGER), b"IHDR"), "image 1 cannot be read as an image"),
    "a JPEG that is cut off": (saved(LARGER, "JPEG")[:700], "cannot be decoded.*cut off.*Save it anew"),
    "a PNG that is cut off": (saved(LARGER)[:5000], "cannot be decoded"),
    "a file of 195 megapixels": (png_of(15_000, 13_000), "195000000 pixels.*it may have 10000.*max_image_pixels"),
    "a file above the limit": (png_of(101, 100), "101 x 100, 10100 pixels; it may have 10000.*max_image_pixels"),
    "an image above the limit": (Image.new("RGB", (101, 100)), "10100 pixels; it may have 10000"),
    "an array above the limit": (np.zeros((100, 101, 3), np.uint8), "101 x 100, 10100 pixels"),
    "no file": (Path("nowhere.png"), r"image 1 \('nowhere.png'\) is not there; give a path"),
    "a folder": ("/", "cannot be read as an image"),
    "a name that cannot be": ("a\0b", "cannot be read as an image"),
    "a name of another kind": ("x" * 5000, "cannot be read as an image"),
    "an address": ("https://example.com/cat.png", "is an address, and nothing is downloaded"),
    "text": (b"not an image", "cannot be read as an image"),
    "nothing": (b"", "cannot be read as an image"),
    "a data URL of text": ("data:text/plain,hello", "not in base64"),
    "a data URL that is not base64": ("data:image/png;base64,%%%", "cannot be decoded"),
    "a number": (5, "image 1 is int 5; give a path"),
    "None": (None, "image 1 is NoneType"),
    "a nested list": ([[1, 2], [3, 4]], "image 1 is list"),
    "an array of 0 x 0": (np.zeros((0, 0, 3), np.uint8), "0 x 0, without any pixel"),
    "an image of 0 x 0": (Image.new("RGB", (0, 0)), "0 x 0, without any pixel"),
    "one dimension": (np.zeros(5), r"shape \[5\]"),
    "no channels": (np.zeros((6, 9, 5), np.uint8), r"shape \[6, 9, 5\].*1 to 4 channels"),
    "five dimensions": (np.zeros((1, 1, 6, 9, 3)), "shape"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EndComments\n", "cannot be read as an image"),
    "NaN": (np.full((6, 9), np.nan), "NaN or infinity"),
    "infinity": (torch.full((3, 6, 9), torch.inf), "NaN or infinity"),
    "normalized pixels": (torch.randn(3, 64, 64), "float32 from -.*from 0 to 1, or from 0 to 255"),
    "floats that overshoot": (np.linspace(-0.1, 1, 54).reshape(6, 9), "from -0.1 to 1; .*Clip them"),
    "floats of either range": (np.linspace(0, 1.1, 54).reshape(6, 9), "from 0 to 1.1; .*Clip them"),
    "floats beyond 255": (np.linspace(0, 256, 54).reshape(6, 9), "from 0 to 256"),
    "negative integers": (np.full((6, 9), -1), "int64 from -1 to -1; they must be from 0 to 255"),
    "large integers": (np.full((6, 9), 70_000), "from 70000 to 70000"),
    "Pillow's integers beyond 16 bits": (Image.fromarray(np.full((6, 9), 70_000, np.int32)), "from 0 to 65535"),
    "complex numbers": (np.zeros((6, 9), np.complex64), "dtype complex64"),
    "objects": (np.full((6, 9), None), "dtype object"),
    "texts": (np.full((6, 9), "x"), "dtype"),
}


@pytest.mark.parametrize(("source", "words"), BAD.values(), ids=BAD)
def test_what_is_no_image_is_refused_by_its_name(source: Any, words: str) -> None:
    with pytest.raises(InputError, match=rf"(?s)^image 1.*({words})|^{words}"):
        read(source)


def test_an_image_whose_file_was_closed_is_refused(tmp_path: Path) -> None:
    LARGER.save(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        pass
    with pytest.raises(InputError, match=r"image 1.*cannot be decoded"):
        read(image)


def test_frames_of_a_video_are_decoded_like_images() -> None:
    frames = [GREY, Image.fromarray(GREY), saved(Image.fromarray(GREY)), torch.from_numpy(GREY)]
    expected = np.stack([GREY_AS_RGB] * 4).transpose(0, 3, 1, 2)
    assert np.array_equal(read_video(frames, "video 1", LIMIT), expected)
    for source in (expected, expected.transpose(0, 2, 3, 1), torch.from_numpy(expected), expected / 255):
        assert np.array_equal(read_video(source, "video 1", LIMIT), expected)


@pytest.mark.parametrize(
    ("video", "words"),
    [
        ([], "video 1 has no frames"),
        (np.zeros((0, 6, 9, 3), np.uint8), "video 1 has no frames"),
        ([RGB, 5], "frame 2 of video 1 is int 5"),
        ([RGB, RGB[1:]], "frame 2 of video 1 is 9 x 5, the first is 9 x 6"),
        (np.zeros((6, 9, 3), np.uint8), r"shape \[6, 9, 3\]; frames are \[frames,"),
        (5, "video 1 is int 5; a video is a list of frames"),
    ],
)
def test_what_is_no_video_is_refused_by_its_name(video: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_video(video, "video 1", LIMIT)
