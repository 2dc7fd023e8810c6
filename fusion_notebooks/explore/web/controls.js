// What is shown and how: the menu of maps, head, answer token, colours, blending, and what stands beside the picture

const STYLES = [['heat', 'colours'], ['light', 'light on what counts']]

function controls(share, maps) {
  const element = make('div', 'fx-controls'), about = make('p', 'fx-about')
  const menu = (words, key, number = false) => {
    const s = make('select')
    s.onchange = () => share.put(key, number ? Number(s.value) : s.value)
    element.append(labelled(words, s))
    return s
  }
  const kind = menu('Map', 'kind'), head = menu('Head', 'head', true), word = menu('Answer token', 'word', true), style = menu('Draw as', 'paint')
  const blend = range(0, 1, .05, v => share.put('blend', v)), common = make('input')
  common.type = 'checkbox'
  common.onchange = () => share.put('common', common.checked)
  kind.addEventListener('change', () => {                // the contrast begins with the one that refines
    const early = share.get('marks', {}).pre
    if (kind.value == 'contrast' && early != null) share.put('layer', early)
  })
  fill(style, STYLES)
  element.append(labelled('Picture', blend, 'fx-blend'), labelled('One scale for all layers', common), about)
  blend.setAttribute('aria-label', 'Blending: picture only to map only')
  blend.after(make('span', '', ' map'))

  function list() {
    fill(kind, maps.names().map(name => [name, maps.about(name).title]))
    fill(word, share.get('words', []).map((w, i) => [i, `${i + 1}: ${short(w, 20)}`]))
    show()
  }

  function show() {
    const heads = maps.word() ? 0 : maps.heads(), all = maps.about(maps.chosen()).whole ?? 'mean'
    fill(head, [[0, heads ? all : '–'], ...Array.from({ length: heads }, (_, i) => [i + 1, `head ${i}`])])
    kind.value = maps.chosen() ?? ''
    head.value = heads ? share.get('head', 0) : 0
    head.disabled = !heads
    word.value = maps.word()
    word.disabled = maps.chosen() != 'attention' || share.get('words', []).length < 2
    about.textContent = maps.about(maps.chosen()).about ?? ''
    style.value = share.get('paint', 'heat')
    blend.value = share.get('blend', 1)
    common.checked = share.get('common', false)
  }
  return { element, when: { 'maps words': list, 'kind head word paint blend common': show } }
}

// Every layer as a small picture; click one, or move along with the arrow keys
function strip(share, maps, picture) {
  const element = make('div', 'fx-strip')
  element.setAttribute('role', 'group')
  element.setAttribute('aria-label', 'All layers')
  let waiting = false

  function build() {
    if (element.children.length != maps.layers()) {
      element.replaceChildren(...Array.from({ length: maps.layers() }, (_, i) => {
        const b = pressed('', () => share.put('layer', i))
        b.append(make('canvas'), make('span', '', i))
        return b
      }))
    }
    name()
    draw()
  }

  function name() {
    for (const [i, b] of [...element.children].entries()) {
      const known = role(share, i)
      b.setAttribute('aria-label', `Layer ${i}${known && `, ${known}`}`)
      b.title = b.getAttribute('aria-label')
      b.classList.toggle('fx-fusion', known.includes('fusion layer'))
      b.classList.toggle('fx-review', known.includes('review layer'))
    }
    mark()
  }

  function mark() {
    for (const [i, b] of [...element.children].entries()) {
      b.setAttribute('aria-pressed', i === share.get('layer'))
      b.tabIndex = i === share.get('layer') ? 0 : -1
    }
  }

  function draw() {                                      // once per frame, however fast the slider moves
    if (waiting || !picture.small) return
    waiting = true
    requestAnimationFrame(() => {
      waiting = false
      const [w, h] = share.get('size', [1, 1])
      for (const [i, b] of [...element.children].entries()) {
        Object.assign(b.firstChild, { width: 96, height: Math.max(1, Math.round(96*h/w)) })
        maps.paint(b.firstChild, picture.small, i)
      }
    })
  }

  element.addEventListener('keydown', e => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key]
    if (!step) return
    e.preventDefault()
    e.stopPropagation()
    share.put('layer', Math.min(maps.layers() - 1, Math.max(0, share.get('layer') + step)))
    element.children[share.get('layer')]?.focus()
  })
  return { element, opened: draw, when: { maps: build, marks: name, layer: mark, 'kind head word paint blend common palettes boxes': draw } }
}
