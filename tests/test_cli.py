"The command line: bad input is one sentence and exit code 2"

import json, os, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from fusion_notebooks.cli import main
from test_study import ini, model_folder, one_thread


@pytest.fixture
def fails(capsys):
    def fails(*argv, code=2):
        assert main([str(a) for a in argv]) == code
        out, err = capsys.readouterr()
        assert (
            err.startswith('fusion: ')
            and err.count('\n') == 1
            and err.rstrip().endswith(('.', ':'))
            and 'Traceback' not in err
            and len(err) < 400
        )
        return err

    return fails


def gigapixel(path):
    "A PNG that says it has 50,000 × 40,000 pixels"
    import struct, zlib

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', 50_000, 40_000, 8, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(bytes(100)))
        + chunk(b'IEND', b'')
    )


def truncated(path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype='uint8'))
    noise.save(path)
    path.write_bytes(path.read_bytes()[:5000])


PICTURES = dict(
    missing=lambda p: None,
    folder=lambda p: p.mkdir(),
    empty=lambda p: p.write_bytes(b''),
    text=lambda p: p.write_text('not a picture'),
    truncated=truncated,
    gigapixel=gigapixel,
    tiny=lambda p: Image.new('RGB', (1, 1)).save(p),
    floats=lambda p: Image.new('F', (50, 50)).save(p, format='TIFF'),
    icon=lambda p: Image.new('RGB', (50, 50)).save(p, format='ICO'),
)


@pytest.mark.parametrize('kind', PICTURES)
def test_bad_pictures(kind, tmp_path, model_folder, fails):
    path = tmp_path / 'picture.png'
    PICTURES[kind](path)
    assert 'picture.png' in fails('ask', model_folder, path, 'What color is the circle?')


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype='uint8')).save(
        tmp_path / 'picture.png'
    )
    return tmp_path / 'picture.png'


def test_typos_cost_no_import(picture):
    "Names that can be no model and pictures that are not there are refused before torch is loaded"
    for argv, word in (
        (['ask', 'glyph-lava', str(picture), 'What?'], "No model 'glyph-lava'.*Demo models: glyph-llava"),
        (['ask', 'glyph-llava', 'none.png', 'What?'], 'No picture at none.png'),
        (['doctor', 'glyph-lava'], 'No model'),
        (['demo', 'eval', 'glyph-lava'], 'No model'),
    ):
        code = (
            f"import sys; from fusion_notebooks.cli import main; sys.exit(main({argv}) + 10*('torch' in sys.modules))"
        )
        run = subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | dict(HF_HUB_OFFLINE='1')
        )
        assert run.returncode == 2 and re.search(word, run.stderr) and run.stderr.count('\n') == 1, run.stderr


def test_empty_question(picture, model_folder, fails):
    assert 'question is empty' in fails('ask', model_folder, picture, ' ')


def test_bad_models(picture, model_folder, tmp_path, fails):
    q = 'What color is the circle?'
    assert 'nosuch' in fails('ask', tmp_path / 'nosuch', picture, q)
    (tmp_path / 'empty').mkdir()
    assert 'empty' in fails('ask', tmp_path / 'empty', picture, q)
    shutil.copytree(model_folder, tmp_path / 'pickled', ignore=shutil.ignore_patterns('*.safetensors'))
    (tmp_path / 'pickled/pytorch_model.bin').write_bytes(b'')
    assert 'safetensors' in fails('ask', tmp_path / 'pickled', picture, q)


def test_a_model_without_image_tower(picture, tmp_path, fails):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / 'text')
    assert 'image tower' in fails('ask', tmp_path / 'text', picture, 'What color is the circle?')


def test_bad_settings(ini, fails):
    text = ini.read_text()
    ini.write_text(text.replace('attention', 'atention'))
    assert "unknown analyses 'atention'" in fails('study', '--settings', ini)
    ini.write_text(text.replace('calibration', 'calibrate'))
    assert "unknown key 'calibrate'" in fails('study', '--quick', '--settings', ini)
    assert 'No settings at' in fails('study', '--settings', ini.parent / 'none.ini')
    ini.write_text(text)
    assert "No analysis 'x'" in fails('study', '--settings', ini, '--analyses', 'x')


@pytest.mark.parametrize(
    'argv', [[], ['nothing'], ['ask', 'm'], ['demo', 'bake'], ['ask', 'm', 'i', 'q', '--refine', 'dream']]
)
def test_misused(argv, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2 and 'usage' in capsys.readouterr().err


@pytest.mark.parametrize('refine', ['crop', 'mask'])
def test_ask(picture, model_folder, tmp_path, capsys, monkeypatch, refine):
    monkeypatch.chdir(tmp_path)
    assert main(['ask', str(model_folder), str(picture), 'Which digit is on the red circle?', '--refine', refine]) == 0
    out = capsys.readouterr().out
    assert out.count('p = ') == 2 and out.splitlines()[0].startswith('before')
    figure = Path(out.splitlines()[-1].split()[-1])
    assert (
        figure.suffix == '.png'
        and Image.open(figure).width > 300
        and json.loads(Image.open(figure).info['Description'])['model'] == 'tiny'
    )


def test_demo_eval(model_folder, capsys):
    assert main(['demo', 'eval', str(model_folder), '--n', '2', '--json']) == 0
    got = json.loads(capsys.readouterr().out)
    assert set(got) == {'fine', 'colour', 'shape', 'relation'} and all(
        set(v) == {'n', 'one_pass', 'oracle', 'blind'} and v['n'] == 2 for v in got.values()
    )


def test_a_card_that_cannot_be_written_is_said(ini, capsys, monkeypatch):
    from fusion_notebooks import cli, study

    def full(*_):
        raise OSError('No space left on device')

    monkeypatch.setattr(cli, '_card', full)
    report = study.Report([('m', 'masking')], {})
    assert (
        cli._drawn(report, study.read_settings(ini)) == 1
        and 'fusion card of' in (err := capsys.readouterr().err)
        and 'No space left on device' in err
    )
    assert cli._drawn(study.Report([('m', 'masking')], {}), study.read_settings(ini), cards=False) == 0


def test_a_card_is_drawn_where_something_is_new(ini, monkeypatch):
    from fusion_notebooks import cli, study

    s, drawn = study.read_settings(ini), []
    monkeypatch.setattr(cli, '_card', lambda model, s: drawn.append(model))
    name, done = study.find_model(s.models[0], s)[1], [('m', 'masking')]
    cli._drawn(study.Report(done, {}), s)  # there is none yet
    assert drawn == list(s.models)
    (s.figures / name).mkdir(parents=True)
    (s.figures / name / 'card.html').touch()
    cli._drawn(study.Report(done, {}), s)
    assert drawn == list(s.models)
    cli._drawn(study.Report(done, {}, fresh={name}), s)
    assert drawn == 2 * list(s.models)
