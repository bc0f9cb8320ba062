// The pool of KV blocks as a map: one square for each block, in the order of their ids.

import {html, useEffect, useRef, useState} from "./preact.js";
import {CACHED, FREE, USED, describe} from "./state.js";

const LARGEST = 22, SMALLEST = 3, HEIGHT = 300;
const FEWEST = 480;

const LEGEND = [["free", "free"], ["cached", "cached"], ["used", "in use"], ["shared", "shared, with its count"],
  ["copied", "just copied"], ["evicted", "just evicted"]];

// Where evicted blocks go.
const TIERS = {host: "host tier", disk: "disk tier", store: "store tier"};

// How many blocks to show. A large pool is shown as far as it has ever been used, so that its blocks
// do not become too small to be seen.
function shownOf(blocks) {
  let last = blocks.length - 1;
  while (last >= 0 && blocks[last] === FREE) last -= 1;
  return Math.min(blocks.length, Math.max(FEWEST, Math.ceil((last + 1) / FEWEST) * FEWEST));
}

// The side of a square in CSS pixels, such that all blocks fit, and how many stand in a row.
function layout(width, count) {
  let side = Math.min(LARGEST, Math.floor(Math.sqrt((width * HEIGHT) / Math.max(1, count))));
  side = Math.max(SMALLEST, side);
  while (side > SMALLEST && Math.ceil(count / Math.floor(width / side)) * side > HEIGHT) side -= 1;
  const columns = Math.max(1, Math.floor(width / side));
  if (side > 8) side = width / columns; // flush with both edges
  return {side, columns, height: Math.ceil(Math.ceil(count / columns) * side)};
}

function colours(element) {
  const style = getComputedStyle(element);
  return Object.fromEntries(["free", "cached", "used", "shared", "copied", "evicted", "ink", "on-shared"]
    .map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function draw(canvas, state, sequence, cursor, width) {
  const {blocks, copied, evicted} = state;
  const count = shownOf(blocks);
  const {side, columns, height} = layout(width, count);
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const colour = colours(canvas);
  const gap = side > 12 ? 3 : side > 5 ? 1 : 0.5;
  const round = side > 12 ? 3 : 0;
  const own = new Set(sequence ? sequence.table : []);
  context.font = `600 ${Math.round(side * 0.52)}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let block = 0; block < count; block += 1) {
    const x = (block % columns) * side, y = Math.floor(block / columns) * side, value = blocks[block];
    const kind = value > USED ? "shared" : value === USED ? "used" : value === CACHED ? "cached" : "free";
    context.globalAlpha = sequence && !own.has(block) ? 0.3 : 1;
    context.fillStyle = colour[kind];
    context.beginPath();
    context.roundRect(x, y, side - gap, side - gap, round);
    context.fill();
    const mark = copied.has(block) ? "copied" : evicted.has(block) ? "evicted" : null;
    if (mark && side > 5) {
      context.strokeStyle = colour[mark];
      context.lineWidth = side > 12 ? 2.5 : 1.5;
      context.beginPath();
      context.roundRect(x + 1, y + 1, side - gap - 2, side - gap - 2, round);
      context.stroke();
    } else if (mark) {
      context.fillStyle = colour[mark];
      context.fillRect(x, y, side - gap, side - gap);
    }
    if (value > USED && side > 12) {
      context.fillStyle = colour["on-shared"];
      context.fillText(String(value - 1), x + (side - gap) / 2, y + (side - gap) / 2 + 0.5);
    }
    if (block === cursor) {
      context.globalAlpha = 1;
      context.strokeStyle = colour.ink;
      context.lineWidth = 1.5;
      context.strokeRect(x - 0.5, y - 0.5, side - gap + 1, side - gap + 1);
    }
  }
  context.globalAlpha = 1;
}

export function Pool({state, sequence, onChoose}) {
  const canvas = useRef(null);
  const box = useRef(null);
  const [cursor, setCursor] = useState(null);
  const [width, setWidth] = useState(0);

  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(box.current);
    return () => observer.disconnect();
  }, []);
  useEffect(() => {
    if (width > 0) draw(canvas.current, state, sequence, cursor, width);
  });

  const count = shownOf(state.blocks), hidden = state.blocks.length - count;
  const {side, columns} = layout(width || 300, count);
  const at = (event) => {
    const area = canvas.current.getBoundingClientRect();
    const column = Math.floor((event.clientX - area.left) / side);
    const block = Math.floor((event.clientY - area.top) / side) * columns + column;
    return column < columns && block >= 0 && block < count ? block : null;
  };
  const choose = (block) => {
    const holders = state.holders.get(block);
    // A click on a shared block goes round its holders.
    if (!holders) return onChoose(null);
    const ids = holders.map((holder) => holder.sequence.seq_id);
    return onChoose(ids[(ids.indexOf(sequence?.seq_id) + 1) % ids.length]);
  };
  const onKey = (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns}[event.key];
    if (step) {
      event.preventDefault();
      setCursor(Math.max(0, Math.min(count - 1, cursor === null ? 0 : cursor + step)));
    } else if (event.key === "Enter" && cursor !== null) choose(cursor);
    else if (event.key === "Escape") { setCursor(null); onChoose(null); }
  };
  const free = state.stats.num_free_blocks, cached = state.stats.num_cached_blocks;
  const tiers = (state.stats.tiers ?? []).map((tier) =>
    `; ${TIERS[tier.tier]}: ${tier.num_blocks}${tier.max_blocks === null ? "" : ` of ${tier.max_blocks}`} blocks, ${tier.loaded} brought back`);
  const summary = `${state.blocks.length} blocks of ${state.size} tokens: ${state.blocks.length - free} in use, ${cached} cached, ${free - cached} free${tiers.join("")}`;
  return html`<section class="pool" aria-label="KV pool">
    <h3>KV pool <small>${summary}</small></h3>
    <div ref=${box} class="map">
      <canvas ref=${canvas} tabindex="0" role="application" aria-roledescription="map of blocks"
        aria-label=${`Map of the pool. The arrow keys move over the blocks, Enter chooses who holds one. ${summary}.`}
        onMouseMove=${(event) => setCursor(at(event))} onMouseLeave=${() => setCursor(null)} onKeyDown=${onKey}
        onClick=${(event) => at(event) !== null && choose(at(event))}></canvas>
    </div>
    <p class="detail" role="status">${cursor !== null && cursor < count ? describe(state, cursor) : html`
      <span class="legend">${LEGEND.map(([name, label]) => html`<span><i class=${`swatch ${name}`}></i>${label}</span>`)}
      ${hidden > 0 && html`<span>and ${hidden} more, all free</span>`}</span>`}</p>
  </section>`;
}
