/** Lists of what VMs are made from and use. Each is a few columns of what the API answers; they are read when shown. */
import { useState } from "preact/hooks";
import { client, fleet, host, may, named, seesAll, vms } from "../store.js";
import { path } from "../api.js";
import { Ago, Dialog, Empty, Facts, FormDialog, Labels, Problem, Said, State, Time, ask, bytes, clean, complain, html, notify, size, to, toVm, usePolled } from "../ui.js";
import { askCreateFrom } from "../actions.js";

const EVERY_MS = 5000;
const MOST_VMS = 12;
const text = (value) => html`<${Said}>${value}<//>`;
const users = (names) => (names.length ? text(names.join(", ")) : html`<span class="quiet">nothing</span>`);
const project = ["Project", (one) => text(one.project), "several"];
const age = ["Age", (one) => html`<${Ago} at=${one.created_at}/>`, "narrow"];

/** By place: title, path, columns (title, cell, class, which rows have something in it; without one it is left out), what deletes one, what teaches when there is none. */
export const RESOURCES = {
  snapshots: {
    title: "Snapshots", path: "api/v1/snapshots", everyProject: true,
    columns: [["Name", (one) => html`<b>${text(one.name)}</b>`], ["Of VM", (one) => html`<a href=${toVm({ name: one.vm, project: one.project })}>${clean(one.vm)}</a>`],
      ["State", (one) => html`<${State} of=${one.status}/>`], ["Memory", (one) => size(one.memory_mb), "right"], ["On disk", (one) => bytes(one.size_bytes), "right"],
      ["Paused", (one) => (one.paused_ms === null ? "–" : `${one.paused_ms.toFixed(0)} ms`), "right"], ["Description", (one) => text(one.description)], project, age],
    actions: [["New VM…", askCreateFrom]],
    remove: (one) => path`api/v1/snapshots/${one.name}`, removes: "VMs that were made from it go on.",
    empty: "A snapshot keeps a running VM as it is: memory, devices and disk. New VMs continue from that moment. Take one with a VM's “Snapshot” button.",
    command: "volar vms snapshot demo",
  },
  images: {
    title: "Images", path: "api/v1/images",
    columns: [["Image", (one) => html`<b>${text(one.references[0] ?? one.digest.slice(0, 19))}</b>${one.references.length > 1 && html` <span class="quiet">and ${one.references.length - 1} more names</span>`}`],
      ["Digest", (one) => html`<code>${one.digest.slice(7, 19)}</code>`, "narrow"], ["Platform", (one) => text(one.platform), "narrow"], ["Size", (one) => bytes(one.size_bytes), "right"],
      ["Layers", (one) => one.layers.length, "right"], ["Used by", (one) => users(one.used_by)], ["Last used", (one) => html`<${Ago} at=${one.used_at}/>`, "narrow"]],
    remove: (one) => path`api/v1/images/${one.digest}`, removes: "A VM that names it fetches it again.", progress: true,
    create: ["Fetch an image…", [["reference", "Image", "nginx:1.29"]], (body) => client.post("api/v1/images/pull", body, { patience: 0 })],
    empty: "VMs can run OCI images, as containers do. An image is fetched when the first VM names it, or now.", command: "volar images pull nginx:1.29",
  },
  templates: {
    title: "Templates", path: "api/v1/templates",
    columns: [["Plugin", (one) => html`<b>${text(one.plugin)}</b>`], ["Digest", (one) => html`<code>${one.digest.slice(0, 12)}</code>`, "narrow"], ["State", (one) => html`<${State} of=${one.state}/>`],
      ["Machine", (one) => `${one.cpu_cores} × ${size(one.memory_mb)}`], ["After", (one) => text(one.after)], ["On disk", (one) => bytes(one.size_bytes), "right"], ["Clones", (one) => one.clones, "right"], age],
    remove: (one) => path`api/v1/templates/${one.digest}`, removes: "Its clones go on. The next VM like them boots cold, and a template is built again.", removePermission: "admin",
    empty: "A template is a guest that has booted already. New VMs like it are clones, and begin in a fraction of a second. The daemon builds them by itself.",
  },
  volumes: {
    title: "Volumes", path: "api/v1/volumes", everyProject: true,
    columns: [["Name", (one) => html`<b>${text(one.name)}</b>`], ["State", (one) => html`<${State} of=${one.status}/>`], ["Size", (one) => size(one.size_mb), "right"],
      ["Used", (one) => (one.used_bytes === null ? html`<span class="bad">its file is missing</span>` : bytes(one.used_bytes)), "right"], ["Written by", (one) => text(one.writer ?? "–")],
      ["Mounted by", (one) => users(one.used_by)], ["Labels", (one) => html`<${Labels} of=${one.labels}/>`], project, age],
    remove: (one) => path`api/v1/volumes/${one.name}`, removes: "Its files are lost.",
    create: ["New volume…", [["name", "Name", "data"], ["size_mb", "Size, MiB", "1024"]], (body) => client.post("api/v1/volumes", { ...body, size_mb: Number(body.size_mb) }, { idempotent: true })],
    empty: "A volume is a disk with a name. It keeps its files when its VM is deleted.", command: "volar volumes create data --size 1G",
  },
  networks: {
    title: "Networks", path: "api/v1/networks", everyProject: true,
    columns: [["Name", (one) => html`<b>${text(one.name)}</b>`], ["VMs", (one) => Object.entries(one.vms).map(([name, address]) => html`<a class="tag" href=${toVm({ name, project: one.project })}>${name} ${address}</a> `)], project, age],
    remove: (one) => path`api/v1/networks/${one.name}`, removes: "No VM may be in it.",
    create: ["New network…", [["name", "Name", "backend"]], (body) => client.post("api/v1/networks", body, { idempotent: true })],
    empty: "VMs reach each other only in a network that has a name.", command: "volar networks create backend",
  },
  secrets: {
    title: "Secrets", path: "api/v1/secrets", everyProject: true,
    columns: [["Name", (one) => html`<b>${text(one.name)}</b>`], ["Version", (one) => one.version, "right"], ["Readable", (one) => (one.readable ? "yes" : html`<span class="bad">the key is missing</span>`)],
      ["Used by", (one) => users(one.used_by)], project, ["Set", (one) => html`<${Ago} at=${one.updated_at}/>`, "narrow"]],
    remove: (one) => path`api/v1/secrets/${one.name}`, removes: "No VM may refer to it.",
    empty: "Secrets are values that VMs get and that nobody can read back.", command: "volar secrets set token < token.txt",
  },
  plugins: {
    title: "Plugins", path: "api/v1/plugins", everyProject: true,
    columns: [["Name", (one) => html`<b>${text(one.name)}</b>`], ["Version", (one) => text(one.version), "narrow"], ["Description", (one) => text(one.description)],
      ["New VMs", (one) => (one.enabled ? "yes" : html`<span class="quiet">not allowed</span>`), "narrow"], project],
    actions: [["Actions…", askActions, (one) => !one.builtin], ["Create VM", (one) => { location.hash = to("create", { plugin: one.name }); }]],
    remove: (one) => (one.builtin ? null : path`api/v1/plugins/${one.name}`), removes: "No VM may use it.",
    empty: "A plugin says what a kind of VM runs.",
  },
  hosts: {
    title: "Hosts", path: "api/v1/hosts", host: true, here: () => host.value !== null,
    columns: [["Name", (one) => html`<b>${text(one.name)}</b>${one.name === host.value && html` <span class="quiet">answers you</span>`}`, "narrow"],
      ["State", (one) => html`<${State} of=${one.state === "up" && one.draining_since ? "draining" : one.state}/>`, "narrow"],
      ["New VMs", (one) => (one.draining_since ? html`none, for <${Ago} at=${one.draining_since}/>` : one.state === "up" ? "yes" : "none now"), "narrow"], ["VMs", (one) => last(one, one.vms), "right"],
      ["vCPUs / CPUs", (one) => last(one, `${one.used_cpu_cores} / ${one.cpu_cores}`), "right"], ["Free memory", (one) => last(one, `${size(one.free_memory_mb)} / ${size(one.memory_mb)}`), "right"],
      ["Free disk", (one) => last(one, size(one.free_disk_mb)), "right"], ["Zone", (one) => text(one.zone), "", (one) => one.zone], ["Labels", (one) => html`<${Labels} of=${one.labels}/>`, "", (one) => Object.keys(one.labels).length], ["Version", (one) => text(one.version), "narrow"]],
    note: Fleet,
    actionPermission: "admin",
    actions: [["Drain…", askDrain, (one) => !one.draining_since], ["Undrain…", askUndrain, (one) => one.draining_since]],
    removePermission: "admin", remove: (one) => (one.state === "up" ? null : path`api/v1/hosts/${one.name}`),
    removes: "Only if it is gone for good: the names of its VMs, snapshots and volumes are free then. If it comes back, it is a new host, with its VMs.",
    empty: "This host is no part of a fleet.",
  },
  projects: {
    title: "Projects", path: "api/v1/projects", host: true,
    columns: [["Name", (one) => html`<b>${text(one.name)}</b>`], ["VMs", (one) => of(one, "vms"), "right"], ["Processors", (one) => of(one, "cpu_cores"), "right"], ["Memory", (one) => of(one, "memory_mb", size), "right"], age],
    removePermission: "admin", remove: (one) => (one.name === "default" ? null : path`api/v1/projects/${one.name}`), removes: "It has to be empty.",
    empty: "A project is a set of names, with limits.",
  },
  keys: {
    title: "Keys", path: "api/v1/keys", permission: "admin", host: true,
    columns: [["Name", (one) => html`<b>${text(one.name)}</b>`], ["Role", (one) => one.role, "narrow"], ["Project", (one) => text(one.project ?? "all")], ["Made by", (one) => text(one.created_by)],
      ["Expires", (one) => (one.expired ? html`<span class="bad">expired</span>` : one.expires_at ? html`<${Time} at=${one.expires_at} full/>` : "never")],
      ["Last used", (one) => (one.last_used_at ? html`<${Ago} at=${one.last_used_at}/> ago, from ${text(one.last_used_from)}` : "never")], age],
    remove: (one) => path`api/v1/keys/${one.name}`, removes: "Requests, streams and sessions with it end at once.", removePermission: "admin",
    empty: "No key is in force: everybody who reaches this address may do everything. The first key has to be an administrator's.", command: "volar keys create me --role admin",
  },
  audit: {
    title: "Audit", path: "api/v1/audit", permission: "admin", host: true, query: { limit: 200 }, newestFirst: true,
    columns: [["Time", (one) => html`<${Time} at=${one.time}/>`, "narrow"], ["Caller", (one) => text(one.caller)], ["From", (one) => text(one.address)], ["Operation", (one) => html`<code>${clean(one.operation)}</code>`],
      ["Of", (one) => text(one.target), "clip"], ["Project", (one) => text(one.project ?? "all")], ["Outcome", (one) => (/^\d/.test(one.outcome) ? html`<span class="bad">${text(one.outcome)}</span>` : text(one.outcome)), "narrow"],
      ["Detail", (one) => html`<span title=${clean(one.detail)}>${text(one.detail)}</span>`, "clip"]],
    empty: "Nothing was changed yet, and nobody has reached into a guest.",
  },
};

