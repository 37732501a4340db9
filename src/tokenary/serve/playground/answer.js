// One text as it comes: its tokens, its passes, its clock.

import { bytes, copy, count, el, fill, say, visible } from "./dom.js";
import { TokenList } from "./tiles.js";

/** Figures under a text, in their order, and what they are. */
const FIGURES = {
  tokens: ["tokens", "New tokens so far"],
  passes: ["passes", "Passes of the model, the prompt’s own left out"],
  rate: ["tokens/pass", "Tokens that a pass brought, on average"],
  speed: ["tokens/s", "New tokens a second, from sending to now"],
  clock: ["clock", "Since the request was sent"],
  first: ["first token", "From sending to the first token"],
  kv: ["KV cache", "Most bytes of keys and values held for this text"],
};

/** Prompts up to so many tokens are unfolded when the first of them are forgotten. */
const OPENED = 200;

const ENDS = {
  stop: "ended by itself",
  length: "reached max tokens",
  cancelled: "stopped",
  deadline: "ran out of time",
};

/** The part of the page that shows one text of a turn. */
export class Answer {
  /**
   * @param {string} side "A" or "B".
   * @param {string} recipe
   * @param {boolean} watched Whether tokens will come, or text alone.
   */
  constructor(side, recipe, watched) {
    this.side = side;
    this.text = "";
    this.usage = null;
    this.seconds = 0;
    this.firstSeconds = null;
    this.state = "waiting";
    const inspect = (words) => say(this.inspected, words);
    this.prompt = new TokenList(`${side}: tokens of the prompt`, inspect);
    this.list = new TokenList(`${side}: tokens of the text`, inspect);
    this.plain = el("div", { class: "plain", tabIndex: 0, role: "region", "aria-label": `${side}: text` });
    this.strip = el("div", { class: "strip", "aria-hidden": "true" });
    this.about = el("summary", {}, "Prompt");
    this.folded = el("details", { class: "fold", hidden: true }, this.about, this.prompt.node);
    this.inspected = el("p", { class: "inspect", "aria-live": "polite" }, " ");
    this.ending = el("span", { class: "ending" }, "waiting");
    this.problem = el("p", { class: "problem", role: "alert" });
    this.figures = Object.fromEntries(Object.keys(FIGURES).map((name) => [name, el("dd", {}, "–")]));
    this.copied = el("button", { type: "button", class: "quiet small", onclick: () => this.#copy() }, "Copy");
    this.copied.setAttribute("aria-label", `Copy text ${side}`);
    this.node = el(
      "article",
      { class: watched ? "answer" : "answer unwatched", "aria-label": `Text ${side}` },
      el("header", {}, el("h3", {}, side), el("code", {}, recipe || "plain"), this.ending, this.copied),
      this.strip,
      this.folded,
      this.list.node,
      this.plain,
      this.inspected,
      this.problem,
      this.#numbers(),
    );
  }

  /** Start the clock. */
  start(now) {
    this.begun = now;
    this.state = "running";
    say(this.ending, "reading the prompt");
    this.node.setAttribute("aria-busy", "true");
  }

  /** Show the prompt's tokens. */
  readPrompt(tokens) {
    this.prompt.add(tokens, "prompt");
    this.folded.hidden = !tokens.length;
    if (this.shares) this.#hold(this.shares);
    this.#name();
  }

  /** Take a chunk of the stream. */
  take(chunk, now) {
    this.text += chunk.text;
    this.plain.append(chunk.text);
    if (this.firstSeconds === null && (chunk.text || chunk.tokens.length)) {
      this.firstSeconds = (now - this.begun) / 1000;
      say(this.ending, "writing");
    }
    if (chunk.tokens.length) {
      this.list.add(chunk.tokens);
      this.#column(chunk.tokens);
    }
    if (chunk.held) this.#hold(chunk.held);
    if (chunk.finish) this.finish = chunk.finish;
    if (chunk.usage) this.usage = chunk.usage;
    this.tick(now);
  }

  /** New tokens so far. */
  get tokens() {
    return this.usage?.tokens ?? this.list.tokens.length;
  }

  /** Passes so far; the first brought the first token with the prompt, and is not counted. */
  get passes() {
    return this.usage?.passes ?? Math.max(this.list.passes - 1, 0);
  }

  /** Bring the figures up to date. */
  tick(now) {
    if (this.state === "running") this.seconds = (now - this.begun) / 1000;
    const { usage, seconds, tokens, passes } = this;
    const shown = {
      tokens: String(tokens),
      passes: String(passes),
      rate: passes ? (usage?.rate ?? (tokens - 1) / passes).toFixed(2) : "–",
      speed: tokens && seconds ? (tokens / seconds).toFixed(1) : "–",
      clock: clock(seconds),
      first: this.firstSeconds === null ? "–" : clock(this.firstSeconds),
      kv: bytes(usage?.kv),
    };
    for (const [name, text] of Object.entries(shown)) say(this.figures[name], text);
  }

  /** The stream ended: by itself, stopped by the reader, or with an error. */
  end(now, { stopped = false, error = null } = {}) {
    this.tick(now);
    this.state = error ? "failed" : "done";
    this.node.removeAttribute("aria-busy");
    if (error) {
      say(this.ending, error.status ? `refused with ${error.status}` : "failed");
      say(this.problem, error.message);
    } else say(this.ending, stopped ? ENDS.cancelled : (ENDS[this.usage?.finish ?? this.finish] ?? "ended"));
  }

  /** What a screen reader is told once the text is there. */
  get spoken() {
    if (this.problem.textContent) return "";
    const size = `${count(this.tokens, "token")} in ${count(this.passes, "pass", "passes")}`;
    return `Text ${this.side} ${this.ending.textContent}, ${size}: ${this.text}`;
  }

  #hold(shares) {
    this.shares = shares;
    const length = this.prompt.tokens.length;
    this.prompt.hold(shares, 0);
    if (length) this.list.hold(shares, length);
    if (!this.opened && length && length <= OPENED && this.prompt.held < 1) this.folded.open = this.opened = true;
    this.#name();
  }

  #name() {
    const length = this.prompt.tokens.length;
    const held = this.shares ? `, ${Math.round(this.prompt.held * 100)}% held` : "";
    say(this.about, `Prompt: ${count(length, "token")}${held}`);
  }

