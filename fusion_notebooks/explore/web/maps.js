// The maps: unpacked once, and painted over the picture at any size.
// A map has title, about, unit ('× uniform', '× the general prompt', 'nats'), signed, and rows of `data`, in shares of `top`:
// (layers, cells), or (layers, 1 + heads, cells). `words` is (answer tokens, layers, cells), for all but the first token.

function atlas(share) {
  let maps = {}, palettes = {}

  function unpack() {
    maps = {}
    for (const [name, m] of Object.entries(share.get('maps', {}))) maps[name] = { ...m, data: new Int16Array(bytes(m.data).buffer) }
    palettes = { light: Array.from({ length: 256 }, (_, i) => `rgba(0,0,0,${1 - i/255})`) }
    for (const [name, p] of Object.entries(share.get('palettes', {}))) {
      const b = bytes(p)
      palettes[name] = Array.from({ length: 256 }, (_, i) => `rgba(${b[4*i]},${b[4*i + 1]},${b[4*i + 2]},${b[4*i + 3]/255})`)
    }
  }

  const names = () => Object.keys(maps).filter(k => maps[k].title)
  const layers = () => maps.attention?.shape[0] ?? 0
  const heads = () => maps[chosen()]?.shape.length == 3 ? maps[chosen()].shape[1] - 1 : 0

  function chosen() {
    const name = share.get('kind', 'attention')
    return maps[name] ? name : names()[0]
  }

  function word() {                                      // the answer token whose attention is shown
    return chosen() == 'attention' && maps.words ? share.get('word', 0) : 0
  }

  function row(m, layer) {
    if (m === maps.words) return word()*m.shape[1] + layer
    return m.shape.length == 3 ? layer*m.shape[1] + Math.min(share.get('head', 0), m.shape[1] - 1) : layer
  }

  function scale(m, at) {                                // from the numbers of a row to the unit
    return m.unit == '× uniform' && !m.signed ? m.shape.at(-1)/m.sum[at] : m.unit == '× uniform' ? m.shape.at(-1) : 1
  }

  // A layer of the map that is chosen: its values, their unit, and which value has the strongest colour
  function look(layer) {
    const name = chosen()
    if (!name || layer < 0 || layer >= layers()) return null
    const m = word() ? maps.words : maps[name], at = row(m, layer), cells = m.shape.at(-1)
    const top = i => m.top[row(m, i)]*scale(m, row(m, i))
    const limit = share.get('common') ? Math.max(...Array.from({ length: layers() }, (_, i) => top(i))) : top(layer)
    const value = cell => m.data[at*cells + cell]/32767*top(layer)
    return { layer, name, cells, limit, value, unit: maps[name].unit, signed: Boolean(maps[name].signed) }
  }

  function colour(seen, value) {                         // 0…255
    const part = seen.limit > 0 ? value/seen.limit : 0
    return Math.round(255*(seen.signed && share.get('paint') != 'light' ? (part + 1)/2 : Math.max(part, 0)))
  }

  function palette(seen) {
    return palettes[share.get('paint') == 'light' ? 'light' : seen.signed ? 'signed' : 'heat'] ?? palettes.light
  }

  const edges = (b, s) => [Math.round(b[0]*s), Math.round(b[1]*s), Math.round(b[2]*s) - Math.round(b[0]*s), Math.round(b[3]*s) - Math.round(b[1]*s)]

  // The picture, and the map of a layer over it
  function paint(canvas, picture, layer) {
    const pen = canvas.getContext('2d', { willReadFrequently: true }), seen = look(layer), boxes = share.get('boxes', [])
    pen.drawImage(picture, 0, 0, canvas.width, canvas.height)
    if (!seen) return pen
    const colours = palette(seen), s = canvas.width/share.get('size', [1, 1])[0]
    pen.globalAlpha = share.get('blend', 1)
    for (let i = 0; i < seen.cells; i++) {
      pen.fillStyle = colours[colour(seen, seen.value(i))]
      pen.fillRect(...edges(boxes[i], s))
    }
    pen.globalAlpha = 1
    return pen
  }

  function ends(seen) {                                  // of the scale, in words
    const most = number(seen.limit)
    return seen.signed ? [`−${most}`, `+${most} ${seen.unit}`] : ['0', `${most} ${seen.unit}`]
  }

  return {
    unpack, names, layers, heads, chosen, word, look, palette, paint, edges, ends,
    about: name => maps[name] ?? {},
    said: (seen, cell) => `${seen.signed ? signed(seen.value(cell)) : number(seen.value(cell))} ${seen.unit}`,
  }
}
