// The server's API, at the place the page came from.

// What went wrong, in a sentence for a person; `status` is HTTP's, 0 where no answer came.
class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const at = (path) => new URL(path, document.baseURI).href;

const KEY = "garserve-key";
let unkept = ""; // the key where the browser blocks storage: it lasts until the page is left

/** The API key is kept for this tab only. */
export const key = {
  get() {
    try { return sessionStorage.getItem(KEY) ?? unkept; } catch { return unkept; }
  },
  set(value) {
    unkept = "";
    try { value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY); } catch { unkept = value; }
  },
};

/** The server's model: {id, prompts}. */
export async function model() {
  const { data } = await (await send("v1/models")).json();
  const [first] = data ?? [];
  if (!first) throw new ApiError("The server names no model.");
  return { id: first.id, prompts: first.prompts ?? null };
}

/** A refined mask of a region: its COCO RLE. */
export async function refine(image, region, signal) {
  const answer = await (await send("v1/regions/refine", { image, region }, signal)).json();
  return answer.region.rle;
}

/** Descriptions as they come: {index, delta} for pieces, {index, text, finish_reason} for whole ones. */
export async function* describe(body, signal) {
  yield* events(await send("v1/regions/describe", { ...body, stream: true }, signal));
}

/** An answer's pieces, as OpenAI streams them: {delta, finish}. */
export async function* chat(body, signal) {
  for await (const event of events(await send("v1/chat/completions", { ...body, stream: true }, signal))) {
    const [choice] = event.choices ?? [];
    if (choice) yield { delta: choice.delta?.content ?? "", finish: choice.finish_reason ?? null };
  }
}

async function send(path, body, signal) {
  const headers = { Accept: "application/json, text/event-stream" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(at(path), { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let said = "";
  try {
    const body = await response.json();
    said = body.error?.message ?? body.message ?? (typeof body.detail === "string" ? body.detail : "");
  } catch {
    // An answer that is no JSON, of something between the server and here.
  }
  if (response.status === 401) said = key.get() ? "The server does not know this API key." : "";
  const later = response.headers.get("Retry-After");
  const again = later ? ` Try again in ${later} s.` : "";
  return new ApiError(`${said || meaning(response.status)}${again}`, response.status);
}

function meaning(status) {
  const known = {
    401: "The server wants an API key.", 403: "The server refuses this API key.", 404: "The server does not know this request.",
    413: "The picture is too large for this server.", 429: "The server is busy.", 503: "The server is not ready.",
  };
  return known[status] ?? `The server answered with status ${status}.`;
}

/** JSON objects of a stream of server-sent events, until [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  try {
    while (!ended) {
      const { value, done } = await reader.read();
      const blocks = (rest + (value ?? "")).replaceAll("\r\n", "\n").split("\n\n");
      rest = done ? "" : blocks.pop();
      for (const block of blocks) {
        const data = dataOf(block);
        if (data === "[DONE]") return;
        if (data) yield checked(data);
      }
      ended = done;
    }
  } catch (error) {
    throw error instanceof ApiError || error.name === "AbortError" ? error : new ApiError("The connection broke off in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError("The answer broke off before its end.");
}

function dataOf(block) {
  const lines = block.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}

function checked(data) {
  const event = JSON.parse(data);
  if (event.error && event.index === undefined) throw new ApiError(event.error.message ?? String(event.error));
  return event;
}
