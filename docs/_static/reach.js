// What scrolls within itself can be reached by keyboard
const reach = () => document.querySelectorAll('pre, .cell_output, .wide').forEach(block => {
  if (block.scrollWidth > block.clientWidth) block.tabIndex = 0
  else block.removeAttribute('tabindex')
})
document.addEventListener('DOMContentLoaded', reach)
window.addEventListener('resize', reach)
