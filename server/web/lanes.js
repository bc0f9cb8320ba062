// The sequences as lanes through time, and one sequence's block table.

import {html} from "./preact.js";
import {HISTORY, nameOf} from "./state.js";

const MOST_LANES = 24, MOST_BLOCKS = 200;

// Joins equal columns, so that a lane has a few shapes instead of one for each column.
function runs(history) {
  const found = [];
  history.forEach((kind, at) => {
    const last = found.at(-1);
    if (last && last.kind === kind) last.length += 1;
    else found.push({kind, at, length: 1});
  });
  return found;
}

const SHAPES = {chunk: [2, 12], decode: [6, 4], preempted: [2, 12], waiting: [7, 2], idle: [7, 1]};

function words(sequence) {
  if (sequence.status === "waiting") {
    return sequence.num_preemptions ? "preempted, waits for blocks" : "waits";
  }
  const left = sequence.num_tokens - sequence.num_computed_tokens;
  if (left > 1) return `prefill, ${left} left`;
  return "decode";
}

function Lane({sequence, history, chosen, onChoose}) {
  const offset = HISTORY - history.length;
  const times = sequence.num_preemptions;
  return html`<li><button class="lane" aria-pressed=${chosen ? "true" : "false"}
      onClick=${() => onChoose(chosen ? null : sequence.seq_id)}>
    <code>${nameOf(sequence)}</code>
    <svg viewBox=${`0 0 ${HISTORY} 16`} preserveAspectRatio="none" aria-hidden="true">
      ${runs(history).map(({kind, at, length}) => html`<rect class=${kind} x=${offset + at} y=${SHAPES[kind][0]}
        width=${length} height=${SHAPES[kind][1]} />`)}
    </svg>
    <span class="what">${words(sequence)}${times > 0 && html` <b class="times">${times}× preempted</b>`}</span>
    <span class="count">${sequence.num_computed_tokens}<span class="muted"> / ${sequence.num_tokens}</span></span>
  </button></li>`;
}

export function Lanes({state, chosen, onChoose}) {
  const {sequences, stats} = state;
  const shown = sequences.slice(0, MOST_LANES);
  const more = stats.num_running + stats.num_waiting - shown.length;
  return html`<section class="lanes" aria-label="Running batch">
    <h3>Batch and queue <small>one lane for each sequence; tokens computed / known</small></h3>
    ${shown.length === 0
      ? html`<p class="note">Nothing runs. The view shows whatever any client asks of this server.</p>`
      : html`<ul>${shown.map((one) => html`<${Lane} key=${one.seq_id} sequence=${one} chosen=${one.seq_id === chosen}
          history=${state.histories.get(one.seq_id)} onChoose=${onChoose} />`)}</ul>
        <p class="legend"><span><i class="swatch chunk"></i>prefill chunk</span><span><i class="swatch decode"></i>decode</span>
          <span><i class="swatch preempted"></i>preempted</span><span><i class="swatch waiting"></i>waits</span>
          ${more > 0 && html`<span>and ${more} more</span>`}</p>`}
  </section>`;
}

export function Table({state, sequence, onChoose}) {
  const shown = sequence.table.slice(0, MOST_BLOCKS);
  const others = new Map();
  for (const block of sequence.table) {
    for (const holder of state.holders.get(block) || []) {
      const id = holder.sequence.seq_id;
      if (id !== sequence.seq_id) others.set(id, {...holder, count: (others.get(id)?.count || 0) + 1});
    }
  }
  const cached = sequence.num_cached_tokens;
  return html`<section class="table" aria-label="Block table">
    <h3>Block table of <code>${nameOf(sequence)}</code> <small>${sequence.table.length} blocks,
      ${" "}${sequence.num_prompt_tokens} prompt tokens${cached ? `, ${cached} found in the cache` : ""}</small>
      <button class="link" onClick=${() => onChoose(null)}>Close</button></h3>
    <ol>${shown.map((block, index) => {
      const count = (state.holders.get(block) || []).length;
      return html`<li class=${count > 1 ? "shared" : "used"}
        title=${state.grouped ? "" : `tokens ${index * state.size} to ${(index + 1) * state.size - 1}`}>${block}${count > 1
          && html`<sup><span class="hidden">shared by </span>${count}</sup>`}</li>`;
    })}</ol>
    ${sequence.table.length > shown.length && html`<p class="muted">and ${sequence.table.length - shown.length} more</p>`}
    ${others.size > 0 && html`<p>Shares with ${[...others.values()].slice(0, 12).map((holder) => html`
      <button class="link" onClick=${() => onChoose(holder.sequence.seq_id)}><code>${nameOf(holder.sequence)}</code>
        (${holder.count})</button> `)}</p>`}
  </section>`;
}
