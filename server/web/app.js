// The page: header, key, and its two halves.

import {html, render, useEffect, useState} from "./preact.js";
import {key, request} from "./api.js";
import {Playground} from "./playground.js";
import {Live} from "./live.js";

// The address /#live opens on the live view.
const named = () => (location.hash === "#live" ? "live" : "play");

const WIDE = matchMedia("(min-width: 64rem)");

function KeyForm({message, onKey}) {
  const [value, setValue] = useState("");
  const submit = (event) => {
    event.preventDefault();
    onKey(value.trim());
  };
  return html`<section aria-label="Access"><form class="keyform" onSubmit=${submit}>
    <label>API key
      <input type="password" autocomplete="off" value=${value} required
             onInput=${(event) => setValue(event.target.value)} />
    </label>
    <button class="primary">Unlock</button>
    <p role="status">${message}</p>
  </form></section>`;
}

function App() {
  const [model, setModel] = useState(null);
  const [problem, setProblem] = useState(null);
  const [generation, setGeneration] = useState(0);
  const [tab, setTab] = useState(named);
  const [wide, setWide] = useState(WIDE.matches);
  const [asking, setAsking] = useState(false);

  useEffect(() => {
    const change = () => setWide(WIDE.matches);
    WIDE.addEventListener("change", change);
    return () => WIDE.removeEventListener("change", change);
  }, []);

  useEffect(() => {
    const change = () => setTab(named());
    addEventListener("hashchange", change);
    return () => removeEventListener("hashchange", change);
  }, []);

  useEffect(() => {
    let timer;
    let stopped = false;
    const load = async () => {
      try {
        const {data} = await (await request("v1/models")).json();
        if (stopped) return;
        setModel(data[0]);
        setProblem(null);
        // Before the engine has started for the first time, the length of its context is unknown.
        if (data[0].max_model_len === null) timer = setTimeout(load, 1000);
      } catch (error) {
        if (stopped) return;
        setModel(null);
        setProblem(error);
        if (error.status !== 401) timer = setTimeout(load, 2000);
      }
    };
    load();
    return () => {
      stopped = true;
      clearTimeout(timer);
    };
  }, [generation]);

  const onKey = (value) => {
    key.set(value);
    setAsking(false);
    setGeneration(generation + 1);
  };
  const locked = problem !== null && problem.status === 401;
  const state = locked ? "locked" : problem ? "unreachable" : model === null ? "connecting"
    : model.max_model_len === null ? "loading the model" : model.id;

  const choose = (event) => {
    const next = {ArrowRight: "live", ArrowLeft: "play"}[event.key];
    if (!next) return;
    setTab(next);
    document.getElementById(`tab-${next}`).focus();
  };
  const tabButton = (name, label) => html`<button role="tab" id=${`tab-${name}`}
    aria-selected=${tab === name ? "true" : "false"} aria-controls=${`panel-${name}`}
    tabindex=${tab === name ? 0 : -1} onClick=${() => setTab(name)}>${label}</button>`;
  const panel = (name) => (wide
    ? {class: `half ${name}`, "aria-label": name === "play" ? "Playground" : "Live view"}
    : {class: `half ${name}`, role: "tabpanel", id: `panel-${name}`,
       "aria-labelledby": `tab-${name}`, hidden: tab !== name});

  return html`
    <header class="top">
      <span class="mark" aria-hidden="true"></span><h1>quire</h1>
      <span class=${`state ${problem ? "bad" : "good"}`} role="status">${state}</span>
      <nav aria-label="More">
        <a href="docs">API</a>
        <button class="link" aria-expanded=${asking ? "true" : "false"}
                onClick=${() => setAsking(!asking)}>Key</button>
      </nav>
      ${!wide && html`<div class="tabs" role="tablist" aria-label="Parts of the page"
                           onKeyDown=${choose}>
        ${tabButton("play", "Playground")}${tabButton("live", "Live view")}</div>`}
    </header>
    ${(locked || asking) && html`<${KeyForm} onKey=${onKey}
      message=${locked && key.get() ? "This key was refused." : locked
        ? "This server asks for a key. It stays in this tab." : ""} />`}
    <main class=${wide ? "wide" : ""}>
      <section ...${panel("play")}>
        <${Playground} model=${model} locked=${locked} />
      </section>
      <section ...${panel("live")}>
        <${Live} model=${model} key=${generation} active=${!locked && (wide || tab === "live")} />
      </section>
    </main>`;
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
