// Requests to this server: the key, server-sent events, and the same request as a snippet.

const KEY = "quire.key";

// The key stays in this tab, and ends with it.
export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export class ApiError extends Error {
  constructor(status, message, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export async function request(path, {body, signal} = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  const answer = await fetch(path, {
    method: body ? "POST" : "GET",
    headers,
    body: body && JSON.stringify(body),
    signal,
  });
  if (answer.ok) return answer;
  let error = {message: `${answer.status} ${answer.statusText}`};
  try {
    error = (await answer.json()).error || error;
  } catch {
    // The answer of a proxy need not be JSON.
  }
  throw new ApiError(answer.status, error.message, error.param);
}

// Yields the JSON of each event. Events are separated by an empty line; comments are skipped.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const data = part.slice(6);
        if (data === "[DONE]") return;
        const message = JSON.parse(data);
        if (message.error) throw new ApiError(500, message.error.message);
        yield message;
      }
    }
  } finally {
    // Whoever stops reading closes the connection, and the server ends its work.
    await reader.cancel().catch(() => {});
  }
}

// Python has other names for three values; everything else of JSON is the same.
function python(value, indent) {
  const pad = " ".repeat(indent + 4), end = " ".repeat(indent);
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((item) => pad + python(item, indent + 4))
    : Object.entries(value).map(([name, item]) => `${pad}${JSON.stringify(name)}: ${python(item, indent + 4)}`);
  return items.length ? `${open}\n${items.join(",\n")},\n${end}${close}` : open + close;
}

// The fields that OpenAI's Python package does not know go into extra_body.
const EXTRA = new Set(["top_k", "min_p", "ignore_eos", "repetition_penalty"]);

export function snippet(kind, path, body) {
  const url = new URL(path, document.baseURI).href;
  const base = new URL("v1", document.baseURI).href;
  const json = JSON.stringify(body, null, 2);
  const secret = key.get() ? "$QUIRE_KEY" : "";
  if (kind === "curl") {
    const auth = secret ? ` \\\n  -H "Authorization: Bearer ${secret}"` : "";
    return `curl -N '${url}' \\\n  -H 'Content-Type: application/json'${auth} \\\n` +
      `  -d '${json.replaceAll("'", "'\\''")}'\n`;
  }
  const chat = path.includes("chat");
  const call = chat ? "chat.completions.create" : "completions.create";
  if (kind === "python") {
    const fields = Object.entries(body).filter(([name]) => !EXTRA.has(name));
    const extra = Object.entries(body).filter(([name]) => EXTRA.has(name));
    if (extra.length) fields.push(["extra_body", Object.fromEntries(extra)]);
    const api = secret ? 'os.environ["QUIRE_KEY"]' : '"none"';
    const piece = chat ? "choice.delta.content" : "choice.text";
    return `${secret ? "import os\n\n" : ""}from openai import OpenAI\n\n` +
      `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${api})\n` +
      `stream = client.${call}(\n` +
      fields.map(([name, value]) => `    ${name}=${python(value, 4)},\n`).join("") +
      `)\nfor chunk in stream:\n    for choice in chunk.choices:\n` +
      `        print(${piece} or "", end="", flush=True)\n`;
  }
  const api = secret ? "process.env.QUIRE_KEY" : '"none"';
  const piece = chat ? "choice.delta.content" : "choice.text";
  return `import OpenAI from "openai";\n\n` +
    `const client = new OpenAI({ baseURL: ${JSON.stringify(base)}, apiKey: ${api} });\n` +
    `const stream = await client.${call}(${json});\n` +
    `for await (const chunk of stream)\n  for (const choice of chunk.choices)\n` +
    `    process.stdout.write(${piece} ?? "");\n`;
}