  /** A pass in the strip: one cell a token. */
  #column(tokens) {
    const cells = tokens.map((token) => el("i", { class: token.drafted ? "drafted" : "target" }));
    this.strip.append(el("span", {}, ...cells));
  }

  #numbers() {
    const cells = Object.entries(FIGURES).map(([name, [label, title]]) =>
      el("div", { title, "data-figure": name }, el("dt", {}, label), this.figures[name]),
    );
    return el("dl", { class: "figures" }, ...cells);
  }

  async #copy() {
    await copy(this.text);
    fill(this.copied, "Copied");
    setTimeout(() => fill(this.copied, "Copy"), 1500);
  }
}

/** Say how two texts compare, and mark where they part. */
export function compare(one, other) {
  const [a, b] = [one.list.tokens, other.list.tokens];
  if (!a.length && !b.length) {
    return `The texts ${one.text === other.text ? "are equal" : "differ"}. ${costs(one, other)}`;
  }
  const at = a.findIndex((token, index) => token.id !== b[index]?.id);
  const place = at >= 0 ? at : b.length > a.length ? a.length : -1;
  if (place < 0) return `Equal, token for token: ${count(a.length, "token")}. ${costs(one, other)}`;
  one.list.differs(place);
  other.list.differs(place);
  const name = (token) => (token ? `“${visible(token.text)}”` : "the end");
  const tokens = `${one.side} has ${name(a[place])}, ${other.side} ${name(b[place])}`;
  return `They part at token ${place + 1}: ${tokens}. ${costs(one, other)}`;
}

/** Passes and clocks of two texts. */
function costs(...both) {
  const each = both.map(
    ({ side, passes, seconds }) => `${side} took ${count(passes, "pass", "passes")} and ${clock(seconds)}`,
  );
  return `Sharing the machine, ${each.join(", ")}.`;
}

/** Seconds in three digits. */
const clock = (seconds) => `${seconds.toFixed(seconds < 9.995 ? 2 : 1)} s`;
