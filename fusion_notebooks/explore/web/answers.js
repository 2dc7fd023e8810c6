// Above the picture: the examples to choose from, the question, what was answered, and whether it is right

function examples(share) {
  const element = make('div', 'fx-examples')
  element.setAttribute('role', 'group')
  element.setAttribute('aria-label', 'Examples')

  function list() {
    element.replaceChildren(...share.get('examples', []).map((e, i) => {
      const b = pressed('', () => share.put('example', i)), picture = make('img')
      picture.src = `data:image/png;base64,${typeof e.picture == 'string' ? e.picture : base64(e.picture)}`
      picture.alt = ''
      picture.setAttribute('aria-hidden', 'true')  // the button has words
      b.append(picture, make('span', '', e.title))
      b.title = e.question
      b.setAttribute('aria-label', `${e.title}: ${e.question}`)
      return b
    }))
    mark()
  }

  function mark() {
    for (const [i, b] of [...element.children].entries()) b.setAttribute('aria-pressed', i === share.get('example', -1))
  }
  return { element, when: { examples: list, example: mark } }
}

function question(share) {
  const element = make('div', 'fx-question'), asked = make('p', 'fx-asked'), truth = make('p', 'fx-truth'), story = make('p', 'fx-story')
  asked.setAttribute('role', 'heading')
  asked.setAttribute('aria-level', '3')
  element.append(asked, truth, story)

  function ask() {
    asked.textContent = share.get('question', '')
    truth.textContent = share.get('truth') ? `Correct answer: ${share.get('truth')}` : ''
    story.textContent = share.get('story', '')
  }
  return { element, when: { 'question truth story': ask } }
}

function answers(share) {
  const element = make('div', 'fx-answers'), table = make('table'), status = make('p', 'fx-dim')
  table.setAttribute('aria-label', 'Answers')
  table.setAttribute('aria-live', 'polite')
  status.setAttribute('role', 'status')
  element.append(table, status)

  function line(a) {
    const tr = make('tr'), said = make('td', 'fx-said'), p = make('td', 'fx-p'), bar = make('span', 'fx-bar'), part = make('i')
    tr.dataset.label = a.label
    said.append(make('span', 'fx-text', a.text || '∅'))
    if (a.right != null) said.append(' ', make('span', a.right ? 'fx-right' : 'fx-wrong', a.right ? '✓ right' : '✗ wrong'))
    if (a.p != null) {
      part.style.width = `${100*a.p}%`
      bar.append(part)
      p.append(bar, make('span', 'fx-prob', a.p.toFixed(3)))
    }
    tr.append(make('td', 'fx-dim', a.label), said, p, make('td', 'fx-note', a.note ?? ''))
    return tr
  }

  const tell = () => table.replaceChildren(...share.get('answers', []).map(line))
  const say = () => { status.textContent = share.get('status', '') }
  return { element, say: words => { status.textContent = words }, when: { answers: tell, status: say } }
}
