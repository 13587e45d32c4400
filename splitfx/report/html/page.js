// Draws the scenes of a page: boxes by module that open and close, pan, zoom, search, keyboard. Data comes as JSON and
// gets into the page as text only.
'use strict';
(function () {
  const NS = 'http://www.w3.org/2000/svg', W = 184, H = 42, MORE = 14, GAP = 14, ROW = 26, PAD = 12, HEAD = 42, NARROW = 112;
  const data = JSON.parse(document.getElementById('scenes').textContent);
  const svg = document.getElementById('graph'), side = document.getElementById('side');
  const view = { x: 0, y: 0, k: 1 }, size = { w: 0, h: 0 };
  let which = data.before ? 'both' : 'after', focus = null, hits = [], hit = -1, entire = false, width = 0;

  // ---------------------------------------------------------------- layout

  function opened(item) { return item.c && item.o; }

  function walk(item, see, above) {
    (item.c || []).forEach(one => { see(one, item); walk(one, see, item); });
  }

  function measure(item, narrow) {
    if (!opened(item)) { item.w = narrow; item.h = H + (item.s ? MORE : 0); return; }
    const rows = [];
    item.c.forEach((one, i) => (rows[item.r[i]] = rows[item.r[i]] || []).push(i));
    rows.forEach(line => line && line.forEach(i => measure(item.c[i], Math.max(NARROW, Math.min(W, 640 / line.length)))));
    const home = new Map();
    let width = 0, y = item.n ? HEAD : 0;
    rows.forEach(line => {
      if (!line) return;
      const want = i => {
        const from = item.e.filter(e => e[1] === i && home.has(e[0])).map(e => home.get(e[0]));
        return from.length ? from.reduce((a, b) => a + b, 0) / from.length : 0;
      };
      const order = line.map(i => [i, want(i), item.c[i].b || 0]).sort((a, b) => a[1] - b[1] || a[2] - b[2]);
      const total = order.reduce((sum, o) => sum + item.c[o[0]].w, GAP * (order.length - 1));
      let x = -total / 2, tall = 0;
      order.forEach(o => {
        const one = item.c[o[0]];
        one.x = x; one.y = y; x += one.w + GAP; tall = Math.max(tall, one.h);
        home.set(o[0], one.x + one.w / 2);
      });
      width = Math.max(width, total); y += tall + ROW;
    });
    const skips = item.e.filter(e => item.r[e[1]] - item.r[e[0]] > 1).length + below(item).length;
    const lane = Math.min(skips, 6) * 9;
    item.w = Math.max(width + 2 * PAD + 2 * lane, W); item.h = y - ROW + PAD;
    item.c.forEach(one => { one.x += item.w / 2; });
  }

  function below(item) { return item.n ? item.i.filter(i => item.r[i] > 0) : []; } // what reads from outside further down

  function clear(item, first, last) { // how far right a long edge has to go to pass the boxes between two rows
    let right = 0;
    item.c.forEach((one, i) => {
      if (item.r[i] > first && item.r[i] < last) right = Math.max(right, one.x + one.w);
    });
    return right;
  }

  // ---------------------------------------------------------------- drawing

  function make(name, attributes, parent, text) {
    const one = document.createElementNS(NS, name);
    Object.keys(attributes).forEach(key => one.setAttribute(key, attributes[key]));
    if (text !== undefined) one.textContent = text;
    parent.appendChild(one);
    return one;
  }

  function cut(text, most) { return text.length <= most ? text : text.slice(0, most - 1) + '…'; }

  function short(text, most) { // both ends stay: paths differ at the end
    const tail = Math.floor((most - 1) / 2);
    return text.length <= most ? text : text.slice(0, most - 1 - tail) + '…' + text.slice(-tail);
  }

  function fitted(text, most) { // the last part of a path says most
    return text.length > most && text.includes('.') ? short(text.slice(text.lastIndexOf('.') + 1), most) : short(text, most);
  }

  function edges(item, at, parent) {
    const skips = {};
    const down = (x1, y1, x2, y2) => {
      const m = (y1 + y2) / 2;
      make('path', { class: 'edge', d: `M${x1} ${y1}C${x1} ${m} ${x2} ${m} ${x2} ${y2}` }, parent);
    };
    const around = (x1, y1, x2, y2, first, last, turn) => {
      const right = clear(item, first, last), n = skips[right] = (skips[right] || 0) + 1;
      const x = at.x + right + 9 * Math.min(n, 6), off = Math.min(20, (y2 - y1) / 2);
      make('path', { class: 'edge skip', d: `M${x1} ${y1}C${x1} ${y1 + turn} ${x} ${y1} ${x} ${y1 + turn}` +
        `L${x} ${y2 - off}C${x} ${y2} ${x2} ${y2 - off} ${x2} ${y2}` }, parent);
    };
    item.e.forEach(e => {
      const a = item.c[e[0]], b = item.c[e[1]], first = item.r[e[0]], last = item.r[e[1]];
      const x1 = at.x + a.x + a.w / 2, y1 = at.y + a.y + a.h, x2 = at.x + b.x + b.w / 2, y2 = at.y + b.y;
      return last - first > 1 ? around(x1, y1, x2, y2, first, last, 20) : down(x1, y1, x2, y2);
    });
    below(item).forEach(i => {
      const one = item.c[i];
      around(at.x + item.w / 2, at.y + 32, at.x + one.x + one.w / 2, at.y + one.y, -1, item.r[i], 9);
    });
    if (!item.n) return;
    item.i.filter(i => item.r[i] === 0).forEach(i => {
      const one = item.c[i], x = at.x + one.x + one.w / 2;
      make('path', { class: 'edge', d: `M${x} ${at.y + 32}L${x} ${at.y + one.y}` }, parent);
    });
  }

  function card(item, x, y, parent, scene) {
    const open = opened(item), lane = item.c && item.b !== undefined ? ' branch' : '';
    const kind = `box ${item.k}${lane}${open ? ' open' : ''}${item.m ? ' new' : ''}`;
    const g = make('g', { class: kind, tabindex: 0, role: 'button', 'aria-label': `${item.n}, ${item.l}` }, parent);
    g.item = item; item.g_ = g; item.scene = scene;
    if (item.c && !open) make('rect', { class: 'under', x: x + 3, y: y + 3, width: item.w, height: item.h, rx: 6 }, g);
    make('rect', { class: 'face', x, y, width: item.w, height: item.h, rx: 6 }, g);
    const name = item.n + (item.b === undefined ? '' : ` · ${item.b + 1}`);
    const sign = item.c ? (open ? '▾ ' : '▸ ') : '';
    if (open) {
      make('text', { class: 'name left', x: x + 9, y: y + 15 }, g, sign + short(name, Math.floor(item.w / 7) - 3));
      make('text', { class: 'left', x: x + 9, y: y + 28 }, g, cut(item.l, Math.floor(item.w / 5.6) - 2));
      edges(item, { x, y }, parent);
      item.c.forEach(one => card(one, x + one.x, y + one.y, parent, scene));
    } else {
      make('text', { class: 'name', x: x + item.w / 2, y: y + 17 }, g, sign + fitted(name, Math.floor(item.w / 7.4) - sign.length));
      const groups = item.g ? `, ${item.g} groups` : '', room = Math.floor(item.w / 6.4);
      make('text', { x: x + item.w / 2, y: y + 32 }, g, cut(item.l, room - groups.length) + groups);
      if (item.s) make('text', { x: x + item.w / 2, y: y + 46 }, g, cut(item.s, room));
      for (let i = 1; i < Math.min(item.g || 1, 33); i += 1) {
        const at = x + item.w * i / item.g;
        make('path', { class: 'cell', d: `M${at} ${y}v6M${at} ${y + item.h - 6}v6` }, g);
      }
    }
    make('title', {}, g, `${item.p || item.n}: ${item.l}${item.s ? `, ${item.s}` : ''}`);
  }

  function draw() {
    const world = svg.querySelector('g');
    world.textContent = '';
    let x = 0;
    size.h = 0;
    const shown = which === 'both' ? ['before', 'after'] : [which];
    shown.forEach(name => {
      const root = data[name];
      root.o = 1; measure(root, W);
      make('text', { class: 'side', x: x + root.w / 2, y: 4 }, world, data.titles[name]);
      edges(root, { x, y: 20 }, world);
      root.c.forEach(one => card(one, x + one.x, 20 + one.y, world, name));
      x += root.w + 60; size.h = Math.max(size.h, root.h + 20);
    });
    size.w = x - 60;
    svg.style.maxHeight = `${Math.max(320, size.h * scale() + 40)}px`;
    place();
    search(false);
  }

  function place() {
    svg.querySelector('g').setAttribute('transform', `translate(${view.x} ${view.y}) scale(${view.k})`);
  }

  function scale() { return Math.min(1.15, Math.max((svg.getBoundingClientRect().width - 24) / size.w, 0.35)); }

  function fit(whole) { // to the width, as long as it can be read, or the whole of it
    const box = svg.getBoundingClientRect();
    entire = whole; width = box.width;
    view.k = whole ? Math.min(1.15, (box.width - 24) / size.w, (box.height - 30) / size.h) : scale();
    view.x = (box.width - size.w * view.k) / 2; view.y = 18;
    if (view.x < 0) view.x = 12;
    place();
  }

  function zoom(by, px, py) {
    const box = svg.getBoundingClientRect();
    if (px === undefined) { px = box.width / 2; py = box.height / 2; }
    const k = Math.min(4, Math.max(0.04, view.k * by));
    view.x = px - (px - view.x) * k / view.k; view.y = py - (py - view.y) * k / view.k; view.k = k;
    place();
  }

  // ---------------------------------------------------------------- what a box holds

  function cell(row, tag, text) {
    const one = document.createElement(tag);
    one.textContent = text;
    row.appendChild(one);
  }

  function tell(item) {
    side.textContent = '';
    const head = document.createElement('h3');
    head.textContent = (item.p || item.n) + (item.b === undefined ? '' : `, branch ${item.b + 1}`);
    side.appendChild(head);
    const about = document.createElement('p');
    about.textContent = item.l + (item.s ? ` · ${item.s}` : '') + (item.m ? (item.scene === 'before' ? ' · changed later' : ' · changed') : '');
    side.appendChild(about);
    (item.t || []).forEach(text => { const p = document.createElement('p'); p.className = 'told'; p.textContent = text;
      side.appendChild(p); });
    const lines = (item.d || []).slice();
    walk({ c: item.c }, one => { (one.d || []).forEach(line => lines.length < 400 && item.c && lines.push(line)); });
    const table = document.createElement('table');
    const top = table.createTHead().insertRow();
    ['layer', 'operation', 'output', 'params', 'MACs', 'result', 'alive'].forEach(name => cell(top, 'th', name));
    const body = table.createTBody();
    lines.slice(0, 400).forEach(line => { const row = body.insertRow(); line.forEach(text => cell(row, 'td', text)); });
    const wide = document.createElement('div');
    wide.className = 'wide layers short'; wide.appendChild(table); side.appendChild(wide);
    side.hidden = false;
  }

  function select(item, move) {
    if (focus && focus.g_) focus.g_.classList.remove('here');
    focus = item;
    item.g_.classList.add('here');
    tell(item);
    if (!move) return;
    const box = svg.getBoundingClientRect(), at = item.g_.querySelector('.face').getBoundingClientRect();
    view.x += box.left + box.width / 2 - (at.left + at.width / 2);
    view.y += box.top + Math.min(box.height / 2, 160) - at.top;
    place();
  }

  function toggle(item) {
    if (!item.c) return;
    const before = item.g_.querySelector('.face').getBoundingClientRect();
    item.o = item.o ? 0 : 1;
    ['before', 'after'].forEach(name => data[name] && walk(data[name], one => {
      if (one.c && one.p === item.p && one.n === item.n) one.o = item.o;
    }));
    draw();
    const now = item.g_.querySelector('.face').getBoundingClientRect();
    view.x += before.left - now.left; view.y += before.top - now.top;
    place();
    select(item);
  }

  function all(open) {
    ['before', 'after'].forEach(name => data[name] && walk(data[name], one => { if (one.c) one.o = open; }));
    draw(); fit(false);
  }

  // ---------------------------------------------------------------- search

  const field = document.getElementById('find'), count = document.getElementById('found');

  function matches(item, text) {
    return (item.p || item.n).toLowerCase().includes(text) || item.l.toLowerCase().includes(text) ||
      (item.d || []).some(line => line[0].toLowerCase().includes(text) || line[1].toLowerCase().includes(text));
  }

  function search(open) {
    const text = field.value.trim().toLowerCase();
    svg.querySelectorAll('.hit').forEach(one => one.classList.remove('hit'));
    hits = []; hit = -1;
    if (!text) { count.textContent = ''; return; }
    const shown = which === 'both' ? ['after', 'before'] : [which];
    let changed = false;
    shown.forEach(name => {
      const trail = item => (item.c || []).reduce((any, one) => {
        const inner = trail(one), own = matches(one, text);
        if (own && !inner.length) hits.push(one);
        if (open && inner.length && one.c && !one.o) { one.o = 1; changed = true; }
        return any.concat(own || inner.length ? [one] : []);
      }, []);
      trail(data[name]);
    });
    if (changed) { draw(); return; }
    hits.forEach(one => one.g_ && one.g_.isConnected && one.g_.classList.add('hit'));
    count.textContent = hits.length ? `${hits.length} found` : 'nothing found';
  }

  function next(by) {
    if (!hits.length) return;
    hit = (hit + by + hits.length) % hits.length;
    select(hits[hit], true);
    count.textContent = `${hit + 1} of ${hits.length}`;
  }

  field.addEventListener('input', () => search(true));
  field.addEventListener('keydown', e => {
    if (e.key === 'Enter') { next(e.shiftKey ? -1 : 1); e.preventDefault(); }
    if (e.key === 'Escape') { field.value = ''; search(false); svg.focus(); }
  });

  // ---------------------------------------------------------------- mouse, touch, keys

  const down = new Map();
  let moved = 0, spread = 0;
  svg.addEventListener('pointerdown', e => { down.set(e.pointerId, [e.clientX, e.clientY]); moved = 0; });
  addEventListener('pointerup', e => { down.delete(e.pointerId); spread = 0; });
  addEventListener('pointercancel', e => { down.delete(e.pointerId); spread = 0; });
  addEventListener('pointermove', e => {
    const last = down.get(e.pointerId);
    if (!last) return;
    down.set(e.pointerId, [e.clientX, e.clientY]);
    if (down.size === 2) {
      const [a, b] = [...down.values()], far = Math.hypot(a[0] - b[0], a[1] - b[1]), box = svg.getBoundingClientRect();
      if (spread) zoom(far / spread, (a[0] + b[0]) / 2 - box.left, (a[1] + b[1]) / 2 - box.top);
      spread = far; moved = 9;
      return;
    }
    moved += Math.abs(e.clientX - last[0]) + Math.abs(e.clientY - last[1]);
    view.x += e.clientX - last[0]; view.y += e.clientY - last[1];
    place();
  });
  svg.addEventListener('click', e => {
    const g = e.target.closest('.box');
    if (!g || moved > 6) return;
    select(g.item);
    if (g.item.c) toggle(g.item);
  });
  svg.addEventListener('wheel', e => {
    if (!(e.ctrlKey || e.metaKey || document.activeElement === svg || svg.contains(document.activeElement))) return;
    const box = svg.getBoundingClientRect();
    e.preventDefault();
    zoom(Math.exp(-e.deltaY / 300), e.clientX - box.left, e.clientY - box.top);
  }, { passive: false });
  const pan = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
  svg.addEventListener('keydown', e => {
    const g = e.target.closest('.box');
    if ((e.key === 'Enter' || e.key === ' ') && g) {
      select(g.item); toggle(g.item); g.item.g_.focus({ preventScroll: true });
    } else if (pan[e.key]) {
      view.x += pan[e.key][0]; view.y += pan[e.key][1]; place();
    } else if (e.key === '+' || e.key === '=') zoom(1.25);
    else if (e.key === '-') zoom(0.8);
    else if (e.key === '0') fit(true);
    else return;
    e.preventDefault();
  });
  addEventListener('keydown', e => {
    if (e.key === '/' && document.activeElement !== field) { field.focus(); e.preventDefault(); }
  });
  const acts = { plus: () => zoom(1.25), minus: () => zoom(0.8), fit: () => fit(true), open: () => all(1),
    close: () => all(0) };
  Object.keys(acts).forEach(id => document.getElementById(id).addEventListener('click', acts[id]));
  document.querySelectorAll('[data-which]').forEach(one => one.addEventListener('click', () => {
    which = one.getAttribute('data-which');
    document.querySelectorAll('[data-which]').forEach(b => b.setAttribute('aria-pressed', b === one));
    draw(); fit(false);
  }));
  addEventListener('resize', () => { if (svg.getBoundingClientRect().width !== width) fit(entire); });
  addEventListener('beforeprint', () => { // the paper's width is not known yet
    view.k = 1; view.x = 0; view.y = 18;
    place();
    svg.setAttribute('viewBox', `-12 0 ${size.w + 24} ${size.h + 30}`);
  });
  addEventListener('afterprint', () => { svg.removeAttribute('viewBox'); fit(entire); });

  // ---------------------------------------------------------------- tables

  document.querySelectorAll('table.sortable').forEach(table => {
    table.querySelectorAll('th button').forEach((button, column) => button.addEventListener('click', () => {
      const head = button.parentNode, falling = head.getAttribute('aria-sort') !== 'descending', body = table.tBodies[0];
      table.querySelectorAll('th').forEach(th => th.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', falling ? 'descending' : 'ascending');
      const value = row => {
        const cell = row.cells[column], sort = cell.getAttribute('data-v');
        return sort === null ? cell.textContent : +sort;
      };
      Array.from(body.rows).sort((a, b) => {
        const x = value(a), y = value(b);
        return (x < y ? -1 : x > y ? 1 : 0) * (falling ? -1 : 1);
      }).forEach(row => body.appendChild(row));
    }));
  });

  draw(); fit(false);
  if (which === 'both' && view.k < 0.6) document.querySelector('[data-which=after]').click();
  document.body.setAttribute('data-ready', Math.round(performance.now()));
})();
