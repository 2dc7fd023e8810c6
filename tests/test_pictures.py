"One opener for everything: whichever way a picture comes, the model sees the same upright RGB pixels"

import base64
import io
import os
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusion_notebooks import core, explore, vqa
from fusion_notebooks.core import Sample, open_image, picture_size, same_picture
from fusion_notebooks.masking import sweeps

SCENE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype='uint8')
TRANSPOSE = {  # EXIF orientation → what a camera did to the upright scene
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def file_of(image, kind='PNG', **kw):
    "The bytes of a picture's file"
    image.save(data := io.BytesIO(), kind, **kw)
    return data.getvalue()


def photograph(orientation, kind='PNG'):
    "The scene as a camera held in one of eight ways stores it"
    image, exif = Image.fromarray(SCENE), Image.Exif()
    if TRANSPOSE[orientation] is not None:
        image = image.transpose(TRANSPOSE[orientation])
    exif[0x0112] = orientation
    return file_of(image, kind, exif=exif)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])
@pytest.mark.parametrize('orientation', TRANSPOSE)
def test_photographs_are_read_upright(orientation, kind, tmp_path):
    data = photograph(orientation, kind)
    path = tmp_path / 'photo'
    path.write_bytes(data)
    for given in (data, path, str(path), io.BytesIO(data), Image.open(path)):
        assert np.array_equal(np.asarray(open_image(given)), SCENE)
        if hasattr(given, 'seek'):
            given.seek(0)
        assert picture_size(given) == (40, 24)
    assert np.array_equal(np.asarray(explore.opened(data, 'photo')), SCENE)


def test_a_rotated_photograph_gives_the_same_answer(tmp_path):
    "Stored sideways, the demo question was answered 9 where the picture says 0"
    from fusion_notebooks.mllm import MLLM

    mllm, image = MLLM.load('glyph-llava'), Image.open('data/example.png').convert('RGB')
    want = mllm.answer(image, 'Which digit is on the purple star?')
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = file_of(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
    got = mllm.answer(sideways, 'Which digit is on the purple star?')
    assert got.text == want.text and got.logp == want.logp
    plain = mllm.answer(file_of(image.transpose(Image.Transpose.ROTATE_90)), 'Which digit is on the purple star?')
    assert plain.logp != want.logp  # the test would see it


def test_a_table_holds_upright_boxes_and_no_decoded_pictures(tmp_path):
    (tmp_path / 'a.png').write_bytes(photograph(6))
    (tmp_path / 'mine.csv').write_text('image,question,answers,box\na.png,what?,x,"[0, 0, 40, 24]"\n')
    (s,) = vqa.load(str(tmp_path / 'mine.csv'), 'all')
    assert s.image == tmp_path / 'a.png' and s.box == (0, 0, 40, 24)
    (tmp_path / 'mine.csv').write_text('image,question,answers,box\na.png,what?,x,"[0, 0, 24, 40]"\n')
    with pytest.raises(ValueError, match='row 0: the box .* does not lie in its picture of 40 × 24'):
        vqa.load(str(tmp_path / 'mine.csv'), 'all')


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV'])
def test_every_mode_has_one_conversion(mode):
    grey = (
        Image.new('RGB', (6, 5), (255, 255, 255))
        .convert('L')
        .convert('RGB')
        .convert(mode if mode not in ('LA', 'PA') else 'RGBA')
    )
    got = np.asarray(open_image(grey.convert(mode)))
    assert got.shape == (5, 6, 3) and (got >= 250).all()


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).round().astype('uint16').reshape(16, 16)
    want = np.arange(256).reshape(16, 16)
    for given in (Image.fromarray(ramp), file_of(Image.fromarray(ramp)), ramp):
        assert np.array_equal(np.asarray(open_image(given))[..., 0], want)


@pytest.mark.parametrize('mode', ['I', 'F'])
def test_values_of_unknown_range_are_refused(mode):
    with pytest.raises(ValueError, match=f'mode {mode}'):
        open_image(Image.new(mode, (8, 8)))


def test_transparency_lies_on_white():
    palette = Image.new('P', (4, 4), 0)
    palette.putpalette([255, 0, 0] * 256)
    for given in (
        Image.new('RGBA', (4, 4), (9, 9, 9, 0)),
        Image.new('LA', (4, 4), (9, 0)),
        file_of(palette, transparency=0),
        file_of(Image.new('RGB', (4, 4), (9, 9, 9)), transparency=(9, 9, 9)),
    ):
        assert open_image(given).getpixel((0, 0)) == (255, 255, 255)


def test_the_first_frame_is_used_and_said():
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
    data = file_of(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match='several frames: the first is used'):
        assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    'given',
    [
        SCENE,
        SCENE.astype('int64'),
        SCENE / 255,
        torch.tensor(SCENE),
        torch.tensor(SCENE).permute(2, 0, 1),
        torch.tensor(SCENE).permute(2, 0, 1).float() / 255,
        (torch.tensor(SCENE).permute(2, 0, 1).double() / 255).requires_grad_(),
        file_of(Image.fromarray(SCENE)),
        memoryview(file_of(Image.fromarray(SCENE))),
        io.BytesIO(file_of(Image.fromarray(SCENE))),
        'data:image/png;base64,' + base64.b64encode(file_of(Image.fromarray(SCENE))).decode(),
    ],
    ids=lambda x: type(x).__name__,
)
def test_ways_to_give_a_picture(given):
    assert np.array_equal(np.asarray(open_image(given)), SCENE)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    Image.fromarray(SCENE).save(tmp_path / 'a.png')
    assert open_image('~/a.png').size == (40, 24)


