// Recipes as text and as steps: "slug:option=value,option=value + slug:...". The server has the last word on them.

/** Slots that take part in writing a text, in the order in which they are shown, and what each is. */
export const SLOTS = {
  draft: "Draft: tokens proposed ahead, checked in one pass",
  keep: "Keep: what stays in the cache",
  read: "Read: what of the cache a pass attends to",
  store: "Store: how the cache is packed",
  choose: "Choose: which tokens are allowed",
  strategy: "Strategy: a loop of its own",
  unmask: "Unmask: which masks are filled",
  window: "Window: which positions a pass computes",
};

/** A recipe whose text cannot be read, or whose methods do not go together. */
export class RecipeError extends Error {}

/** Options of "name=value,name=value"; a comma parts them only where a new name follows, as on the server. */
function readOptions(text, whole) {
  const options = new Map();
  for (const part of text ? text.split(/,(?=\s*\w+=)/) : []) {
    const [, name, value] = /^\s*(\w+)=(.*)$/s.exec(part) ?? [];
    if (!name) throw new RecipeError(`cannot read “${part.trim()}” in “${whole}”: options are name=value`);
    if (options.has(name)) throw new RecipeError(`option ${name} is given twice in “${whole}”`);
    options.set(name, value.trim());
  }
  return options;
}

/**
 * Read a recipe.
 * @param {string} text
 * @param {Map<string, Object>} cards Cards by slug.
 * @returns {{slug: string, options: Map<string, string>}[]} None for plain decoding.
 */
export function parse(text, cards) {
  const longest = ["plain", ...cards.keys()].sort((a, b) => b.length - a.length);
  const slugs = longest.map((slug) => slug.replace(/\W/g, "\\$&"));
  const border = new RegExp(`(?:^|\\s)\\+(?:\\s|$)|\\+(?=\\s*(?:${slugs.join("|")})(?:[:+\\s]|$))`);
  const steps = [];
  for (const part of text.split(border)) {
    const whole = part.trim();
    if (whole === "" || whole === "plain") continue;
    const [, slug, rest] = /^([^:]*):?(.*)$/s.exec(whole);
    if (!cards.has(slug.trim())) throw new RecipeError(`there is no method “${slug.trim()}”`);
    steps.push({ slug: slug.trim(), options: readOptions(rest, whole) });
  }
  return steps;
}

const bySlug = (a, b) => (a.slug < b.slug ? -1 : a.slug > b.slug ? 1 : 0);

/** Write steps as the text of a recipe, in the order in which the server writes them. */
export function format(steps) {
  return [...steps]
    .sort(bySlug)
    .map(({ slug, options }) => {
      const given = [...options].sort(([a], [b]) => (a < b ? -1 : 1)).map(([name, value]) => `${name}=${value}`);
      return slug + (given.length ? `:${given.join(",")}` : "");
    })
    .join(" + ");
}

/** Why cards do not go together, in the words that the server has for it; null where they do. */
export function refusal(cards) {
  const sorted = [...cards].sort(bySlug);
  const taken = new Map();
  for (const card of sorted) {
    const other = taken.get(card.slot);
    if (other) return `${other.slug} and ${card.slug} do not compose: both are the '${card.slot}' of a recipe`;
    taken.set(card.slot, card);
  }
  for (const card of sorted) {
    for (const [target, reason] of card.refuses) {
      const other = sorted.find((one) => one !== card && (target === one.slug || target === one.slot));
      if (other) return `${card.slug} and ${other.slug} do not compose: ${reason}`;
    }
  }
  return null;
}

/** What an option takes, in words: "1 to 80, or auto". */
export function range(schema) {
  const { anyOf, const: only, description, exclusiveMinimum: above, minimum: low, maximum: high } = schema;
  if (anyOf) return anyOf.map(range).filter(Boolean).join(", or ");
  if (only !== undefined) return String(only);
  if (description) return description;
  if (low !== undefined && high !== undefined) return `${low} to ${high}`;
  if (above !== undefined && high !== undefined) return `above ${above}, up to ${high}`;
  if (low !== undefined) return `${low} or more`;
  if (high !== undefined) return `up to ${high}`;
  if (above !== undefined) return `above ${above}`;
  return { integer: "a whole number", number: "a number", string: "a text" }[schema.type] ?? "";
}
