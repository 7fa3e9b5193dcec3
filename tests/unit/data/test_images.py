"""Images of every kind become square RGB, upright, and none takes more memory than it may."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigurationError
from data.config import DataConfig
from data.images import decode
from data.skip import Skip
from tests.unit.data.shards.test_source import write_tar
from tests.unit.data.test_broken_records import stream


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["grayscale", "alpha", "palette", "CMYK", "16 bit", "WebP"])
def test_images_of_every_kind_become_rgb(kind):
    gray = np.full((6, 9), 128, np.uint8)
    made = {
        "grayscale": encoded(Image.fromarray(gray)),
        "alpha": encoded(Image.new("RGBA", (9, 6), (0, 0, 0, 127))),  # half-transparent black over white
        "palette": encoded(Image.new("RGB", (9, 6), (128, 128, 128)).quantize(4)),
        "CMYK": encoded(Image.new("CMYK", (9, 6), (0, 0, 0, 127)), "JPEG"),
        "16 bit": encoded(Image.fromarray(np.full((6, 9), 128 * 257, np.uint16))),
        "WebP": encoded(Image.new("RGB", (9, 6), (128, 128, 128)), "WEBP"),
    }[kind]
    pixels = decode(made, 14)
    assert pixels.shape == (14, 14, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - 128).max() <= 2


def upright() -> Image.Image:
    """An image whose corners are black, red, green and blue."""
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:12, 20:, 0] = pixels[12:, :20, 1] = pixels[12:, 20:, 2] = 255
    return Image.fromarray(pixels)


# How a camera that was held another way stores the image, by the number that it writes to state so.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_photographs_are_turned_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored, content = upright().transpose(STORED[orientation]), io.BytesIO()
    stored.save(content, kind, exif=exif, **({} if kind == "PNG" else {"quality": 100}))
    expected = decode(encoded(upright()), 28)
    assert np.abs(decode(content.getvalue(), 28).astype(int) - expected)[[2, 2, -3, -3], [2, -3, 2, -3]].max() < 40
    as_stored = decode(content.getvalue(), 28, exif_orientation=False).astype(int)
    assert np.abs(as_stored - decode(encoded(stored), 28))[[2, 2, -3, -3], [2, -3, 2, -3]].max() < 40


def test_the_orientation_may_are_in_xmp():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    turned, content = upright().transpose(STORED[3]), io.BytesIO()
    turned.save(content, "WEBP", xmp=xmp, lossless=True)
    assert np.array_equal(decode(content.getvalue(), 28), decode(encoded(upright()), 28))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_tag_turns_nothing_and_spoils_nothing():
    expected = decode(encoded(upright()), 28)
    for exif in (b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"):
        content = io.BytesIO()
        upright().save(content, "PNG", exif=exif)
        assert np.array_equal(decode(content.getvalue(), 28), expected)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels; there are none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "size", [(8001, 8000), (13_370, 13_390), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (64_000_001, 1)]
)
def test_an_image_of_too_many_pixels_is_not_decoded(size):
    with pytest.raises(Skip) as found:
        decode(bomb(*size), 28)
    assert (found.value.cause, found.value.defect) == ("oversized image", True)
    assert found.value.detail == f"it has {size[0]} x {size[1]} pixels"


def test_the_bound_is_a_setting(tmp_path, tokenizer):
    assert decode(encoded(Image.new("L", (1000, 1000))), 28, max_megapixels=1.0).shape == (28, 28, 3)
    with pytest.raises(Skip, match="oversized image: it has 1001 x 1000 pixels"):
        decode(encoded(Image.new("L", (1001, 1000))), 28, max_megapixels=1.0)
    members = {"a.png": bomb(20_000, 20_000), "a.json": b'{"captions": {"en": "a dog"}}'}
    write_tar(tmp_path / "webli" / "train-00000.tar", members)
    (component,) = (opened := stream(tmp_path, tokenizer)).components
    assert component.example(0, np.random.default_rng(0)) is None
    assert opened.ledger.drain() == {"webli/oversized image": 1}
    for value in (0.0, -1.0, float("nan"), float("inf")):
        data = DataConfig("", "", global_batch_size=1, num_streams=1, encoder_length=9, decoder_length=9)
        data.max_megapixels = value
        with pytest.raises(ConfigurationError, match=r"data\.max_megapixels="):
            data.check()


def test_a_jpeg_is_decoded_at_a_part_of_its_size_with_the_option_alone():
    """A gradient: the mean of a block of pixels is what both give, so that only the size decoded differs."""
    ramp = np.add.outer(np.arange(256), np.zeros(320)).astype(np.uint8)
    photograph = encoded(Image.fromarray(np.dstack([ramp, ramp[::-1], np.full_like(ramp, 128)])), "JPEG")
    decoded = []
    whole = Image.Image.resize

    def watched(image, *args, **kwargs):
        decoded.append(image.size)
        return whole(image, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", watched)
        exact, scaled, at_half = decode(photograph, 60), decode(photograph, 60, scaled=True), decode(photograph, 100)
        decode(photograph, 100, scaled=True)
    assert decoded == [(320, 256), (80, 64), (320, 256), (160, 128)]
    assert np.abs(exact.astype(int) - scaled)[1:-1, 1:-1].max() <= 3 and at_half.shape == (100, 100, 3)
    for image in (encoded(Image.fromarray(ramp)), encoded(Image.new("RGB", (100, 100)), "JPEG")):  # nothing to scale
        assert np.array_equal(decode(image, 60), decode(image, 60, scaled=True))


@pytest.mark.parametrize(("kind", "options"), [("WEBP", {"lossless": True}), ("PNG", {})])
def test_an_animated_image_gives_its_first_frame(kind, options):
    frames, content = [upright(), upright().transpose(STORED[3]), Image.new("RGB", (40, 24), "red")], io.BytesIO()
    frames[0].save(content, kind, save_all=True, append_images=frames[1:], duration=100, **options)
    with Image.open(io.BytesIO(content.getvalue())) as opened:
        assert opened.n_frames == 3
    assert np.array_equal(decode(content.getvalue(), 28), decode(encoded(upright()), 28))
