// Pictures from outside, and the view as a file

const MAX_BYTES = 8e6                                    // of a picture; the connection to a kernel refuses 10 MB
const SAVED = ['picture', 'size', 'shape', 'boxes', 'tokens', 'palettes', 'marks', 'maps', 'words', 'curves', 'question', 'truth', 'story', 'answers', 'crop',
  'chosen', 'layer', 'kind', 'head', 'word', 'paint', 'blend', 'common', 'other', 'single']

function tools(share, view) {
  const element = make('div', 'fx-tools')

  async function upload(file) {
    if (!file) return
    if (file.size > MAX_BYTES) return view.say(`${file.name} has ${(file.size/1e6).toFixed(1)} MB, more than the ${MAX_BYTES/1e6} allowed: save it smaller.`)
    share.put('upload', { name: file.name, data: new DataView(await file.arrayBuffer()) })
  }

  function uploads() {
    const pick = make('input'), stopped = e => { e.preventDefault(); e.stopPropagation() }
    Object.assign(pick, { type: 'file', accept: 'image/*', hidden: true })
    pick.onchange = () => { upload(pick.files[0]); pick.value = '' }
    element.append(pressed('Open a picture…', () => pick.click()), pick)
    view.root.addEventListener('paste', e => { if (e.clipboardData.files[0]) { stopped(e); upload(e.clipboardData.files[0]) } })
    view.root.addEventListener('dragover', stopped)
    view.root.addEventListener('drop', e => { stopped(e); upload(e.dataTransfer.files[0]) })
    return make('span', 'fx-dim', 'or paste, or drop one here')
  }

  const hint = share.get('uploads') ? uploads() : ''
  element.append(
    pressed('Unmask all', () => share.put('chosen', [])),
    pressed('Save as PNG', () => poster(share, view).toBlob(b => download(b, 'fusion.png'))),
    pressed('Save as HTML', () => download(new Blob([page(share)], { type: 'text/html' }), 'fusion.html')),
    hint,
  )
  return { element, when: {} }
}

function download(blob, name) {
  const a = make('a')
  a.href = URL.createObjectURL(blob)
  a.download = name
  a.click()
  setTimeout(() => URL.revokeObjectURL(a.href), 60_000)
}

// The question, the answers and the picture as they are shown, on one canvas
function poster(share, view) {
  const main = view.canvas, ready = share.get('answers', []), line = 30, wide = Math.max(main.width, 640), top = 60 + line*ready.length
  const canvas = make('canvas'), pen = canvas.getContext('2d')
  Object.assign(canvas, { width: wide, height: top + main.height + 2*line })
  pen.fillStyle = '#fff'
  pen.fillRect(0, 0, canvas.width, canvas.height)
  const write = (text, y, font) => {
    pen.font = `${font} system-ui, sans-serif`
    pen.fillStyle = '#111'
    pen.fillText(text, 12, y, wide - 24)
  }
  write(share.get('question', ''), 36, '600 22px')
  ready.forEach((a, i) => {
    const right = a.right == null ? '' : a.right ? '  ✓ right' : '  ✗ wrong'
    write(`${a.label}: ${a.text}${right}${a.p == null ? '' : `  (p = ${a.p.toFixed(3)})`}`, 66 + line*i, '16px')
  })
  pen.drawImage(main, (wide - main.width)/2, top)
  write(view.caption(), top + main.height + line, '14px')
  return canvas
}

// The view as a page of its own, which loads nothing and still has its sliders
function page(share) {
  const data = Object.fromEntries(SAVED.filter(share.has).map(k => [k, share.get(k)]))
  data.single ??= {}                                     // what is masked stays; other patches were not asked about
  data.status = ''
  const json = JSON.stringify(data, (_, v) => ArrayBuffer.isView(v) ? base64(v) : v).replaceAll('<', '\\u003c')
  const title = share.get('question', '').replaceAll('&', '&amp;').replaceAll('<', '&lt;')
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>${title}</title></head><body><main id="here"></main>
<script type="module">
${explorer}
const { render, still } = explorer()
render({ model: still(${json}), el: document.getElementById('here') })
<${'/'}script></body></html>
`
}
