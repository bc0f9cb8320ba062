// The `openai` package for Node against the server of OPENAI_BASE_URL; run by check_node.py.
import assert from "node:assert/strict";
import test from "node:test";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ maxRetries: 0 });
const greedy = { model: "quire-demo", temperature: 0 };
const sum = { ...greedy, messages: [{ role: "user", content: "What is 12 + 30?" }] };
const answer = "12 + 30 = 42";
const facts = "Fill in this JSON schema: {name: string, age: integer}\nThe name is Anna, age is 7.";
const Person = z.object({ name: z.string(), age: z.int() });
const anna = { name: "Anna", age: 7 };
const getWeather = zodFunction({
  name: "get_weather",
  description: "Get the weather of a city",
  parameters: z.object({ city: z.string() }),
});
const weather = {
  ...greedy,
  messages: [{ role: "user", content: "What is the weather in Paris?" }],
  tools: [getWeather],
};

test("models", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ["quire-demo"]);
  assert.equal((await client.models.retrieve("quire-demo")).object, "model");
});

test("chat, whole and streamed", async () => {
  const whole = await client.chat.completions.create(sum);
  assert.equal(whole.choices[0].message.content, answer);
  let text = "";
  let usage;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ ...sum, ...options })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, answer);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  const final = await client.chat.completions.stream(sum).finalChatCompletion();
  assert.equal(final.choices[0].message.content, answer);
});

test("completions, whole and streamed", async () => {
  const body = { ...greedy, prompt: "Once upon", max_tokens: 8 };
  const whole = await client.completions.create(body);
  let text = "";
  for await (const chunk of await client.completions.create({ ...body, stream: true })) {
    text += chunk.choices[0].text;
  }
  assert.ok(text);
  assert.equal(text, whole.choices[0].text);
});

test("chat.completions.parse with zod", async () => {
  const parsed = await client.chat.completions.parse({
    ...greedy,
    messages: [{ role: "user", content: facts }],
    response_format: zodResponseFormat(Person, "person"),
  });
  assert.deepEqual(parsed.choices[0].message.parsed, anna);
});

test("tools, whole, streamed and run", async () => {
  const whole = await client.chat.completions.parse(weather);
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  assert.deepEqual(call.function.parsed_arguments, { city: "Paris" });
  const pieces = [];
  const stream = client.chat.completions.stream(weather);
  stream.on("tool_calls.function.arguments.delta", (event) => pieces.push(event.arguments_delta));
  const final = await stream.finalChatCompletion();
  assert.equal(pieces.join(""), call.function.arguments);
  assert.deepEqual(final.choices[0].message.tool_calls[0].function.parsed_arguments, {
    city: "Paris",
  });
  const asked = [];
  const runner = client.chat.completions.runTools({
    ...weather,
    tools: [
      {
        type: "function",
        function: {
          ...getWeather.function,
          parse: JSON.parse,
          function: ({ city }) => {
            asked.push(city);
            return { weather: "sunny" };
          },
        },
      },
    ],
  });
  assert.equal(await runner.finalContent(), "The weather in Paris is sunny.");
  assert.deepEqual(asked, ["Paris"]);
});

test("responses: created, retrieved, streamed, parsed, followed, cancelled", async () => {
  const body = { ...greedy, input: "What is 12 + 30?" };
  const whole = await client.responses.create(body);
  assert.equal(whole.output_text, answer);
  assert.equal((await client.responses.retrieve(whole.id)).status, "completed");
  const types = [];
  for await (const event of await client.responses.create({ ...body, stream: true })) {
    types.push(event.type);
  }
  assert.equal(types[0], "response.created");
  assert.equal(types.at(-1), "response.completed");
  assert.equal((await client.responses.stream(body).finalResponse()).output_text, answer);
  const parsed = await client.responses.parse({
    ...greedy,
    input: facts,
    text: { format: zodTextFormat(Person, "person") },
  });
  assert.deepEqual(parsed.output_parsed, anna);
  const more = await client.responses.create({ ...body, previous_response_id: whole.id });
  assert.ok(more.usage.input_tokens > whole.usage.input_tokens);
  const story = { ...body, input: "Tell me a story", ignore_eos: true, background: true };
  const running = await client.responses.create(story);
  assert.equal((await client.responses.cancel(running.id)).status, "cancelled");
});

test("a stream that is left is aborted, and the next answer comes", async () => {
  const stream = await client.chat.completions.create({ ...sum, ignore_eos: true, stream: true });
  for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
  assert.ok(stream.controller.signal.aborted);
  assert.equal((await client.chat.completions.create(sum)).choices[0].message.content, answer);
});

test("errors have their class, code and param", async () => {
  const named = (Kind, status, code, param) => (error) => {
    assert.ok(error instanceof Kind, `${error}`);
    assert.deepEqual([error.status, error.code, error.param], [status, code, param]);
    assert.ok(error.message && error.type && error.requestID);
    return true;
  };
  await assert.rejects(
    client.chat.completions.create({ ...sum, model: "other" }),
    named(OpenAI.NotFoundError, 404, "model_not_found", "model"),
  );
  await assert.rejects(
    client.chat.completions.create({ ...sum, top_p: 2 }),
    named(OpenAI.BadRequestError, 400, "invalid_value", "top_p"),
  );
  await assert.rejects(
    client.withOptions({ apiKey: "wrong" }).models.list(),
    named(OpenAI.AuthenticationError, 401, "invalid_api_key", null),
  );
});
