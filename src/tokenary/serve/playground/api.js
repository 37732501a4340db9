// The server's interface. Everything that knows the shapes on the wire stands here.

const BASE = new URL("../v1/", document.baseURI);

/** What the server said instead of an answer, in its words. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} status 0 where no answer came.
   */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The words of an error: the server's, or those of a proxy before it. */
function wording(body, fallback) {
  return body?.error?.message ?? (typeof body === "string" && body ? body : fallback);
}

/** Ask the server; throws a ServerError for anything but a success. */
async function ask(path, { key, body, signal } = {}) {
  const headers = { Accept: body?.stream ? "text/event-stream" : "application/json" };
  if (key && !/^[\x21-\x7e]+$/.test(key)) throw new ServerError("The API key holds signs that no header can carry.", 0);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(new URL(path, BASE), {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.", 0);
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let said = text;
  try {
    said = JSON.parse(text);
  } catch {
    // a proxy's own words
  }
  throw new ServerError(wording(said, answer.statusText || `status ${answer.status}`), answer.status);
}

/** Names of the models that the server offers. */
export async function models(key) {
  const names = (await (await ask("models", { key })).json()).data.map((model) => model.id);
  // NAME+RECIPE is for clients that cannot name a recipe; here it has a field of its own.
  return names.filter((name) => !names.some((other) => name.startsWith(`${other}+`)));
}

/** Cards of the methods, with the JSON schema of their options. */
export async function methods(key) {
  return (await (await ask("tokenary/methods", { key })).json()).data;
}

/** The tokens of a prompt or of a chat: [{id, text}]. */
export async function tokenize(body, { key, signal }) {
  const answer = await (await ask("tokenize", { key, signal, body })).json();
  return answer.tokens.map((id, at) => ({ id, text: answer.token_strs?.[at] ?? `#${id}` }));
}

/** The data of each event of a stream, as text. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    // A carriage return at the end may be half of a line end, so it waits.
    const parts = (rest + value).split(/\r\n\r\n|\n\n|\r\r/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part
        .split(/\r\n|\n|\r/)
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).replace(/^ /, ""));
      if (data.length) yield data.join("\n");
    }
  }
}

/** What a text cost; passes are those after the prompt's. */
function readUsage({ completion_tokens: tokens, tokenary: costs = {} }) {
  return { tokens, passes: costs.passes, rate: costs.tokens_per_pass, kv: costs.kv_bytes, finish: costs.finish?.[0] };
}

/** The log-probabilities of a choice in one shape, a token each: [{logprob, top: [[text, logprob]]}]. */
function readLogprobs(told) {
  const { content, token_logprobs: own = [], top_logprobs: tops } = told ?? {};
  if (!content) return own.map((logprob, at) => ({ logprob, top: Object.entries(tops?.[at] ?? {}) }));
  const pairs = (top) => top.map(({ token, logprob }) => [token, logprob]);
  return content.map(({ logprob, top_logprobs: top }) => ({ logprob, top: pairs(top) }));
}

/**
 * One chunk in one shape, whatever the endpoint.
 * @returns {{text: string, tokens: {id: number, text: string, drafted: boolean, chance?: Object}[],
 *   held: number[]|null, finish: string|null, usage: Object|null}}
 */
export function readChunk(chunk) {
  const choice = chunk.choices?.[0] ?? {};
  const ours = chunk.tokenary ?? {};
  const chances = readLogprobs(choice.logprobs);
  return {
    text: choice.delta?.content ?? choice.text ?? "",
    tokens: (ours.tokens ?? []).map(({ id, text, origin }, at) => ({
      id, text, drafted: origin === "draft", chance: chances[at],
    })),
    held: ours.held ?? null,
    finish: choice.finish_reason ?? null,
    usage: chunk.usage ? readUsage(chunk.usage) : null,
  };
}

/** Send a request and yield its chunks; stops the stream, and the server's work, when the signal aborts. */
export async function* stream(path, body, { key, signal }) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const answer = await ask(path, { key, signal, body: asked });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(wording(chunk, "the stream broke off"), 0);
    yield readChunk(chunk);
  }
  throw new ServerError("The stream broke off before its end.", 0);
}
