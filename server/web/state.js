// What the page knows of the engine, put together from the events of /debug/live.

export const FREE = 0, CACHED = 1, USED = 2;

// Events that a lane and the curve of the rate show: about ten seconds.
export const HISTORY = 50;

export const start = () => ({
  health: "", engine: null, engines: [], stats: null, time: 0, size: 16, blocks: new Uint8Array(), copied: new Set(), evicted: new Set(),
  sequences: [], holders: new Map(), tables: new Map(), histories: new Map(), rates: [], limits: {}, computed: 0,
});

export const nameOf = (sequence) => `${sequence.request}/${sequence.choice}`;

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function keep(list, value) {
  list.push(value);
  if (list.length > HISTORY) list.shift();
}

// What a sequence did between two events: its lane shows one column for each.
function phase(sequence, before) {
  // What the first event shows of a sequence was computed from its cached prefix on, or by the
  // sequence that it was forked from.
  const known = sequence.choice ? sequence.num_prompt_tokens : sequence.num_cached_tokens ?? 0;
  const from = before?.num_computed_tokens ?? known;
  const computed = sequence.num_computed_tokens - from;
  if (sequence.status === "waiting") return sequence.num_preemptions ? "preempted" : "waiting";
  if (before && sequence.num_preemptions > before.num_preemptions) return "preempted";
  if (sequence.step_tokens > 1 || (from < sequence.num_prompt_tokens && computed > 1)) return "chunk";
  return computed > 0 ? "decode" : "idle";
}

export async function apply(state, event) {
  state.health = event.health;
  Object.assign(state, {engine: event.engine ?? null, engines: event.engines ?? []});
  if (!event.stats) return;
  const blocks = await inflate(event.blocks);
  const seconds = event.time - state.time;
  if (state.stats && seconds > 0) {
    keep(state.rates, Math.max(0, event.tokens_computed - state.computed) / seconds);
  }
  const {stats, time, block_size: size, max_num_seqs, max_model_len, max_num_batched_tokens} = event;
  const before = new Map(state.sequences.map((one) => [one.seq_id, one]));
  Object.assign(state, {
    stats, time, size, blocks, computed: event.tokens_computed, grouped: event.has_groups,
    copied: new Set(event.copied), evicted: new Set(event.evicted),
    limits: {max_num_seqs, max_model_len, max_num_batched_tokens},
  });
  // An event brings only the new end of each table.
  const tables = new Map(), histories = new Map();
  state.holders = new Map();
  for (const one of event.sequences) {
    const table = [...(state.tables.get(one.seq_id) || []).slice(0, one.table_start), ...one.table];
    tables.set(one.seq_id, table);
    const history = state.histories.get(one.seq_id) || [];
    keep(history, phase(one, before.get(one.seq_id)));
    histories.set(one.seq_id, history);
    one.table = table;
    table.forEach((block, index) => {
      const holder = {sequence: one, index};
      if (state.holders.has(block)) state.holders.get(block).push(holder);
      else state.holders.set(block, [holder]);
    });
  }
  Object.assign(state, {tables, histories, sequences: event.sequences});
}

// Describes a block in words.
export function describe(state, block) {
  const value = state.blocks[block];
  const change = state.copied.has(block) ? ", just copied" : state.evicted.has(block) ? ", its old content just evicted" : "";
  if (value === FREE) return `Block ${block}: free${change}`;
  if (value === CACHED) return `Block ${block}: free, its content can still be found${change}`;
  const holders = state.holders.get(block) || [];
  const count = value - 1;
  const {index} = holders[0] || {};
  const tokens = state.grouped ? "tokens" : `tokens ${index * state.size} to ${(index + 1) * state.size - 1}`;
  const what = holders.length ? `, ${tokens} of ` +
    holders.slice(0, 4).map(({sequence}) => nameOf(sequence)).join(", ") + (holders.length > 4 ? " and more" : "") : "";
  return `Block ${block}: ${count === 1 ? "in use" : `shared by ${count === 254 ? "254 or more" : count}`}${what}${change}`;
}
