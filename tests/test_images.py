# SPDX-License-Identifier: Apache-2.0
"""Every image mode becomes the RGB it should, and every bad file is refused by name."""

import gc
import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from vlm2vec_jax import images as images_module
from vlm2vec_jax.errors import UserError
from vlm2vec_jax.images import ImageError, image_size, load_image
from vlm2vec_jax.inputs import MultimodalInput

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (7, 11, 3), dtype=np.uint8)


def noise(mode: str) -> Image.Image:
    """An 11 x 7 image of a mode with every channel varied."""
    if mode in ("RGB", "YCbCr", "LAB", "HSV"):
        return Image.fromarray(NOISE) if mode == "RGB" else Image.frombytes(mode, (11, 7), NOISE)
    channels = {"L": 1, "LA": 2, "La": 2, "RGBA": 4, "RGBa": 4, "RGBX": 4, "CMYK": 4}
    if mode in channels:
        data = RNG.integers(0, 256, (7, 11, channels[mode]), dtype=np.uint8)
        return Image.frombytes(mode, (11, 7), data.tobytes())
    if mode == "1":
        return Image.fromarray(NOISE[..., 0] > 128)
    if mode in ("P", "PA"):
        return Image.fromarray(NOISE).quantize(16).convert(mode)
    raise AssertionError(mode)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"],
)
def test_modes_convert_as_pillow_does(mode):
    image = noise(mode)
    before = image.tobytes()
    result = load_image(image)
    np.testing.assert_array_equal(pixels(result), np.asarray(image.convert("RGB")))
    assert (image.mode, image.tobytes()) == (mode, before)
    assert image_size(image) == result.size == (11, 7)


def test_alpha_is_dropped_and_not_composited():
    rgba = np.dstack([NOISE, np.zeros((7, 11), np.uint8)])
    np.testing.assert_array_equal(pixels(load_image(Image.fromarray(rgba))), NOISE)
    la = np.dstack([NOISE[..., 0], np.zeros((7, 11), np.uint8)])
    np.testing.assert_array_equal(pixels(load_image(Image.fromarray(la)))[..., 1], NOISE[..., 0])


def test_premultiplied_grey_which_pillow_cannot_convert_works():
    image = noise("La")
    expected = np.asarray(image.convert("LA").convert("RGB"))
    np.testing.assert_array_equal(pixels(load_image(image)), expected)


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 16))])
def test_palette_transparency_changes_nothing_and_warns_of_nothing(tmp_path, transparency):
    image = noise("P")
    image.save(tmp_path / "p.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_file = load_image(tmp_path / "p.png")
        opened = Image.open(tmp_path / "p.png")
        from_memory = load_image(opened)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(pixels(from_file), expected)
    np.testing.assert_array_equal(pixels(from_memory), expected)
    assert "transparency" in opened.info


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_keep_the_high_byte(tmp_path, mode):
    values = RNG.integers(0, 65536, (5, 6), dtype=np.uint16)
    dtype = "<u2" if mode == "I;16" else ">u2"
    image = Image.frombytes(mode, (6, 5), values.astype(dtype).tobytes())
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    np.testing.assert_array_equal(pixels(load_image(image)), expected)
    image.save(tmp_path / "deep.png")
    np.testing.assert_array_equal(pixels(load_image(tmp_path / "deep.png")), expected)


def test_sixteen_bit_copy_of_eight_bits_is_the_eight_bit_image():
    deep = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    shallow = Image.fromarray(NOISE[..., 0])
    np.testing.assert_array_equal(pixels(load_image(deep)), pixels(load_image(shallow)))


def test_integers_are_eight_bit_if_all_fit_and_else_sixteen():
    small = np.array([[0, 17, 255]], np.int32)
    large = np.array([[0, 256, 65535]], np.int32)
    assert pixels(load_image(Image.fromarray(small)))[0, :, 0].tolist() == [0, 17, 255]
    assert pixels(load_image(Image.fromarray(large)))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_integers_beyond_sixteen_bits_are_refused(values):
    with pytest.raises(ImageError, match="no 8-bit meaning"):
        load_image(Image.fromarray(np.array([values], np.int32)))


def test_floats_of_an_eight_bit_range_convert_as_pillow_does():
    image = Image.fromarray(np.array([[0.0, 0.6, 254.9, 255.0]], np.float32))
    np.testing.assert_array_equal(pixels(load_image(image)), np.asarray(image.convert("RGB")))
    assert not pixels(load_image(Image.fromarray(np.zeros((1, 2), np.float32)))).any()


@pytest.mark.parametrize("values", [[0, 0.5], [0, 1], [-1, 9], [0, 256], [np.nan, 9], [0, np.inf]])
def test_other_floats_are_refused(values):
    with pytest.raises(ImageError, match="floating-point"):
        load_image(Image.fromarray(np.array([values], np.float32)))


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "webp"])
def test_exif_orientation_is_ignored_unless_asked_for(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind}"
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(NOISE).save(path, exif=exif, **options)
    for source in (path, Image.open(path)):
        np.testing.assert_array_equal(pixels(load_image(source)), NOISE)
        assert image_size(source) == (11, 7)
        assert image_size(source, exif="apply") == ((7, 11) if orientation > 4 else (11, 7))
        turned = load_image(source, exif="apply")
        np.testing.assert_array_equal(pixels(turned), UPRIGHT[orientation](NOISE))
        assert turned.size == image_size(source, exif="apply")


