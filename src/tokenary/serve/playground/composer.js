// The recipe of one side: a text, which is the truth, and a composer that reads and writes it.

import { el, fill, say } from "./dom.js";
import { RecipeError, SLOTS, format, parse, range, refusal } from "./recipe.js";

/** Recipe field and composer of one side. */
export class Composer {
  /**
   * @param {HTMLElement} root
   * @param {string} side "a" or "b".
   */
  constructor(root, side) {
    this.side = side;
    this.cards = new Map();
    this.steps = [];
    this.panels = new Map(); // by slot: {select, box, slug, fields}
    const id = `recipe-${side}`;
    this.text = el("textarea", {
      id,
      name: side,
      class: "mono",
      rows: 2,
      spellcheck: false,
      placeholder: "plain",
      "aria-describedby": `${id}-note`,
      oninput: () => this.sync(),
    });
    this.note = el("p", { id: `${id}-note`, class: "note" });
    this.slots = el("fieldset", { class: "slots" });
    const name = el("h2", { id: `${id}-name` }, el("label", { htmlFor: id }, `Recipe ${side.toUpperCase()}`));
    const fold = el("details", { class: "fold", open: side === "a" }, el("summary", {}, "Compose"), this.slots);
    root.append(name, this.text, this.note, fold);
  }

  /** Take the methods that the server offers. */
  offer(cards) {
    this.cards = new Map(cards.map((card) => [card.slug, card]));
    this.panels.clear();
    const known = Object.keys(SLOTS);
    const slots = [...new Set(cards.map((card) => card.slot))].sort((a, b) => known.indexOf(a) - known.indexOf(b));
    fill(this.slots, ...slots.map((slot) => this.#panel(slot)));
    this.sync();
  }

  /** Bring the composer in step with the text. */
  sync() {
    if (!this.cards.size) return;
    let words = "", bad = false;
    this.slots.disabled = false;
    try {
      this.steps = parse(this.text.value, this.cards);
      words = refusal(this.steps.map((step) => this.cards.get(step.slug))) ?? "";
      bad = words !== "";
      words ||= this.#summary();
    } catch (error) {
      if (!(error instanceof RecipeError)) throw error;
      [words, bad] = [error.message, true];
      this.slots.disabled = true; // or else the composer would write over a text that it cannot read
    }
    say(this.note, words);
    this.note.classList.toggle("bad", bad);
    this.text.setAttribute("aria-invalid", String(bad));
    for (const [slot, panel] of this.panels) this.#show(slot, panel);
  }

  #summary() {
    if (!this.steps.length) return "Plain decoding over a full cache.";
    const lossless = this.steps.every((step) => this.cards.get(step.slug).lossless);
    return lossless
      ? "Lossless: the text is that of plain decoding."
      : "Lossy: the text may differ from plain decoding.";
  }

  #panel(slot) {
    const id = `recipe-${this.side}-${slot}`;
    const cards = [...this.cards.values()].filter((card) => card.slot === slot);
    const entries = cards.map((card) => el("option", { value: card.slug }, card.slug));
    const select = el("select", { id }, el("option", { value: "" }, "none"), ...entries);
    select.addEventListener("change", () => this.#choose(slot, select.value));
    const box = el("div", { class: "options", hidden: true });
    this.panels.set(slot, { select, box, slug: "", fields: new Map() });
    const [name, about] = (SLOTS[slot] ?? slot).split(": ");
    return el("div", { class: "slot" }, el("label", { htmlFor: id, title: about ?? "" }, name), select, box);
  }

  /** Show what the text says of one slot. */
  #show(slot, panel) {
    const step = this.steps.find((one) => this.cards.get(one.slug).slot === slot);
    panel.select.value = step?.slug ?? "";
    const others = this.steps.filter((one) => one !== step).map((one) => this.cards.get(one.slug));
    for (const option of [...panel.select.options].slice(1)) {
      const card = this.cards.get(option.value);
      const against = card.slug !== step?.slug && others.find((other) => refusal([card, other]));
      option.textContent = option.value + (against ? ` (not with ${against.slug})` : "");
    }
    if (panel.slug !== (step?.slug ?? "")) this.#describe(panel, step);
    for (const [name, field] of panel.fields) {
      const given = step?.options.get(name) ?? "";
      if (field.value !== given) field.value = given;
    }
    const changed = step?.options.size ?? 0;
    if (panel.count) say(panel.count, `Options${changed ? `, ${changed} set` : ""}`);
  }

  /** Make the fields of a method's options. */
  #describe(panel, step) {
    panel.slug = step?.slug ?? "";
    panel.fields = new Map();
    panel.box.hidden = !step;
    if (!step) return fill(panel.box);
    const card = this.cards.get(step.slug);
    panel.count = el("summary", {}, "Options");
    const schemas = Object.entries(card.options?.properties ?? {});
    const rows = schemas.map(([name, schema]) => this.#option(panel, step.slug, name, schema));
    const grid = el("div", { class: "grid" }, ...rows);
    const fold = el("details", { class: "fold", hidden: !rows.length }, panel.count, grid);
    fill(panel.box, el("p", { class: "note" }, card.summary, paper(card)), fold);
  }

  #option(panel, slug, name, schema) {
    const usual = String(schema.default ?? ""), hint = range(schema);
    const choices = schema.enum ?? (schema.type === "boolean" ? [true, false] : null);
    const write = () => this.#set(slug, name, field.value.trim());
    let field;
    if (choices) {
      const entry = (choice) => el("option", { value: String(choice) }, String(choice));
      const first = el("option", { value: "" }, `${usual} (default)`);
      field = el("select", { onchange: write }, first, ...choices.map(entry));
    } else {
      field = el("input", { type: "text", placeholder: usual, spellcheck: false, autocomplete: "off", oninput: write });
    }
    field.dataset.option = name;
    panel.fields.set(name, field);
    return el("label", { title: hint }, `${name} `, field, choices ? null : el("small", {}, hint));
  }

  #choose(slot, slug) {
    const others = this.steps.filter((step) => this.cards.get(step.slug).slot !== slot);
    this.#write(slug ? [...others, { slug, options: new Map() }] : others);
  }

  #set(slug, name, value) {
    const { options } = this.steps.find((step) => step.slug === slug);
    if (value) options.set(name, value);
    else options.delete(name);
    this.#write(this.steps);
  }

  /** Write the text; all else follows from it. */
  #write(steps) {
    this.text.value = format(steps);
    this.text.dispatchEvent(new Event("input", { bubbles: true }));
  }
}

/** Where a method is published, as words. */
const paper = (card) => (card.paper ? ` · arXiv ${card.paper} (${card.year})` : "");
