/** Creates a VM: a form, and beside it the same request as others would send it. */
import { useState } from "preact/hooks";
import { client, host, may, named, session, seesAll } from "../store.js";
import { Code, Problem, go, html, route, to, toVm, usePolled } from "../ui.js";
import { shown } from "../requests.js";

const KINDS = [["base", "Small Linux"], ["image", "OCI image"], ["plugin", "Plugin"]];

/** Splits a command as a shell does, without anything that a shell replaces. */
function split(text) {
  return [...text.matchAll(/"((?:[^"\\]|\\.)*)"|'([^']*)'|(\S+)/g)].map(([, double, single, bare]) => double?.replace(/\\(.)/g, "$1") ?? single ?? bare);
}

/** Reads `KEY=VALUE` lines. */
function pairs(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const [key, ...rest] = line.trim().split("=");
    if (key) found[key.trim()] = rest.join("=");
  }
  return Object.keys(found).length ? found : undefined;
}

const number = (text) => (text ? Number(text) : undefined);

/** Which hosts of a fleet may have it; undefined: any. */
function placementOf(form) {
  const wanted = { zone: form.zone.trim() || undefined, labels: pairs(form.host_labels), affinity: pairs(form.affinity), anti_affinity: pairs(form.anti_affinity) };
  const found = Object.entries(wanted).filter(([, value]) => value !== undefined);
  return found.length ? Object.fromEntries(found) : undefined;
}

function bodyOf(form) {
  const body = {
    name: form.name.trim(),
    image: form.kind === "image" ? form.image.trim() : undefined,
    plugin: form.kind === "plugin" ? form.plugin : undefined,
    cpu_cores: number(form.cpu_cores), memory_mb: number(form.memory_mb),
    disk_mb: form.kind === "base" ? undefined : number(form.disk_mb),
    command: form.kind === "image" && form.command.trim() ? split(form.command) : undefined,
    env: form.kind === "base" ? undefined : pairs(form.env), labels: pairs(form.labels),
    network: form.network || undefined, ports: form.ports.trim() ? form.ports.split(/[\s,]+/).filter(Boolean) : undefined,
    restart_policy: form.restart_policy === "never" ? undefined : form.restart_policy, ttl: form.ttl.trim() || undefined,
    failover: form.failover === "never" ? undefined : form.failover,
    replicate: form.failover === "restore" ? { every: form.every.trim() || "5m", to: Number(form.copies) } : undefined, placement: placementOf(form),
  };
  return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== undefined));
}

