"The explorer without a browser: its model side equals the rooms it is made of, and the widgets' side does what it is told"

import asyncio, base64, io, json, re, sys, threading, time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fusion_notebooks import baselines, causal, contrast, demo, explore, fusion, hooks, masking
from fusion_notebooks.mllm import Sample
from conftest import noise_image
from twins import FAMILIES, family

QUESTION = 'What color is the circle?'


@pytest.fixture(scope='module')
def seen(tiny):
    return explore.see(tiny, noise_image(0), QUESTION, fusion=(1, 2))


def unpacked(m):
    return np.frombuffer(m['data'], '<i2').reshape(m['shape']) / 32767 * np.reshape(m['top'], (*m['shape'][:-1], 1))


def test_maps_are_those_of_a_capture(tiny, seen):
    p = tiny.prompt(noise_image(0), QUESTION)
    with torch.inference_mode(), hooks.capture(tiny, heads='all') as cache:
        tiny.model(**p.inputs, use_cache=False)
    heads = p.grids[0].of(cache.attention[0, :, :, 0].numpy())
    assert (
        heads.shape == (tiny.n_layers, tiny.model.config.text_config.num_attention_heads, 64)
        and abs(seen.heads - heads).max() < 1e-6
    )
    sent = explore.maps(seen)
    got = unpacked(sent['attention'])
    assert abs(got[:, 1:] - heads).max() < 2e-5 and abs(got[:, 0] - heads.mean(1)).max() < 2e-5
    assert np.allclose(np.reshape(sent['attention']['sum'], got.shape[:2])[:, 0], heads.mean(1).sum(-1), atol=1e-5)
    for i in (0, tiny.n_layers - 1):
        assert np.allclose(
            unpacked(sent['relative'])[i],
            baselines.vicrop_rel(tiny, noise_image(0), QUESTION, layer=i).map,
            rtol=1e-3,
            atol=1e-3,
        )
    c = contrast.refine(tiny, noise_image(0), QUESTION, candidates=[1, 2]).contrast
    assert seen.contrast.pre == c.pre and abs(unpacked(sent['contrast'])[c.pre] - seen.grid.of(c.map)).max() < 2e-5


def test_map_of_each_answer_token(tiny, seen):
    ids = seen.tokens
    assert len(ids) > 1 and len(seen.by_token) == len(ids) == len(explore.words(seen))
    p = tiny.prompt(noise_image(0), QUESTION)
    for k in (0, len(ids) - 1):  # a forward over prompt and answer so far, of which the last row is read
        with torch.inference_mode(), hooks.capture(tiny) as cache:
            tiny.model(**tiny.copies(p, 1, ids[:k]), use_cache=False)
        assert abs(seen.by_token[k] - p.grids[0].of(cache.attention[0, :, 0].double().numpy())).max() < 1e-6


def test_causal_map_is_that_of_its_room(tiny, seen):
    found = causal.maps(tiny, noise_image(0), QUESTION)[0]
    sent = explore.causal_maps(seen)['causal']
    got, want = unpacked(sent), found.prompt.grids[0].of(np.nan_to_num(found.shares))
    assert sent['shape'] == [tiny.n_layers, want.shape[1] + 1, 64] and sent['signed']
    assert abs(got[:, 1:] - want).max() < 1e-4 * abs(want).max() + 1e-6
    assert np.allclose(got[:, 0], want.sum(1), rtol=1e-3, atol=1e-4)
    assert explore.causal_maps(replace(seen, first_pass=cross_first_pass())) == {}


def cross_first_pass():
    "Of a model whose picture is read through cross-attention, where closings cannot be computed"
    return explore.see(family('mllama'), noise_image(0, (96, 96)), QUESTION).first_pass


def test_packed_survives_gaps_and_zeros():
    m = explore.packed(np.array([[np.nan, np.nan], [0, 0], [-3, 1]]))
    assert (
        unpacked(m).tolist() == [[0, 0], [0, 0], [-3, pytest.approx(1, abs=1e-4)]]
        and m['sum'] == [1, 1, -2]
        and json.dumps(m['top'])
    )


