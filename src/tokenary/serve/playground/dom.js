// Small helpers for the document. Text is always set as text; nothing here reads markup.

/**
 * Make an element. Properties that the element has are set, others become attributes; null and false leave them out.
 * @param {string} tag
 * @param {Object} [props]
 * @param {...(Node|string|null)} children
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && name !== "list" && name !== "form") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** The element of an id. */
export const get = (id) => document.getElementById(id);

/** Put other children into a node. */
export function fill(node, ...children) {
  node.replaceChildren(...children.filter((child) => child !== null && child !== undefined));
}

/** Set a node's text where it differs, so that screen readers and layout are left alone otherwise. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A whole number with its noun: "1 pass", "3 passes". */
export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** Bytes in words, by powers of ten as the reports do. */
export function bytes(number) {
  if (!Number.isFinite(number)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; number >= 1000 && unit < units.length - 1; unit += 1) number /= 1000;
  return `${unit === 0 || number >= 100 ? Math.round(number) : number.toFixed(1)} ${units[unit]}`;
}

/** A token's text with what cannot be seen made visible. */
export const visible = (text) =>
  text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍") || "∅";

/** Copy a text; falls back to the old way where the page is not served from a secure origin. */
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const box = el("textarea", { value: text, class: "offstage", "aria-hidden": "true", tabIndex: -1 });
  const before = document.activeElement;
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
  before?.focus();
}
