'use strict';
document.addEventListener('input', event => {
  if (event.target.type === 'range') event.target.parentNode.style.setProperty('--x', event.target.value + '%');
});
document.querySelector('nav').addEventListener('click', event => {
  const link = event.target.closest('a');
  if (!link) return;  // by hand, because in a frame's own document the link would leave the frame
  event.preventDefault();
  document.querySelector(link.getAttribute('href')).scrollIntoView();
});
const box = document.querySelector('dialog'), table = document.querySelector('.grid table');
if (table) {
  const rows = [...table.querySelectorAll('tr[data-group]')];
  const group = document.querySelector('#group'), order = document.querySelector('#order');
  const arrange = () => {
    const key = row => order.value === '' ? Number(row.dataset.place) : -Number(row.dataset['change' + order.value]);
    rows.sort((a, b) => key(a) - key(b) || a.dataset.place - b.dataset.place);
    for (const row of rows) {
      row.hidden = group.value !== '' && row.dataset.group !== group.value;
      table.tBodies[0].append(row);
    }
  };
  group.addEventListener('change', arrange);
  order.addEventListener('change', arrange);
  let row, place;
  const show = (nextRow, nextPlace) => {
    const pictures = [...nextRow.querySelectorAll('.pic')];
    if (!pictures.length) return;
    row = nextRow;
    place = (nextPlace + pictures.length) % pictures.length;
    const picture = pictures[place], big = box.querySelector('.big');
    big.className = 'pic big ' + picture.dataset.name;
    big.style.cssText = picture.style.cssText;
    box.querySelector('header b').textContent = picture.title;
    box.querySelector('p').textContent = row.querySelector('.ask').textContent;
    box.querySelector('footer small').textContent = picture.parentNode.querySelector('small').innerText;
    if (!box.open) box.showModal();
  };
  const turn = step => {
    const shown = rows.filter(item => !item.hidden), at = shown.indexOf(row) + step;
    if (shown[at]) show(shown[at], place);
  };
  table.addEventListener('click', event => {
    const picture = event.target.closest('.pic');
    if (!picture) return;
    const own = picture.closest('tr');
    show(own, [...own.querySelectorAll('.pic')].indexOf(picture));
  });
  box.querySelector('#left').addEventListener('click', () => show(row, place - 1));
  box.querySelector('#right').addEventListener('click', () => show(row, place + 1));
  box.querySelector('#close').addEventListener('click', () => box.close());
  box.addEventListener('click', event => { if (event.target === box) box.close(); });
  box.addEventListener('keydown', event => {
    if (event.key === 'ArrowLeft') show(row, place - 1);
    else if (event.key === 'ArrowRight') show(row, place + 1);
    else if (event.key === 'ArrowUp') turn(-1);
    else if (event.key === 'ArrowDown') turn(1);
    else return;
    event.preventDefault();
  });
}
