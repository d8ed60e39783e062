// The chat page: answers while they come, requests, and controls.

const $ = (id) => document.getElementById(id);
let model = null;
let past = []; // what the chat route is sent: questions and answers, without thoughts
let running = null; // the AbortController of the answer that is under way

// ---- one answer, while it comes: a thought that folds away, then the text ----

class Answer {
  constructor(question, plain) {
    Object.assign(this, {thought: "", text: "", note: "", drawn: [], first: performance.now()});
    this.body = make("div", plain ? "answer plain" : "answer");
    this.box = make("article", "", (this.waiting = make("p", "waiting", "…")), this.body);
    if (plain) this.body.append(make("span", "prompt", question), (this.tail = make("span")));
    else $("talk").append(make("article", "user", question));
    $("talk").append(this.box);
    $("scroll").scrollTop = $("scroll").scrollHeight;
  }

  add(thought, text) {
    if (!this.thought && !this.text) this.first = performance.now();
    if (thought && !this.details) {
      this.details = make("details", "thought busy", make("summary", "", "Thinking"), make("div"));
      this.details.open = true;
      this.body.before(this.details);
    }
    if (text) this.foldThought();
    this.thought += thought;
    this.text += text;
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  foldThought() {
    if (!this.details?.classList.contains("busy")) return;
    const seconds = Math.max(1, Math.round((performance.now() - this.first) / 1000));
    this.details.firstChild.textContent = `Thought for ${seconds} second${seconds > 1 ? "s" : ""}`;
    this.details.classList.remove("busy");
    this.details.open = false;
  }

  show(note) {
    this.frame = 0;
    const scroll = $("scroll");
    const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
    this.waiting.hidden = Boolean(this.thought || this.text);
    if (this.details) this.details.lastChild.textContent = this.thought;
    if (this.tail) this.tail.textContent = this.text;
    else this.showBlocks(blocks(this.text));
    if (note) this.box.append(make("p", "meta", note));
    if (atEnd) scroll.scrollTop = scroll.scrollHeight;
  }

  showBlocks(found) {
    // only what has changed is drawn again
    const keys = found.map((block) => JSON.stringify(block));
    const first = [...keys, null].findIndex((key, place) => key !== this.drawn[place]);
    while (this.body.children.length > first) this.body.lastChild.remove();
    this.body.append(...found.slice(first).map((block) => draw(block)));
    this.drawn = keys;
  }

  end(tokens) {
    cancelAnimationFrame(this.frame);
    this.foldThought();
    this.waiting.remove();
    const pace = ((tokens - 1) / (performance.now() - this.first)) * 1000;
    const speed = tokens > 1 ? `${tokens} tokens · ${pace.toFixed(1)} tokens/s` : "";
    if (!this.text) this.note ||= "ended without a word";
    this.show([speed, this.note].filter(Boolean).join(" · "));
  }
}

// ---- asking the server ----

class ServerError extends Error {}

async function post(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  const response = await fetch(path, {method: "POST", signal, headers, body: JSON.stringify(body)});
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new ServerError(answer?.error?.message ?? `The server answers ${response.status}.`);
}

// The JSON objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let piece; !(piece = await reader.read()).done;) {
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
  throw new ServerError("The server went away before the end.");
}

function request(text, plain) {
  const body = {model, stream: true, stream_options: {include_usage: true}};
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if ($("most").value) body.max_tokens = Number($("most").value);
  if (plain) return ["v1/completions", {max_tokens: 256, ...body, prompt: text}];
  const system = $("system").value.trim();
  const messages = system ? [{role: "system", content: system}, ...past] : past;
  return ["v1/chat/completions", {...body, messages}];
}

async function ask(text) {
  const plain = isPlain(),
    conversation = past,
    controller = new AbortController();
  const answer = new Answer(text, plain);
  let tokens = 0;
  if (!plain) past.push({role: "user", content: text});
  setRunning(controller);
  try {
    const [path, body] = request(text, plain);
    for await (const event of events(await post(path, body, controller.signal))) {
      if (event.error) throw new ServerError(event.error.message);
      tokens = event.usage?.completion_tokens ?? tokens;
      for (const choice of event.choices) {
        if (choice.finish_reason === "length") answer.note = "cut off at the most tokens allowed";
        answer.add(
          choice.delta?.reasoning_content ?? "",
          choice.delta?.content ?? choice.text ?? "",
        );
      }
    }
  } catch (error) {
    answer.note =
      error.name === "AbortError" ? "stopped" : answer.text ? "broken off" : "not answered";
    if (error.name !== "AbortError" && past === conversation)
      tell(
        "problem",
        error instanceof ServerError ? error.message : "The server cannot be reached.",
      );
  }
  answer.end(tokens);
  if (past !== conversation) return; // a new chat has begun meanwhile
  if (!answer.text) $("input").value ||= text; // nothing came of it: to be sent again
  if (!plain && answer.text) past.push({role: "assistant", content: answer.text});
  else if (!plain) past.pop();
  setRunning(null);
}

// ---- the controls ----

// Errors and states stand above the input, where they are in view however the conversation is scrolled.
const tell = (id, text) => Object.assign($(id), {textContent: text, hidden: !text});

const isPlain = () => $("plain").checked;

function setRunning(controller) {
  running = controller;
  if (running) tell("problem", "");
  $("welcome").hidden = $("talk").hasChildNodes();
  $("talk").setAttribute("aria-busy", String(Boolean(running)));
  $("send").classList.toggle("stop", Boolean(running));
  $("send").setAttribute("aria-label", running ? "Stop" : "Send");
  resize();
}

function resize() {
  $("send").disabled = !running && !$("input").value.trim();
  if (CSS.supports("field-sizing", "content")) return;
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

function submit(event) {
  event.preventDefault();
  const text = $("input").value;
  if (running) running.abort();
  else if (text.trim()) (($("input").value = ""), ask(text));
}

function setMode() {
  $("system").disabled = isPlain();
  $("input").placeholder = isPlain() ? "Begin a text" : "Write a message";
  $("most").placeholder = isPlain() ? "256" : "As many as fit";
}

// Learns which model is served, and shows why it cannot be asked as long as it cannot.
async function watch() {
  const get = (path) => fetch(path).then((response) => response.json());
  const health = await get("health").catch(() => ({
    error: {message: "The server cannot be reached."},
  }));
  const served = model ? null : await get("v1/models").catch(() => null);
  if (served?.data) {
    model = served.data[0].id;
    $("name").textContent = $("greeting").textContent = document.title = model;
    $("plain").checked = served.data[0].chat_template === false;
    setMode();
  }
  tell("state", health.error?.message ?? "");
  setTimeout(watch, health.error ? 1500 : 30000);
}

$("composer").addEventListener("submit", submit);
$("input").addEventListener("input", resize);
document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.keyCode === 229) return; // Safari ends a composition before its last key
  const enter = event.key === "Enter" && event.target === $("input") && !event.shiftKey;
  if (enter && !running) submit(event);
  else if (event.key === "Escape" && !$("settings").open) running?.abort();
});
$("new").addEventListener("click", () => {
  running?.abort();
  past = [];
  tell("problem", "");
  $("talk").replaceChildren();
  setRunning(null);
  $("input").focus();
});
$("open").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener(
  "click",
  ({target}) => target === $("settings") && $("settings").close(),
);
$("mode").addEventListener("change", setMode);
window.visualViewport?.addEventListener("resize", () => {
  // a keyboard over the page, as on iOS
  document.body.style.setProperty(
    "--height",
    visualViewport.scale === 1 ? `${visualViewport.height}px` : "",
  );
});
resize();
watch();
