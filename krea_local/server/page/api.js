// The server's JSON API: requests, errors, the key, uploads and event streams.
// Knows nothing of the page; what it wants shown it throws or hands back.

const KEY = "krea-local-key";
let askForKey = null; // async (wasWrong) => key; set by the page

export function onKeyWanted(ask) {
  askForKey = ask;
}

/** An answer that is an error. `faults` are those of single fields: [{loc, msg}]. */
export class ApiError extends Error {
  constructor(status, message, faults = []) {
    super(message);
    this.status = status;
    this.faults = faults;
  }
}

/** The server did not answer at all. */
export class Unreachable extends Error {}

export async function get(path, options = {}) {
  return parse(await (await call(path, options)).text());
}

export async function post(path, body) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" } };
  const answer = await call(path, { ...options, body: JSON.stringify(body ?? {}) });
  return parse(await answer.text());
}

export async function remove(path) {
  await call(path, { method: "DELETE" });
}

/** Store an image on the server: {url, width, height}. */
export async function upload(blob) {
  const headers = { "Content-Type": blob.type || "application/octet-stream" };
  return parse(await (await call("api/uploads", { method: "POST", headers, body: blob })).text());
}

/** A stored picture's bytes. */
export async function download(url) {
  return (await call(url)).blob();
}

/**
 * Read server-sent events until the stream ends or `signal` is aborted.
 * EventSource cannot send a key, so this reads the stream itself.
 */
export async function follow(path, signal, onEvent) {
  const headers = { Accept: "text/event-stream" };
  const answer = await call(path, { headers, signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      let type = "message";
      const data = [];
      for (const line of block.split("\n")) {
        if (line.startsWith("event:")) type = line.slice(6).trim();
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      }
      if (data.length) onEvent(type, parse(data.join("\n")));
    }
  }
}

async function call(path, options = {}) {
  let wasWrong = false;
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers };
    if (key) headers.Authorization = `Key ${key}`;
    let answer;
    try {
      answer = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Unreachable("The server cannot be reached.");
    }
    if (answer.ok) return answer;
    if (answer.status !== 401 || !askForKey) throw await failure(answer);
    // Several calls may be refused at once; whichever asks first asks for all.
    wasWrong = key !== null && key === sessionStorage.getItem(KEY);
    if (key === sessionStorage.getItem(KEY)) {
      sessionStorage.setItem(KEY, await oneQuestion(wasWrong));
    }
  }
}

let question = null;

function oneQuestion(wasWrong) {
  question ??= askForKey(wasWrong).finally(() => {
    question = null;
  });
  return question;
}

async function failure(answer) {
  const text = await answer.text();
  let detail = null;
  try {
    detail = JSON.parse(text).detail;
  } catch {
    // Something between us and the server answered in its own words.
  }
  if (Array.isArray(detail)) {
    return new ApiError(answer.status, detail.map((fault) => fault.msg).join("; "), detail);
  }
  const words = typeof detail === "string" ? detail : `${answer.status} ${answer.statusText}`;
  return new ApiError(answer.status, words);
}

/** JSON whose integers beyond 2^53, such as some seeds, become strings instead of other integers. */
function parse(text) {
  return JSON.parse(text, (name, value, context) => {
    const isRounded = Number.isInteger(value) && !Number.isSafeInteger(value);
    return isRounded && context?.source ? context.source : value;
  });
}
