/** Ports of a VM: what listens in the guest, at an origin of its own. */
import { useState } from "preact/hooks";
import { client, named } from "../store.js";
import { path } from "../api.js";
import { Problem, Said, html } from "../ui.js";

export function Ports({ vm }) {
  const [problem, setProblem] = useState(null);
  const exposed = (vm.ports ?? []).filter((port) => port.endsWith("/tcp"));
  const open = async (port) => {
    // Opened now, while the browser knows that somebody clicked.
    const tab = window.open("about:blank");
    try {
      const { url } = await client.post(path`api/v1/vms/${vm.name}/origins`, { port }, { project: named(vm.project) });
      setProblem(null);
      if (tab) {
        tab.opener = null;
        tab.location = url;
      } else {
        location.href = url;
      }
    } catch (error) {
      tab?.close();
      setProblem(error);
    }
  };
  const submit = (event) => {
    event.preventDefault();
    open(Number(new FormData(event.target).get("port")));
  };
  return html`<div class="grid"><section class="panel"><h2>Open a port</h2>
    <p>A server in the guest opens in a tab of its own, at an address of its own. So its scripts and cookies work, and see nothing of this console.</p>
    <form class="row" onSubmit=${submit}><input style="width: 110px" name="port" type="number" min="1" max="65535" required placeholder="8080" aria-label="Port of the guest"/>
      <button class="first">Open</button></form><${Problem} of=${problem}/></section>
    <section class="panel"><h2>Published on the host</h2>${exposed.length
      ? html`<table><tbody>${exposed.map((port) => html`<tr><td class="mono"><${Said}>${port}<//></td><td class="right narrow">
        <button onClick=${() => open(Number(port.split(":").at(-1).split("/")[0]))}>Open</button></td></tr>`)}</tbody></table>`
      : html`<p class="quiet">None. <code>--publish 8080:80</code> at its creation publishes some; opening a port here needs none.</p>`}</section></div>`;
}
