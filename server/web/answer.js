// One answer of the model with its choices. With log-probabilities, each token can be looked at.

import {html, useState} from "./preact.js";

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
const visible = (token) => token.replaceAll("\n", "↵").replaceAll(" ", "·");

function Tokens({tokens}) {
  const [at, setAt] = useState(null);
  const move = (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    setAt(Math.max(0, Math.min(tokens.length - 1, at === null ? 0 : at + step)));
  };
  const token = at === null ? null : tokens[at];
  return html`
    <p class="tokens" tabindex="0" role="group" onKeyDown=${move} onMouseLeave=${() => setAt(null)}
       aria-label="Tokens; the arrow keys show their log-probabilities">
      ${tokens.map((one, i) => html`<span class=${`token p${Math.min(4, Math.floor(-one.logprob))}${i === at ? " on" : ""}`}
        onMouseEnter=${() => setAt(i)}>${one.text}</span>`)}
    </p>
    <p class="odds" role="status">${token === null
      ? html`<span class="muted">Hover a token, or use the arrow keys.</span>`
      : html`<b>${visible(token.text)}</b> ${percent(token.logprob)}
        ${token.top.filter(([text]) => text !== token.text).map(([text, logprob]) => html`
          <span class="other"><code>${visible(text)}</code> ${percent(logprob)}</span>`)}`}</p>`;
}

function Choice({choice, number, many}) {
  return html`<div class="answer">
    ${many && html`<span class="number">${number + 1}</span>`}
    ${choice.reasoning && html`<details class="reasoning" open><summary>Reasoning</summary>${choice.reasoning}</details>`}
    ${choice.tokens.length ? html`<${Tokens} tokens=${choice.tokens} />` : html`<p class="text">${choice.text}</p>`}
    ${choice.calls.map((call) => html`<pre class="call"><b>${call.name}</b> ${call.arguments}</pre>`)}
    ${choice.end && choice.end !== "stop" && html`<p class="end">${{
      length: "ended at its maximum length", stopped: "stopped", tool_calls: "asks for tools",
    }[choice.end] || choice.end}</p>`}
  </div>`;
}

// How long the answer took: the time to its first token, and the rate after it.
function figures({usage, start, first, end}) {
  if (first === null) return "";
  const parts = [`first token after ${Math.round(first - start)} ms`];
  if (usage && end !== null) {
    const seconds = (end - first) / 1000;
    parts.unshift(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens`);
    const cached = usage.prompt_tokens_details?.cached_tokens;
    if (cached) parts[0] += `, ${cached} of them cached`;
    if (seconds > 0.05) parts.push(`${Math.round(usage.completion_tokens / seconds)} tokens/s`);
  }
  return parts.join(" · ");
}

export function Answer({run}) {
  const choices = run.choices.filter(Boolean);
  return html`<article class=${`run${run.end === null ? " busy" : ""}`} aria-label="Answer">
    <div class=${choices.length > 1 ? "answers" : ""}>
      ${choices.map((choice, i) => html`<${Choice} choice=${choice} number=${i} many=${choices.length > 1} />`)}
    </div>
    <p class="figures">${figures(run)}</p>
  </article>`;
}
