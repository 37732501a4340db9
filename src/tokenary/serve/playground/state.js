// What the page is set to, as plain values: read from the controls, written to them, kept in the address.
// The API key is no part of it: it lives in sessionStorage and in the field, nowhere else.

/** Names of the controls and what they hold at first; every value is a text. */
export const DEFAULTS = {
  mode: "chat",
  sides: "1",
  a: "",
  b: "",
  model: "",
  max: "128",
  seed: "0",
  temperature: "0",
  top_p: "1",
  top_k: "0",
  logprobs: "",
  watch: "1",
  view: "tokens",
  system: "",
  stops: "",
  schema: "",
  prompt: "",
};

const KEY = "tokenary-key";
/** What a box that is not ticked stands for. */
const UNTICKED = { sides: "1", watch: "0" };

const controls = (name) => [...document.querySelectorAll(`[name="${name}"]`)];

/** The value of one control. */
export function value(name) {
  const [first, ...others] = controls(name);
  if (first.type === "checkbox") return first.checked ? first.value : UNTICKED[name];
  if (first.type === "radio") return [first, ...others].find((one) => one.checked).value;
  return first.value;
}

/** The values of all controls. */
export const read = () => Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, value(name)]));

/** Set controls to values; the others to their defaults. */
export function write(values) {
  for (const [name, usual] of Object.entries(DEFAULTS)) {
    const all = controls(name);
    const few = /^(radio|checkbox)$/.test(all[0].type);
    const known = [UNTICKED[name], ...all.map((control) => control.value)];
    const given = values[name] ?? usual;
    const wanted = few && !known.includes(given) ? usual : given;
    for (const control of all) {
      if (control.type === "checkbox" || control.type === "radio") control.checked = control.value === wanted;
      else if (control instanceof HTMLSelectElement) choose(control, wanted);
      else control.value = wanted;
    }
  }
}

/** Choose an entry; one that is not there (yet) is remembered. */
export function choose(select, wanted) {
  select.dataset.wanted = wanted;
  if ([...select.options].some((option) => option.value === wanted)) select.value = wanted;
}

/** The part of an address that holds the values that are not the usual ones. */
export function toHash(values) {
  const changed = Object.keys(DEFAULTS).filter((name) => ![undefined, DEFAULTS[name]].includes(values[name]));
  return changed.length ? `#${new URLSearchParams(changed.map((name) => [name, values[name]]))}` : "";
}

/** The values in an address; names that are not ours are left out. */
export function fromHash(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  return Object.fromEntries([...given].filter(([name]) => Object.hasOwn(DEFAULTS, name)));
}

/** The API key of this tab. */
export const key = () => sessionStorage.getItem(KEY) ?? "";

/** Keep the API key for this tab. */
export function keepKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}
