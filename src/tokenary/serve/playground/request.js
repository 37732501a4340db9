// Requests from what the page is set to.

/** A set-up from which no request can be made. */
export class SetupError extends Error {}

/** A number field's value; nothing where it is left empty. */
function number(values, name) {
  if (values[name].trim() === "") return undefined;
  const read = Number(values[name]);
  if (!Number.isFinite(read)) throw new SetupError(`${name} is not a number: ${values[name]}`);
  return read;
}

/** The schema that a text must keep, if one is given. */
export function schema(values) {
  if (!values.schema.trim()) return undefined;
  try {
    return JSON.parse(values.schema);
  } catch (error) {
    throw new SetupError(`The schema is not JSON: ${error.message}`);
  }
}

/** The texts that end an answer: one a line, in which \n stands for the end of a line. */
export const stops = (values) =>
  values.stops
    .split(/\r?\n/)
    .filter((line) => line !== "")
    .map((line) => line.replaceAll("\\n", "\n"));

/** The log-probabilities that are asked for, as the endpoints take it. */
function logprobs(values) {
  const wanted = number(values, "logprobs");
  if (wanted === undefined) return {};
  return values.mode === "chat" ? { logprobs: true, top_logprobs: wanted } : { logprobs: wanted };
}

/** Which endpoint a mode asks. */
export const endpoint = (values) => (values.mode === "chat" ? "chat/completions" : "completions");

/** The prompt as the endpoints take it: the messages of a chat, or a text. */
export function prompt(values, turns) {
  if (values.mode === "completion") return { prompt: turns.at(-1).user };
  const messages = values.system.trim() ? [{ role: "system", content: values.system }] : [];
  for (const { user, text } of turns) {
    messages.push({ role: "user", content: user });
    if (text !== undefined) messages.push({ role: "assistant", content: text });
  }
  return { messages };
}

/**
 * The body of a request.
 * @param {Object} values What the page is set to.
 * @param {{user: string, text?: string}[]} turns The turns so far, as this side wrote them; the last has no text yet.
 * @param {string} recipe
 */
export function body(values, turns, recipe) {
  const kept = schema(values);
  const [top, ends] = [number(values, "top_k"), stops(values)];
  const format = { type: "json_schema", json_schema: { name: "answer", schema: kept, strict: true } };
  return {
    ...(values.model && { model: values.model }),
    ...prompt(values, turns),
    max_tokens: number(values, "max"),
    temperature: number(values, "temperature"),
    top_p: number(values, "top_p"),
    seed: number(values, "seed"),
    ...(top && { top_k: top }),
    ...(ends.length && { stop: ends }),
    ...logprobs(values),
    ...(kept && { response_format: format }),
    tokenary: { ...(recipe && { recipe }), watch: values.watch === "1" },
  };
}