@pytest.mark.parametrize('how', ['knockout', 'zero', 'soft', 'mean', 'swap'])
def test_masked_answer_is_an_edit_by_hand(tiny, how):
    mean, donor = (
        masking.mean_states(tiny, [Sample(noise_image(k), QUESTION) for k in (5, 6)]),
        tiny.prompt(noise_image(3), QUESTION),
    )
    seen = explore.see(tiny, noise_image(0), QUESTION, mean=mean, donor=noise_image(3))
    cells, layers, p = [3, 4, 11, 60], [1, 2], tiny.prompt(noise_image(0), QUESTION)
    states = dict(mean=mean, swap=masking.visual_states(tiny, donor)[:, cells]).get(how)
    with hooks.edit(tiny, layers, p.visual[cells], how, states=states, text_from=int(p.visual.max()) + 1):
        want, plain = tiny.answer(p), seen.first_pass.base
        logp = tiny.answer_logits(p, plain.ids)[0].gather(1, torch.tensor(plain.ids)[:, None]).sum().item()
    got = explore.mask_cells(seen, cells[::-1], layers, how)
    assert (
        got.tokens.tolist() == cells
        and got.answer.ids == want.ids
        and abs(got.answer.logp - want.logp) < 1e-4
        and abs(got.logp - logp) < 1e-4
    )
    assert abs(got.logp - plain.logp) > 1e-4  # something was masked


def test_curves_are_those_of_the_rooms(tiny, seen):
    table = explore.effect(seen, 'zero')
    want = masking.sweep(tiny, [Sample(noise_image(0), QUESTION)], 'zero').query('layer >= 0')
    assert np.allclose(table.logp, want.logp, atol=1e-5) and table.prediction.tolist() == want.prediction.tolist()
    effect, distance, exits = explore.curves(seen, table, 'zero')
    assert effect['values'] == table.logp.tolist() and effect['base'] == seen.first_pass.base.logp
    assert np.allclose(distance['values'], fusion.profile(seen.first_pass.maps))
    with hooks.early_exit(tiny, 1):
        assert exits['labels'][1] == explore.payload._shown(tiny.answer(noise_image(0), QUESTION).text)


def test_every_view_loses_the_patch():
    "LLaVA-NeXT sees a picture twice, at once and in tiles: a patch of the one takes its tokens in the other along"
    mllm = family('llava_next')
    seen = explore.see(mllm, noise_image(0, (48, 48)), QUESTION)
    views = [g for g in seen.first_pass.prompt.views]
    assert len(views) > 1
    cells = [0, 1, seen.grid.w, seen.grid.w + 1]
    union = (*seen.grid.boxes[0][:2], *seen.grid.boxes[cells[-1]][2:])
    want = {
        int(i)
        for g in views
        for i, b in zip(g.index, g.boxes)
        if union[0] <= (b[0] + b[2]) / 2 < union[2] and union[1] <= (b[1] + b[3]) / 2 < union[3]
    }
    assert {*explore.tokens_at(seen, cells).tolist()} == want > {int(seen.grid.index[c]) for c in cells}


@pytest.mark.parametrize('name', [n for n in FAMILIES if n != 'mllama'])
def test_families(name):
    mllm = family(name)
    try:
        seen = explore.see(mllm, noise_image(0, (96, 96)), QUESTION, fusion=(1,))
    except ValueError as e:
        pytest.skip(str(e))
    sent, c = explore.maps(seen), explore.scene(seen)
    n = len(seen.grid.boxes)
    assert sent['attention']['shape'][0] == mllm.n_layers and all(
        m['shape'][-1] == n == len(c['boxes']) == c['shape'][0] * c['shape'][1] for m in sent.values()
    )
    assert json.dumps([m['top'] + m['sum'] for m in sent.values()]).find('NaN') < 0
    if seen.grid.mix is None:
        m = explore.mask_cells(seen, range(n))
        p = seen.first_pass.prompt
        with hooks.edit(mllm, None, p.visual[m.tokens], 'knockout', text_from=int(p.visual.max()) + 1):
            assert mllm.answer(p).ids == m.answer.ids
        assert {*seen.grid.index} <= {*m.tokens}
    assert len(explore.curves(seen, explore.effect(seen), 'knockout')) == 3 and explore.refined(seen)[1]


