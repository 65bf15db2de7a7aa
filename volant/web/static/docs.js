/** The documentation of the API, from its OpenAPI document: operations by tag, each with examples and a form that sends it. */
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { signal } from "@preact/signals";
import { Client } from "./api.js";
import { save } from "./bodies.js";
import { Kind } from "./schemas.js";
import { Mark, Notices, Problem, Text, addStyle, clean, html } from "./ui.js";
import { Operation } from "./views/operation.js";

const client = new Client();
/** The caller; null: not known yet; false: the daemon asks for a key, and nobody has signed in. */
const session = signal(null);
const root = signal(null);
const problem = signal(null);

async function load() {
  problem.value = null;
  try {
    session.value = await client.session();
    root.value ??= await client.get("openapi.json");
  } catch (error) {
    if (error.status === 401) session.value = false;
    else problem.value = error;
  }
}

/** The document has no element of a name with spaces. */
const placeOf = (tag) => `tag-${tag.toLowerCase().replaceAll(" ", "-")}`;

function operationsOf(tag, words) {
  const found = [];
  for (const [path, methods] of Object.entries(root.value.paths)) {
    for (const [method, of] of Object.entries(methods)) {
      const text = `${method} ${path} ${of.operationId} ${of.summary} ${tag}`.toLowerCase();
      if (of.tags.includes(tag) && words.every((word) => text.includes(word))) found.push({ path, method, of });
    }
  }
  return found;
}

function Struct({ name, of }) {
  const required = new Set(of.required ?? []);
  const [open, setOpen] = useState(false);
  return html`<details class="api" id=${name} onToggle=${(event) => setOpen(event.target.open)}>
    <summary><code>${name}</code><span class="quiet"><${Text} of=${of.description ?? ""}/></span></summary>
    ${open && html`<div class="within scroll-x">${!of.properties ? html`<${Kind} of=${of}/>` : html`<table><thead><tr><th>Member</th><th>Type</th><th>Meaning</th></tr></thead>
      <tbody>${Object.entries(of.properties).map(([member, one]) => html`<tr><td><code>${member}</code></td><td><${Kind} of=${one}/></td>
        <td>${!required.has(member) && html`<span class="quiet">Optional. </span>`}<${Text} of=${one.description ?? ""}/></td></tr>`)}</tbody></table>`}</div>`}</details>`;
}

/** Opens what the address names, once it is there. */
function follow() {
  const found = document.getElementById(location.hash.slice(1));
  if (!found) return;
  if (found.tagName === "DETAILS") found.open = true;
  found.scrollIntoView();
}

function Documentation() {
  const [text, setText] = useState("");
  const { info, tags, components } = root.value;
  useEffect(() => {
    // What is searched for may hide what a link leads to.
    const onHash = () => { setText(""); setTimeout(follow); };
    addEventListener("hashchange", onHash);
    follow();
    return () => removeEventListener("hashchange", onHash);
  }, []);
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const parts = tags.map((tag) => [tag, operationsOf(tag.name, words)]).filter(([, found]) => found.length);
  return html`<nav class="nav" aria-label="Parts">
      <input type="search" aria-label="Search operations" placeholder="Search" value=${text} onInput=${(event) => setText(event.target.value)}/>
      ${parts.map(([{ name }, found]) => html`<a href=${`#${placeOf(name)}`}>${name}<span class="quiet num">${found.length}</span></a>`)}
      <a href="#types">Types</a></nav>
    <div class="page"><div></div><main class="main operations">
      <div class="head"><h1>${info.title} API ${info.version}</h1><span class="space"></span><button onClick=${() => save(new Blob([JSON.stringify(root.value, null, 2)]), "openapi.json")}>Download openapi.json</button></div>
      ${!words.length && html`<p class="about"><${Text} of=${info.description}/></p>`}
      ${parts.map(([{ name, description }, found]) => html`<h2 id=${placeOf(name)}>${name}</h2><p class="quiet"><${Text} of=${description}/></p>
        ${found.map((one) => html`<${Operation} key=${one.of.operationId} ...${one} root=${root.value} client=${client} session=${session.value} onRefused=${load}/>`)}`)}
      ${!parts.length && html`<p role="status">No operation is like that.</p>`}
      <h2 id="types">Types</h2>${Object.entries(components.schemas).map(([name, of]) => html`<${Struct} key=${name} name=${name} of=${of}/>`)}</main></div>`;
}

const Page = () => html`<div class="shell">
  <header class="top"><a class="brand" href="./"><${Mark}/>Volant</a><span class="space"></span>
    ${session.value && html`<span class="quiet">${session.value.caller === "anonymous" ? "No key in force" : `${clean(session.value.caller)}, role ${session.value.role}`}</span>`}
    <a href="./">Console</a></header>
  ${session.value === false ? html`<div class="page" style="grid-column: 1 / -1"><div></div><main class="main"><div class="empty"><h2>Sign in to read this</h2>
      <p>This daemon asks for a key, and nobody has signed in with one in this browser. Here you can send requests with the rights of your session.</p>
      <a class="button first" href="./">Sign in</a></div></main></div>`
    : root.value ? html`<${Documentation}/>`
    : html`<div class="page" style="grid-column: 1 / -1"><div></div><main class="main">${problem.value ? html`<${Problem} of=${problem.value}/><button onClick=${load}>Try again</button>`
      : html`<p class="quiet" role="status">Reading…</p>`}</main></div>`}</div><${Notices}/>`;

document.title = "Volant API";
// What another tab does with the session holds here, too.
client.onOtherPage(load);
await addStyle("docs.css");
render(html`<${Page}/>`, document.getElementById("app"));
load();
