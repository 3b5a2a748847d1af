// Copying a command, sorting the table, and what a point of the chart is. Without any of it the page is still whole.
for (const button of document.querySelectorAll('[data-copy]')) {
  button.hidden = !navigator.clipboard;
  button.addEventListener('click', async () => {
    await navigator.clipboard.writeText(button.parentElement.querySelector('code').textContent);
    button.textContent = 'Copied';
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  });
}
for (const button of document.querySelectorAll('th button')) {
  button.addEventListener('click', () => {
    const head = button.closest('th'), body = head.closest('table').tBodies[0];
    const column = [...head.parentElement.children].indexOf(head);
    const down = head.getAttribute('aria-sort') === 'ascending';
    for (const other of head.parentElement.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const key = (row) => row.cells[column].dataset.sort;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === '' || y === '') return (x === '') - (y === '');  // what is not known stays at the end
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    });
    body.append(...rows);
  });
}
for (const chart of document.querySelectorAll('.chart')) {
  const tip = chart.querySelector('.tip');
  for (const point of chart.querySelectorAll('.point')) {
    const row = [...document.querySelectorAll('tr[data-id]')].find((r) => r.dataset.id === point.dataset.id);
    const show = () => {
      tip.textContent = point.dataset.tip;
      const at = point.querySelector('.hit').getBoundingClientRect(), box = chart.getBoundingClientRect();
      tip.style.left = Math.max(0, Math.min(at.left - box.left + 22, box.width - tip.offsetWidth)) + 'px';
      tip.style.top = at.top - box.top + 22 + 'px';
      tip.classList.add('on');
      row?.classList.add('lit');
    };
    const hide = () => { tip.classList.remove('on'); row?.classList.remove('lit'); };
    point.addEventListener('pointerenter', show);
    point.addEventListener('focus', show);
    point.addEventListener('pointerleave', hide);
    point.addEventListener('blur', hide);
  }
}
