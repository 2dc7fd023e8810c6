"A model is loaded complete, from safetensors of its own folder, or refused in a sentence that names what is missing"

import json
import os
import random
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fusion_notebooks.mllm import MLLM, find_folder

EX, Q = 'data/example.png', 'Which digit is on the purple star?'
GLYPH = 'data/models/glyph-llava'


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GLYPH, tmp_path / 'mine')
    return tmp_path / 'mine'


def rewrite(folder, change):
    save_file(change(load_file(folder / 'model.safetensors')), folder / 'model.safetensors', metadata=dict(format='pt'))


def without(word):
    return lambda weights: {k: v for k, v in weights.items() if word not in k}


@pytest.mark.parametrize('part', ['projector', 'layers.3', 'vision_tower', 'norm', 'embed'])
def test_a_checkpoint_that_lacks_a_part_is_refused_by_name(folder, part):
    "It was loaded with random numbers, other ones each time"
    rewrite(folder, without(part))
    with pytest.raises(ValueError, match=f'lack weights that the model needs.*{part}'):
        MLLM.load(folder)


def test_every_second_tensor(folder):
    rewrite(folder, lambda w: {k: w[k] for k in sorted(w)[::2]})
    with pytest.raises(ValueError, match='lack weights .* more'):
        MLLM.load(folder)


def test_another_layout_is_refused_with_its_own_names(folder):
    rewrite(folder, lambda w: {'original.' + k: v for k, v in w.items()})
    with pytest.raises(ValueError, match=r'lack weights .*they hold others .*original\.'):
        MLLM.load(folder)


def test_more_layers_than_weights(folder):
    config = json.loads((folder / 'config.json').read_text())
    config['text_config']['num_hidden_layers'] = 50
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='lack weights'):
        MLLM.load(folder)


def test_another_shape(folder):
    rewrite(folder, lambda w: {k: (v[:4].clone() if 'layers.2.mlp.down_proj' in k else v) for k, v in w.items()})
    with pytest.raises((ValueError, OSError), match='down_proj|shape|mismatch'):
        MLLM.load(folder)


def test_weights_without_a_place_are_named(folder):
    rewrite(folder, lambda w: w | {'something.else': torch.zeros(2)})
    with pytest.warns(UserWarning, match='no place for .*something.else'):
        mllm = MLLM.load(folder)
    assert mllm.answer(EX, Q).text == MLLM.load('glyph-llava').answer(EX, Q).text


@pytest.mark.parametrize('word', ['dtype', 'torch_dtype'])
def test_both_spellings_of_dtype(word):
    assert MLLM.load('glyph-llava', **{word: torch.bfloat16}).dtype == torch.bfloat16
    assert MLLM.load('glyph-llava').dtype == torch.float32


@pytest.fixture
def adapter(tmp_path):
    peft = pytest.importorskip('peft')
    mllm = MLLM.load('glyph-llava')
    config = peft.LoraConfig(target_modules=['q_proj', 'v_proj'], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(mllm.model, config)
    for name, q in wrapped.named_parameters():
        if 'lora_' in name:
            q.data *= 3
    wrapped.peft_config['default'].base_model_name_or_path = 'glyph-llava'
    wrapped.save_pretrained(tmp_path / 'tuned')
    return tmp_path / 'tuned', mllm.answer(EX, Q), wrapped, mllm.processor


def test_an_adapter_loads_with_its_base(adapter):
    folder, want, wrapped, processor = adapter
    got = MLLM.load(folder).answer(EX, Q)
    assert got.ids == want.ids and abs(got.logp - want.logp) < 1e-5
    plain = MLLM.load('glyph-llava').answer(EX, Q)
    assert abs(got.logp - plain.logp) > 1e-3  # the test would see an adapter that is not there
    again = MLLM(wrapped, processor).answer(EX, Q)  # a PeftModel said 'has no image tower'
    assert abs(again.logp - want.logp) < 1e-5


def test_an_adapter_that_does_not_fit_or_is_mixed_with_a_model(adapter, folder):
    tuned = adapter[0]
    weights = load_file(tuned / 'adapter_model.safetensors')
    save_file({k: weights[k] for k in sorted(weights)[1:]}, tuned / 'adapter_model.safetensors')
    with pytest.raises(ValueError, match='made for another model'):
        MLLM.load(tuned)
    shutil.copy(tuned / 'adapter_config.json', folder)
    with pytest.raises(ValueError, match='a model and an adapter'):
        MLLM.load(folder)


def test_a_compiled_model_is_unwrapped():
    mllm = MLLM.load('glyph-llava')
    again = MLLM(torch.compile(mllm.model), mllm.processor)
    assert again.model is mllm.model


@pytest.mark.parametrize(
    'shard', ['../outside.safetensors', '/tmp/outside.safetensors', 'pytorch_model.bin', 'a/b.safetensors']
)
def test_shards_that_lie_elsewhere_are_refused(folder, shard):
    weights = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').rename(folder.parent / 'outside.safetensors')
    save_file({'x': torch.zeros(1)}, folder / 'other.safetensors')
    index = dict(metadata=dict(total_size=1), weight_map=dict.fromkeys(weights, shard))
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError, match='only .safetensors files beside it'):
        MLLM.load(folder)


