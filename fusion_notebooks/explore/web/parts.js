// Small things that every part of the explorer uses. Whatever a person, a model or a data set said enters the page
// as text (textContent), never as HTML.

function bytes(x) {                                      // of a trait (DataView) or of a page (base64)
  if (typeof x == 'string') return Uint8Array.from(atob(x), c => c.charCodeAt(0))
  return new Uint8Array(x.buffer.slice(x.byteOffset, x.byteOffset + x.byteLength))
}

function base64(x) {
  let text = ''
  for (const b of bytes(x)) text += String.fromCharCode(b)
  return btoa(text)
}

function make(name, className = '', text = '') {
  const e = document.createElement(name)
  e.className = className
  e.textContent = text
  return e
}

function drawn(name, attributes, text = '') {            // a part of an SVG
  const e = document.createElementNS('http://www.w3.org/2000/svg', name)
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v)
  e.textContent = text
  return e
}

function pressed(text, act, className = '') {            // a button
  const b = make('button', className, text)
  b.type = 'button'
  b.onclick = act
  return b
}

function labelled(words, control, className = '') {  // named for itself too: a label's text has the menu's words in it
  control.setAttribute('aria-label', words)
  const label = make('label', className, words + ' ')
  label.append(control)
  return label
}

function fill(select, options) {                         // of [value, words]
  select.replaceChildren(...options.map(([value, words]) => {
    const o = make('option', '', words)
    o.value = value
    return o
  }))
}

function range(from, to, step, act) {
  const r = make('input')
  Object.assign(r, { type: 'range', min: from, max: to, step })
  r.oninput = () => act(Number(r.value))
  return r
}

const short = (text, n) => text.length > n ? text.slice(0, n - 1) + '…' : text
const several = (n, word) => `${n} ${word}${n == 1 ? '' : n > 1 || n == 0 ? (word.endsWith('ch') ? 'es' : 's') : ''}`
const number = x => Math.abs(x) >= 100 ? x.toFixed(0) : Math.abs(x) >= 10 ? x.toFixed(1) : x.toFixed(2)
const signed = x => (x < 0 ? '−' : '+') + number(Math.abs(x))

// What the parts share: reading and writing what the page and the kernel both know
function sharing(model) {
  return {
    get: (k, otherwise = null) => model.get(k) ?? otherwise,
    put(k, v) { model.set(k, v); model.save_changes() },
    has: k => model.get(k) != null,
    still: model.get('single') != null,                  // recorded: answers to patches, no kernel
  }
}

// What a layer is called: "fusion layer", "review layer", …
function role(share, layer) {
  const marks = share.get('marks', {})
  const roles = [
    (marks.fusion ?? []).includes(layer) && 'fusion layer',
    marks.review === layer && 'review layer',
    marks.pre === layer && 'early map of the contrast',
    marks.post === layer && 'late map of the contrast',
  ]
  return roles.filter(Boolean).join(', ')
}
