// One turn: a request for each side, begun together, and what comes of them.

import { ServerError, stream, tokenize } from "./api.js";
import { Answer, compare } from "./answer.js";
import { el, say } from "./dom.js";
import * as request from "./request.js";

/** A prompt and the texts that were written for it. */
export class Turn {
  /**
   * @param {string} user The prompt.
   * @param {{side: string, recipe: string}[]} sides
   * @param {boolean} watched Whether the server is asked for tokens.
   * @param {(turn: Turn) => void} again Sends the prompt once more.
   */
  constructor(user, sides, watched, again) {
    this.user = user;
    this.answers = sides.map(({ side, recipe }) => new Answer(side, recipe, watched));
    this.recipes = sides.map(({ recipe }) => recipe);
    this.abort = new AbortController();
    this.verdict = el("p", { class: "verdict" });
    this.node = el(
      "section",
      { class: "turn", "aria-label": "Turn" },
      el(
        "div",
        { class: "row" },
        el("p", { class: "user" }, user),
        el("button", { type: "button", class: "quiet small", onclick: () => again(this) }, "Send again"),
      ),
      el("div", { class: `sides n${sides.length}` }, ...this.answers.map((answer) => answer.node)),
      this.verdict,
    );
  }

  /** The text of a side; a turn of one side answers for both. */
  text(side) {
    return (this.answers.find((answer) => answer.side === side) ?? this.answers[0]).text;
  }

  /** Stop what is still written; the server frees the place. */
  stop() {
    this.abort.abort();
  }

  /**
   * Make the requests; throws a SetupError where the set-up does not allow it.
   * @param {Object} values What the page is set to.
   * @param {Turn[]} before The turns before this one.
   */
  prepare(values, before) {
    this.path = request.endpoint(values);
    this.bodies = this.answers.map((answer, at) => {
      const turns = before.map((turn) => ({ user: turn.user, text: turn.text(answer.side) }));
      return request.body(values, [...turns, { user: this.user }], this.recipes[at]);
    });
  }

  /** Send the requests, all at once, so that the clocks start together; returns when all texts have ended. */
  async run(key) {
    const options = { key, signal: this.abort.signal };
    const begun = performance.now();
    const ticking = setInterval(() => this.answers.forEach((answer) => answer.tick(performance.now())), 100);
    await Promise.all(this.answers.map((answer, at) => write(answer, this.path, this.bodies[at], options, begun)));
    clearInterval(ticking);
    const done = this.answers.every((answer) => answer.state === "done");
    if (this.answers.length === 2 && done) say(this.verdict, compare(...this.answers));
  }

  /** What a screen reader is told once all texts are there. */
  get spoken() {
    return [...this.answers.map((answer) => answer.spoken), this.verdict.textContent].filter(Boolean).join(" ");
  }
}

/** Let one answer be written. */
async function write(answer, path, body, options, begun) {
  answer.start(begun);
  const { messages, prompt, model } = body;
  const asked = { ...(model && { model }), ...(messages ? { messages } : { prompt }), return_token_strs: true };
  // Beside the stream, not before it: the clock is the text's alone. Without the prompt's tokens the text still comes.
  const prompted = tokenize(asked, options).then((tokens) => answer.readPrompt(tokens), () => {});
  try {
    for await (const chunk of stream(path, body, options)) answer.take(chunk, performance.now());
    answer.end(performance.now());
  } catch (error) {
    if (error.name === "AbortError") answer.end(performance.now(), { stopped: true });
    else if (error instanceof ServerError) answer.end(performance.now(), { error });
    else throw error;
  }
  await prompted;
}
