// The AI SDK against the demo model (DEMO_URL) and a scripted one (SCRIPTED_URL); run by check_ai_sdk.py.
import assert from "node:assert/strict";
import test from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, ToolLoopAgent, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";

const provider = (baseURL, apiKey = process.env.QUIRE_KEY) =>
  createOpenAICompatible({
    name: "quire",
    baseURL: `${baseURL}/v1`,
    apiKey,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
const demo = provider(process.env.DEMO_URL)("quire-demo");
const scripted = provider(process.env.SCRIPTED_URL)("scripted");
const sum = { model: demo, temperature: 0, maxRetries: 0, prompt: "What is 12 + 30?" };
const answer = "12 + 30 = 42";
const facts = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7.";
const person = Output.object({ schema: z.object({ name: z.string(), age: z.int() }) });

// An agent with a tool, and a list of the cities that it has asked for.
const weather = () => {
  const asked = [];
  const getWeather = tool({
    description: "Get the weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: ({ city }) => {
      asked.push(city);
      return { city, degrees: 21 };
    },
  });
  const options = { model: scripted, tools: { get_weather: getWeather }, maxRetries: 0 };
  return { asked, options: { ...options, stopWhen: isStepCount(5) } };
};

test("text, whole and streamed", async () => {
  const whole = await generateText(sum);
  assert.equal(whole.text, answer);
  assert.equal(whole.finishReason, "stop");
  const stream = streamText(sum);
  const pieces = [];
  for await (const piece of stream.textStream) pieces.push(piece);
  assert.ok(pieces.length > 1); // a draft that is accepted brings several tokens at once
  assert.equal(pieces.join(""), answer);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
});

test("structured output, whole and streamed", async () => {
  const body = { ...sum, prompt: facts, output: person };
  assert.deepEqual((await generateText(body)).output, { name: "Anna", age: 7 });
  const stream = streamText(body);
  const partial = [];
  for await (const object of stream.partialOutputStream) partial.push(object);
  assert.deepEqual(partial.at(-1), { name: "Anna", age: 7 });
});

test("a loop of two calls at once, their results and an answer", async () => {
  const { asked, options } = weather();
  const result = await generateText({ ...options, prompt: "How warm is it?" });
  assert.deepEqual(asked, ["Paris", "Oslo"]);
  assert.equal(result.text, "21 degrees in both.");
  assert.equal(result.steps[0].text, "I ask.");
  assert.equal(result.steps[0].reasoningText, "Two cities.");
  assert.equal(result.steps.length, 2);
});

test("the same loop, streamed by an agent, and a second turn", async () => {
  const { asked, options } = weather();
  const agent = new ToolLoopAgent(options);
  const messages = [{ role: "user", content: "How warm is it?" }];
  const stream = await agent.stream({ messages });
  const seen = { text: "", reasoning: "" };
  for await (const part of stream.fullStream) {
    if (part.type === "text-delta") seen.text += part.text;
    if (part.type === "reasoning-delta") seen.reasoning += part.text;
    assert.notEqual(part.type, "error", `${part.error}`);
  }
  assert.deepEqual(seen, { text: "I ask.21 degrees in both.", reasoning: "Two cities." });
  assert.deepEqual(asked, ["Paris", "Oslo"]);
  messages.push(...(await stream.responseMessages), { role: "user", content: "Thanks" });
  assert.equal((await agent.generate({ messages })).text, "You are welcome.");
});

test("a loop that ends with structured output", async () => {
  const { asked, options } = weather();
  const output = Output.object({ schema: z.object({ degrees: z.int() }) });
  const result = await generateText({ ...options, output, prompt: "Report how warm it is." });
  assert.deepEqual(result.output, { degrees: 21 });
  assert.deepEqual(asked, ["Paris", "Oslo"]);
});

test("errors have their status and message", async () => {
  await assert.rejects(generateText({ ...sum, topP: 2 }), (error) => {
    assert.ok(APICallError.isInstance(error), `${error}`);
    assert.equal(error.statusCode, 400);
    assert.match(error.message, /top_p/);
    return true;
  });
  const stranger = provider(process.env.DEMO_URL, "wrong")("quire-demo");
  await assert.rejects(generateText({ ...sum, model: stranger }), { statusCode: 401 });
});
