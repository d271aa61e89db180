// The request on the page, as a command or a program for elsewhere. The key is never in it.
import { messages } from "./talk.js";

const LINE = 88; // characters that stand on one line
const PICTURE = Symbol("the picture's data URL");

/** The request that the page would send: {path, body}, with a mark in the place of the picture. */
export function request({ model, regions, question, turns = [], longest }) {
  const limits = longest ? { max_tokens: longest } : {};
  if (!question) return { path: "v1/regions/describe", body: { image: PICTURE, regions, ...limits } };
  const body = { model: model || "default", messages: messages(PICTURE, regions, turns, question), temperature: 0, ...limits, stream: true };
  return { path: "v1/chat/completions", body };
}

/** As a curl command for a POSIX shell. */
export function curl({ base, name, type, keyed, ...asked }) {
  const { path, body } = request(asked);
  // Inside the here-document the shell still reads \, $ and `.
  const json = written(body, "", (text) => (text === PICTURE ? `"data:${type};base64,$IMAGE"` : JSON.stringify(text).replace(/[\\$`]/g, "\\$&")));
  const header = keyed ? ` \\\n  -H "Authorization: Bearer $GARSERVE_API_KEY"` : "";
  return `IMAGE=$(base64 < ${quoted(name)} | tr -d '\\n')
curl -N ${quoted(base + path)} \\
  -H 'Content-Type: application/json'${header} -d @- <<EOF
${json}
EOF
`;
}

/** As a Python program: with the official openai client, or with httpx where descriptions are asked. */
export function python({ base, name, type, keyed, ...asked }) {
  const { path, body } = request(asked);
  const value = (data, indent = "") => written(data, indent, (text) => (text === PICTURE ? "image" : JSON.stringify(text)));
  const imports = keyed ? "import base64\nimport os" : "import base64";
  const open = `image = "data:${type};base64," + base64.b64encode(open(${value(name)}, "rb").read()).decode()`;
  const secret = `os.environ["GARSERVE_API_KEY"]`;
  const call = body.messages ? asking(body, base, keyed ? secret : `"none"`, value) : describing(body, base + path, keyed && secret, value);
  return `${imports}\n\n${body.messages ? "from openai import OpenAI" : "import httpx"}\n\n${open}\n${call}`;
}

function describing(body, url, secret, value) {
  const headers = secret ? `\n    headers={"Authorization": "Bearer " + ${secret}},` : "";
  return `answer = httpx.post(
    ${value(url)},
    json=${value(body, "    ")},
    timeout=300,${headers}
)
answer.raise_for_status()
print(answer.text)
`;
}

function asking(body, base, secret, value) {
  const longest = body.max_tokens ? `\n    max_tokens=${body.max_tokens},` : "";
  return `client = OpenAI(base_url=${value(base + "v1")}, api_key=${secret})
stream = client.chat.completions.create(
    model=${value(body.model)},
    temperature=0,${longest}
    stream=True,
    messages=${value(body.messages, "    ")},
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
`;
}

// JSON (and Python, where nothing is true, false or null) with lists of numbers and points on one line.
function written(data, indent, text) {
  if (typeof data === "string" || data === PICTURE) return text(data);
  if (typeof data !== "object") return String(data);
  const list = Array.isArray(data);
  if (list && data.flat().every((item) => typeof item === "number")) return JSON.stringify(data).replaceAll(",", ", ");
  const deeper = `${indent}  `, [open, close] = list ? "[]" : "{}";
  const items = Object.entries(data).map(([name, item]) => (list ? "" : `${JSON.stringify(name)}: `) + written(item, deeper, text));
  const line = open + items.join(", ") + close;
  if (line.length <= LINE && !line.includes("\n")) return line;
  return `${open}\n${items.map((item) => deeper + item).join(",\n")}\n${indent}${close}`;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
