// A chat as a stream.

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://127.0.0.1:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});
const [model] = (await client.models.list()).data;

const stream = await client.chat.completions.create({
  model: model.id,
  messages: [{role: "user", content: "What is 12 + 30?"}],
  temperature: 0,
  stream: true,
});
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta.content ?? "");
console.log();
