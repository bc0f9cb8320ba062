// The page in a real Chromium, against the server at QUIRE_URL. check_page.py starts both.

import assert from "node:assert/strict";
import {readFile} from "node:fs/promises";
import {createRequire} from "node:module";
import {after, before, test} from "node:test";
import {chromium} from "playwright-core";

const {QUIRE_URL: URL_, QUIRE_LOCKED_URL: LOCKED, QUIRE_TWO_URL: TWO, CHROMIUM, SCREENSHOTS} = process.env;
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const DESKTOP = {width: 1360, height: 860}, PHONE = {width: 390, height: 844};
let browser;

before(async () => {
  browser = await chromium.launch({executablePath: CHROMIUM, args: ["--no-sandbox"]});
});
after(() => browser.close());

// Opens the page; whatever the console reports as an error fails the test when the page is closed.
async function open({url = URL_, viewport = DESKTOP, colorScheme = "light"} = {}) {
  const context = await browser.newContext({viewport, colorScheme});
  const page = await context.newPage();
  const errors = [];
  page.on("console", (message) => {
    // A browser reports each refusal by itself, also those that a test asks for.
    const refused = /status of 40[01]/.test(message.text());
    if (message.type() === "error" && !refused) errors.push(message.text());
  });
  page.on("pageerror", (error) => errors.push(error.message));
  page.on("request", (request) => {
    if (!request.url().startsWith(url)) errors.push(`loads ${request.url()}`);
  });
  await page.goto(url);
  await page.getByRole("heading", {name: "quire"}).waitFor();
  return {page, close: async () => {
    await context.close();
    assert.deepEqual(errors, []);
  }};
}

async function shoot(page, name) {
  if (SCREENSHOTS) await page.screenshot({path: `${SCREENSHOTS}/${name}.png`});
}

async function violations(page) {
  // Playwright's evaluate is not subject to the page's policy.
  await page.evaluate(axe);
  const {violations: found} = await page.evaluate(() => axe.run(document, {runOnly: ["wcag2a", "wcag2aa",
    "wcag21a", "wcag21aa", "best-practice"]}));
  return found.map((one) => `${one.id}: ${one.nodes.map((node) => `${node.html} ${node.failureSummary}`).join(" | ")}`);
}

const send = (page) => page.getByRole("button", {name: "Send", exact: true});

async function ask(page, text) {
  const before = await page.getByRole("article").count();
  await page.getByRole("textbox", {name: "Message"}).fill(text);
  await send(page).click();
  const answer = page.getByRole("article").nth(before);
  await answer.getByText(/\d+ \+ \d+ tokens/).waitFor();
  return answer;
}

test("a chat is answered token by token", async () => {
  const {page, close} = await open();
  await send(page).waitFor();
  const answer = await ask(page, "What is a KV block?");
  assert.match(await answer.locator(".text").textContent(), /KV block/);
  // The conversation goes on.
  await ask(page, "What is quire?");
  assert.equal(await page.getByRole("article").count(), 2);
  await close();
});

test("the first paint is fast", async () => {
  const {page, close} = await open();
  const paint = () => page.evaluate(() => performance.getEntriesByName("first-contentful-paint")[0]?.startTime);
  await page.reload();
  await send(page).waitFor();
  const first = await paint();
  assert.ok(first < 1000, `${first} ms`); // 300 ms on a machine with nothing else to do
  await close();
});