/** What a host that gives no sign of life has reported last. */
const last = (one, figure) => (one.state === "up" ? figure : html`<span class="quiet" title="As it has last reported">${figure}</span>`);

function askDrain(one, done, rows) {
  const others = rows.filter((other) => other.name !== one.name && other.state === "up" && !other.draining_since);
  steer(one, "drain", done, html`<p>It gets no new VMs until it is undrained. ${one.vms ? "Its VMs move to other hosts, with memory and disk: each is paused while it is copied. What can't move stays." : "It has no VM."}</p>
    ${!others.length && html`<p class="bad">No other host takes new VMs now: none can be created then, and none moves.</p>`}`);
}

function askUndrain(one, done) {
  steer(one, "undrain", done, html`<p>It gets new VMs again, and keeps those that it has.</p>`);
}

function steer(one, what, done, said) {
  const title = what === "drain" ? "Drain" : "Undrain";
  ask((close) => html`<${FormDialog} title=${`${title} ${clean(one.name)}?`} action=${title} close=${close} act=${async () => {
    await client.post(path`api/v1/hosts/${one.name}/${what}`, {});
    done();
  }}>${said}<//>`);
}

/** What is wrong with the fleet, as the host that answers sees it. */
function Fleet() {
  const { etcd, trouble, conflicts, fence, fence_obstacle: obstacle } = fleet.value ?? {};
  return html`${etcd === "unreachable" && html`<div class="note bad" role="alert">${clean(host.value)} can't reach etcd. What hosts have to agree on, such as new names, has to wait.</div>`}
    ${fence === "closed" && html`<div class="note">The movable VMs of ${clean(host.value)} are paused until etcd answers.</div>`}
    ${fence === "unavailable" && obstacle && html`<div class="note">${clean(host.value)} can have no VM that other hosts may start: ${text(obstacle)}</div>`}
    ${trouble && html`<div class="note bad" role="alert">${text(trouble)}</div>`}
    ${conflicts?.length > 0 && html`<div class="note">Other hosts have these names, too, so ${clean(host.value)} alone finds its own: ${text(conflicts.join(", "))}</div>`}`;
}

/** Shows the actions of a plugin, and its VMs, where they are called. */
function askActions(plugin) {
  ask((close) => html`<${Actions} plugin=${plugin} close=${close}/>`);
}

function Actions({ plugin, close }) {
  const [manifest, error] = usePolled(() => client.get(path`api/v1/plugins/${plugin.name}/manifest`, { project: named(plugin.project) }), 0, [plugin.name]);
  const actions = Object.entries(manifest?.actions ?? {});
  const theirs = [...vms.values()].filter((vm) => vm.plugin === plugin.name && vm.project === plugin.project).slice(0, MOST_VMS);
  return html`<${Dialog} title=${`Actions of ${clean(plugin.name)}`} close=${close}><${Problem} of=${error}/>
    ${manifest && !actions.length && html`<p>It has none.</p>`}
    ${actions.length > 0 && html`<${Facts} of=${actions.map(([name, action]) => [clean(name), text(action.description || "–")])}/>
      <p style="margin-top: 12px">${theirs.length ? "Call them in a VM:" : "They are called in a VM of this plugin. There is none yet."} ${theirs.map((vm) => html`<a class="tag" href=${toVm(vm, "actions")} onClick=${close}>${vm.name}</a> `)}</p>`}
    <div class="end"><button onClick=${close}>Close</button></div><//>`;
}