@pytest.mark.parametrize(
    'cells, layers, word', [([64], None, 'no patch 64'), ([-1], None, 'no patch -1'), ([0], [99], 'no layer 99')]
)
def test_wrong_patches_and_layers(seen, cells, layers, word):
    with pytest.raises(ValueError, match=word):
        explore.mask_cells(seen, cells, layers)


def test_queries_are_no_patches(seen):
    other = replace(seen, grid=replace(seen.grid, mix=np.eye(64)))
    with pytest.raises(ValueError, match='queries'):
        explore.tokens_at(other, [0])


def png(image, mode='RGB'):
    image.convert(mode).save(data := io.BytesIO(), 'PNG')
    return data.getvalue()


def test_pictures_from_outside(monkeypatch):
    for mode in ('RGB', 'P', 'L', '1', 'RGBA'):
        assert explore.opened(png(noise_image(0), mode)).mode == 'RGB'
    for data, word in (
        (b'', 'a.png is not a picture'),
        (b'<svg/>', 'not a picture'),
        (png(noise_image(0))[:200], 'damaged|not a picture'),
    ):
        with pytest.raises(ValueError, match=word):
            explore.opened(data, 'a.png')
    monkeypatch.setattr('fusion_notebooks.core.images.MAX_PIXELS', 1000)
    decoded = []
    monkeypatch.setattr(Image.Image, 'load', lambda *a: decoded.append(a))
    for data in LARGE:
        with pytest.raises(ValueError, match='more than the 1,000 allowed'):
            explore.opened(data, 'a.png')
    assert not decoded  # refused before its pixels were unpacked


LARGE = [png(Image.new('RGB', (100, 100)), mode) for mode in ('RGB', 'P')]

# the widgets' side


@pytest.fixture
def view(tiny):
    pytest.importorskip('anywidget')
    return explore.explore(tiny, noise_image(0), QUESTION, fusion=(1, 2), review=3)


def test_explorer_shows_what_the_model_side_computes(tiny, view):
    seen, c = view.seen, view.canvas
    assert [a['text'] for a in c.answers] == [
        seen.first_pass.base.text,
        explore.refined(seen)[0]['text'],
    ] and c.status == ''
    assert (
        c.marks == dict(fusion=[1, 2], review=3, pre=seen.contrast.pre, post=2)
        and len(c.curves) == 3
        and len(c.crop) == 4
    )
    c.chosen = [0, 9]
    want = explore.mask_cells(seen, [0, 9])
    assert c.answers[-1]['p'] == want.answer.p and f'{np.exp(want.logp):.3f}' in c.answers[-1]['note']
    view.layers.value = (1, 2)
    view.how.value = 'zero'
    assert (
        c.answers[-1]['p'] == explore.mask_cells(seen, [0, 9], [1, 2], 'zero').answer.p
        and '(zero)' in c.curves[0]['title']
    )
    c.chosen = []
    assert len(c.answers) == 2
    view.way.value = 'mask'
    view.refine.click()
    assert c.answers[1]['label'] == 'refined by mask' and c.crop == []
    view.question.value = 'Which digit?'
    assert (
        view.seen.first_pass.prompt.question == 'Which digit?'
        and c.answers[0]['text'] == tiny.answer(noise_image(0), 'Which digit?').text
    )
    c.upload = dict(name='new.png', data=memoryview(png(noise_image(7))))
    assert c.answers[0]['text'] == tiny.answer(noise_image(7), 'Which digit?').text
    c.upload = dict(name='<b>', data=memoryview(b'none'))
    assert (
        c.status == 'First look: <b> is not a picture that Pillow can read: give a PNG or JPEG.'
        and view.seen.first_pass.prompt.images[0] == noise_image(7)
    )
    view.question.value = ' '
    assert 'question is empty' in c.status