test("blocks light up while an answer comes, and go out after it", async () => {
  const {page, close} = await open();
  const map = page.getByRole("application");
  const used = async () => Number((await map.getAttribute("aria-label")).match(/(\d+) in use/)[1]);
  await map.waitFor();
  assert.equal(await used(), 0);
  await page.getByRole("button", {name: "completion", exact: true}).click();
  await page.getByText("Parameters").click();
  await page.getByLabel("Max tokens").fill("900");
  await page.getByLabel("Answers (n)").fill("4");
  await page.getByLabel("Temperature").fill("1.5");
  await page.getByLabel("Seed").fill("3");
  await page.getByRole("textbox", {name: "Prompt"}).fill("A river rises in the hills and grows. ".repeat(8));
  await send(page).click();
  await page.waitForFunction(() => / [1-9]\d* in use/.test(document.querySelector("canvas").ariaLabel));
  await page.locator(".lane").first().click();
  await page.getByText("Shares with").waitFor();
  await map.focus();
  await page.keyboard.press("ArrowRight");
  await page.getByText(/^Block 0: /).waitFor();
  await page.waitForFunction(() => / 0 in use/.test(document.querySelector("canvas").ariaLabel), null, {timeout: 30000});
  assert.equal(await page.locator(".answers .answer").count(), 4);
  await close();
});

test("an answer can be stopped, and its sequence ends", async () => {
  const {page, close} = await open();
  await page.getByRole("button", {name: "completion", exact: true}).click();
  await page.getByText("Parameters").click();
  await page.getByLabel("Max tokens").fill("1000");
  // The demo model ends its stories soon, unless it is forbidden to.
  await page.route("**/v1/completions", (route) => route.continue({
    postData: JSON.stringify({...route.request().postDataJSON(), ignore_eos: true}),
  }));
  await page.getByRole("textbox", {name: "Prompt"}).fill("Once");
  await send(page).click();
  await page.locator(".answer").first().waitFor();
  await page.getByRole("button", {name: "Stop"}).click();
  await page.getByText("stopped").first().waitFor();
  await page.getByText("Nothing runs.").waitFor();
  await close();
});

test("log-probabilities are shown for a token under the pointer or the arrow keys", async () => {
  const {page, close} = await open();
  await page.getByText("Parameters").click();
  await page.getByLabel("Log-probabilities").check();
  const answer = await ask(page, "What is a KV block?");
  await answer.locator(".token").nth(2).hover();
  await answer.locator(".odds", {hasText: "%"}).waitFor();
  await answer.getByRole("group").focus();
  await page.keyboard.press("ArrowRight");
  assert.equal(await answer.locator(".token.on").count(), 1);
  assert.deepEqual(await violations(page), []);
  await shoot(page, "logprobs");
  await close();
});

test("a schema is obeyed, and a bad field is shown where it is", async () => {
  const {page, close} = await open();
  await page.getByText("Parameters").click();
  const schema = page.getByLabel("JSON schema of the answer");
  await schema.fill("{");
  await page.getByRole("textbox", {name: "Message"}).fill("Hello");
  await send(page).click();
  await page.getByRole("alert").waitFor();
  assert.equal(await schema.getAttribute("aria-invalid"), "true");
  await schema.fill('{"type": "object", "properties": {"a": {"enum": ["b"]}}, "required": ["a"], "additionalProperties": false}');
  const answer = await ask(page, "Hello");
  assert.deepEqual(JSON.parse(await answer.locator(".text").textContent()), {a: "b"});
  await page.getByLabel("Temperature").fill("3");
  await page.getByRole("textbox", {name: "Message"}).fill("Hello");
  await send(page).click();
  await page.getByRole("alert").waitFor();
  assert.equal(await page.getByLabel("Temperature").getAttribute("aria-invalid"), "true");
  await close();
});

test("requests are copied as curl, Python and Node", async () => {
  const {page, close} = await open();
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  await page.getByRole("textbox", {name: "Message"}).fill('It\'s "quoted"');
  for (const [name, part] of [["curl", "curl -N"], ["Python", "from openai import OpenAI"], ["Node", "new OpenAI"]]) {
    await page.getByRole("button", {name, exact: true}).click();
    await page.getByText(/^Copied as/).waitFor();
    const code = await page.evaluate(() => navigator.clipboard.readText());
    assert.ok(code.includes(part) && code.includes("chat"), code);
  }
  await close();
});

