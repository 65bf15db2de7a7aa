/** The supervisor tree of the daemon, as it is: which of its parts run, were restarted, or were given up, and why. */
import { client } from "../store.js";
import { Problem, Said, State, clean, html, lasting, usePolled } from "../ui.js";

const EVERY_MS = 2000;
const MANY = 60;

export function Tree() {
  const [tree, error] = usePolled(() => client.get("api/v1/system/tree"), EVERY_MS);
  return html`<main class="main"><div class="head"><h1>Supervisor tree</h1></div>
    <p class="quiet">Each part of the daemon is a child of a supervisor, which restarts it when it crashes. VMs outlive their actors: a new one takes its VM over.</p>
    <${Problem} of=${error}/>
    <div class="panel">${tree ? html`<ul class="tree"><${Node} of=${tree}/></ul>` : html`<p class="quiet">Reading…</p>`}</div></main>`;
}

function Node({ of }) {
  const children = of.children ?? [];
  const last = (of.exits ?? []).at(-1);
  const bad = of.state !== "running";
  return html`<li><div class="node"><span class="state ${bad ? "crashed" : "running"}"><b>${clean(of.name)}</b></span>
    <span class="quiet">${clean(of.kind)}</span>
    ${bad && html`<span class="bad">${clean(of.state)}</span>`}
    ${of.restarts > 0 && html`<span class="tag">${of.restarts} ${of.restarts === 1 ? "restart" : "restarts"}</span>`}
    ${of.mailbox?.depth > 0 && html`<span class="tag" title="Messages that wait">${of.mailbox.depth} of ${of.mailbox.capacity} waiting</span>`}
    ${of.strategy && html`<span class="quiet wide-only">${clean(of.strategy).replaceAll("_", " ")}, at most ${of.intensity} restarts in ${of.period_s} s</span>`}
    ${last && html`<span class="quiet"><${Said}>${typeof last === "string" ? last : last.reason ?? JSON.stringify(last)}<//></span>`}</div>
    ${children.length > 0 && html`<ul>${children.slice(0, MANY).map((child) => html`<${Node} key=${child.path} of=${child}/>`)}
      ${children.length > MANY && html`<li class="quiet">and ${children.length - MANY} more</li>`}</ul>`}</li>`;
}
