// The playground: one conversation or one prompt, its parameters, and what the model answers.

import {html, useEffect, useRef, useState} from "./preact.js";
import {events, request, snippet} from "./api.js";
import {Answer} from "./answer.js";

const NUMBERS = [
  ["temperature", "Temperature", "0 to 2", 0.1],
  ["top_p", "Top p", "0 to 1", 0.05],
  ["max_tokens", "Max tokens", "", 1],
  ["seed", "Seed", "", 1],
  ["n", "Answers (n)", "1", 1],
];
const TOOL = `[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]`;
const SCHEMA = `{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}`;

function parse(text, name) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw Object.assign(new Error(`${name} is not JSON: ${error.message}`), {param: name});
  }
}

// The body of the request: only fields that are filled in.
function bodyOf(mode, model, fields, messages, text) {
  const body = model ? {model: model.id} : {};
  if (mode === "chat") {
    const system = fields.system.trim() ? [{role: "system", content: fields.system}] : [];
    const said = messages.map(({role, content}) => ({role, content}));
    const next = text ? [{role: "user", content: text}] : [];
    body.messages = [...system, ...said, ...next];
  } else {
    body.prompt = text;
  }
  for (const [name] of NUMBERS) {
    if (fields[name] !== "") body[name] = Number(fields[name]);
  }
  const stops = fields.stop.split("\n").filter((line) => line !== "");
  if (stops.length) body.stop = stops;
  if (fields.logprobs) Object.assign(body, mode === "chat" ? {logprobs: true, top_logprobs: 5} : {logprobs: 5});
  if (mode === "chat" && fields.tools.trim()) body.tools = parse(fields.tools, "tools");
  if (fields.schema.trim()) {
    const schema = parse(fields.schema, "response_format");
    body.response_format = {type: "json_schema", json_schema: {name: "answer", schema}};
  }
  body.stream = true;
  body.stream_options = {include_usage: true};
  return body;
}

// Adds a chunk's choices to those of the answer.
function take(choices, chunk) {
  for (const part of chunk.choices) {
    const choice = (choices[part.index] ||= {text: "", reasoning: "", calls: [], tokens: [], end: null});
    const delta = part.delta || {content: part.text};
    choice.text += delta.content || "";
    choice.reasoning += delta.reasoning_content || delta.reasoning || "";
    for (const call of delta.tool_calls || []) {
      const known = (choice.calls[call.index] ||= {name: "", arguments: ""});
      known.name += call.function?.name || "";
      known.arguments += call.function?.arguments || "";
    }
    const logprobs = part.logprobs;
    if (logprobs?.content) {
      for (const one of logprobs.content) {
        choice.tokens.push({text: one.token, logprob: one.logprob,
          top: one.top_logprobs.map((other) => [other.token, other.logprob])});
      }
    } else if (logprobs?.tokens) {
      logprobs.tokens.forEach((text, i) => choice.tokens.push({text, logprob: logprobs.token_logprobs[i],
        top: Object.entries(logprobs.top_logprobs?.[i] || {})}));
    }
    choice.end = part.finish_reason || choice.end;
  }
}

const EMPTY = {system: "", stop: "", tools: "", schema: "", logprobs: false,
  temperature: "", top_p: "", max_tokens: "", seed: "", n: ""};

