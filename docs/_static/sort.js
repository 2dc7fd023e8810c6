// Tables of class "sortable": a click on a head, or Enter on it, sorts by that column
document.addEventListener('DOMContentLoaded', () => document.querySelectorAll('table.sortable th').forEach((th, i) => {
  const sort = () => {
    const body = th.closest('table').tBodies[0], up = th.ariaSort !== 'ascending', text = row => row.cells[th.cellIndex].textContent
    th.closest('tr').querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'))
    th.ariaSort = up ? 'ascending' : 'descending'
    body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1)*text(a).localeCompare(text(b), undefined, {numeric: true})))
  }
  th.tabIndex = 0; th.title = 'sort by this column'
  th.addEventListener('click', sort)
  th.addEventListener('keydown', e => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); sort() } })
}))