@pytest.mark.parametrize(
    'given, word',
    [
        (np.zeros((2, 8, 8, 3), 'uint8'), 'shape .* one picture'),
        (np.zeros((8, 8, 5), 'uint8'), 'shape'),
        (np.zeros((0, 8, 3), 'uint8'), 'no pixels'),
        (np.full((8, 8), np.nan), 'from nan to nan'),
        (np.full((8, 8), 300), '300'),
        (np.full((8, 8), -1), '-1'),
        (SCENE.astype(float), 'floats 0 to 1'),
        (torch.randn(3, 8, 8), 'floats 0 to 1'),
        (3, 'int is not a picture'),
        (None, 'NoneType is not a picture'),
        (b'', 'not a picture'),
        ('data:image/png;base64,####', 'base64'),
        ('data:image/png,abc', 'base64'),
        ('x' * 5000, 'not the name of a file'),
        ('a\0b', 'not the name of a file|No picture'),
        ('~nosuchuser/a.png', 'No picture|home'),
        ('https://example.org/a.png', 'allow_download=True'),
    ],
)
def test_what_is_no_picture_is_refused_in_a_sentence(given, word):
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        open_image(given)


@pytest.mark.parametrize('kind', ['ICO', 'DDS', 'TGA', 'PCX'])
def test_formats_that_embed_others_or_have_no_signature_are_not_tried(kind):
    with pytest.raises(ValueError, match='not a picture'):
        open_image(file_of(Image.fromarray(SCENE).resize((32, 32)), kind))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    with pytest.raises(ValueError, match='not a regular file'):
        open_image(tmp_path / 'a.png')


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'GIF', 'TIFF', 'BMP', 'AVIF'])
def test_damaged_files(kind):
    "Cut and flipped anywhere, a file opens or is refused by ValueError"
    whole, rng = file_of(Image.fromarray(SCENE), kind), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole))] if rng.random() < 0.5 else whole)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(0, 256)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                assert open_image(bytes(data)).mode == 'RGB'
            except ValueError:
                refused += 1
    assert refused


def test_same_picture(tmp_path):
    Image.fromarray(SCENE).save(tmp_path / 'a.png')
    assert same_picture(SCENE, Image.fromarray(SCENE)) and same_picture(tmp_path / 'a.png', SCENE)
    assert not same_picture(SCENE, SCENE[::-1])
    other = Sample(SCENE[::-1].copy(), 'q')
    assert sweeps._donor([Sample(SCENE, 'q'), Sample(SCENE.copy(), 'q'), other], 0) is other


@pytest.fixture
def server():
    class Reply(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Type', 'text/html' if self.path == '/page' else 'image/png')
            self.end_headers()
            self.wfile.write(file_of(Image.fromarray(SCENE)))

        def log_message(self, *_):
            pass

    server = HTTPServer(('127.0.0.1', 0), Reply)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def test_web_addresses_only_where_asked(server, monkeypatch):
    assert np.array_equal(np.asarray(open_image(f'{server}/a.png', allow_download=True)), SCENE)
    with pytest.raises(ValueError, match='allow_download'):
        open_image(f'{server}/a.png')
    with pytest.raises(ValueError, match='text/html, not a picture'):
        open_image(f'{server}/page', allow_download=True)
    monkeypatch.setattr(core.images, 'MAX_BYTES', 100)
    with pytest.raises(ValueError, match='more than the 100 bytes'):
        open_image(f'{server}/a.png', allow_download=True)
    with pytest.raises(ValueError, match='could not be fetched'):
        open_image('http://127.0.0.1:9/a.png', allow_download=True)


SUITS = dict(
    PNG=('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16'), JPEG=('L', 'RGB', 'CMYK'), TIFF=('1', 'L', 'RGB', 'RGBA', 'CMYK')
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(SUITS)),
    pick=st.integers(0, 6),
    orientation=st.sampled_from(sorted(TRANSPOSE)),
    size=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    way=st.sampled_from(['bytes', 'stream', 'uri', 'opened']),
)
def test_any_mode_orientation_size_and_way(kind, pick, orientation, size, way):
    "Upright, of its own size, and the same pixels whichever way it comes"
    mode = SUITS[kind][pick % len(SUITS[kind])]
    grey = np.random.default_rng(pick).integers(0, 2, size[::-1], dtype='uint8') * 255
    upright = Image.fromarray(grey)
    stored = upright if TRANSPOSE[orientation] is None else upright.transpose(TRANSPOSE[orientation])
    if mode == 'I;16':
        stored = Image.fromarray(np.asarray(stored).astype('uint16') * 257)
    elif mode != 'L':
        stored = (stored.convert('RGBA') if mode in ('LA', 'RGBA') else stored.convert('RGB')).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(stored, kind, exif=exif, **(dict(quality=100) if kind == 'JPEG' else {}))
    uri = f'data:image/{kind.lower()};base64,' + base64.b64encode(data).decode()
    given_as = dict(bytes=data, stream=io.BytesIO(data), uri=uri, opened=Image.open(io.BytesIO(data)))[way]
    got = open_image(given_as)
    assert got.mode == 'RGB' and got.size == size == picture_size(data)
    assert np.abs(np.asarray(got).astype(int)[..., 0] - grey).max() <= (60 if kind == 'JPEG' else 0)