export function Playground({model, locked}) {
  const [mode, setMode] = useState("chat");
  const [fields, setFields] = useState(EMPTY);
  const [messages, setMessages] = useState([]);
  const [text, setText] = useState("What is a block table?");
  const [problem, setProblem] = useState(null);
  const [copied, setCopied] = useState("");
  const [, redraw] = useState(0);
  const running = useRef(null);
  const log = useRef(null);

  const answer = running.current;
  useEffect(() => () => running.current?.stop.abort(), []);

  const set = (name) => (event) => setFields({...fields,
    [name]: event.target.type === "checkbox" ? event.target.checked : event.target.value});
  const path = mode === "chat" ? "v1/chat/completions" : "v1/completions";
  const canSend = !locked && model && !answer && (text.trim() !== "");

  const send = async () => {
    setProblem(null);
    let body;
    try {
      body = bodyOf(mode, model, fields, messages, text);
    } catch (error) {
      setProblem(error);
      return;
    }
    const asked = mode === "chat" ? [...messages, {role: "user", content: text}]
      : [{role: "prompt", content: text}];
    const run = {choices: [], stop: new AbortController(), usage: null,
      start: performance.now(), first: null, end: null};
    running.current = run;
    setMessages(asked);
    if (mode === "chat") setText("");
    let frame = 0;
    const draw = () => {
      frame = 0;
      redraw((count) => count + 1);
      const box = log.current;
      if (box && box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
    };
    try {
      for await (const chunk of events(await request(path, {body, signal: run.stop.signal}))) {
        if (chunk.choices.length) run.first ??= performance.now();
        run.usage = chunk.usage || run.usage;
        take(run.choices, chunk);
        frame ||= requestAnimationFrame(draw);
      }
    } catch (error) {
      if (error.name !== "AbortError") setProblem(error);
    }
    cancelAnimationFrame(frame);
    run.end = performance.now();
    for (const choice of run.choices) choice.end ||= "stopped";
    running.current = null;
    if (run.choices.length) {
      setMessages([...asked, {role: "assistant", content: run.choices[0].text, run}]);
    } else {
      setMessages(mode === "chat" ? messages : []);
      if (mode === "chat") setText(text);
    }
    requestAnimationFrame(draw);
  };

  const copy = async (kind) => {
    try {
      const body = bodyOf(mode, model, fields, messages.filter(({role}) => role !== "prompt"), text);
      if (kind !== "curl") delete body.stream_options;
      const code = snippet(kind, path, body);
      // Without TLS, browsers give access to the clipboard on localhost only.
      if (navigator.clipboard) {
        await navigator.clipboard.writeText(code);
        setCopied(`Copied as ${kind}.`);
      } else {
        setCopied(code);
      }
      setProblem(null);
    } catch (error) {
      setProblem(error);
    }
  };

  const onKey = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (canSend) send();
    }
  };
  const change = (next) => {
    setMode(next);
    setMessages([]);
    setProblem(null);
    setText(next === "chat" ? "What is a block table?" : "A block table is");
  };
  const invalid = (name) => (problem?.param?.startsWith(name) ? "true" : undefined);

  return html`
    <div class="bar">
      <h2>Playground</h2>
      <div class="choice" role="group" aria-label="Kind of request">
        ${["chat", "completion"].map((one) => html`<button aria-pressed=${mode === one ? "true" : "false"}
          onClick=${() => change(one)} disabled=${!!answer}>${one}</button>`)}
      </div>
      <span class="gap"></span>
      ${messages.length > 0 && !answer && html`<button class="link" onClick=${() => setMessages([])}>Clear</button>`}
    </div>
    <div class="log" ref=${log} tabindex="0" role="log" aria-label="Conversation" aria-busy=${answer ? "true" : "false"}>
      ${messages.length === 0 && !answer && html`<p class="hint">Ask the model something. Its blocks light up in the live
        view while it answers.</p>`}
      ${messages.map((message) => (message.run
        ? html`<${Answer} run=${message.run} />`
        : html`<p class=${`said ${message.role}`}>${message.content}</p>`))}
      ${answer && html`<${Answer} run=${answer} />`}
    </div>
    ${problem && html`<p class="problem" role="alert">${problem.message}</p>`}
    <form class="compose" onSubmit=${(event) => { event.preventDefault(); if (canSend) send(); }}>
      <textarea rows=${mode === "chat" ? 2 : 4} aria-label=${mode === "chat" ? "Message" : "Prompt"} value=${text}
        onInput=${(event) => setText(event.target.value)} onKeyDown=${onKey}></textarea>
      ${/* Without keys both would be one element, and a click on Stop would end as one on Send. */ answer
        ? html`<button key="stop" type="button" class="primary stop" onClick=${() => answer.stop.abort()}>Stop</button>`
        : html`<button key="send" class="primary" disabled=${!canSend}>Send</button>`}
    </form>
    <details class="more">
      <summary>Parameters</summary>
      <div class="fields">
        ${NUMBERS.map(([name, label, hint, step]) => html`<label>${label}
          <input type="number" inputmode="decimal" step=${step} placeholder=${hint || "default"} value=${fields[name]}
            aria-invalid=${invalid(name)} onInput=${set(name)} /></label>`)}
        <label class="check"><input type="checkbox" checked=${fields.logprobs} onChange=${set("logprobs")} />
          Log-probabilities</label>
        <label class="full">Stop strings, one a line
          <textarea rows="1" value=${fields.stop} aria-invalid=${invalid("stop")} onInput=${set("stop")}></textarea></label>
        ${mode === "chat" && html`<label class="full">System prompt
          <textarea rows="2" value=${fields.system} onInput=${set("system")}></textarea></label>
        <label class="full">Tools, as a JSON array
          <textarea rows="2" class="code" placeholder=${TOOL} value=${fields.tools}
            aria-invalid=${invalid("tools")} onInput=${set("tools")}></textarea></label>`}
        <label class="full">JSON schema of the answer
          <textarea rows="2" class="code" placeholder=${SCHEMA} value=${fields.schema}
            aria-invalid=${invalid("response_format")} onInput=${set("schema")}></textarea></label>
      </div>
    </details>
    <div class="bar copy">
      <span id="copy">Copy as</span>
      <div class="choice" role="group" aria-labelledby="copy">
        ${[["curl", "curl"], ["python", "Python"], ["node", "Node"]].map(([kind, label]) => html`
          <button onClick=${() => copy(kind)}>${label}</button>`)}
      </div>
      <span role="status" class=${copied.includes("\n") ? "code block" : "muted"}>${copied}</span>
    </div>`;
}
