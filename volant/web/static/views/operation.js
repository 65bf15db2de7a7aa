/** One operation of the API: what it takes and gives, and a form that sends it with the rights of the session. */
import { useEffect, useRef, useState } from "preact/hooks";
import { ApiError } from "../api.js";
import { atMost } from "../bodies.js";
import { curlOf } from "../requests.js";
import { Kind, isNothing, resolve, sample } from "../schemas.js";
import { Code, Problem, Said, Text, html, plain } from "../ui.js";
import { Answer, SHOWN, TAKEN } from "./answer.js";

const pretty = (value) => JSON.stringify(value, null, 2);
const isText = (media) => media.startsWith("text/") || media.endsWith("json");

export function Operation({ path, method, of, ...more }) {
  const [open, setOpen] = useState(false);
  const socket = "101" in of.responses;
  const shown = socket ? "WS" : method.toUpperCase();
  return html`<details class="api" id=${of.operationId} onToggle=${(event) => setOpen(event.target.open)}>
    <summary><b class=${shown}>${shown}</b><code>${path}</code><span class="quiet"><${Text} of=${of.summary}/></span></summary>
    ${open && html`<div class="within">${of.description && html`<p><${Text} of=${of.description}/></p>`}
      <${Request} path=${path} method=${method.toUpperCase()} of=${of} socket=${socket} ...${more}/><${Answers} of=${of} root=${more.root}/></div>`}</details>`;
}

/** Returns why an operation can't be sent from here; "": it can. */
function obstacle(path, of, socket, session) {
  if (socket) return "This is a WebSocket; this page sends requests only.";
  // Another session in this browser would end that of the console.
  if (path.startsWith("/api/v1/session") && of.operationId !== "get_session") return "The console signs in and out.";
  const permission = of["x-permission"];
  if (permission === "public" || session.permissions.includes(permission)) return "";
  return `It needs the permission ${permission}, which your role ${session.role} does not have.`;
}

/** Returns the media types of a successful answer. */
const mediasOf = (of) => Object.entries(of.responses).flatMap(([status, answer]) => (status < "300" ? Object.keys(answer.content ?? {}) : []));