export function Create() {
  const { query } = route.value;
  const [form, setForm] = useState({
    kind: query.image ? "image" : query.plugin ? "plugin" : "base", name: "", image: query.image ?? "", plugin: query.plugin ?? "", cpu_cores: "", memory_mb: "",
    disk_mb: "", command: "", env: "", labels: "", network: "", ports: "", restart_policy: "never", ttl: "", failover: "never", every: "", copies: "1", zone: "", host_labels: "", affinity: "", anti_affinity: "", project: session.value.project ?? "default",
  });
  const [problem, setProblem] = useState(null);
  const [busy, setBusy] = useState(false);
  const [way, setWay] = useState("volar");
  const [plugins] = usePolled(() => client.get("api/v1/plugins"), 0);
  const [projects] = usePolled(() => (seesAll.value ? client.get("api/v1/projects") : []), 0);
  if (!may("control")) return html`<main class="main"><p>Your role can't create VMs.</p></main>`;
  const body = bodyOf(form);
  const set = (name) => (event) => setForm({ ...form, [name]: event.target.value });
  const field = (name, title, more = {}, hint) => html`<label class="field"><span>${title}</span>
    <input name=${name} value=${form[name]} onInput=${set(name)} aria-invalid=${problem?.field?.split(".")[0] === name} autocomplete="off" spellcheck=${false} ...${more}/>
    ${hint && html`<small>${hint}</small>`}</label>`;
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    setProblem(null);
    try {
      go(toVm(await client.post("api/v1/vms", body, { project: named(form.project), idempotent: true, patience: 120_000 })));
    } catch (error) {
      setProblem(error);
      setBusy(false);
    }
  };
  return html`<main class="main"><div class="head"><h1>Create VM</h1></div><div class="grid" style="grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr))">
    <form class="panel" onSubmit=${submit}>
      ${field("name", "Name", { required: true, autofocus: true, placeholder: "web", pattern: "[a-z0-9]([a-z0-9\\-]*[a-z0-9])?", maxlength: 63 }, "Lower-case letters, digits and dashes")}
      <fieldset><legend>What it runs</legend><div class="segments">${KINDS.map(([kind, title]) => html`
        <button type="button" aria-pressed=${form.kind === kind} onClick=${() => setForm({ ...form, kind })}>${title}</button>`)}</div></fieldset>
      ${form.kind === "image" && field("image", "Image", { required: true, placeholder: "nginx:1.29" }, "As docker run takes it. It is fetched if it is not in the cache.")}
      ${form.kind === "image" && field("command", "Command", { placeholder: "the image's own" })}
      ${form.kind === "plugin" && html`<label class="field"><span>Plugin</span><select name="plugin" required value=${form.plugin} onChange=${set("plugin")}>
        <option value="">Choose one</option>${(plugins ?? []).filter((one) => one.enabled && one.name !== "base").map((one) => html`<option value=${one.name}>${one.name}</option>`)}</select>
        <small>${plugins && plugins.every((one) => one.name === "base") ? "None is installed; `volar plugins install` does that." : "What it runs is in the plugin's manifest."}</small></label>`}
      <div class="two">${field("cpu_cores", "Processors", { type: "number", min: 1, max: 256, placeholder: "1" })}
        ${field("memory_mb", "Memory, MiB", { type: "number", min: 64, step: 1, placeholder: form.kind === "image" ? "512" : "256" })}</div>
      <details><summary>More</summary><div style="padding-top: 10px">
        ${form.kind !== "base" && field("disk_mb", "Disk, MiB", { type: "number", min: 1, placeholder: form.kind === "image" ? "10240" : "" })}
        ${projects?.length > 1 && html`<label class="field"><span>Project</span><select value=${form.project} onChange=${set("project")}>${projects.map((one) => html`<option>${one.name}</option>`)}</select></label>`}
        <div class="two">${field("network", "Network", { placeholder: "the daemon's setting" }, "none, bridge, user, or a name")}
          ${field("ports", "Published ports", { placeholder: "8080:80" })}</div>
        ${form.kind !== "base" && html`<label class="field"><span>Environment</span><textarea name="env" placeholder="KEY=VALUE, one a line" value=${form.env} onInput=${set("env")}></textarea></label>`}
        <label class="field"><span>Labels</span><textarea name="labels" placeholder="KEY=VALUE, one a line" value=${form.labels} onInput=${set("labels")}></textarea></label>
        <div class="two"><label class="field"><span>Restart policy</span><select value=${form.restart_policy} onChange=${set("restart_policy")}>
          <option>never</option><option>on-failure</option><option>always</option></select></label>
          ${field("ttl", "Delete it after", { placeholder: "never; 30m, 2h" })}</div>
        ${host.value !== null && html`<div class="two"><label class="field"><span>If its host fails</span><select value=${form.failover} onChange=${set("failover")}>
            <option value="never">it stays there</option><option value="restart">another host boots it</option><option value="restore">another host continues it</option></select>
            ${form.failover === "restart" && html`<small>With an empty disk, so without volumes.</small>`}
            ${form.failover === "restore" && html`<small>From its last replica, so without volumes.</small>`}</label>
          ${field("zone", "Zone", { placeholder: "any" })}</div>
          ${form.failover === "restore" && html`<div class="two">${field("every", "Replicate it every", { placeholder: "5m" }, "It loses at most that, and the time of the copy")}
            ${field("copies", "To how many hosts", { type: "number", min: 1, max: 3, required: true })}</div>`}
          ${[["host_labels", "Only on hosts with labels"], ["affinity", "Only where a VM has labels"], ["anti_affinity", "Only where no VM has labels"]].map(([name, title]) => html`
            <label class="field"><span>${title}</span><textarea name=${name} placeholder="KEY=VALUE, one a line" value=${form[name]} onInput=${set(name)}></textarea></label>`)}`}</div></details>
      <${Problem} of=${problem}/>
      <div class="row" style="margin-top: 12px"><button class="first" disabled=${busy}>${busy ? "Creating…" : "Create VM"}</button><a class="button" href=${to("vms")}>Cancel</a></div>
    </form>
    <section class="panel"><div class="row" style="margin-bottom: 8px"><h2 style="margin: 0; flex: 1">The same request</h2><div class="segments">${["volar", "curl", "Python"].map((one) => html`
      <button type="button" aria-pressed=${way === one} onClick=${() => setWay(one)}>${one}</button>`)}</div></div>
      <${Code} text=${shown({ ...body, name: body.name || "web" }, form.project, session.value.signed_in).find(([title]) => title === way)[1]} label=${`The request, for ${way}`}/></section>
  </div></main>`;
}
