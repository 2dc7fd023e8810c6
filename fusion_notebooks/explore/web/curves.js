// Curves by layer, as one SVG; a click goes to a layer

function curves(share, maps) {
  const W = 460, H = 96, LEFT = 44, HEAD = 26
  const element = drawn('svg', { role: 'img', class: 'fx-curves' })
  const wide = () => (W - LEFT)/Math.max(maps.layers(), 1)
  const across = i => LEFT + (i + .5)*wide()
  const bottom = () => share.get('curves', []).length*(H + HEAD)
  const add = (name, attributes, text) => element.append(drawn(name, attributes, text))
  const level = v => Math.abs(v) >= 10 ? v.toFixed(0) : (Math.abs(v) < .005 ? 0 : v).toFixed(2)

  function backdrop() {                                  // the layers with a name, and the one that is shown
    const marks = share.get('marks', {}), high = bottom() - 4
    for (const i of marks.fusion ?? []) add('rect', { x: across(i) - wide()/2, y: 4, width: wide(), height: high, fill: '#f0e442', opacity: .38 })
    if (marks.review != null) {
      const x = across(marks.review)
      add('line', { x1: x, x2: x, y1: 4, y2: bottom(), stroke: '#cc79a7', 'stroke-width': 2.5, 'stroke-dasharray': '5 3' })
    }
    add('rect', { class: 'now', x: 0, y: 4, width: wide(), height: high, fill: 'none', stroke: 'currentColor', 'stroke-width': 1.5, rx: 2 })
  }

  function panel(p, top) {
    const known = p.values.filter(v => v != null), all = p.base == null ? known : [...known, p.base]
    const low = p.low ?? Math.min(...all), high = p.high ?? Math.max(...all)
    const y = v => top + 14 + (H - 26)*(1 - (v - low)/(high - low || 1))
    add('text', { x: 2, y: top - 2 }, p.title)
    for (const v of [low, high]) {
      add('text', { class: 'dim', x: LEFT - 6, y: y(v) + 3, 'text-anchor': 'end' }, level(v))
      add('line', { x1: LEFT - 3, x2: W, y1: y(v), y2: y(v), stroke: 'currentColor', opacity: .18 })
    }
    if (p.base != null) add('line', { x1: LEFT, x2: W, y1: y(p.base), y2: y(p.base), stroke: 'currentColor', opacity: .7, 'stroke-dasharray': '2 3' })
    const points = p.values.map((v, i) => v == null ? '' : `${across(i)},${y(v)}`).join(' ')
    add('polyline', { fill: 'none', stroke: p.colour, 'stroke-width': 2, points })
    p.values.forEach((v, i) => v != null && point(p, i, v, y(v), top))
  }

  function point(p, i, v, y, top) {
    const dot = drawn('circle', { cx: across(i), cy: y, r: 3.5, fill: p.colour, stroke: 'currentColor', 'stroke-width': .6 })
    const word = p.labels?.[i]
    dot.append(drawn('title', {}, `layer ${i}: ${v.toFixed(3)}${word ? ` “${short(word, 200)}”` : ''}`))
    element.append(dot)
    if (!word || word === p.labels[i - 1] || word === p.usual) return
    const left = p.labels.slice(i + 1).findIndex(l => l !== word), room = Math.floor(wide()*(left < 0 ? p.labels.length - i : left + 1)/6.5)
    add('text', { x: across(i), y: y - 6 < top + 6 ? y + 14 : y - 6, 'text-anchor': 'middle' }, short(word, Math.max(room, 6)))
  }

  function axis() {
    const n = maps.layers(), step = Math.ceil(n/16)
    for (let i = 0; i < n; i += step) add('text', { class: 'dim', x: across(i), y: bottom() + 12, 'text-anchor': 'middle' }, i)
    add('text', { class: 'dim', x: 2, y: bottom() + 12 }, 'layer')
    const { fusion = [], review } = share.get('marks', {}), named = ['frame: shown']
    if (fusion.length) named.push('yellow: fusion layers')
    if (review != null) named.push('dashed: review layer')
    add('text', { class: 'dim', x: W, y: bottom() + 26, 'text-anchor': 'end' }, named.join(' · '))
  }

  function draw() {
    const panels = share.get('curves', [])
    element.replaceChildren()
    element.setAttribute('viewBox', `0 0 ${W} ${3*(H + HEAD) + 34}`)      // room for all, so that nothing moves later
    element.setAttribute('aria-label', panels.map(p => p.title).join('; ') || 'Curves by layer')
    if (!maps.layers() || !panels.length) return
    backdrop()
    panels.forEach((p, k) => panel(p, k*(H + HEAD) + HEAD - 4))
    axis()
    move()
  }

  function move() {
    element.querySelector('.now')?.setAttribute('x', across(share.get('layer', 0)) - wide()/2)
  }

  element.addEventListener('click', e => {
    const box = element.getBoundingClientRect(), i = Math.floor(((e.clientX - box.left)*W/box.width - LEFT)/wide())
    if (i >= 0 && i < maps.layers()) share.put('layer', i)
  })
  return { element, when: { 'maps curves marks': draw, layer: move } }
}