def test_examples_are_chosen(tiny):
    pytest.importorskip('anywidget')
    view = explore.explore(tiny, examples=(some := demo.samples(3)))
    c = view.canvas
    assert [e['question'] for e in c.examples] == [s.question for s in some] and c.example == 0
    assert c.question == some[0].question and c.truth == ' or '.join(some[0].answers)
    right = explore.right(view.seen, view.seen.first_pass.base)
    assert right in (True, False) and c.answers[0]['right'] == right
    c.example = 2
    assert c.question == some[2].question == view.question.value and c.truth == ' or '.join(some[2].answers)
    assert c.answers[0]['text'] == tiny.answer(some[2].image, some[2].question).text
    view.question.value = 'Which digit?'  # about the same picture; what is right is not known
    assert c.example == -1 and c.truth == '' and c.answers[0]['right'] is None
    assert c.answers[0]['text'] == tiny.answer(some[2].image, 'Which digit?').text
    with pytest.raises(ValueError, match='no picture to look at'):
        explore.explore(tiny, examples=[])


def test_controls_exist_for_what_was_given(tiny, view):
    assert view.how.options == ('knockout', 'zero', 'soft') and view.early.options[0] == 'fusion layers'
    other = explore.explore(tiny, noise_image(0), QUESTION, fusion=(), donor=noise_image(3))
    assert (
        'swap' in other.how.options
        and other.early.options == ('all layers', 'this layer')
        and other.seen.candidates is None
    )
    other.canvas.layer, other.early.value = 1, 'this layer'
    other.refine.click()
    assert other.canvas.marks['pre'] == 1
    for kw, word in ((dict(fusion=(99,)), 'no layer 99'), (dict(review=0), 'cannot be layer 0')):
        with pytest.raises(ValueError, match=word):
            explore.explore(tiny, noise_image(0), QUESTION, **kw)
    with pytest.raises(ValueError, match='question is empty'):
        explore.explore(tiny, noise_image(0), '')


def test_work_runs_between_cells_and_stops(tiny):
    "On a loop: asked from another thread, steps run in the loop's own; stop ends a forward in the middle and leaves no hook"
    before, where, said = tiny.answer(noise_image(0), QUESTION), [], []
    hooks_now = lambda: [
        h for m in tiny.model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
    ]
    there = hooks_now()

    async def kernel():
        work = explore.Work(tiny, lambda *a: said.append(a))

        def press():
            work.stop.set()
            where.append(threading.current_thread())
            tiny.answer(noise_image(0), QUESTION)
            where.append('not stopped')

        t = threading.Thread(
            target=work.ask,
            args=(
                'job',
                [
                    ('one', lambda: where.append(threading.current_thread())),
                    ('two', press),
                    ('three', lambda: where.append(3)),
                ],
            ),
        )
        t.start()
        t.join()
        assert not where  # nothing has run beside the cell
        while not where or work.now or work.jobs:
            await asyncio.sleep(0.01)
        work.ask('again', [('one', lambda: where.append('again'))])
        work.finish()

    asyncio.run(kernel())
    assert where == [threading.main_thread()] * 2 + ['again'] and ('Stopped.', 0, 0) in said and said[-1] == ('', 0, 0)
    assert hooks_now() == there
    assert tiny.answer(noise_image(0), QUESTION) == before


def test_a_failing_step_says_why_and_the_next_job_runs(tiny):
    said, done = [], []
    work = explore.Work(tiny, lambda *a: said.append(a[0]))
    work.ask('bad', [('halving', lambda: 1 / 0), ('never', lambda: done.append(1))])
    assert said[-1] == 'halving: division by zero' and not done
    work.ask('good', [('fine', lambda: done.append(2))])
    assert done == [2] and said[-1] == ''


def test_quiet_only_when_nothing_is_left(tiny):
    "An empty status says that the answers shown are the last ones"
    said = []

    async def kernel():
        work = explore.Work(tiny, lambda *a: said.append(a[0]))
        for name in ('mask', 'effect'):
            work.ask(name, [(name, lambda: None)])
        while not said or said[-1]:
            await asyncio.sleep(0.01)

    asyncio.run(kernel())
    assert said == ['mask …', 'effect …', '']


