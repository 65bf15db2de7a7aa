/** One VM: its state and why, what happened to it, its log, a terminal, its ports, and how it was made. */
import { useEffect, useState } from "preact/hooks";
import { TYPES, client, connection, findVm, host, may, named, onEvent, revision, session, stateOf, watch } from "../store.js";
import { Ago, Code, Empty, Facts, Labels, Problem, Said, State, Time, bytes, clean, html, size, toVm, to, usePolled } from "../ui.js";
import { ACTIONS, actionsFor, run } from "../actions.js";
import { Chart } from "../chart.js";
import { EventLine } from "./events.js";
import { Log } from "./log.js";
import { Console, Exec } from "./terminal.js";
import { Browser } from "./browser.js";
import { Files } from "./files.js";
import { Ports } from "./ports.js";
import { PluginActions } from "./plugin-actions.js";
import { Sandbox } from "./sandbox.js";
import { forking, requestOf, shown } from "../requests.js";

/** By place: title, and who may see it. */
const TABS = { log: ["Log", "use"], terminal: ["Terminal", "use"], console: ["Serial console", "use"], files: ["Files", "use"], browser: ["Browser", "use"], ports: ["Ports", "use"], actions: ["Actions", "use"], made: ["How it was made", "view"] };
/** Which parts a VM has only if something runs in it besides a shell. */
const NEEDED = { browser: (vm) => Boolean(vm.image) || vm.plugin !== "base", actions: (vm) => Boolean(vm.plugin) && vm.plugin !== "base" };
/** The parts of a VM that the caller may see, as `TABS` has them. */
export const tabsOf = (vm) => Object.entries(TABS).filter(([place, [, permission]]) => may(permission) && (permission === "view" || !vm.unreachable) && (NEEDED[place]?.(vm) ?? true));
const FAILOVERS = { restart: "another host boots it again, with an empty disk", restore: "another host continues it from its newest replica" };
const MOVES = { moving: "Moving", taken_over: "Taken over", restored: "Restored" };
const MAIN = ["start", "resume", "pause", "stop"];

export function Vm({ project, name, tab = "" }) {
  revision.value;
  const vm = findVm(project, name);
  if (!vm) {
    if (connection.value === "connecting") return html`<main class="main"><p class="quiet" role="status">Reading…</p></main>`;
    return html`<main class="main"><${Empty} title=${`There is no VM named ${clean(name)}`}>
      <p>It was deleted, or it never was. <a href=${to("vms")}>Show all VMs</a>.</p><${Past} project=${project} name=${name}/><//></main>`;
  }
  const actions = actionsFor(vm);
  const first = MAIN.find((action) => actions.includes(action));
  const use = may("use") && !vm.unreachable;
  const full = use && ["log", "terminal", "console", "browser"].includes(tab);
  return html`<main class=${`main ${full ? "full" : ""}`}>
    <div class="head"><h1>${vm.name}</h1><${State} of=${stateOf(vm)}/>
      ${vm.project !== "default" && html`<a class="tag" href=${to("vms", { project: vm.project })}>${vm.project}</a>`}
      <span class="space"></span>
      <div class="row">${actions.map((action) => html`<button key=${action} class=${action === first && vm.status !== "running" ? "first" : ACTIONS[action].danger ? "danger" : ""}
        onClick=${() => run(action, vm)}>${ACTIONS[action].title}</button>`)}</div></div>
    <nav class="tabs" aria-label="Parts of this VM"><a href=${toVm(vm)} aria-current=${!tab ? "page" : null}>Overview</a>
      ${tabsOf(vm).map(([place, [title]]) => html`
        <a href=${toVm(vm, place)} aria-current=${tab === place ? "page" : null}>${title}</a>`)}</nav>
    ${tab === "log" && use ? html`<${Log} key=${vm.id} vm=${vm}/>`
      : tab === "terminal" && use ? html`<${Exec} key=${vm.id} vm=${vm}/>`
      : tab === "console" && use ? html`<${Console} key=${vm.id} vm=${vm}/>`
      : tab === "browser" && use ? html`<${Browser} key=${vm.id} vm=${vm}/>`
      : tab === "files" && use ? html`<${Files} key=${vm.id} vm=${vm}/>`
      : tab === "ports" && use ? html`<${Ports} vm=${vm}/>`
      : tab === "actions" && use ? html`<${PluginActions} vm=${vm}/>`
      : tab === "made" ? html`<${Made} vm=${vm}/>` : html`<${Summary} key=${vm.id} vm=${vm}/>`}</main>`;
}

