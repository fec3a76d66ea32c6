"""Style and script of the report: one column on a phone, light and dark, no font or file from
elsewhere."""

import base64
import hashlib

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --muted: #667085; --paper: #f6f7f9; --card: #fff; --line: #e5e7eb;
  --accent: #4f43dd; --good: #15803d; --bad: #c81e1e; --s0: #4f43dd; --s1: #0d9488; --s2: #d97706; --s3: #db2777; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaf0; --muted: #9aa3b2; --paper: #14161c; --card: #1d2029; --line: #2f3542; --accent: #8f86ff;
    --good: #4ade80; --bad: #f87171; --s0: #8f86ff; --s1: #2dd4bf; --s2: #fbbf24; --s3: #f472b6; }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1280px; padding: 28px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 2px; font-size: 26px; overflow-wrap: anywhere; } h2 { margin: 44px 0 6px; font-size: 20px; }
h3 { margin: 22px 0 8px; font-size: 15px; } p { margin: 0 0 12px; } small { font-size: 12px; }
.muted, figcaption small { color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 18px; } nav a { color: var(--accent); }
figure, .tile { margin: 0; padding: 10px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles, .cards, .charts { display: grid; gap: 14px; align-items: start; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(250px, 100%), 1fr)); }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); margin-bottom: 14px; }
.tile { padding: 12px 14px; } .tile b { display: block; } .tile .interval { display: block; margin: 6px 0 2px; }
figcaption { margin-top: 8px; font-size: 13px; overflow-wrap: anywhere; }
.ask { margin: 0; display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
.pic { display: block; width: 100%; padding: 0; border: 0; aspect-ratio: var(--r);
  background: var(--line) center / 100% 100% no-repeat; print-color-adjust: exact; }
.pair { position: relative; overflow: hidden; width: min(100%, 300px * var(--r)); margin: 0 auto; border-radius: 6px;
  --x: 50%; }
.pair .pic + .pic { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--x)); }
.pair::after { content: ""; position: absolute; inset: 0 auto 0 var(--x); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.pair input { position: absolute; inset: 0; z-index: 1; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; touch-action: pan-y; }
.pair:focus-within { outline: 2px solid var(--accent); outline-offset: 2px; }
.pair b { position: absolute; bottom: 6px; left: 6px; max-width: 48%; overflow: hidden; padding: 0 6px;
  border-radius: 4px; background: #000a; color: #fff; font: 11px/18px system-ui, sans-serif; white-space: nowrap;
  text-overflow: ellipsis; pointer-events: none; } .pair b + b { left: auto; right: 6px; }
.several { display: flex; gap: 4px; } .several .pic { flex: 1; border-radius: 4px; align-self: flex-start; }
.bar { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 10px; }
select { padding: 5px 8px; border: 1px solid var(--line); border-radius: 7px; background: var(--card);
  color: inherit; font: inherit; max-width: 100%; }
.wide, .scroll { overflow: auto; }
.wide { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; } td.number, th.number { text-align: right; }
.middle { text-align: center; }
.grid { max-height: 88vh; } .grid table { width: auto; min-width: 100%; } .grid th, .grid td { padding: 6px; }
.grid th { position: sticky; top: 0; z-index: 2; background: var(--card); max-width: 190px; overflow: hidden;
  text-overflow: ellipsis; }
.grid td:first-child, .grid th:first-child { position: sticky; left: 0; z-index: 1; background: var(--card);
  width: 250px; min-width: 190px; padding: 8px 12px; overflow-wrap: anywhere; border-right: 1px solid var(--line); }
.grid th:first-child { z-index: 3; } .grid .pic { width: 176px; border-radius: 5px; cursor: zoom-in; }
.few .pic, .few .gap { width: 260px; }
.grid td small { display: block; } .gap { width: 176px; padding: 24px 8px; color: var(--muted); font-size: 12px; }
.chip { display: inline-block; padding: 1px 9px; border-radius: 9px; font-size: 12px; font-weight: 600;
  white-space: nowrap; background: #8883; }
.better { background: #16a34a2b; color: var(--good); } .worse { background: #dc26262b; color: var(--bad); }
.up { color: var(--good); } .down { color: var(--bad); }
.interval { color: var(--accent); max-width: 100%; } .interval .band { fill: #8883; }
.interval path { fill: none; stroke: currentColor; stroke-width: 2; } .interval circle { fill: currentColor; }
.interval .zero { stroke: var(--muted); stroke-width: 1; }
.chart .plot { display: flex; margin-top: 12px; }
.chart svg { flex: 1; min-width: 0; height: 190px; overflow: visible; }
.chart .ys { position: relative; width: 54px; }
.chart .ys i { position: absolute; right: 8px; transform: translateY(50%); }
.chart i { font: 11px system-ui, sans-serif; color: var(--muted); } .chart .xs { display: flex;
  justify-content: space-between; margin: 4px 0 0 54px; }
.chart path, .chart polyline { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1; }
.chart polyline { stroke-width: 2; stroke-linejoin: round; } .rule { stroke: var(--line); }
.mark { stroke: var(--muted); stroke-dasharray: 3 4; } .chart polyline.faint { stroke: var(--muted); stroke-width: 1;
  opacity: .45; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 18px; }
.chart figcaption span::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 6px;
  vertical-align: middle; background: var(--c); }
.c0 { --c: var(--s0); } .c1 { --c: var(--s1); } .c2 { --c: var(--s2); } .c3 { --c: var(--s3); }
polyline.c0, polyline.c1, polyline.c2, polyline.c3 { stroke: var(--c); }
.map table { font-size: 12px; } .map td, .map th { padding: 3px 8px; border: 0; }
dialog { max-width: 100vw; max-height: 100vh; padding: 14px; border: 0; border-radius: 12px; background: var(--card);
  color: var(--ink); } dialog::backdrop { background: #000b; }
dialog .big { width: min(calc(100vw - 60px), calc(72vh * var(--r))); margin: 0 auto; border-radius: 6px; }
dialog header, dialog footer { display: flex; gap: 10px; align-items: center; justify-content: space-between; }
dialog header { margin-bottom: 10px; } dialog footer { margin-top: 10px; }
dialog header b { overflow-wrap: anywhere; } dialog footer small { white-space: pre-line; }
dialog p { max-width: 90ch; max-height: 12vh; overflow: auto; margin: 8px 0 0; overflow-wrap: anywhere; }
button.key { padding: 5px 14px; border: 1px solid var(--line); border-radius: 7px; background: var(--paper);
  color: inherit; font: inherit; cursor: pointer; }
@media (max-width: 640px) {
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; } figure { padding: 7px; }
  body { padding: 18px 14px 48px; } h1 { font-size: 22px; } th, td { padding: 6px 8px; }
  .grid td:first-child, .grid th:first-child { width: 118px; min-width: 118px; padding: 6px; font-size: 12px; }
  .grid .pic, .gap, .few .pic, .few .gap { width: 138px; } .ask { -webkit-line-clamp: 7; }
  dialog { padding: 10px; } dialog .big { width: min(calc(100vw - 42px), calc(66vh * var(--r))); }
}
"""

SCRIPT = """
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
"""

_SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'"
"""What the page may do: run the one script above and show pictures that it holds itself."""
DIALOG = (
    "<dialog aria-label=picture><header><b></b><button class=key id=close>Close</button></header>"
    "<div class='pic big'></div><p></p><footer><button class=key id=left aria-label='checkpoint before'>←</button>"
    "<small class=muted></small>"
    "<button class=key id=right aria-label='checkpoint after'>→</button></footer></dialog>"
)
