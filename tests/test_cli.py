"The command line: bad input is one sentence and exit code 2"

import json, os, re, shlex, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from fusion_notebooks import demo
from fusion_notebooks.cli import main
from test_study import ini, model_folder, one_thread


@pytest.fixture
def fails(capsys):
    def fails(*argv, code=2):
        capsys.readouterr()  # what the test itself printed, such as a progress bar of save_pretrained
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
        (['ask', 'glyph-lava', str(picture), 'What?'], "No model 'glyph-lava'.*Demo models: .*glyph-llava"),
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


@pytest.mark.parametrize('refine', ['crop', 'mask', 'crop-focus', 'crop-signed', 'mask-late'])
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

    monkeypatch.setattr(cli.studies, '_card', full)
    report = study.Report([('m', 'masking')], {})
    assert (
        cli.studies._drawn(report, study.read_settings(ini)) == 1
        and 'fusion card of' in (err := capsys.readouterr().err)
        and 'No space left on device' in err
    )
    assert cli.studies._drawn(study.Report([('m', 'masking')], {}), study.read_settings(ini), cards=False) == 0


def test_a_card_is_drawn_where_something_is_new(ini, monkeypatch):
    from fusion_notebooks import cli, study

    s, drawn = study.read_settings(ini), []
    monkeypatch.setattr(cli.studies, '_card', lambda model, s: drawn.append(model))
    name, done = study.find_model(s.models[0], s)[1], [('m', 'masking')]
    cli.studies._drawn(study.Report(done, {}), s)  # there is none yet
    assert drawn == list(s.models)
    (s.figures / name).mkdir(parents=True)
    (s.figures / name / 'card.html').touch()
    cli.studies._drawn(study.Report(done, {}), s)
    assert drawn == list(s.models)
    cli.studies._drawn(study.Report(done, {}, fresh={name}), s)
    assert drawn == 2 * list(s.models)


# arguments

WHOLE, COUNT, WORKERS = (
    f'no whole number from {low} to {high}' for low, high in ((0, 999999999999), (1, 10**6), (1, 1024))
)
NUMBERS = {
    **{(command, '--limit'): COUNT for command in ('study', 'status', 'figures', 'verify', 'compact')},
    ('study', '--workers'): WORKERS,
    ('verify', '--share'): 'no number above 0 and at most 1',
    ('verify', '--seed'): WHOLE,
    ('verify', '--tolerance'): 'no finite number from 0 up, of at most 12 digits before the point',
    ('demo eval', '--n'): COUNT,
    ('demo eval', '--seed'): WHOLE,
}


@pytest.fixture
def refused(capsys):
    "What is said, in one line, of arguments that cannot be understood"

    def refused(*argv):
        with pytest.raises(SystemExit) as e:
            main(argv)
        out, err = capsys.readouterr()
        assert e.value.code == 2 and not out
        assert err.startswith('fusion: ') and err.count('\n') == 1 and err.endswith('.\n') and 'usage: fusion' in err
        return err

    return refused


def test_every_numeric_option_is_listed():
    from typing import get_type_hints
    from fusion_notebooks import cli

    functions = dict(zip(('demo eval', 'demo train'), (cli.demo_eval, cli.demo_train)))
    functions |= {
        name: getattr(cli, name) for name in ('study', 'status', 'figures', 'verify', 'compact', 'ask', 'doctor')
    }
    found = {
        (command, f'--{name}')
        for command, f in functions.items()
        for name, kind in get_type_hints(f).items()
        if name != 'return' and {'int', 'float'} & set(re.findall(r'\w+', getattr(kind, '__name__', '') or str(kind)))
    }
    assert found == {*NUMBERS}


@pytest.mark.parametrize('text', ['²', 'nan', 'inf', '-1', '1' * 30, '', ' ', '1_0', '0x1', '1e999', '٣'])
@pytest.mark.parametrize('command, flag', NUMBERS)
def test_numbers_have_bounds(command, flag, text, refused):
    for value in ([flag, text], [f'{flag}={text}']):
        said = refused(*command.split(), *value)
        assert f"'{flag}'" in said and NUMBERS[command, flag] in said


@pytest.mark.parametrize(
    'argv, said',
    [
        (['study', '--workers', '0'], WORKERS),
        (['study', '--workers', '1025'], WORKERS),
        (['study', '--limit', '1000001'], COUNT),
        (['study', '--limit', '2.5'], COUNT),
        (['verify', '--share', '0'], 'no number above 0'),
        (['verify', '--share', '1.01'], 'no number above 0 and at most 1'),
        (['study', '--limit'], "'--limit' requires an argument"),
        (['study', '--models'], "'--models': at least one value must follow"),
        (['study', '--models', '--quick'], "'--models': at least one value must follow"),
        (['study', '--model', 'x'], 'No such option: --model (Possible options: --help, --models)'),
        (['ask', 'm', 'i', 'q', '--refine', 'dream'], "'dream' is not one of mask, mask-calibrated,"),
        (['ask', 'm', 'i', 'q', '--refine', 'crop-oracle'], "'crop-oracle' is not one of"),
        (['ask', 'm'], "Missing argument 'IMAGE'; usage: fusion ask [OPTIONS] MODEL IMAGE QUESTION."),
        (['studdy'], "Did you mean 'study'"),
        ([], 'Missing command'),
    ],
)
def test_what_is_wrong_with_arguments_is_one_sentence(argv, said, refused):
    assert said in refused(*argv)