class Slow(dict):
    "Long enough in each of its acts for another thread to come between"

    def pop(self, *a):
        got = super().pop(*a)
        time.sleep(0.002)
        return got

    def __iter__(self):
        time.sleep(0.002)
        return super().__iter__()


def test_asked_from_another_thread_while_steps_run():
    "The last of many is done, however the threads fall"
    done, wrong = [], []

    async def kernel():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        work = explore.Work(SimpleNamespace(layers=[]), lambda *_: None)
        work.jobs = Slow()

        def press():
            for i in range(100):
                work.ask('mask', [('mask', partial(done.append, i))])
                time.sleep(0.001)

        t = threading.Thread(target=press)
        t.start()
        while t.is_alive() or work.task is None or not work.task.done():
            await asyncio.sleep(0.001)
        work.task.result()

    asyncio.run(kernel())
    assert done[-1] == 99 and done == sorted(done) and not wrong


def test_newer_question_replaces_the_older(tiny):
    done = []
    work = explore.Work(tiny, lambda *_: None)

    def again():
        done.append('old')
        work.ask('see', [('new', lambda: done.append('new'))])

    work.ask('see', [('old', again), ('rest', lambda: done.append('rest'))])
    assert done == ['old', 'new']


def test_recorded_page_holds_text_only(tiny):
    seen = explore.see(tiny, noise_image(0), '</script><img src=x onerror=alert(1)>', fusion=(1,))
    page = explore.recorded(seen)
    assert page.count('</script>') == 1 and '<img' not in page
    assert not re.search(r'https?://(?!www\.w3\.org/2000/svg)', page)
    data = json.loads(re.search(r'still\((\{.*\})\), el:', page)[1])['cases'][0]
    raw = base64.b64decode(data['maps']['attention']['data'])
    assert raw == explore.maps(seen)['attention']['data'] and len(data['single']) == 64
    one = data['single']['9']
    assert one['cells'] == [0, 1, 2, 8, 9, 10, 16, 17, 18] and data['single']['0']['cells'] == [0, 1, 8, 9]
    assert one['p'] == explore.mask_cells(seen, one['cells']).answer.p
    assert Image.open(io.BytesIO(base64.b64decode(data['picture']))).size == (384, 384)


def test_explorer_says_what_is_missing(tiny, monkeypatch):
    explore.canvas._canvas.cache_clear()
    monkeypatch.setitem(sys.modules, 'anywidget', None)
    with pytest.raises(ImportError, match=r'fusion_notebooks\[explore\]'):
        explore.explore(tiny, noise_image(0), QUESTION, fusion=())


def test_the_explorer_says_how_far_a_map_can_be_trusted(tiny, tmp_path, monkeypatch):
    "From the summary beside the figures of a study; where there is none, that it was not measured"
    from fusion_notebooks.results.sentences import trust_text

    numbers = (
        ('attention on sinks at the late layer', '6', 0.66),
        ('attention on sinks at the subtracted layer', '0', 1.0),
    )
    table = pd.DataFrame([dict(finding=f, layers=i, value=v, low=v - 0.1, high=v + 0.1) for f, i, v in numbers])
    table = table.assign(analysis='attention', kind='all', p=np.nan, n=99)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'settings.ini').write_text('[study]\nmodels = glyph-llava\n')
    assert explore.trust('glyph-llava').startswith('How far it can be trusted was not measured')
    (tmp_path / 'figures/glyph-llava').mkdir(parents=True)
    table.to_csv(tmp_path / 'figures/glyph-llava/summary.csv', index=False)
    said = explore.trust('glyph-llava')
    assert said == trust_text(table) and said.startswith(
        'The map of layer 6 says little by itself: 66.0 % [56.0, 76.0]'
    )
    shown = explore.maps(explore.see(tiny, noise_image(0), QUESTION, trust=said))
    assert shown['attention']['about'].endswith(said) and shown['contrast']['about'].endswith(said)
    plain = explore.maps(explore.see(tiny, noise_image(0), QUESTION))['attention']['about']
    assert plain and said.startswith('The map') and shown['attention']['about'] == f'{plain} {said}'
