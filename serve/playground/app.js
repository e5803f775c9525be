"use strict";
// The playground: one conversation with one target. It speaks the endpoint's own HTTP API and keeps nothing.

const $ = (id) => document.getElementById(id);
const MODELS_EVERY_MS = 3000;
const BARS = 48; // pieces that the small chart shows
let conversation = []; // {role, content}
let cards = new Map(); // target -> its card of /v1/models
let open = null; // AbortController of the answer that streams
let last = null; // {target, messages, speed} of the last whole answer

const headers = () => ({
  "Content-Type": "application/json",
  ...($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {}),
});

async function refreshModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await problem(response));
    cards = new Map((await response.json()).data.map((card) => [card.id, card]));
  } catch (error) {
    $("version").textContent = String(error.message || error);
    return;
  }
  const names = [...cards.keys()];
  const shown = [...$("target").options].map((option) => option.value);
  if (names.join("\n") !== shown.join("\n")) {
    const chosen = $("target").value;
    $("target").replaceChildren(...names.map((name) => new Option(name, name)));
    if (cards.has(chosen)) $("target").value = chosen;
  }
  showVersion();
}

function showVersion() {
  const card = cards.get($("target").value);
  if (!card) return;
  const names = { base: "base draft", plain: "no draft" };
  $("version").textContent = names[card.version] || card.version;
  const canary = card.canary;
  $("canary").hidden = !canary;
  if (canary) $("canary").textContent = `canary ${canary.version} at ${Math.round(100 * canary.share)} %`;
}

function addMessage(role) {
  $("empty")?.remove();
  const message = document.createElement("div");
  message.className = `message ${role}`;
  const said = document.createElement("div");
  said.className = "said";
  const about = document.createElement("div");
  about.className = "about";
  message.append(said, ...(role === "assistant" ? [about] : []));
  $("messages").append(message);
  return { message, said, about };
}