@pytest.fixture
def called(monkeypatch):
    "How `study.choose` and `study.verify` were called by the command"
    from fusion_notebooks import study

    seen = {}
    table = pd.DataFrame(dict(rows=[1], same=[True], difference=[0.0]))
    monkeypatch.setattr(study, 'choose', lambda *a: seen.update(choose=a))
    monkeypatch.setattr(study, 'verify', lambda s, *a: seen.update(verify=a) or table)
    return seen


def test_numbers_and_lists_arrive(called):
    assert main(['verify']) == 0
    assert called == dict(choose=('settings.ini', False, None, None, None, None), verify=(0.01, None))
    argv = (
        'verify --models a b --quick --analyses=c --models d --limit 3 --share .5 --seed 0 --settings f --tolerance 0'
    )
    assert main(argv.split()) == 0
    assert called == dict(choose=('f', True, ['a', 'b', 'd'], None, ['c'], 3), verify=(0.5, 0))


def test_interrupted(monkeypatch, capsys):
    from fusion_notebooks import study

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, 'choose', stop)
    assert main(['status']) == 130
    err = capsys.readouterr().err
    assert err == 'fusion: interrupted; what was finished is kept, and the same command goes on from there\n'


def test_only_what_can_be_mended_becomes_a_sentence(monkeypatch, fails):
    "A ValueError that is no sentence is somebody's bug, and shows where it came from"
    from fusion_notebooks import study
    from fusion_notebooks.core.errors import BadInput, NotSupported

    for error in (
        BadInput('Give\nanother.'),
        NotSupported('No hooks here.'),
        OSError('No space left.'),
        ValueError('No.'),
    ):

        def refuse(*_):
            raise error

        monkeypatch.setattr(study, 'choose', refuse)
        assert fails('status') == f'fusion: {" ".join(str(error).split())}\n'
    error = ValueError('operands could not be broadcast')
    with pytest.raises(ValueError, match='operands'):
        main(['status'])


@pytest.mark.parametrize(
    'command', ['study', 'status', 'figures', 'verify', 'compact', 'ask', 'doctor', 'demo train', 'demo eval']
)
def test_help_ends_with_an_example_that_is_understood(command, capsys, monkeypatch):
    from typer.main import get_command
    from fusion_notebooks import cli

    for flag in ('-h', '--help'):
        with pytest.raises(SystemExit) as e:
            main([*command.split(), flag])
        out = capsys.readouterr().out
        assert not e.value.code and f'Example: fusion {command}' in out
    argv = shlex.split(' '.join(out.split('Example: fusion ')[1].split()))
    context = get_command(cli.app).make_context('fusion', argv[:])
    for name in command.split():
        sub = context.command.commands[name]
        argv = argv[1:]
        context = sub.make_context(name, argv[:], parent=context)


def test_help_of_training_names_every_model(capsys):
    with pytest.raises(SystemExit):
        main(['demo', 'train', '--help'])
    out = capsys.readouterr().out
    assert all(name in out for name in demo.MODELS) and 'easy-VQA' in out and 'glyph world' in out


def test_a_demo_model_that_did_not_come_along(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('fusion_notebooks.study.samples.demo_folders', dict)
    monkeypatch.setattr('fusion_notebooks.core.resources.demo_folders', dict)
    assert main(['doctor', 'glyph-qwen2vl']) == 2
    said = "No model 'glyph-qwen2vl': that demo model did not come along: `fusion demo get glyph-qwen2vl SOURCE` fetches it"
    assert said in capsys.readouterr().err


def test_help_is_in_groups(capsys):
    with pytest.raises(SystemExit) as e:
        main(['--help'])
    out = capsys.readouterr().out
    assert not e.value.code and all(f'─ {group} ─' in out for group in ('Studies', 'One model', 'Demo models'))


def test_version(capsys):
    import fusion_notebooks

    with pytest.raises(SystemExit) as e:
        main(['--version'])
    assert not e.value.code and capsys.readouterr().out == f'fusion {fusion_notebooks.__version__}\n'


@pytest.mark.parametrize(
    'typed, offered',
    [('st', {'study', 'status'}), ('ask glyph-ll', {'glyph-llava'}), ('study --models glyph-n', {'glyph-next'})],
)
def test_a_shell_completes(typed, offered):
    code = 'import sys; from fusion_notebooks.cli import main; sys.exit(main())'
    asks = dict(_FUSION_COMPLETE='complete_bash', COMP_WORDS=f'fusion {typed}', COMP_CWORD=str(len(typed.split())))
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | asks)
    assert run.returncode == 0 and set(run.stdout.split()) == offered, run.stderr
