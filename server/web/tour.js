// The guided tour: five steps, each with requests to send and something to see in the live view.

import {html, useEffect, useRef, useState} from "./preact.js";
import {events, request} from "./api.js";

const PASSAGE = "A river rises in the hills and grows on its way to the sea. In spring the meadows are wet, and " +
  "herons stand in the shallows. The mill at the bend has ground flour for two hundred years; its wheel turns " +
  "slowly, and the miller knows each stone. Below the bridge the water is deep and quiet. ";
const MOST_TOKENS = 200_000;

const shared = ({blocks}) => blocks.reduce((count, value) => count + (value > 2), 0);

// How many answers of which length overfill the pool; null if it is too large for that.
function flood({stats, size, limits}) {
  const tokens = stats.num_blocks * size;
  const count = Math.min(limits.max_num_seqs, 48);
  const length = Math.ceil((1.5 * tokens) / count);
  return tokens > MOST_TOKENS || length > limits.max_model_len - 64 ? null : {count, length};
}

// Long enough to be watched, and short enough for the model's context.
const lengthOf = ({limits}) => Math.max(16, Math.min(500, limits.max_model_len - 300));

const STEPS = [
  {
    title: "A prompt becomes blocks",
    text: "The keys and values (K and V) of a prompt's tokens lie in blocks of equal size. Send one request: its prompt " +
      "takes blocks at once, and each further one when its answer has filled the last. Click its lane to see " +
      "its block table.",
    button: "Send one request",
    body: (state) => ({prompt: PASSAGE + "First, the miller", max_tokens: lengthOf(state)}),
    seen: (state) => state.stats.num_running > 0 && `${state.stats.num_blocks - state.stats.num_free_blocks} blocks are in use.`,
  },
  {
    title: "Two prompts that begin alike",
    text: "Two requests with the same beginning hold the same blocks for it: it is computed once and stored once. " +
      "The ends differ, so each has blocks of its own for its end. Shared blocks show how many hold them.",
    button: "Send two requests",
    body: (state) => ["At noon", "At night"].map((end) => ({prompt: PASSAGE + end, max_tokens: lengthOf(state)})),
    seen: (state) => state.stats.num_running > 1 && shared(state) > 0 && `${shared(state)} blocks are shared.`,
  },
  {
    title: "Four answers to one prompt",
    text: "With n = 4 the prompt is computed once and four sequences fork from it. They share even the last block, " +
      "which is only partly full: the first that writes to it gets a copy of its own (copy-on-write).",
    button: "Ask for four answers",
    body: (state) => ({prompt: PASSAGE + "Later", n: 4, temperature: 1, seed: 7, max_tokens: lengthOf(state)}),
    seen: (state, before) => shared(state) > 0 && state.stats.blocks_copied > before.blocks_copied &&
      `${state.stats.blocks_copied - before.blocks_copied} blocks were copied.`,
  },
  {
    title: "What stays behind",
    text: "An answer that has ended leaves its blocks free, but their content can still be found by its hash. Send the " +
      "first request again: its prompt need not be computed, and the share of prefix hits rises.",
    button: "Send it again",
    body: (state) => ({prompt: PASSAGE + "First, the miller", max_tokens: lengthOf(state)}),
    seen: (state, before) => state.stats.prefix_hits > before.prefix_hits &&
      `${state.stats.prefix_hits - before.prefix_hits} prompt tokens were found.`,
  },
  {
    title: "More than fits",
    text: "Admission reserves nothing for tokens to come. When a running sequence gets no block, the last of the batch is " +
      "preempted: it gives its blocks back, waits, and computes again what is no longer cached. Its answer stays the same.",
    button: "Fill the pool",
    body: (state) => {
      const plan = flood(state);
      return plan && {prompt: Array.from({length: plan.count}, (_, i) => `Story ${i + 1}: once`), max_tokens: plan.length};
    },
    seen: (state, before) => state.stats.preemptions > before.preemptions &&
      `${state.stats.preemptions - before.preemptions} preemptions.`,
  },
];

export function Tour({state, model, onEnd}) {
  const [at, setAt] = useState(0);
  const [seen, setSeen] = useState(null);
  const [problem, setProblem] = useState(null);
  const run = useRef(null);
  const [busy, setBusy] = useState(false);
  const heading = useRef(null);
  const step = STEPS[at];

  useEffect(() => () => run.current?.stop.abort(), []);
  useEffect(() => heading.current?.focus(), [at]);
  useEffect(() => {
    const found = run.current && step.seen(state, run.current.before);
    if (found && found !== seen) setSeen(found);
  });

  const body = step.body(state);
  const go = (next) => {
    run.current?.stop.abort();
    run.current = null;
    setSeen(null);
    setProblem(null);
    setBusy(false);
    if (next === STEPS.length) onEnd();
    else setAt(next);
  };
  const read = async (fields, signal, begun) => {
    const body = {model: model.id, stream: true, ignore_eos: true, temperature: 0, ...fields};
    for await (const chunk of events(await request("v1/completions", {body, signal}))) begun(chunk);
  };
  const send = async () => {
    const stop = new AbortController();
    const mine = {stop, before: state.stats};
    run.current = mine;
    setSeen(null);
    setProblem(null);
    setBusy(true);
    try {
      // Each request waits for the first token of the one before, since only what is computed can be
      // found. Many prompts go in one request: browsers open only a few connections to one server.
      const runs = [];
      for (const one of [body].flat()) {
        await new Promise((begun) => {
          runs.push(read(one, stop.signal, begun).finally(begun));
          runs.at(-1).catch(() => {}); // Promise.all reports it
        });
      }
      await Promise.all(runs);
    } catch (error) {
      if (!stop.signal.aborted) setProblem(error.message);
      stop.abort();
    }
    if (run.current === mine) setBusy(false);
  };

  return html`<section class="tour" aria-label="Tour">
    <p class="where">Step ${at + 1} of ${STEPS.length}</p>
    <h3 tabindex="-1" ref=${heading}>${step.title}</h3>
    <p>${step.text}</p>
    ${body === null && html`<p class="muted">The pool of this server is too large to be filled from here. Start one with a
      small pool: <code>quire serve --num-gpu-blocks-override 192 --max-model-len 1024</code></p>`}
    <p class="seen" role="status">${problem || (seen ? `✓ ${seen}` : busy ? "Watch the pool." : "")}</p>
    <div class="bar">
      <button class="primary" disabled=${busy || body === null || !model} onClick=${send}>${step.button}</button>
      <span class="gap"></span>
      ${at > 0 && html`<button onClick=${() => go(at - 1)}>Back</button>`}
      <button onClick=${() => go(at + 1)}>${at + 1 === STEPS.length ? "End" : "Next"}</button>
    </div>
  </section>`;
}