function follow() {
  const box = $("messages");
  if (box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

/** What one answer has come to so far. */
class Tally {
  constructor() {
    this.asked = performance.now();
    this.first = null;
    this.ended = null;
    this.tokens = this.rounds = this.emitted = this.chars = this.draftedChars = 0;
    this.pieces = []; // {tokens, rounds} of each piece
    this.text = "";
    this.version = "";
  }

  take(chunk) {
    const now = performance.now();
    const piece = chunk.choices[0]?.delta.content || "";
    this.version = chunk.system_fingerprint || this.version;
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    if (piece && this.first === null) this.first = now;
    if (piece) this.ended = now;
    this.text += piece;
    const spans = chunk.farm?.spans || (piece ? [[piece, false]] : []);
    for (const [text, drafted] of spans) {
      this.chars += text.length;
      if (drafted) this.draftedChars += text.length;
    }
    if (chunk.farm) {
      this.pieces.push({ tokens: chunk.farm.emitted - this.emitted, rounds: chunk.farm.rounds - this.rounds });
      this.emitted = chunk.farm.emitted;
      this.tokens = chunk.farm.tokens;
      this.rounds = chunk.farm.rounds;
    }
    return spans;
  }

  get tau() { return this.rounds ? this.emitted / this.rounds : null; }
  get speed() {
    const seconds = (this.ended - this.first) / 1000;
    return this.tokens > 1 && seconds > 0 ? (this.tokens - 1) / seconds : null;
  }
  get share() { return this.chars ? this.draftedChars / this.chars : null; }
}

const fixed = (value, digits) => (value === null || !Number.isFinite(value) ? "–" : value.toFixed(digits));

function show(tally) {
  $("tau").textContent = fixed(tally.tau, 2);
  $("speed").textContent = fixed(tally.speed, 0);
  $("share").textContent = tally.share === null ? "–" : `${Math.round(100 * tally.share)} %`;
  $("first").textContent = tally.first === null ? "–" : `${Math.round(tally.first - tally.asked)} ms`;
  $("tokens").textContent = tally.tokens || "–";
  drawRounds(tally.pieces.filter((piece) => piece.rounds > 0));
}

/** A bar a piece, as high as its tokens a round. */
function drawRounds(pieces) {
  const shown = pieces.slice(-BARS);
  const most = Math.max(4, ...shown.map((piece) => piece.tokens / piece.rounds));
  const width = 240 / BARS;
  $("rounds").replaceChildren(...shown.map((piece, i) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = Math.max(2, (50 * piece.tokens) / piece.rounds / most);
    const at = { x: i * width + 0.6, y: 54 - height, width: width - 1.2, height, rx: 1 };
    for (const [name, value] of Object.entries(at)) bar.setAttribute(name, value.toFixed(2));
    if (piece.tokens <= piece.rounds) bar.classList.add("own");
    return bar;
  }));
}

async function problem(response) {
  const retry = response.headers.get("Retry-After");
  const found = await response.json().catch(() => null);
  const message = found?.error?.message || `the server says ${response.status}`;
  return retry ? `${message}; again in ${retry} s` : message;
}

/** Every chunk of a streamed answer. */
async function* chunks(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error(await problem(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the stream broke off");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function bodyOf(target, messages, maxDrafted) {
  return {
    model: target, messages, stream: true,
    stream_options: { include_usage: true, include_rounds: true },
    temperature: Number($("temperature").value), max_tokens: Number($("max-tokens").value) || 128,
    ...(maxDrafted === "" ? {} : { max_drafted: Number(maxDrafted) }),
  };
}

/** Nodes of a span; the space before a drafted word stays unmarked, so that marks keep to the words. */
function marked(text, drafted) {
  if (!drafted) return [text];
  const word = text.trimStart();
  const mark = document.createElement("mark");
  mark.textContent = word;
  return [text.slice(0, text.length - word.length), ...(word ? [mark] : [])];
}

function busy(controller) {
  open = controller;
  $("send").textContent = controller ? "Stop" : "Send";
  $("send").classList.toggle("stop", Boolean(controller));
  $("compare").disabled = Boolean(controller) || !last?.speed;
}

async function ask(prompt) {
  const target = $("target").value;
  const mine = conversation; // another may begin before the answer has ended
  mine.push({ role: "user", content: prompt });
  addMessage("user").said.textContent = prompt;
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...mine];
  const { message, said, about } = addMessage("assistant");
  message.classList.add("open");
  follow();
  const tally = new Tally();
  $("speedup").textContent = "";
  show(tally);
  last = null;
  const controller = new AbortController();
  busy(controller);
  try {
    for await (const chunk of chunks(bodyOf(target, messages, $("drafted").value), controller.signal)) {
      for (const [text, drafted] of tally.take(chunk)) said.append(...marked(text, drafted));
      show(tally);
      follow();
    }
    last = { target, messages, speed: tally.speed };
  } catch (error) {
    if (error.name !== "AbortError") {
      about.classList.add("failed");
      about.textContent = String(error.message || error);
    }
  }
  message.classList.remove("open");
  if (tally.tokens && !about.textContent) {
    about.textContent = `${tally.version} · ${tally.tokens} tokens in ${tally.rounds} rounds`;
  }
  if (tally.text) mine.push({ role: "assistant", content: tally.text });
  else mine.pop();
  if (open === controller) busy(null);
  follow();
}

async function compare() {
  const controller = new AbortController();
  const { target, messages, speed } = last;
  busy(controller);
  $("speedup").textContent = "asking again without a draft …";
  const tally = new Tally();
  try {
    for await (const chunk of chunks(bodyOf(target, messages, "0"), controller.signal)) tally.take(chunk);
    const times = document.createElement("b");
    times.textContent = `${fixed(speed / tally.speed, 2)} times`;
    $("speedup").replaceChildren(times, ` plain decoding's ${fixed(tally.speed, 0)} tokens/s`);
  } catch (error) {
    $("speedup").textContent = error.name === "AbortError" ? "" : String(error.message || error);
  }
  if (open === controller) busy(null);
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (open) { open.abort(); return; }
  const prompt = $("prompt").value.trim();
  if (!prompt || !$("target").value) return;
  $("prompt").value = "";
  grow();
  ask(prompt);
});
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!open) $("form").requestSubmit();
  }
});
$("target").addEventListener("change", () => {
  showVersion();
  if (conversation.length) { // another target has not said what stands above
    open?.abort();
    conversation = [];
    const rule = document.createElement("div");
    rule.className = "rule";
    rule.textContent = `a new conversation, with ${$("target").value}`;
    $("messages").append(rule);
    follow();
  }
});
$("compare").addEventListener("click", compare);
$("temperature").addEventListener("input", () => { $("temperature-value").textContent = $("temperature").value; });
$("clear").addEventListener("click", () => {
  open?.abort();
  conversation = [];
  last = null;
  $("messages").replaceChildren();
  $("speedup").textContent = "";
  show(new Tally());
  busy(null);
});
$("key").addEventListener("change", refreshModels);
$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme
    || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
});
refreshModels();
setInterval(refreshModels, MODELS_EVERY_MS);