function Request({ path, method, of, socket, root, client, session, onRefused }) {
  const parameters = of.parameters ?? [];
  const content = Object.entries(of.requestBody?.content ?? {});
  const [media, body] = content.at(-1) ?? [];
  const examples = Object.entries(body?.examples ?? {});
  const takesBody = body && !isNothing(body.schema);
  const takesText = takesBody && (media === "*/*" || isText(media));
  const accepts = mediasOf(of);
  const [values, setValues] = useState(() => Object.fromEntries(parameters.map((one) => [one.name, one.example === undefined ? "" : String(one.example)])));
  const [text, setText] = useState(examples.length ? pretty(examples[0][1].value) : "");
  const [file, setFile] = useState(null);
  const [accept, setAccept] = useState("");
  const [busy, setBusy] = useState(null);
  const [problem, setProblem] = useState(null);
  const [answer, setAnswer] = useState(null);
  const why = obstacle(path, of, socket, session);
  useEffect(() => () => busy?.abort(), [busy]);

  const place = path.slice(1).replace(/{(\w+)}/g, (_, name) => values[name].split("/").map(encodeURIComponent).join(name === "path" ? "/" : "%2F"));
  const query = Object.fromEntries(parameters.filter((one) => one.in === "query").map((one) => [one.name,
    one.schema.type === "array" && one.explode !== false ? values[one.name].split("\n") : values[one.name].trim()]));
  const headers = parameters.filter((one) => one.in === "header" && values[one.name].trim()).map((one) => [one.name, values[one.name].trim()]);
  if (accept) headers.push(["Accept", accept]);
  // What may be anything is JSON, if it looks like that.
  const type = media === "*/*" ? (file ? "application/octet-stream" : /^\s*[[{"]/.test(text) ? "application/json" : "text/plain") : media;
  const sent = takesBody && (file ?? (text && takesText ? text : null));

  const submit = async (event) => {
    event.preventDefault();
    setProblem(null);
    const ended = new AbortController();
    setBusy(ended);
    const began = performance.now();
    const seen = { text: "", blob: undefined };
    const decoder = new TextDecoder();
    const show = () => setAnswer({ ...seen, ms: performance.now() - began });
    let waiting = false;
    try {
      const found = await client.send(method, place, { query, headers: { ...Object.fromEntries(headers), ...(sent && { "Content-Type": type }) },
        body: sent ? new Blob([sent]) : undefined, signal: ended.signal, patience: 0, any: true });
      Object.assign(seen, { status: found.status, type: found.headers.get("Content-Type") ?? "", headers: [...found.headers] });
      show();
      seen.blob = await atMost(TAKEN, found, (piece) => {
        seen.text = `${seen.text}${decoder.decode(piece, { stream: true })}`.slice(-SHOWN);
        if (!waiting) requestAnimationFrame(() => { waiting = false; show(); });
        waiting = true;
      });
      show();
      if (found.status === 401) onRefused();
    } catch (error) {
      if (!ended.signal.aborted) setProblem(error instanceof TypeError ? new ApiError({ detail: "the answer has ended in the middle" }) : error);
    }
    setBusy(null);
  };

  return html`<form onSubmit=${submit}>
    ${parameters.length > 0 && html`<h3>Parameters</h3><div class="scroll-x"><table><tbody>${parameters.map((one) => html`<tr>
      <td class="narrow"><code>${one.name}</code><br/><span class="quiet">${one.in}</span></td>
      <td>${why ? html`<${Kind} of=${one.schema}/>` : html`<${Parameter} of=${one} root=${root} value=${values[one.name]} onChange=${(value) => setValues({ ...values, [one.name]: value })}/>`}</td>
      <td><${Text} of=${one.description}/>${!why && html` <${Kind} of=${one.schema}/>`}</td></tr>`)}</tbody></table></div>`}
    ${takesBody && html`<h3>Body${of.requestBody.required ? "" : ", optional"}</h3><p>${isText(media) && html`<${Kind} of=${body.schema}/> as `}${media}</p>
      ${examples.length > 1 && html`<div class="segments wrapped" role="group" aria-label="Examples" style="margin-bottom: 6px">${examples.map(([name, one]) => html`
        <button type="button" aria-pressed=${text === pretty(one.value)} onClick=${() => setText(pretty(one.value))}>${name}</button>`)}</div>`}
      ${takesText && html`<textarea aria-label="Body" spellcheck=${false} readonly=${Boolean(why)} value=${text} onInput=${(event) => setText(event.target.value)}></textarea>`}
      ${!why && (media === "*/*" || !isText(media)) && html`<input type="file" aria-label="A file as the body" onChange=${(event) => setFile(event.target.files[0] ?? null)}/>`}`}
    <h3>Request</h3>${accepts.length > 1 && html`<p class="row"><label class="check">Answer as <select style="width: auto" value=${accept} onChange=${(event) => setAccept(event.target.value)}>
      <option value="">what it likes</option>${accepts.map((one) => html`<option>${one}</option>`)}</select></label></p>`}
    ${!socket && html`<${Code} label="The request, for curl" text=${curlOf({ method, url: addressOf(client, place, query), headers, keyed: session.signed_in, type: sent ? type : undefined, body: file ? undefined : sent || undefined, file: Boolean(file) })}/>`}
    <${Problem} of=${problem}/>
    ${why ? html`<p class="quiet">${why}</p>` : html`<div class="row" style="margin-top: 8px"><button class=${method === "DELETE" ? "danger" : "first"} disabled=${busy}>${busy ? "Sending…" : "Send"}</button>
      ${busy && html`<button type="button" onClick=${() => { busy.abort(); setBusy(null); }}>Stop</button>`}
      <span class="quiet">It is sent to this daemon, with your rights.</span></div>`}</form>
    ${answer && html`<section aria-label="Answer" role="status"><h3>Answer</h3>${answer.blob === undefined
      ? html`<p class="num">${answer.status}</p><div class="code"><pre tabindex="0" aria-label="What has come so far">${plain(answer.text)}</pre></div>`
      : html`<${Answer} key=${answer.ms} of=${answer} name=${of.operationId} whole=${html`<code>curl --output FILE</code>`}/>`}
      <details><summary>Headers</summary><pre tabindex="0" aria-label="Headers of the answer"><${Said}>${answer.headers.map(([name, value]) => `${name}: ${value}`).join("\n")}<//></pre></details></section>`}`;
}

function addressOf(client, place, query) {
  const url = new URL(place, client.base);
  for (const [name, value] of Object.entries(query)) for (const one of [value].flat()) if (one) url.searchParams.append(name, one);
  return url.href;
}

function Parameter({ of: { name, in: place, schema, explode, required }, root, value, onChange }) {
  const found = resolve(root, schema);
  const more = { "aria-label": name, value, required: required && name !== "path", onInput: (event) => onChange(event.target.value) };
  const choices = found.enum ?? (found.type === "boolean" ? ["true", "false"] : null);
  if (choices) return html`<select ...${more} onChange=${more.onInput}><option value=""></option>${choices.map((one) => html`<option>${one}</option>`)}</select>`;
  if (found.type === "integer") return html`<input ...${more} type="number" min=${found.minimum} max=${found.maximum}/>`;
  if (found.type === "array" && explode !== false && place === "query") return html`<textarea ...${more} rows="1" placeholder="one a line" spellcheck=${false}></textarea>`;
  return html`<input ...${more} placeholder=${found.type === "array" ? "with commas between" : ""} autocomplete="off" spellcheck=${false}/>`;
}

function Answers({ of, root }) {
  const answers = Object.entries(of.responses).map(([status, given]) => [status, resolve(root, given)]);
  const [first] = answers.filter(([status]) => status < "300").map(([, answer]) => answer);
  const json = first?.["x-items"] ?? first?.content?.["application/json"]?.schema;
  const shape = useRef(undefined);
  shape.current ??= json && pretty(sample(root, json));
  return html`<h3>Answers</h3><div class="scroll-x"><table><tbody>${answers.map(([status, answer]) => html`<tr><td class="narrow num">${status}</td><td><${Text} of=${answer.description}/></td>
      <td>${Object.entries(answer.content ?? {}).map(([media, { schema }]) => html`<div>${isText(media) && html`<${Kind} of=${schema}/> as `}${media}</div>`)}
        ${answer["x-items"] && html`<div>each: <${Kind} of=${answer["x-items"]}/></div>`}</td>
      <td class="quiet">${Object.keys(answer.headers ?? {}).join(", ")}</td></tr>`)}</tbody></table></div>
    ${shape.current && shape.current !== "null" && html`<h3>${first["x-items"] ? "The shape of one" : "The shape of an answer"}</h3><${Code} text=${shape.current} label="The shape of an answer"/>`}`;
}
