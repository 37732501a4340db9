// Tokens as tiles: coloured and underlined by origin, joined by pass, faded by what the cache still holds.

import { el, visible } from "./dom.js";

let lists = 0;

/**
 * A list of tokens. It is one stop of the Tab key; arrows, Home and End walk through it. What is walked to or pointed
 * at is told to `inspect`.
 */
export class TokenList {
  /**
   * @param {string} label Name of the list, for screen readers.
   * @param {(words: string) => void} inspect
   */
  constructor(label, inspect) {
    this.id = `tokens-${(lists += 1)}`;
    this.inspect = inspect;
    this.tokens = [];
    this.passes = 0;
    this.at = -1;
    this.node = el("div", {
      class: "tokens",
      role: "listbox",
      tabIndex: 0,
      "aria-label": label,
      onkeydown: (event) => this.#key(event),
      onfocus: () => this.#walk(Math.max(this.at, 0)),
      onclick: (event) => this.#point(event, true),
      onpointerover: (event) => this.#point(event, false),
    });
  }

  /**
   * Add the tokens of one pass.
   * @param {{id: number, text: string, drafted?: boolean}[]} tokens
   * @param {string|null} origin What they are where it is not said of each: "prompt".
   */
  add(tokens, origin = null) {
    const pass = this.passes;
    this.passes += 1;
    tokens.forEach((token, at) => {
      const kind = origin ?? (token.drafted ? "drafted" : "target");
      const entry = { ...token, kind, pass, place: at + 1, of: tokens.length, held: 1 };
      entry.node = el("span", {
        class: `tile ${kind}`,
        id: `${this.id}-${this.tokens.length}`,
        role: "option",
        "aria-selected": "false",
        textContent: shown(token.text),
      });
      entry.node.classList.toggle("first", at === 0);
      entry.node.classList.toggle("last", at === tokens.length - 1);
      entry.node.setAttribute("aria-label", `${visible(token.text)}, ${WORDS[kind]}`);
      this.tokens.push(entry);
      // A line may be broken before a token that begins with a space; the space itself stays with its token.
      if (/^ /.test(token.text)) this.node.append(el("wbr"));
      this.node.append(entry.node);
    });
  }

  /**
   * Fade the tokens by the share of the cache that still holds them.
   * @param {number[]} shares One for each position, from 0 to 1.
   * @param {number} offset Position of the first token of this list.
   */
  hold(shares, offset) {
    this.tokens.forEach((token, at) => {
      const held = shares[offset + at] ?? 1; // the newest token is not in the cache yet
      if (held === token.held) return;
      token.held = held;
      token.node.style.setProperty("--held", held);
      token.node.classList.toggle("gone", held === 0);
    });
  }

  /** The mean share of the cache that holds these tokens. */
  get held() {
    return this.tokens.reduce((sum, token) => sum + token.held, 0) / (this.tokens.length || 1);
  }

  /** Mark the first token that differs from another text. */
  differs(at) {
    this.tokens[at]?.node.classList.add("differs");
  }

  #key(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key in steps) this.#walk(this.at + steps[event.key]);
    else if (event.key === "Home") this.#walk(0);
    else if (event.key === "End") this.#walk(this.tokens.length - 1);
    else return;
    event.preventDefault();
  }

  #point(event, walk) {
    const at = this.tokens.findIndex((token) => token.node === event.target);
    if (at < 0) return;
    if (walk) this.#walk(at);
    else this.inspect(this.#words(at));
  }

  #walk(at) {
    if (!this.tokens.length) return;
    this.tokens[this.at]?.node.setAttribute("aria-selected", "false");
    this.at = Math.min(Math.max(at, 0), this.tokens.length - 1);
    const { node } = this.tokens[this.at];
    node.setAttribute("aria-selected", "true");
    node.scrollIntoView({ block: "nearest" });
    this.node.setAttribute("aria-activedescendant", node.id);
    this.inspect(this.#words(this.at));
  }

  #words(at) {
    const token = this.tokens[at];
    const parts = [`“${visible(token.text)}”`, `id ${token.id}`, `token ${at + 1}`, WORDS[token.kind]];
    const came = token.pass ? `${token.place} of ${token.of} in pass ${token.pass}` : "with the prompt’s pass";
    if (token.kind !== "prompt") parts.push(came);
    const part = token.held === 0 ? "no longer held" : `held by ${Math.round(token.held * 100)}% of the cache`;
    parts.push(token.held === 1 ? "held" : part);
    if (token.chance) parts.push(...likely(token.chance));
    return parts.join(" · ");
  }
}

/** What the model gave a token, and the likeliest ones in its place, the likeliest first. */
function likely({ logprob, top }) {
  const share = (value) => `${(100 * Math.exp(value)).toFixed(1)}%`;
  const own = `log-probability ${logprob.toFixed(2)} (${share(logprob)})`;
  const sorted = [...top].sort((one, other) => other[1] - one[1]);
  const others = sorted.map(([text, value]) => `“${visible(text)}” ${share(value)}`);
  return others.length ? [own, `likeliest ${others.join(", ")}`] : [own];
}

/** A token's text as its tile shows it. */
function shown(text) {
  const kept = text.replace(/^ +/, (spaces) => "\u00a0".repeat(spaces.length));
  return kept.replace(/\r?\n/g, "⏎\n") || "∅";
}

const WORDS = { drafted: "drafted, accepted", target: "the model’s own", prompt: "prompt" };
