/** The host and what it carries: figures, what has failed and why, what happened last. */
import { useEffect, useState } from "preact/hooks";
import { client, events, host, may, revision, seesAll, stateOf, vms } from "../store.js";
import { Ago, Empty, Facts, Problem, Said, State, clean, html, lasting, size, to, toVm, usePolled } from "../ui.js";
import { Chart } from "../chart.js";
import { EventLine } from "./events.js";

const EVERY_MS = 3000;
const KEPT = 200;
const ORDER = ["running", "starting", "pending", "paused", "stopping", "stopped", "crashed", "deleting", "unreachable"];
const figures = [];

export function Overview() {
  const [status, error] = usePolled(async () => {
    const found = await client.get("api/v1/system/status");
    figures.push([Date.now() / 1000, found.cpu_percent, found.mem_percent]);
    if (figures.length > KEPT) figures.shift();
    return found;
  }, EVERY_MS);
  revision.value;
  const all = [...vms.values()];
  const counts = Object.groupBy(all, stateOf);
  const crashed = (counts.crashed ?? []).sort((one, other) => other.updated_at.localeCompare(one.updated_at));
  const up = [...(counts.running ?? []), ...(counts.paused ?? [])];
  const sum = (member) => up.reduce((total, vm) => total + (vm[member] ?? 0), 0);
  return html`<main class="main"><div class="head"><h1>Overview</h1><span class="space"></span>
    ${may("control") && html`<a class="button first" href=${to("create")}>Create VM</a>`}</div>
    <${Problem} of=${error?.status ? error : null}/>
    ${status?.draining_since && html`<div class="note">This host drains since <${Ago} at=${status.draining_since}/> ago: no VM can be created or started.</div>`}
    <div class="figures">
      <a class="figure" href=${to("vms")}><b>${all.length}</b><span>VMs</span></a>
      ${ORDER.filter((state) => counts[state] || state === "running" || state === "crashed").map((state) => html`
        <a class="figure" href=${to("vms", { state })}><b>${counts[state]?.length ?? 0}</b><span class="state ${counts[state] ? state : ""}">${state}</span></a>`)}
    </div>
    <div class="grid">
      ${!all.length && html`<div class="panel wide"><h2>Your first VM</h2>
        <p>A VM here is a small Linux machine of its own: it boots in seconds, and you can run commands in it, fork it while it
          runs, and delete it without a trace. ${may("control") && html`<a href=${to("create")}>Create one</a>, or`} use a terminal:</p>
        <div class="code"><pre>volar vms create demo --wait\nvolar vms exec demo -- uname -a</pre></div></div>`}
      ${crashed.length > 0 && html`<section class="panel wide"><h2>Crashed, and why</h2><table><tbody>
        ${crashed.slice(0, 12).map((vm) => html`<tr><td class="narrow"><a href=${toVm(vm)}>${vm.name}</a></td>
          <td>${vm.reason ? html`<code>${vm.reason.code}</code> <${Said}>${vm.reason.message}<//>` : "–"}</td>
          <td class="narrow right quiet"><${Ago} at=${vm.updated_at}/></td></tr>`)}</tbody></table>
        ${crashed.length > 12 && html`<p><a href=${to("vms", { state: "crashed" })}>All ${crashed.length}</a></p>`}</section>`}
      <section class="panel"><h2>${host.value === null ? "Host" : html`The host ${clean(host.value)}, which answers you`}</h2>
        ${status ? html`<${Facts} of=${[
          ["Daemon", html`<${State} of=${status.status}/>`],
          ["Version", status.version],
          ["Up for", lasting(status.uptime_s)],
          ["Processor", `${status.cpu_percent.toFixed(0)} %`],
          ["Memory", `${status.mem_percent.toFixed(0)} %`],
          [host.value === null ? "Given to VMs" : "Given to VMs, by all hosts", `${sum("cpu_cores")} vCPUs, ${size(sum("memory_mb"))}`],
        ]}/>` : html`<p class="quiet">Reading…</p>`}</section>
      <section class="panel"><h2>Processor and memory of the host</h2>
        <${Chart} label="Processor and memory of the host, in percent" rows=${figures} version=${status} unit="%" max=${100}
          series=${[["Processor", "accent"], ["Memory", "good"]]}/></section>
      <section class="panel wide"><h2>What happened last</h2>
        ${events.length ? html`<ul class="timeline">${events.slice(0, 20).map((event) => html`<${EventLine} key=${event.id} event=${event} vm/>`)}</ul>`
          : html`<p class="quiet">Nothing since you opened this page. Events appear here as they are committed.</p>`}</section>
    </div></main>`;
}
