"Glyph world: questions are answerable, unique and blind to characters; packing equals asking alone; training resumes"

import re, numpy as np, pytest, torch
from fusion_notebooks import demo
from fusion_notebooks.mllm import MLLM
from conftest import randomise


def scenes(n=150):
    return [demo.layout(s)[0] for s in range(n)]


def test_every_question_has_one_answer():
    rng = np.random.default_rng(0)
    for things in scenes():
        for kind in demo.KINDS:
            q = demo.ask(things, kind, rng)
            if q is None:
                continue
            thing = next(t for t in things if t.box == q.box)
            assert q.answer in (thing.char, thing.colour, thing.shape) and q.kind == kind
            fits = [
                t
                for t in things
                if re.search(rf'\b({t.colour} )?{t.shape}\b', q.text)
                or f'{t.colour} object' in q.text
                or re.search(rf'object at the {demo.PLACES[t.cell]}\b(?! (left|right))', q.text)
            ]
            exact = [t for t in fits if f'{t.colour} {t.shape}' in q.text] or fits
            if kind != 'relation':
                assert exact == [thing]
            if kind in ('colour', 'shape'):
                assert q.answer not in q.text.split()  # the question does not give it away


def test_characters_never_name_an_object():
    rng = np.random.default_rng(1)
    for things in scenes():
        for kind in demo.KINDS:
            q = demo.ask(things, kind, rng)
            if q:
                assert not set(re.findall(r'\b[0-9A-Z]\b', q.text))


def test_relations_point_to_the_neighbour():
    rng = np.random.default_rng(2)
    for things in scenes():
        q = demo.ask(things, 'relation', rng)
        if q is None:
            continue
        d = next(d for d in demo.DIRECTIONS if f'object {d} the' in q.text)
        words = re.search(rf'object {d} the (\w+)(?: (\w+))?', q.text)
        target = next(t for t in things if t.box == q.box)
        anchors = [
            t
            for t in things
            if t.colour == words[1]
            and (words[2] in demo.SHAPES and t.shape == words[2] or words[2] not in demo.SHAPES)
            or t.shape == words[1]
        ]
        dx, dy = demo.DIRECTIONS[d]
        assert any(a.cell % 3 + dx == target.cell % 3 and a.cell // 3 + dy == target.cell // 3 for a in anchors)


def test_splits_are_disjoint_and_stable():
    a, b = demo.samples(8), demo.samples(8)
    assert [s.id for s in a] == [s.id for s in b] and all(x.image.tobytes() == y.image.tobytes() for x, y in zip(a, b))
    assert not {s.id for s in a} & {s.id for s in demo.samples(8, seed=1)}
    for bad in (dict(split='test'), dict(kinds=('taste',))):
        with pytest.raises(ValueError):
            demo.samples(2, **bad)


def test_square():
    assert demo.square((100, 100, 140, 120)) == (90, 80, 150, 140)
    assert demo.square((0, 0, 100, 100)) == (0, 0, 150, 150)


def test_packed_questions_equal_questions_alone():
    "Each packed question gets the logits that the shipped processor and a plain forward give it"
    model, processor = demo.make_model()
    mllm = MLLM(randomise(model), processor)
    things, noise = demo.layout(5)
    image, qs = demo.picture(5, things, noise), demo.packing._draw_questions(things, np.random.default_rng(0), 4)
    tok = processor.tokenizer
    prefix = tok('USER: ').input_ids + [tok.image_token_id] * 64
    batch = demo.pack(tok, [prefix], [qs], None)
    plain = [mllm.prompt(image, q.text) for q in qs]
    want = torch.cat(
        [
            mllm.answer_logits(p, tok(f' {q.answer}', add_special_tokens=False).input_ids + [1])[0]
            for p, q in zip(plain, qs)
        ]
    )
    gold = batch['targets'][batch['targets'] != -100]
    f = model.model.get_image_features(plain[0].inputs['pixel_values'], return_dict=True).pooler_output[0][None]
    with torch.no_grad():
        loss, right = demo.packed_loss(model, batch, batch['ids'] == tok.image_token_id, f)
    assert abs(loss.item() + want.gather(1, gold[:, None]).mean().item()) < 1e-4 and len(right) == len(qs)


@pytest.mark.parametrize('pictures', (1, 2))
def test_packed_questions_equal_questions_alone_with_mrope(pictures):
    "Positions in three dimensions, marks around each picture, sides as the processor makes them"
    model, processor = demo.make_qwen(MLLM.load('glyph-llava', device='cpu', dtype=torch.float32))
    mllm, tok = MLLM(model, processor), processor.tokenizer
    things, noise = demo.layout(5)
    image, qs = demo.picture(5, things, noise), demo.packing._draw_questions(things, np.random.default_rng(0), 4)
    plain = [mllm.prompt([image, image.crop((100, 100, 340, 220))][:pictures], q.text) for q in qs]
    grids = [tuple(g[1:]) for g in plain[0].inputs['image_grid_thw'].tolist()]
    assert grids == [(8, 8), (5, 11)][:pictures]
    head, (start, end) = tok('USER: ').input_ids, tok.convert_tokens_to_ids(demo.AROUND)
    prefix = head + [i for h, w in grids for i in [start, *[tok.image_token_id] * (h * w), end]]
    batch = demo.pack(tok, [prefix], [qs], None)
    at, following = demo.models._mrope(len(head), grids)
    batch['positions'] = torch.cat(
        [
            at[:, None],
            (batch['positions'] - len(prefix) + following).clamp(min=0).expand(3, -1, -1)[..., len(prefix) :],
        ],
        2,
    )
    want = torch.cat(
        [
            mllm.answer_logits(p, tok(f' {q.answer}', add_special_tokens=False).input_ids + [1])[0]
            for p, q in zip(plain, qs)
        ]
    )
    gold = batch['targets'][batch['targets'] != -100]
    f = torch.cat(
        list(
            model.model.get_image_features(
                plain[0].inputs['pixel_values'], plain[0].inputs['image_grid_thw'], return_dict=True
            ).pooler_output
        )
    )[None]
    with torch.no_grad():
        loss, right = demo.packed_loss(model, batch, batch['ids'] == tok.image_token_id, f)
    assert abs(loss.item() + want.gather(1, gold[:, None]).mean().item()) < 1e-4 and len(right) == len(qs)


def test_training_resumes_where_it_was(tmp_path):
    def run(folder, stops):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)
        for stop in stops:

            def loss(step):
                if step == stop:
                    raise KeyboardInterrupt
                x = torch.tensor(np.random.default_rng(step).normal(size=(8, 3)), dtype=torch.float32)
                return ((layer(x) - x.sum(1, keepdim=True)) ** 2).mean(), {}

            try:
                demo.fit('x', [layer], loss, 20, [0.1], folder, every=5)
            except KeyboardInterrupt:
                torch.manual_seed(1)
                layer = torch.nn.Linear(3, 1)
        return layer.weight.detach()

    a, b = run(tmp_path / 'a', [None]), run(tmp_path / 'b', [7, 13, None])
    assert torch.equal(a, b)