for (const [name, options] of Object.entries({
  light: {}, dark: {colorScheme: "dark"}, phone: {viewport: PHONE}, "phone-dark": {viewport: PHONE, colorScheme: "dark"},
})) {
  test(`the tour shows what it says, accessibly (${name})`, async () => {
    const {page, close} = await open(options);
    assert.deepEqual(await violations(page), []);
    if (options.viewport) {
      await page.getByRole("tab", {name: "Playground"}).focus();
      await page.keyboard.press("ArrowRight");
    }
    await page.getByRole("button", {name: "Tour in five steps"}).click();
    for (const label of ["Send one request", "Send two requests", "Ask for four answers", "Send it again", "Fill the pool"]) {
      await page.getByRole("button", {name: label}).click();
      await page.locator(".seen", {hasText: "✓"}).waitFor().catch(async (error) => {
        throw new Error(`${label}: ${await page.locator(".tour").textContent()}`, {cause: error});
      });
      if (label !== "Send it again" && await page.locator(".lane").count()) {
        await page.locator(".lane").first().click({timeout: 1000}).catch(() => {}); // it may have ended
      }
      await shoot(page, `${name}-${label.split(" ").at(-1)}`);
      assert.deepEqual(await violations(page), []);
      await page.getByRole("button", {name: /^(Next|End)$/}).click();
    }
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    assert.ok(overflow <= 0, `${overflow} pixels too wide`);
    await close();
  });
}

test("the page asks for the key, and stays locked without it", async () => {
  const {page, close} = await open({url: LOCKED});
  await page.getByText("This server asks for a key.").waitFor();
  assert.equal(await send(page).isDisabled(), true);
  assert.deepEqual(await violations(page), []);
  await page.getByLabel("API key").fill("wrong");
  await page.getByRole("button", {name: "Unlock"}).click();
  await page.getByText("This key was refused.").waitFor();
  await page.getByLabel("API key").fill("client");
  await page.getByRole("button", {name: "Unlock"}).click();
  await page.getByText("The live view needs the admin key").waitFor();
  assert.match(await (await ask(page, "What is quire?")).textContent(), /\w/);
  await page.getByRole("button", {name: "Key", exact: true}).click();
  await page.getByLabel("API key").fill("boss");
  await page.getByRole("button", {name: "Unlock"}).click();
  await page.getByRole("application").waitFor();
  await close();
});

test("of several engines one is chosen", async () => {
  const {page, close} = await open({url: TWO});
  const engines = page.getByRole("combobox", {name: "Engine"});
  await engines.waitFor();
  assert.equal(await engines.inputValue(), "0");
  assert.deepEqual(await engines.getByRole("option").allTextContents(), ["0", "1"]);
  const asked = page.waitForRequest((request) => request.url().endsWith("/debug/live?engine=1"));
  await engines.selectOption("1");
  await asked;
  await page.getByRole("application").waitFor();
  assert.equal(await engines.inputValue(), "1");
  assert.deepEqual(await violations(page), []);
  await close();
});

test("nothing is read while the live view is closed", async () => {
  const {page, close} = await open({viewport: PHONE});
  let reading = 0;
  page.on("request", (request) => { reading += request.url().endsWith("/debug/live"); });
  await page.waitForTimeout(500);
  assert.equal(reading, 0);
  const ended = page.waitForEvent("requestfailed", (request) => request.url().endsWith("/debug/live"));
  await page.getByRole("tab", {name: "Live view"}).click();
  await page.getByRole("application").waitFor();
  assert.equal(reading, 1);
  await page.getByRole("tab", {name: "Playground"}).click();
  await ended;
  await close();
});

test("the address /#live opens on the live view", async () => {
  const {page, close} = await open({viewport: PHONE});
  await page.goto(`${URL_}#live`);
  await page.getByRole("application").waitFor();
  await page.reload();
  await page.getByRole("application").waitFor();
  assert.equal(await page.getByRole("tab", {name: "Live view"}).getAttribute("aria-selected"), "true");
  await close();
});
