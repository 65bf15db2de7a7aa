/** What a VM's process may do to its host: the sandbox that it was started in, and the limits that the kernel applies. */
import { path } from "../api.js";
import { written } from "../requests.js";
import { client, named } from "../store.js";
import { Facts, Problem, Said, bytes, html, lasting, size, usePolled } from "../ui.js";

const EVERY_MS = 10_000;
/** Versions of Landlock from which on it denies TCP, and signals to other processes. */
const DENIES_TCP = 4;
const DENIES_SIGNALS = 6;

const none = (why) => html`<b>none</b>${why && html`: <${Said}>${why}<//>`}`;

/** The panels of a VM. Without a process there is only what was requested. */
export function Sandbox({ vm }) {
  const up = Boolean(vm.pid) && !vm.unreachable;
  const [found, error] = usePolled(() => (up ? client.get(path`api/v1/vms/${vm.name}/inspect`, { project: named(vm.project) }) : null), EVERY_MS, [vm.id, vm.pid, up]);
  const sandbox = up ? found?.actor?.actor?.process?.sandbox : null;
  return html`
    <section class="panel sandbox"><h2>Sandbox</h2>${vm.unreachable ? html`<p class="quiet">Its host can't be asked.</p>`
      : !up ? html`<p class="quiet">It has no process on the host now that could do anything.</p>`
      : error ? html`<${Problem} of=${error}/>`
      : !found ? html`<p class="quiet">Reading…</p>`
      : sandbox ? html`<${Facts} of=${layers(sandbox)}/>` : html`<p class="quiet">The daemon does not watch its process yet.</p>`}</section>
    <section class="panel limits"><h2>Limits</h2><${Facts} of=${[...(sandbox ? ceilings(sandbox.limits) : []), ...requested(vm), ...denied(found?.egress)]}/></section>`;
}

function layers({ user, no_user: noUser, landlock, no_connect: noConnect, filters, capabilities, no_new_privileges: noNew }) {
  const off = landlock === undefined;
  const why = off ? "the daemon's setting `sandbox` was off when it was started" : "this host's kernel can't do that";
  return [
    ["User", off || noUser ? html`${none(off ? why : noUser)}; it runs as the daemon's, ${user}` : `${user}, one of its own`],
    ["Files", landlock ? "only its own, and installed programs" : none(why)],
    ["TCP", landlock >= DENIES_TCP ? "denied, in and out" : none(why)],
    ["Signals", landlock >= DENIES_SIGNALS ? "denied to other processes" : none(why)],
    ["System calls", !filters ? none("no seccomp filter") : `${filters} seccomp ${filters === 1 ? "filter" : "filters"}: no new programs${noConnect ? ", no connections, no change of rights" : ""}`],
    ["Capabilities", capabilities ? html`<b>0x${capabilities.toString(16)}</b>` : "has none"],
    ["New rights", noNew ? "can't gain any" : none("programs that it starts may gain rights")],
  ];
}

/** What the control group allows, by the names of its files. */
function ceilings(limits) {
  if (!limits) return [["Control group", none("this host gives its process none of its own")]];
  const has = (file) => limits[file] !== undefined;
  const [quota, period] = (limits["cpu.max"] ?? "").split(" ");
  const most = (value, show) => (value === "max" ? none() : show(Number(value)));
  return [
    !Object.keys(limits).length && ["Control group", none("this host's groups can't limit anything")],
    has("memory.max") && ["Memory of the process", most(limits["memory.max"], bytes)],
    has("cpu.max") && ["Processor time", most(quota, (used) => `${+(used / Number(period)).toFixed(2)} processors at most`)],
    has("cpu.weight") && ["Share when busy", `${limits["cpu.weight"]} (100 is a usual process)`],
    has("io.weight") && ["Share of disks", limits["io.weight"].replace(/^default /, "")],
    has("pids.max") && ["Tasks", most(limits["pids.max"], String)],
  ];
}

function requested(vm) {
  const { egress = "all" } = vm;
  const disks = vm.disk !== "none" || vm.volumes?.length > 0;
  return [
    ["Disk", vm.disk === "none" ? "it has none" : vm.disk_mb ? size(vm.disk_mb) : "the size of its image"],
    disks && ["Disk operations", vm.disk_iops ? `${vm.disk_iops} a second` : "no limit"],
    disks && ["Disk traffic", vm.disk_mbps ? `${vm.disk_mbps} MiB a second` : "no limit"],
    ["Connections out", vm.network === "none" ? "it has no network" : egress === "all" ? "no limit: to any address" : egress === "none" ? "denied"
      : html`only to ${egress.map((rule) => html`<span class="tag">${written(rule)}</span> `)}`],
  ];
}

function denied(egress) {
  if (!egress) return [];
  const lately = [...egress.denied_destinations.map((one) => [`${one.address}:${one.port}/${one.protocol}`, one.ago_s]), ...egress.denied_names.map((one) => [one.name, one.ago_s])];
  return [
    egress.denied_connections !== null && ["Denied", `${egress.denied_connections} ${egress.denied_connections === 1 ? "connection" : "connections"}`],
    lately.length > 0 && ["Denied lately", lately.slice(0, 8).map(([what, ago]) => html`<div><code><${Said}>${what}<//></code> <span class="quiet">${lasting(ago)} ago</span></div>`)],
    egress.problem && ["", html`<span class="bad"><${Said}>${egress.problem}<//></span>`],
  ];
}
