"use strict";
const $ = (id) => document.getElementById(id);
const log = $("log"), prompt = $("prompt");
let messages = [], model = "", chats = true, counted = true, running = null;

// Light or dark: the system's choice until the button says otherwise.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const kept = (storage) => (name, value) => {
  try {
    if (value !== undefined) window[storage].setItem(name, value);
    return window[storage].getItem(name) || "";
  } catch { return ""; }
};
// Of this tab, and of this browser: a key and a conversation are nobody else's.
const stored = kept("sessionStorage"), lasting = kept("localStorage");
const paint = () => { document.documentElement.dataset.theme = lasting("theme") || (dark.matches ? "dark" : "light"); };
dark.addEventListener("change", paint);
$("theme").addEventListener("click", () => {
  lasting("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  paint();
});
paint();

const call = (path, options = {}) => {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  return fetch(path, { ...options, headers, cache: "no-store" });
};
const size = (bytes) => bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${Math.round(bytes / 1e6)} MB`;
const seconds = (ms) => ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;

function add(tag, name, text = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

const bottom = (always) => {
  const low = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  return () => { if (always || low) log.scrollTop = log.scrollHeight; };
};

// A message in the log; position is its place in the conversation.
function show(role, text, position) {
  log.querySelector(".empty")?.remove();
  const said = add("article", `said ${role}`), body = add("div", "text");
  said.setAttribute("aria-label", role === "user" ? "You" : "The model");
  said.append(body);
  if (role === "user") {
    body.textContent = text;
    if (chats) said.append(actions(["Edit", () => { rewind(position); prompt.value = text; grow(); prompt.focus(); }]));
  } else {
    markdown(body, text);
  }
  log.append(said);
  bottom(true)();
  return said;
}

function actions(...all) {
  const row = add("div", "actions");
  for (const [name, act] of all) {
    const button = add("button", "", name);
    button.type = "button";
    button.addEventListener("click", act);
    row.append(button);
  }
  return row;
}

// What can be done with an answer once it is there.
function offer(said, position) {
  const all = [["Copy", () => copy(messages[position].content)]];
  if (chats) all.push(["Again", () => { rewind(position); answer(); }]);
  said.append(actions(...all));
}

// Into the clipboard. Browsers keep their own way of it from pages that came over plain HTTP from
// another machine; there the old one works.
async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
  } else {
    const field = add("textarea", "spoken");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  $("spoken").textContent = "Copied";
}

// Take the conversation back to before a message.
function rewind(position) {
  running?.abort();
  messages = messages.slice(0, position);
  remind();
}

// Draw the conversation as it is, and keep it for a reload of this tab.
function remind() {
  stored("messages", JSON.stringify(messages));
  const hint = chats ? "Ask something." : "This model has no chat template: it continues your text.";
  log.replaceChildren(...messages.length ? [] : [add("p", "empty", hint)]);
  messages.forEach(({ role, content, thought }, position) => {
    const said = show(role, content, position);
    if (thought) think(said, thought, false);
    if (role === "assistant") offer(said, position);
  });
}

function complain(text) {
  log.querySelector(".empty")?.remove();
  const note = add("div", "problem", text);
  note.setAttribute("role", "alert");
  log.append(note);
  log.scrollTop = log.scrollHeight;
}

function reset() {
  rewind(0);
  prompt.focus();
}

// Server-sent events from a body that comes in any pieces; comments keep the connection alive.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function request(text) {
  const body = { model, stream: true, stream_options: { include_usage: true } };
  if ($("limit").value) body.max_tokens = Number($("limit").value);
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if (!chats) return ["/v1/completions", { max_tokens: 128, ...body, prompt: text }];
  const system = $("system").value.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  const said = messages.map(({ role, content }) => ({ role, content }));
  return ["/v1/chat/completions", { ...body, messages: [...opening, ...said] }];
}

// The speed of an answer: time to its first token, then tokens per second after it.
function meter() {
  const started = performance.now();
  let first = 0, last = 0, tokens = 0;
  // The line shows the rate of the last tokens; no spike at the start hides it.
  const times = [], points = [], recent = 16;
  const rate = () => tokens > 1 && last > first ? (tokens - 1) / (last - first) * 1000 : 0;
  return {
    token() {
      last = performance.now();
      if (!tokens++) first = last;
      times.push(last);
      const window = times.slice(-recent - 1), span = window.at(-1) - window[0];
      if (window.length > 4 && span > 0) points.push((window.length - 1) / span * 1000);
      $("ttft").textContent = seconds(first - started);
      $("tokens").textContent = tokens;
      $("rate").textContent = rate() ? rate().toFixed(1) : "–";
      const stride = Math.ceil(points.length / 100) || 1;  // a line of 100 points at most
      const drawn = Array.from({ length: Math.ceil(points.length / stride) }, (_, i) => points[i * stride]);
      // Tokens that come at once are no speed: they end at the upper edge.
      const usual = [...drawn].sort((a, b) => a - b)[drawn.length >> 1] ?? 0, step = 100 / Math.max(drawn.length - 1, 1);
      const top = Math.max(Math.min(Math.max(...drawn, 1), 1.5 * usual), 1);
      $("line").setAttribute("d", (drawn.length ? drawn : [0]).map((y, x) => `${x ? "L" : "M"}${(x * step).toFixed(1)} ${(29 - 27 * Math.min(y / top, 1)).toFixed(1)}`).join(""));
    },
    end(usage) {
      if (usage) tokens = usage.completion_tokens;
      if (!tokens) return "";
      $("tokens").textContent = tokens;
      if (rate()) $("rate").textContent = rate().toFixed(1);
      const speed = rate() ? `, ${rate().toFixed(1)} tokens/s` : "";
      return `${tokens} tokens${speed}, first after ${seconds(first - started)}`;
    },
  };
}

function send(text) {
  show("user", text, messages.length);
  messages.push({ role: "user", content: text });
  answer();
}

// Ask for the next answer. New chat, Edit and Again may take another conversation meanwhile.
async function answer() {
  const conversation = messages, asked = conversation.at(-1).content;
  const [path, body] = request(asked);
  const said = show("assistant", "…"), place = said.querySelector(".text");
  const speed = meter(), control = new AbortController();
  let text = "", thought = "", usage = null, problem = "", end = "", drawing = 0;
  const draw = () => {
    drawing = 0;
    const follow = bottom(false);
    if (text) markdown(place, text, false);
    if (thought) think(said, thought, !text);
    follow();
  };
  running = control;
  busy(true);
  try {
    const response = await call(path, { method: "POST", body: JSON.stringify(body), signal: control.signal });
    if (!response.ok) {
      if (response.status === 401) lock();
      throw new Error(await reason(response));
    }
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices?.[0], delta = choice?.delta;
      end = choice?.finish_reason ?? end;
      const reasoning = delta?.reasoning_content ?? delta?.reasoning ?? "";
      const piece = delta?.content ?? choice?.text ?? "";
      if (!piece && !reasoning) continue;
      speed.token();
      text += piece;
      thought += reasoning;
      drawing ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name !== "AbortError") problem = error.message;
  }
  cancelAnimationFrame(drawing);
  if (running === control) {
    running = null;
    busy(false);
  }
  if (conversation !== messages) return;  // nobody waits for this answer
  if (text || thought || !problem) {
    markdown(place, text);
    if (thought) think(said, thought, false);
    const cut = end === "length" ? ", cut off at the limit" : "";
    said.append(add("div", "figures", speed.end(usage) + cut));
    conversation.push({ role: "assistant", content: text, ...(thought && { thought }) });
    offer(said, conversation.length - 1);
    stored("messages", JSON.stringify(conversation));
    $("spoken").textContent = text;
  } else {
    // Nothing is lost: the question goes back to where it was written.
    rewind(conversation.length - 1);
    if (!prompt.value) prompt.value = asked;
    grow();
  }
  if (problem) complain(problem);
  status();
}

function think(said, thought, open) {
  let box = said.querySelector(".thought");
  if (!box) {
    box = document.createElement("details");
    box.className = "thought";
    box.append(add("summary", "", "Thought"), add("div", ""));
    said.prepend(box);
  }
  box.open = open;
  box.lastChild.textContent = thought;
}

async function reason(response) {
  try {
    const { error, detail } = await response.json();
    return error?.message ?? error ?? JSON.stringify(detail);
  } catch { return `the server answered ${response.status}`; }
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (!yes) prompt.focus();
}

function lock() {
  $("locked").hidden = false;
  $("wrong").hidden = !$("key").value;
  document.body.classList.add("side");
  $("panel").setAttribute("aria-expanded", "true");
  $("key").focus();
}

async function load() {
  try {
    const [models, figures] = await Promise.all([call("/v1/models"), call("/pvrt/status")]);
    if (models.status === 401) { lock(); return; }
    if (!models.ok || !figures.ok) throw new Error(await reason(models.ok ? figures : models));
    $("locked").hidden = true;
    const [card] = (await models.json()).data, { model: about, memory, pvrt } = await figures.json();
    model = card.id;
    chats = about.chat;
    $("name").textContent = document.title = model;
    const rows = {
      Architecture: about.architecture, Scheme: about.scheme,
      "Bits per weight": about.bits_per_weight?.toFixed(2),
      Size: about.file_bytes && size(about.file_bytes),
      Made: about.base_model && `from ${about.base_model}`,
      Context: card.max_model_len && `${card.max_model_len.toLocaleString("en")} tokens`,
      Layers: about.layers, pvrt,
    };
    $("card").replaceChildren(...Object.entries(rows).filter(([, value]) => value)
      .flatMap(([name, value]) => [add("dt", "", name), add("dd", "", String(value))]));
    remember(memory);
    if (!running) remind();
  } catch (error) { complain(`The server cannot be reached: ${error.message}`); }
}

function remember(memory) {
  $("memory").textContent = size(memory.resident_bytes);
  $("gpu").hidden = $("gpu-name").hidden = memory.gpu_bytes === null;
  if (memory.gpu_bytes !== null) $("gpu").textContent = size(memory.gpu_bytes);
}

// Sum of a metric over its labels, by the end of its name, so that engines may prefix it.
function metric(text, name) {
  const rows = text.match(new RegExp(`^\\w+:?${name}(\\{[^}]*\\})? .*$`, "gm"));
  return rows && rows.reduce((sum, row) => sum + Number(row.slice(row.lastIndexOf(" "))), 0);
}

async function status() {
  if (document.hidden || !model) return;
  try {
    const figures = await call("/pvrt/status");
    if (figures.ok) remember((await figures.json()).memory);
    const metrics = counted && await call("/metrics");
    counted = metrics.ok;  // some engines count nothing: ask them once
    if (!counted) return;
    const text = await metrics.text();
    const cache = metric(text, "kv_cache_usage_perc"), count = metric(text, "num_requests_running");
    if (cache !== null) $("cache").textContent = `${(100 * cache).toFixed(1)} %`;
    if (count !== null) $("queue").textContent = `${count}, ${metric(text, "num_requests_waiting") ?? 0}`;
  } catch { $("memory").textContent = "no answer"; }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = chats ? prompt.value.trim() : prompt.value;
  if (!text || running || !model) return;
  prompt.value = "";
  grow();
  send(text);
});
const grow = () => { prompt.style.height = "auto"; prompt.style.height = `${prompt.scrollHeight + 2}px`; };
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("fresh").addEventListener("click", reset);
$("panel").addEventListener("click", () => {
  $("panel").setAttribute("aria-expanded", document.body.classList.toggle("side"));
});
$("key").value = stored("key");
$("key").addEventListener("change", () => { stored("key", $("key").value); load(); });
try { messages = JSON.parse(stored("messages") || "[]"); } catch { messages = []; }
remind();
load();
setInterval(status, 2000);
