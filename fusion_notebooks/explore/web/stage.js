// The picture with the map over it, what is masked in it, and another layer or the curves beside it

function stage(share, maps, picture) {
  const element = make('div', 'fx-stage'), main = make('figure'), beside = make('figure', 'fx-beside'), chart = curves(share, maps)
  const canvas = make('canvas', 'fx-main'), other = make('canvas', 'fx-other'), ramp = make('div', 'fx-ramp')
  const hovered = make('p', 'fx-hover fx-dim'), caption = make('p', 'fx-caption')
  const layer = range(0, 0, 1, v => share.put('layer', v)), second = range(0, 0, 1, v => share.put('other', v))
  const shown = make('output'), secondShown = make('output'), turn = make('select')
  layer.classList.add('fx-layer')
  second.classList.add('fx-second')
  caption.setAttribute('aria-live', 'polite')
  fill(turn, [['curves', 'curves by layer'], ['layer', 'another layer']])
  turn.onchange = () => share.put('other', turn.value == 'layer' ? share.get('marks', {}).post ?? maps.layers() - 1 : -1)
  const line = (...parts) => { const p = make('div', 'fx-line'); p.append(...parts); return p }
  const secondLabel = labelled('Layer', second)
  secondLabel.append(secondShown)
  const firstLabel = labelled('Layer', layer)
  firstLabel.append(shown)
  main.append(line(firstLabel), canvas, ramp, caption, hovered)
  turn.setAttribute('aria-label', 'Beside the picture')
  beside.append(line(turn, secondLabel), other, chart.element)
  element.append(main, beside)
  const patches = masking(share, maps, canvas, () => { draw(); say() })

  function fit() {                                       // as many pixels as the screen has
    const [w, h] = share.get('size', [1, 1])
    for (const c of [canvas, other]) {
      c.style.aspectRatio = `${w}/${h}`
      const wide = Math.round((c.clientWidth || 400)*(window.devicePixelRatio || 1))
      c.width = wide
      c.height = Math.max(1, Math.round(wide*h/w))
    }
    draw()
  }

  function draw() {
    if (!picture.whole || !canvas.width) return
    const start = performance.now(), pen = maps.paint(canvas, picture.whole, share.get('layer', 0))
    decorate(share, maps, pen, patches.state)
    if (comparing()) decorate(share, maps, maps.paint(other, picture.whole, share.get('other')), patches.state)
    pen.getImageData(0, 0, 1, 1)                         // waits until it is drawn, so that the time is the whole time
    canvas.dataset.ms = (performance.now() - start).toFixed(2)
    canvas.dataset.draws = 1 + Number(canvas.dataset.draws ?? 0)
  }

  const comparing = () => share.get('other', -1) >= 0 && share.get('other') < maps.layers()

  function choose() {
    beside.classList.toggle('fx-comparing', comparing())
    turn.value = comparing() ? 'layer' : 'curves'
    second.max = layer.max = Math.max(maps.layers() - 1, 0)
    layer.value = share.get('layer', 0)
    second.value = Math.max(share.get('other', 0), 0)
    shown.textContent = ` ${share.get('layer', 0)}`
    secondShown.textContent = ` ${share.get('other', 0)}`
  }

  function legend(seen) {
    const colours = maps.palette(seen), bar = make('i'), ends = maps.ends(seen), stops = [0, 51, 102, 153, 204, 255].map(k => colours[k])
    const ground = share.get('paint') == 'light' ? '#fff' : '#888'
    bar.style.background = `linear-gradient(90deg, ${stops.join(',')}), ${ground}`
    ramp.replaceChildren(make('span', '', ends[0]), bar, make('span', '', ends[1]))
  }

  function say() {
    const i = share.get('layer', 0), seen = maps.look(i), [h, w] = share.get('shape', [1, 1]), known = role(share, i)
    if (!seen) { caption.textContent = ''; return }
    const about = maps.about(seen.name), head = maps.heads() && !maps.word() ? (share.get('head') ? `, head ${share.get('head') - 1}` : `, ${about.whole}`) : ''
    const word = maps.word() ? `, answer token ${maps.word() + 1}` : ''
    const masked = share.get('chosen', []).length, n = masked ? ` ${masked} of ${h*w} patches masked.` : ''
    caption.textContent = `Layer ${i}${known && ` (${known})`}: ${about.title}${head}${word}.${n}${patches.at(seen)}`
    hovered.textContent = patches.under(seen, comparing() ? maps.look(share.get('other')) : null)
    legend(seen)
  }

  const all = () => { choose(); draw(); say() }
  canvas.addEventListener('patch', () => { hovered.textContent = patches.under(maps.look(share.get('layer', 0)), comparing() ? maps.look(share.get('other')) : null); draw() })
  const watch = new ResizeObserver(fit)
  watch.observe(canvas)
  return {
    element, canvas, chart, opened: fit, close: () => watch.disconnect(),
    when: { 'size maps palettes marks layer other': all, 'boxes crop': draw, 'kind head word paint blend common chosen': () => { draw(); say() } },
  }
}

// Over the map: masked patches, the crop, the patch under keyboard or mouse, the area that is dragged
function decorate(share, maps, pen, state) {
  const s = pen.canvas.width/share.get('size', [1, 1])[0], boxes = share.get('boxes', []), dots = window.devicePixelRatio || 1
  const frame = (b, outer, inner, width, dash = []) => {
    for (const [colour, k] of [[outer, 2*width], [inner, width]]) {
      pen.setLineDash(dash)
      pen.strokeStyle = colour
      pen.lineWidth = k*dots
      pen.strokeRect(...maps.edges(b, s))
    }
    pen.setLineDash([])
  }
  for (const i of share.get('chosen', [])) cross(pen, maps.edges(boxes[i] ?? [0, 0, 0, 0], s))
  if (share.get('crop', []).length) {
    frame(share.get('crop'), '#fff', '#ff3d00', 2)
    tag(pen, 'crop', maps.edges(share.get('crop'), s), dots)
  }
  if (boxes[state.over]) frame(boxes[state.over], '#000', '#fff', 1)
  if (boxes[state.cursor] && state.focused) frame(boxes[state.cursor], '#000', '#56b4e9', 2, [6, 4])
  if (state.area) frame(state.area, '#000', '#fff', 1, [5, 3])
}

function tag(pen, word, [x, y], dots) {                  // on the upper left corner of a frame
  pen.font = `600 ${11*dots}px sans-serif`
  const wide = pen.measureText(word).width
  pen.fillStyle = '#fff'
  pen.fillRect(x, y, wide + 8*dots, 15*dots)
  pen.fillStyle = '#b02a00'
  pen.fillText(word, x + 4*dots, y + 11*dots)
}

function cross(pen, [x, y, w, h]) {                      // masked: dark, with a cross
  pen.fillStyle = 'rgba(0,0,0,.85)'
  pen.fillRect(x, y, w, h)
  pen.strokeStyle = '#fff'
  pen.lineWidth = 1
  pen.beginPath()
  pen.moveTo(x, y)
  pen.lineTo(x + w, y + h)
  pen.moveTo(x + w, y)
  pen.lineTo(x, y + h)
  pen.stroke()
}
