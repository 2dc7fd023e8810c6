// The explorer's canvas: a picture with a map over it, what is masked in it, curves by layer, answers.
// Plain ES module, no library, no network. `model` is anywidget's or `still` (below): get, set, on, off, save_changes.
// Whatever a person, a model or a data set said enters the page as text (textContent), never as HTML.

const KINDS = ['attention', 'early', 'late', 'contrast', 'relative']
const SAYS = ['attention', 'attention, pre-fusion layer', 'attention, post-fusion layer', 'contrast: post-fusion − this layer', 'relative: question / general prompt']
const MAX_BYTES = 8e6                                   // of a picture; the connection to a kernel refuses 10 MB

const CSS = `
.fx { --ink: var(--jp-ui-font-color1, var(--color-foreground-primary, CanvasText)); --dim: var(--jp-ui-font-color2, var(--color-foreground-secondary, GrayText));
  --line: var(--jp-border-color1, var(--color-background-border, #8888)); --ground: var(--jp-layout-color1, var(--color-background-primary, Canvas));
  color: var(--ink); font: 13px/1.4 var(--jp-ui-font-family, system-ui, sans-serif); display: flex; flex-wrap: wrap; gap: 12px 20px; align-items: flex-start; }
.fx > div { flex: 1 1 340px; min-width: 0; max-width: 480px; }
.fx > .fx-controls { flex-basis: 100%; max-width: none; display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center; }
.fx-controls input { vertical-align: middle; width: 14em; }
.fx canvas { display: block; width: 100%; touch-action: none; cursor: crosshair; border-radius: 3px; }
.fx :focus-visible { outline: 3px solid #56b4e9; outline-offset: 1px; }
.fx svg { width: 100%; display: block; overflow: visible; cursor: pointer; }
.fx svg text { fill: var(--ink); font-size: 11px; } .fx svg .dim { fill: var(--dim); font-size: 10px; }
.fx button { font: inherit; color: var(--ink); background: var(--ground); border: 1px solid var(--line); border-radius: 3px; padding: 1px 7px; margin: 0 4px 4px 0; cursor: pointer; }
.fx .fx-fusion { border-left: 5px solid #e0b000; } .fx .fx-review { border-left: 5px solid #cc79a7; }
.fx table { border-collapse: collapse; width: 100%; margin: 4px 0 8px; } .fx td { padding: 2px 8px 2px 0; text-align: left; border: 0; border-bottom: 1px solid var(--line); vertical-align: top; background: none; color: var(--ink); }
.fx td.fx-said { font-weight: 600; overflow-wrap: anywhere; } .fx td.fx-p { white-space: nowrap; font-variant-numeric: tabular-nums; }
.fx .fx-bar { display: inline-block; width: 48px; height: 8px; border: 1px solid var(--line); margin-right: 6px; } .fx .fx-bar i { display: block; height: 100%; background: #0072b2; }
.fx p { margin: 4px 0; min-height: 1.4em; } .fx .fx-dim { color: var(--dim); } .fx .fx-ramp { display: flex; align-items: center; gap: 6px; color: var(--dim); font-size: 11px; } .fx .fx-ramp i { flex: 1; height: 8px; border-radius: 2px; }
`

const bytes = x => x == null ? null : typeof x == 'string' ? Uint8Array.from(atob(x), c => c.charCodeAt(0)) : new Uint8Array(x.buffer.slice(x.byteOffset, x.byteOffset + x.byteLength))
const make = (name, className = '', text = '') => { const e = document.createElement(name); e.className = className; e.textContent = text; return e }
const drawn = (name, attributes, text) => { const e = document.createElementNS('http://www.w3.org/2000/svg', name); for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v); if (text != null) e.textContent = text; return e }
const short = (text, n) => text.length > n ? text.slice(0, n - 1) + '…' : text

