// The page: controls, address, and turns.

import { ServerError, methods, models } from "./api.js";
import { Composer } from "./composer.js";
import { copy, el, fill, get, say } from "./dom.js";
import { EXAMPLES } from "./examples.js";
import { SetupError, schema } from "./request.js";
import { Turn } from "./run.js";
import * as state from "./state.js";

const composers = [...document.querySelectorAll(".recipe")].map((root) => new Composer(root, root.dataset.side));
let turns = [];
let running = null;
let last = ""; // the prompt sent last, which the field no longer holds in a chat

/** Show an error of the set-up, or none. */
const trouble = (words) => say(get("problem"), words);

/** What the page is set to; the prompt is the one sent last where the field is empty. */
function setting() {
  const values = state.read();
  return { ...values, prompt: values.prompt || last };
}

/** Bring the page in step with its controls. */
function arrange() {
  const values = state.read();
  document.body.dataset.mode = values.mode;
  document.body.dataset.view = values.view;
  get("settings").querySelector('[data-side="b"]').hidden = values.sides !== "2";
  document.querySelectorAll(".chat-only").forEach((node) => (node.hidden = values.mode !== "chat"));
  get("prompt").placeholder = values.mode === "chat" ? "Write a message" : "Write the beginning of a text";
  get("empty").hidden = turns.length > 0;
  for (const [id, off] of [["send", running], ["stop", !running], ["clear", running || !turns.length]]) {
    get(id).setAttribute("aria-disabled", String(Boolean(off))); // stays in the focus order
  }
  for (const radio of document.getElementsByName("mode")) radio.disabled = Boolean(running);
  check(values);
}

/** Say whether the schema can be read. */
function check(values) {
  let words = "";
  try {
    schema(values);
  } catch (error) {
    words = error.message;
  }
  say(get("schema-note"), words);
  get("schema-note").hidden = !words;
  get("schema").setAttribute("aria-invalid", String(words !== ""));
}

/** Keep the set-up in the address, a moment after it changed. */
let saving = 0;
function save() {
  clearTimeout(saving);
  const write = () => history.replaceState(null, "", state.toHash(setting()) || location.pathname + location.search);
  saving = setTimeout(write, 200);
}

/** Set the page to what the address says, or to other values. */
function set(values) {
  state.write(values);
  composers.forEach((composer) => composer.sync());
  for (const name of ["system", "stops", "schema"]) if (values[name]) get(`${name}-fold`).open = true;
  arrange();
}

/** Ask the server what it offers. */
async function connect() {
  try {
    const [names, cards] = await Promise.all([models(state.key()), methods(state.key())]);
    const select = get("model");
    fill(select, ...names.map((name) => el("option", { value: name }, name)));
    state.choose(select, select.dataset.wanted || names[0]);
    composers.forEach((composer) => composer.offer(cards));
    offerExamples(new Set(cards.map((card) => card.slug)));
    trouble("");
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    trouble(error.message + (error.status === 401 ? " (Give the API key above.)" : ""));
    if (error.status === 503) setTimeout(connect, 2000); // it is still loading the model
  }
}

/** Set-ups to begin with. */
function offerExamples(slugs) {
  const offered = EXAMPLES.filter((example) => example.needs.every((slug) => slugs.has(slug)));
  const entry = ({ name, about, values }) => {
    const use = () => {
      set({ ...values, model: state.value("model") });
      save();
      get("prompt").focus();
    };
    return el("li", {}, el("button", { type: "button", onclick: use }, el("strong", {}, name), el("span", {}, about)));
  };
  fill(get("examples"), ...offered.map(entry));
}

/** Send the prompt, or other words in its place, to one side or both. */
async function send(words = "") {
  const values = { ...state.read(), ...(words && { prompt: words }) };
  if (running) return;
  trouble("");
  say(get("spoken"), "");
  if (!values.prompt.trim()) {
    trouble("The prompt is empty.");
    get("prompt").focus();
    return;
  }
  const chat = values.mode === "chat";
  const sides = composers
    .slice(0, values.sides === "2" ? 2 : 1)
    .map(({ side, text }) => ({ side: side.toUpperCase(), recipe: text.value.trim() }));
  const turn = new Turn(values.prompt, sides, values.watch === "1", again);
  if (!chat) clear();
  try {
    turn.prepare(values, turns);
  } catch (error) {
    if (!(error instanceof SetupError)) throw error;
    trouble(error.message);
    return;
  }
  running = turn;
  last = values.prompt;
  turns.push(turn);
  get("turns").append(turn.node);
  if (chat && !words) get("prompt").value = "";
  arrange();
  turn.node.scrollIntoView({ block: "start", behavior: calm.matches ? "auto" : "smooth" });
  try {
    await turn.run(state.key());
    say(get("spoken"), turn.spoken);
  } finally {
    running = null;
    arrange();
    save();
  }
}

/** Send the prompt of a turn once more, as the page is set now; what followed it is dropped. */
function again(turn) {
  if (running) return;
  const at = turns.indexOf(turn);
  for (const dropped of turns.splice(at)) dropped.node.remove();
  send(turn.user);
}

const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** Stop the texts that are being written. */
const stop = () => running?.stop();

/** Forget the turns. */
function clear() {
  if (running) return;
  turns = [];
  fill(get("turns"));
  say(get("spoken"), "");
  arrange();
}

// Without a fragment in the address, which holds the set-up.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  get("prompt").focus();
});
get("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
get("setup").addEventListener("submit", (event) => event.preventDefault());
get("stop").addEventListener("click", stop);
get("clear").addEventListener("click", clear);
get("share").addEventListener("click", async () => {
  await copy(location.origin + location.pathname + location.search + state.toHash(setting()));
  say(get("share"), "Copied");
  setTimeout(() => say(get("share"), "Copy link"), 1500);
});
get("key").addEventListener("change", () => {
  state.keepKey(get("key").value.trim());
  connect();
});
document.addEventListener("input", (event) => {
  if (!event.target.name) return;
  if (event.target.name === "mode") clear();
  arrange();
  save();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) stop();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  else return;
  event.preventDefault();
});
window.addEventListener("hashchange", () => {
  stop();
  set(state.fromHash(location.hash));
});

// A text that grows is followed while its end is in sight.
let atEnd = true;
const page = document.documentElement;
const look = () => (atEnd = page.scrollTop + window.innerHeight >= page.scrollHeight - 4);
window.addEventListener("scroll", look, { passive: true });
new ResizeObserver(() => running && atEnd && window.scrollTo(0, page.scrollHeight)).observe(get("turns"));

get("key").value = state.key();
if (matchMedia("(max-width: 60rem)").matches) get("settings").open = false;
set(state.fromHash(location.hash));
connect();