/** Whether there is a view for this caller, at this host. */
export const isShown = ({ permission = "view", here }) => may(permission) && (!here || here());

function of(one, member, show = String) {
  const used = one.used?.[member];
  const limit = one.quota?.[member];
  if (used === undefined) return "–";
  return limit ? `${show(used)} of ${show(limit)}` : show(used);
}

export function Resource({ of: place }) {
  const resource = RESOURCES[place];
  const [round, setRound] = useState(0);
  const allowed = may(resource.permission ?? "view");
  const project = resource.everyProject && seesAll.value ? "*" : undefined;
  const [found, error] = usePolled(async () => {
    if (!allowed) return [];
    const rows = await client.get(resource.path, { query: { ...resource.query, project } });
    return rows;
  }, EVERY_MS, [place, round]);
  const [pulls] = usePolled(() => (resource.progress ? client.get("api/v1/images/pulls") : []), resource.progress ? 1000 : 0, [place]);
  if (!allowed) return html`<main class="main"><p>Your role can't see this.</p></main>`;
  const rows = resource.newestFirst && found ? [...found].reverse() : found;
  const several = rows && new Set(rows.map((row) => row.project)).size > 1;
  const columns = resource.columns.filter(([, , kind, has]) => (kind !== "several" || several) && (!has || rows?.some(has)));
  const removable = resource.remove && may(resource.removePermission ?? "control");
  const again = () => setRound(round + 1);
  const actions = may(resource.actionPermission ?? "control") ? resource.actions ?? [] : [];
  return html`<main class="main"><div class="head"><h1>${resource.title}</h1><span class="quiet num">${rows?.length || ""}</span><span class="space"></span>
      ${resource.create && may("control") && html`<button onClick=${() => askCreate(resource, again)}>${resource.create[0]}</button>`}</div>
    <${Problem} of=${error}/>${resource.note && html`<${resource.note}/>`}
    ${(pulls ?? []).map((pull) => html`<div class="note">Fetching ${text(pull.reference)}: ${clean(pull.phase)}, ${bytes(pull.done_bytes ?? 0)} of ${bytes(pull.total_bytes ?? 0)}
      <progress style="width: 100%; display: block" max=${pull.total_bytes || 1} value=${pull.done_bytes ?? 0} aria-label="Progress"></progress></div>`)}
    ${rows === null && !error && html`<p class="quiet" role="status">Reading…</p>`}
    ${rows?.length === 0 && html`<${Empty} title=${`No ${resource.title.toLowerCase()} yet`}><p>${resource.empty}</p>${resource.command && html`<div class="code"><pre>${resource.command}</pre></div>`}<//>`}
    ${rows?.length > 0 && html`<div class="panel scroll-x" style="padding: 6px 6px 0" tabindex="0" role="region" aria-label=${resource.title}><table>
      <thead><tr>${columns.map(([title, , kind]) => html`<th class=${kind}>${title}</th>`)}${(removable || actions.length > 0) && html`<th><span class="hidden">Actions</span></th>`}</tr></thead>
      <tbody>${rows.map((row) => html`<tr key=${row.name ?? row.digest ?? row.seq}>${columns.map(([, cell, kind]) => html`<td class=${kind}>${cell(row)}</td>`)}
        ${(removable || actions.length > 0) && html`<td class="narrow right"><div class="row" style="flex-wrap: nowrap; justify-content: end">${actions.filter(([, , when]) => !when || when(row)).map(([title, act]) => html`<button onClick=${() => act(row, again, rows)}>${title}</button>`)}
          ${removable && resource.remove(row) && html`<button class="danger" onClick=${() => askRemove(resource, row, again)}>Delete…</button>`}</div></td>`}</tr>`)}</tbody></table></div>`}</main>`;
}

function askRemove(resource, row, done) {
  const name = row.name ?? row.references?.[0] ?? row.digest.slice(0, 19);
  ask((close) => html`<${FormDialog} title=${`Delete ${clean(name)}?`} action="Delete" danger close=${close} act=${async () => {
    await client.del(resource.remove(row), { project: row.project ? named(row.project) : undefined });
    notify(`${name} is deleted`);
    done();
  }}><p>${resource.removes}</p><//>`);
}

function askCreate(resource, done) {
  const [title, fields, create] = resource.create;
  ask((close) => html`<${FormDialog} title=${title.replace("…", "")} action="OK" close=${close} act=${async (form) => {
    await create(Object.fromEntries(form));
    done();
  }}>${fields.map(([name, label, example]) => html`<label class="field"><span>${label}</span><input name=${name} required autocomplete="off" placeholder=${example}/></label>`)}<//>`);
}
