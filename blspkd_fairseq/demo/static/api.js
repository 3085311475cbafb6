// What the page asks of its server.

const MOST_TOKENS = 128;

let key = "";

export function setKey(value) {
  key = value;
}

async function post(path, body, type) {
  const headers = { "Content-Type": type };
  if (key) headers.Authorization = `Bearer ${key}`;
  const reply = await fetch(path, { method: "POST", headers, body });
  if (!reply.ok) throw await asError(reply);
  return reply;
}

async function asError(reply) {
  const body = await reply.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `The server answered with status ${reply.status}.`);
  error.status = reply.status;
  return error;
}

export async function info() {
  const reply = await fetch("/demo/info", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (!reply.ok) throw await asError(reply);
  return reply.json();
}

export const hear = async (wav) => (await post("/demo/hear", wav, "audio/wav")).json();

export const transcript = async (wav) => (await post("/demo/transcript", wav, "audio/wav")).json();

// Streams an answer: calls show(text) with all that has come, and returns the answer with its figures.
export async function answer(model, messages, show) {
  const begin = performance.now();
  const options = { stream: true, stream_options: { include_usage: true }, max_tokens: MOST_TOKENS };
  const body = JSON.stringify({ model, messages, ...options });
  const reply = await post("/v1/chat/completions", body, "application/json");
  let text = "";
  let first = null;
  let usage = null;
  for await (const event of events(reply.body)) {
    if (event.error) throw new Error(event.error.message);
    usage = event.usage ?? usage;
    const piece = event.choices?.[0]?.delta?.content;
    if (!piece) continue;
    first ??= performance.now() - begin;
    text += piece;
    show(text);
  }
  return { text, first: first ?? performance.now() - begin, whole: performance.now() - begin, usage };
}

// The objects of a stream of server-sent events.
export async function* events(stream) {
  const decoder = new TextDecoder();
  let held = "";
  for await (const chunk of chunks(stream)) {
    held += decoder.decode(chunk, { stream: true });
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Safari cannot iterate over a stream.
async function* chunks(stream) {
  const reader = stream.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}