def test_a_tiff_is_turned_by_pillow_once_and_never_twice(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(tmp_path / "turned.tif", exif=exif)
    for mode in ("ignore", "apply"):
        assert image_size(tmp_path / "turned.tif", exif=mode) == (7, 11)
        result = pixels(load_image(tmp_path / "turned.tif", exif=mode))
        np.testing.assert_array_equal(result, np.rot90(NOISE, -1))


def test_broken_metadata_does_not_refuse_a_picture(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "x.png", exif=b"Exif\0\0this is no TIFF header")
    assert image_size(tmp_path / "x.png", exif="apply") == (11, 7)
    np.testing.assert_array_equal(pixels(load_image(tmp_path / "x.png", exif="apply")), NOISE)


def test_unknown_exif_mode():
    for function in (load_image, image_size):
        with pytest.raises(UserError, match="exif must be one of ignore, apply"):
            function(Image.fromarray(NOISE), exif="maybe")


def test_missing_file_directory_empty_file_and_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is not a picture\n" * 20)
    os.mkfifo(tmp_path / "pipe.png")
    for name, said in (
        ("absent.png", "no such image file"),
        (".", "is a directory"),
        ("empty.png", "empty"),
        ("text.png", "not an image"),
        ("pipe.png", "not a regular file"),
        ("nul\0.png", "cannot be opened"),
        ("x" * 300, "cannot be opened"),
    ):
        for function in (load_image, image_size):
            path = str(tmp_path / name)
            with pytest.raises(ImageError, match=said) as caught:
                function(path)
            assert path in str(caught.value) or repr(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "gif", "webp", "tif", "ppm"])
def test_a_truncated_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / f"cut.{kind}"
    Image.fromarray(RNG.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(ImageError, match=r"cut\."):
        load_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_never_raise_anything_else(tmp_path):
    for kind in ("png", "jpg", "gif", "webp", "tif", "bmp"):
        buffer = io.BytesIO()
        Image.fromarray(NOISE).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind))
        good = np.frombuffer(buffer.getvalue(), np.uint8)
        for trial in range(25):
            bad = good.copy()
            places = np.random.default_rng(trial).integers(4, len(bad), 6)
            bad[places] = np.random.default_rng(trial + 99).integers(0, 256, 6)
            path = tmp_path / f"{trial}.{kind}"
            path.write_bytes(bad.tobytes())
            for exif in ("ignore", "apply"):
                try:
                    assert load_image(path, exif=exif).size == image_size(path, exif=exif)
                except ImageError as error:
                    assert str(path) in str(error)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch, pillow_limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    for function in (load_image, image_size):
        with pytest.raises(ImageError, match=r"bomb\.png.*refused.*pixels"):
            function(tmp_path / "bomb.png")