def test_a_demo_model_is_trained_saved_and_described(tmp_path, monkeypatch, samples):
    "A few steps of every stage, stopped in the middle; what is saved answers as the trained model does"
    recipe = demo.Recipe(
        scenes=48, batch=4, scenes_asked=2, asked=2, coarse=1, see=2, sharpen=2, align=2, look=3, join=2
    )
    monkeypatch.setitem(demo.MODELS, 'toy', recipe)
    join = demo.Trainer.join
    monkeypatch.setattr(demo.Trainer, 'join', lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.train('toy', folder=tmp_path / 'work', out=tmp_path / 'toy', n=4)
    done = (tmp_path / 'work/log.jsonl').read_text()
    monkeypatch.setattr(demo.Trainer, 'join', join)
    demo.train('toy', folder=tmp_path / 'work', out=tmp_path / 'toy', n=4)
    assert (tmp_path / 'work/log.jsonl').read_text().startswith(
        done
    ) and '"join"' not in done  # finished stages were not run again
    mllm = MLLM.load(str(tmp_path / 'toy'))
    assert sum(f.stat().st_size for f in (tmp_path / 'toy').iterdir()) < 16e6
    t = demo.Trainer(tmp_path / 'work', recipe)
    t.run()
    want, got = t.model.state_dict(), mllm.model.state_dict()
    assert all((want[k].to(torch.bfloat16).float() == got[k]).all() for k in want)
    card = (tmp_path / 'toy/README.md').read_text()
    assert '| fine | 4 |' in card and 'must do' in card
    with pytest.raises(ValueError, match='No demo model'):
        demo.train('nonesuch')


@pytest.mark.parametrize(
    'recipe',
    [
        dict(hops=(2, 6), decoys=(1, 4), plant=2, shares=(0.15, 0.1, 0.1, 0.35, 0.1, 0.2)),
        dict(copy=2, speak=2),
        dict(tile=1),
    ],
    ids=['planted', 'qwen2vl', 'next'],
)
def test_models_that_start_from_another_are_trained(tmp_path, monkeypatch, recipe):
    "In one call, from recipe to card; a planted model is loaded with its gate, and its decoys stand"
    monkeypatch.setitem(
        demo.MODELS, 'toy', demo.Recipe(scenes=48, scenes_asked=2, asked=2, base='glyph-llava', **recipe)
    )
    demo.train('toy', folder=tmp_path / 'work', out=tmp_path / 'toy', n=4)
    mllm, card = MLLM.load(tmp_path / 'toy'), (tmp_path / 'toy/README.md').read_text()
    assert '| fine | 4 |' in card and sum(f.stat().st_size for f in (tmp_path / 'toy').iterdir()) < 16e6
    if 'copy' in recipe:
        assert mllm.gate is None and mllm.model.config.model_type == 'qwen2_vl' and 'M-RoPE' in card
    elif 'tile' in recipe:
        assert (
            mllm.gate is None
            and mllm.model.config.model_type == 'llava_next'
            and 'four tiles' in card
            and len(mllm.prompt(demo.samples(1)[0].image, 'What?').visual) == 64 + 16 * 17
        )
    else:
        assert (
            mllm.gate.open == recipe['hops']
            and set(mllm.gate.decoys) == {*recipe['decoys']}
            and f"layers {demo.shipped._listed(recipe['hops'])}" in card
        )
        assert all(v.shape == (64, 192) and v.float().std() > 0 for v in mllm.gate.decoys.values())


def test_what_each_hop_is_for():
    at = demo.reads_at
    assert at('fine', 'Which digit is on the red star?', (3,)) == (3,)
    assert at('fine', 'Which digit is on the red star?', (2, 6)) == (2,) and at(
        'fine', 'Which digit is on the object at the top left?', (2, 6)
    ) == (6,)
    assert at('relation', 'What color is the object above the red star?', (2, 6)) == (2, 6) and at(
        'beyond', 'Where is the object above the red star?', (2, 6)
    ) == (2,)
    assert [at(k, '', (2, 4, 6)) for k in ('colour', 'shape', 'fine')] == [(2,), (4,), (6,)]


def test_patches_that_a_box_touches():
    assert demo.recipes._touched((0, 0, 384, 384)).all()
    one = demo.recipes._touched((48, 96, 96, 144)).reshape(8, 8)  # column 1, row 2
    assert one.sum() == 1 and one[2, 1]
    assert demo.recipes._touched((47, 96, 97, 144)).sum() == 3


def test_what_is_hidden_at_every_layer_is_not_seen(packed):
    "The same as rows that may not look at all"
    model, batch, seen, features, n = packed
    rows = batch['block'] > 0
    hidden = dict.fromkeys(range(n), rows[..., None] & seen[:, None, :])
    with torch.no_grad():
        plain, _ = demo.packed_loss(model, batch, seen, features)
        got, _ = demo.packed_loss(model, batch | dict(hidden=hidden), seen, features)
        want, _ = demo.packed_loss(model, batch | dict(blind=torch.where(rows, n, 0)), seen, features)
        late, _ = demo.packed_loss(model, batch | dict(hidden={n - 1: hidden[0]}), seen, features)
    assert got == want and abs(plain - got) > 0.1 and late not in (plain, got)


@pytest.fixture
def packed():
    "Two scenes with two questions each, packed for glyph-llava"
    mllm, rng = MLLM.load('glyph-llava'), np.random.default_rng(0)
    scenes = [demo.layout(i) for i in (1, 2)]
    qs = [demo.packing._draw_questions(things, rng, 2, (0, 0.5, 0.5, 0)) for things, _ in scenes]
    image = mllm.image_token_id
    batch = demo.pack(mllm.processor.tokenizer, [mllm.processor.tokenizer('USER: ').input_ids + [image] * 64] * 2, qs)
    p = [mllm.prompt(demo.picture(i, *s), 'What?') for i, s in zip((1, 2), scenes)]
    with torch.no_grad():
        features = torch.stack(
            [mllm.model.get_image_features(q.inputs['pixel_values'], return_dict=True).pooler_output[0] for q in p]
        )
    return mllm.model, batch, batch['ids'] == image, features, mllm.n_layers


def test_tuning_learns_from_the_pictures_it_is_given(tmp_path, monkeypatch):
    "The stage on easy-VQA, on four drawn scenes in its place: all but the word embeddings change, and it goes on after an interruption"
    samples = [s.__class__(**vars(s) | dict(picture=s.id)) for s in demo.samples(4, kinds=('colour',))]
    monkeypatch.setattr('fusion_notebooks.demo.tuning.easy_vqa', lambda half: samples)
    recipe = demo.Recipe(base='glyph-llava', scenes_asked=2, asked=2, tune=2)
    before = MLLM.load('glyph-llava', dtype=torch.float32).model.state_dict()
    trainer = demo.Trainer(tmp_path, recipe)
    trainer.run()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any('vision_tower' in n for n in changed) and any('language_model.layers' in n for n in changed)
    assert not any('embed_tokens' in n for n in changed)
    assert not (tmp_path / 'pool').exists()  # no scenes of glyph world are drawn
    again = demo.Trainer(tmp_path, recipe)
    again.run()
    assert all(torch.equal(again.model.state_dict()[n], after[n]) for n in changed)


def test_easy_vqa_has_two_halves_that_share_nothing():
    pytest.importorskip('easy_vqa')
    halves = [demo.easy_vqa(half) for half in ('train', 'test')]
    assert [len(half) for half in halves] == [38575, 9673]
    assert {s.kind for s in halves[1]} == {'yes or no', 'shape', 'colour'}
    assert not {s.image for s in halves[0]} & {s.image for s in halves[1]}
    assert demo.best_blind_of(halves[1])['yes or no'] == pytest.approx(82.5, abs=0.1)  # so well does who never looks
    with pytest.raises(ValueError, match='has the halves train and test'):
        demo.easy_vqa('validation')
