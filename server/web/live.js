// The live view: figures, the pool of blocks, the sequences as lanes, and the tour.

import {html, useEffect, useRef, useState} from "./preact.js";
import {events, request} from "./api.js";
import {Pool} from "./pool.js";
import {Lanes, Table} from "./lanes.js";
import {Tour} from "./tour.js";
import {apply, start} from "./state.js";

const number = new Intl.NumberFormat("en");

// Reads snapshots of an engine while the view is active and the tab is in front; the engine sends none
// otherwise. Of several engines, null stands for the first that serves.
function useSnapshots(active, engine) {
  const state = useRef(start());
  const [, redraw] = useState(0);
  const [problem, setProblem] = useState(null);
  const [visible, setVisible] = useState(!document.hidden);

  useEffect(() => {
    const change = () => setVisible(!document.hidden);
    document.addEventListener("visibilitychange", change);
    return () => document.removeEventListener("visibilitychange", change);
  }, []);

  useEffect(() => {
    if (!active || !visible) return undefined;
    const stop = new AbortController();
    let timer;
    const read = async () => {
      try {
        const query = engine === null ? "" : `?engine=${encodeURIComponent(engine)}`;
        const answer = await request(`debug/live${query}`, {signal: stop.signal});
        state.current = {...start(), engine, engines: state.current.engines};
        setProblem(null);
        for await (const event of events(answer)) {
          await apply(state.current, event);
          redraw((count) => count + 1);
        }
      } catch (error) {
        if (stop.signal.aborted) return;
        setProblem(error);
        if (error.status === 401) return;
      }
      if (!stop.signal.aborted) timer = setTimeout(read, 1500);
    };
    read();
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [active, visible, engine]);
  return [state.current, problem];
}

function Spark({values}) {
  const max = Math.max(1, ...values);
  const points = values.map((value, i) => `${(i * 100) / Math.max(1, values.length - 1)},${23 - (21 * value) / max}`);
  return html`<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">
    <polyline points=${points.join(" ")} /></svg>`;
}

function Figure({label, value, unit, children}) {
  return html`<div class="figure"><dt>${label}</dt><dd>${value}${unit && html`<small> ${unit}</small>`}</dd>${children}</div>`;
}

function Figures({state}) {
  const {stats} = state;
  const rate = stats.prefix_queries ? Math.round((100 * stats.prefix_hits) / stats.prefix_queries) : 0;
  return html`<dl class="figures-row">
    <${Figure} label="Running" value=${number.format(stats.num_running)} />
    <${Figure} label="Waiting" value=${number.format(stats.num_waiting)} />
    <${Figure} label="Blocks in use" value=${Math.round(100 * stats.kv_usage)} unit="%" />
    <${Figure} label="Prefix hits" value=${rate} unit="% of prompt" />
    <${Figure} label="Preemptions" value=${number.format(stats.preemptions)} />
    <${Figure} label="Computed" value=${number.format(Math.round(state.rates.at(-1) ?? 0))} unit="tokens/s">
      <${Spark} values=${state.rates} /></>
  </dl>`;
}

// The engines to choose from, if there are several (--data-parallel-size).
function Engines({state, onChoose}) {
  return html`<label class="engines">Engine
    <select value=${state.engine} onChange=${(event) => onChoose(event.target.value)}>
      ${state.engines.map((name) => html`<option value=${name}>${name}</option>`)}
    </select></label>`;
}

export function Live({model, active}) {
  const [engine, setEngine] = useState(null);
  const [state, problem] = useSnapshots(active, engine);
  const [chosen, setChosen] = useState(null);
  const [touring, setTouring] = useState(false);
  const sequence = state.sequences.find((one) => one.seq_id === chosen);

  const head = html`<div class="bar"><h2>Live view</h2>
    <span class=${`dot ${state.stats && !problem ? "on" : ""}`} aria-hidden="true"></span>
    <span class="muted">${state.stats ? `step ${number.format(state.stats.step)}` : state.health}</span>
    <span class="gap"></span>
    ${state.engines.length > 1 && html`<${Engines} state=${state} onChoose=${(name) => {
      setEngine(name);
      setChosen(null);
    }} />`}
    <button class="link" aria-expanded=${touring ? "true" : "false"} disabled=${!state.stats}
      onClick=${() => setTouring(!touring)}>${touring ? "End the tour" : "Tour in five steps"}</button></div>`;
  if (problem) {
    return html`${head}<p class="note">${problem.status === 401
      ? "The live view needs the admin key (--admin-api-key), since it shows the requests of all clients."
      : `The live view is interrupted: ${problem.message}`}</p>`;
  }
  if (!state.stats) return html`${head}<p class="note">${active ? state.health || "Connecting…" : "Locked."}</p>`;
  return html`${head}
    ${touring && html`<${Tour} state=${state} model=${model} onEnd=${() => setTouring(false)} />`}
    <${Figures} state=${state} />
    <${Pool} state=${state} sequence=${sequence} onChoose=${setChosen} />
    <${Lanes} state=${state} chosen=${chosen} onChoose=${setChosen} />
    ${sequence && html`<${Table} state=${state} sequence=${sequence} onChoose=${setChosen} />`}`;
}