def test_links_out_of_the_folder_and_pipes_are_refused(folder):
    (folder / 'model.safetensors').rename(folder.parent / 'outside.safetensors')
    os.symlink(folder.parent / 'outside.safetensors', folder / 'model.safetensors')
    with pytest.raises(ValueError, match='leads out of'):
        MLLM.load(folder)
    (folder / 'model.safetensors').unlink()
    (folder.parent / 'outside.safetensors').rename(folder / 'model.safetensors')
    os.mkfifo(folder / 'x.json')
    with pytest.raises(ValueError, match='not a regular file'):
        MLLM.load(folder)


def test_a_snapshot_of_the_hub_links_to_its_blobs(folder, tmp_path):
    snapshot = tmp_path / 'models--a--b' / 'snapshots' / 'abc'
    blobs = tmp_path / 'models--a--b' / 'blobs'
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        os.symlink(os.path.relpath(blobs / file.name, snapshot), snapshot / file.name)
    assert MLLM.load(snapshot).n_layers == 8


def test_an_attention_from_the_hub_is_code(folder):
    config = json.loads((folder / 'config.json').read_text())
    for place in (config, config['text_config']):
        place['attn_implementation'] = 'org/kernel'
        (folder / 'config.json').write_text(json.dumps(config))
        with pytest.raises(ValueError, match='org/kernel.*code'):
            MLLM.load(folder)
        del place['attn_implementation']
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='org/kernel.*code'):
        MLLM.load(folder, attn_implementation='org/kernel')


def test_names(tmp_path, monkeypatch, folder):
    with pytest.raises(FileNotFoundError, match='did you mean glyph-llava'):
        MLLM.load('glyph-lava')  # five network retries before
    with pytest.raises(FileNotFoundError, match='demo models: '):
        MLLM.load('something')
    assert find_folder('org/name') is None
    monkeypatch.setenv('HOME', str(tmp_path))
    assert find_folder('~/mine') == folder
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / 'glyph-llava')
    with pytest.raises(ValueError, match='a demo model and a folder here: give ./glyph-llava'):
        MLLM.load('glyph-llava')
    assert find_folder('./glyph-llava').resolve() == tmp_path / 'glyph-llava'
    (tmp_path / 'planted-3').mkdir()  # holds no model
    assert find_folder('planted-3') != tmp_path / 'planted-3'


def test_progress_bars_stay_as_they_were():
    from transformers.utils import logging

    on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        MLLM.load('glyph-llava')
        assert not logging.is_progress_bar_enabled()
        logging.enable_progress_bar()
        MLLM.load('glyph-llava')
        assert logging.is_progress_bar_enabled()
    finally:
        (logging.enable_progress_bar if on else logging.disable_progress_bar)()


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_whatever_is_missing_is_refused_by_name(share, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp('part') / 'mine'
    shutil.copytree(GLYPH, folder)
    names = sorted(load_file(folder / 'model.safetensors'))
    rng = random.Random(seed)
    gone = set(rng.sample(names, max(1, int(share * len(names)))))
    rewrite(folder, lambda weights: {k: v for k, v in weights.items() if k not in gone} or {'x': torch.zeros(1)})
    with pytest.raises(ValueError, match='lack weights that the model needs') as e:
        MLLM.load(folder)
    named = str(e.value).split('(')[1].split(')')[0].split(' and ')[0].split(', ')

    def tail(name):
        return name.split('.')[-2:]

    tied = ['lm_head.weight']  # is the embedding
    assert named and all(tail(name) in [tail(one) for one in gone] for name in named if name not in tied)


def test_the_base_of_an_adapter_is_part_of_its_revision(folder, tmp_path):
    "Rows of an adapter on another base would be taken for its own"
    from fusion_notebooks import study

    (tmp_path / 'tuned').mkdir()
    (tmp_path / 'tuned/adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path=str(folder))))
    save_file({'x': torch.zeros(1)}, tmp_path / 'tuned/adapter_model.safetensors')
    before = study.revision(tmp_path / 'tuned')
    rewrite(folder, lambda w: {k: v * 2 for k, v in w.items()})
    assert study.revision(tmp_path / 'tuned') != before


def test_old_ways_to_names_and_homes_that_are_not_there():
    from fusion_notebooks import core, vqa

    assert vqa.Sample is core.Sample
    with pytest.raises(FileNotFoundError, match='No model folder'):
        find_folder('~nosuchuser/x')


@pytest.mark.parametrize(
    'name, said', [('planted-3', 'that demo model did not come along'), ('plantd-3', 'did you mean planted-3')]
)
def test_a_demo_model_that_is_not_here_names_the_command_that_gets_it(monkeypatch, tmp_path, name, said):
    "As in a wheel, which holds glyph-llava alone"
    here = {'glyph-llava': tmp_path / 'glyph-llava'}
    for module in ('core.resources', 'mllm.loading'):
        monkeypatch.setattr(f'fusion_notebooks.{module}.demo_folders', lambda: here)
    with pytest.raises(FileNotFoundError) as e:
        MLLM.load(name)
    message = str(e.value)
    assert said in message and '`fusion demo get planted-3 SOURCE`' in message
    assert '\n' not in message and not re.search(r'[.?] [A-Z]', message)