function Summary({ vm }) {
  useEffect(() => watch(vm.id), [vm.id]);
  const { reason, workload } = vm;
  return html`
    ${vm.unreachable && html`<div class="note bad">Its host <b><${Said}>${vm.unreachable}<//></b> gives no sign of life. Here is what that has reported last, and only in part; the VM may still run.
      ${vm.failover === "restart" ? "Another host boots it again if it does not come back." : "It can be used again when the host is back."} <a href=${to("hosts")}>Show the hosts</a>.</div>`}
    ${reason && html`<div class=${`note ${vm.status === "crashed" ? "bad" : ""}`}><b>${clean(reason.code).replaceAll("_", " ")}</b>: <${Said}>${reason.message}<//>
      ${reason.console?.length > 0 && html`<pre class="code" style="margin-top: 8px" tabindex="0" aria-label="The last lines of its console"><${Said}>${reason.console.join("\n")}<//></pre>`}</div>`}
    ${vm.fallback && html`<div class="note">It booted cold, although it began as a clone: <${Said}>${vm.fallback.message}<//></div>`}
    ${!vm.unreachable && (vm.warnings ?? []).map((warning) => html`<div class="note"><${Said}>${warning}<//></div>`)}
    <div class="grid">
      <section class="panel"><h2>State</h2><${Facts} of=${[
        [vm.unreachable ? "Last reported" : "State", html`<${State} of=${vm.status}/>`],
        vm.desired && vm.desired !== vm.status && ["Wanted", vm.desired],
        workload && ["Workload", html`<${State} of=${workload.state}/> ${workload.error && html`<${Said}>${workload.error}<//>`}`],
        ["Started", vm.started_at && html`<${Ago} at=${vm.started_at}/> ago`],
        ["Booted", vm.booted_from && `${vm.booted_from}, ${vm.boots} ${vm.boots === 1 ? "boot" : "boots"}`],
        vm.restarts > 0 && ["Restarts", vm.restarts],
        ["Restart policy", vm.restart_policy],
        host.value !== null && ["If its host fails", FAILOVERS[vm.failover] ?? "it stays there"],
        vm.replica && ["Newest replica", html`${vm.replica.at ? html`<${Time} at=${vm.replica.at} full/>, on ${vm.replica.hosts.map(clean).join(", ") || "no other host"}` : "none"} ${vm.replica.reason && html`<${Said}>${vm.replica.reason.message}<//>`}`],
        vm.placement && ["Placement", html`<${Placement} of=${vm.placement}/>`],
        vm.move && [MOVES[vm.move.state] ?? "Moved", html`<${Time} at=${vm.move.at} full/>, from ${clean(vm.move.from_host)} to ${clean(vm.move.to_host)}`],
        vm.expires_at && ["Deleted at", html`<${Time} at=${vm.expires_at} full/>`],
      ]}/></section>
      <section class="panel"><h2>Machine</h2><${Facts} of=${[
        ["Runs", html`<${Said}>${vm.image?.reference ?? vm.plugin}<//>`],
        ["Processors", vm.cpu_cores],
        ["Memory", size(vm.memory_mb)],
        ["Disk", vm.disk === "none" ? "none: its files are in its memory" : vm.disk_mb ? size(vm.disk_mb) : vm.disk],
        ["Network", vm.network && `${vm.network}${vm.ip_address ? `, ${vm.ip_address}` : ""}`],
        vm.network === "none" && vm.network_reason && ["", html`<span class="quiet"><${Said}>${vm.network_reason}<//></span>`],
        vm.ports?.length > 0 && ["Published", html`<span class="mono">${vm.ports.join(", ")}</span>`],
        vm.volumes?.length > 0 && ["Volumes", html`<span class="mono"><${Said}>${vm.volumes.join(", ")}<//></span>`],
        vm.secrets?.length > 0 && ["Secrets", vm.secrets.join(", ")],
        vm.hypervisor && ["Hypervisor", `${vm.hypervisor}, ${vm.accelerator}, process ${vm.pid ?? "–"}`],
        Object.keys(vm.labels ?? {}).length > 0 && ["Labels", html`<${Labels} of=${vm.labels} link/>`],
      ]}/></section>
      ${["running", "paused"].includes(vm.status) && !vm.unreachable && html`<${Use} key=${vm.pid} vm=${vm}/>`}
      <${Sandbox} vm=${vm}/>
      <section class="panel wide"><h2>What happened</h2><${Past} project=${vm.project} name=${vm.name} id=${vm.id}/></section>
    </div>`;
}

/** Which hosts of the fleet may have it. */
const Placement = ({ of: { zone, labels, affinity, anti_affinity: away } }) => [
  zone && ["hosts of the zone ", html`<b><${Said}>${zone}<//></b>`], has(labels) && ["hosts with ", html`<${Labels} of=${labels}/>`],
  has(affinity) && ["where a VM has ", html`<${Labels} of=${affinity}/>`], has(away) && ["where no VM has ", html`<${Labels} of=${away}/>`],
].filter(Boolean).map((line) => html`<div>${line}</div>`);
const has = (labels) => Object.keys(labels ?? {}).length > 0;

const EVERY_MS = 2000;
const KEPT = 150;

/** Processor, memory, disk and network over time, as the host sees them. */
function Use({ vm }) {
  const [{ rows, last }, setState] = useState({ rows: [], last: null });
  const [, error] = usePolled(async () => {
    const all = await client.get("api/v1/stats/vms", { project: named(vm.project) });
    const now = all.find((one) => one.name === vm.name);
    if (!now) return;
    setState(({ rows, last }) => {
      if (!last || now.cpu_s < last.cpu_s) return { rows, last: now };
      const passed = now.clock_s - last.clock_s;
      if (passed <= 0) return { rows, last: now };
      const rate = (member) => (now[member] === null ? null : Math.max(0, now[member] - last[member]) / passed);
      const row = [Date.now() / 1000, 100 * rate("cpu_s"), now.rss_mb, rate("disk_read_bytes"), rate("disk_written_bytes"), rate("received_bytes"), rate("sent_bytes")];
      return { rows: [...rows.slice(-KEPT), row], last: now };
    });
  }, EVERY_MS);
  const only = (...at) => rows.map((row) => [row[0], ...at.map((index) => row[index])]);
  const perSecond = (value) => `${bytes(value)}/s`;
  return html`<section class="panel wide"><h2>Use of the host</h2><${Problem} of=${error?.status ? error : null}/><div class="charts">
    <div><${Chart} label="Processor time, in percent of one core" rows=${only(1)} version=${rows} unit="%" least=${10} series=${[["Processor", "accent"]]}/></div>
    <div><${Chart} label="Resident memory" rows=${only(2)} version=${rows} show=${(mb) => size(Math.round(mb))} least=${64} series=${[["Memory", "good"]]}/></div>
    <div><${Chart} label="Disk reads and writes" rows=${only(3, 4)} version=${rows} show=${perSecond} least=${4096} series=${[["Read", "accent"], ["Written", "wait"]]}/></div>
    ${last?.received_bytes !== null && html`<div><${Chart} label="Network traffic" rows=${only(5, 6)} version=${rows} show=${perSecond} least=${4096} series=${[["In", "accent"], ["Out", "wait"]]}/></div>`}
  </div></section>`;
}

const QUIET_MS = 600;
const KEPT_EVENTS = 400;

/** The events of a VM of this name: those that are kept, then each as it comes. `id`: only of that VM. */
function Past({ project, name, id }) {
  const [found, setFound] = useState(null);
  useEffect(() => {
    const kept = new Map();
    let source;
    let over = false;
    let timer;
    const show = () => {
      if (over) return;
      setFound([...kept.values()].filter((event) => id === undefined || event.vm_id === id).reverse());
    };
    const soon = () => {
      clearTimeout(timer);
      // What is stored comes at once. Then the page's own stream has the rest, and the connection is given back.
      timer = setTimeout(() => { source?.close(); show(); }, QUIET_MS);
    };
    const take = (event) => {
      if (event.name !== name || (event.project ?? "default") !== project) return;
      kept.set(event.id, event);
      if (kept.size > KEPT_EVENTS) kept.delete(kept.keys().next().value);
    };
    const end = onEvent((event) => { take(event); if (!source || source.readyState === EventSource.CLOSED) show(); });
    client.events("api/v1/events/vms", { query: { vm: name, since: "0" }, project: named(project) }).then((opened) => {
      source = opened;
      if (over) return source.close();
      soon();
      source.onerror = () => { source.close(); soon(); };
      for (const type of TYPES) {
        source.addEventListener(type, (message) => { take(JSON.parse(message.data)); soon(); });
      }
    }, show);
    return () => { over = true; clearTimeout(timer); source?.close(); end(); };
  }, [project, name, id]);
  if (!found) return html`<p class="quiet">Reading…</p>`;
  if (!found.length) return html`<p class="quiet">${findVm(project, name)?.unreachable ? "Its host has its events." : "No event of it is kept any more."}</p>`;
  return html`<ul class="timeline">${found.map((event) => html`<${EventLine} key=${event.id} event=${event}/>`)}</ul>`;
}

/** What it began as, and the request or the command that makes one like it. */
function Made({ vm }) {
  const { origin } = vm;
  const texts = origin?.kind === "fork" ? [["volar", forking(vm)]]
    : shown(origin ? { name: vm.name, from_snapshot: origin.snapshot } : requestOf(vm), vm.project, session.value.signed_in);
  const { image } = vm;
  return html`<div class="grid">
    <section class="panel wide"><h2>Origin</h2><${Facts} of=${[
      ["Created", html`<${Time} at=${vm.created_at} full/>`],
      ["As", origin?.kind === "fork" ? html`a fork of <${Ancestor} vm=${vm}/>`
        : origin ? html`a copy of the snapshot <b><${Said}>${origin.snapshot}<//></b> of <${Ancestor} vm=${vm}/>` : "a new VM"],
      origin && ["", html`<a href=${to("forks", { of: `vm-${vm.id}` })}>Show it in the fork tree</a>`],
      origin?.paused_ms > 0 && ["Paused for it", `${origin.paused_ms.toFixed(1)} ms`],
      ["Its last boot", { cold: "a cold one", template: "as a clone of a template", snapshot: "from the snapshot", fork: "from the fork" }[vm.booted_from] ?? "none yet"],
      vm.plugin !== "base" && ["Plugin", html`<a href=${to("plugins")}><${Said}>${vm.plugin}<//></a>`],
      image && ["Image", html`<${Said}>${image.reference}<//> <code class="quiet">${image.digest.slice(0, 19)}</code>`],
      image?.command?.length > 0 && ["Program", html`<code><${Said}>${image.command.join(" ")}<//></code>`],
      vm.kernel_cmdline && ["Kernel's command line", html`<code><${Said}>${vm.kernel_cmdline}<//></code>`],
      vm.network_reason && ["Network", html`${vm.network}: <${Said}>${vm.network_reason}<//>`],
    ]}/></section>
    <section class="panel wide"><h2>One like it</h2>
      ${!origin && html`<p class="quiet">The API shows no environment, and of secrets only the names: where it had some, add them.</p>`}
      ${texts.map(([title, text]) => html`<h2>${title}</h2><${Code} text=${text} label=${title}/>`)}</section>
    <section class="panel wide"><h2>As the API shows it</h2><${Code} text=${JSON.stringify(vm, null, 2)} label="JSON"/></section></div>`;
}

const Ancestor = ({ vm }) => html`<a href=${toVm({ name: vm.origin.vm, project: vm.project })}>${clean(vm.origin.vm)}</a>`;
