/** The actions of a VM's plugin: a form for each, and what the workload has answered. */
import { useEffect, useState } from "preact/hooks";
import { ApiError, path } from "../api.js";
import { atMost } from "../bodies.js";
import { calling } from "../requests.js";
import { Fields, blanks, bodyOf, fieldsOf, parsed } from "../schema-form.js";
import { client, named } from "../store.js";
import { Code, Empty, Problem, Said, clean, go, html, route, toVm, usePolled } from "../ui.js";
import { Answer, TAKEN } from "./answer.js";

export function PluginActions({ vm }) {
  const [manifest, error] = usePolled(() => client.get(path`api/v1/plugins/${vm.plugin}/manifest`, { project: named(vm.project) }), 0, [vm.plugin]);
  if (error) return html`<${Problem} of=${error}/>`;
  if (!manifest) return html`<p class="quiet" role="status">Reading…</p>`;
  const actions = Object.entries(manifest.actions ?? {});
  if (!actions.length) return html`<${Empty} title=${`The plugin ${clean(vm.plugin)} has no actions`}><p>An action is a name for a request to the program in the VM. A plugin's manifest declares them, with the JSON Schema of what they take.</p><//>`;
  const wanted = route.value.query.action;
  const [name, action] = actions.find(([one]) => one === wanted) ?? actions[0];
  return html`<div class="grid">
    <section class="panel wide"><div class="segments wrapped" role="group" aria-label="Actions">${actions.map(([one]) => html`<button aria-pressed=${one === name} onClick=${() => go(`${toVm(vm, "actions")}?${new URLSearchParams({ action: one })}`, true)}>${clean(one)}</button>`)}</div></section>
    <${Call} key=${name} vm=${vm} name=${name} action=${action}/></div>`;
}

function Call({ vm, name, action }) {
  const [fields] = useState(() => fieldsOf(action.input));
  const [values, setValues] = useState(() => (fields ? blanks(fields) : null));
  const [text, setText] = useState("");
  const [problem, setProblem] = useState(null);
  const [answer, setAnswer] = useState(null);
  const [busy, setBusy] = useState(null);
  // A call that nobody waits for any more is given up.
  useEffect(() => () => busy?.abort(), [busy]);
  const body = () => (fields ? bodyOf(fields, values) : text.trim() ? parsed(text, "The input") : undefined);
  const submit = async (event) => {
    event.preventDefault();
    setProblem(null);
    const began = performance.now();
    let ended;
    try {
      const sent = body();
      ended = new AbortController();
      setBusy(ended);
      const found = await client.send("POST", path`api/v1/vms/${vm.name}/actions/${vm.plugin}/${name}`, { body: sent, project: named(vm.project), patience: 0, signal: ended.signal, guest: true });
      const blob = await atMost(TAKEN, found);
      setAnswer({ status: found.status, type: found.headers.get("Content-Type") ?? "", blob, ms: performance.now() - began });
    } catch (error) {
      if (!ended?.signal.aborted) setProblem(error instanceof TypeError ? new ApiError({ detail: "the answer has ended in the middle" }) : error);
    }
    setBusy(null);
  };
  let request = "";
  try {
    request = calling(vm, name, body());
  } catch {
    // Not yet whole.
  }
  const runs = vm.status === "running";
  return html`<form class="panel" onSubmit=${submit}><h2>${clean(name)}</h2>
      ${action.description && html`<p><${Said}>${action.description}<//></p>`}
      ${fields ? html`<${Fields} fields=${fields} values=${values} onChange=${setValues}/>`
        : html`<label class="field"><span>Input</span><textarea name="input" placeholder="JSON; nothing for no body" spellcheck=${false} value=${text} onInput=${(event) => setText(event.target.value)}></textarea>
          ${!action.input && html`<small>The plugin says nothing about it.</small>`}</label>`}
      ${fields?.length === 0 && html`<p class="quiet">It takes nothing.</p>`}
      <${Problem} of=${problem}/>
      ${!runs && html`<p class="quiet">It can be called while ${vm.name} runs; it is ${clean(vm.status)}.</p>`}
      <div class="row"><button class="first" disabled=${busy || !runs}>${busy ? "Calling…" : "Call"}</button>
        ${busy && html`<button type="button" onClick=${() => { busy.abort(); setBusy(null); }}>Give up</button>`}</div></form>
    <section class="panel"><h2>The same request</h2>${request ? html`<${Code} text=${request} label="The request, for volar"/>` : html`<p class="quiet">Something is missing in the form.</p>`}</section>
    <section class="panel wide" role="status" aria-label="Answer"><h2>Answer</h2>${answer ? html`<${Answer} key=${answer.ms} of=${answer} name=${`${vm.name}-${name}`} whole=${html`<code>volar call … --output FILE</code>`}/>` : html`<p class="quiet">None yet.</p>`}</section>`;
}