def test_pillow_s_bomb_warning_as_an_error_is_ours_too(tmp_path):
    (tmp_path / "large.png").write_bytes(png_header(10_000, 10_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"large\.png.*refused"):
            image_size(tmp_path / "large.png")


def test_an_image_in_memory_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(images_module, "MAX_PIXELS", 76)
    with pytest.raises(ImageError, match="RGB image of 11 x 7 in memory.*limit of 76"):
        load_image(Image.fromarray(NOISE))


def test_an_empty_image_is_refused():
    with pytest.raises(ImageError, match="0 x 3 pixels is empty"):
        load_image(Image.new("RGB", (0, 3)))


def test_a_format_that_runs_another_program_is_refused(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "x.eps")
    with pytest.raises(ImageError, match="vector format"):
        load_image(tmp_path / "x.eps")


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (9, 5), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert pixels(load_image(tmp_path / f"a.{kind}"))[2, 3].tolist() == [255, 0, 0]


def test_no_file_stays_open_and_threads_agree(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(NOISE).save(path)
    (tmp_path / "bad.png").write_bytes(path.read_bytes()[:60])

    def work(_):
        with pytest.raises(ImageError):
            load_image(tmp_path / "bad.png")
        return image_size(path), pixels(load_image(str(path)))

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, range(64)))
        gc.collect()
    for size, result in results:
        assert size == (11, 7)
        np.testing.assert_array_equal(result, NOISE)
    if os.path.isdir("/proc/self/fd"):
        links = [os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
        opened = [os.readlink(link) for link in links if os.path.lexists(link)]
        assert not [name for name in opened if str(tmp_path) in name]


def test_a_size_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (7, 5)).save(path)
    assert image_size(path) == (7, 5)
    with monkeypatch.context() as patch:
        patch.setattr(images_module, "_open", None)
        assert image_size(path) == image_size(str(path)) == (7, 5)
    Image.new("RGB", (9, 50)).save(path)
    assert image_size(path) == (9, 50)
    path.unlink()
    with pytest.raises(ImageError, match="no such image file"):
        image_size(path)


def test_an_image_of_several_inputs_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    real = images_module._open

    def counted(path, name):
        decoded.append(os.path.basename(path))
        return real(path, name)

    monkeypatch.setattr(images_module, "_open", counted)
    for name in ("a", "b"):
        Image.new("RGB", (40, 30), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    inputs = [MultimodalInput(f"<|image_1|> {n}", (tmp_path / "a.png",)) for n in range(3)]
    inputs.append(MultimodalInput("<|image_1|>", (str(tmp_path / "b.png"),)))
    inputs.append(MultimodalInput("no image"))
    shared = images_module.share_images(inputs)
    found = [load_image(image) for item in shared for image in item.images]
    assert sorted(decoded) == ["a.png", "b.png"]
    assert [f.getpixel((3, 3)) for f in found] == [(255, 0, 0)] * 3 + [(0, 0, 255)]
    assert [i.text for i in shared] == [i.text for i in inputs]
    assert images_module.SharedImage._held == 0
    monkeypatch.setattr(images_module, "SHARED_BYTES", 100)  # no room: decoded again
    for item in images_module.share_images(inputs):
        for image in item.images:
            load_image(image)
    assert decoded.count("a.png") == 4
    missing = [MultimodalInput("<|image_1|>", (tmp_path / "no.png",))] * 2
    for item in images_module.share_images(missing):
        with pytest.raises(UserError, match=r"no\.png: no such image"):
            load_image(item.images[0])
        with pytest.raises(UserError, match=r"no\.png: no such image"):
            image_size(item.images[0])


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_alpha_is_composited_on_white_where_asked(mode):
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    white = np.asarray(load_image(image, transparency="white"))
    assert (white[0, 0] == 255).all() and (white[0, 1] == 0).all()
    assert not (np.asarray(load_image(image))[0, 0] == 255).all()


def test_a_transparent_colour_is_composited_also_after_a_resize():
    for image in (Image.new("RGB", (4, 2), (9, 9, 9)), Image.new("P", (4, 2), 0)):
        image.info["transparency"] = 0 if image.mode == "P" else (9, 9, 9)
        done = load_image(image, transparency="white", square=8)
        assert done.size == (8, 8) and (np.asarray(done) == 255).all()
        assert (np.asarray(load_image(image, square=8)) < 10).all()
    # Modes whose name has an A without meaning alpha stay as they were.
    lab = Image.new("LAB", (2, 2), (50, 128, 128))
    assert load_image(lab, transparency="white").tobytes() == load_image(lab).tobytes()
