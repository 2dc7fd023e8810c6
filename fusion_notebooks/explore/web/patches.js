// Choosing patches to mask, by mouse, finger or keyboard; what lies under the mouse

const HELP = 'Picture with map. Arrow keys move over the patches, space masks one, shift and arrows mask several, escape clears, page up and page down change the layer.'

function masking(share, maps, canvas, changed) {
  const state = { over: null, cursor: null, focused: false, area: null }
  let from = null                                        // where a drag began
  canvas.tabIndex = 0
  canvas.setAttribute('role', 'application')
  canvas.setAttribute('aria-label', HELP)

  function place(e) {                                    // pixels of the picture
    const b = canvas.getBoundingClientRect(), [w, h] = share.get('size', [1, 1])
    return [(e.clientX - b.left)*w/b.width, (e.clientY - b.top)*h/b.height]
  }

  const patch = ([x, y]) => share.get('boxes', []).findIndex(b => b[0] <= x && x < b[2] && b[1] <= y && y < b[3])
  const between = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])]
  const touched = a => share.get('boxes', []).flatMap((b, i) => b[0] < a[2] && b[2] > a[0] && b[1] < a[3] && b[3] > a[1] ? [i] : [])

  function choose(cells, add = null) {                   // several at once; again takes them back
    if (!cells.length) return
    const now = new Set(share.get('chosen', [])), on = add ?? !cells.every(i => now.has(i))
    if (share.still) return recall(cells[0])
    for (const i of cells) on ? now.add(i) : now.delete(i)
    share.put('chosen', [...now].sort((a, b) => a - b))
  }

  function recall(i) {                                   // of a recorded page: what is masked with that patch, or nothing again
    const block = share.get('single')[i]?.cells ?? [i], again = share.get('at') === i && share.get('chosen', []).length
    share.put('at', i)
    share.put('chosen', again ? [] : block)
  }

  function hover(i) {
    if (i === state.over) return
    state.over = i
    canvas.dispatchEvent(new Event('patch'))
  }

  canvas.addEventListener('pointerdown', e => {
    canvas.focus({ preventScroll: true })
    canvas.setPointerCapture(e.pointerId)
    from = { at: place(e), x: e.clientX, y: e.clientY }
  })
  canvas.addEventListener('pointermove', e => {
    const far = from && (state.area || Math.hypot(e.clientX - from.x, e.clientY - from.y) > 4)
    if (far) state.area = between(from.at, place(e))
    hover(patch(place(e)))
    if (far) changed()
  })
  canvas.addEventListener('pointerleave', () => hover(null))
  canvas.addEventListener('pointercancel', () => {
    from = state.area = null
    changed()
  })
  canvas.addEventListener('pointerup', e => {
    const began = from, area = state.area && between(from.at, place(e)), near = patch(place(e))
    from = state.area = null
    if (!began) return
    if (near >= 0) state.cursor = near
    if (area) choose(touched(area), share.still ? true : null)
    else if (near >= 0) choose([near])
    changed()
  })

  function move([down, right], mask) {                   // the cursor, and a mask along its way
    const [h, w] = share.get('shape', [1, 1]), at = state.cursor ?? 0, first = state.cursor == null
    const row = Math.floor(at/w) + (first ? 0 : down), column = at % w + (first ? 0 : right)
    if (row < 0 || row >= h || column < 0 || column >= w) return
    if (mask) choose([at], true)
    state.cursor = row*w + column
    if (mask) choose([state.cursor], true)
  }

  function key(e) {                                      // whether it was one of the canvas's own
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key]
    const turn = { PageUp: 1, PageDown: -1 }[e.key]
    if (step) move(step, e.shiftKey)
    else if (turn) share.put('layer', Math.min(maps.layers() - 1, Math.max(0, share.get('layer') + turn)))
    else if (e.key == ' ' || e.key == 'Enter') choose([state.cursor ??= 0])
    else if (e.key == 'Escape') share.put('chosen', [])
    else return false
    return true
  }

  canvas.addEventListener('keydown', e => {
    if (!key(e)) return
    e.preventDefault()
    e.stopPropagation()
    changed()
  })
  for (const name of ['focus', 'blur']) canvas.addEventListener(name, () => { state.focused = name == 'focus'; changed() })

  const where = i => `row ${Math.floor(i/share.get('shape')[1])}, column ${i % share.get('shape')[1]}`

  function at(seen) {                                    // the patch under the keyboard
    return state.cursor == null || !state.focused ? '' : ` Patch ${where(state.cursor)}: ${maps.said(seen, state.cursor)}.`
  }

  function under(seen, other) {                          // the patch under the mouse
    const i = state.over, b = share.get('boxes', [])[i]
    if (!b || !seen) return 'Point at a patch for its place and value; click or drag to mask.'
    const [left, top, right, bottom] = b.map(Math.round)
    const values = [seen, ...(other ? [other] : [])].map(l => `${other ? `layer ${l.layer}: ` : ''}${maps.said(l, i)}`)
    return `Patch ${where(i)} · pixels ${left}–${right} × ${top}–${bottom} · ${values.join(' · ')}`
  }
  return { state, at, under }
}
