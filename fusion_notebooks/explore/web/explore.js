// The explorer: what the parts show follows the model. `model` is anywidget's or `still` (below): get, set, on, off, save_changes

function opening(share) {                                // the picture: as it came, and small for the strip
  const picture = { whole: null, small: null }
  async function open() {
    const given = share.get('picture')
    if (!given || !bytes(given).length) return false
    picture.whole = await createImageBitmap(new Blob([bytes(given)]))
    picture.small = await createImageBitmap(picture.whole, { resizeWidth: 96, resizeQuality: 'medium' })
    return true
  }
  return { picture, open }
}

function render({ model, el }) {
  const share = sharing(model), maps = atlas(share), root = make('div', 'fx'), { picture, open } = opening(share)
  const said = answers(share), shown = stage(share, maps, picture), layers = strip(share, maps, picture)
  const view = { root, canvas: shown.canvas, say: said.say, caption: () => root.querySelector('.fx-caption').textContent }
  const parts = [examples(share), question(share), said, controls(share, maps), shown, layers, tools(share, view)]
  root.append(...parts.map(p => p.element))
  el.append(make('style', '', CSS), root)

  const heard = []                                       // of [event, function]
  const hear = (keys, f) => { for (const k of keys.split(' ')) heard.push([`change:${k}`, f]) }
  const load = async () => { if (await open()) for (const p of parts) p.opened?.() }
  hear('maps palettes', maps.unpack)                     // first: the others read what is unpacked
  hear('picture', load)
  for (const p of [...parts, shown.chart]) for (const [keys, f] of Object.entries(p.when)) hear(keys, f)
  for (const [event, f] of heard) model.on(event, f)

  // A key pressed in the explorer, its ipywidgets included, is no shortcut of the notebook. Notebook 7 listens before any widget does: an arrow on a
  // slider would fold the section. The mark must be on what has the focus, since shortcuts match that first; the box of all is there once this has a size.
  const own = e => { e.target.dataset.lmSuppressShortcuts = 'true' }
  const watch = new ResizeObserver(() => (root.closest('.widget-vbox') ?? root).addEventListener('focusin', own))
  watch.observe(root)
  for (const f of new Set(heard.map(([, f]) => f))) f()
  return () => {
    watch.disconnect()
    for (const p of parts) p.close?.()
    for (const [event, f] of heard) model.off(event, f)
  }
}

// A model without a kernel: what was recorded (`cases`, one at a time, or one alone), and what the page changes in it
function still(data) {
  const listeners = {}
  const model = {
    get: k => data[k],
    save_changes() {},
    off() {},
    on(k, f) { (listeners[k] ??= []).push(f) },
    set(k, v) {
      if (data[k] === v) return
      data[k] = v
      for (const f of listeners[`change:${k}`] ?? []) f()
    },
  }
  let plain = data.answers
  const turn = () => {                                   // to another example
    const other = data.cases[data.example]
    plain = other.answers
    data.single = other.single
    for (const [k, v] of Object.entries({ ...other, chosen: [] })) model.set(k, v)
  }
  const masked = () => {
    const some = data.chosen?.length, found = some ? data.single?.[data.at] : null
    model.set('status', some && !found ? 'What the model says without this patch was not recorded.' : '')
    model.set('answers', found ? [...plain, found] : plain)
  }
  model.on('change:example', turn)
  if (data.cases) Object.assign(data, data.cases[data.example ??= 0], { chosen: [] })
  plain = (data.answers ?? []).filter(a => !a.cells)
  model.on('change:chosen', masked)
  return model
}