export function render({ model, el }) {
  const get = k => model.get(k), put = (k, v) => { model.set(k, v); model.save_changes() }
  const root = make('div', 'fx'), left = make('div'), right = make('div')
  const canvas = make('canvas'), pen = canvas.getContext('2d', { willReadFrequently: true }), caption = make('p'), ramp = make('div', 'fx-ramp'), status = make('p', 'fx-dim')
  const answers = make('table'), chips = make('div'), chart = drawn('svg', { role: 'img' }), tools = make('div')
  const style = make('style', '', CSS)
  canvas.tabIndex = 0
  canvas.setAttribute('role', 'application')
  canvas.setAttribute('aria-label', 'Picture with attention map. Arrow keys move over the patches, space masks one, shift and arrows mask several, escape clears, page up and page down change the layer.')
  caption.setAttribute('aria-live', 'polite'); status.setAttribute('role', 'status')
  answers.setAttribute('aria-label', 'Answers')
  // the caption last: its length changes, and buttons must not move under a click
  left.append(canvas, ramp, tools, caption); right.append(answers, status, chips, chart); root.append(left, right); el.append(style, root)

  let grey = null, maps = {}, paint = {}, cursor = null, drag = null
  const still = () => get('single') != null              // recorded: answers to single patches, no kernel
  const shape = () => get('shape') ?? [1, 1]
  const layers = () => maps.attention?.shape[0] ?? 0

  // what is shown

  function unpack() {
    maps = {}
    for (const [name, m] of Object.entries(get('maps') ?? {})) maps[name] = { ...m, data: new Int16Array(bytes(m.data).buffer) }
    paint = {}
    for (const [name, p] of Object.entries(get('palettes') ?? {})) {
      const b = bytes(p)
      paint[name] = Array.from({ length: 256 }, (_, i) => `rgba(${b[4*i]},${b[4*i + 1]},${b[4*i + 2]},${b[4*i + 3]/255})`)
    }
  }

  async function open() {
    const data = bytes(get('picture')), [w, h] = get('size') ?? [1, 1]
    if (!data?.length) return
    const image = await createImageBitmap(new Blob([data]))
    grey = new OffscreenCanvas(image.width, image.height)
    const g = grey.getContext('2d')
    g.filter = 'grayscale(1)'; g.drawImage(image, 0, 0)
    canvas.style.aspectRatio = `${w}/${h}`
    fit()
  }

  function fit() {                                       // as many pixels as the screen has
    const [w, h] = get('size') ?? [1, 1], wide = Math.round((canvas.clientWidth || 400)*(window.devicePixelRatio || 1))
    canvas.width = wide; canvas.height = Math.max(1, Math.round(wide*h/w))
    draw()
  }

  function current() {                                   // map, its row, its palette
    const kind = KINDS[get('kind') ?? 0], m = maps[kind] ?? maps.attention
    if (!m) return null
    const signed = m === maps.contrast, row = m.shape.length == 3 ? get('layer')*m.shape[1] + (get('head') ?? 0) : get('layer')
    return { m, row, signed, kind }
  }

  function value(cell) { const c = current(), n = c.m.shape.at(-1); return c.m.data[c.row*n + cell]/32767*c.m.top[c.row] }

  function draw() {
    if (!canvas.width || !grey) return
    const start = performance.now(), [w, h] = get('size'), s = canvas.width/w, boxes = get('boxes') ?? []
    const edge = b => [Math.round(b[0]*s), Math.round(b[1]*s), Math.round(b[2]*s) - Math.round(b[0]*s), Math.round(b[3]*s) - Math.round(b[1]*s)]
    const frame = (b, outer, inner, width, dash = []) => { for (const [colour, k] of [[outer, 2*width], [inner, width]]) { pen.setLineDash(dash); pen.strokeStyle = colour; pen.lineWidth = k*(window.devicePixelRatio || 1); pen.strokeRect(...edge(b)) } pen.setLineDash([]) }
    pen.drawImage(grey, 0, 0, canvas.width, canvas.height)
    const c = current()
    if (c) {
      const n = c.m.shape.at(-1), colours = paint[c.signed ? 'signed' : 'heat'], at = c.row*n
      for (let i = 0; i < n; i++) {
        const v = c.m.data[at + i]/32767
        pen.fillStyle = colours[Math.round(255*(c.signed ? (v + 1)/2 : Math.max(v, 0)))]
        pen.fillRect(...edge(boxes[i]))
      }
    }
    for (const i of get('chosen') ?? []) {               // masked: dark, with a cross
      const [x, y, a, b] = edge(boxes[i] ?? [0, 0, 0, 0])
      pen.fillStyle = 'rgba(0,0,0,.8)'; pen.fillRect(x, y, a, b)
      pen.strokeStyle = '#fff'; pen.lineWidth = 1; pen.beginPath(); pen.moveTo(x, y); pen.lineTo(x + a, y + b); pen.moveTo(x + a, y); pen.lineTo(x, y + b); pen.stroke()
    }
    if (get('crop')?.length) frame(get('crop'), '#fff', '#ff3d00', 2)
    if (cursor != null && boxes[cursor] && document.activeElement === canvas) frame(boxes[cursor], '#000', '#56b4e9', 2, [6, 4])
    if (drag?.to) frame([Math.min(drag.from[0], drag.to[0]), Math.min(drag.from[1], drag.to[1]), Math.max(drag.from[0], drag.to[0]), Math.max(drag.from[1], drag.to[1])], '#000', '#fff', 1, [5, 3])
    pen.getImageData(0, 0, 1, 1)                         // waits until it is drawn, so that the time is the whole time
    canvas.dataset.ms = (performance.now() - start).toFixed(2)
    canvas.dataset.draws = 1 + Number(canvas.dataset.draws ?? 0)
  }

  function say() {
    const c = current(), i = get('layer'), marks = get('marks') ?? {}, [h, w] = shape()
    if (!c) { caption.textContent = ''; return }
    const uniform = 1/(get('tokens') || 1), top = c.m.top[c.row]
    const scale = c.m === maps.relative ? `${top.toFixed(1)}` : top > 0 ? `${(top/(c.signed ? 1 : c.m.sum[c.row])/uniform).toFixed(1)} × uniform` : 'nothing'
    const head = c.m.shape.length == 3 ? (get('head') ? `, head ${get('head') - 1}` : ', mean over heads') : ''
    const role = [(marks.fusion ?? []).includes(i) && 'fusion layer', marks.review === i && 'review layer', marks.pre === i && 'pre-fusion', marks.post === i && 'post-fusion'].filter(Boolean).join(', ')
    const here = cursor == null || document.activeElement !== canvas ? '' : ` Patch row ${Math.floor(cursor/w)}, column ${cursor % w}.`
    const masked = (get('chosen') ?? []).length
    caption.textContent = `Layer ${i}${role && ` (${role})`}: ${SAYS[KINDS.indexOf(c.kind)]}${head}.${masked ? ` ${masked} of ${h*w} patches masked.` : ''}${here}`
    const colours = paint[c.signed ? 'signed' : 'heat'], bar = make('i'), ends = c.signed ? [`−${scale}`, `+${scale}`] : ['0', scale]
    bar.style.background = `linear-gradient(90deg, ${[0, 51, 102, 153, 204, 255].map(k => colours[k]).join(',')}), #888`
    ramp.replaceChildren(make('span', '', ends[0]), bar, make('span', '', ends[1]))
  }

  function tell() {
    answers.replaceChildren(...(get('answers') ?? []).map(a => {
      const tr = make('tr'), p = make('td', 'fx-p'), bar = make('span', 'fx-bar'), fill = make('i')
      tr.append(make('td', 'fx-dim', a.label), make('td', 'fx-said', a.text))
      if (a.p != null) { fill.style.width = `${100*a.p}%`; bar.append(fill); p.append(bar, a.p.toFixed(3)) }
      tr.append(p, make('td', 'fx-dim', a.note ?? ''))
      tr.dataset.label = a.label
      return tr
    }))
    status.textContent = get('status') ?? ''
  }

  // curves

  const W = 460, H = 96, L = 44, T = 26
  const across = i => L + (i + .5)*(W - L)/Math.max(layers(), 1)

  function curves() {
    const panels = get('curves') ?? [], marks = get('marks') ?? {}, n = layers(), wide = (W - L)/Math.max(n, 1)
    chart.replaceChildren(); chart.setAttribute('viewBox', `0 0 ${W} ${panels.length*(H + T) + 22}`)
    chart.setAttribute('aria-label', panels.map(p => p.title).join('; '))
    if (!n || !panels.length) return
    const bottom = panels.length*(H + T)
    for (const i of marks.fusion ?? []) chart.append(drawn('rect', { x: across(i) - wide/2, y: 4, width: wide, height: bottom - 4, fill: '#f0e442', opacity: .38 }))
    if (marks.review != null) chart.append(drawn('line', { x1: across(marks.review), x2: across(marks.review), y1: 4, y2: bottom, stroke: '#cc79a7', 'stroke-width': 2.5, 'stroke-dasharray': '5 3' }))
    chart.append(drawn('rect', { class: 'now', x: across(get('layer')) - wide/2, y: 4, width: wide, height: bottom - 4, fill: 'none', stroke: 'currentColor', 'stroke-width': 1.5, rx: 2 }))
    panels.forEach((p, k) => {
      const top = k*(H + T) + T - 4, values = p.values.filter(v => v != null), all = p.base == null ? values : [...values, p.base]
      const low = p.low ?? Math.min(...all), high = p.high ?? Math.max(...all), y = v => top + 14 + (H - 26)*(1 - (v - low)/(high - low || 1))
      chart.append(drawn('text', { x: 2, y: top - 2 }, p.title))
      for (const v of [low, high]) chart.append(drawn('text', { class: 'dim', x: L - 6, y: y(v) + 3, 'text-anchor': 'end' }, Math.abs(v) >= 10 ? v.toFixed(0) : (Math.abs(v) < .005 ? 0 : v).toFixed(2)), drawn('line', { x1: L - 3, x2: W, y1: y(v), y2: y(v), stroke: 'currentColor', opacity: .18 }))
      if (p.base != null) chart.append(drawn('line', { x1: L, x2: W, y1: y(p.base), y2: y(p.base), stroke: 'currentColor', opacity: .7, 'stroke-dasharray': '2 3' }))
      chart.append(drawn('polyline', { fill: 'none', stroke: p.colour, 'stroke-width': 2, points: p.values.map((v, i) => v == null ? '' : `${across(i)},${y(v)}`).join(' ') }))
      p.values.forEach((v, i) => {
        if (v == null) return
        const dot = drawn('circle', { cx: across(i), cy: y(v), r: 3.5, fill: p.colour, stroke: 'currentColor', 'stroke-width': .6 }), word = p.labels?.[i]
        dot.append(drawn('title', {}, `layer ${i}: ${v.toFixed(3)}${word ? `, “${word}”` : ''}`)); chart.append(dot)
        const room = Math.max(1, Math.floor(wide*(p.labels?.slice(i + 1).findIndex(l => l !== word) + 1 || n - i)/6.5))
        if (word && word !== p.labels[i - 1] && word !== p.usual) chart.append(drawn('text', { x: across(i), y: y(v) - 6 < top + 6 ? y(v) + 14 : y(v) - 6, 'text-anchor': 'middle' }, short(word, Math.max(room, 6))))
      })
    })
    const step = Math.ceil(n/16)
    for (let i = 0; i < n; i += step) chart.append(drawn('text', { class: 'dim', x: across(i), y: bottom + 12, 'text-anchor': 'middle' }, i))
    chart.append(drawn('text', { class: 'dim', x: 2, y: bottom + 12 }, 'layer'))
  }

  function mark() {
    const marks = get('marks') ?? {}
    const chip = (text, layer, kind, className = '') => { const b = make('button', className, text); b.type = 'button'; b.onclick = () => { put('kind', kind); put('layer', layer) }; return b }
    chips.replaceChildren(...(marks.fusion ?? []).map(i => chip(`fusion layer ${i}`, i, 0, 'fx-fusion')), ...(marks.review == null ? [] : [chip(`review layer ${marks.review}`, marks.review, 0, 'fx-review')]),
      ...(marks.pre == null ? [] : [chip(`early (layer ${marks.pre})`, marks.pre, 1), chip(`late (layer ${marks.post})`, marks.post, 2), chip('contrast', marks.pre, 3)]))
  }

  chart.addEventListener('click', e => {
    const box = chart.getBoundingClientRect(), i = Math.floor(((e.clientX - box.left)*W/box.width - L)/((W - L)/layers()))
    if (i >= 0 && i < layers()) put('layer', i)
  })

  // patches

  const place = e => { const b = canvas.getBoundingClientRect(), [w, h] = get('size'); return [(e.clientX - b.left)*w/b.width, (e.clientY - b.top)*h/b.height] }
  const inside = (b, x, y) => b[0] <= x && x < b[2] && b[1] <= y && y < b[3]

  function choose(cells, add = null) {                   // several at once; again takes them back
    if (!cells.length) return
    const now = new Set(get('chosen') ?? []), on = add ?? !cells.every(i => now.has(i))
    if (still()) { now.clear(); cells = cells.slice(0, 1) }
    for (const i of cells) on ? now.add(i) : now.delete(i)
    put('chosen', [...now].sort((a, b) => a - b))
  }

  canvas.addEventListener('pointerdown', e => { canvas.focus(); canvas.setPointerCapture(e.pointerId); drag = { from: place(e), x: e.clientX, y: e.clientY } })
  canvas.addEventListener('pointermove', e => { if (drag && (drag.to || Math.hypot(e.clientX - drag.x, e.clientY - drag.y) > 4)) { drag.to = place(e); draw() } })
  canvas.addEventListener('pointercancel', () => { drag = null; draw() })
  canvas.addEventListener('pointerup', e => {
    const boxes = get('boxes') ?? [], [x, y] = place(e), start = drag
    drag = null
    if (!start) return
    const near = boxes.findIndex(b => inside(b, x, y))
    if (near >= 0) cursor = near
    if (!start.to) { choose(near < 0 ? [] : [near]); draw(); return say() }
    const area = [Math.min(x, start.from[0]), Math.min(y, start.from[1]), Math.max(x, start.from[0]), Math.max(y, start.from[1])]
    choose(boxes.flatMap((b, i) => b[0] < area[2] && b[2] > area[0] && b[1] < area[3] && b[3] > area[1] ? [i] : []), still() ? true : null)   // whatever it touches
    draw(); say()
  })
  canvas.addEventListener('keydown', e => {
    const [h, w] = shape(), step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key]
    const turn = { PageUp: 1, PageDown: -1 }[e.key]
    if (step) {
      const at = cursor ?? 0, row = Math.floor(at/w) + (cursor == null ? 0 : step[0]), column = at % w + (cursor == null ? 0 : step[1])
      if (row >= 0 && row < h && column >= 0 && column < w) { if (e.shiftKey) choose([at], true); cursor = row*w + column; if (e.shiftKey) choose([cursor], true) }
    } else if (turn) put('layer', Math.min(layers() - 1, Math.max(0, get('layer') + turn)))
    else if (e.key == ' ' || e.key == 'Enter') { cursor ??= 0; choose([cursor]) }
    else if (e.key == 'Escape') put('chosen', [])
    else return
    e.preventDefault(); e.stopPropagation(); draw(); say()
  })
  canvas.addEventListener('focus', () => { draw(); say() })
  canvas.addEventListener('blur', () => { draw(); say() })

  // pictures from outside

  async function upload(file) {
    if (!file) return
    if (file.size > MAX_BYTES) { status.textContent = `${file.name} has ${(file.size/1e6).toFixed(1)} MB, more than the ${MAX_BYTES/1e6} allowed: save it smaller.`; return }
    put('upload', { name: file.name, data: new DataView(await file.arrayBuffer()) })
  }
  if (get('uploads')) {
    const pick = make('input'), button = make('button', '', 'Open a picture…'), clear = make('button', '', 'Unmask all')
    pick.type = 'file'; pick.accept = 'image/*'; pick.hidden = true
    pick.onchange = () => { upload(pick.files[0]); pick.value = '' }
    button.type = clear.type = 'button'; button.onclick = () => pick.click(); clear.onclick = () => put('chosen', [])
    tools.append(button, clear, pick, make('span', 'fx-dim', 'or paste, or drop one here'))
    root.addEventListener('paste', e => { const f = [...e.clipboardData.files][0]; if (f) { e.preventDefault(); e.stopPropagation(); upload(f) } })
    root.addEventListener('dragover', e => { e.preventDefault(); e.stopPropagation() })
    root.addEventListener('drop', e => { e.preventDefault(); e.stopPropagation(); upload(e.dataTransfer.files[0]) })
  }

  // controls of a recorded example; in a notebook they are ipywidgets

  if (still()) {
    const bar = make('div', 'fx-controls'), labelled = (text, e) => { const l = make('label', '', text + ' '); l.append(e); bar.append(l); return e }
    const select = (text, key, options) => { const s = labelled(text, make('select')); options.forEach((o, i) => { const x = make('option', '', o); x.value = i; s.append(x) }); s.onchange = () => put(key, Number(s.value)); model.on(`change:${key}`, () => { s.value = get(key) }); return s }
    const layer = labelled('Layer', make('input')), m = get('maps').attention
    layer.type = 'range'; layer.min = 0; layer.max = m.shape[0] - 1; layer.value = get('layer')
    layer.oninput = () => put('layer', Number(layer.value)); model.on('change:layer', () => { layer.value = get('layer') })
    select('Map', 'kind', KINDS); select('Head', 'head', ['mean', ...Array.from({ length: m.shape[1] - 1 }, (_, i) => `head ${i}`)])
    root.prepend(bar)
    const plain = get('answers')
    model.on('change:chosen', () => { const i = get('chosen')[0], a = get('single')[i]; put('answers', a ? [...plain, { label: 'patch masked', ...a }] : plain) })
  }

  const on = {
    picture: open, size: fit, boxes: draw, palettes: () => { unpack(); draw() },
    maps: () => { unpack(); draw(); say(); curves() }, crop: draw, head: () => { draw(); say() },
    layer: () => {
      const marks = get('marks') ?? {}, fixed = { 1: marks.pre, 2: marks.post }[get('kind')]
      if (fixed != null && fixed !== get('layer')) put('kind', 0)                  // another layer is neither early nor late
      draw(); say(); const now = chart.querySelector('.now'); if (now) now.setAttribute('x', across(get('layer')) - (W - L)/layers()/2)
    },
    kind: () => { const marks = get('marks') ?? {}, to = { 1: marks.pre, 2: marks.post, 3: marks.pre }[get('kind')]; if (to != null && to !== get('layer')) put('layer', to); draw(); say() },
    chosen: () => { draw(); say() }, marks: () => { mark(); curves(); say() }, curves, answers: tell, status: tell,
  }
  for (const [k, f] of Object.entries(on)) model.on(`change:${k}`, f)
  // A key pressed in the explorer, its ipywidgets included, is no shortcut of the notebook. Notebook 7 listens before any widget does: an arrow on a slider
  // would fold the section. The mark must be on what has the focus, since shortcuts match that first; the box of all is there once the canvas has a size.
  const own = e => { e.target.dataset.lmSuppressShortcuts = 'true' }
  const watch = new ResizeObserver(() => { (root.closest('.widget-vbox') ?? root).addEventListener('focusin', own); fit() })
  watch.observe(canvas)
  unpack(); tell(); mark(); curves(); say(); open()
  return () => { watch.disconnect(); for (const [k, f] of Object.entries(on)) model.off(`change:${k}`, f) }
}

// a model without a kernel: what was recorded, and what the page changes in it
export function still(data) {
  const listeners = {}
  return {
    get: k => data[k], save_changes() {}, off() {}, on(k, f) { (listeners[k] ??= []).push(f) },
    set(k, v) { if (data[k] === v) return; data[k] = v; for (const f of listeners[`change:${k}`] ?? []) f() },
  }
}

export default { render }
